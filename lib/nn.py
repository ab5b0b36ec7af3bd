r"""Spatial dependency layers, drop-in replacements for convolutions in networks that produce
images.

Reference: Miladinović et al., "Spatial Dependency Networks: Neural Layers for Improved Generative
Image Modeling", ICLR 2021, section 2 and Algorithm 1.

This file needs PyTorch and the standard library only and works as a single copied file::

    from nn import SDNLayer
    layer = SDNLayer(64, 64, num_features=100, dirs=[0, 2], kernel_size=3, stride=1, padding=1,
    upsample=False) y = layer(torch.randn(8, 64, 32, 32))  # [8, 64, 32, 32]
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

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
BACKENDS = ("auto", "reference", "torch", "triton")
KERNEL_FILES = ("sweeps/triton_backend.py", "sweeps/triton_kernels.py")

# Rows (lines x positions x images) whose matrix products are taken together; on a CPU they should
# stay in its cache.
BLOCK_ROWS_CPU = 4096
BLOCK_ROWS_GPU = 32768


class SDNLayer(nn.Module):
    r"""Spatial dependency layer (paper, section 2): project-in, directional correction sweeps,
    project-out.

    1. *Project-in*: `Conv2d(in_ch, num_features, ...)`, or `ConvTranspose2d` if `upsample`; then
      tanh.
    2. *Correction*: one :class:`Sweep` for each entry of `dirs`, in that order, each with weights
      of its own.
    3. *Project-out*: `Conv2d(num_features, out_ch, 1)`.

    With all four directions every output position depends on every input position. With fewer some
    depend on a part of
    the input only: with `dirs=[0, 2]` the top left output depends on the top left input alone.

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
        backend: `"reference"` (open loop, plain autograd, the oracle), `"torch"` (fast,
            hand-written gradient), `"triton"` (kernels for CUDA devices, in sweep_triton.py and
            sweep_kernels.py beside this file) or `"auto"` (the fastest that is available). The
            parameters and their names are the same for all.

    Shapes:
        - input: :math:`[B, \text{in\_ch}, H, W]`, any :math:`H, W \ge 1`, any memory format.
        - output: :math:`[B, \text{out\_ch}, H', W']` with the convolution's :math:`H', W'`.

    Raises:
        ValueError: on arguments that cannot work, or an input of another shape; the message says
            what is allowed.

    Example:
        >>> layer = SDNLayer(3, 8, num_features=16, dirs=[0, 1, 2, 3], kernel_size=3, stride=1, padding=1)
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
        x = x.contiguous(memory_format=torch.channels_last)  # what the sweeps need: converted once
        features = torch.tanh(self.project_in_stage(x))  # [B, C, H', W']
        for sweep in self.sdn_correction_stage:
            features = sweep(features)  # [B, C, H', W']
        return self.project_out_stage(features).contiguous(
            memory_format=memory_format
        )  # [B, out_ch, H', W']


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
        x = x.contiguous(memory_format=torch.channels_last)
        corrected, gate = self.sdn(x).chunk(2, dim=1)  # 2 x [B, out_ch, H', W']
        y = torch.lerp(corrected, self.cnn(x).to(corrected.dtype), torch.sigmoid(gate))
        return y.contiguous(memory_format=memory_format)


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
        backend: `"auto"`, `"reference"`, `"torch"` or `"triton"`, see :class:`SDNLayer`.

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
        self.backend = backend
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
    """The same as :func:`correct_lines_reference`, arguments and result too, with a choice of
    `backend`.

    Raises:
        RuntimeError: with `backend="triton"` where its kernels cannot run.
        ValueError: with `backend="triton"` for float64, and for tensors that are not on a CUDA
            device; for tensors on several devices.
    """
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    if any(parameter.device != lines.device for parameter in parameters):
        where = ", ".join(str(parameter.device) for parameter in parameters)
        raise ValueError(
            f"features are on {lines.device}, parameters on {where}: all must be on one device"
        )
    if backend == "reference":
        return correct_lines_reference(lines, *parameters, reverse=reverse, keep_first=keep_first)
    device, product_dtype = lines.device.type, lines.dtype
    if _autocasts(lines):  # only products are in its type, and parameters stay as they are
        lines, product_dtype = lines.to(_features_dtype(lines)), torch.get_autocast_dtype(device)
    if lines.stride(-1) != 1 or torch.empty_like(lines, device="meta").stride() != lines.stride():
        lines = lines.contiguous()  # channels side by side, nothing between positions
    differentiable = torch.is_grad_enabled() and any(
        each.requires_grad for each in (lines, *parameters)
    )
    corrected, _ = _SWEEP(
        lines, *parameters, reverse, keep_first, product_dtype, differentiable, backend
    )
    return corrected


# A sweep is one operator of torch, and so is its gradient: for torch.compile, torch.export and CUDA
# graphs each is a single node. Traced, it would be dozens of nodes a line: a layer of two
# directions on 16x16 maps (200 channels, batch 32, one CPU thread) compiles in 22 s like this and
# in 218 s from the reference's loop, for steps of 1.26 and 1.36 s. The backend is chosen inside: a
# graph that was exported on one device takes the fastest of another.


def _sweep(
    lines,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    reverse,
    keep_first,
    product_dtype,
    differentiable,
    backend,
):
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    with torch.autocast(lines.device.type, enabled=False):
        if _resolved(backend, lines, product_dtype) == "triton":
            corrected = _triton_kernels().sweep(
                lines, *parameters, reverse, keep_first, product_dtype
            )
            return corrected, lines.new_empty(0, dtype=_state_dtype(lines))
        return _sweep_torch(lines, *parameters, reverse, keep_first, product_dtype, differentiable)


def _sweep_shapes(
    lines, weight_ih, weight_hh, bias_ih, bias_hh, reverse, keep_first, product_dtype, *how
):
    num_lines, num_positions, batch, C = lines.shape
    differentiable, backend = how
    stores = differentiable and _resolved(backend, lines, product_dtype) == "torch"
    gates = (num_lines, num_positions * batch, 4 * C) if stores else (0,)
    return torch.empty_like(lines), lines.new_empty(gates, dtype=_state_dtype(lines))


def _save_for_backward(ctx, inputs, output):
    (
        lines,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        reverse,
        keep_first,
        product_dtype,
        _,
        backend,
    ) = inputs
    corrected, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)  # or there would be zeros for the gates
    ctx.save_for_backward(lines, weight_ih, weight_hh, bias_ih, bias_hh, corrected, gates)
    ctx.options = (reverse, keep_first, product_dtype, backend)


def _differentiate(ctx, grad_corrected, _):
    if grad_corrected is None:
        return (None,) * 10
    return (
        *_SWEEP_BACKWARD(grad_corrected, *ctx.saved_tensors, *ctx.options),
        None,
        None,
        None,
        None,
        None,
    )


def _sweep_backward(
    grad_corrected,
    lines,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    corrected,
    gates,
    reverse,
    keep_first,
    dtype,
    backend,
):
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    with torch.autocast(lines.device.type, enabled=False):
        if _resolved(backend, lines, dtype) == "triton":
            sweep_backward = _triton_kernels().sweep_backward
            return sweep_backward(
                grad_corrected, lines, *parameters, corrected, reverse, keep_first, dtype
            )
        return _sweep_backward_torch(
            grad_corrected,
            lines,
            weight_ih,
            weight_hh,
            corrected,
            gates,
            reverse,
            keep_first,
            dtype,
        )


def _sweep_backward_shapes(grad_corrected, lines, weight_ih, weight_hh, bias_ih, bias_hh, *_):
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    return torch.empty_like(lines), *(each.new_empty(each.shape) for each in parameters)


def _refuse(*_):
    raise RuntimeError(
        "a sweep is once_differentiable: only backend='reference' has second derivatives"
    )


def _operator(name: str, signature: str, run, shapes, backward, setup_context=None):
    """Registers an operator, under another name if there is one already, and returns it.

    Names are the process's, but this file may be there more than once: in a package and as a copy,
    reloaded, or in several versions. Each registers operators of its own, which stay for as long as
    the process, as does what was compiled with them. The version in the name tells stored graphs of
    an older signature from those of this one.
    """
    unique, number = name, 1
    while hasattr(torch.ops.sdn, unique):
        number += 1
        unique = f"{name}_copy{number}"
    # Views of features lie as the layer made them; a compiler must not lay them out in another way.
    exact = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    torch.library.define(f"sdn::{unique}", signature, tags=(torch.Tag.pt2_compliant_tag, exact))
    torch.library.impl(f"sdn::{unique}", "default", run)
    torch.library.register_fake(f"sdn::{unique}", shapes)
    torch.library.register_autograd(f"sdn::{unique}", backward, setup_context=setup_context)
    return getattr(torch.ops.sdn, unique).default


_PARAMETERS = "Tensor lines, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh"
_SWEEP = _operator(
    "sweep_v1",
    f"({_PARAMETERS}, bool reverse, bool keep_first, ScalarType product_dtype, bool differentiable, str backend) "
    "-> (Tensor corrected, Tensor gates)",
    _sweep,
    _sweep_shapes,
    _differentiate,
    _save_for_backward,
)
_SWEEP_BACKWARD = _operator(
    "sweep_backward_v1",
    f"(Tensor grad_corrected, {_PARAMETERS}, Tensor corrected, Tensor gates, bool reverse, bool keep_first, "
    "ScalarType product_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sweep_backward,
    _sweep_backward_shapes,
    _refuse,
)


def _resolved(backend: str, lines: Tensor, product_dtype: torch.dtype) -> str:
    """`"torch"` or `"triton"`, for lines on a device and products in a type; raises as
    :func:`correct_lines` says."""
    device = lines.device.type
    automatic = backend == "auto"
    if backend == "torch" or automatic and (device != "cuda" or product_dtype == torch.float64):
        return "torch"
    if reason := _why_not_triton(lines.device if device == "cuda" else None):
        if automatic:
            _warn_once(f"sweeps use backend 'torch', not the faster 'triton': {reason}")
            return "torch"
        raise RuntimeError(f"backend 'triton' cannot run: {reason}; 'torch' and 'reference' can")
    if device != "cuda" and not _triton_kernels().INTERPRETED:
        raise ValueError(
            f"backend 'triton' needs a CUDA device, got {device}; 'torch' and 'reference' do not"
        )
    if product_dtype == torch.float64:
        raise ValueError("backend 'triton' does not compute in float64; 'torch' and 'reference' do")
    return "triton"


@functools.cache
def _why_not_triton(device: torch.device | None) -> str | None:
    kernels = _triton_kernels()
    return (
        f"there is no {' and '.join(KERNEL_FILES)} beside nn.py"
        if kernels is None
        else kernels.available(device)
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The module sweep_triton that lies beside this file, if there is one."""
    folder = Path(__file__).parent
    if not all((folder / name).exists() for name in KERNEL_FILES):
        return None
    if __package__:
        return importlib.import_module(".sweeps.triton_backend", __package__)
    # A copy outside of a package must not take another copy's kernels: its folder becomes one of a
    # name of its own.
    specification = importlib.util.spec_from_file_location(
        f"{__name__}_sweep_triton",
        folder / KERNEL_FILES[0],
        submodule_search_locations=[str(folder / "sweeps")],
    )
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def _sweep_torch(
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
    keep_first: bool,
    product_dtype: torch.dtype,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:
    """A sweep, and if it is `differentiable` its gates [line, position x batch, 4C], else an empty
    tensor.

    What makes it fast: a line's own features are known before it is visited, so their products with
    `weight_hh` are taken for many lines at once; gates are computed in place, side by side as [W_hn
    h + b_hn, r, z, n], so that the products with `weight_hh` fill the first three and those with
    `weight_ih` the last three; and the backward sweep takes the products of all gradients block by
    block, in buffers that are small enough to stay in the processor's cache and are never stored.
    Kept for the backward sweep: input, output and gates, six numbers per feature.
    """
    num_lines, num_positions, batch, C = lines.shape
    rows, state = num_positions * batch, _state_dtype(lines)
    w_ih, w_own = weight_ih.to(product_dtype), _candidate_first(weight_hh).to(product_dtype)
    bias = torch.cat([bias_hh[2 * C :], bias_ih[: 2 * C] + bias_hh[: 2 * C], bias_ih[2 * C :]])

    blocks = _blocks(lines, reverse)
    longest = max(block.stop - block.start for block in blocks)
    # Gates, which are pre-activations first.
    stored = lines.new_empty(num_lines if differentiable else longest, rows, 4 * C, dtype=state)
    by_parts = _by_parts(lines)
    parts = [part.t() for part in w_ih.split(C, dim=1)]
    neighbours = (
        None if by_parts else lines.new_zeros(1, num_positions, batch, 3 * C, dtype=product_dtype)
    )
    candidate = lines.new_empty(num_positions, batch, C, dtype=state)
    corrected = torch.empty_like(lines)
    previous = None
    for block in blocks:
        first = block.start if differentiable else 0
        gates = stored[first : first + block.stop - block.start]
        gates[:] = bias
        own = lines[block].reshape(-1, C).to(product_dtype)
        _add_product(gates.view(-1, 4 * C)[:, : 3 * C], own, w_own.t())
        for line in _indices(block, reverse):
            g = gates[line - block.start]
            if keep_first and previous is None:
                corrected[line] = lines[line]
            else:
                if previous is not None and by_parts:
                    _add_products(
                        g[:, C:],
                        corrected[previous].reshape(rows, C).to(product_dtype),
                        parts,
                        batch,
                    )
                elif previous is not None:
                    _gather_neighbours(corrected[previous : previous + 1], out=neighbours)
                    _add_product(g[:, C:], neighbours.view(rows, 3 * C), w_ih.t())
                g[:, C : 3 * C].sigmoid_()
                candidate_own, r, z, n = g.view(num_positions, batch, 4 * C).split(C, dim=-1)
                torch.addcmul(
                    n, r, candidate_own, out=candidate
                ).tanh_()  # tanh is slow on a part of a row
                n.copy_(candidate)
                if lines.dtype == state:
                    torch.lerp(candidate, lines[line], z, out=corrected[line])
                else:
                    corrected[line] = torch.lerp(candidate, lines[line].to(state), z)
            previous = line
    return corrected, stored if differentiable else stored.new_empty(0)


def _sweep_backward_torch(
    grad_corrected: Tensor,
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    corrected: Tensor,
    gates: Tensor,
    reverse: bool,
    keep_first: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of lines, weight_ih, weight_hh, bias_ih and bias_hh."""
    num_lines, num_positions, batch, C = lines.shape
    rows, state = num_positions * batch, gates.dtype
    w_ih, w_own = weight_ih.to(product_dtype), _candidate_first(weight_hh).to(product_dtype)
    if grad_corrected.stride(-1) != 1:
        grad_corrected = grad_corrected.contiguous()

    grad_lines = torch.empty_like(lines)
    grad_w_ih = lines.new_zeros(3 * C, 3 * C, dtype=state)
    grad_w_own = lines.new_zeros(3 * C, C, dtype=state)
    grad_bias = lines.new_zeros(4 * C, dtype=state)
    blocks = _blocks(lines, reverse)
    longest = max(block.stop - block.start for block in blocks)
    grad_gates_buffer = gates.new_empty(
        longest, num_positions, batch, 4 * C
    )  # of the pre-activations
    grad_own_buffer = lines.new_empty(longest, num_positions, batch, C, dtype=state)
    neighbours_buffer = lines.new_zeros(longest, num_positions, batch, 3 * C, dtype=product_dtype)
    # What each position j of the line visited next sends back to the values at j-1, j, j+1 of this
    # one.
    by_parts = _by_parts(lines)
    parts = [part.contiguous() for part in reversed(w_ih.split(C, dim=1))]
    sent_back = (
        None if by_parts else lines.new_zeros(num_positions, batch, 3 * C, dtype=product_dtype)
    )
    visited_next = None
    total = lines.new_empty(num_positions, batch, C, dtype=state)
    first_visited = num_lines - 1 if reverse else 0

    for block in reversed(blocks):
        length = block.stop - block.start
        grad_gates, grad_own = grad_gates_buffer[:length], grad_own_buffer[:length]
        for line in reversed(_indices(block, reverse)):
            if by_parts:
                total.copy_(grad_corrected[line])
                if (
                    visited_next is not None
                ):  # its gradients stay where they are until this line's are known
                    _add_products(total.view(rows, C), visited_next.to(product_dtype), parts, batch)
            else:
                torch.add(grad_corrected[line].to(state), sent_back[..., C : 2 * C], out=total)
                total[:-1] += sent_back[1:, :, :C]
                total[1:] += sent_back[:-1, :, 2 * C :]
            g, g_own = grad_gates[line - block.start], grad_own[line - block.start]
            if keep_first and line == first_visited:
                g.zero_()
                g_own.copy_(total)
                continue
            saved = gates[line].view(num_positions, batch, 4 * C)
            candidate_own, r, z, n = saved.split(C, dim=-1)
            g_candidate_own, g_r, g_z, g_n = g.split(C, dim=-1)
            torch.mul(total, z, out=g_own)
            torch.sub(lines[line], n, out=g_z).mul_(total)
            torch.ops.aten.tanh_backward.grad_input(total.sub_(g_own), n, grad_input=g_n)
            torch.mul(g_n, r, out=g_candidate_own)
            torch.mul(g_n, candidate_own, out=g_r)
            g_rz = g[..., C : 3 * C]
            torch.ops.aten.sigmoid_backward.grad_input(g_rz, saved[..., C : 3 * C], grad_input=g_rz)
            visited_next = g.view(rows, 4 * C)[:, C:]
            if line != first_visited and not by_parts:
                torch.mm(visited_next.to(product_dtype), w_ih, out=sent_back.view(rows, 3 * C))

        flat = grad_gates.view(-1, 4 * C)
        grad_bias += flat.sum(0)
        flat = flat.to(product_dtype)
        _add_product(grad_own.view(-1, C), flat[:, : 3 * C], w_own)
        grad_lines[block] = grad_own
        _add_product(
            grad_w_own, flat[:, : 3 * C].t(), lines[block].reshape(-1, C).to(product_dtype)
        )
        # The lines of the block that have a previous line, and those previous lines.
        shift = 1 if reverse else -1
        start, stop = max(block.start, -shift), min(block.stop, num_lines - shift)
        neighbours = neighbours_buffer[: stop - start]
        _gather_neighbours(corrected[start + shift : stop + shift], out=neighbours)
        flat = flat[(start - block.start) * rows : (stop - block.start) * rows, C:]
        _add_product(grad_w_ih, flat.t(), neighbours.view(-1, 3 * C))

    grad_candidate_own, grad_rz = grad_w_own.split([C, 2 * C])
    return (
        grad_lines,
        grad_w_ih.to(weight_ih.dtype),
        torch.cat([grad_rz, grad_candidate_own]).to(weight_hh.dtype),
        grad_bias[C:].to(weight_ih.dtype, copy=True),
        torch.cat([grad_bias[C : 3 * C], grad_bias[:C]]).to(weight_hh.dtype),
    )


def _features_dtype(lines: Tensor) -> torch.dtype:
    """Of a sweep's result."""
    return torch.float32 if _autocasts(lines) and lines.dtype == torch.float64 else lines.dtype


def _state_dtype(lines: Tensor) -> torch.dtype:
    """Of what the `torch` backend computes between products, and of the gates that it keeps."""
    return torch.promote_types(lines.dtype, torch.float32)


def _autocasts(lines: Tensor) -> bool:
    return not lines.is_meta and torch.is_autocast_enabled(
        lines.device.type
    )  # tensors without content have none


def _memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that a convolution's output would have."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _candidate_first(weight_hh: Tensor) -> Tensor:
    """The rows of the gates r, z, n in the order n, r, z."""
    rz, n = weight_hh.split([2 * weight_hh.shape[1], weight_hh.shape[1]])
    return torch.cat([n, rz])


def _blocks(lines: Tensor, reverse: bool) -> list[slice]:
    """Runs of lines, in the order of visiting, that are long enough for matrix products to be
    efficient."""
    num_lines, num_positions, batch, _ = lines.shape
    rows = BLOCK_ROWS_CPU if lines.device.type == "cpu" else BLOCK_ROWS_GPU
    length = min(num_lines, max(1, rows // max(1, num_positions * batch)))
    blocks = [slice(start, min(start + length, num_lines)) for start in range(0, num_lines, length)]
    return blocks[::-1] if reverse else blocks


def _indices(block: slice, reverse: bool) -> range:
    """The lines of a block in the order of visiting."""
    return range(block.stop - 1, block.start - 1, -1) if reverse else range(block.start, block.stop)


def _gather_neighbours(previous: Tensor, out: Tensor) -> None:
    """Writes [p[j-1], p[j], p[j+1]] for lines [line, position, batch, C]; beyond the edges `out`
    stays as it is."""
    C = previous.shape[-1]
    out[:, 1:, :, :C] = previous[:, :-1]
    out[..., C : 2 * C] = previous
    out[:, :-1, :, 2 * C :] = previous[:, 1:]


def _by_parts(lines: Tensor) -> bool:
    """Whether the three neighbours are multiplied one after another, instead of being gathered for
    one product: on a CPU the copies take longer than the sums, on a GPU two more launches do."""
    return lines.device.type == "cpu"


def _add_products(
    accumulator: Tensor, previous: Tensor, parts: Sequence[Tensor], batch: int
) -> None:
    """Adds products of the neighbours j-1, j, j+1 of a line, rows (position, image), with a factor
    for each."""
    before, same, after = parts
    _add_product(accumulator, previous, same)
    _add_product(accumulator[batch:], previous[: len(previous) - batch], before)
    _add_product(accumulator[: len(previous) - batch], previous[batch:], after)


def _add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """`accumulator += a @ b` in place; the accumulator's type may be wider than the factors'."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    else:
        accumulator += a @ b


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
