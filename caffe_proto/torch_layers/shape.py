"""Layers that move, choose, gather or combine numbers: Concat to Tile, ArgMax, Reduction, Eltwise, Parameter."""

from __future__ import annotations

from functools import reduce
from operator import mul

import torch
from torch import Tensor
from torch.nn import functional

from ..layers.planes import InterpParams
from ..layers.reduce import ArgMaxParams, ReductionParams, TileParams
from ..layers.shape import VIEW, CropParams, EltwiseParams, SliceParams, _crop_starts
from ..layers.spec import canonical_axis
from .base import Call, Make, Tensors, of_call, whole, with_params


def _concat(call: Call, axis: int) -> Tensors:
    return (torch.cat(list(call.inputs), axis),)


def _slice(call: Call, p: SliceParams) -> Tensors:
    axis = canonical_axis(p.axis, call.inputs[0].dim())
    return torch.split(call.inputs[0], [shape[axis] for shape in call.tops()], axis)


def _split(call: Call, n_tops: int) -> Tensors:
    return (call.inputs[0],) * n_tops


def _to_top(call: Call, _params: object) -> Tensors:
    return (call.inputs[0].reshape(call.tops()[0]),)


def _crop(call: Call, p: CropParams) -> Tensors:
    made, like = call.inputs
    axis, starts = _crop_starts(p, (tuple(made.shape), tuple(like.shape)))
    for i, start in enumerate(starts, axis):
        made = made.narrow(i, start, like.shape[i])
    return (made,)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger number; of equal ones the gradient is the second's, as in Caffe."""
    return torch.where(a > b, a, b)


def _eltwise(call: Call, p: EltwiseParams) -> Tensors:
    """PROD; SUM with one coeff a bottom; MAX, for which Caffe reads coeff and ignores it."""
    terms = list(call.inputs)
    if p.operation == "SUM" and p.coeff:
        terms = [term if coeff == 1 else coeff * term for term, coeff in zip(terms, p.coeff, strict=True)]
    terms = terms[1:] if p.in_place else terms
    if p.operation == "MAX":
        first, *others = terms
        return (
            (reduce(lambda most, term: _larger(term, most), others[1:], _larger(first, others[0])),)
            if (others)
            else (first,)
        )
    if p.operation == "PROD":
        return (reduce(mul, terms),)
    return (reduce(torch.add, terms),)


def _arg_max(x: Tensor, p: ArgMaxParams) -> Tensor:
    """The top_k greatest, of equal ones the last first."""
    axis = 1 if p.axis is None else canonical_axis(p.axis, x.dim())
    seen = x.flatten(1) if p.axis is None else x
    values, places = torch.sort(seen.detach().flip(axis), dim=axis, descending=True, stable=True)
    values = values.narrow(axis, 0, p.top_k)
    indices = (seen.shape[axis] - 1 - places.narrow(axis, 0, p.top_k)).to(x.dtype)
    if p.axis is not None:
        return values if p.values else indices
    chosen = torch.stack([indices, values], 1) if p.values else indices[:, None]
    return chosen.reshape(*chosen.shape, *(1,) * (x.dim() - 3))


def _reduction(x: Tensor, p: ReductionParams) -> Tensor:
    """coeff * (sum x, sum |x|, sum x², mean x) over ``axis`` and all behind it."""
    axis = canonical_axis(p.axis, x.dim())
    rows = x.reshape(*x.shape[:axis], -1)
    if p.operation == "MEAN":
        made = rows.mean(-1)
    elif p.operation == "ASUM":
        made = rows.abs().sum(-1)
    else:
        made = (rows**2 if p.operation == "SUMSQ" else rows).sum(-1)
    return made if p.coeff == 1 else p.coeff * made


def _tile(x: Tensor, p: TileParams) -> Tensor:
    repeats = [1] * x.dim()
    repeats[p.axis] = p.tiles
    return x.repeat(*repeats)


def _batch_reindex(call: Call, _params: object) -> Tensors:
    return (call.inputs[0][whole(call.inputs[1])],)


def _filter(call: Call, _params: object) -> Tensors:
    """The items whose selector is not 0."""
    *blobs, selector = call.inputs
    chosen = selector.detach().reshape(-1) != 0
    return [blob[chosen] for blob in blobs]


def _view(call: Call, _params: object) -> Tensors:
    """The numbers of the first bottom in the shape of the second: memory that an in-place layer rewrote."""
    return (call.inputs[0].reshape(call.inputs[1].shape),)


def _permute(x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x.permute(*order, *(axis for axis in range(x.dim()) if axis not in order))


def _interp(call: Call, p: InterpParams) -> Tensors:
    """Bilinear between the pixels, the first and the last of either axis on those of the bottom."""
    x, (begin, end) = call.inputs[0], p.crop
    cropped = x[:, :, begin : x.shape[2] - end, begin : x.shape[3] - end]
    return (functional.interpolate(cropped, call.tops()[0][2:], mode="bilinear", align_corners=True),)


TORCH: dict[str, Make] = {
    "Concat": of_call(_concat),
    "Slice": of_call(_slice),
    "Split": of_call(_split),
    "Flatten": of_call(_to_top),
    "Reshape": of_call(_to_top),
    "Crop": of_call(_crop),
    "Eltwise": of_call(_eltwise),
    "ArgMax": with_params(_arg_max),
    "Reduction": with_params(_reduction),
    "Tile": with_params(_tile),
    "BatchReindex": of_call(_batch_reindex),
    "Filter": of_call(_filter),
    "Parameter": of_call(lambda call, _shape: (call.blobs[0],)),
    "Silence": of_call(lambda _call, _params: ()),
    "Permute": with_params(_permute),
    "Interp": of_call(_interp),
    VIEW: of_call(_view),
}
