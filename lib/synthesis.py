"""Images from a VAE: drawn from its prior, reconstructed, interpolated, traversed, and drawn around
given ones.

All noise depends on (seed, image, sample) only, so every function gives the same images again, to
the bit on one machine with one batch size; another batch size changes nothing but rounding. Layers
are counted from the topmost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .DisentanglementVAE import DisentanglementVAE
from .models import VAE
from .utils import keyed_noise, mixed_seed

OUTPUTS = ("most_probable", "sample")


def sample_images(model: VAE, count: int, temperature: float, **options: Any) -> Tensor:
    """All images of `sample_batches` at once, uint8 [count, C, H, W] on the CPU."""
    return torch.cat(list(sample_batches(model, count, temperature, **options)))


def sample_batches(
    model: VAE,
    count: int,
    temperature: float,
    *,
    seed: int,
    batch: int,
    output: str = "most_probable",
) -> Iterator[Tensor]:
    """`count` images drawn from the prior (paper, Figures 6 left and 10), in batches of uint8
    [B, C, H, W] on the CPU, computed when they are asked for.

    Arguments:
        temperature: Multiplies the prior's standard deviations.
        seed: Image `i` depends on (seed, i) and the temperature.
        batch: Images computed at a time.
        output: "most_probable" (the mean of the heaviest component, as in the paper's figures) or
            "sample" (a draw from the observation model, at the data's levels).
    """
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    for indices in _batches(range(count), batch):
        with torch.no_grad():
            params, _ = model.sample(len(indices), temperature, noise=_noise(model, seed, indices))
            if output == "most_probable":
                images = _most_probable(model, params)
            else:
                drawn = [_draw(model, params[[i]], seed, k) for i, k in enumerate(indices)]
                images = torch.cat(drawn)
        yield images


@torch.no_grad()
def reconstruct(
    model: VAE, images: Tensor, *, seed: int, batch: int, indices: Sequence[int] | None = None
) -> Tensor:
    """Most probable reconstructions of uint8 images [N, 3, H, W], the latents drawn from the
    posterior; on the CPU.

    Arguments:
        indices: Of the images in their data set; 0, 1, ... if not given. The noise depends on
            (seed, index).
        batch: Images computed at a time.
    """
    reconstructions = []
    for part in _batches(range(len(images)), batch):
        numbers = part if indices is None else [indices[i] for i in part]
        output = model(
            _encoded(model, images[part.start : part.stop]), _noise(model, seed, numbers)
        )
        reconstructions.append(_most_probable(model, output.params))
    return torch.cat(reconstructions)


@torch.no_grad()
def encode(
    model: VAE, images: Tensor, indices: Sequence[int], *, seed: int, batch: int
) -> list[Tensor]:
    """Latents of uint8 images [N, 3, H, W] drawn from the posterior, as in `reconstruct`.

    Returns:
        One tensor [N, z_size, H_i, W_i] for each layer on the model's device, topmost first.
    """
    latents = []
    for part in _batches(range(len(images)), batch):
        noise = _noise(model, seed, [indices[i] for i in part])
        latents.append(model(_encoded(model, images[part.start : part.stop]), noise).latents)
    return [torch.cat(layer) for layer in zip(*latents, strict=True)]


@torch.no_grad()
def interpolate(
    model: VAE,
    start: Sequence[Tensor],
    end: Sequence[Tensor],
    *,
    layers: int,
    temperature: float,
    frames: int,
    seed: int,
    batch: int,
) -> Tensor:
    """Images between two encoded ones (paper, Figure 5), uint8 [frames, 3, H, W] on the CPU.

    The latents of the top layers go linearly from one image's to the other's, ends included. Those
    below are drawn from the prior, with the same noise in all frames, so that only the
    interpolation changes them.

    Arguments:
        start, end: Latents of one image each, [1, z_size, H_i, W_i] at each layer.
        layers: How many layers, from the topmost, are interpolated: 1 ... depth.
        temperature: Of the layers below.
        frames: At least 2.
    """
    _check_layers(model, layers)
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    images = []
    weights = torch.linspace(0, 1, frames, dtype=model.dtype, device=model.device)
    for part in _batches(range(frames), batch):
        weight = weights[part.start : part.stop]
        latents = [
            torch.lerp(a, b, weight.view(-1, *[1] * (a.dim() - 1)))
            for a, b in zip(start[:layers], end[:layers], strict=True)
        ]
        noise = _noise(model, seed, [0] * len(part), [1] * len(part))
        images.append(_given(model, latents, len(part), temperature, noise))
    return torch.cat(images)


@torch.no_grad()
def neighborhood(
    model: VAE,
    latents: Sequence[Tensor],
    *,
    index: int,
    layers: int,
    temperature: float,
    count: int,
    seed: int,
    batch: int,
) -> Tensor:
    """Images drawn around an encoded one (paper, Figures 6 right and 11), uint8 [count, 3, H, W] on
    the CPU.

    Arguments:
        latents: Of the image, [1, z_size, H_i, W_i] at each layer.
        index: Of the image in its data set: the noise depends on (seed, index).
        layers: How many layers, from the topmost, keep the image's latents: 1 ... depth.
        temperature: Of the layers below, which are drawn from the prior.
        count: Images to draw.
    """
    _check_layers(model, layers)
    images = []
    for part in _batches(range(count), batch):
        kept = [z.expand(len(part), *z.shape[1:]) for z in latents[:layers]]
        noise = _noise(model, seed, [index] * len(part), [1 + i for i in part])
        images.append(_given(model, kept, len(part), temperature, noise))
    return torch.cat(images)


@torch.no_grad()
def traverse(
    model: DisentanglementVAE, image: Tensor, *, values: int, batch: int, span: float = 2.0
) -> Tensor:
    """What each latent dimension changes in an image: uint8 [Z * values, 3, H, W] on the CPU,
    `values` for each.

    One dimension at a time goes from -span to span; the others stay at the image's posterior means.

    Arguments:
        image: uint8 [1, 3, H, W].
        values: At least 2.
    """
    if values < 2:
        raise ValueError(f"values must be at least 2, got {values}")
    means = model.represent(_encoded(model, image))
    z = means.repeat_interleave(means.shape[1] * values, dim=0).view(-1, values, means.shape[1])
    dimensions = torch.arange(means.shape[1], device=model.device)
    z[dimensions, :, dimensions] = torch.linspace(
        -span, span, values, dtype=model.dtype, device=model.device
    )
    return torch.cat(
        [_most_probable(model, model.decode([part])) for part in z.flatten(0, 1).split(batch)]
    )


def _given(
    model: VAE, latents: list[Tensor], count: int, temperature: float, noise: list[Tensor]
) -> Tensor:
    """Images whose top layers have the given latents, the others drawn from the prior with
    `noise`."""
    below = [None] * (len(model.latent_shapes) - len(latents))
    params, _ = model.sample(count, temperature, latents=[*latents, *below], noise=noise)
    return _most_probable(model, params)


def _batches(numbers: range, batch: int) -> Iterator[range]:
    return (numbers[start : start + batch] for start in range(0, len(numbers), batch))


def _noise(
    model: VAE, seed: int, images: Sequence[int], samples: Sequence[int] | None = None
) -> list[Tensor]:
    return [
        eps.to(model.device, model.dtype)
        for eps in keyed_noise(model.latent_shapes, seed, images, samples)
    ]


def _encoded(model: VAE, images: Tensor) -> Tensor:
    return model.observation.encode(images.to(model.device)).to(model.dtype)


def _most_probable(model: VAE, params: Tensor) -> Tensor:
    return model.observation.to_uint8(model.observation.most_probable(params)).cpu()


def _draw(model: VAE, params: Tensor, seed: int, index: int) -> Tensor:
    generator = torch.Generator(params.device).manual_seed(mixed_seed(seed, index, -1))
    return model.observation.to_uint8(model.observation.sample(params, generator)).cpu()


def _check_layers(model: VAE, layers: int) -> None:
    if layers not in range(1, len(model.latent_shapes) + 1):
        raise ValueError(
            f"layers must be 1 ... {len(model.latent_shapes)} (the model's depth), got {layers}"
        )
