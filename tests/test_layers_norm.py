"""LRN written as a convolution over channels, against Caffe's formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
from layer_nets import run


def across(x: np.ndarray, size: int, alpha: float, beta: float, k: float) -> np.ndarray:
    """``x * (k + alpha/size * sum of x² over the window of channels)^-beta``, channels beyond the ends count 0."""
    square = np.pad(x.astype(np.float64) ** 2, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
    total = sum(square[:, i : i + x.shape[1]] for i in range(size))
    return x * (k + alpha / size * total) ** -beta


def within(x: np.ndarray, size: int, alpha: float, beta: float) -> np.ndarray:
    """``x * (1 + alpha * mean of x² over the window)^-beta``, the mean over size² places everywhere."""
    pad = (size - 1) // 2
    square = np.pad(x.astype(np.float64) ** 2, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    h, w = x.shape[2:]
    total = sum(square[:, :, i : i + h, j : j + w] for i in range(size) for j in range(size))
    return x * (1 + alpha * total / size**2) ** -beta


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0, 0.6, 2.0])
@pytest.mark.parametrize("size", [1, 3, 5, 11])
def test_lrn_across_channels(size: int, beta: float) -> None:
    x = np.random.default_rng(size).standard_normal((2, 6, 3, 4)).astype(np.float32) * 3
    settings = f"lrn_param {{ local_size: {size} alpha: 0.7 beta: {beta} k: 1.5 }}"
    (made,) = run("LRN", settings, x=x)
    np.testing.assert_allclose(made, across(x, size, 0.7, beta, 1.5), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0, 0.6])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_lrn_within_a_channel(size: int, beta: float) -> None:
    x = np.random.default_rng(size).standard_normal((2, 3, 6, 5)).astype(np.float32) * 3
    settings = f"lrn_param {{ local_size: {size} alpha: 0.7 beta: {beta} k: 9 norm_region: WITHIN_CHANNEL }}"
    (made,) = run("LRN", settings, x=x)
    np.testing.assert_allclose(made, within(x, size, 0.7, beta), rtol=3e-6, atol=1e-6)
