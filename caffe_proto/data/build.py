"""LMDBs and mean files as Caffe's convert_mnist_data, convert_cifar_data, convert_imageset and compute_image_mean."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from .. import files, schema
from ..errors import FileError, UsageError
from . import cifar_files, open_source
from .arrays import mnist
from .base import Joined, Source, ahead
from .folders import Entry, ImageFiles
from .pictures import Size, encode, resize

Record = tuple[str, bytes]
Step = Callable[[], None]

_COMMIT = 1000  # records in one transaction
_FIRST_MAP = 1 << 24
_MNIST_DIGITS, _CIFAR_DIGITS, _IMAGE_DIGITS = 8, 5, 8


def _no_step() -> None:
    return None


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the name ``path`` when the block ends well, and goes away when it raises.

    Raises UsageError where the name is taken, FileError where the folder above cannot be written.
    """
    target = Path(path)
    if target.exists():
        raise UsageError(
            "exists already, a new folder was to be made", path=target, hint="remove it or choose another"
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(target)
    except OSError as error:
        raise FileError(f"cannot be written: {error.strerror or error}", path=target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_lmdb(folder: Path, records: Iterable[Record]) -> int:
    """Write an LMDB of these records; returns how many. The map doubles whenever it is full, as in Caffe."""
    count = 0
    remaining = iter(records)
    try:
        with lmdb.open(str(folder), map_size=_FIRST_MAP) as env:
            while chunk := list(islice(remaining, _COMMIT)):
                _put(env, chunk)
                count += len(chunk)
    except lmdb.Error as error:
        raise FileError(f"cannot be written: {error}", path=folder) from error
    return count


def _put(env: lmdb.Environment, records: Sequence[Record]) -> None:
    while True:
        try:
            with env.begin(write=True) as writing:
                for key, value in records:
                    writing.put(os.fsencode(key), value)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


def datum(image: np.ndarray, label: int, *, encoded: bool | None = None) -> bytes:
    """A Datum of raw bytes (C, H, W); ``encoded`` is written where given, as Caffe's tools do for images."""
    made: Any = schema.message_class("Datum")()
    made.channels, made.height, made.width = image.shape
    made.data = image.tobytes()
    made.label = label
    if encoded is not None:
        made.encoded = encoded
    return bytes(made.SerializeToString())


def _encoded_datum(data: bytes, label: int) -> bytes:
    made: Any = schema.message_class("Datum")()
    made.data, made.label, made.encoded = data, label, True
    return bytes(made.SerializeToString())


def build_mnist(images: Path, labels: Path, output: str | Path, step: Step = _no_step) -> int:
    """convert_mnist_data: an LMDB of idx images and labels, plain or gzipped; returns the number of records."""
    source = mnist(images, labels)
    with new_folder(output) as folder:
        return write_lmdb(folder, _array_records([source], _MNIST_DIGITS, step))


def _array_records(sources: Iterable[Source], digits: int, step: Step) -> Iterator[Record]:
    position = 0
    for source in sources:
        for index in range(len(source)):
            sample = source.read(index)
            yield f"{position:0{digits}}", datum(sample.image, sample.label or 0)
            position += 1
            step()


def build_cifar10(folder: Path, output: str | Path, step: Step = _no_step) -> dict[str, int]:
    """convert_cifar_data and compute_image_mean: cifar10_train_lmdb, cifar10_test_lmdb and mean.binaryproto.

    ``folder`` holds the binary or python batches; what is missing of training and testing is left out. Returns
    the number of records by name.
    """
    if not folder.is_dir():
        raise FileError("no such folder", path=folder)
    parts = dict(zip(("train", "test"), cifar_files(folder), strict=True))
    if not any(parts.values()):
        raise FileError("holds no batches of CIFAR-10", path=folder, hint="data_batch_1.bin and so on")
    made: dict[str, int] = {}
    with new_folder(output) as temporary:
        for name, paths in parts.items():
            if not paths:
                continue
            sources = [open_source(one) for one in paths]
            database = temporary / f"cifar10_{name}_lmdb"
            database.mkdir()
            made[database.name] = write_lmdb(database, _array_records(sources, _CIFAR_DIGITS, step))
            if name == "train":
                (temporary / "mean.binaryproto").write_bytes(mean_bytes(image_mean(Joined(folder, sources))))
    return made


@dataclass
class ImageSet:
    """convert_imageset: what its flags say."""

    resize: Size | None = None
    gray: bool = False
    shuffle: bool = False
    seed: int = 0
    encode_type: str | None = None
    encoded: bool = False
    check_size: bool = False
    skip_bad: bool = False
    skipped: list[FileError] = field(default_factory=list)
    """The images that were left out, once it was built."""

    def build(self, source: ImageFiles, output: str | Path, step: Step = _no_step) -> int:
        """Write the LMDB of a list's images; returns the number of records."""
        self.skipped = []
        with new_folder(output) as folder:
            return write_lmdb(folder, self._records(source, step))

    def _records(self, source: ImageFiles, step: Step) -> Iterator[Record]:
        order = np.arange(len(source))
        if self.shuffle:
            order = np.random.default_rng(abs(self.seed)).permutation(len(source))
        first: tuple[str, int] | None = None
        made = ahead(lambda i: (i, self._value(source, i)), order.tolist(), os.cpu_count() or 1, 64)
        for position, (index, value) in enumerate(made):
            step()
            entry = source.entries[index]
            if isinstance(value, FileError):
                if not self.skip_bad:
                    raise value
                self.skipped.append(value)
                continue
            serialized, size = value
            first = first or (entry.name, size)
            if self.check_size and size != first[1]:
                path, line = source.place(index)
                raise FileError(
                    f'image "{entry.name}" has {size:,} bytes, "{first[0]}" {first[1]:,}', path=path, line=line,
                    hint="resize them, or leave the check out",
                )  # fmt: skip
            yield f"{position:0{_IMAGE_DIGITS}}_{entry.name}", serialized

    def _value(self, source: ImageFiles, index: int) -> tuple[bytes, int] | FileError:
        """One serialised Datum and the bytes of data in it."""
        entry = source.entries[index]
        extension = self._extension(entry)
        label = entry.label or 0
        try:
            if extension and self.resize is None and extension == _spelt(Path(entry.name).suffix[1:].lower()):
                data = files.read_bytes(entry.file)
                source.read(index)  # a broken file is found now, not in training
                return _encoded_datum(data, label), len(data)
            image = source.read(index).image
        except FileError as error:
            path, line = source.place(index)
            return FileError(error.message, path=path, line=line)
        image = image if self.resize is None else resize(image, self.resize)
        if extension:
            data = encode(image, extension)
            return _encoded_datum(data, label), len(data)
        return datum(image, label, encoded=False), image.size

    def _extension(self, entry: Entry) -> str:
        """The encoding of one image, "" for raw bytes; that of its file where none is asked for."""
        if self.encode_type:
            return _spelt(self.encode_type.lower())
        if not self.encoded:
            return ""
        suffix = Path(entry.name).suffix[1:].lower()
        if not suffix:
            raise UsageError(
                f'image "{entry.name}" has no extension to tell its encoding', hint="name the encoding"
            )
        return _spelt(suffix)


def _spelt(extension: str) -> str:
    return "jpg" if extension == "jpeg" else extension


def image_mean(source: Source) -> np.ndarray:
    """compute_image_mean: the mean image (C, H, W), float32; raises FileError where sizes differ."""
    total: np.ndarray | None = None
    for sample in source:
        if total is None:
            total = np.zeros(sample.image.shape)
        if sample.image.shape != total.shape:
            raise FileError(
                f'image "{sample.name}" is {sample.image.shape}, others are {total.shape}', path=source.path,
                hint="resize them first",
            )  # fmt: skip
        total += sample.image
    if total is None:
        raise FileError("holds no images", path=source.path)
    return total.astype(np.float32) / np.float32(len(source))


def mean_bytes(mean: np.ndarray) -> bytes:
    """A mean image (C, H, W) as Caffe's mean file: a BlobProto of num, channels, height and width."""
    blob: Any = schema.message_class("BlobProto")()
    blob.num = 1
    blob.channels, blob.height, blob.width = mean.shape
    blob.data.extend(mean.ravel().tolist())
    return bytes(blob.SerializeToString())
