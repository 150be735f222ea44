"""Chains fitted to responses: exact where they can be, better than the weights' own where not, bias and BatchNorm included."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest

import caffe_proto as cp
import lra
from caffe_proto import binding, graph
from caffe_proto.errors import Error, PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.net import parse
from caffe_proto.runtime import Engine
from caffe_proto.shape_inference import infer
from caffe_proto.weights import NewEntry, Weights
from lra import fitting, responses
from lra.calibration import Calibration
from lra.decomposition import Step
from lra.digits import drawn
from lra.following import following
from lra.options import options
from lra.plan import REFIT, LayerPlan
from lra.schemes import asymmetric3d, response, spatial
from lra.stage import Stage
from lra.targets import Spectra, Target, find
from lra.walk import Chain, Places, Window, patches

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


@pytest.mark.parametrize("scheme", ["response", "spatial"])
def test_responses_that_are_no_numbers_are_one_error(scheme: str) -> None:
    """A variance below 0 makes NaN in Caffe too; the first layer that has to do with it is named."""
    model = residual()
    assert model.weights is not None
    entries = [NewEntry(name, tuple(np.array(one) for one in model.weights[name])) for name in model.weights]
    bad = next(entry for entry in entries if entry.name == "bn")
    bad.arrays[1][:] = -1.0
    broken = Model(model.net, Weights(entries))
    with pytest.raises(Error, match="not finite") as caught:
        plan = lra.make_plan(broken, scheme=scheme, speedup=1.2, images=images())
        lra.apply(plan, broken, images=images())
    assert caught.value.layer == "a"


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
    with pytest.raises(UsageError, match='"photos" is a name, images are arrays here'):
        Calibration.of(built, "photos")


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


# --- asymmetric 3-D -------------------------------------------------------------------------------

SHAPES = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 dim: 13 dim: 11 } } }
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 16 kernel_size: 3 pad: 1 } }
layer { name: "ra" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b"
  convolution_param { num_output: 16 kernel_h: 5 kernel_w: 3 pad_h: 3 pad_w: 1 stride_h: 1 stride_w: 2 group: 2 } }
layer { name: "rb" type: "ReLU" bottom: "b" top: "b" }
layer { name: "c" type: "Convolution" bottom: "b" top: "c"
  convolution_param { num_output: 12 kernel_size: 3 pad: 2 stride: 2 dilation: 2 bias_term: false } }
"""
CONVS = ("a", "b", "c")
ASYMMETRIC = asymmetric3d.ASYMMETRIC_3D


def shapes_images(n: int = 60, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 4, 13, 11)).astype(np.float32)


@pytest.fixture(scope="module")
def shapes() -> Model:
    return nets.model(SHAPES)


def ranks_of(plan: lra.Plan) -> dict[str, tuple[int, ...]]:
    return {name: entry.ranks for name, entry in plan.layers.items()}


def test_asymmetric_by_ranks(shapes: Model) -> None:
    """One rank stands for both; two are d'' and d'."""
    x = shapes_images(20)
    given = {"scheme": "asymmetric-3d", "images": x, "even_if_slower": True}
    assert ranks_of(lra.make_plan(shapes, ranks=[5, 4, 3], **given)) == {
        "a": (5, 5),
        "b": (4, 4),
        "c": (3, 3),
    }  # type: ignore[arg-type]
    config = {"a": 4, "b": {"ranks": [6, 10]}, "c": {"scheme": "spatial", "rank": 5}}
    plan = lra.make_plan(shapes, rank_config=config, **given)  # type: ignore[arg-type]
    assert ranks_of(plan) == {"a": (4, 4), "b": (6, 10), "c": (5,)}
    with pytest.raises(UsageError, match=r'layer "b".*not a multiple of group 2'):
        lra.make_plan(shapes, ranks=[5, 3, 3], **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="3 ranks, asymmetric-3d takes 2"):
        lra.make_plan(shapes, rank_config={"a": {"ranks": [1, 2, 3]}}, **given)  # type: ignore[arg-type]


def energies(model: Model, x: np.ndarray) -> Spectra:
    """The factorizations, with those of sampled responses."""
    found = find(model)
    spectra = Spectra(found)
    lra.make_plan(
        model,
        scheme="response",
        ranks=[16, 16, 12],
        even_if_slower=True,
        images=x,
        found=found,
        spectra=spectra,
    )
    return spectra


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("energy", [0.6, 0.9])
def test_asymmetric_by_energy(shapes: Model, energy: float, same: bool) -> None:
    """Each of the two splits retains the root of the energy in its worst group, and no rank is wasted."""
    x = shapes_images(40)
    spectra = energies(shapes, x)
    plan = lra.make_plan(
        shapes, scheme="asymmetric-3d", energy=energy, images=x, same_ranks=same, even_if_slower=True
    )
    for name, (inner, outer) in ranks_of(plan).items():
        target = spectra.found.targets[name]
        wanted = [
            spectra.get(target, scheme).rank_for(energy**0.5)
            for scheme in (spatial.SPATIAL, response.RESPONSE)
        ]
        most = ASYMMETRIC.max_rank(target.shape, target.geometry.group)
        assert [inner, outer] == ([min(max(wanted), most)] * 2 if same else wanted)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("speedup", [1.5, 2.5])
def test_asymmetric_by_speedup(shapes: Model, speedup: float, same: bool) -> None:
    """The budget is met, and no layer could have other ranks of less loss within it."""
    x = shapes_images(40)
    spectra = energies(shapes, x)
    plan = lra.make_plan(shapes, scheme="asymmetric-3d", speedup=speedup, images=x, same_ranks=same)
    fitted, report = lra.apply(plan, shapes, images=x)
    budget = report.macs[0] / speedup
    assert report.macs[1] == cp.cost(fitted).macs <= budget
    assert plan.layers
    for name, entry in plan.layers.items():
        target = spectra.found.targets[name]
        assert not same or entry.ranks[0] == entry.ranks[1]
        offered = {option.key: option for option in options(target, ASYMMETRIC, spectra, 1, same)}
        chosen = offered["asymmetric-3d", entry.ranks]
        assert entry.macs == (target.macs, chosen.cost)
        for option in offered.values():
            assert option.loss >= chosen.loss or report.macs[1] - chosen.cost + option.cost > budget


def chain_of(model: Model, name: str, target: Target, ranks: tuple[int, ...]) -> list[Step]:
    """The steps of a layer with the numbers that a model holds."""
    steps = []
    for shape in ASYMMETRIC.chain(target.shape, target.geometry, ranks):
        weight, *bias = nets.stored(model)[name + shape.suffix]
        steps.append(
            Step(
                shape.suffix,
                weight,
                bias[0] if bias else None,
                shape.stride,
                shape.pad,
                shape.dilation,
                shape.group,
            )
        )
    return steps


def test_asymmetric_writes_the_chain_it_fitted(shapes: Model) -> None:
    """Three layers, or two where H and P are cheaper in one; the net computes what they do one after another."""
    x = shapes_images()
    config = {"a": {"ranks": [6, 8]}, "b": {"ranks": [4, 16]}, "c": {"ranks": [9, 6]}}
    plan = lra.make_plan(shapes, scheme="asymmetric-3d", rank_config=config, images=x, even_if_slower=True)
    fitted, _ = lra.apply(plan, shapes, images=x)
    names = [layer.name for layer in fitted.net.layers if layer.type == "Convolution"]
    assert names == ["a_v", "a_h", "a_linear", "b_v", "b_h", "c_v", "c_h", "c_linear"]
    targets = find(shapes).targets
    fresh = maps = shapes_images(5, 9)
    for name in CONVS:
        steps = chain_of(fitted, name, targets[name], plan.layers[name].ranks)
        assert [step.bias is not None for step in steps] == [False] * (len(steps) - 1) + [True]
        maps = Chain(steps, Engine(1), maps.shape)(maps)
        maps = maps if name == "c" else np.maximum(maps, 0)
    np.testing.assert_allclose(outputs(fitted, fresh), maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", fitting.SOLVERS)
def test_asymmetric_at_full_ranks_is_the_net_itself(shapes: Model, solver: str) -> None:
    x = shapes_images()
    config = {
        name: {"ranks": [spatial.max_rank(target.shape, target.geometry.group), target.shape[0]]}
        for name, target in find(shapes).targets.items()
    }
    plan = lra.make_plan(
        shapes, scheme="asymmetric-3d", rank_config=config, images=x, even_if_slower=True, solver=solver
    )
    fitted, report = lra.apply(plan, shapes, images=x)
    assert apart(shapes, fitted, shapes_images(5, 9)) < 1e-5
    assert all(row.error is not None and row.error < 1e-5 for row in report.rows)


def held_out_error(model: Model, fitted: Model, x: np.ndarray, blob: str, name: str) -> float:
    """``|r(y') - r(y)| / |r(y)|`` at the sampled places of a layer in the last tenth of the samples."""
    calibration = Calibration.of(graph.build(model.net), x)
    found = find(model)
    places = calibration.walker(found).places(found.targets[name])
    kept = len(places) - round(0.1 * len(places))
    here = Places(places.images[kept:], places.rows[kept:], places.columns[kept:])
    mine, theirs = (here.take(blobs_of(one, x, blob)) for one in (model, fitted))
    return float(np.linalg.norm(theirs - mine) / np.linalg.norm(mine))


def blobs_of(model: Model, x: np.ndarray, blob: str) -> np.ndarray:
    with cp.session(model, [blob], threads=1) as opened:
        return opened.run({"data": x})[blob]


@pytest.mark.parametrize("scheme", ["asymmetric-3d", "spatial", "pca", "response"])
def test_the_error_is_that_of_held_out_responses(shapes: Model, scheme: str) -> None:
    """Behind the activation, in the approximated net as it is written."""
    x = shapes_images()
    plan = lra.make_plan(shapes, scheme=scheme, ranks=[6, 6, 4], images=x, even_if_slower=True)
    fitted, report = lra.apply(plan, shapes, images=x)
    for row in report.rows:
        assert row.error_of == "responses" and row.error is not None and row.error > 0.05
        assert row.error == pytest.approx(held_out_error(shapes, fitted, x, row.name, row.name), rel=1e-3)


# --- layers that are left whole -------------------------------------------------------------------


def refit(model: Model, x: np.ndarray, *names: str, **layers: LayerPlan) -> tuple[Model, lra.Report]:
    """Refit some layers, treat some others."""
    record = Calibration.of(graph.build(model.net), x).record()
    entries = {**layers, **{name: LayerPlan(REFIT, ()) for name in names}}
    return lra.apply(lra.Plan(entries, target={"fit": record}), model, images=x)


@pytest.mark.parametrize("n", [60, 4])  # with few images a map of the responses is fitted
def test_refit_behind_the_original_net_is_the_identity(n: int) -> None:
    model = residual()
    fitted, report = refit(model, images(n), "stem", "a", "b")
    for name in ("stem", "a", "b"):
        for one, other in zip(nets.stored(fitted)[name], nets.stored(model)[name], strict=False):
            np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())
    assert apart(model, fitted, images(7)) < 1e-4
    assert [(row.scheme, row.ranks, row.full_rank) for row in report.rows] == [("refit", (), None)] * 3
    assert all(row.macs and row.macs[0] == row.macs[1] for row in report.rows)


def test_refit_repairs_what_a_lossy_layer_broke(shapes: Model) -> None:
    x, fresh = shapes_images(150), shapes_images(40, 9)
    lossy = LayerPlan("spatial", (4,))
    alone, _ = refit(shapes, x, a=lossy)
    fitted, report = refit(shapes, x, "b", "c", a=lossy)
    assert apart(shapes, fitted, fresh) < 0.95 * apart(shapes, alone, fresh)
    rows = {row.name: row.error for row in report.rows}
    for blob in "bc":
        assert rows[blob] == pytest.approx(held_out_error(shapes, fitted, x, blob, blob), rel=1e-3)
        assert (rows[blob] or 1) < held_out_error(shapes, alone, x, blob, blob)


def test_refit_leaves_the_text_but_for_a_bias_that_is_new() -> None:
    model = residual()
    fitted, _ = refit(model, images(), "stem", "a", "b")
    assert fitted.net.text == RESIDUAL.replace("bias_term: false", "bias_term: true")
    assert {name: len(nets.stored(fitted)[name]) for name in ("stem", "a", "b")} == {
        "stem": 2,
        "a": 2,
        "b": 2,
    }
    biased, _ = refit(model, images(), "stem", "b")
    assert biased.net.text == RESIDUAL and len(nets.stored(biased)["a"]) == 1


DENSE = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 dim: 5 dim: 6 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "flat" type: "Flatten" bottom: "conv" top: "flat" }
layer { name: "fc1" type: "InnerProduct" bottom: "flat" top: "fc1" inner_product_param { num_output: 20 transpose: true } }
layer { name: "relu" type: "ReLU" bottom: "fc1" top: "fc1" }
layer { name: "fc2" type: "InnerProduct" bottom: "fc1" top: "fc2" inner_product_param { num_output: 7 bias_term: false } }
"""


@pytest.mark.parametrize("n", [200, 2500])  # fc1 reads 72 numbers
def test_fully_connected_layers_are_refitted(n: int) -> None:
    model = nets.model(DENSE)
    rng = np.random.default_rng(5)
    mix = rng.standard_normal((30, 120))  # what a lossy layer drops can be told from what it keeps
    draws = rng.standard_normal((n + 200, 30)) @ mix + 0.3 * rng.standard_normal((n + 200, 120))
    x, fresh = np.split(draws.reshape(-1, 4, 5, 6).astype(np.float32), [n])
    same, _ = refit(model, x, "conv", "fc1", "fc2")
    assert apart(model, same, fresh) < 1e-4
    for name in ("conv", "fc1", "fc2"):
        shapes_now = [blob.shape for blob in nets.stored(same)[name]]
        assert shapes_now[0] == nets.stored(model)[name][0].shape and len(shapes_now) == 2
    lossy = LayerPlan("spatial", (4,))
    errors = []
    for names in ((), ("fc1", "fc2")):
        fitted, _ = refit(model, x, *names, conv=lossy)
        errors.append(apart(model, fitted, fresh))
    assert errors[1] < errors[0]
    if n == 2500:  # the layer's inputs, not its responses, are what the fit can choose from
        with cp.session(refit(model, x, "fc1", conv=lossy)[0], ["flat", "fc1"], threads=1) as opened:
            made = opened.run({"data": x})
        ones = np.column_stack([made["flat"], np.ones(n)])[: n - n // 10]
        solution = np.linalg.lstsq(ones, raw_fc1(model, x)[: len(ones)], rcond=None)[0]
        wanted, found = (blobs[: len(ones)] for blobs in (blobs_of(model, x, "fc1"), made["fc1"]))
        linear = np.maximum(ones @ solution, 0)
        assert np.linalg.norm(found - wanted) < 1.02 * np.linalg.norm(linear - wanted)


def raw_fc1(model: Model, x: np.ndarray) -> np.ndarray:
    """fc1 before its ReLU."""
    weight, bias = nets.stored(model)["fc1"]
    return np.asarray(blobs_of(model, x, "flat") @ weight + bias)


def test_what_is_refitted_is_what_was_kept() -> None:
    model, x = residual(), images()
    plan = lra.make_plan(model, scheme="spatial", ranks=[6], only=["a"], images=x, refit_kept=True)
    assert {name: entry.scheme for name, entry in plan.layers.items()} == {
        "stem": "refit", "a": "spatial", "b": "refit",
    }  # fmt: skip
    assert not plan.kept
    excepted = lra.make_plan(
        model, scheme="spatial", ranks=[6], except_layers=["b", "stem"], images=x, refit_kept=True
    )
    assert list(excepted.layers) == ["a"] and excepted.kept == {"stem": "excepted", "b": "excepted"}
    assert lra.Plan.from_json(plan.to_json()) == plan
    bare, report = lra.apply(plan, Model(model.net), images=x)  # without weights the shape alone changes
    assert [row.name for row in report.rows] == ["a"] and "a_h" in [layer.name for layer in bare.net.layers]


# --- layers that cannot be fitted -----------------------------------------------------------------

HEAD = nets.inputs(data=(1, 4, 9, 9)) + (
    'layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 8 kernel_size: 3 } }\n'
)
UNFIT = {
    "layer that cannot be run": (
        'layer { name: "py" type: "Python" bottom: "a" top: "p" python_param { module: "m" layer: "L" } }\n'
        'layer { name: "b" type: "Convolution" bottom: "p" top: "b" convolution_param { num_output: 8 kernel_size: 3 } }\n',
        {"b": r'cannot be fitted.*"?py'},
    ),
    "shared": (
        'layer { name: "b" type: "Convolution" bottom: "a" top: "b" param { name: "w" } convolution_param { num_output: 8 kernel_size: 3 } }\n'
        'layer { name: "c" type: "Convolution" bottom: "b" top: "c" param { name: "w" } convolution_param { num_output: 8 kernel_size: 3 } }\n',
        {"b": 'shares its weight "w"', "c": 'shares its weight "w"'},
    ),
    "shared bias": (
        'layer { name: "b" type: "Convolution" bottom: "a" top: "b" param { } param { name: "v" } convolution_param { num_output: 8 kernel_size: 3 } }\n'
        'layer { name: "c" type: "Deconvolution" bottom: "b" top: "c" param { } param { name: "v" } convolution_param { num_output: 8 kernel_size: 3 } }\n',
        {"b": 'shares its bias "v"'},
    ),
    "several bottoms": (
        'layer { name: "b" type: "Convolution" bottom: "a" bottom: "a" top: "b" top: "b2" convolution_param { num_output: 8 kernel_size: 3 } }\n',
        {"b": "it has 2 inputs"},
    ),
    "several places": (
        'layer { name: "b" type: "InnerProduct" bottom: "a" top: "b" inner_product_param { num_output: 5 axis: 2 } }\n',
        {"b": "several places of each image"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_layers_that_cannot_be_fitted_are_kept_with_the_reason(case: str) -> None:
    source, reasons = UNFIT[case]
    parsed = parse(HEAD + source)
    known = parse(HEAD) if "Python" in source else parsed
    weights = nets.random_weights(known)
    if known is not parsed:
        blobs = [np.ones((8, 5, 3, 3), np.float32), np.ones(8, np.float32)]
        weights = Weights(
            [*(NewEntry(name, tuple(weights[name])) for name in weights), NewEntry("b", tuple(blobs))]
        )
    model = Model(parsed, weights)
    x = np.random.default_rng(5).standard_normal((20, 4, 9, 9)).astype(np.float32)
    for given in ({"scheme": "spatial", "energy": 0.5}, {"scheme": "asymmetric-3d", "energy": 0.5}):
        plan = lra.make_plan(model, fc=True, images=x, even_if_slower=True, refit_kept=True, **given)  # type: ignore[arg-type]
        assert list(plan.layers) == ["a"]
        assert set(plan.kept) == set(reasons)
        for name, reason in reasons.items():
            assert re.search(reason, plan.kept[name])
        fitted, report = lra.apply(plan, model, images=x)
        assert report.kept == plan.kept
        for name in reasons:
            for one, other in zip(nets.stored(fitted)[name], nets.stored(model)[name], strict=True):
                np.testing.assert_array_equal(one, other)
    forced = lra.Plan({"b": LayerPlan(REFIT, ())}, target=plan.target)
    with pytest.raises(PlanError, match=r'layer "b".*cannot be refitted'):
        lra.apply(forced, model, images=x)


def test_nothing_left_to_fit() -> None:
    source, _ = UNFIT["shared"]
    model = nets.model(HEAD + source)
    x = np.zeros((5, 4, 9, 9), np.float32)
    with pytest.raises(UsageError, match=r"no layer is left to decompose.*b: it cannot be fitted"):
        lra.make_plan(model, scheme="spatial", energy=0.5, images=x, only=["b", "c"])


# --- samples and solvers --------------------------------------------------------------------------


def test_few_samples_are_said_and_still_give_a_net(shapes: Model) -> None:
    x = shapes_images(1)
    calibration = Calibration.of(graph.build(shapes.net), x, positions=4)
    for scheme in ("asymmetric-3d", "spatial", "pca", "response"):
        plan = lra.make_plan(shapes, scheme=scheme, ranks=[4, 4, 4], images=calibration, even_if_slower=True)
        fitted, report = lra.apply(plan, shapes, images=calibration)
        few = [warning for warning in report.warnings if "more --n-images or --positions" in warning]
        assert len(few) == 1 and "a" in few[0].split(":")[0].split(", ")
        assert all(
            np.isfinite(blob).all() for name in nets.stored(fitted) for blob in nets.stored(fitted)[name]
        )
        plain, _ = lra.apply(lra.make_plan(shapes, scheme="spatial", ranks=[4, 4, 4]), shapes)
        assert np.isfinite(outputs(fitted, shapes_images(3))).all()
        if scheme == "spatial":  # the weights decide what four places do not
            assert apart(shapes, fitted, shapes_images(20)) < 2 * apart(shapes, plain, shapes_images(20))
    enough = Calibration.of(graph.build(shapes.net), shapes_images(60))
    _, report = lra.apply(plan, shapes, images=enough, force=True)
    assert not any("more --n-images" in warning for warning in report.warnings)


def fitted_by(model: Model, solver: str, x: np.ndarray, **ranks: int) -> Mapping[str, Any]:
    plan = lra.make_plan(
        model, scheme="spatial", rank_config=ranks, images=x, even_if_slower=True, solver=solver
    )
    return nets.stored(lra.apply(plan, model, images=x)[0])


def test_symmetric_fits_every_layer_as_if_it_were_the_only_one(shapes: Model) -> None:
    x = shapes_images()
    for solver, alike in (("symmetric", True), ("asymmetric", False), ("linear", False)):
        alone, behind = (fitted_by(shapes, solver, x, **ranks) for ranks in ({"b": 8}, {"a": 4, "b": 8}))
        weights = [found["b_h"][0] for found in (alone, behind)]
        assert np.allclose(*weights, rtol=1e-3, atol=1e-4) is alike


def test_linear_is_least_squares(shapes: Model) -> None:
    """The first layer's responses regressed on what H sees of V's maps, its ReLU not minded."""
    x = shapes_images()
    found = find(shapes)
    weights = fitted_by(shapes, "linear", x, a=4)
    assert not np.allclose(weights["a_h"][0], fitted_by(shapes, "asymmetric", x, a=4)["a_h"][0], atol=1e-3)
    target = found.targets["a"]
    vertical, horizontal = spatial.SPATIAL.chain(target.shape, target.geometry, (4,))
    v = Chain(
        [Step("_v", weights["a_v"][0], None, vertical.stride, vertical.pad, vertical.dilation)],
        Engine(1),
        x.shape,
    )(x)
    places = Calibration.of(graph.build(shapes.net), x).walker(found).places(target)
    window = Window((1, 3), horizontal.stride, horizontal.pad, horizontal.dilation)
    seen = patches(v, places, window).reshape(len(places), -1)
    seen = np.column_stack([seen, np.ones(len(places))])[: len(places) - round(0.1 * len(places))]
    weight, bias = nets.stored(shapes)["a"]
    y = places.take(Chain([Step("", weight, bias, (1, 1), (1, 1))], Engine(1), x.shape)(x))[: len(seen)]
    solution = np.linalg.lstsq(seen.astype(np.float64), y.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(weights["a_h"][0].reshape(16, -1), solution[:-1].T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(weights["a_h"][1], solution[-1], rtol=1e-3, atol=1e-4)


# --- interrupted and resumed ----------------------------------------------------------------------


class Interrupt:
    """Counts images, and interrupts once there were so many."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.told = after, []  # type: ignore[var-annotated]

    def __call__(self, count: int) -> None:
        self.told.append(count)
        if self.after is not None and sum(self.told) >= self.after:
            raise KeyboardInterrupt


def resumable(model: Model) -> tuple[lra.Plan, np.ndarray]:
    x = shapes_images(60)
    config = {"a": {"ranks": [6, 8]}, "b": {"ranks": [6, 8]}, "c": {"scheme": "spatial", "ranks": [6]}}
    return lra.make_plan(model, scheme="asymmetric-3d", rank_config=config, images=x, even_if_slower=True), x


def staged(model: Model, x: np.ndarray, folder: Path, *, resume: bool = False) -> Calibration:
    return Calibration.of(graph.build(model.net), x, stage=Stage(folder, resume=resume))


def test_progress_tells_of_every_image_once(shapes: Model) -> None:
    plan, x = resumable(shapes)
    step = Interrupt()
    calibration = Calibration.of(graph.build(shapes.net), x)
    lra.apply(plan, shapes, images=calibration, step=step)
    assert sum(step.told) == fitting.ticks(plan, calibration) == 60 * 4
    assert len(step.told) == 2 * 4  # batches of 32


PASS = [32, 28]  # images told of in one pass; what is there already is told of at once


@pytest.mark.parametrize(
    ("noted", "after", "resumed"),
    [
        (True, 32, [*PASS, *PASS, *PASS, *PASS]),  # in the pass of the original net
        (True, 60 + 32, [60, *PASS, *PASS, *PASS]),  # in the first layer
        (True, 120 + 32, [60, 60, *PASS, *PASS]),
        (True, 180 + 60, [60, 60, 60, *PASS]),  # behind the last image of the last layer
        (False, 180 + 32, [60, *PASS, *PASS, *PASS]),  # nothing noted but the samples
    ],
)
def test_an_interrupted_fit_is_resumed_where_it_was(
    shapes: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noted: bool,
    after: int,
    resumed: list[int],
) -> None:
    """The same bits as without interruption; the layers that were finished are not fitted again."""
    monkeypatch.setattr(responses, "_NOTE_EVERY", 0.0 if noted else 1e9)
    plan, x = resumable(shapes)
    whole, report = lra.apply(plan, shapes, images=x)
    first = staged(shapes, x, tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        lra.apply(plan, shapes, images=first, step=Interrupt(after))
    again, step = staged(shapes, x, tmp_path / "work", resume=True), Interrupt()
    fitted, report_again = lra.apply(plan, shapes, images=again, step=step)
    assert step.told == resumed
    assert report_again == report
    mine, theirs = nets.stored(fitted), nets.stored(whole)
    assert list(mine) == list(theirs)
    for name in theirs:
        for one, other in zip(mine[name], theirs[name], strict=True):
            np.testing.assert_array_equal(one, other)
    again.stage.finish()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("change", ["images", "ranks", "solver", "positions", "seed", "weights"])
def test_another_fit_takes_nothing_from_the_folder(
    shapes: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Finished results of other numbers are not used: the fit is that of a fresh folder."""
    monkeypatch.setattr(responses, "_NOTE_EVERY", 0.0)
    plan, x = resumable(shapes)
    lra.apply(plan, shapes, images=staged(shapes, x, tmp_path / "work"))
    model, settings = shapes, {"positions": {"positions": 50}, "seed": {"seed": 3}}.get(change, {})
    if change == "images":
        x = x + 1
    if change == "weights":
        model = nets.model(SHAPES, seed=1)
    if change == "ranks":
        plan.layers["a"] = LayerPlan("asymmetric-3d", (4, 6))  # type: ignore[index]
    if change == "solver":
        plan.target["solver"] = "linear"  # type: ignore[index]
    made = []
    for folder, resume in ((tmp_path / "work", True), (tmp_path / "fresh", False)):
        built = graph.build(model.net)
        calibration = Calibration.of(built, x, stage=Stage(folder, resume=resume), **settings)
        made.append(nets.stored(lra.apply(plan, model, images=calibration, force=True)[0]))
    for name in made[1]:
        for one, other in zip(made[0][name], made[1][name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_one_calibration_for_two_nets_in_memory(shapes: Model) -> None:
    """What was fitted of one is not taken for the other, whose text is the same."""
    plan, x = resumable(shapes)
    other = nets.model(SHAPES, seed=1)
    calibration = Calibration.of(graph.build(shapes.net), x)
    lra.apply(plan, shapes, images=calibration)
    fitted, _ = lra.apply(plan, other, images=calibration)
    alone, _ = lra.apply(plan, other, images=x)
    np.testing.assert_array_equal(nets.stored(fitted)["a_h"][0], nets.stored(alone)["a_h"][0])


def test_images_of_several_inputs_must_be_as_many() -> None:
    source = nets.inputs(left=(1, 2, 6, 6), right=(1, 2, 6, 6)) + (
        'layer { name: "sum" type: "Eltwise" bottom: "left" bottom: "right" top: "sum" }\n'
        'layer { name: "a" type: "Convolution" bottom: "sum" top: "a" convolution_param { num_output: 8 kernel_size: 3 } }\n'
    )
    model = nets.model(source)
    left, right = np.random.default_rng(0).standard_normal((2, 40, 2, 6, 6)).astype(np.float32)
    given = {"scheme": "spatial", "ranks": [4], "even_if_slower": True}
    plan = lra.make_plan(model, images={"left": left, "right": right}, **given)  # type: ignore[arg-type]
    lra.apply(plan, model, images={"left": left, "right": right})
    with pytest.raises(UsageError, match="2 inputs: left, right"):
        lra.make_plan(model, images=left, **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match='40 images for "left", 30 images for "right"'):
        lra.make_plan(model, images={"left": left, "right": right[:30]}, **given)  # type: ignore[arg-type]


def test_an_activation_that_no_fit_knows_is_reported() -> None:
    model = nets.model(
        nets.inputs(data=(1, 4, 9, 9))
        + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 12 kernel_size: 3 } }
layer { name: "s" type: "Sigmoid" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 12 kernel_size: 3 } }
layer { name: "r" type: "ReLU" bottom: "b" top: "b" }
"""
    )
    x = np.random.default_rng(0).standard_normal((40, 4, 9, 9)).astype(np.float32)
    plan = lra.make_plan(model, scheme="spatial", speedup=1.5, images=x, refit_kept=True)
    _, report = lra.apply(plan, model, images=x)
    assert report.warnings == ("a: followed by Sigmoid, which no fit knows: fitted in front of it",)
