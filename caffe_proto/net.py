"""A prototxt seen as layers: every dialect, phases and stages, legacy inputs.

A ``Layer`` is a view of its block in the file; nothing is normalised in the text. V1 enumerators
(``CONVOLUTION``) are already spelt as the V2 types real Caffe upgrades them to. The flat blocks of V0 are seen
as the V2 layers that they upgrade to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from . import files, text, upgrade
from .errors import NetError, PrototxtError, UsageError
from .errors import nearest as nearest
from .text import Document, Field, Message, Scalar
from .upgrade import V1_TYPES as V1_TYPES

_LAYER_FIELDS = {"V2": "layer", "V1": "layers", "V0": "layers"}


@dataclass(frozen=True)
class NetState:
    """What include and exclude rules are judged against."""

    phase: str = "TEST"
    stages: tuple[str, ...] = ()
    level: int = 0

    def __post_init__(self) -> None:
        if self.phase not in ("TEST", "TRAIN"):
            raise UsageError(f'there is no phase "{self.phase}"', hint="use TEST or TRAIN")

    def meets(self, rule: Message) -> bool:
        """NetStateRule: phase equal, level within bounds, every stage present, no not_stage present."""
        phase = rule.string("phase")
        if phase and {"0": "TRAIN", "1": "TEST"}.get(phase, phase) != self.phase:
            return False
        low, high = rule.string("min_level"), rule.string("max_level")
        if (low and self.level < _level(low)) or (high and self.level > _level(high)):
            return False
        stages = set(self.stages)
        return stages.issuperset(rule.strings("stage")) and not stages.intersection(rule.strings("not_stage"))


@dataclass(frozen=True)
class ParamSpec:
    """One learnable blob's settings, whichever dialect they stand in."""

    name: str = ""
    lr_mult: float = 1.0
    decay_mult: float = 1.0
    permissive: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """A view of one layer block."""

    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    message: Message = field(repr=False)
    span: tuple[int, int]
    line: int
    dialect: str
    document: Document = field(repr=False)

    @cached_property
    def param_specs(self) -> tuple[ParamSpec, ...]:
        """V2 ``param`` blocks, or V1's lists ``param``, ``blobs_lr``, ``weight_decay``, ``blob_share_mode``."""
        message = self.message
        if self.dialect == "V2":
            return tuple(_param_spec(spec) for spec in message.messages("param"))
        if self.dialect == "V0":
            message = next(message.messages("layer"), message)
        names, modes = message.strings("param"), message.strings("blob_share_mode")
        rates, decays = message.strings("blobs_lr"), message.strings("weight_decay")
        count = max(len(names), len(rates), len(decays))
        return tuple(
            ParamSpec(
                names[i] if i < len(names) else "",
                _number(rates[i]) if i < len(rates) else 1.0,
                _number(decays[i]) if i < len(decays) else 1.0,
                i < len(modes) and modes[i] in ("PERMISSIVE", "1"),
            )
            for i in range(count)
        )

    def included(self, state: NetState) -> bool:
        """Whether the layer exists in ``state``; raises NetError where it has include and exclude rules."""
        include = tuple(self.message.messages("include"))
        exclude = tuple(self.message.messages("exclude"))
        if include and exclude:
            raise NetError(
                "has both include and exclude rules; Caffe takes one kind", line=self.line, layer=self.name
            )
        if include:
            return any(state.meets(rule) for rule in include)
        return not any(state.meets(rule) for rule in exclude)


def _param_spec(message: Message) -> ParamSpec:
    return ParamSpec(
        message.string("name"),
        _number(message.string("lr_mult", "1")),
        _number(message.string("decay_mult", "1")),
        message.string("share_mode") in ("PERMISSIVE", "1"),
    )


def _level(value: str) -> int:
    try:
        return text.integer(value)
    except ValueError:
        raise NetError(f"{value!r} is no level") from None


def _number(value: str) -> float:
    try:
        return float(value.rstrip("fF") or "nan")
    except ValueError:
        raise NetError(f"{value!r} is no number") from None


@dataclass(frozen=True, eq=False)
class Net:
    """A prototxt: its document, and the layers of it that exist in ``state``."""

    document: Document = field(repr=False)
    state: NetState = NetState()

    @property
    def path(self) -> str | None:
        """The file it was read from."""
        return self.document.path

    @property
    def text(self) -> str:
        """The whole file."""
        return self.document.text

    @property
    def name(self) -> str:
        """The net's own name."""
        return self.document.root.string("name")

    @cached_property
    def dialect(self) -> str:
        """ "V2" (``layer``), "V1" (``layers``) or "V0" (``layers { layer { } }``)."""
        if upgrade.is_v0(self.document):
            return "V0"
        return "V1" if self.document.root.last("layers") else "V2"

    @cached_property
    def all_layers(self) -> tuple[Layer, ...]:
        """Every layer block of the file, whatever its phase, in file order."""
        upgrade.refuse_mixed(self.document)
        return tuple(self._layers(_LAYER_FIELDS[self.dialect]))

    @cached_property
    def upgraded(self) -> Net:
        """The net itself; for V0 its V2 form as Caffe makes it, which tells the lines of the file."""
        if self.dialect != "V0":
            return self
        return replace(self, document=upgrade.v0_as_v2(self.document))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that exist in ``state``, in file order; those of a V0 file as ``upgraded`` has them."""
        state = self.full_state
        try:
            return tuple(layer for layer in self.upgraded.all_layers if layer.included(state))
        except NetError as error:
            raise error.at(path=self.path) from None

    @cached_property
    def full_state(self) -> NetState:
        """``state`` joined, as Caffe does, with the stages that the file's own ``state`` block names."""
        own = self.document.root.last("state")
        stages = own.value.strings("stage") if own and isinstance(own.value, Message) else ()
        return NetState(self.state.phase, (*stages, *self.state.stages), self.state.level)

    @cached_property
    def legacy_input(self) -> Layer | None:
        """``input`` with ``input_shape`` or ``input_dim`` as the Input layer that Caffe makes of it."""
        document = self.upgraded.document
        root = document.root
        names = root.strings("input")
        if not names:
            return None
        first = next(root.all("input"))
        line = document.line(first.start)
        shapes = [_raw(shape, "dim") for shape in root.messages("input_shape")]
        if not shapes:
            dims = _raw(root, "input_dim")
            if len(dims) % 4:
                raise NetError(
                    f"{len(dims)} input_dim values; Caffe takes four for each input",
                    path=self.path,
                    line=line,
                )
            shapes = [dims[i : i + 4] for i in range(0, len(dims), 4)]
        if not shapes:
            raise NetError(
                f'input "{names[0]}" has no shape: neither input_shape nor input_dim',
                path=self.path,
                line=line,
                hint="add input_shape { dim: 1 dim: 3 dim: 224 dim: 224 } to the file",
            )
        block = " ".join(f"shape {{ {' '.join(f'dim: {dim}' for dim in dims)} }}" for dims in shapes)
        made = text.parse(
            "\n" * (line - 1) + f"input_param {{ {block} }}", self.path
        )  # on the line of the first input
        span = (first.start, first.end)
        return Layer("input", "Input", (), names, made.root, span, line, "V2", made)

    def layer(self, name: str) -> Layer:
        """The layer of that name in ``state``; raises NetError, naming the nearest names, where there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise NetError(
            f'there is no layer "{name}"', path=self.path, hint=nearest(name, [x.name for x in self.layers])
        )

    def _layers(self, field_name: str) -> Iterator[Layer]:
        for found in self.document.root.all(field_name):
            if not isinstance(found.value, Message):
                raise PrototxtError(
                    f"{field_name} is no block", path=self.path, line=self.document.line(found.start)
                )
            yield self._layer(found, found.value)

    def _layer(self, found: Field, message: Message) -> Layer:
        kind, name = message.string("type"), message.string("name")
        dialect = self.dialect
        if dialect == "V1":
            kind = upgrade.v1_type(kind)
        elif dialect == "V0":
            inner = next(message.messages("layer"), message)
            kind, name = inner.string("type"), inner.string("name")
        return Layer(
            name,
            kind,
            message.strings("bottom"),
            message.strings("top"),
            message,
            (found.start, found.end),
            self.document.line(found.start),
            dialect,
            self.document,
        )


def _raw(message: Message, name: str) -> tuple[str, ...]:
    """The scalar values of that name as they stand, strings in their quotes."""
    return tuple(found.value.text for found in message.all(name) if isinstance(found.value, Scalar))


def parse(source: str, path: object = None, state: NetState | None = None) -> Net:
    """A net from prototxt text; raises PrototxtError where it is none."""
    return Net(text.parse(source, path), state or NetState())


def load(path: str | Path, state: NetState | None = None) -> Net:
    """A net from a prototxt file; raises FileError or PrototxtError in one line."""
    return parse(files.read_text(path), path, state)
