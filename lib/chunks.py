"""Log-probabilities that are sums over positions, computed in chunks to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers in one of the some 30 intermediates of DML's likelihood. Up to the first limit they are
# all kept for the backward pass: 120 MiB. Beyond it there are chunks, in a CPU's cache; on a GPU as
# large as launches cost little.
WHOLE = 2**20
CHUNK_CPU = 2**17
CHUNK_GPU = 2**22


def sum_over_positions(
    log_prob: Callable[[Tensor, Tensor], Tensor], params: Tensor, x: Tensor, numbers: int
) -> Tensor:
    """`log_prob(params, x)` [B], in chunks where its intermediates would take much memory.

    Of the dozens of intermediates, each as large as a third of DML's parameters, only a chunk's
    exist at any time. The result can be differentiated once by `params`; where `x` needs a
    gradient, too, or a compiler fuses the intermediates away, nothing is done in chunks.

    Arguments:
        log_prob: A function of parts of `params` and `x` whose values add up over positions.
        params: [B, channels, H, W].
        x: [B, C, H, W].
        numbers: How many numbers each intermediate has for a position.
    """
    whole = numbers * x[:, 0].numel() <= WHOLE
    if torch.compiler.is_compiling() or x.requires_grad or whole:
        return log_prob(params, x)
    return InChunks.apply(params, x, log_prob, numbers)


class InChunks(torch.autograd.Function):
    """`log_prob(params, x)`, some positions at a time; the backward pass computes it anew."""

    @staticmethod
    def forward(ctx, params: Tensor, x: Tensor, log_prob: Callable, numbers: int) -> Tensor:
        ctx.save_for_backward(params, x)
        ctx.log_prob, ctx.numbers = log_prob, numbers
        total = params.new_zeros(
            len(params), dtype=torch.promote_types(params.dtype, torch.float32)
        )
        for images, rows in _chunks(params, numbers):
            total[images] += log_prob(params[images, :, rows], x[images, :, rows])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        params, x = ctx.saved_tensors
        grad_params = torch.empty_like(params)
        for images, rows in _chunks(params, ctx.numbers):
            chunk = params[images, :, rows].detach().requires_grad_()
            with torch.enable_grad():
                value = ctx.log_prob(chunk, x[images, :, rows])
            (grad_params[images, :, rows],) = torch.autograd.grad(value, chunk, grad[images])
        return grad_params, None, None, None


def _chunks(params: Tensor, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of rows of [B, channels, H, W]: some whole images, or some rows of
    one."""
    batch, _, height, width = params.shape
    limit = CHUNK_CPU if params.device.type == "cpu" else CHUNK_GPU
    rows = max(1, limit // max(1, numbers * width))
    images = max(1, rows // max(1, height))
    for first_image in range(0, batch, images):
        for first_row in range(0, height, rows):
            yield slice(first_image, first_image + images), slice(first_row, first_row + rows)
