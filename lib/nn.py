r"""Spatial dependency layers, drop-in replacements for convolutions in networks that produce
images.

Reference: Miladinović et al., "Spatial Dependency Networks: Neural Layers for Improved Generative
Image Modeling", ICLR 2021, section 2 and Algorithm 1.

This file needs PyTorch and the standard library only and works as a single copied file, in which
the sweeps run as an open loop over the lines of a map. With the folder `sweeps/` beside it they run
by faster implementations of the same equations::

    from nn import SDNLayer

    layer = SDNLayer(64, 64, num_features=100, dirs=[0, 2], kernel_size=3, padding=1)
    y = layer(torch.randn(8, 64, 32, 32))  # [8, 64, 32, 32]
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIRECTIONS = {
    0: "columns, left to right",
    1: "columns, right to left",
    2: "rows, top to bottom",
    3: "rows, bottom to top",
}
BORDERS = ("zeros", "keep")
BACKENDS = ("auto", "reference", "torch", "lines", "cluster", "triton")
RENAMED_BACKENDS = {"triton": "lines"}  # in configurations of earlier versions


class SDNLayer(nn.Module):
    r"""Spatial dependency layer (paper, section 2): project-in, directional correction sweeps,
    project-out.

    1. *Project-in*: `Conv2d(in_ch, num_features, ...)`, or `ConvTranspose2d` if `upsample`; then
      tanh.
    2. *Correction*: one :class:`Sweep` for each entry of `dirs`, in that order, each with weights
      of its own.
    3. *Project-out*: `Conv2d(num_features, out_ch, 1)`.

    With all four directions every output position depends on every input position. With fewer some
    depend on a part of the input only: with `dirs=[0, 2]` the top left output depends on the top left input alone.

    Arguments:
        in_ch: Number of input channels.
        out_ch: Number of output channels.
        num_features: Number of features :math:`C` that the sweeps work on.
        dirs: Directions of the sweeps, any non-empty sequence of 0 (columns, left to right), 1
            (columns, right to left), 2 (rows, top to bottom), 3 (rows, bottom to top). A direction
            may occur more than once.
        kernel_size, stride, padding: Of the project-in convolution.
        upsample: Whether project-in is a transposed convolution. `kernel_size=4, stride=2,
            padding=1` doubles the scale.
        border: What happens to the first line of a sweep, which has no previous line. `"zeros"`
            (paper, Algorithm 1): it is corrected with all-zero neighbours. `"keep"` (the authors'
            release): it stays as it is; needed for the authors' checkpoints (DEVIATIONS.md in the
            repository).
        backend: How the sweeps are computed, one of `BACKENDS`. `"reference"` is the open loop over
            lines with torch's own gradients. The others need the folder `sweeps/` beside this file,
            whose first page describes them. `"auto"` takes the fastest one that agrees with the
            reference on the device at hand. Parameters and their names are the same for all.

    Shapes:
        - input: :math:`[B, \text{in\_ch}, H, W]`, any :math:`H, W \ge 1`, any memory format.
        - output: :math:`[B, \text{out\_ch}, H', W']` with the convolution's :math:`H', W'`.

    Raises:
        ValueError: on arguments that cannot work, or an input of another shape; the message says
            what is allowed.

    Example:
        >>> layer = SDNLayer(3, 8, num_features=16, dirs=[0, 1, 2, 3], kernel_size=3, padding=1)
        >>> layer(torch.randn(2, 3, 5, 7)).shape
        torch.Size([2, 8, 5, 7])
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        num_features: int,
        dirs: Sequence[int],
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        upsample: bool = False,
        *,
        border: str = "zeros",
        backend: str = "auto",
    ):
        super().__init__()
        _check_positive(in_ch=in_ch, out_ch=out_ch, num_features=num_features)
        self.dirs = _checked_directions(dirs)
        self.project_in_stage = make_convolution(
            in_ch, num_features, kernel_size, stride, padding, upsample
        )
        self.sdn_correction_stage = nn.ModuleList(
            Sweep(num_features, direction, border=border, backend=backend)
            for direction in self.dirs
        )
        self.project_out_stage = nn.Conv2d(num_features, out_ch, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.project_in_stage.in_channels, self.project_in_stage)
        memory_format = _memory_format(x)
        x = _laid_out(x, torch.channels_last)  # which the sweeps need: converted once
        features = torch.tanh(self.project_in_stage(x))  # [B, C, H', W']
        for sweep in self.sdn_correction_stage:
            features = sweep(features)  # [B, C, H', W']
        return _laid_out(self.project_out_stage(features), memory_format)  # [B, out_ch, H', W']


class ResSDNLayer(nn.Module):
    r"""Spatial dependency layer with a highway connection (paper, Figure 3).

    With :math:`(s, g)` the two halves of the channels of an `SDNLayer(in_ch, 2 * out_ch, ...)` and
    :math:`c` a convolution of the same kernel, stride, padding and direction of scaling,

    .. math:: y = \sigma(g) \odot c + (1 - \sigma(g)) \odot s.

    Arguments, shapes and errors are those of :class:`SDNLayer`.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        num_features: int,
        dirs: Sequence[int],
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        upsample: bool = False,
        *,
        border: str = "zeros",
        backend: str = "auto",
    ):
        super().__init__()
        _check_positive(in_ch=in_ch, out_ch=out_ch, num_features=num_features)
        convolution = (kernel_size, stride, padding, upsample)
        self.sdn = SDNLayer(
            in_ch, 2 * out_ch, num_features, dirs, *convolution, border=border, backend=backend
        )
        self.cnn = make_convolution(in_ch, out_ch, *convolution)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.cnn.in_channels, self.cnn)
        memory_format = _memory_format(x)
        x = _laid_out(x, torch.channels_last)
        corrected, gate = self.sdn(x).chunk(2, dim=1)  # 2 x [B, out_ch, H', W']
        y = torch.lerp(corrected, self.cnn(x).to(corrected.dtype), torch.sigmoid(gate))
        return _laid_out(y, memory_format)


class Sweep(nn.Module):
    r"""One correction sweep across a feature map (paper, Algorithm 1).

    The lines (columns for directions 0 and 1, rows for 2 and 3) are visited one after another. With
    :math:`h` the features of a line before the sweep, :math:`p` the corrected features of the line
    visited before it (zeros beyond the edges) and :math:`u_j = [p_{j-1}, p_j, p_{j+1}]`, all
    positions :math:`j` of a line are corrected at once:

    .. math::
        r &= \sigma(W_{ir} u + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} u + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} u + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    The parameters are those of a `torch.nn.GRUCell(3 * C, C)`, initialized as it is: :math:`U(\pm
    1/\sqrt{C})`.

    Arguments:
        num_features: Number of features :math:`C`.
        direction: 0, 1, 2 or 3, see :class:`SDNLayer`.
        border: `"zeros"` or `"keep"`, see :class:`SDNLayer`.
        backend: See :class:`SDNLayer`.

    Shapes:
        - input and output: :math:`[B, C, H, W]`, of one type. Under autocast only products are in
          its type.
    """

    def __init__(
        self, num_features: int, direction: int, *, border: str = "zeros", backend: str = "auto"
    ):
        super().__init__()
        _check_positive(num_features=num_features)
        (self.direction,) = _checked_directions([direction])
        if border not in BORDERS:
            raise ValueError(
                f"border must be one of {', '.join(map(repr, BORDERS))}, got {border!r}"
            )
        if backend not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
            )
        self.border = border
        self.backend = RENAMED_BACKENDS.get(backend, backend)
        self.cell = SweepCell(num_features)

    def extra_repr(self) -> str:
        return f"{DIRECTIONS[self.direction]}, border={self.border!r}, backend={self.backend!r}"

    def forward(self, features: Tensor) -> Tensor:
        to_lines = (3, 2, 0, 1) if self.direction in (0, 1) else (2, 3, 0, 1)
        from_lines = (2, 3, 1, 0) if self.direction in (0, 1) else (2, 3, 0, 1)
        lines = features.permute(to_lines)  # [line, position, B, C]
        sides = dict(reverse=self.direction in (1, 3), keep_first=self.border == "keep")
        lines = correct_lines(
            lines, *self.cell.parameters_in_order(), **sides, backend=self.backend
        )
        return lines.permute(from_lines)  # [B, C, H, W]


class SweepCell(nn.Module):
    """Holds a sweep's parameters under the names of the authors' release (`cell.gru.weight_ih`,
    ...)."""

    def __init__(self, num_features: int):
        super().__init__()
        self.gru = nn.GRUCell(3 * num_features, num_features)

    def parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gru.weight_ih, self.gru.weight_hh, self.gru.bias_ih, self.gru.bias_hh


def correct_lines_reference(
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    reverse: bool,
    keep_first: bool,
) -> Tensor:
    """The equations of :class:`Sweep`, line after line, with nothing fused and nothing precomputed.

    Arguments:
        lines: Features before the sweep, [line, position, batch, channel].
        weight_ih: [3C, 3C]; rows are the gates r, z, n; columns the neighbours j-1, j, j+1.
        weight_hh: [3C, C]. bias_ih, bias_hh: [3C].
        reverse: Whether the last line is visited first.
        keep_first: Whether the line visited first stays as it is.

    Returns:
        Corrected features, same shape and type (float32 for float64 under autocast). Matrix
        products are in autocast's type; features in low precision are rounded after the sweep, not
        between its lines.
    """
    dtype = _features_dtype(lines)
    if _autocasts(lines):
        lines = lines.float()
    visited = lines.flip(0) if reverse else lines
    corrected: list[Tensor] = []
    previous = torch.zeros_like(visited[0])
    for h in visited:
        if keep_first and not corrected:
            previous = h
        else:
            edge = torch.zeros_like(previous[:1])
            before = torch.cat([edge, previous[:-1]])  # the neighbour at j-1
            after = torch.cat([previous[1:], edge])  # the neighbour at j+1
            u = torch.cat([before, previous, after], dim=-1)  # [position, batch, 3C]
            from_neighbours = F.linear(u, weight_ih).to(h.dtype) + bias_ih
            from_own = F.linear(h, weight_hh).to(h.dtype) + bias_hh
            ir, iz, in_ = from_neighbours.chunk(3, dim=-1)
            hr, hz, hn = from_own.chunk(3, dim=-1)
            r = torch.sigmoid(ir + hr)
            z = torch.sigmoid(iz + hz)
            n = torch.tanh(in_ + r * hn)
            previous = (1 - z) * n + z * h
        corrected.append(previous)
    if reverse:
        corrected.reverse()
    return torch.stack(corrected).to(dtype)


def correct_lines(
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    reverse: bool,
    keep_first: bool,
    backend: str = "auto",
) -> Tensor:
    """Computes what :func:`correct_lines_reference` computes, with a choice of `backend`.

    Raises:
        RuntimeError: if the backend that was asked for cannot run here.
        ValueError: if it does not support this device or type, or if the tensors are on several
            devices.
    """
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    if any(parameter.device != lines.device for parameter in parameters):
        where = ", ".join(str(parameter.device) for parameter in parameters)
        raise ValueError(
            f"features are on {lines.device}, parameters on {where}: all must be on one device"
        )
    if backend == "reference" or _SWEEPS is None:
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"backend {backend!r} cannot run: there is no folder sweeps/ beside nn.py; "
                "'auto' and 'reference' can"
            )
        if backend == "auto" and not torch.compiler.is_compiling():
            _remark_slow()
        return correct_lines_reference(lines, *parameters, reverse=reverse, keep_first=keep_first)
    return _SWEEPS.correct_lines(
        lines, *parameters, reverse=reverse, keep_first=keep_first, backend=backend
    )


@functools.cache
def _remark_slow() -> None:
    warnings.warn(
        "sweeps run as an open loop, because there is no folder sweeps/ beside nn.py; with it, or "
        "with the installed package, they are several times faster",
        stacklevel=2,
    )


def _import_sweeps() -> types.ModuleType | None:
    """The package `sweeps` that lies beside this file, or None if this file was copied alone."""
    folder = Path(__file__).parent
    if not (folder / "sweeps" / "__init__.py").exists():
        return None
    if __package__:
        return importlib.import_module(".sweeps", __package__)
    # A copy that is not part of a package: its folder becomes one, of which this module is a part.
    package = types.ModuleType(f"_package_of_{__name__}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    sys.modules[f"{package.__name__}.nn"] = sys.modules[__name__]
    return importlib.import_module(f"{package.__name__}.sweeps")


def _features_dtype(lines: Tensor) -> torch.dtype:
    """The type of a sweep's result."""
    return torch.float32 if _autocasts(lines) and lines.dtype == torch.float64 else lines.dtype


def _autocasts(lines: Tensor) -> bool:
    # Tensors without content (the device meta) have no autocast.
    return not lines.is_meta and torch.is_autocast_enabled(lines.device.type)


def _laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor in a memory format; as it is inside a transform of `torch.func`."""
    if torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=memory_format)


def _memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that a convolution's output would have."""
    if torch._C._are_functorch_transforms_active():  # whose tensors cannot be asked
        return torch.contiguous_format
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def make_convolution(
    in_ch: int, out_ch: int, kernel_size: int, stride: int, padding: int, upsample: bool
) -> nn.Conv2d | nn.ConvTranspose2d:
    """A convolution, or if `upsample` a transposed one, with arguments that cannot work refused
    (ValueError)."""
    _check_positive(in_ch=in_ch, out_ch=out_ch, kernel_size=kernel_size, stride=stride)
    if not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding must be an integer >= 0, got {padding!r}")
    if upsample:
        if stride == 1:
            raise ValueError(
                "upsample=True needs stride >= 2 (kernel_size=4, stride=2, padding=1 doubles the scale)"
            )
        if kernel_size < stride:
            raise ValueError(
                f"upsample=True needs kernel_size >= stride, or some outputs see no input at all; "
                f"got kernel_size={kernel_size}, stride={stride}"
            )
        if kernel_size <= 2 * padding:
            raise ValueError(
                f"upsample=True needs kernel_size > 2 * padding, got kernel_size={kernel_size}, padding={padding}"
            )
    convolution = nn.ConvTranspose2d if upsample else nn.Conv2d
    return convolution(in_ch, out_ch, kernel_size, stride=stride, padding=padding)


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _checked_directions(dirs: Sequence[int]) -> tuple[int, ...]:
    allowed = ", ".join(f"{number} ({meaning})" for number, meaning in DIRECTIONS.items())
    try:
        dirs = tuple(dirs)
    except TypeError:
        raise ValueError(
            f"dirs must be a sequence of directions, got {dirs!r}; allowed are {allowed}"
        ) from None
    if not dirs:
        raise ValueError(f"dirs must name at least one direction; allowed are {allowed}")
    for direction in dirs:
        if type(direction) is not int or direction not in DIRECTIONS:
            raise ValueError(f"unknown direction {direction!r} in dirs; allowed are {allowed}")
    return dirs


def _check_input(x: Tensor, channels: int, convolution: nn.Conv2d | nn.ConvTranspose2d) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"input must be [batch, {channels}, height, width], got {list(x.shape)}")
    if isinstance(convolution, nn.Conv2d):
        smallest = convolution.kernel_size[0] - 2 * convolution.padding[0]
        if min(x.shape[2:]) < smallest:
            raise ValueError(
                f"input must be at least {smallest} high and wide for this kernel, got {list(x.shape)}"
            )


_SWEEPS = _import_sweeps()
