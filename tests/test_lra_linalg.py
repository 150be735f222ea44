"""Singular vectors: accuracy on both routes, signs, degenerate matrices, truncation, balance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lra.linalg import balance, left_svd, low_rank


def with_values(values: NDArray[Any], m: int, n: int, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((m, len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((n, len(values))))
    return (left * values) @ right.T


def check(matrix: NDArray[Any], tolerance: float = 1e-10) -> None:
    """Values as LAPACK has them, orthonormal vectors, their product with the right half, its row norms."""
    vectors, values = left_svd(matrix)
    exact = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    largest = exact[0] if exact[0] > 0 else 1.0
    right = vectors.T @ matrix
    np.testing.assert_allclose(values, exact, rtol=0, atol=tolerance * largest)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(vectors @ right, matrix, rtol=0, atol=1e-12 * largest)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), values, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("m", "n"), [(20, 60), (60, 20), (40, 40), (1, 30), (30, 1), (1, 1)])
@pytest.mark.parametrize("decades", [0, 1, 3.9, 4.1, 8, 14, 30])
def test_accurate_at_any_condition_number(m: int, n: int, decades: float) -> None:
    check(with_values(10.0 ** -np.linspace(0, decades, min(m, n)), m, n))


def test_squaring_alone_would_not_be_accurate() -> None:
    """What the refinement of small values is for: the plain Gram route is off by more than 1e-10."""
    exact = 10.0 ** -np.linspace(0, 12, 30)
    matrix = with_values(exact, 30, 90)
    plain = np.sqrt(abs(np.linalg.eigvalsh(matrix @ matrix.T)))[::-1]
    assert abs(plain - exact).max() > 1e-10
    assert abs(left_svd(matrix).values - exact).max() < 1e-12


def test_values_descend_across_the_switch() -> None:
    matrix = with_values(np.repeat([1.0, 1e-4 + 1e-14, 1e-4, 1e-4 - 1e-14], 6), 24, 40)
    assert (np.diff(left_svd(matrix).values) <= 0).all()
    check(matrix)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_degenerate_matrices(shape: tuple[int, int]) -> None:
    check(np.zeros(shape))
    check(np.ones(shape))
    check(np.eye(*shape))  # equal singular values
    check(with_values(np.array([3.0, 3.0, 0.0, 0.0, 0.0]), *shape))


def test_largest_entry_of_each_vector_is_positive() -> None:
    rng = np.random.default_rng(1)
    for shape in [(8, 20), (20, 8)]:
        vectors = left_svd(-abs(rng.standard_normal(shape))).vectors
        peaks = abs(vectors).argmax(axis=0)
        assert (vectors[peaks, range(8)] > 0).all()


def test_input_is_left_alone_whatever_its_type_and_order() -> None:
    rng = np.random.default_rng(2)
    base = rng.standard_normal((6, 9)).astype(np.float32)
    expected = left_svd(base)
    for matrix in [base.astype(np.float64), np.asfortranarray(base), np.repeat(base, 2, axis=1)[:, ::2]]:
        before = matrix.copy()
        found = left_svd(matrix)
        np.testing.assert_array_equal(matrix, before)
        np.testing.assert_array_equal(found.vectors, expected.vectors)
        assert found.vectors.dtype == found.values.dtype == np.float64


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        left_svd(np.array([[1.0, bad]]))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000), st.data())
def test_truncation_drops_exactly_the_tail(m: int, n: int, seed: int, data: st.DataObject) -> None:
    matrix = np.random.default_rng(seed).standard_normal((m, n))
    rank = data.draw(st.integers(1, min(m, n)))
    vectors, values = left_svd(matrix)
    left, right = low_rank(matrix, vectors, rank)
    assert left.shape == (m, rank) and right.shape == (rank, n)
    dropped = np.sum((matrix - left @ right) ** 2)
    np.testing.assert_allclose(dropped, np.sum(values[rank:] ** 2), rtol=1e-9, atol=1e-12 * np.sum(values**2))


def test_balance_shares_the_singular_values() -> None:
    matrix = with_values(np.array([4.0, 1.0, 1e-8, 1e-40, 0.0]), 6, 5)
    left, right = low_rank(matrix, left_svd(matrix).vectors, 5)
    balanced_left, balanced_right = balance(left, right)
    np.testing.assert_allclose(balanced_left @ balanced_right, matrix, rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(balanced_left, axis=0)[:2], [2, 1])
    np.testing.assert_allclose(np.linalg.norm(balanced_right, axis=1)[:2], [2, 1])
    assert max(abs(balanced_left[:, 2:]).max(), abs(balanced_right[2:]).max()) < 1e-3  # rounding stays small


def test_balance_of_a_zero_row_is_zero() -> None:
    left, right = balance(np.eye(2), np.array([[9.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(left, [[3, 0], [0, 0]])
    np.testing.assert_array_equal(right, [[3, 0], [0, 0]])
