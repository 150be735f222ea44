"""onnxruntime under a Caffe net: forward passes by blob name, and latencies side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions
from typing import Any, Literal

import numpy as np
import onnxruntime

from . import graph
from .errors import ShapeError, UsageError
from .layers.spec import text
from .model import Model
from .net import nearest
from .onnx_export import Export, Request, draw, graph_of, source_shapes, to_onnx

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_PACKAGE, _GPU_PACKAGE = "onnxruntime", "onnxruntime-gpu"
_LENT = 2**16  # bytes from which a constant is not written into the model but lent to onnxruntime


@dataclass(frozen=True)
class Engine:
    """How onnxruntime shall run: threads (0: all), provider, and whether workers spin between runs."""

    threads: int = 0
    provider: str = "cpu"
    spin: bool = True
    profile: bool = False


def options(engine: Engine) -> onnxruntime.SessionOptions:
    """onnxruntime's options for an engine.

    ``session.set_denormal_as_zero`` stays off: with one thread it would change the caller's own arithmetic.
    """
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = engine.threads
    made.inter_op_num_threads = 1
    made.log_severity_level = 3
    if not engine.spin:
        made.add_session_config_entry("session.intra_op.allow_spinning", "0")
        made.add_session_config_entry("session.inter_op.allow_spinning", "0")
    made.enable_profiling = engine.profile
    return made


def open_onnx(
    source: bytes | str,
    engine: Engine,
    profile_prefix: str | None = None,
    constants: Mapping[str, onnxruntime.OrtValue] | None = None,
) -> onnxruntime.InferenceSession:
    """A session over ONNX bytes or an ONNX file; raises UsageError where the provider is not active.

    ``constants`` are those that the source only declares; they must live as long as the session.
    """
    name = PROVIDERS.get(engine.provider)
    if name is None:
        raise UsageError(f'there is no provider "{engine.provider}"', hint="use " + " or ".join(PROVIDERS))
    if name not in onnxruntime.get_available_providers():
        have = ", ".join(onnxruntime.get_available_providers())
        raise UsageError(f"this onnxruntime has no {name}", hint=f"it has {have}; {_installed()}")
    made = options(engine)
    if profile_prefix is not None:
        made.profile_file_prefix = profile_prefix
    if constants:
        made.add_external_initializers(list(constants), list(constants.values()))
    opened = onnxruntime.InferenceSession(source, made, providers=[name])
    if opened.get_providers()[0] != name:
        raise UsageError(
            f"onnxruntime did not activate {name}, it would silently run on the CPU", hint=_installed()
        )
    return opened


def _installed() -> str:
    """What may be wrong with the packages where a GPU does not run: two of them put their files in one place."""
    found = [name for name in (_PACKAGE, _GPU_PACKAGE) if next(iter(distributions(name=name)), None)]
    if _GPU_PACKAGE not in found:
        return f"GPUs need the package {_GPU_PACKAGE} in the place of {_PACKAGE}"
    if len(found) > 1:
        return (
            f"{_PACKAGE} and {_GPU_PACKAGE} are both installed and overwrite one another: "
            f"uninstall both, then install {_GPU_PACKAGE} alone"
        )
    return f"{_GPU_PACKAGE} is installed: its release must fit the driver, CUDA and cuDNN of this machine"


def open_export(export: Export, engine: Engine) -> Compiled:
    """A session over a drawn net; the CPU reads large constants where they lie, mapped files included."""
    lent = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in export.sheet.constants.items()
        if engine.provider == "cpu" and array.dtype == np.float32 and array.nbytes >= _LENT
    }
    opened = open_onnx(to_onnx(export, lent).SerializeToString(), engine, constants=lent)
    return Compiled(opened, export.inputs, export.outputs, lent)


@dataclass(frozen=True)
class Compiled:
    """One onnxruntime session, for one set of input shapes, and the constants it reads."""

    ort: onnxruntime.InferenceSession
    inputs: dict[str, str]
    outputs: dict[str, str]
    constants: Mapping[str, onnxruntime.OrtValue] = field(default_factory=dict)


class Session:
    """Forward passes of one model. A context manager; compiled once for each set of input shapes."""

    def __init__(
        self, model: Model, request: Request, blobs: Literal["all"] | Iterable[str] | None, engine: Engine
    ) -> None:
        self.model = model
        self.engine = engine
        self.graph = graph_of(model, request)
        self.sources = {self.graph.blob(value): value for value in self.graph.sources}
        names = tuple(self.graph.final) if blobs == "all" else None if blobs is None else tuple(blobs)
        self.request = replace(request, outputs=names)
        self._compiled: dict[tuple[tuple[str, tuple[int, ...]], ...], Compiled] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._compiled.clear()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The blobs to feed."""
        return tuple(self.sources)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Blob name -> float32 array, for the asked-for blobs; the shapes of ``feeds`` reshape the net.

        Raises UsageError where an input is missing or unknown, ShapeError where a shape does not fit.
        """
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in feeds.items()}
        for name in arrays:
            if name not in self.sources:
                raise UsageError(f'"{name}" is no input of the net', hint=nearest(name, list(self.sources)))
        key = tuple(sorted((name, array.shape) for name, array in arrays.items()))
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(arrays)
        missing = [name for name in compiled.inputs if name not in arrays]
        if missing:
            raise UsageError(f'the input "{missing[0]}" is not given', hint="give every input of the net")
        results: dict[str, np.ndarray] = {}
        if compiled.ort is not None and compiled.outputs:
            names = list(compiled.outputs.values())
            made = compiled.ort.run(names, {compiled.inputs[name]: arrays[name] for name in compiled.inputs})
            results = dict(zip(compiled.outputs, made, strict=True))
        order = self.request.outputs or tuple(compiled.outputs)
        return {name: results[name] if name in results else arrays[name].copy() for name in order}

    def _compile(self, arrays: dict[str, np.ndarray]) -> Compiled:
        shapes = {
            **(self.request.input_shapes or {}),
            **{name: array.shape for name, array in arrays.items()},
        }
        self._check_axes(arrays)
        names = self.request.outputs
        if names is not None:  # a source that nobody rewrote is its own output
            names = tuple(name for name in names if self.graph.final.get(name) not in set(self.graph.sources))
        export = draw(self.model, replace(self.request, input_shapes=shapes, outputs=names, batch=None))
        if not export.outputs:
            return Compiled(None, {name: name for name in self.sources if name in arrays}, {})
        return open_export(export, self.engine)

    def _check_axes(self, arrays: dict[str, np.ndarray]) -> None:
        """A clear word where an array has another number of axes than the net declares."""
        try:
            declared = source_shapes(self.graph, replace(self.request, batch=None))
        except ShapeError:
            return
        for name, array in arrays.items():
            if array.ndim != len(declared[name]):
                raise ShapeError(
                    f'input "{name}" has shape {text(array.shape)}, the net declares {text(declared[name])}'
                )


def session(
    model: Model,
    blobs: Literal["all"] | Iterable[str] | None = None,
    *,
    threads: int = 0,
    provider: str = "cpu",
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    random_seed: int | None = None,
    cut_at_unknown: bool = False,
) -> Session:
    """Open a model for forward passes: ``blobs`` to give out, None for the net's outputs, or "all".

    ``random_seed`` runs a net without weights on random ones; ``cut_at_unknown`` runs a net up to the layers
    that are not understood.
    """
    request = Request(input_shapes=input_shapes, random_seed=random_seed, cut_at_unknown=cut_at_unknown)
    return Session(model, request, blobs, Engine(threads, provider))


def random_feeds(model: Model, request: Request, seed: int = 0) -> dict[str, np.ndarray]:
    """Uniform random input in [-1, 1) for every source blob of the net's own shapes."""
    rng = np.random.default_rng(seed)
    built = graph.build(model.net)
    shapes = source_shapes(built, request)
    return {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def error(value: np.ndarray, reference: np.ndarray) -> float:
    """max |value - reference| / max |reference|: 0 where both agree, NaN places and infinities included.

    A shape that differs, or a NaN on one side only, is an infinite error.
    """
    if value.shape != reference.shape:
        return float("inf")
    same = (value == reference) | (np.isnan(value) & np.isnan(reference))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(value.astype(np.float64) - reference.astype(np.float64))
    finite = np.abs(reference[np.isfinite(reference)].astype(np.float64))
    worst = difference[~same].max()
    scale: Any = finite.max() if finite.size else 0.0
    if not np.isfinite(worst):
        return float("inf")
    return float(worst / scale) if scale else float("inf")
