"""Layers joined into a graph: every bottom resolved once to the value it reads.

A bottom means the last writer above it. Tops of Split, Flatten and Reshape share their bottom's memory,
so an in-place layer on one of them changes what the others hold; a view node stands wherever such a
rewritten value is read under another shape. In-place layers then need no code anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from .errors import Error, NetError, UnsupportedError
from .layers import LAYERS
from .layers.shape import VIEW
from .layers.spec import LayerSpec, Request
from .net import Layer, Net, nearest
from .text import Message
from .typed import Typed, check


class Value(NamedTuple):
    """An edge's source: top ``top`` of node ``node``."""

    node: int
    top: int


@dataclass(frozen=True, eq=False)
class Node:
    """One layer in the graph. ``spec`` and ``params`` are None where ``problem`` says why it is not understood."""

    layer: Layer
    inputs: tuple[Value, ...]
    spec: LayerSpec | None
    params: Any
    problem: Error | None

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in execution order, and for every blob name the value it holds at the end."""

    nodes: tuple[Node, ...]
    final: dict[str, Value]
    path: str | None = None

    @cached_property
    def consumers(self) -> dict[Value, tuple[int, ...]]:
        """For each value, the nodes that read it, one entry a read."""
        readers: dict[Value, list[int]] = {value: [] for value in self.values()}
        for index, node in enumerate(self.nodes):
            for value in node.inputs:
                readers[value].append(index)
        return {value: tuple(nodes) for value, nodes in readers.items()}

    @cached_property
    def last_use(self) -> dict[Value, int]:
        """For each value, the last node that reads it, or the one that made it."""
        return {value: max(readers, default=value.node) for value, readers in self.consumers.items()}

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The blobs nobody reads at the end, which Caffe prints as the net's outputs, in order of writing."""
        return tuple(name for name, value in self.final.items() if not self.consumers[value])

    @cached_property
    def sources(self) -> tuple[Value, ...]:
        """The values that are fed from outside."""
        return tuple(
            Value(index, top)
            for index, node in enumerate(self.nodes)
            if node.spec is not None and node.spec.source
            for top in range(len(node.layer.tops))
        )

    def values(self) -> Iterator[Value]:
        """Every value of the graph."""
        for index, node in enumerate(self.nodes):
            for top in range(len(node.layer.tops)):
                yield Value(index, top)

    def blob(self, value: Value) -> str:
        """The blob name a value is written to."""
        return self.nodes[value.node].layer.tops[value.top]

    def checked(self) -> Graph:
        """The graph itself; raises the first problem of a layer that is not understood."""
        for node in self.nodes:
            if node.problem is not None:
                raise node.problem
        return self


@dataclass
class _Memory:
    """What several blob names may share: the last value written into it, and how often it was rewritten."""

    written: Value
    version: int = 0


@dataclass
class _Blob:
    """A blob name while the graph is built: its value, in step with its memory at ``version``."""

    value: Value
    memory: _Memory
    version: int


@dataclass
class _Builder:
    net: Net
    nodes: list[Node] = field(default_factory=list)
    blobs: dict[str, _Blob] = field(default_factory=dict)
    readers: dict[Value, str] = field(default_factory=dict)

    def build(self) -> Graph:
        legacy = self.net.legacy_input
        for layer in (legacy, *self.net.layers) if legacy else self.net.layers:
            try:
                self.add(layer)
            except Error as error:
                raise error.at(path=self.net.path, line=layer.line, layer=layer.name) from None
        final = {name: self.content(name) for name in self.blobs}
        return Graph(tuple(self.nodes), final, self.net.path)

    def add(self, layer: Layer) -> None:
        spec, params, problem = _understand(layer, self.net)
        inputs = tuple(self.content(name) for name in layer.bottoms)
        in_place = [self.writes_in_place(layer, top, inputs) for top in range(len(layer.tops))]
        index = len(self.nodes)
        self.nodes.append(Node(layer, inputs, spec, params, problem))
        self.readers.update(dict.fromkeys(inputs, layer.name))
        for top, name in enumerate(layer.tops):
            value = Value(index, top)
            if in_place[top]:
                memory = self.blobs[name].memory
                memory.written, memory.version = value, memory.version + 1
            elif spec is not None and spec.aliases and layer.bottoms:
                memory = self.blobs[layer.bottoms[0]].memory
            else:
                memory = _Memory(value)
            self.blobs[name] = _Blob(value, memory, memory.version)

    def content(self, name: str) -> Value:
        """The value a blob name holds now; a view of its memory where that was rewritten under another name."""
        blob = self.blobs.get(name)
        if blob is None:
            raise NetError(
                f'bottom "{name}" is written by no layer above', hint=nearest(name, list(self.blobs))
            )
        if blob.version != blob.memory.version:
            like = self.nodes[blob.value.node].layer
            empty = Message((), *like.span)
            view = replace(like, name=f"{name}{VIEW}", type=VIEW, bottoms=(), tops=(name,), message=empty)
            self.nodes.append(Node(view, (blob.memory.written, blob.value), LAYERS[VIEW], None, None))
            blob.value, blob.version = Value(len(self.nodes) - 1, 0), blob.memory.version
        return blob.value

    def writes_in_place(self, layer: Layer, top: int, inputs: tuple[Value, ...]) -> bool:
        """Whether that top rewrites its bottom; raises NetError on what Caffe calls "multiple sources"."""
        name = layer.tops[top]
        if name in layer.tops[:top]:
            raise NetError(f'names the top "{name}" twice')
        if name not in self.blobs:
            return False
        before = self.nodes[self.blobs[name].value.node].layer.name
        if top >= len(layer.bottoms) or layer.bottoms[top] != name:
            raise NetError(
                f'top "{name}" is already written by layer "{before}"', hint="give it another name"
            )
        if inputs[top] in self.readers or inputs.count(inputs[top]) > 1:
            reader = self.readers.get(inputs[top], layer.name)
            raise NetError(
                f'rewrites "{name}" in place, which layer "{reader}" reads too; Caffe calls that multiple sources',
                hint="give its top another name",
            )
        return True


def _understand(layer: Layer, net: Net) -> tuple[LayerSpec | None, Any, Error | None]:
    """The layer's record and its settings, or the reason why they cannot be had."""
    spec = LAYERS.get(layer.type)
    try:
        if spec is None:
            known = nearest(layer.type, [name for name in LAYERS if name != VIEW])
            raise UnsupportedError(f'layer type "{layer.type}" is not known', hint=known)
        _check_count("bottom", len(layer.bottoms), spec.bottoms, layer.type)
        _check_count("top", len(layer.tops), spec.tops, layer.type)
        schema_type = "V1LayerParameter" if layer.dialect == "V1" else "LayerParameter"
        typed = Typed(layer.message, schema_type, layer.document)
        if not spec.any_fields:
            check(typed, spec.understood)
        _check_loss_weights(len(typed["loss_weight"]), len(layer.tops), spec.loss)
        return spec, spec.params(Request(layer, typed, net.state.phase)), None
    except Error as error:
        return None, None, error.at(path=net.path, line=layer.line, layer=layer.name)


def _check_count(what: str, count: int, bounds: tuple[int, int | None], kind: str) -> None:
    low, high = bounds
    if count < low or (high is not None and count > high):
        wanted = str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        raise NetError(f"has {count} {what}{'' if count == 1 else 's'}, {kind} takes {wanted}")


def _check_loss_weights(weights: int, tops: int, loss: bool) -> None:
    """None, or one for each top. A loss has at least one top, maybe unnamed, and at least the loss_weight 1."""
    wanted, found = (max(tops, 1), max(weights, 1)) if loss else (tops, weights or tops)
    if wanted != found:
        raise NetError(
            f"loss_weight must be given for each top or not at all: {wanted} tops, {found} loss_weight"
        )


def build(net: Net) -> Graph:
    """The graph of the layers that exist in the net's state.

    Layers of unknown type or with fields that are not understood become nodes with a ``problem``; whoever
    needs them calls ``checked``. Raises NetError where the wiring itself is wrong.
    """
    return _Builder(net).build()
