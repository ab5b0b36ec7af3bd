"""Small pieces that several modules share: masked convolutions, weight normalization, reproducible
noise, checks of arguments."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


class MaskedConv2d(nn.Conv2d):
    """A square convolution, same size out as in, that sees only positions before its own in raster
    order.

    The mask multiplies the weight inside the graph, after weight normalization, so masked entries
    never receive a gradient through the convolution (Kingma et al. 2016; see DEVIATIONS.md).

    Arguments:
        in_ch, out_ch: Channels.
        kernel_size: Odd.
        include_centre: Whether a position sees itself (all channels of it) or only those strictly
            before it.
    """

    def __init__(self, in_ch: int, out_ch: int, kernel_size: int = 3, *, include_centre: bool):
        super().__init__(in_ch, out_ch, kernel_size, padding=kernel_size // 2)
        self.num_seen = kernel_size * kernel_size // 2 + include_centre
        self.register_buffer("mask", self._new_mask(), persistent=False)

    def _new_mask(self) -> Tensor:
        height, width = self.kernel_size
        mask = torch.arange(height * width, device=self.bias.device) < self.num_seen
        return mask.to(self.bias.dtype).view(1, 1, height, width)

    def _apply(self, *arguments, **keywords):
        """Moves or converts the layer. The mask, which no state dict has, is made anew: a layer
        that comes from the device meta has memory without content."""
        super()._apply(*arguments, **keywords)
        self.mask = self._new_mask()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


def initialize_convolutions(module: nn.Module) -> None:
    """Orthogonal weights for every convolution in `module`, then weight normalization (Salimans &
    Kingma 2016).

    Biases keep torch's default. The norm is taken per output channel: dimension 0, or 1 for
    transposed convolutions.
    """
    for convolution in [
        m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]:
        nn.init.orthogonal_(convolution.weight)
        weight_norm(convolution, dim=1 if isinstance(convolution, nn.ConvTranspose2d) else 0)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises ValueError unless an argument is one of the words that are allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_at_least(least: int, **sizes: int) -> None:
    """Raises ValueError unless all arguments, given with their names, are large enough."""
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 if it is narrower: likelihoods and KL divergences must not be summed in 16
    bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sum_over_image(x: Tensor) -> Tensor:
    """Sum over all but the batch dimension: [B, ...] -> [B]."""
    return x.flatten(1).sum(1)


def nats_to_bits_per_dim(nats: Tensor | float, image_shape: Sequence[int]) -> Tensor | float:
    """Nats per image to bits per dimension: nats / (C H W ln 2)."""
    return nats / (math.prod(image_shape) * math.log(2))


def mixed_seed(*numbers: int) -> int:
    """A 63-bit seed for a random generator from several integers; near numbers give unrelated
    seeds."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_noise(
    shapes: Sequence[Sequence[int]],
    seed: int,
    images: Sequence[int],
    samples: Sequence[int] | None = None,
) -> list[Tensor]:
    """Standard normal noise that depends on nothing but (seed, image, sample): not on batch, rank,
    order or device.

    Arguments:
        shapes: Shape of one image's latent at each layer, without the batch dimension.
        seed: Of the whole evaluation.
        images: Index of each batch item's image in its data set.
        samples: Index of each batch item's sample of that image; zeros if not given.

    Returns:
        One float32 tensor [B, *shape] on the CPU for each layer.
    """
    samples = [0] * len(images) if samples is None else samples
    sizes = [math.prod(shape) for shape in shapes]
    generator = torch.Generator()
    rows = []
    for image, sample in zip(images, samples, strict=True):
        generator.manual_seed(mixed_seed(seed, image, sample))
        rows.append(torch.randn(sum(sizes), generator=generator, dtype=torch.float32))
    flat = torch.stack(rows) if rows else torch.empty(0, sum(sizes), dtype=torch.float32)
    return [
        part.reshape(-1, *shape)
        for part, shape in zip(flat.split(sizes, dim=1), shapes, strict=True)
    ]
