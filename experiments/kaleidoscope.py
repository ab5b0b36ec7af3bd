"""Makes a data set whose pictures have structure that reaches from border to border.

    python -m experiments.kaleidoscope [--root data]

A picture is a patch of Photos32 mirrored to the right and downwards, 64x64. It holds no more than
the patch: who knows one quarter knows the others, as far away as they are.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.convert.decoding import Shape
from data.convert.images import Options, convert
from data.errors import DataError
from data.sets.photos32 import Photos32
from lib.cli import OneLineParser, one_line_errors

PROGRAM = "experiments.kaleidoscope"
NAME = "kaleidoscope"
SIZES = {"train": 8192, "validation": 512}


def mirrored(patches: Tensor) -> Tensor:
    """Patches [..., H, W] with their mirror images, [..., 2H, 2W]."""
    wide = torch.cat([patches, patches.flip(-1)], dim=-1)
    return torch.cat([wide, wide.flip(-2)], dim=-2)


def make(root: Path, sizes: dict[str, int] = SIZES) -> None:
    """Writes the data set into the folder of all data sets, unless it is there.

    Arguments:
        sizes: Number of pictures of each split.

    Raises:
        DataError: if it cannot be written, or another data set of this name is there.
    """
    if (root / NAME).exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for split, size in sizes.items():
            patches, generator = Photos32(split), torch.Generator().manual_seed(0)
            drawn = torch.stack([patches.draw(index, generator) for index in range(size)])
            files[split] = Path(folder) / f"{split}.npy"
            np.save(files[split], mirrored(drawn).permute(0, 2, 3, 1).numpy())
        options = Options(
            str(files["train"]), NAME, Shape(64, 64, 3, "crop"), str(files["validation"])
        )
        convert(options, root)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("data"), help="of all data sets")
    flags = parser.parse_args(arguments)
    with one_line_errors(PROGRAM, DataError, OSError):
        make(flags.root)
    print(f"{flags.root / NAME}: {', '.join(f'{n:,} {split}' for split, n in SIZES.items())}")


if __name__ == "__main__":
    sys.exit(main())
