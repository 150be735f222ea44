"""What a report of two nets holds: their layers beside each other, curves, times, accuracies, and what made them."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from caffe_proto import __version__
from caffe_proto.cli_nets import recompose
from caffe_proto.diff import Part, diff
from caffe_proto.diff import Row as Difference
from caffe_proto.errors import FileError
from caffe_proto.graph import Value
from caffe_proto.model import Model
from caffe_proto.shape_inference import InputShapes
from hrank import applier as pruning
from hrank.joint import Joint, prunes
from hrank.plan import Plan as PruningPlan

from .merging import merge
from .plan import REFIT, LayerPlan, Plan
from .report_given import Given, Times
from .schemes import ALL_SCHEMES
from .targets import Found, Spectra, Target, find

Array = np.ndarray
Counts = tuple[int | None, int | None]

_PACKAGES = ("numpy", "scipy", "protobuf", "matplotlib")
_POINTS = 256  # of a curve: more cannot be seen


@dataclass(frozen=True)
class Plans:
    """A plan file: its text, and what it says of pruning and of decomposing."""

    text: str
    prune: PruningPlan | None
    decompose: Plan | None

    @classmethod
    def from_json(cls, source: str, path: object = None) -> Plans:
        """A plan of any kind; raises PlanError where it is none."""
        kind = prunes(source, path)
        if kind == "both":
            joint = Joint.from_json(source, path)
            return cls(source, joint.prune, joint.decompose)
        if kind == "prune":
            return cls(source, PruningPlan.from_json(source, path), None)
        return cls(source, None, Plan.from_json(source, path))

    @property
    def kept(self) -> dict[str, str]:
        """The layers left alone, with the reason."""
        parts = [plan.kept for plan in (self.prune, self.decompose) if plan is not None]
        return {name: reason for part in parts for name, reason in part.items()}

    @property
    def targets(self) -> dict[str, Any]:
        """What each plan was made for."""
        named = (("prune", self.prune), ("decompose", self.decompose))
        return {name: plan.target for name, plan in named if plan is not None}


@dataclass(frozen=True)
class Split:
    """A rank of a layer, out of how many, and the scheme whose energies it cuts."""

    scheme: str
    rank: int
    full: int

    @property
    def ratio(self) -> float:
        """The share of the full rank that stays."""
        return self.rank / self.full


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer beside what stands for it.

    ``row``: both sides, with their settings; ``apart``: ``||W' - W|| / ||W||`` of the stored weights, None
    where they cannot be compared; ``channels``: filters before and after, of a pruned one, or with ``masked``
    those that are not zero. ``ms``: measured,
    ``planned_ms``: as the plan predicts them; ``fitted``: the error of responses measured behind a fit.
    """

    row: Difference
    summary: str
    entry: LayerPlan | None = None
    splits: tuple[Split, ...] = ()
    channels: tuple[int, int] | None = None
    ms: tuple[float, float] | None = None
    fitted: float | None = None
    masked: bool = False

    @property
    def name(self) -> str:
        """The layer's name in the first net, where it is there."""
        return self.row.name

    @property
    def macs(self) -> Counts:
        return self.row.pair("macs")

    @property
    def params(self) -> Counts:
        return self.row.pair("params")

    @property
    def apart(self) -> float | None:
        return self.row.weights

    @property
    def error(self) -> float | None:
        """As the plan predicts it."""
        return self.entry.error if self.entry is not None else None

    @property
    def planned_ms(self) -> tuple[float, float] | None:
        return self.entry.ms if self.entry is not None else None

    @property
    def changed(self) -> bool:
        """Whether it computes otherwise than before."""
        costs = (self.macs, self.params)
        return self.row.status not in ("same", "training") or any(old != new for old, new in costs)

    @property
    def treatment(self) -> str:
        """What was done to it, in words."""
        words = ["masked" if self.masked else "pruned"] if self.channels is not None else []
        words += [self.entry.scheme or "rank alone"] if self.entry is not None else []
        if words or not self.changed:
            return " + ".join(words)
        if not self.row.a or not self.row.b:
            return "removed" if self.row.a else "added"
        other = [old for old, new in (self.macs, self.params) if old != new]
        return "narrower input" if other else "other weights" if self.row.status == "weights" else "changed"


@dataclass(frozen=True, eq=False)
class Curve:
    """Energy retained (R,) and singular values relative to the first (R,) at total ranks (R,), and the rank chosen."""

    layer: str
    split: Split
    ranks: Array
    energy: Array
    values: Array

    @property
    def retained(self) -> float:
        """The energy at the rank chosen."""
        return float(np.interp(self.split.rank, self.ranks, self.energy))


@dataclass(frozen=True, eq=False)
class Norms:
    """L2 norms (n,) of a layer's filters, largest first, and which of them stay."""

    layer: str
    norms: Array
    kept: Array


@dataclass(frozen=True)
class Source:
    """A file that was read: what it is, its name, its sha256."""

    role: str
    name: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Rival:
    """A layer in three nets: the original, this one, and a published one, with ranks and MACs; None where it is not there."""

    name: str
    original: int | None
    ranks: tuple[tuple[int, ...], tuple[int, ...]]
    macs: Counts


@dataclass(frozen=True, eq=False)
class Against:
    """A published net beside the new one: layers of the original in both, and all that differs between the two."""

    name: str
    rivals: tuple[Rival, ...]
    differences: tuple[Difference, ...]
    macs: tuple[int, int, int]  # the original's, the new net's, the published one's
    params: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that is told of one change."""

    title: str
    layers: tuple[Layer, ...]
    plans: Plans
    curves: tuple[Curve, ...]
    norms: tuple[Norms, ...]
    given: Given
    sources: tuple[Source, ...]
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    against: tuple[Against, ...] = ()

    def totals(self, what: str) -> tuple[int, int]:
        """``macs`` or ``params`` of both nets, without layers of unknown shape."""
        pairs = [getattr(layer, what) for layer in self.layers]
        return sum(a or 0 for a, _ in pairs), sum(b or 0 for _, b in pairs)

    @property
    def fitted(self) -> bool:
        """Whether the errors of the plan are of responses to images."""
        plan = self.plans.decompose
        return plan is not None and bool(plan.target.get("fit"))


def make(
    title: str, plans: Plans, before: Model, after: Model, given: Given, against: Sequence[Model] = ()
) -> Report:
    """The report of a net, what a plan made of it, the plan, and published nets to compare with.

    Raises PlanError where the plan was made for other weights or names layers that the net lacks, FileError
    where the times given are of layers that the net lacks.
    """
    shapes = given.input_shapes
    middle = before
    for plan in (plans.prune, plans.decompose):
        if plan is not None:
            plan.check(before, sibling=True, force=given.force)
    if plans.prune is not None and plans.decompose is not None:
        middle, _ = pruning.apply(plans.prune, before, sibling=True, force=given.force, input_shapes=shapes)
    if plans.decompose is not None and plans.decompose.merges is not None:
        middle = merge(middle, shapes, plans.decompose.merges).model
    found = find(middle, shapes)
    layers = tuple(_layers(plans, before, middle, after, found, given))
    original = found if middle is before or plans.prune is None else find(before, shapes)
    return Report(
        title,
        layers,
        plans,
        tuple(_curves(layers, found)),
        tuple(_norms(plans.prune, original)),
        given,
        tuple(_sources(before, after, against)),
        _versions(),
        tuple(_notes(plans, before, layers)),
        tuple(_against(layers, before, after, one, shapes) for one in against),
    )


def _layers(
    plans: Plans, before: Model, middle: Model, after: Model, found: Found, given: Given
) -> Iterator[Layer]:
    entries = plans.decompose.layers if plans.decompose is not None else {}
    keeps = plans.prune.layers if plans.prune is not None else {}
    masked = plans.prune is not None and bool(plans.prune.target.get("masks"))
    rows = list(_rows(before, middle, after, given.input_shapes))
    measured = _measured(given.times, {row.name for row, _ in rows})
    for row, summary in rows:
        entry, keep = entries.get(row.name), keeps.get(row.name)
        target = found.targets.get(row.name)
        splits = _splits(entry, target) if entry is not None and target is not None else ()
        channels = (keep.channels or _outputs(row.a), len(keep.keep)) if keep is not None else None
        errors = given.fitted.get(row.name)
        yield Layer(row, summary, entry, splits, channels, measured.get(row.name), errors, masked)


def _measured(times: Times | None, names: set[str]) -> Mapping[str, tuple[float, float]]:
    """Times by layer; raises FileError where one is of no layer here."""
    found = times.layers if times is not None else {}
    for name in found:
        if times is not None and name not in names:
            raise FileError(f'has times of a layer "{name}", which the net lacks', path=times.path)
    return found


def _outputs(parts: Sequence[Part]) -> int:
    return parts[-1].num_output if parts else 0


def _rows(
    before: Model, middle: Model, after: Model, shapes: InputShapes | None
) -> Iterator[tuple[Difference, str]]:
    """The layers of both nets beside each other, and the difference in words."""
    second = diff(middle, after, shapes, recompose).rows
    if middle is before:
        yield from ((row, row.summary() if row.status != "same" else "") for row in second)
        return
    following: dict[tuple[Value, ...], Difference] = {_key(row.a[0]): row for row in second if row.a}
    added = _added(second)
    for first in diff(before, middle, shapes).rows:
        place = _key(first.b[0]) if first.b else ()
        then = following.get(place)
        steps = [row for row in (first, then) if row is not None and row.status != "same"]
        status = steps[-1].status if steps else "same"
        weights = then.weights if then is not None else None
        row = Difference(status, first.a, then.b if then is not None else (), weights=weights)
        yield row, ", then ".join(filter(None, (step.summary() for step in steps)))
        yield from ((one, one.summary()) for one in added.pop(place, ()))
    yield from ((one, one.summary()) for rest in added.values() for one in rest)


def _added(rows: Sequence[Difference]) -> dict[tuple[Value, ...], list[Difference]]:
    """The rows of layers that only the second net has, by the key of the first net's layer in front of them."""
    found: dict[tuple[Value, ...], list[Difference]] = {}
    place: tuple[Value, ...] = ()
    for row in rows:
        if row.a:
            place = _key(row.a[0])
        else:
            found.setdefault(place, []).append(row)
    return found


def _key(part: Part) -> tuple[Value, ...]:
    """What tells a part of one net from the others: what it writes, or its place where it writes nothing."""
    return part.writes or (Value(part.node, -1),)


def _splits(entry: LayerPlan, target: Target) -> tuple[Split, ...]:
    """The ranks of a layer by the scheme whose energies of the weights they cut."""
    if entry.scheme in ("", REFIT):
        return ()
    shown = {"response": ("pca",), "asymmetric-3d": ("spatial", "pca")}.get(entry.scheme, (entry.scheme,))
    pairs = zip(shown, entry.ranks, strict=False)
    full = {name: ALL_SCHEMES[name].max_rank(target.shape, target.geometry.group) for name in shown}
    return tuple(Split(name, rank, full[name]) for name, rank in pairs)


def _curves(layers: Sequence[Layer], found: Found) -> Iterator[Curve]:
    """Of every split layer that has weights here."""
    spectra = Spectra(found)
    for layer in layers:
        for split in layer.splits:
            target = found.targets[layer.name]
            if target.index not in found.blobs:
                continue
            spectrum = spectra.get(target, ALL_SCHEMES[split.scheme])
            adds = spectrum.energies.sum(axis=0)
            values = np.sqrt(np.maximum(adds, 0) / (adds.max() or 1.0))
            ranks = np.arange(1, adds.size + 1) * target.geometry.group
            keep = np.unique(np.linspace(0, adds.size - 1, min(adds.size, _POINTS)).round().astype(int))
            chosen = min(split.rank // target.geometry.group, adds.size) - 1
            keep = np.union1d(keep, [max(chosen, 0)])
            yield Curve(layer.name, split, ranks[keep], spectrum.retained_curve()[keep], values[keep])


def _norms(plan: PruningPlan | None, found: Found) -> Iterator[Norms]:
    for name, entry in plan.layers.items() if plan is not None else ():
        target = found.targets.get(name)
        if target is None or target.index not in found.blobs:
            continue
        kernel = target.kernel(found.blobs[target.index][0])
        norms = np.linalg.norm(kernel.reshape(len(kernel), -1), axis=1)
        kept = np.isin(np.arange(len(kernel)), entry.keep)
        order = np.argsort(-norms, kind="stable")
        yield Norms(name, norms[order], kept[order])


def _against(
    layers: Sequence[Layer], before: Model, after: Model, published: Model, shapes: InputShapes | None
) -> Against:
    """A published net beside the new one, layer by layer of the original."""
    theirs = diff(before, published, shapes, recompose)
    between = diff(after, published, shapes, recompose)
    rows = {row.name: row for row in theirs.rows if row.a}
    rivals = tuple(
        Rival(layer.name, layer.macs[0], (layer.row.ranks, row.ranks), (layer.macs[1], row.pair("macs")[1]))
        for layer in layers
        if layer.row.a and (row := rows.get(layer.name)) is not None
        if layer.changed or layer.row.ranks != row.ranks or row.pair("macs")[0] != row.pair("macs")[1]
    )
    totals = [(*theirs.totals(what), between.totals(what)[0]) for what in ("macs", "params")]
    macs, params = ((first, mine, published) for first, published, mine in totals)
    return Against(
        str(published.net.path),
        rivals,
        tuple(row for row in between.rows if row.status != "same"),
        macs,
        params,
    )


def _sources(before: Model, after: Model, against: Sequence[Model]) -> Iterator[Source]:
    for what, model in (("original", before), ("new", after), *(("other", one) for one in against)):
        paths = (model.net.path, model.weights.path if model.weights is not None else None)
        for kind, path, digest in zip(("net", "weights"), paths, model.fingerprint, strict=True):
            if path:
                yield Source(f"{what} {kind}", str(path), digest)


def _versions() -> dict[str, str]:
    found = {"caffe-lra": __version__, "Python": platform.python_version()}
    return found | {name: metadata.version(name) for name in _PACKAGES}


def _notes(plans: Plans, before: Model, layers: Sequence[Layer]) -> Iterator[str]:
    """What a reader has to know to read the figures right."""
    if before.weights is None:
        yield "The original weights were not given: there are no curves, and weights are not compared."
    if any(None in (*layer.macs, *layer.params) for layer in layers):
        yield "Layers whose shapes are not known are marked ? and are not in the totals."
    schemes = {layer.entry.scheme for layer in layers if layer.entry is not None}
    if schemes & {"response", "asymmetric-3d"}:
        yield (
            "Schemes that are fitted to images cut the energies of responses; their curves show those of the"
            " weights, by the named scheme."
        )
    if plans.prune is not None and plans.decompose is not None:
        yield "Ranks, errors, curves and weight differences of decomposed layers refer to the pruned net."
    for row in (plans.decompose.merges if plans.decompose is not None else None) or ():
        yield (
            f"{' + '.join(row)} became one layer before ranks were chosen: its rank, error, curve and weight difference"
            " are those of the merged layer."
        )
    repairs = plans.prune.target.get("repair") if plans.prune is not None else None
    if repairs and plans.decompose is not None:
        yield (
            f"The pruned net was repaired ({', '.join(map(str, repairs))}) before it was decomposed; the curves and"
            " weight differences here are of the pruned net without the repair."
        )


def stem(prefix: str) -> str:
    """PREFIX, where one of its files is named."""
    for suffix in (".plan.json", ".prototxt", ".caffemodel"):
        if prefix.endswith(suffix):
            return prefix.removesuffix(suffix)
    return prefix


def optional(path: str) -> str | None:
    """The path where there is such a file."""
    return path if Path(path).is_file() else None
