"""One self-contained HTML page of what `evaluate.py` found: numbers, pictures, configuration,
versions, commands."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..DisentanglementVAE.metrics import TITLES
from ..files import whole_file
from .registry import evaluations

PROVENANCE = {
    "dataset": "data set",
    "checkpoint": "checkpoint",
    "step": "optimizer steps",
    "weights": "weights' fingerprint",
    "seed": "seed",
    "batch": "batch size",
    "device": "device",
    "torch": "PyTorch",
    "python": "Python",
    "date": "date",
}
ANCHORS = ("summary", "configuration", "versions", "commands")
ENLARGED_WIDTH = (
    320  # pixels; a narrower picture is shown at the largest multiple of its size that is not wider
)
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class ReportError(Exception):
    """A report that cannot be written; the message is one line that names the file."""


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


@dataclass
class Picture:
    """A PNG as a data: URI, with the size in CSS pixels at which it is shown."""

    source: str
    width: int
    height: int
    enlarged: bool
    caption: str


@dataclass
class Section:
    anchor: str
    title: str
    paper: str
    explanation: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
) -> Path:
    """Writes the page, which then needs no other file and no network; an old page is replaced as a
    whole or not at all.

    Arguments:
        path: Of the page. The results' pictures are relative to its folder.
        title: Heading of the page.
        results: What each task found, as in `results.json`, in the order of the page. Tasks and
            entries that are not known here are shown under their own names.
        config: Of the run.

    Raises:
        ReportError: if a picture is missing or damaged, or the page cannot be written.
    """
    import jinja2

    path = Path(path)
    sections = _sections(results, path.parent)
    common, differing = _provenance(results, sections)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        summary=_summary(results),
        sections=sections,
        config=Table(
            "",
            ["setting", "value"],
            [(name, _shown(value, repr)) for name, value in config.items()],
        ),
        common=common,
        differing=differing,
        commands=_commands(results, sections),
    )
    try:
        with whole_file(path) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}") from None
    return path


def _summary(results: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """The main numbers; None if there are none."""
    rows = []
    for task, evaluation in evaluations().items():
        entry = results.get(task, {})
        if evaluation.symbol and "bits_per_dim" in entry:
            error = entry.get("standard_error")
            value = _bits(entry["bits_per_dim"])
            value = (value, f"± {_bits(error)}") if error is not None else value
            rows.append(
                (
                    evaluation.symbol,
                    value,
                    _count(entry.get("images")),
                    _count(entry.get("samples")),
                )
            )
    head = ("quantity", "bits/dim ± standard error", "images", "importance samples")
    return Table("", head, rows) if rows else None


def _sections(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Section]:
    sections, anchors, known = [], set(ANCHORS), evaluations()
    for task, entry in results.items():
        anchor = re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-") or "result"
        while anchor in anchors:
            anchor += "-result"
        anchors.add(anchor)
        name = task.replace("_", " ").capitalize()
        evaluation = known.get(task)
        section = Section(anchor, name, "", "")
        if evaluation:
            section = Section(anchor, evaluation.title, evaluation.paper, evaluation.explanation)
        section.tables = _tables(entry)
        section.pictures = [
            _picture(folder, picture, task) for picture in entry.get("pictures", ())
        ]
        sections.append(section)
    return sections


def _tables(entry: Mapping[str, Any]) -> list[Table]:
    """Everything in a task's entry but its pictures and where it is from."""
    facts, tables = [], []
    for key, value in entry.items():
        if (
            key in PROVENANCE
            or key in ("command", "pictures", "scale_per_layer")
            or key.startswith("share_per_")
        ):
            continue
        if key == "rate_per_layer":
            tables.append(
                _layers(value, entry.get("share_per_layer"), entry.get("scale_per_layer"))
            )
        elif key == "rate_per_dimension":
            tables.append(_dimensions(value))
        elif key == "scores":
            tables.append(_scores(value))
        elif key == "neighbours":
            tables.append(_neighbours(value))
        else:
            label, shown = FACTS.get(key, (key.replace("_", " "), _shown))
            facts.append((label, shown(value)))
    return [Table("", (), facts), *tables] if facts else tables


def _layers(
    rates: Sequence[float], shares: Sequence[float] | None, scales: Sequence[Sequence[int]] | None
) -> Table:
    """The rate of each layer, topmost first, as a number and as a share of the total; its height
    and width if known."""
    total = sum(rates)
    shares = shares or [rate / total if total else 0.0 for rate in rates]
    columns = {
        "layer, from the top": [
            f"{i} (topmost)" if i == 1 else str(i) for i in range(1, len(rates) + 1)
        ],
        "scale": ["×".join(map(str, scale)) for scale in scales or ()],
        "bits/dim": [_bits(rate) for rate in rates],
        "share": [f"{share:.1%}" for share in shares],
    }
    columns = {name: cells for name, cells in columns.items() if cells}
    return Table(
        "Rate of each layer", list(columns), list(zip(*columns.values(), strict=True)), shares
    )


def _dimensions(rates: Sequence[float]) -> Table:
    """The rate of each latent dimension, as a number and as a share of the total."""
    total = sum(rates)
    shares = [rate / total if total else 0.0 for rate in rates]
    rows = [
        (f"z{i}", _bits(rate), f"{share:.1%}")
        for i, (rate, share) in enumerate(zip(rates, shares, strict=True))
    ]
    return Table("Rate of each latent dimension", ("dimension", "bits/dim", "share"), rows, shares)


def _scores(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each metric: its score, and what else it found."""
    rows = []
    for name, values in metrics.items():
        others = ", ".join(
            f"{_words(key)} {_shown(value)}" for key, value in values.items() if key != "score"
        )
        score = _bits(values.get("score"))
        rows.append((TITLES.get(name, name), (score, others) if others else score))
    return Table("Scores", ("metric", "score"), rows)


def _neighbours(queries: Sequence[Sequence[Mapping[str, Any]]]) -> Table:
    ranks = range(1, max(map(len, queries), default=0) + 1)
    rows = []
    for number, neighbours in enumerate(queries, 1):
        cells = [
            (str(n["index"]), _error(n["mse"]) + (", mirrored" if n["mirrored"] else ""))
            for n in neighbours
        ]
        rows.append([str(number), *cells, *[""] * (len(ranks) - len(cells))])
    head = ["query", *("nearest" if rank == 1 else f"number {rank}" for rank in ranks)]
    return Table("Index of each training image, and mean squared error", head, rows)


def _picture(folder: Path, picture: Mapping[str, str], task: str) -> Picture:
    if not isinstance(picture, Mapping) or "file" not in picture:
        raise ReportError(
            f"the results of {task} name a picture without a file; evaluate.py --{task} makes them "
            "again"
        )
    path = folder / str(picture["file"])
    again = f"evaluate.py --{task} makes it again"
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ReportError(f"the results of {task} name a picture outside {folder}: {path}")
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ReportError(f"the picture {path} is not a file; {again}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ReportError(f"the picture {path} is missing; {again}") from None
    except OSError as error:
        raise ReportError(f"cannot read the picture {path}: {error.strerror}") from None
    if not (content.startswith(PNG_START) and content.endswith(PNG_END)):
        raise ReportError(f"the picture {path} is no PNG, or is cut off; {again}")
    width, height = struct.unpack(">II", content[16:24])
    enlarge = max(1, ENLARGED_WIDTH // width)
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    return Picture(
        source, width * enlarge, height * enlarge, enlarge > 1, picture.get("caption", "")
    )


def _provenance(
    results: Mapping[str, Mapping[str, Any]], sections: Sequence[Section]
) -> tuple[Table | None, Table | None]:
    """Where the results are from: what all of them share, and what differs from one to another."""
    values = {}
    for key, label in PROVENANCE.items():
        if any(key in entry for entry in results.values()):
            shown = _count if key == "step" else _shown
            values[label] = [shown(entry.get(key)) for entry in results.values()]
    shared = {label: texts[0] for label, texts in values.items() if len(set(texts)) == 1}
    different = {label: texts for label, texts in values.items() if label not in shared}
    rows = [
        (section.title, *texts)
        for section, *texts in zip(sections, *different.values(), strict=True)
    ]
    return (
        Table("", (), list(shared.items())) if shared else None,
        Table("", ("result", *different), rows) if different else None,
    )


def _commands(
    results: Mapping[str, Mapping[str, Any]], sections: Sequence[Section]
) -> list[tuple[str, list[Section]]]:
    """Each command once, with the sections that it made."""
    made: dict[str, list[Section]] = {}
    for entry, section in zip(results.values(), sections, strict=True):
        if "command" in entry:
            made.setdefault(entry["command"], []).append(section)
    return list(made.items())


def _shown(value: Any, number: Callable[[float], str] = "{:.6g}".format) -> str:
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
        return ", ".join(_shown(item, number) for item in value) or "–"
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, list | tuple | dict)
        else str(value)
    )


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _error(value: float) -> str:
    return f"{value:.1f}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _shown(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _words(value: str) -> str:
    return value.replace("_", " ")


# label and format of what is known of the tasks' entries
FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bits_per_dim": ("bits/dim", _bits),
    "standard_error": ("standard error over images", _bits),
    "nats": ("nats for each image", _error),
    "levels": ("levels of each factor", _shown),
    "seconds_per_metric": (
        "seconds",
        lambda times: ", ".join(f"{_words(k)} {v:g}" for k, v in times.items()),
    ),
    "distortion": ("distortion, bits/dim", _bits),
    "rate": ("rate, bits/dim", _bits),
    "images": ("images", _count),
    "samples": ("importance samples for each image", _count),
    "computed": ("images computed by this command", _count),
    "chunk": ("samples computed at a time", _count),
    "seconds": ("time", _duration),
    "temperatures": ("temperatures", _shown),
    "count": ("samples at each temperature", _count),
    "output": ("pixels", _words),
    "layers": ("top layers", _shown),
    "frames": ("images in a row", _shown),
    "nbits": ("bits of the model's images", _count),
    "mse": ("mean squared error to the images in the model's bits, levels 0 to 255", _error),
    "mse_8_bits": ("mean squared error to the 8-bit originals, levels 0 to 255", _error),
    "searched": ("training images searched", _count),
    "mirrored_too": ("compared with their mirror images, too", _shown),
    "nearest_mse": ("smallest mean squared error, levels 0 to 255", _error),
    "median_mse": ("median of the nearest images' errors", _error),
}
