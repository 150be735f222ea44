"""Schemes and ranks chosen by measured errors: the errors are those of regression, the harm what the net shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest

import caffe_proto as cp
import lra
from caffe_proto.errors import UsageError
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.runtime import Engine
from caffe_proto.weights import NewEntry
from lra.auto import PROBED, Study
from lra.calibration import Calibration
from lra.decomposition import Step
from lra.digits import drawn
from lra.fitting import sample_spectra
from lra.plan import REFIT
from lra.responses import relative_error
from lra.schemes import ALL_SCHEMES, spatial
from lra.targets import Spectra, Target, find
from lra.walk import Chain, Window, patches

LENET = Path(__file__).resolve().parents[1] / "models" / "lenet"

NET = nets.inputs(data=(1, 4, 13, 11)) + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 16 kernel_size: 3 pad: 1 } }
layer { name: "ra" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b"
  convolution_param { num_output: 16 kernel_h: 5 kernel_w: 3 pad_h: 3 pad_w: 1 stride_h: 1 stride_w: 2 group: 2 bias_term: false } }
layer { name: "bn" type: "BatchNorm" bottom: "b" top: "b" }
layer { name: "scale" type: "Scale" bottom: "b" top: "b" scale_param { bias_term: true } }
layer { name: "rb" type: "ReLU" bottom: "b" top: "b" }
layer { name: "flat" type: "Convolution" bottom: "b" top: "flat" convolution_param { num_output: 24 kernel_size: 1 } }
layer { name: "depth" type: "Convolution" bottom: "flat" top: "depth"
  convolution_param { num_output: 24 kernel_size: 3 group: 24 } }
layer { name: "c" type: "Convolution" bottom: "depth" top: "c"
  convolution_param { num_output: 12 kernel_size: 3 pad: 2 stride: 2 dilation: 2 } }
layer { name: "fc" type: "InnerProduct" bottom: "c" top: "fc" inner_product_param { num_output: 9 } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""  # fmt: skip
BOTTOMS = {"a": "data", "b": "a", "flat": "b", "depth": "flat", "c": "depth", "fc": "c"}
N = 60
X = np.random.default_rng(5).standard_normal((N, 4, 13, 11)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Model:
    made = nets.model(NET)
    rng = np.random.default_rng(1)
    blobs = {
        "bn": [rng.standard_normal(16), rng.random(16) + 0.5, np.ones(1)],
        "scale": [*rng.standard_normal((2, 16))],
    }
    entries = {
        name: [NewEntry(name, tuple(np.asarray(one, np.float32) for one in arrays))]
        for name, arrays in blobs.items()
    }
    assert made.weights is not None
    return Model(made.net, made.weights.replace(entries))


class Case:
    """A net, its study, and the numbers to hold against it."""

    def __init__(self, model: Model) -> None:
        self.found = find(model)
        self.spectra = Spectra(self.found)
        self.calibration = Calibration.of(build(model.net), X)
        self.targets = list(self.found.targets.values())
        self.study = Study(self.found, self.spectra, self.calibration, self.targets, lambda _n: None)
        self.walker = self.calibration.walker(self.found)
        stage, key = self.calibration.stage, self.calibration.key(self.found)
        self.samples = self.walker.sample(self.targets, stage, key, lambda _n: None)
        with cp.session(model, "all", threads=1) as opened:
            self.blobs = opened.run({"data": X}) | {"data": X}

    def responses(self, target: Target) -> np.ndarray:
        """As they are judged: behind BatchNorm and Scale; (n, d)."""
        behind = self.walker.behind(target)
        return np.asarray(self.samples[target.name].responses * behind.scale + behind.shift, np.float64)

    def features(self, target: Target, rank: int) -> np.ndarray:
        """What H sees of V's maps at a total rank: (n, groups, components a group * kw)."""
        steps = self.spectra.get(target, spatial.SPATIAL).factor(rank).steps
        maps = self.blobs[BOTTOMS[target.name]]
        between = Chain(steps[:1], Engine(1), maps.shape)(maps)
        h: Step = steps[1]
        seen = patches(
            between, self.samples[target.name].places, Window((1, h.shape[3]), h.stride, h.pad, h.dilation)
        )
        return seen.reshape(len(seen), target.geometry.group, -1).astype(np.float64)


@pytest.fixture(scope="module")
def case(model: Model) -> Case:
    return Case(model)


def regressed(features: np.ndarray, wanted: np.ndarray, rank: int | None) -> float:
    """Squares left by the regression of (n, d) on (n, m) with a constant; of the best map of a rank."""
    ones = np.column_stack([features, np.ones(len(features))])
    fitted = ones @ np.linalg.lstsq(ones, wanted, rcond=None)[0]
    if rank is not None:
        centre = fitted.mean(axis=0)
        U, S, V = np.linalg.svd(fitted - centre, full_matrices=False)
        fitted = (U[:, :rank] * S[:rank]) @ V[:rank] + centre
    return float(((wanted - fitted) ** 2).sum())


def regression_error(case: Case, target: Target, inner: int, outer: int | None) -> float:
    """Relative squared error at components a group, by numpy's own least squares."""
    group = target.geometry.group
    wanted = np.split(case.responses(target), group, axis=1)
    features = case.features(target, inner * group)
    left = sum(regressed(features[:, g], wanted[g], outer) for g in range(group))
    whole = case.responses(target)
    return left / float(((whole - whole.mean(axis=0)) ** 2).sum())


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_errors_are_those_of_regression(case: Case, name: str) -> None:
    target = case.found.targets[name]
    group, study = target.geometry.group, case.study
    known = study.errors[name]
    assert known.pair is not None and known.both is not None
    for inner in (1, 2, 3, 5, len(known.pair)):
        expected = regression_error(case, target, inner, None)
        assert study.error(target, "spatial", (inner * group,)) == pytest.approx(expected, rel=1e-3, abs=1e-5)
        for outer in (
            1,
            3,
            target.shape[0] // group,
        ):  # at the first ranks and the last no value is interpolated
            expected = regression_error(case, target, inner, outer)
            found = study.error(target, "asymmetric-3d", (inner * group, outer * group))
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert (np.diff(known.pair) <= 1e-12).all()
    assert (np.diff(known.both, axis=0) <= 1e-12).all() and (np.diff(known.both, axis=1) <= 1e-12).all()


@pytest.mark.parametrize("name", ["a", "b", "flat", "c", "fc"])
def test_errors_of_the_channel_scheme_are_those_of_principal_components(case: Case, name: str) -> None:
    target = case.found.targets[name]
    group = target.geometry.group
    whole = case.responses(target)
    centred = np.split(whole - whole.mean(axis=0), group, axis=1)
    values = [np.linalg.svd(part, compute_uv=False) ** 2 for part in centred]
    for rank in (1, 2, 4):
        expected = sum(one[rank:].sum() for one in values) / sum(one.sum() for one in values)
        assert case.study.error(target, "response", (rank * group,)) == pytest.approx(
            expected, rel=1e-3, abs=1e-6
        )


def test_a_layer_with_nothing_to_separate_has_one_scheme(case: Case) -> None:
    for name in ("flat", "fc"):
        target = case.found.targets[name]
        assert case.study.errors[name].pair is None
        keys = [option.key for option in case.study.options(target, 1)]
        assert keys[0] is None and {key[0] for key in keys[1:]} == {"response"}  # type: ignore[index]


def test_options_are_priced_and_finite(case: Case) -> None:
    """A depthwise layer included, whose only map of responses is a full one."""
    for target in case.targets:
        for option in case.study.options(target, 1):
            assert np.isfinite(option.loss) and option.loss >= 0
            if option.key is not None:
                name, ranks = option.key  # type: ignore[misc]
                assert option.cost == target.chain_cost(ALL_SCHEMES[name], *ranks) < target.macs
                error = np.array([case.study.error(target, name, ranks)])
                assert option.loss == pytest.approx(case.study.loss(target, error)[0])


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_harm_is_what_the_outputs_show(case: Case, model: Model, name: str) -> None:
    """One layer replaced by its linear fit: the error of fc, which the Softmax reads, over the images probed."""
    target, study = case.found.targets[name], case.study
    group, curve = target.geometry.group, study.errors[name].pair
    assert curve is not None
    points = []
    for rank in {int(np.abs(np.log(curve / wanted)).argmin()) + 1 for wanted in PROBED}:
        plan = lra.make_plan(
            model,
            scheme="spatial",
            rank_config={name: rank * group},
            images=X,
            even_if_slower=True,
            solver="linear",
        )
        fitted, _ = lra.apply(plan, model, images=X)
        made = [nets_fc(one)[-24:] for one in (fitted, model)]
        shown = relative_error(made[:1], made[1:])
        harm = float(study.harm(target, curve[rank - 1 : rank])[0])
        assert harm == pytest.approx(shown, rel=0.25)
        points.append((float(curve[rank - 1]), harm))
    for (low, here), (high, there) in zip(sorted(points), sorted(points)[1:], strict=False):
        middle = np.sqrt(low * high)  # between two points the curve is a power of the error
        assert study.harm(target, np.array([middle]))[0] == pytest.approx(np.sqrt(here * there), rel=1e-6)
    low, here = min(points)
    assert study.harm(target, np.array([low / 10]))[0] == pytest.approx(
        here / 10
    )  # below them it is in proportion


def nets_fc(model: Model) -> np.ndarray:
    with cp.session(model, ["fc"], threads=1) as opened:
        return opened.run({"data": X})["fc"]


def test_relative_error_by_hand() -> None:
    exact = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])  # the spread is 2 * (4 + 0 + 4) = 16
    made = exact + np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert relative_error([made], [exact]) == pytest.approx(2 / 16)
    assert relative_error([made, exact], [exact, exact]) == pytest.approx(1 / 16)
    assert relative_error([exact + 1], [np.ones((3, 2))]) == pytest.approx(((exact) ** 2).sum())


def test_the_outputs_are_judged_before_the_softmax(case: Case) -> None:
    graph = case.found.shaped.graph
    assert [graph.blob(value) for value in case.walker.ends()] == ["fc"]


@pytest.mark.parametrize(
    ("speedup", "round_to", "refit_kept"), [(1.4, 1, None), (2.5, 4, False), (2.5, 1, None)]
)
def test_the_budget_is_met(model: Model, speedup: float, round_to: int, refit_kept: bool | None) -> None:
    plan = lra.make_plan(model, speedup=speedup, images=X, round_to=round_to, refit_kept=refit_kept)
    fitted, report = lra.apply(plan, model, images=X)
    assert cp.cost(fitted).macs == report.macs[1] <= report.macs[0] / speedup
    schemes = {entry.scheme for entry in plan.layers.values()}
    assert schemes <= {
        "response",
        "spatial",
        "asymmetric-3d",
        "pca",
        *([] if refit_kept is False else [REFIT]),
    }
    assert schemes - {REFIT}
    for entry in plan.layers.values():
        assert all(rank % round_to == 0 or rank in (16, 12, 24) for rank in entry.ranks)
    assert set(plan.layers) | set(plan.kept) == {"a", "b", "flat", "depth", "c", "fc"}
    assert not set(plan.layers) & set(plan.kept)
    assert lra.Plan.from_json(plan.to_json()) == plan


def test_the_same_request_gives_the_same_plan(model: Model) -> None:
    plans = [lra.make_plan(model, speedup=2.0, images=X) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()


def test_lenet_is_no_worse_than_by_the_spatial_scheme() -> None:
    model = cp.load(LENET / "lenet.prototxt", LENET / "lenet.caffemodel")
    x, _ = drawn(300, seed=1)
    test, _ = drawn(300, seed=2)
    errors = {}
    for scheme in ("auto", "spatial"):
        plan = lra.make_plan(model, scheme=scheme, speedup=3.0, scope="conv", images=x, refit_kept=False)
        fitted, report = lra.apply(plan, model, images=x)
        assert report.conv_macs[0] >= 3 * report.conv_macs[1]
        made = []
        for one in (fitted, model):
            with cp.session(one, ["ip2"], threads=1) as opened:
                made.append(opened.run({"data": test})["ip2"])
        errors[scheme] = relative_error(made[:1], made[1:])
    assert errors["auto"] <= errors["spatial"]


def test_sampled_spectra_are_principal_components(case: Case) -> None:
    spectra = Spectra(case.found)
    sample_spectra(case.found, spectra, case.targets, case.calibration, lambda _n: None)
    for target in case.targets:
        parts = np.split(case.responses(target), target.geometry.group, axis=1)
        values = [np.linalg.svd(one - one.mean(axis=0), compute_uv=False) ** 2 / len(one) for one in parts]
        energies = spectra.get(target, ALL_SCHEMES["response"]).energies
        np.testing.assert_allclose(energies, values, rtol=1e-4, atol=1e-6 * float(np.max(values)))


@pytest.mark.parametrize("scheme", ["spatial", "response", "asymmetric-3d"])
def test_measured_ranks_are_those_of_least_predicted_harm(model: Model, scheme: str) -> None:
    calibration = Calibration.of(build(model.net), X, positions=30, threads=1)
    found = find(model)
    asked = {"scheme": scheme, "speedup": 1.4, "scope": "conv", "images": calibration, "found": found}
    plan = lra.make_plan(model, selection="measured", **asked)  # type: ignore[arg-type]
    assert {entry.scheme for entry in plan.layers.values()} == {scheme}
    exact = lra.make_plan(model, **asked)  # type: ignore[arg-type]
    spectra = Spectra(found)
    targets = [found.targets[name] for name in found.targets if not found.targets[name].dense]
    study = Study(found, spectra, calibration, targets, lambda _images: None)

    def loss(made: lra.Plan) -> float:
        parts = ((found.targets[name], one) for name, one in made.layers.items())
        return sum(
            float(study.loss(target, np.array(study.error(target, scheme, one.ranks))))
            for target, one in parts
        )

    assert loss(plan) <= loss(exact) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("asked", "images"),
    [
        ({"scheme": "spatial", "speedup": 2.0}, None),
        ({"scheme": "pca", "speedup": 2.0}, X),
        ({"scheme": "spatial", "energy": 0.9}, X),
    ],
)
def test_measured_ranks_need_images_a_speedup_and_a_scheme(
    model: Model, asked: dict[str, Any], images: np.ndarray | None
) -> None:
    with pytest.raises(UsageError, match="ranks by measured errors need"):
        lra.make_plan(model, selection="measured", images=images, **asked)


def test_both_choices_of_auto_are_fitted_as_the_plan_is(model: Model) -> None:
    calibration = Calibration.of(build(model.net), X, positions=30, threads=1)
    found = find(model)
    plan = lra.make_plan(
        model,
        speedup=1.4,
        scope="conv",
        images=calibration,
        found=found,
        solver="linear",
        except_layers=["c"],
    )
    fitted = len(calibration.fitted)
    lra.apply(plan, model, images=calibration, found=found)
    assert len(calibration.fitted) == fitted  # what was judged is what is applied
    assert all("c" not in fits.layers for fits in calibration.fitted.values())
