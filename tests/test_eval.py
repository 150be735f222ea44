"""Accuracy and agreement, counted and measured on real nets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pytest
from helpers import SHARED, needs_shared

from caffe_proto import net
from caffe_proto.data.build import datum, write_lmdb
from caffe_proto.errors import UsageError
from caffe_proto.evaluation import Accuracy, Evaluation, Share, image_input, scores_blob
from caffe_proto.graph import build
from lra.cli import main
from lra.digits import drawn

LENET = Path(__file__).resolve().parents[1] / "models" / "lenet"
DEPLOY, WEIGHTS = str(LENET / "lenet.prototxt"), str(LENET / "lenet.caffemodel")
TRAIN_VAL = str(LENET / "lenet_train_val.prototxt")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .npz of drawn digits: gray 0 to 255, and labels."""
    images, labels = drawn(200, seed=5)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x=(images * 256).astype(np.uint8), y=labels)
    return path


def ok(capsys: Capture, *arguments: str) -> Any:
    capsys.readouterr()
    code = main(["eval", *arguments, "--threads", "1", "--json"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


def fails(capsys: Capture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["eval", *arguments, "--threads", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


# Counting


def test_standard_error() -> None:
    share = Share()
    share.count(np.array([True, True, True, False]))
    assert (share.value, share.error) == (0.75, np.sqrt(0.75 * 0.25 / 4))


def test_ties_and_nan_are_wrong() -> None:
    scores = np.array([[1.0, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1], [np.nan] * 6, [9, np.nan, 0, 0, 0, 0]])
    found = Accuracy()
    found.count(scores, np.array([5, 0, 0, 0]))
    assert (found.top1.hits, found.top5.hits) == (2, 2)
    found.count(scores[:1], np.array([1]))
    assert (found.top1.hits, found.top5.hits) == (2, 3)


def test_output_error() -> None:
    from caffe_proto.data.batches import Batch

    batch = Batch(("a",), np.zeros((1, 1, 1, 1)), None)
    found = Evaluation()
    found.count(batch, np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]]))
    assert (found.output_error, found.agreement.hits, found.accuracy.top1.n) == (1.25, 0, 0)
    none = Evaluation()
    none.count(batch, np.zeros((1, 2)), np.zeros((1, 2)))
    assert none.output_error == 0


def _net(body: str) -> net.Net:
    inputs = (
        'layer { name: "i" type: "Input" top: "data" top: "label" input_param { shape { dim: 1 dim: 2 } } }'
    )
    return net.parse(inputs + body)


FC = 'layer {{ name: "{0}" type: "InnerProduct" bottom: "data" top: "{0}" inner_product_param {{ num_output: 2 }} }}'


def _judge(kind: str, bottom: str) -> str:
    return f'layer {{ name: "{kind}{bottom}" type: "{kind}" bottom: "{bottom}" bottom: "label" top: "{kind}{bottom}" }}'


@pytest.mark.parametrize(
    ("judges", "wanted"),
    [
        ([("Accuracy", "a"), ("SoftmaxWithLoss", "b")], "a"),
        ([("SoftmaxWithLoss", "b"), ("SoftmaxWithLoss", "a")], "a"),
        ([("Accuracy", "a"), ("Accuracy", "b")], "b"),
    ],
)
def test_the_blob_of_scores(judges: list[tuple[str, str]], wanted: str) -> None:
    built = build(_net(FC.format("a") + FC.format("b") + "".join(_judge(*one) for one in judges)))
    assert scores_blob(built) == wanted
    assert built.blob(image_input(built)) == "data"


def test_the_blob_of_scores_must_be_plain() -> None:
    body = FC.format("a") + 'layer { name: "s" type: "Silence" bottom: "label" }'
    assert scores_blob(build(_net(body))) == "a"
    with pytest.raises(UsageError, match="the net has 2 outputs: a, b; say which: --blob BLOB"):
        scores_blob(build(_net(body + FC.format("b"))))
    with pytest.raises(UsageError, match="this one has 2: data, label"):
        image_input(build(_net(FC.format("a") + FC.format("b").replace('bottom: "data"', 'bottom: "label"'))))


# The program


def test_lenet_reads_drawn_digits(digits: Path, capsys: Capture) -> None:
    found = ok(capsys, DEPLOY, WEIGHTS, "--images", str(digits), "--scale", "0.00390625")
    assert (found["images"], found["classes"], found["output"]) == (200, 10, "prob")
    assert found["top1"]["value"] > 0.9 and found["top5"]["value"] >= found["top1"]["value"]
    p = found["top1"]["value"]
    assert found["top1"]["standard_error"] == pytest.approx(np.sqrt(p * (1 - p) / 200))
    said = ok(capsys, TRAIN_VAL, WEIGHTS, "--images", str(digits))  # its transform_param has the scale
    assert said["top1"] == found["top1"] and said["transform"]["scale"] == 0.00390625


def test_sources_of_the_same_digits_agree(digits: Path, tmp_path: Path, capsys: Capture) -> None:
    stored = np.load(digits)
    x, y = stored["x"][:50], stored["y"][:50]
    (tmp_path / "db").mkdir()
    write_lmdb(tmp_path / "db", ((f"{i:08}", datum(x[i], int(y[i]))) for i in range(50)))
    images = image_files.idx(tmp_path / "t-images-idx3-ubyte.gz", x[:, 0])
    image_files.idx(tmp_path / "t-labels-idx1-ubyte", y.astype(np.uint8))
    for i in range(50):
        image_files.save(tmp_path / "pics" / str(y[i]) / f"{i}.png", x[i].repeat(3, 0))
    sources = [tmp_path / "db", images, tmp_path / "pics"]
    found = [
        ok(capsys, TRAIN_VAL, WEIGHTS, "--images", str(one), "--batch", "7")["top1"] for one in sources[:2]
    ]
    files = ok(capsys, DEPLOY, WEIGHTS, "--images", str(sources[2]), "--scale", "0.00390625")["top1"]
    assert found[0] == found[1] == files and files["n"] == 50


def test_a_reference(digits: Path, capsys: Capture, tmp_path: Path) -> None:
    options = ("--images", str(digits), "--scale", "0.00390625", "--reference", f"{DEPLOY},{WEIGHTS}")
    found = ok(capsys, DEPLOY, WEIGHTS, *options, "--n-images", "60", "--seed", "3")
    assert (found["agreement"]["value"], found["output_error"], found["images"]) == (1, 0, 60)
    assert found["reference"]["top1"] == found["top1"]
    small = str(tmp_path / "small")
    assert main(["decompose", DEPLOY, WEIGHTS, "-o", small, "--ranks", "3,5", "--scheme", "pca"]) == 0
    found = ok(capsys, f"{small}.prototxt", f"{small}.caffemodel", *options)
    assert 0.2 < found["agreement"]["value"] < 1 and 0 < found["output_error"] < 2
    assert found["top1"]["value"] < found["reference"]["top1"]["value"]


def test_without_labels(digits: Path, capsys: Capture, tmp_path: Path) -> None:
    bare = tmp_path / "bare.npz"
    np.savez(bare, x=np.load(digits)["x"][:5])
    assert "has no labels; give --reference" in fails(capsys, DEPLOY, WEIGHTS, "--images", str(bare))
    found = ok(capsys, DEPLOY, WEIGHTS, "--images", str(bare), "--reference", f"{DEPLOY},{WEIGHTS}")
    assert "top1" not in found and set(found["reference"]) == {"sha256"} and found["agreement"]["n"] == 5


def test_the_printed_form(digits: Path, capsys: Capture, tmp_path: Path) -> None:
    path = image_files.listed(tmp_path, np.load(digits)["x"][:3])
    (tmp_path / "pics" / "a 1.png").write_bytes(b"broken")
    options = (
        "--images",
        str(path),
        "--scale",
        "0.5",
        "--mean",
        "3",
        "--resize",
        "30",
        "--crop",
        "28",
        "--bgr",
    )
    code = main(
        [
            "eval",
            DEPLOY,
            WEIGHTS,
            *options,
            "--skip-bad",
            "--reference",
            f"{DEPLOY},{WEIGHTS}",
            "--threads",
            "1",
        ]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert f"2 images of {path}: resize 30 x 30, crop 28 x 28, mean 3, scale 0.5, BGR\n" in out
    assert "top-1" in out and "reference" in out and "both name the same class: 1.0000 ± 0.0000" in out
    assert f'left out 1 images that cannot be read:\n  {path}:2: image "pics/a 1.png": is no image' in out


def test_refusals(digits: Path, capsys: Capture, tmp_path: Path) -> None:
    images = ("--images", str(digits))
    assert "no such file" in fails(capsys, DEPLOY, WEIGHTS, "--images", str(tmp_path / "gone"))
    assert "--crop '3,x' is no size" in fails(capsys, DEPLOY, WEIGHTS, *images, "--crop", "3,x")
    assert "smaller than the crop 28 x 28" in fails(capsys, DEPLOY, WEIGHTS, *images, "--resize", "20")
    assert "is 1 x 30 x 30 where 1 x 28 x 28 is wanted" in fails(
        capsys, DEPLOY, WEIGHTS, *images, "--resize", "40", "--crop", "30"
    )
    assert "names no weights" in fails(capsys, DEPLOY, WEIGHTS, *images, "--reference", DEPLOY)
    assert "scores are (N, K)" in fails(capsys, DEPLOY, WEIGHTS, *images, "--blob", "conv1")
    assert 'there is no blob "conv9"' in fails(capsys, DEPLOY, WEIGHTS, *images, "--blob", "conv9")
    np.savez(tmp_path / "many.npz", x=np.load(digits)["x"][:2], y=[3, 10])
    line = fails(capsys, DEPLOY, WEIGHTS, "--images", str(tmp_path / "many.npz"))
    assert 'image "many.npz[1]" has label 10, "prob" has 10 classes' in line
    path = image_files.listed(tmp_path, np.load(digits)["x"][:1])
    (tmp_path / "pics" / "a 0.png").unlink()
    assert "list.txt:1: image" in fails(capsys, DEPLOY, WEIGHTS, "--images", str(path))
    assert "none of its images can be read" in fails(
        capsys, DEPLOY, WEIGHTS, "--images", str(path), "--skip-bad"
    )


# Known results of real nets, from an independent implementation

MODELS = SHARED / "data" / "models"
MNIST = ("--images", str(SHARED / "data" / "mnist" / "t10k-images-idx3-ubyte.gz"), "--scale", "0.00390625")
CIFAR = (
    "--images", str(SHARED / "data" / "cifar10" / "test_batch_first1000.bin"),
    "--mean", str(SHARED / "data" / "cifar10" / "mean.binaryproto"),
)  # fmt: skip
IMAGENET = (
    "--images", str(SHARED / "data" / "imagenet500" / "list.txt"), "--resize", "256", "--mean", "104,117,123",
)  # fmt: skip
EVERPEACE, YUVVAL, SONGHAN = (
    "caffe_v1_everpeace",
    "cifar_v2_yuvval",
    "squeezenet_v1.0_deepcompression_songhan",
)


@needs_shared
@pytest.mark.parametrize(
    ("model", "weights", "images", "hits"),
    [
        ("lenet_v2_ethereon/lenet", "lenet_v2_ethereon/lenet_iter_10000", MNIST, 9914),
        (f"{EVERPEACE}/mnist/lenet", f"{EVERPEACE}/mnist/lenet_iter_10000", MNIST, 9905),
        (f"{YUVVAL}/lenet", f"{YUVVAL}/lenet_iter_10000", MNIST, 9833),
        (f"{EVERPEACE}/cifar10/cifar10_full", f"{EVERPEACE}/cifar10/cifar10_full_iter_70000", CIFAR, 826),
        (f"{EVERPEACE}/cifar10/cifar10_quick", f"{EVERPEACE}/cifar10/cifar10_quick_iter_5000", CIFAR, 744),
        (
            f"{EVERPEACE}/cifar10/cifar10_full_train_test",
            f"{EVERPEACE}/cifar10/cifar10_full_iter_70000",
            CIFAR,
            826,
        ),
        ("resnet20_cifar10/res20_deploy_DERIVED", "resnet20_cifar10/ResNet_20", CIFAR, 914),
    ],
)
def test_known_accuracies(
    model: str, weights: str, images: tuple[str, ...], hits: int, capsys: Capture
) -> None:
    files = (str(MODELS / f"{model}.prototxt"), str(MODELS / f"{weights}.caffemodel"))
    assert ok(capsys, *files, *images, "--batch", "100")["top1"]["hits"] == hits


@needs_shared
def test_squeezenet_on_a_tenth_of_imagenet500(capsys: Capture) -> None:
    """OpenCV's dnn has 26 of these 50 right, 40 among the first five; all 500: 318 and 423, as this program."""
    files = (
        str(MODELS / SONGHAN / "SqueezeNet_deploy.prototxt"),
        str(MODELS / SONGHAN / "decompressed_SqueezeNet.caffemodel"),
    )
    found = ok(capsys, *files, *IMAGENET, "--n-images", "50", "--batch", "10")
    assert (found["top1"]["hits"], found["top5"]["hits"]) == (26, 40)
