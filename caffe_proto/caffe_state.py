"""Caffe's own solver states, as Caffe writes them: binary ``.solverstate`` and ``.solverstate.h5``.

The history of a state is a list: one blob for every learnt blob of the net, in the order of its layers, a shared
one once, those without a learning rate too. Where the update rule carries two arrays, all of the first come first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from . import wire
from .errors import FileError, WeightsError
from .files import text_bytes, unreadable
from .layers.spec import Shape, text
from .solver import Update
from .weights import HDF5_MAGIC, MappedFile, read_blob, read_dataset, write_blob
from .wire import BYTES, VARINT, WireError

if TYPE_CHECKING:
    import h5py

Key = tuple[str, int]

_ITER, _LEARNED_NET, _HISTORY, _CURRENT_STEP = 1, 2, 3, 4  # of SolverState
_MOST_FIELDS = 100_000  # of a state; real ones have some hundreds
_LONGEST_NAME = 2**16  # bytes of learned_net
_HINT = "give a .solverstate or .solverstate.h5 of Caffe, or a .solverstate.npz of this program"


@dataclass(frozen=True, eq=False)
class CaffeState:
    """A solver of Caffe between two iterations; ``iteration`` is the next one.

    ``steps``: Caffe's current_step, the stepvalues that lie behind. ``learned_net``: the weights, as Caffe named
    them. ``history``: what the update rule carries, in the order of the file.
    """

    path: str
    iteration: int
    steps: int
    learned_net: str
    history: tuple[np.ndarray, ...]

    def weights(self) -> Path:
        """The file of the weights: from the present folder as Caffe finds it, else by its name beside the state.

        Raises FileError where it is in neither place.
        """
        beside = Path(self.path).parent / PureWindowsPath(self.learned_net).name
        for path in (self.learned_net, beside):
            if os.path.isfile(path):
                return Path(path).absolute()
        raise FileError(
            f'the state names the weights "{self.learned_net}"; they are neither there nor at "{beside}"',
            path=self.path,
            hint="put them there, or begin anew from other weights: --weights instead of --snapshot",
        )

    def histories(self, shapes: Mapping[Key, Shape], update: Update) -> dict[Key, tuple[np.ndarray, ...]]:
        """What the rule carries of each blob; ``shapes``: those of all learnt blobs, in the order of the net.

        Shapes may differ as long as the numbers are as many, as in Caffe: older states have four axes always.
        Raises WeightsError where they are not, or the blobs are not as many.
        """
        count, found = update.slots * len(shapes), len(self.history)
        if found != count:
            each = " (two for each)" if update.slots == 2 else ""
            raise WeightsError(
                f"holds {found} history blobs; {update.kind} with the {len(shapes)} learnt blobs of this net"
                f" has {count}{each}", path=self.path, hint="give the solver and the net it was made with",
            )  # fmt: skip
        for i, (key, shape) in enumerate([*shapes.items()] * update.slots):
            stored = self.history[i].shape
            if prod(stored) != prod(shape):
                raise WeightsError(
                    f"history blob {i}, of blob {key[1]}, is {text(stored)}; the net has {text(shape)}",
                    path=self.path, layer=key[0], hint="give the net it was made with",
                )  # fmt: skip
        return {
            key: tuple(array.reshape(shape) for array in self.history[i :: len(shapes)])
            for i, (key, shape) in enumerate(shapes.items())
        }

    def write(self, path: str | Path, *, hdf5: bool) -> None:
        """Write the state for Caffe to go on from, in its binary form or as HDF5."""
        name = text_bytes(self.learned_net)
        if hdf5:
            self._write_hdf5(path, name)
            return
        with open(path, "wb") as file:
            file.write(wire.tag(_ITER, VARINT) + wire.encode_varint(self.iteration))
            file.write(wire.encode_bytes(_LEARNED_NET, name))
            for array in self.history:
                write_blob(file, _HISTORY, array)
            file.write(wire.tag(_CURRENT_STEP, VARINT) + wire.encode_varint(self.steps))

    def _write_hdf5(self, path: str | Path, name: bytes) -> None:
        import h5py

        with h5py.File(path, "w") as file:
            file["iter"] = np.array([self.iteration], np.int32)
            file["learned_net"] = np.array(name, f"S{len(name) + 1}")  # Caffe reads it up to a zero
            file["current_step"] = np.array([self.steps], np.int32)
            group = file.create_group("history")
            for i, array in enumerate(self.history):
                group[str(i)] = np.asarray(array, np.float32)


def name_of(prefix: str, iteration: int, *, hdf5: bool) -> Path:
    """The state of a snapshot, named as Caffe names it."""
    return Path(f"{prefix}_iter_{iteration}.solverstate{'.h5' if hdf5 else ''}")


def listed(
    histories: Mapping[Key, Sequence[np.ndarray]], shapes: Mapping[Key, Shape], update: Update
) -> tuple[np.ndarray, ...]:
    """What ``CaffeState.histories`` takes apart; zeros for blobs that have none, as they have no learning rate."""
    return tuple(
        histories[key][slot] if key in histories else np.zeros(shape, np.float32)
        for slot in range(update.slots)
        for key, shape in shapes.items()
    )


def is_caffes(path: str | Path) -> bool:
    """Whether a state is one of Caffe, told by its first bytes: those of this program are zip archives."""
    try:
        with open(path, "rb") as file:
            return not file.read(4).startswith(b"PK\x03\x04")
    except OSError as error:
        raise unreadable(path, error) from error


def load(path: str | Path) -> CaffeState:
    """Read a state of either form, told apart by their first bytes.

    Raises FileError in one line where it cannot be read, is truncated, damaged or no state at all.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(len(HDF5_MAGIC))
            if not magic:
                raise FileError("the file is empty", path=path, hint=_HINT)
            if magic != HDF5_MAGIC:
                return _read_binary(MappedFile.of(file), str(path))
    except OSError as error:
        raise unreadable(path, error) from error
    return _read_hdf5(str(path))


def _read_binary(buffer: MappedFile, path: str) -> CaffeState:
    numbers: dict[int, int] = {}
    name: str | None = None
    spans: list[tuple[int, int]] = []
    try:
        for i, field in enumerate(wire.fields(buffer, 0, len(buffer))):
            if i == _MOST_FIELDS:
                raise WireError(f"more than {_MOST_FIELDS:,} fields", field.start)
            if field.kind == VARINT and field.number in (_ITER, _CURRENT_STEP):
                numbers[field.number] = field.value
            elif (
                field.kind == BYTES and field.number == _LEARNED_NET and field.end - field.at < _LONGEST_NAME
            ):
                name = _decoded(buffer[field.at : field.end])
            elif field.kind == BYTES and field.number == _HISTORY:
                spans.append((field.at, field.end))
    except WireError as error:
        if _ITER not in numbers:
            raise _no_state(path) from error
        raise FileError(
            f"truncated or damaged at byte {error.offset:,} of {len(buffer):,} ({error})", path=path
        ) from error
    history = []
    for i, (start, end) in enumerate(spans):
        try:
            history.append(read_blob(buffer, start, end))
        except ValueError as error:  # a WireError is one
            raise FileError(f"history blob {i} is damaged: {error}", path=path) from error
    return _state(path, numbers.get(_ITER), numbers.get(_CURRENT_STEP, 0), name, tuple(history))


def _read_hdf5(path: str) -> CaffeState:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("iter"), h5py.Dataset):
                raise _no_state(path)
            group = file["history"]
            return _state(
                path,
                _integer(file, "iter"),
                _integer(file, "current_step"),
                _name(file),
                tuple(read_dataset(group[str(i)]) for i in range(len(group))),
            )
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, MemoryError) as error:
        raise FileError(f"truncated or damaged HDF5 file ({error})", path=path) from error


def _integer(file: h5py.File, name: str) -> int:
    dataset = file[name]
    if dataset.size != 1 or dataset.dtype.kind not in "iu":
        raise ValueError(f'data set "{name}" holds no single integer')
    return int(np.asarray(dataset[()]).reshape(()))


def _name(file: h5py.File) -> str | None:
    dataset = file.get("learned_net")
    if dataset is None:
        return None
    value: Any = dataset[()] if dataset.size == 1 and dataset.nbytes < _LONGEST_NAME else None
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0]
    if not isinstance(value, bytes):
        raise ValueError('data set "learned_net" holds no name')
    return _decoded(value)


def _decoded(name: bytes) -> str:
    """A path, odd bytes kept."""
    return name.decode("utf-8", "surrogateescape")


def _state(
    path: str, iteration: int | None, steps: int, name: str | None, history: tuple[np.ndarray, ...]
) -> CaffeState:
    if iteration is None:
        raise _no_state(path)
    if not name:
        raise FileError("the state names no weights: learned_net is not set", path=path)
    for what, value in (("iter", iteration), ("current_step", steps)):
        if not 0 <= value < 2**31:
            raise FileError(f"{what} of the state is {value}, which Caffe cannot have written", path=path)
    return CaffeState(path, iteration, steps, name, history)


def _no_state(path: str) -> FileError:
    return FileError("is no solver state", path=path, hint=_HINT)
