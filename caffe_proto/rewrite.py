"""The one place where a net is changed: layers replaced or narrowed in the text and in the weights, together.

An edit says what shall stand in the place of a layer, or which of its numbers change. The new blocks are edited copies of the old one, so
the file's manner, phase rules, fillers, ``param`` blocks and unknown fields carry over; everything outside
stays byte for byte. Blobs keep their names: the last new layer writes the old tops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import schema, text, upgrade_weights, wire
from .blocks import Block
from .errors import NetError
from .files import text_bytes
from .model import Model
from .net import V1_TYPES, Layer, Net
from .text import Edit, Field, Message, Scalar, quote
from .weights import V1, V2, Blobs, NewEntry

Settings = Mapping[str, Sequence[str]]  # field -> literal values; none removes the field

_V1_LISTS = ("blobs_lr", "weight_decay", "param", "blob_share_mode")


@dataclass(frozen=True)
class NewLayer:
    """One layer of a replacement, as changes to a copy of the replaced one.

    ``bottoms`` and ``tops`` are None where they stay those of the replaced block.
    ``block`` is the parameter block (``convolution_param``) whose ``settings`` change. ``params`` says how
    many learnt blobs keep their ``param`` settings. ``rename_weight`` goes behind the name that the weight is
    shared by, so that sharing still means the same. ``keep_force``: whether Wen's force_mult stays.
    ``freeze_bias``: the bias is there but gets lr_mult 0. Without ``blobs`` the weights are left alone.
    """

    name: str
    bottoms: tuple[str, ...] | None
    tops: tuple[str, ...] | None
    block: str
    settings: Settings
    blobs: Blobs | None
    params: int
    rename_weight: str = ""
    keep_force: bool = True
    freeze_bias: bool = False


@dataclass(frozen=True)
class Replace:
    """Put new layers, in order, in the place of every block named ``layer``; with none the block goes, lines and all.

    ``rename``: blobs that get another name wherever the file reads or writes them.
    """

    layer: str
    new: tuple[NewLayer, ...]
    rename: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NewValues:
    """The values of one field in a nested block of a layer, ``("reshape_param", "shape")``, as literals.

    ``add``: the field is added, with its block, where the layer has none.
    """

    block: tuple[str, ...]
    name: str
    values: tuple[str, ...]
    add: bool = False


@dataclass(frozen=True)
class Narrow:
    """Change numbers in every block named ``layer``, and its blobs; all else stays byte for byte.

    Without ``blobs`` the weights are left alone.
    """

    layer: str
    values: tuple[NewValues, ...]
    blobs: Blobs | None


@dataclass(frozen=True)
class Namer:
    """Names for new layers and blobs that nothing in the net or its weights has yet."""

    taken: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: Model) -> Namer:
        """A namer that knows every layer, blob and stored layer of a model."""
        taken = {layer.name for layer in model.net.all_layers}
        taken |= {top for layer in model.net.all_layers for top in layer.tops}
        taken |= set(model.net.document.root.strings("input"))
        return cls(taken | set(model.weights or ()))

    def unique(self, wanted: str) -> str:
        """The wanted name, or with a number behind it where it is taken; then taken itself."""
        name, count = wanted, 1
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return name


def apply(model: Model, edits: Sequence[Replace | Narrow]) -> Model:
    """The model with its layers replaced or narrowed; weights are replaced where the model has any.

    A V0 net, and weights in V0 form, become V2: what is changed is the upgraded text.

    Raises NetError where a layer to change does not exist.
    """
    net = model.net.upgraded
    changes: list[Edit] = []
    for edit in edits:
        blocks = [layer for layer in net.all_layers if layer.name == edit.layer]
        if not blocks:
            raise NetError(f'there is no layer "{edit.layer}"', path=net.path)
        if isinstance(edit, Narrow):
            changes += [change for layer in blocks for change in _new_values(layer, edit.values)]
            continue
        for other in blocks:
            if len(other.tops) != len(blocks[0].tops):
                what = "stands in the file twice, with other tops"
                raise NetError(what, path=net.path, line=other.line, layer=edit.layer)
        changes += [change for layer in blocks for change in _replaced(net, layer, edit.new)]
    document = text.parse(text.splice(net.text, changes), net.path)
    changed = _renamed(
        replace(net, document=document),
        {old: new for edit in edits if isinstance(edit, Replace) for old, new in edit.rename.items()},
    )
    weights = model.weights
    if weights is not None:
        made_here = any(isinstance(piece, NewEntry) for piece in weights.pieces)  # then no longer V0
        if not made_here and upgrade_weights.is_v0(weights):
            weights = upgrade_weights.upgrade_weights(weights).weights()
        written = {layer.name: layer for layer in changed.all_layers}
        v1 = weights.dialect.name == "V1"
        stored = {edit.layer: list(_entries(edit, written, v1)) for edit in edits if _stores(edit)}
        weights = weights.replace(stored)
    return replace(model, net=changed, weights=weights)


def _stores(edit: Replace | Narrow) -> bool:
    return isinstance(edit, Replace) or edit.blobs is not None


def _entries(edit: Replace | Narrow, written: Mapping[str, Layer], v1: bool) -> Iterator[NewEntry]:
    """What the weights hold in the place of a layer."""
    if isinstance(edit, Replace):
        for new in edit.new:
            if new.blobs:
                yield NewEntry(new.name, new.blobs, definition(written[new.name], (new.block,), v1))
    elif edit.blobs:
        layer = written[edit.layer]
        known = schema.message_class("V1LayerParameter" if v1 else "LayerParameter").DESCRIPTOR.fields_by_name
        blocks = {field.name for field in layer.message.fields if field.name.endswith("_param")}
        yield NewEntry(edit.layer, edit.blobs, definition(layer, sorted(blocks & set(known)), v1))


def _new_values(layer: Layer, values: Sequence[NewValues]) -> Iterator[Edit]:
    """The edits to one block: numbers in their places, or fields added."""
    block = Block(layer.document, *layer.span)
    for one in values:
        message, depth = layer.message, 0
        while depth < len(one.block) and (found := message.last(one.block[depth])) is not None:
            if not isinstance(found.value, Message):
                raise NetError(f"{one.block[depth]} is no block", line=layer.line, layer=layer.name)
            message, depth = found.value, depth + 1
        old = [field.value for field in message.all(one.name)] if depth == len(one.block) else []
        if len(old) == len(one.values):
            yield from (Edit(was.start, was.end, new) for was, new in zip(old, one.values, strict=True))
        elif depth == len(one.block) and (old or one.add):
            block.set(message, one.name, one.values)
        elif one.add:
            inner = " ".join(f"{one.name}: {value}" for value in one.values)
            for name in reversed(one.block[depth:]):
                inner = f"{name} {{ {inner} }}"
            block.add(message, [inner])
    yield from block.edits()


def _renamed(net: Net, names: Mapping[str, str]) -> Net:
    """The net with blobs renamed in every bottom and top."""
    edits = [
        Edit(found.value.start, found.value.end, quote(names[found.value.string]))
        for layer in (net.all_layers if names else ())
        for key in ("bottom", "top")
        for found in layer.message.all(key)
        if isinstance(found.value, Scalar) and found.value.string in names
    ]
    return replace(net, document=text.parse(text.splice(net.text, edits), net.path)) if edits else net


def _replaced(net: Net, layer: Layer, new: Sequence[NewLayer]) -> list[Edit]:
    """The edits to the file that put new blocks in the place of one."""
    if new:
        return [Edit(*layer.span, _join(net, layer, new))]
    whole = Block(net.document, 0, len(net.text))
    whole.remove(next(found for found in net.document.root.fields if (found.start, found.end) == layer.span))
    return whole.edits()


def _join(net: Net, layer: Layer, new: Sequence[NewLayer]) -> str:
    """The new blocks, apart as the file's own layers are: on lines of their own, or in one line."""
    start, end = layer.span
    line_start = net.text.rfind("\n", 0, start) + 1
    indent = net.text[line_start:start]
    newline = "\r\n" if "\r\n" in net.text else "\n"
    between = newline + indent if not indent.strip() else " "
    return between.join(_copy(layer, one, start, end) for one in new)


def _copy(layer: Layer, new: NewLayer, start: int, end: int) -> str:
    block = Block(layer.document, start, end)
    message = layer.message
    block.set(message, "name", [quote(new.name)])
    for key, names in (("bottom", new.bottoms), ("top", new.tops)):
        if names is not None:
            block.set(message, key, [quote(one) for one in names])
    _param_settings(block, layer, new)
    inner = message.last(new.block)
    if inner is None or not isinstance(inner.value, Message):
        raise NetError(f"has no {new.block}", line=layer.line, layer=layer.name)
    for name, values in sorted(new.settings.items(), key=lambda item: bool(item[1])):  # removals first
        after = (
            "num_output",
            "kernel_size",
            "kernel_h",
            "kernel_w",
            "pad",
            "pad_h",
            "pad_w",
            "stride",
            "stride_h",
            "stride_w",
        )
        block.set(inner.value, name, values, after)
    return block.text()


def _param_settings(block: Block, layer: Layer, new: NewLayer) -> None:
    if layer.dialect == "V2":
        _param_blocks(block, layer, new)
    else:
        _param_lists(block, layer, new)


def _param_blocks(block: Block, layer: Layer, new: NewLayer) -> None:
    """V2: one ``param { }`` a blob."""
    specs = list(layer.message.all("param"))
    if len({(spec.start, spec.end) for spec in specs}) < len(specs):  # one list: param: [{ }, { }]
        kept = [_spec_text(layer, new, i, spec) for i, spec in enumerate(specs[: new.params])]
        block.set(layer.message, "param", kept)
    else:
        for spec in specs[new.params :]:
            block.remove(spec)
        for i, spec in enumerate(specs[: new.params]):
            _param_spec(block, layer, new, i, spec)
    if new.freeze_bias and len(specs) < 2:
        missing = ["param { lr_mult: 1 }", "param { lr_mult: 0 }"][len(specs) :]
        block.add(layer.message, missing, ("param",) if specs else ("top",))


def _param_spec(block: Block, layer: Layer, new: NewLayer, i: int, spec: Field) -> None:
    """Change the settings of blob ``i``."""
    if not isinstance(spec.value, Message):
        return
    if i == 0 and layer.param_specs[0].name and new.rename_weight:
        block.set(spec.value, "name", [quote(layer.param_specs[0].name + new.rename_weight)])
    if i == 1 and new.freeze_bias:
        block.set(spec.value, "lr_mult", ["0"])
    if not new.keep_force:
        block.set(spec.value, "force_mult", [])


def _spec_text(layer: Layer, new: NewLayer, i: int, spec: Field) -> str:
    """The changed settings of blob ``i`` as a value of their own."""
    assert isinstance(spec.value, Message)
    item = Block(layer.document, spec.value.start, spec.value.end)
    _param_spec(item, layer, new, i, spec)
    return f"{{{item.text()}}}"


def _param_lists(block: Block, layer: Layer, new: NewLayer) -> None:
    """V1: ``blobs_lr`` and its companions, one value a blob."""
    for name in _V1_LISTS:
        values = [field.value.text for field in layer.message.all(name) if isinstance(field.value, Scalar)]
        if name == "param" and values and new.rename_weight:
            values[0] = quote(layer.param_specs[0].name + new.rename_weight)
        if name == "blobs_lr" and new.freeze_bias:
            values = [values[0] if values else "1", "0"]
        block.set(layer.message, name, values[: new.params], ("top",))


def definition(layer: Layer, blocks: Sequence[str], v1: bool) -> bytes:
    """A layer without its blobs, as a caffemodel embeds it: name, type, bottoms, tops and parameter blocks."""
    from google.protobuf import text_format

    dialect = V1 if v1 else V2
    parameters: Any = schema.message_class("V1LayerParameter" if v1 else "LayerParameter")()
    if v1:
        enumerator = next((name for name, kind in V1_TYPES.items() if kind == layer.type), "NONE")
        kind_ = wire.tag(dialect.type, wire.VARINT) + wire.encode_varint(_v1_number(enumerator))
    else:
        kind_ = wire.encode_bytes(dialect.type, layer.type.encode())
    texts = [
        (dialect.layer_name, layer.name),
        *((dialect.bottom, name) for name in layer.bottoms),
        *((dialect.top, name) for name in layer.tops),
    ]
    strings = b"".join(wire.encode_bytes(number, text_bytes(value)) for number, value in texts)
    pool = parameters.DESCRIPTOR.file.pool
    for block in blocks:
        inner = layer.message.last(block)
        if inner is not None and isinstance(inner.value, Message):
            source = layer.document.text[inner.value.start : inner.value.end]
            text_format.Parse(
                source, getattr(parameters, block), allow_unknown_field=True, descriptor_pool=pool
            )
    return strings + kind_ + bytes(parameters.SerializeToString(deterministic=True))


def _v1_number(enumerator: str) -> int:
    return schema.enum_values("V1LayerParameter.LayerType")[enumerator]
