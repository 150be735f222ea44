"""decompose with images, as a user runs it: what the options leave in the files, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import caffe_proto as cp
from lra.cli import main
from lra.digits import drawn

LENET = Path(__file__).resolve().parents[1] / "models" / "lenet"
FILES = [str(LENET / "lenet.prototxt"), str(LENET / "lenet.caffemodel")]
RESIDUAL = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 dim: 12 dim: 12 } } }
layer { name: "a" type: "Convolution" bottom: "data" top: "a"
  convolution_param { num_output: 12 kernel_size: 3 pad: 1 bias_term: false weight_filler { type: "msra" } } }
layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "scale" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }
"""


@pytest.fixture
def digits(tmp_path: Path) -> str:
    images, labels = drawn(400, 0)
    np.savez(tmp_path / "digits.npz", x=images, y=labels)
    return str(tmp_path / "digits.npz")


FITTED = ("--speedup", "4", "--scope", "conv", "--scheme", "spatial", "--threads", "1")


def decompose(tmp_path: Path, *options: str) -> int:
    return main(["decompose", *FILES, "-o", str(tmp_path / "fast"), *options])


def read(tmp_path: Path) -> dict[str, np.ndarray]:
    model = cp.load(tmp_path / "fast.prototxt", tmp_path / "fast.caffemodel")
    assert model.weights is not None
    return {f"{name}.{i}": np.array(b) for name in model.weights for i, b in enumerate(model.weights[name])}


def test_refit_kept_changes_the_layers_left_whole_and_no_folder_is_left(tmp_path: Path, digits: str) -> None:
    options = (*FITTED, "--images", digits)
    assert decompose(tmp_path, *options) == 0
    plain = read(tmp_path)
    assert decompose(tmp_path, *options, "--refit-kept") == 0
    refitted = read(tmp_path)
    original = cp.load(*FILES).weights
    assert original is not None
    assert np.array_equal(plain["ip2.0"], original["ip2"][0])
    assert not np.array_equal(refitted["ip1.0"], original["ip1"][0])
    assert np.array_equal(plain["conv2_h.0"], refitted["conv2_h.0"])  # it stands before every refitted layer
    assert not (tmp_path / "fast.fit").exists()
    plan = json.loads((tmp_path / "fast.plan.json").read_text())
    assert plan["layers"]["ip2"]["scheme"] == "refit"


def test_polish_lowers_the_held_out_error(
    tmp_path: Path, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    options = (*FITTED, "--images", digits)
    assert decompose(tmp_path, *options, "--polish", "20", "--json") == 0
    found = json.loads(capsys.readouterr().out)["polish"]
    assert found["steps"] == 20
    assert found["error"][1] <= found["error"][0]


def test_fold_bn_takes_the_layers_out_and_keeps_the_outputs(tmp_path: Path) -> None:
    net = tmp_path / "net.prototxt"
    net.write_text(RESIDUAL)
    rng = np.random.default_rng(2)
    from caffe_proto.weights import NewEntry, Weights

    blobs = {
        "a": (rng.standard_normal((12, 4, 3, 3)),),
        "bn": (rng.standard_normal(12), rng.random(12) + 0.5, np.ones(1)),
        "scale": (rng.standard_normal(12), rng.standard_normal(12)),
    }
    entries = [NewEntry(k, tuple(np.asarray(b, np.float32) for b in v)) for k, v in blobs.items()]
    cp.save(
        cp.model.Model(cp.load(net).net, Weights(entries)), tmp_path / "n.prototxt", tmp_path / "n.caffemodel"
    )
    given = [
        str(tmp_path / "n.prototxt"),
        str(tmp_path / "n.caffemodel"),
        "--scheme",
        "spatial",
        "--energy",
        "0.9",
    ]
    for name, more in (("kept", []), ("folded", ["--fold-bn"])):
        assert main(["decompose", *given, "-o", str(tmp_path / name), *more]) == 0
    x = {"data": rng.standard_normal((1, 4, 12, 12)).astype(np.float32)}
    made = {}
    for name in ("kept", "folded"):
        with cp.session(
            cp.load(tmp_path / f"{name}.prototxt", tmp_path / f"{name}.caffemodel"), threads=1
        ) as s:
            (made[name],) = s.run(x).values()
    assert "BatchNorm" not in (tmp_path / "folded.prototxt").read_text()
    assert "BatchNorm" in (tmp_path / "kept.prototxt").read_text()
    np.testing.assert_allclose(made["folded"], made["kept"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--speedup", "2", "--polish"), "--polish only goes with --images"),
        (("--speedup", "2", "--resume"), "--resume only goes with --images"),
        (("--speedup", "2", "--scheme", "asymmetric-3d"), "fits responses"),
        (("--energy", "0.9", "--rank-selection", "paper"), "--rank-selection only goes with --speedup"),
        (("--speedup", "2", "--same-ranks"), "--same-ranks only goes with --scheme asymmetric-3d"),
    ],
)
def test_options_that_would_be_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert decompose(tmp_path, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_resume_without_an_interrupted_fit(
    tmp_path: Path, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decompose(tmp_path, "--speedup", "2", "--images", digits, "--resume") == 2
    assert "no interrupted fit" in capsys.readouterr().err
    assert not (tmp_path / "fast.fit").exists()


def test_a_speedup_out_of_reach_leaves_nothing(tmp_path: Path, digits: str) -> None:
    assert decompose(tmp_path, "--speedup", "5000", "--images", digits, "--scheme", "spatial") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["digits.npz"]
