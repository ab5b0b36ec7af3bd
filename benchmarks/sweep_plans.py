"""Which shape of work suits the sweep's kernels on this GPU? One launch for all lines, or one for
each; which tiles?

    python -m benchmarks.sweep_plans --output benchmarks/results/sweep_plans.json

One sweep forward, and one backward, for each plan: `default` (what lib/sweeps/triton_backend.py
chooses by counting), `by_line` (its other design: a launch for each line, in which programs share
the channels), and variations of both in images per program, tile and stages. Times are medians over
rounds in which plans take turns: called from Python, and replayed as CUDA graphs, where launches
cost little; beside them a 3x3 convolution with as many channels. Each plan's result and gradients
are compared with those of `default`; one that differs, does not compile or does not fit is listed
as failed. The rows say which plan is fastest where; `_plan` and `BY_LINE` in
lib/sweeps/triton_backend.py are where to put it.

Without a GPU (`--quick` in the interpreter, TRITON_INTERPRET=1) it shows that the script is ready:
times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import common
from lib.sweeps import triton_backend as sweep_triton

# Changes to the plan of `default` or `by_line`.
VARIATIONS = {
    "default": (False, {}),
    "by_line": (True, {}),
    "default, 2 stages": (False, {"num_stages": 2}),
    "default, 4 stages": (False, {"num_stages": 4}),
    "default, 8 warps": (False, {"num_warps": 8}),
    "default, 1 image": (False, {"images": 1}),
    "by_line, 32 channels": (True, {"CHANNELS": 32}),
    "by_line, 128 rows": (True, {"ROWS": 128, "num_warps": 8}),
    "by_line, 4 stages": (True, {"num_stages": 4}),
}
TOLERANCES = {
    "float32": 1e-5,
    "bfloat16": 3e-2,
    "float16": 5e-3,
}  # relative norm; sums are taken in another order
QUICK = dict(channels=5, batch=2, scales=[3], rounds=1)


@contextmanager
def planned(by_line: bool, changes: dict[str, int]) -> Iterator[None]:
    """Inside, sweeps go by a design with changes."""
    name = "_plan_by_line" if by_line else "_plan"
    original = getattr(sweep_triton, name)

    def changed(num_positions: int, batch: int, C: int, *rest) -> dict[str, int]:
        plan = original(num_positions, batch, C, *rest) | changes
        if "ROWS" in changes:
            plan["images"] = max(1, min(batch, plan["ROWS"] // num_positions))
        if by_line:
            plan["PARTS"] = -(-C // plan["CHANNELS"])
        return plan

    with (
        mock.patch.object(sweep_triton, name, changed),
        mock.patch.object(sweep_triton, "BY_LINE", by_line),
    ):
        yield


def passes(scale: int, options) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A forward and a backward sweep over random features, as rows of channels_last maps."""
    C, dtype = options.channels, common.PRECISIONS[options.precision]
    cell = torch.nn.GRUCell(3 * C, C).to(options.device)
    parameters = [p.detach() for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
    maps = torch.tanh(torch.randn(options.batch, scale, scale, C, device=options.device))
    lines = maps.permute(1, 2, 0, 3)
    gradient = torch.randn_like(maps).permute(1, 2, 0, 3)
    corrected = sweep_triton.sweep(lines, *parameters, False, False, dtype)
    return {
        "forward": lambda: (sweep_triton.sweep(lines, *parameters, False, False, dtype),),
        "backward": lambda: sweep_triton.sweep_backward(
            gradient, lines, *parameters, corrected, False, False, dtype
        ),
    }


def convolution(scale: int, options) -> dict[str, Callable[[], object]]:
    """Forward and backward pass of a 3x3 convolution in the same type and in channels_last."""
    dtype = common.PRECISIONS[options.precision]
    shape = (options.batch, options.channels, scale, scale)
    x = torch.randn(shape, device=options.device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    w = torch.randn(options.channels, options.channels, 3, 3, device=options.device, dtype=dtype)
    w = w.contiguous(memory_format=torch.channels_last)
    return {
        "forward": lambda: torch.nn.functional.conv2d(x, w, padding=1),
        "backward": lambda: torch.ops.aten.convolution_backward(
            x, x, w, [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        ),
    }


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(scale: int, options) -> list[dict]:
    """A row for each pass and plan."""
    on_gpu = options.device.startswith("cuda")
    sweeps, rows = passes(scale, options), []
    convolutions = convolution(scale, options)
    for what, run in sweeps.items():
        expected = run()
        contenders, graphs, failed = {"conv3": convolutions[what]}, {}, {}
        for name, plan in VARIATIONS.items():

            def by_plan(plan=plan, run=run):
                with planned(*plan):
                    return run()

            try:
                results = by_plan()
                errors = [
                    common.relative_error(one, other)
                    for one, other in zip(results, expected, strict=True)
                ]
                if not max(errors) <= TOLERANCES[options.precision]:
                    raise ValueError(f"differs from the default by {max(errors):.1e}")
                if on_gpu:
                    graphs[name] = captured(by_plan)
                contenders[name] = by_plan
            except (
                Exception
            ) as error:  # too much memory, or what the compiler says: the other plans go on
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        if on_gpu:
            graphs["conv3"] = captured(convolutions[what])
        called = common.take_turns(contenders, options.rounds, options.device)
        replayed = common.take_turns(graphs, options.rounds, options.device)
        for name in ["conv3", *VARIATIONS]:
            row = {
                "scale": scale,
                "pass": what,
                "plan": name,
                "called_ms": None,
                "replayed_ms": None,
            }
            for key, times in (("called_ms", called), ("replayed_ms", replayed)):
                if name in times:
                    row[key] = 1e3 * statistics.median(times[name])
            rows.append(row | {"failed": failed.get(name)})
    return rows


@common.without_tf32()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scales", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--precision", default="bfloat16", choices=list(common.PRECISIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="seconds: few channels, a small map, 1 round"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    if min(options.rounds, options.batch, options.channels, *options.scales) < 1:
        parser.error("all numbers must be at least 1")
    reason = sweep_triton.available()
    if reason is None and not options.device.startswith("cuda") and not sweep_triton.INTERPRETED:
        reason = f"they do not run on {options.device}"
    if reason:
        sys.exit(f"there are no kernels to measure: {reason}")
    torch.manual_seed(0)
    result = common.stamp("sweep_plans", arguments, options.device, ("triton",))
    result |= {
        "precision": options.precision,
        "channels": options.channels,
        "batch": options.batch,
        "rows": [],
    }
    for scale in options.scales:
        result["rows"] += measure(scale, options)
        common.write(result, options.output)
        print(f"scale {scale}: done", file=sys.stderr, flush=True)
    columns = {
        "scale": "d",
        "pass": "",
        "plan": "",
        "called_ms": ".3f",
        "replayed_ms": ".3f",
        "failed": "",
    }
    print(common.table(result["rows"], columns))


if __name__ == "__main__":
    main()
