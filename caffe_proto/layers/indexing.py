"""Layers that look up, choose or lay out: Embed, BatchReindex, Filter, Parameter, Im2col; and HDF5Output."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ..errors import NetError, ShapeError
from . import conv
from .channels import Channels, ignored, items
from .emit import Emitter
from .spec import LayerSpec, Request, Shape, Shapes, at_least, legacy, text


@dataclass(frozen=True)
class EmbedParams:
    num_output: int
    input_dim: int
    bias: bool


def _read_embed(request: Request) -> EmbedParams:
    p = request["embed_param"]
    num_output = at_least(p["num_output"], 1, "num_output")
    return EmbedParams(num_output, at_least(p["input_dim"], 1, "input_dim"), p["bias_term"])


def _embed_infer(p: EmbedParams, bottoms: Shapes) -> Shapes:
    return ((*bottoms[0], p.num_output),)


def _embed_blobs(p: EmbedParams, _bottoms: Shapes) -> Shapes:
    weight = (p.input_dim, p.num_output)
    return (weight, (p.num_output,)) if p.bias else (weight,)


def _embed_channels(c: Channels, p: EmbedParams) -> None:
    c.stay(0, "looks them up")
    filters = c.own(p.num_output)
    c.cut(0, 1, filters)
    if p.bias:
        c.cut(1, 0, filters)
    c.setting(("embed_param",), "num_output", filters)
    c.top(0, len(c.in_shapes[0]), filters)


def _embed(e: Emitter, p: EmbedParams) -> None:
    """W[x] + b: a look-up, free of multiplications."""
    index = e.cast(e.inputs[0], "int64")
    row = e.node("Gather", e.blob(0), index, to=None if p.bias else e.outputs[0], axis=0)
    if p.bias:
        e.node("Add", row, e.blob(1), to=e.outputs[0])


def _batch_reindex_infer(_params: None, bottoms: Shapes) -> Shapes:
    shape, index = bottoms
    if len(index) != 1:
        raise ShapeError(f"the second bottom must have 1 axis, found {text(index)}")
    if not shape:
        raise ShapeError("the first bottom has no axis to choose from")
    return ((*index, *shape[1:]),)


def _batch_reindex(e: Emitter, _params: None) -> None:
    """x[index]"""
    e.node("Gather", e.inputs[0], e.cast(e.inputs[1], "int64"), to=e.outputs[0], axis=0)


def _read_filter(request: Request) -> None:
    if request.n_tops != request.n_bottoms - 1:
        counts = f"{request.n_bottoms} bottoms and {request.n_tops} tops"
        raise NetError(f"{counts}; every bottom but the last makes one top")


def _filter_infer(_params: None, bottoms: Shapes) -> Shapes:
    """All items, as Caffe assumes until it has seen the selector: how many stay is known at run time only."""
    *blobs, selector = bottoms
    if prod(selector[1:]) != 1 or not selector:
        raise ShapeError(f"the selector {text(selector)} must hold one number for each item")
    for shape in blobs:
        if shape[:1] != selector[:1]:
            raise ShapeError(f"{text(shape)} and the selector {text(selector)} differ in their first axis")
    return tuple(blobs)


def _filter(e: Emitter, _params: None) -> None:
    """The items whose selector is not 0."""
    chosen = e.node("Reshape", e.cast(e.inputs[-1], "bool"), e.ints([-1], "shape"))
    for source, to in zip(e.inputs, e.outputs, strict=False):
        e.node("Compress", source, chosen, to=to, axis=0)


def _read_parameter(request: Request) -> Shape:
    shape = tuple(request["parameter_param"]["shape"]["dim"])
    for dim in shape:
        at_least(dim, 0, "a dimension of shape")
    return shape


def _parameter(e: Emitter, _shape: Shape) -> None:
    """The learnt blob itself."""
    e.node("Identity", e.blob(0), to=e.outputs[0])


def _read_im2col(request: Request) -> conv.ConvParams:
    """Read the window of convolution_param; its other fields say nothing to Im2col."""
    p = request["convolution_param"]
    kernel, kernel_hw = conv._axes(p, "kernel_size", ("kernel_h", "kernel_w"))
    stride, stride_hw = conv._axes(p, "stride", ("stride_h", "stride_w"))
    pad, pad_hw = conv._axes(p, "pad", ("pad_h", "pad_w"))
    for values, what in ((kernel, "kernel size"), (stride, "stride"), (p["dilation"], "dilation")):
        for value in values:
            at_least(value, 1, what)
    planar = kernel_hw or stride_hw or pad_hw
    return conv.ConvParams(1, kernel, stride, pad, p["dilation"], 1, False, p["axis"], planar, 1)


def _im2col_infer(p: conv.ConvParams, bottoms: Shapes) -> Shapes:
    (shape,) = bottoms
    axis, g = conv.geometry(p, shape)
    if not g.kernel:
        raise ShapeError(f"{text(shape)} has no spatial axis behind axis {axis}")
    (made,) = conv.SPECS["Convolution"].infer(p, bottoms)
    return ((*shape[:axis], shape[axis] * prod(g.kernel), *made[axis + 1 :]),)


def _im2col(e: Emitter, p: conv.ConvParams) -> None:
    """A window's numbers as channels: every spatial axis gathered as (kernel, out), kernels in front."""
    shape, out = e.in_shapes[0], e.out_shapes[0]
    axis, g = conv.geometry(p, shape)
    first, n = axis + 1, len(g.kernel)
    e.static(0, range(axis, len(shape)), "Im2col")
    made = e.inputs[0]
    if any(g.pad):
        pads = ((0,) * first + g.pad) * 2
        made = e.node("Pad", made, e.ints(pads, "pads"))
    for i, (k, s, d) in enumerate(zip(g.kernel, g.stride, g.dilation, strict=True)):
        places = np.arange(k)[:, None] * d + np.arange(out[first + i]) * s
        made = e.node("Gather", made, e.const(places, "places", np.int64), axis=first + 2 * i)
    order = [*range(first), *range(first, first + 2 * n, 2), *range(first + 1, first + 2 * n, 2)]
    e.reshape(e.node("Transpose", made, perm=order), 0, out, e.dynamic_out[0], to=e.outputs[0])


def _im2col_channels(c: Channels, p: conv.ConvParams) -> None:
    """Each channel becomes one for each place of the window."""
    axis, g = conv.geometry(p, c.in_shapes[0])
    c.top(0, axis, np.repeat(c.places(0, axis), prod(g.kernel)))


def _read_hdf5_output(request: Request) -> None:
    p = request["hdf5_output_param"]
    if not p["file_name"]:
        raise NetError("hdf5_output_param needs a file_name", line=p.line())


def _hdf5_output_infer(_params: None, bottoms: Shapes) -> Shapes:
    if legacy(bottoms[0])[0] != legacy(bottoms[1])[0]:
        raise ShapeError(f"bottoms {text(bottoms[0])} and {text(bottoms[1])} differ in their first axis")
    return ()


SPECS = {
    "Embed": LayerSpec(
        params=_read_embed,
        infer=_embed_infer,
        blobs=_embed_blobs,
        onnx=_embed,
        channels=_embed_channels,
    ),
    "BatchReindex": LayerSpec(
        infer=_batch_reindex_infer, onnx=_batch_reindex, bottoms=(2, 2), channels=items
    ),
    "Filter": LayerSpec(
        params=_read_filter,
        infer=_filter_infer,
        onnx=_filter,
        bottoms=(2, None),
        tops=(1, None),
        channels=items,
    ),
    "Parameter": LayerSpec(
        params=_read_parameter,
        infer=lambda shape, _bottoms: (shape,),
        blobs=lambda shape, _bottoms: (shape,),
        onnx=_parameter,
        bottoms=(0, 0),
        channels=ignored,
    ),
    "Im2col": LayerSpec(params=_read_im2col, infer=_im2col_infer, onnx=_im2col, channels=_im2col_channels),
    "HDF5Output": LayerSpec(
        params=_read_hdf5_output, infer=_hdf5_output_infer, onnx=None, bottoms=(2, 2), tops=(0, 0)
    ),
}
