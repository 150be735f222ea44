"""Groups of filters that must keep the same channels, found in a net before anything is touched.

Every filter makes a channel; the layers behind hand channels on, join them, or need them all. What is joined,
by an Eltwise, a depthwise convolution or a shared weight, is one *unit*: it goes everywhere or nowhere. Layers
that have units in common are a *group*. What no channel can be followed through freezes what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from caffe_proto.errors import PlanError
from caffe_proto.graph import Graph, Value, build
from caffe_proto.layers.channels import STAYS, Book, Channels, Ids, Labels
from caffe_proto.model import Model
from caffe_proto.net import nearest
from caffe_proto.shape_inference import InputShapes, Shaped, infer

from .groups import Consumer, Group, Member, Units


@dataclass(frozen=True, eq=False)
class Coupling:
    """A net looked at: its groups, and what each layer holds of its channels.

    ``notes`` are, by node, what its layer said; ``labels`` the ids along the channels of each value;
    ``unit_of`` gives the unit of each id over the whole net. Arrays of ids are those of ``caffe_proto.layers.channels``.
    """

    model: Model
    shaped: Shaped
    groups: tuple[Group, ...]
    notes: Mapping[int, Channels] = field(repr=False)
    labels: Mapping[Value, Labels] = field(repr=False)
    book: Book = field(repr=False)
    unit_of: np.ndarray = field(repr=False)

    @cached_property
    def by_layer(self) -> dict[str, tuple[Group, Member]]:
        """The group of each layer with filters, in net order."""
        found = {member.layer: (group, member) for group in self.groups for member in group.members}
        return {name: found[name] for name in self.filters}

    def member(self, layer: str) -> tuple[Group, Member]:
        """The group of a layer; raises PlanError where it has no filters here."""
        if layer not in self.by_layer:
            hint = nearest(layer, list(self.by_layer))
            raise PlanError(f'"{layer}" has no filters that could go', path=self.model.net.path, hint=hint)
        return self.by_layer[layer]

    def removed(self, kept: Mapping[str, Sequence[int]], *, masks: bool = False) -> np.ndarray:
        """Which ids go, bool, if each layer named keeps these output channels; others follow what they are tied to.

        With ``masks`` each layer stands for itself: a channel made of several goes where all of them do.
        Raises PlanError where layers want different channels of one unit, or one must stay.
        """
        here = {name: channels for name, channels in kept.items() if name in self.by_layer}
        if masks:
            return self.going(
                {name: _chosen(self.filters[name], name, one) for name, one in here.items()}, all
            )
        gone = np.zeros(self.book.count, bool)
        asked = np.zeros(self.book.count, bool)
        for name, channels in here.items():
            gone[self.filters[name]] = ~_chosen(self.filters[name], name, channels)
            asked[self.filters[name]] = True
        by_unit = np.zeros(int(self.unit_of.max(initial=-1)) + 1, bool)
        by_unit[self.unit_of[gone]] = True
        for note in self.notes.values():
            if note.filters is None:
                continue
            wanted = by_unit[self.unit_of[note.filters]]
            wrong = asked[note.filters] & (wanted != gone[note.filters])
            if wrong.any():
                self._refuse_split(note, int(np.flatnonzero(wrong)[0]), here)
        gone = by_unit[self.unit_of]
        self._check(gone)
        return gone

    def choose(
        self,
        counts: Mapping[int, int],
        scores: Mapping[str, np.ndarray] | None = None,
        reduce: str = "mean",
    ) -> dict[str, tuple[int, ...]]:
        """The channels that the layers of some groups keep: ``counts`` units of each group, by its index.

        ``scores`` by layer, see ``Group.scores``; without any the last units are kept.
        """
        keep: dict[str, tuple[int, ...]] = {}
        for index, count in counts.items():
            group = self.groups[index]
            given = np.zeros(group.channels) if scores is None else group.scores(scores, reduce)
            keep.update(group.spread(group.choose(given, count)))
        return keep

    def going(
        self, stays: Mapping[str, np.ndarray], of_sum: Callable[[Sequence[bool]], bool] = all
    ) -> np.ndarray:
        """Which ids go, bool, if each layer keeps the filters that ``stays`` marks and nothing is tied.

        A depthwise filter that is not named goes with the channel it reads, and a sum as ``of_sum`` says of
        whether each of its terms goes.
        """
        gone = np.zeros(self.book.count, bool)
        for note in self.notes.values():
            if note.filters is not None and note.layer in stays:
                gone[note.filters] = ~stays[note.layer]
            elif note.filters is not None and note.depthwise and note.bottoms[0] is not None:
                read = removed_places(gone, note.bottoms[0].ids)
                gone[note.filters] = np.repeat(read, len(note.filters) // len(read))
            for made, parts in note.sums:
                terms = np.stack([removed_places(gone, part) for part in parts])
                gone[made] = [of_sum(column) for column in terms.T.tolist()]
        return gone

    def _refuse_split(self, note: Channels, channel: int, kept: Mapping[str, Sequence[int]]) -> None:
        group, member = self.by_layer[note.layer]
        unit = member.units[channel]
        other = next(
            one.layer
            for one in group.members
            if one.layer in kept and set(np.flatnonzero(one.units == unit).tolist()) - set(kept[one.layer])
        )
        raise PlanError(
            f'keeps channel {channel}, which must go with one that "{other}" does not keep',
            path=self.model.net.path,
            layer=note.layer,
            hint="keep the same channels in all layers of the group, or only mask",
        )

    def _check(self, gone: np.ndarray) -> None:
        """Raise PlanError where units that must stay are gone, or too many are."""
        path = self.model.net.path
        for group, member in self.by_layer.values():
            lost = np.flatnonzero(gone[self.filters[member.layer]] & np.isin(member.units, group.fixed))
            if len(lost):
                what = "all its channels" if group.frozen else f"channel {lost[0]}"
                why = group.why[int(member.units[lost[0]])]
                raise PlanError(f"must keep {what}: {why}", path=path, layer=member.layer)
        for ids, why in self.book.never_empty:
            if removed_places(gone, ids).all():
                raise PlanError(why, path=path, hint="keep one at least")
        for ids, why in self.book.blocks:
            left = (~removed_places(gone, ids)).sum(1).tolist()
            if len(set(left)) > 1:
                raise PlanError(f"{why}, and would leave {' and '.join(map(str, left))}", path=path)

    @cached_property
    def filters(self) -> dict[str, Ids]:
        """The ids that each layer makes."""
        return {note.layer: note.filters for note in self.notes.values() if note.filters is not None}


def removed_places(gone: np.ndarray, ids: Ids) -> np.ndarray:
    """Which places of an axis go, of the shape of its ids."""
    return (ids != STAYS) & gone[ids] if len(gone) else np.zeros(ids.shape, bool)


def _chosen(filters: Ids, layer: str, channels: Sequence[int]) -> np.ndarray:
    """The filters that stay, (channels,) bool."""
    count = len(filters)
    found = np.zeros(count, bool)
    for channel in channels:
        if not 0 <= channel < count or found[channel]:
            what = "names twice" if 0 <= channel < count else "does not have"
            raise PlanError(f"keeps channel {channel}, which it {what}: it has {count}", layer=layer)
        found[channel] = True
    if not found.any():
        raise PlanError("would keep no channel", layer=layer, hint="keep one")
    return found


def find(model: Model, inputs: InputShapes | None = None) -> Coupling:
    """Follow the channels through a net. ``inputs`` gives or overrides shapes of source blobs.

    Layers that are not understood, or whose shapes are not known, freeze what they read, with the reason.
    """
    shaped = infer(build(model.net), inputs, partial=True)
    return follow(model, shaped)


def follow(model: Model, shaped: Shaped) -> Coupling:
    """``find`` for a net whose shapes have been inferred, all of them or a part."""
    return _Walk(model, shaped).coupling()


class _Walk:
    """One pass over a graph, calling the ``channels`` column of the layer table; then what is tied is joined."""

    def __init__(self, model: Model, shaped: Shaped) -> None:
        self.model = model
        self.shaped = shaped
        self.graph: Graph = shaped.graph
        self.book = Book()
        self.notes: dict[int, Channels] = {}
        self.labels: dict[Value, Labels] = {}
        for index in range(len(self.graph.nodes)):
            self._visit(index)
        for name in self.graph.outputs:
            self._stay(self.graph.final[name], f'they are the net\'s output "{name}"')
        self._share()
        self._refuse_namesakes()

    def _visit(self, index: int) -> None:
        node = self.graph.nodes[index]
        if index in self.shaped.unknown or node.spec is None:
            error = self.shaped.unknown.get(index) or node.problem
            why = error.message if error else "its shape is not known"
            for value in node.inputs:
                self._stay(value, f'{node.layer.type} "{node.name}" reads them: {why}')
            return
        bottoms = tuple(self.labels.get(value) for value in node.inputs)
        note = Channels(
            self.book,
            node.name,
            node.layer.type,
            bottoms,
            self.shaped.bottoms(index),
            self.shaped.tops(index),
        )
        node.spec.channels(note, node.params)
        self.notes[index] = note
        self.labels.update({Value(index, top): labels for top, labels in note.tops.items()})

    def _stay(self, value: Value, reason: str) -> None:
        if value in self.labels:
            self.book.stay(self.labels[value].ids, reason)

    def _share(self) -> None:
        """Tie what layers that share a learnt blob hold in it."""
        owners: dict[str, tuple[Channels, int]] = {}
        for index, note in self.notes.items():
            for blob, spec in enumerate(self.graph.nodes[index].layer.param_specs):
                if not spec.name:
                    continue
                first, other = owners.setdefault(spec.name, (note, blob))
                if first is not note:
                    self._tie_blobs(first, other, note, blob, spec.name)

    def _refuse_namesakes(self) -> None:
        """Layers of one name cannot be told apart in a plan, nor their weights in a file."""
        by_name: dict[str, list[Channels]] = {}
        for note in self.notes.values():
            by_name.setdefault(note.layer, []).append(note)
        for name, notes in by_name.items():
            for note in notes if len(notes) > 1 else ():
                for cut in note.cuts:
                    self.book.stay(cut.ids.ravel(), f'{len(notes)} layers are called "{name}"')

    def _tie_blobs(self, first: Channels, there: int, note: Channels, here: int, name: str) -> None:
        both = [
            {(cut.axis, cut.ids.shape): cut.ids for cut in one.cuts if cut.blob == blob}
            for one, blob in ((first, there), (note, here))
        ]
        reason = f'"{first.layer}" and "{note.layer}" share the weight "{name}"'
        for key in dict.fromkeys((*both[0], *both[1])):
            left, right = (one.get(key) for one in both)
            if left is not None and right is not None:
                self.book.tie(left.ravel(), right.ravel(), reason)
            else:
                self.book.stay((left if left is not None else both[1][key]).ravel(), reason)

    def coupling(self) -> Coupling:
        """The groups."""
        unit_of = self._join()
        reasons = self._reasons(unit_of)
        sections = self._sections(unit_of, reasons)
        group_of = self._group_units(unit_of, sections)
        groups = self._groups(unit_of, group_of, reasons, sections)
        return Coupling(self.model, self.shaped, groups, self.notes, self.labels, self.book, unit_of)

    def _join(self) -> np.ndarray:
        """The unit of every id."""
        left, right = (
            np.concatenate([*side, np.empty(0, int)]).astype(int) for side in _sides(self.book.ties)
        )
        return _components(self.book.count, left, right)

    def _reasons(self, unit_of: np.ndarray) -> dict[int, str]:
        """The units that must stay, with the first reason."""
        found: dict[int, str] = {}
        for stay in self.book.stays:
            for unit in np.unique(unit_of[stay.ids]).tolist():
                found.setdefault(unit, stay.reason)
        return found

    def _sections(self, unit_of: np.ndarray, reasons: dict[int, str]) -> list[dict[int, int]]:
        """For each rule of equal blocks, the block that each unit lies in; void rules are left out.

        Where a unit lies in several blocks, but not in all alike, all of the rule must stay.
        """
        found: list[dict[int, int]] = []
        for ids, why in self.book.blocks:
            units = unit_of[ids]
            names, place = np.unique(units, return_inverse=True)
            counts = np.zeros((len(names), len(ids)), int)
            np.add.at(counts, (place.ravel(), np.repeat(np.arange(len(ids)), ids.shape[1])), 1)
            if (counts == counts[:, :1]).all():
                continue
            if ((counts > 0).sum(1) == 1).all() and len(set(counts.max(1).tolist())) == 1:
                found.append(dict(zip(names.tolist(), counts.argmax(1).tolist(), strict=True)))
            else:
                for unit in names.tolist():
                    reasons.setdefault(unit, why)
        return found

    def _group_units(self, unit_of: np.ndarray, sections: list[dict[int, int]]) -> np.ndarray:
        """The group of every unit: those of one layer, or under one rule, are together."""
        together = [unit_of[note.filters] for note in self.notes.values() if note.filters is not None]
        together += [np.array(list(section)) for section in sections]
        left, right = _sides([(units[:-1], units[1:]) for units in together])
        count = int(unit_of.max(initial=-1)) + 1
        empty = np.empty(0, int)
        return _components(count, np.concatenate([*left, empty]), np.concatenate([*right, empty]))

    def _groups(
        self,
        unit_of: np.ndarray,
        group_of: np.ndarray,
        reasons: Mapping[int, str],
        sections: list[dict[int, int]],
    ) -> tuple[Group, ...]:
        by_group: dict[int, list[Channels]] = {}
        for note in self.notes.values():
            if note.filters is not None:
                by_group.setdefault(int(group_of[unit_of[note.filters[0]]]), []).append(note)
        consumers = self._consumers(unit_of, group_of)
        empties: dict[int, list[np.ndarray]] = {}
        for ids, _ in self.book.never_empty:
            if (ids != STAYS).all():
                units = np.unique(unit_of[ids])
                empties.setdefault(int(group_of[units[0]]), []).append(units)
        made = []
        for index, (key, notes) in enumerate(by_group.items()):
            order = np.concatenate([unit_of[note.filters] for note in notes])
            _, first = np.unique(order, return_index=True)
            names = {int(unit): i for i, unit in enumerate(order[np.sort(first)])}
            own = {note.layer for note in notes}
            why = {names[unit]: reasons[unit] for unit in names if unit in reasons}
            cells = _cells(names, [section for section in sections if names.keys() & section.keys()], why)
            made.append(
                Group(
                    index,
                    tuple(self._member(note, unit_of, names) for note in notes),
                    len(names),
                    tuple(one for one in consumers.get(key, ()) if one.layer not in own),
                    tuple(sorted(why)),
                    why,
                    cells,
                    tuple(
                        tuple(names[unit] for unit in units.tolist())
                        for units in empties.get(key, ())
                        if len(units) < len(names) and all(unit in names for unit in units.tolist())
                    ),
                )
            )
        return tuple(made)

    def _member(self, note: Channels, unit_of: np.ndarray, names: Mapping[int, int]) -> Member:
        units = np.array([names[unit] for unit in unit_of[note.filters].tolist()])
        return Member(note.layer, note.type, units, note.depthwise)

    def _consumers(self, unit_of: np.ndarray, group_of: np.ndarray) -> dict[int, list[Consumer]]:
        """For each group, the layers that hold or count ids of it."""
        found: dict[int, list[Consumer]] = {}
        for note in self.notes.values():
            held = [cut.ids.ravel() for cut in note.cuts] or [
                value
                for setting in note.settings
                for value in setting.values
                if isinstance(value, np.ndarray)
            ]
            if not held:
                continue
            places: dict[int, int] = {}
            for ids in held:
                groups, counts = np.unique(group_of[unit_of[ids[ids != STAYS]]], return_counts=True)
                for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
                    places[group] = max(count, places.get(group, 0))
            for group, count in places.items():
                found.setdefault(group, []).append(Consumer(note.layer, note.type, count))
        return found


def _sides(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    both = list(pairs)
    return [left.ravel() for left, _ in both], [right.ravel() for _, right in both]


def _components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The connected component of each of ``count`` points, by edges."""
    edges = coo_array((np.ones(len(left), bool), (left, right)), shape=(count, count))
    return np.asarray(connected_components(edges, directed=False)[1]) if count else np.empty(0, int)


def _cells(
    names: Mapping[int, int], sections: list[dict[int, int]], why: dict[int, str]
) -> tuple[Units, ...]:
    """Parts of a group's units that keep equally many, so that every rule of equal blocks holds.

    Where the rules do not fit one another, all of their units must stay; ``why`` then says so.
    """
    parts: dict[tuple[int, ...], list[int]] = {}
    for unit, name in names.items():
        signature = tuple(section.get(unit, STAYS) for section in sections)
        if any(block != STAYS for block in signature):
            parts.setdefault(signature, []).append(name)
    for position, section in enumerate(sections):
        blocks = [signature[position] for signature in parts if signature[position] != STAYS]
        if len({blocks.count(block) for block in set(section.values())}) > 1:
            reason = "grouped convolutions divide them in ways that do not fit one another"
            why.update({name: why.get(name, reason) for part in parts.values() for name in part})
            return ()
    return tuple(tuple(sorted(part)) for part in parts.values())


def listing(coupling: Coupling) -> list[tuple[str, str, str, str]]:
    """Every group and layer as rows of text, for a look before anything is touched.

    (group, layer, channels, remark): first the layers whose filters go, then, with a ">", those that follow.
    """
    rows = []
    for group in coupling.groups:
        number = str(group.index + 1)
        for member in group.members:
            own = f"{member.channels} of {group.channels}" if len(group.members) > 1 else str(member.channels)
            rows.append((number, member.layer, own, _remark(group)))
        rows += [(number, f"> {one.layer}", str(one.places), one.type) for one in group.consumers]
    return rows


def _remark(group: Group) -> str:
    if group.frozen:
        return f"frozen: {group.frozen}"
    parts = [f"{len(group.fixed)} must stay: {group.why[group.fixed[0]]}"] if group.fixed else []
    parts += [f"{len(group.cells)} parts keep equally many"] if group.cells else []
    return "; ".join(parts)
