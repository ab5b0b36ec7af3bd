"""Streams that were closed, or that nobody reads, cost no result."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
from helpers import REPOSITORY

from lib.cli import UnfailingStream, one_line_errors
from lib.training.faults import known_fault

CODE = """
import os, sys
from lib.cli import make_streams_unfailing
make_streams_unfailing()
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
assert os.open(os.devnull, os.O_RDONLY) > 2, "a file has the descriptor of a stream"
subprocess = __import__("subprocess")
done = subprocess.run([sys.executable, "-c", "import sys; sys.exit(sys.stderr is None)"])
sys.exit(done.returncode)
"""


@pytest.mark.parametrize("shut", ["1>&-", "2>&-", "0<&- 1>&- 2>&-", "1>/dev/full 2>/dev/full"])
def test_streams_that_are_closed_or_full(shut):
    command = ["sh", "-c", f'exec "$@" {shut}', "sh", sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=60)
    assert done.returncode == 0, done


def test_too_few_descriptors_are_told_with_what_helps(capsys):
    with pytest.raises(SystemExit), one_line_errors("train.py", OSError):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert "Too many open files; a higher `ulimit -n` allows more" in capsys.readouterr().err
    assert "ulimit -n" in known_fault(RuntimeError("Too many open files. Communication with"))


def test_what_cannot_be_written_is_lost():
    class Full(io.StringIO):
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise OSError

    stream = UnfailingStream(Full())
    print("lost", file=stream, flush=True)
    assert stream.encoding == "utf-8"
