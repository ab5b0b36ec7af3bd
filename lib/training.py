"""Training of a VAE with Lightning, whichever: objective with β, optimizer, noise, metrics."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from .config import TrainConfig
from .models import VAE, Output
from .utils import keyed_noise, mixed_seed


def annealed_beta(beta_final: float, beta_rate: float, step: int) -> float:
    """β after `step` optimizer steps: rises from 0 by `beta_rate * beta_final` a step; a rate of 1 is no annealing."""
    return beta_final if beta_rate >= 1 else beta_final * min(1.0, beta_rate * step)


def objective(output: Output, *, beta: float = 1.0, free_bits: float = 0.0) -> Tensor:
    """Loss in nats per image: mean distortion + β · sum over layers of max(free_bits, batch mean of the layer's KL).

    Free bits: Kingma et al. 2016, appendix C.8; β: Higgins et al. 2017. With several ranks or accumulated batches the
    mean inside `max` is that of the rank's own batch; with `free_bits=0` that makes no difference. The release's form
    is another (DEVIATIONS.md).
    """
    return output.distortion.mean() + beta * output.rates.mean(0).clamp(min=free_bits).sum()


class VAETraining(pl.LightningModule):
    """Trains a VAE and validates it.

    Batches are (uint8 images [B, 3, H, W], indices [B]); an index of -1 marks an image that only pads the batch.
    Subclasses say in which `unit` metrics are, and may validate other weights than those that are trained.

    Arguments:
        model: The model to train.
        config: The run's configuration; stored in checkpoints as a plain dictionary.
        provenance: Plain strings to store with it: versions, commit.
    """

    unit: str

    def __init__(self, model: VAE, config: TrainConfig, provenance: dict[str, str] | None = None):
        super().__init__()
        self.save_hyperparameters(config.to_dict())
        self.config = config
        self.provenance = provenance or {}
        self.model = model
        self.val_distortion = MeanMetric()
        self.val_rates = nn.ModuleList(MeanMetric() for _ in range(model.num_rates))

    @property
    def evaluated_model(self) -> VAE:
        """The model with the weights that are validated, sampled from and released."""
        return self.model

    @property
    def beta(self) -> float:
        """Weight of the KL in the next optimizer step; optimizer steps are what is counted, also in a resumed run."""
        return annealed_beta(self.config.beta_final, self.config.beta_rate, self.global_step)

    def in_units(self, nats: Tensor) -> Tensor:
        """Nats per image in the unit of the metrics."""
        raise NotImplementedError

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
        beta = self.beta
        output = self.model(self.model.observation.encode(images))
        neg_elbo = self.in_units(-output.elbo.detach().mean())
        rates = self.in_units(output.rates.detach().mean(0))
        self.log("train/neg_elbo", neg_elbo, prog_bar=True, logger=False)
        return {
            "loss": objective(output, beta=beta, free_bits=self.config.free_bits),
            "neg_elbo": neg_elbo,
            "distortion": self.in_units(output.distortion.detach().mean()),
            "beta_kl": beta * rates.sum(),
            "rates": rates,
        }

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, indices = batch
        model = self.evaluated_model
        noise = keyed_noise(model.latent_shapes, self.config.random_seed, indices.tolist())
        output = model(model.observation.encode(images), [eps.to(model.device, model.dtype) for eps in noise])
        counts = (indices >= 0).float()
        self.val_distortion.update(self.in_units(output.distortion), counts)
        for metric, rate in zip(self.val_rates, output.rates.unbind(1), strict=True):
            metric.update(self.in_units(rate), counts)

    def on_validation_epoch_end(self) -> None:
        distortion = self.val_distortion.compute()
        rates = torch.stack([metric.compute() for metric in self.val_rates])
        values = {"val/neg_elbo": distortion + rates.sum(), "val/distortion": distortion, "val/rate": rates.sum()}
        values |= {f"val/kl_{step}": rate for step, rate in enumerate(rates)}
        values["val/beta_kl"] = self.beta * rates.sum()
        self.log_dict(values, logger=False)
        for metric in (self.val_distortion, *self.val_rates):
            metric.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adamax(trainable, lr=self.config.lrate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=self.config.lrate_decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Earlier versions called the monitored metric val/bpd, and Lightning keeps the best one so far under its name.
        states = checkpoint.get("callbacks", {})
        checkpoint["callbacks"] = {key.replace("'val/bpd'", "'val/neg_elbo'"): state for key, state in states.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["provenance"] = dict(self.provenance)
