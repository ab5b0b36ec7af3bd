"""Whether what a checkpoint holds beside the weights is what a run writes: checked before anything
of it is used, so that no half of it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from .resume import Position

if TYPE_CHECKING:
    from .base import VAETraining

LARGEST_COUNT = 2**53
# Of the state of Lightning's training loop; a converted checkpoint of the authors has no more.
NEEDED = (
    "epoch_progress",
    "epoch_loop.state_dict",
    "epoch_loop.automatic_optimization.optim_progress",
)


def check_stored_state(
    checkpoint: dict[str, Any], training: VAETraining, trainer: pl.Trainer
) -> None:
    """Compares a checkpoint with what this run would write: the same names, the same types, counts
    that can be, finite numbers, and moments of the parameters' shapes.

    Entries that earlier versions of this project, of Lightning or of torch did not write may be
    missing, and what they wrote beside may be there.

    Raises:
        CheckpointError: if they do not fit; the message names the entry.
    """
    for name, tensor in checkpoint["state_dict"].items():
        _check(tensor, training.state_dict()[name], f"state_dict[{name!r}]")
    _check(checkpoint["loops"], {"fit_loop": {}}, "loops")
    stored = checkpoint["loops"]["fit_loop"]
    loop = trainer.fit_loop.state_dict().items()
    expected = {key: value for key, value in loop if key in NEEDED or key in stored}
    _check(stored, expected, "loops['fit_loop']")
    progress = stored["epoch_loop.automatic_optimization.optim_progress"]
    if progress["optimizer"]["step"]["total"]["completed"] != checkpoint["global_step"]:
        _refuse("global_step", "is not the number of steps in loops")
    callbacks = {each.state_key: each.state_dict() for each in trainer.callbacks}
    for name, state in checkpoint.get("callbacks", {}).items():
        if not isinstance(name, str) or not isinstance(state, dict):
            _refuse("callbacks", "is no state of callbacks")
        _check(state, callbacks.get(name, {}), f"callbacks[{name!r}]")
    if "position" in checkpoint:
        _check(checkpoint["position"], vars(Position()), "position", exactly=True)
    _check(checkpoint.get("since_validation", {}), {}, "since_validation")
    for name, value in checkpoint.get("since_validation", {}).items():
        _check(value, 0.0, f"since_validation[{name!r}]")
    if not 0 < checkpoint.get("lrate_factor", 1.0) <= 1:
        _refuse("lrate_factor", "is not above 0 and at most 1")
    _check(checkpoint.get("best_validation", 0.0), 0.0, "best_validation", infinite=True)
    _check(checkpoint.get("validations_since", 0), 0, "validations_since")
    _check_optimizer(checkpoint, training)


def _check_optimizer(checkpoint: dict[str, Any], training: VAETraining) -> None:
    """The one optimizer and the one scheduler, against new ones."""
    new = training.configure_optimizers()
    optimizer, scheduler = new["optimizer"], new["lr_scheduler"]["scheduler"]
    expected = optimizer.state_dict()["param_groups"]
    for name in ("optimizer_states", "lr_schedulers"):
        if len(checkpoint[name]) != 1:
            _refuse(name, f"holds {len(checkpoint[name])} entries, not one")
    stored, name = checkpoint["optimizer_states"][0], "optimizer_states[0]"
    _check(stored, {"state": {}, "param_groups": []}, name)
    if len(stored["param_groups"]) != 1:
        _refuse(name, "is of another number of parameter groups")
    group = stored["param_groups"][0]
    needed = {key: expected[0][key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
    _check(group, needed, f"{name}['param_groups'][0]")
    optional = {key: value for key, value in expected[0].items() if key in group}
    _check(group, optional, f"{name}['param_groups'][0]")
    if list(group["params"]) != list(expected[0]["params"]):
        _refuse(name, "is of other parameters")
    parameters = optimizer.param_groups[0]["params"]
    for index, moments in stored["state"].items():
        if type(index) is not int or index not in range(len(parameters)):
            _refuse(name, f"holds moments of a parameter {index!r:.40}, which there is not")
        like = torch.empty_like(parameters[index], device="meta")
        of_adamax = {"step": torch.zeros(()), "exp_avg": like, "exp_inf": like}
        _check(moments, of_adamax, f"{name}['state'][{index}]")
    skipped = checkpoint.get("callbacks", {}).get("SkipNonFinite", {}).get("recent", [])
    if checkpoint["global_step"] and not stored["state"] and not (skipped and all(skipped)):
        _refuse(name, f"holds no moments after {checkpoint['global_step']} steps")
    schedule = checkpoint["lr_schedulers"][0]
    like = scheduler.state_dict()
    _check(
        schedule,
        {key: like[key] for key in ("gamma", "base_lrs", "last_epoch")},
        "lr_schedulers[0]",
    )
    _check(schedule, {key: like[key] for key in schedule if key in like}, "lr_schedulers[0]")
    for key in schedule:  # all of them become attributes
        if not isinstance(key, str) or key not in like and hasattr(type(scheduler), key):
            _refuse("lr_schedulers[0]", f"holds {key!r:.40}, which is no setting")


def _check(
    stored: Any, like: Any, name: str, *, exactly: bool = False, infinite: bool = False
) -> None:
    """Compares nested values in kind; a list's items with the first of the other list.

    Arguments:
        exactly: Whether further names in a dictionary are refused.
        infinite: Whether numbers may be so.
    """
    if isinstance(like, dict):
        if not isinstance(stored, dict):
            _refuse(name, f"is {stored!r:.60}")
        if exactly and (more := stored.keys() - like.keys()):
            _refuse(name, f"holds {sorted(map(repr, more))[0]:.40}")
        for key, value in like.items():
            if key not in stored:
                _refuse(name, f"lacks {key}")
            _check(stored[key], value, f"{name}[{key!r}]", infinite=infinite or key == "best_score")
    elif isinstance(like, list | tuple):
        if (
            not isinstance(stored, list | tuple)
            or isinstance(like, tuple)
            and len(stored) != len(like)
        ):
            _refuse(name, f"is {stored!r:.60}")
        for place, item in enumerate(stored if like else ()):
            _check(item, like[0], f"{name}[{place}]")
    elif isinstance(like, Tensor):
        if not isinstance(stored, Tensor) or _form(stored) != _form(like):
            _refuse(name, "is no tensor of that shape and type")
        if stored.is_floating_point() and not stored.isfinite().all():
            _refuse(name, "is not finite: did training diverge?")
    elif isinstance(like, bool):
        if type(stored) is not bool:
            _refuse(name, f"is {stored!r:.60}")
    elif isinstance(like, int):
        if type(stored) is not int or stored not in range(-1, LARGEST_COUNT):
            _refuse(name, f"is {stored!r:.60}")
    elif isinstance(like, float) and (
        type(stored) not in (int, float)
        or math.isnan(stored)
        or not infinite
        and not abs(stored) < LARGEST_COUNT
    ):
        _refuse(name, f"is {stored!r:.60}")


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.is_floating_point(), tensor.layout, tensor.is_quantized


def _refuse(name: str, why: str) -> None:
    why = why.encode(errors="backslashreplace").decode()
    raise CheckpointError(f"the checkpoint cannot be trained on: its {name} {why}")
