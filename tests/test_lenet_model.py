"""models/lenet: the shipped weights are those of the README and recognise drawn digits and MNIST."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from caffe_proto import weights
from lra.digits import drawn

ROOT = Path(__file__).resolve().parents[1]
LENET = ROOT / "models" / "lenet"
MNIST = ROOT.parent / "shared" / "data" / "mnist"
SHAPES = {
    "conv1": ((20, 1, 5, 5), (20,)),
    "conv2": ((50, 20, 5, 5), (50,)),
    "ip1": ((500, 800), (500,)),
    "ip2": ((10, 500), (10,)),
}


@pytest.fixture(scope="module")
def blobs() -> Mapping[str, weights.Blobs]:
    return weights.load(LENET / "lenet.caffemodel")


def _conv(data: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Valid convolution of (n, c, h, w) by (o, c, k, k): (n, o, h - k + 1, w - k + 1)."""
    windows = np.lib.stride_tricks.sliding_window_view(data, weight.shape[2:], (2, 3))
    return np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2) + bias[:, None, None]


def _pool(data: np.ndarray) -> np.ndarray:
    """Maximum over 2x2 cells of (n, c, h, w): (n, c, h / 2, w / 2)."""
    n, c, h, w = data.shape
    return data.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def _scores(blobs: Mapping[str, weights.Blobs], data: np.ndarray) -> np.ndarray:
    """LeNet in numpy: images (n, 1, 28, 28) to ip2 (n, 10)."""
    for name in ("conv1", "conv2"):
        data = _pool(_conv(data, *blobs[name]))
    (weight1, bias1), (weight2, bias2) = blobs["ip1"], blobs["ip2"]
    hidden = np.maximum(data.reshape(len(data), -1) @ weight1.T + bias1, 0)
    return hidden @ weight2.T + bias2


def _accuracy(blobs: Mapping[str, weights.Blobs], images: np.ndarray, labels: np.ndarray) -> float:
    return float((_scores(blobs, images).argmax(1) == labels).mean())


def _idx(path: Path, head: int, count: int, size: int) -> np.ndarray:
    """The first count items of a gzipped idx file, as (count, size) bytes."""
    with gzip.open(path) as file:
        file.read(head)
        return np.frombuffer(file.read(count * size), np.uint8).reshape(count, size)


def test_weights_have_the_shapes_of_the_net(blobs: Mapping[str, weights.Blobs]) -> None:
    assert {name: tuple(blob.shape for blob in found) for name, found in blobs.items()} == SHAPES


def test_weights_are_those_the_readme_names() -> None:
    named = re.findall(r"\b[0-9a-f]{64}\b", (LENET / "README.md").read_text())
    assert named == [hashlib.sha256((LENET / "lenet.caffemodel").read_bytes()).hexdigest()]


def test_recognises_drawn_digits(blobs: Mapping[str, weights.Blobs]) -> None:
    assert _accuracy(blobs, *drawn(500)) >= 0.9


@pytest.mark.skipif(not MNIST.is_dir(), reason="no MNIST files in ../shared/data/mnist")
def test_recognises_mnist(blobs: Mapping[str, weights.Blobs]) -> None:
    images = _idx(MNIST / "t10k-images-idx3-ubyte.gz", 16, 1000, 784).reshape(-1, 1, 28, 28) / np.float32(256)
    labels = _idx(MNIST / "t10k-labels-idx1-ubyte.gz", 8, 1000, 1)[:, 0]
    assert _accuracy(blobs, images, labels) == pytest.approx(0.997, abs=0.003)


def test_drawn_is_the_same_for_a_seed() -> None:
    images, labels = drawn(50, seed=3)
    again, labels_again = drawn(50, seed=3)
    assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
    assert not np.array_equal(images, drawn(50, seed=4)[0])


def test_drawn_gives_gray_levels_as_the_net_wants_them() -> None:
    images, labels = drawn(200)
    assert (images.shape, images.dtype, labels.shape) == ((200, 1, 28, 28), np.float32, (200,))
    assert np.array_equal(images * 256, np.round(images * 256)) and images.min() == 0 and images.max() < 1
    assert set(labels.tolist()) == set(range(10))
    assert (images.max(axis=(1, 2, 3)) > 0.9).all()


def test_drawn_copes_with_few_and_none() -> None:
    assert drawn(0)[0].shape == (0, 1, 28, 28)
    assert drawn(1)[0].shape == (1, 1, 28, 28)
