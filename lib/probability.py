"""Distributions of latents (Gaussian, inverse autoregressive flow) and of images (discretized
logistics).

All log-probabilities are in nats, summed over everything but the batch, and computed in at least
float32 whatever the training precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chunks import sum_over_positions
from .utils import MaskedConv2d, check_at_least, check_choice, full_precision, sum_over_image

TAILS = ("approximate", "exact")  # of DML


class IsoGaussian(nn.Module):
    """Gaussian with a diagonal covariance; parameters are the channels [mean, log-variance].

    Arguments:
        z_size: Number of latent channels Z.

    Shapes: parameters [B, 2Z, H, W]; noise, z [B, Z, H, W]; log-probability [B].
    """

    def __init__(self, z_size: int):
        super().__init__()
        self.param_channels = 2 * z_size

    def sample(
        self, params: Tensor, noise: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`z = mean + temperature * std * noise` and its log-probability at temperature 1."""
        mean, log_variance = full_precision(params).chunk(2, dim=1)
        z = mean + temperature * torch.exp(0.5 * log_variance) * noise
        return z, gaussian_log_prob(z, mean, log_variance)

    def log_prob(self, params: Tensor, z: Tensor) -> Tensor:
        return gaussian_log_prob(z, *full_precision(params).chunk(2, dim=1))


class IAF(nn.Module):
    """Gaussian followed by one step of inverse autoregressive flow (Kingma et al. 2016).

    Parameters are the channels [mean, log-variance, context]. With `z0 ~ N(mean, variance)` and
    `(m, s)` the output of an autoregressive network of masked convolutions over positions in raster
    order, `z = (z0 - m) / exp(s)` and `log q(z) = log N(z0) + sum(s)`. Only positions are ordered:
    the channels of one position do not depend on each other. On a 1x1 map, `m` and `s` therefore
    depend on the context alone, and `z` is Gaussian (DEVIATIONS.md).

    Arguments:
        z_size: Number of latent channels Z.

    Shapes: parameters [B, 2Z + context, H, W]; noise, z [B, Z, H, W]; log-probability [B].
    """

    def __init__(self, z_size: int):
        super().__init__()
        context_size = max(100 // z_size, 1) * z_size
        self.param_channels = 2 * z_size + context_size
        self.z_size = z_size
        self.arnn = AutoregressiveNetwork(z_size, context_size)

    def sample(self, params: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance, context = params.split(
            [self.z_size, self.z_size, params.shape[1] - 2 * self.z_size], 1
        )
        mean, log_variance = full_precision(mean), full_precision(log_variance)
        z0 = mean + torch.exp(0.5 * log_variance) * noise
        z, log_scale = self.flow(z0, context)
        return z, gaussian_log_prob(z0, mean, log_variance) + sum_over_image(log_scale)

    def flow(self, z0: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """`(z, s)`, both [B, Z, H, W]; the log-determinant of dz/dz0 is -sum(s)."""
        m, s = full_precision(self.arnn(z0, context)).chunk(2, dim=1)
        return (z0 - m) * torch.exp(-s), s


class AutoregressiveNetwork(nn.Module):
    """The IAF's network: three masked 3x3 convolutions, the first without the centre, the context
    added after it."""

    def __init__(self, z_size: int, context_size: int):
        super().__init__()
        self.conv_a = MaskedConv2d(z_size, context_size, include_centre=False)
        self.conv_b = nn.Sequential(
            nn.ELU(),
            MaskedConv2d(context_size, context_size, include_centre=True),
            nn.ELU(),
            MaskedConv2d(context_size, 2 * z_size, include_centre=True),
        )

    def forward(self, z0: Tensor, context: Tensor) -> Tensor:
        return 0.1 * self.conv_b(self.conv_a(z0) + context)


class Observation(nn.Module):
    """A distribution of images with `nbits` bits, 1 to 8, in each of 1 (grey) or 3 `channels`."""

    def __init__(self, nbits: int, channels: int):
        super().__init__()
        if nbits not in range(1, 9):
            raise ValueError(f"nbits must be an integer from 1 to 8, got {nbits!r}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels!r}")
        self.nbits, self.channels = nbits, channels


class DML(Observation):
    """Discretized mixture of logistics with sub-pixel correlation (PixelCNN++, Salimans et al.
    2017).

    Data are levels `k` in [-1, 1]: `2 k / (2^nbits - 1) - 1`. Parameter channels of colour images:
    `mix` logits, then for each colour `mix` means, `mix` log-scales (clamped at -7) and `mix`
    coefficients (through tanh), with which a colour depends on those before it. Grey images have
    one colour and no coefficients.

    Arguments:
        nbits: Bits per colour, 1 to 8.
        mix_components: Number of mixture components M.
        channels: C, 3 (red, green, blue) or 1 (grey).
        tails: How a level is scored to which a component gives a probability of less than 1e-5.
            "approximate": as in the literature since PixelCNN++, by the density at the middle of
            its bin times the bin's width. At 5 bits this is up to 31 nats too low, and the levels'
            probabilities do not quite sum to 1. "exact": by the probability of the bin.

    Shapes: parameters [B, 10M, H, W], or [B, 3M, H, W] of grey images; images [B, C, H, W];
    log-probability [B].
    """

    def __init__(
        self,
        nbits: int = 8,
        mix_components: int = 5,
        channels: int = 3,
        tails: str = "approximate",
    ):
        super().__init__(nbits, channels)
        check_choice("dml_tails", tails, TAILS)
        check_at_least(1, mix_components=mix_components)
        self.mix_components, self.tails = mix_components, tails
        self.numbers_per_colour = 3 if channels == 3 else 2  # mean, log-scale, coefficient
        self.param_channels = (1 + channels * self.numbers_per_colour) * mix_components
        self.half_bin = 1 / (2**nbits - 1)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images to data in [-1, 1], torch's default float type, on the images' device."""
        return quantize(images, self.nbits).to(torch.get_default_dtype()) * (2 * self.half_bin) - 1

    def to_uint8(self, x: Tensor) -> Tensor:
        """Data in [-1, 1] to uint8 images for display."""
        return ((full_precision(x) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return sum_over_positions(self._log_prob, params, x, self.channels * self.mix_components)

    def _log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits, means, log_scales, coefficients = self._split(params)
        x = x.to(means.dtype).unsqueeze(2)  # [B, C, 1, H, W]
        if self.channels == 3:
            red, green = x[:, 0], x[:, 1]
            means = torch.stack(
                [
                    means[:, 0],
                    means[:, 1] + coefficients[:, 0] * red,
                    means[:, 2] + coefficients[:, 1] * red + coefficients[:, 2] * green,
                ],
                dim=1,
            )
        centred = x - means  # [B, C, M, H, W]
        inverse_scale = torch.exp(-log_scales)
        upper = inverse_scale * (centred + self.half_bin)
        lower = inverse_scale * (centred - self.half_bin)
        middle = inverse_scale * centred
        log_width = math.log(2 * self.half_bin) - log_scales
        if self.tails == "exact":
            # log(sigmoid(u) - sigmoid(l)) = logsigmoid(u) + logsigmoid(-l) + log(1 - exp(l - u))
            log_bin = F.logsigmoid(upper) + F.logsigmoid(-lower) + _log_one_minus_exp(log_width)
        else:
            # In the far tails the difference cancels: the density at the middle times the bin's
            # width stands for it (DEVIATIONS.md).
            probability = torch.sigmoid(upper) - torch.sigmoid(lower)
            log_bin = torch.where(
                probability > 1e-5,
                torch.log(probability.clamp(min=1e-12)),
                middle + log_width - 2 * F.softplus(middle),
            )
        first, last = x < self.half_bin - 1, x > 1 - self.half_bin
        log_bin = torch.where(first, F.logsigmoid(upper), log_bin)  # darkest bin: open below
        log_bin = torch.where(last, F.logsigmoid(-lower), log_bin)  # brightest bin: open above
        log_components = log_bin.sum(1) + F.log_softmax(logits, dim=1)  # [B, M, H, W]
        return sum_over_image(torch.logsumexp(log_components, dim=1))

    def most_probable(self, params: Tensor) -> Tensor:
        """Mean of the component with the greatest weight at each position, in [-1, 1], not rounded
        to levels. Another level may be more probable where components overlap."""
        logits, means, _, coefficients = self._split(params)
        component = logits.argmax(1)
        return self._colours(means, coefficients, component, lambda colour, mean: mean)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw at the data's levels: component, then red, green given red, blue given both."""
        logits, means, log_scales, coefficients = self._split(params)
        uniform = torch.rand(
            logits.shape, generator=generator, device=logits.device, dtype=logits.dtype
        )
        component = (logits - torch.log(-torch.log(_inside_unit_interval(uniform)))).argmax(1)
        noise = _logistic_noise(means[:, :, 0], generator)
        scales = torch.exp(self._take(log_scales, component))

        def draw(colour: int, mean: Tensor) -> Tensor:
            value = mean + scales[:, colour] * noise[:, colour]
            level = ((value.clamp(-1, 1) + 1) / (2 * self.half_bin)).round()
            return level * (2 * self.half_bin) - 1

        return self._colours(means, coefficients, component, draw)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Logits [B, M, H, W]; means, log-scales and, of colour images, coefficients, each
        [B, C, M, H, W]."""
        params = full_precision(params)
        B, _, H, W = params.shape
        M, numbers = self.mix_components, self.numbers_per_colour
        logits, rest = params.split([M, self.channels * numbers * M], dim=1)
        rest = rest.reshape(B, self.channels, numbers, M, H, W)
        means, log_scales = rest[:, :, 0], rest[:, :, 1].clamp(min=-7)
        return logits, means, log_scales, torch.tanh(rest[:, :, 2]) if numbers == 3 else None

    @staticmethod
    def _take(values: Tensor, component: Tensor) -> Tensor:
        """[B, C, M, H, W] at the chosen component [B, H, W]: [B, C, H, W]."""
        index = component[:, None, None].expand(-1, values.shape[1], 1, -1, -1)
        return values.gather(2, index).squeeze(2)

    def _colours(
        self, means: Tensor, coefficients: Tensor | None, component: Tensor, choose: Callable
    ) -> Tensor:
        """The colours of the chosen component [B, H, W] in turn, each chosen by
        `choose(colour, mean)` given those before it: [B, C, H, W]."""
        means = self._take(means, component)
        red = choose(0, means[:, 0]).clamp(-1, 1)  # or grey
        if coefficients is None:
            return red.unsqueeze(1)
        coefficients = self._take(coefficients, component)
        green = choose(1, means[:, 1] + coefficients[:, 0] * red).clamp(-1, 1)
        blue = choose(2, means[:, 2] + coefficients[:, 1] * red + coefficients[:, 2] * green).clamp(
            -1, 1
        )
        return torch.stack([red, green, blue], dim=1)


def _log_one_minus_exp(log_width: Tensor) -> Tensor:
    """`log(1 - exp(-w))` of `w = exp(log_width)`, also where `w` is too small for a number."""
    width = torch.exp(log_width)
    little = width.clamp(max=1e-3)
    series = log_width - little / 2 + little**2 / 24  # the next term is w^4 / 2880
    return torch.where(width < 1e-3, series, torch.log(-torch.expm1(-width.clamp(min=1e-3))))


class DL(Observation):
    """Discretized logistic with one learnt scale (Kingma et al. 2016), as a proper distribution.

    Level `k` is the bin [k / 2^nbits - 0.5, (k + 1) / 2^nbits - 0.5), given as data by its lower
    edge. The first and the last bin are open, so that the levels' probabilities sum to 1. The
    authors' release leaves them closed and has its data at k / (2^nbits - 1) - 0.5, so that its
    checkpoints with DL are refused (DEVIATIONS.md). Parameter channels: the colours' means,
    clamped to +-(0.5 - 1/512).

    Arguments:
        nbits: Bits per colour, 1 to 8.
        channels: C, 3 (red, green, blue) or 1 (grey).

    Shapes: parameters [B, C, H, W]; images [B, C, H, W]; log-probability [B].
    """

    def __init__(self, nbits: int = 8, channels: int = 3):
        super().__init__(nbits, channels)
        self.param_channels = channels
        self.log_scale = nn.Parameter(torch.zeros(()))

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images to data in [-0.5, 0.5), torch's default float type, on the images'
        device."""
        return quantize(images, self.nbits).to(torch.get_default_dtype()) / 2**self.nbits - 0.5

    def to_uint8(self, x: Tensor) -> Tensor:
        """Data in [-0.5, 0.5) to uint8 images for display."""
        return (
            (self._level(full_precision(x)) * (255 / (2**self.nbits - 1))).round().to(torch.uint8)
        )

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean = self.most_probable(params)
        x = x.to(mean.dtype)
        scale = torch.exp(full_precision(self.log_scale))
        lower = (x - mean) / scale
        upper = (x + 2**-self.nbits - mean) / scale
        # log(sigmoid(u) - sigmoid(l)) = logsigmoid(u) + logsigmoid(-l) + log(1 - exp(l - u)),
        # stable everywhere. An open edge is a logsigmoid of infinity, that is 0, and no third term.
        first, last = x < 2**-self.nbits / 2 - 0.5, x > 0.5 - 1.5 * 2**-self.nbits
        width = torch.log(-torch.expm1(-(2**-self.nbits) / scale))
        log_bin = (
            torch.where(last, 0.0, F.logsigmoid(upper))
            + torch.where(first, 0.0, F.logsigmoid(-lower))
            + torch.where(first | last, 0.0, width)
        )
        return sum_over_image(log_bin)

    def most_probable(self, params: Tensor) -> Tensor:
        """The means, in (-0.5, 0.5), not rounded to levels."""
        return full_precision(params).clamp(-0.5 + 1 / 512, 0.5 - 1 / 512)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw at the data's levels."""
        mean = self.most_probable(params)
        value = mean + torch.exp(self.log_scale) * _logistic_noise(mean, generator)
        return self._level(value) / 2**self.nbits - 0.5

    def _level(self, x: Tensor) -> Tensor:
        return torch.floor((x + 0.5) * 2**self.nbits).clamp(0, 2**self.nbits - 1)


POSTERIORS = {"IAF": IAF, "IsoGaussian": IsoGaussian}
PRIORS = {"IsoGaussian": IsoGaussian}
OBSERVATIONS = ("DML", "DL")


def make_observation(
    name: str,
    nbits: int,
    mix_components: int,
    channels: int = 3,
    dml_tails: str = "approximate",
) -> Observation:
    """The observation model called `name`, "DML" or "DL" (`mix_components` and `dml_tails` are
    DML's), of images with 3 or 1 `channels`."""
    check_choice("obs_model", name, OBSERVATIONS)
    if name == "DML":
        return DML(nbits, mix_components, channels, dml_tails)
    return DL(nbits, channels)


def standard_normal(
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Standard normal noise, drawn with torch's global generator if none is given."""
    # torch.compile cannot draw for a batch of any size with a generator, not even with None.
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def gaussian_log_prob(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(z; mean, exp(log_variance)) in nats, summed over all but the batch: [B]."""
    squared = (z - mean) ** 2 * torch.exp(-log_variance)
    return sum_over_image(-0.5 * (math.log(2 * math.pi) + log_variance + squared))


def gaussian_kl(q_params: Tensor, p_params: Tensor) -> Tensor:
    """KL(q || p) in nats of two diagonal Gaussians given as [mean, log-variance] channels: [B]."""
    q_mean, q_log_variance = full_precision(q_params).chunk(2, dim=1)
    p_mean, p_log_variance = full_precision(p_params).chunk(2, dim=1)
    ratio = torch.exp(q_log_variance - p_log_variance)
    distance = (q_mean - p_mean) ** 2 * torch.exp(-p_log_variance)
    return sum_over_image(0.5 * (ratio + distance - 1 - q_log_variance + p_log_variance))


def quantize(images: Tensor, nbits: int) -> Tensor:
    """uint8 images to `nbits` bits, levels 0 ... 2^nbits - 1: floor(image / 2^(8 - nbits))."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    return images >> (8 - nbits)


def _inside_unit_interval(uniform: Tensor) -> Tensor:
    return uniform.clamp(1e-5, 1 - 1e-5)


def _logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return torch.logit(_inside_unit_interval(uniform))
