"""How far long work is: a bar in a terminal, a line every half minute in a log file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

INTERVAL = 30.0  # seconds between lines


def is_terminal(stream: Any) -> bool:
    """Whether somebody watches what is written to a stream; it may be None, or closed."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def progress(loop: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm, with its options. Outside of terminals nothing is written in the first half minute."""
    if not is_terminal(sys.stderr):
        lines = dict(delay=INTERVAL, mininterval=INTERVAL, maxinterval=INTERVAL)
        options = dict(file=_Lines(), ncols=80, **lines) | options
    return tqdm(loop, **options)


class _Lines:
    """A stream to stderr in which what would be drawn over becomes a line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
