"""What Triton needs on a machine, looked for before it is tried: it compiles a launcher in C for
each kernel at run time, and fails in the middle of a sweep where it cannot."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch


@functools.cache
def why_no_triton(device: torch.device) -> str | None:
    """What Triton lacks for a device, or None if kernels can be compiled for it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # the interpreter runs kernels anywhere, and compiles nothing
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device, got {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or shutil.which(compiler) is None:
        return f"Triton {triton.__version__} needs a C compiler, and there is none"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Triton {triton.__version__} needs Python's headers, and there is no {header}"
    return None
