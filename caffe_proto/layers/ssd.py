"""SSD's layers around its heads: Permute, Normalize, PriorBox. MultiBoxLoss is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..errors import NetError, ShapeError, UnsupportedError
from .channels import Channels, ignored
from .emit import Emitter
from .pointwise import slopes
from .spec import LayerSpec, Request, Shapes, fork_fields, legacy, same, text

_SAME_RATIO = 1e-6  # aspect ratios closer than that are one


def _read_permute(request: Request) -> tuple[int, ...]:
    p = request["permute_param"]
    order = tuple(p["order"])
    if len(set(order)) != len(order):
        raise NetError(f"order {order} names an axis twice", line=p.line("order"))
    return order


def _full_order(order: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The axes named, then the others as they stand."""
    for axis in order:
        if axis >= ndim:
            raise ShapeError(f"order names axis {axis} of a blob of {ndim} axes")
    return (*order, *(axis for axis in range(ndim) if axis not in order))


def _permute_infer(order: tuple[int, ...], bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    return (tuple(shape[axis] for axis in _full_order(order, len(shape))),)


def _permute_channels(c: Channels, order: tuple[int, ...]) -> None:
    labels = c.bottoms[0]
    if labels is not None:
        c.top(0, _full_order(order, len(c.in_shapes[0])).index(labels.axis), labels.ids)


def _permute(e: Emitter, order: tuple[int, ...]) -> None:
    e.node("Transpose", e.inputs[0], to=e.outputs[0], perm=_full_order(order, len(e.in_shapes[0])))


@dataclass(frozen=True)
class NormalizeParams:
    across: bool
    shared: bool
    eps: float


def _read_normalize(request: Request) -> NormalizeParams:
    p = request["norm_param"]
    return NormalizeParams(p["across_spatial"], p["channel_shared"], p["eps"])


def _normalize_blobs(p: NormalizeParams, bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    if len(shape) < 2:
        raise ShapeError(f"Normalize needs a bottom of at least 2 axes, found {text(shape)}")
    legacy(shape)
    return ((),) if p.shared else ((shape[1],),)


def _normalize_channels(c: Channels, p: NormalizeParams) -> None:
    """A channel of zeros adds nothing to the norm, so the others stay what they were without it."""
    slopes(c, p.shared)


def _normalize(e: Emitter, p: NormalizeParams) -> None:
    """scale * x / sqrt(eps + sum x²), summed over the channels of each place, or across all of an item."""
    x, ndim = e.inputs[0], len(e.in_shapes[0])
    axes = list(range(1, ndim)) if p.across else [1]
    square = e.node("ReduceSumSquare", x, axes=axes, keepdims=1)
    norm = e.node("Sqrt", e.node("Add", square, e.const(p.eps, "eps")))
    scale = e.blob(0) if p.shared else e.blob(0, (-1, *(1,) * (ndim - 2)))
    e.node("Mul", e.node("Div", x, norm), scale, to=e.outputs[0])


@dataclass(frozen=True)
class PriorBoxParams:
    """``ratios`` holds what is asked for beside 1; ``image`` and ``step`` are (h, w), None where not given."""

    min_sizes: tuple[float, ...]
    max_sizes: tuple[float, ...]
    ratios: tuple[float, ...]
    clip: bool
    variance: tuple[float, ...]
    image: tuple[int, int] | None
    step: tuple[float, float] | None
    offset: float

    @property
    def count(self) -> int:
        """How many boxes stand at each place."""
        return (len(self.ratios) + 1) * len(self.min_sizes) + len(self.max_sizes)


def _read_prior_box(request: Request) -> PriorBoxParams:
    p = request["prior_box_param"]
    smallest, largest, variance = p["min_size"], p["max_size"], p["variance"]
    if not smallest:
        raise NetError("prior_box_param needs min_size", line=p.line())
    if largest and len(largest) != len(smallest):
        raise NetError(f"{len(largest)} max_size for {len(smallest)} min_size; none, or one each is needed")
    if any(high <= low for low, high in zip(smallest, largest, strict=False)):
        raise NetError("each max_size must be greater than its min_size", line=p.line("max_size"))
    if len(variance) not in (0, 1, 4):
        raise NetError(f"{len(variance)} values of variance; none, one or four are taken")
    for name in ("min_size", "variance"):
        if any(value <= 0 for value in p[name]):
            raise NetError(f"{name} must be positive", line=p.line(name))
    return PriorBoxParams(
        smallest,
        largest,
        _ratios(p["aspect_ratio"], p["flip"]),
        p["clip"],
        variance or (0.1,),
        _positive_pair(p, "img_size", "img_h", "img_w"),
        _positive_pair(p, "step", "step_h", "step_w"),
        p["offset"],
    )


def _ratios(asked: tuple[float, ...], flip: bool) -> tuple[float, ...]:
    """What is asked for, each once, and with ``flip`` each with its inverse; 1 is always there."""
    found = [1.0]
    for ratio in asked:
        if all(abs(ratio - other) >= _SAME_RATIO for other in found):
            found += [ratio, 1 / ratio] if flip else [ratio]
    return tuple(found[1:])


def _positive_pair(p: Any, one: str, h: str, w: str) -> tuple[Any, Any] | None:
    """(h, w) of a setting in either spelling; raises NetError where both stand, or one is not positive."""
    both = h in p or w in p
    if both and one in p:
        raise NetError(f"{one} and {h}/{w} are both given; the layer takes one", line=p.line(one))
    if not both and one not in p:
        return None
    pair = (p[h], p[w]) if both else (p[one], p[one])
    if min(pair) <= 0:
        raise NetError(f"{h + '/' + w if both else one} must be given and positive", line=p.line())
    return pair


def _prior_box_infer(p: PriorBoxParams, bottoms: Shapes) -> Shapes:
    _, _, height, width = legacy(bottoms[0])
    legacy(bottoms[1])
    return ((1, 2, height * width * p.count * 4),)


def _box_sizes(p: PriorBoxParams) -> np.ndarray:
    """(width, height) of each box of a place, (count, 2). The layer cuts its sizes to whole numbers."""
    sizes = []
    for s, low in enumerate(map(int, p.min_sizes)):
        side = float(low)
        sizes.append((side, side))
        if p.max_sizes:
            side = np.sqrt(low * int(p.max_sizes[s]))
            sizes.append((side, side))
        sizes += [(side * np.sqrt(ratio), side / np.sqrt(ratio)) for ratio in p.ratios]
    return np.array(sizes, np.float32)


def _boxes(p: PriorBoxParams, bottoms: Shapes) -> np.ndarray:
    """(1, 2, n): corners of all boxes in parts of the image, ordered by row, column, box; their variances."""
    hw = np.array(legacy(bottoms[0])[2:])
    image = np.array(p.image or legacy(bottoms[1])[2:])
    step = np.array(p.step, np.float32) if p.step else image.astype(np.float32) / hw.astype(np.float32)
    ys, xs = (
        (np.arange(n, dtype=np.float32) + np.float32(p.offset)) * one for n, one in zip(hw, step, strict=True)
    )
    places = np.stack(np.meshgrid(ys, xs, indexing="ij")[::-1], -1)[:, :, None].astype(np.float64)
    half = _box_sizes(p) / 2.0
    corners = np.concatenate([places - half, places + half], -1) / np.tile(image[::-1], 2)
    if p.clip:
        corners = corners.clip(0, 1)
    variances = np.broadcast_to(np.array(p.variance, np.float32), corners.shape)
    return np.stack([corners.ravel(), variances.ravel()])[None]


def _prior_box(e: Emitter, p: PriorBoxParams) -> None:
    """The boxes as a constant: they follow from the sizes of the bottoms alone."""
    e.static(0, range(2, len(e.in_shapes[0])), "PriorBox")
    if p.image is None:
        e.static(1, range(2, len(e.in_shapes[1])), "PriorBox")
    e.node("Identity", e.const(_boxes(p, e.in_shapes), "boxes"), to=e.outputs[0])


def _no_training(_request: Request) -> NoReturn:
    raise UnsupportedError("MultiBoxLoss is for training alone; it is not run", hint="use the deploy net")


SPECS = {
    "Permute": LayerSpec(
        params=_read_permute,
        infer=_permute_infer,
        onnx=_permute,
        channels=_permute_channels,
        understood=fork_fields("permute_param"),
    ),
    "Normalize": LayerSpec(
        params=_read_normalize,
        infer=same,
        blobs=_normalize_blobs,
        onnx=_normalize,
        channels=_normalize_channels,
        understood=fork_fields("norm_param"),
    ),
    "PriorBox": LayerSpec(
        params=_read_prior_box,
        infer=_prior_box_infer,
        onnx=_prior_box,
        bottoms=(2, 2),
        channels=ignored,
        understood=fork_fields("prior_box_param"),
    ),
    "MultiBoxLoss": LayerSpec(
        params=_no_training, infer=same, onnx=None, bottoms=(4, 4), loss=True, any_fields=True
    ),
}
