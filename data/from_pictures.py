"""The data set of `--dataset`: a name, or pictures of which one is made the first time."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from .convert.decoding import Shape, usable_cores
from .convert.images import Options, convert, summary
from .convert.sources import HUB
from .converted import COMMAND, converted_names, read_description
from .errors import DataError
from .get_dataset import DATASETS, DatasetSpec, dataset_spec


def known_data_set(dataset: str, root: Path) -> bool:
    """Whether this is the name of a data set, or seems to be the path of pictures."""
    if dataset in DATASETS or dataset in converted_names(root):
        return True
    return dataset.startswith(HUB) or "/" in dataset or Path(dataset).exists()


def data_set_of(dataset: str, root: Path, image_size: Sequence[int], channels: int) -> DatasetSpec:
    """The data set of a name, or the one that is made of a path's pictures in the folder `root`.

    Arguments:
        image_size: (height, width) or a number for both, of the images that pictures are made to;
            empty for the data set's own.
        channels: Theirs; 0: the data set's own, or 3.

    Raises:
        DataError: if there is none, the size is missing or is not the data set's, or pictures
            cannot be used.
    """
    size = (image_size[0], image_size[-1]) if image_size else None
    if dataset in DATASETS or dataset in converted_names(root):
        spec = dataset_spec(dataset, root)
        if size and size != spec.shape[1:] or channels and channels != spec.shape[0]:
            has = "{} x {}x{}".format(*spec.shape)
            raise DataError(
                f"--image_size and --channels are for pictures that are converted: {dataset} has "
                f"{has} (channels x height x width)"
            )
        return spec
    if not dataset.startswith(HUB) and not Path(dataset).exists():
        raise DataError(f"--dataset {dataset}: there are no such pictures and no such data set")
    if not size:
        raise DataError(f"--dataset {dataset}: pictures need --image_size, such as --image_size 64")
    return _made_of(dataset, root, size, channels or 3)


def _made_of(source: str, root: Path, size: tuple[int, int], channels: int) -> DatasetSpec:
    source = source if source.startswith(HUB) else os.path.abspath(source)
    stem = source.removeprefix(HUB).rstrip("/").rsplit("/", 1)[-1].split(".")[0] or "pictures"
    name = f"{stem}-{size[0]}x{size[1]}{'-grey' if channels == 1 else ''}"
    options = Options(source, name, Shape(*size, channels, "crop"))
    command = (
        f"{COMMAND} {shlex.quote(source)} --name {shlex.quote(name)} --size {size[0]}x{size[1]} "
        f"--channels {channels} --root {shlex.quote(str(root))}"
    )
    found = read_description(root, name)
    if found and found.get("options", {}).get("source") != source:
        raise DataError(
            f"{root / name} was made of other pictures: give these another --name in: {command}"
        )
    if not found:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise DataError(f"for several processes, first convert the pictures: {command}")
        root.mkdir(parents=True, exist_ok=True)
        try:
            for line in summary(convert(options, root, processes=usable_cores())):
                print(line)
        except DataError as error:
            raise DataError(
                f"{error} [the conversion alone, with its options: {command}]"
            ) from None
    return dataset_spec(name, root)
