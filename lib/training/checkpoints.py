"""Checkpoints of a run: when they are written, which are kept, and which one a run goes on from."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from ..checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from ..files import second_name
from .base import VAETraining
from .position import Position
from .processes import STOPPING, Stopped, StopSignals, agree, say

MONITORED = "val/neg_elbo"
STEP_FILE = re.compile(r"step_(\d{7,})\.ckpt")


def step_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that are kept under the number of their step, the newest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("step_*.ckpt")
        if (match := STEP_FILE.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a run's folder that is not damaged, and its content; None if there
    are none at all.

    Reports those that are damaged.

    Raises:
        CheckpointError: if all of them are.
    """
    candidates = step_checkpoints(folder)
    last = folder / "last.ckpt"
    if last.exists() and not any(last.samefile(path) for path in candidates):
        candidates.append(last)  # written by an earlier version, or put there to train on
    damage = []
    for path in candidates:
        try:
            return path, read_checkpoint(path)
        except (CheckpointError, OSError) as error:
            damage.append(error)
            if path != candidates[-1]:
                say(f"note: {error}; trying the one before it")
    if damage:
        before = f"; {len(damage) - 1} more are damaged, too" if len(damage) > 1 else ""
        raise CheckpointError(f"{damage[0]}{before}")
    return None


def check_resumable(checkpoint: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError if a checkpoint lacks what a run needs to go on, beside the
    weights."""
    needed = {"epoch": int, "global_step": int, "pytorch-lightning_version": str, "loops": dict}
    needed |= {"optimizer_states": list, "lr_schedulers": list}
    optional = {
        "callbacks": dict,
        "position": dict,
        "since_validation": dict,
        "lrate_factor": float,
    }
    optional |= {"best_validation": float, "validations_since": int}
    wrong = [name for name, kind in needed.items() if not isinstance(checkpoint.get(name), kind)]
    wrong += [
        name
        for name, kind in optional.items()
        if not isinstance(checkpoint.get(name, kind()), kind)
    ]
    if wrong:
        raise CheckpointError(f"{path} cannot be trained on: {', '.join(wrong)} missing or damaged")


class RunProgress(pl.Callback):
    """Keeps `VAETraining.position`, and ends a run with a last validation: after a number of
    optimizer steps, or at the Trainer's epoch limit.

    Lightning's own `max_steps` would end it without one, and miscounts epochs when such a run
    resumes. Stands before all callbacks that write or log.

    Arguments:
        steps: The limit.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self._last_step = trainer.global_step
        self._validate_at_the_end(trainer)
        if pl_module.position.validate:  # the run ended in it
            trainer.check_val_every_n_epoch = 1
            trainer.val_check_batch = pl_module.position.batches(pl_module.global_batch)
        else:
            trainer.should_stop = trainer.global_step >= self.steps

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self._validate_at_the_end(trainer)

    def _validate_at_the_end(self, trainer: pl.Trainer) -> None:
        self._check_val_every_n_epoch = trainer.check_val_every_n_epoch
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: VAETraining, outputs, batch, batch_idx
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # gradients are still being accumulated
        self._last_step = trainer.global_step
        if trainer.global_step >= self.steps:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True
        epoch, ends = trainer.current_epoch, batch_idx + 1 == trainer.num_training_batches
        validate = (ends or trainer.should_stop) and (
            epoch + 1
        ) % trainer.check_val_every_n_epoch == 0
        if ends and not validate:
            pl_module.position = Position(epoch + 1)
        else:
            pl_module.position = Position(epoch, (batch_idx + 1) * pl_module.global_batch, validate)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        if trainer.sanity_checking:
            return
        position, batches = pl_module.position, trainer.num_training_batches
        ends = position.batches(pl_module.global_batch) >= batches
        pl_module.position = (
            Position(position.epoch + 1) if ends else Position(position.epoch, position.images)
        )
        trainer.val_check_batch = batches
        trainer.check_val_every_n_epoch = self._check_val_every_n_epoch
        trainer.should_stop |= trainer.global_step >= self.steps


class WholeCheckpointIO(TorchCheckpointIO):
    """How Lightning writes checkpoints: whole, with a hash, or not at all; `failure` says why not,
    the last time.

    It reads them as evaluate.py does.
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
    ):
        self.folder, self.signals = folder, signals
        self.every_n_steps, self.every_seconds = every_n_steps, every_minutes * 60
        self.keep, self.best = keep, best
        self.requested = False
        self.io = WholeCheckpointIO()
        self.resumed_from: Path | None = None
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
        if agree(trainer, *here) != [
            -least for least in agree(trainer, *(-number for number in here))
        ]:
            raise CheckpointError(
                "the processes of this run went on from different checkpoints: is the folder shared?"
            )
        self._last_step = self._saved_step = trainer.global_step
        self._saved_time = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: VAETraining, outputs, batch, batch_idx
    ) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        stop, save = agree(trainer, self.signals.received, self._due(trainer))
        if stop:
            self._stop(trainer, stop)
        if save:
            self.save(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: VAETraining, *args: Any
    ) -> None:
        (stop,) = agree(trainer, self.signals.received)
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
            say(
                f"note: no checkpoint of step {trainer.global_step}: {self.io.failure}; those before it are whole"
            )
        self._is_best = False
        return self.io.failure is None

    def _give_names(self, path: Path) -> None:
        """Makes a checkpoint the last and, if it is, the best one; removes older ones, and newer
        ones, as damaged."""
        step = int(STEP_FILE.fullmatch(path.name)[1])
        second_name(path, self.folder / "last.ckpt")
        if step == self._best_step:
            second_name(path, self.folder / "best.ckpt")
        newer = [
            other
            for other in step_checkpoints(self.folder)
            if int(STEP_FILE.fullmatch(other.name)[1]) > step
        ]
        for other in [*newer, *step_checkpoints(self.folder)[len(newer) + self.keep :]]:
            other.unlink()

    def _stop(self, trainer: pl.Trainer, signum: int) -> None:
        """Ends the run on all ranks, with a checkpoint."""
        step, status = trainer.global_step, STOPPING[signum]
        if trainer.sanity_checking or self.folder is None:
            raise Stopped(f"stopped at step {step}, without a checkpoint", status)
        if not self.save(trainer):
            raise Stopped(
                f"stopped at step {step}, but its checkpoint could not be written", status
            )
        raise Stopped(f"stopped after step {step}; --use_checkpoint goes on from there", status)
