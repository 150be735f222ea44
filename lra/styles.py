"""How new layers are named and written: our default, and the habits of the published tools.

A scheme says ``_lowrank``, ``_linear``, ``_v``, ``_h``; a style says what stands in the file for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from caffe_proto.net import Layer, Net
from caffe_proto.rewrite import Namer, NewLayer
from caffe_proto.text import Message
from caffe_proto.weights import Blobs

from .decomposition import Step, StepShape
from .schemes.spatial import SPATIAL_HV
from .targets import Target


@dataclass(frozen=True)
class Style:
    """``suffixes`` replace the schemes' own. ``explicit``: suffixes whose layers spell every setting as _h and _w.

    ``frozen_bias``: suffixes of inner layers that carry a bias of zeros with lr_mult 0, as Tai's tool left it.
    ``top_from_blob``: suffixes of inner layers whose top is named after the old top, not after the layer.
    ``last_top``: the chain's top is named after its last layer, and what reads the old one reads that.
    ``written``: suffixes whose layers write pad, kernel_size and stride even where they are the default.
    ``fillers``: by suffix, fillers that the layer is given. ``vertical_first``: the tool knows a horizontal layer
    behind a vertical one only.
    """

    suffixes: Mapping[str, str]
    explicit: frozenset[str] = frozenset()
    frozen_bias: frozenset[str] = frozenset()
    top_from_blob: frozenset[str] = frozenset()
    last_top: bool = False
    written: frozenset[str] = frozenset()
    fillers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    vertical_first: bool = False

    def writes(self, scheme: str) -> bool:
        """Whether the tool knows the chains of a scheme."""
        return not (self.vertical_first and scheme == SPATIAL_HV.name)

    def suffix(self, step: str) -> str:
        """What a scheme's suffix is called in this style."""
        return self.suffixes.get(step, step)


_TAI = frozenset({"_v", "_h"})
_HE_FILLERS = {"weight_filler": '{ type: "msra" }', "bias_filler": '{ type: "constant" value: 0 }'}
STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "default": Style({}),
        "wen": Style(
            {},
            explicit=_TAI,
            frozen_bias=frozenset({"_v"}),
            top_from_blob=frozenset({"_lowrank"}),
            vertical_first=True,
        ),
        "tai": Style({}, explicit=_TAI, frozen_bias=frozenset({"_v"}), vertical_first=True),
        "he": Style(
            {"_v": "_V", "_h": "_H", "_lowrank": "_W_prime", "_linear": "_P"},
            last_top=True,
            written=frozenset({"_linear"}),
            fillers={"_linear": _HE_FILLERS},
            vertical_first=True,
        ),
        "girshick": Style({"_lowrank": "_L", "_linear": "_U"}, last_top=True),
    }
)


def unwritable(style: str, scheme: str) -> str | None:
    """Why a style has no layers for a scheme; None where it has, or where there is no such style."""
    if style not in STYLES or STYLES[style].writes(scheme):
        return None
    return f'the style "{style}" knows V before H only, {scheme} is the other order'


def new_layers(
    layer: Layer,
    target: Target,
    steps: Sequence[Step | StepShape],
    style: Style,
    namer: Namer,
    gains_bias: bool = False,
) -> tuple[NewLayer, ...]:
    """The blocks that stand for a chain in the place of ``layer``: its bottoms on the first, its tops on the last.

    A single step without a suffix is the layer itself with other numbers.

    ``gains_bias``: the last one has a bias even where the layer had none.
    """
    if [step.suffix for step in steps] == [""]:
        return (_refitted(layer, target, steps[0], gains_bias),)
    made: list[NewLayer] = []
    bottoms: tuple[str, ...] | None = None
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        suffix = style.suffix(step.suffix)
        name = namer.unique(layer.name + suffix)
        from_blob = step.suffix in style.top_from_blob
        tops = None if last else _inner_tops(layer, name, suffix, from_blob, namer)
        has_bias = _has_bias(layer, target)
        frozen = not last and has_bias and step.suffix in style.frozen_bias
        made.append(
            NewLayer(
                name=name,
                bottoms=bottoms,
                tops=tops,
                block=_block_name(target),
                settings=_settings(layer, target, step, style, not position, last or frozen)
                | ({"bias_term": ["true"]} if last and gains_bias and not has_bias else {}),
                blobs=_blobs(step, target, frozen) if isinstance(step, Step) else None,
                params=2 if last or frozen else 1,
                rename_weight=suffix,
                keep_force=not last,
                freeze_bias=frozen,
            )
        )
        bottoms = tops
    return tuple(made)


def _refitted(layer: Layer, target: Target, step: Step | StepShape, gains_bias: bool) -> NewLayer:
    """The layer as it is, with other numbers."""
    bias = {"bias_term": ["true"]} if gains_bias and not _has_bias(layer, target) else {}
    return NewLayer(
        name=layer.name,
        bottoms=None,
        tops=None,
        block=_block_name(target),
        settings=bias,
        blobs=_blobs(step, target, False) if isinstance(step, Step) else None,
        params=2,
    )


def merged_layer(
    layer: Layer,
    target: Target,
    step: Step | StepShape,
    *,
    bottoms: tuple[str, ...],
    tops: tuple[str, ...],
    has_bias: bool,
    axis: int | None,
) -> NewLayer:
    """The block of ``layer`` as the one layer that a row of them is: between other blobs, with another shape and numbers.

    ``has_bias``: of the whole row; ``axis``: from which the first of a row of fully connected layers flattens.
    """
    settings = _settings(layer, target, step, STYLES["default"], True, has_bias)
    if has_bias and not _has_bias(layer, target):
        settings |= {"bias_term": ["true"]}
    if target.dense:
        settings |= {"axis": [] if axis in (None, 1) else [str(axis)]}
    else:
        h, w = step.dilation
        settings |= {"dilation": [] if (h, w) == (1, 1) else [str(h)] if h == w else [str(h), str(w)]}
        settings |= {"group": [] if step.group == 1 else [str(step.group)]}
    return NewLayer(
        name=layer.name,
        bottoms=bottoms,
        tops=tops,
        block=_block_name(target),
        settings=settings,
        blobs=_blobs(step, target, False) if isinstance(step, Step) else None,
        params=2,
    )


def is_appendage(name: str, before: str) -> bool:
    """Whether a layer is the last 1 x 1 layer of a chain, ``conv2_linear``, and the one before is of that chain."""
    for suffix in {style.suffix("_linear") for style in STYLES.values()}:
        stem = name.removesuffix(suffix)
        if stem and stem != name and before.startswith(stem):
            return True
    return False


def renamed_tops(layer: Layer, new: Sequence[NewLayer], style: Style, net: Net) -> dict[str, str]:
    """Old top -> the last new layer's name, where the style wants that and nothing but this layer makes the blob.

    The blob keeps its name where nobody reads it: it is an output of the net, known by that name.
    """
    if not style.last_top or len(layer.tops) != 1:
        return {}
    (top,) = layer.tops
    makers = {other.name for other in net.all_layers if top in other.tops and top not in other.bottoms}
    read = any(top in other.bottoms and top not in other.tops for other in net.all_layers)
    return {top: new[-1].name} if makers == {layer.name} and read else {}


def _inner_tops(layer: Layer, name: str, suffix: str, from_blob: bool, namer: Namer) -> tuple[str, ...]:
    if len(layer.tops) == 1 and not from_blob:
        return (name,)
    wanted = [f"{top}{suffix}" for top in layer.tops]
    return tuple(one if one == name else namer.unique(one) for one in wanted)


def _block_name(target: Target) -> str:
    return "inner_product_param" if target.dense else "convolution_param"


def _block(layer: Layer, target: Target) -> Message | None:
    found = layer.message.last(_block_name(target))
    return found.value if found is not None and isinstance(found.value, Message) else None


def _has_bias(layer: Layer, target: Target) -> bool:
    block = _block(layer, target)
    return block is None or block.string("bias_term", "true") not in ("false", "False", "f", "0")


def _blobs(step: Step, target: Target, zero_bias: bool) -> Blobs:
    """The step's weight and bias as the caffemodel holds them: float32, matrices for fully connected layers."""
    weight = step.weight.astype("float32")
    if target.dense:
        weight = weight.reshape(weight.shape[:2])
        weight = weight.T.copy() if target.transposed else weight
    if zero_bias:
        return weight, weight.dtype.type(0) * weight.reshape(weight.shape[0], -1)[:, 0]
    return (weight,) if step.bias is None else (weight, step.bias.astype("float32"))


def _settings(
    layer: Layer, target: Target, step: Step | StepShape, style: Style, first: bool, keeps_bias: bool
) -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {"num_output": [str(step.shape[0])]}
    if not keeps_bias:
        settings |= {"bias_term": ["false"], "bias_filler": []}
    block = _block(layer, target)
    if target.dense:
        from_end = block is not None and block.string("axis").startswith("-")
        return settings | ({"axis": ["-1"]} if from_end and not first else {})  # a later step has fewer axes
    present = {field.name for field in block.fields} if block else set()
    for name, value in style.fillers.get(step.suffix, {}).items():
        settings |= {name: [value]} if name == "weight_filler" or _has_bias(layer, target) else {}
    explicit = step.suffix in style.explicit
    present |= {"pad", "stride"} if step.suffix in style.written else set()
    settings |= _pair("kernel", "kernel_size", (step.shape[2], step.shape[3]), None, present, explicit)
    settings |= _pair("pad", "pad", step.pad, 0, present, explicit)
    settings |= _pair("stride", "stride", step.stride, 1, present, explicit)
    h, w = step.dilation
    if "dilation" in present:
        settings["dilation"] = [str(h)] if h == w else [str(h), str(w)]
    return settings


def _pair(
    stem: str, both: str, values: tuple[int, int], default: int | None, present: set[str], explicit: bool
) -> dict[str, list[str]]:
    """One (h, w) setting in Caffe's spelling; where it is the default and was not written, it stays unwritten."""
    h, w = values
    names = (both, f"{stem}_h", f"{stem}_w")
    if explicit or h != w:
        return {both: [], names[1]: [str(h)], names[2]: [str(w)]}
    unwritten = h == default and not present.intersection(names)
    return {names[1]: [], names[2]: [], both: [] if unwritten else [str(h)]}
