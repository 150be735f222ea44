"""Convolution and Deconvolution: N spatial axes, groups, dilation, any channel axis.

pad_l, pad_r, pad_t and pad_b are those of Synopsys' fork: two axes, and each side has its own padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ..errors import NetError, ShapeError, UnsupportedError
from ..typed import Typed
from .channels import Channels
from .emit import Emitter
from .spec import (
    SIDES,
    LayerSpec,
    Request,
    Shape,
    Shapes,
    at_least,
    canonical_axis,
    side_pads,
    text,
)


@dataclass(frozen=True)
class ConvParams:
    """Settings as written; one value may stand for all spatial axes. See ``geometry``.

    ``pad_end``: the pads behind, where each side has its own and ``pad`` is in front only.
    """

    num_output: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    group: int
    bias: bool
    axis: int
    planar: bool  # kernel_h, stride_h, ... were used: exactly two spatial axes
    n_tops: int
    pad_end: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Geometry:
    """One value a spatial axis; ``pad`` is in front, ``pad_end`` behind."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    pad_end: tuple[int, ...]


def read(request: Request) -> ConvParams:
    """Read convolution_param; raises NetError where Caffe would refuse it."""
    p = request["convolution_param"]
    if request.n_bottoms != request.n_tops:
        raise NetError(f"{request.n_bottoms} bottoms and {request.n_tops} tops; each bottom makes one top")
    kernel, kernel_hw = _axes(p, "kernel_size", ("kernel_h", "kernel_w"))
    stride, stride_hw = _axes(p, "stride", ("stride_h", "stride_w"))
    sides = side_pads(p)
    pad, pad_hw = (sides[0], True) if sides else _axes(p, "pad", ("pad_h", "pad_w"))
    if sides and any(sides[0] + sides[1]):
        _check_sides(p, (*kernel, *stride))
    for values, low, what in (
        (kernel, 1, "kernel size"),
        (stride, 1, "stride"),
        (p["dilation"], 1, "dilation"),
    ):
        for value in values:
            at_least(value, low, what)
    group = at_least(p["group"], 1, "group")
    num_output = at_least(p["num_output"], 1, "num_output")
    if num_output % group:
        raise NetError(f"group {group} does not divide num_output {num_output}", line=p.line("group"))
    planar = kernel_hw or stride_hw or pad_hw
    return ConvParams(
        num_output,
        kernel,
        stride,
        pad,
        p["dilation"],
        group,
        p["bias_term"],
        p["axis"],
        planar,
        request.n_tops,
        sides[1] if sides else None,
    )


def _check_sides(p: Typed, window: Sequence[int]) -> None:
    """Refuse where the fork shapes its tops by the pads of the sides, and then lays none of them down."""
    if p["force_nd_im2col"]:
        raise UnsupportedError(
            "force_nd_im2col leaves pad_l, pad_r, pad_t and pad_b out", line=p.line("force_nd_im2col")
        )
    if all(one == 1 for one in window):
        raise UnsupportedError(
            "a 1 x 1 kernel of stride 1 leaves pad_l, pad_r, pad_t and pad_b out", line=p.line()
        )


def _axes(p: Typed, name: str, pair: tuple[str, str]) -> tuple[tuple[int, ...], bool]:
    """The values of one setting, and whether they stand as _h and _w."""
    if pair[0] in p or pair[1] in p:
        if name in p:
            raise NetError(
                f"{name} and {pair[0]}/{pair[1]} are both given; Caffe takes one spelling", line=p.line(name)
            )
        return (p[pair[0]], p[pair[1]]), True
    return p[name], False


def geometry(p: ConvParams, shape: Shape) -> tuple[int, Geometry]:
    """The channel axis, and the settings for each spatial axis of a bottom; raises where they do not fit."""
    axis = canonical_axis(p.axis, len(shape))
    n = len(shape) - axis - 1
    if p.planar and n != 2:
        raise NetError(f"kernel_h and kernel_w need two spatial axes, the bottom {text(shape)} has {n}")
    return axis, Geometry(
        _spread(p.kernel, n, None, "kernel_size"),
        _spread(p.stride, n, 1, "stride"),
        _spread(p.pad, n, 0, "pad"),
        _spread(p.dilation, n, 1, "dilation"),
        _spread(p.pad if p.pad_end is None else p.pad_end, n, 0, "pad"),
    )


def _spread(values: Sequence[int], n: int, default: int | None, what: str) -> tuple[int, ...]:
    if not values and (default is not None or n == 0):
        return (default or 0,) * n
    if len(values) == 1:
        return tuple(values) * n
    if len(values) != n:
        raise NetError(
            f"{len(values)} values of {what} for {n} spatial axes", hint="give one, or one for each axis"
        )
    return tuple(values)


def _out_size(h: int, k: int, s: int, p: int, d: int) -> int:
    return (h + p - (d * (k - 1) + 1)) // s + 1


def _transposed_size(h: int, k: int, s: int, p: int, d: int) -> int:
    return s * (h - 1) + d * (k - 1) + 1 - p


def _infer(p: ConvParams, bottoms: Shapes, transposed: bool) -> Shapes:
    axis, g = geometry(p, bottoms[0])
    if any(bottom != bottoms[0] for bottom in bottoms):
        raise ShapeError("bottoms differ in shape: " + ", ".join(map(text, bottoms)))
    channels = bottoms[0][axis]
    if channels % p.group:
        raise ShapeError(f"group {p.group} does not divide the {channels} channels of its bottom")
    rule = _transposed_size if transposed else _out_size
    spatial = bottoms[0][axis + 1 :]
    both = map(sum, zip(g.pad, g.pad_end, strict=True))
    sizes = tuple(map(rule, spatial, g.kernel, g.stride, both, g.dilation))
    if any(one < 1 for one in sizes):
        raise ShapeError(f"kernel {text(g.kernel)} does not fit the bottom {text(bottoms[0])}")
    return ((*bottoms[0][:axis], p.num_output, *sizes),) * p.n_tops


def _weight_shape(p: ConvParams, bottom: Shape, transposed: bool) -> Shape:
    axis, g = geometry(p, bottom)
    channels = bottom[axis]
    if transposed:
        return (channels, p.num_output // p.group, *g.kernel)
    return (p.num_output, channels // p.group, *g.kernel)


def _blobs(p: ConvParams, bottoms: Shapes, transposed: bool) -> Shapes:
    weight = _weight_shape(p, bottoms[0], transposed)
    return (weight, (p.num_output,)) if p.bias else (weight,)


def _macs(p: ConvParams, bottoms: Shapes, tops: Shapes, transposed: bool) -> int:
    axis, _ = geometry(p, bottoms[0])
    weight = _weight_shape(p, bottoms[0], transposed)
    places = bottoms if transposed else tops
    return sum(prod(weight) * prod(place[:axis]) * prod(place[axis + 1 :]) for place in places)


def _onnx(e: Emitter, p: ConvParams, transposed: bool) -> None:
    axis, g = geometry(p, e.in_shapes[0])
    weight = e.blob(0)
    for index, (source, to) in enumerate(zip(e.inputs, e.outputs, strict=True)):
        if not g.kernel:
            _pointless(e, p, index, axis, transposed)
        elif axis == 1:
            _convolve(e, p, g, source, weight, to, transposed)
        else:
            _merged_batch(e, p, g, index, axis, weight, transposed)


def _channels(c: Channels, p: ConvParams, transposed: bool) -> None:
    """Filters make channels; a depthwise one goes with the channel it reads, groups stay equally large."""
    axis, _ = geometry(p, c.in_shapes[0])
    ins = [c.places(i, axis) for i in range(len(c.bottoms))]
    c.tie(*ins)
    filters, read = c.own(p.num_output), ins[0]
    by_row, by_column = (read, filters) if transposed else (filters, read)
    c.cut(0, 0, by_row)
    if p.group == 1:
        c.cut(0, 1, by_column)
    elif len(read) == p.group:
        c.depthwise = True
        c.tie(filters, np.repeat(read, p.num_output // p.group))
        c.setting(("convolution_param",), "group", read)
    else:
        blocks = read.reshape(p.group, -1), filters.reshape(p.group, -1)
        for one in blocks:
            c.blocks(one)
        c.cut(0, 1, blocks[transposed])
    if p.bias:
        c.cut(1, 0, filters)
    c.setting(("convolution_param",), "num_output", filters)
    for i in range(p.n_tops):
        c.top(i, axis, filters)


def _convolve(
    e: Emitter, p: ConvParams, g: Geometry, source: str, weight: str, to: str | None, transposed: bool
) -> str:
    bias = (e.blob(1),) if p.bias else ()
    attributes = {
        "kernel_shape": g.kernel,
        "strides": g.stride,
        "pads": g.pad + g.pad_end,
        "dilations": g.dilation,
        "group": p.group,
    }
    return e.node("ConvTranspose" if transposed else "Conv", source, weight, *bias, to=to, **attributes)


def _merged_batch(
    e: Emitter, p: ConvParams, g: Geometry, i: int, axis: int, weight: str, transposed: bool
) -> None:
    """The channel axis is not 1: the axes before it are one batch to the kernel."""
    shape, out, varies = e.in_shapes[i], e.out_shapes[i], e.dynamic_in[i]
    batch = (prod(shape[:axis]), *shape[axis:])
    merged = e.reshape(e.inputs[i], i, batch, (any(varies[:axis]), *varies[axis:]))
    made = _convolve(e, p, g, merged, weight, None, transposed)
    e.static(i, range(1, len(shape)), "a convolution along another axis than 1")
    e.node("Reshape", made, e.ints((-1, *out[1:]), "shape"), to=e.outputs[i])


def _pointless(e: Emitter, p: ConvParams, i: int, axis: int, transposed: bool) -> None:
    """No spatial axis is left: a matrix product over the channel axis, the last one."""
    matrix = e.blobs[0].reshape(e.blobs[0].shape[0], -1)
    dense = np.zeros((e.in_shapes[i][axis], p.num_output), np.float32)
    rows, columns = dense.shape[0] // p.group, dense.shape[1] // p.group
    for k in range(p.group):
        block = matrix[k * rows : (k + 1) * rows] if transposed else matrix[k * columns : (k + 1) * columns].T
        dense[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] = block
    product = e.node("MatMul", e.inputs[i], e.const(dense, "matrix"), to=None if p.bias else e.outputs[i])
    if p.bias:
        e.node("Add", product, e.blob(1), to=e.outputs[i])


def _spec(transposed: bool) -> LayerSpec:
    return LayerSpec(
        params=read,
        infer=lambda p, bottoms: _infer(p, bottoms, transposed),
        blobs=lambda p, bottoms: _blobs(p, bottoms, transposed),
        macs=lambda p, bottoms, tops: _macs(p, bottoms, tops, transposed),
        onnx=lambda e, p: _onnx(e, p, transposed),
        bottoms=(1, None),
        tops=(1, None),
        channels=lambda c, p: _channels(c, p, transposed),
        filters=True,
        understood=SIDES,
    )


SPECS = {"Convolution": _spec(transposed=False), "Deconvolution": _spec(transposed=True)}
