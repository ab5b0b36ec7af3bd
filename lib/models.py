"""The two models behind one door: a configuration in, the model that it describes out."""

from __future__ import annotations

from collections.abc import Sequence

from .config import TrainConfig
from .DensityVAE import DensityVAE, Output
from .DisentanglementVAE import DisentanglementVAE
from .DisentanglementVAE.model import SDN_SCALE

VAE = DensityVAE | DisentanglementVAE

__all__ = ["VAE", "Output", "build_model"]


def build_model(config: TrainConfig, image_size: int | Sequence[int]) -> VAE:
    """The model of a run, with new weights.

    Arguments:
        config: Its task says which of the two; its group "Architecture" the rest.
        image_size: (height, width) of the images, or one number for both.

    Raises:
        ValueError: if the model cannot be; the message says what is allowed.
    """
    common = dict(backend=config.backend, analytic_kl=config.analytic_kl)
    if config.task == "density_estimation":
        return DensityVAE(image_size, **config.architecture(), **common)
    with_sdn = config.sdn_min_scale <= SDN_SCALE <= config.sdn_max_scale
    return DisentanglementVAE(
        image_size,
        z_size=config.z_size,
        obs_model=config.obs_model,
        nbits=config.nbits,
        mix_components=config.mix_components,
        sdn_nfeat=config.sdn_nfeat_0 if with_sdn else 0,
        sdn_dirs=range(config.sdn_num_dirs),
        border=config.border,
        **common,
    )
