"""The deploy form of a train_val: what goes, what stays byte for byte, and the published pairs."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import nets
import numpy as np
import pytest

from caffe_proto import net, weights
from caffe_proto.deploy import Deployed, deploy
from caffe_proto.diff import diff
from caffe_proto.errors import Error, NetError, ShapeError, UsageError
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.runtime import session
from caffe_proto.shape_inference import infer
from lra.cli import main

PUBLISHED = nets.SHARED / "published"
MODELS = nets.SHARED / "data" / "models"

TRAIN_VAL = """\
name: "tv"  # a comment
layer {
  name: "data"
  type: "Data"
  top: "data"
  top: "label"
  include { phase: TRAIN }
  transform_param { mirror: true crop_size: 9 }
  data_param { source: "train" batch_size: 64 }
}
layer {
  name: "data"
  type: "Data"
  top: "data"
  top: "label"
  include { phase: TEST }
  transform_param { crop_size: 9 }
  data_param { source: "test" batch_size: 50 }
}
layer {
  name: "conv1"  # stays
  type: "Convolution"
  bottom: "data"
  top: "conv1"
  param { lr_mult: 1 }
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } }
  include { phase: TRAIN }
  include { phase: TEST }
}
layer { name: "noise" type: "Dropout" bottom: "conv1" top: "conv1" include { phase: TRAIN } }
layer { name: "aux" type: "InnerProduct" bottom: "conv1" top: "aux" inner_product_param { num_output: 5 } }
layer { name: "aux_loss" type: "SoftmaxWithLoss" bottom: "aux" bottom: "label" top: "aux_loss" loss_weight: 0.3 }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "relu1" }
layer { name: "ip" type: "InnerProduct" bottom: "relu1" top: "ip" inner_product_param { num_output: 5 } }
layer { name: "hush" type: "Silence" bottom: "relu1" }
layer {
  name: "accuracy"
  type: "Accuracy"
  bottom: "ip"
  bottom: "label"
  top: "accuracy"
  include { phase: TEST }
}
layer {
  name: "loss"
  type: "SoftmaxWithLoss"
  bottom: "ip"
  bottom: "label"
  top: "loss"
  propagate_down: true
  propagate_down: false
  loss_param { ignore_label: 3 }
  softmax_param { axis: 1 }
}
"""
DEPLOY = """\
name: "tv"  # a comment
layer {
  name: "data"
  type: "Input"
  top: "data"
  input_param { shape { dim: 1 dim: 3 dim: 9 dim: 9 } }
}
layer {
  name: "conv1"  # stays
  type: "Convolution"
  bottom: "data"
  top: "conv1"
  param { lr_mult: 1 }
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } }
}
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "relu1" }
layer { name: "ip" type: "InnerProduct" bottom: "relu1" top: "ip" inner_product_param { num_output: 5 } }
layer {
  name: "prob"
  type: "Softmax"
  bottom: "ip"
  top: "prob"
  softmax_param { axis: 1 }
}
"""
V1 = """\
name: "v1"
layers {
  name: "mnist"
  type: DUMMY_DATA
  top: "data"
  top: "label"
  dummy_data_param { num: 8 num: 8 channels: 2 channels: 1 height: 5 height: 1 width: 6 width: 1 }
}
layers { name: "ip" type: INNER_PRODUCT bottom: "data" top: "ip" blobs_lr: 1 inner_product_param { num_output: 3 } }
layers { name: "loss" type: SIGMOID_CROSS_ENTROPY_LOSS bottom: "ip" bottom: "label" }
"""
V1_DEPLOY = """\
name: "v1"
input: "data"
input_dim: 1
input_dim: 2
input_dim: 5
input_dim: 6
layers { name: "ip" type: INNER_PRODUCT bottom: "data" top: "ip" blobs_lr: 1 inner_product_param { num_output: 3 } }
layers { name: "prob" type: SIGMOID bottom: "ip" top: "prob" }
"""


def deployed(source: str, **options: object) -> Deployed:
    """The deploy form of a prototxt's text."""
    return deploy(net.parse(source), **options)  # type: ignore[arg-type]


def scores(judge: str, before: str = "") -> str:
    """A net of one fully connected layer with what stands behind it."""
    data = nets.inputs(data=(2, 4), label=(2,)) + before
    return f'{data}layer {{ name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param {{ num_output: 3 }} }}\n{judge}'


def layer(name: str, kind: str, bottoms: str, tops: str = "", more: str = "") -> str:
    """One layer in a line."""
    named = [f'bottom: "{one}"' for one in bottoms.split()] + [f'top: "{one}"' for one in tops.split()]
    return f'layer {{ name: "{name}" type: "{kind}" {" ".join(named)} {more} }}\n'


def names(made: Deployed) -> list[str]:
    """The layers of a deploy net."""
    return [one.name for one in made.net.all_layers]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_v2(newline: str) -> None:
    made = deployed(TRAIN_VAL.replace("\n", newline))
    assert made.net.text == DEPLOY.replace("\n", newline)
    assert made.inputs == {"data": (1, 3, 9, 9)}
    assert made.outputs == ("prob",)
    assert made.dropped == ("noise", "aux", "aux_loss", "hush", "accuracy")


def test_v1() -> None:
    made = deployed(V1)
    assert made.net.text == V1_DEPLOY
    assert (made.inputs, made.outputs) == ({"data": (1, 2, 5, 6)}, ("prob",))


def test_batch_and_shape() -> None:
    assert deployed(TRAIN_VAL, batch=10).inputs == {"data": (10, 3, 9, 9)}
    assert deployed(TRAIN_VAL, input_shapes={"data": (2, 1, 7, 7)}).inputs == {"data": (2, 1, 7, 7)}
    made = deployed(V1, input_shapes={"data": (1, 60)})
    assert "input_shape: { dim: 1 dim: 60 }" in made.net.text
    assert "input_dim" not in made.net.text


def test_auxiliary_classifiers_on_request() -> None:
    made = deployed(TRAIN_VAL, auxiliary=True)
    assert made.outputs == ("prob", "prob_2")
    assert "aux" in names(made)


def test_size_unknown_is_one_clear_error() -> None:
    source = TRAIN_VAL.replace("crop_size: 9", "")
    with pytest.raises(ShapeError, match=r'line 11: layer "data": .*--input-shape data=1,3,227,227'):
        deployed(source)
    assert deployed(source, input_shapes={"data": (1, 3, 9, 9)}).net.text == DEPLOY
    with pytest.raises(UsageError, match='"date" is no input of the net; did you mean "data"'):
        deployed(source, input_shapes={"date": (1, 3, 9, 9)})


def test_input_layers_stay_as_they_are() -> None:
    text = deployed(scores(layer("loss", "SoftmaxWithLoss", "ip label", "loss"))).net.text
    assert text.startswith(nets.inputs(data=(2, 4)))
    assert "label" not in text
    again = deployed(text)
    assert again.net.text == text
    assert deployed(text, batch=7).inputs == {"data": (7, 4)}


def test_legacy_inputs_lose_the_label() -> None:
    body = scores(layer("loss", "SoftmaxWithLoss", "ip label", "loss")).split("\n", 2)[2]
    dims = "input_shape { dim: 2 dim: 4 }\ninput_shape { dim: 2 }\n"
    made = deployed(f'input: "data"\ninput: "label"\n{dims}{body}')
    assert made.net.text.startswith('input: "data"\ninput_shape: { dim: 2 dim: 4 }\nlayer')
    assert made.inputs == {"data": (2, 4)}
    square = dims.replace("dim: 4", "dim: 2 dim: 2 dim: 1")
    made = deployed(f'input: "data"\ninput: "label"\n{square}{body}')
    assert made.net.text.startswith('input: "data"\ninput_shape: { dim: 2 dim: 2 dim: 2 dim: 1 }\nlayer')


@pytest.mark.parametrize(
    ("judges", "wanted", "outputs"),
    [
        (layer("loss", "EuclideanLoss", "ip label", "loss"), ["data", "ip"], ("ip",)),
        (layer("loss", "HingeLoss", "ip label", "loss"), ["data", "ip"], ("ip",)),
        (layer("loss", "TripletLoss", "ip label", "loss"), ["data", "ip"], ("ip",)),
        (layer("loss", "Python", "ip label", "loss", "loss_weight: 1"), ["data", "ip"], ("ip",)),
        (layer("seen", "Python", "ip label", "seen") + layer("acc", "Accuracy", "ip label", "acc"), None, ()),
        (layer("p", "Softmax", "ip", "p") + layer("acc", "Accuracy", "p label", "acc"), None, ()),
        (
            layer("p", "Softmax", "ip", "p")
            + layer("acc", "Accuracy", "p label", "acc")
            + layer("loss", "SoftmaxWithLoss", "ip label", "loss"),
            ["data", "ip", "p"],
            ("p",),
        ),
        (
            layer("one", "SoftmaxWithLoss", "ip label", "one")
            + layer("two", "SoftmaxWithLoss", "ip label", "two"),
            ["data", "ip", "prob"],
            ("prob",),
        ),
        (
            layer("p", "Softmax", "ip", "p") + layer("loss", "SoftmaxWithLoss", "ip label", "loss"),
            ["data", "ip", "p"],
            ("p",),
        ),
        (
            layer("loss", "SoftmaxWithLoss", "ip label", "loss", "include { phase: TRAIN }")
            + layer("acc", "Accuracy", "ip label", "acc"),
            ["data", "ip", "prob"],
            ("prob",),
        ),
        (
            layer("prob", "ReLU", "ip", "prob") + layer("loss", "SoftmaxWithLoss", "prob label", "loss"),
            ["data", "ip", "prob", "prob_2"],
            ("prob_2",),
        ),
    ],
)
def test_what_judges_decides_what_stays(
    judges: str, wanted: list[str] | None, outputs: tuple[str, ...]
) -> None:
    if wanted is None:
        with pytest.raises(NetError, match="no loss and no output"):
            deployed(scores(judges))
        return
    made = deployed(scores(judges))
    assert (names(made), made.outputs) == (wanted, outputs)


def test_values_behind_a_view_survive() -> None:
    before = layer("flat", "Flatten", "data", "flat") + layer("relu", "ReLU", "flat", "flat")
    judge = layer("ip2", "InnerProduct", "data", "ip2", "inner_product_param { num_output: 3 }")
    judge += layer("sum", "Eltwise", "ip ip2", "sum") + layer("loss", "SoftmaxWithLoss", "sum label", "loss")
    made = deployed(scores(judge, before), batch=7)
    assert names(made) == ["data", "flat", "relu", "ip", "ip2", "sum", "prob"]
    assert infer(build(made.net)).by_blob()["data"] == made.inputs["data"] == (7, 4)


def test_v0_comes_out_as_v2() -> None:
    data = 'layers { layer { name: "data" type: "data" batchsize: 5 cropsize: 6 } top: "data" top: "label" }'
    dense = 'layers { layer { name: "ip" type: "innerproduct" num_output: 3 } bottom: "data" top: "ip" }'
    loss = 'layers { layer { name: "loss" type: "softmax_loss" } bottom: "ip" bottom: "label" }'
    made = deployed("\n".join((data, dense, loss)))
    assert (made.net.dialect, made.inputs, made.outputs) == ("V2", {"data": (1, 3, 6, 6)}, ("prob",))
    assert names(made) == ["data", "ip", "prob"]


def test_weights_load_and_outputs_agree(tmp_path: Path) -> None:
    before = nets.model(TRAIN_VAL.replace("batch_size: 50", "batch_size: 2"))
    after = Model(deploy(before.net, batch=2).net, before.weights)
    image = np.random.default_rng(0).standard_normal((2, 3, 9, 9), np.float32)
    with session(before, blobs="all", threads=1) as opened:
        wanted = opened.run({"data": image, "label": np.zeros(2, np.float32)})
    with session(after, blobs="all", threads=1) as opened:
        found = opened.run({"data": image})
    for name in ("conv1", "relu1", "ip"):
        np.testing.assert_array_equal(found[name], wanted[name])
    exponent = np.exp(wanted["ip"] - wanted["ip"].max(1, keepdims=True))
    np.testing.assert_allclose(found["prob"], exponent / exponent.sum(1, keepdims=True), rtol=1e-5)


WEN, TAI = PUBLISHED / "wen", PUBLISHED / "tai" / "imagenet"
NO_PROB = {"prob": ("only a", "Softmax")}  # the authors' deploy nets end at the scores
PAIRS: list[tuple[Path, Path, dict[str, tuple[str, str]]]] = [
    *(
        (WEN / f"models/{name}/train_val.prototxt", WEN / f"models/{name}/deploy.prototxt", {})
        for name in ("bvlc_alexnet", "bvlc_reference_caffenet", "bvlc_googlenet", "finetune_flickr_style")
    ),
    (
        WEN / "models/bvlc_alexnet/train_val_split.prototxt",
        WEN / "models/bvlc_alexnet/deploy_split.prototxt",
        {},
    ),
    *(
        (
            TAI / f"models_{kind}/{name}_trainval.prototxt",
            TAI / f"models_{kind}/{name}_deploy.prototxt",
            NO_PROB,
        )
        for kind, name in (
            ("vgg", "vgg"),
            ("vgg", "vgg_lowrank"),
            ("caffenet", "caffenet"),
            ("caffenet", "caffenet_lowrank"),
        )
    ),
    (WEN / "examples/mnist/lenet_train_test.prototxt", WEN / "examples/mnist/lenet.prototxt", {}),
    *(
        (
            WEN / f"examples/cifar10/{name}_train_test{end}.prototxt",
            WEN / f"examples/cifar10/{name}{end}.prototxt",
            {},
        )
        for name, end in (("cifar10_full", ""), ("cifar10_quick", ""), ("cifar10_resnet", "_n3"))
    ),
    *(
        (
            MODELS / f"cifar10_h5_jwcom79/{name}_train_test.prototxt",
            MODELS / f"cifar10_h5_jwcom79/{name}.prototxt",
            {},
        )
        for name in ("cifar10_full", "cifar10_quick")
    ),
    (
        MODELS / "cifar_v2_yuvval/cifar10_full_train_test.prototxt",
        MODELS / "cifar_v2_yuvval/cifar10_full.prototxt",
        {},
    ),
    (
        MODELS / "cifar_v2_yuvval/cifar100_quick_train_test.prototxt",  # trained on the 20 coarse labels
        MODELS / "cifar_v2_yuvval/cifar100_quick.prototxt",
        {"ip2": ("changed", "num_output: 20 -> 100")},
    ),
    (
        MODELS / "cifar10_h5_jwcom79/lenet_ip5_train_test.prototxt",
        MODELS / "cifar10_h5_jwcom79/lenet_deploy.prototxt",
        {"ip1": ("changed", "num_output: 5 -> 500")},
    ),
    *(
        (
            MODELS / f"caffe_v1_everpeace/{name}_train_test.prototxt",
            MODELS / f"caffe_v1_everpeace/{name}.prototxt",
            {},
        )
        for name in ("mnist/lenet", "cifar10/cifar10_full", "cifar10/cifar10_quick")
    ),
    (
        MODELS / "squeezenet_v1.0_deepcompression_songhan/SqueezeNet_trainval.prototxt",
        MODELS / "squeezenet_v1.0_deepcompression_songhan/SqueezeNet_deploy.prototxt",
        NO_PROB,
    ),
]


@nets.needs_shared
@pytest.mark.parametrize(
    ("training", "published", "by_hand"), PAIRS, ids=lambda path: getattr(path, "stem", "")
)
def test_published_pairs_agree_but_for_hand_edits(
    training: Path, published: Path, by_hand: dict[str, tuple[str, str]]
) -> None:
    """Structure as the authors' own deploy net; ``by_hand``: where theirs was edited otherwise."""
    wanted = net.load(published)
    size = infer(build(wanted)).by_blob()["data"]
    made = deploy(net.load(training), {"data": size})
    found = diff(Model(made.net), Model(wanted))
    differing = (row for row in found.rows if row.status not in ("same", "training"))
    edits = {
        row.name: (row.status, row.summary() if row.fields else (row.a or row.b)[0].type) for row in differing
    }
    assert edits == by_hand
    assert made.inputs == {"data": size}


@nets.needs_shared
@pytest.mark.parametrize(
    ("training", "_published", "_by_hand"), PAIRS, ids=lambda path: getattr(path, "stem", "")
)
def test_published_text_stays(training: Path, _published: Path, _by_hand: object) -> None:
    """Lines are only taken away, but for the input and what becomes of the loss."""
    source = net.load(training)
    try:
        made = deploy(source)
    except ShapeError:
        made = deploy(source, {"data": (1, 3, 32, 32)})
    lines = difflib.ndiff(source.text.splitlines(), made.net.text.splitlines())
    added = {line[2:].strip() for line in lines if line.startswith("+ ")}
    allowed = (
        'type: "Input"',
        "input",
        'name: "prob"',
        'top: "prob"',
        'type: "Softmax"',
        "type: SOFTMAX",
        'bottom: "pool5"',
    )
    assert [line for line in added if not line.startswith(allowed)] == []


@nets.needs_shared
def test_published_weights_run_in_the_deploy_form() -> None:
    """cifar10_full with its trained weights: the same scores as the train_test."""
    folder = MODELS / "cifar_v2_yuvval"
    loaded = weights.load(folder / "cifar10_full_iter_70000.caffemodel")
    source = net.load(folder / "cifar10_full_train_test.prototxt")
    shapes = {"data": (2, 3, 32, 32), "label": (2,)}
    made = deploy(source, {"data": shapes["data"]})
    image = np.random.default_rng(1).standard_normal(shapes["data"], np.float32)
    with session(Model(source, loaded), blobs=["ip1"], threads=1, input_shapes=shapes) as opened:
        wanted = opened.run({"data": image, "label": np.zeros(2, np.float32)})
    with session(Model(made.net, loaded), blobs=["ip1", "prob"], threads=1) as opened:
        found = opened.run({"data": image})
    np.testing.assert_array_equal(found["ip1"], wanted["ip1"])
    np.testing.assert_allclose(found["prob"].sum(1), 1, rtol=1e-5)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training, out = tmp_path / "train_val.prototxt", tmp_path / "deploy.prototxt"
    training.write_text(TRAIN_VAL)
    assert main(["deploy", str(training), "-o", str(out)]) == 0
    assert out.read_text() == DEPLOY
    assert capsys.readouterr().out.splitlines() == [
        "input   data: 1 x 3 x 9 x 9",
        "output  prob",
        "dropped noise, aux, aux_loss, hush, accuracy",
        f"wrote {out}",
    ]
    assert main(["deploy", str(training), "-o", str(out), "--batch", "4", "--auxiliary", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["inputs"] == {"data": [4, 3, 9, 9]}
    assert document["outputs"] == ["prob", "prob_2"]


def test_command_refuses_in_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, out = tmp_path / "train_val.prototxt", tmp_path / "deploy.prototxt"
    training.write_text(TRAIN_VAL.replace("crop_size: 9", ""))
    assert main(["deploy", str(training), "-o", str(out)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not out.exists()
    assert main(["deploy", str(training), "-o", str(training), "--input-shape", "data=1,3,9,9"]) == 2
    assert training.read_text() != DEPLOY


def test_bad_loss_weight_is_an_error_of_ours() -> None:
    with pytest.raises(Error, match="loss_weight"):
        deployed(scores(layer("loss", "SoftmaxWithLoss", "ip label", "loss", "loss_weight: x")))
