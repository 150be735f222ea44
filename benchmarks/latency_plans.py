"""Ranks chosen by MACs against ranks chosen by measured time, at the same loss: which net is faster by the clock.

Run: ``python benchmarks/latency_plans.py [--data FOLDER] [--threads 1 2] [--speedups 2 3] [--runs 30] [--table FILE]``.
For a plan by MACs (any rank, and multiples of 16) its loss, the sum of -log of the energies retained, is the
budget within which ranks by measured time take the least. The three nets and the original run in turn; of the
ratios of times the quartiles are printed. VGG-16 and AlexNet have random weights and energies that fall as a power
of the component, see `POWERS`; other nets their own, from the folder of `real_nets`.

Then AlexNet's conv3 to conv5 at the ranks of Wen et al. (ICCV 2017), and the published mixed low-rank net, by layer
beside what the authors measured with Caffe.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.real_nets import NETS
from caffe_proto.latency import Subject, measure
from caffe_proto.model import load
from caffe_proto.onnx_export import to_onnx
from caffe_proto.runtime import Engine
from lra import ranks as policy
from lra.decomposition import StepShape
from lra.latency import Latency
from lra.latency_plan import Prices
from lra.options import retained, singles
from lra.ranks import Option
from lra.schemes import ALL_SCHEMES, Scheme
from lra.targets import Found, Spectra, Target, find

MODELS = Path(__file__).resolve().parents[1] / "models"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
POWERS = {"pca": 1.1, "spatial": 1.4}
"""Energy of the k-th component of a layer without trained weights: ``k ** -power``, by scheme."""
SYNTHETIC = ("vgg_16", "alexnet")
REAL = ("resnet_20", "cifar10_full", "squeezenet")
ROUND_TO = 16
Ranks = tuple[int, ...]
Choice = dict[str, tuple[Target, tuple[StepShape, ...]]]

ICCV_RANKS = {"conv3": 124, "conv4": 106, "conv5": 130}  # 129 is the sum of two groups' ranks, 65 and 64
ICCV = {"conv3": (2.65, 2.45), "conv4": (3.26, 2.76), "conv5": (1.85, 1.64)}
MIXED_RANKS = {"conv1": 8, "conv2": 40, "conv3": 120, "conv4": 120, "conv5": 110}
MIXED = {"conv1": 2.61, "conv2": 6.06, "conv3": 2.48, "conv4": 2.20, "conv5": 1.58}
MIXED_TOTAL = 2.69
"""(fewer MACs, times faster on their CPU) of Tables 4 and 6; those of Table 6 belong to ranks that are not stated."""


def schemes(target: Target) -> list[Scheme]:
    """The pairs to choose from: a 1 x 1 kernel has nothing to separate."""
    return [ALL_SCHEMES[name] for name in (("pca",) if target.shape[2:] == (1, 1) else ("pca", "spatial"))]


def power_energy(target: Target, scheme: Scheme, ranks: Ranks) -> float:
    """Energy retained where energies fall as a power."""
    group = target.geometry.group
    energies = np.arange(1, scheme.max_rank(target.shape, group) // group + 1) ** -POWERS[scheme.name]
    return float(energies[: prod(ranks) // group].sum() / energies.sum())


def by_macs(
    targets: Sequence[Target],
    loss: Callable[[Target, Scheme, Ranks], float],
    speedup: float,
    fixed: float,
    round_to: int,
) -> list[Option]:
    """Least loss within the MACs."""
    options = []
    for target in targets:
        made = [Option(float(target.macs), 0.0, None)]
        for scheme in schemes(target):
            group = target.geometry.group
            most = scheme.max_rank(target.shape, group) // group
            losses = np.array([loss(target, scheme, (group * k,)) for k in range(1, most + 1)])
            made += singles(target, scheme, round_to, losses)
        options.append(made)
    total = fixed + sum(target.macs for target in targets)
    return policy.allocate(options, total / speedup - fixed)


def by_time(
    targets: Sequence[Target], prices: Prices, loss: Callable[[Target, Scheme, Ranks], float], most: float
) -> list[Option]:
    """Least time within a loss: the same search with both exchanged."""
    options = [
        [Option(one.loss, one.cost, one.key) for one in prices.options(target, schemes(target), loss)]
        for target in targets
    ]
    return [Option(one.loss, one.cost, one.key) for one in policy.allocate(options, most)]


def chains(targets: Sequence[Target], chosen: Sequence[Option]) -> Choice:
    """What stands where, for `Drawing.variant`."""
    found: Choice = {}
    for target, option in zip(targets, chosen, strict=True):
        if option.key is not None:
            name, ranks = cast(tuple[str, Ranks], option.key)
            found[target.name] = (target, ALL_SCHEMES[name].chain(target.shape, target.geometry, ranks))
    return found


def fewer(found: Found, chosen: Choice) -> float:
    """How many times fewer MACs the convolutions take."""
    before = sum(target.macs for target in found.targets.values() if not target.dense)
    saved = sum(target.macs - target.cost(*chain) for target, chain in chosen.values())
    return before / (before - saved)


def faster(latency: Latency, choices: Sequence[Choice], runs: int) -> list[np.ndarray]:
    """How many times faster each is than the first, run by run."""
    subjects = [
        Subject(str(i), to_onnx(latency.drawing.variant(choice)).SerializeToString())
        for i, choice in enumerate(choices)
    ]
    first, *others = measure(subjects, latency.engine, runs=runs, warmup=3)
    return [np.divide(first.runs, one.runs) for one in others]


def spread(ratios: np.ndarray) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{middle:5.2f} x ({low:.2f} to {high:.2f})"


def compare(
    name: str, found: Found, real: bool, engine: Engine, speedups: Sequence[float], runs: int, table: Path
) -> None:
    """Print the rows of one net."""
    targets = [target for target in found.targets.values() if not target.dense]
    spectra = Spectra(found)

    def loss(target: Target, scheme: Scheme, ranks: Ranks) -> float:
        kept = retained(target, scheme, spectra, ranks) if real else power_energy(target, scheme, ranks)
        return float(policy.loss(kept))

    latency = Latency(found, engine, table)
    prices = Prices(latency)
    prices.measure(targets, {target.name: schemes(target) for target in targets})
    for speedup in speedups:
        for round_to in (1, ROUND_TO):
            try:
                first = by_macs(targets, loss, speedup, 0.0, round_to)
            except policy.Infeasible:
                print(f"{name:14} {speedup:g} x by MACs, multiples of {round_to}: not to be had")
                continue
            second = by_time(targets, prices, loss, sum(one.loss for one in first) * (1 + 1e-9))
            both = [chains(targets, chosen) for chosen in (first, second)]
            macs, time = faster(latency, [{}, *both], runs)
            print(
                f"{name:14} {engine.threads} threads, loss {sum(one.loss for one in first):6.2f}: "
                f"by MACs, multiples of {round_to:<2} {fewer(found, both[0]):5.2f} x fewer {spread(macs)}; "
                f"by time {fewer(found, both[1]):5.2f} x fewer {spread(time)}; "
                f"time against MACs {spread(time / macs)}"
            )
    print(f"{name:14} noise {latency.noise:.1%}" + (f"; {latency.doubt}" if latency.doubt else ""))


def published(engine: Engine, runs: int, table: Path) -> None:
    """Print AlexNet's layers at published ranks beside the published figures."""
    found = find(load(MODELS / "alexnet" / "deploy.prototxt"))
    latency = Latency(found, engine, table)
    rows = {
        "ICCV 2017, Table 4": {name: ("pca", rank) for name, rank in ICCV_RANKS.items()},
        "mixed, Table 6": {
            name: ("spatial" if name in ("conv1", "conv2") else "pca", rank)
            for name, rank in MIXED_RANKS.items()
        },
    }
    for title, wanted in rows.items():
        chosen: Choice = {}
        for name, (scheme, rank) in wanted.items():
            target = found.targets[name]
            chosen[name] = (target, ALL_SCHEMES[scheme].chain(target.shape, target.geometry, (rank,)))
        targets = [target for target, _ in chosen.values()]
        latency.measure_chains(targets, {name: [chain] for name, (_, chain) in chosen.items()})
        before = after = 0.0
        for name, (target, chain) in chosen.items():
            old, new = latency.seconds(target), latency.seconds(target, chain)
            before, after = before + old, after + new
            theirs = ICCV[name][1] if title.startswith("ICCV") else MIXED[name]
            print(
                f"alexnet {title} {name} rank {wanted[name][1]:3}: {target.macs / target.cost(*chain):.2f} x fewer MACs, "
                f"{old / new:.2f} x faster, published {theirs:.2f} x"
            )
        (ratios,) = faster(latency, [{}, chosen], runs)
        total = f", published {MIXED_TOTAL} x" if title.startswith("mixed") else ""
        print(
            f"alexnet {title} these layers {before / after:.2f} x faster{total}; the whole net {spread(ratios)}"
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=(*SYNTHETIC, *REAL))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 3.0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = asked.table or Path(folder) / "latencies.json"
        for threads in asked.threads:
            engine = Engine(threads)
            for name in asked.nets:
                if name in SYNTHETIC:
                    found = find(load(MODELS / name / "deploy.prototxt"))
                elif (asked.data / "models" / NETS[name].net).is_file():
                    paths = (asked.data / "models" / one for one in (NETS[name].net, NETS[name].weights))
                    found = find(load(*paths))
                else:
                    print(f"{name}: not in {asked.data}")
                    continue
                compare(name, found, name in REAL, engine, asked.speedups, asked.runs, table)
            published(engine, asked.runs, table)
    if hasattr(os, "getloadavg"):
        print(f"load of this machine over the last minute: {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
