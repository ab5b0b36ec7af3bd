"""Runs entry scripts in copies of a process that has imported what they need: a start takes
milliseconds, not seconds.

The process is the standard library's fork server. Only installed packages are imported before; the
repository's files are read anew.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

PACKAGES = ["lmdb", "matplotlib.pyplot", "pytorch_lightning", "torchvision"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, *PACKAGES])


def run(
    command: list[str], cwd: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """As subprocess.run with captured text; `command` is a script's path or "-m" and a module, and
    arguments."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=become, args=(command, cwd, environment, files))
        process.start()
        process.join(timeout)
        expired = process.is_alive()
        if expired:
            process.kill()
            process.join()
        output, errors = (file.read_text() for file in files)
    if expired:
        raise subprocess.TimeoutExpired(command, timeout, output, errors)
    return subprocess.CompletedProcess(command, process.exitcode, output, errors)


def become(command: list[str], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    """Runs the script or module of a command as the main program of this process."""
    for number, path in enumerate([os.devnull, *files]):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(path, flags), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    numpy.random.seed()
    if command[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(command[0]).parent)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
