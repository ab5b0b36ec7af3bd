"""Every use that sweeps make of what torch keeps to itself: names that begin with an underscore.

Tried with torch 2.6.0 and 2.14.1. `tests/sweeps/test_torch_internals.py` has one test for each,
which says what has changed if a later version no longer fits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a derivative other than a gradient is being taken of tensors, or a function mapped
    over them: inside of a transform of `torch.func`, or with tangents of `forward_ad`.

    An operator of torch has no rule for `torch.func.jvp`, which would take the tangent for zero,
    and no public function tells that there is a transform.
    """
    return torch._C._are_functorch_transforms_active() or has_tangent(*tensors)


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of the tensors has a tangent of `torch.autograd.forward_ad`; by public names."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def may_have_saved_tensors_hooks() -> bool:
    """Whether what autograd saves now is given to hooks, as `torch.utils.checkpoint` does.

    `torch.autograd.graph.saved_tensors_hooks` sets them, and no public function tells whether they
    are set. Torch 2.6 and 2.7 have no private one either: True.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def find_scan() -> Callable | None:
    """`scan`, which becomes the operator Scan of ONNX; None where torch has none.

    It has no public name yet.
    """
    try:
        from torch._higher_order_ops.scan import scan
    except ImportError:
        return None
    return scan
