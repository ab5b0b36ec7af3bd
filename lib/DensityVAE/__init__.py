"""The hierarchical VAE for density estimation: IAF-VAE+ and, with SDN on the top-down path,
SDN-VAE."""

from .model import DensityVAE, Output

__all__ = ["DensityVAE", "Output"]
