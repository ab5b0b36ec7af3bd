"""Trains a VAE. The data set and the model are those of the flags; `lib.training.run` trains."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # The imports below take seconds, in which a signal is to end the process as it does later.
    for _name, _status in {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75, "SIGHUP": 75}.items():
        _signum = getattr(signal, _name, None)  # Windows has the first two alone
        if _signum and (_name != "SIGHUP" or signal.getsignal(_signum) is not signal.SIG_IGN):
            signal.signal(_signum, lambda *_, status=_status: os._exit(status))

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch

from data.converted import converted_names
from data.datamodule import ImageDataModule
from data.errors import DataError
from data.from_pictures import data_set_of, known_data_set
from data.get_dataset import DATASETS, dataset_spec
from lib import training
from lib.checkpoint import CheckpointError
from lib.cli import one_line_errors
from lib.config import ConfigError, TrainConfig
from lib.DensityVAE.training import DensityTraining
from lib.DisentanglementVAE.training import DisentanglementTraining
from lib.flags import make_parser
from lib.models import VAE, build_model
from lib.presets import PRESETS
from lib.training.processes import UnfailingStream, exclusive_run_folder, log_rank_zero
from lib.training.resume import find_checkpoint
from lib.training.run import choose_devices
from lib.training.signals import StopSignals
from lib.transfer import initialize_from

TRAINING = {"density_estimation": DensityTraining, "disentanglement": DisentanglementTraining}


def main(arguments: list[str] | None = None) -> None:
    """Exit status: 0; 1 for a fault of the run; 2 for bad input; 75 after SIGTERM, SIGUSR1 or
    SIGHUP; 130 after Ctrl-C."""
    with one_line_errors("train.py", ConfigError, DataError, CheckpointError, OSError):
        config = with_data_set(parse(arguments))
        devices = choose_devices(config)
        output = Path(config.output_dir)
        run_folder = output / "checkpoints" / config.exp_name
        with StopSignals() as signals, exclusive_run_folder(run_folder):
            resume_from = find_checkpoint(config, run_folder)
            pl.seed_everything(config.random_seed, workers=True, verbose=False)
            model, data = make_model(config), make_data(config)
            if config.init_from and not resume_from:
                for line in initialize_from(model, config.init_from):
                    log_rank_zero(line)
            data.prepare_data()
            data.check_batch(devices["devices"] * config.num_nodes)
            training.run(
                TRAINING[config.task](model, config, provenance()),
                data,
                devices=devices,
                run_folder=run_folder,
                figures=output / "figs" / config.exp_name,
                resume_from=resume_from,
                signals=signals,
            )


def parse(arguments: list[str] | None) -> TrainConfig:
    """The configuration that flags ask for, checked; raises ConfigError."""
    given = vars(make_parser(__doc__).parse_args(arguments))
    preset = PRESETS.get(given.pop("preset", ""), {})
    if preset and given.get("task", TrainConfig.task) != TrainConfig.task:
        raise ConfigError(f"--preset is for --task {TrainConfig.task}")
    config = TrainConfig.for_task(**preset | given)
    config.validate()
    if not known_data_set(config.dataset, Path(config.root)):
        known = ", ".join([*DATASETS, *converted_names(Path(config.root))])
        raise ConfigError(
            f"--dataset must be one of {known}, or the path of pictures; got {config.dataset}"
        )
    return config


def with_data_set(config: TrainConfig) -> TrainConfig:
    """The configuration with the name and the images' shape of a data set that is made of pictures,
    which are converted if that has not been done."""
    if config.dataset in DATASETS and not config.image_size and not config.channels:
        return config
    root = Path(config.root)
    spec = data_set_of(config.dataset, root, config.image_size, config.channels)
    if spec.name in DATASETS:  # whose shapes every version knows
        return replace(config, image_size=[], channels=0)
    channels, *size = spec.shape
    return replace(config, dataset=spec.name, image_size=size, channels=channels)


def make_model(config: TrainConfig) -> VAE:
    """The model with new weights; raises ConfigError if it cannot be."""
    try:
        channels, *size = dataset_spec(config.dataset, config.root).shape
        return build_model(config, size, channels)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_data(config: TrainConfig) -> ImageDataModule:
    """The batches of both splits."""
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


def provenance() -> dict[str, str]:
    """What writes a checkpoint: the commit (with a + if files differ from it), the command, the
    versions."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") or "unknown"
        commit += "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    except OSError:
        commit = "unknown"
    return {
        "commit": commit,
        "command": " ".join(sys.argv),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "pytorch_lightning": pl.__version__,
    }


if __name__ == "__main__":
    sys.stdout, sys.stderr = UnfailingStream(sys.stdout), UnfailingStream(sys.stderr)
    main()
