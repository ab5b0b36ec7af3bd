"""The backend `lines`: for each line one matrix product of the vendor's library and one pointwise
kernel.

The product multiplies the gathered neighbours u = [p_{j-1}, p_j, p_{j+1}] of all positions and
images of a line by `weight_ih`. The pointwise kernel (lines_kernels.py, in Triton or in plain
torch) computes from it the gates, the candidate and the corrected line, and writes that line into
the three columns of u for the line visited next. Backward, the sequential part has the same shape:
the kernel computes the gradient of a corrected line, from the incoming gradient and from what the
line visited next sends back, and from it those of the gates, which the product multiplies by
`weight_ih`. What is not sequential is in products.py.

Gates and sums inside the kernels are float32; what passes between kernels is in the products' type.

Launching two kernels a line from Python takes longer than they run on small maps. There a sweep is
captured once for each shape as a CUDA graph and replayed, see graphs.py; its coefficients are
computed again, which takes less time than to copy them out of the graph. Those of large maps are
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import graphs, products
from . import lines_kernels as kernels
from .products import kept  # noqa: F401 - what the backend keeps

# Rows (lines x positions x images) whose matrix products are taken together. On an H100, with 200
# channels and batches of 128 maps of 64x64, 131072 take a tenth less time than 32768.
BLOCK_ROWS = 131072


def unsupported(lines: Tensor, product_dtype: torch.dtype) -> str | None:
    """Why the backend cannot run on lines, with products in a type: it always can."""
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
    coefficients: Tensor | None = None,
) -> Tensor:
    """The corrected lines, see `correct_lines_reference` in nn.py.

    Arguments:
        lines: [line, position, batch, channel]; channels side by side, and in memory nothing
            between positions.
        weight_ih, weight_hh, bias_ih, bias_hh, reverse, keep_first: As for
            `correct_lines_reference`.
        product_dtype: Type of the operands of matrix products.
        coefficients: Are written if they are given, [line, position x image, 5C] in that type.
    """
    tensors = (lines, weight_ih, weight_hh, bias_ih, bias_hh)
    options = (reverse, keep_first, product_dtype)
    if coefficients is not None:
        return _sweep(*tensors, *options, coefficients)[0]
    return graphs.replayed(_sweep, tensors, options)[0]


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
    coefficients: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of lines, weight_ih, weight_hh, bias_ih and bias_hh; `corrected` is the result of
    :func:`sweep`, and `coefficients` what it wrote."""
    if grad_corrected.stride() != lines.stride():
        grad_corrected = torch.empty_like(lines).copy_(grad_corrected)
    tensors = (grad_corrected, lines, weight_ih, weight_hh, bias_ih, bias_hh, corrected)
    options = (reverse, keep_first, product_dtype)
    if coefficients is not None:
        return _sweep_backward(*tensors, *options, coefficients)
    return graphs.replayed(_sweep_backward, tensors, options)


def _sweep(
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
    keep_first: bool,
    product_dtype: torch.dtype,
    coefficients: Tensor | None = None,
) -> tuple[Tensor]:
    _, num_positions, batch, C = lines.shape
    rows = num_positions * batch
    operands = products.Operands.of(weight_ih, weight_hh, bias_ih, bias_hh, product_dtype)
    corrected = torch.empty_like(lines)
    u = lines.new_zeros(rows, 3 * C, dtype=product_dtype)
    from_neighbours = lines.new_zeros(rows, 3 * C, dtype=product_dtype)
    w_ih = operands.weight_ih.t()
    is_first = True
    for block in products.blocks_of(lines, reverse, BLOCK_ROWS):
        own = products.own_products(lines[block.start : block.stop], operands)
        own = own.view(len(block), rows, 3 * C)
        for line in reversed(block) if reverse else block:
            if not is_first:
                torch.mm(u, w_ih, out=from_neighbours)
            kernels.correct(
                lines,
                line,
                from_neighbours,
                own,
                line - block.start,
                operands.bias,
                corrected,
                u,
                coefficients,
                keep=is_first and keep_first,
            )
            is_first = False
    return (corrected,)


def _sweep_backward(
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
    coefficients: Tensor | None = None,
) -> tuple[Tensor, ...]:
    num_lines, num_positions, batch, C = lines.shape
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    w_ih = products.Operands.of(*parameters, product_dtype).weight_ih
    sent_back = lines.new_zeros(num_positions * batch, 3 * C, dtype=product_dtype)
    first = num_lines - 1 if reverse else 0

    def sequential(
        block: range, coefficients: Tensor, grad_gates: Tensor, grad_lines: Tensor
    ) -> None:
        for line in block if reverse else reversed(block):
            at = line - block.start
            arguments = (grad_corrected, line, sent_back, coefficients, grad_gates, at, grad_lines)
            kernels.gradients(*arguments)
            if line != first:
                torch.mm(grad_gates[at, :, : 3 * C], w_ih, out=sent_back)

    return products.backward(
        sequential,
        lines,
        parameters,
        corrected,
        reverse,
        keep_first,
        product_dtype,
        coefficients,
        BLOCK_ROWS,
    )
