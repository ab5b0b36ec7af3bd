"""How the entry scripts talk: streams that never fail, and bad input told in one line on stderr
with exit status 2."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

NO_TEXT = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)  # control characters, bytes that are no UTF-8

MORE_FILES = "a higher `ulimit -n` allows more, fewer --num_workers need less"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any and the text does not name them itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help or "" if told else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a wrong flag as one line, without the usage, and takes no
    abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            if NO_TEXT.search(argument):
                self.error(f"the argument {ascii(argument)} is not plain text")
            if argument.startswith("--") and argument.endswith(
                "=--"
            ):  # argparse would make it an empty list
                self.error(f"argument {argument.removesuffix('=--')}: expected one argument")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


@contextmanager
def one_line_errors(program: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds, whose messages are meant for the user, into one line and
    status 2."""
    try:
        yield
    except kinds as error:
        # From a loader's worker process the message comes as the last line of a traceback.
        message = str(error).strip().splitlines()[-1]
        for kind in kinds:
            message = re.sub(rf"^[\w.]*\b{kind.__name__}: ", "", message)
        if os.strerror(errno.EMFILE) in message:
            message += f"; {MORE_FILES}"
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


class UnfailingStream:
    """A text stream whose reader may go away, or whose disk may be full: what cannot be written is
    lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_streams_unfailing() -> None:
    """What this process prints from now on costs no result, whatever becomes of it.

    Streams that were closed before the process started lead nowhere, and so do their descriptors,
    which files would otherwise get: what is written to descriptor 2 would be in a checkpoint.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
    sys.stdout = UnfailingStream(sys.stdout or open(os.devnull, "w"))  # noqa: SIM115
    sys.stderr = UnfailingStream(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
