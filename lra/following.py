"""What stands behind a convolution: the affine layers, the activation, the shortcut that its responses meet.

A response fit judges ``act(scale*y + shift + shortcut)``, not y alone: BatchNorm and Scale fold into scale and
shift; in a residual block the other branch is added first (Zhang et al. 2016, section 3; He et al. 2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from caffe_proto.graph import Graph, Node, Value
from caffe_proto.layers.pool import PoolParams
from caffe_proto.layers.shape import EltwiseParams
from caffe_proto.layers.spec import Arrays
from caffe_proto.shape_inference import Shaped

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Following:
    """``scale``, ``shift``: (d,). ``slope``: (d,) of the activation's negative side, None where there is none.

    ``shortcut``: the value added before the activation, or None. ``passed_over``: the type of an activation that
    follows and that no fit knows; then the responses in front of it are what counts.
    """

    scale: Array
    shift: Array
    slope: Array | None = None
    shortcut: Value | None = None
    passed_over: str = ""


_OTHER_ACTIVATIONS = frozenset(
    {"AbsVal", "BNLL", "ELU", "Exp", "Log", "Power", "Sigmoid", "Swish", "TanH", "Threshold"}
)


def following(shaped: Shaped, blobs: Mapping[int, Arrays], index: int) -> Following:
    """Look behind node ``index`` as long as exactly one layer reads each value."""
    graph = shaped.graph
    value = Value(index, 0)
    channels = shaped.shapes[value][1]
    found = Following(np.ones(channels), np.zeros(channels))
    pooled = False
    while True:
        reader = _only_reader(graph, value)
        if reader is None:
            return found
        node = graph.nodes[reader]
        affine = _affine(shaped, blobs, reader) if not pooled and found.shortcut is None else None
        other = _shortcut(node, value) if not pooled and found.shortcut is None else None
        if affine is not None:
            scale, shift = affine
            found = replace(found, scale=found.scale * scale, shift=found.shift * scale + shift)
        elif other is not None:
            found = replace(found, shortcut=other)
        elif isinstance(node.params, PoolParams) and node.params.method == "MAX" and not node.params.mask:
            pooled = True  # the largest of activations is the activation of the largest
        else:
            unknown = node.layer.type if node.layer.type in _OTHER_ACTIVATIONS else ""
            return replace(found, slope=_slope(node, blobs.get(reader, ()), channels), passed_over=unknown)
        value = Value(reader, 0)


def _only_reader(graph: Graph, value: Value) -> int | None:
    readers = graph.consumers[value]
    return readers[0] if len(readers) == 1 else None


def _affine(shaped: Shaped, blobs: Mapping[int, Arrays], index: int) -> tuple[Array, Array] | None:
    node = shaped.graph.nodes[index]
    if node.spec is None or len(node.inputs) != 1:
        return None
    return node.spec.affine(node.params, blobs.get(index, ()), shaped.bottoms(index))


def _shortcut(node: Node, value: Value) -> Value | None:
    """The other bottom of a plain sum of two."""
    if not isinstance(node.params, EltwiseParams) or node.params.operation != "SUM" or len(node.inputs) != 2:
        return None
    if any(coeff != 1 for coeff in node.params.coeff) or node.params.in_place:
        return None
    return node.inputs[1] if node.inputs[0] == value else node.inputs[0]


def _slope(node: Node, blobs: Arrays, channels: int) -> Array | None:
    """The slopes of ReLU (0), leaky ReLU and PReLU; None for whatever else follows."""
    if node.layer.type == "ReLU":
        return np.full(channels, float(node.params))
    if node.layer.type == "PReLU" and blobs:
        return np.broadcast_to(blobs[0].reshape(-1).astype(np.float64), (channels,))
    return None
