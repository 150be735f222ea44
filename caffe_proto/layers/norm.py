"""BatchNorm, Scale, Bias, LRN: normalization and the affine layers around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NetError, ShapeError
from .channels import Channels, planes
from .emit import Emitter
from .spec import Affine, Arrays, LayerSpec, Request, Shape, Shapes, at_least, canonical_axis, same, text


@dataclass(frozen=True)
class BatchNormParams:
    global_stats: bool
    eps: float


def _read_batch_norm(request: Request) -> BatchNormParams:
    p = request["batch_norm_param"]
    for spec in request.layer.param_specs:
        if spec.lr_mult != 0 and len(request.layer.param_specs) != 3:
            raise NetError("BatchNorm's statistics cannot be learnt: param lr_mult must be 0")
    stats = bool(p["use_global_stats"]) if "use_global_stats" in p else request.phase == "TEST"
    return BatchNormParams(stats, p["eps"])


def _batch_norm_blobs(_p: BatchNormParams, bottoms: Shapes) -> Shapes:
    channels = bottoms[0][1] if len(bottoms[0]) > 1 else 1
    return ((channels,), (channels,), (1,))


def statistics(blobs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a BatchNorm layer, (C,) each: its sums times 0, or 1 over blobs[2]."""
    count = float(blobs[2].reshape(-1)[0])
    factor = np.float32(0 if count == 0 else 1 / count)
    return blobs[0].reshape(-1) * factor, blobs[1].reshape(-1) * factor


def _batch_norm_affine(p: BatchNormParams, blobs: Arrays, _bottoms: Shapes) -> Affine | None:
    if not p.global_stats:
        return None
    mean, var = statistics(blobs)
    scale = 1 / np.sqrt(var.astype(np.float64) + p.eps)
    return scale, -mean.astype(np.float64) * scale


def _batch_norm_channels(c: Channels, p: BatchNormParams) -> None:
    if len(c.in_shapes[0]) > 1:
        planes(c, p)
        ids = c.places(0, 1)
        c.cut(0, 0, ids)
        c.cut(1, 0, ids, zero=False)


def _batch_norm(e: Emitter, p: BatchNormParams) -> None:
    """(x - mean) / sqrt(var + eps), with the stored statistics or, where asked, those of the batch."""
    if not p.global_stats:
        _batch_statistics(e, p)
        return
    mean, var = statistics(e.blobs)
    ones = e.const(np.ones_like(mean), "one"), e.const(np.zeros_like(mean), "zero")
    source, to = e.inputs[0], e.outputs[0]
    constants = (*ones, e.const(mean, "mean"), e.const(var, "variance"))
    if len(e.in_shapes[0]) == 1:  # a lone axis is one channel
        wide = e.node("Unsqueeze", source, e.ints([1], "axes"))
        made = e.node("BatchNormalization", wide, *constants, epsilon=p.eps)
        e.node("Squeeze", made, e.ints([1], "axes"), to=to)
        return
    e.node("BatchNormalization", source, *constants, to=to, epsilon=p.eps)


def _batch_statistics(e: Emitter, p: BatchNormParams) -> None:
    axes = [axis for axis in range(len(e.in_shapes[0])) if axis != 1]
    mean = e.node("ReduceMean", e.inputs[0], axes=axes, keepdims=1)
    centred = e.node("Sub", e.inputs[0], mean)
    variance = e.node("ReduceMean", e.node("Mul", centred, centred), axes=axes, keepdims=1)
    root = e.node("Sqrt", e.node("Add", variance, e.const(p.eps, "eps")))
    e.node("Div", centred, root, to=e.outputs[0])


@dataclass(frozen=True)
class AffineParams:
    """Scale or Bias: which axes the blob covers, and whether it is a blob or the second bottom."""

    axis: int
    num_axes: int
    bias: bool
    own: bool


def _read_scale(request: Request) -> AffineParams:
    p = request["scale_param"]
    return AffineParams(
        p["axis"], at_least(p["num_axes"], -1, "num_axes"), p["bias_term"], request.n_bottoms == 1
    )


def _read_bias(request: Request) -> AffineParams:
    p = request["bias_param"]
    return AffineParams(p["axis"], at_least(p["num_axes"], -1, "num_axes"), False, request.n_bottoms == 1)


def _covered(p: AffineParams, bottoms: Shapes) -> tuple[int, Shape]:
    """The first covered axis of bottom[0], and the shape of the blob over it."""
    shape = bottoms[0]
    if p.own:
        axis = canonical_axis(p.axis, len(shape))
        end = len(shape) if p.num_axes == -1 else axis + p.num_axes
        if end > len(shape):
            raise ShapeError(f"{p.num_axes} axes from axis {axis} are more than {text(shape)} has")
        return axis, shape[axis:end]
    other = bottoms[1]
    axis = 0 if not other else canonical_axis(p.axis, len(shape))
    if shape[axis : axis + len(other)] != other:
        raise ShapeError(f"bottom {text(other)} does not match {text(shape)} from axis {axis} on")
    return axis, other


def _affine_infer(p: AffineParams, bottoms: Shapes) -> Shapes:
    _covered(p, bottoms)
    return (bottoms[0],)


def _affine_blobs(p: AffineParams, bottoms: Shapes) -> Shapes:
    _, covered = _covered(p, bottoms)
    return (covered,) * (int(p.own) + int(p.bias))


def _bias_blobs(p: AffineParams, bottoms: Shapes) -> Shapes:
    return (_covered(p, bottoms)[1],) if p.own else ()


def _scale_affine(p: AffineParams, blobs: Arrays, bottoms: Shapes) -> Affine | None:
    axis, covered = _covered(p, bottoms)
    if not p.own or axis != 1 or len(covered) != 1:
        return None
    scale = blobs[0].astype(np.float64)
    return scale, blobs[1].astype(np.float64) if p.bias else np.zeros_like(scale)


def _bias_affine(p: AffineParams, blobs: Arrays, bottoms: Shapes) -> Affine | None:
    axis, covered = _covered(p, bottoms)
    if not p.own or axis != 1 or len(covered) != 1:
        return None
    shift = blobs[0].astype(np.float64)
    return np.ones_like(shift), shift


def _affine_channels(c: Channels, p: AffineParams) -> None:
    """A blob over the channels has one place each; a second bottom over them is tied to the first."""
    axis, covered = _covered(p, c.in_shapes)
    others = c.bottoms if p.own else c.bottoms[::-1]
    at = next((labels.axis for labels in c.bottoms[:1] if labels), None)
    inside = at is not None and axis <= at < axis + len(covered)
    if not p.own and not inside:
        c.stay(1, "spreads them over another blob")
    if at is None or (others[0] is None and inside and not p.own):
        c.stay(0, "multiplies them with channels that stay")
        return
    ids = c.places(0, at)
    if inside and not p.own:
        ids = c.joint(ids, c.places(1, at - axis))
    for blob in range(int(p.own) + int(p.bias) if inside else 0):
        c.cut(blob, at - axis, ids)
    c.top(0, at, ids)


def _factor(e: Emitter, p: AffineParams, index: int) -> str:
    """The own blob ``index``, or the second bottom, with trailing axes of 1 so that it broadcasts."""
    axis, covered = _covered(p, e.in_shapes)
    trailing = len(e.in_shapes[0]) - axis - len(covered)
    if index >= 0:
        return e.blob(index, (*covered, *(1,) * trailing))
    if not trailing or not covered:
        return e.inputs[1]
    axes = range(len(covered), len(covered) + trailing)
    return e.node("Unsqueeze", e.inputs[1], e.ints(list(axes), "axes"))


def _scale(e: Emitter, p: AffineParams) -> None:
    factor = _factor(e, p, 0 if p.own else -1)
    scaled = e.node("Mul", e.inputs[0], factor, to=None if p.bias else e.outputs[0])
    if p.bias:
        e.node("Add", scaled, _factor(e, p, int(p.own)), to=e.outputs[0])


def _bias(e: Emitter, p: AffineParams) -> None:
    e.node("Add", e.inputs[0], _factor(e, p, 0 if p.own else -1), to=e.outputs[0])


@dataclass(frozen=True)
class LrnParams:
    size: int
    alpha: float
    beta: float
    k: float
    within: bool


def _read_lrn(request: Request) -> LrnParams:
    p = request["lrn_param"]
    size = at_least(p["local_size"], 1, "local_size")
    if size % 2 == 0:
        raise NetError(f"local_size is {size}; Caffe takes odd sizes only", line=p.line("local_size"))
    return LrnParams(size, p["alpha"], p["beta"], p["k"], p["norm_region"] == "WITHIN_CHANNEL")


def _lrn_infer(_p: LrnParams, bottoms: Shapes) -> Shapes:
    if len(bottoms[0]) != 4:
        raise ShapeError(f"LRN needs a bottom of 4 axes, found {text(bottoms[0])}")
    return (bottoms[0],)


def _lrn_channels(c: Channels, p: LrnParams) -> None:
    """Across channels a removed one would make strangers neighbours."""
    if p.within or p.size == 1:
        planes(c, p)
    else:
        c.stay(0, "mixes neighbouring channels")


def _lrn(e: Emitter, p: LrnParams) -> None:
    """x / (k + alpha/size * sum x²)^beta over channels; within one, x / (1 + alpha * mean x²)^beta (k ignored).

    Not ONNX's LRN: onnxruntime's kernel takes several times as long as these nodes together.
    """
    square = e.node("Mul", e.inputs[0], e.inputs[0])
    inner = _energy_within(e, p, square) if p.within else _energy_across(e, p, square)
    e.node("Div", e.inputs[0], _power(e, inner, p.beta), to=e.outputs[0])


def _energy_across(e: Emitter, p: LrnParams, square: str) -> str:
    """k + alpha/size * the sum of ``square`` over neighbouring channels: a convolution along axis 1."""
    axes, pad = e.ints([1], "axes"), (p.size - 1) // 2
    window = e.const(np.full((1, 1, p.size, 1, 1), p.alpha / p.size), "window")
    geometry: dict[str, Any] = {"kernel_shape": (p.size, 1, 1), "pads": (pad, 0, 0, pad, 0, 0)}
    summed = e.node("Conv", e.node("Unsqueeze", square, axes), window, e.const([p.k], "k"), **geometry)
    return e.node("Squeeze", summed, axes)


def _energy_within(e: Emitter, p: LrnParams, square: str) -> str:
    """1 + alpha * the mean of ``square`` over a window of the image, the padding counted."""
    pad = (p.size - 1) // 2
    window: dict[str, Any] = {"kernel_shape": (p.size, p.size), "pads": (pad,) * 4, "count_include_pad": 1}
    mean = e.node("AveragePool", square, **window)
    return e.node("Add", e.node("Mul", mean, e.const(p.alpha, "alpha")), e.const(1.0, "one"))


def _power(e: Emitter, base: str, power: float) -> str:
    """``base`` to that power; 3/4, which nets use, from square roots, as Pow is slow."""
    if power == 1:
        return base
    if power not in (0.5, 0.75):
        return e.node("Pow", base, e.const(power, "power"))
    root = e.node("Sqrt", base)
    return root if power == 0.5 else e.node("Mul", root, e.node("Sqrt", root))


SPECS = {
    "BatchNorm": LayerSpec(
        params=_read_batch_norm,
        infer=same,
        blobs=_batch_norm_blobs,
        onnx=_batch_norm,
        affine=_batch_norm_affine,
        channels=_batch_norm_channels,
    ),
    "Scale": LayerSpec(
        params=_read_scale,
        infer=_affine_infer,
        blobs=_affine_blobs,
        onnx=_scale,
        affine=_scale_affine,
        channels=_affine_channels,
        bottoms=(1, 2),
    ),
    "Bias": LayerSpec(
        params=_read_bias,
        infer=_affine_infer,
        blobs=_bias_blobs,
        onnx=_bias,
        affine=_bias_affine,
        channels=_affine_channels,
        bottoms=(1, 2),
    ),
    "LRN": LayerSpec(params=_read_lrn, infer=_lrn_infer, onnx=_lrn, channels=_lrn_channels),
}
