"""The net that a caffemodel embeds: its layers without their blobs, as a message and as a prototxt.

Real Caffe stores with the weights the layers it ran, so the split layers it put in and the phase it set are
taken out again. A file of names and blobs only holds no net.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from . import schema, wire
from .errors import CaffemodelError
from .text import quote
from .upgrade import Node
from .weights import MappedEntry, Raw, Weights
from .wire import BYTES, WireError, WireField

LAYER, LAYERS = 100, 2  # fields of NetParameter
V0_LAYER = 1  # field of V1LayerParameter
_BLOBS = {"LayerParameter": 7, "V1LayerParameter": 6, "V0LayerParameter": 50}
UNKNOWN = "not written: the schema does not know it"
_FIRST = ("name", "type", "bottom", "top")
_LAST = ("layer", "layers")
_MEANT = "normalization"  # of LossParameter: given, it overrules another field even at its default


@dataclass(frozen=True)
class StoredField:
    """A field of a caffemodel, its payload without blobs; ``blobs`` are the spans of theirs."""

    piece: MappedEntry | Raw
    number: int
    payload: bytes
    blobs: tuple[tuple[int, int], ...] = ()

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer of any dialect."""
        return self.number in (LAYER, LAYERS)


@dataclass(frozen=True)
class Recovered:
    """A prototxt made from a caffemodel: its dialect, and the split layers that were taken out."""

    text: str
    dialect: str
    layers: int
    splits: tuple[str, ...]


def stored_fields(stored: Weights) -> Iterator[StoredField]:
    """The fields of a caffemodel in file order; raises CaffemodelError where they are damaged."""
    for piece in stored.pieces:
        if not isinstance(piece, MappedEntry | Raw):
            raise CaffemodelError("is no caffemodel", path=stored.path)
        try:
            found = next(wire.fields(piece.buffer, piece.start, piece.end))
            if found.kind != BYTES or found.number not in (LAYER, LAYERS):
                yield StoredField(piece, found.number, piece.buffer[piece.start : piece.end])
                continue
            kind = "LayerParameter" if found.number == LAYER else "V1LayerParameter"
            payload, blobs = _without_blobs(piece.buffer, found, kind)
        except WireError as error:
            raise CaffemodelError(str(error), path=stored.path) from error
        yield StoredField(piece, found.number, payload, blobs)


def _without_blobs(buffer: Any, field: WireField, kind: str) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """The payload of a layer without its blobs, and their spans; of a V0 layer those of the inner block only."""
    kept: list[bytes] = []
    blobs: list[tuple[int, int]] = []
    inner_blobs: tuple[tuple[int, int], ...] | None = None
    for inner in wire.fields(buffer, field.at, field.end):
        if inner.kind == BYTES and inner.number == _BLOBS[kind]:
            blobs.append((inner.at, inner.end))
        elif inner.kind == BYTES and (kind, inner.number) == ("V1LayerParameter", V0_LAYER):
            payload, inner_blobs = _without_blobs(buffer, inner, "V0LayerParameter")
            kept.append(wire.encode_bytes(V0_LAYER, payload))
        else:
            kept.append(buffer[inner.start : inner.end])
    return b"".join(kept), tuple(blobs) if inner_blobs is None else inner_blobs


def as_message(fields: Iterable[StoredField], path: str | None) -> Any:
    """Stored fields as a NetParameter without blobs; raises CaffemodelError where a name is no text."""
    from google.protobuf.message import DecodeError

    raw = b"".join(
        wire.encode_bytes(one.number, one.payload) if one.is_layer else one.payload for one in fields
    )
    try:
        found: Any = schema.message_class("NetParameter").FromString(raw)
        blocks = (*found.layers, *(layer.layer for layer in found.layers), *found.layer)
        names = [
            name
            for one in blocks
            for name in (one.name, *getattr(one, "bottom", ()), *getattr(one, "top", ()))
        ]
    except (DecodeError, UnicodeDecodeError) as error:
        raise CaffemodelError(f"its net definition is damaged ({error})", path=path) from error
    for name in names:
        if isinstance(name, bytes):  # what protobuf gives for a string that is no UTF-8
            raise CaffemodelError(f"its net definition is damaged ({name!r} is no name)", path=path)
    return found


def recover(stored: Weights) -> Recovered:
    """The prototxt of the net that a caffemodel embeds, in the dialect that it is stored in.

    Raises CaffemodelError where the file holds names and blobs only.
    """
    if stored.is_hdf5:
        raise CaffemodelError("an HDF5 weight file holds no net definition, only blobs", path=stored.path)
    net = as_message(stored_fields(stored), stored.path)
    layers: Sequence[Any] = net.layers or net.layer
    for layer in layers:
        inner = layer.layer if net.layers and layer.HasField("layer") else layer
        if not inner.HasField("type"):
            what = "has a name and blobs only: the file embeds no net definition"
            if _unknown(inner):
                what = "is of a type that is not known here"
            raise CaffemodelError(what, path=stored.path, layer=inner.name)
    for layer in net.layer:
        _refuse_collision(layer, stored.path)
    is_v0 = any(layer.HasField("layer") for layer in net.layers)
    splits = _fold_splits(layers)
    for split in splits:
        layers.remove(split)  # type: ignore[attr-defined]
    for layer in net.layer:
        layer.ClearField("phase")  # Caffe's own note of how it ran
    dialect = "V0" if is_v0 else "V1" if net.layers else "V2"
    text = net_text(net)
    return Recovered(text, dialect, len(layers), tuple(split.name for split in splits))


# Blocks whose numbers forks use for other blocks (Wen's 147 is sparsify_param): believed in layers of these types only.
_COLLIDING = {
    "elu_param": "ELU",
    "bias_param": "Bias",
    "swish_param": "Swish",
    "clip_param": "Clip",
}


def _refuse_collision(layer: Any, path: str | None) -> None:
    """Raise CaffemodelError where a block can only be read as what BVLC means by its number, and the type says otherwise."""
    for name, kind in _COLLIDING.items():
        if layer.HasField(name) and layer.type != kind:
            number = layer.DESCRIPTOR.fields_by_name[name].number
            raise CaffemodelError(
                f"is of type {layer.type} and has field {number}, {name} in BVLC and another block in a fork",
                path=path,
                layer=layer.name,
                hint="take the prototxt that the weights were trained with",
            )


def _fold_splits(layers: Sequence[Any]) -> list[Any]:
    """The split layers that Caffe put in; who read their tops reads the blob itself again."""
    split_types = ("Split", schema.enum_values("V1LayerParameter.LayerType")["SPLIT"])
    writers: dict[str, tuple[str, int]] = {}
    renamed: dict[str, str] = {}
    found: list[Any] = []
    for layer in layers:
        bottoms = [renamed.get(name, name) for name in layer.bottom]
        if layer.type in split_types and len(bottoms) == 1 and _is_own_split(layer, bottoms[0], writers):
            found.append(layer)
            renamed.update(dict.fromkeys(layer.top, bottoms[0]))
            continue
        layer.bottom[:] = bottoms
        for index, top in enumerate(layer.top):
            writers[top] = (layer.name, index)
    return found


def _is_own_split(layer: Any, blob: str, writers: dict[str, tuple[str, int]]) -> bool:
    """Whether name and tops are those that Caffe gives: blob, its writer, the number of the top."""
    if blob in writers:
        writer, index = writers[blob]
        named = layer.name == f"{blob}_{writer}_{index}_split"
    else:  # an input of the net: its writer is called "input"
        named = layer.name.startswith(f"{blob}_input_") and layer.name.endswith("_split")
    return named and list(layer.top) == [f"{layer.name}_{k}" for k in range(len(layer.top))]


def net_text(net: Any, *, defaults: bool = False) -> str:
    """A NetParameter as a prototxt; ``defaults``: fields that are set to their default value too."""
    unknown = _unknown(net)
    lines = [line for node in nodes(net, defaults=defaults) for line in node.lines()]
    return "".join(f"{line}\n" for line in (*unknown, *lines))


def nodes(message: Any, *, defaults: bool) -> list[Node]:
    """The fields of a message as nodes, what the schema does not know as comments above their block."""

    def place(item: tuple[Any, Any]) -> tuple[int, int]:
        name = item[0].name
        return (1, 0) if name in _LAST else (0, _FIRST.index(name) if name in _FIRST else len(_FIRST))

    made: list[Node] = []
    for field, value in sorted(message.ListFields(), key=place):
        values = [value] if isinstance(value, str | bytes) or not hasattr(value, "__len__") else value
        for one in values:
            if field.message_type is not None:
                inside = nodes(one, defaults=defaults) or nodes(one, defaults=True)
                made.append(Node(field.name, tuple(inside), _unknown(one)))
            elif defaults or not _is_default(field, value):
                made.append(Node(field.name, _literal(field, one)))
    return made


def _is_default(field: Any, value: Any) -> bool:
    return field.has_default_value and value == field.default_value and field.name != _MEANT


def _literal(field: Any, value: Any) -> str:
    from google.protobuf import text_format

    if isinstance(value, str):
        return quote(value)
    out = StringIO()
    text_format.PrintFieldValue(field, value, out)
    return out.getvalue().removesuffix(".0")


def _unknown(message: Any) -> tuple[str, ...]:
    """A comment for each field that the schema lacks."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    sizes: dict[int, int] = {}
    found: Any = UnknownFieldSet(message)
    for field in found:
        sizes[field.field_number] = sizes.get(field.field_number, 0) + 1
    return tuple(
        f"# field {number} of {message.DESCRIPTOR.name}, {UNKNOWN}{f': {count} values' if count > 1 else ''}"
        for number, count in sizes.items()
    )
