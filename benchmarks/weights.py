"""Reading and writing a caffemodel of VGG-16's size, beside generated protobuf code and a plain copy.

    python benchmarks/weights.py --runs 5

A temporary caffemodel with VGG-16's shapes and random numbers (528 MiB) is made first. Every measurement
runs in a process of its own, so that its peak memory is its own; what is compared takes turns, after a sync,
and medians count. Imports are not timed. Disk and page cache make single runs noisy: judge the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from caffe_proto import schema, weights
from caffe_proto.weights import NewEntry, Weights

MIB = 2**20
LEAST_SPEEDUP, MOST_MEMORY, MOST_WRITING = 200.0, 0.1, 2.0
REPLACED = ("conv1_2", "conv3_1", "conv5_3")


def vgg16_shapes() -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layer name to the shapes of weight and bias."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    inputs = 3
    for stage, (count, outputs) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)], 1):
        for index in range(1, count + 1):
            shapes[f"conv{stage}_{index}"] = ((outputs, inputs, 3, 3), (outputs,))
            inputs = outputs
    for name, dims in {"fc6": (4096, 25088), "fc7": (4096, 4096), "fc8": (1000, 4096)}.items():
        shapes[name] = (dims, dims[:1])
    return shapes


# --- one measurement a process --------------------------------------------------------------------


def make(source: Path, target: Path) -> Callable[[], object]:
    """Write the caffemodel to read; not measured, but memory of the parent would count as its children's."""
    random = np.random.default_rng(0)

    def write() -> None:
        entries = [
            NewEntry(name, tuple(random.standard_normal(shape, np.float32) for shape in shapes))
            for name, shapes in vgg16_shapes().items()
        ]
        with source.open("wb") as file:
            Weights(entries).write_caffemodel(file)

    return write


def nothing(source: Path, target: Path) -> Callable[[], object]:
    """The interpreter with its imports."""
    schema.message_class("NetParameter")
    return lambda: None


def views(source: Path, target: Path) -> Callable[[], object]:
    """A view of every blob."""
    return lambda: [array for blobs in weights.load(source).values() for array in blobs]


def protobuf(source: Path, target: Path) -> Callable[[], object]:
    """Protobuf, and an array of every blob."""
    net_class: Any = schema.message_class("NetParameter")

    def read() -> list[np.ndarray]:
        net = net_class()
        net.ParseFromString(source.read_bytes())
        return [np.array(blob.data, np.float32) for layer in net.layer for blob in layer.blobs]

    return read


def touched(source: Path, target: Path) -> Callable[[], object]:
    """The same, every number read once."""
    return lambda: sum(float(array.sum()) for blobs in weights.load(source).values() for array in blobs)


def save(source: Path, target: Path) -> Callable[[], object]:
    """The same weights with three layers replaced by low-rank pairs."""
    shapes = vgg16_shapes()
    random = np.random.default_rng(1)
    changes = {name: _pair(name, shapes[name][0], random) for name in REPLACED}

    def write() -> None:
        with target.open("wb") as file:
            weights.load(source).replace(changes).write_caffemodel(file)

    return write


def _pair(name: str, shape: tuple[int, ...], random: np.random.Generator) -> list[NewEntry]:
    rank = shape[0] // 2
    first = random.standard_normal((rank, *shape[1:]), np.float32)
    second = random.standard_normal((shape[0], rank, 1, 1), np.float32)
    return [NewEntry(f"{name}_lowrank", (first,)), NewEntry(name, (second, np.zeros(shape[0], np.float32)))]


def copy(source: Path, target: Path) -> Callable[[], object]:
    """A plain copy of the file that ``save`` writes."""
    return lambda: shutil.copyfile(source, target)


TASKS = {task.__name__: task for task in (make, nothing, views, touched, protobuf, save, copy)}


def run_task(name: str, source: Path, target: Path) -> None:
    """Time one task in this process; print seconds and peak memory as JSON."""
    task = TASKS[name](source, target)
    os.sync()  # else it pays for what the one before it wrote
    start = time.perf_counter()
    kept = task()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    del kept
    print(json.dumps([seconds, peak]))


# --- the comparison -------------------------------------------------------------------------------


def measure(name: str, source: Path, target: Path) -> tuple[float, float]:
    """Seconds and peak bytes of one task in a fresh process."""
    target.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--task", name, str(source), str(target)]
    seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, peak


def alternate(
    names: Sequence[str], sources: Sequence[Path], target: Path, runs: int
) -> dict[str, tuple[float, float]]:
    """Median seconds and peak bytes of tasks that take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    turns = list(zip(names, sources, strict=True))
    for _ in range(runs):
        for name, source in turns:
            found[name].append(measure(name, source, target))
        turns.reverse()
    return {name: (median(s for s, _ in pairs), median(p for _, p in pairs)) for name, pairs in found.items()}


def verdict(label: str, value: str, passed: bool, target: str) -> None:
    print(f"{'PASS' if passed else 'FAIL'}  {label:<52} {value:>10}  (target {target})")


def compare(folder: Path, runs: int) -> None:
    """Make the files, measure, print."""
    source, saved, target = (
        folder / name for name in ("vgg16.caffemodel", "saved.caffemodel", "out.caffemodel")
    )
    measure("make", source, target)
    measure("save", source, saved)
    print(
        f"{source.stat().st_size / MIB:.0f} MiB, VGG-16's shapes; "
        f"medians of {runs} runs, each in its own process\n"
    )

    read = alternate(("nothing", "views", "touched", "protobuf"), [source] * 4, target, runs)
    base = read["nothing"][1]
    print(f"{'reading':<40} {'time':>12} {'peak memory':>14} {'above baseline':>16}")
    for name, (seconds, peak) in read.items():
        label = (TASKS[name].__doc__ or name).rstrip(".")
        print(
            f"{label:<40} {seconds * 1000:>9.2f} ms {peak / MIB:>10.0f} MiB {(peak - base) / MIB:>12.1f} MiB"
        )
    (ours, our_peak), (theirs, their_peak) = read["views"], read["protobuf"]
    speedup, increase = theirs / ours, max(our_peak - base, 0) / (their_peak - base)
    print()
    verdict(
        "a view of every blob, times faster than protobuf",
        f"{speedup:.0f}x",
        speedup >= LEAST_SPEEDUP,
        "at least 200x",
    )
    verdict(
        "memory above the baseline, share of protobuf's",
        f"{increase:.4f}",
        increase <= MOST_MEMORY,
        "at most 0.1",
    )
    print(f"      {'peak memory with the interpreter, share of protobuf':<52} {our_peak / their_peak:>10.3f}")

    write = alternate(("save", "copy"), (source, saved), target, runs)
    print(f"\n{f'writing {saved.stat().st_size / MIB:.0f} MiB':<40} {'time':>12} {'peak memory':>14}")
    for name, label in (
        ("save", "three layers replaced, the rest copied"),
        ("copy", "shutil.copyfile of that file"),
    ):
        print(f"{label:<40} {write[name][0] * 1000:>9.0f} ms {write[name][1] / MIB:>10.0f} MiB")
    ratio = write["save"][0] / write["copy"][0]
    print()
    verdict("saving, times the time of a copy", f"{ratio:.2f}x", ratio <= MOST_WRITING, "at most 2x")


def main() -> None:
    """Compare in a temporary folder, or run the one task that a child process was started for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5, help="measurements of each kind (default 5)")
    parser.add_argument("--task", nargs=3, metavar=("NAME", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        name, source, target = options.task
        run_task(name, Path(source), Path(target))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.runs)


if __name__ == "__main__":
    main()
