"""What a decomposition plan says of one layer: the scheme and its ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from caffe_proto.errors import PlanError
from caffe_proto.plan import BasePlan, read_json

from .schemes import ALL_SCHEMES

REFIT = "refit"  # the scheme of a layer that keeps its shape and gets other numbers


@dataclass(frozen=True)
class LayerPlan:
    """Scheme and ranks of one layer, with the MACs before and after and the error that were predicted.

    ``ms``: milliseconds before and after, in a plan by measured time.
    ``scheme`` is "" in the short form ``{"conv3": 150}``, which says only the rank; "refit", without ranks, says
    that the layer stays whole and is fitted to responses.
    """

    scheme: str
    ranks: tuple[int, ...]
    macs: tuple[int, int] | None = None
    error: float | None = None
    ms: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        found: dict[str, Any] = {"scheme": self.scheme, "ranks": list(self.ranks)}
        if self.macs is not None:
            found["macs"] = list(self.macs)
        if self.error is not None:
            found["error"] = self.error
        if self.ms is not None:
            found["ms"] = list(self.ms)
        return found

    @classmethod
    def from_dict(cls, name: str, value: Any) -> LayerPlan:
        """From a rank, or an object with "scheme" and "rank" or "ranks"; raises PlanError where it is neither."""
        if _is_rank(value):
            return cls("", (value,))
        if not isinstance(value, Mapping):
            raise PlanError(
                f"{value!r} is no rank",
                layer=name,
                hint='write "conv1": 24 or {"scheme": "spatial", "rank": 24}',
            )
        known = {"scheme", "rank", "ranks", "macs", "error", "ms"}
        for key in value:
            if key not in known:
                raise PlanError(f'unknown key "{key}"', layer=name, hint="known: " + ", ".join(sorted(known)))
        ranks = value.get("ranks", [value["rank"]] if "rank" in value else [])
        refit = value.get("scheme") == REFIT
        if not isinstance(ranks, list) or bool(ranks) == refit or not all(map(_is_rank, ranks)):
            needed = "a layer that is refitted has none" if refit else "a list of whole numbers is needed"
            raise PlanError(f'"ranks" is {ranks!r}, {needed}', layer=name)
        scheme, macs, error = value.get("scheme", ""), value.get("macs"), value.get("error")
        if not isinstance(scheme, str) or scheme not in ("", REFIT, *ALL_SCHEMES):
            raise PlanError(
                f"there is no scheme {json.dumps(scheme)}",
                layer=name,
                hint="known: " + ", ".join([*ALL_SCHEMES, REFIT]),
            )
        if macs is not None and not (isinstance(macs, list) and len(macs) == 2 and all(map(_is_rank, macs))):
            raise PlanError(f'"macs" is {macs!r}, two whole numbers are needed', layer=name)
        if error is not None and not isinstance(error, int | float):
            raise PlanError(f'"error" is {error!r}, a number is needed', layer=name)
        ms = _two_numbers(value["ms"], name) if "ms" in value else None
        return cls(scheme, tuple(ranks), (macs[0], macs[1]) if macs else None, error, ms)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _two_numbers(value: Any, layer: str | None = None) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
        raise PlanError(f"{value!r} are no milliseconds before and after", layer=layer)
    return float(value[0]), float(value[1])


@dataclass(frozen=True)
class Timed:
    """What any plan by measured time says of the whole net.

    ``ms``: milliseconds before and after; ``noise``: relative standard error of the times; ``measured_on``:
    processor, onnxruntime, threads, provider.
    """

    ms: tuple[float, float]
    noise: float
    measured_on: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a plan's target."""
        return {
            "cost": "latency",
            "predicted_ms": list(self.ms),
            "noise": self.noise,
            "measured_on": dict(self.measured_on),
        }

    @classmethod
    def of(cls, target: Mapping[str, Any]) -> Timed | None:
        """From a plan's target, None of a plan that is not by time. Raises PlanError where it is not complete."""
        if target.get("cost") != "latency":
            return None
        noise: Any = target.get("noise")
        where = target.get("measured_on")
        if not _is_number(noise) or not isinstance(where, Mapping):
            raise PlanError('"noise" or "measured_on" of a plan by measured time is missing or wrong')
        return Timed(_two_numbers(target.get("predicted_ms")), float(noise), where)


@dataclass(frozen=True)
class Predicted(Timed):
    """What a plan by measured time expects of the whole net; ``gap``: loss beyond the bound that no plan of these times can go below."""

    gap: float

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a plan's target."""
        return {**super().to_dict(), "gap": self.gap}


class Plan(BasePlan[LayerPlan]):
    """Ranks by layer name, in net order; see ``caffe_proto.plan``."""

    @property
    def predicted(self) -> Predicted | None:
        """What a plan by measured time expects, None for other plans. Raises PlanError where it is not complete."""
        timed = Timed.of(self.target)
        gap: Any = self.target.get("gap")
        if timed is None:
            return None
        if not _is_number(gap):
            raise PlanError('"gap" of a plan by measured time is missing or wrong')
        return Predicted(timed.ms, timed.noise, timed.measured_on, float(gap))

    @property
    def complete(self) -> bool:
        """Whether it says the scheme of every layer, not only a rank."""
        return all(entry.scheme for entry in self.layers.values())

    @property
    def merges(self) -> list[list[str]] | None:
        """The rows of layers that become one before anything else; None for plans that merge nothing.

        Raises PlanError where they are no lists of names.
        """
        return self._rows("merge")

    @property
    def late_merges(self) -> list[list[str]] | None:
        """The rows that become one in the end; None where the plan does not say. Raises PlanError as `merges`."""
        return self._rows("merge_late")

    def _rows(self, key: str) -> list[list[str]] | None:
        rows: Any = self.target.get(key)
        if rows is None:
            return None
        fine = isinstance(rows, list) and all(isinstance(row, list) and len(row) > 1 for row in rows)
        if not fine or not all(isinstance(name, str) for row in rows for name in row):
            raise PlanError(f'"{key}" is {rows!r}, lists of layer names are needed')
        return rows

    def with_late_merges(self, rows: Iterable[Sequence[str]]) -> Plan:
        """The plan that says what becomes one in the end."""
        target = self.target | {"merge_late": [list(row) for row in rows]}
        return Plan(self.layers, self.kept, target, self.net, self.weights)

    @classmethod
    def from_json(cls, source: str, path: object = None) -> Plan:
        """Read a plan file, or the short form ``{"conv3": 150}``; raises PlanError in one line."""
        value = read_json(source, path)
        try:
            if "layers" not in value:
                return cls({name: LayerPlan.from_dict(name, one) for name, one in value.items()})
            layers, kept, target = value["layers"], value.get("kept", {}), value.get("target", {})
            if not all(isinstance(part, dict) for part in (layers, kept, target)):
                raise PlanError('"layers", "kept" and "target" must be objects')
            if not all(isinstance(reason, str) for reason in kept.values()):
                raise PlanError('"kept" must say the reason of each layer as a string')
            entries = {name: LayerPlan.from_dict(name, one) for name, one in layers.items()}
            return cls(
                entries, dict(kept), dict(target), str(value.get("net", "")), str(value.get("weights", ""))
            )
        except PlanError as error:
            raise error.at(path=path) from None

    def completed(self, scheme: str, style: str | None) -> Plan:
        """The plan with a scheme for every bare rank and, where given, another style."""
        layers = {
            name: entry if entry.scheme else replace(entry, scheme=scheme)
            for name, entry in self.layers.items()
        }
        target = self.target | ({"style": style} if style is not None else {})
        return Plan(layers, self.kept, target, self.net, self.weights)
