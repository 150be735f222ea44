"""Layers of forks against plain NumPy and vectors worked by hand; what they refuse."""

from __future__ import annotations

from math import ceil, floor, sqrt
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED, packed, v2_layer
from helpers import shape as blob_shape
from layer_nets import macs, model, run, run_open_batch, shapes, text

from caffe_proto import graph, net, shape_inference, weights, wire
from caffe_proto.errors import CaffemodelError, NetError, UnsupportedError
from caffe_proto.onnx_export import Request, export_onnx
from caffe_proto.runtime import Engine, error, open_onnx, session
from lra import targets
from lra.cli import main


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32)


# SSD ---------------------------------------------------------------------------------------------------------


def test_permute_names_the_first_axes_and_keeps_the_order_of_the_rest() -> None:
    x = random(2, 3, 4, 5)
    (top,) = run("Permute", "permute_param { order: 0 order: 2 order: 3 order: 1 }", x=x)
    assert np.array_equal(top, x.transpose(0, 2, 3, 1))
    (short,) = run("Permute", "permute_param { order: 2 }", x=x)
    assert np.array_equal(short, x.transpose(2, 0, 1, 3))
    (same,) = run("Permute", x=x)
    assert np.array_equal(same, x)


@pytest.mark.parametrize(
    ("order", "cause"), [("order: 1 order: 1", "twice"), ("order: 4", "axis 4 of a blob of 4 axes")]
)
def test_permute_refusals(order: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text("Permute", f"permute_param {{ {order} }}", x=(1, 2, 3, 4)))


def test_normalize_by_hand() -> None:
    """Channels 3 and 4 at one place have the norm 5; across both places it is sqrt(25 + 144)."""
    x = [[[[3, 0]], [[4, 12]]]]
    (place,) = run(
        "Normalize", "norm_param { across_spatial: false channel_shared: false }", [[10, 100]], x=x
    )
    assert np.allclose(place, [[[[6, 0]], [[80, 100]]]])
    (across,) = run("Normalize", "norm_param { }", [13.0], x=x)
    assert np.allclose(across, x)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3)])
def test_normalize_adds_eps_under_the_root(across: bool, shape: tuple[int, ...]) -> None:
    x, scale = random(*shape), random(3)
    settings = f"norm_param {{ across_spatial: {str(across).lower()} channel_shared: false eps: 0.5 }}"
    (top,) = run("Normalize", settings, [scale], x=x)
    for n in range(2):
        item = x[n].reshape(3, -1).astype(np.float64)
        norms = np.sqrt(0.5 + (item**2).sum(None if across else 0))
        assert np.allclose(top[n].reshape(3, -1), scale[:, None] * item / norms, atol=1e-6)


def test_normalize_takes_two_axes_at_least() -> None:
    with pytest.raises(NetError, match="at least 2 axes"):
        shapes(text("Normalize", x=(4,)))


def prior_boxes(
    layer: tuple[int, int],
    image: tuple[int, int],
    sizes: list[tuple[int, int | None]],
    ratios: list[float],
    step: tuple[float, float] | None = None,
    offset: float = 0.5,
) -> list[list[float]]:
    """The boxes one by one, ``ratios`` with flipped ones and without 1."""
    boxes = []
    for row in range(layer[0]):
        for column in range(layer[1]):
            step_h, step_w = step or (image[0] / layer[0], image[1] / layer[1])
            y, x = (row + offset) * step_h, (column + offset) * step_w
            for low, high in sizes:
                side = float(low)
                extents = [(side, side)]
                if high:
                    side = sqrt(low * high)
                    extents.append((side, side))
                extents += [(side * sqrt(ratio), side / sqrt(ratio)) for ratio in ratios]
                for w, h in extents:
                    boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return [
        [value / extent for value, extent in zip(box, (image[1], image[0]) * 2, strict=True)] for box in boxes
    ]


def test_prior_box_by_hand() -> None:
    """One place in the middle of 100 x 200: a square of 20, one of sqrt(20 * 80) = 40, and 2:1 of that."""
    settings = "prior_box_param { min_size: 20 max_size: 80 aspect_ratio: 4 flip: false variance: 0.1 }"
    (top,) = run("PriorBox", settings, x=np.zeros((1, 1, 1, 1)), data=np.zeros((1, 3, 100, 200)))
    assert np.allclose(top[0, 0, :4], [0.45, 0.4, 0.55, 0.6])
    assert np.allclose(top[0, 0, 4:8], [0.4, 0.3, 0.6, 0.7])
    assert np.allclose(top[0, 0, 8:], [0.3, 0.4, 0.7, 0.6])
    assert np.allclose(top[0, 1], 0.1)


@pytest.mark.parametrize(
    ("settings", "sizes", "ratios", "image", "step", "offset"),
    [
        ("min_size: 30 max_size: 60 aspect_ratio: 2", [(30, 60)], [2, 0.5], (96, 120), None, 0.5),
        ("min_size: 30.7 aspect_ratio: 2 aspect_ratio: 3", [(30, None)], [2, 0.5, 3, 1 / 3], (96, 120), None, 0.5),
        ("min_size: 8 min_size: 16 max_size: 16 max_size: 20 aspect_ratio: 1 aspect_ratio: 2 aspect_ratio: 2",
         [(8, 16), (16, 20)], [2, 0.5], (96, 120), None, 0.5),
        ("min_size: 9 flip: false aspect_ratio: 3 img_size: 300 step: 32 offset: 0", [(9, None)], [3], (300, 300), (32, 32), 0),
        ("min_size: 9 img_h: 50 img_w: 70 step_h: 12 step_w: 9", [(9, None)], [], (50, 70), (12, 9), 0.5),
    ],
)  # fmt: skip
def test_prior_box_against_a_loop(settings, sizes, ratios, image, step, offset) -> None:  # type: ignore[no-untyped-def]
    variance = "variance: 0.1 variance: 0.2 variance: 0.3 variance: 0.4"
    (top,) = run(
        "PriorBox", f"prior_box_param {{ {settings} {variance} }}",
        x=np.zeros((2, 5, 3, 4)), data=np.zeros((2, 3, 96, 120)),
    )  # fmt: skip
    expected = prior_boxes((3, 4), image, sizes, ratios, step, offset)
    assert np.allclose(top[0, 0].reshape(-1, 4), expected, atol=1e-6)
    assert np.allclose(top[0, 1].reshape(-1, 4), [[0.1, 0.2, 0.3, 0.4]] * len(expected))


def test_prior_box_clips_into_the_image() -> None:
    feeds = {"x": np.zeros((1, 1, 2, 2)), "data": np.zeros((1, 3, 10, 10))}
    (free,) = run("PriorBox", "prior_box_param { min_size: 8 }", **feeds)
    (clipped,) = run("PriorBox", "prior_box_param { min_size: 8 clip: true }", **feeds)
    assert free[0, 0].min() < 0 and free[0, 0].max() > 1
    assert np.array_equal(clipped[0, 0], free[0, 0].clip(0, 1))
    assert np.allclose(clipped[0, 1], 0.1)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ("", "needs min_size"),
        ("min_size: 0", "must be positive"),
        ("min_size: 4 max_size: 4", "greater than its min_size"),
        ("min_size: 4 min_size: 5 max_size: 9", "1 max_size for 2 min_size"),
        ("min_size: 4 variance: 1 variance: 1", "2 values of variance"),
        ("min_size: 4 variance: -1", "variance must be positive"),
        ("min_size: 4 img_size: 3 img_h: 3 img_w: 3", "both given"),
        ("min_size: 4 img_h: 3", "positive"),
        ("min_size: 4 step: 3 step_h: 3 step_w: 3", "both given"),
        ("min_size: 4 step: -1", "positive"),
    ],
)
def test_prior_box_refusals(settings: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text("PriorBox", f"prior_box_param {{ {settings} }}", x=(1, 1, 2, 2), data=(1, 3, 9, 9)))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    sizes = [max(0, box[2] - box[0]) * max(0, box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(sizes) - width * height)


def decode(code: str, prior: np.ndarray, variance: np.ndarray, loc: np.ndarray) -> np.ndarray:
    moved = loc * variance
    if code == "CORNER":
        return prior + moved
    extent = np.array([prior[2] - prior[0], prior[3] - prior[1]])
    if code == "CORNER_SIZE":
        return prior + moved * np.tile(extent, 2)
    centre = (prior[:2] + prior[2:]) / 2 + moved[:2] * extent
    half = np.exp(moved[2:]) * extent / 2
    return np.concatenate([centre - half, centre + half])


def detect(
    loc: np.ndarray, conf: np.ndarray, prior: np.ndarray, classes: int, code: str = "CORNER", *,
    shared: bool = True, background: int = 0, in_target: bool = False, threshold: float = -np.inf,
    nms: float = 0.3, top_k: int = -1, keep: int = -1,
) -> list[list[float]]:  # fmt: skip
    """DetectionOutput image by image, class by class, box by box."""
    n = prior.shape[2] // 4
    boxes, variances = prior.astype(np.float64).reshape(2, n, 4)
    rows: list[list[float]] = []
    for image in range(len(loc)):
        places = loc[image].reshape(n, 1 if shared else classes, 4)
        scores = conf[image].reshape(n, classes)
        found: list[list[float]] = []
        for label in range(classes):
            if label == background:
                continue
            order = [i for i in np.argsort(-scores[:, label], kind="stable") if scores[i, label] > threshold]
            kept: list[np.ndarray] = []
            for i in order[:top_k] if top_k > -1 else order:
                variance = np.ones(4) if in_target else variances[i]
                box = decode(code, boxes[i], variance, places[i, 0 if shared else label])
                if all(overlap(box, other) <= nms for other in kept):
                    kept.append(box)
                    found.append([image, label, scores[i, label], *box])
        if keep > -1 and len(found) > keep:
            best = sorted(found, key=lambda row: -row[2])[:keep]
            found = [row for row in found if any(row is other for other in best)]
        rows += found
    return rows or [[image, *[-1] * 6] for image in range(len(loc))]


def regions(n: int, seed: int) -> np.ndarray:
    """Priors (1, 2, 4n) that overlap much."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.6, (n, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, (n, 2))], 1)
    variances = np.tile([0.1, 0.1, 0.2, 0.2], (n, 1))
    return np.stack([boxes.ravel(), variances.ravel()])[None].astype(np.float32)


def detections(settings: str, loc: np.ndarray, conf: np.ndarray, prior: np.ndarray) -> np.ndarray:
    source = text(
        "DetectionOutput", f"detection_output_param {{ {settings} }}",
        loc=loc.shape, conf=conf.shape, prior=prior.shape,
    )  # fmt: skip
    assert shapes(source)["t0"] == (1, 1, 1, 7)
    with session(model(source), threads=1) as opened:
        made = opened.run({"loc": loc, "conf": conf, "prior": prior})["t0"]
    assert made.shape[:2] == (1, 1)
    return made[0, 0]


@pytest.mark.parametrize("code", ["CORNER", "CENTER_SIZE", "CORNER_SIZE"])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ("nms_param { nms_threshold: 0.45 top_k: 12 } keep_top_k: 10 confidence_threshold: 0.2",
         {"nms": 0.45, "top_k": 12, "keep": 10, "threshold": 0.2}),
        ("", {}),
        ("variance_encoded_in_target: true nms_param { nms_threshold: 0.6 top_k: 5 }",
         {"in_target": True, "nms": 0.6, "top_k": 5}),
        ("share_location: false background_label_id: 2 confidence_threshold: 0.6 keep_top_k: 100",
         {"shared": False, "background": 2, "threshold": 0.6, "keep": 100}),
        ("background_label_id: -1 keep_top_k: 4 nms_param { nms_threshold: 1.5 }",
         {"background": -1, "keep": 4, "nms": 1.5}),
        ("keep_top_k: 30 nms_param { nms_threshold: 0.5 eta: 0.9 }", {"keep": 30, "nms": 0.5}),
    ],
)  # fmt: skip
def test_detection_output_against_a_loop(code: str, settings: str, options: dict) -> None:  # type: ignore[type-arg]
    rng = np.random.default_rng(7)
    n, classes, images = 40, 4, 3
    prior = regions(n, 1)
    loc = rng.normal(0, 0.5, (images, n * 4 * (1 if options.get("shared", True) else classes)))
    conf = rng.uniform(0, 1, (images, n * classes)).astype(np.float32)
    loc = loc.astype(np.float32)
    found = detections(f"num_classes: {classes} code_type: {code} {settings}", loc, conf, prior)
    expected = np.array(detect(loc, conf, prior, classes, code, **options))
    assert found.shape == expected.shape and len(expected) > images
    assert np.allclose(found, expected, atol=1e-5)


def test_detection_output_by_hand() -> None:
    """Two boxes that are nearly one, a third apart: the second is suppressed, rows come by falling score."""
    prior = np.array([[[0, 0, 0.5, 0.5, 0.01, 0, 0.5, 0.5, 0.6, 0.6, 0.9, 0.9], [1] * 12]], np.float32)
    conf = np.array([[0.1, 0.9, 0.2, 0.8, 0.05, 0.95]], np.float32)
    found = detections("num_classes: 2", np.zeros((1, 12), np.float32), conf, prior)
    assert np.allclose(found, [[0, 1, 0.95, 0.6, 0.6, 0.9, 0.9], [0, 1, 0.9, 0, 0, 0.5, 0.5]])


def test_of_equal_scores_the_first_box_wins() -> None:
    prior = regions(8, 3)
    prior[0, 0, 4:8] = prior[0, 0, :4]
    conf = np.tile(np.array([0.5, 0.5], np.float32), 8)[None]
    loc = np.zeros((1, 32), np.float32)
    found = detections("num_classes: 2 nms_param { top_k: 5 }", loc, conf, prior)
    assert np.allclose(found, detect(loc, conf, prior, 2, top_k=5), atol=1e-6)


def test_a_box_with_swapped_ends_overlaps_none() -> None:
    prior = np.array([[[0.5, 0.5, 0, 0, 0, 0, 0.5, 0.5], [1] * 8]], np.float32)
    conf = np.array([[0, 0.9, 0, 0.8]], np.float32)
    found = detections("num_classes: 2", np.zeros((1, 8), np.float32), conf, prior)
    assert np.allclose(found[:, 2:], [[0.9, 0.5, 0.5, 0, 0], [0.8, 0, 0, 0.5, 0.5]])


def test_nothing_found_is_a_row_of_minus_one_an_image() -> None:
    prior, conf = regions(5, 2), np.full((3, 10), 0.3, np.float32)
    found = detections("num_classes: 2 confidence_threshold: 0.3", np.zeros((3, 20), np.float32), conf, prior)
    assert found.tolist() == [[image, -1, -1, -1, -1, -1, -1] for image in range(3)]


def test_detection_output_of_an_open_batch() -> None:
    """With its PriorBox before it, as in every SSD; the number of rows is left open."""
    settings = "detection_output_param { num_classes: 3 keep_top_k: 4 confidence_threshold: 0.4 }"
    source = text("DetectionOutput", settings, loc=(1, 16), conf=(1, 12), data=(1, 3, 30, 30))
    priors = (
        'layer { name: "q" type: "Pooling" bottom: "data" top: "q" pooling_param { kernel_size: 15 stride: 15 } }'
        'layer { name: "p" type: "PriorBox" bottom: "q" bottom: "data" top: "prior" prior_box_param { min_size: 9 } }'
    )
    inputs, layer = source.rsplit("\n", 1)
    net = inputs + priors + layer.replace('bottom: "data"', 'bottom: "prior"')
    made = export_onnx(model(net), Request(dynamic_batch=True))
    (output,) = made.graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim] == [1, 1, 0, 7]
    rng = np.random.default_rng(3)
    loc, conf = rng.normal(0, 1, (2, 16)).astype(np.float32), rng.uniform(0, 1, (2, 12)).astype(np.float32)
    opened = open_onnx(made.SerializeToString(), Engine(threads=1))
    feeds = {"loc": loc, "conf": conf, "data": np.zeros((2, 3, 30, 30), np.float32)}
    (found,) = opened.run(None, {one.name: feeds[one.name] for one in opened.get_inputs()})
    boxes = np.array(prior_boxes((2, 2), (30, 30), [(9, None)], [], (15, 15)), np.float32)
    prior = np.stack([boxes.ravel(), np.full(16, 0.1, np.float32)])[None]
    assert np.allclose(found[0, 0], detect(loc, conf, prior, 3, keep=4, threshold=0.4), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ("", "needs num_classes"),
        ("num_classes: 2 nms_param { nms_threshold: -1 }", "nms_threshold is -1"),
        ("num_classes: 2 nms_param { eta: 0 }", "eta is 0"),
        ("num_classes: 2 nms_param { eta: 0.9 nms_threshold: 0.6 }", "eta below 1"),
        ("num_classes: 2 keep_top_k: 0", "no box would be kept"),
        ("num_classes: 3", "15 confidences"),
        ("num_classes: 2 share_location: false", "40 locations"),
    ],
)
def test_detection_output_refusals(settings: str, cause: str) -> None:
    source = text(
        "DetectionOutput",
        f"detection_output_param {{ {settings} }}",
        loc=(1, 20),
        conf=(1, 10),
        prior=(1, 2, 20),
    )
    with pytest.raises(NetError, match=cause):
        shapes(source)


def test_multibox_loss_is_refused_by_name() -> None:
    source = text("MultiBoxLoss", "multibox_loss_param { num_classes: 2 }", a=(1,), b=(1,), c=(1,), d=(1,))
    with pytest.raises(UnsupportedError, match="MultiBoxLoss"):
        shapes(source)


# Regions -----------------------------------------------------------------------------------------------------


def away(value: float) -> int:
    """C's round: halves go away from 0."""
    return floor(value + 0.5) if value >= 0 else -floor(-value + 0.5)


def roi_pool(x: np.ndarray, rois: np.ndarray, pooled: tuple[int, int], scale: float) -> np.ndarray:
    _, channels, height, width = x.shape
    top = np.zeros((len(rois), channels, *pooled), np.float32)
    for r, roi in enumerate(rois.reshape(len(rois), 5)):
        x1, y1, x2, y2 = (away(float(np.float32(value) * np.float32(scale))) for value in roi[1:])
        bin_h = np.float32(max(y2 - y1 + 1, 1)) / np.float32(pooled[0])
        bin_w = np.float32(max(x2 - x1 + 1, 1)) / np.float32(pooled[1])
        for i in range(pooled[0]):
            for j in range(pooled[1]):
                top_, bottom = (
                    min(max(int(edge) + y1, 0), height) for edge in (floor(i * bin_h), ceil((i + 1) * bin_h))
                )
                left, right = (
                    min(max(int(edge) + x1, 0), width) for edge in (floor(j * bin_w), ceil((j + 1) * bin_w))
                )
                cell = x[int(roi[0]), :, top_:bottom, left:right]
                if cell.size:
                    top[r, :, i, j] = cell.max((1, 2))
    return top  # fmt: skip


@pytest.mark.parametrize(("pooled", "scale"), [((2, 3), 1.0), ((7, 7), 0.0625), ((6, 6), 0.5)])
def test_roi_pooling_against_a_loop(pooled: tuple[int, int], scale: float) -> None:
    rng = np.random.default_rng(5)
    x = random(2, 3, 12, 15)
    corners = np.sort(rng.integers(-4, int(18 / scale), (40, 2, 2)), axis=1).reshape(40, 4)
    rois = np.concatenate([rng.integers(0, 2, (40, 1)), corners], 1).astype(np.float32)
    settings = f"roi_pooling_param {{ pooled_h: {pooled[0]} pooled_w: {pooled[1]} spatial_scale: {scale} }}"
    (top,) = run("ROIPooling", settings, x=x, rois=rois)
    assert np.array_equal(top, roi_pool(x, rois, pooled, scale))
    (old,) = run("ROIPooling", settings, x=x, rois=rois.reshape(40, 5, 1, 1))
    assert np.array_equal(old, top)


def test_roi_pooling_rounds_halves_up_and_ends_included() -> None:
    """0.5 becomes 1: the region is rows and columns 1 to 2."""
    x = np.arange(16).reshape(1, 1, 4, 4)
    settings = "roi_pooling_param { pooled_h: 1 pooled_w: 1 spatial_scale: 0.5 }"
    (top,) = run("ROIPooling", settings, x=x, rois=[[0, 1, 1, 3, 3]])
    assert top.ravel().tolist() == [10]


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ("pooled_w: 2", "pooled_h is 0"),
        ("pooled_h: 2 pooled_w: 2 pad_ratio: 0.5", "pad_ratio"),
        ("pooled_h: 2 pooled_w: 2", "five numbers"),
    ],
)
def test_roi_pooling_refusals(settings: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text("ROIPooling", f"roi_pooling_param {{ {settings} }}", x=(1, 2, 4, 4), rois=(3, 4)))


# Convolutions under other names ------------------------------------------------------------------------------


def depthwise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, pad: int) -> np.ndarray:
    n, channels, height, width = x.shape
    k = weight.shape[-1]
    big = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))).astype(np.float64)
    out = ((height + 2 * pad - k) // stride + 1, (width + 2 * pad - k) // stride + 1)
    top = np.empty((n, channels, *out))
    for i in range(out[0]):
        for j in range(out[1]):
            window = big[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            top[:, :, i, j] = (window * weight[:, 0]).sum((2, 3)) + bias
    return top


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("DepthwiseConvolution", "num_output: 4 group: 4"), ("ConvolutionDepthwise", "num_output: 4")],
)
def test_depthwise_has_one_filter_a_channel(kind: str, settings: str) -> None:
    x, weight, bias = random(2, 4, 7, 6), random(4, 1, 3, 3, seed=1), random(4, seed=2)
    settings = f"convolution_param {{ {settings} kernel_size: 3 stride: 2 pad: 1 }}"
    (top,) = run(kind, settings, [weight, bias], x=x)
    assert np.allclose(top, depthwise(x, weight, bias, 2, 1), atol=1e-5)
    assert macs(text(kind, settings, x=(2, 4, 7, 6))) == 9 * top.size


@pytest.mark.parametrize("settings", ["num_output: 4", "num_output: 8 group: 4", "num_output: 4 group: 2"])
def test_depthwise_refuses_other_groups(settings: str) -> None:
    with pytest.raises(NetError, match="must be the number of channels"):
        shapes(text("DepthwiseConvolution", f"convolution_param {{ {settings} kernel_size: 1 }}", x=(1, 4, 5, 5)))  # fmt: skip


def test_masked_weights_are_multiplied_with_their_mask() -> None:
    x, weight, bias = random(2, 3, 5, 5), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    mask, bias_mask = (random(*one.shape, seed=9) > 0 for one in (weight, bias))
    settings = "convolution_param { num_output: 4 kernel_size: 3 }"
    (plain,) = run("Convolution", settings, [weight * mask, bias], x=x)
    (pruned,) = run(
        "CConvolution", settings + " cconvolution_param { inter_iter: 3 }", [weight, bias, mask], x=x
    )
    assert np.array_equal(pruned, plain)
    (both,) = run("Convolution", settings, [weight * mask, bias * bias_mask], x=x)
    (surgery,) = run(
        "CConvolution", settings + " cconvolution_param { gamma: 0.1 }", [weight, bias, mask, bias_mask], x=x
    )
    assert np.array_equal(surgery, both)


def test_masked_inner_product_without_a_bias() -> None:
    settings = (
        "inner_product_param { num_output: 2 bias_term: false } cinner_product_param { upper_bound: 1 }"
    )
    (top,) = run("CInnerProduct", settings, [[[1, 2], [3, 4]], [[1, 0], [0.5, 1]]], x=[[10, 1]])
    assert top.tolist() == [[10, 19]]


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ("cconvolution_param { gamma: 1 inter_iter: 2 }", "two forks"),
        ("cconvolution_param { gamma: 1 }", "without a bias"),
    ],
)
def test_masked_refusals(settings: str, cause: str) -> None:
    settings = f"convolution_param {{ num_output: 1 kernel_size: 1 bias_term: false }} {settings}"
    with pytest.raises(NetError, match=cause):
        shapes(text("CConvolution", settings, x=(1, 1, 2, 2)))


# Padding of each side ----------------------------------------------------------------------------------------

Sides = tuple[int, int, int, int]  # pad_t, pad_l, pad_b, pad_r


def sides_text(sides: Sides) -> str:
    names = ("pad_t", "pad_l", "pad_b", "pad_r")
    return " ".join(f"{name}: {pad}" for name, pad in zip(names, sides, strict=True))


def laid_out(x: np.ndarray, sides: Sides) -> np.ndarray:
    top, left, bottom, right = sides
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))


def test_convolution_with_a_pad_on_one_side_by_hand() -> None:
    """Sums of two neighbours of 1 2 3: a zero in front makes 1 3 5, one behind makes 3 5 3."""
    sums, x = "num_output: 1 bias_term: false kernel_h: 1 kernel_w: 2", [[[[1, 2, 3]]]]
    (front,) = run("Convolution", f"convolution_param {{ {sums} pad_l: 1 }}", [[[[[1, 1]]]]], x=x)
    assert front.tolist() == [[[[1, 3, 5]]]]
    (behind,) = run("Convolution", f"convolution_param {{ {sums} pad_r: 1 }}", [[[[[1, 1]]]]], x=x)
    assert behind.tolist() == [[[[3, 5, 3]]]]


@pytest.mark.parametrize("sides", [(1, 2, 0, 3), (0, 0, 2, 0), (0, 0, 0, 0), (4, 1, 5, 0)])
@pytest.mark.parametrize(
    "more", ["stride: 2", "stride_h: 3 stride_w: 1", "dilation: 2", "dilation: 2 stride: 3"]
)
def test_convolution_pads_each_side(sides: Sides, more: str) -> None:
    """As of a bottom that was padded before."""
    x, weight, bias = random(2, 4, 8, 9), random(6, 2, 3, 2, seed=1), random(6, seed=2)
    settings = f"num_output: 6 group: 2 kernel_h: 3 kernel_w: 2 {more}"
    side = f"convolution_param {{ {settings} {sides_text(sides)} }}"
    (top,) = run("Convolution", side, [weight, bias], x=x)
    (plain,) = run("Convolution", f"convolution_param {{ {settings} }}", [weight, bias], x=laid_out(x, sides))
    assert np.allclose(top, plain, atol=1e-5)
    assert macs(text("Convolution", side, x=x.shape)) == top.size * 2 * 3 * 2


@pytest.mark.parametrize("sides", [(1, 2, 0, 1), (0, 0, 2, 0), (2, 2, 2, 2)])
def test_deconvolution_cuts_each_side(sides: Sides) -> None:
    x, weight, bias = random(2, 3, 4, 5), random(3, 2, 4, 3, seed=1), random(2, seed=2)
    settings = "num_output: 2 kernel_h: 4 kernel_w: 3 stride: 2"
    whole = run("Deconvolution", f"convolution_param {{ {settings} }}", [weight, bias], x=x)[0]
    side = f"convolution_param {{ {settings} {sides_text(sides)} }}"
    (cut,) = run("Deconvolution", side, [weight, bias], x=x)
    top, left, bottom, right = sides
    wanted = whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]
    assert np.allclose(cut, wanted, atol=1e-5)


def pool_one_axis(
    h: int, k: int, s: int, begin: int, end: int, up: bool, clips: bool
) -> list[tuple[int, int]]:
    """Where the windows of the fork begin and end, padding counted up to h + end."""
    n = (ceil if up else floor)((h + begin + end - k) / s) + 1
    if clips and (n - 1) * s >= h + begin:
        n -= 1
    starts = [i * s - begin for i in range(n)]
    return [(start, min(start + k, h + end)) for start in starts]


def pooled(x: np.ndarray, method: str, kernel: int, stride: int, sides: Sides, up: bool) -> np.ndarray:
    top, left, bottom, right = sides
    rows = pool_one_axis(x.shape[2], kernel, stride, top, bottom, up, any(sides))
    columns = pool_one_axis(x.shape[3], kernel, stride, left, right, up, any(sides))
    made = np.empty((*x.shape[:2], len(rows), len(columns)))
    for i, (y, y_end) in enumerate(rows):
        for j, (z, z_end) in enumerate(columns):
            window = x[:, :, max(y, 0) : y_end, max(z, 0) : z_end].astype(np.float64)
            count = (y_end - y) * (z_end - z)
            made[:, :, i, j] = window.max((2, 3)) if method == "MAX" else window.sum((2, 3)) / count
    return made


def test_pooling_with_a_pad_on_one_side_by_hand() -> None:
    """Rounding up makes a third window of stride 2 with a pad behind, 5 6 0, which is divided by 3; of stride 3
    it would begin where the image ends, and is dropped.
    """
    x = [[[[1, 2, 3, 4, 5, 6]]]]
    window = "kernel_h: 1 kernel_w: 3 stride_h: 1 stride_w: 2"
    (behind,) = run("Pooling", f"pooling_param {{ pool: AVE {window} pad_r: 1 }}", x=x)
    assert np.allclose(behind, [[[[2, 4, 11 / 3]]]])
    (front,) = run("Pooling", f"pooling_param {{ pool: AVE {window} pad_l: 1 }}", x=x)
    assert np.allclose(front, [[[[1, 3, 5]]]])
    (largest,) = run("Pooling", f"pooling_param {{ {window} pad_l: 1 pad_r: 2 }}", x=x)
    assert largest.tolist() == [[[[2, 4, 6, 6]]]]
    third = "kernel_h: 1 kernel_w: 3 stride_h: 1 stride_w: 3"
    (dropped,) = run("Pooling", f"pooling_param {{ {third} pad_r: 1 }}", x=x)
    assert dropped.tolist() == [[[[3, 6]]]]


@pytest.mark.parametrize("method", ["MAX", "AVE"])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("sides", [(0, 1, 2, 0), (2, 0, 0, 1), (1, 1, 1, 1), (0, 0, 1, 2), (0, 0, 0, 0)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (3, 3), (4, 3)])
@pytest.mark.parametrize("hw", [(7, 8), (9, 10), (5, 11)])
def test_pooling_pads_each_side(
    method: str, up: bool, sides: Sides, kernel: int, stride: int, hw: tuple[int, int]
) -> None:
    """Against a loop, for a size that is known and for one that is open."""
    x = random(1, 2, *hw)
    settings = f"pool: {method} kernel_size: {kernel} stride: {stride} ceil_mode: {str(up).lower()}"
    settings = f"pooling_param {{ {settings} {sides_text(sides)} }}"
    wanted = pooled(x, method, kernel, stride, sides, up)
    (top,) = run("Pooling", settings, x=x)
    assert top.shape == wanted.shape and np.allclose(top, wanted, atol=1e-6)
    made = export_onnx(model(text("Pooling", settings, x=(1, 2, 12, 12))), Request(dynamic_hw=True))
    (open_size,) = open_onnx(made.SerializeToString(), Engine(threads=1)).run(None, {"x": x})
    assert open_size.shape == wanted.shape and np.allclose(open_size, wanted, atol=1e-6)


def test_mask_of_pooling_tells_places_without_the_padding() -> None:
    settings = "pooling_param { kernel_size: 2 stride: 2 pad_t: 1 pad_l: 1 }"
    top, mask = run("Pooling", settings, (), 2, x=[[[[1, 2, 3], [6, 5, 4], [7, 8, 9]]]])
    assert top.tolist() == [[[[1, 3], [7, 9]]]]
    assert mask.tolist() == [[[[0, 2], [6, 8]]]]


@pytest.mark.parametrize(
    ("kind", "settings", "cause"),
    [
        ("Convolution", "kernel_size: 3 pad: 1 pad_l: 1", "pad and pad_l are both given"),
        ("Convolution", "kernel_size: 3 pad_b: 0 pad_h: 1", "pad_h and pad_b are both given"),
        ("Convolution", "kernel_size: 3 pad_l: 1 pad_l: 1", "given twice"),
        ("Convolution", "kernel_size: 3 pad_l: -1", "pad_l is uint32"),
        ("Convolution", "kernel_size: 1 pad_l: 1", "1 x 1 kernel of stride 1 leaves"),
        ("Convolution", "kernel_size: 3 pad_l: 1 force_nd_im2col: true", "force_nd_im2col leaves"),
        ("Convolution", "kernel_size: 3 pad_l: 1 axis: 2", "two spatial axes"),
        ("Convolution", "kernel_size: 3 pad_l: 1 pad_type: 1", '"pad_type" of ConvolutionParameter is a field'),
        ("DepthwiseConvolution", "kernel_size: 3 pad_l: 1", '"pad_l" of ConvolutionParameter is a field'),
        ("Im2col", "kernel_size: 3 pad_l: 1", '"pad_l" of ConvolutionParameter is a field'),
        ("Pooling", "kernel_size: 3 pad: 0 pad_l: 1", "pad and pad_l are both given"),
        ("Pooling", "kernel_size: 3 pad_r: 3", "pad 0 x 3 must be smaller than the kernel"),
        ("Pooling", "kernel_size: 3 pad_t: 3", "pad 3 x 0 must be smaller than the kernel"),
        ("Pooling", "global_pooling: true pad_b: 1", "global_pooling takes no pad"),
        ("Pooling", "kernel_size: 3 pad_b: 1 pool: STOCHASTIC", "stochastic pooling takes no pad"),
    ],
)  # fmt: skip
def test_side_pad_refusals(kind: str, settings: str, cause: str) -> None:
    block = "pooling_param { " if kind == "Pooling" else "convolution_param { num_output: 1 "
    with pytest.raises(NetError, match=cause):
        shapes(text(kind, f"{block} {settings} }}", x=(1, 1, 8, 8)))


@pytest.mark.parametrize(
    ("sides", "cause"), [((0, 1, 0, 0), "differs from side to side"), ((1, 1, 1, 1), "is given side by side")]
)
def test_a_layer_padded_by_side_is_not_decomposed(sides: Sides, cause: str) -> None:
    settings = f"convolution_param {{ num_output: 8 kernel_size: 3 {sides_text(sides)} }}"
    source = text("Convolution", settings, x=(1, 8, 9, 9))
    found = targets.find(model(source, [random(8, 8, 3, 3), random(8)]))
    assert not found.targets and cause in found.refused["l"]


SRGAN = "foss-for-synopsys-dwc-arc-processors__synopsys-caffe-models/caffe_models__srgan__SRGAN__srgan_fused_convert.prototxt"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with prototxts of the wild")
def test_a_net_of_the_fork_is_read_up_to_what_is_not_known() -> None:
    """Its convolutions of 3 x 3 have a pad of 1 on each side; DepthToSpace is where shapes end."""
    built = graph.build(net.load(SHARED / "oracle" / "zoo" / "wild" / SRGAN))
    shaped = shape_inference.infer(built, partial=True)
    found = shaped.by_blob()
    assert found["SRGAN_g/n64s1/c/Conv2D_nchw"] == (1, 64, 96, 96)
    assert found["SRGAN_g/n256s1/1/Conv2D_nchw"] == (1, 256, 96, 96)
    assert len(built.nodes) - len(shaped.unknown) > 100
    first = built.nodes[min(shaped.unknown)].problem
    assert first is not None and "DepthToSpace" in first.message


# Planes ------------------------------------------------------------------------------------------------------


def bilinear(x: np.ndarray, out: tuple[int, int]) -> np.ndarray:
    top = np.empty((*x.shape[:2], *out))
    rates = [(n - 1) / (m - 1) if m > 1 else 0.0 for n, m in zip(x.shape[2:], out, strict=True)]
    for i in range(out[0]):
        for j in range(out[1]):
            y, x_ = i * rates[0], j * rates[1]
            a, b = int(y), int(x_)
            c, d = min(a + 1, x.shape[2] - 1), min(b + 1, x.shape[3] - 1)
            v, u = y - a, x_ - b
            top[:, :, i, j] = (1 - v) * ((1 - u) * x[:, :, a, b] + u * x[:, :, a, d]) + v * (
                (1 - u) * x[:, :, c, b] + u * x[:, :, c, d]
            )
    return top


@pytest.mark.parametrize(
    ("settings", "out", "crop"),
    [
        ("height: 9 width: 4", (9, 4), (0, 0)),
        ("zoom_factor: 3", (16, 13), (0, 0)),
        ("shrink_factor: 2", (3, 3), (0, 0)),
        ("shrink_factor: 2 zoom_factor: 3", (7, 7), (0, 0)),
        ("height: 1 width: 8", (1, 8), (0, 0)),
        ("zoom_factor: 2 height: 3 width: 3", (11, 9), (0, 0)),
        ("zoom_factor: 2 pad_beg: -1 pad_end: -2", (5, 3), (1, 2)),
    ],
)
def test_interp_against_a_loop(settings: str, out: tuple[int, int], crop: tuple[int, int]) -> None:
    x = random(2, 3, 6, 5)
    (top,) = run("Interp", f"interp_param {{ {settings} }}", x=x)
    cut = x[:, :, crop[0] : 6 - crop[1], crop[0] : 5 - crop[1]]
    assert top.shape[2:] == out
    assert np.allclose(top, bilinear(cut, out), atol=1e-5)


def test_interp_to_the_size_of_another_blob() -> None:
    x = random(1, 2, 3, 4)
    (top,) = run("Interp", x=x, like=random(1, 7, 5, 9))
    assert np.allclose(top, bilinear(x, (5, 9)), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ("", "gives no size"),
        ("height: 3", "gives no size"),
        ("zoom_factor: 0", "zoom_factor is 0"),
        ("zoom_factor: 2 pad_beg: 1", "only crop"),
        ("zoom_factor: 2 pad_beg: -4", "nothing is left"),
    ],
)
def test_interp_refusals(settings: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text("Interp", f"interp_param {{ {settings} }}", x=(1, 1, 4, 4)))


def test_upsample_repeats_each_pixel() -> None:
    x = random(1, 2, 3, 4)
    (top,) = run("Upsample", "upsample_param { scale: 3 }", x=x)
    assert np.array_equal(top, x.repeat(3, 2).repeat(3, 3))


def test_upsample_by_the_mask_of_pooling() -> None:
    """SegNet's pair: what pooling took goes back to where it was, all else is 0."""
    net = (
        'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 dim: 3 dim: 6 dim: 8 } } }'
        'layer { name: "p" type: "Pooling" bottom: "x" top: "p" top: "m"'
        " pooling_param { pool: MAX kernel_size: 2 stride: 2 } }"
        'layer { name: "l" type: "Upsample" bottom: "p" bottom: "m" top: "t0" }'
    )
    x = random(2, 3, 6, 8)
    with session(model(net), blobs=["t0"], threads=1) as opened:
        top = opened.run({"x": x})["t0"]
    kept = x.reshape(2, 3, 3, 2, 4, 2).max((3, 5)).repeat(2, 2).repeat(2, 3)
    assert np.array_equal(top, np.where(x == kept, x, 0))


def test_upsample_by_a_mask_to_a_given_size() -> None:
    settings = "upsample_param { upsample_h: 2 upsample_w: 3 }"
    (top,) = run("Upsample", settings, x=[[[[7, 8]]]], mask=[[[[5, 0]]]])
    assert top.tolist() == [[[[8, 0, 0], [0, 0, 7]]]]
    padded = text("Upsample", "upsample_param { scale: 2 pad_out_w: true }", x=(1, 1, 3, 3), m=(1, 1, 3, 3))
    assert shapes(padded)["t0"] == (1, 1, 6, 5)


@pytest.mark.parametrize(
    ("settings", "bottoms", "cause"),
    [
        ("", 1, "only upsample_param"),
        ("scale: 2.5", 1, "no whole number"),
        ("scale: 1", 1, "scale is 1"),
        ("scale_h: 2", 2, "go together"),
        ("scale: 3 pad_out_h: true", 2, "need a scale of 2"),
    ],
)
def test_upsample_refusals(settings: str, bottoms: int, cause: str) -> None:
    feeds = {name: (1, 1, 3, 3) for name in "xm"[:bottoms]}
    with pytest.raises(NetError, match=cause):
        shapes(text("Upsample", f"upsample_param {{ {settings} }}", **feeds))


def test_crop_center_cuts_both_ends() -> None:
    x = random(2, 3, 7, 6)
    settings = "crop_center_param { crop_size: 0 crop_size: 1 crop_size: 2 crop_size: 0 }"
    (top,) = run("CropCenter", settings, x=x)
    assert np.array_equal(top, x[:, 1:2, 2:5])


@pytest.mark.parametrize(("crop", "cause"), [((0, 1), "2 values"), ((0, 0, 2, 0), "nothing is left")])
def test_crop_center_refusals(crop: tuple[int, ...], cause: str) -> None:
    settings = " ".join(f"crop_size: {value}" for value in crop)
    with pytest.raises(NetError, match=cause):
        shapes(text("CropCenter", f"crop_center_param {{ {settings} }}", x=(1, 1, 4, 4)))


# Channels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "axes", "eps"),
    [
        ("frozen: true eps: 0.25", 2, 0.25),
        ("slope_filler { value: 1 } momentum: 0.9", 2, 1e-5),
        ("moving_average: true decay: 0.05 scale_filler { value: 1 }", 4, 0),
        ("moving_average: true var_eps: 0.5", 4, 0.5),
    ],
)
def test_bn_of_tsn_and_pspnet_uses_what_is_stored(settings: str, axes: int, eps: float) -> None:
    x, (slope, bias, mean) = random(2, 3, 4, 5), random(3, 1, 3, 1, 1)
    variance = np.reshape([0.5, 1, 4], (1, 3, 1, 1))
    blobs = [blob.reshape((1, 3, 1, 1)[:axes]) for blob in (slope, bias, mean, variance)]
    (top,) = run("BN", f"bn_param {{ {settings} }}", blobs, x=x)
    assert np.allclose(top, slope * (x - mean) / np.sqrt(variance + eps) + bias, atol=1e-5)


def test_bn_of_segnet_is_folded_or_takes_the_batch() -> None:
    x, (scale, shift) = random(2, 3, 4, 5), random(2, 1, 3, 1, 1)
    (folded,) = run("BN", "bn_param { bn_mode: INFERENCE }", [scale, shift], x=x)
    assert np.allclose(folded, x * scale + shift, atol=1e-6)
    (batch,) = run("BN", "bn_param { scale_filler { type: \"constant\" value: 1 } }", [scale, shift], x=x)  # fmt: skip
    axes = (0, 2, 3)
    normal = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-9)
    assert np.allclose(batch, normal * scale + shift, atol=1e-5)


def test_bn_of_pspnet_takes_the_batch_unless_told() -> None:
    x, (slope, bias, mean) = random(2, 3, 4, 5), random(3, 1, 3, 1, 1)
    (top,) = run("BN", "bn_param { decay: 0.1 }", [slope, bias, mean, mean**2], x=x)
    axes = (0, 2, 3)
    assert np.allclose(
        top, slope * (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True) + bias, atol=1e-5
    )


@pytest.mark.parametrize("settings", ["", "bn_param { }", "bn_param { frozen: true bn_mode: LEARN }"])
def test_bn_that_may_be_either_is_refused(settings: str) -> None:
    with pytest.raises(UnsupportedError, match="which layer BN"):
        shapes(text("BN", settings, x=(1, 2, 3, 3)))


@pytest.mark.parametrize("scale_shape", [(2, 3), (2, 3, 1, 1)])
def test_axpy(scale_shape: tuple[int, ...]) -> None:
    scale, x, y = random(*scale_shape), random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2)
    (top,) = run("Axpy", a=scale, x=x, y=y)
    assert np.allclose(top, scale.reshape(2, 3, 1, 1) * x + y, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "y", "cause"),
    [((2, 3, 1, 2), (2, 3, 4, 5), "one number for each channel"), ((2, 3), (2, 3, 5, 4), "differ in shape")],
)
def test_axpy_refusals(a: tuple[int, ...], y: tuple[int, ...], cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text("Axpy", a=a, x=(2, 3, 4, 5), y=y))


def test_shuffle_channel_by_hand() -> None:
    x = np.arange(6).reshape(1, 6, 1, 1)
    (top,) = run("ShuffleChannel", "shuffle_channel_param { group: 2 }", x=x)
    assert top.ravel().tolist() == [0, 3, 1, 4, 2, 5]
    with pytest.raises(NetError, match="4 groups"):
        shapes(text("ShuffleChannel", "shuffle_channel_param { group: 4 }", x=(1, 6, 1, 1)))


def test_relu6_sparsify_symmetric_rectify_by_hand() -> None:
    x = [[-8, -0.5, 0, 0.5, 2, 9]]
    (top,) = run("ReLU6", x=x)
    assert top.tolist() == [[0, 0, 0, 0.5, 2, 6]]
    (sparse,) = run("Sparsify", "sparsify_param { thre: 0.5 coef: 3 }", x=x)
    assert sparse.tolist() == [[-7.5, 0, 0, 0, 1.5, 8.5]]
    (same,) = run("Sparsify", x=x)
    assert same.tolist() == x
    (each,) = run("SymmetricRectify", "", [[1, 2, 3, -1, 0, 4]], x=x)
    assert each.tolist() == [[-7, 0, 0, 0.5, 2, 5]]
    (shared,) = run("SymmetricRectify", "symmetric_rectify_param { channel_shared: true }", [2.0], x=x)
    assert shared.tolist() == [[-6, 0, 0, 0, 0, 7]]


@pytest.mark.parametrize(
    ("kind", "settings", "cause"),
    [
        ("Sparsify", "sparsify_param { thre: -1 }", "thre is -1"),
        ("ReLU6", "relu6_param { negative_slope: 0.1 }", "negative_slope"),
    ],
)
def test_threshold_refusals(kind: str, settings: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text(kind, settings, x=(1, 2)))


@pytest.mark.parametrize(
    ("kind", "settings", "blobs"),
    [
        ("Permute", "permute_param { order: 0 order: 2 order: 3 order: 1 }", ()),
        ("Normalize", "norm_param { across_spatial: false }", (2.0,)),
        ("ShuffleChannel", "shuffle_channel_param { group: 2 }", ()),
        ("Interp", "interp_param { zoom_factor: 2 }", ()),
        ("Upsample", "upsample_param { scale: 2 }", ()),
        ("CropCenter", "crop_center_param { crop_size: 0 crop_size: 0 crop_size: 1 crop_size: 1 }", ()),
        ("BN", "bn_param { bn_mode: INFERENCE }", (np.ones((1, 4, 1, 1)), np.ones((1, 4, 1, 1)))),
    ],
)
def test_an_open_batch_gives_what_a_fixed_one_gives(kind: str, settings: str, blobs: tuple) -> None:  # type: ignore[type-arg]
    x = random(3, 4, 5, 6)
    open_ = run_open_batch(text(kind, settings, x=(2, 4, 5, 6)), {"x": x}, blobs)
    (fixed,) = run(kind, settings, blobs, x=x)
    assert error(open_["t0"], fixed) < 1e-6


def test_prior_box_of_an_open_image_is_refused() -> None:
    source = text("PriorBox", "prior_box_param { min_size: 4 }", x=(1, 1, 2, 2), data=(1, 3, 9, 9))
    with pytest.raises(UnsupportedError, match="PriorBox needs a fixed size"):
        export_onnx(model(source), Request(dynamic_hw=True))


# Cutting at what is not known ---------------------------------------------------------------------------------

CUT = """
layer { name: "data" type: "Input" top: "data" top: "info" input_param { shape { dim: 1 dim: 2 dim: 4 dim: 4 }
        shape { dim: 1 dim: 3 } } }
layer { name: "r" type: "ReLU" bottom: "data" top: "r" }
layer { name: "s" type: "Sigmoid" bottom: "r" top: "s" }
layer { name: "own" type: "Power" bottom: "s" top: "own" power_param { scale: 2 } }
layer { name: "rois" type: "Python" bottom: "s" bottom: "info" top: "rois" python_param { module: "m" layer: "L" } }
layer { name: "pool" type: "ROIPooling" bottom: "r" bottom: "rois" top: "pool"
        roi_pooling_param { pooled_h: 2 pooled_w: 2 } }
layer { name: "t" type: "TanH" bottom: "pool" top: "t" }
"""


def test_an_unknown_layer_cuts_the_net_before_it() -> None:
    """What it reads becomes an output, what depends on it goes; an input that only it reads is no input."""
    made = export_onnx(model(CUT), Request(cut_at_unknown=True))
    assert [one.name for one in made.graph.input] == ["data"]
    assert sorted(one.name for one in made.graph.output) == ["own", "r", "s"]
    assert {node.op_type for node in made.graph.node} == {"LeakyRelu", "Sigmoid", "Mul"}
    x = random(1, 2, 4, 4)
    with session(model(CUT), "all", threads=1, cut_at_unknown=True) as opened:
        found = opened.run({"data": x, "info": np.zeros((1, 3))})
    assert sorted(found) == ["data", "info", "own", "r", "s"]
    assert np.allclose(found["own"], 2 / (1 + np.exp(-np.maximum(x, 0))), atol=1e-6)


def test_an_unknown_layer_that_writes_in_place_gives_what_was_there_before() -> None:
    net = CUT.replace('bottom: "s" bottom: "info" top: "rois"', 'bottom: "own" top: "own"')
    net = net.replace('bottom: "rois"', 'bottom: "own"')
    made = export_onnx(model(net), Request(cut_at_unknown=True))
    assert sorted(one.name for one in made.graph.output) == ["own", "r"]
    x = random(1, 2, 4, 4)
    (found,) = open_onnx(made.SerializeToString(), Engine(threads=1)).run(["own"], {"data": x})
    assert np.allclose(found, 2 / (1 + np.exp(-np.maximum(x, 0))), atol=1e-6)


def test_without_the_option_the_refusal_stays() -> None:
    with pytest.raises(UnsupportedError, match='layer type "Python" is not known'):
        export_onnx(model(CUT))


def test_cutting_hides_no_other_mistake() -> None:
    wrong = CUT.replace("power_param { scale: 2 }", "power_param { scale: 2 scale: 3 }")
    with pytest.raises(NetError, match="given twice"):
        export_onnx(model(wrong), Request(cut_at_unknown=True))
    with pytest.raises(NetError, match="no output to export"):
        export_onnx(model(CUT.replace('"ReLU"', '"Mystery"')), Request(cut_at_unknown=True))


def test_the_commands_cut_where_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(CUT)
    write(Path("net.caffemodel"), v2_layer("x", blob_shape(1) + packed(1)))
    np.savez("x.npz", data=random(1, 2, 4, 4), info=np.zeros((1, 3), np.float32))
    net = ["net.prototxt", "net.caffemodel"]
    assert main(["export", *net, "-o", "o.onnx"]) == 2
    assert '"Python" is not known' in capsys.readouterr().err
    assert main(["export", *net, "-o", "o.onnx", "--cut-at-unknown"]) == 0
    assert main(["run", *net, "--input", "x.npz", "-o", "o.npz"]) == 2
    assert main(["run", *net, "--input", "x.npz", "-o", "o.npz", "--cut-at-unknown"]) == 0
    assert sorted(np.load("o.npz").files) == ["data", "info", "own", "r", "s"]
    assert Path("o.onnx").is_file()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# NVIDIA's half precision -------------------------------------------------------------------------------------


def raw_blob(array: np.ndarray, kind: int | None) -> bytes:
    head = b"" if kind is None else wire.tag(10, wire.VARINT) + wire.encode_varint(kind)
    return blob_shape(*array.shape) + head + wire.encode_bytes(12, array.tobytes())


@pytest.mark.parametrize(("dtype", "kind"), [("<f8", 0), ("<f4", 1), ("<f2", 2)])
def test_raw_data_is_read_as_the_type_beside_it(tmp_path: Path, dtype: str, kind: int) -> None:
    array = np.array([[0.5, -2, 65504], [1e-4, 0, 3]], dtype)
    path = write(tmp_path / "w.caffemodel", v2_layer("c", raw_blob(array, kind), blob_shape(1) + packed(7)))
    blob, plain = weights.load(path)["c"]
    assert blob.dtype == np.float32 and np.array_equal(blob, array.astype(np.float32))
    assert plain.tolist() == [7]


@pytest.mark.parametrize(
    ("kind", "cause"), [(None, "NumericType -1"), (3, "NumericType 3"), (1, "holds 1 numbers")]
)
def test_raw_data_of_another_type_is_refused(tmp_path: Path, kind: int | None, cause: str) -> None:
    blob = raw_blob(np.array([1, 2], "<f2"), kind)
    path = write(tmp_path / "w.caffemodel", v2_layer("c", blob))
    with pytest.raises(CaffemodelError, match=cause):
        _ = weights.load(path)["c"]
