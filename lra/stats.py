"""Statistics of data too large to hold: moments that merge, and the positions at which responses are sampled.

Moments save their state as named arrays: ``np.savez(file, **moments.state())`` and
``Moments.from_state(np.load(file))`` resume a pass over images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .linalg import Array

_CHUNK = 8192  # rows in float64 at a time


class Moments:
    """Count, means, centred second moment of y, and the cross moment of z with y where z is given.

    Sums are float64 whatever the batches are, each chunk centred by its own mean: no digits are lost where
    the mean is far larger than the deviation. Memory: m^2 + d m numbers, and a chunk of 8192 rows.

    Args:
        m: variables of y.
        d: variables of z; 0 for none.

    Reference: Chan, Golub and LeVeque 1983.
    """

    def __init__(self, m: int, d: int = 0) -> None:
        self.count = 0
        self.mean: Array = np.zeros(m)
        self.other_mean: Array = np.zeros(d)
        self._second: Array = np.zeros((m, m))
        self._cross: Array = np.zeros((d, m))

    @property
    def covariance(self) -> Array:
        """``cov(y)`` (m, m), divided by the count; zeros without samples."""
        return self._second / max(self.count, 1)

    @property
    def cross_covariance(self) -> Array:
        """``cov(z, y)`` (d, m), divided by the count; zeros without samples."""
        return self._cross / max(self.count, 1)

    def add(self, y: NDArray[Any], z: NDArray[Any] | None = None) -> None:
        """Count in a batch: y (n, m) and z (n, d), any real type; n may be 0.

        Raises:
            ValueError: shapes do not fit.
        """
        other = np.empty((len(y), 0)) if z is None else z
        for name, batch, mean in (("y", y, self.mean), ("z", other, self.other_mean)):
            if batch.shape != (len(y), len(mean)):
                raise ValueError(f"{name} of shape {batch.shape}: expected ({len(y)}, {len(mean)})")
        for start in range(0, len(y), _CHUNK):
            rows = slice(start, start + _CHUNK)
            self.merge(_moments_of(y[rows].astype(np.float64), other[rows].astype(np.float64)))

    def merge(self, other: Moments) -> None:
        """Count in what another has counted.

        Raises:
            ValueError: the other has other numbers of variables.
        """
        if other._cross.shape != self._cross.shape:
            raise ValueError(f"moments of {other._cross.shape} variables do not go with {self._cross.shape}")
        total = self.count + other.count
        if not other.count:
            return
        shift, other_shift = other.mean - self.mean, other.other_mean - self.other_mean
        weight = self.count * other.count / total
        self._second += other._second + weight * np.outer(shift, shift)
        self._cross += other._cross + weight * np.outer(other_shift, shift)
        self.mean = self.mean + shift * (other.count / total)
        self.other_mean = self.other_mean + other_shift * (other.count / total)
        self.count = total

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything held, by name."""
        return {
            "count": np.array(self.count),
            "mean": self.mean,
            "other_mean": self.other_mean,
            "second": self._second,
            "cross": self._cross,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray[Any]]) -> Moments:
        """As it was when `state` was taken."""
        made = cls(len(state["mean"]), len(state["other_mean"]))
        made.count = int(state["count"])
        made.mean, made.other_mean = np.array(state["mean"]), np.array(state["other_mean"])
        made._second, made._cross = np.array(state["second"]), np.array(state["cross"])
        return made


def sample_positions(
    rng: np.random.Generator, n_images: int, hw: tuple[int, int], per_image: int
) -> NDArray[np.intp]:
    """Random positions of each image by itself, without replacement: (n_images, per_image), ``y * w + x``, ascending.

    Images are drawn one after another: two calls for a and b images draw what one call for a + b draws. Maps
    with fewer positions than asked for give all of them.

    Raises:
        ValueError: no position is asked for, or the maps have none.
    """
    size = hw[0] * hw[1]
    if per_image < 1 or size < 1:
        raise ValueError(f"{per_image} positions an image of maps of size {hw}: both must be positive")
    count = min(per_image, size)
    drawn = np.empty((n_images, count), dtype=np.intp)
    for row in drawn:
        row[:] = np.sort(rng.choice(size, count, replace=False))
    return drawn


def _moments_of(y: Array, z: Array) -> Moments:
    """Moments of one chunk, two passes; y and z may be overwritten."""
    made = Moments(y.shape[1], z.shape[1])
    made.count = len(y)
    made.mean, made.other_mean = y.mean(axis=0), z.mean(axis=0)
    y -= made.mean
    z -= made.other_mean
    made._second, made._cross = y.T @ y, z.T @ y
    return made
