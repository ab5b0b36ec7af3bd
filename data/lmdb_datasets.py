"""Images in an LMDB: the key is the decimal index as ASCII, the value raw uint8 H x W x 3."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError


class LmdbImages(Dataset):
    """Images of one shape as uint8 tensors [3, H, W].

    The environment is opened when an item is first read, once in each process: it is neither pickled nor carried
    across a fork, so any kind of loader worker may use the data set.

    Arguments:
        path: The LMDB's folder.
        shape: (3, H, W).
        command: What gets the data, for the message if they are missing.

    Raises:
        DataError: if the LMDB is missing or damaged, or a value has another size.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int, int], command: str):
        self.path, self.shape, self.command = Path(path), shape, command
        self._environment: Any = None
        self._process: int | None = None
        if not (self.path / "data.mdb").is_file():
            raise DataError(f"there is no {self.path}; get it with: {command}")
        self._length = self._open().stat()["entries"]
        if self._length == 0:
            raise DataError(f"{self.path} is empty; make it again with: {command}")
        self[self._length - 1]  # the keys are 0 ... length - 1
        self._close()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        _, height, width = self.shape
        with self._open().begin(buffers=True) as transaction:
            value = transaction.get(str(index).encode())
            if value is None:
                raise DataError(f"{self.path} has no image {index}; make it again with: {self.command}")
            if len(value) != height * width * 3:
                raise DataError(
                    f"{self.path}: image {index} has {len(value)} bytes, {height}x{width}x3 has {height * width * 3}; "
                    f"make it again with: {self.command}"
                )
            image = torch.from_numpy(np.frombuffer(value, np.uint8).reshape(height, width, 3).copy())
        return image.permute(2, 0, 1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_environment": None, "_process": None}

    def _open(self) -> Any:
        if self._process != os.getpid():
            try:
                import lmdb
            except ImportError:
                raise DataError(f"reading {self.path} needs the package lmdb: pip install lmdb") from None
            try:
                self._environment = lmdb.open(
                    str(self.path), readonly=True, lock=False, readahead=False, meminit=False, create=False
                )
            except lmdb.Error as error:
                raise DataError(f"{self.path} is damaged ({error}); make it again with: {self.command}") from None
            self._process = os.getpid()
        return self._environment

    def _close(self) -> None:
        """A fork must not find an open environment."""
        self._environment.close()
        self._environment = self._process = None
