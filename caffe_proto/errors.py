"""Every exception that caffe-lra raises on purpose.

    Error
    ├── UsageError         the request itself cannot be met: options, ranks, budgets
    ├── FileError          a file is missing, truncated, or not what it should be
    │   ├── PrototxtError    text that is not a net in protobuf text format
    │   └── CaffemodelError  bytes that are no Caffe weights
    ├── NetError           the net is refused, as real Caffe would refuse it
    │   ├── UnsupportedError  the net may be sound, but this program does not interpret it
    │   └── ShapeError        blob shapes that do not fit
    ├── WeightsError       the weights do not belong to the net
    └── PlanError          a plan that does not fit the net or the weights

The inner code raises the short cause. ``Error.at`` adds file, line and layer once, further out. The
printed form is one line: ``deploy.prototxt:112: layer "conv4_3": group 3 does not divide num_output 512``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_LONGEST = 2000  # characters of a message
_CANDIDATES, _NAME = 1000, 200  # how many names, and of which length, a misspelt one is compared with


def alike(name: str, known: Sequence[str]) -> str | None:
    """A hint that names the known names closest to a misspelt one, among the last of them; None where none is close."""
    from difflib import get_close_matches

    candidates = [one for one in known[-_CANDIDATES:] if len(one) <= _NAME]
    close = get_close_matches(name, candidates, n=3) if len(name) <= _NAME else []
    return "did you mean " + " or ".join(f'"{one}"' for one in close) + "?" if close else None


def nearest(name: str, known: Sequence[str]) -> str:
    """The same hint, or the first of the known names where none is close."""
    return alike(name, known) or "known: " + ", ".join(known[:8]) + (" ..." if len(known) > 8 else "")


class Error(Exception):
    """Base of all errors; knows where the trouble is and what to do about it."""

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        line: int | None = None,
        layer: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.line = line
        self.layer = layer
        self.hint = hint

    def at(self, *, path: object = None, line: int | None = None, layer: str | None = None) -> Error:
        """Fill in what is not yet known of the place, and return the error itself."""
        if self.path is None and path is not None:
            self.path = str(path)
        if self.line is None:
            self.line = line
        if self.layer is None:
            self.layer = layer
        return self

    def __str__(self) -> str:
        place = self.path or ""
        if self.line is not None:
            place = f"{place}:{self.line}" if place else f"line {self.line}"
        parts = [place] if place else []
        if self.layer is not None:
            parts.append(f'layer "{self.layer}"')
        text = ": ".join([*parts, self.message])
        return _one_line(f"{text}; {self.hint}" if self.hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.path, self.line, self.layer, self.hint))


def _one_line(text: str) -> str:
    """A message as one line that can be read, whatever names are quoted in it."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ... {text[len(text) - _LONGEST // 4 :]}"


def _rebuild(kind: type[Error], message: str, path: str, line: int, layer: str, hint: str) -> Error:
    return kind(message, path=path, line=line, layer=layer, hint=hint)


class UsageError(Error):
    """The request cannot be met: contradictory options, a rank out of range, an unreachable budget."""


class FileError(Error):
    """A file is missing, unreadable, truncated, or not what it should be."""


class PrototxtError(FileError):
    """Text that is not a net in protobuf text format."""


class CaffemodelError(FileError):
    """Bytes that are no Caffe weights."""


class NetError(Error):
    """The net is refused, as real Caffe would refuse it."""


class UnsupportedError(NetError):
    """The net may be sound, but this program does not interpret a layer type or field of it."""


class ShapeError(NetError):
    """Blob shapes that do not fit a layer."""


class WeightsError(Error):
    """The weights do not belong to the net."""


class PlanError(Error):
    """A plan that does not fit the net or the weights."""
