"""The images that responses are fitted to, as a net wants them, and what a plan remembers of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from caffe_proto.data.batches import Batch, Batches
from caffe_proto.errors import FileError, PlanError, UsageError
from caffe_proto.graph import Graph
from caffe_proto.layers.spec import Arrays, text
from caffe_proto.peers import Peers, Share
from caffe_proto.runtime import Engine
from caffe_proto.shape_inference import infer

from .responses import Walker
from .stage import Stage
from .targets import Found

HELD_OUT = 0.1  # of the images, the last ones: they choose among iterates and give the error

_BATCH = 32
_SAMPLES = 20_000  # wanted of a layer, where --positions does not say otherwise
_POSITIONS = 10  # at least, of an image


@dataclass(eq=False)
class Calibration:
    """``images``: source blob -> (N, ...) float32, preprocessed; memory-mapped arrays will do.

    ``positions``: sampled places of each image; 0: 10, and more where there are fewer than 2,000 images.
    ``stage``: where activations are kept while fitting, and what a fit can be resumed from. ``fitted``: results
    by what they depend on. ``share``: which of all images these are, where several processes share them.
    """

    images: Mapping[str, np.ndarray]
    positions: int = 0
    seed: int = 0
    threads: int = 0
    stage: Stage = field(default_factory=Stage)
    fitted: dict[str, Any] = field(default_factory=dict)
    share: Share | None = None
    _walkers: dict[int, tuple[Found, Walker]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions = self.positions or max(_POSITIONS, -(-_SAMPLES // self.count))

    @property
    def count(self) -> int:
        """Number of images, those of all processes."""
        return self.shared.total

    @cached_property
    def shared(self) -> Share:
        """Which of all images this process has."""
        return self.share or Share.whole(len(next(iter(self.images.values()))))

    @property
    def peers(self) -> Peers:
        """The processes that share the images."""
        return self.shared.peers

    @classmethod
    def of(cls, graph: Graph, images: Any, **settings: Any) -> Calibration:
        """From an array for the net's only image input, or arrays by blob.

        Raises UsageError where the net has several image inputs and the array names none, or there is no image.
        """
        if isinstance(images, cls):
            return images
        if isinstance(images, str | Path):
            raise UsageError(
                f'"{images}" is a name, images are arrays here',
                hint="read them first: caffe_proto.data.open_source",
            )
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
        if len({len(array) for array in arrays.values()}) > 1:
            counts = ", ".join(f'{len(array)} images for "{name}"' for name, array in arrays.items())
            raise UsageError(counts, hint="give as many for every input")
        return cls(arrays, **settings)

    def record(self) -> dict[str, Any]:
        """What a plan says of the data: counts, seed, and the hash of the arrays."""
        return {"images": self.count, "positions": self.positions, "seed": self.seed, "sha256": self._sha256}

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for name, array in self.images.items():
            digest.update(name.encode() + str((self.count, *array.shape[1:])).encode())
            for start in range(0, self.count, _BATCH):
                here, share = self.shared.part(start, min(start + _BATCH, self.count))
                digest.update(share.gathered(array[here]).tobytes())
        return self.peers.told(digest.hexdigest)

    def key(self, found: Found) -> str:
        """What everything sampled depends on: net, weights, images, positions, seed."""
        weights = found.model.weights
        in_file = weights is None or (weights.path is not None and not weights.changed)
        return json.dumps(
            [found.model.fingerprint, "" if in_file else _digest(found.blobs.values()), self.record()]
        )

    def check(self, planned: Mapping[str, Any], *, force: bool) -> None:
        """Raise PlanError where a plan was fitted to other data, unless forced."""
        own = self.record()
        for key, value in planned.items():
            if not force and own.get(key) != value:
                raise PlanError(
                    f"the plan was made with other images: {key} {value} there, {own.get(key)} here",
                    hint="give the same --images, --n-images, --positions and --seed, or --force",
                )

    def walker(self, found: Found) -> Walker:
        """The two nets over these images. Raises UsageError where an image does not fit the net's input."""
        if id(found) not in self._walkers:
            self._walkers[id(found)] = found, self._walker(found)
        return self._walkers[id(found)][1]

    def _walker(self, found: Found) -> Walker:
        graph = found.shaped.graph
        sources = {graph.blob(value): value for value in graph.sources}
        for name in self.images:
            if name not in sources:
                raise UsageError(f'"{name}" is no input of the net')
        size = min(_BATCH, *map(len, self.images.values()))
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
        return Walker(
            shaped, found.blobs, images, Engine(self.threads), self.positions, self.seed, found.by_image,
            self.share,
        )  # fmt: skip


def _digest(layers: Iterable[Arrays]) -> str:
    """Hash of weights that are in no file as they are."""
    digest = hashlib.sha256()
    for blob in (blob for blobs in layers for blob in blobs):
        digest.update(str(blob.shape).encode() + np.ascontiguousarray(blob).tobytes())
    return digest.hexdigest()


def dealt(batches: Batches, peers: Peers, places: list[int]) -> Iterator[Batch]:
    """The batches that are this process's: of several each reads every so manieth image.

    ``places``: gets the places in the whole list of what could be read, where several processes share it.
    """
    if peers.world == 1:
        yield from batches
        return
    if batches.shape is None:
        batches.shape = peers.told(lambda: next((one.images.shape[1:] for one in batches), None))
    own = range(peers.rank, batches.n_images, peers.world)
    batches.indices, batches.size = batches.indices[own], 1
    for batch in batches:
        places.append(own[len(places) + len(batches.skipped)])
        yield batch


def share_of(peers: Peers, places: list[int]) -> Share:
    """This process's share of what all have read. Raises UsageError where one has nothing of it."""
    share = Share.of(peers, np.array(places, np.intp))
    if share.total and 0 in peers.exchange(len(places)):
        images = "1 image is too little" if share.total == 1 else f"{share.total} images are too few"
        raise UsageError(f"{images} for {peers.world} processes", hint="give more, or start fewer processes")
    return share


def keep(batches: Iterable[np.ndarray], stage: Stage) -> np.ndarray | None:
    """Batches (n, ...) as one memory-mapped array in a file of the stage; None where there are none.

    Raises FileError where the disk is full.
    """
    path = stage.folder / "images.f32"
    count, shape = 0, ()
    try:
        with path.open("wb") as file:
            for batch in batches:
                file.write(np.ascontiguousarray(batch, np.float32).data)
                count, shape = count + len(batch), batch.shape[1:]
    except OSError as error:
        raise FileError(f"cannot be written: {error.strerror}", path=path) from None
    return np.memmap(path, np.float32, "r", shape=(count, *shape)) if count else None
