"""What training with force, clipping or sparsity needs to know of a net: its weight blobs by (layer, index)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from caffe_proto.errors import NetError, UsageError
from caffe_proto.graph import Node, Value
from caffe_proto.layers.conv import ConvParams
from caffe_proto.layers.dense import DenseParams
from caffe_proto.model import Model
from caffe_proto.rewrite import NewLayer, Replace
from caffe_proto.rewrite import apply as rewrite
from caffe_proto.shape_inference import Shaped
from caffe_proto.typed import Typed

from .decomposition import Decomposition, Step
from .filters import PLAIN, Layout
from .force import Force, Member
from .targets import Found, Target

Key = tuple[str, int]

SOLVER_FIELDS = frozenset({"force_type", "force_decay", "force_iter", "force_decay_type", "force_direction"})


def force_settings(solver: Typed) -> Force:
    """The force that a solver file asks for; raises UsageError, naming the field's value, where there is none such."""
    try:
        return Force(
            decay=solver["force_decay"],
            kind=solver["force_type"],
            iterations=solver["force_iter"],
            decay_type=solver["force_decay_type"],
            direction=solver["force_direction"],
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def force_members(shaped: Shaped, convolutions: float | None = None) -> dict[Key, Member]:
    """The blobs under the force: those whose ``param`` block sets ``force_mult``.

    ``convolutions``: the force_mult of the weight of every convolution that sets none itself, 0 included. A
    shared blob stands under its first layer, with the first force_mult that is set.
    """
    members: dict[Key, Member] = {}
    for index, key, spec in _weights(shaped):
        mult = _force_mult(shaped.graph.nodes[index], spec)
        if mult is None and convolutions is not None and spec == 0 and _is_convolution(shaped, index):
            mult = convolutions
        if mult is not None and key not in members:
            members[key] = Member(mult, _layout(shaped, index) if spec == 0 else PLAIN)
    return {key: member for key, member in members.items() if member.mult}


def layouts(shaped: Shaped) -> dict[Key, Layout]:
    """Where the filters of every convolution and fully connected layer lie, shared weights once."""
    found: dict[Key, Layout] = {}
    for index, key, blob in _weights(shaped):
        if blob == 0 and isinstance(shaped.graph.nodes[index].params, ConvParams | DenseParams):
            found.setdefault(key, _layout(shaped, index))
    return found


def _weights(shaped: Shaped) -> Iterable[tuple[int, Key, int]]:
    """Node, key and blob index of every learnt blob of two or more axes; the key is the first layer's that shares it."""
    owners: dict[str, Key] = {}
    for index, node in enumerate(shaped.graph.nodes):
        if index in shaped.unknown:
            continue
        specs = node.layer.param_specs
        for blob, shape in enumerate(shaped.blobs(index)):
            name = specs[blob].name if blob < len(specs) else ""
            key = owners.setdefault(name, (node.name, blob)) if name else (node.name, blob)
            if len(shape) > 1:
                yield index, key, blob


def _force_mult(node: Node, blob: int) -> float | None:
    """What the ``param`` block of a blob sets; only V2 has the field."""
    specs = list(node.layer.message.messages("param"))
    text = specs[blob].string("force_mult") if blob < len(specs) else ""
    try:
        return float(text.rstrip("fF")) if text else None
    except ValueError:
        raise NetError(f"force_mult {text!r} is no number", line=node.layer.line, layer=node.name) from None


def _is_convolution(shaped: Shaped, index: int) -> bool:
    return isinstance(shaped.graph.nodes[index].params, ConvParams)


def _layout(shaped: Shaped, index: int) -> Layout:
    """Groups are counted from the blob: some depthwise layers have them whatever the file says."""
    node = shaped.graph.nodes[index]
    p, weight = node.params, shaped.blobs(index)[0]
    if isinstance(p, DenseParams):
        return Layout(1, p.transpose)
    if not isinstance(p, ConvParams):
        return PLAIN
    bottom, top = shaped.bottoms(index)[0], shaped.tops(index)[0]
    channels = bottom[p.axis], top[p.axis]
    transposed = node.layer.type == "Deconvolution"
    return Layout(channels[transposed] // weight[1], transposed)


@dataclass(frozen=True)
class Factor:
    """One of two layers whose weights multiply."""

    layer: str
    dense: bool
    transposed: bool
    bias: bool

    @classmethod
    def of(cls, target: Target, bias: bool) -> Factor:
        """The layer of a target."""
        return cls(target.name, target.dense, target.transposed, bias)

    def kernel(self, stored: np.ndarray) -> np.ndarray:
        """A blob of the weight's shape as (out, in/group, kh, kw), float64."""
        array = np.asarray(stored, np.float64)
        return (array.T if self.transposed else array)[:, :, None, None] if self.dense else array

    def stored(self, weight: np.ndarray) -> np.ndarray:
        """A step's weight as the layer holds it."""
        if not self.dense:
            return weight
        return weight[:, :, 0, 0].T if self.transposed else weight[:, :, 0, 0]


@dataclass(frozen=True)
class FactorPair:
    """Two layers, the second the only reader of the first, with nothing in between.

    ``balanced``: how the scale is split when they are factored anew, see `lra.clipping.clip`.
    """

    first: Factor
    second: Factor
    group: int
    balanced: bool = True

    def chain(self, blobs: Mapping[Key, np.ndarray]) -> Decomposition:
        """Both layers as steps, of stride 1 and without pads: clipping does not depend on those."""
        steps = []
        for factor in (self.first, self.second):
            bias = np.asarray(blobs[factor.layer, 1], np.float64).reshape(-1) if factor.bias else None
            steps.append(Step("", factor.kernel(blobs[factor.layer, 0]), bias, group=self.group))
        return Decomposition(tuple(steps))


def factor_pairs(found: Found, balanced: bool = True) -> tuple[FactorPair, ...]:
    """The pairs of a net that can be clipped: convolutions, or fully connected layers, one right behind the other.

    Both have the same groups, one bottom, and weights that no other layer shares. A layer is in one pair only, the
    first in net order.
    """
    graph = found.shaped.graph
    by_index = {target.index: target for target in found.targets.values()}
    pairs: list[FactorPair] = []
    taken: set[str] = set()
    for index, first in sorted(by_index.items()):
        readers = graph.consumers[Value(index, 0)]
        if len(readers) != 1 or readers[0] not in by_index:
            continue
        second = by_index[readers[0]]
        if not _fit(found, first, second) or {first.name, second.name} & taken:
            continue
        taken |= {first.name, second.name}
        a, b = (Factor.of(one, _bias(found, one)) for one in (first, second))
        pairs.append(FactorPair(a, b, first.geometry.group, balanced))
    return tuple(pairs)


def _fit(found: Found, first: Target, second: Target) -> bool:
    nodes = found.shaped.graph.nodes
    shared = any(spec.name for one in (first, second) for spec in nodes[one.index].layer.param_specs)
    plain = all(len(nodes[one.index].inputs) == 1 for one in (first, second))
    # a fully connected layer that flattens pictures does not read channel by channel
    flat = not second.dense or second.shape[1] == first.shape[0]
    same = first.dense == second.dense and first.geometry.group == second.geometry.group
    return same and plain and flat and not shared


def _bias(found: Found, target: Target) -> bool:
    params = found.shaped.graph.nodes[target.index].params
    return bool(params.bias)


def clipped_model(
    model: Model, pairs: Iterable[FactorPair], blobs: Mapping[Key, np.ndarray], ranks: Mapping[str, int]
) -> Model:
    """The net with the ``num_output`` that the first layers of clipped pairs now have, and new weights of both.

    ``ranks``: by the name of the first layer; others stay. Everything else stays as it was written.
    """
    edits = []
    for pair in pairs:
        if pair.first.layer not in ranks:
            continue
        outputs = {"num_output": [str(ranks[pair.first.layer])]}
        for factor, settings in ((pair.first, outputs), (pair.second, {})):
            arrays = tuple(
                np.ascontiguousarray(blobs[factor.layer, i], np.float32) for i in range(1 + factor.bias)
            )
            block = "inner_product_param" if factor.dense else "convolution_param"
            new = NewLayer(factor.layer, None, None, block, settings, arrays if model.weights else None, 2)
            edits.append(Replace(factor.layer, (new,)))
    return rewrite(model, edits)
