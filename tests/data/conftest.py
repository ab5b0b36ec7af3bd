"""Small data sets in the real formats, and a web server that misbehaves on request."""

import contextlib
import http.server
import io
import re
import struct
import tarfile
import threading

import numpy as np
import pytest


def crc32c(data):
    """CRC-32C bit by bit: independent of the package that the code uses."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def varint(number):
    number %= 2**64
    encoded = b""
    while number >= 0x80:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def int_feature(values, packed=True):
    if packed:
        return field(3, field(1, b"".join(map(varint, values))))
    return field(3, b"".join(varint(1 << 3) + varint(value) for value in values))


def example(image, packed=True, shape=None):
    """A serialized tf.train.Example as in Glow's archives."""
    features = {
        b"data": field(1, field(1, image.tobytes())),
        b"label": int_feature([-3], packed),
        b"shape": int_feature(shape or image.shape, packed),
    }
    return field(
        1, b"".join(field(1, field(1, name) + field(2, value)) for name, value in features.items())
    )


def frame(data):
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def imagenet_shards(train=(2, 3), validation=(1, 2), prefix="mnt/host/imagenet-oord-tfr/"):
    """Shards (name -> content) with so many images each, in an order that is not that of their
    numbers; the images."""
    rng = np.random.default_rng(0)
    files, images = {}, {}
    for split, counts in (("train", train), ("validation", validation)):
        images[split] = rng.integers(0, 256, (sum(counts), 32, 32, 3), dtype=np.uint8)
        starts = np.cumsum([0, *counts])
        for k in reversed(range(len(counts))):
            shard = b"".join(
                frame(example(image, packed=bool(i % 2)))
                for i, image in enumerate(images[split][starts[k] : starts[k + 1]])
            )
            files[f"{prefix}{split}/{split}-r05-s-{k:04d}-of-{len(counts):04d}.tfrecords"] = shard
        files[f"{prefix}{split}/{split}-r06-s-0000-of-0001.tfrecords"] = b"another resolution"
    return files, images


def write_lmdb(folder, values):
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(folder), map_size=2**25) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(str(key).encode(), bytes(value))


class MisbehavingServer(http.server.ThreadingHTTPServer):
    """Serves `content` and keeps what was asked for. Switches are named after what goes wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.tag = b"", '"1"'
        self.cuts: list[int] = []  # number of bytes after which the next connections end
        self.statuses: list[int] = []  # what the next requests are answered with
        self.ignore_range, self.extra_length, self.redirect = False, 0, None
        self.tell_length = True
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/file.tar"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        content, start = server.content, 0
        total = len(content) + server.extra_length
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and not server.ignore_range:
            start = int(asked[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        if server.tell_length:
            self.send_header("Content-Length", str(total - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        body = content[start:]
        with contextlib.suppress(ConnectionError):  # who only wanted the headers has left
            self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = MisbehavingServer()
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def formats():
    """The functions above that make files."""
    import types

    return types.SimpleNamespace(
        crc32c=crc32c, masked=masked, frame=frame, example=example, field=field,
        int_feature=int_feature, varint=varint, tar_of=tar_of,
        imagenet_shards=imagenet_shards, write_lmdb=write_lmdb,
    )  # fmt: skip
