"""Layers that move numbers without changing them: Concat, Slice, Split, Flatten, Reshape, Crop; and Eltwise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import NetError, ShapeError
from ..typed import Typed
from .channels import Channels, Ids, same, tied
from .emit import Emitter
from .spec import LayerSpec, Request, Shapes, at_least, canonical_axis, size, text


def _axis_or_dim(p: Typed, dim: str) -> int:
    """``axis``, or the older ``concat_dim`` or ``slice_dim``, which may not be negative."""
    if dim not in p:
        return int(p["axis"])
    if "axis" in p:
        raise NetError(f"axis and {dim} are both given; Caffe takes one", line=p.line(dim))
    return at_least(p[dim], 0, dim)


def _concat_infer(axis: int, bottoms: Shapes) -> Shapes:
    first = bottoms[0]
    at = canonical_axis(axis, len(first))
    for other in bottoms[1:]:
        if len(other) != len(first) or any(
            a != b for i, (a, b) in enumerate(zip(first, other, strict=True)) if i != at
        ):
            raise ShapeError(f"bottoms {text(first)} and {text(other)} differ in more than axis {at}")
    return ((*first[:at], sum(bottom[at] for bottom in bottoms), *first[at + 1 :]),)


def _concat(e: Emitter, axis: int) -> None:
    if len(e.inputs) == 1:
        e.node("Identity", e.inputs[0], to=e.outputs[0])
    else:
        e.node("Concat", *e.inputs, to=e.outputs[0], axis=canonical_axis(axis, len(e.in_shapes[0])))


def _concat_channels(c: Channels, axis: int) -> None:
    """Along its own axis channels follow one another; along another one the bottoms' are joined."""
    at = canonical_axis(axis, len(c.in_shapes[0]))
    if {labels.axis for labels in c.bottoms if labels is not None} == {at}:
        c.top(0, at, np.concatenate([c.places(i, at) for i in range(len(c.bottoms))]))
    else:
        tied(c, None)


@dataclass(frozen=True)
class SliceParams:
    axis: int
    points: tuple[int, ...]
    n_tops: int


def _read_slice(request: Request) -> SliceParams:
    p = request["slice_param"]
    points = p["slice_point"]
    if points and len(points) != request.n_tops - 1:
        raise NetError(
            f"{len(points)} slice_point values for {request.n_tops} tops; one fewer than tops is needed"
        )
    if any(low >= high for low, high in zip((0, *points), points, strict=False)):
        raise NetError(f"slice_point values {points} do not rise")
    return SliceParams(_axis_or_dim(p, "slice_dim"), points, request.n_tops)


def _slice_infer(p: SliceParams, bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    at = canonical_axis(p.axis, len(shape))
    total = shape[at]
    if not p.points and total % p.n_tops:
        raise ShapeError(
            f"{p.n_tops} tops do not divide the {total} of axis {at} evenly", hint="add slice_point"
        )
    if p.points and p.points[-1] >= total:
        raise ShapeError(f"slice_point {p.points[-1]} lies behind the {total} of axis {at}")
    if p.points:
        parts = [high - low for low, high in pairwise((0, *p.points, total))]
    else:
        parts = [total // p.n_tops] * p.n_tops
    return tuple((*shape[:at], part, *shape[at + 1 :]) for part in parts)


def _slice(e: Emitter, p: SliceParams) -> None:
    if len(e.outputs) == 1:
        e.node("Identity", e.inputs[0], to=e.outputs[0])
        return
    at = canonical_axis(p.axis, len(e.in_shapes[0]))
    e.static(0, [at], "slicing")
    e.node(
        "Split", e.inputs[0], e.ints([shape[at] for shape in e.out_shapes], "parts"), to=e.outputs, axis=at
    )


def _slice_channels(c: Channels, p: SliceParams) -> None:
    labels = c.bottoms[0]
    if labels is None:
        return
    if labels.axis != canonical_axis(p.axis, len(c.in_shapes[0])) or p.n_tops == 1:
        same(c, None)
        return
    ends = np.cumsum([shape[labels.axis] for shape in c.out_shapes])
    for i, part in enumerate(np.split(labels.ids, ends[:-1])):
        c.never_empty(part)
        c.top(i, labels.axis, part)
    points = tuple(labels.ids[:end] for end in ends[:-1])
    c.setting(("slice_param",), "slice_point", *points, add=True)


def _split(e: Emitter, _n: int) -> None:
    for to in e.outputs:
        e.node("Identity", e.inputs[0], to=to)


@dataclass(frozen=True)
class FlattenParams:
    axis: int
    end_axis: int


def _flatten_infer(p: FlattenParams, bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    start, end = canonical_axis(p.axis, len(shape)), canonical_axis(p.end_axis, len(shape))
    if end < start - 1:
        raise ShapeError(f"end_axis {end} lies before axis {start}")
    return ((*shape[:start], size(shape[start : end + 1]), *shape[end + 1 :]),)


def _to_out_shape(e: Emitter, _params: Any) -> None:
    e.reshape(e.inputs[0], 0, e.out_shapes[0], e.dynamic_out[0], to=e.outputs[0])


def _folded(c: Channels, _params: Any) -> None:
    labels = c.refolded(0, c.out_shapes[0])
    if labels is not None:
        c.top(0, labels.axis, labels.ids)


@dataclass(frozen=True)
class ReshapeParams:
    dims: tuple[int, ...]
    axis: int
    num_axes: int


def _read_reshape(request: Request) -> ReshapeParams:
    p = request["reshape_param"]
    if request.layer.bottoms == request.layer.tops:
        raise NetError("Reshape does not work in place; give its top another name")
    dims = p["shape"]["dim"]
    if len(dims) > _MOST_AXES:
        raise NetError(
            f"shape has {len(dims):,} dims, Caffe takes at most {_MOST_AXES}", line=p.line("shape")
        )
    if dims.count(-1) > 1 or any(dim < -1 for dim in dims):
        raise NetError(f"shape {dims} may hold -1 once, and nothing below", line=p.line("shape"))
    return ReshapeParams(dims, p["axis"], at_least(p["num_axes"], -1, "num_axes"))


def _reshape_infer(p: ReshapeParams, bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    start = canonical_axis(p.axis, len(shape), inclusive=True)
    end = len(shape) if p.num_axes == -1 else start + p.num_axes
    if end > len(shape):
        raise ShapeError(f"num_axes {p.num_axes} from axis {start} are more than {text(shape)} has")
    made: list[int] = []
    for i, dim in enumerate(p.dims):
        if dim == 0 and start + i >= len(shape):
            raise ShapeError(f"dim 0 copies axis {start + i}, which {text(shape)} does not have")
        made.append(shape[start + i] if dim == 0 else dim)
    total = size(shape[start:end])
    known = size([dim for dim in made if dim != -1])
    if -1 in made:
        if known == 0 or total % known:
            raise ShapeError(f"{total} numbers cannot be divided into rows of {known}")
        made[made.index(-1)] = total // known
    elif known != total:
        raise ShapeError(
            f"{text(shape)} holds {size(shape)} numbers, the new shape {text((*shape[:start], *made, *shape[end:]))} another count"
        )
    return ((*shape[:start], *made, *shape[end:]),)


def _reshape_channels(c: Channels, p: ReshapeParams) -> None:
    """As Flatten; a dim that says how many there are behind is one of the settings."""
    labels = c.refolded(0, c.out_shapes[0])
    if labels is None:
        return
    start = canonical_axis(p.axis, len(c.in_shapes[0]), inclusive=True)
    at = labels.axis - start
    if 0 <= at < len(p.dims) and p.dims[at] > 0:
        values: list[Ids | int] = [*p.dims]
        values[at] = labels.ids
        c.setting(("reshape_param", "shape"), "dim", *values)
    c.top(0, labels.axis, labels.ids)


@dataclass(frozen=True)
class CropParams:
    axis: int
    offsets: tuple[int, ...]


def _crop_starts(p: CropParams, bottoms: Shapes) -> tuple[int, tuple[int, ...]]:
    whole, wanted = bottoms
    axis = canonical_axis(p.axis, len(whole))
    n = len(whole) - axis
    if len(wanted) != len(whole):
        raise ShapeError(f"bottoms {text(whole)} and {text(wanted)} differ in their number of axes")
    if len(p.offsets) not in (0, 1, n):
        raise NetError(f"{len(p.offsets)} offsets for {n} cropped axes; none, one or {n} are taken")
    starts = p.offsets * n if len(p.offsets) == 1 else p.offsets or (0,) * n
    for i, start in enumerate(starts, axis):
        if start + wanted[i] > whole[i]:
            raise ShapeError(f"axis {i}: {wanted[i]} from offset {start} on do not lie within {whole[i]}")
    return axis, tuple(starts)


def _crop_infer(p: CropParams, bottoms: Shapes) -> Shapes:
    axis, _ = _crop_starts(p, bottoms)
    return ((*bottoms[0][:axis], *bottoms[1][axis:]),)


def _crop_channels(c: Channels, p: CropParams) -> None:
    """Channels that are cropped too must be those of the blob that says how many."""
    axis, starts = _crop_starts(p, c.in_shapes)
    axes = {labels.axis for labels in c.bottoms if labels is not None and labels.axis >= axis}
    if not axes:
        same(c, None)
    elif len(axes) > 1 or any(starts[at - axis] or c.in_shapes[0][at] != c.in_shapes[1][at] for at in axes):
        c.stay_all("crops them")
    else:
        (at,) = axes
        c.tie(c.places(0, at), c.places(1, at))
        c.top(0, at, c.places(0, at))


def _crop(e: Emitter, p: CropParams) -> None:
    axis, starts = _crop_starts(p, e.in_shapes)
    axes = list(range(axis, axis + len(starts)))
    begin = e.ints(starts, "offsets")
    if any(e.dynamic_in[1][i] for i in axes):
        sizes = e.node("Gather", e.node("Shape", e.inputs[1]), e.ints(axes, "cropped"), axis=0)
        end = e.node("Add", sizes, begin)
    else:
        end = e.ints([start + e.in_shapes[1][i] for start, i in zip(starts, axes, strict=True)], "ends")
    e.node("Slice", e.inputs[0], begin, end, e.ints(axes, "axes"), to=e.outputs[0])


@dataclass(frozen=True)
class EltwiseParams:
    """One coeff a bottom, or none. ``in_place``: Caffe clears the top before it reads, so bottom 0 is lost."""

    operation: str
    coeff: tuple[float, ...]
    in_place: bool


def _read_eltwise(request: Request) -> EltwiseParams:
    p = request["eltwise_param"]
    coeff, operation = p["coeff"], p["operation"]
    if coeff and len(coeff) != request.n_bottoms:
        raise NetError(
            f"{len(coeff)} coeff for {request.n_bottoms} bottoms; one each is needed", line=p.line("coeff")
        )
    if coeff and operation == "PROD":
        raise NetError("a product takes no coeff", line=p.line("coeff"))
    in_place = request.layer.tops[0] == request.layer.bottoms[0]
    return EltwiseParams(operation, coeff, in_place and operation != "PROD")


def _eltwise_infer(_p: EltwiseParams, bottoms: Shapes) -> Shapes:
    for other in bottoms[1:]:
        if other != bottoms[0]:
            raise ShapeError(f"bottoms {text(bottoms[0])} and {text(other)} differ in shape")
    return (bottoms[0],)


def _eltwise(e: Emitter, p: EltwiseParams) -> None:
    """PROD; SUM with one coeff a bottom; MAX, for which Caffe reads coeff and ignores it."""
    names = list(e.inputs)
    if p.operation == "SUM":
        for i, coeff in enumerate(p.coeff):
            if coeff != 1:
                names[i] = e.node("Mul", names[i], e.const(coeff, "coeff"))
    names = names[1:] if p.in_place else names
    if len(names) == 1:
        e.node("Identity", names[0], to=e.outputs[0])
    elif p.operation == "MAX":
        e.node("Max", *names, to=e.outputs[0])
    else:
        op = "Mul" if p.operation == "PROD" else "Add"
        total = reduce(lambda a, b: e.node(op, a, b), names[:-1])
        e.node(op, total, names[-1], to=e.outputs[0])


def _view_infer(_params: None, bottoms: Shapes) -> Shapes:
    return (bottoms[1],)


def _view(e: Emitter, _params: None) -> None:
    """The numbers of the first bottom in the shape of the second: memory that an in-place layer rewrote."""
    e.reshape(e.inputs[0], 0, e.out_shapes[0], e.dynamic_out[0], to=e.outputs[0])


def _split_infer(n_tops: int, bottoms: Shapes) -> Shapes:
    return (bottoms[0],) * n_tops


_MOST_AXES = 32  # of one of Caffe's blobs
VIEW = "(view)"  # a node the graph adds where memory is shared; no prototxt can name it

SPECS = {
    "Concat": LayerSpec(
        params=lambda r: _axis_or_dim(r["concat_param"], "concat_dim"),
        infer=_concat_infer,
        onnx=_concat,
        bottoms=(1, None),
        channels=_concat_channels,
    ),
    "Slice": LayerSpec(
        params=_read_slice, infer=_slice_infer, onnx=_slice, tops=(1, None), channels=_slice_channels
    ),
    "Split": LayerSpec(
        params=lambda r: r.n_tops,
        infer=_split_infer,
        onnx=_split,
        tops=(1, None),
        channels=same,
        aliases=True,
    ),
    "Flatten": LayerSpec(
        params=lambda r: FlattenParams(r["flatten_param"]["axis"], r["flatten_param"]["end_axis"]),
        infer=_flatten_infer,
        onnx=_to_out_shape,
        channels=_folded,
        aliases=True,
    ),
    "Reshape": LayerSpec(
        params=_read_reshape,
        infer=_reshape_infer,
        onnx=_to_out_shape,
        channels=_reshape_channels,
        aliases=True,
    ),
    "Crop": LayerSpec(
        params=lambda r: CropParams(r["crop_param"]["axis"], r["crop_param"]["offset"]),
        infer=_crop_infer,
        onnx=_crop,
        bottoms=(2, 2),
        channels=_crop_channels,
    ),
    "Eltwise": LayerSpec(
        params=_read_eltwise, infer=_eltwise_infer, onnx=_eltwise, bottoms=(2, None), channels=tied
    ),
    VIEW: LayerSpec(infer=_view_infer, onnx=_view, bottoms=(2, 2), channels=_folded),
}
