"""The blocks of the ladder: convolutions, and what may take their place on the top-down path.

Paper, Figures 3 and 8 and Table 4. The figure is lost from our copy, so that names and widths are
ours (DEVIATIONS.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import ResSDNLayer, SDNLayer, make_convolution

BLOCKS = ("sdn", "conv3", "conv5", "conv3x2", "conv3x4")
HIGHWAY = ("auto", "on", "off")


@dataclass(frozen=True)
class Kernel:
    """Kernel size, stride and padding of a convolution, transposed where the scale is to grow."""

    size: int
    stride: int
    padding: int


SAME_SCALE = Kernel(3, 1, 1)
HALF_SCALE = Kernel(4, 2, 1)


@dataclass(frozen=True)
class Block:
    """What stands where the baseline has a convolution, here called "the plain one".

    kind: "sdn": a spatial dependency layer; "conv3": the plain one; "conv5": one whose kernel is
        larger by 2 on each axis; "conv3x2", "conv3x4": two or four 3x3 convolutions with ELU
        between, of which the first is the plain one.
    highway: Whether the block is gated with the plain one, as the ResSDN layer is.
    num_features, dirs, border, backend: Of the spatial dependency layer.
    """

    kind: str = "conv3"
    highway: bool = False
    num_features: int = 0
    dirs: tuple[int, ...] = ()
    border: str = "zeros"
    backend: str = "auto"


PLAIN = Block()


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


def make_block(
    in_ch: int, out_ch: int, kernel: Kernel, *, upsample: bool, block: Block = PLAIN
) -> nn.Module:
    """A block from [B, in_ch, H, W] to [B, out_ch, H', W']: the one place where it is chosen."""
    shape = (kernel.size, kernel.stride, kernel.padding, upsample)
    if block.kind == "sdn":
        layer = ResSDNLayer if block.highway else SDNLayer
        return layer(
            in_ch,
            out_ch,
            block.num_features,
            block.dirs,
            *shape,
            border=block.border,
            backend=block.backend,
        )
    if block.highway:
        ungated = Block(block.kind)
        return Highway(
            make_block(in_ch, 2 * out_ch, kernel, upsample=upsample, block=ungated),
            make_convolution(in_ch, out_ch, *shape),
        )
    if block.kind == "conv5":
        return make_convolution(
            in_ch, out_ch, kernel.size + 2, kernel.stride, kernel.padding + 1, upsample
        )
    number = {"conv3": 1, "conv3x2": 2, "conv3x4": 4}[block.kind]
    if number == 1:
        return make_convolution(in_ch, out_ch, *shape)
    hidden = max(in_ch, out_ch)
    stages: list[nn.Module] = [make_convolution(in_ch, hidden, *shape)]
    for index in range(1, number):
        last = index == number - 1
        stages += [nn.ELU(), make_convolution(hidden, out_ch if last else hidden, 3, 1, 1, False)]
    return nn.Sequential(*stages)
