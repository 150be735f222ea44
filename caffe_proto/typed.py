"""Reading a text message by the schema: values with their types and defaults, strictness on request.

Editing never comes here; a layer is read by the schema only when something interprets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from . import schema
from .errors import NetError, UnsupportedError
from .net import nearest
from .text import Document, Field, Message, Scalar, integer

# Fields, outside BVLC's schema or deprecated in it, that are known not to change what a layer computes.
HARMLESS = {
    ("NetParameter", "default_forward_type"),
    ("NetParameter", "default_backward_type"),
    ("NetParameter", "default_forward_math"),
    ("NetParameter", "default_backward_math"),
    ("NetParameter", "global_grad_scale"),
    ("NetParameter", "global_grad_scale_adaptive"),
    ("LayerParameter", "display"),
    ("LayerParameter", "connectivity_mode"),
    ("ConvolutionParameter", "conv_mode"),
}
_HARMLESS_MESSAGES = {"ParamSpec", "FillerParameter", "BlockGroupLassoSpec", "ForceRegular"}

_KINDS = {
    1: "double", 2: "float", 3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string",
    11: "message", 12: "bytes", 13: "uint32", 14: "enum",
}  # fmt: skip
_INTEGERS = {
    "int32": (-(2**31), 2**31),
    "int64": (-(2**63), 2**63),
    "uint32": (0, 2**32),
    "uint64": (0, 2**64),
}


@dataclass(frozen=True)
class FieldInfo:
    """What the schema says of one field; ``type`` names the message or enum, else equals ``kind``."""

    kind: str
    type: str
    repeated: bool
    default: Any
    fork: str | None


@cache
def field_info(type_name: str) -> dict[str, FieldInfo]:
    """The fields of a message type by name."""
    return {field.name: _info(type_name, field) for field in schema.descriptor(type_name).fields}


def _info(type_name: str, field: Any) -> FieldInfo:
    kind = _KINDS[field.type]
    inner = field.message_type or field.enum_type
    repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    default = None if repeated or kind == "message" else field.default_value
    if kind == "enum" and default is not None:
        default = field.enum_type.values_by_number[default].name
    name = inner.full_name.removeprefix("caffe.") if inner else kind
    return FieldInfo(kind, name, repeated, default, schema.fork_of(type_name, field.name))


class Typed(Mapping[str, Any]):
    """A message read by its schema type: ``p["stride_h"]`` is the value or the default, ``in`` asks for presence.

    A repeated field is a tuple, a message field a Typed (empty where absent), an enum its name. Raises
    NetError with the line where a value is not of its field's type.
    """

    def __init__(self, message: Message | None, type_name: str, document: Document) -> None:
        self.message = message
        self.type_name = type_name
        self.document = document

    def __contains__(self, name: object) -> bool:
        return self.message is not None and any(field.name == name for field in self.message.fields)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(field.name for field in self.message.fields)) if self.message else iter(())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        info = field_info(self.type_name)[name]
        found = list(self.message.all(name)) if self.message else []
        if info.repeated:
            return tuple(self._value(field, info) for field in found)
        if found:
            return self._value(found[-1], info)
        return Typed(None, info.type, self.document) if info.kind == "message" else info.default

    def line(self, name: str | None = None) -> int | None:
        """The line of a field, or of the message itself."""
        if self.message is None:
            return None
        field = self.message.last(name) if name else None
        return self.document.line(field.start if field else self.message.start)

    def _value(self, field: Field, info: FieldInfo) -> Any:
        value = field.value
        if info.kind == "message":
            if isinstance(value, Message):
                return Typed(value, info.type, self.document)
            raise self._wrong(field, "a block { ... }")
        if isinstance(value, Message):
            raise self._wrong(field, f"one value of type {info.type}")
        return self._scalar(field, value, info)

    def _scalar(self, field: Field, value: Scalar, info: FieldInfo) -> Any:
        raw = value.text
        if info.kind in ("string", "bytes"):
            if value.kind != "string":
                raise self._wrong(field, "a quoted string")
            return value.string
        if value.kind == "string":
            raise self._wrong(field, f"{info.type}, not a string")
        if info.kind == "enum":
            names = schema.enum_values(info.type)
            found = raw if raw in names else _enumerator(raw, names)
            if found is None:
                raise self._wrong(field, " or ".join(names))
            return found
        if info.kind == "bool":
            if raw in ("true", "True", "t", "1"):
                return True
            if raw in ("false", "False", "f", "0"):
                return False
            raise self._wrong(field, "true or false")
        try:
            return _integer(raw, *_INTEGERS[info.kind]) if info.kind in _INTEGERS else _float(raw)
        except ValueError:
            raise self._wrong(field, info.type) from None

    def _wrong(self, field: Field, expected: str) -> NetError:
        text = self.document.text[field.start : field.end]
        shown = text if len(text) <= 40 else text[:37] + "..."
        return NetError(f"found {shown!r}, {field.name} is {expected}", line=self.document.line(field.start))


def _enumerator(raw: str, names: Mapping[str, int]) -> str | None:
    """The name of an enum value given by its number."""
    with suppress(ValueError):
        number = integer(raw)
        return next((name for name, known in names.items() if known == number), None)
    return None


def _integer(raw: str, low: int, high: int) -> int:
    value = integer(raw)
    if not low <= value < high:
        raise ValueError(value)
    return value


def _float(raw: str) -> float:
    return float(raw if raw.lower().lstrip("-") in ("inf", "nan", "infinity") else raw.rstrip("fF"))


def check(typed: Typed, understood: frozenset[str] = frozenset()) -> None:
    """Refuse what would make real Caffe refuse the text, or this program misread it.

    Raises UnsupportedError on a field outside BVLC's schema, unless it is known to be harmless or in
    ``understood``; NetError on a singular field given twice or a value of the wrong type.
    """
    if typed.message is None:
        return
    seen: set[str] = set()
    for field in typed.message.fields:
        line = typed.document.line(field.start)
        known = field_info(typed.type_name)
        info = known.get(field.name)
        if info is None:
            hint = nearest(field.name, list(known))
            raise UnsupportedError(f'{typed.type_name} has no field "{field.name}"', line=line, hint=hint)
        if info.fork and field.name not in understood and not is_harmless(typed.type_name, field.name):
            raise UnsupportedError(
                f'"{field.name}" of {typed.type_name} is a field of the {info.fork} fork that is not interpreted',
                line=line,
            )
        if not info.repeated and field.name in seen:
            raise NetError(f'"{field.name}" is given twice; Caffe takes it once', line=line)
        seen.add(field.name)
        value = typed._value(field, info)
        if isinstance(value, Typed):
            check(value, understood)


def is_harmless(type_name: str, field: str) -> bool:
    """Whether a fork's field is known not to change what a layer computes."""
    return type_name in _HARMLESS_MESSAGES or (type_name, field) in HARMLESS
