"""The sweep as an operator of torch, with derivatives of every kind.

A sweep is one operator, and so is its gradient: for `torch.compile`, `torch.export` and CUDA graphs
each is a single node. Traced line by line it would be dozens of nodes a line: a layer of two
directions on 16x16 maps (200 channels, batch 32, one CPU thread) compiles in 22 s like this and in
218 s from the reference's loop, for steps of 1.26 and 1.36 s. The backend is chosen inside, so a
graph that was exported on one device takes the fastest backend of another.

First derivatives are those of the backends. Everything else - second derivatives, forward mode,
the transforms of `torch.func`, complex numbers - goes through the equations of
`correct_lines_reference`, so that it is slower but never wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import graphs, onnx_scan, selection, torch_backend
from .checking import backend_module
from .torch_internals import has_tangent, is_transformed, may_have_saved_tensors_hooks

# The part of a GPU's free memory that one sweep may keep for its backward sweep, for a network has
# many sweeps.
FREE_PART = 1 / 16


def correct_lines(
    lines: Tensor, *parameters: Tensor, reverse: bool, keep_first: bool, backend: str
) -> Tensor:
    """A sweep, see `correct_lines` in nn.py."""
    from ..nn import correct_lines_reference

    if any(parameter.device != lines.device for parameter in parameters):
        where = ", ".join(str(parameter.device) for parameter in parameters)
        raise ValueError(
            f"features are on {lines.device}, parameters on {where}: all must be on one device"
        )
    # The operator knows nothing of other derivatives, nor the backends of complex ones.
    if is_transformed(lines, *parameters) or lines.is_complex():
        return correct_lines_reference(lines, *parameters, reverse=reverse, keep_first=keep_first)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced and torch.onnx.is_in_onnx_export():
        return onnx_scan.correct_lines(lines, *parameters, reverse=reverse, keep_first=keep_first)
    device, product_dtype = lines.device.type, lines.dtype
    if not lines.is_meta and torch.is_autocast_enabled(device):
        # Only products are in autocast's type, and parameters stay as they are.
        lines = lines.float() if lines.dtype == torch.float64 else lines
        product_dtype = torch.get_autocast_dtype(device)
    if lines.stride(-1) != 1 or torch.empty_like(lines, device="meta").stride() != lines.stride():
        lines = lines.contiguous()  # channels side by side, nothing between positions
    differentiable = torch.is_grad_enabled() and any(
        each.requires_grad for each in (lines, *parameters)
    )
    # A trace of torch.jit must not depend on whether gradients are enabled.
    keeps = differentiable and not torch.jit.is_tracing() and _should_keep(lines, product_dtype)
    corrected, _ = SWEEP(lines, *parameters, reverse, keep_first, product_dtype, keeps, backend)
    return corrected


def laid_out_for_sweeps(layer: Callable[..., Tensor], x: Tensor, *more: object) -> Tensor:
    """`layer(x, *more)`, with channels side by side inside of it, as sweeps need them: the input is
    converted once, and the output has the memory format that a convolution's would have."""
    if is_transformed(x):  # whose tensors know no formats; the open loop needs none
        return layer(x, *more)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = layer(x.contiguous(memory_format=torch.channels_last), *more)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return y.contiguous(memory_format=memory_format)


def _should_keep(lines: Tensor, product_dtype: torch.dtype) -> bool:
    """Whether a sweep keeps what the backward sweep could compute again: always on a CPU, and on a
    GPU where there is memory, but not for sweeps that are replayed as graphs, out of which it would
    have to be copied, nor where saved tensors have hooks: activation checkpointing needs the same
    answer twice, however much memory there is by then, and off-loading would move it."""
    if lines.device.type == "cpu":
        return True
    if graphs.is_small(lines):
        return False
    if lines.device.type != "cuda" or torch.compiler.is_compiling():
        return True
    if may_have_saved_tensors_hooks():
        return False
    total = torch.cuda.get_device_properties(lines.device).total_memory
    free = total - torch.cuda.memory_allocated(lines.device)
    return 5 * lines.numel() * product_dtype.itemsize <= FREE_PART * free


def _kept(
    lines: Tensor, product_dtype: torch.dtype, keeps: bool, backend: str
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of what a sweep keeps for the backward sweep, besides its input and output. It
    depends on nothing that is measured, so that it is known when the operator is traced."""
    if not keeps:
        return (0,), product_dtype
    if backend == "torch" or lines.device.type == "cpu":
        return torch_backend.kept(lines, product_dtype)
    from . import products  # which imports Triton

    return products.kept(lines, product_dtype)


def _sweep(
    lines,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    reverse,
    keep_first,
    product_dtype,
    keeps,
    backend,
):
    arguments = (lines, weight_ih, weight_hh, bias_ih, bias_hh, reverse, keep_first, product_dtype)
    shape, dtype = _kept(lines, product_dtype, keeps, backend)
    kept = lines.new_empty(shape, dtype=dtype)
    with torch.autocast(lines.device.type, enabled=False), torch.cuda.device_of(lines):
        module = backend_module(selection.resolve(backend, lines, product_dtype))
        if _uses(module, lines, product_dtype, kept):
            arguments = (*arguments, kept)
        return module.sweep(*arguments), kept


def _uses(module, lines, product_dtype, kept) -> bool:
    """Whether a backend writes and reads what is kept."""
    what = module.kept(lines, product_dtype) if hasattr(module, "kept") else None
    return (kept.shape, kept.dtype) == what


def _sweep_shapes(lines, *arguments):
    *_, product_dtype, keeps, backend = arguments
    shape, dtype = _kept(lines, product_dtype, keeps, backend)
    return torch.empty_like(lines), lines.new_empty(shape, dtype=dtype)


def _save_for_backward(ctx, inputs, output):
    *tensors, reverse, keep_first, product_dtype, _, backend = inputs
    corrected, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # or there would be zeros for what is kept
    ctx.save_for_backward(*tensors, corrected, kept)
    ctx.options = (reverse, keep_first, product_dtype, backend)


def _differentiate(ctx, grad_corrected, _):
    if grad_corrected is None:
        return (None,) * 10
    tensors = ctx.saved_tensors  # once: activation checkpointing computes them again each time
    # The gradient is to be differentiated itself, backward or forward.
    if torch.is_grad_enabled() or has_tangent(grad_corrected, *tensors):
        return *_reference_gradients(grad_corrected, tensors[:5], ctx.options), *(None,) * 5
    return *SWEEP_BACKWARD(grad_corrected, *tensors, *ctx.options), *(None,) * 5


def _reference_gradients(grad_corrected, inputs, options):
    """Gradients of lines and parameters in operations that torch can differentiate again."""
    from ..nn import correct_lines_reference

    reverse, keep_first, product_dtype, _ = options
    autocast = product_dtype.itemsize == 2  # products of two types need it
    with torch.autocast(inputs[0].device.type, dtype=product_dtype, enabled=autocast):
        _, pull_back = torch.func.vjp(
            lambda *tensors: correct_lines_reference(
                *tensors, reverse=reverse, keep_first=keep_first
            ),
            *inputs,
        )
    return pull_back(grad_corrected)


def _sweep_backward(
    grad_corrected,
    lines,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    corrected,
    kept,
    reverse,
    keep_first,
    product_dtype,
    backend,
):
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    arguments = (
        grad_corrected,
        lines,
        *parameters,
        corrected,
        reverse,
        keep_first,
        product_dtype,
    )
    with torch.autocast(lines.device.type, enabled=False), torch.cuda.device_of(lines):
        module = backend_module(selection.resolve(backend, lines, product_dtype))
        if _uses(module, lines, product_dtype, kept):
            arguments = (*arguments, kept)
        return module.sweep_backward(*arguments)


def _sweep_backward_shapes(grad_corrected, lines, *tensors):
    return torch.empty_like(lines), *(each.new_empty(each.shape) for each in tensors[:4])


def _refuse(*_):
    raise RuntimeError(
        "the gradient of a sweep was computed without create_graph=True and cannot be "
        "differentiated again"
    )


def _operator(name: str, signature: str, run, shapes, backward, setup_context=None):
    """Registers an operator, unless it exists, and returns it.

    Names are the process's, but this file may be loaded more than once: in a package and as a copy,
    or reloaded. All share the operators of the first, so that a stored graph always names the same
    operator. The version in the name changes with the signature or the meaning.
    """
    if not hasattr(torch.ops.sdn, name):
        # Views of features lie as the layer made them; a compiler must not lay them out in another
        # way.
        exact = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
        torch.library.define(f"sdn::{name}", signature, tags=(torch.Tag.pt2_compliant_tag, exact))
        torch.library.impl(f"sdn::{name}", "default", run)
        torch.library.register_fake(f"sdn::{name}", shapes)
        torch.library.register_autograd(f"sdn::{name}", backward, setup_context=setup_context)
    return getattr(torch.ops.sdn, name).default


_PARAMETERS = "Tensor lines, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh"
SWEEP = _operator(
    "sweep_v1",
    f"({_PARAMETERS}, bool reverse, bool keep_first, ScalarType product_dtype, "
    "bool keeps, str backend) -> (Tensor corrected, Tensor kept)",
    _sweep,
    _sweep_shapes,
    _differentiate,
    _save_for_backward,
)
SWEEP_BACKWARD = _operator(
    "sweep_backward_v1",
    f"(Tensor grad_corrected, {_PARAMETERS}, Tensor corrected, Tensor kept, bool reverse, "
    "bool keep_first, ScalarType product_dtype, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sweep_backward,
    _sweep_backward_shapes,
    _refuse,
)


def _flops_per_feature(num_products: int):
    """Multiplications and additions of a sweep's products: 12 C x C matrices for each position."""

    def flops(lines_shape, *_, out_shape=None, **__) -> int:
        num_lines, num_positions, batch, C = lines_shape
        return num_products * 24 * num_lines * num_positions * batch * C**2

    return flops


for _name, _products in (("sweep_v1", 1), ("sweep_backward_v1", 2)):
    _packet = getattr(torch.ops.sdn, _name)
    if _packet not in flop_registry:
        register_flop_formula(_packet)(_flops_per_feature(_products))
