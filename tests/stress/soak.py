"""Training that is killed, stopped and damaged at random, compared bit for bit with the same
training left in peace.

    python -m tests.stress.soak --minutes 30 --seed 0 --output benchmarks/results/soak_cpu.json

A third of the time goes to a run in peace, whose memory is watched, the rest to a run of the same
steps, with --use_checkpoint, that is ended again and again: SIGKILL at any moment, SIGKILL of a
loader worker, signals that ask it to stop; now and then the newest checkpoint is cut off or has a
byte changed. In both runs the same optimizer steps, about one in 40, get a loss or a gradient that
is not finite. Exit status 1 if the runs differ in anything but times, a process does not end as
promised, or memory grows.

Not part of it: going back to an earlier checkpoint after many bad steps, since which one that is
depends on when checkpoints were written.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import stamp, write
from lib.training.resume import step_checkpoints
from tests.stress.runs_compared import differences
from tests.stress.sessions import EVERY, FLAGS, Session, fault_at, in_peace

# How a run is ended, how often by comparison, and its exit status then.
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


class Disturbed:
    """The run that is not left in peace.

    Arguments:
        folder, steps, seed: As of a `Session`.
        rate: Optimizer steps per second in peace.
        until: When it should be over.
        plan: How to end it, one after the other; None: at random until time runs short.
    """

    def __init__(
        self, folder: Path, steps: int, seed: int, rate: float, until: float, plan: list[str] | None
    ):
        self.folder, self.steps, self.seed, self.rate, self.until, self.plan = (
            folder,
            steps,
            seed,
            rate,
            until,
            plan,
        )
        self.chance = random.Random(seed)
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.lost: list[
            tuple[int, bool]
        ] = []  # steps, and whether a damaged checkpoint is to blame
        self.first_step: list[float] = []
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
                self.lost.append((reached - done, damaged))
                reached, damaged = steps[-1][0], False
            elif end:
                self.counts["before the first step"] += 1
            if status != 0 and self.damage(end):
                damaged = True

    def checkpoints(self) -> list[Path]:
        """Those that are whole, the newest first."""
        found = step_checkpoints(self.folder / "checkpoints" / "disturbed")
        return [path for path in found if (path.name, path.stat().st_mtime_ns) not in self._damaged]

    def disturb(self, session: Session, done: int) -> str:
        """Waits for a random time and ends the run in a random way; which, or "" if it ended by
        itself."""
        begun = lambda: bool(session.steps())  # noqa: E731
        if self.plan is None:
            end = self.chance.choices(list(ENDS), [weight for weight, _ in ENDS.values()])[0]
            time_left, start = self.until - time.time(), statistics.median(self.first_step or [10])
            work_left = (self.steps - done) / self.rate
            if time_left - work_left < 2 * start:
                end = ""
            else:  # the mean session makes as large a share of its time into steps as is needed to be over in time
                moment = time.time() + self.chance.uniform(
                    0, start / (1 - (work_left / time_left) ** 0.5)
                )
        else:
            end = self.plan.pop(0) if self.plan else ""
            session.wait(begun)
            moment = time.time() + self.chance.uniform(0.7, 1.3)
        # Only SIGKILL does the same before the first step.
        if not end or not session.wait(
            lambda: time.time() > moment and (end == "SIGKILL" or begun())
        ):
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
        wrong = []
        if status not in promised:
            wrong.append(f"status {status} instead of {promised}")
        if (
            end != "SIGKILL" and "Traceback" in errors
        ):  # orphaned workers may say that they lost their process
            wrong.append("a traceback")
        if (
            status == 1
            and len(re.findall(r"^\w+\.py: error: a loader process died", errors, re.MULTILINE))
            != 1
        ):
            wrong.append("not one line about a dead loader process")
        if status in (75, 130) and "stopped after step" not in errors:
            wrong.append("no line about where it stopped")
        if steps and steps != list(range(done + 1, done + 1 + len(steps))):
            wrong.append(
                f"went on from step {done} with {steps[0]} ... {steps[-1]}, {len(steps)} steps"
            )
        if status in (75, 130) and steps and self.checkpoints()[0].stem != f"step_{steps[-1]:07d}":
            wrong.append("the last step has no checkpoint")
        self.faults += [
            f"{session.errors_file.name}, {end or 'in peace'}: {text}" for text in wrong
        ]

    def damage(self, end: str) -> bool:
        """Now and then, if there is an older one: cuts the newest checkpoint off, or changes a byte
        of it."""
        whole = self.checkpoints()
        due = (
            self.chance.random() < DAMAGE_CHANCE
            if self.plan is None
            else end in ("SIGTERM", "SIGKILL")
        )
        if not due or len(whole) < 2:
            return False
        path, size = whole[0], whole[0].stat().st_size
        kind = DAMAGES[len(self._damaged) % 2]
        with path.open("r+b") as file:
            if kind == "checkpoint cut off":
                file.truncate(self.chance.randrange(size))
            else:  # not in the hash at its end, without which a file may be good
                place = self.chance.randrange(size - 100)
                file.seek(place)
                changed = file.read(1)[0] ^ self.chance.randrange(1, 256)
                file.seek(place)
                file.write(bytes([changed]))
        self._damaged.add((path.name, path.stat().st_mtime_ns))
        self.counts[kind] += 1
        return True

    def figures(self) -> dict[str, Any]:
        """Counts of the disturbances, steps that had to be repeated, seconds from start to first
        step."""
        return {
            **{
                name: self.counts[name]
                for name in ("starts", *ENDS, "before the first step", *DAMAGES)
            },
            "steps_repeated": sum(steps for steps, _ in self.lost),
            "steps_repeated_at_most": max(
                (steps for steps, damaged in self.lost if not damaged), default=0
            ),
            "steps_repeated_at_most_after_damage": max(
                (steps for steps, damaged in self.lost if damaged), default=0
            ),
            "seconds_to_first_step_median": round(statistics.median(self.first_step or [0]), 2),
            "seconds_to_first_step_most": round(max(self.first_step, default=0), 2),
        }


def soak(minutes: float, seed: int, quick: bool, folder: Path) -> dict[str, Any]:
    """All runs; their figures, and under "faults" what is not as it should be."""
    begin, steps = time.time(), 80
    if not quick:
        trial = in_peace(Session(folder, "trial", 200, seed))
        seconds = minutes * 20 - trial["seconds_to_first_step"]
        steps = max(steps, round(trial["steps_per_second"] * seconds))
        print(f"{trial['steps_per_second']} steps/s, so both runs make {steps} steps", flush=True)
    peace = in_peace(Session(folder, "peace", steps, seed))
    print(f"in peace: {peace}", flush=True)
    start = time.time()
    end = max(
        begin + minutes * 60, start + 1.5 * peace["seconds"]
    )  # the machine may have become slower
    disturbed = Disturbed(
        folder, steps, seed, peace["steps_per_second"], end, list(QUICK) if quick else None
    )
    disturbed.run()
    faults = disturbed.faults
    if len(faults) < ENOUGH:
        faults += [f"differs: {text}" for text in differences(folder, "peace", "disturbed")]
    figures = {"seconds": round(time.time() - start, 1), **disturbed.figures()}
    if figures["starts"] == 1:
        faults.append("nothing disturbed the run")
    if figures["steps_repeated_at_most"] > EVERY:
        faults.append(f"{figures['steps_repeated_at_most']} steps were lost at once")
    injected = {step: fault_at(seed, step) for step in range(1, steps + 1) if fault_at(seed, step)}
    with (folder / "checkpoints/peace/steps.csv").open(newline="") as file:
        if [int(row["step"]) for row in csv.DictReader(file) if row["skipped"] == "1"] != list(
            injected
        ):
            faults.append("the steps that were skipped are not those with a fault")
    for whose in ("memory_of_main_process", "memory_of_workers"):
        if not quick and peace[whose]["growth_mib"] > GROWTH_LIMIT:
            faults.append(f"{whose.replace('_', ' ')} grew by {peace[whose]['growth_mib']} MiB")
    pictures = len(list((folder / "figs/peace").iterdir()))
    compared = {
        "steps": steps,
        "checkpoint_every": EVERY,
        "injected": Counter(injected.values()),
        "pictures": pictures,
    }
    limit = {"growth_limit_mib": None if quick else GROWTH_LIMIT}
    took = {"minutes": round((time.time() - begin) / 60, 1)}
    return {**took, **compared, "in_peace": peace, **limit, "disturbed": figures, "faults": faults}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances and the faults")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument(
        "--quick", action="store_true", help="few steps, few disturbances, no judgement on memory"
    )
    options = parser.parse_args(arguments)
    start = stamp("soak", arguments, "cpu", ("pytorch-lightning", "numpy")) | {
        "threads": 1,
        "seed": options.seed,
    }
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    result = soak(options.minutes, options.seed, options.quick, folder)
    write({**start, "flags": FLAGS, **result}, options.output)
    for title, value in result.items():
        print(f"{title}: {value}")
    if result["faults"]:
        sys.exit(f"not as it should be; the runs' files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
