"""How much of which layer goes: rate strings in both published grammars, rates by layer, one rate for a budget.

A rate is the fraction of a layer's filters that is pruned. A string gives one for each position; which layers a
position stands for depends on the net and on the grammar, ``hrank`` or ``hrankplus``. Reference: the code published
with Lin et al., CVPR 2020, and its successor HRankPlus.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from caffe_proto.errors import PlanError, UsageError
from caffe_proto.net import nearest
from caffe_proto.plan import read_json

from . import counts
from .coupling import Coupling, removed_places
from .groups import Group

GRAMMARS = ("hrank", "hrankplus")
_TERM = re.compile(r"\s*\[\s*(\d+\.?\d*|\.\d+)\s*\]\s*(?:\*\s*(\d+)\s*)?")
_MOST = 100_000  # rates of one string


@dataclass(frozen=True)
class Position:
    """One place of a rate string: the layers it prunes, none where the grammar ignores it, and what they are.

    ``transition``: a 1 x 1 convolution between the blocks of a DenseNet, which the authors treat apart.
    """

    layers: tuple[str, ...]
    what: str
    transition: bool = False


@dataclass(frozen=True, eq=False)
class Layout:
    """What the positions of a rate string mean for a net. ``net``: the layout's own name, "any net" where general."""

    coupling: Coupling
    grammar: str
    net: str
    positions: tuple[Position, ...]

    def by_layer(self, rates: Sequence[float]) -> dict[str, float]:
        """Rates by layer name; raises UsageError where there are too few or too many."""
        if not self.positions:
            raise sizeless(self.coupling)
        if len(rates) != len(self.positions):
            first = self.positions[0].what
            raise UsageError(
                f"{len(rates)} rates for {len(self.positions)} positions of this net ({self.net}, {self.grammar})",
                path=self.coupling.model.net.path,
                hint=f"position 1 is: {first}; caffe-lra prune NET --dry-run lists all",
            )
        return {
            layer: rate
            for position, rate in zip(self.positions, rates, strict=True)
            for layer in position.layers
        }

    def kept(self, rates: Sequence[float], *, counted: bool = False) -> dict[str, int]:
        """How many filters each layer keeps, as the authors' code has it.

        HRankPlus leaves a transition a part of the channels that it still reads, not of its own.
        ``counted``: as its FLOPs counter has it, where that differs: HRank counts inception 4c of GoogLeNet by the
        rate of 4d, but masks it by its own.
        """
        if counted and self.c4_slip and len(rates) == len(self.positions):
            rates = [*rates[:5], rates[6], *rates[6:]]
        found: dict[str, int] = {}
        by_layer = self.by_layer(rates)
        relative = self.transitions if self.grammar == "hrankplus" else ()
        for layer in self.coupling.by_layer:
            if layer in by_layer:
                channels = self._read(layer, found) if layer in relative else self._channels(layer)
                found[layer] = keep_count(channels, by_layer[layer], self.grammar)
        return found

    @property
    def c4_slip(self) -> bool:
        """Whether the published counter takes inception 4c by the rate of 4d: HRank's of GoogLeNet."""
        return self.net == _GOOGLENET and self.grammar == "hrank"

    @property
    def transitions(self) -> tuple[str, ...]:
        """The layers of the positions that are transitions."""
        return tuple(layer for position in self.positions if position.transition for layer in position.layers)

    def _channels(self, layer: str) -> int:
        return self.coupling.by_layer[layer][1].channels

    def _read(self, layer: str, kept: Mapping[str, int]) -> int:
        """How many channels a layer reads while those before it keep so many."""
        keep = {name: range(count) for name, count in kept.items()}
        gone = self.coupling.removed(keep, masks=True)
        note = next(note for note in self.coupling.notes.values() if note.layer == layer)
        labels = note.bottoms[0]
        return 0 if labels is None else int((~removed_places(gone, labels.ids)).sum())

    def table(self, rates: Sequence[float] | None = None) -> list[tuple[str, ...]]:
        """The mapping as rows of text: position, layer, what it is, channels and, with rates, rate and channels kept."""
        kept = self.kept(rates) if rates is not None else {}
        rows: list[tuple[str, ...]] = []
        for number, position in enumerate(self.positions):
            rate = () if rates is None else (f"{rates[number]:g}",)
            for layer in position.layers or ("-",):
                sizes = (str(self._channels(layer)) if layer in self.coupling.by_layer else "",)
                left = () if rates is None else (str(kept.get(layer, "")),)
                rows.append((str(number + 1), layer, position.what, *sizes, *rate, *left))
        return rows


def parse(source: str) -> tuple[float, ...]:
    """The rates of a string such as ``[0.1]+[0.60]*35+[0.0]*2``; raises UsageError where it is none."""
    found: list[float] = []
    at = 0
    while True:
        term = _TERM.match(source, at)
        if term is None:
            _refuse(source, at)
        assert term is not None
        rate, times = float(term[1]), int(term[2] or 1)
        if rate >= 1:
            raise UsageError(
                f"rate {rate:g} prunes everything", hint="a rate is the fraction pruned, below 1"
            )
        if len(found) + times > _MOST:
            raise UsageError(f"more than {_MOST:,} rates")
        found += [rate] * times
        at = term.end()
        if at == len(source):
            return tuple(found)
        if source[at] != "+":
            _refuse(source, at)
        at += 1


def _refuse(source: str, at: int) -> None:
    what = f"{source[at : at + 20]!r}" if at < len(source) else "nothing"
    raise UsageError(
        f"rates cannot be read: {what} stands at character {at + 1}", hint="write [0.1]+[0.6]*35+[0.0]*2"
    )


def from_json(source: str, path: object = None) -> dict[str, float]:
    """Rates by layer name from ``{"conv1": 0.5}``; raises PlanError where one is no fraction below 1."""
    found = {}
    for name, rate in read_json(source, path).items():
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate < 1:
            raise PlanError(
                f"{rate!r} is no rate", path=path, layer=name, hint="a rate is the fraction pruned, below 1"
            )
        found[name] = float(rate)
    return found


def keep_count(
    channels: int, rate: float, grammar: str = "hrank", *, round_to: int = 1, least: int = 1
) -> int:
    """How many of ``channels`` stay: c - int(c*rate) in HRank, int(c*(1-rate)) in HRankPlus, in floating point.

    ``round_to``: up to the next multiple of it; ``least``: no fewer. Never more than there are.
    """
    kept = channels - int(rate * channels) if grammar == "hrank" else int(channels * (1 - rate))
    kept = -(-kept // round_to) * round_to
    return min(channels, max(kept, least, 1))


def layout(coupling: Coupling, grammar: str = "hrank") -> Layout:
    """What the positions of a rate string mean for a net, recognized by the names of its convolutions.

    For VGG-16, the ResNets, DenseNet-40 and GoogLeNet of CIFAR as HRank prunes them, and ResNet-50, the published
    strings can be used as they are. For any other net there is one position for each convolution that is not
    depthwise, in net order. Raises UsageError where the grammar has no rule for the net.
    """
    if grammar not in GRAMMARS:
        raise UsageError(f'there is no rate grammar "{grammar}"', hint="known: " + ", ".join(GRAMMARS))
    convs = [
        member.layer
        for _, member in coupling.by_layer.values()
        if member.type == "Convolution" and not member.depthwise
    ]
    for net, recognize in _NETS.items():
        found = recognize(convs, grammar)
        if found:
            return Layout(coupling, grammar, net, tuple(found))
    return Layout(coupling, grammar, "any net", tuple(Position((name,), "convolution") for name in convs))


def _vgg(convs: Sequence[str], grammar: str) -> list[Position]:
    """Every convolution but the last: HRank's strings have a rate for that too and ignore it, HRankPlus' have none."""
    names = [
        f"conv{stage}_{i}" for stage, depth in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, depth + 1)
    ]
    if names != list(convs):
        return []
    last = [Position((), "last convolution, which stays")] if grammar == "hrank" else []
    return [*(Position((name,), "convolution") for name in names[:-1]), *last]


def _cifar_resnet(convs: Sequence[str], grammar: str) -> list[Position]:
    """HRank: the stem and both convolutions of every block. HRankPlus: the stem, the outputs of stages 1 and 2, then
    the first convolution of every block; the stem and stage 3 keep theirs."""
    blocks = [re.fullmatch(r"res_grp(\d+)_(\d+)_conv([12])", name) for name in convs[1:]]
    if not blocks or convs[0] != "conv1" or not all(blocks):
        return []
    if grammar == "hrank":
        return [Position((name,), "stem" if name == "conv1" else "of a block") for name in convs]
    ends = {
        stage: tuple(one.string for one in blocks if one and one[3] == "2" and one[1] == stage)
        for stage in ("1", "2")
    }
    return [
        Position((), "stem, which stays"),
        *(Position(layers, f"output of stage {stage}") for stage, layers in ends.items()),
        *(Position((one.string,), "inside a block") for one in blocks if one and one[3] == "1"),
    ]


def _bottleneck(convs: Sequence[str], grammar: str) -> list[Position]:
    """HRank: the stem, then 2a, 2b, 2c of every block and, in the first of a stage, the shortcut behind them.
    HRankPlus: the stem, the outputs of all stages but the last, then one rate a block for 2a and 2b."""
    blocks: dict[tuple[str, str], dict[str, str]] = {}
    for name in convs[1:]:
        found = re.fullmatch(r"res(\d)(\w+)_branch(1|2[abc])", name)
        if found is None:
            return []
        blocks.setdefault((found[1], found[2]), {})[found[3]] = name
    parts = ("2a", "2b", "2c")
    if not blocks or convs[0] != "conv1" or any(not block.keys() >= set(parts) for block in blocks.values()):
        return []
    if grammar == "hrank":
        inner = [
            Position((block[part],), "shortcut" if part == "1" else "of a block")
            for block in blocks.values()
            for part in (*parts, "1")
            if part in block
        ]
        return [Position(("conv1",), "stem"), *inner]
    stages = list(dict.fromkeys(stage for stage, _ in blocks))
    ends = [
        Position(
            tuple(
                block[part]
                for (one, _), block in blocks.items()
                for part in ("1", "2c")
                if one == stage and part in block
            ),
            f"output of stage {number}",
        )
        for number, stage in enumerate(stages[:-1], 1)
    ]
    mids = [Position((block["2a"], block["2b"]), "inside a block") for block in blocks.values()]
    return [Position(("conv1",), "stem"), *ends, *mids]


def _densenet(convs: Sequence[str], grammar: str) -> list[Position]:
    """Every convolution. HRankPlus leaves the first as it is, and a transition keeps a part of what it reads."""
    if (
        not convs
        or convs[0] != "conv1"
        or not all(re.fullmatch(r"(dense\d+_\d+|trans\d+)/conv", name) for name in convs[1:])
    ):
        return []
    first = Position(("conv1",), "stem") if grammar == "hrank" else Position((), "stem, which stays")
    return [
        first,
        *(
            Position((name,), "transition", transition=True)
            if name.startswith("trans")
            else Position((name,), "of a dense block")
            for name in convs[1:]
        ),
    ]


def _googlenet(convs: Sequence[str], grammar: str) -> list[Position]:
    """The stem, then one position an inception module.

    HRank: 1x1, 3x3, both of the double 3x3, pool_proj. HRankPlus: 3x3 and the double 3x3, in the last module only
    the first of the double; the stem stays.
    """
    modules: dict[str, set[str]] = {}
    for name in convs[1:]:
        module, _, part = name.partition("/")
        modules.setdefault(module, set()).add(part)
    pruned = ("1x1", "3x3", "double3x3_1", "double3x3_2", "pool_proj")
    if len(modules) != 9 or any(not parts >= set(pruned) for parts in modules.values()):
        return []
    if grammar == "hrank":
        return [
            Position((convs[0],), "stem"),
            *(Position(tuple(f"{one}/{part}" for part in pruned), "inception module") for one in modules),
        ]
    *inner, last = modules
    return [
        Position((), "stem, which stays"),
        *(Position(tuple(f"{one}/{part}" for part in pruned[1:4]), "inception module") for one in inner),
        Position((f"{last}/double3x3_1",), "last inception module"),
    ]


_GOOGLENET = "GoogLeNet of CIFAR"
_NETS: dict[str, Callable[[Sequence[str], str], list[Position]]] = {
    "VGG-16": _vgg,
    "ResNet of CIFAR": _cifar_resnet,
    "ResNet with bottlenecks": _bottleneck,
    "DenseNet": _densenet,
    _GOOGLENET: _googlenet,
}


def group_rates(
    coupling: Coupling, by_layer: Mapping[str, float], *, coupled: bool = False
) -> tuple[dict[int, float], dict[str, str]]:
    """One rate for each group, by its index, from rates by layer; and for layers left alone the reason.

    Layers that share their channels with others are pruned only where ``coupled``, and then by one rate.
    Raises PlanError where a layer is not there, or where layers of one group want different rates.
    """
    for name in by_layer:
        if name not in coupling.by_layer:
            hint = nearest(name, list(coupling.by_layer))
            raise PlanError("is no layer with filters", path=coupling.model.net.path, layer=name, hint=hint)
    rates: dict[int, float] = {}
    kept: dict[str, str] = {}
    for group in coupling.groups:
        wanted = {one.layer: by_layer[one.layer] for one in group.members if by_layer.get(one.layer, 0) > 0}
        if not wanted:
            continue
        reason = group.frozen or ("" if coupled or not group.coupled else _shared(group))
        if reason:
            kept.update(dict.fromkeys(wanted, reason))
        else:
            rates[group.index] = _one_rate(group, by_layer, coupling.model.net.path)
    return rates, kept


def _shared(group: Group) -> str:
    deciding = [one.layer for one in group.members if not one.depthwise]
    return (
        f"shares its channels: {len(deciding)} layers, {deciding[0]} to {deciding[-1]}, keep the same or none"
    )


def _one_rate(group: Group, by_layer: Mapping[str, float], path: str | None) -> float:
    """The rate that all members with one agree on."""
    (first, rate), *others = (
        (one.layer, by_layer[one.layer]) for one in group.members if one.layer in by_layer
    )
    for name, other in others:
        if other != rate:
            raise PlanError(
                f'has rate {other:g}, and "{first}", which must keep the same channels, has {rate:g}',
                path=path,
                layer=name,
                hint="give both the same",
            )
    return rate


def group_counts(
    coupling: Coupling,
    rates: Mapping[int, float],
    grammar: str = "hrank",
    *,
    round_to: int = 1,
    least: int = 1,
) -> dict[int, int]:
    """How many units each group keeps at its rate, see ``keep_count``."""
    return {
        index: keep_count(coupling.groups[index].channels, rate, grammar, round_to=round_to, least=least)
        for index, rate in rates.items()
    }


def prunable(coupling: Coupling, *, coupled: bool = False) -> list[str]:
    """The convolutions that filters can be taken from, in net order; those that share channels only where ``coupled``."""
    return [
        member.layer
        for group, member in coupling.by_layer.values()
        if member.type == "Convolution"
        and not member.depthwise
        and not group.frozen
        and (coupled or not group.coupled)
    ]


def for_budget(
    coupling: Coupling,
    layers: Sequence[str],
    *,
    speedup: float | None = None,
    params: float | None = None,
    coupled: bool = False,
    round_to: int = 1,
    least: int = 1,
) -> float:
    """The lowest common rate of ``layers`` at which MACs and parameters fall by these factors, of the whole net.

    Raises UsageError where they do not fall as far, naming what can be reached.
    """
    targets = {"macs": speedup, "params": params}
    wanted = {what: target for what, target in targets.items() if target is not None}
    if not wanted or min(wanted.values()) < 1:
        raise UsageError(
            "a budget is a factor of 1 or more", hint="give a speedup, a factor of parameters, or both"
        )
    before = counts.true(coupling, {})
    if not (before.flops if speedup is not None else before.params):
        raise sizeless(coupling)

    def reached(rate: float) -> float:
        rates, _ = group_rates(coupling, dict.fromkeys(layers, rate), coupled=coupled)
        sizes = group_counts(coupling, rates, round_to=round_to, least=least)
        after = counts.true(coupling, coupling.choose(sizes))
        ratios = {"macs": before.flops / max(1, after.flops), "params": before.params / max(1, after.params)}
        return min(ratios[what] / target for what, target in wanted.items())

    return lowest_rate(reached)


def sizeless(coupling: Coupling) -> UsageError:
    """Why no filter can be counted: the first layer whose shape is missing."""
    net, cause = coupling.model.net, next(iter(coupling.shaped.unknown.values()), None)
    if cause is None:
        return UsageError("the net has no filters that could be pruned", path=net.path)
    return UsageError(
        f'no size of a layer is known: layer "{cause.layer}": {cause.message}', path=net.path, line=cause.line,
        hint="give every input's shape with --input-shape",
    )  # fmt: skip


def lowest_rate(reached: Callable[[float], float], steps: int = 20) -> float:
    """The lowest rate at which ``reached``, what is reached over what is wanted, is 1; by bisection to 2^-steps.

    Raises UsageError where even the highest rate does not reach it, naming the share it reaches.
    """
    if reached(0.0) >= 1:
        return 0.0
    low, high = 0.0, 1 - 2.0**-steps
    if (most := reached(high)) < 1:
        raise UsageError(
            f"the budget cannot be met by these layers, they reach {most:.1%} of it", hint="ask for less"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) >= 1 else (middle, high)
    return high
