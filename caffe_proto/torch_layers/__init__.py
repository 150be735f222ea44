"""The layer types that can be trained: for each its forward pass in torch, made from the layer's settings."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

from . import conv, loss, norm, pointwise, pool, recurrent, shape
from .base import Make

TORCH: Mapping[str, Make] = ChainMap(
    conv.TORCH, pool.TORCH, pointwise.TORCH, norm.TORCH, shape.TORCH, recurrent.TORCH, loss.TORCH
)
