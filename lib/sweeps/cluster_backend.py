"""The backend `cluster`: the sequential part of a sweep is one kernel, forward and backward, for
Hopper and newer GPUs.

Images are independent, so a cluster of thread blocks owns some images for the whole sweep, and its
blocks keep `weight_ih` in their shared memory, each a share of it. A step from line to line needs
nothing but what the cluster has: a product with weights that stay where they are, and an exchange
of results by distributed shared memory. What is not sequential is in products.py; the kernels are
in cluster.cu.

**Forward** a block owns some channels with their three gates. It multiplies all rows (images x
positions of its cluster) by its share of `weight_ih`, computes gates and corrected values in
float32, and stores these, rounded to the products' type, in all blocks of the cluster. One copy of
the previous line is enough: a block announces that it has read it before it computes the gates, and
waits for the others after that.

**Backward** the products' terms are split instead of their columns: a block has the gradients of
its own channels' gates, multiplies them by its rows of `weight_ih`, and sends the partial sums to
the blocks that own the columns. The gradients of gates, three for each channel, stay in the block,
and the partial sums, in the products' type, take a third of the room that copies of these gradients
in every block would take. With 200 channels in four blocks that decides: 202 KB of weights leave 28
KB. There partial sums lie where the rows lay, which takes another barrier.

With 200 channels in bfloat16 and maps of 16x16, a cluster of four blocks owns four images: 64 rows,
the tile of Hopper's wgmma instruction, and 32 clusters fill an H100 with a batch of 128.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import cluster, graphs, products
from .cluster import BackwardArguments, Constants, ForwardArguments
from .products import kept  # noqa: F401 - what the backend keeps

# Rows (lines x positions x images) of which the own products are there at a time. With 200
# channels they take 600 numbers each.
BLOCK_ROWS = 131072
FEATURES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # names of types in cluster.cu
TILE = 64  # rows of a warpgroup
MOST_UNITS = {1: 5, 2: 8}  # of a block, by groups: more would not fit in registers


class Limits(NamedTuple):
    """What a device has."""

    shared_bytes: int  # of a block
    multiprocessors: int
    largest_cluster: int


class Plan(NamedTuple):
    """How a sweep is divided."""

    cluster: int  # blocks
    units: int  # of 8 channels, of a block
    groups: int  # warpgroups that share the columns of a tile; otherwise each has a tile
    images: int  # of a cluster at a time
    shared_bytes: int
    sums_offset: int  # backward, from the rows to the partial sums
    cycles: float  # of a line, by estimate


def plan(
    num_positions: int,
    batch: int,
    C: int,
    limits: Limits,
    *,
    backward: bool,
    active: dict[tuple[int, int], int] | None = None,
) -> Plan | None:
    """The division that takes the least time by estimate; None if nothing fits.

    Arguments:
        active: How many clusters run at the same time, where that is known, by the number of blocks
            and of groups.
    """
    all_units = C // 8
    best = None
    for blocks in range(1, limits.largest_cluster + 1):
        units = -(-all_units // blocks)
        if blocks > 1 and units == -(-all_units // (blocks - 1)):
            continue  # a smaller cluster does the same
        # Whole clusters share one of the GPU's parts, of 16 multiprocessors or a few more.
        parts = max(1, limits.multiprocessors // 16)
        estimate = limits.multiprocessors if blocks == 1 else parts * (16 // blocks)
        for groups in (2, 1):
            widest = -(-blocks // groups) * units if backward else units // groups
            if units > MOST_UNITS[groups] or widest > 32:
                continue  # registers
            clusters = (active or {}).get((blocks, groups), estimate)
            for images in range(1, min(batch, 2 * TILE // groups // num_positions) + 1):
                sizes = (num_positions, images, C, blocks, units, backward)
                shared, offset = _shared_bytes(*sizes, limits.shared_bytes)
                if shared > limits.shared_bytes:
                    break
                waves = math.ceil(math.ceil(batch / images) / max(1, clusters))
                line = waves * _cycles(images * num_positions, C, blocks, units, groups, backward)
                if clusters and (best is None or line < best.cycles):
                    best = Plan(blocks, units, groups, images, shared, offset, line)
    return best


def _row(C: int, units: int, backward: bool) -> int:
    """Numbers from a row in shared memory to the next: an odd multiple of 8."""
    if backward:
        return 24 * units + (0 if units % 2 else 8)
    return C + (0 if C // 8 % 2 else 8)


def _shared_bytes(
    num_positions: int,
    images: int,
    C: int,
    blocks: int,
    units: int,
    backward: bool,
    most: int,
) -> tuple[int, int]:
    """Bytes of shared memory, and the offset of partial sums from the rows: 0 if only one of them
    fits at a time."""
    row = _row(C, units, backward)
    rows = (images * (num_positions + 1) + 1) * row * 2
    if not backward:
        biases = 4 * units * 8 * 4
        return 24 * units * 3 * row * 2 + biases + rows, 0
    weights = C * 3 * row * 2
    sums = blocks * images * num_positions * units * 16
    if weights + rows + sums <= most:
        return weights + rows + sums, rows
    return weights + max(rows, sums), 0


def _cycles(rows: int, C: int, blocks: int, units: int, groups: int, backward: bool) -> float:
    """Of a line: products, shared memory, gates, and waiting."""
    row = _row(C, units, backward)
    columns = C if backward else 24 * units
    tiles = -(-rows // TILE)
    product = tiles * TILE * columns * 3 * row / 2048
    memory = (tiles * columns + groups * tiles * TILE) * 3 * row * 2 / 128
    sent = rows * columns * 2 / 32 if backward else rows * units * 16 * blocks / 32
    return max(product, memory) + sent + rows * units * 8 * 0.4 + 1500


def unsupported(lines: Tensor, product_dtype: torch.dtype) -> str | None:
    """Why the backend cannot run on lines, with products in a type; None if it can."""
    if lines.device.type != "cuda" or torch.version.hip is not None:
        return "it needs a CUDA device"
    _, num_positions, batch, C = lines.shape
    if product_dtype not in (torch.bfloat16, torch.float16) or lines.dtype not in FEATURES:
        return f"its products are in bfloat16 or float16, not of {lines.dtype} in {product_dtype}"
    if C % 8:
        return f"the number of features must be a multiple of 8, not {C}"
    if torch.cuda.get_device_capability(lines.device) < (9, 0):
        return f"{torch.cuda.get_device_name(lines.device)} has a compute capability below 9.0"
    if reason := cluster.missing():
        return reason
    for backward in (False, True) if lines.numel() else ():
        limits = _limits(lines.device)
        if plan(num_positions, batch, C, limits, backward=backward) is None:
            return f"{C} features on {num_positions} positions do not fit in shared memory"
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
    """The corrected lines, see `correct_lines_reference` in nn.py; arguments are those of the
    backend `lines`."""
    tensors = (_aligned(lines), weight_ih, weight_hh, bias_ih, bias_hh)
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
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    tensors = (_aligned(grad_corrected), lines, *parameters, corrected)
    options = (reverse, keep_first, product_dtype)
    if coefficients is not None:
        return _sweep_backward(*tensors, *options, coefficients)
    return graphs.replayed(_sweep_backward, tensors, options)


def _aligned(lines: Tensor) -> Tensor:
    """Lines whose rows begin at multiples of 16 bytes."""
    return lines if lines.data_ptr() % 16 == 0 else lines.clone()


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
    operands = products.Operands.of(weight_ih, weight_hh, bias_ih, bias_hh, product_dtype)
    corrected = torch.empty_like(lines)
    for number, block in enumerate(products.blocks_of(lines, reverse, BLOCK_ROWS)):
        inside = slice(block.start, block.stop)
        own = products.own_products(lines[inside], operands)
        block_coefficients = None if coefficients is None else coefficients[inside]
        tensors = (lines, corrected, own, block_coefficients, operands.weight_ih, operands.bias)
        order = (block.stop - 1, -1) if reverse else (block.start, 1)
        flags = dict(continues=number > 0, keep_first=keep_first)
        _launch(ForwardArguments, tensors, block, order, product_dtype, flags)
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
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    w_ih = products.Operands.of(*parameters, product_dtype).weight_ih.t().contiguous()
    next_gates: Tensor | None = None  # of the line whose gradients were computed last

    def sequential(
        block: range, coefficients: Tensor, grad_gates: Tensor, grad_lines: Tensor
    ) -> None:
        nonlocal next_gates
        tensors = (grad_corrected, grad_lines, coefficients, grad_gates, next_gates, w_ih)
        order = (block.start, 1) if reverse else (block.stop - 1, -1)
        _launch(BackwardArguments, tensors, block, order, product_dtype, {})
        next_gates = grad_gates[-1 if reverse else 0]

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


def _launch(
    arguments: type[ForwardArguments] | type[BackwardArguments],
    tensors: tuple[Tensor | None, ...],
    block: range,
    order: tuple[int, int],
    product_dtype: torch.dtype,
    flags: dict[str, bool],
) -> None:
    """Runs a kernel over a block of lines.

    Arguments:
        arguments: Those of the kernel.
        tensors: In the order of its arguments; the first is one of lines.
        order: The line that is visited first, and the step to the next.
        flags: Further arguments by name.
    """
    lines, *_ = tensors
    _, num_positions, batch, C = lines.shape
    backward = arguments is BackwardArguments
    types = dict(
        FLOAT16=product_dtype == torch.float16,
        FEATURES=FEATURES[lines.dtype],
        KEEPS=not backward and tensors[3] is not None,
        BACKWARD=backward,
    )
    active: dict[tuple[int, int], int] = {}
    while True:  # until the kernel of the best plan is there, and says how many clusters can be
        chosen = plan(
            num_positions, batch, C, _limits(lines.device), backward=backward, active=active
        )
        if chosen is None:
            raise RuntimeError("a sweep does not fit in the shared memory of this device")
        constants = Constants(C, chosen.cluster, chosen.units, chosen.groups, **types)
        kernel = cluster.load(lines.device, constants)
        if chosen[:1] + chosen[2:3] in active:
            break
        active[chosen.cluster, chosen.groups] = kernel.active
    if not backward and not graphs.is_small(lines) and not graphs.is_capturing(lines.device):
        # Whether coefficients are kept depends on the free memory, and a capture must not compile.
        cluster.load(lines.device, constants._replace(KEEPS=not constants.KEEPS))
    num_clusters = min(-(-batch // chosen.images), kernel.active)
    sizes = dict(num_lines=len(block), num_positions=num_positions, batch=batch)
    strides = zip(("line_stride", "position_stride", "image_stride"), lines.stride(), strict=False)
    if backward:
        flags = dict(sums_offset=chosen.sums_offset)
    filled = arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        **dict(strides),
        **sizes,
        images=chosen.images,
        first=order[0],
        step=order[1],
        block_start=block.start,
        **flags,
    )
    kernel.launch(filled, num_clusters * chosen.cluster, chosen.shared_bytes)


@functools.cache
def _limits(device: torch.device) -> Limits:
    properties = torch.cuda.get_device_properties(device)
    largest = 16 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 8
    return Limits(cluster.shared_memory(device), properties.multi_processor_count, largest)
