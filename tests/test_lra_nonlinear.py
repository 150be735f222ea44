"""The alternating solver: its elementwise step, its guarantees, its options, its precision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lra import nonlinear
from lra.linalg import AffineMap, reduced_rank_regression
from lra.nonlinear import fit, fit_features, fit_responses

Array = NDArray[Any]

SLOPES = {"relu": 0.0, "leaky": 0.1, "prelu": np.array([0.25, -0.3, 1.0, 0.0, 2.0])}


def activate(name: str, t: Array) -> Array:
    if name == "relu6":
        return np.clip(t, 0, 6)
    return np.where(t < 0, SLOPES.get(name, 1.0) * t, t)


def step(name: str, t: Array, target: Array, penalty: float) -> Array:
    """z of the module, from its step."""
    slope = SLOPES[name] if name in ("leaky", "prelu") else None
    out = np.empty_like(t)
    nonlinear._activation(name, slope, t.shape[1]).step(t, target, penalty, out, np.empty_like(t))
    return t + out


def cost(name: str, z: Array, t: Array, target: Array, penalty: float) -> Array:
    return (target - activate(name, z)) ** 2 + penalty * (z - t) ** 2


def by_branches(name: str, t: Array, target: Array, penalty: float) -> Array:
    """z by the branches of the definition; ties go to the lower."""
    slope = SLOPES.get(name, 0.0)
    middle = np.maximum(0, (penalty * t + target) / (penalty + 1))
    branches = [np.minimum(0, (slope * target + penalty * t) / (slope**2 + penalty)), middle]
    if name == "relu6":
        branches = [np.minimum(0, t), np.minimum(middle, 6), np.maximum(6, t)]
    costs = np.array([cost(name, z, t, target, penalty) for z in branches])
    return np.take_along_axis(np.array(branches), costs.argmin(axis=0)[np.newaxis], 0)[0]


def responses(n: int, d: int, seed: int = 0, shift: float = -1.0) -> tuple[Array, Array]:
    """Responses y with a decaying spectrum, mostly below zero, and y_hat, y with an error."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.arange(1, d + 1)[:, None] ** -0.7
    y = rng.standard_normal((n, d)) @ mixing
    y = y / y.std(axis=0) + shift
    return y + 0.2 * rng.standard_normal((n, d)) @ mixing + 0.1, y


def predict(found: AffineMap | nonlinear.Fit, y_hat: Array) -> Array:
    return y_hat @ found.Q @ found.P.T + found.b


def loss(
    found: AffineMap | nonlinear.Fit, y_hat: Array, y: Array, name: str = "relu", s: Array | float = 0.0
) -> float:
    target = activate(name, y)
    return float(np.sum((target - activate(name, predict(found, y_hat) + s)) ** 2) / np.sum(target**2))


# --- the step to z --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky", "prelu"])
@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0, 10.0])
def test_step_is_that_of_the_branches_and_no_grid_is_better(name: str, penalty: float) -> None:
    rng = np.random.default_rng(0)
    t = 6 * rng.standard_normal((4000, 5)) + (2 if name == "relu6" else -1)
    target = activate(name, 5 * rng.standard_normal((4000, 5)))
    z, expected = step(name, t, target, penalty), by_branches(name, t, target, penalty)
    np.testing.assert_allclose(z, expected, atol=1e-12)
    least = cost(name, z, t, target, penalty)
    for point in np.linspace(-30, 30, 241):
        assert (least <= cost(name, np.full_like(t, point), t, target, penalty) + 1e-9).all()


@pytest.mark.parametrize("name", ["relu", "relu6"])
@settings(deadline=None)
@given(st.floats(-40, 40), st.floats(0, 6), st.floats(1e-3, 1e3))
def test_threshold_costs_no_more_than_either_branch(
    name: str, t: float, target: float, penalty: float
) -> None:
    at, a = np.array([[t]]), np.array([[target]])
    z, expected = step(name, at, a, penalty), by_branches(name, at, a, penalty)
    ours, theirs = (cost(name, one, at, a, penalty)[0, 0] for one in (z, expected))
    assert ours <= theirs * (1 + 1e-9) + 1e-9


def test_threshold_of_zero_target_and_ties() -> None:
    t = np.array([[-2.0, -1e-9, 0.0, 1.0]])
    np.testing.assert_allclose(step("relu", t, np.zeros((1, 4)), 1.0), [[-2, -1e-9, 0, 0.5]])
    for penalty, factor in [(0.01, 9.05), (0.1, 2.317), (1, 0.4142)]:
        assert nonlinear._reach(penalty) == pytest.approx(factor, abs=5e-4)


# --- guarantees -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky"])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
@pytest.mark.parametrize("shortcut", [False, True])
def test_relaxed_objective_falls_at_each_half_step(name: str, penalty: float, shortcut: bool) -> None:
    y_hat, y = responses(400, 5, shift=1.0 if name == "relu6" else -1.0)
    s = np.random.default_rng(4).standard_normal(y.shape) if shortcut else np.zeros_like(y)
    options = dict(activation=name, slope=SLOPES["leaky"] if name == "leaky" else None, dtype=np.float64)
    target, previous, found = activate(name, y + s), math.inf, []
    problem = nonlinear._Problem(
        nonlinear._Data(y_hat, y + s, s),
        nonlinear._Common(
            2, 1.0, nonlinear._activation(name, options["slope"], 5), 1e-12, 1, np.dtype(np.float64)
        ),
    )
    found = [problem.start, *(one for one, _ in problem.iterates(problem.start, penalty, 12))]

    def relaxed(one: AffineMap, z: Array) -> float:
        return float(np.sum(cost(name, z, predict(one, y_hat) + s, target, penalty)))

    for now, after in itertools.pairwise(found):
        z = by_branches(name, predict(now, y_hat) + s, target, penalty)
        assert relaxed(now, z) <= previous * (1 + 1e-9)
        assert relaxed(after, z) <= relaxed(now, z) * (1 + 1e-9)
        previous = relaxed(after, z)
    assert previous < 0.999 * relaxed(
        found[0], by_branches(name, predict(found[0], y_hat) + s, target, penalty)
    )


def test_an_iteration_is_the_step_to_z_and_the_regression_on_it() -> None:
    y_hat, y = responses(600, 6)
    problem = nonlinear._Problem(
        nonlinear._Data(y_hat, y, None),
        nonlinear._Common(3, 1.0, nonlinear._Relu(), 1e-3, 1, np.dtype(np.float64)),
    )
    now = reduced_rank_regression(y_hat, y, 3, ridge=1e-3)
    for found, measured in problem.iterates(problem.start, 0.1, 4):
        z = by_branches("relu", predict(now, y_hat), np.maximum(y, 0), 0.1)
        now = reduced_rank_regression(y_hat, z, 3, ridge=1e-3)
        np.testing.assert_allclose(found.P @ found.Q.T, now.P @ now.Q.T, atol=1e-9)
        np.testing.assert_allclose(found.b, now.b, atol=1e-9)
        assert measured == pytest.approx(loss(now, y_hat, y), rel=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6),
    st.sampled_from(["relu", "relu6", "leaky"]),
    st.floats(-2, 1),
    st.integers(0, 99),
    st.sampled_from([1, 4]),
)
def test_never_worse_than_linear(rank: int, name: str, shift: float, seed: int, parts: int) -> None:
    y_hat, y = responses(400, 6, seed, shift)
    options: Any = dict(activation=name, slope=0.1 if name == "leaky" else None, parts=parts)
    found = fit_responses(y_hat, y, rank, schedule=((0.01, 8), (1.0, 8)), dtype=np.float64, **options)
    linear = reduced_rank_regression(y_hat, y, rank)
    assert loss(found, y_hat, y, name) <= loss(linear, y_hat, y, name) * (1 + 1e-9)
    assert found.loss == pytest.approx(loss(found, y_hat, y, name), rel=1e-9)
    assert found.losses[0] == pytest.approx(loss(linear, y_hat, y, name), rel=1e-9)
    assert len(found.losses) == 17 and found.loss == np.nanmin(found.losses)


def test_better_than_linear_by_far_where_most_is_below_zero() -> None:
    every_hat, every = responses(40000, 32, shift=-1.5)  # few are active: with 4,000 it overfits
    y_hat, y, unseen = every_hat[:20000], every[:20000], every[20000:]
    found = fit_responses(y, y, 8)
    assert found.loss < 0.97 * found.losses[0]
    assert loss(found, unseen, unseen) < loss(reduced_rank_regression(y, y, 8), unseen, unseen)
    asymmetric = fit(y_hat, y, 8)
    assert loss(asymmetric, y_hat, y) < loss(found, y_hat, y)
    assert loss(asymmetric, y_hat, y) < loss(fit(y_hat, y_hat, 8), y_hat, y)


@pytest.mark.parametrize("rank", [6, None])
def test_full_rank_of_a_response_to_itself_is_the_identity(rank: int | None) -> None:
    _, y = responses(300, 6)
    found = fit(y, y, rank)
    np.testing.assert_allclose(found.P @ found.Q.T, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(found.b, 0, atol=1e-5)


def test_full_rank_repairs_inputs_that_have_drifted() -> None:
    _, y = responses(2000, 6)
    drift = np.eye(6) + 0.2 * np.random.default_rng(5).standard_normal((6, 6))
    found = fit(y @ drift + 0.5, y, None)
    assert loss(found, y @ drift + 0.5, y) < 1e-9
    np.testing.assert_array_equal(found.P, np.eye(6))


# --- options --------------------------------------------------------------------------------------


def test_parts_reach_the_loss_of_all_samples() -> None:
    y_hat, y = responses(3000, 24)
    whole, parts = fit_responses(y_hat, y, 6, parts=1), fit_responses(y_hat, y, 6)
    assert parts.loss == pytest.approx(whole.loss, rel=2e-3)
    assert not np.isnan(whole.losses).any()
    assert np.isnan(parts.losses).sum() == 38  # the iterate before a part is not measured
    measured = [i for i, one in enumerate(parts.losses) if not math.isnan(one)]
    assert measured == [0, *range(20, 26), *range(45, 51)]


def test_parts_need_enough_samples() -> None:
    y_hat, y = responses(200, 24)  # 12 a feature would be 288
    assert not np.isnan(fit_responses(y_hat, y, 6).losses).any()


def test_held_out_samples_choose_the_iterate() -> None:
    y_hat, y = responses(300, 12, 1)
    for holdout in (0.3, (y_hat[210:], y[210:])):
        given = slice(None) if holdout == 0.3 else slice(0, 210)
        found = fit_responses(y_hat[given], y[given], 4, holdout=holdout, dtype=np.float64)
        assert not np.isnan(found.losses).any() and found.loss == min(found.losses)
        assert found.loss == pytest.approx(loss(found, y_hat[210:], y[210:]), rel=1e-9)
        linear = reduced_rank_regression(y_hat[:210], y[:210], 4)
        assert found.losses[0] == pytest.approx(loss(linear, y_hat[210:], y[210:]), rel=1e-9)
        assert found.total == pytest.approx(np.sum(np.maximum(y[210:], 0) ** 2))


def test_shortcut_is_added_before_the_activation() -> None:
    """The residual rule: r(y + s) is met by r(M y_hat + b + s_hat)."""
    y_hat, y = responses(1000, 8)
    rng = np.random.default_rng(6)
    s = rng.standard_normal(y.shape)
    s_hat = s + 0.3 * rng.standard_normal(y.shape)
    found = fit_responses(y_hat, y + s, 3, shortcut=s_hat, dtype=np.float64)
    assert found.loss == pytest.approx(loss(found, y_hat, y + s, s=s_hat), rel=1e-9)
    linear = reduced_rank_regression(y_hat, y + s - s_hat, 3)
    assert found.losses[0] == pytest.approx(loss(linear, y_hat, y + s, s=s_hat), rel=1e-9)
    assert found.loss < 0.99 * found.losses[0]
    assert found.loss < loss(fit(y_hat, y, 3), y_hat, y + s, s=s_hat)
    held = fit_responses(y_hat, y + s, 3, shortcut=s_hat, holdout=(y_hat, y + s, s_hat), parts=1)
    assert held.loss == pytest.approx(found.loss, rel=1e-2)
    exact = fit_responses(y, y + s, 8, shortcut=s)
    np.testing.assert_allclose(exact.matrix, np.eye(8), atol=1e-5)


def test_without_an_activation_it_is_linear() -> None:
    y_hat, y = responses(100, 5)
    found, linear = fit(y_hat, y, 2, activation="none"), reduced_rank_regression(y_hat, y, 2)
    for ours, theirs in zip(found, linear, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert fit_responses(y_hat, y, 2, schedule=()).iteration == 0


def test_features_to_responses() -> None:
    rng = np.random.default_rng(7)
    F = rng.standard_normal((2000, 9)) + 2
    y = (F - 2) @ rng.standard_normal((9, 4)) - 1 + 0.1 * rng.standard_normal((2000, 4))
    full = fit_features(F, y)
    assert full.P.shape == (4, 4) and full.Q.shape == (9, 4) and full.matrix.shape == (4, 9)
    assert full.loss < 0.01 and full.loss <= full.losses[0]
    low = fit_features(F, y, 2)
    assert low.P.shape == (4, 2) and low.Q.shape == (9, 2)
    assert full.loss < low.loss <= low.losses[0]
    prior = rng.standard_normal((4, 9))
    np.testing.assert_allclose(fit_features(F, y, prior=prior, ridge=1e9).matrix, prior, atol=1e-5)
    few = fit_features(F[:5], y[:5], prior=prior)  # fewer samples than features: the rest is the prior's
    unseen = np.linalg.svd(F[:5] - F[:5].mean(0))[2][4:]
    np.testing.assert_allclose(few.matrix @ unseen.T, prior @ unseen.T, atol=1e-2)


def test_single_precision_is_good_enough_far_from_zero() -> None:
    y_hat, y = responses(2000, 16)
    exact = fit_responses(y_hat, y, 5, dtype=np.float64)
    for offset in (0.0, 300.0):
        found = fit((y_hat + offset).astype(np.float32), y.astype(np.float32), 5)
        assert loss(found, (y_hat + offset), y) == pytest.approx(exact.loss, rel=1e-3)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_singular_responses(ridge: float) -> None:
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((27, 64))
    y = (rng.standard_normal((3000, 27)) @ weight - 4).astype(np.float32)
    found = fit_responses(y, y, 20, ridge=ridge)
    assert all(np.isfinite(part).all() for part in (found.P, found.Q, found.b))
    assert found.loss < found.losses[0]
    dead = np.full((50, 3), -1.0)
    assert fit_responses(dead, dead, 2).loss == 0


def test_equal_input_gives_equal_bytes_and_is_left_alone() -> None:
    y_hat, y = responses(500, 6)
    before = y_hat.copy(), y.copy()
    first, second = (fit(y_hat, y, 3) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    np.testing.assert_array_equal(y_hat, before[0])
    np.testing.assert_array_equal(y, before[1])


def test_chunks_and_parts_cover_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    y_hat, y = responses(301, 6)
    whole = fit(y_hat, y, 3, parts=1, dtype=np.float64)
    monkeypatch.setattr(nonlinear, "_CHUNK_NUMBERS", 6 * 37)
    for ours, theirs in zip(fit(y_hat, y, 3, parts=1, dtype=np.float64), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8)
    found = fit_responses(y_hat, y, 3, dtype=np.float64, shortcut=y)
    assert found.total == pytest.approx(np.sum(np.maximum(y, 0) ** 2))
    assert found.loss == pytest.approx(loss(found, y_hat, y, s=y), rel=1e-9)


def test_refusals() -> None:
    y_hat, y = responses(30, 4)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"activation": "tanh"}, "none of relu, relu6, none, leaky, prelu"),
        ({"activation": "leaky"}, "needs a slope"),
        ({"activation": "prelu", "slope": np.ones(3)}, "each of 4"),
        ({"slope": 0.1}, "has no slope"),
        ({"shortcut": y[:, :2]}, "shortcut"),
        ({"holdout": 0.001}, "leaves a side"),
        ({"holdout": 1.0}, "leaves a side"),
        ({"holdout": (y_hat[:, :2], y)}, "other variables"),
        ({"schedule": ((0.0, 3),)}, "lambda must be positive"),
        ({"parts": 0}, "parts"),
        ({"ridge": -1.0}, "negative"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            fit(y_hat, y, 2, **options)
    for bad in [
        (y_hat, y[1:], 2),
        (y_hat, y, 5),
        (y_hat, y, 0),
        (y_hat[:0], y[:0], 1),
        (y_hat * np.nan, y, 2),
    ]:
        with pytest.raises(ValueError):
            fit(*bad)
