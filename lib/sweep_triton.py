r"""The sweep of nn.py in Triton: of a block of lines, the sequential part is one launch forward and one backward.

Optional and imported where it is used; importing it without Triton works, :func:`available` says what is missing.

Images are independent, so a program owns some images for the whole sweep and needs nobody else: one barrier within
the program after each line. What is not sequential is taken for a *block* of many lines at once by torch's matrix
products: those with `weight_hh` before the kernel, those of the gates' gradients after it. A sweep of at most
`BLOCK_ROWS` rows (lines x positions x images) is one block. Longer ones go block by block: what lives between the
steps stays small, and in the GPU's cache, for a few launches per ten thousands of rows.

**Layout.** Inside a block rows are padded: [line, image, 1 + position], a row of zeros before each image's positions
and one at the end. The neighbours j-1, j, j+1 of a position are adjacent rows, `u` is a window of 3C adjacent numbers,
and edges are no special case, neither in the kernels nor in the gradient of `weight_ih`: three products of arrays
shifted against each other by -1, 0 and 1 rows. Outside a block tensors lie as the caller gave them.

**Precision.** Products take operands in the product type; sums, gates and state are float32. The last line is stored a
second time in the product type (two slots in turn): half the traffic, and no rounding in the inner loop.

**Backward.** Nothing but input and output is kept. The forward kernel, run for all lines of a block in parallel,
computes from them the gradients of the pre-activations for a gradient t = 1 of the corrected value,

.. math:: a_n = (1 - z)(1 - n^2), \quad a_r = a_m m (1 - r), \quad a_z = (h - n) z (1 - z), \quad a_m = a_n r

with :math:`m = W_{hn} h + b_{hn}`. The sequential kernel multiplies them in place by t: the incoming gradient plus the
window j-1, j, j+1 of these products of the line visited next, times `weight_ih`. They may be rounded; 1 - z and 1 - n^2
of rounded gates would be noise where gates saturate. Recomputing costs a product at full speed; storing would cost
two passes over five numbers per feature, and their memory. No atomic operations: runs are equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    # The sizes of blocks vary: one compiled kernel serves all.
    jit = triton.jit(do_not_specialize=["first_line", "num_lines", "num_done"])
except ImportError:
    triton, jit = None, lambda function: function


# Rows of a block: of 200 channels in bfloat16, 32768 make 39 MB of pre-activations, which fit an H100's cache.
BLOCK_ROWS = 32768


@jit
def _rows(row, image_0, batch, num_positions, position_stride, image_stride, IMAGES: tl.constexpr):
    """For rows of a program: whether they exist, their row in a padded line, and from a line's first in memory."""
    position = row % num_positions
    image = (image_0 + row // num_positions).to(tl.int64)
    valid = (row < IMAGES * num_positions) & (image < batch)
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
def _correct_kernel(
    lines,  # before the sweep; row (line, position, image) of C channels is where the strides, in rows, say
    corrected,  # the result, in the same places
    gates,  # lines @ weight_hh^T, padded rows of 3C. RECOMPUTE: columns C to 4C of 5C; becomes a_n, a_r, a_z, a_m, z
    previous,  # the lines before, padded rows of C; two slots in turn. RECOMPUTE: all
    weight,  # weight_ih [3C, 3C], rows of the gates n, r, z
    bias,  # [4C]: r, z, n, m
    first_line,  # of the block, in memory
    num_lines,  # of the block
    num_done,  # lines of earlier blocks
    batch,
    num_positions,
    line_stride,
    position_stride,
    image_stride,
    C: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REDUCTION: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    RECOMPUTE: tl.constexpr,  # coefficients of all lines in parallel (second axis of the grid) from the known result
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    image_0 = tl.program_id(0) * IMAGES
    line_rows = batch * (num_positions + 1)
    begin = tl.program_id(1) if RECOMPUTE else 0
    end = begin + 1 if RECOMPUTE else num_lines
    for step in range(begin, end):
        is_first = num_done + step == 0
        index = num_lines - 1 - step if REVERSE else step
        slot = index if RECOMPUTE else (num_done + step) % 2
        next_slot = (num_done + step + 1) % 2
        num_parts = tl.where(is_first, 0, tl.cdiv(3 * C, REDUCTION))
        for row_0 in range(0, IMAGES * num_positions, ROWS):
            row = row_0 + tl.arange(0, ROWS)
            valid, padded, place = _rows(row, image_0, batch, num_positions, position_stride, image_stride, IMAGES)
            place += (first_line + index) * line_stride
            window = previous + (slot * line_rows + padded - 1)[:, None] * C
            for channel_0 in range(0, C, CHANNELS):
                channel = channel_0 + tl.arange(0, CHANNELS)
                there = channel < C
                sum_n = tl.zeros([ROWS, CHANNELS], tl.float32)
                sum_r = tl.zeros([ROWS, CHANNELS], tl.float32)
                sum_z = tl.zeros([ROWS, CHANNELS], tl.float32)
                for part in range(num_parts):
                    k = part * REDUCTION + tl.arange(0, REDUCTION)
                    u = tl.load(window + k[None, :], mask=valid[:, None] & (k < 3 * C)[None, :], other=0.0)
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
                    if KEEP_FIRST:
                        z = tl.where(is_first, 1.0, z)
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
                    if KEEP_FIRST:
                        value = tl.where(is_first, h, value)
                    tl.store(corrected + at, value.to(corrected.dtype.element_ty), mask=mask)
                    to = previous + (next_slot * line_rows + padded)[:, None] * C + channel[None, :]
                    tl.store(to, value.to(previous.dtype.element_ty), mask=mask)
        if not RECOMPUTE:
            tl.debug_barrier()  # the line is complete before any thread reads it


@jit
def _sweep_back_kernel(
    grad_corrected,  # where lines are
    grad_lines,  # the part of the result that comes through z, where lines are
    gates,  # padded rows of 5C, a line more before and after the block; coefficients become gradients n, r, z, m
    weight,  # weight_ih [3C, 3C], rows of the gates n, r, z
    first_line,
    num_lines,
    num_done,
    batch,
    num_positions,
    line_stride,
    position_stride,
    image_stride,
    C: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REDUCTION: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    image_0 = tl.program_id(0) * IMAGES
    line_rows = batch * (num_positions + 1)
    for step in range(num_lines):
        index = step if REVERSE else num_lines - 1 - step
        next_index = index - 1 if REVERSE else index + 1
        num_parts = tl.where(num_done + step == 0, 0, 3 * tl.cdiv(3 * C, REDUCTION))
        for row_0 in range(0, IMAGES * num_positions, ROWS):
            row = row_0 + tl.arange(0, ROWS)
            valid, padded, place = _rows(row, image_0, batch, num_positions, position_stride, image_stride, IMAGES)
            place += (first_line + index) * line_stride
            window = gates + ((next_index + 1) * line_rows + padded - 1)[:, None] * (5 * C)
            for channel_0 in range(0, C, CHANNELS):
                channel = channel_0 + tl.arange(0, CHANNELS)
                there = channel < C
                total = tl.zeros([ROWS, CHANNELS], tl.float32)
                for part in range(num_parts):
                    # For the next line's position j-1 this position is the neighbour j+1, and so on.
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
                to = gates + ((index + 1) * line_rows + padded)[:, None] * (5 * C) + channel[None, :]
                z = _load(to + 4 * C, mask)
                tl.store(grad_lines + at, (total * z).to(grad_lines.dtype.element_ty), mask=mask)
                for gate in tl.static_range(4):
                    gradient = total * _load(to + gate * C, mask)
                    tl.store(to + gate * C, gradient.to(gates.dtype.element_ty), mask=mask)
        tl.debug_barrier()


INTERPRETED = triton is not None and not isinstance(_correct_kernel, triton.JITFunction)


def _plan(
    num_positions: int, batch: int, C: int, dtype: torch.dtype, multiprocessors: int, backward: bool
) -> dict[str, int]:
    """The shape of the work, by counting, not by measurement: constants of the kernel, options of the compiler.

    A program reads all weights for each line, 0.7 MB at C = 200 in bfloat16. That takes a multiprocessor about as long
    as multiplying 64 rows by them, and half of the multiprocessors doing so saturate the GPU's cache. So: as few images
    per program as leave half of the multiprocessors idle, but the 16 rows (positions x images) of a tensor core's tile;
    longer lines are taken in parts. Larger tiles spill registers when compiled for sm_90; for sm_80 and sm_86
    64 rows forward already do, 136 bytes. Stages fill at most 96 KiB of shared memory, which a consumer GPU has.
    """
    low = dtype.itemsize == 2
    images = min(batch, max(triton.cdiv(16, num_positions), triton.cdiv(2 * batch, multiprocessors)))
    rows = min(64 if low else 32, max(16, triton.next_power_of_2(images * num_positions)))
    # One accumulator leaves room for the wider tile, unless more of it would be padding.
    channels = 32 if not low else 128 if backward and triton.cdiv(C, 64) % 2 == 0 else 64
    smallest = max(16, triton.next_power_of_2(C))
    tile = dict(ROWS=rows, CHANNELS=min(smallest, channels), REDUCTION=min(smallest, 64 if low else 16))
    images = max(1, min(batch, rows // num_positions))
    return tile | dict(IMAGES=images, num_warps=8 if rows == 64 else 4, num_stages=3 if low else 2)


def available() -> str | None:
    """Why the kernels cannot run here; None if they can (the interpreter, TRITON_INTERPRET=1, runs them anywhere)."""
    if triton is None:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} has a compute capability below 8.0"
    return None


def sweep(
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
    keep_first: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Corrected lines, see `correct_lines_reference` of nn.py, which has the operator that calls this.

    Arguments:
        lines: [line, position, batch, channel]; channels side by side, in memory nothing between positions.
        weight_ih, weight_hh, bias_ih, bias_hh, reverse, keep_first: As for `correct_lines_reference`.
        dtype: Of the products' operands; not float64.
    """
    corrected, C = torch.empty_like(lines), lines.shape[-1]
    bias = _joined(bias_ih, bias_hh)
    blocks, longest, line_rows = _blocks(lines, reverse)
    w_ih, w_hh = weight_ih.roll(C, 0).to(dtype), weight_hh.to(dtype)  # gates n, r, z; r, z, m
    h = lines.new_zeros(longest * line_rows, C, dtype=dtype)
    own = lines.new_empty(longest * line_rows, 3 * C, dtype=dtype)
    previous = lines.new_zeros(2 * line_rows + 1, C, dtype=dtype)
    num_done = 0
    for block in blocks:
        num_rows = len(block) * line_rows
        _unpadded(h[:num_rows], lines).copy_(lines[block.start : block.stop])
        torch.mm(h[:num_rows], w_hh.t(), out=own[:num_rows])
        tensors = (lines, corrected, own, previous, w_ih, bias)
        _launch(_correct_kernel, tensors, block, num_done, reverse, KEEP_FIRST=keep_first, RECOMPUTE=False)
        num_done += len(block)
    return corrected


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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of lines, weight_ih, weight_hh, bias_ih and bias_hh; `corrected` is the result of :func:`sweep`."""
    blocks, longest, line_rows = _blocks(lines, reverse)
    num_lines, C = lines.shape[0], lines.shape[-1]
    bias = _joined(bias_ih, bias_hh)
    if grad_corrected.stride() != lines.stride():
        grad_corrected = torch.empty_like(lines).copy_(grad_corrected)
    grad_lines = torch.empty_like(lines)
    w_ih, w_hh = weight_ih.roll(C, 0).to(dtype), weight_hh.to(dtype)
    h = lines.new_zeros(longest * line_rows, C, dtype=dtype)
    previous = lines.new_zeros(longest * line_rows + 1, C, dtype=dtype)
    gates = lines.new_zeros((longest + 2) * line_rows + 1, 5 * C, dtype=dtype)
    grad_w_ih, grad_w_hh = torch.zeros_like(w_ih, dtype=torch.float32), torch.zeros_like(w_hh, dtype=torch.float32)
    grad_bias = lines.new_zeros(4 * C, dtype=torch.float32)
    part_w_ih = torch.empty_like(w_ih)
    by_line = gates[:-1].view(longest + 2, line_rows, 5 * C)
    num_done = computed_last = 0
    for block in reversed(blocks):
        length, num_rows = len(block), len(block) * line_rows
        if num_done > 0:  # the line computed last lies beside this block
            by_line[0 if reverse else length + 1] = by_line[computed_last]
        computed_last = length if reverse else 1
        inside = gates[line_rows : line_rows + num_rows]
        _unpadded(h[:num_rows], lines).copy_(lines[block.start : block.stop])
        to = _unpadded(previous[:num_rows], lines)
        shift = 1 if reverse else -1
        start, stop = max(block.start, -shift), min(block.stop, num_lines - shift)
        if stop - start < length:  # the line visited first has none before it
            to.zero_()
        to[start - block.start : stop - block.start] = corrected[start + shift : stop + shift]
        torch.mm(h[:num_rows], w_hh.t(), out=inside[:, C : 4 * C])

        tensors, num_before = (lines, corrected, inside, previous, w_ih, bias), num_lines - num_done - length
        _launch(_correct_kernel, tensors, block, num_before, reverse, KEEP_FIRST=keep_first, RECOMPUTE=True)
        _launch(_sweep_back_kernel, (grad_corrected, grad_lines, gates, w_ih), block, num_done, reverse)
        num_done += length

        grad_bias += inside[:, : 4 * C].sum(0, dtype=torch.float32)
        grad_w_hh += torch.mm(inside[:, C : 4 * C].t(), h[:num_rows])
        for neighbour in range(3):  # the first row is padding
            shifted = previous[neighbour : neighbour + num_rows - 1]
            torch.mm(inside[1:, : 3 * C].t(), shifted, out=part_w_ih[:, neighbour * C : (neighbour + 1) * C])
        grad_w_ih += part_w_ih
        torch.mm(inside[:, C : 4 * C], w_hh, out=h[:num_rows])
        grad_lines[block.start : block.stop] += _unpadded(h[:num_rows], lines)

    gradients = (grad_w_ih.roll(-C, 0), grad_w_hh, grad_bias[: 3 * C].roll(-C, 0), grad_bias[C:])
    return grad_lines, *(gradient.to(weight_ih.dtype, copy=True) for gradient in gradients)


def _joined(bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """Biases of r, z, n and m, [4C]."""
    rz_ih, n = bias_ih.split([bias_ih.numel() // 3 * 2, bias_ih.numel() // 3])
    rz_hh, m = bias_hh.split([bias_hh.numel() // 3 * 2, bias_hh.numel() // 3])
    return torch.cat([rz_ih + rz_hh, n, m])


def _blocks(lines: Tensor, reverse: bool) -> tuple[list[range], int, int]:
    """Runs of lines in the order of visiting, the length of the longest, and the padded rows of a line."""
    num_lines, num_positions, batch, _ = lines.shape
    length = min(num_lines, max(1, BLOCK_ROWS // max(1, num_positions * batch)))
    starts = range(0, num_lines, length) if lines.numel() else ()
    blocks = [range(start, min(start + length, num_lines)) for start in starts]
    return blocks[::-1] if reverse else blocks, length, batch * (num_positions + 1)


def _unpadded(rows: Tensor, lines: Tensor) -> Tensor:
    """Padded rows as [line, position, image, channel], without the padding."""
    _, num_positions, batch, C = lines.shape
    return rows.view(-1, batch, num_positions + 1, C)[:, :, 1:].transpose(1, 2)


def _launch(kernel, tensors: tuple, block: range, num_done: int, reverse: bool, **options) -> None:
    """Runs a kernel over a block of lines, of which `tensors` begin with one as long as the sweep."""
    lines, dtype = tensors[0], tensors[2].dtype  # the third is in the product type
    num_lines, num_positions, batch, C = lines.shape
    multiprocessors = torch.cuda.get_device_properties(lines.device).multi_processor_count if lines.is_cuda else 8
    plan = _plan(num_positions, batch, C, dtype, multiprocessors, kernel is _sweep_back_kernel)
    options |= plan | dict(C=C, REVERSE=reverse, UPCAST=INTERPRETED)
    # As torch's products do.
    options["PRECISION"] = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    grid = (triton.cdiv(batch, plan["IMAGES"]), len(block) if options.get("RECOMPUTE") else 1)
    strides = (stride // C for stride in lines.stride()[:3])
    with torch.cuda.device_of(lines):
        kernel[grid](*tensors, block.start, len(block), num_done, batch, num_positions, *strides, **options)
