"""ImageNet32 and CelebAHQ256 from the archives of Glow (Kingma and Dhariwal 2018), converted to
LMDBs by `data.convert.tfrecords`."""

from __future__ import annotations

from pathlib import Path

from ..lmdb_datasets import LmdbImages
from ..registry import DatasetSpec, command_for, register


def _register(name: str, size: int, flip: bool, script: str) -> None:
    shape, command = (3, size, size), f"bash data/{name}/{script}"

    def opened(root: Path, split: str) -> LmdbImages:
        return LmdbImages(root / name / f"{split}.lmdb", shape, command_for(root, command))

    register(DatasetSpec(name, shape, flip, command, opened))


_register("ImageNet32", 32, flip=False, script="get_imagenet_data.sh")
_register("CelebAHQ256", 256, flip=True, script="get_celeb_data.sh")
