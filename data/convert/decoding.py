"""Entries of a source to images of one shape, in several processes, in order, a few at a time."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from lib.picture_files import FORMATS, NoPictureError, PictureError, fit_picture, read_picture
from lib.processes import end_with_parent

from ..errors import DataError
from .sources import Entry

CHUNK = 16  # entries that a process gets at once
AHEAD = 3  # chunks for each process that are waited for
DIGEST = 16  # bytes


@dataclass(frozen=True)
class Shape:
    """What every image is to be: `height` x `width` with 1 or 3 `channels`, fitted by `fit`."""

    height: int
    width: int
    channels: int
    fit: str


@dataclass
class Decoded:
    """An entry's images, or why there are none.

    images: Levels of each, H x W x C bytes. digest: Of the image, or of the whole picture if it was
    cut into patches. is_picture: Whether it is one, or pretends to be by its name. error: What is
    wrong with it. remarks: What was done to it.
    """

    name: str
    split: str
    images: list[bytes] = field(default_factory=list)
    digest: bytes = b""
    is_picture: bool = True
    error: str = ""
    remarks: list[str] = field(default_factory=list)


def decode(entry: Entry, shape: Shape) -> Decoded:
    """The images of an entry; never raises for what is wrong with it."""
    decoded = Decoded(entry.name, entry.split)
    try:
        if isinstance(entry.content, str):
            raise PictureError(entry.content)
        if isinstance(entry.content, np.ndarray):
            pixels = _with_channels(entry.content, shape.channels)
        else:
            pixels, decoded.remarks = read_picture(entry.content, shape.channels)
        images = fit_picture(pixels, shape.height, shape.width, shape.fit)
        if (
            shape.fit != "patches"
            and min(pixels.shape[0] / shape.height, pixels.shape[1] / shape.width) < 1
        ):
            decoded.remarks.append("smaller than the images: enlarged")
        decoded.images = [image.tobytes() for image in images]
        whole = pixels.tobytes() if shape.fit == "patches" else decoded.images[0]
        decoded.digest = hashlib.sha256(whole).digest()[:DIGEST]
    except NoPictureError as error:
        decoded.error, decoded.is_picture = str(error), _named_as_picture(entry.name)
    except PictureError as error:
        decoded.error = str(error)
        decoded.is_picture = str(error) != "it is empty" or _named_as_picture(entry.name)
    return decoded


def decode_all(entries: Iterable[Entry], shape: Shape, processes: int) -> Iterator[Decoded]:
    """The entries' images, in the entries' order. Memory holds a few chunks for each process.

    Arguments:
        processes: How many decode; 0: this one does.

    Raises:
        DataError: if a process was killed.
    """
    if not processes:
        yield from (decode(entry, shape) for entry in entries)
        return
    Image.init()  # once, before the processes are there
    waiting: deque[Any] = deque()
    with ProcessPoolExecutor(processes, initializer=_begin) as pool:
        try:
            entries = iter(entries)
            while chunk := list(itertools.islice(entries, CHUNK)):
                waiting.append(pool.submit(_decode_chunk, chunk, shape))
                if len(waiting) >= AHEAD * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a decoding process was killed, maybe for want of memory: use fewer --num_workers; "
                "what is done is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _decode_chunk(entries: list[Entry], shape: Shape) -> list[Decoded]:
    return [decode(entry, shape) for entry in entries]


def _begin() -> None:
    """Prepares a decoding process: Ctrl-C is the main process's to handle, whose end is its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _with_channels(levels: np.ndarray, channels: int) -> np.ndarray:
    if levels.shape[2] == channels:
        return levels
    if channels == 3:
        return levels.repeat(3, axis=2)
    return np.asarray(Image.fromarray(levels).convert("L"))[..., None]


def _named_as_picture(name: str) -> bool:
    """Whether the name ends as one of a picture."""
    suffix = PurePosixPath(name).suffix.lower()
    return Image.registered_extensions().get(suffix) in (*FORMATS, "TGA", "EPS")
