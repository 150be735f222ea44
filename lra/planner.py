"""Deciding: a net, weights and a target in, a plan out. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import fsum, inf
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from caffe_proto.costs import cost as count
from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.net import nearest
from caffe_proto.shape_inference import InputShapes

from . import ranks as policy
from . import selection
from .merging import Merged
from .merging import merge as merge_rows
from .options import options, retained
from .plan import REFIT, LayerPlan, Plan, Predicted
from .ranks import Infeasible, Option
from .schemes import ALL_SCHEMES, Scheme
from .schemes.asymmetric3d import ASYMMETRIC_3D
from .schemes.response import RESPONSE
from .schemes.spatial import SPATIAL, SPATIAL_HV
from .styles import STYLES, unwritable
from .targets import Found, Spectra, Target, find

if TYPE_CHECKING:
    from caffe_proto.runtime import Engine

    from .auto import Study
    from .calibration import Calibration
    from .latency import Latency
    from .latency_plan import Prices

AUTO = ("pca", "spatial")
NEED_IMAGES = ("response", "asymmetric-3d")
SCOPES = ("all", "conv", "eligible")
SELECTIONS = ("exact", "measured", "paper", "uniform")
RULES = ("paper", "uniform")
MEASURED = ("spatial", "response", "asymmetric-3d")
COSTS = ("macs", "latency")
SETTLINGS = 4  # times that a choice by noisy times is measured anew
EXCEPTED = "excepted"
_OTHER_ORDER = "use the scheme spatial, or --style default"
RankConfig = Mapping[str, Any]
Ticks = Callable[[int], None]


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
                kept[name] = EXCEPTED
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
    selection: str = "exact",
    same_ranks: bool = False,
    solver: str = "asymmetric",
    refit_kept: bool | None = None,
    fold_bn: bool = False,
    merge: bool = False,
    cost: str = "macs",
    engine: Engine | None = None,
    latency: Latency | None = None,
    step: Ticks = lambda _images: None,
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

    ``selection``, of ranks for a ``speedup``: "exact" as above; "measured": by errors measured on images, as
    "auto" does; "paper": by the first-order measure of Zhang et
    al.; "uniform": every layer as much faster. ``same_ranks``: d'' = d' in asymmetric 3-D, as He's tool has it.

    ``images`` (a Calibration, an array (N, C, H, W) as the net wants it, or arrays by blob): the plan asks that
    chains are fitted to responses by ``solver``, one of `fitting.SOLVERS`. With "auto" and a ``speedup``
    schemes and ranks are chosen by measured errors, see `lra.auto`; else energies are those of the weights, or
    for response schemes of the responses. ``refit_kept``: layers left whole are fitted too; None: where schemes
    are chosen by measured errors. ``fold_bn``: BatchNorm and Scale layers are folded into the convolutions before
    them in the end. ``step`` is told of images done.

    ``merge``: layers in a row with nothing in between that cost less as one are merged first, see `lra.merging`, and
    again in the end; a ``speedup`` in MACs counts what that saves. ``found`` and ``spectra``, where they are given,
    are of the net merged first.

    ``cost``, of a ``speedup``: "macs", or "latency": the time of the whole net (with ``scope="eligible"`` of the
    layers that may be decomposed), before / after, from measured times of chains in their places, see
    `lra.latency`. ``latency``: they are, for this net and these shapes; by default the table in the user's cache,
    for the ``engine`` that the net shall run with. What they lack is measured, and counted to ``step`` as well.

    Raises UsageError, PlanError or WeightsError, each naming layer and figure.
    """
    _check_request(
        scheme, style, scope, round_to, selection, cost, speedup, energy, ranks, rank_config, images
    )
    if scheme in NEED_IMAGES and images is None:
        raise UsageError(f"the {scheme} scheme fits responses", hint="give images (--images)")
    if images is not None and (model.weights is None or scheme == "kmeans"):
        raise UsageError(
            "responses cannot be fitted " + ("by kmeans" if model.weights else "without weights")
        )
    if merge and even_if_slower:
        raise UsageError(
            "merging would undo what gets more expensive by splitting", hint="ask for one of both"
        )
    merged = merge_rows(model, input_shapes) if merge else None
    found = found or find(merged.model if merged is not None else model, input_shapes)
    spectra = spectra or Spectra(found)
    kept: dict[str, str] = {}
    if rank_config is not None:
        fc = fc or any(name in found.targets and found.targets[name].dense for name in rank_config)
        for name in rank_config:
            _check_name(name, [*found.targets, *found.refused], found)
    targets = Choice(fc, tuple(except_layers), tuple(only) if only is not None else None).targets(found, kept)
    calibration = None
    if images is not None:
        from .calibration import Calibration  # brings onnxruntime, which the weights alone do not need

        calibration = Calibration.of(found.shaped.graph, images)
        targets = _fittable(found, targets, kept)
    if scheme == ASYMMETRIC_3D.name and ranks is None and rank_config is None:
        flat = [target.name for target in targets if target.shape[2:] == (1, 1)]
        kept.update(dict.fromkeys(flat, "its kernel is 1 x 1: nothing to separate"))
        targets = [target for target in targets if target.name not in flat]
    if not targets:
        raise UsageError("no layer is left to decompose", path=model.net.path, hint=_why(kept))
    job = _Job(found, spectra, scheme, round_to, even_if_slower, kept, selection, same_ranks, style, merged)
    chosen: dict[str, Any] = {"scheme": scheme, "style": style}
    layers: dict[str, LayerPlan]
    target: dict[str, Any]
    if speedup is not None:
        target = {"speedup": speedup, "scope": scope}
        if cost == "latency":
            targets = job.counted(targets, scope)
            job.price_in_time(engine, latency)
        if calibration is not None and (
            selection == "measured" or (scheme == "auto" and selection == "exact")
        ):
            from .auto import Study

            targets = job.counted(targets, scope)
            job.study = Study(found, spectra, calibration, targets, step)
    if calibration is not None and any(name in NEED_IMAGES for name in job.wanted(rank_config)):
        from .fitting import sample_spectra

        sample_spectra(found, spectra, targets, calibration, step)
    if job.prices is not None:
        job.prices.measure(targets, job.all_schemes(targets), lambda: step(1))
    if speedup is not None:
        layers = job.by_speedup(targets, speedup, scope)
        if job.study is not None and calibration is not None and scheme == "auto":
            refit = refit_kept is not False
            layers = _best(job, layers, targets, speedup, scope, refit, solver, calibration, step)
    elif energy is not None:
        layers, target = job.by_energy(targets, energy), {"energy": energy}
    elif ranks is not None:
        layers, target = job.by_ranks(targets, ranks), {"ranks": list(ranks)}
    else:
        layers, target = job.by_config(targets, rank_config or {}), {"rank_config": True}
    if calibration is not None:
        chosen |= {"fit": calibration.record()} | ({"solver": solver} if solver != "asymmetric" else {})
        if refit_kept or (refit_kept is None and scheme == "auto" and job.study is not None):
            layers = _refitted(found, layers, kept)
            kept = {name: reason for name, reason in kept.items() if name not in layers}
    if job.predicted is not None:
        chosen |= job.predicted.to_dict()
    if selection != "exact":
        chosen["selection"] = selection
    if round_to > 1:
        chosen["round_to"] = round_to
    if fold_bn:
        chosen["fold_bn"] = True
    if merged is not None:
        chosen["merge"] = [list(one.layers) for one in merged.merges]
    order = [name for name in found.targets if name in layers]
    net, weights = model.fingerprint
    return Plan({name: layers[name] for name in order}, kept, target | chosen, net, weights)


def _fittable(found: Found, targets: list[Target], kept: dict[str, str]) -> list[Target]:
    """The targets whose responses can be sampled; the others are kept, with the reason."""
    from .fitting import unfit

    reasons = {target.name: unfit(found, target) for target in targets}
    kept.update({name: reason for name, reason in reasons.items() if reason is not None})
    return [target for target in targets if reasons[target.name] is None]


def _refitted(found: Found, layers: Mapping[str, LayerPlan], kept: Mapping[str, str]) -> dict[str, LayerPlan]:
    """The layers planned, and those left whole that can be fitted."""
    from .fitting import unfit

    made = dict(layers)
    for name, target in found.targets.items():
        if name not in layers and kept.get(name) != EXCEPTED and unfit(found, target) is None:
            macs = (target.macs, target.macs) if target.in_hw is not None else None
            made[name] = LayerPlan(REFIT, (), macs)
    return made


def _best(
    job: _Job,
    measured: dict[str, LayerPlan],
    targets: list[Target],
    speedup: float,
    scope: str,
    refit: bool,
    solver: str,
    calibration: Calibration,
    step: Ticks,
) -> dict[str, LayerPlan]:
    """The better of two choices, by the held-out error of the outputs: by measured errors, by energies of weights."""
    from .fitting import fit_layers, output_error

    found = job.found
    by_energy = replace(job, study=None, kept={})
    choices = [(job, measured), (by_energy, by_energy.by_speedup(targets, speedup, scope))]
    errors = []
    for _, layers in choices:
        whole = _refitted(found, layers, job.kept) if refit else layers
        plan = Plan(whole, target={"solver": solver} if solver != "asymmetric" else {})
        fits = fit_layers(plan, found, job.spectra, calibration, step)
        errors.append(output_error(fits, found, calibration))
    chosen, layers = choices[int(errors[1] < errors[0])]
    job.study, job.predicted = chosen.study, chosen.predicted
    job.kept.update(chosen.kept)
    for name in layers:
        job.kept.pop(name, None)
    return layers


def _why(kept: Mapping[str, str]) -> str | None:
    return "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3]) or None


def _check_request(
    scheme: str, style: str, scope: str, round_to: int, selection: str, cost: str,
    speedup: float | None, energy: float | None, ranks: object, rank_config: object, images: object,
) -> None:  # fmt: skip
    for value, known, what in (
        (scheme, ("auto", *ALL_SCHEMES), "scheme"),
        (style, STYLES, "style"),
        (scope, SCOPES, "scope"),
        (selection, SELECTIONS, "selection of ranks"),
        (cost, COSTS, "cost"),
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
    if refused := unwritable(style, scheme):
        raise UsageError(refused, hint=_OTHER_ORDER)
    if round_to < 1:
        raise UsageError(f"cannot round ranks to multiples of {round_to}")
    if ranks is not None and scheme == "auto":
        raise UsageError("ranks need a named scheme", hint="add --scheme " + "|".join(ALL_SCHEMES))
    if selection in RULES and (speedup is None or scheme == "auto" or round_to > 1):
        raise UsageError(
            f'ranks by "{selection}" need a named scheme and a speed-up, and cannot be rounded',
            hint="add --scheme and --speedup, leave out --round-to",
        )
    if selection == "measured" and (speedup is None or scheme not in MEASURED or images is None):
        raise UsageError(
            "ranks by measured errors need images, a speed-up and one of the schemes " + ", ".join(MEASURED),
            hint="auto with images measures by itself",
        )
    if cost == "latency" and (speedup is None or selection != "exact" or scope == "conv"):
        raise UsageError(
            "measured time is the cost of a speed-up of the whole net or of the layers that may be decomposed",
            hint="add --speedup, leave out --rank-selection and --scope conv",
        )


@dataclass
class _Job:
    """One request over the eligible layers of one net; ``kept`` collects reasons."""

    found: Found
    spectra: Spectra
    scheme: str
    round_to: int
    even_if_slower: bool
    kept: dict[str, str]
    selection: str
    same_ranks: bool
    style: str = "default"
    merged: Merged | None = None
    study: Study | None = None
    prices: Prices | None = None
    predicted: Predicted | None = None

    def wanted(self, config: RankConfig | None) -> set[str]:
        """The names of the schemes that a plan may hold."""
        named = {_entry(name, value).scheme for name, value in (config or {}).items()}
        return named | {self.scheme}

    def schemes(self, target: Target) -> list[Scheme]:
        """The schemes to consider for a layer: a 1 x 1 kernel has nothing to separate."""
        names: tuple[str, ...] = AUTO if self.scheme == "auto" else (self.scheme,)
        if self.study is not None:
            names = (RESPONSE.name, SPATIAL.name, ASYMMETRIC_3D.name)
        elif self.scheme == "auto" and self._either_order(target):
            names = (*names, SPATIAL_HV.name)
        if target.shape[2:] == (1, 1) and self.scheme == "auto":
            names = names[:1]
        return [ALL_SCHEMES[name] for name in names]

    def _either_order(self, target: Target) -> bool:
        """Whether H before V is worth considering too: where costs are times, or where it has fewer MACs or a smaller full rank.

        With one tap along an axis it is a chain that the cross-filter schemes have as well.
        """
        if min(target.shape[2:]) == 1 or unwritable(self.style, SPATIAL_HV.name):
            return False
        orders, group = (SPATIAL, SPATIAL_HV), target.geometry.group
        cost = [target.chain_cost(scheme, group) for scheme in orders]
        full = [scheme.max_rank(target.shape, group) for scheme in orders]
        return self.prices is not None or cost[1] < cost[0] or full[1] < full[0]

    def all_schemes(self, targets: list[Target]) -> dict[str, list[Scheme]]:
        """By layer the schemes that any way to choose considers, see `_best`."""
        both = (self, replace(self, study=None))
        return {
            target.name: list(dict.fromkeys(s for one in both for s in one.schemes(target)))
            for target in targets
        }

    def price_in_time(self, engine: Engine | None, latency: Latency | None) -> None:
        """Costs are measured times from here on."""
        from .latency import Latency  # brings onnxruntime
        from .latency_plan import Prices

        self.prices = Prices(latency or Latency(self.found, engine), self.round_to, self.same_ranks)

    def counted(self, targets: list[Target], scope: str) -> list[Target]:
        """The targets that a speed-up of this scope may touch."""
        if scope == "conv":
            dense = [target.name for target in targets if target.dense]
            self.kept.update(dict.fromkeys(dense, "fully connected (--scope is conv)"))
            targets = [target for target in targets if not target.dense]
        if not targets or any(target.in_hw is None for target in targets):
            raise self._uncounted()
        return targets

    def by_speedup(self, targets: list[Target], speedup: float, scope: str) -> dict[str, LayerPlan]:
        targets = self.counted(targets, scope)
        total, eligible = self._totals(targets, scope)
        saved = self._saved(targets, scope)
        fixed, budget = total - eligible, float(Fraction(total + saved) / Fraction(speedup))
        try:
            if self.selection in RULES:
                return self._by_rule(targets, speedup, fixed, budget)
            tied = _tied(targets)
            options, chosen, pairs = self._allocated(tied, budget - fixed)
        except Infeasible as error:
            smallest = error.smallest + (0 if self.selection in RULES else fixed)
            where = {"all": "whole net", "conv": "convolutions", "eligible": "layers to decompose"}[scope]
            how, what = ("the smallest ranks", "MACs") if self.prices is None else ("best", "time")
            raise UsageError(
                f"a speed-up of {speedup:g} of the {where} cannot be reached: at {how} it is {policy.below((total + saved) / smallest):.3g}",
                hint=f"the layers to decompose hold {eligible / self._totals(targets, 'all')[0]:.0%} of the {what}; "
                "ask for less, or allow more layers (--fc, fewer --except)",
            ) from None
        if self.prices is not None:
            gap = fsum(one.loss for one in chosen) - policy.lower_bound(options, budget - fixed)
            costs = {target.name: self._seconds(target, option) for target, option in pairs}
            self.predicted = self.prices.predicted(costs, targets, gap)
        return self._planned(pairs)

    def _allocated(
        self, tied: list[list[Target]], budget: float
    ) -> tuple[list[list[Option]], list[Option], list[tuple[Target, Option]]]:
        """The ways to treat layers of the same weights, the best of them within a budget, and it by layer.

        What was chosen by noisy times is measured anew, and chosen again, where this plan measures at all: one by
        a table that holds everything takes no time.
        """
        for left in reversed(range(SETTLINGS + 1)):
            options = [_alike([self.options(target) for target in group]) for group in tied]
            chosen = policy.allocate(options, budget)
            pairs = [(target, one) for group, one in zip(tied, chosen, strict=True) for target in group]
            if self.prices is None or not left or not self.prices.latency.measuring:
                break
            if not self.prices.settle(pairs):
                break
        return options, chosen, pairs

    def _totals(self, targets: list[Target], scope: str) -> tuple[float, float]:
        """The cost that a speed-up counts, and what the targets have of it."""
        if self.prices is not None:
            dense = fsum(map(self.prices.dense, targets))
            return (dense if scope == "eligible" else self.prices.latency.net), dense
        cost = count(self.found.shaped)
        eligible = sum(target.macs for target in targets)
        total = {"all": cost.macs, "conv": cost.conv_macs, "eligible": eligible}[scope]
        if not total:
            raise self._uncounted()
        return total, eligible

    def _saved(self, targets: list[Target], scope: str) -> int:
        """MACs that merging has saved, as far as a speed-up counts them; times are those of the merged net."""
        if self.merged is None or self.prices is not None:
            return 0
        found = self.found.targets
        touched = {target.name for target in targets}
        counted = (
            one
            for one in self.merged.merges
            if scope == "all" or (one.name in touched if scope == "eligible" else not found[one.name].dense)
        )
        return sum(one.macs[0] - one.macs[1] for one in counted if one.macs is not None)

    def _seconds(self, target: Target, option: Option) -> float:
        """Measured time of a layer treated so."""
        assert self.prices is not None
        if option.key is None:
            return self.prices.dense(target)
        name, ranks = cast(tuple[str, tuple[int, ...]], option.key)
        return self.prices.seconds(target, ALL_SCHEMES[name], ranks)

    def _by_rule(
        self, targets: list[Target], speedup: float, fixed: float, budget: float
    ) -> dict[str, LayerPlan]:
        """Ranks as the papers choose them."""
        scheme = ALL_SCHEMES[self.scheme]
        if self.selection == "uniform":
            found = selection.uniform(targets, scheme, speedup, fixed, budget, self.same_ranks)
        else:
            found = selection.stripped(targets, scheme, self.spectra, speedup, fixed, budget)
        for target in targets:
            if target.name not in found:
                self.kept[target.name] = f"no ranks by the rule ({self.selection}) make it cheaper"
        return {
            target.name: self.entry(target, scheme, found[target.name])
            for target in targets
            if target.name in found
        }

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
        if self.prices is not None:
            return self.prices.options(target, self.schemes(target), self._loss)
        if self.study is not None:
            return self.study.options(target, self.round_to, None if self.scheme == "auto" else self.scheme)
        made = [Option(float(target.macs), 0.0, None)]
        for scheme in self.schemes(target):
            made += options(target, scheme, self.spectra, self.round_to, self.same_ranks)
        return made

    def _loss(self, target: Target, scheme: Scheme, ranks: tuple[int, ...]) -> float:
        """What a choice by time minimises the sum of: -log of the energy retained; of a study, its measure."""
        if self.study is None:
            return float(policy.loss(retained(target, scheme, self.spectra, ranks)))
        if scheme is ASYMMETRIC_3D and ranks[1] == target.shape[0]:
            return inf  # that is the spatial scheme
        return float(self.study.loss(target, np.array(self.study.error(target, scheme.name, ranks))))

    def _planned(self, chosen: list[tuple[Target, Option]]) -> dict[str, LayerPlan]:
        layers: dict[str, LayerPlan] = {}
        for target, option in chosen:
            if option.key is None:
                self.kept[target.name] = self._never_cheaper(target) or "the speed-up is reached without it"
            else:
                name, ranks = cast(tuple[str, tuple[int, ...]], option.key)
                layers[target.name] = self.entry(target, ALL_SCHEMES[name], ranks)
                if self.prices is not None:
                    ms = self.prices.milliseconds(target, self._seconds(target, option))
                    layers[target.name] = replace(layers[target.name], ms=ms)
        return layers

    def _never_cheaper(self, target: Target) -> str | None:
        """The reason where no rank that is allowed makes a layer cheaper, else None."""
        if len(self.options(target)) > 1:
            return None
        if self.prices is not None:
            return self.prices.none_faster(target)
        multiple = f" that is a multiple of {self.round_to}" if self.round_to > 1 else ""
        return f"no rank{multiple} makes it cheaper"

    def by_energy(self, targets: list[Target], energy: float) -> dict[str, LayerPlan]:
        layers: dict[str, LayerPlan] = {}
        for target in targets:
            best: tuple[int, Scheme, tuple[int, ...]] | None = None
            for scheme in self.schemes(target):
                found = self._ranks_for(target, scheme, energy)
                cost = target.chain_cost(scheme, *found)
                if best is None or cost < best[0]:
                    best = (cost, scheme, found)
            assert best is not None
            self._take(layers, target, best[1], best[2])
        return layers

    def _ranks_for(self, target: Target, scheme: Scheme, energy: float) -> tuple[int, ...]:
        """The smallest ranks that retain an energy; of asymmetric 3-D each split retains its root."""
        if scheme is not ASYMMETRIC_3D:
            return (self._rounded(target, scheme, self.spectra.get(target, scheme).rank_for(energy)),)
        parts = [self.spectra.get(target, part).rank_for(energy**0.5) for part in (SPATIAL, RESPONSE)]
        if self.same_ranks:
            parts = [min(max(parts), scheme.max_rank(target.shape, target.geometry.group))]
        grid = [
            self._above(target, rank, most) for rank, most in zip(parts, self._most(target), strict=False)
        ]
        rounded = tuple(grid) * (2 if self.same_ranks else 1)
        return (
            rounded if target.chain_cost(scheme, *rounded) < target.macs else tuple(parts * (2 // len(parts)))
        )

    def _most(self, target: Target) -> tuple[int, int]:
        shape, group = target.shape, target.geometry.group
        return SPATIAL.max_rank(shape, group), RESPONSE.max_rank(shape, group)

    def _above(self, target: Target, rank: int, most: int) -> int:
        """The next rank of the grid at or above; the rank itself where there is none."""
        grid = policy.candidates(most, target.geometry.group, self.round_to)
        return next((one for one in grid if one >= rank), rank)

    def _rounded(self, target: Target, scheme: Scheme, rank: int) -> int:
        """The next rank of the grid at or above, where it is still cheaper than the dense layer; else the rank."""
        above = self._above(target, rank, scheme.max_rank(target.shape, target.geometry.group))
        return above if target.chain_cost(scheme, above) < target.macs else rank

    def by_ranks(self, targets: list[Target], ranks: Sequence[int]) -> dict[str, LayerPlan]:
        if len(ranks) != len(targets):
            names = ", ".join(target.name for target in targets)
            raise UsageError(
                f"{len(ranks)} ranks for {len(targets)} layers",
                hint=f"one each is needed, in this order: {names}",
            )
        return self._explicit(
            [(target, ALL_SCHEMES[self.scheme], (rank,)) for target, rank in zip(targets, ranks, strict=True)]
        )

    def by_config(self, targets: list[Target], config: RankConfig) -> dict[str, LayerPlan]:
        wanted = []
        for target in targets:
            if target.name not in config:
                self.kept[target.name] = "not in the rank config" if config else "no ranks are asked for"
                continue
            entry = _entry(target.name, config[target.name])
            name = entry.scheme or ("pca" if self.scheme == "auto" else self.scheme)
            if name == REFIT:
                raise PlanError(
                    '"refit" is no way to choose ranks', layer=target.name, hint="use --refit-kept"
                )
            if refused := unwritable(self.style, name):
                raise UsageError(refused, layer=target.name, hint=_OTHER_ORDER)
            wanted.append((target, ALL_SCHEMES[name], entry.ranks))
        for name in config:
            if name in self.found.refused:
                raise UsageError(f"cannot be decomposed: {self.found.refused[name]}", layer=name)
        return self._explicit(wanted)

    def _explicit(self, wanted: list[tuple[Target, Scheme, tuple[int, ...]]]) -> dict[str, LayerPlan]:
        layers: dict[str, LayerPlan] = {}
        for target, scheme, ranks in wanted:
            try:
                scheme.chain(target.shape, target.geometry, ranks)
            except ValueError as error:
                raise UsageError(str(error), path=self.found.model.net.path, layer=target.name) from None
            self._take(layers, target, scheme, ranks)
        return layers

    def _take(
        self, layers: dict[str, LayerPlan], target: Target, scheme: Scheme, ranks: tuple[int, ...]
    ) -> None:
        """Plan a layer, or keep it with the reason where the chain is not cheaper."""
        cost = target.chain_cost(scheme, *ranks)
        if cost >= target.macs and not self.even_if_slower:
            places = target.macs // max(1, _positions(target))
            rank = "+".join(map(str, ranks))
            self.kept[target.name] = (
                f"rank {rank} ({scheme.name}) needs {cost / max(1, _positions(target)):,.0f} MACs a position, the layer {places:,}"
            )
            return
        layers[target.name] = self.entry(target, scheme, ranks)

    def entry(self, target: Target, scheme: Scheme, ranks: tuple[int, ...]) -> LayerPlan:
        """What the plan says: scheme, ranks, MACs where shapes are known, the error where weights are."""
        macs = (target.macs, target.chain_cost(scheme, *ranks)) if target.in_hw is not None else None
        full = ranks * scheme.n_ranks if len(ranks) == 1 else ranks
        return LayerPlan(scheme.name, full, macs, self._error(target, scheme, full))

    def _error(self, target: Target, scheme: Scheme, ranks: tuple[int, ...]) -> float | None:
        """``sqrt(1 - energy)`` of what the scheme cuts; of a study, what it predicts of the responses."""
        if target.index not in self.found.blobs:
            return None
        if self.study is not None:
            squared = self.study.error(target, scheme.name, ranks)
        else:
            squared = max(0.0, 1 - retained(target, scheme, self.spectra, ranks))
        return float(f"{squared**0.5:.6g}")


def _entry(name: str, value: Any) -> LayerPlan:
    return value if isinstance(value, LayerPlan) else LayerPlan.from_dict(name, value)


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


def _positions(target: Target) -> int:
    """Output positions of a layer over the whole batch."""
    kernel = target.shape[0] * target.shape[1] * target.shape[2] * target.shape[3]
    return target.macs // kernel
