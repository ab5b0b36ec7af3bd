"""How fast and how large is a spatial dependency layer? Against convolutions and against the
straightforward loop.

    python -m benchmarks.sdn_layer --scales 16 32 --directions 1 2 --output
      benchmarks/results/mine.json

Contenders, all from `channels` to `channels`: `conv3` and `conv5` (nn.Conv2d, 3x3 and 5x5),
`sdn<n>/<backend>` (SDNLayer with n directions and 1x1 projections) and `sdn<n>/yardstick`, the
layer as one would write it down: one torch.nn.GRUCell call for each line, on concatenated
neighbours; `sdn<n>/compiled-yardstick` is torch.compile of that, which takes minutes at large
scales and is no default contender. Before anything is timed every spatial dependency layer is
compared with the reference in float64, output and all gradients; one that differs ends the program,
exit status 1.

Times are medians over rounds in which the contenders take turns, after one round that is not
counted. On CUDA all features are channels_last, as convolutions there like them. A pass over a
small map is mostly launches of kernels from Python; `--replay` measures forward and backward passes
that were captured as CUDA graphs instead, with a copy of the output's gradient for every contender.
Memory is the peak of one training step beyond parameters, input and output
gradient: on CUDA that of the allocator; on a CPU the peak of the resident set of a fresh process
(Linux only), which includes what the libraries use for themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import PRECISIONS
from lib.nn import BACKENDS, SDNLayer
from lib.sweeps import triton_backend as sweep_triton

DIRECTIONS = {1: [0], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3]}
# Relative norm of the difference from the float64 reference: what rounding explains, with a wide
# margin.
TOLERANCES = {"float32": 1e-5, "bfloat16": 6e-2, "float16": 1e-2}
YARDSTICK = "yardstick"
COMPILED = "compiled-yardstick"
SLOW = ("reference", YARDSTICK)


class YardstickSDNLayer(SDNLayer):
    """The layer as written down: a loop over lines, neighbours concatenated, one GRUCell call for
    each line."""

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.project_in_stage(x))
        for sweep in self.sdn_correction_stage:
            axis = 3 if sweep.direction in (0, 1) else 2
            lines = list(features.unbind(axis))  # [B, C, position]
            if sweep.direction in (1, 3):
                lines.reverse()
            corrected, previous = [], torch.zeros_like(lines[0])
            for line in lines:
                padded = nn.functional.pad(previous, (1, 1))
                neighbours = torch.cat(
                    [padded[..., :-2], previous, padded[..., 2:]], dim=1
                )  # [B, 3C, position]
                batch, C, positions = line.shape
                previous = sweep.cell.gru(
                    neighbours.transpose(1, 2).reshape(batch * positions, 3 * C),
                    line.transpose(1, 2).reshape(batch * positions, C),
                )
                previous = previous.view(batch, positions, C).transpose(1, 2)
                corrected.append(previous)
            if sweep.direction in (1, 3):
                corrected.reverse()
            features = torch.stack(corrected, dim=axis)
        return self.project_out_stage(features)


def build(name: str, channels: int) -> nn.Module:
    """The contender of that name, see the top of the file."""
    if name.startswith("conv"):
        kernel_size = int(name.removeprefix("conv"))
        return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
    number, backend = name.removeprefix("sdn").split("/")
    dirs = DIRECTIONS[int(number)]
    if backend in (YARDSTICK, COMPILED):
        yardstick = YardstickSDNLayer(channels, channels, channels, dirs)
        if backend == COMPILED:
            yardstick.compile(fullgraph=True)
        return yardstick
    return SDNLayer(channels, channels, channels, dirs, backend=backend)


def step(layer: nn.Module, x: Tensor, grad_output: Tensor, options) -> tuple[Tensor, float, float]:
    """One forward and backward pass: the output, the seconds of the forward pass and of both."""
    layer.zero_grad()
    x.grad = None
    low = options.precision != "float32"
    autocast = (
        torch.autocast(x.device.type, PRECISIONS[options.precision])
        if low
        else contextlib.nullcontext()
    )
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    with autocast:
        y = layer(x)
    synchronize()
    middle = time.perf_counter()
    y.backward(grad_output.to(y.dtype))
    synchronize()
    return y, middle - start, time.perf_counter() - start


@common.without_tf32()
def verify(name: str, options) -> None:
    """Compares with the reference in float64, on a small map of unequal sides; SystemExit if they
    differ."""
    layer = build(name, options.channels).to(options.device)
    number = name.split("/")[0]
    reference = build(f"{number}/reference", options.channels).to(options.device).double()
    reference.load_state_dict(layer.state_dict())
    if isinstance(layer, YardstickSDNLayer):  # which has no rule for the first line but the paper's
        assert all(sweep.border == "zeros" for sweep in reference.sdn_correction_stage)
    x = torch.randn(2, options.channels, 5, 7, device=options.device, requires_grad=True)
    grad_output = torch.randn_like(x)
    exact_x = x.detach().double().requires_grad_()
    output = step(layer, x, grad_output, options)[0]
    expected = reference(exact_x)
    expected.backward(grad_output.double())
    pairs = {"output": (output, expected), "grad input": (x.grad, exact_x.grad)}
    for (key, one), other in zip(layer.named_parameters(), reference.parameters(), strict=True):
        pairs[f"grad {key}"] = (one.grad, other.grad)
    tolerance = TOLERANCES[options.precision]
    for key, (one, other) in pairs.items():
        error = ((one.double() - other).norm() / other.norm()).item()
        if not error <= tolerance:
            sys.exit(
                f"{name} is not timed: {key} differs from the reference by {error:.1e}, allowed is {tolerance:.0e}"
            )


def features(scale: int, batch: int, options) -> tuple[Tensor, Tensor]:
    """Input of a layer and the gradient of its output."""
    memory_format = (
        torch.channels_last if options.device.startswith("cuda") else torch.contiguous_format
    )
    shape = (batch, options.channels, scale, scale)
    pair = (
        torch.randn(shape, device=options.device).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    x, grad_output = pair
    return x.requires_grad_(), grad_output


def contenders(names: list[str], x: Tensor, grad_output: Tensor, options) -> dict[str, nn.Module]:
    """Layers by name, for features such as x; SystemExit if one replayed as CUDA graphs does not do
    what it did."""
    layers = {}
    gc.collect()  # graphs of earlier layers: freeing them while another is captured is not allowed
    for name in names:
        layer = build(name, options.channels).to(options.device)
        if x.is_cuda:
            layer = layer.to(memory_format=torch.channels_last)
        if options.replay:
            expected = [step(layer, x, grad_output, options)[0].detach().clone(), x.grad.clone()]
            low = options.precision != "float32"
            # An autocast's cache of weights would outlive the capture. The input is x itself, or it
            # would be copied.
            with torch.autocast(
                "cuda", PRECISIONS[options.precision], enabled=low, cache_enabled=False
            ):
                layer = torch.cuda.make_graphed_callables(layer, (x,))
            found = [step(layer, x, grad_output, options)[0].detach(), x.grad]
            errors = [
                common.relative_error(one, other)
                for one, other in zip(found, expected, strict=True)
            ]
            if not max(errors) <= TOLERANCES[options.precision]:
                sys.exit(f"{name} is not timed: replayed, it differs by {max(errors):.1e}")
        layers[name] = layer
    return layers


def measure(names: list[str], scale: int, batch: int, options) -> dict[str, dict]:
    """Median times in milliseconds, the contenders taking turns."""
    x, grad_output = features(scale, batch, options)
    layers = contenders(names, x, grad_output, options)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(options.repeats + 1):
        for name, layer in layers.items():
            if name.endswith(SLOW) and turn > options.slow_repeats:
                continue
            _, forward, both = step(layer, x, grad_output, options)
            if turn > 0:
                times[name].append((forward, both))
    return {
        name: {
            "forward_ms": 1e3 * statistics.median(forward for forward, _ in taken),
            "step_ms": 1e3 * statistics.median(both for _, both in taken),
            "fastest_step_ms": 1e3 * min(both for _, both in taken),
            "rounds": len(taken),
        }
        for name, taken in times.items()
    }


def peak_memory(name: str, scale: int, batch: int, options) -> float | None:
    """MiB, see the top of the file; None where it cannot be measured."""
    if options.device.startswith("cuda"):
        return one_step_peak(name, scale, batch, options)
    if not Path("/proc/self/clear_refs").exists():
        return None
    arguments = [
        "--channels",
        options.channels,
        "--scales",
        scale,
        "--batch",
        batch,
        "--precision",
        options.precision,
    ]
    command = [
        sys.executable,
        "-m",
        "benchmarks.sdn_layer",
        "--memory_of",
        name,
        *map(str, arguments),
    ]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        sys.exit(f"measuring the memory of {name} at scale {scale} failed:\n{child.stderr}")
    return float(child.stdout.splitlines()[-1])


def one_step_peak(name: str, scale: int, batch: int, options) -> float:
    """Peak of one training step in this process in MiB, beyond what exists before it."""
    layer = build(name, options.channels).to(options.device)
    small = torch.randn(1, options.channels, 4, 4, device=options.device, requires_grad=True)
    step(
        layer, small, torch.randn_like(small), options
    )  # loads libraries and creates the gradients
    x, grad_output = features(scale, batch, options)
    return common.peak_memory(lambda: step(layer, x, grad_output, options), options.device)


def markdown(result: dict) -> str:
    rows = [
        "| scale | batch | layer | forward ms | fwd+bwd ms | x conv3 | x yardstick | peak MiB | x yardstick |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(value, form):
        return "" if value is None else format(value, form)

    for row in result["rows"]:
        cells = [
            row["scale"],
            row["batch"],
            row["layer"],
            cell(row["forward_ms"], ".1f"),
            cell(row["step_ms"], ".1f"),
        ]
        cells += [cell(row["step_over_conv3"], ".2f"), cell(row["step_over_yardstick"], ".2f")]
        cells += [cell(row["peak_mib"], ".0f"), cell(row["memory_over_yardstick"], ".2f")]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scales", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[32], help="one for all scales, or one for each"
    )
    parser.add_argument("--channels", type=int, default=200)
    parser.add_argument(
        "--directions", type=int, nargs="+", default=[1, 2, 4], choices=list(DIRECTIONS)
    )
    parser.add_argument("--backends", nargs="*", choices=[*BACKENDS, YARDSTICK, COMPILED])
    parser.add_argument("--precision", default="float32", choices=list(PRECISIONS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--slow_repeats",
        type=int,
        default=3,
        help="rounds in which reference and yardstick take part",
    )
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--no_memory", action="store_true", help="time only")
    parser.add_argument("--replay", action="store_true", help="passes captured as CUDA graphs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.backends is None:
        triton = (
            ["triton"]
            if options.device.startswith("cuda") and sweep_triton.available() is None
            else []
        )
        options.backends = ["reference", "torch", *triton, YARDSTICK]
    if len(options.batch) == 1:
        options.batch *= len(options.scales)
    if len(options.batch) != len(options.scales):
        parser.error("--batch takes one number, or one for each of --scales")
    if min(options.repeats, options.slow_repeats) < 1:
        parser.error("--repeats and --slow_repeats must be at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    if options.replay and not options.device.startswith("cuda"):
        parser.error("--replay needs --device cuda: there are no CUDA graphs elsewhere")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        print(one_step_peak(options.memory_of, options.scales[0], options.batch[0], options))
        return

    layers = [
        f"sdn{number}/{backend}" for number in options.directions for backend in options.backends
    ]
    for name in layers:
        verify(name, options)
    result = common.stamp("sdn_layer", arguments, options.device, ("triton",)) | {
        "precision": options.precision,
        "channels": options.channels,
        "replayed": options.replay,
        "directions": {number: DIRECTIONS[number] for number in options.directions},
        "rows": [],
    }
    for scale, batch in zip(options.scales, options.batch, strict=True):
        names = ["conv3", "conv5", *layers]
        measured = measure(names, scale, batch, options)
        for name in names:
            measured[name]["peak_mib"] = (
                None if options.no_memory else peak_memory(name, scale, batch, options)
            )
        for name, values in measured.items():
            yardstick = measured.get(f"{name.split('/')[0]}/{YARDSTICK}")
            memory = values["peak_mib"], yardstick and yardstick["peak_mib"]
            ratios = {
                "step_over_conv3": values["step_ms"] / measured["conv3"]["step_ms"],
                "forward_over_conv3": values["forward_ms"] / measured["conv3"]["forward_ms"],
                "step_over_yardstick": values["step_ms"] / yardstick["step_ms"]
                if yardstick
                else None,
                "memory_over_yardstick": memory[0] / memory[1] if all(memory) else None,
            }
            result["rows"].append({"scale": scale, "batch": batch, "layer": name} | values | ratios)
        print(f"scale {scale}: done", file=sys.stderr, flush=True)
        common.write(result, options.output)
    print(markdown(result))


if __name__ == "__main__":
    main()
