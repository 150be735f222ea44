"""Values of a net for all images, brought forward part by part: each image passes each layer once.

The values alive at the current layer are kept, in memory or in files, so that the next layer's input is one part
of the net away. Only a batch of each is in memory at a time where they are in files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import FileError
from .graph import Value
from .segments import Segments

Array = np.ndarray

IN_MEMORY = 2**30  # bytes of values that are kept in memory; more goes to files


class Stack:
    """One value of every image, (N, ...) float32, read and written in parts: in memory, or in a file of its own."""

    def __init__(self, path: Path, shape: tuple[int, ...], *, in_memory: bool) -> None:
        self.path = path
        self.shape = shape
        self._size = 4 * prod(shape[1:])
        self._array = np.empty(shape, np.float32) if in_memory else None
        self._file: BinaryIO | None = None
        self._saved = False

    @property
    def memory(self) -> int:
        """Bytes held in memory."""
        return 0 if self._array is None else self._array.nbytes

    def read(self, start: int, stop: int) -> Array:
        """Images start to stop. Raises FileError where the file is too short."""
        if self._array is not None:
            return self._array[start:stop]
        array = np.empty((stop - start, *self.shape[1:]), np.float32)
        left = array.data.cast("B")
        file = self._opened()
        file.seek(start * self._size)
        while left:
            got = file.readinto(left)  # type: ignore[attr-defined]
            if not got:
                raise FileError("ends too early", path=self.path, hint="fit again, without --resume")
            left = left[got:]
        return array

    def write(self, start: int, array: Array) -> None:
        """Images from start on. Raises FileError where the disk is full."""
        if self._array is not None:
            self._array[start : start + len(array)] = array.reshape(-1, *self.shape[1:])
        else:
            self._to_file(start, array)

    def save(self) -> None:
        """Have everything in the file."""
        if self._array is not None and not self._saved:
            self._to_file(0, self._array)
            self._saved = True

    def close(self) -> None:
        """Let go of the memory and the file; what is in the file stays."""
        self._array = None
        if self._file is not None:
            self._file.close()

    def _to_file(self, start: int, array: Array) -> None:
        left = np.ascontiguousarray(array, np.float32).data.cast("B")
        try:
            file = self._opened()
            file.seek(start * self._size)
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            need = self._size * self.shape[0] / 2**20
            raise FileError(
                f"cannot be written: {error.strerror}",
                path=self.path,
                hint=f"one layer's activations of {self.shape[0]} images take {need:,.0f} MiB: free space, or give fewer --n-images",
            ) from None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)  # type: ignore[assignment]
        assert self._file is not None
        return self._file


class Store:
    """Values of all images, each a `Stack`; those beyond ``memory`` bytes in files of a folder."""

    def __init__(self, folder: Path, n_images: int, memory: int = IN_MEMORY) -> None:
        self.folder = folder
        self.n_images = n_images
        self._memory = memory
        self._stacks: dict[Value, Stack] = {}
        self._dropped: list[Path] = []
        self._made = 0

    def __contains__(self, value: Value) -> bool:
        return value in self._stacks

    def __getitem__(self, value: Value) -> Stack:
        return self._stacks[value]

    @property
    def values(self) -> tuple[Value, ...]:
        """What is stored."""
        return tuple(self._stacks)

    def new(self, shapes: Iterable[tuple[int, ...]]) -> list[Stack]:
        """Empty stacks for values of every image; ``put`` them once they are filled."""
        left = self._memory - sum(stack.memory for stack in self._stacks.values())
        made = []
        for shape in shapes:
            self._made += 1
            full = (self.n_images, *shape[1:])
            left -= 4 * prod(full)
            made.append(Stack(self.folder / f"{self._made}.f32", full, in_memory=left >= 0))
        return made

    def put(self, value: Value, stack: Stack) -> None:
        """Keep a filled stack; one that stood there goes."""
        self.drop(value)
        self._stacks[value] = stack

    def drop(self, value: Value) -> None:
        """Forget a value; its file stays until `sweep`."""
        old = self._stacks.pop(value, None)
        if old is not None:
            old.close()
            self._dropped.append(old.path)

    def sweep(self) -> None:
        """Remove the files of what was dropped."""
        for path in self._dropped:
            path.unlink(missing_ok=True)
        self._dropped.clear()

    def note(self) -> dict[str, Any]:
        """Have everything in files; gives what `restore` needs, for JSON."""
        for stack in self._stacks.values():
            stack.save()
        stacks = [[*value, stack.path.name, stack.shape] for value, stack in self._stacks.items()]
        return {"made": self._made, "stacks": stacks}

    def restore(self, noted: Mapping[str, Any]) -> None:
        """Take up the files that were there when ``noted`` was written."""
        self._made = noted["made"]
        for node, top, name, shape in noted["stacks"]:
            self._stacks[Value(node, top)] = Stack(self.folder / name, tuple(shape), in_memory=False)

    def read(self, start: int, stop: int) -> dict[Value, Array]:
        """All values of images start to stop."""
        return {value: stack.read(start, stop) for value, stack in self._stacks.items()}

    def close(self) -> None:
        """Let go of memory and files; what is in files stays."""
        for stack in self._stacks.values():
            stack.close()


def batches(n_images: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each batch of exactly ``size``; the last one reaches back where they do not come out even."""
    for start in range(0, n_images, size):
        stop = min(start + size, n_images)
        yield max(0, stop - size), stop


def advance(
    parts: Segments,
    store: Store,
    batch: int,
    index: int,
    goals: Collection[Value],
    produce: Callable[[dict[Value, Array]], dict[Value, Array]] | None = None,
) -> None:
    """Bring the stored values up to node ``index``: afterwards exactly those that the goals still need are stored.

    ``produce``: adds to the stored values of a batch those that stand for layers which are not run.
    """
    readers = parts.graph.needed(goals)
    reached = (goal for goal in goals if goal.node <= index)
    wanted = tuple(dict.fromkeys((*parts.live(index, readers), *reached)))
    missing = [value for value in wanted if value not in store]
    if missing:
        stacks = store.new(parts.shaped.shapes[value] for value in missing)
        made = dict(zip(missing, stacks, strict=True))
        for start, stop in batches(store.n_images, batch):
            given = store.read(start, stop)
            for value, array in parts.run(produce(given) if produce else given, missing).items():
                made[value].write(start, array)
        for value, stack in made.items():
            store.put(value, stack)
    for value in store.values:
        if value not in wanted:
            store.drop(value)
