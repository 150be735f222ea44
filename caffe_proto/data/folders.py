"""Image files: a folder of class folders, a folder of images, or a list file of Caffe's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..errors import FileError
from .base import Sample, Source
from .pictures import SUFFIXES, Size, load


@dataclass(frozen=True)
class Entry:
    """One image: the name that is shown, its file, its label, and its line in a list."""

    name: str
    file: str
    label: int | None
    line: int | None = None


class ImageFiles(Source):
    """Images in files of their own, BGR where ``color``, else gray."""

    def __init__(
        self, path: str | Path, entries: Sequence[Entry], size: Size | None = None, color: bool | None = None
    ) -> None:
        super().__init__(path, size)
        self.entries = entries
        self.color = color is not False

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labelled(self) -> bool:
        return self.entries[0].label is not None

    def read(self, index: int) -> Sample:
        entry = self.entries[index]
        try:
            return Sample(entry.name, load(entry.file, self.color), entry.label)
        except FileError as error:
            if entry.line is None:
                raise
            raise FileError(f'image "{entry.name}": {error.message}') from error

    def place(self, index: int) -> tuple[str, int | None]:
        entry = self.entries[index]
        return (entry.file, None) if entry.line is None else (self.path, entry.line)


def folder_entries(folder: Path) -> list[Entry]:
    """The images of a folder: those of its class folders, whose sorted names are the labels, else its own.

    A folder of one class tells nothing apart: its images have no labels, as those of a flat folder. Raises FileError on a class without images, and where images lie beside class folders.
    """
    own = list(_images(folder))
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")
    if own and classes:
        raise FileError(
            f'holds images beside the class folder "{classes[0]}"',
            path=folder,
            hint="give the folder of one kind, or a list file",
        )
    if own:
        return [Entry(name, str(folder / name), None) for name in own]
    entries = []
    for label, name in enumerate(classes):
        found = list(_images(folder / name))
        if not found:
            raise FileError("holds no images, and is a class by its place", path=folder / name)
        entries += [
            Entry(f"{name}/{one}", str(folder / name / one), label if len(classes) > 1 else None)
            for one in found
        ]
    return entries


def _images(folder: Path) -> Iterator[str]:
    """The names of the image files in a folder, sorted."""
    with os.scandir(folder) as found:
        names = sorted(one.name for one in found if one.is_file())
    return (name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES and name[0] != ".")


def list_entries(path: Path, root: str | None = None) -> list[Entry]:
    """The images of a list file, ``path label`` a line, below ``root`` (default: the list's own folder).

    Raises FileError with the line where a line is no path and label.
    """
    base = Path(root) if root is not None else path.parent
    entries = []
    for number, line in enumerate(files.read_text(path).rstrip().splitlines(), 1):
        name, _, label = line.strip().rpartition(" ") if "\t" not in line else line.strip().rpartition("\t")
        if not name or not label.isdecimal():
            raise FileError(
                "is no image path and label" if line.strip() else "is empty", path=path, line=number,
                hint="each line is a path, a space and the number of the class",
            )  # fmt: skip
        name = name.strip()
        file = base / (name.lstrip("/") if root is not None else name)
        entries.append(Entry(name, str(file), int(label), number))
    if not entries:
        raise FileError("is empty, a list of images was expected", path=path)
    return entries
