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
    arguments = (lines, weight_ih, weight_hh, bias_ih, bias_hh, reverse, keep_first, product_dtype)
    corrected = _reference(*arguments)
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
    # Inside of an operator only the transforms of torch.func can differentiate.
    _, pull_back = torch.func.vjp(
        lambda *tensors: _reference(*tensors, reverse, keep_first, product_dtype), *inputs
    )
    gradients = pull_back(grad_corrected.contiguous())
    own = [torch.empty_like(lines), *(each.new_empty(each.shape) for each in inputs[1:])]
    return tuple(one.copy_(gradient) for one, gradient in zip(own, gradients, strict=True))


def _reference(
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
    keep_first: bool,
    product_dtype: torch.dtype,
) -> Tensor:
    from ..nn import correct_lines_reference

    autocast = product_dtype.itemsize == 2  # products of two types need it
    with torch.autocast(lines.device.type, dtype=product_dtype, enabled=autocast):
        return correct_lines_reference(
            lines, weight_ih, weight_hh, bias_ih, bias_hh, reverse=reverse, keep_first=keep_first
        )
