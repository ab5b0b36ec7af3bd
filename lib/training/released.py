"""Converting a checkpoint of the authors' release to one from which training goes on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..checkpoint import (
    RELEASED_AVERAGE,
    CheckpointError,
    is_released,
    read_checkpoint,
    write_checkpoint,
)
from ..DensityVAE import DensityVAE
from ..DensityVAE.training import DensityTraining
from ..flags import changed_flags
from ..models import build_model
from ..released import IMAGE_SHAPES, Released, load_weights, our_name, translate


def convert(source: str | Path, target: str | Path) -> list[str]:
    """Writes a released checkpoint as one of this project, from which training can go on.

    Weights, average, counters and, if they are stored for every parameter, the optimizer's moments
    are kept. The target appears as a whole or not at all.

    Returns:
        What was used and what was not, one line for each kind, and how to train on.

    Raises:
        CheckpointError: if the source cannot be read or is not a released checkpoint, or the target
            exists.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already: give another name")
    checkpoint = read_checkpoint(source)
    if not is_released(checkpoint):
        raise CheckpointError(
            f"{source} is not in the authors' format (its state_dict has no {RELEASED_AVERAGE}*)"
        )
    released = translate(checkpoint, source, training=True)
    if released.config.dataset not in IMAGE_SHAPES:
        raise CheckpointError(
            f"{source} is of the data set {released.config.dataset}; known: "
            f"{', '.join(IMAGE_SHAPES)}"
        )
    converted = _training_checkpoint(released, checkpoint, source)
    try:
        write_checkpoint(converted, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from None
    config = released.config
    moments = (
        "kept" if converted["optimizer_states"][0]["state"] else "not in the file: they start anew"
    )
    report = [
        f"{target}: {config.dataset}, epoch {released.epoch}, step {released.step}",
        f"used: {len(released.average)} averaged and {len(released.current)} current tensors",
        f"optimizer moments: {moments}",
        *released.remarks(),
    ]
    if target.name == "last.ckpt":
        name = target.resolve().parent.name
        flags = [*changed_flags(config), "--make_checkpoint", "--use_checkpoint"]
        report.append(
            f"train on with: {shlex.join(['python', 'train.py', '--exp_name', name, *flags])}"
        )
    return report


def _training_checkpoint(
    released: Released, checkpoint: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """What Lightning would have saved at the end of the epoch that the released run had
    finished."""
    config = released.config
    try:
        model = build_model(config, IMAGE_SHAPES[config.dataset][1:])
    except ValueError as error:
        raise CheckpointError(f"{path}: its hyper-parameters cannot be: {error}") from None
    training = DensityTraining(model, config)
    load_weights(training.model, released, path, averaged=False)
    load_weights(training.evaluated_model, released, path)
    training.average.n_averaged.fill_(released.step)
    optimization = training.configure_optimizers()
    optimizer, scheduler = optimization["optimizer"], optimization["lr_scheduler"]["scheduler"]
    rate = config.lrate * config.lrate_decay**released.epoch
    optimizer_state, scheduler_state = optimizer.state_dict(), scheduler.state_dict()
    optimizer_state["param_groups"][0]["lr"] = rate
    optimizer_state["state"] = _moments(training.model, checkpoint)
    scheduler_state |= {
        "last_epoch": released.epoch,
        "_step_count": released.epoch + 1,
        "_last_lr": [rate],
    }

    converted = {
        "epoch": released.epoch,
        "global_step": released.step,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": training.state_dict(),
        "loops": {"fit_loop": _fit_loop(released.epoch, released.step)},
        "optimizer_states": [optimizer_state],
        "lr_schedulers": [scheduler_state],
        "hyper_parameters": config.to_dict(),
        "provenance": {"converted_from": path.name},
    }
    if "native_amp_scaling_state" in checkpoint:  # Lightning still restores it under this name
        converted["native_amp_scaling_state"] = checkpoint["native_amp_scaling_state"]
    return converted


def _fit_loop(epoch: int, step: int) -> dict[str, Any]:
    """The state of Lightning's training loop after `epoch` whole epochs and `step` optimizer
    steps."""
    epochs = dict.fromkeys(("ready", "started", "processed", "completed"), epoch)
    none, steps = dict(ready=0, completed=0), dict(ready=step, completed=step)
    zero_grad = {"total": steps | {"started": step}, "current": none | {"started": 0}}
    return {
        "epoch_progress": {"total": epochs, "current": epochs},
        "epoch_loop.state_dict": {"_batches_that_stepped": step},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": {"total": steps, "current": none}, "zero_grad": zero_grad}
        },
    }


def _moments(model: DensityVAE, checkpoint: Mapping[str, Any]) -> dict[int, dict[str, Tensor]]:
    """Adamax's state for each trainable parameter in order, or nothing if the file's does not fit.

    The release numbers parameters in the order in which its state_dict lists them.
    """
    names = [
        our_name(name)
        for name in checkpoint["state_dict"]
        if not name.startswith("ema.") and not name.endswith(".mask")
    ]
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    moments = {}
    try:
        stored = checkpoint["optimizer_states"][0]["state"]
        for number, (name, parameter) in enumerate(trainable):
            state = stored[names.index(name)]
            moments[number] = {"step": torch.tensor(float(state["step"]))}
            for key in ("exp_avg", "exp_inf"):
                moments[number][key] = state[key].float()
                if state[key].shape != parameter.shape:
                    return {}
    except Exception:  # what is stored there may be anything
        return {}
    return moments
