"""An existing network, some of whose convolutions are replaced: a U-Net reads reliefs.

A picture is the shading of a relief, lit from the top left and grainy. Some parts are raised,
others engraved, and they differ in nothing but which of their edges are bright: inside a part, as
far as it reaches, there is nothing to be seen. `convert` replaces the convolutions of the U-Net's
lowest scale by spatial dependency layers; the rest stays as it is. This is how most networks would
use the layer::

    python -m examples.segmentation
    python -m examples.segmentation --seconds 30    # equal processor time instead of equal steps

Pictures of all sizes show the same number of parts: larger ones are as photographs with more
pixels, which is where a network that was trained on small ones may fail.

PROMISE
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from examples import common, comparison, networks
from examples.enclosed import blobs, dilate
from lib import convert

PROMISED: dict[str, float] = {}


def converted(keep_function: bool) -> nn.Module:
    """The U-Net with layers of all four directions at its lowest scale, which start as the
    convolutions that they replace, or as new ones."""
    network = networks.UNet(1, 12, 3)
    convert(network, where="down.3.*", num_features=16, keep_function=keep_function)
    return network


ARMS = {
    "U-Net": partial(networks.UNet, 1, 12, 3),
    "U-Net, converted": partial(converted, keep_function=True),
    "U-Net, new layers": partial(converted, keep_function=False),
    "U-Net, wider": partial(networks.UNet, 1, 16, 3),
    "U-Net, one scale more": partial(networks.UNet, 1, 12, 4),
    "U-Net, attention": partial(networks.UNet, 1, 12, 3, attention=True),
}


def make_reliefs(count: int, size: int, seed: int) -> common.Pictures:
    """Shadings [count, 1, size, size], the raised parts, and ones."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(blobs(size, generator), blobs(size, generator)) for _ in range(count)]
    raised, engraved = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    engraved = engraved * (1 - dilate(dilate(raised)))
    heights = F.avg_pool2d(F.pad(raised - engraved, (1, 1, 1, 1)), 3, stride=1)
    down, right = torch.gradient(heights, dim=(2, 3))
    slope = 2 * (down + right) / 2**0.5  # rising, as seen from the light
    shading = (1 + slope) / (1 + slope**2).sqrt() - 1
    shading = shading + 0.2 * torch.randn(shading.shape, generator=generator)
    return shading, raised, torch.ones_like(raised)


def main(arguments: list[str] | None = None) -> int:
    parser = comparison.parser(
        __doc__,
        ARMS,
        ["U-Net", "U-Net, converted", "U-Net, new layers"],
        steps=200,
        train_sizes=[48],
        sizes=[48, 96, 192],
    )
    flags = comparison.parse(parser, arguments)
    scores = comparison.compare("segmentation", ARMS, make_reliefs, flags)
    if flags.quick or flags.seconds:
        return 0
    return comparison.missed(comparison.means(scores, "U-Net, converted"), PROMISED)


if __name__ == "__main__":
    sys.exit(main())
