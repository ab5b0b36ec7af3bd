"""What the two VAEs have in common: a pass, sampling, decoding, and a folder to be kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .pretrained import Pretrained
from .probability import make_observation


@dataclass
class Output:
    """What one pass through the model gives. Layers are in top-down order: index 0 is the topmost.

    distortion: `-log p(x|z)` in nats, [B].
    rates: KL divergence of each layer, or each dimension of a β-VAE, in nats, [B, num_rates].
    latents: one [B, z_size, H_i, W_i] for each layer.
    params: the observation model's parameters, [B, param_channels, H, W].
    """

    distortion: Tensor
    rates: Tensor
    latents: list[Tensor]
    params: Tensor

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound `log p(x|z) - sum(rates)` in nats, [B]."""
        return -self.distortion - self.rates.sum(1)


class VAE(Pretrained, nn.Module):
    """A VAE with one or several layers of latents.

    Subclasses have two methods: `bottom_up(x)`, which gives the posterior's parameters at each
    layer and the output of the pass, and `top_down(batch, ...)`, the generative path, which
    `DensityVAE.top_down` describes.

    Arguments:
        given: The `locals()` of the subclass's `__init__`.

    Attributes:
        image_shape: (C, H, W).
        observation: The observation model, `DML` or `DL`.
        latent_shapes: Of each layer in top-down order, without the batch dimension.
        num_rates: How many parts the KL has: one for each layer, or each dimension of a β-VAE.
    """

    latent_shapes: list[tuple[int, ...]]
    num_rates: int

    def __init__(self, given: Mapping[str, Any]):
        super().__init__()
        self.arguments = {  # as JSON keeps them
            name: value if isinstance(value, bool | int | float | str | None) else list(value)
            for name, value in given.items()
            if name not in ("self", "__class__")
        }
        size, channels = given["image_size"], given["channels"]
        self.image_shape = (channels, *((size, size) if isinstance(size, int) else size))
        self.observation = make_observation(
            given["obs_model"],
            given["nbits"],
            given["mix_components"],
            channels,
            given["dml_tails"],
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> Output:
        """Encodes and decodes a batch.

        Arguments:
            x: Data as the observation model encodes them (`self.observation.encode(uint8_images)`),
                [B, C, H, W].
            noise: Standard normal noise of each layer, top-down order, [B, *latent_shape]; drawn
                if not given.
        """
        posterior, _ = self.bottom_up(x)
        latents, rates, params = self.top_down(x.shape[0], posterior=posterior, noise=noise)
        return Output(-self.observation.log_prob(params, x), rates, latents, params)

    def sample(
        self,
        batch: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **given,
    ) -> tuple[Tensor, list[Tensor]]:
        """Observation parameters [B, param_channels, H, W] and latents drawn from the prior.

        `given` may hold `latents` and `noise`, see `DensityVAE.top_down`: fixed layers stay, the
            others are drawn.
        """
        latents, _, params = self.top_down(
            batch, temperature=temperature, generator=generator, **given
        )
        return params, latents

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Observation parameters [B, param_channels, H, W] for latents given at every layer,
        top-down order."""
        return self.top_down(latents[0].shape[0], latents=latents)[2]

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError unless data are of the shape that the model is for."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images must be [batch, {', '.join(map(str, self.image_shape))}], got "
                f"{list(x.shape)}"
            )
