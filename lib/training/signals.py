"""Signals that ask a run to stop, and the exit statuses of `train.py`."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import Any

FAILED = 1  # exit status after a fault of the run
PREEMPTED = 75  # "try again later", EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # after Ctrl-C, as of any program
EXIT_STATUS = {signal.SIGINT: INTERRUPTED} | {
    getattr(signal, name): PREEMPTED
    for name in ("SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)  # Windows has the first alone
}


class Stopped(Exception):
    """A signal asked a run to stop and it did, with a checkpoint if it keeps any.

    `status` is the exit status of the process.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class StopSignals:
    """A context in which signals that ask a run to stop are noted in `received`, where the run
    looks when it can.

    Before `training` is set, and at the second Ctrl-C, they end the process at once. A SIGHUP that
    the process was started to ignore, by `nohup`, stays ignored.
    """

    def __init__(self) -> None:
        self.received = 0
        self.training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                signum: signal.signal(signum, self._note)
                for signum in EXIT_STATUS
                if signum.name != "SIGHUP" or signal.getsignal(signum) is not signal.SIG_IGN
            }
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: object) -> None:
        before, self.received = self.received, signum
        if not self.training:
            exit_at_once(EXIT_STATUS[signum])
        if signum == signal.SIGINT and before == signal.SIGINT:
            write_line("stopped at once; what came after the last checkpoint is lost")
            exit_at_once(INTERRUPTED)
        if not before:
            again = "; press Ctrl-C again to stop at once" if signum == signal.SIGINT else ""
            write_line(f"\n{signal.Signals(signum).name}: stopping after this step{again}")


def write_line(message: str) -> None:
    """Writes a line to stderr, safely inside a signal handler and where nobody reads it."""
    with suppress(OSError):
        os.write(2, f"{message}\n".encode())


def exit_at_once(status: int) -> None:
    """Ends the process and its children, loader workers among them, without waiting for
    anything."""
    for child in _children(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os._exit(status)


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:  # not Linux: loader workers notice by themselves, within seconds
        return []
