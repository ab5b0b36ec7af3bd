"""The file of finished images that makes a likelihood of hours resumable.

Plain CSV that is only ever appended to::

    # {"dataset": "CIFAR10", "samples": 1024, "seed": 0, "weights": "3f9a..."}
    image,samples,log_likelihood_nats
    0,1024,-9871.231640625
    1,1024,-10229.5546875

Rows of fewer samples, which earlier versions wrote, do not count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ..files import LOCK, locked

COLUMNS = "image,samples,log_likelihood_nats"


class LedgerError(Exception):
    """A ledger that cannot be used; the message is one line that names the file and says what to
    do."""


class Ledger:
    """Opens a ledger, or begins it, and holds it until it is closed; a context manager.

    Arguments:
        path: The file. Its folder is made if it is missing.
        identity: What the numbers depend on. Must hold `samples`, those of each image.

    Attributes:
        rows: {image: log-likelihood in nats} of the finished images.

    Raises:
        LedgerError: if another process holds the file, or it belongs to another identity, or it
            holds something other than a ledger with at most one cut-off row at its end. The file is
            then left as it is.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, str | int]):
        self.path = Path(path)
        self.identity = dict(identity)
        self.rows: dict[int, float] = {}
        message = f"{self.path} is in use by another process: wait for it, or end it"
        with ExitStack() as opened:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = self.path.with_name(self.path.name + LOCK)
                opened.enter_context(locked(lock, message))
                self._file = opened.enter_context(open(self.path, "a+b", buffering=0))
            except BlockingIOError as error:
                raise LedgerError(str(error)) from None
            except OSError as error:
                raise LedgerError(f"cannot open {self.path}: {error.strerror}") from None
            self._read()
            self._opened = opened.pop_all()  # until the end

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception) -> None:
        self._opened.close()

    def add(self, image: int, log_likelihood: float) -> None:
        """Appends an image's log-likelihood in nats.

        Raises:
            LedgerError: if the file cannot be written, say because the disk is full.
        """
        self._write(f"{image},{self.identity['samples']},{log_likelihood!r}\n")
        self.rows[image] = log_likelihood

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        head = f"# {json.dumps(self.identity, sort_keys=True)}\n{COLUMNS}\n".encode()
        if not content.startswith(head):
            empty = content.partition(b"\n")[2] == f"{COLUMNS}\n".encode()
            if not head.startswith(content) and not empty:
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
        wanted = self.identity["samples"]
        try:
            image, samples, value = (
                kind(text) for kind, text in zip((int, int, float), line.split(","), strict=True)
            )
        except ValueError:
            image, samples, value = -1, 0, math.nan
        fits = image >= 0 and image not in self.rows and 1 <= samples <= wanted
        if not fits or not math.isfinite(value):
            raise LedgerError(
                f"{self.path}, line {number} is damaged or out of place ({line[:60]!r}): delete "
                "that line, or move the file away to start anew"
            )
        if samples == wanted:
            self.rows[image] = value

    def _foreign(self, content: bytes) -> str:
        """Why a file that begins otherwise than expected is refused."""
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
        return (
            f"{self.path} holds other numbers ({'; '.join(changed) or 'another file format'}): "
            "move it away to start anew, or use the command that began it"
        )

    def _write(self, text: str) -> None:
        rest = text.encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise LedgerError(
                f"cannot write {self.path} ({error.strerror}): what is in it stays; make room and "
                "run again"
            ) from None
