"""The file of finished images that makes a likelihood of hours resumable.

Plain CSV that is only ever appended to::

    # {"dataset": "CIFAR10", "samples": 1024, "seed": 0, "weights": "3f9a..."}
    image,samples,log_likelihood_nats
    0,1024,-9871.231640625
    1,384,-10233.0390625
    1,1024,-10229.5546875

A row is the importance-weighted log-likelihood of an image from its first `samples` samples. With
all of them the image is finished; with fewer the row marks how far an image that takes long has
come, and a later row goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

COLUMNS = "image,samples,log_likelihood_nats"
SYNC_SECONDS = 5.0  # between calls that wait for the disk; a killed process alone never loses a row


class LedgerError(Exception):
    """A ledger that cannot be used; the message is one line that names the file and says what to
    do."""


class Ledger:
    """Opens a ledger, or begins it, and holds it until it is closed; a context manager.

    Arguments:
        path: The file. Its folder is made if it is missing.
        identity: What the numbers depend on. Must hold `samples`, the number of samples of a
            finished image.

    Attributes:
        rows: {image: (samples, log-likelihood in nats)} of the last row of each image.

    Raises:
        LedgerError: if another process holds the file, or it belongs to another identity, or it
            holds something other than a ledger with at most one cut-off row at its end. The file is
            then left as it is.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, str | int]):
        self.path = Path(path)
        self.identity = dict(identity)
        self.rows: dict[int, tuple[int, float]] = {}
        self._synced = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise LedgerError(f"cannot open {self.path}: {error.strerror}") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, images: Sequence[int], samples: int, log_likelihoods: Sequence[float]) -> None:
        """Appends a row for each image: its log-likelihood in nats from `samples` samples.

        Raises:
            LedgerError: if the file cannot be written, say because the disk is full.
            ValueError: if a value is not finite.
        """
        rows = list(zip(images, log_likelihoods, strict=True))
        for image, value in rows:
            if not math.isfinite(value):
                raise ValueError(f"the log-likelihood of image {image} is {value}")
        self._write("".join(f"{image},{samples},{value!r}\n" for image, value in rows))
        self.rows |= {image: (samples, value) for image, value in rows}

    def close(self) -> None:
        """Lets other processes have the file."""
        self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerError(
                f"{self.path} is in use by another process: wait for it, or end it"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        head = f"# {json.dumps(self.identity, sort_keys=True)}\n{COLUMNS}\n".encode()
        if not content.startswith(head):
            empty = (
                head.startswith(content) or content.partition(b"\n")[2] == f"{COLUMNS}\n".encode()
            )
            if not empty:
                raise LedgerError(self._foreign(content))
            self._file.truncate(0)  # killed while it was begun, or before an image was finished
            self._write(head.decode())
            return
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[len(head) : whole].splitlines(), start=3):
            self._read_row(number, line.decode("ascii", "replace"))
        if whole < len(content):
            self._file.truncate(whole)  # killed while it wrote a row

    def _read_row(self, number: int, line: str) -> None:
        try:
            image, samples, value = (
                kind(text) for kind, text in zip((int, int, float), line.split(","), strict=True)
            )
        except ValueError:
            image, samples, value = -1, 0, math.nan
        before, _ = self.rows.get(image, (0, None))
        if (
            image < 0
            or not before < samples <= self.identity["samples"]
            or not math.isfinite(value)
        ):
            raise LedgerError(
                f"{self.path}, line {number} is damaged or out of place ({line[:60]!r}): delete that line, or move the "
                "file away to start anew"
            )
        self.rows[image] = (samples, value)

    def _foreign(self, content: bytes) -> str:
        """Why a file that begins otherwise than expected is refused."""
        advice = "move it away to start anew, or use the command that began it"
        try:
            stored = json.loads(content.splitlines()[0].removeprefix(b"# "))
            names = sorted(stored.keys() | self.identity.keys())
        except (ValueError, AttributeError, IndexError):
            return f"{self.path} is not a file of finished images: move it away"
        changed = [
            f"{name} {stored.get(name)} there, {self.identity.get(name)} now"
            for name in names
            if stored.get(name) != self.identity.get(name)
        ]
        return f"{self.path} holds other numbers ({'; '.join(changed) or 'another file format'}): {advice}"

    def _write(self, text: str) -> None:
        rest = text.encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise LedgerError(
                f"cannot write {self.path} ({error.strerror}): what is in it stays; make room and run again"
            ) from None
