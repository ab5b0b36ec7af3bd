"""Files that are there as a whole or not at all, and folders that one process has for itself."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

PARTIAL = ".partial"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives the path of a new file to write, which takes the place of `path` at the end and is
    removed on failure.

    The folder is made if it is missing. The file is on the disk, not only in the system's memory,
    before it takes the place, so that a machine that loses power keeps one of the two.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody can have put a link at.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        with suppress(OSError):  # some file systems cannot
            sync(path.parent)
    except OSError as error:  # a full disk's has no name, others have the partial file's
        if error.strerror and error.filename in (None, partial, str(partial)):
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        OSError: if it cannot be read, or is a pipe or the like, which would never end.
        ValueError: if it is no JSON, is nested too deep, or holds NaN or an infinity.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file")

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def set_aside(path: Path) -> Path:
    """Gives a damaged file another name, which is free, and returns that."""
    number = 1
    while os.path.lexists(other := path.with_name(f"{path.name}.damaged{number}")):
        number += 1
    return path.rename(other)


def remove_partial_files(folder: Path, names: str = "*") -> None:
    """Removes what processes that were killed inside `whole_file` left of files of such names;
    nobody may be writing one of them."""
    for rest in folder.glob(f"{names}.*{PARTIAL}"):
        rest.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(path: Path, name: Path) -> None:
    """Gives a file another name, in place of what had it; a copy where the file system knows no
    hard links."""
    with whole_file(name) as partial:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)


@contextmanager
def exclusive_folder(folder: Path, message: str) -> Iterator[None]:
    """Holds a folder for this process, until the end of the block or of the process; leaves none
    that stays empty.

    Raises:
        BlockingIOError: with the message, if another process holds it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                # Its holder removed it a moment ago, and another may hold a new one.
                raise BlockingIOError
        except BlockingIOError:
            raise BlockingIOError(message) from None
        # Otherwise loader workers would hold it after this process's death.
        os.register_at_fork(after_in_child=lock.close)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for made in new:
                with suppress(OSError):  # not empty
                    made.rmdir()
