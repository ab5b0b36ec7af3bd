"""The hierarchical VAE for density estimation: IAF-VAE+ and, with SDN on the top-down path,
SDN-VAE."""

from ..vae import Output
from .model import DensityVAE

__all__ = ["DensityVAE", "Output"]
