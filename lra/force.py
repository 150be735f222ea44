"""Force Regularization: filters of a layer attract (or repel) one another, so that its rank falls (or grows).

The gradient of every filter gets a term. Nothing here imports torch, but apart from `update` the functions
take torch tensors as they take arrays: they use only what both have.

Reference: Wen et al. 2017, arXiv:1703.09746.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add, mul
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .filters import PLAIN, Layout
from .linalg import Array

Key = TypeVar("Key", bound=Hashable)

# The pull of one filter on another along the difference of their directions is its length d to the power 1 - k.
KINDS = {"degradation": 0, "constant": 1, "linear": 2, "gravity": 3, "l2": 0, "l1": 1}
DECAY_TYPES = ("fixed", "adaptive", "auto")
DIRECTIONS = ("all", "same")

SMALLEST = 1e-4  # filters of at most this norm neither pull nor are pulled; directions this close do not pull
_NO_FORCE = 1e-8  # norm of a force below which its strength cannot be set by a ratio


@dataclass(frozen=True)
class Force:
    """Settings of a run, in the words of the solver file.

    decay: ``force_decay``, the strength; negative makes filters repel one another (Discrimination).
    kind: ``force_type``: Degradation (L2), Constant (L1), Linear or Gravity; case does not matter.
    iterations: ``force_iter``: the force acts in that many first iterations; -1: in all.
    decay_type: ``force_decay_type``: "fixed": the strength is ``decay * mult`` of the layer. "adaptive": that
        times |gradient| / |force| of the blob, so ``decay * mult`` is the ratio of their norms. "auto": one
        strength for the whole net that makes ``decay`` the ratio of the norms over all layers together.
    direction: ``force_direction``: "same" drops entries of G that oppose the gradient in sign.
    schedule: (iteration, factor) points, iterations increasing; the strength is multiplied by the factor,
        linear between the points and constant beyond them.
    per_filter: divide by the number of filters a group, so that one strength suits wide and narrow layers.
    smallest: see `update`.

    Raises:
        ValueError: a value that is none of these.
    """

    decay: float = 0.0
    kind: str = "Degradation"
    iterations: int = -1
    decay_type: str = "fixed"
    direction: str = "all"
    schedule: tuple[tuple[int, float], ...] = ()
    per_filter: bool = False
    smallest: float = SMALLEST

    def __post_init__(self) -> None:
        power_of(self.kind)
        for value, known, what in (
            (self.decay_type, DECAY_TYPES, "force_decay_type"),
            (self.direction, DIRECTIONS, "force_direction"),
        ):
            if value not in known:
                raise ValueError(f'there is no {what} "{value}"; known: {", ".join(known)}')
        if not math.isfinite(self.decay):
            raise ValueError(f"force_decay {self.decay} is no finite number")
        if self.iterations < -1:
            raise ValueError(f"force_iter {self.iterations} must be at least 0, or -1 for no end")
        places = [iteration for iteration, _ in self.schedule]
        if any(b <= a for a, b in pairwise(places)):
            raise ValueError(f"the iterations of the schedule do not increase: {places}")

    @property
    def needs_gradient(self) -> bool:
        """Whether `terms` looks at gradients at all."""
        return self.decay_type != "fixed" or self.direction == "same"

    def level(self, iteration: int) -> float:
        """Strength in an iteration, counted from 0: ``decay`` times the schedule, 0 from ``iterations`` on."""
        if self.iterations != -1 and iteration >= self.iterations:
            return 0.0
        if not self.schedule:
            return self.decay
        places, factors = zip(*self.schedule, strict=True)
        return self.decay * float(np.interp(iteration, places, factors))


@dataclass(frozen=True)
class Member:
    """A weight blob under the force: ``force_mult`` of its layer, and where its filters lie."""

    mult: float = 1.0
    layout: Layout = PLAIN


def update(W: NDArray[Any], kind: str = "l2", groups: int = 1, *, smallest: float = SMALLEST) -> Array:
    """The gradient term of a layer; ``gradient += force_decay * force_mult * G`` moves its filters together.

    With norms n, directions u = W / n and distances ``d_ij = |u_j - u_i|``:
    ``G_i = -n_i (a_i - (a_i . u_i) u_i)``, ``a_i = sum_j u_j / d_ij^k``, over the filters j of the same group;
    k = 0 for "l2" ("Degradation"), 1 for "l1" ("Constant"), 2 for "Linear", 3 for "Gravity". G is tangent,
    ``G_i . W_i = 0``, and scales with W. For l2 it is ``|W_i|^2 / 2`` times the gradient of
    ``1/2 sum_ij |u_j - u_i|^2``, for l1 of ``sum_ij |u_j - u_i|``.

    A filter of norm at most `smallest` counts as absent. Pairs of directions at most 1e-4 apart, a filter
    and itself included, do not act on each other where k > 0.

    Args:
        W: (N, K), one filter a row; a group is N / groups rows in a row.
        kind: case does not matter.
        groups: only filters of one group act on each other.
        smallest: in the unit of W.

    Returns:
        G (N, K) float64. For l2 O(N K), else O(N^2 K / groups) operations.

    Raises:
        ValueError: an unknown kind, W without two axes, or `groups` that does not divide N.

    Reference: Wen et al. 2017, arXiv:1703.09746; Linear and Gravity: the code published with it.
    """
    if W.ndim != 2:
        raise ValueError(f"filters of shape {W.shape}: expected (N, K)")
    return of_blob(np.asarray(W, dtype=np.float64), kind, Layout(groups), smallest=smallest)  # type: ignore[no-any-return]


def of_blob(
    blob: Any,
    kind: str = "l2",
    layout: Layout = PLAIN,
    *,
    per_filter: bool = False,
    smallest: float = SMALLEST,
) -> Any:
    """`update` of a weight blob of two or more axes, float64 array or tensor, in its own shape.

    Args:
        blob: see `lra.filters.Layout`.
        kind, smallest: see `update`.
        layout: of the blob.
        per_filter: divide by the number of filters a group.

    Raises:
        ValueError: as `update`.
    """
    power = power_of(kind)
    filters = layout.matrices(blob)
    term = _spread(filters, smallest) if power == 0 else _pairwise(filters, power, smallest)
    if per_filter:
        term = term / filters.shape[1]
    return layout.join(term.reshape(layout.split(blob).shape), tuple(blob.shape))


def terms(
    force: Force,
    iteration: int,
    members: Mapping[Key, Member],
    weights: Mapping[Key, Any],
    gradients: Mapping[Key, Any],
) -> dict[Key, Any]:
    """What one iteration adds to the gradients: ``strength * G`` for every member with a strength.

    fixed: ``strength = level mult``; adaptive: ``level mult |g| / |G|`` by blob; auto: ``level mult c``, one
    ``c = sqrt(sum |g|^2) / sqrt(sum |mult G|^2)`` for all. Where the force has a norm below 1e-8 it is 0.
    Blobs of fewer than two axes, and members without a weight, are left out.

    Args:
        iteration: counted from 0.
        weights: float64, array or tensor.
        gradients: as the weights, weight decay included; looked at only where `force.needs_gradient`.
    """
    level = force.level(iteration)
    pulls = {}
    for key, member in members.items():
        if not level * member.mult or key not in weights or len(weights[key].shape) < 2:
            continue
        pull = of_blob(
            weights[key], force.kind, member.layout, per_filter=force.per_filter, smallest=force.smallest
        )
        pulls[key] = pull * (pull * gradients[key] >= 0) if force.direction == "same" else pull
    if not pulls:
        return {}
    if force.decay_type == "auto":
        whole = _ratio(
            [gradients[key] for key in pulls], [members[key].mult * pull for key, pull in pulls.items()]
        )
        return {key: level * members[key].mult * whole * pull for key, pull in pulls.items()}
    if force.decay_type == "adaptive":
        return {
            key: level * members[key].mult * _ratio([gradients[key]], [pull]) * pull
            for key, pull in pulls.items()
        }
    return {key: level * members[key].mult * pull for key, pull in pulls.items()}


def power_of(kind: str) -> int:
    """The k of a kind, see `update`. Raises ValueError for an unknown one."""
    if kind.lower() not in KINDS:
        raise ValueError(
            f'there is no force_type "{kind}"; known: Degradation (l2), Constant (l1), Linear, Gravity'
        )
    return KINDS[kind.lower()]


def _norms(squares: Any, smallest: float) -> tuple[Any, Any]:
    """Norms from their squares, and one over them; both 0 where they are not above `smallest`."""
    norms = squares**0.5
    there = norms > smallest
    return norms * there, there / (norms + ~there)


def _spread(W: Any, smallest: float) -> Any:
    """G of every group for k = 0: ``G_i = (S . u_i) W_i - n_i S``, S the sum of all directions. W (g, n, K)."""
    norms, inverse = _norms((W * W).sum(axis=2, keepdims=True), smallest)  # (g, n, 1)
    S = inverse.swapaxes(1, 2) @ W  # (g, 1, K)
    return (W @ S.swapaxes(1, 2)) * inverse * W - norms * S


def _pairwise(W: Any, power: int, smallest: float) -> Any:
    """G of every group for k > 0, as ``M W``: ``M_ij = -n_i / (n_j d_ij^k)``, ``M_ii = sum_j c_ij / d_ij^k``.

    c are the cosines, ``d^2 = 2 - 2 c``. W (g, n, K).
    """
    groups, n, _ = W.shape
    cosines = W @ W.swapaxes(1, 2)  # so far their products with the norms
    norms, inverse = _norms(cosines.reshape(groups, n * n)[:, :: n + 1].reshape(groups, n, 1), smallest)
    cosines *= inverse
    cosines *= inverse.swapaxes(1, 2)
    distances = (2.0 - 2.0 * cosines).clip(min=0.0) ** 0.5
    apart = distances > SMALLEST
    closeness = apart / (distances + ~apart)
    mixing = reduce(mul, [closeness] * power)  # a power with ** takes longer than the matrix products
    mixing.reshape(groups, n * n)[:, :: n + 1] = 0.0
    radial = (mixing * cosines).sum(axis=2)
    mixing *= -norms
    mixing *= inverse.swapaxes(1, 2)
    mixing.reshape(groups, n * n)[:, :: n + 1] = radial
    return mixing @ W


def _ratio(gradients: list[Any], pulls: list[Any]) -> Any:
    """``|g| / |G|`` over all blobs; 0 where the force has no norm to speak of."""
    gradient, pull = _norm(gradients), _norm(pulls)
    felt = pull >= _NO_FORCE
    return gradient * felt / (pull + ~felt)


def _norm(blobs: list[Any]) -> Any:
    return reduce(add, [(blob * blob).sum() for blob in blobs]) ** 0.5
