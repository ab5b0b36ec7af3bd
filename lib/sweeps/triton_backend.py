r"""The sweep of nn.py in Triton: of a block of lines, the sequential part is one launch forward and
one backward.

Optional and imported where it is used; importing it without Triton works, :func:`available` says
what is missing.

Images are independent, so a program owns some images for the whole sweep and needs nobody else: one
barrier within the program after each line. What is not sequential is taken for a *block* of many
lines at once by torch's matrix
products: those with `weight_hh` before the kernel, those of the gates' gradients after it. A sweep
of at most `BLOCK_ROWS` rows (lines x positions x images) is one block. Longer ones go block by
block: what lives between the steps stays small, and in the GPU's cache, for a few launches per ten
thousands of rows. On small maps launches are
what a sweep costs: a block takes 3 forward (copies, product, sweep) and 12 backward.

**Layout.** Inside a block rows are padded: [line, image, 1 + position], a row of zeros before each
image's positions and one at the end. The neighbours j-1, j, j+1 of a position are adjacent rows,
`u` is a window of 3C adjacent numbers,
and edges are no special case, neither in the kernels nor in the gradient of `weight_ih`: three
products of arrays shifted against each other by -1, 0 and 1 rows. Outside a block tensors lie as
the caller gave them.

**Precision.** Products take operands in the product type; sums, gates and state are float32. The
result is rounded if features are in low precision, and so are their gradients, once for each of two
terms. The last line is stored a second time, padded and in the product type (two slots in turn):
less traffic, and no rounding in the inner loop.

**Backward.** Nothing but input and output is kept. The forward kernel, run for all lines of a block
in parallel, computes from them the gradients of the pre-activations for a gradient t = 1 of the
corrected value,

.. math:: a_n = (1 - z)(1 - n^2), \quad a_r = a_m m (1 - r), \quad a_z = (h - n) z (1 - z), \quad a_m = a_n r

with :math:`m = W_{hn} h + b_{hn}`. The sequential kernel multiplies them in place by t: the
incoming gradient plus the window j-1, j, j+1 of these products of the line visited next, times
`weight_ih`. They may be rounded; 1 - z and 1 - n^2 of rounded gates would be noise where gates
saturate. Recomputing costs a product at full speed; storing would cost two passes over five numbers
per feature, and their memory. No atomic operations: runs are equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_kernels as kernels
from .triton_kernels import triton

# Rows of a block: of 200 channels in bfloat16, 32768 make 39 MB of pre-activations, which fit an
# H100's cache.
BLOCK_ROWS = 32768
# Not one launch for a block's lines but one for each, in which several programs share an image's
# channels. By estimate half the time at scales 4 and 8 where launches cost nothing (CUDA graphs),
# and no gain above. Not measured yet: `benchmarks.sweep_plans` compares both on a GPU.
BY_LINE = False

INTERPRETED = triton is not None and not isinstance(kernels.correct_kernel, triton.JITFunction)


def _plan(
    num_positions: int, batch: int, C: int, dtype: torch.dtype, multiprocessors: int, backward: bool
) -> dict[str, int]:
    """The shape of the work, by counting, not by measurement: constants of the kernel, options of
    the compiler.

    A program reads all weights for each line, 0.7 MB at C = 200 in bfloat16. That takes a
    multiprocessor about as long as multiplying 64 rows by them, and half of the multiprocessors
    doing so saturate the GPU's cache. So: as few images per program as leave half of the
    multiprocessors idle, but the 16 rows (positions x images) of a tensor core's tile; longer lines
    are taken in parts. Larger tiles spill registers when compiled for sm_90; for sm_80 and sm_86 64
    rows forward already do, 136 bytes. Stages fill at most 96 KiB of shared memory, which a
    consumer GPU has.
    """
    low = dtype.itemsize == 2
    images = min(
        batch, max(triton.cdiv(16, num_positions), triton.cdiv(2 * batch, multiprocessors))
    )
    rows = min(64 if low else 32, max(16, triton.next_power_of_2(images * num_positions)))
    # One accumulator leaves room for the wider tile, unless more of it would be padding.
    channels = 32 if not low else 128 if backward and triton.cdiv(C, 64) % 2 == 0 else 64
    smallest = max(16, triton.next_power_of_2(C))
    tile = dict(
        ROWS=rows, CHANNELS=min(smallest, channels), REDUCTION=min(smallest, 64 if low else 16)
    )
    images = max(1, min(batch, rows // num_positions))
    return tile | dict(
        images=images, PARTS=1, num_warps=8 if rows == 64 else 4, num_stages=3 if low else 2
    )


def _plan_by_line(
    num_positions: int, batch: int, C: int, dtype: torch.dtype, multiprocessors: int
) -> dict[str, int]:
    """With a launch for each line: the largest tile of which there are enough for all
    multiprocessors."""
    low = dtype.itemsize == 2
    smallest = max(16, triton.next_power_of_2(C))
    for rows, channels in ((64, 64), (64, 32), (32, 32), (16, 32), (16, 16)):
        rows, channels = min(rows, 64 if low else 32), min(smallest, channels, 64 if low else 32)
        images = max(1, min(batch, rows // num_positions))
        parts = triton.cdiv(C, channels)
        if triton.cdiv(batch, images) * parts >= multiprocessors:
            break
    tile = dict(
        ROWS=rows,
        CHANNELS=channels,
        REDUCTION=min(smallest, 64 if low else 16),
        images=images,
        PARTS=parts,
    )
    return tile | dict(num_warps=8 if rows * channels == 64 * 64 else 4, num_stages=3 if low else 2)


def available(device: torch.device | None = None) -> str | None:
    """Why the kernels cannot run on a CUDA device, by default the current one; None if they can
    (the interpreter, TRITON_INTERPRET=1, runs them anywhere)."""
    if triton is None:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
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
    """Corrected lines, see `correct_lines_reference` of nn.py, which has the operator that calls
    this.

    Arguments:
        lines: [line, position, batch, channel]; channels side by side, in memory nothing between
            positions.
        weight_ih, weight_hh, bias_ih, bias_hh, reverse, keep_first: As for
            `correct_lines_reference`.
        dtype: Of the products' operands; not float64.
    """
    corrected, C = torch.empty_like(lines), lines.shape[-1]
    blocks, longest, line_rows = _blocks(lines, reverse)
    h = lines.new_empty(longest * line_rows, C, dtype=dtype)
    own = lines.new_empty(longest * line_rows, 3 * C, dtype=dtype)
    previous = lines.new_empty(2 * line_rows + 1, C, dtype=dtype)
    w_ih, w_hh, bias = _products_operands(lines, dtype)
    parameters = [each.contiguous() for each in (weight_ih, weight_hh, bias_ih, bias_hh)]
    num_done = 0
    for block in blocks:
        num_rows = len(block) * line_rows
        _prepare(
            lines,
            None,
            parameters,
            (h, previous, w_ih, w_hh, bias, None),
            block,
            num_done == 0,
            reverse,
        )
        torch.mm(h[:num_rows], w_hh.t(), out=own[:num_rows])
        tensors = (lines, corrected, own, previous, w_ih, bias)
        _launch(
            kernels.correct_kernel,
            tensors,
            block,
            num_done,
            reverse,
            keep_first=int(keep_first),
            RECOMPUTE=False,
        )
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
    """Gradients of lines, weight_ih, weight_hh, bias_ih and bias_hh; `corrected` is the result of
    :func:`sweep`."""
    blocks, longest, line_rows = _blocks(lines, reverse)
    num_lines, C = lines.shape[0], lines.shape[-1]
    parameters = [each.contiguous() for each in (weight_ih, weight_hh, bias_ih, bias_hh)]
    if not blocks:
        return torch.empty_like(lines), *(torch.zeros_like(parameter) for parameter in parameters)
    if grad_corrected.stride() != lines.stride():
        grad_corrected = torch.empty_like(lines).copy_(grad_corrected)
    grad_lines = torch.empty_like(lines)
    gradients = [
        parameter.new_empty(parameter.shape, dtype=torch.float32) for parameter in parameters
    ]
    h = lines.new_empty(longest * line_rows, C, dtype=dtype)
    previous = lines.new_empty(longest * line_rows + 1, C, dtype=dtype)
    gates = lines.new_empty((longest + 2) * line_rows + 1, 5 * C, dtype=dtype)
    w_ih, w_hh, bias = _products_operands(lines, dtype)
    part_ih, part_hh = torch.empty_like(w_ih), torch.empty_like(w_hh)
    by_line = gates[:-1].view(longest + 2, line_rows, 5 * C)
    num_done = computed_last = 0
    for block in reversed(blocks):
        length, num_rows, is_first = len(block), len(block) * line_rows, num_done == 0
        _prepare(
            lines,
            corrected,
            parameters,
            (h, previous, w_ih, w_hh, bias, gates),
            block,
            is_first,
            reverse,
        )
        if not is_first:  # the line computed last lies beside this block
            by_line[0 if reverse else length + 1] = by_line[computed_last]
        computed_last = length if reverse else 1
        inside = gates[line_rows : line_rows + num_rows]
        torch.mm(h[:num_rows], w_hh.t(), out=inside[:, C : 4 * C])

        tensors, num_before = (
            (lines, corrected, inside, previous, w_ih, bias),
            num_lines - num_done - length,
        )
        _launch(
            kernels.correct_kernel,
            tensors,
            block,
            num_before,
            reverse,
            keep_first=int(keep_first),
            RECOMPUTE=True,
        )
        _launch(
            kernels.sweep_back_kernel,
            (grad_corrected, grad_lines, gates, w_ih),
            block,
            num_done,
            reverse,
        )
        num_done += length

        part_bias = inside[:, : 4 * C].sum(0, dtype=torch.float32)
        torch.mm(inside[:, C : 4 * C].t(), h[:num_rows], out=part_hh)
        for neighbour in range(3):  # the first row is padding
            shifted = previous[neighbour : neighbour + num_rows - 1]
            torch.mm(
                inside[1:, : 3 * C].t(),
                shifted,
                out=part_ih[:, neighbour * C : (neighbour + 1) * C],
            )
        _collect((part_ih, part_hh, part_bias), gradients, is_first)
        torch.mm(inside[:, C : 4 * C], w_hh, out=h[:num_rows])
        grad_lines[block.start : block.stop] += _unpadded(h[:num_rows], lines)
    return grad_lines, *(gradient.to(weight_ih.dtype) for gradient in gradients)


def _products_operands(lines: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for both weights in the type of the products, and for the biases of r, z, n and m."""
    C = lines.shape[-1]
    weights = (lines.new_empty(3 * C, columns, dtype=dtype) for columns in (3 * C, C))
    return *weights, lines.new_empty(4 * C, dtype=torch.float32)


def _blocks(lines: Tensor, reverse: bool) -> tuple[list[range], int, int]:
    """Runs of lines in the order of visiting, the length of the longest, and the padded rows of a
    line."""
    num_lines, num_positions, batch, _ = lines.shape
    length = min(num_lines, max(1, BLOCK_ROWS // max(1, num_positions * batch)))
    starts = range(0, num_lines, length) if lines.numel() else ()
    blocks = [range(start, min(start + length, num_lines)) for start in starts]
    return blocks[::-1] if reverse else blocks, length, batch * (num_positions + 1)


def _unpadded(rows: Tensor, lines: Tensor) -> Tensor:
    """Padded rows as [line, position, image, channel], without the padding."""
    _, num_positions, batch, C = lines.shape
    return rows.view(-1, batch, num_positions + 1, C)[:, :, 1:].transpose(1, 2)


def _prepare(
    lines: Tensor,
    corrected: Tensor | None,
    parameters: list[Tensor],
    buffers: tuple[Tensor | None, ...],
    block: range,
    is_first: bool,
    reverse: bool,
) -> None:
    """Fills h, previous, w_ih, w_hh, bias, and the padding of gates; what is the same for all
    blocks at the first."""
    num_lines, num_positions, batch, C = lines.shape
    backward = corrected is not None
    tile = dict(ROWS=16, CHANNELS=triton.next_power_of_2(C))
    line_rows = batch * (num_positions + 1)
    num_padding = len(buffers[-1]) // (num_positions + 1) + 1 if backward else 0
    rows, num_jobs = len(block) * line_rows + 1, 2 if backward else 1
    if is_first:
        weights = triton.cdiv(9 * C * C, tile["CHANNELS"])
        rows, num_jobs = max(rows, weights, num_padding, 2 * line_rows + 1), 4 if backward else 3
    grid = (triton.cdiv(rows, tile["ROWS"]), num_jobs)
    strides = (stride // C for stride in lines.stride()[:3])
    sizes = (
        block.start,
        len(block),
        num_lines,
        num_padding,
        1 if reverse else -1,
        batch,
        num_positions,
        *strides,
    )
    options = tile | dict(C=C, BACKWARD=backward, num_warps=4, enable_fp_fusion=True)
    with torch.cuda.device_of(lines):
        kernels.prepare_kernel[grid](lines, corrected, *parameters, *buffers, *sizes, **options)


def _collect(parts: tuple[Tensor, ...], gradients: list[Tensor], is_first: bool) -> None:
    """Adds a block's gradients of weight_ih, weight_hh and the biases to `gradients`, in their
    order."""
    C = parts[1].shape[1]
    size = 1024
    with torch.cuda.device_of(parts[0]):
        kernels.collect_kernel[(triton.cdiv(9 * C * C, size),)](
            *parts, *gradients, C=C, SIZE=size, IS_FIRST=is_first
        )


def _launch(kernel, tensors: tuple, block: range, num_done: int, reverse: bool, **options) -> None:
    """Runs a kernel over a block of lines, of which `tensors` begin with one as long as the
    sweep."""
    lines, dtype = tensors[0], tensors[2].dtype  # the third is in the product type
    num_lines, num_positions, batch, C = lines.shape
    multiprocessors = (
        torch.cuda.get_device_properties(lines.device).multi_processor_count if lines.is_cuda else 8
    )
    backward = kernel is kernels.sweep_back_kernel
    sizes = (num_positions, batch, C, dtype, multiprocessors)
    plan = _plan_by_line(*sizes) if BY_LINE else _plan(*sizes, backward)
    options |= plan | dict(C=C, UPCAST=INTERPRETED, enable_fp_fusion=True)
    options["PRECISION"] = "tf32" if dtype == torch.float32 and _tf32() else "ieee"
    in_parallel = options.get("RECOMPUTE", False)
    grid = (triton.cdiv(batch, plan["images"]), len(block) if in_parallel else 1, plan["PARTS"])
    downwards = reverse != backward
    order = (block.start, len(block) - 1, -1) if downwards else (block.start, 0, 1)
    line_stride, position_stride, image_stride = (stride // C for stride in lines.stride()[:3])
    options |= dict(batch=batch, num_positions=num_positions)
    options |= dict(
        line_stride=line_stride, position_stride=position_stride, image_stride=image_stride
    )
    # Programs that share channels need each other's before the next line.
    steps = (
        range(len(block))
        if plan["PARTS"] > 1 and not in_parallel
        else range(0, len(block), len(block))
    )
    with torch.cuda.device_of(lines):
        for step in steps:
            kernel[grid](*tensors, *order, num_done, step, step + steps.step, **options)


def _tf32() -> bool:
    """Whether torch's products of float32 matrices round their operands, which can be asked for in
    two ways."""
    settings = torch.backends.cuda.matmul
    return (
        settings.fp32_precision == "tf32"
        if hasattr(settings, "fp32_precision")
        else settings.allow_tf32
    )
