"""What the programs that gather results share: means over seeds, tables, figures, and notes on what
does not go together."""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lib.config import ConfigError
from lib.files import whole_file
from lib.optional import optional

Row = Mapping[str, Any]


def over_seeds(rows: Sequence[Row], names: Iterable[str]) -> dict[str, Any]:
    """`NAME_mean`, `NAME_std` (ddof 1) and `NAME_n` of each name, over the rows that have a finite
    value; None stands for a mean of none and for a deviation of a single one."""
    line = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        values = [value for value in values if math.isfinite(value)]
        line[f"{name}_mean"] = statistics.fmean(values) if values else None
        line[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        line[f"{name}_n"] = len(values)
    return line


def mean_and_deviation(line: Row, name: str, decimals: int) -> str:
    """A cell of a table: mean ± standard deviation, the mean alone where there is no deviation."""
    mean, deviation = line[f"{name}_mean"], line[f"{name}_std"]
    cell = "-" if mean is None else f"{mean:.{decimals}f}".replace("-", "−")
    return cell if deviation is None else f"{cell} ± {deviation:.{decimals}f}"


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; the first line is the heading."""
    heading, *rows = lines
    rows = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text)


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Row]) -> None:
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def limits(values: np.ndarray) -> tuple[float, float]:
    """Limits of a y axis for curves [curves, B]: percentiles 1 and 99 of their values and a margin
    of 12%.

    The first twentieth of the bins is left out: -ELBO starts at 60,000 nats where training ends at
    10,000.
    """
    later = values[:, values.shape[1] // 20 :]
    later = later[np.isfinite(later)]
    low, high = np.percentile(later, [1, 99]) if later.size else (0, 0)
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


@contextmanager
def panels(
    path: Path, rows: int, columns: int, *, size: tuple[float, float], **options: Any
) -> Iterator[np.ndarray]:
    """Axes [rows, columns] of a figure of `size` inches, which is written at the end, with a legend
    above. Options are `sharex`, and `legend_columns`, by default 3."""
    optional("matplotlib", "a plot", "evaluate", ConfigError)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, named = Figure(figsize=size, layout="constrained"), {}
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, squeeze=False, sharex=options.get("sharex", "col"))
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8, zorder=0)
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    labels, handles = zip(*sorted(named.items()), strict=True)
    style = dict(loc="outside upper center", handlelength=3, frameon=False)
    figure.legend(handles, labels, ncols=options.get("legend_columns", 3), **style)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=160, metadata={"Software": None})


def note(program: str, text: str) -> None:
    """One line on stderr."""
    print(f"{program}: note: {text}", file=sys.stderr)


def note_differences(program: str, what: str, by_run: Mapping[str, Any]) -> None:
    """Notes which values the runs have, if it is more than one; up to three runs of each."""
    runs = defaultdict(list)
    for run, value in by_run.items():
        runs[str(value)].append(run)
    if len(runs) > 1:
        some = (
            f"{value}: {', '.join(r[:3])}{f' and {len(r) - 3} more' if r[3:] else ''}"
            for value, r in runs.items()
        )
        note(program, f"the runs differ in {what}: {'; '.join(some)}")
