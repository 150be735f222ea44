"""Linear algebra shared by the decompositions: arrays in, arrays out, float64 inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]

RIDGE = 1e-6  # of a regression, as a share of the mean variance
_GRAM_RATIO = 1e-8  # smallest over largest eigenvalue of the Gram matrix above which it is trusted
_PIVOT_RATIO = 1e-14  # smallest over largest squared pivot of a Cholesky factor that is trusted


class LeftSvd(NamedTuple):
    """Left singular vectors (m, k) with orthonormal columns, and singular values (k,), descending."""

    vectors: Array
    values: Array


def left_svd(matrix: NDArray[Any]) -> LeftSvd:
    """Left half of the thin SVD of a real matrix, with deterministic signs.

    ``A[m, n] = sum_k U[m, k] s[k] Vt[k, n]``; of each column of U the entry largest in magnitude is positive.
    The right half is not kept: ``U.T @ A`` gives it for as many vectors as are wanted, see `low_rank`.

    A wide or square matrix goes through the eigenvectors of A A^T, two to five times faster than LAPACK's
    gesdd, which then refines what lies below 1e-4 of the largest singular value. Values are good to 1e-10 of
    the largest.

    Args:
        matrix: (m, n), any real type, neither side empty; left as it is.

    Returns:
        U (m, min(m, n)) and s (min(m, n),).

    Raises:
        ValueError: an entry is not finite.
    """
    work: Array = np.array(matrix, dtype=np.float64, order="C")
    if not np.isfinite(work).all():
        raise ValueError("weights hold values that are not finite (nan or inf)")
    vectors, values = _wide_svd(work) if work.shape[0] <= work.shape[1] else _dense_svd(work)
    order = np.argsort(-values, kind="stable")
    return LeftSvd(_fix_signs(vectors[:, order]), values[order])


def low_rank(matrix: Array, vectors: Array, rank: int) -> tuple[Array, Array]:
    """Best approximation of a matrix by a product of inner size `rank`, from its left singular vectors.

    ``A ~ L R`` with ``L = U[:, :rank]`` and ``R = L.T A``; the squared Frobenius error is the sum of the
    dropped s^2.

    Args:
        matrix: (m, n).
        vectors: (m, k) left singular vectors of `matrix`, see `left_svd`.
        rank: 1 <= rank <= k.

    Returns:
        L (m, rank), orthonormal columns, and R (rank, n), rows of norm s.

    Reference: Eckart and Young 1936.
    """
    left = vectors[:, :rank]
    return left, left.T @ matrix


def balance(left: Array, right: Array) -> tuple[Array, Array]:
    """Share the scale of a product between its factors: ``L diag(q) diag(1/q) R``, ``q = sqrt(|R[r, :]|)``.

    With L and R of `low_rank` both then carry the square root of the singular values. The norms are those of
    the rows as computed, so a singular value lost in rounding cannot blow up a factor; a zero row gives a
    zero column.

    Args:
        left: (m, r) with columns of norm one.
        right: (r, n).

    Returns:
        Left (m, r) and right (r, n), the same product.
    """
    scale = np.sqrt(np.linalg.norm(right, axis=1))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    return left * scale, right * inverse[:, None]


class AffineMap(NamedTuple):
    """``z = P Q^T y + b``: P (d, r), Q (m, r), b (d,)."""

    P: Array
    Q: Array
    b: Array


class Whitening(NamedTuple):
    """Lower triangular L (m, m) with ``L L^T = C + alpha I``, and the alpha that it took."""

    factor: Array
    alpha: float


def reduced_rank_regression(
    Y: NDArray[Any], Z: NDArray[Any], rank: int | None, *, ridge: float = RIDGE, prior: float | Array = 1.0
) -> AffineMap:
    """Best map of given rank from samples Y to samples Z: ``min |Z - (Y Q P^T + b)|^2``.

    ``P^T P = I``. With Z = Y and no ridge it is PCA. See `from_moments` for the ridge and for data that do
    not fit in memory.

    Args:
        Y: (n, m).
        Z: (n, d).
        rank: 1 <= rank <= min(m, d); None for full regression, P = I.
        ridge: see `from_moments`.
        prior: see `from_moments`.

    Returns:
        P (d, rank), Q (m, rank), b (d,).

    Raises:
        ValueError: shapes do not fit, no sample, a rank out of range, or a value that is not finite.

    Reference: Izenman 1975; Zhang et al. 2015, arXiv:1505.06798, equation 8.
    """
    y, z = _finite(Y), _finite(Z)
    if y.ndim != 2 or z.ndim != 2 or len(y) != len(z) or not y.size or not z.size:
        raise ValueError(f"samples of shapes {y.shape} and {z.shape}: expected (n, m) and (n, d), n > 0")
    ybar, zbar = y.mean(axis=0), z.mean(axis=0)
    centred = y - ybar
    covariance, cross = centred.T @ centred / len(y), (z - zbar).T @ centred / len(y)
    return from_moments(covariance, cross, ybar, zbar, rank, ridge=ridge, prior=prior)


def from_moments(
    C: NDArray[Any],
    S: NDArray[Any],
    ybar: NDArray[Any],
    zbar: NDArray[Any],
    rank: int | None,
    *,
    ridge: float = RIDGE,
    prior: float | Array = 1.0,
) -> AffineMap:
    """Reduced-rank regression from moments, in projection form.

    ``M = U U^T Mhat``, ``Mhat = S C^-1``, U the leading eigenvectors of ``S C^-1 S^T``: ``P = U``,
    ``Q^T = U^T Mhat``, ``b = zbar - P Q^T ybar``. First ``C += alpha I`` and ``S += alpha B``, with
    ``alpha = ridge tr(C) / m`` and B the prior: the same as adding the samples (sqrt(alpha) B, sqrt(alpha) I),
    so that directions never observed are mapped by B. Where C is singular to working precision alpha is
    raised until it is not. Without ridge the minimum is
    ``tr cov(Z) - sum of the leading eigenvalues``.

    Args:
        C: (m, m), ``cov(y)`` divided by n.
        S: (d, m), ``cov(z, y)`` divided by n.
        ybar: (m,).
        zbar: (d,).
        rank: 1 <= rank <= min(m, d); None for full regression, P = I.
        ridge: at least 0.
        prior: B (d, m), or a number: that times the identity.

    Returns:
        P (d, rank) with orthonormal columns, Q (m, rank), b (d,).

    Raises:
        ValueError: shapes do not fit, a rank out of range, or a value that is not finite.

    Reference: Zhang et al. 2015, arXiv:1505.06798, equation 8, there by a generalized SVD.
    """
    cross, ybar, zbar = _finite(S), _finite(ybar), _finite(zbar)
    if cross.shape != (len(zbar), len(ybar)) or C.shape != (len(ybar), len(ybar)):
        raise ValueError(f"moments C {C.shape}, S {cross.shape} for {len(ybar)} and {len(zbar)} variables")
    whitening = whiten(C, ridge)
    seen = unmix(whitening, cross) + prior_term(whitening, prior, len(zbar))
    basis, rows = leading(seen, rank)
    Q = scipy.linalg.solve_triangular(
        whitening.factor, rows.T, lower=True, trans="T", check_finite=False
    )  # (m, r)
    return AffineMap(basis, Q, zbar - basis @ (Q.T @ ybar))


def whiten(covariance: NDArray[Any], ridge: float = RIDGE) -> Whitening:
    """Cholesky factor of a covariance with a ridge, ``alpha = ridge tr(C) / m``, raised tenfold until it works.

    Raises:
        ValueError: a negative ridge, or an entry that is not finite.
    """
    if not ridge >= 0:
        raise ValueError(f"ridge {ridge:g} is negative")
    work = _finite(covariance)
    m = len(work)
    scale = float(np.trace(work)) / m
    if scale <= 0:  # nothing varies
        return Whitening(np.eye(m), 1.0)
    alpha, smallest = ridge * scale, 1e-13 * scale
    while True:
        factor, failed = scipy.linalg.lapack.dpotrf(work + alpha * np.eye(m), lower=1)
        pivots = np.diag(factor) ** 2
        if not failed and pivots.min() > _PIVOT_RATIO * m * pivots.max():
            return Whitening(factor, alpha)
        alpha = max(10 * alpha, smallest)


def unmix(whitening: Whitening, rows: Array) -> Array:
    """``rows L^-T``, (n, m): centred samples get the covariance I, moments S (d, m) become those with them."""
    solved: Array = scipy.linalg.solve_triangular(whitening.factor, rows.T, lower=True, check_finite=False)
    return solved.T


def prior_term(whitening: Whitening, prior: float | Array, d: int) -> Array:
    """What the prior adds to unmixed moments: ``alpha B L^-T``, (d, m); B as in `from_moments`."""
    m = len(whitening.factor)
    wanted = prior * np.eye(d, m) if np.ndim(prior) == 0 else _finite(np.asarray(prior))
    if wanted.shape != (d, m):
        raise ValueError(f"prior of shape {wanted.shape}: expected ({d}, {m})")
    return unmix(whitening, whitening.alpha * wanted)


def leading(matrix: Array, rank: int | None) -> tuple[Array, Array]:
    """Best approximation of given rank ``U G`` of a matrix, by the eigenvectors of A A^T; signs fixed.

    For `rank` None, I and the matrix itself. Faster than `left_svd` where few vectors are wanted, and good
    where components below 1e-8 of the largest do not matter.

    Args:
        matrix: (d, m).
        rank: 1 <= rank <= min(d, m), or None.

    Returns:
        U (d, rank), orthonormal columns, and ``G = U^T A`` (rank, m).

    Raises:
        ValueError: a rank out of range.
    """
    d = len(matrix)
    if rank is None:
        return np.eye(d), matrix
    _check_inner(rank, min(matrix.shape))
    _, vectors = scipy.linalg.eigh(
        matrix @ matrix.T, subset_by_index=[d - rank, d - 1], overwrite_a=True, check_finite=False
    )
    basis = _fix_signs(vectors[:, ::-1])
    return basis, basis.T @ matrix


def by_group(solve: Callable[..., AffineMap], group: int, *samples: NDArray[Any] | None) -> AffineMap:
    """Solve for each group of channels by itself: the block-diagonal map of a grouped convolution.

    The blocks are stacked as Caffe stacks the weights of groups: rows of P and Q (d/group a block) belong to
    one group, their columns to the components of that group. The dense map is ``block_diag`` of the blocks.

    Args:
        solve: the parts of the samples of one group -> its map, the same rank for each.
        group: divides the channels of each.
        samples: (n, channels) each, or None, handed on as it is.

    Returns:
        P (d, rank/group), Q (m, rank/group), b (d,).

    Raises:
        ValueError: `group` does not divide the channels.
    """
    for one in samples:
        if one is not None and one.shape[1] % group:
            raise ValueError(f"group {group} does not divide {one.shape[1]} channels")
    parts = [[None] * group if one is None else np.split(one, group, axis=1) for one in samples]
    maps = [solve(*part) for part in zip(*parts, strict=True)]
    return AffineMap(*(np.concatenate(blocks) for blocks in zip(*maps, strict=True)))


def _finite(values: NDArray[Any]) -> Array:
    work: Array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(work).all():
        raise ValueError("samples or moments hold values that are not finite (nan or inf)")
    return work


def _check_inner(rank: int, largest: int) -> None:
    if not 1 <= rank <= largest:
        raise ValueError(f"rank {rank} is not in 1..{largest}")


def _wide_svd(matrix: Array) -> LeftSvd:
    """Left SVD of a wide matrix: eigenvectors of A A^T, then gesdd on the rows that squaring has blurred.

    An eigenvalue carries an error near eps s_max^2, so a singular value above 1e-4 s_max one below 1e-11
    s_max. The eigenvectors of the others, T, span the right space all the same: the SVD of ``T.T A`` sorts
    them out.
    """
    eigenvalues, basis = scipy.linalg.eigh(
        matrix @ matrix.T, driver="evd", overwrite_a=True, check_finite=False
    )
    blurred = int(np.searchsorted(eigenvalues, _GRAM_RATIO * eigenvalues[-1], side="right"))
    if blurred == len(eigenvalues):  # all zero
        return _dense_svd(matrix)
    head = LeftSvd(basis[:, blurred:], np.sqrt(eigenvalues[blurred:]))
    if not blurred:
        return head
    tail = _dense_svd(basis[:, :blurred].T @ matrix)
    return LeftSvd(
        np.hstack([head.vectors, basis[:, :blurred] @ tail.vectors]), np.append(head.values, tail.values)
    )


def _dense_svd(matrix: Array) -> LeftSvd:
    """Left SVD by gesdd, fastest on a tall matrix in column order; may overwrite `matrix`, C-ordered."""
    wide = matrix.shape[0] < matrix.shape[1]
    # C-ordered (m, n) is column-ordered (n, m): transposed, a wide matrix needs no copy
    tall = matrix.T if wide else np.asfortranarray(matrix)
    first, values, second = scipy.linalg.svd(tall, full_matrices=False, overwrite_a=True, check_finite=False)
    return LeftSvd(second.T if wide else first, values)


def _fix_signs(vectors: Array) -> Array:
    peaks = np.abs(vectors).argmax(axis=0)
    return np.ascontiguousarray(vectors * np.where(vectors[peaks, np.arange(peaks.size)] < 0, -1.0, 1.0))
