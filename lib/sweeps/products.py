"""The parts of a sweep that are not sequential, as matrix products of many lines at once: shared by
the backends `lines` and `cluster`.

Forward, a line's own features are multiplied by `weight_hh` before it is visited. Backward, the
sequential part needs the coefficients

    a_n = (1 - z)(1 - n^2),   a_r = a_m m (1 - r),   a_z = (h - n) z (1 - z),   a_m = a_n r,   z

with m = W_hn h + b_hn, because the gradients of n, r, z, m are t times the first four, and the part
that reaches h through z is t z, for the gradient t of a corrected value. They are kept by the
forward sweep, or computed again from its input and output. Gradients of the parameters are products
of those of the gates with the operands of the forward sweep; a column of ones among these makes the
sums that are the gradients of the biases.

Rows are in the order [line, position, image]: a neighbouring position is `batch` rows away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import lines_kernels as kernels

PADDING = 8  # columns beside an operand: one of ones, and zeros that keep rows aligned
# Whether torch can write the product of bfloat16 matrices in float32.
WRITES_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


class Operands(NamedTuple):
    """The parameters of a sweep as its products need them.

    weight_ih has the rows of the gates n, r, z, and both weights are in the products' type. bias
    has those of n, r, z, m, in float32 or, if the
    products are in it, float64.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        dtype: torch.dtype,
    ) -> Operands:
        C = weight_hh.shape[1]
        state = torch.promote_types(dtype, torch.float32)
        ih, hh = bias_ih.to(state), bias_hh.to(state)
        bias = torch.cat([ih[2 * C :], ih[: 2 * C] + hh[: 2 * C], hh[2 * C :]])
        in_order = torch.cat([weight_ih[2 * C :], weight_ih[: 2 * C]])
        return cls(in_order.to(dtype), weight_hh.to(dtype), bias)


def blocks_of(lines: Tensor, reverse: bool, block_rows: int) -> list[range]:
    """Runs of lines in the order of visiting, of about so many rows each; none if there are no
    numbers."""
    num_lines, num_positions, batch, _ = lines.shape
    length = min(num_lines, max(1, block_rows // max(1, num_positions * batch)))
    starts = range(0, num_lines, length) if lines.numel() else ()
    blocks = [range(start, min(start + length, num_lines)) for start in starts]
    return blocks[::-1] if reverse else blocks


def kept(lines: Tensor, product_dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of what a forward sweep keeps for the backward sweep: the coefficients."""
    num_lines, num_positions, batch, C = lines.shape
    return (num_lines, num_positions * batch, 5 * C), product_dtype


def own_products(lines: Tensor, operands: Operands) -> Tensor:
    """`lines @ weight_hh^T`, [line x position x image, 3C] in the products' type."""
    h = lines.to(operands.weight_hh.dtype).reshape(-1, lines.shape[-1])
    return h @ operands.weight_hh.t()


def backward(
    sequential: Callable[[range, Tensor, Tensor, Tensor], None],
    lines: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    corrected: Tensor,
    reverse: bool,
    keep_first: bool,
    dtype: torch.dtype,
    coefficients: Tensor | None,
    block_rows: int,
) -> tuple[Tensor, ...]:
    """Gradients of lines, weight_ih, weight_hh, bias_ih and bias_hh.

    Arguments:
        sequential: Called with a block, its coefficients [line, row, 5C], and where to write the
            gradients of its gates [line, row, 4C] and the part of the lines' gradients that comes
            through z, [line, position, image, C] of all lines; blocks in reverse order of visiting.
        parameters: weight_ih, weight_hh, bias_ih, bias_hh.
        corrected: The sweep's result.
        dtype: Type of the operands of products.
        coefficients: Those that the forward sweep kept, [line, row, 5C], or None.
        block_rows: How many rows are computed together, about.
    """
    num_lines, num_positions, batch, C = lines.shape
    rows = num_positions * batch
    operands = Operands.of(*parameters, dtype)
    blocks = blocks_of(lines, reverse, block_rows)
    longest = max(map(len, blocks), default=0)
    grad_lines = torch.empty_like(lines)
    u = lines.new_empty(longest * rows, 3 * C + PADDING, dtype=dtype)
    h = lines.new_empty(longest * rows, C + PADDING, dtype=dtype)
    for operand, width in ((u, 3 * C), (h, C)):
        operand[:, width:] = 0
        operand[:, width] = 1
    grad_gates = lines.new_empty(longest, rows, 4 * C, dtype=dtype)
    if coefficients is None:
        buffer = lines.new_empty(longest, rows, 5 * C, dtype=dtype)
    by_ih = lines.new_zeros(3 * C, 3 * C + PADDING, dtype=operands.bias.dtype)
    by_hh = lines.new_zeros(3 * C, C + PADDING, dtype=operands.bias.dtype)
    first = num_lines - 1 if reverse else 0
    for block in reversed(blocks):
        inside, num_rows = slice(block.start, block.stop), len(block) * rows
        block_u, block_h, block_gates = u[:num_rows], h[:num_rows], grad_gates[: len(block)]
        kernels.gather(corrected, u, block, 1 if reverse else -1)
        block_h.view(len(block), num_positions, batch, -1)[..., :C] = lines[inside]
        if coefficients is None:
            block_coefficients = buffer[: len(block)]
            kernels.coefficients(
                lines[inside],
                block_u[:, : 3 * C] @ operands.weight_ih.t(),
                block_h[:, :C] @ operands.weight_hh.t(),
                operands.bias,
                block_coefficients.view(-1, 5 * C),
                kept=first - block.start if keep_first and first in block else -1,
            )
        else:
            block_coefficients = coefficients[inside]
        sequential(block, block_coefficients, block_gates, grad_lines)
        flat = block_gates.view(-1, 4 * C)
        by_ih += _product(flat[:, : 3 * C].t(), block_u)
        by_hh += _product(flat[:, C:].t(), block_h)
        through_own = flat[:, C:] @ operands.weight_hh
        grad_lines[inside] += through_own.view(len(block), num_positions, batch, C)
    grad_w_ih, grad_bias_ih = by_ih[:, : 3 * C].roll(-C, 0), by_ih[:, 3 * C].roll(-C)
    gradients = (grad_w_ih, by_hh[:, :C], grad_bias_ih, by_hh[:, C])
    pairs = zip(gradients, parameters, strict=True)
    return grad_lines, *(each.to(like.dtype).contiguous() for each, like in pairs)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of operands in any type, in float32 at least."""
    if WRITES_FLOAT32 and a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))
