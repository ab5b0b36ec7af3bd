"""One self-contained HTML page of what `evaluate.py` found: numbers, pictures, configuration,
versions, commands."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import whole_file
from ..optional import optional
from .registry import Evaluation, evaluations
from .tables import (
    FACTS,
    Table,
    as_bits,
    as_count,
    as_text,
    as_words,
    dimension_rates,
    layer_rates,
)

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
        ReportError: if a picture is missing, damaged or outside the folder, a value is of the
            wrong kind, or the page cannot be written.
    """
    jinja2 = optional("jinja2", "--report", "evaluate", ReportError)

    path = Path(path)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    settings = [(name, as_text(value, repr)) for name, value in config.items()]
    try:
        sections = _sections(results, path.parent)
        common, differing = _provenance(results, sections)
        page = template.render(
            title=title,
            summary=_summary(results),
            sections=sections,
            config=Table("", ["setting", "value"], settings),
            common=common,
            differing=differing,
            commands=_commands(results, sections),
        )
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ReportError(
            f"{path.parent / 'results.json'} holds values of the wrong kind ({error}): move it away"
        ) from None
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
            value = as_bits(entry["bits_per_dim"])
            value = (value, f"± {as_bits(error)}") if error is not None else value
            rows.append(
                (
                    evaluation.symbol,
                    value,
                    as_count(entry.get("images")),
                    as_count(entry.get("samples")),
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
        section.tables = _tables(entry, evaluation)
        section.pictures = [
            _picture(folder, picture, task) for picture in entry.get("pictures", ())
        ]
        sections.append(section)
    return sections


def _tables(entry: Mapping[str, Any], evaluation: Evaluation | None) -> list[Table]:
    """Everything in an evaluation's entry but its pictures and where it is from."""
    labels = FACTS | dict(evaluation.facts if evaluation else {})
    own = evaluation.tables if evaluation else {}
    facts, tables = [], []
    for key, value in entry.items():
        if (
            key in PROVENANCE
            or key in ("command", "pictures", "scale_per_layer")
            or key.startswith("share_per_")
        ):
            continue
        if key == "rate_per_layer":
            tables.append(layer_rates(value, entry.get("scale_per_layer")))
        elif key == "rate_per_dimension":
            tables.append(dimension_rates(value))
        elif key in own:
            tables.append(own[key](value))
        else:
            label, as_shown = labels.get(key, (as_words(key), as_text))
            facts.append((label, as_shown(value)))
    return [Table("", (), facts), *tables] if facts else tables


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
    except RuntimeError:  # what Python before 3.13 says of a loop
        raise ReportError(f"the picture {path} is a link to itself; {again}") from None
    size = content[16:24] if content.startswith(PNG_START) and content.endswith(PNG_END) else b""
    width, height = struct.unpack(">II", size) if len(size) == 8 else (0, 0)
    if not width * height:
        raise ReportError(f"the picture {path} is no PNG, or is cut off; {again}")
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
            shown = as_count if key == "step" else as_text
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
