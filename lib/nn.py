r"""Spatial dependency layers, drop-in replacements for convolutions in networks that produce
images.

Reference: Miladinović et al., "Spatial Dependency Networks: Neural Layers for Improved Generative
Image Modeling", ICLR 2021, section 2 and Algorithm 1.

This file needs PyTorch and the standard library only and works as a single copied file, in which
the sweeps run as an open loop over the lines of a map. With the folder `sweeps/` beside it they run
by faster implementations of the same equations. (c) 2026 The SDN developers,
SPDX-License-Identifier: MIT::

    from nn import SDNLayer

    layer = SDNLayer(64, 64, num_features=100, dirs=[0, 2], kernel_size=3, padding=1)
    y = layer(torch.randn(8, 64, 32, 32))  # [8, 64, 32, 32]
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIRECTIONS = {
    0: "columns, left to right",
    1: "columns, right to left",
    2: "rows, top to bottom",
    3: "rows, bottom to top",
}
Border = Literal["zeros", "keep"]
Backend = Literal["auto", "reference", "torch", "lines", "cluster", "triton"]
Init = Literal["paper", "deep"]
Size = int | tuple[int, int]  # of height and width
Options = dict[str, Any]
BORDERS, BACKENDS, INITS = get_args(Border), get_args(Backend), get_args(Init)
RENAMED_BACKENDS = {"triton": "lines"}  # in configurations of earlier versions


def correct_line(
    h: Tensor,
    previous: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Tensor:
    """The equations of :class:`Sweep` for one line.

    Arguments:
        h: The line's features before the sweep, [position, batch, channel].
        previous: The corrected features of the line visited before it, of the same shape.
        weight_ih: [3C, 3C]; rows are the gates r, z, n; columns the neighbours j-1, j, j+1.
        weight_hh: [3C, C]. bias_ih, bias_hh: [3C].

    Returns:
        The line's corrected features, of the same shape.
    """
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
    return (1 - z) * n + z * h


def correct_lines_reference(
    lines: Tensor, *parameters: Tensor, reverse: bool, keep_first: bool
) -> Tensor:
    """A sweep: line after line, with nothing fused and nothing precomputed.

    Arguments:
        lines: Features before the sweep, [line, position, batch, channel].
        *parameters: weight_ih, weight_hh, bias_ih and bias_hh, see :func:`correct_line`.
        reverse: Whether the last line is visited first.
        keep_first: Whether the line visited first stays as it is.

    Returns:
        Corrected features, same shape and type (float32 for float64 under autocast). Matrix
        products are in autocast's type; features in low precision are rounded after the sweep, not
        between its lines.
    """
    dtype = lines.dtype
    # Tensors without content (the device meta) have no autocast.
    if not lines.is_meta and torch.is_autocast_enabled(lines.device.type):
        dtype = torch.float32 if dtype == torch.float64 else dtype
        lines = lines.float()
    visited = lines.flip(0) if reverse else lines
    corrected: list[Tensor] = []
    previous = torch.zeros_like(visited[0])
    for h in visited:
        keep = keep_first and not corrected
        previous = h if keep else correct_line(h, previous, *parameters)
        corrected.append(previous)
    if reverse:
        corrected.reverse()
    return torch.stack(corrected).to(dtype)


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
    1/\sqrt{C})`. With `init="deep"` 2 is added to the bias of :math:`z`, so that at first the sweep
    passes on most of what it gets and gradients reach the first of many layers (DEVIATIONS.md).

    Arguments:
        num_features: Number of features :math:`C`.
        direction: 0, 1, 2 or 3, see :class:`SDNLayer`.
        border, backend, init, device, dtype: See :class:`SDNLayer`.

    Shapes:
        - input and output: :math:`[B, C, H, W]`, of one type. Under autocast only products are in
          its type.
    """

    def __init__(
        self,
        num_features: int,
        direction: int,
        *,
        border: Border = "zeros",
        backend: Backend = "auto",
        init: Init = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        C = _channels("num_features", num_features)
        (self.direction,) = _directions([direction])
        self.border = _one_of("border", border, BORDERS)
        backend = _one_of("backend", backend, BACKENDS)
        self.backend = RENAMED_BACKENDS.get(backend, backend)
        self.init = _one_of("init", init, INITS)
        # Names of the authors' release: cell.gru.weight_ih, ...
        gru = _GRUParameters(3 * C, C, device=device, dtype=dtype)
        self.cell: Any = nn.ModuleDict({"gru": gru})
        self._open_gate()

    def reset_parameters(self) -> None:
        """Draws new parameters, as at construction."""
        self.cell.gru.reset_parameters()
        self._open_gate()

    def _open_gate(self) -> None:
        if self.init == "deep":
            with torch.no_grad():
                self.cell.gru.bias_ih.chunk(3)[1].add_(2)

    def extra_repr(self) -> str:
        return f"{DIRECTIONS[self.direction]}, border={self.border!r}, backend={self.backend!r}"

    def forward(self, features: Tensor) -> Tensor:
        """Corrects features [B, C, H, W]."""
        to_lines = (3, 2, 0, 1) if self.direction in (0, 1) else (2, 3, 0, 1)
        from_lines = (2, 3, 1, 0) if self.direction in (0, 1) else (2, 3, 0, 1)
        lines = features.permute(to_lines)  # [line, position, B, C]
        sides = dict(reverse=self.direction in (1, 3), keep_first=self.border == "keep")
        lines = correct_lines(lines, *self.cell.gru(), **sides, backend=self.backend)
        return lines.permute(from_lines)  # [B, C, H, W]


class _GRUParameters(nn.GRUCell):
    """A GRU cell that, called without inputs, returns its parameters: after the hooks on it have
    run, which may compute them, as those of `torch.nn.utils.spectral_norm` do."""

    def forward(self, *inputs: Tensor) -> Any:  # type: ignore[override]
        if inputs:
            return super().forward(*inputs)
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh


_Function = TypeVar("_Function", bound=Callable[..., None])


def _in_either_order(init: _Function) -> _Function:
    """Lets a layer take its arguments in the order and by the names of the paper's program, too.

    That order is recognized by `dirs` in the fourth place, or by a third argument beside
    `kernel_size=...`, which can only be the number of features.
    """
    order = "in_channels out_channels num_features dirs kernel_size stride padding upsample".split()
    renamed = {"in_ch": "in_channels", "out_ch": "out_channels"}

    @functools.wraps(init)
    def init_by_name(self: nn.Module, *arguments: Any, **keywords: Any) -> None:
        keywords = {renamed.get(name, name): value for name, value in keywords.items()}
        of_paper = len(arguments) > 3 and "dirs" not in keywords
        if of_paper or (len(arguments) == 3 and "kernel_size" in keywords):
            by_name = dict(zip(order, arguments, strict=False))
            init(self, *arguments[len(order) :], **by_name, **keywords)
        else:
            init(self, *arguments, **keywords)

    return init_by_name  # type: ignore[return-value]


class SDNLayer(nn.Module):
    r"""Spatial dependency layer (paper, section 2): project-in, directional correction sweeps,
    project-out.

    1. *Project-in*: a convolution to `num_features` channels, or a transposed one if `upsample`;
       then tanh.
    2. *Correction*: one :class:`Sweep` for each entry of `dirs`, in that order, each with weights
       of its own.
    3. *Project-out*: `Conv2d(num_features, out_channels, 1)`.

    With all four directions every output position depends on every input position. With fewer some
    depend on a part of the input only: with `dirs=[0, 2]` the top left output depends on the top
    left input alone.

    The arguments are those of `torch.nn.Conv2d`, and by keyword those that it does not have, so
    that `functools.partial(SDNLayer, dirs=[0, 2])` stands where a convolution's class is asked for.
    The order of the paper's program, `SDNLayer(in_ch, out_ch, num_features, dirs, kernel_size,
    stride, padding, upsample)`, works as well: it is recognized by `dirs` in the fourth place.

    Arguments:
        in_channels, out_channels: Number of channels of input and output (also `in_ch`, `out_ch`).
        kernel_size, stride, padding, dilation, groups, bias, padding_mode: Of project-in, as for
            `torch.nn.Conv2d`: integers or pairs, padding also `"same"` or `"valid"`.
        dirs: Directions of the sweeps, any non-empty sequence of 0 (columns, left to right), 1
            (columns, right to left), 2 (rows, top to bottom), 3 (rows, bottom to top). A direction
            may occur more than once.
        num_features: Number of features :math:`C` that the sweeps work on; `out_channels` if it is
            not given.
        upsample: Whether project-in is a transposed convolution. `kernel_size=4, stride=2,
            padding=1` doubles the scale.
        output_padding: Of a transposed project-in.
        border: What happens to the first line of a sweep, which has no previous line. `"zeros"`
            (paper, Algorithm 1): it is corrected with all-zero neighbours. `"keep"` (the authors'
            release): it stays as it is; needed for the authors' checkpoints (DEVIATIONS.md in the
            repository).
        backend: How the sweeps are computed, one of `BACKENDS`. `"reference"` is the open loop over
            lines with torch's own gradients. The others need the folder `sweeps/` beside this file,
            whose first page describes them. `"auto"` takes the fastest one that agrees with the
            reference on the device at hand. Parameters and their names are the same for all.
        init: `"paper"`, or `"deep"` for stacks of many layers, see :class:`Sweep`.
        device, dtype: Of the parameters.

    Shapes:
        - input: :math:`[B, \text{in\_channels}, H, W]` or without :math:`B`, any memory format.
        - output: :math:`[B, \text{out\_channels}, H', W']` with the convolution's
          :math:`H', W'`; with `upsample` the call may choose it by `output_size`.

    Raises:
        TypeError: on arguments that are unknown, missing or given twice.
        ValueError: on arguments that cannot work; the message says what is allowed. What concerns
            the convolution alone, and an input that does not fit, raises what it raises there.

    Example:
        >>> layer = SDNLayer(3, 8, kernel_size=3, padding=1, dirs=[0, 1, 2, 3], num_features=16)
        >>> layer(torch.randn(2, 3, 5, 7)).shape
        torch.Size([2, 8, 5, 7])
    """

    @_in_either_order
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 1,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        dirs: Sequence[int],
        num_features: int | None = None,
        upsample: bool = False,
        output_padding: Size = 0,
        border: Border = "zeros",
        backend: Backend = "auto",
        init: Init = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_channels = _channels("in_channels", in_channels)
        self.out_channels = _channels("out_channels", out_channels)
        self.dirs = _directions(dirs)
        C = self.out_channels if num_features is None else _channels("num_features", num_features)
        convolution: Options = dict(kernel_size=kernel_size, stride=stride, padding=padding)
        convolution |= dict(dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode)
        convolution |= dict(upsample=upsample, output_padding=output_padding)
        sweep = dict(border=border, backend=backend, init=init)
        self._build(C, convolution, sweep, dict(device=device, dtype=dtype))

    def _build(self, C: int, convolution: Options, sweep: Options, factory: Options) -> None:
        """Makes the modules, with options of all convolutions, of all sweeps and of all modules."""
        self.project_in_stage = make_convolution(self.in_channels, C, **convolution, **factory)
        sweeps = [Sweep(C, direction, **sweep, **factory) for direction in self.dirs]
        self.sdn_correction_stage = nn.ModuleList(sweeps)
        self.project_out_stage = nn.Conv2d(C, self.out_channels, kernel_size=1, **factory)

    @property
    def _convolution(self) -> nn.Conv2d | nn.ConvTranspose2d:
        """The one whose arguments are the layer's."""
        return self.project_in_stage

    def __getattr__(self, name: str) -> Any:
        names = "kernel_size stride padding dilation groups bias padding_mode output_padding"
        of_convolution = name in names.split()
        return getattr(self._convolution, name) if of_convolution else super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, dirs={list(self.dirs)}"

    def reset_parameters(self) -> None:
        """Draws new parameters, as at construction."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, Sweep)):
                module.reset_parameters()

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H', W'], in the memory format of `x`."""
        sizes: tuple[Sequence[int], ...] = ()
        if output_size is not None and not isinstance(output_size, torch.fx.Proxy):
            sizes = (output_size,)
        if isinstance(x, torch.fx.Proxy):  # of a symbolic trace: of the input nothing is known
            return self._computed(x, *sizes)
        if x.dim() == 3:
            return self(x[None], output_size)[0]
        if _SWEEPS is None or x.dim() != 4:  # which the convolution refuses
            return self._computed(x, *sizes)
        return _SWEEPS.laid_out_for_sweeps(self._computed, x, *sizes)

    def _computed(self, x: Tensor, *output_size: Sequence[int]) -> Tensor:
        features = torch.tanh(self.project_in_stage(x, *output_size))  # [B, C, H', W']
        for sweep in self.sdn_correction_stage:
            features = sweep(features)  # [B, C, H', W']
        return self.project_out_stage(features)


class ResSDNLayer(SDNLayer):
    r"""Spatial dependency layer with a highway connection (paper, Figure 3).

    With :math:`(s, g)` the two halves of the channels of an `SDNLayer(in_channels, 2 *
    out_channels, ...)` and :math:`c` a convolution with the same arguments,

    .. math:: y = \sigma(g) \odot c + (1 - \sigma(g)) \odot s.

    Arguments, shapes and errors are those of :class:`SDNLayer`.
    """

    def _build(self, C: int, convolution: Options, sweep: Options, factory: Options) -> None:
        both = 2 * self.out_channels  # corrected features and a gate
        options = convolution | sweep | factory
        self.sdn = SDNLayer(self.in_channels, both, dirs=self.dirs, num_features=C, **options)
        self.cnn = make_convolution(self.in_channels, self.out_channels, **convolution, **factory)

    @property
    def _convolution(self) -> nn.Conv2d | nn.ConvTranspose2d:
        return self.cnn

    def _computed(self, x: Tensor, *output_size: Sequence[int]) -> Tensor:
        corrected, gate = self.sdn(x, *output_size).chunk(2, dim=1)  # 2 x [B, out_channels, H', W']
        convolved = self.cnn(x, *output_size).to(corrected.dtype)
        return torch.lerp(corrected, convolved, torch.sigmoid(gate))


def make_convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size,
    padding: Size | str,
    upsample: bool,
    output_padding: Size = 0,
    **options: Any,
) -> nn.Conv2d | nn.ConvTranspose2d:
    """A convolution, or if `upsample` a transposed one; further options are those of both.

    Raises:
        ValueError: on arguments of a transposed convolution with which it would not upsample, or
            leave out parts of the output, and on those that only the other kind has.
    """
    channels = in_channels, out_channels
    if not upsample:
        if output_padding not in (0, (0, 0)):
            raise ValueError("output_padding needs upsample=True")
        return nn.Conv2d(*channels, kernel_size, stride, padding, **options)
    if isinstance(padding, str) or options.get("padding_mode", "zeros") != "zeros":
        raise ValueError("upsample=True needs padding in numbers, and padding_mode='zeros'")
    sizes = kernel_size, stride, padding, output_padding
    convolution = nn.ConvTranspose2d(*channels, *sizes, **options)
    wrong = f"got kernel_size={kernel_size}, stride={stride}, padding={padding}"
    if convolution.stride == (1, 1):
        raise ValueError(f"upsample=True needs stride >= 2, {wrong}; 4, 2, 1 doubles the scale")
    pairs: Any = convolution.kernel_size, convolution.stride, convolution.padding
    for kernel, step, pad in zip(*pairs, strict=True):
        if kernel < step or kernel <= 2 * pad:
            raise ValueError(
                "upsample=True needs kernel_size >= stride, or some outputs see no input at all, "
                f"and kernel_size > 2 * padding, {wrong}"
            )
    return convolution


def _channels(name: str, value: Any) -> int:
    """A number of channels, of any kind of integer, numpy's too, as Python's."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return operator.index(value)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _directions(dirs: Sequence[int]) -> tuple[int, ...]:
    given = tuple(dirs) if isinstance(dirs, Iterable) else ()
    if not given or any(isinstance(d, bool) or d not in DIRECTIONS for d in given):
        allowed = ", ".join(f"{number} ({meaning})" for number, meaning in DIRECTIONS.items())
        raise ValueError(f"dirs must be a non-empty sequence of {allowed}, got {dirs!r}")
    return tuple(map(operator.index, given))


def correct_lines(
    lines: Tensor, *parameters: Tensor, reverse: bool, keep_first: bool, backend: str = "auto"
) -> Tensor:
    """Computes what :func:`correct_lines_reference` computes, with a choice of `backend`.

    Raises:
        RuntimeError: if the backend that was asked for cannot run here.
        ValueError: if it does not support this device or type, or if the tensors are on several
            devices.
    """
    if backend != "reference" and _SWEEPS is not None:
        return _SWEEPS.correct_lines(
            lines, *parameters, reverse=reverse, keep_first=keep_first, backend=backend
        )
    if backend not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {backend!r} cannot run: there is no folder sweeps/ beside nn.py; 'auto' and "
            "'reference' can"
        )
    if backend == "auto" and not torch.compiler.is_compiling():
        warnings.warn(
            "sweeps run as an open loop, because there is no folder sweeps/ beside nn.py; with it, "
            "or with the installed package, they are several times faster",
            stacklevel=2,
        )
    return correct_lines_reference(lines, *parameters, reverse=reverse, keep_first=keep_first)


torch.fx.wrap("correct_lines")  # a sweep is one node of a symbolic trace


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


_SWEEPS = _import_sweeps()
