"""What the benchmarks share: flags, the machine and its versions, comparisons, taking turns, peak
memory, the file with the results."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def positive(text: str) -> int:
    """The type of flags whose number is at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def make_parser(description: str, device: str | None = None) -> argparse.ArgumentParser:
    """With the flag --output, and --device if a default of it is given; a program adds its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    if device:
        parser.add_argument("--device", default=device)
    return parser


def machine(device: str) -> dict:
    """Names of processor and GPU, number of cores, load average."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "load_average_at_start": load}


def stamp(
    name: str, arguments: list[str] | None, device: str, packages: tuple[str, ...] = ()
) -> dict:
    """What a file of results begins with: date, machine, versions, threads and the command
    of the module of that name."""
    words = sys.argv[1:] if arguments is None else arguments
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", "-m", name, *words]),
    }


def write(result: dict, output: Path | None) -> None:
    """Writes a JSON file, if there is to be one."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; `columns` maps keys to the formats of their numbers, and None is
    left empty."""
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        cells = [
            "" if row[key] is None else format(row[key], form) for key, form in columns.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds(run: Callable[[], object], device: str) -> float:
    """How long a call takes, with what it starts on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    contenders: dict[Any, Callable[[], object]],
    rounds: int,
    device: str,
    *,
    in_a_row: int = 1,
    slow: Container = (),
    slow_rounds: int = 0,
) -> dict[Any, list[float]]:
    """Seconds of a call of each contender in rounds in which all take a turn, after one that is not
    counted.

    Arguments:
        in_a_row: Calls in a turn: to wait for a GPU takes time, too.
        slow: Contenders that have no turn after `slow_rounds` rounds.
    """
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            if name in slow and turn > slow_rounds:
                continue
            taken = seconds(lambda run=run: [run() for _ in range(in_a_row)], device)
            if turn > 0:
                times[name].append(taken / in_a_row)
    return times


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], object], device: str) -> float:
    """Peak of a call in MiB beyond what exists before it, of torch's allocator."""
    if device.startswith("cuda"):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0)) / 2**20


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 convolutions and products in float32: by default those of cuDNN round their operands
    to 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def require_close(
    name: str,
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float,
) -> None:
    """SystemExit if one of the tensors differs from what was expected, relative to its norm, by
    more than the tolerance."""
    for key, tensor in found.items():
        truth = expected[key].detach().double()
        error = (tensor.detach().double() - truth).norm() / truth.norm().clamp(min=1e-30)
        if not error <= tolerance:
            sys.exit(
                f"{name} is not timed: {key} differs from the reference by {error:.1e}, allowed "
                f"is {tolerance:.0e}"
            )
