"""The deploy form of a train_val: inputs for data layers, probabilities for losses, no labels.

What depends on a label goes. A label is a fed blob that no learning layer reads, so no type needs a name
here. What is left is what the losses judge, and all that leads there; the text of it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from . import net as nets
from .blocks import Block
from .errors import NetError, ShapeError, UsageError
from .graph import Graph, Node, Value, build
from .layers import LAYERS
from .layers.ends import SourceParams
from .layers.shape import VIEW
from .layers.spec import Shape
from .net import Layer, Net, NetState, nearest
from .rewrite import Namer
from .shape_inference import InputShapes
from .text import Message, quote
from .typed import Typed

# A loss, and the layer (V2 and V1 type) that turns the same scores into what the loss judges.
_ENDS = {"SoftmaxWithLoss": ("Softmax", "SOFTMAX"), "SigmoidCrossEntropyLoss": ("Sigmoid", "SIGMOID")}
_KEPT_FIELDS = ("name", "type", "top")
_LOSS_FIELDS = ("loss_weight", "loss_param", "propagate_down")
_RULES = ("include", "exclude")


@dataclass(frozen=True)
class Deployed:
    """A deploy net, the shapes of its inputs, its outputs, and the names of the layers that were left out."""

    net: Net
    inputs: dict[str, Shape]
    outputs: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class _Loss:
    layer: Layer
    inputs: tuple[Value, ...]

    @property
    def weight(self) -> float:
        """The largest of its weights; a loss without any has 1."""
        return max(_loss_weights(self.layer), default=1.0)


@dataclass(frozen=True, eq=False)
class _Survey:
    """What of a net is fed, learns, knows the labels and judges."""

    net: Net
    graph: Graph

    def needs(self, value: Value) -> tuple[Value, ...]:
        """The values that one is made from. Tai's Gather joins the batches of several devices, blob by blob."""
        node = self.graph.nodes[value.node]
        return (node.inputs[value.top],) if _is_gather(node) else node.inputs

    def ancestors(self, values: Iterable[Value]) -> set[Value]:
        """The values themselves and all that they are made from."""
        found: set[Value] = set()
        left = list(values)
        while left:
            value = left.pop()
            if value not in found:
                found.add(value)
                left.extend(self.needs(value))
        return found

    @cached_property
    def sources(self) -> tuple[Value, ...]:
        """The fed values, those of data layers that this program does not know among them."""
        return tuple(value for value in self.graph.values() if _is_source(self.graph.nodes[value.node]))

    @cached_property
    def labels(self) -> set[Value]:
        """The fed values that no learning layer reads."""
        read = [value for node in self.graph.nodes if _learns(node) for value in node.inputs]
        return set(self.sources) - self.ancestors(read)

    def judged(self, value: Value) -> bool:
        """Whether a learning layer made it, without help of a label."""
        origin = self.ancestors([value])
        return not origin & self.labels and any(_learns(self.graph.nodes[one.node]) for one in origin)

    @cached_property
    def losses(self) -> tuple[_Loss, ...]:
        """The losses of this phase; those of TRAIN on blobs of this phase where it has none."""
        own = [_Loss(node.layer, node.inputs) for node in self.graph.nodes if _is_loss(node.layer)]
        training = replace(self.net, state=replace(self.net.state, phase="TRAIN"))
        final = self.graph.final
        return tuple(own) or tuple(
            _Loss(layer, tuple(final[name] for name in layer.bottoms if name in final))
            for layer in training.layers
            if _is_loss(layer) and layer.bottoms[0] in final
        )

    def main_losses(self, auxiliary: bool) -> Iterator[_Loss]:
        """The losses of the largest weight, or all."""
        largest = max((loss.weight for loss in self.losses), default=0)
        return (loss for loss in self.losses if auxiliary or loss.weight == largest)

    def existing_end(self, loss: _Loss) -> Value | None:
        """The Softmax (Sigmoid) that the net already has on a loss's scores."""
        readers = self.graph.consumers[loss.inputs[0]]
        wanted = _ENDS[loss.layer.type][0]
        return next((Value(i, 0) for i in readers if self.graph.nodes[i].layer.type == wanted), None)


def _is_source(node: Node) -> bool:
    return node.spec.source if node.spec is not None else not node.layer.bottoms


def _is_gather(node: Node) -> bool:
    layer = node.layer
    return layer.type == "Gather" and node.spec is None and len(layer.bottoms) == len(layer.tops)


def _learns(node: Node) -> bool:
    return node.spec is not None and node.spec.filters


def _is_loss(layer: Layer) -> bool:
    """A loss by its type, one of a fork by its name, or any layer with a loss_weight."""
    known = LAYERS.get(layer.type)
    named = known.loss if known else layer.type.endswith("Loss")
    return bool(layer.bottoms) and (named or any(_loss_weights(layer)))


def _loss_weights(layer: Layer) -> list[float]:
    name = "V1LayerParameter" if layer.dialect == "V1" else "LayerParameter"
    return list(Typed(layer.message, name, layer.document)["loss_weight"])


@dataclass
class _Choice:
    """What the deploy net shall give: values, and losses that become the layer that makes them."""

    values: list[Value] = field(default_factory=list)
    converted: list[_Loss] = field(default_factory=list)


def _choose(survey: _Survey, auxiliary: bool) -> _Choice:
    choice = _Choice()
    for loss in survey.main_losses(auxiliary):
        if loss.layer.type not in _ENDS:
            choice.values += [value for value in loss.inputs if survey.judged(value)]
            continue
        end = survey.existing_end(loss)
        choice.values.append(end or loss.inputs[0])
        if end is None and loss.inputs[0] not in (other.inputs[0] for other in choice.converted):
            choice.converted.append(loss)
    graph = survey.graph
    for value in graph.final.values():
        if (
            not graph.consumers[value]
            and not _is_loss(graph.nodes[value.node].layer)
            and survey.judged(value)
        ):
            choice.values.append(value)
    if not choice.values:
        raise NetError("has no loss and no output that a learning layer made", path=survey.net.path)
    return choice


def deploy(
    net: Net, input_shapes: InputShapes | None = None, *, batch: int | None = None, auxiliary: bool = False
) -> Deployed:
    """The deploy form of a net as it stands in its phase.

    Data layers get the batch size 1, or ``batch``; Input layers keep theirs without it. ``auxiliary`` keeps
    the classifiers whose loss weighs less than the heaviest. Raises ShapeError where the file does not say
    how large an input is. A V0 net comes out as V2.
    """
    net = net.upgraded
    survey = _Survey(net, build(net))
    given = dict(input_shapes or {})
    fed = [survey.graph.blob(value) for value in survey.sources]
    for name in given.keys() - set(fed):
        raise UsageError(f'"{name}" is no input of the net', path=net.path, hint=nearest(name, fed))
    return _Writer(survey, _choose(survey, auxiliary), given, batch).write()


class _Writer:
    """Edits of the train_val's text that leave the deploy net."""

    def __init__(self, survey: _Survey, choice: _Choice, given: InputShapes, batch: int | None) -> None:
        self.survey, self.choice, self.given, self.batch = survey, choice, given, batch
        self.net, self.graph = survey.net, survey.graph
        self.live = survey.ancestors(choice.values)
        self.block = Block(self.net.document, 0, len(self.net.text))
        nodes = [self.graph.nodes[index] for index in sorted({value.node for value in self.live})]
        real = (node for node in nodes if not _is_gather(node) and node.layer.type != VIEW)
        self.nodes = {node.layer.span: node for node in real}
        self.inputs: dict[str, Shape] = {}
        names = {name for node in nodes for name in (node.name, *node.layer.tops)}
        self.namer = Namer(names)

    def write(self) -> Deployed:
        """Edit every layer of the file."""
        ends = {loss.layer.span: loss for loss in self.choice.converted}
        legacy = self._sources()
        kept: set[str] = {node.name for node in self.nodes.values()}
        whole = {(one.start, one.end): one for one in self.net.document.root.fields}
        for layer in self.net.all_layers:
            if layer.span in ends:
                self._end(layer, ends[layer.span])
            elif layer.span in self.nodes and layer.span not in legacy:
                self._strip(layer)
            else:
                self.block.remove(whole[layer.span])
        made = nets.parse(
            self.block.text(), self.net.path, NetState("TEST", self.net.state.stages, self.net.state.level)
        )
        gone = (
            layer.name for layer in self.net.all_layers if layer.span not in ends and layer.name not in kept
        )
        return Deployed(made, self.inputs, build(made).outputs, tuple(dict.fromkeys(gone)))

    def _strip(self, layer: Layer) -> None:
        """The rules go, for there is one phase left; what read a Gather reads what went into it."""
        for name in _RULES:
            self.block.set(layer.message, name, [])
        bottoms = tuple(self._past_gather(name, layer) for name in layer.bottoms)
        if bottoms != layer.bottoms:
            self.block.set(layer.message, "bottom", [quote(name) for name in bottoms])

    def _past_gather(self, name: str, layer: Layer) -> str:
        """The blob to read in the place of a Gather's top."""
        value = self.nodes[layer.span].inputs[layer.bottoms.index(name)]
        node = self.graph.nodes[value.node]
        return node.layer.bottoms[value.top] if _is_gather(node) else name

    def _end(self, layer: Layer, loss: _Loss) -> None:
        """A loss becomes the layer that makes probabilities of its scores."""
        kind, enumerator = _ENDS[layer.type]
        name = quote(self.namer.unique("prob"))
        self.block.set(layer.message, "name", [name])
        self.block.set(layer.message, "type", [enumerator if layer.dialect == "V1" else quote(kind)])
        self.block.set(layer.message, "bottom", [quote(self.graph.blob(loss.inputs[0]))])
        self.block.set(layer.message, "top", [name], ("bottom",))
        for unwanted in (*_RULES, *_LOSS_FIELDS):
            self.block.set(layer.message, unwanted, [])

    def _sources(self) -> set[tuple[int, int]]:
        """Turn what feeds the net into inputs; the spans of V1 data layers, which become fields of the file."""
        legacy = self.net.legacy_input
        fields: dict[str, Shape] = {}
        spans: set[tuple[int, int]] = set()
        for node in (one for one in self.nodes.values() if _is_source(one)):
            shapes = self._shapes(node)
            self.inputs |= shapes
            if node.layer.dialect == "V1" or (legacy is not None and node.layer.span == legacy.span):
                fields |= shapes
                spans.add(node.layer.span)
            elif node.layer.type != "Input" or not self._stays(node, shapes):
                self._input_layer(node.layer, shapes)
        if legacy is not None or fields:
            self._input_fields(fields)
        return spans

    def _stays(self, node: Node, shapes: dict[str, Shape]) -> bool:
        return tuple(shapes) == node.layer.tops and tuple(shapes.values()) == node.params.shapes

    def _shapes(self, node: Node) -> dict[str, Shape]:
        """The shape of each blob of a source that is still read."""
        index = self.graph.nodes.index(node)
        known = node.params if isinstance(node.params, SourceParams) else None
        found: dict[str, Shape] = {}
        for top, name in enumerate(node.layer.tops):
            if Value(index, top) not in self.live:
                continue
            shape = self.given.get(name) or (known.shapes[top] if known else None)
            if shape is None:
                why = (
                    known.why
                    if known and known.why
                    else f"{node.layer.type} does not say how large its blobs are"
                )
                hint = f"give it with --input-shape {name}=1,3,227,227"
                raise ShapeError(why, path=self.net.path, line=node.layer.line, layer=node.name, hint=hint)
            batch = self.batch or (shape[0] if node.layer.type == "Input" else 1)
            found[name] = tuple(shape) if name in self.given else (batch, *shape[1:])
        return found

    def _input_layer(self, layer: Layer, shapes: dict[str, Shape]) -> None:
        """V2: the data layer's block as an Input."""
        self.block.set(layer.message, "type", [quote("Input")])
        self.block.set(layer.message, "top", [quote(name) for name in shapes])
        for one in layer.message.fields:
            if one.name not in _KEPT_FIELDS:
                self.block.remove(one)
        items = " ".join(f"shape {_dims(shape)}" for shape in shapes.values())
        self.block.add(layer.message, [f"input_param {{ {items} }}"], ("top",))

    def _input_fields(self, shapes: dict[str, Shape]) -> None:
        """V1, and V2 with ``input`` already: the inputs as fields of the file, where they are not just that."""
        root: Message = self.net.document.root
        legacy = self.net.legacy_input
        if legacy is not None and self._unchanged_fields(legacy, shapes):
            return
        self.block.set(root, "input", [quote(name) for name in shapes], ("name",))
        four = all(len(shape) == 4 for shape in shapes.values()) and root.last("input_shape") is None
        dims = [str(dim) for shape in shapes.values() for dim in shape] if four else []
        self.block.set(root, "input_dim", dims, ("input", "name"))
        listed = [] if four else [_dims(shape) for shape in shapes.values()]
        self.block.set(root, "input_shape", listed, ("input", "name"))

    def _unchanged_fields(self, legacy: Layer, shapes: dict[str, Shape]) -> bool:
        node = self.nodes.get(legacy.span)
        return node is not None and self._stays(node, shapes)


def _dims(shape: Shape) -> str:
    return f"{{ {' '.join(f'dim: {dim}' for dim in shape)} }}"
