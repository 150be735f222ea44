"""LMDBs of Datum records, as Caffe's tools write them and its data layers read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from google.protobuf.message import DecodeError

from .. import schema
from ..errors import FileError
from .base import Sample, Source
from .pictures import Size, decode

DATA_FILE = "data.mdb"


class Datums(Source):
    """The images of an LMDB in the order of their keys.

    ``color`` for encoded images: True and False are Caffe's force_color and force_gray, None reads them as
    they are.
    """

    def __init__(self, path: Path, size: Size | None = None, color: bool | None = None) -> None:
        super().__init__(path, size)
        self.color = color
        try:
            self._env = lmdb.open(str(path), readonly=True, lock=False)
            with self._env.begin() as reading:
                keys = list(reading.cursor().iternext(values=False))
        except lmdb.Error as error:
            raise FileError(f"is no LMDB that can be read: {error}", path=path) from error
        if not keys:
            self.close()
            raise FileError("is an empty LMDB", path=path)
        self._ends = np.cumsum([len(key) for key in keys])
        self._keys = b"".join(keys)  # millions of small objects would take far more memory

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def labelled(self) -> bool:
        return bool(self._datum(self._key(0)).HasField("label"))

    def read(self, index: int) -> Sample:
        key = self._key(index)
        name = key.decode("utf-8", "backslashreplace")
        datum = self._datum(key)
        try:
            image = decode(datum.data, self.color) if datum.encoded else _planes(datum)
        except FileError as error:
            raise FileError(f'record "{name}" {error.message}') from error
        return Sample(name, image, datum.label if datum.HasField("label") else None)

    def close(self) -> None:
        self._env.close()

    def _key(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return self._keys[start : self._ends[index]]

    def _datum(self, key: bytes) -> Any:
        datum: Any = schema.message_class("Datum")()
        try:
            with self._env.begin(buffers=True) as reading:
                datum.ParseFromString(bytes(reading.get(key, b"")))
        except (lmdb.Error, DecodeError) as error:
            name = key.decode("utf-8", "backslashreplace")
            raise FileError(f'record "{name}" is no Datum: {error}', path=self.path) from error
        return datum


def _planes(datum: Any) -> np.ndarray:
    """The image of a Datum that is not encoded."""
    shape = (datum.channels, datum.height, datum.width)
    pixels = np.frombuffer(datum.data, np.uint8) if datum.data else np.array(datum.float_data, np.float32)
    if pixels.size != np.prod(shape, dtype=np.int64) or not pixels.size:
        raise FileError(f"holds {pixels.size:,} numbers for {' x '.join(map(str, shape))}")
    return pixels.reshape(shape)
