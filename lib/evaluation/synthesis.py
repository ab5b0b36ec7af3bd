"""Images from a density VAE: drawn from its prior, or reconstructed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..DensityVAE import DensityVAE
from ..utils import keyed_noise

OUTPUTS = ("most_probable", "sample")


@torch.no_grad()
def sample_images(
    model: DensityVAE, count: int, temperature: float, *, seed: int, batch: int, output: str = "most_probable"
) -> Tensor:
    """`count` images drawn from the prior, uint8 [count, 3, H, W] on the CPU.

    Image `i` depends on (seed, i) and the temperature only, not on the batch size.

    Arguments:
        temperature: Multiplies the prior's standard deviations.
        batch: Images computed at a time.
        output: "most_probable" (the most probable component's mean, as in the paper's figures) or "sample" (a draw
            from the observation model, at the data's levels; this one depends on the batch size).
    """
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    device = model.h.device
    generator = torch.Generator(device).manual_seed(seed)
    images = []
    for start in range(0, count, batch):
        indices = range(start, min(start + batch, count))
        noise = [eps.to(model.h) for eps in keyed_noise(model.latent_shapes, seed, indices)]
        params, _ = model.sample(len(indices), temperature, noise=noise)
        images.append(_to_images(model, params, output, generator).cpu())
    return torch.cat(images)


@torch.no_grad()
def reconstruct(model: DensityVAE, images: Tensor, *, seed: int, batch: int) -> Tensor:
    """Most probable reconstructions of uint8 images [N, 3, H, W], the latents drawn from the posterior; on the CPU.

    The noise of image `i` depends on (seed, i) only, not on the batch size.
    """
    reconstructions = []
    for start in range(0, len(images), batch):
        x = model.observation.encode(images[start : start + batch].to(model.h.device)).to(model.h.dtype)
        indices = range(start, start + len(x))
        noise = [eps.to(model.h) for eps in keyed_noise(model.latent_shapes, seed, indices)]
        reconstructions.append(_to_images(model, model(x, noise).params, "most_probable", None).cpu())
    return torch.cat(reconstructions)


def _to_images(model: DensityVAE, params: Tensor, output: str, generator: torch.Generator | None) -> Tensor:
    observation = model.observation
    x = observation.sample(params, generator) if output == "sample" else observation.most_probable(params)
    return observation.to_uint8(x)
