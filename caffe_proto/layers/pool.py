"""Pooling exactly as Caffe does it, written with explicit pads that every onnxruntime reads alike.

With window k, stride s, pad p and rounding up, Caffe makes ``ceil((H + 2p - k)/s) + 1`` windows and, where
p > 0, drops those that start at or behind H + p. Both together are what floor-mode pooling with an end pad
of ``min(p + s - 1, k - 1)`` makes, whatever H is; so the pads below hold for dynamic sizes too.

pad_l, pad_r, pad_t and pad_b are those of Synopsys' fork: with b in front and e behind it makes
``ceil((H + b + e - k)/s) + 1`` windows, drops those that start at or behind H + b, and counts the padding
up to H + e. All of the above then holds with the end pad ``min(e + s - 1, k - 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NetError, ShapeError
from .channels import planes
from .emit import Emitter
from .spec import SIDES, LayerSpec, Request, Shapes, at_least, side_pads, spatial_pair, text

Pair = tuple[int, int]
_LOWEST = float(np.finfo(np.float32).min)  # Caffe's -FLT_MAX


@dataclass(frozen=True)
class PoolParams:
    """``kernel`` is None for global pooling; ``ceil`` is Caffe's usual rounding.

    ``pad_end``: the pads behind, where each side has its own and ``pad`` is in front only.
    """

    method: str
    kernel: Pair | None
    stride: Pair
    pad: Pair
    ceil: bool
    mask: bool
    pad_end: Pair | None = None

    def window(self, hw: Pair) -> Pair:
        """The window's size on an image of that size."""
        return self.kernel or hw

    @property
    def clips(self) -> bool:
        """Whether windows that start behind the image are dropped: one padded axis switches it on for both."""
        return any(self.pad + self.behind)

    @property
    def behind(self) -> Pair:
        """The padding behind the image."""
        return self.pad if self.pad_end is None else self.pad_end


def read(request: Request) -> PoolParams:
    """Read pooling_param; raises NetError where Caffe would refuse it."""
    p = request["pooling_param"]
    kernel: Pair | None = None
    named = [name for name in ("kernel_size", "kernel_h", "kernel_w") if name in p]
    if p["global_pooling"]:
        if named:
            raise NetError(f"global_pooling together with {named[0]}; Caffe takes one", line=p.line(named[0]))
    elif not named or named in (["kernel_h"], ["kernel_w"]):
        raise NetError("needs kernel_size, or kernel_h and kernel_w", line=p.line())
    else:
        h, w = spatial_pair(p, "kernel", 0, both="kernel_size")
        kernel = at_least(h, 1, "kernel size"), at_least(w, 1, "kernel size")
    stride, sides = spatial_pair(p, "stride", 1), side_pads(p)
    pad, behind = sides or (spatial_pair(p, "pad", 0),) * 2
    padded = any(pad + behind)
    if kernel is None and (padded or stride != (1, 1)):
        raise NetError("global_pooling takes no pad and no stride but 1", line=p.line())
    for value in stride:
        at_least(value, 1, "stride")
    for ends in (pad, behind):
        if kernel and any(one >= k for one, k in zip(ends, kernel, strict=True) if one):
            raise NetError(
                f"pad {text(ends)} must be smaller than the kernel {text(kernel)}", line=p.line("pad")
            )
    if padded and p["pool"] == "STOCHASTIC":
        raise NetError("stochastic pooling takes no pad", line=p.line("pad"))
    ceil = p["round_mode"] == "CEIL" and not ("ceil_mode" in p and not p["ceil_mode"])
    return PoolParams(p["pool"], kernel, stride, pad, ceil, request.n_tops == 2, behind if sides else None)


def out_size(h: int, k: int, s: int, p: int, end: int, *, ceil: bool, clips: bool) -> int:
    """How many windows Caffe lays along an axis of size ``h``."""
    span = h + p + end - k
    n = (-(-span // s) if ceil else span // s) + 1
    return n - 1 if clips and (n - 1) * s >= h + p else n


def _infer(p: PoolParams, bottoms: Shapes) -> Shapes:
    (bottom,) = bottoms
    if len(bottom) != 4:
        raise ShapeError(f"pooling needs a bottom of 4 axes, found {text(bottom)}")
    hw = (bottom[2], bottom[3])
    sizes = tuple(
        out_size(h, k, s, pad, end, ceil=p.ceil, clips=p.clips)
        for h, k, s, pad, end in zip(hw, p.window(hw), p.stride, p.pad, p.behind, strict=True)
    )
    if any(one < 1 for one in sizes):
        raise ShapeError(f"window {text(p.window(hw))} does not fit the bottom {text(bottom)}")
    return ((*bottom[:2], *sizes),) * (2 if p.mask else 1)


def _has_empty_windows(p: PoolParams, hw: Pair, out: Pair) -> bool:
    return any((n - 1) * s - pad >= h for n, s, pad, h in zip(out, p.stride, p.pad, hw, strict=True))


def _end_pads(p: PoolParams, hw: Pair) -> Pair:
    """The end pads that make floor-mode pooling lay exactly Caffe's windows, for any image size."""
    pads = []
    for k, s, pad in zip(p.window(hw), p.stride, p.behind, strict=True):
        reach = pad + s - 1 if p.ceil else pad
        pads.append(min(reach, k - 1))
    return pads[0], pads[1]


def _onnx(e: Emitter, p: PoolParams) -> None:
    shape, out = e.in_shapes[0], e.out_shapes[0]
    hw, out_hw = (shape[2], shape[3]), (out[2], out[3])
    if p.method == "STOCHASTIC":
        raise NetError("stochastic pooling has no exact ONNX form", hint="use AVE or MAX pooling")
    may_be_empty = p.ceil and not p.clips and any(s > k for s, k in zip(p.stride, p.window(hw), strict=True))
    if p.kernel is None:
        _global(e, p)
    elif _has_empty_windows(p, hw, out_hw) or (may_be_empty and any(e.dynamic_in[0][2:])):
        _with_empty_windows(e, p, hw, out_hw)
    elif p.method == "MAX":
        _max(e, p, e.inputs[0], _end_pads(p, hw), e.outputs)
    else:
        _average(e, p, hw, out_hw)


def _global(e: Emitter, p: PoolParams) -> None:
    if p.method == "AVE":
        e.node("GlobalAveragePool", e.inputs[0], to=e.outputs[0])
    elif p.mask:
        e.static(0, (2, 3), "the mask of global pooling")
        _, _, h, w = e.in_shapes[0]
        fixed = PoolParams("MAX", (h, w), (1, 1), (0, 0), True, True)
        _max(e, fixed, e.inputs[0], (0, 0), e.outputs)
    else:
        e.node("GlobalMaxPool", e.inputs[0], to=e.outputs[0])


def _max(e: Emitter, p: PoolParams, source: str, end: Pair, outputs: tuple[str, ...]) -> None:
    attributes: dict[str, Any] = {"kernel_shape": p.kernel, "strides": p.stride, "pads": (*p.pad, *end)}
    if not p.mask:
        e.node("MaxPool", source, to=outputs[0], **attributes)
        return
    e.static(0, (2, 3), "the mask of max pooling")
    indices = e.sheet.unique(f"{e.layer}/indices")
    e.node("MaxPool", source, to=(outputs[0], indices), **attributes)
    plane = e.node("Mod", indices, e.ints([e.in_shapes[0][2] * e.in_shapes[0][3]], "plane"))
    e.node("Cast", plane, to=outputs[1], to_type="float32")


def _average(e: Emitter, p: PoolParams, hw: Pair, out: Pair) -> None:
    """AVE: the divisor counts the padding, but not what a last window hangs over beyond it.

    Without pad that is pooling that excludes its pads. With both, a factor for each window corrects the
    divisor k*k; where the size is open the padding is laid down first.
    """
    k, end = p.window(hw), _end_pads(p, hw)
    need = [
        (n - 1) * s + one - h - pad for n, s, one, h, pad in zip(out, p.stride, k, hw, p.pad, strict=True)
    ]
    overhang = [one - pad for one, pad in zip(end, p.behind, strict=True)]
    fixed = not any(e.dynamic_in[0][2:])
    hangs = any(one > pad for one, pad in zip(need, p.behind, strict=True)) if fixed else any(overhang)
    source, to = e.inputs[0], e.outputs[0]
    attributes: dict[str, Any] = {"kernel_shape": k, "strides": p.stride}
    if not hangs:
        ends = [max(0, min(one, pad)) for one, pad in zip(need, p.behind, strict=True)] if fixed else p.behind
        e.node("AveragePool", source, to=to, pads=(*p.pad, *ends), count_include_pad=1, **attributes)
    elif not p.clips:
        e.node("AveragePool", source, to=to, pads=(0, 0, *overhang), count_include_pad=0, **attributes)
    elif fixed:
        mean = e.node("AveragePool", source, pads=(*p.pad, *end), count_include_pad=1, **attributes)
        e.node("Mul", mean, e.const(_divisor_ratio(p, hw, out), "ratio"), to=to)
    else:
        padded = e.node("Pad", source, e.ints((0, 0, *p.pad, 0, 0, *p.behind), "pads"))
        e.node("AveragePool", padded, to=to, pads=(0, 0, *overhang), count_include_pad=0, **attributes)


def _divisor_ratio(p: PoolParams, hw: Pair, out: Pair) -> np.ndarray:
    """k*k over Caffe's divisor, for each window: (out_h, out_w)."""
    ratios = []
    for n, s, k, pad, end, h in zip(out, p.stride, p.window(hw), p.pad, p.behind, hw, strict=True):
        start = np.arange(n) * s - pad
        ratios.append(k / (np.minimum(start + k, h + end) - start))
    return np.multiply.outer(*ratios)


def _with_empty_windows(e: Emitter, p: PoolParams, hw: Pair, out: Pair) -> None:
    """Stride > kernel without pad: Caffe's last windows lie outside. MAX gives -FLT_MAX there, AVE 0 or 0/0."""
    e.static(0, (2, 3), "pooling with windows outside the image (stride > kernel)")
    inside = [-(-h // s) for h, s in zip(hw, p.stride, strict=True)]
    missing = e.ints(
        (0, 0, 0, 0, 0, 0, *(max(0, n - valid) for n, valid in zip(out, inside, strict=True))), "outside"
    )
    if p.method == "MAX":
        tops = tuple(e.sheet.unique(f"{e.layer}/inside") for _ in e.outputs)
        _max(e, p, e.inputs[0], _end_pads(p, hw), tops)
        for top, fill, to in zip(tops, (_LOWEST, -1.0), e.outputs, strict=False):
            e.node("Pad", top, missing, e.const(fill, "fill"), to=to)
        return
    attributes: dict[str, Any] = {
        "kernel_shape": p.kernel,
        "strides": p.stride,
        "pads": (0, 0, *_end_pads(p, hw)),
    }
    mean = e.node("AveragePool", e.inputs[0], count_include_pad=0, **attributes)
    padded = e.node("Pad", mean, missing)
    e.node("Add", padded, e.const(_nothing_over_nothing(p, hw, out), "nan"), to=e.outputs[0])


def _nothing_over_nothing(p: PoolParams, hw: Pair, out: Pair) -> np.ndarray:
    """(out_h, out_w): NaN where Caffe's divisor is 0, a window that starts exactly where the image ends, else 0."""
    ends = [np.arange(n) * s == h for n, s, h in zip(out, p.stride, hw, strict=True)]
    return np.where(np.logical_or.outer(*ends), np.float32(np.nan), np.float32(0))


SPECS = {
    "Pooling": LayerSpec(
        params=read, infer=_infer, onnx=_onnx, tops=(1, 2), channels=planes, understood=SIDES | {"ceil_mode"}
    )
}
