"""Validation images, each beside its reconstruction, and the mean squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..pictures import save_grid, side_by_side, square
from ..synthesis import reconstruct
from .options import COUNT, IMAGES
from .registry import Context, Evaluation, Result, register
from .tables import as_count, as_error


@register
class Reconstruction(Evaluation):
    name = "reconstruction"
    help = "validation images beside their reconstructions"
    order = 50
    flags = (COUNT, IMAGES)
    title = "Reconstructions"
    explanation = (
        "Validation images, each beside what the decoder makes of latents drawn from its posterior."
    )
    facts = {
        "nbits": ("bits of the model's images", as_count),
        "mse": ("mean squared error to the images in the model's bits, levels 0 to 255", as_error),
        "mse_8_bits": ("mean squared error to the 8-bit originals, levels 0 to 255", as_error),
    }

    def prepare(self, context: Context) -> None:
        _chosen(context)

    def compute(self, context: Context) -> Result:
        images, keys = _chosen(context)
        reconstructions = reconstruct(context.model, images, indices=keys, **context.noise)
        pairs = side_by_side(images, reconstructions)
        path = save_grid(pairs, context.folder / "reconstructions.png", 2 * square(len(images) / 2))
        observation = context.model.observation
        seen = observation.to_uint8(observation.encode(images))
        return {
            "images": len(images),
            "nbits": context.loaded.config.nbits,
            "mse": _mean_squared_error(seen, reconstructions),
            "mse_8_bits": _mean_squared_error(images, reconstructions),
            "pictures": [context.entry(path, "Images, each beside its reconstruction")],
        }


def _chosen(context: Context) -> tuple[torch.Tensor, Sequence[int]]:
    """The images, and what the noise of each depends on: those of `--images` if there are own
    pictures among them, otherwise the first of the validation images."""
    if any(isinstance(image, str) for image in context.flags.images):
        return context.images, context.image_keys
    keys = range(min(context.flags.count, len(context.validation)))
    return torch.stack([context.validation[index] for index in keys]), keys


def _mean_squared_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).square().mean().item()
