"""The runs of the disentanglement experiment as a table (the paper's Table 2) and as its Figures 7 and 12.

    python -m experiments.disentanglement_results --name 3dshapes

β-VAEs with a CNN and with an SDN decoder, for several β and seeds. Reads checkpoints/RUN/steps.csv, which training
writes, and figs/RUN/results.json of evaluate.py; RUN is `experiments.naming.Run.folder`. Writes into the folder:

- runs.csv: a row for each evaluated run; table.csv and table.md: mean and standard deviation over seeds (ddof 1; empty
  for a single seed) for each β and decoder. Nats are per image; -ELBO also in bits/dim; scores are in [0, 1].
- figure7.png: BetaVAE and FactorVAE metric against β. figure12.png: learning curves, with limits of the y axes that
  leave out what lies far outside of what the curves do after the first twentieth of training (`limits`).

What the table lacks, and in what the runs differ though they should not, is said on stderr.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.naming import DECODERS, Run
from lib.cli import OneLineParser, one_line_errors
from lib.config import ConfigError
from lib.evaluation.results import read_results
from lib.files import whole_file

PROGRAM = "disentanglement_results"
NATS_PER_BIT_PER_DIM = 64 * 64 * 3 * math.log(2)
METRICS = {"beta_vae": "BetaVAE", "factor_vae": "FactorVAE", "mig": "MIG", "dci": "DCI", "sap": "SAP"}
# Heading and decimals in table.md; metrics have three.
QUANTITIES = {
    "elbo": ("ELBO (nats)", 1),
    "log_likelihood": ("log-likelihood (nats)", 1),
    "kl": ("KL (nats)", 2),
    "beta_kl": ("β·KL (nats)", 1),
    "neg_elbo_bits_per_dim": ("−ELBO (bits/dim)", 4),
}
COLUMNS = ("step", "neg_elbo", "distortion", "rate", "beta_kl", "beta")  # read from steps.csv
CURVES = ("(a) ELBO", "(b) log-likelihood", "(c) KL", "(d) β · KL")
BINS = 200
TAIL = 2**16  # bytes: more than a line of steps.csv has
STYLES = {
    "cnn": dict(label="CNN", color="#D55E00", marker="s", linestyle=(0, (4, 1.6))),
    "sdn": dict(label="SDN", color="#0072B2", marker="o", linestyle="-"),
}


@dataclass(frozen=True)
class Curves:
    """Learning curves of all runs, averaged over the same bins of steps.

    Attributes:
        steps: Middle of each bin, float64 [B].
        values: For each (beta, decoder), float64 [seeds, 4, B] in nats per image, in the order of `CURVES`; NaN where a
            run has no steps, or values that are not finite.
        annealed: For each beta, the step from which on training used the whole of it; none where it did from the first.
    """

    steps: np.ndarray
    values: dict[tuple[float, str], np.ndarray]
    annealed: dict[float, int]

    def spread(self, beta: float, decoder: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (ddof 1) over the seeds that have the bin, [4, B] each; NaN without or with one."""
        values = np.ma.masked_invalid(self.values[beta, decoder])
        return values.mean(0).filled(np.nan), values.std(0, ddof=1).filled(np.nan)


def find_runs(output_dir: Path, name: str) -> list[Run]:
    """The experiment's runs, by β, decoder and seed.

    Raises:
        ConfigError: if there are none.
    """
    folders = sorted((output_dir / "checkpoints").glob("*/"))
    runs = [run for folder in folders if (run := Run.parse(folder.name)) and run.name == name]
    if not runs:
        pattern = output_dir / "checkpoints" / f"{name}_{{{','.join(DECODERS)}}}_beta*_seed*"
        raise ConfigError(f"there are no runs {pattern}; `bash train_3dshapes.sh` makes runs")
    return sorted(runs, key=lambda run: (run.beta, run.decoder, run.seed))


def evaluated(run: Run, path: Path) -> tuple[dict[str, Any], list[int] | None] | str:
    """The run's row of runs.csv and the `levels` of its metrics; or why it has none.

    Raises:
        ConfigError: if results.json is damaged.
    """
    results = read_results(path)
    elbo, scored = results.get("elbo"), results.get("disentanglement")
    if elbo is None or scored is None:
        parts = [task for task, result in (("ELBO", elbo), ("disentanglement", scored)) if result is None]
        return "not evaluated" if len(parts) == 2 else f"no {parts[0]}"
    try:
        if elbo["step"] != scored["step"]:
            return f"ELBO of step {elbo['step']}, disentanglement of step {scored['step']}"
        if elbo.get("weights") != scored.get("weights"):
            return "ELBO and disentanglement of different weights"
        bits, distortion, rate = (float(elbo[part]) for part in ("bits_per_dim", "distortion", "rate"))
        row = {"run": run.folder, "decoder": run.decoder, "beta": run.beta, "seed": run.seed}
        row |= {"steps": int(elbo["step"]), "images": int(elbo["images"]), "elbo": -bits * NATS_PER_BIT_PER_DIM}
        row |= {"log_likelihood": -distortion * NATS_PER_BIT_PER_DIM, "kl": rate * NATS_PER_BIT_PER_DIM}
        row |= {"beta_kl": run.beta * row["kl"], "neg_elbo_bits_per_dim": bits}
        return row | {metric: float(found["score"]) for metric, found in scored["scores"].items()}, scored.get("levels")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}): evaluate again") from None


def quantities(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rows have, in the order of the columns; the paper's two metrics always."""
    scores = {key for row in rows for key in row} - set(QUANTITIES) - set(ROW_START)
    known = [metric for metric in METRICS if metric in scores or metric in ("beta_vae", "factor_vae")]
    return [*QUANTITIES, *known, *sorted(scores - set(METRICS))]


ROW_START = ("run", "decoder", "beta", "seed", "steps", "images")


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of table.csv: for each β and decoder the number of seeds, and `QUANTITY_mean` and `QUANTITY_std` (ddof 1).

    None stands for what is not there: all of a quantity's values, or a deviation of a single one.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row["beta"], row["decoder"]].append(row)
    table = []
    for (beta, decoder), members in sorted(groups.items()):
        line: dict[str, Any] = {"beta": beta, "decoder": decoder, "seeds": len(members)}
        for quantity in quantities(rows):
            values = [row[quantity] for row in members if quantity in row]
            line[f"{quantity}_mean"] = statistics.fmean(values) if values else None
            line[f"{quantity}_std"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(line)
    return table


def markdown(table: Sequence[Mapping[str, Any]], names: Iterable[str]) -> str:
    """The table as Markdown: mean ± standard deviation, the mean alone where there is no deviation."""
    shown = {name: QUANTITIES.get(name, (METRICS.get(name, name), 3)) for name in names}
    lines = ["| " + " | ".join(["β", "decoder", "seeds", *(heading for heading, _ in shown.values())]) + " |"]
    lines.append("|" + "---|" * (3 + len(shown)))
    for line in table:
        cells = [f"{line['beta']:g}", line["decoder"].upper(), str(line["seeds"])]
        for name, (_, decimals) in shown.items():
            mean, std = line[f"{name}_mean"], line[f"{name}_std"]
            cell = "-" if mean is None else f"{mean:.{decimals}f}".replace("-", "−")
            cells.append(cell if std is None else f"{cell} ± {std:.{decimals}f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def last_step(path: Path) -> int:
    """Of the last complete row of steps.csv, read from the file's end; 0 if there is none."""
    with path.open("rb") as file:
        head = file.readline()
        file.seek(max(len(head), os.fstat(file.fileno()).st_size - TAIL))
        lines = file.read().split(b"\n")[:-1]
    whole = [line for line in lines[-2:] if line.count(b",") == head.count(b",")]
    try:
        return int(whole[-1].split(b",")[head.split(b",").index(b"step")]) if whole else 0
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): move it away") from None


def read_steps(path: Path) -> np.ndarray:
    """The `COLUMNS` of steps.csv, float64 [6, steps]. A last row without its end, which a kill leaves, is ignored.

    Raises:
        ConfigError: if the file is damaged otherwise.
    """
    try:
        head, *lines = path.read_text().split("\n")[:-1] or [""]
        names = head.rstrip("\r").split(",")
        if lines and lines[-1].count(",") != head.count(","):
            lines.pop()
        values = np.loadtxt(lines, delimiter=",", usecols=[names.index(c) for c in COLUMNS], ndmin=2, unpack=True)
        if values[0, 0] < 1 or (np.diff(values[0]) <= 0).any():
            raise ValueError("the steps do not rise from 1 on")
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{path} is damaged ({str(error).splitlines()[0]}): move it away") from None
    return values


def learning_curves(paths: Mapping[Run, Path], bins: int = BINS) -> Curves:
    """Learning curves of runs from their steps.csv, each with one row at least; at most `bins` bins.

    Raises:
        ConfigError: if a file is damaged.
    """
    total = max(map(last_step, paths.values()))
    edges = np.unique(np.linspace(0, total, min(bins, total) + 1).round().astype(int))
    seeds, annealed = defaultdict(list), {}
    for run, path in paths.items():
        steps, neg_elbo, distortion, rate, beta_kl, beta = read_steps(path)
        index = np.searchsorted(edges, steps.clip(max=total)) - 1  # bin i has the steps edges[i] + 1 ... edges[i + 1]
        counts = np.bincount(index, minlength=len(edges) - 1)
        with np.errstate(invalid="ignore"):
            sums = [np.bincount(index, part, len(counts)) for part in (-neg_elbo, -distortion, rate, beta_kl)]
            means = np.stack(sums) / counts
        seeds[run.beta, run.decoder].append(np.where(np.isfinite(means), means, np.nan))
        reached = beta >= run.beta * (1 - 1e-6)
        if reached.any() and not reached[0]:
            annealed[run.beta] = int(steps[reached.argmax()])
    values = {key: np.stack(curves) for key, curves in sorted(seeds.items())}
    return Curves((edges[:-1] + 1 + edges[1:]) / 2, values, annealed)


def limits(values: np.ndarray) -> tuple[float, float] | None:
    """Limits of a y axis for curves [curves, B], from what they do after the first twentieth of their bins.

    The first values are huge (60,000 nats where training ends at 10,000) and a diverged run's may be anything, so the
    limits are the percentiles 1 and 99 of the values, and a margin of 12% of their distance. None without any values.
    """
    later = values[:, values.shape[1] // 20 :]
    later = later[np.isfinite(later)]
    if not later.size:
        return None
    low, high = np.percentile(later, [1, 99])
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def draw_scores(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Figure 7: the two metrics against β, mean and standard deviation over seeds; each seed a faint dot."""
    figure = _figure((9.2, 3.7))
    table, betas = summarize(rows), sorted({row["beta"] for row in rows})
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("beta_vae", "factor_vae"), strict=True):
        axes.axhline(1 / 6, color="0.35", linewidth=1, linestyle=":", label="chance", zorder=1)
        for decoder, side in zip(DECODERS, (-1, 1), strict=True):
            style = STYLES[decoder]
            dots = [(betas.index(r["beta"]), r[metric]) for r in rows if r["decoder"] == decoder and metric in r]
            lines = [r for r in table if r["decoder"] == decoder and r[f"{metric}_mean"] is not None]
            if not lines:
                continue
            axes.plot(
                [x + 0.19 * side for x, _ in dots],
                [score for _, score in dots],
                linestyle="none", marker=style["marker"], markersize=4, color=style["color"], alpha=0.3,
                markeredgewidth=0, zorder=2,
            )  # fmt: skip
            axes.errorbar(
                [betas.index(line["beta"]) + 0.06 * side for line in lines],
                [line[f"{metric}_mean"] for line in lines],
                yerr=[line[f"{metric}_std"] or 0 for line in lines],
                capsize=3, elinewidth=1.2, linewidth=1.8, markersize=6.5, zorder=3, **style,
            )  # fmt: skip
        axes.set_title(f"{METRICS[metric]} metric")
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set_xlim(-0.5, len(betas) - 0.5)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("β")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.tick_params(labelleft=True)
    figure.axes[0].set_ylabel("score (mean ± s.d. over seeds)")
    handles = {label: handle for a in figure.axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.axes[0].legend(
        [handles[label] for label in sorted(handles)], sorted(handles), loc="lower right", bbox_to_anchor=(1, 0.17)
    )
    _save(figure, path, dpi=200)


def draw_curves(curves: Curves, path: Path) -> None:
    """Figure 12: a row of panels for each β; mean curves and a band of one standard deviation over seeds."""
    from matplotlib.ticker import MaxNLocator

    betas = sorted({beta for beta, _ in curves.values})
    figure = _figure((12.5, 2.05 * len(betas) + 1.0))
    grid = figure.subplots(len(betas), len(CURVES), sharex="col", squeeze=False)
    unit, thousand = ("iterations (thousands)", 1000) if curves.steps[-1] > 9000 else ("iterations", 1)
    x = curves.steps / thousand
    for row, beta in zip(grid, betas, strict=True):
        decoders = [decoder for decoder in DECODERS if (beta, decoder) in curves.values]
        for column, axes in enumerate(row):
            for decoder in decoders:
                style = {key: value for key, value in STYLES[decoder].items() if key != "marker"}
                mean, std = (part[column] for part in curves.spread(beta, decoder))
                axes.plot(x, mean, linewidth=1.6, zorder=3 if decoder == "cnn" else 2, **style)
                axes.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.22, linewidth=0)
            bounds = limits(np.concatenate([curves.values[beta, decoder][:, column] for decoder in decoders]))
            if bounds:
                axes.set_ylim(bounds)
            axes.set_xlim(0, curves.steps[-1] * 1.01 / thousand)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}".replace("-", "−"))
            axes.grid(color="0.92", linewidth=0.7)
        if beta in curves.annealed:
            row[2].axvline(curves.annealed[beta] / thousand, color="0.35", linewidth=1, linestyle=":", zorder=1)
        row[0].set_ylabel("nats")
        row[0].annotate(
            f"β = {beta:g}", (0, 0.5), (-62, 0), xycoords="axes fraction", textcoords="offset points",
            rotation=90, ha="center", va="center", fontsize=13, fontweight="bold",
        )  # fmt: skip
    for axes, title in zip(grid[0], CURVES, strict=True):
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel(unit)
    handles = {label: handle for a in grid[:, 0] for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, handlelength=3)
    _save(figure, path, dpi=150)


def _figure(size: tuple[float, float]):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path, dpi: int) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]:
        legend.set_frame_on(False)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi, metadata={"Software": None})


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def note(message: str) -> None:
    print(f"{PROGRAM}: note: {message}", file=sys.stderr, flush=True)


def note_differences(what: str, by_run: Mapping[str, Any]) -> None:
    """One line that says which values the runs have, if it is more than one; up to three runs of each are named."""
    runs = defaultdict(list)
    for run, value in by_run.items():
        runs[json.dumps(value)].append(run)
    if len(runs) > 1:
        some = (f"{value}: {', '.join(r[:3])}{f' and {len(r) - 3} more' if r[3:] else ''}" for value, r in runs.items())
        note(f"the runs differ in {what}: {'; '.join(some)}")


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog=PROGRAM, description="Table 2 and Figures 7 and 12 of the disentanglement experiment.")
    parser.add_argument("--name", default="3dshapes", help="name of the experiment")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="where checkpoints/ and figs/ are")
    parser.add_argument("--folder", type=Path, help="where to write; default: OUTPUT_DIR/figs/NAME")
    flags = parser.parse_args(arguments)
    with one_line_errors(PROGRAM, ConfigError, OSError):
        gather(flags.output_dir, flags.name, flags.folder or flags.output_dir / "figs" / flags.name)


def gather(output_dir: Path, name: str, folder: Path) -> None:
    """Reads the runs, says what is missing or differs, and writes tables and figures into the folder."""
    runs = find_runs(output_dir, name)
    found = {run: evaluated(run, output_dir / "figs" / run.folder / "results.json") for run in runs}
    logs = {run: output_dir / "checkpoints" / run.folder / "steps.csv" for run in runs}
    ends = {run: last_step(path) if path.is_file() else 0 for run, path in logs.items()}

    rows = [result[0] for result in found.values() if not isinstance(result, str)]
    left_out = [f"{run.folder} ({why})" for run, why in found.items() if isinstance(why, str)]
    if left_out:
        note(f"{len(left_out)} of {len(runs)} runs are left out of the table: {', '.join(left_out)}")
    names = quantities(rows)
    for metric in names[len(QUANTITIES) :]:
        if lacking := [row["run"] for row in rows if metric not in row]:
            note(f"{len(lacking)} of {len(rows)} runs have no {metric}: {', '.join(lacking)}")
    if short := [run.folder for run, end in ends.items() if not end]:
        note(f"{len(short)} of {len(runs)} runs have no learning curve in steps.csv: {', '.join(short)}")
    note_differences("the last step of training", {run.folder: end for run, end in ends.items() if end})
    note_differences("the step evaluated", {row["run"]: row["steps"] for row in rows})
    note_differences("the images evaluated", {row["run"]: row["images"] for row in rows})
    levels = {run.folder: result[1] for run, result in found.items() if not isinstance(result, str)}
    note_differences("the levels of the metrics", levels)

    table = summarize(rows)
    text = markdown(table, names)
    write_csv(folder / "runs.csv", [*ROW_START, *names], rows)
    columns = [f"{quantity}_{part}" for quantity in names for part in ("mean", "std")]
    write_csv(folder / "table.csv", ["beta", "decoder", "seeds", *columns], table)
    with whole_file(folder / "table.md") as partial:
        partial.write_text(text)
    written = ["runs.csv", "table.csv", "table.md"]
    if rows:
        draw_scores(rows, folder / "figure7.png")
        written.append("figure7.png")
    if any(ends.values()):
        draw_curves(learning_curves({run: logs[run] for run in runs if ends[run]}), folder / "figure12.png")
        written.append("figure12.png")
    print(text, *(folder / file for file in written), sep="\n")


if __name__ == "__main__":
    main()
