r"""The Triton kernels of sweep_triton.py, which says how they share the work and how their arrays
lie.

Importing this file without Triton works; the kernels are plain functions then.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    # One compiled kernel serves all sizes and directions; a kernel takes a second to compile.
    VARYING = (
        "batch num_positions line_stride position_stride image_stride images first_line num_lines lines_of_all "
        "num_padding num_done first_step last_step start line_step shift keep_first"
    ).split()
    jit = triton.jit(do_not_specialize=VARYING)
except ImportError:
    triton, jit = None, lambda function: function


@jit
def _rows(row, image_0, images, batch, num_positions, position_stride, image_stride):
    """For rows of a program: whether they exist, their row in a padded line, and from a line's
    first in memory."""
    position = row % num_positions
    image = (image_0 + row // num_positions).to(tl.int64)
    valid = (row < images * num_positions) & (image < batch)
    padded = image * (num_positions + 1) + position + 1
    return valid, padded, position * position_stride + image * image_stride


@jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter cannot multiply bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@jit
def prepare_kernel(
    lines,  # where `correct_kernel` finds them
    corrected,  # BACKWARD: lines after the sweep, in the same places
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    h,  # to be filled: padded rows of the block's lines
    previous,  # padded rows of the lines before and a row more. Forward: two slots, zeros
    w_ih,  # weight_ih in the product type, rows of the gates n, r, z
    w_hh,
    bias,  # [4C]: r, z, n, m
    gates,  # BACKWARD: the padding of rows of 5C becomes zero
    first_line,
    num_lines,
    lines_of_all,
    num_padding,  # rows of padding in gates
    shift,  # from a line to the one visited before it
    batch,
    num_positions,
    line_stride,
    position_stride,
    image_stride,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,  # at least C
    BACKWARD: tl.constexpr,
):
    """Copies and conversions, a job for each index of the grid's second axis; the last are for the
    first block only."""
    job = tl.program_id(1)
    line_rows = batch * (num_positions + 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    there = (channel < C)[None, :]
    if job <= 1:
        line = row // line_rows
        image = (row % line_rows // (num_positions + 1)).to(tl.int64)
        position = row % (num_positions + 1) - 1
        if job == 0:
            exists = row < num_lines * line_rows
            line += first_line
            at = line * line_stride + position * position_stride + image * image_stride
            value = _load(
                lines + at[:, None] * C + channel[None, :],
                (exists & (position >= 0))[:, None] & there,
            )
            to = h + row.to(tl.int64)[:, None] * C + channel[None, :]
            tl.store(to, value.to(h.dtype.element_ty), mask=exists[:, None] & there)
        else:
            to = previous + row.to(tl.int64)[:, None] * C + channel[None, :]
            if BACKWARD:
                exists = row <= num_lines * line_rows
                line += first_line + shift
                at = line * line_stride + position * position_stride + image * image_stride
                known = (
                    exists
                    & (row < num_lines * line_rows)
                    & (position >= 0)
                    & (line >= 0)
                    & (line < lines_of_all)
                )
                value = _load(
                    corrected + at[:, None] * C + channel[None, :], known[:, None] & there
                )
                tl.store(to, value.to(previous.dtype.element_ty), mask=exists[:, None] & there)
            else:
                zeros = tl.zeros([ROWS, CHANNELS], previous.dtype.element_ty)
                tl.store(to, zeros, mask=(row <= 2 * line_rows)[:, None] & there)
    elif job == 2:
        if tl.program_id(0) * ROWS < tl.cdiv(
            9 * C * C, CHANNELS
        ):  # the index of others could overflow
            index = tl.program_id(0) * ROWS * CHANNELS + tl.arange(0, ROWS * CHANNELS)
            value = _load(weight_ih + (index + 6 * C * C) % (9 * C * C), index < 9 * C * C)
            tl.store(w_ih + index, value.to(w_ih.dtype.element_ty), mask=index < 9 * C * C)
            value = _load(weight_hh + index, index < 3 * C * C)
            tl.store(w_hh + index, value.to(w_hh.dtype.element_ty), mask=index < 3 * C * C)
            value = _load(bias_ih + index, index < 3 * C)
            from_own = (index < 2 * C) | (index >= 3 * C) & (index < 4 * C)
            value += _load(bias_hh + tl.where(index < 2 * C, index, index - C), from_own)
            tl.store(bias + index, value, mask=index < 4 * C)
    elif BACKWARD:
        exists = row < num_padding  # a row before each image, and one at the end
        to = gates + (row.to(tl.int64) * (num_positions + 1))[:, None] * (5 * C) + channel[None, :]
        for part in tl.static_range(5):
            zeros = tl.zeros([ROWS, CHANNELS], gates.dtype.element_ty)
            tl.store(to + part * C, zeros, mask=exists[:, None] & there)


@jit
def collect_kernel(
    part_ih,  # gradient of weight_ih from a block, rows of the gates n, r, z
    part_hh,
    part_bias,  # gates n, r, z, m
    grad_ih,  # as the parameters are ordered
    grad_hh,
    grad_bias_ih,
    grad_bias_hh,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    IS_FIRST: tl.constexpr,
):
    """Adds a block's gradients of the parameters to those of the blocks before."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    _accumulate(
        grad_ih, index, part_ih, (index + 3 * C * C) % (9 * C * C), index < 9 * C * C, IS_FIRST
    )
    _accumulate(grad_hh, index, part_hh, index, index < 3 * C * C, IS_FIRST)
    _accumulate(grad_bias_ih, index, part_bias, (index + C) % (3 * C), index < 3 * C, IS_FIRST)
    _accumulate(grad_bias_hh, index, part_bias, index + C, index < 3 * C, IS_FIRST)


@jit
def _accumulate(total, index, part, part_index, mask, IS_FIRST: tl.constexpr):
    value = _load(part + part_index, mask)
    if not IS_FIRST:
        value += _load(total + index, mask)
    tl.store(total + index, value, mask=mask)


@jit
def correct_kernel(
    lines,  # before the sweep; row (line, position, image) of C channels is where the strides, in rows, say
    corrected,  # the result, in the same places
    gates,  # lines @ weight_hh^T, padded rows of 3C. RECOMPUTE: columns C to 4C of 5C; becomes a_n, a_r, a_z, a_m, z
    previous,  # the lines before, padded rows of C; two slots in turn. RECOMPUTE: all
    weight,  # weight_ih [3C, 3C], rows of the gates n, r, z
    bias,  # [4C]: r, z, n, m
    first_line,  # of the block, in memory
    start,  # line of the block that is visited first
    line_step,  # from a line to the one visited next
    num_done,  # lines of earlier blocks
    first_step,  # lines of the block to be visited, in the order of visiting
    last_step,
    keep_first,  # whether the line visited first stays as it is
    images,  # of a program
    batch,
    num_positions,
    line_stride,
    position_stride,
    image_stride,
    C: tl.constexpr,
    PARTS: tl.constexpr,  # programs (third axis of the grid) that share a line's channels
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REDUCTION: tl.constexpr,
    RECOMPUTE: tl.constexpr,  # coefficients of all lines in parallel (second axis of the grid) from the known result
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    image_0 = tl.program_id(0) * images
    line_rows = batch * (num_positions + 1)
    begin = tl.program_id(1) if RECOMPUTE else first_step
    end = begin + 1 if RECOMPUTE else last_step
    for step in range(begin, end):
        is_first = num_done + step == 0
        is_kept = is_first & (keep_first != 0)
        index = start + step * line_step
        slot = index if RECOMPUTE else (num_done + step) % 2
        next_slot = (num_done + step + 1) % 2
        num_parts = tl.where(is_first, 0, tl.cdiv(3 * C, REDUCTION))
        for row_0 in range(0, images * num_positions, ROWS):
            row = row_0 + tl.arange(0, ROWS)
            valid, padded, place = _rows(
                row, image_0, images, batch, num_positions, position_stride, image_stride
            )
            place += (first_line + index) * line_stride
            window = previous + (slot * line_rows + padded - 1)[:, None] * C
            for channel_0 in range(tl.program_id(2) * CHANNELS, C, PARTS * CHANNELS):
                channel = channel_0 + tl.arange(0, CHANNELS)
                there = channel < C
                sum_n = tl.zeros([ROWS, CHANNELS], tl.float32)
                sum_r = tl.zeros([ROWS, CHANNELS], tl.float32)
                sum_z = tl.zeros([ROWS, CHANNELS], tl.float32)
                for part in range(num_parts):
                    k = part * REDUCTION + tl.arange(0, REDUCTION)
                    u = tl.load(
                        window + k[None, :], mask=valid[:, None] & (k < 3 * C)[None, :], other=0.0
                    )
                    w = weight + k[:, None] + channel[None, :] * (3 * C)
                    w_mask = (k < 3 * C)[:, None] & there[None, :]
                    w_n = tl.load(w, mask=w_mask, other=0.0)
                    w_r = tl.load(w + 3 * C * C, mask=w_mask, other=0.0)
                    w_z = tl.load(w + 6 * C * C, mask=w_mask, other=0.0)
                    sum_n = _dot(u, w_n, sum_n, PRECISION, UPCAST)
                    sum_r = _dot(u, w_r, sum_r, PRECISION, UPCAST)
                    sum_z = _dot(u, w_z, sum_z, PRECISION, UPCAST)

                mask = valid[:, None] & there[None, :]
                at = place[:, None] * C + channel[None, :]
                width: tl.constexpr = 5 * C if RECOMPUTE else 3 * C
                at_gates = gates + (index * line_rows + padded)[:, None] * width + channel[None, :]
                own = at_gates + C if RECOMPUTE else at_gates
                b, b_mask = bias + channel[None, :], there[None, :]
                h = _load(lines + at, mask)
                r = tl.sigmoid(sum_r + _load(own, mask) + _load(b, b_mask))
                z = tl.sigmoid(sum_z + _load(own + C, mask) + _load(b + C, b_mask))
                m = _load(own + 2 * C, mask) + _load(b + 3 * C, b_mask)
                n = 2 * tl.sigmoid(2 * (sum_n + _load(b + 2 * C, b_mask) + r * m)) - 1  # tanh
                if RECOMPUTE:
                    z = tl.where(is_kept, 1.0, z)
                    a_n = (1 - z) * (1 - n * n)
                    a_z = (h - n) * z * (1 - z)
                    a_m = a_n * r
                    dtype = gates.dtype.element_ty
                    tl.store(at_gates, a_n.to(dtype), mask=mask)
                    tl.store(at_gates + C, (a_m * m * (1 - r)).to(dtype), mask=mask)
                    tl.store(at_gates + 2 * C, a_z.to(dtype), mask=mask)
                    tl.store(at_gates + 3 * C, a_m.to(dtype), mask=mask)
                    tl.store(at_gates + 4 * C, z.to(dtype), mask=mask)
                else:
                    value = n + z * (h - n)
                    value = tl.where(is_kept, h, value)
                    tl.store(corrected + at, value.to(corrected.dtype.element_ty), mask=mask)
                    to = previous + (next_slot * line_rows + padded)[:, None] * C + channel[None, :]
                    tl.store(to, value.to(previous.dtype.element_ty), mask=mask)
        if not RECOMPUTE:
            tl.debug_barrier()  # the line is complete before any thread reads it


@jit
def sweep_back_kernel(
    grad_corrected,  # where lines are
    grad_lines,  # the part of the result that comes through z, where lines are
    gates,  # padded rows of 5C, a line more before and after the block; coefficients become gradients n, r, z, m
    weight,  # weight_ih [3C, 3C], rows of the gates n, r, z
    first_line,
    start,  # line of the block whose gradient is taken first
    line_step,
    num_done,
    first_step,
    last_step,
    images,
    batch,
    num_positions,
    line_stride,
    position_stride,
    image_stride,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REDUCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    image_0 = tl.program_id(0) * images
    line_rows = batch * (num_positions + 1)
    for step in range(first_step, last_step):
        index = start + step * line_step
        next_index = index - line_step
        num_parts = tl.where(num_done + step == 0, 0, 3 * tl.cdiv(3 * C, REDUCTION))
        for row_0 in range(0, images * num_positions, ROWS):
            row = row_0 + tl.arange(0, ROWS)
            valid, padded, place = _rows(
                row, image_0, images, batch, num_positions, position_stride, image_stride
            )
            place += (first_line + index) * line_stride
            window = gates + ((next_index + 1) * line_rows + padded - 1)[:, None] * (5 * C)
            for channel_0 in range(tl.program_id(2) * CHANNELS, C, PARTS * CHANNELS):
                channel = channel_0 + tl.arange(0, CHANNELS)
                there = channel < C
                total = tl.zeros([ROWS, CHANNELS], tl.float32)
                for part in range(num_parts):
                    # For the next line's position j-1 this position is the neighbour j+1, and so
                    # on.
                    neighbour = part // tl.cdiv(3 * C, REDUCTION)
                    k = (part % tl.cdiv(3 * C, REDUCTION)) * REDUCTION + tl.arange(0, REDUCTION)
                    g = window + neighbour * (5 * C) + k[None, :]
                    g = tl.load(g, mask=valid[:, None] & (k < 3 * C)[None, :], other=0.0)
                    w = weight + k[:, None] * (3 * C) + ((2 - neighbour) * C + channel)[None, :]
                    w = tl.load(w, mask=(k < 3 * C)[:, None] & there[None, :], other=0.0)
                    total = _dot(g, w, total, PRECISION, UPCAST)

                mask = valid[:, None] & there[None, :]
                at = place[:, None] * C + channel[None, :]
                total += _load(grad_corrected + at, mask)
                to = (
                    gates + ((index + 1) * line_rows + padded)[:, None] * (5 * C) + channel[None, :]
                )
                z = _load(to + 4 * C, mask)
                tl.store(grad_lines + at, (total * z).to(grad_lines.dtype.element_ty), mask=mask)
                for gate in tl.static_range(4):
                    gradient = total * _load(to + gate * C, mask)
                    tl.store(to + gate * C, gradient.to(gates.dtype.element_ty), mask=mask)
        tl.debug_barrier()
