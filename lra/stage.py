"""A working folder that an interrupted fit can be resumed from.

It holds files of arrays, and one small table of what they are, replaced as a whole: whatever the table names is
complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from caffe_proto.errors import FileError, PlanError

_TABLE = "stage.json"


class Stage:
    """Results of finished steps by name, each valid for one key, which says what it was made from.

    Without a folder a temporary one is used, which `close` removes; a given folder is taken over only where it
    is new, empty or was made here, and is left to be resumed until `finish` removes it.
    """

    def __init__(self, folder: str | Path | None = None, *, resume: bool = False) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self.folder = Path(folder if self._temporary is None else self._temporary.name)  # type: ignore[arg-type]
        self._table: dict[str, Any] = {}
        if self._temporary is None:
            self._open(resume)

    def _open(self, resume: bool) -> None:
        table = self.folder / _TABLE
        taken = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        if taken and not table.exists():
            raise FileError(
                "is no folder of an interrupted fit", path=self.folder, hint="remove it, or choose another -o"
            )
        if resume:
            if not table.exists():
                raise PlanError(
                    "there is no interrupted fit to resume", path=self.folder, hint="leave --resume out"
                )
            self._table = _read(table)
        elif table.exists():
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot be made: {error.strerror}", path=self.folder) from None
        self._write()

    @staticmethod
    def resumable(folder: str | Path) -> bool:
        """Whether a folder is one that a fit can be resumed from."""
        return (Path(folder) / _TABLE).exists()

    def get(self, name: str, key: str) -> Any:
        """What was put under a name for the same key, or None."""
        found = self._table.get(name)
        return found["value"] if found is not None and found["key"] == key else None

    def put(self, name: str, key: str, value: Any) -> None:
        """Note a finished step; ``value`` goes into JSON."""
        self._table[name] = {"key": key, "value": value}
        self._write()

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> str:
        """Write arrays into a file of the folder; gives its name."""
        file = f"{name}.npz"
        temporary = self.folder / f"{name}.part.npz"
        try:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise FileError(f"cannot be written: {error.strerror}", path=temporary) from None
        temporary.replace(self.folder / file)
        return file

    def load(self, file: str) -> dict[str, np.ndarray]:
        """The arrays of a file that `save` has written."""
        try:
            with np.load(self.folder / file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _unreadable(self.folder / file, error) from None

    def finish(self) -> None:
        """Everything is done: remove the folder."""
        if self._temporary is not None:
            self._temporary.cleanup()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove a temporary folder; a given one stays, to be resumed."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _write(self) -> None:
        temporary = self.folder / f"{_TABLE}.part"
        try:
            temporary.write_text(json.dumps(self._table), encoding="utf-8")
        except OSError as error:
            raise FileError(f"cannot be written: {error.strerror}", path=temporary) from None
        temporary.replace(self.folder / _TABLE)


def _read(table: Path) -> dict[str, Any]:
    try:
        found = json.loads(table.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(
            isinstance(entry, dict) and entry.keys() == {"key", "value"} for entry in found.values()
        ):
            raise ValueError("it is no table of finished steps")
    except (OSError, ValueError) as error:
        raise _unreadable(table, error) from None
    return found


def _unreadable(path: Path, error: Exception) -> FileError:
    return FileError(f"cannot be read: {error}", path=path, hint="fit again, without --resume")
