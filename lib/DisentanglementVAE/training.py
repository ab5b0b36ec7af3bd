"""Training of the β-VAE: metrics in nats per image, the KL of each latent dimension."""

from __future__ import annotations

from torch import Tensor

from ..training.base import VAETraining


class DisentanglementTraining(VAETraining):
    """Trains a `DisentanglementVAE`. Arguments: those of `VAETraining`."""

    unit = "nats"

    def in_units(self, nats: Tensor) -> Tensor:
        return nats
