"""Checkpoints of the authors' release (pytorch-lightning 0.9): reading them, and converting them to
this project's.

    python -m lib.released checkpoints/CelebAHQ256.ckpt checkpoints/celeb/last.ckpt

writes a checkpoint from which `train.py --use_checkpoint` goes on. `evaluate.py` reads released
checkpoints directly.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import (
    RELEASED_AVERAGE,
    CheckpointError,
    is_released,
    read_checkpoint,
    write_checkpoint,
)
from .cli import OneLineParser, one_line_errors
from .config import ARCHITECTURE, ConfigError, TrainConfig, flag_default, flag_type
from .DensityVAE import DensityVAE
from .models import build_model
from .utils import MaskedConv2d

IMAGE_SHAPES = {"CIFAR10": (3, 32, 32), "ImageNet32": (3, 32, 32), "CelebAHQ256": (3, 256, 256)}

# Settings of the architecture that are checked by the tensors' names and shapes, or have one legal
# value, and so may be missing from a file. The others may not.
OPTIONAL = {
    "downsample_first": False,
    "post_model": "IAF",
    "prior_model": "IsoGaussian",
    "obs_model": "DML",
    "sdn_min_scale": 0,
    "sdn_nfeat_diff": 0,
}
# What else a run's configuration takes over; the rest (paths, GPUs, loaders) belongs to the
# authors' machines.
TRAINING = ("batch", "batch_val", "random_seed", "lrate", "lrate_decay", "free_bits", "ema_coef")
TRAINING += ("accumulate_grad_batches", "amp", "iters", "figsize", "sampling_temperature")

# Names in the authors' two generations of files, and here.
RENAMED = (
    (r"\.pre_cnn\.", ".project_in_stage."),
    (r"\.sdn_update_network\.", ".sdn_correction_stage."),
    (r"\.post_cnn\.", ".project_out_stage."),
    (r"^first_layer\.0\.", "first_layer."),
    (r"^last_layer\.2\.", "last_layer.1."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)


@dataclass
class Released:
    """A released checkpoint under this project's names.

    config: The run's settings, with `border="keep"`.
    average, current: The averaged weights, which evaluation uses, and the trained ones, by
        parameter name.
    masks: The masks of masked convolutions by buffer name; only compared, since the model makes its
        own.
    ignored: Stored tensors and settings that are deliberately not used, by stored name, with the
        reason.
    epoch, step: Finished epochs and optimizer steps.
    """

    config: TrainConfig
    average: dict[str, Tensor]
    current: dict[str, Tensor]
    masks: dict[str, Tensor]
    ignored: dict[str, str]
    epoch: int
    step: int

    def remarks(self) -> list[str]:
        """One line for each reason for which stored tensors are ignored."""
        return [
            f"ignored: {', '.join(name for name, why in self.ignored.items() if why == reason)} "
            f"({reason})"
            for reason in dict.fromkeys(self.ignored.values())
        ]


def translate(
    checkpoint: Mapping[str, Any], path: str | Path, *, training: bool = False
) -> Released:
    """Sorts a released checkpoint's tensors and rebuilds its configuration.

    Arguments:
        checkpoint: What `read_checkpoint` returned.
        path: For messages.
        training: Whether the settings of training must be usable, too; evaluation does without
            those that are not.

    Raises:
        CheckpointError: if a setting is missing or out of range, a tensor is none or comes under
            two names, or there is no average of the weights.
    """
    average, current, masks, ignored = {}, {}, {}, {}

    def keep(tensors: dict[str, Tensor], stored: str, tensor: Tensor) -> None:
        name = our_name(stored)
        if name in tensors:
            raise CheckpointError(f"{path}: {name} is stored twice, under names of two generations")
        tensors[name] = tensor

    for stored, tensor in checkpoint["state_dict"].items():
        if not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise CheckpointError(
                f"{path}: {stored} is a {type(tensor).__name__}, not a dense tensor of real numbers"
            )
        if tensor.is_floating_point():
            tensor = tensor.float()
        if stored.startswith(RELEASED_AVERAGE):
            keep(average, stored.removeprefix(RELEASED_AVERAGE).replace("^", "."), tensor)
        elif stored.startswith("ema.") and tensor.numel() == 1:
            ignored[stored] = "a counter of the average"
        elif stored.endswith(".mask"):
            keep(masks, stored, tensor)
            ignored[stored] = "the model makes its own masks; compared"
        else:
            keep(current, stored, tensor)
    if not average:
        raise CheckpointError(
            f"{path} has no averaged weights ({RELEASED_AVERAGE}*), which evaluation needs"
        )
    config, unusable = rebuild_config(checkpoint["hyper_parameters"], path, training=training)
    ignored |= unusable
    if config.ema_coef == 0:
        average = dict(current)
        ignored["ema.*"] = "with ema_coef 0 the average is the current weights"
    epoch, step = (_count(checkpoint.get(name, 0), name, path) for name in ("epoch", "global_step"))
    return Released(config, average, current, masks, ignored, epoch, step)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its numbers in it, one after another."""
    there = tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_nested
    return there and not tensor.is_quantized and not tensor.is_complex()


def our_name(name: str) -> str:
    """The name in this project of a parameter or buffer of the authors' program, of either
    generation."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def rebuild_config(
    stored: Mapping[str, Any], path: str | Path, *, training: bool
) -> tuple[TrainConfig, dict[str, str]]:
    """The run's configuration from the stored hyper-parameters, and those left out, with the
    reason.

    Arguments:
        training: Whether a setting of training that cannot be is an error, rather than left out.

    Raises:
        CheckpointError: if one is missing that cannot be told from the tensors, or it has a value
            that cannot be.
    """
    architecture = [
        f.name for f in dataclasses.fields(TrainConfig) if f.metadata["group"] == ARCHITECTURE
    ]
    needed = [name for name in (*architecture, "dataset") if stored.get(name) is not None]
    # The release leaves a sweep's first line as it is, and has no blocks for ablations.
    values = (
        {"border": "keep", "block": "sdn", "highway": "auto", "dml_tails": "approximate"}
        | OPTIONAL
        | {name: _plain(stored[name], name, path) for name in needed}
    )
    lacking = sorted({*architecture, "dataset"} - values.keys())
    if lacking:
        raise CheckpointError(f"{path}: its hyper-parameters lack {', '.join(lacking)}")
    if values["obs_model"] == "DL":
        raise CheckpointError(
            f"{path} has the observation model DL, whose data are k / (2^nbits - 1) - 0.5 in the "
            "authors' program and k / 2^nbits - 0.5 in this one (DEVIATIONS.md): it would see "
            "other images than it was trained on"
        )
    config, left_out = _checked(values, path), {}
    for name in [name for name in TRAINING if stored.get(name) is not None]:
        try:
            config = _checked(values | {name: _plain(stored[name], name, path)}, path)
            values[name] = getattr(config, name)
        except CheckpointError:
            if training:
                raise
            left_out[name] = "a setting of training that cannot be"
    return config, left_out


def _checked(values: dict[str, Any], path: str | Path) -> TrainConfig:
    try:
        config = TrainConfig(**values)
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{path}: its hyper-parameters cannot be: {error}") from None
    return config


def _count(value: Any, name: str, path: str | Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise CheckpointError(f"{path}: its {name} cannot be {value!r}")
    return int(value)


def _plain(value: Any, name: str, path: str | Path) -> Any:
    """A stored value, which may be a numpy scalar or a number in a string, in its flag's type."""
    kind, is_list = flag_type(name)

    def convert_one(item: Any) -> Any:
        converted = kind(item)
        fraction = kind is int and isinstance(item, float) and item != converted
        if fraction or (kind is bool and str(item) != str(converted)):
            raise ValueError  # half a layer, or the text "no"
        return converted

    try:
        if isinstance(value, torch.Tensor):
            raise TypeError  # a setting is a plain value, or a list of them
        return [convert_one(item) for item in value] if is_list else convert_one(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        shown = " ".join(ascii(value).split())[:60]
        raise CheckpointError(f"{path}: its hyper-parameter {name} cannot be {shown}") from None


def load_weights(
    model: DensityVAE, released: Released, path: str | Path, *, averaged: bool = True
) -> None:
    """Loads the averaged weights, or the current ones, into a model and checks every tensor of both
    by name.

    A current tensor that is neither averaged nor in the model goes to those that are ignored.

    Raises:
        CheckpointError: naming the tensor that is missing or misshapen, the average without a
            place, or the mask that is another one.
    """
    expected = model.state_dict()
    for where, weights in (
        ("the averaged weights", released.average),
        ("the weights", released.current),
    ):
        for name, tensor in expected.items():
            if name not in weights:
                raise CheckpointError(f"{path}: {where} lack {name}")
            if weights[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{path}: in {where} {name} is {list(weights[name].shape)}, its "
                    f"hyper-parameters make it {list(tensor.shape)}"
                )
    if unknown := sorted(released.average.keys() - expected.keys()):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{path}: the averaged weights hold {unknown[0]}{more}, which its "
            "hyper-parameters have no place for"
        )
    for name in sorted(released.current.keys() - expected.keys()):
        del released.current[name]
        released.ignored[name] = "neither averaged nor a parameter of the model"
    convolutions = {
        f"{name}.mask": m for name, m in model.named_modules() if isinstance(m, MaskedConv2d)
    }
    for name, mask in released.masks.items():
        shape = convolutions[name].weight.shape if name in convolutions else None
        if shape != mask.shape or not torch.equal(
            mask, convolutions[name].mask.to(mask.dtype).expand(shape)
        ):
            raise CheckpointError(f"{path}: {name} is not the raster-order mask of this model")
    model.load_state_dict(released.average if averaged else released.current)


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
        command = [
            "python",
            "train.py",
            "--exp_name",
            target.resolve().parent.name,
            *resume_flags(config),
        ]
        report.append(
            f"train on with: {shlex.join([*command, '--make_checkpoint', '--use_checkpoint'])}"
        )
    return report


def _training_checkpoint(
    released: Released, checkpoint: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """What Lightning would have saved at the end of the epoch that the released run had
    finished."""
    import pytorch_lightning as pl

    from .DensityVAE.training import DensityTraining

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


def _moments(model: DensityVAE, checkpoint: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Adamax's state for each trainable parameter in order, or nothing if the file's does not fit.

    The release numbers parameters in the order in which its state_dict lists them.
    """
    try:
        stored = checkpoint["optimizer_states"][0]["state"]
    except (KeyError, IndexError, TypeError):
        return {}
    if not isinstance(stored, dict):
        return {}
    names = [
        name
        for name in checkpoint["state_dict"]
        if not name.startswith("ema.") and not name.endswith(".mask")
    ]
    by_name = {our_name(name): stored.get(number) for number, name in enumerate(names)}
    moments = {}
    for number, (name, parameter) in enumerate(
        (n, p) for n, p in model.named_parameters() if p.requires_grad
    ):
        state = by_name.get(name)
        if not isinstance(state, dict) or not {"step", "exp_avg", "exp_inf"} <= state.keys():
            return {}
        if any(
            getattr(state[key], "shape", None) != parameter.shape for key in ("exp_avg", "exp_inf")
        ):
            return {}
        step = torch.as_tensor(state["step"], dtype=torch.float32)
        moments[number] = {
            "step": step,
            "exp_avg": state["exp_avg"].float(),
            "exp_inf": state["exp_inf"].float(),
        }
    return moments


def resume_flags(config: TrainConfig) -> list[str]:
    """The flags of `train.py` that differ from its defaults."""
    flags = []
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        if value == flag_default(field):
            continue
        flags += [f"--{field.name}"]
        if value is not True:
            flags += [str(item) for item in (value if isinstance(value, list) else [value])]
    return flags


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        "python -m lib.released", description="Converts a released checkpoint to this project's."
    )
    parser.add_argument("source", metavar="IN", help="checkpoint of the authors' release")
    parser.add_argument(
        "target", metavar="OUT", help="where to write; checkpoints/NAME/last.ckpt can be trained on"
    )
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog, CheckpointError):
        print(*convert(flags.source, flags.target), sep="\n")


if __name__ == "__main__":
    main()
