"""Downloads one large file; if it is interrupted, the same command continues where it stopped.

    python -m data.download URL DESTINATION [--sha256 SUM]

The bytes so far are in DESTINATION.partial. DESTINATION.sha256, in the format of sha256sum, is
written when they are complete. If it exists already, from an earlier download or written by you,
the file is checked against it; otherwise against the sum of the published file, if that is given.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from lib.cli import OneLineParser, one_line_errors
from lib.files import LOCK, locked
from lib.progress import progress

from .errors import DataError

ATTEMPTS = 6  # in a row that bring no byte
FIRST_PAUSE = 1.0  # seconds; doubles with each such attempt
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 1 << 20


class TransferError(Exception):
    """The connection failed in a way that may pass."""


def download(
    url: str, destination: Path, *, sha256: str | None = None, attempts: int | None = None
) -> None:
    """Downloads `url` to `destination`, or checks the file that is there already.

    Arguments:
        url: https; plain http from this machine only.
        destination: The file; its folder is made if need be.
        sha256: The published file's, which counts where no sum is recorded yet.
        attempts: After so many attempts in a row that bring no byte it gives up; by default
            `ATTEMPTS`.

    Raises:
        DataError: if the URL is refused, the server answers with an error or without the file's
            length, the connection fails again and again, the disk has too little space, another
            process downloads the same file, or the file is not the one whose SHA-256 is recorded.
            Nothing is deleted.
    """
    _check_url(url)
    if destination.exists():
        _check_sum(destination, destination, sha256)
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(destination, ".partial")
    message = f"another process is downloading {destination}"
    try:
        with locked(_beside(partial, LOCK), message):
            if destination.exists():
                raise DataError(f"another process has just downloaded {destination}")
            with partial.open("ab") as file:
                _fetch_all(url, file, _beside(destination, ".partial.json"), attempts or ATTEMPTS)
                os.fsync(file.fileno())
            _check_sum(partial, destination, sha256)
            partial.rename(destination)
            _beside(destination, ".partial.json").unlink(missing_ok=True)
    except BlockingIOError as error:
        raise DataError(str(error)) from None


def _fetch_all(url: str, file: BinaryIO, identity_file: Path, attempts: int) -> None:
    """Appends to `file` until it is as long as the server's."""
    failures = 0
    while True:
        before = _size(file)
        try:
            _fetch(url, file, identity_file)
            return
        except TransferError as error:
            file.flush()
            failures = 0 if _size(file) > before else failures + 1
            if failures == attempts:
                raise DataError(f"{url}: {error}; the same command goes on where it was") from None
            pause = FIRST_PAUSE * 2 ** max(failures - 1, 0)
            print(f"{error}; next attempt in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def _fetch(url: str, file: BinaryIO, identity_file: Path) -> None:
    """Requests the file, and then only what is missing of it if it is the one that was begun."""
    response = _request(url)
    identity = _identity(url, response.headers)
    have, size = _size(file), identity["size"]
    if have > size or _begun(identity_file) != identity:
        have = 0
    if 0 < have < size:
        response.close()
        response = _request(url, {"Range": f"bytes={have}-"})
        if response.status != 206:  # the server sends everything
            have = 0
        elif not (sent := response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
            raise DataError(f"{url}: the server sent {sent}, not bytes from {have}")
    with response:
        if not have:
            file.truncate(0)
            identity_file.write_text(json.dumps(identity))
        missing, folder = size - have, identity_file.parent
        if missing > (free := shutil.disk_usage(folder).free):
            raise DataError(f"{folder} has {free} bytes free, {missing} more are needed for {url}")
        with _bar("download", size, initial=have) as bar:
            while missing > 0 and (block := _read(response, min(BLOCK, missing))):
                file.write(block)
                missing -= len(block)
                bar.update(len(block))
        file.flush()
    if missing:
        raise TransferError(f"the connection ended {missing} of {size} bytes too early")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        _check_url(url)
        return super().redirect_request(request, file, code, message, headers, url)


def _request(url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    handlers: list[urllib.request.BaseHandler] = [_CheckedRedirects()]
    if urlsplit(url).scheme == "http":  # no proxy reaches this machine's own server
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        return urllib.request.build_opener(*handlers).open(
            urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 429) or error.code >= 500:
            raise TransferError(f"the server answers {error.code} {error.reason}") from None
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise TransferError(
            f"the connection failed ({getattr(error, 'reason', error) or error!r})"
        ) from None


def _read(response: http.client.HTTPResponse, size: int) -> bytes:
    try:
        return response.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise TransferError(f"the connection failed ({error or type(error).__name__})") from None


def _identity(url: str, headers: Message) -> dict[str, str | int | None]:
    """What tells whether the server's file is still the one that was begun."""
    size = headers.get("Content-Length") or ""
    if not size.isdecimal():
        raise DataError(
            f"{url}: the server does not tell how long the file is, so it could not be checked"
        )
    identity = {"url": url, "size": int(size)}
    return identity | {name: headers.get(name) for name in ("ETag", "Last-Modified")}


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DataError(f"{url}: {error}") from None
    if parts.scheme != "https" and not (
        parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")
    ):
        raise DataError(f"{url}: only https addresses are downloaded")


def _check_sum(file: Path, destination: Path, sha256: str | None) -> None:
    """Compares with the recorded sum, or with the known one, and records it."""
    record, actual = _beside(destination, ".sha256"), _sha256(file)
    if not record.exists():
        if sha256 and actual != sha256:
            raise DataError(
                f"{file} has SHA-256 {actual}, but the published file has {sha256}: remove it to "
                f"download it again, or accept it: sha256sum {file} > {record}"
            )
        record.write_text(f"{actual}  {destination.name}\n")
        return
    expected = (record.read_text(errors="replace").split() or ["nothing"])[0].lower()
    if actual != expected:
        raise DataError(
            f"{file} has SHA-256 {actual}, but {record} says {expected}: remove {file} to download "
            f"it again, or {record} to accept it"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, _bar("SHA-256", path.stat().st_size) as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _beside(destination: Path, ending: str) -> Path:
    return destination.with_name(destination.name + ending)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _begun(identity_file: Path) -> Any:
    """The identity of the file that was begun; None if that is not known."""
    try:
        return json.loads(identity_file.read_text())
    except (OSError, ValueError):
        return None


def _bar(title: str, size: int, initial: int = 0) -> tqdm:
    """A bar of the progress over so many bytes, in a terminal."""
    return progress(desc=title, total=size, initial=initial, unit="B", unit_scale=True)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser("data.download", description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("destination", type=Path)
    parser.add_argument(
        "--sha256", metavar="SUM", help="of the published file; default: none is known"
    )
    flags = parser.parse_args(arguments)
    with one_line_errors("data.download", DataError, OSError):
        try:
            download(flags.url, flags.destination, sha256=flags.sha256)
        except KeyboardInterrupt:
            raise DataError("interrupted; the same command goes on where it was") from None
    size = flags.destination.stat().st_size
    print(f"{flags.destination}: {size} bytes, as recorded in {flags.destination}.sha256")


if __name__ == "__main__":
    main()
