"""Runs of train.py, gathered: a table (Tables 1, 2 and 4 of the paper) and learning curves against
steps and time.

    python -m experiments.gather checkpoints [more folders ...] [--reach 4.5] [--at_minutes 10]
        [--output FOLDER] [--claim LOWER HIGHER ...]

A run is any folder, at any depth, with run.json and epochs.csv, which train.py writes; finished or
not. Runs whose names differ by `_seedN` at the end and whose configurations by `random_seed` are
seeds of one row. Writes:

- runs.csv: a row for each run; table.csv and table.md: mean and standard deviation over seeds (ddof
  1).
- curves_TASK_DATASET.png: validation -ELBO against steps and against time, each seed thin and their
  mean thick.
- claims.md, with `--claim LOWER HIGHER`: whether -ELBO of the first name is lower than that of the
  second. That *holds* if the means over seeds differ so by more than two standard errors of the
  difference, is *refuted* if they differ so the other way, and is else *open*.

-ELBO is that of the checkpoint that evaluate.py reads: the best validation, or for β-VAEs the last.
Its unit is bits/dim, nats per image for β-VAEs. -log p(x) is taken from figs/RUN/results.json if
evaluate.py has written it. Time is that of training and validations, without what a restart
repeated. On stderr: what is left out and why, and commits that differ.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.output import (
    limits,
    markdown,
    mean_and_deviation,
    note_differences,
    panels,
    write_csv,
)
from lib.cli import OneLineParser, one_line_errors
from lib.config import ConfigError, TrainConfig
from lib.evaluation.results import read_results
from lib.files import whole_file
from lib.training.resume import RUN_FILE

PROGRAM = "gather"
UNITS = {"density_estimation": "bits/dim", "disentanglement": "nats"}
# Fields of a configuration in which seeds of one row may differ: they change no result. Of devices,
# the global batch and the precision count.
FREE = {
    "random_seed",
    "exp_name",
    "output_dir",
    "make_checkpoint",
    "use_checkpoint",
    "root",
    "num_workers",
}
FREE |= {
    "checkpoint_every_n_steps",
    "checkpoint_every_minutes",
    "keep_last",
    "batch",
    "batch_val",
    "gpus",
}
FREE |= {
    "num_processes",
    "num_nodes",
    "distributed_backend",
    "backend",
    "compile",
    "checkpoint_activations",
}
FREE |= {"profiler_mode", "logger", "figsize", "sampling_temperature"}
MEASURED = ("steps", "hours", "neg_elbo", "neg_log_p")


@dataclass(frozen=True)
class Run:
    """One run, as its files tell.

    Attributes:
        folder: Its folder.
        config, parameters, commits: As in run.json.
        steps, hours, neg_elbo: Of each validation, float64 [validations].
        epochs: That the last validation came after, if the file has them.
        likelihood: What evaluate.py has written of -log p(x), or nothing.
    """

    folder: Path
    config: TrainConfig
    parameters: int
    commits: list[str]
    steps: np.ndarray
    hours: np.ndarray
    neg_elbo: np.ndarray
    epochs: int
    likelihood: dict[str, Any]

    @property
    def name(self) -> str:
        """Without the seed."""
        return re.sub(r"[_-]seed\d+$", "", self.folder.name)

    @property
    def key(self) -> tuple:
        """The same for all seeds of a row."""
        config = self.config
        global_batch = config.batch * (config.gpus or config.num_processes) * config.num_nodes
        fields = (field.name for field in dataclasses.fields(TrainConfig) if field.name not in FREE)
        return self.name, global_batch, *(str(getattr(config, name)) for name in fields)

    @property
    def finished(self) -> bool:
        return bool(
            self.steps[-1] >= self.config.iters or 0 < self.config.max_epochs <= self.epochs
        )

    @property
    def chosen(self) -> int:
        """Index of the validation whose weights evaluate.py reads."""
        if self.config.task == "disentanglement" or not np.isfinite(self.neg_elbo).any():
            return len(self.steps) - 1
        return int(np.nanargmin(self.neg_elbo))


def describe(config: TrainConfig) -> str:
    """What a model is, in a few words."""
    beta = f"β {config.beta_final:g}, " if config.task == "disentanglement" else ""
    if config.sdn_max_scale == 0 or config.block == "conv3" and config.highway != "on":
        return beta + ("CNN" if beta else "IAF-VAE+")
    number = f"{config.sdn_num_dirs} direction{'s' * (config.sdn_num_dirs > 1)}"
    name = f"SDN, {number}" if config.block == "sdn" else config.block
    if not beta:
        name += {
            "auto": "",
            "on": " with highway" * (config.block != "sdn"),
            "off": ", no highway",
        }[config.highway]
        name += f", scales up to {config.sdn_max_scale}"
    return beta + name


def read_run(folder: Path) -> Run | str:
    """The run in a folder with a run.json; or why it cannot be told."""
    try:
        described = json.loads((folder / RUN_FILE).read_text())
        config = TrainConfig.from_dict(described["config"])
        config.validate()
        parameters, commits = int(described["parameters"]), list(map(str, described["commits"]))
        with (folder / "epochs.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        columns = [
            [float(row[name]) for row in rows] for name in ("step", "seconds", "val_neg_elbo")
        ]
        epochs = int(rows[-1].get("epoch") or -1) + 1 if rows else 0
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        return (
            f"damaged ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
    if not rows:
        return "no validation yet"
    steps, seconds, neg_elbo = map(np.array, columns)
    if not np.isfinite([steps, seconds]).all():
        return "damaged (epochs.csv: a step or a time is no number)"
    likelihood = read_results(folder.parent.parent / "figs" / folder.name / "results.json").get(
        "likelihood", {}
    )
    return Run(
        folder,
        config,
        parameters,
        commits,
        steps,
        seconds.cumsum() / 3600,
        neg_elbo,
        epochs,
        likelihood,
    )


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs below, by data set and name; what is left out is noted on stderr.

    Raises:
        ConfigError: if there are none.
    """
    places = sorted({path.parent for folder in folders for path in folder.rglob(RUN_FILE)})
    found = {place: read_run(place) for place in places}
    for place, run in found.items():
        if isinstance(run, str):
            print(f"{PROGRAM}: note: {place} is left out: {run}", file=sys.stderr)
    runs, known = [], {}
    for place, run in found.items():
        if isinstance(run, Run):
            first = known.setdefault((run.key, run.config.random_seed), place)
            if first == place:
                runs.append(run)
            else:
                print(
                    f"{PROGRAM}: note: {place} is left out: {first} is the same run",
                    file=sys.stderr,
                )
    if not runs:
        raise ConfigError(
            f"there are no runs of train.py in {', '.join(map(str, folders))} ({RUN_FILE}, epochs.csv)"
        )
    return sorted(
        runs,
        key=lambda run: (run.config.task, run.config.dataset, run.name, run.config.random_seed),
    )


def neg_log_p_of(run: Run) -> float | None:
    """The importance-weighted estimate in bits/dim, if it is of the weights that the row is
    about."""
    value, step = (run.likelihood.get(name) for name in ("bits_per_dim", "step"))
    if not isinstance(value, int | float):
        return None
    if step is not None and step != run.steps[run.chosen]:
        print(
            f"{PROGRAM}: note: -log p(x) of {run.folder} is left out: it is of step {step}",
            file=sys.stderr,
        )
        return None
    return float(value)


def row_of(
    run: Run,
    *,
    reach: Sequence[float] = (),
    at_steps: Sequence[int] = (),
    at_minutes: Sequence[float] = (),
):
    """The run's row of runs.csv.

    Arguments:
        reach: Adds the first step whose validation is at most so much (None: not reached).
        at_steps, at_minutes: Adds -ELBO of the last validation not after (None: none so early, or
            the run is shorter).
    """
    best = run.chosen
    row = {
        "run": run.folder.name,
        "name": run.name,
        "kind": describe(run.config),
        "dataset": run.config.dataset,
        "unit": UNITS[run.config.task],
        "parameters": run.parameters,
        "seed": run.config.random_seed,
        "state": "finished" if run.finished else "not finished",
        "steps": int(run.steps[-1]),
        "hours": float(run.hours[-1]),
        "neg_elbo": float(run.neg_elbo[best]),
        "best_step": int(run.steps[best]),
        "neg_log_p": neg_log_p_of(run),
        "commits": " ".join(run.commits),
    }
    for value in reach:
        below = np.flatnonzero(run.neg_elbo <= value)
        row[f"steps_to_{value:g}"] = int(run.steps[below[0]]) if len(below) else None
    for limit, clock, unit in (
        *((limit, run.steps, "steps") for limit in at_steps),
        *((limit, run.hours * 60, "minutes") for limit in at_minutes),
    ):
        before = np.flatnonzero(clock <= limit)
        enough = len(before) and clock[-1] >= limit * 0.98
        row[f"neg_elbo_at_{limit:g}_{unit}"] = float(run.neg_elbo[before[-1]]) if enough else None
    return row


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Seeds of the same row together, in order."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    return list(groups.values())


def summarize(
    groups: Sequence[Sequence[Run]], rows: dict[Path, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of table.csv: what seeds share, their number, and mean and deviation of what was
    measured."""
    table = []
    for members in groups:
        of = [rows[run.folder] for run in members]
        line = {name: of[0][name] for name in ("name", "kind", "dataset", "unit", "parameters")}
        line |= {"seeds": len(of), "finished": sum(row["state"] == "finished" for row in of)}
        for name in [
            *MEASURED,
            *(name for name in of[0] if re.match("steps_to_|neg_elbo_at_", name)),
        ]:
            values = [row[name] for row in of if row[name] is not None and math.isfinite(row[name])]
            line[f"{name}_n"] = len(values)
            line[f"{name}_mean"] = statistics.fmean(values) if values else None
            line[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        line["commits"] = " ".join(
            sorted({commit[:8] + commit[40:] for run in members for commit in run.commits})
        )
        table.append(line)
    return table


def as_markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table for people; a number of seeds behind a cell says that not all have it."""
    extra = [
        name.removesuffix("_mean")
        for name in table[0]
        if re.match("(steps_to_|neg_elbo_at_).*_mean$", name)
    ]
    titles = [name.replace("neg_elbo_at_", "−ELBO at ").replace("_", " ") for name in extra]
    heading = [
        "run",
        "top-down path",
        "data",
        "parameters",
        "seeds",
        "steps",
        "hours",
        "−ELBO",
        "−log p(x)",
    ]
    lines = [[*heading, *titles, "commit"]]
    for line in table:
        seeds = str(line["seeds"]) + (
            "" if line["finished"] == line["seeds"] else f" ({line['finished']} finished)"
        )
        cells = [line["name"], line["kind"], line["dataset"], f"{line['parameters']:,}", seeds]
        for name, decimals in (
            ("steps", 0),
            ("hours", 2),
            ("neg_elbo", 3),
            ("neg_log_p", 3),
            *((n, 3) for n in extra),
        ):
            decimals = 0 if name.startswith("steps_to_") else decimals
            decimals = 1 if line["unit"] == "nats" and name.startswith("neg_elbo") else decimals
            cell = mean_and_deviation(line[f"{name}_mean"], line[f"{name}_std"], decimals)
            partly = 0 < line[f"{name}_n"] < line["seeds"]
            cells.append(f"{cell} ({line[f'{name}_n']} of {line['seeds']})" if partly else cell)
        lines.append([*cells, line["commits"]])
    return markdown(lines)


def draw_curves(groups: Sequence[Sequence[Run]], path: Path) -> None:
    """-ELBO of runs of one data set against steps and against minutes."""
    unit = UNITS[groups[0][0].config.task]
    values = [
        np.interp(np.linspace(0, 1, 100), run.steps / run.steps[-1], run.neg_elbo)
        for g in groups
        for run in g
    ]
    with panels(path, 1, 2, size=(11, 4.6), sharex="none", legend_columns=4) as ((left, right),):
        for number, members in enumerate(groups):
            color, label = f"C{number % 10}", members[0].name
            style = dict(color=color, linestyle=("-", "--", ":")[number // 10 % 3])
            for axes, clocks in (
                (left, [r.steps for r in members]),
                (right, [r.hours * 60 for r in members]),
            ):
                for run, clock in zip(members, clocks, strict=True):
                    axes.plot(clock, run.neg_elbo, **style, linewidth=0.7, alpha=0.45)
                grid = np.linspace(
                    max(clock[0] for clock in clocks), min(clock[-1] for clock in clocks), 200
                )
                mean = np.mean(
                    [np.interp(grid, c, r.neg_elbo) for c, r in zip(clocks, members, strict=True)],
                    axis=0,
                )
                axes.plot(grid, mean, **style, linewidth=1.8, label=label)
        left.set(xlabel="steps", ylabel=f"validation −ELBO ({unit})", ylim=limits(np.stack(values)))
        right.set(xlabel="minutes", ylim=left.get_ylim())


def judged(claims: Sequence[tuple[str, str]], table: Sequence[dict[str, Any]]) -> str:
    """For people: differences of claimed lower and higher -ELBO, and whether the claims hold.

    Raises:
        ConfigError: if a name is not that of exactly one row of finished runs, or the rows' units
            differ.
    """
    lines = [["claim: −ELBO is lower", "than", "difference", "standard error", "the claim"]]
    for names in claims:
        pair = []
        for name in names:
            rows = [row for row in table if row["name"] == name]
            if len(rows) != 1 or rows[0]["finished"] < rows[0]["seeds"]:
                problem = "there is no run" if not rows else "there are several configurations"
                problem = "there are runs that are not finished" if len(rows) == 1 else problem
                raise ConfigError(f"--claim {name}: {problem} of this name")
            if not rows[0]["neg_elbo_n"]:
                raise ConfigError(f"--claim {name}: no -ELBO of it is finite")
            pair += rows
        lower, higher = pair
        if (lower["unit"], lower["dataset"]) != (higher["unit"], higher["dataset"]):
            raise ConfigError(f"--claim {' '.join(names)}: their data or units differ")
        difference = lower["neg_elbo_mean"] - higher["neg_elbo_mean"]
        error, verdict = None, "open: it needs two seeds of each"
        if min(lower["neg_elbo_n"], higher["neg_elbo_n"]) > 1:
            error = math.sqrt(sum(row["neg_elbo_std"] ** 2 / row["neg_elbo_n"] for row in pair))
            verdict = (
                "open" if abs(difference) <= 2 * error else "holds" if difference < 0 else "refuted"
            )
        lines.append(
            [*names, f"{difference:+.3f}", "-" if error is None else f"{error:.3f}", verdict]
        )
    return markdown(lines)


def gather(
    folders: Sequence[Path],
    output: Path,
    claims: Sequence[tuple[str, str]] = (),
    **more: Sequence[float],
) -> str:
    """Reads the runs below the folders and writes tables and figures; the tables for people.

    Raises:
        ConfigError: if there are no runs, a file of results is damaged, or a claim cannot be
            judged.
    """
    runs = find_runs(folders)
    groups = grouped(runs)
    rows = {run.folder: row_of(run, **more) for run in runs}
    table = summarize(groups, rows)
    verdicts = judged(claims, table) if claims else None
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "runs.csv", list(next(iter(rows.values()))), rows.values())
    write_csv(output / "table.csv", list(table[0]), table)
    text = as_markdown(table)
    with whole_file(output / "table.md") as partial:
        partial.write_text(text)
    if verdicts:
        text += f"\n{verdicts}"
        with whole_file(output / "claims.md") as partial:
            partial.write_text(verdicts)
    for task, dataset in sorted({(run.config.task, run.config.dataset) for run in runs}):
        of = [
            group
            for group in groups
            if (group[0].config.task, group[0].config.dataset) == (task, dataset)
        ]
        draw_curves(of, output / f"curves_{task}_{dataset}.png")
    names = ("images", "samples")
    settings = {
        run.folder.name: [run.likelihood.get(name) for name in names]
        for run in runs
        if run.likelihood
    }
    note_differences(PROGRAM, "images and samples of -log p(x)", settings)
    note_differences(PROGRAM, "commit", {run.folder.name: " ".join(run.commits) for run in runs})
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        PROGRAM, description="Gathers runs of train.py into one table and learning curves."
    )
    parser.add_argument("folders", type=Path, nargs="+", help="where runs are, at any depth")
    parser.add_argument(
        "--output", type=Path, default=Path("figs/gathered"), help="folder to write into"
    )
    parser.add_argument(
        "--reach", type=float, nargs="+", default=[], help="adds the steps until -ELBO is so low"
    )
    parser.add_argument(
        "--at_steps", type=int, nargs="+", default=[], help="adds -ELBO after so many steps"
    )
    parser.add_argument(
        "--at_minutes", type=float, nargs="+", default=[], help="adds -ELBO after so many minutes"
    )
    meaning = "two names: is -ELBO of the first lower? may be given again"
    parser.add_argument(
        "--claim", nargs=2, action="append", default=[], metavar=("LOWER", "HIGHER"), help=meaning
    )
    flags = parser.parse_args(arguments)
    with one_line_errors(PROGRAM, ConfigError, OSError):
        more = dict(reach=flags.reach, at_steps=flags.at_steps, at_minutes=flags.at_minutes)
        print(
            gather(flags.folders, flags.output, flags.claim, **more),
            f"written to {flags.output}",
            sep="\n",
        )


if __name__ == "__main__":
    main()
