"""The processes of a run: what they agree on, how they are asked to stop, and what happens when one
of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data._utils import signal_handling

INTERRUPTED = 130  # exit status after Ctrl-C, as of any program
PREEMPTED = 75  # after SIGTERM or SIGUSR1: "try again later", EX_TEMPFAIL of sysexits.h
FAILED = 1  # after a fault that is not the user's
AGAIN = "--use_checkpoint goes on from the last checkpoint"
STOPPING = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}


@rank_zero_only
def say(message: str) -> None:
    """One line on stderr, from the first process only."""
    print(message, file=sys.stderr, flush=True)


class Stopped(Exception):
    """A run was asked to stop by a signal and did, with a checkpoint if it keeps any; `status` is
    the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def agree(trainer: pl.Trainer, *flags: int | torch.Tensor) -> list[int]:
    """The largest value of each flag over all ranks, the same on every rank; waits for the
    device."""
    if trainer.world_size == 1:
        return [int(flag) for flag in flags]
    device = trainer.strategy.root_device
    values = torch.stack([torch.as_tensor(flag, device=device).long() for flag in flags])
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values.tolist()


class StopSignals:
    """A context in which signals that ask a run to stop are noted in `received`, where the run
    looks when it can.

    Before `training` begins, and at the second Ctrl-C, they end the process at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self.training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in STOPPING}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: object) -> None:
        before, self.received = self.received, signum
        if not self.training:
            end_at_once(STOPPING[signum])
        if signum == signal.SIGINT and before == signal.SIGINT:
            self._tell("stopped at once; what came after the last checkpoint is lost")
            end_at_once(INTERRUPTED)
        if not before:
            again = "; press Ctrl-C again to stop at once" if signum == signal.SIGINT else ""
            self._tell(f"\n{signal.Signals(signum).name}: stopping after this step{again}")

    @staticmethod
    def _tell(message: str) -> None:
        with suppress(OSError):  # nobody reads
            os.write(2, f"{message}\n".encode())


class UnfailingStream:
    """A text stream whose reader may go away, or whose disk may be full: what cannot be written is
    lost."""

    def __init__(self, stream: Any):
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


@contextmanager
def watched(trainer: pl.Trainer) -> Iterator[None]:
    """Ends this process when one that Lightning started, or that started this one, dies, instead of
    waiting for it.

    torchrun and SLURM watch the processes that they start themselves.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher) or trainer.world_size == 1:
        yield
        return
    ended = threading.Event()
    parent = os.getppid()
    is_child = "LOCAL_RANK" in os.environ and not trainer.is_global_zero

    def watch() -> None:
        while not ended.wait(1):
            for rank, process in enumerate(launcher.procs, start=1):
                if process.poll() and not ended.wait(
                    2
                ):  # two seconds for this rank to say the same itself
                    how = f"status {process.returncode}"
                    if process.returncode < 0:
                        how = signal.Signals(-process.returncode).name
                    die(
                        f"process {rank} of this machine died ({how})",
                        max(process.returncode, FAILED),
                    )
            if is_child and os.getppid() != parent and not ended.wait(2):
                die("the main process died", FAILED)

    def die(reason: str, status: int) -> None:
        program = os.path.basename(sys.argv[0])
        with suppress(OSError):
            print(
                f"{program}: error: {reason}, so this run ends; {AGAIN}",
                file=sys.stderr,
                flush=True,
            )
        for process in launcher.procs:
            process.kill()
        end_at_once(status)

    threading.Thread(target=watch, daemon=True, name="watch").start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def watched_loaders() -> Iterator[None]:
    """Ends this process when one of its loader workers dies.

    By itself, torch would raise an exception wherever the main thread happens to be, be it within a
    checkpoint's writing, where it counts as a full disk, or in the interpreter's last steps.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def check(signum: int, frame: object) -> None:
        try:
            signal_handling._error_if_any_worker_fails()
        except RuntimeError as error:
            with suppress(OSError):
                os.write(
                    2,
                    f"\n{os.path.basename(sys.argv[0])}: error: {worker_died(error)}; {AGAIN}\n".encode(),
                )
            end_at_once(FAILED)

    signal_handling._set_SIGCHLD_handler()  # which torch does once, so that it does not replace the next
    signal.signal(signal.SIGCHLD, check)
    try:
        yield
    except (ConnectionError, EOFError):
        time.sleep(2)  # the end of a worker's connection comes before the signal of its death
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # One that is stuck (its queue's lock died with another worker) would be waited for without
        # end.
        for worker in multiprocessing.active_children():
            worker.kill()


class Patience:
    """Ends this process, with one line, when something takes longer than a limit; a context
    manager.

    For waits that cannot be interrupted otherwise. Between `with patience.waiting(): ...` nothing
    is watched.

    Arguments:
        limit: Seconds.
        reason: What is wrong then.
    """

    def __init__(self, limit: float, reason: str):
        self.limit, self.reason = limit, reason
        self._since: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> Patience:
        threading.Thread(target=self._watch, daemon=True, name="patience").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self.limit / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self.limit:
                with suppress(OSError):
                    line = f"\n{os.path.basename(sys.argv[0])}: error: {self.reason}; {AGAIN}\n"
                    os.write(2, line.encode())
                end_at_once(FAILED)


def worker_died(error: Exception) -> str:
    """What to tell of it."""
    last = str(error).strip().splitlines()[-1]
    return (
        f"a loader process died, often for lack of memory ({last}); fewer --num_workers need less"
    )


def end_at_once(status: int) -> None:
    """Ends the process and its children (loader workers, too) without waiting for anything."""
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
