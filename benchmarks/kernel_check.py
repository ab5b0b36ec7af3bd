"""Do the sweeps compute what the reference does? Without a test framework, for machines with torch
and Triton only.

    python -m benchmarks.kernel_check --device cuda --output folder/kernels.json

For each backend, type, shape of [line, position, image, channel], direction of visiting and rule
for the first line: output and all gradients against the reference in float64, twice, the second
time with uninitialised memory full of NaN, with results that must be equal bit for bit. The
relative norm of a difference may be 8 units of rounding of the type of the products' operands
(float32: 40, sums are long). In low precision features are in the products' type, as in a layer
under autocast, and on small shapes in float32, too. Failures are named, and after all cases have
run they end the program with status 1. On a CPU the Triton kernels take part in Triton's
interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import common
from lib.nn import correct_lines
from lib.sweeps import triton_backend as sweep_triton

SMALL = [
    (3, 5, 3, 5),
    (1, 4, 2, 5),
    (4, 3, 1, 16),
    (3, 1, 3, 5),
    (1, 1, 1, 1),
]  # few channels: each compiles kernels
LARGE = [(4, 4, 128, 200), (16, 16, 32, 200), (33, 17, 5, 50), (32, 32, 32, 360), (64, 64, 7, 104)]
TOLERANCES = {"float32": 5e-6, "bfloat16": 8 * 2**-8, "float16": 8 * 2**-11}
NAMES = ("output", "grad lines", "grad weight_ih", "grad weight_hh", "grad bias_ih", "grad bias_hh")


def case(shape: tuple[int, ...], device: str) -> list[Tensor]:
    """Lines, the parameters of a GRU cell, and a weight for each number of the result."""
    torch.manual_seed(0)
    cell = torch.nn.GRUCell(3 * shape[-1], shape[-1])
    tensors = (
        torch.tanh(torch.randn(shape)),
        cell.weight_ih,
        cell.weight_hh,
        cell.bias_ih,
        cell.bias_hh,
    )
    return [tensor.detach().to(device) for tensor in (*tensors, torch.randn(shape))]


def run(tensors: list[Tensor], precision: str, **how) -> list[Tensor]:
    """Output and gradients of sum(output * weight)."""
    *tensors, weight = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    dtype = common.PRECISIONS[precision]
    with torch.autocast(weight.device.type, dtype, enabled=dtype != torch.float32):
        output = correct_lines(*leaves, **how)
    gradients = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)
    zeros = (
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, gradients, strict=True)
    )
    return [output.detach(), *zeros]


def poisoned() -> Iterator:
    """Patches after which uninitialised memory is NaN."""

    def poison(allocate):
        def allocated(*arguments, **keywords):
            tensor = allocate(*arguments, **keywords)
            return (
                tensor.fill_(float("nan"))
                if tensor.is_floating_point() and not tensor.is_meta
                else tensor
            )

        return allocated

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        yield mock.patch.object(owner, name, poison(getattr(owner, name)))


def failures(
    backend: str, precision: str, features: str, shape: tuple[int, ...], device: str
) -> Iterator[str]:
    """What is wrong with a shape's results, for both directions and borders, features being in a
    type."""
    tensors = case(shape, device)
    exact = [tensor.double() for tensor in tensors]
    tensors[0] = tensors[0].to(getattr(torch, features))
    for reverse, keep_first in itertools.product([False, True], repeat=2):
        sides = dict(reverse=reverse, keep_first=keep_first)
        expected = run(exact, "float32", **sides, backend="reference")
        computed = run(tensors, precision, **sides, backend=backend)
        with contextlib.ExitStack() as stack:
            for patch in poisoned():
                stack.enter_context(patch)
            again = run(tensors, precision, **sides, backend=backend)
        for name, one, two, true in zip(NAMES, computed, again, expected, strict=True):
            where = f"{backend}, {precision}, features {features}, {shape}, {sides}: {name}"
            error = common.relative_error(one, true)
            if not error <= TOLERANCES[precision]:
                yield f"{where} differs from the reference by {error:.1e}"
            if not torch.equal(one, two):
                yield f"{where} differs between two runs"


@common.without_tf32()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    runs = sweep_triton.available() is None and (on_gpu or sweep_triton.INTERPRETED)
    backends = ["torch", "triton"] if runs else ["torch"]
    shapes = SMALL if options.quick or not on_gpu else SMALL + LARGE
    types = [(precision, precision) for precision in common.PRECISIONS]
    wrong, checked = [], 0
    for backend, shape in itertools.product(backends, shapes):
        more = [
            (precision, "float32")
            for precision in common.PRECISIONS
            if precision != "float32" and shape in SMALL
        ]
        for precision, features in types + more:
            wrong += failures(backend, precision, features, shape, options.device)
            checked += 1
    result = common.stamp("kernel_check", arguments, options.device, ("triton",))
    common.write(
        result | {"backends": backends, "cases": 4 * checked, "failures": wrong}, options.output
    )
    print(
        "\n".join(wrong)
        or f"{4 * checked} cases of {' and '.join(backends)} agree with the reference"
    )
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
