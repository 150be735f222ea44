"""Arrays from and to .npy and .npz files, as the commands take and give them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from .errors import FileError, UsageError
from .files import missing

_SMALL_NPZ, _MOST_PACKED = 2**27, 20  # bytes that a .npz may always unpack to; beyond, times its own size


def write_npz(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """A .npz of these arrays, whatever they are called; the same arrays give the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz, or of a .npy under the name ""; raises FileError where it is neither."""
    if not Path(path).is_file():
        raise missing(path)
    _refuse_bomb(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if hasattr(loaded, "files") else {"": loaded}
    except Exception as error:  # a dozen kinds, of NumPy, zipfile and zlib
        said = "" if "pickle" in str(error) else f": {error}"  # what NumPy takes other files for
        raise FileError(f"is no NumPy file{said}", path=path, hint="give a .npy or .npz file") from error


def _refuse_bomb(path: str) -> None:
    """Raise FileError where the members of a .npz are packed so tightly that they hold nothing but padding."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # a .npy; or NumPy will say what is wrong
    if size > max(_SMALL_NPZ, _MOST_PACKED * Path(path).stat().st_size):
        raise FileError(f"would unpack to {size:,} bytes, {_MOST_PACKED} times its size or more", path=path)


def feeds(items: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """What --input names, by blob; a lone .npy feeds a net of one input, a .npz the inputs that it holds.

    An input that an in-place layer overwrote stands in a dump of Caffe under "@input:<blob>".
    """
    found: dict[str, np.ndarray] = {}
    for item in items:
        blob, equals, path = item.rpartition("=")
        if not equals or Path(item).exists():
            blob, path = "", item
        arrays = read_arrays(path)
        if "" not in arrays:
            keys = {name: f"@input:{name}" if f"@input:{name}" in arrays else name for name in names}
            if not any(key in arrays for key in keys.values()):
                raise UsageError("holds none of the net's inputs: " + ", ".join(names), path=path)
            found.update({name: arrays[key] for name, key in keys.items() if key in arrays})
        elif blob or len(names) == 1:
            found[blob or names[0]] = arrays[""]
        else:
            raise UsageError(
                f"the net has {len(names)} inputs", path=path, hint=f"say which: {names[0]}={path}"
            )
    return found
