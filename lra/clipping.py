"""Rank clipping: in the middle of a training, factors of a layer shrink to the rank their product still has.

Two factors ``W = B A`` are trained as two layers. From time to time their product is factored anew,
``W ~ B' A'`` of inner size r' < r, and training goes on with the smaller factors. The new factors come from
the old ones by linear maps within the inner space::

    A' = P A,  B' = B Q,  P = B'^+ B (r', r),  Q = A A'^+ (r, r'),  P Q = I

and Q P is the projection on what is kept: ``B' A' = B (Q P) A``. A bias between the factors is one more column of
A. The momenta of both go the same way, ``P m_A`` and ``m_B Q``. A momentum is a
velocity of the weights, so the velocity of the product, ``m_B A + B m_A``, is carried over as
``m_B (Q P) A + B (Q P) m_A``: with nothing dropped it is exactly the same, and the next step moves the product as
the old factors would have. Gradients change with the transposed maps, ``Q^T g_A`` and ``g_B P^T``; both rules
agree where ``P = Q^T``, that is between balanced factors, ``B^T B = A A^T``, which gradient descent keeps balanced.

Reference: the training loop published with Wen et al. 2017, arXiv:1703.09746, which cuts A alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decomposition import Decomposition, Geometry, Step
from .linalg import Array
from .ranks import candidates
from .schemes import SCHEMES
from .schemes.base import Spectrum

_CUTOFF = 1e-10  # relative: singular values of a factor below it do not carry a momentum over


@dataclass(frozen=True, eq=False)
class Clipped:
    """Smaller factors, and the maps that led to them: ``inward`` P (groups, r', r), ``outward`` Q (groups, r, r')."""

    chain: Decomposition
    inward: Array
    outward: Array

    @property
    def rank(self) -> int:
        """Channels between the new factors, over all groups."""
        return self.chain.steps[0].shape[0]

    def carry_first(self, moment: NDArray[Any], *, squares: bool = False) -> Array:
        """What a solver keeps of the old first factor, for the new one: ``P m``, group by group.

        Args:
            moment: of the shape of the old weight (r, i, kh, kw), or of its bias (r,).
            squares: a mean of squares, as adaptive solvers keep: it goes with the squared entries of P, as the
                variances of independent entries do.
        """
        groups = len(self.inward)
        moved = _entries(self.inward, squares) @ _to_rows(moment, groups)
        return moved.reshape(-1, *moment.shape[1:])

    def carry_second(self, moment: NDArray[Any], *, squares: bool = False) -> Array:
        """The same of the second factor, (o, r/groups, kh, kw): ``m Q``."""
        moved = _to_columns(moment, len(self.outward)) @ _entries(self.outward, squares)
        return _from_columns(moved, moment.shape)


def spectrum(chain: Decomposition, balanced: bool = True) -> Spectrum:
    """What the product of two factors retains at every rank, as a layer of kernel 1 x 1 and the same groups.

    The matrix of a group is ``sum_r B[(o, h2, w2), r] A[r, (i, h1, w1)]``: what two convolutions in a row compute
    depends on it alone, whatever their kernels, strides and pads. A bias of the first step is one more column.

    Args:
        chain: two steps of the same groups.
        balanced: see `clip`.

    Raises:
        ValueError: the steps are no such chain, or values that are not finite.
    """
    if len(chain.steps) != 2:
        raise ValueError(f"{len(chain.steps)} steps: two factors are needed")
    first, second = chain.steps
    if second.shape[1] * second.group != first.shape[0] or first.group != second.group:
        raise ValueError(
            f"factors {first.shape} of group {first.group} and {second.shape} of group {second.group} do not fit"
        )
    product = _to_columns(second.weight, second.group) @ _with_bias(first)
    weight = product.reshape(-1, product.shape[2], 1, 1)
    return SCHEMES["svd" if balanced else "pca"].spectrum(weight, Geometry(group=first.group))


def clip(chain: Decomposition, energy: float, balanced: bool = True, *, round_to: int = 1) -> Clipped | None:
    """Shrink two factors to the smallest rank at which every group of their product retains `energy`.

    ``|B A - B' A'|^2 <= (1 - energy) |B A|^2``. None where the rank would stay: the factors are then left
    alone, and so are their momenta and the split of the scale between them.

    Args:
        chain: see `spectrum`; geometry and the second step's bias stay.
        energy: 0 < energy <= 1.
        balanced: both factors get the square root of the singular values, so that one learning rate suits both;
            else B' is orthonormal and A' carries all of the scale, as PCA leaves them.
        round_to: the rank is the next multiple of it.

    Raises:
        ValueError: energy out of range, and as `spectrum`.
    """
    found, present = spectrum(chain, balanced), chain.steps[0].shape[0]
    needed = found.rank_for(energy)
    grid = candidates(found.max_rank, chain.steps[0].group, round_to)
    rank = next((one for one in grid if one >= needed), present)
    return refactor(chain, rank, balanced, found) if rank < present else None


def refactor(
    chain: Decomposition, rank: int, balanced: bool = True, found: Spectrum | None = None
) -> Clipped:
    """The best factors of the product of a chain at a total rank.

    Args:
        chain, balanced: see `clip`.
        rank: a multiple of the groups, at most the full rank of the product's shape.
        found: the chain's `spectrum`, where it is known.

    Raises:
        ValueError: an impossible rank, and as `spectrum`.
    """
    found = found or spectrum(chain, balanced)
    first, second = chain.steps
    lower, upper = (step.weight for step in found.factor(rank).steps)
    rows, columns = _to_rows(lower, first.group), _to_columns(upper, second.group)
    inward = np.linalg.pinv(columns, rcond=_CUTOFF) @ _to_columns(second.weight, second.group)
    outward = _with_bias(first) @ np.linalg.pinv(rows, rcond=_CUTOFF)
    bias = None
    if first.bias is not None:
        rows, bias = rows[:, :, :-1], rows[:, :, -1].reshape(-1)
    steps = (
        replace(first, weight=rows.reshape(rank, *first.shape[1:]), bias=bias),
        replace(second, weight=_from_columns(columns, second.shape)),
    )
    return Clipped(Decomposition(steps), inward, outward)


def _entries(maps: Array, squares: bool) -> Array:
    return maps**2 if squares else maps


def _with_bias(step: Step) -> Array:
    """First factor (g, r/g, i · kh · kw), and one more column where it has a bias."""
    rows = _to_rows(step.weight, step.group)
    if step.bias is None:
        return rows
    return np.concatenate([rows, step.bias.reshape(step.group, -1, 1)], axis=2)


def _to_rows(weight: NDArray[Any], groups: int) -> NDArray[Any]:
    """First factor (r, i, kh, kw) -> (g, r/g, i · kh · kw)."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _to_columns(weight: NDArray[Any], groups: int) -> NDArray[Any]:
    """Second factor (o, r/g, kh, kw) -> (g, o/g · kh · kw, r/g)."""
    parts = weight.reshape(groups, -1, *weight.shape[1:])
    return np.moveaxis(parts, 2, -1).reshape(groups, -1, weight.shape[1])


def _from_columns(columns: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_to_columns`, for any inner size."""
    groups, _, inner = columns.shape
    parts = columns.reshape(groups, shape[0] // groups, *shape[2:], inner)
    return np.moveaxis(parts, -1, 2).reshape(shape[0], inner, *shape[2:])
