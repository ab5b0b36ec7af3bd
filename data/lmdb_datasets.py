"""Images in an LMDB: the key is the decimal index as ASCII, the value raw uint8 H x W x C."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lib.optional import optional

from .errors import DataError

KINDS = {  # beginnings of values in the LMDBs of other programs
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"RIFF": "a WebP picture",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}

# LMDB allows a file to be open once in a process and forbids using, after a fork, what was opened
# before it. So a process shares its environments, and a fork waits for the reads under way and
# finds none open.
_environments: dict[str, Any] = {}
_reading = Lock()


def _before_fork() -> None:
    _reading.acquire()
    while _environments:
        _environments.popitem()[1].close()


os.register_at_fork(
    before=_before_fork, after_in_parent=_reading.release, after_in_child=_reading.release
)


class LmdbImages(Dataset):
    """Images of one shape as uint8 tensors [C, H, W].

    It may be pickled, and read in any kind of loader worker and in any process that has read it
    before a fork.

    Arguments:
        path: The LMDB's folder.
        shape: (C, H, W).
        command: What gets the data, for the message if they are missing.

    Raises:
        DataError: if the LMDB is missing or damaged, or a value has another size.
        IndexError: if an index is not in 0 ... length - 1.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int, int], command: str):
        self.path, self.shape, self.command = Path(path), shape, command
        self._key = os.path.realpath(path)
        if self.path.is_file():
            raise DataError(
                f"{self.path} is a file; needed is a folder with data.mdb, as from: {command}"
            )
        if not (self.path / "data.mdb").is_file():
            raise DataError(f"there is no {self.path}; get it with: {command}")
        with _reading, self._damage_in_one_line():
            if before := _environments.pop(self._key, None):
                before.close()  # the files may have been replaced
            self._length = self._open().stat()["entries"]
        if self._length == 0:
            raise DataError(f"{self.path} is empty; make it again with: {command}")
        self[self._length - 1]  # the keys are 0 ... length - 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        return self.batch([index])[0]

    def batch(self, indices: list[int]) -> Tensor:
        """The items at `indices` [N] at once: uint8 [N, C, H, W]."""
        if wrong := [index for index in indices if not 0 <= index < self._length]:
            raise IndexError(f"{self.path} has {self._length} images, there is no image {wrong[0]}")
        channels, height, width = self.shape
        images = np.empty((len(indices), height * width * channels), np.uint8)
        with _reading, self._damage_in_one_line(), self._open().begin(buffers=True) as transaction:
            for image, index in zip(images, indices, strict=True):
                value = transaction.get(str(index).encode())
                if value is None:
                    problem = f"{self.path} has no image {index}"
                elif len(value) != len(image):
                    problem = (
                        f"{self.path}: image {index} has {len(value)} bytes, "
                        f"{height}x{width}x{channels} has {len(image)}"
                    )
                else:
                    image[:] = np.frombuffer(value, np.uint8)
                    continue
                raise DataError(f"{problem}; {self._remedy(transaction)}")
        # Contiguous as from torch.stack: convolutions would follow another order of dimensions, and
        # round differently.
        return (
            torch.from_numpy(images.reshape(-1, height, width, channels))
            .permute(0, 3, 1, 2)
            .contiguous()
        )

    def _remedy(self, transaction: Any) -> str:
        """What to do with a wrong LMDB, and what it is if another project made it."""
        cursor = transaction.cursor()
        cursor.first()
        key, value = bytes(cursor.key()), bytes(cursor.value())
        again = f"make it again with: {self.command}"
        kind = next((kind for start, kind in KINDS.items() if value.startswith(start)), "")
        if key == b"0" and not kind:
            return again
        first = f"its first key is {ascii(key[:40])}, its first value {kind or 'something'}"
        convert = (
            f"python -m data.convert.images {shlex.quote(str(self.path))} --name NAME --size SIZE"
        )
        ways = f"; pictures become a data set with: {convert}" if "picture" in kind else ""
        return (
            f"it was made by another program ({first} of {len(value)} bytes), where the keys here "
            f"are 0, 1, ... and the values raw images{ways}; or {again}"
        )

    def _open(self) -> Any:
        """This process's environment of these files; the caller holds `_reading`."""
        if self._key not in _environments:
            import lmdb

            environment = lmdb.open(
                self._key, readonly=True, lock=False, readahead=False, meminit=False, create=False
            )
            expected = size_in_use(environment)
            actual = (self.path / "data.mdb").stat().st_size
            if actual < expected:  # reading past the end of the file would kill the process
                environment.close()
                raise DataError(
                    f"{self.path} is damaged (data.mdb has {actual} of {expected} bytes); "
                    f"make it again with: {self.command}"
                )
            _environments[self._key] = environment
        return _environments[self._key]

    @contextmanager
    def _damage_in_one_line(self) -> Iterator[None]:
        """Turns what LMDB reports, of the files as a whole or of a page inside them, into
        DataError."""
        lmdb = optional("lmdb", f"reading {self.path}", "train", DataError)
        try:
            yield
        except lmdb.Error as error:
            raise DataError(
                f"{self.path} is damaged ({error}); make it again with: {self.command}"
            ) from None


def put_images(environment: Any, first: int, images: list[bytes]) -> None:
    """Writes raw images, of which the first has the number `first`, all or none; a map that is full
    doubles."""
    import lmdb

    while True:
        try:
            with environment.begin(write=True) as transaction:
                for number, image in enumerate(images, first):
                    transaction.put(str(number).encode(), image)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def size_in_use(environment: Any) -> int:
    """Bytes that the file of an open LMDB must have; reading past the end of a shorter one kills
    the process."""
    return (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
