"""The losses and Accuracy on numbers worked by hand, and against Caffe's sums written as loops."""

from __future__ import annotations

from math import exp, log, log1p

import numpy as np
import pytest
from layer_nets import Array, run, run_open_batch, shapes, text

from caffe_proto import graph, net
from caffe_proto.errors import NetError, UnsupportedError

TINY = float(np.finfo(np.float32).tiny)
RNG = np.random.default_rng(11)
SCORES = RNG.standard_normal((2, 3, 2, 2)).astype(np.float32)
PIXELS = np.array([[[0, 2], [1, 255]], [[255, 255], [2, 0]]])  # 255 is ignored where a test says so


def _prob(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def _scalar(kind: str, settings: str = "", **feeds: Array) -> float:
    (top,) = run(kind, settings, **feeds)
    assert top.shape == ()
    return float(top)


def test_softmax_loss_is_the_mean_of_minus_log() -> None:
    found = _scalar("SoftmaxWithLoss", x=[[0, 0], [log(3), 0]], y=[1, 0])
    assert found == pytest.approx((log(2) - log(0.75)) / 2, rel=1e-6)


def test_softmax_loss_stops_at_the_smallest_float() -> None:
    assert _scalar("SoftmaxWithLoss", x=[[0, 500]], y=[0]) == pytest.approx(-log(TINY), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "divisor"),
    [
        ("", 5),
        ("normalization: VALID", 5),
        ("normalization: FULL", 8),
        ("normalization: BATCH_SIZE", 2),
        ("normalization: NONE", 1),
        ("normalize: false", 2),
        ("normalize: true", 5),
        ("normalize: false normalization: NONE", 1),
    ],
)
def test_softmax_loss_normalization_over_pixels(settings: str, divisor: float) -> None:
    prob = _prob(SCORES, 1)
    total = -sum(
        log(prob[n, PIXELS[n, h, w], h, w]) for n, h, w in np.ndindex(2, 2, 2) if PIXELS[n, h, w] != 255
    )
    found = _scalar("SoftmaxWithLoss", f"loss_param {{ ignore_label: 255 {settings} }}", x=SCORES, y=PIXELS)
    assert found == pytest.approx(total / divisor, rel=1e-5)


@pytest.mark.parametrize("ignored", [255, -1])
def test_softmax_loss_of_nothing_but_ignored_labels_is_zero(ignored: int) -> None:
    settings = f"loss_param {{ ignore_label: {ignored} }}"
    assert _scalar("SoftmaxWithLoss", settings, x=[[1, 2]], y=[ignored]) == 0


def test_softmax_loss_along_the_last_axis() -> None:
    x = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    labels = np.array([[0, 1, 2], [3, 3, 0]])
    prob = _prob(x, 2)
    total = -sum(log(prob[n, t, labels[n, t]]) for n, t in np.ndindex(2, 3))
    found = _scalar("SoftmaxWithLoss", "softmax_param { axis: -1 }", x=x, y=labels)
    assert found == pytest.approx(total / 6, rel=1e-5)


def test_a_loss_is_not_yet_times_its_weight() -> None:
    assert _scalar("SoftmaxWithLoss", "loss_weight: 7", x=[[0, 0]], y=[1]) == pytest.approx(log(2), rel=1e-6)


def test_a_loss_without_a_named_top_is_a_sink() -> None:
    source = text("SoftmaxWithLoss", "loss_weight: 2", 0, x=(2, 3), y=(2,))
    assert shapes(source) == {"x": (2, 3), "y": (2,)}
    assert graph.build(net.parse(source)).outputs == ()


@pytest.mark.parametrize(
    ("kind", "settings", "tops"),
    [
        ("SoftmaxWithLoss", "", 2),
        ("SoftmaxWithLoss", "loss_weight: 1", 2),
        ("SoftmaxWithLoss", "loss_weight: 1 loss_weight: 0", 2),
        ("SoftmaxWithLoss", "loss_weight: 1 loss_weight: 0", 1),
        ("SoftmaxWithLoss", "loss_weight: 1 loss_weight: 0", 0),
        ("EuclideanLoss", "loss_weight: 1 loss_weight: 1", 1),
        ("InfogainLoss", 'infogain_loss_param { source: "h" }', 2),
        ("Accuracy", "loss_weight: 1", 2),
        ("Eltwise", "loss_weight: 1 loss_weight: 1", 1),
    ],
)
def test_loss_weight_is_given_once_a_top_or_not_at_all(kind: str, settings: str, tops: int) -> None:
    with pytest.raises(NetError, match="loss_weight"):
        shapes(
            text(kind, settings, tops, x=(2, 3), y=(2, 3) if kind in ("Eltwise", "EuclideanLoss") else (2,))
        )


def test_any_layer_may_have_a_loss_weight() -> None:
    assert shapes(text("Slice", "loss_weight: 1 loss_weight: 0", 2, x=(2, 4)))["t1"] == (2, 2)
    assert shapes(text("Accuracy", "", 2, x=(2, 4), y=(2,)))["t1"] == (4,)


def test_euclidean_loss_halves_the_square_over_the_items() -> None:
    assert _scalar("EuclideanLoss", x=[[1, 2], [3, 4]], y=[[0, 2], [5, 1]]) == (1 + 4 + 9) / 2 / 2
    assert _scalar("EuclideanLoss", x=[[1, 2], [3, 4]], y=[[[0], [2]], [[5], [1]]]) == (1 + 4 + 9) / 2 / 2


def test_hinge_loss() -> None:
    x = [[2, -0.5, -3], [0.25, 0.5, -2]]
    margins = [0, 0.5, 0, 1.25, 0.5, 0]
    assert _scalar("HingeLoss", x=x, y=[0, 1]) == sum(margins) / 2
    squared = _scalar("HingeLoss", "hinge_loss_param { norm: L2 }", x=x, y=[0, 1])
    assert squared == sum(m * m for m in margins) / 2


def _cross_entropy(x: float, target: float) -> float:
    return max(x, 0) - x * target + log1p(exp(-abs(x)))


@pytest.mark.parametrize(
    ("settings", "divisor"),
    [
        ("", 2),
        ("normalize: true", 3),
        ("normalization: FULL", 4),
        ("normalization: VALID", 3),
        ("normalization: NONE", 1),
    ],
)
def test_sigmoid_cross_entropy_loss(settings: str, divisor: float) -> None:
    x, target = [[30, -2], [0.5, 90]], [[0.25, 1], [-1, 0]]
    total = sum(_cross_entropy(*pair) for pair in ((30, 0.25), (-2, 1), (90, 0)))
    found = _scalar("SigmoidCrossEntropyLoss", f"loss_param {{ ignore_label: -1 {settings} }}", x=x, y=target)
    assert found == pytest.approx(total / divisor, rel=1e-6)


def test_sigmoid_cross_entropy_divides_by_the_items_unless_told() -> None:
    found = _scalar("SigmoidCrossEntropyLoss", x=[[1, 1, 1]], y=[[0, 1, 1]])
    assert found == pytest.approx(3 * log1p(exp(-1)) + 1, rel=1e-6)


def test_multinomial_logistic_loss_takes_probabilities() -> None:
    found = _scalar("MultinomialLogisticLoss", x=[[0.25, 0.75], [1, 0]], y=[0, 1])
    assert found == pytest.approx(-(log(0.25) + log(1e-20)) / 2, rel=1e-6)


@pytest.mark.parametrize(("settings", "divisor"), [("", 5), ("normalization: BATCH_SIZE", 2)])
def test_infogain_loss_weighs_the_logs_of_all_classes(settings: str, divisor: float) -> None:
    matrix = RNG.uniform(size=(3, 3)).astype(np.float32)
    prob = _prob(SCORES, 1)
    total = -sum(
        matrix[PIXELS[n, h, w], k] * log(prob[n, k, h, w])
        for n, h, w in np.ndindex(2, 2, 2)
        for k in range(3)
        if PIXELS[n, h, w] != 255
    )
    settings = f"loss_param {{ ignore_label: 255 {settings} }} loss_weight: 1 loss_weight: 0"
    loss, top = run("InfogainLoss", settings, (), 2, x=SCORES, y=PIXELS, z=matrix.reshape(1, 1, 3, 3))
    assert float(loss) == pytest.approx(total / divisor, rel=1e-5)
    assert np.allclose(top, prob, atol=1e-6)


def test_infogain_loss_does_not_read_a_matrix_file() -> None:
    source = text("InfogainLoss", 'infogain_loss_param { source: "h.binaryproto" }', x=(2, 3), y=(2,))
    assert shapes(source)["t0"] == ()
    with pytest.raises(UnsupportedError, match="source"):
        run("InfogainLoss", 'infogain_loss_param { source: "h.binaryproto" }', x=[[1, 2]], y=[0])


@pytest.mark.parametrize(
    ("settings", "far"), [("", 0.5**2), ("contrastive_loss_param { legacy_version: true margin: 3 }", 0.75)]
)
def test_contrastive_loss(settings: str, far: float) -> None:
    """Pairs at distance 5 (similar), 1.5 and 4 (not similar)."""
    settings = settings or "contrastive_loss_param { margin: 2 }"
    found = _scalar(
        "ContrastiveLoss", settings, a=[[3, 4], [1.5, 0], [4, 4]], b=[[0, 0], [0, 0], [0, 4]], y=[1, 0, 0]
    )
    assert found == pytest.approx((25 + far) / 3 / 2, rel=1e-6)


def test_accuracy_counts_an_equal_score_as_better() -> None:
    x = [[1, 2, 3], [3, 3, 0], [5, 1, 1]]
    assert _scalar("Accuracy", x=x, y=[2, 1, 0]) == pytest.approx(2 / 3)
    assert _scalar("Accuracy", "accuracy_param { top_k: 2 }", x=x, y=[0, 1, 1]) == pytest.approx(1 / 3)


def test_accuracy_by_class_leaves_out_what_is_ignored() -> None:
    x = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]]
    top, classes = run("Accuracy", "accuracy_param { ignore_label: 1 }", (), 2, x=x, y=[0, 1, 0, 2, 2])
    assert float(top) == pytest.approx(3 / 4)
    assert classes.tolist() == [1, 0, 0.5]


def test_accuracy_of_nothing_is_zero() -> None:
    assert _scalar("Accuracy", "accuracy_param { ignore_label: 0 }", x=[[1, 2]], y=[0]) == 0


def test_accuracy_over_pixels() -> None:
    right = [
        SCORES[n, :, h, w].argmax() == PIXELS[n, h, w]
        for n, h, w in np.ndindex(2, 2, 2)
        if PIXELS[n, h, w] < 3
    ]
    found = _scalar("Accuracy", "accuracy_param { ignore_label: 255 axis: -3 }", x=SCORES, y=PIXELS)
    assert found == pytest.approx(sum(right) / 5)


@pytest.mark.parametrize(
    ("kind", "settings", "bottoms", "cause"),
    [
        ("SoftmaxWithLoss", "", [(2, 3), (3,)], "first axis"),
        ("SoftmaxWithLoss", "", [(2, 3, 2), (2,)], "2 labels for 4"),
        ("SoftmaxWithLoss", "softmax_param { axis: 2 }", [(2, 3), (2,)], "axis 2"),
        ("SoftmaxWithLoss", "loss_param { normalization: PRE_FIXED }", [(2, 3), (2,)], "PRE_FIXED"),
        ("SoftmaxWithLoss", "", [(2, 3)], "1 bottom"),
        ("InfogainLoss", "", [(2, 3), (2,)], "source"),
        ("InfogainLoss", "", [(2, 3), (2,), (3, 2)], "3 x 3"),
        ("InfogainLoss", "loss_param { normalize: true }", [(2, 3), (2,), (3, 3)], "normalize"),
        ("MultinomialLogisticLoss", "", [(2, 3), (2, 2)], "one number"),
        ("MultinomialLogisticLoss", "", [(2, 3), (3,)], "first axis"),
        ("EuclideanLoss", "", [(2, 3), (2, 4)], "size"),
        ("EuclideanLoss", "", [(2, 1, 1, 1, 1), (2,)], "4 axes"),
        ("SigmoidCrossEntropyLoss", "", [(2, 3), (2, 4)], "size"),
        ("HingeLoss", "", [(2, 3), (1, 2)], "first axis"),
        ("ContrastiveLoss", "", [(2, 3), (2, 4), (2,)], "alike"),
        ("ContrastiveLoss", "", [(2, 3, 2), (2, 3, 1), (2,)], "alike"),
        ("ContrastiveLoss", "", [(2, 3), (2, 3), (2, 2)], "one number"),
        ("ContrastiveLoss", "", [(2, 3), (2, 3), (1,)], "fewer"),
        ("Accuracy", "accuracy_param { top_k: 4 }", [(2, 3), (2,)], "top_k 4"),
        ("Accuracy", "", [(2, 3), (3,)], "3 labels for 2"),
        ("Accuracy", "accuracy_param { axis: 5 }", [(2, 3), (2,)], "axis 5"),
    ],
)
def test_refusals(kind: str, settings: str, bottoms: list[tuple[int, ...]], cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text(kind, settings, **{f"x{i}": shape for i, shape in enumerate(bottoms)}))


@pytest.mark.parametrize(
    ("kind", "settings", "tail", "label"),
    [
        ("SoftmaxWithLoss", "loss_param { ignore_label: 0 }", (3, 2, 2), (1, 2, 2)),
        ("SoftmaxWithLoss", "loss_param { normalization: BATCH_SIZE }", (3,), (1, 1, 1)),
        ("SoftmaxWithLoss", "softmax_param { axis: 2 }", (2, 3), (2,)),
        ("MultinomialLogisticLoss", "", (3,), ()),
        ("EuclideanLoss", "", (3, 1), (3,)),
        ("HingeLoss", "", (3,), ()),
        ("SigmoidCrossEntropyLoss", "loss_param { normalization: FULL }", (3,), (3, 1)),
        ("Accuracy", "", (3, 2), (2,)),
    ],
)
def test_an_open_batch_gives_what_a_fixed_one_gives(
    kind: str, settings: str, tail: tuple[int, ...], label: tuple[int, ...]
) -> None:
    feeds = {"x": RNG.uniform(0.1, 1, (5, *tail)), "y": RNG.integers(0, 3, (5, *label))}
    open_ = run_open_batch(text(kind, settings, x=(2, *tail), y=(2, *label)), feeds)
    (fixed,) = run(kind, settings, **feeds)
    assert np.allclose(open_["t0"], fixed, rtol=1e-6)
