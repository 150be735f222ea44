"""Channels that carry nothing go, and the net computes the same."""

from __future__ import annotations

import numpy as np
import pruning
import pytest

import caffe_proto as cp
from caffe_proto.model import Model
from caffe_proto.weights import NewEntry
from lra.removal import Removed, without_zeros


def conv(name: str, bottom: str, outputs: int, more: str = "", kernel: int = 3) -> str:
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" '
        f"convolution_param {{ num_output: {outputs} kernel_size: {kernel} {more} }} }}\n"
    )


def layer(name: str, kind: str, bottoms: str, top: str, more: str = "") -> str:
    read = " ".join(f'bottom: "{one}"' for one in bottoms.split())
    return f'layer {{ name: "{name}" type: "{kind}" {read} top: "{top}" {more} }}\n'


DATA = 'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 4 dim: 11 dim: 11 } } }\n'
RELU = layer("relu", "ReLU", "a", "a")
POOL = layer("pool", "Pooling", "a", "p", "pooling_param { pool: MAX kernel_size: 3 stride: 2 }")
NORM = layer("norm", "BatchNorm", "a", "a") + layer(
    "scale", "Scale", "a", "a", "scale_param { bias_term: true }"
)
DENSE = layer("ip", "InnerProduct", "b", "ip", "inner_product_param { num_output: 5 }")


def zeroed(source: str, *places: tuple[str, int, object], seed: int = 0) -> Model:
    """A net of random weights with zeros at these places: layer, blob, index."""
    model = pruning.model(source, seed)
    assert model.weights is not None
    blobs = {name: [np.array(blob) for blob in model.weights[name]] for name in model.weights}
    for name, blob, index in places:
        blobs[name][blob][index] = 0
    made = {name: [NewEntry(name, tuple(blobs[name]))] for name in {place[0] for place in places}}
    return Model(model.net, model.weights.replace(made))


def outputs(model: Model) -> np.ndarray:
    fed = np.random.default_rng(9).standard_normal((2, 4, 11, 11)).astype(np.float32)
    with cp.session(model, threads=1) as session:
        (made,) = session.run({"data": fed}).values()
    return made


def check(model: Model, channels: dict[str, tuple[int, int]]) -> Removed:
    small = without_zeros(model)
    assert small.channels == channels
    before, after = outputs(model), outputs(small.model)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
    assert (small.macs[1] < small.macs[0]) == bool(channels) == (small.params[1] < small.params[0])
    assert cp.cost(small.model).params == small.params[1]
    return small


PLAIN = DATA + conv("a", "data", 6) + RELU + POOL + conv("b", "p", 4, "pad: 0") + DENSE
PADDED = PLAIN.replace("pad: 0", "pad: 1")
WITHOUT_BIAS = PLAIN.replace("pad: 0", "bias_term: false")


def test_a_filter_of_zeros_moves_into_the_bias_that_reads_it() -> None:
    small = check(zeroed(PLAIN, ("a", 0, 2), ("a", 0, 4)), {"a": (6, 4)})
    assert small.model.weights is not None
    assert small.model.weights["b"][0].shape == (4, 4, 3, 3)


@pytest.mark.parametrize("source", [PADDED, WITHOUT_BIAS])
def test_a_constant_that_no_bias_can_take_stays(source: str) -> None:
    check(zeroed(source, ("a", 0, 2)), {})
    check(zeroed(source, ("a", 0, 2), ("a", 1, 2)), {"a": (6, 5)})


def test_what_nobody_reads_goes_and_then_what_that_alone_read() -> None:
    source = (
        DATA + conv("a", "data", 6) + RELU + POOL + conv("c", "p", 5) + conv("b", "c", 4, kernel=1) + DENSE
    )
    hidden = np.zeros((5, 6, 1, 1), bool)
    hidden[:3, 1] = hidden[4, 1] = True  # filter 3 of c is the only one that reads channel 1 of a
    places = (("b", 0, np.s_[:, 3]), ("c", 0, np.broadcast_to(hidden, (5, 6, 3, 3))))
    check(zeroed(source, *places), {"a": (6, 5), "c": (5, 4)})


def test_all_columns_of_a_picture_count_in_a_fully_connected_layer() -> None:
    rows = np.s_[:, 9:18]  # the 3 x 3 places of channel 1 of b
    source = DATA + conv("b", "data", 4, "stride: 4") + DENSE
    check(zeroed(source, ("ip", 0, rows)), {"b": (4, 3)})
    check(zeroed(source, ("ip", 0, np.s_[:, 9:17])), {})


def test_a_constant_may_pass_batch_norm() -> None:
    check(zeroed(PLAIN.replace(RELU, NORM + RELU), ("a", 0, 3)), {"a": (6, 5)})


def test_channels_of_a_sum_go_together_or_not_at_all() -> None:
    source = (
        DATA
        + conv("a", "data", 6)
        + conv("c", "data", 6)
        + layer("sum", "Eltwise", "a c", "p")
        + conv("b", "p", 4)
        + DENSE
    )
    check(zeroed(source, ("a", 0, 2)), {})
    check(zeroed(source, ("a", 0, 2), ("c", 0, 2)), {"a": (6, 5), "c": (6, 5)})
    check(zeroed(source, ("b", 0, np.s_[:, 5])), {"a": (6, 5), "c": (6, 5)})


def test_what_is_silent_by_chance_is_no_constant() -> None:
    """On the random numbers that constants are found with, the sum is never above zero."""
    source = DATA + conv("a", "data", 6) + conv("c", "data", 6) + layer("sum", "Eltwise", "a c", "p")
    source += layer("relu", "ReLU", "p", "p") + conv("b", "p", 4) + DENSE
    model = zeroed(source, ("a", 0, 2))
    assert model.weights is not None
    weight, bias = (np.array(blob) for blob in model.weights["c"])
    bias[2] = -50
    check(Model(model.net, model.weights.replace({"c": [NewEntry("c", (weight, bias))]})), {})


def test_groups_lose_the_same_number() -> None:
    source = PLAIN.replace("pad: 0", "group: 2")
    check(zeroed(source, ("b", 0, np.s_[:2, 0])), {})
    check(zeroed(source, ("b", 0, np.s_[:2, 0]), ("b", 0, np.s_[2:, 1])), {"a": (6, 4)})
    check(zeroed(source, ("a", 0, 1), ("a", 0, 2), ("a", 0, 3)), {"a": (6, 4)})


def test_one_channel_stays() -> None:
    small = check(zeroed(PLAIN, ("b", 0, np.s_[:])), {"a": (6, 1), "b": (4, 1)})
    assert small.model.weights is not None


def test_a_transposed_reader_takes_the_constant_too() -> None:
    dense = DENSE.replace("num_output: 5", "num_output: 5 transpose: true")
    source = DATA + conv("b", "data", 4, "stride: 4") + dense
    check(zeroed(source, ("b", 0, 1)), {"b": (4, 3)})


def test_nothing_to_remove() -> None:
    model = zeroed(PLAIN)
    assert without_zeros(model).model is model
