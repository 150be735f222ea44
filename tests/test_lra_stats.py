"""Accumulated statistics against two passes over all samples, and sampling."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lra.stats import Moments, sample_positions

Array = NDArray[Any]


def check(found: Moments, y: Array, z: Array, rtol: float = 1e-9) -> None:
    """Against two passes in double precision."""
    y, z = y.astype(np.float64), z.astype(np.float64)
    yc, zc = y - y.mean(0), z - z.mean(0)
    assert found.count == len(y)
    np.testing.assert_allclose(found.mean, y.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.other_mean, z.mean(0), rtol=1e-12, atol=1e-12)
    scale = max(np.trace(yc.T @ yc), 1e-12) / len(y)
    np.testing.assert_allclose(found.covariance, yc.T @ yc / len(y), rtol=0, atol=rtol * scale)
    cross = np.sqrt(scale * max(np.sum(zc**2) / len(y), 1e-12))
    np.testing.assert_allclose(found.cross_covariance, zc.T @ yc / len(y), rtol=0, atol=rtol * cross)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    st.integers(1, 4),
    st.integers(0, 3),
    st.floats(-50, 50),
    st.integers(0, 99),
)
def test_any_batches_and_any_order_of_merging(sizes, m, d, shift, seed) -> None:
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((sum(sizes), m)) + shift
    z = rng.standard_normal((sum(sizes), d)) - shift
    ends = np.cumsum([0, *sizes])
    one, parts = Moments(m, d), []
    for start, stop in itertools.pairwise(ends):
        one.add(y[start:stop], z[start:stop])
        parts.append(Moments(m, d))
        parts[-1].add(y[start:stop], z[start:stop])
    check(one, y, z)
    rng.shuffle(parts)
    merged = Moments(m, d)
    for part in parts:
        merged.merge(part)
    check(merged, y, z)


def test_mean_far_above_the_deviation_in_single_precision() -> None:
    rng = np.random.default_rng(0)
    y = (rng.standard_normal((40000, 8)) + 300).astype(np.float32)  # several chunks
    z = (rng.standard_normal((40000, 3)) - 300).astype(np.float32)
    found = Moments(8, 3)
    for batch in np.array_split(np.arange(len(y)), 7):
        found.add(y[batch], z[batch])
    check(found, y, z)
    one_pass = (y.T @ y) / np.float32(len(y)) - np.outer(y.mean(0), y.mean(0))  # what is avoided
    assert abs(one_pass - found.covariance).max() > 1e-3


def test_without_samples_and_without_z() -> None:
    found = Moments(2)
    found.merge(Moments(2))
    found.add(np.empty((0, 2)))
    assert found.count == 0 and not found.covariance.any() and found.cross_covariance.shape == (0, 2)
    found.add(np.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(found.mean, [1, 2])
    assert not found.covariance.any()


def test_batches_are_left_alone_and_wrong_ones_refused() -> None:
    y = np.arange(6.0).reshape(3, 2)
    before = y.copy()
    found = Moments(2, 1)
    found.add(y, y[:, :1])
    np.testing.assert_array_equal(y, before)
    for bad in [(y[:, :1], y[:, :1]), (y, y), (y, y[:2, :1]), (y, None)]:
        with pytest.raises(ValueError, match="expected"):
            found.add(*bad)
    with pytest.raises(ValueError, match="variables"):
        found.merge(Moments(2))


def test_moments_resume_from_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    y, z = rng.standard_normal((50, 4)), rng.standard_normal((50, 2))
    straight, first = Moments(4, 2), Moments(4, 2)
    straight.add(y[:20], z[:20])
    first.add(y[:20], z[:20])
    np.savez(tmp_path / "state.npz", **first.state())
    with np.load(tmp_path / "state.npz") as state:
        resumed = Moments.from_state(state)
    for moments in (straight, resumed):
        moments.add(y[20:], z[20:])
    for name, array in straight.state().items():
        assert array.tobytes() == resumed.state()[name].tobytes()
    assert first.count == 20  # the resumed one shares nothing with it
    check(resumed, y, z)


@settings(deadline=None)
@given(
    st.integers(0, 8), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(1, 40), st.integers(0, 9)
)
def test_positions_are_distinct_ascending_and_inside(n_images, hw, per_image, seed) -> None:
    drawn = sample_positions(np.random.default_rng(seed), n_images, hw, per_image)
    assert drawn.shape == (n_images, min(per_image, hw[0] * hw[1]))
    assert ((drawn >= 0) & (drawn < hw[0] * hw[1])).all()
    assert (np.diff(drawn, axis=1) > 0).all()
    rng = np.random.default_rng(seed)
    halves = [sample_positions(rng, n, hw, per_image) for n in (n_images // 2, n_images - n_images // 2)]
    np.testing.assert_array_equal(np.concatenate(halves), drawn)


def test_positions_are_uniform_and_differ_between_images() -> None:
    drawn = sample_positions(np.random.default_rng(0), 4000, (4, 5), 3)
    counts = np.bincount(drawn.ravel(), minlength=20)
    assert abs(counts - 600).max() < 6 * np.sqrt(600 * 0.85)
    assert len({tuple(row) for row in drawn.tolist()}) > 900  # of 1,140 triples
    with pytest.raises(ValueError, match="positive"):
        sample_positions(np.random.default_rng(0), 1, (4, 5), 0)
