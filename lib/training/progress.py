"""How far a run is, for those who read its log."""

from __future__ import annotations

import datetime
import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar, TQDMProgressBar

from ..progress import INTERVAL, is_terminal
from .base import VAETraining


def progress_callback() -> ProgressBar:
    """A bar if the output is a terminal, lines if it is a log file or a pipe."""
    return TQDMProgressBar(refresh_rate=10) if is_terminal(sys.stdout) else ProgressLines()


class ProgressLines(ProgressBar):
    """Prints one line every half minute, in the first process only::

        step 1200 of 50000, epoch 3: -ELBO 4.512 bits/dim, 350.2 images/s, 5:12:05 left

    The time that is left counts validations, as far as there have been any.

    Arguments:
        interval: Seconds between lines.
    """

    def __init__(self, interval: float = INTERVAL):
        super().__init__()
        self.interval = interval

    def disable(self) -> None:
        """Stops printing: Lightning calls this in all processes but the first."""
        self.interval = math.inf

    def on_train_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self._begin = self._told = time.monotonic()
        self._first_step, self._images = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: VAETraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        if not self._is_due():
            return
        now, step = time.monotonic(), trainer.global_step
        speed = self._images / max(now - self._told, 1e-9)
        text = f"-ELBO {outputs['neg_elbo'].item():.3f} {pl_module.unit}, {speed:.1f} images/s"
        steps = self._steps(trainer, pl_module)
        if done := step - self._first_step:
            left = (now - self._begin) / done * max(0, steps - step)
            text += f", {datetime.timedelta(seconds=round(left))} left"
        print(f"step {step} of {steps}, epoch {trainer.current_epoch}: {text}", flush=True)
        self._told, self._images = now, 0

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: VAETraining, outputs, batch, batch_idx, *_
    ) -> None:
        if not trainer.sanity_checking and self._is_due():
            of = sum(trainer.num_val_batches)
            print(
                f"step {trainer.global_step}: validation, batch {batch_idx + 1} of {of}", flush=True
            )
            self._told, self._images = time.monotonic(), 0

    def _is_due(self) -> bool:
        return time.monotonic() - self._told >= self.interval

    def _steps(self, trainer: pl.Trainer, pl_module: VAETraining) -> int:
        """The number of the run's last step."""
        config = pl_module.config
        if config.max_epochs < 0:
            return config.iters
        each = -(-self.total_train_batches // config.accumulate_grad_batches)
        return min(config.iters, config.max_epochs * each)
