"""Images with labels from whatever they lie in: ``open_source`` tells the kinds apart by their content."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from .. import files
from ..errors import FileError, UsageError
from . import arrays, folders
from .base import Arrays, Joined, Order, Sample, Source
from .pictures import Size

__all__ = ["Arrays", "Joined", "Order", "Sample", "Size", "Source", "open_source"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_LMDB = b"\xde\xc0\xef\xbe"  # 16 bytes into its data file
_HEAD = 4096
_KINDS = "a folder of class folders, a list file, an LMDB, HDF5, .npz, MNIST's idx files or CIFAR's batches"


def open_source(
    src: str | Path, *, root: str | None = None, resize: Size | None = None, color: bool | None = None
) -> Source:
    """Open images: a folder of class folders (or of images), a list file ``path label`` below ``root``, an LMDB,
    an HDF5 file or a list of such, ``.npz`` (x, y), MNIST's idx images, CIFAR's binary or python batches (a
    folder or a pattern of those too).

    Images are resized to ``resize`` (height, width) on reading. ``color`` False reads image files as gray; for encoded records
    of an LMDB it is Caffe's force_color or force_gray. Image files come in BGR order, arrays as they are
    stored. Raises FileError in one line where there is nothing to read, UsageError where ``root`` means nothing.
    """
    path = Path(src)
    if path.is_dir():
        opened = _folder(path, resize, color)
    elif any(sign in path.name for sign in "*?[") and not path.exists():
        opened = _joined(path, sorted(path.parent.glob(path.name)), resize)
    else:
        head = _head(path)
        if _is_text(head) and not arrays.is_cifar(path):
            return _text(path, root, resize, color)
        opened = _file(path, head, resize, color)
    if root is not None:
        opened.close()
        raise UsageError("a root goes with a list file of images, this is none", path=path)
    return opened


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise files.unreadable(path, error) from error


def _is_text(head: bytes) -> bool:
    return not any(byte < 32 and byte not in b"\t\n\r\f" for byte in head)


def _array_reader(path: Path, head: bytes) -> Callable[[Path, Size | None], Source] | None:
    """What reads a file of arrays, told by its first bytes; None where it is no such file."""
    if head.startswith(_HDF5):
        return arrays.Hdf5
    if head.startswith(b"PK\x03\x04"):
        return arrays.npz
    if arrays.is_cifar(path):
        return arrays.cifar
    if arrays.is_idx(head):
        return arrays.idx
    if head.startswith(b"\x80"):
        return arrays.cifar_python
    return None


def _file(path: Path, head: bytes, size: Size | None, color: bool | None) -> Source:
    if head[16:20] == _LMDB:
        return _lmdb(path.parent, size, color)
    reader = _array_reader(path, head)
    if reader is None:
        raise FileError("is no kind of images that is known", path=path, hint=f"give {_KINDS}")
    return reader(path, size)


def _lmdb(folder: Path, size: Size | None, color: bool | None) -> Source:
    from . import datums

    return datums.Datums(folder, size, color)


def _folder(folder: Path, size: Size | None, color: bool | None) -> Source:
    from .datums import DATA_FILE

    if (folder / DATA_FILE).is_file():
        return _lmdb(folder, size, color)
    entries = folders.folder_entries(folder)
    if entries:
        return folders.ImageFiles(folder, entries, size, color)
    batches = cifar_files(folder)
    if not any(batches):
        found = [
            path.name for path in sorted(folder.iterdir()) if path.is_file() and arrays.is_idx(_head(path))
        ]
        hint = f"name one of its files: {', '.join(found)}" if found else f"give {_KINDS}"
        raise FileError("holds no images", path=folder, hint=hint)
    if all(batches):
        raise FileError(
            "holds batches for training and for testing",
            path=folder,
            hint=f"name a file, or a pattern such as {folder / 'data_batch_*'}",
        )
    return _joined(folder, [*batches[0], *batches[1]], size)


def cifar_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """CIFAR's batches for training and for testing in a folder, binary or python, in the order of their names."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_batch(path)]
    train = [path for path in found if path.name.startswith(("data_batch", "train"))]
    return train, [path for path in found if path.name.startswith("test")]


def _is_batch(path: Path) -> bool:
    return _array_reader(path, _head(path)) in (arrays.cifar, arrays.cifar_python)


def _joined(path: Path, parts: Iterable[Path], size: Size | None) -> Source:
    """Files of arrays as one source."""
    with ExitStack() as stack:
        opened: list[Source] = []
        for part in parts:
            reader = _array_reader(part, _head(part))
            if reader is None:
                raise FileError("is neither HDF5 nor .npz nor a batch of CIFAR", path=part)
            opened.append(stack.enter_context(reader(part, size)))
        if not opened:
            raise FileError("no file has a name of that pattern", path=path)
        stack.pop_all()  # they stay open
    return opened[0] if len(opened) == 1 else Joined(path, opened)


def _text(path: Path, root: str | None, size: Size | None, color: bool | None) -> Source:
    first = next((line.strip() for line in files.read_text(path).splitlines() if line.strip()), "")
    if first.endswith((".h5", ".hdf5", ".hdf")):
        if root is not None:
            raise UsageError("a root goes with a list file of images, this is none", path=path)
        return _joined(path, _hdf5_list(path), size)
    return folders.ImageFiles(path, folders.list_entries(path, root), size, color)


def _hdf5_list(path: Path) -> Iterable[Path]:
    """The HDF5 files that a list names, one a line, from the present folder as Caffe does or from the list's own."""
    for number, line in enumerate(files.read_text(path).rstrip().splitlines(), 1):
        name = line.strip()
        found = next((one for one in (Path(name), path.parent / name) if name and one.is_file()), None)
        if found is None:
            raise FileError(f'no such file "{name}"' if name else "is empty", path=path, line=number)
        yield found
