"""One worker for each device: in this process if it is the only one, else each in a process of its
own.

There is no collective communication that could time out during a job of hours: the parent hands out
one task at a time to whichever worker is free, and it alone receives what they find.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Compute = Callable[[Any], Iterable[Any]]
Start = Callable[[str], tuple[Any, Compute]]

STOP_SECONDS = 5.0  # that a worker has to end before it is killed


class WorkerError(Exception):
    """A worker process that ended without a word; the message is one line."""


def open_workers(start: Start, devices: Sequence[str]) -> Here | Processes:
    """Starts a worker for each device; a context manager that ends them.

    Its `reports` are what the workers said of themselves, in the order of the devices. Its
    `run(tasks)` gives all that the workers yield for the tasks, as it comes; of one task in order.

    Arguments:
        start: Called with the device's name in the worker; gives the worker's report and a function
            that yields what it finds for a task. With several devices it, tasks, the report and
            what is found must be picklable.
        devices: One name for each worker; a name may occur more than once.

    Raises (from `run` as well):
        WorkerError: if a worker process dies.
        Exception: what a worker raised.
    """
    return Here(start, devices[0]) if len(devices) == 1 else Processes(start, devices)


class Here:
    """The only worker, in this process. See `open_workers`."""

    def __init__(self, start: Start, device: str):
        report, self._compute = start(device)
        self.reports = [report]

    def run(self, tasks: Iterable[Any]) -> Iterator[Any]:
        for task in tasks:
            yield from self._compute(task)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *exception) -> None:
        pass


class Processes:
    """A process for each device. See `open_workers`.

    Workers end with the parent, whatever ends it. Each has a pipe of its own, so that one that is
    killed while it speaks cannot leave a lock behind on which the others would wait.
    """

    def __init__(self, start: Start, devices: Sequence[str]):
        self._devices: dict[Connection, str] = {}
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        context = multiprocessing.get_context("spawn")
        try:
            with _interrupt_ignored():  # inherited: Ctrl-C is the parent's to handle
                for device in devices:
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=_serve, args=(theirs, start, device), daemon=True
                    )
                    process.start()
                    theirs.close()
                    self._devices[ours], self._processes[ours] = device, process
            self.reports = [self._receive(worker)[1] for worker in self._processes]
        except BaseException:
            self._stop()
            raise

    def run(self, tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = iter(tasks)
        busy = [worker for worker in self._processes if self._hand_next(worker, tasks)]
        while busy:
            for worker in wait(busy):
                found, value = self._receive(worker)
                if found:
                    yield value
                elif not self._hand_next(worker, tasks):
                    busy.remove(worker)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def _hand_next(self, worker: Connection, tasks: Iterator[Any]) -> bool:
        """Whether there was a task left to hand to the worker."""
        for task in tasks:
            try:
                worker.send(task)
            except OSError:
                raise self._death(worker) from None
            return True
        return False

    def _receive(self, worker: Connection) -> tuple[bool, Any]:
        """(whether this is something found rather than the end of a task, the value)."""
        try:
            kind, value = worker.recv()
        except (EOFError, OSError):
            raise self._death(worker) from None
        if kind == "error":
            error, text = value
            raise error from RuntimeError(f"in the worker for {self._devices[worker]}:\n{text}")
        return kind == "found", value

    def _death(self, worker: Connection) -> WorkerError:
        process = self._processes[worker]
        process.join(STOP_SECONDS)
        status = process.exitcode
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            how += (
                ", perhaps because the machine ran out of memory"
                if -status == signal.SIGKILL
                else ""
            )
        else:
            how = f"ended with exit status {status}"
        return WorkerError(
            f"the worker for {self._devices[worker]} {how}; what was finished is kept: run again"
        )

    def _stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for worker, process in self._processes.items():
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            worker.close()


def _serve(parent: Connection, start: Start, device: str) -> None:
    """What a worker process does: reports, then tasks until the parent ends it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        report, compute = start(device)
        parent.send(("report", report))
        while True:
            for value in compute(parent.recv()):
                parent.send(("found", value))
            parent.send(("end of task", None))
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent is gone, and so is this worker in a moment
            parent.send(("error", (_portable(error), traceback.format_exc())))


def _end_with_parent() -> None:
    """Waits for the parent's end, even one that leaves it no time for a word, and ends this
    process."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error itself if it can travel between processes, else its kind and message."""
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return WorkerError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """Signal handlers can be changed in the main thread only; elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
