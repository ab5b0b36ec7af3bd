"""Replaces convolutions of an existing network by spatial dependency layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .nn import ResSDNLayer, SDNLayer

OPEN = 2.0  # bias of an open gate: sigmoid(2) = 0.88

Where = str | Sequence[str] | Callable[[str, nn.Conv2d], bool] | None


def convert(
    module: nn.Module,
    dirs: Sequence[int] | Sequence[Sequence[int]] = (0, 1, 2, 3),
    where: Where = None,
    *,
    residual: bool = True,
    keep_function: bool = True,
    **options: Any,
) -> list[str]:
    """Replaces convolutions of a network, in place, by layers of the same shapes.

    Arguments:
        module: The network. A convolution that occurs in it twice is replaced by one layer that
            does.
        dirs: Directions of the sweeps of each layer, or a sequence of such, which the layers take
            in turn.
        where: Which convolutions: a pattern of names as in `named_modules()` (`"layer4.*"`), or
            several, or a function of name and convolution. By default all `torch.nn.Conv2d` with a
            kernel larger than 1x1.
        residual: Whether the layers are :class:`ResSDNLayer`, else :class:`SDNLayer`.
        keep_function: Whether a :class:`ResSDNLayer` starts as the convolution that it replaces, so
            that a trained network computes at first what it did before, up to rounding, and learns
            from there to use the sweeps.
        **options: Further arguments of the layers, such as `num_features` or `init`.

    Returns:
        The names of what was replaced, in the order of the network.

    Raises:
        ValueError: if nothing matches, or the module is itself the convolution; if `keep_function`
            is asked for layers that are not residual.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> convert(network, dirs=[0, 2])
        ['0']
    """
    if keep_function and not residual:
        raise ValueError("keep_function=True needs residual=True: no other layer has a convolution")
    if isinstance(module, nn.Conv2d):
        raise ValueError("the module is itself a convolution: replace it where it is used")
    in_turn: list[Any] = list(dirs) if isinstance(dirs[0], Sequence) else [dirs]
    found = [
        (name, child)
        for name, child in module.named_modules()
        if type(child) is nn.Conv2d and _matches(where, name, child)
    ]
    if not found:
        raise ValueError(f"no convolution matches where={where!r}")
    layer_class = ResSDNLayer if residual else SDNLayer
    for number, (_, convolution) in enumerate(found):
        layer = layer_class(
            **_arguments_of(convolution),
            dirs=in_turn[number % len(in_turn)],
            device=convolution.weight.device,
            dtype=convolution.weight.dtype,
            **options,
        )
        if isinstance(layer, ResSDNLayer) and keep_function:
            _start_as(layer, convolution)
        layer.train(convolution.training)
        _replace(module, convolution, layer)
    return [name for name, _ in found]


def _matches(where: Where, name: str, convolution: nn.Conv2d) -> bool:
    if where is None:
        return max(convolution.kernel_size) > 1
    if callable(where):
        return where(name, convolution)
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _arguments_of(convolution: nn.Conv2d) -> dict[str, Any]:
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    arguments = {name: getattr(convolution, name) for name in names.split()}
    return arguments | {"bias": convolution.bias is not None}


def _start_as(layer: ResSDNLayer, convolution: nn.Conv2d) -> None:
    """Makes a layer compute at first what a convolution does, with gradients for all its parts.

    The layer's output is g c + (1 - g) s, for a gate g, a convolution c and corrected features s.
    Both halves of project-out start at zero, but for the bias of the gate: then s = 0, g is the
    same everywhere, and c is the convolution divided by g.
    """
    with torch.no_grad():
        for parameter in layer.sdn.project_out_stage.parameters():
            parameter.zero_()
        bias = layer.sdn.project_out_stage.get_parameter("bias")
        bias[layer.out_channels :] = OPEN
        layer.cnn.load_state_dict(convolution.state_dict())
        for parameter in layer.cnn.parameters():
            parameter.div_(torch.sigmoid(torch.tensor(OPEN, dtype=torch.float64)).item())


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if child is old:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, new)
