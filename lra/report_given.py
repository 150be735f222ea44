"""What a report is given besides two nets and a plan: measured times, accuracies, outputs, the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import abspath
from typing import TYPE_CHECKING, Any

import numpy as np

from caffe_proto.errors import FileError, ShapeError, UsageError
from caffe_proto.files import read_text
from caffe_proto.model import Model
from caffe_proto.shape_inference import InputShapes

if TYPE_CHECKING:
    from caffe_proto.latency import Gain, Timing


_TIME_HINT = "time these nets: caffe-lra time NET,WEIGHTS PREFIX.prototxt,PREFIX.caffemodel --profile --json"
_EVAL_HINT = (
    "evaluate these nets: caffe-lra eval PREFIX.prototxt PREFIX.caffemodel --reference NET,WEIGHTS --json"
)


@dataclass(frozen=True)
class Times:
    """Measured milliseconds of both nets, by layer of the first, of all the rest; on what, and the file that says so.

    ``why``: by layer what the time goes into where less of it is gained than of multiplications.
    """

    whole: tuple[float, float]
    layers: Mapping[str, tuple[float, float]]
    rest: tuple[float, float] | None
    where: str
    path: str | None = None
    why: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Accuracy:
    """A share measured on images, before (None where no reference was measured) and after, each with its standard error."""

    name: str
    before: tuple[float, float] | None
    after: tuple[float, float]
    images: int


@dataclass(frozen=True)
class Given:
    """What the user adds to the nets: times, accuracies and on which images, differences of outputs on an input.

    ``fitted``: by layer the relative error of held-out responses, as a fit measured it.
    """

    times: Times | None = None
    accuracies: tuple[Accuracy, ...] = ()
    images: str = ""
    apart: Mapping[str, float] = field(default_factory=dict)
    fitted: Mapping[str, float] = field(default_factory=dict)
    compared: str = ""
    command: str = ""
    input_shapes: InputShapes | None = None
    force: bool = False  # the plan may be of other files


def timed(timings: Sequence[Timing], gains: Sequence[Gain], threads: int) -> Times:
    """The times of two nets that were timed, and of their layers."""
    from caffe_proto.latency import onnxruntime

    before, after = timings
    layers = {one.name: one.ms for one in gains}
    rest = layers.pop("", None)
    why = {one.name: tuple(_cause(cause.kind, cause.text) for cause in one.why) for one in gains if one.why}
    where = _where([f"onnxruntime {onnxruntime.__version__}", "cpu"], threads, len(before.runs))
    return Times((before.median, after.median), layers, rest, where, why=why)


def _cause(kind: str, said: str) -> str:
    return f"{kind}: {said}" if said else kind


def judged(
    before: Model, after: Model, images: np.ndarray, labels: np.ndarray | None, threads: int
) -> tuple[Accuracy, ...]:
    """Accuracies of both nets on images (n, c, h, w), and how often they agree.

    Empty for nets that have no scores of classes; without accuracies where labels (n,) are beyond the classes.
    """
    from hrank.compare import Judge

    try:
        judge = Judge(before, images, labels, threads)
        if labels is not None and not (labels.min() >= 0 and labels.max() < judge.reference.shape[1]):
            judge.labels = None
        found = judge(after)
    except (UsageError, ShapeError):  # no single output of scores: nothing that could be right or wrong
        return ()
    shares = [("top-1", found.reference.top1, found.accuracy.top1)]
    if found.classes > 5:
        shares.append(("top-5", found.reference.top5, found.accuracy.top5))
    made = [
        Accuracy(name, (old.value, old.error), (new.value, new.error), new.n)
        for name, old, new in shares
        if new.n
    ]
    same = found.agreement
    return (*made, Accuracy("agreement with the original", None, (same.value, same.error), same.n))


def read_times(path: str, pair: tuple[Model, Model] | None = None) -> Times:
    """What ``time A B --json`` printed of two nets, by layer with ``--profile``.

    ``pair``: the nets that they must be; not checked without. Raises FileError where it is none, or of other nets.
    """
    value = _document(path)
    models = value.get("models")
    if not isinstance(models, list) or len(models) != 2 or not all(isinstance(one, dict) for one in models):
        raise FileError(
            "holds no times of two nets",
            path=path,
            hint="write it with: caffe-lra time NET NEW --profile --json",
        )
    for model, one in zip(pair or (), models, strict=False):
        _check_files(one, model, path, _TIME_HINT)
    whole = _numbers([one.get("median_ms") for one in models], path)
    gains = models[1].get("gains", [])
    if not isinstance(gains, list) or not all(isinstance(one, dict) for one in gains):
        raise FileError('"gains" is no list of layers', path=path)
    layers = {str(one.get("name", "")): _numbers(one.get("ms"), path) for one in gains}
    rest = layers.pop("", None)
    why = {str(one.get("name", "")): _causes(one["why"], path) for one in gains if "why" in one}
    on = [
        *(f"{name} {value[name]}" for name in ("onnxruntime", "torch") if name in value),
        *(str(value[name]) for name in ("provider", "device") if name in value),
    ]
    return Times(whole, layers, rest, _where(on, value.get("threads"), value.get("runs")), path, why)


def _causes(value: Any, path: str) -> tuple[str, ...]:
    """What a file says of one layer's time; raises FileError where it is no list of causes."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise FileError('"why" is no list of causes', path=path)
    return tuple(_cause(str(one.get("kind", "")), str(one.get("text", ""))) for one in value)


def _where(on: Sequence[str], threads: Any, runs: Any) -> str:
    """What ran the nets, on how many cores, how often."""
    cores = "all cores" if threads == 0 else "1 thread" if threads == 1 else f"{threads} threads"
    return ", ".join([*on, cores, *([f"{runs} interleaved runs"] if runs is not None else [])])


def read_accuracy(path: str, pair: tuple[Model, Model] | None = None) -> tuple[Accuracy, ...]:
    """What ``eval --json`` printed of the new net, with ``--reference`` of the original too.

    ``pair``: the original and the new net that they must be; not checked without. Raises FileError where it is
    none, or of other nets.
    """
    value = _document(path)
    images, reference = value.get("images"), value.get("reference", {})
    if (
        not isinstance(images, int)
        or not isinstance(reference, dict)
        or not {"top1", "agreement"} & set(value)
    ):
        raise FileError(
            "holds no accuracy",
            path=path,
            hint="write it with: caffe-lra eval NEW WEIGHTS --images SRC --json",
        )
    if pair is not None:
        _check_files(value, pair[1], path, _EVAL_HINT)
        if "reference" in value or "agreement" in value:
            _check_files(reference, pair[0], path, _EVAL_HINT)
    named = (("top-1", "top1"), ("top-5", "top5"), ("agreement with the original", "agreement"))
    return tuple(
        Accuracy(
            name,
            _share(reference[key], path) if key in reference else None,
            _share(value[key], path),
            images,
        )
        for name, key in named
        if key in value
    )


def _check_files(said: Mapping[str, Any], model: Model, path: str, hint: str) -> None:
    """Raise FileError where a measurement is not of a model: by the files' sha256, in older files by their names."""
    hint += ", or use it all the same with --force"
    sums, name = said.get("sha256"), said.get("model")
    if not isinstance(sums, dict):
        if not isinstance(name, str):
            raise FileError(f"does not say whether it was measured on {model.net.path}", path=path, hint=hint)
        nets = [name, *(name[:i] for i, letter in enumerate(name) if letter == ",")]  # of NET,WEIGHTS
        if abspath(str(model.net.path)) not in map(abspath, nets):
            raise FileError(f"was measured on {name}, not on {model.net.path}", path=path, hint=hint)
        return
    files = (model.net.path, model.weights.path if model.weights is not None else None)
    for what, file, digest in zip(("net", "weights"), files, model.fingerprint, strict=True):
        measured = sums.get(what)
        if measured and digest and measured != digest:
            raise FileError(f"was measured on another {what} file than {file}", path=path, hint=hint)


def _share(value: Any, path: str) -> tuple[float, float]:
    found = value if isinstance(value, dict) else {}
    return _numbers([found.get("value"), found.get("standard_error")], path)


def _numbers(value: Any, path: str) -> tuple[float, float]:
    """Two numbers from 0 up; raises FileError where they are none."""
    fine = isinstance(value, list) and len(value) == 2 and all(type(one) in (int, float) for one in value)
    if not fine or not all(0 <= one < float("inf") for one in value):
        raise FileError(f"{value!r} are no two numbers", path=path)
    return float(value[0]), float(value[1])


def _document(path: str) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FileError(f"is no JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise FileError("is no JSON object", path=path)
    return value
