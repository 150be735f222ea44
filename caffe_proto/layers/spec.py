"""The record a layer type is, and what the records share.

Everything this program knows of a type stands in one ``LayerSpec``; the walks (shapes, cost, export,
coupling) are loops that call one column of it and name no type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..errors import NetError, ShapeError
from ..net import Layer
from ..typed import Typed, field_info
from .channels import Channels, fixed
from .emit import Emitter

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
Arrays = tuple[np.ndarray, ...]
Affine = tuple[np.ndarray, np.ndarray]

SIDES = frozenset({"pad_l", "pad_r", "pad_t", "pad_b"})
_MOST_SHOWN = 32  # axes of a shape in a message


@dataclass(frozen=True)
class Request:
    """A layer block about to be interpreted: what ``LayerSpec.params`` reads from."""

    layer: Layer
    typed: Typed
    phase: str

    @property
    def n_bottoms(self) -> int:
        """How many bottoms the layer names."""
        return len(self.layer.bottoms)

    @property
    def n_tops(self) -> int:
        """How many tops the layer names."""
        return len(self.layer.tops)

    def __getitem__(self, name: str) -> Typed:
        """A parameter block, empty where the layer has none or its dialect knows none of that name."""
        if name in field_info(self.typed.type_name):
            value: Typed = self.typed[name]
            return value
        return Typed(None, field_info("LayerParameter")[name].type, self.typed.document)


def _no_params(_request: Request) -> None:
    return None


def _no_blobs(_params: Any, _bottoms: Shapes) -> Shapes:
    return ()


def _not_affine(_params: Any, _blobs: Arrays, _bottoms: Shapes) -> None:
    return None


def _free(_params: Any, _bottoms: Shapes, _tops: Shapes) -> int:
    return 0


@dataclass(frozen=True)
class LayerSpec:
    """One layer type. ``macs`` left at its default says that the layer is free on purpose.

    ``bottoms`` and ``tops`` bound their counts (an upper bound of None: any number). ``aliases`` says that
    the tops share the memory of the first bottom, as Caffe's Split, Flatten and Reshape do. ``source`` says
    that the tops are fed from outside, ``any_fields`` that fields it does not know cannot change the result, ``loss`` that Caffe adds an unnamed top and a loss_weight of 1 where the
    net gives none. ``filters`` says that its tops' channels are those of learnt filters. ``channels`` notes how these depend on the
    bottoms' (see ``channels.Channels``); left at its default, it says that they cannot be followed. ``blobs`` gives the shapes a caffemodel must hold. ``affine`` gives (scale, shift), float64
    of (channels,) each, where the layer is x*scale + shift along axis 1, else None. ``open_axes`` are axes of
    the tops whose size is known only when the net has run.
    """

    infer: Callable[[Any, Shapes], Shapes]
    onnx: Callable[[Emitter, Any], None] | None
    bottoms: tuple[int, int | None] = (1, 1)
    tops: tuple[int, int | None] = (1, 1)
    channels: Callable[[Channels, Any], None] = fixed
    params: Callable[[Request], Any] = _no_params
    blobs: Callable[[Any, Shapes], Shapes] = _no_blobs
    macs: Callable[[Any, Shapes, Shapes], int] = _free
    affine: Callable[[Any, Arrays, Shapes], Affine | None] = _not_affine
    understood: frozenset[str] = frozenset()
    aliases: bool = False
    source: bool = False
    any_fields: bool = False
    loss: bool = False
    filters: bool = False
    open_axes: tuple[int, ...] = ()


def fork_fields(block: str, message: str = "LayerParameter") -> frozenset[str]:
    """A parameter block of a fork and all fields in it, for ``LayerSpec.understood``."""
    inner = field_info(message)[block]
    names = field_info(inner.type) if inner.kind == "message" else {}
    return frozenset({block}).union(*(fork_fields(name, inner.type) for name in names))


def same(_params: Any, bottoms: Shapes) -> Shapes:
    """The shape of the first bottom."""
    return (bottoms[0],)


def canonical_axis(axis: int, ndim: int, *, inclusive: bool = False) -> int:
    """An axis counted from the front; raises ShapeError where the blob has no such axis."""
    limit = ndim + 1 if inclusive else ndim
    if not -limit <= axis < limit:
        raise ShapeError(f"axis {axis} is out of range for a blob of {ndim} axes")
    return axis + limit if axis < 0 else axis


def legacy(shape: Shape) -> tuple[int, int, int, int]:
    """(num, channels, height, width), 1 where there is no such axis; raises ShapeError above four axes."""
    if len(shape) > 4:
        raise ShapeError(f"takes at most 4 axes, found {text(shape)}")
    num, channels, height, width = (*shape, 1, 1, 1, 1)[:4]
    return num, channels, height, width


def around(shape: Shape, axis: int) -> Shape:
    """(before, at, behind): the shape seen as three axes, ``axis`` in the middle."""
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])


def text(shape: Sequence[int]) -> str:
    """A shape as people write it, cut off where it is absurdly long."""
    more = [f"... ({len(shape):,} axes)"] if len(shape) > _MOST_SHOWN else []
    return " x ".join([*map(str, shape[:_MOST_SHOWN]), *more]) if shape else "()"


def spatial_pair(typed: Typed, name: str, default: int, *, both: str | None = None) -> tuple[int, int]:
    """Caffe's (h, w) spelling of one setting: ``<name>``, or ``<name>_h`` and ``<name>_w``.

    Raises NetError where both spellings stand together.
    """
    one = both or name
    h, w = f"{name}_h", f"{name}_w"
    if h in typed or w in typed:
        if one in typed:
            raise NetError(
                f"{one} and {h}/{w} are both given; Caffe takes one spelling", line=typed.line(one)
            )
        return typed[h], typed[w]
    value = int(typed[one]) if one in typed else default
    return value, value


def side_pads(typed: Typed) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(top, left) and (bottom, right) where a fork's ``SIDES`` are given, 0 for one that is not; else None.

    Raises NetError where another spelling stands beside them.
    """
    given = [name for name in typed if name in SIDES]
    if not given:
        return None
    for name in ("pad", "pad_h", "pad_w"):
        if name in typed:
            raise NetError(
                f"{name} and {given[0]} are both given; the fork takes one spelling", line=typed.line(name)
            )
    return (typed["pad_t"], typed["pad_l"]), (typed["pad_b"], typed["pad_r"])


def at_least(value: int, low: int, what: str) -> int:
    """The value itself; raises NetError where it is below ``low``."""
    if value < low:
        raise NetError(f"{what} is {value}, it must be at least {low}")
    return value


def size(shape: Sequence[int]) -> int:
    """How many numbers a blob of that shape holds."""
    return prod(shape)
