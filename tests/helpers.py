"""What several tests share: the folder of oracles, and builders of small Caffe files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caffe_proto import schema, wire

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}")

FLOAT, DOUBLE = "<f4", "<f8"


def shared_files(folder: str, *patterns: str) -> list[Path]:
    """The files under a folder of shared/ whose names match; none where shared/ is absent."""
    return sorted(path for pattern in patterns for path in (SHARED / folder).rglob(pattern) if path.is_file())


def f32(values: float | Sequence[Any]) -> np.ndarray:
    """An array of Caffe's own type."""
    return np.array(values, np.float32)


def floats(*values: float, dtype: str = FLOAT) -> bytes:
    """Numbers as they stand in a packed field."""
    return np.array(values, dtype).tobytes()


def packed(*values: float, number: int = 5, dtype: str = FLOAT) -> bytes:
    """One packed run of BlobProto.data (or double_data)."""
    return wire.encode_bytes(number, floats(*values, dtype=dtype))


def unpacked(*values: float, number: int = 5, dtype: str = FLOAT) -> bytes:
    """The same numbers, each behind a tag of its own."""
    kind = wire.FIXED32 if dtype == FLOAT else wire.FIXED64
    return b"".join(wire.tag(number, kind) + floats(value, dtype=dtype) for value in values)


def shape(*dims: int) -> bytes:
    """BlobProto.shape."""
    return wire.encode_bytes(7, wire.encode_bytes(1, b"".join(map(wire.encode_varint, dims))))


def legacy_shape(**axes: int) -> bytes:
    """BlobProto.num, channels, height, width."""
    numbers = {"num": 1, "channels": 2, "height": 3, "width": 4}
    return b"".join(
        wire.tag(numbers[axis], wire.VARINT) + wire.encode_varint(size) for axis, size in axes.items()
    )


def v2_layer(name: str, *blobs: bytes) -> bytes:
    """NetParameter.layer with these BlobProtos."""
    inner = wire.encode_bytes(1, name.encode()) + wire.encode_bytes(2, b"Convolution")
    return wire.encode_bytes(100, inner + b"".join(wire.encode_bytes(7, blob) for blob in blobs))


def v1_layer(name: str, *blobs: bytes) -> bytes:
    """NetParameter.layers with these BlobProtos."""
    inner = wire.encode_bytes(4, name.encode()) + b"".join(wire.encode_bytes(6, blob) for blob in blobs)
    return wire.encode_bytes(2, inner)


def v0_layer(name: str, *blobs: bytes) -> bytes:
    """NetParameter.layers { layer { } } with these BlobProtos."""
    inner = wire.encode_bytes(1, name.encode()) + b"".join(wire.encode_bytes(50, blob) for blob in blobs)
    return wire.encode_bytes(2, wire.encode_bytes(1, inner))


def blob(array: np.ndarray) -> bytes:
    """A BlobProto as Caffe writes it: BlobShape and one packed run."""
    return shape(*array.shape) + wire.encode_bytes(5, np.ascontiguousarray(array, FLOAT).tobytes())


def v2_file(layers: Mapping[str, Sequence[np.ndarray]], name: str = "net") -> bytes:
    """A caffemodel of V2 layers."""
    written = (v2_layer(layer, *map(blob, arrays)) for layer, arrays in layers.items())
    return wire.encode_bytes(1, name.encode()) + b"".join(written)


def message(name: str, data: bytes) -> Any:
    """A message of our schema, read by protobuf."""
    made: Any = schema.message_class(name)()
    made.ParseFromString(data)
    return made


def protobuf_blobs(data: bytes, field: str = "layer") -> dict[str, list[np.ndarray]]:
    """Layer name to blobs of a caffemodel, read by protobuf; the last layer of a name counts."""
    found = {}
    for layer in getattr(message("NetParameter", data), field):
        if layer.blobs:
            found[layer.name] = [_array(one) for one in layer.blobs]
    return found


def _array(one: Any) -> np.ndarray:
    legacy = any(one.HasField(axis) for axis in ("num", "channels", "height", "width"))
    dims = (one.num, one.channels, one.height, one.width) if legacy else tuple(one.shape.dim)
    return np.array(one.double_data or one.data, np.float32).reshape(dims)


def same(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> bool:
    """Whether two layers hold blobs of the same shapes and numbers (NaN equal to NaN)."""
    return len(left) == len(right) and all(
        a.shape == b.shape and np.array_equal(a, b, equal_nan=True) for a, b in zip(left, right, strict=True)
    )
