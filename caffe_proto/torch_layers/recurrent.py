"""RNN, LSTM and LSTMUnit, unrolled over time.

Without expose_hidden a pass goes on from the state that the last one left, as in Caffe: ``cont`` of the first
step decides. No gradient flows back into an earlier pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.recurrent import RecurrentParams
from .base import Call, Make, Tensors, of_call


def _steps(call: Call, p: RecurrentParams) -> tuple[Tensor, Tensor]:
    """For each step: Wx·x + b + Wstatic·x_static as (steps, streams, rows), and cont as (steps, streams, 1)."""
    x, cont = call.inputs[:2]
    total = x.flatten(2) @ call.blobs[0].t() + call.blobs[1]
    if p.static:
        total = total + call.inputs[2].flatten(1) @ call.blobs[2].t()
    return total, cont.detach()[:, :, None]


def _begin(call: Call, p: RecurrentParams, names: str) -> list[Tensor]:
    """The states before the first step, (streams, num_output) each."""
    if p.hidden:
        return [state[0] for state in call.inputs[len(call.inputs) - p.hidden :]]
    streams = call.inputs[0].shape[1]
    zeros = call.inputs[0].new_zeros(streams, p.num_output)
    found = (call.state.get(name, zeros) for name in names)
    return [state if len(state) == streams else zeros for state in found]


def _end(call: Call, p: RecurrentParams, made: list[Tensor], names: str, *states: Tensor) -> Tensors:
    """All steps in one, and the last states: as tops, or kept for the next pass."""
    top = torch.stack(made)
    if p.hidden:
        return (top, *(state[None] for state in states))
    call.state.update((name, state.detach()) for name, state in zip(names, states, strict=True))
    return (top,)


def _unit(c: Tensor, gates: Tensor, cont: Tensor) -> tuple[Tensor, Tensor]:
    """c = cont*sigmoid(f)*c + sigmoid(i)*tanh(g), h = sigmoid(o)*tanh(c): the new (c, h)."""
    i, f, o, g = gates.chunk(4, -1)
    c = cont * torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return c, torch.sigmoid(o) * torch.tanh(c)


def _lstm(call: Call, p: RecurrentParams) -> Tensors:
    weight = call.blobs[-1].t()
    h, c = _begin(call, p, "hc")
    made = []
    for total, cont in zip(*_steps(call, p), strict=True):
        c, h = _unit(c, total + (cont * h) @ weight, cont)
        made.append(h)
    return _end(call, p, made, "hc", h, c)


def _rnn(call: Call, p: RecurrentParams) -> Tensors:
    """h = tanh(Wx·x + b + Wh·(cont*h)); the first top is tanh(Wo·h + bo) of every step."""
    within, out, shift = call.blobs[-3:]
    (h,) = _begin(call, p, "h")
    made = []
    for total, cont in zip(*_steps(call, p), strict=True):
        h = torch.tanh(total + (cont * h) @ within.t())
        made.append(torch.tanh(h @ out.t() + shift))
    return _end(call, p, made, "h", h)


def _lstm_unit(call: Call, _params: None) -> Tensors:
    c, gates, cont = call.inputs
    return _unit(c, gates, cont.detach()[:, :, None])


TORCH: dict[str, Make] = {
    "LSTM": of_call(_lstm),
    "RNN": of_call(_rnn),
    "LSTMUnit": of_call(_lstm_unit),
}
