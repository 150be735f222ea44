"""Parts of a net as onnxruntime sessions: from any values of its graph to any others.

What lets a net be walked layer by layer: the values that are alive at a cut are kept, the next part runs
from them. Names and shapes are those of the graph at one batch size.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import numpy as np
import onnxruntime

from .errors import Error, UnsupportedError
from .graph import Value
from .layers.emit import Emitter, Sheet
from .layers.spec import Arrays
from .onnx_export import Export, to_onnx
from .runtime import Engine, open_onnx
from .shape_inference import Shaped

_KEPT = 4  # compiled parts


class Segments:
    """Runs parts of one graph; a part is compiled when first asked for. ``blobs`` as ``binding.bind`` gives them.

    The parts used last stay compiled; each holds its weights and the memory of a forward pass.
    """

    def __init__(self, shaped: Shaped, blobs: Mapping[int, Arrays], engine: Engine) -> None:
        self.shaped = shaped
        self.graph = shaped.graph
        self.blobs = blobs
        self.engine = engine
        self._compiled: dict[tuple[frozenset[Value], tuple[Value, ...]], onnxruntime.InferenceSession] = {}

    def live(self, index: int, readers: Container[int] | None = None) -> tuple[Value, ...]:
        """The values written by nodes up to ``index`` that nodes behind it read, in order.

        ``readers``: only what these nodes read counts.
        """
        consumers = self.graph.consumers
        return tuple(
            value
            for value in self.graph.values()
            if value.node <= index
            and any(reader > index and (readers is None or reader in readers) for reader in consumers[value])
        )

    def run(self, inputs: Mapping[Value, np.ndarray], outputs: Sequence[Value]) -> dict[Value, np.ndarray]:
        """The wanted values from given ones; a wanted value that is given is handed through.

        Raises NetError where a layer between cannot be run, or something it needs is not given.
        """
        made = {value: inputs[value] for value in outputs if value in inputs}
        wanted = tuple(value for value in outputs if value not in inputs)
        if wanted:
            key = (frozenset(inputs), wanted)
            session = self._compiled.pop(key, None) or self._compile(key[0], wanted)
            self._compiled[key] = session  # the latest last
            while len(self._compiled) > _KEPT:
                del self._compiled[next(iter(self._compiled))]
            feeds = {node.name: inputs[_value(node.name)] for node in session.get_inputs()}
            made.update(zip(wanted, session.run([_name(value) for value in wanted], feeds), strict=True))
        return made

    def _compile(self, given: frozenset[Value], wanted: tuple[Value, ...]) -> onnxruntime.InferenceSession:
        sheet = Sheet()
        nodes = self._between(given, wanted)
        used = {value for index in nodes for value in self.graph.nodes[index].inputs if value in given}
        names = {value: sheet.unique(_name(value)) for value in self.shaped.shapes}
        for index in nodes:
            self._write(sheet, index, names)
        shapes = {names[value]: shape for value, shape in self.shaped.shapes.items()}
        fixed = {name: (False,) * len(shape) for name, shape in shapes.items()}
        inputs = {names[value]: names[value] for value in sorted(used)}
        outputs = {names[value]: names[value] for value in wanted}
        export = Export(sheet, self.shaped, inputs, outputs, shapes, fixed, "segment")
        return open_onnx(to_onnx(export).SerializeToString(), self.engine)

    def _between(self, given: frozenset[Value], wanted: Iterable[Value]) -> list[int]:
        """The nodes that the wanted values need beyond the given ones, in order; no source may be among them."""
        found = sorted(self.graph.needed(wanted, given))
        for index in found:
            node = self.graph.nodes[index]
            if node.spec is not None and node.spec.source:
                raise UnsupportedError(f'the input "{node.layer.tops[0]}" is not given', layer=node.name)
        return found

    def _write(self, sheet: Sheet, index: int, names: Mapping[Value, str]) -> None:
        node = self.graph.nodes[index]
        if node.problem is not None:
            raise node.problem
        if node.spec is None or node.spec.onnx is None:
            raise UnsupportedError(f"{node.layer.type} cannot be run", layer=node.name)
        tops = tuple(Value(index, top) for top in range(len(node.layer.tops)))
        ins, outs = (tuple(self.shaped.shapes[value] for value in values) for values in (node.inputs, tops))
        emitter = Emitter(
            sheet,
            node.name,
            tuple(names[value] for value in node.inputs),
            tuple(names[value] for value in tops),
            ins,
            outs,
            tuple((False,) * len(shape) for shape in ins),
            tuple((False,) * len(shape) for shape in outs),
            self.blobs.get(index, ()),
            tuple(False for _ in node.inputs),
        )
        try:
            node.spec.onnx(emitter, node.params)
        except Error as error:
            raise error.at(path=self.graph.path, line=node.layer.line, layer=node.name) from None


def _name(value: Value) -> str:
    return f"{value.node}:{value.top}"


def _value(name: str) -> Value:
    node, top = name.split(":")
    return Value(int(node), int(top))
