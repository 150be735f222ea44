"""Layers that find or cut out regions: SSD's DetectionOutput, Fast R-CNN's ROIPooling."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import NetError, ShapeError, UnsupportedError
from .channels import Channels, planes
from .emit import Emitter
from .spec import LayerSpec, Request, Shapes, at_least, fork_fields, size, text

_ROW = 7  # image, label, score, xmin, ymin, xmax, ymax
_NOTHING = float("-inf")  # the score of a box that is not kept


@dataclass(frozen=True)
class DetectionParams:
    """``top_k`` and ``keep`` are None where nothing is left out; ``labels`` are the classes but the background."""

    classes: int
    shared: bool
    labels: tuple[int, ...]
    code: str
    variance_in_target: bool
    overlap: float
    threshold: float | None
    top_k: int | None
    keep: int | None


def _read_detection(request: Request) -> DetectionParams:
    p = request["detection_output_param"]
    nms = p["nms_param"]
    if "num_classes" not in p:
        raise NetError("detection_output_param needs num_classes", line=p.line())
    overlap, eta = nms["nms_threshold"], nms["eta"]
    if overlap < 0:
        raise NetError(f"nms_threshold is {overlap}, it must not be negative", line=nms.line("nms_threshold"))
    if not 0 < eta <= 1:
        raise NetError(f"eta is {eta}, it must lie above 0 and not above 1", line=nms.line("eta"))
    if eta < 1 and overlap > 0.5:
        raise UnsupportedError("eta below 1, an overlap that falls with each box kept, has no ONNX form")
    top_k = nms["top_k"] if "top_k" in nms and nms["top_k"] > -1 else None
    keep = p["keep_top_k"] if p["keep_top_k"] > -1 else None
    if 0 in (top_k, keep):
        raise UnsupportedError("top_k or keep_top_k is 0: no box would be kept")
    classes = at_least(p["num_classes"], 1, "num_classes")
    background = p["background_label_id"]
    return DetectionParams(
        classes,
        p["share_location"],
        tuple(label for label in range(classes) if label != background),
        p["code_type"],
        p["variance_encoded_in_target"],
        overlap,
        float(p["confidence_threshold"]) if "confidence_threshold" in p else None,
        top_k,
        keep,
    )


def _detection_infer(p: DetectionParams, bottoms: Shapes) -> Shapes:
    """One row, as the layer itself assumes until it has run: how many there are is known at run time only."""
    places, scores, priors = bottoms
    if len(priors) < 3 or priors[1] != 2 or priors[2] % 4 or size(priors) != 2 * priors[2]:
        raise ShapeError(f"the priors have the shape {text(priors)}, not 1 x 2 x 4n")
    n = priors[2] // 4
    for what, shape, numbers in (
        ("locations", places, n * 4 * (1 if p.shared else p.classes)),
        ("confidences", scores, n * p.classes),
    ):
        if len(shape) < 2 or shape[1] != numbers or size(shape[2:]) != 1:
            raise ShapeError(f"{n} priors need {numbers} {what} an image, the bottom is {text(shape)}")
    if places[0] != scores[0]:
        raise ShapeError(f"bottoms {text(places)} and {text(scores)} differ in their first axis")
    return ((1, 1, 1, _ROW),)


def _detection(e: Emitter, p: DetectionParams) -> None:
    """Decode, keep the best of each class, suppress what overlaps, keep the best of each image; rows by class.

    All is done on (image, class, rank): the rank of a box among the scores of its class.
    """
    n, labels = e.in_shapes[2][2] // 4, len(p.labels)
    k = n if p.top_k is None else min(p.top_k, n)
    scores, ranked = _best_scores(e, p, n, k)
    boxes = _best_boxes(e, p, n, k, ranked)
    kept = _suppress(e, p, boxes, scores, k)
    kept = e.node("Reshape", kept, e.ints([-1, labels * k], "flat"))
    if p.keep is not None and p.keep < labels * k:
        kept = _best_of_image(e, kept, p.keep)
    _rows(e, p, kept, boxes, k)


def _best_scores(e: Emitter, p: DetectionParams, n: int, k: int) -> tuple[str, str]:
    """(image, class, rank): the k best scores of each class but the background, and which priors have them."""
    by_prior = e.node("Reshape", e.inputs[1], e.ints([-1, n, p.classes], "scores"))
    by_class = e.node("Transpose", by_prior, perm=[0, 2, 1])
    chosen = e.node("Gather", by_class, e.ints(p.labels, "labels"), axis=1)
    values, ranked = e.sheet.unique(f"{e.layer}/scores"), e.sheet.unique(f"{e.layer}/ranked")
    e.node("TopK", chosen, e.ints([k], "top_k"), to=(values, ranked), axis=2)
    return values, ranked


def _best_boxes(e: Emitter, p: DetectionParams, n: int, k: int, ranked: str) -> str:
    """(image, class, rank, 4): the corners of the boxes with the best scores."""
    by_prior = e.node("Reshape", e.inputs[0], e.ints([-1, n, 1 if p.shared else p.classes, 4], "locations"))
    decoded = _decode(e, p, e.node("Transpose", by_prior, perm=[0, 2, 1, 3]), n)
    if p.shared:
        all_ = e.node("Tile", decoded, e.ints([1, len(p.labels), 1, 1], "repeats"))
    else:
        all_ = e.node("Gather", decoded, e.ints(p.labels, "labels"), axis=1)
    places = e.node("Unsqueeze", ranked, e.ints([3], "axis"))
    return e.node("GatherElements", all_, e.node("Tile", places, e.ints([1, 1, 1, 4], "corners")), axis=2)


def _decode(e: Emitter, p: DetectionParams, places: str, n: int) -> str:
    """The corners that a box's four numbers stand for, beside its prior."""
    priors = e.node("Reshape", e.inputs[2], e.ints([2, n, 4], "priors"))
    prior = e.node("Gather", priors, e.const(0, "first", "int64"), axis=0)
    if not p.variance_in_target:
        places = e.node("Mul", places, e.node("Gather", priors, e.const(1, "second", "int64"), axis=0))
    if p.code == "CORNER":
        return e.node("Add", prior, places)
    low, high = _halves(e, prior, 1)
    extent = e.node("Sub", high, low)
    if p.code == "CORNER_SIZE":
        both = e.node("Concat", extent, extent, axis=1)
        return e.node("Add", prior, e.node("Mul", places, both))
    two = e.const(2.0, "two")
    centre = e.node("Div", e.node("Add", low, high), two)
    shift, growth = _halves(e, places, 3)
    moved = e.node("Add", e.node("Mul", shift, extent), centre)
    half = e.node("Div", e.node("Mul", e.node("Exp", growth), extent), two)
    return e.node("Concat", e.node("Sub", moved, half), e.node("Add", moved, half), axis=3)


def _halves(e: Emitter, source: str, axis: int) -> tuple[str, str]:
    """The first and the last two numbers of an axis of four."""
    names = e.sheet.unique(f"{e.layer}/low"), e.sheet.unique(f"{e.layer}/high")
    e.node("Split", source, e.ints([2, 2], "parts"), to=names, axis=axis)
    return names


def _columns(e: Emitter, table: str, count: int) -> tuple[str, ...]:
    """The columns of a table, each as one row."""
    row = e.ints([-1], "row")
    return tuple(e.node("Reshape", column, row) for column in e.split(table, 1, count))


def _suppress(e: Emitter, p: DetectionParams, boxes: str, scores: str, k: int) -> str:
    """All scores in one row, minus infinity where a better box of the class overlaps or the score is too low.

    A box whose ends are swapped overlaps none in SSD; ONNX would swap them back, so it is made empty.
    """
    low, high = _halves(e, boxes, 3)
    upright = e.node("Concat", low, e.node("Max", low, high), axis=3)
    limits = [e.ints([k], "most"), e.const([min(p.overlap, 1.0)], "overlap")]
    if p.threshold is not None:
        limits.append(e.const([p.threshold], "threshold"))
    found = e.node(
        "NonMaxSuppression",
        e.node("Reshape", upright, e.ints([-1, k, 4], "boxes")),
        e.node("Reshape", scores, e.ints([-1, 1, k], "one_class")),
        *limits,
    )
    row, _, rank = _columns(e, found, 3)
    place = e.node("Add", e.node("Mul", row, e.ints([k], "ranks")), rank)
    flat = e.node("Reshape", scores, e.ints([-1], "all"))
    return _only(e, flat, place, e.node("Gather", flat, place, axis=0), 0)


def _only(e: Emitter, like: str, places: str, values: str, axis: int) -> str:
    """Values at their places, minus infinity everywhere else."""
    nothing = e.node("Expand", e.const(_NOTHING, "nothing"), e.node("Shape", like))
    return e.node("ScatterElements", nothing, places, values, axis=axis)


def _best_of_image(e: Emitter, kept: str, count: int) -> str:
    values, places = e.sheet.unique(f"{e.layer}/best"), e.sheet.unique(f"{e.layer}/places")
    e.node("TopK", kept, e.ints([count], "keep_top_k"), to=(values, places), axis=1)
    return _only(e, kept, places, values, 1)


def _rows(e: Emitter, p: DetectionParams, kept: str, boxes: str, k: int) -> None:
    """(1, 1, rows, 7); where nothing is kept at all, one row of -1 an image with its number in front."""
    where = e.node("NonZero", e.node("Greater", kept, e.const(_NOTHING, "nothing")))
    place = e.node("Transpose", where, perm=[1, 0])
    image, flat = _columns(e, place, 2)
    label = e.node("Gather", e.const(p.labels, "labels"), e.node("Div", flat, e.ints([k], "ranks")), axis=0)
    corners = e.node("Reshape", boxes, e.ints([-1, len(p.labels) * k, 4], "corners"))
    columns = (e.cast(image, "float32"), label, e.node("GatherND", kept, place))
    axis = e.ints([1], "axis")
    numbers = [e.node("Unsqueeze", column, axis) for column in columns]
    found = e.node("Concat", *numbers, e.node("GatherND", corners, place), axis=1)
    rows = e.node("Concat", found, _empty_rows(e, image), axis=0)
    e.node("Unsqueeze", rows, e.ints([0, 1], "front"), to=e.outputs[0])


def _empty_rows(e: Emitter, found: str) -> str:
    """One row an image where ``found`` is empty, else none."""
    images = e.node("Gather", e.node("Shape", e.inputs[0]), e.const(0, "first", "int64"), axis=0)
    numbers = e.node("Range", e.const(0, "from", "int64"), images, e.const(1, "by", "int64"))
    column = e.node("Unsqueeze", e.cast(numbers, "float32"), e.ints([1], "axis"))
    rows = e.node("Pad", column, e.ints([0, 0, 0, _ROW - 1], "pads"), e.const(-1.0, "minus_one"))
    none = e.cast(e.node("Equal", e.node("Shape", found), e.ints([0], "zero")), "int64")
    return e.node("Slice", rows, e.ints([0], "start"), e.node("Mul", none, images), e.ints([0], "rows"))


@dataclass(frozen=True)
class RoiParams:
    pooled: tuple[int, int]
    scale: float


def _read_roi(request: Request) -> RoiParams:
    p = request["roi_pooling_param"]
    if p["pad_ratio"]:
        raise UnsupportedError("pad_ratio, regions that grow, is not interpreted", line=p.line("pad_ratio"))
    pooled = tuple(at_least(p[name], 1, name) for name in ("pooled_h", "pooled_w"))
    return RoiParams((pooled[0], pooled[1]), p["spatial_scale"])


def _roi_infer(p: RoiParams, bottoms: Shapes) -> Shapes:
    image, regions = bottoms
    if len(image) != 4:
        raise ShapeError(f"ROIPooling needs a bottom of 4 axes, found {text(image)}")
    if not regions or size(regions[1:]) != 5:
        raise ShapeError(f"each region is five numbers (image, x1, y1, x2, y2), found {text(regions)}")
    return ((regions[0], image[1], *p.pooled),)


def _roi(e: Emitter, p: RoiParams) -> None:
    """The greatest number of each of pooled_h x pooled_w cells of each region; 0 in an empty cell."""
    regions = e.inputs[1]
    if len(e.in_shapes[1]) != 2:
        regions = e.node("Reshape", regions, e.ints([-1, 5], "regions"))
    e.node("MaxRoiPool", e.inputs[0], regions, to=e.outputs[0], pooled_shape=p.pooled, spatial_scale=p.scale)


def _roi_channels(c: Channels, p: RoiParams) -> None:
    c.stay(1, "reads boxes from them")
    planes(c, p)


SPECS = {
    "DetectionOutput": LayerSpec(
        params=_read_detection,
        infer=_detection_infer,
        onnx=_detection,
        bottoms=(3, 3),
        understood=fork_fields("detection_output_param"),
        open_axes=(2,),
    ),
    "ROIPooling": LayerSpec(
        params=_read_roi,
        infer=_roi_infer,
        onnx=_roi,
        bottoms=(2, 2),
        channels=_roi_channels,
        understood=fork_fields("roi_pooling_param"),
    ),
}
