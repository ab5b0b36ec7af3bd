"""How many bits/dim a histogram of each colour needs: the figure that a model of images has to
beat.

python -m data.histogram Photos32 [--nbits 8] [--root data]
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from lib.cli import OneLineParser, one_line_errors

from .datamodule import IndexedImages
from .errors import DataError
from .get_dataset import get_dataset


def histogram_bits_per_dim(train: Dataset, validation: Dataset, nbits: int = 8) -> float:
    """Cross-entropy in bits/dim of the validation pixels under each colour's histogram of the
    training pixels.

    Every level counts once more than it occurs, so that none has probability zero. Data sets with
    random augmentation give one epoch of draws.
    """
    train_counts = colour_histogram(IndexedImages(train, augment=True, flip=False, seed=0), nbits)
    validation_counts = colour_histogram(
        IndexedImages(validation, augment=False, flip=False, seed=0), nbits
    )
    smoothed = train_counts + 1
    bits = -torch.log2(smoothed / smoothed.sum(1, keepdim=True))
    return ((validation_counts * bits).sum() / validation_counts.sum()).item()


def colour_histogram(images: IndexedImages, nbits: int) -> torch.Tensor:
    """Occurrences of each level of each colour: float64 [C, 2^nbits]."""
    counts = torch.zeros(len(images[0][0]), 2**nbits, dtype=torch.float64)
    for index in range(len(images)):
        levels = (images[index][0] >> (8 - nbits)).flatten(1).long()
        counts += torch.stack([torch.bincount(colour, minlength=2**nbits) for colour in levels])
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser("data.histogram", description="bits/dim of a histogram of each colour")
    parser.add_argument("dataset", help="name of a data set")
    parser.add_argument("--nbits", type=int, default=8, choices=range(1, 9))
    parser.add_argument("--root", default="data")
    flags = parser.parse_args(arguments)
    with one_line_errors("data.histogram", DataError):
        splits = [
            get_dataset(flags.dataset, flags.root, split) for split in ("train", "validation")
        ]
        bits = histogram_bits_per_dim(*splits, flags.nbits)
    print(f"{flags.dataset}, {flags.nbits} bits: histogram of each colour: {bits:.3f} bits/dim")


if __name__ == "__main__":
    main()
