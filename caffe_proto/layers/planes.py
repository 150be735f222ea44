"""Forks' layers on height and width: Interp, Upsample, CropCenter."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import NetError, ShapeError, UnsupportedError
from ..typed import Typed
from .channels import Channels, planes, same
from .emit import Emitter
from .spec import LayerSpec, Request, Shapes, at_least, fork_fields, text

Pair = tuple[int, int]


def _planes(bottoms: Shapes, kind: str) -> Pair:
    """Height and width of the first bottom; raises ShapeError where it has not four axes."""
    if len(bottoms[0]) != 4:
        raise ShapeError(f"{kind} needs a bottom of 4 axes, found {text(bottoms[0])}")
    return bottoms[0][2], bottoms[0][3]


def _sizes(e: Emitter, hw: Pair) -> str:
    """The shape of the first bottom with another height and width, for ONNX."""
    front = e.node("Gather", e.node("Shape", e.inputs[0]), e.ints([0, 1], "front"), axis=0)
    return e.node("Concat", front, e.ints(hw, "size"), axis=0)


@dataclass(frozen=True)
class InterpParams:
    """Where each is None: ``target`` is (height, width); ``like``: the size is that of a second bottom."""

    target: Pair | None
    shrink: int
    zoom: int
    crop: Pair
    like: bool


def _read_interp(request: Request) -> InterpParams:
    p = request["interp_param"]
    if "use_blob_size" in p:
        raise UnsupportedError("use_blob_size of Interp is not interpreted", line=p.line("use_blob_size"))
    if p["pad_beg"] > 0 or p["pad_end"] > 0:
        raise NetError("pad_beg and pad_end may only crop, that is be 0 or negative", line=p.line())
    sized = "height" in p and "width" in p
    scaled = [name for name in ("shrink_factor", "zoom_factor") if name in p]
    like = request.n_bottoms == 2
    if like and (sized or scaled or "height" in p or "width" in p):
        raise NetError("the size is given twice, by interp_param and by the second bottom", line=p.line())
    if not (like or sized or scaled):
        raise NetError("interp_param gives no size", line=p.line())
    for name in scaled:
        at_least(p[name], 1, name)
    target = (p["height"], p["width"]) if sized and len(scaled) != 1 else None
    for value in target or ():
        at_least(value, 1, "height and width")
    return InterpParams(target, p["shrink_factor"], p["zoom_factor"], (-p["pad_beg"], -p["pad_end"]), like)


def _interp_infer(p: InterpParams, bottoms: Shapes) -> Shapes:
    cropped = [one - sum(p.crop) for one in _planes(bottoms, "Interp")]
    if min(cropped) < 1:
        raise ShapeError(f"nothing is left of {text(bottoms[0])} when {sum(p.crop)} are cropped")
    if p.like:
        return ((*bottoms[0][:2], *_planes(bottoms[1:], "Interp")),)
    shrunk = ((one - 1) // p.shrink + 1 for one in cropped)
    return ((*bottoms[0][:2], *(p.target or ((one - 1) * p.zoom + 1 for one in shrunk))),)


def _interp(e: Emitter, p: InterpParams) -> None:
    """Bilinear between the pixels, the first and the last of either axis on those of the bottom."""
    source, (height, width) = e.inputs[0], _planes(e.in_shapes, "Interp")
    if any(p.crop):
        e.static(0, (2, 3), "cropping")
        begin, end = p.crop
        bounds = e.ints([begin] * 2, "start"), e.ints([height - end, width - end], "end")
        source = e.node("Slice", source, *bounds, e.ints([2, 3], "axes"))
    if any(e.dynamic_out[0][2:]):
        e.static(0, (2, 3), "Interp to a size that follows from that of its bottom")
        e.static(1, (2, 3), "Interp to the size of another blob")
    out = e.out_shapes[0]
    e.node(
        "Resize", source, "", "", _sizes(e, (out[2], out[3])), to=e.outputs[0],
        mode="linear", coordinate_transformation_mode="align_corners",
    )  # fmt: skip


@dataclass(frozen=True)
class UpsampleParams:
    """Either ``size``, or ``scale`` less ``cut``; ``masked``: numbers go where pooling took them from."""

    size: Pair | None
    scale: Pair
    cut: Pair
    masked: bool


def _read_upsample(request: Request) -> UpsampleParams:
    p = request["upsample_param"]
    masked = request.n_bottoms == 2
    other = [name for name in p if name != "scale"]
    if not masked and (other or "scale" not in p):
        raise UnsupportedError(
            "of Upsample with one bottom only upsample_param { scale } is interpreted", line=p.line()
        )
    if ("upsample_h" in p) != ("upsample_w" in p) or ("scale_h" in p) != ("scale_w" in p):
        raise NetError("upsample_h and upsample_w, or scale_h and scale_w, go together", line=p.line())
    if "upsample_h" in p:
        size = at_least(p["upsample_h"], 2, "upsample_h"), at_least(p["upsample_w"], 2, "upsample_w")
        return UpsampleParams(size, (1, 1), (0, 0), masked)
    scale = (p["scale_h"], p["scale_w"]) if "scale_h" in p else (_whole_scale(p),) * 2
    cut = int(p["pad_out_h"]), int(p["pad_out_w"])
    for one, less in zip(scale, cut, strict=True):
        at_least(one, 2, "scale")
        if less and one != 2:
            raise NetError("pad_out_h and pad_out_w need a scale of 2", line=p.line())
    return UpsampleParams(None, scale, cut, masked)


def _whole_scale(p: Typed) -> int:
    """``scale``, by default 2 as in SegNet."""
    scale = float(p["scale"]) if "scale" in p else 2.0
    if scale != int(scale):
        raise UnsupportedError(f"scale {scale} is no whole number", line=p.line("scale"))
    return int(scale)


def _upsample_infer(p: UpsampleParams, bottoms: Shapes) -> Shapes:
    hw = _planes(bottoms, "Upsample")
    if p.masked and bottoms[1] != bottoms[0]:
        raise ShapeError(f"bottom {text(bottoms[0])} and its mask {text(bottoms[1])} differ in shape")
    scaled = (one * scale - less for one, scale, less in zip(hw, p.scale, p.cut, strict=True))
    return ((*bottoms[0][:2], *(p.size or scaled)),)


def _upsample_channels(c: Channels, p: UpsampleParams) -> None:
    if p.masked:
        c.tie(c.places(0, 1), c.places(1, 1))
    planes(c, p)


def _upsample(e: Emitter, p: UpsampleParams) -> None:
    """Each pixel scale x scale times; with a mask each number at its index of the plane, 0 elsewhere."""
    if not p.masked:
        scales = e.const([1, 1, *p.scale], "scales")
        e.node(
            "Resize", e.inputs[0], "", scales, to=e.outputs[0],
            mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip
        return
    e.static(0, (2, 3), "Upsample by a mask")
    _, _, height, width = e.out_shapes[0]
    row = e.ints([0, 0, -1], "row")
    numbers, mask = (e.node("Reshape", name, row) for name in e.inputs)
    front = e.node("Gather", e.node("Shape", e.inputs[0]), e.ints([0, 1], "front"), axis=0)
    shape = e.node("Concat", front, e.ints([height * width], "plane"), axis=0)
    empty = e.node("Expand", e.const(0.0, "zero"), shape)
    spread = e.node("ScatterElements", empty, e.cast(mask, "int64"), numbers, axis=2)
    e.node("Reshape", spread, e.ints([0, 0, height, width], "shape"), to=e.outputs[0])


def _crop_center_infer(crop: tuple[int, ...], bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    if len(crop) != len(shape):
        raise ShapeError(f"{len(crop)} values of crop_size for a blob of {len(shape)} axes")
    if any(2 * cut + 1 > dim for cut, dim in zip(crop, shape, strict=True)):
        raise ShapeError(f"nothing is left of {text(shape)} when {text(crop)} are cut off either end")
    return (tuple(dim - 2 * cut for cut, dim in zip(crop, shape, strict=True)),)


def _crop_center_channels(c: Channels, crop: tuple[int, ...]) -> None:
    labels = c.bottoms[0]
    if labels is not None and crop[labels.axis]:
        c.stay(0, "crops them")
    else:
        same(c, None)


def _crop_center(e: Emitter, crop: tuple[int, ...]) -> None:
    """``crop_size`` off either end of each axis."""
    axes = [axis for axis, cut in enumerate(crop) if cut]
    cuts = [crop[axis] for axis in axes]
    if not axes:
        e.node("Identity", e.inputs[0], to=e.outputs[0])
        return
    bounds = e.ints(cuts, "start"), e.ints([-cut for cut in cuts], "end")
    e.node("Slice", e.inputs[0], *bounds, e.ints(axes, "axes"), to=e.outputs[0])


SPECS = {
    "Interp": LayerSpec(
        params=_read_interp,
        infer=_interp_infer,
        onnx=_interp,
        bottoms=(1, 2),
        channels=planes,
        understood=fork_fields("interp_param"),
    ),
    "Upsample": LayerSpec(
        params=_read_upsample,
        infer=_upsample_infer,
        onnx=_upsample,
        bottoms=(1, 2),
        channels=_upsample_channels,
        understood=fork_fields("upsample_param"),
    ),
    "CropCenter": LayerSpec(
        params=lambda r: r["crop_center_param"]["crop_size"],
        infer=_crop_center_infer,
        onnx=_crop_center,
        channels=_crop_center_channels,
        understood=fork_fields("crop_center_param"),
    ),
}
