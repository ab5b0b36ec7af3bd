"""One layer of the ladder: a bottom-up residual block, a top-down one, and the latent between them.

Paper, Figure 4: the ResNet block of IAF-VAE (Kingma et al. 2016) with gated residuals and, on the
top-down path, ResSDN layers instead of convolutions (or another block, `blocks.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import make_convolution
from ..probability import POSTERIORS, PRIORS, gaussian_kl
from .blocks import HALF_SCALE, SAME_SCALE, Block


class LadderLayer(nn.Module):
    """A layer with latent `z` of shape [B, z_size, H, W], at the lower of its two scales if it
    downsamples.

    Arguments:
        h_size: Number of deterministic channels.
        z_size: Number of latent channels.
        downsample: Whether the bottom-up pass halves the scale here and the top-down pass doubles
            it.
        post_model: "IAF" or "IsoGaussian".
        prior_model: "IsoGaussian".
        block_a, block_b: What makes `down_a` and `down_b`, a convolution or another block.
        analytic_kl: Whether the KL is the closed form instead of the one-sample estimate; Gaussian
            posteriors only.
    """

    def __init__(
        self,
        h_size: int,
        z_size: int,
        *,
        downsample: bool,
        post_model: str = "IAF",
        prior_model: str = "IsoGaussian",
        block_a: Block = make_convolution,
        block_b: Block = make_convolution,
        analytic_kl: bool = False,
    ):
        super().__init__()
        self.h_size = h_size
        self.downsample = downsample
        self.analytic_kl = analytic_kl
        self.post_model = POSTERIORS[post_model](z_size)
        self.prior_model = PRIORS[prior_model](z_size)
        q_params, p_params = self.post_model.param_channels, self.prior_model.param_channels
        kernel = HALF_SCALE if downsample else SAME_SCALE

        self.up_a = make_convolution(h_size, h_size + q_params, **kernel, upsample=False)
        self.up_b = make_convolution(h_size, 2 * h_size, **SAME_SCALE, upsample=False)
        self.down_a = block_a(h_size, h_size + q_params + p_params, **SAME_SCALE, upsample=False)
        self.down_b = block_b(z_size + h_size, 2 * h_size, **kernel, upsample=downsample)

    def bottom_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, h, H, W] to (output [B, h, H', W'], posterior parameters [B, q, H', W'])."""
        hidden, q_params = self.up_a(F.elu(x)).tensor_split([self.h_size], dim=1)
        transform, gate = self.up_b(F.elu(hidden)).chunk(2, dim=1)  # 2 x [B, h, H', W']
        shortcut = F.interpolate(x, scale_factor=0.5) if self.downsample else x
        return _gated_residual(shortcut, transform, gate), q_params

    def top_down(
        self,
        x: Tensor,
        *,
        noise: Tensor | None = None,
        z: Tensor | None = None,
        q_params: Tensor | None = None,
        temperature: float = 1.0,
        one_sample_kl: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The generative half of the layer.

        Arguments:
            x: [B, h, H', W'], from the layer above.
            noise: Standard normal [B, z_size, H', W']; needed unless `z` is given.
            z: The latent itself, if it is not to be drawn.
            q_params: The bottom-up pass's posterior parameters; without them `z` is drawn from the
                prior.
            temperature: Multiplies the prior's standard deviation.
            one_sample_kl: Whether to use the one-sample estimate in spite of `analytic_kl`.

        Returns:
            Output [B, h, H, W], the latent [B, z_size, H', W'], and if it was drawn from the
            posterior the KL divergence in nats, [B].
        """
        features = self.down_a(F.elu(x))
        channels = [self.h_size, self.post_model.param_channels, self.prior_model.param_channels]
        h_det, q_top_down, p_params = features.split(channels, dim=1)
        kl = None
        if z is None and q_params is not None:
            q_params = q_params + q_top_down
            z, log_q = self.post_model.sample(q_params, noise)
            if self.analytic_kl and not one_sample_kl:
                kl = gaussian_kl(q_params, p_params)
            else:
                kl = log_q - self.prior_model.log_prob(p_params, z)
        elif z is None:
            z, _ = self.prior_model.sample(p_params, noise, temperature)
        hidden = F.elu(torch.cat([z.to(h_det.dtype), h_det], dim=1))
        transform, gate = self.down_b(hidden).chunk(2, dim=1)  # 2 x [B, h, H, W]
        shortcut = F.interpolate(x, scale_factor=2.0) if self.downsample else x
        return _gated_residual(shortcut, transform, gate), z, kl


def _gated_residual(shortcut: Tensor, transform: Tensor, gate: Tensor) -> Tensor:
    """`(1 - g) * shortcut + g * transform`, with `g = sigmoid(gate - 1)` nearly closed at first."""
    return shortcut + torch.sigmoid(gate - 1) * (transform - shortcut)
