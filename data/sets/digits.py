"""Digits8: the 1,797 handwritten digits of 8x8 that scikit-learn carries. Nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch

from lib.optional import optional

from ..errors import DataError
from ..registry import DatasetSpec, ImagesInMemory, register

SIZE = 8
VALIDATION = 180  # the last ones


class Digits8(ImagesInMemory):
    """The digits as uint8 [1, 8, 8], white on black.

    Of their 17 levels the two brightest are taken for one, so that `--nbits 4` loses nothing more.

    Arguments:
        split: "train" (the first 1,617) or "validation" (the last 180).

    Raises:
        DataError: if scikit-learn is missing.
    """

    def __init__(self, split: str):
        datasets = optional("sklearn.datasets", "Digits8", "photos", DataError)
        levels = np.minimum(datasets.load_digits().images, 15).astype(np.uint8) * 17
        images = torch.from_numpy(levels).unsqueeze(1)
        super().__init__(images[:-VALIDATION] if split == "train" else images[-VALIDATION:])


register(
    DatasetSpec(
        "Digits8",
        (1, SIZE, SIZE),
        flip=False,
        command="pip install scikit-learn",
        open=lambda root, split: Digits8(split),
    )
)
