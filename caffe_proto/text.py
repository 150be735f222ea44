"""Protobuf text format as fields with spans, and edits that leave every other character alone.

Knows no Caffe and no schema: a value is the text that stands in the file. What the reader accepts is
what protobuf's own reader accepts: ``name: value``, ``name { }``, ``name < >``, lists ``[a, b]``,
adjacent strings, optional ``,`` or ``;`` after a field, ``#`` comments.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from .errors import PrototxtError

_TOKEN = re.compile(
    r"""
      (?P<skip>   (?:[ \t\r\n\f\v\ufeff]++|\#[^\n]*+)++ )
    | (?P<string> "[^"\\\n]*+(?:\\.[^"\\\n]*+)*+" | '[^'\\\n]*+(?:\\.[^'\\\n]*+)*+' )
    | (?P<number> (?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?[fF]?(?![\w.]) | 0[xX][0-9a-fA-F]++(?!\w) )
    | (?P<name>   [A-Za-z_][\w]* )
    | (?P<punct>  [{}<>\[\]:;,\-./] )
    """,
    re.VERBOSE | re.ASCII,
)
_ESCAPE = re.compile(
    rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))|(.))", re.DOTALL
)
_SIMPLE_ESCAPES = {
    b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v",
    b"\\": b"\\", b"'": b"'", b'"': b'"', b"?": b"?",
}  # fmt: skip
_CLOSING = {"{": "}", "<": ">"}
_DEEPEST = 100  # blocks within blocks; protobuf's binary reader stops there too, and nets need six
_CONFLICT = re.compile(r"^(?:<{7}|={7}|>{7})(?![<=>])", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value that is no message: ``kind`` is "string", "number" or "name"; ``text`` as it stands."""

    kind: str
    text: str
    start: int
    end: int

    @property
    def string(self) -> str:
        """The decoded string (adjacent pieces joined); the bare text of a name or number."""
        if self.kind != "string":
            return self.text
        pieces = (token.group("string") for token in _TOKEN.finditer(self.text))
        raw = b"".join(_unescape(piece[1:-1]) for piece in pieces if piece is not None)
        return raw.decode("utf-8", "surrogateescape")


def _unescape(text: str) -> bytes:
    def one(match: re.Match[bytes]) -> bytes:
        octal, hexadecimal, short, long, simple = match.groups()
        if octal is not None:
            return bytes([int(octal, 8) & 0xFF])
        if hexadecimal is not None:
            return bytes([int(hexadecimal, 16)])
        if point := short or long:
            return _encoded(int(point, 16))
        return _SIMPLE_ESCAPES.get(simple, simple)

    return _ESCAPE.sub(one, text.encode("utf-8", "surrogateescape"))


def _encoded(point: int) -> bytes:
    """A code point in UTF-8; the replacement character for one that does not exist."""
    return chr(point if point < 0x110000 else 0xFFFD).encode("utf-8", "replace")


def _is_control(character: str) -> bool:
    """Whether a character stands in binary files only."""
    return character < " " and character not in "\t\n\v\f\r"


def integer(raw: str) -> int:
    """The number an integer's text stands for, octal behind 0, hexadecimal behind 0x; else ValueError."""
    digits = raw.removeprefix("-")
    if not digits[:1].isdigit():
        raise ValueError(f"no integer: {raw!r}")
    base = 16 if digits[:2].lower() == "0x" else 8 if digits.startswith("0") else 10
    value = int(digits, base)
    return -value if raw.startswith("-") else value


@dataclass(frozen=True, slots=True)
class Field:
    """``name`` and its value; [start, end) covers both, without a trailing separator.

    A list ``dim: [1, 3]`` becomes one field an element, all with the span of the whole list.
    """

    name: str
    value: Scalar | Message
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Message:
    """The fields between two braces (or of the whole file); [start, end) lies inside the braces."""

    fields: tuple[Field, ...]
    start: int
    end: int

    def all(self, name: str) -> Iterator[Field]:
        """The fields of that name, in file order."""
        return (field for field in self.fields if field.name == name)

    def last(self, name: str) -> Field | None:
        """The field of that name that counts, or None."""
        return next((field for field in reversed(self.fields) if field.name == name), None)

    def messages(self, name: str) -> Iterator[Message]:
        """The values of the fields of that name that are messages."""
        return (field.value for field in self.all(name) if isinstance(field.value, Message))

    def strings(self, name: str) -> tuple[str, ...]:
        """The decoded scalar values of that name."""
        return tuple(field.value.string for field in self.all(name) if isinstance(field.value, Scalar))

    def string(self, name: str, default: str = "") -> str:
        """The last scalar value of that name, decoded."""
        values = self.strings(name)
        return values[-1] if values else default


@dataclass(frozen=True)
class Document:
    """A parsed file: its text, its fields, and where its lines begin."""

    text: str
    root: Message
    path: str | None = None

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *(match.end() for match in re.finditer("\n", self.text))]

    def line(self, offset: int) -> int:
        """The line, counted from 1, that holds the character at ``offset``."""
        return bisect_right(self._line_starts, offset)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


class _Reader:
    """A recursive-descent reader over the tokens of one file."""

    def __init__(self, text: str, path: str | None) -> None:
        self.text = text
        self.path = path
        self.tokens = self._scan()
        self.token = next(self.tokens)
        self.previous_end = 0
        self.depth = 0

    def fail(self, message: str, offset: int) -> PrototxtError:
        return PrototxtError(message, path=self.path, line=self.text.count("\n", 0, offset) + 1)

    def _scan(self) -> Iterator[_Token]:
        position, match = 0, _TOKEN.match
        length = len(self.text)
        while position < length:
            found = match(self.text, position)
            if found is None:
                raise self.fail(self._unreadable(position), position)
            kind = found.lastgroup or ""
            if kind != "skip":
                yield _Token(kind, found.group(), position, found.end())
            position = found.end()
        while True:
            yield _Token("end", "", length, length)

    def _unreadable(self, position: int) -> str:
        character = self.text[position]
        if character in "\"'":
            return "a string is not closed on its line"
        if character == "\0" or not character.isprintable():
            more = "; this is a binary file, try: caffe-lra recover" if _is_control(character) else ""
            return f"found the byte {character!r}, not text; is this a prototxt?{more}"
        return f"unexpected {self.text[position : position + 20].split()[0]!r}"

    def take(self) -> _Token:
        token, self.token = self.token, next(self.tokens)
        self.previous_end = token.end
        return token

    def accept(self, text: str) -> bool:
        if self.token.kind == "punct" and self.token.text == text:
            self.take()
            return True
        return False

    def fields(self, closing: str, opened: int) -> tuple[Field, ...]:
        found: list[Field] = []
        while True:
            token = self.token
            if token.kind == "end":
                if closing:
                    line = self.text.count("\n", 0, opened) + 1
                    raise self.fail(
                        f"the file ends inside the block opened on line {line}: missing {closing!r}",
                        token.start,
                    )
                return tuple(found)
            if token.kind == "punct" and token.text in "}>":
                if token.text == closing:
                    return tuple(found)
                wanted = f"expected {closing!r}" if closing else "no block is open"
                raise self.fail(f"unexpected {token.text!r}: {wanted}", token.start)
            self.field(found)

    def field(self, found: list[Field]) -> None:
        start = self.token.start
        name = self.name()
        colon = self.accept(":")
        token = self.token
        if token.kind == "punct" and token.text in _CLOSING:
            values: list[Scalar | Message] = [self.message()]
        elif token.kind == "punct" and token.text == "[":
            values = self.list(name)
            if not colon and any(isinstance(value, Scalar) for value in values):
                raise self.fail(f"after {name!r} expected ':'", token.start)
        elif not colon:
            what = "the file ends" if token.kind == "end" else f"found {token.text!r}"
            raise self.fail(f"after {name!r} expected ':' or '{{', {what}", token.start)
        else:
            values = [self.scalar(name)]
        end = self.previous_end
        found.extend(Field(name, value, start, end) for value in values)
        if not self.accept(","):
            self.accept(";")

    def name(self) -> str:
        token = self.token
        if token.kind == "punct" and token.text == "[":  # an extension, kept as it stands
            start = self.take().start
            while self.token.kind in ("name", "punct") and self.token.text != "]":
                self.take()
            if not self.accept("]"):
                raise self.fail("an extension name is not closed", start)
            return self.text[start : self.previous_end]
        if token.kind != "name":
            what = "the file ends" if token.kind == "end" else f"found {token.text!r}"
            raise self.fail(f"expected a field name, {what}", token.start)
        return self.take().text

    def message(self) -> Message:
        opening = self.take()
        if self.depth == _DEEPEST:
            raise PrototxtError("blocks are nested too deeply to be a net", path=self.path)
        self.depth += 1
        fields = self.fields(_CLOSING[opening.text], opening.start)
        self.depth -= 1
        end = self.take().start
        return Message(fields, opening.end, end)

    def list(self, name: str) -> list[Scalar | Message]:
        self.take()
        values: list[Scalar | Message] = []
        while not self.accept("]"):
            if values and not self.accept(","):
                raise self.fail(
                    f"in the list of {name!r} expected ',' or ']', found {self.token.text!r}",
                    self.token.start,
                )
            is_message = self.token.kind == "punct" and self.token.text in _CLOSING
            values.append(self.message() if is_message else self.scalar(name))
        return values

    def scalar(self, name: str) -> Scalar:
        first = self.take()
        if first.kind == "string":
            while self.token.kind == "string":
                self.take()
            return Scalar(
                "string", self.text[first.start : self.previous_end], first.start, self.previous_end
            )
        if first.kind == "punct" and first.text == "-" and self.token.kind in ("number", "name"):
            value = self.take()
            return Scalar(value.kind, "-" + value.text, first.start, value.end)
        if first.kind in ("number", "name"):
            return Scalar(first.kind, first.text, first.start, first.end)
        what = "the file ends" if first.kind == "end" else f"found {first.text!r}"
        raise self.fail(f"expected a value for {name!r}, {what}", first.start)


def parse(text: str, path: object = None) -> Document:
    """Read a file's text; raises PrototxtError with file and line where it is not text format."""
    name = None if path is None else str(path)
    try:
        return Document(text, Message(_Reader(text, name).fields("", 0), 0, len(text)), name)
    except PrototxtError:
        if mark := _CONFLICT.search(text):
            line = text.count("\n", 0, mark.start()) + 1
            raise PrototxtError(
                f"here stands {mark.group()!r}, the mark of a merge conflict that nobody resolved",
                path=name,
                line=line,
                hint="keep one of the two sides",
            ) from None
        raise


@dataclass(frozen=True, order=True, slots=True)
class Edit:
    """Put ``text`` in the place of the characters [start, end)."""

    start: int
    end: int
    text: str


def splice(text: str, edits: Iterable[Edit]) -> str:
    """Apply edits that do not overlap; every other character stays. Raises ValueError on an overlap."""
    pieces: list[str] = []
    position = 0
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end)):
        if edit.start < position:
            raise ValueError(f"edits overlap at character {edit.start}")
        pieces += (text[position : edit.start], edit.text)
        position = edit.end
    pieces.append(text[position:])
    return "".join(pieces)


def quote(value: str) -> str:
    """``value`` as a string literal of the text format."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
