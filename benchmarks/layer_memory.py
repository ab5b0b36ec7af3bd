"""How much memory does a training step through a layer take on a GPU? Computed, without one.

    python -m benchmarks.layer_memory --output benchmarks/results/layer_memory.json

The layers of `benchmarks.sdn_layer` make a step on tensors that have a shape but no content, on
which Triton's kernels do nothing. `recipe_memory.Live` adds up what is alive at the same time,
beyond the parameters, the input and the output's gradient; the buffers of a sweep are counted,
workspaces of cuDNN and the allocator's waste are not. A `GRUCell` of the yardstick keeps five
numbers per feature, as torch's fused one on GPUs does (on a CPU, more).

First the same computation for small layers is compared with what torch's profiler sees allocated in
real steps on the
CPU: `torch`, and the yardstick with a CPU's cell. A difference of more than 10 % ends the program
    with status 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.recipe_memory import Live, compared, most_allocated
from benchmarks.sdn_layer import DIRECTIONS, YARDSTICK, build
from lib import nn as sdn
from lib.sweeps import triton_backend as sweep_triton
from lib.sweeps import triton_kernels as sweep_kernels

CONTENDERS = (YARDSTICK, "torch", "triton")
KERNELS = ("prepare_kernel", "correct_kernel", "sweep_back_kernel", "collect_kernel")


class OpenSweep(torch.autograd.Function):
    """The operator of a sweep, whose inside can be seen."""

    @staticmethod
    def forward(ctx, *inputs):
        output = sdn._sweep(*inputs)
        sdn._save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_corrected, _):
        return *sdn._sweep_backward(grad_corrected, *ctx.saved_tensors, *ctx.options), *[None] * 5


class FusedGates(torch.autograd.Function):
    """What torch's fused GRU cell for GPUs allocates."""

    @staticmethod
    def forward(ctx, from_input, from_state, state):
        ctx.save_for_backward(state.new_empty(*state.shape[:-1], 5 * state.shape[-1]))
        return torch.empty_like(state)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        gates = (kept.new_empty(*grad.shape[:-1], 3 * grad.shape[-1]) for _ in range(2))
        return *gates, torch.empty_like(grad)


class FusedGRUCell(nn.GRUCell):
    """Allocates what a GRUCell does on a GPU."""

    def forward(self, input: Tensor, hx: Tensor) -> Tensor:
        from_state = F.linear(hx, self.weight_hh, self.bias_hh)
        return FusedGates.apply(
            F.linear(input, self.weight_ih, self.bias_ih), from_state, hx.to(from_state.dtype)
        )


class IdleKernel:
    """Stands for a kernel of Triton; a launch does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@contextmanager
def open_sweeps() -> Iterator[None]:
    """Inside, tensors that a sweep makes are seen, and kernels compute nothing."""
    with (
        mock.patch.object(sdn, "_SWEEP", OpenSweep.apply),
        mock.patch.multiple(sweep_kernels, **dict.fromkeys(KERNELS, IdleKernel())),
    ):
        yield


def step(
    layer: nn.Module,
    shape: tuple[int, ...],
    precision: str,
    watch: Callable[[list[Tensor]], AbstractContextManager],
) -> None:
    """A forward and a backward pass, under `watch(input, output's gradient and parameters)`."""
    dtype = common.PRECISIONS[precision]
    x, grad_output = (torch.zeros(shape, dtype=each) for each in (torch.float32, dtype))
    x, grad_output = (
        each.contiguous(memory_format=torch.channels_last) for each in (x, grad_output)
    )
    x.requires_grad_()
    with watch([x, grad_output, *layer.parameters()]):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer(x)
        y.backward(grad_output)


def computed_bytes(name: str, shape: tuple[int, ...], precision: str, *, fused: bool) -> int:
    """Most bytes alive at a time in a step, beyond parameters, input and output's gradient."""
    watched = []

    def watch(tensors: list[Tensor]) -> Live:
        live = Live(tensors)
        watched.append((live, live.now))
        return live

    with FakeTensorMode(), open_sweeps():
        layer = build(name, shape[1])
        if fused and name.endswith(YARDSTICK):
            for sweep in layer.sdn_correction_stage:
                sweep.cell.gru.__class__ = FusedGRUCell
        step(layer, shape, precision, watch)
    ((live, before),) = watched
    return live.peak - before


def verify(name: str, shape: tuple[int, ...]) -> dict:
    """Computed and allocated bytes of a step in float32; SystemExit if they differ."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    step(build(name, shape[1]), shape, "float32", lambda tensors: profiler)
    computed = computed_bytes(name, shape, "float32", fused=False)
    return {"of": name, "shape": list(shape)} | compared(name, computed, most_allocated(profiler))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scales", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels", type=int, default=200)
    parser.add_argument("--directions", type=int, nargs="+", choices=DIRECTIONS, default=[1, 2, 4])
    parser.add_argument(
        "--precisions", nargs="+", choices=common.PRECISIONS, default=["bfloat16", "float32"]
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    if min(options.batch, options.channels, *options.scales) < 1:
        parser.error("all numbers must be at least 1")
    if reason := sweep_triton.available():
        sys.exit(f"nothing is computed: {reason}")
    result = common.stamp("layer_memory", arguments, "cpu")
    result["verified"] = [
        verify(f"sdn2/{backend}", (16, 64, 16, 16)) for backend in (YARDSTICK, "torch")
    ]
    result["rows"] = rows = []
    for precision, directions, scale in itertools.product(
        options.precisions, options.directions, options.scales
    ):
        row = {"precision": precision, "directions": directions, "scale": scale}
        for contender in CONTENDERS:
            name, shape = (
                f"sdn{directions}/{contender}",
                (options.batch, options.channels, scale, scale),
            )
            row[f"{contender}_mib"] = computed_bytes(name, shape, precision, fused=True) / 2**20
        rows.append(
            row
            | {
                f"{each}_ratio": row[f"{each}_mib"] / row[f"{YARDSTICK}_mib"]
                for each in CONTENDERS[1:]
            }
        )
    formats = {
        name: ".2f" if "ratio" in name else ".1f" if "mib" in name else "" for name in rows[0]
    }
    print(common.table(rows, formats))
    common.write(result, options.output)


if __name__ == "__main__":
    main()
