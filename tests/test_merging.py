"""Layers in a row that are one: the algebra against two convolutions by their definition, nets against onnxruntime."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
from helpers import SHARED, needs_shared
from numpy.lib.stride_tricks import sliding_window_view
from test_lra_schemes import convolve

import caffe_proto as cp
import lra
from caffe_proto.costs import cost
from caffe_proto.errors import PlanError, UsageError
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.net import parse
from caffe_proto.shape_inference import infer
from caffe_proto.weights import NewEntry
from lra import Plan
from lra.cli import main
from lra.decomposition import Step
from lra.merging import merge
from lra.merging_algebra import inexact, merge_steps, merged_shape

Array = np.ndarray


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def step(shape: tuple[int, int, int, int], seed: int, bias: bool = True, **how: Any) -> Step:
    return Step("", drawn(*shape, seed=seed), drawn(shape[0], seed=seed + 50) if bias else None, **how)


def windows(x: Array, one: Step) -> Array:
    """A convolution of x (c, y, x), all places at once."""
    (kh, kw), (sh, sw), (dh, dw) = one.shape[2:], one.stride, one.dilation
    padded = np.pad(x, ((0, 0), (one.pad[0],) * 2, (one.pad[1],) * 2))
    seen = sliding_window_view(padded, (dh * (kh - 1) + 1, dw * (kw - 1) + 1), axis=(1, 2))
    seen = seen[:, ::sh, ::sw, ::dh, ::dw]
    parts = zip(np.split(seen, one.group), np.split(one.weight, one.group), strict=True)
    y = np.concatenate([np.einsum("iyxhw,oihw->oyx", *part, optimize=True) for part in parts])
    return y if one.bias is None else y + one.bias[:, None, None]


def in_turn(x: Array, *steps: Step) -> Array:
    for one in steps:
        x = windows(x, one)
    return x


def test_the_reference_is_convolution_by_its_definition() -> None:
    one = step((4, 3, 3, 2), 0, stride=(2, 1), pad=(1, 2), dilation=(1, 3), group=2)
    x = drawn(6, 7, 8)
    np.testing.assert_allclose(windows(x, one), convolve(x, one.weight, one.bias, one), atol=1e-12)


# the algebra


def test_by_hand() -> None:
    """[1 2] at stride 2, then [3 4 5] at dilation 1: taps 0 1, 2 3, 4 5 of one kernel at stride 2."""
    first = Step("", np.array([[[[1.0, 2.0]]]]), np.array([10.0]), (1, 2))
    second = Step("", np.array([[[[3.0, 4.0, 5.0]]]]), np.array([1.0]))
    one = merge_steps(first, second)
    np.testing.assert_array_equal(one.weight, [[[[3, 6, 4, 8, 5, 10]]]])
    np.testing.assert_array_equal(one.bias, [1 + 10 * 12])
    assert (one.stride, one.pad, one.dilation, one.group) == ((1, 2), (0, 0), (1, 1), 1)
    far = replace(second, dilation=(1, 3), stride=(1, 4))
    one = merge_steps(first, far)
    np.testing.assert_array_equal(one.weight[0, 0, 0], [3, 6, 0, 0, 0, 0, 4, 8, 0, 0, 0, 0, 5, 10])
    assert (one.stride, one.dilation) == ((1, 8), (1, 1))


def test_channels_in_between_by_hand() -> None:
    first = Step("", np.array([[1.0, 2], [3, 4], [5, 6]])[:, :, None, None], None)
    second = Step("", np.array([[1.0, 0, 2], [0, 1, 1]])[:, :, None, None], None)
    one = merge_steps(first, second)
    np.testing.assert_array_equal(one.weight[:, :, 0, 0], [[11, 14], [8, 10]])
    assert one.bias is None


def test_dilated_taps_share_a_grid() -> None:
    """Spacings of 4 and 6 lie on a grid of 2; a single tap has no spacing."""
    first = step((2, 1, 1, 2), 0, dilation=(1, 4))
    second = step((1, 2, 1, 3), 1, dilation=(9, 6))
    one = merged_shape(first, second)
    assert one.shape == (1, 1, 1, (4 + 12) // 2 + 1) and one.dilation == (1, 2)
    assert merged_shape(first, step((1, 2, 1, 1), 1, dilation=(9, 6))).dilation == (1, 4)
    x = drawn(1, 3, 40)
    np.testing.assert_allclose(in_turn(x, merge_steps(first, second)), in_turn(x, first, second), atol=1e-12)


KERNELS = [((1, 1), (3, 3)), ((3, 3), (1, 1)), ((3, 1), (1, 3)), ((1, 2), (3, 2)), ((3, 3), (2, 3))]
SLIDES = [
    ({}, {}),
    ({"stride": (2, 3)}, {"stride": (1, 2)}),
    ({"dilation": (2, 1)}, {"dilation": (3, 2)}),
    ({"stride": (2, 1), "dilation": (3, 2)}, {"dilation": (1, 2), "stride": (2, 2)}),
]
PADS = [
    ((0, 0), (0, 0)),
    ((2, 1), (0, 0)),
    ((0, 0), (1, 2)),
    ((1, 3), (2, 1)),
    ((4, 5), (1, 1)),
    ((6, 0), (1, 0)),
]
GROUPS = [(1, 1), (2, 2), (4, 2), (2, 4), (4, 1), (1, 4), (2, 3)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("slides", SLIDES)
def test_one_computes_what_both_do_wherever_it_is_said_to(kernels: Any, slides: Any) -> None:
    """All pads, groups and biases, on two image sizes: no pair called exact is off anywhere, borders included."""
    exact = 0
    for (p1, p2), (g1, g2), biased in itertools.product(PADS, GROUPS, (True, False)):
        first = step((12, 12 // g1, *kernels[0]), 1, biased, pad=p1, group=g1, **slides[0])
        second = step((12, 12 // g2, *kernels[1]), 2, g2 > 1, pad=p2, group=g2, **slides[1])
        why = inexact(first, second, biased)
        if why is not None:
            with pytest.raises(ValueError, match=why):
                merge_steps(first, second)
            continue
        exact += 1
        one = merge_steps(first, second)
        shape = merged_shape(first, second)
        assert (one.shape, one.stride, one.pad, one.dilation, one.group) == (
            shape.shape, shape.stride, shape.pad, shape.dilation, shape.group,
        )  # fmt: skip
        for size in ((23, 24), (22, 27)) if exact % 7 == 1 else ((23, 24),):
            x = drawn(12, *size, seed=3)
            np.testing.assert_allclose(in_turn(x, one), in_turn(x, first, second), rtol=0, atol=1e-10)
    assert exact >= 28  # those without a pad of the second's


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({"pad": (1, 1)}, {"pad": (1, 1)}, "the border of its input"),
        ({"pad": (2, 1)}, {"pad": (1, 1)}, "the border of its input"),  # enough along one axis only
        ({"pad": (1, 1), "bias": True}, {"pad": (1, 0), "kernel": (1, 1)}, "pads with zeros what has a bias"),
    ],
)
def test_what_is_refused_differs_at_the_border(first: Any, second: Any, why: str) -> None:
    one = step((2, 2, 3, 3), 0, first.pop("bias", False), **first)
    two = step((2, 2, *second.pop("kernel", (3, 3))), 1, False, **second)
    assert why in str(inexact(one, two, one.bias is not None))
    shape = merged_shape(one, two)
    middle = merge_steps(replace(one, bias=None, pad=(9, 9)), replace(two, pad=(0, 0)))
    forced = Step("", middle.weight, None, shape.stride, shape.pad, shape.dilation, 1)
    x = drawn(2, 12, 12)
    both, single = in_turn(x, one, two), in_turn(x, forced)
    assert both.shape == single.shape
    constant = 0 if one.bias is None else (two.weight.sum(axis=(2, 3)) @ one.bias)[:, None, None]
    np.testing.assert_allclose(both[:, 4:-4, 4:-4], (single + constant)[:, 4:-4, 4:-4], atol=1e-12)
    assert np.abs(both - single - constant).max() > 1e-3


def test_groups_stay_apart_as_far_as_both_have_them() -> None:
    for groups, together, depth in (((4, 2), 2, 6), ((2, 4), 2, 6), ((2, 3), 1, 12), ((4, 4), 4, 3)):
        first, second = (step((12, 12 // g, 1, 1), g, group=g) for g in groups)
        one = merge_steps(first, second)
        assert (one.group, one.shape) == (together, (12, depth, 1, 1))


def test_channels_must_fit() -> None:
    with pytest.raises(ValueError, match="4 channels are made, 6 are read"):
        merged_shape(step((4, 2, 1, 1), 0), step((2, 3, 1, 1), 0, group=2))


# nets


def conv(name: str, bottom: str, settings: str, more: str = "", top: str = "") -> str:
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{top or name}" {more} '
        f"convolution_param {{ {settings} }} }}\n"
    )


def dense(name: str, bottom: str, settings: str, more: str = "") -> str:
    return (
        f'layer {{ name: "{name}" type: "InnerProduct" bottom: "{bottom}" top: "{name}" {more} '
        f"inner_product_param {{ {settings} }} }}\n"
    )


DATA = nets.inputs(data=(2, 4, 9, 11))
WIDE, NARROW = "num_output: 12 kernel_size: 1", "num_output: 3 kernel_size: 3"
PAIR = DATA + conv("a", "data", WIDE) + conv("b", "a", NARROW)


def outputs(model: Model) -> dict[str, Array]:
    return nets.forward(model, nets.random_feeds(model))


def layer_names(model: Model) -> list[str]:
    return [layer.name for layer in model.net.layers]


def check(source: str, names: list[str], *rows: tuple[str, ...]) -> Model:
    """Merge a net: these layers are left, of these rows one each; the outputs and what is said of the costs hold."""
    model = nets.model(source)
    found = merge(model)
    assert layer_names(found.model)[1:] == names
    assert [one.layers for one in found.merges] == list(rows)
    expected, made = outputs(model), outputs(found.model)
    assert list(expected) == list(made)
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, rtol=0, atol=3e-5 * np.abs(value).max())
    before, after = (cost(infer(build(one.net))).macs for one in (model, found.model))
    assert all(one.macs is not None and one.macs[0] > one.macs[1] for one in found.merges)
    assert before - after == sum(one.macs[0] - one.macs[1] for one in found.merges if one.macs)
    assert found.model.weights is not None
    assert set(found.model.weights) == set(layer_names(found.model)[1:]) & set(model.weights or ())
    return found.model


def test_a_pair_becomes_one() -> None:
    made = check(PAIR, ["b"], ("a", "b"))
    assert made.weights is not None
    assert [blob.shape for blob in made.weights["b"]] == [(3, 4, 3, 3), (3,)]
    assert 'name: "b"' in made.net.text and "num_output: 3 kernel_size: 3" in made.net.text
    stored = nets.stored(nets.model(PAIR))
    (w1, b1), (w2, b2) = stored["a"], stored["b"]
    kernel = np.einsum("omhw,mi->oihw", w2.astype(float), w1[:, :, 0, 0].astype(float))
    np.testing.assert_allclose(made.weights["b"][0], kernel, atol=1e-6)
    np.testing.assert_allclose(made.weights["b"][1], b2 + np.einsum("omhw,m->o", w2, b1), atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("num_output: 12 kernel_size: 1 bias_term: false", "num_output: 3 kernel_size: 3 pad: 1"),
        ("num_output: 12 kernel_size: 1 bias_term: false stride: 2", "num_output: 3 kernel_size: 3 pad: 1"),
        ("num_output: 12 kernel_size: 3 pad: 1 dilation: 2", "num_output: 3 kernel_size: 1 stride: 2"),
        ("num_output: 12 kernel_h: 3 kernel_w: 1 pad_h: 1 pad_w: 0 bias_term: false",
         "num_output: 3 kernel_h: 1 kernel_w: 3 pad_h: 0 pad_w: 1"),
        ("num_output: 24 kernel_size: 1 group: 2 stride: 2", "num_output: 4 kernel_size: 2 group: 2 dilation: 2"),
        ("num_output: 64 kernel_size: 1 group: 4 bias_term: false", "num_output: 2 kernel_size: 1 group: 2 bias_term: false"),
        ("num_output: 64 kernel_size: 1 group: 2", "num_output: 4 kernel_size: 1 group: 4"),
        ("num_output: 16 kernel_size: 1 bias_term: false", "num_output: 2 kernel_size: 1 bias_term: true"),
        ("num_output: 16 kernel_size: 1", "num_output: 2 kernel_size: 1 bias_term: false"),
        ("num_output: 40 kernel_size: 3", "num_output: 2 kernel_size: 3 dilation: 1"),
    ],
)  # fmt: skip
def test_pairs_that_cost_less_as_one(first: str, second: str) -> None:
    made = check(DATA + conv("a", "data", first) + conv("b", "a", second), ["b"], ("a", "b"))
    (layer,) = made.net.layers[1:]
    biased = "bias_term: false" not in first or "bias_term: false" not in second
    assert made.weights is not None and len(made.weights["b"]) == 1 + biased
    assert layer.bottoms == ("data",) and layer.tops == ("b",)


def test_a_bias_of_zeros_is_none() -> None:
    """As Tai's tool leaves it in its vertical layers."""
    source = DATA + conv("a", "data", WIDE) + conv("b", "a", NARROW + " pad: 1")
    model = nets.model(source)
    assert model.weights is not None
    weight, bias = model.weights["a"]
    zeroed = replace(model, weights=model.weights.replace({"a": [NewEntry("a", (weight, 0 * bias))]}))
    found = merge(zeroed)
    assert [one.layers for one in found.merges] == [("a", "b")]
    np.testing.assert_allclose(outputs(found.model)["b"], outputs(zeroed)["b"], atol=3e-5)
    refused = merge(model)
    assert refused.model is model and refused.merges == ()
    assert refused.apart == {("a", "b"): "the second pads with zeros what has a bias"}


def test_fully_connected_layers_in_a_row() -> None:
    body = dense("a", "data", "num_output: 50 transpose: true") + dense("b", "a", "num_output: 4")
    made = check(DATA + body, ["b"], ("a", "b"))
    assert made.weights is not None and made.weights["b"][0].shape == (4, 4 * 9 * 11)
    other = dense("a", "data", "num_output: 50 axis: 2") + dense(
        "b", "a", "num_output: 4 axis: -1 transpose: true bias_term: false"
    )
    made = check(DATA + other, ["b"], ("a", "b"))
    assert made.weights is not None and made.weights["b"][0].shape == (99, 4)
    assert "axis: 2" in made.net.text
    flattened = DATA + dense("a", "data", "num_output: 50 axis: 2") + dense("b", "a", "num_output: 4")
    assert merge(nets.model(flattened)).merges == ()  # the second reads all of its 4 x 50


@pytest.mark.parametrize(
    "body",
    [
        conv("a", "data", WIDE) + 'layer { name: "r" type: "ReLU" bottom: "a" top: "a" }\n' + conv("b", "a", NARROW),
        conv("a", "data", WIDE) + 'layer { name: "bn" type: "BatchNorm" bottom: "a" top: "n" }\n' + conv("b", "n", NARROW),
        conv("a", "data", WIDE) + conv("b", "a", NARROW) + 'layer { name: "r" type: "ReLU" bottom: "a" top: "r" }\n',
        conv("a", "data", WIDE) + conv("b", "a", NARROW) + conv("c", "a", NARROW),
        conv("a", "data", "num_output: 3 kernel_size: 3") + conv("b", "a", "num_output: 12 kernel_size: 3"),
        conv("a", "data", "num_output: 3 kernel_size: 1") + conv("b", "a", "num_output: 12 kernel_size: 1"),
        conv("a", "data", WIDE) + dense("b", "a", "num_output: 4"),
        'layer { name: "a" type: "Deconvolution" bottom: "data" top: "a" convolution_param { num_output: 20 kernel_size: 1 } }\n'
        + conv("b", "a", NARROW),
    ],
    ids=["in place", "norm", "read twice", "two heads", "dearer", "dearer 1x1", "two kinds", "transposed"],
)  # fmt: skip
def test_what_stays_as_it_is(body: str) -> None:
    model = nets.model(DATA + body)
    found = merge(model)
    assert found.model is model and found.merges == () and found.apart == {}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (conv("a", "data", WIDE, 'param { name: "w" }') + conv("b", "a", NARROW)
         + conv("c", "data", WIDE, 'param { name: "w" }'), '"a" shares its blob "w" with "c"'),
        (conv("a", "data", WIDE) + conv("b", "a", NARROW, "param { lr_mult: 0 }"), "different rates (lr_mult 1 and 0)"),
        (conv("a", "data", WIDE) + conv("b", "a", NARROW, "include { phase: TEST }"), "exists in other phases"),
        (conv("a", "data", WIDE) + conv("b", "a", NARROW)
         + 'layer { name: "t" type: "ReLU" bottom: "a" top: "t" include { phase: TRAIN } }\n', 'another phase "a" is used by "t"'),
        (conv("a", "data", WIDE, "include { phase: TEST }") + conv("a", "data", WIDE, "include { phase: TRAIN }")
         + conv("b", "a", NARROW), '"a" stands in the file 2 times'),
        (conv("a", "data", "num_output: 24 kernel_size: 3 pad: 1 bias_term: false") + conv("b", "a", "num_output: 1 kernel_size: 3 pad: 1"),
         "border of its input"),
    ],
)  # fmt: skip
def test_what_has_a_reason_to_stay(body: str, why: str) -> None:
    model = nets.model(DATA + body)
    found = merge(model)
    assert found.model is model and found.merges == ()
    ((pair, reason),) = found.apart.items()
    assert pair == ("a", "b") and why in reason


def test_several_bottoms_share_their_weights() -> None:
    body = (
        nets.inputs(data=(1, 4, 6, 6), more=(1, 4, 6, 6))
        + 'layer { name: "a" type: "Convolution" bottom: "data" bottom: "more" top: "a" top: "z" '
        f"convolution_param {{ {WIDE} }} }}\n" + conv("b", "a", NARROW)
    )
    model = nets.model(body)
    assert merge(model).model is model
    assert "several blobs" in merge(model).apart["a", "b"]


def test_rows_are_cut_where_that_is_cheapest() -> None:
    """Wide, narrow, wide, narrow: one of each two, not all in one and not the narrow one with the wide."""
    body = (
        conv("a", "data", "num_output: 40 kernel_size: 1")
        + conv("b", "a", "num_output: 2 kernel_size: 1")
        + conv("c", "b", "num_output: 30 kernel_size: 1")
        + conv("d", "c", "num_output: 8 kernel_size: 3")
    )
    check(DATA + body, ["b", "d"], ("a", "b"), ("c", "d"))
    whole = conv("a", "data", WIDE) + conv("b", "a", WIDE) + conv("c", "b", WIDE) + conv("d", "c", NARROW)
    check(DATA + whole, ["d"], ("a", "b", "c", "d"))


def test_every_way_to_cut_a_row() -> None:
    """Against trying them all, for random widths."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        widths = [4, *rng.choice([2, 3, 6, 20, 40], 4)]
        body = "".join(
            conv(name, before, f"num_output: {width} kernel_size: {rng.choice([1, 1, 2])}")
            for name, before, width in zip("abcd", ("data", *"abc"), widths[1:], strict=True)
        )
        model = nets.model(DATA + body)
        after = cost(infer(build(merge(model).model.net))).macs
        best = min(
            cost(infer(build(merge(model, only=rows).model.net))).macs
            for cuts in itertools.product((False, True), repeat=3)
            for rows in [[row for row in _rows(cuts) if len(row) > 1]]
        )
        assert after == best


def _rows(cuts: tuple[bool, ...]) -> list[str]:
    rows = ["a"]
    for name, cut in zip("bcd", cuts, strict=True):
        if cut:
            rows.append(name)
        else:
            rows[-1] += name
    return rows


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (("conv1_lowrank", "conv1_linear"), "conv1_lowrank"),
        (("conv1_W_prime", "conv1_P"), "conv1_W_prime"),
        (("fc6_L", "fc6_U"), "fc6_L"),
        (("conv1_v", "conv1_h"), "conv1_h"),
        (("conv1_linear", "conv2"), "conv2"),
        (("conv1_P", "conv2_W_prime"), "conv2_W_prime"),
        (("conv1", "conv2_linear"), "conv2_linear"),
    ],
)
def test_the_name_that_stays(names: tuple[str, str], kept: str) -> None:
    source = DATA + conv(names[0], "data", WIDE) + conv(names[1], names[0], NARROW, top="out")
    check(source, [kept], names)


def test_the_file_stays_as_it_is_elsewhere() -> None:
    """The block that stays is edited in its own manner, what goes takes its lines along, all else is byte for byte."""
    source = (
        '# a net\nname: "n"\ninput: "data"\ninput_dim: 1 input_dim: 4 input_dim: 8 input_dim: 8\n'
        'layer {\n  name: "a"  # wide\n  type: "Convolution"\n  bottom: "data"\n  top: "a"\n'
        "  convolution_param { num_output: 20 kernel_size: 1 stride: 2 bias_term: false }\n}\n"
        'layer {\n  name: "b"\n  type: "Convolution"\n  bottom: "a"\n  top: "out"\n  param { lr_mult: 1 }\n  param { lr_mult: 2 }\n'
        '  convolution_param {\n    num_output: 5\n    kernel_size: 3  # small\n    weight_filler { type: "xavier" }\n  }\n}\n'
        'layer { name: "r" type: "ReLU" bottom: "out" top: "out" } # end\n'
    )
    made = merge(nets.model(source)).model.net.text
    expected = source[: source.index("layer {")] + source[source.index('layer {\n  name: "b"') :]
    expected = expected.replace('bottom: "a"', 'bottom: "data"')
    expected = expected.replace(
        "    kernel_size: 3  # small\n", "    kernel_size: 3  # small\n    stride: 2\n    dilation: 2\n"
    )
    assert made == expected


V1 = """name: "v1"
input: "data"
input_dim: 1
input_dim: 4
input_dim: 8
input_dim: 8
layers { name: "a" type: CONVOLUTION bottom: "data" top: "a" blobs_lr: 1 blobs_lr: 2 convolution_param { num_output: 20 kernel_size: 1 } }
layers { name: "b" type: CONVOLUTION bottom: "a" top: "b" blobs_lr: 1 blobs_lr: 2 convolution_param { num_output: 5 kernel_size: 3 } }
layers { name: "ip" type: INNER_PRODUCT bottom: "b" top: "ip" inner_product_param { num_output: 30 } }
layers { name: "out" type: INNER_PRODUCT bottom: "ip" top: "out" inner_product_param { num_output: 2 } }
"""


def test_old_nets(tmp_path: Path) -> None:
    model = nets.model(V1)
    found = merge(model)
    assert layer_names(found.model) == ["b", "out"]
    np.testing.assert_allclose(outputs(found.model)["out"], outputs(model)["out"], atol=1e-5)
    cp.save(found.model, tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    again = cp.load(tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    np.testing.assert_array_equal(outputs(again)["out"], outputs(found.model)["out"])
    v0 = V1.replace("CONVOLUTION", "conv").replace("INNER_PRODUCT", "innerproduct")
    for name in "ab":
        v0 = v0.replace(
            f'layers {{ name: "{name}" type: conv', f'layers {{ layer {{ name: "{name}" type: "conv"'
        )
    v0 = v0.replace('bottom: "data" top: "a" blobs_lr: 1 blobs_lr: 2 convolution_param { num_output: 20 kernel_size: 1 } }',
                    'num_output: 20 kernelsize: 1 } bottom: "data" top: "a" }')  # fmt: skip
    v0 = v0.replace('bottom: "a" top: "b" blobs_lr: 1 blobs_lr: 2 convolution_param { num_output: 5 kernel_size: 3 } }',
                    'num_output: 5 kernelsize: 3 } bottom: "a" top: "b" }')  # fmt: skip
    v0 = v0[: v0.index('layers { name: "ip"')]
    assert parse(v0).dialect == "V0"
    old = nets.model(v0)
    made = merge(old).model
    assert layer_names(made) == ["b"]
    np.testing.assert_allclose(outputs(made)["b"], outputs(old)["b"], atol=1e-5)


def test_without_weights_the_structure_changes_alike() -> None:
    model = nets.model(PAIR)
    bare = replace(model, weights=None)
    assert merge(bare).model.net.text == merge(model).model.net.text
    padded = DATA + conv("a", "data", WIDE) + conv("b", "a", NARROW + " pad: 1")
    structure = replace(nets.model(padded), weights=None)
    assert merge(structure).merges == ()  # the bias may be anything
    assert layer_names(merge(structure, only=[("a", "b")]).model) == ["data", "b"]  # a plan knows it


TRAIN = (
    'layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN } data_param { source: "x" batch_size: 4 } }\n'
    + conv("a", "data", WIDE)
    + conv("b", "a", NARROW)
    + dense("c", "b", "num_output: 30")
    + dense("d", "c", "num_output: 3")
)


def test_nets_of_unknown_shapes() -> None:
    """A train_val reads its shapes from a database: rows that a plan names are merged all the same."""
    bare = Model(parse(TRAIN, state=cp.net.NetState("TRAIN")))
    assert merge(bare).model is bare
    made = merge(bare, only=[("a", "b"), ("c", "d")])
    assert [layer.name for layer in made.model.net.layers] == ["data", "b", "d"]
    assert all(one.macs is None for one in made.merges)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["a", "c"]], '"c", which is no convolution'),
        ([["b", "a"]], "with nothing in between"),
        ([["a", "b"], ["a", "b"]], 'merges "a" twice'),
    ],
)
def test_rows_that_are_none(rows: list[list[str]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        merge(nets.model(PAIR), only=rows)


def test_a_row_that_is_not_exact_is_refused() -> None:
    model = nets.model(DATA + conv("a", "data", WIDE) + conv("b", "a", NARROW + " pad: 1"))
    with pytest.raises(PlanError, match="a and b: the second pads with zeros what has a bias"):
        merge(model, only=[["a", "b"]])


# plans and commands

NET = (
    nets.inputs(data=(1, 6, 20, 20))
    + conv("wide", "data", "num_output: 60 kernel_size: 1", "param { lr_mult: 1 } param { lr_mult: 2 }")
    + conv("conv", "wide", "num_output: 16 kernel_size: 3", "param { lr_mult: 1 } param { lr_mult: 2 }")
    + 'layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }\n'
    + conv("next", "conv", "num_output: 24 kernel_size: 3 bias_term: false")
    + conv("last", "next", "num_output: 20 kernel_size: 3 pad: 1 stride: 2")
    + dense("ip", "last", "num_output: 10")
)


def test_layers_are_merged_before_ranks_are_chosen() -> None:
    model = nets.model(NET)
    plan = lra.make_plan(model, merge=True, scheme="pca", ranks=[8, 6, 6])
    assert plan.target["merge"] == [["wide", "conv"]]
    assert list(plan.layers) == ["conv", "next", "last"]
    assert (plan.net, plan.weights) == model.fingerprint
    merged = merge(model).model
    by_hand, _ = lra.apply(lra.make_plan(merged, scheme="pca", ranks=[8, 6, 6]), merged)
    made, report = lra.apply(plan, model)
    again = merge(by_hand)
    assert made.net.text == again.model.net.text
    assert [one.layers for one in report.merges] == [("wide", "conv")]
    x = nets.random_feeds(model)
    for name, value in nets.forward(by_hand, x).items():
        np.testing.assert_allclose(nets.forward(made, x)[name], value, atol=1e-5)
    assert report.macs == tuple(cost(infer(build(one.net))).macs for one in (model, made))


def test_a_1x1_layer_goes_into_the_next_one() -> None:
    """next_linear makes 24 channels of 6 for last_lowrank, which reads the 6 itself in the end: it has no bias to pad."""
    model = nets.model(NET)
    plan = lra.make_plan(model, merge=True, scheme="pca", ranks=[8, 6, 6])
    made, report = lra.apply(plan, model)
    assert [one.layers for one in report.late_merges] == [("next_linear", "last_lowrank")]
    apart, _ = lra.apply(lra.make_plan(merge(model).model, scheme="pca", ranks=[8, 6, 6]), merge(model).model)
    for name, value in outputs(apart).items():
        np.testing.assert_allclose(outputs(made)[name], value, atol=1e-5)
    assert "next_linear" not in layer_names(made) and "next_linear" in layer_names(apart)
    rows = {row.name: row.macs for row in report.rows}
    assert rows["next"] is not None and rows["next"][1] < rows["next"][0]
    assert report.macs[1] == cost(infer(build(made.net))).macs


def test_a_plan_merges_what_it_says_and_no_more() -> None:
    model = nets.model(NET)
    plan = lra.make_plan(model, merge=True, scheme="pca", ranks=[8, 6, 6])
    without_late, report = lra.apply(plan.with_late_merges([]), model)
    assert "next_linear" in layer_names(without_late) and report.late_merges == ()
    nothing = Plan({}, target={"merge": [], "merge_late": []})
    made, report = lra.apply(nothing, model)
    assert made.net.text == model.net.text and report.merges == ()


def test_a_speed_up_counts_what_merging_saves() -> None:
    model = nets.model(NET)
    before = cost(infer(build(model.net))).macs
    for scope, share in (("all", 3.0), ("conv", 3.0), ("eligible", 2.0)):
        plan = lra.make_plan(model, merge=True, speedup=share, scope=scope)
        _, report = lra.apply(plan, model)
        assert report.macs[0] == before
        ratio = {
            "all": report.macs[0] / report.macs[1],
            "conv": report.conv_macs[0] / report.conv_macs[1],
            "eligible": report.conv_macs[0] / report.conv_macs[1],
        }[scope]
        assert ratio >= share
    alone = merge(model).model
    merged_ratio = before / cost(infer(build(alone.net))).macs
    easy = lra.make_plan(model, merge=True, speedup=1 + 0.9 * (merged_ratio - 1))
    assert easy.layers == {}  # merging reaches it


def test_merging_and_splitting_what_gets_dearer_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="merging would undo"):
        lra.make_plan(nets.model(NET), merge=True, energy=1.0, even_if_slower=True)


def test_fits_to_images_are_of_the_merged_net() -> None:
    model = nets.model(NET)
    x = drawn(60, 6, 20, 20).astype(np.float32)
    plan = lra.make_plan(model, merge=True, scheme="spatial", ranks=[8, 12, 12], images=x)
    made, report = lra.apply(plan, model, images=x)
    plain, _ = lra.apply(lra.make_plan(model, merge=True, scheme="spatial", ranks=[8, 12, 12]), model)
    assert {row.error_of for row in report.rows} == {"responses"}
    expected = outputs(model)["ip"]
    errors = [np.linalg.norm(outputs(one)["ip"] - expected) for one in (made, plain)]
    assert errors[0] < errors[1]


def written(prefix: Path) -> dict[str, bytes]:
    return {kind: Path(f"{prefix}.{kind}").read_bytes() for kind in ("prototxt", "caffemodel", "plan.json")}


def test_commands_repeat_what_the_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, weights = nets.files(tmp_path, NET)
    first = tmp_path / "a"
    assert (
        main(["decompose", net, weights, "-o", str(first), "--merge", "--scheme", "pca", "--ranks", "8,6,6"])
        == 0
    )
    said = capsys.readouterr().out
    assert "merged wide + conv into conv (3x3x16), MACs 2,943,360 -> 279,936" in said
    assert "merged next_linear + last_lowrank into last_lowrank (3x3x6), MACs " in said
    target = json.loads((tmp_path / "a.plan.json").read_text())["target"]
    assert target["merge"] == [["wide", "conv"]]
    assert target["merge_late"] == [["next_linear", "last_lowrank"]]
    assert Plan.from_json((tmp_path / "a.plan.json").read_text()).merges == [["wide", "conv"]]
    for command in (
        ["decompose", net, weights, "--plan", f"{first}.plan.json", "--compare", "random"],
        ["apply", f"{first}.plan.json", net, weights],
    ):
        again = tmp_path / command[0]
        assert main([*command, "-o", str(again)]) == 0
        assert written(again) == written(first)
    bare = tmp_path / "bare"
    assert main(["apply", f"{first}.plan.json", net, "-o", str(bare)]) == 0
    assert (tmp_path / "bare.prototxt").read_bytes() == (tmp_path / "a.prototxt").read_bytes()
    assert main(["decompose", net, weights, "-o", str(bare), "--plan", f"{first}.plan.json", "--merge"]) == 2
    assert "does not go with a plan that says everything" in capsys.readouterr().err


def test_merging_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, weights = nets.files(tmp_path, NET)
    made = tmp_path / "a"
    command = ["decompose", net, weights, "-o", str(made), "--merge"]
    assert main([*command, "--compare", "random", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == []
    assert report["merged"] == [
        {"layers": ["wide", "conv"], "into": "conv", "shape": [16, 6, 3, 3], "macs": [2943360, 279936]}
    ]
    assert report["outputs_apart"]["ip"] < 1e-5
    model, after = cp.load(net, weights), cp.load(f"{made}.prototxt", f"{made}.caffemodel")
    np.testing.assert_allclose(outputs(after)["ip"], outputs(model)["ip"], atol=1e-4)
    again = tmp_path / "b"
    assert main(["decompose", net, weights, "-o", str(again), "--plan", f"{made}.plan.json"]) == 0
    assert written(again) == written(made)
    capsys.readouterr()
    for extra in (["--scheme", "pca"], ["--fc"], ["--even-if-slower"]):
        assert main([*command, *extra]) == 2
        assert "--merge" in capsys.readouterr().err
    assert main(["decompose", net, weights, "-o", str(made)]) == 2
    assert "no amount is given" in capsys.readouterr().err


@pytest.mark.parametrize("value", ['"conv"', "[1]", '[["a"]]', '[["a", 2]]', '{"a": "b"}'])
def test_plans_that_merge_nonsense(value: str) -> None:
    plan = Plan({}, target={"merge": json.loads(value)})
    with pytest.raises(PlanError, match=r'"merge" is .*, lists of layer names are needed'):
        lra.apply(plan, nets.model(NET))


def test_a_warning_says_what_stays_apart() -> None:
    source = (
        nets.inputs(data=(1, 6, 20, 20))
        + conv("a", "data", "num_output: 60 kernel_size: 1")
        + conv("b", "a", "num_output: 8 kernel_size: 3 pad: 1")
    )
    model = nets.model(source)
    _, report = lra.apply(lra.make_plan(model, merge=True, rank_config={}), model)
    assert report.warnings == ('layers "a" and "b" stay apart: the second pads with zeros what has a bias',)


# nets of other people


QUICK = "data/models/caffe_v1_everpeace/cifar10/cifar10_quick"


@needs_shared
@pytest.mark.skipif(not (SHARED / f"{QUICK}_iter_5000.caffemodel").is_file(), reason="the net is not there")
def test_caffes_own_quick_net() -> None:
    """Its two fully connected layers have no activation between them."""
    model = cp.load(SHARED / f"{QUICK}.prototxt", SHARED / f"{QUICK}_iter_5000.caffemodel")
    found = merge(model)
    assert [(one.layers, one.name, one.macs) for one in found.merges] == [
        (("ip1", "ip2"), "ip2", (66176, 10240))
    ]
    made, expected = outputs(found.model), outputs(model)
    assert list(made) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, atol=1e-5)


PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "he_frcnn/VGG_ADC/test.prototxt": ("conv1_1_W_prime",),
    "wen/examples/siamese/mnist_siamese.prototxt": ("feat",),
}


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_nets_whose_ranks_do_not_pay(name: str) -> None:
    path = SHARED / "published" / name
    if not path.is_file():
        pytest.skip("the net is not there")
    found = merge(cp.load(path))
    assert tuple(one.name for one in found.merges) == PUBLISHED[name]
    for one in found.merges:
        assert one.macs is not None and one.macs[1] < one.macs[0]
