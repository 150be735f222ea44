"""Latencies side by side: every model's runs interleaved in one process, none spinning beside another."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

from .errors import FileError, UsageError
from .files import read_bytes
from .model import Model, load
from .onnx_export import Request, draw, to_onnx
from .runtime import Engine, open_onnx

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
    """What the nodes of one layer take: their operators, and milliseconds a run (mean)."""

    name: str
    ops: str
    milliseconds: float


@dataclass(frozen=True)
class Subject:
    """A model to time: its name, its ONNX bytes or file, and the Caffe layer of each node and tensor.

    onnxruntime names an optimized node after the node or the tensor that it replaces.
    """

    name: str
    source: bytes | str
    layers: Mapping[str, str] = field(default_factory=dict)


def subject(item: str, *, batch: int | None, seed: int, phase: str = "TEST") -> Subject:
    """``NET[,WEIGHTS]`` or ``MODEL.onnx`` as something to time; random weights where none are given."""
    if item.endswith(".onnx"):
        if not Path(item).is_file():
            raise FileError("no such file", path=item)
        return Subject(item, item)
    net, _, weights = item.partition(",")
    model = load(net, weights or None, phase=phase)
    return of_model(item, model, Request(batch=batch, random_seed=None if weights else seed))


def of_model(name: str, model: Model, request: Request) -> Subject:
    """A loaded model as something to time."""
    export = draw(model, request)
    layers = {output: record.layer for record in export.sheet.nodes for output in record.outputs}
    layers |= {
        record.name: record.layer for record in export.sheet.nodes
    }  # an in-place blob has a node's name
    return Subject(name, to_onnx(export).SerializeToString(), layers)


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
    for runner in runners:
        for _ in range(warmup):
            runner.run()
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(runs):
        for runner, found in zip(runners, times, strict=True):
            started = time.perf_counter()
            runner.run()
            found.append(1e3 * (time.perf_counter() - started))
        step()
    return [
        Timing(runner.name, float(np.median(found)), float(np.percentile(found, 90)), tuple(found))
        for runner, found in zip(runners, times, strict=True)
    ]


def profile(
    one: Subject, engine: Engine, *, runs: int = 20, batch: int | None = None, seed: int = 0
) -> list[LayerTime]:
    """Time by layer in execution order, as onnxruntime's own profiler counts it.

    A fused node counts for the layer whose operator leads it; nodes that onnxruntime adds keep their names.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = Engine(engine.threads, engine.provider, spin=False, profile=True)
        runner = _runner(one, quiet, batch, seed, f"{folder}/profile")
        for _ in range(runs + 1):
            runner.run()
        events = json.loads(Path(runner.ort.end_profiling()).read_text())
    nodes: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            nodes.setdefault(key, []).append(event["dur"] / 1e3)
    layers: dict[str, tuple[list[str], float]] = {}
    for (name, op), found in nodes.items():
        node = name.removesuffix("_nchwc").removeprefix("fused ")
        layer = one.layers.get(node, name)
        ops, total = layers.get(layer, ([], 0.0))
        layers[layer] = ([*ops, op], total + sum(found[-runs:]) / runs)
    return [LayerTime(name, "+".join(dict.fromkeys(ops)), total) for name, (ops, total) in layers.items()]
