"""Small nets as text, run by the session: what the tests of the layer families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from caffe_proto import graph, net, shape_inference
from caffe_proto.model import Model
from caffe_proto.net import NetState
from caffe_proto.onnx_export import Request, export_onnx
from caffe_proto.runtime import Engine, open_onnx, session
from caffe_proto.weights import NewEntry, Weights

Array = Sequence[object] | np.ndarray | float
Arrays = Sequence[Array]


def text(kind: str, settings: str = "", tops: int = 1, /, **inputs: Sequence[int]) -> str:
    """A net of one layer "l" of that type with tops "t0", "t1", ... that reads inputs of those shapes."""
    sources = [
        f'layer {{ name: "{name}" type: "Input" top: "{name}" '
        f"input_param {{ shape {{ {' '.join(f'dim: {dim}' for dim in shape)} }} }} }}"
        for name, shape in inputs.items()
    ]
    bottoms = " ".join(f'bottom: "{name}"' for name in inputs)
    names = " ".join(f'top: "t{i}"' for i in range(tops))
    return "\n".join([*sources, f'layer {{ name: "l" type: "{kind}" {bottoms} {names} {settings} }}'])


def shapes(source: str, phase: str = "TEST") -> dict[str, tuple[int, ...]]:
    """The shape of every blob of a net."""
    return shape_inference.infer(graph.build(net.parse(source, state=NetState(phase)))).by_blob()


def macs(source: str) -> int:
    """The multiply-accumulates of the last layer of a net."""
    shaped = shape_inference.infer(graph.build(net.parse(source)))
    last = len(shaped.graph.nodes) - 1
    node = shaped.graph.nodes[last]
    assert node.spec is not None
    return node.spec.macs(node.params, shaped.bottoms(last), shaped.tops(last))


def model(source: str, blobs: Arrays = ()) -> Model:
    """The net of ``text`` with the blobs of its layer "l"."""
    entry = NewEntry("l", tuple(np.asarray(blob, np.float32) for blob in blobs))
    return Model(net.parse(source), Weights([entry]) if blobs else None)


def run(
    kind: str, settings: str = "", blobs: Arrays = (), tops: int = 1, /, **feeds: Array
) -> tuple[np.ndarray, ...]:
    """The tops of one layer; checks that shape inference told their shapes."""
    arrays = {name: np.asarray(value, np.float32) for name, value in feeds.items()}
    source = text(kind, settings, tops, **{name: array.shape for name, array in arrays.items()})
    names = [f"t{i}" for i in range(tops)]
    with session(model(source, blobs), blobs=names, threads=1) as opened:
        made = opened.run(arrays)
    told = shapes(source)
    if kind != "Filter":
        assert {name: array.shape for name, array in made.items()} == {name: told[name] for name in names}
    return tuple(made[name] for name in names)


def run_open_batch(source: str, feeds: Mapping[str, Array], blobs: Arrays = ()) -> dict[str, np.ndarray]:
    """The outputs of a net exported with its batch left open."""
    made = export_onnx(model(source, blobs), Request(dynamic_batch=True))
    opened = open_onnx(made.SerializeToString(), Engine(threads=1))
    names = [output.name for output in opened.get_outputs()]
    arrays = {name: np.asarray(value, np.float32) for name, value in feeds.items()}
    return dict(zip(names, opened.run(names, arrays), strict=True))
