"""Small nets with random weights, in memory or as files: what the tests of the decomposer and the commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caffe_proto import net, schema
from caffe_proto.graph import build
from caffe_proto.model import Model, write_weights
from caffe_proto.runtime import session
from caffe_proto.shape_inference import infer
from caffe_proto.weights import V1, V2, Blobs, NewEntry, Weights

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}")

SMALL = """\
name: "small"
layer {
  name: "data"
  type: "Input"
  top: "data"
  input_param { shape { dim: 2 dim: 3 dim: 12 dim: 12 } }
}
layer {
  name: "conv1"
  type: "Convolution"
  bottom: "data"
  top: "conv1"
  param { lr_mult: 1 }
  param { lr_mult: 2 }
  convolution_param {
    num_output: 16
    kernel_size: 5
    pad: 2
    weight_filler { type: "xavier" }
  }
}
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer {
  name: "conv2"
  type: "Convolution"
  bottom: "conv1"
  top: "conv2"
  convolution_param {
    num_output: 24
    kernel_size: 3
    group: 2
    stride: 2
  }
}
layer { name: "relu2" type: "ReLU" bottom: "conv2" top: "conv2" }
layer {
  name: "conv3"
  type: "Convolution"
  bottom: "conv2"
  top: "conv3"
  convolution_param { num_output: 20 kernel_size: 3 pad: 1 bias_term: false }
}
layer {
  name: "ip1"
  type: "InnerProduct"
  bottom: "conv3"
  top: "ip1"
  inner_product_param { num_output: 30 }
}
layer { name: "prob" type: "Softmax" bottom: "ip1" top: "prob" }
"""
"""Three convolutions (5x5; 3x3 in two groups at stride 2; 3x3 without bias), a fully connected layer, and in-place ReLUs."""


def inputs(**shapes: tuple[int, ...]) -> str:
    """Input layers of those shapes, a line each."""
    return "".join(
        f'layer {{ name: "{name}" type: "Input" top: "{name}" '
        f"input_param {{ shape {{ {' '.join(f'dim: {dim}' for dim in shape)} }} }} }}\n"
        for name, shape in shapes.items()
    )


def random_weights(
    parsed: net.Net, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Weights:
    """Normal blobs, scaled by fan-in, for every layer that learns any; the same numbers for one param name."""
    shaped = infer(build(parsed), shapes)
    rng = np.random.default_rng(seed)
    dialect = V1 if parsed.dialect == "V1" else V2
    shared: dict[str, np.ndarray] = {}
    entries: list[NewEntry] = []
    for index, node in enumerate(shaped.graph.nodes):
        blobs = []
        for i, shape in enumerate(shaped.blobs(index)):
            specs = node.layer.param_specs
            key = (specs[i].name if i < len(specs) else "") or f"{index}/{i}"
            if key not in shared:
                scale = np.float32(np.prod(shape[1:], dtype=float) ** -0.5)
                shared[key] = rng.standard_normal(shape, np.float32) * scale
            blobs.append(shared[key].reshape(shape))
        if blobs:
            entries.append(NewEntry(node.name, tuple(blobs), dialect=dialect))
    return Weights(entries, dialect=dialect)


def model(source: str, seed: int = 0) -> Model:
    """A net with random weights, in memory."""
    parsed = net.parse(source)
    return Model(parsed, random_weights(parsed, seed))


def files(
    folder: Path, source: str = SMALL, seed: int = 0, stem: str = "net", suffix: str = ".caffemodel"
) -> tuple[str, str]:
    """The same as files: paths of ``<stem>.prototxt`` and of its weights."""
    made = model(source, seed)
    net_path, weights_path = folder / f"{stem}.prototxt", folder / f"{stem}{suffix}"
    net_path.write_bytes(source.encode())
    assert made.weights is not None
    write_weights(made.weights, weights_path, hdf5=suffix == ".h5")
    return str(net_path), str(weights_path)


def forward(one: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a net."""
    with session(one, threads=1) as opened:
        return opened.run(feeds)


def random_feeds(one: Model, seed: int = 1) -> dict[str, np.ndarray]:
    """Normal input for every source blob."""
    shaped = infer(build(one.net))
    rng = np.random.default_rng(seed)
    graph = shaped.graph
    return {
        graph.blob(value): rng.standard_normal(shaped.shapes[value], np.float32) for value in graph.sources
    }


def apart(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> float:
    """The largest difference over the blobs of both, relative to the blob's largest magnitude."""
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max() / np.abs(left[name]).max()) for name in left)


def stored(one: Model) -> Mapping[str, Blobs]:
    """The weights of a model that has some."""
    assert one.weights is not None
    return one.weights


def embedded(path: str | Path) -> dict[str, Any]:
    """The layer messages of a caffemodel by name, read by protobuf."""
    made: Any = schema.message_class("NetParameter")()
    made.ParseFromString(Path(path).read_bytes())
    return {layer.name: layer for layer in (*made.layer, *made.layers)}
