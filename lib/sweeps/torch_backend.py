"""The backend `torch`: sweeps in plain torch operations, with gradients written by hand.

It runs on every device and is the fastest on a CPU. A line's own features are known before it is
visited, so their products with `weight_hh` are taken for many lines at once. Gates are computed in
place, side by side as [W_hn h + b_hn, r, z, n], so that the products with `weight_hh` fill the
first three and those with `weight_ih` the last three. The backward sweep takes the products of all
gradients block by block, in buffers that stay in the processor's cache and are never stored.

The gates may be kept for the backward sweep, which costs five more numbers per feature, or computed
again from the sweep's input and output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Rows (lines x positions x images) whose matrix products are taken together. On a CPU they should
# stay in its cache.
BLOCK_ROWS_CPU = 4096
BLOCK_ROWS_GPU = 32768


def state_dtype(lines: Tensor) -> torch.dtype:
    """The type of what is computed between products, and of the gates that are kept."""
    return torch.promote_types(lines.dtype, torch.float32)


def unsupported(lines: Tensor, product_dtype: torch.dtype) -> str | None:
    """Why it cannot run: it always can."""
    return None


def kept(lines: Tensor, product_dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of what it keeps: the gates."""
    num_lines, num_positions, batch, C = lines.shape
    return (num_lines, num_positions * batch, 4 * C), state_dtype(lines)


def sweep(
    lines: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    reverse: bool,
    keep_first: bool,
    product_dtype: torch.dtype,
    gates: Tensor | None = None,
) -> Tensor:
    """The corrected lines, see `correct_lines_reference` in nn.py.

    Arguments:
        lines: [line, position, batch, channel], channels side by side.
        weight_ih, weight_hh, bias_ih, bias_hh, reverse, keep_first: As for
            `correct_lines_reference`.
        product_dtype: Type of the operands of matrix products.
        gates: Are written if they are given, [line, position x batch, 4C] in the type of
            :func:`state_dtype`.
    """
    num_lines, num_positions, batch, C = lines.shape
    rows, state = num_positions * batch, state_dtype(lines)
    w_ih, w_own = weight_ih.to(product_dtype), _candidate_first(weight_hh).to(product_dtype)
    bias = _biases(bias_ih, bias_hh)

    blocks = _blocks(lines, reverse)
    longest = max(block.stop - block.start for block in blocks)
    # Gates, which are pre-activations first.
    buffer = lines.new_empty(longest, rows, 4 * C, dtype=state) if gates is None else gates
    by_parts = _by_parts(lines)
    parts = [part.t() for part in w_ih.split(C, dim=1)]
    neighbours = (
        None if by_parts else lines.new_zeros(1, num_positions, batch, 3 * C, dtype=product_dtype)
    )
    candidate = lines.new_empty(num_positions, batch, C, dtype=state)
    corrected = torch.empty_like(lines)
    previous = None
    for block in blocks:
        first = 0 if gates is None else block.start
        block_gates = buffer[first : first + block.stop - block.start]
        block_gates[:] = bias
        own = lines[block].reshape(-1, C).to(product_dtype)
        _add_product(block_gates.view(-1, 4 * C)[:, : 3 * C], own, w_own.t())
        for line in _indices(block, reverse):
            g = block_gates[line - block.start]
            if keep_first and previous is None:
                corrected[line] = lines[line]
            else:
                if previous is not None and by_parts:
                    _add_products(
                        g[:, C:],
                        corrected[previous].reshape(rows, C).to(product_dtype),
                        parts,
                        batch,
                    )
                elif previous is not None:
                    _gather_neighbours(corrected[previous : previous + 1], out=neighbours)
                    _add_product(g[:, C:], neighbours.view(rows, 3 * C), w_ih.t())
                g[:, C : 3 * C].sigmoid_()
                candidate_own, r, z, n = g.view(num_positions, batch, 4 * C).split(C, dim=-1)
                torch.addcmul(n, r, candidate_own, out=candidate)
                n.copy_(candidate.tanh_())  # tanh is slow on a part of a row
                if lines.dtype == state:
                    torch.lerp(candidate, lines[line], z, out=corrected[line])
                else:
                    corrected[line] = torch.lerp(candidate, lines[line].to(state), z)
            previous = line
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
    product_dtype: torch.dtype,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of lines, weight_ih, weight_hh, bias_ih and bias_hh.

    Arguments:
        grad_corrected: Gradient of the corrected lines.
        corrected: What :func:`sweep` returned for the other arguments, which are the same.
        gates: The gates that it kept; without them they are computed again, block by block.
    """
    num_lines, num_positions, batch, C = lines.shape
    rows, state = num_positions * batch, state_dtype(lines)
    w_ih, w_own = weight_ih.to(product_dtype), _candidate_first(weight_hh).to(product_dtype)
    bias = _biases(bias_ih, bias_hh)
    if grad_corrected.stride(-1) != 1:
        grad_corrected = grad_corrected.contiguous()

    grad_lines = torch.empty_like(lines)
    grad_w_ih = lines.new_zeros(3 * C, 3 * C, dtype=state)
    grad_w_own = lines.new_zeros(3 * C, C, dtype=state)
    grad_bias = lines.new_zeros(4 * C, dtype=state)
    blocks = _blocks(lines, reverse)
    longest = max(block.stop - block.start for block in blocks)
    # Gradients of the pre-activations.
    grad_gates_buffer = lines.new_empty(longest, num_positions, batch, 4 * C, dtype=state)
    grad_own_buffer = lines.new_empty(longest, num_positions, batch, C, dtype=state)
    neighbours_buffer = lines.new_zeros(longest, num_positions, batch, 3 * C, dtype=product_dtype)
    # What each position j of the line visited next sends back to the values at j-1, j, j+1 of this
    # one.
    by_parts = _by_parts(lines)
    parts = [part.contiguous() for part in reversed(w_ih.split(C, dim=1))]
    sent_back = (
        None if by_parts else lines.new_zeros(num_positions, batch, 3 * C, dtype=product_dtype)
    )
    visited_next = None
    total = lines.new_empty(num_positions, batch, C, dtype=state)
    first_visited = num_lines - 1 if reverse else 0

    for block in reversed(blocks):
        length = block.stop - block.start
        grad_gates, grad_own = grad_gates_buffer[:length], grad_own_buffer[:length]
        # The lines of the block that have a previous line, and the neighbours in those.
        shift = 1 if reverse else -1
        start, stop = max(block.start, -shift), min(block.stop, num_lines - shift)
        neighbours = neighbours_buffer[: stop - start]
        _gather_neighbours(corrected[start + shift : stop + shift], out=neighbours)
        if gates is None:
            block_gates = bias.expand(length, rows, 4 * C).contiguous()
            own = lines[block].reshape(-1, C).to(product_dtype)
            _add_product(block_gates.view(-1, 4 * C)[:, : 3 * C], own, w_own.t())
            with_previous = block_gates[start - block.start : stop - block.start].view(-1, 4 * C)
            _add_product(with_previous[:, C:], neighbours.view(-1, 3 * C), w_ih.t())
            block_gates[..., C : 3 * C].sigmoid_()
            candidate_own, r, _, n = block_gates.split(C, dim=-1)
            n.addcmul_(r, candidate_own).tanh_()
        else:
            block_gates = gates[block]
        for line in reversed(_indices(block, reverse)):
            if by_parts:
                total.copy_(grad_corrected[line])
                # The gradients of the line visited next stay where they are until this line's are
                # known.
                if visited_next is not None:
                    _add_products(total.view(rows, C), visited_next.to(product_dtype), parts, batch)
            else:
                torch.add(grad_corrected[line].to(state), sent_back[..., C : 2 * C], out=total)
                total[:-1] += sent_back[1:, :, :C]
                total[1:] += sent_back[:-1, :, 2 * C :]
            g, g_own = grad_gates[line - block.start], grad_own[line - block.start]
            if keep_first and line == first_visited:
                g.zero_()
                g_own.copy_(total)
                continue
            saved = block_gates[line - block.start].view(num_positions, batch, 4 * C)
            candidate_own, r, z, n = saved.split(C, dim=-1)
            g_candidate_own, g_r, g_z, g_n = g.split(C, dim=-1)
            torch.mul(total, z, out=g_own)
            torch.sub(lines[line], n, out=g_z).mul_(total)
            torch.ops.aten.tanh_backward.grad_input(total.sub_(g_own), n, grad_input=g_n)
            torch.mul(g_n, r, out=g_candidate_own)
            torch.mul(g_n, candidate_own, out=g_r)
            g_rz = g[..., C : 3 * C]
            torch.ops.aten.sigmoid_backward.grad_input(g_rz, saved[..., C : 3 * C], grad_input=g_rz)
            visited_next = g.view(rows, 4 * C)[:, C:]
            if line != first_visited and not by_parts:
                torch.mm(visited_next.to(product_dtype), w_ih, out=sent_back.view(rows, 3 * C))

        flat = grad_gates.view(-1, 4 * C)
        grad_bias += flat.sum(0)
        flat = flat.to(product_dtype)
        _add_product(grad_own.view(-1, C), flat[:, : 3 * C], w_own)
        grad_lines[block] = grad_own
        _add_product(
            grad_w_own, flat[:, : 3 * C].t(), lines[block].reshape(-1, C).to(product_dtype)
        )
        flat = flat[(start - block.start) * rows : (stop - block.start) * rows, C:]
        _add_product(grad_w_ih, flat.t(), neighbours.view(-1, 3 * C))

    grad_candidate_own, grad_rz = grad_w_own.split([C, 2 * C])
    return (
        grad_lines,
        grad_w_ih.to(weight_ih.dtype),
        torch.cat([grad_rz, grad_candidate_own]).to(weight_hh.dtype),
        grad_bias[C:].to(weight_ih.dtype, copy=True),
        torch.cat([grad_bias[C : 3 * C], grad_bias[:C]]).to(weight_hh.dtype),
    )


def _biases(bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """The biases of [W_hn h, r, z, n], 4C."""
    hr_hz, hn = bias_hh.split([2 * len(bias_hh) // 3, len(bias_hh) // 3])
    ir_iz, in_ = bias_ih.split([len(hr_hz), len(hn)])
    return torch.cat([hn, ir_iz + hr_hz, in_])


def _candidate_first(weight_hh: Tensor) -> Tensor:
    """The rows of the gates r, z, n in the order n, r, z."""
    rz, n = weight_hh.split([2 * weight_hh.shape[1], weight_hh.shape[1]])
    return torch.cat([n, rz])


def _blocks(lines: Tensor, reverse: bool) -> list[slice]:
    """Runs of lines, in the order of visiting, that are long enough for matrix products to be
    efficient."""
    num_lines, num_positions, batch, _ = lines.shape
    rows = BLOCK_ROWS_CPU if lines.device.type == "cpu" else BLOCK_ROWS_GPU
    length = min(num_lines, max(1, rows // max(1, num_positions * batch)))
    blocks = [slice(start, min(start + length, num_lines)) for start in range(0, num_lines, length)]
    return blocks[::-1] if reverse else blocks


def _indices(block: slice, reverse: bool) -> range:
    """The lines of a block in the order of visiting."""
    return range(block.stop - 1, block.start - 1, -1) if reverse else range(block.start, block.stop)


def _gather_neighbours(previous: Tensor, out: Tensor) -> None:
    """Writes [p[j-1], p[j], p[j+1]] for lines [line, position, batch, C]; beyond the edges `out`
    stays as it is."""
    C = previous.shape[-1]
    out[:, 1:, :, :C] = previous[:, :-1]
    out[..., C : 2 * C] = previous
    out[:, :-1, :, 2 * C :] = previous[:, 1:]


def _by_parts(lines: Tensor) -> bool:
    """Whether the three neighbours are multiplied one after another, instead of being gathered for
    one product: on a CPU the copies take longer than the sums, on a GPU two more launches do."""
    return lines.device.type == "cpu"


def _add_products(
    accumulator: Tensor, previous: Tensor, parts: Sequence[Tensor], batch: int
) -> None:
    """Adds products of the neighbours j-1, j, j+1 of a line, rows (position, image), with a factor
    for each."""
    before, same, after = parts
    _add_product(accumulator, previous, same)
    _add_product(accumulator[batch:], previous[: len(previous) - batch], before)
    _add_product(accumulator[: len(previous) - batch], previous[batch:], after)


def _add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """`accumulator += a @ b` in place; the accumulator's type may be wider than the factors'."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    else:
        accumulator += a @ b
