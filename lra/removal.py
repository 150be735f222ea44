"""A net without the channels that carry nothing: what zeros in its weights are worth once it is made smaller.

A channel goes where no layer reads it: all weights that would read it are zero. Where the filters that make a
channel are all zero it is a constant; what readers make of it moves into their biases first, which leaves it unread.
A reader without a bias, or one that pads, keeps a constant that is not zero. The net computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from caffe_proto import binding
from caffe_proto.costs import cost
from caffe_proto.errors import Error
from caffe_proto.graph import Value
from caffe_proto.layers.channels import STAYS, Channels, Cut
from caffe_proto.layers.conv import ConvParams
from caffe_proto.layers.conv import geometry as conv_geometry
from caffe_proto.layers.dense import DenseParams
from caffe_proto.layers.spec import Arrays
from caffe_proto.model import Model
from caffe_proto.rewrite import Narrow
from caffe_proto.rewrite import apply as rewrite
from caffe_proto.runtime import Engine
from caffe_proto.segments import Segments
from caffe_proto.shape_inference import InputShapes
from hrank.applier import apply
from hrank.coupling import Coupling
from hrank.coupling import find as follow
from hrank.groups import Group
from hrank.plan import Plan

_SAME = 1e-6  # relative spread up to which a channel counts as constant


@dataclass(frozen=True)
class Removed:
    """A smaller net; ``channels`` before and after by layer, MACs of the batch and parameters before and after."""

    model: Model
    channels: dict[str, tuple[int, int]]
    macs: tuple[int, int]
    params: tuple[int, int]


def without_zeros(model: Model, inputs: InputShapes | None = None) -> Removed:
    """Remove what carries nothing from prototxt and weights.

    Raises as `hrank.applier.apply` does.
    """
    first = follow(model, inputs)
    small = folded(model, inputs)
    now = follow(small, inputs)
    while plan := _plan(now):
        small, _ = apply(plan, small, input_shapes=inputs)
        now = follow(small, inputs)
    after = now.filters
    channels = {
        name: (len(ids), len(after[name]))
        for name, ids in first.filters.items()
        if len(after[name]) < len(ids)
    }
    costs = cost(first.shaped), cost(now.shaped)
    return Removed(small, channels, (costs[0].macs, costs[1].macs), (costs[0].params, costs[1].params))


def _plan(found: Coupling) -> Plan | None:
    """The plan that keeps what is read; None where all is."""
    read = np.zeros(int(found.unit_of.max(initial=-1)) + 1, bool)
    for index, note in found.notes.items():
        blobs = _stored(found, index)
        for cut in _reads(note):
            places = _touched(blobs[cut.blob], cut) if blobs else np.ones(cut.ids.shape, bool)
            read[found.unit_of[cut.ids[places & (cut.ids != STAYS)]]] = True
    keep: dict[str, tuple[int, ...]] = {}
    for group in found.groups:
        keep.update(group.spread(_kept(found, group, read)))
    plan = Plan.of(found, keep)
    return plan if plan.layers else None


def _kept(found: Coupling, group: Group, read: np.ndarray) -> set[int]:
    """The units of a group that stay: those that are read, and those that rules want."""
    kept = set(group.fixed)
    for member in group.members:
        used = read[found.unit_of[found.filters[member.layer]]]
        kept |= set(member.units[used].tolist())
    most = max((len(kept.intersection(cell)) for cell in group.cells), default=0)
    for cell in group.cells:
        spare = [unit for unit in cell if unit not in kept]
        kept |= set(spare[: max(most, 1) - len(kept.intersection(cell))])
    for wanted in (*group.never_empty, tuple(range(group.channels))):
        if not kept.intersection(wanted):
            kept.add(wanted[0])
    return kept


def folded(model: Model, inputs: InputShapes | None = None) -> Model:
    """The same net where nobody reads a constant channel any more, as far as biases can take its part.

    Constants are found by running the net twice, on random numbers; where it cannot be run, it stays as it is.
    """
    found = follow(model, inputs)
    constant = _constant_units(found)
    if not constant.any():
        return model
    readers = [(index, cut) for index, note in found.notes.items() for cut in _reads(note)]
    readers = [(index, cut) for index, cut in readers if _among(found, constant, cut.ids).any()]
    try:
        seen = _seen(found, sorted({found.shaped.graph.nodes[index].inputs[0] for index, _ in readers}))
    except Error:
        return model
    edits: dict[str, Narrow] = {}
    for index, cut in readers:
        node = found.shaped.graph.nodes[index]
        blobs = _fold(found, index, cut, constant, seen[node.inputs[0]])
        if blobs is not None:
            edits[node.name] = Narrow(node.name, (), blobs)
    return rewrite(model, list(edits.values())) if edits else model


def _constant_units(found: Coupling) -> np.ndarray:
    """The units all of whose filters are zero, bool."""
    count = int(found.unit_of.max(initial=-1)) + 1
    zero, filled = np.zeros(count, bool), np.zeros(count, bool)
    for index, note in found.notes.items():
        if note.filters is None or note.depthwise:
            continue
        blobs = _stored(found, index)
        own = [cut for cut in note.cuts if cut.blob == 0 and _is_own(note, cut)]
        units = found.unit_of[note.filters]
        if not blobs or len(own) != 1 or own[0].ids.ndim != 1:
            filled[units] = True
            continue
        touched = _touched(blobs[0], own[0])
        filled[found.unit_of[own[0].ids[touched]]] = True
        zero[found.unit_of[own[0].ids[~touched]]] = True
    return zero & ~filled


def _seen(found: Coupling, values: list[Value]) -> dict[Value, np.ndarray]:
    """Values of two runs on random numbers, one behind the other along axis 0."""
    shaped = found.shaped
    parts = Segments(shaped, binding.bind(shaped, found.model.weights), Engine(threads=1))
    runs = []
    for seed in range(2):
        numbers = np.random.default_rng(seed)
        fed = {
            value: numbers.uniform(0, 1, shaped.shapes[value]).astype(np.float32)
            for value in shaped.graph.sources
        }
        runs.append(parts.run(fed, values))
    return {value: np.concatenate([run[value] for run in runs]) for value in values}


def _fold(found: Coupling, index: int, cut: Cut, constant: np.ndarray, seen: np.ndarray) -> Arrays | None:
    """The blobs of a reader that no longer reads what is constant; None where nothing can be done."""
    node = found.shaped.graph.nodes[index]
    blobs, p = _stored(found, index), node.params
    plain = isinstance(p, ConvParams | DenseParams) and node.layer.type in ("Convolution", "InnerProduct")
    shared = any(spec.name for spec in node.layer.param_specs)
    if blobs is None or cut.blob or shared or not plain or len(node.inputs) > 1:
        return None
    blocks = np.atleast_2d(cut.ids)
    levels, steady = _levels(p, seen, blocks.size)
    takes = len(blobs) > 1 and (isinstance(p, DenseParams) or not _pads(p, seen.shape))
    gone = _among(found, constant, blocks) & (steady & ((levels == 0) | takes)).reshape(blocks.shape)
    if not gone.any():
        return None
    weight = np.array(blobs[0])
    parts = np.split(np.moveaxis(weight, cut.axis, 1), len(blocks)) if cut.axis else [weight.T]
    moved = []
    for part, places, level in zip(parts, gone, levels.reshape(blocks.shape), strict=True):
        taps = part.reshape(*part.shape[:2], -1).sum(axis=2, dtype=np.float64)
        moved.append(taps[:, places] @ level[places])
        part[:, places] = 0
    bias = (
        (np.asarray(blobs[1], np.float64) + np.concatenate(moved).reshape(blobs[1].shape),) if takes else ()
    )
    return (weight, *(one.astype(np.float32) for one in bias), *blobs[1 + len(bias) :])


def _levels(p: object, seen: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The level of every place that a reader reads, and whether it is the same everywhere."""
    if isinstance(p, DenseParams):
        spread = seen.reshape(-1, count)
    else:
        assert isinstance(p, ConvParams)
        spread = np.moveaxis(seen, p.axis, -1).reshape(-1, count)
    levels = spread.mean(axis=0, dtype=np.float64)
    steady = np.abs(spread - levels).max(axis=0) <= _SAME * np.maximum(np.abs(levels), _SAME)
    return levels, steady


def _pads(p: ConvParams, bottom: tuple[int, ...]) -> bool:
    return any(conv_geometry(p, bottom)[1].pad) or p.pad_end is not None


def _is_own(note: Channels, cut: Cut) -> bool:
    """Whether a cut holds what the layer makes."""
    return note.filters is not None and bool(np.isin(cut.ids, note.filters).any())


def _reads(note: Channels) -> Iterator[Cut]:
    """The blobs' places by which a layer that mixes channels reads them."""
    if note.filters is not None and not note.depthwise:
        yield from (cut for cut in note.cuts if not _is_own(note, cut))


def _among(found: Coupling, units: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which places hold ids of these units."""
    return np.asarray((ids != STAYS) & units[found.unit_of[ids]])


def _touched(blob: np.ndarray, cut: Cut) -> np.ndarray:
    """Which places of a cut hold anything but zeros, of the shape of its ids."""
    blocks = np.split(blob, len(cut.ids)) if cut.ids.ndim == 2 else [blob]
    found = [
        np.moveaxis(block, cut.axis, 0).reshape(block.shape[cut.axis], -1).any(axis=1) for block in blocks
    ]
    return np.stack(found).reshape(cut.ids.shape)


def _stored(found: Coupling, index: int) -> Arrays | None:
    """The blobs of a layer in the net's shapes; None where it has none."""
    name, weights = found.shaped.graph.nodes[index].name, found.model.weights
    if weights is None or name not in weights:
        return None
    shapes = found.shaped.blobs(index)
    return tuple(blob.reshape(shape) for blob, shape in zip(weights[name], shapes, strict=True))
