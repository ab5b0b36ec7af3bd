"""How a sweep is made fast.

`correct_lines` computes what `correct_lines_reference` in nn.py computes, by one of these backends.
All take the same arguments, and parameters have the same names for all.

| backend     | how                                           | where            | when            |
|-------------|-----------------------------------------------|------------------|-----------------|
| `reference` | the open loop of nn.py, torch's own gradients | everywhere       | asked for       |
| `torch`     | plain torch in place, gradients by hand       | everywhere       | always on a CPU |
| `lines`     | one product of the vendor's library for each  | everywhere, with | the fastest     |
|             | line and a pointwise kernel; replayed         | Triton if it can |                 |
| `cluster`   | one kernel, with the weights in the shared    | Hopper and newer | the fastest     |
|             | memory of a cluster of thread blocks          | bf16 and float16 |                 |

`auto` takes on a CPU `torch`. On a GPU it checks each candidate against the reference the first
time, measures those that are right on maps of the size at hand, and remembers the fastest
(selection.py). The environment variable SDN_BACKEND takes the place of `auto`;
`python -m lib.sweeps` (installed: `python -m sdn.sweeps`) says what would be used here, and why.

The way of a call: `Sweep.forward` and `correct_lines` in nn.py; `correct_lines` in operator.py,
which is one operator of torch with all derivatives; `resolve` in selection.py; `sweep` and
`sweep_backward` in the backend's file. graphs.py replays what consists of many launches.
"""

from .operator import correct_lines, laid_out_for_sweeps
from .selection import adopt, choices, report, shared_choices

__all__ = [
    "adopt",
    "choices",
    "correct_lines",
    "laid_out_for_sweeps",
    "report",
    "shared_choices",
]
