"""Canaries of `lib.training.lightning_internals`: each fails, and says what has changed, when a
later version of Lightning no longer is what training relies on."""

from __future__ import annotations

import signal
import subprocess

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from torch.utils.data import DataLoader

from lib.training.lightning_internals import (
    completed_epochs,
    keep_own_signal_handlers,
    set_loop_progress,
    take_over_processes,
    validate_after_batch,
)

BATCHES = 4  # of an epoch
ADVICE = f"changed in Lightning {pl.__version__}: see lib/training/lightning_internals.py"


class Line(pl.LightningModule):
    """One weight; notes (epoch, batch) of all training batches and the epoch's batches before each
    validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained: list[tuple[int, int]] = []
        self.validated: list[tuple[int, int]] = []
        self.handler: object = None
        self.at_start = lambda trainer: None

    def on_train_start(self) -> None:
        self.at_start(self.trainer)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.handler = signal.getsignal(signal.SIGTERM)
        self.trained.append((self.current_epoch, batch_idx))
        return self.layer(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated.append((self.current_epoch, len(self.trained)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def make_trainer(folder, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def fit(trainer: pl.Trainer, module: Line, checkpoint: object = None) -> Line:
    loaders = DataLoader(torch.ones(BATCHES, 1)), DataLoader(torch.ones(1, 1))
    trainer.fit(module, *loaders, ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.fixture
def checkpoint(tmp_path) -> dict:
    """Of a run of one epoch."""
    trainer = make_trainer(tmp_path, 1)
    fit(trainer, Line())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    return torch.load(tmp_path / "x.ckpt", weights_only=True)


def test_signal_handlers_stay_those_of_the_program(tmp_path):
    def own(signum: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        assert fit(make_trainer(tmp_path, 1), Line()).handler is not own, (
            f"the Trainer no longer registers handlers; keep_own_signal_handlers can go. {ADVICE}"
        )
        trainer = make_trainer(tmp_path, 1)
        keep_own_signal_handlers(trainer)
        assert fit(trainer, Line()).handler is own, (
            f"the Trainer registers its handlers by another name than "
            f"_signal_connector.register_signal_handlers. {ADVICE}"
        )
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_processes_of_other_ranks_are_taken_over():
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False
    )
    launcher = trainer.strategy.launcher
    assert getattr(launcher, "procs", None) == [], (
        f"the launcher has no list `procs` of the processes of other ranks. {ADVICE}"
    )
    with subprocess.Popen(["sleep", "60"]) as process:
        launcher.procs.append(process)
        observer = _ChildProcessObserver(main_pid=0, child_processes=launcher.procs)
        assert take_over_processes(trainer) == [process] and take_over_processes(trainer) == []
        process.kill()
    assert process.returncode and observer._run(), (
        f"Lightning watches the processes by another list than `procs`. {ADVICE}"
    )
    alone = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert take_over_processes(alone) == []


def test_the_batch_of_the_next_validation_can_be_set(tmp_path):
    module = Line()
    module.at_start = lambda trainer: validate_after_batch(trainer, BATCHES // 2)
    fit(make_trainer(tmp_path, 1), module)
    assert module.validated == [(0, BATCHES // 2), (0, BATCHES)], (
        f"`trainer.val_check_batch` no longer says after which batches to validate. {ADVICE}"
    )


def test_a_checkpoint_says_how_many_epochs_are_complete(checkpoint):
    assert completed_epochs(checkpoint["loops"]) == 1, (
        f"the loops' state no longer counts epochs as fit_loop.epoch_progress.current. {ADVICE}"
    )


@pytest.mark.parametrize(
    ("epoch", "batches", "in_validation", "trained", "validations"),
    [
        (1, 0, False, [(1, 0), (1, 1), (1, 2), (1, 3)], 1),
        (0, 3, False, [(0, 3), (1, 0), (1, 1), (1, 2), (1, 3)], 2),
        (1, 2, False, [(1, 2), (1, 3)], 1),
        (1, 4, True, [], 1),
    ],
)
def test_a_run_goes_on_at_the_position_in_a_checkpoint(
    checkpoint, tmp_path, epoch, batches, in_validation, trained, validations
):
    """The epoch and batch that `set_loop_progress` writes are those that come next; a validation
    that is still to come is made up for, without training first."""
    set_loop_progress(
        checkpoint["loops"], epoch=epoch, batches=batches, in_validation=in_validation
    )
    torch.save(checkpoint, tmp_path / "y.ckpt")
    module = fit(make_trainer(tmp_path, 2), Line(), tmp_path / "y.ckpt")
    assert (module.trained, len(module.validated)) == (trained, validations), (
        f"the state of the loops in a checkpoint is read in another way. {ADVICE}"
    )
