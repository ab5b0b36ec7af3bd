"""The registry of data sets: name -> shape, how to open it, how to get it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from .cifar10 import Cifar10
from .converted import COMMAND, converted_names, read_description
from .errors import DataError
from .lmdb_datasets import LmdbImages
from .photos32 import Photos32
from .shapes3d import COMMAND as GET_3DSHAPES
from .shapes3d import Shapes3D
from .shapes3d_rendered import Shapes3DRendered

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class DatasetSpec:
    """A data set that has a train and a validation split of uint8 images.

    shape: (C, H, W). flip: whether training flips images at random. command: what gets the data.
    open: (folder of all data sets, split) -> Dataset of uint8 tensors [C, H, W].
    """

    name: str
    shape: tuple[int, int, int]
    flip: bool
    command: str
    open: Callable[[Path, str], Dataset]


def _lmdb(name: str, size: int, flip: bool, script: str) -> DatasetSpec:
    shape, command = (3, size, size), f"bash data/{name}/{script}"

    def open_split(root: Path, split: str) -> LmdbImages:
        return LmdbImages(root / name / f"{split}.lmdb", shape, _in_folder(root, command))

    return DatasetSpec(name, shape, flip, command, open_split)


def _shapes3d(root: Path, split: str) -> Shapes3D:
    return Shapes3D(root / "3DShapes" / "3dshapes.h5", split, _in_folder(root, GET_3DSHAPES))


def _in_folder(root: Path, command: str) -> str:
    """The command that puts the data into the folder `root`."""
    return command if root == Path("data") else f"SDN_DATA_ROOT={shlex.quote(str(root))} {command}"


DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "CIFAR10",
            (3, 32, 32),
            True,
            "it is downloaded on first use",
            lambda r, s: Cifar10(r / "CIFAR10", s),
        ),
        _lmdb("ImageNet32", 32, False, "get_imagenet_data.sh"),
        _lmdb("CelebAHQ256", 256, True, "get_celeb_data.sh"),
        DatasetSpec(
            "Photos32",
            (3, 32, 32),
            False,
            "pip install scikit-image scikit-learn",
            lambda root, split: Photos32(split),
        ),
        DatasetSpec("3DShapes", (3, 64, 64), False, GET_3DSHAPES, _shapes3d),
        DatasetSpec(
            "Shapes3DRendered",
            (3, 64, 64),
            False,
            "nothing to get",
            lambda root, split: Shapes3DRendered(split),
        ),
    )
}


def dataset_spec(name: str, root: str | Path = "data") -> DatasetSpec:
    """A registered data set, or one that `python -m data.convert.images` made in `root`.

    Raises:
        DataError: if there is none of this name, or its description is damaged.
    """
    if name in DATASETS:
        return DATASETS[name]
    root = Path(root)
    plain = name not in ("", ".", "..") and not set(name) & set("/\\\0")
    found = read_description(root, name) if plain else None
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
