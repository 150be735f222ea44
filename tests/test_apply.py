"""A plan made on a deploy net carried to its train_val: structure, weights, settings, phases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import caffe_proto as cp
import lra
from caffe_proto.errors import PlanError
from caffe_proto.model import Model
from caffe_proto.net import Layer, parse
from lra.applier import apply
from lra.cli import STYLE_NAMES, main
from lra.styles import STYLES

LENET = Path(__file__).resolve().parents[1] / "models" / "lenet"
WEIGHTS = LENET / "lenet.caffemodel"
SHAPES = {"data": (3, 1, 28, 28), "label": (3,)}


def plan() -> lra.Plan:
    config = {"conv1": {"scheme": "pca", "rank": 6}, "conv2": {"scheme": "spatial", "rank": 17}, "ip1": 32}
    return lra.make_plan(cp.load(LENET / "lenet.prototxt", WEIGHTS), rank_config=config)


def forward(model: Model, feeds: dict[str, np.ndarray], blob: str) -> np.ndarray:
    with cp.session(model, blobs=[blob], threads=1) as opened:
        return opened.run(feeds)[blob]


@pytest.mark.parametrize("phase", ["TEST", "TRAIN"])
def test_the_train_val_computes_what_the_decomposed_deploy_net_does(phase: str) -> None:
    deploy, _ = apply(plan(), cp.load(LENET / "lenet.prototxt", WEIGHTS))
    carried, report = apply(
        plan(), cp.load(LENET / "lenet_train_val.prototxt", WEIGHTS, phase=phase), sibling=True
    )
    x = np.random.default_rng(0).random((3, 1, 28, 28), np.float32)
    np.testing.assert_array_equal(forward(carried, {"data": x}, "ip2"), forward(deploy, {"data": x}, "ip2"))
    assert [row.name for row in report.rows] == ["conv1", "conv2", "ip1"]


def test_the_loss_can_be_computed_where_fine_tuning_starts() -> None:
    carried, _ = apply(plan(), cp.load(LENET / "lenet_train_val.prototxt", WEIGHTS), sibling=True)
    x = np.random.default_rng(0).random((3, 1, 28, 28), np.float32)
    feeds = {"data": x, "label": np.array([1, 2, 3], np.float32)}
    scores = forward(carried, {"data": x}, "ip2").astype(np.float64)
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    probability = shifted / shifted.sum(axis=1, keepdims=True)
    expected = -np.log(probability[[0, 1, 2], [1, 2, 3]]).mean()
    assert forward(carried, feeds, "loss") == pytest.approx(expected, rel=1e-5)


def test_settings_and_phases_are_kept_and_the_rest_stays_byte_for_byte() -> None:
    model = cp.load(LENET / "lenet_train_val.prototxt")
    carried, _ = apply(plan(), model, sibling=True)
    before = {layer.name: layer for layer in model.net.all_layers}
    made = {f"{name}{suffix}": name for name in ("conv1", "ip1") for suffix in ("_lowrank", "_linear")}
    made |= {"conv2_v": "conv2", "conv2_h": "conv2"}
    for layer in carried.net.all_layers:
        if layer.name in made:
            old = before[made[layer.name]]
            assert layer.param_specs == old.param_specs[: 2 if layer.name.endswith(("_linear", "_h")) else 1]
            assert "weight_filler" in block(layer, carried)
    untouched = [block(layer, model) for layer in model.net.all_layers if layer.name not in made.values()]
    assert [block(layer, carried) for layer in carried.net.all_layers if layer.name not in made] == untouched
    assert carried.weights is None


def block(layer: Layer, model: Model) -> str:
    return model.net.text[slice(*layer.span)]


SIDE = """
layer { name: "side" type: "Convolution" bottom: "pool1" top: "side" include { phase: TRAIN }
  convolution_param { num_output: 8 kernel_size: 3 } }
"""


def test_layers_of_the_other_phase_are_found() -> None:
    model = Model(parse((LENET / "lenet_train_val.prototxt").read_text() + SIDE))
    assert model.net.state.phase == "TEST"
    side = lra.Plan.from_json('{"side": {"scheme": "pca", "rank": 4}}')
    carried, report = apply(side, model, sibling=True)
    names = [layer.name for layer in carried.net.all_layers]
    assert names[-2:] == ["side_lowrank", "side_linear"]
    assert [row.macs for row in report.rows] == [None]


def test_other_weights_are_refused_unless_forced(tmp_path: Path) -> None:
    other = tmp_path / "other.caffemodel"
    other.write_bytes(WEIGHTS.read_bytes() + b"\xa0\x06\x00")
    with pytest.raises(PlanError, match="made for another weights file"):
        apply(plan(), cp.load(LENET / "lenet_train_val.prototxt", other), sibling=True)
    apply(plan(), cp.load(LENET / "lenet_train_val.prototxt", other), sibling=True, force=True)


def test_a_plan_of_another_net_names_the_missing_layer() -> None:
    with pytest.raises(PlanError, match='"conv9", which is no convolution'):
        apply(
            lra.Plan.from_json('{"conv9": {"scheme": "pca", "rank": 2}}'),
            cp.load(LENET / "lenet.prototxt"),
            sibling=True,
        )


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "p.plan.json"
    source.write_text(plan().to_json())
    net, out = str(LENET / "lenet_train_val.prototxt"), tmp_path / "out"
    assert main(["apply", str(source), net, str(WEIGHTS), "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["files"]) == {"prototxt", "caffemodel", "plan"}
    assert cp.load(out.with_suffix(".prototxt"), out.with_suffix(".caffemodel")).weights is not None
    bare = tmp_path / "bare"
    assert main(["apply", str(source), net, "-o", str(bare)]) == 0
    assert sorted(path.name for path in tmp_path.glob("bare*")) == ["bare.plan.json", "bare.prototxt"]
    assert bare.with_suffix(".prototxt").read_bytes() == out.with_suffix(".prototxt").read_bytes()


def test_bare_ranks_and_styles_on_the_command_line(tmp_path: Path) -> None:
    ranks = tmp_path / "config.json"
    ranks.write_text('{"conv2": 10}')
    net = str(LENET / "lenet_train_val.prototxt")
    assert (
        main(["apply", str(ranks), net, "-o", str(tmp_path / "a"), "--scheme", "spatial", "--style", "he"])
        == 0
    )
    text = (tmp_path / "a.prototxt").read_text()
    assert '"conv2_V"' in text and '"conv2_H"' in text and "kernel_h: 5" in text
    assert main(["apply", str(ranks), net, "-o", str(tmp_path / "b")]) == 0
    assert '"conv2_lowrank"' in (tmp_path / "b.prototxt").read_text()


def test_the_styles_offered_are_those_there_are() -> None:
    assert list(STYLES) == STYLE_NAMES


IGNORED = [
    (["--energy", "0.9", "--scope", "conv"], "--scope only goes with --speedup"),
    (["--speedup", "2", "--even-if-slower"], "--even-if-slower does not go with --speedup"),
    (["--energy", "0.9", "--force"], "--force only goes with --plan"),
    (["--scheme", "pca", "--ranks", "5,6", "--round-to", "4"], "--round-to does not go with ranks"),
    (["--plan", "PLAN", "--scheme", "pca"], "--scheme does not go with a plan"),
    (["--plan", "PLAN", "--only", "conv1"], "--only does not go with a plan"),
    (["--plan", "PLAN", "--style", "tai"], "--style does not go with a plan"),
]


@pytest.mark.parametrize(("options", "words"), IGNORED)
def test_no_option_is_ignored(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "p.json"
    source.write_text(plan().to_json())
    given = [str(source) if option == "PLAN" else option for option in options]
    net = [str(LENET / "lenet.prototxt"), str(WEIGHTS)]
    assert main(["decompose", *net, "-o", str(tmp_path / "out"), *given]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_a_rank_file_is_never_overwritten_by_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "out.plan.json"
    source.write_text('{"conv2": 10}')
    net = str(LENET / "lenet_train_val.prototxt")
    assert main(["apply", str(source), net, "-o", str(tmp_path / "out")]) == 2
    assert "is an input" in capsys.readouterr().err
    assert source.read_text() == '{"conv2": 10}'
