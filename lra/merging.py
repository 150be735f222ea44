"""Neighbours made one: convolutions in a row with nothing in between, where the one that they are costs less.

Such pairs are what decompositions of too high a rank leave, and 1 x 1 layers that no activation follows. The same
goes for fully connected layers in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise

import numpy as np

from caffe_proto.errors import PlanError
from caffe_proto.layers.dense import DenseParams
from caffe_proto.layers.spec import canonical_axis
from caffe_proto.model import Model
from caffe_proto.net import Layer, nearest
from caffe_proto.rewrite import Replace
from caffe_proto.rewrite import apply as rewrite
from caffe_proto.shape_inference import InputShapes

from .decomposition import Shape, Step, StepShape
from .merging_algebra import inexact, is_biased, merge_steps, merged_shape
from .styles import is_appendage, merged_layer
from .targets import Found, find


@dataclass(frozen=True)
class Merge:
    """Layers in a row that became one of them: ``name``, of that shape; MACs before and after, None where unknown."""

    layers: tuple[str, ...]
    name: str
    shape: Shape
    macs: tuple[int, int] | None


@dataclass(frozen=True)
class Merged:
    """A model after merging; ``apart``: pairs that would cost less as one, with the reason why they are not."""

    model: Model
    merges: tuple[Merge, ...]
    apart: dict[tuple[str, str], str]


def merge(
    model: Model, input_shapes: InputShapes | None = None, only: Sequence[Sequence[str]] | None = None
) -> Merged:
    """Convolutions in a row as one wherever that has fewer MACs, and exact; of every row the best such choice.

    A layer belongs to the one before it where it alone reads what that makes, in every phase, with nothing in
    between, not even in place, and no blob is shared with a third one. The layer that stays is the last of a
    row, or the one whose appendage (``_linear``) the last is; it writes the last one's blob. Where nothing is
    merged the model is the one given.

    ``only``: exactly these rows of layers, whatever they cost. Without weights the structure alone changes; a layer
    with a bias counts as one whose bias is not zero, but not with ``only``, and layers of which neither shapes nor
    weights say what they read are left alone.

    Raises PlanError where a row of ``only`` cannot be merged, WeightsError where net and weights do not belong
    together.
    """
    found = _Rows(find(model, input_shapes), trusted=only is not None)
    chosen = [tuple(row) for row in only] if only is not None else list(found.best())
    if only is not None:
        found.check(chosen)
    edits = [edit for row in chosen for edit in found.edits(row)]
    apart = dict(found.apart()) if only is None else {}
    merges = tuple(found.merge(row) for row in chosen)
    return Merged(rewrite(model, edits) if edits else model, merges, apart)


class _Rows:
    """The rows of a net. ``trusted``: without weights, biases count as zeros."""

    def __init__(self, found: Found, trusted: bool) -> None:
        self.found = found
        self.trusted = trusted
        self.nodes = found.shaped.graph.nodes
        self.whole = found.model.net.upgraded.all_layers

    @cached_property
    def before(self) -> dict[str, str]:
        """The layer in front of each that nothing comes between, and that is of its kind: of fully connected ones, one
        that flattens from the same axis."""
        graph, made = self.found.shaped.graph, {}
        for name, target in self.found.targets.items():
            inputs = self.nodes[target.index].inputs
            if len(inputs) != 1 or len(graph.consumers[inputs[0]]) != 1:
                continue
            source = self.found.targets.get(self.nodes[inputs[0].node].name)
            if source is None or source.index != inputs[0].node or source.dense != target.dense:
                continue
            if not target.dense or self._axis(source.name) == self._axis(name):
                made[name] = source.name
        return made

    def refusal(self, first: str, second: str) -> str | None:
        """Why two neighbours cannot be one, whatever their numbers."""
        one, two = (self.nodes[self.found.targets[name].index] for name in (first, second))
        if len(one.layer.tops) != 1 or len(two.layer.tops) != 1:
            return "several blobs go through the same weights"
        for name in (first, second):
            blocks = [layer for layer in self.whole if layer.name == name]
            if len(blocks) > 1:
                return f'"{name}" stands in the file {len(blocks)} times'
            shared = self._shared(blocks[0])
            if shared is not None:
                return shared
        if self._rules(one.layer) != self._rules(two.layer):
            return "one of them exists in other phases than the other"
        (blob,) = one.layer.tops
        others = [
            layer.name
            for layer in self.whole
            if blob in (*layer.bottoms, *layer.tops) and layer.name not in (first, second)
        ]
        if blob in two.layer.tops:
            return "the second writes in place"
        if others:
            return f'in another phase "{blob}" is used by ' + ", ".join(f'"{name}"' for name in others)
        rates = [
            layer.param_specs[0].lr_mult if layer.param_specs else 1.0 for layer in (one.layer, two.layer)
        ]
        if rates[0] != rates[1]:
            return f"they learn at different rates (lr_mult {rates[0]:g} and {rates[1]:g})"
        return None

    @staticmethod
    def _rules(layer: Layer) -> list[str]:
        """The phase rules of a layer, as they are written."""
        return [
            " ".join(layer.document.text[field.value.start : field.value.end].split())
            for kind in ("include", "exclude")
            for field in layer.message.all(kind)
        ]

    def _shared(self, layer: Layer) -> str | None:
        names = {spec.name for spec in layer.param_specs if spec.name}
        for other in self.whole:
            both = names.intersection(spec.name for spec in other.param_specs) if other is not layer else ()
            for name in sorted(both):
                return f'"{layer.name}" shares its blob "{name}" with "{other.name}"'
        return None

    def _axis(self, name: str) -> int | None:
        """The axis from which a fully connected layer flattens; as written where shapes are not known."""
        index = self.found.targets[name].index
        params = self.nodes[index].params
        if index in self.found.shaped.unknown:
            return int(params.axis)
        return canonical_axis(params.axis, len(self.found.shaped.bottoms(index)[0]))

    def bare(self, name: str) -> StepShape:
        """A layer as a step without numbers; what it reads is what the layer before makes."""
        target = self.found.targets[name]
        out, depth, *kernel = target.shape
        g = target.geometry
        if not self.known(name) and name in self.before:
            depth = self.found.targets[self.before[name]].shape[0] // g.group
        return StepShape("", (out, depth, kernel[0], kernel[1]), g.stride, g.pad, g.dilation, g.group)

    def known(self, name: str) -> bool:
        """Whether the shapes or the weights say how many channels a layer reads."""
        index = self.found.targets[name].index
        return index in self.found.blobs or index not in self.found.shaped.unknown

    def step(self, name: str) -> Step | None:
        """A layer as a step; None where the model has no weights."""
        target, g = self.found.targets[name], self.found.targets[name].geometry
        if target.index not in self.found.blobs:
            return None
        weight, *biases = self.found.blobs[target.index]
        bias = np.asarray(biases[0], np.float64).reshape(-1) if biases else None
        return Step(
            "", np.asarray(target.kernel(weight), np.float64), bias, g.stride, g.pad, g.dilation, g.group
        )

    def biased(self, name: str) -> bool:
        """Whether a layer adds a bias that is not zero, as far as is known."""
        blobs = self.found.blobs.get(self.found.targets[name].index)
        if blobs is None:
            return self.has_bias(name) and not self.trusted
        return len(blobs) > 1 and is_biased(blobs[1])

    def has_bias(self, name: str) -> bool:
        """Whether a layer learns a bias."""
        return bool(self.nodes[self.found.targets[name].index].params.bias)

    def one(self, row: Sequence[str]) -> tuple[StepShape, str | None]:
        """The layer that a row is, without its numbers, and why it is none after all."""
        made, biased, why = self.bare(row[0]), self.biased(row[0]), None
        for name in row[1:]:
            step = self.bare(name)
            why = why or inexact(made, step, biased)
            made, biased = merged_shape(made, step), biased or self.biased(name)
        return made, why

    def cost(self, row: Sequence[str], *one: StepShape) -> int:
        """MACs of a row, or of one layer in its place."""
        return self.found.targets[row[0]].cost(*(one or map(self.bare, row)))

    def best(self) -> Iterator[tuple[str, ...]]:
        """The rows to merge: of all ways to cut the net's rows, the one of the fewest MACs."""
        for row in self._whole_rows():
            cuts: list[tuple[int, list[tuple[str, ...]]]] = [(0, [])]
            for end in range(1, len(row) + 1):
                ways = []
                for start in reversed(range(end)):  # a tie leaves layers alone
                    part = row[start:end]
                    cost = self._price(part)
                    if cost is not None:
                        ways.append((cuts[start][0] + cost, [*cuts[start][1], part]))
                cuts.append(min(ways, key=lambda way: way[0]))
            yield from (part for part in cuts[-1][1] if len(part) > 1)

    def _price(self, row: tuple[str, ...]) -> int | None:
        """MACs of a row as one layer, None where it is none."""
        one, why = self.one(row)
        return self.cost(row, one) if why is None else None

    def _whole_rows(self) -> Iterator[tuple[str, ...]]:
        """The longest rows of layers that may be one."""
        behind = {
            first: second
            for second, first in self.before.items()
            if self.known(first) and self.refusal(first, second) is None
        }
        inner = set(behind.values())
        for name in behind:
            if name in inner:
                continue
            row = [name]
            while row[-1] in behind:
                row.append(behind[row[-1]])
            yield tuple(row)

    def apart(self) -> Iterator[tuple[tuple[str, str], str]]:
        """Pairs that would cost less as one if it were not for a reason."""
        for second, first in self.before.items():
            pair = (first, second)
            if not self.known(first):
                continue
            one, why = self.one(pair)
            why = self.refusal(first, second) or why
            if why is not None and self.cost(pair, one) < self.cost(pair):
                yield pair, why

    def check(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Refuse rows that are none. Raises PlanError."""
        path, names = self.found.model.net.path, [name for row in rows for name in row]
        for name in names:
            if name not in self.found.targets:
                what = (
                    f'the plan merges "{name}", which is no convolution or fully connected layer of the net'
                )
                raise PlanError(what, path=path, hint=nearest(name, list(self.found.targets)))
            if names.count(name) > 1:
                raise PlanError(f'the plan merges "{name}" twice', path=path)
        for row in rows:
            reasons = [
                self.refusal(first, second)
                if self.before.get(second) == first
                else "they are no layers of one kind with nothing in between"
                for first, second in pairwise(row)
            ]
            why = next(filter(None, reasons), None) or self.one(row)[1]
            if why is not None:
                raise PlanError(f"the plan merges {' and '.join(row)}: {why}", path=path)

    def merge(self, row: tuple[str, ...]) -> Merge:
        """What a report says of a row."""
        one, _ = self.one(row)
        known = self.found.targets[row[0]].in_hw is not None
        return Merge(row, _name(row), one.shape, (self.cost(row), self.cost(row, one)) if known else None)

    def edits(self, row: tuple[str, ...]) -> Iterator[Replace]:
        """The layer that stays, in its new shape, and nothing in the place of the others."""
        kept, steps = _name(row), [step for name in row if (step := self.step(name)) is not None]
        layers = {layer.name: layer for layer in self.whole if layer.name in row}
        params = self.nodes[self.found.targets[row[0]].index].params
        new = merged_layer(
            layers[kept],
            self.found.targets[kept],
            reduce(merge_steps, steps) if steps else self.one(row)[0],
            bottoms=layers[row[0]].bottoms,
            tops=layers[row[-1]].tops,
            has_bias=any(map(self.has_bias, row)),
            axis=params.axis if isinstance(params, DenseParams) else None,
        )
        yield Replace(kept, (new,))
        yield from (Replace(name, ()) for name in row if name != kept)


def _name(row: Sequence[str]) -> str:
    """The name of the layer that stays: the last one's, or that of the one whose appendage it is."""
    return reduce(lambda kept, name: kept if is_appendage(name, kept) else name, row)
