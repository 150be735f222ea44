"""Layers that treat every number alone: activations, powers, dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..layers.pointwise import Affine, DropoutParams
from .base import Call, Make, Tensors, of_call, plain, with_params


def _relu(x: Tensor, slope: float) -> Tensor:
    """max(x, 0) + slope*min(x, 0), which makes NaN of -inf where the slope is 0."""
    return functional.leaky_relu(x, slope)


def _power(x: Tensor, a: Affine) -> Tensor:
    """(shift + scale*x)^power; a power or scale of 0 makes a constant, whatever x is."""
    if a.base * a.scale == 0:
        return torch.full_like(x, 1.0 if a.base == 0 else math.pow(a.shift, a.base))
    inner = _inner(x, a)
    return inner if a.base == 1 else inner**a.base


def _inner(x: Tensor, a: Affine) -> Tensor:
    scaled = x if a.scale == 1 else x * a.scale
    return scaled if a.shift == 0 else scaled + a.shift


def _exp(x: Tensor, a: Affine) -> Tensor:
    return torch.exp(_inner(x, a) * (1.0 if a.base == -1 else math.log(a.base)))


def _log(x: Tensor, a: Affine) -> Tensor:
    made = torch.log(_inner(x, a))
    return made if a.base == -1 else made / math.log(a.base)


def _threshold(x: Tensor, threshold: float) -> Tensor:
    return (x > threshold).to(x.dtype)


def _swish(x: Tensor, beta: float) -> Tensor:
    return x * torch.sigmoid(beta * x)


def _clip(x: Tensor, limits: tuple[float, float]) -> Tensor:
    return torch.clamp(x, *limits)


def _dropout(x: Tensor, p: DropoutParams) -> Tensor:
    """In training each number is kept with probability 1 - ratio, and scaled by 1 / (1 - ratio)."""
    return functional.dropout(x, p.ratio) if p.train else x


def _prelu(call: Call, shared: bool) -> Tensors:
    return (functional.prelu(call.inputs[0], call.blobs[0].reshape(-1)),)


TORCH: dict[str, Make] = {
    "AbsVal": plain(torch.abs),
    "BNLL": plain(lambda x: functional.softplus(x, threshold=torch.inf)),
    "Sigmoid": plain(torch.sigmoid),
    "TanH": plain(torch.tanh),
    "ReLU": with_params(_relu),
    "ReLU6": plain(functional.relu6),
    "ELU": with_params(lambda x, alpha: functional.elu(x, alpha)),
    "Power": with_params(_power),
    "Exp": with_params(_exp),
    "Log": with_params(_log),
    "Threshold": with_params(_threshold),
    "Swish": with_params(_swish),
    "Clip": with_params(_clip),
    "Dropout": with_params(_dropout),
    "PReLU": of_call(_prelu),
}
