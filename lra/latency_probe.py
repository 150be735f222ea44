"""Convolutions timed where they stand: layers replaced in a net's ONNX graph, and the time of every kernel.

All layers change at once, each net taking one candidate of every layer, so that every kernel runs between its
real neighbours: their layouts, their fusions, what they leave in the caches. Weights are random: they cost the
same.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from caffe_proto.errors import UnsupportedError, UsageError
from caffe_proto.kernels import LEARNT, Event, NodeNames, owners, read_runs
from caffe_proto.layers.emit import NodeRecord, Shape, Sheet
from caffe_proto.onnx_export import Export, Request, draw, to_onnx
from caffe_proto.runtime import Engine, open_onnx

from .decomposition import StepShape
from .latency_table import Chain
from .targets import Found, Target

_WARMUP = 1
_LEAST = 1e-7  # seconds that a kernel takes at least
_LEAVE_OUT = "leave it out (--except)"
_TINY, _PROBES = 32, 30  # convolutions in a row, and their runs

Choice = Mapping[str, tuple[Target, Chain]]  # layer name -> the layer, and what stands in its place
Times = dict[str, float]  # layer name -> seconds of its kernels; "": of no layer


def as_is(target: Target) -> Chain:
    """The layer itself, as a chain of one."""
    g = target.geometry
    return (StepShape("", target.shape, g.stride, g.pad, g.dilation, g.group),)


def narrowed(target: Target, outputs: int, inputs: int) -> Chain:
    """The layer itself with fewer channels, as a chain of one: what is left of it once filters are pruned.

    ``outputs``, ``inputs``: channels of all its groups together, at most the layer's own. A convolution of several
    groups keeps their number, and its groups stay equally wide; a depthwise one, which reads one channel a group,
    has as many groups as it has inputs. Weight (outputs, inputs/group, kh, kw).

    Raises UsageError where the layer has fewer channels, or its groups cannot share so many.
    """
    (step,) = as_is(target)
    out, depth, height, width = step.shape
    group = inputs if depth == 1 and step.group > 1 else step.group
    for what, wide, most in (("outputs", outputs, out), ("inputs", inputs, depth * step.group)):
        if not 1 <= wide <= most:
            raise UsageError(f"cannot have {wide} {what}, it has {most}", layer=target.name)
        if wide % group:
            raise UsageError(
                f"{wide} {what} cannot be shared by its {group} groups", layer=target.name,
                hint=f"give a multiple of {group}",
            )  # fmt: skip
    return (replace(step, shape=(outputs, inputs // group, height, width), group=group),)


@dataclass(frozen=True)
class Kernels:
    """``block``: channels that convolutions are padded to, 1 where they are not; ``overhead``: a profile's seconds a kernel."""

    block: int
    overhead: float


@dataclass(frozen=True, eq=False)
class Drawing:
    """A net as ONNX records; its weights are random where the model has none."""

    export: Export

    @classmethod
    def of(cls, found: Found) -> Drawing:
        """Draw a net for the shapes it was looked at with. Raises NetError where a layer cannot be run."""
        graph, shapes = found.shaped.graph, found.shaped.shapes
        sources = {graph.blob(value): shapes[value] for value in graph.sources if value in shapes}
        seed = None if found.model.weights is not None else 0
        return cls(draw(found.model, Request(input_shapes=sources, random_seed=seed)))

    @cached_property
    def nodes(self) -> dict[str, NodeRecord]:
        """All nodes by name, in order."""
        return {node.name: node for node in self.export.sheet.nodes}

    @cached_property
    def makers(self) -> dict[str, NodeRecord]:
        """The node that writes each tensor."""
        return {name: node for node in self.nodes.values() for name in node.outputs}

    @cached_property
    def readers(self) -> dict[str, list[NodeRecord]]:
        """The nodes that read each tensor."""
        found: dict[str, list[NodeRecord]] = {}
        for node in self.nodes.values():
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Of the graph and its shapes, whatever the layers are called and the weights are."""
        numbers: dict[str, str] = {}
        digest = hashlib.sha256()
        for node in self.nodes.values():
            names = [numbers.setdefault(name, str(len(numbers))) for name in (*node.inputs, *node.outputs)]
            arrays = [self.export.sheet.constants.get(name) for name in node.inputs]
            shapes = [None if array is None else array.shape for array in arrays]
            digest.update(repr((node.op, names, shapes, sorted(node.attributes.items()))).encode())
        digest.update(repr([self.export.shapes[name] for name in self.export.inputs.values()]).encode())
        return digest.hexdigest()

    def sites(self, target: Target) -> list[NodeRecord]:
        """The nodes that do a layer's multiplications, one for each of its bottoms.

        Raises UnsupportedError where the layer is drawn otherwise.
        """
        op = "Gemm" if target.dense else "Conv"
        found = [node for node in self.nodes.values() if node.layer == target.name and node.op == op]
        if not found or target.in_hw is None:
            raise UnsupportedError("its time cannot be measured", layer=target.name, hint=_LEAVE_OUT)
        return found

    def place(self, target: Target) -> str:
        """What the time of a chain in a layer's place depends on: its input and the operators around it."""
        sites = self.sites(target)
        sizes = (target.places, target.shape[1] * target.geometry.group, *(target.in_hw or ()))
        times = f"{len(sites)} times " if len(sites) > 1 else ""
        before, after = self._before(sites[0].inputs[0]), self._after(sites[0].outputs[0])
        return f"{times}{'x'.join(map(str, sizes))}: {before} > {sites[0].op} > {after}"

    def _before(self, name: str, depth: int = 2) -> str:
        maker = self.makers.get(name)
        if maker is None:
            return "input"
        if depth == 1 or maker.op in LEARNT:
            return maker.op
        return f"{self._before(maker.inputs[0], depth - 1)} > {maker.op}"

    def _after(self, name: str) -> str:
        return "+".join(sorted({node.op for node in self.readers.get(name, ())})) or "output"

    def around(self, targets: Sequence[Target]) -> frozenset[str]:
        """The nodes that make the targets' surroundings: all they need, and what reads them up to the next weights."""
        kept = {node.name for target in targets for node in self.sites(target)}
        for node in self.nodes.values():  # in order: whoever is reached is reached from above
            made = (self.makers.get(name) for name in node.inputs)
            if node.op not in LEARNT and any(maker is not None and maker.name in kept for maker in made):
                kept.add(node.name)
        for node in reversed(self.nodes.values()):
            read = any(reader.name in kept for name in node.outputs for reader in self.readers.get(name, ()))
            whole_layer = all(name in self.export.shapes for name in node.outputs)
            if read:
                kept.add(node.name)
            elif not whole_layer:  # its own layer goes on behind it, and is left out
                kept.discard(node.name)
        return frozenset(kept)

    def variant(self, choice: Choice, kept: frozenset[str] | None = None) -> Export:
        """The net, or the part of it named, with chains in the places of layers; what nobody reads is an output."""
        old = self.export.sheet
        sheet = Sheet([], dict(old.constants), set(old.names))
        numbers = _Numbers()
        for node in self.nodes.values():
            if kept is not None and node.name not in kept:
                continue
            target, chain = choice.get(node.layer, (None, ()))
            if target is not None and node.op in LEARNT:
                _write(sheet, node, target, chain, numbers)
            else:
                sheet.nodes.append(node)
        # a profile names nodes and tensors: none has the name of another
        sheet.nodes = [replace(node, name=f"node {i}") for i, node in enumerate(sheet.nodes)]
        read = {name for node in sheet.nodes for name in node.inputs}
        sheet.constants = {name: array for name, array in sheet.constants.items() if name in read}
        asked = set(self.export.outputs.values())
        made = dict.fromkeys(name for node in sheet.nodes for name in node.outputs)
        ends = {name: name for name in made if name in asked or name not in read}
        inputs = {blob: name for blob, name in self.export.inputs.items() if name in read}
        return replace(self.export, sheet=sheet, inputs=inputs, outputs=ends)


def _write(sheet: Sheet, node: NodeRecord, target: Target, chain: Chain, numbers: _Numbers) -> None:
    """A chain in the place of a node, whose bias goes to the last step.

    Where the chain is narrower than the layer, 1 x 1 convolutions that count for no layer adapt it.
    """
    source = node.inputs[0]
    steps = _adapted(target, chain)
    for i, (step, layer) in enumerate(steps):
        last = i == len(steps) - 1
        weight = sheet.unique(f"{node.layer}@{i}.weight")
        sheet.constants[weight] = numbers.of(step.shape[:2] if target.dense else step.shape)
        out = node.outputs[0] if last else sheet.unique(f"{node.layer}@{i}")
        inputs = (source, weight, *(node.inputs[2:] if last else ()))
        attributes = {"transB": 1} if target.dense else _attributes(step)
        sheet.nodes.append(NodeRecord(node.op, "", inputs, (out,), attributes, layer))
        source = out


def _adapted(target: Target, chain: Chain) -> list[tuple[StepShape, str]]:
    """The steps to write, each with the layer that it counts for."""
    width, depth = target.shape[0], target.shape[1] * target.geometry.group
    steps = [(step, target.name) for step in chain]
    if (first := chain[0].shape[1] * chain[0].group) != depth:
        steps.insert(0, (StepShape("", (first, depth, 1, 1)), ""))
    if (last := chain[-1].shape[0]) != width:
        steps.append((StepShape("", (width, last, 1, 1)), ""))
    return steps


def _attributes(step: StepShape) -> dict[str, Any]:
    return {
        "kernel_shape": step.shape[2:],
        "strides": step.stride,
        "pads": (*step.pad, *step.pad),
        "dilations": step.dilation,
        "group": step.group,
    }


class _Numbers:
    """Random weights of He's scale: all begin alike, so that they are drawn once."""

    def __init__(self) -> None:
        self._drawn = np.empty(0, np.float32)

    def of(self, shape: Shape) -> np.ndarray:
        """An array of that shape."""
        count = prod(shape)
        if count > len(self._drawn):
            self._drawn = np.random.default_rng(0).standard_normal(count, np.float32)
        scaled: np.ndarray = self._drawn[:count].reshape(shape) * np.float32((2 / prod(shape[1:])) ** 0.5)
        return scaled


class Running:
    """A net open in onnxruntime, profiled into a folder if one is given; its workers do not spin beside those of others."""

    def __init__(self, export: Export, engine: Engine, folder: Path | None = None) -> None:
        self._sheet = export.sheet
        quiet = Engine(engine.threads, engine.provider, spin=False, profile=folder is not None)
        self._session = open_onnx(
            to_onnx(export).SerializeToString(),
            quiet,
            str(folder / "profile") if folder is not None else None,
        )
        rng = np.random.default_rng(0)
        self._feeds = {
            one.name: rng.uniform(0, 1, one.shape).astype(np.float32) for one in self._session.get_inputs()
        }
        self._runs = 0

    def run(self) -> None:
        """One forward pass."""
        self._session.run(None, self._feeds)
        self._runs += 1

    def kernels(self) -> list[list[Event]]:
        """Close it: the kernels of each run, in order, as onnxruntime's profile tells of them."""
        path = Path(self._session.end_profiling())
        found = read_runs(path, self._runs)
        path.unlink()
        return found

    def times(self, overhead: float) -> list[Times]:
        """Close it: seconds by layer for each run, less the overhead of every kernel."""
        names = NodeNames(self._sheet)
        return [_by_layer(kernels, names, overhead) for kernels in self.kernels()]


def _by_layer(kernels: Sequence[Event], names: NodeNames, overhead: float) -> Times:
    """Sum the kernels of one run by layer; the reordering of a tensor counts for the layer that made it."""
    found: Times = {}
    for event, layer in zip(kernels, owners(kernels, names), strict=True):
        found[layer] = found.get(layer, 0.0) + max(event["dur"] / 1e6 - overhead, _LEAST)
    return found


def _shapes(listed: Sequence[Mapping[str, list[int]]]) -> list[tuple[int, ...]]:
    return [tuple(shape) for one in listed for shape in one.values()]


def side_by_side(
    drawing: Drawing, choices: Sequence[Choice], engine: Engine, overhead: float, rounds: int
) -> tuple[list[Times], list[list[Times]]]:
    """Run nets in turn, ``rounds`` times each, beside the net as it is: its times of each round, and theirs by net.

    Only the part of the net around the layers chosen is run. Raises UnsupportedError where a layer shows no kernel.
    """
    targets = {name: target for choice in choices for name, (target, _) in choice.items()}
    kept = drawing.around(list(targets.values()))
    plain, *others = _in_turn(
        [drawing.variant(choice, kept) for choice in ({}, *choices)], engine, overhead, rounds
    )
    for name in targets:
        if any(name not in run for runs in (plain, *others) for run in runs):
            raise UnsupportedError("onnxruntime shows no kernel of it", layer=name, hint=_LEAVE_OUT)
    return plain, others


def whole(drawing: Drawing, engine: Engine, overhead: float, rounds: int) -> list[Times]:
    """The times of the whole net as it is, for each run."""
    (times,) = _in_turn([drawing.variant({})], engine, overhead, rounds)
    return times


def _in_turn(exports: Sequence[Export], engine: Engine, overhead: float, rounds: int) -> list[list[Times]]:
    """Run every net ``rounds`` times in turn; the first round does not count."""
    with tempfile.TemporaryDirectory() as folder:
        nets = [Running(export, engine, Path(folder)) for export in exports]
        for _ in range(_WARMUP + rounds):
            for net in nets:
                net.run()
        return [net.times(overhead)[_WARMUP:] for net in nets]


def kernels(engine: Engine) -> Kernels:
    """What onnxruntime's kernels pad channels to, and by how much profiling makes them look slower.

    Both from a row of tiny convolutions to one channel: the shape that a kernel gives out is the padded one, and
    what the kernels take together, less what the row takes by the clock without a profile, is the profile's.
    """
    row = _row(_TINY)
    with tempfile.TemporaryDirectory() as folder:
        profiled, bare = Running(row, engine, Path(folder)), Running(row, engine)
        clock = []
        for _ in range(_PROBES):
            profiled.run()
            started = time.perf_counter()
            bare.run()
            clock.append(time.perf_counter() - started)
        runs = profiled.kernels()
    sums = [sum(event["dur"] for event in run) / 1e6 for run in runs]
    shapes = [
        _shapes(event["args"]["output_type_shape"])[0]
        for run in runs
        for event in run
        if event["args"]["op_name"] == "Conv"
    ]
    overhead = (float(np.median(sums)) - float(np.median(clock))) / len(runs[0])
    return Kernels(max((shape[1] for shape in shapes), default=1), max(0.0, overhead))


def _row(length: int) -> Export:
    """1 x 1 convolutions of one channel in a row."""
    step = StepShape("", (1, 1, 1, 1))
    sheet = Sheet([], {"w": np.ones((1, 1, 1, 1), np.float32)})
    for i in range(length):
        sheet.nodes.append(NodeRecord("Conv", f"n{i}", (f"t{i}", "w"), (f"t{i + 1}",), _attributes(step), ""))
    shapes = {f"t{i}": (1, 1, 8, 8) for i in (0, length)}
    fixed = {name: (False,) * 4 for name in shapes}
    first, last = shapes
    return Export(sheet, None, {first: first}, {last: last}, shapes, fixed, "row")  # type: ignore[arg-type]
