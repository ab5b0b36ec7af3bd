"""3DShapes: the images of the official 3dshapes.h5 (Burgess and Kim 2018)."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..convert.shapes3d import COMMAND, convert, existing_copy, opened
from ..errors import DataError
from ..registry import DatasetSpec, command_for, register
from ..scenes import IMAGE_SHAPE, SIZE, Scenes

IMAGE_BYTES = math.prod(IMAGE_SHAPE)


class Shapes3D(Scenes):
    """The images of an HDF5 file with the official structure, as uint8 [3, 64, 64].

    It may be pickled and read in any kind of loader worker: nothing of HDF5 is open after the
    constructor.

    Arguments:
        path: The file. If it is compressed, its uncompressed copy is read, and made if it is not
            there yet; with the copy there, the file itself may be missing.
        split: As in `Scenes`.
        command: What gets the file, for the messages.

    Raises:
        DataError: if the file is missing, damaged, locked or not to be read, its images or labels
            are not those of 3D-Shapes, or the copy cannot be made.
    """

    def __init__(self, path: str | Path, split: str = "train", command: str = COMMAND):
        super().__init__(split)
        path, self.command = Path(path), command
        copy = existing_copy(path)
        self.path = copy if copy and not os.path.exists(path) else path
        with opened(self.path, command) as images:
            self._offset = images.id.get_offset()
        if self._offset is None:
            self.path, self._offset = convert(path, command)
        self._file: BinaryIO | None = None

    def _images(self, scenes: Tensor) -> Tensor:
        images = np.empty((len(scenes), *IMAGE_SHAPE), np.uint8)
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        for scene, image in zip(scenes.tolist(), images, strict=True):
            # Reading at a position leaves no trace in the open file: processes can share it.
            start = self._offset + scene * IMAGE_BYTES
            if os.preadv(self._file.fileno(), [image], start) != IMAGE_BYTES:
                raise DataError(
                    f"{self.path} ends before image {scene}; remove it and get it again with: "
                    f"{self.command}"
                )
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


register(
    DatasetSpec(
        "3DShapes",
        (3, SIZE, SIZE),
        flip=False,
        command=COMMAND,
        open=lambda root, split: Shapes3D(
            root / "3DShapes" / "3dshapes.h5", split, command_for(root, COMMAND)
        ),
    )
)
