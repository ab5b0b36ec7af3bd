"""Evaluates a trained VAE, this project's or the authors': likelihoods, scores, samples, pictures,
a report."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import shlex
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data.datamodule import BatchLoader, IndexedImages
from data.errors import DataError
from data.get_dataset import DATASETS, fit_of, get_dataset, is_mirrored
from lib.checkpoint import CheckpointError
from lib.cli import make_streams_unfailing, one_line_errors
from lib.config import ConfigError
from lib.DisentanglementVAE.metrics import MetricError
from lib.evaluation.importance import LikelihoodError, memory_ran_out
from lib.evaluation.ledger import LedgerError
from lib.evaluation.loading import LoadedModel, choose_device, find_checkpoint, load_model
from lib.evaluation.options import check, make_parser
from lib.evaluation.registry import Context, Evaluation, evaluations, prepare
from lib.evaluation.report import ReportError, write_report
from lib.evaluation.results import (
    add_result,
    own_folder,
    provenance,
    read_results,
    results_folder,
)
from lib.models import VAE
from lib.sweeps import BackendError


def main(arguments: list[str] | None = None) -> None:
    flags = make_parser(__doc__).parse_args(arguments)
    errors = (ConfigError, DataError, CheckpointError, LedgerError, LikelihoodError, ReportError)
    with one_line_errors("evaluate.py", *errors, MetricError, BackendError):
        asked = check(flags)
        device = choose_device(flags.device)
        command = "evaluate.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
        try:
            run(flags, asked, device, command)
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
            advice = f"use a smaller --batch (now {flags.batch})"
            raise ConfigError(f"out of memory on {device}: {advice}") from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ConfigError(f"{where}{error.strerror or error}") from None
        except KeyboardInterrupt:
            print("\ninterrupted; what is finished is kept", file=sys.stderr)
            sys.exit(130)


def run(
    flags: argparse.Namespace, asked: list[Evaluation], device: torch.device, command: str
) -> None:
    """Opens the checkpoint, evaluates, and keeps each result as soon as it is there."""
    output = Path(flags.output_dir)
    path, name = find_checkpoint(flags.model, flags.checkpoint, output / "checkpoints")
    loaded = open_model(path, flags.backend, device)
    for remark in loaded.remarks:
        print(f"{path.name}: {remark}", file=sys.stderr)
    flags.root = flags.root or loaded.config.root
    figs, weights = output / "figs", loaded.fingerprint
    folder = results_folder(figs, name, weights)
    if folder != figs / name:
        print(f"{figs / name} holds another checkpoint's results: using {folder}", file=sys.stderr)
    context = Context(
        loaded,
        flags,
        folder,
        open_split=partial(get_dataset, loaded.config.dataset, flags.root),
        in_batches=partial(in_batches, num_workers=flags.num_workers),
        reopen=partial(open_in_worker, path, flags.backend, flags.root),
        mirrored=is_mirrored(loaded.config.dataset, flags.root),
        fit=fit_of(loaded.config.dataset, flags.root),
    )
    prepare(asked, context)
    if asked:
        context.folder = own_folder(figs, name, weights)
        evaluate(asked, context, provenance(context, path, command))
    if flags.report:
        results = read_results(context.folder / "results.json")
        if not results:
            raise ConfigError(f"--report: {context.folder} holds no results of these weights yet")
        order = [evaluation for evaluation in evaluations() if evaluation in results]
        path = write_report(
            context.folder / "report.html",
            title=name,
            results={task: results[task] for task in order},
            config=loaded.config.to_dict(),
        )
        print(f"report: {path}")


def evaluate(asked: list[Evaluation], context: Context, about: dict[str, Any]) -> None:
    """Runs the evaluations one after another; keeps each result, then prints it."""
    path = context.folder / "results.json"
    for evaluation in asked:
        result = evaluation.compute(context)
        try:
            add_result(path, evaluation.name, result | about)
        finally:  # what took hours is not lost with a full disk
            for line in evaluation.lines(result, context):
                print(line)
            for picture in result.get("pictures", ()):
                print(f"{evaluation.name}: {context.folder / picture['file']}")
    print(f"numbers in {path}")


def open_model(path: Path, backend: str, device: torch.device | str) -> LoadedModel:
    image_shapes = {name: spec.shape for name, spec in DATASETS.items()}
    return load_model(path, image_shapes, backend, device)


def open_in_worker(path: Path, backend: str, root: str, device: str) -> tuple[VAE, Dataset]:
    """What a process that computes likelihoods needs."""
    loaded = open_model(path, backend, device)
    return loaded.model, get_dataset(loaded.config.dataset, root, "validation")


def in_batches(
    dataset: Dataset, limit: int, batch: int, *, num_workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """The first `limit` images, nothing augmented: (uint8 images [B, 3, H, W], their indices
    [B])."""
    images = Subset(IndexedImages(dataset, augment=False, flip=False, seed=0), range(limit))
    return BatchLoader(images, batch, num_workers=num_workers)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    make_streams_unfailing()
    main()
