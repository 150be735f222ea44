"""Where a constant that is added to the channels of a layer's output can be put, so that the net stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .graph import Graph, Value
from .layers.conv import ConvParams
from .layers.dense import DenseParams
from .layers.norm import AffineParams, BatchNormParams
from .layers.spec import Arrays
from .shape_inference import Shaped

Changed = tuple[int, Arrays]


def added(shaped: Shaped, blobs: Mapping[int, Arrays], index: int, delta: np.ndarray) -> Changed | None:
    """The node whose blobs make node ``index`` give ``y + delta``, (d,), and these blobs; None where there is none.

    That is the layer's own bias; without one the mean of a BatchNorm, the shift of a Scale or Bias that is the only
    reader. Weights that layers share are left alone.
    """
    graph = shaped.graph
    if _is_shared(graph, index):
        return None
    own = graph.nodes[index].params
    if isinstance(own, ConvParams | DenseParams) and own.bias:
        return index, _with(blobs[index], 1, blobs[index][1] + delta)
    return _behind(shaped, blobs, Value(index, 0), delta)


def _behind(shaped: Shaped, blobs: Mapping[int, Arrays], value: Value, delta: np.ndarray) -> Changed | None:
    """The same for what reads a value."""
    graph = shaped.graph
    readers = graph.consumers[value]
    if len(readers) != 1 or graph.blob(value) in graph.cut:
        return None
    (reader,) = readers
    node = graph.nodes[reader]
    if reader not in blobs or len(node.inputs) != 1 or _is_shared(graph, reader):
        return None
    stored = blobs[reader]
    if isinstance(node.params, BatchNormParams) and node.layer.type == "BatchNorm":
        if not node.params.global_stats:
            return None
        count = float(stored[2].reshape(-1)[0])  # the stored sums are count times the mean
        return (reader, _with(stored, 0, stored[0] - delta * count)) if count else None
    if isinstance(node.params, AffineParams) and _is_by_channel(shaped, reader, len(delta)):
        if node.layer.type == "Bias":
            return reader, _with(stored, 0, stored[0] + delta)
        scaled = stored[0].astype(np.float64) * delta
        if node.params.bias:
            return reader, _with(stored, 1, stored[1] + scaled)
        return _behind(shaped, blobs, Value(reader, 0), scaled)
    return None


def _is_by_channel(shaped: Shaped, index: int, channels: int) -> bool:
    """Whether a Scale or Bias has one number a channel of axis 1."""
    p: Any = shaped.graph.nodes[index].params
    shapes, ndim = shaped.blobs(index), len(shaped.bottoms(index)[0])
    return bool(shapes) and p.axis in (1, 1 - ndim) and shapes[0] == (channels,)


def _is_shared(graph: Graph, index: int) -> bool:
    """Whether another layer has blobs of this one."""
    names = {spec.name for spec in graph.nodes[index].layer.param_specs if spec.name}
    return any(
        spec.name in names
        for other, node in enumerate(graph.nodes)
        if other != index
        for spec in node.layer.param_specs
    )


def _with(stored: Arrays, position: int, array: np.ndarray) -> Arrays:
    made = np.asarray(array, np.float32).reshape(stored[position].shape)
    return (*stored[:position], made, *stored[position + 1 :])
