"""Training that is killed, stopped and damaged at random, compared bit for bit with the same
training left in peace.

    python -m tests.stress.soak --minutes 30 --seed 0 --output benchmarks/results/soak_cpu.json

A third of the time goes to a run in peace, whose memory is watched, the rest to a run of the same
steps, with --use_checkpoint, that is ended again and again: SIGKILL at any moment, SIGKILL of a
loader worker, signals that ask it to stop; now and then the newest checkpoint is cut off or has a
byte changed. In both runs the same optimizer steps, about one in 40, get a loss or a gradient that
is not finite. Exit status 1 if the runs differ in anything but times, a process does not end as
promised, or memory grows.

Going back to an earlier checkpoint after many bad steps is not part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train
from benchmarks.common import stamp, write
from lib.training.base import VAETraining
from lib.training.resume import RunProgress
from lib.training.signals import EXIT_STATUS
from tests.stress.runs_compared import differences, log_rows

REPOSITORY = Path(__file__).parents[2]
EVERY = 10  # optimizer steps between checkpoints
FLAGS = (
    "--dataset Photos32 --gpus 0 --logger none --make_checkpoint --use_checkpoint --num_workers 2 "
    "--batch 4 --accumulate_grad_batches 2 --epoch_images 400 --val_images 16 --batch_val 8 "
    f"--figsize 2 --checkpoint_every_n_steps {EVERY} --grad_clip 100 --downsample_first --depth 2 "
    "--ds_list 1 --h_size 8 --z_size 2 --post_model IsoGaussian --mix_components 2 "
    "--sdn_max_scale 8 --sdn_nfeat_0 8 --sdn_num_dirs 2"
)
FAULTS = ("infinite loss", "NaN in the loss", "NaN in a gradient")
FAULT_EVERY = 40  # optimizer steps, on average
HANGS_AFTER = 120  # seconds without a step
# How a run is ended: how often by comparison, and its exit status then.
ENDS = {
    "SIGKILL": (8, -9),
    "SIGKILL of a worker": (4, 1),
    "SIGTERM": (2, 75),
    "SIGUSR1": (2, 75),
    "SIGINT": (2, 130),
}
QUICK = ["SIGKILL of a worker", "SIGTERM", "SIGKILL", "SIGINT"]
DAMAGES = ("checkpoint cut off", "byte of a checkpoint changed")
DAMAGE_CHANCE = 0.25  # between two starts
ENOUGH = 5  # faults after which a run is given up
GROWTH_LIMIT = 16  # MiB from the median of the second quarter to that of the last


def fault_at(seed: int, step: int) -> str | None:
    """The fault of an optimizer step, the same in every run."""
    chance = random.Random(f"{seed} {step}")
    return chance.choice(FAULTS) if chance.random() < 1 / FAULT_EVERY else None


def train_with_faults(seed: int, steps_file: str, arguments: list[str]) -> None:
    """Runs train.py with faults in some steps, and appends a line "STEP TIME" to a file after each
    optimizer step."""
    compute, batch_end = VAETraining.compute, RunProgress.on_train_batch_end
    log, noted = os.open(steps_file, os.O_WRONLY | os.O_APPEND), 0

    def faulty(module: VAETraining, batch: Any) -> Any:
        output, step = compute(module, batch), module.global_step + 1
        fault = fault_at(seed, step)
        # One of the two accumulated batches has it.
        if fault and module.trainer.fit_loop.batch_idx % 2 == step // 7 % 2:
            if fault == "NaN in a gradient":  # the derivative of the root at zero times zero
                zero = next(module.model.parameters()).sum() * 0
                output.distortion = output.distortion + zero.sqrt()
            else:
                factor = float("inf" if fault == "infinite loss" else "nan")
                output.distortion = output.distortion * factor
        return output

    def noting(progress: RunProgress, trainer: Any, *given: Any) -> None:
        nonlocal noted
        batch_end(progress, trainer, *given)
        ends = (given[-1] + 1) % 2 == 0 or given[-1] + 1 == trainer.num_training_batches
        if ends and trainer.global_step != noted:
            noted = trainer.global_step
            os.write(log, f"{noted} {time.time()}\n".encode())

    VAETraining.compute, RunProgress.on_train_batch_end = faulty, noting
    # A signal before the run has its own handlers, or after its end.
    for signum, status in EXIT_STATUS.items():
        signal.signal(signum, lambda *_, status=status: os._exit(status))
    train.main(arguments)
    os._exit(0)  # the interpreter's last steps have no handlers


class Session:
    """One start of the run `name` in the folder of all runs, to go on until step `iters`."""

    def __init__(self, folder: Path, name: str, iters: int, seed: int):
        stem = f"{len(list(folder.glob('*.steps'))):04d}_{name}"
        self.steps_file, self.errors_file = folder / f"{stem}.steps", folder / f"{stem}.stderr"
        self.steps_file.touch()
        command = [sys.executable, "-m", "tests.stress.soak", "session", seed, self.steps_file]
        command += [*FLAGS.split(), "--output_dir", folder, "--exp_name", name, "--iters", iters]
        self.start = time.time()
        with self.errors_file.open("w") as errors:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def steps(self) -> list[tuple[int, float]]:
        """Optimizer steps made so far: (number, time)."""
        lines = self.steps_file.read_text().rpartition("\n")[0].splitlines()
        return [(int(step), float(when)) for step, when in map(str.split, lines)]

    def workers(self) -> list[int]:
        """Process numbers of the loader workers, which are forks with the same command line."""
        pid = self.process.pid
        command = lambda process: Path(f"/proc/{process}/cmdline").read_bytes()  # noqa: E731
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [int(child) for child in children if command(child) == command(pid)]
        return []

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits for `until` or the end of the process, and ends one that hangs; whether it still
        runs."""
        while self.process.poll() is None and not until():
            time.sleep(0.05)
            if time.time() - self.steps_file.stat().st_mtime > HANGS_AFTER:
                self.process.kill()  # with status -9, which nobody expects
        return self.process.poll() is None


def resident(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def growth(mib: list[float]) -> dict[str, float]:
    """How memory, sampled at even distances, grows after the first quarter, in MiB."""
    quarter = len(mib) // 4
    second, last = statistics.median(mib[quarter : 2 * quarter]), statistics.median(mib[-quarter:])
    found = {"second_quarter_mib": second, "last_quarter_mib": last, "growth_mib": last - second}
    return {name: round(value, 3) for name, value in found.items()} | {"samples": len(mib)}


def in_peace(session: Session) -> dict[str, Any]:
    """Waits for a run's end; its speed and its memory."""
    samples: list[tuple[float, float]] = []

    def sample() -> bool:
        workers = session.workers()
        if session.steps() and len(workers) == 4:  # two each for training and validation
            samples.append((resident(session.process.pid), sum(map(resident, workers))))
        time.sleep(0.5)
        return False

    session.wait(sample)
    assert session.process.returncode == 0, session.errors_file.read_text()
    (first, begun), (last, ended) = session.steps()[0], session.steps()[-1]
    main, workers = map(list, zip(*samples, strict=True))
    return {
        "seconds": round(time.time() - session.start, 1),
        "seconds_to_first_step": round(begun - session.start, 2),
        "steps_per_second": round((last - first) / (ended - begun), 3),
        "memory_of_main_process": growth(main),
        "memory_of_workers": growth(workers),
    }


class Disturbed:
    """The run that is not left in peace.

    Arguments:
        folder, steps, seed: As of a `Session`.
        rate: Optimizer steps per second in peace.
        until: The time at which it should be over.
        plan: How to end it, one after the other; None: at random until time runs short.
    """

    def __init__(
        self, folder: Path, steps: int, seed: int, rate: float, until: float, plan: list[str] | None
    ):
        self.folder, self.steps, self.seed = folder, steps, seed
        self.rate, self.until, self.plan = rate, until, plan
        self.chance = random.Random(seed)
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.repeated: dict[bool, list[int]] = {False: [], True: []}  # after a damage or not
        self.first_step: list[float] = []  # seconds from a start to it
        self._damaged: set[tuple[str, int]] = set()

    def run(self) -> None:
        reached, damaged, status = 0, False, None
        while status != 0 and len(self.faults) < ENOUGH:
            whole = self.checkpoints()
            done = int(whole[0].stem.removeprefix("step_")) if whole else 0
            session = Session(self.folder, "disturbed", self.steps, self.seed)
            self.counts["starts"] += 1
            end = self.disturb(session, done)
            status, steps = session.process.returncode, session.steps()
            self.check(session, end, done)
            if steps:
                self.first_step.append(steps[0][1] - session.start)
                self.repeated[damaged].append(reached - done)
                reached, damaged = steps[-1][0], False
            elif end:
                self.counts["before the first step"] += 1
            if status != 0 and self.damage(end):
                damaged = True

    def checkpoints(self) -> list[Path]:
        """Those that are whole, the newest first."""
        found = sorted((self.folder / "checkpoints/disturbed").glob("step_*.ckpt"), reverse=True)
        return [path for path in found if (path.name, path.stat().st_mtime_ns) not in self._damaged]

    def disturb(self, session: Session, done: int) -> str:
        """Waits for a random time and ends the run in a random way; which, or "" if it ended by
        itself."""
        if self.plan is None:
            end = self.chance.choices(list(ENDS), [weight for weight, _ in ENDS.values()])[0]
            time_left, start = self.until - time.time(), statistics.median(self.first_step or [10])
            work_left = (self.steps - done) / self.rate
            if time_left - work_left < 2 * start:
                end = ""
            else:
                # The mean session makes as large a share of its time into steps as is needed to be
                # over in time.
                longest = start / (1 - (work_left / time_left) ** 0.5)
                moment = time.time() + self.chance.uniform(0, longest)
            # Before the first step only SIGKILL does what it does later.
            least = 0 if end == "SIGKILL" else 1
        else:
            # After some steps, not some seconds: a quick machine would be at the end of the run
            # before the plan is.
            end = self.plan.pop(0) if self.plan else ""
            moment, least = 0.0, self.chance.randint(EVERY, 2 * EVERY)
        ready = lambda: time.time() > moment and len(session.steps()) >= least  # noqa: E731
        if not end or not session.wait(ready):
            session.wait()
            return ""
        victim = session.process.pid
        if end == "SIGKILL of a worker":
            victim = self.chance.choice(session.workers() or [victim])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.Signals[end.split()[0]])
        self.counts[end] += 1
        session.wait()
        return end

    def check(self, session: Session, end: str, done: int) -> None:
        """Notes what did not go as promised."""
        status, steps = session.process.returncode, [step for step, _ in session.steps()]
        errors = session.errors_file.read_text(errors="replace")
        promised = {ENDS[end][1] if end else 0} | ({0} if self.steps in steps else set())
        dead = re.findall(r"^\w+\.py: error: a loader process died", errors, re.MULTILINE)
        stopped = status in (75, 130)
        # Workers whose process was killed may say that they lost it.
        wrong = {
            f"status {status} instead of {promised}": status not in promised,
            "a traceback": end != "SIGKILL" and "Traceback" in errors,
            "not one line about a dead loader process": status == 1 and len(dead) != 1,
            "no line about where it stopped": stopped and "stopped after step" not in errors,
            f"after step {done} came {steps[:1]} ... {steps[-1:]}, {len(steps)} steps": (
                steps != list(range(done + 1, done + 1 + len(steps)))
            ),
            "the last step has no checkpoint": (
                stopped and steps and self.checkpoints()[0].stem != f"step_{steps[-1]:07d}"
            ),
        }
        self.faults += [
            f"{session.errors_file.name}, {end or 'in peace'}: {what}"
            for what, happened in wrong.items()
            if happened
        ]

    def damage(self, end: str) -> bool:
        """Cuts off or changes the newest checkpoint, if that is due and there is an older one."""
        whole, due = self.checkpoints(), end in ("SIGTERM", "SIGKILL")
        if self.plan is None:
            due = self.chance.random() < DAMAGE_CHANCE
        if not due or len(whole) < 2:
            return False
        path, content = whole[0], bytearray(whole[0].read_bytes())
        kind = DAMAGES[len(self._damaged) % 2]
        # Not in the hash at the end, without which a file may be good.
        place = self.chance.randrange(len(content) - 100)
        if kind == "checkpoint cut off":
            del content[place:]
        else:
            content[place] ^= self.chance.randrange(1, 256)
        with path.open("r+b") as file:  # last.ckpt is another name of the same file
            file.truncate(len(content))
            file.write(content)
        self._damaged.add((path.name, path.stat().st_mtime_ns))
        self.counts[kind] += 1
        return True

    def figures(self) -> dict[str, Any]:
        """Counts of the disturbances, repeated steps, seconds from start to first step."""
        counted = ("starts", *ENDS, "before the first step", *DAMAGES)
        return {name: self.counts[name] for name in counted} | {
            "steps_repeated": sum(map(sum, self.repeated.values())),
            "steps_repeated_at_most": max(self.repeated[False], default=0),
            "steps_repeated_at_most_after_damage": max(self.repeated[True], default=0),
            "seconds_to_first_step_median": round(statistics.median(self.first_step or [0]), 2),
            "seconds_to_first_step_most": round(max(self.first_step, default=0), 2),
        }


def soak(minutes: float, seed: int, quick: bool, folder: Path) -> dict[str, Any]:
    """All runs; their figures, and under "faults" what is not as it should be."""
    begin, steps = time.time(), 200
    if not quick:
        trial = in_peace(Session(folder, "trial", 200, seed))
        seconds = minutes * 20 - trial["seconds_to_first_step"]
        steps = max(steps, round(trial["steps_per_second"] * seconds))
        print(f"{trial['steps_per_second']} steps/s, so both runs make {steps} steps", flush=True)
    peace = in_peace(Session(folder, "peace", steps, seed))
    print(f"in peace: {peace}", flush=True)
    start = time.time()
    end = max(begin + minutes * 60, start + 1.5 * peace["seconds"])  # it may have become slower
    plan = list(QUICK) if quick else None
    disturbed = Disturbed(folder, steps, seed, peace["steps_per_second"], end, plan)
    disturbed.run()
    figures = {"seconds": round(time.time() - start, 1), **disturbed.figures()}
    injected = {step: fault_at(seed, step) for step in range(1, steps + 1) if fault_at(seed, step)}
    rows = log_rows(folder / "checkpoints/peace/steps.csv")
    skipped = [int(row["step"]) for row in rows if row["skipped"] == "1"]
    lost = figures["steps_repeated_at_most"]
    wrong = {
        "nothing disturbed the run": figures["starts"] == 1,
        f"{lost} steps were lost at once": lost > EVERY,
        "the steps that were skipped are not those with a fault": skipped != list(injected),
    }
    for whose in ("memory_of_main_process", "memory_of_workers"):
        grown = peace[whose]["growth_mib"]
        wrong[f"{whose} grew by {grown} MiB"] = not quick and grown > GROWTH_LIMIT
    faults = disturbed.faults
    if len(faults) < ENOUGH:
        faults += [f"differs: {text}" for text in differences(folder, "peace", "disturbed")]
    return {
        "minutes": round((time.time() - begin) / 60, 1),
        "steps": steps,
        "checkpoint_every": EVERY,
        "injected": Counter(injected.values()),
        "pictures": len(list((folder / "figs/peace").iterdir())),
        "in_peace": peace,
        "growth_limit_mib": None if quick else GROWTH_LIMIT,
        "disturbed": figures,
        "faults": faults + [what for what, happened in wrong.items() if happened],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances and the faults")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="few steps, memory is not judged")
    options = parser.parse_args(arguments)
    about = stamp("tests.stress.soak", arguments, "cpu", ("pytorch-lightning", "numpy"))
    about |= {"threads": 1, "seed": options.seed, "flags": FLAGS}
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    result = soak(options.minutes, options.seed, options.quick, folder)
    write(about | result, options.output)
    for title, value in result.items():
        print(f"{title}: {value}")
    if result["faults"]:
        sys.exit(f"not as it should be; the runs' files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["session"]:
        train_with_faults(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
