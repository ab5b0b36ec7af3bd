"""Tables of the report, and how values are written in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A fact's label, and what makes a text of its value.
Facts = Mapping[str, tuple[str, Callable[[Any], str]]]


@dataclass
class Table:
    """Rows of text whose first cell is the row's heading; a cell is a text, or a text with a remark
    to it.

    bars: For each row the length of a bar behind it, in 0 ... 1; empty for a table without bars.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | tuple[str, str]]]
    bars: Sequence[float] = ()


def shares_of(rates: Sequence[float]) -> list[float]:
    """What each rate is of their total."""
    total = sum(rates)
    return [rate / total if total else 0.0 for rate in rates]


def layer_rates(rates: Sequence[float], scales: Sequence[Sequence[int]] | None) -> Table:
    """The rate of each layer, topmost first, as a number and as a share of the total; its height
    and width if known."""
    shares = shares_of(rates)
    columns = {
        "layer, from the top": [
            f"{i} (topmost)" if i == 1 else str(i) for i in range(1, len(rates) + 1)
        ],
        "scale": ["×".join(map(str, scale)) for scale in scales or ()],
        "bits/dim": [as_bits(rate) for rate in rates],
        "share": [f"{share:.1%}" for share in shares],
    }
    columns = {name: cells for name, cells in columns.items() if cells}
    return Table(
        "Rate of each layer", list(columns), list(zip(*columns.values(), strict=True)), shares
    )


def dimension_rates(rates: Sequence[float]) -> Table:
    """The rate of each latent dimension, as a number and as a share of the total."""
    shares = shares_of(rates)
    rows = [
        (f"z{i}", as_bits(rate), f"{share:.1%}")
        for i, (rate, share) in enumerate(zip(rates, shares, strict=True))
    ]
    return Table("Rate of each latent dimension", ("dimension", "bits/dim", "share"), rows, shares)


def as_text(value: Any, number: Callable[[float], str] = "{:.6g}".format) -> str:
    """Any value of JSON as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple) and not any(
        isinstance(item, list | tuple | dict) for item in value
    ):
        return ", ".join(as_text(item, number) for item in value) or "–"
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, list | tuple | dict)
        else str(value)
    )


def as_bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def as_error(value: float) -> str:
    return f"{value:.1f}"


def as_count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else as_text(value)


def as_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def as_words(value: str) -> str:
    return value.replace("_", " ")


# Of results that several evaluations have.
FACTS: Facts = {
    "bits_per_dim": ("bits/dim", as_bits),
    "standard_error": ("standard error over images", as_bits),
    "images": ("images", as_count),
    "seconds": ("time", as_duration),
    "temperatures": ("temperatures", as_text),
    "count": ("samples at each temperature", as_count),
    "output": ("pixels", as_words),
    "layers": ("top layers", as_text),
    "frames": ("images in a row", as_text),
}
