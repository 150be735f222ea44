"""Tables on a terminal and in a pipe; where they do not fit, a few lines a row."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

_GAP = "  "
_COLOURS: dict[str, dict[str, Any]] = {
    "dim": {"dim": True},
    "yellow": {"fg": "yellow"},
    "red": {"fg": "red"},
    "green": {"fg": "green"},
}


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 2,
    total: Sequence[str] | None = None,
    styles: Sequence[str] = (),
) -> None:
    """Print rows under columns; the first ``left`` columns are words, the others figures.

    A terminal too narrow for the columns shows the words of a row in a line, and its figures by name below.
    ``styles`` gives each row a colour, which shows on a terminal only.
    """
    from rich.console import Console

    shown = Console(file=sys.stdout, highlight=False)
    colours = shown.is_terminal and not shown.no_color and not shown.is_dumb_terminal
    fits = not shown.is_terminal or sum(_widths(columns, rows, total)) + 2 * (len(columns) - 1) <= shown.width
    made = list(
        _aligned(columns, rows, left, total) if fits else _stacked(columns, rows, left, total, shown.width)
    )
    bold = {0, len(made) - 1} if fits and total is not None else {0} if fits else set()
    for i, lines in enumerate(made):
        row = i - 1 if fits else i
        colour = _COLOURS.get(styles[row], {}) if 0 <= row < len(styles) else {}
        style = colour | ({"bold": True} if i in bold else {})
        for line in lines:
            click.echo(click.style(line, **style) if style and colours else line)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None) -> list[int]:
    from rich.cells import cell_len

    lines = [columns, *rows, *([total] if total is not None else [])]
    return [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]


def _aligned(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: int, total: Sequence[str] | None
) -> Iterator[list[str]]:
    """A line a row: words to the left, figures to the right."""
    from rich.cells import cell_len

    widths = _widths(columns, rows, total)
    for row in (columns, *rows, *([total] if total is not None else [])):
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            cells.append(cell + space if i < left else space + cell)
        yield [_GAP.join(cells).rstrip()]


def _stacked(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int,
    total: Sequence[str] | None,
    width: int,
) -> Iterator[list[str]]:
    """The words of a row, then its figures by name, in lines no wider than ``width`` where a cell allows it."""
    for row in (*rows, *([total] if total is not None else [])):
        figures = [f"{name} {cell}" for name, cell in zip(columns[left:], row[left:], strict=True) if cell]
        yield [*_filled([cell for cell in row[:left] if cell], "", width), *_filled(figures, _GAP, width)]


def _filled(parts: Sequence[str], indent: str, width: int) -> Iterator[str]:
    """Parts side by side, in as few lines as they fit; the lines below the first are indented."""
    from rich.cells import cell_len

    line = ""
    for part in parts:
        if line and cell_len(line) + len(_GAP) + cell_len(part) > width:
            yield line
            line, indent = "", _GAP
        line = f"{line}{_GAP}{part}" if line else indent + part
    if line:
        yield line
