"""Evaluates a trained VAE, this project's or the authors': likelihoods, scores, samples, pictures,
a report."""

from __future__ import annotations

import argparse
import datetime
import platform
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
from data.get_dataset import DATASETS, get_dataset
from lib.checkpoint import CheckpointError
from lib.cli import one_line_errors
from lib.config import ConfigError
from lib.DisentanglementVAE import DisentanglementVAE
from lib.DisentanglementVAE.metrics import MetricError
from lib.evaluation.importance import LikelihoodError, memory_ran_out, pick_chunk
from lib.evaluation.ledger import LedgerError
from lib.evaluation.loading import LoadedModel, find_checkpoint, load_model
from lib.evaluation.options import check, make_parser
from lib.evaluation.registry import Context, Evaluation, check_package
from lib.evaluation.report import ReportError, write_report
from lib.evaluation.results import add_result, own_folder, read_results, results_folder
from lib.models import VAE

LARGEST_BATCH = 32


def main(arguments: list[str] | None = None) -> None:
    flags = make_parser(__doc__).parse_args(arguments)
    errors = (ConfigError, DataError, CheckpointError, LedgerError, LikelihoodError, ReportError)
    with one_line_errors("evaluate.py", *errors, MetricError):
        asked = check(flags)
        device = choose_device(flags.device)
        command = "evaluate.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
        try:
            run(flags, asked, device, command)
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
            raise ConfigError(
                f"out of memory on {device}: use a smaller --batch (now {flags.batch})"
            ) from None
        except OSError as error:
            raise ConfigError(f"{error.filename or 'a file'}: {error.strerror or error}") from None
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
        mirrored=DATASETS[loaded.config.dataset].flip,
    )
    prepare(asked, context)
    if asked:
        with own_folder(figs, name, weights) as context.folder:
            evaluate(asked, context, about(context, path, command))
    if flags.report:
        results = read_results(context.folder / "results.json")
        print(f"report: {report(results, loaded, context.folder)}")


def prepare(asked: list[Evaluation], context: Context) -> None:
    """Checks what depends on the model and the data, before anything is computed."""
    flags, loaded = context.flags, context.loaded
    for evaluation in asked:
        if evaluation.only_disentanglement and not isinstance(loaded.model, DisentanglementVAE):
            raise ConfigError(
                f"--{evaluation.name} is for models of --task disentanglement; this one is of "
                f"{loaded.config.task}"
            )
        for package in evaluation.packages:
            check_package(evaluation.name, package)
    if flags.report:
        check_package("report", "jinja2")
    if flags.batch is None and any(evaluation.uses_batch for evaluation in asked):
        flags.batch = min(LARGEST_BATCH, pick_chunk(loaded.model))
    for evaluation in asked:
        for need in evaluation.needs:
            getattr(context, need)
        evaluation.prepare(context)


def evaluate(asked: list[Evaluation], context: Context, about: dict[str, Any]) -> None:
    """Runs the evaluations one after another; keeps each result, then prints it."""
    path = context.folder / "results.json"
    for evaluation in asked:
        result = evaluation.compute(context)
        add_result(path, evaluation.name, result | about)
        for line in evaluation.lines(result, context):
            print(line)
        for picture in result.get("pictures", ()):
            print(f"{evaluation.name}: {context.folder / picture['file']}")
    print(f"numbers in {path}")


def about(context: Context, path: Path, command: str) -> dict[str, Any]:
    """Where results are from."""
    device = context.model.device
    return {
        "checkpoint": path.name,
        "weights": context.loaded.fingerprint,
        "step": context.loaded.step,
        "dataset": context.loaded.config.dataset,
        "seed": context.flags.seed,
        "batch": context.flags.batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }
