"""models/: every net costs what is known of it, is built like the published ones, and takes their weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import caffe_proto as cp
from caffe_proto import graph, onnx_export
from caffe_proto.layers.conv import ConvParams
from caffe_proto.layers.norm import BatchNormParams
from models import generate

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with published nets")

ENTRIES = {entry.folder: entry for entry in generate.ZOO}

# MACs and learnt parameters (BatchNorm's statistics left out, Scale's factors and shifts counted).
KNOWN = {
    # LeCun's net in Caffe's form: 288,000 + 1,600,000 + 400,000 + 5,000; models/lenet/README.md.
    "lenet": (2_293_000, 431_080),
    # Caffe's examples: 25 x (3 x 32 x 1024 + 32 x 32 x 256 + 32 x 64 x 64), then 1024 x 64 + 640 or 10,240.
    "cifar10_quick": (12_354_176, 145_578),
    "cifar10_full": (12_298_240, 89_578),
    # The figures everyone quotes for AlexNet in Caffe's two-group form: 724 M and 61 M.
    "alexnet": (724_406_816, 60_965_224),
    "caffenet": (724_406_816, 60_965_224),
    # He et al., channel pruning: convolutions 15,346,630,656, fully connected 123,633,664; 138 M.
    "vgg_16": (15_470_264_320, 138_357_544),
    # Szegedy et al. say 1.5 G and BVLC's file holds 6,998,552 numbers; the MACs are summed up below.
    "googlenet": (1_582_671_872, 6_998_552),
    # torchvision's form without biases in convolutions: 1.814 G, 11,689,512.
    "resnet_18": (1_814_073_344, 11_689_512),
    # He's Caffe file, stride in the first 1x1: 3.86 G. torchvision's 25,557,032 and 64 biases of conv1.
    "resnet_50": (3_857_973_248, 25_557_096),
    # torchvision's form: 4.09 G, 25,557,032.
    "resnet_50_v1.5": (4_089_184_256, 25_557_032),
    # The authors' 1.2 M parameters; the MACs are summed up below.
    "squeezenet_v1.1": (387_747_520, 1_235_496),
    # Howard et al.: 569 M, 4.2 M.
    "mobilenet_v1": (568_740_352, 4_231_976),
    # HRank, 313.73 M / 14.98 M; see HRANK.
    "vgg_16_bn": (313_463_808, 14_991_946),
    # HRank, 1.52 B / 6.15 M.
    "googlenet_cifar": (1_521_756_160, 6_166_250),
    # Wen's Caffe net with n = 3, He et al. say 0.27 M; the MACs are summed up below.
    "resnet_20": (40_813_184, 272_298),
    # HRank, 125.49 M / 0.85 M.
    "resnet_56": (125_485_696, 853_018),
    # HRank, 252.89 M / 1.72 M.
    "resnet_110": (252_887_680, 1_727_962),
    # HRank, 282.00 M / 1.04 M.
    "densenet_40": (282_917_328, 1_059_298),
}

# HRank's own counts in M, to which its printed baselines were traced: MACs with VGG's two fully connected layers
# counted twice, and parameters without those of BatchNorm. Printed are 313.73/14.98, 125.49/0.85, 252.89/1.72,
# 282.00 (digits are lost) / 1.04, 1520/6.15 and 4090/25.50.
HRANK = {
    "vgg_16_bn": ("313.731", "14.982"),
    "resnet_56": ("125.486", "0.8490"),
    "resnet_110": ("252.888", "1.7199"),
    "densenet_40": ("282.917", "1.0406"),
    "googlenet_cifar": ("1521.76", "6.1504"),
    "resnet_50_v1.5": ("4089.18", "25.504"),
}
VGG_LINEAR = 512 * 512 + 512 * 10


def _path(folder: str, form: int = 0) -> Path:
    return MODELS / folder / ENTRIES[folder].files[form]


def _params(cost: Any, *types: str) -> int:
    return sum(layer.params for layer in cost.layers if layer.type in types)


# ------------------------------------------------------------------------------- files


def test_the_files_are_what_the_generator_makes() -> None:
    for name, text in generate.files().items():
        assert (MODELS / name).read_bytes() == text.encode(), f"{name}: run python models/generate.py"


@pytest.mark.parametrize("folder", KNOWN)
def test_the_table_of_each_readme_is_what_its_command_prints(folder: str, capsys: Any) -> None:
    text = (MODELS / folder / "README.md").read_text(encoding="utf-8")
    (command,) = (line for line in text.splitlines() if line.startswith("    python models/generate.py"))
    generate.main(command.split()[2:])
    table = capsys.readouterr().out
    macs, params = KNOWN[folder]
    assert f"| MACs | {macs:,} " in table and f" {params:,}" in table
    assert f"\n\n{table}\n" in text


def test_the_table_of_all_nets_is_what_its_command_prints(capsys: Any) -> None:
    generate.main(["--table"])
    assert f"\n\n{capsys.readouterr().out}\n" in (MODELS / "README.md").read_text(encoding="utf-8")


def test_every_folder_is_a_net_and_every_net_is_pinned() -> None:
    folders = {path.name for path in MODELS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ENTRIES) == set(KNOWN)


# ------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("folder", KNOWN)
def test_macs_and_parameters(folder: str) -> None:
    cost = cp.cost(cp.load(_path(folder)))
    assert (cost.macs, cost.params - _params(cost, "BatchNorm")) == KNOWN[folder]


def _millions(number: int, like: str) -> str:
    """A number in millions with as many digits as another."""
    return f"{number / 1e6:.{len(like.split('.')[1])}f}"


@pytest.mark.parametrize("folder", HRANK)
def test_counts_are_those_of_hrank(folder: str) -> None:
    cost = cp.cost(cp.load(_path(folder)))
    macs, params = HRANK[folder]
    without_norm = cost.params - _params(cost, "BatchNorm", "Scale")
    counted = cost.macs + (VGG_LINEAR if folder == "vgg_16_bn" else 0)
    assert _millions(counted, macs) == macs
    assert _millions(without_norm, params) == params
    assert f"{without_norm:,}" in (MODELS / folder / "README.md").read_text()


def _inceptions(width: int, sizes: dict[str, int], *, fives: tuple[int, ...]) -> Iterator[int]:
    """MACs of the nine modules, from the paper's table; ``fives``: the kernels of the third branch."""
    table = {
        "3a": (64, 96, 128, 16, 32, 32),
        "3b": (128, 128, 192, 32, 96, 64),
        "4a": (192, 96, 208, 16, 48, 64),
        "4b": (160, 112, 224, 24, 64, 64),
        "4c": (128, 128, 256, 24, 64, 64),
        "4d": (112, 144, 288, 32, 64, 64),
        "4e": (256, 160, 320, 32, 128, 128),
        "5a": (256, 160, 320, 32, 128, 128),
        "5b": (384, 192, 384, 48, 128, 128),
    }
    for tag, (one, reduce3, three, reduce5, five, pool) in table.items():
        cells = width * (one + reduce3 + reduce5 + pool) + 9 * reduce3 * three
        inputs = (reduce5, five)
        cells += sum(k * k * inputs[i] * five for i, k in enumerate(fives))
        yield cells * sizes[tag[0]] ** 2
        width = one + three + five + pool


def _googlenet() -> int:
    stem = 112**2 * 49 * 3 * 64 + 56**2 * (64 * 64 + 9 * 64 * 192)
    return stem + sum(_inceptions(192, {"3": 28, "4": 14, "5": 7}, fives=(5,))) + 1024 * 1000


def _googlenet_cifar() -> int:
    stem = 32**2 * 9 * 3 * 192
    return stem + sum(_inceptions(192, {"3": 32, "4": 16, "5": 8}, fives=(3, 3))) + 1024 * 10


def _resnet_18() -> int:
    stem = 112**2 * 49 * 3 * 64
    stages = 4 * 9 * 64 * 64 * 56**2  # halving the area and doubling the width keeps a 3x3's cost
    stages += 3 * (9 * 64 * 64 // 2 + 3 * 9 * 64 * 64 + 64 * 64 // 2) * 56**2
    return stem + stages + 512 * 1000


def _resnet_50(*, later: bool = False) -> int:
    """Per stage, in units of 64 x 64 x 56 x 56: inner blocks of 4 + 9 + 4, and the first one of each stage.

    ``later``: the first 1x1 of three stages sees four times the pixels.
    """
    inner, first2 = 17 * (2 + 3 + 5 + 2), 1 + 9 + 4 + 4
    first = 3 * ((8 if later else 2) + 9 + 4 + 8)
    return 112**2 * 49 * 3 * 64 + (inner + first2 + first) * 64 * 64 * 56**2 + 2048 * 1000


def _squeezenet() -> int:
    fires = [(64, 16, 56), (128, 16, 56), (128, 32, 28), (256, 32, 28)]
    fires += [(256, 48, 14), (384, 48, 14), (384, 64, 14), (512, 64, 14)]
    modules = sum((width * s + s * 4 * s * (1 + 9)) * size**2 for width, s, size in fires)
    return 113**2 * 9 * 3 * 64 + modules + 14**2 * 512 * 1000


def _mobilenet() -> int:
    pairs = [(32, 64, 112), (64, 128, 56), (128, 128, 56), (128, 256, 28), (256, 256, 28), (256, 512, 14)]
    pairs += [(512, 512, 14)] * 5 + [(512, 1024, 7), (1024, 1024, 7)]
    separable = sum((9 * width + width * out) * size**2 for width, out, size in pairs)
    return 112**2 * 9 * 3 * 32 + separable + 1024 * 1000


def _cifar_resnet(blocks: int, shortcut: int) -> int:
    """A unit is a 3x3 of 16 x 16 on 32 x 32, the same in every group; entering a group halves one unit."""
    unit = 9 * 16 * 16 * 32**2
    return 32**2 * 9 * 3 * 16 + (6 * blocks - 1) * unit + 2 * shortcut + 640


def _densenet_40() -> int:
    macs, width = 32**2 * 9 * 3 * 24, 24
    for size in (32, 16, 8):
        for _ in range(12):
            macs += size**2 * 9 * width * 12
            width += 12
        macs += size**2 * width**2 if size > 8 else width * 10
    return macs


@pytest.mark.parametrize(
    ("folder", "macs"),
    [
        ("googlenet", _googlenet()),
        ("googlenet_cifar", _googlenet_cifar()),
        ("resnet_18", _resnet_18()),
        ("resnet_50", _resnet_50()),
        ("resnet_50_v1.5", _resnet_50(later=True)),
        ("squeezenet_v1.1", _squeezenet()),
        ("mobilenet_v1", _mobilenet()),
        ("resnet_20", _cifar_resnet(3, 16 * 32 * 16**2)),
        ("resnet_56", _cifar_resnet(9, 0)),
        ("resnet_110", _cifar_resnet(18, 0)),
        ("densenet_40", _densenet_40()),
    ],
)
def test_known_macs_are_the_closed_form(folder: str, macs: int) -> None:
    assert KNOWN[folder][0] == macs


# ------------------------------------------------------------------------------- accepted, run


@pytest.mark.parametrize("folder", ENTRIES)
@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
def test_training_form_is_accepted(folder: str, phase: str) -> None:
    model = cp.load(_path(folder, 1), phase=phase)
    data = ENTRIES[folder].data
    batch = data.batches[phase == "TEST"]
    given = None if data.crop else {"data": (batch, *data.size), "label": (batch,)}
    found = cp.shapes(model, given)
    scalars = {name for name, shape in found.items() if shape == ()}
    assert ENTRIES[folder].loss.top in scalars
    assert ("accuracy" in scalars or "loss3/top-5" in scalars) == (phase == "TEST")
    learnt = {name: layer.blobs for name, layer in cp.cost(model, given).by_layer.items() if layer.blobs}
    plain = {
        name: layer.blobs for name, layer in cp.cost(cp.load(_path(folder))).by_layer.items() if layer.blobs
    }
    assert plain == {
        name: blobs for name, blobs in learnt.items() if not name.startswith(("loss1/", "loss2/"))
    }


@pytest.mark.parametrize("folder", ENTRIES)
def test_batch_norm_learns_nothing_and_biases_learn_twice_as_fast(folder: str) -> None:
    for layer in cp.load(_path(folder, 1), phase="TRAIN").net.layers:
        rates = [(spec.lr_mult, spec.decay_mult) for spec in layer.param_specs]
        if layer.type == "BatchNorm":
            assert rates == [(0, 0)] * 3
        elif layer.type in ("Convolution", "InnerProduct"):
            assert [lr for lr, _ in rates] in ([1], [1, 2])


SMALL = [folder for folder in KNOWN if KNOWN[folder][1] < 20_000_000]


@pytest.mark.parametrize("folder", SMALL)
def test_exports_with_random_weights(folder: str) -> None:
    export = onnx_export.draw(cp.load(_path(folder)), onnx_export.Request(random_seed=0, dynamic_batch=True))
    assert set(export.outputs) == {"prob"}


def test_option_a_shortcut_is_every_second_pixel_between_zeros() -> None:
    blobs = ["res_grp1_9", "res_grp2_1_shortcut"]
    feeds = {"data": np.random.default_rng(0).normal(size=(3, 3, 32, 32))}
    with cp.session(cp.load(_path("resnet_56")), blobs, threads=1, random_seed=0) as session:
        before, shortcut = session.run(feeds).values()
    assert np.abs(before).max() > 0
    assert np.array_equal(shortcut, np.pad(before[:, :, ::2, ::2], ((0, 0), (8, 8), (0, 0), (0, 0))))


# ------------------------------------------------------------------------------- published nets

Structure = dict[str, tuple[Any, ...]]
SYNOPSYS = "foss-for-synopsys-dwc-arc-processors+synopsys-caffe-models/caffe_models"
PUBLISHED = [
    ("lenet", "data/models/cifar_v2_yuvval/lenet.prototxt"),
    ("cifar10_quick", "data/models/caffe_v1_everpeace/cifar10/cifar10_quick.prototxt"),
    ("cifar10_quick", "published/wen/examples/cifar10/cifar10_quick.prototxt"),
    ("cifar10_full", "data/models/cifar_v2_yuvval/cifar10_full.prototxt"),
    ("cifar10_full", "oracle/zoo/built/BVLC+caffe/examples/cifar10/cifar10_full.prototxt"),
    ("alexnet", "published/wen/models/bvlc_alexnet/deploy.prototxt"),
    ("alexnet", "oracle/zoo/built/BVLC+caffe/models/bvlc_alexnet/deploy.prototxt"),
    ("caffenet", "published/wen/models/bvlc_reference_caffenet/deploy.prototxt"),
    ("caffenet", "oracle/zoo/built/BVLC+caffe/models/bvlc_reference_caffenet/deploy.prototxt"),
    ("caffenet", "published/tai/imagenet/models_caffenet/caffenet_deploy.prototxt"),
    ("vgg_16", "published/tai/imagenet/models_vgg/vgg_deploy.prototxt"),
    (
        "vgg_16",
        "oracle/zoo/wild/BXuan694__Caffe/models__vgg__vgg-caffe-master__model__VGG_ILSVRC_16_layers_deploy.prototxt",
    ),
    ("googlenet", "published/wen/models/bvlc_googlenet/deploy.prototxt"),
    ("googlenet", f"oracle/zoo/built/{SYNOPSYS}/googlenet/caffe_model/deploy.prototxt"),
    ("resnet_50", "oracle/zoo/built/KaimingHe+deep-residual-networks/prototxt/ResNet-50-deploy.prototxt"),
    ("squeezenet_v1.1", f"oracle/zoo/built/{SYNOPSYS}/squeeze/caffe_model/v1.1/deploy.prototxt"),
    ("mobilenet_v1", "oracle/zoo/built/inisis+caffe2onnx/test/caffemodel/mobilenet/mobilenet.prototxt"),
    ("mobilenet_v1", "oracle/zoo/wild/shicai__MobileNet-Caffe/mobilenet_deploy.prototxt"),
    ("resnet_20", "oracle/zoo/built/wenwei202+caffe/examples/cifar10/cifar10_resnet_n3.prototxt"),
]
TRAINED = [
    ("lenet", "published/wen/examples/mnist/lenet_train_test.prototxt"),
    ("cifar10_quick", "published/wen/examples/cifar10/cifar10_quick_train_test.prototxt"),
    ("cifar10_full", "published/wen/examples/cifar10/cifar10_full_train_test.prototxt"),
    ("alexnet", "published/wen/models/bvlc_alexnet/train_val.prototxt"),
    ("caffenet", "published/wen/models/bvlc_reference_caffenet/train_val.prototxt"),
    ("vgg_16", "published/he/vgg.prototxt"),
    ("vgg_16", "published/wen/models/vggnet/VGG_ILSVRC_16_layers_train_val.prototxt"),
    ("resnet_20", "published/wen/examples/cifar10/cifar10_resnet_train_test_n3.prototxt"),
    ("googlenet", "published/wen/models/bvlc_googlenet/train_val.prototxt"),
]


def _settings(params: Any) -> Any:
    """A layer's settings in one spelling."""
    if isinstance(params, ConvParams):
        kernel, stride, pad = (
            (pair * 2)[:2] for pair in (params.kernel, params.stride or (1,), params.pad or (0,))
        )
        return params.num_output, kernel, stride, pad, params.group, params.bias
    return None if isinstance(params, BatchNormParams) else params


def _structure(path: Path, phase: str = "TEST") -> Structure:
    """Every layer but data, losses and the last softmax: type, settings and the layers it reads, by name."""
    built = graph.build(cp.load(path, phase=phase).net)
    sources = {value.node for value in built.sources}
    found: Structure = {}
    for index, node in enumerate(built.nodes):
        assert node.spec is not None
        if index not in sources and not node.spec.loss and node.layer.type not in ("Accuracy", "Softmax"):
            read = ["" if value.node in sources else built.nodes[value.node].name for value in node.inputs]
            found[node.name] = (node.layer.type, _settings(node.params), tuple(read))
    return found


@needs_shared
@pytest.mark.parametrize(("folder", "published"), PUBLISHED)
def test_deploy_form_is_the_published_net(folder: str, published: str) -> None:
    assert _structure(_path(folder)) == _structure(SHARED / published)


@needs_shared
@pytest.mark.parametrize(("folder", "published"), TRAINED)
def test_training_form_is_the_published_net(folder: str, published: str) -> None:
    assert _structure(_path(folder, 1), "TRAIN") == _structure(SHARED / published, "TRAIN")


RESNET_18 = "oracle/zoo/built/fengbingchun+Caffe_Test/test_data/Net/ResNet/ResNet-18/deploy.prototxt"


@needs_shared
def test_resnet_18_is_the_published_one_without_its_first_projection() -> None:
    ours, theirs = _structure(_path("resnet_18")), _structure(SHARED / RESNET_18)
    assert set(theirs) - set(ours) == {"res2a_branch1", "bn2a_branch1", "scale2a_branch1"}
    assert {name for name in ours if ours[name] != theirs[name]} == {"conv1", "res2a"}


def _convolutions(path: Path) -> list[tuple[Any, ...]]:
    """Output channels, kernel, stride, pad and group of each convolution, sorted."""
    return sorted(layer[1][:5] for layer in _structure(path).values() if layer[0] == "Convolution")


@needs_shared
def test_resnet_20_has_the_convolutions_of_another_one() -> None:
    other = SHARED / "data" / "models" / "resnet20_cifar10" / "res20_deploy_DERIVED.prototxt"
    assert _convolutions(_path("resnet_20")) == _convolutions(other)


# ------------------------------------------------------------------------------- published weights

CAFFEMODELS = [
    ("cifar10_full", "cifar_v2_yuvval/cifar10_full", "cifar10_full_iter_70000.caffemodel"),
    ("cifar10_full", "caffe_v1_everpeace/cifar10/cifar10_full", "cifar10_full_iter_70000.caffemodel"),
    ("cifar10_full", "cifar10_h5_jwcom79/cifar10_full", "cifar10_full_iter_70000.caffemodel.h5"),
    ("cifar10_quick", "caffe_v1_everpeace/cifar10/cifar10_quick", "cifar10_quick_iter_5000.caffemodel"),
    ("cifar10_quick", "cifar10_h5_jwcom79/cifar10_quick", "cifar10_quick_iter_5000.caffemodel.h5"),
]


@needs_shared
@pytest.mark.parametrize(("folder", "net", "weights"), CAFFEMODELS)
def test_published_weights_give_what_they_give_with_their_own_prototxt(
    folder: str, net: str, weights: str
) -> None:
    theirs = (SHARED / "data" / "models" / net).with_suffix(".prototxt")
    feeds = {"data": np.random.default_rng(0).normal(0, 50, (4, 3, 32, 32))}
    made = {}
    for prototxt in (_path(folder), theirs):
        with cp.session(cp.load(prototxt, theirs.parent / weights), ["prob"], threads=1) as session:
            made[prototxt] = session.run(feeds)["prob"]
    assert np.ptp(made[theirs]) > 0.1
    assert np.array_equal(made[_path(folder)], made[theirs])
