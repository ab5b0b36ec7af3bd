"""The registry of data sets: name -> shape, how to open it, how to get it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from .cifar10 import Cifar10
from .errors import DataError
from .lmdb_datasets import LmdbImages
from .photos32 import Photos32

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class DatasetSpec:
    """A data set that has a train and a validation split of uint8 images.

    shape: (3, H, W). flip: whether training flips images at random. command: what gets the data. open: (folder of all
    data sets, split) -> Dataset of uint8 tensors [3, H, W].
    """

    name: str
    shape: tuple[int, int, int]
    flip: bool
    command: str
    open: Callable[[Path, str], Dataset]


def _lmdb(name: str, size: int, flip: bool, script: str) -> DatasetSpec:
    shape, command = (3, size, size), f"bash data/{name}/{script}"

    def open_split(root: Path, split: str) -> LmdbImages:
        environment = "" if root == Path("data") else f"SDN_DATA_ROOT={shlex.quote(str(root))} "
        return LmdbImages(root / name / f"{split}.lmdb", shape, environment + command)

    return DatasetSpec(name, shape, flip, command, open_split)


DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "CIFAR10", (3, 32, 32), True, "it is downloaded on first use", lambda r, s: Cifar10(r / "CIFAR10", s)
        ),
        _lmdb("ImageNet32", 32, False, "get_imagenet_data.sh"),
        _lmdb("CelebAHQ256", 256, True, "get_celeb_data.sh"),
        DatasetSpec(
            "Photos32", (3, 32, 32), False, "pip install scikit-image scikit-learn", lambda root, split: Photos32(split)
        ),
    )
}


def get_dataset(name: str, root: str | Path = "data", split: str = "train") -> Dataset:
    """Opens a split of a data set; items are uint8 tensors [3, H, W].

    Arguments:
        name: One of `DATASETS`.
        root: Folder that holds the data sets.
        split: "train" or "validation".

    Raises:
        DataError: if the data set is unknown, missing (the message names the command that gets it) or damaged.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    return DATASETS[name].open(Path(root), split)
