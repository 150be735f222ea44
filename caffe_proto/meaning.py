"""What a layer's settings mean: by the schema, defaults taken out, spellings and dialects made one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import NetError
from .net import Layer
from .typed import FieldInfo, Typed, field_info, is_harmless

Settings = dict[str, str]
Fields = dict[str, tuple[str, str]]  # field -> (in a, in b)

# What is compared elsewhere (wiring, param settings of V1), or says nothing of what a layer computes in TEST.
_ELSEWHERE = {"name", "type", "bottom", "top", "blobs", "layer"}
_V1_LISTS = {"blobs_lr", "weight_decay", "param", "blob_share_mode"}
_TRAINING = {
    "include", "exclude", "phase", "loss_weight", "loss_param", "propagate_down", "transform_param",
    "dropout_param", "moving_average_fraction", "engine", "lr_mult", "decay_mult", "share_mode",
}  # fmt: skip
_PAIRS = {
    "kernel_size": ("kernel", ""),
    "stride": ("stride", "1"),
    "pad": ("pad", "0"),
    "dilation": ("dilation", "1"),
}
_RULES = {"phase", "min_level", "max_level"}  # given or not is what counts
_NO_VALUE = "-"


@dataclass
class Meaning:
    """A layer's settings that are not the default, by dotted name: those that count in TEST, and the others.

    ``defaults`` holds what each of them would be if it were not given.
    """

    phase: str = "TEST"
    counting: Settings = field(default_factory=dict)
    training: Settings = field(default_factory=dict)
    defaults: Settings = field(default_factory=dict)

    @classmethod
    def of(cls, layer: Layer, phase: str) -> Meaning:
        """Read a layer by the schema of its dialect."""
        name = "V1LayerParameter" if layer.dialect == "V1" else "LayerParameter"
        made = cls(phase)
        made._message(Typed(layer.message, name, layer.document), "", False)
        if layer.dialect == "V1":
            made._v1_params(layer)
        if layer.type == "BatchNorm":  # its blobs are never learnt, whatever rates the file gives them
            made.training = {
                path: value for path, value in made.training.items() if not path.startswith("param[")
            }
        return made

    def _message(self, typed: Typed, prefix: str, training: bool) -> None:
        known = field_info(typed.type_name)
        skipped = (
            set() if prefix else _ELSEWHERE | (_V1_LISTS if typed.type_name == "V1LayerParameter" else set())
        )
        skipped |= self._pairs(typed, known, prefix)
        for name in typed:
            if name in skipped:
                continue
            inner = training or name in _TRAINING or (name != "name" and is_harmless(typed.type_name, name))
            path = _path(prefix, name)
            values = _values(typed, name)
            for i, value in enumerate(values):
                if isinstance(value, Typed):
                    self._message(value, f"{path}[{i}]." if known[name].repeated else f"{path}.", inner)
            plain = " ".join(_text(value) for value in values if not isinstance(value, Typed))
            if plain:
                self.note(path, plain, self._default(name, known.get(name)), inner)

    def note(self, path: str, value: str, default: str, training: bool) -> None:
        """Keep a setting that is not its default."""
        if value != default:
            (self.training if training else self.counting)[path] = value
            self.defaults[path] = default

    def _default(self, name: str, info: FieldInfo | None) -> str:
        if name == "use_global_stats":
            return _text(self.phase == "TEST")
        if info is None or info.default is None or name in _RULES:
            return _NO_VALUE
        return _text(info.default) or _NO_VALUE

    def _pairs(self, typed: Typed, known: Mapping[str, FieldInfo], prefix: str) -> set[str]:
        """Settings with an _h and a _w spelling, as ``5x1``, or ``5`` where all axes agree; the names they took."""
        taken: set[str] = set()
        for name, (stem, default) in _PAIRS.items():
            names = (f"{stem}_h", f"{stem}_w")
            if name not in known or not any(one in typed for one in (name, *names)):
                continue
            taken |= {name, *names}
            split = any(one in typed for one in names)
            values = [_text(value) for one in (names if split else [name]) for value in _values(typed, one)]
            shown = "x".join(values) if len(set(values)) > 1 else values[0]
            self.note(_path(prefix, name), shown, default, False)
        return taken

    def _v1_params(self, layer: Layer) -> None:
        """V1's lists of rates and shared names, as V2 says it."""
        for i, spec in enumerate(layer.param_specs):
            if spec.name:
                self.note(f"param[{i}].name", spec.name, _NO_VALUE, False)
            self.note(f"param[{i}].lr_mult", _text(spec.lr_mult), "1", True)
            self.note(f"param[{i}].decay_mult", _text(spec.decay_mult), "1", True)
            self.note(f"param[{i}].share_mode", "PERMISSIVE" if spec.permissive else "STRICT", "STRICT", True)


def _path(prefix: str, name: str) -> str:
    """``num_output`` for ``convolution_param.num_output``: a layer has one block of its own."""
    own, _, rest = prefix.partition(".")
    return f"{rest if own.endswith('_param') and own != 'transform_param' else prefix}{name}"


def _values(typed: Typed, name: str) -> list[Any]:
    """The values of a field; what the schema does not know, or not so, as it stands."""
    try:
        value = typed[name]
    except (KeyError, NetError):
        found = typed.message.all(name) if typed.message else ()
        return [" ".join(typed.document.text[one.value.start : one.value.end].split()) for one in found]
    return list(value) if isinstance(value, tuple) else [value]


def _text(value: Any) -> str:
    """A value as it is shown and compared; Caffe keeps numbers in float32."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(np.float32(value)).removesuffix(".0") if isinstance(value, float) else str(value)


def differences(a: Settings, b: Settings, defaults: Settings) -> Fields:
    """The settings that differ; what one side does not give has its default."""
    found = {name: (a.get(name, defaults[name]), b.get(name, defaults[name])) for name in (*a, *b)}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}
