"""The images that responses are fitted to, as a net wants them, and what a plan remembers of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from caffe_proto.errors import PlanError, UsageError
from caffe_proto.graph import Graph
from caffe_proto.layers.spec import text
from caffe_proto.runtime import Engine
from caffe_proto.shape_inference import infer

from .responses import Walker
from .targets import Found

_BATCH = 32


@dataclass(frozen=True, eq=False)
class Calibration:
    """``images``: source blob -> (N, ...) float32, preprocessed. ``positions``: sampled places of each image."""

    images: Mapping[str, np.ndarray]
    positions: int = 10
    seed: int = 0
    threads: int = 0

    @classmethod
    def of(cls, graph: Graph, images: Any, **settings: Any) -> Calibration:
        """From an array for the net's only image input, or arrays by blob.

        Raises UsageError where the net has several image inputs and the array names none, or there is no image.
        """
        if isinstance(images, cls):
            return images
        if not isinstance(images, Mapping):
            inputs = [graph.blob(value) for value in graph.sources]
            if len(inputs) != 1:
                raise UsageError(
                    f"the net has {len(inputs)} inputs: {', '.join(inputs)}", hint="give arrays by blob"
                )
            images = {inputs[0]: images}
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in images.items()}
        if not arrays or any(len(array) < 1 for array in arrays.values()):
            raise UsageError("there are no images to fit to")
        return cls(arrays, **settings)

    def record(self) -> dict[str, Any]:
        """What a plan says of the data: counts, seed, and the hash of the arrays."""
        digest = hashlib.sha256()
        for name, array in self.images.items():
            digest.update(name.encode() + str(array.shape).encode() + array.tobytes())
        count = len(next(iter(self.images.values())))
        return {"images": count, "positions": self.positions, "seed": self.seed, "sha256": digest.hexdigest()}

    def check(self, planned: Mapping[str, Any], *, force: bool) -> None:
        """Raise PlanError where a plan was fitted to other data, unless forced."""
        own = self.record()
        for key, value in planned.items():
            if not force and own.get(key) != value:
                raise PlanError(
                    f"the plan was made with other images: {key} {value} there, {own.get(key)} here",
                    hint="give the same --images, --n-images, --positions and --seed, or --force",
                )

    def walker(self, found: Found, step: Callable[[], None] = lambda: None) -> Walker:
        """The two nets over these images. Raises UsageError where an image does not fit the net's input."""
        graph = found.shaped.graph
        sources = {graph.blob(value): value for value in graph.sources}
        for name in self.images:
            if name not in sources:
                raise UsageError(f'"{name}" is no input of the net')
        count = len(next(iter(self.images.values())))
        size = min(_BATCH, count)
        shaped = infer(
            graph, {name: (size, *array.shape[1:]) for name, array in self.images.items()}, partial=True
        )
        for name, array in self.images.items():
            declared = found.shaped.shapes.get(sources[name])
            if declared is not None and declared[1:] != array.shape[1:]:
                raise UsageError(
                    f'the images have shape {text(array.shape[1:])}, input "{name}" takes {text(declared[1:])}'
                )
        images = {sources[name]: array for name, array in self.images.items()}
        return Walker(shaped, found.blobs, images, Engine(self.threads), self.positions, self.seed, step)
