"""BatchNorm with Caffe's three moving sums, Scale, Bias, LRN, MVN, Normalize, Softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..layers.norm import AffineParams, BatchNormParams, LrnParams
from ..layers.reduce import MvnParams
from ..layers.spec import Request, canonical_axis
from ..layers.ssd import NormalizeParams
from .base import Call, Forward, Make, Peers, Tensors, along, of_call, trailing, with_params

STATISTICS = frozenset({"BatchNorm"})  # types whose blobs no gradient ever moves


def _batch_norm(p: BatchNormParams, request: Request) -> Forward:
    fraction = float(request["batch_norm_param"]["moving_average_fraction"])
    moves = request.phase == "TRAIN"

    def forward(call: Call) -> Tensors:
        (x,) = call.inputs
        if p.global_stats:
            return (_by_stored(x, call.blobs, p.eps),)
        y, mean, variance = _by_batch(x, p.eps, call.peers)
        if moves:
            _move(call.blobs, fraction, mean, variance)
        return (y,)

    return forward


def _by_stored(x: Tensor, blobs: Tensors, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) with the stored sums times 0, or 1 over blobs[2]."""
    factor = torch.where(blobs[2] == 0, 0.0, 1 / blobs[2])
    mean, variance = blobs[0] * factor, blobs[1] * factor
    if x.dim() == 1:
        return (x - mean) / torch.sqrt(variance + eps)
    return functional.batch_norm(x, mean, variance, eps=eps)


def _by_batch(x: Tensor, eps: float, peers: Peers) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized by the batch of all processes: (y, mean, variance times m / (m - 1)), m numbers a channel."""
    seen = x.reshape(1, 1, -1) if x.dim() == 1 else x
    channels = seen.shape[1]
    count = seen.numel() // channels * peers.world
    if peers.world == 1 and count > 1 and eps > 0:
        mean, variance = x.new_zeros(channels), x.new_zeros(channels)
        made = functional.batch_norm(seen, mean, variance, None, None, True, 1.0, eps)
        return made.reshape(x.shape), mean, variance
    axes = [axis for axis in range(seen.dim()) if axis != 1]
    mean = peers.sum(seen.sum(axes)) / count
    centred = seen - along(mean, seen.dim())
    variance = peers.sum((centred**2).sum(axes)) / count
    made = centred / along(torch.sqrt(variance + eps), seen.dim())
    return made.reshape(x.shape), mean, variance * (count / (count - 1) if count > 1 else 1.0)


@torch.no_grad()
def _move(blobs: Tensors, fraction: float, mean: Tensor, variance: Tensor) -> None:
    """Each stored sum becomes fraction * itself + what is new, the third one's news being 1."""
    for blob, new in zip(blobs, (mean, variance, torch.ones_like(blobs[2])), strict=True):
        blob.mul_(fraction).add_(new)


def _covering(call: Call, p: AffineParams, index: int) -> Tensor:
    """The own blob ``index``, or the second bottom, to broadcast against the first."""
    x = call.inputs[0]
    blob = call.blobs[index] if index >= 0 else call.inputs[1]
    axis = canonical_axis(p.axis, x.dim()) if p.own or blob.dim() else 0
    return trailing(blob, x.dim(), axis)


def _scale(call: Call, p: AffineParams) -> Tensors:
    scale = _covering(call, p, 0 if p.own else -1)
    if p.bias:
        return (torch.addcmul(_covering(call, p, int(p.own)), call.inputs[0], scale),)
    return (call.inputs[0] * scale,)


def _bias(call: Call, p: AffineParams) -> Tensors:
    return (call.inputs[0] + _covering(call, p, 0 if p.own else -1),)


def _lrn(x: Tensor, p: LrnParams) -> Tensor:
    """x / (k + alpha/size * sum x²)^beta over channels; within one, x / (1 + alpha * mean x²)^beta (k ignored)."""
    if not p.within:
        return functional.local_response_norm(x, p.size, p.alpha, p.beta, p.k)
    mean = functional.avg_pool2d(x**2, p.size, 1, (p.size - 1) // 2, count_include_pad=True)
    return x * _falling(1 + p.alpha * mean, p.beta)


def _falling(x: Tensor, beta: float) -> Tensor:
    """x^-beta, the usual exponent by roots: powers take several times as long."""
    if beta != 0.75:
        return x**-beta
    root = torch.rsqrt(x)
    return root * torch.sqrt(root)


def _mvn(x: Tensor, p: MvnParams) -> Tensor:
    """(x - mean) / (sqrt(var) + eps), over each channel or, across channels, over each item."""
    axes = list(range(1 if p.across else 2, x.dim()))
    centred = x - x.mean(axes, keepdim=True) if axes else torch.zeros_like(x)
    if not p.variance:
        return centred
    variance = (centred**2).mean(axes, keepdim=True) if axes else centred**2
    return centred / (torch.sqrt(variance) + p.eps)


def _normalize(call: Call, p: NormalizeParams) -> Tensors:
    """scale * x / sqrt(eps + sum x²), summed over the channels of each place, or across all of an item."""
    (x,) = call.inputs
    axes = list(range(1, x.dim())) if p.across else [1]
    norm = torch.sqrt((x**2).sum(axes, keepdim=True) + p.eps)
    scale = call.blobs[0] if p.shared else along(call.blobs[0], x.dim())
    return (x / norm * scale,)


TORCH: dict[str, Make] = {
    "BatchNorm": _batch_norm,
    "Scale": of_call(_scale),
    "Bias": of_call(_bias),
    "LRN": with_params(_lrn),
    "MVN": with_params(_mvn),
    "Normalize": of_call(_normalize),
    "Softmax": with_params(lambda x, axis: torch.softmax(x, axis)),
}
