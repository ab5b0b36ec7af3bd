"""The Triton kernels are translated for GPUs that this machine need not have, as their launches ask
for them.

The interpreter, in which `test_sweep_triton.py` runs without a GPU, forgives what the compiler does
not: tiles larger than a multiprocessor's memory, branches that cannot be typed. Here the launches
of a layer's sweep are recorded, on tensors without content, and their kernels compiled down to
machine code for an A100, a consumer GPU and an H100.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from lib.sweeps import triton_backend as sweep_triton
from lib.sweeps import triton_kernels as sweep_kernels

triton = pytest.importorskip("triton")
if sweep_triton.INTERPRETED:
    pytest.skip("kernels that are interpreted cannot be compiled", allow_module_level=True)

# Shared memory that a program can have, bytes (CUDA programming guide, table of compute
# capabilities).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MULTIPROCESSORS = 132
KERNELS = ("prepare_kernel", "correct_kernel", "sweep_back_kernel", "collect_kernel")


class Recorder:
    """Stands for a kernel; notes how it is launched."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


@pytest.fixture
def launches(monkeypatch):
    """The list of (kernel, arguments, options) of sweeps on tensors without content."""
    noted = []
    for name in KERNELS:
        monkeypatch.setattr(sweep_kernels, name, Recorder(getattr(sweep_kernels, name), noted))
    for name in ("_plan", "_plan_by_line"):
        plan = getattr(sweep_triton, name)
        monkeypatch.setattr(
            sweep_triton, name, lambda *a, plan=plan: plan(*a[:4], MULTIPROCESSORS, *a[5:])
        )
    return noted


def sweep_and_back(scale, batch, C, dtype, passes=2, sides=(False, False), features=None) -> None:
    """Products in a type, and features in another or, as a layer has them under autocast, in the
    same."""
    lines = torch.empty(scale, scale, batch, C, dtype=features or dtype, device="meta")
    parameters = [
        torch.empty(*size, device="meta")
        for size in ((3 * C, 3 * C), (3 * C, C), (3 * C,), (3 * C,))
    ]
    corrected = sweep_triton.sweep(lines, *parameters, *sides, dtype)
    if passes == 2:
        sweep_triton.sweep_backward(corrected, lines, *parameters, corrected, *sides, dtype)


def translation(kernel, arguments: tuple, options: dict) -> tuple[dict, dict, dict, dict]:
    """What Triton makes code for: types of the arguments, constants, known divisors, and how."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, divisors = {}, {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, values.pop(parameter.name)
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:  # allocations are aligned
                divisors[(parameter.num,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        else:  # a number that may be any
            assert name in sweep_kernels.VARYING and type(value) is int, name
            signature[name] = "i32"
    return signature, constants, divisors, values


def kinds(launches: list) -> dict[str, tuple]:
    """The kernels that a GPU would have to compile, with a launch of each."""
    return {
        repr((kernel.__name__, translation(kernel, *how))): (kernel, *how)
        for kernel, *how in launches
    }


def compiled(kernel, arguments: tuple, options: dict, capability: int):
    """The kernel as Triton compiles it for such a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, divisors, how = translation(kernel, arguments, options)
    source = ASTSource(kernel, signature, constants, divisors)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)


def stack_bytes(binary: bytes, folder: Path) -> int | None:
    """Of a thread, for registers that did not suffice; None where NVIDIA's tool is missing."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    (folder / "kernel.cubin").write_bytes(binary)
    done = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    return int(re.search(r"STACK:(\d+)", done.stdout)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, scale, dtype, features, by_line",
    [
        (80, 32, torch.bfloat16, torch.bfloat16, False),
        (86, 32, torch.float16, torch.float16, False),
        (89, 5, torch.float32, torch.float32, False),
        (90, 4, torch.bfloat16, torch.bfloat16, False),
        (90, 32, torch.bfloat16, torch.bfloat16, False),
        (90, 32, torch.bfloat16, torch.float32, False),
        (90, 8, torch.bfloat16, torch.bfloat16, True),
    ],
)
def test_kernels_compile(
    launches, monkeypatch, tmp_path, capability, scale, dtype, features, by_line
):
    monkeypatch.setattr(sweep_triton, "BY_LINE", by_line)
    sweep_and_back(scale, batch=128, C=200, dtype=dtype, features=features)
    found = kinds(launches).values()
    assert {kernel.__name__ for kernel, *_ in found} == set(KERNELS) and len(found) >= 6
    for kernel, *how in found:
        code = compiled(kernel, *how, capability)
        assert code.metadata.shared <= SHARED_MEMORY[capability], kernel.__name__
        spilled = stack_bytes(code.asm["cubin"], tmp_path)
        # What `_plan` says: none on the H100, a little elsewhere.
        assert spilled is None or spilled <= (0 if capability == 90 else 200), (
            f"{kernel.__name__}: {spilled} bytes"
        )


def test_directions_and_sizes_share_kernels(launches):
    """A kernel takes a second to compile: lines in any direction, other batches and lengths do not
    ask for more."""
    sweep_and_back(32, batch=128, C=200, dtype=torch.bfloat16)
    expected = set(kinds(launches))
    assert (
        len(expected) == 7
    )  # both of prepare and correct, of collect for a first and for other blocks
    for sides in ((True, False), (False, True), (True, True)):
        sweep_and_back(32, batch=128, C=200, dtype=torch.bfloat16, sides=sides)
    sweep_and_back(40, batch=64, C=200, dtype=torch.bfloat16)
    assert set(kinds(launches)) == expected


def test_launches_are_few(launches, monkeypatch):
    """On a small map a sweep is three launches: copies, one product of torch, and all lines;
    backward 4 of ours."""
    products = []
    monkeypatch.setattr(torch, "mm", lambda *a, mm=torch.mm, **k: products.append(1) or mm(*a, **k))
    sweep_and_back(8, batch=128, C=200, dtype=torch.bfloat16, passes=1)
    assert [kernel.__name__ for kernel, *_ in launches] == [
        "prepare_kernel",
        "correct_kernel",
    ] and len(products) == 1
    launches.clear()
    sweep_and_back(8, batch=128, C=200, dtype=torch.bfloat16)
    names = ["prepare_kernel", "correct_kernel", "sweep_back_kernel", "collect_kernel"]
    assert [kernel.__name__ for kernel, *_ in launches[2:]] == names and len(products) == 2 + 6
