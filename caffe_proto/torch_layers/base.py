"""What the torch forms of the layers share: the call they see, the processes beside this one, small helpers.

A layer type is a function that takes the layer's settings once and gives its forward pass; the backward pass is
torch's. Shapes are those of the tensors, so that a net runs with any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers.spec import Request, Shapes

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Peers:
    """The processes that share a batch; alone, everything is what it is."""

    rank: int = 0
    world: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, which gradients flow through."""
        if self.world == 1:
            return tensor
        made: Tensor = _Sum.apply(tensor)
        return made


class _Sum(torch.autograd.Function):
    """The sum over the processes: each one's loss counts, so the gradients are summed too."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        made = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(made)
        return made

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(None, gradient)


ALONE = Peers()


@dataclass(frozen=True, eq=False)
class Call:
    """One forward pass of one layer.

    ``tops`` gives the shapes of the tops, as the layer table tells them from the tensors' own. ``state`` is what the layer
    keeps from one pass to the next.
    """

    inputs: Tensors
    blobs: Tensors
    tops: Callable[[], Shapes]
    state: dict[str, Tensor]
    peers: Peers


Forward = Callable[[Call], Tensors]
Make = Callable[[Any, Request], Forward]


def plain(function: Callable[[Tensor], Tensor]) -> Make:
    """A layer that takes one tensor to one and has no settings."""
    return lambda _params, _request: lambda call: (function(call.inputs[0]),)


def with_params(function: Callable[[Tensor, Any], Tensor]) -> Make:
    """A layer that takes one tensor to one by its settings."""
    return lambda params, _request: lambda call: (function(call.inputs[0], params),)


def of_call(function: Callable[[Call, Any], Tensors]) -> Make:
    """A layer that sees its whole call."""
    return lambda params, _request: lambda call: function(call, params)


def through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """``value`` forwards, the gradient of another tensor backwards: where Caffe clamps without minding it there."""
    return gradient_of + (value - gradient_of).detach()


def trailing(blob: Tensor, ndim: int, axis: int) -> Tensor:
    """A blob over the axes from ``axis`` on, with axes of 1 behind so that it broadcasts over ``ndim``."""
    return blob.reshape(*blob.shape, *(1,) * (ndim - axis - blob.dim()))


def along(values: Tensor, ndim: int, axis: int = 1) -> Tensor:
    """One number for each place of an axis, to broadcast over a tensor of ``ndim`` axes."""
    return values.reshape(*(-1 if i == axis else 1 for i in range(ndim)))


def whole(labels: Tensor) -> Tensor:
    """Labels as whole numbers; Caffe cuts them."""
    return labels.detach().to(torch.int64)
