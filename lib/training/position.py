"""Where a run is, in a form that a checkpoint keeps and that any number of processes can go on
from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Position:
    """A point between two optimizer steps.

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


def set_loops(loops: dict[str, Any], position: Position, global_batch: int) -> None:
    """Makes the state of Lightning's loops in a checkpoint that of `position`.

    Lightning's own counters depend on the hook in which a checkpoint is written, and what it makes
    of them on the number of processes. These say plainly: the epoch has begun, so many batches are
    done, and a validation that is still to come was interrupted at its first batch.
    """
    fit, batches = loops["fit_loop"], position.batches(global_batch)
    begun = position.epoch + (position.images > 0)
    of_epochs = {
        "ready": begun,
        "started": begun,
        "processed": position.epoch,
        "completed": position.epoch,
    }
    for count in ("total", "current"):
        fit["epoch_progress"][count] |= of_epochs
        fit["epoch_loop.batch_progress"][count] |= dict.fromkeys(of_epochs, batches)
        in_validation = (
            {"ready": 1, "started": 1} if position.validate else {"ready": 0, "started": 0}
        )
        fit["epoch_loop.val_loop.batch_progress"][count] |= in_validation | {
            "processed": 0,
            "completed": 0,
        }
    fit["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False
