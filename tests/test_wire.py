"""Protobuf bytes as fields with spans."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import message
from hypothesis import given
from hypothesis import strategies as st

from caffe_proto import schema, wire
from caffe_proto.wire import BYTES, FIXED32, FIXED64, VARINT, WireError


def walk(data: bytes) -> list[wire.WireField]:
    return list(wire.fields(data, 0, len(data)))


@given(st.integers(0, 2**64 - 1))
def test_varint_comes_back(value: int) -> None:
    data = wire.encode_varint(value)
    assert wire.varint(data, 0, len(data)) == (value, len(data))


@given(st.integers(-(2**63), 2**63 - 1))
def test_varint_is_what_protobuf_writes(value: int) -> None:
    made: Any = schema.message_class("BlobShape")(dim=[value])
    encoded = wire.encode_varint(value)
    assert made.SerializeToString() == wire.encode_bytes(1, encoded)
    assert wire.varint(encoded, 0, len(encoded))[0] == value % 2**64


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9, b"\x80" * 10 + b"\x01", b"\xff" * 11])
def test_broken_varints(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.varint(data, 0, len(data))


def test_every_wire_type() -> None:
    data = b"\x08\x96\x01" + b"\x11" + b"8bytes!!" + b"\x1a\x03abc" + b"\x25" + b"4by!"
    assert [(f.number, f.kind, f.start, f.at, f.end, f.value) for f in walk(data)] == [
        (1, VARINT, 0, 1, 3, 150),
        (2, FIXED64, 3, 4, 12, 0),
        (3, BYTES, 12, 14, 17, 0),
        (4, FIXED32, 17, 18, 22, 0),
    ]


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"\x0b", 0),  # a group
        (b"\x0e", 0),  # wire type 6
        (b"\x00\x00", 0),  # field 0
        (b"\x08\x01\x1a\x05abc", 2),  # longer than the rest
        (b"\x08\x01\x25\x00\x00", 2),
        (b"\x1a\x04abc", 0),  # one byte short
        (b"\x11\x00", 0),
        (b"\x08", 1),  # cut off behind the tag
        (b"\x1a\x80", 2),
    ],
)
def test_broken_messages_name_the_offset(data: bytes, offset: int) -> None:
    with pytest.raises(WireError) as caught:
        walk(data)
    assert caught.value.offset == offset


@given(st.binary())
def test_fields_tile_the_message_or_it_is_refused(data: bytes) -> None:
    try:
        found = walk(data)
    except WireError as error:
        assert 0 <= error.offset <= len(data)
        return
    assert b"".join(data[field.start : field.end] for field in found) == data
    assert all(field.start < field.at <= field.end for field in found)


_LAYERS = st.builds(
    lambda name, bottoms, phase, weights: schema.message_class("LayerParameter")(
        name=name, bottom=bottoms, phase=phase, loss_weight=weights
    ),
    st.text(),
    st.lists(st.text(max_size=200)),
    st.integers(0, 1),
    st.lists(st.floats(width=32, allow_subnormal=False, allow_nan=False)),
)


@given(_LAYERS)
def test_walks_what_protobuf_writes(layer: Any) -> None:
    data = layer.SerializeToString()
    found = walk(data)
    strings = [data[field.at : field.end].decode() for field in found if field.number in (1, 3)]
    assert strings == [layer.name, *layer.bottom]
    assert [field.value for field in found if field.kind == VARINT] == [layer.phase]


@given(st.integers(1, 2**29 - 1), st.binary())
def test_encoded_bytes_are_one_field(number: int, payload: bytes) -> None:
    data = wire.encode_bytes(number, payload)
    (field,) = walk(data)
    assert (field.number, field.kind, data[field.at : field.end]) == (number, BYTES, payload)
    assert data == wire.header(number, len(payload)) + payload


def test_encoded_fields_are_read_by_protobuf() -> None:
    data = wire.encode_bytes(1, b"conv") + wire.tag(10, VARINT) + wire.encode_varint(1)
    layer = message("LayerParameter", data)
    assert (layer.name, layer.phase) == ("conv", 1)
