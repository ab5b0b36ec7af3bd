"""Every use that training makes of what Lightning keeps to itself: private names, attributes and
formats that its documentation does not promise.

Tried with Lightning 2.6.6 and torch 2.14.1. `tests/training/test_lightning_internals.py` has one
test for each function, which says what has changed if a later version no longer fits.
"""

from __future__ import annotations

import subprocess
from typing import Any

import pytorch_lightning as pl


def keep_own_signal_handlers(trainer: pl.Trainer) -> None:
    """Stops the Trainer from registering signal handlers of its own when it begins to fit.

    Lightning's handler of SIGTERM calls a collective operation from inside the handler, where the
    other processes do not expect it, and leaves without a checkpoint of the current step.
    `StopSignals` only notes the signal. No option of the Trainer turns the registration off, and no
    hook runs between it and the barrier that follows it.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None


def take_over_processes(trainer: pl.Trainer) -> list[subprocess.Popen]:
    """The processes of this machine that Lightning started for other ranks since the last call,
    which it watches no longer.

    There are none until the Trainer begins to fit, and never any where torchrun or SLURM starts the
    processes. Lightning looks every five seconds whether one of its list has died, and then kills
    the main process without a word; its own list is emptied, so that `watch_ranks` can say what has
    happened.
    """
    listed = getattr(trainer.strategy.launcher, "procs", [])
    processes = list(listed)
    del listed[: len(processes)]
    return processes


def validate_after_batch(trainer: pl.Trainer, batch: int) -> None:
    """Makes the Trainer validate in each epoch after its first `batch` batches.

    The public `val_check_interval` is read only when the loaders are made, which is before a
    resumed run knows that it ended during a validation.
    """
    trainer.val_check_batch = batch


def set_loop_progress(
    loops: dict[str, Any], *, epoch: int, batches: int, in_validation: bool
) -> None:
    """Writes a position into the state of Lightning's loops, as a checkpoint stores it.

    Lightning's own counters depend on the hook in which a checkpoint is written, and what it makes
    of them when it resumes depends on the number of processes. These counters are unambiguous: the
    epoch has begun if any of its batches is done, that many batches are done, and a validation that
    is still to come was interrupted at its first batch.

    Arguments:
        loops: The entry "loops" of a checkpoint; changed in place.
        epoch: Number of complete epochs.
        batches: Number of complete batches of the next epoch.
        in_validation: Whether the validation after these batches is still to come.
    """
    fit = loops["fit_loop"]
    begun = epoch + (batches > 0 or in_validation)
    epochs = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    validation = dict.fromkeys(("ready", "started"), int(in_validation))
    validation |= dict.fromkeys(("processed", "completed"), 0)
    for count in ("total", "current"):
        fit["epoch_progress"][count] |= epochs
        fit["epoch_loop.batch_progress"][count] |= dict.fromkeys(epochs, batches)
        fit["epoch_loop.val_loop.batch_progress"][count] |= validation
    fit["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False


def completed_epochs(loops: dict[str, Any]) -> int:
    """The number of complete epochs that the state of Lightning's loops tells.

    Needed for checkpoints of earlier versions of this project, which hold no position of ours.
    """
    return loops["fit_loop"]["epoch_progress"]["current"]["processed"]
