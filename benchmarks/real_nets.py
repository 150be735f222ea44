"""Real nets with their images for benchmarks, and what a decomposed net keeps of them; no fine-tuning anywhere.

The nets and images lie in a folder ``data``: ``models/``, ``cifar10/``, ``mnist/``, ``imagenet500/``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

import caffe_proto as cp
from caffe_proto.data import Source, open_source
from caffe_proto.data.transform import Settings, Transform, for_net
from caffe_proto.errors import Error, UsageError
from caffe_proto.evaluation import Accuracy, Share, Subject, input_shape
from caffe_proto.model import Model
from lra.calibration import Calibration
from lra.fitting import unfit
from lra.targets import Found, find

THREADS = 1
BATCH = 50
SEED = 0
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """Where images lie and how they are read; ``test`` None: those of ``train`` that are not calibrated on."""

    train: str
    test: str | None
    mean: str | None = None
    scale: float | None = None
    side: int | None = None


@dataclass(frozen=True)
class RealNet:
    """A net, and how many training images at most to calibrate on and how many others to compare classes on."""

    net: str
    weights: str
    pictures: Pictures
    calibration: int = 2000
    others: int = 5000


_CIFAR = Pictures("cifar10/data_batch_*.bin", "cifar10/test_batch_first1000.bin", "cifar10/mean.binaryproto")
_MNIST = Pictures("mnist/train-images-idx3-ubyte.gz", "mnist/t10k-images-idx3-ubyte.gz", scale=0.00390625)
_IMAGENET = Pictures("imagenet500/list.txt", None, "104,117,123", side=256)

NETS = {
    "resnet_20": RealNet(
        "resnet20_cifar10/res20_deploy_DERIVED.prototxt", "resnet20_cifar10/ResNet_20.caffemodel", _CIFAR
    ),
    "cifar10_full": RealNet(
        "cifar_v2_yuvval/cifar10_full.prototxt", "cifar_v2_yuvval/cifar10_full_iter_70000.caffemodel", _CIFAR
    ),
    "cifar10_quick": RealNet(
        "caffe_v1_everpeace/cifar10/cifar10_quick.prototxt",
        "caffe_v1_everpeace/cifar10/cifar10_quick_iter_5000.caffemodel",
        _CIFAR,
    ),
    "lenet": RealNet("lenet_v2_ethereon/lenet.prototxt", "lenet_v2_ethereon/lenet_iter_10000.caffemodel", _MNIST),
    "squeezenet": RealNet(
        "squeezenet_v1.0_deepcompression_songhan/SqueezeNet_deploy.prototxt",
        "squeezenet_v1.0_deepcompression_songhan/decompressed_SqueezeNet.caffemodel",
        _IMAGENET,
        calibration=250,
        others=250,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Top-1 on labelled test images, and how often the original names the same class on other images."""

    top1: Share
    agreement: Share


@dataclass(eq=False)
class Bench:
    """One net with its images; the original's classes and samples are computed once."""

    model: Model
    found: Found
    calibration: Calibration
    others: Array
    test: Array
    labels: NDArray[np.int64]
    original: Share = field(init=False)
    _classes: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._classes, self.original = self._run(self.model)

    def measure(self, model: Model) -> Kept:
        """What a changed net keeps."""
        classes, top1 = self._run(model)
        agreement = Share()
        agreement.count(classes == self._classes)
        return Kept(top1, agreement)

    def sample(self) -> float:
        """Sample the original net's responses now, so that no later measurement pays for it; seconds."""
        started = perf_counter()
        found = self.found
        targets = [target for target in found.targets.values() if unfit(found, target) is None]
        cal = self.calibration
        cal.walker(found).sample(targets, cal.stage, cal.key(found), lambda _images: None)
        return perf_counter() - started

    def _run(self, model: Model) -> tuple[NDArray[np.int64], Share]:
        """Classes of the other images, and top-1 of the test images; those may be the same."""
        subject = Subject(model, threads=THREADS)
        tested = _scores(subject, self.test)
        accuracy = Accuracy()
        accuracy.count(tested, self.labels)
        other = tested if self.others is self.test else _scores(subject, self.others)
        return other.argmax(axis=1), accuracy.top1


def _scores(subject: Subject, images: Array) -> NDArray[np.float64]:
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return np.concatenate([subject.scores(batch, BATCH) for batch in batches])


def split(count: int, reserved: int, calibration: int, others: int) -> tuple[list[int], list[int]]:
    """Which of so many images to calibrate on, at most ``reserved``, and which others to compare on.

    The others are the same however many are calibrated on. Raises UsageError where there are not so many.
    """
    if not 1 <= calibration <= reserved:
        raise UsageError(f"{calibration} images to calibrate on, 1 to {reserved} are there")
    if not 1 <= others <= count - reserved:
        raise UsageError(f"{others} images to compare on, 1 to {count - reserved} are there")
    drawn = np.random.default_rng(SEED).permutation(count).tolist()
    return drawn[:calibration], drawn[reserved : reserved + others]


def numbers(text: str) -> list[float]:
    """A list of numbers from a command line."""
    return [float(one) for one in text.split(",")]


def report(main: Callable[[], int]) -> int:
    """Run a program; an error of ours is one line, and status 2."""
    try:
        return main()
    except Error as error:
        print(error, file=sys.stderr)
        return 2


def bench(name: str, shared: Path, calibration: int | None = None, others: int | None = None) -> Bench:
    """Load a net of `NETS` with its images. Raises FileError where the folder lacks them."""
    about, data = NETS[name], shared / "data"
    model = cp.load(data / "models" / about.net, data / "models" / about.weights)
    found = find(model)
    pictures = about.pictures
    mean = pictures.mean
    if mean is not None and mean.endswith(".binaryproto"):
        mean = str(data / mean)
    size = None if pictures.side is None else (pictures.side, pictures.side)
    settings = Settings(mean=mean, scale=pictures.scale, resize=size)
    transform = for_net(model.net, settings, input_shape(model))
    with ExitStack() as stack:
        train = stack.enter_context(_open(data / pictures.train, transform))
        chosen, rest = split(
            len(train),
            about.calibration,
            about.calibration if calibration is None else calibration,
            about.others if others is None else others,
        )
        images, _ = _read(train, transform, chosen)
        compared, labels = _read(train, transform, rest)
        tested = compared
        if pictures.test is not None:
            test = stack.enter_context(_open(data / pictures.test, transform))
            tested, labels = _read(test, transform, range(len(test)))
    given = Calibration.of(found.shaped.graph, images, threads=THREADS, seed=SEED)
    return Bench(model, found, given, compared, tested, labels)


def _open(path: Path, transform: Transform) -> Source:
    root = str(path.parent) if path.suffix == ".txt" else None
    return open_source(path, root=root, resize=transform.resize, color=transform.color)


def _read(source: Source, transform: Transform, which: Iterable[int]) -> tuple[Array, NDArray[np.int64]]:
    """Inputs and labels of images of a source."""
    samples = [source[index] for index in which]
    images = np.stack([transform(sample.image, source.order) for sample in samples])
    return images.astype(np.float32, copy=False), np.array([sample.label for sample in samples], np.int64)
