"""Sweeps as ONNX has them: a Scan over the lines of a map, whose number need not be known.

`torch.onnx.export(layer, (x,), dynamo=True)` comes here by itself. With a version of torch that has
no `scan`, and with the exporter that traces (`dynamo=False`), the lines are unrolled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_internals import find_scan


def correct_lines(lines: Tensor, *parameters: Tensor, reverse: bool, keep_first: bool) -> Tensor:
    """A sweep, see `correct_lines_reference` in nn.py."""
    from ..nn import correct_line, correct_lines_reference

    scan = find_scan()
    if scan is None or torch.jit.is_tracing():
        return correct_lines_reference(lines, *parameters, reverse=reverse, keep_first=keep_first)

    def visit(previous: Tensor, line: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, is_kept = line
        corrected = torch.where(is_kept, h, correct_line(h, previous, *parameters))
        return corrected, corrected.clone()  # what is carried on, and a line of the result

    # With sizes that may vary, scan has no gradients; a stored network needs none.
    lines, parameters = lines.detach().contiguous(), [each.detach() for each in parameters]
    numbers = torch.arange(lines.shape[0])
    is_kept = (numbers == (lines.shape[0] - 1 if reverse else 0)) & keep_first
    return scan(visit, torch.zeros_like(lines[0]), (lines, is_kept), reverse=reverse)[1]
