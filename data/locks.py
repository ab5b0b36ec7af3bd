"""Folders into which one process writes at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError


@contextlib.contextmanager
def locked_folder(folder: Path, *, wait: bool) -> Iterator[None]:
    """Makes a folder if it is missing and keeps other processes from the same block for it.

    On a file system that cannot lock, nobody is kept away.

    Arguments:
        wait: Whether to wait, and say so, while another process holds the folder.

    Raises:
        DataError: if another process holds it and there is no waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise DataError(
                        f"another process is writing into {folder}; let it finish"
                    ) from None
                print(f"waiting for another process that writes into {folder}", file=sys.stderr)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
