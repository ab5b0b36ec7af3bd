"""Converts Glow's TFRecord archives to train.lmdb and validation.lmdb; neither TensorFlow nor
unpacking is needed.

python -m data.convert.tfrecords {CelebAHQ256,ImageNet32} --source TAR_OR_FOLDER --target FOLDER
  [--force]

A split is written as NAME.lmdb.partial and renamed when it is complete: a NAME.lmdb is always a
whole one. Images are numbered by shard, then by record. A split that is there already is left alone
unless `--force` is given.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from lib.cli import OneLineParser, one_line_errors
from lib.files import sync
from lib.optional import optional
from lib.progress import progress

from ..errors import DataError
from ..lmdb_datasets import put_images
from ..locks import locked_folder
from ..registry import DATASETS, SPLITS
from ..sets import glow  # noqa: F401 - registers the two data sets
from .tfrecord import parse_example, records

RESOLUTION_LEVELS = {"CelebAHQ256": 8, "ImageNet32": 5}  # log2 of the side, in names of shards
PAGE = 4096
BATCH_BYTES = 2**25


@dataclass(frozen=True)
class Shard:
    """A TFRecord file: its number, of how many its name promises, its path inside the source, its
    size in bytes, and how to open it."""

    number: int
    total: int
    name: str
    size: int
    open: Callable[[], IO[bytes]]


def convert(
    name: str, source: str | Path, target: str | Path, force: bool = False
) -> dict[str, int]:
    """Converts both splits of a data set.

    Arguments:
        name: "CelebAHQ256" or "ImageNet32".
        source: The tar archive, or the folder it was unpacked to.
        target: Folder that gets train.lmdb and validation.lmdb.
        force: Whether to convert a split again that is there already.

    Returns:
        Number of images in each split that was converted.

    Raises:
        DataError: if shards are missing or damaged, an image has another shape, the disk has too
            little room, or another process is converting to the same folder.
    """
    source, target = Path(source), Path(target)
    wanted = [
        split for split in SPLITS if force or not (target / f"{split}.lmdb" / "data.mdb").exists()
    ]
    if not wanted:
        return {}
    with find_shards(name, source) as all_shards:
        shards = {split: check_complete(name, split, all_shards[split], source) for split in wanted}
        with locked_folder(target, wait=False):
            for split in wanted:  # clears away what an interrupted conversion left
                final, partial, old = _paths(target, split)
                shutil.rmtree(partial, ignore_errors=True)
                if old.exists() and not final.exists():  # it stopped between the two renamings
                    old.rename(final)
                shutil.rmtree(old, ignore_errors=True)
            check_room(name, target, sum(shard.size for split in wanted for shard in shards[split]))
            return {split: convert_split(name, split, shards[split], target) for split in wanted}


@contextlib.contextmanager
def find_shards(name: str, source: Path) -> Iterator[dict[str, list[Shard]]]:
    """The shards of each split in an archive or a folder."""
    pattern = re.compile(
        rf"({'|'.join(SPLITS)})-r{RESOLUTION_LEVELS[name]:02d}-s-(\d{{4,}})-of-(\d{{4,}})\.tfrecords"
    )
    found: dict[str, list[Shard]] = {split: [] for split in SPLITS}

    def add(path: str, size: int, open_shard: Callable[[], IO[bytes]]) -> None:
        if match := pattern.fullmatch(path.rsplit("/", 1)[-1]):
            found[match[1]].append(Shard(int(match[2]), int(match[3]), path, size, open_shard))

    if source.is_dir():
        for file in source.rglob("*.tfrecords"):
            path = file.relative_to(source).as_posix()
            add(path, file.stat().st_size, partial(file.open, "rb"))
        yield found
    elif source.is_file():
        try:
            with tarfile.open(source, "r:") as archive:
                for member in progress(archive, desc=f"contents of {source.name}", unit=" files"):
                    if member.isfile():
                        add(member.name, member.size, partial(archive.extractfile, member))
                yield found
        except tarfile.TarError as error:
            raise DataError(
                f"{source} is no whole tar archive ({error}); {_command(name)}"
            ) from None
    else:
        raise DataError(f"there is no {source}; {_command(name)}")


def check_complete(name: str, split: str, found: list[Shard], source: Path) -> list[Shard]:
    """The shards in order, if they are all there and there once."""
    if not found:
        expected = f"{split}/{split}-r{RESOLUTION_LEVELS[name]:02d}-s-0000-of-....tfrecords"
        raise DataError(
            f"{source} has no shards of {name}'s {split} split ({expected}); {_command(name)}"
        )
    totals = {shard.total for shard in found}
    if len(totals) > 1:
        sets = " and ".join(map(str, sorted(totals)))
        raise DataError(f"{source}: shards of {split} come from sets of {sets}")
    (total,) = totals
    shards = sorted(found, key=lambda shard: shard.number)
    numbers = [shard.number for shard in shards]
    if missing := sorted(set(range(total)) - set(numbers)):
        names = [
            f"{split}-r{RESOLUTION_LEVELS[name]:02d}-s-{number:04d}-of-{total:04d}"
            for number in missing
        ]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise DataError(f"{source} lacks {', '.join(names[:5])}{more}; {_command(name)}")
    if len(shards) > total:
        extra = [
            shard.name
            for shard in shards
            if numbers.count(shard.number) > 1 or shard.number >= total
        ]
        raise DataError(
            f"{source} has {len(shards)} shards of {split} instead of {total}: see "
            f"{', '.join(extra[:5])}"
        )
    return shards


def check_room(name: str, target: Path, shard_bytes: int) -> None:
    """Whether the LMDB fits on the disk: a value takes whole pages, its record about as much as the
    raw image."""
    _, height, width = DATASETS[name].shape
    pages = -(-(height * width * 3 + 16) // PAGE)
    needed = int(shard_bytes / (height * width * 3) * (pages * PAGE + 64)) + 2**20
    free = shutil.disk_usage(target).free
    if free < needed:
        raise DataError(
            f"{target} has {free / 1e9:.1f} GB free, the conversion needs about "
            f"{needed / 1e9:.1f} GB: make room"
        )


def convert_split(name: str, split: str, shards: list[Shard], target: Path) -> int:
    """Writes one LMDB, complete or not at all; returns the number of images."""
    final, partial, old = _paths(target, split)
    lmdb = optional("lmdb", "writing an LMDB", "convert", DataError)
    try:
        count = _write(lmdb, partial, images(name, shards, split))
    except lmdb.Error as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(f"{partial} cannot be written ({error}); nothing is kept of it") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if final.exists():  # a folder cannot replace another one in a single step
        os.rename(final, old)
    os.rename(partial, final)
    sync(target)
    shutil.rmtree(old, ignore_errors=True)
    return count


def _paths(target: Path, split: str) -> tuple[Path, Path, Path]:
    """A split's LMDB, the one being written, and the one that is being replaced."""
    return (
        target / f"{split}.lmdb",
        target / f"{split}.lmdb.partial",
        target / f"{split}.old.lmdb.partial",
    )


def images(name: str, shards: list[Shard], split: str) -> Iterator[bytes]:
    """The raw images of the shards in order, checked, under a progress bar."""
    channels, height, width = DATASETS[name].shape
    expected = [height, width, channels]
    total = sum(shard.size for shard in shards)
    with progress(total=total, desc=f"{name} {split}", unit="B", unit_scale=True) as bar:
        for shard in shards:
            number = -1
            with shard.open() as stream:
                for number, record in enumerate(records(stream, shard.name)):
                    where = f"{shard.name}, record {number}"
                    try:
                        example = parse_example(record)
                    except ValueError as error:
                        raise DataError(f"{where}: no tf.train.Example ({error})") from None
                    shape, data = example.get("shape"), example.get("data")
                    if shape != expected:
                        raise DataError(
                            f"{where}: the image's shape is {shape} instead of {expected}"
                        )
                    image = data[0] if data and isinstance(data[0], bytes) else b""
                    if len(image) != height * width * channels:
                        raise DataError(
                            f"{where}: {len(image)} bytes of image instead of "
                            f"{height * width * channels}"
                        )
                    yield image
                    bar.update(len(record) + 16)
            if number < 0:
                raise DataError(f"{shard.name} is empty")


def _write(lmdb: Any, folder: Path, values: Iterator[bytes]) -> int:
    environment = lmdb.open(str(folder), map_size=4 * BATCH_BYTES, sync=False, meminit=False)
    with contextlib.closing(environment):
        count, batch = 0, []
        for value in values:
            batch.append(value)
            if len(batch) * len(value) >= BATCH_BYTES:  # all are of one size
                put_images(environment, count, batch)
                count, batch = count + len(batch), []
        put_images(environment, count, batch)
        environment.sync(True)
    (folder / "lock.mdb").unlink(missing_ok=True)
    return count + len(batch)


def _command(name: str) -> str:
    return f"get it with: {DATASETS[name].command}"


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser("data.convert.tfrecords", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=sorted(RESOLUTION_LEVELS))
    parser.add_argument(
        "--source",
        required=True,
        type=Path,
        help="the tar archive, or the folder it was unpacked to",
    )
    parser.add_argument(
        "--target", required=True, type=Path, help="folder for train.lmdb and validation.lmdb"
    )
    parser.add_argument("--force", action="store_true", help="convert a split again that is there")
    flags = parser.parse_args(arguments)
    with one_line_errors("data.convert.tfrecords", DataError, OSError):
        try:
            counts = convert(flags.dataset, flags.source, flags.target, flags.force)
        except KeyboardInterrupt:
            raise DataError("interrupted; the same command starts the split again") from None
    for split in SPLITS:
        path = flags.target / f"{split}.lmdb"
        print(
            f"{path}: {counts[split]} images"
            if split in counts
            else f"{path} is there already; --force renews it"
        )


if __name__ == "__main__":
    main()
