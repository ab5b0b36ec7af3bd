"""Starts of train.py for the soak: a small run in which some optimizer steps have a fault and every
step is noted.

The model is a small density model on Photos32, with augmentation, loader workers and accumulated
batches.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train
from lib.training.base import VAETraining
from lib.training.resume import RunProgress

REPOSITORY = Path(__file__).parents[2]
EVERY = 10  # optimizer steps between checkpoints
FLAGS = (
    "--dataset Photos32 --gpus 0 --logger none --make_checkpoint --use_checkpoint --num_workers 2 "
    "--batch 4 --accumulate_grad_batches 2 --epoch_images 400 --val_images 16 --batch_val 8 --figsize 2 "
    f"--checkpoint_every_n_steps {EVERY} --grad_clip 100 --downsample_first --depth 2 --ds_list 1 --h_size 8 "
    "--z_size 2 --post_model IsoGaussian --mix_components 2 --sdn_max_scale 8 --sdn_nfeat_0 8 --sdn_num_dirs 2"
)
FAULTS = ("infinite loss", "NaN in the loss", "NaN in a gradient")
FAULT_EVERY = 40  # optimizer steps, on average
PATIENCE = 120  # seconds without a step after which a process hangs


def fault_at(seed: int, step: int) -> str | None:
    """The fault of an optimizer step, the same in every run."""
    chance = random.Random(f"{seed} {step}")
    return chance.choice(FAULTS) if chance.random() < 1 / FAULT_EVERY else None


def main(seed: int, steps_file: str, arguments: list[str]) -> None:
    """train.py with faults in some steps, and a line "STEP TIME" in a file after each step."""
    compute, batch_end = VAETraining.compute, RunProgress.on_train_batch_end
    log = os.open(steps_file, os.O_WRONLY | os.O_APPEND)

    def faulty(module: VAETraining, batch: Any) -> Any:
        output, step = compute(module, batch), module.global_step + 1
        fault = fault_at(seed, step)
        if (
            fault and module.trainer.fit_loop.batch_idx % 2 == step // 7 % 2
        ):  # one of the two accumulated batches
            if fault == "NaN in a gradient":
                output.distortion = (
                    output.distortion + (next(module.model.parameters()).sum() * 0).sqrt()
                )
            else:
                output.distortion = output.distortion * float(
                    "inf" if fault == "infinite loss" else "nan"
                )
        return output

    def logged(progress: RunProgress, trainer: Any, *given: Any) -> None:
        before = progress._last_step
        batch_end(progress, trainer, *given)
        if trainer.global_step != before:
            os.write(log, f"{trainer.global_step} {time.time()}\n".encode())

    VAETraining.compute, RunProgress.on_train_batch_end = faulty, logged
    train.main(arguments)


class Session:
    """One start of the run `name` in the folder of all runs, to go on until step `iters`."""

    def __init__(self, folder: Path, name: str, iters: int, seed: int):
        number = len(list(folder.glob("*.steps")))
        self.steps_file, self.errors_file = (
            folder / f"{number:04d}_{name}.{kind}" for kind in ("steps", "stderr")
        )
        self.steps_file.touch()
        command = [
            sys.executable,
            "-m",
            "tests.stress.sessions",
            seed,
            self.steps_file,
            *FLAGS.split(),
        ]
        command += ["--output_dir", folder, "--exp_name", name, "--iters", iters]
        self.start = time.time()
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.errors_file.open("w") as errors:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=one_thread,
            )

    def steps(self) -> list[tuple[int, float]]:
        """Optimizer steps made so far: (number, time)."""
        lines = self.steps_file.read_text().rpartition("\n")[0].splitlines()
        return [(int(step), float(when)) for step, when in map(str.split, lines)]

    def workers(self) -> list[int]:
        """Loader workers, which are forks."""
        pid = self.process.pid
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            return [
                child
                for child in children
                if Path(f"/proc/{child}/cmdline").read_bytes() == command
            ]
        return []

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits for `until` or the end of the process, and ends one that hangs; whether it still
        runs."""
        while self.process.poll() is None and not until():
            time.sleep(0.05)
            if time.time() - self.steps_file.stat().st_mtime > PATIENCE:
                self.process.kill()  # status -9, which nobody expects
        return self.process.poll() is None


def resident(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    with contextlib.suppress(OSError):
        return (
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 2**20
        )
    return 0.0


def growth(steps: list[int], mib: list[float]) -> dict[str, float]:
    """How memory, sampled at optimizer steps, grows after the first quarter."""
    quarter = len(mib) // 4
    second, last = statistics.median(mib[quarter : 2 * quarter]), statistics.median(mib[-quarter:])
    slope = statistics.linear_regression(steps[quarter:], mib[quarter:]).slope * 1000
    names = (
        "second_quarter_mib",
        "last_quarter_mib",
        "growth_mib",
        "slope_mib_per_1000_steps",
        "samples",
    )
    return dict(
        zip(
            names,
            (*(round(x, 3) for x in (second, last, last - second, slope)), len(mib)),
            strict=True,
        )
    )


def in_peace(session: Session) -> dict[str, Any]:
    """Waits for a run's end; its speed and its memory."""
    samples: list[tuple[int, float, float]] = []

    def sample() -> bool:
        steps, workers = session.steps(), session.workers()
        if steps and len(workers) == 4:  # two each for training and validation
            samples.append(
                (steps[-1][0], resident(session.process.pid), sum(map(resident, workers)))
            )
        time.sleep(0.5)
        return False

    session.wait(sample)
    assert session.process.returncode == 0, session.errors_file.read_text()
    (first, begun), (last, ended) = session.steps()[0], session.steps()[-1]
    numbers, main, workers = map(list, zip(*samples, strict=True))
    return {
        "seconds": round(time.time() - session.start, 1),
        "seconds_to_first_step": round(begun - session.start, 2),
        "steps_per_second": round((last - first) / (ended - begun), 3),
        "memory_of_main_process": growth(numbers, main),
        "memory_of_workers": growth(numbers, workers),
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
