"""The published low-rank nets come out of their base nets and rank lists, field by field.

What was edited by hand in the published files is listed here, and in docs/published.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from helpers import SHARED

import caffe_proto as cp
import lra
from caffe_proto import schema
from caffe_proto.model import Model
from caffe_proto.rewrite import Namer, Replace
from caffe_proto.rewrite import apply as rewrite
from lra.decomposition import StepShape
from lra.styles import STYLES, new_layers
from lra.targets import find

PUBLISHED = SHARED / "published"
pytestmark = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="no ../shared/published with the authors' nets"
)

TAI = "tai/imagenet/models_"
WEN = "wen/models/bvlc_alexnet/"
SCNN = "wen_scnn/models/bvlc_alexnet/lowrank_net_{}.prototxt.lowrank.prototxt"
ONE_PICTURE = {"data": (1, 3, 224, 224), "label": (1,)}
VGG_4X = dict(
    zip(
        "conv1_2 conv2_1 conv2_2 conv3_1 conv3_2 conv3_3 conv4_1 conv4_2 conv4_3 conv5_1 conv5_2 conv5_3".split(),
        (11, 25, 28, 52, 46, 56, 104, 92, 100, 232, 224, 214),
        strict=True,
    )
)


def message(text: str) -> Any:
    """The net as real Caffe's parser would hold it, fork fields included."""
    net: Any = schema.message_class("NetParameter")()
    return text_format.Parse(text, net, descriptor_pool=net.DESCRIPTOR.file.pool)


def without_training_forks(net: Any) -> Any:
    """Leave out what the authors set by hand for training: force_mult, and the fields of sparsity training."""
    for layer in net.layer:
        layer.ClearField("connectivity_mode")
        for spec in layer.param:
            for name in ("force_mult", "kernel_shape_decay_mult", "breadth_decay_mult"):
                spec.ClearField(name)
    return net


def decomposed(
    base: str, config: Mapping[str, Any], style: str, scheme: str = "auto", phase: str = "TRAIN"
) -> Model:
    """The base net with the layers of ``config`` replaced; no weights are needed."""
    model = cp.load(PUBLISHED / base, phase=phase)
    plan = lra.make_plan(model, rank_config=config, scheme=scheme, style=style, even_if_slower=True)
    return lra.apply(plan, model)[0]


def ranks(name: str) -> dict[str, Any]:
    """A rank config as the authors published it."""
    return dict(json.loads((PUBLISHED / name).read_text()))


def assert_same(made: Model, published: str, **edits: str) -> None:
    """Equal layer by layer; ``edits``: layer -> text that was added to it by hand in the published file."""
    ours = without_training_forks(message(made.net.text))
    theirs = without_training_forks(message((PUBLISHED / published).read_text()))
    for layer in ours.layer:
        if layer.name in edits:
            text_format.Merge(edits[layer.name], layer)
    assert [layer.name for layer in ours.layer] == [layer.name for layer in theirs.layer]
    for mine, published_layer in zip(ours.layer, theirs.layer, strict=True):
        assert mine == published_layer
    assert ours == theirs


@pytest.mark.parametrize(
    "net",
    ["vgg/vgg_{}deploy", "vgg/vgg_{}trainval", "caffenet/caffenet_{}deploy", "caffenet/caffenet_{}trainval"],
)
def test_tai(net: str) -> None:
    config = ranks(f"{TAI}{net.split('/')[0]}/config.json")
    made = decomposed(f"{TAI}{net.format('')}.prototxt", config, "tai", "spatial")
    assert_same(made, f"{TAI}{net.format('lowrank_')}.prototxt")


@pytest.mark.parametrize(
    ("net", "before", "after"),
    [
        ("vgg/vgg_deploy", 15_470_264_320, 5_068_026_880),
        ("caffenet/caffenet_deploy", 724_406_816, 184_519_592),
    ],
)
def test_tai_macs(net: str, before: int, after: int) -> None:
    config = ranks(f"{TAI}{net.split('/')[0]}/config.json")
    model = cp.load(PUBLISHED / f"{TAI}{net}.prototxt")
    batch = cp.shapes(model)["data"][0]
    made = decomposed(f"{TAI}{net}.prototxt", config, "tai", "spatial")
    assert (cp.cost(model).macs, cp.cost(made).macs) == (batch * before, batch * after)


@pytest.mark.parametrize("variant", ["sparsity_top5", "ft_top5", "ft_eltwise_top5"])
def test_wens_three_low_rank_alexnets(variant: str) -> None:
    config = {
        name: {"scheme": "spatial", "rank": rank} for name, rank in ranks(f"{WEN}config_iclr.json").items()
    }
    config |= {"conv3": 120, "conv4": 120, "conv5": 110}  # type: ignore[dict-item]
    made = decomposed(f"{WEN}train_val.prototxt", config, "wen")
    assert_same(made, SCNN.format(variant), accuracy="accuracy_param { top_k: 5 }")


def test_wens_full_rank_split_alexnet() -> None:
    widths = {1: 48, 2: 128, 3: 192, 4: 192, 5: 128}
    config = {f"conv{i}_group{g}": width for i, width in widths.items() for g in (0, 1)}
    made = decomposed(f"{WEN}train_val_split.prototxt", config, "wen", "pca")
    assert_same(made, f"{WEN}train_val_split_fullrank.prototxt")


def test_wens_full_rank_cifar_and_lenet() -> None:
    """The data layers do not say how large the images are; the structure does not need it."""
    folder = "wen/examples/cifar10/cifar10_full_train_test"
    made = decomposed(f"{folder}.prototxt", {"conv1": 32, "conv2": 32, "conv3": 64}, "wen", "pca")
    assert_same(made, f"{folder}_fullrank.prototxt", conv3_lowrank="param { lr_mult: 1 }")
    folder = "wen/examples/mnist/lenet_train_test"
    made = decomposed(f"{folder}.prototxt", {"conv1": 20, "conv2": 50}, "wen", "pca")
    assert_same(made, f"{folder}_fullrank.prototxt")


@pytest.mark.parametrize("net", ["VGG_16", "VGG_CNN_M_1024"])
def test_girshicks_truncated_svd(net: str) -> None:
    """Python and ROIPooling layers, which cannot be run, do not stop it."""
    made = decomposed(f"girshick/{net}/test.prototxt", {"fc6": 1024, "fc7": 256}, "girshick", "pca", "TEST")
    assert_same(made, f"girshick/{net}/compressed/test.prototxt")


@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
def test_hes_vgg_ecd(phase: str) -> None:
    """Structure and order agree; by hand, the W_prime layers kept an unused bias and changed ``param`` blocks."""
    made = decomposed(f"he_frcnn/VGG16/{phase.lower()}.prototxt", VGG_4X, "he", "pca", phase)
    ours, theirs = (
        message(made.net.text),
        message((PUBLISHED / f"he_frcnn/VGG_ECD/{phase.lower()}.prototxt").read_text()),
    )
    for net in (ours, theirs):
        for layer in net.layer:
            if layer.name.endswith(("_W_prime", "_P")):
                layer.ClearField("param")
                layer.convolution_param.ClearField("bias_term")
    assert [layer.name for layer in ours.layer] == [layer.name for layer in theirs.layer]
    assert ours == theirs


def test_zhangs_4x_ranks_on_vgg16() -> None:
    made = decomposed("he/vgg.prototxt", VGG_4X, "he", "pca", "TEST")
    model = cp.load(PUBLISHED / "he/vgg.prototxt")
    shape = ONE_PICTURE
    assert cp.cost(model, shape).conv_macs == 15_346_630_656
    assert cp.cost(made, shape).conv_macs == 3_831_439_360


def test_hes_channel_pruned_net() -> None:
    model = cp.load(PUBLISHED / "he/channel_pruning.prototxt")
    assert cp.cost(model, ONE_PICTURE).conv_macs == 3_391_649_856


# methods/zhang.md 6.3: layer -> outputs of V, of H, of P (None: merged into H)
THREE_C: dict[str, tuple[int, int, int | None]] = {
    "conv1_2": (22, 22, 59), "conv2_1": (37, 37, 118), "conv2_2": (47, 47, 119), "conv3_1": (83, 83, 226),
    "conv3_2": (89, 89, 243), "conv3_3": (106, 106, 256), "conv4_1": (175, 175, 482), "conv4_2": (192, 192, 457),
    "conv4_3": (227, 227, 512), "conv5_1": (398, 512, None), "conv5_2": (390, 512, None), "conv5_3": (379, 512, None),
}  # fmt: skip


def test_the_3c_net() -> None:
    """V, H and P in the place of each 3 x 3 layer, P narrower than the layer was: the released net's table."""
    model = cp.load(PUBLISHED / "he/vgg.prototxt")
    shape = ONE_PICTURE
    found = find(model, shape)
    namer = Namer.of(model)
    edits = []
    for name, (v, h, p) in THREE_C.items():
        target = found.targets[name]
        depth = target.shape[1]
        steps = [
            StepShape("_v", (v, depth, 3, 1), pad=(1, 0)),
            StepShape("_h", (h, v, 1, 3), pad=(0, 1)),
            *([StepShape("_linear", (p, h, 1, 1))] if p else []),
        ]
        layer = found.shaped.graph.nodes[target.index].layer
        edits.append(Replace(name, new_layers(layer, target, steps, STYLES["he"], namer)))
    made = rewrite(model, edits)
    cost = cp.cost(made, shape)
    assert cost.conv_macs == 3_743_999_056
    assert [cost.by_layer[f"conv4_2_{part}"].macs for part in "VHP"] == [217_663_488, 86_704_128, 68_791_296]
    assert "conv5_1_P" not in cost.by_layer


def test_base_nets_are_not_written_to(tmp_path: Path) -> None:
    """A structure without weights is written as a prototxt alone."""
    made = decomposed(f"{TAI}vgg/vgg_deploy.prototxt", {"conv1_2": 24}, "tai", "spatial")
    cp.save(made, tmp_path / "out.prototxt")
    assert [path.name for path in tmp_path.iterdir()] == ["out.prototxt"]
