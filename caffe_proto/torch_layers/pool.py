"""Pooling and SPP with exactly Caffe's windows.

torch lays the same windows as Caffe, rounded up or down, wherever it makes as many of them; else the windows
are laid out by explicit padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedError
from ..layers.pool import Pair, PoolParams, out_size
from ..layers.reduce import SppParams, _levels
from .base import Call, Make, Tensors, of_call

_LOWEST = torch.finfo(torch.float32).min  # Caffe's -FLT_MAX


def _sizes(p: PoolParams, x: Tensor) -> tuple[Pair, Pair]:
    """(window, number of windows) on either axis."""
    hw = (x.shape[2], x.shape[3])
    k = p.window(hw)
    high, wide = (
        out_size(h, one, s, pad, end, ceil=p.ceil, clips=p.clips)
        for h, one, s, pad, end in zip(hw, k, p.stride, p.pad, p.behind, strict=True)
    )
    return k, (high, wide)


def _rounding(p: PoolParams, x: Tensor, k: Pair, out: Pair) -> bool | None:
    """The ceil_mode with which torch lays the same windows, None where it does not."""
    if p.pad != p.behind or any(2 * pad > one for pad, one in zip(p.pad, k, strict=True)):
        return None
    for ceil in (False, True):
        laid = []
        for h, one, s, pad in zip(x.shape[2:], k, p.stride, p.pad, strict=True):
            span = h + 2 * pad - one
            n = (-(-span // s) if ceil else span // s) + 1
            laid.append(n - 1 if ceil and (n - 1) * s >= h + pad else n)
        if tuple(laid) == out and min(h + 2 * p.pad[i] - k[i] for i, h in enumerate(x.shape[2:])) >= 0:
            return ceil
    return None


def pool(x: Tensor, p: PoolParams) -> Tensors:
    """The pooled planes and, where asked for, the mask: h * W + w of each maximum."""
    if p.method == "STOCHASTIC":
        raise UnsupportedError("stochastic pooling is not done", hint="use AVE or MAX pooling")
    k, out = _sizes(p, x)
    ceil = _rounding(p, x, k, out)
    if p.method == "AVE":
        return (_average(x, p, k, out, ceil),)
    return _largest(x, p, k, out, ceil)


def _laid_out(x: Tensor, p: PoolParams, k: Pair, out: Pair, fill: float) -> Tensor:
    """The planes padded (or cut) to what exactly ``out`` windows cover."""
    sides = []
    for h, one, s, pad, n in zip(x.shape[2:], k, p.stride, p.pad, out, strict=True):
        sides.append((pad, (n - 1) * s + one - pad - h))
    return functional.pad(x, (*sides[1], *sides[0]), value=fill)


def _largest(x: Tensor, p: PoolParams, k: Pair, out: Pair, ceil: bool | None) -> Tensors:
    if ceil is not None:
        if not p.mask:
            return (functional.max_pool2d(x, k, p.stride, p.pad, ceil_mode=ceil),)
        values, index = functional.max_pool2d(x, k, p.stride, p.pad, ceil_mode=ceil, return_indices=True)
        return values, index.to(x.dtype)
    padded = _laid_out(x, p, k, out, _LOWEST)
    values, places = functional.max_pool2d(padded, k, p.stride, return_indices=True)
    if not p.mask:
        return (values,)
    row, column = places // padded.shape[3] - p.pad[0], places % padded.shape[3] - p.pad[1]
    inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
    return values, torch.where(inside, row * x.shape[3] + column, -1).to(x.dtype)


def _average(x: Tensor, p: PoolParams, k: Pair, out: Pair, ceil: bool | None) -> Tensor:
    """The divisor counts the padding, but not what a last window hangs over beyond it."""
    if ceil is not None:
        return functional.avg_pool2d(x, k, p.stride, p.pad, ceil_mode=ceil, count_include_pad=True)
    sums = functional.avg_pool2d(_laid_out(x, p, k, out, 0.0), k, p.stride, divisor_override=1)
    spans = []
    for h, one, s, pad, end, n in zip(x.shape[2:], k, p.stride, p.pad, p.behind, out, strict=True):
        start = torch.arange(n, device=x.device) * s - pad
        spans.append(torch.clamp(start + one, max=h + end) - start)
    return sums / (spans[0][:, None] * spans[1]).to(x.dtype)


def _spp(call: Call, p: SppParams) -> Tensors:
    """Every level pooled, flattened, one behind the other; a single level is not flattened."""
    (x,) = call.inputs
    levels = [pool(x, level)[0] for level, _ in _levels(p, tuple(x.shape))]
    return (levels[0] if len(levels) == 1 else torch.cat([one.flatten(1) for one in levels], 1),)


TORCH: dict[str, Make] = {"Pooling": of_call(lambda call, p: pool(call.inputs[0], p)), "SPP": of_call(_spp)}
