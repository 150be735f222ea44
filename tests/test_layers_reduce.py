"""ArgMax, Reduction, MVN, Tile and SPP on numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from layer_nets import run, run_open_batch, shapes, text

from caffe_proto.errors import NetError


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def test_arg_max_prefers_the_last_of_equals() -> None:
    (top,) = run("ArgMax", x=[[3, 1, 3, 2], [0, 0, 0, 0]])
    assert top.tolist() == [[[2]], [[3]]]


def test_arg_max_gives_the_top_k_in_order_with_ties_from_behind() -> None:
    (top,) = run("ArgMax", "argmax_param { top_k: 3 }", x=[[5, 1, 5, 9, 5]])
    assert top.tolist() == [[[3, 4, 2]]]


def test_arg_max_with_values_stacks_indices_and_values() -> None:
    (top,) = run("ArgMax", "argmax_param { out_max_val: true top_k: 2 }", x=[[1, 8, 4], [7, 7, 2]])
    assert top.tolist() == [[[1, 2], [8, 4]], [[1, 0], [7, 7]]]


def test_arg_max_flattens_all_but_the_first_axis() -> None:
    x = np.zeros((2, 2, 3, 2))
    x[0, 1, 2, 0], x[1, 0, 1, 1] = 1, 1
    (top,) = run("ArgMax", x=x)
    assert top.shape == (2, 1, 1, 1)
    assert top.ravel().tolist() == [10, 3]


@pytest.mark.parametrize("axis", [1, -2, 0])
def test_arg_max_along_an_axis(axis: int) -> None:
    x = _random(3, 4, 2)
    (index,) = run("ArgMax", f"argmax_param {{ axis: {axis} }}", x=x)
    (value,) = run("ArgMax", f"argmax_param {{ axis: {axis} out_max_val: true top_k: 2 }}", x=x)
    assert np.array_equal(index, x.argmax(axis, keepdims=True))
    assert np.array_equal(value, np.flip(np.sort(x, axis), axis).take([0, 1], axis))


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ("argmax_param { top_k: 0 }", "top_k is 0"),
        ("argmax_param { top_k: 13 }", "top_k 13"),
        ("argmax_param { axis: 1 top_k: 4 }", "top_k 4"),
        ("argmax_param { axis: 3 }", "axis 3"),
    ],
)
def test_arg_max_refusals(settings: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text("ArgMax", settings, x=(2, 3, 4)))


@pytest.mark.parametrize(
    ("operation", "sums"), [("SUM", [2, -5]), ("ASUM", [4, 9]), ("SUMSQ", [10, 53]), ("MEAN", [1, -2.5])]
)
def test_reduction_over_trailing_axes(operation: str, sums: list[float]) -> None:
    x = [[[3], [-1]], [[2], [-7]]]
    (top,) = run("Reduction", f"reduction_param {{ operation: {operation} axis: 1 }}", x=x)
    assert top.tolist() == sums
    (scaled,) = run("Reduction", f"reduction_param {{ operation: {operation} axis: -2 coeff: -0.5 }}", x=x)
    assert scaled.tolist() == [-0.5 * one for one in sums]


def test_reduction_of_everything_is_a_scalar() -> None:
    (top,) = run("Reduction", x=[[1, 2], [3, 4]])
    assert (top.shape, float(top)) == ((), 10)


def test_reduction_refuses_an_axis_that_is_not_there() -> None:
    with pytest.raises(NetError, match="axis 2"):
        shapes(text("Reduction", "reduction_param { axis: 2 }", x=(2, 3)))


def test_mvn_divides_by_the_root_plus_eps() -> None:
    (top,) = run("MVN", "mvn_param { eps: 1 }", x=[[[[1, 3]], [[0, 0]]]])
    assert top.tolist() == [[[[-0.5, 0.5]], [[0, 0]]]]


def test_mvn_across_channels_and_without_variance() -> None:
    x = _random(2, 3, 4, 5)
    (top,) = run("MVN", "mvn_param { across_channels: true normalize_variance: false }", x=x)
    assert np.allclose(top, x - x.mean((1, 2, 3), keepdims=True), atol=1e-6)
    (full,) = run("MVN", "mvn_param { across_channels: true }", x=x)
    assert np.allclose(full.std((1, 2, 3)), 1, atol=1e-5)


def test_mvn_of_single_numbers_is_zero() -> None:
    (top,) = run("MVN", x=[[4, 5], [6, 7]])
    assert top.tolist() == [[0, 0], [0, 0]]
    (centred,) = run("MVN", "mvn_param { normalize_variance: false }", x=[4, 5])
    assert centred.tolist() == [0, 0]


def test_mvn_refuses_five_axes() -> None:
    with pytest.raises(NetError, match="4 axes"):
        shapes(text("MVN", x=(1, 2, 3, 4, 5)))


def test_tile_repeats_the_whole_axis() -> None:
    (top,) = run("Tile", "tile_param { tiles: 2 }", x=[[[1], [2]], [[3], [4]]])
    assert top[..., 0].tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]
    (last,) = run("Tile", "tile_param { axis: -1 tiles: 3 }", x=[[1, 2]])
    assert last.tolist() == [[1, 2, 1, 2, 1, 2]]


@pytest.mark.parametrize("settings", ["", "tile_param { tiles: 0 }", "tile_param { tiles: -2 }"])
def test_tile_needs_a_positive_count(settings: str) -> None:
    with pytest.raises(NetError, match="tiles"):
        shapes(text("Tile", settings, x=(2, 3)))


def test_spp_of_one_level_is_global_pooling() -> None:
    x = _random(2, 3, 5, 4)
    (top,) = run("SPP", "spp_param { pyramid_height: 1 }", x=x)
    assert np.array_equal(top, x.max((2, 3), keepdims=True))


@pytest.mark.parametrize(("method", "reduce"), [("MAX", np.max), ("AVE", np.mean)])
def test_spp_lays_the_levels_one_behind_the_other(method: str, reduce: Callable[..., np.ndarray]) -> None:
    x = _random(2, 3, 4, 8)
    (top,) = run("SPP", f"spp_param {{ pyramid_height: 3 pool: {method} }}", x=x)
    levels = []
    for bins in (1, 2, 4):
        cells = x.reshape(2, 3, bins, 4 // bins, bins, 8 // bins)
        levels.append(reduce(cells, axis=(3, 5)).reshape(2, -1))
    assert np.allclose(top, np.concatenate(levels, 1), atol=1e-6)


def test_spp_pads_what_its_bins_hang_over() -> None:
    """5 rows in 2 bins: windows of 3, padded by 1 on either side; AVE counts the pad."""
    x = np.arange(1, 6).reshape(1, 1, 5, 1) * np.ones((1, 1, 5, 2))
    (top,) = run("SPP", "spp_param { pyramid_height: 2 pool: AVE }", x=x)
    assert np.allclose(top, [[3, 1, 1, 4, 4]])


@pytest.mark.parametrize(
    ("settings", "shape", "cause"),
    [
        ("", (1, 2, 4, 4), "pyramid_height"),
        ("spp_param { pyramid_height: 2 }", (1, 2, 1, 4), "pad"),
        ("spp_param { pyramid_height: 2 }", (1, 2, 4), "4 axes"),
        ("spp_param { pyramid_height: 2 pool: STOCHASTIC }", (1, 2, 5, 4), "stochastic"),
    ],
)
def test_spp_refusals(settings: str, shape: tuple[int, ...], cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text("SPP", settings, x=shape))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ArgMax", "argmax_param { top_k: 2 out_max_val: true }"),
        ("ArgMax", "argmax_param { axis: 1 }"),
        ("Reduction", "reduction_param { axis: 1 operation: MEAN }"),
        ("Reduction", ""),
        ("MVN", ""),
        ("Tile", "tile_param { tiles: 2 }"),
        ("SPP", "spp_param { pyramid_height: 2 }"),
    ],
)
def test_an_open_batch_gives_what_a_fixed_one_gives(kind: str, settings: str) -> None:
    x = _random(5, 3, 4, 4)
    open_ = run_open_batch(text(kind, settings, x=(2, 3, 4, 4)), {"x": x})
    (fixed,) = run(kind, settings, x=x)
    assert np.allclose(open_["t0"], fixed, atol=1e-6)


def test_arg_max_along_an_open_batch_is_refused() -> None:
    with pytest.raises(NetError, match="fixed size"):
        run_open_batch(text("ArgMax", "argmax_param { axis: 0 }", x=(2, 3)), {})
