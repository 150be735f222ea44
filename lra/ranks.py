"""Policy: which treatment of which layer, given costs, losses and a budget. Knows no weights and no schemes.

Rounding to multiples: build the options of a layer from `candidates(..., round_to=N)` only. `allocate` then
finds the best ranks among the multiples, which is never worse than allocating freely and rounding each rank
up or down afterwards, and the budget holds by construction. For an energy target take the first candidate at
or above the rank wanted, where that is still cheaper than the layer itself.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

_TINY = float(np.finfo(np.float64).tiny)
_GOOD_ENOUGH = 1e-3  # relative gap at which `allocate` stops looking
_MAX_NODES = 64


class Infeasible(ValueError):
    """No choice stays within the `budget`; `smallest` is the lowest cost that can be reached."""

    def __init__(self, smallest: float, budget: float) -> None:
        super().__init__(f"the budget is {budget:,.12g}, but the smallest reachable cost is {smallest:,.12g}")
        self.smallest = smallest
        self.budget = budget


@dataclass(frozen=True)
class Option:
    """One way to treat a layer: its cost, its loss, a key such as ("spatial", 24), or None: left alone."""

    cost: float
    loss: float
    key: Hashable = None


def loss(retained: ArrayLike) -> NDArray[np.float64]:
    """Loss of retaining a fraction of the energy, ``-log(retained)``, elementwise; finite at 0.

    The sum over layers is smallest where the product of the retained energies is largest.

    Reference: Zhang et al. 2015, arXiv:1505.06798, equation 13.
    """
    # + 0.0: no negative zero
    return -np.log(np.clip(np.asarray(retained, dtype=np.float64), _TINY, 1.0)) + 0.0


def candidates(max_rank: int, group: int = 1, round_to: int = 1) -> range:
    """Ranks to consider for a layer: multiples of `group` and `round_to` up to `max_rank`; may be empty."""
    step = math.lcm(group, round_to)
    return range(step, max_rank + 1, step)


def below(ratio: float) -> float:
    """A ratio rounded down to three digits, so that it can be asked for."""
    unit = 10.0 ** (math.floor(math.log10(ratio)) - 2)
    return math.floor(ratio / unit) * unit


def allocate(options: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """Choose one option a layer: ``min sum_l loss_l`` subject to ``sum_l cost_l <= budget``, approximately.

    From the cheapest options upward along the lower convex hulls of (cost, loss), steepest step first, as
    long as it fits: optimal among the hulls up to the last step. What is left of the budget goes to the
    single-layer change, over all options, with the largest decrease of loss that fits, again and again. Where
    that leaves more than a thousandth of the loss to the lower bound, as a long step to an untouched layer
    can, the layer of the step that did not fit is decided first, below the step and from it on, and the rest
    found anew; best bound first, up to a fixed number of such decisions. Never further above `lower_bound`
    than one hull step saves. Ties go to the earlier layer.

    Args:
        options: for each layer at least one, finite costs and losses, in any order.
        budget: in the unit of the costs.

    Returns:
        The options chosen, one a layer, in the order given.

    Raises:
        Infeasible: even the cheapest options cost more than the budget.
        ValueError: a layer has no option.

    Reference: the multiple-choice knapsack problem, Sinha and Zoltners 1979; the objective is that of Zhang
    et al. 2015, arXiv:1505.06798, equation 14.
    """
    root = _relax([_front(layer) for layer in options], budget)
    best = _spend(root.fronts, root.chosen, budget)
    open_nodes, count = [(root.bound, 0, root)], 1
    while open_nodes and count < _MAX_NODES:
        bound, _, node = heapq.heappop(open_nodes)
        if _loss_of(best) - bound <= _GOOD_ENOUGH * _loss_of(best):
            break
        for child in _branch(node, budget):
            best = min(best, _spend(root.fronts, child.chosen, budget), key=_loss_of)
            heapq.heappush(open_nodes, (child.bound, count, child))
            count += 1
    return best


def lower_bound(options: Sequence[Sequence[Option]], budget: float) -> float:
    """A total loss that no choice within the budget can go below: the optimum with options mixed at will.

    ``max_{t >= 0} sum_l min_o (loss_lo + t cost_lo) - t budget``, the Lagrangian dual. The gap of an
    allocation is its total loss less this.

    Raises:
        Infeasible: even the cheapest options cost more than the budget.
        ValueError: a layer has no option.
    """
    return _relax([_front(layer) for layer in options], budget).bound


def strip(
    eigenvalues: Sequence[NDArray[Any]],
    costs_per_rank: Sequence[float],
    fixed: float,
    budget: float,
    measure: Literal["exact", "paper"] = "exact",
) -> list[int]:
    """Ranks by stripping, from full rank, the eigenvalue that matters least for its cost, down to the budget.

    Measure of layer l at rank a, with s its eigenvalues and S their prefix sums: ``s_a / S_a / cost_l``
    ("paper"), or the exact decrease of the log of the retained energy, ``-log(1 - s_a / S_a) / cost_l``
    ("exact"), with which the result is optimal up to the last step. No rank falls below 1. Ties go to the
    earlier layer.

    Args:
        eigenvalues: for each layer (d_l,), descending; negative ones count as 0.
        costs_per_rank: cost of one rank in each layer, positive.
        fixed: cost of what stays as it is.
        budget: for ``fixed + sum_l rank_l * cost_l``.
        measure: "exact" or "paper".

    Raises:
        Infeasible: rank 1 everywhere still costs more than the budget.
        ValueError: no such measure.

    Reference: Zhang et al. 2015, arXiv:1505.06798, section on rank selection for a whole model, equations 13
    and 14.
    """
    if measure not in ("exact", "paper"):
        raise ValueError(f'measure {measure!r} is neither "exact" nor "paper"')

    def total() -> float:
        return math.fsum([fixed, *(rank * cost for rank, cost in zip(ranks, costs_per_rank, strict=True))])

    smallest = math.fsum([fixed, *costs_per_rank])
    if smallest > budget:
        raise Infeasible(smallest, budget)
    ranks = [len(values) for values in eigenvalues]
    measures = [
        _strip_measures(values, cost, measure)
        for values, cost in zip(eigenvalues, costs_per_rank, strict=True)
    ]
    heap = [
        (m[rank - 1], layer) for layer, (m, rank) in enumerate(zip(measures, ranks, strict=True)) if rank > 1
    ]
    heapq.heapify(heap)
    while total() > budget:
        _, layer = heapq.heappop(heap)
        ranks[layer] -= 1
        if ranks[layer] > 1:
            heapq.heappush(heap, (measures[layer][ranks[layer] - 1], layer))
    return ranks


def _strip_measures(values: NDArray[Any], cost: float, measure: str) -> list[float]:
    """Measure of stripping the a-th eigenvalue, for a = 1, 2, ..."""
    kept = np.maximum(np.asarray(values, dtype=np.float64), 0.0)
    sums = kept.cumsum()
    share = np.divide(kept, sums, out=np.zeros_like(kept), where=sums > 0)
    share[:1] = 0.0  # the last rank is never stripped
    decrease: list[float] = ((share if measure == "paper" else -np.log1p(-share)) / cost).tolist()
    return decrease


@dataclass(frozen=True)
class _HullStep:
    """From one point of a layer's hull to the next: loss saved a unit of cost."""

    slope: float
    layer: int
    target: Option


def _front(layer: Sequence[Option]) -> list[Option]:
    """Options that no other beats in both cost and loss: cost strictly up, loss strictly down."""
    if not layer:
        raise ValueError("a layer has no option")
    front: list[Option] = []
    for option in sorted(layer, key=lambda o: (o.cost, o.loss)):
        if not front or option.loss < front[-1].loss:
            front.append(option)
    return front


def _hull(front: Sequence[Option]) -> list[Option]:
    """Lower convex hull of a front: slopes strictly decreasing."""
    hull: list[Option] = []
    for option in front:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(here: Option, there: Option) -> float:
    return (here.loss - there.loss) / (there.cost - here.cost)


def _hull_steps(fronts: Sequence[Sequence[Option]]) -> list[_HullStep]:
    """All steps of all hulls, steepest first; those of one layer stay in order."""
    hulls = [_hull(front) for front in fronts]
    steps = [
        _HullStep(_slope(here, there), layer, there)
        for layer, hull in enumerate(hulls)
        for here, there in pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step.slope)


@dataclass(frozen=True)
class _Node:
    """Fronts, the options reached along their hulls, the first step that did not fit, the dual bound."""

    fronts: list[list[Option]]
    chosen: list[Option]
    unfit: _HullStep | None
    bound: float


def _relax(fronts: list[list[Option]], budget: float) -> _Node:
    """Greedy along the hulls, up to the first step that does not fit."""
    chosen = [front[0] for front in fronts]
    smallest = math.fsum(o.cost for o in chosen)
    if smallest > budget:
        raise Infeasible(smallest, budget)
    for step in _hull_steps(fronts):
        if _cost_with(chosen, step.layer, step.target) > budget:
            slack = budget - math.fsum(o.cost for o in chosen)
            return _Node(fronts, chosen, step, _loss_of(chosen) - step.slope * slack)
        chosen[step.layer] = step.target
    return _Node(fronts, chosen, None, _loss_of(chosen))


def _branch(node: _Node, budget: float) -> Iterator[_Node]:
    """The node with the layer of its unfit step held below that step, and held from it on; where feasible."""
    if node.unfit is None:
        return
    layer, target = node.unfit.layer, node.unfit.target
    front = node.fronts[layer]
    cut = front.index(target)
    for part in (front[:cut], front[cut:]):
        fronts = [part if i == layer else other for i, other in enumerate(node.fronts)]
        if math.fsum(options[0].cost for options in fronts) <= budget:
            yield _relax(fronts, budget)


def _spend(fronts: list[list[Option]], start: list[Option], budget: float) -> list[Option]:
    """From the options given, single-layer changes, the largest decrease of loss first, until none fits."""
    chosen = list(start)
    while True:
        found = [_best_fit(front, chosen, layer, budget) for layer, front in enumerate(fronts)]
        gains = [now.loss - new.loss for now, new in zip(chosen, found, strict=True)]
        if not gains or max(gains) <= 0:
            return chosen
        layer = gains.index(max(gains))
        chosen[layer] = found[layer]


def _loss_of(chosen: Sequence[Option]) -> float:
    return math.fsum(option.loss for option in chosen)


def _best_fit(front: Sequence[Option], chosen: Sequence[Option], layer: int, budget: float) -> Option:
    """The option of least loss for one layer that fits beside the others' choices; the present one fits."""
    fitting = bisect_right(front, budget, key=lambda option: _cost_with(chosen, layer, option))
    return front[fitting - 1]


def _cost_with(chosen: Sequence[Option], layer: int, option: Option) -> float:
    return math.fsum(option.cost if i == layer else o.cost for i, o in enumerate(chosen))
