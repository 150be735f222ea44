"""A plan: what to do to which layer, by name, as a small JSON file that people read, edit and compare.

One layer a line, so that a textual diff shows ranks and nothing else. A plan holds the sha256 of the
files it was made for and is refused on others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

from .errors import PlanError
from .model import Model

VERSION = 1


class EntryLike(Protocol):
    """What a plan says of one layer."""

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        ...

    @classmethod
    def from_dict(cls, name: str, value: Any) -> Self:
        """From a JSON value; raises PlanError where it is none."""
        ...


Entry = TypeVar("Entry", bound=EntryLike)


@dataclass(frozen=True)
class BasePlan(Generic[Entry]):
    """Entries by layer name in net order, the layers left alone with the reason, and what the plan was made for."""

    layers: dict[str, Entry]
    kept: dict[str, str] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    net: str = ""
    weights: str = ""

    def to_json(self) -> str:
        """The file's text: deterministic, one layer a line."""
        head = {"caffe-lra plan": VERSION, "net": self.net, "weights": self.weights, "target": self.target}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        layers = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(entry.to_dict())}" for name, entry in self.layers.items()
        )
        kept = ",\n".join(f"  {json.dumps(name)}: {json.dumps(reason)}" for name, reason in self.kept.items())
        body = [
            ' "layers": {',
            *([layers] if layers else []),
            " },",
            ' "kept": {',
            *([kept] if kept else []),
            " }",
        ]
        return "\n".join(["{", *lines, *body, "}", ""])

    def check(self, model: Model, *, force: bool = False, sibling: bool = False) -> None:
        """Raise PlanError where the plan was made for other files, unless forced; for a sibling, other weights."""
        if force:
            return
        net, weights = model.fingerprint
        for what, mine, theirs in (("net", self.net, net), ("weights", self.weights, weights)):
            if sibling and what == "net":
                continue
            if mine and theirs and mine != theirs:
                raise PlanError(
                    f"the plan was made for another {what} file (sha256 {mine[:12]}..., given {theirs[:12]}...)",
                    path=model.net.path,
                    hint="make a new plan, or apply it all the same with --force",
                )

    def diff(self, other: BasePlan[Entry]) -> dict[str, tuple[Any, Any]]:
        """Layers that the two plans treat differently: name -> (here, there), None where one leaves it alone."""
        names = dict.fromkeys((*self.layers, *other.layers))
        both = {name: (self.layers.get(name), other.layers.get(name)) for name in names}
        return {
            name: (mine.to_dict() if mine else None, theirs.to_dict() if theirs else None)
            for name, (mine, theirs) in both.items()
            if mine != theirs
        }


def read_json(source: str, path: object = None) -> Mapping[str, Any]:
    """A JSON object with no key twice; raises PlanError with the line where it is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise PlanError(f'names "{key}" twice', path=path)
            found[key] = value
        return found

    try:
        value = json.loads(source, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise PlanError(f"is no JSON: {error.msg}", path=path, line=error.lineno) from error
    except RecursionError:
        raise PlanError("is nested too deeply", path=path) from None
    except ValueError as error:  # a number of thousands of digits
        raise PlanError(f"cannot be read: {error}", path=path) from error
    if not isinstance(value, dict):
        raise PlanError("must be a JSON object { layer: rank, ... }", path=path)
    return value
