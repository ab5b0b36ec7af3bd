"""The β-VAE of the disentanglement experiments, with a convolutional or an SDN decoder, as a plain
module."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..DensityVAE.blocks import HALF_SCALE
from ..nn import SDNLayer, make_convolution
from ..probability import IsoGaussian, standard_normal
from ..utils import check_at_least
from ..vae import VAE

IMAGE_SIZE = 64
SDN_SCALE = 32  # to which the layer leads that may be an SDN layer


class DisentanglementVAE(VAE):
    """VAE with one vector of latents for 64x64 images (paper, section 6; architecture of Locatello
    et al. 2019).

    Gaussian posterior, standard normal prior. The SDN decoder has a spatial dependency layer, not
    residual, in place of the transposed convolution that leads to scale 32.

    Arguments:
        image_size: (64, 64) or 64.
        channels: Colours of the images, 3 or 1 (grey).
        z_size: Number of latent dimensions Z.
        obs_model, nbits, mix_components, dml_tails: Observation model "DL" or "DML", bits per
            colour, components and tails of DML.
        sdn_nfeat: Features of the SDN layer; 0: the convolutional decoder.
        sdn_dirs: Directions of its sweeps.
        border, backend: See `lib.nn.SDNLayer`.
        analytic_kl: Closed-form KL, else its one-sample estimate.

    Raises:
        ValueError: on arguments that cannot work; the message says what is allowed.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = IMAGE_SIZE,
        *,
        channels: int = 3,
        z_size: int = 10,
        obs_model: str = "DL",
        nbits: int = 8,
        mix_components: int = 5,
        dml_tails: str = "approximate",
        sdn_nfeat: int = 0,
        sdn_dirs: Sequence[int] = (0,),
        border: str = "zeros",
        backend: str = "auto",
        analytic_kl: bool = True,
    ):
        super().__init__(locals())
        _, height, width = self.image_shape
        if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the model is for images of {IMAGE_SIZE}x{IMAGE_SIZE}, got {height}x{width}"
            )
        check_at_least(1, z_size=z_size)
        self.latent_shapes, self.num_rates = [(z_size,)], z_size
        self.analytic_kl = analytic_kl
        self.posterior = IsoGaussian(z_size)
        down = partial(make_convolution, **HALF_SCALE, upsample=False)
        up = partial(make_convolution, **HALF_SCALE, upsample=True)

        to_scale_32 = up(32, 32)
        if sdn_nfeat:
            sweeps = dict(num_features=sdn_nfeat, dirs=sdn_dirs, border=border, backend=backend)
            to_scale_32 = SDNLayer(32, 32, **HALF_SCALE, upsample=True, **sweeps)
        self.encoder = nn.Sequential(
            *(down(channels, 32), nn.ReLU()),  # scale 32
            *(down(32, 32), nn.ReLU()),  # 16
            *(down(32, 64), nn.ReLU()),  # 8
            *(down(64, 64), nn.ReLU()),  # 4
            nn.Flatten(),
            nn.Linear(1024, 2 * z_size),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(z_size, 256), nn.ReLU()),
            *(nn.Linear(256, 1024), nn.ReLU()),
            nn.Unflatten(1, (64, 4, 4)),
            *(up(64, 64), nn.ReLU()),  # scale 8
            *(up(64, 32), nn.ReLU()),  # 16
            *(to_scale_32, nn.ReLU()),
            up(32, self.observation.param_channels),  # 64
        )
        for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
            nn.init.normal_(linear.weight, std=0.02)

    def represent(self, x: Tensor) -> Tensor:
        """The posterior means of data as in `forward`, [B, Z]: the representation that metrics
        judge."""
        return self.encoder(x).chunk(2, dim=1)[0]

    def bottom_up(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """[posterior parameters [B, 2 Z], mean and log-variance], and the same once more as the
        pass's output."""
        self.check_input(x)
        q_params = self.encoder(x)
        return [q_params], q_params

    def top_down(
        self,
        batch: int,
        *,
        posterior: Sequence[Tensor] | None = None,
        latents: Sequence[Tensor | None] | None = None,
        noise: Sequence[Tensor | None] | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        one_sample_kl: bool = False,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Draws the latents, or takes them as given, and decodes; like `DensityVAE.top_down` with a
        single layer.

        Returns:
            [latents [B, Z]], rates in nats [B, Z] (zeros if nothing was drawn from the posterior),
            and the observation model's parameters [B, param_channels, 64, 64].
        """
        z = None if latents is None else latents[0]
        shape = (batch, *self.latent_shapes[0])
        rates = torch.zeros(shape, device=self.device)
        if z is None:
            eps = None if noise is None else noise[0]
            if eps is None:
                eps = standard_normal(shape, self.device, self.dtype, generator)
            if posterior is None:
                z = temperature * eps
            else:
                z, _ = self.posterior.sample(posterior[0], eps)
                rates = self._rates(
                    posterior[0], z, one_sample=one_sample_kl or not self.analytic_kl
                )
        return [z], rates, self.decoder(z.to(self.dtype))

    @staticmethod
    def _rates(q_params: Tensor, z: Tensor, *, one_sample: bool) -> Tensor:
        """KL divergence of each dimension from the standard normal prior in nats: [B, Z]."""
        mean, log_variance = (part.to(z.dtype) for part in q_params.chunk(2, dim=1))
        if one_sample:
            return 0.5 * (z**2 - log_variance - (z - mean) ** 2 * torch.exp(-log_variance))
        return 0.5 * (torch.exp(log_variance) + mean**2 - 1 - log_variance)
