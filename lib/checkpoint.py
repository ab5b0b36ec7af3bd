"""Checkpoint files: written whole and with a hash of themselves, read without executing anything
stored in them."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .config import ConfigError, TrainConfig
from .files import whole_file

AVERAGE_PREFIX = "average.module."
RELEASED_AVERAGE = (
    "ema.shadow_params."  # before a parameter's name, whose dots are carets; the authors' format
)
SEAL = b"sha256="  # and 64 digits: the comment of the ZIP archive that a checkpoint is
ARCHIVE_END = b"PK\x05\x06"  # begins the archive's last record, whose last 2 of 22 bytes are the comment's length
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
    """The checkpoint's dictionary, loaded to the CPU with `weights_only=True`.

    Raises:
        CheckpointError: if there is no such file, or it is damaged, unsafe, or no checkpoint of
            this project.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    sealed = check_seal(path)
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
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: it lacks {', '.join(lacking)}"
        )
    if not all(isinstance(checkpoint[name], dict) for name in ("state_dict", "hyper_parameters")):
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: its tensors are no dictionary"
        )
    if checkpoint.get("sealed") and not sealed:
        raise CheckpointError(f"{path} is damaged: the hash at its end is missing")
    if not all(isinstance(name, str) for name in checkpoint["state_dict"]):
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: its tensors have no names"
        )
    return checkpoint


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes a checkpoint, whole or not at all, with its SHA-256 hash at its end.

    Raises:
        OSError: if it cannot be written; what was at `path` is still there.
    """
    with whole_file(path) as partial:
        try:
            torch.save(checkpoint | {"sealed": True}, partial)
        except RuntimeError as error:  # torch's writer in C++ says so if the disk is full
            reason = str(error).splitlines()[0]
            raise OSError(f"{path} could not be written ({reason}); is the disk full?") from error
        with partial.open("r+b") as file:
            comment = SEAL + digest(file, partial.stat().st_size - 2).encode()
            file.seek(-2, 2)
            file.write(len(comment).to_bytes(2, "little") + comment)


def check_seal(path: Path) -> bool:
    """Compares a file with the hash at its end; whether it has one.

    Raises:
        CheckpointError: if they differ.
    """
    length = len(SEAL) + 64
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - length - 22))
        end = file.read()
        if end[:4] != ARCHIVE_END or not end[22:].startswith(SEAL):
            return False  # by an earlier version or another program, or cut off
        if digest(file, size - length - 2).encode() != end[22 + len(SEAL) :]:
            raise CheckpointError(
                f"{path} is damaged: its content differs from the hash stored with it"
            )
    return True


def digest(file: BinaryIO, size: int) -> str:
    """SHA-256 of the first `size` bytes of a file, in hexadecimal digits."""
    content = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 2**20))):
        content.update(block)
        size -= len(block)
    return content.hexdigest()


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
