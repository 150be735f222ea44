"""caffe-lra's ONNX in onnxruntime against OpenCV's own Caffe importer, on well-known nets at batch 1.

    python benchmarks/opencv.py [--threads 1] [--runs 20] [--only alexnet,vgg_16]

Both sides read the same two files: ``models/<net>/deploy.prototxt`` and a temporary caffemodel of random
weights. Rounds are interleaved and medians count, so that a busy machine slows both sides; onnxruntime's
workers do not spin between runs, else they would slow OpenCV down. Loading is timed on VGG-16's 528 MiB.
OpenCV is no requirement of caffe-lra: ``pip install "opencv-python-headless<5"``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from caffe_proto import binding, graph, model, runtime, shape_inference
from caffe_proto.onnx_export import Request, draw
from caffe_proto.runtime import Engine
from caffe_proto.weights import NewEntry, Weights

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

MODELS = Path(__file__).resolve().parents[1] / "models"
NETS = ("alexnet", "googlenet", "resnet_18", "squeezenet_v1.1", "mobilenet_v1", "vgg_16")
LOADED = "vgg_16"
LOADS = 5
SLICE = 0.1  # seconds of runs in a row on one side, so that each finds its own data in the caches


@dataclass(frozen=True)
class Files:
    """One net's two files, and the layer and blob that its Softmax reads."""

    net: Path
    weights: Path
    layer: str
    blob: str


@dataclass(frozen=True)
class Row:
    """Milliseconds of both sides, and how far their outputs lie apart."""

    ours: float
    theirs: float
    difference: float


def write_weights(name: str, folder: Path) -> Files:
    """Random weights for a net of models/, in a caffemodel."""
    net = MODELS / name / "deploy.prototxt"
    built = graph.build(model.load(net).net)
    rng = np.random.default_rng(0)
    blobs = binding.random(shape_inference.infer(built))
    entries = [
        NewEntry(built.nodes[index].name, tuple(_spread(array, rng) for array in arrays))
        for index, arrays in blobs.items()
    ]
    path = folder / f"{name}.caffemodel"
    with path.open("wb") as file:
        Weights(entries).write_caffemodel(file)
    softmax = next(node for node in built.nodes if node.layer.type == "Softmax")
    (scores,) = softmax.inputs
    return Files(net, path, built.nodes[scores.node].name, built.blob(scores))


def _spread(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vectors get random numbers instead of 1: positive ones, for they may be variances."""
    return array if array.ndim > 1 else rng.uniform(0.5, 1.5, array.shape).astype(np.float32)


def image(files: Files) -> dict[str, np.ndarray]:
    """A random input for the net."""
    return runtime.random_feeds(model.load(files.net), Request())


def ours(files: Files, threads: int, blob: str | None = None) -> Callable[[], np.ndarray]:
    """A forward pass of caffe-lra's ONNX in onnxruntime, for the net's output or the given blob."""
    export = draw(model.load(files.net, files.weights), Request(outputs=(blob,) if blob else None))
    opened = runtime.open_export(export, Engine(threads, spin=False))
    feeds = image(files)
    return lambda: np.asarray(opened.ort.run(None, feeds)[0])


def theirs(files: Files, layer: str | None = None) -> Callable[[], np.ndarray]:
    """The same in OpenCV, which counts its threads for the whole process."""
    net = cv2.dnn.readNetFromCaffe(str(files.net), str(files.weights))
    ((name, array),) = image(files).items()

    def run() -> np.ndarray:
        net.setInput(array, name)
        return np.asarray(net.forward(layer) if layer else net.forward())

    return run


def difference(files: Files, threads: int) -> float:
    """max |ours - theirs| / max |theirs| of what the Softmax reads."""
    return runtime.error(ours(files, threads, files.blob)(), theirs(files, files.layer)())


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(files: Files, threads: int, runs: int) -> Row:
    """Median milliseconds of both sides, rounds taking turns."""
    sides = ours(files, threads), theirs(files)
    repeats = []
    for side in sides:
        side()
        repeats.append(max(1, min(20, int(SLICE / min(seconds(side) for _ in range(3))))))
    found: tuple[list[float], list[float]] = [], []
    for turn in range(runs):
        for index in (0, 1) if turn % 2 else (1, 0):
            sides[index]()
            found[index].append(median(seconds(sides[index]) for _ in range(repeats[index])))
    return Row(1e3 * median(found[0]), 1e3 * median(found[1]), difference(files, threads))


def load_times(files: Files, threads: int) -> dict[str, tuple[float, float]]:
    """Median seconds of both sides: until the net is loaded, and until its first output is there."""
    found: dict[str, list[tuple[float, float]]] = {"caffe-lra": [], "OpenCV": []}
    opening: dict[str, Callable[[], Any]] = {
        "caffe-lra": lambda: ours(files, threads),
        "OpenCV": lambda: theirs(files),
    }
    for _ in range(LOADS):
        for name, start in opening.items():
            gc.collect()
            started = time.perf_counter()
            run = start()
            loaded = time.perf_counter() - started
            run()
            found[name].append((loaded, time.perf_counter() - started))
            del run
    return {name: (median(a for a, _ in times), median(b for _, b in times)) for name, times in found.items()}


def report(files: Files, name: str, threads: int, runs: int) -> float:
    """Time one net and print its line; returns their time over ours."""
    row = compare(files, threads, runs)
    ratio = row.theirs / row.ours
    verdict = "PASS" if ratio >= 1 else "FAIL"
    print(
        f"{verdict}  {name:<16} {row.ours:>9.2f} ms {row.theirs:>9.2f} ms {ratio:>7.2f}x {row.difference:>11.1e}"
    )
    return ratio


def report_loading(files: Files, threads: int) -> None:
    """Time the loading of a large model and print it."""
    print(f"\nloading {LOADED}, {files.weights.stat().st_size / 2**20:.0f} MiB, median of {LOADS}")
    print(f"{'':<22} {'loaded':>9} {'first output':>15}")
    for name, (loaded, first) in load_times(files, threads).items():
        print(f"      {name:<16} {loaded:>7.2f} s {first:>13.2f} s")


def arguments() -> argparse.Namespace:
    """The command line; a net that models/ does not name is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads on both sides (default 1)")
    parser.add_argument("--runs", type=int, default=20, help="interleaved rounds (default 20)")
    parser.add_argument("--only", metavar="NET,...", default=",".join(NETS), help="some of the nets")
    given = parser.parse_args()
    given.only = given.only.split(",")
    unknown = [name for name in given.only if name not in NETS]
    if unknown:
        parser.error(f"no net {unknown[0]!r}; there are {', '.join(NETS)}")
    return given


def main() -> int:
    """Measure and print; the status is 1 where onnxruntime is slower on some net."""
    given = arguments()
    if cv2 is None or not hasattr(cv2.dnn, "readNetFromCaffe"):
        print(
            'OpenCV with a Caffe importer is missing: pip install "opencv-python-headless<5"', file=sys.stderr
        )
        return 2
    cv2.setNumThreads(given.threads)
    print(
        f"OpenCV {cv2.__version__}, onnxruntime {runtime.onnxruntime.__version__}, threads: {given.threads}\n"
    )
    print(f"      {'net':<16} {'caffe-lra':>12} {'OpenCV':>12} {'ratio':>8} {'difference':>11}")
    slow = False
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            files = write_weights(name, Path(folder))
            slow |= report(files, name, given.threads, given.runs) < 1
            if name == LOADED:
                report_loading(files, given.threads)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
