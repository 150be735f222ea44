"""InnerProduct: the fully connected layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .channels import STAYS, Channels
from .emit import Emitter
from .spec import LayerSpec, Request, Shapes, at_least, canonical_axis, size


@dataclass(frozen=True)
class DenseParams:
    num_output: int
    bias: bool
    axis: int
    transpose: bool


def read(request: Request) -> DenseParams:
    """Read inner_product_param; raises NetError where Caffe would refuse it."""
    p = request["inner_product_param"]
    return DenseParams(at_least(p["num_output"], 1, "num_output"), p["bias_term"], p["axis"], p["transpose"])


def _infer(p: DenseParams, bottoms: Shapes) -> Shapes:
    axis = canonical_axis(p.axis, len(bottoms[0]))
    return ((*bottoms[0][:axis], p.num_output),)


def _blobs(p: DenseParams, bottoms: Shapes) -> Shapes:
    axis = canonical_axis(p.axis, len(bottoms[0]))
    inputs = size(bottoms[0][axis:])
    weight = (inputs, p.num_output) if p.transpose else (p.num_output, inputs)
    return (weight, (p.num_output,)) if p.bias else (weight,)


def _macs(p: DenseParams, bottoms: Shapes, _tops: Shapes) -> int:
    return size(bottoms[0]) * p.num_output


def _channels(c: Channels, p: DenseParams) -> None:
    """Rows are the layer's own; columns the places of the bottom, channel by channel where it has h and w."""
    shape = c.in_shapes[0]
    axis = canonical_axis(p.axis, len(shape))
    inputs = size(shape[axis:])
    labels = c.refolded(0, (*shape[:axis], inputs))
    if labels is not None and labels.axis < axis:
        c.stay(0, "works along another axis")
    columns = labels.ids if labels is not None and labels.axis == axis else np.full(inputs, STAYS)
    filters = c.own(p.num_output)
    c.cut(0, int(p.transpose), filters)
    c.cut(0, int(not p.transpose), columns)
    if p.bias:
        c.cut(1, 0, filters)
    c.setting(("inner_product_param",), "num_output", filters)
    c.top(0, axis, filters)


def _onnx(e: Emitter, p: DenseParams) -> None:
    """Flatten to (M, K), Gemm, and back to the leading axes where they are not one."""
    shape, varies = e.in_shapes[0], e.dynamic_in[0]
    axis = canonical_axis(p.axis, len(shape))
    e.static(0, range(axis, len(shape)), "an InnerProduct over these axes")
    rows, columns = size(shape[:axis]), size(shape[axis:])
    source = e.inputs[0]
    if len(shape) != 2 or axis != 1:
        source = (
            e.node("Flatten", source, axis=axis)
            if axis == 1
            else e.reshape(source, 0, (rows, columns), (any(varies[:axis]), False))
        )
    weight = e.blob(0, (columns, p.num_output) if p.transpose else (p.num_output, columns))
    bias = (e.blob(1, (p.num_output,)),) if p.bias else ()
    back = axis != 1
    made = e.node(
        "Gemm", source, weight, *bias, to=None if back else e.outputs[0], transB=0 if p.transpose else 1
    )
    if back:
        target = [-1 if varies[i] else shape[i] for i in range(axis)]
        e.node("Reshape", made, e.ints([*target, p.num_output], "out"), to=e.outputs[0])


SPECS = {
    "InnerProduct": LayerSpec(
        params=read,
        infer=_infer,
        blobs=_blobs,
        macs=_macs,
        onnx=_onnx,
        channels=_channels,
        filters=True,
    )
}
