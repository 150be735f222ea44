"""Writing files so that nothing is ever half-written and no input is ever overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import FileError, UsageError, alike


@contextmanager
def writing(paths: Iterable[str | Path], inputs: Iterable[str | Path | None] = ()) -> Iterator[list[Path]]:
    """Temporary names for ``paths``, renamed to them together when the block ends well.

    When the block raises, the temporary files are removed and whatever stood at ``paths`` stays. Raises
    UsageError where a path is one of ``inputs``, FileError where its folder cannot be written.
    """
    targets = check(paths, inputs)
    temporary = [target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        yield temporary
        _check_written(temporary, targets)
        for here, there in zip(temporary, targets, strict=True):
            os.replace(here, there)
    except OSError as error:
        raise FileError(
            f"cannot be written: {error.strerror or error}", path=error.filename2 or targets[0]
        ) from error
    finally:
        for path in temporary:
            with suppress(FileNotFoundError):
                path.unlink()


def check(paths: Iterable[str | Path], inputs: Iterable[str | Path | None] = ()) -> list[Path]:
    """The paths, where they can be written: to be seen before long work. Raises as ``writing`` does."""
    targets = [Path(path) for path in paths]
    sources = [Path(path) for path in inputs if path is not None]
    for i, target in enumerate(targets):
        _refuse(target, sources, targets[:i])
    return targets


def _check_written(temporary: list[Path], targets: list[Path]) -> None:
    """See before the first renaming that the last one can be done too."""
    for here, there in zip(temporary, targets, strict=True):
        if not here.is_file():
            raise FileError("nothing was written for it", path=there)
        if there.is_dir():
            raise FileError("cannot be written: it has become a folder", path=there)


def _refuse(target: Path, sources: list[Path], others: list[Path]) -> None:
    if target.is_dir():
        raise UsageError("is a folder, a file was to be written", path=target, hint="give a file name")
    folder = target.parent
    if not folder.is_dir():
        raise FileError(
            f"cannot be written: there is no folder {str(folder)!r}", path=target, hint="make it first"
        )
    if not os.access(folder, os.W_OK):
        raise FileError(f"cannot be written: no permission in folder {str(folder)!r}", path=target)
    if any(target.name == other.name and folder.samefile(other.parent) for other in others):
        raise UsageError("is to be written twice", path=target, hint="give each output a name of its own")
    if target.exists() and any(source.exists() and target.samefile(source) for source in sources):
        raise UsageError(
            "would be overwritten, and it is an input", path=target, hint="choose another output name"
        )


def read_text(path: str | Path) -> str:
    """The file as text: UTF-8, odd bytes and line ends kept so that writing it gives the same bytes."""
    return read_bytes(path).decode("utf-8", "surrogateescape")


def text_bytes(text: str) -> bytes:
    """The bytes of a text read by ``read_text``."""
    return text.encode("utf-8", "surrogateescape")


def read_bytes(path: str | Path) -> bytes:
    """The file's bytes; raises FileError in one line where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: OSError) -> FileError:
    """The FileError for a file that the system would not open."""
    if isinstance(error, FileNotFoundError):
        return missing(path)
    if isinstance(error, IsADirectoryError):
        return FileError("is a folder, a file is needed", path=path)
    return FileError(f"cannot be read: {error.strerror or error}", path=path)


def missing(path: str | Path) -> FileError:
    """The FileError for a file that is not there; names those of its folder that are spelt alike."""
    folder, name = Path(path).parent, Path(path).name
    try:
        beside = sorted(one.name for one in folder.iterdir() if one.is_file())
    except OSError:
        beside = []
    return FileError("no such file", path=path, hint=alike(name, beside))


def is_binary(path: str | Path) -> bool:
    """Whether a file is weights, or a pointer to some, rather than a prototxt; raises FileError."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise unreadable(path, error) from error
    control = set(range(0x20)) - set(b"\t\n\v\f\r")
    return not control.isdisjoint(head) or head.startswith(b"version https://git-lfs")
