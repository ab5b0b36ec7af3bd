"""Runs entry scripts in copies of a process that has imported what they need: a start takes
milliseconds, not seconds.

`python tests/forked.py` is that process, one for each test process. It reads requests, lines of
JSON, and for each forks itself; the copy becomes the script: its working directory, environment,
arguments and outputs, and its exit status. Only installed packages are imported before; the
repository's files are read anew.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy


def run(
    command: list[str], cwd: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """As subprocess.run with captured text; `command` is a script's path or "-m" and a module, and
    arguments."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        paths = list(map(str, files))
        request = {"command": command, "cwd": str(cwd), "environment": environment, "files": paths}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        pid = int(server.stdout.readline())
        expired = not select.select([server.stdout], [], [], timeout)[0]
        if expired:
            os.kill(pid, signal.SIGKILL)
        status = int(server.stdout.readline())
        output, errors = (file.read_text() for file in files)
    if expired:
        raise subprocess.TimeoutExpired(command, timeout, output, errors)
    return subprocess.CompletedProcess(command, status, output, errors)


@functools.cache
def _server() -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a process with threads cannot be copied
    command = [sys.executable, __file__]
    return subprocess.Popen(
        command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def serve() -> list[str] | None:
    """Forks for each request; returns the command in the copy, and None in the server when there
    are no more."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            for number, path in enumerate([os.devnull, *request["files"]]):
                flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
                os.dup2(os.open(path, flags), number)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["environment"])
            random.seed()
            numpy.random.seed()
            return request["command"]
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def become(command: list[str]) -> None:
    """Runs the script or module of a command as the main program."""
    if command[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(command[0]).parent)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    for package in ("lmdb", "matplotlib.pyplot", "pytorch_lightning", "torchvision"):
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    gc.freeze()  # or collections would touch, and so copy, all memory
    if command := serve():
        status = 1
        try:
            become(command)
            status = 0
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
            if ending.code is not None and not isinstance(ending.code, int):
                print(ending.code, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:  # without taking all modules apart, which is for the server to do
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
