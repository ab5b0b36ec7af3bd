"""Files that are there as a whole or not at all, and what one process has for itself."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

PARTIAL = ".partial"
LOCK = ".lock"  # of a folder
HELD = ".held"  # behind the name of a lock where the file system knows none
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


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
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path, names: str = "*") -> None:
    """Removes what processes that were killed inside `whole_file` left of files of such names;
    nobody may be writing one of them."""
    for rest in folder.glob(f"{names}.*{PARTIAL}"):
        rest.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    # Windows waits only for files that are open for writing, and never for folders.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
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
def locked(path: Path, message: str, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from the same block for the same path, until the end of the block or of
    the process.

    Children that are forked meanwhile do not hold the lock. Where the file system has no locks, a
    file beside the path names the process that holds it; one that has died on this machine is
    found out, on another machine it is not.

    Arguments:
        path: Of a file with no other use, in a folder that exists. It is made, and removed at the
            end.
        message: What to tell where another process holds the lock.
        wait: Whether to wait for that process.

    Raises:
        BlockingIOError: with the message, if another process holds the lock and there is no
            waiting.
    """
    lock = _acquired(path, message, -1 if wait else 0)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes the file of a lock itself
            path.unlink()  # while it is held: whoever waits for it makes another file
        lock.release()


def _acquired(path: Path, message: str, timeout: float) -> BaseFileLock:
    try:
        lock = FileLock(path, timeout, fallback_to_soft=False)
        lock.acquire()
        return lock
    except Timeout:
        raise BlockingIOError(message) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    path = path.with_name(path.name + HELD)
    try:
        lock = SoftFileLock(path, timeout)
        lock.acquire()
        return lock
    except Timeout:
        raise BlockingIOError(
            f"{message} ({path} names that process: remove the file if it has ended)"
        ) from None


@contextmanager
def exclusive_folder(folder: Path, message: str) -> Iterator[None]:
    """Holds a folder for this process, until the end of the block or of the process; leaves none
    that stays empty.

    Raises:
        BlockingIOError: with the message, if another process holds it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK, message):
            yield
    finally:
        for made in new:
            with suppress(OSError):  # not empty
                made.rmdir()
