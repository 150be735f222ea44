"""A Caffe net as an ONNX model that every onnxruntime since 1.17 reads alike.

One loop over the graph calls the ``onnx`` column of the layer table. A blob keeps its Caffe name: where
in-place layers rewrite it, the last value has the name and earlier ones are called ``<blob>/<layer>``.
Opset 17, IR version 8.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import binding, graph, shape_inference
from .errors import Error, NetError, ShapeError, UnsupportedError, UsageError
from .graph import Graph, Value
from .layers.emit import Dynamic, Emitter, NodeRecord, Sheet
from .layers.spec import Arrays, Shape
from .model import Model
from .net import nearest
from .preprocess import Preprocess
from .shape_inference import InputShapes, Shaped

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 17, 8
_AXIS_NAMES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Request:
    """What to export: blobs to give out (None: the net's outputs), sizes left open, source shapes overridden.

    ``preprocess`` is baked in before every image input (4 axes). With ``cut_at_unknown`` layers that are not
    understood are left out with all that depends on them: what they read becomes an output.
    """

    outputs: tuple[str, ...] | None = None
    batch: int | None = None
    dynamic_batch: bool = False
    dynamic_hw: bool = False
    input_shapes: InputShapes | None = None
    random_seed: int | None = None
    preprocess: Preprocess | None = None
    cut_at_unknown: bool = False


@dataclass(frozen=True, eq=False)
class Export:
    """The written graph: records and constants, the ONNX name of each source blob and each asked-for blob."""

    sheet: Sheet
    shaped: Shaped
    inputs: dict[str, str]
    outputs: dict[str, str]
    shapes: dict[str, Shape]
    dynamic: dict[str, Dynamic]
    name: str


def source_shapes(built: Graph, request: Request) -> dict[str, Shape]:
    """The shape of every source blob, the asked-for batch applied; raises where the file gives none."""
    given = dict(request.input_shapes or {})
    shaped = shape_inference.infer(built, given, partial=True)
    found: dict[str, Shape] = {}
    for value in built.sources:
        if value not in shaped.shapes:
            raise shaped.unknown[value.node]
        shape = shaped.shapes[value]
        found[built.blob(value)] = (request.batch, *shape[1:]) if request.batch and shape else shape
    return found


def graph_of(model: Model, request: Request) -> Graph:
    """The graph that a request is about: the whole net, or the part before its unknown layers."""
    built = graph.build(model.net)
    return graph.known_part(built) if request.cut_at_unknown else built


def draw(model: Model, request: Request) -> Export:
    """Write the net as records. Raises NetError where a needed layer cannot be exported."""
    built = graph_of(model, request)
    names = _asked(built, request.outputs)
    sources = source_shapes(built, request)
    needed = built.needed(built.final[name] for name in names)
    for index in sorted(needed):
        problem = built.nodes[index].problem
        if problem is not None:
            raise problem
    shaped = shape_inference.infer(built, sources, partial=True)
    for index in sorted(needed & set(shaped.unknown)):
        raise shaped.unknown[index]
    dynamic = _with_open_axes(built, _dynamic(built, sources, shaped, needed, request))
    if request.random_seed is None:
        blobs = binding.bind(_only(shaped, needed), model.weights)
    else:
        blobs = binding.random(shaped, request.random_seed)
    return _Writer(built, shaped, dynamic, blobs, needed, names, request.preprocess).write(
        model.net.name or "net"
    )


def _asked(built: Graph, outputs: Iterable[str] | None) -> list[str]:
    if outputs is None:
        sources = set(built.sources)
        return [name for name in built.outputs if built.final[name] not in sources]
    names = list(dict.fromkeys(outputs))
    for name in names:
        if name not in built.final:
            raise UsageError(
                f'there is no blob "{name}"', path=built.path, hint=nearest(name, list(built.final))
            )
    return names


def _only(shaped: Shaped, needed: set[int]) -> Shaped:
    """The same shapes, nodes that are not needed counted as unknown, so that their weights are not missed."""
    left_out = {index: Error("not needed") for index in range(len(shaped.graph.nodes)) if index not in needed}
    return Shaped(shaped.graph, shaped.shapes, {**left_out, **shaped.unknown})


def _dynamic(
    built: Graph, sources: dict[str, Shape], shaped: Shaped, needed: set[int], request: Request
) -> dict[Value, Dynamic]:
    """Which axes of each value vary: those that differ when the source sizes that are left open are doubled."""
    axes = ([0] if request.dynamic_batch else []) + ([2, 3] if request.dynamic_hw else [])
    if not axes:
        return {value: (False,) * len(shape) for value, shape in shaped.shapes.items()}
    doubled = {
        name: tuple(
            2 * dim if i in axes and (i == 0 or len(shape) == 4) else dim for i, dim in enumerate(shape)
        )
        for name, shape in sources.items()
    }
    other = shape_inference.infer(built, doubled, partial=True)
    for index in sorted(needed & set(other.unknown)):
        what = "height and width" if request.dynamic_hw else "the batch"
        problem = other.unknown[index]
        text = f"{what} cannot be left open: {problem.message}"
        raise ShapeError(
            text, path=problem.path, line=problem.line, layer=problem.layer, hint="export fixed sizes"
        )
    return {
        value: tuple(a != b for a, b in zip(shape, other.shapes[value], strict=True))
        if value in other.shapes and len(other.shapes[value]) == len(shape)
        else (False,) * len(shape)
        for value, shape in shaped.shapes.items()
    }


def _with_open_axes(built: Graph, dynamic: dict[Value, Dynamic]) -> dict[Value, Dynamic]:
    """The same, with the axes marked that depend on the numbers themselves."""

    def marked(value: Value, axes: Dynamic) -> Dynamic:
        spec = built.nodes[value.node].spec
        open_ = spec.open_axes if spec is not None else ()
        return tuple(varies or axis in open_ for axis, varies in enumerate(axes))

    return {value: marked(value, axes) for value, axes in dynamic.items()}


@dataclass(frozen=True)
class _Folded:
    """Affine layers waiting to be written as one: x*scale + shift over axis 1 of ``source``."""

    source: Value
    scale: np.ndarray
    shift: np.ndarray
    layers: int


class _Writer:
    """One pass over the needed nodes."""

    def __init__(
        self,
        built: Graph,
        shaped: Shaped,
        dynamic: dict[Value, Dynamic],
        blobs: Mapping[int, Arrays],
        needed: set[int],
        outputs: list[str],
        preprocess: Preprocess | None,
    ) -> None:
        self.built, self.shaped, self.dynamic, self.blobs = built, shaped, dynamic, blobs
        self.needed, self.outputs = needed, outputs
        self.wanted = {built.final[name] for name in outputs}
        self.sources = set(built.sources)
        self.sheet = Sheet()
        self.folded: dict[Value, _Folded] = {}
        self.preprocess = preprocess
        self.names = self._name_values()

    def _name_values(self) -> dict[Value, str]:
        """Sources first, then the last value of each blob, then what in-place layers overwrote."""
        built = self.built
        names = {value: self.sheet.unique(built.blob(value)) for value in built.sources}
        for blob, value in built.final.items():
            if value not in names:
                names[value] = self.sheet.unique(blob)
        for value in built.values():
            if value not in names:
                names[value] = self.sheet.unique(f"{built.blob(value)}/{built.nodes[value.node].name}")
        return names

    def write(self, name: str) -> Export:
        used = [
            value for value in self.built.sources if self.needed.intersection(self.built.consumers[value])
        ]
        inputs = {self.built.blob(value): self.names[value] for value in used}
        for value in used:
            self._preprocess(value)
        for index in sorted(self.needed):
            node = self.built.nodes[index]
            assert node.spec is not None
            if node.spec.source:
                continue
            try:
                self._node(index)
            except Error as error:
                raise error.at(path=self.built.path, line=node.layer.line, layer=node.name) from None
        outputs = {blob: self.names[self.built.final[blob]] for blob in self.outputs}
        named = {self.names[value]: value for value in self.shaped.shapes}
        named.update({self.built.blob(value): value for value in used})
        return Export(
            self.sheet,
            self.shaped,
            inputs,
            outputs,
            {text: self.shaped.shapes[value] for text, value in named.items()},
            {text: self.dynamic[value] for text, value in named.items()},
            name,
        )

    def _preprocess(self, value: Value) -> None:
        """Bake the preprocessing in: the input keeps its name, the layers read what is made of it."""
        shape, asked = self.shaped.shapes[value], self.preprocess
        if asked is None or len(shape) != 4:
            return
        e = self._emitter(value.node, (value,))
        e.layer, name = f"{self.names[value]}/preprocess", self.names[value]
        mean = asked.mean_for(shape)
        if mean is not None and mean.shape[2] > 1:
            e.static(0, (2, 3), "a mean image")
        if asked.swap:
            name = e.node("Gather", name, e.ints(range(shape[1])[::-1], "reversed"), axis=1)
        if mean is not None:
            name = e.node("Sub", name, e.const(mean, "mean"))
        if asked.scale != 1:
            name = e.node("Mul", name, e.const(asked.scale, "scale"))
        self.names[value] = name

    def _node(self, index: int) -> None:
        if self._fold(index):
            return
        node = self.built.nodes[index]
        assert node.spec is not None
        if node.spec.onnx is None:
            raise UnsupportedError(f"{node.layer.type} cannot be exported")
        node.spec.onnx(self._emitter(index, node.inputs), node.params)

    def _emitter(self, index: int, inputs: tuple[Value, ...]) -> Emitter:
        node = self.built.nodes[index]
        tops = tuple(Value(index, top) for top in range(len(node.layer.tops)))
        return Emitter(
            self.sheet,
            node.name,
            tuple(self.names[value] for value in inputs),
            tuple(self.names[value] for value in tops),
            tuple(self.shaped.shapes[value] for value in inputs),
            tuple(self.shaped.shapes[value] for value in tops),
            tuple(self.dynamic[value] for value in inputs),
            tuple(self.dynamic[value] for value in tops),
            self.blobs.get(index, ()),
            tuple(value in self.sources for value in inputs),
        )

    def _affine(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        node = self.built.nodes[index]
        if node.spec is None or len(node.inputs) != 1 or len(self.shaped.shapes[node.inputs[0]]) < 2:
            return None
        return node.spec.affine(node.params, self.blobs.get(index, ()), self.shaped.bottoms(index))

    def _fold(self, index: int) -> bool:
        """BatchNorm, Scale and Bias in a row become one BatchNormalization; a lone one is left to its own column."""
        own = self._affine(index)
        if own is None:
            return False
        scale, shift = own
        (source,) = self.built.nodes[index].inputs
        before = self.folded.get(source, _Folded(source, np.ones_like(scale), np.zeros_like(shift), 0))
        total = _Folded(before.source, before.scale * scale, before.shift * scale + shift, before.layers + 1)
        value = Value(index, 0)
        readers = [reader for reader in self.built.consumers[value] if reader in self.needed]
        if value not in self.wanted and len(readers) == 1 and self._affine(readers[0]) is not None:
            self.folded[value] = total
            return True
        if total.layers == 1:
            return False
        e = self._emitter(index, (total.source,))
        arrays = (total.scale, total.shift, np.zeros_like(scale), np.ones_like(scale))
        constants = (
            e.const(array, suffix)
            for array, suffix in zip(arrays, ("scale", "shift", "zero", "one"), strict=True)
        )
        e.node("BatchNormalization", e.inputs[0], *constants, to=e.outputs[0], epsilon=0.0)
        return True


def to_onnx(export: Export, elsewhere: Collection[str] = ()) -> onnx.ModelProto:
    """The records as an ONNX model; constants named in ``elsewhere`` are declared only, whoever reads it has them."""
    from onnx import helper

    inputs = [_value_info(export, name) for name in export.inputs.values()]
    outputs = [_value_info(export, name) for name in export.outputs.values()]
    nodes = [_node(record) for record in export.sheet.nodes]
    made = helper.make_model(
        helper.make_graph(nodes, export.name, inputs, outputs),
        producer_name="caffe-lra",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    made.graph.initializer.extend(  # not given to make_graph: it copies, and so does make_model
        _declared(array, name) if name in elsewhere else _constant(array, name)
        for name, array in export.sheet.constants.items()
    )
    return made


def _constant(array: np.ndarray, name: str) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)


def _declared(array: np.ndarray, name: str) -> onnx.TensorProto:
    """A constant without its numbers: external data, whose place the reader replaces."""
    from onnx import TensorProto, helper

    made = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
    made.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    for key, value in {"location": "memory", "offset": 0, "length": array.nbytes}.items():
        made.external_data.add(key=key, value=str(value))
    return made


def _value_info(export: Export, name: str) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    dims: list[int | str | None] = [
        (_AXIS_NAMES.get(axis) if name in export.inputs.values() or axis == 0 else None) if varies else dim
        for axis, (dim, varies) in enumerate(zip(export.shapes[name], export.dynamic[name], strict=True))
    ]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def _node(record: NodeRecord) -> onnx.NodeProto:
    from onnx import TensorProto, helper

    attributes = dict(record.attributes)
    if "to_type" in attributes:
        attributes["to"] = getattr(TensorProto, attributes.pop("to_type").replace("float32", "float").upper())
    return helper.make_node(record.op, record.inputs, record.outputs, record.name, **attributes)


def export_onnx(model: Model, request: Request | None = None) -> onnx.ModelProto:
    """The net as a checked ONNX model.

    Raises NetError, UnsupportedError or WeightsError where the net cannot be exported, each naming layer and line.
    """
    import onnx

    export = draw(model, request or Request())
    if not export.outputs:
        raise NetError("the net has no output to export", path=export.shaped.graph.path)
    made = to_onnx(export)
    if made.ByteSize() < 2**31:
        onnx.checker.check_model(made, full_check=True)
    return made
