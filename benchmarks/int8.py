"""What 8 bits cost and give, on top of a decomposition and alone: accuracy, agreement and time of real nets.

    python benchmarks/int8.py [NET ...] [--speedup 2] [--ranges 100] [--threads 1 2] [--runs 40] [--shared ../shared]

The plan is ``auto`` fitted to the training images (of convolutions' MACs), the ranges are those of so many of the same
images. Top-1 is that on test images; agreement how often the original in float32 names the same class on 5,000 training
images that were neither. The four nets then run in turn, one image each, one session at a time; the ratios to the
original's time are medians, with quartiles.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lra
from benchmarks.real_nets import BATCH, NETS, Bench, bench, report
from caffe_proto.evaluation import Accuracy, Share
from caffe_proto.latency import Subject, measure
from caffe_proto.model import Model
from caffe_proto.onnx_export import Request, export_onnx
from caffe_proto.quantize import batches_for, narrowed
from caffe_proto.runtime import Engine, open_onnx

ROOT = Path(__file__).resolve().parents[1]


def exported(model: Model, batch: int, ranges: np.ndarray | None) -> onnx.ModelProto:
    """The net as ONNX, in 8 bits where there are images for its ranges."""
    made = export_onnx(model, Request(batch=batch))
    return made if ranges is None else narrowed(made, "int8", batches_for(made, ranges))


def scores(made: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Class scores of all images."""
    session = open_onnx(made.SerializeToString(), Engine(1))
    name, last = made.graph.input[0].name, made.graph.output[-1].name
    found = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        filled = np.pad(part, [(0, BATCH - len(part)), (0, 0), (0, 0), (0, 0)])
        found.append(np.asarray(session.run([last], {name: filled})[0])[: len(part)])
    joined = np.concatenate(found)
    return joined.reshape(len(joined), -1).astype(np.float64)


def accuracies(here: Bench, nets: dict[str, tuple[Model, np.ndarray | None]]) -> None:
    """Print top-1 and agreement of every net."""
    classes: np.ndarray | None = None
    for name, (model, ranges) in nets.items():
        made = exported(model, BATCH, ranges)
        accuracy, agreement = Accuracy(), Share()
        tested = scores(made, here.test)
        accuracy.count(tested, here.labels)
        same = here.others is here.test
        named = (tested if same else scores(made, here.others)).argmax(axis=1)
        classes = named if classes is None else classes
        agreement.count(named == classes)
        top1 = accuracy.top1
        print(
            f"{name:16} top-1 {top1.value:.4f} ± {top1.error:.4f}  "
            f"agreement {agreement.value:.4f} ± {agreement.error:.4f}",
            flush=True,
        )


def times(nets: dict[str, tuple[Model, np.ndarray | None]], threads: int, runs: int) -> None:
    """Print how many times faster than the first every net is."""
    subjects = [
        Subject(name, exported(model, 1, ranges).SerializeToString())
        for name, (model, ranges) in nets.items()
    ]
    first, *others = measure(subjects, Engine(threads, spin=False), runs=runs, warmup=5)
    print(f"{threads} threads: {first.name} {first.median:.3f} ms")
    for one in others:
        low, middle, high = np.percentile(np.divide(first.runs, one.runs), (25, 50, 75))
        print(f"{one.name:16} {middle:.2f}x  ({low:.2f} to {high:.2f})", flush=True)


def main() -> int:
    """Run the nets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=["resnet_20", "cifar10_full"], metavar="NET")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--ranges", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    o = parser.parse_args()
    for name in o.nets:
        if name not in NETS:
            parser.error(f"{name}: known are {', '.join(NETS)}")
        here = bench(name, o.shared)
        plan = lra.make_plan(
            here.model,
            scheme="auto",
            speedup=o.speedup,
            scope="conv",
            found=here.found,
            images=here.calibration,
        )
        changed, made = lra.apply(plan, here.model, found=here.found, images=here.calibration)
        ranges = next(iter(here.calibration.images.values()))[: o.ranges]
        factor = made.conv_macs[0] / made.conv_macs[1]
        nets: dict[str, tuple[Model, np.ndarray | None]] = {
            "original": (here.model, None),
            "original, int8": (here.model, ranges),
            f"{factor:.2f}x": (changed, None),
            f"{factor:.2f}x, int8": (changed, ranges),
        }
        print(f"{name}, ranges of {len(ranges)} images", flush=True)
        accuracies(here, nets)
        for threads in o.threads:
            times(nets, threads, o.runs)
    return 0


if __name__ == "__main__":
    sys.exit(report(main))
