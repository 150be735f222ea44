"""Deciding: a net, weights and a target in, a plan out. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, log10
from typing import Any, cast

from caffe_proto.costs import cost as count
from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.net import nearest
from caffe_proto.shape_inference import InputShapes

from . import ranks as policy
from .plan import LayerPlan, Plan
from .ranks import Infeasible, Option
from .schemes import ALL_SCHEMES
from .schemes.base import Scheme, Spectrum
from .styles import STYLES
from .targets import Found, Spectra, Target, find

AUTO = ("pca", "spatial")
RankConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """Which layers may be touched."""

    fc: bool = False
    except_layers: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def targets(self, found: Found, kept: dict[str, str]) -> list[Target]:
        """The eligible layers in net order; for convolutions that cannot be touched, ``kept`` gets the reason."""
        known = [*found.targets, *found.refused]
        for name in (*self.except_layers, *(self.only or ())):
            _check_name(name, known, found)
        chosen = []
        for name, target in found.targets.items():
            if name in self.except_layers:
                kept[name] = "excepted"
            elif self.only is not None and name not in self.only:
                kept[name] = "not among --only"
            elif target.dense and not self.fc and self.only is None:
                kept[name] = "fully connected (--fc is off)"
            else:
                chosen.append(target)
        kept.update({name: reason for name, reason in found.refused.items() if name not in kept})
        return chosen


def _check_name(name: str, known: Collection[str], found: Found) -> None:
    if name not in known:
        layers = {node.name: node.layer.type for node in found.shaped.graph.nodes}
        if name in layers:
            raise UsageError(
                f'layer "{name}" is of type {layers[name]}',
                hint="only Convolution and InnerProduct can be decomposed",
            )
        raise UsageError(
            f'there is no layer "{name}"', path=found.model.net.path, hint=nearest(name, list(known))
        )


def make_plan(
    model: Model,
    *,
    scheme: str = "auto",
    speedup: float | None = None,
    energy: float | None = None,
    ranks: Sequence[int] | None = None,
    rank_config: RankConfig | None = None,
    scope: str = "all",
    fc: bool = False,
    except_layers: Sequence[str] = (),
    only: Sequence[str] | None = None,
    round_to: int = 1,
    style: str = "default",
    even_if_slower: bool = False,
    images: Any = None,
    input_shapes: InputShapes | None = None,
    found: Found | None = None,
    spectra: Spectra | None = None,
) -> Plan:
    """Choose scheme and rank for every layer that gets cheaper by it.

    Exactly one amount: ``speedup`` = MACs before / after, of the whole net or (``scope="conv"``) of its
    convolutions; ``energy``: in every layer and group ``|W - W'|² <= (1 - energy) |W|²`` (kmeans: within-
    cluster over total sum of squares); ``ranks``, one for each eligible layer in net order, total over its
    groups; ``rank_config``: layer name -> rank or ``{"scheme", "rank"}``.

    ``speedup`` maximises the product over layers of the energy retained (Zhang et al. 2016, eq. 13, 14, on
    weight energies) over all schemes allowed. A layer that would not get cheaper is kept, with the reason,
    unless ``even_if_slower``. ``round_to``: ranks are multiples of it.

    ``images`` (a Calibration, an array (N, C, H, W) as the net wants it, or arrays by blob): the plan asks that
    the second layer of every chain is fitted to responses; ranks are chosen from the weights all the same.

    Raises UsageError, PlanError or WeightsError, each naming layer and figure.
    """
    _check_request(scheme, style, scope, round_to, speedup, energy, ranks, rank_config)
    if scheme == "response" and images is None:
        raise UsageError("the response scheme fits responses", hint="give images (--images)")
    if images is not None and (model.weights is None or scheme == "kmeans"):
        raise UsageError(
            "responses cannot be fitted " + ("by kmeans" if model.weights else "without weights")
        )
    found = found or find(model, input_shapes)
    spectra = spectra or Spectra(found)
    kept: dict[str, str] = {}
    job = _Job(found, spectra, scheme, round_to, even_if_slower, kept)
    if rank_config is not None:
        fc = fc or any(name in found.targets and found.targets[name].dense for name in rank_config)
        for name in rank_config:
            _check_name(name, [*found.targets, *found.refused], found)
    targets = Choice(fc, tuple(except_layers), tuple(only) if only is not None else None).targets(found, kept)
    if not targets:
        raise UsageError("no layer is left to decompose", path=model.net.path, hint=_why(kept))
    if scheme == "response":
        targets = _sampled(found, spectra, targets, images, kept)
    target: dict[str, Any]
    if speedup is not None:
        layers, target = job.by_speedup(targets, speedup, scope), {"speedup": speedup, "scope": scope}
    elif energy is not None:
        layers, target = job.by_energy(targets, energy), {"energy": energy}
    elif ranks is not None:
        layers, target = job.by_ranks(targets, ranks), {"ranks": list(ranks)}
    else:
        layers, target = job.by_config(targets, rank_config or {}), {"rank_config": True}
    target |= {"scheme": scheme, "style": style}
    if images is not None:
        from .calibration import Calibration  # brings onnxruntime, which the weights alone do not need

        target["fit"] = Calibration.of(found.shaped.graph, images).record()
    if round_to > 1:
        target["round_to"] = round_to
    order = [name for name in found.targets if name in layers]
    net, weights = model.fingerprint
    return Plan({name: layers[name] for name in order}, kept, target, net, weights)


def _sampled(
    found: Found, spectra: Spectra, targets: list[Target], images: Any, kept: dict[str, str]
) -> list[Target]:
    """The targets whose responses can be sampled, with the energies of those; the others are kept."""
    from .calibration import Calibration  # brings onnxruntime, which the weights alone do not need
    from .fitting import can_fit, sample_spectra

    chosen = [target for target in targets if can_fit(found, target)]
    for target in targets:
        if target not in chosen:
            kept[target.name] = "its responses cannot be sampled"
    if not chosen:
        raise UsageError("no layer is left to decompose", path=found.model.net.path, hint=_why(kept))
    sample_spectra(found, spectra, chosen, Calibration.of(found.shaped.graph, images))
    return chosen


def _why(kept: Mapping[str, str]) -> str | None:
    return "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3]) or None


def _check_request(
    scheme: str, style: str, scope: str, round_to: int,
    speedup: float | None, energy: float | None, ranks: object, rank_config: object,
) -> None:  # fmt: skip
    for value, known, what in (
        (scheme, ("auto", *ALL_SCHEMES), "scheme"),
        (style, STYLES, "style"),
        (scope, ("all", "conv"), "scope"),
    ):
        if value not in known:
            raise UsageError(f'there is no {what} "{value}"', hint="known: " + ", ".join(known))
    given = [amount for amount in (speedup, energy, ranks, rank_config) if amount is not None]
    if len(given) != 1:
        raise UsageError("give exactly one of speedup, energy, ranks and rank_config")
    if speedup is not None and not 1 < speedup < float("inf"):
        raise UsageError(f"a speed-up of {speedup:g} is none; it must be a number above 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy:g} must lie above 0 and at most at 1")
    if round_to < 1:
        raise UsageError(f"cannot round ranks to multiples of {round_to}")
    if ranks is not None and scheme == "auto":
        raise UsageError("ranks need a named scheme", hint="add --scheme pca|svd|kmeans|spatial")


@dataclass
class _Job:
    """One request over the eligible layers of one net; ``kept`` collects reasons."""

    found: Found
    spectra: Spectra
    scheme: str
    round_to: int
    even_if_slower: bool
    kept: dict[str, str]

    def schemes(self, target: Target) -> list[Scheme]:
        """The schemes to consider for a layer: a 1 x 1 kernel has nothing to separate."""
        names = AUTO if self.scheme == "auto" else (self.scheme,)
        if target.shape[2:] == (1, 1) and self.scheme == "auto":
            names = ("pca",)
        return [ALL_SCHEMES[name] for name in names]

    def by_speedup(self, targets: list[Target], speedup: float, scope: str) -> dict[str, LayerPlan]:
        cost = count(self.found.shaped)
        total = cost.conv_macs if scope == "conv" else cost.macs
        if scope == "conv":
            dense = [target.name for target in targets if target.dense]
            self.kept.update(dict.fromkeys(dense, "fully connected (--scope is conv)"))
            targets = [target for target in targets if not target.dense]
        if not total or any(target.in_hw is None for target in targets):
            raise self._uncounted()
        eligible = sum(target.macs for target in targets)
        fixed = total - eligible
        budget = float(Fraction(total) / Fraction(speedup)) - fixed
        tied = _tied(targets)
        options = [_alike([self.options(target) for target in group]) for group in tied]
        try:
            chosen = policy.allocate(options, budget)
        except Infeasible as error:
            most = _below(total / (fixed + error.smallest))
            where = "whole net" if scope == "all" else "convolutions"
            raise UsageError(
                f"a speed-up of {speedup:g} of the {where} cannot be reached: at the smallest ranks it is {most:.3g}",
                hint=f"the layers to decompose hold {eligible / cost.macs:.0%} of the MACs; "
                "ask for less, or allow more layers (--fc, fewer --except)",
            ) from None
        return self._planned(
            [(target, option) for group, option in zip(tied, chosen, strict=True) for target in group]
        )

    def _uncounted(self) -> UsageError:
        """Why MACs cannot be counted: the first layer whose shape is missing."""
        cause = next(iter(self.found.shaped.unknown.values()), None)
        reason = f'layer "{cause.layer}": {cause.message}' if cause is not None else "no layer computes any"
        return UsageError(
            f"a speed-up cannot be counted: {reason}",
            path=self.found.model.net.path,
            line=cause.line if cause is not None else None,
            hint="give every input's shape with --input-shape, or --ranks or --energy instead of --speedup",
        )

    def options(self, target: Target) -> list[Option]:
        """Every way to treat a layer that is cheaper than leaving it alone, and leaving it alone."""
        made = [Option(float(target.macs), 0.0, None)]
        for scheme in self.schemes(target):
            spectrum = self.spectra.get(target, scheme)
            losses = policy.loss(spectrum.retained_curve())
            group = target.geometry.group
            for rank in policy.candidates(spectrum.max_rank, group, self.round_to):
                cost = target.chain_cost(scheme, rank)
                if cost >= target.macs:
                    break
                made.append(Option(float(cost), float(losses[rank // group - 1]), (scheme.name, rank)))
        return made

    def _planned(self, chosen: list[tuple[Target, Option]]) -> dict[str, LayerPlan]:
        layers: dict[str, LayerPlan] = {}
        for target, option in chosen:
            if option.key is None:
                self.kept[target.name] = self._never_cheaper(target) or "the speed-up is reached without it"
            else:
                name, rank = cast(tuple[str, int], option.key)
                layers[target.name] = self.entry(target, ALL_SCHEMES[name], rank)
        return layers

    def _never_cheaper(self, target: Target) -> str | None:
        """The reason where no rank that is allowed makes a layer cheaper, else None."""
        for scheme in self.schemes(target):
            ranks = policy.candidates(
                scheme.max_rank(target.shape, target.geometry.group), target.geometry.group, self.round_to
            )
            if ranks and target.chain_cost(scheme, ranks[0]) < target.macs:
                return None
        multiple = f" that is a multiple of {self.round_to}" if self.round_to > 1 else ""
        return f"no rank{multiple} makes it cheaper"

    def by_energy(self, targets: list[Target], energy: float) -> dict[str, LayerPlan]:
        layers: dict[str, LayerPlan] = {}
        for target in targets:
            best: tuple[int, Scheme, int] | None = None
            for scheme in self.schemes(target):
                rank = self._rounded(target, scheme, self.spectra.get(target, scheme).rank_for(energy))
                cost = target.chain_cost(scheme, rank)
                if best is None or cost < best[0]:
                    best = (cost, scheme, rank)
            assert best is not None
            self._take(layers, target, best[1], best[2])
        return layers

    def _rounded(self, target: Target, scheme: Scheme, rank: int) -> int:
        """The next rank of the grid at or above, where it is still cheaper than the dense layer; else the rank."""
        grid = policy.candidates(
            scheme.max_rank(target.shape, target.geometry.group), target.geometry.group, self.round_to
        )
        above = next((one for one in grid if one >= rank), rank)
        return above if target.chain_cost(scheme, above) < target.macs else rank

    def by_ranks(self, targets: list[Target], ranks: Sequence[int]) -> dict[str, LayerPlan]:
        if len(ranks) != len(targets):
            names = ", ".join(target.name for target in targets)
            raise UsageError(
                f"{len(ranks)} ranks for {len(targets)} layers",
                hint=f"one each is needed, in this order: {names}",
            )
        return self._explicit(
            [(target, ALL_SCHEMES[self.scheme], rank) for target, rank in zip(targets, ranks, strict=True)]
        )

    def by_config(self, targets: list[Target], config: RankConfig) -> dict[str, LayerPlan]:
        wanted = []
        for target in targets:
            if target.name not in config:
                self.kept[target.name] = "not in the rank config"
                continue
            entry = config[target.name]
            entry = entry if isinstance(entry, LayerPlan) else LayerPlan.from_dict(target.name, entry)
            name = entry.scheme or ("pca" if self.scheme == "auto" else self.scheme)
            if len(entry.ranks) != 1:
                raise PlanError(f"{len(entry.ranks)} ranks, {name} takes one", layer=target.name)
            wanted.append((target, ALL_SCHEMES[name], entry.ranks[0]))
        for name in config:
            if name in self.found.refused:
                raise UsageError(f"cannot be decomposed: {self.found.refused[name]}", layer=name)
        return self._explicit(wanted)

    def _explicit(self, wanted: list[tuple[Target, Scheme, int]]) -> dict[str, LayerPlan]:
        layers: dict[str, LayerPlan] = {}
        for target, scheme, rank in wanted:
            try:
                scheme.structure(target.shape, target.geometry, rank)
            except ValueError as error:
                raise UsageError(str(error), path=self.found.model.net.path, layer=target.name) from None
            self._take(layers, target, scheme, rank)
        return layers

    def _take(self, layers: dict[str, LayerPlan], target: Target, scheme: Scheme, rank: int) -> None:
        """Plan a layer, or keep it with the reason where the chain is not cheaper."""
        cost = target.chain_cost(scheme, rank)
        if cost >= target.macs and not self.even_if_slower:
            places = target.macs // max(1, _positions(target))
            self.kept[target.name] = (
                f"rank {rank} ({scheme.name}) needs {cost / max(1, _positions(target)):,.0f} MACs a position, the layer {places:,}"
            )
            return
        layers[target.name] = self.entry(target, scheme, rank)

    def entry(self, target: Target, scheme: Scheme, rank: int) -> LayerPlan:
        """What the plan says: scheme, rank, MACs where shapes are known, sqrt(1 - energy) where weights are."""
        macs = (target.macs, target.chain_cost(scheme, rank)) if target.in_hw is not None else None
        return LayerPlan(scheme.name, (rank,), macs, self._error(target, scheme, rank))

    def _error(self, target: Target, scheme: Scheme, rank: int) -> float | None:
        if target.index not in self.found.blobs:
            return None
        spectrum: Spectrum = self.spectra.get(target, scheme)
        return float(f"{max(0.0, 1 - spectrum.retained(rank)) ** 0.5:.6g}")


def _tied(targets: list[Target]) -> list[list[Target]]:
    """Layers that share one weight together, all others alone; in net order of the first."""
    groups: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        key = ("shared", target.shared) if target.shared else ("own", target.name)
        groups.setdefault(key, []).append(target)
    return list(groups.values())


def _alike(layers: list[list[Option]]) -> list[Option]:
    """The options of several layers that are all treated alike."""
    found = [{option.key: option for option in options} for options in layers]
    common = [key for key in found[0] if all(key in options for options in found)]
    groups = [[options[key] for options in found] for key in common]
    return [Option(sum(o.cost for o in same), sum(o.loss for o in same), same[0].key) for same in groups]


def _below(ratio: float) -> float:
    """A ratio rounded down to three digits, so that it can be asked for."""
    unit = 10.0 ** (floor(log10(ratio)) - 2)
    return floor(ratio / unit) * unit


def _positions(target: Target) -> int:
    """Output positions of a layer over the whole batch."""
    kernel = target.shape[0] * target.shape[1] * target.shape[2] * target.shape[3]
    return target.macs // kernel
