"""Fitting decompositions to responses, layer by layer, shallow to deep (Zhang et al. 2016, eq. 12).

The target of a layer is what the original net's layer, with what follows it, makes of the original input; the
prediction starts from the input that the layers approximated before it produce. So each layer also repairs what
those before it broke.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from caffe_proto.errors import WeightsError
from caffe_proto.graph import Value
from caffe_proto.layers.spec import Arrays
from caffe_proto.peers import Peers, Share
from caffe_proto.runtime import Engine
from caffe_proto.segments import Segments
from caffe_proto.shape_inference import Shaped, infer

from .decomposition import Decomposition, Step
from .following import Following, following
from .linalg import AffineMap
from .stage import Stage
from .stats import Moments
from .targets import Target
from .walk import Chain, Places, Stack, Store, Window, advance, batches, patches

Array = np.ndarray

_NOTE_EVERY = 30.0  # seconds
_LARGEST = (
    2**26
)  # bytes of the largest map of a batch; larger ones cost time, in memory that is new each time

Ticks = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Job:
    """One layer to fit.

    ``first``: the steps of its chain that stay as they are, run over the approximated net's input. ``free``: the
    step that is fitted behind them, whose weights the ridge draws to. ``rank``: of the map fitted, over all
    groups; None for a full one. ``build`` turns the map of what ``free`` sees, ``(c, kh * kw)`` with c slowest,
    to the layer's responses into the chain. ``own``: the bias of a layer that is left whole, where ``free`` alone
    gives its responses without one.
    """

    target: Target
    first: tuple[Step, ...]
    free: Step
    rank: int | None
    build: Callable[[AffineMap], Decomposition]
    own: Array | None = None

    @cached_property
    def window(self) -> Window:
        """What the layer reads for one place of its output."""
        g = self.target.geometry
        return Window((self.target.shape[2], self.target.shape[3]), g.stride, g.pad, g.dilation)

    def sees(self, read: Array) -> Array:
        """What ``free`` sees where the layer reads ``read`` (n, C, kh, kw): (n, c, taps of free).

        The steps before it have no bias: what lies outside the map is zero for them all.
        """
        if not self.first:
            return read.reshape(*read.shape[:2], -1)
        group, seen = self.free.group, []
        kernels = np.split(self._kernel, group)
        for part, kernel in zip(np.split(read, group, axis=1), kernels, strict=True):
            height, width = kernel.shape[2:]
            windows = sliding_window_view(part, (height, width), axis=(2, 3))  # (n, c, a, b, height, width)
            n, _, rows, columns = windows.shape[:4]
            flat = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * rows * columns, -1)
            seen.append((flat @ kernel.reshape(len(kernel), -1).T).reshape(n, rows * columns, -1))
        return np.concatenate(seen, axis=2).transpose(0, 2, 1)

    @cached_property
    def _kernel(self) -> Array:
        """The steps before ``free`` as one, (c, in/group, height, width)."""
        return Decomposition(self.first).reconstruct().astype(np.float32)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted chain and its relative error on held-out responses, after activation and shortcut.

    The error is None where there were too few samples to hold any out.
    """

    chain: Decomposition
    error: float | None


@dataclass(frozen=True, eq=False)
class Samples:
    """Sampled responses of one layer in the original net: (n, d) each, and where they were taken."""

    places: Places
    responses: Array
    shortcut: Array | None


Solver = Callable[[Array, Job, Following, Samples, "Array | None"], Fitted]


@dataclass(eq=False)
class Walker:
    """The two nets over one set of images.

    ``images``: source blob value -> (N, ...) as the net wants them. ``positions``: sampled places of an image.
    ``by_image``: the nodes that can be run and treat every image by itself. ``share``: which of all images these
    are, where several processes share them; samples are of all images, and the first process solves.
    """

    shaped: Shaped
    blobs: Mapping[int, Arrays]
    images: Mapping[Value, Array]
    engine: Engine
    positions: int
    seed: int
    by_image: frozenset[int]
    share: Share | None = None
    parts: Segments = field(init=False)
    _samples: dict[str, Samples] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        largest = max((4 * prod(shape[1:]) for shape in self.shaped.shapes.values()), default=0)
        self.shaped = self._of_batch(max(1, min(self.batch, _LARGEST // max(1, largest))))
        self.parts = Segments(self.shaped, self.blobs, self.engine)

    @property
    def n_images(self) -> int:
        """Of all processes."""
        return self.shared.total

    @cached_property
    def shared(self) -> Share:
        """Which of all images this process has."""
        return self.share or Share.whole(self._own)

    @property
    def _own(self) -> int:
        """How many images this process has."""
        return len(next(iter(self.images.values())))

    @property
    def batch(self) -> int:
        return self.shaped.shapes[next(iter(self.images))][0]

    def behind(self, target: Target) -> Following:
        """What follows a layer."""
        return following(self.shaped, self.blobs, target.index)

    def places(self, target: Target) -> Places:
        """The sampled places of a layer's output, the same whichever other layers are sampled."""
        rng = np.random.default_rng([abs(self.seed), target.index])
        return Places.draw(rng, self.n_images, self._size(target), self.positions)

    def _mine(self, places: Places) -> Places:
        """Those of this process's images, by their numbers among these."""
        rows = self.shared.rows(len(places))
        images = np.searchsorted(self.shared.numbers, places.images[rows])
        return Places(images, places.rows[rows], places.columns[rows])

    def _all(self, rows: Array) -> Array:
        """What all processes took at their places."""
        found = self.shared.gathered(rows)
        return self.shared.peers.told(lambda: found)

    def sample(self, targets: Sequence[Target], stage: Stage, key: str, step: Ticks) -> dict[str, Samples]:
        """Responses of layers in the original net, and their shortcuts, at drawn places; one pass for all new ones.

        ``step`` is told of images done. What was sampled before, for the same ``key``, comes from ``stage``.
        """
        missing = []
        for target in targets:
            if target.name in self._samples:
                continue
            file = stage.get(f"samples {target.name}", key)
            if file is None:
                missing.append(target)
            else:
                arrays = stage.load(file)
                self._samples[target.name] = Samples(
                    self.places(target), arrays["responses"], arrays.get("shortcut")
                )
        if missing:
            self._sample(missing, step)
            for target in missing:
                found = self._samples[target.name]
                arrays = {"responses": found.responses}
                arrays |= {} if found.shortcut is None else {"shortcut": found.shortcut}
                stage.put(f"samples {target.name}", key, stage.save(f"samples-{target.index}", arrays))
        else:
            step(self.n_images)
        return {target.name: self._samples[target.name] for target in targets}

    def _sample(self, targets: Sequence[Target], step: Ticks) -> None:
        by_name = {target.name: target for target in targets}
        wanted: dict[tuple[str, Value], tuple[Places, Array]] = {}
        for target in targets:
            places = self._mine(self.places(target))
            for value in filter(None, (Value(target.index, 0), self.behind(target).shortcut)):
                empty = np.empty((len(places), self.shaped.shapes[value][1]), np.float32)
                wanted[target.name, value] = places, empty
        outputs = list(dict.fromkeys(value for _, value in wanted))
        for start, stop, made in self._original(outputs, step):
            for (name, value), (places, taken) in wanted.items():
                here, which = places.within(start, stop)
                taken[which] = here.take(_maps(made[value], by_name[name]), start)
        for target in targets:
            behind = self.behind(target)
            shortcut = behind.shortcut
            _, responses = wanted[target.name, Value(target.index, 0)]
            other = None if shortcut is None else self._all(wanted[target.name, shortcut][1])
            gathered = self._all(responses)
            if not all(np.isfinite(one).all() for one in (gathered, behind.scale, behind.shift)):
                raise WeightsError(
                    "what it and the layers behind it make of the images is not finite",
                    layer=target.name,
                    hint="negative variances of a BatchNorm, or weights or images that are not numbers, do that",
                )
            self._samples[target.name] = Samples(self.places(target), gathered, other)

    def moments(self, jobs: Sequence[Job], samples: Mapping[str, Samples], step: Ticks) -> dict[str, Moments]:
        """Moments of what the free step of each job sees in the original net, with the responses: one pass.

        Of several processes the first has those of all images, the others those of their own.
        """
        moments: dict[str, Moments] = {}
        own = {job.target.name: self._mine(samples[job.target.name].places) for job in jobs}
        responses = {
            name: samples[name].responses[self.shared.rows(len(samples[name].places))] for name in own
        }
        bottoms = list(dict.fromkeys(self._bottom(job.target) for job in jobs))
        counted = 0  # the last batch reaches back
        for start, stop, made in self._original(bottoms, step):
            for job in jobs:
                name = job.target.name
                here, which = own[name].within(counted, stop)
                maps = _maps(made[self._bottom(job.target)], job.target)
                seen = job.sees(patches(maps, here.since(start), job.window))
                flat = seen.reshape(len(seen), -1)
                wanted = responses[name][which]
                if name not in moments:
                    moments[name] = Moments(flat.shape[1], wanted.shape[1])
                moments[name].add(flat, wanted)
            counted = stop
        return {name: _merged(one, self.shared.peers) for name, one in moments.items()}

    def _original(
        self, outputs: Sequence[Value], step: Ticks
    ) -> Iterator[tuple[int, int, dict[Value, Array]]]:
        """Values of the original net, batch by batch."""
        for start, stop in self._batches(step):
            given = {value: np.ascontiguousarray(x[start:stop]) for value, x in self.images.items()}
            yield start, stop, self.parts.run(given, outputs)

    def _batches(self, step: Ticks) -> Iterator[tuple[int, int]]:
        """Start and stop of each batch; ``step`` is told of the images that were new in it, once it is done.

        Several processes are told to be as far as this one.
        """
        done = 0
        for start, stop in batches(self._own, self.batch):
            yield start, stop
            known = stop * self.n_images // self._own
            step(known - done)
            done = known

    def fit(
        self, jobs: Sequence[Job], samples: Mapping[str, Samples], solve: Solver, stage: Stage, key: str,
        step: Ticks, *, symmetric: bool = False,
    ) -> dict[str, Fitted]:  # fmt: skip
        """Fit the layers in net order, each from what the fitted ones before it produce; `ticks` images in all.

        ``symmetric``: each from what the original ones before it produce, as if it were the only one.
        """
        ordered = sorted(jobs, key=lambda job: job.target.index)
        done = _Progress(stage, key, self._own)
        try:
            if not done.fitted:
                done.store = self._store(stage.folder)
            if ordered and not done.fitted:
                self._onward(done.store, ordered, 0, None)
            for position, job in enumerate(ordered):
                if job.target.name not in done.fitted:
                    fitted = self._layer(done.store, job, samples[job.target.name], solve, step)
                    self._onward(done.store, ordered, position + 1, None if symmetric else fitted.chain)
                    done.note(job.target.name, fitted)
                else:
                    step(self.n_images)
            return done.fitted
        finally:
            done.store.close()

    def last(self, count: int) -> Walker:
        """The same nets over the last images alone."""
        here, share = self.shared.part(self.n_images - count, self.n_images)
        images = {value: x[here] for value, x in self.images.items()}
        shaped = self._of_batch(max(1, min(self.batch, len(share.numbers))))
        return Walker(
            shaped, self.blobs, images, self.engine, self.positions, self.seed, self.by_image, share
        )

    def _of_batch(self, size: int) -> Shaped:
        """The net's shapes for so many images at once."""
        if size == self.batch:
            return self.shaped
        sizes = {self.shaped.graph.blob(value): (size, *x.shape[1:]) for value, x in self.images.items()}
        return infer(self.shaped.graph, sizes, partial=True)

    def ends(self) -> tuple[Value, ...]:
        """What the net is judged by: values of each image that no such layer reads; of a Softmax, its input."""
        graph, found = self.shaped.graph, []
        for value in graph.values():
            readers = graph.consumers[value]
            if value.node in self.by_image and not any(reader in self.by_image for reader in readers):
                node = graph.nodes[value.node]
                found.append(node.inputs[0] if node.layer.type == "Softmax" else value)
        sources = set(graph.sources)
        return tuple(dict.fromkeys(value for value in found if value not in sources))

    def replay(self, chains: Mapping[str, Decomposition], targets: Sequence[Target]) -> list[Array]:
        """The `ends` of the net with chains in the place of layers, over all images of this process."""
        ends = self.ends()
        with tempfile.TemporaryDirectory() as folder:
            store = self._store(Path(folder))
            ordered = sorted((target for target in targets if target.name in chains), key=lambda t: t.index)
            last: Target | None = None
            for position, target in enumerate([*ordered, None]):
                goals = [*map(self._bottom, ordered[position:]), *ends]
                index = len(self.shaped.graph.nodes) if target is None else target.index - 1
                self._advance(store, index, goals, last, chains[last.name] if last is not None else None)
                last = target
            found = [store[value].read(0, self._own) for value in ends]
            store.close()
        return found

    def output_errors(
        self, probes: Mapping[str, Sequence[Decomposition]], targets: Sequence[Target], step: Ticks
    ) -> dict[str, list[float]]:
        """`relative_error` of the ends with one layer at a time replaced by each of its chains."""
        reference, ends = self.replay({}, ()), self.ends()
        errors: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            store = self._store(Path(folder))
            ordered = sorted((target for target in targets if target.name in probes), key=lambda t: t.index)
            for position, target in enumerate(ordered):
                goals = [*map(self._bottom, ordered[position:]), *ends]
                self._advance(store, target.index - 1, goals)
                parts = Segments(self.shaped, self.blobs, self.engine)  # its sessions go with it
                errors[target.name] = []
                for chain in probes[target.name]:
                    run = Chain(chain.steps, self.engine, self._input_shape(target))
                    made: list[Array] = [np.empty_like(array) for array in reference]
                    for start, stop in batches(self._own, self.batch):
                        given = store.read(start, stop)
                        shape = (self.batch, *self.shaped.shapes[Value(target.index, 0)][1:])
                        output = run(_maps(given[self._bottom(target)], target)).reshape(shape)
                        found = parts.run(given | {Value(target.index, 0): output}, ends)
                        for array, value in zip(made, ends, strict=True):
                            array[start:stop] = found[value]
                    errors[target.name].append(relative_error(made, reference, self.shared.peers.sum))
                    step(self.n_images)
            store.close()
        return errors

    def _store(self, folder: Path) -> Store:
        """A store of the images."""
        store = Store(folder, self._own)
        for value, x in self.images.items():
            (filled,) = store.new([x.shape])
            for start, stop in batches(self._own, self.batch):
                filled.write(start, x[start:stop])
            store.put(value, filled)
        return store

    def _onward(self, store: Store, jobs: Sequence[Job], position: int, chain: Decomposition | None) -> None:
        """Bring the stored values in front of the job at a position, through ``chain`` in the place of the last one."""
        if position < len(jobs):
            last = jobs[position - 1].target if chain is not None else None
            goals = self._goals(jobs[position:])
            self._advance(store, jobs[position].target.index - 1, goals, last, chain)

    def _advance(
        self,
        store: Store,
        index: int,
        goals: Sequence[Value],
        target: Target | None = None,
        chain: Decomposition | None = None,
    ) -> None:
        """Bring the stored values up to a node, through ``chain`` in the place of a layer on the way."""
        produce = None
        if target is not None and chain is not None:
            run = Chain(chain.steps, self.engine, self._input_shape(target))
            bottom, value = self._bottom(target), Value(target.index, 0)
            shape = self.shaped.shapes[value]

            def produce(given: dict[Value, Array]) -> dict[Value, Array]:
                return given | {value: run(_maps(given[bottom], target)).reshape(shape)}

        advance(self.parts, store, self.batch, index, goals, produce)

    def _layer(self, store: Store, job: Job, samples: Samples, solve: Solver, step: Ticks) -> Fitted:
        behind = self.behind(job.target)
        places = self._mine(samples.places)
        features = self.shared.gathered(self._features(store[self._bottom(job.target)], job, places, step))
        shortcut = None
        if behind.shortcut is not None:
            shortcut = self.shared.gathered(self._shortcut(store, job.target, behind.shortcut, places))
        return self.shared.peers.told(lambda: solve(features, job, behind, samples, shortcut))

    def _features(self, stack: Stack, job: Job, places: Places, step: Ticks) -> Array:
        """What the free step sees at the places, (n, c, taps), from the layer's input over all images."""
        taken: Array | None = None
        for start, stop in self._batches(step):
            here, which = places.within(start, stop)
            seen = job.sees(
                patches(_maps(stack.read(start, stop), job.target), here.since(start), job.window)
            )
            if taken is None:
                taken = np.empty((len(places), *seen.shape[1:]), np.float32)
            taken[which] = seen
        assert taken is not None
        return taken

    def _shortcut(self, store: Store, target: Target, value: Value, places: Places) -> Array:
        """The approximated net's other branch at the places: (n, d)."""
        taken = np.empty((len(places), self.shaped.shapes[value][1]), np.float32)
        for start, stop in batches(self._own, self.batch):
            here, which = places.within(start, stop)
            maps = self.parts.run(store.read(start, stop), [value])[value]
            taken[which] = here.take(_maps(maps, target), start)
        return taken

    def _goals(self, jobs: Sequence[Job]) -> list[Value]:
        """What fitting these layers needs: their bottoms, and the shortcuts added to what they make."""
        found = [self._bottom(job.target) for job in jobs]
        shortcuts = (self.behind(job.target).shortcut for job in jobs)
        return [*found, *(value for value in shortcuts if value is not None)]

    def _bottom(self, target: Target) -> Value:
        (bottom,) = self.shaped.graph.nodes[target.index].inputs
        return bottom

    def _size(self, target: Target) -> tuple[int, int]:
        """Height and width of a layer's output, as sampled."""
        shape = self.shaped.shapes[Value(target.index, 0)]
        return (1, 1) if target.dense else (shape[2], shape[3])

    def _input_shape(self, target: Target) -> tuple[int, ...]:
        """Shape of a batch of a layer's input, as maps."""
        shape = self.shaped.shapes[self._bottom(target)]
        return (shape[0], prod(shape[1:]), 1, 1) if target.dense else shape


def relative_error(
    made: Sequence[Array], reference: Sequence[Array], total: Callable[[Any], Any] = lambda own: own
) -> float:
    """``|made - reference|^2 / |reference - its mean over images|^2``, the mean over several outputs.

    ``total``: of a sum over these images, the sum over those of all processes.
    """
    errors = []
    for one, other in zip(made, reference, strict=True):
        exact = other.astype(np.float64)
        mean = total(exact.sum(axis=0)) / total(len(exact))
        spread = float(total(((exact - mean) ** 2).sum()))
        errors.append(float(total(((one - exact) ** 2).sum())) / (spread or 1.0))
    return float(np.mean(errors)) if errors else 0.0


def _merged(own: Moments, peers: Peers) -> Moments:
    """The moments of all processes, in the first one."""
    if peers.world == 1:
        return own
    states: list[dict[str, Array]] = [{} for _ in range(peers.world)]
    for name, array in own.state().items():

        def take(rank: int, part: Array, name: str = name) -> None:
            states[rank][name] = part[0]

        peers.collect(array[None], take)
    if peers.rank:
        return own
    first, *others = map(Moments.from_state, states)
    for one in others:
        first.merge(one)
    return first


def _maps(array: Array, target: Target) -> Array:
    """Inputs or responses of a layer as (N, C, H, W): those of a fully connected one have one place."""
    return array.reshape(len(array), -1, 1, 1) if target.dense else array


class _Progress:
    """What is fitted so far and the values alive behind it, noted in a stage after every layer."""

    def __init__(self, stage: Stage, key: str, n_images: int) -> None:
        self._stage, self._key = stage, key
        noted = stage.get("fit", key)
        self.fitted: dict[str, Fitted] = {}
        self.store = Store(stage.folder, n_images)
        self._entries: dict[str, Any] = {}
        self._noted = monotonic()
        if noted is None:
            return
        self.store.restore(noted["values"])
        for name, entry in noted["fitted"].items():
            self.fitted[name] = Fitted(_read_chain(entry["steps"], stage.load(entry["file"])), entry["error"])
        self._entries = noted["fitted"]

    def note(self, name: str, fitted: Fitted) -> None:
        """One more layer is done. Now and then that is noted, and files that nobody needs any more are removed."""
        self.fitted[name] = fitted
        if monotonic() - self._noted < _NOTE_EVERY:
            return
        for position, (name, fitted) in enumerate(self.fitted.items()):
            if name not in self._entries:
                steps = fitted.chain.steps
                arrays = {f"weight{i}": step.weight for i, step in enumerate(steps)}
                arrays |= {f"bias{i}": step.bias for i, step in enumerate(steps) if step.bias is not None}
                said = [[step.suffix, step.stride, step.pad, step.dilation, step.group] for step in steps]
                file = self._stage.save(f"fitted-{position}", arrays)
                self._entries[name] = {"file": file, "error": fitted.error, "steps": said}
        self._stage.put("fit", self._key, {"values": self.store.note(), "fitted": self._entries})
        self.store.sweep()
        self._noted = monotonic()


def _read_chain(steps: Sequence[Any], arrays: Mapping[str, Array]) -> Decomposition:
    return Decomposition(
        tuple(
            Step(
                suffix,
                arrays[f"weight{i}"],
                arrays.get(f"bias{i}"),
                tuple(stride),
                tuple(pad),
                tuple(dilation),
                group,
            )  # type: ignore[arg-type]
            for i, (suffix, stride, pad, dilation, group) in enumerate(steps)
        )
    )
