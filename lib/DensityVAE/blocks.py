"""The blocks of the ladder: convolutions, and what may take their place on the top-down path.

Paper, Figures 3 and 8 and Table 4. The figure is lost from our copy, so that names and widths are
ours (DEVIATIONS.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ResSDNLayer, SDNLayer, make_convolution

BLOCKS = ("sdn", "conv3", "conv5", "conv3x2", "conv3x4")
HIGHWAY = ("auto", "on", "off")

# Of convolutions that keep the scale or halve it; a transposed one doubles it.
SAME_SCALE = dict(kernel_size=3, stride=1, padding=1)
HALF_SCALE = dict(kernel_size=4, stride=2, padding=1)

# Makes a module from [B, in_ch, H, W] to [B, out_ch, H', W'] of `in_ch`, `out_ch` and the keywords
# `kernel_size`, `stride`, `padding` and `upsample`, as `make_convolution` does.
Block = Callable[..., nn.Module]


class Highway(nn.Module):
    r"""Gates a block with a convolution, as :class:`lib.nn.ResSDNLayer` does.

    With :math:`(t, g)` the two halves of the block's channels and :math:`c` the convolution,
    :math:`y = \sigma(g) \odot c + (1 - \sigma(g)) \odot t`.

    Arguments:
        block: From [B, in_ch, H, W] to [B, 2 out_ch, H', W'].
        cnn: From the same to [B, out_ch, H', W'].
    """

    def __init__(self, block: nn.Module, cnn: nn.Module):
        super().__init__()
        self.block, self.cnn = block, cnn

    def forward(self, x: Tensor) -> Tensor:
        transform, gate = self.block(x).chunk(2, dim=1)  # 2 x [B, out_ch, H', W']
        return torch.lerp(transform, self.cnn(x).to(transform.dtype), torch.sigmoid(gate))


def choose_block(kind: str, highway: bool, **sdn: Any) -> Block:
    """What stands where the baseline has a convolution, here called "the plain one".

    Arguments:
        kind: "sdn": a spatial dependency layer; "conv3": the plain one; "conv5": one whose kernel
            is larger by 2 on each axis; "conv3x2", "conv3x4": two or four 3x3 convolutions with ELU
            between, of which the first is the plain one.
        highway: Whether the block is gated with the plain one, as the ResSDN layer is.
        sdn: Of the spatial dependency layer: `num_features`, `dirs`, `border`, `backend`.
    """
    if kind == "sdn":
        return partial(ResSDNLayer if highway else SDNLayer, **sdn)
    block = {
        "conv3": make_convolution,
        "conv5": _larger,
        "conv3x2": partial(_deeper, 2),
        "conv3x4": partial(_deeper, 4),
    }[kind]
    return partial(_gated, block) if highway else block


def _gated(block: Block, in_ch: int, out_ch: int, **shape: Any) -> nn.Module:
    return Highway(block(in_ch, 2 * out_ch, **shape), make_convolution(in_ch, out_ch, **shape))


def _larger(in_ch: int, out_ch: int, kernel_size: int, padding: int, **shape: Any) -> nn.Module:
    return make_convolution(
        in_ch, out_ch, kernel_size=kernel_size + 2, padding=padding + 1, **shape
    )


def _deeper(number: int, in_ch: int, out_ch: int, **shape: Any) -> nn.Module:
    hidden = max(in_ch, out_ch)
    stages: list[nn.Module] = [make_convolution(in_ch, hidden, **shape)]
    for width in [hidden] * (number - 2) + [out_ch]:
        stages += [nn.ELU(), make_convolution(hidden, width, **SAME_SCALE, upsample=False)]
    return nn.Sequential(*stages)
