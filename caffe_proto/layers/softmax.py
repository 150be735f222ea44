"""Softmax along an axis."""

from __future__ import annotations

from .channels import Channels, same
from .emit import Emitter
from .spec import LayerSpec, Shapes, canonical_axis


def _infer(axis: int, bottoms: Shapes) -> Shapes:
    canonical_axis(axis, len(bottoms[0]))
    return (bottoms[0],)


def _onnx(e: Emitter, axis: int) -> None:
    e.node("Softmax", e.inputs[0], to=e.outputs[0], axis=canonical_axis(axis, len(e.in_shapes[0])))


def _channels(c: Channels, axis: int) -> None:
    labels = c.bottoms[0]
    if labels is not None and labels.axis == canonical_axis(axis, len(c.in_shapes[0])):
        c.stay(0, "weighs them against one another")
    else:
        same(c, None)


SPECS = {
    "Softmax": LayerSpec(
        params=lambda r: r["softmax_param"]["axis"], infer=_infer, onnx=_onnx, channels=_channels
    )
}
