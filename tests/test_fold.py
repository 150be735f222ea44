"""BatchNorm, Scale and Bias folded: the same outputs from fewer layers, and a reason for whatever stays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import pytest

import caffe_proto as cp
from caffe_proto.fold import fold_batchnorm
from caffe_proto.model import Model
from caffe_proto.net import NetState, parse
from caffe_proto.runtime import error
from caffe_proto.weights import NewEntry, Weights

MODELS = Path(__file__).resolve().parents[1] / "models"
PUBLISHED = {
    "resnet20_cifar10/res20_deploy_DERIVED.prototxt": "ResNet_20.caffemodel",
    "retinaface_mnet_caffe/mnet.prototxt": "mnet.caffemodel",
}
FOLDABLE = ("BatchNorm", "Scale", "Bias")
WITH_NORM = sorted(
    path.parent.name for path in MODELS.glob("*/deploy.prototxt") if "BatchNorm" in path.read_text()
)


def layer(name: str, kind: str, bottom: str, top: str, more: str = "") -> str:
    return f'layer {{ name: "{name}" type: "{kind}" bottom: "{bottom}" top: "{top}" {more} }}\n'


def conv(
    name: str, bottom: str, top: str, settings: str = "num_output: 6 kernel_size: 3", more: str = ""
) -> str:
    return layer(name, "Convolution", bottom, top, f"{more} convolution_param {{ {settings} }}")


def dense(bottom: str, top: str, settings: str) -> str:
    return layer("l", "InnerProduct", bottom, top, f"inner_product_param {{ num_output: 6 {settings} }}")


def norms(bottom: str, top: str, first: str = "y") -> str:
    """BatchNorm from ``bottom`` to ``first``, Scale to ``top``, both in place where the names are one."""
    return layer("bn", "BatchNorm", bottom, first) + layer(
        "scale", "Scale", first, top, "scale_param { bias_term: true }"
    )


DATA = nets.inputs(data=(2, 4, 7, 8))
RELU = layer("relu", "ReLU", "y", "y")
HOSTS = {
    "plain": conv("l", "data", "y"),
    "no bias": conv("l", "data", "y", "num_output: 6 kernel_size: 3 bias_term: false"),
    "groups": conv("l", "data", "y", "num_output: 6 kernel_size: 3 group: 2 pad: 1"),
    "depthwise": conv("l", "data", "y", "num_output: 8 kernel_size: 3 group: 4 bias_term: false"),
    "deconvolution": layer(
        "l", "Deconvolution", "data", "y", "convolution_param { num_output: 6 kernel_size: 3 stride: 2 }"
    ),
    "grouped deconvolution": layer(
        "l",
        "Deconvolution",
        "data",
        "y",
        "convolution_param { num_output: 6 group: 2 kernel_size: 4 bias_term: false }",
    ),
    "depthwise fork": layer(
        "l",
        "ConvolutionDepthwise",
        "data",
        "y",
        "convolution_param { num_output: 4 kernel_size: 3 bias_term: false }",
    ),
    "dense": dense("data", "y", ""),
    "dense, transposed": dense("data", "y", "transpose: true bias_term: false"),
}


def learnt(source: str, seed: int = 0, shapes: dict[str, tuple[int, ...]] | None = None) -> Model:
    """A net with random weights, its statistics those of a net: variances above 0, a moving average behind them."""
    parsed = parse(source)
    rng = np.random.default_rng(seed + 1)
    kinds = {one.name: one.type for one in parsed.layers}
    made = nets.random_weights(parsed, seed, shapes)
    entries = []
    for name, blobs in made.items():
        if kinds[name] == "BatchNorm":
            n = len(blobs[0])
            found = [rng.standard_normal(n), rng.uniform(0.5, 2, n) * 2.5, np.array([2.5])]
        elif kinds[name] == "Scale":
            found = [rng.uniform(0.5, 1.5, blobs[0].shape), *blobs[1:]]
        else:
            found = list(blobs)
        entries.append(
            NewEntry(name, tuple(np.asarray(one, np.float32) for one in found), dialect=made.dialect)
        )
    return Model(parsed, Weights(entries, dialect=made.dialect))


def types(model: Model) -> list[str]:
    return [one.type for one in model.net.layers]


def check(model: Model, folder: Path) -> tuple[Model, dict[str, str]]:
    """Fold, write, read: the same outputs by the same names, and nearly the same in every blob that is left."""
    folded, why = fold_batchnorm(model)
    cp.save(folded, folder / "folded.prototxt", folder / "folded.caffemodel")
    written = cp.load(folder / "folded.prototxt", folder / "folded.caffemodel")
    feeds = nets.random_feeds(model, 3)
    outputs = list(nets.forward(written, feeds))
    assert outputs == list(nets.forward(model, feeds))
    before, after = every_blob(model, feeds), every_blob(written, feeds)
    for name, made in after.items():
        assert error(made, before[name]) < (1e-5 if name in outputs else 3e-5), name
    assert all(np.isfinite(before[name]).all() and before[name].std() > 0 for name in outputs)
    return written, why


def every_blob(model: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with cp.session(model, blobs="all", threads=1) as opened:
        return opened.run(feeds)


# ------------------------------------------------------------------------------- every net there is


@pytest.mark.parametrize("folder", WITH_NORM)
def test_the_nets_of_this_repository(folder: str, tmp_path: Path) -> None:
    source = (MODELS / folder / "deploy.prototxt").read_text()
    model = learnt(source)
    folded, why = check(model, tmp_path)
    left = [one.name for one in folded.net.layers if one.type in FOLDABLE]
    assert left == list(why)
    all_stay = folder == "densenet_40"  # there they stand in front of the convolutions
    assert len(left) == (sum(kind in FOLDABLE for kind in types(model)) if all_stay else 0)


@nets.needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_nets_with_their_weights(name: str, tmp_path: Path) -> None:
    path = nets.SHARED / "data" / "models" / name
    model = cp.load(path, path.parent / PUBLISHED[name])
    folded, why = check(model, tmp_path)
    assert why == {} and not set(types(folded)) & set(FOLDABLE)


@nets.needs_shared
def test_a_published_net_with_data_layers() -> None:
    folder = nets.SHARED / "data" / "models" / "resnet20_cifar10"
    model = cp.load(folder / "res20_cifar_train_test.prototxt", folder / "ResNet_20.caffemodel")
    shapes = {"Data1": (2, 3, 32, 32), "Data2": (2,)}
    folded, why = fold_batchnorm(model, shapes)
    assert why == {} and not set(types(folded)) & set(FOLDABLE)
    rng = np.random.default_rng(0)
    feeds = {"Data1": rng.standard_normal((2, 3, 32, 32), np.float32), "Data2": np.float32([1, 2])}
    made = []
    for one in (model, folded):
        with cp.session(one, blobs=["InnerProduct1"], threads=1, input_shapes=shapes) as opened:
            made.append(opened.run({name: feeds[name] for name in opened.input_names}))
    assert nets.apart(*made) < 1e-5


# ------------------------------------------------------------------------------- the layers folded into


@pytest.mark.parametrize("apart", [False, True], ids=["in place", "blobs apart"])
@pytest.mark.parametrize("host", HOSTS)
def test_hosts(host: str, apart: bool, tmp_path: Path) -> None:
    first = HOSTS[host].replace('top: "y"', 'top: "raw"') if apart else HOSTS[host]
    rest = norms("raw", "y", "normed") if apart else norms("y", "y")
    folded, why = check(learnt(DATA + first + rest + RELU), tmp_path)
    assert why == {}
    assert [(one.name, one.tops) for one in folded.net.layers] == [
        ("data", ("data",)),
        ("l", ("y",)),
        ("relu", ("y",)),
    ]
    weights = folded.weights
    assert weights is not None and list(weights) == ["l"] and len(weights["l"]) == 2


def test_the_numbers_by_hand() -> None:
    """w = 2, b = 1; mean 3/2, variance 8/2 by the factor 2, eps 12: scale 1/4; then 8 x + 5, and - 1."""
    source = nets.inputs(data=(1, 1, 1, 1)) + (
        conv("l", "data", "y", "num_output: 1 kernel_size: 1")
        + layer("bn", "BatchNorm", "y", "y", "batch_norm_param { eps: 12 }")
        + layer("scale", "Scale", "y", "y", "scale_param { bias_term: true }")
        + layer("bias", "Bias", "y", "y")
    )
    blobs = {"l": ([[[[2]]]], [1]), "bn": ([3], [8], [2]), "scale": ([8], [5]), "bias": ([-1],)}
    entries = [
        NewEntry(name, tuple(np.array(one, np.float32) for one in arrays)) for name, arrays in blobs.items()
    ]
    folded, why = fold_batchnorm(Model(parse(source), Weights(entries)))
    assert why == {} and folded.weights is not None
    weight, bias = folded.weights["l"]
    assert (weight.item(), bias.item()) == (4.0, (1 - 1.5) / 4 * 8 + 5 - 1)


def test_statistics_never_gathered_are_zeros(tmp_path: Path) -> None:
    """A factor of 0 makes mean and variance 0, as Caffe has it."""
    model = learnt(DATA + HOSTS["plain"] + norms("y", "y"))
    assert model.weights is not None
    mean, var, _ = model.weights["bn"]
    changed = model.weights.replace({"bn": [NewEntry("bn", (mean, var, np.zeros(1, np.float32)))]})
    _, why = check(replace(model, weights=changed), tmp_path)
    assert why == {}


@pytest.mark.parametrize("kind", ["BN of SegNet", "Bias"])
def test_other_layers_that_fold(kind: str, tmp_path: Path) -> None:
    last = {
        "BN of SegNet": layer("last", "BN", "y", "z", "bn_param { bn_mode: INFERENCE }"),
        "Bias": layer("last", "Bias", "y", "z"),
    }[kind]
    folded, why = check(learnt(DATA + HOSTS["groups"] + last), tmp_path)
    assert why == {} and types(folded) == ["Input", "Convolution"]


def test_v1_nets(tmp_path: Path) -> None:
    source = (
        'input: "data" input_dim: 2 input_dim: 4 input_dim: 7 input_dim: 8\n'
        'layers { name: "l" type: CONVOLUTION bottom: "data" top: "raw" blobs_lr: 1\n'
        "  convolution_param { num_output: 6 kernel_size: 3 bias_term: false } }\n"
        'layers { name: "last" type: BN bottom: "raw" top: "y" bn_param { bn_mode: INFERENCE } }\n'
        'layers { name: "ip" type: INNER_PRODUCT bottom: "y" top: "ip" inner_product_param { num_output: 3 } }\n'
    )
    folded, why = check(learnt(source), tmp_path)
    assert why == {} and types(folded) == ["Convolution", "InnerProduct"] and folded.net.dialect == "V1"


V0 = """\
input: "data" input_dim: 2 input_dim: 4 input_dim: 7 input_dim: 8
layers { layer { name: "conv" type: "conv" num_output: 6 kernelsize: 3 } bottom: "data" top: "conv" }
"""


def test_v0_nets_have_nothing_to_fold() -> None:
    model = Model(parse(V0))
    assert fold_batchnorm(model) == (model, {})


# ------------------------------------------------------------------------------- what stays, and why

READ_TWICE = DATA + conv("l", "data", "raw") + norms("raw", "y", "y") + layer("also", "ReLU", "raw", "other")
HALF = DATA + conv("l", "data", "y") + norms("y", "z", "n") + layer("also", "ReLU", "n", "other")
SHARED = nets.inputs(data=(2, 4, 7, 8), more=(2, 4, 9, 9)) + (
    conv("l", "data", "y", more='param { name: "w" }')
    + norms("y", "y")
    + conv("twin", "more", "z", more='param { name: "w" }')
)
SHARING = 'layer {{ name: "{}" type: "Scale" bottom: "{}" top: "{}" param {{ name: "f" }} }}\n'
STAYS = {
    "several consumers": (READ_TWICE, {"bn": 'not the only one to read "l": "bn", "also"', "scale": '"bn".*not folded'}),
    "shared weights": (SHARED, {"bn": '"l" shares its blob "w" with "twin"', "scale": "not folded"}),
    "shared factors": (
        DATA + nets.inputs(more=(2, 6, 9, 9)) + conv("l", "data", "y") + SHARING.format("scale", "y", "z")
        + SHARING.format("twin", "more", "m"),
        {"scale": '"scale" shares its blob "f" with "twin"', "twin": r'follows "more" \(Input\)'},
    ),
    "the batch's own statistics": (
        DATA + HOSTS["plain"] + layer("bn", "BatchNorm", "y", "z", "batch_norm_param { use_global_stats: false }"),
        {"bn": "statistics of each batch"},
    ),
    "in front of a convolution": (
        DATA + layer("bn", "BatchNorm", "data", "n") + conv("l", "n", "y"),
        {"bn": r'follows "data" \(Input\)'},
    ),
    "behind a pooling": (
        DATA + HOSTS["plain"] + layer("pool", "Pooling", "y", "p", "pooling_param { kernel_size: 2 }") + norms("p", "p", "p"),
        {"bn": r'follows "pool" \(Pooling\)', "scale": "not folded"},
    ),
    "two bottoms": (
        DATA + HOSTS["plain"] + nets.inputs(factor=(2, 6)) + layer("scale", "Scale", "y", "z", 'bottom: "factor" scale_param { axis: 0 }'),
        {"scale": "reads 2 blobs"},
    ),
    "another axis": (
        DATA + HOSTS["plain"] + layer("scale", "Scale", "y", "z", "scale_param { axis: 2 }"),
        {"scale": "no fixed scale and shift"},
    ),
    "outputs along another axis": (
        DATA + dense("data", "y", "axis: 2") + layer("bn", "BatchNorm", "y", "z"),
        {"bn": "lie along axis 2"},
    ),
    "two tops": (
        nets.inputs(data=(1, 4, 7, 8), more=(1, 4, 7, 8)) + conv("l", "data", "y", more='bottom: "more" top: "z"') + layer("bn", "BatchNorm", "y", "n"),
        {"bn": "writes 2 blobs with the same weights"},
    ),
    "two layers of one name": (
        DATA + conv("l", "data", "y") + layer("bn", "BatchNorm", "y", "z")
        + conv("l2", "data", "y2") + layer("bn", "BatchNorm", "y2", "z2"),
        {"bn": 'holds several layers "bn"'},
    ),
    "another layer's weights under a mask": (
        DATA + layer("l", "CConvolution", "data", "y", "cconvolution_param { bias_mask_filler { } } convolution_param { num_output: 6 kernel_size: 3 }") + layer("bn", "BatchNorm", "y", "n"),
        {"bn": r'follows "l" \(CConvolution\)'},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_and_why(name: str) -> None:
    source, wanted = STAYS[name]
    model = learnt(source)
    folded, why = fold_batchnorm(model)
    assert folded is model
    assert list(why) == list(wanted)
    for one, pattern in wanted.items():
        assert re.search(pattern, why[one]), why[one]


def test_what_can_be_folded_of_a_row_is(tmp_path: Path) -> None:
    """Two layers read what BatchNorm makes: it folds, the Scale behind it does not."""
    folded, why = check(learnt(HALF), tmp_path)
    assert [one.name for one in folded.net.layers] == ["data", "l", "scale", "also"]
    assert folded.net.layer("l").tops == ("n",)
    assert why == {"scale": 'it is not the only one to read "bn": "scale", "also"'}


def test_values_that_are_not_finite_stay() -> None:
    model = learnt(DATA + HOSTS["plain"] + layer("bn", "BatchNorm", "y", "y"))
    assert model.weights is not None
    mean, var, count = model.weights["bn"]
    changed = model.weights.replace({"bn": [NewEntry("bn", (mean, -var, count))]})
    with np.errstate(invalid="ignore"):
        _, why = fold_batchnorm(replace(model, weights=changed))
    assert why == {"bn": "its scale or shift is not finite"}


# ------------------------------------------------------------------------------- phases

IN = "include {{ phase: {} }}"
TRAIN_ONLY = layer("noise", "Dropout", "y", "y", IN.format("TRAIN"))


def phased(name: str, top: str, phase: str, stats: str) -> str:
    return layer(
        name, "BatchNorm", "raw", top, f"batch_norm_param {{ use_global_stats: {stats} }} {IN.format(phase)}"
    )


def test_a_layer_that_stands_once_for_each_phase_goes_from_both(tmp_path: Path) -> None:
    twice = phased("bn", "y", "TRAIN", "false") + phased("bn", "y", "TEST", "true")
    model = learnt(DATA + conv("l", "data", "raw") + twice + RELU + TRAIN_ONLY)
    folded, why = check(model, tmp_path)
    assert why == {}
    assert [one.name for one in folded.net.all_layers] == ["data", "l", "relu", "noise"]
    (train,) = (replace(folded.net, state=NetState("TRAIN")),)
    assert cp.shapes(Model(train))["y"] == (2, 6, 5, 6)


@pytest.mark.parametrize(
    "other",
    [
        phased("train_bn", "y", "TRAIN", "false"),
        phased("bn", "elsewhere", "TRAIN", "false"),
        "",
        phased("bn", "y", "TRAIN", "false") + layer("spy", "ReLU", "raw", "seen", IN.format("TRAIN")),
    ],
    ids=["another name", "another top", "none", "another reader"],
)
def test_a_net_that_differs_in_the_other_phase_stays(other: str) -> None:
    model = learnt(DATA + conv("l", "data", "raw") + other + phased("bn", "y", "TEST", "true"))
    folded, why = fold_batchnorm(model)
    assert folded is model
    assert why == {"bn": 'in phase TRAIN the net is another one behind "l"'}


def test_stages_count_too() -> None:
    staged = layer("spy", "ReLU", "y", "seen", 'include { stage: "look" }')
    model = learnt(DATA + HOSTS["plain"] + staged + layer("bn", "BatchNorm", "y", "z"))
    assert fold_batchnorm(model)[1] == {"bn": 'in phase TEST, stage look the net is another one behind "l"'}


def test_training_uses_the_statistics_of_the_batch() -> None:
    model = learnt(DATA + HOSTS["plain"] + norms("y", "y"))
    train = model.in_state(NetState("TRAIN"))
    assert fold_batchnorm(train)[1]["bn"].startswith("it uses the statistics of each batch")


# ------------------------------------------------------------------------------- what is written

WRITTEN = """\
name: "written"  # by hand
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 6 dim: 6 } } }

layer {
  name: 'l'  # kept
  type: "Convolution"
  bottom: "data"
  top: "raw"
  param { lr_mult: 1 }
  convolution_param {
    num_output: 4
    kernel_size: 3
    bias_term: false
    frob: 1
  }
}
layer { name: "bn" type: "BatchNorm" bottom: "raw" top: "y" }  # goes
layer {
  name: "scale"
  type: "Scale" bottom: "y" top: "y"
  scale_param { bias_term: true }
}
layer { name: "relu" type: "ReLU" bottom: "y" top: "y" } layer { name: "out" type: "InnerProduct" bottom: "y" top: "out" inner_product_param { num_output: 2 } }
""".replace("    frob: 1\n", "")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_is_outside_stays_byte_for_byte(newline: str, tmp_path: Path) -> None:
    source = WRITTEN.replace("\n", newline)
    model = learnt(source)
    assert model.weights is not None
    cp.save(model, tmp_path / "net.prototxt", tmp_path / "net.caffemodel")
    folded, _ = fold_batchnorm(cp.load(tmp_path / "net.prototxt", tmp_path / "net.caffemodel"))
    cp.save(folded, tmp_path / "new.prototxt", tmp_path / "new.caffemodel")
    start, end = source.index('layer { name: "bn"'), source.index('layer { name: "relu"')
    expected = source[:start] + source[end:]
    expected = expected.replace('top: "raw"', 'top: "y"').replace("bias_term: false", "bias_term: true")
    assert (tmp_path / "new.prototxt").read_bytes().decode() == expected
    old, new = ((tmp_path / f"{name}.caffemodel").read_bytes() for name in ("net", "new"))
    pieces = {
        one.name: one
        for one in cp.load(tmp_path / "net.prototxt", tmp_path / "net.caffemodel").weights.pieces
    }  # type: ignore[union-attr]
    assert new.endswith(old[pieces["out"].start :]) and new.startswith(old[: pieces["l"].start])
    found = nets.embedded(tmp_path / "new.caffemodel")
    assert list(found) == ["l", "out"]
    assert found["l"].convolution_param.bias_term and list(found["l"].top) == ["y"]


def test_one_line_and_lists(tmp_path: Path) -> None:
    """Layers that share a line, and a top in a list."""
    source = (
        DATA
        + conv("l", "data", "raw").strip().replace('top: "raw"', 'top: ["raw"]')
        + " "
        + norms("raw", "y", "y").replace("\n", " ")
        + RELU
    )
    folded, why = check(learnt(source), tmp_path)
    assert why == {} and [one.name for one in folded.net.layers] == ["data", "l", "relu"]


def test_without_weights_the_structure_changes_alone() -> None:
    model = Model(parse(DATA + HOSTS["no bias"] + norms("y", "y")))
    folded, why = fold_batchnorm(model)
    assert why == {} and folded.weights is None
    assert types(folded) == ["Input", "Convolution"] and "bias_term: true" in folded.net.text


def test_input_shapes_make_up_for_those_that_a_file_lacks() -> None:
    source = layer("data", "Data", "x", "data").replace('bottom: "x" ', "") + HOSTS["plain"] + norms("y", "y")
    shapes = {"data": (2, 4, 7, 8)}
    model = learnt(source, shapes=shapes)
    folded, why = fold_batchnorm(model)
    assert folded is model and why["bn"].startswith("its shape is not known")
    folded, why = fold_batchnorm(model, shapes)
    assert why == {} and types(folded) == ["Data", "Convolution"]
