"""Write LeNet as a Caffe of 2014 would have: ``python tools/legacy_lenet.py FOLDER``. The tutorial starts from it.

FOLDER gets a prototxt with ``layers``, a caffemodel of the same age with this project's weights, and drawn digits to
fit to and to test on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import caffe_proto  # noqa: E402
from caffe_proto import schema  # noqa: E402
from lra.digits import drawn  # noqa: E402

NET = """\
name: "LeNet"
input: "data"
input_dim: 1
input_dim: 1
input_dim: 28
input_dim: 28
layers {
  name: "conv1"
  type: CONVOLUTION
  bottom: "data"
  top: "conv1"
  blobs_lr: 1
  blobs_lr: 2
  convolution_param { num_output: 20 kernel_size: 5 stride: 1 }
}
layers {
  name: "pool1"
  type: POOLING
  bottom: "conv1"
  top: "pool1"
  pooling_param { pool: MAX kernel_size: 2 stride: 2 }
}
layers {
  name: "conv2"
  type: CONVOLUTION
  bottom: "pool1"
  top: "conv2"
  blobs_lr: 1
  blobs_lr: 2
  convolution_param { num_output: 50 kernel_size: 5 stride: 1 }
}
layers {
  name: "pool2"
  type: POOLING
  bottom: "conv2"
  top: "pool2"
  pooling_param { pool: MAX kernel_size: 2 stride: 2 }
}
layers {
  name: "ip1"
  type: INNER_PRODUCT
  bottom: "pool2"
  top: "ip1"
  blobs_lr: 1
  blobs_lr: 2
  inner_product_param { num_output: 500 }
}
layers { name: "relu1" type: RELU bottom: "ip1" top: "ip1" }
layers {
  name: "ip2"
  type: INNER_PRODUCT
  bottom: "ip1"
  top: "ip2"
  blobs_lr: 1
  blobs_lr: 2
  inner_product_param { num_output: 10 }
}
layers { name: "prob" type: SOFTMAX bottom: "ip2" top: "prob" }
"""


def weights() -> bytes:
    """The caffemodel: the net with its blobs, each under the four sizes that blobs had then."""
    lenet = ROOT / "models" / "lenet"
    stored = caffe_proto.load(lenet / "lenet.prototxt", lenet / "lenet.caffemodel").weights
    assert stored is not None
    written: Any = text_format.Parse(NET, schema.message_class("NetParameter")())
    for layer in written.layers:
        for array in stored.get(layer.name, ()):
            sizes = (*(1,) * (4 - array.ndim), *array.shape)
            blob = layer.blobs.add(data=array.ravel().tolist())
            blob.num, blob.channels, blob.height, blob.width = sizes
    made: bytes = written.SerializeToString()
    return made


def write(folder: Path) -> None:
    """All four files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lenet.prototxt").write_text(NET, encoding="utf-8", newline="\n")
    (folder / "lenet.caffemodel").write_bytes(weights())
    for name, n, seed in (("fit", 500, 0), ("test", 1000, 1)):
        images, labels = drawn(n, seed)
        np.savez_compressed(folder / f"{name}.npz", x=images, y=labels)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "legacy"))
