"""Ranks equal those of the SVD whatever the maps are; sums over images; criteria and their order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hrank import criteria
from hrank.criteria import CRITERIA, Evidence, kept, order, scores, tied_at
from hrank.rank import RankSums, default_rtol, mean_rank, nuclear_norms, ranks, ranks_and_bounds

Array = NDArray[Any]


def by_svd(maps: Array, rtol: float | None = None) -> Array:
    """The rule written down plainly, one map at a time."""
    h, w = maps.shape[-2:]
    tolerance = max(h, w) * 2.0**-23 if rtol is None else rtol
    found = []
    for one in maps.reshape(-1, h, w).astype(np.float64):
        values = np.linalg.svd(one, compute_uv=False)
        found.append(np.count_nonzero(values > values[0] * tolerance))
    return np.array(found).reshape(maps.shape[:-2])


def with_values(rng: np.random.Generator, h: int, w: int, values: Array) -> Array:
    """A map with these singular values, min(h, w) of them."""
    k = min(h, w)
    left = np.linalg.qr(rng.standard_normal((h, k)))[0]
    right = np.linalg.qr(rng.standard_normal((w, k)))[0]
    return left * values @ right.T


def sparse(rng: np.random.Generator, n: int, h: int, w: int) -> Array:
    """ReLU maps: some dead, some with empty rows and columns, some of them full."""
    maps = np.maximum(rng.standard_normal((n, h, w)) + rng.uniform(-2, 1, (n, 1, 1)), 0)
    return (
        maps * (rng.random((n, h, 1)) < 0.8) * (rng.random((n, 1, w)) < 0.8) * (rng.random((n, 1, 1)) < 0.9)
    )


def low_rank(rng: np.random.Generator, n: int, h: int, w: int) -> Array:
    """Products of small whole numbers: ranks are exact, many rows and columns are multiples of others."""
    r = int(rng.integers(1, min(h, w) + 1))
    return np.einsum("nhr,nrw->nhw", rng.integers(-1, 2, (n, h, r)), rng.integers(-2, 3, (n, r, w))) * 1.0


def saturated(rng: np.random.Generator, n: int, h: int, w: int) -> Array:
    """Dense maps."""
    return rng.standard_normal((n, h, w)) + 3


def graded(rng: np.random.Generator, n: int, h: int, w: int) -> Array:
    """Singular values from 1 down to 1e-9: some lie anywhere near the threshold."""
    return np.stack([with_values(rng, h, w, 10 ** rng.uniform(-9, 0, min(h, w))) for _ in range(n)])


KINDS = [sparse, low_rank, saturated, graded]


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 13),
    st.integers(1, 13),
    st.sampled_from(["float32", "float64"]),
    st.integers(0, 10**6),
)
def test_ranks_are_those_of_the_svd(kind: Any, h: int, w: int, dtype: str, seed: int) -> None:
    maps = kind(np.random.default_rng(seed), 9, h, w).astype(dtype)
    found, bounds = ranks_and_bounds(maps)
    np.testing.assert_array_equal(found, by_svd(maps))
    if dtype == "float32":
        np.testing.assert_array_equal(found, np.linalg.matrix_rank(maps))
    rows, columns = (maps != 0).any(2).sum(1), (maps != 0).any(1).sum(1)
    np.testing.assert_array_equal(bounds, np.minimum(rows, columns))
    assert (found <= bounds).all()


@pytest.mark.parametrize("hw", [(16, 16), (28, 28), (32, 32), (31, 40), (41, 41), (48, 64), (56, 56)])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_large_maps(kind: Any, hw: tuple[int, int]) -> None:
    maps = kind(np.random.default_rng(3), 12, *hw).astype(np.float32)
    np.testing.assert_array_equal(ranks(maps), np.linalg.matrix_rank(maps))


@pytest.mark.parametrize("hw", [(2, 2), (2, 5), (4, 4), (8, 8), (14, 9), (32, 32), (48, 44)])
@pytest.mark.parametrize("rtol", [None, 1e-2, 1e-10, 1e-15])
def test_singular_values_next_to_the_threshold(hw: tuple[int, int], rtol: float | None) -> None:
    rng = np.random.default_rng(5)
    tolerance = default_rtol(*hw) if rtol is None else rtol
    factors = [1 + sign * 10.0**-e for e in range(0, 9) for sign in (1, -1)] + [0.3, 0.6, 0.9, 1.1, 1.5, 3]
    k = min(hw)
    maps = []
    for factor in factors:
        for above in {0, k // 2, k - 2}:
            values = np.concatenate([[1.0], np.full(above, 0.3), np.full(k - 1 - above, tolerance * factor)])
            maps.append(with_values(rng, *hw, values) * 10 ** rng.uniform(-3, 3))
    stacked = np.stack(maps)
    np.testing.assert_array_equal(ranks(stacked, rtol), by_svd(stacked, rtol))


def test_the_tolerance_is_strict() -> None:
    """A singular value equal to the threshold does not count; the next number above it does."""
    eps = np.float32(2.0**-23)
    at, above = 2 * eps, np.nextafter(2 * eps, np.float32(1))
    maps = np.array([[[1, 0], [0, at]], [[1, 0], [0, above]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]], np.float32)
    assert ranks(maps).tolist() == [1, 2, 1, 0]
    assert ranks(maps, 1e-3).tolist() == [1, 1, 1, 0]
    assert ranks(maps, 0.0).tolist() == [2, 2, 1, 0]


@pytest.mark.parametrize("n", [2, 3, 8, 16])
def test_a_pivot_that_vanishes_decides_nothing(n: int) -> None:
    """G[0, 0] next to the shifts at which eigenvalues are counted, coupled to the rest: elimination breaks down."""
    rng = np.random.default_rng(n)
    maps = []
    for factor in np.concatenate([np.linspace(0.5, 1.5, 41), 1 + np.array([-1e-13, 0, 1e-13, 1e-9])]):
        for share in (9 / 8, 7 / 8, 1.0):
            one = rng.standard_normal((n, n))
            one[1:] /= np.linalg.norm(one[1:], 2)
            one[0] *= default_rtol(n, n) * np.sqrt(share * factor) / np.linalg.norm(one[0])
            maps.append(one)
    stacked = np.stack(maps)
    np.testing.assert_array_equal(ranks(stacked), by_svd(stacked))


def test_a_pivot_of_exactly_zero_decides_nothing() -> None:
    """Behind such a pivot no eigenvalue can be counted: here one that lies a little above the threshold."""
    rtol, maps = default_rtol(3, 3), []
    a2 = (1.03 * rtol) ** 2
    b = np.sqrt(7 / 8 * rtol**2 / (1 + a2 + 7 / 8 * rtol**2)) * (1 - 200 * 2.0**-53)
    for _ in range(400):
        b = np.nextafter(b, 1)
        maps.append(np.diag([1.0, b, 1.03 * rtol]))
    stacked = np.stack(maps)
    assert (by_svd(stacked) == 2).all()
    np.testing.assert_array_equal(ranks(stacked), 2)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-3, 1e30, 3e38])
def test_ranks_do_not_depend_on_the_scale(scale: float) -> None:
    rng = np.random.default_rng(1)
    maps = (rng.integers(0, 3, (40, 5, 6)) / 2 * scale).astype(np.float32)
    np.testing.assert_array_equal(ranks(maps), by_svd(maps))
    for shape in ((40, 5, 6), (5, 44, 50)):
        wide = rng.integers(0, 3, shape) * 1.0
        for huge in (1e200, 1e100, 1e-161, 1e-200, 1e300, 1e-300):
            np.testing.assert_array_equal(ranks(wide * huge), by_svd(wide))


def test_the_svd_is_left_for_the_few(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    maps = {s: sparse(rng, 300, s, s).astype(np.float32) for s in (2, 4, 8, 16, 32, 48)}
    expected = {s: by_svd(one) for s, one in maps.items()}
    decompose, taken = np.linalg.svd, []
    monkeypatch.setattr(
        np.linalg, "svd", lambda a, **options: (taken.append(len(a)), decompose(a, **options))[1]
    )
    for s, one in maps.items():
        np.testing.assert_array_equal(ranks(one), expected[s])
    assert sum(taken) < 0.02 * 300 * len(maps)


def test_maps_of_any_leading_axes_and_many_chunks() -> None:
    rng = np.random.default_rng(2)
    maps = sparse(rng, 3000, 8, 8).astype(np.float32)
    whole = ranks(maps)
    np.testing.assert_array_equal(whole, by_svd(maps))
    np.testing.assert_array_equal(ranks(maps.reshape(3, 10, 100, 8, 8)), whole.reshape(3, 10, 100))
    np.testing.assert_array_equal(ranks(maps.transpose(0, 2, 1)), whole)
    assert ranks(maps[7]).shape == () and ranks(maps[7]) == whole[7]
    assert ranks(maps[:0]).shape == (0,)
    assert ranks(np.eye(3, dtype=bool)) == 3


def test_nuclear_norms() -> None:
    rng = np.random.default_rng(4)
    values = rng.uniform(0, 2, (6, 4))
    maps = np.stack([with_values(rng, 4, 7, one) for one in values])
    np.testing.assert_allclose(
        nuclear_norms(maps.reshape(2, 3, 4, 7)), values.sum(1).reshape(2, 3), rtol=1e-12
    )


def test_mean_rank_by_hand() -> None:
    eye, one, zero = np.eye(2), np.ones((2, 2)), np.zeros((2, 2))
    maps = np.array([[eye, one, zero], [one, one, zero], [eye, zero, zero]], np.float32)
    np.testing.assert_array_equal(mean_rank(maps), [5 / 3, 2 / 3, 0])
    np.testing.assert_array_equal(mean_rank(maps[:1, :, :1, :1]), [1, 1, 0])


@pytest.mark.parametrize(
    "maps, rtol, match",
    [
        (np.zeros(4), None, "h, w"),
        (np.zeros((2, 0, 3)), None, "h, w"),
        (np.zeros((2, 2), complex), None, "real"),
        (np.full((2, 2), np.nan), None, "not finite"),
        (np.array([[1, np.inf], [0, 1]], np.float32), None, "not finite"),
        (np.eye(2), -1e-3, "rtol"),
        (np.eye(2), 1.0, "rtol"),
    ],
)
def test_what_are_no_maps_is_refused(maps: Array, rtol: float | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ranks(maps, rtol)


def test_mean_rank_needs_images() -> None:
    for shape in [(3, 4, 4), (0, 3, 4, 4)]:
        with pytest.raises(ValueError, match="at least one image"):
            mean_rank(np.zeros(shape))


# ---------------------------------------------------------------------------------------------- sums


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), st.integers(1, 5), st.integers(0, 99))
def test_sums_do_not_depend_on_batches_and_order(sizes: list[int], channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 9, (sum(sizes), channels))
    parts = [RankSums(channels, 8) for _ in sizes]
    for part, batch in zip(parts, np.split(found, np.cumsum(sizes)[:-1]), strict=True):
        part.add(batch)
    rng.shuffle(parts)  # type: ignore[arg-type]
    merged = RankSums(channels, 8)
    for part in parts:
        merged.merge(part)
    assert merged.count == len(found)
    assert merged.total.dtype == merged.squares.dtype == np.int64
    np.testing.assert_array_equal(merged.total, found.sum(0))
    np.testing.assert_array_equal(merged.mean, found.sum(0) / len(found))
    if len(found) > 1:
        deviation = found.std(0, ddof=1)
        np.testing.assert_allclose(merged.deviation, deviation, rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(merged.error, deviation / len(found) ** 0.5, rtol=1e-9, atol=1e-6)


def test_sums_refuse_what_does_not_fit() -> None:
    sums = RankSums(3, 4)
    assert np.isnan(sums.error).all() and sums.warnings() == ()
    for bad in (np.zeros((2, 2), int), np.zeros((2, 3)), np.full((1, 3), 5), np.full((1, 3), -1)):
        with pytest.raises(ValueError, match="ranks"):
            sums.add(bad)
    for other in (RankSums(3, 5), RankSums(2, 4)):
        with pytest.raises(ValueError, match="do not go with"):
            sums.merge(other)
    assert sums.count == 0 and not sums.total.any()


def warned(*columns: list[int], full: int = 8) -> list[str]:
    """The kinds of warning for ranks given filter by filter."""
    sums = RankSums(len(columns), full)
    sums.add(np.array(columns).T)
    return [line.split(":")[0] for line in sums.warnings()]


def test_warnings() -> None:
    assert warned([8, 7], [5, 6], [4, 4], [2, 3]) == []
    assert warned([8, 8], [8, 8], [8, 8]) == ["saturated", "tied"]
    assert warned([0, 0], [5, 6], [7, 3]) == ["dead"]
    assert warned([0, 0], [0, 0], [0, 0]) == ["dead"]  # dead filters are not called tied
    assert warned([3, 4], [5, 2], [6, 1], [4, 4]) == ["tied"]
    assert warned([1, 0], [1, 1], full=1) == []
    sums = RankSums(2, 4)
    sums.add(np.array([[0, 3], [0, 4]]))
    assert sums.warnings() == ("dead: 1 of 2 filters give maps of zeros on every image",)


# ------------------------------------------------------------------------------------------ criteria

RNG = np.random.default_rng(11)
WEIGHT = RNG.standard_normal((5, 3, 2, 2)).astype(np.float32)
EVIDENCE = Evidence(
    weight=WEIGHT,
    readers=(RNG.standard_normal((5, 7)), RNG.standard_normal((5, 2, 3))),
    gamma=np.array([0.5, -2, 0, 1, -0.1]),
    rank=np.array([3.0, 1, 3, 5, 0]),
    bound=np.array([3.5, 1, 4, 5, 0]),
    density=np.array([0.1, 0.2, 0.3, 0.4, 0.0]),
    activation=np.array([0.3, 0.1, 0.9, 0.2, 0]),
    nuclear=np.array([1.0, 2, 3, 4, 5]),
    channels=5,
    seed=3,
)


def test_scores_by_hand() -> None:
    assert EVIDENCE.readers is not None
    flat = WEIGHT.reshape(5, -1).astype(np.float64)
    distances = [sum(np.sqrt(((a - b) ** 2).sum()) for b in flat) for a in flat]
    expected = {
        "rank": [3, 1, 3, 5, 0],
        "reverse": [-3, -1, -3, -5, 0],
        "edge": [4 * 1.0, 2 * 1.0, 2 * 1.0 + 1, 1, 0],  # places 2, 1, 3, 4, 0 of 5
        "rowcol": [3.5, 1, 4, 5, 0],
        "apoz": [0.1, 0.2, 0.3, 0.4, 0],
        "activation": [0.3, 0.1, 0.9, 0.2, 0],
        "nuclear": [1, 2, 3, 4, 5],
        "l1": [np.abs(WEIGHT[i].astype(np.float64)).sum() for i in range(5)],
        "next-l1": [sum(np.abs(one[i]).sum() for one in EVIDENCE.readers) for i in range(5)],
        "gamma": [0.5, 2, 0, 1, 0.1],
        "geometric-median": distances,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(scores(name, EVIDENCE), values, rtol=1e-12, err_msg=name)
    assert sorted([*expected, "random"]) == sorted(CRITERIA)


def test_edge_takes_the_ends_in_turn() -> None:
    found = order(scores("edge", Evidence(rank=np.array([5.0, 1, 4, 2, 3, 0]))))
    assert found.tolist() == [5, 0, 1, 2, 3, 4]  # ranks 0, 5, 1, 4, 2, 3


def test_random_is_an_order_by_the_seed() -> None:
    first = scores("random", Evidence(channels=50, seed=1))
    assert sorted(first) == list(range(50))
    np.testing.assert_array_equal(first, scores("random", Evidence(channels=50, seed=1)))
    assert (first != scores("random", Evidence(channels=50, seed=2))).any()


def test_what_a_criterion_lacks_is_named() -> None:
    for name, criterion in CRITERIA.items():
        with pytest.raises(ValueError, match=f'"{name}" needs {criterion.needs[0]}'):
            scores(name, Evidence())
    with pytest.raises(ValueError, match="needs readers"):
        scores("next-l1", Evidence(readers=()))
    with pytest.raises(ValueError, match="there are rank, reverse"):
        scores("ranks", EVIDENCE)
    with pytest.raises(ValueError, match="not finite"):
        scores("rank", Evidence(rank=np.array([1, np.nan])))
    assert {name for name, one in CRITERIA.items() if not one.needs_images} == {
        "l1", "next-l1", "gamma", "geometric-median", "random",
    }  # fmt: skip


def test_ties_lose_the_lower_filter_first() -> None:
    values = [2.0, 1, 2, 1, 2, 1]
    assert order(values).tolist() == [1, 3, 5, 0, 2, 4]
    assert kept(values, 2).tolist() == [0, 2, 4, 5]
    assert kept(values, 4).tolist() == [2, 4]
    assert kept(values, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert [tied_at(values, p) for p in range(7)] == [0, 3, 3, 0, 3, 3, 0]
    many = np.zeros(4000)  # long enough for a sort that is not stable to show it
    assert kept(many, 1500).tolist() == list(range(1500, 4000))


def test_groups_lose_equally_many() -> None:
    values = [1.0, 2, 3, 30, 20, 10]
    assert kept(values, 2).tolist() == [2, 3, 4, 5]
    assert kept(values, 2, groups=2).tolist() == [1, 2, 3, 4]
    for prune, groups in ((1, 2), (2, 4), (6, 1), (-1, 1)):
        with pytest.raises(ValueError, match="go"):
            kept(values, prune, groups)


def test_filters_of_a_deconvolution() -> None:
    """(in, c/g, ...): filter o of group b reads the inputs of group b."""
    groups, inputs, outputs = 2, 6, 4
    stored = RNG.standard_normal((inputs, outputs // groups, 3, 2))
    rows = criteria.filters(stored, transposed=True, groups=groups)
    assert rows.shape == (outputs, inputs // groups, 3, 2)
    for filter_ in range(outputs):
        group, local = divmod(filter_, outputs // groups)
        for i in range(inputs // groups):
            np.testing.assert_array_equal(rows[filter_, i], stored[group * 3 + i, local])
    assert criteria.filters(stored) is stored
