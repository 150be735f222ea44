"""Layers replaced in a net: golden files, and the numbers that come out of what was written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest

import caffe_proto as cp
import lra
from caffe_proto import net
from caffe_proto.errors import NetError, PlanError
from caffe_proto.files import text_bytes
from caffe_proto.model import Model
from caffe_proto.weights import NewEntry, Weights
from lra import Plan
from lra.schemes import SCHEMES
from lra.targets import Found, Spectra, Target, find

ROOT = Path(__file__).resolve().parents[1]
CASES = sorted((Path(__file__).parent / "data" / "cases").glob("*.prototxt"))
LAYER = 'layer { name: "l" type: "%s" bottom: "data" top: "y" %s }\n'


def conv(settings: str, *shape: int) -> str:
    """A net of one convolution."""
    return nets.inputs(data=shape) + LAYER % ("Convolution", f"convolution_param {{ {settings} }}")


def dense(settings: str, *shape: int) -> str:
    """A net of one fully connected layer."""
    return nets.inputs(data=shape) + LAYER % ("InnerProduct", f"inner_product_param {{ {settings} }}")


NETS = {
    "plain": conv("num_output: 8 kernel_size: 3", 2, 3, 9, 9),
    "no bias": conv("num_output: 8 kernel_size: 3 bias_term: false", 1, 3, 9, 9),
    "pads and strides": conv("num_output: 8 kernel_size: 5 pad: 2 stride: 3", 1, 3, 14, 11),
    "uneven": conv(
        "num_output: 6 kernel_h: 3 kernel_w: 5 pad_h: 2 pad_w: 1 stride_h: 2 stride_w: 3", 1, 4, 13, 12
    ),
    "lists": conv("num_output: 6 kernel_size: [5, 3] pad: [0, 2] stride: [1, 2]", 1, 2, 11, 12),
    "row": conv("num_output: 6 kernel_h: 1 kernel_w: 7 pad_w: 3", 1, 3, 6, 9),
    "column": conv("num_output: 6 kernel_h: 7 kernel_w: 1 stride_h: 2 stride_w: 1", 1, 3, 12, 5),
    "1x1": conv("num_output: 6 kernel_size: 1", 1, 9, 4, 4),
    "dilation": conv("num_output: 8 kernel_size: 3 dilation: 2 dilation: 3 pad: 2", 1, 3, 12, 14),
    "groups": conv("num_output: 12 kernel_size: 3 group: 3 stride: 2 pad: 1", 2, 6, 9, 9),
    "depthwise": conv("num_output: 8 kernel_size: 3 group: 4", 1, 4, 7, 7),
    "negative axis": conv("num_output: 8 kernel_size: 3 axis: -3", 1, 3, 7, 7),
    "dense": dense("num_output: 7", 2, 3, 4, 2),
    "dense, axis 2": dense("num_output: 7 axis: 2", 2, 3, 4, 2),
    "dense, axis -2": dense("num_output: 7 axis: -2", 2, 3, 4, 2),
    "dense, axis -1": dense("num_output: 7 axis: -1 bias_term: false", 2, 3, 4, 5),
    "dense, transposed": dense("num_output: 7 transpose: true", 2, 3, 4, 2),
    "dense, transposed, axis 2": dense("num_output: 7 transpose: true axis: 2", 2, 3, 4, 2),
}
SLASH = nets.inputs(data=(1, 3, 8, 8)) + (
    'layer { name: "incep/3x3" type: "Convolution" bottom: "data" top: "incep/out" '
    "convolution_param { num_output: 6 kernel_size: 3 } }\n"
    'layer { name: "incep/ip" type: "InnerProduct" bottom: "incep/out" top: "y" '
    "inner_product_param { num_output: 5 } }\n"
)
V1 = (Path(__file__).parent / "data" / "cases" / "v1.prototxt").read_text().partition("# plan: ")[0]
BRANCHES = nets.inputs(left=(1, 3, 8, 8), right=(1, 3, 8, 8)) + (
    'layer { name: "l" type: "Convolution" bottom: "left" bottom: "right" top: "a" top: "b" '
    "convolution_param { num_output: 6 kernel_size: 3 } }\n"
)
TWINS = nets.inputs(left=(1, 3, 8, 8), right=(1, 3, 9, 9)) + "".join(
    f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" param {{ name: "w" }} '
    'param { name: "b" } convolution_param { num_output: 6 kernel_size: 3 } }\n'
    for name, bottom in (("a", "left"), ("b", "right"))
)


def plan(ranks: dict[str, tuple[str, int]], style: str = "default") -> Plan:
    """A plan: layer -> scheme and rank."""
    return Plan(
        {name: lra.plan.LayerPlan(scheme, (rank,)) for name, (scheme, rank) in ranks.items()},
        target={"style": style},
    )


def full_ranks(found: Found, scheme: str) -> dict[str, tuple[str, int]]:
    """Every layer at its full rank."""
    return {
        name: (scheme, SCHEMES[scheme].max_rank(target.shape, target.geometry.group))
        for name, target in found.targets.items()
    }


def stored(target: Target, kernel: np.ndarray) -> np.ndarray:
    """A kernel (out, in/group, kh, kw) as the layer stores it."""
    if not target.dense:
        return kernel
    matrix = kernel.reshape(kernel.shape[:2])
    return matrix.T if target.transposed else matrix


def split(path: Path) -> tuple[str, str, str]:
    """Input, plan and expected output of a case."""
    whole = path.read_bytes().decode()
    source, written, expected = re.split(r"^# plan: (.*?)\r?\n# output\r?\n", whole, flags=re.MULTILINE)
    return source, written, expected


def apply(model: Model, ranks: dict[str, tuple[str, int]], style: str = "default") -> Model:
    return lra.apply(plan(ranks, style), model)[0]


def check_identity(model: Model, scheme: str, style: str = "default") -> None:
    """At full rank the net computes what it computed."""
    changed = apply(model, full_ranks(find(model), scheme), style)
    assert changed.net.text != model.net.text
    feeds = nets.random_feeds(model)
    assert nets.apart(nets.forward(model, feeds), nets.forward(changed, feeds)) < 2e-5


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 21


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    source, written, expected = split(path)
    made = nets.model(source)
    changed, _ = lra.apply(Plan.from_json(written), made)
    assert changed.net.text == expected
    feeds = nets.random_feeds(made)
    assert nets.forward(changed, feeds).keys() == nets.forward(made, feeds).keys()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NETS)
def test_full_rank_is_the_identity(name: str, scheme: str) -> None:
    check_identity(nets.model(NETS[name]), scheme)


@pytest.mark.parametrize("source", [SLASH, V1, BRANCHES, TWINS], ids=["slash", "V1", "branches", "twins"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_rank_is_the_identity_in_files(
    tmp_path: Path, source: str, scheme: str, suffix: str = ".caffemodel"
) -> None:
    model = cp.load(*nets.files(tmp_path, source, suffix=suffix))
    changed = apply(model, full_ranks(find(model), scheme))
    cp.save(changed, tmp_path / "new.prototxt", tmp_path / f"new{suffix}")
    written = cp.load(tmp_path / "new.prototxt", tmp_path / f"new{suffix}")
    feeds = nets.random_feeds(model)
    assert nets.apart(nets.forward(model, feeds), nets.forward(written, feeds)) < 2e-5


@pytest.mark.parametrize("source", [SLASH, nets.SMALL], ids=["slash", "small"])
def test_full_rank_is_the_identity_in_hdf5(tmp_path: Path, source: str) -> None:
    test_full_rank_is_the_identity_in_files(tmp_path, source, "spatial", ".h5")


@pytest.mark.parametrize("style", ["wen", "tai", "he"])
@pytest.mark.parametrize("name", ["plain", "no bias", "groups", "uneven", "dense"])
def test_styles_compute_the_same(name: str, style: str) -> None:
    check_identity(nets.model(NETS[name]), "spatial", style)
    check_identity(nets.model(NETS[name]), "pca", style)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [name for name in NETS if name != "depthwise"])
def test_lower_rank_is_the_reconstruction(name: str, scheme: str) -> None:
    """The chain computes what the layer computes with the reconstructed weight in its place."""
    model = nets.model(NETS[name])
    found = find(model)
    target = found.targets["l"]
    group = target.geometry.group
    full = SCHEMES[scheme].max_rank(target.shape, group)
    rank = max(group, full // 2 // group * group)
    weight, *bias = found.blobs[target.index]
    chain = Spectra(found).get(target, SCHEMES[scheme]).factor(rank)
    dense_weight = stored(target, chain.reconstruct()).astype(np.float32)
    assert np.abs(dense_weight - weight).max() > 1e-2  # something was dropped
    expected = Model(model.net, Weights([NewEntry("l", (dense_weight, *bias))]))
    feeds = nets.random_feeds(model)
    changed = apply(model, {"l": (scheme, rank)})
    assert nets.apart(nets.forward(expected, feeds), nets.forward(changed, feeds)) < 2e-5


def test_each_group_is_decomposed_by_itself() -> None:
    """The best approximation of each group is that of its own filters, the groups computed one by one in numpy."""
    model = nets.model(NETS["groups"])
    assert model.weights is not None
    changed = apply(model, {"l": ("pca", 6)})
    assert changed.weights is not None
    (first,), (second, _) = changed.weights["l_lowrank"], changed.weights["l_linear"]
    for g, kernel in enumerate(np.split(model.weights["l"][0].astype(float), 3)):
        left, values, right = np.linalg.svd(kernel.reshape(4, -1), full_matrices=False)
        best = (left[:, :2] * values[:2]) @ right[:2]
        made = np.split(second, 3)[g].reshape(4, 2) @ np.split(first, 3)[g].reshape(2, -1)
        assert np.allclose(made, best, atol=1e-5)


def test_embedded_definitions(tmp_path: Path) -> None:
    model = cp.load(*nets.files(tmp_path))
    ranks = {"conv1": ("spatial", 6), "conv2": ("pca", 10), "ip1": ("svd", 7)}
    changed = apply(model, ranks)
    cp.save(changed, tmp_path / "new.prototxt", tmp_path / "new.caffemodel")
    found = nets.embedded(tmp_path / "new.caffemodel")
    assert list(found) == [
        "conv1_v",
        "conv1_h",
        "conv2_lowrank",
        "conv2_linear",
        "conv3",
        "ip1_lowrank",
        "ip1_linear",
    ]
    for name, outputs, kernel, bias in (
        ("conv1_v", 6, (5, 1), False),
        ("conv1_h", 16, (1, 5), True),
    ):
        p = found[name].convolution_param
        assert (p.num_output, (p.kernel_h, p.kernel_w), p.bias_term) == (outputs, kernel, bias)
        assert list(p.kernel_size) == []
    first, second = found["conv2_lowrank"].convolution_param, found["conv2_linear"].convolution_param
    assert (first.num_output, list(first.kernel_size), first.bias_term, list(first.stride)) == (
        10,
        [3],
        False,
        [2],
    )
    assert (second.num_output, list(second.kernel_size), second.bias_term, list(second.stride)) == (
        24,
        [1],
        True,
        [1],
    )
    assert (first.group, second.group) == (2, 2)
    assert found["ip1_lowrank"].inner_product_param.num_output == 7
    assert not found["ip1_lowrank"].inner_product_param.bias_term
    assert found["conv1_v"].type == "Convolution"
    assert (list(found["conv1_h"].bottom), list(found["conv1_h"].top)) == (["conv1_v"], ["conv1"])
    assert list(found["conv2_lowrank"].blobs[0].shape.dim) == [10, 8, 3, 3]
    assert len(found["conv2_lowrank"].blobs) == 1 and len(found["conv2_linear"].blobs) == 2


def test_v1_stays_v1(tmp_path: Path) -> None:
    model = cp.load(*nets.files(tmp_path, V1))
    changed = apply(model, {"conv1": ("spatial", 5), "ip": ("pca", 4)})
    cp.save(changed, tmp_path / "new.prototxt", tmp_path / "new.caffemodel")
    made: Any = nets.schema.message_class("NetParameter")()
    made.ParseFromString((tmp_path / "new.caffemodel").read_bytes())
    assert len(made.layer) == 0
    assert [layer.name for layer in made.layers] == ["conv1_v", "conv1_h", "ip_lowrank", "ip_linear"]
    kinds = nets.schema.enum_values("V1LayerParameter.LayerType")
    assert [layer.type for layer in made.layers] == [kinds["CONVOLUTION"]] * 2 + [kinds["INNER_PRODUCT"]] * 2
    assert made.layers[0].convolution_param.num_output == 5
    assert cp.load(tmp_path / "new.prototxt").net.dialect == "V1"


def test_v1_can_be_changed_twice(tmp_path: Path) -> None:
    model = cp.load(*nets.files(tmp_path, V1))
    twice = apply(apply(model, {"conv1": ("spatial", 9)}), {"ip": ("pca", 10)})
    feeds = nets.random_feeds(model)
    assert nets.apart(nets.forward(model, feeds), nets.forward(twice, feeds)) < 2e-5


def test_untouched_layers_stay_byte_for_byte(tmp_path: Path) -> None:
    model = cp.load(*nets.files(tmp_path))
    old_text, old_bytes = model.net.text, (tmp_path / "net.caffemodel").read_bytes()
    changed = apply(model, {"conv2": ("pca", 4)})
    cp.save(changed, tmp_path / "new.prototxt", tmp_path / "new.caffemodel")
    new_text = (tmp_path / "new.prototxt").read_text()
    layer = model.net.layer("conv2")
    start, end = layer.span
    assert new_text.startswith(old_text[:start]) and new_text.endswith(old_text[end:])
    new_bytes = (tmp_path / "new.caffemodel").read_bytes()
    spans = {name: piece for name, piece in zip(model.weights or (), model.weights.pieces, strict=True)}  # type: ignore[union-attr]
    before, after = spans["conv2"].start, spans["conv2"].end  # type: ignore[union-attr]
    assert new_bytes.startswith(old_bytes[:before]) and new_bytes.endswith(old_bytes[after:])
    assert len(new_bytes) < len(old_bytes)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_empty_plan_changes_nothing(tmp_path: Path, path: Path) -> None:
    source, _, _ = split(path)
    model = cp.load(*nets.files(tmp_path, source))
    changed, report = lra.apply(Plan({}), model)
    assert report.rows == () and report.macs[0] == report.macs[1]
    cp.save(changed, tmp_path / "new.prototxt", tmp_path / "new.caffemodel")
    assert (tmp_path / "new.prototxt").read_bytes() == text_bytes(source)
    assert (tmp_path / "new.caffemodel").read_bytes() == (tmp_path / "net.caffemodel").read_bytes()


@nets.needs_shared
@pytest.mark.parametrize(
    "stem", ["lenet_v2_ethereon/lenet", "caffe_v1_everpeace/cifar10/cifar10_full", "mtcnn_congweilin/12net"]
)
def test_empty_plan_changes_nothing_in_published_files(tmp_path: Path, stem: str) -> None:
    folder = (nets.SHARED / "data" / "models" / stem).parent
    weights = sorted(folder.glob(f"{Path(stem).name}*.caffemodel"))[0]
    changed, _ = lra.apply(Plan({}), cp.load(folder / f"{Path(stem).name}.prototxt", weights))
    cp.save(changed, tmp_path / "new.prototxt", tmp_path / "new.caffemodel")
    assert (tmp_path / "new.prototxt").read_bytes() == (folder / f"{Path(stem).name}.prototxt").read_bytes()
    assert (tmp_path / "new.caffemodel").read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_bytes_in_two_processes(tmp_path: Path, scheme: str) -> None:
    paths = nets.files(tmp_path)
    program = (
        "import sys, caffe_proto as cp, lra\n"
        "net, weights, plan, out = sys.argv[1:]\n"
        "made, _ = lra.apply(lra.Plan.from_json(open(plan).read()), cp.load(net, weights))\n"
        "cp.save(made, out + '.prototxt', out + '.caffemodel')\n"
    )
    chosen = plan({"conv1": (scheme, 6), "conv2": (scheme, 8), "ip1": (scheme, 9)})
    (tmp_path / "plan.json").write_text(chosen.to_json())
    for out in ("one", "two"):
        subprocess.run(
            [sys.executable, "-c", program, *paths, str(tmp_path / "plan.json"), str(tmp_path / out)],
            check=True,
            cwd=ROOT,
        )
    for suffix in (".prototxt", ".caffemodel"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_layers_that_share_a_weight_need_one_plan() -> None:
    model = nets.model(TWINS)
    with pytest.raises(
        PlanError, match=r'layer "b": shares its weight "w" with layer "a": pca 3 here and pca 4'
    ):
        apply(model, {"a": ("pca", 4), "b": ("pca", 3)})
    with pytest.raises(PlanError, match="do not go together"):
        apply(model, {"a": ("pca", 4), "b": ("svd", 4)})
    feeds = nets.random_feeds(model)
    alone = apply(model, {"a": ("pca", 6)})  # the other one keeps the weight
    assert nets.apart(nets.forward(model, feeds), nets.forward(alone, feeds)) < 2e-5


def test_shared_factors_are_stored_alike() -> None:
    changed = apply(nets.model(TWINS), {"a": ("pca", 4), "b": ("pca", 4)})
    assert changed.weights is not None
    assert np.array_equal(changed.weights["a_lowrank"][0], changed.weights["b_lowrank"][0])


def test_same_layer_with_other_tops_is_refused() -> None:
    block = 'layer { name: "l" type: "Convolution" bottom: "%s" %s convolution_param { num_output: 4 kernel_size: 3 } include { phase: %s } }\n'
    source = nets.inputs(x=(1, 3, 8, 8)) + block % ("x", 'top: "y"', "TEST")
    source += block % ("x", 'bottom: "x" top: "y" top: "z"', "TRAIN")
    with pytest.raises(NetError, match=r'line 3: layer "l": stands in the file twice, with other tops'):
        apply(nets.model(source), {"l": ("pca", 2)})


def test_no_weights_changes_the_text_alone() -> None:
    source, written, expected = split(next(path for path in CASES if path.stem == "multi_line"))
    changed, report = lra.apply(Plan.from_json(written), Model(net.parse(source)))
    assert changed.net.text == expected and changed.weights is None
    assert report.rows[0].error is None


def test_json_of_the_cases_is_a_plan() -> None:
    for path in CASES:
        assert json.loads(split(path)[1])["layers"]
