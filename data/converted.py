"""Data sets that `python -m data.convert.images` made: folders with a dataset.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.files import read_json

from .errors import DataError

DESCRIPTION = "dataset.json"
FORMAT = 1
COMMAND = "python -m data.convert.images"


def converted_names(root: Path) -> list[str]:
    """Names of the data sets in the folder `root` that were converted."""
    return sorted(path.parent.name for path in root.glob(f"*/{DESCRIPTION}"))


def is_plain(name: str) -> bool:
    """Whether this is the name of a folder, not a path."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def read_description(root: Path, name: str) -> dict[str, Any] | None:
    """What dataset.json says of a data set, of which `shape` and `flip` are checked; None if there
    is none.

    Raises:
        DataError: if the file is damaged, or of a later version.
    """
    path = root / name / DESCRIPTION
    try:
        found = read_json(path)
        shape, flip, version = found["shape"], found["flip"], found["format"]
        channels, height, width = (int(side) for side in shape)
        if channels not in (1, 3) or min(height, width) < 1 or type(flip) is not bool:
            raise ValueError(f"the shape {shape} cannot be")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); make it again with: {COMMAND}"
        ) from None
    if version != FORMAT:
        raise DataError(f"{path} is of format {version}, this version reads {FORMAT}")
    return found
