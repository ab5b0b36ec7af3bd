"""Whether a backend computes a sweep correctly, on the device at hand.

It is run on small cases and compared with the reference in float64: the output and every gradient,
by the worst row as well as by the whole, with uninitialised memory full of NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

# The largest relative error of the whole, and of the worst row, against float64. Rows of large
# maps are many: one wrong image among them hides in a norm over all.
TOLERANCES = {
    torch.float32: (5e-4, 5e-3),  # TF32, if the user allows it, rounds operands to 11 bits
    torch.bfloat16: (3e-2, 1e-1),
    torch.float16: (1e-2, 5e-2),
}
CHECKED_SHAPES = ((3, 5, 3), (4, 17, 9))  # lines, positions, images
NAMES = ("output", "grad lines", "grad weight_ih", "grad weight_hh", "grad bias_ih", "grad bias_hh")


def backend_module(name: str) -> ModuleType:
    """The module of a candidate, with `sweep`, `sweep_backward` and `unsupported`."""
    return importlib.import_module(f".{name}_backend", __package__)


def difference(
    name: str,
    device: torch.device,
    channels: int,
    *,
    features: torch.dtype,
    products: torch.dtype,
    shapes: tuple[tuple[int, int, int], ...] = CHECKED_SHAPES,
) -> str | None:
    """What is wrong with a candidate's results, in words, or None if they are right.

    Arguments:
        name: The candidate.
        device: Where it runs.
        channels: Number of channels C.
        features, products: Types of the features and of the products' operands.
        shapes: Sizes of [line, position, image].
    """
    module = backend_module(name)
    for shape in shapes:
        tensors, gradient = example(shape, channels, device)
        lines, gradient = tensors[0].to(features), gradient.to(features)
        exact = torch.float64 if products == torch.float64 else torch.float32
        parameters = [tensor.to(exact) for tensor in tensors[1:]]
        for reverse, keep_first in ((False, False), (True, True)):
            sides = dict(reverse=reverse, keep_first=keep_first)
            expected = _expected(lines, tensors[1:], gradient, **sides)
            for keeps in {False, hasattr(module, "kept")}:
                with _poisoned_memory():
                    found = both(
                        module, lines, parameters, gradient, products, **sides, keeps=keeps
                    )
                for what, one, other in zip(NAMES, found, expected, strict=True):
                    whole, worst = errors(one, other)
                    if whole <= TOLERANCES[products][0] and worst <= TOLERANCES[products][1]:
                        continue  # and not if they are NaN
                    return (
                        f"{what} of {'x'.join(map(str, (*shape, channels)))} differs from the "
                        f"reference by {whole:.1e}, in one row by {worst:.1e}"
                    )
    return None


def both(
    module: ModuleType,
    lines: Tensor,
    parameters: list[Tensor],
    gradient: Tensor,
    product_dtype: torch.dtype,
    *,
    reverse: bool,
    keep_first: bool,
    keeps: bool,
) -> tuple[Tensor, ...]:
    """A backend's forward and backward sweep: the output and the gradients of lines and parameters.

    Arguments:
        gradient: Of the output.
        keeps: Whether the forward sweep keeps something for the backward sweep.
    """
    options: tuple[object, ...] = (reverse, keep_first, product_dtype)
    if keeps:
        shape, dtype = module.kept(lines, product_dtype)
        options = (*options, lines.new_empty(shape, dtype=dtype))
    with torch.cuda.device_of(lines):
        output = module.sweep(lines, *parameters, *options)
        return output, *module.sweep_backward(gradient, lines, *parameters, output, *options)


def errors(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative norm of a difference: of all, and of the worst row. A row that is small beside the
    others counts as a tenth of their mean norm, at least."""
    found, expected = found.double(), expected.double()
    rows = (found - expected).reshape(-1, expected.shape[-1]).norm(dim=1)
    norms = expected.reshape(-1, expected.shape[-1]).norm(dim=1)
    norms = norms.clamp(min=0.1 * norms.square().mean().sqrt().item() + 1e-30)
    whole = rows.norm() / (expected.norm() + 1e-30)
    return whole.item(), (rows / norms).max().item()


def example(
    shape: tuple[int, int, int], channels: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Lines, parameters of a GRU cell, and the gradient of the result, all in float64. The numbers
    are drawn without touching the global random state."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*size: int) -> Tensor:
        draw = torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1
        return draw.to(torch.float32).to(device, torch.float32).double()

    scale = channels**-0.5
    parameters = [
        uniform(3 * channels, 3 * channels) * scale,
        uniform(3 * channels, channels) * scale,
        uniform(3 * channels) * scale,
        uniform(3 * channels) * scale,
    ]
    return [uniform(*shape, channels), *parameters], uniform(*shape, channels)


def _expected(
    lines: Tensor, parameters: list[Tensor], gradient: Tensor, **sides: bool
) -> list[Tensor]:
    """Output and gradients by the reference in float64."""
    from ..nn import correct_lines_reference

    exact = [tensor.double() for tensor in (lines, *parameters)]
    # Inside of an operator only the transforms of torch.func can differentiate.
    output, pull_back = torch.func.vjp(
        lambda *tensors: correct_lines_reference(*tensors, **sides), *exact
    )
    return [output, *pull_back(gradient.double())]


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that a number that nobody wrote is noticed."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*arguments, **keywords) -> Tensor:
            tensor = allocate(*arguments, **keywords)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    owners = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    patches = [mock.patch.object(o, name, poisoned(getattr(o, name))) for o, name in owners]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
