"""What the ONNX column of the layer table writes to: plain records, no onnx import.

An ``Emitter`` serves one layer: the names and shapes of its inputs and outputs, its blobs, and methods
that append nodes. Axes whose size is only known at run time are marked in ``dynamic_in`` and
``dynamic_out``; the shapes themselves are those of one concrete example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UnsupportedError

Shape = tuple[int, ...]
Dynamic = tuple[bool, ...]


@dataclass(frozen=True)
class NodeRecord:
    """One ONNX node: operator, names, attributes, and the Caffe layer it comes from."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    layer: str


@dataclass
class Sheet:
    """The whole graph being written: nodes in order, constants by name, and the names already taken."""

    nodes: list[NodeRecord] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    node_names: set[str] = field(default_factory=set)

    def unique(self, wanted: str) -> str:
        """``wanted``, or with a number behind it where that name is taken; then taken itself."""
        return _unique(wanted, self.names)

    def unique_node(self, wanted: str) -> str:
        """The same for node names, which are a set of their own."""
        return _unique(wanted, self.node_names)


def _unique(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


@dataclass
class Emitter:
    """The part of a sheet that one layer writes."""

    sheet: Sheet
    layer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_shapes: tuple[Shape, ...]
    out_shapes: tuple[Shape, ...]
    dynamic_in: tuple[Dynamic, ...]
    dynamic_out: tuple[Dynamic, ...]
    blobs: tuple[np.ndarray, ...]
    from_input: tuple[bool, ...]

    def const(self, array: Any, suffix: str, dtype: Any = np.float32) -> str:
        """A constant named ``<layer>.<suffix>``."""
        name = self.sheet.unique(f"{self.layer}.{suffix}")
        self.sheet.constants[name] = np.asarray(array, dtype)
        return name

    def blob(self, index: int, shape: Sequence[int] | None = None) -> str:
        """One of the layer's own blobs as a constant, reshaped where asked."""
        array = self.blobs[index]
        return self.const(array if shape is None else array.reshape(tuple(shape)), str(index))

    def ints(self, values: Sequence[int], suffix: str) -> str:
        """An int64 constant, as ONNX wants for axes and shapes."""
        return self.const(list(values), suffix, np.int64)

    def node(self, op: str, *inputs: str, to: str | Sequence[str] | None = None, **attributes: Any) -> str:
        """Append a node and return its first output: ``to``, or a new name made from layer and operator."""
        if to is None:
            outputs: tuple[str, ...] = (self.sheet.unique(f"{self.layer}/{op.lower()}"),)
        else:
            outputs = (to,) if isinstance(to, str) else tuple(to)
        name = self.sheet.unique_node(self.layer)
        self.sheet.nodes.append(NodeRecord(op, name, tuple(inputs), outputs, attributes, self.layer))
        return outputs[0]

    def cast(self, source: str, dtype: str) -> str:
        """``source`` as ``dtype``: "float32", "int64" (as a C++ cast: towards 0) or "bool"."""
        return self.node("Cast", source, to_type=dtype)

    def sum(
        self, source: str, axes: Sequence[int] | None = None, *, keep: bool = False, to: str | None = None
    ) -> str:
        """The sum of ``source`` along ``axes``, of all of it by default."""
        given = () if axes is None else (self.ints(axes, "axes"),)
        return self.node("ReduceSum", source, *given, to=to, keepdims=int(keep))

    def split(self, source: str, axis: int, parts: int) -> tuple[str, ...]:
        """``source`` cut along ``axis`` into that many parts of size 1."""
        names = tuple(self.sheet.unique(f"{self.layer}/{i}") for i in range(parts))
        self.node("Split", source, self.ints([1] * parts, "parts"), to=names, axis=axis)
        return names

    def static(self, index: int, axes: Sequence[int], what: str) -> None:
        """Raise UnsupportedError where one of those axes of input ``index`` varies at run time."""
        if any(self.dynamic_in[index][axis] for axis in axes):
            raise UnsupportedError(
                f"{what} needs a fixed size", hint="export with a fixed size (--batch N, no --dynamic-hw)"
            )

    def reshape(
        self, source: str, index: int, shape: Sequence[int], dynamic: Sequence[bool], to: str | None = None
    ) -> str:
        """Reshape ``source``, which has the shape of input ``index``, with at most one inferred axis.

        A run-time axis that keeps its place is copied; of the others one may be inferred.
        """
        have, moves = self.in_shapes[index], self.dynamic_in[index]
        target = list(shape)
        inferred = 0
        for axis, (dim, varies) in enumerate(zip(shape, dynamic, strict=True)):
            if not varies:
                continue
            if axis < len(have) and moves[axis] and have[axis] == dim and not inferred:
                target[axis] = 0
            else:
                target[axis] = -1
                inferred += 1
        if inferred > 1:
            raise UnsupportedError("reshapes several run-time axes at once", hint="export with fixed sizes")
        if 0 in shape:
            raise UnsupportedError("has an empty top")
        return self.node("Reshape", source, self.ints(target, "shape"), to=to)
