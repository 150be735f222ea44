"""Ranks chosen by MACs against ranks chosen by measured time, at the same loss: which net is faster by the clock.

Run: ``python benchmarks/latency_plans.py [--data FOLDER] [--threads 1 2] [--speedups 2 4] [--schemes auto pca ...]
[--runs 30] [--table FILE] [--only plans published moonshots]``.
For a plan by MACs (any rank, and multiples of 16) its loss, the sum of -log of the energies retained, is the
budget within which ranks by measured time take the least; every row chooses from its own schemes, for both. The
three nets and the original run in turn; of the ratios of times the quartiles are printed. VGG-16 and AlexNet have
random weights and the energies of ``spectra.toml``; other nets their own, from the folder of `real_nets`. Of
asymmetric 3-D the second split is counted like the channel-wise one.

Then AlexNet's conv3 to conv5 at the ranks of Wen et al. (ICCV 2017), and the published mixed low-rank net, by layer
beside what the authors measured with Caffe.

Then VGG-16: how many fewer MACs a plan has that is 4 times faster as measured, chosen by loss and chosen to keep
the most MACs; and the whole net in 8 bits, with made-up ranges, against the original in 32.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plans
from benchmarks.plans import Choice, Losses
from benchmarks.real_nets import NETS
from caffe_proto.latency import measure, narrowed
from caffe_proto.model import load
from caffe_proto.runtime import Engine
from lra import ranks as policy
from lra.latency import Latency
from lra.latency_plan import Prices
from lra.ranks import Option
from lra.schemes import ALL_SCHEMES
from lra.targets import Found, Spectra, find

MODELS = Path(__file__).resolve().parents[1] / "models"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SYNTHETIC = ("vgg_16", "alexnet")
REAL = ("resnet_20", "cifar10_full", "squeezenet")
ROUND_TO = 16
PARTS = ("plans", "published", "moonshots")
MOONSHOT = "vgg_16"
FASTER, MOST_FEWER, INT8_FASTER = 4.0, 4.3, 8.0

ICCV_RANKS = {"conv3": 124, "conv4": 106, "conv5": 130}  # 129 is the sum of two groups' ranks, 65 and 64
ICCV = {"conv3": (2.65, 2.45), "conv4": (3.26, 2.76), "conv5": (1.85, 1.64)}
MIXED_RANKS = {"conv1": 8, "conv2": 40, "conv3": 120, "conv4": 120, "conv5": 110}
MIXED = {"conv1": 2.61, "conv2": 6.06, "conv3": 2.48, "conv4": 2.20, "conv5": 1.58}
MIXED_TOTAL = 2.69
"""(fewer MACs, times faster on their CPU) of Tables 4 and 6; those of Table 6 belong to ranks that are not stated."""


def fastest_within(loss: float, options: list[list[Option]]) -> list[Option]:
    """What takes the least time at no more loss."""
    return policy.allocate(plans.turned(options), loss * (1 + 1e-9))


def compare(
    name: str, found: Found, losses: Losses, engine: Engine, speedups: Sequence[float], rows: Sequence[str],
    runs: int, table: Path,
) -> None:  # fmt: skip
    """Print the rows of one net."""
    latency = Latency(found, engine, table)
    for row in rows:
        schemes = plans.named(row)
        targets = [target for target in plans.convolutions(found) if plans.suited(target, schemes)]
        prices = Prices(latency)
        prices.measure(targets, {target.name: plans.offered(target, schemes) for target in targets})
        for speedup in speedups:
            for round_to in (1, ROUND_TO):
                try:
                    first = plans.by_macs(targets, schemes, losses, speedup, round_to)
                except policy.Infeasible:
                    print(f"{name:12} {row:13} {speedup:g} x by MACs, multiples of {round_to}: not to be had")
                    continue
                choose = partial(fastest_within, plans.total(first))
                second = plans.settled(targets, prices, schemes, losses, choose)
                both = [plans.chains(targets, chosen) for chosen in (first, second)]
                macs, time = plans.whole(latency, [{}, *both], runs)
                alone = plans.layers_alone(latency, targets, both, runs)
                print(
                    f"{name:12} {row:13} {engine.threads} threads, loss {plans.total(first):6.2f}: "
                    f"by MACs, multiples of {round_to:<2} {plans.fewer(targets, both[0]):5.2f} x fewer "
                    f"{plans.spread(macs)}; by time {plans.fewer(targets, both[1]):5.2f} x fewer "
                    f"{plans.spread(time)}; time against MACs {plans.spread(time / macs)}, "
                    f"these layers alone {plans.spread(alone[1] / alone[0])}",
                    flush=True,
                )
    print(
        f"{name:12} noise {latency.noise:.1%}" + (f"; {latency.doubt}" if latency.doubt else ""), flush=True
    )


def moonshots(engine: Engine, runs: int, table: Path) -> None:
    """Print what 4 times faster as measured takes of VGG-16's convolutions, and the whole net in 8 bits."""
    found = find(load(MODELS / MOONSHOT / "deploy.prototxt"))
    targets, schemes, losses = plans.convolutions(found), plans.named("auto"), Losses(None, MOONSHOT)
    latency = Latency(found, engine, table)
    prices = Prices(latency)
    prices.measure(targets, {target.name: plans.offered(target, schemes) for target in targets})
    options = plans.time_options(targets, prices, schemes, losses)
    budget = sum(map(prices.dense, targets)) / FASTER
    by_loss = policy.allocate(options, budget)
    kept = [
        [Option(one.cost, target.macs - plans.macs(target, one), one.key) for one in layer]
        for target, layer in zip(targets, options, strict=True)
    ]
    by_macs = policy.allocate(kept, budget)
    choices = [plans.chains(targets, chosen) for chosen in (by_loss, by_macs)]
    alone = plans.layers_alone(latency, targets, choices, runs)
    for title, choice, ratios in zip(("least loss", "most MACs"), choices, alone, strict=True):
        print(
            f"{MOONSHOT} {engine.threads} threads, convolutions {FASTER:g} x faster by the table, {title}: "
            f"{plans.fewer(targets, choice):.2f} x fewer MACs (target: at most {MOST_FEWER}), {plans.spread(ratios)}",
            flush=True,
        )
    del alone
    nets = [
        plans.subject(latency, title, choice) for title, choice in (("original", {}), ("plan", choices[0]))
    ]
    named = [nets[0], narrowed(nets[0], "int8"), nets[1], narrowed(nets[1], "int8")]
    first, *others = measure(named, engine, runs=runs, warmup=3)
    for one in others:
        print(
            f"{MOONSHOT} {engine.threads} threads, whole net, {one.name} against the original in fp32: "
            f"{plans.spread(np.divide(first.runs, one.runs))}"
            + (f" (target: {INT8_FASTER:g})" if one is others[-1] else ""),
            flush=True,
        )


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
        (ratios,) = plans.whole(latency, [{}, chosen], runs)
        total = f", published {MIXED_TOTAL} x" if title.startswith("mixed") else ""
        print(
            f"alexnet {title} these layers {before / after:.2f} x faster{total}; the whole net {plans.spread(ratios)}"
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=(*SYNTHETIC, *REAL))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--schemes", nargs="+", choices=plans.SETS, default=list(plans.SETS))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = asked.table or Path(folder) / "latencies.json"
        for threads in asked.threads:
            engine = Engine(threads)
            for name in asked.nets if "plans" in asked.only else ():
                if name in SYNTHETIC:
                    found = find(load(MODELS / name / "deploy.prototxt"))
                    losses = Losses(None, name)
                elif (asked.data / "models" / NETS[name].net).is_file():
                    paths = (asked.data / "models" / one for one in (NETS[name].net, NETS[name].weights))
                    found = find(load(*paths))
                    losses = Losses(Spectra(found))
                else:
                    print(f"{name}: not in {asked.data}")
                    continue
                compare(name, found, losses, engine, asked.speedups, asked.schemes, asked.runs, table)
            if "published" in asked.only:
                published(engine, asked.runs, table)
            if "moonshots" in asked.only:
                moonshots(engine, asked.runs, table)
    if hasattr(os, "getloadavg"):
        print(f"load of this machine over the last minute: {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
