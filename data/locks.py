"""Folders into which one process writes at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lib.files import LOCK, locked

from .errors import DataError


@contextmanager
def locked_folder(folder: Path, *, wait: bool) -> Iterator[None]:
    """Makes a folder if it is missing and keeps other processes from the same block for it.

    Arguments:
        wait: Whether to wait, and say so, while another process holds the folder.

    Raises:
        DataError: if another process holds it and there is no waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    message = f"another process is writing into {folder}; let it finish"
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK, message))
        except BlockingIOError as error:
            if not wait:
                raise DataError(str(error)) from None
            print(f"waiting for another process that writes into {folder}", file=sys.stderr)
            held.enter_context(locked(folder / LOCK, message, wait=True))
        yield
