"""Inside or outside? Networks trained on small outlines are asked about large ones.

A picture shows the outlines of nested blobs; a pixel is inside if a path to the border crosses an
odd number of outlines. The rule is the same at every size, but larger maps need it over longer
distances::

    python -m examples.enclosed                      # clean outlines, equal steps
    python -m examples.enclosed --damaged            # with gaps, stray strokes and noise
    python -m examples.enclosed --seconds 30         # equal processor time instead of equal steps
    python -m examples.enclosed --damaged --flood_fill    # what no network is needed for

Clean outlines need no network: flood fill solves them exactly. At the training size no arm has an
advantage worth its cost; larger maps are what the example is about.

The numbers that it promises: with the default flags, the SDN's mean intersection over union after
training at 32x32 is at least 0.99 at 64x64 and 0.97 at 96x96, or the exit status is 1. Measured:
1.000 and 0.990 (three seeds; one of them 0.972 at 96x96, so that the target of the preliminary
study, 0.99, was just met). With `--select` all arms keep the rate 1e-2, and the SDN's five seeds
reach 1.000 at every size up to 256x256. Nothing is promised for damaged outlines, `--quick` or
`--seconds`.
"""

import argparse
import math
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples import common, comparison, networks

PROMISED = {"SDN at 64": 0.99, "SDN at 96": 0.97}
ARMS = networks.arms(1) | networks.variants(1)
CLOSINGS = range(4)  # pixels, among which the best for flood fill is chosen


def make_outlines(
    count: int, size: int, seed: int, damaged: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Random outlines [count, 1, size, size], their insides and the weights of pixels.

    Outlines are the outermost pixels of blobs, which get the weight 0. The blobs are the upper part
    of smooth noise whose scale grows with the map. A size of at least 16 is needed.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, insides, weights = [], [], []
    while len(inputs) < count:
        inside = blobs(size, generator)
        if not 0.2 < inside.mean() < 0.8:
            continue
        outline = inside - _erode(inside, "cross")
        inputs.append(_damage(outline, generator) if damaged else outline)
        insides.append(inside)
        weights.append(1 - outline)
    return torch.cat(inputs), torch.cat(insides), torch.cat(weights)


def blobs(size: int, generator: torch.Generator, period: int | None = None) -> Tensor:
    """Smooth noise above a quantile, without parts thinner than 3 pixels; [1, 1, size, size].

    Blobs are some 0.1 to 0.3 of `period` wide, by default of the map.
    """
    scale = (0.055 + 0.055 * torch.rand((), generator=generator)) * (period or size)
    radius = int(3 * scale)
    window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / scale) ** 2)
    noise = torch.randn(1, 1, size + 2 * radius, size + 2 * radius, generator=generator)
    smooth = F.conv2d(F.conv2d(noise, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    threshold = smooth.quantile(0.35 + 0.25 * torch.rand((), generator=generator))
    inside = _clear_border((smooth > threshold).float())
    inside = dilate(_erode(inside))  # opening
    return _clear_border(_erode(dilate(inside)))  # closing


def _clear_border(x: Tensor) -> Tensor:
    return F.pad(x[..., 1:-1, 1:-1], (1, 1, 1, 1))


def dilate(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _erode(x: Tensor, shape: str = "square") -> Tensor:
    if shape == "square":
        return 1 - dilate(1 - x)
    rows = F.max_pool2d(1 - x, (3, 1), stride=1, padding=(1, 0))
    columns = F.max_pool2d(1 - x, (1, 3), stride=1, padding=(0, 1))
    return 1 - torch.maximum(rows, columns)


def _damage(outline: Tensor, generator: torch.Generator) -> Tensor:
    """Gaps of 1 or 3 pixels at some 4 % of pixels, stray strokes, and noise of deviation 0.15."""
    size = outline.shape[-1]
    holes = outline * (torch.rand(outline.shape, generator=generator) < 1 / 25)
    wide = holes * (torch.rand(outline.shape, generator=generator) < 0.5)
    damaged = outline * (1 - torch.maximum(holes, dilate(wide)))
    for _ in range(round(4 * (size / 32) ** 2)):
        row, column, angle, length = torch.rand(4, generator=generator).tolist()
        along = torch.arange(0, 2 + 4 * length, 0.5)
        direction = torch.tensor(math.pi * angle)
        rows = (row * size + along * direction.sin()).long().clamp(0, size - 1)
        columns = (column * size + along * direction.cos()).long().clamp(0, size - 1)
        damaged[0, 0, rows, columns] = 1
    return damaged + 0.15 * torch.randn(outline.shape, generator=generator)


def flood_fill(x: Tensor, closing: int) -> Tensor:
    """The classical answer: 1 inside and -1 outside, [N, 1, H, W].

    Pixels above 0.5 are walls; gaps in them of up to twice `closing` pixels are closed by a
    dilation and an erosion. Regions between walls take the side opposite to that of the neighbour
    with the longest common wall, from the region outside of all. Walls go to the nearest region.
    """
    from scipy import ndimage  # scikit-image brings it

    walls = (F.pad(x, (1, 1, 1, 1)) > 0.5).float()
    for _ in range(closing):
        walls = dilate(walls)
    for _ in range(closing):
        walls = _erode(walls)
    answers = []
    for wall in walls[:, 0].numpy() > 0:
        regions, count = ndimage.label(~wall)  # 1 is the region at the upper left, outside
        nearest = ndimage.distance_transform_edt(wall, return_distances=False, return_indices=True)
        regions = regions[tuple(nearest)] - 1
        common_wall = np.zeros((count, count))
        for one, other in ((regions[1:], regions[:-1]), (regions[:, 1:], regions[:, :-1])):
            np.add.at(common_wall, (one, other), 1)
            np.add.at(common_wall, (other, one), 1)
        sides = np.zeros(count)
        sides[0] = -1
        for _ in range(count - 1):
            known, unknown = sides.nonzero()[0], (sides == 0).nonzero()[0]
            lengths = common_wall[np.ix_(known, unknown)]
            i, j = np.unravel_index(lengths.argmax(), lengths.shape)
            sides[unknown[j]] = -sides[known[i]]
        answers.append(torch.from_numpy(sides[regions[1:-1, 1:-1]]).float())
    return torch.stack(answers)[:, None]


def score_flood_fill(example: str, make: common.Make, flags: argparse.Namespace) -> None:
    """Chooses the closing on pictures of the training size and prints the scores."""

    def score(closing: int, pictures: common.Pictures) -> float:
        return common.intersection_over_union(partial(flood_fill, closing=closing), pictures)

    held_out = comparison.held_out_pictures(make, flags).values()
    best = max(CLOSINGS, key=lambda closing: sum(score(closing, p) for p in held_out))
    tests = comparison.test_pictures(make, flags)
    iou = {str(size): round(score(best, p), 5) for size, p in tests.items()}
    comparison.record(flags.results, dict(example=example, arm="flood fill", closing=best, iou=iou))


def main(arguments: list[str] | None = None) -> int:
    parser = comparison.parser(
        __doc__, ARMS, ["SDN", "ReNet", "U-Net"], steps=230, sizes=[32, 64, 96, 128, 256]
    )
    parser.add_argument("--damaged", action="store_true", help="gaps, stray strokes and noise")
    parser.add_argument("--flood_fill", action="store_true", help="this instead of networks")
    flags = comparison.parse(parser, arguments)
    example = "enclosed, damaged" if flags.damaged else "enclosed"
    make = partial(make_outlines, damaged=flags.damaged)
    if flags.flood_fill:
        score_flood_fill(example, make, flags)
        return 0
    scores = comparison.compare(example, ARMS, make, flags)
    if flags.quick or flags.damaged or flags.seconds:
        return 0
    return comparison.missed(comparison.means(scores, "SDN"), PROMISED)


if __name__ == "__main__":
    sys.exit(main())
