"""What onnxruntime's profiler tells of a run: its kernels, their times, and the layers they belong to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .layers.emit import NodeRecord, Shape, Sheet

LEARNT = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
CONVERSIONS = frozenset(
    {"ReorderInput", "ReorderOutput", "Transpose", "QuantizeLinear", "DequantizeLinear", "Cast"}
)
"""What onnxruntime, or a narrower number, adds between two operators: another layout or number of a tensor."""

_KERNEL = "_kernel_time"
_BLOCKED = "_nchwc"
_NUMBERED = re.compile(r"_token_\d+$")
_BYTES = {"double": 8, "int64": 8, "float16": 2, "uint8": 1, "int8": 1, "bool": 1}

Event = Mapping[str, Any]


def learnt(op: str) -> bool:
    """Whether an operator of a profile multiplies by weights, fused or in 8 bits."""
    return op.removeprefix("Fused").removeprefix("QLinear").removeprefix("Q") in LEARNT


class NodeNames:
    """Which layer a kernel belongs to: onnxruntime calls it after a node, or after the tensor it ends in."""

    def __init__(self, sheet: Sheet) -> None:
        self._constants = {name: array.shape for name, array in sheet.constants.items()}
        self._nodes = {node.name: node for node in sheet.nodes}
        self._makers = {name: node for node in sheet.nodes for name in node.outputs}

    def node(self, name: str, op: str) -> NodeRecord | None:
        """The node by a kernel's name and operator; None where there is none.

        A convolution or product that took what follows into itself is called after the last of that.
        """
        node = self._nodes.get(name) or self._makers.get(name)
        if learnt(op):
            while node is not None and node.op not in LEARNT:
                sources = self._sources(node)
                node = self._makers.get(sources[0]) if len(sources) == 1 else None
        return node

    def layer(self, name: str, op: str) -> str:
        """The layer by a kernel's name and operator; "" where there is none."""
        node = self.node(name, op)
        return node.layer if node is not None else ""

    def filters(self, name: str, op: str) -> Shape | None:
        """The shape of the weights that a kernel multiplies by, as the net has them; None where it does not."""
        node = self.node(name, op)
        if node is None or node.op not in LEARNT:
            return None
        return self._constants.get(node.inputs[1])

    def host(self, layer: str) -> str:
        """The layer with weights that the first operator of a layer comes behind, through others without; or ""."""
        node = next((one for one in self._nodes.values() if one.layer == layer), None)
        while node is not None and node.op not in LEARNT:
            makers = [self._makers[name] for name in self._sources(node) if name in self._makers]
            node = next((maker for maker in makers if maker.op in LEARNT), makers[0] if makers else None)
        return node.layer if node is not None else ""

    def _sources(self, node: NodeRecord) -> list[str]:
        return [name for name in node.inputs if name not in self._constants]


def node_name(kernel: str) -> str:
    """The node or tensor by the name that a profile gives to its kernel."""
    plain = _NUMBERED.sub("", kernel.removesuffix(_KERNEL))
    return plain.removesuffix(_BLOCKED).removeprefix("fused ")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a run: name, operator, its layer ("": none) and milliseconds.

    ``filters``: the weights it multiplies by, as the net has them, (out, in/group, kh, kw) of a convolution;
    ``computed``: as the kernel has them, padded; None where that is not shown. ``places``: positions at which
    it applies them, over the batch. ``moved``: bytes that it reads and writes, weights included.
    """

    name: str
    op: str
    layer: str
    ms: float
    filters: Shape | None = None
    computed: Shape | None = None
    places: int = 0
    moved: int = 0

    @property
    def blocked(self) -> bool:
        """Whether its channels lie in blocks (NCHWc)."""
        return self.name.endswith(_BLOCKED)

    @property
    def macs(self) -> int:
        """Multiplications that the net asks for here, padding not counted."""
        return prod(self.filters) * self.places if self.filters else 0


def read_runs(path: Path, count: int) -> list[list[Event]]:
    """The kernels of each of ``count`` runs in a file of the profiler, in order."""
    events = json.loads(path.read_text(encoding="utf-8"))
    found = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]
    each = len(found) // count
    return [found[i * each : (i + 1) * each] for i in range(count)]


def owners(run: Sequence[Event], names: NodeNames) -> list[str]:
    """The layer of each kernel of a run; a tensor's conversion counts for the layer that made it. "": of none."""
    made: list[str] = []
    makers: dict[Shape, str] = {}
    for event in run:
        args = event["args"]
        layer = names.layer(node_name(event["name"]), args["op_name"])
        if args["op_name"] in CONVERSIONS and not layer:
            layer = makers.get(_shapes(args["input_type_shape"])[0], "")
        else:
            makers |= dict.fromkeys(_shapes(args["output_type_shape"]), layer)
        made.append(layer)
    return made


def medians(found: Sequence[Sequence[Event]], names: NodeNames | None) -> list[Kernel]:
    """The kernels of several runs of one net: of each the median time."""
    layers = owners(found[0], names) if names is not None else [""] * len(found[0])
    return [
        _kernel(event, names, layer, float(np.median([run[i]["dur"] for run in found])) / 1e3)
        for i, (event, layer) in enumerate(zip(found[0], layers, strict=True))
    ]


def _kernel(event: Event, names: NodeNames | None, layer: str, ms: float) -> Kernel:
    name, args = event["name"].removesuffix(_KERNEL), event["args"]
    op = args["op_name"]
    reads, writes = (args[f"{side}_type_shape"] for side in ("input", "output"))
    moved = sum(_BYTES.get(kind, 4) * prod(shape) for one in (*reads, *writes) for kind, shape in one.items())
    filters = names.filters(node_name(event["name"]), op) if names is not None and learnt(op) else None
    if filters is None:
        return Kernel(_NUMBERED.sub("", name), op, layer, ms, moved=moved)
    shapes = _shapes(reads)
    computed = next((shape for shape in shapes[1:] if len(shape) == len(filters) > 1), None)
    if computed is None:  # it was packed when the net was loaded, and is not listed
        moved += prod(filters) * (1 if op.startswith("Q") else 4)
    width = computed[0] if computed is not None else filters[0]
    if len(filters) == 2:  # a product, transposed or not
        width = _shapes(writes)[0][-1]
    at, channels = (shapes[0], filters[0]) if "ConvTranspose" in op else (_shapes(writes)[0], width)
    places = prod(at) // channels
    return Kernel(_NUMBERED.sub("", name), op, layer, ms, filters, computed, places, moved)


def _shapes(listed: Sequence[Mapping[str, list[int]]]) -> list[Shape]:
    return [tuple(shape) for one in listed for shape in one.values()]
