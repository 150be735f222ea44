"""Convolution, Deconvolution, InnerProduct, Embed, Im2col."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedError
from ..layers.conv import ConvParams, Geometry, geometry
from ..layers.dense import DenseParams
from ..layers.indexing import EmbedParams
from ..layers.spec import canonical_axis
from .base import Call, Make, Tensors, of_call, whole

_CONVOLVE: tuple[Callable[..., Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


def _conv(transposed: bool) -> Make:
    def forward(call: Call, p: ConvParams) -> Tensors:
        return [_one(x, p, call.blobs, transposed) for x in call.inputs]

    return of_call(forward)


def _one(x: Tensor, p: ConvParams, blobs: Tensors, transposed: bool) -> Tensor:
    axis, g = geometry(p, tuple(x.shape))
    bias = blobs[1] if p.bias else None
    if not g.kernel:
        return _pointless(x, p, blobs[0], bias, axis, transposed)
    if len(g.kernel) > len(_CONVOLVE):
        raise UnsupportedError(f"{len(g.kernel)} spatial axes; training takes at most {len(_CONVOLVE)}")
    merged = x.reshape(prod(x.shape[:axis]), *x.shape[axis:])
    made = (_transposed if transposed else _convolved)(merged, p, g, blobs[0], bias)
    return made.reshape(*x.shape[:axis], *made.shape[1:])


def _convolved(x: Tensor, p: ConvParams, g: Geometry, weight: Tensor, bias: Tensor | None) -> Tensor:
    pad = g.pad
    if g.pad != g.pad_end:
        sides = [one for pair in zip(reversed(g.pad), reversed(g.pad_end), strict=True) for one in pair]
        x, pad = functional.pad(x, sides), (0,) * len(g.pad)
    return _CONVOLVE[len(g.kernel) - 1](x, weight, bias, g.stride, pad, g.dilation, p.group)


def _transposed(x: Tensor, p: ConvParams, g: Geometry, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Both pads are cut off the full result, each side its own."""
    operate = _TRANSPOSED[len(g.kernel) - 1]
    if g.pad == g.pad_end:
        return operate(x, weight, bias, g.stride, g.pad, 0, p.group, g.dilation)
    made = operate(x, weight, bias, g.stride, 0, 0, p.group, g.dilation)
    for i, (front, end) in enumerate(zip(g.pad, g.pad_end, strict=True)):
        made = made.narrow(2 + i, front, made.shape[2 + i] - front - end)
    return made


def _pointless(
    x: Tensor, p: ConvParams, weight: Tensor, bias: Tensor | None, axis: int, transposed: bool
) -> Tensor:
    """No spatial axis is left: a matrix product over the channel axis, the last one, group by group."""
    rows = weight.reshape(p.group, -1, weight.shape[1])
    rows = rows.transpose(1, 2) if transposed else rows
    split = x.reshape(*x.shape[:axis], p.group, -1)
    made = torch.einsum("...gi,goi->...go", split, rows).flatten(-2)
    return made if bias is None else made + bias


def _depthwise(call: Call, p: ConvParams) -> Tensors:
    """One filter a channel, whatever num_output and group say."""
    channels = call.inputs[0].shape[1]
    settled = replace(p, num_output=channels, group=channels, axis=1)
    return [_one(call.inputs[0], settled, call.blobs, transposed=False)]


def _dense(call: Call, p: DenseParams) -> Tensors:
    (x,) = call.inputs
    axis = canonical_axis(p.axis, x.dim())
    weight = call.blobs[0].t() if p.transpose else call.blobs[0]
    rows = x.reshape(prod(x.shape[:axis]), -1)
    made = functional.linear(rows, weight, call.blobs[1] if p.bias else None)
    return (made.reshape(*x.shape[:axis], p.num_output),)


def _embed(call: Call, p: EmbedParams) -> Tensors:
    made = functional.embedding(whole(call.inputs[0]), call.blobs[0])
    return (made + call.blobs[1] if p.bias else made,)


def _im2col(call: Call, p: ConvParams) -> Tensors:
    (x,) = call.inputs
    axis, g = geometry(p, tuple(x.shape))
    if len(g.kernel) != 2:
        raise UnsupportedError(f"Im2col over {len(g.kernel)} axes; training takes 2")
    merged = x.reshape(prod(x.shape[:axis]), *x.shape[axis:])
    made = functional.unfold(merged, g.kernel, g.dilation, g.pad, g.stride)
    return (made.reshape(call.tops()[0]),)


TORCH: dict[str, Make] = {
    "Convolution": _conv(transposed=False),
    "Deconvolution": _conv(transposed=True),
    "DepthwiseConvolution": _conv(transposed=False),
    "ConvolutionDepthwise": of_call(_depthwise),
    "InnerProduct": of_call(_dense),
    "Embed": of_call(_embed),
    "Im2col": of_call(_im2col),
}
