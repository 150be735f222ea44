"""Fillers: their distributions, Caffe's own numbers where nothing is random, and what layers start from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import SHARED, needs_shared

from caffe_proto import fillers, graph, load, net
from caffe_proto.errors import NetError, ShapeError, UnsupportedError
from caffe_proto.fillers import Filler, fill, initial
from caffe_proto.layers.spec import Request
from caffe_proto.shape_inference import infer
from caffe_proto.text import parse
from caffe_proto.typed import Typed

MANY = (200, 50, 4, 5)  # 200,000 numbers; fan in 1000, fan out 4000


def random() -> np.random.Generator:
    return np.random.default_rng(3)


def starts(source: str, phase: str = "TRAIN") -> tuple[np.ndarray, ...]:
    """The blobs that the last layer of a net starts from."""
    made = net.parse(source, state=net.NetState(phase))
    shaped = infer(graph.build(made))
    index = len(shaped.graph.nodes) - 1
    layer = shaped.graph.nodes[index].layer
    request = Request(layer, Typed(layer.message, "LayerParameter", layer.document), phase)
    return initial(request, shaped.blobs(index), random())


def one_layer(kind: str, settings: str = "", *shapes: tuple[int, ...]) -> str:
    inputs = [
        f'layer {{ name: "i{i}" type: "Input" top: "i{i}" input_param {{ shape {{ '
        f"{' '.join(f'dim: {dim}' for dim in shape)} }} }} }}"
        for i, shape in enumerate(shapes)
    ]
    bottoms = " ".join(f'bottom: "i{i}"' for i in range(len(shapes)))
    return "\n".join([*inputs, f'layer {{ name: "l" type: "{kind}" {bottoms} top: "t" {settings} }}'])


def test_constant() -> None:
    np.testing.assert_array_equal(fill(Filler(value=2.5), (2, 3), random()), np.full((2, 3), 2.5, np.float32))


def test_uniform() -> None:
    made = fill(Filler("uniform", low=-1, high=3), MANY, random())
    assert made.dtype == np.float32
    assert -1 <= made.min() < -0.99 and 2.99 < made.max() < 3
    assert made.mean() == pytest.approx(1, abs=0.02) and made.var() == pytest.approx(16 / 12, rel=0.02)


def test_gaussian() -> None:
    made = fill(Filler("gaussian", mean=2, std=0.5), MANY, random())
    assert made.mean() == pytest.approx(2, abs=0.01) and made.std() == pytest.approx(0.5, rel=0.01)
    assert ((made - 2) ** 3).mean() == pytest.approx(0, abs=0.01)
    assert (((made - 2) / 0.5) ** 4).mean() == pytest.approx(3, rel=0.03)


def test_sparse_gaussian_keeps_so_many_of_a_column() -> None:
    made = fill(Filler("gaussian", std=1, sparse=20), MANY, random())
    assert (made != 0).mean() == pytest.approx(20 / 200, rel=0.05)
    assert made[made != 0].std() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("norm", "n"), [("FAN_IN", 1000), ("FAN_OUT", 4000), ("AVERAGE", 2500)])
def test_xavier_and_msra(norm: str, n: int) -> None:
    bound = np.sqrt(3 / n)
    xavier = fill(Filler("xavier", variance_norm=norm), MANY, random())
    assert np.abs(xavier).max() <= bound and np.abs(xavier).max() > 0.999 * bound
    assert xavier.var() == pytest.approx(1 / n, rel=0.02)
    msra = fill(Filler("msra", variance_norm=norm), MANY, random())
    assert msra.var() == pytest.approx(2 / n, rel=0.02)
    assert np.abs(msra).max() > 3.5 * np.sqrt(2 / n)  # no uniform distribution


def test_positive_unitball() -> None:
    made = fill(Filler("positive_unitball"), (7, 3, 2), random())
    np.testing.assert_allclose(made.reshape(7, -1).sum(1), 1, rtol=1e-6)
    assert made.min() >= 0 and made.std() > 0.05


def test_bilinear() -> None:
    even = np.outer([0.25, 0.75, 0.75, 0.25], [0.25, 0.75, 0.75, 0.25])
    odd = np.outer([0.5, 1, 0.5], [0.5, 1, 0.5])
    np.testing.assert_allclose(
        fill(Filler("bilinear"), (2, 1, 4, 4), random()), even[None, None].repeat(2, 0)
    )
    np.testing.assert_allclose(fill(Filler("bilinear"), (1, 1, 3, 3), random()), odd[None, None])
    with pytest.raises(ShapeError, match="square"):
        fill(Filler("bilinear"), (1, 1, 3, 4), random())


def test_the_generator_alone_decides() -> None:
    first, again = (fill(Filler("gaussian"), (3, 4), random()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, fill(Filler("gaussian"), (3, 4), np.random.default_rng(4)))


@pytest.mark.parametrize(
    ("given", "cause"), [('type: "xavierr"', '"xavierr"'), ('type: "msra" sparse: 3', "sparse")]
)
def test_what_caffe_refuses(given: str, cause: str) -> None:
    document = parse(given)
    with pytest.raises(NetError, match=cause):
        fillers.read(Typed(document.root, "FillerParameter", document))


def test_a_convolution_starts_from_its_fillers() -> None:
    weight, bias = starts(
        one_layer(
            "Convolution",
            'convolution_param { num_output: 40 kernel_size: 5 weight_filler { type: "xavier" } '
            'bias_filler { type: "constant" value: 0.2 } }',
            (1, 20, 9, 9),
        )
    )
    assert weight.shape == (40, 20, 5, 5)
    assert weight.var() == pytest.approx(1 / 500, rel=0.05)
    np.testing.assert_array_equal(bias, np.full(40, 0.2, np.float32))


@pytest.mark.parametrize(
    ("kind", "settings", "shapes", "wanted"),
    [
        ("Convolution", "convolution_param { num_output: 2 kernel_size: 1 }", [(1, 3, 2, 2)], (0, 0)),
        ("InnerProduct", "inner_product_param { num_output: 2 bias_term: false }", [(1, 3)], (0,)),
        ("BatchNorm", "", [(2, 3, 2, 2)], (0, 0, 0)),
        ("Scale", "", [(2, 3)], (1,)),
        (
            "Scale",
            "scale_param { bias_term: true filler { value: 3 } bias_filler { value: 4 } }",
            [(2, 3)],
            (3, 4),
        ),
        ("Scale", "scale_param { axis: 0 bias_term: true bias_filler { value: 4 } }", [(2, 3), (2, 3)], (4,)),
        ("Bias", "", [(2, 3)], (0,)),
        ("PReLU", "", [(2, 3)], (0.25,)),
        ("Parameter", "parameter_param { shape { dim: 2 } }", [], (0,)),
        ("Embed", "embed_param { num_output: 2 input_dim: 3 bias_filler { value: 1 } }", [(4,)], (0, 1)),
        (
            "LSTM",
            "recurrent_param { num_output: 2 weight_filler { value: 0.5 } bias_filler { value: 0.1 } }",
            [(3, 1, 4), (3, 1)],
            (0.5, 0.1, 0.5),
        ),
    ],
)
def test_starts_by_layer_type(
    kind: str, settings: str, shapes: list[tuple[int, ...]], wanted: tuple[float, ...]
) -> None:
    made = starts(one_layer(kind, settings, *shapes))
    assert len(made) == len(wanted)
    for blob, value in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(blob, np.full(blob.shape, value, np.float32))


def test_a_type_whose_start_is_not_known() -> None:
    source = one_layer("SymmetricRectify", "", (2, 3, 1, 1))
    with pytest.raises(UnsupportedError, match="SymmetricRectify"):
        starts(source)


@needs_shared
@pytest.mark.parametrize("name", ["deconv_bilinear_odd"])
def test_fillers_that_are_not_random_give_what_caffe_gives(name: str) -> None:
    folder = SHARED / "oracle" / "cases" / name
    io = json.loads((folder / "io.json").read_text())
    model = load(folder / "net.prototxt", folder / "weights.caffemodel", phase=io["phase"].upper())
    shaped = infer(graph.build(model.net))
    assert model.weights is not None
    compared = 0
    for index, node in enumerate(shaped.graph.nodes):
        shapes = shaped.blobs(index)
        if shapes:
            request = Request(
                node.layer, Typed(node.layer.message, "LayerParameter", node.layer.document), "TEST"
            )
            made = initial(request, shapes, random())
            np.testing.assert_allclose(made[0], model.weights[node.name][0].reshape(shapes[0]), rtol=1e-6)
            compared += 1
    assert compared
