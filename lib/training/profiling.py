"""Where the time and the memory of training steps go: what `train.py --profiler_mode` prints."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .processes import log_rank_zero

WARM_UP = 3  # batches before the first that is profiled
PROFILED = 3  # batches
ROWS = 12


class StepProfile(pl.Callback):
    """Profiles a few batches of the first process: operators by their own time, and by what they
    allocate.

    In epochs of fewer than six batches a validation lies between these and is counted.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:
        if self._batches == WARM_UP and trainer.is_global_zero:
            activities = [
                ProfilerActivity.CPU,
                *[ProfilerActivity.CUDA] * pl_module.device.type.startswith("cuda"),
            ]
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:
        self._batches += 1
        if self._profile is not None and self._batches == WARM_UP + PROFILED:
            self._stop()
            log_rank_zero(self.table(pl_module.device))
            self._profile = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._profile is not None:
            self._stop()
        if self._profile is not None or self._batches < WARM_UP + PROFILED:
            log_rank_zero(
                f"--profiler_mode: {self._batches} batches are too few to profile some after "
                f"{WARM_UP}"
            )
        self._profile = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._profile is not None:
            self._stop()
            self._profile = None

    def _stop(self) -> None:
        self._profile.stop()

    def table(self, device: torch.device) -> str:
        """The operators that take most, per batch, and the peak of memory so far."""
        where = "device" if device.type == "cuda" else "cpu"
        # A kernel's time is also that of the operator that launched it, and only the operators are
        # counted.
        events = [
            event for event in self._profile.key_averages() if event.device_type == DeviceType.CPU
        ]
        events = [event for event in events if not event.is_user_annotation]
        time, memory = f"self_{where}_time_total", f"self_{where}_memory_usage"
        total = sum(getattr(event, time) for event in events)
        each = total / 1e3 / PROFILED
        lines = [f"\n{PROFILED} batches on {device.type}: {each:.1f} ms of operators each"]
        lines.append(f"{'operator':44}{'calls':>8}{'ms':>10}{'%':>7}")
        for event in sorted(events, key=lambda event: -getattr(event, time))[:ROWS]:
            own = getattr(event, time)
            name, calls = event.key[:42], event.count / PROFILED
            share = 100 * own / max(total, 1e-9)
            lines.append(f"{name:44}{calls:8.0f}{own / 1e3 / PROFILED:10.2f}{share:7.1f}")
        lines.append(f"{'allocates more than it frees':44}{'calls':>8}{'MiB':>10}")
        for event in sorted(events, key=lambda event: -getattr(event, memory))[:ROWS]:
            allocated = getattr(event, memory) / 2**20 / PROFILED
            if allocated > 0.05:
                lines.append(f"{event.key[:42]:44}{event.count / PROFILED:8.0f}{allocated:10.1f}")
        lines.append(f"peak memory of this process so far: {peak_memory(device) / 2**20:.0f} MiB")
        return "\n".join(lines)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held, on the GPU if it uses one, else in main memory; 0
    on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
