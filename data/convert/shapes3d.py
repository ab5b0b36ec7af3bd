"""Files of 3D-Shapes: looks through one, makes one fast to read, or writes our own rendered images.

    python -m data.convert.shapes3d check 3dshapes.h5
    python -m data.convert.shapes3d convert 3dshapes.h5
    python -m data.convert.shapes3d render OUT.h5 [--compression {gzip,lzf}] [--first N]

The official file is compressed in pieces of many images, so that one image at random costs the
decompression of at least one piece, hundreds of times the work of reading it. So `convert`, or the
first use, writes 3dshapes.uncompressed.h5 (5.9 GB), of which an image is one read of 12 KB, beside
it or, where that folder cannot be written, into the user's cache folder. A file that is not
compressed, such as `render` writes by default, is read as it is.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from lib.cli import OneLineParser, one_line_errors
from lib.optional import optional
from lib.progress import progress

from .. import scenes
from ..errors import DataError
from ..locks import locked_folder
from ..scenes import FACTORS, IMAGE_SHAPE
from ..sets import shapes3d_rendered

PROGRAM = "data.convert.shapes3d"
COMMAND = "bash data/3DShapes/get_3dshapes_data.sh"
SOURCE = "source_bytes"  # attribute of a copy
CHUNK = 64  # images that are compressed together
BLOCK, LARGEST_BLOCK = 512, 16384  # images that are decompressed at a time
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def opened(path: Path, command: str = COMMAND) -> Iterator[Any]:
    """The HDF5 data set `images` of a file whose structure and labels are right.

    Raises:
        DataError: if the file is missing or damaged, cannot be read, is locked, or has other images
            or labels.
    """
    h5py = optional("h5py", "a file of 3D-Shapes", "shapes3d", DataError)
    try:
        path.stat()
    except FileNotFoundError:
        raise DataError(f"there is no {path}; get it with: {command}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    again = f"remove it and get it again with: {command}"
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(_fault(path, error, "is no whole HDF5 file", again)) from None
    with file:
        try:
            _check_array(file, "images", (scenes.SCENES, *IMAGE_SHAPE), "u1", path, again)
            _check_array(file, "labels", (scenes.SCENES, len(FACTORS)), "f", path, again)
            labels = file["labels"][:]
        except (OSError, RuntimeError) as error:
            raise DataError(_fault(path, error, "is damaged", again)) from None
        expected = scenes.all_labels()
        wrong = np.flatnonzero(~(np.abs(labels - expected) < 1e-5).all(1))  # NaN is wrong
        if len(wrong):
            scene = wrong[0]
            raise DataError(
                f"{path}: the labels of image {scene} are {labels[scene].tolist()} instead of "
                f"{expected[scene].tolist()} ({len(wrong)} of {len(labels)} differ); {again}"
            )
        yield file["images"]


def decoded(images: Any, path: Path, command: str = COMMAND) -> Iterator[ndarray]:
    """All images in order, several at a time, under a progress bar: uint8 [n, 64, 64, 3].

    Raises:
        DataError: if a part is damaged or an image has one colour only, as where nothing was
            written.
    """
    again = f"remove {path} and get it again with: {command}"
    rows = images.chunks[0] if images.chunks else BLOCK
    count = min(-(-BLOCK // rows) * rows, LARGEST_BLOCK)  # whole pieces: each is decompressed once
    with progress(total=scenes.SCENES, desc=path.name, unit=" images") as bar:
        for start in range(0, scenes.SCENES, count):
            try:
                block = images[start : start + count]
            except (OSError, RuntimeError) as error:
                last = min(start + count, scenes.SCENES) - 1
                what = f"is damaged in images {start} ... {last}"
                raise DataError(_fault(path, error, what, again)) from None
            flat = block.reshape(len(block), -1)
            if len(empty := np.flatnonzero(flat.min(1) == flat.max(1))):
                raise DataError(
                    f"{path}: nothing is to be seen on image {start + empty[0]}; {again}"
                )
            yield block
            bar.update(len(block))


def existing_copy(path: Path) -> Path | None:
    """The uncompressed copy of a file, if there is one."""
    return next((copy for copy in _places(path) if os.path.exists(copy)), None)


def convert(path: Path, command: str = COMMAND) -> tuple[Path, int]:
    """The uncompressed copy of a file and where its images begin in it; it is made if it is not
    there yet.

    Raises:
        DataError: if the file is damaged, the disk has too little room, no folder for the copy can
            be written, or there is a copy, but of another file.
    """
    if not (copy := existing_copy(path)):
        with opened(path, command) as images:
            copy = _writable_place(path)
            print(f"{path} is compressed; its images are written to {copy} once", file=sys.stderr)
            with locked_folder(copy.parent, wait=True):
                if not copy.exists():  # another process may just have made it
                    blocks = decoded(images, path, command)
                    write_hdf5(copy, blocks, scenes.SCENES, source=path.stat().st_size)
    source_bytes = path.stat().st_size
    again = "remove it, and it is made again"
    with opened(copy, command) as images:
        if (offset := images.id.get_offset()) is None:
            raise DataError(f"{copy} is compressed; {again}")
        if images.file.attrs.get(SOURCE) != source_bytes:
            raise DataError(f"{copy} is not a copy of {path}; {again}")
    return copy, offset


def write_hdf5(
    path: Path,
    blocks: Iterable[ndarray],
    count: int,
    compression: str | None = None,
    source: int | None = None,
) -> None:
    """Writes a file of the official structure, complete or not at all. The caller keeps other
    processes from the folder.

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
    h5py = optional("h5py", "a file of 3D-Shapes", "shapes3d", DataError)
    if path.exists():
        raise DataError(f"{path} exists: move it away to write it again")
    partial = path.with_suffix(".partial.h5")
    partial.unlink(missing_ok=True)  # of a process that was killed
    shape = (count, *IMAGE_SHAPE)
    needed, free = math.prod(shape) + 2**26, shutil.disk_usage(path.parent).free
    if compression is None and free < needed:
        raise DataError(
            f"{path.parent} has {free / 1e9:.1f} GB free, {path.name} takes {needed / 1e9:.1f}: "
            "make room"
        )
    samples: dict[int, ndarray] = {}
    try:
        with h5py.File(partial, "w") as file:
            if source is not None:
                file.attrs[SOURCE] = source
            file["labels"] = scenes.all_labels()[:count]
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
            if any(not np.array_equal(file["images"][i], image) for i, image in samples.items()):
                raise DataError(
                    f"{path.parent}: what was written is read back differently; nothing is kept"
                )
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _places(path: Path) -> Iterator[Path]:
    """Where a copy may be: beside the file, and in the user's cache folder, if there is one."""
    yield path.with_suffix(".uncompressed.h5")
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]
    yield cache / "sdn" / f"{path.stem}-{key}.uncompressed.h5"


def _writable_place(path: Path) -> Path:
    """The first place that a copy can be written to."""
    for copy in _places(path):
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=copy.parent):
                return copy
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
    raise DataError(
        f"{path} is compressed, and neither its folder nor a cache folder can be written to hold "
        "its images: let XDG_CACHE_HOME name a folder with 6 GB"
    )


def _check_array(
    file: Any, name: str, shape: tuple[int, ...], kind: str, path: Path, again: str
) -> None:
    array = file.get(name)
    if not hasattr(array, "dtype"):
        raise DataError(
            f"{path} has no data set {name!r}, but {', '.join(map(repr, file)) or 'nothing'}; "
            f"{again}"
        )
    if array.shape != shape or kind not in (array.dtype.kind, array.dtype.str[1:]):
        kind = {"u1": "uint8", "f": "float64"}[kind]
        raise DataError(
            f"{path}: {name} is {array.dtype} {list(array.shape)} instead of {kind} {list(shape)}; "
            f"{again}"
        )


def _fault(path: Path, error: Exception, damage: str, again: str) -> str:
    """What is wrong with a file: the system's refusal, if HDF5 tells of one, or else the damage."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if not (found := re.search(r"errno = (\d+)", text)):
        return f"{path} {damage} ({text}); {again}"
    number = int(found[1])
    if "lock" not in text:
        permissions = " by this user: change its permissions" if number in READ_ONLY else ""
        return f"{path} cannot be read{permissions} ({os.strerror(number)})"
    if number in (errno.EAGAIN, errno.EACCES):
        return (
            f"{path} is locked by another process, as while it is written: wait for that one, or "
            "end it"
        )
    return (
        f"{path} cannot be locked ({os.strerror(number)}), as on some network file systems: set "
        "the environment variable HDF5_USE_FILE_LOCKING=FALSE"
    )


def _check(flags: Namespace) -> str:
    with opened(flags.path) as images:
        for _ in decoded(images, flags.path):
            pass
    return f"{flags.path}: {scenes.SCENES} images with the labels of 3D-Shapes"


def _convert(flags: Namespace) -> str:
    from ..sets.shapes3d import Shapes3D  # which imports this module

    return f"{Shapes3D(flags.path).path}: {scenes.SCENES} images to be read at random"


def _render(flags: Namespace) -> str:
    with locked_folder(flags.path.parent, wait=True):
        blocks = shapes3d_rendered.blocks(flags.first)
        write_hdf5(flags.path, blocks, flags.first, flags.compression)
    return f"{flags.path}: {flags.first} images, {flags.path.stat().st_size} bytes"


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(PROGRAM, description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True, metavar="{check,convert,render}")
    for action, meaning in (
        (_check, "look through a file"),
        (_convert, "write the uncompressed copy of a file, if it is not there"),
        (_render, "write our own images, Shapes3DRendered, as such a file"),
    ):
        added = actions.add_parser(action.__name__.removeprefix("_"), help=meaning)
        added.prog = PROGRAM
        added.set_defaults(action=action)
        added.add_argument("path", type=Path, metavar="FILE.h5")
    added.add_argument(
        "--compression", choices=("gzip", "lzf"), help="none: 5.9 GB, read without a copy"
    )
    added.add_argument(
        "--first",
        type=int,
        default=scenes.SCENES,
        help="only so many scenes, to look at; not to be trained on",
    )
    flags = parser.parse_args(arguments)
    if not 1 <= getattr(flags, "first", 1) <= scenes.SCENES:
        parser.error(f"argument --first: {flags.first} is not in 1 ... {scenes.SCENES}")
    with one_line_errors(PROGRAM, DataError, OSError):
        try:
            print(flags.action(flags))
        except KeyboardInterrupt:
            raise DataError("interrupted; nothing half-written is kept") from None


if __name__ == "__main__":
    main()
