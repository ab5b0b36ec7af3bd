"""The Triton kernels of the backend `lines` are translated for GPUs that this machine need not
have, as their launches ask for them.

The interpreter, in which test_lines.py runs them without a GPU, forgives what the compiler does
not. Here the launches of a sweep are recorded, on tensors without content, and their kernels compiled
down to machine code for an A100, consumer GPUs, an H100 and Blackwell.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from lib.sweeps import lines_backend, lines_kernels

triton = pytest.importorskip("triton")
if lines_kernels.INTERPRETED:
    pytest.skip("kernels that are interpreted cannot be compiled", allow_module_level=True)

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS = ("correct_kernel", "gather_kernel", "coefficients_kernel", "gradients_kernel")


class Recorder:
    """Stands for a kernel; notes how it is launched."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        assert grid[0] < 2**31 and len(grid) == 1
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


@pytest.fixture
def launches(monkeypatch):
    """The list of (kernel, arguments, options) of sweeps on tensors without content."""
    noted = []
    for name in KERNELS:
        monkeypatch.setattr(lines_kernels, name, Recorder(getattr(lines_kernels, name), noted))
    monkeypatch.setattr(lines_kernels, "_in_triton", lambda tensor: True)
    return noted


def sweep_and_back(scale, batch, C, dtype, sides=(False, False), features=None) -> None:
    """Products in a type, and features in another or, as a layer has them under autocast, in the
    same; with what is kept for the backward sweep, and without."""
    lines = torch.empty(scale, scale, batch, C, dtype=features or dtype, device="meta")
    parameters = [
        torch.empty(*size, device="meta")
        for size in ((3 * C, 3 * C), (3 * C, C), (3 * C,), (3 * C,))
    ]
    shape, kept_dtype = lines_backend.kept(lines, dtype)
    for kept in ((), (torch.empty(shape, dtype=kept_dtype, device="meta"),)):
        corrected = lines_backend.sweep(lines, *parameters, *sides, dtype, *kept)
        lines_backend.sweep_backward(corrected, lines, *parameters, corrected, *sides, dtype, *kept)


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
            assert name in lines_kernels.VARYING and type(value) is int, name
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
    "capability, scale, dtype, features",
    [
        (80, 32, torch.bfloat16, torch.bfloat16),
        (86, 32, torch.float16, torch.float16),
        (89, 5, torch.float32, torch.float32),
        (90, 4, torch.bfloat16, torch.bfloat16),
        (90, 64, torch.bfloat16, torch.float32),
        (100, 8, torch.bfloat16, torch.bfloat16),
        (120, 8, torch.float16, torch.float32),
    ],
)
def test_kernels_compile(launches, tmp_path, capability, scale, dtype, features):
    for C in (200, 50):
        sweep_and_back(scale, batch=128, C=C, dtype=dtype, features=features)
        sweep_and_back(scale, batch=128, C=C, dtype=dtype, features=features, sides=(True, True))
    found = kinds(launches).values()
    assert {kernel.__name__ for kernel, *_ in found} == set(KERNELS) and len(found) >= 12
    for kernel, *how in found:
        code = compiled(kernel, *how, capability)
        spilled = stack_bytes(code.asm["cubin"], tmp_path)
        # No registers are spilled; some versions of Triton reserve one number of a stack.
        assert spilled is None or spilled <= 8, f"{kernel.__name__}: {spilled} bytes"


def test_directions_and_sizes_share_kernels(launches):
    """A kernel takes a second to compile: lines in any direction, other batches and lengths do not
    ask for more."""
    sweep_and_back(16, batch=128, C=200, dtype=torch.bfloat16)
    sweep_and_back(16, batch=128, C=200, dtype=torch.bfloat16, sides=(True, True))
    expected = set(kinds(launches))
    # correct_kernel with and without coefficients, each for a line that is kept and for others.
    assert len(expected) == 3 + 4
    for sides in ((True, False), (False, True)):
        sweep_and_back(16, batch=128, C=200, dtype=torch.bfloat16, sides=sides)
    sweep_and_back(20, batch=64, C=200, dtype=torch.bfloat16)
    assert set(kinds(launches)) == expected


def test_a_line_is_one_product_and_one_kernel(launches, monkeypatch):
    products = []
    monkeypatch.setattr(torch, "mm", lambda *a, mm=torch.mm, **k: products.append(1) or mm(*a, **k))
    sweep_and_back(8, batch=128, C=200, dtype=torch.bfloat16)
    names = [kernel.__name__ for kernel, *_ in launches]
    assert {name: names.count(name) for name in KERNELS} == {
        "correct_kernel": 2 * 8,
        "gather_kernel": 2,
        "coefficients_kernel": 1,  # where they were not kept
        "gradients_kernel": 2 * 8,
    }
    assert len(products) == 2 * (7 + 7)
