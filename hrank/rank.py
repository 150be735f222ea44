"""Ranks of feature maps, fast and exact, and their sums over images.

A map's rank is ``#{s : s > s_max * rtol}`` over its singular values in double precision, with
``rtol = max(h, w) * eps`` of float32: NumPy's and Torch's rule for float32 maps (Lin et al., CVPR 2020,
section 3.2). Counting the eigenvalues of the smaller Gram matrix above a shift takes no eigenvalue and runs over
many maps at once; the few maps that it leaves open are decided by their singular values, so the result is always
that of the SVD.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

Counts = NDArray[np.int64]

SATURATED = 0.99  # mean rank over full rank from which the order of a layer's filters is noise
_MARGIN = 1 / 8
_LARGE = 40  # rows from which eigenvalues take less time than counting them
_UNITS = 8 * float(
    np.finfo(np.float64).eps
)  # error of a count's matrix per row or column and unit of its reach
_SAFE = (1e-250, 1e150)  # of s_max^2: neither it nor its square vanishes or overflows between these
_CHUNK = 2**17  # numbers in float64 at a time: what the cache holds


def default_rtol(h: int, w: int) -> float:
    """``max(h, w) * eps`` of float32."""
    return max(h, w) * float(np.finfo(np.float32).eps)


def ranks_and_bounds(maps: Array, rtol: float | None = None) -> tuple[Counts, Counts]:
    """Rank and structural bound of each map: (..., h, w) -> (...), (...); ``rtol`` None for ``default_rtol``.

    The bound is min(rows, columns) that are not all zero, which no rank exceeds. Memory: some 2^17 numbers in
    double precision at a time, whatever the maps are.

    Raises:
        ValueError: fewer than two axes, not real numbers, empty maps, values that are not finite, or an rtol
            that is not from 0 to below 1.
    """
    flat = _flat(maps)
    rtol = default_rtol(*flat.shape[1:]) if rtol is None else rtol
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}, it must be from 0 to below 1")
    made = np.zeros((2, len(flat)), np.int64)
    for chunk in _chunks(flat):
        made[:, chunk] = _chunk(flat[chunk], rtol)
    found, bounds = made.reshape(2, *np.shape(maps)[:-2])
    return found, bounds


def ranks(maps: Array, rtol: float | None = None) -> Counts:
    """Rank of each map: (..., h, w) -> (...). Raises ValueError as ``ranks_and_bounds``."""
    return ranks_and_bounds(maps, rtol)[0]


def nuclear_norms(maps: Array) -> NDArray[np.float64]:
    """Sum of the singular values of each map: (..., h, w) -> (...). Raises ValueError as ``ranks_and_bounds``."""
    flat = _flat(maps)
    made = np.zeros(len(flat))
    for chunk in _chunks(flat):
        made[chunk] = np.linalg.svd(flat[chunk].astype(np.float64), compute_uv=False).sum(1)
    return made.reshape(np.shape(maps)[:-2])


def mean_rank(maps: Array, rtol: float | None = None) -> NDArray[np.float64]:
    """Mean rank of each channel's maps over images: (n, c, h, w) -> (c,), the sum of integers over n.

    Raises:
        ValueError: not four axes, no image, or as ``ranks_and_bounds``.

    Reference: Lin et al., CVPR 2020, equation 4.
    """
    if np.ndim(maps) != 4 or not len(maps):
        raise ValueError(f"maps of shape {np.shape(maps)}: (n, c, h, w) with at least one image is needed")
    sums = RankSums(np.shape(maps)[1], min(np.shape(maps)[2:]))
    sums.add(ranks(maps, rtol))
    return sums.mean


def _flat(maps: Array) -> Array:
    """The maps as (n, h, w), once they are seen to be maps."""
    maps = np.asarray(maps)
    if maps.ndim < 2 or maps.dtype.kind not in "fiub" or 0 in maps.shape[-2:]:
        raise ValueError(f"maps of shape {maps.shape}, {maps.dtype}: real (..., h, w) is needed")
    if not np.isfinite(maps).all():
        raise ValueError("maps hold values that are not finite")
    return maps.reshape(-1, *maps.shape[-2:])


def _chunks(flat: Array) -> Iterator[slice]:
    step = max(1, _CHUNK // (flat.shape[1] * flat.shape[2]))
    return (slice(start, start + step) for start in range(0, len(flat), step))


def _chunk(maps: Array, rtol: float) -> tuple[Array, Array]:
    """Ranks and bounds of (n, h, w)."""
    nonzero = np.ascontiguousarray((maps != 0).transpose(1, 2, 0))  # (h, w, n): axes reduce side by side
    bounds = np.minimum(nonzero.any(1).sum(0), nonzero.any(0).sum(0))
    found, several = np.minimum(bounds, 1), bounds > 1  # one row or column: rank 1
    if several.any():
        picked = maps if several.all() else maps[several]
        found[several] = _decide(picked.astype(np.float64), bounds[several], rtol)
    return found, bounds


def _gram(maps: Array) -> Array:
    """A A^T or A^T A, whichever is smaller: (n, h, w) float64 -> (n, k, k)."""
    turned = maps.transpose(0, 2, 1)
    return maps @ turned if maps.shape[1] <= maps.shape[2] else turned @ maps


def _decide(maps: Array, bounds: Array, rtol: float) -> Array:
    """Ranks of (n, h, w) float64 with at least two rows and two columns that are not zero."""
    by = _by_eigenvalues if min(maps.shape[1:]) > _LARGE else _by_counts
    with np.errstate(all="ignore"):
        gram = _gram(maps)
        trace = np.trace(gram, axis1=1, axis2=2)
        safe = (trace > _SAFE[0]) & (trace < _SAFE[1])
        gram[~safe] = 0
        found, clear = by(gram, bounds, rtol, _UNITS * max(maps.shape[1:]))
    left = ~(safe & clear)
    if left.any():
        values = np.linalg.svd(maps[left], compute_uv=False)
        found[left] = np.count_nonzero(values > values[:, :1] * rtol, axis=1)
    return found


def _by_counts(gram: Array, bounds: Array, rtol: float, unit: float) -> tuple[Array, Array]:
    """Ranks from Gram matrices (n, k, k), and which of them are certain.

    ``tr G^2 / tr G <= s_max^2 <= ||G||_F``: eigenvalues are counted an eighth above the largest and an eighth below
    the smallest threshold that this allows. Uncertain are two counts that differ, and rounding errors beyond the
    eighth.
    """
    gram = np.ascontiguousarray(gram.transpose(1, 2, 0))
    squared = np.einsum("ijn,ijn->n", gram, gram)
    high, low = rtol**2 * np.sqrt(squared), rtol**2 * squared / np.trace(gram)
    found, reach = _count_above(gram, high * (1 + _MARGIN))
    clear = unit * reach <= _MARGIN * high
    below = np.flatnonzero(clear & (found < bounds))
    if len(below):
        most, reach = _count_above(gram[:, :, below], low[below] * (1 - _MARGIN))
        clear[below] = (unit * reach <= _MARGIN * low[below]) & (most == found[below])
    return found, clear


def _by_eigenvalues(gram: Array, _bounds: Array, rtol: float, unit: float) -> tuple[Array, Array]:
    """The same from eigenvalues, which takes less time where matrices are large; uncertain is one near the threshold."""
    squares = np.linalg.eigvalsh(gram)
    distance = squares - squares[:, -1:] * rtol**2
    near = np.abs(distance) <= unit * np.abs(squares).sum(1, keepdims=True)
    return np.count_nonzero(distance > 0, axis=1), ~near.any(1)


def _count_above(gram: Array, shift: Array) -> tuple[Array, Array]:
    """How many eigenvalues of each symmetric matrix lie above its shift, and what bounds the error of the answer.

    (k, k, n), (n,) -> (n,), (n,). As many as ``G - shift I = L D L^T`` has positive pivots (Sylvester). The
    count is that of a matrix not further from G than ``u k tr |L||D||L|^T``, a few times (Higham 2002, theorem
    9.3); the second result is that trace, NaN or infinite where a pivot vanished.
    """
    work = gram.copy()
    work[np.arange(len(gram)), np.arange(len(gram))] -= shift
    found, reach = np.zeros(gram.shape[2], np.intp), np.zeros(gram.shape[2])
    for i in range(len(gram)):
        pivot, row = work[i, i], work[i, i + 1 :]
        found += pivot > 0
        reach += np.abs(pivot)
        factor = row / pivot
        reach += np.abs(factor * row).sum(0)
        work[i + 1 :, i + 1 :] -= factor[:, None] * row
    return found, reach


class RankSums:
    """Sums of ranks and of their squares over images, integers: exact, whatever the batches and their order.

    Args:
        channels: c.
        full: the rank that no map can exceed, min(h, w).
    """

    def __init__(self, channels: int, full: int) -> None:
        self.full = full
        self.count = 0
        self.total: NDArray[np.int64] = np.zeros(channels, np.int64)
        self.squares: NDArray[np.int64] = np.zeros(channels, np.int64)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean rank (c,); zeros without images."""
        return self.total / max(self.count, 1)

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Standard deviation over images (c,), with n - 1; NaN below two images."""
        if self.count < 2:
            return np.full(len(self.total), np.nan)
        return np.sqrt(np.maximum(self.squares - self.total * self.mean, 0) / (self.count - 1))

    @property
    def error(self) -> NDArray[np.float64]:
        """Standard error of the mean (c,), deviation / sqrt(n); NaN below two images."""
        return self.deviation / np.sqrt(max(self.count, 1))

    def add(self, found: Array) -> None:
        """Count in ranks (n, c) of n images.

        Raises:
            ValueError: another number of channels, or ranks below 0 or above full.
        """
        if found.ndim != 2 or found.shape[1] != len(self.total) or found.dtype.kind not in "iu":
            raise ValueError(f"ranks of shape {found.shape}, {found.dtype}: integers (n, {len(self.total)})")
        if found.size and not (found.min() >= 0 and found.max() <= self.full):
            raise ValueError(f"ranks from {found.min()} to {found.max()}: 0 to {self.full} are possible")
        found = found.astype(np.int64)
        self.count += len(found)
        self.total += found.sum(0)
        self.squares += (found**2).sum(0)

    def merge(self, other: RankSums) -> None:
        """Count in what another has counted.

        Raises:
            ValueError: the other has other channels or maps of another size.
        """
        if other.full != self.full or len(other.total) != len(self.total):
            raise ValueError(
                f"ranks of {len(other.total)} channels up to {other.full} do not go with {len(self.total)} up to {self.full}"
            )
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def warnings(self) -> tuple[str, ...]:
        """What makes the order of these filters doubtful: dead, saturated or tied ones; empty where nothing does."""
        if not self.count or not len(self.total):
            return ()
        found = []
        dead = int(np.count_nonzero(self.total == 0))
        if dead:
            which = (
                f"all {dead} filters" if dead == len(self.total) else f"{dead} of {len(self.total)} filters"
            )
            found.append(f"dead: {which} give maps of zeros on every image")
        ceiling = self.count * self.full
        if self.total.sum() > SATURATED * ceiling * len(self.total):
            full = int(np.count_nonzero(self.total == ceiling))
            mean = self.total.sum() / (self.count * len(self.total))
            found.append(
                f"saturated: mean rank {mean:.3f} of {self.full}, {full} of {len(self.total)} filters at full rank on every image;"
                " the order is unreliable"
            )
        values, sizes = np.unique(self.total, return_counts=True)
        tied = int(sizes[(sizes > 1) & (values > 0)].sum())
        if 2 * tied > len(self.total):
            found.append(f"tied: {tied} of {len(self.total)} filters share their rank with others")
        return tuple(found)
