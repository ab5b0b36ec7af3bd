"""The file of results of one model, which evaluations add to one by one."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..files import whole_file


def read_results(path: Path) -> dict[str, Any]:
    """What earlier evaluations under this name found."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): move it away") from None
    if not isinstance(results, dict) or not all(
        isinstance(result, dict) for result in results.values()
    ):
        raise ConfigError(f"{path} is damaged (it holds no results): move it away")
    return results


def add_result(path: Path, task: str, result: dict[str, Any]) -> dict[str, Any]:
    """Adds a result to those that are kept, also to those of commands that run at the same time;
    all of them."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = read_results(path) | {task: result}
        with whole_file(path) as partial_file:
            partial_file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        return results
    finally:
        os.close(folder)
