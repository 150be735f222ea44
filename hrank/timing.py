"""Pruning by measured time: of nets that lose ever more filters, the first that is fast enough in onnxruntime.

Time over widths is a staircase, as kernels take channels in blocks, and it is not monotone. So nothing is bisected: a
grid of nets is measured, each in turn with the net as it is, then what lies between where it may matter, and what
decides once more with more runs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm, nextafter
from pathlib import Path

from caffe_proto.errors import UsageError
from caffe_proto.runtime import Engine
from lra.latency import Latency
from lra.latency_plan import record
from lra.latency_probe import Drawing
from lra.latency_table import Table
from lra.plan import Timed
from lra.ranks import below
from lra.targets import find

from . import counts, rates
from .applier import apply
from .coupling import Coupling
from .plan import Plan, PruneEntry, input_shapes

_BESIDE = 4  # nets that run in turn beside the net as it is
_FEW, _MANY = 15, 101  # runs to look around, and of what decides
_GRID = 12  # nets measured at once, evenly over those that there are
_SLACK = 1.1  # how much faster than both its ends a net between them may be
_APART = 2  # standard errors by which a net may be faster than it was measured
_CLOCK = "by the clock"  # of whole nets in the table: those by the sum of their kernels bear no such word


@dataclass(frozen=True)
class Speed:
    """How many times faster a net is than it was whole, the relative standard error of that, and the runs behind it."""

    ratio: float
    noise: float
    runs: int


@dataclass(frozen=True)
class Step:
    """One rate for all layers, and how many units the groups keep that lose some at it, by index."""

    rate: float
    kept: Mapping[int, int]


@dataclass(frozen=True)
class Chosen:
    """The step that a budget of time took, the times behind it, and what groups keep all in a block, by index."""

    step: Step
    timed: Timed
    whole: tuple[int, ...]


Speeds = Callable[
    [Sequence[int], int], Sequence[Speed]
]  # of nets by their places in the row, with so many runs


class Clock:
    """Times of a net and of what pruning leaves of it, whole nets by the clock, kept in the table of latencies.

    ``engine``: the threads and the provider that the net shall run with. ``path``: the table's file, by default one in
    the user's cache. ``step`` is called with how many nets were measured.

    Raises as `Latency`.
    """

    def __init__(
        self,
        coupling: Coupling,
        engine: Engine | None = None,
        path: str | Path | None = None,
        step: Callable[[int], None] = lambda _nets: None,
    ) -> None:
        self._coupling, self._step = coupling, step
        self._inputs = {name: tuple(shape) for name, shape in input_shapes(coupling.shaped).items()}
        self._latency = Latency(find(coupling.model, self._inputs), engine, path)
        self._whole = _key(self._latency.drawing)
        self._keys: dict[frozenset[tuple[int, int]], str] = {}

    def choose(
        self,
        layers: Sequence[str],
        *,
        speedup: float,
        params: float | None = None,
        coupled: bool = False,
        round_to: int = 1,
        least: int = 1,
    ) -> Chosen:
        """The lowest common rate of ``layers`` at which the whole net is so many times faster, as measured.

        Channels that stay are multiples of the kernels' block, and of ``round_to``: those between cost as much.
        ``params``: parameters fall by this factor as well.

        Raises UsageError where no net is fast enough, naming the fastest that was measured.
        """
        if min(speedup, params or 1) < 1:
            raise UsageError("a budget is a factor of 1 or more", hint="give a larger --speedup or --params")
        if not counts.true(self._coupling, {}).flops:
            raise rates.sizeless(self._coupling)
        blocks = _blocks(self._coupling, layers, coupled, self._latency.block)
        units = {index: lcm(round_to, block) for index, block in blocks.items()}
        if all(self._coupling.groups[index].channels <= unit for index, unit in units.items()):
            raise UsageError(
                f"no layer can do without a block of the kernels ({self._latency.block} channels): none would be faster",
                hint="allow more layers (--coupled, fewer --except)",
            )
        row = self._small_enough(list(steps(self._coupling, units, least)), params)
        place, known = first_fast(
            len(row), speedup, lambda places, runs: self._speeds([row[i] for i in places], runs)
        )
        if place is None:
            best = max(known, key=lambda one: known[one].ratio)
            ask = "ask for less, or allow more layers (--coupled, fewer --except)"
            raise UsageError(
                f"a speed-up of {speedup:g} in time cannot be reached: of {len(known)} nets measured the fastest is "
                f"{below(known[best].ratio):.3g} times faster, at rate {row[best].rate:.3g}",
                hint=self._latency.doubt_of(known[best].noise) or ask,
            )
        seconds = (self._seconds(Step(0.0, {})), self._seconds(row[place]))
        noise = max(known[one].noise for one in deciding(known, place, speedup, len(row)))
        small = tuple(
            index for index, block in blocks.items() if self._coupling.groups[index].channels <= block
        )
        return Chosen(row[place], record(seconds, noise, self._latency.engine), small)

    def _small_enough(self, row: Sequence[Step], params: float | None) -> Sequence[Step]:
        """The steps from where parameters have fallen by a factor."""
        if params is None:
            return row
        before = counts.true(self._coupling, {}).params

        def reached(step: Step) -> float:
            return before / counts.true(self._coupling, self._coupling.choose(step.kept)).params / params

        first = bisect_left(range(len(row)), True, key=lambda i: reached(row[i]) >= 1)
        if first == len(row):
            raise UsageError(
                f"the budget of parameters cannot be met by these layers, they reach {reached(row[-1]):.1%} of it",
                hint="ask for less",
            )
        return row[first:]

    def _speeds(self, row: Sequence[Step], runs: int) -> list[Speed]:
        """How fast the nets of these steps are; measured where the table does not say it with so many runs."""
        for start in range(0, len(row), _BESIDE):
            self._measure(row[start : start + _BESIDE], runs)
        whole = self._seconds(Step(0.0, {}))
        found = [self._latency.table.nets[self._key(step)] for step in row]
        return [
            Speed(whole / one.seconds, one.noise, one.runs)
            if self._key(step) != self._whole
            else Speed(1.0, 0.0, _MANY)
            for step, one in zip(row, found, strict=True)
        ]

    def _measure(self, row: Sequence[Step], runs: int) -> None:
        """Measure a few nets in turn with the net as it is; what the table says of that one stays its time."""
        table = self._latency.table
        anchored = self._whole in table.nets
        missing: dict[str, Drawing] = {}
        for step in row:
            key = self._key(step)
            known = table.nets.get(key)
            if key != self._whole and (not anchored or known is None or known.runs < runs):
                missing[key] = self._drawn(step)
        if not missing and anchored:
            return
        table.write()  # where it cannot be written, this is said before the work
        before, others = self._latency.beside([one.variant({}) for one in missing.values()], runs)
        whole = table.nets.setdefault(self._whole, before)
        for key, one in zip(missing, others, strict=True):
            table.nets[key] = replace(one, seconds=one.seconds * whole.seconds / before.seconds)
        table.write()
        self._latency.table = Table.load(table.machine, table.path)  # as a later plan reads it
        self._step(len(missing))

    def _seconds(self, step: Step) -> float:
        return self._latency.table.nets[self._key(step)].seconds

    def _key(self, step: Step) -> str:
        """The net of a step as the table names it."""
        if not step.kept:
            return self._whole
        kept = frozenset(step.kept.items())
        if kept not in self._keys:
            self._keys[kept] = _key(self._drawn(step))
        return self._keys[kept]

    def _drawn(self, step: Step) -> Drawing:
        """The net of a step."""
        keep = self._coupling.choose(step.kept)
        plan = Plan({name: PruneEntry(tuple(channels)) for name, channels in keep.items()})
        pruned, _ = apply(plan, self._coupling.model, force=True, input_shapes=self._inputs)
        return Drawing.of(find(pruned, self._inputs))


def _key(drawing: Drawing) -> str:
    return f"{drawing.fingerprint} {_CLOCK}"


def _blocks(coupling: Coupling, layers: Sequence[str], coupled: bool, block: int) -> dict[int, int]:
    """Units that fill a block of the kernels in every cell of a group, by its index."""
    touched, _ = rates.group_rates(coupling, dict.fromkeys(layers, 0.5), coupled=coupled)
    return {index: block * max(1, len(coupling.groups[index].cells)) for index in touched}


def steps(coupling: Coupling, units: Mapping[int, int], least: int = 1) -> Iterator[Step]:
    """What one rate for some groups can come to, from the whole net on, each at the fraction from which it does.

    ``units``: by group what the units that stay are multiples of; ``least``: no fewer stay.
    """
    wide = {index: coupling.groups[index].channels for index in units}
    edges = {_edge(gone, channels) for channels in set(wide.values()) for gone in range(1, channels)}
    last: dict[int, int] | None = None
    for rate in (0.0, *sorted(edges)):
        kept = {
            index: rates.keep_count(
                channels, rate, round_to=units[index], least=-(-least // units[index]) * units[index]
            )
            for index, channels in wide.items()
        }
        kept = {index: count for index, count in kept.items() if count < wide[index]}
        if kept != last:
            yield Step(rate, kept)
        last = kept


def _edge(gone: int, channels: int) -> float:
    """The fraction at which so many of the channels go, as `rates.keep_count` rounds."""
    rate = gone / channels
    while int(rate * channels) < gone:
        rate = nextafter(rate, 1.0)
    return rate


def first_fast(count: int, wanted: float, speeds: Speeds) -> tuple[int | None, dict[int, Speed]]:
    """Of ``count`` nets that lose ever more, the first that is at least ``wanted`` times faster, None where none is.

    Also says how fast the nets are that were looked at. Between two nets of the grid only those are looked at that may
    be fast enough: where one of both ends is so, or nearly. The first of them and its neighbours, and those in front
    that are only just too slow, are measured again before they decide.
    """
    known: dict[int, Speed] = {}

    def look(places: Iterable[int], runs: int) -> None:
        row = sorted(places)
        known.update(zip(row, speeds(row, runs), strict=True))

    look({0, count - 1, *_between(0, count - 1)}, _FEW)
    while True:
        chosen = next((one for one in sorted(known) if known[one].ratio >= wanted), None)
        end = count - 1 if chosen is None else chosen
        gaps = [
            (low, high)
            for low, high in pairwise(sorted(known))
            if high <= end and high - low > 1 and _SLACK * max(known[low].ratio, known[high].ratio) >= wanted
        ]
        if gaps:
            look({one for low, high in gaps for one in _between(low, high)}, _FEW)
            continue
        doubtful = [
            one
            for one in deciding(known, chosen, wanted, count)
            if one not in known or known[one].runs < _MANY
        ]
        if not doubtful:
            return chosen, known
        look(doubtful, _MANY)


def deciding(known: Mapping[int, Speed], chosen: int | None, wanted: float, count: int) -> set[int]:
    """The nets on which a choice depends: itself, or the fastest where there is none; its neighbours; close ones before."""
    place = chosen if chosen is not None else max(known, key=lambda one: known[one].ratio)
    close = {
        one
        for one, speed in known.items()
        if one < place and speed.ratio * (1 + _APART * speed.noise) >= wanted
    }
    return {one for one in (place - 1, place, place + 1) if 0 <= one < count} | close


def _between(low: int, high: int) -> set[int]:
    """Places strictly between two others: all, or a grid of them."""
    number = min(_GRID, high - low - 1)
    return {low + round(one * (high - low) / (number + 1)) for one in range(1, number + 1)}
