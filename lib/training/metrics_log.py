"""The log of a run: steps.csv, epochs.csv, run.json and the dashboard. A full disk costs these, not
the run."""

from __future__ import annotations

import contextlib
import csv
import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..files import sync, whole_file
from ..sweeps import choices
from .base import VAETraining
from .loggers import Dashboard
from .processes import log_rank_zero
from .profiling import peak_memory
from .resume import RUN_FILE

ROWS_BEFORE_WRITING = 50


class CsvFile:
    """A CSV file that a resumed run continues: rows past the step that it resumes from are dropped
    first.

    Rows that cannot be written (a full disk) are kept, and written with the next ones.
    """

    def __init__(self, path: Path, columns: list[str], resume_step: int):
        self.path, self.columns = path, columns
        self._unwritten: list[dict[str, Any]] = []
        rows = []
        if resume_step and path.is_file():
            with path.open(newline="") as file:
                rows = [
                    row
                    for row in csv.DictReader(file)
                    if None not in row.values()  # a kill can cut the last
                    and row["step"].isdecimal()
                    and int(row["step"]) <= resume_step
                ]
        with whole_file(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self._size = path.stat().st_size

    @property
    def unwritten(self) -> int:
        """How many rows wait."""
        return len(self._unwritten)

    def append(self, rows: list[dict[str, Any]]) -> None:
        reported = bool(self._unwritten)
        self._unwritten += rows
        try:
            with self.path.open("a", newline="") as file:
                file.truncate(self._size)  # half a row of an attempt before
                csv.DictWriter(file, self.columns).writerows(self._unwritten)
                file.flush()
                self._size = file.tell()
            self._unwritten = []
        except OSError as error:
            if not reported:
                log_rank_zero(
                    f"note: {self.path} cannot be written ({error.strerror}); its rows wait until "
                    "it can"
                )


class MetricsLog(pl.Callback):
    """Writes steps.csv (one row per optimizer step) and epochs.csv (one row per validation), and
    feeds the dashboard.

    Beside them run.json says what the run is: its configuration, its number of parameters, and the
    commits, versions and command that it was started with, and which backends compute its sweeps.

    In the unit of the training, bits/dim or nats per image, throughout. kl_0, kl_1, ... are of the
    layers from the topmost, or of the latent dimensions; beta_kl is β times the rate. steps.csv
    holds rank 0's own batches, epochs.csv the validation over all ranks, computed with the averaged
    weights where there are such. Values stay on the device until `ROWS_BEFORE_WRITING` rows have
    come together, so that training is not synchronized at every step.

    Arguments:
        folder: Where the files are.
        dashboard: Where the same numbers are shown.
    """

    def __init__(self, folder: str | Path, dashboard: Dashboard):
        self.folder, self.dashboard = Path(folder), dashboard
        self.unwritten = 0  # rows that could not be written until the end
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        # Since the last validation, of which epochs.csv has the means; they survive a restart.
        self._since = {"images": 0, "seconds": 0.0, "neg_elbo": 0.0, "steps": 0, "lr": 0.0}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: VAETraining, checkpoint: dict[str, Any]
    ) -> None:
        self._write(trainer)  # a run goes on from the checkpoint with the next row
        if trainer.is_global_zero:
            for file in (self._steps, self._epochs):
                file.append([])  # what waits
                with contextlib.suppress(OSError):
                    sync(file.path)
        checkpoint["since_validation"] = self._since | {"seconds": self._seconds()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: VAETraining, checkpoint: dict[str, Any]
    ) -> None:
        self._since |= checkpoint.get("since_validation", {})

    def _seconds(self) -> float:
        return self._since["seconds"] + time.perf_counter() - self._epoch_start

    def on_train_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self._batches: list[dict[str, Tensor]] = []
        self._images = 0
        self._last_step = trainer.global_step
        self._step_start = self._epoch_start = time.perf_counter()
        if not trainer.is_global_zero:
            return
        kl = [f"kl_{part}" for part in range(pl_module.model.num_rates)]
        parts = ["neg_elbo", "distortion", "rate", "beta_kl", *kl]
        step = [
            "step",
            "epoch",
            *parts,
            "beta",
            "grad_norm",
            "skipped",
            "lr",
            "loss_scale",
            "images_per_second",
        ]
        epoch = ["step", "epoch", *(f"val_{name}" for name in parts), "train_neg_elbo", "lr"]
        epoch += ["images_per_second", "seconds", "peak_memory_mib"]
        self._described = False
        self._steps = CsvFile(self.folder / "steps.csv", step, trainer.global_step)
        validated = trainer.global_step - pl_module.position.validate
        self._epochs = CsvFile(self.folder / "epochs.csv", epoch, validated)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: VAETraining, batch, batch_idx
    ) -> None:
        if (
            trainer.is_global_zero and not self._described
        ):  # a run that was over before has been described
            self._described = True
            self._describe(pl_module, trainer.global_step)

    def _describe(self, pl_module: VAETraining, resume_step: int) -> None:
        path, commit = self.folder / RUN_FILE, pl_module.provenance.get("commit")
        commits = []
        if resume_step:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                commits = [
                    str(known)
                    for known in json.loads(path.read_text())["commits"]
                    if known != commit
                ]
        description = {
            "parameters": sum(
                each.numel() for each in pl_module.model.parameters() if each.requires_grad
            ),
            "config": pl_module.config.to_dict(),
            "commits": [*commits, commit],
            "provenance": pl_module.provenance,
            "sweeps": choices() or "torch",
        }
        with whole_file(path) as partial:
            partial.write_text(json.dumps(description, indent=1) + "\n")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: VAETraining, optimizer
    ) -> None:
        self._since["lr"] = optimizer.param_groups[0][
            "lr"
        ]  # the scheduler may step before the batch ends
        self._beta = pl_module.beta  # that of this step, and after it that of the next

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: VAETraining, outputs, batch, batch_idx
    ) -> None:
        self._batches.append(outputs)
        self._images += len(batch[0]) * trainer.world_size
        if trainer.global_step == self._last_step:
            return  # gradients are still being accumulated
        self._last_step = trainer.global_step
        names = ("neg_elbo", "distortion", "beta_kl", "rates")
        mean = {name: torch.stack([b[name] for b in self._batches]).mean(0) for name in names}
        now = time.perf_counter()
        row = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "lr": self._since["lr"],
            "beta": self._beta,
            "skipped": int(pl_module.skipped),
            "images_per_second": round(self._images / (now - self._step_start), 2),
        }
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            row["loss_scale"] = scaler.get_scale()
        self._pending.append((row, mean | {"grad_norm": pl_module.grad_norm}))
        self._since["images"] += self._images
        self._batches, self._images, self._step_start = [], 0, now
        if len(self._pending) >= ROWS_BEFORE_WRITING:
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        rows = []
        for row, tensors in self._pending:
            rates = tensors.pop("rates").tolist()
            row |= {name: value.item() for name, value in tensors.items()}
            row |= {"rate": sum(rates)} | {f"kl_{layer}": rate for layer, rate in enumerate(rates)}
            rows.append(row)
        self._pending = []
        for row in rows:
            if not row["skipped"]:
                self._since["neg_elbo"] += row["neg_elbo"]
                self._since["steps"] += 1
        if rows and trainer.is_global_zero:
            self._steps.append(rows)
            for row in rows:
                self.dashboard.scalars({f"train/{k}": v for k, v in row.items()}, row["step"])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        if not trainer.sanity_checking:
            self._training_seconds = self._seconds()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        if trainer.sanity_checking:
            return
        self._write(trainer)
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        row = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "val_neg_elbo": metrics.pop("val/neg_elbo"),
        }
        row |= {name.replace("/", "_"): value for name, value in metrics.items()}
        if self._since["steps"]:
            row["train_neg_elbo"] = self._since["neg_elbo"] / self._since["steps"]
        row["lr"] = self._since["lr"]
        row["images_per_second"] = round(self._since["images"] / self._training_seconds, 2)
        row["seconds"] = round(self._seconds(), 2)
        row["peak_memory_mib"] = round(peak_memory(pl_module.device) / 2**20)
        if trainer.is_global_zero:
            self._epochs.append([row])
            print(
                f"\nstep {row['step']}: validation -ELBO {row['val_neg_elbo']:.3f} "
                f"{pl_module.unit} (distortion {row['val_distortion']:.3f}, "
                f"rate {row['val_rate']:.3f})",
                flush=True,
            )
            values = {k.replace("val_", "val/", 1): v for k, v in row.items()}
            self.dashboard.scalars(values, trainer.global_step)
        self._since = dict.fromkeys(self._since, 0)
        self._epoch_start = self._step_start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self._write(trainer)
        if trainer.is_global_zero:
            for file in (self._steps, self._epochs):
                file.append([])
                self.unwritten += file.unwritten

    def on_exception(
        self, trainer: pl.Trainer, pl_module: VAETraining, exception: BaseException
    ) -> None:
        with contextlib.suppress(
            RuntimeError
        ):  # a failed GPU has no values left; the first exception counts
            self._write(trainer)
