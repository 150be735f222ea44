"""Layers that must keep the same channels as one choice: what it is between, and how it is made from scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from caffe_proto.errors import PlanError

from .criteria import order as ascending

Units = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Member:
    """A layer with filters: the unit of its group that each of its output channels belongs to, (channels,).

    ``depthwise``: it decides nothing, each of its filters belongs to the channel it reads.
    """

    layer: str
    type: str
    units: np.ndarray
    depthwise: bool

    @property
    def channels(self) -> int:
        """How many output channels it has."""
        return len(self.units)


@dataclass(frozen=True)
class Consumer:
    """A layer whose blobs or settings change with a group: how many of its places follow it."""

    layer: str
    type: str
    places: int


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that must keep the same channels.

    ``channels`` counts the units. ``fixed`` must stay; ``frozen`` says why no unit can go, or is "". ``why``:
    the reason of every fixed unit. ``cells``: parts of the units that must keep equally many, as grouped
    convolutions want; none where there is no such rule. ``never_empty``: of each of these one unit must stay.
    """

    index: int
    members: tuple[Member, ...]
    channels: int
    consumers: tuple[Consumer, ...]
    fixed: Units
    why: Mapping[int, str] = field(repr=False)
    cells: tuple[Units, ...] = field(repr=False)
    never_empty: tuple[Units, ...] = field(repr=False)

    @property
    def frozen(self) -> str:
        """Why no unit of the group can go; "" where one can."""
        if len(self.fixed) == self.channels:
            return self.why[self.fixed[0]]
        return "it has one channel" if self.channels == 1 else ""

    @property
    def coupled(self) -> bool:
        """Whether one choice is made for several layers that are not depthwise."""
        return sum(not member.depthwise for member in self.members) > 1

    def scores(self, by_layer: Mapping[str, np.ndarray], reduce: str = "mean") -> np.ndarray:
        """One score a unit from the scores of its filters, (channels,).

        ``reduce``: "mean", "max" or "min" over all filters of a unit that have a score. Raises PlanError where
        a unit has none, or a layer has another number of scores than channels.
        """
        start = {"mean": 0.0, "max": -np.inf, "min": np.inf}[reduce]
        total, counts = np.full(self.channels, start), np.zeros(self.channels)
        for member in self.members:
            if member.layer not in by_layer:
                continue
            given = np.asarray(by_layer[member.layer], np.float64)
            if given.shape != (member.channels,):
                raise PlanError(f"{given.size} scores for {member.channels} filters", layer=member.layer)
            join = {"mean": np.add, "max": np.maximum, "min": np.minimum}[reduce]
            join.at(total, member.units, given)
            np.add.at(counts, member.units, 1)
        if not counts.all():
            raise PlanError("some of its channels have no score", layer=self.members[0].layer)
        return total / counts if reduce == "mean" else total

    def choose(self, scores: np.ndarray, keep: int) -> Units:
        """The units to keep, ascending: those of the highest scores, of equal ones the later.

        What must stay, stays; cells keep equally many, so their number is rounded down, to one at least.
        """
        order = ascending(scores)[::-1]
        fixed = np.isin(np.arange(self.channels), self.fixed)
        order = np.concatenate([order[fixed[order]], order[~fixed[order]]])
        celled = np.concatenate([*map(np.asarray, self.cells), np.empty(0, int)]).astype(int)
        parts = [order[np.isin(order, cell)] for cell in self.cells]
        free = order[~np.isin(order, celled)]
        each = 0
        if parts:
            share = keep * len(celled) // self.channels
            least = max(1, max(int(fixed[part].sum()) for part in parts))
            each = max(least, min(share // len(parts), min(map(len, parts))))
        rest = max(keep - each * len(parts), int(fixed[free].sum()), 0 if parts else 1)
        kept = {int(unit) for part in parts for unit in part[:each]} | set(free[:rest].tolist())
        for wanted in self.never_empty if not parts else ():
            if not kept.intersection(wanted):
                kept.add(int(next(unit for unit in order if unit in wanted)))
        return tuple(sorted(kept))

    def spread(self, kept: Iterable[int]) -> dict[str, tuple[int, ...]]:
        """The output channels that each member keeps with these units, ascending."""
        chosen = np.zeros(self.channels, bool)
        chosen[list(kept)] = True
        return {member.layer: tuple(np.flatnonzero(chosen[member.units]).tolist()) for member in self.members}
