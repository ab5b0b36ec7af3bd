"""Which backends compute the sweeps of a run: chosen once, and the same in all processes."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from ..sweeps import adopt, shared_choices
from .base import VAETraining


class SweepChoices(pl.Callback):
    """Before the first step the first process computes a forward pass, in which the backends of the
    sweeps are checked and measured on the shapes at hand; the others take its choices, so that all
    round alike. On a CPU there is nothing to choose.

    A pass of its own: inside a compiled model, or in a step that other processes wait for, would be
    no time to measure.
    """

    def __init__(self) -> None:
        self._chosen = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: VAETraining, batch: Any, batch_idx: int
    ) -> None:
        if self._chosen or pl_module.device.type == "cpu":
            return
        self._chosen = True
        model, (images, _) = pl_module.model, batch
        if trainer.is_global_zero:
            with (
                torch.no_grad(),
                trainer.precision_plugin.forward_context(),
                torch.compiler.set_stance("force_eager"),
            ):
                model(model.observation.encode(images))
        if trainer.world_size > 1:
            adopt(trainer.strategy.broadcast(shared_choices()), pl_module.device)
