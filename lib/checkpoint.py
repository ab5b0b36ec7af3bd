"""Checkpoint files: written whole or not at all, checked for damage, and read without executing
anything stored in them."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import ConfigError, TrainConfig
from .files import whole_file
from .pretrained import read_folder

AVERAGE_PREFIX = "average.module."
# In the authors' format, before a parameter's name, whose dots are carets.
RELEASED_AVERAGE = "ema.shadow_params."
ZIP_START = b"PK\x03\x04"
REQUIRED = {"state_dict", "hyper_parameters", "global_step"}

# What old checkpoints may hold among their settings: pytorch-lightning 0.9's kind of dictionary,
# which becomes a plain one (DEVIATIONS.md), and numpy's numbers, under the names that numpy 1 and 2
# pickle them.
_scalar = np.float64(0).__reduce__()[0]
PLAIN_VALUES = [
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line that names the file."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's dictionary, loaded to the CPU with `weights_only=True`, or what a folder of
    `publish.py` has of one.

    Raises:
        CheckpointError: if there is no such file, or it is damaged, unsafe, or no checkpoint of
            this project.
    """
    path = Path(path)
    if path.is_dir():
        return _read_published(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    check_sums(path)
    try:
        with torch.serialization.safe_globals(PLAIN_VALUES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        stored = re.search(r"GLOBAL (\S+)", str(error))
        if stored:
            raise CheckpointError(
                f"{path} holds a {stored[1]}; only tensors and plain values are loaded"
            ) from None
        raise CheckpointError(f"{path} is not a checkpoint, or is cut off") from None
    except Exception as error:  # damaged bytes can fail anywhere in the reader, in any way
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0][:120]
        raise CheckpointError(f"{path} is not a checkpoint, or is cut off ({reason})") from None
    lacking = sorted(REQUIRED - (checkpoint.keys() if isinstance(checkpoint, dict) else set()))
    if lacking:
        wrong = f"it lacks {', '.join(lacking)}"
    elif not all(isinstance(checkpoint[name], dict) for name in ("state_dict", "hyper_parameters")):
        wrong = "its tensors are no dictionary"
    elif not all(isinstance(name, str) for name in checkpoint["state_dict"]):
        wrong = "its tensors have no names"
    else:
        return checkpoint
    raise CheckpointError(f"{path} is not a checkpoint of this project: {wrong}")


def _read_published(folder: Path) -> dict[str, Any]:
    """A checkpoint's dictionary of a folder that `publish.py` wrote."""
    try:
        config, weights = read_folder(folder)
    except (ImportError, ValueError, FileNotFoundError) as error:
        raise CheckpointError(str(error)) from None
    run = config.get("run")
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise CheckpointError(f"{folder}: its config.json does not say by which run it was trained")
    of_density = run["config"].get("task") == "density_estimation"
    prefix = AVERAGE_PREFIX if of_density else "model."
    return {
        "state_dict": {prefix + name: tensor for name, tensor in weights.items()},
        "hyper_parameters": run["config"],
        "global_step": run.get("step"),
    }


def check_sums(path: Path) -> None:
    """Compares every part of a checkpoint with the checksum (CRC-32) that is stored with it.

    A checkpoint is a ZIP archive of a pickle and of one member for each tensor; torch.save stores
    the checksums and torch.load does not look at them. Files of another kind, such as those of
    torch before 1.6, have none.

    Raises:
        CheckpointError: if they differ.
    """
    with path.open("rb") as file:
        is_archive = file.read(len(ZIP_START)) == ZIP_START
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # what a damaged directory of the archive leads to
        if not is_archive:
            return
        kind = type(error).__name__
        raise CheckpointError(f"{path} is not a checkpoint, or is cut off ({kind})") from None
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {ascii(damaged)} differs")


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes a checkpoint, whole or not at all.

    Raises:
        OSError: if it cannot be written; what was at `path` is still there.
    """
    with whole_file(path) as partial:
        try:
            torch.save(checkpoint, partial)
        except RuntimeError as error:  # torch's writer in C++ says so if the disk is full
            reason = str(error).splitlines()[0]
            raise OSError(f"{path} could not be written ({reason}); is the disk full?") from error


def is_released(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint's dictionary is in the format of the authors' release; `lib.released`
    reads that."""
    return any(
        str(name).startswith((RELEASED_AVERAGE, "ladder_layers."))
        for name in checkpoint["state_dict"]
    )


def stored_config(checkpoint: dict[str, Any], path: str | Path) -> TrainConfig:
    """The configuration of the run that wrote the checkpoint."""
    if is_released(checkpoint):
        raise CheckpointError(
            f"{path} is in the authors' format; convert it: python -m lib.released {path} OUT"
        )
    try:
        config = TrainConfig.from_dict(checkpoint["hyper_parameters"])
        config.validate()
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"{path} was not written by this version of train.py: {error}"
        ) from None
    return config
