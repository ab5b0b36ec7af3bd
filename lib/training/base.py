"""Training of a VAE with Lightning, whichever: objective with β, optimizer, noise, metrics."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ..checkpoint import CheckpointError
from ..config import TrainConfig
from ..models import VAE, Output
from ..utils import keyed_noise, mixed_seed
from .lightning_internals import completed_epochs, set_loop_progress
from .processes import log_rank_zero
from .resume import Position


def annealed_beta(beta_final: float, beta_rate: float, step: int) -> float:
    """β after `step` optimizer steps: rises from 0 by `beta_rate * beta_final` a step; a rate of 1
    is no annealing."""
    return beta_final if beta_rate >= 1 else beta_final * min(1.0, beta_rate * step)


def objective(output: Output, *, beta: float = 1.0, free_bits: float = 0.0) -> Tensor:
    """Loss in nats per image: mean distortion + β · sum over layers of max(free_bits, batch mean of
    the layer's KL).

    Free bits: Kingma et al. 2016, appendix C.8; β: Higgins et al. 2017. With several ranks or
    accumulated batches the mean inside `max` is that of the rank's own batch. `free_bits=0` means
    no free bits and no `max`, since one-sample estimates of a KL may be negative: the loss is -ELBO
    for β = 1, and its mean over ranks is the loss of all their images. The release's form is
    another (DEVIATIONS.md).

    Arguments:
        output: Of a batch of images, with `distortion` [B] and `rates` [B, layers] in nats.
        beta: Weight of the KL.
        free_bits: Nats of each layer that cost nothing.
    """
    rates = output.rates.mean(0)
    if free_bits > 0:
        rates = rates.clamp(min=free_bits)
    return output.distortion.mean() + beta * rates.sum()


def float64_mean() -> MeanMetric:
    """A mean over all ranks that is summed in float64, so that how images are shared out changes
    nothing that is logged; Apple's GPUs have float32 alone."""
    on_apple = torch.backends.mps.is_available()
    return MeanMetric().set_dtype(torch.float32 if on_apple else torch.float64)


def tensor_shape(tensors: dict[str, Any], name: str) -> Any:
    """The shape of a tensor, or None if there is none."""
    return getattr(tensors.get(name), "shape", None)


class VAETraining(pl.LightningModule):
    """Trains a VAE and validates it.

    Batches are (uint8 images [B, 3, H, W], keys [B]); a key says which image it is and in which
    pass over the data, and -1 marks an image that only pads the batch. Subclasses say in which
    `unit` metrics are, and may validate other weights than those that are trained.

    Attributes:
        position: Where the run is; callbacks keep it up to date.
        lrate_factor: Of the learning rate, below 1 once a run went back to an earlier checkpoint,
            or validations in a row were no better (`lrate_patience`).
        grad_norm: Of the last optimizer step, before clipping.
        skipped: Whether the last optimizer step changed nothing, as its loss or a gradient was not
            finite.

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
        self.val_distortion = float64_mean()
        self.val_rates = nn.ModuleList(float64_mean() for _ in range(model.num_rates))
        self.position = Position()
        self.lrate_factor = 1.0
        self.best_validation, self.validations_since = float("inf"), 0
        self.grad_norm = torch.tensor(float("nan"))
        self.skipped = False

    @property
    def evaluated_model(self) -> VAE:
        """The model with the weights that are validated, sampled from and released."""
        return self.model

    @property
    def beta(self) -> float:
        """Weight of the KL in the next optimizer step; optimizer steps are what is counted, also in
        a resumed run."""
        return annealed_beta(self.config.beta_final, self.config.beta_rate, self.global_step)

    def in_units(self, nats: Tensor) -> Tensor:
        """Nats per image in the unit of the metrics."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        # A resumed run takes its learning rate and decay from the flags, not from the checkpoint,
        # if they changed.
        scheduler = self.lr_schedulers()
        if (scheduler.gamma, scheduler.base_lrs) != (
            self.config.lrate_decay,
            [self.config.lrate * self.lrate_factor],
        ):
            self.set_lrate()

    def set_lrate(self) -> None:
        """Sets the learning rate and its decay to those of the flags, times `lrate_factor`."""
        scheduler, optimizer = self.lr_schedulers(), self.optimizers()
        lrate = self.config.lrate * self.lrate_factor
        scheduler.gamma, scheduler.base_lrs = self.config.lrate_decay, [lrate]
        for group in optimizer.param_groups:
            group["initial_lr"] = lrate
            group["lr"] = lrate * scheduler.gamma**scheduler.last_epoch

    @property
    def global_batch(self) -> int:
        """Images in the batches of all ranks together."""
        return self.config.batch * self.trainer.world_size

    def seed_step(self, batch_idx: int) -> None:
        """Seeds all generators by where in the run a batch is, so ranks differ and a resumed run
        draws the same.

        No state of a generator needs to be kept in a checkpoint, and none depends on the number of
        processes.
        """
        seed = mixed_seed(self.config.random_seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(seed)  # of the GPUs, too
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seed_step(batch_idx)

    def compute(self, batch: tuple[Tensor, Tensor]) -> Output:
        """The model's output for a training batch."""
        images, keys = batch
        noise = None
        if self.config.noise == "image":
            drawn = keyed_noise(
                self.model.latent_shapes, self.config.random_seed, keys.tolist(), [1] * len(keys)
            )
            noise = [eps.to(self.model.device, self.model.dtype) for eps in drawn]
        return self.model(self.model.observation.encode(images), noise)

    def loss(self, output: Output) -> Tensor:
        """What is minimized, in nats per image."""
        return objective(output, beta=self.beta, free_bits=self.config.free_bits)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        output = self.compute(batch)
        neg_elbo = self.in_units(-output.elbo.detach().mean())
        rates = self.in_units(output.rates.detach().mean(0))
        self.log("train/neg_elbo", neg_elbo, prog_bar=True, logger=False)
        return {
            "loss": self.loss(output),
            "neg_elbo": neg_elbo,
            "distortion": self.in_units(output.distortion.detach().mean()),
            "beta_kl": self.beta * rates.sum(),
            "rates": rates,
        }

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, indices = batch
        model = self.evaluated_model
        noise = keyed_noise(model.latent_shapes, self.config.random_seed, indices.tolist())
        output = model(
            model.observation.encode(images), [eps.to(model.device, model.dtype) for eps in noise]
        )
        counts = (indices >= 0).float()
        self.val_distortion.update(self.in_units(output.distortion), counts)
        for metric, rate in zip(self.val_rates, output.rates.unbind(1), strict=True):
            metric.update(self.in_units(rate), counts)

    def on_validation_epoch_end(self) -> None:
        distortion = self.val_distortion.compute()
        rates = torch.stack([metric.compute() for metric in self.val_rates])
        values = {
            "val/neg_elbo": distortion + rates.sum(),
            "val/distortion": distortion,
            "val/rate": rates.sum(),
        }
        values |= {f"val/kl_{step}": rate for step, rate in enumerate(rates)}
        values["val/beta_kl"] = self.beta * rates.sum()
        self.log_dict(values, logger=False)
        if self.config.lrate_patience and not self.trainer.sanity_checking:
            self._lower_lrate_on_plateau(values["val/neg_elbo"].item())
        for metric in (self.val_distortion, *self.val_rates):
            metric.reset()

    def _lower_lrate_on_plateau(self, neg_elbo: float) -> None:
        """Halves it after `lrate_patience` validations in a row without a better -ELBO (paper,
        A.2)."""
        self.validations_since += 1
        if neg_elbo < self.best_validation:
            self.best_validation, self.validations_since = neg_elbo, 0
        elif self.validations_since >= self.config.lrate_patience:
            self.validations_since = 0
            self.lrate_factor *= 0.5
            self.set_lrate()
            lrate = self.optimizers().param_groups[0]["lr"]
            log_rank_zero(
                f"note: {self.config.lrate_patience} validations without a better -ELBO; "
                f"the learning rate is {lrate:g}"
            )

    def configure_optimizers(self) -> dict[str, Any]:
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adamax(trainable, lr=self.config.lrate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=self.config.lrate_decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored, own = checkpoint["state_dict"], self.state_dict()
        if wrong := sorted(
            n for n in own.keys() | stored.keys() if tensor_shape(own, n) != tensor_shape(stored, n)
        ):
            raise CheckpointError(
                f"the checkpoint does not fit the model: {wrong[0]} is missing or has another shape"
            )
        if "position" in checkpoint:  # earlier versions wrote checkpoints at the end of epochs only
            batches = self.trainer.datamodule.batches_per_epoch
            position = Position(**checkpoint["position"])
            self.position = position.on_grid(
                self.global_batch, self.config.accumulate_grad_batches, batches
            )
            self._write_position(checkpoint)
        else:
            self.position = Position(completed_epochs(checkpoint["loops"]))
        self.lrate_factor = checkpoint.get("lrate_factor", 1.0)
        self.best_validation = checkpoint.get("best_validation", self.best_validation)
        self.validations_since = checkpoint.get("validations_since", 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._write_position(checkpoint)
        checkpoint["position"] = dataclasses.asdict(self.position)
        checkpoint["epoch"] = self.position.epoch
        for name in ("lrate_factor", "best_validation", "validations_since"):
            checkpoint[name] = getattr(self, name)
        checkpoint["provenance"] = dict(self.provenance)

    def _write_position(self, checkpoint: dict[str, Any]) -> None:
        """Makes Lightning's own counters in a checkpoint those of `position`."""
        set_loop_progress(
            checkpoint["loops"],
            epoch=self.position.epoch,
            batches=self.position.batches(self.global_batch),
            in_validation=self.position.validate,
        )
