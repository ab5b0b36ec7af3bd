"""SDN-VAE and IAF-VAE+ (paper, section 4) as a plain module: assembly, training pass, sampling,
decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import make_convolution
from ..probability import POSTERIORS, PRIORS, standard_normal
from ..utils import check_at_least, check_choice, initialize_convolutions
from ..vae import VAE
from .blocks import BLOCKS, HALF_SCALE, HIGHWAY, SAME_SCALE, Block, choose_block
from .ladder import LadderLayer

SMALLEST_SDN = 50  # features; the schedule of sdn_nfeat_diff stops here


class DensityVAE(VAE):
    """Hierarchical VAE with a bottom-up and a top-down path (paper, section 4; DEVIATIONS.md).

    With `sdn_max_scale=0` no layer uses SDN: that is the paper's convolutional baseline, IAF-VAE+.

    Arguments (names of the authors' release):
        image_size: (height, width) of the images, or one number for both.
        channels: Colours of the images, 3 or 1 (grey).
        h_size: Deterministic channels.
        z_size: Latent channels of each layer.
        depth: Number of ladder layers; layer 0 is at the image's scale.
        ds_list: Layers that halve the scale (those reached at scale 1 do not).
        downsample_first: Whether the first convolution halves the scale already.
        post_model, prior_model: "IAF" or "IsoGaussian"; "IsoGaussian".
        obs_model, nbits, mix_components, dml_tails: Observation model "DML" or "DL", bits per
            colour, components and tails of DML.
        sdn_min_scale, sdn_max_scale: A layer whose lower side has a scale in this range uses ResSDN
            layers, or whatever `block` says.
        sdn_nfeat_0, sdn_nfeat_diff: Features of the SDN layers: at first, and how many fewer after
            each downsampling layer with SDN (not below 50).
        sdn_num_dirs: Directions of each SDN layer, 1 to 4, dealt out in turn.
        border, backend: See `lib.nn.SDNLayer`.
        block: "sdn", or for ablations "conv3", "conv5", "conv3x2" or "conv3x4", see `blocks.py`.
        highway: Whether blocks are gated with a convolution: "on", "off", or "auto": the spatial
            dependency layer is.
        analytic_kl: Closed-form KL where the posterior is Gaussian.
        checkpoint_activations: Whether training keeps only what passes between the layers, and
            computes a layer's activations anew in the backward pass: less memory for a second
            forward pass. The results are the same.

    Raises:
        ValueError: on arguments that cannot work; the message says what is allowed.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        channels: int = 3,
        h_size: int,
        z_size: int,
        depth: int,
        ds_list: Sequence[int] = (),
        downsample_first: bool = False,
        post_model: str = "IAF",
        prior_model: str = "IsoGaussian",
        obs_model: str = "DML",
        nbits: int = 8,
        mix_components: int = 5,
        dml_tails: str = "approximate",
        sdn_min_scale: int = 0,
        sdn_max_scale: int = 0,
        sdn_nfeat_0: int = 0,
        sdn_nfeat_diff: int = 0,
        sdn_num_dirs: int = 0,
        border: str = "zeros",
        backend: str = "auto",
        block: str = "sdn",
        highway: str = "auto",
        analytic_kl: bool = False,
        checkpoint_activations: bool = False,
    ):
        super().__init__(locals())
        check_at_least(1, h_size=h_size, z_size=z_size, depth=depth)
        check_choice("post_model", post_model, POSTERIORS)
        check_choice("prior_model", prior_model, PRIORS)
        check_choice("block", block, BLOCKS)
        check_choice("highway", highway, HIGHWAY)
        if wrong := [i for i in ds_list if i not in range(depth)]:
            raise ValueError(
                f"ds_list entries must lie in 0 ... {depth - 1} (depth {depth}), got {wrong}"
            )
        if analytic_kl and post_model != "IsoGaussian":
            raise ValueError(f"analytic_kl needs post_model IsoGaussian, got {post_model}")
        self.checkpoint_activations = checkpoint_activations
        _, height, width = self.image_shape
        gated = highway == "on" or highway == "auto" and block == "sdn"
        first_direction = 0

        def next_block(in_range: bool, num_features: int, num_dirs: int) -> Block:
            nonlocal first_direction
            if not in_range:
                return make_convolution
            if block != "sdn":
                return choose_block(block, gated)
            if num_features < 1 or num_dirs not in range(1, 5):
                raise ValueError(
                    f"with SDN on (sdn_max_scale {sdn_max_scale}) sdn_nfeat_0 must be at least 1 "
                    f"and sdn_num_dirs 1 to 4, got {num_features} and {num_dirs}; sdn_max_scale 0 "
                    "turns SDN off"
                )
            dirs = tuple((first_direction + i) % 4 for i in range(num_dirs))
            first_direction += num_dirs
            sweeps = dict(num_features=num_features, dirs=dirs, border=border, backend=backend)
            return choose_block(block, gated, **sweeps)

        check_at_least(1, image_size=min(height, width))
        _check_halvings((height, width), downsample_first + len({*ds_list}))
        if downsample_first and min(height, width) < 2:
            raise ValueError(f"downsample_first cannot halve images of {height}x{width}")
        scale = (height // 2, width // 2) if downsample_first else (height, width)
        num_features = sdn_nfeat_0
        layers, shapes = [], []
        for i in range(depth):
            in_range = sdn_max_scale > 0 and sdn_min_scale <= max(scale) <= sdn_max_scale
            downsample = i in ds_list and min(scale) > 1
            layers.append(
                LadderLayer(
                    h_size,
                    z_size,
                    downsample=downsample,
                    post_model=post_model,
                    prior_model=prior_model,
                    block_a=next_block(in_range, num_features, sdn_num_dirs),
                    block_b=next_block(in_range, num_features, sdn_num_dirs),
                    analytic_kl=analytic_kl,
                )
            )
            if downsample:
                scale = (scale[0] // 2, scale[1] // 2)
                if in_range:  # small models are not raised to SMALLEST_SDN (DEVIATIONS.md)
                    num_features = max(
                        num_features - sdn_nfeat_diff, min(num_features, SMALLEST_SDN)
                    )
            shapes.append((z_size, *scale))

        kernel = HALF_SCALE if downsample_first else SAME_SCALE
        last_block = next_block(sdn_max_scale >= max(height, width), sdn_nfeat_0, 4)
        self.first_layer = make_convolution(channels, h_size, **kernel, upsample=False)
        self.ladder_layers = nn.ModuleList(layers)
        self.h = nn.Parameter(torch.zeros(h_size))
        colours = self.observation.param_channels
        self.last_layer = nn.Sequential(
            nn.ELU(), last_block(h_size, colours, **kernel, upsample=downsample_first)
        )
        self.num_rates = depth
        self.latent_shapes = shapes[::-1]  # top-down order, without the batch dimension
        initialize_convolutions(self)
        # The top-down pass starts from `h`, not from the bottom-up pass's output, so these never
        # get a gradient: kept because the authors' checkpoints hold them, frozen because
        # data-parallel training would wait for them (DEVIATIONS.md).
        self.ladder_layers[-1].up_b.requires_grad_(False)

    def bottom_up(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Posterior parameters of each layer in top-down order, [B, q, H_i, W_i], and the output of
        the pass, [B, h_size, H_top, W_top]."""
        self.check_input(x)
        hidden = self.first_layer(x)
        posterior = []
        for layer in self.ladder_layers:
            hidden, q_params = self._run(layer.bottom_up, hidden)
            posterior.append(q_params)
        return posterior[::-1], hidden

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
        """The generative path. All sequences are in top-down order.

        Arguments:
            batch: Batch size B.
            posterior: Parameters from `bottom_up`; without them latents come from the prior.
            latents: Given latents; an entry None is drawn. None stands for all None.
            noise: Standard normal noise of the layers that are drawn; drawn with `generator` where
                None.
            temperature: Multiplies the prior's standard deviations.
            generator: On the model's device; torch's global one if not given.
            one_sample_kl: Whether rates are `log q(z) - log p(z)` even in a model with
                `analytic_kl`, as importance weights need them.

        Returns:
            Latents, rates in nats [B, depth] (zeros where nothing was drawn from the posterior),
            and the observation model's parameters [B, param_channels, H, W].
        """
        latents = self._one_per_layer("latents", latents, batch)
        noise = self._one_per_layer("noise", noise, batch)
        hidden = self.h.view(1, -1, 1, 1).expand(batch, -1, *self.latent_shapes[0][1:])
        drawn, rates = [], []
        for step, layer in enumerate(reversed(self.ladder_layers)):
            z, eps = latents[step], noise[step]
            if z is None and eps is None:
                shape = (batch, *self.latent_shapes[step])
                eps = standard_normal(shape, self.h.device, self.h.dtype, generator)
            q_params = None if posterior is None else posterior[step]
            given = dict(
                noise=eps,
                z=z,
                q_params=q_params,
                temperature=temperature,
                one_sample_kl=one_sample_kl,
            )
            hidden, z, kl = self._run(layer.top_down, hidden, **given)
            drawn.append(z)
            rates.append(z.new_zeros(batch) if kl is None else kl)
        return drawn, torch.stack(rates, dim=1), self._run(self.last_layer, hidden)

    def _run(self, part: Callable, *arguments: Tensor, **given: Any) -> Any:
        """`part(*arguments, **given)`, without keeping its activations if
        `checkpoint_activations`."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return part(*arguments, **given)
        # All noise is drawn outside of the parts: there is no random state to keep.
        return checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False, **given)

    def _one_per_layer(self, name: str, tensors: Sequence | None, batch: int) -> Sequence:
        if tensors is None:
            return [None] * len(self.latent_shapes)
        if len(tensors) != len(self.latent_shapes):
            raise ValueError(
                f"{name} must have one entry for each of the {len(self.latent_shapes)} layers, top "
                "first"
            )
        for step, (tensor, shape) in enumerate(zip(tensors, self.latent_shapes, strict=True)):
            if tensor is not None and tuple(tensor.shape) != (batch, *shape):
                raise ValueError(
                    f"{name}[{step}] must be {[batch, *shape]}, got {list(tensor.shape)}"
                )
        return tensors


def _check_halvings(size: tuple[int, int], wanted: int) -> None:
    """Raises ValueError unless both sides stay whole when they are halved so often, or until one
    is 1."""
    factor = 2 ** min(wanted, min(size).bit_length() - 1)
    if any(side % factor for side in size):
        raise ValueError(
            f"images of {size[0]}x{size[1]} cannot be halved {wanted} times: choose fewer entries "
            f"of ds_list, or images whose height and width are divisible by {2**wanted}"
        )
