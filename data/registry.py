"""What a data set is, and the register that the modules of `data.sets` enter theirs in.

A new data set is one file in `data/sets/` that calls

    register(DatasetSpec("Name", (3, 64, 64), flip=True, command="what gets it", open=opened))

where `opened(root, split)` gives a torch Dataset of uint8 images [3, 64, 64] by index. A Dataset
may also have `batch(indices)`, the images [N, 3, 64, 64] of a list of indices, and
`draw(index, generator)`, an image with random augmentation, which training uses then.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class DatasetSpec:
    """A data set that has a train and a validation split of uint8 images.

    Arguments:
        name: What `--dataset` calls it.
        shape: (C, H, W) of its images.
        flip: Whether training mirrors images at random.
        command: What gets the data.
        open: (folder of all data sets, split) -> Dataset of uint8 tensors [C, H, W]. It raises
            DataError for what is missing or damaged.
    """

    name: str
    shape: tuple[int, int, int]
    flip: bool
    command: str
    open: Callable[[Path, str], Dataset]


class ImagesInMemory(Dataset):
    """Images that are a tensor, uint8 [N, C, H, W]."""

    def __init__(self, images: Tensor):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]

    def batch(self, indices: list[int]) -> Tensor:
        return self._images[torch.tensor(indices)]


DATASETS: dict[str, DatasetSpec] = {}


def register(spec: DatasetSpec) -> None:
    """Makes a data set known by its name; `DATASETS` stays in the order of the alphabet, whichever
    module is imported first."""
    DATASETS[spec.name] = spec
    for name in sorted(DATASETS, key=str.lower):
        DATASETS[name] = DATASETS.pop(name)


def command_for(root: Path, command: str) -> str:
    """A command that gets data, such that it puts them into the folder `root`."""
    return command if root == Path("data") else f"SDN_DATA_ROOT={shlex.quote(str(root))} {command}"
