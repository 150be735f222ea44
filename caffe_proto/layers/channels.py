"""What the ``channels`` column of the layer table writes to: which places of a blob's axis go together.

Each place along one axis of a blob, its channels, has an id. A layer with filters makes new ids, the others
hand on those of their bottoms, tie some to others, or say why some must stay. Learnt blobs and settings are
noted with the ids that they hold or count. Removing a channel is then removing an id wherever it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

Ids = np.ndarray  # int64, one a place; STAYS where nothing may be removed
STAYS = -1


@dataclass(frozen=True, eq=False)
class Labels:
    """The ids along one axis of a blob; the other axes have none."""

    axis: int
    ids: Ids


@dataclass(frozen=True, eq=False)
class Cut:
    """Learnt blob ``blob`` holds these ids along ``axis``.

    ``ids`` of two axes, (g, n): axis 0 falls into g blocks, and each block has n ids of its own along ``axis``.
    ``zero``: whether a channel that is always zero needs zeros here.
    """

    blob: int
    axis: int
    ids: Ids
    zero: bool = True


@dataclass(frozen=True, eq=False)
class Setting:
    """A field in a nested block of the layer whose values are numbers of channels.

    Each value is the count of some ids, or a literal number. ``add``: written where the file has no such field.
    """

    block: tuple[str, ...]
    name: str
    values: tuple[Ids | int, ...]
    add: bool = False


@dataclass(frozen=True, eq=False)
class Stay:
    """Ids that must stay, and why."""

    ids: Ids
    reason: str


@dataclass
class Book:
    """What all layers of a net said. ``count``: how many ids there are.

    ``ties``: arrays that are one id, place by place.
    ``blocks``, (g, n) each: every row must keep as many as the others. ``never_empty``: one of each must stay. Both
    with what is wrong where they do not.
    """

    count: int = 0
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    stays: list[Stay] = field(default_factory=list)
    blocks: list[tuple[Ids, str]] = field(default_factory=list)
    never_empty: list[tuple[Ids, str]] = field(default_factory=list)

    def new(self, count: int) -> Ids:
        """Fresh ids."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def tie(self, left: Ids, right: Ids, reason: str) -> None:
        """Make two arrays one, place by place; what meets a place that stays, stays for that reason."""
        both = (left != STAYS) & (right != STAYS)
        self.ties.append((left[both], right[both]))
        self.stay(np.concatenate([left[~both], right[~both]]), reason)

    def stay(self, ids: Ids, reason: str) -> None:
        """Say that ids must stay."""
        ids = ids[ids != STAYS]
        if len(ids):
            self.stays.append(Stay(ids, reason))


@dataclass
class Channels:
    """Serves one layer: the labels and shapes of its bottoms, and methods that note what follows from them.

    ``filters``: the ids that the layer makes. ``sums``: others, with the arrays they join. ``depthwise``: each of its filters goes with the one channel it reads.
    """

    book: Book
    layer: str
    type: str
    bottoms: tuple[Labels | None, ...]
    in_shapes: tuple[tuple[int, ...], ...]
    out_shapes: tuple[tuple[int, ...], ...]
    tops: dict[int, Labels] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    sums: list[tuple[Ids, tuple[Ids, ...]]] = field(default_factory=list)
    filters: Ids | None = None
    depthwise: bool = False

    def own(self, count: int) -> Ids:
        """New ids, one for each filter of the layer."""
        self.filters = self.book.new(count)
        self.never_empty(self.filters)
        return self.filters

    def places(self, bottom: int, axis: int) -> Ids:
        """The ids of a bottom along an axis; ids along another axis must stay, as the layer mixes those."""
        labels = self.bottoms[bottom]
        if labels is not None and labels.axis == axis:
            return labels.ids
        self.stay(bottom, f"does not work along axis {labels.axis if labels else axis}")
        return np.full(self.in_shapes[bottom][axis], STAYS)

    def stay(self, bottom: int, why: str) -> None:
        """Say that the channels of a bottom must stay."""
        labels = self.bottoms[bottom]
        if labels is not None:
            self.book.stay(labels.ids, self._reason(why))

    def stay_all(self, why: str) -> None:
        """Say that the channels of all bottoms must stay."""
        for bottom in range(len(self.bottoms)):
            self.stay(bottom, why)

    def tie(self, *arrays: Ids) -> None:
        """Make arrays of ids one, place by place."""
        for other in arrays[1:]:
            self.book.tie(arrays[0], other, self._reason("joins them with channels that stay"))

    def joint(self, *arrays: Ids) -> Ids:
        """New ids for what is made of several channels, tied to all of them."""
        made = self.book.new(len(arrays[0]))
        self.tie(made, *arrays)
        self.sums.append((made, arrays))
        return made

    def blocks(self, ids: Ids) -> None:
        """Note that the rows of (g, n) ids must keep equally many."""
        why = self._reason("divides them into groups that must stay of one size")
        if (ids == STAYS).any():
            self.book.stay(ids.ravel(), why)
        else:
            self.book.blocks.append((ids, why))

    def never_empty(self, ids: Ids) -> None:
        """Note that one of these must stay."""
        self.book.never_empty.append((ids, self._reason("would make a top without channels")))

    def cut(self, blob: int, axis: int, ids: Ids, *, zero: bool = True) -> None:
        """Note that a learnt blob holds ids along an axis."""
        self.cuts.append(Cut(blob, axis, ids, zero))

    def setting(self, block: Sequence[str], name: str, *values: Ids | int, add: bool = False) -> None:
        """Note that a field counts ids."""
        self.settings.append(Setting(tuple(block), name, values, add))

    def top(self, index: int, axis: int, ids: Ids) -> None:
        """Give a top its ids."""
        if (ids != STAYS).any():
            self.tops[index] = Labels(axis, ids)

    def refolded(self, bottom: int, shape: Sequence[int]) -> Labels | None:
        """The labels of a bottom whose numbers, in their order, are seen in another shape.

        None where there are none, or where they would lie on no one axis: those must stay.
        """
        labels = self.bottoms[bottom]
        found = _refold(labels, self.in_shapes[bottom], shape) if labels is not None else None
        if found is None:
            self.stay(bottom, "spreads them over more than one axis")
        return found

    def _reason(self, why: str) -> str:
        return f'{self.type} "{self.layer}" {why}'


def _refold(labels: Labels, shape: Sequence[int], target: Sequence[int]) -> Labels | None:
    """Where the ids lie when row-major numbers of one shape are seen in another; None if on no one axis."""
    if not prod(shape):
        return None
    changes = np.flatnonzero(np.diff(labels.ids)) + 1
    run = int(np.gcd.reduce([len(labels.ids), *changes]))
    ids = labels.ids[::run]
    behind = run * prod(shape[labels.axis + 1 :])
    period, step = len(ids) * behind, 1
    for axis in reversed(range(len(target))):
        if behind % step == 0 and (step * target[axis]) % period == 0:
            return Labels(axis, ids[np.arange(target[axis]) * step // behind % len(ids)])
        step *= target[axis]
    return None


def same(c: Channels, _params: Any) -> None:
    """Every number alone: each top has the channels of the first bottom."""
    if c.bottoms[0] is not None:
        for index in range(len(c.out_shapes)):
            c.top(index, c.bottoms[0].axis, c.bottoms[0].ids)


def planes(c: Channels, _params: Any) -> None:
    """Every item of axis 1 alone: each top has the channels of the first bottom."""
    ids = c.places(0, 1)
    for index in range(len(c.out_shapes)):
        c.top(index, 1, ids)


def tied(c: Channels, _params: Any) -> None:
    """Bottoms of one shape joined number by number."""
    axes = {labels.axis for labels in c.bottoms if labels is not None}
    if len(axes) > 1:
        c.stay_all("joins different axes")
    elif axes:
        (axis,) = axes
        c.top(0, axis, c.joint(*(c.places(i, axis) for i in range(len(c.bottoms)))))


def items(c: Channels, _params: Any) -> None:
    """Items of axis 0 are chosen; each top has the channels of the bottom in its place."""
    for index in range(len(c.out_shapes)):
        labels = c.bottoms[index]
        if labels is not None and labels.axis == 0:
            c.stay(index, "chooses among them")
        elif labels is not None:
            c.top(index, labels.axis, labels.ids)


def fixed(c: Channels, _params: Any) -> None:
    """The channels cannot be followed through the layer."""
    c.stay_all("mixes them, or needs all of them")


def ignored(_c: Channels, _params: Any) -> None:
    """The layer reads no number of its bottoms, or none that depends on the channels."""
