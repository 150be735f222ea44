"""Ranks chosen by MACs or by measured time, at energies of a table or of real weights, and what they take side by side."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from caffe_proto.latency import Subject, measure
from caffe_proto.onnx_export import to_onnx
from lra import ranks as policy
from lra.decomposition import StepShape
from lra.latency import Latency
from lra.latency_plan import Prices
from lra.latency_probe import as_is, kernels, side_by_side
from lra.options import pairs, singles
from lra.planner import SETTLINGS
from lra.ranks import Option
from lra.schemes import ALL_SCHEMES, Scheme
from lra.schemes.asymmetric3d import ASYMMETRIC_3D
from lra.schemes.spatial import SPATIAL, SPATIAL_HV
from lra.targets import Found, Spectra, Target

SPECTRA = Path(__file__).resolve().parent / "spectra.toml"
PCA = ALL_SCHEMES["pca"]
Array = NDArray[np.float64]
Ranks = tuple[int, ...]
Chain = tuple[StepShape, ...]
Choice = dict[str, tuple[Target, Chain]]


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(SPECTRA.read_text(encoding="utf-8"))


def power(net: str, layer: str, scheme: Scheme) -> float:
    """How fast the energies of a layer without trained weights fall, see ``spectra.toml``."""
    table = _table()
    found: float = table.get(net, {}).get(layer, table["default"])
    return found + (0.0 if scheme is PCA else table["spatial"])


@dataclass(frozen=True)
class Losses:
    """-log of the energy retained: of a net's weights, or where ``net`` is named of the table's powers."""

    spectra: Spectra | None
    net: str = ""

    def curve(self, target: Target, scheme: Scheme) -> Array:
        """At 1, 2, ... components a group, of a scheme of one rank."""
        if self.spectra is not None:
            return policy.loss(self.spectra.get(target, scheme).retained_curve())
        group = target.geometry.group
        most = scheme.max_rank(target.shape, group) // group
        energies = np.arange(1, most + 1) ** -power(self.net, target.name, scheme)
        return policy.loss(energies.cumsum() / energies.sum())

    def outer(self, target: Target) -> Array:
        """Of the second split of asymmetric 3-D, at 1, 2, ... outputs a group; at all of them nothing is lost."""
        outputs = target.shape[0] // target.geometry.group
        curve = self.curve(target, PCA)
        return np.concatenate([curve, np.zeros(max(0, outputs - len(curve)))])[:outputs]

    def __call__(self, target: Target, scheme: Scheme, ranks: Ranks) -> float:
        """Of a chain; of asymmetric 3-D the sum of both splits'."""
        parts = [rank // target.geometry.group for rank in ranks]
        if scheme is ASYMMETRIC_3D:
            inner = self.curve(target, SPATIAL)[parts[0] - 1]
            return float(inner + self.outer(target)[parts[1] - 1])
        return float(self.curve(target, scheme)[parts[0] - 1])


def suited(target: Target, schemes: Sequence[Scheme]) -> list[Scheme]:
    """Those of the schemes that a layer can have: a 1 x 1 kernel has nothing to separate."""
    flat = target.shape[2:] == (1, 1)
    return [scheme for scheme in schemes if scheme is PCA or not flat]


def offered(target: Target, schemes: Sequence[Scheme]) -> list[Scheme]:
    """What a plan by time chooses from: the same, spatial pairs in both orders."""
    found = suited(target, schemes)
    turned = SPATIAL in found and SPATIAL_HV not in found and min(target.shape[2:]) > 1
    return [*found, *([SPATIAL_HV] if turned else [])]


def mac_options(target: Target, schemes: Sequence[Scheme], losses: Losses, round_to: int = 1) -> list[Option]:
    """A layer as it is and every chain that has fewer MACs: cost in MACs, ``key = (scheme, ranks)``."""
    made = [Option(float(target.macs), 0.0, None)]
    for scheme in suited(target, schemes):
        if scheme is ASYMMETRIC_3D:
            inner, outer = losses.curve(target, SPATIAL), losses.outer(target)
            made += pairs(target, round_to, lambda a, b, i=inner, o=outer: i[a - 1] + o[b - 1], False)  # type: ignore[misc]
        else:
            made += singles(target, scheme, round_to, losses.curve(target, scheme))
    return made


def by_macs(
    targets: Sequence[Target], schemes: Sequence[Scheme], losses: Losses, speedup: float, round_to: int = 1
) -> list[Option]:
    """Least loss within a share of these layers' MACs. Raises Infeasible."""
    options = [mac_options(target, schemes, losses, round_to) for target in targets]
    return policy.allocate(options, sum(target.macs for target in targets) / speedup)


def time_options(
    targets: Sequence[Target], prices: Prices, schemes: Sequence[Scheme], losses: Losses
) -> list[list[Option]]:
    """The same with costs in seconds."""
    return [prices.options(target, offered(target, schemes), losses) for target in targets]


def settled(
    targets: Sequence[Target], prices: Prices, schemes: Sequence[Scheme], losses: Losses,
    choose: Callable[[list[list[Option]]], list[Option]],
) -> list[Option]:  # fmt: skip
    """What is chosen by time, as `decompose` does: noisy times that decide are measured anew, and it is chosen again."""
    for left in reversed(range(SETTLINGS + 1)):
        chosen = choose(time_options(targets, prices, schemes, losses))
        if not left or not prices.settle(list(zip(targets, chosen, strict=True))):
            break
    return chosen


def turned(options: Sequence[Sequence[Option]]) -> list[list[Option]]:
    """Cost and loss exchanged: what allocates the least loss within a cost then finds the least cost within a loss."""
    return [[Option(one.loss, one.cost, one.key) for one in layer] for layer in options]


def chains(targets: Sequence[Target], chosen: Sequence[Option]) -> Choice:
    """What stands where; layers left alone are missing."""
    found: Choice = {}
    for target, option in zip(targets, chosen, strict=True):
        if option.key is not None:
            name, ranks = cast(tuple[str, Ranks], option.key)
            found[target.name] = (target, ALL_SCHEMES[name].chain(target.shape, target.geometry, ranks))
    return found


def macs(target: Target, option: Option) -> float:
    """MACs of a layer treated so."""
    if option.key is None:
        return float(target.macs)
    name, ranks = cast(tuple[str, Ranks], option.key)
    return float(target.chain_cost(ALL_SCHEMES[name], *ranks))


def fewer(targets: Sequence[Target], chosen: Choice) -> float:
    """How many times fewer MACs these layers take."""
    before = sum(target.macs for target in targets)
    saved = sum(target.macs - target.cost(*chain) for target, chain in chosen.values())
    return before / (before - saved)


def convolutions(found: Found) -> list[Target]:
    """The layers that are looked at."""
    return [target for target in found.targets.values() if not target.dense]


def subject(latency: Latency, name: str, choice: Choice) -> Subject:
    """The whole net with chains in their places."""
    return Subject(name, to_onnx(latency.drawing.variant(choice)).SerializeToString())


def whole(latency: Latency, choices: Sequence[Choice], runs: int) -> list[Array]:
    """How many times faster than the first the whole nets are by the clock, run by run, in turn."""
    subjects = [subject(latency, str(i), choice) for i, choice in enumerate(choices)]
    first, *others = measure(subjects, latency.engine, runs=runs, warmup=3)
    return [np.divide(first.runs, one.runs) for one in others]


def layers_alone(
    latency: Latency, targets: Sequence[Target], choices: Sequence[Choice], runs: int
) -> list[Array]:
    """How many times faster than as they are these layers' kernels are together, run by run, in turn."""
    everywhere = [
        {target.name: choice.get(target.name, (target, as_is(target))) for target in targets}
        for choice in choices
    ]
    overhead = kernels(latency.engine).overhead
    plain, others = side_by_side(latency.drawing, everywhere, latency.engine, overhead, runs)
    names = [target.name for target in targets]
    before = np.array([sum(run[name] for name in names) for run in plain])
    return [before / np.array([sum(run[name] for name in names) for run in runs_of]) for runs_of in others]


def spread(ratios: Array) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{middle:5.2f} x ({low:.2f} to {high:.2f})"


def listed(chosen: Sequence[Option], targets: Sequence[Target]) -> str:
    """Ranks by layer, as a plan would say them."""
    words = []
    for target, option in zip(targets, chosen, strict=True):
        if option.key is not None:
            name, ranks = cast(tuple[str, Ranks], option.key)
            words.append(f"{target.name} {name} {'+'.join(map(str, ranks))}")
    return ", ".join(words)


SETS = {
    "auto": ("pca", "spatial"),
    "pca": ("pca",),
    "spatial": ("spatial",),
    "asymmetric-3d": ("asymmetric-3d",),
}
"""Which schemes a row chooses from: energies are compared within one row."""


def named(row: str) -> list[Scheme]:
    """The schemes of a row."""
    return [ALL_SCHEMES[name] for name in SETS[row]]


def total(chosen: Sequence[Option]) -> float:
    """The loss of a choice."""
    return float(sum(one.loss for one in chosen))
