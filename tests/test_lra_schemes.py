"""The schemes against dense convolution, closed forms and each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lra.decomposition import Decomposition, Geometry, Step, StepShape, macs
from lra.schemes import SCHEMES
from lra.schemes import cross_filter as cf

LINEAR = ("pca", "svd", "spatial", "spatial-hv")
ALL = (*LINEAR, "kmeans")

# (out, in/group, kh, kw), geometry, input (h, w)
CASES = [
    ((8, 3, 3, 3), Geometry(pad=(1, 1)), (7, 9)),
    ((8, 3, 3, 5), Geometry((2, 3), (1, 2), (1, 1), 1), (11, 14)),
    ((6, 2, 5, 1), Geometry((1, 2), (2, 3), (2, 1), 2), (13, 8)),
    ((6, 4, 1, 3), Geometry((2, 1), (1, 0), (3, 2), 3), (6, 9)),
    ((12, 1, 3, 3), Geometry((1, 1), (2, 2), (2, 2), 4), (8, 8)),
    ((4, 5, 1, 1), Geometry(), (3, 2)),
    ((1, 4, 3, 3), Geometry(pad=(1, 1)), (5, 5)),
    ((5, 1, 1, 1), Geometry(pad=(1, 0)), (4, 4)),
    ((3, 1, 2, 2), Geometry(group=3), (4, 5)),
]


def convolve(x: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None, g: Geometry | Step) -> NDArray[Any]:
    """Convolution by its definition, one output position at a time: x (c, y, x) -> (o, y, x)."""
    out, depth, kh, kw = w.shape
    x = np.pad(x, ((0, 0), (g.pad[0],) * 2, (g.pad[1],) * 2))
    (sh, sw), (dh, dw) = g.stride, g.dilation
    rows = range(0, x.shape[1] - dh * (kh - 1), sh)
    cols = range(0, x.shape[2] - dw * (kw - 1), sw)
    y = np.zeros((out, len(rows), len(cols)))
    for o in range(out):
        first = o // (out // g.group) * depth
        for i, row in enumerate(rows):
            for j, col in enumerate(cols):
                patch = x[first : first + depth, row : row + dh * kh : dh, col : col + dw * kw : dw]
                y[o, i, j] = np.sum(patch[:, :kh, :kw] * w[o]) + (0 if b is None else b[o])
    return y


def random_weight(shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape)


def ranks_of(name: str, shape: tuple[int, int, int, int], group: int) -> range:
    return range(group, SCHEMES[name].max_rank(shape, group) + 1, group)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("shape", "geometry", "in_hw"), CASES)
def test_chain_computes_what_its_dense_kernel_computes(name, shape, geometry, in_hw) -> None:
    weight = random_weight(shape)
    bias = random_weight(shape[:1], 1)
    x = random_weight((shape[1] * geometry.group, *in_hw), 2)
    spectrum = SCHEMES[name].spectrum(weight, geometry)
    for rank in (geometry.group, spectrum.max_rank):
        chain = spectrum.factor(rank, bias)
        y = x
        for step in chain.steps:
            y = convolve(y, step.weight, step.bias, step)
        np.testing.assert_allclose(y, convolve(x, chain.reconstruct(), bias, geometry), rtol=0, atol=1e-12)
    np.testing.assert_allclose(y, convolve(x, weight, bias, geometry), rtol=0, atol=1e-12)  # at full rank


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("shape", "geometry", "in_hw"), CASES)
def test_structure_is_that_of_the_factors(name, shape, geometry, in_hw) -> None:
    scheme = SCHEMES[name]
    spectrum = scheme.spectrum(random_weight(shape).astype(np.float32), geometry)
    assert spectrum.max_rank == scheme.max_rank(shape, geometry.group)
    for rank in ranks_of(name, shape, geometry.group):
        steps = spectrum.factor(rank).steps
        told = scheme.structure(shape, geometry, rank)
        made = [StepShape(s.suffix, s.shape, s.stride, s.pad, s.dilation, s.group) for s in steps]
        assert made == list(told)
        assert all(s.weight.dtype == np.float64 and s.weight.flags.c_contiguous for s in steps)
        assert all(s.bias is None for s in steps)
        assert macs(steps, in_hw) == macs(told, in_hw)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("shape", "geometry", "in_hw"), CASES)
def test_error_is_the_dropped_energy(name, shape, geometry, in_hw) -> None:
    weight = random_weight(shape)
    spectrum = SCHEMES[name].spectrum(weight, geometry)
    for rank, retained in zip(ranks_of(name, shape, geometry.group), spectrum.retained_curve(), strict=True):
        assert spectrum.retained(rank) == retained
        assert spectrum.factor(rank).error(weight) ** 2 == pytest.approx(1 - retained, abs=1e-12)
    assert retained == 1
    np.testing.assert_allclose(spectrum.energies.sum(), np.sum(weight**2))


shapes = st.tuples(*(st.integers(1, 4) for _ in range(4)))


@settings(deadline=None)
@given(shapes, st.integers(1, 3), st.integers(0, 99), st.sampled_from(ALL), st.data())
def test_any_layer(shape, group, seed, name, data) -> None:
    shape = (shape[0] * group, *shape[1:])
    components = data.draw(st.integers(0, 3))  # weights of low rank, down to all zero
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((components, int(np.prod(shape[1:]))))
    weight = (rng.standard_normal((shape[0], components)) @ basis).reshape(shape)
    spectrum = SCHEMES[name].spectrum(weight, Geometry(group=group))
    full = spectrum.factor(spectrum.max_rank)
    assert full.error(weight) < 1e-12
    assert spectrum.retained(spectrum.max_rank) == 1
    energy = data.draw(st.floats(0.01, 1))
    rank = spectrum.rank_for(energy)
    kept = np.split(spectrum.factor(rank).reconstruct(), group)
    for want, have in zip(np.split(weight, group), kept, strict=True):
        centre = want.mean(axis=0) if name == "kmeans" else 0
        assert np.sum((want - have) ** 2) <= (1 - energy + 1e-9) * np.sum((want - centre) ** 2) + 1e-24
    if name != "kmeans" and rank > group:
        fewer = spectrum.energies[:, rank // group - 1 :].sum(axis=1)
        assert (fewer > (1 - energy) * spectrum.energies.sum(axis=1)).any()  # the smallest such rank


@pytest.mark.parametrize("name", ["pca", "svd"])
def test_ranks_of_singular_values_4_3_2_1(name: str) -> None:
    left, _ = np.linalg.qr(random_weight((4, 4)))
    right, _ = np.linalg.qr(random_weight((18, 4)))
    weight = ((left * [4, 3, 2, 1]) @ right.T).reshape(4, 2, 3, 3)
    spectrum = SCHEMES[name].spectrum(weight, Geometry())
    np.testing.assert_allclose(spectrum.energies, [[16, 9, 4, 1]])
    np.testing.assert_allclose(spectrum.retained_curve(), np.array([16, 25, 29, 30]) / 30)
    assert [spectrum.rank_for(e) for e in (0.95, 0.90, 0.50)] == [3, 3, 1]
    assert [spectrum.rank_for(e) for e in (16 / 30, 25 / 30, 29 / 30, 1)] == [1, 2, 3, 4]  # >=, not >


@pytest.mark.parametrize("name", LINEAR)
def test_all_energy_of_weights_of_low_rank_needs_that_rank(name: str) -> None:
    weight = np.einsum("ro,ri,rh,rw->oihw", *(random_weight((2, n), n) for n in (8, 5, 3, 4)))
    spectrum = SCHEMES[name].spectrum(weight, Geometry())
    assert spectrum.rank_for(1) == 2
    assert spectrum.factor(2).error(weight) < 1e-13


def test_pca_is_orthonormal_and_svd_balanced_over_one_subspace() -> None:
    weight = random_weight((6, 2, 3, 3))
    values = np.linalg.svd(weight.reshape(6, -1), compute_uv=False)
    basis, linear = (s.weight for s in SCHEMES["pca"].spectrum(weight, Geometry()).factor(4).steps)
    np.testing.assert_allclose(linear[:, :, 0, 0].T @ linear[:, :, 0, 0], np.eye(4), atol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(basis.reshape(4, -1), axis=1), values[:4])
    np.testing.assert_allclose(basis.reshape(4, -1), linear[:, :, 0, 0].T @ weight.reshape(6, -1))
    half, other = (s.weight for s in SCHEMES["svd"].spectrum(weight, Geometry()).factor(4).steps)
    root = np.sqrt(values[:4])[:, None, None, None]
    np.testing.assert_allclose(half * root, basis, atol=1e-13)
    np.testing.assert_allclose(other[:, :, 0, 0], linear[:, :, 0, 0] * root[:, 0, 0, 0], atol=1e-13)


def test_pca_of_more_filters_than_weights_stays_orthonormal() -> None:
    _, linear = SCHEMES["pca"].spectrum(np.zeros((9, 1, 2, 2)), Geometry()).factor(4).steps
    np.testing.assert_allclose(linear.weight[:, :, 0, 0].T @ linear.weight[:, :, 0, 0], np.eye(4), atol=1e-14)


def test_spatial_is_the_truncated_svd_of_the_rearranged_kernel() -> None:
    """A[(i, h), (w, o)] of the closed form of Tai et al., entry by entry."""
    weight = random_weight((5, 3, 2, 4))
    matrix = np.empty((6, 20))
    for o, i, h, w in np.ndindex(weight.shape):
        matrix[i * 2 + h, w * 5 + o] = weight[o, i, h, w]
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    spectrum = SCHEMES["spatial"].spectrum(weight, Geometry())
    for rank in range(1, 7):
        chain = spectrum.factor(rank)
        vertical, horizontal = (step.weight for step in chain.steps)
        cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found = chain.reconstruct()
        for o, i, h, w in np.ndindex(weight.shape):
            assert found[o, i, h, w] == pytest.approx(cut[i * 2 + h, w * 5 + o], abs=1e-12)
            product = sum(vertical[q, i, h, 0] * horizontal[o, q, 0, w] for q in range(rank))
            assert found[o, i, h, w] == pytest.approx(product, abs=1e-12)
        np.testing.assert_allclose(np.sum(vertical**2, axis=(1, 2, 3)), s[:rank])
        np.testing.assert_allclose(np.sum(horizontal**2, axis=(0, 2, 3)), s[:rank])


def test_groups_are_factored_apart() -> None:
    weight = random_weight((8, 3, 3, 3))
    for name in ALL:
        whole = SCHEMES[name].spectrum(weight, Geometry(group=2)).factor(4).reconstruct()
        for half, want in zip(np.split(weight, 2), np.split(whole, 2), strict=True):
            alone = SCHEMES[name].spectrum(half, Geometry()).factor(2).reconstruct()
            np.testing.assert_allclose(alone, want, atol=1e-12)


def test_rank_for_serves_the_neediest_group() -> None:
    easy = np.outer([1.0, 2.0, 3.0], np.ones(4)).reshape(3, 1, 2, 2)
    hard = np.eye(3, 4).reshape(3, 1, 2, 2)
    spectrum = SCHEMES["pca"].spectrum(np.concatenate([easy, hard]), Geometry(group=2))
    assert spectrum.retained(4) > 0.95  # the layer as a whole keeps enough, but not its second group
    assert spectrum.rank_for(0.95) == 6


@pytest.mark.parametrize("name", ALL)
def test_release_forgets_nothing_that_matters(name: str) -> None:
    weight = random_weight((6, 2, 3, 3))
    spectrum = SCHEMES[name].spectrum(weight, Geometry())
    before = spectrum.factor(3, np.arange(6.0))
    curve = spectrum.retained_curve()
    spectrum.release()
    after = spectrum.factor(3, np.arange(6.0))
    np.testing.assert_array_equal(spectrum.retained_curve(), curve)
    for old, new in zip(before.steps, after.steps, strict=True):
        np.testing.assert_array_equal(old.weight, new.weight)
    np.testing.assert_array_equal(after.steps[-1].bias, np.arange(6.0))


@pytest.mark.parametrize("name", ALL)
def test_impossible_ranks_are_refused(name: str) -> None:
    shape, geometry = (12, 9, 3, 3), Geometry(group=2)
    scheme = SCHEMES[name]
    most = scheme.max_rank(shape, 2)
    spectrum = scheme.spectrum(random_weight(shape), geometry)
    for rank, match in [
        (7, "rank 7 is not a multiple of group 2: use 6 or 8"),
        (1, "rank 1 is not a multiple of group 2: use 2$"),
        (0, "rank 0 is not positive"),
        (-2, "rank -2 is not positive"),
        (most + 2, f"rank {most + 2} is above the largest possible, {most}"),
    ]:
        for ask in (spectrum.factor, spectrum.retained, lambda r: scheme.structure(shape, geometry, r)):
            with pytest.raises(ValueError, match=match):
                ask(rank)
    for energy in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="not in"):
            spectrum.rank_for(energy)


@pytest.mark.parametrize("name", ALL)
def test_impossible_weights_are_refused(name: str) -> None:
    make = SCHEMES[name].spectrum
    with pytest.raises(ValueError, match="group 3 does not divide the 4 filters"):
        make(np.ones((4, 2, 3, 3)), Geometry(group=3))
    with pytest.raises(ValueError, match="expected"):
        make(np.ones((4, 2)), Geometry())
    with pytest.raises(ValueError, match="not finite"):
        make(np.full((4, 2, 3, 3), np.nan), Geometry())
    with pytest.raises(ValueError, match=r"bias of shape \(3,\): expected \(4,\)"):
        make(np.ones((4, 2, 3, 3)), Geometry()).factor(2, np.ones(3))


def test_largest_ranks() -> None:
    assert {name: SCHEMES[name].max_rank((64, 3, 3, 5), 2) for name in SCHEMES} == {
        "pca": 64,
        "svd": 64,
        "kmeans": 64,
        "spatial": 18,
        "spatial-hv": 30,
    }
    assert SCHEMES["pca"].max_rank((64, 1, 3, 3), 1) == 9
    assert SCHEMES["kmeans"].max_rank((64, 1, 3, 3), 1) == 64


def test_kmeans_finds_obvious_clusters_and_names_them_in_order() -> None:
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(3, 8)
    labels = np.array([0, 1, 0, 2, 2, 1, 0])
    weight = (centres[labels] + 0.1 * rng.standard_normal((7, 8))).reshape(7, 2, 2, 2)
    spectrum = SCHEMES["kmeans"].spectrum(weight, Geometry())
    lowrank, linear = (s.weight for s in spectrum.factor(3).steps)
    np.testing.assert_array_equal(linear[:, :, 0, 0], np.eye(3)[labels])
    for label in range(3):
        np.testing.assert_allclose(lowrank[label], weight[labels == label].mean(axis=0))
    assert spectrum.rank_for(0.99) == 3
    assert spectrum.retained(1) == pytest.approx(0, abs=1e-12)  # one centroid: the mean


def within(weight: NDArray[Any], chain: Decomposition) -> float:
    return float(np.sum((weight - chain.reconstruct()) ** 2))


def test_kmeans_ward_curve_is_what_its_clusters_have_and_lloyd_only_improves_it() -> None:
    weight = random_weight((120, 1, 2, 2))
    spectrum = cf.KMeansSpectrum(weight, Geometry())
    points = weight.reshape(120, -1)
    total = np.sum((points - points.mean(axis=0)) ** 2)
    improved = 0
    for rank in range(1, 121):
        labels = cf._cut(spectrum._trees[0], 120, rank)
        assert len(set(labels)) == rank
        ward = cf._within(points, labels, rank)
        assert spectrum.retained(rank) == pytest.approx(1 - ward / total, abs=1e-12)
        refined = within(weight, spectrum.factor(rank))
        assert refined <= ward + 1e-9
        improved += refined < ward - 1e-6
    assert improved > 20  # Lloyd does run
    rank = spectrum.rank_for(0.7)
    assert within(weight, spectrum.factor(rank)) <= 0.3 * total < within(weight, spectrum.factor(rank - 1))
    ward_rank = int(np.argmax(spectrum.retained_curve() >= 0.7)) + 1
    assert rank < ward_rank  # the search went below Ward's own rank


@pytest.mark.filterwarnings("error")
def test_kmeans_survives_equal_filters() -> None:
    weight = np.repeat(random_weight((2, 1, 2, 2)), 3, axis=0)
    spectrum = SCHEMES["kmeans"].spectrum(weight, Geometry())
    assert spectrum.rank_for(1) == 2
    for rank in range(2, 7):
        linear = spectrum.factor(rank).steps[1].weight[:, :, 0, 0]
        assert (linear.sum(axis=0) >= 1).all() and (linear.sum(axis=1) == 1).all()
        assert spectrum.factor(rank).error(weight) < 1e-15


def test_error_of_zero_weights_is_zero() -> None:
    weight = np.zeros((4, 2, 3, 3))
    for scheme in SCHEMES.values():
        spectrum = scheme.spectrum(weight, Geometry(group=2))
        assert spectrum.retained(2) == 1 and spectrum.rank_for(0.9) == 2
        assert spectrum.factor(2).error(weight) == 0


def test_reconstruct_refuses_what_it_cannot_compose() -> None:
    steps = (Step("_a", np.ones((2, 2, 3, 1)), None), Step("_b", np.ones((2, 2, 2, 1)), None))
    with pytest.raises(ValueError, match="taps along one axis"):
        Decomposition(steps).reconstruct()
    steps = (Step("_a", np.ones((2, 1, 1, 1)), None, group=2), Step("_b", np.ones((2, 2, 1, 1)), None))
    with pytest.raises(ValueError, match="differ in groups"):
        Decomposition(steps).reconstruct()


def test_reconstruct_composes_three_steps() -> None:
    v, h, p = random_weight((3, 2, 3, 1)), random_weight((4, 3, 1, 5)), random_weight((6, 4, 1, 1))
    chain = Decomposition((Step("_v", v, None), Step("_h", h, None), Step("_linear", p, None)))
    want = np.einsum("os,srw,rih->oihw", p[:, :, 0, 0], h[:, :, 0], v[..., 0])
    np.testing.assert_allclose(chain.reconstruct(), want, atol=1e-13)


def test_macs_of_known_chains() -> None:
    dense = StepShape("", (64, 3, 3, 3), pad=(1, 1))
    assert macs([dense], (224, 224)) == 86_704_128  # VGG-16 conv1_1
    alexnet = StepShape("", (256, 48, 5, 5), pad=(2, 2), group=2)
    assert macs([alexnet], (27, 27)) == 223_948_800  # AlexNet conv2
    # He's conv1_2: V 22, H 22, in the published VGG-16 of He et al. 2017
    v, _ = SCHEMES["spatial"].structure((64, 64, 3, 3), Geometry(pad=(1, 1)), 22)
    assert macs([v], (224, 224)) == 211_943_424
    # V runs at full width and output height, H at output size; floor of (10 + 2 - 2·2 - 1)/2 + 1 = 4
    geometry = Geometry((2, 3), (1, 0), (2, 1))
    chain = SCHEMES["spatial"].structure((5, 4, 3, 3), geometry, 2)
    assert macs(chain, (10, 12)) == 2 * 4 * 3 * (4 * 12) + 5 * 2 * 3 * (4 * 4)
    with pytest.raises(ValueError, match="does not fit"):
        macs([StepShape("", (1, 1, 5, 5))], (4, 8))


def test_macs_of_the_published_channel_method_net() -> None:
    """VGG-16 with Zhang's 4x ranks: 3,831,439,360 MACs in all its convolutions."""
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    sizes = [224, 224, 112, 112, 56, 56, 56, 28, 28, 28, 14, 14, 14]
    ranks = [11, 25, 28, 52, 46, 56, 104, 92, 100, 232, 224, 214]
    total, geometry = macs([StepShape("", (64, 3, 3, 3), pad=(1, 1))], (224, 224)), Geometry(pad=(1, 1))
    for before, out, size, rank in zip(widths, widths[1:], sizes[1:], ranks, strict=False):
        total += macs(SCHEMES["pca"].structure((out, before, 3, 3), geometry, rank), (size, size))
    assert total == 3_831_439_360
