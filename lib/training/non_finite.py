"""Steps whose numbers go wrong: they are skipped; a run in which there are many goes back, and at
last it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError, read_checkpoint
from .base import VAETraining
from .checkpoints import Checkpoints
from .processes import all_reduce_max, log_rank_zero
from .resume import STEP_FILE, step_checkpoints

WINDOW = 100  # optimizer steps, of which more than half may not be skipped


class Diverged(Exception):
    """Too many steps with a loss or gradient that is not finite; the message is one line that says
    where."""


class SkipNonFinite(pl.Callback):
    """Skips optimizer steps whose loss or gradient is not finite: neither weights nor moments nor
    average change.

    After `max_skipped` in a row, or more than half of the last 100, the run goes back: weights,
    moments and average become those of the newest checkpoint from before the first of them, and the
    learning rate is multiplied by `rollback_lrate`. Data, noise, β and the count of steps go on, so
    that the same batches do not come again.

    Under float16 the loss scale is too high now and then; such steps are skipped and counted like
    the others.

    Arguments:
        checkpoints: Of this run.
        max_skipped: See above.
        max_rollbacks: How often to go back.
        rollback_lrate: See above.

    Raises:
        Diverged: if there is no checkpoint to go back to, or it went back `max_rollbacks` times
            already.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        max_skipped: int,
        max_rollbacks: int,
        rollback_lrate: float,
    ):
        self.checkpoints = checkpoints
        self.max_skipped, self.max_rollbacks, self.rollback_lrate = (
            max_skipped,
            max_rollbacks,
            rollback_lrate,
        )
        self._recent: list[bool] = []  # whether each of the last steps was skipped
        self._rollbacks = 0
        self._batches: list[tuple[Any, int]] = []
        self._loss_is_finite: Tensor | bool = True

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self._recent, "rollbacks": self._rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent, self._rollbacks = list(state["recent"]), state["rollbacks"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: VAETraining, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: VAETraining, loss: Tensor) -> None:
        self._loss_is_finite = loss.detach().isfinite() & self._loss_is_finite

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: VAETraining, optimizer: Any
    ) -> None:
        parameters = [p for p in pl_module.model.parameters() if p.grad is not None]
        pl_module.grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        (wrong,) = all_reduce_max(trainer, ~(pl_module.grad_norm.isfinite() & self._loss_is_finite))
        self._loss_is_finite = True
        pl_module.skipped = bool(wrong)
        self._recent = [*self._recent[-WINDOW + 1 :], pl_module.skipped]
        if pl_module.skipped:
            for parameter in parameters:
                parameter.grad = None  # an optimizer passes over a parameter without one

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: VAETraining, outputs, batch, batch_idx
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # gradients are still being accumulated
        self._last_step = trainer.global_step
        batches, self._batches = self._batches, []
        if not pl_module.skipped:
            return
        in_a_row = (self._recent[::-1] + [False]).index(False)
        if in_a_row >= self.max_skipped:
            self._go_back(trainer, pl_module, batches, in_a_row, f"{in_a_row} steps in a row")
        elif len(self._recent) == WINDOW and sum(self._recent) > WINDOW // 2:
            since = WINDOW - self._recent.index(True)
            self._go_back(
                trainer,
                pl_module,
                batches,
                since,
                f"{sum(self._recent)} of the last {WINDOW} steps",
            )

    def _go_back(
        self, trainer: pl.Trainer, pl_module: VAETraining, batches: list, since: int, how_many: str
    ) -> None:
        step = trainer.global_step
        with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            where = first_non_finite(
                pl_module, batches, getattr(trainer.precision_plugin, "scaler", None)
            )
        path = self._checkpoint_before(step - since) if self.checkpoints.folder else None
        trouble = f"step {step}: {how_many} had a loss or gradient that is not finite; {where}"
        if path is None:
            raise Diverged(f"{trouble}; there is no checkpoint to go back to")
        if self._rollbacks >= self.max_rollbacks:
            times = "with --max_rollbacks 0"
            if self._rollbacks:
                times = f"after going back {self._rollbacks} times"
            newest = step_checkpoints(self.checkpoints.folder)[0]
            raise Diverged(
                f"{trouble}; stopped {times}. --use_checkpoint goes on from {newest}: with a "
                "smaller --lrate, with --grad_clip or with more --max_rollbacks"
            )
        # Rank 0's choice: another may see a damaged file, or an old list of them.
        state = read_checkpoint(path.with_name(trainer.strategy.broadcast(path.name)))
        pl_module.load_state_dict(state["state_dict"])
        scaler = type(trainer.precision_plugin).__qualname__
        if scaler in state:
            trainer.precision_plugin.load_state_dict(state[scaler])
        trainer.strategy.load_optimizer_state_dict(state)
        pl_module.lrate_factor *= self.rollback_lrate
        pl_module.set_lrate()
        self._rollbacks += 1
        self._recent = []
        self.checkpoints.requested = True
        lrate = pl_module.optimizers().param_groups[0]["lr"]
        log_rank_zero(
            f"note: {trouble}; back to the weights of {path.name}, with the learning rate {lrate:g}"
        )

    def _checkpoint_before(self, step: int) -> Path | None:
        """The newest checkpoint that is not later than `step`, else the oldest; None if there is
        none."""
        paths = step_checkpoints(self.checkpoints.folder)
        later = [path for path in paths if int(STEP_FILE.fullmatch(path.name)[1]) > step]
        for path in [*paths[len(later) :], *reversed(later)]:
            try:
                read_checkpoint(path)
                return path
            except (CheckpointError, OSError) as error:
                log_rank_zero(f"note: {error}; trying another one")
        return None


def first_non_finite(
    pl_module: VAETraining, batches: list[tuple[Any, int]], scaler: Any = None
) -> str:
    """Where the first value that is not finite comes up when batches of a step are computed again,
    in words.

    Layers are named as in `model.named_modules()`; of several ranks, rank 0 says what it finds in
    its own batches.
    """
    model = pl_module.model
    names = {module: name for name, module in model.named_modules()}
    for batch, batch_idx in batches:
        order: list[nn.Module] = []
        wrong: list[nn.Module] = []

        def note_output(
            module: nn.Module, inputs: Any, output: Any, order: list = order, wrong: list = wrong
        ) -> None:
            order.append(module)
            if not all_finite(output):
                wrong.append(module)

        hooks = [module.register_forward_hook(note_output) for module in names]
        try:
            pl_module.seed_step(batch_idx)
            loss = pl_module.loss(pl_module.compute(batch))
            if not wrong and loss.isfinite():
                (scaler.scale(loss) if scaler else loss).backward()
        finally:
            for hook in hooks:
                hook.remove()
        if wrong:
            return f"the first is in the output of {names[wrong[0]] or 'the model'}"
        if not loss.isfinite():
            return "the first is the loss, with every layer's output finite"
        for module in reversed(order):  # backward
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.grad is not None and not parameter.grad.isfinite().all():
                    return f"the first is in the gradient of {names[module]}.{name}"
    return "none is found when the step is computed again by itself"


def all_finite(values: Any) -> bool:
    """Whether all tensors in nested tuples, lists and dictionaries are finite."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(values.isfinite().all())
    if isinstance(values, dict):
        values = list(values.values())
    return all(map(all_finite, values)) if isinstance(values, list | tuple) else True
