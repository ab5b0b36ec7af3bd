"""The pointwise parts of the backends `lines` and `cluster`: Triton kernels on a CUDA device, plain
torch elsewhere.

Rows are in the order [line, position, image]. Arrays of gates hold, side by side, n, r, z (products
with `weight_ih`), r, z, m (products with `weight_hh`, m being the candidate's own part), n, r, z, m
(biases, and gradients), and a_n, a_r, a_z, a_m, z (coefficients).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .preflight import why_no_triton

try:
    import triton
    import triton.language as tl

    VARYING = (
        "line own_line block_line rows batch num_positions line_stride position_stride "
        "image_stride to_line_stride to_position_stride to_image_stride kept first_line last_line"
    ).split()
    jit = triton.jit(do_not_specialize=VARYING)
except ImportError:
    triton, jit = None, lambda function: function

SIZE = 1024  # elements of a program
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def correct(
    lines: Tensor,
    line: int,
    from_neighbours: Tensor,
    own: Tensor,
    own_line: int,
    bias: Tensor,
    corrected: Tensor,
    u: Tensor,
    coefficients: Tensor | None,
    *,
    keep: bool,
) -> None:
    """Writes a corrected line, and the operand of the product for the line visited next.

    Arguments:
        lines: Features before the sweep, [line, position, image, C].
        line: Which of them is corrected.
        from_neighbours: [position x image, 3C]; zeros where there is no previous line.
        own, own_line: [line, position x image, 3C] of a block of lines, and the line's place in it.
        bias: [4C], in the type of gates.
        corrected: The line is written, [line, position, image, C].
        u: Is written, [position x image, 3C]; zeros beyond the edges stay.
        coefficients: The line is written if they are given, [line, position x image, 5C].
        keep: Whether the line stays as it is.
    """
    _, num_positions, batch, C = lines.shape
    if _in_triton(lines):
        keeps = coefficients is not None
        rows = num_positions * batch
        correct_kernel[(triton.cdiv(rows * C, SIZE),)](
            lines,
            from_neighbours,
            own,
            bias,
            corrected,
            u,
            coefficients if keeps else u,
            line,
            own_line,
            rows,
            batch,
            *_row_strides(lines),
            C=C,
            KEEP=keep,
            KEEPS=keeps,
            SIZE=SIZE,
        )
        return
    h = _wide(lines[line])
    n, r, z, m = gates = _gates(from_neighbours, own[own_line], bias, h.shape)
    value = h if keep else n + z * (h - n)
    corrected[line] = value
    if coefficients is not None:
        coefficients[line] = _coefficients(h, *gates, keep).reshape(-1, 5 * C)
    columns = u.view(num_positions, batch, 3 * C)
    columns[1:, :, :C] = value[:-1]
    columns[..., C : 2 * C] = value
    columns[:-1, :, 2 * C :] = value[1:]


def gather(corrected: Tensor, u: Tensor, lines: range, shift: int) -> None:
    """Writes the operands u = [p[j-1], p[j], p[j+1]] of a block of lines.

    Arguments:
        corrected: Corrected lines, [line, position, image, C].
        u: Is written, [line x position x image, 3C or more columns], or longer; columns beyond 3C
            stay. Zeros beyond the edges, and where there is no previous line.
        lines: The block.
        shift: From a line to the one visited before it.
    """
    num_lines, num_positions, batch, C = corrected.shape
    rows = len(lines) * num_positions * batch
    if _in_triton(corrected):
        sizes = (rows, batch, num_positions, *_row_strides(corrected))
        grid = (triton.cdiv(rows * C, SIZE),)
        bounds = (lines.start + shift, num_lines)
        gather_kernel[grid](corrected, u, *sizes, *bounds, C=C, WIDTH=u.stride(0), SIZE=SIZE)
        return
    columns = u[:rows].view(len(lines), num_positions, batch, -1)
    columns[..., : 3 * C] = 0
    start, stop = max(lines.start, -shift), min(lines.stop, num_lines - shift)
    before = corrected[start + shift : stop + shift]
    to = columns[start - lines.start : stop - lines.start]
    to[:, 1:, :, :C] = before[:, :-1]
    to[..., C : 2 * C] = before
    to[:, :-1, :, 2 * C : 3 * C] = before[:, 1:]


def coefficients(
    h: Tensor,
    from_neighbours: Tensor,
    own: Tensor,
    bias: Tensor,
    coefficients: Tensor,
    *,
    kept: int,
) -> None:
    """Writes the coefficients of a block of lines.

    Arguments:
        h: Features before the sweep, [line, position, image, C].
        from_neighbours, own: [line x position x image, 3C], or longer.
        bias: [4C], in the type of gates.
        coefficients: Is written, [line x position x image, 5C], or longer.
        kept: The line that stayed as it was, or -1.
    """
    num_lines, num_positions, batch, C = h.shape
    rows = num_lines * num_positions * batch
    if _in_triton(h):
        grid = (triton.cdiv(rows * C, SIZE),)
        sizes = (rows, batch, num_positions, *_row_strides(h), kept)
        tensors = (h, from_neighbours, own, bias, coefficients)
        coefficients_kernel[grid](*tensors, *sizes, C=C, SIZE=SIZE)
        return
    gates = _gates(from_neighbours[:rows], own[:rows], bias, h.shape)
    is_kept = (torch.arange(num_lines, device=h.device) == kept).view(-1, 1, 1, 1)
    coefficients[:rows] = _coefficients(h, *gates, is_kept).reshape(rows, 5 * C)


def gradients(
    grad_corrected: Tensor,
    line: int,
    sent_back: Tensor,
    coefficients: Tensor,
    grad_gates: Tensor,
    block_line: int,
    grad_lines: Tensor,
) -> None:
    """Writes the gradients of a line's gates.

    Arguments:
        grad_corrected: [line, position, image, C].
        line: Which of them.
        sent_back: What the positions of the line visited next send to their neighbours j-1, j and
            j+1 in this one, [position x image, 3C].
        coefficients: Of a block of lines, [line, position x image, 5C].
        grad_gates: The line is written, gradients of n, r, z, m of the block,
            [line, position x image, 4C].
        block_line: The line's place in the block.
        grad_lines: The part that comes through z is written, as grad_corrected.
    """
    _, num_positions, batch, C = grad_corrected.shape
    if _in_triton(grad_corrected):
        rows = num_positions * batch
        gradients_kernel[(triton.cdiv(rows * C, SIZE),)](
            grad_corrected,
            sent_back,
            coefficients,
            grad_gates,
            grad_lines,
            line,
            block_line,
            rows,
            batch,
            *_row_strides(grad_corrected),
            *_row_strides(grad_lines),
            C=C,
            SIZE=SIZE,
        )
        return
    sent = _wide(sent_back).view(num_positions, batch, 3 * C)
    total = _wide(grad_corrected[line]) + sent[..., C : 2 * C]
    total[:-1] += sent[1:, :, :C]
    total[1:] += sent[:-1, :, 2 * C :]
    parts = _wide(coefficients[block_line]).view(num_positions, batch, 5, C)
    grad_lines[line] = total * parts[:, :, 4]
    grad_gates[block_line] = (total[:, :, None] * parts[:, :, :4]).reshape(-1, 4 * C)


def _in_triton(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float64 or not (tensor.is_cuda or INTERPRETED):
        return False
    return why_no_triton(tensor.device) is None


def _wide(tensor: Tensor) -> Tensor:
    """In the type of gates and sums: float32, or float64 if the tensor is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _row_strides(tensor: Tensor) -> list[int]:
    """Strides of all dimensions but the last, in rows of C numbers."""
    return [stride // tensor.shape[-1] for stride in tensor.stride()[:-1]]


def _gates(
    from_neighbours: Tensor, own: Tensor, bias: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n, r, z and m in float32, in a shape that ends with the channels."""
    C = shape[-1]
    in_, ir, iz = (_wide(part).reshape(shape) for part in from_neighbours.split(C, dim=-1))
    hr, hz, hn = (_wide(part).reshape(shape) for part in own.split(C, dim=-1))
    b_n, b_r, b_z, b_m = bias.split(C)
    r, z, m = torch.sigmoid(ir + hr + b_r), torch.sigmoid(iz + hz + b_z), hn + b_m
    return torch.tanh(in_ + b_n + r * m), r, z, m


def _coefficients(
    h: Tensor, n: Tensor, r: Tensor, z: Tensor, m: Tensor, kept: Tensor | bool
) -> Tensor:
    """a_n, a_r, a_z, a_m and z side by side; where lines are kept, zeros and 1."""
    z = torch.where(torch.as_tensor(kept, device=z.device), 1.0, z)
    a_n = (1 - z) * (1 - n * n)
    a_m = a_n * r
    parts = [a_n, a_m * m * (1 - r), (_wide(h) - n) * z * (1 - z), a_m, z]
    return torch.cat(parts, dim=-1)


@jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@jit
def _gates_of(from_neighbours, own, bias, row, channel, mask, C: tl.constexpr):
    at = row * (3 * C) + channel
    n = _load(from_neighbours + at, mask) + _load(bias + channel, mask)
    r = _load(from_neighbours + at + C, mask) + _load(bias + C + channel, mask)
    z = _load(from_neighbours + at + 2 * C, mask) + _load(bias + 2 * C + channel, mask)
    r = tl.sigmoid(r + _load(own + at, mask))
    z = tl.sigmoid(z + _load(own + at + C, mask))
    m = _load(own + at + 2 * C, mask) + _load(bias + 3 * C + channel, mask)
    return 2 * tl.sigmoid(2 * (n + r * m)) - 1, r, z, m  # the first is a tanh


@jit
def _store_coefficients(to, h, n, r, z, m, mask, C: tl.constexpr):
    dtype = to.dtype.element_ty
    a_n = (1 - z) * (1 - n * n)
    a_m = a_n * r
    tl.store(to, a_n.to(dtype), mask=mask)
    tl.store(to + C, (a_m * m * (1 - r)).to(dtype), mask=mask)
    tl.store(to + 2 * C, ((h - n) * z * (1 - z)).to(dtype), mask=mask)
    tl.store(to + 3 * C, a_m.to(dtype), mask=mask)
    tl.store(to + 4 * C, z.to(dtype), mask=mask)


@jit
def correct_kernel(
    lines,
    from_neighbours,
    own,
    bias,
    corrected,
    u,
    coefficients,
    line,
    own_line,
    rows,
    batch,
    line_stride,  # in rows of C, of lines and of corrected
    position_stride,
    image_stride,
    C: tl.constexpr,
    KEEP: tl.constexpr,  # the line stays as it is
    KEEPS: tl.constexpr,  # coefficients are written
    SIZE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row, channel = index // C, index % C
    mask = row < rows
    row_of_line = row // batch * position_stride + row % batch * image_stride
    at = (line.to(tl.int64) * line_stride + row_of_line) * C + channel
    own += own_line.to(tl.int64) * rows * (3 * C)
    coefficients += line.to(tl.int64) * rows * (5 * C)
    h = _load(lines + at, mask)
    n, r, z, m = _gates_of(from_neighbours, own, bias, row, channel, mask, C)
    z = z * 0 + 1 if KEEP else z
    value = h if KEEP else n + z * (h - n)
    if KEEPS:
        to = coefficients + row * (5 * C) + channel
        _store_coefficients(to, h, n, r, z, m, mask, C)
    tl.store(corrected + at, value.to(corrected.dtype.element_ty), mask=mask)
    value = value.to(u.dtype.element_ty)
    to = u + row * (3 * C) + channel
    tl.store(to + C, value, mask=mask)
    tl.store(to + batch * (3 * C), value, mask=mask & (row + batch < rows))
    tl.store(to - batch * (3 * C) + 2 * C, value, mask=mask & (row >= batch))


@jit
def gather_kernel(
    corrected,
    u,
    rows,
    batch,
    num_positions,
    line_stride,
    position_stride,
    image_stride,
    first_line,  # the one before the block's first, or after it
    last_line,  # one more than the last that there is
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of u
    SIZE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row, channel = index // C, index % C
    mask = row < rows
    line = first_line + row // (num_positions * batch)
    position = row // batch % num_positions
    at = line * line_stride + position * position_stride + row % batch * image_stride
    value = _load(corrected + at * C + channel, mask & (line >= 0) & (line < last_line))
    value = value.to(u.dtype.element_ty)
    to = u + row * WIDTH + channel
    is_first, is_last = position == 0, position == num_positions - 1
    tl.store(to + C, value, mask=mask)
    tl.store(to + batch * WIDTH, value, mask=mask & ~is_last)
    tl.store(to - batch * WIDTH + 2 * C, value, mask=mask & ~is_first)
    tl.store(to, value * 0, mask=mask & is_first)
    tl.store(to + 2 * C, value * 0, mask=mask & is_last)


@jit
def coefficients_kernel(
    lines,
    from_neighbours,
    own,
    bias,
    coefficients,
    rows,
    batch,
    num_positions,
    line_stride,
    position_stride,
    image_stride,
    kept,
    C: tl.constexpr,
    SIZE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row, channel = index // C, index % C
    mask = row < rows
    line = row // (num_positions * batch)
    position = row // batch % num_positions
    at = line * line_stride + position * position_stride + row % batch * image_stride
    h = _load(lines + at * C + channel, mask)
    n, r, z, m = _gates_of(from_neighbours, own, bias, row, channel, mask, C)
    z = tl.where(line == kept, 1.0, z)
    _store_coefficients(coefficients + row * (5 * C) + channel, h, n, r, z, m, mask, C)


@jit
def gradients_kernel(
    grad_corrected,
    sent_back,
    coefficients,
    grad_gates,
    grad_lines,
    line,
    block_line,
    rows,
    batch,
    line_stride,  # of grad_corrected
    position_stride,
    image_stride,
    to_line_stride,
    to_position_stride,  # of grad_lines
    to_image_stride,
    C: tl.constexpr,
    SIZE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row, channel = index // C, index % C
    mask = row < rows
    position, image = row // batch, row % batch
    row_of_line = position * position_stride + image * image_stride
    at = (line.to(tl.int64) * line_stride + row_of_line) * C + channel
    first_row = block_line.to(tl.int64) * rows
    sent = sent_back + row * (3 * C) + channel
    total = _load(grad_corrected + at, mask) + _load(sent + C, mask)
    total += _load(sent + batch * (3 * C), mask & (row + batch < rows))
    total += _load(sent - batch * (3 * C) + 2 * C, mask & (row >= batch))
    source = coefficients + (first_row + row) * (5 * C) + channel
    to = grad_gates + (first_row + row) * (4 * C) + channel
    for gate in tl.static_range(4):
        gradient = total * _load(source + gate * C, mask)
        tl.store(to + gate * C, gradient.to(grad_gates.dtype.element_ty), mask=mask)
    row_of_line = position * to_position_stride + image * to_image_stride
    at = (line.to(tl.int64) * to_line_stride + row_of_line) * C + channel
    value = total * _load(source + 4 * C, mask)
    tl.store(grad_lines + at, value.to(grad_lines.dtype.element_ty), mask=mask)
