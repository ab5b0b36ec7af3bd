"""The VAE of the disentanglement experiments, and scores of how far a representation separates the
factors."""

from .model import DisentanglementVAE

__all__ = ["DisentanglementVAE"]
