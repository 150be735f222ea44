"""The two schemes that need responses: what they compute, what they cost, published ranks and totals."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lra.decomposition import Decomposition, Geometry, Shape, Step, macs
from lra.linalg import AffineMap, by_group, reduced_rank_regression
from lra.nonlinear import fit_features
from lra.ranks import strip
from lra.schemes import SCHEMES, asymmetric3d, response, spatial

Array = NDArray[Any]

# (out, in/group, kh, kw), geometry, input (h, w)
CASES = [
    ((8, 3, 3, 3), Geometry(pad=(1, 1)), (7, 9)),
    ((8, 3, 3, 5), Geometry((2, 3), (1, 2), (1, 1), 1), (11, 14)),
    ((6, 2, 5, 3), Geometry((1, 2), (2, 3), (2, 1), 2), (13, 9)),
    ((6, 4, 1, 3), Geometry((2, 1), (1, 0), (3, 2), 3), (6, 9)),
    ((12, 2, 3, 3), Geometry((1, 1), (2, 2), (2, 2), 4), (8, 8)),
    ((4, 5, 1, 1), Geometry(), (3, 2)),
]

# VGG-16 by layer: out, in, output size; conv1_2 to conv5_3 are decomposed
VGG = [
    (64, 3, 224), (64, 64, 224), (128, 64, 112), (128, 128, 112), (256, 128, 56), (256, 256, 56), (256, 256, 56),
    (512, 256, 28), (512, 512, 28), (512, 512, 28), (512, 512, 14), (512, 512, 14), (512, 512, 14),
]  # fmt: skip
VGG_MACS = 15_346_630_656
SELECTED = {
    2: "18 41 50 94 96 116 207 213 260 467 455 442",
    3: "15 31 34 68 64 75 134 126 146 312 307 294",
    4: "11 25 28 52 46 56 104 92 100 232 224 214",
}
UNIFORM = {
    2: "28 52 57 104 115 115 209 230 230 230 230 230",
    3: "19 34 38 69 76 76 139 153 153 153 153 153",
    4: "14 26 28 52 57 57 104 115 115 115 115 115",
}
HE = "17 37 47 83 89 106 175 192 227 398 390 379"
SPP = [(256, 96, 5), (512, 256, 3), (512, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 3)]
SPP_UNIFORM = {
    2.1: "110 199 219 219 219 219",  # the row labelled 2x
    3: "77 139 153 153 153 153",
    4: "57 104 115 115 115 115",
    5: "46 83 92 92 92 92",
}


def ints(words: str) -> list[int]:
    return [int(word) for word in words.split()]


def convolve(x: Array, w: Array, b: Array | None, g: Geometry | Step) -> Array:
    """Convolution by its definition: x (n, c, y, x) -> (n, o, y, x)."""
    return np.einsum("goi...,ngi...->ngo...", *_unfolded(x, w, g)).reshape(*_size(x, w, g)) + (
        0 if b is None else b[:, None, None]
    )


def _size(x: Array, w: Array, g: Geometry | Step) -> tuple[int, ...]:
    windows = _windows(x, w, g)
    return len(x), len(w), *windows.shape[2:4]


def _windows(x: Array, w: Array, g: Geometry | Step) -> Array:
    """What each output position sees: (n, c, y, x, kh, kw)."""
    (ph, pw), (sh, sw), (dh, dw), (kh, kw) = g.pad, g.stride, g.dilation, w.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    rows = range(0, x.shape[2] - dh * (kh - 1), sh)
    cols = range(0, x.shape[3] - dw * (kw - 1), sw)
    seen = [[x[:, :, r : r + dh * kh : dh, c : c + dw * kw : dw][:, :, :kh, :kw] for c in cols] for r in rows]
    return np.array(seen).transpose(2, 3, 0, 1, 4, 5)


def _unfolded(x: Array, w: Array, g: Geometry | Step) -> tuple[Array, Array]:
    windows = _windows(x, w, g)
    n, _, height, width = windows.shape[:4]
    columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(n, g.group, -1, height * width)
    return w.reshape(g.group, len(w) // g.group, -1), columns


def rows(maps: Array) -> Array:
    """(n, c, y, x) -> (n·y·x, c)."""
    return maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])


def maps(samples: Array, like: Array) -> Array:
    return samples.reshape(len(like), *like.shape[2:], -1).transpose(0, 3, 1, 2)


def run(chain: Decomposition, x: Array) -> Array:
    for one in chain.steps:
        x = convolve(x, one.weight, one.bias, one)
    return x


def dense(mapping: AffineMap, group: int) -> Array:
    """The block-diagonal matrix of a map."""
    blocks = [p @ q.T for p, q in zip(*(np.split(part, group) for part in mapping[:2]), strict=True)]
    d = len(mapping.P) // group
    full = np.zeros((d * group, len(mapping.Q)))
    for g, block in enumerate(blocks):
        full[g * d : g * d + d, g * block.shape[1] : (g + 1) * block.shape[1]] = block
    return full


def layer(shape: Shape, geometry: Geometry, in_hw: tuple[int, int]) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, shape[1] * geometry.group, *in_hw))
    return x, rng.standard_normal(shape), rng.standard_normal(shape[0])


def random_map(d: int, m: int, rank: int, group: int) -> AffineMap:
    rng = np.random.default_rng(1)
    return AffineMap(*(rng.standard_normal(s) for s in [(d, rank // group), (m, rank // group), d]))


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "geometry", "in_hw"), CASES)
def test_pair_is_the_map_of_the_responses_borders_included(shape, geometry, in_hw) -> None:
    x, w, w0 = layer(shape, geometry, in_hw)
    for rank in range(geometry.group, shape[0] + 1, geometry.group):
        mapping = random_map(shape[0], shape[0], rank, geometry.group)
        M = dense(mapping, geometry.group)
        for bias in (w0, None):
            y = convolve(x, w, bias, geometry)
            expected = np.einsum("ij,njyx->niyx", M, y) + mapping.b[:, None, None]
            chain = response.factor(w, bias, geometry, mapping)
            np.testing.assert_allclose(run(chain, x), expected, atol=1e-11)
            assert [s.shape for s in chain.steps] == [
                s.shape for s in response.structure(shape, geometry, rank)
            ]
            assert chain.steps[0].bias is None
            np.testing.assert_allclose(
                run(response.absorb(w, bias, geometry, mapping), x), expected, atol=1e-11
            )


@pytest.mark.parametrize(("shape", "geometry", "in_hw"), CASES)
def test_three_steps_are_the_map_of_the_responses_of_two(shape, geometry, in_hw) -> None:
    x, w, w0 = layer(shape, geometry, in_hw)
    g = geometry.group
    for inner, outer, merge in itertools.product(
        range(g, spatial.max_rank(shape, g) + 1, 3 * g), range(g, shape[0] + 1, 2 * g), (True, False)
    ):
        pair = spatial.spectrum(w, geometry).factor(inner, w0)
        mapping = random_map(shape[0], shape[0], outer, g)
        expected = np.einsum("ij,njyx->niyx", dense(mapping, g), run(pair, x)) + mapping.b[:, None, None]
        chain = asymmetric3d.factor(pair, w0, mapping, merge)
        np.testing.assert_allclose(run(chain, x), expected, atol=1e-10)
        shapes = asymmetric3d.structure(shape, geometry, (inner, outer), merge)
        for one, planned in zip(chain.steps, shapes, strict=True):
            fields = ("suffix", "shape", "stride", "pad", "dilation", "group")
            assert [getattr(one, f) for f in fields] == [getattr(planned, f) for f in fields]
        assert all(one.bias is None for one in chain.steps[:-1])


@pytest.mark.parametrize(("shape", "geometry", "in_hw"), CASES)
def test_three_steps_from_features_of_v(shape, geometry, in_hw) -> None:
    x, w, _ = layer(shape, geometry, in_hw)
    g = geometry.group
    inner, outer = 2 * g if spatial.max_rank(shape, g) > g else g, g
    pair = spatial.spectrum(w, geometry).factor(inner)
    vertical, horizontal = pair.steps
    seen = convolve(x, vertical.weight, None, vertical)
    columns = _unfolded(seen, horizontal.weight, horizontal)[1]  # (n, g, r·kw, y·x)
    F = columns.transpose(0, 3, 1, 2).reshape(-1, inner * shape[3])
    mapping = random_map(shape[0], inner * shape[3], outer, g)
    expected = maps(F @ dense(mapping, g).T + mapping.b, convolve(x, w, None, geometry))
    for merge in (True, False):
        chain = asymmetric3d.factor_features(pair, mapping, merge)
        np.testing.assert_allclose(run(chain, x), expected, atol=1e-10)
    y = rows(convolve(x, w, None, geometry))
    refit = by_group(lambda f, z: fit_features(f, z, activation="none", ridge=0.0).mapping, g, F, y)
    chain = asymmetric3d.factor_features(pair, refit)
    assert [one.suffix for one in chain.steps] == ["_v", "_h"]
    before, after = (np.sum((rows(run(c, x)) - y) ** 2) for c in (pair, chain))
    assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize(("shape", "geometry", "in_hw"), CASES)
def test_full_rank_leaves_the_layer_as_it_was(shape, geometry, in_hw) -> None:
    x, w, w0 = layer(shape, geometry, in_hw)
    y = convolve(x, w, w0, geometry)
    g = geometry.group
    mapping = by_group(lambda a: reduced_rank_regression(a, a, shape[0] // g), g, rows(y))
    np.testing.assert_allclose(run(response.factor(w, w0, geometry, mapping), x), y, atol=1e-9)
    pair = spatial.spectrum(w, geometry).factor(spatial.max_rank(shape, g), w0)
    np.testing.assert_allclose(run(asymmetric3d.factor(pair, w0, mapping), x), y, atol=1e-9)


def test_symmetric_error_is_the_tail_of_the_eigenvalues() -> None:
    shape, geometry, in_hw = CASES[0]
    x, w, w0 = layer(shape, geometry, in_hw)
    y = rows(convolve(x, w, w0, geometry))
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    for rank in range(1, 9):
        basis = vectors[:, -rank:]
        pca = AffineMap(basis, basis, y.mean(0) - basis @ (basis.T @ y.mean(0)))
        found = rows(run(response.factor(w, w0, geometry, pca), x))
        assert np.sum((found - y) ** 2) / len(y) == pytest.approx(values[:-rank].sum(), abs=1e-10)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_merging_is_where_it_is_cheaper(group, inner, outer, out, width) -> None:
    if outer > out or inner > out * width:
        return
    shape = (out * group, 9, 1, width)
    ranks = (inner * group, outer * group)
    whole = asymmetric3d.structure(shape, Geometry(group=group), ranks)
    apart = asymmetric3d.structure(shape, Geometry(group=group), ranks, merge=False)
    assert len(apart) == 3
    together = spatial.structure(shape, Geometry(group=group), ranks[0])
    costs = [sum(int(np.prod(s.shape)) for s in chain) for chain in (apart, together)]
    assert len(whole) == (2 if costs[1] <= costs[0] else 3)
    assert sum(int(np.prod(s.shape)) for s in whole) == min(costs)


# --- what they cost: published ranks and totals ----------------------------------------------------


def total(chains: list[Any]) -> int:
    """MACs of VGG-16 with conv1_1 as it is and the others as given, chains or numbers of filters."""
    sizes = [size for _, _, size in VGG]
    return 86_704_128 + sum(macs(chain, (s, s)) for chain, s in zip(chains, sizes[1:], strict=True))


def vgg_shapes() -> list[Shape]:
    return [(out, depth, 3, 3) for out, depth, _ in VGG[1:]]


SAME = Geometry(pad=(1, 1))


def test_original_vgg() -> None:
    whole = [asymmetric3d.structure(s, SAME, (1, 1))[:0] for s in vgg_shapes()]
    assert total(whole) == 86_704_128
    assert sum(out * depth * 9 * size**2 for out, depth, size in VGG) == VGG_MACS


@pytest.mark.parametrize("speedup", [2, 3, 4])
def test_uniform_ranks_are_those_published_for_vgg(speedup: int) -> None:
    assert [response.speedup_rank(s, 1, speedup) for s in vgg_shapes()] == ints(UNIFORM[speedup])


@pytest.mark.parametrize("speedup", SPP_UNIFORM)
def test_uniform_ranks_are_those_published_for_spp(speedup: float) -> None:
    shapes = [(out, depth, k, k) for out, depth, k in SPP]
    assert [response.speedup_rank(s, 1, speedup) for s in shapes] == ints(SPP_UNIFORM[speedup])


def test_uniform_rank_at_a_fractional_speedup_is_exact() -> None:
    """The paper prints 191; its formula gives 192 exactly."""
    assert response.speedup_rank((512, 512, 3, 3), 1, 2.4) == 192


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.floats(1, 9))
def test_speedup_rank_is_the_largest_that_reaches_it(group, out, depth, k, speedup) -> None:
    shape = (out * group, depth, k, k)
    rank = response.speedup_rank(shape, group, speedup)
    whole, one = out * group * depth * k * k, depth * k * k + out
    assert rank % group == 0 and rank * one * speedup <= whole * (1 + 1e-9)
    assert (rank + group) * one * speedup > whole * (1 - 1e-9)


@pytest.mark.parametrize(("speedup", "ratio"), [(2, 2.001), (3, 3.004), (4, 4.005)])
def test_selected_ranks_reach_their_speedup(speedup: int, ratio: float) -> None:
    chains = [
        response.structure(s, SAME, r) for s, r in zip(vgg_shapes(), ints(SELECTED[speedup]), strict=True)
    ]
    assert VGG_MACS / total(chains) == pytest.approx(ratio, abs=5e-4)
    if speedup == 4:
        assert total(chains) == 3_831_439_360


def test_vertical_ranks_by_the_budget_rule() -> None:
    outer = ints(SELECTED[2])
    inner = [asymmetric3d.vertical_rank(s, 1, r, 4) for s, r in zip(vgg_shapes(), outer, strict=True)]
    assert inner == ints("18 29 47 63 93 106 133 200 229 325 321 316")
    chains = [
        asymmetric3d.structure(s, SAME, ranks, merge=False)
        for s, ranks in zip(vgg_shapes(), zip(inner, outer, strict=True), strict=True)
    ]
    assert VGG_MACS / total(chains) == pytest.approx(3.98, abs=5e-3)
    literal = [
        asymmetric3d.vertical_rank(s, 1, r, 4, "literal") for s, r in zip(vgg_shapes(), outer, strict=True)
    ]
    chains = [
        asymmetric3d.structure(s, SAME, ranks, merge=False)
        for s, ranks in zip(vgg_shapes(), zip(literal, outer, strict=True), strict=True)
    ]
    assert VGG_MACS / total(chains) == pytest.approx(3.58, abs=5e-3)


@pytest.mark.parametrize(
    ("shape", "group", "rank", "speedup"), [((96, 32, 3, 5), 2, 24, 4.0), ((12, 6, 5, 1), 1, 9, 1.5)]
)
def test_vertical_rank_keeps_to_its_budget(shape: Shape, group: int, rank: int, speedup: float) -> None:
    out, depth, kh, kw = shape
    mixing, taps = rank * out / group, rank * depth * kh * kw
    one = kh * depth + kw * rank / group  # MACs of one more component of V
    inner = asymmetric3d.vertical_rank(shape, group, rank, speedup)
    left = (taps + mixing) / speedup**0.5 - mixing
    assert inner * one <= left < (inner + group) * one
    literal = asymmetric3d.vertical_rank(shape, group, rank, speedup, "literal")
    assert literal * one <= taps / speedup**0.5 < (literal + group) * one


def test_vertical_rank_at_its_limits() -> None:
    assert asymmetric3d.vertical_rank((64, 1, 3, 3), 1, 60, 100) == 0
    assert asymmetric3d.vertical_rank((64, 3, 3, 3), 1, 64, 1) <= 9


def test_ranks_in_the_published_code_are_a_fourfold_speedup() -> None:
    chains = [
        asymmetric3d.structure(s, SAME, (r, r), merge=False)
        for s, r in zip(vgg_shapes(), ints(HE), strict=True)
    ]
    assert total(chains) == 3_835_207_852
    assert VGG_MACS / total(chains) == pytest.approx(4.0015, abs=5e-5)


def test_published_network_with_pruned_channels() -> None:
    outs = [64, *ints("59 118 119 226 243 256 482 457 512 512 512 512")]
    ranks = ints(HE)
    ranks[0] = 22
    chains = [
        asymmetric3d.structure((out, depth, 3, 3), SAME, (r, r))
        for depth, out, r in zip(outs, outs[1:], ranks, strict=False)
    ]
    assert total(chains) == 3_743_999_056
    assert [len(chain) for chain in chains] == [3] * 9 + [2] * 3  # the last three merged, by the rule


def test_published_network_of_fewer_filters() -> None:
    outs = [3, *ints("24 22 41 51 108 89 111 184 276 228 512 512 512")]
    sizes = [size for _, _, size in VGG]
    cost = sum(o * i * 9 * s**2 for i, o, s in zip(outs, outs[1:], sizes, strict=False))
    assert cost == 3_391_649_856


@settings(deadline=None)
@given(st.integers(0, 999), st.floats(0.3, 0.95), st.sampled_from(["exact", "paper"]))
def test_stripping_is_sorting_once(seed: int, share: float, measure: str) -> None:
    """Where a rank of a layer always costs the same, the heap strips in the order of one sort."""
    rng = np.random.default_rng(seed)
    spectra = [np.sort(rng.exponential(size=rng.integers(2, 12)))[::-1] for _ in range(5)]
    costs = rng.integers(1, 50, 5).tolist()
    budget = max(share * sum(len(s) * c for s, c in zip(spectra, costs, strict=True)), sum(costs))
    order = []
    for index, (values, cost) in enumerate(zip(spectra, costs, strict=True)):
        last = values / values.cumsum()
        drop = last if measure == "paper" else -np.log1p(-np.minimum(last, 1 - 1e-16))
        order += [(drop[a] / cost, index) for a in range(1, len(values))]
    kept = [len(values) for values in spectra]
    for _, index in sorted(order):
        if sum(k * c for k, c in zip(kept, costs, strict=True)) <= budget:
            break
        kept[index] -= 1
    assert strip(spectra, costs, 0, budget, measure) == kept  # type: ignore[arg-type]


# --- refusals -------------------------------------------------------------------------------------


def test_refusals() -> None:
    w = np.ones((6, 2, 3, 3))
    grouped = Geometry(group=2)
    with pytest.raises(ValueError, match="not a multiple of group 2"):
        response.structure((6, 2, 3, 3), grouped, 3)
    with pytest.raises(ValueError, match="above the largest possible, 6"):
        response.structure((6, 2, 3, 3), grouped, 8)
    with pytest.raises(ValueError, match="expected 6 by 6"):
        response.factor(w, None, Geometry(), random_map(6, 5, 2, 1))
    with pytest.raises(ValueError, match=r"bias of shape \(5,\)"):
        response.factor(w, np.ones(5), Geometry(), random_map(6, 6, 2, 1))
    with pytest.raises(ValueError, match="group 4 does not divide 6"):
        response.factor(w, None, Geometry(group=4), random_map(6, 6, 4, 4))
    for ranks in [(0, 1), (1, 7), (7, 1)]:
        with pytest.raises(ValueError, match="rank"):
            asymmetric3d.structure((6, 2, 3, 3), Geometry(), ranks)
    pair = spatial.spectrum(w, Geometry()).factor(1)
    with pytest.raises(ValueError, match="expected 6 by 3"):
        asymmetric3d.factor_features(pair, random_map(6, 2, 2, 1))
    with pytest.raises(ValueError, match="not a pair"):
        asymmetric3d.factor(Decomposition(pair.steps[:1]), None, random_map(6, 6, 2, 1))
    with pytest.raises(ValueError, match="neither"):
        asymmetric3d.vertical_rank((6, 2, 3, 3), 1, 2, 4, "other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="below 1"):
        asymmetric3d.vertical_rank((6, 2, 3, 3), 1, 2, 0.5)
    assert not {"response", "asymmetric-3d"} & set(SCHEMES)
