"""Layers that treat every number alone: activations, powers, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NetError, ShapeError, UnsupportedError
from .channels import Channels, same
from .emit import Emitter
from .spec import LayerSpec, Request, Shape, Shapes
from .spec import same as same_shape


def _plain(op: str) -> LayerSpec:
    def onnx(e: Emitter, _params: Any) -> None:
        e.node(op, e.inputs[0], to=e.outputs[0])

    return LayerSpec(infer=same_shape, onnx=onnx, channels=same)


def _with(params: Callable[[Request], Any], onnx: Callable[[Emitter, Any], None]) -> LayerSpec:
    return LayerSpec(params=params, infer=same_shape, onnx=onnx, channels=same)


def _relu(e: Emitter, slope: float) -> None:
    """max(x, 0) + slope*min(x, 0). Caffe makes NaN of -inf (0 * inf); only a net's input can hold it."""
    if slope == 0 and not e.from_input[0]:
        e.node("Relu", e.inputs[0], to=e.outputs[0])
    else:
        e.node("LeakyRelu", e.inputs[0], to=e.outputs[0], alpha=slope)


def _elu(e: Emitter, alpha: float) -> None:
    e.node("Elu", e.inputs[0], to=e.outputs[0], alpha=alpha)


@dataclass(frozen=True)
class Affine:
    """An exponent or base around ``shift + scale*x``."""

    base: float
    scale: float
    shift: float


def _read_affine(block: str, key: str) -> Callable[[Request], Affine]:
    def read(request: Request) -> Affine:
        p = request[block]
        base = p[key]
        if key == "base" and base != -1 and base <= 0:
            raise NetError(f"base is {base}, it must be positive, or -1 for e", line=p.line("base"))
        return Affine(base, p["scale"], p["shift"])

    return read


def _inner(e: Emitter, a: Affine, factor: float = 1.0, to: str | None = None) -> str:
    """factor * (shift + scale*x), without the nodes that would do nothing."""
    name = e.inputs[0]
    steps = [("Mul", factor * a.scale, 1.0, "scale"), ("Add", factor * a.shift, 0.0, "shift")]
    steps = [step for step in steps if step[1] != step[2]]
    for op, value, _, suffix in steps:
        last = to if op == steps[-1][0] else None
        name = e.node(op, name, e.const(value, suffix), to=last)
    return e.node("Identity", name, to=to) if to is not None and not steps else name


def _power(e: Emitter, a: Affine) -> None:
    """(shift + scale*x)^power; a power or scale of 0 makes a constant, whatever x is."""
    if a.base * a.scale == 0:
        value = 1.0 if a.base == 0 else math.pow(a.shift, a.base)
        e.node("Expand", e.const(value, "value"), e.node("Shape", e.inputs[0]), to=e.outputs[0])
    elif a.base == 1:
        _inner(e, a, to=e.outputs[0])
    elif a.base == 2:
        inner = _inner(e, a)
        e.node("Mul", inner, inner, to=e.outputs[0])
    else:
        e.node("Pow", _inner(e, a), e.const(a.base, "power"), to=e.outputs[0])


def _exp(e: Emitter, a: Affine) -> None:
    factor = 1.0 if a.base == -1 else math.log(a.base)
    e.node("Exp", _inner(e, a, factor), to=e.outputs[0])


def _log(e: Emitter, a: Affine) -> None:
    natural = a.base == -1
    name = e.node("Log", _inner(e, a), to=e.outputs[0] if natural else None)
    if not natural:
        e.node("Mul", name, e.const(1 / math.log(a.base), "per_base"), to=e.outputs[0])


def _threshold(e: Emitter, threshold: float) -> None:
    above = e.node("Greater", e.inputs[0], e.const(threshold, "threshold"))
    e.node("Cast", above, to=e.outputs[0], to_type="float32")


def _swish(e: Emitter, beta: float) -> None:
    inner = e.inputs[0] if beta == 1 else e.node("Mul", e.inputs[0], e.const(beta, "beta"))
    e.node("Mul", e.inputs[0], e.node("Sigmoid", inner), to=e.outputs[0])


def _clip(e: Emitter, limits: tuple[float, float]) -> None:
    low, high = limits
    e.node("Clip", e.inputs[0], e.const(low, "min"), e.const(high, "max"), to=e.outputs[0])


def _read_clip(request: Request) -> tuple[float, float]:
    p = request["clip_param"]
    if "min" not in p or "max" not in p:
        raise NetError("clip_param needs min and max", line=p.line())
    return p["min"], p["max"]


@dataclass(frozen=True)
class DropoutParams:
    ratio: float
    train: bool


def _dropout(e: Emitter, p: DropoutParams) -> None:
    if p.train:
        raise UnsupportedError("dropout is random in phase TRAIN", hint="use --phase TEST")
    e.node("Identity", e.inputs[0], to=e.outputs[0])


def _read_dropout(request: Request) -> DropoutParams:
    p = request["dropout_param"]
    ratio = p["dropout_ratio"]
    if not 0 < ratio < 1:
        raise NetError(f"dropout_ratio is {ratio}, it must lie between 0 and 1", line=p.line("dropout_ratio"))
    return DropoutParams(ratio, request.phase == "TRAIN")


def _prelu_blobs(shared: bool, bottoms: Shapes) -> Shapes:
    if len(bottoms[0]) < 2:
        raise ShapeError("PReLU needs a bottom of at least 2 axes")
    return ((),) if shared else ((bottoms[0][1],),)


def slopes(c: Channels, shared: bool) -> None:
    """One learnt number for each channel, or for all."""
    if shared:
        same(c, None)
        return
    ids = c.places(0, 1)
    c.cut(0, 0, ids, zero=False)
    c.top(0, 1, ids)


def _prelu(e: Emitter, shared: bool) -> None:
    shape: Shape = (1,) if shared else (-1,) + (1,) * (len(e.in_shapes[0]) - 2)
    e.node("PRelu", e.inputs[0], e.const(np.reshape(e.blobs[0], shape), "0"), to=e.outputs[0])


SPECS = {
    "AbsVal": _plain("Abs"),
    "BNLL": _plain("Softplus"),
    "Sigmoid": _plain("Sigmoid"),
    "TanH": _plain("Tanh"),
    "ReLU": _with(lambda r: r["relu_param"]["negative_slope"], _relu),
    "ELU": _with(lambda r: r["elu_param"]["alpha"], _elu),
    "Power": _with(_read_affine("power_param", "power"), _power),
    "Exp": _with(_read_affine("exp_param", "base"), _exp),
    "Log": _with(_read_affine("log_param", "base"), _log),
    "Threshold": _with(lambda r: r["threshold_param"]["threshold"], _threshold),
    "Swish": _with(lambda r: r["swish_param"]["beta"], _swish),
    "Clip": _with(_read_clip, _clip),
    "Dropout": _with(_read_dropout, _dropout),
    "PReLU": LayerSpec(
        params=lambda r: r["prelu_param"]["channel_shared"],
        infer=same_shape,
        blobs=_prelu_blobs,
        onnx=_prelu,
        channels=slopes,
    ),
}
