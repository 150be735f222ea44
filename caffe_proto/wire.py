"""Protobuf bytes as fields with spans, and their encoding. Knows no Caffe.

A field is its number, its wire type and the span of its payload; nothing is copied, so a file of any
size can be walked over a memory map in the time its top-level fields take.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Buffer = bytes | mmap.mmap | memoryview


class WireError(ValueError):
    """Bytes that are no protobuf message; ``offset`` is where they stop making sense."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class WireField(NamedTuple):
    """One field: [start, end) with its tag, payload from ``at`` to ``end``; ``value`` of a varint."""

    number: int
    kind: int
    start: int
    at: int
    end: int
    value: int


def varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    """The varint at ``position`` and the position behind it."""
    result = shift = 0
    while position < end:
        byte = buffer[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
        if shift > 63:
            raise WireError("a number of more than ten bytes", position)
    raise WireError("cut off inside a number", position)


def fields(buffer: Buffer, start: int, end: int) -> Iterator[WireField]:
    """Walk the fields of the message in [start, end); raises WireError where it is none."""
    position = start
    while position < end:
        first = position
        tag, position = varint(buffer, position, end)
        number, kind = tag >> 3, tag & 7
        value = 0
        if kind == BYTES:
            length, position = varint(buffer, position, end)
            stop = position + length
        elif kind == VARINT:
            at = position
            value, stop = varint(buffer, position, end)
            position = at
        elif kind == FIXED32:
            stop = position + 4
        elif kind == FIXED64:
            stop = position + 8
        else:
            raise WireError(f"wire type {kind} is not used by Caffe", first)
        if number == 0:
            raise WireError("field number 0", first)
        if stop > end:
            raise WireError(
                f"field {number} needs {stop - position:,} bytes, {end - position:,} are left", first
            )
        yield WireField(number, kind, first, position, stop, value)
        position = stop


def encode_varint(value: int) -> bytes:
    """A non-negative number below 2**64 as a varint; a negative one in two's complement, ten bytes long."""
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number: int, kind: int) -> bytes:
    """The tag that opens a field."""
    return encode_varint(number << 3 | kind)


def header(number: int, length: int) -> bytes:
    """Tag and length of a field of ``length`` bytes."""
    return tag(number, BYTES) + encode_varint(length)


def encode_bytes(number: int, payload: bytes) -> bytes:
    """A field of bytes, a string or a message."""
    return header(number, len(payload)) + payload
