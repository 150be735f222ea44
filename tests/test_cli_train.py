"""``caffe-lra train`` with force, rank clipping, sparsity and the watch on ranks, from the command line."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import caffe_proto as cp
from caffe_proto import weights
from caffe_proto.weights import NewEntry, Weights
from lra.cli import main
from lra.cli_train import FIELDS
from lra.train_layers import SOLVER_FIELDS

Array = NDArray[Any]
ROOT = Path(__file__).resolve().parents[1]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="training needs torch")

NET = """
layer { name: "data" type: "MemoryData" top: "data" top: "label"
        memory_data_param { batch_size: 8 channels: 2 height: 6 width: 6 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" param { MULT }
        convolution_param { num_output: 6 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "low" type: "Convolution" bottom: "conv" top: "low" param { lr_mult: 1 }
        convolution_param { num_output: 5 kernel_size: 3 bias_term: false weight_filler { type: "xavier" } } }
layer { name: "high" type: "Convolution" bottom: "low" top: "high" param { lr_mult: 1 }
        convolution_param { num_output: 7 kernel_size: 1 weight_filler { type: "xavier" } } }
layer { name: "ip" type: "InnerProduct" bottom: "high" top: "ip" param { lr_mult: 1 }
        inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
SHAPES = {
    "conv": [(6, 2, 3, 3), (6,)],
    "low": [(5, 6, 3, 3)],
    "high": [(7, 5, 1, 1), (7,)],
    "ip": [(3, 28), (3,)],
}
SOLVER = 'net: "net.prototxt" lr_policy: "fixed" random_seed: 3 snapshot_prefix: "s" base_lr: 0.05 test_interval: 2 test_iter: 1\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A net, a solver, images and weights to start from."""
    numbers = np.random.default_rng(0)
    labels = np.arange(24) % 3
    images = numbers.random((24, 2, 6, 6)).astype(np.float32)
    for i, label in enumerate(labels):
        images[i, :, 2 * label : 2 * label + 2] += 1
    np.savez(tmp_path / "x.npz", x=images, y=labels)
    write(tmp_path)
    start(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, settings: str = "", mult: str = "lr_mult: 1", net: str = NET) -> None:
    (folder / "net.prototxt").write_text(net.replace("MULT", mult))
    (folder / "solver.prototxt").write_text(SOLVER + settings)


def start(folder: Path, **changes: Array) -> dict[str, list[Array]]:
    """The weights to start from; ``changes`` replace the weight of a layer."""
    numbers = np.random.default_rng(1)
    blobs = {
        name: [(0.4 * numbers.standard_normal(shape)).astype(np.float32) for shape in shapes]
        for name, shapes in SHAPES.items()
    }
    for name, weight in changes.items():
        blobs[name][0] = weight.astype(np.float32)
    with (folder / "start.caffemodel").open("wb") as file:
        Weights([NewEntry(name, tuple(arrays)) for name, arrays in blobs.items()]).write_caffemodel(file)
    return blobs


def train(
    *options: str, iterations: int = 1, prefix: str = "s", go_on: bool = False
) -> dict[str, list[Array]]:
    """The weights that the command ends with."""
    begin = () if go_on else ("--weights", "start.caffemodel")
    data = ("--data", "x.npz", "--test-data", "x.npz", "--device", "cpu", "--threads", "1")
    assert (
        main(
            ["train", "solver.prototxt", *begin, *data, "--max-iter", str(iterations), "-o", prefix, *options]
        )
        == 0
    )
    stored = weights.load(f"{prefix}_iter_{iterations}.caffemodel")
    return {name: [np.array(blob) for blob in stored[name]] for name in stored}


def pull(W: Array, power: int) -> Array:
    """The force's term, pair by pair: every direction is drawn to the others, along the sphere."""
    rows = W.reshape(len(W), -1).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / norms
    G = np.zeros_like(rows)
    for i, u in enumerate(units):
        for j, v in enumerate(units):
            if i != j:
                d = np.linalg.norm(v - u)
                f = (v - u) * d**-power
                G[i] -= norms[i] * (f - (f @ u) * u)
    return G.reshape(W.shape)


def test_the_fields_are_those_that_are_read() -> None:
    assert FIELDS == SOLVER_FIELDS


TRAIN = ("train", "solver.prototxt", "--data", "x.npz", "--test-data", "x.npz", "--max-iter", "4")


@needs_torch
@pytest.mark.parametrize(
    ("settings", "mult", "options", "power", "strength"),
    [
        ('force_type: "Constant" force_decay: 0.02', "force_mult: 1.5", (), 1, 0.03),
        ("force_decay: 0.02", "force_mult: 1", (), 0, 0.02),
        ('force_type: "Gravity" force_decay: 0.02 force_iter: 0', "force_mult: 1", (), 3, 0.0),
        ('force_type: "None" force_decay: 0.0', "force_mult: 1", (), 0, 0.0),
        ('force_type: "Constant" force_decay: 5', "force_mult: 1", ("--force", "l2=-0.02"), 0, -0.02),
        ("force_decay: 5", "force_mult: 1", ("--force", "l2=0"), 0, 0.0),
        ("", "lr_mult: 1", ("--force", "linear=0.02", "--force-all"), 2, 0.02),
        ("", "force_mult: 1", ("--force", "gravity=0.06", "--force-per-filter"), 3, 0.01),
        ("", "force_mult: 1", ("--force", "l1=0.02", "--force-schedule", "0:0.25,9:1"), 1, 0.005),
    ],
)  # fmt: skip
def test_one_step_of_the_force(
    folder: Path, settings: str, mult: str, options: tuple[str, ...], power: int, strength: float
) -> None:
    before = start(folder)
    plain = train()["conv"][0]
    write(folder, settings, mult)
    forced = train(*options)["conv"][0]
    wanted = -0.05 * strength * pull(before["conv"][0], power)
    np.testing.assert_allclose(forced - plain, wanted, atol=1e-6, rtol=1e-4)


@needs_torch
def test_all_convolutions_but_those_with_a_force_mult_of_none(folder: Path) -> None:
    before = start(folder)
    plain = train()
    write(folder, mult="force_mult: 0")
    forced = train("--force", "l2=0.1", "--force-all")
    np.testing.assert_array_equal(forced["conv"][0], plain["conv"][0])
    np.testing.assert_array_equal(forced["ip"][0], plain["ip"][0])
    moved = forced["low"][0] - plain["low"][0]
    np.testing.assert_allclose(moved, -0.05 * 0.1 * pull(before["low"][0], 0), atol=1e-6, rtol=1e-4)


@needs_torch
def test_a_strength_that_follows_the_gradient(folder: Path) -> None:
    before = start(folder)
    plain = train()
    forced = train("--force", "l1", "--force-auto", "0.25", "--force-all")
    names = ("conv", "low", "high")
    gradient = np.sqrt(sum(((plain[name][0] - before[name][0]) ** 2).sum() for name in names))
    added = {name: forced[name][0] - plain[name][0] for name in names}
    assert np.sqrt(sum((one**2).sum() for one in added.values())) == pytest.approx(0.25 * gradient, rel=1e-4)
    for name in names:
        G = pull(before[name][0], 1)
        scale = np.linalg.norm(added["low"]) / np.linalg.norm(pull(before["low"][0], 1))
        np.testing.assert_allclose(added[name], -scale * G, atol=1e-6, rtol=1e-3)


def rank(W: Array, energy: float) -> int:
    found = np.linalg.svd(W.reshape(len(W), -1).astype(np.float64), compute_uv=False) ** 2
    return int((np.cumsum(found) < energy * found.sum()).sum()) + 1


@needs_torch
def test_ranks_are_logged_at_tests_and_at_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = start(folder)
    after = train("--watch-ranks", "0.8", iterations=5)
    printed = capsys.readouterr().out.splitlines()
    found = {name: rank(blobs[0], 0.8) for name, blobs in after.items()}
    each = ", ".join(f"{name} {count}" for name, count in found.items())
    assert f"Iteration 5, ranks at energy 0.8: {each}; sum {sum(found.values())}" in printed
    assert [line.split(",")[0] for line in printed if ", ranks at energy" in line] == [
        f"Iteration {i}" for i in (0, 2, 4, 5)
    ]
    assert any(line.startswith("ranks: s.ranks.csv") for line in printed)
    rows = list(csv.reader((folder / "s.ranks.csv").read_text().splitlines()))
    assert rows[0] == ["iteration", "conv", "low", "high", "ip"]
    assert [row[0] for row in rows[1:]] == ["0", "2", "4", "5"]
    assert rows[1][1:] == [str(rank(blobs[0], 0.8)) for blobs in before.values()]
    assert rows[-1][1:] == [str(rank(after[name][0], 0.8)) for name in before]
    assert (folder / "s.tensorboard").is_dir() == (importlib.util.find_spec("tensorboard") is not None)
    assert (folder / "s.ranks.png").is_file() == (importlib.util.find_spec("matplotlib") is not None)
    train("--watch-ranks", "0.8", "--snapshot", "s_iter_5.solverstate.npz", iterations=7, go_on=True)
    again = list(csv.reader((folder / "s.ranks.csv").read_text().splitlines()))
    assert again[: len(rows)] == rows and [row[0] for row in again[len(rows) :]] == ["6", "7"]


@needs_torch
def test_ranks_are_clipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "solver.prototxt").write_text(SOLVER.replace("base_lr: 0.05", "base_lr: 0"))
    numbers = np.random.default_rng(2)
    narrow = numbers.standard_normal((5, 2)) @ numbers.standard_normal((2, 54))
    before = start(folder, low=narrow.reshape(5, 6, 3, 3))
    after = train("--clip-ranks", "0.999999", "--clip-every", "3", iterations=4)
    printed = capsys.readouterr().out.splitlines()
    assert "Iteration 2, outputs now: low 2" in printed
    assert any(line.endswith(".npz, the net as it is now to s_iter_4.prototxt") for line in printed)
    assert after["low"][0].shape == (2, 6, 3, 3) and after["high"][0].shape == (7, 2, 1, 1)
    product = [one["high"][0].reshape(7, -1) @ one["low"][0].reshape(-1, 54) for one in (before, after)]
    np.testing.assert_allclose(product[1], product[0], atol=1e-5)
    written = cp.load("s_iter_4.prototxt", "s_iter_4.caffemodel", phase="TRAIN")
    assert [layer.name for layer in written.net.layers] == [
        "data",
        "conv",
        "relu",
        "low",
        "high",
        "ip",
        "loss",
    ]
    assert "num_output: 2" in written.net.text
    train("--clip-ranks", "0.999999", "--clip-every", "3", "--json", iterations=4)
    assert json.loads(capsys.readouterr().out)["files"]["prototxt"] == "s_iter_4.prototxt"
    unclipped = train("--clip-ranks", "0.999999", "--clip-every", "3", iterations=2 + 1, prefix="t")
    assert unclipped["low"][0].shape == (2, 6, 3, 3)
    kept = train(
        "--clip-ranks", "0.999999", "--clip-every", "2", "--clip-until", "1", iterations=1 + 1, prefix="u"
    )
    assert kept["low"][0].shape == (2, 6, 3, 3)


@needs_torch
@pytest.mark.parametrize(
    ("what", "axes"), [("l1", ()), ("filter", (1, 2, 3)), ("channel", (0, 2, 3)), ("shape", (0,))]
)
def test_one_step_of_sparsity(folder: Path, what: str, axes: tuple[int, ...]) -> None:
    plain = train()
    norms = {
        name: np.sqrt((blobs[0].astype(np.float64) ** 2).sum(axis=axes or (), keepdims=True))
        for name, blobs in plain.items()
        if name in ("conv", "low")
    }
    strength = float(np.median(norms["conv"])) / 0.05
    sparse = train("--sparsify", f"{what}={strength!r}")
    for name, sizes in norms.items():
        wanted = plain[name][0] * np.maximum(1 - 0.05 * strength / sizes, 0)
        np.testing.assert_allclose(sparse[name][0], wanted, atol=1e-6)
    assert 0.3 < (sparse["conv"][0] == 0).mean() < 0.7


@needs_torch
def test_pruned_weights_stay_zero_and_a_stop_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "solver.prototxt").write_text(SOLVER + "momentum: 0.9 snapshot: 3 max_iter: 6\n")
    before = start(folder)
    after = train("--prune-weights", "0.75", iterations=6)
    straight = Path("s_iter_6.caffemodel").read_bytes()
    for name, blobs in before.items():
        W = np.abs(blobs[0]).reshape(-1)
        order = np.argsort(W)
        zero = after[name][0].reshape(-1) == 0
        np.testing.assert_array_equal(np.sort(order[: int(0.75 * W.size)]), np.flatnonzero(zero))
    assert (after["ip"][0] != before["ip"][0])[after["ip"][0] != 0].mean() > 0.5
    rows = {
        row["layer"]: row for row in csv.DictReader(Path("s_iter_6.sparsity.csv").read_text().splitlines())
    }
    assert {name: float(row["zeros"]) for name, row in rows.items()} == pytest.approx(
        {"conv": 81 / 108, "low": 202 / 270, "high": 26 / 35, "ip": 63 / 84}
    )
    assert rows["low"]["macs"] == str(270 * 4)
    assert "low    74.8%" in capsys.readouterr().out
    train(
        "--prune-weights",
        "0.75",
        "--snapshot",
        "s_iter_3.solverstate.npz",
        iterations=6,
        go_on=True,
        prefix="t",
    )
    assert Path("t_iter_6.caffemodel").read_bytes() == straight


@needs_torch
def test_pruned_weights_gather_no_momentum_and_lose_what_they_had(folder: Path) -> None:
    (folder / "solver.prototxt").write_text(SOLVER + "momentum: 0.9\n")
    whole = train(iterations=2)
    go_on = ("--snapshot", "s_iter_2.solverstate.npz", "--prune-weights", "0.5")
    pruned = train(*go_on, iterations=5, go_on=True, prefix="t")
    small = np.argsort(np.abs(whole["low"][0]).reshape(-1))[:135]
    np.testing.assert_array_equal(np.sort(small), np.flatnonzero(pruned["low"][0] == 0))
    sparse = train("--prune-weights", "0.5", iterations=2, prefix="u")
    with np.load("u_iter_2.solverstate.npz") as state:
        momentum = state["history/0/0/low"]
    assert not momentum[sparse["low"][0] == 0].any() and momentum.any()


@needs_torch
def test_what_is_removed_is_not_missed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "solver.prototxt").write_text(SOLVER.replace("base_lr: 0.05", "base_lr: 1e-30"))
    weight = np.random.default_rng(4).standard_normal((6, 2, 3, 3))
    weight[[1, 4]] = 0
    start(folder, conv=weight)
    train("--sparsify", "filter=1e-9", "--remove")
    printed = capsys.readouterr().out
    assert "removed 2 of 6 channels of conv" in printed
    assert "sparsity: s_iter_1.sparsity.csv\n" in printed
    assert "wrote s_iter_1_removed.prototxt, s_iter_1_removed.caffemodel" in printed
    large = cp.load("net.prototxt", "s_iter_1.caffemodel")
    small = cp.load("s_iter_1_removed.prototxt", "s_iter_1_removed.caffemodel")
    assert small.weights is not None and small.weights["conv"][0].shape == (4, 2, 3, 3)
    with np.load("x.npz") as stored:
        fed = {"data": stored["x"][:8], "label": stored["y"][:8].reshape(8, 1, 1, 1)}
    made = []
    for model in (large, small):
        with cp.session(model, blobs=["ip"], threads=1) as session:
            made.append(session.run({name: np.asarray(one, np.float32) for name, one in fed.items()})["ip"])
    np.testing.assert_allclose(made[1], made[0], rtol=1e-4, atol=1e-4)


@needs_torch
def test_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.random.default_rng(4).standard_normal((6, 2, 3, 3))
    weight[[1, 4]] = 0
    start(folder, conv=weight)
    after = train("--sparsify", "filter=1e-9", "--remove", "--watch-ranks", "0.8", "--json", iterations=3)
    found = json.loads(capsys.readouterr().out)
    assert found["iterations"] == 3
    ranks = found["ranks"]
    assert (ranks["iteration"], ranks["energy"], ranks["files"]["log"]) == (3, 0.8, "s.ranks.csv")
    assert ranks["layers"] == {name: rank(blobs[0], 0.8) for name, blobs in after.items()}
    sparsity = found["sparsity"]
    rows = list(csv.DictReader(Path(sparsity["file"]).read_text().splitlines()))
    assert sparsity["file"] == "s_iter_3.sparsity.csv" and [row.pop("layer") for row in rows] == list(after)
    assert [{key: float(value) for key, value in row.items()} for row in rows] == [
        *sparsity["layers"].values()
    ]
    zeros = after["conv"][0] == 0
    assert sparsity["layers"]["conv"]["zeros"] == pytest.approx(zeros.mean())
    assert sparsity["layers"]["conv"]["rows"] == pytest.approx(zeros.all((1, 2, 3)).mean())
    removed = found["removed"]
    assert removed["files"] == {
        "prototxt": "s_iter_3_removed.prototxt",
        "weights": "s_iter_3_removed.caffemodel",
    }
    small = cp.load(*removed["files"].values())
    assert small.weights is not None
    assert removed["channels"]["conv"] == [6, small.weights["conv"][0].shape[0]]
    assert removed["params"][1] == sum(blob.size for blobs in small.weights.values() for blob in blobs)


@needs_torch
@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--force", "l2=0.1"), "the force acts on no layer"),
        (("--force", "l2"), "names no strength"),
        (("--force", "l3=1", "--force-all"), 'there is no force_type "l3"'),
        (("--force", "l2=x"), '"x" is no number'),
        (("--force", "l2=inf", "--force-all"), "no finite number"),
        (("--force-all",), "there is no force"),
        (("--force-per-filter",), "there is no force"),
        (("--force-schedule", "0:1"), "there is no force"),
        (("--force-auto", "0", "--force-all"), "--force-auto 0"),
        (("--force-auto", "1", "--force", "l2=1"), "are both given"),
        (("--force", "l2=1", "--force-all", "--force-schedule", "7"), '"7" is no ITER:FACTOR'),
        (("--force", "l2=1", "--force-all", "--force-schedule", "7:1,3:1"), "do not increase"),
        (("--watch-ranks", "0"), "energy 0 must lie above 0"),
        (("--clip-every", "2"), "go with --clip-ranks"),
        (("--clip-until", "2"), "go with --clip-ranks"),
        (("--clip-ranks", "0.9", "--clip-every", "7"), "never be clipped: every 7 of 4"),
        (("--clip-ranks", "0.9", "--clip-every", "3", "--clip-until", "1"), "never be clipped: every 3 of 2"),
        (("--clip-ranks", "1.5"), "energy 1.5"),
        (("--sparsify", "rows=1"), 'there is no "rows"'),
        (("--sparsify", "l1"), "names no strength; write WHAT=STRENGTH"),
        (("--sparsify", "l1=x"), '"x" is no number'),
        (("--sparsify", "l1=0"), "makes nothing sparse"),
        (("--sparsify", "l1=1", "--sparsify", "l1=2"), "given twice"),
        (("--prune-weights", "1"), "cannot be pruned"),
        (("--prune-weights", "0.5", "--clip-ranks", "0.9"), "do not stay zero"),
        (("--remove",), "goes with --sparsify or --prune-weights"),
    ],
)
def test_what_would_come_to_nothing_is_refused(
    folder: Path, options: tuple[str, ...], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert main([*TRAIN, *options]) == 2
    printed = capsys.readouterr()
    assert cause in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert sorted(folder.iterdir()) == before


@needs_torch
@pytest.mark.parametrize(
    ("settings", "options", "cause"),
    [
        ("force_decay: 0.1", (), "the force acts on no layer"),
        ('force_decay: 0.1 force_type: "Magnet"', (), 'there is no force_type "Magnet"'),
        (
            'force_decay: 0.1 force_decay_type: "adaptive"',
            ("--force-all", "--force-per-filter"),
            "changes nothing",
        ),
        ("snapshot_after_train: false", ("--remove", "--sparsify", "l1=1"), "snapshot_after_train is false"),
    ],
)
def test_solver_files_that_ask_for_nothing(
    folder: Path, settings: str, options: tuple[str, ...], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, settings)
    assert main([*TRAIN, *options]) == 2
    assert cause in capsys.readouterr().err


@needs_torch
def test_a_net_without_pairs_cannot_be_clipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, net=NET.replace('bottom: "high"', 'bottom: "high2"').replace(
        'layer { name: "ip"', 'layer { name: "r" type: "ReLU" bottom: "low2" top: "high2" } layer { name: "ip"',
    ).replace('top: "high"', 'top: "low2"').replace('bottom: "low" top', 'bottom: "relu2" top').replace(
        'layer { name: "high"', 'layer { name: "relu2" type: "ReLU" bottom: "low" top: "relu2" } layer { name: "high"',
    ))  # fmt: skip
    given = ("--data", "x.npz", "--test-data", "x.npz", "--max-iter", "4", "--clip-ranks", "0.9")
    assert main(["train", "solver.prototxt", *given]) == 2
    assert "decompose the net first" in capsys.readouterr().err


def program(
    folder: Path, *args: str, launch: tuple[str, ...] = ("-m", "lra")
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@needs_torch
def test_two_processes_train_as_one(folder: Path) -> None:
    options = (
        "--force",
        "l1=0.02",
        "--force-all",
        "--sparsify",
        "l1=0.1",
        "--remove",
        "--watch-ranks",
        "0.9",
    )
    data = ("--data", "x.npz", "--test-data", "x.npz", "--device", "cpu", "--weights", "start.caffemodel")
    args = (
        "train",
        "solver.prototxt",
        *data,
        "--max-iter",
        "6",
        *options,
        "--clip-ranks",
        "0.9",
        "--clip-every",
        "4",
    )
    alone = program(folder, *args, "-o", "one")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lra")
    both = program(folder, *args, "-o", "two", launch=launch)
    assert (alone.returncode, both.returncode) == (0, 0), alone.stderr + both.stderr
    one, two = (weights.load(folder / f"{name}_iter_6.caffemodel") for name in ("one", "two"))
    for name in one:
        for a, b in zip(one[name], two[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert one["low"][0].shape[0] < 5
    assert (folder / "one.ranks.csv").read_text() == (folder / "two.ranks.csv").read_text()
    assert both.stdout.count("Optimization Done") == both.stdout.count("removed.caffemodel") == 1


def test_without_torch_one_line_says_what_to_install(folder: Path) -> None:
    (folder / "hidden.py").write_text(
        "import sys\nsys.modules['torch'] = None\nfrom lra.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    found = program(folder, "train", "solver.prototxt", "--watch-ranks", "0.9", launch=("hidden.py",))
    assert found.returncode == 2
    assert found.stderr == 'caffe-lra: error: training needs torch; install "caffe-lra[train]"\n'
