"""What times are set beside: layers and their chains by name, MACs, other engines, narrower numbers.

No test depends on how long anything takes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest

import caffe_proto as cp
import lra
from caffe_proto import latency, quantize
from caffe_proto.errors import UsageError
from caffe_proto.latency import Gain, LayerTime, Subject, gains, replaced
from caffe_proto.onnx_export import Request, export_onnx
from caffe_proto.runtime import Engine, open_onnx
from caffe_proto.why import Cause
from lra.cli import main

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
QUICK = ("--runs", "2", "--warmup", "1", "--threads", "1")
LENET = Path(__file__).resolve().parents[1] / "models" / "lenet"


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What a command prints, or the one line that it refuses with."""
    capsys.readouterr()
    assert main(arguments) == status
    out, err = capsys.readouterr()
    if status:
        assert err.count("\n") == 1 and out == ""
    else:
        assert err == ""
    return err if status else out


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    nets.files(tmp_path)
    return "net.prototxt", "net.caffemodel"


# layers and what stands for them


def test_chains_find_the_layer_they_stand_for() -> None:
    first = ["conv1", "conv1_2", "conv2", "conv2_relu", "fc", "old"]
    second = [
        "conv1",
        "conv1_2_v",
        "conv1_2_h",
        "conv2_lowrank",
        "conv2_linear",
        "conv2_relu",
        "fc_P",
        "new_v",
    ]
    assert replaced(first, second) == {
        "conv1": "conv1",
        "conv1_2_v": "conv1_2",  # not of conv1, which is still there
        "conv1_2_h": "conv1_2",
        "conv2_lowrank": "conv2",
        "conv2_linear": "conv2",
        "conv2_relu": "conv2_relu",
        "fc_P": "fc",
    }
    assert replaced(["a", "a_b"], ["a_v", "a_b_v"]) == {"a_v": "a", "a_b_v": "a_b"}


@pytest.mark.parametrize("style", ["default", "wen", "tai", "he", "girshick"])
def test_every_style_is_matched(style: str) -> None:
    model = nets.model(nets.SMALL)
    plan = lra.make_plan(model, energy=0.6, scheme="spatial", even_if_slower=True, style=style)
    changed = lra.apply(plan, model)[0]
    names = [layer.name for layer in changed.net.layers]
    owners = replaced([layer.name for layer in model.net.layers], names)
    assert set(names) == set(owners)
    for name in plan.layers:
        assert sorted(owners.values()).count(name) == 2


def test_gains_by_layer_add_up() -> None:
    first = Subject("A", b"", macs={"conv": 600, "relu": 0, "fc": 100, "gone": 50})
    second = Subject("B", b"", macs={"conv_v": 100, "conv_h": 200, "relu": 0, "fc": 100})
    before = [LayerTime("conv", "Conv", 6.0), LayerTime("relu", "Relu", 1.0), LayerTime("fc", "Gemm", 2.0)]
    before.append(LayerTime("gone", "Conv", 0.5))
    after = [
        LayerTime("conv_v", "Conv", 1.0),
        LayerTime("conv_h", "Conv", 3.0),
        LayerTime("Reorder", "ReorderInput", 0.25),
        LayerTime("relu", "Relu", 1.0),
        LayerTime("fc", "Gemm", 1.0),
    ]
    found = gains(first, second, before, after)
    assert found == [
        Gain("conv", (6.0, 4.0), (600, 300), (Cause("unexplained", 1.0, ""),)),  # 6 / 2 ms would be left
        Gain("fc", (2.0, 1.0), (100, 100)),
        Gain("", (1.5, 1.25), (50, 0)),
    ]
    assert (found[0].measured, found[0].arithmetic, found[0].efficiency) == (1.5, 2.0, 0.75)
    assert found[2].arithmetic is None and found[2].efficiency is None
    assert sum(row.ms[0] for row in found) == 9.5 and sum(row.ms[1] for row in found) == 6.25


def test_macs_are_those_of_the_batch_that_is_timed(files: tuple[str, str]) -> None:
    one = latency.subject(files[0], batch=3, seed=0)
    model = cp.load(files[0])
    counted = cp.cost(model)  # the net's own batch is 2
    assert 2 * one.total_macs == 3 * counted.macs
    assert {name: macs for name, macs in one.macs.items() if macs}.keys() == {
        "conv1",
        "conv2",
        "conv3",
        "ip1",
    }


def test_the_command_sets_times_beside_macs(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "decompose", *files, "-o", "new", "--energy", "0.5", "--scheme", "spatial")
    report = json.loads(
        run(capsys, "decompose", *files, "-o", "new", "--energy", "0.5", "--scheme", "spatial", "--json")
    )
    pair = ("net.prototxt,net.caffemodel", "new.prototxt,new.caffemodel")
    found = json.loads(run(capsys, "time", *pair, "--profile", *QUICK, "--json"))["models"]
    assert found[1]["arithmetic"] == pytest.approx(report["speedup"]["macs"])
    assert found[1]["efficiency"] == pytest.approx(found[1]["ratio"] / found[1]["arithmetic"])
    rows = {row["name"]: row for row in found[1]["gains"]}
    for layer in report["layers"]:
        assert rows[layer["name"]]["macs"] == layer["macs"]
        assert rows[layer["name"]]["arithmetic"] == pytest.approx(layer["macs"][0] / layer["macs"][1])
    for side in (0, 1):
        total = sum(row["ms"] for row in found[side]["layers"])
        assert sum(row["ms"][side] for row in rows.values()) == pytest.approx(total)
    table = run(capsys, "time", *pair, "--profile", *QUICK)
    assert "efficiency" in table.splitlines()[0] and "(the rest)" in table
    alone = run(capsys, "time", "net.prototxt", *QUICK)
    assert "efficiency" not in alone


# packages


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (["onnxruntime"], "GPUs need the package onnxruntime-gpu in the place of onnxruntime"),
        (["onnxruntime", "onnxruntime-gpu"], "both installed and overwrite one another"),
        (["onnxruntime-gpu"], "must fit the driver"),
    ],
)
def test_a_gpu_that_does_not_run_names_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, str],
    capsys: pytest.CaptureFixture[str], installed: list[str], said: str,
) -> None:  # fmt: skip
    """Packages as the interpreter finds them, and a net that is asked for a GPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    for name in installed:
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-9.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert said in run(capsys, "time", files[0], "--provider", "cuda", *QUICK, status=2)


# torch


@needs_torch
def test_torch_times_the_same_nets(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    models = ["net.prototxt", "net.prototxt,net.caffemodel"]
    found = json.loads(run(capsys, "time", *models, "--engine", "torch", "--batch", "3", *QUICK, "--json"))
    assert [row["model"] for row in found["models"]] == models and found["device"] == "cpu"
    assert {row["macs"] for row in found["models"]} == {latency.subject(files[0], batch=3, seed=0).total_macs}
    assert "torch" in found and "onnxruntime" not in found
    assert "torch " in run(capsys, "time", *models, "--engine", "torch", *QUICK)


@needs_torch
def test_torch_computes_what_is_timed(files: tuple[str, str]) -> None:
    from caffe_proto.torch_time import TorchSubject

    one = TorchSubject(",".join(files), "cpu", batch=None, seed=0)
    made = one.run()["prob"].numpy()
    with cp.session(cp.load(*files)) as opened:
        expected = opened.run({"data": one.feeds["data"].numpy()})["prob"]
    assert np.abs(made - expected).max() < 1e-5


@needs_torch
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--engine", "torch", "--provider", "cpu"), "--provider does not go with --engine torch"),
        (("--engine", "torch", "--profile"), "--profile does not go with --engine torch"),
        (("--engine", "torch", "--dtype", "fp16"), "--dtype does not go with --engine torch"),
        (("--device", "cpu"), "--device only goes with --engine torch"),
        (("--engine", "torch", "--device", "abacus"), 'torch cannot use the device "abacus"'),
    ],
)
def test_options_of_the_other_engine_are_refused(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert said in run(capsys, "time", files[0], *more, status=2)


@needs_torch
def test_torch_runs_no_onnx(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch cannot run ONNX files" in run(capsys, "time", "net.onnx", "--engine", "torch", status=2)


# narrower numbers


def forward(made: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = open_onnx(made.SerializeToString(), Engine(1)).run(None, feeds)[0]
    return found


def scores(made: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What goes into the last Softmax."""
    return np.log(np.maximum(forward(made, feeds), 1e-30))


@pytest.mark.parametrize(("dtype", "tolerance", "size"), [("fp16", 2e-3, 2), ("int8", 0.1, 4)])
def test_narrow_models_give_nearly_the_same_in_less_room(dtype: str, tolerance: float, size: int) -> None:
    made = export_onnx(cp.load(LENET / "lenet.prototxt", LENET / "lenet.caffemodel"), Request(batch=8))
    before = made.SerializeToString()
    rng = np.random.default_rng(0)
    batches = [{"data": rng.uniform(0, 1, (8, 1, 28, 28)).astype(np.float32)} for _ in range(4)]
    narrow = quantize.narrowed(made, dtype, batches)
    assert made.SerializeToString() == before
    assert narrow.ByteSize() < 1.1 * len(before) / size
    for one, other in zip(
        (*made.graph.input, *made.graph.output), (*narrow.graph.input, *narrow.graph.output), strict=True
    ):
        assert one == other
    feeds = {"data": rng.uniform(0, 1, (8, 1, 28, 28)).astype(np.float32)}
    expected, found = scores(made, feeds), scores(narrow, feeds)
    apart = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < apart < tolerance


def test_ranges_come_from_the_images() -> None:
    """Ranges of images a hundred times darker clip the others."""
    made = export_onnx(cp.load(LENET / "lenet.prototxt", LENET / "lenet.caffemodel"), Request(batch=4))
    rng = np.random.default_rng(0)
    feeds = {"data": rng.uniform(0, 1, (4, 1, 28, 28)).astype(np.float32)}
    dark = {"data": feeds["data"] / 100}
    expected = scores(made, feeds)
    apart = [
        np.linalg.norm(scores(quantize.narrowed(made, "int8", [one]), feeds) - expected)
        for one in (feeds, dark)
    ]
    assert apart[1] > 5 * apart[0]


def test_batches_are_filled() -> None:
    made = export_onnx(nets.model(nets.SMALL))  # a batch of two
    images = [np.full((3, 12, 12), i, np.float32) for i in range(3)]
    found = [batch["data"][:, 0, 0, 0].tolist() for batch in quantize.batches_for(made, images)]
    assert found == [[0, 1], [2, 2]]


def test_eight_bits_need_images() -> None:
    made = export_onnx(nets.model(nets.SMALL))
    with pytest.raises(UsageError, match="8 bits need"):
        quantize.narrowed(made, "int8")


def test_images_for_one_input_only() -> None:
    source = nets.inputs(a=(1, 3, 4, 4), b=(1, 3, 4, 4)) + (
        'layer { name: "s" type: "Eltwise" bottom: "a" bottom: "b" top: "s" }\n'
    )
    made = export_onnx(nets.model(source))
    with pytest.raises(UsageError, match="the net has the inputs a, b"):
        list(quantize.batches_for(made, [np.zeros((3, 4, 4), np.float32)]))


@pytest.mark.parametrize("baked", [False, True])
def test_export_quantizes_with_images_as_the_net_wants_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], baked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is baked in is not done to the images a second time: both ways agree with the net in full numbers."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 1, 28, 28)).astype(np.uint8)
    np.savez("images.npz", x=pixels)
    text = (LENET / "lenet.prototxt").read_text()
    marked = text.replace('type: "Input"', 'type: "Input" transform_param { scale: 0.00390625 }', 1)
    assert marked != text
    Path("net.prototxt").write_text(marked)
    how = ["--preprocess"] if baked else []
    for name, more in (("full.onnx", []), ("small.onnx", ["--dtype", "int8", "--images", "images.npz"])):
        run(
            capsys,
            "export",
            "net.prototxt",
            str(LENET / "lenet.caffemodel"),
            "-o",
            name,
            "--batch",
            "12",
            *how,
            *more,
        )
    feeds = {"data": pixels.astype(np.float32) * (1 if baked else 0.00390625)}
    full, small = (scores(onnx.load(name), feeds) for name in ("full.onnx", "small.onnx"))
    assert 0 < np.linalg.norm(small - full) / np.linalg.norm(full) < 0.1
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load("small.onnx").graph.node)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--dtype", "int8"), "go together"),
        (("--images", "x.npz"), "go together"),
        (("--dtype", "fp16", "--images", "x.npz"), "go together"),
        (("--root", "x"), "--root only goes with --images"),
        (("--n-images", "3"), "--n-images only goes with --images"),
    ],
)
def test_export_refuses_what_it_would_ignore(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert said in run(capsys, "export", *files, "-o", "x.onnx", *more, status=2)
    assert not Path("x.onnx").exists()


def test_rows_of_several_dtypes(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "export", *files, "-o", "net.onnx")
    asked = ("--dtype", "fp32", "--dtype", "fp16", "--dtype", "int8")
    found = json.loads(run(capsys, "time", "net.prototxt", "net.onnx", *asked, *QUICK, "--json"))
    names = [row["model"] for row in found["models"]]
    assert names == [
        f"{net}{label}" for net in ("net.prototxt", "net.onnx") for label in ("", " [fp16]", " [int8]")
    ]
    Path("bad.onnx").write_bytes(b"no model")
    assert "bad.onnx: is no ONNX model" in run(
        capsys, "time", "bad.onnx", "--dtype", "fp16", *QUICK, status=2
    )
