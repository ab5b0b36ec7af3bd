"""Checkpoints of the authors' release (pytorch-lightning 0.9): reading them, and converting them to
this project's.

    python -m lib.released checkpoints/CelebAHQ256.ckpt checkpoints/celeb/last.ckpt

writes a checkpoint from which `train.py --use_checkpoint` goes on. `evaluate.py` reads released
checkpoints directly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import RELEASED_AVERAGE, CheckpointError
from .cli import OneLineParser, one_line_errors
from .config import ConfigError, TrainConfig, flag_type
from .DensityVAE import DensityVAE
from .utils import MaskedConv2d

IMAGE_SHAPES = {"CIFAR10": (3, 32, 32), "ImageNet32": (3, 32, 32), "CelebAHQ256": (3, 256, 256)}

# Settings of the architecture that are checked by the tensors' names and shapes, or have one legal
# value, and so may be missing from a file. The others may not. The release leaves a sweep's first
# line as it is, and has no blocks for ablations.
OPTIONAL = {
    "border": "keep",
    "block": "sdn",
    "highway": "auto",
    "dml_tails": "approximate",
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
    names = [*TrainConfig().architecture(), "dataset"]
    needed = {name: stored[name] for name in names if stored.get(name) is not None}
    values = OPTIONAL | {name: _plain(value, name, path) for name, value in needed.items()}
    if lacking := sorted(set(names) - values.keys()):
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
    own_masks = {
        f"{name}.mask": module.mask.expand_as(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, MaskedConv2d)
    }
    for name, mask in released.masks.items():
        if name not in own_masks or not torch.equal(mask.float(), own_masks[name]):
            raise CheckpointError(f"{path}: {name} is not the raster-order mask of this model")
    model.load_state_dict(released.average if averaged else released.current)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        "python -m lib.released", description="Converts a released checkpoint to this project's."
    )
    parser.add_argument("source", metavar="IN", help="checkpoint of the authors' release")
    parser.add_argument(
        "target", metavar="OUT", help="where to write; checkpoints/NAME/last.ckpt can be trained on"
    )
    flags = parser.parse_args(arguments)
    from .training.released import convert  # needs Lightning, which reading does not

    with one_line_errors(parser.prog, CheckpointError):
        print(*convert(flags.source, flags.target), sep="\n")


if __name__ == "__main__":
    main()
