"""The backend `cluster` is not there yet."""

import torch
from torch import Tensor


def unsupported(lines: Tensor, product_dtype: torch.dtype) -> str | None:
    """Why the backend cannot run."""
    return "it is not there yet"
