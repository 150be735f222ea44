"""What a fit to responses reads and runs: sampled places, what a layer reads there, chains of convolutions.

How the values of all images are brought forward is `caffe_proto.walk`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from caffe_proto.layers.emit import NodeRecord, Sheet
from caffe_proto.onnx_export import Export, to_onnx
from caffe_proto.runtime import Engine, open_onnx
from caffe_proto.walk import Stack as Stack
from caffe_proto.walk import Store as Store
from caffe_proto.walk import advance as advance
from caffe_proto.walk import batches as batches

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

    def since(self, start: int) -> Places:
        """The same places with images counted from ``start``."""
        return Places(self.images - start, self.rows, self.columns)

    def within(self, start: int, stop: int) -> tuple[Places, Array]:
        """The places of images start to stop, and which of all places they are."""
        inside = np.flatnonzero((self.images >= start) & (self.images < stop))
        return Places(self.images[inside], self.rows[inside], self.columns[inside]), inside


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
