"""Downloads one large file; interrupted, the same command goes on where it was.

python -m data.download URL DESTINATION [--sha256 SUM]

The bytes so far are in DESTINATION.partial. DESTINATION.sha256 (the format of sha256sum) is written
when they are complete; whatever it holds already, from an earlier download or from you, is checked
instead. Where the sum of the published file is known, it is given.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from lib.cli import OneLineParser, one_line_errors

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
    """Brings `destination` from `url`, or checks the one that is there.

    Arguments:
        url: https; plain http from this machine only.
        destination: The file; its folder is made if need be.
        sha256: Of the published file, for where no sum is recorded yet.
        attempts: In a row that bring no byte, after which it gives up; default: `ATTEMPTS`.

    Raises:
        DataError: if the URL is refused, the server answers with an error or without the file's
            length, the connection fails again and again, the disk has too little space, another
            process downloads the same file, or the file is not the one whose SHA-256 is recorded.
            Nothing is deleted.
    """
    _check_url(url)
    if destination.exists():
        _check_existing(url, destination, sha256)
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(destination, ".partial")
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is downloading {destination}") from None
        if not partial.exists():
            raise DataError(f"another process has just downloaded {destination}")
        _fetch_all(url, file, _beside(destination, ".partial.json"), attempts or ATTEMPTS)
        os.fsync(file.fileno())
        _check_sum(partial, destination, sha256)
        partial.rename(destination)
    _beside(destination, ".partial.json").unlink(missing_ok=True)


def _check_existing(url: str, destination: Path, sha256: str | None) -> None:
    """A file without a recorded or known sum is not from here: it has at least to be as long as the
    server's."""
    if not sha256 and not _beside(destination, ".sha256").exists():
        try:
            with _request(url) as response:
                size = _identity(url, response.headers)["size"]
        except TransferError as error:
            raise DataError(
                f"{destination} exists, but cannot be compared with {url} ({error}); to keep it as it is: "
                f"sha256sum {destination} > {_beside(destination, '.sha256')}"
            ) from None
        if destination.stat().st_size != size:
            raise DataError(
                f"{destination} has {destination.stat().st_size} bytes, {url} has {size}: move it away to download it"
            )
    _check_sum(destination, destination, sha256)


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
    """One request for what is missing, or for everything if the server's file is not the one that
    was begun."""
    begun = _begun(identity_file)
    have = _size(file) if begun and begun["url"] == url else 0
    if have and have == begun["size"]:
        return
    headers = {}
    if have:
        headers = {"Range": f"bytes={have}-"}
        validator = (
            begun["etag"]
            if not (begun["etag"] or "W/").startswith("W/")
            else begun["last_modified"]
        )
        if validator:
            headers["If-Range"] = validator
    try:
        response = _request(url, headers)
    except _RangeRefusedError:
        response = _request(url)
    if response.status == 206 and _identity(url, response.headers) != begun:
        response.close()
        response = _request(url)
    with response:
        identity = _identity(url, response.headers)
        if response.status == 206:
            if not re.match(rf"bytes {have}-", response.headers["Content-Range"]):
                raise DataError(
                    f"{url}: the server sent {response.headers['Content-Range']}, not bytes from {have}"
                )
        else:
            have = 0
            file.truncate(0)
            identity_file.write_text(json.dumps(identity))
        missing, folder = identity["size"] - have, identity_file.parent
        if missing > (free := shutil.disk_usage(folder).free):
            raise DataError(f"{folder} has {free} bytes free, {missing} more are needed for {url}")
        with tqdm(
            total=identity["size"],
            initial=have,
            unit="B",
            unit_scale=True,
            desc="download",
            disable=None,
        ) as bar:
            while missing > 0 and (block := _read(response, min(BLOCK, missing))):
                file.write(block)
                missing -= len(block)
                bar.update(len(block))
        file.flush()
    if missing:
        raise TransferError(f"the connection ended {missing} of {identity['size']} bytes too early")


class _RangeRefusedError(Exception):
    """Status 416: the server's file has no such bytes."""


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        _check_url(url)
        return super().redirect_request(request, file, code, message, headers, url)


def _request(url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    handlers: list[urllib.request.BaseHandler] = [_CheckedRedirects()]
    if urlsplit(url).scheme == "http":
        handlers.append(
            urllib.request.ProxyHandler({})
        )  # no proxy reaches this machine's own server
    try:
        return urllib.request.build_opener(*handlers).open(
            urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and "Range" in (headers or {}):
            raise _RangeRefusedError from None
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
    content_range = re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("Content-Range", ""))
    size = content_range[1] if content_range else headers.get("Content-Length")
    if not (size or "").isdecimal():
        raise DataError(
            f"{url}: the server does not tell how long the file is, so it could not be checked"
        )
    return {
        "url": url,
        "size": int(size),
        "etag": headers.get("ETag"),
        "last_modified": headers.get("Last-Modified"),
    }


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
                f"{file} has SHA-256 {actual}, but the published file has {sha256}: remove it to download it again, or "
                f"accept it: sha256sum {file} > {record}"
            )
        record.write_text(f"{actual}  {destination.name}\n")
        return
    expected = (record.read_text(errors="replace").split() or ["nothing"])[0].lower()
    if actual != expected:
        raise DataError(
            f"{file} has SHA-256 {actual}, but {record} says {expected}: remove {file} to download it again, or "
            f"{record} to accept it"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    total = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=total, unit="B", unit_scale=True, desc="SHA-256", disable=None) as bar,
    ):
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _beside(destination: Path, ending: str) -> Path:
    return destination.with_name(destination.name + ending)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _begun(identity_file: Path) -> dict[str, str | int | None] | None:
    """The identity of the file that was begun; None if that is not known."""
    try:
        identity = json.loads(identity_file.read_text())
    except (OSError, ValueError):
        return None
    return (
        identity
        if isinstance(identity, dict) and {"url", "size", "etag", "last_modified"} <= {*identity}
        else None
    )


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
    print(
        f"{flags.destination}: {flags.destination.stat().st_size} bytes, as recorded in {flags.destination}.sha256"
    )


if __name__ == "__main__":
    main()
