"""Latencies side by side: every model's runs interleaved in one process, none spinning beside another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime

from . import quantize
from .costs import cost
from .errors import FileError, UsageError
from .files import missing, read_bytes
from .graph import build
from .kernels import Kernel, NodeNames, medians, read_runs
from .model import Model, fingerprint_document, load, net_and_weights
from .onnx_export import Request, draw, source_shapes, to_onnx
from .runtime import Engine, open_onnx
from .shape_inference import infer
from .why import LOW, Cause, Rates, explain

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one model: median, 90th percentile, and every run."""

    name: str
    median: float
    p90: float
    runs: tuple[float, ...]


@dataclass(frozen=True)
class LayerTime:
    """What the kernels of one layer take: their operators, and milliseconds (the sum of their medians)."""

    name: str
    ops: str
    milliseconds: float
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A model to time: its name, its ONNX bytes or file; of a Caffe net also whose layers its nodes are.

    ``macs``: by layer, for the batch that is timed; empty for an ONNX file. ``fingerprint``: sha256 of the files of
    a Caffe net.
    """

    name: str
    source: bytes | str
    nodes: NodeNames | None = None
    macs: Mapping[str, int] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_macs(self) -> int:
        """MACs of a forward pass, 0 where they are not known."""
        return sum(self.macs.values())


@dataclass(frozen=True)
class Gain:
    """One layer of a net, and what stands in its place in another: milliseconds and MACs before and after.

    ``name`` is "" for everything that takes time without multiplying. ``why``: what the time goes into where the
    efficiency is below `LOW`, the largest cause first.
    """

    name: str
    ms: tuple[float, float]
    macs: tuple[int, int]
    why: tuple[Cause, ...] = ()

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

    @property
    def lost(self) -> float:
        """Milliseconds beyond those that the arithmetic speed-up leaves."""
        return self.ms[1] - self.ms[0] / self.arithmetic if self.arithmetic is not None else 0.0


def subject(item: str, *, batch: int | None, seed: int, phase: str = "TEST") -> Subject:
    """``NET[,WEIGHTS]`` or ``MODEL.onnx`` as something to time; random weights where none are given."""
    if item.endswith(".onnx"):
        if not Path(item).is_file():
            raise missing(item)
        return Subject(item, item)
    net, weights = net_and_weights(item)
    model = load(net, weights, phase=phase)
    made = of_model(item, model, Request(batch=batch, random_seed=None if weights else seed))
    return replace(made, fingerprint=fingerprint_document(model))


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

    A fused node counts for the layer whose operator leads it; what onnxruntime adds to convert a tensor, for the
    layer that made it; other nodes that it adds keep their names.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = Engine(engine.threads, engine.provider, spin=False, profile=True)
        runners = [_runner(one, quiet, batch, seed, f"{folder}/profile{i}") for i, one in enumerate(subjects)]
        for _ in range(runs + 1):
            for runner in runners:
                runner.run()
        found = [read_runs(Path(runner.ort.end_profiling()), runs + 1)[1:] for runner in runners]
    return [_by_layer(medians(events, one.nodes)) for one, events in zip(subjects, found, strict=True)]


def _by_layer(kernels: Sequence[Kernel]) -> list[LayerTime]:
    parts: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        parts.setdefault(kernel.layer or kernel.name, []).append(kernel)
    return [
        LayerTime(
            name, "+".join(dict.fromkeys(one.op for one in own)), sum(one.ms for one in own), tuple(own)
        )
        for name, own in parts.items()
    ]


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

    A layer whose operators onnxruntime has merged into others', or which is not matched, counts for the rest; an
    operator that one net has merged into a layer and the other has not, for that layer.
    """
    owners = replaced(list(first.macs), list(second.macs))
    old = {one.name: one for one in before}
    parts: dict[str, list[LayerTime]] = {}
    macs: dict[str, int] = {}
    for name, count in second.macs.items():
        macs[owners.get(name, "")] = macs.get(owners.get(name, ""), 0) + count
    for one in after:
        owner = owners.get(one.name, "")
        if owner and owner not in old and first.nodes is not None:
            owner = first.nodes.host(owner) or owner
        parts.setdefault(owner, []).append(one)
    new = {name: sum(one.milliseconds for one in found) for name, found in parts.items()}
    rates = Rates.of([kernel for one in (*before, *after) for kernel in one.kernels])
    rows = []
    for name, count in first.macs.items():
        if count and name in old and name in new and macs.get(name):
            row = Gain(name, (old[name].milliseconds, new[name]), (count, macs[name]))
            if (row.efficiency or 1.0) < LOW:
                kernels = [kernel for one in parts[name] for kernel in one.kernels]
                row = replace(row, why=explain(row.ms, row.macs, old[name].kernels, kernels, rates))
            rows.append(row)
    rest = (
        sum(one.milliseconds for one in before) - sum(row.ms[0] for row in rows),
        sum(new.values()) - sum(row.ms[1] for row in rows),
    )
    left = (
        first.total_macs - sum(row.macs[0] for row in rows),
        second.total_macs - sum(row.macs[1] for row in rows),
    )
    return [*rows, Gain("", rest, left)]
