"""A net run part by part gives what it gives at once."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import pytest

import caffe_proto as cp
from caffe_proto import binding, graph
from caffe_proto.errors import Error
from caffe_proto.graph import Value
from caffe_proto.model import Model
from caffe_proto.net import parse
from caffe_proto.runtime import Engine, error
from caffe_proto.segments import Segments
from caffe_proto.shape_inference import infer

MODELS = Path(__file__).resolve().parents[1] / "models"


def segments(model: Model, **shapes: tuple[int, ...]) -> Segments:
    shaped = infer(graph.build(model.net), shapes)
    blobs = binding.bind(shaped, model.weights) if model.weights else binding.random(shaped, 0)
    return Segments(shaped, blobs, Engine(1))


def values(parts: Segments, x: np.ndarray) -> dict[Value, np.ndarray]:
    """Every value of the net, computed in one run."""
    (source,) = parts.graph.sources
    everything = [value for value in parts.graph.values() if value != source]
    return {source: x, **parts.run({source: x}, everything)}


@pytest.mark.parametrize("name", ["lenet/lenet", "resnet_20/deploy", "googlenet_cifar/deploy"])
def test_walking_from_cut_to_cut_gives_the_same_values(name: str) -> None:
    model = Model(parse((MODELS / f"{name}.prototxt").read_text()))
    shape = next(iter(cp.shapes(model).values()))
    parts = segments(model)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    whole = values(parts, x)
    state = {value: whole[value] for value in parts.live(0)}
    for index in range(3, len(parts.graph.nodes), 7):
        state = parts.run(state, parts.live(index))
        for value, array in state.items():
            assert error(array, whole[value]) < 1e-4
        assert set(state) == set(parts.live(index))


def test_what_an_in_place_layer_overwrote_can_be_had() -> None:
    parts = segments(cp.load(MODELS / "lenet/lenet.prototxt", MODELS / "lenet/lenet.caffemodel"))
    x = np.random.default_rng(0).random((1, 1, 28, 28), np.float32)
    index = next(i for i, node in enumerate(parts.graph.nodes) if node.name == "relu1")
    (before,) = parts.graph.nodes[index].inputs
    whole = parts.run({parts.graph.sources[0]: x}, [before, Value(index, 0)])
    assert whole[before].min() < 0
    np.testing.assert_array_equal(np.maximum(whole[before], 0), whole[Value(index, 0)])


def test_a_value_that_is_given_replaces_what_would_be_computed() -> None:
    parts = segments(cp.load(MODELS / "lenet/lenet.prototxt", MODELS / "lenet/lenet.caffemodel"))
    last = len(parts.graph.nodes) - 1
    (scores,) = parts.graph.nodes[last].inputs
    given = np.arange(10, dtype=np.float32).reshape(1, 10)
    made = parts.run({scores: given}, [Value(last, 0), scores])
    expected = np.exp(given - 9) / np.exp(given - 9).sum()
    np.testing.assert_allclose(made[Value(last, 0)], expected, rtol=1e-5)
    assert made[scores] is given


def test_what_is_missing_is_named() -> None:
    parts = segments(Model(parse((MODELS / "lenet/lenet.prototxt").read_text())))
    with pytest.raises(Error, match='the input "data" is not given'):
        parts.run({}, [Value(3, 0)])


def test_only_the_parts_used_last_stay_compiled() -> None:
    built = graph.build(parse(nets.inputs(data=(1, 2, 4, 4)) + "".join(
        f'layer {{ name: "p{i}" type: "Power" bottom: "{f"p{i - 1}" if i else "data"}" top: "p{i}" '
        f"power_param {{ shift: {i + 1} }} }}\n"
        for i in range(8)
    )))  # fmt: skip
    parts = Segments(infer(built), {}, Engine(1))
    x = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
    ends = [Value(i + 1, 0) for i in range(8)]
    for _ in range(2):  # what was let go is compiled again
        for count, end in enumerate(ends, 1):
            (made,) = parts.run({Value(0, 0): x}, [end]).values()
            np.testing.assert_array_equal(made, x + count * (count + 1) / 2)
    assert len(parts._compiled) == 4
