"""A data set while it is made: a folder that can be gone on with, and that becomes the data set in
one step when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.files import LOCK, PARTIAL, sync, whole_file
from lib.optional import optional

from ..converted import DESCRIPTION
from ..errors import DataError
from ..lmdb_datasets import put_images
from ..registry import SPLITS
from .decoding import DIGEST

COMMIT_BYTES, COMMIT_ENTRIES = 2**25, 4096  # after so much, what is done is kept
FIRST = 10  # of what is damaged, that many are named


@dataclass
class Progress:
    """How far a conversion is.

    options: What it depends on. entries: Of each stage that are done. images: In each split.
    damaged, other, duplicates, left_out: How many entries are damaged, are no pictures, have the
    content of an earlier one, were left out of training since validation has them. pictures: How
    many are whole. remarks: How often something was done to a picture. first_damaged: Names and
    reasons.
    """

    options: dict[str, Any]
    entries: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    pictures: int = 0
    damaged: int = 0
    other: int = 0
    duplicates: int = 0
    left_out: int = 0
    remarks: dict[str, int] = field(default_factory=dict)
    first_damaged: list[list[str]] = field(default_factory=list)


class Store:
    """The two LMDBs of a data set that is being made, and the digests of their images.

    Arguments:
        folder: Its folder while it is made; the caller has it for itself.
        options: What the images depend on. What was made with others is thrown away.
    """

    def __init__(self, folder: Path, options: dict[str, Any]):
        self.folder, self.data = folder, folder / "data"
        self._progress_file = folder / "progress.json"
        self.progress = self._stored_progress(options)
        if not any(self.progress.entries.values()):
            shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(exist_ok=True)
        self._batches: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        self._new_digests: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        self._size = self._pending = 0
        self._environments = {split: self._opened(split) for split in SPLITS}
        self.digests = {split: self._kept_digests(split) for split in SPLITS}

    def add(self, split: str, images: list[bytes], digest: bytes) -> None:
        """Takes the images of one picture."""
        self._batches[split] += images
        self._new_digests[split] += [digest] * len(images)
        self.digests[split].add(digest)
        self.progress.images[split] += len(images)
        self._size += sum(map(len, images))

    def entry_done(self, stage: str) -> None:
        """Counts an entry, and now and then writes what is there."""
        self.progress.entries[stage] = self.progress.entries.get(stage, 0) + 1
        self._pending += 1
        if self._size >= COMMIT_BYTES or self._pending >= COMMIT_ENTRIES:
            self.commit()

    def commit(self) -> None:
        """Brings all images and then the progress to the disk: what comes after the progress that
        is there is dropped when the conversion goes on."""
        for split in SPLITS:
            batch, self._batches[split] = self._batches[split], []
            first = self.progress.images[split] - len(batch)
            put_images(self._environments[split], first, batch)
            self._environments[split].sync(True)
            with self._digest_file(split).open("ab") as file:
                file.write(b"".join(self._new_digests[split]))
                file.flush()
                os.fsync(file.fileno())
            self._new_digests[split] = []
        self._size = self._pending = 0
        with whole_file(self._progress_file) as partial:
            partial.write_text(json.dumps(asdict(self.progress)))

    def close(self) -> None:
        for environment in self._environments.values():
            environment.close()

    def content_hash(self) -> str:
        """SHA-256 of the images' digests, split by split, in order."""
        total = hashlib.sha256()
        for split in SPLITS:
            total.update(self._digest_file(split).read_bytes())
        return total.hexdigest()

    def publish(self, target: Path, description: dict[str, Any]) -> None:
        """Makes the folder the data set; one that is there is replaced."""
        self.close()
        for split in SPLITS:
            (self.data / f"{split}.lmdb" / "lock.mdb").unlink(missing_ok=True)
        with whole_file(self.data / DESCRIPTION) as partial:
            partial.write_text(json.dumps(description, indent=1) + "\n")
        old = self.folder / "old"
        if target.exists():  # a folder cannot replace another one in a single step
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(self.data, target)
        with contextlib.suppress(OSError):  # some file systems cannot
            sync(target.parent)
        for rest in self.folder.iterdir():
            if not rest.name.startswith(LOCK):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()

    def _stored_progress(self, options: dict[str, Any]) -> Progress:
        try:
            stored = Progress(**json.loads(self._progress_file.read_text()))
        except (OSError, ValueError, TypeError):
            stored = None
        return stored if stored and stored.options == options else Progress(options)

    def _opened(self, split: str) -> Any:
        lmdb = optional("lmdb", "writing an LMDB", "images", DataError)
        path = self.data / f"{split}.lmdb"
        environment = lmdb.open(str(path), map_size=2**27, sync=False, meminit=False)
        count, there = self.progress.images[split], environment.stat()["entries"]
        while environment.info()["map_size"] < 2 * (path / "data.mdb").stat().st_size:
            environment.set_mapsize(2 * environment.info()["map_size"])
        with environment.begin(write=True) as transaction:
            for index in range(count, there):  # written after the progress that was kept
                transaction.delete(str(index).encode())
        return environment

    def _kept_digests(self, split: str) -> set[bytes]:
        file, size = self._digest_file(split), DIGEST * self.progress.images[split]
        content = file.read_bytes()[:size] if file.exists() else b""
        file.write_bytes(content)
        return {content[i : i + DIGEST] for i in range(0, size, DIGEST)}

    def _digest_file(self, split: str) -> Path:
        return self.folder / f"{split}.digests"


def partial_folder(root: Path, name: str) -> Path:
    """Where a data set is made."""
    return root / f"{name}{PARTIAL}"
