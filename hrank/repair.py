"""Repair of a pruned net without training: what its BatchNorm layers expect, and what removed channels gave on average.

Both need images alone, no labels. The least-squares fit of the layers behind is `lra.repair`'s, which has the
response machinery; the command joins them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caffe_proto.binding import bind
from caffe_proto.errors import UsageError
from caffe_proto.evaluation import image_input
from caffe_proto.graph import Value, build
from caffe_proto.layers.channels import Channels
from caffe_proto.layers.norm import BatchNormParams
from caffe_proto.layers.spec import Arrays
from caffe_proto.model import Model
from caffe_proto.offsets import added
from caffe_proto.peers import ALONE, Peers
from caffe_proto.rewrite import Narrow
from caffe_proto.rewrite import apply as rewrite
from caffe_proto.runtime import Engine
from caffe_proto.segments import Segments
from caffe_proto.shape_inference import Shaped, infer
from caffe_proto.walk import Store, advance

from .coupling import Coupling, follow, removed_places
from .plan import Plan

Array = np.ndarray
Ticks = Callable[[int], None]

_BATCH = 32


@dataclass(frozen=True, eq=False)
class Repaired:
    """A net with other numbers in it: the layers that were changed, and for those that were left the reason."""

    model: Model
    changed: tuple[str, ...]
    kept: dict[str, str]


def reestimate(
    model: Model,
    images: Array,
    *,
    threads: int = 0,
    step: Ticks = lambda _images: None,
    peers: Peers = ALONE,
) -> Repaired:
    """Mean and variance of every BatchNorm from what it reads of the images, shallow to deep.

    ``mean = E[x]``, ``var = E[(x - mean)^2]`` over images and places of each channel; each layer sees what those
    before it make with their new statistics. Images (N, C, H, W) as the net wants them; labels are not needed.
    ``step`` is told of the images read, N for each BatchNorm. ``peers``: the processes that share the images.

    Raises UsageError where the net has no BatchNorm with statistics of its own.
    """
    shaped, blobs, source = _looked_at(model, images)
    norms = [
        index
        for index, node in enumerate(shaped.graph.nodes)
        if node.layer.type == "BatchNorm"
        and isinstance(node.params, BatchNormParams)
        and node.params.global_stats
        and index in blobs
        and index not in shaped.unknown
    ]
    if not norms:
        raise UsageError("the net has no BatchNorm whose statistics could be estimated", path=model.net.path)
    kept = _shared(shaped, norms)
    bottoms = {index: shaped.graph.nodes[index].inputs[0] for index in norms}
    parts = Segments(
        shaped, blobs, Engine(threads)
    )  # compiles a part after the statistics in it have changed
    with _stored(shaped, source, images) as (store, batch):
        for position, index in enumerate(norms):
            goals = list(dict.fromkeys(bottoms[other] for other in norms[position:]))
            advance(parts, store, batch, index - 1, goals)
            if shaped.graph.nodes[index].name not in kept:
                blobs[index] = _statistics(store, bottoms[index], blobs[index], batch, peers)
            step(len(images))
    names = [shaped.graph.nodes[index].name for index in norms]
    edits = [
        Narrow(name, (), blobs[index]) for name, index in zip(names, norms, strict=True) if name not in kept
    ]
    return Repaired(rewrite(model, edits), tuple(edit.layer for edit in edits), kept)


def compensate(
    plan: Plan,
    model: Model,
    pruned: Model,
    images: Array,
    *,
    mask_only: bool = False,
    threads: int = 0,
    step: Ticks = lambda _images: None,
    peers: Peers = ALONE,
) -> Repaired:
    """What removed channels gave the layers behind on average, added there as a constant.

    ``b_o += mean over places of sum_{c removed} W[o, c] * E[x_c]``, where E[x_c] is the mean map of channel c in
    the whole net, (H, W), so that zeros around it count as they do in the net. A layer without a bias has it in the
    BatchNorm, Scale or Bias behind. ``model`` is the net before the plan, ``pruned`` after it; ``peers`` are the
    processes that share the images.
    """
    shaped, blobs, source = _looked_at(model, images)
    coupling = follow(model, shaped)
    gone = coupling.removed(plan.keep, masks=mask_only)
    reading = [index for index, note in coupling.notes.items() if _reads_removed(note, gone)]
    kept = {
        coupling.notes[index].layer: "it has several bottoms"
        for index in reading
        if len(coupling.notes[index].bottoms) > 1
    }
    reading = [index for index in reading if coupling.notes[index].layer not in kept]
    totals = _sums_of_maps(shaped, blobs, source, images, reading, Engine(threads), step)
    count = peers.sum(len(images))
    means = {index: peers.sum(total) / count for index, total in totals.items()}
    after, others, _ = _looked_at(pruned, images)
    edits: dict[str, Arrays] = {}
    done = []
    for index in reading:
        note = coupling.notes[index]
        delta = _lost(coupling, blobs, index, gone, means[index], Engine(threads))
        assert note.filters is not None
        stays = ~removed_places(gone, note.filters)
        put = added(after, others, index, np.where(stays, delta, 0) if mask_only else delta[stays])
        if put is None:
            kept[note.layer] = "neither it nor the layer behind has a bias of its own"
            continue
        others[put[0]] = edits[after.graph.nodes[put[0]].name] = put[1]
        done.append(note.layer)
    changed = rewrite(pruned, [Narrow(name, (), blob) for name, blob in edits.items()]) if edits else pruned
    return Repaired(changed, tuple(done), kept)


def readers(coupling: Coupling, gone: Array) -> list[str]:
    """The layers with filters that have weights for channels that go, in net order."""
    return [note.layer for note in coupling.notes.values() if _reads_removed(note, gone)]


def _looked_at(model: Model, images: Array) -> tuple[Shaped, dict[int, Arrays], Value]:
    """The net at the batch size of a walk, its blobs, and its image input."""
    graph = build(model.net)
    source = image_input(graph)
    if not len(images):
        raise UsageError("there are no images to repair with", hint="give at least one")
    size = min(_BATCH, len(images))
    shaped = infer(graph, {graph.blob(source): (size, *images.shape[1:])}, partial=True)
    return shaped, dict(bind(shaped, model.weights)), source


@contextmanager
def _stored(shaped: Shaped, source: Value, images: Array) -> Iterator[tuple[Store, int]]:
    """A store of the images, and the batch size."""
    batch = shaped.shapes[source][0]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), len(images))
        (filled,) = store.new([images.shape])
        for start, stop in _slices(len(images), batch):
            filled.write(start, images[start:stop])
        store.put(source, filled)
        try:
            yield store, batch
        finally:
            store.close()


def _slices(count: int, size: int) -> list[tuple[int, int]]:
    """Each image once: start and stop of parts of at most ``size``."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _shared(shaped: Shaped, norms: Sequence[int]) -> dict[str, str]:
    """The layers among these whose statistics others have too."""
    owners: dict[str, list[int]] = {}
    for index in norms:
        for spec in shaped.graph.nodes[index].layer.param_specs:
            if spec.name:
                owners.setdefault(spec.name, []).append(index)
    several = {index for sharing in owners.values() if len(set(sharing)) > 1 for index in sharing}
    return {shaped.graph.nodes[index].name: "it shares its statistics" for index in sorted(several)}


def _statistics(store: Store, value: Value, old: Arrays, batch: int, peers: Peers) -> Arrays:
    """Mean and variance of each channel over all images, and 1 for the number they are divided by."""
    count, total, squares = 0, 0.0, 0.0
    for start, stop in _slices(store.n_images, batch):
        array = store[value].read(start, stop).astype(np.float64)
        axes = tuple(axis for axis in range(array.ndim) if axis != 1)
        count += array.size // array.shape[1]
        total = total + array.sum(axes)
        squares = squares + (array**2).sum(axes)
    count = peers.sum(count)
    mean = np.asarray(peers.sum(total)) / count
    variance = np.maximum(np.asarray(peers.sum(squares)) / count - mean**2, 0)
    made = (mean, variance, np.ones(1))
    return tuple(one.astype(np.float32).reshape(was.shape) for one, was in zip(made, old, strict=True))


def _reads_removed(note: Channels, gone: Array) -> bool:
    """Whether a layer with filters has weights for channels that go."""
    return note.filters is not None and any(
        removed_places(gone, cut.ids).any() for cut in note.cuts if _is_column(note, cut.ids)
    )


def _is_column(note: Channels, ids: Array) -> bool:
    assert note.filters is not None
    return not note.depthwise and not np.isin(ids, note.filters).any()


def _sums_of_maps(
    shaped: Shaped, blobs: dict[int, Arrays], source: Value, images: Array, readers: Sequence[int],
    engine: Engine, step: Ticks,
) -> dict[int, Array]:  # fmt: skip
    """Sum over images of what each of these layers reads: one pass, (1, C, ...) float64 each."""
    bottoms = {index: shaped.graph.nodes[index].inputs[0] for index in readers}
    values = list(dict.fromkeys(bottoms.values()))
    totals: dict[Value, Array] = {}
    size = shaped.shapes[source][0]
    parts = Segments(shaped, blobs, engine)
    for start, stop in _slices(len(images), size):
        part = np.ascontiguousarray(images[start:stop], np.float32)
        padded = np.pad(part, [(0, size - len(part))] + [(0, 0)] * (part.ndim - 1))
        made = parts.run({source: padded}, values) if values else {}
        for value, array in made.items():
            each = len(array) // size  # rows of an image, where layers before have made several
            total = (
                array[: len(part) * each].reshape(len(part), each, *array.shape[1:]).sum(0, dtype=np.float64)
            )
            totals[value] = totals.get(value, 0.0) + total
        step(len(part))
    return {index: totals[value] for index, value in bottoms.items()}


def _lost(
    coupling: Coupling, blobs: dict[int, Arrays], index: int, gone: Array, mean: Array, engine: Engine
) -> Array:
    """What a layer makes of the mean of the channels that go, averaged over places: one number a filter."""
    note, shaped = coupling.notes[index], coupling.shaped
    weight = np.array(blobs[index][0])
    for cut in note.cuts:
        if cut.blob or not _is_column(note, cut.ids):
            continue
        blocks = np.atleast_2d(cut.ids)
        for part, ids in zip(np.split(weight, len(blocks)), blocks, strict=True):
            np.moveaxis(part, cut.axis, 0)[~removed_places(gone, ids)] = 0
    others = tuple(np.zeros_like(blob) for blob in blobs[index][1:])
    node = shaped.graph.nodes[index]
    top, bottom = Value(index, 0), node.inputs[0]
    assert node.spec is not None
    out = node.spec.infer(node.params, (mean.shape,))[0]
    alone = Shaped(shaped.graph, {**shaped.shapes, bottom: mean.shape, top: out}, shaped.unknown)
    parts = Segments(alone, {index: (weight, *others)}, engine)
    made = parts.run({bottom: mean.astype(np.float32)}, [top])[top].astype(np.float64)
    axis = note.tops[0].axis
    return np.asarray(made.mean(tuple(one for one in range(made.ndim) if one != axis)))
