"""A net in torch: its blobs as parameters under Caffe's names, its forward pass, and back to Weights.

A blob that layers share by ``param`` name is one tensor, of the first layer that names it. Losses are those
of Caffe: every top times its loss_weight.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import schema
from .binding import bind
from .errors import Error, NetError, UnsupportedError, WeightsError
from .fillers import initial
from .graph import Graph, Node, Value
from .layers.spec import Arrays, Request, Shapes, text
from .net import Net
from .shape_inference import Shaped
from .torch_layers import TORCH
from .torch_layers.base import ALONE, Call, Forward, Peers
from .torch_layers.norm import STATISTICS
from .typed import Typed, field_info
from .weights import Entry, NewEntry, Weights

Key = tuple[str, int]
"""A learnt blob: the layer that owns it, and its number there."""


@dataclass(frozen=True)
class Multipliers:
    """lr_mult and decay_mult of a learnt blob; None where no layer gives one, which is 1."""

    own_rate: float | None = None
    own_decay: float | None = None

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""
        return 1.0 if self.own_rate is None else self.own_rate

    @property
    def decay(self) -> float:
        """What the weight decay is multiplied by."""
        return 1.0 if self.own_decay is None else self.own_decay


@dataclass(frozen=True, eq=False)
class Pass:
    """What a forward pass gave: the loss, which may be differentiated, and the blobs by name."""

    loss: Tensor
    blobs: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Step:
    """A node ready to run. ``forward`` is None where its tops are fed; ``shapes`` are those of its blobs."""

    node: Node
    forward: Forward | None
    keys: tuple[Key, ...]
    shapes: Shapes
    loss_weights: tuple[float, ...]
    stopped: frozenset[int]


class TorchNet:
    """A net of one phase over blobs that several nets may share.

    ``learnt`` maps each blob to its tensor, in the order of the net; those without an lr_mult take no gradient.
    ``given``: tensors of layers of the same name that are taken as they are, as Caffe's test nets take those of
    the net that is trained. Raises UnsupportedError where a layer cannot be trained, with file, line and layer.
    """

    def __init__(
        self,
        net: Net,
        shaped: Shaped,
        blobs: Mapping[int, Arrays],
        *,
        given: Mapping[Key, Tensor] | None = None,
        device: str = "cpu",
        peers: Peers = ALONE,
    ) -> None:
        self.net, self.shaped, self.graph, self.peers = net, shaped, shaped.graph, peers
        self.device = torch.device(device)
        self.learnt: dict[Key, Tensor] = {}
        self.named: dict[Key, Tensor] = {}
        """The same tensors under the names of every layer that has them."""
        self.multipliers: dict[Key, Multipliers] = {}
        self.state: dict[int, dict[str, Tensor]] = {}
        keys = _keys(self.graph, blobs)
        for index, owned in keys.items():
            self._take(self.graph.nodes[index], owned, blobs[index], given or {})
        for key, tensor in self.learnt.items():
            tensor.requires_grad_(self.trains(key))
        self._steps = [
            self._step(node, keys.get(index, ()), shaped.blobs(index))
            for index, node in enumerate(self.graph.nodes)
        ]
        self._last_uses = _last_uses(self.graph)

    def trains(self, key: Key) -> bool:
        """Whether a blob has a learning rate."""
        return self.multipliers[key].rate != 0

    @property
    def loss_weights(self) -> dict[str, float]:
        """The loss_weight of each blob that has one."""
        return {
            name: weight
            for step in self._steps
            for name, weight in zip(
                _top_names(step.node, len(step.loss_weights)), step.loss_weights, strict=False
            )
            if weight
        }

    def run(self, feeds: Mapping[str, Tensor], *, every: bool = False) -> Pass:
        """A forward pass from the tops of the data layers: the loss and the outputs; ``every``: all blobs."""
        values: dict[Value, Tensor] = {}
        losses: list[Tensor] = []
        found: dict[str, Tensor] = {}
        names = self.graph.final if every else self.graph.outputs
        wanted = {self.graph.final[name]: name for name in names}
        for index, step in enumerate(self._steps):
            made = self._run(index, step, values, feeds)
            tops = step.node.layer.tops
            losses += [w * one.sum() for w, one in zip(step.loss_weights, made, strict=False) if w]
            if len(made) > len(tops):
                found[_top_names(step.node, 1)[0]] = made[0].detach()
            for top in range(len(tops)):
                value = Value(index, top)
                values[value] = made[top]
                if value in wanted:
                    found[wanted[value]] = made[top].detach()
            for value in self._last_uses.get(index, ()):
                del values[value]
        return Pass(torch.stack(losses).sum() if losses else torch.zeros(()), found)

    def weights(self) -> Weights:
        """All learnt blobs as Caffe stores them: every layer its own, shared ones in each."""
        entries: list[Entry] = []
        for step in self._steps:
            if step.keys:
                message = schema.message_class("LayerParameter")(
                    name=step.node.name, type=step.node.layer.type
                )
                arrays = tuple(blob.detach().cpu().numpy().copy() for blob in self._blobs(step))
                entries.append(NewEntry(step.node.name, arrays, message.SerializeToString()))
        return Weights(entries)

    def carried(self) -> dict[str, np.ndarray]:
        """What layers keep from one pass to the next; see ``carry``."""
        return {
            f"{index}/{name}": tensor.cpu().numpy()
            for index, state in self.state.items()
            for name, tensor in state.items()
        }

    def carry(self, stored: Mapping[str, np.ndarray]) -> None:
        """Go on from what ``carried`` gave."""
        for name, array in stored.items():
            index, _, inner = name.partition("/")
            self.state.setdefault(int(index), {})[inner] = torch.tensor(array, device=self.device)

    def _take(self, node: Node, keys: tuple[Key, ...], arrays: Arrays, given: Mapping[Key, Tensor]) -> None:
        for i, (key, array) in enumerate(zip(keys, arrays, strict=True)):
            if key not in self.learnt:
                tensor = given.get((node.name, i))
                if tensor is None:
                    tensor = torch.tensor(array, dtype=torch.float32, device=self.device)
                elif tuple(tensor.shape) != array.shape:
                    raise WeightsError(
                        f"blob {i} is {text(array.shape)} in the net that is tested, {text(tuple(tensor.shape))}"
                        " in the one that is trained", path=self.graph.path, layer=node.name,
                    )  # fmt: skip
                self.learnt[key] = tensor
            self.named[node.name, i] = self.learnt[key]
            self.multipliers[key] = _multipliers(node, i, self.multipliers.get(key))

    def _step(self, node: Node, keys: tuple[Key, ...], shapes: Shapes) -> _Step:
        if node.problem is not None:
            raise node.problem
        assert node.spec is not None
        if node.spec.source:
            return _Step(node, None, (), (), (), frozenset())
        layer, request = node.layer, request_of(node, self.net)
        try:
            if layer.type not in TORCH:
                raise UnsupportedError(f"{layer.type} cannot be trained")
            forward = TORCH[layer.type](node.params, request)
            return _Step(node, forward, keys, shapes, _loss_weights(node, request), _stopped(node, request))
        except Error as error:
            raise error.at(path=self.graph.path, line=layer.line, layer=layer.name) from error.__cause__

    def _run(
        self, index: int, step: _Step, values: Mapping[Value, Tensor], feeds: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        node = step.node
        if step.forward is None:
            return tuple(_laid_out(feeds[name].to(self.device)) for name in node.layer.tops)
        inputs = [
            values[value].detach() if i in step.stopped else values[value]
            for i, value in enumerate(node.inputs)
        ]

        def tops() -> Shapes:
            assert node.spec is not None
            return node.spec.infer(node.params, tuple(tuple(tensor.shape) for tensor in inputs))

        call = Call(inputs, self._blobs(step), tops, self.state.setdefault(index, {}), self.peers)
        try:
            return tuple(step.forward(call))
        except Error as error:
            raise error.at(path=self.graph.path, line=node.layer.line, layer=node.name) from error.__cause__

    def _blobs(self, step: _Step) -> list[Tensor]:
        return [self.learnt[key].reshape(shape) for key, shape in zip(step.keys, step.shapes, strict=True)]


def _laid_out(tensor: Tensor) -> Tensor:
    """Images with their channels last in memory, where torch's pooling and convolutions are faster; layers keep it."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _top_names(node: Node, count: int) -> tuple[str, ...]:
    """The names of a node's tops; an unnamed top of a loss is called after the layer."""
    return node.layer.tops or (f"{node.name} (automatic)",) * count


def request_of(node: Node, net: Net) -> Request:
    """The block of a node's layer, to read settings of."""
    layer = node.layer
    schema_type = "V1LayerParameter" if layer.dialect == "V1" else "LayerParameter"
    return Request(layer, Typed(layer.message, schema_type, layer.document), net.state.phase)


def start(
    net: Net,
    shaped: Shaped,
    weights: Weights | None,
    random: np.random.Generator,
    elsewhere: Container[str] = (),
) -> dict[int, Arrays]:
    """The blobs that training starts from: stored ones by layer name, fillers where a layer is not stored.

    Layers of ``elsewhere`` are zeros: another net has their blobs. Raises WeightsError where a stored layer has
    other blobs than the net's, as Caffe does.
    """
    stored = [piece for piece in weights.pieces if isinstance(piece, Entry)] if weights is not None else []
    named = {entry.name for entry in stored}
    filled: list[Entry] = []
    for index, node in enumerate(shaped.graph.nodes):
        shapes = shaped.blobs(index)
        if not shapes or node.name in named:
            continue
        if node.name in elsewhere:
            filled.append(NewEntry(node.name, tuple(np.zeros(shape, np.float32) for shape in shapes)))
            continue
        try:
            filled.append(NewEntry(node.name, initial(request_of(node, net), shapes, random)))
        except Error as error:
            raise error.at(path=shaped.graph.path, line=node.layer.line, layer=node.name) from None
    # Where layers share a blob the last one bound counts: what is stored, else the first layer of the net.
    try:
        return bind(shaped, Weights([*reversed(filled), *stored], path=weights.path if weights else None))
    except WeightsError as error:
        error.hint = "to learn a layer from its fillers instead, give it another name"
        raise


def _keys(graph: Graph, blobs: Mapping[int, Arrays]) -> dict[int, tuple[Key, ...]]:
    """For every node that learns, what each of its blobs is kept under."""
    owners: dict[str, Key] = {}
    found = {}
    for index, arrays in blobs.items():
        node = graph.nodes[index]
        specs = node.layer.param_specs
        keys = []
        for i in range(len(arrays)):
            name = specs[i].name if i < len(specs) else ""
            keys.append(owners.setdefault(name, (node.name, i)) if name else (node.name, i))
        found[index] = tuple(keys)
    return found


def _multipliers(node: Node, i: int, before: Multipliers | None) -> Multipliers:
    """The multipliers of blob ``i``; layers that share it must agree, as far as they give any."""
    own = _given(node, i)
    if before is None:
        return own
    for what, one, other in (
        ("lr_mult", own.own_rate, before.own_rate),
        ("decay_mult", own.own_decay, before.own_decay),
    ):
        if None not in (one, other) and one != other:
            raise NetError(
                f"{what} {one:g} of blob {i} is {other:g} where the blob is shared",
                path=node.layer.document.path, line=node.layer.line, layer=node.name,
            )  # fmt: skip
    return Multipliers(
        before.own_rate if own.own_rate is None else own.own_rate,
        before.own_decay if own.own_decay is None else own.own_decay,
    )


def _given(node: Node, i: int) -> Multipliers:
    """What the layer itself says of blob ``i``; statistics are never learnt."""
    layer = node.layer
    if layer.type in STATISTICS:
        return Multipliers(0.0)
    if layer.dialect == "V2":
        specs = tuple(layer.message.messages("param"))
        known = [i < len(specs) and specs[i].last(name) is not None for name in ("lr_mult", "decay_mult")]
    else:
        known = [i < sum(1 for _ in layer.message.all(name)) for name in ("blobs_lr", "weight_decay")]
    spec = layer.param_specs[i] if i < len(layer.param_specs) else None
    if spec is None:
        return Multipliers()
    return Multipliers(spec.lr_mult if known[0] else None, spec.decay_mult if known[1] else None)


def _loss_weights(node: Node, request: Request) -> tuple[float, ...]:
    """The loss_weight of every top; that of an unnamed top of a loss is 1."""
    assert node.spec is not None
    given: tuple[float, ...] = request.typed["loss_weight"]
    if node.spec.loss:
        return given or (1.0, *(0.0,) * (len(node.layer.tops) - 1))
    return given or (0.0,) * len(node.layer.tops)


def _stopped(node: Node, request: Request) -> frozenset[int]:
    """The bottoms that propagate_down keeps gradients from."""
    if "propagate_down" not in field_info(request.typed.type_name):
        return frozenset()
    given = request.typed["propagate_down"]
    if given and len(given) != len(node.inputs):
        raise NetError(f"{len(given)} propagate_down for {len(node.inputs)} bottoms")
    return frozenset(i for i, down in enumerate(given) if not down)


def _last_uses(graph: Graph) -> dict[int, list[Value]]:
    """For each node, the values that nobody reads behind it."""
    found: dict[int, list[Value]] = {}
    for value, readers in graph.consumers.items():
        found.setdefault(max(readers, default=value.node), []).append(value)
    return found
