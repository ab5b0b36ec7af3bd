"""Shapes3DRendered: our own pictures of the 480,000 scenes of 3D-Shapes. Nothing is downloaded.

`python -m data.convert.shapes3d render OUT.h5` writes them as an HDF5 file with the official one's
names, order, shapes and types.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from lib.progress import progress

from ..registry import DatasetSpec, register
from ..scenes import FACTOR_SIZES, SIZE, Scenes
from ..shapes3d_raycast import MATERIALS, all_weights

GEOMETRIES = 8 * 4 * 15
SATURATION, VALUE = 0.9, 1.0
LEVELS = 4096  # of a weight: with 256 levels of a colour, sums stay exact in float32, in any order


class Shapes3DRendered(Scenes):
    """The rendered images as uint8 [3, 64, 64].

    The weights of the 480 geometries (31 MB) are computed once in a process, in a few seconds;
    workers share them. An image is the product of its colours [3, 4] and its geometry's weights [4,
    4096].

    Arguments:
        split: As in `Scenes`.
    """

    def __init__(self, split: str = "train"):
        super().__init__(split)
        self._weights, self._colours = geometry_weights(), hue_colours()

    def _images(self, scenes: Tensor) -> Tensor:
        images = np.empty((len(scenes), 3, SIZE * SIZE), np.uint8)
        for image, scene in zip(images, scenes.tolist(), strict=True):
            hues, geometry = divmod(scene, GEOMETRIES)
            image[:] = self._colours[hues] @ self._weights[geometry]
        return torch.from_numpy(images).view(-1, 3, SIZE, SIZE)


@lru_cache(maxsize=1)
def geometry_weights() -> ndarray:
    """Weights of the materials, whole numbers, for each scale, shape and orientation: float32 [480,
    4, 4096]."""
    return np.rint(all_weights().reshape(GEOMETRIES, len(MATERIALS), SIZE * SIZE) * (LEVELS - 1))


@lru_cache(maxsize=1)
def hue_colours() -> ndarray:
    """Colours of the materials, over `LEVELS`, for each hue of floor, wall and object: float32
    [1000, 3, 4]."""
    size = FACTOR_SIZES[0]
    hues = [colorsys.hsv_to_rgb(i / size, SATURATION, VALUE) for i in range(size)]
    colours = np.array(
        [[*materials, (1, 1, 1)] for materials in itertools.product(hues, repeat=3)], np.float32
    )
    return np.rint(colours * 255).swapaxes(1, 2) / np.float32(LEVELS)


def blocks(count: int) -> Iterator[ndarray]:
    """The images of the first `count` scenes in the file's layout: uint8 [n, 64, 64, 3] at a
    time."""
    rendered = Shapes3DRendered()
    with progress(total=count, desc="rendered", unit=" images") as bar:
        for start in range(0, count, GEOMETRIES):
            images = rendered.batch(list(range(start, min(start + GEOMETRIES, count))))
            yield images.permute(0, 2, 3, 1).numpy()
            bar.update(len(images))


register(
    DatasetSpec(
        "Shapes3DRendered",
        (3, SIZE, SIZE),
        flip=False,
        command="nothing to get",
        open=lambda root, split: Shapes3DRendered(split),
    )
)
