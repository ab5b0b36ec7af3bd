"""Negative ELBO and importance-weighted negative log-likelihood of a data set, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..DensityVAE import DensityVAE
from ..utils import keyed_noise, nats_to_bits_per_dim


@dataclass
class Estimate:
    """Mean of a per-image quantity in bits/dim with its standard error over images."""

    values: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        self.values.append(values.detach().double().cpu())

    @property
    def count(self) -> int:
        return sum(len(values) for values in self.values)

    @property
    def mean(self) -> float:
        return torch.cat(self.values).mean().item()

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None for fewer than two images."""
        return torch.cat(self.values).std().item() / math.sqrt(self.count) if self.count > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" +- {self.standard_error:.4f}" if self.count > 1 else "")


Progress = Callable[[int, str], None]


@torch.no_grad()
def negative_elbo(
    model: DensityVAE, batches: Iterable[tuple[Tensor, Tensor]], *, seed: int, progress: Progress | None = None
) -> dict[str, float | int | list[float]]:
    """Negative ELBO and its parts over a data set, in bits per dimension.

    Arguments:
        batches: (uint8 images [B, 3, H, W], their indices [B]); images with index -1 do not count.
        seed: Of the posterior's noise, which depends on (seed, index) only.
        progress: Called with (images done, running estimate) after each batch.

    Returns:
        `bits_per_dim`, its `standard_error` over images, `distortion`, `rate`, `rate_per_layer` (topmost first), and
        the number of `images`.
    """
    total, distortion, rates = Estimate(), Estimate(), Estimate()
    for images, indices in batches:
        x, indices = _real_images(model, images, indices)
        if not len(indices):
            continue
        noise = [eps.to(model.h) for eps in keyed_noise(model.latent_shapes, seed, indices)]
        output = model(x, noise)
        total.add(nats_to_bits_per_dim(-output.elbo, model.image_shape))
        distortion.add(nats_to_bits_per_dim(output.distortion, model.image_shape))
        rates.add(nats_to_bits_per_dim(output.rates, model.image_shape))
        if progress:
            progress(len(indices), str(total))
    rate_per_layer = torch.cat(rates.values).mean(0)
    return {
        "bits_per_dim": total.mean,
        "standard_error": total.standard_error,
        "distortion": distortion.mean,
        "rate": rate_per_layer.sum().item(),
        "rate_per_layer": rate_per_layer.tolist(),
        "images": total.count,
    }


@torch.no_grad()
def negative_log_likelihood(
    model: DensityVAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    samples: int,
    chunk: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, float | int]:
    """Importance-weighted estimate of the negative log-likelihood (Burda et al. 2015), in bits per dimension.

    `-log(1/K sum_k p(x, z_k) / q(z_k | x))` with K samples an image. The bottom-up pass runs once per image; samples
    stream through the top-down pass in chunks, with a running log-sum-exp (DEVIATIONS.md).

    Arguments:
        batches: See `negative_elbo`.
        samples: K.
        chunk: Rows (images times samples) of one top-down pass.
        seed: Of the noise, which depends on (seed, index, sample) only: the result does not depend on `chunk`.
        progress: See `negative_elbo`.
    """
    total = Estimate()
    for images, indices in batches:
        x, indices = _real_images(model, images, indices)
        step = max(1, chunk // samples)
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            log_likelihood = importance_weighted(model, x[part], indices[part], samples=samples, chunk=chunk, seed=seed)
            total.add(nats_to_bits_per_dim(-log_likelihood, model.image_shape))
            if progress:
                progress(len(indices[part]), str(total))
    return {
        "bits_per_dim": total.mean,
        "standard_error": total.standard_error,
        "images": total.count,
        "samples": samples,
    }


@torch.no_grad()
def importance_weighted(
    model: DensityVAE, x: Tensor, indices: list[int], *, samples: int, chunk: int, seed: int
) -> Tensor:
    """Importance-weighted log-likelihood in nats of encoded images `x` [B, 3, H, W]: [B]."""
    posterior, _ = model.bottom_up(x)
    log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    per_pass = max(1, chunk // len(x))
    for start in range(0, samples, per_pass):
        numbers = range(start, min(start + per_pass, samples))
        repeat = len(numbers)
        keys = [(image, number) for image in indices for number in numbers]
        noise = keyed_noise(model.latent_shapes, seed, [k[0] for k in keys], [k[1] for k in keys])
        _, rates, params = model.top_down(
            len(keys),
            posterior=[q.repeat_interleave(repeat, dim=0) for q in posterior],
            noise=[eps.to(model.h) for eps in noise],
            one_sample_kl=True,
        )
        log_prob = model.observation.log_prob(params, x.repeat_interleave(repeat, dim=0))
        log_weights = (log_prob.double() - rates.double().sum(1)).view(len(x), repeat)
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_weights, dim=1))
    return log_sum - math.log(samples)


def _real_images(model: DensityVAE, images: Tensor, indices: Tensor) -> tuple[Tensor, list[int]]:
    """Encoded images on the model's device without those that pad the batch, and their indices."""
    real = indices >= 0
    return model.observation.encode(images[real].to(model.h.device)), indices[real].tolist()
