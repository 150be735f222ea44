"""Layers that gather many numbers in few, or spread few over many: ArgMax, Reduction, MVN, Tile, SPP."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import NetError, ShapeError
from . import pool
from .channels import Channels, planes, same
from .emit import Emitter
from .spec import LayerSpec, Request, Shape, Shapes, at_least, canonical_axis, legacy, size, text

_TO_THE_START = -(2**63)  # ONNX Slice: as far back as there is


@dataclass(frozen=True)
class ArgMaxParams:
    """``axis`` None: over everything but the first axis. ``values``: out_max_val."""

    axis: int | None
    top_k: int
    values: bool


def _read_arg_max(request: Request) -> ArgMaxParams:
    p = request["argmax_param"]
    axis = int(p["axis"]) if "axis" in p else None
    return ArgMaxParams(axis, at_least(p["top_k"], 1, "top_k"), p["out_max_val"])


def _arg_max_infer(p: ArgMaxParams, bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    axis = canonical_axis(0 if p.axis is None else p.axis, len(shape))
    choices = size(shape[1:]) if p.axis is None else shape[axis]
    if p.top_k > choices:
        raise ShapeError(f"top_k {p.top_k} is more than the {choices} values to choose from")
    if p.axis is not None:
        return ((*shape[:axis], p.top_k, *shape[axis + 1 :]),)
    return ((shape[0], 2 if p.values else 1, p.top_k, *(1,) * (len(shape) - 3)),)


def _arg_max(e: Emitter, p: ArgMaxParams) -> None:
    """The top_k greatest, of equal ones the last first; ONNX takes the first, so it sees the axis turned."""
    source, shape = e.inputs[0], e.in_shapes[0]
    if p.axis is None:
        e.static(0, range(1, len(shape)), "ArgMax over these axes")
        values, indices = _greatest(e, p, e.node("Flatten", source, axis=1), 1, size(shape[1:]))
        chosen = e.node("Concat", indices, values, axis=1) if p.values else indices
        e.node("Reshape", chosen, e.ints((-1, *e.out_shapes[0][1:]), "shape"), to=e.outputs[0])
        return
    axis = canonical_axis(p.axis, len(shape))
    e.static(0, [axis], "ArgMax over this axis")
    values, indices = _greatest(e, p, source, axis, shape[axis])
    e.node("Identity", values if p.values else indices, to=e.outputs[0])


def _greatest(e: Emitter, p: ArgMaxParams, source: str, axis: int, length: int) -> tuple[str, str]:
    """(values, indices) of the top_k greatest along an axis."""
    bounds = e.ints([-1], "start"), e.ints([_TO_THE_START], "end")
    turned = e.node("Slice", source, *bounds, e.ints([axis], "axis"), e.ints([-1], "step"))
    values, places = e.sheet.unique(f"{e.layer}/values"), e.sheet.unique(f"{e.layer}/places")
    e.node("TopK", turned, e.ints([p.top_k], "top_k"), to=(values, places), axis=axis)
    return values, e.cast(e.node("Sub", e.ints([length - 1], "last"), places), "float32")


@dataclass(frozen=True)
class ReductionParams:
    operation: str
    axis: int
    coeff: float


def _read_reduction(request: Request) -> ReductionParams:
    p = request["reduction_param"]
    return ReductionParams(p["operation"], p["axis"], p["coeff"])


def _reduction_infer(p: ReductionParams, bottoms: Shapes) -> Shapes:
    return (bottoms[0][: canonical_axis(p.axis, len(bottoms[0]))],)


def _reduction_channels(c: Channels, p: ReductionParams) -> None:
    labels = c.bottoms[0]
    if labels is not None and labels.axis >= canonical_axis(p.axis, len(c.in_shapes[0])):
        c.stay(0, "sums over them")
    else:
        same(c, None)


def _reduction(e: Emitter, p: ReductionParams) -> None:
    """coeff * (sum x, sum |x|, sum x², mean x) over ``axis`` and all behind it."""
    x, ndim = e.inputs[0], len(e.in_shapes[0])
    axes = list(range(canonical_axis(p.axis, ndim), ndim))
    to = e.outputs[0] if p.coeff == 1 else None
    if p.operation == "SUM":
        made = e.sum(x, axes, to=to)
    else:
        op = {"ASUM": "ReduceL1", "SUMSQ": "ReduceSumSquare", "MEAN": "ReduceMean"}[p.operation]
        made = e.node(op, x, to=to, axes=axes, keepdims=0)
    if p.coeff != 1:
        e.node("Mul", made, e.const(p.coeff, "coeff"), to=e.outputs[0])


@dataclass(frozen=True)
class MvnParams:
    variance: bool
    across: bool
    eps: float


def _read_mvn(request: Request) -> MvnParams:
    p = request["mvn_param"]
    return MvnParams(p["normalize_variance"], p["across_channels"], p["eps"])


def _mvn_infer(_p: MvnParams, bottoms: Shapes) -> Shapes:
    legacy(bottoms[0])
    return (bottoms[0],)


def _mvn_channels(c: Channels, p: MvnParams) -> None:
    if p.across:
        c.stay(0, "normalizes across them")
    else:
        planes(c, p)


def _mvn(e: Emitter, p: MvnParams) -> None:
    """(x - mean) / (sqrt(var) + eps), over each channel or, across channels, over each item."""
    x, to = e.inputs[0], None if p.variance else e.outputs[0]
    axes = list(range(1 if p.across else 2, len(e.in_shapes[0])))
    mean = e.node("ReduceMean", x, axes=axes, keepdims=1) if axes else x
    centred = e.node("Sub", x, mean, to=to)
    if not p.variance:
        return
    square = e.node("Mul", centred, centred)
    variance = e.node("ReduceMean", square, axes=axes, keepdims=1) if axes else square
    divisor = e.node("Add", e.node("Sqrt", variance), e.const(p.eps, "eps"))
    e.node("Div", centred, divisor, to=e.outputs[0])


@dataclass(frozen=True)
class TileParams:
    axis: int
    tiles: int


def _read_tile(request: Request) -> TileParams:
    p = request["tile_param"]
    return TileParams(p["axis"], at_least(p["tiles"], 1, "tiles"))


def _tile_infer(p: TileParams, bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    axis = canonical_axis(p.axis, len(shape))
    return ((*shape[:axis], shape[axis] * p.tiles, *shape[axis + 1 :]),)


def _tile_channels(c: Channels, p: TileParams) -> None:
    labels = c.bottoms[0]
    if labels is None:
        return
    along = labels.axis == canonical_axis(p.axis, len(c.in_shapes[0]))
    c.top(0, labels.axis, np.tile(labels.ids, p.tiles if along else 1))


def _tile(e: Emitter, p: TileParams) -> None:
    """The blob ``tiles`` times along one axis."""
    repeats = [1] * len(e.in_shapes[0])
    repeats[p.axis] = p.tiles
    e.node("Tile", e.inputs[0], e.ints(repeats, "repeats"), to=e.outputs[0])


@dataclass(frozen=True)
class SppParams:
    height: int
    method: str


def _read_spp(request: Request) -> SppParams:
    p = request["spp_param"]
    return SppParams(at_least(p["pyramid_height"], 1, "pyramid_height"), p["pool"])


def _levels(p: SppParams, shape: Shape) -> list[tuple[pool.PoolParams, Shape]]:
    """The pooling that makes each level of the pyramid, and the shape of its result.

    Level i has 2^i bins an axis: windows of ceil(size / bins), the missing pixels padded half on either side.
    """
    if len(shape) != 4:
        raise ShapeError(f"SPP needs a bottom of 4 axes, found {text(shape)}")
    if 0 in shape[2:]:
        raise ShapeError(f"SPP needs an image, the bottom {text(shape)} has none")
    levels = []
    for bins in (2**level for level in range(p.height)):
        kernel = (-(-shape[2] // bins), -(-shape[3] // bins))
        pad = ((kernel[0] * bins - shape[2] + 1) // 2, (kernel[1] * bins - shape[3] + 1) // 2)
        if any(one >= k for one, k in zip(pad, kernel, strict=True) if one):
            raise ShapeError(f"{bins} bins need a pad {text(pad)}, no smaller than the window {text(kernel)}")
        if any(pad) and p.method == "STOCHASTIC":
            raise NetError("stochastic pooling takes no pad")
        one = pool.PoolParams(p.method, kernel, kernel, pad, ceil=True, mask=False)
        (made,) = pool.SPECS["Pooling"].infer(one, (shape,))
        levels.append((one, made))
    return levels


def _spp_infer(p: SppParams, bottoms: Shapes) -> Shapes:
    levels = [made for _, made in _levels(p, bottoms[0])]
    if len(levels) == 1:
        return (levels[0],)
    return ((bottoms[0][0], sum(size(made[1:]) for made in levels)),)


def _spp_channels(c: Channels, p: SppParams) -> None:
    """Each level is flattened, channel by channel; a single level is not."""
    ids = c.places(0, 1)
    places = [size(made[2:]) for _, made in _levels(p, c.in_shapes[0])]
    flat = [np.repeat(ids, n) for n in places] if len(places) > 1 else [ids]
    c.top(0, 1, np.concatenate(flat))


def _spp(e: Emitter, p: SppParams) -> None:
    """Every level pooled, flattened, one behind the other; a single level is not flattened."""
    e.static(0, (1, 2, 3), "SPP")
    pooling = pool.SPECS["Pooling"].onnx
    assert pooling is not None
    flat = []
    for level, made in _levels(p, e.in_shapes[0]):
        to = e.outputs[0] if p.height == 1 else e.sheet.unique(f"{e.layer}/pool")
        varies = (e.dynamic_in[0][0], False, False, False)
        pooling(replace(e, outputs=(to,), out_shapes=(made,), dynamic_out=(varies,)), level)
        flat.append(to)
    if p.height > 1:
        e.node("Concat", *(e.node("Flatten", name, axis=1) for name in flat), to=e.outputs[0], axis=1)


SPECS = {
    "ArgMax": LayerSpec(params=_read_arg_max, infer=_arg_max_infer, onnx=_arg_max),
    "Reduction": LayerSpec(
        params=_read_reduction, infer=_reduction_infer, onnx=_reduction, channels=_reduction_channels
    ),
    "MVN": LayerSpec(params=_read_mvn, infer=_mvn_infer, onnx=_mvn, channels=_mvn_channels),
    "Tile": LayerSpec(params=_read_tile, infer=_tile_infer, onnx=_tile, channels=_tile_channels),
    "SPP": LayerSpec(params=_read_spp, infer=_spp_infer, onnx=_spp, channels=_spp_channels),
}
