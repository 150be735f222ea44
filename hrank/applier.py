"""Changing: a plan and a model in, the smaller model out, with what became of each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from caffe_proto import binding
from caffe_proto.costs import Cost
from caffe_proto.costs import cost as count
from caffe_proto.errors import PlanError, UnsupportedError, UsageError, WeightsError
from caffe_proto.graph import build
from caffe_proto.layers.channels import Channels, Cut
from caffe_proto.layers.spec import Arrays, Shape, text
from caffe_proto.model import Model
from caffe_proto.net import nearest
from caffe_proto.rewrite import Narrow, NewValues
from caffe_proto.rewrite import apply as rewrite
from caffe_proto.shape_inference import InputShapes, Shaped, infer

from .coupling import Coupling, follow, removed_places
from .plan import Plan


@dataclass(frozen=True)
class Row:
    """One changed layer: output channels before and after, MACs and parameters.

    ``channels`` is None where it has no filters; of masked ones the second number are those that are not zero.
    """

    name: str
    type: str
    channels: tuple[int, int] | None
    macs: tuple[int, int]
    params: tuple[int, int]


@dataclass(frozen=True)
class Report:
    """What became of a net: changed layers, totals before and after, layers kept with the reason."""

    rows: tuple[Row, ...]
    macs: tuple[int, int]
    conv_macs: tuple[int, int]
    params: tuple[int, int]
    kept: dict[str, str]


def apply(
    plan: Plan,
    model: Model,
    *,
    mask_only: bool = False,
    force: bool = False,
    sibling: bool = False,
    input_shapes: InputShapes | None = None,
) -> tuple[Model, Report]:
    """Remove what a plan does not keep from prototxt and weights: the same plan and files give the same bytes.

    Layers are found by name in both phases. Without weights the structure alone changes. ``sibling``: the net
    is another form of the one the plan was made for (its train_val), so only the weights must be the plan's;
    inputs whose shape it does not say have the plan's.

    ``mask_only``: shapes stay, and what would be removed is set to zero: filters, biases, mean, scale and shift
    behind them, and the columns that read them (Lin et al., CVPR 2020, mask filters, biases and the BatchNorm
    behind). Each layer stands for itself, so the channels of a sum may have other masks in each of its terms; what
    stands behind the sum is zeroed where all terms are.

    Raises PlanError where the plan was made for other files (unless ``force``), names layers that the net lacks or
    channels that must stay or go with others, UsageError for masks without weights.
    """
    plan.check(model, force=force, sibling=sibling)
    if mask_only and model.weights is None:
        raise UsageError("masks stand in the weights", path=model.net.path, hint="give the weights too")
    places = list(_places(plan, model, dict(input_shapes or {})))
    _check_names(plan, model, places)
    _check_other_phase(*places)
    edits: dict[str, Narrow] = {}
    gone = [coupling.removed(plan.keep, masks=mask_only) for coupling in places]
    for coupling, going in zip(places, gone, strict=True):
        for edit in _edits(coupling, going, mask_only):
            edits.setdefault(edit.layer, edit)
    changed = rewrite(model, list(edits.values())) if edits else model
    after = [
        _checked(changed, coupling, going & (not mask_only))
        for coupling, going in zip(places, gone, strict=True)
    ]
    return changed, _report(plan, places[0], gone[0], after[0], edits)


def _places(plan: Plan, model: Model, given: dict[str, Shape]) -> Iterator[Coupling]:
    """The model in its phase, bound to its weights, and in the other."""
    state = model.net.state
    other = dataclasses.replace(state, phase="TRAIN" if state.phase == "TEST" else "TEST")
    for one in (model, model.in_state(other)):
        graph = build(one.net)
        sources = {graph.blob(value) for value in graph.sources}
        inputs = {name: shape for name, shape in given.items() if name in sources or one is model}
        shaped = infer(graph, inputs, partial=True)
        missing = {
            name: shape
            for index, node in enumerate(graph.nodes)
            if node.spec is not None and node.spec.source and index in shaped.unknown
            for name, shape in _supplied(node.layer.tops, plan.inputs).items()
        }
        if missing:
            shaped = infer(graph, {**missing, **inputs}, partial=True)
        if one is model and one.weights is not None:
            binding.bind(shaped, one.weights)
        yield follow(one, shaped)


def source_shapes(model: Model, known: InputShapes) -> dict[str, Shape]:
    """Those of known shapes that a net has sources for, and of labels beside them: a train_val rarely says its own."""
    graph = build(model.net)
    found: dict[str, Shape] = {}
    for value in graph.sources:
        found |= _supplied(graph.nodes[value.node].layer.tops, known)
    return found


def _supplied(tops: Sequence[str], known: InputShapes) -> dict[str, Shape]:
    """The plan's shapes for the tops of a data layer; its other tops are labels, one number an image."""
    batch = next((known[name][:1] for name in tops if name in known), None)
    return {name: tuple(known.get(name, batch)) for name in tops} if batch is not None else {}


def _check_names(plan: Plan, model: Model, places: Sequence[Coupling]) -> None:
    """Raise PlanError where the plan names layers that are nowhere, or have another number of channels."""
    known = {name: member for place in places for name, (_, member) in place.by_layer.items()}
    for name, entry in plan.layers.items():
        if name not in known:
            why = next(
                (place.shaped.unknown[index].message for place in places for index in _unknown(place, name)),
                None,
            )
            what = f"cannot be pruned: {why}" if why else "is no layer with filters of this net"
            raise PlanError(
                what, path=model.net.path, layer=name, hint=None if why else nearest(name, [*known])
            )
        if entry.channels and entry.channels != known[name].channels:
            raise PlanError(
                f"has {known[name].channels} output channels, the plan was made for {entry.channels}",
                path=model.net.path,
                layer=name,
            )


def _unknown(place: Coupling, name: str) -> list[int]:
    return [i for i in place.shaped.unknown if place.shaped.graph.nodes[i].name == name]


def _check_other_phase(here: Coupling, other: Coupling) -> None:
    """Raise UnsupportedError where the other phase has layers of its own that channels cannot be followed to."""
    names = {node.name for node in here.shaped.graph.nodes}
    for index, error in other.shaped.unknown.items():
        node = other.shaped.graph.nodes[index]
        followed = all(value in other.shaped.shapes for value in node.inputs)
        if node.name not in names and not followed and (node.spec is None or node.spec.filters):
            phase = other.model.net.state.phase
            raise UnsupportedError(
                f"exists in phase {phase} only, and how it depends on the channels is not known: {error.message}",
                path=other.model.net.path,
                line=node.layer.line,
                layer=node.name,
            )


def _edits(coupling: Coupling, gone: np.ndarray, mask_only: bool) -> Iterator[Narrow]:
    """What changes in each layer."""
    for index, note in coupling.notes.items():
        values = () if mask_only else tuple(_values(note, gone))
        cuts = [
            cut for cut in note.cuts if removed_places(gone, cut.ids).any() and (cut.zero or not mask_only)
        ]
        if not values and not cuts:
            continue
        blobs = _stored(coupling, index)
        if blobs is not None:
            for blob in range(len(blobs)):
                mine = [cut for cut in cuts if cut.blob == blob]
                change = _masked if mask_only else _narrowed
                blobs = (
                    (*blobs[:blob], change(blobs[blob], mine, gone), *blobs[blob + 1 :]) if mine else blobs
                )
        if values or blobs is not None:
            yield Narrow(note.layer, values, blobs)


def _values(note: Channels, gone: np.ndarray) -> Iterator[NewValues]:
    """The settings whose counts change; those that would have to be added, where any channel read goes."""
    read = [labels.ids for labels in note.bottoms if labels is not None]
    for one in note.settings:
        counted = read if one.add else [value for value in one.values if isinstance(value, np.ndarray)]
        if any(removed_places(gone, ids).any() for ids in counted):
            values = tuple(
                str(value if isinstance(value, int) else int((~removed_places(gone, value)).sum()))
                for value in one.values
            )
            yield NewValues(one.block, one.name, values, one.add)


def _stored(coupling: Coupling, index: int) -> Arrays | None:
    """The blobs of a layer in the shapes the net gives them; None where there are no weights of it."""
    name, weights = coupling.shaped.graph.nodes[index].name, coupling.model.weights
    if weights is None or name not in weights:
        return None
    shapes, blobs = coupling.shaped.blobs(index), weights[name]
    if len(shapes) != len(blobs) or any(
        not binding.fits(blob.shape, shape) for blob, shape in zip(blobs, shapes, strict=True)
    ):
        found = ", ".join(text(blob.shape) for blob in blobs)
        what = f"wants blobs of {', '.join(map(text, shapes))}, stored are {found}"
        raise WeightsError(what, path=weights.path, layer=name)
    return tuple(blob.reshape(shape) for blob, shape in zip(blobs, shapes, strict=True))


def _narrowed(blob: np.ndarray, cuts: Sequence[Cut], gone: np.ndarray) -> np.ndarray:
    """A blob without the places that go."""
    by_block = [cut for cut in cuts if cut.ids.ndim == 2]
    rows = next((cut for cut in cuts if cut.axis == 0), None)
    for cut in by_block:
        masks = ~removed_places(gone, cut.ids)
        parts = np.split(blob, len(masks))
        kept = np.split(~removed_places(gone, rows.ids) if rows else np.ones(len(blob), bool), len(masks))
        blob = np.concatenate(
            [
                np.compress(mask, part[row], axis=cut.axis)
                for part, mask, row in zip(parts, masks, kept, strict=True)
            ]
        )
    for cut in cuts:
        if cut.ids.ndim == 1 and not (by_block and cut.axis == 0):
            blob = np.compress(~removed_places(gone, cut.ids), blob, axis=cut.axis)
    return np.ascontiguousarray(blob)


def _masked(blob: np.ndarray, cuts: Sequence[Cut], gone: np.ndarray) -> np.ndarray:
    """A blob with zeros in the places that go."""
    blob = np.array(blob)
    for cut in cuts:
        blocks = np.atleast_2d(cut.ids)
        for part, ids in zip(np.split(blob, len(blocks)), blocks, strict=True):
            np.moveaxis(part, cut.axis, 0)[removed_places(gone, ids)] = 0
    return blob


def _checked(changed: Model, coupling: Coupling, gone: np.ndarray) -> Shaped:
    """The changed net's shapes; raises UnsupportedError where one is not what removing the channels makes it."""
    before = coupling.shaped
    inputs = {
        before.graph.blob(value): before.shapes[value]
        for value in before.graph.sources
        if value in before.shapes
    }
    after = infer(build(changed.in_state(coupling.model.net.state).net), inputs, partial=True)
    for value, shape in before.shapes.items():
        labels, wanted = coupling.labels.get(value), list(shape)
        if labels is not None:
            wanted[labels.axis] = int((~removed_places(gone, labels.ids)).sum())
        node = after.graph.nodes[value.node]
        if after.shapes.get(value) != tuple(wanted):
            found = after.unknown.get(value.node)
            what = f"made {text(after.shapes[value])}" if value in after.shapes else found and found.message
            raise UnsupportedError(
                f'would make "{after.graph.blob(value)}" {text(wanted)} without these channels: {what}',
                path=changed.net.path,
                line=node.layer.line,
                layer=node.name,
            )
    return after


def _report(plan: Plan, place: Coupling, gone: np.ndarray, after: Shaped, edits: dict[str, Narrow]) -> Report:
    costs = count(place.shaped), count(after)
    rows = tuple(_row(place, name, gone, costs) for name in costs[0].by_layer if name in edits)
    return Report(
        rows,
        (costs[0].macs, costs[1].macs),
        (costs[0].conv_macs, costs[1].conv_macs),
        (costs[0].params, costs[1].params),
        dict(plan.kept),
    )


def _row(place: Coupling, name: str, gone: np.ndarray, costs: tuple[Cost, Cost]) -> Row:
    before, after = (one.by_layer[name] for one in costs)
    filters = place.filters.get(name)
    channels = (len(filters), int((~removed_places(gone, filters)).sum())) if filters is not None else None
    return Row(name, before.type, channels, (before.macs, after.macs), (before.params, after.params))
