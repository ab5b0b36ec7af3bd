"""Trains a VAE: flags -> configuration -> data and model -> Lightning Trainer. `python train.py
--help`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.profilers import SimpleProfiler

from data.datamodule import LOADER_TIMEOUT, ImageDataModule, loader_hangs
from data.errors import DataError
from data.get_dataset import DATASETS
from lib.checkpoint import CheckpointError, stored_config
from lib.cli import OneLineParser, one_line_errors
from lib.config import TASK_DEFAULTS, ConfigError, TrainConfig, flag_default, flag_type
from lib.DensityVAE.training import DensityTraining
from lib.DisentanglementVAE.training import DisentanglementTraining
from lib.files import folder_for_one, remove_partial_files
from lib.models import VAE, build_model
from lib.sweeps.preflight import why_no_triton
from lib.training.callbacks import ImageGrids, MetricsLog
from lib.training.checkpoints import (
    Checkpoints,
    RunProgress,
    check_resumable,
    newest_checkpoint,
    step_checkpoints,
)
from lib.training.loggers import make_logger
from lib.training.non_finite import Diverged, SkipNonFinite
from lib.training.processes import (
    AGAIN,
    FAILED,
    Stopped,
    StopSignals,
    UnfailingStream,
    say,
    watched,
    watched_loaders,
    worker_died,
)
from lib.training.profiling import StepProfile

TRAINING = {"density_estimation": DensityTraining, "disentanglement": DisentanglementTraining}


def make_parser() -> OneLineParser:
    """One flag for each field of `TrainConfig`, in its groups."""
    parser = OneLineParser("train.py", description=__doc__)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, is_list = flag_type(field.name)
        # The defaults are the task's, and only the configuration knows which flags were given.
        default = default_text(field)
        meaning = field.metadata["meaning"] + ("" if default == "off" else f" (default: {default})")
        options: dict[str, Any] = {"help": meaning, "default": argparse.SUPPRESS}
        if kind is bool:
            on_in_some = any(of.get(field.name) for of in TASK_DEFAULTS.values())
            options["action"] = argparse.BooleanOptionalAction if on_in_some else "store_true"
        else:
            options |= {
                "type": kind,
                "choices": field.metadata["choices"],
                "metavar": kind.__name__.upper(),
            }
            if field.metadata["choices"]:
                options["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
            if is_list:
                options["nargs"] = "*"
        groups[title].add_argument(f"--{field.name}", **options)
    return parser


def default_text(field: dataclasses.Field) -> str:
    """The default of a flag for people, with those of other tasks."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return "on" if value else "off"
        return (
            " ".join(map(str, value))
            if isinstance(value, list)
            else "-"
            if value is None
            else str(value)
        )

    others = [
        f"{task}: {text(of[field.name])}" for task, of in TASK_DEFAULTS.items() if field.name in of
    ]
    return "; ".join([text(flag_default(field)), *others])


def parse(arguments: list[str] | None) -> TrainConfig:
    """The configuration that flags ask for, checked; raises ConfigError."""
    config = TrainConfig.for_task(**vars(make_parser().parse_args(arguments)))
    config.validate()
    if config.dataset not in DATASETS:
        raise ConfigError(f"--dataset must be one of {', '.join(DATASETS)}; got {config.dataset}")
    return config


def flag_table() -> str:
    """All flags as the Markdown table of the README: `python -c "import train;
    print(train.flag_table())"`."""
    lines = ["| flag | type | default | meaning |", "|---|---|---|---|"]
    group = None
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines.append(f"| **{group}** | | | |")
        kind, is_list = flag_type(field.name)
        shown = default_text(field)
        choices = field.metadata["choices"]
        type_name = (
            " \\| ".join(choices)
            if choices
            else "flag"
            if kind is bool
            else kind.__name__ + " ..." * is_list
        )
        lines.append(f"| `--{field.name}` | {type_name} | {shown} | {field.metadata['meaning']} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Exit status: 0, 1 for a fault of the run, 2 for bad input, 75 after SIGTERM or SIGUSR1, 130
    after Ctrl-C."""
    with one_line_errors("train.py", ConfigError, DataError, CheckpointError, OSError):
        config = parse(arguments)
        devices = choose_devices(config)
        run_folder = Path(config.output_dir) / "checkpoints" / config.exp_name
        with StopSignals() as signals, alone_in(run_folder):
            resume_from = find_checkpoint(config, run_folder)
            train(config, devices, run_folder, resume_from, signals)


@contextmanager
def alone_in(run_folder: Path) -> Iterator[None]:
    """Keeps a second run out of the folder; the first process of a run holds it for all of them,
    and tidies it."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    first = (
        rank == "0"
        if rank
        else os.environ.get("LOCAL_RANK", "0") == os.environ.get("NODE_RANK", "0") == "0"
    )
    if not first:
        yield
        return
    message = f"{run_folder} is in use by another run; wait for it, or give another --exp_name"
    with folder_for_one(run_folder, message):
        remove_partial_files(run_folder)
        yield


def choose_devices(config: TrainConfig) -> dict[str, Any]:
    """The Trainer's accelerator and number of devices."""
    available = torch.cuda.device_count()
    gpus = min(1, available) if config.gpus is None else config.gpus
    if gpus > available:
        hint = (
            " (a smaller --gpus with --accumulate_grad_batches keeps the global batch)"
            if available
            else ""
        )
        raise ConfigError(
            f"--gpus {gpus}: this machine has {available or 'none; --gpus 0 runs on the CPU'}{hint}"
        )
    if gpus:
        return {"accelerator": "gpu", "devices": gpus}
    return {"accelerator": "cpu", "devices": config.num_processes}


def how_to_compile(config: TrainConfig, devices: dict[str, Any]) -> dict[str, Any]:
    """Options of torch.compile.

    Where Triton cannot run, as on a V100, a GPU mostly waits for the launches of the
    sweeps' loops: the model's passes are replayed as CUDA graphs. Gradients that live in a graph's
    memory cannot be added up over batches, so that with accumulated batches they are not.
    """
    on_gpu = devices["accelerator"] == "gpu"
    loops = on_gpu and (config.backend == "torch" or why_no_triton(torch.device("cuda")))
    replayed = loops and config.accumulate_grad_batches == 1
    return {"backend": "cudagraphs", "dynamic": False} if replayed else {}


def find_checkpoint(config: TrainConfig, run_folder: Path) -> Path | None:
    """The checkpoint to go on from. An experiment that exists is never overwritten, nor continued
    as another one."""
    if not config.use_checkpoint:
        there = [run_folder / name for name in ("last.ckpt", "best.ckpt", "steps.csv")]
        if step_checkpoints(run_folder) or any(path.exists() for path in there):
            raise ConfigError(
                f"{run_folder} holds a run already: --use_checkpoint goes on with it, another --exp_name starts anew"
            )
        return None
    found = newest_checkpoint(run_folder)
    if found is None:
        say(
            f"--use_checkpoint: there is no checkpoint in {run_folder} yet, so this run starts anew"
        )
        return None
    last, checkpoint = found
    stored = stored_config(checkpoint, last)
    check_resumable(checkpoint, last)
    now, before = config.to_dict(), stored.to_dict()
    changed = [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if now[field.name] != before[field.name]
    ]
    fixed = {*config.architecture(), "task", "dataset"}
    wrong = [f"--{name} {now[name]} (there {before[name]})" for name in changed if name in fixed]
    if wrong:
        raise ConfigError(
            f"{last} is of another model: {', '.join(wrong)}; use its flags or another --exp_name"
        )
    if 0 < config.max_epochs < checkpoint["epoch"]:
        raise ConfigError(
            f"--max_epochs {config.max_epochs}: {last} has {checkpoint['epoch']} epochs already"
        )
    for name in changed:
        if name not in ("use_checkpoint", "output_dir", "root"):
            say(f"note: --{name} is now {now[name]}, was {before[name]}")
    return last


def make_model(config: TrainConfig) -> VAE:
    """The model with new weights; raises ConfigError if it cannot be."""
    try:
        return build_model(config, DATASETS[config.dataset].shape[1:])
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_data(config: TrainConfig) -> ImageDataModule:
    return ImageDataModule(
        config.dataset,
        config.root,
        config.batch,
        config.batch_val if config.batch_val > 0 else config.batch,
        config.num_workers,
        config.random_seed,
        epoch_images=config.epoch_images,
        val_images=config.val_images,
    )


def train(
    config: TrainConfig,
    devices: dict[str, Any],
    run_folder: Path,
    resume_from: Path | None,
    signals: StopSignals,
) -> None:
    """Trains, from `resume_from` if given."""
    quiet_lightning()
    pl.seed_everything(config.random_seed, workers=True, verbose=False)
    model, data = make_model(config), make_data(config)
    data.prepare_data()
    data.check_batch(devices["devices"] * config.num_nodes)

    figures = Path(config.output_dir) / "figs" / config.exp_name
    grids = ImageGrids(
        figures,
        columns=config.figsize,
        temperature=config.sampling_temperature,
        batch=data.batch_val,
        seed=config.random_seed,
    )
    checkpoints = Checkpoints(
        run_folder if config.make_checkpoint else None,
        signals,
        every_n_steps=config.checkpoint_every_n_steps,
        every_minutes=config.checkpoint_every_minutes,
        keep=config.keep_last,
        best=config.task
        == "density_estimation",  # that of an annealed β is that of a small β (DEVIATIONS.md)
    )
    checkpoints.resumed_from = resume_from
    skip = SkipNonFinite(
        checkpoints,
        max_skipped=config.max_skipped,
        max_rollbacks=config.max_rollbacks,
        rollback_lrate=config.rollback_lrate,
    )
    metrics, bar = MetricsLog(run_folder), TQDMProgressBar(refresh_rate=10)
    callbacks: list[pl.Callback] = [
        RunProgress(config.iters),
        metrics,
        skip,
        grids,
        bar,
        checkpoints,
    ]
    if not config.make_checkpoint:
        say("note: without --make_checkpoint no weights of this run are kept")
    if config.beta_rate * config.iters < 1:
        reached = config.beta_rate * config.iters
        say(
            f"note: with --beta_rate {config.beta_rate:g} beta is at {reached:.3g} of --beta_final after all --iters"
        )
    precision = config.precision or ("16-mixed" if config.amp else "32-true")
    if precision == "16-mixed" and devices["accelerator"] == "cpu":
        say("note: float16 is for GPUs; on this CPU training runs in bf16-mixed")
        precision = "bf16-mixed"
    profiler = SimpleProfiler() if config.profiler_mode else None
    callbacks += [StepProfile()] if config.profiler_mode else []
    several = devices["devices"] * config.num_nodes > 1
    trainer = pl.Trainer(
        **devices,
        num_nodes=config.num_nodes,
        strategy=config.distributed_backend if several else "auto",
        precision=precision,
        max_epochs=config.max_epochs,
        accumulate_grad_batches=config.accumulate_grad_batches,
        gradient_clip_val=config.grad_clip or None,
        check_val_every_n_epoch=config.check_val_every_n_epoch,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        # In SLURM, Checkpoints does what is to be done on a signal.
        plugins=[
            checkpoints.io,
            *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []),
        ],
        callbacks=callbacks,
        logger=make_logger(config, run_folder),
        profiler=profiler,
        enable_model_summary=False,
    )
    # Lightning's handlers wait for other processes inside a signal handler; ours only take note.
    trainer._signal_connector.register_signal_handlers = lambda: None
    if several:
        try:
            trainer.strategy.cluster_environment.validate_settings(
                num_devices=devices["devices"], num_nodes=config.num_nodes
            )
        except ValueError as error:
            raise ConfigError(" ".join(str(error).split())) from None
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{config.exp_name}: {parameters:,} parameters, {config.dataset}, {precision}")
    training = TRAINING[config.task](model, config, provenance())
    if config.compile:
        training.model.compile(
            fullgraph=True, **how_to_compile(config, devices)
        )  # in place: names in checkpoints stay
    if precision == "64-true":
        training.double()  # Lightning does it after it has loaded a checkpoint, into float32
    with faults_in_one_line(), watched_loaders(), watched(trainer):
        trainer.fit(
            training,
            datamodule=data,
            ckpt_path=str(resume_from) if resume_from else None,
            weights_only=True,
        )
    if profiler:
        say(profiler.summary())
    if checkpoints.io.failure:
        raise checkpoints.io.failure
    if metrics.unwritten:
        raise OSError(
            f"{metrics.unwritten} rows of the logs in {run_folder} could not be written: is the disk full?"
        )
    if trainer.is_global_zero:
        kept = (
            f"weights and metrics in {run_folder}"
            if config.make_checkpoint
            else f"metrics in {run_folder}"
        )
        print(f"{kept}, pictures in {figures}")


@contextmanager
def faults_in_one_line() -> Iterator[None]:
    """Ends the process with one line for what is neither bad input nor an error in the program."""
    try:
        yield
        return
    except Stopped as stopped:
        say(f"train.py: {stopped}")
        # Lightning kills a main process of which a child ended with a status before it ended
        # itself.
        launched = "LOCAL_RANK" in os.environ and not (
            dist.is_torchelastic_launched() or SLURMEnvironment.detect()
        )
        sys.exit(0 if launched and os.environ["LOCAL_RANK"] != "0" else stopped.status)
    except Diverged as error:
        say(f"train.py: error: {error}")
    except torch.OutOfMemoryError as error:
        print(
            f"train.py: error: {str(error).splitlines()[0]} A smaller --batch needs less; {AGAIN}",
            file=sys.stderr,
        )
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        if "DataLoader timed out" in str(error):
            fault = loader_hangs(LOADER_TIMEOUT)
        elif re.search(
            r"DataLoader worker .* (exited unexpectedly|is killed by signal)", str(error)
        ):
            fault = worker_died(error)
        elif isinstance(error, dist.DistError) or re.search(
            r"gloo|nccl|by peer", last, re.IGNORECASE
        ):
            fault = "lost contact with another process of this run"
        else:
            raise
        print(f"train.py: error: {fault}; {AGAIN}", file=sys.stderr, flush=True)
    sys.exit(FAILED)


def provenance() -> dict[str, str]:
    """What wrote a checkpoint: the commit (with a + if files differ from it) and the versions."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") or "unknown"
        commit += "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    except OSError:
        commit = "unknown"
    versions = {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "pytorch_lightning": pl.__version__,
    }
    return {"commit": commit, "command": " ".join(sys.argv), **versions}


def quiet_lightning() -> None:
    """Leaves out Lightning's advertisements and its remarks on choices that are made on purpose
    here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for remark in (
        "does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "smaller than the logging interval",
        r"Found \d+ module\(s\) in eval mode",
        "It is recommended to use .*sync_dist=True",
        "You.re resuming from a checkpoint that ended before the epoch ended",
        "isinstance\\(treespec, LeafSpec\\)",
    ):
        warnings.filterwarnings("ignore", f".*{remark}.*")


if __name__ == "__main__":
    sys.stdout, sys.stderr = UnfailingStream(sys.stdout), UnfailingStream(sys.stderr)
    main()
