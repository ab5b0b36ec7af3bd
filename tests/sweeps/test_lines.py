"""The backend `lines` against the reference: in plain torch, and its Triton kernels in Triton's
interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY

from lib.sweeps import checking, lines_backend, selection
from lib.sweeps.lines_backend import sweep, sweep_backward

CPU = torch.device("cpu")
SHAPES = ((1, 1, 1), (1, 5, 2), (6, 1, 3), (3, 5, 3), (7, 4, 1), (4, 17, 9))
TYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize("features, products", TYPES, ids=str)
@pytest.mark.parametrize("C", [1, 5, 16])
def test_plain_torch_equals_the_reference(C, features, products, monkeypatch):
    types = dict(features=features, products=products)
    monkeypatch.setitem(checking.TOLERANCES, torch.float64, (1e-12, 1e-11))
    monkeypatch.setitem(checking.TOLERANCES, torch.float32, (5e-6, 5e-5))
    assert checking.difference("lines", CPU, C, **types, shapes=SHAPES) is None
    monkeypatch.setattr(lines_backend, "BLOCK_ROWS", 40)  # several blocks, an incomplete last one
    assert checking.difference("lines", CPU, C, **types, shapes=SHAPES) is None


def test_strides_of_every_direction():
    """Lines as a layer makes them of channels_last features, and a gradient that lies otherwise."""
    tensors, _ = checking.example((1, 1, 1), 6, CPU)
    parameters = tensors[1:]
    features = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    gradient = torch.randn(6, 3, 4, 5, dtype=torch.float64).transpose(0, 1)
    for to_lines in ((3, 2, 0, 1), (2, 3, 0, 1)):
        plain = features.permute(to_lines).contiguous()
        strided = features.contiguous(memory_format=torch.channels_last).permute(to_lines)
        results = []
        for lines in (plain, strided):
            output = sweep(lines, *parameters, True, False, torch.float64)
            assert output.stride() == lines.stride()
            given = (gradient.permute(to_lines), lines, *parameters, output)
            results.append((output, *sweep_backward(*given, True, False, torch.float64)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_kernels_in_the_interpreter():
    """In a process of its own: Triton decides at its import whether kernels are interpreted."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not hasattr(interpreter.InterpreterBuilder, "get_int1_ty"):
        pytest.skip("this version's interpreter cannot negate a mask, as that of torch 2.6's")
    program = """
import torch
from lib.sweeps import checking, lines_kernels
assert lines_kernels.INTERPRETED and lines_kernels._in_triton(torch.zeros(1))
cpu, shapes = torch.device("cpu"), ((3, 5, 3), (1, 4, 2), (3, 1, 2))
for C in (5, 16):
    for types in ((torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        wrong = checking.difference(
            "lines", cpu, C, features=types[0], products=types[1], shapes=shapes
        )
        assert wrong is None, (C, types, wrong)
print("ok")
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    if "numpy" in done.stderr and "interpreter" in done.stderr and "3.6" in done.stderr:
        pytest.skip("Triton 3.6 cannot interpret with NumPy 2.4 or later")
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


def test_it_is_a_candidate():
    assert "lines" in selection.CANDIDATES
