"""What the benchmarks share: the machine and its versions, taking turns, peak memory, the file with
the results."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def machine(device: str) -> dict:
    """Names of processor and GPU, number of cores, load average."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "load_average_at_start": load}


def stamp(
    name: str, arguments: list[str] | None, device: str, packages: tuple[str, ...] = ()
) -> dict:
    """What a file of results begins with: date, machine, versions, threads and the command
    `benchmarks.<name> ...`, or of another module whose whole name is given."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "command": shlex.join(
            [
                "python",
                "-m",
                name if "." in name else f"benchmarks.{name}",
                *(sys.argv[1:] if arguments is None else arguments),
            ]
        ),
    }


def write(result: dict, output: Path | None) -> None:
    """Writes a JSON file, if there is to be one."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; `columns` maps keys to the formats of their numbers, and None is
    left empty."""
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        cells = [
            "" if row[key] is None else format(row[key], form) for key, form in columns.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds(run: Callable[[], object], device: str) -> float:
    """How long a call takes, with what it starts on a GPU."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each contender in rounds in which all take a turn, after one that is not
    counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            taken = seconds(run, device)
            if turn > 0:
                times[name].append(taken)
    return times


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """Peak of a call in MiB beyond what exists before it: of CUDA's allocator, or of this process's
    resident set, which includes what libraries use for themselves (Linux only, else None; to be
    taken in a fresh process)."""
    if device.startswith("cuda"):
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # sets the recorded peak to the present size
    before = resident_peak()
    run()
    return resident_peak() - before


def resident_peak() -> float:
    """Peak resident set of this process in MiB since it was last reset (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 convolutions and products in float32: by default those of cuDNN round their operands
    to 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def relative_error(computed: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    difference = (computed.detach().double() - expected.detach().double()).norm()
    return (difference / expected.detach().double().norm().clamp(min=1e-30)).item()
