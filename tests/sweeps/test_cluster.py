"""The kernels of the backend `cluster`, on a CPU: emulated they agree with the reference, output
and every gradient, and NVRTC compiles them.

The emulation (cuda_emulator.h) runs the source of the kernels, with products in both forms. Threads
run in several orders; that results are equal bit for bit shows that none depends on the order.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from lib.sweeps import checking, cluster, cluster_backend
from lib.sweeps.cluster_backend import Limits

HOPPER = Limits(shared_bytes=227 * 1024, multiprocessors=132, largest_cluster=16)
LIMITS = {
    "H100": HOPPER,
    "B200": Limits(227 * 1024, 148, 16),
    "RTX 5090": Limits(99 * 1024, 170, 8),
}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


class Emulated:
    """A kernel that runs on the CPU, in the place of `cluster.Kernel`."""

    seed = 0
    wgmma = True
    active = 2  # few clusters: each has images several times
    folder: Path

    def __init__(self, constants: cluster.Constants):
        self.library = _library(self.folder, constants, self.wgmma)

    def launch(self, arguments: ctypes.Structure, num_blocks: int, shared_bytes: int) -> None:
        assert self.library.arguments_size() == ctypes.sizeof(arguments)
        self.library.launch(ctypes.byref(arguments), num_blocks, shared_bytes, self.seed)


@functools.cache
def _library(folder: Path, constants: cluster.Constants, wgmma: bool) -> ctypes.CDLL:
    definitions = [*constants.definitions(), f"-DWGMMA={int(wgmma)}"]
    name = hashlib.sha256(" ".join(definitions).encode()).hexdigest()[:16]
    path = folder / f"{name}.so"
    header = Path(__file__).with_name("cuda_emulator.h")
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-w", *definitions]
    command += [f'-DSOURCE="{cluster.SOURCE}"', "-x", "c++", str(header), "-o", str(path)]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulated(folder, monkeypatch):
    """Runs the backend on CPU tensors. Settings are attributes."""
    settings = type("Settings", (Emulated,), {"folder": folder})
    monkeypatch.setattr(cluster, "load", lambda device, constants: settings(constants))
    settings.limits = HOPPER
    monkeypatch.setattr(cluster_backend, "_limits", lambda device: settings.limits)
    return settings


def _check(shape, *, features, products, reverse, keep_first, keeps, strided=False):
    *sizes, C = shape
    tensors, gradient = checking.example(tuple(sizes), C, torch.device("cpu"))
    lines, gradient = tensors[0].to(features), gradient.to(features)
    if strided:  # columns of a map with its channels last, as the layer makes them
        num_lines, num_positions, batch = sizes
        places = lines.new_empty(batch, num_positions, num_lines, C).permute(2, 1, 0, 3)
        lines = places.copy_(lines)
    parameters = [tensor.float() for tensor in tensors[1:]]
    sides = dict(reverse=reverse, keep_first=keep_first)
    expected = checking._expected(lines, tensors[1:], gradient, **sides)
    with checking._poisoned_memory():
        found = checking.both(
            cluster_backend, lines, parameters, gradient, products, **sides, keeps=keeps
        )
    whole, worst = checking.TOLERANCES[products]
    for name, one, other in zip(checking.NAMES, found, expected, strict=True):
        errors = checking.errors(one, other)
        assert errors[0] <= whole and errors[1] <= worst, (name, errors)
    assert found[0].dtype == found[1].dtype == features
    assert found[0].stride() == lines.stride()
    return found


CASES = [  # lines, positions, images, channels
    (3, 4, 5, 8),
    (2, 1, 3, 24),
    (1, 5, 2, 40),
    (4, 16, 5, 40),
    (2, 33, 3, 56),
    (3, 7, 2, 64),
    (2, 66, 2, 48),
]


@needs_compiler
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("keeps", [False, True])
def test_agrees_with_the_reference(emulated, shape, keeps):
    number = CASES.index(shape) + 3 * keeps
    features = [torch.bfloat16, torch.float32][number // 2 % 2]
    sides = dict(reverse=bool(number % 2), keep_first=bool(number // 2 % 2))
    emulated.wgmma = number % 3 != 0
    _check(shape, features=features, products=torch.bfloat16, **sides, keeps=keeps)


@needs_compiler
@pytest.mark.parametrize("features", [torch.float32, torch.float16, torch.bfloat16])
def test_float16_and_strides_of_columns(emulated, features):
    options = dict(reverse=True, keep_first=False, keeps=True, strided=True)
    _check((3, 5, 4, 24), features=features, products=torch.float16, **options)


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_blocks_of_lines(emulated, monkeypatch, reverse, keeps):
    monkeypatch.setattr(cluster_backend, "BLOCK_ROWS", 2 * 5 * 3)
    options = dict(reverse=reverse, keep_first=reverse, keeps=keeps)
    _check((5, 5, 3, 24), features=torch.float32, products=torch.bfloat16, **options)


@needs_compiler
@pytest.mark.parametrize("positions, images", [(16, 4), (4, 3)])
def test_200_channels(emulated, positions, images):
    emulated.active = 1
    options = dict(reverse=False, keep_first=False, keeps=True)
    shape = (3, positions, images, 200)
    _check(shape, features=torch.bfloat16, products=torch.bfloat16, **options)


@needs_compiler
@pytest.mark.parametrize("limits", [HOPPER._replace(shared_bytes=24_000), HOPPER], ids=str)
def test_the_order_of_threads_does_not_matter(emulated, limits):
    """With little shared memory there are clusters of several blocks, and partial sums lie over the
    rows."""
    emulated.limits = limits
    results = []
    for emulated.seed, emulated.wgmma in ((0, True), (1, True), (2, True), (3, False), (4, False)):
        results.append(
            _check(
                (3, 5, 5, 40),
                features=torch.float32,
                products=torch.bfloat16,
                reverse=False,
                keep_first=False,
                keeps=True,
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("C", [8, 48, 56, 104, 128, 200, 256, 360, 384])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", LIMITS)
def test_plans_fit(C, backward, device):
    limits = LIMITS[device]
    for positions in (1, 4, 16, 33, 64):
        for batch in (1, 5, 128):
            plan = cluster_backend.plan(positions, batch, C, limits, backward=backward)
            if plan is None:
                assert C >= 200 or limits.shared_bytes < 200_000
                continue
            assert plan.shared_bytes <= limits.shared_bytes
            assert plan.images * positions <= 128 // plan.groups
            assert plan.cluster * plan.units * 8 >= C


def test_plan_of_the_usual_case():
    for backward in (False, True):
        plan = cluster_backend.plan(16, 128, 200, HOPPER, backward=backward)
        assert (plan.cluster, plan.units, plan.groups, plan.images) == (4, 7, 2, 4)


def test_numbers_of_clusters_that_are_known_count():
    known = {(4, 2): 0, (4, 1): 0}
    plan = cluster_backend.plan(16, 128, 200, HOPPER, backward=False, active=known)
    assert plan.cluster != 4


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100", "sm_120"])
@pytest.mark.parametrize("kind", ["forward", "forward that keeps", "backward"])
@pytest.mark.parametrize("C, positions", [(200, 16), (104, 64), (360, 16), (8, 4), (56, 100)])
def test_compiles_without_spilling(architecture, kind, C, positions):
    try:
        cluster._nvrtc()
    except OSError:
        pytest.skip("NVRTC is missing")
    device = {"sm_90a": "H100", "sm_100": "B200", "sm_120": "RTX 5090"}[architecture]
    backward = kind == "backward"
    plan = cluster_backend.plan(positions, 128, C, LIMITS[device], backward=backward)
    if plan is None:
        assert device == "RTX 5090" and C >= 200
        return
    for float16, features in ((False, 1), (True, 0)):
        constants = cluster.Constants(
            C,
            plan.cluster,
            plan.units,
            plan.groups,
            FLOAT16=float16,
            FEATURES=features,
            KEEPS=kind == "forward that keeps",
            BACKWARD=backward,
        )
        code = cluster.compiled(constants, architecture)
        assert _stack_bytes(code) <= 64, (plan, constants)


def _stack_bytes(code: bytes) -> int:
    """The stack of the kernel in machine code, where registers are spilled to: of the attributes of
    a kernel in its section .nv.info, the one of number 0x11 (format 4: size 8, symbol, bytes)."""
    at = code.find(bytes([4, 0x11, 8, 0]))
    assert at >= 0
    return int.from_bytes(code[at + 8 : at + 12], "little")


def test_a_capture_does_not_compile():
    constants = cluster.Constants(8, 1, 1, 2, False, 1, False, False)
    capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True)
    with capturing, pytest.raises(RuntimeError, match="capture"):
        cluster.load(torch.device("cuda", 77), constants)


def test_says_what_it_does_not_support():
    lines = torch.empty(1, 1, 1, 8)
    assert "CUDA" in cluster_backend.unsupported(lines, torch.bfloat16)
