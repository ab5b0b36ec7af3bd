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
  second (see `experiments.claims`).

-ELBO is that of the checkpoint that evaluate.py reads: the best validation, or for β-VAEs the last.
Its unit is bits/dim, nats per image for β-VAEs. -log p(x) is taken from figs/RUN/results.json if
evaluate.py has written it. Time is that of training and validations, without what a restart
repeated. On stderr: what is left out and why, and commits that differ.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claims import judged
from experiments.output import (
    limits,
    markdown,
    mean_and_deviation,
    note,
    note_differences,
    over_seeds,
    panels,
    write_csv,
    write_text,
)
from lib.cli import OneLineParser, one_line_errors
from lib.config import ConfigError, TrainConfig
from lib.evaluation.results import read_results
from lib.training.resume import RUN_FILE

PROGRAM = "gather"
UNITS = {"density_estimation": "bits/dim", "disentanglement": "nats"}
# Fields of a configuration in which seeds of one row may differ: they change no result. Of devices,
# the global batch and the precision count.
FREE = (
    "random_seed exp_name output_dir make_checkpoint use_checkpoint root num_workers "
    "checkpoint_every_n_steps checkpoint_every_minutes keep_last batch batch_val gpus "
    "num_processes num_nodes distributed_backend backend compile checkpoint_activations "
    "profiler_mode logger figsize sampling_temperature"
).split()
# Headings and decimals in table.md.
MEASURED = {"steps": ("steps", 0), "hours": ("hours", 2)}
MEASURED |= {"neg_elbo": ("−ELBO", 3), "neg_log_p": ("−log p(x)", 3)}
EXTRA = re.compile("steps_to_|neg_elbo_at_")


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
    def data(self) -> tuple[str, str]:
        """Task and data set."""
        return self.config.task, self.config.dataset

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
        with_highway = " with highway" if config.block != "sdn" else ""
        name += {"auto": "", "on": with_highway, "off": ", no highway"}[config.highway]
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
        reason = (str(error).splitlines() or [""])[0]
        return f"damaged ({type(error).__name__}: {reason})"
    if not rows:
        return "no validation yet"
    steps, seconds, neg_elbo = map(np.array, columns)
    if not np.isfinite([steps, seconds]).all():
        return "damaged (epochs.csv: a step or a time is no number)"
    results = read_results(folder.parent.parent / "figs" / folder.name / "results.json")
    curve = steps, seconds.cumsum() / 3600, neg_elbo
    return Run(folder, config, parameters, commits, *curve, epochs, results.get("likelihood", {}))


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs below, by data set and name; what is left out is noted on stderr.

    Raises:
        ConfigError: if there are none.
    """
    places = sorted({path.parent for folder in folders for path in folder.rglob(RUN_FILE)})
    known: dict[tuple, Run] = {}
    for place in places:
        run = read_run(place)
        if isinstance(run, Run):
            first = known.setdefault((run.key, run.config.random_seed), run)
            run = run if run is first else f"{first.folder} is the same run"
        if isinstance(run, str):
            note(PROGRAM, f"{place} is left out: {run}")
    runs = known.values()
    if not runs:
        where = ", ".join(map(str, folders))
        raise ConfigError(f"there are no runs of train.py in {where} ({RUN_FILE}, epochs.csv)")

    return sorted(runs, key=lambda run: (*run.data, run.name, run.config.random_seed))


def neg_log_p_of(run: Run) -> float | None:
    """The importance-weighted estimate in bits/dim, if it is of the weights that the row is
    about."""
    value, step = (run.likelihood.get(name) for name in ("bits_per_dim", "step"))
    if not isinstance(value, int | float):
        return None
    if step is not None and step != run.steps[run.chosen]:
        note(PROGRAM, f"-log p(x) of {run.folder} is left out: it is of step {step}")
        return None
    return float(value)


def row_of(
    run: Run,
    reach: Sequence[float] = (),
    at_steps: Sequence[int] = (),
    at_minutes: Sequence[float] = (),
) -> dict[str, Any]:
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
    clocks = [(limit, run.steps, "steps") for limit in at_steps]
    clocks += [(limit, run.hours * 60, "minutes") for limit in at_minutes]
    for limit, clock, unit in clocks:
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


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of table.csv: what seeds share, their number, and mean and deviation of what was
    measured."""
    line = {name: rows[0][name] for name in ("name", "kind", "dataset", "unit", "parameters")}
    line |= {"seeds": len(rows), "finished": sum(row["state"] == "finished" for row in rows)}
    line |= over_seeds(rows, [*MEASURED, *filter(EXTRA.match, rows[0])])
    commits = {commit[:8] + commit[40:] for row in rows for commit in row["commits"].split()}
    return line | {"commits": " ".join(sorted(commits))}


def as_markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table for people; a number of seeds behind a cell says that not all have it."""
    shown = dict(MEASURED)
    for name in (name.removesuffix("_mean") for name in table[0] if name.endswith("_mean")):
        title = name.replace("neg_elbo_at_", "−ELBO at ").replace("_", " ")
        shown.setdefault(name, (title, 0 if name.startswith("steps_to_") else 3))
    titles = [title for title, _ in shown.values()]
    lines = [["run", "top-down path", "data", "parameters", "seeds", *titles, "commit"]]
    for line in table:
        seeds = line["seeds"]
        unfinished = "" if line["finished"] == seeds else f" ({line['finished']} finished)"
        cells = [line["name"], line["kind"], line["dataset"], f"{line['parameters']:,}"]
        cells.append(f"{seeds}{unfinished}")
        for name, (_, decimals) in shown.items():
            decimals = 1 if line["unit"] == "nats" and name.startswith("neg_elbo") else decimals
            partly = f" ({line[f'{name}_n']} of {seeds})" * (0 < line[f"{name}_n"] < seeds)
            cells.append(mean_and_deviation(line, name, decimals) + partly)
        lines.append([*cells, line["commits"]])
    return markdown(lines)


def draw_curves(groups: Sequence[Sequence[Run]], path: Path) -> None:
    """-ELBO of runs of one data set against steps and against minutes."""
    unit = UNITS[groups[0][0].config.task]
    parts = np.linspace(0, 1, 100)  # of a run's steps
    values = [np.interp(parts * r.steps[-1], r.steps, r.neg_elbo) for g in groups for r in g]
    clocks = (lambda run: run.steps), (lambda run: run.hours * 60)
    with panels(path, 1, 2, size=(11, 4.6), sharex="none", legend_columns=4) as ((left, right),):
        for number, members in enumerate(groups):
            color, label = f"C{number % 10}", members[0].name
            style = dict(color=color, linestyle=("-", "--", ":")[number // 10 % 3])
            for axes, clock in zip((left, right), clocks, strict=True):
                for run in members:
                    axes.plot(clock(run), run.neg_elbo, **style, linewidth=0.7, alpha=0.45)
                start = max(clock(run)[0] for run in members)
                grid = np.linspace(start, min(clock(run)[-1] for run in members), 200)
                curves = [np.interp(grid, clock(run), run.neg_elbo) for run in members]
                axes.plot(grid, np.mean(curves, axis=0), **style, linewidth=1.8, label=label)
        left.set(xlabel="steps", ylabel=f"validation −ELBO ({unit})", ylim=limits(np.stack(values)))
        right.set(xlabel="minutes", ylim=left.get_ylim())


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
    table = [summarize([rows[run.folder] for run in members]) for members in groups]
    verdicts = judged(claims, table) if claims else None
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "runs.csv", list(next(iter(rows.values()))), rows.values())
    write_csv(output / "table.csv", list(table[0]), table)
    text = as_markdown(table)
    write_text(output / "table.md", text)
    if verdicts:
        text += f"\n{verdicts}"
        write_text(output / "claims.md", verdicts)
    # Runs are in the order of their data.
    for (task, dataset), some in itertools.groupby(groups, lambda members: members[0].data):
        draw_curves(list(some), output / f"curves_{task}_{dataset}.png")
    found = {run.folder.name: run.likelihood for run in runs if run.likelihood}
    settings = {name: [of.get("images"), of.get("samples")] for name, of in found.items()}
    note_differences(PROGRAM, "images and samples of -log p(x)", settings)
    note_differences(PROGRAM, "commit", {run.folder.name: " ".join(run.commits) for run in runs})
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        PROGRAM, description="Gathers runs of train.py into one table and learning curves."
    )
    add = parser.add_argument
    add("folders", type=Path, nargs="+", help="where runs are, at any depth")
    add("--output", type=Path, default=Path("figs/gathered"), help="folder to write into")
    many = dict(nargs="+", default=[])
    add("--reach", type=float, help="adds the steps until -ELBO is so low", **many)
    add("--at_steps", type=int, help="adds -ELBO after so many steps", **many)
    add("--at_minutes", type=float, help="adds -ELBO after so many minutes", **many)
    meaning = "two names: is -ELBO of the first lower? may be given again"
    pair = dict(nargs=2, action="append", default=[], metavar=("LOWER", "HIGHER"))
    add("--claim", help=meaning, **pair)
    flags = parser.parse_args(arguments)
    with one_line_errors(PROGRAM, ConfigError, OSError):
        more = dict(reach=flags.reach, at_steps=flags.at_steps, at_minutes=flags.at_minutes)
        text = gather(flags.folders, flags.output, flags.claim, **more)
        print(text, f"written to {flags.output}", sep="\n")


if __name__ == "__main__":
    main()
