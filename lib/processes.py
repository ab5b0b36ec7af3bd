"""Processes that this package's programs start as workers."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Makes this worker process end when the one that started it does, even if that was killed and
    had no time for a word."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end_with_parent").start()
