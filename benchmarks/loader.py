"""How many images a second do the training loaders give?

    python -m benchmarks.loader --output benchmarks/results/loader.json
    python -m benchmarks.loader --datasets 3DShapes --root data --workers 0

CIFAR10, an LMDB of 32x32 images and one of 256x256 images are random images that the script writes
into a temporary folder, in the formats of the real data sets: batches as CIFAR10 is published,
LMDBs as data/convert/tfrecords.py writes them; reading does not depend on the content. The scenes
of Shapes3DRendered are rendered when they are read. 3DShapes is only timed if it is asked for: it
is read from ROOT/3DShapes/3dshapes.h5, for which `python -m data.convert.shapes3d render` makes up.

What is timed is the training loader of `ImageDataModule`, shuffled and flipped as for training,
over whole epochs after one that starts the workers and is not counted; files are in the page cache
if there is room. In that one each image is compared with what was written, or with the data set's
item read alone, and each must come once; else the program ends with status 1.
"""

from __future__ import annotations

import hashlib
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import lmdb
import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from data.datamodule import ImageDataModule
from data.errors import DataError
from data.sets import cifar10
from lib.cli import one_line_errors

# Data set -> (scale, images of an epoch, batch of the authors' recipe, images/s to reach on two
# cores).
QUESTIONS = {
    "CIFAR10": (32, 50_000, 32, 30_000),
    "ImageNet32": (32, 50_000, 32, 20_000),
    "CelebAHQ256": (256, 1000, 4, 800),
    "Shapes3DRendered": (64, 25_000, 128, 20_000),
    "3DShapes": (64, 25_000, 128, 5_000),
}
QUICK = {"CIFAR10": 50, "ImageNet32": 60, "CelebAHQ256": 9}
SCENES = ("Shapes3DRendered", "3DShapes")
QUICK |= dict.fromkeys(SCENES, 260)


def write_lmdb(folder: Path, images: np.ndarray) -> None:
    """Images [N, H, W, 3]: key = decimal index as ASCII, value = raw bytes."""
    folder.mkdir(parents=True)
    environment = lmdb.open(str(folder), map_size=2 * images.nbytes + 2**22)
    with environment, environment.begin(write=True) as transaction:
        for index, image in enumerate(images):
            transaction.put(str(index).encode(), image.tobytes())


def write_cifar10(folder: Path, splits: dict[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """Images [N, 32, 32, 3] in CIFAR10's unpacked files, and the check sums that are to be expected
    of them."""
    folder = folder / cifar10.FOLDER
    folder.mkdir(parents=True)
    sums = {}
    for split, names in cifar10.FILES.items():
        sums[split] = {}
        for name, part in zip(names, np.array_split(splits[split], len(names)), strict=True):
            pixels = np.ascontiguousarray(part.transpose(0, 3, 1, 2)).reshape(len(part), -1)
            data = pickle.dumps({"data": pixels, "labels": [0] * len(part)}, protocol=3)
            (folder / name).write_bytes(data)
            sums[split][name] = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return sums


def check(name: str, loader, written: Sequence[Tensor], epoch: int) -> None:
    """Reads an epoch of so many images; SystemExit if one differs from that of the same index,
    mirrored or not, or comes twice."""
    seen = []
    for batch, keys in loader:
        indices = (keys % len(written)).tolist()
        images = torch.stack([written[index] for index in indices])
        same, mirrored = ((batch == each).flatten(1).all(1) for each in (images, images.flip(-1)))
        if not (same | mirrored).all():
            sys.exit(f"{name} is not timed: the loader's images are not those that were written")
        seen += indices
    if not len(set(seen)) == len(seen) == epoch:
        given = f"an epoch of {epoch} images gave {len(seen)}, {len(set(seen))} of them new"
        sys.exit(f"{name} is not timed: {given}")


def write_random(name: str, folder: Path, count: int) -> tuple[Tensor, dict]:
    """Writes a data set of so many random training images; these, [N, 3, H, W], and the sums of
    CIFAR10's files."""
    generator, (scale, *_) = np.random.default_rng(0), QUESTIONS[name]
    splits = {
        split: generator.integers(0, 256, (number, scale, scale, 3), dtype=np.uint8)
        for split, number in (("train", count), ("validation", 5))
    }
    sums = cifar10.FILES
    if name == "CIFAR10":
        sums = write_cifar10(folder / name, splits)
    else:
        for split, images in splits.items():
            write_lmdb(folder / name / f"{split}.lmdb", images)
    return torch.from_numpy(splits["train"]).permute(0, 3, 1, 2), sums


def read_through(path: Path) -> None:
    """Into the page cache, if there is room."""
    with path.open("rb", buffering=0) as file:
        while file.read(2**24):
            pass


def measure(name: str, folder: Path, options) -> dict:
    """Images per second of a data set's training loader; what it makes is in the folder."""
    scale, count, batch, target = QUESTIONS[name]
    count, sums = QUICK[name] if options.quick else count, cifar10.FILES
    if name in SCENES:
        folder = options.root
    else:
        written, sums = write_random(name, folder, count)
    with mock.patch.object(cifar10, "FILES", sums):
        sizes = dict(epoch_images=count if name in SCENES else 0)
        module = ImageDataModule(name, str(folder), batch, batch, options.workers, 0, **sizes)
        module.setup()
    if name in SCENES:
        written = module.train.dataset
    if name == "3DShapes":
        read_through(written.path)
    loader = module.train_dataloader()
    check(name, loader, written, count // batch * batch)
    rates = []
    for epoch in range(options.epochs):
        loader.sampler.set_epoch(epoch + 1)
        start = time.perf_counter()
        images = sum(len(keys) for _, keys in loader)
        rates.append(images / (time.perf_counter() - start))
    rate = statistics.median(rates)
    row = {"dataset": name, "scale": scale, "images": count, "batch": batch, "epochs": len(rates)}
    return row | {"images_per_s": rate, "target": target, "over_target": rate / target}


def main(arguments: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__)
    made = [name for name in QUESTIONS if name != "3DShapes"]
    parser.add_argument("--datasets", nargs="+", choices=list(QUESTIONS), default=made)
    parser.add_argument("--root", type=Path, default=Path("data"), help="where 3DShapes is")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=common.positive, default=5)
    parser.add_argument("--quick", action="store_true", help="a few images, 1 epoch")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 1
    if options.workers < 0:
        parser.error("--workers must be at least 0")
    packages = ("pytorch-lightning", "lmdb", "h5py")
    result = common.stamp("benchmarks.loader", arguments, "cpu", packages)
    result["workers"] = options.workers
    with (
        one_line_errors("benchmarks.loader", DataError, OSError),
        tempfile.TemporaryDirectory() as folder,
    ):
        result["rows"] = [measure(name, Path(folder), options) for name in options.datasets]
        common.write(result, options.output)
    columns = {"dataset": "", "scale": "d", "images": "d", "batch": "d"}
    columns |= {"images_per_s": ",.0f", "over_target": ".2f"}
    print(common.table(result["rows"], columns))


if __name__ == "__main__":
    main()
