"""Linear algebra shared by the decompositions: arrays in, arrays out, float64 inside."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]

_GRAM_RATIO = 1e-8  # smallest over largest eigenvalue of the Gram matrix above which it is trusted


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
