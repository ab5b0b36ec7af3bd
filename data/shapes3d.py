"""3D-Shapes (Burgess and Kim 2018): the order of its 480,000 scenes, and a reader of the official
3dshapes.h5.

python -m data.shapes3d {check,convert} 3dshapes.h5

The official file is compressed in pieces of many images, so that one image at random costs the
decompression of at least one piece, hundreds of times the work of reading it. So `convert`, or the
first use, writes 3dshapes.uncompressed.h5 (5.9 GB) beside it, of which an image is one read of 12
KB. A file that is not compressed, such as data.shapes3d_rendered writes by default, is read as it
is.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lib.cli import OneLineParser, one_line_errors

from .errors import DataError

FACTORS = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
FACTOR_SIZES = (10, 10, 10, 8, 4, 15)
FACTOR_RANGES = ((0, 0.9), (0, 0.9), (0, 0.9), (0.75, 1.25), (0, 3), (-30, 30))
SCENES = math.prod(FACTOR_SIZES)
SIZE = 64
SOURCE = "source_bytes"  # attribute of a copy
CHUNK = 64  # images that are compressed together
IMAGE_SHAPE = (SIZE, SIZE, 3)
IMAGE_BYTES = math.prod(IMAGE_SHAPE)
COMMAND = "bash data/3DShapes/get_3dshapes_data.sh"
BLOCK, LARGEST_BLOCK = 512, 16384  # images that are decompressed at a time
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
        if split not in ("train", "validation"):
            raise DataError(f"unknown split {split!r}; there are train, validation")
        self.split = split
        self._listed = validation_scenes().tolist() if split == "validation" else None

    def __len__(self) -> int:
        return SCENES if self._listed is None else len(self._listed)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(
                f"3D-Shapes has {len(self)} images for {self.split}, there is no image {index}"
            )
        return self._image(index if self._listed is None else self._listed[index])

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

    def _image(self, scene: int) -> Tensor:
        """[3, 64, 64]; the scene exists."""
        raise NotImplementedError

    def _images(self, scenes: Tensor) -> Tensor:
        """[N, 3, 64, 64] of scenes [N]; they exist."""
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


class Shapes3D(Scenes):
    """The images of an HDF5 file with the official structure, as uint8 [3, 64, 64].

    It may be pickled and read in any kind of loader worker: nothing of HDF5 is open after the
        constructor.

    Arguments:
        path: The file. If it is compressed, its uncompressed copy is read, and made if it is not
            there yet; with the copy there, the file itself may be missing.
        split: As in `Scenes`.
        command: What gets the file, for the messages.
        in_memory: Whether to hold all images in memory (5.9 GB); no copy is needed then.

    Raises:
        DataError: if the file is missing or damaged, its images or labels are not those of
            3D-Shapes, or the copy cannot be made.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        command: str = COMMAND,
        in_memory: bool = False,
    ):
        super().__init__(split)
        path = Path(path)
        copy = uncompressed(path)
        self.path, self.command = path if path.exists() or not copy.exists() else copy, command
        self._file: BinaryIO | None = None
        self._memory: Tensor | None = None
        with opened(self.path, command) as images:
            self._offset = images.id.get_offset()
            if in_memory:
                self._memory = torch.empty(SCENES, *IMAGE_SHAPE, dtype=torch.uint8)
                for start, block in decoded(images, self.path, command):
                    self._memory[start : start + len(block)] = torch.from_numpy(block)
        if self._offset is None and not in_memory:
            if not copy.exists():
                print(
                    f"{path} is compressed; its images are written to {copy} once",
                    file=sys.stderr,
                    flush=True,
                )
            self.path, self._offset = convert(path, command)

    def _image(self, scene: int) -> Tensor:
        image = np.empty(IMAGE_SHAPE, np.uint8)
        self._read(scene, image)
        return torch.from_numpy(image).permute(2, 0, 1)

    def _images(self, scenes: Tensor) -> Tensor:
        images = np.empty((len(scenes), *IMAGE_SHAPE), np.uint8)
        for scene, image in zip(scenes.tolist(), images, strict=True):
            self._read(scene, image)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _read(self, scene: int, image: ndarray) -> None:
        """Fills [64, 64, 3]. Reading at a position leaves no trace in the open file, so that
        processes can share it."""
        if self._memory is not None:
            image[:] = self._memory[scene].numpy()
            return
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        if (
            os.preadv(self._file.fileno(), [image], self._offset + scene * IMAGE_BYTES)
            != IMAGE_BYTES
        ):
            raise DataError(
                f"{self.path} ends before image {scene}; remove it and get it again with: {self.command}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


def uncompressed(path: Path) -> Path:
    """Where the uncompressed copy of a file is."""
    return path.with_suffix(".uncompressed.h5")


@contextlib.contextmanager
def opened(path: Path, command: str = COMMAND) -> Iterator[Any]:
    """The HDF5 data set `images` of a file whose structure and labels are right.

    Raises:
        DataError: if the file is missing or damaged, or has other images or labels.
    """
    h5py = _h5py()
    if not path.exists():
        raise DataError(f"there is no {path}; get it with: {command}")
    again = f"remove it and get it again with: {command}"
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is no whole HDF5 file ({_first_line(error)}); {again}") from None
    with file:
        try:
            _check_array(file, "images", (SCENES, *IMAGE_SHAPE), "u1", path, again)
            _check_array(file, "labels", (SCENES, len(FACTORS)), "f", path, again)
            labels = file["labels"][:]
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path} is damaged ({_first_line(error)}); {again}") from None
        expected = all_labels()
        wrong = np.flatnonzero(~(np.abs(labels - expected) < 1e-5).all(1))  # NaN is wrong
        if len(wrong):
            scene = wrong[0]
            raise DataError(
                f"{path}: the labels of image {scene} are {labels[scene].tolist()} instead of "
                f"{expected[scene].tolist()} ({len(wrong)} of {SCENES} differ); {again}"
            )
        yield file["images"]


def _check_array(
    file: Any, name: str, shape: tuple[int, ...], kind: str, path: Path, again: str
) -> None:
    array = file.get(name)
    if not hasattr(array, "dtype"):
        raise DataError(
            f"{path} has no data set {name!r}, but {', '.join(map(repr, file)) or 'nothing'}; {again}"
        )
    if array.shape != shape or kind not in (array.dtype.kind, array.dtype.str[1:]):
        kind = {"u1": "uint8", "f": "float64"}[kind]
        raise DataError(
            f"{path}: {name} is {array.dtype} {list(array.shape)} instead of {kind} {list(shape)}; {again}"
        )


def decoded(images: Any, path: Path, command: str = COMMAND) -> Iterator[tuple[int, ndarray]]:
    """All images in order, several at a time with the first one's index, under a progress bar.

    Raises:
        DataError: if a part is damaged or an image has one colour only, as where nothing was
            written.
    """
    again = f"remove {path} and get it again with: {command}"
    rows = images.chunks[0] if images.chunks else BLOCK
    count = min(
        -(-BLOCK // rows) * rows, LARGEST_BLOCK
    )  # whole pieces, so that none is decompressed twice
    with tqdm(total=SCENES, desc=path.name, unit=" images", disable=None) as bar:
        for start in range(0, SCENES, count):
            try:
                block = images[start : start + count]
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"{path} is damaged in images {start} ... {min(start + count, SCENES) - 1} "
                    f"({_first_line(error)}); {again}"
                ) from None
            flat = block.reshape(len(block), -1)
            if len(empty := np.flatnonzero(flat.min(1) == flat.max(1))):
                raise DataError(
                    f"{path}: nothing is to be seen on image {start + empty[0]}; {again}"
                )
            yield start, block
            bar.update(len(block))


def convert(path: Path, command: str = COMMAND) -> tuple[Path, int]:
    """The uncompressed copy of a file and where its images begin in it; it is made if it is not
    there yet.

    Raises:
        DataError: if the file is damaged, the disk has too little room, or there is a copy, but of
            another file.
    """
    if not path.exists():
        raise DataError(f"there is no {path}; get it with: {command}")
    copy, source_bytes = uncompressed(path), path.stat().st_size
    if not copy.exists():
        with opened(path, command) as images, alone(copy):
            if not copy.exists():  # another process may just have made it
                write_hdf5(
                    copy,
                    (block for _, block in decoded(images, path, command)),
                    SCENES,
                    source=source_bytes,
                )
    again = "remove it, and it is made again"
    with opened(copy, command) as images:
        if (offset := images.id.get_offset()) is None:
            raise DataError(f"{copy} is compressed; {again}")
        if images.file.attrs.get(SOURCE) != source_bytes:
            raise DataError(f"{copy} is not a copy of {path}; {again}")
    return copy, offset


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process writes into the folder of `path`, and keeps others waiting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(
                    f"waiting for another process that writes into {path.parent}",
                    file=sys.stderr,
                    flush=True,
                )
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_hdf5(
    path: Path,
    blocks: Iterable[ndarray],
    count: int,
    compression: str | None = None,
    source: int | None = None,
) -> None:
    """Writes a file of the official structure, complete or not at all. The caller sees to being
    `alone`.

    Arguments:
        path: The file; it must not exist.
        blocks: Images uint8 [n, 64, 64, 3] of the scenes in order.
        count: How many images the blocks have together.
        compression: "gzip", "lzf" or None.
        source: Size in bytes of the file that this is a copy of.

    Raises:
        DataError: if the file exists, the disk has too little room, what was written cannot be read
            back, or the package h5py is missing.
    """
    h5py = _h5py()
    if path.exists():
        raise DataError(f"{path} exists: move it away to write it again")
    partial = path.with_suffix(".partial.h5")
    partial.unlink(missing_ok=True)  # of a process that was killed
    shape = (count, *IMAGE_SHAPE)
    needed, free = math.prod(shape) + 2**26, shutil.disk_usage(path.parent).free
    if compression is None and free < needed:
        raise DataError(
            f"{path.parent} has {free / 1e9:.1f} GB free, {path.name} takes {needed / 1e9:.1f}: make room"
        )
    samples: dict[int, ndarray] = {}
    try:
        with h5py.File(partial, "w") as file:
            if source is not None:
                file.attrs[SOURCE] = source
            file["labels"] = all_labels()[:count]
            chunks = (min(CHUNK, count), *IMAGE_SHAPE) if compression else None
            images = file.create_dataset(
                "images", shape, np.uint8, chunks=chunks, compression=compression
            )
            start = 0
            for block in blocks:
                images[start : start + len(block)] = block
                samples[start] = block[0].copy()
                start += len(block)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        with h5py.File(partial, "r") as file:
            if not all(
                np.array_equal(file["images"][index], image) for index, image in samples.items()
            ):
                raise DataError(
                    f"{path.parent}: what was written is read back differently; nothing is kept"
                )
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise DataError("3D-Shapes files need the package h5py: pip install h5py") from None
    return h5py


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        "data.shapes3d", description="Looks through a file of 3D-Shapes, or makes it fast to read."
    )
    parser.add_argument(
        "action", choices=("check", "convert"), help="convert: also write the uncompressed copy"
    )
    parser.add_argument("path", type=Path, help="3dshapes.h5")
    flags = parser.parse_args(arguments)
    with one_line_errors("data.shapes3d", DataError, OSError):
        try:
            if flags.action == "check":
                with opened(flags.path) as images:
                    for _ in decoded(images, flags.path):
                        pass
                print(f"{flags.path}: {SCENES} images with the labels of 3D-Shapes")
            else:
                dataset = Shapes3D(flags.path)
                print(f"{dataset.path}: {SCENES} images to be read at random")
        except KeyboardInterrupt:
            raise DataError("interrupted; nothing half-written is kept") from None


if __name__ == "__main__":
    main()
