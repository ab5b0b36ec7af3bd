"""Starting a model from the weights of another one, as far as they fit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import AVERAGE_PREFIX, CheckpointError, is_released, read_checkpoint
from .models import VAE
from .released import translate

SHOWN = 4  # names in a line


def weights_of(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint that an evaluation would take, by parameter name: the average
    where training keeps one.

    Arguments:
        path: A checkpoint of `train.py`, one in the authors' format, or a folder of `publish.py`.

    Raises:
        CheckpointError: if it cannot be read.
    """
    checkpoint = read_checkpoint(path)
    if is_released(checkpoint):
        return translate(checkpoint, path).average
    state = checkpoint["state_dict"]
    averaged = any(name.startswith(AVERAGE_PREFIX) for name in state)
    prefix = AVERAGE_PREFIX if averaged else "model."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and isinstance(tensor, Tensor)
    }


def initialize_from(model: VAE, path: str | Path) -> list[str]:
    """Replaces the model's weights by a checkpoint's, module by module, where all tensors of a
    module have the same names and shapes there.

    The norm and the direction of a normalized weight belong together, which is why a module is
    taken as a whole. Layers of a ladder are counted from the image upwards.

    Returns:
        What was taken and what was left, a line for each.

    Raises:
        CheckpointError: if the checkpoint cannot be read, its weights are not finite, or nothing
            fits.
    """
    stored, own = weights_of(path), model.state_dict()
    modules: dict[str, list[str]] = {}
    for name in own:
        modules.setdefault(_module(name), []).append(name)
    fitting, misshapen, absent = [], [], []
    for module, names in modules.items():
        if all(name in stored and stored[name].shape == own[name].shape for name in names):
            fitting.append(module)
        elif any(name in stored for name in names):
            misshapen.append(module)
        else:
            absent.append(module)
    taken = {name: stored[name] for module in fitting for name in modules[module]}
    if not taken:
        raise CheckpointError(f"--init_from {path}: nothing of it fits the model")
    for name, tensor in taken.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"--init_from {path}: its weights {name} are not finite")
    model.load_state_dict(taken, strict=False)
    numbers, everything = (sum(t.numel() for t in each.values()) for each in (taken, own))
    lines = [
        f"--init_from {path}: {numbers:,} of the model's {everything:,} weights are taken, "
        f"{len(fitting)} of {len(modules)} modules"
    ]
    unused = sorted({_module(name) for name in stored} - modules.keys())
    for what, names in (
        ("new, not in the checkpoint", absent),
        ("new, of another shape there", misshapen),
        ("left, without a place in the model", unused),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {what}: {', '.join(names[:SHOWN])}{more}")
    return lines


def _module(name: str) -> str:
    """The module that a parameter belongs to, with which it is taken or left."""
    normalized, _, rest = name.partition(".parametrizations.")
    return normalized if rest else name.rpartition(".")[0] or name
