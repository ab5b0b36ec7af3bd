"""Table 6 of the paper: how long does a forward pass through convolutions and spatial dependency
layers take?

    python -m benchmarks.table6_runtime --device cuda --precision bfloat16 --output
      benchmarks/results/table6.json

The paper's protocol: batch 128, scales 4 to 64, each forward pass 100 times, mean and standard
deviation; beyond it the backward pass and the peak memory of one training step (of what, see
`benchmarks.sdn_layer`). The layers, which take turns, lead from `channels` to `channels`, with 1x1
projections and 1, 2 and 4 directions. Each spatial dependency layer is first compared with the
reference in float64, output and all gradients; one that differs ends the program, status 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import common, sdn_layer
from lib.nn import BACKENDS

PASSES = ("forward", "backward")
QUICK = dict(channels=8, batch=2, scales=[4, 5], repeats=2)


def measure(names: list[str], scale: int, options) -> list[dict]:
    """A row for each layer at a scale."""
    x, grad_output = sdn_layer.features(scale, options.batch, options)
    layers = sdn_layer.contenders(names, x, grad_output, options)
    times = {name: [] for name in names}
    for turn in range(options.repeats + 1):
        for name, layer in layers.items():
            _, forward, both = sdn_layer.step(layer, x, grad_output, options)
            if turn > 0:
                times[name].append((1e3 * forward, 1e3 * (both - forward)))
    rows = []
    for name, taken in times.items():
        rows.append({"scale": scale, "layer": name, "repeats": len(taken)})
        for what, values in zip(PASSES, zip(*taken, strict=True), strict=True):
            rows[-1] |= {
                f"{what}_ms": statistics.mean(values),
                f"{what}_std": statistics.stdev(values),
            }
        rows[-1] |= {
            f"{what}_over_conv3": rows[-1][f"{what}_ms"] / rows[0][f"{what}_ms"] for what in PASSES
        }
        rows[-1]["peak_mib"] = (
            None
            if options.no_memory
            else sdn_layer.peak_memory(name, scale, options.batch, options)
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scales", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--precision", default="float32", choices=list(common.PRECISIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_memory", action="store_true", help="time only")
    parser.add_argument(
        "--replay", action="store_true", help="passes captured as CUDA graphs (of a CUDA device)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="seconds: few channels, small maps, 2 repetitions"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    if options.replay and not options.device.startswith("cuda"):
        parser.error("--replay needs --device cuda: there are no CUDA graphs elsewhere")
    if options.repeats < 2 or min(options.batch, options.channels, *options.scales) < 1:
        parser.error("--repeats must be at least 2, all other numbers at least 1")
    torch.manual_seed(0)
    layers = [f"sdn{number}/{options.backend}" for number in (1, 2, 4)]
    for name in layers:
        sdn_layer.verify(name, options)
    stamp = common.stamp("table6_runtime", arguments, options.device, ("triton",))
    stamp |= {"precision": options.precision, "channels": options.channels, "batch": options.batch}
    stamp["replayed"] = options.replay
    result = stamp | {"rows": []}
    for scale in options.scales:
        result["rows"] += measure(["conv3", "conv5", *layers], scale, options)
        common.write(result, options.output)
        print(f"scale {scale}: done", file=sys.stderr, flush=True)
    columns = {
        "scale": "d",
        "layer": "",
        "forward_ms": ".3f",
        "forward_std": ".3f",
        "forward_over_conv3": ".2f",
    }
    columns |= {
        "backward_ms": ".3f",
        "backward_std": ".3f",
        "backward_over_conv3": ".2f",
        "peak_mib": ".0f",
    }
    print(common.table(result["rows"], columns))


if __name__ == "__main__":
    main()
