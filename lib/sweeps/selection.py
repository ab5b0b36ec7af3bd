"""Which backend computes a sweep: every candidate is checked, the right ones are measured, and the
fastest is remembered.

On first use for a device, types and number of channels a candidate is compared with the reference
(checking.py). One that differs or raises is struck out with a warning. Among the others
`backend="auto"` takes the one whose forward and backward sweep is fastest on maps of the size at
hand. The choice is kept in memory and in a file (:func:`cache_file`), and :func:`report` tells it.
Nothing is measured while a CUDA graph is being captured.

The environment variable SDN_BACKEND takes the place of "auto". On a CPU "auto" is the backend
`torch`, and nothing is measured.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import graphs
from .checking import backend_module, both, difference, example

CANDIDATES = ("cluster", "lines", "torch")  # unmeasured, the first that is right is taken
OVERRIDE = "SDN_BACKEND"
ON_CPU = ("cpu", "meta", "mps")  # devices where there is nothing to choose


@dataclass(frozen=True)
class Case:
    """What a choice depends on."""

    device: str  # its name and index
    features: torch.dtype
    products: torch.dtype
    num_lines: int
    num_positions: int
    images: int  # rounded up to a power of two
    channels: int

    @classmethod
    def of(cls, lines: Tensor, product_dtype: torch.dtype) -> Case:
        num_lines, num_positions, batch, channels = lines.shape
        images = 1 << max(0, batch - 1).bit_length()
        device = f"{device_name(lines.device)} {lines.device.index or 0}"
        dtypes = (lines.dtype, product_dtype)
        return cls(device, *dtypes, num_lines, num_positions, images, channels)

    def key(self) -> str:
        """Its name in the cache file, with the versions on which times depend."""
        types = f"{self.features} x {self.products}".replace("torch.", "")
        shape = f"{self.num_lines}x{self.num_positions}x{self.images}x{self.channels}"
        device = self.device.rsplit(" ", 1)[0]
        return f"{device} | {versions()} | {types} | {shape}"


@dataclass
class Choice:
    """The backend chosen for a case, and why."""

    backend: str
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)


_choices: dict[Case, Choice] = {}
_verdicts: dict[tuple, str | None] = {}  # why a candidate is struck out, None if it is right


def resolve(backend: str, lines: Tensor, product_dtype: torch.dtype) -> str:
    """The name of the candidate that computes a sweep.

    Arguments:
        backend: What was asked for; `"auto"` chooses.
        lines: The sweep's input [line, position, batch, channel].
        product_dtype: Type of the operands of its products.

    Raises:
        RuntimeError: if a backend that was asked for by name cannot run here.
        ValueError: if it does not support this device or type, or SDN_BACKEND names none.
    """
    if backend == "auto":
        backend = os.environ.get(OVERRIDE) or "auto"
        if backend not in ("auto", "reference", *CANDIDATES):
            raise ValueError(
                f"{OVERRIDE} must be auto, reference, {', '.join(CANDIDATES)}; got {backend!r}"
            )
    if backend in ("torch", "reference"):
        return backend
    if backend != "auto":
        if reason := backend_module(backend).unsupported(lines, product_dtype):
            raise RuntimeError(
                f"backend {backend!r} cannot run: {reason}; 'torch' and 'reference' can"
            )
        return backend
    if lines.device.type in ON_CPU or product_dtype == torch.float64:
        return "torch"
    case = Case.of(lines, product_dtype)
    if case not in _choices:
        choice = _choose(case, lines, product_dtype)
        if choice.reason == "inside a capture":
            return choice.backend  # to be chosen properly afterwards
        _choices[case] = choice
    return _choices[case].backend


def _choose(case: Case, lines: Tensor, product_dtype: torch.dtype) -> Choice:
    possible = [
        name
        for name in CANDIDATES
        if backend_module(name).unsupported(lines, product_dtype) is None
    ]
    if graphs.is_capturing(lines.device):
        known = (name for name in possible if _verdicts.get(_verdict_key(name, case), "") is None)
        return Choice(next(known, "torch"), "inside a capture")
    with torch.inference_mode(False), torch.no_grad():
        remembered = _read_cache().get(case.key())
        if isinstance(remembered, dict) and remembered.get("backend") in possible:
            name = remembered["backend"]
            if is_right(name, case, lines.device):
                return Choice(name, "measured before", remembered.get("milliseconds", {}))
        right = [name for name in possible if is_right(name, case, lines.device)]
        if not right:
            return Choice("reference", "no other backend agrees with it")
        if len(right) == 1:
            return Choice(right[0], "the only one that agrees with the reference")
        times = _measure(right, lines, product_dtype)
        if not times:
            return Choice(right[0], "there was no memory to measure")
        choice = Choice(min(times, key=times.__getitem__), "the fastest", times)
        _write_cache(case.key(), {"backend": choice.backend, "milliseconds": times})
        return choice


def _verdict_key(name: str, case: Case) -> tuple:
    return name, case.device, case.features, case.products, case.channels


def is_right(name: str, case: Case, device: torch.device) -> bool:
    """Whether a candidate agrees with the reference; if not, one warning says so."""
    key = _verdict_key(name, case)
    if key not in _verdicts:
        try:
            _verdicts[key] = difference(
                name, device, case.channels, features=case.features, products=case.products
            )
        except Exception as error:  # a compiler, a driver, a kernel: whatever fails, others remain
            _verdicts[key] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if _verdicts[key]:
            warnings.warn(
                f"sweeps do not use the backend {name!r} on {case.device}: {_verdicts[key]}",
                stacklevel=2,
            )
    return _verdicts[key] is None


def _measure(names: list[str], lines: Tensor, product_dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a forward and backward sweep on lines of that shape, by candidate."""
    times: dict[str, float] = {}
    channels = lines.shape[-1]
    try:
        tensors, _ = example((1, 1, 1), channels, lines.device)
        parameters = [tensor.float() for tensor in tensors[1:]]
        features = torch.empty_like(lines).uniform_(-1, 1, generator=_generator(lines.device))
        for name in names:
            module = backend_module(name)

            arguments = (module, features, parameters, features, product_dtype)
            options = dict(reverse=False, keep_first=False, keeps=not graphs.is_small(features))
            step = functools.partial(both, *arguments, **options)
            step()
            taken = [_seconds(step, lines.device) for _ in range(3)]
            times[name] = 1e3 * statistics.median(taken)
    except torch.OutOfMemoryError:
        return {}
    return times


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    function()
    torch.accelerator.synchronize(device)
    return time.perf_counter() - start


@functools.cache
def device_name(device: torch.device) -> str:
    """What a device calls itself: two of one name run at one speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


@functools.cache
def versions() -> str:
    """Driver, torch and Triton."""
    driver = "no driver"
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        driver = next(word for word in text.split() if word.count(".") >= 1 and word[0].isdigit())
    except (OSError, StopIteration):
        pass
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return f"driver {driver}, torch {torch.__version__}, triton {triton_version}"


def cache_file() -> Path | None:
    """Where choices are kept between processes: the file that SDN_CACHE names, or one in the user's
    cache folder. None without a home, or if SDN_CACHE is empty."""
    if "SDN_CACHE" in os.environ:
        return Path(os.environ["SDN_CACHE"]) if os.environ["SDN_CACHE"] else None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return Path(base) / "sdn" / "sweeps.json"


def _read_cache() -> dict[str, object]:
    """What earlier processes chose; nothing if the file is missing, unreadable or damaged."""
    path = cache_file()
    try:
        content = json.loads(path.read_text()) if path and path.is_file() else {}
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}


def _write_cache(key: str, value: dict[str, object]) -> None:
    """Adds a choice to the file; if it cannot be written, another process measures again."""
    path = cache_file()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(_read_cache() | {key: value}, file, indent=1)
        os.replace(partial, path)
    except OSError:
        pass


def choices() -> dict[str, dict[str, object]]:
    """The choices of this process, by case, as plain values: for a log, or for other processes."""
    return {
        case.key(): {"backend": choice.backend, "reason": choice.reason}
        | ({"milliseconds": choice.milliseconds} if choice.milliseconds else {})
        for case, choice in _choices.items()
    }


def shared_choices() -> list[tuple[Case, Choice]]:
    """The choices of this process in a form that :func:`adopt` takes in another."""
    return list(_choices.items())


def adopt(shared: list[tuple[Case, Choice]], device: torch.device) -> None:
    """Takes the choices of another process of the same run, so that all compute in the same way.

    Arguments:
        shared: What :func:`shared_choices` returned there.
        device: This process's device, in the place of the other's.
    """
    own = f"{device_name(device)} {device.index or 0}"
    for case, choice in shared:
        mine = Case(own, *(getattr(case, name) for name in list(case.__dataclass_fields__)[1:]))
        _choices[mine] = Choice(choice.backend, "as the first process", choice.milliseconds)


def report(device: torch.device | str | None = None) -> str:
    """What sweeps use and why, in lines of text: the candidates on a device, and this process's
    choices."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(default if device is None else device)
    text = [f"{device_name(device)}, {versions()}"]
    if override := os.environ.get(OVERRIDE):
        text.append(f"{OVERRIDE}={override} takes the place of 'auto'")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    lines = torch.empty(1, 1, 1, 8, device=device, dtype=dtype)
    for name in CANDIDATES:
        reason = backend_module(name).unsupported(lines, dtype)
        if reason is None:
            try:
                reason = difference(name, device, 8, features=dtype, products=dtype)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        text.append(f"{name}: {reason or 'agrees with the reference'}")
    for case, choice in _choices.items():
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in choice.milliseconds.items())
        text.append(
            f"{case.key()}: {choice.backend}, {choice.reason}" + f" ({times})" * bool(times)
        )
    return "\n".join(text)
