"""How many images a second do the loaders give? CIFAR10, an LMDB of 32x32 images and one of 256x256
images.

    python -m benchmarks.loader --output benchmarks/results/loader.json

The data are random images that the script writes into a temporary folder, in the formats of the
real data sets: batches as CIFAR10 is published, LMDBs as data/convert/tfrecords.py writes them;
reading does not depend on the content, but they are in the page cache. What is timed is the
training loader of `ImageDataModule`, shuffled and flipped as for training, over whole epochs after
one that starts the workers and is not counted. In that one each image is compared with what was
written, and each must come once; else the program ends with status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import lmdb
import numpy as np
import torch

from benchmarks import common
from data.datamodule import ImageDataModule
from data.sets import cifar10

# Data set -> (scale, images, batch of the authors' recipe, images/s to reach on two cores).
QUESTIONS = {
    "CIFAR10": (32, 50_000, 32, 30_000),
    "ImageNet32": (32, 50_000, 32, 20_000),
    "CelebAHQ256": (256, 1000, 4, 800),
}
QUICK = {"CIFAR10": 50, "ImageNet32": 60, "CelebAHQ256": 9}


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


def check(name: str, loader, images: np.ndarray) -> None:
    """Reads an epoch; SystemExit if an image differs from what was written, mirrored or not, or
    comes twice."""
    expected, seen = torch.from_numpy(images).permute(0, 3, 1, 2), []
    for batch, keys in loader:
        indices = keys % len(images)
        same, mirrored = (
            (batch == each).flatten(1).all(1)
            for each in (expected[indices], expected[indices].flip(-1))
        )
        if not (same | mirrored).all():
            sys.exit(f"{name} is not timed: the loader's images are not those that were written")
        seen += indices.tolist()
    whole = len(images) // loader.batch_size * loader.batch_size
    if not len(set(seen)) == len(seen) == whole:
        given = f"an epoch of {len(images)} images gave {len(seen)}, {len(set(seen))} of them new"
        sys.exit(f"{name} is not timed: {given}")


def measure(name: str, folder: Path, options) -> dict:
    """Images per second of a data set's training loader."""
    scale, count, batch, target = QUESTIONS[name]
    count = QUICK[name] if options.quick else count
    generator = np.random.default_rng(0)
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
    with mock.patch.object(cifar10, "FILES", sums):
        module = ImageDataModule(name, str(folder), batch, batch, options.workers, seed=0)
        module.setup()
    loader = module.train_dataloader()
    check(name, loader, splits["train"])
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few images, 1 epoch")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 1
    if options.workers < 0 or options.epochs < 1:
        parser.error("--workers must be at least 0, --epochs at least 1")
    result = common.stamp("loader", arguments, "cpu", ("pytorch-lightning", "lmdb")) | {
        "workers": options.workers
    }
    with tempfile.TemporaryDirectory() as folder:
        result["rows"] = [measure(name, Path(folder), options) for name in options.datasets]
    common.write(result, options.output)
    columns = {
        "dataset": "",
        "scale": "d",
        "images": "d",
        "batch": "d",
        "images_per_s": ",.0f",
        "over_target": ".2f",
    }
    print(common.table(result["rows"], columns))


if __name__ == "__main__":
    main()
