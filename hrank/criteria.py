"""Which filters of a layer matter: one score a filter, larger = keep.

A criterion reads ``Evidence`` and gives scores (c,). ``order`` sorts them ascending, filters with equal scores by
their number, so a tie loses the lower filter first; the sort is stable and the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of the c filters of a layer; None where it is not. See ``Criterion.needs``.

    ``weight``: the filters, (c, ...). ``readers``: of each layer that reads the channels its weights, with the
    channel first, (c, ...). ``gamma``: factors of the BatchNorm behind, (c,). ``rank``, ``bound``, ``density``,
    ``activation``, ``nuclear``: means over images, (c,) each. ``seed`` is that of ``random``.
    """

    weight: Array | None = None
    readers: tuple[Array, ...] | None = None
    gamma: Array | None = None
    rank: Array | None = None
    bound: Array | None = None
    density: Array | None = None
    activation: Array | None = None
    nuclear: Array | None = None
    channels: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Criterion:
    """A way to score filters: the fields of ``Evidence`` that it reads, and what it means."""

    score: Callable[[Evidence], Array]
    needs: tuple[str, ...]
    about: str

    @property
    def needs_images(self) -> bool:
        """Whether it is measured on images."""
        return bool({"rank", "bound", "density", "activation", "nuclear"} & set(self.needs))


def filters(weight: Array, *, transposed: bool = False, groups: int = 1) -> Array:
    """A stored weight with one filter a row: (c, in/g, ...) as it is; of a Deconvolution (in, c/g, ...) -> (c, in/g, ...)."""
    if not transposed:
        return weight
    blocks = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])  # (g, in/g, c/g, ...)
    turned = blocks.swapaxes(1, 2)
    return turned.reshape(-1, *turned.shape[2:])


def _rows(weight: Array) -> Array:
    return weight.reshape(len(weight), -1).astype(np.float64)


def _l1(e: Evidence) -> Array:
    assert e.weight is not None
    return np.abs(_rows(e.weight)).sum(1)


def _next_l1(e: Evidence) -> Array:
    assert e.readers is not None
    return np.sum([np.abs(_rows(weight)).sum(1) for weight in e.readers], axis=0)


def _gamma(e: Evidence) -> Array:
    assert e.gamma is not None
    return np.abs(e.gamma)


def _geometric_median(e: Evidence) -> Array:
    assert e.weight is not None
    rows = _rows(e.weight)
    return np.array([np.linalg.norm(rows - row, axis=1).sum() for row in rows])


def _random(e: Evidence) -> Array:
    assert e.channels is not None
    return np.random.default_rng(e.seed).permutation(e.channels).astype(np.float64)


def _edge(e: Evidence) -> Array:
    place = np.empty(len(_given(e.rank)), np.int64)
    place[order(_given(e.rank))] = np.arange(len(place))
    other = len(place) - 1 - place
    return 2.0 * np.minimum(place, other) + (place > other)


def _given(values: Array | None) -> Array:
    assert values is not None
    return values


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "rank": Criterion(lambda e: _given(e.rank), ("rank",), "mean rank of the maps (HRank)"),
        "reverse": Criterion(lambda e: -_given(e.rank), ("rank",), "HRank's ablation: high ranks go first"),
        "edge": Criterion(
            _edge, ("rank",), "HRank's ablation: both ends go first, the lower before the higher"
        ),
        "rowcol": Criterion(
            lambda e: _given(e.bound), ("bound",), "min(rows, columns) not all zero: bounds the rank"
        ),
        "apoz": Criterion(
            lambda e: _given(e.density), ("density",), "share of activations that are not zero, 1 - APoZ"
        ),
        "activation": Criterion(lambda e: _given(e.activation), ("activation",), "mean activation"),
        "nuclear": Criterion(lambda e: _given(e.nuclear), ("nuclear",), "mean nuclear norm of the maps"),
        "l1": Criterion(_l1, ("weight",), "sum of |weights| of the filter"),
        "next-l1": Criterion(_next_l1, ("readers",), "sum of |weights| that read the channel"),
        "gamma": Criterion(_gamma, ("gamma",), "|scale| of the BatchNorm behind"),
        "geometric-median": Criterion(
            _geometric_median, ("weight",), "sum of distances to the layer's other filters (FPGM)"
        ),
        "random": Criterion(_random, ("channels",), "a random order, by the seed"),
    }
)
"""References: rank, reverse, edge: Lin et al., CVPR 2020, sections 3 and 4.5; apoz: Hu et al. 2016, equation 1; l1:
Li et al., ICLR 2017, section 3.1; next-l1: He et al. 2017's baseline; gamma: Liu et al., ICCV 2017;
geometric-median: He et al., CVPR 2019, equation 4."""


def scores(name: str, evidence: Evidence) -> Scores:
    """Scores (c,) of a layer's filters by the criterion ``name``, larger = keep.

    Raises:
        ValueError: no such criterion, the evidence lacks what it needs, or a score is not finite.
    """
    criterion = CRITERIA.get(name)
    if criterion is None:
        raise ValueError(f'there is no criterion "{name}"; there are {", ".join(CRITERIA)}')
    missing = [field for field in criterion.needs if _lacks(getattr(evidence, field))]
    if missing:
        raise ValueError(
            f'criterion "{name}" needs {_LACKING.get(missing[0], missing[0])}, which is not known'
        )
    made = np.asarray(criterion.score(evidence), np.float64)
    if made.ndim != 1 or not np.isfinite(made).all():
        raise ValueError(f'criterion "{name}" gives scores that are not finite')
    return made


_LACKING = {
    "gamma": "gamma, the factors of a BatchNorm behind the layer",
    "readers": "readers, the layers that read the channels",
}


def _lacks(value: object) -> bool:
    return value is None or (isinstance(value, tuple) and not value)


def order(values: ArrayLike) -> NDArray[np.intp]:
    """Filters in the order in which they go: ascending by (score, number)."""
    return np.argsort(np.asarray(values), kind="stable")


def kept(values: ArrayLike, prune: int, groups: int = 1) -> NDArray[np.intp]:
    """The filters that stay when ``prune`` go, ascending; of each of ``groups`` blocks equally many go.

    Raises:
        ValueError: fewer than 0 or all would go, or groups do not divide the filters or those that go.
    """
    blocks = np.asarray(values)
    count = len(blocks)
    if not 0 <= prune < count:
        raise ValueError(f"{prune} of {count} filters cannot go: at least one must stay")
    if count % groups or prune % groups:
        raise ValueError(f"{groups} groups do not divide {count} filters, of which {prune} go")
    size, each = count // groups, prune // groups
    stay = [np.sort(order(block)[each:]) + i * size for i, block in enumerate(blocks.reshape(groups, size))]
    return np.concatenate(stay)


def tied_at(values: ArrayLike, prune: int) -> int:
    """How many filters share the score at which the cut lies, where it parts equal ones; else 0."""
    ascending = np.sort(np.asarray(values))
    if not 0 < prune < len(ascending) or ascending[prune - 1] != ascending[prune]:
        return 0
    return int(np.count_nonzero(ascending == ascending[prune]))
