"""BatchNorm, Scale and Bias folded into the layer that they follow, and taken out of the net.

Behind a convolution or a fully connected layer ``y = W x + b``, a fixed scale and shift of the channels is part of
the layer: ``scale*y + shift = (scale W) x + (scale b + shift)``. Rows of layers fold one after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np

from . import binding
from .errors import Error
from .graph import Graph, Node, build
from .layers.conv import ConvParams, geometry
from .layers.dense import DenseParams
from .layers.norm import BatchNormParams
from .layers.spec import Affine, Arrays, LayerSpec, canonical_axis
from .model import Model
from .net import Net, NetState
from .rewrite import Narrow, NewValues, Replace
from .rewrite import apply as rewrite
from .shape_inference import InputShapes, infer
from .text import quote

_PHASES = ("TEST", "TRAIN")


def fold_batchnorm(model: Model, input_shapes: InputShapes | None = None) -> tuple[Model, dict[str, str]]:
    """The model with every layer folded that can be: ``W' = scale W``, ``b' = scale b + shift``; others by reason.

    What folds is a fixed scale and shift of axis 1 (BatchNorm with its stored statistics, Scale and Bias with
    learnt blobs, forks' BN) that alone reads what a Convolution, Deconvolution or InnerProduct makes, or what was
    folded into one. Those gain a bias where they have none. The blob behind the last layer folded keeps its name;
    those between are gone. In a file of several phases the layers go from all of them. Without weights the
    structure alone changes. Where nothing folds the model is the one given.

    Returns:
        The folded model, and layer -> why it was not folded.

    Raises NetError and WeightsError where the net is none, or the weights are not its own.
    """
    found = _Folder(model, input_shapes)
    for index in range(len(found.nodes)):
        found.visit(index)
    edits = [edit for chain in found.chains.values() if chain.layers for edit in _edits(found, chain)]
    return rewrite(model, edits) if edits else model, found.refused


@dataclass(eq=False)
class _Chain:
    """A layer and those that fold into it, all by node, with what these do together."""

    host: int
    affine: Affine
    layers: list[int] = field(default_factory=list)

    def add(self, index: int, affine: Affine) -> None:
        """One more layer behind the others."""
        (scale, shift), (more, further) = self.affine, affine
        self.affine = scale * more, shift * more + further
        self.layers.append(index)


@dataclass(frozen=True)
class _Link:
    """Of a layer that alone reads its only bottom: who made that, and what it writes."""

    source: str
    tops: tuple[str, ...]


class _Folder:
    """A net on the way: ``chains`` by the node at their end, and the layers that do not fold."""

    def __init__(self, model: Model, inputs: InputShapes | None) -> None:
        self.model = model
        self.shaped = infer(build(model.net), inputs, partial=True)
        self.blobs: Mapping[int, Arrays]
        self.blobs = (
            binding.bind(self.shaped, model.weights)
            if model.weights is not None
            else binding.random(self.shaped)
        )
        self.chains: dict[int, _Chain] = {}
        self.refused: dict[str, str] = {}

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.shaped.graph.nodes

    def visit(self, index: int) -> None:
        """Fold a node into the chain before it, or note why not."""
        node = self.nodes[index]
        if node.spec is None or node.spec.affine is LayerSpec.affine:
            return
        affine = self._affine(index)
        if isinstance(affine, str):
            self.refused[node.name] = affine
            return
        why = self._unjoinable(node)
        if why is not None:
            self.refused[node.name] = why
            return
        before = node.inputs[0].node
        ones = np.ones_like(affine[0])
        chain = self.chains.pop(before, None) or _Chain(before, (ones, np.zeros_like(ones)))
        chain.add(index, affine)
        self.chains[index] = chain

    def _affine(self, index: int) -> Affine | str:
        """What a node does, or why that is no fixed scale and shift."""
        node = self.nodes[index]
        assert node.spec is not None
        if len(node.inputs) != 1:
            return f"it reads {len(node.inputs)} blobs, its factors are not learnt"
        if index in self.shaped.unknown:
            return f"its shape is not known: {self.shaped.unknown[index].message}"
        made = node.spec.affine(node.params, self.blobs.get(index, ()), self.shaped.bottoms(index))
        if made is not None:
            finite = all(np.isfinite(part).all() for part in made)
            return made if finite else "its scale or shift is not finite"
        if isinstance(node.params, BatchNormParams):
            return "it uses the statistics of each batch (use_global_stats: false)"
        return "it is no fixed scale and shift of the channels, axis 1"

    def _unjoinable(self, node: Node) -> str | None:
        """Why a node cannot become part of what it reads."""
        before = node.inputs[0].node
        source = self.nodes[before]
        if before not in self.chains:
            why = self._no_host(before)
            if why is not None:
                return why
        readers = self.shaped.graph.consumers[node.inputs[0]]
        if len(readers) > 1:
            names = ", ".join(f'"{self.nodes[reader].name}"' for reader in readers)
            return f'it is not the only one to read "{source.name}": {names}'
        link = _Link(source.name, node.layer.tops)
        for one in (source, node):
            if self._names[one.name] > 1:
                return f'the net holds several layers "{one.name}"'
            shared = self._shared(one)
            if shared is not None:
                return shared
        for state, links, there in self._states:
            if {source.name, node.name} & there and links.get(node.name) != link:
                where = f"phase {state.phase}" + "".join(f", stage {stage}" for stage in state.stages)
                return f'in {where} the net is another one behind "{source.name}"'
        return None

    def _no_host(self, index: int) -> str | None:
        """Why nothing can be folded into a node."""
        node = self.nodes[index]
        if (
            not isinstance(node.params, ConvParams | DenseParams)
            or node.spec is None
            or not node.spec.filters
        ):
            return f'it follows "{node.name}" ({node.layer.type})' + (
                ", which is not folded" if node.name in self.refused else ""
            )
        if len(node.layer.tops) != 1:
            return f'"{node.name}" writes {len(node.layer.tops)} blobs with the same weights'
        (bottom,) = self.shaped.bottoms(index)
        axis = (
            geometry(node.params, bottom)[0]
            if isinstance(node.params, ConvParams)
            else canonical_axis(node.params.axis, len(bottom))
        )
        return None if axis == 1 else f'the outputs of "{node.name}" lie along axis {axis}, not 1'

    def _shared(self, node: Node) -> str | None:
        """Why a layer's blobs must stay as they are: another layer has them too."""
        for spec in node.layer.param_specs:
            others = self._sharers.get(spec.name, set()) - {node.name} if spec.name else set()
            if others:
                return f'"{node.name}" shares its blob "{spec.name}" with ' + ", ".join(
                    f'"{name}"' for name in sorted(others)
                )
        return None

    @cached_property
    def _names(self) -> Counter[str]:
        return Counter(node.name for node in self.nodes)

    @cached_property
    def _sharers(self) -> dict[str, set[str]]:
        """The layers of any phase that have a blob of each param name."""
        found: dict[str, set[str]] = {}
        for layer in self.model.net.upgraded.all_layers:
            for spec in layer.param_specs:
                found.setdefault(spec.name, set()).add(layer.name)
        return found

    @cached_property
    def _states(self) -> list[tuple[NetState, dict[str, _Link], set[str]]]:
        """How layers are joined in every state that the file tells apart, and the layers there are."""
        found = []
        for state, graph in _graphs(self.model.net):
            names = {node.name for node in graph.nodes}
            found.append((state, dict(_links(graph)), names))
        return found


def _graphs(net: Net) -> Iterator[tuple[NetState, Graph]]:
    """The graphs in both phases, with the net's own stages and each that a rule names besides.

    A state in which the file is no net is left out.
    """
    rules = [
        rule
        for layer in net.upgraded.all_layers
        for kind in ("include", "exclude")
        for rule in layer.message.messages(kind)
    ]
    named = {stage for rule in rules for stage in (*rule.strings("stage"), *rule.strings("not_stage"))}
    more = [(), *((stage,) for stage in sorted(named - set(net.state.stages)))]
    for phase, stages in product(_PHASES, more):
        state = replace(net.state, phase=phase, stages=(*net.state.stages, *stages))
        try:
            yield state, build(replace(net, state=state))
        except Error:
            continue


def _links(graph: Graph) -> Iterator[tuple[str, _Link]]:
    for node in graph.nodes:
        if len(node.inputs) == 1 and len(graph.consumers[node.inputs[0]]) == 1:
            yield node.name, _Link(graph.nodes[node.inputs[0].node].name, node.layer.tops)


def _edits(found: _Folder, chain: _Chain) -> Iterator[Narrow | Replace]:
    """The host with other numbers, a bias and the last top; nothing in the place of the layers behind it."""
    node, last = found.nodes[chain.host], found.nodes[chain.layers[-1]]
    assert isinstance(node.params, ConvParams | DenseParams)
    values = []
    if last.layer.tops != node.layer.tops:
        values.append(NewValues((), "top", (quote(last.layer.tops[0]),)))
    if not node.params.bias:
        block = "convolution_param" if isinstance(node.params, ConvParams) else "inner_product_param"
        values.append(NewValues((block,), "bias_term", ("true",)))
    blobs = _folded(node, found.blobs[chain.host], chain.affine) if found.model.weights is not None else None
    yield Narrow(node.name, tuple(values), blobs)
    for index in chain.layers:
        yield Replace(found.nodes[index].name, ())


def _folded(node: Node, blobs: Arrays, affine: Affine) -> Arrays:
    """Weight and bias behind a scale and a shift of (out,) each."""
    scale, shift = affine
    weight = blobs[0].astype(np.float64)
    if isinstance(node.params, DenseParams):
        scaled = weight * (scale if node.params.transpose else scale[:, None])
    elif node.layer.type == "Deconvolution":  # (in, out/group, ...), the inputs of a group together
        grouped = weight.reshape(node.params.group, -1, *weight.shape[1:])
        ones = (1,) * (weight.ndim - 2)
        scaled = (grouped * scale.reshape(node.params.group, 1, -1, *ones)).reshape(weight.shape)
    else:
        scaled = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    bias = blobs[1].reshape(-1) * scale + shift if len(blobs) > 1 else shift
    return scaled.astype(np.float32), bias.astype(np.float32)
