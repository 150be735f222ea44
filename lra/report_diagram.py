"""Two nets as layered diagrams beside each other: boxes by depth, as SVG; what changed is marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from caffe_proto.diff import Part
from caffe_proto.graph import Value
from caffe_proto.layers.spec import text

from .report import Layer

_WIDTH, _GAP, _LINE, _SPACE = 184, 18, 14, 20  # of a box, between boxes, of a line of text, between depths
_LEAST = 0.7  # of its size a diagram keeps, to be read; a narrower place scrolls
_LETTERS, _BOLD = 26, 23  # that a line of a box holds, and its first

Shown = Callable[[str], str]


@dataclass
class _Box:
    """A layer on one side, with the layers that rewrite what it writes; ``depth`` is its place from the top."""

    layer: Layer
    parts: list[Part]
    depth: int
    above: set[int]
    within: list[Layer] = field(default_factory=list)
    x: float = 0

    @property
    def lines(self) -> list[str]:
        """Name, kind, MACs, and the names of the layers that rewrite it; a chain has a line a member."""
        first = self.parts[0]
        macs = self.layer.row.total(self.parts, "macs")
        said = [self.layer.name if len(self.parts) > 1 else first.name]
        if len(self.parts) > 1:
            said += [f"{part.name} {part.size}" for part in self.parts]
        else:
            shape = text(first.shape).replace(" ", "") if first.shape else ""
            said.append(" ".join(filter(None, (first.type, shape))))
        if macs:
            said.append(f"{macs:,} MACs")
        return said + [f"+ {one.name}" for one in self.within]

    @property
    def height(self) -> int:
        return _LINE * len(self.lines) + 10

    @property
    def mark(self) -> str:
        """How the box is drawn."""
        if any(layer.changed for layer in (self.layer, *self.within)):
            return "removed" if not self.layer.row.b else "added" if not self.layer.row.a else "changed"
        return "same"


def pair(layers: Sequence[Layer], shown: Shown) -> tuple[str, str]:
    """The first net and the second, drawn to one scale; ``shown`` makes text that may stand in HTML."""
    sides = [_boxes(layers, side) for side in (0, 1)]
    deepest = max((box.depth for boxes in sides for box in boxes), default=-1)
    heights = [
        max((box.height for boxes in sides for box in boxes if box.depth == depth), default=0)
        for depth in range(deepest + 1)
    ]
    tops = [_SPACE / 2 + sum(heights[:depth]) + _SPACE * depth for depth in range(deepest + 1)]
    widest = max((_place(boxes) for boxes in sides), default=0)
    size = widest + 3 * _GAP, (tops[-1] + heights[-1] + _SPACE / 2 if tops else 0)
    before, after = (
        _draw(boxes, tops, size, name, shown)
        for boxes, name in zip(sides, ("the net before", "the net after"), strict=True)
    )
    return before, after


def _boxes(layers: Sequence[Layer], side: int) -> list[_Box]:
    """The boxes of one net in the order in which its layers run."""
    placed = [
        (part.node, i, part) for i, layer in enumerate(layers) for part in (layer.row.a, layer.row.b)[side]
    ]
    boxes: list[_Box] = []
    of_layer: dict[int, int] = {}
    makers: dict[Value, int] = {}
    names: dict[Value, str] = {}
    for _, i, part in sorted(placed, key=lambda one: one[0]):
        layer, sources = layers[i], {makers[value] for value in part.reads if value in makers}
        alone = len((layer.row.a, layer.row.b)[side]) == 1
        if alone and len(sources) == 1 and part.tops == tuple(names.get(value, "") for value in part.reads):
            (place,) = sources
            boxes[place].within.append(layer)
        elif i in of_layer:
            place = of_layer[i]
            boxes[place].parts.append(part)
        else:
            place = of_layer[i] = len(boxes)
            depth = max((boxes[source].depth + 1 for source in sources), default=0)
            boxes.append(_Box(layer, [part], depth, sources))
        for value, name in zip(part.writes, part.tops, strict=False):
            makers[value], names[value] = place, name
    return boxes


def _place(boxes: Sequence[_Box]) -> float:
    """Put the boxes of each depth beside each other, below what they read; returns the width."""
    by_depth: dict[int, list[_Box]] = {}
    for box in boxes:
        by_depth.setdefault(box.depth, []).append(box)
    widest = max((len(row) for row in by_depth.values()), default=0) * (_WIDTH + _GAP)
    for depth in sorted(by_depth):
        row = by_depth[depth]
        row.sort(key=lambda box: sum(boxes[i].x for i in box.above) / max(len(box.above), 1))
        for i, box in enumerate(row):
            box.x = widest / 2 + (i - len(row) / 2) * (_WIDTH + _GAP) + _GAP / 2
    return widest


def _draw(
    boxes: Sequence[_Box], tops: Sequence[float], size: tuple[float, float], label: str, shown: Shown
) -> str:
    edges = [_edge(boxes[source], box, tops) for box in boxes for source in sorted(box.above)]
    return (
        f'<svg class="net" role="img" aria-label="{label}" viewBox="0 0 {size[0]:g} {size[1]:g}"'
        f' style="width:min(100%,{size[0]:g}px);--least:{_LEAST * size[0]:.0f}px">'
        + "".join(edges)
        + "".join(_box(box, tops[box.depth], shown) for box in boxes)
        + "</svg>"
    )


def _edge(source: _Box, box: _Box, tops: Sequence[float]) -> str:
    """From one box to the next below it; past the boxes between where there are any."""
    start, end = tops[source.depth] + source.height, tops[box.depth]
    x1, x2 = source.x + _WIDTH / 2, box.x + _WIDTH / 2
    if box.depth == source.depth + 1:
        middle = (start + end) / 2
        path = f"M{x1:g} {start:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {end:g}"
    else:
        start, end = start - source.height / 2, end + box.height / 2
        side = max(source.x, box.x) + _WIDTH + 1.5 * _GAP
        path = (
            f"M{source.x + _WIDTH:g} {start:g}C{side:g} {start:g} {side:g} {end:g} {box.x + _WIDTH:g} {end:g}"
        )
    return f'<path class="edge" d="{path}"/>'


def _box(box: _Box, top: float, shown: Shown) -> str:
    lines, height = box.lines, box.height
    spans = "".join(
        f'<text x="7" y="{15 + _LINE * i}"{_weight(i)}>{shown(_short(line, _LETTERS if i else _BOLD))}</text>'
        for i, line in enumerate(lines)
    )
    place = f'x="{box.x:g}" y="{top:g}" width="{_WIDTH}" height="{height}"'
    return (
        f'<g class="{box.mark}"><title>{shown("; ".join(lines))}</title>'
        f'<rect {place} rx="3"/><svg {place}>{spans}</svg></g>'
    )


def _weight(line: int) -> str:
    return ' class="name"' if line == 0 else ""


def _short(line: str, letters: int) -> str:
    half = letters // 2
    return line if len(line) <= letters else f"{line[:half]}…{line[-half:]}"
