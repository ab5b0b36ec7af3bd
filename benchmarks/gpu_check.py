"""Are the sweeps' backends right on this GPU, and which is the fastest?

    python -m benchmarks.gpu_check --device cuda --output folder/gpu_check.json

1. Every backend that can run is compared with the reference in float64, output and all gradients,
   by the worst row as well as by the whole, with uninitialised memory full of NaN. If one is wrong
   nothing else is done, and the exit status is 1.
2. The race: a sweep forward, and forward and backward, by each backend, at scales 4 to 64, called
   from Python and replayed as a CUDA graph, beside a channels_last 3x3 convolution with as many
   channels. Medians of rounds in which the contenders take turns.
3. The kernels of the fastest backend, by time.

The file is written after each row, so that a run that is cut off has lost nothing. On a CPU the
same steps are made at sizes of seconds, without graphs, to see that the program is ready.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys

import torch
from torch import nn

from benchmarks import common
from benchmarks.layer import Step, replay
from lib.sweeps import checking, graphs, selection

LARGE = (32, 32, 128)  # lines, positions, images: a wrong image among many must be noticed
TYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
)


def candidates(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends that can run products in a type."""
    lines = torch.empty(1, 1, 1, 8, device=device, dtype=dtype)
    modules = {name: checking.backend_module(name) for name in selection.CANDIDATES}
    return [name for name, module in modules.items() if not module.unsupported(lines, dtype)]


def check(options: argparse.Namespace) -> list[dict]:
    """A row for each backend, pair of types and number of channels."""
    device, rows = torch.device(options.device), []
    for features, products in TYPES:
        for name in candidates(device, products):
            # Other numbers of channels, where kernels do not take seconds to compile for each.
            few = () if name == "cluster" else (24, 50)
            for channels in (options.channels, *few):
                shapes = checking.CHECKED_SHAPES
                if options.large and channels == options.channels and features == torch.bfloat16:
                    shapes = (*shapes, LARGE)
                types = dict(features=features, products=products)
                wrong = checking.difference(name, device, channels, **types, shapes=shapes)
                row = {"backend": name, "channels": channels, "wrong": wrong}
                row |= {key: str(value).removeprefix("torch.") for key, value in types.items()}
                rows.append(row)
                print(
                    f"{name}, {row['features']} x {row['products']}, {channels} channels: "
                    f"{wrong or 'right'}",
                    flush=True,
                )
    return rows


def race(scale: int, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    """Rows of the contenders at a scale."""
    C, batch, device = options.channels, options.batch, torch.device(options.device)
    features = torch.randn(batch, C, scale, scale, device=device, dtype=dtype).tanh()
    features = features.contiguous(memory_format=torch.channels_last)
    lines = features.permute(2, 3, 0, 1)
    parameters = [each.detach() for each in nn.GRUCell(3 * C, C, device=device).parameters()]
    sides = dict(reverse=False, keep_first=False)
    convolution = nn.Conv2d(C, C, 3, padding=1, device=device)
    convolution = convolution.to(memory_format=torch.channels_last)
    precision = str(dtype).removeprefix("torch.")
    step = Step(convolution, features.requires_grad_(), torch.randn_like(features), precision)
    rows = {}
    lines = lines.detach()
    ways = {"eager": lambda call: call}
    if options.device.startswith("cuda"):
        ways["graph"] = replay
    for way, made in ways.items():
        # What a layer keeps for its backward pass, see lib/sweeps/operator.py.
        keeps = way == "graph" or not graphs.is_small(lines)
        calls = {("conv3", "forward"): step.forward, ("conv3", "both"): step.both}
        for name in candidates(device, dtype):
            module = checking.backend_module(name)
            forward = functools.partial(module.sweep, lines, *parameters, False, False, dtype)
            calls[name, "forward"] = torch.no_grad()(forward)
            arguments = (module, lines, parameters, lines, dtype)
            sweep = functools.partial(checking.both, *arguments, **sides, keeps=keeps)
            calls[name, "both"] = torch.no_grad()(sweep)
        calls = {key: made(call) for key, call in calls.items()}
        taken = common.take_turns(calls, options.repeats, options.device, in_a_row=5)
        for (name, what), seconds in taken.items():
            row = rows.setdefault(name, {"scale": scale, "precision": precision, "contender": name})
            row[f"{way}_{what}_ms"] = 1e3 * statistics.median(seconds)
    for row in rows.values():
        for key in [key for key in row if key.endswith("_ms")]:
            row[f"{key.removesuffix('_ms')}_over_conv3"] = row[key] / rows["conv3"][key]
    return list(rows.values())


def kernels(scale: int, name: str, options: argparse.Namespace) -> list[dict]:
    """The kernels of a backend's forward and backward sweep by their time, microseconds."""
    dtype = torch.bfloat16
    shape = (scale, scale, options.batch, options.channels)
    lines = torch.randn(shape, device=options.device, dtype=dtype).tanh()
    parameters = [
        each.detach()
        for each in nn.GRUCell(3 * shape[-1], shape[-1], device=options.device).parameters()
    ]
    module = checking.backend_module(name)
    sides = dict(reverse=False, keep_first=False, keeps=hasattr(module, "kept"))
    run = functools.partial(checking.both, module, lines, parameters, lines, dtype, **sides)
    with torch.no_grad():
        run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"scale": scale, "backend": name, "kernel": event.key[:80], "count": event.count}
        | {"microseconds": event.self_device_time_total}
        for event in events[:12]
        if event.self_device_time_total
    ]


@common.without_tf32()
def main(arguments: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__, device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scales", type=common.positive, nargs="+", default=[16, 32, 8, 4, 64])
    parser.add_argument("--batch", type=common.positive, default=128)
    parser.add_argument("--channels", type=common.positive, default=200)
    parser.add_argument("--repeats", type=common.positive, default=5)
    parser.add_argument("--quick", action="store_true", help="seconds: few channels, small maps")
    options = parser.parse_args(arguments)
    options.large = options.device.startswith("cuda") and not options.quick
    if options.quick or not options.device.startswith("cuda"):
        options.scales, options.batch, options.channels, options.repeats = [4, 5], 2, 8, 2
    torch.backends.cudnn.benchmark = True
    result = common.stamp("benchmarks.gpu_check", arguments, options.device, ("triton",))
    result |= {"channels": options.channels, "batch": options.batch}
    print(selection.report(options.device), flush=True)
    result["check"] = check(options)
    common.write(result, options.output)
    if wrong := [row for row in result["check"] if row["wrong"]]:
        sys.exit(f"{len(wrong)} comparisons with the reference failed: nothing is timed")
    result |= {"race": [], "kernels": []}
    columns = {"scale": "d", "precision": "", "contender": ""}
    for dtype in (torch.bfloat16, torch.float32):
        for scale in options.scales:
            rows = race(scale, dtype, options)
            result["race"] += rows
            common.write(result, options.output)
            numbers = {key: ".3f" for key in rows[0] if key.endswith(("_ms", "_conv3"))}
            print(common.table(rows, columns | numbers), flush=True)
    if options.device.startswith("cuda"):
        for scale in (16, 64):
            times = {
                row["contender"]: row["graph_both_ms"]
                for row in result["race"]
                if row["scale"] == scale and row["precision"] == "bfloat16"
            }
            times.pop("conv3", None)
            if times:
                result["kernels"] += kernels(scale, min(times, key=times.get), options)
                common.write(result, options.output)
        print(common.table(result["kernels"], dict.fromkeys(result["kernels"][0], "")))


if __name__ == "__main__":
    main()
