"""The two models behind one door: a configuration in, the model that it describes out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from .config import TrainConfig
from .DensityVAE import DensityVAE
from .DisentanglementVAE import DisentanglementVAE
from .DisentanglementVAE.model import SDN_SCALE
from .vae import VAE, Output

__all__ = ["VAE", "Output", "build_model"]


def build_model(config: TrainConfig, image_size: int | Sequence[int], channels: int = 3) -> VAE:
    """The model of a run, with new weights.

    Arguments:
        config: Its task says which of the two; its group "Architecture" the rest.
        image_size: (height, width) of the images, or one number for both.
        channels: Of the images, 3 or 1.

    Raises:
        ValueError: if the model cannot be, or its weights do not fit into memory; the message says
            what is allowed.
    """
    with torch.device("meta"):  # takes no memory
        needed = sum(
            parameter.nbytes for parameter in _build(config, image_size, channels).parameters()
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"the model's weights take {needed / 1e9:.1f} GB, this machine's memory has "
            f"{memory / 1e9:.1f}: use a smaller depth, h_size, z_size, mix_components or "
            "sdn_nfeat_0"
        )
    return _build(config, image_size, channels)


def _build(config: TrainConfig, image_size: int | Sequence[int], channels: int = 3) -> VAE:
    common = dict(channels=channels, backend=config.backend, analytic_kl=config.analytic_kl)
    if config.task == "density_estimation":
        common["checkpoint_activations"] = config.checkpoint_activations
        return DensityVAE(image_size, **config.architecture(), **common)
    with_sdn = config.sdn_min_scale <= SDN_SCALE <= config.sdn_max_scale
    return DisentanglementVAE(
        image_size,
        z_size=config.z_size,
        obs_model=config.obs_model,
        nbits=config.nbits,
        mix_components=config.mix_components,
        dml_tails=config.dml_tails,
        sdn_nfeat=config.sdn_nfeat_0 if with_sdn else 0,
        sdn_dirs=range(config.sdn_num_dirs),
        border=config.border,
        **common,
    )
