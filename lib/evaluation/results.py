"""The folder of one checkpoint's results, and its file of results, which evaluations add to."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..config import ConfigError
from ..files import LOCK, PARTIAL, locked, whole_file
from .registry import Context

OWNER = ".weights"  # the fingerprint of the weights whose results are in the folder
AT_WORK = ".at_work"  # ending of the names of locks, of which each evaluation holds one


def results_folder(figs: Path, name: str, fingerprint: str) -> Path:
    """The folder of a checkpoint's results: `figs/name`, or with the fingerprint behind the name if
    another checkpoint's results are there."""
    folder = figs / name
    owners = _owners(folder)
    return folder if owners <= {fingerprint} else figs / f"{name}-{fingerprint}"


@contextmanager
def own_folder(figs: Path, name: str, fingerprint: str) -> Iterator[Path]:
    """Makes the folder of a checkpoint's results and takes it for these weights.

    What a killed process left half-written there goes, if no other process is at work in it.

    Raises:
        ConfigError: if the folder cannot be written to.
    """
    with ExitStack() as at_work:
        while True:
            folder = results_folder(figs, name, fingerprint)
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise ConfigError(f"{folder} cannot be written to")
            with locked(folder / LOCK, "", wait=True):
                if _owners(folder) <= {fingerprint}:
                    (folder / OWNER).write_text(fingerprint)
                    if not any([_is_held(lock) for lock in folder.glob(f".*{AT_WORK}")]):
                        _remove_partial_files(folder)
                    own = folder / f".{secrets.token_hex(8)}{AT_WORK}"
                    at_work.enter_context(locked(own, ""))
                    break
        yield folder


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
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): move it away") from None
    if not isinstance(results, dict) or not all(
        isinstance(result, dict) for result in results.values()
    ):
        raise ConfigError(f"{path} is damaged (it holds no results): move it away")
    return results


def add_result(path: Path, task: str, result: dict[str, Any]) -> dict[str, Any]:
    """Adds a result to those that are kept, also to those of commands that run at the same time;
    all of them."""
    with locked(path.parent / LOCK, "", wait=True):
        results = read_results(path) | {task: result}
        with whole_file(path) as partial_file:
            partial_file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        return results


def _owners(folder: Path) -> set[str]:
    """Fingerprints of the weights whose results are in a folder; earlier versions named them in the
    results alone."""
    owner = folder / OWNER
    named = {owner.read_text()} if owner.is_file() else set()
    found = {
        str(result["weights"])
        for result in read_results(folder / "results.json").values()
        if "weights" in result
    }
    return found | (named - {""})


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock; that of one that died is removed."""
    try:
        with locked(lock, ""):
            return False
    except BlockingIOError:
        return True


def _remove_partial_files(folder: Path) -> None:
    """Removes what a killed evaluation left; not the images of a training that writes here, too."""
    for rest in folder.rglob(f"*{PARTIAL}"):
        if not rest.match("*_" + 7 * "[0-9]" + f".png.*{PARTIAL}"):
            rest.unlink(missing_ok=True)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
