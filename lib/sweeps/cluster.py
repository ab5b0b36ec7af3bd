"""Compiles, loads and launches the kernels of cluster.cu, with NVRTC and the driver by ctypes.

Both libraries are there wherever torch runs on a CUDA device: NVRTC comes with torch. A kernel is
compiled for its constants and an architecture, which takes seconds, and kept for the process.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

THREADS = 256
SOURCE = Path(__file__).with_name("cluster.cu")
# Numbers of the driver's interface, cuda.h.
DYNAMIC_SHARED_MEMORY, LARGE_CLUSTERS = 8, 14  # CUfunction_attribute
SHARED_MEMORY_OF_A_BLOCK = 97  # CUdevice_attribute
PORTABLE_CLUSTER = 8  # blocks; larger clusters must be asked for


class Constants(NamedTuple):
    """What a kernel is compiled for, see the beginning of cluster.cu."""

    C: int
    CLUSTER: int
    UNITS: int
    GROUPS: int
    FLOAT16: bool
    FEATURES: int
    KEEPS: bool
    BACKWARD: bool

    def definitions(self) -> list[str]:
        return [f"-D{name}={int(value)}" for name, value in self._asdict().items()]

    def widths(self) -> set[int]:
        """Columns / 8 of the products of each warpgroup."""
        if self.BACKWARD:
            first = (self.CLUSTER + 1) // 2 if self.GROUPS == 2 else self.CLUSTER
            units = min(first * self.UNITS, self.C // 8)
            return {units, self.C // 8 - units} - {0}
        first = (self.UNITS + 1) // 2 if self.GROUPS == 2 else self.UNITS
        return {3 * first, 3 * (self.UNITS - first)} - {0}


class ForwardArguments(ctypes.Structure):
    """The argument of the forward kernel."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "lines corrected own coefficients".split()),
        *((name, ctypes.c_void_p) for name in "weight bias".split()),
        *((f"{name}_stride", ctypes.c_longlong) for name in "line position image".split()),
        *((name, ctypes.c_int) for name in "num_lines num_positions batch images".split()),
        *((name, ctypes.c_int) for name in "first step block_start continues keep_first".split()),
    ]


class BackwardArguments(ctypes.Structure):
    """The argument of the backward kernel."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "grad_corrected grad_lines coefficients".split()),
        *((name, ctypes.c_void_p) for name in "gates next_gates weight".split()),
        *((f"{name}_stride", ctypes.c_longlong) for name in "line position image".split()),
        *((name, ctypes.c_int) for name in "num_lines num_positions batch images".split()),
        *((name, ctypes.c_int) for name in "first step block_start sums_offset".split()),
    ]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


class Kernel:
    """A kernel on a device, with all the shared memory that it can have.

    Attributes:
        active: How many clusters run at the same time.
    """

    def __init__(self, code: bytes, cluster: int, shared_bytes: int):
        driver = _driver()
        self._code = code  # the module may refer to it
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), code))
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, b"sweep_kernel"))
        self._set(DYNAMIC_SHARED_MEMORY, shared_bytes)
        if cluster > PORTABLE_CLUSTER:
            self._set(LARGE_CLUSTERS, 1)
        config = LaunchConfig(cluster, 1, 1, THREADS, 1, 1, shared_bytes, None, None, 0)
        active = ctypes.c_int()
        occupancy = driver.cuOccupancyMaxActiveClusters
        _check(occupancy(ctypes.byref(active), self._function, ctypes.byref(config)))
        self.active = active.value

    def _set(self, attribute: int, value: int) -> None:
        _check(_driver().cuFuncSetAttribute(self._function, attribute, value))

    def launch(self, arguments: ctypes.Structure, num_blocks: int, shared_bytes: int) -> None:
        """Runs it on torch's current stream."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        sizes = (num_blocks, 1, 1, THREADS, 1, 1, shared_bytes)
        _check(_driver().cuLaunchKernel(self._function, *sizes, stream, pointers, None))


_kernels: dict[tuple[int, Constants], Kernel] = {}
_lock = threading.Lock()


def load(device: torch.device, constants: Constants) -> Kernel:
    """The kernel for some constants on a device, which is the current one.

    Raises:
        RuntimeError: if it had to be compiled while a CUDA graph is being captured, or if the
            compiler or the driver fails.
    """
    key = (torch.cuda.current_device() if device.index is None else device.index, constants)
    with _lock:
        if key not in _kernels:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a kernel of the sweep would be compiled inside the capture of a CUDA graph: "
                    "run the sweep once before"
                )
            code = compiled(constants, architecture(device))
            _kernels[key] = Kernel(code, constants.CLUSTER, shared_memory(device))
        return _kernels[key]


@functools.cache
def shared_memory(device: torch.device) -> int:
    """The bytes of shared memory that a block can have."""
    index = torch.cuda.current_device() if device.index is None else device.index
    value, handle = ctypes.c_int(), ctypes.c_int()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), index))
    get = _driver().cuDeviceGetAttribute
    _check(get(ctypes.byref(value), SHARED_MEMORY_OF_A_BLOCK, handle))
    return value.value


def architecture(device: torch.device) -> str:
    """What kernels are compiled for; only Hopper's has wgmma."""
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def compiled(constants: Constants, architecture: str) -> bytes:
    """Machine code for an architecture.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    nvrtc = _nvrtc()
    wgmma = architecture == "sm_90a"
    options = ["-std=c++17", "-default-device", f"--gpu-architecture={architecture}"]
    options += [*constants.definitions(), f"-DWGMMA={int(wgmma)}"]
    text = source(constants, wgmma).encode()
    program = ctypes.c_void_p()
    create, name = nvrtc.nvrtcCreateProgram, b"cluster.cu"
    if create(ctypes.byref(program), text, name, 0, None, None):
        raise RuntimeError("NVRTC cannot create a program")
    try:
        encoded = [option.encode() for option in options]
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        failed = nvrtc.nvrtcCompileProgram(program, len(encoded), array)
        size = ctypes.c_size_t()
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC cannot compile cluster.cu: {log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def source(constants: Constants, wgmma: bool) -> str:
    """The text of a kernel: cluster.cu, after functions for wgmma's products, whose number of
    operands depends on their width."""
    text = []
    if wgmma:
        text.append("template <int MATRICES> struct Wgmma;")
        kind = "f16" if constants.FLOAT16 else "bf16"
        text.extend(_product(width, kind) for width in sorted(constants.widths()))
    return "\n".join([*text, SOURCE.read_text()])


def _product(width: int, kind: str) -> str:
    """Of 64 rows, whose 16 terms are in registers, and 8 `width` columns in shared memory."""
    count = 4 * width
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
template <> struct Wgmma<{width}> {{
    static __device__ __forceinline__ void run(
        float (&d)[{count}], const unsigned* a, unsigned long long descriptor) {{
        asm volatile("wgmma.mma_async.sync.aligned.m64n{8 * width}k16.f32.{kind}.{kind} "
                     "{{{sums}}}, {{{a}}}, %{count + 4}, 1, 1, 1, 0;"
                     : {outputs} : {inputs}, "l"(descriptor));
    }}
}};"""


def missing() -> str | None:
    """What kernels cannot be compiled or loaded without, or None."""
    for library, what in ((_nvrtc, "NVRTC"), (_driver, "the driver")):
        try:
            library()
        except OSError as error:
            return f"there is no library of {what}: {error}"
    if not hasattr(_driver(), "cuOccupancyMaxActiveClusters"):
        return "the driver knows no clusters"
    return None


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    return _first_library(_nvrtc_paths())


def _nvrtc_paths() -> Iterator[str]:
    """NVRTC beside torch in its wheels, or where the system looks for it."""
    for folder in sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib")):
        yield from map(str, sorted(folder.glob("libnvrtc.so.*")))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@functools.cache
def _driver() -> ctypes.CDLL:
    return _first_library(iter(("libcuda.so.1", "libcuda.so")))


def _first_library(names: Iterator[str]) -> ctypes.CDLL:
    reason = OSError("no such library")
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reason = error
    raise reason


def _check(status: int) -> None:
    """Raises a RuntimeError if the driver reports one."""
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"the driver reports: {(text.value or b'error').decode()} ({status})")
