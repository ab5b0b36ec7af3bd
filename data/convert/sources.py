"""Where pictures come from: folders, archives, shards, tables, arrays, databases. Each gives its
entries one after another, in an order that is the same every time, without being unpacked."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from lib.optional import optional
from lib.picture_files import MOST_BYTES

from ..errors import DataError
from ..lmdb_datasets import size_in_use

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IDX = re.compile(r"(train|t10k|test|emnist.*)-images[-.]idx3-ubyte(\.gz)?")
HUB = "hf:"  # before a name for the package datasets


@dataclass(frozen=True)
class Entry:
    """Something that may be a picture.

    name: What to call it. split: The folder, array or split of its source that it is from.
    content: A file's path or its content, or levels uint8 [H, W, C]; a reason why it cannot be had.
    """

    name: str
    split: str
    content: Path | bytes | np.ndarray | str


@dataclass(frozen=True)
class Source:
    """A place with pictures.

    kind: In words. identity: Changes when the place's content seems to have changed. entries: What
    is in it, in a fixed order. total: How many entries there are, if that is known.
    """

    kind: str
    identity: str
    entries: Callable[[], Iterator[Entry]]
    total: int | None = None


def open_source(source: str) -> Source:
    """What a path, a pattern of shards' paths or a name stands for.

    Arguments:
        source: A folder of pictures; a ZIP or TAR archive; WebDataset shards, as a folder or a
            pattern such as `cats-{000..017}.tar` or `cats-*.tar`; a Parquet file or a folder of
            them; `.npy`, `.npz`; an LMDB of encoded pictures; MNIST's idx files, one or their
            folder; what the package datasets saved; `hf:NAME`, a data set that it downloads.

    Raises:
        DataError: if there is nothing of these kinds.
    """
    if source.startswith(HUB):
        return _hugging_face(source)
    path = Path(source)
    if not path.exists():
        shards = _shards(source)
        if not shards:
            raise DataError(f"there is no {source}; a data set of the Hugging Face hub is hf:NAME")
        return _tars(shards)
    if path.is_dir():
        return _in_folder(path)
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet([path])
    if name.endswith((".npy", ".npz")):
        return _numpy(path)
    if IDX.fullmatch(path.name):
        return _idx([path])
    if name.endswith(".mdb"):
        return _lmdb(path)
    if name.endswith(TARS) or tarfile.is_tarfile(path):
        return _tars([path])
    if zipfile.is_zipfile(path):
        return _zip(path)
    if name.endswith(".zip"):
        raise DataError(f"{path} is no whole ZIP archive: get it again")
    raise DataError(
        f"{path} is neither a folder nor a ZIP, TAR, Parquet, .npy, .npz, LMDB or idx file"
    )


def _in_folder(path: Path) -> Source:
    if (path / "data.mdb").is_file():
        return _lmdb(path)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _hugging_face(str(path))
    names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
    if idx := [path / name for name in names if IDX.fullmatch(name)]:
        return _idx(idx)
    shards = [path / name for name in names if name.endswith(TARS)]
    if shards and all(name.endswith((*TARS, ".json")) for name in names):
        return _tars(shards)
    tables = [path / name for name in names if name.endswith(".parquet")]
    if not tables and (path / "data").is_dir():  # as the hub stores a data set
        tables = sorted((path / "data").glob("*.parquet"))
    return _parquet(tables) if tables else _folder(path)


def _folder(root: Path) -> Source:
    names = sorted(_files_below(root))
    digest = hashlib.sha256(b"\0".join(os.fsencode(name) for name in names)).hexdigest()

    def entries() -> Iterator[Entry]:
        return (Entry(name, _first_folder(name), root / name) for name in names)

    return Source("a folder", f"{root.resolve()} {digest}", entries, len(names))


def _files_below(root: Path) -> Iterator[str]:
    """Paths relative to the folder, without hidden ones. Links to folders are followed, each folder
    once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        relative = os.path.relpath(folder, root)
        for name in files:
            if not _hidden(name):
                yield name if relative == "." else f"{relative}/{name}"


def _zip(path: Path) -> Source:
    def entries() -> Iterator[Entry]:
        with _whole(path, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir() or _hidden(info.filename):
                    continue
                try:
                    content = _limited(archive.open(info))
                except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError) as error:
                    content = f"unreadable in the archive ({error})"
                yield Entry(info.filename, _first_folder(info.filename), content)

    return Source("a ZIP archive", _identity([path]), entries)


def _tars(paths: list[Path]) -> Source:
    def entries() -> Iterator[Entry]:
        for path in paths:
            with _whole(path, tarfile.TarError, zlib.error):
                _check_end(path)
                with tarfile.open(path, "r|*") as archive:
                    for member in archive:
                        if member.isfile() and not _hidden(member.name):
                            name = member.name if len(paths) == 1 else f"{path.name}/{member.name}"
                            content = _limited(archive.extractfile(member))
                            yield Entry(name, _first_folder(member.name), content)
                        archive.members = []  # otherwise it remembers all

    return Source("TAR archives", _identity(paths), entries)


def _check_end(path: Path) -> None:
    """Raises DataError for a TAR without compression that is cut off between two of its files,
    which its reader takes for the end."""
    with path.open("rb") as file:
        file.seek(257)
        plain = file.read(5) == b"ustar"
        file.seek(-512, os.SEEK_END)
        if plain and any(file.read()):
            raise DataError(f"{path} is cut off: its last block is not the end mark of a TAR")


def _parquet(paths: list[Path]) -> Source:
    pyarrow = optional("pyarrow", "reading Parquet", "images", DataError)
    from pyarrow import parquet

    def is_picture(kind: Any) -> bool:
        inside = kind.field("bytes").type if _has_bytes(pyarrow, kind) else kind
        return pyarrow.types.is_binary(inside) or pyarrow.types.is_large_binary(inside)

    def entries() -> Iterator[Entry]:
        for path in paths:
            with _whole(path, pyarrow.ArrowException), parquet.ParquetFile(path) as file:
                columns = [field.name for field in file.schema_arrow if is_picture(field.type)]
                if not columns:
                    raise DataError(f"{path} has no column of encoded pictures (bytes)")
                rows = itertools.chain.from_iterable(
                    batch.column(0).to_pylist()
                    for batch in file.iter_batches(batch_size=64, columns=columns[:1])
                )
                split = re.split(r"[-_.]", path.name)[0]
                for number, row in enumerate(rows):
                    yield _row(f"{path.name}/{number}", split, row)

    return Source("Parquet", _identity(paths), entries)


def _has_bytes(pyarrow: Any, kind: Any) -> bool:
    return pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _row(name: str, split: str, row: Any) -> Entry:
    content = row.get("bytes") if isinstance(row, dict) else row
    return Entry(name, split, content if content is not None else "there are no bytes")


def _hugging_face(source: str) -> Source:
    datasets = optional("datasets", source, "images", DataError)

    def opened() -> dict[str, Any]:
        try:
            if source.startswith(HUB):
                return dict(datasets.load_dataset(source.removeprefix(HUB), streaming=True))
            found = datasets.load_from_disk(source)
        except Exception as error:  # of the network, of the hub, of damaged files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{source} cannot be opened ({reason})") from None
        return dict(found) if isinstance(found, dict) else {"train": found}

    def entries() -> Iterator[Entry]:
        for split, table in sorted(opened().items()):
            kinds = table.features or {}
            columns = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
            if not columns:
                raise DataError(f"{source}: its split {split} has no column of pictures")
            table = table.select_columns(columns[:1])
            table = table.cast_column(columns[0], datasets.Image(decode=False))
            for number, row in enumerate(table):
                yield _row(f"{split}/{number}", split, row[columns[0]])

    return Source("a data set of the package datasets", source, entries)


def _lmdb(path: Path) -> Source:
    lmdb = optional("lmdb", "reading an LMDB", "images", DataError)
    file = path / "data.mdb" if path.is_dir() else path
    options = dict(readonly=True, lock=False, readahead=False, subdir=path.is_dir())

    def entries() -> Iterator[Entry]:
        with (
            _whole(path, lmdb.Error),
            closing(lmdb.open(str(path), **options)) as environment,
        ):
            if file.stat().st_size < size_in_use(environment):
                raise lmdb.Error("the file is cut off")
            with environment.begin() as transaction:
                for key, value in transaction.cursor():
                    yield Entry(os.fsdecode(key), "", bytes(value))

    return Source("an LMDB", _identity([file]), entries)


def _numpy(path: Path) -> Source:
    def entries() -> Iterator[Entry]:
        with _whole(path, zipfile.BadZipFile, zlib.error, ValueError):
            if path.suffix.lower() == ".npy":
                with path.open("rb") as stream:
                    yield from _array(stream, path.name, "", required=True)
                return
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    with archive.open(name) as stream:
                        yield from _array(stream, name.removesuffix(".npy"), name[:-4])

    return Source("arrays", _identity([path]), entries)


def _array(stream: IO[bytes], name: str, split: str, *, required: bool = False) -> Iterator[Entry]:
    """Pictures of a stored array, image by image; nothing if it holds something else."""
    version = np.lib.format.read_magic(stream)
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if version[0] not in read_header:
        raise ValueError(f"{name} has an unknown version of the format")
    shape, in_columns, dtype = read_header[version[0]](stream)
    channels_first = len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3)
    pictures = len(shape) == 3 or len(shape) == 4 and (channels_first or shape[3] in (1, 3))
    if dtype != np.uint8 or in_columns or not pictures:
        if required:
            raise DataError(
                f"{name} must be uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] in C order with 1 "
                f"or 3 channels; it is {dtype} {list(shape)}"
            )
        return
    image = np.empty(shape[1:] if len(shape) == 4 else (*shape[1:], 1), np.uint8)
    for number in range(shape[0]):
        content = stream.read(image.size)
        if len(content) < image.size:
            raise ValueError(f"{name} ends in image {number} of {shape[0]}")
        levels = np.frombuffer(content, np.uint8).reshape(image.shape)
        levels = np.ascontiguousarray(levels.transpose(1, 2, 0)) if channels_first else levels
        yield Entry(f"{name}/{number}", split, levels)


def _idx(paths: list[Path]) -> Source:
    def entries() -> Iterator[Entry]:
        for path in paths:
            opened = gzip.open if path.suffix == ".gz" else open
            with _whole(path, struct.error, zlib.error, ValueError), opened(path, "rb") as stream:
                magic, count, height, width = struct.unpack(">IIII", stream.read(16))
                if magic != 0x803:
                    raise ValueError("it does not begin as an idx file of images")
                split = "train" if path.name.startswith("train") else "test"
                for number in range(count):
                    content = stream.read(height * width)
                    if len(content) < height * width:
                        raise ValueError(f"it ends in image {number} of {count}")
                    levels = np.frombuffer(content, np.uint8).reshape(height, width, 1)
                    yield Entry(f"{path.name}/{number}", split, levels)

    return Source("idx files", _identity(paths), entries)


def _shards(pattern: str) -> list[Path]:
    """Files that a pattern with `*`, `?` or one `{first..last}` names."""
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbers.groups()
        names = [
            f"{pattern[: numbers.start()]}{number:0{len(first)}d}{pattern[numbers.end() :]}"
            for number in range(int(first), int(last) + 1)
        ]
        if missing := [name for name in names if not Path(name).is_file()]:
            raise DataError(f"there is no {missing[0]} ({len(missing)} of {len(names)} lack)")
        return [Path(name) for name in names]
    path = Path(pattern)
    return sorted(path.parent.glob(path.name)) if set(path.name) & set("*?") else []


def _limited(stream: IO[bytes]) -> bytes | str:
    """The content, unless it is larger than a picture may be, whatever the archive says."""
    with stream:
        content = stream.read(MOST_BYTES + 1)
    return content if len(content) <= MOST_BYTES else f"it has more than {MOST_BYTES} bytes"


@contextmanager
def _whole(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, *kinds) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged or cannot be read ({reason})") from None


def _identity(paths: list[Path]) -> str:
    stats = [path.stat() for path in paths]
    parts = zip(paths, stats, strict=True)
    return " ".join(f"{path.resolve()} {s.st_size} {s.st_mtime_ns}" for path, s in parts)


def _first_folder(name: str) -> str:
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else ""


def _hidden(name: str) -> bool:
    """Files of systems, not of people: `.DS_Store`, `__MACOSX/`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
