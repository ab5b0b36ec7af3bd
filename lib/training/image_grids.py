"""Pictures drawn at each validation. A full disk costs these, not the run."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..DisentanglementVAE import DisentanglementVAE
from ..files import remove_partial_files
from ..pictures import save_grid, side_by_side
from ..synthesis import encode, interpolate, reconstruct, sample_images, traverse
from .base import VAETraining
from .loggers import Dashboard
from .processes import log_rank_zero


class ImageGrids(pl.Callback):
    """At each validation, with the weights that are validated: a grid of samples, and one of images
    beside their reconstructions; of a disentanglement VAE also traversals of its dimensions and
    interpolations between images.

    Arguments:
        folder: Where samples_STEP.png, reconstructions_STEP.png, ... go.
        columns: Grids are `columns` images wide; that of reconstructions has `columns // 2` pairs
            in a row.
        temperature: Of the samples.
        batch: Images computed at a time.
        seed: The noise is the same at every validation, so that grids can be compared.
        dashboard: Where the grids are shown, too.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        columns: int,
        temperature: float,
        batch: int,
        seed: int,
        dashboard: Dashboard,
    ):
        self.folder, self.dashboard = Path(folder), dashboard
        self.columns, self.temperature = columns, temperature
        self._noise = dict(seed=seed, batch=batch)
        self._images: list[Tensor] = []
        self._pairs = max(1, columns // 2) * columns

    def on_fit_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        if trainer.is_global_zero:
            remove_partial_files(
                self.folder, "*_" + 7 * "[0-9]" + ".png"
            )  # evaluate.py may be writing others

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if sum(map(len, self._images)) < self._pairs:
            images, indices = batch
            self._images.append(images[indices >= 0].cpu())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        images, self._images = self._images, []
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        model, step = pl_module.evaluated_model, trainer.global_step
        originals = torch.cat(images)[: self._pairs]
        pairs = side_by_side(originals, reconstruct(model, originals, **self._noise))
        grids = {
            "samples": (
                sample_images(model, self.columns**2, self.temperature, **self._noise),
                self.columns,
            ),
            "reconstructions": (pairs, 2 * max(1, self.columns // 2)),
        }
        if isinstance(model, DisentanglementVAE):
            frames = max(2, self.columns)
            grids["traversals"] = (
                traverse(model, originals[:1], values=frames, batch=self._noise["batch"]),
                frames,
            )
            if len(originals) > 1:
                grids["interpolations"] = (self._interpolations(model, originals, frames), frames)
        for name, (grid, columns) in grids.items():
            path = self.folder / f"{name}_{step:07d}.png"
            try:
                save_grid(grid, path, columns)
            except OSError as error:
                log_rank_zero(f"note: {path} cannot be written: {error.strerror or error}")
                continue
            self.dashboard.picture(f"val/{name}", path, step)

    def _interpolations(self, model: DisentanglementVAE, images: Tensor, frames: int) -> Tensor:
        """A row from each image to the next."""
        (z,) = encode(model, images[: self.columns + 1], range(len(images)), **self._noise)
        ends = zip(z[:-1].split(1), z[1:].split(1), strict=True)
        given = dict(layers=1, temperature=1.0, frames=frames, **self._noise)
        return torch.cat([interpolate(model, [start], [end], **given) for start, end in ends])
