"""Two forms of a net beside one another: which values of a decomposed net stand for values of the original."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from caffe_proto.binding import bind
from caffe_proto.errors import Error, UnsupportedError, UsageError
from caffe_proto.graph import Graph, Node, Value, build
from caffe_proto.layers.spec import Arrays
from caffe_proto.model import Model
from caffe_proto.rewrite import Narrow
from caffe_proto.shape_inference import Shaped, infer

Array = np.ndarray

BlobKey = tuple[str, int]
"""A blob: its layer and its number there, or the name it is shared by and -1."""

Moving = Mapping[int, Mapping[int, BlobKey]]
"""By node and number, the key of each blob that moves."""

_BATCH = 32
_LARGEST = 2**29  # bytes of all values of a batch in one net
_MOVABLE = frozenset({"Convolution", "InnerProduct", "Deconvolution", "DepthwiseConvolution"})
_PASSED = frozenset({"BatchNorm", "Scale", "Bias", "Eltwise", "Pooling", "Dropout"})
_ACTIVATIONS = frozenset("ReLU ReLU6 PReLU ELU Clip Swish Sigmoid TanH AbsVal BNLL".split())
_STRIPPED = frozenset({"Softmax", "ArgMax", "Accuracy", "Silence"})


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two nets as it runs over images in phase TEST; ``fed``: the values that images are given for."""

    model: Model
    shaped: Shaped
    blobs: Mapping[int, Arrays]
    fed: frozenset[Value]

    @classmethod
    def of(cls, model: Model, images: Mapping[str, Array]) -> Side:
        """A net at a batch size whose values fit in memory. Raises UsageError where it has no weights."""
        if model.weights is None:
            raise UsageError("there are no weights to polish", path=model.net.path)
        tested = model.in_state(dataclasses.replace(model.net.state, phase="TEST"))
        graph = build(tested.net)
        one = {name: (1, *array.shape[1:]) for name, array in images.items()}
        size = sum(4 * prod(shape) for shape in infer(graph, one, partial=True).shapes.values())
        batch = max(1, min(_BATCH, _LARGEST // max(1, size)))
        shaped = infer(graph, {name: (batch, *shape[1:]) for name, shape in one.items()}, partial=True)
        fed = frozenset(value for value in graph.sources if graph.blob(value) in images)
        return cls(tested, shaped, bind(shaped, model.weights), fed)

    @property
    def graph(self) -> Graph:
        """The graph of the net."""
        return self.shaped.graph

    @property
    def batch(self) -> int:
        """Images of a batch."""
        return self.shaped.shapes[next(iter(self.fed))][0]

    @cached_property
    def named(self) -> dict[str, int]:
        """Nodes by their names, where a name stands once."""
        counts = Counter(node.name for node in self.graph.nodes)
        return {node.name: i for i, node in enumerate(self.graph.nodes) if counts[node.name] == 1}

    def key(self, index: int, blob: int) -> BlobKey:
        """What a blob of a node is kept under."""
        specs = self.graph.nodes[index].layer.param_specs
        shared = specs[blob].name if blob < len(specs) else ""
        return (shared, -1) if shared else (self.graph.nodes[index].name, blob)

    def obstacle(self, value: Value, runs: Callable[[Node], bool]) -> Error | None:
        """Why a value cannot be had from the images; None where it can."""
        for index in sorted(self.graph.needed([value], self.fed)):
            node = self.graph.nodes[index]
            if node.problem is not None:
                return node.problem
            if not runs(node):
                what = (
                    "is not fed" if node.spec is not None and node.spec.source else "cannot be run in torch"
                )
                message = f"{node.layer.type} {what}"
                return UnsupportedError(message, path=self.graph.path, line=node.layer.line, layer=node.name)
            if index in self.shaped.unknown:
                return self.shaped.unknown[index]
        return None

    def with_blobs(self, index: int, keys: Mapping[int, BlobKey], moved: Mapping[BlobKey, Array]) -> Narrow:
        """The edit that gives a node the blobs that moved, in the shapes they are stored in."""
        assert self.model.weights is not None
        name = self.graph.nodes[index].name
        stored = self.model.weights[name]
        blobs = [moved[keys[i]].reshape(old.shape) if i in keys else old for i, old in enumerate(stored)]
        return Narrow(name, (), tuple(blobs))


Pair = tuple[Value, Value]


@dataclass(frozen=True, eq=False)
class Matched:
    """Values of the original with those that stand for them, and the blobs of the changed net that move."""

    activations: tuple[Pair, ...]
    outputs: tuple[Pair, ...]
    moving: Moving


def match(whole: Side, cheap: Side, runs: Callable[[Node], bool], *, every_layer: bool = False) -> Matched:
    """What to draw together of an original net and a changed one; ``runs`` says of a layer whether it can be run.

    Outputs are those of the net before softmax, and what layers read that cannot be run; activations what stands
    behind the layers that the changed net has otherwise. Those layers move, or all with filters: ``every_layer``;
    a blob that a layer shares which does not stays.

    Raises the error of the layer that is in the way where no output behind a layer that moves can be had.
    """
    moved = {
        index for index, node in enumerate(cheap.graph.nodes)
        if node.layer.type in _MOVABLE and (every_layer or not _same(node, cheap, whole))
    }  # fmt: skip
    if not moved:
        return Matched((), (), {})
    outputs: list[Pair] = []
    for value in _ends(whole, runs):
        other = _counterpart(whole, cheap, value)
        if other is not None and _behind_any(cheap, other, moved) and cheap.obstacle(other, runs) is None:
            outputs.append((value, other))
    if not outputs:
        raise _obstacle(cheap, moved, runs)
    pairs = dict(outputs)
    for index, node in enumerate(whole.graph.nodes):
        if node.layer.type in _MOVABLE and not _same(node, whole, cheap):
            for top in range(len(node.layer.tops)):
                value = _behind(whole.graph, Value(index, top))
                other = _counterpart(whole, cheap, value)
                if other is not None and not whole.obstacle(value, runs) and not cheap.obstacle(other, runs):
                    pairs.setdefault(value, other)
    activations = tuple((value, other) for value, other in pairs.items() if (value, other) not in outputs)
    return Matched(activations, tuple(outputs), _moving(cheap, moved, pairs.values()))


def _same(node: Node, *sides: Side) -> bool:
    """Whether both nets store the same blobs for a layer."""
    own, others = (side.model.weights.get(node.name, ()) for side in sides if side.model.weights is not None)
    return len(own) == len(others) and all(map(np.array_equal, own, others))


def _ends(side: Side, runs: Callable[[Node], bool]) -> list[Value]:
    """The outputs of a net before softmax; in the place of one that cannot be had, what its layer reads."""
    graph = side.graph
    found: list[Value] = []
    seen = set(graph.sources)
    stack = [graph.final[name] for name in reversed(graph.outputs)]
    stack += [value for node in graph.nodes if not node.layer.tops for value in node.inputs]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = graph.nodes[value.node]
        judges = node.layer.type in _STRIPPED or (node.spec is not None and node.spec.loss)
        if judges or side.obstacle(value, runs) is not None:
            stack += reversed(node.inputs)
        else:
            found.append(value)
    return found


def _behind(graph: Graph, value: Value) -> Value:
    """The activation behind a value, where exactly one layer reads each value up to it; else the last of those."""
    while len(readers := graph.consumers[value]) == 1:
        node = graph.nodes[readers[0]]
        if node.layer.type in _ACTIVATIONS:
            return Value(readers[0], 0)
        if node.layer.type not in _PASSED:
            break
        value = Value(readers[0], 0)
    return value


def _counterpart(whole: Side, cheap: Side, value: Value) -> Value | None:
    """The value of the changed net that a layer of the same name writes, or reads, or that is the same output."""
    for candidate in _candidates(whole, cheap, value):
        shapes = whole.shaped.shapes.get(value), cheap.shaped.shapes.get(candidate)
        if shapes[0] is not None and shapes[0][1:] == (shapes[1] or ())[1:]:
            return candidate
    return None


def _candidates(whole: Side, cheap: Side, value: Value) -> Iterable[Value]:
    graph, other = whole.graph, cheap.graph
    twin = cheap.named.get(graph.nodes[value.node].name)
    if twin is not None and value.top < len(other.nodes[twin].layer.tops):
        yield Value(twin, value.top)
    for reader in graph.consumers[value]:
        twin = cheap.named.get(graph.nodes[reader].name)
        slot = graph.nodes[reader].inputs.index(value)
        if twin is not None and slot < len(other.nodes[twin].inputs):
            yield other.nodes[twin].inputs[slot]
    blob = graph.blob(value)
    if graph.final[blob] == value and blob in other.final:
        yield other.final[blob]


def _behind_any(side: Side, value: Value, moved: Iterable[int]) -> bool:
    return not side.graph.needed([value]).isdisjoint(moved)


def _obstacle(side: Side, moved: Iterable[int], runs: Callable[[Node], bool]) -> Error:
    """The layer that keeps outputs behind the moved layers from being had."""
    for value in side.graph.values():
        if _behind_any(side, value, moved) and (found := side.obstacle(value, runs)) is not None:
            return found
    return UsageError("no output of the net depends on a layer that was changed", path=side.graph.path)


def _moving(side: Side, moved: Iterable[int], values: Iterable[Value]) -> Moving:
    """The blobs of the moved layers that the values need, without those that a layer shares which stays."""
    needed = side.graph.needed(values)
    chosen = sorted(needed.intersection(moved))
    staying = {
        side.key(index, i)
        for index, blobs in side.blobs.items()
        if index not in chosen
        for i in range(len(blobs))
    }
    found = {
        index: {i: key for i in range(len(side.blobs[index])) if (key := side.key(index, i)) not in staying}
        for index in chosen
    }
    return {index: keys for index, keys in found.items() if keys}
