"""Evaluates a trained density VAE: negative ELBO, likelihood, samples. `python evaluate.py --help`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.datamodule import ImageDataModule
from data.errors import DataError
from data.get_dataset import DATASETS
from lib.checkpoint import CheckpointError, load_model
from lib.cli import OneLineParser, one_line_errors
from lib.config import ConfigError, TrainConfig
from lib.DensityVAE import DensityVAE
from lib.evaluation.figures import save_grid, save_image
from lib.evaluation.likelihood import Progress, negative_elbo, negative_log_likelihood
from lib.evaluation.synthesis import OUTPUTS, sample_images
from lib.nn import BACKENDS


def make_parser() -> OneLineParser:
    parser = OneLineParser("evaluate.py", description=__doc__)
    which = parser.add_argument_group("What to evaluate").add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help="checkpoints/NAME.ckpt, or experiment NAME's best checkpoint")
    which.add_argument("--checkpoint", metavar="PATH", help="a checkpoint file")

    tasks = parser.add_argument_group("Evaluations")
    tasks.add_argument("--elbo", action="store_true", help="negative ELBO on the validation images, bits/dim")
    tasks.add_argument("--likelihood", action="store_true", help="importance-weighted likelihood, bits/dim")
    tasks.add_argument("--sampling", action="store_true", help="samples from the prior: grids and single images")

    options = parser.add_argument_group("Options")
    options.add_argument("--importance_samples", type=int, default=1024, help="of --likelihood, per image")
    temperatures = [0.6, 0.7, 0.8, 0.9, 1.0]
    options.add_argument("--temperatures", type=float, nargs="+", default=temperatures, help="of --sampling")
    options.add_argument("--count", type=int, default=64, help="samples at each temperature")
    options.add_argument("--output", choices=OUTPUTS, default=OUTPUTS[0], help="what --sampling shows")
    options.add_argument("--limit", type=int, default=None, help="evaluate the first LIMIT images only")
    options.add_argument("--batch", type=int, default=32, help="images, or importance samples, computed at a time")
    options.add_argument("--seed", type=int, default=0, help="of all noise")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    options.add_argument("--backend", choices=BACKENDS, default="auto", help="implementation of the sweeps")
    options.add_argument("--root", default=None, help="folder that holds the data sets; default: as in training")
    options.add_argument("--num_workers", type=int, default=0, help="loader processes")
    options.add_argument("--output_dir", default=".", help="where checkpoints/ and figs/ are")
    return parser


def main(arguments: list[str] | None = None) -> None:
    flags = make_parser().parse_args(arguments)
    with one_line_errors("evaluate.py", ConfigError, DataError, CheckpointError):
        check(flags)
        device = choose_device(flags.device)
        path, name = find_checkpoint(flags)
        image_sizes = {name: spec.shape[1:] for name, spec in DATASETS.items()}
        model, config, step = load_model(path, image_sizes, flags.backend)
        model.to(device)
        folder = Path(flags.output_dir) / "figs" / name
        about = {
            "checkpoint": path.name,
            "step": step,
            "dataset": config.dataset,
            "seed": flags.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "command": "evaluate.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        }
        results = read_results(folder / "results.json")
        for task, result in evaluate(model, config, flags, folder):
            results[task] = result | about
            write_results(folder / "results.json", results)
        print(f"numbers in {folder / 'results.json'}")


def check(flags: argparse.Namespace) -> None:
    if not (flags.elbo or flags.likelihood or flags.sampling):
        raise ConfigError("nothing to do: ask for --elbo, --likelihood or --sampling")
    for name in ("importance_samples", "count", "batch"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name} must be at least 1; got {getattr(flags, name)}")
    if flags.limit is not None and flags.limit < 1:
        raise ConfigError(f"--limit must be at least 1; got {flags.limit}")
    if min(flags.temperatures) < 0:
        raise ConfigError(f"--temperatures must be 0 or more; got {min(flags.temperatures)}")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N; got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N; got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def find_checkpoint(flags: argparse.Namespace) -> tuple[Path, str]:
    """The checkpoint's path, and the name under which its results are kept."""
    if flags.checkpoint:
        path = Path(flags.checkpoint)
        return path, path.resolve().parent.name if path.stem in ("best", "last") else path.stem
    folder = Path(flags.output_dir) / "checkpoints"
    names = (f"{flags.model}.ckpt", f"{flags.model}/best.ckpt", f"{flags.model}/last.ckpt")
    candidates = [folder / name for name in names]
    for path in candidates:
        if path.is_file():
            return path, flags.model
    there = sorted({p.stem for p in folder.glob("*.ckpt")} | {p.parent.name for p in folder.glob("*/last.ckpt")})
    known = ", ".join(there) or "none"
    raise CheckpointError(f"--model {flags.model}: none of {', '.join(map(str, candidates))} exists; known: {known}")


def evaluate(
    model: DensityVAE, config: TrainConfig, flags: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs what the flags ask for, one after another; prints and yields each result with its name."""
    if flags.elbo:
        with image_batches(config, flags, "-ELBO") as (batches, progress):
            result = negative_elbo(model, batches, seed=flags.seed, progress=progress)
        print(f"-ELBO: {shown(result)} bits/dim ({result['images']} images)")
        yield "elbo", result
    if flags.likelihood:
        with image_batches(config, flags, "-log p(x)") as (batches, progress):
            result = negative_log_likelihood(
                model, batches, samples=flags.importance_samples, chunk=flags.batch, seed=flags.seed, progress=progress
            )
        print(
            f"-log p(x): {shown(result)} bits/dim ({result['images']} images, {result['samples']} importance samples)"
        )
        yield "likelihood", result
    if flags.sampling:
        yield "sampling", draw_samples(model, flags, folder)


def shown(result: dict[str, Any]) -> str:
    error = result["standard_error"]
    return f"{result['bits_per_dim']:.4f}" + (f" +- {error:.4f}" if error is not None else "")


@contextmanager
def image_batches(
    config: TrainConfig, flags: argparse.Namespace, title: str
) -> Iterator[tuple[Iterator[tuple[Tensor, Tensor]], Progress]]:
    """The first `--limit` validation images in batches, and a progress bar's update function."""
    root = flags.root or config.root
    data = ImageDataModule(config.dataset, root, flags.batch, flags.batch, flags.num_workers, seed=0)
    data.setup("validate")
    loader = data.val_dataloader()
    total = len(data.validation)
    limit = min(total, flags.limit or total)

    def limited() -> Iterator[tuple[Tensor, Tensor]]:
        left = limit
        for images, indices in islice(loader, -(-limit // flags.batch)):
            yield images[:left], indices[:left]
            left -= len(images)

    with tqdm(total=limit, unit="image", desc=title) as bar:

        def progress(images: int, estimate: str) -> None:
            bar.set_postfix_str(f"{estimate} bits/dim")
            bar.update(images)

        yield limited(), progress


def draw_samples(model: DensityVAE, flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A grid and single images at each temperature."""
    columns = max(1, round(flags.count**0.5))
    grids = []
    for temperature in tqdm(flags.temperatures, desc="samples", unit="temperature"):
        images = sample_images(model, flags.count, temperature, seed=flags.seed, batch=flags.batch, output=flags.output)
        grids.append(str(save_grid(images, folder / f"samples_t{temperature:.2f}.png", columns)))
        for i, image in enumerate(images):
            save_image(image, folder / f"samples_t{temperature:.2f}" / f"{i:04d}.png")
    for grid in grids:
        print(f"samples: {grid}")
    return {"temperatures": flags.temperatures, "count": flags.count, "output": flags.output, "grids": grids}


def read_results(path: Path) -> dict[str, Any]:
    """What earlier evaluations of this checkpoint found, by name."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): move it away") from None


def write_results(path: Path, results: dict[str, Any]) -> None:
    """The file is replaced as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    main()
