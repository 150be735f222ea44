"""Layers joined into a graph: every bottom resolved once to the value it reads.

A bottom means the last writer above it. Tops of Split, Flatten and Reshape share their bottom's memory,
so an in-place layer on one of them changes what the others hold; a view node stands wherever such a
rewritten value is read under another shape. In-place layers then need no code anywhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
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
from .upgrade import is_solver


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
    """Nodes in execution order, and for every blob name the value it holds at the end.

    ``cut`` names blobs that are outputs though others read them: unknown layers were cut off behind them.
    """

    nodes: tuple[Node, ...]
    final: dict[str, Value]
    path: str | None = None
    cut: frozenset[str] = frozenset()

    @cached_property
    def consumers(self) -> dict[Value, tuple[int, ...]]:
        """For each value, the nodes that read it, one entry a read."""
        readers: dict[Value, list[int]] = {value: [] for value in self.values()}
        for index, node in enumerate(self.nodes):
            for value in node.inputs:
                readers[value].append(index)
        return {value: tuple(nodes) for value, nodes in readers.items()}

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The blobs nobody reads at the end, which Caffe prints as the net's outputs, in order of writing."""
        return tuple(
            name for name, value in self.final.items() if name in self.cut or not self.consumers[value]
        )

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

    def needed(self, wanted: Iterable[Value], given: Container[Value] = ()) -> set[int]:
        """The nodes that the wanted values depend on, their own included, as far as given values do not stand for them."""
        found: set[int] = set()
        stack = [value for value in wanted if value not in given]
        while stack:
            index = stack.pop().node
            if index not in found:
                found.add(index)
                stack += [value for value in self.nodes[index].inputs if value not in given]
        return found


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
        if layer.type == VIEW:  # ours alone; whoever walks the graph relies on it
            raise UnsupportedError(f'layer type "{VIEW}" is not known')
        spec, params, problem = _understand(layer, self.net)
        inputs = tuple(self.content(name) for name in layer.bottoms)
        _refuse_repeated(layer.tops)
        reads = Counter(inputs)
        in_place = [self.writes_in_place(layer, top, inputs, reads) for top in range(len(layer.tops))]
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
            raise NetError(f'bottom "{name}" is written by no layer above', hint=self.elsewhere(name))
        if blob.version != blob.memory.version:
            like = self.nodes[blob.value.node].layer
            empty = Message((), *like.span)
            view = replace(like, name=f"{name}{VIEW}", type=VIEW, bottoms=(), tops=(name,), message=empty)
            self.nodes.append(Node(view, (blob.memory.written, blob.value), LAYERS[VIEW], None, None))
            blob.value, blob.version = Value(len(self.nodes) - 1, 0), blob.memory.version
        return blob.value

    def elsewhere(self, name: str) -> str | None:
        """A hint to where a blob that nothing above writes may come from."""
        here, state = set(self.net.layers), self.net.full_state
        for layer in self.net.upgraded.all_layers:
            if name in layer.tops:
                if layer in here:
                    return f'layer "{layer.name}", which comes no earlier, writes it'
                return f'layer "{layer.name}" writes it, but does not exist in phase {state.phase}'
        return nearest(name, list(self.blobs)) if self.blobs else None

    def writes_in_place(
        self, layer: Layer, top: int, inputs: tuple[Value, ...], reads: Mapping[Value, int]
    ) -> bool:
        """Whether that top rewrites its bottom; raises NetError on what Caffe calls "multiple sources"."""
        name = layer.tops[top]
        if name not in self.blobs:
            return False
        before = self.nodes[self.blobs[name].value.node].layer.name
        if top >= len(layer.bottoms) or layer.bottoms[top] != name:
            raise NetError(
                f'top "{name}" is already written by layer "{before}"', hint="give it another name"
            )
        if inputs[top] in self.readers or reads[inputs[top]] > 1:
            reader = self.readers.get(inputs[top], layer.name)
            raise NetError(
                f'rewrites "{name}" in place, which layer "{reader}" reads too; Caffe calls that multiple sources',
                hint="give its top another name",
            )
        return True


def _refuse_repeated(tops: tuple[str, ...]) -> None:
    """Raise NetError where a layer names a top twice."""
    if len(set(tops)) < len(tops):
        name = next(name for name, count in Counter(tops).items() if count > 1)
        raise NetError(f'names the top "{name}" twice')


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

    Layers of unknown type or with fields that are not understood become nodes with a ``problem``, which whoever
    needs them raises. Raises NetError where the wiring itself is wrong.
    """
    _check_root(net)
    return _Builder(net).build()


def _check_root(net: Net) -> None:
    """Refuse a solver, and what stands beside the layers and is no field of a net: a misspelt layer, a brace too many."""
    root = net.document.root
    if is_solver(net.document):
        trained = root.string("net") or root.string("train_net")
        hint = f"give the net that it trains{f', {trained}' if trained else ''}"
        raise NetError("this file sets a solver, it is no net", path=net.path, hint=hint)
    beside = tuple(field for field in root.fields if field.name not in ("layer", "layers"))
    try:
        check(Typed(Message(beside, root.start, root.end), "NetParameter", net.document))
    except Error as error:
        raise error.at(path=net.path) from None


def known_part(built: Graph) -> Graph:
    """The part of a graph that no layer outside this program's knowledge has a hand in.

    Its outputs are the values that such layers read, and the outputs of the whole graph that depend on none.
    A problem other than such a layer is left for ``checked``.
    """
    cut: set[int] = set()
    read: dict[str, Value] = {}
    for index, node in enumerate(built.nodes):
        if isinstance(node.problem, UnsupportedError) or any(value.node in cut for value in node.inputs):
            cut.add(index)
            read.update({built.blob(value): value for value in node.inputs if value.node not in cut})
    kept = {name: value for name, value in built.final.items() if value.node not in cut}
    nodes = tuple(_left_out(node) if index in cut else node for index, node in enumerate(built.nodes))
    return Graph(nodes, {**kept, **read}, built.path, frozenset(read))


def _left_out(node: Node) -> Node:
    problem = node.problem or UnsupportedError("depends on a layer that is not understood")
    return replace(node, inputs=(), spec=None, params=None, problem=problem)
