"""Two nets beside each other, layer by layer, compared by what they mean.

Every layer becomes a ``Part``: its settings by the schema with defaults taken out, so that V1 and V2, and
``stride: 1`` written or not, are the same. Parts are aligned by name, then a chain of linear layers with
the one it stands for, then what is left by type, shape and order. Names of inner blobs mean nothing; which
part reads which does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .binding import bind
from .costs import LayerCost, cost
from .errors import UsageError
from .graph import Graph, Value, build
from .layers.ends import SourceParams
from .layers.shape import VIEW
from .layers.spec import Arrays, Shape, text
from .meaning import Fields, Meaning, Settings, differences
from .model import Model
from .net import nearest
from .shape_inference import InputShapes, Shaped, infer

Kernel = tuple[np.ndarray, int]  # (out, in/group, kh, kw) and the number of groups
Recompose = Callable[[Sequence[Kernel]], np.ndarray]  # the one kernel that a chain computes

LINEAR = ("Convolution", "InnerProduct")


@dataclass(frozen=True, eq=False)
class Part:
    """One layer as it is compared, or one blob that is fed; ``node`` is its place in the graph."""

    node: int
    name: str
    type: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    tops: tuple[str, ...]
    meaning: Meaning
    shape: Shape | None = None
    cost: LayerCost | None = None

    @property
    def settings(self) -> Settings:
        """The settings that count."""
        return self.meaning.counting

    def axes(self, name: str, default: int) -> tuple[int, int]:
        """(h, w) of a setting of a convolution; the default pair for a fully connected layer."""
        found = self.settings.get(name)
        if found is None:
            return default, default
        values = [_whole(one) for one in found.split("x")]
        return values[0], values[-1]

    @property
    def num_output(self) -> int:
        """The outputs of a linear layer."""
        return _whole(self.settings.get("num_output", ""))

    @property
    def group(self) -> int:
        """The groups of a convolution; 1 for a fully connected layer."""
        return _whole(self.settings.get("group", "1"))

    @property
    def size(self) -> str:
        """``5x1x40``: kernel and outputs."""
        kernel = "x".join(map(str, self.axes("kernel_size", 1))) + "x" if self.type == "Convolution" else ""
        return f"{kernel}{self.num_output}"

    def kernel(self, weight: np.ndarray) -> Kernel:
        """A bound weight as the kernel of a convolution, and the number of groups."""
        if self.type == "InnerProduct":
            weight = weight.T if self.settings.get("transpose") == "true" else weight
            return weight[:, :, None, None], 1
        return weight, self.group


def _whole(value: str) -> int:
    """A number of a file; 0 for what is none, in a layer that Caffe would refuse."""
    return int(value) if value.isdigit() else 0


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two nets: its parts in order, and which of them makes a value."""

    model: Model
    shaped: Shaped
    parts: tuple[Part, ...]

    @property
    def graph(self) -> Graph:
        return self.shaped.graph

    @cached_property
    def blobs(self) -> dict[int, Arrays]:
        """The stored blobs of every node that learns any; raises WeightsError where they do not belong to the net."""
        return bind(self.shaped, self.model.weights)

    @cached_property
    def makers(self) -> dict[Value, int]:
        """The part that writes each value."""
        return {value: i for i, part in enumerate(self.parts) for value in part.writes}

    @cached_property
    def readers(self) -> dict[Value, list[int]]:
        """The parts that read each value."""
        found: dict[Value, list[int]] = {}
        for i, part in enumerate(self.parts):
            for value in part.reads:
                found.setdefault(value, []).append(i)
        return found

    def in_place(self, part: Part) -> bool:
        """Whether a part writes the blobs that it reads, so that their names are not its own."""
        return part.tops == tuple(map(self.graph.blob, part.reads))

    def names(self, values: Iterable[Value]) -> str:
        """The blob names of values."""
        return " ".join(map(self.graph.blob, values))

    def chain(self, first: int) -> Iterator[int]:
        """A part, and those behind it that are linear, of its type, and alone in reading what the one before writes."""
        yield first
        part = self.parts[first]
        while part.writes:
            readers = {i for value in part.writes for i in self.readers.get(value, [])}
            following = self.parts[min(readers)] if len(readers) == 1 else None
            if following is None or following.reads != part.writes or following.type != part.type:
                return
            part = following
            yield min(readers)


def _side(model: Model, graph: Graph, own: Mapping[str, Shape | None], shapes: InputShapes) -> Side:
    shaped = infer(graph, shapes, partial=True)
    counted = iter(cost(shaped).layers)
    parts: list[Part] = []
    for index, node in enumerate(graph.nodes):
        row = next(counted) if node.layer.bottoms or node.layer.tops else None
        if node.spec is not None and node.spec.source:
            parts.extend(_fed(shaped, index, own))
        elif node.layer.type != VIEW:
            parts.append(_part(model, shaped, index, row))
    return Side(model, shaped, tuple(parts))


def _fed(shaped: Shaped, index: int, own: Mapping[str, Shape | None]) -> Iterator[Part]:
    """A part for each blob that a layer feeds, however it comes by it."""
    for top, name in enumerate(shaped.graph.nodes[index].layer.tops):
        value = Value(index, top)
        shape, said = shaped.shapes.get(value), own[name]
        meaning = Meaning()
        if shape:
            meaning.note("shape", text(shape[1:]), "?", False)
        if said:
            meaning.note("batch", str(said[0]), "?", True)
        yield Part(index, name, "Input", (), (value,), (name,), meaning, shape)


def _part(model: Model, shaped: Shaped, index: int, row: LayerCost | None) -> Part:
    node = shaped.graph.nodes[index]
    layer = node.layer
    writes = tuple(Value(index, top) for top in range(len(layer.tops)))
    reads = tuple(_memory(shaped.graph, value) for value in node.inputs)
    shape = shaped.shapes.get(writes[0]) if writes else None
    meaning = Meaning.of(layer, model.net.state.phase)
    return Part(index, layer.name, layer.type, reads, writes, layer.tops, meaning, shape, row)


def _memory(graph: Graph, value: Value) -> Value:
    """The value itself, or what a view of it was written by."""
    node = graph.nodes[value.node]
    return _memory(graph, node.inputs[0]) if node.layer.type == VIEW else value


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the comparison: parts of a, of b, or both; more than one on a side is a decomposed layer.

    ``weights``: the relative difference of the weights, 0 where they are equal, None where unknown.
    """

    status: str
    a: tuple[Part, ...]
    b: tuple[Part, ...]
    fields: Fields = field(default_factory=dict)
    training: Fields = field(default_factory=dict)
    weights: float | None = None

    @property
    def name(self) -> str:
        """The layer's name in a where it is there once, else in b."""
        return (self.a if len(self.a) == 1 or not self.b else self.b)[0].name

    @property
    def ranks(self) -> tuple[int, ...]:
        """The outputs of the inner layers of a decomposed one."""
        if self.status != "decomposed":
            return ()
        chain = self.b if len(self.b) > 1 else self.a
        return tuple(part.num_output for part in chain[:-1])

    def summary(self) -> str:
        """The difference in words: ``5x5x256 -> conv2_v 5x1x40 + conv2_h 1x5x256``, ``num_output: 64 -> 32``."""
        if not self.a or not self.b:
            (part,) = self.a or self.b
            return f"{part.type} {text(part.shape)}" if part.shape else part.type
        said = [f"{name}: {old} -> {new}" for name, (old, new) in (self.fields or self.training).items()]
        if self.status == "decomposed":
            sides = (
                " + ".join(f"{part.name} {part.size}" if len(side) > 1 else part.size for part in side)
                for side in (self.a, self.b)
            )
            said.insert(0, " -> ".join(sides))
        return "; ".join(said) or ("weights" if self.status == "weights" else "")

    def total(self, side: Sequence[Part], what: str) -> int | None:
        """``macs`` or ``params`` of one side, None where they are not known."""
        costs = [part.cost for part in side if part.cost is not None]
        if not all(one.known for one in costs):
            return None
        return sum(getattr(one, what) for one in costs)

    def pair(self, what: str) -> tuple[int | None, int | None]:
        """``macs`` or ``params`` in a and in b."""
        return self.total(self.a, what), self.total(self.b, what)

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        sides = {
            side: [{"name": part.name, "type": part.type, "shape": _json_shape(part.shape)} for part in parts]
            or None
            for side, parts in (("a", self.a), ("b", self.b))
        }
        return {
            "name": self.name,
            "status": self.status,
            **sides,
            "fields": {name: list(pair) for name, pair in self.fields.items()},
            "training": {name: list(pair) for name, pair in self.training.items()},
            "ranks": list(self.ranks),
            "macs": list(self.pair("macs")),
            "params": list(self.pair("params")),
            "weights": self.weights if self.weights is None or np.isfinite(self.weights) else None,
        }


def _json_shape(shape: Shape | None) -> list[int] | None:
    return None if shape is None else list(shape)


@dataclass(frozen=True, eq=False)
class Difference:
    """All rows in net order; MACs and parameters are those of the whole nets, without layers of unknown shape."""

    rows: tuple[Row, ...]

    def equal(self, training: bool = False) -> bool:
        """Whether no row differs; those of training settings alone count only with ``training``."""
        same = ("same",) if training else ("same", "training")
        return all(row.status in same for row in self.rows)

    def totals(self, what: str) -> tuple[int, int]:
        """``macs`` or ``params`` of both nets."""
        pairs = [row.pair(what) for row in self.rows]
        return sum(a or 0 for a, _ in pairs), sum(b or 0 for _, b in pairs)


def to_json(found: Difference, equal: bool) -> dict[str, Any]:
    """The whole comparison as one JSON document."""
    totals = {what: list(found.totals(what)) for what in ("macs", "params")}
    return {"equal": equal, "rows": [row.to_json() for row in found.rows], "totals": totals}


def diff(
    a: Model, b: Model, input_shapes: InputShapes | None = None, recompose: Recompose | None = None
) -> Difference:
    """Compare two nets, and their weights where both have any.

    ``recompose`` makes one kernel of a chain; without it the weights of decomposed layers are not compared.
    Layers whose shapes are unknown are compared without MACs. Where the file of one net does not say how
    large an input is, it counts as that of the other; both are counted at the batch of ``a``, if it has one.
    """
    graphs = build(a.net), build(b.net)
    fed = [_fed_shapes(graph) for graph in graphs]
    given = dict(input_shapes or {})
    known = [*fed[0], *fed[1]]
    for name in given.keys() - set(known):
        raise UsageError(f'"{name}" is an input of neither net', hint=nearest(name, known))
    shapes = _meeting(fed[0], fed[1], given)
    aligned = _Alignment(
        *(
            _side(model, graph, own, given)
            for model, graph, own, given in zip((a, b), graphs, fed, shapes, strict=True)
        )
    )
    aligned.by_name()
    aligned.decomposed()
    aligned.by_order()
    return Difference(tuple(_Comparison(aligned, recompose).rows()))


def _fed_shapes(graph: Graph) -> dict[str, Shape | None]:
    """The shape of every blob that is fed, None where the file does not say."""
    found: dict[str, Shape | None] = {}
    for value in graph.sources:
        params = graph.nodes[value.node].params
        found[graph.blob(value)] = params.shapes[value.top] if isinstance(params, SourceParams) else None
    return found


def _meeting(
    a: Mapping[str, Shape | None], b: Mapping[str, Shape | None], given: Mapping[str, Shape]
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The shapes to infer with: those given, the file's own, or the other file's; all of one batch where that can be."""
    said = [{name: given.get(name) or shape for name, shape in own.items()} for own in (a, b)]
    batches = [{shape[0] for shape in one.values() if shape} for one in said]
    batch = next((min(found) for found in batches if len(found) == 1), None)
    made: list[dict[str, Shape]] = []
    for own, other, found in zip(said, reversed(said), batches, strict=True):
        shapes = {name: shape or other.get(name) for name, shape in own.items()}
        common = batch if len(found) < 2 else None
        made.append({name: (common or shape[0], *shape[1:]) for name, shape in shapes.items() if shape})
    return made[0], made[1]


@dataclass(frozen=True)
class _Pair:
    """Parts of a and of b that stand for each other."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    status: str = "same"


class _Alignment:
    """Which parts of two nets stand for each other."""

    def __init__(self, a: Side, b: Side) -> None:
        self.sides = (a, b)
        self.pairs: tuple[dict[int, _Pair], dict[int, _Pair]] = ({}, {})

    def _join(self, pair: _Pair) -> None:
        """Note a pair; what its parts stood for before stands alone."""
        for found, members in zip(self.pairs, (pair.a, pair.b), strict=True):
            for old in {id(found[member]): found[member] for member in members if member in found}.values():
                self._release(old)
            for member in members:
                found[member] = pair

    def _release(self, pair: _Pair) -> None:
        for found, members in zip(self.pairs, (pair.a, pair.b), strict=True):
            for member in members:
                if found.get(member) is pair:
                    del found[member]

    def by_name(self) -> None:
        """Layers of one name; fed blobs of one name."""
        names: dict[tuple[str, bool], list[int]] = {}
        for i, part in enumerate(self.sides[1].parts):
            names.setdefault((part.name, part.type == "Input"), []).append(i)
        for i, part in enumerate(self.sides[0].parts):
            others = names.get((part.name, part.type == "Input"))
            if others:
                self._join(_Pair((i,), (others.pop(0),)))

    def decomposed(self) -> None:
        """Linear layers of one net that are a chain in the other."""
        for one in (0, 1):
            for i, part in enumerate(self.sides[one].parts):
                old = self.pairs[one].get(i)
                if part.type in LINEAR and (old is None or self._differs(old)):
                    chain = self._chain_for(one, i)
                    if chain:
                        a, b = ((i,), chain) if one == 0 else (chain, (i,))
                        self._join(_Pair(a, b, "decomposed"))

    def _differs(self, pair: _Pair) -> bool:
        if len(pair.a) > 1 or len(pair.b) > 1:
            return False
        a, b = (side.parts[members[0]] for side, members in zip(self.sides, (pair.a, pair.b), strict=True))
        return (a.type, a.settings) != (b.type, b.settings)

    def _chain_for(self, one: int, index: int) -> tuple[int, ...]:
        """The chain of the other net that stands for a part; () where there is none."""
        side, other = self.sides[one], self.sides[1 - one]
        part, own = side.parts[index], self.pairs[one].get(index)
        for first, candidate in enumerate(other.parts):
            if candidate.type != part.type:
                continue
            chain: list[int] = []
            for member in other.chain(first):
                if self.pairs[1 - one].get(member, own) is not own:
                    break
                chain.append(member)
                parts = [other.parts[i] for i in chain]
                if composes(part, parts) and (
                    _named_after(part, parts) or self._same_place(one, part, parts)
                ):
                    return tuple(chain)
        return ()

    def _same_place(self, one: int, part: Part, chain: Sequence[Part]) -> bool:
        """Whether a chain reads what the part reads, and writes its blobs or is read by the same parts."""
        if not self.wired_alike(one, part.reads, chain[0].reads):
            return False
        return part.tops == chain[-1].tops or self._read_alike(one, part.writes, chain[-1].writes)

    def _read_alike(self, one: int, values: Sequence[Value], others: Sequence[Value]) -> bool:
        found = [
            {
                id(self.pairs[i].get(reader))
                for value in written
                for reader in self.sides[i].readers.get(value, [])
            }
            for i, written in ((one, values), (1 - one, others))
        ]
        return bool(found[0]) and found[0] == found[1] and id(None) not in found[0]

    def wired_alike(self, one: int, values: Sequence[Value], others: Sequence[Value]) -> bool:
        """Whether values of one net are made by what makes those of the other, layers only there left out."""
        return len(values) == len(others) and all(
            self._origin(one, value) == self._origin(1 - one, other)
            for value, other in zip(values, others, strict=True)
        )

    def _origin(self, one: int, value: Value) -> tuple[object, int]:
        """The pair that makes a value, past layers of one bottom that the other net lacks; else the blob's name."""
        side, pairs = self.sides[one], self.pairs[one]
        maker = side.makers[value]
        while maker not in pairs and len(side.parts[maker].reads) == 1:
            value = side.parts[maker].reads[0]
            maker = side.makers[value]
        return pairs.get(maker) or side.graph.blob(value), value.top

    def by_order(self) -> None:
        """What is left, by type and shape, where the order of all parts allows."""
        for a, b in _common(self._tokens(0), self._tokens(1)):
            if a not in self.pairs[0]:
                self._join(_Pair((a,), (b,), "renamed"))

    def _tokens(self, one: int) -> list[object]:
        """A token a part: its pair, or what it is; a chain's inner parts have tokens of their own."""
        pairs, side = self.pairs[one], self.sides[one]
        tokens: list[object] = []
        for i, part in enumerate(side.parts):
            pair = pairs.get(i)
            if pair is None:
                tokens.append((part.type, part.shape, tuple(sorted(part.settings.items()))))
            else:
                tokens.append(id(pair) if i == (pair.a, pair.b)[one][-1] else object())
        return tokens


def _common(a: Sequence[object], b: Sequence[object]) -> Iterator[tuple[int, int]]:
    """The longest common subsequence of two sequences, as pairs of places."""
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            best[i][j] = best[i + 1][j + 1] + 1 if a[i] == b[j] else max(best[i + 1][j], best[i][j + 1])
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            yield i, j
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1


def composes(part: Part, chain: Sequence[Part]) -> bool:
    """Whether a chain of linear layers has the kernel, stride, pad, groups and outputs of one."""
    if len(chain) < 2 or chain[-1].num_output != part.num_output:
        return False
    if part.type == "InnerProduct":
        return True
    taps = [[k - 1 for k in one.axes("kernel_size", 1)] for one in chain]
    strides = [one.axes("stride", 1) for one in chain]
    pads = [one.axes("pad", 0) for one in chain]
    return (
        all(one.group == part.group for one in chain)
        and all(sum(axis) == max(axis) for axis in zip(*taps, strict=True))
        and [sum(axis) + 1 for axis in zip(*taps, strict=True)] == [*part.axes("kernel_size", 1)]
        and [int(np.prod(axis)) for axis in zip(*strides, strict=True)] == [*part.axes("stride", 1)]
        and [sum(axis) for axis in zip(*pads, strict=True)] == [*part.axes("pad", 0)]
    )


def _named_after(part: Part, chain: Sequence[Part]) -> bool:
    """Whether every name is the part's with a suffix; conv10 is not conv1 with one."""
    return all(
        one.name.startswith(part.name) and not one.name[len(part.name) :][:1].isdigit() for one in chain
    )


class _Comparison:
    """Aligned nets as rows."""

    def __init__(self, aligned: _Alignment, recompose: Recompose | None) -> None:
        self.aligned, self.recompose = aligned, recompose
        self.a, self.b = aligned.sides
        self.weighed = all(side.model.weights is not None for side in aligned.sides)

    def rows(self) -> Iterator[Row]:
        """Parts of a in order, those of b alone before the next part of b that has a partner."""
        pairs_a, pairs_b = self.aligned.pairs
        lonely = [i for i in range(len(self.b.parts)) if i not in pairs_b]
        for i, part in enumerate(self.a.parts):
            pair = pairs_a.get(i)
            if pair is None:
                yield Row("only a", (part,), ())
            elif i == pair.a[-1]:
                while lonely and lonely[0] < pair.b[0]:
                    yield Row("only b", (), (self.b.parts[lonely.pop(0)],))
                yield self._row(pair)
        yield from (Row("only b", (), (self.b.parts[i],)) for i in lonely)

    def _row(self, pair: _Pair) -> Row:
        a = tuple(self.a.parts[i] for i in pair.a)
        b = tuple(self.b.parts[i] for i in pair.b)
        single = len(a) == len(b) == 1
        fields = (_fields(a[0], b[0]) if single else _bias(a[-1], b[-1])) | self._wiring(a, b)
        before, after = a[0].meaning, b[0].meaning
        training = (
            differences(before.training, after.training, before.defaults | after.defaults) if single else {}
        )
        weights = self._weights(a, b) if self.weighed else None
        status = pair.status
        if status == "same":
            status = "changed" if fields else "weights" if weights else "training" if training else "same"
        return Row(status, a, b, fields, training, weights)

    def _wiring(self, a: Sequence[Part], b: Sequence[Part]) -> Fields:
        found: Fields = {}
        if not self.aligned.wired_alike(0, a[0].reads, b[0].reads):
            found["bottom"] = (self.a.names(a[0].reads), self.b.names(b[0].reads))
        if a[-1].tops != b[-1].tops and not (self.a.in_place(a[-1]) and self.b.in_place(b[-1])):
            found["top"] = (" ".join(a[-1].tops), " ".join(b[-1].tops))
        return found

    def _weights(self, a: Sequence[Part], b: Sequence[Part]) -> float | None:
        """||b - a|| / ||a|| of the blobs; of the kernel alone where one side is a chain."""
        left, right = (
            [side.blobs.get(part.node, ()) for part in parts] for side, parts in ((self.a, a), (self.b, b))
        )
        if not all((*left, *right)):
            return None
        if len(a) == len(b) == 1:
            return _apart(left[0], right[0])
        if self.recompose is None:
            return None
        kernels = [
            self.recompose([part.kernel(one[0]) for part, one in zip(parts, blobs, strict=True)])
            for parts, blobs in ((a, left), (b, right))
        ]
        return _apart(kernels[:1], kernels[1:])


def _fields(a: Part, b: Part) -> Fields:
    own = {"name": (a.name, b.name), "type": (a.type, b.type)}
    differing = {name: pair for name, pair in own.items() if pair[0] != pair[1]}
    return differing | differences(a.settings, b.settings, a.meaning.defaults | b.meaning.defaults)


def _bias(a: Part, b: Part) -> Fields:
    """Whether the layers that end a chain and that it stands for both have a bias."""
    left, right = (part.settings.get("bias_term", "true") for part in (a, b))
    return {} if left == right else {"bias_term": (left, right)}


def _apart(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float | None:
    """Relative difference of blobs taken together; None where their sizes differ."""
    if [one.size for one in a] != [one.size for one in b]:
        return None
    pairs = [(before.ravel(), after.ravel()) for before, after in zip(a, b, strict=True)]
    if all(np.array_equal(before, after, equal_nan=True) for before, after in pairs):
        return 0.0
    squares = np.zeros(2)
    for before, after in pairs:
        difference = after - before
        squares += np.linalg.norm(difference) ** 2, np.linalg.norm(before) ** 2
    return float(np.sqrt(squares[0] / (squares[1] or 1.0)))
