"""Which layers of a net can be decomposed, and what the schemes need to know of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from caffe_proto import binding
from caffe_proto.errors import WeightsError
from caffe_proto.graph import Node, build
from caffe_proto.layers.conv import ConvParams
from caffe_proto.layers.conv import geometry as conv_geometry
from caffe_proto.layers.dense import DenseParams
from caffe_proto.layers.spec import Arrays, canonical_axis, text
from caffe_proto.model import Model
from caffe_proto.shape_inference import InputShapes, Shaped, infer

from .decomposition import Geometry, Pair, Shape, macs
from .schemes.base import Scheme, Spectrum

_ANY_DEPTH = 2**20  # inputs assumed where neither shapes nor weights say how many: no rank is too large
_NOMINAL = 64  # image side, in kernels, assumed where the real one is not known


@dataclass(frozen=True, eq=False)
class Target:
    """A convolution, or a fully connected layer as the 1 x 1 convolution it is.

    ``shape`` is (out, in/group, kh, kw); ``places``: how many pictures a forward pass puts through it
    (batch times bottoms); ``in_hw`` is None where the net's shapes are not known here. ``shared``: the name
    that the weight is shared by, or "".
    """

    name: str
    index: int
    dense: bool
    transposed: bool
    shape: Shape
    geometry: Geometry
    in_hw: Pair | None
    places: int
    shared: str

    @property
    def macs(self) -> int:
        """MACs of the layer as it is, for the net's own batch."""
        return self.cost(self)

    @property
    def stride(self) -> Pair:
        return self.geometry.stride

    @property
    def pad(self) -> Pair:
        return self.geometry.pad

    @property
    def dilation(self) -> Pair:
        return self.geometry.dilation

    def cost(self, *steps: object) -> int:
        """MACs of a chain in the layer's place; at a nominal image size where the real one is not known."""
        return self.places * macs(steps, self.in_hw or self._nominal)  # type: ignore[arg-type]

    def chain_cost(self, scheme: Scheme, *ranks: int) -> int:
        """MACs of a scheme's chain at its ranks."""
        return self.cost(*scheme.chain(self.shape, self.geometry, ranks))

    @property
    def _nominal(self) -> Pair:
        reach = [d * k for d, k in zip(self.dilation, self.shape[2:], strict=True)]
        return _NOMINAL * reach[0], _NOMINAL * reach[1]

    def kernel(self, stored: np.ndarray) -> np.ndarray:
        """The stored weight as (out, in/group, kh, kw)."""
        return (stored.T if self.transposed else stored).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Found:
    """A model looked at: its shapes, the layers that can be decomposed, and for others of those types why not."""

    model: Model
    shaped: Shaped
    targets: dict[str, Target]
    refused: dict[str, str]
    blobs: Mapping[int, Arrays]

    @cached_property
    def by_image(self) -> frozenset[int]:
        """The nodes that can be run and treat every image of a batch by itself, as do those in front of them."""
        graph, shapes = self.shaped.graph, self.shaped.shapes
        twice = {
            graph.blob(value): (2 * shapes[value][0], *shapes[value][1:])
            for value in graph.sources
            if shapes.get(value)
        }
        other = infer(graph, twice, partial=True)
        found: set[int] = set()
        for index, node in enumerate(graph.nodes):
            runs = node.spec is not None and (node.spec.source or node.spec.onnx is not None)
            known = index not in self.shaped.unknown and index not in other.unknown and node.problem is None
            if not runs or not known or any(value.node not in found for value in node.inputs):
                continue
            pairs = zip(self.shaped.tops(index), other.tops(index), strict=True)
            if all(one and two == (2 * one[0], *one[1:]) for one, two in pairs):
                found.add(index)
        return frozenset(found)


def find(model: Model, inputs: InputShapes | None = None) -> Found:
    """Look through a net. Raises WeightsError where net and weights do not belong together."""
    shaped = infer(build(model.net), inputs, partial=True)
    blobs = dict(binding.bind(shaped, model.weights)) if model.weights is not None else {}
    targets: dict[str, Target] = {}
    refused: dict[str, str] = {}
    for index, node in enumerate(shaped.graph.nodes):
        if node.layer.type not in ("Convolution", "InnerProduct"):
            continue
        made = _target(model, shaped, index, node)
        if isinstance(made, str):
            refused[node.name] = made
            continue
        targets[node.name] = made
        if index in shaped.unknown and model.weights is not None:
            blobs[index] = _stored(model, node)
    return Found(model, shaped, targets, refused, blobs)


def _stored(model: Model, node: Node) -> Arrays:
    """The blobs of a layer whose input shape is not known, as far as they can be checked without it."""
    assert model.weights is not None and isinstance(node.params, ConvParams | DenseParams)
    p, (weight, *biases) = node.params, model.weights[node.name]
    if isinstance(p, DenseParams):
        weight = weight.reshape(weight.shape[-2:])
    outputs = weight.shape[1] if isinstance(p, DenseParams) and p.transpose else weight.shape[0]
    if len(biases) != p.bias or outputs != p.num_output:
        shapes = ", ".join(text(blob.shape) for blob in (weight, *biases))
        what = f"learns {1 + p.bias} blobs for {p.num_output} outputs, stored are {shapes}"
        raise WeightsError(
            what,
            path=model.weights.path,
            layer=node.name,
            hint="give the weights that were trained with the net",
        )
    return (weight, *(bias.reshape(-1) for bias in biases))


def _target(model: Model, shaped: Shaped, index: int, node: Node) -> Target | str:
    if node.problem is not None:
        return node.problem.message
    stored = model.weights[node.name] if model.weights is not None and node.name in model.weights else ()
    known = index not in shaped.unknown
    if not known and not stored and model.weights is not None:
        return f"its input shape is not known ({shaped.unknown[index].message})"
    if isinstance(node.params, ConvParams):
        return _convolution(shaped, index, node.params, stored)
    return _fully_connected(shaped, index, node.params, stored)


def _convolution(shaped: Shaped, index: int, p: ConvParams, stored: Arrays) -> Target | str:
    name = shaped.graph.nodes[index].name
    if index in shaped.unknown:
        in_hw, places = None, 1
        weight = stored[0].shape if stored else (p.num_output, _ANY_DEPTH, *_kernel(p))
        bottom: tuple[int, ...] = (1, weight[1] * p.group, *(1,) * (len(weight) - 2))
    else:
        weight = shaped.blobs(index)[0]
        bottom = shaped.bottoms(index)[0]
        in_hw = (bottom[-2], bottom[-1]) if len(weight) == 4 else None
        places = prod(bottom[: len(bottom) - len(weight) + 1]) * p.n_tops
    if p.pad_end is not None:
        how = "differs from side to side" if p.pad_end != p.pad else "is given side by side"
        return f"its padding {how} (pad_l, pad_r, pad_t, pad_b)"
    if len(weight) != 4:
        return f"its kernel has {len(weight) - 2} axes, two are needed"
    _, g = conv_geometry(p, bottom)
    geometry = Geometry(_pair(g.stride), _pair(g.pad), _pair(g.dilation), p.group)
    shape = (weight[0], weight[1], weight[2], weight[3])
    return Target(name, index, False, False, shape, geometry, in_hw, places, _shared(shaped, index))


def _fully_connected(shaped: Shaped, index: int, p: DenseParams, stored: Arrays) -> Target | str:
    name = shaped.graph.nodes[index].name
    in_hw: Pair | None = None
    if index in shaped.unknown:
        any_shape = (_ANY_DEPTH, p.num_output) if p.transpose else (p.num_output, _ANY_DEPTH)
        weight, places = stored[0].shape[-2:] if stored else any_shape, 1
    else:
        weight, bottom, in_hw = shaped.blobs(index)[0], shaped.bottoms(index)[0], (1, 1)
        places = prod(bottom[: canonical_axis(p.axis, len(bottom))])
    inputs, outputs = weight if p.transpose else (weight[1], weight[0])
    if min(inputs, outputs) < 1:
        return f"its weight {text(weight)} is empty"
    shape = (outputs, inputs, 1, 1)
    return Target(name, index, True, p.transpose, shape, Geometry(), in_hw, places, _shared(shaped, index))


def _kernel(p: ConvParams) -> tuple[int, ...]:
    """The kernel, taken for two axes where one number stands for all."""
    return p.kernel * 2 if len(p.kernel) == 1 else p.kernel


def _shared(shaped: Shaped, index: int) -> str:
    specs = shaped.graph.nodes[index].layer.param_specs
    return specs[0].name if specs else ""


def _pair(values: tuple[int, ...]) -> Pair:
    return values[0], values[1]


class Spectra:
    """Factorizations of the layers of one model, made once each and shared by planning and applying.

    ``step`` is called once for each layer that was factored first.
    """

    def __init__(self, found: Found, step: Callable[[], None] = lambda: None) -> None:
        self.found = found
        self._step = step
        self._made: dict[tuple[str, str], Spectrum] = {}

    def put(self, target: Target, scheme: Scheme, spectrum: Spectrum) -> None:
        """Give a factorization that the weights alone do not determine."""
        self._made[target.name, scheme.name] = spectrum

    def get(self, target: Target, scheme: Scheme) -> Spectrum:
        """The factorization of a layer by a scheme. Raises WeightsError where it has no weights, or infinite ones."""
        key = (target.name, scheme.name)
        if key not in self._made:
            if target.index not in self.found.blobs:
                raise WeightsError(
                    "there are no weights to decompose", path=self.found.model.net.path, layer=target.name
                )
            weight = target.kernel(self.found.blobs[target.index][0])
            if not np.isfinite(weight).all():
                weights = self.found.model.weights
                path = weights.path if weights is not None else None
                raise WeightsError(
                    "its weights hold values that are not finite (nan or inf)", path=path, layer=target.name
                )
            if not any(name == target.name for name, _ in self._made):
                self._step()
            self._made[key] = scheme.spectrum(weight, target.geometry)
        return self._made[key]
