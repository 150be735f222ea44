"""What the schemes share: the record of a scheme, and a layer's factorization asked for any rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..decomposition import Decomposition, Geometry, Shape, Step, StepShape
from ..linalg import Array, balance, left_svd, low_rank

_SLACK = 1e-9  # relative: an energy met up to rounding counts as met
_NOISE = 1e-26  # an energy this far below the total is rounding, not signal

Structure = Callable[[Shape, Geometry, Any], tuple[StepShape, ...]]
Unfold = Callable[[Array], Array]
Fold = Callable[[Array, Array, Shape], tuple[Array, Array]]


class Spectrum(ABC):
    """What a scheme retains of one layer at every rank, and the factors at any of them.

    Ranks are totals over the groups: positive multiples of the group number. `energies` (groups, R) holds per
    group what the r-th component adds, descending (squared singular values); what ranks above r would add is
    what rank r drops.

    Args:
        weight: (out, in/group, kh, kw), any real type; kept by reference.
        geometry: of the layer.
        structure: the chain's shapes at a rank.
        energies: (groups, R) with R the full rank of a group.
    """

    def __init__(
        self, weight: NDArray[Any], geometry: Geometry, structure: Structure, energies: Array
    ) -> None:
        self.weight = weight
        self.geometry = geometry
        self.energies = energies
        self._structure = structure
        self._tails = np.zeros((energies.shape[0], energies.shape[1] + 1))  # [g, r]: what rank r drops
        self._tails[:, :-1] = energies[:, ::-1].cumsum(axis=1)[:, ::-1]

    @property
    def max_rank(self) -> int:
        """Largest total rank."""
        return int(self.energies.size)

    def retained(self, rank: int) -> float:
        """Energy of the whole layer retained at a total rank, ``1 - dropped / total``; 1 for zero weights.

        Raises:
            ValueError: the rank is no positive multiple of the groups, or too large.
        """
        return float(self.retained_curve()[self._per_group(rank) - 1])

    def retained_curve(self) -> Array:
        """Energy of the whole layer retained at 1, 2, ..., R components a group: (R,), non-decreasing."""
        dropped = self._tails.sum(axis=0)
        total = dropped[0]
        return 1.0 - dropped[1:] / total if total > 0 else np.ones(dropped.size - 1)

    def rank_for(self, energy: float) -> int:
        """Smallest total rank at which every group retains at least `energy`, 0 < energy <= 1.

        Raises:
            ValueError: energy outside (0, 1].
        """
        met = self._tails[:, 1:] <= self._allowed(energy)[:, None]
        return int(met.argmax(axis=1).max() + 1) * self.geometry.group

    @abstractmethod
    def factor(self, rank: int, bias: NDArray[Any] | None = None) -> Decomposition:
        """The chain at total rank `rank`, with `bias` (out,) on its last step; reuses what is held.

        Raises:
            ValueError: the rank is no positive multiple of the groups, or too large; the bias has another
                shape.
        """

    def release(self) -> None:  # noqa: B027  (most schemes hold nothing large)
        """Free what only `factor` needs; it is computed again when asked for. The energies stay."""

    def _per_group(self, rank: int) -> int:
        check_rank(rank, self.geometry.group, self.max_rank)
        return rank // self.geometry.group

    def _allowed(self, energy: float) -> Array:
        """Energy that each group may drop, (groups,)."""
        if not 0 < energy <= 1:
            raise ValueError(f"energy {energy:g} is not in (0, 1]")
        return self._tails[:, 0] * max((1 - energy) * (1 + _SLACK), _NOISE)

    def _assemble(self, rank: int, weights: Sequence[Array], bias: NDArray[Any] | None) -> Decomposition:
        """A chain from its structure at `rank` and one weight a step; the bias goes to the last."""
        shapes = self._structure(_shape(self.weight), self.geometry, rank)
        biases = [None] * (len(shapes) - 1) + [_check_bias(bias, self.weight.shape[0])]
        steps = (
            Step(s.suffix, np.ascontiguousarray(w).reshape(s.shape), b, s.stride, s.pad, s.dilation, s.group)
            for s, w, b in zip(shapes, weights, biases, strict=True)
        )
        return Decomposition(tuple(steps))


class SvdSpectrum(Spectrum):
    """Spectrum of a scheme that cuts the singular value decomposition of one matrix a group.

    Holds the left singular vectors, float64: at most R x R numbers a group where the matrix is wide.

    Args:
        weight, geometry, structure: see `Spectrum`.
        unfold: kernel of one group (out, in, kh, kw) -> its matrix (m, n).
        fold: left (m, r), right (r, n), shape of the kernel of one group -> weights of the first and the
            second step.
        balanced: both factors carry the square root of the singular values; else the left one is orthonormal.
    """

    def __init__(
        self,
        weight: NDArray[Any],
        geometry: Geometry,
        structure: Structure,
        unfold: Unfold,
        fold: Fold,
        balanced: bool,
    ) -> None:
        self._unfold, self._fold, self._balanced = unfold, fold, balanced
        parts = [left_svd(unfold(kernel)) for kernel in split_groups(weight, geometry.group)]
        self._vectors: list[Array] | None = [part.vectors for part in parts]
        super().__init__(weight, geometry, structure, np.stack([part.values for part in parts]) ** 2)

    def factor(self, rank: int, bias: NDArray[Any] | None = None) -> Decomposition:
        per_group = self._per_group(rank)
        kernels = split_groups(self.weight, self.geometry.group)
        if self._vectors is None:
            self._vectors = [left_svd(self._unfold(kernel)).vectors for kernel in kernels]
        pairs = [self._pair(k, vectors, per_group) for k, vectors in zip(kernels, self._vectors, strict=True)]
        return self._assemble(rank, [np.concatenate(step) for step in zip(*pairs, strict=True)], bias)

    def release(self) -> None:
        self._vectors = None

    def _pair(self, kernel: NDArray[Any], vectors: Array, rank: int) -> tuple[Array, Array]:
        left, right = low_rank(self._unfold(np.asarray(kernel, dtype=np.float64)), vectors, rank)
        if self._balanced:
            left, right = balance(left, right)
        return self._fold(left, right, _shape(kernel))


@dataclass(frozen=True)
class Scheme:
    """One way to decompose a convolution.

    max_rank: (shape, group) -> the largest total rank.
    structure: (shape, geometry, rank) -> the chain's shapes; raises ValueError on an impossible rank.
    spectrum: (weight, geometry) -> what is retained at every rank, and the factors.

    A shape is that of the weight blob, (out, in/group, kh, kw). A scheme of several ranks (``n_ranks``) takes a
    tuple of them where others take one.
    """

    name: str
    max_rank: Callable[[Shape, int], int]
    structure: Structure
    spectrum: Callable[[NDArray[Any], Geometry], Spectrum]
    n_ranks: int = 1

    def chain(self, shape: Shape, geometry: Geometry, ranks: tuple[int, ...]) -> tuple[StepShape, ...]:
        """The chain's shapes at its ranks; a single rank stands for all of them.

        Raises:
            ValueError: impossible ranks, or another number of them.
        """
        given = ranks * self.n_ranks if len(ranks) == 1 else ranks
        if len(given) != self.n_ranks:
            raise ValueError(f"{len(ranks)} ranks, {self.name} takes {self.n_ranks}")
        return self.structure(shape, geometry, given[0] if self.n_ranks == 1 else given)


def check_rank(rank: int, group: int, max_rank: int) -> None:
    """Refuse a total rank that a layer cannot have.

    Raises:
        ValueError: the rank is no positive multiple of `group`, or above `max_rank`.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is not positive")
    if rank > max_rank:
        raise ValueError(f"rank {rank} is above the largest possible, {max_rank}")
    if rank % group:
        below = rank - rank % group
        use = " or ".join(str(r) for r in (below, below + group) if 0 < r <= max_rank)
        raise ValueError(f"rank {rank} is not a multiple of group {group}: use {use}")


def split_groups(weight: NDArray[Any], group: int) -> list[NDArray[Any]]:
    """Kernels of the groups, views: (out, in/group, kh, kw) -> group times (out/group, in/group, kh, kw).

    Raises:
        ValueError: the weight is not 4-D or empty, or `group` does not divide out.
    """
    if weight.ndim != 4 or not weight.size:
        raise ValueError(f"weight of shape {weight.shape}: expected (out, in/group, kh, kw), none of them 0")
    if group < 1 or weight.shape[0] % group:
        raise ValueError(f"group {group} does not divide the {weight.shape[0]} filters")
    return np.split(weight, group)


def _shape(weight: NDArray[Any]) -> Shape:
    out, depth, height, width = weight.shape
    return out, depth, height, width


def _check_bias(bias: NDArray[Any] | None, out: int) -> Array | None:
    if bias is None:
        return None
    if bias.shape != (out,):
        raise ValueError(f"bias of shape {bias.shape}: expected ({out},)")
    return np.array(bias, dtype=np.float64)
