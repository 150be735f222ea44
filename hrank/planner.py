"""Deciding: how much of which layers goes, what the filters are worth, and from both the channels that stay.

The three steps are apart, so that a dry run stops after the first, and a comparison of criteria repeats the second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.net import nearest
from caffe_proto.shape_inference import InputShapes

from . import rank_files, rates
from .coupling import Coupling, find
from .criteria import CRITERIA, Evidence
from .criteria import kept as kept_filters
from .criteria import scores as score
from .groups import Group
from .measure import Measured, evidence_of, measure
from .plan import Plan
from .sites import At, find_sites

if TYPE_CHECKING:
    from caffe_proto.data.batches import Batches
    from lra.plan import Timed

    from .timing import Clock

COSTS = ("macs", "latency")
_ONE_BLOCK = "the kernels take all its channels at once: fewer would not be faster"
_IMAGES = 500  # where only their source is given, as in the paper

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Amount:
    """How much goes, one of: a rate string's rates in a grammar, rates by layer, or factors of MACs and parameters."""

    rates: tuple[float, ...] | None = None
    grammar: str = "hrank"
    by_layer: Mapping[str, float] | None = None
    speedup: float | None = None
    params: float | None = None

    @property
    def is_budget(self) -> bool:
        """Whether one rate for all layers is to be found."""
        return self.speedup is not None or self.params is not None

    def record(self) -> dict[str, Any]:
        """What a plan says of it."""
        found: dict[str, Any] = {"speedup": self.speedup, "params": self.params}
        if self.rates is not None:
            found |= {"rates": list(self.rates), "rates_as": self.grammar}
        if self.by_layer is not None:
            found["rates"] = dict(self.by_layer)
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class Limits:
    """What the amount may touch. ``coupled``: also layers that share their channels with others, as one.

    ``only``: None for all. ``round_to``: channels that stay are a multiple of it where the layer has as many;
    ``least``: no fewer stay. ``masks``: filters are set to zero, so each layer stands for itself.
    """

    except_layers: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    coupled: bool = False
    round_to: int = 1
    least: int = 1
    masks: bool = False


@dataclass(frozen=True)
class Sizes:
    """How many units each group keeps, by its index, or filters each layer that is masked by itself.

    ``kept``: layers that stay whole although the amount names them, and why. ``rate``: the one that a budget took;
    ``timed``: the times behind it, where they were measured.
    """

    groups: dict[int, int]
    layers: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    rate: float | None = None
    timed: Timed | None = None


def sizes(coupling: Coupling, amount: Amount, limits: Limits = Limits(), clock: Clock | None = None) -> Sizes:
    """How much stays of each layer. ``clock``: a speed-up is one of measured time.

    Raises UsageError on a string of another length or a budget out of reach, PlanError on names that the net lacks,
    layers that are no convolutions, and different rates for layers that keep the same channels.
    """
    _check_names(coupling, [*limits.except_layers, *(limits.only or ()), *(amount.by_layer or ())])
    if amount.is_budget:
        names = rates.prunable(coupling, coupled=limits.coupled)
        layers = [name for name in names if _allowed(name, limits)]
        out = {name: "left out" for name in names if not _allowed(name, limits)}
        if clock is not None:
            return _by_time(coupling, amount, limits, layers, out, clock)
        rate = rates.for_budget(
            coupling, layers, speedup=amount.speedup, params=amount.params, coupled=limits.coupled,
            round_to=limits.round_to, least=limits.least,
        )  # fmt: skip
        by_layer: dict[str, float] = dict.fromkeys(layers, rate)
    else:
        rate = None
        wanted = _wanted(coupling, amount)
        by_layer = {name: one for name, one in wanted.items() if _allowed(name, limits)}
        out = {name: "left out" for name, one in wanted.items() if one > 0 and name not in by_layer}
        if limits.masks:
            return _masks(coupling, amount, limits, by_layer, out)
    of_groups, kept = rates.group_rates(coupling, by_layer, coupled=limits.coupled)
    counts = rates.group_counts(
        coupling, of_groups, amount.grammar, round_to=limits.round_to, least=limits.least
    )
    if amount.rates is not None and amount.grammar == "hrankplus":
        counts |= _transitions(coupling, amount, counts)
    counts = {index: count for index, count in counts.items() if count < coupling.groups[index].channels}
    return Sizes(counts, {}, {**out, **kept}, rate)


def _by_time(
    coupling: Coupling,
    amount: Amount,
    limits: Limits,
    layers: Sequence[str],
    out: dict[str, str],
    clock: Clock,
) -> Sizes:
    """How much stays where the whole net is to be so many times faster."""
    if amount.speedup is None or limits.masks:
        raise UsageError(
            "measured time is the cost of a speed-up by a smaller net", hint="give a speed-up, and no masks"
        )
    found = clock.choose(
        layers, speedup=amount.speedup, params=amount.params, coupled=limits.coupled,
        round_to=limits.round_to, least=limits.least,
    )  # fmt: skip
    whole = {name: _ONE_BLOCK for index in found.whole for name in _deciding(coupling.groups[index])}
    return Sizes(dict(found.step.kept), {}, {**out, **whole}, found.step.rate, found.timed)


def _allowed(name: str, limits: Limits) -> bool:
    return name not in limits.except_layers and (limits.only is None or name in limits.only)


def _check_names(coupling: Coupling, names: Iterable[str]) -> None:
    """Raise PlanError where one is no convolution of the net."""
    for name in names:
        if name not in coupling.by_layer:
            hint = nearest(name, list(coupling.by_layer))
            raise PlanError("is no layer with filters", path=coupling.model.net.path, layer=name, hint=hint)
        kind = coupling.by_layer[name][1].type
        if kind == "InnerProduct":
            raise PlanError(
                f"is an {kind}, which has no maps: filters of convolutions are pruned",
                path=coupling.model.net.path, layer=name,
            )  # fmt: skip


def _wanted(coupling: Coupling, amount: Amount) -> dict[str, float]:
    """Rates by layer name."""
    if amount.by_layer is not None:
        return dict(amount.by_layer)
    if amount.rates is None:
        raise UsageError("no amount is given", hint="give rates, a speed-up or a factor of parameters")
    return rates.layout(coupling, amount.grammar).by_layer(amount.rates)


def _transitions(coupling: Coupling, amount: Amount, counts: Mapping[int, int]) -> dict[int, int]:
    """Groups of DenseNet's transitions, which keep a part of the channels that they still read."""
    layout = rates.layout(coupling, amount.grammar)
    kept = layout.kept(amount.rates or ())
    groups = {name: coupling.by_layer[name] for name in layout.transitions}
    return {
        group.index: kept[name]
        for name, (group, member) in groups.items()
        if group.index in counts and group.channels == member.channels
    }


def _masks(
    coupling: Coupling, amount: Amount, limits: Limits, by_layer: Mapping[str, float], out: dict[str, str]
) -> Sizes:
    """Filters that stay in each layer by itself; the net's outputs are left alone."""
    counted = rates.layout(coupling, amount.grammar).kept(amount.rates) if amount.rates is not None else {}
    ends = [
        coupling.labels[value].ids
        for value in (coupling.shaped.graph.final[name] for name in coupling.shaped.graph.outputs)
        if value in coupling.labels
    ]
    layers, kept = {}, {}
    for name, rate in by_layer.items():
        channels = coupling.by_layer[name][1].channels
        if rate > 0 and any(np.isin(coupling.filters[name], ids).any() for ids in ends):
            kept[name] = "its filters are an output of the net"
            continue
        count = counted.get(name) if limits.round_to == limits.least == 1 else None
        if count is None:
            count = rates.keep_count(
                channels, rate, amount.grammar, round_to=limits.round_to, least=limits.least
            )
        if count < channels:
            layers[name] = count
    return Sizes({}, layers, {**out, **kept})


def scored_layers(coupling: Coupling, found: Sizes) -> list[str]:
    """The convolutions whose filters decide what stays, in net order: depthwise ones only where no other does."""
    groups = [coupling.groups[index] for index in found.groups]
    names = {name for group in groups for name in _deciding(group)} | set(found.layers)
    return [name for name in coupling.by_layer if name in names]


def _deciding(group: Group) -> list[str]:
    convs = [one for one in group.members if one.type != "InnerProduct"]
    return [one.layer for one in convs if not one.depthwise] or [one.layer for one in convs]


def measured_layers(coupling: Coupling, layers: Collection[str], at: At) -> list[str]:
    """Those of ``layers`` whose maps can be ranked."""
    places = find_sites(coupling.shaped, at).found
    return [name for name in layers if name in places]


def evidence(
    model: Model,
    layers: Sequence[str],
    known: Measured | Mapping[str, np.ndarray] | None,
    seed: int,
    inputs: InputShapes | None = None,
) -> dict[str, Evidence]:
    """What is known of each layer's filters, from weights and, where given, sums over images or published ranks."""
    found = evidence_of(model, known if isinstance(known, Measured) else None, layers, seed, inputs)
    if known is not None and not isinstance(known, Measured):
        for name in layers:
            if name in known:
                found[name] = Evidence(rank=known[name], channels=len(known[name]), seed=seed)
    return found


def scores(criterion: str, known: Mapping[str, Evidence]) -> tuple[Scores, dict[str, str]]:
    """Scores of each layer's filters, larger = keep, and for layers that have none the reason."""
    made: Scores = {}
    reasons: dict[str, str] = {}
    for name, one in known.items():
        try:
            made[name] = score(criterion, one)
        except ValueError as error:
            reasons[name] = str(error)
    return made, reasons


def choose(
    coupling: Coupling,
    found: Sizes,
    by_layer: Scores,
    reasons: Mapping[str, str],
    *,
    reduce: str = "mean",
    target: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan: of each group the units with the highest scores stay. Groups without any score stay whole.

    ``reduce``: a group's score from those of its layers, as `Group.scores`. Raises UsageError where that would miss a
    budget, or leave nothing to prune.
    """
    keep: dict[str, tuple[int, ...]] = {}
    kept = dict(found.kept)
    for index, count in found.groups.items():
        group = coupling.groups[index]
        names = _deciding(group)
        if any(name in by_layer for name in names):
            own = {name: by_layer[name] for name in names if name in by_layer}
            keep.update(group.spread(group.choose(group.scores(own, reduce), count)))
        else:
            kept.update({name: reasons.get(name, "its filters have no score") for name in names})
    for name, count in found.layers.items():
        if name in by_layer:
            keep[name] = tuple(kept_filters(by_layer[name], len(by_layer[name]) - count).tolist())
        else:
            kept[name] = reasons.get(name, "its filters have no score")
    unjudged = [name for name in kept if name not in found.kept]
    if unjudged and (found.rate is not None or not keep):
        hint = "another criterion, or leave it out" if keep else "another criterion"
        raise UsageError(
            f"its filters cannot be judged: {kept[unjudged[0]]}",
            path=coupling.model.net.path, layer=unjudged[0], hint=hint,
        )  # fmt: skip
    rate = {} if found.rate is None else {"rate": found.rate}
    timed = {} if found.timed is None else found.timed.to_dict()
    return Plan.of(coupling, keep, kept=kept, target={**(target or {}), **rate, **timed})


@contextmanager
def _read(src: str | Path, coupling: Coupling, seed: int) -> Iterator[Batches]:
    """Images from where ``--images`` would find them."""
    from caffe_proto.data import open_source
    from caffe_proto.data.batches import Batches
    from caffe_proto.data.transform import for_net

    shape = coupling.shaped.shapes[coupling.shaped.graph.sources[0]]
    transform = for_net(coupling.model.net, shape=shape)
    with closing(open_source(src, resize=transform.resize, color=transform.color)) as source:
        yield Batches(source, transform, n_images=_IMAGES, seed=seed, shape=shape[1:])


def read_ranks(path: str | Path, coupling: Coupling, at: At, *, force: bool = False) -> Any:
    """What a rank file of ours holds, as `Measured`, or a folder of published ones, as mean ranks by layer.

    The i-th published file is that of the i-th layer whose maps the net computes. Raises PlanError where ours was
    measured on other files, unless forced, UsageError where the published ones are of another net.
    """
    places = find_sites(coupling.shaped, at)
    if not Path(path).is_dir():
        found = rank_files.read(path)
        found.check(coupling.model, force=force)
        for name, sums in found.layers.items():
            _, member = coupling.member(name)
            if member.channels != len(sums.nonzero):
                raise PlanError(
                    f"holds {len(sums.nonzero)} filters, the layer has {member.channels}",
                    path=path,
                    layer=name,
                )
        return Measured(places, {}, dict(found.layers))
    published = rank_files.read_published(path)
    ordered = sorted(places.found.values(), key=lambda site: (site.value, site.start))
    channels = {site.layer: site.stop - site.start for site in ordered}
    named = _with_files(coupling, channels, len(published))
    return rank_files.assign(published, named)


def _with_files(coupling: Coupling, channels: Mapping[str, int], count: int) -> Mapping[str, int]:
    """The layers that the authors have rank files for, where these are fewer than the net's convolutions."""
    if len(channels) == count:
        return channels
    try:
        positions = rates.layout(coupling, "hrank").positions
    except UsageError:
        return channels
    pruned = {layer for position in positions for layer in position.layers}
    # both halves of a double 3x3 go by the ranks of the second
    return {name: n for name, n in channels.items() if name in pruned and not name.endswith("double3x3_1")}


def make_plan(
    model: Model,
    *,
    images: Any = None,
    rates: str | Mapping[str, float] | None = None,
    rates_as: str = "hrank",
    speedup: float | None = None,
    params: float | None = None,
    cost: str = "macs",
    latency_table: str | Path | None = None,
    criterion: str = "rank",
    ranks: str | Path | None = None,
    at: At = "relu",
    rectify: bool = False,
    limits: Limits = Limits(),
    reduce: str = "mean",
    seed: int = 0,
    threads: int = 0,
    input_shapes: InputShapes | None = None,
    step: Callable[[int], None] = lambda _images: None,
) -> Plan:
    """Choose the channels that stay, by the mean rank of their maps or another criterion.

    Args:
        images: where the criterion is measured on images: (N, C, H, W) as the net wants them, batches of such, or the
            name of what ``--images`` takes: 500 of them then, as the net's own transform_param has it.
        rates: a string such as ``[0.1]+[0.6]*35``, or rates by layer name; fractions pruned.
        rates_as: the grammar of the string, "hrank" or "hrankplus".
        speedup: MACs of the net before over after; ``params`` the same of stored numbers.
        cost: what the speed-up counts: "macs", or "latency": the time of the whole net in onnxruntime with ``threads``,
            measured, see `hrank.timing`. ``latency_table``: where times are kept, by default in the user's cache.
        criterion: one of ``hrank.criteria.CRITERIA``.
        ranks: a rank file, or a folder of published ones, instead of images.
        at: where the maps are read, see `find_sites`.
        rectify: read max(maps, 0) where no ReLU stands before.

    Raises UsageError or PlanError where amount, criterion and net do not go together.

    Reference: Lin et al., CVPR 2020, section 3.
    """
    if criterion not in CRITERIA:
        raise UsageError(f'there is no criterion "{criterion}"', hint="known: " + ", ".join(CRITERIA))
    if (rates is None) == (speedup is None and params is None):
        raise UsageError("give rates, or a speed-up and/or a factor of parameters")
    amount = amount_of(rates, rates_as, speedup, params)
    coupling = find(model, input_shapes)
    found = sizes(coupling, amount, limits, _clock(coupling, cost, amount, threads, latency_table, step))
    layers = scored_layers(coupling, found)
    known: Any = None
    if CRITERIA[criterion].needs_images:
        known = _known(coupling, criterion, layers, images, ranks, at, rectify, threads, seed, step)
    by_layer, reasons = scores(criterion, evidence(model, layers, known, seed, input_shapes))
    target = {**amount.record(), "criterion": criterion, **({"masks": True} if limits.masks else {})}
    return choose(coupling, found, by_layer, reasons, reduce=reduce, target=target)


def _clock(
    coupling: Coupling, cost: str, amount: Amount, threads: int, table: str | Path | None, step: Callable[[int], None]
) -> Clock | None:  # fmt: skip
    if cost not in COSTS:
        raise UsageError(f'there is no cost "{cost}"', hint="known: " + ", ".join(COSTS))
    if cost == "macs":
        return None
    if amount.speedup is None:
        raise UsageError("measured time is the cost of a speed-up", hint="give a speed-up")
    from caffe_proto.runtime import Engine

    from .timing import Clock

    return Clock(coupling, Engine(threads), table, step)


def amount_of(
    given: str | Mapping[str, float] | None, grammar: str, speedup: float | None, params: float | None
) -> Amount:
    """The amount that a rate string, rates by layer or factors name."""
    if isinstance(given, str):
        return Amount(rates.parse(given), grammar)
    return Amount(by_layer=given, grammar=grammar, speedup=speedup, params=params)


def _known(
    coupling: Coupling, criterion: str, layers: Sequence[str], images: Any, ranks: Any, at: At, rectify: bool, threads: int,
    seed: int, step: Callable[[int], None],
) -> Any:  # fmt: skip
    if ranks is not None:
        return read_ranks(ranks, coupling, at)
    if images is None:
        raise UsageError(f'criterion "{criterion}" is measured on images', hint="give images, or a rank file")
    if isinstance(images, str | Path):
        with _read(images, coupling, seed) as batches:
            return _known(coupling, criterion, layers, batches, ranks, at, rectify, threads, seed, step)
    names = measured_layers(coupling, layers, at)
    if not names:
        return None
    nuclear = "nuclear" in CRITERIA[criterion].needs
    return measure(
        coupling.model,
        images,
        at=at,
        layers=names,
        nuclear=nuclear,
        rectify=rectify,
        threads=threads,
        step=step,
    )
