"""Photos32: 32x32 colour patches of the photographs that scikit-image and scikit-learn carry.
Nothing is downloaded.

Each photograph is cut into a left part for training and a right strip for validation before
anything is scaled, so the two share no pixel. Patches are taken at full size and from versions
scaled down to 1/2, 1/3 and 1/4.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lib.optional import optional

from ..errors import DataError
from ..registry import DatasetSpec, register

REDUCTIONS = (1, 2, 3, 4)
VALIDATION_SHARE = 0.25  # of each photograph's width
TRAIN_LENGTH = 8192
VALIDATION_LENGTH = 1024
VALIDATION_SEED = 20210503


class Photos32(Dataset):
    """Patches as uint8 [3, size, size].

    Arguments:
        split: "train" (an epoch is 8,192 random draws: photograph by area, scale, position, flip)
            or "validation" (a fixed list of 1,024 patches).
        size: Of a patch; the data set has 32.

    Raises:
        DataError: if a package that carries the photographs is missing.
    """

    def __init__(self, split: str, size: int = 32):
        self.split, self.size = split, size
        regions = [_region(photograph, split) for photograph in photographs()]
        areas = torch.tensor(
            [region.width * region.height for region in regions], dtype=torch.float64
        )
        self._shares = areas.cumsum(0) / areas.sum()
        self._levels = [
            [_reduced(region, reduction, size) for reduction in REDUCTIONS] for region in regions
        ]
        self._fixed: Tensor | None = None
        if split == "validation":
            generator = torch.Generator().manual_seed(VALIDATION_SEED)
            self._fixed = torch.stack([self._patch(generator) for _ in range(VALIDATION_LENGTH)])

    def __len__(self) -> int:
        return TRAIN_LENGTH if self._fixed is None else len(self._fixed)

    def __getitem__(self, index: int) -> Tensor:
        if self._fixed is not None:
            return self._fixed[index]
        return self._patch(torch.Generator().manual_seed(index))

    def draw(self, index: int, generator: torch.Generator) -> Tensor:
        """A random patch that depends on the generator's state only; in validation the fixed one of
        this index."""
        return self[index] if self._fixed is not None else self._patch(generator)

    def _patch(self, generator: torch.Generator) -> Tensor:
        photograph, level, top, left, flip = torch.rand(
            5, generator=generator, dtype=torch.float64
        ).tolist()
        levels = self._levels[
            int(torch.searchsorted(self._shares, photograph).clamp(max=len(self._levels) - 1))
        ]
        image = levels[int(level * len(levels))]
        size = self.size
        row, column = (
            int(top * (image.shape[1] - size + 1)),
            int(left * (image.shape[2] - size + 1)),
        )
        patch = image[:, row : row + size, column : column + size]
        return patch.flip(2) if flip < 0.5 else patch.clone()


def photographs() -> list[Image.Image]:
    """The seven photographs, RGB."""
    data = optional("skimage.data", "Photos32", "photos", DataError)
    samples = optional("sklearn.datasets", "Photos32", "photos", DataError)
    arrays = [
        data.astronaut(),
        data.cat(),
        data.coffee(),
        data.rocket(),
        data.stereo_motorcycle()[0],
    ]
    return [
        Image.fromarray(np.asarray(array)).convert("RGB")
        for array in [*arrays, *samples.load_sample_images().images]
    ]


def _region(photograph: Image.Image, split: str) -> Image.Image:
    """The part of a photograph that belongs to a split."""
    border = round(photograph.width * (1 - VALIDATION_SHARE))
    left, right = (0, border) if split == "train" else (border, photograph.width)
    return photograph.crop((left, 0, right, photograph.height))


def _reduced(region: Image.Image, reduction: int, least: int) -> Tensor:
    """The region scaled down (antialiased), no side below a patch's: uint8 [3, H, W]."""
    size = (max(least, region.width // reduction), max(least, region.height // reduction))
    scaled = region if size == region.size else region.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()


register(
    DatasetSpec(
        "Photos32",
        (3, 32, 32),
        flip=False,  # its draws are mirrored already
        command="pip install scikit-image scikit-learn",
        open=lambda root, split: Photos32(split),
    )
)
