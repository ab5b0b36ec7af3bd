"""CIFAR10, read from its archive. The archive's files are pickles; nothing that is stored in them
is executed."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..download import download
from ..errors import DataError
from ..locks import locked_folder
from ..registry import DatasetSpec, ImagesInMemory, register

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE, SHA256 = (
    "cifar-10-python.tar.gz",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
FOLDER = "cifar-10-batches-py"  # holds the files, in the archive and unpacked
FILES = {  # with the MD5 sums that the authors give
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "validation": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}
MOST_BYTES = 200_000_000  # of the archive, unpacked; the published one has 186 million
IMAGE_BYTES = 3 * 32 * 32
ATTEMPTS = 2  # few, so that a machine without a network says so soon


class Cifar10(ImagesInMemory):
    """CIFAR10 as uint8 [3, 32, 32], downloaded on first use; the test split validates.

    Arguments:
        folder: Of the archive, which is read as it is, or of its unpacked folder
            `cifar-10-batches-py`.
        split: "train" (50,000) or "validation" (10,000).

    Raises:
        DataError: if it is not there and cannot be downloaded, or is damaged.
    """

    def __init__(self, folder: Path, split: str):
        contents = _unpacked(folder / FOLDER, FILES[split])
        if contents is None:
            contents = _archived(_archive(folder), FILES[split])
        images = np.concatenate([images_of(*file) for file in contents.items()])
        super().__init__(torch.from_numpy(images))


def images_of(name: str, content: bytes) -> np.ndarray:
    """The images in a file of the archive: uint8 [N, 3, 32, 32].

    Raises:
        DataError: if it holds something other than plain values and an array of images.
    """
    try:
        _, shape, dtype, in_columns, stored = (
            _Batch(io.BytesIO(content), encoding="latin1").load()["data"].state
        )
        pixels = (
            stored.encode("latin1") if isinstance(stored, str) else stored
        )  # Python 2 wrote text
        if not pixels or (dtype.arguments[0], in_columns, shape) != (
            "u1",
            False,
            (len(pixels) // IMAGE_BYTES, IMAGE_BYTES),
        ):
            raise ValueError("no array of images")
        return np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    except Exception as error:  # damaged bytes can fail anywhere in the reader, in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"CIFAR10's {name} is damaged ({reason}); remove it and what it came in"
        ) from None


class _Stored:
    """Stands for numpy's arrays and types: keeps what it is made from, and does nothing with it."""

    def __init__(self, *arguments: Any):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Batch(pickle.Unpickler):
    """Reads plain values and arrays. No other class or function is looked up, none of numpy's is
    called."""

    ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype")}
    ARRAYS |= {
        (module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in self.ARRAYS:
            return _Stored
        raise pickle.UnpicklingError(f"it holds a {module}.{name}".replace("\n", " "))


def _unpacked(folder: Path, files: dict[str, str]) -> dict[str, bytes] | None:
    """The contents of unpacked files, if they are all there and whole."""
    contents = {}
    for name, md5 in files.items():
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        if _md5(content) != md5:
            return None
        contents[name] = content
    return contents


class _Bounded:
    """A stream of which no more than `MOST_BYTES` can be read: the archive of somebody else may
    unpack to a thousand times its size."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._left = stream, MOST_BYTES

    def read(self, size: int) -> bytes:
        block = self._stream.read(min(size, self._left + 1))
        self._left -= len(block)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {MOST_BYTES} bytes")
        return block


def _archived(archive: Path, files: dict[str, str]) -> dict[str, bytes]:
    """The contents of files of the archive, which is not unpacked."""
    contents = {}
    try:
        with (
            gzip.open(archive) as unpacked,
            tarfile.open(fileobj=_Bounded(unpacked), mode="r|") as tar,
        ):
            for member in tar:
                path = Path(member.name)
                if member.isfile() and path.parent.name == FOLDER and path.name in files:
                    contents[path.name] = tar.extractfile(member).read()
        damaged = [name for name, md5 in files.items() if _md5(contents.get(name, b"")) != md5]
        reason = f"{damaged[0]} is missing or damaged" if damaged else ""
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = str(error)
    if reason:
        raise DataError(f"{archive} is damaged ({reason}): remove it to download it again")
    return {name: contents[name] for name in files}


def _archive(folder: Path) -> Path:
    """The archive, downloaded if it is not there."""
    archive = folder / ARCHIVE
    if archive.is_file():
        return archive
    try:
        with locked_folder(folder, wait=True):  # processes of one machine take turns
            if not archive.is_file():
                download(URL, archive, sha256=SHA256, attempts=ATTEMPTS)
    except (OSError, DataError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"CIFAR10 cannot be downloaded ({reason}); put {ARCHIVE} from {URL} into {folder}"
        ) from None
    return archive


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


register(
    DatasetSpec(
        "CIFAR10",
        (3, 32, 32),
        flip=True,
        command="it is downloaded on first use",
        open=lambda root, split: Cifar10(root / "CIFAR10", split),
    )
)
