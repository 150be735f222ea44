"""Blobs before any training: Caffe's fillers, and which of them each blob of a layer starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .errors import Error, NetError, ShapeError, UnsupportedError
from .layers.spec import Arrays, Request, Shape, Shapes, size, text
from .typed import Typed


@dataclass(frozen=True)
class Filler:
    """The settings of a FillerParameter."""

    kind: str = "constant"
    value: float = 0.0
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    sparse: int = -1
    variance_norm: str = "FAN_IN"


def read(p: Typed) -> Filler:
    """Read a FillerParameter; raises NetError where Caffe would refuse it."""
    kind = p["type"]
    if kind not in _FILL:
        raise NetError(f'there is no filler "{kind}"', line=p.line("type"), hint="known: " + ", ".join(_FILL))
    if p["sparse"] != -1 and kind != "gaussian":
        raise NetError(f'filler "{kind}" takes no sparse', line=p.line("sparse"))
    return Filler(kind, p["value"], p["min"], p["max"], p["mean"], p["std"], p["sparse"], p["variance_norm"])


def fill(filler: Filler, shape: Shape, random: np.random.Generator) -> np.ndarray:
    """A new blob of that shape, float32.

    constant: value; uniform: [min, max); gaussian: N(mean, std²), with ``sparse`` each kept with the
    probability sparse / shape[0], else 0; xavier: uniform within ±√(3/n); msra: N(0, 2/n); both with n the
    fan in (count / shape[0]), the fan out (count / shape[1]) or their mean (Glorot and Bengio 2010; He et al.
    2015); positive_unitball: uniform in [0, 1), then each row divided by its sum; bilinear: the weights of an
    upsampling Deconvolution. Raises ShapeError where bilinear is no square of 4 axes.
    """
    return np.asarray(_FILL[filler.kind](filler, shape, random), np.float32)


def _constant(filler: Filler, shape: Shape, _random: np.random.Generator) -> np.ndarray:
    return np.full(shape, filler.value)


def _uniform(filler: Filler, shape: Shape, random: np.random.Generator) -> np.ndarray:
    return random.uniform(filler.low, filler.high, shape)


def _gaussian(filler: Filler, shape: Shape, random: np.random.Generator) -> np.ndarray:
    made = random.normal(filler.mean, filler.std, shape)
    if filler.sparse < 0:
        return made
    rows = shape[0] if shape else 1
    return made * (random.random(shape) < filler.sparse / rows)


def _fan(filler: Filler, shape: Shape) -> float:
    """The n that a variance is divided by."""
    count = size(shape)
    into = count / (shape[0] if shape else 1)
    out = count / (shape[1] if len(shape) > 1 else 1)
    return {"FAN_IN": into, "FAN_OUT": out, "AVERAGE": (into + out) / 2}[filler.variance_norm]


def _xavier(filler: Filler, shape: Shape, random: np.random.Generator) -> np.ndarray:
    bound = np.sqrt(3 / _fan(filler, shape))
    return random.uniform(-bound, bound, shape)


def _msra(filler: Filler, shape: Shape, random: np.random.Generator) -> np.ndarray:
    return random.normal(0, np.sqrt(2 / _fan(filler, shape)), shape)


def _positive_unitball(_filler: Filler, shape: Shape, random: np.random.Generator) -> np.ndarray:
    rows = random.random(shape).reshape(shape[0] if shape else 1, -1)
    return (rows / rows.sum(1, keepdims=True)).reshape(shape)


def _bilinear(_filler: Filler, shape: Shape, _random: np.random.Generator) -> np.ndarray:
    """(1 - |x/f - c|) (1 - |y/f - c|) with f = ceil(width / 2), c = (width - 1) / 2f."""
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ShapeError(f"the bilinear filler needs square kernels of a blob of 4 axes, found {text(shape)}")
    width = shape[3]
    factor = (width + 1) // 2
    ramp = 1 - np.abs(np.arange(width) / factor - (width - 1) / (2 * factor))
    return np.broadcast_to(np.outer(ramp, ramp), shape)


_FILL: dict[str, Callable[[Filler, Shape, np.random.Generator], np.ndarray]] = {
    "constant": _constant,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "xavier": _xavier,
    "msra": _msra,
    "positive_unitball": _positive_unitball,
    "bilinear": _bilinear,
}

Fillers = tuple[Filler, ...]
_ZERO, _ONE = Filler(), Filler(value=1.0)


def initial(request: Request, shapes: Shapes, random: np.random.Generator) -> Arrays:
    """The blobs a layer starts from, by the fillers it names or those that Caffe takes where it names none.

    Raises UnsupportedError on a layer type whose start is not known.
    """
    if not shapes:
        return ()
    start = _STARTS.get(request.layer.type)
    if start is None:
        raise UnsupportedError(f"the blobs of {request.layer.type} are filled by no rule known here")
    try:
        return tuple(
            fill(filler, shape, random) for filler, shape in zip(start(request, shapes), shapes, strict=True)
        )
    except Error as error:
        raise error.at(line=request.layer.line, layer=request.layer.name) from None


def _named(block: Typed, name: str, default: Filler = _ZERO) -> Filler:
    return read(block[name]) if name in block else default


def _weight_and_bias(block: str) -> Callable[[Request, Shapes], Fillers]:
    def start(request: Request, shapes: Shapes) -> Fillers:
        p = request[block]
        return (_named(p, "weight_filler"), _named(p, "bias_filler"))[: len(shapes)]

    return start


def _scale(request: Request, shapes: Shapes) -> Fillers:
    """A factor where there is no second bottom, and a bias where it is asked for."""
    p = request["scale_param"]
    own = (_named(p, "filler", _ONE),) if request.n_bottoms == 1 else ()
    return (*own, _named(p, "bias_filler"))[: len(shapes)]


def _recurrent(request: Request, shapes: Shapes) -> Fillers:
    """The matrices by the weight filler, the vectors by the bias filler."""
    p = request["recurrent_param"]
    weight, bias = _named(p, "weight_filler"), _named(p, "bias_filler")
    return tuple(weight if len(shape) > 1 else bias for shape in shapes)


def _always(*fillers: Filler) -> Callable[[Request, Shapes], Fillers]:
    return lambda _request, _shapes: fillers


def _one_filler(block: str, name: str, default: Filler) -> Callable[[Request, Shapes], Fillers]:
    return lambda request, _shapes: (_named(request[block], name, default),)


_STARTS: Mapping[str, Callable[[Request, Shapes], Fillers]] = {
    "Convolution": _weight_and_bias("convolution_param"),
    "Deconvolution": _weight_and_bias("convolution_param"),
    "DepthwiseConvolution": _weight_and_bias("convolution_param"),
    "ConvolutionDepthwise": _weight_and_bias("convolution_param"),
    "InnerProduct": _weight_and_bias("inner_product_param"),
    "Embed": _weight_and_bias("embed_param"),
    "BatchNorm": _always(_ZERO, _ZERO, _ZERO),
    "Scale": _scale,
    "Bias": _one_filler("bias_param", "filler", _ZERO),
    "PReLU": _one_filler("prelu_param", "filler", Filler(value=0.25)),
    "LSTM": _recurrent,
    "RNN": _recurrent,
    "Parameter": _always(_ZERO),
    "Normalize": _one_filler("norm_param", "scale_filler", _ONE),
}
