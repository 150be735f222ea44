"""Forks' layers that treat each channel, or each number, alone: BN, Axpy, ShuffleChannel, ReLU6, thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import NetError, ShapeError, UnsupportedError
from .channels import Channels
from .channels import same as same_channels
from .emit import Emitter
from .pointwise import slopes
from .spec import (
    Affine,
    Arrays,
    LayerSpec,
    Request,
    Shapes,
    at_least,
    fork_fields,
    same,
    size,
    text,
)

_SEGNET_EPS = 1e-9
_VARIANCE = 3  # the blob that holds it


@dataclass(frozen=True)
class BnParams:
    """``batch``: the statistics are those of the batch. ``stored`` are the blobs' number and number of axes.

    SegNet stores slope and shift, into which its tools fold the statistics; the others mean and variance too.
    """

    eps: float
    batch: bool
    stored: tuple[int, int]


_BN_FIELDS = {
    "SegNet": ("bn_mode", "scale_filler", "shift_filler"),
    "PSPNet": ("moving_average", "decay", "var_eps", "scale_filler", "shift_filler"),
    "TSN": ("frozen", "slope_filler", "bias_filler", "momentum", "eps", "engine"),
}


def _read_bn(request: Request) -> BnParams:
    """Tell by its fields which of three layers called BN this is: of SegNet, PSPNet, or TSN and its kin."""
    p = request["bn_param"]
    kind = next((name for name, fields in _BN_FIELDS.items() if p and set(p) <= set(fields)), None)
    if kind == "SegNet":
        return BnParams(_SEGNET_EPS, p["bn_mode"] == "LEARN", (2, 4))
    if kind == "PSPNet":
        return BnParams(p["var_eps"], not p["moving_average"] or request.phase == "TRAIN", (4, 4))
    if kind == "TSN":
        return BnParams(p["eps"], not p["frozen"] and request.phase == "TRAIN", (4, 2))
    raise UnsupportedError(
        f"cannot tell which layer BN is meant: bn_param holds {', '.join(p) or 'nothing'}",
        line=p.line(),
        hint="; ".join(f"{name}'s has {', '.join(fields)}" for name, fields in _BN_FIELDS.items()),
    )


def _bn_infer(_p: BnParams, bottoms: Shapes) -> Shapes:
    if len(bottoms[0]) != 4:
        raise ShapeError(f"BN needs a bottom of 4 axes, found {text(bottoms[0])}")
    return (bottoms[0],)


def _bn_blobs(p: BnParams, bottoms: Shapes) -> Shapes:
    count, axes = p.stored
    return ((1, bottoms[0][1], 1, 1)[:axes],) * count


def _bn_affine(p: BnParams, blobs: Arrays, _bottoms: Shapes) -> Affine | None:
    """slope * (x - mean) / sqrt(variance + eps) + shift, or slope * x + shift where the two are folded in."""
    if p.batch:
        return None
    slope, shift, *statistics = (blob.reshape(-1).astype(np.float64) for blob in blobs)
    if not statistics:
        return slope, shift
    mean, variance = statistics
    scale = slope / np.sqrt(variance + p.eps)
    return scale, shift - mean * scale


def _bn_channels(c: Channels, p: BnParams) -> None:
    ids = c.places(0, 1)
    for blob in range(p.stored[0]):
        c.cut(blob, 1, ids, zero=blob != _VARIANCE)
    c.top(0, 1, ids)


def _bn(e: Emitter, p: BnParams) -> None:
    affine = _bn_affine(p, e.blobs, e.in_shapes)
    column = (-1, 1, 1)
    if affine is not None:
        scale, shift = affine
        scaled = e.node("Mul", e.inputs[0], e.const(scale.reshape(column), "scale"))
        e.node("Add", scaled, e.const(shift.reshape(column), "shift"), to=e.outputs[0])
        return
    centred = e.node("Sub", e.inputs[0], e.node("ReduceMean", e.inputs[0], axes=[0, 2, 3], keepdims=1))
    variance = e.node("ReduceMean", e.node("Mul", centred, centred), axes=[0, 2, 3], keepdims=1)
    root = e.node("Sqrt", e.node("Add", variance, e.const(p.eps, "eps")))
    normal = e.node("Div", centred, root)
    e.node("Add", e.node("Mul", normal, e.blob(0, column)), e.blob(1, column), to=e.outputs[0])


def _axpy_infer(_params: None, bottoms: Shapes) -> Shapes:
    scale, x, y = bottoms
    if x != y:
        raise ShapeError(f"bottoms {text(x)} and {text(y)} differ in shape")
    if len(x) < 2 or scale[:2] != x[:2] or size(scale[2:]) != 1:
        raise ShapeError(f"{text(scale)} is not one number for each channel of {text(x)}")
    return (x,)


def _axpy_channels(c: Channels, _params: None) -> None:
    c.top(0, 1, c.joint(*(c.places(i, 1) for i in range(3))))


def _axpy(e: Emitter, _params: None) -> None:
    """a*x + y, one a for each channel of each item."""
    scale, ndim, have = e.inputs[0], len(e.in_shapes[1]), len(e.in_shapes[0])
    if have < ndim:
        scale = e.node("Unsqueeze", scale, e.ints(range(have, ndim), "axes"))
    elif have > ndim:
        scale = e.node("Squeeze", scale, e.ints(range(ndim, have), "axes"))
    e.node("Add", e.node("Mul", scale, e.inputs[1]), e.inputs[2], to=e.outputs[0])


def _shuffle_infer(group: int, bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    if len(shape) != 4 or shape[1] % group:
        raise ShapeError(f"{text(shape)} has no channels that {group} groups divide")
    return (shape,)


def _shuffle_channels(c: Channels, group: int) -> None:
    """What stands at one place of every group goes together: then the rest is shuffled as before."""
    rows = c.places(0, 1).reshape(group, -1)
    c.tie(*rows)
    c.top(0, 1, rows.T.ravel())


def _shuffle(e: Emitter, group: int) -> None:
    """The channels as a table of one row a group, read by columns."""
    channels = e.in_shapes[0][1]
    order = np.arange(channels).reshape(group, -1).T.ravel()
    e.node("Gather", e.inputs[0], e.ints(order.tolist(), "order"), to=e.outputs[0], axis=1)


def _read_relu6(request: Request) -> float:
    p = request["relu6_param"]
    if p["negative_slope"]:
        raise UnsupportedError("negative_slope of ReLU6 is not interpreted", line=p.line("negative_slope"))
    return float(p["threshold"])


def _relu6(e: Emitter, highest: float) -> None:
    """min(max(x, 0), 6)."""
    e.node("Clip", e.inputs[0], e.const(0.0, "min"), e.const(highest, "max"), to=e.outputs[0])


def _read_sparsify(request: Request) -> float:
    p = request["sparsify_param"]
    for name in ("thre", "coef"):
        if p[name] < 0:
            raise NetError(f"{name} is {p[name]}, it must not be negative", line=p.line(name))
    return float(p["thre"])


def _sparsify(e: Emitter, threshold: float) -> None:
    """x drawn towards 0 by the threshold, 0 where it lies within."""
    if threshold:
        e.node("Shrink", e.inputs[0], to=e.outputs[0], lambd=threshold, bias=threshold)
    else:
        e.node("Identity", e.inputs[0], to=e.outputs[0])


def _rectify_blobs(shared: bool, bottoms: Shapes) -> Shapes:
    if len(bottoms[0]) < 2:
        raise ShapeError(f"SymmetricRectify needs a bottom of at least 2 axes, found {text(bottoms[0])}")
    return ((),) if shared else ((bottoms[0][1],),)


def _rectify(e: Emitter, _shared: bool) -> None:
    """max(x - t, 0) - max(-x - t, 0), t learnt and never below 0."""
    shape = (-1, *(1,) * (len(e.in_shapes[0]) - 2)) if e.blobs[0].ndim else ()
    threshold = e.const(np.maximum(e.blobs[0], 0).reshape(shape), "0")
    above = e.node("Relu", e.node("Sub", e.inputs[0], threshold))
    below = e.node("Relu", e.node("Sub", e.node("Neg", e.inputs[0]), threshold))
    e.node("Sub", above, below, to=e.outputs[0])


SPECS = {
    "BN": LayerSpec(
        params=_read_bn,
        infer=_bn_infer,
        blobs=_bn_blobs,
        onnx=_bn,
        affine=_bn_affine,
        channels=_bn_channels,
        understood=fork_fields("bn_param"),
    ),
    "Axpy": LayerSpec(
        infer=_axpy_infer,
        onnx=_axpy,
        bottoms=(3, 3),
        channels=_axpy_channels,
        understood=fork_fields("axpy_param"),
    ),
    "ShuffleChannel": LayerSpec(
        params=lambda r: at_least(r["shuffle_channel_param"]["group"], 1, "group"),
        infer=_shuffle_infer,
        onnx=_shuffle,
        channels=_shuffle_channels,
        understood=fork_fields("shuffle_channel_param"),
    ),
    "ReLU6": LayerSpec(
        params=_read_relu6,
        infer=same,
        onnx=_relu6,
        channels=same_channels,
        understood=fork_fields("relu6_param"),
    ),
    "Sparsify": LayerSpec(
        params=_read_sparsify,
        infer=same,
        onnx=_sparsify,
        channels=same_channels,
        understood=fork_fields("sparsify_param"),
    ),
    "SymmetricRectify": LayerSpec(
        params=lambda r: r["symmetric_rectify_param"]["channel_shared"],
        infer=same,
        blobs=_rectify_blobs,
        onnx=_rectify,
        channels=slopes,
        understood=fork_fields("symmetric_rectify_param"),
    ),
}
