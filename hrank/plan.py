"""What a pruning plan says of one layer: the output channels it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from caffe_proto.errors import PlanError
from caffe_proto.plan import BasePlan, read_json
from caffe_proto.shape_inference import Shaped
from lra.plan import Timed

from .coupling import Coupling


@dataclass(frozen=True)
class PruneEntry:
    """The output channels that a layer keeps, ascending, and how many it had; 0 where the plan does not say."""

    keep: tuple[int, ...]
    channels: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"of": self.channels, "keep": list(self.keep)} if self.channels else {"keep": list(self.keep)}

    @classmethod
    def from_dict(cls, name: str, value: Any) -> PruneEntry:
        """From a list of channels, or an object with "keep" and "of"; raises PlanError where it is neither."""
        found = value if isinstance(value, Mapping) else {"keep": value}
        for key in found:
            if key not in ("keep", "of"):
                raise PlanError(f'unknown key "{key}"', layer=name, hint="known: keep, of")
        keep, channels = found.get("keep"), found.get("of", 0)
        if not isinstance(keep, list) or not keep or not all(map(_is_channel, keep)):
            raise PlanError(
                f'"keep" is {keep!r}, a list of channels is needed',
                layer=name,
                hint='write "conv1": [0, 2, 5] or {"of": 8, "keep": [0, 2, 5]}',
            )
        if any(low >= high for low, high in pairwise(keep)):
            raise PlanError('"keep" must rise', layer=name)
        if not _is_channel(channels) or (channels and keep[-1] >= channels):
            raise PlanError(f'"of" is {channels!r}, a number above {keep[-1]} is needed', layer=name)
        return cls(tuple(keep), channels)


def _is_channel(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Plan(BasePlan[PruneEntry]):
    """Kept channels by layer name, in net order; see ``caffe_proto.plan``.

    ``target["inputs"]`` holds the shapes of the net's inputs: a train_val often does not say its own.
    """

    @classmethod
    def of(
        cls,
        coupling: Coupling,
        keep: Mapping[str, Sequence[int]],
        *,
        kept: Mapping[str, str] | None = None,
        target: Mapping[str, Any] | None = None,
    ) -> Plan:
        """A plan for a net from the channels that some of its layers keep; layers that keep all are left out.

        Raises PlanError where there is no such layer.
        """
        sizes = {name: coupling.member(name)[1].channels for name in keep}
        layers = {
            name: PruneEntry(tuple(sorted(keep[name])), sizes[name])
            for name in coupling.by_layer
            if name in keep and len(keep[name]) < sizes[name]
        }
        net, weights = coupling.model.fingerprint
        inputs = {"inputs": input_shapes(coupling.shaped)}
        return cls(layers, dict(kept or {}), {**(target or {}), **inputs}, net, weights)

    @classmethod
    def from_json(cls, source: str, path: object = None) -> Plan:
        """Read a plan file, or the short form ``{"conv3": [0, 2, 5]}``; raises PlanError in one line."""
        value = read_json(source, path)
        try:
            if "layers" not in value:
                return cls({name: PruneEntry.from_dict(name, one) for name, one in value.items()})
            layers, kept, target = value["layers"], value.get("kept", {}), value.get("target", {})
            if not all(isinstance(part, dict) for part in (layers, kept, target)):
                raise PlanError('"layers", "kept" and "target" must be objects')
            if not all(isinstance(reason, str) for reason in kept.values()):
                raise PlanError('"kept" must say the reason of each layer as a string')
            if not _are_shapes(target.get("inputs", {})):
                raise PlanError('"inputs" must give the shape of each input as whole numbers')
            entries = {name: PruneEntry.from_dict(name, one) for name, one in layers.items()}
            return cls(
                entries, dict(kept), dict(target), str(value.get("net", "")), str(value.get("weights", ""))
            )
        except PlanError as error:
            raise error.at(path=path) from None

    @property
    def keep(self) -> dict[str, tuple[int, ...]]:
        """The channels that each layer keeps."""
        return {name: entry.keep for name, entry in self.layers.items()}

    @property
    def predicted(self) -> Timed | None:
        """What a plan by measured time says of the whole net, None for others. Raises PlanError where it is not complete."""
        return Timed.of(self.target)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs of the net it was made for."""
        return {name: tuple(shape) for name, shape in self.target.get("inputs", {}).items()}


def _are_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shape, list) and all(map(_is_channel, shape)) for shape in value.values()
    )


def input_shapes(shaped: Shaped) -> dict[str, list[int]]:
    """The shapes of a net's inputs, as far as they are known, for JSON."""
    return {
        shaped.graph.blob(value): list(shaped.shapes[value])
        for value in shaped.graph.sources
        if value in shaped.shapes
    }
