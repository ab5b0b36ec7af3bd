"""Opening a checkpoint for evaluation, be it of this project or of the authors' release."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import (
    AVERAGE_PREFIX,
    CheckpointError,
    is_released,
    read_checkpoint,
    stored_config,
)
from ..config import ConfigError, TrainConfig
from ..models import VAE, build_model
from ..released import load_weights, translate


@dataclass
class LoadedModel:
    """A model for evaluation and where it is from.

    model: With the weights to evaluate, in evaluation mode, on its device.
    config: The run's configuration.
    step: Optimizer steps of the run.
    remarks: What of a file in the authors' format is not used, a line for each reason; empty for a
        file of this project.
    fingerprint: Of weights and architecture, 12 hexadecimal digits: results with another one are
        another model's.
    """

    model: VAE
    config: TrainConfig
    step: int
    remarks: list[str]
    fingerprint: str


def choose_device(name: str) -> torch.device:
    """The device of `--device`; raises ConfigError if this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = f"--device must be auto, cpu, cuda, cuda:N or mps; got {name}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(wrong) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(wrong)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {name}: this machine has no GPU of Apple's")
    return device


def find_checkpoint(name: str | None, path: str | None, folder: Path) -> tuple[Path, str]:
    """The checkpoint's path, and the name under which its results are kept.

    Arguments:
        name: Of a file NAME.ckpt or an experiment in `folder`, if there is no `path`.
        path: Of a checkpoint.
        folder: Where checkpoints are.

    Raises:
        CheckpointError: if there is none of that name, or the name leads out of the folder.
    """
    if path:
        found = Path(path)
        name = found.resolve().parent.name if found.stem in ("best", "last") else found.stem
        return found, _name_inside(name or "checkpoint")
    _name_inside(name)
    candidates = [
        folder / f"{name}.ckpt",
        folder / f"{name}/best.ckpt",
        folder / f"{name}/last.ckpt",
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate, name
    there = sorted(
        {p.stem for p in folder.glob("*.ckpt")}
        | {p.parent.name for p in folder.glob("*/last.ckpt")}
    )
    known = ", ".join(there) or "none"
    raise CheckpointError(
        f"--model {name}: none of {', '.join(map(str, candidates))} exists; known: {known}"
    )


def _name_inside(name: str) -> str:
    """The name of a folder of results, if it leads to one inside `figs/`."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or Path(name) == Path():
        raise CheckpointError(f"a model's name must be that of a folder inside figs/; got {name!r}")
    return name


def load_model(
    path: str | Path,
    image_shapes: Mapping[str, tuple[int, int, int]],
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """A run's model with its averaged weights, or the last ones where training keeps no average.

    From then on cuDNN computes in full precision and the same way every time.

    Arguments:
        path: Checkpoint written by `train.py`, one in the authors' format, or a folder of
            `publish.py`.
        image_shapes: (C, H, W) of the images of each data set by its name; of another data set the
            configuration has it.
        backend: Of the sweeps, see `lib.nn.SDNLayer`.
        device: Where the model goes.

    Raises:
        CheckpointError: if the file cannot be read or its tensors do not fit its configuration.
    """
    checkpoint = read_checkpoint(path)
    released = translate(checkpoint, path) if is_released(checkpoint) else None
    config = released.config if released else stored_config(checkpoint, path)
    shape = image_shapes.get(config.dataset)
    if config.image_size:
        shape = (config.channels or 3, config.image_size[0], config.image_size[-1])
    if not shape:
        raise CheckpointError(
            f"{path} is of the data set {config.dataset}; known are {', '.join(image_shapes)}"
        )
    try:
        model = build_model(replace(config, backend=backend), shape[1:], shape[0])
    except ValueError as error:
        raise CheckpointError(f"{path}: its configuration cannot be: {error}") from None
    if released:
        load_weights(model, released, path)
        step = released.step
        remarks = [
            f"ignored: {len(released.current)} current weights (evaluation uses their average)"
        ]
        remarks += released.remarks()
    else:
        state = checkpoint["state_dict"]
        prefix = AVERAGE_PREFIX if config.task == "density_estimation" else "model."
        try:
            model.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path} does not fit its own configuration: {reason[:300]}"
            ) from None
        step, remarks = checkpoint["global_step"], []
        if type(step) is not int or step < 0:
            raise CheckpointError(f"{path}: its global_step cannot be {ascii(step)[:60]}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: its weights {name} are not finite: did training diverge?"
            )
    fingerprint = _fingerprint(model.state_dict(), config)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    model.eval().to(device)
    return LoadedModel(model, config, step, remarks, fingerprint)


def _fingerprint(weights: Mapping[str, Tensor], config: TrainConfig) -> str:
    digest = hashlib.sha256(repr(sorted(config.architecture().items())).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
