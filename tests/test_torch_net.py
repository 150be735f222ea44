"""Nets in torch: forward passes of real Caffe, gradients of the losses, shared blobs, Caffe's moving averages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers import SHARED, f32
from layer_nets import text

torch = pytest.importorskip("torch", reason="training needs torch")

from caffe_proto import graph, load, net  # noqa: E402
from caffe_proto.binding import bind, random  # noqa: E402
from caffe_proto.errors import NetError, UnsupportedError, WeightsError  # noqa: E402
from caffe_proto.layers import LAYERS  # noqa: E402
from caffe_proto.net import NetState  # noqa: E402
from caffe_proto.runtime import error  # noqa: E402
from caffe_proto.shape_inference import infer  # noqa: E402
from caffe_proto.torch_layers import TORCH  # noqa: E402
from caffe_proto.torch_net import TorchNet, start  # noqa: E402
from caffe_proto.weights import NewEntry, Weights  # noqa: E402

CASES = SHARED / "oracle" / "cases"
TOLERANCE = 1e-4

NOT_TRAINED = {
    "Input", "Data", "DummyData", "MemoryData", "ImageData", "HDF5Data", "WindowData",  # fed
    "CConvolution", "CInnerProduct", "BN", "Axpy", "ShuffleChannel", "Sparsify", "SymmetricRectify",
    "CropCenter", "Upsample", "DetectionOutput", "MultiBoxLoss", "PriorBox", "ROIPooling", "HDF5Output",
}  # fmt: skip


def opened(source: str, blobs: Sequence[Any] = (), phase: str = "TRAIN", **given: Any) -> TorchNet:
    """A net whose layer "l" has these blobs."""
    made = net.parse(source, state=NetState(phase))
    shaped = infer(graph.build(made))
    stored = (
        Weights([NewEntry("l", tuple(np.asarray(blob, np.float32) for blob in blobs))]) if blobs else None
    )
    return TorchNet(made, shaped, bind(shaped, stored) if blobs else random(shaped), **given)


def top(kind: str, settings: str = "", tops: int = 1, phase: str = "TRAIN", **feeds: Any) -> Any:
    """The first top of one layer of that type, as a differentiable function of its bottoms."""
    made = opened(text(kind, settings, tops, **{name: one.shape for name, one in feeds.items()}), phase=phase)
    return made.run(feeds)


def _names() -> list[str]:
    return sorted(path.name for path in CASES.iterdir()) if CASES.is_dir() else []


@pytest.mark.parametrize("name", _names())
def test_every_blob_is_that_of_caffe(name: str) -> None:
    folder = CASES / name
    io = json.loads((folder / "io.json").read_text())
    file = folder / "weights.caffemodel"
    model = load(
        folder / "net.prototxt",
        file if file.exists() else None,
        phase=io["phase"].upper(),
        stages=tuple(io["stages"]),
        level=io["level"],
    )
    with np.load(folder / "io.npz") as stored:
        arrays = dict(stored)
    shaped = infer(graph.build(model.net))
    made = TorchNet(model.net, shaped, bind(shaped, model.weights))
    fed = {made.graph.blob(value) for value in made.graph.sources}
    feeds = {blob: torch.tensor(arrays[key if (key := f"@input:{blob}") in arrays else blob]) for blob in fed}
    found = {blob: one.numpy() for blob, one in made.run(feeds, every=True).blobs.items()}
    assert {blob: list(found[blob].shape) for blob in io["blobs"]} == io["blobs"]
    assert max(error(found[blob], arrays[blob]) for blob in io["blobs"]) <= TOLERANCE


def test_every_layer_type_is_trained_or_known_not_to_be() -> None:
    assert set(TORCH) == set(LAYERS) - NOT_TRAINED


def test_a_type_that_cannot_be_trained_is_named_with_its_line() -> None:
    with pytest.raises(UnsupportedError, match='line 2: layer "l": ShuffleChannel cannot be trained'):
        opened(text("ShuffleChannel", "shuffle_channel_param { group: 2 }", a=(1, 4, 2, 2)))


# What no case of real Caffe covers, in phase TEST or TRAIN, against the session that the cases hold.

EXTRA = [
    ("MVN", "mvn_param { across_channels: true }", {"a": (2, 3, 4, 4)}),
    ("Crop", "crop_param { axis: 2 offset: 1 offset: 0 }", {"a": (1, 2, 5, 6), "b": (1, 2, 3, 4)}),
    ("SPP", "spp_param { pyramid_height: 3 }", {"a": (2, 3, 9, 7)}),
    ("ReLU6", "relu6_param { }", {"a": (2, 3)}),
    ("Permute", "permute_param { order: 0 order: 2 order: 3 order: 1 }", {"a": (2, 3, 4, 5)}),
    ("Normalize", "norm_param { across_spatial: false }", {"a": (2, 3, 4, 5)}),
    ("Interp", "interp_param { height: 7 width: 9 }", {"a": (2, 3, 4, 5)}),
    ("Pooling", "pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 2 }", {"a": (1, 2, 6, 9)}),
    ("Pooling", "pooling_param { pool: MAX kernel_h: 2 kernel_w: 3 stride: 3 pad_l: 1 pad_r: 0 pad_t: 0 pad_b: 1 }",
     {"a": (1, 2, 8, 9)}),
    ("Convolution", "convolution_param { num_output: 4 kernel_size: 3 pad_l: 1 pad_r: 0 pad_t: 2 pad_b: 1 }",
     {"a": (2, 3, 6, 6)}),
    ("Convolution", "convolution_param { num_output: 4 kernel_size: 2 kernel_size: 3 kernel_size: 1 group: 2 }",
     {"a": (2, 4, 3, 4, 5)}),
    ("Convolution", "convolution_param { num_output: 4 kernel_size: 3 group: 2 }", {"a": (2, 4, 7)}),
    ("ConvolutionDepthwise", "convolution_param { num_output: 4 kernel_size: 3 }", {"a": (2, 4, 7, 5)}),
    ("DepthwiseConvolution", "convolution_param { num_output: 4 kernel_size: 3 group: 4 }", {"a": (2, 4, 7, 5)}),
    ("Deconvolution", "convolution_param { num_output: 4 kernel_size: 3 stride: 2 group: 2 pad: 1 }",
     {"a": (2, 4, 5, 6)}),
    ("InnerProduct", "inner_product_param { num_output: 4 transpose: true }", {"a": (2, 3, 2)}),
    ("LRN", "lrn_param { local_size: 3 norm_region: WITHIN_CHANNEL k: 3 alpha: 0.5 }", {"a": (2, 3, 5, 5)}),
    ("LRN", "lrn_param { local_size: 3 k: 2 alpha: 0.5 beta: 0.6 }", {"a": (2, 5, 3, 3)}),
    ("Eltwise", "eltwise_param { operation: PROD }", {"a": (2, 3), "b": (2, 3)}),
    ("HingeLoss", "hinge_loss_param { norm: L2 }", {"a": (4, 3), "label": (4,)}),
    ("HingeLoss", "", {"a": (4, 3), "label": (4,)}),
    ("MultinomialLogisticLoss", "", {"a": (4, 3), "label": (4,)}),
    ("SigmoidCrossEntropyLoss", "loss_param { normalization: VALID }", {"a": (4, 3), "label": (4, 3)}),
    ("SoftmaxWithLoss", "loss_param { normalization: FULL }", {"a": (2, 3, 2, 2), "label": (2, 1, 2, 2)}),
    ("SoftmaxWithLoss", "loss_param { normalization: NONE ignore_label: 1 }", {"a": (6, 3), "label": (6,)}),
    ("SoftmaxWithLoss", "loss_param { normalize: false } softmax_param { axis: 2 }", {"a": (2, 4, 3), "label": (2, 4)}),
    ("InfogainLoss", "", {"a": (4, 3), "label": (4,), "h": (1, 1, 3, 3)}),
    ("ContrastiveLoss", "contrastive_loss_param { margin: 1.5 }", {"a": (4, 3), "b": (4, 3), "label": (4,)}),
    ("ContrastiveLoss", "contrastive_loss_param { margin: 2 legacy_version: true }",
     {"a": (4, 3), "b": (4, 3), "label": (4,)}),
    ("Accuracy", "accuracy_param { top_k: 2 ignore_label: 0 }", {"a": (6, 4), "label": (6,)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "shapes"), EXTRA)
def test_agrees_with_the_session(kind: str, settings: str, shapes: dict[str, tuple[int, ...]]) -> None:
    from caffe_proto.model import Model
    from caffe_proto.runtime import session

    numbers = np.random.default_rng(1)
    feeds = {
        name: f32(numbers.integers(0, 2, shape) if name == "label" else numbers.random(shape) - 0.3)
        for name, shape in shapes.items()
    }
    source = text(kind, settings, **shapes)
    shaped = infer(graph.build(net.parse(source)))
    blobs = random(shaped, 5)
    stored = Weights([NewEntry("l", arrays) for arrays in blobs.values()]) if blobs else None
    with session(Model(net.parse(source), stored), blobs=["t0"], threads=1) as opened_:
        wanted = opened_.run(feeds)["t0"]
    made = TorchNet(net.parse(source), shaped, blobs).run({k: torch.tensor(v) for k, v in feeds.items()})
    assert wanted.shape == tuple(made.blobs["t0"].shape)
    assert error(made.blobs["t0"].numpy(), wanted) <= 1e-5


LABELS = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0])
SCORES = torch.tensor(np.random.default_rng(2).standard_normal((5, 3)))
OTHERS = torch.tensor(np.random.default_rng(3).standard_normal((5, 3)))
MATRIX = torch.tensor(np.random.default_rng(4).random((1, 1, 3, 3)))
SHARES = torch.softmax(SCORES, 1)


@pytest.mark.parametrize(
    ("kind", "settings", "x", "others"),
    [
        ("SoftmaxWithLoss", "", SCORES, {"label": LABELS}),
        ("SoftmaxWithLoss", "loss_param { ignore_label: 2 }", SCORES, {"label": LABELS}),
        ("SoftmaxWithLoss", "loss_param { ignore_label: 2 normalization: BATCH_SIZE }", SCORES, {"label": LABELS}),
        ("SoftmaxWithLoss", "loss_param { normalization: NONE } loss_weight: 0.25", SCORES, {"label": LABELS}),
        ("InfogainLoss", "", SCORES, {"label": LABELS, "h": MATRIX}),
        ("MultinomialLogisticLoss", "", SHARES, {"label": LABELS}),
        ("EuclideanLoss", "", SCORES, {"b": OTHERS}),
        ("SigmoidCrossEntropyLoss", "", SCORES, {"b": (OTHERS > 0).double()}),
        ("SigmoidCrossEntropyLoss", "loss_param { ignore_label: 1 normalization: VALID }", SCORES, {"b": (OTHERS > 0).double()}),
        ("HingeLoss", "", SCORES, {"label": LABELS}),
        ("HingeLoss", "hinge_loss_param { norm: L2 }", SCORES, {"label": LABELS}),
        ("ContrastiveLoss", "contrastive_loss_param { margin: 2 legacy_version: true }", SCORES,
         {"b": OTHERS, "label": torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])}),
    ],
)  # fmt: skip
def test_gradients_of_losses_are_those_of_differences(kind: str, settings: str, x: Any, others: Any) -> None:
    made = opened(text(kind, settings, **{n: t.shape for n, t in {"a": x, **others}.items()}))

    def loss(moved: Any) -> Any:
        return made.run({"a": moved, **others}).loss

    moved = x.clone().requires_grad_()
    loss(moved).backward()
    numeric = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).reshape(-1)
        shift[i] = 1e-6
        shift = shift.reshape(x.shape)
        numeric.view(-1)[i] = (loss(x + shift) - loss(x - shift)) / 2e-6
    assert float(numeric.abs().max()) > 1e-3
    np.testing.assert_allclose(moved.grad.numpy(), numeric.numpy(), atol=1e-8, rtol=1e-6)


def test_contrastive_gradient_is_caffes() -> None:
    """-(margin - d) (a - b) / (d + 1e-4) / N for pairs that differ: Caffe adds 1e-4 to the distance."""
    a = torch.tensor([[0.01, 0.0], [0.6, 0.8], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(3, 2, dtype=torch.float64)
    shapes = {"a": (3, 2), "b": (3, 2), "s": (3,)}
    made = opened(text("ContrastiveLoss", "contrastive_loss_param { margin: 1.5 }", **shapes))
    made.run({"a": a, "b": b, "s": torch.tensor([0.0, 0.0, 1.0])}).loss.backward()
    first = -(1.5 - 0.01) * 0.01 / (0.01 + 1e-4) / 3
    second = [-(1.5 - 1) * one / (1 + 1e-4) / 3 for one in (0.6, 0.8)]
    np.testing.assert_allclose(a.grad.numpy(), [[first, 0], second, [1 / 3, 0]], rtol=1e-9)


def test_softmax_loss_is_floored_and_its_gradient_is_not() -> None:
    """-log(FLT_MIN) where the probability underflows; the gradient stays softmax - 1, as Caffe computes it."""
    x = torch.tensor([[200.0, 0.0]], requires_grad=True)
    made = opened(text("SoftmaxWithLoss", "", a=(1, 2), label=(1,))).run(
        {"a": x, "label": torch.tensor([1.0])}
    )
    made.loss.backward()
    assert made.loss.item() == pytest.approx(-np.log(np.finfo(np.float32).tiny), rel=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), [[1, -1]], atol=1e-6)


def test_a_label_that_is_no_class_is_refused_with_the_layer() -> None:
    with pytest.raises(NetError, match='layer "l": label 3 is none of the 3 classes'):
        top("SoftmaxWithLoss", a=torch.zeros(2, 3), label=torch.tensor([0.0, 3.0]))


def test_batch_norm_moves_caffes_sums() -> None:
    """scale = f scale + 1, mean = f mean + batch mean, var = f var + m / (m - 1) batch var."""
    x = f32(np.random.default_rng(6).standard_normal((4, 3, 2, 2)))
    settings = "batch_norm_param { moving_average_fraction: 0.75 eps: 0.5 }"
    made = opened(text("BatchNorm", settings, a=x.shape), [[1, 2, 3], [4, 5, 6], [7]])
    y = made.run({"a": torch.tensor(x)}, every=True).blobs["t0"].numpy()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    wanted = (x - mean[:, None, None]) / np.sqrt(var + 0.5)[:, None, None]
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    (blobs,) = made.weights().values()
    np.testing.assert_allclose(blobs[0], 0.75 * f32([1, 2, 3]) + mean, rtol=1e-5)
    np.testing.assert_allclose(blobs[1], 0.75 * f32([4, 5, 6]) + var * 16 / 15, rtol=1e-5)
    np.testing.assert_allclose(blobs[2], [0.75 * 7 + 1])
    assert not any(made.trains(("l", i)) for i in range(3))  # nor does the weight decay move them


def test_batch_norm_of_one_number_a_channel() -> None:
    made = opened(text("BatchNorm", "", a=(1, 3)), [[0, 0, 0], [0, 0, 0], [0]])
    y = made.run({"a": torch.tensor([[1.0, 2.0, 3.0]])}, every=True).blobs["t0"]
    np.testing.assert_array_equal(y.numpy(), [[0, 0, 0]])
    (blobs,) = made.weights().values()
    np.testing.assert_array_equal(blobs[0], [1, 2, 3])
    np.testing.assert_array_equal(blobs[1], [0, 0, 0])


@pytest.mark.parametrize(
    ("phase", "given", "batch"),
    [("TRAIN", "", True), ("TEST", "", False), ("TRAIN", "use_global_stats: true", False),
     ("TEST", "use_global_stats: false", True)],
)  # fmt: skip
def test_batch_norm_statistics_by_phase(phase: str, given: str, batch: bool) -> None:
    x = f32([[1], [3]])
    source = text("BatchNorm", f"batch_norm_param {{ {given} eps: 0 }}", a=x.shape)
    made = opened(source, [[20], [8], [2]], phase)
    y = made.run({"a": torch.tensor(x)}, every=True).blobs["t0"].numpy()
    np.testing.assert_allclose(y, [[-1], [1]] if batch else (x - 10) / 2, rtol=1e-6)
    moved = phase == "TRAIN" and batch
    assert float(next(iter(made.weights().values()))[2][0]) == pytest.approx(2 * 0.999 + 1 if moved else 2)


def test_batch_norm_gradient_is_that_of_differences() -> None:
    x = torch.tensor(np.random.default_rng(7).standard_normal((3, 2, 2, 2)))
    weight = torch.tensor(np.random.default_rng(8).standard_normal((3, 2, 2, 2)))
    from caffe_proto.torch_layers.base import Peers
    from caffe_proto.torch_layers.norm import _by_batch

    assert torch.autograd.gradcheck(
        lambda a: (_by_batch(a, 1e-3, Peers())[0] * weight).sum(), x.requires_grad_()
    )


def test_dropout_drops_in_training_alone() -> None:
    x = torch.ones(10000)
    torch.manual_seed(0)
    found = top("Dropout", "dropout_param { dropout_ratio: 0.2 }", a=x).blobs["t0"].numpy()
    assert set(np.unique(found)) == {np.float32(0), np.float32(1.25)}
    assert (found == 0).mean() == pytest.approx(0.2, abs=0.02)
    same = top("Dropout", "dropout_param { dropout_ratio: 0.2 }", phase="TEST", a=x).blobs["t0"].numpy()
    np.testing.assert_array_equal(same, x.numpy())


def test_accuracy_of_classes() -> None:
    scores = torch.tensor([[3.0, 1, 2], [1, 3, 2], [1, 2, 3], [1, 2, 3]])
    made = top("Accuracy", "", tops=2, a=scores, label=torch.tensor([0.0, 0, 2, 1])).blobs
    assert made["t0"].item() == 0.5
    np.testing.assert_array_equal(made["t1"].numpy(), [0.5, 0, 1])


def test_equal_scores_count_as_better() -> None:
    scores = torch.ones(1, 3)
    assert top("Accuracy", "", a=scores, label=torch.zeros(1)).blobs["t0"].item() == 0
    top3 = top("Accuracy", "accuracy_param { top_k: 3 }", a=scores, label=torch.zeros(1))
    assert top3.blobs["t0"].item() == 1


def test_max_of_equal_numbers_sends_the_gradient_to_the_second() -> None:
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 0.0], requires_grad=True)
    source = text("Eltwise", "eltwise_param { operation: MAX } loss_weight: 1", a=(2,), b=(2,))
    opened(source).run({"a": a, "b": b}).loss.backward()
    np.testing.assert_array_equal(a.grad.numpy(), [0, 1])
    np.testing.assert_array_equal(b.grad.numpy(), [1, 0])


SHARING = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 } } }
layer { name: "one" type: "InnerProduct" bottom: "data" top: "one" param { name: "w" lr_mult: 3 } param { lr_mult: 2 }
        inner_product_param { num_output: 3 weight_filler { value: 2 } } }
layer { name: "two" type: "InnerProduct" bottom: "one" top: "two" param { name: "w" } param { lr_mult: 0 decay_mult: 0 }
        inner_product_param { num_output: 3 weight_filler { value: 5 } } }
layer { name: "sum" type: "Reduction" bottom: "two" top: "sum" loss_weight: 1 }
"""


def shared(source: str = SHARING, weights: Weights | None = None) -> TorchNet:
    made = net.parse(source, state=NetState("TRAIN"))
    shaped = infer(graph.build(made))
    return TorchNet(made, shaped, start(made, shaped, weights, np.random.default_rng(0)))


def test_layers_that_share_a_name_share_the_blob() -> None:
    made = shared()
    assert list(made.learnt) == [("one", 0), ("one", 1), ("two", 1)]
    assert made.named["two", 0] is made.learnt["one", 0]
    np.testing.assert_array_equal(made.learnt["one", 0].detach().numpy(), np.full((3, 3), 2))
    assert [made.multipliers[key].rate for key in made.learnt] == [3, 2, 0]
    assert [made.multipliers[key].decay for key in made.learnt] == [1, 1, 0]
    assert [blob.requires_grad for blob in made.learnt.values()] == [True, True, False]
    made.run({"data": torch.ones(2, 3)}).loss.backward()
    # d sum / dW = 1 outer (W 1) from the upper use, (W^T 1) outer 1 from the lower one, for two items
    np.testing.assert_array_equal(made.learnt["one", 0].grad.numpy(), np.full((3, 3), 2 * (6 + 6)))
    stored = made.weights()
    assert [tuple(blob.shape for blob in stored[name]) for name in stored] == [((3, 3), (3,))] * 2


def test_what_is_stored_counts_for_all_that_share() -> None:
    stored = Weights([NewEntry("one", (np.full((3, 3), 7, np.float32), np.zeros(3, np.float32)))])
    np.testing.assert_array_equal(shared(weights=stored).named["two", 0].detach().numpy(), np.full((3, 3), 7))


def test_multipliers_of_shared_blobs_must_agree() -> None:
    with pytest.raises(NetError, match='layer "two": lr_mult 4 of blob 0 is 3'):
        shared(
            SHARING.replace(
                'bottom: "one" top: "two" param { name: "w"',
                'bottom: "one" top: "two" param { name: "w" lr_mult: 4',
            )
        )


OLD = """
input: "data" input_dim: 2 input_dim: 3 input_dim: 1 input_dim: 1
layers { name: "one" type: INNER_PRODUCT bottom: "data" top: "one" param: "w" param: "" blobs_lr: 3 blobs_lr: 2
         weight_decay: 4 weight_decay: 0 inner_product_param { num_output: 3 weight_filler { value: 2 } } }
layers { name: "two" type: INNER_PRODUCT bottom: "one" top: "two" param: "w" inner_product_param { num_output: 3 } }
layers { name: "loss" type: EUCLIDEAN_LOSS bottom: "two" bottom: "one" top: "loss" loss_weight: 2 }
"""
OLDEST = """
input: "data" input_dim: 2 input_dim: 3 input_dim: 1 input_dim: 1
layers { layer { name: "one" type: "innerproduct" num_output: 3 weight_filler { value: 2 } bias_filler { value: 1 }
         blobs_lr: 3 blobs_lr: 2 weight_decay: 4 weight_decay: 0 } bottom: "data" top: "one" }
"""


def test_old_nets_say_the_same_in_their_own_words() -> None:
    made = shared(OLD)
    assert list(made.learnt) == [("one", 0), ("one", 1), ("two", 1)]
    assert [(one.rate, one.decay) for one in made.multipliers.values()] == [(3, 4), (2, 0), (1, 1)]
    assert made.loss_weights == {"loss": 2}
    # one = 2 * 3, two = 2 * 18: 2 * 3 * 30^2 / 2
    assert made.run({"data": torch.ones(2, 3, 1, 1)}).loss.item() == 2 * 3 * 30**2 / 2
    with pytest.raises(NetError, match="decay_mult 5 of blob 0 is 4"):
        shared(OLD.replace('top: "two" param: "w"', 'top: "two" param: "w" weight_decay: 5'))
    oldest = shared(OLDEST)
    assert [(one.rate, one.decay) for one in oldest.multipliers.values()] == [(3, 4), (2, 0)]
    found = oldest.run({"data": torch.ones(2, 3, 1, 1)}, every=True).blobs["one"]
    np.testing.assert_array_equal(found.numpy(), np.full((2, 3), 7))


def test_fine_tuning_goes_by_layer_name() -> None:
    bias = np.array([1, 2, 3], np.float32)
    weights = Weights(
        [NewEntry("elsewhere", (bias,)), NewEntry("two", (np.full((3, 3), 9, np.float32), bias))],
        path="w.caffemodel",
    )
    made = shared(SHARING.replace('name: "w"', ""), weights)
    np.testing.assert_array_equal(made.learnt["one", 0].detach().numpy(), np.full((3, 3), 2))
    np.testing.assert_array_equal(made.learnt["two", 0].detach().numpy(), np.full((3, 3), 9))
    np.testing.assert_array_equal(made.learnt["two", 1].detach().numpy(), bias)
    wrong = Weights([NewEntry("two", (np.zeros((3, 4), np.float32), bias))], path="w.caffemodel")
    with pytest.raises(WeightsError, match=r'"two" wants 3 x 3 for blob 0, stored is 3 x 4.*another name'):
        shared(SHARING, wrong)


def test_a_tested_net_takes_the_tensors_of_the_trained_one() -> None:
    trained = shared()
    made = net.parse(SHARING.replace('name: "sum"', 'name: "total"'), state=NetState("TEST"))
    shaped = infer(graph.build(made))
    names = {name for name, _ in trained.named}
    blobs = start(made, shaped, None, np.random.default_rng(0), names)
    tested = TorchNet(made, shaped, blobs, given=trained.named)
    assert all(tested.learnt[key] is trained.learnt[key] for key in trained.learnt)


def test_propagate_down_stops_gradients() -> None:
    source = SHARING.replace(
        'top: "two" param { name: "w" }', 'top: "two" propagate_down: false param { lr_mult: 1 }'
    )
    made = shared(source)
    made.run({"data": torch.ones(2, 3)}).loss.backward()
    assert made.learnt["one", 0].grad is None
    np.testing.assert_array_equal(made.learnt["two", 0].grad.numpy(), np.full((3, 3), 12))


def test_losses_add_up_by_weight_and_unnamed_tops_have_a_name() -> None:
    source = """
    layer { name: "data" type: "Input" top: "a" top: "b" input_param { shape { dim: 2 dim: 3 } } }
    layer { name: "near" type: "EuclideanLoss" bottom: "a" bottom: "b" }
    layer { name: "far" type: "EuclideanLoss" bottom: "a" bottom: "b" top: "far" loss_weight: 0.5 }
    layer { name: "sum" type: "Reduction" bottom: "a" top: "sum" }
    """
    made = opened(source)
    found = made.run({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)})
    assert {name: one.item() for name, one in found.blobs.items()} == {
        "near (automatic)": 1.5,
        "far": 1.5,
        "sum": 6,
    }
    assert found.loss.item() == 2.25
    assert made.loss_weights == {"near (automatic)": 1.0, "far": 0.5}


def test_a_recurrent_layer_goes_on_where_the_last_pass_ended() -> None:
    """Two passes of two steps are one of four; cont 0 forgets."""
    numbers = np.random.default_rng(9)
    settings = "recurrent_param { num_output: 3 }"
    blobs = [numbers.standard_normal(shape) for shape in ((12, 2), (12,), (12, 3))]
    x, ones = torch.tensor(f32(numbers.standard_normal((4, 1, 2)))), torch.ones(4, 1)
    whole = opened(text("LSTM", settings, x=(4, 1, 2), cont=(4, 1)), blobs)
    wanted = whole.run({"x": x, "cont": ones}, every=True).blobs["t0"]
    half = opened(text("LSTM", settings, x=(2, 1, 2), cont=(2, 1)), blobs)
    parts = [half.run({"x": part, "cont": ones[:2]}, every=True).blobs["t0"] for part in (x[:2], x[2:])]
    np.testing.assert_allclose(torch.cat(parts).numpy(), wanted.numpy(), rtol=1e-6)
    forgets = half.run({"x": x[:2], "cont": torch.tensor([[0.0], [1.0]])}, every=True).blobs["t0"]
    np.testing.assert_allclose(forgets.numpy(), parts[0].numpy(), rtol=1e-6)
    other = opened(text("LSTM", settings, x=(2, 1, 2), cont=(2, 1)), blobs)
    other.run({"x": x[:2], "cont": ones[:2]})
    again = opened(text("LSTM", settings, x=(2, 1, 2), cont=(2, 1)), blobs)
    again.carry(other.carried())
    np.testing.assert_array_equal(
        again.run({"x": x[2:], "cont": ones[:2]}, every=True).blobs["t0"].numpy(), parts[1].numpy()
    )
