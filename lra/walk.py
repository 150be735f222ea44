"""Images through two nets at once: the original's responses, and the approximated net layer by layer.

Each net sees every image once. Of the approximated one the values alive at the current layer are kept on disk,
so that the next layer's input is one part of the net away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caffe_proto.graph import Value
from caffe_proto.layers.emit import NodeRecord, Sheet
from caffe_proto.onnx_export import Export, to_onnx
from caffe_proto.runtime import Engine, open_onnx
from caffe_proto.segments import Segments

from .decomposition import Step
from .stats import sample_positions

Array = np.ndarray


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

    def within(self, start: int, stop: int) -> tuple[Places, Array]:
        """The places of images start to stop, and which of all places they are."""
        inside = np.flatnonzero((self.images >= start) & (self.images < stop))
        return Places(self.images[inside], self.rows[inside], self.columns[inside]), inside


class Store:
    """Values of all images, each a memory-mapped file (N, ...) in a folder; they pass in batches of ``batch``."""

    def __init__(self, folder: Path, n_images: int, batch: int) -> None:
        self.folder = folder
        self.n_images = n_images
        self.batch = batch
        self._maps: dict[Value, np.memmap] = {}  # type: ignore[type-arg]
        self._made = 0

    def __contains__(self, value: Value) -> bool:
        return value in self._maps

    def __getitem__(self, value: Value) -> Array:
        return self._maps[value]

    @property
    def values(self) -> tuple[Value, ...]:
        """What is stored."""
        return tuple(self._maps)

    def new(self, shape: tuple[int, ...]) -> np.memmap:  # type: ignore[type-arg]
        """An empty map for one value of every image; ``put`` it under a value once it is filled."""
        self._made += 1
        path = self.folder / f"{self._made}.f32"
        return np.memmap(path, np.float32, "w+", shape=(self.n_images, *shape[1:]))

    def put(self, value: Value, array: np.memmap) -> None:  # type: ignore[type-arg]
        """Keep a filled map; one that stood there goes."""
        self.drop(value)
        self._maps[value] = array

    def drop(self, value: Value) -> None:
        """Forget a value and remove its file."""
        old = self._maps.pop(value, None)
        if old is not None and old.filename is not None:
            Path(old.filename).unlink()


def batches(n_images: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each batch of exactly ``size``; the last one reaches back where they do not come out even."""
    for start in range(0, n_images, size):
        stop = min(start + size, n_images)
        yield max(0, stop - size), stop


def advance(parts: Segments, store: Store, index: int, goals: Collection[Value]) -> None:
    """Bring the stored values up to node ``index``: afterwards exactly those that the goals still need are stored."""
    readers = parts.graph.needed(goals)
    reached = (goal for goal in goals if goal.node <= index)
    wanted = tuple(dict.fromkeys((*parts.live(index, readers), *reached)))
    missing = [value for value in wanted if value not in store]
    if missing:
        made = {value: store.new(parts.shaped.shapes[value]) for value in missing}
        for start, stop in batches(store.n_images, store.batch):
            given = {value: np.ascontiguousarray(store[value][start:stop]) for value in store.values}
            for value, array in parts.run(given, missing).items():
                made[value][start:stop] = array
        for value, array in made.items():
            store.put(value, array)
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


def columns(maps: Array, places: Places, step: Step) -> Array:
    """The taps that a 1 x kw convolution reads at its output places: (n, K, kw), zero outside the map.

    ``maps``: (N, K, H, W) in front of ``step``, whose vertical settings are 1, 0, 1.
    """
    width = maps.shape[3]
    taps = np.arange(step.shape[3]) * step.dilation[1] - step.pad[1]
    at = places.columns[:, None] * step.stride[1] + taps  # (n, kw)
    inside = (at >= 0) & (at < width)
    read = maps[places.images[:, None], :, places.rows[:, None], np.where(inside, at, 0)]  # (n, kw, K)
    return np.asarray(np.where(inside[:, :, None], read, 0)).transpose(0, 2, 1)
