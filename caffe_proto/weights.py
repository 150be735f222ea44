"""Trained blobs by layer name, over a mapped ``.caffemodel`` or a ``.caffemodel.h5``.

A caffemodel is walked, not parsed: each layer is a span of the map, its blobs are read-only float32
views made when first asked for, and a layer nobody replaced is written back as the bytes it was.
V2 ``layer``, V1 ``layers`` and V0 ``layers { layer }`` are read; shapes as BlobShape or the legacy
num, channels, height, width; data packed, unpacked, in several runs, as ``double_data``, or as NVIDIA's
``raw_data`` of double, single or half precision.
"""

from __future__ import annotations

import mmap
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from . import wire
from .errors import CaffemodelError, UsageError
from .files import is_binary, text_bytes, unreadable
from .wire import BYTES, FIXED32, FIXED64, VARINT, WireError

if TYPE_CHECKING:
    import h5py

Blobs = tuple[np.ndarray, ...]

_LARGE = 2**16  # bytes from which a copy inside the kernel is worth its system call
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_LFS_MAGIC = b"version https://git-lfs"


@dataclass(frozen=True)
class Dialect:
    """Field numbers of one generation of layer message inside NetParameter."""

    name: str
    field: int  # NetParameter -> layer
    layer_name: int  # layer -> name, and so on
    type: int
    bottom: int
    top: int
    blobs: int


V2 = Dialect("V2", 100, 1, 2, 3, 4, 7)
V1 = Dialect("V1", 2, 4, 5, 2, 3, 6)
_V0_LAYER, _V0_NAME, _V0_BLOBS = 1, 1, 50
_DATA, _SHAPE, _DOUBLE = 5, 7, 8
_RAW_TYPE, _RAW = 10, 12  # NVIDIA's fork
_RAW_DTYPES = {0: "<f8", 1: "<f4", 2: "<f2"}  # NumericType
_LEGACY_AXES = (1, 2, 3, 4)
_MOST_AXES, _LARGEST_DIM = 32, 2**31 - 1  # of one of Caffe's blobs
_MOST_RUNS = 4096
_DEEPEST = 100  # groups of HDF5 within groups: the parts of a layer's name
_MOST_PARTS = 500_000  # fields and blobs of a caffemodel; real ones have some thousands
_TOO_MANY = f"more than {_MOST_PARTS:,} fields and blobs"
_MOST_RATIO, _SMALL = 64, 2**20  # how far HDF5 may pack numbers, of data sets that are not small, in bytes


class MappedFile(mmap.mmap):
    """A file mapped for reading that keeps its descriptor, so that the kernel can copy spans of it."""

    descriptor: int

    @classmethod
    def of(cls, file: IO[bytes]) -> MappedFile:
        """Map an open file; the map may outlive it."""
        mapped = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.descriptor = os.dup(file.fileno())
        weakref.finalize(mapped, os.close, mapped.descriptor)
        return mapped


class Entry:
    """One layer of a weight file: its name and its blobs."""

    name: str

    @property
    def blobs(self) -> Blobs:
        """The blobs, float32 and read-only."""
        raise NotImplementedError


@dataclass(frozen=True)
class NewEntry(Entry):
    """A layer whose blobs were computed here; ``definition`` is its layer message without blobs."""

    name: str
    arrays: Blobs
    definition: bytes = b""
    dialect: Dialect = V2

    @property
    def blobs(self) -> Blobs:
        return self.arrays

    def write(self, file: IO[bytes]) -> None:
        """Append the layer to a caffemodel, blob data streamed from the arrays."""
        dialect = self.dialect
        definition = self.definition or wire.encode_bytes(dialect.layer_name, text_bytes(self.name))
        total = len(definition)
        total += sum(len(_blob_head(dialect.blobs, array)) + 4 * array.size for array in self.arrays)
        file.write(wire.header(dialect.field, total) + definition)
        for array in self.arrays:
            write_blob(file, dialect.blobs, array)


def write_blob(file: IO[bytes], number: int, array: np.ndarray) -> None:
    """Append an array as a BlobProto in the field of this number."""
    file.write(_blob_head(number, array))
    file.write(np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data)


def _blob_head(number: int, array: np.ndarray) -> bytes:
    """A field of BlobProto up to the numbers themselves: BlobShape, then the tag and length of packed data."""
    dims = b"".join(wire.encode_varint(dim) for dim in array.shape)
    shape = wire.encode_bytes(1, dims) if dims else b""
    head = wire.encode_bytes(_SHAPE, shape) + wire.header(_DATA, 4 * array.size)
    return wire.header(number, len(head) + 4 * array.size) + head


@dataclass(frozen=True)
class MappedEntry(Entry):
    """A layer that stands in a mapped caffemodel, bytes [start, end) of it."""

    name: str
    buffer: MappedFile
    start: int
    end: int
    blob_spans: tuple[tuple[int, int], ...]
    path: str

    @cached_property
    def blobs(self) -> Blobs:
        try:
            return tuple(read_blob(self.buffer, start, end) for start, end in self.blob_spans)
        except ValueError as error:  # a WireError is one
            raise CaffemodelError(str(error), path=self.path, layer=self.name) from error


@dataclass(frozen=True)
class Hdf5Entry(Entry):
    """A layer of an open HDF5 weight file: group /data/<name>, data sets "0", "1", ..."""

    name: str
    datasets: tuple[h5py.Dataset, ...]
    path: str

    @cached_property
    def blobs(self) -> Blobs:
        try:
            return tuple(read_dataset(dataset) for dataset in self.datasets)
        except (OSError, RuntimeError, TypeError, ValueError, MemoryError, OverflowError) as error:
            raise CaffemodelError(f"cannot be read ({error})", path=self.path, layer=self.name) from error


@dataclass(frozen=True)
class Raw:
    """Bytes [start, end) of a mapped caffemodel that are no layer with blobs; kept as they are."""

    buffer: MappedFile
    start: int
    end: int


Piece = Entry | Raw


class Weights(Mapping[str, Blobs]):
    """Layer name to blobs, in file order; layers without blobs do not appear.

    Where a file names a layer twice, the last one counts, as in Caffe, which copies them in turn.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        path: str | None = None,
        dialect: Dialect = V2,
        changed: bool = False,
    ) -> None:
        self.pieces = tuple(pieces)
        self.path = path
        self.dialect = dialect
        self.changed = changed
        self._entries = {piece.name: piece for piece in self.pieces if isinstance(piece, Entry)}

    def __getitem__(self, name: str) -> Blobs:
        return self._entries[name].blobs

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_hdf5(self) -> bool:
        """Whether the blobs come from an HDF5 file."""
        return any(isinstance(piece, Hdf5Entry) for piece in self.pieces)

    def replace(self, changes: Mapping[str, Iterable[NewEntry]]) -> Weights:
        """The same weights with some layers replaced by others, in place, every occurrence once.

        A name that is not in the file is appended at the end.
        """
        pieces: list[Piece] = []
        left = dict(changes)
        for piece in self.pieces:
            if not isinstance(piece, Entry) or piece.name not in changes:
                pieces.append(piece)
            elif piece.name in left:
                pieces.extend(self._in_dialect(left.pop(piece.name)))
        for entries in left.values():
            pieces.extend(self._in_dialect(entries))
        changed = self.changed or bool(changes)
        return Weights(pieces, path=self.path, dialect=self.dialect, changed=changed)

    def _in_dialect(self, entries: Iterable[NewEntry]) -> Iterator[NewEntry]:
        return (replace(entry, dialect=self.dialect) for entry in entries)

    def write_caffemodel(self, file: IO[bytes]) -> None:
        """Write the binary form; neighbouring untouched pieces are copied as one span of bytes."""
        run: tuple[Any, int, int] | None = None
        for piece in self.pieces:
            if isinstance(piece, MappedEntry | Raw):
                if run is not None and run[0] is piece.buffer and run[2] == piece.start:
                    run = (run[0], run[1], piece.end)
                    continue
                _write_span(file, run)
                run = (piece.buffer, piece.start, piece.end)
                continue
            _write_span(file, run)
            run = None
            entry = (
                piece
                if isinstance(piece, NewEntry)
                else NewEntry(piece.name, piece.blobs, dialect=self.dialect)
            )
            entry.write(file)
        _write_span(file, run)

    def write_hdf5(self, path: str | Path) -> None:
        """Write Caffe's HDF5 form, /data/<layer>/<index>; a "/" in a name makes nested groups."""
        import h5py

        if self.is_hdf5 and self.path is not None and not self.changed:
            shutil.copyfile(self.path, path)
            return
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            for name, entry in self._entries.items():
                group = _group(data, name)
                for index, array in enumerate(entry.blobs):
                    group.create_dataset(str(index), data=np.asarray(array, np.float32))


def _group(data: h5py.Group, name: str) -> h5py.Group:
    """The group /data/<name>; raises UsageError where HDF5 gives that place another name or another use."""
    try:
        group = data.require_group(name)
    except (TypeError, ValueError):
        group = None
    if group is None or group.name != f"/data/{name}":
        raise UsageError("HDF5 cannot hold a layer of this name", layer=name, hint="write a .caffemodel")
    return group


def _write_span(file: IO[bytes], run: tuple[Any, int, int] | None) -> None:
    if run is None:
        return
    buffer, start, end = run
    start = _copy_inside_system(buffer, start, end, file)
    with memoryview(buffer) as view, view[start:end] as span:
        file.write(span)


def _copy_inside_system(buffer: MappedFile, start: int, end: int, file: IO[bytes]) -> int:
    """Let the kernel append bytes of a mapped file to another, where it can; how far it came."""
    if end - start < _LARGE or not hasattr(os, "copy_file_range"):
        return start
    file.flush()
    with suppress(OSError):  # no real file, or two file systems: what is left is written from the map
        target = file.fileno()
        while start < end and (count := os.copy_file_range(buffer.descriptor, target, end - start, start)):
            start += count
    return start


def load(path: str | Path) -> Weights:
    """Open a caffemodel or HDF5 weight file, told apart by their first bytes.

    Raises CaffemodelError where the file is empty, a Git LFS pointer, truncated, no protobuf at all, or
    holds no layer; FileError where it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            magic = file.read(len(_LFS_MAGIC))
            if not magic:
                raise CaffemodelError("the file is empty", path=path, hint="download it again")
            if magic.startswith(_LFS_MAGIC):
                hint = "fetch the file itself (git lfs pull)"
                raise CaffemodelError("this is a Git LFS pointer, not the weights", path=path, hint=hint)
            if magic.startswith(HDF5_MAGIC):
                return _load_hdf5(path)
            buffer = MappedFile.of(file)
    except OSError as error:
        raise unreadable(path, error) from error
    return _load_mapped(buffer, str(path))


def _load_mapped(buffer: MappedFile, path: str) -> Weights:
    pieces: list[Piece] = []
    dialect = V2
    layers, left = 0, _MOST_PARTS
    try:
        for field in wire.fields(buffer, 0, len(buffer)):
            found = next((d for d in (V2, V1) if d.field == field.number and field.kind == BYTES), None)
            left -= 1
            if left < 0:
                raise WireError(_TOO_MANY, field.start)
            if found is None:
                pieces.append(Raw(buffer, field.start, field.end))
                continue
            dialect, layers = found, layers + 1
            name, spans = _layer(buffer, field, found, left)
            left -= len(spans)
            if spans:
                pieces.append(MappedEntry(name, buffer, field.start, field.end, spans, path))
            else:
                pieces.append(Raw(buffer, field.start, field.end))
    except WireError as error:
        plain = not layers and not is_binary(path)
        said = "no caffemodel but text" if plain else _broken(buffer, layers, error)
        raise CaffemodelError(said, path=path, hint="download it again") from error
    if not layers:
        raise CaffemodelError("holds no layer; it is no caffemodel", path=path)
    return Weights(pieces, path=path, dialect=dialect)


def _broken(buffer: MappedFile, layers: int, error: WireError) -> str:
    offset = error.offset
    if layers:
        return f"truncated or damaged at byte {offset:,} of {len(buffer):,}, behind {layers} whole layers ({error})"
    return f"no caffemodel, or one cut off in its first layer: at byte {offset:,} of {len(buffer):,}, {error}"


def _layer(
    buffer: MappedFile, field: wire.WireField, dialect: Dialect, most: int
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Name and at ``most`` so many blob spans of one layer message, V0's nested form included."""
    name = ""
    spans: list[tuple[int, int]] = []
    for inner in wire.fields(buffer, field.at, field.end):
        if inner.kind != BYTES:
            continue
        if inner.number == dialect.layer_name:
            name = _name(buffer, inner)
        elif inner.number == dialect.blobs:
            _append(spans, inner, most)
        elif dialect is V1 and inner.number == _V0_LAYER:
            for old in wire.fields(buffer, inner.at, inner.end):
                if old.number == _V0_NAME and old.kind == BYTES:
                    name = _name(buffer, old)
                elif old.number == _V0_BLOBS and old.kind == BYTES:
                    _append(spans, old, most)
    return name, tuple(spans)


def _append(spans: list[tuple[int, int]], blob: wire.WireField, most: int) -> None:
    if len(spans) >= most:
        raise WireError(_TOO_MANY, blob.start)
    spans.append((blob.at, blob.end))


def _name(buffer: MappedFile, field: wire.WireField) -> str:
    """A layer's name, odd bytes kept as a prototxt's are."""
    return buffer[field.at : field.end].decode("utf-8", "surrogateescape")


def read_blob(buffer: MappedFile, start: int, end: int) -> np.ndarray:
    """One BlobProto as a read-only float32 array; a view of the map where its data is one packed run."""
    legacy: dict[int, int] = {}
    dims: list[int] = []
    singles, doubles = _Runs(), _Runs()
    raw: wire.WireField | None = None
    raw_type = -1
    position = start
    while position < end:
        field = next(wire.fields(buffer, position, end))
        position = field.end
        if field.number in _LEGACY_AXES and field.kind == VARINT:
            legacy[field.number] = field.value
        elif field.number == _SHAPE and field.kind == BYTES:
            dims = (dims + _dims(buffer, field.at, field.end))[: _MOST_AXES + 1]
        elif field.number == _DATA and field.kind == BYTES:
            singles.add(_packed(buffer, field.at, field.end, "<f4"))
        elif field.number == _DOUBLE and field.kind == BYTES:
            doubles.add(_packed(buffer, field.at, field.end, "<f8"))
        elif (field.number, field.kind) in ((_DATA, FIXED32), (_DOUBLE, FIXED64)):
            run, position = _unpacked(buffer, field, end)
            (singles if field.kind == FIXED32 else doubles).add(run)
        elif field.number == _RAW_TYPE and field.kind == VARINT:
            raw_type = field.value
        elif field.number == _RAW and field.kind == BYTES:
            raw = field
    if raw is not None:
        doubles.add(_raw(buffer, raw, raw_type))
    shape = tuple(legacy.get(axis, 0) for axis in _LEGACY_AXES) if legacy else tuple(dims)
    if len(shape) > _MOST_AXES:
        raise ValueError(f"a blob of more than the {_MOST_AXES} axes that Caffe takes")
    data = (doubles if doubles.size else singles).joined()
    text = " x ".join(map(str, shape)) or "a single number"
    if data.size != prod(shape):
        raise ValueError(f"a blob of shape {text} ({prod(shape):,}) holds {data.size:,} numbers")
    if any(dim > _LARGEST_DIM for dim in shape):
        raise ValueError(f"a blob of shape {text}; no axis of Caffe's is that long")
    with np.errstate(over="ignore"):  # a double beyond float32 is infinite, as in Caffe
        return _frozen(data.astype(np.float32, copy=False).reshape(shape))


def _raw(buffer: MappedFile, field: wire.WireField, kind: int) -> np.ndarray:
    """NVIDIA's form of the numbers: bytes of a type that stands beside them, half precision among others."""
    if kind not in _RAW_DTYPES:
        raise ValueError(f"raw data of NumericType {kind}, which is no floating-point type")
    return _packed(buffer, field.at, field.end, _RAW_DTYPES[kind])


class _Runs:
    """Runs of numbers, one behind the other; many small ones are joined on the way, so that none costs an array."""

    def __init__(self) -> None:
        self.size = 0
        self._runs: list[np.ndarray] = []
        self._joined = 0

    def add(self, run: np.ndarray) -> None:
        """Append a run."""
        self.size += run.size
        self._runs.append(run)
        if len(self._runs) - self._joined > _MOST_RUNS:
            self._runs[self._joined :] = [np.concatenate(self._runs[self._joined :])]
            self._joined += 1

    def joined(self) -> np.ndarray:
        """All numbers; the run itself where there is but one."""
        return (
            self._runs[0] if len(self._runs) == 1 else np.concatenate([np.empty(0, np.float32), *self._runs])
        )


def _packed(buffer: MappedFile, start: int, end: int, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if (end - start) % size:
        raise ValueError(f"packed data of {end - start} bytes is no whole number of values")
    return np.frombuffer(buffer, dtype, (end - start) // size, start)


def _unpacked(buffer: MappedFile, first: wire.WireField, end: int) -> tuple[np.ndarray, int]:
    """A run of single values, each behind the same tag, and the position behind the run."""
    head = first.at - first.start
    step = first.end - first.start
    dtype = "<f4" if first.kind == FIXED32 else "<f8"
    rows = np.frombuffer(buffer, np.uint8, (end - first.start) // step * step, first.start).reshape(-1, step)
    other = np.flatnonzero((rows[:, :head] != rows[0, :head]).any(axis=1))
    count = int(other[0]) if other.size else len(rows)
    values = np.ascontiguousarray(rows[:count, head:]).view(dtype).reshape(-1)
    return values, first.start + count * step


def _dims(buffer: MappedFile, start: int, end: int) -> list[int]:
    dims: list[int] = []
    for field in wire.fields(buffer, start, end):
        if field.number != 1 or len(dims) > _MOST_AXES:
            continue
        if field.kind == VARINT:
            dims.append(field.value)
        else:
            position = field.at
            while position < field.end and len(dims) <= _MOST_AXES:
                value, position = wire.varint(buffer, position, field.end)
                dims.append(value)
    return dims


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def read_dataset(dataset: h5py.Dataset) -> np.ndarray:
    """A data set as a read-only float32 array; raises ValueError where it is none, or hardly any of it is stored."""
    if dataset.shape is None or dataset.dtype.kind not in "fiu":
        raise ValueError(f'data set "{dataset.name}" holds no numbers')
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > max(_SMALL, _MOST_RATIO * stored):
        raise ValueError(
            f'data set "{dataset.name}" is to hold {dataset.nbytes:,} bytes, {stored:,} are stored'
        )
    return _frozen(np.asarray(dataset[()], np.float32))


def _load_hdf5(path: str | Path) -> Weights:
    import h5py

    try:
        file = h5py.File(path, "r")
        data = file.get("data")
        found: dict[str, dict[int, h5py.Dataset]] = {}

        def visit(name: str, item: object) -> None:
            if name.count("/") > _DEEPEST:
                raise ValueError(f"groups are nested more than {_DEEPEST} deep")
            layer, _, index = name.rpartition("/")
            if isinstance(item, h5py.Dataset) and layer and index.isascii() and index.isdigit():
                found.setdefault(layer, {})[int(index)] = item

        if isinstance(data, h5py.Group):
            data.visititems(visit)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CaffemodelError(f"truncated or damaged HDF5 file ({error})", path=path) from error
    if not found:
        raise CaffemodelError("holds no layer under /data; it is no Caffe weight file", path=path)
    entries = [
        Hdf5Entry(name, tuple(blobs[i] for i in sorted(blobs)), str(path)) for name, blobs in found.items()
    ]
    return Weights(entries, path=str(path))
