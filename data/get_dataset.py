"""Data sets by their names: those of `data.sets`, and those that were converted from pictures."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from torch.utils.data import Dataset

from . import sets
from .converted import COMMAND, converted_names, is_plain, read_description
from .errors import DataError
from .lmdb_datasets import LmdbImages
from .registry import DATASETS, SPLITS, DatasetSpec

__all__ = [
    "DATASETS",
    "SPLITS",
    "DatasetSpec",
    "dataset_spec",
    "fit_of",
    "get_dataset",
    "is_mirrored",
]

for module in pkgutil.iter_modules(sets.__path__):
    importlib.import_module(f"{sets.__name__}.{module.name}")


def dataset_spec(name: str, root: str | Path = "data") -> DatasetSpec:
    """A registered data set, or one that `python -m data.convert.images` made in `root`.

    Raises:
        DataError: if there is none of this name, or its description is damaged.
    """
    if name in DATASETS:
        return DATASETS[name]
    root = Path(root)
    found = read_description(root, name) if is_plain(name) else None
    if not found:
        known = ", ".join([*DATASETS, *converted_names(root)])
        raise DataError(
            f"unknown data set {name!r}; known are {known}. Others are made of pictures with: "
            f"{COMMAND}"
        )

    def open_split(root: Path, split: str) -> LmdbImages:
        return LmdbImages(root / name / f"{split}.lmdb", tuple(found["shape"]), COMMAND)

    return DatasetSpec(name, tuple(found["shape"]), found["flip"], COMMAND, open_split)


def is_mirrored(name: str, root: str | Path) -> bool:
    """Whether training flips a data set's images at random, as far as its description is there."""
    if name in DATASETS:
        return DATASETS[name].flip
    return bool((read_description(Path(root), name) or {}).get("flip"))


def fit_of(name: str, root: str | Path) -> str:
    """How single pictures are made to a data set's size: as it was converted, as far as its
    description is there; instead of being cut into patches they are cropped."""
    found = {} if name in DATASETS else read_description(Path(root), name) or {}
    try:
        fit = found["options"]["shape"]["fit"]
    except (KeyError, TypeError):
        fit = "crop"
    return fit if fit in ("resize", "pad") else "crop"


def get_dataset(name: str, root: str | Path = "data", split: str = "train") -> Dataset:
    """Opens a split of a data set; items are uint8 tensors [C, H, W].

    Arguments:
        name: One of `DATASETS`, or of a data set that was converted.
        root: Folder that holds the data sets.
        split: "train" or "validation".

    Raises:
        DataError: if the data set is unknown, missing (the message names the command that gets it)
            or damaged.
    """
    spec = dataset_spec(name, root)
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    return spec.open(Path(root), split)
