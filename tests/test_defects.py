"""Defects of the published decomposers (methods/wen.md, section 7, "Decomposer"), each shown to be absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nets
import numpy as np
import pytest

import caffe_proto as cp
import lra
from caffe_proto import net
from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.weights import NewEntry, Weights
from lra import Plan
from lra.cli import main
from lra.plan import LayerPlan
from lra.targets import find

ROOT = Path(__file__).resolve().parents[1]


def one(settings: str, extra: str = "", shape: tuple[int, ...] = (1, 8, 9, 9), name: str = "c") -> str:
    """A net of one convolution."""
    return nets.inputs(data=shape) + (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "data" top: "y" {extra} '
        f"convolution_param {{ {settings} }} }}\n"
    )


def same_output(before: Model, after: Model) -> bool:
    feeds = nets.random_feeds(before)
    return nets.apart(nets.forward(before, feeds), nets.forward(after, feeds)) < 2e-5


def test_3_an_energy_can_be_asked_of_groups() -> None:
    plan = lra.make_plan(nets.model(one("num_output: 8 kernel_size: 3 group: 2")), scheme="pca", energy=0.4)
    assert plan.layers["c"].ranks[0] in (2, 4)


@pytest.mark.parametrize("rank", [1, 5])
def test_3_a_rank_of_groups_is_not_rounded_silently(rank: int) -> None:
    model = nets.model(one("num_output: 8 kernel_size: 3 group: 2"))
    with pytest.raises(UsageError, match=f'layer "c": rank {rank} is not a multiple of group 2: use '):
        lra.make_plan(model, rank_config={"c": rank})
    with pytest.raises(UsageError, match=f"rank {rank} is not a multiple of group 2"):
        lra.apply(Plan({"c": LayerPlan("pca", (rank,))}), model)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95])
def test_4_svd_and_pca_mean_the_same_by_an_energy(energy: float) -> None:
    model = nets.model(nets.SMALL)
    found = [
        lra.make_plan(model, scheme=one, energy=energy, fc=True, even_if_slower=True)
        for one in ("pca", "svd")
    ]
    first, second = ({name: entry.ranks for name, entry in plan.layers.items()} for plan in found)
    assert first == second


@pytest.mark.parametrize(
    "settings",
    [
        "num_output: 8 kernel_h: 3 kernel_w: 5",
        "num_output: 8 kernel_size: 3 pad_h: 1 pad_w: 2",
        "num_output: 8 kernel_size: 3 stride_h: 2 stride_w: 1",
    ],
)
@pytest.mark.parametrize("scheme", ["pca", "spatial"])
def test_5_h_and_w_settings(settings: str, scheme: str) -> None:
    """At full rank the same output: no pad or stride is left on a layer that must not have it."""
    model = nets.model(one(settings))
    changed, _ = lra.apply(lra.make_plan(model, scheme=scheme, energy=1.0, even_if_slower=True), model)
    assert same_output(model, changed)


def test_5_several_bottoms_and_tops() -> None:
    source = nets.inputs(a=(1, 8, 9, 9), b=(1, 8, 9, 9)) + (
        'layer { name: "c" type: "Convolution" bottom: "a" bottom: "b" top: "x" top: "y" '
        "convolution_param { num_output: 8 kernel_size: 3 } }\n"
    )
    model = nets.model(source)
    changed, _ = lra.apply(Plan({"c": LayerPlan("pca", (8,))}), model)
    assert same_output(model, changed)


def test_5_other_numbers_of_axes_are_refused_with_the_reason() -> None:
    model = nets.model(one("num_output: 8 kernel_size: 3", shape=(1, 2, 5, 5, 5)))
    assert find(model).refused == {"c": "its kernel has 3 axes, two are needed"}
    with pytest.raises(UsageError, match="c: its kernel has 3 axes, two are needed"):
        lra.make_plan(model, rank_config={"c": 2})


SHARED_NAMES = 'param { name: "w" lr_mult: 1 force_mult: 1 } param { name: "b" lr_mult: 2 }'


def test_6_shared_names_are_not_on_both_halves() -> None:
    model = nets.model(one("num_output: 8 kernel_size: 3", SHARED_NAMES))
    changed, _ = lra.apply(Plan({"c": LayerPlan("pca", (8,))}), model)
    names = {layer.name: [spec.name for spec in layer.param_specs] for layer in changed.net.layers[1:]}
    assert names == {"c_lowrank": ["w_lowrank"], "c_linear": ["w_linear", "b"]}
    assert same_output(model, changed)


def test_6_force_mult_is_not_on_the_linear_layer() -> None:
    model = nets.model(one("num_output: 8 kernel_size: 3", SHARED_NAMES))
    changed, _ = lra.apply(Plan({"c": LayerPlan("pca", (4,))}), model)
    counts = {
        layer.name: changed.net.text[slice(*layer.span)].count("force_mult") for layer in changed.net.layers
    }
    assert (counts["c_lowrank"], counts["c_linear"]) == (1, 0)


def test_7_v1_files_are_decomposed() -> None:
    source = (
        'input: "data" input_dim: 1 input_dim: 8 input_dim: 9 input_dim: 9\n'
        'layers { name: "c" type: CONVOLUTION bottom: "data" top: "y" convolution_param { num_output: 8 kernel_size: 3 } }\n'
    )
    model = nets.model(source)
    changed, report = lra.apply(lra.make_plan(model, scheme="pca", ranks=[4]), model)
    assert [row.name for row in report.rows] == ["c"] and changed.net.text.count("type: CONVOLUTION") == 2


@pytest.mark.parametrize("suffix", [".caffemodel", ".h5"])
def test_7_names_with_a_slash_can_be_saved(tmp_path: Path, suffix: str) -> None:
    model = nets.model(one("num_output: 8 kernel_size: 3", name="inception/3x3"))
    changed, _ = lra.apply(Plan({"inception/3x3": LayerPlan("spatial", (24,))}), model)
    cp.save(changed, tmp_path / "new.prototxt", tmp_path / f"new{suffix}")
    written = cp.load(tmp_path / "new.prototxt", tmp_path / f"new{suffix}")
    assert same_output(model, written)


def test_7_layers_of_the_training_phase_alone_do_no_harm() -> None:
    train = one("num_output: 4 kernel_size: 3", "include { phase: TRAIN }", name="t").splitlines()[1]
    model = nets.model(one("num_output: 8 kernel_size: 3") + train.replace('top: "y"', 'top: "t"') + "\n")
    changed, _ = lra.apply(lra.make_plan(model, scheme="pca", ranks=[4]), model)
    assert train.replace('top: "y"', 'top: "t"') in changed.net.text


def test_7_no_data_base_is_needed(tmp_path: Path) -> None:
    source = nets.SMALL.replace("input_param", "data_param").replace('type: "Input"', 'type: "Data"')
    source = source.replace(
        "{ shape { dim: 2 dim: 3 dim: 12 dim: 12 } }", '{ source: "not_there" batch_size: 2 }'
    )
    weights = nets.files(tmp_path)[1]
    (tmp_path / "train.prototxt").write_text(source)
    arguments = ["decompose", str(tmp_path / "train.prototxt"), weights, "-o", str(tmp_path / "new")]
    assert main([*arguments, "--energy", "0.5"]) == 0
    assert "conv1_lowrank" in cp.load(tmp_path / "new.prototxt", tmp_path / "new.caffemodel").weights  # type: ignore[operator]


def test_7_the_basic_path_needs_no_framework(tmp_path: Path) -> None:
    program = (
        "import sys; from lra.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or bool({'caffe', 'matplotlib', 'sklearn', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    arguments = ["decompose", *nets.files(tmp_path), "-o", str(tmp_path / "new"), "--energy", "0.5"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, cwd=ROOT, capture_output=True)


def test_8_no_layer_gets_slower() -> None:
    model = nets.model(nets.SMALL)
    plan = lra.make_plan(model, scheme="pca", energy=1.0)
    assert plan.layers == {} and all(
        "MACs a position" in plan.kept[name] for name in ("conv1", "conv2", "conv3")
    )


def test_8_cost_and_error_are_reported_and_a_budget_can_be_asked_for() -> None:
    model = nets.model(nets.SMALL)
    _, report = lra.apply(lra.make_plan(model, speedup=1.6, round_to=4), model)
    assert report.macs[0] / report.macs[1] >= 1.6
    assert report.params[1] < report.params[0]
    assert all(row.error is not None and 0 < row.error < 1 and row.ranks[0] % 4 == 0 for row in report.rows)


def test_8_layers_do_not_all_get_the_same_share() -> None:
    """A layer whose filters span two directions gives up more than one of random filters."""
    source = one("num_output: 32 kernel_size: 3 bias_term: false pad: 1") + (
        'layer { name: "d" type: "Convolution" bottom: "y" top: "z" '
        "convolution_param { num_output: 32 kernel_size: 3 bias_term: false pad: 1 } }\n"
    )
    model = nets.model(source)
    assert model.weights is not None
    rng = np.random.default_rng(0)
    flat = (rng.standard_normal((32, 2)) @ rng.standard_normal((2, 72))).reshape(32, 8, 3, 3)
    blobs = {"c": flat.astype(np.float32), "d": model.weights["d"][0]}
    model = Model(model.net, Weights([NewEntry(name, (blob,)) for name, blob in blobs.items()]))
    plan = lra.make_plan(model, scheme="pca", speedup=1.5)
    assert 2 <= plan.layers["c"].ranks[0] <= 4 and plan.layers["d"].ranks[0] > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--scheme", "pca", "--ranks", "17,4,4"],
            'layer "conv1": rank 17 is above the largest possible, 16',
        ),
        (["--scheme", "pca", "--ranks", "4,4"], "2 ranks for 3 layers"),
        (["--scheme", "pca", "--ranks", "4,4,4,4"], "4 ranks for 3 layers"),
        (["--scheme", "magic", "--ranks", "4,4,4"], "'magic' is not one of"),
    ],
)
def test_9_wrong_use_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["decompose", *nets.files(tmp_path), "-o", str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("new*"))


def test_9_unknown_names_in_json_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ranks.json").write_text(json.dumps({"conv1": 4, "convl": 4}))
    arguments = ["decompose", *nets.files(tmp_path), "-o", str(tmp_path / "new")]
    assert main([*arguments, "--rank-config", str(tmp_path / "ranks.json")]) == 2
    assert 'there is no layer "convl"' in capsys.readouterr().err


def degenerate(values: list[float]) -> Model:
    """A convolution of eight filters with these singular values."""
    rng = np.random.default_rng(3)
    left = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    right = np.linalg.qr(rng.standard_normal((72, 8)))[0].T
    weight = (left * values) @ right
    source = one("num_output: 8 kernel_size: 3 bias_term: false")
    return Model(
        net.parse(source), Weights([NewEntry("c", (weight.reshape(8, 8, 3, 3).astype(np.float32),))])
    )


@pytest.mark.parametrize("values", [[2.0] * 8, [3.0, 3.0, 3.0, 1, 1, 1, 1, 1], [1.0, 1, 1, 0, 0, 0, 0, 0]])
def test_10_equal_and_zero_singular_values(values: list[float]) -> None:
    model = degenerate(values)
    changed, _ = lra.apply(Plan({"c": LayerPlan("pca", (8,))}), model)
    assert same_output(model, changed)
    assert changed.weights is not None
    mixing = changed.weights["c_linear"][0].reshape(8, 8).astype(float)
    assert np.allclose(mixing.T @ mixing, np.eye(8), atol=1e-6)


def test_10_energy_one_neither_stops_early_nor_late() -> None:
    for values, rank in (([4.0, 3, 2, 1, 0, 0, 0, 0], 4), ([1.0] * 8, 8), ([1.0, 1e-3, 0, 0, 0, 0, 0, 0], 2)):
        plan = lra.make_plan(degenerate(values), scheme="pca", energy=1 - 1e-10, even_if_slower=True)
        assert plan.layers["c"].ranks == (rank,)


def test_10_small_directions_are_not_lost() -> None:
    """Rank 7 of values down to 1e-4 drops the smallest alone; a Gram matrix in float32 would not see it."""
    values = [1.0, 1.0, 1e-1, 1e-2, 1e-3, 4e-4, 2e-4, 1e-4]
    _, report = lra.apply(Plan({"c": LayerPlan("pca", (7,))}), degenerate(values))
    assert report.rows[0].error == pytest.approx(1e-4 / np.linalg.norm(values), rel=1e-2)


def test_10_kmeans_gives_the_same_twice() -> None:
    made = [
        lra.apply(Plan({"conv1": LayerPlan("kmeans", (5,))}), nets.model(nets.SMALL))[0] for _ in range(2)
    ]
    first, second = (nets.stored(one) for one in made)
    assert first.keys() == second.keys() and "conv1_lowrank" in first
    assert all(np.array_equal(first[name][0], second[name][0]) for name in first)


def test_10_one_number_a_filter() -> None:
    """C * H * W == 1, on which the covariance of the published tool is undefined."""
    model = nets.model(one("num_output: 6 kernel_size: 1", shape=(1, 1, 4, 4)))
    changed, report = lra.apply(lra.make_plan(model, scheme="pca", energy=0.95, even_if_slower=True), model)
    assert report.rows[0].ranks == (1,) and same_output(model, changed)


def test_11_no_bias_and_batch_normalisation() -> None:
    source = one("num_output: 8 kernel_size: 3 bias_term: false") + (
        'layer { name: "bn" type: "BatchNorm" bottom: "y" top: "y" }\n'
        'layer { name: "scale" type: "Scale" bottom: "y" top: "y" scale_param { bias_term: true } }\n'
    )
    model = nets.model(source)
    assert model.weights is not None
    entries = [
        NewEntry(name, tuple(np.abs(blob) + np.float32(0.5) for blob in model.weights[name]))
        for name in ("bn", "scale")
    ]
    model = Model(model.net, model.weights.replace({entry.name: [entry] for entry in entries}))
    changed, _ = lra.apply(Plan({"c": LayerPlan("spatial", (24,))}), model)
    assert changed.weights is not None and len(changed.weights["c_h"]) == 1
    assert same_output(model, changed)


@pytest.mark.parametrize("axis", ["", "axis: 2", "axis: -2"])
def test_12_transposed_fully_connected_layers(axis: str) -> None:
    source = nets.inputs(data=(2, 3, 4, 5)) + (
        'layer { name: "ip" type: "InnerProduct" bottom: "data" top: "y" '
        f"inner_product_param {{ num_output: 7 transpose: true {axis} }} }}\n"
    )
    model = nets.model(source)
    changed, report = lra.apply(
        lra.make_plan(model, scheme="pca", energy=1.0, fc=True, even_if_slower=True), model
    )
    assert same_output(model, changed)
    assert report.rows[0].full_rank == 7 and report.macs[0] < report.macs[1]


def test_13_groups_without_bias_can_be_cut_again() -> None:
    """The first half of a chain, which has groups and no bias, is a layer like any other."""
    model = nets.model(nets.SMALL)
    once, _ = lra.apply(Plan({"conv2": LayerPlan("pca", (12,))}), model)
    again, _ = lra.apply(Plan({"conv2_lowrank": LayerPlan("pca", (12,))}), once)
    assert same_output(once, again)


def test_plan_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"conv1": "x"}')
    with pytest.raises(PlanError, match=r"p\.json: layer \"conv1\""):
        Plan.from_json((tmp_path / "p.json").read_text(), tmp_path / "p.json")
