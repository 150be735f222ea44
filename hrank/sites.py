"""Where in a net the maps of a convolution's filters are read: its sites.

HRank reads them behind the ReLU: before it nearly every map has full rank (Lin et al., CVPR 2020, section 3.2).
From a convolution the walk follows its channels through layers that treat each channel alone, through sums and
concatenations, to the first ReLU in network order. So it finds the ReLU after BatchNorm and Scale, the one after
the addition of a residual block, and in pre-activation nets a channel range of the next block's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from caffe_proto.errors import UsageError
from caffe_proto.graph import Node, Value
from caffe_proto.layers.conv import ConvParams
from caffe_proto.layers.dense import DenseParams
from caffe_proto.layers.norm import AffineParams
from caffe_proto.layers.pool import PoolParams
from caffe_proto.layers.shape import VIEW, EltwiseParams, FlattenParams
from caffe_proto.layers.spec import Arrays, canonical_axis, text
from caffe_proto.layers.variants import MaskedParams
from caffe_proto.net import nearest
from caffe_proto.shape_inference import Shaped

from .criteria import Evidence, filters

At = Literal["relu", "after_pool", "conv"]
PLACES: tuple[At, ...] = ("relu", "after_pool", "conv")

_POINTWISE = frozenset(
    "BatchNorm BN Scale Bias ReLU ReLU6 PReLU ELU Clip Swish Sigmoid TanH AbsVal BNLL Power Exp Log Threshold"
    " Sparsify SymmetricRectify Dropout".split()
)
_PLANEWISE = _POINTWISE | {"Pooling", "LRN", "Split", "Crop", "Interp", "Upsample", VIEW}


@dataclass(frozen=True)
class Site:
    """Channels ``start`` to ``stop`` of ``value``, which are the maps of layer ``layer``'s filters there.

    ``hw``: size of a map. ``rectified``: behind a ReLU. ``why`` names the place, ``doubt`` says why ranks mean little
    there, "" where they do.
    """

    layer: str
    value: Value
    start: int
    stop: int
    hw: tuple[int, int]
    rectified: bool
    why: str
    doubt: str = ""

    @property
    def channels(self) -> slice:
        """The channels as a slice of axis 1."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Sites:
    """A site for each convolution by layer name, in net order, and for the others the reason why there is none."""

    found: dict[str, Site]
    refused: dict[str, str]

    def of(self, layer: str) -> Site:
        """The site of a layer; raises UsageError where it has none."""
        if layer in self.found:
            return self.found[layer]
        if layer in self.refused:
            raise UsageError(f"its maps cannot be ranked: {self.refused[layer]}", layer=layer)
        raise UsageError(f'the net has no convolution "{layer}"', hint=nearest(layer, list(self.found)))


class _Read(NamedTuple):
    """Node ``reader`` reads our channels: those from ``start`` on of the ``total`` of ``value``.

    ``via``: the first sum or concatenation on the way.
    """

    reader: int
    value: Value
    start: int
    total: int
    via: str


def find_sites(shaped: Shaped, at: At = "relu") -> Sites:
    """The sites of all convolutions and deconvolutions.

    "relu": the first ReLU. "after_pool": as the authors of HRank, who read the pooled maps where a MAX pooling, or a
    concatenation and then one, is all that reads the ReLU, and leaves more than one number a map. "conv": the
    convolution's own top. Where no ReLU follows, the last of the layers behind that treat every number alone is
    taken, with a doubt. Raises UsageError on another ``at``.
    """
    if at not in PLACES:
        raise UsageError(f'there is no site "{at}"', hint="use " + ", ".join(PLACES))
    found: dict[str, Site] = {}
    refused: dict[str, str] = {}
    for index, node in enumerate(shaped.graph.nodes):
        if _convolution(node) is None:
            continue
        if index in shaped.unknown:
            refused[node.name] = f"its shape is not known ({shaped.unknown[index].message})"
        elif len(shaped.shapes[Value(index, 0)]) != 4:
            shape = shaped.shapes[Value(index, 0)]
            refused[node.name] = f"its top is {text(shape)}, maps of two axes are needed"
        else:
            found[node.name] = _site(shaped, index, at)
    return Sites(found, refused)


def evidence(shaped: Shaped, blobs: Mapping[int, Arrays], layer: str, seed: int = 0) -> Evidence:
    """What the weights alone say of a convolution's filters; ``blobs`` as ``binding.bind`` gives them.

    ``readers``: every convolution and fully connected layer that reads the channels, behind sums too. ``gamma``:
    factors of the first Scale (or the forks' BN) that the channels meet. Raises UsageError where the net has no such
    convolution of known shape.
    """
    names = {node.name: i for i, node in enumerate(shaped.graph.nodes) if _convolution(node) is not None}
    if layer not in names or names[layer] in shaped.unknown:
        raise UsageError(f'the net has no convolution "{layer}"', hint=nearest(layer, list(names)))
    index = names[layer]
    node, p = shaped.graph.nodes[index], _convolution(shaped.graph.nodes[index])
    assert p is not None
    channels = shaped.shapes[Value(index, 0)][p.axis]
    weight = filters(_weight(node, blobs[index]), transposed=_transposed(node), groups=p.group)
    gamma: np.ndarray | None = None
    readers = []
    for read in _reads(shaped, index):
        if gamma is None:
            gamma = _factors(shaped, blobs, read, channels)
        taken = _weights_reading(shaped, blobs, read, channels)
        if taken is not None:
            readers.append(taken)
    return Evidence(weight, tuple(readers), gamma, channels=channels, seed=seed)


def _convolution(node: Node) -> ConvParams | None:
    """The settings of a convolution of any kind."""
    p = node.params.inner if isinstance(node.params, MaskedParams) else node.params
    return p if isinstance(p, ConvParams) else None


def _transposed(node: Node) -> bool:
    return node.layer.type == "Deconvolution"


def _site(shaped: Shaped, index: int, at: At) -> Site:
    name, own = shaped.graph.nodes[index].name, Value(index, 0)
    channels = shaped.shapes[own][1]
    if at == "conv":
        return _checked(shaped, name, own, 0, channels, f'the top of "{name}"', False)
    for read in _reads(shaped, index):
        node = shaped.graph.nodes[read.reader]
        value = Value(read.reader, 0)
        if not _rectifies(node) or len(shaped.shapes[value]) != 4:
            continue
        behind = f', behind "{read.via}"' if read.via else ""
        start, why = read.start, f'{node.layer.type} "{node.name}"{behind}'
        if at == "after_pool":
            value, start, why = _pooled(shaped, value, start, why)
        return _checked(shaped, name, value, start, channels, why, True)
    value, why = _end_of_chain(shaped, own)
    return _checked(shaped, name, value, 0, channels, why, False)


def _checked(
    shaped: Shaped, name: str, value: Value, start: int, channels: int, why: str, rectified: bool
) -> Site:
    """The site, with the doubts that its maps raise."""
    total, h, w = shaped.shapes[value][1:]
    if channels != total:
        why += f", channels {start} to {start + channels - 1} of {total}"
    doubt = ""
    if min(h, w) == 1:
        doubt = f"its maps are {h} x {w}, so their rank is 0 or 1"
    elif not rectified:
        doubt = "no ReLU stands before it, so nearly all ranks are full"
    return Site(name, value, start, start + channels, (h, w), rectified, why, doubt)


def _rectifies(node: Node) -> bool:
    """Whether a layer makes 0 of all that is negative."""
    kind = node.layer.type
    return (
        kind == "ReLU6" or (kind == "ReLU" and node.params == 0) or (kind == "Clip" and node.params[0] == 0)
    )


def _reads(shaped: Shaped, index: int) -> Iterator[_Read]:
    """Every reading of a convolution's channels, in network order, those of its other tops after the first left out."""
    graph = shaped.graph
    heap: list[_Read] = []
    seen: set[_Read] = set()

    def push(value: Value, start: int, total: int, via: str) -> None:
        for reader in graph.consumers[value]:
            read = _Read(reader, value, start, total, via)
            if read._replace(via="") not in seen and reader not in shaped.unknown:
                seen.add(read._replace(via=""))
                heappush(heap, read)

    own = Value(index, 0)
    push(own, 0, shaped.shapes[own][1], "")
    while heap:
        read = heappop(heap)
        yield read
        for onward in _onward(shaped, read):
            push(*onward)


def _onward(shaped: Shaped, read: _Read) -> Iterator[tuple[Value, int, int, str]]:
    """Where a reader hands our channels on: value, start, total, via."""
    node = shaped.graph.nodes[read.reader]
    before, top = shaped.shapes[read.value], Value(read.reader, 0)
    if node.layer.type == "Concat":
        if canonical_axis(node.params, len(before)) == 1:
            sizes = [shape[1] for shape in shaped.bottoms(read.reader)]
            for i, value in enumerate(node.inputs):
                if value == read.value and read.total == before[1]:
                    yield top, read.start + sum(sizes[:i]), sum(sizes), read.via or node.name
    elif isinstance(node.params, EltwiseParams) or node.layer.type == "Axpy":
        if shaped.shapes[top] == before:
            yield top, read.start, read.total, read.via or node.name
    elif isinstance(node.params, FlattenParams):
        shape = shaped.shapes[top]
        if len(shape) == 2 and shape[0] == before[0]:
            yield top, read.start, read.total, read.via
    elif node.layer.type in _PLANEWISE and node.inputs[0] == read.value:
        tops = len(node.layer.tops) if node.layer.type == "Split" else 1
        for i in range(tops):
            value = Value(read.reader, i)
            if shaped.shapes[value][1:2] == before[1:2]:
                yield value, read.start, read.total, read.via


def _only_reader(shaped: Shaped, value: Value) -> int | None:
    readers = shaped.graph.consumers[value]
    return readers[0] if len(readers) == 1 and readers[0] not in shaped.unknown else None


def _pooled(shaped: Shaped, value: Value, start: int, why: str) -> tuple[Value, int, str]:
    """The pooled maps, where MAX pooling is all that reads the value or a concatenation it goes into."""
    here, offset = value, start
    while (reader := _only_reader(shaped, here)) is not None:
        node = shaped.graph.nodes[reader]
        top = Value(reader, 0)
        if isinstance(node.params, PoolParams):
            if node.params.method == "MAX" and not node.params.mask and min(shaped.shapes[top][2:]) > 1:
                return top, offset, f'{node.layer.type} "{node.name}" behind {why}'
            break
        if node.layer.type != "Concat":
            break
        moved = list(_onward(shaped, _Read(reader, here, offset, shaped.shapes[here][1], "")))
        if not moved:
            break
        here, offset = moved[0][:2]
    return value, start, why


def _end_of_chain(shaped: Shaped, value: Value) -> tuple[Value, str]:
    """The last value behind a convolution that layers make which treat every number alone."""
    while (reader := _only_reader(shaped, value)) is not None:
        node = shaped.graph.nodes[reader]
        if node.layer.type not in _POINTWISE or node.inputs[0] != value:
            break
        value = Value(reader, 0)
    node = shaped.graph.nodes[value.node]
    return value, f'{node.layer.type} "{node.name}"'


def _weight(node: Node, stored: Arrays) -> np.ndarray:
    """The weight that a layer computes with: times its mask where it has one."""
    if isinstance(node.params, MaskedParams):
        return stored[0] * stored[1 + node.params.inner.bias]
    return stored[0]


def _factors(shaped: Shaped, blobs: Mapping[int, Arrays], read: _Read, channels: int) -> np.ndarray | None:
    """The learnt factors of our channels, where the reader is a Scale of its own blob, or a fork's BN."""
    node = shaped.graph.nodes[read.reader]
    learnt = isinstance(node.params, AffineParams) and node.params.own and node.layer.type == "Scale"
    if not learnt and node.layer.type != "BN":
        return None
    if read.reader not in blobs or blobs[read.reader][0].size != read.total:
        return None
    return blobs[read.reader][0].reshape(-1)[read.start : read.start + channels].astype(np.float64)


def _weights_reading(
    shaped: Shaped, blobs: Mapping[int, Arrays], read: _Read, channels: int
) -> np.ndarray | None:
    """The reader's weights that our channels meet, (channels, n), where it is a convolution or fully connected."""
    node = shaped.graph.nodes[read.reader]
    if read.reader not in blobs:
        return None
    p = _convolution(node)
    ours = slice(read.start, read.start + channels)
    if p is not None:
        weight = _weight(node, blobs[read.reader])
        turned = filters(weight, transposed=not _transposed(node), groups=p.group)  # input channel first
        return turned[ours].reshape(channels, -1)
    dense = node.params.inner if isinstance(node.params, MaskedParams) else node.params
    if not isinstance(dense, DenseParams) or canonical_axis(dense.axis, len(shaped.shapes[read.value])) != 1:
        return None
    weight = _weight(node, blobs[read.reader])
    matrix = weight if dense.transpose else weight.T  # (inputs, outputs), channels in blocks
    width = prod(shaped.shapes[read.value][1:]) // read.total
    return matrix.reshape(read.total, width * matrix.shape[1])[ours]
