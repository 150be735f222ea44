"""The commands as a user types them: what they print and write, and what they say of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import onnxruntime
import pytest

import caffe_proto as cp
from caffe_proto import net, schema, wire
from caffe_proto.graph import build
from caffe_proto.model import Model, write_weights
from caffe_proto.shape_inference import infer
from caffe_proto.weights import NewEntry
from lra import Plan
from lra.cli import main
from lra.schemes import SCHEMES
from lra.targets import Spectra, find

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """net.prototxt and net.caffemodel, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    nets.files(tmp_path)
    return "net.prototxt", "net.caffemodel"


def ok(capsys: Capture, *arguments: str) -> str:
    """What a command prints; it must succeed and say nothing on stderr."""
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def ok_json(capsys: Capture, *arguments: str) -> Any:
    return json.loads(ok(capsys, *arguments, "--json"))


def snapshot() -> dict[str, bytes]:
    """The files below the present folder."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(capsys: Capture, *arguments: str) -> str:
    """The one line that a command refuses its input with; nothing may be written."""
    capsys.readouterr()
    before = snapshot()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("caffe-lra: error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert snapshot() == before
    return err


def decomposed(capsys: Capture, *options: str, out: str = "new") -> Any:
    """JSON of a decompose command on the small net."""
    return ok_json(capsys, "decompose", "net.prototxt", "net.caffemodel", "-o", out, *options)


def ranks(report: Any) -> dict[str, tuple[str, int]]:
    return {row["name"]: (row["scheme"], row["ranks"][0]) for row in report["layers"]}


# info


def test_info_table(files: tuple[str, str], capsys: Capture) -> None:
    lines = ok(capsys, "info", files[0]).splitlines()
    assert lines[0].split() == ["layer", "type", "output", "params", "MACs"]
    assert lines[2].split() == [*"conv1 Convolution 2 x 16 x 12 x 12 1,216 345,600".split()]
    cost = cp.cost(cp.load(files[0]))
    assert lines[-1].split() == ["total", f"{cost.params:,}", f"{cost.macs:,}"]
    assert len(lines) == 2 + len(cost.layers)


def test_info_json(files: tuple[str, str], capsys: Capture) -> None:
    found = ok_json(capsys, "info", files[0])
    shaped = infer(build(net.load(files[0])))
    for row, node in zip(found["layers"], shaped.graph.nodes, strict=True):
        assert set(row) == {"name", "type", "tops", "blobs", "params", "macs"}
        assert (row["name"], row["type"]) == (node.name, node.layer.type)
    conv2 = next(row for row in found["layers"] if row["name"] == "conv2")
    assert conv2["tops"] == [{"name": "conv2", "shape": [2, 24, 5, 5]}]
    assert conv2["blobs"] == [[24, 8, 3, 3], [24]]
    assert (conv2["params"], conv2["macs"]) == (24 * 72 + 24, 2 * 25 * 24 * 72)
    assert found["totals"] == {
        "params": sum(row["params"] for row in found["layers"]),
        "macs": sum(row["macs"] for row in found["layers"]),
    }


@pytest.mark.parametrize("energy", ["0.5", "0.95"])
def test_info_with_weights_adds_the_rank(files: tuple[str, str], capsys: Capture, energy: str) -> None:
    found = ok_json(capsys, "info", *files, "--energy", energy)
    model = find(cp.load(*files))
    expected = {
        name: Spectra(model).get(target, SCHEMES["pca"]).rank_for(float(energy))
        for name, target in model.targets.items()
    }
    assert {row["name"]: row["rank"] for row in found["layers"] if "rank" in row} == expected
    assert {row["name"]: row["full_rank"] for row in found["layers"] if "rank" in row} == {
        "conv1": 16, "conv2": 24, "conv3": 20, "ip1": 30,
    }  # fmt: skip
    table = ok(capsys, "info", *files, "--energy", energy)
    assert f"rank {energy}" in table.splitlines()[0] and f"{expected['conv1']}/16" in table


def test_info_of_another_shape(files: tuple[str, str], capsys: Capture) -> None:
    found = ok_json(capsys, "info", files[0], "--input-shape", "data=5,3,12,12")
    assert found["layers"][0]["tops"][0]["shape"] == [5, 3, 12, 12]


def test_info_of_a_phase(files: tuple[str, str], capsys: Capture) -> None:
    extra = 'layer { name: "t" type: "ReLU" bottom: "prob" top: "t" include { phase: TRAIN stage: "s" } }\n'
    Path("two.prototxt").write_text(nets.SMALL + extra)
    names = [
        [row["name"] for row in ok_json(capsys, "info", "two.prototxt", *options)["layers"]]
        for options in ((), ("--phase", "TRAIN"), ("--phase", "TRAIN", "--stage", "s"))
    ]
    assert [("t" in found) for found in names] == [False, False, True]


def test_info_waits_for_nothing_heavy(files: tuple[str, str]) -> None:
    program = (
        "import sys; from lra.cli import main; code = main(sys.argv[1:]);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'onnx', 'onnxruntime', 'torch', 'scipy'}), file=sys.stderr)"
    )
    for arguments, heavy in ((files[:1], "[]"), (files, "['scipy']")):
        made = python("-c", program, "info", *arguments)
        assert (made.returncode, made.stderr.strip()) == (0, heavy)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the present folder with this project importable."""
    program = [sys.executable, *arguments]
    return subprocess.run(
        program, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["info", "net.prototxt", "net.caffemodel"], "conv1  Convolution"),
        (["run", "net.prototxt", "net.caffemodel", "--input", "x.npy", "-o", "o.npz"], "wrote o.npz"),
        (["export", "net.prototxt", "net.caffemodel", "-o", "o.onnx"], "wrote o.onnx"),
        (["decompose", "net.prototxt", "net.caffemodel", "-o", "o", "--energy", "0.5"], "wrote o.prototxt"),
        (["time", "net.prototxt", "--runs", "2", "--warmup", "0", "--threads", "1"], "onnxruntime "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_as_a_program(files: tuple[str, str], arguments: list[str], expected: str) -> None:
    np.save("x.npy", np.zeros((2, 3, 12, 12), np.float32))
    made = python("-m", "lra", *arguments)
    assert (made.returncode, made.stderr) == (0, "") and expected in made.stdout
    wrong = python("-m", "lra", *arguments, "--no-such-option")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1 and "No such option" in wrong.stderr


# run


def test_run(files: tuple[str, str], capsys: Capture) -> None:
    model = cp.load(*files)
    feeds = nets.random_feeds(model)
    np.save("x.npy", feeds["data"])
    np.savez("x.npz", **feeds)  # type: ignore[arg-type]
    expected = nets.forward(model, feeds)["prob"]
    for given in ("x.npy", "data=x.npy", "x.npz"):
        ok(capsys, "run", *files, "--input", given, "-o", "out.npz", "--threads", "1")
        with np.load("out.npz") as out:
            assert set(out) == {"data", "conv1", "conv2", "conv3", "ip1", "prob"}
            assert all(out[name].dtype == np.float32 for name in out)
            assert np.array_equal(out["prob"], expected) and np.array_equal(out["data"], feeds["data"])
            assert out["conv1"].min() == 0  # what the in-place ReLU left
    ok(capsys, "run", *files, "--input", "x.npy", "-o", "few.npz", "--blobs", "conv2,prob")
    with np.load("few.npz") as out:
        assert list(out) == ["conv2", "prob"]


def test_run_with_another_batch(files: tuple[str, str], capsys: Capture) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 12, 12), np.float32)
    np.save("x.npy", x)
    found = ok_json(capsys, "run", *files, "--input", "x.npy", "-o", "out.npz", "--threads", "1")
    assert found["blobs"]["prob"] == {"shape": [5, 30], "error": None}


def test_run_compare(files: tuple[str, str], capsys: Capture) -> None:
    feeds = nets.random_feeds(cp.load(*files))
    np.savez("x.npz", **feeds)  # type: ignore[arg-type]
    ok(capsys, "run", *files, "--input", "x.npz", "-o", "ref.npz")
    with np.load("ref.npz") as loaded:
        reference = dict(loaded)
    reference["conv2"] = reference["conv2"] + 0.25 * np.abs(reference["conv2"]).max()
    np.savez("ref.npz", **reference)  # type: ignore[arg-type]
    found = ok_json(capsys, "run", *files, "--input", "x.npz", "-o", "out.npz", "--compare", "ref.npz")
    assert found["blobs"]["prob"]["error"] == 0.0
    assert found["blobs"]["conv2"]["error"] == found["worst"] == pytest.approx(0.2, rel=1e-3)
    table = ok(capsys, "run", *files, "--input", "x.npz", "-o", "out.npz", "--compare", "ref.npz")
    assert "in conv2" in table


def test_run_of_an_input_that_is_overwritten(files: tuple[str, str], capsys: Capture) -> None:
    """A dump of Caffe holds such an input under "@input:", beside what an in-place layer made of it."""
    source = nets.inputs(data=(1, 4)) + (
        'layer { name: "p" type: "Power" bottom: "data" top: "data" power_param { scale: 2 shift: 1 } }\n'
        'layer { name: "ip" type: "InnerProduct" bottom: "data" top: "y" inner_product_param { num_output: 2 } }\n'
    )
    nets.files(Path(), source, stem="inplace")
    x = np.array([[-1, 2, -3, 4]], np.float32)
    weight, bias = cp.load("inplace.prototxt", "inplace.caffemodel").weights["ip"]  # type: ignore[index]
    dump = {"@input:data": x, "data": 2 * x + 1, "y": (2 * x + 1) @ weight.T + bias}
    np.savez("dump.npz", **dump)  # type: ignore[arg-type]
    arguments = ("inplace.prototxt", "inplace.caffemodel", "--input", "dump.npz", "-o", "out.npz")
    found = ok_json(capsys, "run", *arguments, "--compare", "dump.npz")
    assert found["worst"] < 1e-6
    with np.load("out.npz") as out:
        assert np.array_equal(out["data"], dump["data"]) and np.allclose(out["y"], dump["y"], atol=1e-6)


# export


def load_onnx(path: str) -> onnx.ModelProto:
    made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    return made


def dims(value: Any) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def run_onnx(path: str, x: np.ndarray, output: str = "prob") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(opened.run([output], {"data": x.astype(np.float32)})[0])


def test_export(files: tuple[str, str], capsys: Capture) -> None:
    found = ok_json(capsys, "export", *files, "-o", "net.onnx")
    assert found["inputs"] == {"data": [2, 3, 12, 12]} and found["outputs"] == {"prob": [2, 30]}
    made = load_onnx("net.onnx")
    assert (made.opset_import[0].version, made.ir_version) == (17, 8)
    model = cp.load(*files)
    feeds = nets.random_feeds(model)
    assert np.allclose(run_onnx("net.onnx", feeds["data"]), nets.forward(model, feeds)["prob"], atol=1e-6)
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)
    theirs = {value.name: dims(value) for value in (*inferred.graph.value_info, *inferred.graph.output)}
    ours = cp.shapes(model)
    for blob in ("conv1", "conv2", "conv3", "ip1", "prob"):
        assert theirs[blob] == list(ours[blob])


@pytest.mark.parametrize("batch", [1, 7])
def test_export_batch(files: tuple[str, str], capsys: Capture, batch: int) -> None:
    ok(capsys, "export", *files, "-o", "net.onnx", "--batch", str(batch))
    assert dims(load_onnx("net.onnx").graph.input[0]) == [batch, 3, 12, 12]


def test_export_dynamic_batch(files: tuple[str, str], capsys: Capture) -> None:
    ok(capsys, "export", *files, "-o", "net.onnx", "--batch", "dynamic")
    assert dims(load_onnx("net.onnx").graph.input[0]) == ["batch", 3, 12, 12]
    model = cp.load(*files)
    for batch in (1, 5):
        feeds = {"data": np.random.default_rng(batch).standard_normal((batch, 3, 12, 12), np.float32)}
        assert np.allclose(run_onnx("net.onnx", feeds["data"]), nets.forward(model, feeds)["prob"], atol=1e-6)


def test_export_dynamic_hw(files: tuple[str, str], capsys: Capture) -> None:
    head, _, _ = nets.SMALL.partition('layer {\n  name: "ip1"')
    source = (
        head
        + 'layer { name: "prob" type: "Pooling" bottom: "conv3" top: "prob" pooling_param { pool: AVE global_pooling: true } }\n'
    )
    Path("fcn.prototxt").write_text(source)
    ok(capsys, "export", "fcn.prototxt", files[1], "-o", "net.onnx", "--dynamic-hw")
    assert dims(load_onnx("net.onnx").graph.input[0]) == [2, 3, "height", "width"]
    model = cp.load("fcn.prototxt", files[1])
    for size in ((12, 12), (17, 23)):
        feeds = {"data": np.random.default_rng(0).standard_normal((2, 3, *size), np.float32)}
        assert np.allclose(run_onnx("net.onnx", feeds["data"]), nets.forward(model, feeds)["prob"], atol=1e-5)
    err = refused(capsys, "export", *files, "-o", "x.onnx", "--dynamic-hw")
    assert 'layer "ip1"' in err and "net.prototxt:43" in err and "export with a fixed size" in err


def pictures() -> np.ndarray:
    return np.random.default_rng(2).uniform(0, 255, (2, 3, 12, 12)).astype(np.float32)


def binaryproto(path: str, mean: np.ndarray) -> None:
    blob: Any = schema.message_class("BlobProto")()
    blob.num, (blob.channels, blob.height, blob.width) = 1, mean.shape
    blob.data.extend(mean.ravel().tolist())
    Path(path).write_bytes(blob.SerializeToString())


SCORES = nets.SMALL.replace('layer { name: "prob" type: "Softmax" bottom: "ip1" top: "prob" }\n', "")
MEAN = np.array([104, 117, 123], np.float32)
IMAGE = np.random.default_rng(5).uniform(0, 255, (3, 16, 14)).astype(np.float32)
CROPPED = IMAGE[:, 2:14, 1:13]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--mean", "104,117,123"], lambda x: x - MEAN[:, None, None]),
        (["--mean", "100"], lambda x: x - 100),
        (["--mean", "mean.npy"], lambda x: x - CROPPED),
        (["--mean", "mean.binaryproto"], lambda x: x - CROPPED),
        (["--scale", "0.0078125"], lambda x: x / 128),
        (["--mean", "104,117,123", "--scale", "0.5"], lambda x: (x - MEAN[:, None, None]) / 2),
        (["--bgr"], lambda x: x[:, ::-1]),
        (["--bgr", "--mean", "104,117,123"], lambda x: x[:, ::-1] - MEAN[:, None, None]),
        (["--preprocess"], lambda x: (x - np.array([1, 2, 3])[:, None, None]) * 0.25),
        (["--preprocess", "--scale", "1"], lambda x: x - np.array([1, 2, 3])[:, None, None]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_export_preprocessing(
    files: tuple[str, str], capsys: Capture, options: list[str], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    np.save("mean.npy", IMAGE)
    binaryproto("mean.binaryproto", IMAGE)
    param = "transform_param { mean_value: 1 mean_value: 2 mean_value: 3 scale: 0.25 }"
    Path("t.prototxt").write_text(SCORES.replace("  input_param", f"  {param}\n  input_param"))
    ok(capsys, "export", "t.prototxt", files[1], "-o", "net.onnx", *options)
    load_onnx("net.onnx")
    Path("net.prototxt").write_text(SCORES)
    fed = {"data": np.ascontiguousarray(expected(pictures()), np.float32)}
    reference = nets.forward(cp.load("net.prototxt", files[1]), {"data": fed["data"]})["ip1"]
    assert np.allclose(run_onnx("net.onnx", pictures(), "ip1"), reference, rtol=1e-4, atol=1e-2)
    assert not np.allclose(
        nets.forward(cp.load("net.prototxt", files[1]), {"data": pictures()})["ip1"],
        reference,
        rtol=1e-3,
        atol=0.1,
    )


def test_export_mean_file_of_the_net(files: tuple[str, str], capsys: Capture) -> None:
    """A mean_file is looked for beside the net."""
    Path("sub").mkdir()
    binaryproto("sub/mean.binaryproto", IMAGE)
    param = 'transform_param { mean_file: "mean.binaryproto" crop_size: 12 }'
    Path("sub/t.prototxt").write_text(SCORES.replace("  input_param", f"  {param}\n  input_param"))
    Path("net.prototxt").write_text(SCORES)
    ok(capsys, "export", "sub/t.prototxt", files[1], "-o", "net.onnx", "--preprocess")
    reference = nets.forward(cp.load("net.prototxt", files[1]), {"data": pictures() - CROPPED})["ip1"]
    assert np.allclose(run_onnx("net.onnx", pictures(), "ip1"), reference, rtol=1e-4, atol=1e-2)


# time


QUICK = ("--runs", "3", "--warmup", "1", "--threads", "1")


def test_time_side_by_side(files: tuple[str, str], capsys: Capture) -> None:
    ok(capsys, "export", *files, "-o", "net.onnx")
    models = ["net.prototxt", "net.prototxt,net.caffemodel", "net.onnx"]
    found = ok_json(capsys, "time", *models, *QUICK)
    assert [row["model"] for row in found["models"]] == models
    assert found["models"][0]["ratio"] == 1.0
    for row in found["models"]:
        assert 0 < row["median_ms"] <= row["p90_ms"]
        assert row["ratio"] == pytest.approx(found["models"][0]["median_ms"] / row["median_ms"])
    assert (found["threads"], found["provider"], found["runs"]) == (1, "cpu", 3)
    table = ok(capsys, "time", *models, *QUICK).splitlines()
    assert [line.split()[0] for line in table[1:4]] == models
    assert "cpu, 1 threads, 3 interleaved runs" in table[-1]


def test_time_profile(tmp_path: Path, capsys: Capture) -> None:
    """A row a layer, under the layers' own names."""
    source = nets.SMALL.replace("dim: 2 dim: 3 dim: 12 dim: 12", "dim: 8 dim: 3 dim: 64 dim: 64")
    path = tmp_path / "net.prototxt"
    path.write_text(source)
    options = ("--profile", "--runs", "10", "--warmup", "3", "--threads", "1", "--json")
    found = json.loads(ok(capsys, "time", str(path), *options))["models"][0]
    names = [row["name"] for row in found["layers"]]
    assert [name for name in names if name.startswith("conv")] == ["conv1", "conv2", "conv3"]
    assert {"ip1", "prob"} <= set(names) and all(row["ops"] for row in found["layers"])
    assert all(row["ms"] > 0 for row in found["layers"])
    table = ok(capsys, "time", str(path), "--profile", *QUICK)
    assert "operators" in table and "conv2" in table


def test_time_batch(files: tuple[str, str], capsys: Capture) -> None:
    ok(capsys, "export", *files, "-o", "two.onnx")
    ok(capsys, "export", *files, "-o", "open.onnx", "--batch", "dynamic")
    assert len(ok_json(capsys, "time", *files[:1], "open.onnx", "--batch", "4", *QUICK)["models"]) == 2
    err = refused(capsys, "time", "two.onnx", "--batch", "4", *QUICK)
    assert 'two.onnx: input "data" has a fixed batch of 2' in err


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "abacus"])
def test_time_without_the_provider(files: tuple[str, str], capsys: Capture, provider: str) -> None:
    if any(provider in name.lower() for name in onnxruntime.get_available_providers()):
        pytest.skip(f"this onnxruntime has {provider}")
    err = refused(capsys, "time", files[0], "--provider", provider, *QUICK)
    assert "this onnxruntime has no" in err or 'there is no provider "abacus"' in err


# decompose


def test_decompose_writes_what_it_says(files: tuple[str, str], capsys: Capture) -> None:
    report = decomposed(capsys, "--speedup", "1.5", "--onnx")
    assert {"speedup", "macs", "params", "layers", "kept", "files"} <= set(report)
    assert set(report["speedup"]) == {"macs", "conv_macs"}
    assert {"name", "scheme", "ranks", "macs", "error"} <= set(report["layers"][0])
    assert report["files"] == {
        "prototxt": "new.prototxt", "caffemodel": "new.caffemodel", "plan": "new.plan.json", "onnx": "new.onnx",
    }  # fmt: skip
    assert sorted(path.name for path in Path().glob("new*")) == sorted(report["files"].values())
    before, after = cp.cost(cp.load(*files)), cp.cost(cp.load("new.prototxt", "new.caffemodel"))
    assert report["macs"] == [before.macs, after.macs] and report["params"] == [before.params, after.params]
    assert report["conv_macs"] == [before.conv_macs, after.conv_macs]
    assert report["speedup"]["macs"] == before.macs / after.macs >= 1.5
    assert report["speedup"]["conv_macs"] == before.conv_macs / after.conv_macs
    assert set(ranks(report)) | set(report["kept"]) == {"conv1", "conv2", "conv3", "ip1"}
    feeds = nets.random_feeds(cp.load(*files))
    written = nets.forward(cp.load("new.prototxt", "new.caffemodel"), feeds)["prob"]
    assert np.allclose(run_onnx("new.onnx", feeds["data"]), written, atol=1e-6)
    plan = Plan.from_json(Path("new.plan.json").read_text())
    assert {name: (one.scheme, one.ranks[0]) for name, one in plan.layers.items()} == ranks(report)


def test_decompose_table(files: tuple[str, str], capsys: Capture) -> None:
    out = ok(capsys, "decompose", *files, "-o", "new", "--scheme", "pca", "--ranks", "4,6,20")
    lines = out.splitlines()
    assert lines[1].split()[:3] == ["conv1", "pca", "4/16"]
    assert "kept conv3: rank 20 (pca) needs 4,720 MACs a position, the layer 4,320" in lines
    assert "kept ip1: fully connected (--fc is off)" in lines
    assert any(line.startswith("MACs, whole net") for line in lines)
    assert any(line.startswith("MACs, convolutions") for line in lines)


@pytest.mark.parametrize("scheme", ["pca", "svd", "kmeans", "spatial"])
def test_scheme(files: tuple[str, str], capsys: Capture, scheme: str) -> None:
    report = decomposed(capsys, "--scheme", scheme, "--ranks", "4,6,5")
    assert ranks(report) == {"conv1": (scheme, 4), "conv2": (scheme, 6), "conv3": (scheme, 5)}
    expected = ["conv1_v", "conv1_h"] if scheme == "spatial" else ["conv1_lowrank", "conv1_linear"]
    assert [layer.name for layer in cp.load("new.prototxt").net.layers][1:3] == expected


def test_auto_is_the_cheaper(files: tuple[str, str], capsys: Capture) -> None:
    costs = {
        one: decomposed(capsys, "--energy", "0.7", "--even-if-slower", "--scheme", one, out=one)["macs"][1]
        for one in ("pca", "spatial", "auto")
    }
    assert costs["auto"] <= min(costs["pca"], costs["spatial"])


def test_fc_only_except(files: tuple[str, str], capsys: Capture) -> None:
    energy = ("--energy", "0.5")
    assert "ip1" not in ranks(decomposed(capsys, *energy, "--no-fc"))
    assert "ip1" in ranks(decomposed(capsys, *energy, "--fc"))
    Path("list.json").write_text('["conv1", "ip1"]')
    Path("object.json").write_text('{"conv1": 3}')
    assert set(ranks(decomposed(capsys, *energy, "--only", "conv1"))) == {"conv1"}
    assert set(ranks(decomposed(capsys, *energy, "--only", "list.json"))) == {"conv1", "ip1"}
    assert set(ranks(decomposed(capsys, *energy, "--only", "object.json", "--only", "conv2"))) == {
        "conv1",
        "conv2",
    }
    report = decomposed(capsys, *energy, "--fc", "--except", "list.json", "--except", "conv2")
    assert set(ranks(report)) == {"conv3"} and report["kept"]["conv2"] == "excepted"


def test_rank_config_file(files: tuple[str, str], capsys: Capture) -> None:
    Path("ranks.json").write_text('{"conv1": 4, "conv3": {"scheme": "spatial", "rank": 6}, "ip1": 3}')
    report = decomposed(capsys, "--rank-config", "ranks.json")
    assert ranks(report) == {"conv1": ("pca", 4), "conv3": ("spatial", 6), "ip1": ("pca", 3)}
    assert ranks(decomposed(capsys, "--rank-config", "ranks.json", "--scheme", "svd"))["conv1"] == ("svd", 4)


def test_scope_round_to_even_if_slower(files: tuple[str, str], capsys: Capture) -> None:
    whole, convs = (decomposed(capsys, "--speedup", "1.5", "--scope", scope) for scope in ("all", "conv"))
    assert convs["speedup"]["conv_macs"] >= 1.5 > convs["speedup"]["macs"]
    assert whole["speedup"]["macs"] >= 1.5
    rounded = decomposed(capsys, "--speedup", "1.5", "--round-to", "4")
    assert rounded["speedup"]["macs"] >= 1.5 and all(rank % 4 == 0 for _, rank in ranks(rounded).values())
    kept = decomposed(capsys, "--scheme", "pca", "--energy", "1")
    assert ranks(kept) == {} and kept["macs"][0] == kept["macs"][1]
    slower = decomposed(capsys, "--scheme", "pca", "--energy", "1", "--even-if-slower", "--compare", "random")
    assert ranks(slower) == {"conv1": ("pca", 16), "conv2": ("pca", 24), "conv3": ("pca", 20)}
    assert slower["speedup"]["macs"] < 1 and slower["outputs_apart"]["prob"] < 1e-5


@pytest.mark.parametrize(
    ("style", "names"),
    [
        ("default", ["conv1_v", "conv1_h", "conv2_lowrank", "conv2_linear"]),
        ("wen", ["conv1_v", "conv1_h", "conv2_lowrank", "conv2_linear"]),
        ("tai", ["conv1_v", "conv1_h", "conv2_lowrank", "conv2_linear"]),
        ("he", ["conv1_V", "conv1_H", "conv2_W_prime", "conv2_P"]),
    ],
)
def test_style(files: tuple[str, str], capsys: Capture, style: str, names: list[str]) -> None:
    Path("ranks.json").write_text('{"conv1": {"scheme": "spatial", "rank": 4}, "conv2": 4}')
    decomposed(capsys, "--rank-config", "ranks.json", "--style", style)
    model = cp.load("new.prototxt", "new.caffemodel")
    assert [layer.name for layer in model.net.layers if layer.name[:5] in ("conv1", "conv2")] == names
    assert model.weights is not None
    assert len(model.weights[names[0]]) == (2 if style in ("wen", "tai") else 1)
    if style in ("wen", "tai"):
        assert not model.weights[names[0]][1].any()
        assert [spec.lr_mult for spec in model.net.layer(names[0]).param_specs] == [1, 0]


def test_compare(files: tuple[str, str], capsys: Capture) -> None:
    """The figure is the relative distance of the outputs, on the given input or a random one of the seed."""
    feeds = nets.random_feeds(cp.load(*files))
    np.save("x.npy", feeds["data"])
    report = decomposed(capsys, "--energy", "0.5", "--compare", "x.npy", "--threads", "1")
    before, after = (
        nets.forward(cp.load(*pair), feeds)["prob"] for pair in (files, ("new.prototxt", "new.caffemodel"))
    )
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert report["outputs_apart"]["prob"] == pytest.approx(expected, rel=1e-4) and expected > 1e-4
    found = [
        decomposed(capsys, "--energy", "0.5", "--compare", "random", "--seed", seed)["outputs_apart"]["prob"]
        for seed in ("0", "0", "1")
    ]
    assert found[0] == found[1] != found[2]


def test_time_both_nets(files: tuple[str, str], capsys: Capture) -> None:
    report = decomposed(capsys, "--energy", "0.5", "--time", "--threads", "1")
    before, after = report["latency_ms"]
    assert report["speedup"]["latency"] == pytest.approx(before / after) and min(before, after) > 0


def test_time_in_a_folder_with_a_comma(files: tuple[str, str], capsys: Capture) -> None:
    Path("a,b").mkdir()
    ok(capsys, "decompose", *files, "-o", "a,b/new", "--energy", "0.5", "--time", "--threads", "1")


def test_plan_only_writes_the_plan_alone(files: tuple[str, str], capsys: Capture) -> None:
    before = snapshot()
    arguments = ("decompose", *files, "--speedup", "1.5", "--plan-only")
    printed = ok(capsys, *arguments)
    assert snapshot() == before
    assert ok(capsys, *arguments, "-o", "p") == printed
    assert set(snapshot()) - set(before) == {"p.plan.json"} and Path("p.plan.json").read_text() == printed
    decomposed(capsys, "--speedup", "1.5")
    assert Path("new.plan.json").read_text() == printed


@pytest.mark.parametrize("style", ["default", "tai"])
def test_a_plan_gives_the_same_bytes(files: tuple[str, str], capsys: Capture, style: str) -> None:
    decomposed(capsys, "--speedup", "1.5", "--style", style, out="one")
    decomposed(capsys, "--plan", "one.plan.json", out="two")
    for suffix in (".prototxt", ".caffemodel", ".plan.json"):
        assert Path(f"one{suffix}").read_bytes() == Path(f"two{suffix}").read_bytes()


def test_short_plans(files: tuple[str, str], capsys: Capture) -> None:
    Path("short.json").write_text('{"conv1": 4}')
    report = decomposed(capsys, "--plan", "short.json", "--scheme", "svd")
    assert ranks(report) == {"conv1": ("svd", 4)}


def test_force(files: tuple[str, str], capsys: Capture) -> None:
    decomposed(capsys, "--speedup", "1.5", out="one")
    Path("net.prototxt").write_text(nets.SMALL + "# changed\n")
    err = refused(capsys, "decompose", *files, "-o", "two", "--plan", "one.plan.json")
    assert "net.prototxt: the plan was made for another net file" in err
    decomposed(capsys, "--plan", "one.plan.json", "--force", out="two")
    assert Path("two.prototxt").read_text() == Path("one.prototxt").read_text() + "# changed\n"


def test_input_shape_and_phase_of_decompose(files: tuple[str, str], capsys: Capture) -> None:
    small = decomposed(capsys, "--energy", "0.5", "--input-shape", "data=1,3,12,12")
    assert 2 * small["macs"][0] == decomposed(capsys, "--energy", "0.5")["macs"][0]
    extra = nets.SMALL.replace('name: "conv3"', 'name: "conv3"\n  include { phase: TRAIN }')
    extra = extra.replace('bottom: "conv3"', 'bottom: "conv2"')
    Path("two.prototxt").write_text(extra)
    model = nets.model(extra)
    assert model.weights is not None
    write_weights(model.weights, Path("two.caffemodel"), hdf5=False)
    arguments = ("decompose", "two.prototxt", "two.caffemodel", "--scheme", "pca", "--ranks")
    assert json.loads(ok(capsys, *arguments, "4,4", "--plan-only"))["layers"].keys() == {"conv1", "conv2"}
    err = refused(capsys, *arguments, "4,4,4", "--plan-only")
    assert "3 ranks for 2 layers" in err


def test_hdf5_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    nets.files(tmp_path, suffix=".h5")
    ok(capsys, "decompose", "net.prototxt", "net.h5", "-o", "new", "--scheme", "pca", "--ranks", "4,4,4")
    assert cp.load("new.prototxt", "new.caffemodel").weights["conv1_lowrank"][0].shape == (4, 3, 5, 5)  # type: ignore[index]


# bad input


def missing_brace() -> None:
    Path("net.prototxt").write_text(
        nets.SMALL.replace("    kernel_size: 5\n    pad: 2", "    kernel_size: {\n    pad: 2")
    )


def lost_bottom() -> None:
    Path("net.prototxt").write_text(
        nets.SMALL.replace('bottom: "conv2"\n  top: "conv3"', 'bottom: "gone"\n  top: "conv3"')
    )


def truncated() -> None:
    Path("net.caffemodel").write_bytes(Path("net.caffemodel").read_bytes()[:-100])


def no_protobuf() -> None:
    Path("net.caffemodel").write_text("<html>404 not found</html>" * 20)


def other_net() -> None:
    nets.files(Path(), nets.SMALL.replace("num_output: 24", "num_output: 26"), stem="other")
    Path("other.caffemodel").replace("net.caffemodel")


def not_a_number() -> None:
    model = cp.load("net.prototxt", "net.caffemodel")
    assert model.weights is not None
    weight, bias = (blob.copy() for blob in model.weights["conv2"])
    weight[0, 0, 0, 0] = np.nan
    changed = Model(model.net, model.weights.replace({"conv2": [NewEntry("conv2", (weight, bias))]}))
    cp.save(changed, "nan.prototxt", "nan.caffemodel")
    Path("nan.caffemodel").replace("net.caffemodel")


BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "truncated": (truncated, "net.caffemodel: truncated or damaged at byte"),
    "empty": (lambda: Path("net.caffemodel").write_bytes(b""), "net.caffemodel: the file is empty"),
    "no protobuf": (no_protobuf, "net.caffemodel: no caffemodel but text; download it again"),
    "LFS pointer": (
        lambda: Path("net.caffemodel").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "net.caffemodel: this is a Git LFS pointer",
    ),
    "no layer": (
        lambda: Path("net.caffemodel").write_bytes(wire.encode_bytes(1, b"net")),
        "net.caffemodel: holds no layer",
    ),
    "no weights": (lambda: Path("net.caffemodel").unlink(), "net.caffemodel: no such file"),
    "no net": (lambda: Path("net.prototxt").unlink(), "net.prototxt: no such file"),
    "missing brace": (missing_brace, "net.prototxt:"),
    "lost bottom": (lost_bottom, 'net.prototxt:36: layer "conv3": bottom "gone"'),
    "weights of another net": (other_net, 'net.caffemodel: layer "conv2" wants 24 x 8 x 3 x 3 for blob 0'),
}  # fmt: skip


@pytest.mark.parametrize("command", ["info", "run", "export", "decompose", "time"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(files: tuple[str, str], capsys: Capture, command: str, name: str) -> None:
    breaking, message = BROKEN[name]
    breaking()
    np.save("x.npy", np.zeros((2, 3, 12, 12), np.float32))
    arguments = {
        "info": files,
        "run": (*files, "--input", "x.npy", "-o", "out.npz"),
        "export": (*files, "-o", "out.onnx"),
        "decompose": (*files, "-o", "out", "--energy", "0.5", "--onnx"),
        "time": (",".join(files), *QUICK),
    }[command]
    assert message in refused(capsys, command, *arguments)


def test_weights_that_are_not_finite(files: tuple[str, str], capsys: Capture) -> None:
    not_a_number()
    message = 'net.caffemodel: layer "conv2": its weights hold values that are not finite'
    for options in (["--energy", "0.5"], ["--speedup", "1.5"], ["--scheme", "spatial", "--ranks", "4,4,4"]):
        assert message in refused(capsys, "decompose", *files, "-o", "new", *options)
    assert message in refused(capsys, "info", *files)


DECOMPOSE: list[tuple[list[str], str]] = [
    (["-o", "new"], "no amount is given"),
    (
        ["-o", "new", "--energy", "0.5", "--speedup", "2"],
        "--speedup and --energy are given; give exactly one",
    ),
    (["-o", "new", "--plan", "p.json", "--ranks", "3"], "--ranks and --plan are given"),
    (["--energy", "0.5"], "-o PREFIX is missing"),
    (["-o", "new", "--energy", "0"], "energy 0 must lie above 0"),
    (["-o", "new", "--speedup", "1"], "a speed-up of 1 is none"),
    (["-o", "new", "--speedup", "inf"], "a speed-up of inf is none"),
    (["-o", "new", "--speedup", "900"], "a speed-up of 900 of the whole net cannot be reached"),
    (["-o", "new", "--speedup", "fast"], "'fast' is not a valid float"),
    (["-o", "new", "--ranks", "1,2,3"], "ranks need a named scheme"),
    (["-o", "new", "--ranks", "1,b,3", "--scheme", "pca"], "--ranks '1,b,3' is no list of whole numbers"),
    (
        ["-o", "new", "--ranks", "0,4,4", "--scheme", "pca"],
        'net.prototxt: layer "conv1": rank 0 is not positive',
    ),
    (
        ["-o", "new", "--ranks", "17,4,4", "--scheme", "pca"],
        'layer "conv1": rank 17 is above the largest possible',
    ),
    (
        ["-o", "new", "--ranks", "4,5,4", "--scheme", "pca"],
        'layer "conv2": rank 5 is not a multiple of group 2',
    ),
    (["-o", "new", "--energy", "0.5", "--only", "conv7"], 'net.prototxt: there is no layer "conv7"'),
    (["-o", "new", "--energy", "0.5", "--except", "conv7"], 'there is no layer "conv7"; did you mean'),
    (["-o", "new", "--energy", "0.5", "--except", "relu1"], 'layer "relu1" is of type ReLU'),
    (["-o", "new", "--energy", "0.5", "--except", "bad.json"], "bad.json:2: is no JSON"),
    (
        ["-o", "new", "--energy", "0.5", "--only", "number.json"],
        "number.json: must be a JSON list of layer names",
    ),
    (["-o", "new", "--energy", "0.5", "--only", "gone.json"], "gone.json: no such file"),
    (["-o", "new", "--rank-config", "bad.json"], "bad.json:2: is no JSON"),
    (["-o", "new", "--rank-config", "gone.json"], "gone.json: no such file"),
    (["-o", "new", "--rank-config", "unknown.json"], 'there is no layer "conv7"'),
    (["-o", "new", "--plan", "bad.json"], "bad.json:2: is no JSON"),
    (["-o", "new", "--plan", "unknown.json"], 'there is no layer "conv7"'),
    (["-o", "new", "--plan", "full.json"], 'net.prototxt: the plan names "conv7"'),
    (["-o", "new", "--plan", "zero.json"], 'layer "conv1": rank 0 is not positive'),
    (["-o", "new", "--plan", "number.json"], "number.json: must be a JSON object"),
    (
        ["-o", "gone/new", "--energy", "0.5"],
        "gone/new.prototxt: cannot be written: there is no folder 'gone'",
    ),
    (["-o", "net", "--energy", "0.5"], "net.prototxt: would be overwritten, and it is an input"),
    (["-o", "new", "--energy", "0.5", "--compare", "gone.npy"], "gone.npy: no such file"),
    (["-o", "new", "--energy", "0.5", "--compare", "bad.json"], "bad.json: is no NumPy file"),
    (["-o", "new", "--energy", "0.5", "--compare", "small.npy"], "data"),
    (["-o", "new", "--energy", "0.5", "--input-shape", "data=1,2"], 'layer "conv1"'),
    (["-o", "new", "--energy", "0.5", "--input-shape", "other=1,3,12,12"], '"other" is no input of the net'),
    (["-o", "new", "--energy", "0.5", "--input-shape", "data"], "--input-shape 'data' is no BLOB=N,C,H,W"),
    (["-o", "new", "--energy", "0.5", "--round-to", "0"], "--round-to"),
    (["-o", "new", "--energy", "0.5", "--style", "mine"], "'mine' is not one of"),
    (["-o", "new", "--energy", "0.5", "--colour"], "No such option"),
]


@pytest.mark.parametrize(
    ("options", "message"), DECOMPOSE, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_requests(files: tuple[str, str], capsys: Capture, options: list[str], message: str) -> None:
    Path("bad.json").write_text('{"conv1": 3,\n conv2}')
    Path("number.json").write_text("3")
    Path("unknown.json").write_text('{"conv7": 3}')
    Path("full.json").write_text('{"layers": {"conv7": {"scheme": "pca", "ranks": [3]}}}')
    Path("zero.json").write_text('{"layers": {"conv1": {"scheme": "pca", "ranks": [0]}}}')
    Path("p.json").write_text('{"conv1": 3}')
    np.save("small.npy", np.zeros((2, 4, 3), np.float32))
    assert message in refused(capsys, "decompose", *files, *options)


def test_inputs_are_never_overwritten(files: tuple[str, str], capsys: Capture) -> None:
    np.save("x.npy", np.zeros((2, 3, 12, 12), np.float32))
    for out in (*files, "x.npy"):
        assert f"{out}: would be overwritten" in refused(capsys, "run", *files, "--input", "x.npy", "-o", out)
    for out in files:
        assert f"{out}: would be overwritten" in refused(capsys, "export", *files, "-o", out)
    Path("new.plan.json").write_text('["conv1"]')
    arguments = ("decompose", *files, "-o", "new", "--energy", "0.5", "--only", "new.plan.json")
    assert "new.plan.json: would be overwritten" in refused(capsys, *arguments)
    assert "new.plan.json: would be overwritten" in refused(capsys, *arguments, "--plan-only")


RUN: list[tuple[list[str], str]] = [
    (["--input", "wide.npy", "-o", "o.npz"], 'layer "ip1"'),
    (["--input", "flat.npy", "-o", "o.npz"], 'input "data" has shape'),
    (["--input", "gone.npy", "-o", "o.npz"], "gone.npy: no such file"),
    (["--input", "other=x.npy", "-o", "o.npz"], '"other" is no input of the net'),
    (["--input", "text.npy", "-o", "o.npz"], "text.npy: is no NumPy file"),
    (["--input", "other.npz", "-o", "o.npz"], "other.npz: holds none of the net's inputs: data"),
    (["--input", "x.npy", "-o", "gone/o.npz"], "gone/o.npz: cannot be written: there is no folder"),
    (["--input", "x.npy", "-o", "o.npz", "--blobs", "conv7"], 'there is no blob "conv7"'),
    (["--input", "x.npy", "-o", "o.npz", "--compare", "gone.npz"], "gone.npz: no such file"),
    (
        ["--input", "x.npy", "-o", "o.npz", "--compare", "other.npz"],
        "other.npz: shares no blob name with the net",
    ),
    (["-o", "o.npz"], "Missing option '--input'"),
]


@pytest.mark.parametrize(
    ("options", "message"), RUN, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_runs(files: tuple[str, str], capsys: Capture, options: list[str], message: str) -> None:
    np.save("x.npy", np.zeros((2, 3, 12, 12), np.float32))
    np.save("wide.npy", np.zeros((2, 3, 12, 40), np.float32))
    np.save("flat.npy", np.zeros((2, 432), np.float32))
    np.savez("other.npz", other=np.zeros(3))
    Path("text.npy").write_text("no array")
    assert message in refused(capsys, "run", *files, *options)


EXPORT: list[tuple[list[str], str]] = [
    (["--batch", "0"], '--batch "0" is neither'),
    (["--batch", "many"], '--batch "many" is neither'),
    (["--preprocess"], "net.prototxt: no layer has a transform_param"),
    (["--mean", "gone.npy"], "gone.npy: no such mean file"),
    (["--mean", "text.npy"], "text.npy: is no NumPy array"),
    (["--mean", "text.binaryproto"], "text.binaryproto: "),
    (["--mean", "1,2"], "a mean of shape 2 does not fit an input of 2 x 3 x 12 x 12"),
    (["--mean", "tiny.npy"], "the mean image 3 x 4 x 4 is smaller than the input"),
    (["--input-shape", "data=2,4,12,12"], 'layer "conv1"'),
]


@pytest.mark.parametrize(
    ("options", "message"), EXPORT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_exports(files: tuple[str, str], capsys: Capture, options: list[str], message: str) -> None:
    Path("text.npy").write_text("no array")
    Path("text.binaryproto").write_text("no mean either")
    np.save("tiny.npy", np.zeros((3, 4, 4)))
    assert message in refused(capsys, "export", *files, "-o", "o.onnx", *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.prototxt"], "gone.prototxt: no such file"),
        (["gone.onnx"], "gone.onnx: no such file"),
        (["text.onnx"], "text.onnx: onnxruntime cannot load it"),
        (["net.prototxt", "--runs", "0"], "--runs"),
        ([], "Missing argument"),
    ],
)
def test_bad_timings(files: tuple[str, str], capsys: Capture, arguments: list[str], message: str) -> None:
    Path("text.onnx").write_text("no model")
    assert message in refused(capsys, "time", *arguments)
