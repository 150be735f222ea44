"""RNN, LSTM and LSTMUnit against Caffe's recurrence written as a loop."""

from __future__ import annotations

import numpy as np
import pytest
from layer_nets import macs, run, run_open_batch, shapes, text

from caffe_proto import graph, net
from caffe_proto.errors import NetError
from caffe_proto.shape_inference import infer

RNG = np.random.default_rng(3)
STEPS, STREAMS, INPUTS, STATIC, SIZE = 4, 2, 3, 5, 2
CONT = np.array([[0, 1], [1, 0], [1, 1], [0.5, 1]])
X = RNG.standard_normal((STEPS, STREAMS, INPUTS))
S = RNG.standard_normal((STREAMS, STATIC))
H0, C0 = RNG.standard_normal((2, 1, STREAMS, SIZE))
OUTPUT = f"recurrent_param {{ num_output: {SIZE} }}"
EXPOSED = f"recurrent_param {{ num_output: {SIZE} expose_hidden: true }}"


def _blobs(kind: str, static: bool) -> list[np.ndarray]:
    rows = 4 * SIZE if kind == "LSTM" else SIZE
    made = [(rows, INPUTS), (rows,), *([(rows, STATIC)] if static else []), (rows, SIZE)]
    if kind == "RNN":
        made += [(SIZE, SIZE), (SIZE,)]
    return [RNG.standard_normal(shape) for shape in made]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def _unit(c: np.ndarray, gates: np.ndarray, cont: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    i, f, o, g = np.split(gates, 4, -1)
    c = cont * _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    return c, _sigmoid(o) * np.tanh(c)


def _expected(
    kind: str, blobs: list[np.ndarray], static: bool, h: np.ndarray, c: np.ndarray
) -> list[np.ndarray]:
    """All outputs, then the last h and, for a LSTM, the last c."""
    weight, bias, *rest = blobs
    into = X @ weight.T + bias + (S @ rest.pop(0).T if static else 0)
    tops = []
    for total, cont in zip(into, CONT[..., None], strict=True):
        total = total + (cont * h) @ rest[0].T
        if kind == "LSTM":
            c, h = _unit(c, total, cont)
            tops.append(h)
        else:
            h = np.tanh(total)
            tops.append(np.tanh(h @ rest[1].T + rest[2]))
    return [np.stack(tops), h[None], *([c[None]] if kind == "LSTM" else [])]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("exposed", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_recurrence(kind: str, exposed: bool, static: bool) -> None:
    blobs = _blobs(kind, static)
    states = {"h0": H0, "c0": C0} if kind == "LSTM" else {"h0": H0}
    feeds = {"x": X, "cont": CONT, **({"s": S} if static else {}), **(states if exposed else {})}
    zeros = np.zeros((STREAMS, SIZE))
    wanted = _expected(kind, blobs, static, H0[0] if exposed else zeros, C0[0] if exposed else zeros)
    if not exposed:
        wanted = wanted[:1]
    made = run(kind, EXPOSED if exposed else OUTPUT, blobs, len(wanted), **feeds)
    for top, array in zip(made, wanted, strict=True):
        assert np.allclose(top, array, atol=1e-6)


def test_cont_of_zero_starts_afresh() -> None:
    """Two steps that are alike and do not go on from one another give the same."""
    blobs = _blobs("LSTM", False)
    x = np.repeat(X[:1], 2, 0)
    (afresh,) = run("LSTM", OUTPUT, blobs, x=x, cont=np.zeros((2, STREAMS)))
    (on,) = run("LSTM", OUTPUT, blobs, x=x, cont=np.ones((2, STREAMS)))
    assert np.array_equal(afresh[0], afresh[1])
    assert np.abs(on[0] - on[1]).max() > 1e-3


def test_a_single_step() -> None:
    blobs = _blobs("RNN", False)
    (top,) = run("RNN", OUTPUT, blobs, x=X[:1], cont=CONT[:1])
    hidden = np.tanh(X[:1] @ blobs[0].T + blobs[1])
    assert np.allclose(top, np.tanh(hidden @ blobs[3].T + blobs[4]), atol=1e-6)


def test_more_input_axes_are_one() -> None:
    blobs = _blobs("RNN", False)
    (flat,) = run("RNN", OUTPUT, blobs, x=X, cont=CONT)
    (deep,) = run("RNN", OUTPUT, blobs, x=X[..., None], cont=CONT)
    assert np.array_equal(flat, deep)


def test_lstm_unit() -> None:
    c, gates, cont = RNG.standard_normal((1, 3, 2)), RNG.standard_normal((1, 3, 8)), np.array([[0, 1, 1]])
    new_c, h = run("LSTMUnit", "", (), 2, c=c, x=gates, cont=cont)
    wanted_c, wanted_h = _unit(c, gates, cont[..., None])
    assert np.allclose(new_c, wanted_c, atol=1e-6) and np.allclose(h, wanted_h, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "static", "count"),
    [("LSTM", False, 2 * 4 * (8 * 3 + 8 * 2)), ("LSTM", True, 2 * (4 * (8 * 3 + 8 * 2) + 8 * 5)),
     ("RNN", False, 2 * 4 * (2 * 3 + 2 * 2 + 2 * 2)), ("RNN", True, 2 * (4 * (2 * 3 + 2 * 2 + 2 * 2) + 2 * 5))],
)  # fmt: skip
def test_macs_count_every_product(kind: str, static: bool, count: int) -> None:
    third = {"s": (STREAMS, STATIC)} if static else {}
    assert macs(text(kind, OUTPUT, x=(STEPS, STREAMS, INPUTS), cont=(STEPS, STREAMS), **third)) == count


def test_learnt_blobs() -> None:
    source = text("LSTM", OUTPUT, x=(4, 2, 3, 2), cont=(4, 2), s=(2, 5))
    shaped = infer(graph.build(net.parse(source)))
    assert shaped.blobs(len(shaped.graph.nodes) - 1) == ((8, 6), (8,), (8, 5), (8, 2))


@pytest.mark.parametrize(
    ("kind", "settings", "tops", "bottoms", "cause"),
    [
        ("LSTM", "", 1, [(4, 2, 3), (4, 2)], "num_output"),
        ("LSTM", OUTPUT, 1, [(4, 2, 3)], "1 bottom"),
        ("LSTM", OUTPUT, 1, [(4, 2), (4, 2)], "steps x streams x inputs"),
        ("LSTM", OUTPUT, 1, [(4, 2, 3), (4, 2, 1)], "cont"),
        ("LSTM", OUTPUT, 1, [(4, 2, 3), (4, 3)], "cont"),
        ("LSTM", OUTPUT, 1, [(4, 2, 3), (4, 2), (3, 5)], "static"),
        ("LSTM", OUTPUT, 1, [(4, 2, 3), (4, 2), (2,)], "static"),
        ("LSTM", OUTPUT, 3, [(4, 2, 3), (4, 2)], "3 tops"),
        ("LSTM", OUTPUT, 1, [(4, 2, 3), (4, 2), (1, 2, 2), (1, 2, 2)], "4 bottoms"),
        ("LSTM", EXPOSED, 3, [(4, 2, 3), (4, 2)], "2 bottoms"),
        ("LSTM", EXPOSED, 1, [(4, 2, 3), (4, 2), (1, 2, 2), (1, 2, 2)], "1 tops"),
        ("LSTM", EXPOSED, 3, [(4, 2, 3), (4, 2), (1, 2, 2), (1, 2, 3)], "exposed state"),
        ("RNN", EXPOSED, 2, [(4, 2, 3), (4, 2), (2, 2)], "exposed state"),
        ("LSTMUnit", "", 2, [(1, 2, 3), (1, 2, 9), (1, 2)], "4n"),
        ("LSTMUnit", "", 2, [(2, 2, 3), (2, 2, 12), (2, 2)], "4n"),
    ],
)
def test_refusals(kind: str, settings: str, tops: int, bottoms: list[tuple[int, ...]], cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text(kind, settings, tops, **{f"x{i}": shape for i, shape in enumerate(bottoms)}))


def test_an_open_number_of_steps_is_refused() -> None:
    source = text("RNN", OUTPUT, x=(STEPS, STREAMS, INPUTS), cont=(STEPS, STREAMS))
    with pytest.raises(NetError, match="fixed size"):
        run_open_batch(source, {}, _blobs("RNN", False))
