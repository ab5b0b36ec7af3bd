"""Canaries of `lib.sweeps.torch_internals`: each fails, and says what has changed, when a later
version of torch no longer is what sweeps rely on."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lib.sweeps.torch_internals import (
    find_scan,
    has_tangent,
    is_transformed,
    may_have_saved_tensors_hooks,
)

ADVICE = f"changed in torch {torch.__version__}: see lib/sweeps/torch_internals.py"
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian"])
def test_transforms_are_noticed(transform):
    seen = []

    def function(x):
        seen.append(is_transformed(x))
        return x.sin().sum()

    x = torch.randn(3)
    if transform == "jvp":
        torch.func.jvp(function, (x,), (x,))
    else:
        getattr(torch.func, transform)(function)(x)
    assert all(seen), (
        f"`torch._C._are_functorch_transforms_active` does not tell of {transform}. {ADVICE}"
    )
    function(x)
    assert not seen[-1], f"it tells of transforms where there are none. {ADVICE}"


def test_tangents_are_noticed():
    x = torch.randn(3)
    assert not has_tangent(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert has_tangent(x, dual) and is_transformed(dual) and not has_tangent(x), ADVICE


def test_an_operator_of_torch_has_no_rule_for_forward_mode():
    """Once there is one, transforms need not be noticed."""
    assert not hasattr(torch.library, "register_jvp"), (
        f"operators may register forward derivatives; is_transformed may go. {ADVICE}"
    )


@pytest.mark.skipif(VERSION < (2, 8), reason="before torch 2.8 there is no way to tell")
def test_hooks_of_saved_tensors_are_noticed():
    def asked(x):
        asked.answers.append(may_have_saved_tensors_hooks())
        return x.sin()

    asked.answers = []
    x = torch.randn(3, requires_grad=True)
    asked(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: each, lambda each: each):
        asked(x)
    checkpoint(asked, x, use_reentrant=False)
    assert asked.answers == [False, True, True], (
        "`torch._C._autograd._top_saved_tensors_default_hooks` does not tell whether there are "
        f"hooks. {ADVICE}"
    )


def test_there_is_a_scan():
    torch._dynamo.reset()
    scan = find_scan()
    assert scan is not None, f"there is no `torch._higher_order_ops.scan`. {ADVICE}"
    with torch.no_grad():
        _, sums = scan(lambda total, x: (total + x, total + x), torch.zeros(2), torch.ones(3, 2))
    assert sums[:, 0].tolist() == [1, 2, 3], (
        f"`torch._higher_order_ops.scan` computes something else; sweeps in ONNX need it. {ADVICE}"
    )
