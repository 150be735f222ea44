"""Measured time as the cost of a layer: what any chain of convolutions takes in its place, in onnxruntime.

Fewer multiplications are not less time: kernels work on blocks of channels, and ranks that fill none cost more
than the next multiple. Measured once for a machine and kept in a table; a plan adds up what it finds there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path

import numpy as np

from caffe_proto.errors import FileError, UsageError
from caffe_proto.latency import Subject
from caffe_proto.latency import measure as time_side_by_side
from caffe_proto.onnx_export import Export, to_onnx
from caffe_proto.runtime import Engine

from .decomposition import StepShape
from .latency_probe import Choice, Drawing, Times, as_is, kernels, side_by_side, whole
from .latency_table import Chain, Measured, Table, default_path, describe, grid, interpolate, machine
from .schemes.base import Scheme
from .targets import Found, Target

_BESIDE = 4  # nets that run in turn beside the net as it is
_ROUNDS = 5
_PASSES, _MORE = 2, 2  # over everything; over what is still noisy
_QUIET = 0.03  # noise with which a time is taken
_AGAIN = 24  # rounds of what a plan has chosen, more than any other chain is measured for
_APART = 2  # standard errors by which sums of times must differ
DOUBTFUL = 0.1  # noise of one time in ten at which ranks cannot be told apart
_NO_BLOCK = 8  # ranks apart where onnxruntime's kernels have no blocks
Pair = tuple[str, Chain]  # a place, and what stands there
Job = tuple[Pair, Chain]  # a layer as it is, and what to measure in its place


class Latency:
    """Seconds of the layers of one net, and of what may stand in their places.

    ``engine``: the threads and the provider that the net shall run with. ``path``: the table's file, by default
    one in the user's cache, whose folder is made. What is asked for must have been measured: see `measure`.

    Raises UsageError where times cannot be measured by layer, FileError where the table is none or its
    folder is not there, NetError where the net cannot be run.
    """

    def __init__(self, found: Found, engine: Engine | None = None, path: str | Path | None = None) -> None:
        self.engine = engine or Engine()
        if self.engine.provider != "cpu":
            raise UsageError(
                f"times by layer cannot be measured on {self.engine.provider}", hint="use the provider cpu"
            )
        if path is not None and not Path(path).parent.is_dir():
            raise FileError(
                f"there is no folder '{Path(path).parent}' for this table of latencies", path=path,
                hint="make the folder, or name another table",
            )  # fmt: skip
        self.drawing = Drawing.of(found)
        self.table = Table.load(machine(self.engine), Path(path) if path is not None else default_path())
        self.measuring = False  # whether anything was
        self._used: dict[Pair, Measured] = {}

    @property
    def net(self) -> float:
        """Seconds of the whole net as it is: the sum of its kernels."""
        return self.table.nets[self.drawing.fingerprint].seconds

    @property
    def noise(self) -> float:
        """Relative standard error that nine in ten of the times asked for stay below."""
        return float(np.quantile([one.noise for one in self._used.values()], 0.9)) if self._used else 0.0

    @property
    def block(self) -> int:
        """Channels that fill a block of the kernels."""
        if not self.table.block:
            self.table.block = kernels(self.engine).block
        return self.table.block if self.table.block > 1 else _NO_BLOCK

    @property
    def doubt(self) -> str | None:
        """Why the times are not to be trusted, None where they are."""
        return self.doubt_of(self.noise)

    def doubt_of(self, noise: float) -> str | None:
        """The same of times of such noise."""
        if noise < DOUBTFUL:
            return None
        return (
            f"the times scatter by {noise:.0%}: something else runs on this machine, and what is close "
            f"in time cannot be told apart; measure again when it is quiet (remove {self.table.path})"
        )

    def seconds(self, target: Target, chain: Sequence[StepShape] = ()) -> float:
        """Seconds of a measured chain in a layer's place, for the net's own batch; of the layer as it is by default.

        Raises KeyError where it was not measured.
        """
        return self._measured(target, tuple(chain) or as_is(target)).seconds

    def faster(self, target: Target, chains: Iterable[Chain], others: Iterable[Chain]) -> bool:
        """Whether measured chains together take less time than others by more than both sums scatter."""
        some, rest = ([self._measured(target, chain) for chain in these] for these in (chains, others))
        scatter = sum((one.noise * one.seconds) ** 2 for one in (*some, *rest)) ** 0.5
        return sum(one.seconds for one in some) + _APART * scatter < sum(one.seconds for one in rest)

    def _measured(self, target: Target, chain: Chain) -> Measured:
        place = self.drawing.place(target)
        found = self.table.get(place, chain)
        if found is None:
            raise KeyError(f"{place}: {describe(chain)}")
        self._used[place, chain] = found
        return found

    def options(self, target: Target, scheme: Scheme, round_to: int = 1) -> list[tuple[int, float]]:
        """Ranks worth considering and the seconds of their chains, interpolated between measured ones.

        Ranks are multiples of the kernels' block in every group: those between cost as much as the next multiple
        or, where they are no multiples of 4, several times as much. ``round_to``: of it as well.
        """
        unit, top = self._blocks(target, scheme)
        points = {
            rank // unit: self.seconds(target, _chain(target, scheme, rank))
            for rank in self.ranks(target, scheme)
        }
        step, place = lcm(unit, round_to), self.drawing.place(target)
        return [
            (
                rank,
                self.seconds(target, chain)
                if self._settled(place, chain)
                else interpolate(points, rank // unit),
            )
            for rank in range(step, top * unit + 1, step)
            for chain in (_chain(target, scheme, rank),)
        ]

    def ranks(self, target: Target, scheme: Scheme) -> list[int]:
        """The ranks whose chains `measure` times; `options` interpolates between them."""
        unit, top = self._blocks(target, scheme)
        return [n * unit for n in grid(top)]

    def predict(self, costs: Iterable[tuple[Target, float]]) -> float:
        """Seconds of the whole net where these layers take so long; the others stay as they are."""
        return self.net + sum(seconds - self.seconds(target) for target, seconds in costs)

    def measure(
        self,
        targets: Sequence[Target],
        schemes: Mapping[str, Sequence[Scheme]],
        step: Callable[[], None] = lambda: None,
    ) -> None:
        """Measure what `options` and `predict` need and the table does not hold, and write it there.

        ``schemes``: by layer name. ``step`` is called after every few nets.
        """
        wanted = {
            target.name: [
                _chain(target, scheme, rank)
                for scheme in schemes[target.name]
                for rank in self.ranks(target, scheme)
            ]
            for target in targets
        }
        self.measure_chains(targets, wanted, step)

    def measure_chains(
        self,
        targets: Sequence[Target],
        chains: Mapping[str, Iterable[Chain]],
        step: Callable[[], None] = lambda: None,
    ) -> None:
        """Measure layers as they are and, by layer name, chains in their places, where the table does not hold them."""
        sites = self._sites(targets)
        missing = {
            (sites[target.name], chain): None
            for target in targets
            for chain in (as_is(target), *chains.get(target.name, ()))
            if self.table.get(sites[target.name][0], chain) is None
        }
        if not missing and self.drawing.fingerprint in self.table.nets:
            return
        self.table.write()  # where it cannot be written, this is said before the work
        self.measuring = True
        log, overhead = _Log(sites, self._known(sites)), kernels(self.engine).overhead
        whole_known = self.drawing.fingerprint in self.table.nets
        left = list(missing)
        for passed in range(_PASSES + _MORE):
            nets = _nets(left, targets, sites)
            for start in range(0, len(nets), _BESIDE):
                group = nets[start : start + _BESIDE]
                log.add(group, *side_by_side(self.drawing, group, self.engine, overhead, _ROUNDS))
                step()
            if passed < _PASSES and not whole_known:
                log.add([], whole(self.drawing, self.engine, overhead, _ROUNDS), [])
                step()
            measured = log.measured()
            if passed + 1 >= _PASSES:
                left = [(site, chain) for site, chain in missing if measured[site[0], chain].noise > _QUIET]
        for (place, chain), found in measured.items():
            if self.table.get(place, chain) is None:
                self.table.put(place, chain, found)
        if not whole_known:
            self.table.nets[self.drawing.fingerprint] = log.whole()
        self.table.write()

    def settle(self, targets: Sequence[Target], chosen: Mapping[str, Chain]) -> bool:
        """Measure anew what a plan has chosen, by layer name, as far as it was not; whether anything was.

        Of many noisy times the least is less than it seems, so those that were chosen for it no longer count.
        Where the times are quiet there is nothing to settle.
        """
        if self.noise <= _QUIET:
            return False
        sites = self._sites(targets)
        left = [
            pair
            for pair in dict.fromkeys((sites[name], chain) for name, chain in chosen.items())
            if not self._settled(pair[0][0], pair[1])
        ]
        if not left:
            return False
        log, overhead = _Log(sites, self._known(sites)), kernels(self.engine).overhead
        for net in _nets(left, targets, sites):
            log.add([net], *side_by_side(self.drawing, [net], self.engine, overhead, _AGAIN))
        measured = log.measured()
        for (place, _), chain in left:
            self.table.put(place, chain, measured[place, chain])
        self.table.write()
        return True

    def _settled(self, place: str, chain: Chain) -> bool:
        """Whether a chain was measured as often as what plans choose."""
        found = self.table.get(place, chain)
        return found is not None and found.runs >= _AGAIN

    def _sites(self, targets: Sequence[Target]) -> dict[str, Pair]:
        """By layer name its place, and the layer as it is."""
        return {target.name: (self.drawing.place(target), as_is(target)) for target in targets}

    def _known(self, sites: Mapping[str, Pair]) -> dict[Pair, float]:
        """Seconds of layers as they are that the table holds."""
        return {site: found.seconds for site in sites.values() if (found := self.table.get(*site))}

    def trial(self, chosen: Choice, runs: int = 20) -> tuple[float, float]:
        """Seconds of the whole net by the clock, as it is and with chains in the places of layers."""
        before, (after,) = self.beside([self.drawing.variant(chosen)], runs)
        return before.seconds, after.seconds

    def beside(self, others: Sequence[Export], runs: int) -> tuple[Measured, list[Measured]]:
        """Seconds of the whole net by the clock, as it is, and of other nets that run in turn with it.

        Theirs are the first times the median of the ratios, so that a noisy moment hits all; so is their noise.
        """
        subjects = [
            Subject(f"net {i}", to_onnx(export).SerializeToString())
            for i, export in enumerate((self.drawing.variant({}), *others))
        ]
        first, *rest = time_side_by_side(subjects, self.engine, runs=runs, warmup=2)
        before = Measured.of(np.divide(first.runs, 1e3).tolist())
        ratios = [np.divide(one.runs, first.runs) for one in rest]
        return before, [Measured.of((before.seconds * ratio).tolist()) for ratio in ratios]

    def unit(self, target: Target) -> int:
        """Ranks that fill a block of the kernels in every group."""
        return target.geometry.group * self.block

    def _blocks(self, target: Target, scheme: Scheme) -> tuple[int, int]:
        """Ranks a block in every group, and the blocks up to which a chain has fewer MACs than the layer."""
        unit = self.unit(target)
        most = scheme.max_rank(target.shape, target.geometry.group) // unit
        # MACs grow with the rank: the first chain that has as many ends the range
        top = next(
            (n for n in range(1, most + 1) if target.chain_cost(scheme, n * unit) >= target.macs), most + 1
        )
        return unit, top - 1


def _chain(target: Target, scheme: Scheme, rank: int) -> Chain:
    return scheme.structure(target.shape, target.geometry, rank)


def _nets(jobs: Sequence[Job], targets: Sequence[Target], sites: Mapping[str, Pair]) -> list[Choice]:
    """As few nets as hold every job once; layers at one site share theirs."""
    hosts: dict[Pair, list[Target]] = {}
    for target in targets:
        hosts.setdefault(sites[target.name], []).append(target)
    nets: list[dict[str, tuple[Target, Chain]]] = []
    for site, layers in hosts.items():
        for i, chain in enumerate(chain for place, chain in jobs if place == site):
            number, layer = divmod(i, len(layers))
            if number == len(nets):
                nets.append({})
            nets[number][layers[layer].name] = (layers[layer], chain)
    return list(nets)


@dataclass
class _Log:
    """Rounds of nets run in turn: of each, the times of the net as it is, and those of the chains.

    ``sites``: by layer name its place and the layer as it is; ``known``: seconds of layers as they are that hold
    already.
    """

    sites: Mapping[str, Pair]
    known: Mapping[Pair, float]
    rounds: list[tuple[Times, list[tuple[Pair, float]]]] = field(default_factory=list)

    def add(self, nets: Sequence[Choice], plain: Sequence[Times], others: Sequence[Sequence[Times]]) -> None:
        """Note what `side_by_side` gave."""
        for i, run in enumerate(plain):
            times = [(site, run[name]) for name, site in self.sites.items() if name in run]
            for net, runs in zip(nets, others, strict=True):
                times += [((self.sites[name][0], chain), runs[i][name]) for name, (_, chain) in net.items()]
            self.rounds.append((run, times))

    def middle(self) -> dict[Pair, float]:
        """Seconds of the layers as they are: known, else the median of all rounds."""
        found: dict[Pair, list[float]] = {}
        for run, _ in self.rounds:
            for name, site in self.sites.items():
                if name in run:
                    found.setdefault(site, []).append(run[name])
        return {site: float(np.median(times)) for site, times in found.items()} | dict(self.known)

    def drift(self, run: Times, middle: Mapping[Pair, float]) -> float:
        """What the net as it is was slower by in one run: the median over its layers."""
        return float(
            np.median([run[name] / middle[site] for name, site in self.sites.items() if name in run])
        )

    def measured(self) -> dict[Pair, Measured]:
        """Every chain's time, each round's drift taken out."""
        middle = self.middle()
        found: dict[Pair, list[float]] = {}
        for run, times in self.rounds:
            drift = self.drift(run, middle)
            for pair, seconds in times:
                found.setdefault(pair, []).append(seconds / drift)
        return {pair: Measured.of(samples) for pair, samples in found.items()}

    def whole(self) -> Measured:
        """The whole net's time: the layers as they are, and the medians of what else it runs."""
        middle = self.middle()
        rest: dict[str, list[float]] = {}
        for run, _ in self.rounds:
            drift = self.drift(run, middle)
            for name, seconds in run.items():
                if name not in self.sites:
                    rest.setdefault(name, []).append(seconds / drift)
        parts = [Measured.of(samples) for samples in rest.values()]
        measured = self.measured()
        parts += [replace(measured[site], seconds=middle[site]) for site in self.sites.values()]
        total = sum(part.seconds for part in parts)
        noise = sum((part.noise * part.seconds) ** 2 for part in parts) ** 0.5 / total
        return Measured(total, noise, len(self.rounds))
