"""Makes a data set of any pictures: train.lmdb, validation.lmdb and dataset.json in data/NAME.

python -m data.convert.images SOURCE --name cats --size 64

SOURCE is a folder, a ZIP or TAR archive, WebDataset shards, Parquet, .npy or .npz, an LMDB of
encoded pictures, MNIST's idx files, or a data set of the package datasets (docs/data.md). Nothing
is unpacked. An interrupted conversion goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from lib.cli import OneLineParser, one_line_errors
from lib.files import exclusive_folder
from lib.picture_files import FITS
from lib.progress import progress

from ..converted import FORMAT, is_plain
from ..errors import DataError
from ..get_dataset import DATASETS, SPLITS
from .decoding import Decoded, Shape, decode_all, usable_cores
from .sources import Entry, Source, open_source
from .storing import FIRST, Progress, Store, partial_folder

SIDES = range(1, 4097)


@dataclass(frozen=True)
class Options:
    """What a data set is made of and how.

    source: See `open_source`. name: Of its folder. shape: Of the images. validation: A share of
    the pictures, chosen by their content, another source, or a split of this one. flip: Whether
    training is to flip images at random.
    """

    source: str
    name: str
    shape: Shape
    validation: str = "0.05"
    flip: bool = False


def convert(
    options: Options,
    root: Path,
    *,
    processes: int = 0,
    skip_damaged: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Makes the data set, or goes on making it; returns its description.

    Arguments:
        root: The folder of all data sets.
        processes: How many decode beside this one; 0: this one does.
        skip_damaged: Whether to leave out what cannot be read.
        force: Whether to replace a data set that is there.

    Raises:
        DataError: if the source or an option cannot be, or pictures are damaged and are not to be
            left out; what is done is kept.
    """
    target, partial = root / options.name, partial_folder(root, options.name)
    check_name(options.name)
    if target.exists() and not force:
        raise DataError(f"{target} is there already; --force replaces it")
    stages = _stages(options)
    depends_on = asdict(options) | {"sources": [stage.source.identity for stage in stages]}
    try:
        with exclusive_folder(partial, f"another process is making {target}; let it finish"):
            store = Store(partial, json.loads(json.dumps(depends_on)))
            with closing(store):
                for stage in stages:
                    _convert_stage(store, options.shape, stage, processes)
                _check(store.progress, options, skip_damaged)
                description = _description(store, options)
                store.publish(target, description)
    except BlockingIOError as error:
        raise DataError(str(error)) from None
    with suppress(OSError):  # it is gone already, or another conversion began
        partial.rmdir()
    return description


def check_name(name: str) -> None:
    """Raises DataError unless a data set can have this name."""
    if not is_plain(name) or name.startswith(".") or name in DATASETS:
        known = ", ".join(DATASETS)
        raise DataError(f"--name must be a plain folder name and none of {known}; got {name!r}")


@dataclass(frozen=True)
class Stage:
    """A source that is read to its end.

    name: The split that its pictures go to, or "all" where their content chooses it. wanted: Which
    of the source's entries, by their split.
    """

    name: str
    source: Source
    wanted: Callable[[str], bool] = lambda split: True
    validation_share: float = 0

    def place(self, digest: bytes, store: Store) -> str | None:
        """The split that a picture of this digest goes to, or None."""
        if self.name == "all":
            in_validation = int.from_bytes(digest[:8], "big") < self.validation_share * 2**64
            return "validation" if in_validation else "train"
        left_out = self.name == "train" and digest in store.digests["validation"]
        return None if left_out else self.name


def _stages(options: Options) -> list[Stage]:
    """What is read, one after another."""
    source = open_source(options.source)
    share, other = _share(options.validation), options.validation
    if share is not None:
        return [Stage("all", source, validation_share=share)]
    if Path(other).exists():
        return [Stage("validation", open_source(other)), Stage("train", source)]
    return [
        Stage("validation", source, lambda split: split == other),
        Stage("train", source, lambda split: split != other),
    ]


def _share(validation: str) -> float | None:
    try:
        share = float(validation)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise DataError(f"--validation must be above 0 and below 1, or a name; got {validation}")
    return share


def _convert_stage(store: Store, shape: Shape, stage: Stage, processes: int) -> None:
    """Reads a source to its end, from where an earlier run stopped."""
    done = store.progress.entries.get(stage.name, 0)
    seen: dict[str, None] = {}

    def wanted() -> Iterator[Entry]:
        for entry in stage.source.entries():
            if len(seen) < FIRST:
                seen.setdefault(entry.split)
            if stage.wanted(entry.split):
                yield entry

    decoded_entries = decode_all(itertools.islice(wanted(), done, None), shape, processes)
    bar = progress(
        initial=done,
        total=stage.source.total,
        desc=f"{stage.name} of {stage.source.kind}",
        unit=" files",
    )
    with bar, closing(decoded_entries):
        try:
            for decoded in decoded_entries:
                _take(store, stage, decoded)
                store.entry_done(stage.name)
                bar.update()
        finally:
            store.commit()
    if stage.name == "validation" and not store.progress.entries.get("validation"):
        there = ", ".join(repr(split) for split in seen if split) or "none"
        raise DataError(f"--validation: nothing is called so; the source's splits are: {there}")


def _take(store: Store, stage: Stage, decoded: Decoded) -> None:
    """Counts what an entry was, and keeps its images."""
    progress = store.progress
    if not decoded.is_picture:
        progress.other += 1
        return
    if decoded.error:
        progress.damaged += 1
        if len(progress.first_damaged) < FIRST:
            progress.first_damaged.append([decoded.name, decoded.error])
        return
    progress.pictures += 1
    for remark in decoded.remarks:
        progress.remarks[remark] = progress.remarks.get(remark, 0) + 1
    split = stage.place(decoded.digest, store)
    if split is None:
        progress.left_out += 1
        return
    progress.duplicates += decoded.digest in store.digests[split]
    store.add(split, decoded.images, decoded.digest)


def _check(progress: Progress, options: Options, skip_damaged: bool) -> None:
    """Raises DataError unless this is a data set."""
    if progress.damaged and not skip_damaged:
        named = "; ".join(f"{printable(name)}: {why}" for name, why in progress.first_damaged)
        more = progress.damaged - len(progress.first_damaged)
        raise DataError(
            f"{progress.damaged} of {progress.damaged + progress.pictures} pictures cannot be used "
            f"({named}{f'; and {more} more' if more else ''}); --skip_damaged leaves them out"
        )
    if not progress.pictures:
        what = f"; {progress.other} entries are something else" if progress.other else ""
        raise DataError(
            f"{options.source} holds no pictures that can be used{what} (what can be read: "
            "docs/data.md)"
        )
    for split in SPLITS:
        if not progress.images[split]:
            raise DataError(
                f"no picture is left for {split} (there are {progress.pictures}): give another "
                "--validation"
            )


def _description(store: Store, options: Options) -> dict[str, Any]:
    """The content of dataset.json."""
    shape, progress = options.shape, store.progress
    return {
        "format": FORMAT,
        "name": options.name,
        "shape": [shape.channels, shape.height, shape.width],
        "flip": options.flip,
        "images": progress.images,
        "pictures": progress.pictures,
        "duplicates": progress.duplicates,
        "left_out_of_training": progress.left_out,
        "damaged": progress.damaged,
        "first_damaged": progress.first_damaged,
        "no_pictures": progress.other,
        "remarks": progress.remarks,
        "options": asdict(options),
        "sha256": store.content_hash(),
        "versions": {
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "numpy": np.__version__,
        },
    }


def summary(description: dict[str, Any]) -> Iterator[str]:
    """Lines that tell people what was made."""
    channels, height, width = description["shape"]
    images = description["images"]
    yield (
        f"{description['name']}: {images['train']} training and {images['validation']} validation "
        f"images of {width}x{height}, {'grey' if channels == 1 else 'colour'}"
    )
    if description["duplicates"]:
        yield f"{description['duplicates']} have the content of another, in the same split"
    if description["left_out_of_training"]:
        yield f"{description['left_out_of_training']} left out of training: validation has them"
    for remark, count in sorted(description["remarks"].items()):
        yield f"{count}: {remark}"
    if description["no_pictures"]:
        yield f"{description['no_pictures']} files are no pictures"
    if description["damaged"]:
        yield f"{description['damaged']} cannot be used and were left out, such as"
        for name, reason in description["first_damaged"]:
            yield f"  {printable(name)}: {reason}"


def printable(name: str) -> str:
    """A name of any bytes as text that any terminal shows on one line."""
    return name if name.isprintable() else ascii(name)[1:-1]


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of `64` or `64x96`, height first."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) in SIDES for part in parts):
        raise argparse.ArgumentTypeError(
            f"must be a number of pixels up to {SIDES[-1]}, or HEIGHTxWIDTH; got {text}"
        )
    return int(parts[0]), int(parts[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser("data.convert.images", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder, archive, shards, table, arrays or database")
    parser.add_argument("--name", required=True, help="of the data set: its folder in --root")
    parser.add_argument(
        "--size", required=True, type=parse_size, help="pixels of a side, or HEIGHTxWIDTH"
    )
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: grey")
    parser.add_argument(
        "--fit", choices=FITS, default="crop", help="how pictures of another size become images"
    )
    parser.add_argument(
        "--validation",
        default="0.05",
        help="a share, chosen by the pictures' content; another source; or a split (folder) of "
        "the source",
    )
    parser.add_argument("--flip", action="store_true", help="training mirrors images at random")
    parser.add_argument(
        "--skip_damaged", action="store_true", help="leave out what cannot be read, and say so"
    )
    parser.add_argument("--force", action="store_true", help="replace a data set that is there")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument(
        "--num_workers",
        type=int,
        choices=range(1025),
        metavar="INT",
        default=usable_cores(),
        help="processes that decode",
    )
    flags = parser.parse_args(arguments)
    shape = Shape(*flags.size, flags.channels, flags.fit)
    options = Options(flags.source, flags.name, shape, flags.validation, flags.flip)
    with one_line_errors("data.convert.images", DataError, OSError):
        try:
            description = convert(
                options,
                flags.root,
                processes=flags.num_workers,
                skip_damaged=flags.skip_damaged,
                force=flags.force,
            )
        except KeyboardInterrupt:
            raise DataError("interrupted; the same command goes on") from None
    for line in summary(description):
        print(line)
    print(f"{flags.root / flags.name}: train with --dataset {flags.name}")


if __name__ == "__main__":
    main()
