"""The flags of `train.py`: one for each field of `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from .cli import OneLineParser
from .config import TASK_DEFAULTS, TrainConfig, flag_default, flag_type
from .presets import PRESETS


def make_parser(description: str | None = None) -> OneLineParser:
    """A parser with the flags in the groups of their fields.

    It sets only the flags that are given: the defaults are the task's.
    """
    parser = OneLineParser("train.py", description=description)
    presets = "; ".join(f"{name}: {' '.join(as_flags(PRESETS[name]))}" for name in PRESETS)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=argparse.SUPPRESS,
        help="size of a density VAE for one's own images; flags that are given beside it win. "
        + presets,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        title, choices = field.metadata["group"], field.metadata["choices"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, is_list = flag_type(field.name)
        default = default_text(field)
        meaning = field.metadata["meaning"] + ("" if default == "off" else f" (default: {default})")
        options: dict[str, Any] = {"help": meaning, "default": argparse.SUPPRESS}
        if kind is bool:
            on_in_some = any(of.get(field.name) for of in TASK_DEFAULTS.values())
            options["action"] = argparse.BooleanOptionalAction if on_in_some else "store_true"
        else:
            metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
            options |= {"type": kind, "choices": choices, "metavar": metavar}
            if is_list:
                options["nargs"] = "*"
        groups[title].add_argument(f"--{field.name}", **options)
    return parser


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give fields these values."""
    words = []
    for name, value in values.items():
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def changed_flags(config: TrainConfig) -> list[str]:
    """The flags of `train.py` that differ from its defaults."""
    values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
    return as_flags({field.name: v for field, v in values.items() if v != flag_default(field)})


def default_text(field: dataclasses.Field) -> str:
    """The default of a flag as people read it, with those of other tasks."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, list):
            return " ".join(map(str, value))
        return "-" if value is None else str(value)

    others = [
        f"{task}: {text(of[field.name])}" for task, of in TASK_DEFAULTS.items() if field.name in of
    ]
    return "; ".join([text(flag_default(field)), *others])


def flag_table() -> str:
    """All flags as the Markdown table of the documentation, which
    `python -c "from lib.flags import flag_table; print(flag_table())"` prints."""
    lines = ["| flag | type | default | meaning |", "|---|---|---|---|"]
    group = None
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines.append(f"| **{group}** | | | |")
        kind, is_list = flag_type(field.name)
        if choices := field.metadata["choices"]:
            type_name = " \\| ".join(choices)
        else:
            type_name = "flag" if kind is bool else kind.__name__ + " ..." * is_list
        default, meaning = default_text(field), field.metadata["meaning"]
        lines.append(f"| `--{field.name}` | {type_name} | {default} | {meaning} |")
    return "\n".join(lines)
