"""RNN, LSTM and LSTMUnit, unrolled over time: ONNX's own recurrent operators know no ``cont``.

Every forward pass starts from a hidden state of zeros, as Caffe's first one does. (Without expose_hidden,
Caffe goes on from the state its last forward pass left, wherever ``cont`` of the first step is not 0.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import NetError, ShapeError
from .emit import Emitter
from .spec import LayerSpec, Request, Shape, Shapes, at_least, size, text

_GATES = 4  # input, forget, output, candidate


@dataclass(frozen=True)
class RecurrentParams:
    """``hidden`` state blobs are exposed as the last bottoms and tops; ``static`` tells of a third bottom."""

    num_output: int
    hidden: int
    static: bool


_Blobs = Callable[[RecurrentParams, Shapes], Shapes]


def _reader(states: int) -> Callable[[Request], RecurrentParams]:
    def read(request: Request) -> RecurrentParams:
        p = request["recurrent_param"]
        num_output = at_least(p["num_output"], 1, "num_output")
        hidden = states if p["expose_hidden"] else 0
        _count("bottoms", request.n_bottoms, (2 + hidden, 3 + hidden))
        _count("tops", request.n_tops, (1 + hidden,))
        return RecurrentParams(num_output, hidden, request.n_bottoms > 2 + hidden)

    return read


def _count(what: str, found: int, wanted: tuple[int, ...]) -> None:
    if found not in wanted:
        numbers = " or ".join(map(str, wanted))
        raise NetError(f"has {found} {what}, with this expose_hidden it takes {numbers}")


def _infer(p: RecurrentParams, bottoms: Shapes) -> Shapes:
    """(steps, streams, num_output), then (1, streams, num_output) for each exposed state."""
    x, cont = bottoms[:2]
    if len(x) < 3:
        raise ShapeError(f"the first bottom must be steps x streams x inputs, found {text(x)}")
    if cont != x[:2]:
        raise ShapeError(f"the second bottom (cont) must be {text(x[:2])}, found {text(cont)}")
    if p.static and (len(bottoms[2]) < 2 or bottoms[2][0] != x[1]):
        raise ShapeError(f"the static bottom must be {x[1]} streams x inputs, found {text(bottoms[2])}")
    state = (1, x[1], p.num_output)
    for found in bottoms[len(bottoms) - p.hidden :]:
        if found != state:
            raise ShapeError(f"an exposed state must be {text(state)}, found {text(found)}")
    return ((*x[:2], p.num_output), *(state,) * p.hidden)


def _into(p: RecurrentParams, bottoms: Shapes, rows: int) -> Shapes:
    """The blobs that lead from the bottoms into the cell: Wx, b and, with a static bottom, its weight."""
    static = ((rows, size(bottoms[2][1:])),) if p.static else ()
    return ((rows, size(bottoms[0][2:])), (rows,), *static)


def _lstm_blobs(p: RecurrentParams, bottoms: Shapes) -> Shapes:
    rows = _GATES * p.num_output
    return (*_into(p, bottoms, rows), (rows, p.num_output))


def _rnn_blobs(p: RecurrentParams, bottoms: Shapes) -> Shapes:
    n = p.num_output
    return (*_into(p, bottoms, n), (n, n), (n, n), (n,))


def _macs(blobs: _Blobs) -> Callable[[RecurrentParams, Shapes, Shapes], int]:
    """Every matrix once a step and stream; the static one once a stream."""

    def macs(p: RecurrentParams, bottoms: Shapes, _tops: Shapes) -> int:
        steps, streams = bottoms[0][:2]
        matrices = [size(blob) for blob in blobs(p, bottoms) if len(blob) == 2]
        static = matrices.pop(1) if p.static else 0
        return streams * (steps * sum(matrices) + static)

    return macs


def _product(e: Emitter, source: str, blob: int) -> str:
    """source · Wᵀ"""
    return e.node("MatMul", source, e.const(e.blobs[blob].T, str(blob)))


def _steps(e: Emitter, p: RecurrentParams) -> tuple[list[str], list[str]]:
    """For each step: Wx·x + b + Wstatic·x_static as (1, streams, rows), and cont as (1, streams, 1)."""
    steps, streams = e.in_shapes[0][:2]
    e.static(0, range(len(e.in_shapes[0])), "a recurrent layer")
    inputs = e.node("Reshape", e.inputs[0], e.ints((steps, streams, size(e.in_shapes[0][2:])), "shape"))
    total = e.node("Add", _product(e, inputs, 0), e.blob(1))
    if p.static:
        static = e.node("Reshape", e.inputs[2], e.ints((streams, size(e.in_shapes[2][1:])), "shape"))
        total = e.node("Add", total, _product(e, static, 2))
    cont = e.node("Reshape", e.inputs[1], e.ints((steps, streams, 1), "shape"))
    return list(e.split(total, 0, steps)), list(e.split(cont, 0, steps))


def _recur(e: Emitter, weight: str, total: str, cont: str, before: str | None) -> str:
    """total + W · (cont * h), where h is zeros before the first step."""
    if before is None:
        return total
    return e.node("Add", total, e.node("MatMul", e.node("Mul", cont, before), weight))


def _lstm(e: Emitter, p: RecurrentParams) -> None:
    """A LSTMUnit a step; all h are the first top."""
    weight = e.const(e.blobs[-1].T, str(len(e.blobs) - 1))
    h, c = e.inputs[-2:] if p.hidden else (None, None)
    made = []
    for total, cont in zip(*_steps(e, p), strict=True):
        c, h = _unit(e, c, _recur(e, weight, total, cont, h), cont)
        made.append(h)
    e.node("Concat", *made, to=e.outputs[0], axis=0)
    _expose(e, h, c)


def _rnn(e: Emitter, p: RecurrentParams) -> None:
    """h = tanh(Wx·x + b + Wh·(cont*h)); the first top is tanh(Wo·h + bo) of every step."""
    weight = e.const(e.blobs[-3].T, str(len(e.blobs) - 3))
    h = e.inputs[-1] if p.hidden else None
    made = []
    for total, cont in zip(*_steps(e, p), strict=True):
        h = e.node("Tanh", _recur(e, weight, total, cont, h))
        made.append(h)
    last = len(e.blobs) - 1
    output = _product(e, e.node("Concat", *made, axis=0), last - 1)
    e.node("Tanh", e.node("Add", output, e.blob(last)), to=e.outputs[0])
    _expose(e, h)


def _expose(e: Emitter, *states: str | None) -> None:
    for state, to in zip(states, e.outputs[1:], strict=False):
        assert state is not None
        e.node("Identity", state, to=to)


def _unit(
    e: Emitter, c: str | None, gates: str, cont: str, to: tuple[str | None, ...] = (None, None)
) -> tuple[str, str]:
    """c = cont*sigmoid(f)*c + sigmoid(i)*tanh(g), h = sigmoid(o)*tanh(c): the new (c, h). No c: zeros."""
    parts = tuple(e.sheet.unique(f"{e.layer}/{gate}") for gate in "ifog")
    e.node("Split", gates, to=parts, axis=2)
    i, f, o = (e.node("Sigmoid", part) for part in parts[:3])
    candidate = e.node("Tanh", parts[3])
    if c is None:
        new_c = e.node("Mul", i, candidate)
    else:
        kept = e.node("Mul", e.node("Mul", cont, f), c)
        new_c = e.node("Add", kept, e.node("Mul", i, candidate), to=to[0])
    return new_c, e.node("Mul", o, e.node("Tanh", new_c), to=to[1])


def _unit_infer(_params: None, bottoms: Shapes) -> Shapes:
    """Bottoms: c (1, streams, n), gates (1, streams, 4n), cont (1, streams)."""
    c, gates, cont = bottoms
    wanted: tuple[Shape, ...] = ()
    if len(c) == 3 and c[0] == 1:
        wanted = ((*c[:2], _GATES * c[2]), c[:2])
    if (gates, cont) != wanted:
        found = ", ".join(map(text, bottoms))
        raise ShapeError(f"bottoms must be 1 x streams x n, 1 x streams x 4n and 1 x streams, found {found}")
    return (c, c)


def _lstm_unit(e: Emitter, _params: None) -> None:
    c, gates, cont = e.inputs
    _unit(e, c, gates, e.node("Unsqueeze", cont, e.ints([2], "axes")), to=e.outputs)


SPECS = {
    "RNN": LayerSpec(
        params=_reader(1),
        infer=_infer,
        blobs=_rnn_blobs,
        macs=_macs(_rnn_blobs),
        onnx=_rnn,
        bottoms=(2, 4),
        tops=(1, 2),
    ),
    "LSTM": LayerSpec(
        params=_reader(2),
        infer=_infer,
        blobs=_lstm_blobs,
        macs=_macs(_lstm_blobs),
        onnx=_lstm,
        bottoms=(2, 5),
        tops=(1, 3),
    ),
    "LSTMUnit": LayerSpec(infer=_unit_infer, onnx=_lstm_unit, bottoms=(3, 3), tops=(2, 2)),
}
