"""Latencies side by side: every model's runs interleaved in one process, none spinning beside another."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from . import quantize
from .costs import cost
from .errors import FileError, UsageError
from .files import read_bytes
from .graph import build
from .layers.emit import Sheet
from .model import Model, load
from .onnx_export import Request, draw, source_shapes, to_onnx
from .runtime import Engine, open_onnx
from .shape_inference import infer

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


LEARNT = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_KERNEL = "_kernel_time"


class NodeNames:
    """Which layer a kernel belongs to: onnxruntime calls it after a node, or after the tensor it ends in."""

    def __init__(self, sheet: Sheet) -> None:
        self._constants = frozenset(sheet.constants)
        self._nodes = {node.name: node for node in sheet.nodes}
        self._makers = {name: node for node in sheet.nodes for name in node.outputs}

    def layer(self, name: str, op: str) -> str:
        """The layer by a kernel's name and operator; "" where there is none.

        A convolution or product that took what follows into itself is called after the last of that.
        """
        node = self._nodes.get(name) or self._makers.get(name)
        if op.removeprefix("Fused") in LEARNT:
            while node is not None and node.op not in LEARNT:
                sources = [source for source in node.inputs if source not in self._constants]
                node = self._makers.get(sources[0]) if len(sources) == 1 else None
        return node.layer if node is not None else ""


def node_name(kernel: str) -> str:
    """The node or tensor by the name that a profile gives to its kernel."""
    return kernel.removesuffix(_KERNEL).removesuffix("_nchwc").removeprefix("fused ")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one model: median, 90th percentile, and every run."""

    name: str
    median: float
    p90: float
    runs: tuple[float, ...]


@dataclass(frozen=True)
class LayerTime:
    """What the nodes of one layer take: their operators, and milliseconds (the sum of the nodes' medians)."""

    name: str
    ops: str
    milliseconds: float


@dataclass(frozen=True)
class Subject:
    """A model to time: its name, its ONNX bytes or file; of a Caffe net also whose layers its nodes are.

    ``macs``: by layer, for the batch that is timed; empty for an ONNX file.
    """

    name: str
    source: bytes | str
    nodes: NodeNames | None = None
    macs: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_macs(self) -> int:
        """MACs of a forward pass, 0 where they are not known."""
        return sum(self.macs.values())


@dataclass(frozen=True)
class Gain:
    """One layer of a net, and what stands in its place in another: milliseconds and MACs before and after.

    ``name`` is "" for everything that takes time without multiplying.
    """

    name: str
    ms: tuple[float, float]
    macs: tuple[int, int]

    @property
    def measured(self) -> float:
        """How many times faster."""
        return self.ms[0] / self.ms[1] if self.ms[1] else 1.0

    @property
    def arithmetic(self) -> float | None:
        """How many times fewer MACs, None where there are none."""
        return self.macs[0] / self.macs[1] if all(self.macs) else None

    @property
    def efficiency(self) -> float | None:
        """The share of the arithmetic speed-up that is measured: their ratio."""
        return self.measured / self.arithmetic if self.arithmetic is not None else None


def subject(item: str, *, batch: int | None, seed: int, phase: str = "TEST") -> Subject:
    """``NET[,WEIGHTS]`` or ``MODEL.onnx`` as something to time; random weights where none are given."""
    if item.endswith(".onnx"):
        if not Path(item).is_file():
            raise FileError("no such file", path=item)
        return Subject(item, item)
    net, _, weights = item.partition(",")
    model = load(net, weights or None, phase=phase)
    return of_model(item, model, Request(batch=batch, random_seed=None if weights else seed))


def narrowed(one: Subject, dtype: str, seed: int = 0) -> Subject:
    """The same model in another of `quantize.DTYPES`; ranges of 8 bits are those of random input.

    Raises UsageError where onnxruntime cannot run it so.
    """
    if dtype == "fp32":
        return one
    source = read_bytes(one.source) if isinstance(one.source, str) else one.source
    made = quantize.parsed(source, one.name)
    found = quantize.narrowed(made, dtype, quantize.random_batches(made, seed))
    return replace(one, name=f"{one.name} [{dtype}]", source=found.SerializeToString())


def of_model(name: str, model: Model, request: Request) -> Subject:
    """A loaded model as something to time."""
    export = draw(model, request)
    built = build(model.net)
    counted = cost(infer(built, source_shapes(built, request), partial=True))
    macs = {row.name: row.macs for row in counted.layers}
    return Subject(name, to_onnx(export).SerializeToString(), NodeNames(export.sheet), macs)


@dataclass(frozen=True)
class _Runner:
    name: str
    run: Callable[[], object]
    ort: onnxruntime.InferenceSession


def _runner(one: Subject, engine: Engine, batch: int | None, seed: int, prefix: str | None = None) -> _Runner:
    source = read_bytes(one.source) if isinstance(one.source, str) and prefix is None else one.source
    try:
        ort = open_onnx(source if isinstance(source, bytes) else str(source), engine, prefix)
    except Exception as error:
        if isinstance(error, UsageError):
            raise
        raise FileError(f"onnxruntime cannot load it: {str(error).splitlines()[0]}", path=one.name) from error
    feeds = _feeds(one, ort, batch, seed)
    names = [output.name for output in ort.get_outputs()]
    return _Runner(one.name, lambda: ort.run(names, feeds), ort)


def _feeds(
    one: Subject, ort: onnxruntime.InferenceSession, batch: int | None, seed: int
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in ort.get_inputs():
        if value.type not in _DTYPES:
            raise UsageError(
                f'input "{value.name}" is a {value.type}, which cannot be made up', path=one.name
            )
        shape = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int) and axis == 0 and batch is not None and dim != batch:
                raise UsageError(
                    f'input "{value.name}" has a fixed batch of {dim}',
                    path=one.name,
                    hint="export it with --batch dynamic",
                )
            if not isinstance(dim, int) and axis > 0:
                raise UsageError(
                    f'input "{value.name}" leaves axis {axis} open',
                    path=one.name,
                    hint="export it with a fixed size to time it",
                )
            shape.append(dim if isinstance(dim, int) else batch or 1)
        feeds[value.name] = rng.uniform(0, 1, shape).astype(_DTYPES[value.type])
    return feeds


def measure(
    subjects: Sequence[Subject],
    engine: Engine,
    *,
    runs: int = 50,
    warmup: int = 10,
    batch: int | None = None,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time models side by side, a run of each in turn, so that a noisy moment hits all of them.

    Sessions do not spin between runs: the workers of an idle one would double the time of its neighbours.
    """
    quiet = Engine(engine.threads, engine.provider, spin=False)
    runners = [_runner(one, quiet, batch, seed) for one in subjects]
    return in_turn([(one.name, one.run) for one in runners], runs=runs, warmup=warmup, step=step)


def in_turn(
    named: Sequence[tuple[str, Callable[[], object]]],
    *,
    runs: int,
    warmup: int,
    step: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time functions, each by turns; ``warmup`` calls of each do not count."""
    for _, run in named:
        for _ in range(warmup):
            run()
    times: list[list[float]] = [[] for _ in named]
    for _ in range(runs):
        for (_, run), found in zip(named, times, strict=True):
            started = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - started))
        step()
    return [
        Timing(name, float(np.median(found)), float(np.percentile(found, 90)), tuple(found))
        for (name, _), found in zip(named, times, strict=True)
    ]


def profiles(
    subjects: Sequence[Subject], engine: Engine, *, runs: int = 20, batch: int | None = None, seed: int = 0
) -> list[list[LayerTime]]:
    """Time by layer in execution order for each model, as onnxruntime's own profiler counts it, run in turn.

    A fused node counts for the layer whose operator leads it; nodes that onnxruntime adds keep their names.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = Engine(engine.threads, engine.provider, spin=False, profile=True)
        runners = [_runner(one, quiet, batch, seed, f"{folder}/profile{i}") for i, one in enumerate(subjects)]
        for _ in range(runs + 1):
            for runner in runners:
                runner.run()
        events = [json.loads(Path(runner.ort.end_profiling()).read_text()) for runner in runners]
    return [_by_layer(one, found, runs) for one, found in zip(subjects, events, strict=True)]


def _by_layer(one: Subject, events: Sequence[Mapping[str, Any]], runs: int) -> list[LayerTime]:
    """The last ``runs`` runs of a profile."""
    kernels: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            key = (event["name"], event["args"]["op_name"])
            kernels.setdefault(key, []).append(event["dur"] / 1e3)
    layers: dict[str, tuple[list[str], float]] = {}
    for (name, op), found in kernels.items():
        layer = one.nodes.layer(node_name(name), op) if one.nodes is not None else ""
        layer = layer or name.removesuffix(_KERNEL)
        ops, total = layers.get(layer, ([], 0.0))
        layers[layer] = ([*ops, op], total + float(np.median(found[-runs:])))
    return [LayerTime(name, "+".join(dict.fromkeys(ops)), total) for name, (ops, total) in layers.items()]


def replaced(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """By layer of another net the layer of this one that it is or stands for, by name.

    A layer of the other net alone belongs to the longest name that it begins with, followed by ``_``, of the
    layers of this net alone: as `conv1_v` and `conv1_h` to `conv1`. One that fits none is left out.
    """
    gone = sorted(set(names) - set(others), key=len, reverse=True)
    found = {name: name for name in others if name in set(names)}
    for name in others:
        owner = next((one for one in gone if name.startswith(f"{one}_")), None)
        if name not in found and owner is not None:
            found[name] = owner
    return found


def gains(
    first: Subject, second: Subject, before: Sequence[LayerTime], after: Sequence[LayerTime]
) -> list[Gain]:
    """What became of every layer that multiplies, and of all the rest together, from the profiles of two nets.

    A layer whose operators onnxruntime has merged into others', or which is not matched, counts for the rest.
    """
    owners = replaced(list(first.macs), list(second.macs))
    old = {one.name: one.milliseconds for one in before}
    new: dict[str, float] = {}
    macs: dict[str, int] = {}
    for name, count in second.macs.items():
        macs[owners.get(name, "")] = macs.get(owners.get(name, ""), 0) + count
    for one in after:
        owner = owners.get(one.name, "")
        new[owner] = new.get(owner, 0.0) + one.milliseconds
    rows = [
        Gain(name, (old[name], new[name]), (count, macs[name]))
        for name, count in first.macs.items()
        if count and name in old and name in new and macs.get(name)
    ]
    rest = (
        sum(old.values()) - sum(row.ms[0] for row in rows),
        sum(new.values()) - sum(row.ms[1] for row in rows),
    )
    left = (
        first.total_macs - sum(row.macs[0] for row in rows),
        second.total_macs - sum(row.macs[1] for row in rows),
    )
    return [*rows, Gain("", rest, left)]
