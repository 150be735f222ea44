"""Reduced-rank regression against closed forms, each other and brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lra import linalg
from lra.linalg import AffineMap, by_group, from_moments, reduced_rank_regression

Array = NDArray[Any]


def samples(n: int, m: int, d: int, seed: int = 0) -> tuple[Array, Array]:
    """Correlated y (n, m) and z (n, d), neither of mean zero."""
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((n, m)) @ rng.standard_normal((m, m)) + rng.standard_normal(m)
    z = y @ rng.standard_normal((m, d)) + rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3
    return y, z


def moments(y: Array, z: Array) -> tuple[Array, Array, Array, Array]:
    yc, zc = y - y.mean(0), z - z.mean(0)
    return yc.T @ yc / len(y), zc.T @ yc / len(y), y.mean(0), z.mean(0)


def error(y: Array, z: Array, found: AffineMap) -> float:
    """Mean over samples of the squared distance."""
    return float(np.sum((z - y @ found.Q @ found.P.T - found.b) ** 2) / len(y))


def by_gsvd(y: Array, z: Array, rank: int) -> Array:
    """Form (a): singular values of Mhat with V orthonormal under the covariance of y."""
    C, S, *_ = moments(y, z)
    values, E = np.linalg.eigh(C)
    half = E / np.sqrt(values)
    U, s, Tt = np.linalg.svd(S @ half)
    return (U[:, :rank] * s[:rank]) @ (half @ Tt.T[:, :rank]).T


def by_fitted_values(y: Array, z: Array, rank: int) -> Array:
    """Form (c): the best approximation of the fitted values, regressed on y again."""
    yc, zc = y - y.mean(0), z - z.mean(0)
    U, s, Vt = np.linalg.svd(yc @ np.linalg.lstsq(yc, zc)[0], full_matrices=False)
    return np.linalg.lstsq(yc, (U[:, :rank] * s[:rank]) @ Vt[:rank])[0].T


def naive(y: Array, z: Array, rank: int) -> Array:
    """Wrong: the ordinary singular value decomposition of Mhat, cut."""
    C, S, *_ = moments(y, z)
    U, s, Vt = np.linalg.svd(S @ np.linalg.inv(C))
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 999), st.data())
def test_three_forms_agree_and_reach_the_minimum(m: int, d: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, d)))
    y, z = samples(60, m, d, seed)
    found = reduced_rank_regression(y, z, rank, ridge=0)
    assert found.P.shape == (d, rank) and found.Q.shape == (m, rank) and found.b.shape == (d,)
    np.testing.assert_allclose(found.P.T @ found.P, np.eye(rank), atol=1e-12)
    C, S, *_ = moments(y, z)
    A = S @ np.linalg.solve(C, S.T)
    zc = z - z.mean(0)
    least = np.sum(zc**2) / len(z) - np.linalg.eigvalsh(A)[::-1][:rank].sum()
    assert error(y, z, found) == pytest.approx(least, rel=1e-7, abs=1e-9 * np.trace(A))
    for other in (by_gsvd, by_fitted_values):
        M = other(y, z, rank)
        there = AffineMap(M, np.eye(m), z.mean(0) - M @ y.mean(0))
        assert error(y, z, there) == pytest.approx(least, rel=1e-7, abs=1e-9 * np.trace(A))


def test_the_three_matrices_are_one() -> None:
    y, z = samples(400, 9, 6)
    for rank in range(1, 7):
        found = reduced_rank_regression(y, z, rank, ridge=0)
        for other in (by_gsvd, by_fitted_values):
            np.testing.assert_allclose(found.P @ found.Q.T, other(y, z, rank), atol=1e-10)


def test_cutting_the_plain_svd_is_wrong() -> None:
    rng = np.random.default_rng(1)
    y, z = samples(400, 8, 8)
    y = y * np.logspace(1, -1, 8)  # directions of unlike variance
    M = naive(y, z, 3)
    wrong = error(y, z, AffineMap(M, np.eye(8), z.mean(0) - M @ y.mean(0)))
    assert wrong > 1.2 * error(y, z, reduced_rank_regression(y, z, 3, ridge=0))
    for _ in range(20):  # and no nearby map of the same rank is better than ours
        found = reduced_rank_regression(y, z, 3, ridge=0)
        near = [part + 1e-3 * rng.standard_normal(part.shape) for part in found]
        assert error(y, z, AffineMap(*near)) > error(y, z, found)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 999), st.data())
def test_a_response_to_itself_is_pca_with_the_tail_as_error(d: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, d))
    y, _ = samples(40, d, d, seed)
    C, *_ = moments(y, y)
    tail = np.linalg.eigvalsh(C)[: d - rank].sum()
    found = reduced_rank_regression(y, y, rank, ridge=0)
    assert error(y, y, found) == pytest.approx(tail, rel=1e-6, abs=1e-9 * np.trace(C))


def test_pca_and_regression_of_a_response_on_itself_are_one_matrix() -> None:
    y, _ = samples(500, 7, 7)
    C, _, mean, _ = moments(y, y)
    vectors = np.linalg.eigh(C)[1][:, ::-1]
    for rank in range(1, 8):
        found = reduced_rank_regression(y, y, rank, ridge=0)
        cut = vectors[:, :rank] @ vectors[:, :rank].T
        np.testing.assert_allclose(found.P @ found.Q.T, cut, atol=1e-8)
        np.testing.assert_allclose(found.b, mean - cut @ mean, atol=1e-8)


@pytest.mark.parametrize("ridge", [0, 1e-6, 1e-2, 10])
def test_full_rank_of_a_response_to_itself_is_the_identity(ridge: float) -> None:
    y, _ = samples(50, 6, 6)
    for rank in (6, None):
        found = reduced_rank_regression(y, y, rank, ridge=ridge)
        np.testing.assert_allclose(found.P @ found.Q.T, np.eye(6), atol=1e-9)
        np.testing.assert_allclose(found.b, 0, atol=1e-9)


@pytest.mark.parametrize("prior", [1.0, 0.0, 0.5])
def test_ridge_is_regression_on_added_samples(prior: float) -> None:
    y, z = samples(80, 5, 5)
    C, _, ybar, zbar = moments(y, z)
    alpha = 0.1 * np.trace(C) / 5
    added = np.sqrt(80 * alpha) * np.eye(5)
    yc, zc = np.vstack([y - ybar, added]), np.vstack([z - zbar, prior * added])
    expected = np.linalg.lstsq(yc, zc)[0].T
    found = reduced_rank_regression(y, z, None, ridge=0.1, prior=prior)
    np.testing.assert_allclose(found.P @ found.Q.T, expected, atol=1e-10)
    wanted = np.random.default_rng(0).standard_normal((4, 5))
    zc = np.vstack([z[:, :4] - zbar[:4], added @ wanted.T])
    found = reduced_rank_regression(y, z[:, :4], None, ridge=0.1, prior=wanted)
    np.testing.assert_allclose(found.P @ found.Q.T, np.linalg.lstsq(yc, zc)[0].T, atol=1e-10)


def test_directions_never_seen_keep_the_original_filters() -> None:
    """A first layer: 64 filters on 27 inputs; the responses fill 27 dimensions of 64."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((64, 27))
    y = (rng.standard_normal((5000, 27)) @ weight.T).astype(np.float32)
    blind = scipy.linalg.null_space(weight.T)
    for ridge in (0, 1e-6, 1e-4):
        found = reduced_rank_regression(y, y, 27, ridge=ridge)
        assert np.isfinite(found.Q).all()
        assert error(y, y, found) < 1e-9 * np.var(y, axis=0).sum()
        full = reduced_rank_regression(y, y, 64, ridge=ridge)
        np.testing.assert_allclose(full.P @ (full.Q.T @ blind), blind, atol=1e-3)
        shrunk = reduced_rank_regression(y, y, 64, ridge=1e-4, prior=0.0)
        np.testing.assert_allclose(shrunk.P @ (shrunk.Q.T @ blind), 0, atol=1e-3)


def test_dead_and_constant_responses() -> None:
    y, z = samples(100, 5, 5)
    y[:, 2], z[:, 2] = 7.0, -1.0
    found = reduced_rank_regression(y, z, 3)
    predicted = y @ found.Q @ found.P.T + found.b
    np.testing.assert_allclose(predicted[:, 2], -1.0, atol=1e-4)
    constant = reduced_rank_regression(np.full((9, 3), 4.0), np.full((9, 3), 2.0), 2)
    np.testing.assert_allclose(np.full(3, 4.0) @ constant.Q @ constant.P.T + constant.b, 2.0)
    one = reduced_rank_regression(y[:1], z[:1], 5)
    np.testing.assert_allclose(y[:1] @ one.Q @ one.P.T + one.b, z[:1])


def test_asymmetric_is_never_worse_than_symmetric_on_the_inputs_it_meets() -> None:
    rng = np.random.default_rng(3)
    y, _ = samples(300, 8, 8)
    y_hat = y + rng.standard_normal(y.shape) @ rng.standard_normal((8, 8)) + 1
    for rank in range(1, 9):
        asymmetric = reduced_rank_regression(y_hat, y, rank, ridge=0)
        for other in (reduced_rank_regression(y, y, rank), reduced_rank_regression(y_hat, y_hat, rank)):
            assert error(y_hat, y, asymmetric) <= error(y_hat, y, other) * (1 + 1e-9)


def test_groups_are_solved_one_by_one_and_stacked_as_weights() -> None:
    y, z = samples(200, 6, 9)
    found = by_group(lambda a, b: reduced_rank_regression(a, b, 2), 3, y, z)
    assert found.P.shape == (9, 2) and found.Q.shape == (6, 2)
    for g in range(3):
        alone = reduced_rank_regression(y[:, 2 * g : 2 * g + 2], z[:, 3 * g : 3 * g + 3], 2)
        np.testing.assert_array_equal(found.P[3 * g : 3 * g + 3], alone.P)
        np.testing.assert_array_equal(found.Q[2 * g : 2 * g + 2], alone.Q)
        np.testing.assert_array_equal(found.b[3 * g : 3 * g + 3], alone.b)
    seen = []
    by_group(lambda a, none: seen.append(none) or AffineMap(a, a, a), 2, y, None)
    assert seen == [None, None]
    with pytest.raises(ValueError, match="group 4 does not divide 6"):
        by_group(lambda a: a, 4, y)


def test_equal_input_gives_equal_bytes_and_fixed_signs() -> None:
    y, z = samples(100, 6, 6)
    first, second = (reduced_rank_regression(y, z, 3) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    assert (first.P[abs(first.P).argmax(axis=0), range(3)] > 0).all()


def test_refusals() -> None:
    y, z = samples(30, 4, 3)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=r"not in 1\.\.3"):
            reduced_rank_regression(y, z, rank)
    with pytest.raises(ValueError, match=r"\(30, 4\) and \(29, 3\)"):
        reduced_rank_regression(y, z[1:], 1)
    with pytest.raises(ValueError, match="not finite"):
        reduced_rank_regression(y * np.nan, z, 1)
    with pytest.raises(ValueError, match="negative"):
        reduced_rank_regression(y, z, 1, ridge=-1)
    with pytest.raises(ValueError, match="prior"):
        reduced_rank_regression(y, z, 1, prior=np.ones((4, 3)))
    with pytest.raises(ValueError, match="moments"):
        from_moments(np.eye(4), np.ones((4, 3)), np.ones(4), np.ones(3), 1)


def test_whitening_raises_the_ridge_only_where_it_must() -> None:
    assert linalg.whiten(np.diag([1.0, 1e-9]), 0).alpha == 0
    singular = linalg.whiten(np.ones((5, 5)), 0)
    assert 0 < singular.alpha < 1e-10
    rebuilt = singular.factor @ singular.factor.T
    np.testing.assert_allclose(rebuilt, np.ones((5, 5)) + singular.alpha * np.eye(5), atol=1e-15)
