"""Checkpoints of a run: when they are written, and which are kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from ..checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from ..files import link_or_copy
from .base import VAETraining
from .processes import all_reduce_max, log_rank_zero
from .resume import STEP_FILE, step_checkpoints
from .signals import EXIT_STATUS, Stopped, StopSignals

MONITORED = "val/neg_elbo"


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints whole or not at all, and reads them as evaluate.py does.

    `failure` is why the last one could not be written, or None.
    """

    failure: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        try:
            write_checkpoint(checkpoint, path)
            self.failure = None
        except OSError as error:
            self.failure = error

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        return read_checkpoint(path)


class Checkpoints(Checkpoint):
    """Writes checkpoints: at the end of each epoch, inside epochs by steps and by time, and when a
    signal ends a run.

    step_STEP.ckpt are the last `keep`; last.ckpt is another name of the newest, best.ckpt one of
    that with the least validation -ELBO. One that cannot be written is reported; training goes on,
    and those before it stay.

    `io` is for the Trainer's `plugins`.

    Arguments:
        folder: Where they go; None: no checkpoints, only the end of a run on a signal.
        signals: Of the processes of this run.
        every_n_steps, every_minutes: Between two checkpoints inside an epoch; 0: none by this
            measure.
        keep: How many of the last.
        best: Whether to keep the best.
        resumed_from: The checkpoint that the run goes on from.
    """

    def __init__(
        self,
        folder: Path | None,
        signals: StopSignals,
        *,
        every_n_steps: int = 0,
        every_minutes: float = 0,
        keep: int = 2,
        best: bool = True,
        resumed_from: Path | None = None,
    ):
        self.folder, self.signals = folder, signals
        self.every_n_steps, self.every_seconds = every_n_steps, every_minutes * 60
        self.keep, self.best = keep, best
        self.requested = False
        self.io = WholeCheckpointIO()
        self.resumed_from = resumed_from
        self._best_score, self._best_step = float("inf"), -1
        self._is_best = False

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self._best_score, "best_step": self._best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best_score, self._best_step = state["best_score"], state["best_step"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: VAETraining, checkpoint: dict[str, Any]
    ) -> None:
        for name, state in checkpoint.get("callbacks", {}).items():  # of earlier versions
            monitored = f"'{MONITORED}'" in name or "'val/bpd'" in name
            if monitored and (score := state.get("best_model_score")) is not None:
                self._best_score = float(score)

    def setup(self, trainer: pl.Trainer, pl_module: VAETraining, stage: str) -> None:
        self.signals.training = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        # The run may have been killed after it wrote this checkpoint, and before it gave it its
        # other names.
        if (
            self.folder
            and self.resumed_from
            and trainer.is_global_zero
            and STEP_FILE.fullmatch(self.resumed_from.name)
        ):
            self._give_names(self.resumed_from)

    def on_train_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        here = (trainer.global_step, pl_module.position.epoch, pl_module.position.images)
        if all_reduce_max(trainer, *here) != [
            -least for least in all_reduce_max(trainer, *(-number for number in here))
        ]:
            raise CheckpointError(
                "the processes of this run went on from different checkpoints: is the folder "
                "shared?"
            )
        self._last_step = self._saved_step = trainer.global_step
        self._saved_time = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: VAETraining, outputs, batch, batch_idx
    ) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        stop, save = all_reduce_max(trainer, self.signals.received, self._due(trainer))
        if stop:
            self._stop(trainer, stop)
        if save:
            self.save(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: VAETraining, *args: Any
    ) -> None:
        (stop,) = all_reduce_max(trainer, self.signals.received)
        if stop:
            self._stop(trainer, stop)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        score = trainer.callback_metrics.get(MONITORED)
        if self.best and not trainer.sanity_checking and isinstance(score, Tensor):
            self._is_best = bool(score < self._best_score)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self.save(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        by_steps = (
            self.every_n_steps and trainer.global_step - self._saved_step >= self.every_n_steps
        )
        by_time = self.every_seconds and time.monotonic() - self._saved_time >= self.every_seconds
        return bool(self.requested or by_steps or (by_time and trainer.is_global_zero))

    def save(self, trainer: pl.Trainer) -> bool:
        """Writes a checkpoint of this point of the run, on all ranks together; whether that went
        well (on rank 0)."""
        self.requested = False
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        if self.folder is None:
            return False
        best_before = self._best_score, self._best_step
        if self._is_best:
            self._best_score, self._best_step = (
                trainer.callback_metrics[MONITORED].item(),
                trainer.global_step,
            )
        path = self.folder / f"step_{trainer.global_step:07d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero and not self.io.failure:
            try:
                self._give_names(path)
            except OSError as error:
                self.io.failure = error
        if self.io.failure:
            self._best_score, self._best_step = best_before
            log_rank_zero(
                f"note: no checkpoint of step {trainer.global_step}: {self.io.failure}; those "
                "before it are whole"
            )
        self._is_best = False
        return self.io.failure is None

    def _give_names(self, path: Path) -> None:
        """Makes a checkpoint the last and, if it is, the best one; removes older ones, and newer
        ones, as damaged."""
        step = int(STEP_FILE.fullmatch(path.name)[1])
        link_or_copy(path, self.folder / "last.ckpt")
        if step == self._best_step:
            link_or_copy(path, self.folder / "best.ckpt")
        newer = [
            other
            for other in step_checkpoints(self.folder)
            if int(STEP_FILE.fullmatch(other.name)[1]) > step
        ]
        for other in [*newer, *step_checkpoints(self.folder)[len(newer) + self.keep :]]:
            other.unlink()

    def _stop(self, trainer: pl.Trainer, signum: int) -> None:
        """Ends the run on all ranks, with a checkpoint."""
        self.signals.heeded = True
        step, status = trainer.global_step, EXIT_STATUS[signum]
        if trainer.sanity_checking or self.folder is None:
            raise Stopped(f"stopped at step {step}, without a checkpoint", status)
        if not self.save(trainer):
            raise Stopped(
                f"stopped at step {step}, but its checkpoint could not be written", status
            )
        raise Stopped(f"stopped after step {step}; --use_checkpoint goes on from there", status)
