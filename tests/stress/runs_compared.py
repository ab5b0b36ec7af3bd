"""What must be the same of two runs of train.py: checkpoints, logs and pictures, bit for bit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from lib.checkpoint import read_checkpoint

CHECKPOINTS = ("last.ckpt", "best.ckpt")
LOGS = ("steps.csv", "epochs.csv")
TIMES = ("images_per_second", "seconds", "peak_memory_mib")
# Names, times, and Lightning's own counters, instead of which "position" counts.
NOT_COMPARED = ("hyper_parameters", "provenance", "since_validation", "loops")


def same(a: Any, b: Any) -> bool:
    """Whether nested values are equal, NaN to NaN, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)))
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        )
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or a != a and b != b)


def differences(folder: Path, one: str, other: str) -> list[str]:
    """Where two runs differ in weights, average, optimizer, scheduler, position, logs or pictures;
    empty: nowhere.

    Arguments:
        folder: The runs' output folder.
        one, other: Their names.
    """
    found = []
    for name in CHECKPOINTS:
        paths = [folder / "checkpoints" / run / name for run in (one, other)]
        if not any(path.exists() for path in paths) and name != "last.ckpt":
            continue  # an annealed β has no best
        if not all(path.exists() for path in paths):
            found.append(f"{name} is missing")
            continue
        a, b = map(read_checkpoint, paths)
        for key in sorted((a.keys() | b.keys()) - set(NOT_COMPARED)):
            if key not in a or key not in b or not same(a[key], b[key]):
                found.append(f"{name}: {key}")
    for name in LOGS:
        a, b = (log_rows(folder / "checkpoints" / run / name) for run in (one, other))
        if a != b:
            at = next(
                (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)),
            )
            found.append(f"{name}: from row {at + 1} of {len(a)} and {len(b)}")
    a, b = (
        {
            path.relative_to(folder / "figs" / run).as_posix(): path.read_bytes()
            for path in (folder / "figs" / run).rglob("*")
            if path.is_file()
        }
        for run in (one, other)
    )
    found += [
        f"picture {name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)
    ]
    return found


def log_rows(path: Path) -> list[dict[str, str]]:
    """A log's rows without the times in them."""
    with path.open(newline="") as file:
        return [
            {key: value for key, value in row.items() if key not in TIMES}
            for row in csv.DictReader(file)
        ]
