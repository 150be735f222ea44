"""Losses and Accuracy, as Caffe's blob holds them: the mean loss, not yet times loss_weight.

Scores are seen as (outer, classes, inner) around the class axis, labels as (outer, 1, inner). A label picks
its class by comparison with 0, 1, 2, ...; so labels that are ignored may have any value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import NetError, ShapeError, UnsupportedError
from ..typed import Typed
from .emit import Emitter
from .spec import LayerSpec, Request, Shape, Shapes, around, canonical_axis, legacy, size, text

_SMALLEST = float(np.finfo(np.float32).tiny)  # FLT_MIN
_LOG_THRESHOLD = 1e-20


@dataclass(frozen=True)
class LossParams:
    """What the losses share; ``ignore`` None: every label counts. ``source``: InfogainLoss's matrix file."""

    n_tops: int
    axis: int = 1
    ignore: int | None = None
    mode: str = "BATCH_SIZE"
    source: bool = False


def _ignored(p: Typed) -> int | None:
    return int(p["ignore_label"]) if "ignore_label" in p else None


def _mode(p: Typed, default: str) -> str:
    """What divides the sum of a loss: ``normalization``, else the older ``normalize``, else ``default``."""
    mode = str(p["normalization"])
    if "normalization" not in p:
        mode = default
        if "normalize" in p:
            mode = "VALID" if p["normalize"] else "BATCH_SIZE"
    if mode not in ("FULL", "VALID", "BATCH_SIZE", "NONE"):
        raise UnsupportedError(f"normalization {mode} is one of a fork", line=p.line("normalization"))
    return mode


def _read_softmax_loss(request: Request) -> LossParams:
    p = request["loss_param"]
    if request.n_tops > 1:
        raise NetError(
            "a second top needs two loss_weight values, and Caffe's inner Softmax then refuses them",
            hint="take the probabilities from a Softmax layer",
        )
    return LossParams(request.n_tops, request["softmax_param"]["axis"], _ignored(p), _mode(p, "VALID"))


def _read_infogain(request: Request) -> LossParams:
    p, own = request["loss_param"], request["infogain_loss_param"]
    if "normalize" in p:
        raise NetError("normalize is deprecated, Caffe wants normalization here", line=p.line("normalize"))
    from_file = request.n_bottoms < 3
    if from_file and "source" not in own:
        raise NetError("needs its matrix as a third bottom or, in infogain_loss_param, as source")
    return LossParams(request.n_tops, own["axis"], _ignored(p), _mode(p, "VALID"), from_file)


def _read_cross_entropy(request: Request) -> LossParams:
    p = request["loss_param"]
    return LossParams(request.n_tops, ignore=_ignored(p), mode=_mode(p, "BATCH_SIZE"))


def _read_plain(request: Request) -> LossParams:
    return LossParams(request.n_tops)


def _same_first(bottoms: Shapes) -> None:
    """What every loss checks."""
    first, second = bottoms[0], bottoms[1]
    if not first or not second or first[0] != second[0]:
        raise ShapeError(f"bottoms {text(first)} and {text(second)} differ in their first axis")


def _labels_match(axis: int, bottoms: Shapes) -> Shape:
    """(outer, classes, inner) of the first bottom; raises ShapeError unless each outer, inner has a label."""
    shape = around(bottoms[0], canonical_axis(axis, len(bottoms[0])))
    wanted, found = shape[0] * shape[2], size(bottoms[1])
    if wanted != found:
        raise ShapeError(f"{found} labels for {wanted} predictions")
    return shape


def _tops(p: LossParams, bottoms: Shapes) -> Shapes:
    """A scalar and, where a second top is named, the probabilities."""
    return ((), bottoms[0])[: p.n_tops]


def _class_loss_infer(p: LossParams, bottoms: Shapes) -> Shapes:
    _same_first(bottoms)
    _, classes, _ = _labels_match(p.axis, bottoms)
    if len(bottoms) == 3 and size(bottoms[2]) != classes**2:
        raise ShapeError(f"the matrix {text(bottoms[2])} does not hold {classes} x {classes} numbers")
    return _tops(p, bottoms)


def _per_item(shape: Shape, what: str) -> None:
    """Raise ShapeError unless a blob holds one number for each item."""
    if legacy(shape)[1:] != (1, 1, 1):
        raise ShapeError(f"{what} {text(shape)} must hold one number for each item")


def _multinomial_infer(p: LossParams, bottoms: Shapes) -> Shapes:
    _same_first(bottoms)
    legacy(bottoms[0])
    _per_item(bottoms[1], "the labels")
    return _tops(p, bottoms)


def _euclidean_infer(p: LossParams, bottoms: Shapes) -> Shapes:
    _same_first(bottoms)
    legacy(bottoms[0])
    if size(bottoms[0]) != size(bottoms[1]):
        raise ShapeError(f"bottoms {text(bottoms[0])} and {text(bottoms[1])} differ in size")
    return _tops(p, bottoms)


def _cross_entropy_infer(p: LossParams, bottoms: Shapes) -> Shapes:
    _same_first(bottoms)
    if size(bottoms[0]) != size(bottoms[1]):
        raise ShapeError(f"bottoms {text(bottoms[0])} and {text(bottoms[1])} differ in size")
    return _tops(p, bottoms)


def _class_view(e: Emitter, axis: int) -> tuple[str, str, int]:
    """(scores, labels, classes): scores as (outer, classes, inner), labels as int64 (outer, 1, inner)."""
    axis = canonical_axis(axis, len(e.in_shapes[0]))
    e.static(0, [axis], "counting classes")
    outer, classes, inner = around(e.in_shapes[0], axis)
    varies = any(e.dynamic_in[0][:axis]), False, any(e.dynamic_in[0][axis + 1 :])
    scores = e.reshape(e.inputs[0], 0, (outer, classes, inner), varies)
    labels = e.reshape(e.inputs[1], 1, (outer, 1, inner), varies)
    return scores, e.cast(labels, "int64"), classes


def _hits(e: Emitter, labels: str, classes: int) -> str:
    """Whether a class is the labelled one, bool (outer, classes, inner)."""
    return e.node("Equal", labels, e.const(np.arange(classes).reshape(1, -1, 1), "classes", np.int64))


def _valid(e: Emitter, labels: str, ignore: int | None) -> str | None:
    """Whether a label counts, bool; None where all do."""
    if ignore is None:
        return None
    return e.node("Not", e.node("Equal", labels, e.const(ignore, "ignored", np.int64)))


def _only(e: Emitter, where: str | None, values: str) -> str:
    """``values``, 0 where they do not count."""
    return values if where is None else e.node("Where", where, values, e.const(0.0, "zero"))


def _picked(e: Emitter, hits: str, values: str) -> str:
    """The value of the labelled class, (outer, 1, inner)."""
    return e.sum(_only(e, hits, values), [1], keep=True)


def _normalized(e: Emitter, terms: str, mode: str, valid: str | None = None) -> None:
    """sum of the terms that count / max(1, how many of them, of all, of items, or 1), to the first top."""
    if mode == "NONE":
        e.sum(_only(e, valid, terms), to=e.outputs[0])
        return
    if mode == "BATCH_SIZE":
        count = e.node("Gather", e.node("Shape", terms), e.const(0, "first", np.int64))
    elif mode == "VALID" and valid is not None:
        count = e.sum(e.cast(valid, "int64"))
    else:
        count = e.node("Size", terms)
    count = e.node("Max", e.cast(count, "float32"), e.const(1.0, "one"))
    e.node("Div", e.sum(_only(e, valid, terms)), count, to=e.outputs[0])


def _minus_log(e: Emitter, values: str, floor: float) -> str:
    """-log(max(x, floor))"""
    return e.node("Neg", e.node("Log", e.node("Max", values, e.const(floor, "floor"))))


def _softmax_loss(e: Emitter, p: LossParams) -> None:
    """-log(max(softmax(x)[label], FLT_MIN))"""
    scores, labels, classes = _class_view(e, p.axis)
    chosen = _picked(e, _hits(e, labels, classes), e.node("Softmax", scores, axis=1))
    _normalized(e, _minus_log(e, chosen, _SMALLEST), p.mode, _valid(e, labels, p.ignore))


def _infogain(e: Emitter, p: LossParams) -> None:
    """-sum over classes of H[label, class] * log(max(softmax(x), 1e-20)); H is the third bottom."""
    if p.source:
        hint = "give the matrix as third bottom"
        raise UnsupportedError("InfogainLoss's matrix file (source) is not read", hint=hint)
    scores, labels, classes = _class_view(e, p.axis)
    prob = e.node("Softmax", scores, axis=1)
    matrix = e.reshape(e.inputs[2], 2, (classes, classes), (False, False))
    hits = e.cast(_hits(e, labels, classes), "float32")
    rows = e.node("MatMul", e.node("Transpose", matrix, perm=(1, 0)), hits)
    terms = e.sum(e.node("Mul", rows, _minus_log(e, prob, _LOG_THRESHOLD)), [1], keep=True)
    _normalized(e, terms, p.mode, _valid(e, labels, p.ignore))
    if p.n_tops > 1:
        e.reshape(prob, 0, e.out_shapes[1], e.dynamic_out[1], to=e.outputs[1])


def _items(e: Emitter) -> str:
    """The first bottom as (items, numbers, 1)."""
    shape = e.in_shapes[0]
    e.static(0, range(1, len(shape)), "a loss over these axes")
    return e.reshape(e.inputs[0], 0, (shape[0], size(shape[1:]), 1), (e.dynamic_in[0][0], False, False))


def _item_labels(e: Emitter, index: int) -> str:
    """The first number of bottom ``index`` for each item, int64 (items, 1, 1)."""
    count, have = e.in_shapes[0][0], size(e.in_shapes[index])
    if have == count:
        labels = e.reshape(e.inputs[index], index, (count, 1, 1), (e.dynamic_in[0][0], False, False))
        return e.cast(labels, "int64")
    raise UnsupportedError(f"{have} labels for {count} items")


def _multinomial(e: Emitter, p: LossParams) -> None:
    """-log(max(x[label], 1e-20)) over the items"""
    probabilities = _items(e)
    hits = _hits(e, _item_labels(e, 1), size(e.in_shapes[0][1:]))
    _normalized(e, _minus_log(e, _picked(e, hits, probabilities), _LOG_THRESHOLD), p.mode)


def _euclidean(e: Emitter, p: LossParams) -> None:
    """sum (a - b)² / 2 over the items"""
    other = e.inputs[1]
    if e.in_shapes[0] != e.in_shapes[1]:
        other = e.reshape(other, 1, e.in_shapes[0], e.dynamic_in[0])
    difference = e.node("Sub", e.inputs[0], other)
    square = e.node("Mul", difference, difference)
    _normalized(e, e.node("Mul", square, e.const(0.5, "half")), p.mode)


def _cross_entropy(e: Emitter, p: LossParams) -> None:
    """max(x, 0) - x*target + log(1 + exp(-|x|))"""
    x, target = e.inputs
    if e.in_shapes[0] != e.in_shapes[1]:
        target = e.reshape(target, 1, e.in_shapes[0], e.dynamic_in[0])
    linear = e.node("Sub", e.node("Max", x, e.const(0.0, "zero")), e.node("Mul", x, target))
    curved = e.node("Log", e.node("Add", e.node("Exp", e.node("Neg", e.node("Abs", x))), e.const(1.0, "one")))
    valid = _valid(e, e.cast(target, "int64"), p.ignore)
    _normalized(e, e.node("Add", linear, curved), p.mode, valid)


@dataclass(frozen=True)
class HingeParams:
    n_tops: int
    squared: bool


def _read_hinge(request: Request) -> HingeParams:
    return HingeParams(request.n_tops, request["hinge_loss_param"]["norm"] == "L2")


def _hinge_infer(p: HingeParams, bottoms: Shapes) -> Shapes:
    _same_first(bottoms)
    legacy(bottoms[0])
    return ((),) * p.n_tops


def _hinge(e: Emitter, p: HingeParams) -> None:
    """sum over classes of max(0, 1 + x), x turned round for the labelled class; L2: squared"""
    scores = _items(e)
    hits = _hits(e, _item_labels(e, 1), size(e.in_shapes[0][1:]))
    turned = e.node("Where", hits, e.node("Neg", scores), scores)
    margin = e.node("Max", e.node("Add", turned, e.const(1.0, "one")), e.const(0.0, "zero"))
    _normalized(e, e.node("Mul", margin, margin) if p.squared else margin, "BATCH_SIZE")


@dataclass(frozen=True)
class ContrastiveParams:
    n_tops: int
    margin: float
    legacy: bool


def _read_contrastive(request: Request) -> ContrastiveParams:
    p = request["contrastive_loss_param"]
    return ContrastiveParams(request.n_tops, p["margin"], p["legacy_version"])


def _contrastive_infer(p: ContrastiveParams, bottoms: Shapes) -> Shapes:
    _same_first(bottoms)
    first, second, similar = bottoms
    if legacy(first)[1:] != (legacy(second)[1], 1, 1) or legacy(second)[2:] != (1, 1):
        raise ShapeError(f"bottoms {text(first)} and {text(second)} must be items x channels, and alike")
    _per_item(similar, "the third bottom")
    if legacy(similar)[0] < first[0]:
        raise ShapeError(f"the third bottom {text(similar)} has fewer items than {text(first)}")
    return ((),) * p.n_tops


def _contrastive(e: Emitter, p: ContrastiveParams) -> None:
    """d²/2 of similar pairs; of others max(margin - d, 0)²/2, in the legacy version max(margin - d², 0)/2"""
    other = e.reshape(e.inputs[1], 1, e.in_shapes[0], e.dynamic_in[0])
    axes = list(range(1, len(e.in_shapes[0])))
    difference = e.node("Sub", e.inputs[0], other)
    square = e.node("Mul", difference, difference)
    far = e.node("Reshape", e.sum(square, axes) if axes else square, e.ints((-1, 1, 1), "shape"))
    distance = far if p.legacy else e.node("Sqrt", far)
    gap = e.node("Max", e.node("Sub", e.const(p.margin, "margin"), distance), e.const(0.0, "zero"))
    apart = gap if p.legacy else e.node("Mul", gap, gap)
    terms = e.node("Where", e.cast(_item_labels(e, 2), "bool"), far, apart)
    _normalized(e, e.node("Mul", terms, e.const(0.5, "half")), "BATCH_SIZE")


@dataclass(frozen=True)
class AccuracyParams:
    n_tops: int
    top_k: int
    axis: int
    ignore: int | None


def _read_accuracy(request: Request) -> AccuracyParams:
    p = request["accuracy_param"]
    return AccuracyParams(request.n_tops, p["top_k"], p["axis"], _ignored(p))


def _accuracy_infer(p: AccuracyParams, bottoms: Shapes) -> Shapes:
    _, classes, _ = _labels_match(p.axis, bottoms)
    if p.top_k > classes:
        raise ShapeError(f"top_k {p.top_k} is more than the {classes} classes")
    return ((), (classes,))[: p.n_tops]


def _accuracy(e: Emitter, p: AccuracyParams) -> None:
    """The share of labels whose score is among the top_k; one that equals it counts as better."""
    scores, labels, classes = _class_view(e, p.axis)
    hits, valid = _hits(e, labels, classes), _valid(e, labels, p.ignore)
    better = e.cast(e.node("GreaterOrEqual", scores, _picked(e, hits, scores)), "int64")
    right = e.node("LessOrEqual", e.sum(better, [1], keep=True), e.ints([p.top_k], "top_k"))
    _normalized(e, e.cast(right, "float32"), "VALID", valid)
    if p.n_tops > 1:
        counted = hits if valid is None else e.node("And", hits, valid)
        found = e.sum(e.cast(e.node("And", counted, right), "float32"), [0, 2])
        total = e.node("Max", e.sum(e.cast(counted, "float32"), [0, 2]), e.const(1.0, "one"))
        e.node("Div", found, total, to=e.outputs[1])


def _loss(
    params: Callable[[Request], object],
    infer: Callable[..., Shapes],
    onnx: Callable[..., None],
    bottoms: tuple[int, int] = (2, 2),
    tops: tuple[int, int] = (0, 1),
) -> LayerSpec:
    return LayerSpec(params=params, infer=infer, onnx=onnx, bottoms=bottoms, tops=tops, loss=True)


SPECS = {
    "SoftmaxWithLoss": _loss(_read_softmax_loss, _class_loss_infer, _softmax_loss, tops=(0, 2)),
    "InfogainLoss": _loss(_read_infogain, _class_loss_infer, _infogain, bottoms=(2, 3), tops=(0, 2)),
    "MultinomialLogisticLoss": _loss(_read_plain, _multinomial_infer, _multinomial),
    "EuclideanLoss": _loss(_read_plain, _euclidean_infer, _euclidean),
    "SigmoidCrossEntropyLoss": _loss(_read_cross_entropy, _cross_entropy_infer, _cross_entropy),
    "HingeLoss": _loss(_read_hinge, _hinge_infer, _hinge),
    "ContrastiveLoss": _loss(_read_contrastive, _contrastive_infer, _contrastive, bottoms=(3, 3)),
    "Accuracy": LayerSpec(
        params=_read_accuracy,
        infer=_accuracy_infer,
        onnx=_accuracy,
        bottoms=(2, 2),
        tops=(1, 2),
    ),
}
