"""The training images nearest to given images, by mean squared error: a check for overfitting
(Figure 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Levels less 128 lie in [-128, 127]: a product of two is an integer of at most 2^14, and the sum of
# any 1024 products one of at most 2^24. float32 holds all of these, so nothing is rounded, in
# whatever order a matrix product sums. Nor does it matter if the inputs are cut to TF32 (11
# significant bits) or bfloat16 (8), for -128 is a power of two and the rest need 7 bits; sums stay
# in float32. The sums of such blocks of an image are then added as int64.
BLOCK = 1024
# Queries, and training images, of one matrix product.
ROWS = 256
# Numbers in one operand of a matrix product. 1 MiB on a CPU, so that the float copies stay in its
# cache (benchmarks/evaluation.py compares with products in float64 and with differences).
CPU_WORKSPACE, WORKSPACE = 2**18, 2**25

EMPTY = torch.iinfo(torch.int64).max


@dataclass
class Neighbours:
    """The k training images nearest to each of Q queries, the nearest first; all on the CPU.

    Arguments:
        indices: Of the training images, int64 [Q, k].
        mse: Mean over C, H, W of the squared differences of uint8 levels, float64 [Q, k].
        mirrored: Whether the image flipped left to right was the nearer one, bool [Q, k].
        images: The training images as compared (prepared, and flipped where `mirrored`), uint8 [Q,
            k, C, H, W].
        searched: Number of training images seen.
    """

    indices: Tensor
    mse: Tensor
    mirrored: Tensor
    images: Tensor
    searched: int


@torch.no_grad()
def nearest_images(
    queries: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    count: int,
    device: torch.device | str,
    mirror: bool = False,
    prepare: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Neighbours:
    """The `count` training images nearest to each query by mean squared error, in one pass over the
    training images.

    Exact: the result depends neither on the device nor on the size and order of the batches. Of
    equally near images the one with the lowest index comes first; an image is preferred to its
    mirror image. Memory holds the queries, one batch, the nearest images so far, and the indices
    seen.

    Arguments:
        queries: uint8 [Q, C, H, W].
        batches: (uint8 training images [B, C, H, W], their indices [B]); images with a negative
            index do not count.
        count: Neighbours of each query.
        device: Where to compute.
        mirror: Whether to compare with each training image flipped left to right too, as
            augmentation in training shows them. An image still counts once, with the nearer of the
            two.
        prepare: Applied to the training images on the device before they are compared, and before
            they are flipped; uint8 to uint8 of the same shape, such as the model's quantization.
        progress: Called with the number of images after each batch.

    Raises:
        ValueError: if images are not as above, `count` is below 1, an index comes twice or
            is too large to be told from others (2^28 at 256 x 256), or there are fewer than `count`
            training images.
    """
    _check_images(queries, "queries")
    if not queries.numel():
        raise ValueError(f"queries must not be empty, got {list(queries.shape)}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    shape = queries.shape[1:]
    # A candidate is one int64, [squared distance | index | mirrored], so that numerical order is
    # the order wanted.
    shift = 63 - (math.prod(shape) * 255**2).bit_length()
    # A query's mirror image is as far from an image as the query is from the image's mirror image.
    sides = torch.stack([queries, queries.flip(-1)] if mirror else [queries], dim=1).to(device)
    q = _padded_levels(sides.flatten(0, 1)).unflatten(0, sides.shape[:2])  # [Q, 1 or 2, D]
    nearest = torch.full((len(queries), count), EMPTY, device=device)
    kept: dict[int, Tensor] = {}
    seen: set[int] = set()

    for images, indices in batches:
        _check_images(images, "training images", shape)
        real = indices >= 0
        if not real.all():
            images, indices = images[real], indices[real]
        if not len(indices):
            continue
        positions = {index: position for position, index in enumerate(indices.tolist())}
        if len(positions) < len(indices) or not seen.isdisjoint(positions):
            raise ValueError("a training image came twice: the indices must differ")
        if max(positions) >= 2 ** (shift - 1):
            raise ValueError(
                f"indices must be below {2 ** (shift - 1)} for images {list(shape)}, got "
                f"{max(positions)}"
            )
        seen.update(positions)
        images = images.to(device)
        if prepare:
            images = prepare(images)

        x, codes = _padded_levels(images), 2 * indices.to(device, torch.int64)
        for x_part, codes_part in zip(x.split(ROWS), codes.split(ROWS), strict=True):
            for q_part, nearest_part in zip(q.split(ROWS), nearest.split(ROWS), strict=True):
                distances = _squared_distances(q_part.flatten(0, 1), x_part).unflatten(
                    0, q_part.shape[:2]
                )
                as_is, flipped = (
                    distances[:, 0] << shift | codes_part,
                    distances[:, -1] << shift | codes_part + mirror,
                )
                candidates = torch.cat([nearest_part, torch.minimum(as_is, flipped)], dim=1)
                nearest_part.copy_(candidates.topk(count, largest=False).values)

        found = (nearest[nearest != EMPTY] % 2**shift // 2).unique().tolist()
        # Copies, since a view would keep its whole batch alive.
        kept = {
            i: kept[i] if i in kept else images[positions[i]].to("cpu", copy=True) for i in found
        }
        if progress:
            progress(len(images))

    if len(seen) < count:
        raise ValueError(f"asked for the {count} nearest of {len(seen)} training images")
    nearest = nearest.cpu()
    indices, mirrored = nearest % 2**shift // 2, nearest % 2 == 1
    choices = zip(indices.flatten().tolist(), mirrored.flatten().tolist(), strict=True)
    pictures = [kept[index].flip(-1) if flipped else kept[index] for index, flipped in choices]
    return Neighbours(
        indices=indices,
        mse=(nearest >> shift).double() / math.prod(shape),
        mirrored=mirrored,
        images=torch.stack(pictures).unflatten(0, indices.shape),
        searched=len(seen),
    )


def _padded_levels(images: Tensor) -> Tensor:
    """Images [N, C, H, W] as [N, D], D the next multiple of BLOCK: filled up with zeros, in which
    no two differ."""
    levels = images.flatten(1)
    missing = -levels.shape[1] % BLOCK
    return F.pad(levels, (0, missing)) if missing else levels


def _squared_distances(q: Tensor, x: Tensor) -> Tensor:
    """||q - x||^2 = ||q||^2 + ||x||^2 - 2 qx of uint8 levels [Q, D] and [B, D]: exact, int64 [Q,
    B]."""
    workspace = CPU_WORKSPACE if x.device.type == "cpu" else WORKSPACE
    group = max(1, workspace // (max(len(q), len(x)) * BLOCK)) * BLOCK
    distances = torch.zeros(len(q), len(x), dtype=torch.int64, device=x.device)
    for q_group, x_group in zip(q.split(group, dim=1), x.split(group, dim=1), strict=True):
        q_blocks, x_blocks = _centred_blocks(q_group), _centred_blocks(x_group)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # its products would be rounded to 16 bits
            products = torch.bmm(q_blocks, x_blocks.transpose(1, 2)).sum(0, dtype=torch.int64)
        distances += _squared_norms(q_blocks)[:, None] + _squared_norms(x_blocks) - 2 * products
    return distances


def _centred_blocks(levels: Tensor) -> Tensor:
    """uint8 levels [N, blocks * BLOCK], less 128, as float32 [blocks, N, BLOCK]."""
    return (levels ^ 128).view(torch.int8).float().unflatten(1, (-1, BLOCK)).transpose(0, 1)


def _squared_norms(blocks: Tensor) -> Tensor:
    """int64 [N] of blocks [blocks, N, BLOCK], which are overwritten."""
    return blocks.square_().sum(2).sum(0, dtype=torch.int64)


def _check_images(images: Tensor, what: str, shape: torch.Size | None = None) -> None:
    """Raises ValueError unless `images` are uint8 [N, C, H, W] with 1 or 3 channels, and of `shape`
    [C, H, W] if given."""
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or (images.shape[1:] != shape if shape else images.shape[1] not in (1, 3))
    ):
        size = ", ".join(map(str, shape or ("1 or 3", "H", "W")))
        raise ValueError(
            f"{what} must be uint8 [N, {size}], got {images.dtype} {list(images.shape)}"
        )
