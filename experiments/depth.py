"""Do deep stacks of spatial dependency layers learn, and which initialization makes them?

    python -m experiments.depth --output benchmarks/results/depth.json

A stack of layers with 16 features learns to shift 8x8 maps of noise by two columns, for so many
steps of Adam on batches of 16 (learning rate 0.003). The columns that come from outside of the map
do not count. Reported is the mean squared error of the last ten batches (guessing zero gives 1),
and how much the gradient's norm of the first layer's parameters is of the last one's, before the
first step. `conv` is a stack of 3x3 convolutions with tanh after each.
"""

from __future__ import annotations

import itertools
import statistics

import torch
from torch import Tensor, nn

from benchmarks import common
from lib.nn import INITS, ResSDNLayer, SDNLayer

FEATURES, SIZE, BATCH, SHIFT = 16, 8, 16, 2
DIRECTIONS = {1: [0], 2: [0, 2], 4: [0, 1, 2, 3]}
LAYERS = {"SDNLayer": SDNLayer, "ResSDNLayer": ResSDNLayer}


def stack(kind: str, depth: int, directions: int, init: str) -> nn.Sequential:
    """So many layers between two 1x1 convolutions."""
    if kind == "conv":
        middle = [
            module
            for _ in range(depth)
            for module in (nn.Conv2d(FEATURES, FEATURES, 3, padding=1), nn.Tanh())
        ]
    else:
        dirs = DIRECTIONS[directions]
        middle = [LAYERS[kind](FEATURES, FEATURES, dirs=dirs, init=init) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(1, FEATURES, 1), *middle, nn.Conv2d(FEATURES, 1, 1))


def loss_of(network: nn.Module) -> Tensor:
    x = torch.randn(BATCH, 1, SIZE, SIZE)
    return (network(x) - x.roll(SHIFT, 3))[..., SHIFT:].square().mean()


def run(kind: str, depth: int, directions: int, init: str, seed: int, steps: int) -> dict:
    """A row: what a stack has learned, and its gradients at first."""
    torch.manual_seed(seed)
    network = stack(kind, depth, directions, init)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses, ratio = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        if ratio is None:
            with_parameters = [layer for layer in network[1:-1] if list(layer.parameters())]
            first, last = (
                nn.utils.get_total_norm([p.grad for p in layer.parameters()]).item()
                for layer in (with_parameters[0], with_parameters[-1])
            )
            ratio = first / last
        optimizer.step()
        losses.append(loss.item())
    row = {"layer": kind, "depth": depth, "directions": directions, "init": init, "seed": seed}
    return row | {"error": statistics.mean(losses[-10:]), "first_over_last_gradient": ratio}


def main(arguments: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--depths", type=common.positive, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--directions", type=int, nargs="+", default=[1, 2, 4], choices=DIRECTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=common.positive, default=300)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = common.stamp("experiments.depth", arguments, "cpu") | {
        "steps": options.steps,
        "rows": [],
    }
    cases = [("conv", depth, 0, "") for depth in options.depths]
    order = (options.depths, LAYERS, INITS, options.directions)
    cases += [(kind, d, number, init) for d, kind, init, number in itertools.product(*order)]
    columns = {"layer": "", "depth": "d", "directions": "d", "init": "", "seed": "d"}
    columns |= {"error": ".4f", "first_over_last_gradient": ".1e"}
    for case, seed in itertools.product(cases, options.seeds):
        result["rows"].append(run(*case, seed, options.steps))
        common.write(result, options.output)
        print(common.table(result["rows"][-1:], columns).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
