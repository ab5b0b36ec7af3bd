"""The processes of a run: what they agree on, and what happens when one of them dies or hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from ..files import exclusive_folder, remove_partial_files
from .lightning_internals import take_over_processes
from .signals import FAILED, exit_at_once, write_line

MAIN_PROCESS = "SDN_MAIN_PROCESS"
RESUME_HINT = "--use_checkpoint goes on from the last checkpoint"


@rank_zero_only
def log_rank_zero(message: str) -> None:
    """Prints one line to stderr, in the first process only."""
    print(message, file=sys.stderr, flush=True)


def fatal_line(reason: str) -> str:
    """The line with which a run that cannot go on ends."""
    return f"{os.path.basename(sys.argv[0])}: error: {reason}; {RESUME_HINT}"


def all_reduce_max(trainer: pl.Trainer, *values: int | torch.Tensor) -> list[int]:
    """The largest of each value over all ranks, the same on every rank; waits for the device."""
    if trainer.world_size == 1:
        return [int(value) for value in values]
    device = trainer.strategy.root_device
    stacked = torch.stack([torch.as_tensor(value, device=device).long() for value in values])
    torch.distributed.all_reduce(stacked, op=torch.distributed.ReduceOp.MAX)
    return stacked.tolist()


@contextmanager
def exclusive_run_folder(folder: Path) -> Iterator[None]:
    """Keeps a second run out of a run's folder, and removes what killed processes left half-written
    there.

    The first process of a run holds the folder for all of them.

    Raises:
        BlockingIOError: if another run holds it.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    if rank:
        first = rank == "0"
    else:
        first = os.environ.get("LOCAL_RANK", "0") == os.environ.get("NODE_RANK", "0") == "0"
    if not first:
        yield
        return
    message = f"{folder} is in use by another run; wait for it, or give another --exp_name"
    with exclusive_folder(folder, message):
        remove_partial_files(folder)
        yield


@contextmanager
def watch_ranks(trainer: pl.Trainer) -> Iterator[None]:
    """Ends this process when one that Lightning started, or that started this one, dies, instead of
    waiting for it.

    torchrun and SLURM watch the processes that they start themselves.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_child = MAIN_PROCESS in os.environ  # Lightning calls its own children external, too
    if trainer.world_size == 1 or environment is None:
        yield
        return
    if environment.creates_processes_externally and not is_child:
        yield
        return
    ended = threading.Event()
    if not is_child:
        os.environ[MAIN_PROCESS] = str(os.getpid())  # for those that Lightning starts
    main = int(os.environ[MAIN_PROCESS])
    processes: list[subprocess.Popen] = []

    def watch() -> None:
        while not ended.wait(1):
            processes.extend(take_over_processes(trainer))
            for rank, process in enumerate(processes, start=1):
                # Two seconds for this rank to say the same itself.
                if process.poll() and not ended.wait(2):
                    how = f"status {process.returncode}"
                    if process.returncode < 0:
                        how = signal.Signals(-process.returncode).name
                    status = max(process.returncode, FAILED)
                    end(f"process {rank} of this machine died ({how})", status)
            if is_child and os.getppid() != main and not ended.wait(2):
                end("the main process died", FAILED)

    def end(reason: str, status: int) -> None:
        write_line(fatal_line(f"{reason}, so this run ends"))
        for process in processes:
            process.kill()
        exit_at_once(status)

    threading.Thread(target=watch, daemon=True, name="watch_ranks").start()
    try:
        yield
    finally:
        ended.set()
        if not is_child:  # or runs that this process starts would take it for their main one
            os.environ.pop(MAIN_PROCESS, None)


class LoaderWatch(pl.Callback):
    """Ends this process when one of its loader workers dies.

    By itself, torch would raise an exception wherever the main thread happens to be, be it while a
    checkpoint is written, where it counts as a full disk, or in the interpreter's last steps. torch
    installs its handler of SIGCHLD when the first workers start; this one takes its place at the
    first batch. Training is to happen inside `with watch: ...`.
    """

    def __init__(self) -> None:
        self._workers: list[multiprocessing.Process] = []

    def __enter__(self) -> LoaderWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind and issubclass(kind, ConnectionError | EOFError):
            time.sleep(2)  # the end of a worker's connection comes before the signal of its death
        if self._is_told():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # One that is stuck, because its queue's lock died with another worker, would be waited for
        # without end.
        for worker in multiprocessing.active_children():
            worker.kill()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module, batch, batch_idx, *_
    ) -> None:
        if batch_idx == 0:
            self.start()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module, batch, batch_idx) -> None:
        if not self._workers or batch_idx == 0:
            self.start()

    def start(self) -> None:
        """Watches the workers that exist now."""
        self._workers = multiprocessing.active_children()
        if self._workers and self._is_told():
            signal.signal(signal.SIGCHLD, self._check)

    @staticmethod
    def _is_told() -> bool:
        """Whether this thread can be told of the death of a child; on Windows torch alone finds
        out, when it waits for a batch."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        return in_main_thread and hasattr(signal, "SIGCHLD")

    def _check(self, signum: int, frame: object) -> None:
        for worker in self._workers:
            if worker.exitcode:
                how = f"status {worker.exitcode}"
                if worker.exitcode < 0:
                    how = signal.Signals(-worker.exitcode).name
                write_line(f"\n{fatal_line(worker_death(f'worker {worker.pid}: {how}'))}")
                exit_at_once(FAILED)


def worker_death(how: str) -> str:
    """What to tell of a loader worker that died."""
    return f"a loader process died, often for lack of memory ({how}); fewer --num_workers need less"


class Watchdog:
    """A context manager that ends this process, with one line, when something takes longer than a
    limit.

    It is for waits that cannot be interrupted otherwise. Only what happens inside
    `with watchdog.waiting(): ...` is timed.

    Arguments:
        limit: Seconds.
        reason: What is wrong then.
    """

    def __init__(self, limit: float, reason: str):
        self.limit, self.reason = limit, reason
        self._since: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times what happens inside."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self.limit / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self.limit:
                write_line(f"\n{fatal_line(self.reason)}")
                exit_at_once(FAILED)


class UnfailingStream:
    """A text stream whose reader may go away, or whose disk may be full: what cannot be written is
    lost."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
