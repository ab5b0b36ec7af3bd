"""Where a run is, which checkpoint it goes on from, and whether it may.

`Position` is what a checkpoint keeps of the place of a run; `RunProgress` keeps it up to date while
the run trains; `find_checkpoint` chooses the file from which a run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from packaging.version import InvalidVersion, Version

from ..checkpoint import CheckpointError, read_checkpoint, stored_config
from ..config import ConfigError, TrainConfig
from ..files import read_json
from .lightning_internals import validate_after_batch
from .processes import log_rank_zero

if TYPE_CHECKING:
    from .base import VAETraining

RUN_FILE = "run.json"
STEP_FILE = re.compile(r"step_(\d{7,})\.ckpt")
# These say where a run finds and leaves its files, not what it computes.
PLACES = ("use_checkpoint", "output_dir", "root")


@dataclass(frozen=True)
class Position:
    """A point between two optimizer steps, which any number of processes can go on from.

    Arguments:
        epoch: Epochs that are done.
        images: Images of the next one that are done, by all ranks together.
        validate: Whether the validation of this point is still to come.
    """

    epoch: int = 0
    images: int = 0
    validate: bool = False

    def batches(self, global_batch: int) -> int:
        """Batches of the epoch that are done, where `global_batch` images are in the batches of all
        ranks."""
        return self.images // global_batch

    def on_grid(self, global_batch: int, accumulate: int, batches: int) -> Position:
        """This position or, for a run that goes on with other batches than before, the last one
        before it that has a whole number of optimizer steps behind it and at least one ahead.

        Arguments:
            global_batch: Images in the batches of all ranks.
            accumulate: Batches of a step.
            batches: Of an epoch.
        """
        done = self.batches(global_batch)
        if self.validate:
            done = min(max(done, 1), batches)
        else:
            done = min(done, batches - 1)
            done -= done % accumulate
        return replace(self, images=done * global_batch)


class RunProgress(pl.Callback):
    """Keeps `VAETraining.position`, and ends a run with a last validation: after a number of
    optimizer steps, or at the Trainer's epoch limit.

    Lightning's own `max_steps` would end it without one, and miscounts epochs when such a run
    resumes. This callback stands before all callbacks that write or log.

    Arguments:
        steps: The limit.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self._last_step = trainer.global_step
        self._validate_at_the_end(trainer)
        if pl_module.position.validate:  # the run ended in it
            trainer.check_val_every_n_epoch = 1
            validate_after_batch(trainer, pl_module.position.batches(pl_module.global_batch))
        else:
            trainer.should_stop = trainer.global_step >= self.steps

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        self._validate_at_the_end(trainer)

    def _validate_at_the_end(self, trainer: pl.Trainer) -> None:
        self._check_val_every_n_epoch = trainer.check_val_every_n_epoch
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: VAETraining, outputs, batch, batch_idx
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # gradients are still being accumulated
        self._last_step = trainer.global_step
        if trainer.global_step >= self.steps:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True
        epoch, ends = trainer.current_epoch, batch_idx + 1 == trainer.num_training_batches
        due = (epoch + 1) % trainer.check_val_every_n_epoch == 0
        validate = (ends or trainer.should_stop) and due
        if ends and not validate:
            pl_module.position = Position(epoch + 1)
        else:
            pl_module.position = Position(epoch, (batch_idx + 1) * pl_module.global_batch, validate)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: VAETraining) -> None:
        if trainer.sanity_checking:
            return
        position, batches = pl_module.position, trainer.num_training_batches
        if position.batches(pl_module.global_batch) >= batches:
            pl_module.position = Position(position.epoch + 1)
        else:
            pl_module.position = Position(position.epoch, position.images)
        validate_after_batch(trainer, batches)
        trainer.check_val_every_n_epoch = self._check_val_every_n_epoch
        trainer.should_stop |= trainer.global_step >= self.steps


def step_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that are kept under the number of their step, the newest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("step_*.ckpt")
        if (match := STEP_FILE.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a run's folder that is not damaged, and its content; None if there
    is none at all.

    Those that are damaged are reported. `best.ckpt` is taken where it is the only one left.

    Raises:
        CheckpointError: if all of them are damaged.
    """
    candidates = step_checkpoints(folder)
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    if last.exists() and not any(last.samefile(path) for path in candidates):
        candidates.append(last)  # written by an earlier version, or put there to train on
    if best.exists() and not candidates:
        candidates.append(best)
    damage = []
    for path in candidates:
        try:
            return path, read_checkpoint(path)
        except (CheckpointError, OSError) as error:
            damage.append(error)
            if path != candidates[-1]:
                log_rank_zero(f"note: {error}; trying the one before it")
    if damage:
        before = f"; {len(damage) - 1} more are damaged, too" if len(damage) > 1 else ""
        raise CheckpointError(f"{damage[0]}{before}")
    return None


def check_resumable(checkpoint: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError if a checkpoint lacks what a run needs to go on, beside the
    weights."""
    needed = {
        "epoch": int,
        "global_step": int,
        "pytorch-lightning_version": str,
        "loops": dict,
        "optimizer_states": list,
        "lr_schedulers": list,
    }
    optional = {
        "callbacks": dict,
        "position": dict,
        "since_validation": dict,
        "lrate_factor": float,
        "best_validation": float,
        "validations_since": int,
    }
    wrong = [name for name, kind in needed.items() if not isinstance(checkpoint.get(name), kind)]
    wrong += [
        name
        for name, kind in optional.items()
        if not isinstance(checkpoint.get(name, kind()), kind)
    ]
    counts = ("epoch", "global_step")
    wrong += [name for name in counts if name not in wrong and not 0 <= checkpoint[name] < 2**53]
    version = "pytorch-lightning_version"  # what Lightning makes of the rest depends on it
    if version not in wrong:
        with contextlib.suppress(InvalidVersion):
            version = "" if Version(checkpoint[version]) >= Version("1.0") else version
        wrong += [version] if version else []
    if wrong:
        raise CheckpointError(f"{path} cannot be trained on: {', '.join(wrong)} missing or damaged")


def find_checkpoint(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint in a run's folder from which it goes on; None for a new run.

    Raises:
        ConfigError: if there is a run in the folder that would be overwritten, or continued as
            another one.
        CheckpointError: if it cannot be continued.
    """
    if not config.use_checkpoint:
        names = ("last.ckpt", "best.ckpt", "steps.csv")
        if step_checkpoints(folder) or any((folder / name).exists() for name in names):
            raise ConfigError(
                f"{folder} holds a run already: --use_checkpoint goes on with it, another "
                "--exp_name starts anew"
            )
        return None
    found = newest_checkpoint(folder)
    if found is None:
        check_nothing_is_lost(config, folder)
        log_rank_zero(
            f"--use_checkpoint: there is no checkpoint in {folder} yet, so this run starts anew"
        )
        return None
    path, checkpoint = found
    stored = stored_config(checkpoint, path)
    check_resumable(checkpoint, path)
    changed = changed_fields(config, stored)
    fixed = {*config.architecture(), "task", "dataset"}
    wrong = [
        f"--{name} {getattr(config, name)} (there {getattr(stored, name)})"
        for name in changed
        if name in fixed
    ]
    if wrong:
        raise ConfigError(
            f"{path} is of another model: {', '.join(wrong)}; use its flags or another --exp_name"
        )
    if 0 < config.max_epochs < checkpoint["epoch"]:
        raise ConfigError(
            f"--max_epochs {config.max_epochs}: {path} has {checkpoint['epoch']} epochs already"
        )
    for name in changed:
        log_rank_zero(f"note: --{name} is now {getattr(config, name)}, was {getattr(stored, name)}")
    return path


def changed_fields(config: TrainConfig, stored: TrainConfig) -> list[str]:
    """The names of the settings that differ, without those that only name places."""
    return [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if field.name not in PLACES and getattr(config, field.name) != getattr(stored, field.name)
    ]


def check_nothing_is_lost(config: TrainConfig, folder: Path) -> None:
    """Raises ConfigError if a folder without a checkpoint holds the logs of a run that cannot be
    computed again.

    A run that was killed before its first checkpoint starts again with the same flags, and logs the
    same.
    """
    steps = folder / "steps.csv"
    if not steps.is_file() or len(steps.read_bytes().splitlines()) < 2:
        return  # not even a step
    try:
        before = TrainConfig.from_dict(read_json(folder / RUN_FILE)["config"])
        same = before.make_checkpoint and not changed_fields(config, before)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ConfigError(
            f"{folder} holds the logs of a run without a checkpoint, which cannot be continued: "
            "another --exp_name starts anew"
        )
