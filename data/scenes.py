"""The 480,000 scenes of 3D-Shapes (Burgess and Kim 2018): their order, factors and labels."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError
from .registry import SPLITS

FACTORS = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
FACTOR_SIZES = (10, 10, 10, 8, 4, 15)
FACTOR_RANGES = ((0, 0.9), (0, 0.9), (0, 0.9), (0.75, 1.25), (0, 3), (-30, 30))
SCENES = math.prod(FACTOR_SIZES)
SIZE = 64
IMAGE_SHAPE = (SIZE, SIZE, 3)
VALIDATION_LENGTH = 10_000
VALIDATION_SEED = 20180705


class Scenes(Dataset):
    """Images of the 480,000 scenes, uint8 [3, 64, 64], in the order of the official file.

    A scene's index counts the combinations of the six factors, the last factor fastest. Items are
    numbered like the scenes in training; in validation item i is scene `validation_scenes()[i]`.
    The methods below take scenes.

    Arguments:
        split: "train" (all scenes) or "validation" (10,000 of the same scenes: nothing is held out,
            as in Locatello et al. 2019).

    Raises:
        IndexError: if an index is out of range.
    """

    factor_sizes = FACTOR_SIZES

    def __init__(self, split: str = "train"):
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
        self.split = split
        self._listed = validation_scenes().tolist() if split == "validation" else None

    def __len__(self) -> int:
        return SCENES if self._listed is None else len(self._listed)

    def __getitem__(self, index: int) -> Tensor:
        return self.batch([index])[0]

    def batch(self, indices: list[int]) -> Tensor:
        """The items at `indices` [N] at once: uint8 [N, 3, 64, 64]."""
        if wrong := [index for index in indices if not 0 <= index < len(self)]:
            raise IndexError(
                f"3D-Shapes has {len(self)} images for {self.split}, there is no image {wrong[0]}"
            )
        scenes = indices if self._listed is None else [self._listed[index] for index in indices]
        # Contiguous as from torch.stack: convolutions would follow another order of dimensions, and
        # round differently.
        return self._images(torch.tensor(scenes, dtype=torch.int64)).contiguous()

    def factors(self, indices: Tensor) -> Tensor:
        """The factors of scenes [N] as positions in their lists of values: int64 [N, 6]."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        _check_range("scene", indices, torch.tensor(SCENES))
        return indices[:, None] // _STRIDES % _SIZES

    def index_of(self, factors: Tensor) -> Tensor:
        """The scenes with the factors [N, 6]: int64 [N]."""
        factors = torch.as_tensor(factors, dtype=torch.int64)
        _check_range("factor", factors, _SIZES)
        return (factors * _STRIDES).sum(1)

    def labels(self, indices: Tensor) -> Tensor:
        """The values of the factors of scenes [N], as in the official file: float64 [N, 6]."""
        factors = self.factors(indices)
        return torch.stack(
            [values[factors[:, i]] for i, values in enumerate(factor_values())], dim=1
        )

    def images(self, factors: Tensor) -> Tensor:
        """The images of the scenes with the factors [N, 6]: uint8 [N, 3, 64, 64]."""
        return self._images(self.index_of(factors))

    def _images(self, scenes: Tensor) -> Tensor:
        """Images uint8 [N, 3, 64, 64] of scenes int64 [N], which exist."""
        raise NotImplementedError


_SIZES = torch.tensor(FACTOR_SIZES)
_STRIDES = torch.tensor([math.prod(FACTOR_SIZES[i + 1 :]) for i in range(len(FACTOR_SIZES))])


def factor_values() -> list[Tensor]:
    """The values of each factor in the official labels, float64."""
    return [
        torch.from_numpy(np.linspace(low, high, size))
        for (low, high), size in zip(FACTOR_RANGES, FACTOR_SIZES, strict=True)
    ]


def all_labels() -> ndarray:
    """The official labels of all scenes: float64 [480000, 6]."""
    return torch.cartesian_prod(*factor_values()).numpy()


def validation_scenes() -> Tensor:
    """The scenes of the validation split in its order: int64 [10000]."""
    return torch.randperm(SCENES, generator=torch.Generator().manual_seed(VALIDATION_SEED))[
        :VALIDATION_LENGTH
    ]


def _check_range(name: str, numbers: Tensor, end: Tensor) -> None:
    if ((numbers < 0) | (numbers >= end)).any():
        raise IndexError(f"a {name} is not in 0 ... size - 1, the sizes being {end.tolist()}")
