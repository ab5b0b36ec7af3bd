"""Signals that ask a run to stop, and the exit statuses of `train.py`."""

from __future__ import annotations

import os
import signal
import socket
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
        self.heeded = False  # whether the processes of the run have agreed to stop
        self._before: dict[int, Any] = {}
        self._arrived = 0
        self._pipe: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                signum: signal.signal(signum, self._note)
                for signum in EXIT_STATUS
                if signum.name != "SIGHUP" or signal.getsignal(signum) is not signal.SIG_IGN
            }
            self._pipe = socket.socketpair()
            for end in self._pipe:
                end.setblocking(False)
            signal.set_wakeup_fd(self._pipe[1].fileno(), warn_on_full_buffer=False)
            if hasattr(os, "register_at_fork"):
                # Otherwise a signal to a loader worker would be in the pipe, too.
                os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        return self

    @property
    def arrived(self) -> int:
        """The signal that asked the run to stop, or 0; for one thread beside the main one.

        Unlike `received` it does not wait for the main thread, which notes nothing as long as it is
        inside of a library: there it may wait for another process without end.
        """
        if self._pipe:
            with suppress(OSError):  # nothing has come
                for signum in self._pipe[0].recv(4096):
                    if signum in EXIT_STATUS:
                        self._arrived = signum
        return self.received or self._arrived

    def __exit__(self, *exception: object) -> None:
        if self._pipe:
            signal.set_wakeup_fd(-1)
            for end in self._pipe:
                end.close()
            self._pipe = None
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
    """Ends the process and all that it started, loader workers among them, without waiting for
    anything."""
    kill_descendants()
    os._exit(status)


def kill_descendants() -> None:
    """Kills the processes that this one started, and those that these did."""
    for pid in _descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:  # not Linux: loader workers notice by themselves, within seconds
        return []
    return [*children, *(further for child in children for further in _descendants(child))]
