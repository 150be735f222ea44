"""The table of layer types: one record a type, one file a family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from . import (
    channelwise,
    conv,
    dense,
    detection,
    ends,
    indexing,
    loss,
    norm,
    planes,
    pointwise,
    pool,
    recurrent,
    reduce,
    shape,
    softmax,
    ssd,
    variants,
)
from .spec import LayerSpec

_FAMILIES = (
    conv, dense, pool, norm, pointwise, shape, softmax, reduce, indexing, recurrent, loss, ends,
    ssd, detection, variants, planes, channelwise,
)  # fmt: skip


def merge(families: tuple[ModuleType, ...]) -> Mapping[str, LayerSpec]:
    """The SPECS of all families in one table; raises ValueError where two define the same type."""
    table: dict[str, LayerSpec] = {}
    for family in families:
        for name, spec in family.SPECS.items():
            if name in table:
                raise ValueError(f"two families define the layer type {name}")
            table[name] = spec
    return MappingProxyType(table)


LAYERS = merge(_FAMILIES)
