"""Ranks by the rules of the papers, for comparison with ranks that are chosen layer by layer at will."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt

import numpy as np

from . import ranks as policy
from .ranks import Infeasible
from .schemes import Scheme, asymmetric3d, response
from .targets import Spectra, Target

Ranks = dict[str, tuple[int, ...]]  # by layer; one that is missing is left alone

_MOST = 1e4  # a speed-up of one layer beyond which nothing is looked for
_HALVINGS = 60


def uniform(
    targets: Sequence[Target], scheme: Scheme, speedup: float, fixed: float, budget: float, same_ranks: bool
) -> Ranks:
    """The same speed-up for every layer: the largest ranks at it, ``cost <= macs / speedup``.

    ``speedup`` itself where that meets the ``budget`` for ``fixed`` and the layers' MACs, else the least above
    it that does. A layer with no such rank is left alone.

    Raises Infeasible where none does.

    Reference: Zhang et al. 2015, arXiv:1505.06798, the rows without rank selection of Tables 2 and 6.
    """

    curves = {target.name: _curve(target, scheme) for target in targets}

    def at(factor: float) -> Ranks:
        found = {
            target.name: _uniform(target, scheme, factor, same_ranks, *curves[target.name])
            for target in targets
        }
        return {name: ranks for name, ranks in found.items() if ranks}

    return _least(at, targets, scheme, speedup, fixed, budget)


def _curve(target: Target, scheme: Scheme) -> tuple[range, np.ndarray]:
    """All ranks, one standing for all of a scheme's, and the cost at each."""
    grid = policy.candidates(scheme.max_rank(target.shape, target.geometry.group), target.geometry.group)
    return grid, np.array([target.chain_cost(scheme, rank) for rank in grid])


def _uniform(
    target: Target, scheme: Scheme, speedup: float, same_ranks: bool, grid: range, costs: np.ndarray
) -> tuple[int, ...]:
    group = target.geometry.group
    if scheme is asymmetric3d.ASYMMETRIC_3D and not same_ranks:
        outer = response.speedup_rank(target.shape, group, sqrt(speedup))
        inner = outer and asymmetric3d.vertical_rank(target.shape, group, outer, speedup)
        return (inner, outer) if inner else ()
    fitting = np.flatnonzero(costs * speedup <= target.macs)
    return (grid[fitting[-1]],) * scheme.n_ranks if fitting.size else ()


def stripped(
    targets: Sequence[Target], scheme: Scheme, spectra: Spectra, speedup: float, fixed: float, budget: float
) -> Ranks:
    """The rule of the paper: from full ranks the eigenvalue of least ``(s_a / S_a) / cost`` goes, down to the budget.

    Asymmetric 3-D: channel ranks d' by that rule at the root of the speed-up, then d'' so that the whole layer
    is as much faster. A layer that its ranks would make slower is left alone.

    Raises Infeasible where rank 1 everywhere costs too much.

    Reference: Zhang et al. 2015, arXiv:1505.06798, sections on rank selection and on the 3-D method.
    """
    if scheme is not asymmetric3d.ASYMMETRIC_3D:
        return _cheaper(_strip(targets, scheme, spectra, fixed, budget), targets, scheme)
    total = speedup * budget
    outer = _strip(targets, response.RESPONSE, spectra, fixed, total / sqrt(speedup))

    def at(factor: float) -> Ranks:
        found: Ranks = {}
        for target in targets:
            (rank,) = outer[target.name]
            inner = asymmetric3d.vertical_rank(target.shape, target.geometry.group, rank, factor)
            if inner:
                found[target.name] = (inner, rank)
        return _cheaper(found, targets, scheme)

    return _least(at, targets, scheme, speedup, fixed, budget)


def _strip(targets: Sequence[Target], scheme: Scheme, spectra: Spectra, fixed: float, budget: float) -> Ranks:
    groups = [target.geometry.group for target in targets]
    energies = [spectra.get(target, scheme).energies.sum(axis=0) for target in targets]
    costs = [float(target.chain_cost(scheme, group)) for target, group in zip(targets, groups, strict=True)]
    found = policy.strip(energies, costs, fixed, budget, "paper")
    return {target.name: (rank * group,) for target, rank, group in zip(targets, found, groups, strict=True)}


def _cheaper(found: Mapping[str, tuple[int, ...]], targets: Sequence[Target], scheme: Scheme) -> Ranks:
    macs = {target.name: (target, target.macs) for target in targets}
    return {
        name: ranks
        for name, ranks in found.items()
        if macs[name][0].chain_cost(scheme, *ranks) < macs[name][1]
    }


def _least(
    at: Callable[[float], Ranks],
    targets: Sequence[Target],
    scheme: Scheme,
    speedup: float,
    fixed: float,
    budget: float,
) -> Ranks:
    """Ranks at the least factor from ``speedup`` on that meets the budget."""

    def cost(found: Ranks) -> float:
        return fixed + sum(
            target.chain_cost(scheme, *found[target.name]) if target.name in found else target.macs
            for target in targets
        )

    if cost(at(speedup)) <= budget:
        return at(speedup)
    tried = [at(factor) for factor in np.geomspace(speedup, _MOST, 200)]
    if all(cost(found) > budget for found in tried):
        raise Infeasible(min(map(cost, tried)), budget)
    low, high = (
        speedup,
        next(
            float(factor)
            for factor, found in zip(np.geomspace(speedup, _MOST, 200), tried, strict=True)
            if cost(found) <= budget
        ),
    )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) <= budget else (middle, high)
    return at(high)
