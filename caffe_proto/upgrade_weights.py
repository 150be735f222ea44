"""A V0 or V1 caffemodel in V2 form: its definitions upgraded as a prototxt's are, its blobs copied as bytes.

What of a definition an upgrade may change is printed, upgraded by ``upgrade.upgrade_net`` and read again, so
that the rules stand in one place; everything else is carried over as the bytes it was, under the field
number that it has in V2.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from . import recover, schema, text, upgrade, wire
from .recover import LAYER, LAYERS, V0_LAYER, StoredField
from .weights import V2, Blobs, MappedEntry, NewEntry, Piece, Raw, Weights
from .wire import BYTES

_V2_CHANGED = ("name", "type", "param")
_V1_CHANGED = ("name", "type", "bottom", "top", "param", "blob_share_mode", "blobs_lr", "weight_decay")
_V0_TYPE = 2  # field of V0LayerParameter


@dataclass(frozen=True)
class Moved(NewEntry):
    """A layer with a new definition; its blobs stand in a mapped caffemodel."""

    source: MappedEntry | None = None

    @property
    def blobs(self) -> Blobs:
        return self.source.blobs if self.source else ()

    def write(self, file: IO[bytes]) -> None:
        """Append the layer to a caffemodel, blobs copied byte for byte."""
        spans = self.source.blob_spans if self.source else ()
        heads = [wire.header(self.dialect.blobs, end - start) for start, end in spans]
        total = len(self.definition) + sum(
            len(head) + end - start for head, (start, end) in zip(heads, spans, strict=True)
        )
        file.write(wire.header(self.dialect.field, total) + self.definition)
        for head, (start, end) in zip(heads, spans, strict=True):
            file.write(head)
            if self.source:
                Weights([Raw(self.source.buffer, start, end)]).write_caffemodel(file)


@dataclass(frozen=True)
class UpgradedWeights:
    """What to write for an upgraded caffemodel, and a line for each step that changed something."""

    parts: tuple[bytes | Piece, ...]
    steps: tuple[str, ...]
    path: str | None = None

    def write(self, file: IO[bytes]) -> None:
        """Write the caffemodel."""
        for part in self.parts:
            if isinstance(part, bytes):
                file.write(part)
            else:
                Weights([part]).write_caffemodel(file)

    def weights(self) -> Weights:
        """The layers that have blobs, as V2 weights."""
        pieces = [part for part in self.parts if not isinstance(part, bytes | Raw)]
        return Weights(pieces, path=self.path, dialect=V2, changed=True)


def is_v0(stored: Weights) -> bool:
    """Whether a weight file holds a layer of the oldest form."""
    if stored.is_hdf5 or stored.dialect.name != "V1":
        return False
    return any(_has_inner(one) for one in recover.stored_fields(stored))


def upgrade_weights(stored: Weights) -> UpgradedWeights:
    """A caffemodel in V2 form; raises NetError or CaffemodelError where Caffe refuses it or it is damaged."""
    if stored.is_hdf5:
        return UpgradedWeights(stored.pieces, (), stored.path)
    found = list(recover.stored_fields(stored))
    v0 = any(_has_inner(one) for one in found)
    sources = [one for one in found if one.is_layer]
    recover.as_message(found, stored.path)  # whole, so that what follows reads sound messages
    known = schema.descriptor("NetParameter").fields_by_number
    old = [_changeable(one) if one.is_layer else one for one in found if one.number in known]
    source = recover.net_text(recover.as_message(old, stored.path), defaults=True)
    made = upgrade.upgrade_net(text.parse(source, stored.path))
    if not made.steps:
        return UpgradedWeights(stored.pieces, (), stored.path)
    new = _parsed(made.text)
    steps = [*made.steps, *(line.strip("# ") for line in source.splitlines() if recover.UNKNOWN in line)]
    if v0:
        sources = [one for one in sources if one.number == LAYERS and not _is_padding(one)]
    inputs = new.layer[: len(new.layer) - len(sources)]
    parts: list[bytes | Piece] = [*_net_fields(new, found, known), *(_encoded(layer) for layer in inputs)]
    for one, layer in zip(sources, new.layer[len(inputs) :], strict=True):
        parts.append(_layer(one, layer, steps))
    return UpgradedWeights(tuple(parts), tuple(steps), stored.path)


def _has_inner(one: StoredField) -> bool:
    return one.number == LAYERS and any(inner.number == V0_LAYER for inner, _ in _fields(one.payload))


def _is_padding(one: StoredField) -> bool:
    inner = b"".join(payload for field, payload in _fields(one.payload) if field.number == V0_LAYER)
    return b"padding" in [payload for field, payload in _fields(inner) if field.number == _V0_TYPE]


def _fields(payload: bytes) -> Iterator[tuple[wire.WireField, bytes]]:
    """The fields of a message, each with its payload."""
    for field in wire.fields(payload, 0, len(payload)):
        yield field, payload[field.at : field.end]


def _parsed(source: str) -> Any:
    from google.protobuf import text_format

    made: Any = schema.message_class("NetParameter")()
    return text_format.Parse(source, made, descriptor_pool=made.DESCRIPTOR.file.pool)


def _changeable(one: StoredField) -> StoredField:
    """A layer with only what an upgrade may change."""
    kept = _changed_numbers(one)
    payload = b"".join(one.payload[f.start : f.end] for f, _ in _fields(one.payload) if f.number in kept)
    return StoredField(one.piece, one.number, payload)


def _changed_numbers(one: StoredField) -> set[int]:
    """The fields of a layer that an upgrade may change, by number."""
    if one.number == LAYER:
        return _numbers("LayerParameter", _V2_CHANGED)
    if _has_inner(one):
        return _numbers("V1LayerParameter", ("layer", "bottom", "top"))
    known = schema.descriptor("V1LayerParameter").fields_by_name
    layer: Any = schema.message_class("V1LayerParameter").FromString(one.payload)
    blocks = [block for block in upgrade.TRANSFORMED.values() if _has_transform(getattr(layer, block))]
    transform = ["transform_param"] if blocks else []
    return {known[name].number for name in (*_V1_CHANGED, *blocks, *transform)}


def _numbers(message: str, names: Sequence[str]) -> set[int]:
    known = schema.descriptor(message).fields_by_name
    return {known[name].number for name in names}


def _has_transform(block: Any) -> bool:
    return any(block.HasField(name) for name in upgrade.TRANSFORMS)


def _net_fields(new: Any, found: Sequence[StoredField], known: Container[int]) -> Iterator[bytes]:
    """The fields of the net itself: those of the schema as upgraded, others as they were."""
    head = type(new)()
    head.CopyFrom(new)
    head.ClearField("layer")
    yield head.SerializeToString(deterministic=True)
    yield from (one.payload for one in found if one.number not in known)


def _encoded(layer: Any) -> bytes:
    return wire.encode_bytes(LAYER, layer.SerializeToString(deterministic=True))


def _layer(one: StoredField, layer: Any, steps: list[str]) -> bytes | Piece:
    """A stored layer with its upgraded definition."""
    changed = _changed_numbers(one)
    if one.number == LAYER and layer == recover.as_message([_changeable(one)], None).layer[0]:
        return one.piece
    rest = b"".join(_carried(one, layer.name, changed, steps))
    payload = layer.SerializeToString(deterministic=True) + rest
    if not one.blobs or not isinstance(one.piece, MappedEntry):
        return wire.encode_bytes(LAYER, payload)
    piece = one.piece
    entry = MappedEntry(layer.name, piece.buffer, piece.start, piece.end, one.blobs, piece.path)
    return Moved(layer.name, (), payload, V2, entry)


def _carried(one: StoredField, name: str, changed: set[int], steps: list[str]) -> Iterator[bytes]:
    """The fields of a layer that no upgrade changes, under their numbers in V2; those V2 lacks are told of."""
    if one.number == LAYERS and _has_inner(one):
        return
    kind = "LayerParameter" if one.number == LAYER else "V1LayerParameter"
    names = {number: field.name for number, field in schema.descriptor(kind).fields_by_number.items()}
    numbers = schema.descriptor("LayerParameter").fields_by_name
    for field, payload in _fields(one.payload):
        if field.number in changed:
            continue
        if one.number == LAYER:
            yield one.payload[field.start : field.end]
        elif field.number in names and names[field.number] in numbers:
            number = numbers[names[field.number]].number
            yield wire.tag(number, field.kind)
            yield (wire.encode_varint(len(payload)) if field.kind == BYTES else b"") + payload
        else:
            steps.append(f'dropped field {field.number} of "{name}", which V2 does not have')
