"""Allocation against brute force, bounds, and Zhang's stripping."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra import ranks
from lra.ranks import Infeasible, Option, allocate, candidates, loss, lower_bound, strip

numbers = st.integers(0, 40)
options = st.builds(Option, st.integers(1, 40).map(float), numbers.map(lambda n: n / 8), numbers)
nets = st.lists(st.lists(options, min_size=1, max_size=6), min_size=1, max_size=4)


def cost_of(chosen: list[Option]) -> float:
    return math.fsum(o.cost for o in chosen)


def loss_of(chosen: list[Option]) -> float:
    return math.fsum(o.loss for o in chosen)


def smallest(net: list[list[Option]]) -> float:
    return math.fsum(min(o.cost for o in layer) for layer in net)


def optimum(net: list[list[Option]], budget: float) -> float:
    return min(loss_of(c) for c in itertools.product(*net) if cost_of(c) <= budget)


def dual(net: list[list[Option]], budget: float) -> float:
    """The Lagrangian dual, maximised over every slope between two options of a layer (and 0)."""
    slopes = {0.0}
    for layer in net:
        for a, b in itertools.permutations(layer, 2):
            if a.cost < b.cost and a.loss > b.loss:
                slopes.add((a.loss - b.loss) / (b.cost - a.cost))
    return max(sum(min(o.loss + t * o.cost for o in layer) for layer in net) - t * budget for t in slopes)


@settings(deadline=None, max_examples=300)
@given(nets, st.integers(0, 120))
def test_allocation_lies_between_the_optimum_and_its_gap(net, slack) -> None:
    budget = smallest(net) + slack
    chosen = allocate(net, budget)
    assert all(option in layer for option, layer in zip(chosen, net, strict=True))
    assert cost_of(chosen) <= budget
    bound, best = lower_bound(net, budget), optimum(net, budget)
    assert bound - 1e-12 <= best <= loss_of(chosen)
    assert bound == pytest.approx(dual(net, budget), abs=1e-12)
    steps = ranks._hull_steps([ranks._front(layer) for layer in net])
    assert loss_of(chosen) - bound <= max([s.slope * 40 for s in steps], default=0) + 1e-12
    for layer, now in enumerate(chosen):  # no single change both fits and helps
        for option in net[layer]:
            assert option.loss >= now.loss or cost_of(chosen) - now.cost + option.cost > budget


@settings(deadline=None)
@given(nets, st.integers(0, 60), st.integers(0, 60))
def test_bound_falls_with_the_budget_and_the_loss_within_the_gap(net, slack, more) -> None:
    tight, loose = smallest(net) + slack, smallest(net) + slack + more
    assert lower_bound(net, loose) <= lower_bound(net, tight) + 1e-12
    gap = loss_of(allocate(net, loose)) - lower_bound(net, loose)
    assert loss_of(allocate(net, loose)) <= loss_of(allocate(net, tight)) + gap + 1e-12


@settings(deadline=None)
@given(nets)
def test_extreme_budgets(net) -> None:
    cheapest = allocate(net, smallest(net))
    assert cost_of(cheapest) == smallest(net)
    assert loss_of(cheapest) == optimum(net, smallest(net))
    most = math.fsum(max(o.cost for o in layer) for layer in net)
    assert loss_of(allocate(net, most)) == math.fsum(min(o.loss for o in layer) for layer in net)
    with pytest.raises(Infeasible) as caught:
        allocate(net, smallest(net) - 0.5)
    assert (caught.value.smallest, caught.value.budget) == (smallest(net), smallest(net) - 0.5)
    with pytest.raises(Infeasible):
        lower_bound(net, smallest(net) - 0.5)


def test_infeasible_says_both_figures() -> None:
    with pytest.raises(ValueError, match=r"budget is 1,000, but the smallest reachable cost is 2,500"):
        allocate([[Option(2500, 0)]], 1000)


def exact_by_table(net: list[list[Option]], budget: int) -> float:
    """The optimum for whole costs: best loss at every total cost, layer by layer."""
    best = np.zeros(budget + 1)
    for layer in net:
        rows = [np.full(int(o.cost), np.inf) for o in layer]
        best = np.min(
            [np.append(r, best + o.loss)[: budget + 1] for r, o in zip(rows, layer, strict=True)], 0
        )
    return float(best[-1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_nets_like_real_ones_are_solved_almost_exactly(seed: int, share: float) -> None:
    """A rank at a time, or left alone: the long step to that is what a plain greedy gets wrong."""
    rng = np.random.default_rng(seed)
    net = []
    for _ in range(6):
        energies = np.sort(rng.exponential(size=40))[::-1]
        retained = energies.cumsum() / energies.sum()
        cost = int(rng.integers(5, 60))
        layer = [Option(cost * r, float(loss(retained[r - 1])), r) for r in candidates(40)]
        net.append([*layer, Option(cost * 30, 0.0)])  # left alone: cheaper than rank 31
    budget = int(share * sum(layer[-1].cost for layer in net))
    chosen = allocate(net, budget)
    assert not any(o.key is not None and o.key > 30 for o in chosen)
    assert loss_of(chosen) <= 1.003 * exact_by_table(net, budget)


def test_left_over_budget_goes_off_the_hull() -> None:
    # (2, 4.5) lies above the segment (0, 5)-(10, 0): no hull step fits in 5, that change does
    net = [[Option(0, 5, "a"), Option(2, 4.5, "b"), Option(10, 0, "c")]]
    assert [o.key for o in allocate(net, 5)] == ["b"]
    assert lower_bound(net, 5) == 2.5
    assert [o.key for o in allocate(net, 10)] == ["c"]
    # beside a loss that dwarfs it the gap is good enough, and the change is made all the same
    assert [o.key for o in allocate([[Option(0, 1e6)], *net], 5)] == [None, "b"]


def test_ties_go_to_the_earlier_layer_and_the_earlier_option() -> None:
    layer = [Option(1, 1, "first"), Option(1, 1, "second"), Option(2, 0, "up"), Option(2, 0, "also up")]
    assert [o.key for o in allocate([layer, layer, layer], 4)] == ["up", "first", "first"]
    off_hull = [Option(0, 5, "a"), Option(2, 4.5, "b"), Option(10, 0, "c")]
    assert [o.key for o in allocate([[Option(0, 1e6)], off_hull, off_hull], 2)] == [None, "b", "a"]


def test_rounding_in_floats_does_not_cross_the_budget() -> None:
    net = [[Option(0.1, 1.0), Option(0.2, 0.0)] for _ in range(10)]
    assert cost_of(allocate(net, 2.0)) <= 2.0
    assert loss_of(allocate(net, 2.0)) == 0
    assert loss_of(allocate(net, math.nextafter(2.0, 0))) == 1


def test_empty_nets_and_layers() -> None:
    assert allocate([], 0) == []
    assert lower_bound([], 0) == 0
    with pytest.raises(ValueError, match="no option"):
        allocate([[Option(1, 1)], []], 5)


def test_loss_is_minus_the_log_and_finite_at_zero() -> None:
    np.testing.assert_allclose(loss([1, 0.5, math.exp(-3)]), [0, math.log(2), 3])
    assert not np.signbit(loss(1.0))
    assert 700 < loss(0.0) < 710
    assert loss(1 + 1e-16) == 0 and loss(-1e-17) == loss(0.0)


def test_candidates_are_multiples_of_both() -> None:
    assert list(candidates(6)) == [1, 2, 3, 4, 5, 6]
    assert list(candidates(40, 2, 8)) == [8, 16, 24, 32, 40]
    assert list(candidates(40, 3, 8)) == [24]
    assert list(candidates(7, 1, 8)) == []


def test_restricting_to_multiples_beats_rounding_afterwards() -> None:
    rng = np.random.default_rng(3)
    spectra = [np.sort(rng.exponential(size=24))[::-1] for _ in range(4)]
    costs = [7, 11, 13, 5]

    def layer(index: int, allowed: range) -> list[Option]:
        retained = spectra[index].cumsum() / spectra[index].sum()
        return [Option(costs[index] * r, float(loss(retained[r - 1])), r) for r in allowed]

    budget = 400.0
    free = allocate([layer(i, candidates(24)) for i in range(4)], budget)
    net = [layer(i, candidates(24, 1, 4)) for i in range(4)]
    rounded = [[o for o in opts if abs(o.key - f.key) < 4] for opts, f in zip(net, free, strict=True)]
    assert loss_of(allocate(net, budget)) <= optimum(rounded, budget) + 1e-12


def naive_strip(eigenvalues, costs, fixed, budget, measure) -> list[int]:
    """The same greedy, each measure from its definition at every step."""
    kept = [len(e) for e in eigenvalues]
    while fixed + sum(k * c for k, c in zip(kept, costs, strict=True)) > budget:
        best = None
        for layer, (values, cost, k) in enumerate(zip(eigenvalues, costs, kept, strict=True)):
            if k > 1:
                before, after = sum(values[:k]), sum(values[: k - 1])
                drop = math.log(before / after) if measure == "exact" else values[k - 1] / before
                if best is None or drop / cost < best[0] * (1 - 1e-12):
                    best = (drop / cost, layer)
        kept[best[1]] -= 1
    return kept


spectrum = st.lists(st.floats(0.01, 10), min_size=1, max_size=6).map(lambda v: sorted(v, reverse=True))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(spectrum, st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 50),
    st.floats(0, 1),
    st.sampled_from(["exact", "paper"]),
)
def test_strip_is_the_greedy_of_its_definition(layers, fixed, share, measure) -> None:
    values, costs = [np.array(v) for v, _ in layers], [c for _, c in layers]
    least = fixed + sum(costs)
    full = fixed + sum(len(v) * c for v, c in layers)
    budget = least + share * (full - least)
    found = strip(values, costs, fixed, budget, measure)
    assert fixed + sum(r * c for r, c in zip(found, costs, strict=True)) <= budget
    assert all(1 <= r <= len(v) for r, v in zip(found, values, strict=True))
    assert found == naive_strip([v.tolist() for v in values], costs, fixed, budget, measure)


@settings(deadline=None)
@given(st.lists(spectrum, min_size=1, max_size=4), st.data())
def test_exact_strip_is_optimal_at_equal_costs(spectra, data) -> None:
    budget = data.draw(st.integers(len(spectra), sum(map(len, spectra))))
    found = strip([np.array(v) for v in spectra], [1] * len(spectra), 0, budget)

    def log_energy(kept) -> float:
        return sum(math.log(sum(v[:k])) for v, k in zip(spectra, kept, strict=True))

    every = itertools.product(*(range(1, len(v) + 1) for v in spectra))
    best = max(log_energy(kept) for kept in every if sum(kept) <= budget)
    assert log_energy(found) == pytest.approx(best, abs=1e-9)


def test_strip_measures_differ_where_they_should() -> None:
    # last of layer 0: share 1/2, -log(1 - 1/2) / 13 = .0533; layer 1: share .4, -log(.6) / 10 = .0511
    values, costs = [np.array([1.0, 1.0]), np.array([0.6, 0.4])], [13, 10]
    assert strip(values, costs, 0, 40, "exact") == [2, 1]
    assert strip(values, costs, 0, 40, "paper") == [1, 2]


def test_strip_of_zero_and_negative_eigenvalues() -> None:
    values = [np.array([2.0, 1.0, 0.0, -1e-12]), np.zeros(3)]
    assert strip(values, [1, 1], 0, 3) == [2, 1]


def test_strip_refusals() -> None:
    with pytest.raises(Infeasible) as caught:
        strip([np.ones(3), np.ones(2)], [5, 7], 10, 21)
    assert (caught.value.smallest, caught.value.budget) == (22, 21)
    assert strip([np.ones(3), np.ones(2)], [5, 7], 10, 22) == [1, 1]
    with pytest.raises(ValueError, match="neither"):
        strip([np.ones(3)], [1], 0, 3, "papre")  # type: ignore[arg-type]
