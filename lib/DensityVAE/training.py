"""Training of the density VAE with Lightning: objective, optimizer, weight average, metrics."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MeanMetric

from ..config import TrainConfig
from ..utils import keyed_noise, mixed_seed, nats_to_bits_per_dim
from .model import DensityVAE, Output


def free_bits_objective(output: Output, free_bits: float) -> Tensor:
    """Loss in nats per image: mean distortion + sum over layers of max(free_bits, batch mean of the layer's KL).

    Kingma et al. 2016, appendix C.8. With several ranks or accumulated batches the mean inside `max` is that of the
    rank's own batch; with `free_bits=0` that makes no difference. The release's form is another (DEVIATIONS.md).
    """
    return output.distortion.mean() + output.rates.mean(0).clamp(min=free_bits).sum()


class DensityTraining(pl.LightningModule):
    """Trains a `DensityVAE`; validation uses the exponential moving average of the weights.

    Batches are (uint8 images [B, 3, H, W], indices [B]); an index of -1 marks an image that only pads the batch.

    Arguments:
        model: The model to train.
        config: The run's configuration; stored in checkpoints as a plain dictionary.
        provenance: Plain strings to store with it: versions, commit.
    """

    def __init__(self, model: DensityVAE, config: TrainConfig, provenance: dict[str, str] | None = None):
        super().__init__()
        self.save_hyperparameters(config.to_dict())
        self.config = config
        self.provenance = provenance or {}
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_coef))
        self.average.requires_grad_(False).eval()
        self.val_distortion = MeanMetric()
        self.val_rates = nn.ModuleList(MeanMetric() for _ in range(config.depth))

    @property
    def averaged_model(self) -> DensityVAE:
        return self.average.module

    def on_train_start(self) -> None:
        # A resumed run takes its learning rate and decay from the flags, not from the checkpoint, if they changed.
        scheduler, optimizer = self.lr_schedulers(), self.optimizers()
        wanted = (self.config.lrate_decay, [self.config.lrate])
        if (scheduler.gamma, scheduler.base_lrs) != wanted:
            scheduler.gamma, scheduler.base_lrs = wanted
            for group in optimizer.param_groups:
                group["lr"] = self.config.lrate * self.config.lrate_decay**scheduler.last_epoch

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # The noise of a step depends on where it is in the run, so ranks differ and a resumed run draws the same.
        torch.manual_seed(mixed_seed(self.config.random_seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, _ = batch
        output = self.model(self.model.observation.encode(images))
        loss = free_bits_objective(output, self.config.free_bits)
        bits = self._bits_per_dim(-output.elbo.detach().mean())
        self.log("train/bpd", bits, prog_bar=True, logger=False)
        return {
            "loss": loss,
            "neg_elbo": bits,
            "distortion": self._bits_per_dim(output.distortion.detach().mean()),
            "rates": self._bits_per_dim(output.rates.detach().mean(0)),
        }

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, indices = batch
        model = self.averaged_model
        noise = keyed_noise(model.latent_shapes, self.config.random_seed, indices.tolist())
        output = model(model.observation.encode(images), [eps.to(model.h) for eps in noise])
        counts = (indices >= 0).float()
        self.val_distortion.update(self._bits_per_dim(output.distortion), counts)
        for metric, rate in zip(self.val_rates, output.rates.unbind(1), strict=True):
            metric.update(self._bits_per_dim(rate), counts)

    def on_validation_epoch_end(self) -> None:
        distortion = self.val_distortion.compute()
        rates = torch.stack([metric.compute() for metric in self.val_rates])
        values = {"val/bpd": distortion + rates.sum(), "val/distortion": distortion, "val/rate": rates.sum()}
        values |= {f"val/kl_{step}": rate for step, rate in enumerate(rates)}
        self.log_dict(values, logger=False)
        for metric in (self.val_distortion, *self.val_rates):
            metric.reset()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adamax(trainable, lr=self.config.lrate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=self.config.lrate_decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["provenance"] = dict(self.provenance)

    def _bits_per_dim(self, nats: Tensor) -> Tensor:
        return nats_to_bits_per_dim(nats, self.model.image_shape)
