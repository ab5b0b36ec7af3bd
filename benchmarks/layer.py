"""What does a spatial dependency layer cost, in time, memory and parameters (Tables 5 and 6)?

    python -m benchmarks.layer --output benchmarks/results/layer_cpu.json
    python -m benchmarks.layer --device cuda --precision bfloat16 --batch 128 --replay

Contenders lead from `channels` to `channels`: convolutions (`conv3`, `conv5`) and layers with as
many features and 1x1 projections, by number of directions and backend (`sdn2/auto`). The backend
`yardstick` is the loop that one would write, a `GRUCell` call for each line, and
`compiled-yardstick` the same through `torch.compile`. Before anything is timed every spatial
dependency layer is compared with the reference in float64, output and all gradients, and its
parameters are counted and compared with what the equations say; one that differs ends the program
with status 1.

Times are those of rounds in which the contenders take turns, after one round that is not counted:
medians, and for Table 6 mean and standard deviation. On CUDA features are channels_last, as
convolutions there like them. A pass over a small map is mostly launches from Python; `--replay`
measures passes that were captured as CUDA graphs instead, the forward pass alone and both.

Memory is the peak of one training step beyond parameters, input and output gradient, by torch's
allocator.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import PRECISIONS, positive
from lib.nn import BACKENDS, SDNLayer

DIRECTIONS = {1: [0], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3]}
# Relative norm of the difference from the float64 reference: what rounding explains, with a wide
# margin.
TOLERANCES = {"float32": 1e-5, "bfloat16": 6e-2, "float16": 1e-2}
YARDSTICK = "yardstick"
COMPILED = "compiled-yardstick"
SLOW = ("reference", YARDSTICK)
PASSES = ("forward", "step")  # a step is a forward and a backward pass


class YardstickSDNLayer(SDNLayer):
    """The layer as written down: a loop over lines, neighbours concatenated, one GRUCell call for
    each line."""

    def forward(self, x: Tensor, output_size: None = None) -> Tensor:
        features = torch.tanh(self.project_in_stage(x))
        for sweep in self.sdn_correction_stage:
            axis = 3 if sweep.direction in (0, 1) else 2
            lines = list(features.unbind(axis))  # [B, C, position]
            if sweep.direction in (1, 3):
                lines.reverse()
            corrected, previous = [], torch.zeros_like(lines[0])
            for line in lines:
                padded = nn.functional.pad(previous, (1, 1))
                neighbours = torch.cat([padded[..., :-2], previous, padded[..., 2:]], dim=1)
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


def expected_parameters(name: str, C: int) -> int:
    """The number of parameters by the equations."""
    if name.startswith("conv"):
        return int(name.removeprefix("conv")) ** 2 * C * C + C
    projection = C * C + C
    sweep = 3 * C * 3 * C + 3 * C * C + 2 * 3 * C
    return 2 * projection + len(DIRECTIONS[int(name.removeprefix("sdn").split("/")[0])]) * sweep


class Step:
    """A layer with an input and a gradient of its output, ready for passes in a precision."""

    def __init__(self, layer: nn.Module, x: Tensor, grad_output: Tensor, precision: str):
        self.layer, self.x, self.grad_output = layer, x, grad_output
        low = precision != "float32"
        self._autocast = dict(device_type=x.device.type, enabled=low, cache_enabled=False)
        if low:
            self._autocast["dtype"] = PRECISIONS[precision]

    def forward(self) -> Tensor:
        with torch.no_grad(), torch.autocast(**self._autocast):
            return self.layer(self.x)

    def both(self) -> tuple[Tensor, ...]:
        """The output, and the gradients of the input and of all parameters."""
        with torch.autocast(**self._autocast):
            y = self.layer(self.x)
        leaves = [self.x, *self.layer.parameters()]
        return y.detach(), *torch.autograd.grad(y, leaves, self.grad_output.to(y.dtype))


@common.without_tf32()
def verify(name: str, options: argparse.Namespace) -> None:
    """Compares with the reference in float64, on a small map of unequal sides, and counts
    parameters; SystemExit if anything differs."""
    layer = build(name, options.channels).to(options.device)
    parameters = sum(each.numel() for each in layer.parameters())
    if parameters != (expected := expected_parameters(name, options.channels)):
        sys.exit(f"{name} has {parameters} parameters, its equations have {expected}")
    if name.startswith("conv"):
        return
    number = name.split("/")[0]
    reference = build(f"{number}/reference", options.channels).to(options.device).double()
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, options.channels, 5, 7, device=options.device, requires_grad=True)
    grad_output = torch.randn_like(x)
    found = Step(layer, x, grad_output, options.precision).both()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, grad_output)]
    truth = Step(reference, *exact, "float32").both()
    keys = ["output", "grad input", *(f"grad {key}" for key, _ in layer.named_parameters())]
    pairs = (dict(zip(keys, tensors, strict=True)) for tensors in (found, truth))
    common.require_close(name, *pairs, TOLERANCES[options.precision])


def prepared(name: str, scale: int, options: argparse.Namespace) -> Step:
    """The contender with features of a scale."""
    on_gpu = options.device.startswith("cuda")
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    shape = (options.batch, options.channels, scale, scale)
    dtype = PRECISIONS[options.precision] if on_gpu else torch.float32
    x, grad_output = (
        torch.randn(shape, device=options.device, dtype=dtype).to(memory_format=memory_format)
        for _ in range(2)
    )
    layer = build(name, options.channels).to(options.device, memory_format=memory_format)
    return Step(layer, x.requires_grad_(), grad_output, options.precision)


def replay(run: Callable[[], object]) -> Callable[[], None]:
    """What replays a call that is captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(names: list[str], scale: int, options: argparse.Namespace) -> list[dict]:
    """A row for each contender at a scale; times in milliseconds."""
    steps = {name: prepared(name, scale, options) for name in names}
    calls, slow = {}, [(name, what) for name in names if name.endswith(SLOW) for what in PASSES]
    for name, step in steps.items():
        for what, run in zip(PASSES, (step.forward, step.both), strict=True):
            calls[name, what] = replay(run) if options.replay else run
    turns = dict(in_a_row=5 if options.replay else 1, slow=slow, slow_rounds=options.slow_repeats)
    taken = common.take_turns(calls, options.repeats, options.device, **turns)
    rows = {}
    for name in names:
        forward, both = ([1e3 * each for each in taken[name, what]] for what in PASSES)
        rows[name] = row = {"scale": scale, "layer": name, "rounds": len(forward)}
        row["parameters"] = expected_parameters(name, options.channels)
        row |= {"forward_ms": statistics.median(forward), "step_ms": statistics.median(both)}
        row |= {"forward_mean_ms": statistics.mean(forward), "forward_std_ms": deviation(forward)}
        peak = None if options.no_memory else common.peak_memory(steps[name].both, options.device)
        row["peak_mib"] = peak
    for name, row in rows.items():
        yardstick = rows.get(f"{name.split('/')[0]}/{YARDSTICK}", {})
        for what in PASSES:
            row[f"{what}_over_conv3"] = row[f"{what}_ms"] / rows["conv3"][f"{what}_ms"]
            row[f"{what}_over_yardstick"] = ratio(row, yardstick, f"{what}_ms")
        row["memory_over_yardstick"] = ratio(row, yardstick, "peak_mib")
    return list(rows.values())


def ratio(row: dict, other: dict, key: str) -> float | None:
    """Of what was measured of two contenders; None if it was not of one of them."""
    return row[key] / other[key] if row.get(key) and other.get(key) else None


def deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, device="cpu")
    parser.add_argument("--scales", type=positive, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--channels", type=positive, default=200)
    parser.add_argument("--directions", type=int, nargs="+", default=[1, 2, 4], choices=DIRECTIONS)
    backends = dict(choices=[*BACKENDS, YARDSTICK, COMPILED], default=["auto", YARDSTICK])
    parser.add_argument("--backends", nargs="+", **backends)
    parser.add_argument("--precision", default="float32", choices=list(PRECISIONS))
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument(
        "--slow_repeats",
        type=positive,
        default=3,
        help="rounds in which reference and yardstick run",
    )
    parser.add_argument("--threads", type=positive, help="of the CPU; default: torch's")
    parser.add_argument("--no_memory", action="store_true", help="time only")
    parser.add_argument("--replay", action="store_true", help="passes captured as CUDA graphs")
    options = parser.parse_args(arguments)
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
    torch.backends.cudnn.benchmark = True  # the fastest convolutions that there are
    names = ["conv3", "conv5"]
    names += [f"sdn{number}/{each}" for number in options.directions for each in options.backends]
    for name in names:
        verify(name, options)
    result = common.stamp("benchmarks.layer", arguments, options.device, ("triton",)) | {
        "precision": options.precision,
        "channels": options.channels,
        "batch": options.batch,
        "replayed": options.replay,
        "directions": {number: DIRECTIONS[number] for number in options.directions},
        "rows": [],
    }
    columns = {"scale": "d", "layer": "", "parameters": ",d", "forward_ms": ".2f", "step_ms": ".2f"}
    columns |= dict.fromkeys(("forward_over_conv3", "step_over_conv3"), ".2f")
    columns |= {"step_over_yardstick": ".2f", "peak_mib": ".0f", "memory_over_yardstick": ".2f"}
    for scale in options.scales:
        with contextlib.suppress(torch.OutOfMemoryError):  # larger scales have no rows then
            rows = measure(names, scale, options)
            result["rows"] += rows
            common.write(result, options.output)
            print(common.table(rows, columns), flush=True)


if __name__ == "__main__":
    main()
