"""The networks that the examples compare.

`Residual` is one network with an exchangeable kind of block; `UNet` is the usual alternative. All
take maps [B, in_ch, H, W] of any size and return logits [B, 1, H, W].
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.nn import Init, SDNLayer


def arms(in_ch: int) -> dict[str, Callable[[], nn.Module]]:
    """What is compared: some 30,000 parameters each, where it says "large" 300,000 or more."""
    return {
        "SDN": partial(sdn, in_ch),
        "ReNet": partial(renet, in_ch, 16, 17),
        "convolutions": partial(convolutions, in_ch, 16, [1] * 7),
        "dilated": partial(convolutions, in_ch, 16, [1, 2, 4, 8, 1, 2, 4]),
        "axial attention": partial(axial, in_ch),
        "U-Net": partial(UNet, in_ch, 8, 3),
        "U-Net, attention": partial(UNet, in_ch, 11, 2, attention=True),
        "U-Net, large": partial(UNet, in_ch, 20, 4),
        "U-Net, large, attention": partial(UNet, in_ch, 20, 4, attention=True),
    }


def variants(in_ch: int) -> dict[str, Callable[[], nn.Module]]:
    """The arm "SDN" with one thing changed each. Those with more features or layers have more
    parameters, 64,000 and 46,000."""
    return {
        "SDN, open gate": partial(sdn, in_ch, init="deep"),
        "SDN, four layers of two directions": partial(sdn, in_ch, depth=4, dirs=([0, 2], [1, 3])),
        "SDN, 24 features": partial(sdn, in_ch, features=24),
        "SDN, three layers": partial(sdn, in_ch, depth=3),
    }


class Residual(nn.Module):
    """A 3x3 convolution, residual blocks with batch normalization before each, and a 1x1 head."""

    def __init__(self, in_ch: int, width: int, blocks: list[nn.Module]):
        super().__init__()
        self.stem = nn.Conv2d(in_ch, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in blocks)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # [B, width, H, W]
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)  # [B, 1, H, W]


def sdn(
    in_ch: int,
    width: int = 16,
    features: int = 16,
    depth: int = 2,
    dirs: Sequence[list[int]] = ([0, 1, 2, 3],),
    init: Init = "paper",
) -> Residual:
    """Blocks of one SDN layer each, whose directions are the entries of `dirs` in turn."""
    blocks = [
        SDNLayer(width, width, 3, padding=1, num_features=features, dirs=d, init=init)
        for d in (dirs[i % len(dirs)] for i in range(depth))
    ]
    return Residual(in_ch, width, blocks)


def convolutions(in_ch: int, width: int, dilations: list[int]) -> Residual:
    """Blocks of two 3x3 convolutions, one block for each entry of `dilations`."""
    return Residual(in_ch, width, [_two_convolutions(width, d) for d in dilations])


def renet(in_ch: int, width: int = 16, hidden: int = 16, depth: int = 2) -> Residual:
    """Blocks of a bidirectional LSTM along rows, then along columns (Visin et al., 2015)."""
    return Residual(in_ch, width, [ReNet(width, hidden) for _ in range(depth)])


def axial(in_ch: int, width: int = 24, depth: int = 3) -> Residual:
    """Blocks of self-attention along rows, then along columns (Ho et al., 2019)."""
    return Residual(in_ch, width, [Axial(width) for _ in range(depth)])


def _two_convolutions(width: int, dilation: int) -> nn.Sequential:
    kernel = dict(kernel_size=3, padding=dilation, dilation=dilation)
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(width, width, **kernel),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, **kernel),
    )


class ReNet(nn.Module):
    """A 3x3 convolution, a bidirectional LSTM along each row and one along each column."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.before = nn.Conv2d(width, width, 3, padding=1)
        self.rows = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.columns = nn.LSTM(2 * hidden, hidden, bidirectional=True, batch_first=True)
        self.after = nn.Conv2d(2 * hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = self.before(x).permute(0, 2, 3, 1)  # [B, H, W, C]
        x = self.rows(x.flatten(0, 1))[0]  # [B * H, W, 2 * hidden]
        x = x.unflatten(0, (batch, height)).transpose(1, 2)  # [B, W, H, 2 * hidden]
        x = self.columns(x.flatten(0, 1))[0]  # [B * W, H, 2 * hidden]
        x = x.unflatten(0, (batch, width))  # [B, W, H, 2 * hidden]
        return self.after(x.permute(0, 3, 2, 1))  # [B, C, H, W]


class Axial(nn.Module):
    """A 3x3 convolution, from which attention learns of positions; then attention along rows and
    along columns."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.before = nn.Conv2d(width, width, 3, padding=1)
        self.rows = nn.MultiheadAttention(width, heads, batch_first=True)
        self.columns = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).permute(0, 2, 3, 1)  # [B, H, W, C]
        x = x + _attend(self.rows, x)
        x = _attend(self.columns, x.transpose(1, 2)).transpose(1, 2)
        return x.permute(0, 3, 1, 2)  # [B, C, H, W]


def _attend(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Attention along the third dimension of [B, lines, positions, C]."""
    lines = x.flatten(0, 1)
    return attention(lines, lines, lines, need_weights=False)[0].unflatten(0, x.shape[:2])


class UNet(nn.Module):
    """A U-Net of `depth` halvings with two 3x3 convolutions at each scale.

    Arguments:
        width: Channels at the full scale; each halving has 1.5 times as many.
        attention: Whether two transformer blocks work at the lowest scale.
    """

    def __init__(self, in_ch: int, width: int, depth: int, attention: bool = False):
        super().__init__()
        widths = [int(width * 1.5**i) // 4 * 4 for i in range(depth + 1)]
        inputs = [in_ch, *widths[:-1]]
        self.down = nn.ModuleList(map(_scale, inputs, widths))
        self.up = nn.ModuleList(_scale(widths[i] + widths[i + 1], widths[i]) for i in range(depth))
        self.middle = Transformer(widths[-1]) if attention else nn.Identity()
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        multiple = 2 ** len(self.up)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple))
        skips = []
        for i, scale in enumerate(self.down):
            x = scale(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        x = self.middle(x)
        for scale, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            x = scale(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        return self.head(x)[..., :height, :width]


class Transformer(nn.Module):
    """Two transformer blocks over all positions, which a depthwise convolution tells apart."""

    def __init__(self, width: int):
        super().__init__()
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        x = (x + self.position(x)).flatten(2).transpose(1, 2)  # [B, H * W, C]
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2).unflatten(2, size)


def _scale(in_ch: int, out_ch: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_ch, out_ch, 3, padding=1),
        nn.BatchNorm2d(out_ch),
        nn.ReLU(),
        nn.Conv2d(out_ch, out_ch, 3, padding=1),
        nn.BatchNorm2d(out_ch),
        nn.ReLU(),
    )
