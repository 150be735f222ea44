"""Fitting decompositions to responses, layer by layer, shallow to deep (Zhang et al. 2016, eq. 12).

The target of a layer is what the original net's layer, with what follows it, makes of the original input; the
prediction starts from the input that the layers approximated before it produce. So each layer also repairs what
those before it broke.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from caffe_proto.graph import Value
from caffe_proto.layers.spec import Arrays
from caffe_proto.runtime import Engine
from caffe_proto.segments import Segments
from caffe_proto.shape_inference import Shaped

from .decomposition import Decomposition
from .following import Following, following
from .targets import Target
from .walk import Chain, Places, Store, advance, batches, columns

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Job:
    """One layer to fit: its target, the chain to start from, and the ranks that the scheme asks for."""

    target: Target
    start: Decomposition
    scheme: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted chain and its relative error on held-out responses, after activation and shortcut."""

    chain: Decomposition
    error: float


@dataclass(frozen=True, eq=False)
class Samples:
    """Sampled responses of one layer in the original net: (n, d) each, and where they were taken."""

    places: Places
    responses: Array
    shortcut: Array | None


@dataclass
class Walker:
    """The two nets over one set of images.

    ``images``: source blob value -> (N, ...) as the net wants them. ``solve``: (features, job, following,
    samples, shortcut of the approximated net) -> the fitted chain and its error. ``step`` is called once for the
    pass of the original net and once for each fitted layer.
    """

    shaped: Shaped
    blobs: Mapping[int, Arrays]
    images: Mapping[Value, Array]
    engine: Engine
    positions: int
    seed: int
    step: Callable[[], None] = lambda: None
    parts: Segments = field(init=False)

    def __post_init__(self) -> None:
        self.parts = Segments(self.shaped, self.blobs, self.engine)

    @property
    def n_images(self) -> int:
        return len(next(iter(self.images.values())))

    @property
    def batch(self) -> int:
        return self.shaped.shapes[next(iter(self.images))][0]

    def behind(self, target: Target) -> Following:
        """What follows a layer."""
        return following(self.shaped, self.blobs, target.index)

    def sample(self, targets: Sequence[Target]) -> dict[str, Samples]:
        """One pass of the original net: responses of all layers, and their shortcuts, at drawn places."""
        rng = np.random.default_rng(self.seed)
        wanted: dict[str, tuple[Places, Value, Value | None]] = {}
        kept: dict[str, list[Array]] = {}
        for target in targets:
            value = Value(target.index, 0)
            _, _, height, width = self.shaped.shapes[value]
            places = Places.draw(rng, self.n_images, (height, width), self.positions)
            shortcut = self.behind(target).shortcut
            wanted[target.name] = (places, value, shortcut)
            kept[target.name] = [
                np.empty((len(places), self.shaped.shapes[value][1]), np.float32)
                for _ in range(1 + (shortcut is not None))
            ]
        outputs = list(
            dict.fromkeys(
                value for _, main, other in wanted.values() for value in (main, other) if value is not None
            )
        )
        for start, stop in batches(self.n_images, self.batch):
            made = self.parts.run({value: x[start:stop] for value, x in self.images.items()}, outputs)
            for name, (places, main, other) in wanted.items():
                here, which = places.within(start, stop)
                kept[name][0][which] = here.take(made[main], start)
                if other is not None:
                    kept[name][1][which] = here.take(made[other], start)
        self.step()
        return {
            name: Samples(places, kept[name][0], kept[name][1] if len(kept[name]) > 1 else None)
            for name, (places, _, _) in wanted.items()
        }

    def fit(self, jobs: Sequence[Job], samples: Mapping[str, Samples], solve: Solver) -> dict[str, Fitted]:
        """Fit the layers in net order, each from what the fitted ones before it produce."""
        fitted: dict[str, Fitted] = {}
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder), self.n_images, self.batch)
            for value, x in self.images.items():
                filled = store.new(x.shape)
                filled[:] = x
                store.put(value, filled)
            ordered = sorted(jobs, key=lambda job: job.target.index)
            for position, job in enumerate(ordered):
                advance(self.parts, store, job.target.index - 1, self._goals(ordered[position:]))
                fitted[job.target.name] = self._layer(store, job, samples[job.target.name], solve)
                self._install(store, job.target, fitted[job.target.name].chain)
                advance(self.parts, store, job.target.index, self._goals(ordered[position + 1 :]))
                self.step()
        return fitted

    def _layer(self, store: Store, job: Job, samples: Samples, solve: Solver) -> Fitted:
        (bottom,) = self.shaped.graph.nodes[job.target.index].inputs
        behind = self.behind(job.target)
        features = self._features(store[bottom], job, samples.places)
        shortcut = None
        if behind.shortcut is not None:
            shortcut = self._shortcut(store, behind.shortcut, samples.places)
        return solve(features, job, behind, samples, shortcut)

    def _features(self, maps: Array, job: Job, places: Places) -> Array:
        """What the last free step reads at the places, (n, K, kw): the chain's first step over all images."""
        first, second = job.start.steps
        chain = Chain((first,), self.engine, (self.batch, *maps.shape[1:]))
        taken = np.empty((len(places), first.shape[0], second.shape[3]), np.float32)
        for start, stop in batches(self.n_images, self.batch):
            here, which = places.within(start, stop)
            local = Places(here.images - start, here.rows, here.columns)
            taken[which] = columns(chain(maps[start:stop]), local, second)
        return taken

    def _shortcut(self, store: Store, value: Value, places: Places) -> Array:
        """The approximated net's other branch at the places: (n, d)."""
        taken = np.empty((len(places), self.shaped.shapes[value][1]), np.float32)
        for start, stop in batches(self.n_images, self.batch):
            here, which = places.within(start, stop)
            if value in store:
                maps = np.asarray(store[value][start:stop])
            else:
                maps = self.parts.run(
                    {v: np.ascontiguousarray(store[v][start:stop]) for v in store.values}, [value]
                )[value]
            taken[which] = here.take(maps, start)
        return taken

    def _install(self, store: Store, target: Target, chain: Decomposition) -> None:
        """Put the fitted layer's output where the original's would stand."""
        (bottom,) = self.shaped.graph.nodes[target.index].inputs
        value = Value(target.index, 0)
        runner = Chain(chain.steps, self.engine, (self.batch, *store[bottom].shape[1:]))
        filled = store.new(self.shaped.shapes[value])
        for start, stop in batches(self.n_images, self.batch):
            filled[start:stop] = runner(store[bottom][start:stop])
        store.put(value, filled)

    def _goals(self, jobs: Sequence[Job]) -> list[Value]:
        """What fitting these layers needs: their bottoms, and the shortcuts added to what they make."""
        nodes = self.shaped.graph.nodes
        found = [value for job in jobs for value in nodes[job.target.index].inputs]
        shortcuts = (self.behind(job.target).shortcut for job in jobs)
        return [*found, *(value for value in shortcuts if value is not None)]


Solver = Callable[[Array, Job, Following, Samples, "Array | None"], Fitted]
