"""The charts of a report: inline SVG by matplotlib, the same bytes for the same figures."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

BEFORE, AFTER, CHOSEN = "#9aa5b1", "#1f6f8b", "#c8553d"
_WIDTH = 7.4  # inches
_BAR = 0.26  # inches a layer
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "caffe-lra",
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Bars:
    """Horizontal bars by layer: a name, a colour and a number each (None: no bar) for every series."""

    title: str
    series: Sequence[tuple[str, str, Sequence[float | None]]]
    mark: float | None = None  # a line across
    counts: bool = False  # 1.5M for 1500000


@dataclass(frozen=True)
class Line:
    """A curve with one point marked."""

    title: str
    xlabel: str
    x: Sequence[float]
    y: Sequence[float]
    marked: tuple[float, float]
    logarithmic: bool = False


def bars(key: str, label: str, names: Sequence[str], parts: Sequence[Bars]) -> str:
    """Bars by layer, the parts side by side; ``key`` begins the ids of the SVG, ``label`` says what it shows."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        places = np.arange(len(names))
        for ax, part in zip(axes, parts, strict=True):
            high = 0.8 / len(part.series)
            for i, (name, colour, numbers) in enumerate(part.series):
                known = [0.0 if number is None else number for number in numbers]
                shift = (i - (len(part.series) - 1) / 2) * high
                ax.barh(places + shift, known, high, color=colour, label=name)
            if part.mark is not None:
                ax.axvline(part.mark, color=CHOSEN, linewidth=0.8)
            ax.set_title(part.title, loc="left", parse_math=False)
            ax.grid(axis="x", linewidth=0.3)
            ax.set_axisbelow(True)
            ax.xaxis.set_major_locator(MaxNLocator(5))
            if part.counts:
                ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            if len(part.series) > 1:
                ax.legend(
                    frameon=False,
                    fontsize=7,
                    loc="lower right",
                    bbox_to_anchor=(1, 1),
                    borderpad=0,
                    ncols=len(part.series),
                )
        axes[0].set_yticks(places)
        axes[0].set_yticklabels([_short(name) for name in names], parse_math=False)
        axes[0].set_ylim(len(names) - 0.4, -0.6)

    return _svg(key, label, (_WIDTH, 0.8 + _BAR * len(names)), draw)


def lines(key: str, label: str, parts: Sequence[Line]) -> str:
    """Curves side by side, each with its point marked."""

    def draw(figure: Any) -> None:
        for ax, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            ax.plot(part.x, part.y, color=AFTER, linewidth=1.2, marker="." if len(part.x) < 8 else "")
            ax.axvline(part.marked[0], color=CHOSEN, linewidth=0.8, linestyle="--")
            ax.plot(*part.marked, "o", color=CHOSEN, markersize=4)
            if part.logarithmic:
                ax.set_yscale("log")
            else:
                ax.set_ylim(0, 1.04)
            ax.set_title(part.title, loc="left", parse_math=False)
            ax.set_xlabel(part.xlabel)
            ax.grid(linewidth=0.3)

    return _svg(key, label, (_WIDTH / 2, 1.8), draw)


def ordered(key: str, label: str, title: str, values: Sequence[float], kept: Sequence[bool]) -> str:
    """Numbers in their order as bars, those that stay in another colour."""

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        colours = [AFTER if one else BEFORE for one in kept]
        ax.bar(np.arange(1, len(values) + 1), values, 0.8, color=colours)
        ax.set_title(title, loc="left", parse_math=False)
        ax.set_xlabel("filter, by norm")
        ax.grid(axis="y", linewidth=0.3)
        ax.set_axisbelow(True)

    return _svg(key, label, (_WIDTH / 2, 1.8), draw)


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:13] + "…" + name[-14:]


def _svg(key: str, label: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """A figure as an element to stand in HTML: no prologue, ids of its own, as wide as its place allows."""
    written = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser may have it
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing, transparent=True)
    source = written.getvalue()
    body = source[source.index("<svg") :]
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.S)
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r'\b(id="|href="#)|url\(#', rf"\g<0>{key}-", tag[0]), body)
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box is not None
    opening = (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="{box[1]}"'
        f' style="max-width:{size[0] * 96:.0f}px">'
    )
    return opening + body[body.index(">") + 1 :].rstrip()
