"""Two nets beside each other: what is the same, what changed, what a decomposition put in a layer's place."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import nets
import numpy as np
import pytest

import lra
from caffe_proto import load, net
from caffe_proto.cli_nets import recompose
from caffe_proto.diff import Difference, Row, diff
from caffe_proto.errors import NetError, UsageError, WeightsError
from caffe_proto.graph import build
from caffe_proto.model import Model, save
from lra.cli import main

ROOT = Path(__file__).resolve().parents[1]
LENET = ROOT / "models" / "lenet"
PUBLISHED = nets.SHARED / "published"
ZOO = nets.SHARED / "oracle" / "zoo"

V2 = """\
name: "v2"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 12 dim: 12 } } }
layer {
  name: "conv" type: "Convolution" bottom: "data" top: "conv"
  param { name: "w" lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  convolution_param { num_output: 4 kernel_h: 3 kernel_w: 3 stride: 1 pad: 0 dilation: 1 weight_filler { type: "xavier" } }
}
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { kernel_size: 2 stride_h: 2 stride_w: 2 pool: 0 } }
layer { name: "drop" type: "Dropout" bottom: "pool" top: "pool" dropout_param { dropout_ratio: 0.5 } }
layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip" inner_product_param { num_output: 5 bias_term: true } }
layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" }
"""
V1 = """\
name: "v1"
input: "data"
input_dim: 2
input_dim: 3
input_dim: 12
input_dim: 12
layers {
  name: "conv" type: CONVOLUTION bottom: "data" top: "c"
  param: "w" param: "" blobs_lr: 1 blobs_lr: 2 weight_decay: 1 weight_decay: 0
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } }
}
layers { name: "pool" type: POOLING bottom: "c" top: "pool" pooling_param { pool: MAX kernel_size: 2 stride: 2 } }
layers { name: "drop" type: DROPOUT bottom: "pool" top: "pool" }
layers { name: "ip" type: INNER_PRODUCT bottom: "pool" top: "ip" inner_product_param { num_output: 5 } }
layers { name: "prob" type: SOFTMAX bottom: "ip" top: "prob" }
""".replace('top: "c"', 'top: "conv"').replace('bottom: "c"', 'bottom: "conv"')


def compared(a: str, b: str) -> Difference:
    """Two nets given as text."""
    return diff(Model(net.parse(a)), Model(net.parse(b)))


def edited(old: str, new: str) -> dict[str, Row]:
    """What becomes of V2 by an edit: the rows that are not the same."""
    assert old in V2
    return differing(compared(V2, V2.replace(old, new)))


def differing(found: Difference) -> dict[str, Row]:
    """The rows that are not the same, by name."""
    return {row.name: row for row in found.rows if row.status != "same"}


def test_v1_is_its_v2_form() -> None:
    for a, b in ((V1, V2), (V2, V1)):
        found = compared(a, b)
        assert [(row.status, row.summary()) for row in found.rows] == [("same", "")] * 6
        assert found.equal(training=True)


@pytest.mark.parametrize(
    ("old", "new", "name", "said"),
    [
        ("num_output: 4", "num_output: 6", "conv", "num_output: 4 -> 6"),
        ("stride: 1", "stride: 2", "conv", "stride: 1 -> 2"),
        ("pad: 0", "pad_h: 1", "conv", "pad: 0 -> 1x0"),
        ("kernel_w: 3", "kernel_w: 1", "conv", "kernel_size: 3 -> 3x1"),
        ("pool: 0", "pool: AVE", "pool", "pool: MAX -> AVE"),
        ("bias_term: true", "bias_term: false", "ip", "bias_term: true -> false"),
        ("bias_term: true", "axis: 2", "ip", "axis: 1 -> 2"),
        ('name: "w"', "", "conv", "param[0].name: w -> -"),
        ('"Softmax"', '"Sigmoid"', "prob", "type: Softmax -> Sigmoid"),
        ('top: "prob"', 'top: "p"', "prob", "top: prob -> p"),
        (
            'type: "InnerProduct" bottom: "pool"',
            'type: "InnerProduct" bottom: "conv"',
            "ip",
            "bottom: pool -> conv",
        ),
        ("dim: 3 dim: 12", "dim: 3 dim: 13", "data", "shape: 3 x 12 x 12 -> 3 x 13 x 12"),
        ("num_output: 5", "num_output: 5 novel_field: 7", "ip", "novel_field: - -> 7"),
    ],
)
def test_changed_fields(old: str, new: str, name: str, said: str) -> None:
    rows = edited(old, new)
    assert (rows[name].status, rows[name].summary()) == ("changed", said)
    assert list(rows) == [name]


@pytest.mark.parametrize(
    ("old", "new", "name", "said"),
    [
        ("lr_mult: 2", "lr_mult: 3", "conv", "param[1].lr_mult: 2 -> 3"),
        ('"xavier"', '"msra"', "conv", "weight_filler.type: xavier -> msra"),
        ("ratio: 0.5", "ratio: 0.7", "drop", "dropout_param.dropout_ratio: 0.5 -> 0.7"),
        ('top: "prob"', 'top: "prob" include { phase: TEST }', "prob", "include[0].phase: - -> TEST"),
        ("dim: 2", "dim: 9", "data", "batch: 2 -> 9"),
        ("stride: 1", "stride: 1 engine: CAFFE", "conv", "engine: DEFAULT -> CAFFE"),
    ],
)
def test_training_settings_are_no_difference_unless_asked(old: str, new: str, name: str, said: str) -> None:
    found = compared(V2, V2.replace(old, new, 1))
    rows = differing(found)
    assert [(row.status, row.summary().replace("dropout_param.", "")) for row in rows.values()] == [
        ("training", said.replace("dropout_param.", ""))
    ]
    assert list(rows) == [name]
    assert found.equal() and not found.equal(training=True)
    assert len(set(found.totals("macs"))) == 1  # both at the batch of a


def test_layers_of_one_net_alone_and_what_reads_past_them() -> None:
    relu = 'layer { name: "relu" type: "ReLU" bottom: "conv" top: "relu" }\n'
    longer = V2.replace('layer { name: "pool"', relu + 'layer { name: "pool"').replace(
        'bottom: "conv"', 'bottom: "relu"'
    )
    longer = longer.replace('bottom: "relu" top: "relu"', 'bottom: "conv" top: "relu"')
    found = compared(V2, longer)
    assert [(row.name, row.status) for row in differing(found).values()] == [("relu", "only b")]
    assert [row.name for row in found.rows] == ["data", "conv", "relu", "pool", "drop", "ip", "prob"]
    assert [(row.name, row.status) for row in differing(compared(longer, V2)).values()] == [
        ("relu", "only a")
    ]


def test_renamed_layers() -> None:
    rows = differing(compared(V2, V2.replace('"conv"', '"c1"').replace('"ip"', '"fc"')))
    assert {name: (row.status, row.summary()) for name, row in rows.items()} == {
        "conv": ("renamed", "name: conv -> c1; top: conv -> c1"),
        "ip": ("renamed", "name: ip -> fc; top: ip -> fc"),
    }


def test_renamed_layers_may_write_defaults_or_not() -> None:
    renamed = V1.replace('name: "conv"', 'name: "c1"').replace('name: "ip"', 'name: "fc"')
    rows = differing(compared(renamed, V2))
    assert {name: (row.status, row.summary()) for name, row in rows.items()} == {
        "c1": ("renamed", "name: c1 -> conv"),
        "fc": ("renamed", "name: fc -> ip"),
    }


def test_layers_of_one_name_are_taken_in_order() -> None:
    twice = V2 + 'layer { name: "prob" type: "Sigmoid" bottom: "ip" top: "other" }\n'
    assert compared(twice, twice).equal(training=True)


@pytest.mark.parametrize("style", ["default", "wen", "tai", "he"])
@pytest.mark.parametrize("scheme", ["spatial", "pca", "kmeans"])
def test_decomposed_nets_of_every_style(style: str, scheme: str) -> None:
    before = nets.model(nets.SMALL)
    ranks = {"spatial": {"conv1": 5, "conv2": 6, "conv3": 7}}.get(
        scheme, {"conv1": 4, "conv2": 6, "conv3": 8, "ip1": 9}
    )
    plan = lra.make_plan(before, scheme=scheme, rank_config=ranks, fc=True, style=style, even_if_slower=True)
    after, report = lra.apply(plan, before)
    found = diff(before, after, recompose=recompose)
    rows = differing(found)
    assert {name: row.ranks for name, row in rows.items()} == {row.name: row.ranks for row in report.rows}
    assert {row.status for row in rows.values()} == {"decomposed"}
    for row in report.rows:
        assert rows[row.name].pair("macs") == row.macs
        assert rows[row.name].weights == pytest.approx(row.error, rel=1e-4)
    assert found.totals("macs") == report.macs
    assert found.totals("params") == report.params
    back = differing(diff(after, before))
    assert {name: row.ranks for name, row in back.items()} == {name: row.ranks for name, row in rows.items()}


def test_a_chain_is_known_by_its_place_too() -> None:
    chain = (
        'layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 2 kernel_h: 3 kernel_w: 1 } }\n'
        'layer { name: "b" type: "Convolution" bottom: "a" top: "conv" convolution_param { num_output: 4 kernel_h: 1 kernel_w: 3 } }\n'
    )
    start, end = V2.index('layer {\n  name: "conv"'), V2.index('layer { name: "pool"')
    whole = V2[:start] + chain + V2[end:]
    (row,) = differing(compared(V2, whole)).values()
    assert (row.status, row.summary()) == ("decomposed", "3x3x4 -> a 3x1x2 + b 1x3x4")
    assert row.ranks == (2,)
    wider = differing(
        compared(V2, whole.replace("kernel_w: 3", "kernel_w: 5"))
    )  # the chain computes another kernel
    assert "decomposed" not in {one.status for one in wider.values()}
    between = whole.replace(
        'layer { name: "b"', 'layer { name: "r" type: "ReLU" bottom: "a" top: "a" }\nlayer { name: "b"'
    )
    assert "decomposed" not in {one.status for one in differing(compared(V2, between)).values()}


def test_a_layer_that_is_the_same_is_not_decomposed() -> None:
    more = 'layer { name: "conv_more" type: "Convolution" bottom: "conv" top: "more" convolution_param { num_output: 4 kernel_size: 1 } }\n'
    longer = V2.replace('layer { name: "pool"', more + 'layer { name: "pool"')
    longer = longer.replace('"Pooling" bottom: "conv"', '"Pooling" bottom: "more"')
    assert [(row.name, row.status) for row in differing(compared(V2, longer)).values()] == [
        ("conv_more", "only b")
    ]


def dense_chain(name: str, bias: str = "") -> str:
    """Two fully connected layers in the place of V2's "ip"."""
    first = 'layer { name: "ip_a" type: "InnerProduct" bottom: "pool" top: "ip_a" inner_product_param { num_output: 2 } }\n'
    last = f'layer {{ name: "ip_b" type: "InnerProduct" bottom: "ip_a" top: "{name}" inner_product_param {{ num_output: 5 {bias} }} }}\n'
    return first + last


def test_the_bias_of_a_chain_is_that_of_its_end() -> None:
    line = next(line for line in V2.splitlines(True) if '"InnerProduct"' in line)
    (row,) = differing(compared(V2, V2.replace(line, dense_chain("ip", "bias_term: false")))).values()
    assert (row.status, row.summary()) == ("decomposed", "5 -> ip_a 2 + ip_b 5; bias_term: true -> false")


def test_a_chain_wins_over_another_layer_of_the_name() -> None:
    line = next(line for line in V2.splitlines(True) if '"InnerProduct"' in line)
    other = line.replace('top: "ip"', 'top: "else"').replace("num_output: 5", "num_output: 9")
    found = compared(V2, V2.replace(line, dense_chain("ip") + other))
    rows = [(row.status, [part.name for part in row.b]) for row in found.rows if row.status != "same"]
    assert sorted(rows) == [("decomposed", ["ip_a", "ip_b"]), ("only b", ["ip"])]


def test_transposed_weights_are_recomposed() -> None:
    before = nets.model(nets.SMALL.replace("num_output: 30", "num_output: 30 transpose: true"))
    plan = lra.make_plan(before, scheme="pca", rank_config={"ip1": 9}, fc=True, even_if_slower=True)
    after, report = lra.apply(plan, before)
    (row,) = differing(diff(before, after, recompose=recompose)).values()
    assert row.weights == pytest.approx(report.rows[0].error, rel=1e-4)


def test_conv10_is_no_part_of_conv1() -> None:
    line = next(line for line in V2.splitlines(True) if '"InnerProduct"' in line)
    other = V2.replace(line, dense_chain("else").replace("ip_a", "ip10").replace("ip_b", "ip11"))
    other = other.replace('bottom: "ip"', 'bottom: "else"').replace(
        'bottom: "pool" top: "ip10"', 'bottom: "conv" top: "ip10"'
    )
    assert "decomposed" not in {row.status for row in compared(V2, other).rows}


def test_weights() -> None:
    a, b = nets.model(nets.SMALL, 0), nets.model(nets.SMALL, 1)
    assert diff(a, a).equal() and {row.weights for row in diff(a, a).rows} == {None, 0.0}
    rows = differing(diff(a, b))
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(
        ("conv1", "conv2", "conv3", "ip1"), "weights"
    )
    assert a.weights is not None and b.weights is not None
    flat = [np.concatenate([blob.ravel() for blob in one["conv1"]]) for one in (a.weights, b.weights)]
    wanted = np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0])
    assert rows["conv1"].weights == pytest.approx(wanted, rel=1e-5)
    assert diff(a, Model(b.net)).equal()  # weights on one side alone are not compared
    with pytest.raises(WeightsError):
        diff(a, Model(b.net, nets.model(V2).weights))


def test_shapes_that_are_not_known() -> None:
    odd = 'layer { name: "data" type: "Python" top: "data" }\n' + V2.split("\n", 2)[2]
    found = compared(odd, odd)
    assert found.equal() and found.totals("macs") == (0, 0)
    assert {row.pair("macs") for row in found.rows} == {(None, None)}
    sized = (
        'layer { name: "data" type: "Data" top: "data" data_param { batch_size: 6 } }\n'
        + V2.split("\n", 2)[2]
    )
    found = compared(sized, V2)  # the size of the images is in the data: taken from the other net
    assert found.equal() and found.totals("macs")[0] == found.totals("macs")[1] > 0


def test_input_shapes() -> None:
    given = {"data": (4, 3, 22, 22)}
    a, b = Model(net.parse(V1)), Model(net.parse(V2))
    assert diff(a, b, given).rows[1].pair("macs") == (4 * 4 * 27 * 20 * 20,) * 2
    with pytest.raises(UsageError, match='"date" is an input of neither net; did you mean "data"'):
        diff(a, b, {"date": (1, 3, 12, 12)})


def test_settings_that_are_no_numbers_are_compared_as_they_stand() -> None:
    row = edited("num_output: 4", "num_output: many")["conv"]
    assert (row.status, row.summary()) == ("changed", "num_output: 4 -> many")


def test_command_on_a_decomposed_lenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load(LENET / "lenet.prototxt", LENET / "lenet.caffemodel")
    after, _ = lra.apply(lra.make_plan(before, scheme="spatial", energy=0.8), before)
    fast = f"{tmp_path}/fast.prototxt,{tmp_path}/fast.caffemodel"
    save(after, *fast.split(","))
    lenet = f"{LENET}/lenet.prototxt,{LENET}/lenet.caffemodel"
    assert main(["diff", lenet, fast]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        lines[1]
        == "~ conv1 5x5x20 -> conv1_v 5x1x3 + conv1_h 1x5x20 3 288,000 182,880 520 335 3.57e-01".split()
    )
    assert (
        lines[2]
        == "~ conv2 5x5x50 -> conv2_v 5x1x34 + conv2_h 1x5x50 34 1,600,000 870,400 25,050 11,950 4.44e-01".split()
    )
    assert lines[3:] == [
        ["total", "2,293,000", "1,458,280", "431,080", "417,795"],
        ["...", "7", "layers", "the", "same"],
        "different, MACs A / B 1.572x, parameters A / B 1.032x".split(),
    ]
    assert main(["diff", lenet, lenet, "--all"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in lines if line[0] in ("conv1", "ip2")] == ["equal", "equal"]
    assert len(lines) == 12


def test_command_json_and_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.prototxt", tmp_path / "b.prototxt"
    a.write_text(V2)
    b.write_text(V2.replace("lr_mult: 2", "lr_mult: 3"))
    assert main(["diff", str(a), str(b)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["t", "conv"]
    assert main(["diff", str(a), str(b), "--training"]) == 1
    capsys.readouterr()
    assert main(["diff", str(a), str(b), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["equal"] is True
    assert [row["status"] for row in document["rows"]] == ["same", "training", "same", "same", "same", "same"]
    assert document["rows"][1]["training"] == {"param[1].lr_mult": ["2", "3"]}
    assert document["rows"][1]["a"] == [{"name": "conv", "type": "Convolution", "shape": [2, 4, 10, 10]}]
    assert document["totals"]["macs"] == [sum(row["macs"][0] for row in document["rows"])] * 2
    assert main(["diff", str(a), str(tmp_path / "none.prototxt")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_colours_on_a_terminal_and_none_when_piped(tmp_path: Path) -> None:
    a, b = tmp_path / "a.prototxt", tmp_path / "b.prototxt"
    a.write_text(V2)
    b.write_text(
        V2.replace("num_output: 4", "num_output: 6").replace(
            'name: "prob" type: "Softmax"', 'name: "p" type: "TanH"'
        )
    )
    command = [sys.executable, "-m", "lra", "diff", str(a), str(b)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    piped = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert piped.returncode == 1
    assert "\x1b" not in piped.stdout
    leader, follower = pty.openpty()
    shown = subprocess.run(command, stdout=follower, stderr=subprocess.DEVNULL, env=environment)
    os.close(follower)
    output = os.read(leader, 100_000).decode()
    os.close(leader)
    assert shown.returncode == 1
    marks = {mark: colour for colour, mark in re.findall(r"\x1b\[(\d+)m([-+~]) ", output)}
    assert marks == {"-": "31", "+": "32", "~": "33"}


@nets.needs_shared
@pytest.mark.parametrize(
    ("before", "after", "config"),
    [
        ("vgg_deploy.prototxt", "vgg_lowrank_deploy.prototxt", "models_vgg"),
        ("caffenet_deploy.prototxt", "caffenet_lowrank_deploy.prototxt", "models_caffenet"),
    ],
)
def test_tai_nets_show_the_ranks_of_their_config(before: str, after: str, config: str) -> None:
    folder = PUBLISHED / "tai" / "imagenet" / config
    rows = differing(diff(load(folder / before), load(folder / after)))
    ranks = json.loads((folder / "config.json").read_text())
    assert {name: row.ranks for name, row in rows.items()} == {name: (rank,) for name, rank in ranks.items()}
    assert {row.status for row in rows.values()} == {"decomposed"}


@nets.needs_shared
@pytest.mark.parametrize(
    ("before", "after", "ranks"),
    [
        (
            "he_frcnn/VGG16/test.prototxt",
            "he_frcnn/VGG_ECD/test.prototxt",
            [11, 25, 28, 52, 46, 56, 104, 92, 100, 232, 224, 214],
        ),
        ("girshick/VGG_16/test.prototxt", "girshick/VGG_16/compressed/test.prototxt", [1024, 256]),
        (
            "wen/examples/mnist/lenet_train_test.prototxt",
            "wen/examples/mnist/lenet_train_test_fullrank.prototxt",
            [20, 50],
        ),
    ],
)
def test_published_decompositions(before: str, after: str, ranks: list[int]) -> None:
    rows = differing(diff(load(PUBLISHED / before), load(PUBLISHED / after))).values()
    assert [row.ranks for row in rows if row.status != "training"] == [(rank,) for rank in ranks]
    assert {row.status for row in rows} <= {"decomposed", "training"}


@nets.needs_shared
def test_real_caffes_upgrades_are_equal() -> None:
    """Nets that real Caffe's own tool brought to V2 mean what they meant, training settings included."""
    equal = 0
    for upgraded in ZOO.rglob("*.prototxt.upgraded"):
        before = load(upgraded.with_suffix(""))
        try:
            build(before.net)
        except NetError:  # a deploy net of the wild that reads a label which is not there
            continue
        assert diff(before, load(upgraded)).equal(training=True), upgraded
        equal += 1
    assert equal >= 20
