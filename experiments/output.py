"""What the programs that gather results share: CSV files, figures, and notes on what does not go
together."""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lib.files import whole_file


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def mean_and_deviation(mean: float | None, deviation: float | None, decimals: int) -> str:
    """A cell of a table: mean ± standard deviation, the mean alone where there is no deviation."""
    cell = "-" if mean is None else f"{mean:.{decimals}f}".replace("-", "−")
    return cell if deviation is None else f"{cell} ± {deviation:.{decimals}f}"


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; the first line is the heading."""
    heading, *rows = lines
    return "".join(
        f"| {' | '.join(cells)} |\n" for cells in (heading, ["---"] * len(heading), *rows)
    )


def limits(values: np.ndarray) -> tuple[float, float]:
    """Limits of a y axis for curves [curves, B]: percentiles 1 and 99 of their values and a margin
    of 12%.

    Without the first twentieth of the bins: -ELBO starts at 60,000 nats where training ends at
        10,000.
    """
    later = values[:, values.shape[1] // 20 :]
    later = later[np.isfinite(later)]
    low, high = np.percentile(later, [1, 99]) if later.size else (0, 0)
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


@contextmanager
def panels(
    path: Path,
    rows: int,
    columns: int,
    *,
    size: tuple[float, float],
    sharex: str = "col",
    legend_columns: int = 3,
) -> Iterator[np.ndarray]:
    """Axes [rows, columns] of a figure of `size` inches, which is written at the end, with a legend
    above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, named = Figure(figsize=size, layout="constrained"), {}
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, squeeze=False, sharex=sharex)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8, zorder=0)
        named |= {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    labels, handles = zip(*sorted(named.items()), strict=True)
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=legend_columns,
        handlelength=3,
        frameon=False,
    )
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=160, metadata={"Software": None})


def note_differences(program: str, what: str, by_run: Mapping[str, Any]) -> None:
    """One line on stderr that says which values the runs have, if it is more than one; up to three
    runs of each."""
    runs = defaultdict(list)
    for run, value in by_run.items():
        runs[str(value)].append(run)
    if len(runs) > 1:
        some = (
            f"{value}: {', '.join(r[:3])}{f' and {len(r) - 3} more' if r[3:] else ''}"
            for value, r in runs.items()
        )
        print(f"{program}: note: the runs differ in {what}: {'; '.join(some)}", file=sys.stderr)
