"""The runs of the disentanglement experiment as a table (the paper's Table 2) and as its Figures 7
and 12.

    python -m experiments.disentanglement_results --name 3dshapes

β-VAEs with a CNN and with an SDN decoder, for several β and seeds. Reads checkpoints/RUN/steps.csv,
which training writes, and figs/RUN/results.json of evaluate.py; RUN is `naming.Run.folder`. Writes:

- runs.csv: a row for each evaluated run; table.csv and table.md: mean and standard deviation over
  seeds (ddof 1; empty for a single seed) for each β and decoder. Nats are per image; -ELBO also in
  bits/dim; scores are in [0, 1].
- figure7.png: BetaVAE and FactorVAE metric against β. figure12.png: learning curves; the y axes
  leave out the start and what else lies far from the rest (`limits`).
- on stderr: what is missing, and in what the runs differ though they should not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import output
from experiments.naming import DECODERS, Run
from experiments.output import (
    Row,
    limits,
    mean_and_deviation,
    note,
    note_differences,
    over_seeds,
    panels,
    write_csv,
    write_text,
)
from lib.cli import OneLineParser, one_line_errors
from lib.config import ConfigError
from lib.DisentanglementVAE.metrics import TITLES
from lib.evaluation.results import read_results
from lib.utils import nats_to_bits_per_dim

PROGRAM = "disentanglement_results"
NATS_PER_BIT_PER_DIM = 1 / nats_to_bits_per_dim(1.0, (3, 64, 64))
# Heading and decimals in table.md; metrics have three.
QUANTITIES = {
    "elbo": ("ELBO (nats)", 1),
    "log_likelihood": ("log-likelihood (nats)", 1),
    "kl": ("KL (nats)", 2),
}
QUANTITIES |= {"beta_kl": ("β·KL (nats)", 1), "neg_elbo_bits_per_dim": ("−ELBO (bits/dim)", 4)}
ROW_START = ("run", "decoder", "beta", "seed", "steps", "images")
COLUMNS = ("step", "neg_elbo", "distortion", "rate", "beta_kl", "beta")  # read from steps.csv
CURVES = ("(a) ELBO (nats)", "(b) log-likelihood (nats)", "(c) KL (nats)", "(d) β · KL (nats)")
STYLES = {
    "cnn": dict(label="CNN", color="#D55E00", marker="s", linestyle=(0, (4, 1.6))),
    "sdn": dict(label="SDN", color="#0072B2", marker="o", linestyle="-"),
}


@dataclass(frozen=True)
class Curves:
    """Learning curves of all runs, averaged over the same bins of steps.

    Attributes:
        steps: Middle of each bin, float64 [B].
        values: For each (beta, decoder), float64 [seeds, 4, B] in nats, as in `CURVES`; NaN: no
            steps or not finite.
        annealed: For each beta, the step from which on training used the whole of it; none where it
            did from the first.
    """

    steps: np.ndarray
    values: dict[tuple[float, str], np.ndarray]
    annealed: dict[float, int]

    def spread(self, beta: float, decoder: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (ddof 1) over the seeds that have the bin, [4, B] each; NaN
        if undefined."""
        values = np.ma.masked_invalid(self.values[beta, decoder])
        return values.mean(0).filled(np.nan), values.std(0, ddof=1).filled(np.nan)


def find_runs(output_dir: Path, name: str) -> list[Run]:
    """The experiment's runs, by β, decoder and seed.

    Raises:
        ConfigError: if there are none.
    """
    folders = [path.name for path in (output_dir / "checkpoints").glob("*/")]
    runs = [run for run in map(Run.parse, folders) if run and run.name == name]
    if not runs:
        pattern = output_dir / "checkpoints" / f"{name}_{{cnn,sdn}}_beta*_seed*"
        raise ConfigError(f"there are no runs {pattern}; `bash train_3dshapes.sh` makes runs")
    return sorted(runs, key=lambda run: (run.beta, run.decoder, run.seed))


def evaluated(run: Run, path: Path) -> dict[str, Any] | str:
    """The run's row of runs.csv, and the `levels` of its metrics; or why it has none.

    Raises:
        ConfigError: if results.json is damaged.
    """
    results = read_results(path)
    elbo, scored = results.get("elbo"), results.get("disentanglement")
    if elbo is None or scored is None:
        missing = "no disentanglement" if elbo else "no ELBO"
        return missing if elbo or scored else "not evaluated"
    try:
        for what in ("step", "weights"):
            one, other = elbo.get(what), scored.get(what)
            if one != other:
                return f"ELBO of {what} {one}, disentanglement of {what} {other}"
        bits, distortion, rate = (
            float(elbo[part]) for part in ("bits_per_dim", "distortion", "rate")
        )
        kl = rate * NATS_PER_BIT_PER_DIM
        return {
            "run": run.folder,
            "decoder": run.decoder,
            "beta": run.beta,
            "seed": run.seed,
            "steps": int(elbo["step"]),
            "images": int(elbo["images"]),
            "elbo": -bits * NATS_PER_BIT_PER_DIM,
            "log_likelihood": -distortion * NATS_PER_BIT_PER_DIM,
            "kl": kl,
            "beta_kl": run.beta * kl,
            "neg_elbo_bits_per_dim": bits,
            "levels": scored.get("levels"),
        } | {metric: float(found["score"]) for metric, found in scored["scores"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is damaged ({reason}): evaluate again") from None


def quantities(rows: Sequence[Row]) -> list[str]:
    """What the rows have, in the order of the columns; the paper's two metrics always."""
    scores = {key for row in rows for key in row} - {*QUANTITIES, *ROW_START, "levels"}
    scores |= {"beta_vae", "factor_vae"}
    known = [metric for metric in TITLES if metric in scores]
    return [*QUANTITIES, *known, *sorted(scores - set(TITLES))]


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of table.csv: for each β and decoder the number of seeds, and mean and deviation."""
    table = []
    for beta, decoder in sorted({(row["beta"], row["decoder"]) for row in rows}):
        members = [row for row in rows if (row["beta"], row["decoder"]) == (beta, decoder)]
        line = {"beta": beta, "decoder": decoder, "seeds": len(members)}
        table.append(line | over_seeds(members, quantities(rows)))
    return table


def markdown(table: Sequence[Row], names: Iterable[str]) -> str:
    """The table as Markdown: mean ± standard deviation, the mean alone where there is no
    deviation."""
    shown = {name: QUANTITIES.get(name, (TITLES.get(name, name), 3)) for name in names}
    lines = [["β", "decoder", "seeds", *(heading for heading, _ in shown.values())]]
    for line in table:
        cells = [mean_and_deviation(line, name, digits) for name, (_, digits) in shown.items()]
        start = [f"{line['beta']:g}", line["decoder"].upper(), str(line["seeds"])]
        lines.append([*start, *cells])
    return output.markdown(lines)


def read_steps(path: Path) -> np.ndarray:
    """The `COLUMNS` of steps.csv, float32 [6, steps]; no steps if there is no file. A last row
    without its end, which a kill leaves, is ignored.

    Raises:
        ConfigError: if the file is damaged otherwise.
    """
    try:
        text = path.read_bytes().decode() if path.is_file() else ""
        head, *lines = text.split("\n")[:-1] or [""]
        if lines and lines[-1].count(",") != head.count(","):
            lines.pop()
        if not lines:
            return np.empty((len(COLUMNS), 0), np.float32)
        columns = [head.split(",").index(name) for name in COLUMNS]
        options = dict(delimiter=",", ndmin=2, unpack=True, dtype=np.float32)
        values = np.loadtxt(lines, usecols=columns, **options)
        if values[0, 0] < 1 or (np.diff(values[0]) <= 0).any():
            raise ValueError("the steps do not rise from 1 on")
        return values
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"{path} is damaged ({str(error).splitlines()[0]}): move it away"
        ) from None


def learning_curves(logs: Mapping[Run, np.ndarray], bins: int = 200) -> Curves:
    """Learning curves of runs from their `read_steps`, each with one step at least; at most `bins`
    bins."""
    total = int(max(values[0, -1] for values in logs.values()))
    edges = np.unique(np.linspace(0, total, min(bins, total) + 1).round().astype(int))
    seeds, annealed = defaultdict(list), {}
    for run, (steps, neg_elbo, distortion, rate, beta_kl, beta) in logs.items():
        # Bin i has the steps edges[i] + 1 ... edges[i + 1].
        index = np.searchsorted(edges, steps) - 1
        counts = np.bincount(index, minlength=len(edges) - 1)
        parts = (-neg_elbo, -distortion, rate, beta_kl)
        sums = [np.bincount(index, part, len(counts)) for part in parts]
        means = np.stack(sums) / np.where(counts, counts, np.nan)
        seeds[run.beta, run.decoder].append(np.where(np.isfinite(means), means, np.nan))
        reached = beta >= run.beta * (1 - 1e-6)
        if reached.any() and not reached[0]:
            annealed[run.beta] = int(steps[reached.argmax()])
    values = {key: np.stack(curves) for key, curves in sorted(seeds.items())}
    return Curves((edges[:-1] + 1 + edges[1:]) / 2, values, annealed)


def draw_scores(rows: Sequence[Row], path: Path) -> None:
    """Figure 7: the two metrics against β, mean and standard deviation over seeds; each seed a
    faint dot."""
    betas = sorted({row["beta"] for row in rows})
    dots = dict(linestyle="", alpha=0.3, markersize=4, markeredgewidth=0, label=None)
    bars = dict(capsize=3, elinewidth=1.2, linewidth=1.8, markersize=6.5, zorder=3)
    with panels(path, 1, 2, size=(9.2, 3.9)) as (both,):
        both[0].set_ylabel("score (mean ± s.d. over seeds)")
        for axes, metric in zip(both, ("beta_vae", "factor_vae"), strict=True):
            for decoder, side in zip(DECODERS, (-1, 1), strict=True):
                scored = [row for row in rows if row["decoder"] == decoder and metric in row]
                places = [betas.index(row["beta"]) + 0.2 * side for row in scored]
                axes.plot(places, [row[metric] for row in scored], **STYLES[decoder] | dots)
                table = summarize(scored)
                places = [betas.index(line["beta"]) + 0.06 * side for line in table]
                means, deviations = (
                    [line[f"{metric}_{part}"] or 0 for line in table] for part in ("mean", "std")
                )
                axes.errorbar(places, means, deviations, **STYLES[decoder] | bars)
            axes.axhline(1 / 6, color="0.35", linewidth=1, linestyle=":", label="chance", zorder=1)
            ranges = dict(xlim=(-0.5, len(betas) - 0.5), ylim=(0, 1.05))
            axes.set(title=f"{TITLES[metric]} metric", xlabel="β", **ranges)
            axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])


def draw_curves(curves: Curves, path: Path) -> None:
    """Figure 12: a row of panels for each β; mean and standard deviation; dotted: the end of the
    annealing of β."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    x, betas = curves.steps, sorted({beta for beta, _ in curves.values})
    with panels(path, len(betas), len(CURVES), size=(11.5, 1.9 * len(betas) + 1)) as grid:
        for row, beta in zip(grid, betas, strict=True):
            decoders = [decoder for decoder in DECODERS if (beta, decoder) in curves.values]
            for column, axes in enumerate(row):
                for decoder in decoders:
                    style = STYLES[decoder] | dict(marker="", linewidth=1.6)
                    mean, std = (part[column] for part in curves.spread(beta, decoder))
                    axes.plot(x, mean, **style, zorder=3 if decoder == "cnn" else 2)
                    band = dict(color=style["color"], alpha=0.22, linewidth=0)
                    axes.fill_between(x, mean - std, mean + std, **band)
                shown = [curves.values[beta, decoder][:, column] for decoder in decoders]
                low, high = limits(np.concatenate(shown))
                axes.set(xlim=(0, x[-1] * 1.02), ylim=(0 if column == 3 else low, high))
                ticks = MaxNLocator(4, steps=[1, 2, 5, 10])
                axes.xaxis.set(major_locator=ticks, major_formatter=EngFormatter(sep=""))
                ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
                axes.yaxis.set(major_locator=ticks, major_formatter="{x:,.10g}")
            if beta in curves.annealed:
                end = curves.annealed[beta]
                row[2].axvline(end, color="0.35", linewidth=1, linestyle=":", zorder=1)
            row[0].set_ylabel(f"β = {beta:g}", fontsize=13, fontweight="bold", labelpad=8)
        for column, title in enumerate(CURVES):
            grid[0, column].set_title(title)
            grid[-1, column].set_xlabel("iterations")


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog=PROGRAM, description="Table 2 and Figures 7 and 12 of the disentanglement experiment."
    )
    parser.add_argument("--name", default="3dshapes", help="name of the experiment")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("."), help="where checkpoints/ and figs/ are"
    )
    parser.add_argument("--folder", type=Path, help="where to write; default: OUTPUT_DIR/figs/NAME")
    flags = parser.parse_args(arguments)
    with one_line_errors(PROGRAM, ConfigError, OSError):
        gather(flags.output_dir, flags.name, flags.folder or flags.output_dir / "figs" / flags.name)


def gather(output_dir: Path, name: str, folder: Path) -> None:
    """Reads the runs, says what is missing or differs, and writes tables and figures into the
    folder."""
    runs = find_runs(output_dir, name)
    found = {run: evaluated(run, output_dir / "figs" / run.folder / "results.json") for run in runs}
    logs = {run: read_steps(output_dir / "checkpoints" / run.folder / "steps.csv") for run in runs}
    without = [run.folder for run, values in logs.items() if not values.size]
    logs = {run: values for run, values in logs.items() if values.size}
    curves = learning_curves(logs) if logs else None
    rows = [result for result in found.values() if not isinstance(result, str)]
    names = quantities(rows)

    def note_runs(some: Sequence[str], total: int, what: str) -> None:
        if some:
            note(PROGRAM, f"{len(some)} of {total} runs {what}: {', '.join(some)}")

    left_out = [f"{run.folder} ({why})" for run, why in found.items() if isinstance(why, str)]
    note_runs(left_out, len(runs), "are left out of the table")
    for metric in names[len(QUANTITIES) :]:
        note_runs([row["run"] for row in rows if metric not in row], len(rows), f"have no {metric}")
    note_runs(without, len(runs), "have no learning curve in steps.csv")
    trained = {run.folder: int(values[0, -1]) for run, values in logs.items()}
    note_differences(PROGRAM, "the last step of training", trained)
    notes = {"step": "steps", "number of images": "images", "levels of the factors": "levels"}
    for what, column in notes.items():
        values = {row["run"]: row[column] for row in rows}
        note_differences(PROGRAM, f"the {what} evaluated", values)
    table = summarize(rows)
    text = markdown(table, names)
    columns = [f"{quantity}_{part}" for quantity in names for part in ("mean", "std")]
    write_csv(folder / "runs.csv", [*ROW_START, *names], rows)
    write_csv(folder / "table.csv", ["beta", "decoder", "seeds", *columns], table)
    write_text(folder / "table.md", text)
    written = ["runs.csv", "table.csv", "table.md"]
    if rows:
        draw_scores(rows, folder / "figure7.png")
        written.append("figure7.png")
    if curves:
        draw_curves(curves, folder / "figure12.png")
        written.append("figure12.png")
    print(text, *(folder / file for file in written), sep="\n")


if __name__ == "__main__":
    main()
