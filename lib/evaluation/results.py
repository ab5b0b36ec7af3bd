"""The folder of one checkpoint's results, and its file of results, which evaluations add to."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError
from ..files import LOCK, PARTIAL, locked, read_json, set_aside, whole_file
from .registry import Context

OWNER = ".weights"  # the fingerprint of the weights whose results are in the folder
ABANDONED = 24 * 3600  # seconds after which nobody is still writing a half-written file


def results_folder(figs: Path, name: str, fingerprint: str) -> Path:
    """The folder of a checkpoint's results: `figs/name`, or with the fingerprint behind the name if
    another checkpoint's results are there."""
    folder = figs / name
    owners = _owners(folder)
    return folder if owners <= {fingerprint} else figs / f"{name}-{fingerprint}"


def own_folder(figs: Path, name: str, fingerprint: str) -> Path:
    """Makes the folder of a checkpoint's results and takes it for these weights.

    What killed processes left half-written there goes after a day.

    Raises:
        ConfigError: if the folder cannot be written to.
    """
    while True:
        folder = results_folder(figs, name, fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"{folder} cannot be written to")
        with locked(folder / LOCK, "", wait=True):
            if _owners(folder) <= {fingerprint}:
                (folder / OWNER).write_text(fingerprint)
                break
    for rest in folder.rglob(f"*{PARTIAL}"):
        with suppress(FileNotFoundError):  # another process has finished it
            if time.time() - rest.lstat().st_mtime > ABANDONED:
                rest.unlink()
    return folder


def provenance(context: Context, checkpoint: Path, command: str) -> dict[str, Any]:
    """Where results are from."""
    device = context.model.device
    return {
        "checkpoint": checkpoint.name,
        "weights": context.loaded.fingerprint,
        "step": context.loaded.step,
        "dataset": context.loaded.config.dataset,
        "seed": context.flags.seed,
        "batch": context.flags.batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def read_results(path: Path) -> dict[str, Any]:
    """What earlier evaluations under this name found."""
    try:
        results = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): move it away") from None
    if not isinstance(results, dict) or not all(
        isinstance(result, dict) for result in results.values()
    ):
        raise ConfigError(f"{path} is damaged (it holds no results): move it away")
    return results


def add_result(path: Path, task: str, result: dict[str, Any]) -> None:
    """Adds a result to those that are kept, also to those of commands that run at the same time.

    A file of results that was damaged since the command began is set aside.

    Raises:
        ConfigError: if the result holds a number that is not finite.
    """
    try:
        json.dumps(result, allow_nan=False)
    except ValueError:
        raise ConfigError(
            f"--{task}: the result holds numbers that are not finite: did training diverge?"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / LOCK, "", wait=True):
        try:
            results = read_results(path)
        except ConfigError:
            print(f"note: {path} was damaged; it is now {set_aside(path)}", file=sys.stderr)
            results = {}
        results[task] = result
        with whole_file(path) as partial_file:
            partial_file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


def _owners(folder: Path) -> set[str]:
    """Fingerprints of the weights whose results are in a folder; earlier versions named them in the
    results alone."""
    owner = folder / OWNER
    if os.path.lexists(owner) and not owner.is_file():
        raise ConfigError(f"{owner} is not a file: move it away")
    named = {owner.read_text(errors="replace")} if owner.exists() else set()
    found = {
        str(result["weights"])
        for result in read_results(folder / "results.json").values()
        if "weights" in result
    }
    return found | (named - {""})
