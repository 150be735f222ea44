"""What can be done with a layer, priced in measured seconds; and what a plan must say of where they were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite, lcm
from typing import cast

from caffe_proto.runtime import Engine

from .latency import DOUBTFUL, Latency
from .latency_table import Chain, conditions
from .plan import Predicted, Timed
from .ranks import Option
from .schemes import ALL_SCHEMES, Scheme
from .schemes.asymmetric3d import ASYMMETRIC_3D, merges
from .schemes.spatial import SPATIAL, SPATIAL_HV
from .targets import Target

Ranks = tuple[int, ...]
Loss = Callable[[Target, Scheme, Ranks], float]


class Prices:
    """Seconds of every chain that is worth considering for the layers of one net.

    Only ranks that fill the kernels' blocks are offered, see `Latency.options`; of asymmetric 3-D the pairs of a
    grid that is twice as fine as powers of two. A chain that is faster by less than the times scatter counts as
    none: it would give up accuracy for nothing.

    Of a layer's two spatial orders, H first is timed at three ranks beside V first. Only where it is faster there by
    more than the times scatter are all its ranks measured and offered: the two keep nearly the same energy.
    """

    def __init__(self, latency: Latency, round_to: int = 1, same_ranks: bool = False) -> None:
        self.latency = latency
        self._round_to, self._same_ranks = round_to, same_ranks
        self._found: dict[tuple[str, str], list[tuple[Ranks, float]]] = {}

    def measure(
        self,
        targets: Sequence[Target],
        schemes: Mapping[str, Sequence[Scheme]],
        step: Callable[[], None] = lambda: None,
    ) -> None:
        """Measure what is not known yet, and price all of it. ``schemes``: by layer name."""
        single = {name: [scheme for scheme in some if scheme.n_ranks == 1] for name, some in schemes.items()}
        both = [target for target in targets if {SPATIAL, SPATIAL_HV} <= set(single[target.name])]
        names = {target.name for target in both}
        first = {
            name: [scheme for scheme in some if scheme is not SPATIAL_HV or name not in names]
            for name, some in single.items()
        }
        self.latency.measure(targets, first, step)
        slower = self._slower_turned(both, step)
        double = {target.name: ASYMMETRIC_3D in schemes[target.name] for target in targets}
        if any(double.values()):
            chains = {
                target.name: [
                    ASYMMETRIC_3D.chain(target.shape, target.geometry, ranks) for ranks in self._pairs(target)
                ]
                for target in targets
                if double[target.name]
            }
            self.latency.measure_chains(targets, chains, step)
        for target in targets:
            self.latency.seconds(target)
            for scheme in schemes[target.name]:
                offered = scheme is not SPATIAL_HV or target.name not in slower
                priced = self._priced(target, scheme) if offered else ()
                self._found[target.name, scheme.name] = list(priced)

    def settle(self, chosen: Sequence[tuple[Target, Option]]) -> bool:
        """Measure anew what was chosen of `options`, see `Latency.settle`, and price it so; whether anything was.

        ``chosen``: all layers that were priced. Then the choice is to be made again.
        """
        chains = {
            target.name: ALL_SCHEMES[name].chain(target.shape, target.geometry, ranks)
            for target, option in chosen
            if option.key is not None
            for name, ranks in (cast(tuple[str, Ranks], option.key),)
        }
        if not self.latency.settle([target for target, _ in chosen], chains):
            return False
        for target, _ in chosen:
            for (name, scheme), found in self._found.items():
                if name == target.name and found:
                    self._found[name, scheme] = list(self._priced(target, ALL_SCHEMES[scheme]))
        return True

    def _slower_turned(self, targets: Sequence[Target], step: Callable[[], None]) -> set[str]:
        """The layers where H first is no faster than V first at a few ranks; of the others all its ranks are measured."""
        pairs = {target.name: self._both_orders(target) for target in targets}
        self.latency.measure_chains(
            targets, {name: [chain for pair in some for chain in pair] for name, some in pairs.items()}, step
        )
        slower = {
            target.name
            for target in targets
            if (some := pairs[target.name])
            and not self.latency.faster(target, [turned for _, turned in some], [usual for usual, _ in some])
        }
        faster = [target for target in targets if target.name not in slower]
        self.latency.measure(faster, {target.name: [SPATIAL_HV] for target in faster}, step)
        return slower

    def _both_orders(self, target: Target) -> list[tuple[Chain, Chain]]:
        """Chains of V first and of H first at a quarter, a half and three quarters of the ranks that both may have."""
        usual, turned = (self.latency.ranks(target, scheme) for scheme in (SPATIAL, SPATIAL_HV))
        common = [rank for rank in usual if rank in turned]
        chosen = sorted({common[len(common) * k // 4] for k in (1, 2, 3)}) if common else []
        return [
            (
                SPATIAL.chain(target.shape, target.geometry, (rank,)),
                SPATIAL_HV.chain(target.shape, target.geometry, (rank,)),
            )
            for rank in chosen
        ]

    def _priced(self, target: Target, scheme: Scheme) -> Iterator[tuple[Ranks, float]]:
        if scheme.n_ranks == 1:
            for rank, seconds in self.latency.options(target, scheme, self._round_to):
                yield (rank,), seconds
            return
        for ranks in self._pairs(target):
            yield ranks, self.latency.seconds(target, scheme.chain(target.shape, target.geometry, ranks))

    def _pairs(self, target: Target) -> Iterator[Ranks]:
        """Ranks (d'', d') of asymmetric 3-D; a full d' stands for V and H without P."""
        unit = lcm(self.latency.unit(target), self._round_to)
        out, group = target.shape[0], target.geometry.group
        grid = [n * unit for n in _steps(max(out, SPATIAL.max_rank(target.shape, group)) // unit)]
        inner = [
            rank
            for rank in grid
            if rank <= SPATIAL.max_rank(target.shape, group)
            and target.chain_cost(SPATIAL, rank) < target.macs
        ]
        for first in inner:
            for second in [*(rank for rank in grid if rank < out), out]:
                if self._same_ranks and first != second:
                    continue
                whole = merges(target.shape, group, (first, second))
                if whole == (second == out) and target.chain_cost(ASYMMETRIC_3D, first, second) < target.macs:
                    yield first, second

    def options(self, target: Target, schemes: Sequence[Scheme], loss: Loss) -> list[Option]:
        """Leaving a layer alone, and every chain that is faster: cost in seconds, ``key = (scheme, ranks)``.

        Where the loss is infinite a chain is not to be had.
        """
        most = self.dense(target) * (1 - self.latency.noise)
        found = [
            Option(seconds, loss(target, scheme, ranks), (scheme.name, ranks))
            for scheme in schemes
            for ranks, seconds in self._found[target.name, scheme.name]
            if seconds < most
        ]
        return [Option(self.dense(target), 0.0, None), *(one for one in found if isfinite(one.loss))]

    def dense(self, target: Target) -> float:
        """Seconds of a layer as it is."""
        return self.latency.seconds(target)

    def seconds(self, target: Target, scheme: Scheme, ranks: Ranks) -> float:
        """Seconds of a chain that `options` offered."""
        return next(seconds for known, seconds in self._found[target.name, scheme.name] if known == ranks)

    def milliseconds(self, target: Target, seconds: float) -> tuple[float, float]:
        """Of a layer as it is, and of a chain, as a plan writes them."""
        return _ms(self.dense(target)), _ms(seconds)

    def none_faster(self, target: Target) -> str:
        """Why a layer has no option but to be left alone."""
        found = [one for (name, _), some in self._found.items() if name == target.name for one in some]
        if any(seconds < self.dense(target) for _, seconds in found):
            return f"no chain is faster here by more than the times scatter ({self.latency.noise:.0%})"
        return "no chain is faster here"

    def predicted(self, chosen: Mapping[str, float], targets: Sequence[Target], gap: float) -> Predicted:
        """The net's time before and after, where the layers ``chosen`` take so many seconds."""
        costs = [(target, chosen[target.name]) for target in targets if target.name in chosen]
        before, after = self.latency.net, self.latency.predict(costs)
        timed = record((before, after), self.latency.noise, self.latency.engine)
        return Predicted(timed.ms, timed.noise, timed.measured_on, float(f"{max(gap, 0.0):.3g}"))


def record(seconds: tuple[float, float], noise: float, engine: Engine) -> Timed:
    """What a plan says of a net's times before and after, measured here."""
    before, after = seconds
    return Timed((_ms(before), _ms(after)), float(f"{noise:.2g}"), conditions(engine))


def _ms(seconds: float) -> float:
    """As plans write a time: milliseconds of five digits."""
    return float(f"{1e3 * seconds:.5g}")


def foreign(predicted: Timed, engine: Engine | None = None) -> tuple[str, ...]:
    """Why a plan's times may not hold here: measured elsewhere, or in noise. ``engine``: None where it is not known."""
    found = []
    here, there = conditions(engine or Engine()), predicted.measured_on
    keys = here if engine is not None else ("processor", "onnxruntime")
    other = [key for key in keys if there.get(key) != here[key]]
    if other:
        theirs, mine = (", ".join(f"{key} {one.get(key)}" for key in other) for one in (there, here))
        found.append(
            f"the plan's times were measured elsewhere ({theirs}; here {mine}): "
            "another choice may be faster here, make the plan anew"
        )
    if predicted.noise >= DOUBTFUL:
        found.append(
            f"the plan's times scatter by {predicted.noise:.0%}: something else ran on the machine; "
            "what is close in time could not be told apart"
        )
    return tuple(found)


def _steps(top: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to ``top``."""
    found = {n for k in range(top.bit_length() + 1) for n in (2**k, 3 * 2**k)}
    return sorted(n for n in found if n <= top)
