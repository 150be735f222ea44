"""How much of fewer MACs is less time: plans by measured time against the best of an exhaustive search.

Run: ``python benchmarks/efficiency.py --table FILE --rows FILE [--nets vgg_16 ...] [--threads 1 2] [--speedups 2 4]``.
Random weights, energies of ``spectra.toml``. Efficiency is measured over arithmetic speed-up of the convolutions:
the sum of their kernels' times, in their places.

Of every place in a net, equal ones once, the chain of every rank that is a multiple of ``--step`` in each group, and
of a few odd ones, is measured for every scheme. From these and the layers as they are:

- by time: the plan that loses the least energy within a time, at the time where it has 1 / R of the MACs (found by
  halving; the saving it has is printed). It chooses as ``decompose --cost latency`` does, by its own few times, those
  that decide measured anew where they are noisy.
- best: of all measured chains the ones that take the least time and save no more MACs than that plan (allocated
  with a bound: no choice is faster than the best by more than the gap).
- by MACs, multiples of 16: the plan that loses the least energy within 1 / R of the MACs.

The three then run in turn, beside the net as it is, and are measured anew: what was the fastest of thousands by
luck is not again. Target: by time reaches 0.9 of the best's efficiency.

All times go to the table as they come, all results to the rows: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plans
from benchmarks.plans import Chain, Losses, Ranks
from caffe_proto.model import load
from caffe_proto.runtime import Engine
from lra import ranks as policy
from lra.latency import Latency
from lra.latency_plan import Prices
from lra.latency_table import machine
from lra.ranks import Option
from lra.schemes import ALL_SCHEMES, Scheme
from lra.targets import Target, find

MODELS = Path(__file__).resolve().parents[1] / "models"
NETS = ("vgg_16", "alexnet", "resnet_18", "googlenet", "squeezenet_v1.1")
ROUND_TO = 16
TARGET = 0.9
_ODD = 3  # ranks a layer and scheme that are no multiples
_AT_ONCE = 12  # chains a layer between two writes of the table
_HALVINGS = 40
_NEAR = 0.005  # relative distance of MACs with which halving ends


@dataclass(frozen=True)
class Row:
    """One plan: how many times fewer MACs, faster by the table and as measured again (quartiles), and its ranks.

    ``of_best``: its efficiency over the best's, quartiles; ``gap``: what the best may be above its bound.
    """

    machine: str
    net: str
    threads: int
    speedup: float
    plan: str
    fewer: float
    by_table: float
    faster: tuple[float, float, float]
    of_best: tuple[float, float, float]
    gap: float
    measured: int
    load: float
    ranks: str

    @property
    def key(self) -> tuple[str, str, int, float]:
        """What a row is not measured twice for."""
        return self.machine, self.net, self.threads, self.speedup

    def line(self) -> str:
        """As it is printed."""
        low, middle, high = self.faster
        worst, ratio, best = self.of_best
        return (
            f"{self.net:16} {self.threads} threads, {self.speedup:g} x, {self.plan:9} {self.fewer:5.2f} x fewer MACs, "
            f"{middle:5.2f} x faster ({low:.2f} to {high:.2f}; table {self.by_table:.2f}), "
            f"efficiency {middle / self.fewer:5.1%}, of the best's {ratio:.3f} ({worst:.3f} to {best:.3f})"
        )


def grid(target: Target, scheme: Scheme, step: int) -> list[Ranks]:
    """Ranks to measure: multiples of ``step`` in every group whose chains have fewer MACs, and a few odd ones."""
    group = target.geometry.group
    most = scheme.max_rank(target.shape, group) // group
    cheaper = [k for k in range(1, most + 1) if target.chain_cost(scheme, k * group) < target.macs]
    even = [k for k in cheaper if k % step == 0]
    places = (len(even) * i // (_ODD + 1) for i in range(1, _ODD + 1))
    odd = [even[place] - 1 for place in places] if step > 1 and even else []
    return [(k * group,) for k in sorted({*even, *odd})]


def search(
    latency: Latency, targets: Sequence[Target], schemes: Sequence[Scheme], step: int
) -> list[list[Option]]:
    """Measure all of it: by layer every chain, cost in MACs, loss in seconds."""
    ranks = {
        target.name: [(s, one) for s in plans.suited(target, schemes) for one in grid(target, s, step)]
        for target in targets
    }
    started, parts = time.perf_counter(), max(map(len, ranks.values()))
    for start in range(0, parts, _AT_ONCE):
        wanted: dict[str, list[Chain]] = {
            target.name: [
                scheme.chain(target.shape, target.geometry, one)
                for scheme, one in ranks[target.name][start : start + _AT_ONCE]
            ]
            for target in targets
        }
        latency.measure_chains(targets, wanted)
        done = min(start + _AT_ONCE, parts)
        print(
            f"  {done} of {parts} chains, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
        )
    return [
        [
            Option(float(target.macs), latency.seconds(target), None),
            *(
                Option(
                    float(target.chain_cost(scheme, *one)),
                    latency.seconds(target, scheme.chain(target.shape, target.geometry, one)),
                    (scheme.name, one),
                )
                for scheme, one in ranks[target.name]
            ),
        ]
        for target in targets
    ]


def fastest(options: Sequence[Sequence[Option]], macs: float) -> tuple[list[Option], float]:
    """The least time of a choice that keeps at least so many MACs, and how far above its bound it may be."""
    most = [max(one.cost for one in layer) for layer in options]
    saved = [
        [Option(top - one.cost, one.loss, (one.cost, one.key)) for one in layer]
        for top, layer in zip(most, options, strict=True)
    ]
    budget = sum(most) - macs
    chosen = policy.allocate(saved, budget)
    seconds = plans.total(chosen)
    gap = seconds / policy.lower_bound(saved, budget) - 1
    kept = [cast(tuple[float, Hashable], one.key) for one in chosen]
    return [Option(cost, one.loss, key) for one, (cost, key) in zip(chosen, kept, strict=True)], gap


def by_time(targets: Sequence[Target], options: Sequence[Sequence[Option]], speedup: float) -> list[Option]:
    """Of the plans of least loss within a time the one whose MACs are nearest to ``1 / speedup``."""
    wanted = sum(target.macs for target in targets) / speedup
    low = sum(min(one.cost for one in layer) for layer in options)
    high = sum(layer[0].cost for layer in options)

    def off(chosen: Sequence[Option]) -> float:
        return sum(map(plans.macs, targets, chosen)) / wanted - 1

    best = policy.allocate(options, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        chosen = policy.allocate(options, middle)
        best = min(best, chosen, key=lambda one: abs(off(one)))
        if abs(off(best)) < _NEAR:
            break
        low, high = (low, middle) if off(chosen) > 0 else (middle, high)
    return best


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def study(
    name: str,
    engine: Engine,
    speedups: Sequence[float],
    names: Sequence[str],
    step: int,
    runs: int,
    table: Path,
) -> Iterator[list[Row]]:
    """The rows of one net, those of a speed-up together."""
    found = find(load(MODELS / name / "deploy.prototxt"))
    schemes, losses = [ALL_SCHEMES[one] for one in names], Losses(None, name)
    targets = plans.convolutions(found)
    latency = Latency(found, engine, table)
    prices = Prices(latency)
    started = time.perf_counter()
    prices.measure(targets, {target.name: plans.offered(target, schemes) for target in targets})
    print(f"{name}: plans' table in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    timed = plans.time_options(targets, prices, schemes, losses)
    everything = search(latency, targets, schemes, step)
    for target, layer, more in zip(
        targets, everything, timed, strict=True
    ):  # pairs turned, where that is faster
        known = {one.key for one in layer}
        layer += [Option(plans.macs(target, one), one.cost, one.key) for one in more if one.key not in known]
    dense = sum(layer[0].loss for layer in everything)
    for speedup in speedups:
        choose = partial(by_time, targets, speedup=speedup)
        planned = plans.settled(targets, prices, schemes, losses, choose)
        best, gap = fastest(everything, sum(map(plans.macs, targets, planned)))
        chosen = {"by time": planned, "best": best}
        try:
            chosen["by MACs"] = plans.by_macs(targets, schemes, losses, speedup, ROUND_TO)
        except policy.Infeasible:
            print(f"{name}: no multiples of {ROUND_TO} give {speedup:g} x", file=sys.stderr)
        choices = [plans.chains(targets, one) for one in chosen.values()]
        latency.measure_chains(targets, {
            target.name: [choice[target.name][1] for choice in choices if target.name in choice] for target in targets
        })  # fmt: skip
        alone = plans.layers_alone(latency, targets, choices, runs)
        fewer = [plans.fewer(targets, choice) for choice in choices]
        efficiencies = [ratios / less for ratios, less in zip(alone, fewer, strict=True)]
        rows = []
        for i, (plan, options) in enumerate(chosen.items()):
            after = sum(
                latency.seconds(target, choices[i][target.name][1] if target.name in choices[i] else ())
                for target in targets
            )
            rows.append(Row(
                machine(engine), name, engine.threads, speedup, plan, fewer[i], dense / after,
                quartiles(alone[i]), quartiles(efficiencies[i] / efficiencies[1]), gap,
                sum(map(len, everything)), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
                plans.listed(options, targets),
            ))  # fmt: skip
        yield rows
    if latency.doubt:
        print(f"{name}: {latency.doubt}")


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Row(**{**row, "faster": tuple(row["faster"]), "of_best": tuple(row["of_best"])}) for row in rows]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--schemes", nargs="+", default=["pca", "spatial"])
    parser.add_argument("--step", type=int, default=4)
    parser.add_argument("--runs", type=int, default=30)
    asked = parser.parse_args()
    for threads in asked.threads:
        engine = Engine(threads)
        for name in asked.nets:
            done = {row.key for row in read(asked.rows)}
            missing = [one for one in asked.speedups if (machine(engine), name, threads, one) not in done]
            if not missing:
                continue
            for rows in study(name, engine, missing, asked.schemes, asked.step, asked.runs, asked.table):
                with asked.rows.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    asked_for = [row for row in read(asked.rows) if row.net in asked.nets and row.threads in asked.threads]
    for row in asked_for:
        print(row.line())
    ratios = [row.of_best[1] for row in asked_for if row.plan == "by time"]
    if ratios:
        print(f"by time reaches at least {min(ratios):.3f} of the best's efficiency (target: {TARGET})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
