"""How the examples compare networks: flags, the choice of learning rates, seeds, results, promises.

The protocol is in docs/beyond-vaes.md.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from examples import common

RATES = [1e-3, 3e-3, 1e-2]
SEED_OF_SELECTION = 1000  # no reported run uses it
Arms = dict[str, Callable[[], nn.Module]]
Tests = dict[int | str, common.Pictures]  # by size or name
Scores = dict[str, dict[int | str, list[float]]]


def parser(
    doc: str | None,
    arms: Arms,
    default_arms: list[str],
    *,
    steps: int,
    sizes: list[int],
    train_sizes: list[int] | None = None,
) -> argparse.ArgumentParser:
    """The flags that programs which compare arms at several sizes have in common."""
    flags = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    flags.add_argument("--arms", nargs="+", choices=arms, default=default_arms)
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--steps", type=positive, default=steps)
    flags.add_argument("--seconds", type=float, help="processor time of each arm, not --steps")
    flags.add_argument("--learning_rate", type=float, default=3e-3)
    flags.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    flags.add_argument(
        "--select",
        action="store_true",
        help=f"choose each arm's learning rate among {RATES} at the training size",
    )
    flags.add_argument("--train_sizes", nargs="+", type=positive, default=train_sizes or [32])
    flags.add_argument("--sizes", nargs="+", type=positive, default=sizes)
    flags.add_argument("--pictures", type=positive, default=4000, help="to train on")
    flags.add_argument("--tests", type=positive, default=20, help="pictures of each size")
    flags.add_argument("--picture", type=Path, help="PNG file of every arm's answers")
    flags.add_argument(
        "--results", type=Path, help="file to which a line of JSON is appended a run"
    )
    flags.add_argument("--quick", action="store_true", help="a few steps; promises nothing")
    return flags


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse(flags: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The flags' values, checked; with `--quick` they ask for little work."""
    values = flags.parse_args(arguments)
    if min(values.sizes + values.train_sizes) < 16:
        flags.error("--sizes and --train_sizes must be at least 16")
    for name in ("seconds", "learning_rate", "clip"):
        value = getattr(values, name)
        if value is not None and not 0 < value < math.inf:
            flags.error(f"--{name} must be positive")
    if values.quick:
        values.steps, values.seeds, values.sizes = 4, values.seeds[:1], [32, 64]
        values.pictures, values.tests, values.train_sizes = 64, 2, [32]
    return values


def compare(
    example: str,
    arms: Arms,
    make: common.Make,
    flags: argparse.Namespace,
    further: Tests | None = None,
) -> Scores:
    """Trains every arm from every seed, prints a line for each run and the table, and writes the
    picture, with networks of the first seed.

    Arguments:
        further: Pictures to test on besides those of the flags' sizes.

    Returns:
        Intersections over union by arm and size, one for each seed.
    """
    torch.set_num_threads(1)
    training = [make(flags.pictures, size, 0) for size in flags.train_sizes]
    tests = test_pictures(make, flags) | (further or {})

    def run(
        arm: str, rate: float, seed: int, tests: Tests
    ) -> tuple[nn.Module, dict[int | str, float]]:
        """Trains, tests and records one network."""
        network, steps, seconds = common.train(
            arms[arm],
            training,
            steps=flags.steps,
            seconds=flags.seconds,
            clip=flags.clip,
            learning_rate=rate,
            seed=seed,
        )
        iou = {name: common.intersection_over_union(network, p) for name, p in tests.items()}
        parameters = sum(p.numel() for p in network.parameters())
        of_run = dict(example=example, arm=arm, parameters=parameters, seed=seed)
        of_run |= dict(learning_rate=rate, clip=flags.clip, train_sizes=flags.train_sizes)
        of_run |= dict(steps=steps, seconds=round(seconds, 1))
        of_run |= dict(iou={str(name): round(value, 5) for name, value in iou.items()})
        record(flags.results, of_run)
        return network, iou

    def selected_rate(arm: str) -> float:
        """The one with the best mean at the training sizes."""
        held_out = held_out_pictures(make, flags)
        at = {rate: run(arm, rate, SEED_OF_SELECTION, held_out)[1].values() for rate in RATES}
        return max(at, key=lambda rate: sum(at[rate]))

    scores: Scores = {arm: {name: [] for name in tests} for arm in flags.arms}
    trained: dict[str, nn.Module] = {}
    for arm in flags.arms:
        rate = selected_rate(arm) if flags.select else flags.learning_rate
        for seed in flags.seeds:
            network, iou = run(arm, rate, seed, tests)
            trained.setdefault(arm, network)
            for name, value in iou.items():
                scores[arm][name].append(value)
    print(common.table(scores))
    if flags.picture:
        common.picture(flags.picture, trained, make, flags.sizes)
    return scores


def test_pictures(make: common.Make, flags: argparse.Namespace) -> Tests:
    """Pictures of the flags' sizes. Above 256x256 there are as many times fewer of them as they are
    larger."""
    counts = {size: round(flags.tests * min(1, (256 / size) ** 2)) for size in flags.sizes}
    return {size: make(max(1, count), size, 1_000_000 + size) for size, count in counts.items()}


def held_out_pictures(make: common.Make, flags: argparse.Namespace) -> Tests:
    """Pictures of the training sizes on which choices are made."""
    return {size: make(100, size, 2_000_000 + size) for size in flags.train_sizes}


def record(path: Path | None, run: dict) -> None:
    """Prints a run's figures and, if a path is given, appends them to it as a line of JSON with the
    machine's load."""
    print(", ".join(f"{name}: {value}" for name, value in run.items()), flush=True)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(run | {"load": round(os.getloadavg()[0], 1)}) + "\n")


def missed(measured: dict[str, float], promised: dict[str, float]) -> int:
    """The exit status: 1, with a line for each figure that is below its promise, or 0."""
    status = 0
    for name, promise in promised.items():
        if name in measured and not measured[name] >= promise:
            print(f"promise missed: {name}: {measured[name]:.4f} < {promise}", file=sys.stderr)
            status = 1
    return status


def means(scores: Scores, arm: str) -> dict[str, float]:
    """An arm's mean at each size, under the names that promises have."""
    if arm not in scores:
        return {}
    return {f"{arm} at {size}": sum(v) / len(v) for size, v in scores[arm].items()}
