"""A net of VGG-16's shapes with random weights, for benchmarks: 528 MiB of caffemodel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from caffe_proto.weights import NewEntry, Weights

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_DENSE = (("fc6", 4096, 25088), ("fc7", 4096, 4096), ("fc8", 1000, 4096))


def convolutions() -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Name and weight shape of the thirteen convolutions."""
    depth = 3
    for block, (width, count) in enumerate(_BLOCKS, 1):
        for i in range(1, count + 1):
            yield f"conv{block}_{i}", (width, depth, 3, 3)
            depth = width


def prototxt() -> str:
    """The deploy net."""
    lines = [
        'name: "VGG16 shapes"',
        'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 224 dim: 224 } } }',
    ]
    bottom = "data"
    for name, shape in convolutions():
        if name.endswith("_1") and name != "conv1_1":
            pool = f"pool{int(name[4]) - 1}"
            lines.append(_pool(pool, bottom))
            bottom = pool
        settings = f"convolution_param {{ num_output: {shape[0]} pad: 1 kernel_size: 3 }}"
        lines += [
            f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" {settings} }}',
            _relu(name),
        ]
        bottom = name
    lines.append(_pool("pool5", bottom))
    bottom = "pool5"
    for name, outputs, _ in _DENSE:
        settings = f"inner_product_param {{ num_output: {outputs} }}"
        lines.append(
            f'layer {{ name: "{name}" type: "InnerProduct" bottom: "{bottom}" top: "{name}" {settings} }}'
        )
        lines += [_relu(name)] if name != "fc8" else []
        bottom = name
    return "\n".join([*lines, ""])


def _pool(name: str, bottom: str) -> str:
    return f'layer {{ name: "{name}" type: "Pooling" bottom: "{bottom}" top: "{name}" pooling_param {{ pool: MAX kernel_size: 2 stride: 2 }} }}'


def _relu(name: str) -> str:
    return f'layer {{ name: "relu_{name}" type: "ReLU" bottom: "{name}" top: "{name}" }}'


def entries(seed: int = 0) -> list[NewEntry]:
    """Random weights and zero biases of every learnt layer."""
    rng = np.random.default_rng(seed)
    shapes: list[tuple[str, tuple[int, ...]]] = [*convolutions(), *((name, (n, k)) for name, n, k in _DENSE)]
    made = []
    for name, shape in shapes:
        weight = rng.standard_normal(shape, np.float32)
        weight *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        made.append(NewEntry(name, (weight, np.zeros(shape[0], np.float32))))
    return made


def write(folder: Path) -> tuple[Path, Path]:
    """Write the prototxt and the caffemodel; returns their paths."""
    net, weights = folder / "vgg16.prototxt", folder / "vgg16.caffemodel"
    net.write_text(prototxt())
    with weights.open("wb") as file:
        Weights(entries()).write_caffemodel(file)
    return net, weights
