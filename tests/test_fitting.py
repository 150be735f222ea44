"""Chains fitted to responses: exact where they can be, better than the weights' own where not, bias and BatchNorm included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import caffe_proto as cp
import lra
from caffe_proto import binding, graph
from caffe_proto.errors import Error, PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.net import parse
from caffe_proto.shape_inference import infer
from caffe_proto.weights import NewEntry, Weights
from lra.calibration import Calibration
from lra.digits import drawn
from lra.following import following
from lra.walk import Places

MODELS = Path(__file__).resolve().parents[1] / "models"
LENET = (MODELS / "lenet" / "lenet.prototxt", MODELS / "lenet" / "lenet.caffemodel")

RESIDUAL = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 dim: 12 dim: 10 } } }
layer { name: "stem" type: "Convolution" bottom: "data" top: "stem" convolution_param { num_output: 8 kernel_size: 1 } }
layer { name: "a" type: "Convolution" bottom: "stem" top: "a"
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "scale" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 8 kernel_size: 3 pad: 1 group: 2 } }
layer { name: "sum" type: "Eltwise" bottom: "stem" bottom: "b" top: "sum" }
layer { name: "out" type: "ReLU" bottom: "sum" top: "sum" relu_param { negative_slope: 0.1 } }
"""


def residual() -> Model:
    rng = np.random.default_rng(3)
    shapes = {"stem": [(8, 4, 1, 1), (8,)], "a": [(8, 8, 3, 3)], "b": [(8, 4, 3, 3), (8,)]}
    blobs = {name: [rng.standard_normal(shape) / 3 for shape in found] for name, found in shapes.items()}
    blobs["bn"] = [rng.standard_normal(8), rng.random(8) + 0.5, np.ones(1)]
    blobs["scale"] = [rng.standard_normal(8), rng.standard_normal(8)]
    entries = [
        NewEntry(name, tuple(np.asarray(one, np.float32) for one in arrays)) for name, arrays in blobs.items()
    ]
    return Model(parse(RESIDUAL), Weights(entries))


def images(n: int = 60) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((n, 4, 12, 10)).astype(np.float32)


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    with cp.session(model, threads=1) as opened:
        (made,) = opened.run({"data": x}).values()
    return made


def apart(model: Model, other: Model, x: np.ndarray) -> float:
    mine, theirs = outputs(model, x), outputs(other, x)
    return float(np.linalg.norm(theirs - mine) / np.linalg.norm(mine))


def test_what_follows_a_layer() -> None:
    model = residual()
    shaped = infer(graph.build(model.net))
    blobs = binding.bind(shaped, model.weights)
    index = {node.name: i for i, node in enumerate(shaped.graph.nodes)}
    a, b = (following(shaped, blobs, index[name]) for name in "ab")
    mean, var, _ = blobs[index["bn"]]
    gamma, beta = blobs[index["scale"]]
    root = np.sqrt(var.astype(np.float64) + 1e-5)
    np.testing.assert_allclose(a.scale, gamma / root, rtol=1e-6)
    np.testing.assert_allclose(a.shift, beta - mean * gamma / root, rtol=1e-5, atol=1e-7)
    assert a.shortcut is None and (a.slope == 0).all()
    assert b.shortcut is not None and shaped.graph.blob(b.shortcut) == "stem"
    np.testing.assert_allclose(b.slope, 0.1, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["spatial", "pca"])
def test_full_rank_reproduces_the_net(scheme: str) -> None:
    """Nothing is lost at full rank, so the fit finds the layers themselves, borders, groups and bias included."""
    model, x = residual(), images()
    ranks = [24, 24] if scheme == "spatial" else [8, 8]
    plan = lra.make_plan(model, scheme=scheme, ranks=ranks, only=["a", "b"], even_if_slower=True, images=x)
    fitted, report = lra.apply(plan, model, images=x)
    fresh = np.random.default_rng(9).standard_normal((7, 4, 12, 10)).astype(np.float32)
    assert apart(model, fitted, fresh) < 2e-3
    assert [row.error_of for row in report.rows] == ["responses", "responses"]
    assert all(row.error is not None and row.error < 2e-3 for row in report.rows)


def test_a_layer_without_bias_gains_one_and_batch_norm_stays() -> None:
    model, x = residual(), images()
    plan = lra.make_plan(model, scheme="spatial", ranks=[6, 8], only=["a", "b"], images=x)
    fitted, _ = lra.apply(plan, model, images=x)
    assert [layer.name for layer in fitted.net.layers][2:6] == ["a_v", "a_h", "bn", "scale"]
    assert fitted.net.layer("a_h").message.last("convolution_param").value.string("bias_term") == "true"  # type: ignore[union-attr]
    assert fitted.weights is not None and len(fitted.weights["a_h"]) == 2


def test_fitting_beats_the_weights_alone_on_fresh_input() -> None:
    model, x = residual(), images(150)
    given = {"scheme": "spatial", "ranks": [6, 8], "only": ["a", "b"]}
    plain, _ = lra.apply(lra.make_plan(model, **given), model)  # type: ignore[arg-type]
    fitted, _ = lra.apply(lra.make_plan(model, **given, images=x), model, images=x)  # type: ignore[arg-type]
    fresh = np.random.default_rng(9).standard_normal((20, 4, 12, 10)).astype(np.float32)
    assert apart(model, fitted, fresh) < 0.9 * apart(model, plain, fresh)


def test_lenet_on_drawn_digits() -> None:
    model = cp.load(*LENET)
    calibration, _ = drawn(300, seed=1)
    test, _ = drawn(300, seed=2)
    given = {"scheme": "spatial", "speedup": 3.0, "scope": "conv"}
    plain, _ = lra.apply(lra.make_plan(model, **given), model)  # type: ignore[arg-type]
    plan = lra.make_plan(model, **given, images=calibration)  # type: ignore[arg-type]
    fitted, report = lra.apply(plan, model, images=calibration)
    reference = outputs(model, test).argmax(axis=1)
    agree = [np.mean(outputs(one, test).argmax(axis=1) == reference) for one in (plain, fitted)]
    assert agree[1] >= agree[0] and agree[1] > 0.97
    assert report.conv_macs[0] >= 3 * report.conv_macs[1]


def test_same_plan_and_images_same_bytes() -> None:
    model, x = residual(), images()
    plan = lra.make_plan(model, scheme="spatial", ranks=[6, 8], only=["a", "b"], images=x)
    first, second = (lra.apply(plan, model, images=x)[0].weights for _ in range(2))
    assert first is not None and second is not None
    for name in first:
        for one, other in zip(first[name], second[name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_plan_remembers_its_images() -> None:
    model, x = residual(), images()
    plan = lra.make_plan(model, scheme="spatial", ranks=[6, 8], only=["a", "b"], images=x)
    assert lra.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(UsageError, match="give the images"):
        lra.apply(plan, model)
    with pytest.raises(PlanError, match="other images"):
        lra.apply(plan, model, images=x + 1)
    lra.apply(plan, model, images=x + 1, force=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((3, 4, 5, 5), np.float32), "the images have shape 4 x 5 x 5"),
        ({"nope": np.zeros((3, 4, 12, 10), np.float32)}, '"nope" is no input'),
        (np.zeros((0, 4, 12, 10), np.float32), "there are no images"),
    ],
)
def test_wrong_images_are_refused(given: object, words: str) -> None:
    model = residual()
    with pytest.raises(Error, match=words):
        lra.apply(
            lra.make_plan(model, scheme="spatial", ranks=[6, 8], only=["a", "b"], images=given),
            model,
            images=given,
        )


def test_places_are_drawn_without_replacement() -> None:
    places = Places.draw(np.random.default_rng(0), 5, (3, 4), 9)
    for image in range(5):
        mine = places.images == image
        spots = set(zip(places.rows[mine].tolist(), places.columns[mine].tolist(), strict=True))
        assert len(spots) == 9
    assert len(Places.draw(np.random.default_rng(0), 2, (2, 2), 100)) == 8


def test_calibration_takes_arrays_by_blob() -> None:
    built = graph.build(residual().net)
    x = images(4)
    assert Calibration.of(built, {"data": x}).record() == Calibration.of(built, x).record()


def test_the_response_scheme_is_exact_at_full_rank() -> None:
    model, x = residual(), images()
    given = {"scheme": "response", "ranks": [8, 8], "only": ["a", "b"], "even_if_slower": True}
    fitted, _ = lra.apply(lra.make_plan(model, **given, images=x), model, images=x)  # type: ignore[arg-type]
    assert apart(model, fitted, images(9)) < 2e-3
    assert [layer.name for layer in fitted.net.layers][2:4] == ["a_lowrank", "a_linear"]


def test_response_energies_choose_the_ranks() -> None:
    """The PCA energy that is retained of the folded responses, in every group: Zhang et al., eq. 13."""
    model, x = residual(), images()
    plan = lra.make_plan(model, scheme="response", energy=0.9, only=["a"], images=x, even_if_slower=True)
    built = graph.build(model.net)
    shaped = infer(built)
    index = next(i for i, node in enumerate(built.nodes) if node.name == "a")
    behind = following(shaped, binding.bind(shaped, model.weights), index)
    with cp.session(
        Model(parse(RESIDUAL.split('layer { name: "bn"')[0]), model.weights), threads=1
    ) as opened:
        (maps,) = opened.run({"data": x}).values()
    flat = maps.transpose(0, 2, 3, 1).reshape(-1, 8) * behind.scale
    energies = np.linalg.eigvalsh(np.cov(flat, rowvar=False))[::-1]
    expected = int(np.searchsorted(np.cumsum(energies) / energies.sum(), 0.9)) + 1
    assert abs(plan.layers["a"].ranks[0] - expected) <= 1  # sampled places against all of them


def test_response_at_a_speedup_beats_filters_from_the_weights_alone() -> None:
    model = cp.load(*LENET)
    calibration, _ = drawn(300, seed=1)
    test, _ = drawn(300, seed=2)
    plain, _ = lra.apply(lra.make_plan(model, scheme="pca", speedup=2.0), model)
    plan = lra.make_plan(model, scheme="response", speedup=2.0, images=calibration)
    fitted, report = lra.apply(plan, model, images=calibration)
    assert report.macs[0] >= 2 * report.macs[1]
    assert apart(model, fitted, test) < apart(model, plain, test)


def test_the_response_scheme_needs_images() -> None:
    with pytest.raises(UsageError, match="fits responses"):
        lra.make_plan(residual(), scheme="response", ranks=[4, 4], only=["a", "b"])
