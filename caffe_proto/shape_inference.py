"""Blob shapes: one pass over the graph, calling the ``infer`` column of the layer table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import Error, ShapeError, UsageError
from .graph import Graph, Node, Value
from .layers.spec import Shape, Shapes, size, text
from .net import nearest

InputShapes = Mapping[str, Shape]

_MOST_AXES, _MOST_NUMBERS = 32, 2**31 - 1  # of one of Caffe's blobs


@dataclass(frozen=True, eq=False)
class Shaped:
    """A graph with the shape of every value. ``unknown`` holds, by node, why shapes are missing (partial only)."""

    graph: Graph
    shapes: dict[Value, Shape]
    unknown: dict[int, Error]

    def bottoms(self, index: int) -> Shapes:
        """The shapes a node reads."""
        return tuple(self.shapes[value] for value in self.graph.nodes[index].inputs)

    def tops(self, index: int) -> Shapes:
        """The shapes a node writes."""
        return tuple(self.shapes[Value(index, top)] for top in range(len(self.graph.nodes[index].layer.tops)))

    def blobs(self, index: int) -> Shapes:
        """The shapes of the blobs a node learns."""
        node = self.graph.nodes[index]
        return node.spec.blobs(node.params, self.bottoms(index)) if node.spec else ()

    def by_blob(self) -> dict[str, Shape]:
        """The shape each blob has at the end."""
        return {name: self.shapes[value] for name, value in self.graph.final.items() if value in self.shapes}


def infer(graph: Graph, inputs: InputShapes | None = None, *, partial: bool = False) -> Shaped:
    """Shapes of all values; ``inputs`` overrides or supplies those of source blobs.

    Raises the error of the first layer that real Caffe would refuse or that is not understood, with file,
    line and layer. With ``partial`` such layers, and what depends on them, are left without shapes.
    """
    given = dict(inputs or {})
    sources = {graph.blob(value) for value in graph.sources}
    for name in given:
        if name not in sources:
            raise UsageError(f'"{name}" is no input of the net', hint=nearest(name, sorted(sources)))
    shaped = Shaped(graph, {}, {})
    owners: dict[str, tuple[str, Shape]] = {}
    for index, node in enumerate(graph.nodes):
        try:
            tops = _tops(shaped, index, node, given, owners)
        except Error as error:
            error.at(path=graph.path, line=node.layer.line, layer=node.name)
            if not partial:
                raise
            shaped.unknown[index] = error
            continue
        shaped.shapes.update({Value(index, top): shape for top, shape in enumerate(tops)})
    return shaped


def _tops(
    shaped: Shaped, index: int, node: Node, given: dict[str, Shape], owners: dict[str, tuple[str, Shape]]
) -> Shapes:
    if node.problem is not None:
        raise node.problem
    assert node.spec is not None
    for value in node.inputs:
        if value not in shaped.shapes:
            raise ShapeError(f'the shape of bottom "{shaped.graph.blob(value)}" is not known')
    if node.spec.source:
        own = zip(node.layer.tops, node.params.shapes, strict=True)
        shapes = tuple(tuple(given[name]) if name in given else shape for name, shape in own)
        tops = node.spec.infer(replace(node.params, shapes=shapes), ())
        learnt: Shapes = ()
    else:
        bottoms = shaped.bottoms(index)
        tops, learnt = node.spec.infer(node.params, bottoms), node.spec.blobs(node.params, bottoms)
        if len(node.layer.param_specs) > len(learnt):
            raise ShapeError(f"has {len(node.layer.param_specs)} param blocks for {len(learnt)} learnt blobs")
    for what, shapes in (("top", tops), ("learnt blob", learnt)):
        for i, shape in enumerate(shapes):
            _check_blob(shape, f"{what} {i}")
    _check_shared(node, learnt, owners)
    return tops


def _check_shared(node: Node, learnt: Shapes, owners: dict[str, tuple[str, Shape]]) -> None:
    """Raise ShapeError where a learnt blob does not fit the one of another layer whose param name it bears."""
    for i, (spec, shape) in enumerate(zip(node.layer.param_specs, learnt, strict=False)):
        if not spec.name:
            continue
        owner, other = owners.setdefault(spec.name, (node.name, shape))
        if shape != other and not (spec.permissive and size(shape) == size(other)):
            raise ShapeError(
                f'learnt blob {i} of shape {text(shape)} cannot share param "{spec.name}" of layer "{owner}",'
                f" {text(other)}"
            )


def _check_blob(shape: Shape, what: str) -> None:
    """Raise ShapeError where no blob of Caffe's can have a shape."""
    if len(shape) > _MOST_AXES:
        raise ShapeError(f"{what} has {len(shape):,} axes, Caffe takes at most {_MOST_AXES}")
    count = 1
    for dim in shape:
        if dim < 0:
            raise ShapeError(f"{what} has the shape {text(shape)}, a dimension is negative")
        if count and dim > _MOST_NUMBERS // count:
            raise ShapeError(
                f"{what} has the shape {text(shape)}; Caffe takes at most {_MOST_NUMBERS:,} numbers"
            )
        count *= dim
