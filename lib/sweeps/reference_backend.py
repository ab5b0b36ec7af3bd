"""The backend `reference`: the open loop of nn.py with torch's own gradients, in the form of the
other backends. They are compared with it, and it takes their place where none of them is right."""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(lines: Tensor, product_dtype: torch.dtype) -> str | None:
    """Why it cannot run: it always can."""
    return None


def sweep(
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
    keep_first: bool,
    product_dtype: torch.dtype,
) -> Tensor:
    """The corrected lines, as `correct_lines_reference` in nn.py computes them."""
    from ..nn import correct_lines_reference

    autocast = product_dtype.itemsize == 2  # products of two types need it
    with torch.autocast(lines.device.type, dtype=product_dtype, enabled=autocast):
        corrected = correct_lines_reference(
            lines, weight_ih, weight_hh, bias_ih, bias_hh, reverse=reverse, keep_first=keep_first
        )
    return torch.empty_like(lines).copy_(corrected)  # laid out as the input


def sweep_backward(
    grad_corrected: Tensor,
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    corrected: Tensor,
    reverse: bool,
    keep_first: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of lines, weight_ih, weight_hh, bias_ih and bias_hh."""
    inputs = (lines, weight_ih, weight_hh, bias_ih, bias_hh)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = sweep(*leaves, reverse, keep_first, product_dtype)
        gradients = torch.autograd.grad(output, leaves, grad_corrected, allow_unused=True)
    pairs = zip(leaves, gradients, strict=True)
    return tuple(
        torch.zeros_like(leaf) if gradient is None else torch.empty_like(leaf).copy_(gradient)
        for leaf, gradient in pairs
    )
