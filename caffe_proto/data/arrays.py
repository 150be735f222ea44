"""Data sets that are arrays: .npz, MNIST's idx files, CIFAR's binary and python batches, HDF5."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from .. import files
from ..errors import FileError
from .base import Arrays, Sample, Source, checked_labels
from .pictures import Size

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
# Bytes before the pixels of a CIFAR record, and the largest label in each: CIFAR-10, CIFAR-100.
_CIFAR = ((9,), (19, 99))
_UNSIGNED_BYTE = 8
_GZIP = b"\x1f\x8b"


def npz(path: Path, size: Size | None = None) -> Arrays:
    """``x`` (N, C, H, W) or (N, H, W), and ``y`` (N,) where there are labels; held in memory."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in ("x", "y") if name in stored.files}
            names = ", ".join(stored.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FileError(f"is no NumPy file: {error}", path=path) from error
    if "x" not in found:
        raise FileError(
            f"has no array x; it has {names or 'none'}", path=path, hint="store images as x, labels as y"
        )
    images = found["x"][:, None] if found["x"].ndim == 3 else found["x"]
    if images.dtype.kind not in "uif":
        raise FileError(f"has x of type {images.dtype}, numbers are needed", path=path)
    return Arrays(path, images, found.get("y"), size)


def idx(path: Path, size: Size | None = None) -> Arrays:
    """MNIST's images, and the labels that lie beside under the same name."""
    return mnist(path, labels_beside(path), size)


def mnist(images: Path, labels: Path | None, size: Size | None = None) -> Arrays:
    """MNIST's images and labels, plain or gzipped."""
    pixels = _idx_array(images, 3)
    stored = None if labels is None else _idx_array(labels, 1)
    if stored is not None and len(stored) != len(pixels):
        raise FileError(f"has {len(stored):,} labels, {images} has {len(pixels):,} images", path=labels)
    return Arrays(images, pixels[:, None], stored, size)


def labels_beside(path: Path) -> Path | None:
    """The label file of an idx image file: ``t10k-labels-idx1-ubyte`` for ``t10k-images-idx3-ubyte``."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    if name == path.name:
        return None
    plain = name.removesuffix(".gz")
    return next(
        (path.with_name(one) for one in (name, plain, f"{plain}.gz") if path.with_name(one).is_file()), None
    )


def is_idx(head: bytes) -> bool:
    """Whether a file's first bytes, unpacked where they are gzip, are those of an idx file."""
    if head.startswith(_GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 4)
        except zlib.error:
            return False
    return head[:3] == bytes((0, 0, _UNSIGNED_BYTE)) and head[3:4] in (b"\1", b"\3")


def _idx_array(path: Path, axes: int) -> np.ndarray:
    data: Any = files.read_bytes(path)
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise FileError(f"is a broken gzip file: {error}", path=path) from error
    if len(data) < 4 + 4 * axes or data[2] != _UNSIGNED_BYTE or data[3] != axes:
        raise FileError(
            f"is no idx file of bytes with {axes} axes",
            path=path,
            hint="MNIST's images have 3 axes, its labels 1",
        )
    shape = tuple(int(dim) for dim in np.frombuffer(data, ">u4", axes, 4))
    pixels = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if pixels.size != np.prod(shape, dtype=np.int64):
        raise FileError(
            f"holds {pixels.size:,} bytes for {' x '.join(map(str, shape))}: it is truncated", path=path
        )
    return pixels.reshape(shape)


def is_cifar(path: Path) -> bool:
    """Whether a file is whole records of CIFAR-10 or CIFAR-100: as many bytes as they have, labels in bounds."""
    return _cifar_records(path) is not None


def cifar(path: Path, size: Size | None = None) -> Arrays:
    """A binary batch of CIFAR-10, or of CIFAR-100 with its fine labels; RGB planes as stored."""
    records = _cifar_records(path)
    if records is None:
        raise FileError("is no binary batch of CIFAR: its bytes are no whole records", path=path)
    n, wide = records.shape
    return Arrays(
        path, records[:, wide - _PIXELS :].reshape(n, 3, _SIDE, _SIDE), records[:, wide - _PIXELS - 1], size
    )


def _cifar_records(path: Path) -> np.ndarray | None:
    length = os.path.getsize(path)
    for bounds in _CIFAR:
        wide = len(bounds) + _PIXELS
        if length and length % wide == 0:
            records = np.memmap(path, np.uint8, "r").reshape(-1, wide)
            if (records[:, : len(bounds)] <= np.array(bounds)).all():
                return records
    return None


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays, lists and strings; a pickle that wants anything else run is refused."""

    _ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.ndarray.__reduce__(np.empty(0))[0]  # type: ignore[arg-type]
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def cifar_python(path: Path, size: Size | None = None) -> Arrays:
    """A python batch of CIFAR-10 or CIFAR-100 (fine labels); nothing but arrays and lists is unpickled."""
    try:
        stored = _PlainUnpickler(io.BytesIO(files.read_bytes(path)), encoding="bytes").load()
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in stored.items()}
        images = np.asarray(named["data"], np.uint8).reshape(-1, 3, _SIDE, _SIDE)
        labels = named["labels"] if "labels" in named else named["fine_labels"]
    except FileError:
        raise
    except Exception as error:  # a pickle can fail in any way
        raise FileError(f"is no python batch of CIFAR: {error}", path=path) from error
    return Arrays(path, images, np.asarray(labels), size)


class Hdf5(Source):
    """One HDF5 file of Caffe's: ``data`` (N, C, H, W) and ``label`` (N,) or (N, 1), read row by row."""

    order = "rgb"

    def __init__(self, path: Path, size: Size | None = None) -> None:
        import h5py

        super().__init__(path, size)
        self._lock = Lock()
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise FileError(f"is no HDF5 file that can be read: {error}", path=path) from error
        try:
            self._images = self._dataset("data")
            if self._images is None or self._images.ndim not in (3, 4) or not len(self._images):
                raise FileError(
                    'has no dataset "data" of images (N, C, H, W)',
                    path=path,
                    hint="it has " + ", ".join(self._file),
                )
            stored = self._dataset("label")
            self._labels = checked_labels(path, None if stored is None else stored[()], len(self._images))
        except FileError:
            self.close()
            raise

    def _dataset(self, name: str) -> Any:
        found = self._file.get(name)
        return found if hasattr(found, "shape") else None

    def __len__(self) -> int:
        return len(self._images)

    @property
    def labelled(self) -> bool:
        return self._labels is not None

    def read(self, index: int) -> Sample:
        try:
            with self._lock:
                image = self._images[index]
        except OSError as error:
            raise FileError(f"row {index} cannot be read: {error}") from error
        label = None if self._labels is None else int(self._labels[index])
        return Sample(f"{Path(self.path).name}[{index}]", image[None] if image.ndim == 2 else image, label)

    def close(self) -> None:
        self._file.close()
