"""Published nets of forks with their published weights: they load, convert, run, and agree with what is known."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import onnx
import pytest

import caffe_proto as cp
from caffe_proto import net, weights
from caffe_proto.errors import WeightsError
from caffe_proto.model import Model
from caffe_proto.onnx_export import Request, export_onnx
from caffe_proto.runtime import Engine, error, open_onnx, random_feeds, session

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MODELS = DATA / "models"
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="no ../shared/data/models with published nets")


def load(folder: str, name: str, stored: str | None = None) -> Model:
    return cp.load(MODELS / folder / f"{name}.prototxt", MODELS / folder / f"{stored or name}.caffemodel")


def exported(
    model: Model, feeds: dict[str, np.ndarray], request: Request | None = None
) -> dict[str, np.ndarray]:
    """The outputs of the exported file, standard operators alone, run without this program."""
    made = export_onnx(model, request)
    assert {node.domain for node in made.graph.node} == {""}
    opened = open_onnx(made.SerializeToString(), Engine(threads=1))
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, feeds), strict=True))


@pytest.mark.parametrize("name", ["RFB", "slim"])
def test_ultralight_face_agrees_with_the_onnx_of_its_authors(name: str) -> None:
    """Their file goes on to decode the boxes; what it decodes is what the Caffe net gives out."""
    model = load("ultralight_face_linzaer", f"{name}-320")
    feeds = random_feeds(model, Request(), seed=3)
    found = exported(model, feeds)
    theirs = onnx.load(MODELS / "ultralight_face_linzaer" / f"version-{name}-320.onnx")
    makers = {output: node.op_type for node in theirs.graph.node for output in node.output}
    sliced = [node.input[0] for node in theirs.graph.node if node.op_type == "Slice"]
    places = next(blob for blob in sliced if makers[blob] == "Concat")
    theirs.graph.output.append(onnx.helper.make_tensor_value_info(places, onnx.TensorProto.FLOAT, None))
    reference = open_onnx(theirs.SerializeToString(), Engine(threads=1))
    scores, boxes = reference.run(["scores", places], feeds)
    assert found["scores"].shape == (1, 4420, 2) and found["boxes"].shape == (1, 4420, 4)
    assert error(found["scores"], scores) < 1e-5
    assert error(found["boxes"], boxes) < 1e-5


def test_retinaface_gives_three_heads_at_three_strides() -> None:
    """Made of BVLC's layers; the shapes follow the image, and the scores of the two classes add up to 1."""
    model = load("retinaface_mnet_caffe", "mnet")
    rng = np.random.default_rng(0)
    feeds = {"data": rng.uniform(0, 255, (1, 3, 160, 192)).astype(np.float32)}
    found = exported(model, feeds, Request(input_shapes={"data": (1, 3, 160, 192)}))
    assert len(found) == 9
    for stride in (8, 16, 32):
        places = (160 // stride, 192 // stride)
        assert found[f"face_rpn_bbox_pred_stride{stride}"].shape == (1, 8, *places)
        assert found[f"face_rpn_landmark_pred_stride{stride}"].shape == (1, 20, *places)
        scores = found[f"face_rpn_cls_prob_reshape_stride{stride}"]
        assert np.allclose(scores[:, :2] + scores[:, 2:], 1, atol=1e-5)
    assert all(np.isfinite(one).all() for one in found.values())


def test_retinaface_of_another_author_names_layers_its_weights_lack() -> None:
    model = load("retinaface_mnet_caffe", "charrin_mnet")
    with pytest.raises(WeightsError) as caught:
        export_onnx(model)
    words = str(caught.value)
    assert "holds no weights for 2 of the 152 learnt layers" in words
    assert '"rf_c3_upsampling_", "rf_c2_upsampling_"' in words and "\n" not in words


def test_upresnet10_by_hand() -> None:
    """waifu2x: squeeze and excitation, Axpy and CropCenter, every layer again in NumPy on a small image."""
    model = load("waifu2x_caffe", "upresnet10", "upresnet10_noise1_scale2x")
    assert model.weights is not None
    image = np.random.default_rng(1).uniform(0, 1, (2, 3, 32, 36)).astype(np.float32)
    with session(model, threads=1) as opened:
        (found,) = opened.run({"input": image}).values()
    expected = upresnet10({name: model.weights[name] for name in model.weights}, image)
    assert found.shape == expected.shape
    assert error(found, expected.astype(np.float32)) < 1e-5


def leaky(x: np.ndarray, slope: float = 0.1) -> np.ndarray:
    return np.where(x > 0, x, slope * x)


def convolve(x: np.ndarray, blobs: tuple[np.ndarray, ...]) -> np.ndarray:
    weight, bias = (blob.astype(np.float64) for blob in blobs)
    k = weight.shape[-1]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight, optimize=True) + bias[:, None, None]


def deconvolve(x: np.ndarray, blobs: tuple[np.ndarray, ...], stride: int, pad: int) -> np.ndarray:
    weight = blobs[0].astype(np.float64)
    bias = blobs[1] if len(blobs) > 1 else np.zeros(weight.shape[1])
    k = weight.shape[-1]
    n, _, height, width = x.shape
    made = np.zeros((n, weight.shape[1], stride * (height - 1) + k, stride * (width - 1) + k))
    for i in range(k):
        for j in range(k):
            rows, columns = slice(i, i + stride * height, stride), slice(j, j + stride * width, stride)
            made[:, :, rows, columns][:, :, :height, :width] += np.einsum(
                "nchw,co->nohw", x, weight[:, :, i, j]
            )
    return made[:, :, pad:-pad, pad:-pad] + bias[:, None, None]


def upresnet10(blobs: dict[str, tuple[np.ndarray, ...]], image: np.ndarray) -> np.ndarray:
    """The net from its description: five residual blocks between two convolutions, then twice the size."""
    x = first = leaky(convolve(image.astype(np.float64), blobs["/conv_pre"]))
    for block in range(1, 6):
        y = leaky(convolve(x, blobs[f"/res{block}/conv1"]))
        y = leaky(convolve(y, blobs[f"/res{block}/conv2"]))
        excite = y.mean((2, 3))
        for layer, shape in (("fc1", lambda z: np.maximum(z, 0)), ("fc2", lambda z: 1 / (1 + np.exp(-z)))):
            weight, bias = blobs[f"/res{block}/{layer}"]
            excite = shape(excite @ weight.T.astype(np.float64) + bias)
        x = excite[:, :, None, None] * y + x[:, :, 2:-2, 2:-2]
    x = leaky(convolve(x, blobs["/conv_bridge"]))
    x = x + first[:, :, 11:-11, 11:-11]
    return deconvolve(x, blobs["/conv_post"], 2, 3)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("anime_style_art", "anime_style_art_scale2x_inputfield"),
        ("anime_style_art", "anime_style_art_scale2x_inputlayer"),
        ("anime_style_art_rgb", "anime_style_art_rgb_scale2x"),
    ],
)
def test_waifu2x_chains_of_convolutions(name: str, stored: str) -> None:
    model = load("waifu2x_caffe", name, stored)
    assert model.weights is not None
    feeds = {name: one[:, :, :24, :28] for name, one in random_feeds(model, Request()).items()}
    (found,) = exported(
        model, feeds, Request(input_shapes={name: one.shape for name, one in feeds.items()})
    ).values()
    (x,) = (one.astype(np.float64) for one in feeds.values())
    for index in range(1, 8):
        x = convolve(x, model.weights[f"conv{index}_layer"])
        x = leaky(x) if index < 7 else x
    assert error(found, x.astype(np.float32)) < 1e-5


def test_upconv_7_is_another_revision_than_its_weights() -> None:
    with pytest.raises(WeightsError, match='"conv1_layer" wants 16 x 3 x 3 x 3 for blob 0, stored is 32 x 3'):
        export_onnx(load("waifu2x_caffe", "upconv_7", "upconv_7_scale2x"))


def test_upconv_7_of_its_own_revision() -> None:
    """The same net with the widths that the weights have."""
    folder = MODELS / "waifu2x_caffe"
    source = (folder / "upconv_7.prototxt").read_text()
    widths = iter([32, 32, 64, 64, 128, 128, 3])
    lines = (f"num_output: {next(widths)}" if "num_output" in line else line for line in source.splitlines())
    stored = weights.load(folder / "upconv_7_scale2x.caffemodel")
    model = Model(net.parse("\n".join(lines)), stored)
    feeds = {"input": np.random.default_rng(2).uniform(0, 1, (1, 3, 20, 24)).astype(np.float32)}
    with session(model, threads=1) as opened:
        (found,) = opened.run(feeds).values()
    x = feeds["input"].astype(np.float64)
    for index in range(1, 7):
        x = leaky(convolve(x, stored[f"conv{index}_layer"]))
    expected = deconvolve(x, stored["conv7_layer"], 2, 3)
    assert error(found, expected.astype(np.float32)) < 1e-5


def test_masked_lenet_reads_digits() -> None:
    """Every weight times its mask, which is what 0.986 of the 10,000 test images want."""
    images = 1000
    model = load("lenet_masked", "lenet_pruning", "pruning_iter_35000")
    folder = DATA / "mnist"
    pixels = np.frombuffer(
        gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16
    )
    labels = np.frombuffer(
        gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8
    )
    data = pixels.reshape(-1, 1, 28, 28)[:images] * np.float32(0.00390625)
    with session(model, blobs=["conv1", "ip2"], threads=1) as opened:
        made = opened.run({"data": data, "label": labels[:images].astype(np.float32)})
    assert (made["ip2"].argmax(1) == labels[:images]).mean() > 0.98
    assert model.weights is not None
    weight, bias, mask = model.weights["conv1"]
    expected = convolve(data[:5].astype(np.float64), (weight * mask, bias))
    assert error(made["conv1"][:5], expected.astype(np.float32)) < 1e-5
    assert (
        error(made["conv1"][:5], convolve(data[:5].astype(np.float64), (weight, bias)).astype(np.float32))
        > 0.1
    )
