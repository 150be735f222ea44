"""Images through two nets at once: the original's responses, and the approximated net layer by layer.

Each net sees every image once. Of the approximated one the values alive at the current layer are kept on disk,
so that the next layer's input is one part of the net away. Only a batch of each is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from caffe_proto.errors import FileError
from caffe_proto.graph import Value
from caffe_proto.layers.emit import NodeRecord, Sheet
from caffe_proto.onnx_export import Export, to_onnx
from caffe_proto.runtime import Engine, open_onnx
from caffe_proto.segments import Segments

from .decomposition import Step
from .stats import sample_positions

Array = np.ndarray

IN_MEMORY = 2**30  # bytes of values that are kept in memory; more goes to files


@dataclass(frozen=True, eq=False)
class Places:
    """Sampled positions of a map: image numbers and rows and columns, (n,) each."""

    images: Array
    rows: Array
    columns: Array

    @classmethod
    def draw(cls, rng: np.random.Generator, n_images: int, hw: tuple[int, int], per_image: int) -> Places:
        """``per_image`` positions of each image, without replacement; all of them where the map is smaller."""
        flat = sample_positions(rng, n_images, hw, per_image)
        images = np.repeat(np.arange(n_images), flat.shape[1])
        rows, columns = np.divmod(flat.reshape(-1), hw[1])
        return cls(images, rows, columns)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, maps: Array, start: int = 0) -> Array:
        """The channels of (N, C, H, W) at these places: (n, C); ``start`` is the number of the first image."""
        return np.asarray(maps[self.images - start, :, self.rows, self.columns])

    def since(self, start: int) -> Places:
        """The same places with images counted from ``start``."""
        return Places(self.images - start, self.rows, self.columns)

    def within(self, start: int, stop: int) -> tuple[Places, Array]:
        """The places of images start to stop, and which of all places they are."""
        inside = np.flatnonzero((self.images >= start) & (self.images < stop))
        return Places(self.images[inside], self.rows[inside], self.columns[inside]), inside


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


class Chain:
    """A chain of convolutions as one onnxruntime session, for maps of one shape."""

    def __init__(self, steps: Sequence[Step], engine: Engine, shape: tuple[int, ...]) -> None:
        sheet = Sheet(names={"x"})
        name = "x"
        for i, step in enumerate(steps):
            name = _convolution(sheet, name, step, i)
        shapes = {"x": shape, name: (shape[0], steps[-1].shape[0], 1, 1)}
        dynamic = {"x": (True, False, True, True), name: (True, False, True, True)}
        export = Export(sheet, None, {"x": "x"}, {name: name}, shapes, dynamic, "chain")  # type: ignore[arg-type]
        self._session = open_onnx(to_onnx(export).SerializeToString(), engine)
        self._output = name

    def __call__(self, maps: Array) -> Array:
        """(N, C, H, W) through the chain."""
        (made,) = self._session.run([self._output], {"x": np.ascontiguousarray(maps, np.float32)})
        return np.asarray(made)


def _convolution(sheet: Sheet, source: str, step: Step, position: int) -> str:
    arrays = [("weight", step.weight)] + ([("bias", step.bias)] if step.bias is not None else [])
    names = []
    for what, array in arrays:
        name = sheet.unique(f"{position}.{what}")
        sheet.constants[name] = np.asarray(array, np.float32)
        names.append(name)
    out = sheet.unique(f"{position}")
    attributes = {
        "kernel_shape": step.shape[2:],
        "strides": step.stride,
        "pads": (*step.pad, *step.pad),
        "dilations": step.dilation,
        "group": step.group,
    }
    sheet.nodes.append(NodeRecord("Conv", out, (source, *names), (out,), attributes, out))
    return out


@dataclass(frozen=True)
class Window:
    """What a convolution reads for one place of its output: kernel, stride, pad and dilation, (h, w) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]

    def along(self, places: Array, axis: int) -> Array:
        """Where along an axis of the input it reads for each place: (n, k)."""
        taps = np.arange(self.kernel[axis]) * self.dilation[axis]
        return np.asarray(places[:, None] * self.stride[axis] - self.pad[axis] + taps)


def patches(maps: Array, places: Places, window: Window) -> Array:
    """What a convolution reads at its output places: (n, C, kh, kw), zero outside the map.

    ``maps``: (N, C, H, W) in front of it.
    """
    height, width = maps.shape[2:]
    rows, columns = window.along(places.rows, 0), window.along(places.columns, 1)
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None]
    down, across = rows.clip(0, height - 1)[:, :, None], columns.clip(0, width - 1)[:, None]
    seen = maps[places.images[:, None, None], :, down, across]  # (n, kh, kw, C)
    seen[~inside] = 0
    return np.asarray(seen.transpose(0, 3, 1, 2))


def _within(at: Array, size: int) -> Array:
    return np.asarray((at >= 0) & (at < size))
