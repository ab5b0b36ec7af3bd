"""Training of the density VAE: metrics in bits/dim, and an average of the weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import TrainConfig
from ..training.base import VAETraining
from ..utils import nats_to_bits_per_dim
from .model import DensityVAE


class DensityTraining(VAETraining):
    """Trains a `DensityVAE`; validation uses the exponential moving average of the weights.

    Arguments: those of `VAETraining`.
    """

    unit = "bits/dim"

    def __init__(
        self, model: DensityVAE, config: TrainConfig, provenance: dict[str, str] | None = None
    ):
        super().__init__(model, config, provenance)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_coef))
        self.average.requires_grad_(False).eval()

    @property
    def evaluated_model(self) -> DensityVAE:
        return self.average.module

    def in_units(self, nats: Tensor) -> Tensor:
        return nats_to_bits_per_dim(nats, self.model.image_shape)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if not self.skipped:
            self.average.update_parameters(self.model)
