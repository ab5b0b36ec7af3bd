"""Table 5 of the paper: how many parameters have convolutions and spatial dependency layers of
equally many filters?

    python -m benchmarks.table5_parameters --output benchmarks/results/table5.json

Layers lead from `channels` to `channels`, with as many features and 1x1 projections. The parameters
of each layer are
counted and compared with what its equations say: for each direction weights of 3C x 3C and 3C x C
and two biases of 3C. One that differs ends the program with status 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.sdn_layer import DIRECTIONS, build

LAYERS = ("conv3", "conv5", "sdn1", "sdn2", "sdn4")


def expected(name: str, C: int) -> int:
    """The number of parameters by the equations."""
    if name.startswith("conv"):
        return int(name.removeprefix("conv")) ** 2 * C * C + C
    projection = C * C + C
    sweep = 3 * C * 3 * C + 3 * C * C + 2 * 3 * C
    return 2 * projection + len(DIRECTIONS[int(name.removeprefix("sdn"))]) * sweep


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="8 channels")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    channels = 8 if options.quick else options.channels
    if channels < 1:
        parser.error("--channels must be at least 1")
    counts = {}
    for name in LAYERS:
        layer = build(name if name.startswith("conv") else f"{name}/auto", channels)
        counts[name] = sum(parameter.numel() for parameter in layer.parameters())
        if counts[name] != expected(name, channels):
            sys.exit(
                f"{name} has {counts[name]} parameters, its equations have {expected(name, channels)}"
            )
    rows = [
        {
            "layer": name,
            "parameters": n,
            "over_conv3": n / counts["conv3"],
            "over_conv5": n / counts["conv5"],
        }
        for name, n in counts.items()
    ]
    common.write(
        common.stamp("table5_parameters", arguments, "cpu") | {"channels": channels, "rows": rows},
        options.output,
    )
    print(
        common.table(
            rows, {"layer": "", "parameters": ",d", "over_conv3": ".2f", "over_conv5": ".2f"}
        )
    )


if __name__ == "__main__":
    main()
