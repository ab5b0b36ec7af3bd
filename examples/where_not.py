"""Two tasks in which the answer at a pixel depends on what is near it: convolutions are as good.

`noise`: which pixels belong to blobs, seen through noise as strong as they are? `scratches`: which
pixels of a photograph are scratched? Both are answered from some ten pixels around, and from the
same ten pixels on maps of every size, so that nothing is to be gained by sweeps over all of them::

    python -m examples.where_not
    python -m examples.where_not --seconds 15    # equal processor time instead of equal steps

The numbers that it promises: with the default flags, the SDN's mean intersection over union exceeds
that of the convolutions nowhere by more than 0.01, or the exit status is 1. Measured at 32x32 and
96x96 (three seeds): convolutions 0.851 and 0.866, SDN 0.791 and 0.845 on noise; 0.542 and 0.533
against 0.305 and 0.327 on scratches, in half the time (docs/beyond-vaes.md). Nothing is promised
for `--quick` or `--seconds`.
"""

import math
import sys

import torch
from torch import Tensor

from examples import common, comparison, networks
from examples.enclosed import blobs

ARMS = networks.arms(1)
MARGIN = 0.01
WEIGHT = 5.0  # of scratched pixels, which are 4 % of all: with 1, no arm finds any in 100 steps
TRAINING_SHARE = 0.75  # of each photograph's width; the rest is for tests


def make_noise(count: int, size: int, seed: int) -> common.Pictures:
    """Blobs plus noise of deviation 1 [count, 1, size, size], the blobs, and ones."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.cat([blobs(size, generator, period=32) for _ in range(count)])
    x = truth + torch.randn(truth.shape, generator=generator)
    return x, truth, torch.ones_like(truth)


def make_scratches(count: int, size: int, seed: int) -> common.Pictures:
    """Scratched grey photographs [count, 1, size, size], the scratches, and weights.

    Scratches are straight, a pixel wide and 4 to 12 long, brighter or darker than what they cover.
    Seed 0 draws from the left three quarters of each photograph, other seeds from the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    regions = [r for r in _regions(training=seed == 0) if min(r.shape) >= size]
    pictures, truths = [], []
    for _ in range(count):
        region = regions[int(torch.randint(len(regions), (), generator=generator))]
        top, left = (
            int(torch.randint(extent - size + 1, (), generator=generator))
            for extent in region.shape
        )
        truth, strength = torch.zeros(2, size, size)
        for _ in range(round(4 * (size / 32) ** 2)):
            row, column, angle, length, shade, sign = torch.rand(6, generator=generator).tolist()
            along = torch.arange(0, 4 + 8 * length, 0.5)
            rows = (row * size + along * math.sin(math.pi * angle)).long().clamp(0, size - 1)
            columns = (column * size + along * math.cos(math.pi * angle)).long().clamp(0, size - 1)
            truth[rows, columns] = 1
            strength[rows, columns] = (0.1 + 0.2 * shade) * (1 if sign > 0.5 else -1)
        pictures.append(region[top : top + size, left : left + size] + strength)
        truths.append(truth)
    x = torch.stack(pictures)[:, None] - 0.5
    truth = torch.stack(truths)[:, None]
    return 2 * x, truth, 1 + (WEIGHT - 1) * truth


def _regions(training: bool) -> list[Tensor]:
    """Parts of grey photographs, [H, W] in [0, 1]."""
    from skimage import data

    regions = []
    for photograph in (data.astronaut(), data.cat(), data.coffee(), data.rocket(), data.camera()):
        grey = torch.from_numpy(photograph.copy()).float() / 255
        grey = grey.mean(2) if grey.dim() == 3 else grey
        border = int(TRAINING_SHARE * grey.shape[1])
        regions.append(grey[:, :border] if training else grey[:, border:])
    return regions


TASKS = {"noise": make_noise, "scratches": make_scratches}


def lead_of_convolutions(task: str, scores: comparison.Scores) -> dict[str, float]:
    """By how much the better one of the convolutions' arms exceeds the SDN, at each size."""
    if "SDN" not in scores or len(scores) == 1:
        return {}
    means = {arm: {size: sum(v) / len(v) for size, v in at.items()} for arm, at in scores.items()}
    sdn = means.pop("SDN")
    return {
        f"{task} at {size}, convolutions minus SDN": max(m[size] for m in means.values())
        - sdn[size]
        for size in sdn
    }


def main(arguments: list[str] | None = None) -> int:
    parser = comparison.parser(__doc__, ARMS, ["SDN", "convolutions"], steps=100, sizes=[32, 96])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    flags = comparison.parse(parser, arguments)
    status = 0
    picture = flags.picture
    for task in flags.tasks:
        if picture:
            flags.picture = picture.with_stem(f"{picture.stem}_{task}")
        scores = comparison.compare(f"where_not, {task}", ARMS, TASKS[task], flags)
        if not (flags.quick or flags.seconds):
            lead = lead_of_convolutions(task, scores)
            status |= comparison.missed(lead, dict.fromkeys(lead, -MARGIN))
    return status


if __name__ == "__main__":
    sys.exit(main())
