"""TFRecord files and the tf.train.Example records in them, read without TensorFlow.

Framing of each record (TensorFlow's documentation of TFRecord), integers little-endian:

    uint64 length | uint32 masked crc32c of the length | data | uint32 masked crc32c of the data
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

from lib.optional import optional

from ..errors import DataError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how protobuf writes a field
BYTES_LIST, FLOATS, INTEGERS = 1, 2, 3  # the kinds of a Feature


def masked_crc32c(data: bytes) -> int:
    """TensorFlow's masked CRC-32C (Castagnoli): rotated right by 15 bits, plus a constant, modulo
    2^32.

    Raises:
        DataError: if the package google-crc32c is missing.
    """
    crc = optional("google_crc32c", "checking TFRecords", "convert", DataError).value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """The data of each record of a TFRecord file, checked.

    Arguments:
        stream: The file, at its beginning.
        name: What messages call it.

    Raises:
        DataError: naming file and record (counted from 0), if one is cut off or fails a checksum.
    """
    number = 0
    while header := stream.read(12):
        if len(header) < 12:
            raise DataError(f"{name}, record {number}: cut off inside the length")
        length, length_crc = struct.unpack("<QI", header)
        if masked_crc32c(header[:8]) != length_crc:
            raise DataError(f"{name}, record {number}: the checksum of the length does not fit")
        body = stream.read(length + 4)
        if len(body) < length + 4:
            raise DataError(
                f"{name}, record {number}: cut off after {len(body)} of {length + 4} bytes"
            )
        data = body[:length]
        if masked_crc32c(data) != int.from_bytes(body[length:], "little"):
            raise DataError(f"{name}, record {number}: the checksum of the data does not fit")
        yield data
        number += 1


def parse_example(record: bytes) -> dict[str, list[int] | list[bytes]]:
    """The features of a serialized tf.train.Example: name -> list of integers or of byte strings.

    Lists of floats are left out. Fields may come in any order and in several parts, integers packed
    or one by one. As protobuf does, parts of one list are joined, a list of another kind replaces
    it, and the last of several features of one name counts.

    Raises:
        ValueError: if the bytes are not such a message.
    """
    # Example {1: Features {1: entry {1: name, 2: Feature {1: BytesList {1: ...} | 2: FloatList |
    # 3: Int64List {1: ...}}}}}
    features: dict[str, list[int] | list[bytes]] = {}
    for features_message in _messages(record, 1):
        for entry in _messages(features_message, 1):
            name, kind, values = _map_entry(entry)
            features.pop(name, None)
            if kind in (BYTES_LIST, INTEGERS):
                features[name] = values
    return features


def _map_entry(entry: memoryview) -> tuple[str, int, list[int] | list[bytes]]:
    """The name of a feature, which kind of list it is (0: none), and the list."""
    name, kind, values = "", 0, []
    for part in _messages(entry, 1):
        name = bytes(part).decode()
    for part in _messages(entry, 2):
        for field, wire_type, message in _fields(part):
            if wire_type != BYTES or field not in (BYTES_LIST, FLOATS, INTEGERS):
                continue
            if field != kind:
                kind, values = field, []
            if kind == BYTES_LIST:
                values += map(bytes, _messages(message, 1))
            elif kind == INTEGERS:
                values += _integers(message)
    return name, kind, values


def _integers(message: memoryview | bytes) -> list[int]:
    values: list[int] = []
    for field, wire_type, value in _fields(message):
        if field != 1:
            continue
        if wire_type == VARINT:
            values.append(value)
        elif wire_type == BYTES:
            position = 0
            while position < len(value):
                number, position = _varint(value, position)
                values.append(number)
        else:
            raise ValueError(f"an integer list holds wire type {wire_type}")
    return [value - 2**64 if value >= 2**63 else value for value in values]


def _messages(message: memoryview | bytes, number: int) -> Iterator[memoryview]:
    """What the fields of this number hold: messages or byte strings."""
    for field, wire_type, value in _fields(message):
        if field == number and wire_type == BYTES:
            yield value


def _fields(message: memoryview | bytes) -> Iterator[tuple[int, int, int | memoryview]]:
    """(field number, wire type, value) of a protobuf message; the value is a number or, if not a
    varint, bytes."""
    view, position = memoryview(message), 0
    while position < len(view):
        key, position = _varint(view, position)
        field, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, position = _varint(view, position)
            yield field, wire_type, value
            continue
        if wire_type == BYTES:
            length, position = _varint(view, position)
        elif wire_type in (FIXED64, FIXED32):
            length = 8 if wire_type == FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        if position + length > len(view):
            raise ValueError("a field goes beyond the end of its message")
        yield field, wire_type, view[position : position + length]
        position += length


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    """The number at a position, seven bits a byte, lowest first; and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise ValueError("a number is cut off")
        byte = view[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number has more than ten bytes")
