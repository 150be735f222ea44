"""Edited copies of a prototxt block, in the file's own manner: indentation, line ends, one line or many.

A block is a span of the file. Edits name fields of messages inside it; what they do not name is copied
character for character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .text import Document, Edit, Field, Message, splice

_SEPARATOR = re.compile(r"[ \t]*[,;]")
_REST_OF_LINE = re.compile(r"[ \t]*(?:#[^\n]*?)?(\r?\n|\Z)")


class Block:
    """Edits to a copy of the characters [start, end) of a document."""

    def __init__(self, document: Document, start: int, end: int) -> None:
        self.document = document
        self.start, self.end = start, end
        self._edits: dict[tuple[int, int], str] = {}
        self._added: list[tuple[tuple[int, int], str]] = []  # behind the field of that span
        self._first: dict[int, list[str]] = {}  # into the empty message that starts there

    def set(self, message: Message, name: str, values: Sequence[str], after: Sequence[str] = ()) -> None:
        """Give a field these literal values, in place of those it has; none removes it.

        A field that is not there is added behind the last of the fields ``after``, or at the message's end.
        """
        old = _spans(message.all(name))
        for span in old[len(values) :] if old else ():
            self._edits[self._whole(span)] = ""
        if not values:
            return
        new = [f"{name}: {value}" for value in values]
        if not old:
            self.add(message, new, after)
            return
        last = min(len(old), len(values)) - 1
        for i in range(last + 1):
            self._edits[old[i]] = new[i]
        for item in new[last + 1 :]:
            self._added.append((old[last], item))

    def remove(self, field: Field) -> None:
        """Leave a field out, with the line it stands on where it stands there alone."""
        self._edits[self._whole((field.start, field.end))] = ""

    def add(self, message: Message, items: Sequence[str], after: Sequence[str] = ()) -> None:
        """Add fields behind the last of those named ``after``, or behind the last field of the message."""
        anchors = [field for field in message.fields if field.name in after] or list(message.fields)
        if not anchors:
            self._first.setdefault(message.start, []).extend(items)
        for item in items if anchors else ():
            self._added.append(((anchors[-1].start, anchors[-1].end), item))

    def text(self) -> str:
        """The edited copy."""
        shifted = [Edit(e.start - self.start, e.end - self.start, e.text) for e in self.edits()]
        return splice(self.document.text[self.start : self.end], shifted)

    def edits(self) -> list[Edit]:
        """What changes, in the document's own positions."""
        replaced = dict(self._edits)
        inserted: list[Edit] = []
        for anchor, item in self._added:
            whole = self._whole(anchor)
            if whole in replaced:  # the field goes; what is added takes its place
                replaced[whole] += self._instead(whole, item)
            else:
                at, new = self._beside(anchor, item)
                inserted.append(Edit(at, at, new))
        for start, items in self._first.items():
            space = "" if self.document.text[start].isspace() else " "
            inserted.append(Edit(start, start, f" {' '.join(items)}{space}"))
        return [*inserted, *(Edit(start, end, new) for (start, end), new in replaced.items())]

    def _instead(self, whole: tuple[int, int], item: str) -> str:
        """The text of an item in the place of a removed field: whole lines for whole lines."""
        removed = self.document.text[whole[0] : whole[1]]
        ending = removed[len(removed.rstrip("\r\n")) :]
        indent = removed[: len(removed) - len(removed.lstrip(" \t"))]
        return f"{indent}{item}{ending}" if ending else f" {item}"

    def _beside(self, anchor: tuple[int, int], item: str) -> tuple[int, str]:
        """Where to add an item behind a field, and the text: a line of its own, or in the same line."""
        end = self._after_separator(anchor[1])
        rest = _REST_OF_LINE.match(self.document.text, end)
        indent = self._indent(anchor[0])
        if indent is None or rest is None or not rest.group(1):
            return end, f" {item}"
        return rest.start(1), f"{rest.group(1)}{indent}{item}"

    def _indent(self, position: int) -> str | None:
        """The white space before a field that begins its line; None where something stands before it."""
        line = self.document.text.rfind("\n", 0, position) + 1
        before = self.document.text[line:position]
        return before if not before.strip() else None

    def _after_separator(self, end: int) -> int:
        found = _SEPARATOR.match(self.document.text, end)
        return found.end() if found else end

    def _whole(self, span: tuple[int, int]) -> tuple[int, int]:
        """A field's span widened to its separator and its line, or to the white space before it."""
        text = self.document.text
        start, end = span[0], self._after_separator(span[1])
        rest = _REST_OF_LINE.match(text, end, self.end)
        indent = self._indent(start)
        if indent is not None and rest is not None and start - len(indent) >= self.start:
            return start - len(indent), rest.end()
        while start > self.start and text[start - 1] in " \t":
            start -= 1
        return start, end


def _spans(fields: object) -> list[tuple[int, int]]:
    """The spans of fields, those of one list counted once."""
    return list(dict.fromkeys((field.start, field.end) for field in fields))  # type: ignore[attr-defined]
