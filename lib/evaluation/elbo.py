"""The negative ELBO of a data set, in bits per dimension, and its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..DisentanglementVAE import DisentanglementVAE
from ..models import VAE
from ..utils import keyed_noise, nats_to_bits_per_dim
from .importance import LikelihoodError
from .options import LIMIT
from .registry import Context, Evaluation, Result, register
from .tables import as_bits, as_error

Progress = Callable[[int, str], None]


@register
class Elbo(Evaluation):
    name = "elbo"
    help = "negative ELBO on the validation images, bits/dim (and nats)"
    order = 10
    flags = (LIMIT,)
    needs = ("validation",)
    title = "Negative ELBO"
    paper = "Tables 1 and 4"
    explanation = (
        "The upper bound on −log p(x) that training minimizes, averaged over validation images: "
        "distortion (describing an image given its latents) plus rate (describing the latents); "
        "less is better."
    )
    facts = {
        "nats": ("nats for each image", as_error),
        "distortion": ("distortion, bits/dim", as_bits),
        "rate": ("rate, bits/dim", as_bits),
    }
    symbol = "−ELBO"

    def compute(self, context: Context) -> Result:
        return validation_elbo(context)

    def lines(self, result: Result, context: Context) -> list[str]:
        nats = ""
        if isinstance(context.model, DisentanglementVAE):
            nats = f", {result['nats']:.1f} nats"
        return [f"-ELBO: {bits_with_error(result)} bits/dim{nats} ({result['images']} images)"]


def validation_elbo(context: Context) -> Result:
    """What `negative_elbo` finds on the validation images, computed once for a command."""
    if "elbo" not in context.kept:
        limit = context.limit
        with context.bar(limit, "-ELBO") as bar:
            batches = context.in_batches(context.validation, limit, context.flags.batch)
            context.kept["elbo"] = negative_elbo(
                context.model, batches, seed=context.flags.seed, progress=shown_on(bar)
            )
    return dict(context.kept["elbo"])


def shown_on(bar: Any) -> Progress:
    """Shows on a bar how many images are done and the running estimate."""

    def advance(images: int, estimate: str) -> None:
        bar.set_postfix_str(f"{estimate} bits/dim")
        bar.update(images)

    return advance


def bits_with_error(result: Result) -> str:
    error = result["standard_error"]
    return f"{result['bits_per_dim']:.4f}" + (f" +- {error:.4f}" if error is not None else "")


@dataclass
class Estimate:
    """Mean of a per-image quantity in bits/dim with its standard error over images."""

    values: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        self.values.append(values.detach().cpu().double())

    @property
    def count(self) -> int:
        return sum(len(values) for values in self.values)

    @property
    def mean(self) -> float:
        return torch.cat(self.values).mean().item()

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None for fewer than two images."""
        return (
            torch.cat(self.values).std().item() / math.sqrt(self.count) if self.count > 1 else None
        )

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" +- {self.standard_error:.4f}" if self.count > 1 else "")


@torch.no_grad()
def negative_elbo(
    model: VAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, float | int | list[float]]:
    """Negative ELBO and its parts over a data set, in bits per dimension.

    Arguments:
        batches: (uint8 images [B, 3, H, W], their indices [B]); images with index -1 do not count.
        seed: Of the posterior's noise, which depends on (seed, index) only.
        progress: Called with (images done, running estimate) after each batch.

    Returns:
        `bits_per_dim`, its `standard_error` over images, `nats` for each image, `distortion`,
        `rate`, the number of `images`, and `rate_per_layer` (topmost first) or, of a
        disentanglement VAE, `rate_per_dimension`.

    Raises:
        LikelihoodError: if the ELBO of an image is not finite.
    """
    total, distortion, rates = Estimate(), Estimate(), Estimate()
    for images, indices in batches:
        real = indices >= 0
        if not real.any():
            continue
        x = model.observation.encode(images[real].to(model.device))
        indices = indices[real].tolist()
        noise = [
            eps.to(model.device, model.dtype)
            for eps in keyed_noise(model.latent_shapes, seed, indices)
        ]
        output = model(x, noise)
        for index, elbo in zip(indices, output.elbo.tolist(), strict=True):
            if not math.isfinite(elbo):
                raise LikelihoodError(f"the ELBO of image {index} is {elbo}: did training diverge?")
        total.add(nats_to_bits_per_dim(-output.elbo, model.image_shape))
        distortion.add(nats_to_bits_per_dim(output.distortion, model.image_shape))
        rates.add(nats_to_bits_per_dim(output.rates, model.image_shape))
        if progress:
            progress(len(indices), str(total))
    parts = torch.cat(rates.values).mean(0)
    return {
        "bits_per_dim": total.mean,
        "standard_error": total.standard_error,
        "nats": total.mean / nats_to_bits_per_dim(1.0, model.image_shape),
        "distortion": distortion.mean,
        "rate": parts.sum().item(),
        "rate_per_dimension"
        if isinstance(model, DisentanglementVAE)
        else "rate_per_layer": parts.tolist(),
        "images": total.count,
    }
