"""Fine-tuning of a pruned net by the prune command: masked or smaller, all at once or layer by layer, interrupted or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pruning
import pytest
from test_hrank_cli import L1, NET, SOURCE, TRAIN, images, load, ok, ok_json, outputs, refused

import caffe_proto as cp
import hrank
from caffe_proto import weights
from caffe_proto.model import write_weights
from hrank.coupling import find
from hrank.plan import Plan, PruneEntry
from hrank.repair import reestimate
from hrank.tuning import By, stages
from lra.cli import main

Capture = pytest.CaptureFixture[str]
torch = pytest.importorskip("torch", reason="training needs torch")

ROOT = Path(__file__).resolve().parents[1]
SOLVER = (
    'net: "train.prototxt" base_lr: 0.02 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.01 random_seed: 3\n'
    "max_iter: 6 test_iter: 2 test_interval: 6\n"
)
RATES = ("--rate-config", "rates.json", *L1)
DATA = ("--data", "images.npz", "--test-data", "images.npz", "--threads", "1")
TUNED = ("--finetune", "solver.prototxt", *DATA)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net, its train_val with a moving BatchNorm, a solver, labelled images and rates."""
    monkeypatch.chdir(tmp_path)
    full = pruning.model(SOURCE)
    assert full.weights is not None
    Path("net.prototxt").write_text(SOURCE)
    with Path("net.caffemodel").open("wb") as file:
        full.weights.write_caffemodel(file)
    moving = TRAIN.replace(
        'type: "BatchNorm"', 'type: "BatchNorm" batch_norm_param { moving_average_fraction: 0.5 }'
    )
    Path("train.prototxt").write_text(moving)
    Path("solver.prototxt").write_text(SOLVER)
    random = np.random.default_rng(4)
    x = random.standard_normal((40, 3, 8, 8)).astype(np.float32)
    np.savez("images.npz", x=x, y=random.integers(0, 4, 40))
    Path("rates.json").write_text('{"a": 0.4, "c": 0.5}')


def prune(capsys: Capture, *options: str, out: str = "new") -> Any:
    return ok_json(capsys, "prune", *NET, "-o", out, *options)


def blobs(path: str) -> dict[str, tuple[np.ndarray, ...]]:
    stored = weights.load(path)
    return {name: stored[name] for name in stored}


def alike(left: str, right: str, tolerance: float = 0.0) -> None:
    """The two weight files hold the same layers and numbers."""
    mine, theirs = blobs(left), blobs(right)
    assert list(mine) == list(theirs)
    for name in mine:
        for one, other in zip(mine[name], theirs[name], strict=True):
            assert one == pytest.approx(other, rel=tolerance, abs=tolerance), name


def plan_of(stem: str = "new") -> Plan:
    return Plan.from_json(Path(f"{stem}.plan.json").read_text())


# What training does -----------------------------------------------------------------------------------------------


def test_all_at_once_is_what_prune_apply_and_train_do(capsys: Capture) -> None:
    made = prune(capsys, *RATES, *TUNED)
    prune(capsys, *RATES, out="bare")
    ok(capsys, "apply", "bare.plan.json", "train.prototxt", "-o", "small", "--input-shape", "data=4,3,8,8",
       "--input-shape", "label=4")  # fmt: skip
    Path("small.solver").write_text(SOLVER.replace("train.prototxt", "small.prototxt"))
    trained = ok_json(capsys, "train", "small.solver", "--weights", "bare.caffemodel", "-o", "by_hand", *DATA)
    alike("new.caffemodel", "by_hand_iter_6.caffemodel")
    assert Path("new.prototxt").read_bytes() == Path("bare.prototxt").read_bytes()
    (stage,) = made["finetune"]
    assert stage["layers"] == ["a", "c"] and stage["iterations"] == 6
    assert stage["loss"] == trained["loss"]
    assert stage["tests"] == [{name: [value] for name, value in trained["tests"][0]["outputs"].items()}]
    assert np.abs(outputs(load()) - outputs(load("bare"))).max() > 0.1


def test_layer_by_layer_is_one_after_the_other_by_hand(capsys: Capture) -> None:
    made = prune(capsys, *RATES, *TUNED, "--finetune-by", "layer")
    assert [stage["layers"] for stage in made["finetune"]] == [["a"], ["c"]]
    keep = plan_of().keep
    before = NET
    train = "train.prototxt"
    for name in ("a", "c"):
        Path("one.plan.json").write_text(json.dumps({name: list(keep[name])}))
        ok(capsys, "prune", *before, "--plan", "one.plan.json", "-o", f"deploy_{name}")
        ok(capsys, "apply", "one.plan.json", train, "-o", f"train_{name}", "--input-shape", "data=4,3,8,8",
           "--input-shape", "label=4")  # fmt: skip
        train = f"train_{name}.prototxt"
        Path("one.solver").write_text(SOLVER.replace("train.prototxt", train))
        ok(capsys, "train", "one.solver", "--weights", f"deploy_{name}.caffemodel", "-o", name, *DATA)
        before = (f"deploy_{name}.prototxt", f"{name}_iter_6.caffemodel")
    alike("new.caffemodel", "c_iter_6.caffemodel")
    alike("new.finetune/1_iter_6.caffemodel", "a_iter_6.caffemodel")
    assert Path("new.prototxt").read_text() == Path("deploy_c.prototxt").read_text()


@pytest.mark.parametrize("by", ["all", "layer"])
def test_masks_train_to_what_the_smaller_net_trains_to(by: str, capsys: Capture) -> None:
    prune(capsys, *RATES, *TUNED, "--finetune-by", by)
    prune(capsys, *RATES, *TUNED, "--finetune-by", by, "--mask-only", out="masked")
    whole, masked = blobs("net.caffemodel"), blobs("masked.caffemodel")
    zeroed = hrank.masks(plan_of(), cp.load(*NET))
    assert {layer for layer, _ in zeroed} == {"a", "a/bn", "a/scale", "b", "c", "end"}
    for name, arrays in masked.items():
        for number, array in enumerate(arrays):
            mask = zeroed.get((name, number), np.ones(array.shape, bool))
            assert not array[~mask].any()
            assert (array[mask] != whole[name][number][mask]).mean() > 0.9, name
    smaller, _ = hrank.apply(Plan(plan_of().layers), load("masked"))
    assert smaller.weights is not None
    write_weights(smaller.weights, Path("smaller.caffemodel"), hdf5=False)
    alike("smaller.caffemodel", "new.caffemodel", 2e-4)
    assert cp.shapes(load("masked"))["a"] == (1, 10, 8, 8)


def test_masks_hold_where_gradients_would_move_them(capsys: Capture) -> None:
    Path("rates.json").write_text('{"b": 0.5}')
    prune(capsys, *RATES, *TUNED, "--mask-only")
    found = blobs("new.caffemodel")
    gone = np.delete(np.arange(8), plan_of().keep["b"])
    assert len(gone) == 4
    assert (
        not found["b"][0][gone].any() and not found["b"][1][gone].any() and not found["b/bn"][0][gone].any()
    )
    assert (found["b"][0] != blobs("net.caffemodel")["b"][0]).all()


def test_masked_stages_prune_nothing_before_its_turn(capsys: Capture) -> None:
    prune(capsys, *RATES, *TUNED, "--finetune-by", "layer", "--mask-only")
    first = blobs("new.finetune/1_iter_6.caffemodel")
    keep = plan_of().keep
    gone = {name: np.delete(np.arange(len(first[name][0])), keep[name]) for name in ("a", "c")}
    assert not first["a"][0][gone["a"]].any()
    assert first["c"][0][gone["c"]].any()
    assert not blobs("new.finetune/2.caffemodel")["c"][0][gone["c"]].any()


def test_bn_is_estimated_behind_training(capsys: Capture) -> None:
    prune(capsys, *RATES, *TUNED, out="bare")
    made = prune(capsys, *RATES, *TUNED, "--images", "images.npz", "--repair", "bn")
    assert [one["name"] for one in made["repairs"]] == ["bn"]
    wanted = reestimate(load("bare"), images(), threads=1).model
    assert outputs(load()) == pytest.approx(outputs(wanted), abs=1e-5)
    assert np.abs(outputs(load()) - outputs(load("bare"))).max() > 1e-3


def test_training_starts_from_what_repairs_made(capsys: Capture) -> None:
    repaired = ("--images", "images.npz", "--repair", "bias", "--repair", "lsq")
    prune(capsys, *RATES, *TUNED, *repaired)
    prune(capsys, *RATES, *repaired, "--threads", "1", out="bare")
    start = blobs("new.finetune/1.caffemodel")
    for name, arrays in blobs("bare.caffemodel").items():
        for mine, theirs in zip(start[name], arrays, strict=True):
            assert np.array_equal(mine, theirs), name


def test_a_given_plan_is_trained(capsys: Capture) -> None:
    prune(capsys, *RATES, *TUNED)
    prune(capsys, *RATES, out="bare")
    prune(capsys, "--plan", "bare.plan.json", *TUNED, out="again")
    alike("new.caffemodel", "again.caffemodel")
    assert plan_of("again") == plan_of("new")
    assert plan_of().target["finetune"] == {"solver": "solver.prototxt", "by": "all", "iterations": 6}
    for command in (
        ("prune", *NET, "--plan", "new.plan.json", "-o", "x"),
        ("apply", "new.plan.json", *NET, "-o", "x"),
    ):
        _, err = ok(capsys, *command)
        assert "warning: these weights are not fine-tuned" in err
    prune(capsys, "--plan", "new.plan.json", out="x")
    assert "finetune" not in plan_of("x").target
    _, err = ok(capsys, "apply", "new.plan.json", NET[0], "-o", "x")
    assert not err


def test_iterations_are_over_the_solvers(capsys: Capture) -> None:
    made = prune(capsys, *RATES, *TUNED, "--iterations", "2")
    assert made["finetune"][0]["iterations"] == 2
    assert Path("new.finetune/1_iter_2.caffemodel").exists()


def test_test_nets_of_their_own_are_pruned_too(capsys: Capture) -> None:
    same = prune(capsys, *RATES, *TUNED, "--finetune-by", "layer")
    accuracy = 'layer { name: "right" type: "Accuracy" bottom: "end" bottom: "label" top: "right" }\n'
    Path("test.prototxt").write_text(Path("train.prototxt").read_text() + accuracy)
    own = 'train_net: "train.prototxt" test_net: "test.prototxt"'
    Path("solver.prototxt").write_text(SOLVER.replace('net: "train.prototxt"', own))
    made = prune(capsys, *RATES, *TUNED, "--finetune-by", "layer", out="own")
    for one, other in zip(made["finetune"], same["finetune"], strict=True):
        (tested,), (wanted,) = one["tests"], other["tests"]
        assert 0 <= tested.pop("right")[0] <= 1 and tested == wanted


def test_layers_of_training_alone_start_from_their_fillers(capsys: Capture) -> None:
    side = """
layer { name: "side" type: "InnerProduct" bottom: "a" top: "side" include { phase: TRAIN }
  inner_product_param { num_output: 4 weight_filler { type: "constant" value: 0.25 } } }
layer { name: "side/loss" type: "SoftmaxWithLoss" bottom: "side" bottom: "label" top: "side/loss" include { phase: TRAIN } }
"""
    Path("train.prototxt").write_text(Path("train.prototxt").read_text() + side)
    prune(capsys, *RATES, *TUNED)
    start = blobs("new.finetune/1.caffemodel")
    assert start["side"][0].shape == (4, 6 * 64) and (start["side"][0] == 0.25).all()
    assert "side" not in blobs("new.caffemodel")
    assert cp.shapes(load())["a"] == (1, 6, 8, 8)


# Stages -----------------------------------------------------------------------------------------------------------


def _all_of(*names: str) -> Plan:
    return Plan({name: PruneEntry((0,)) for name in names})


@pytest.mark.parametrize(
    ("by", "masked", "wanted"),
    [
        ("all", False, [("stem", "a", "b", "c")]),
        ("layer", True, [("stem",), ("a",), ("b",), ("c",)]),
        ("layer", False, [("stem", "b"), ("a",), ("c",)]),
        ("block", True, [("stem",), ("a", "b", "c")]),
        ("block", False, [("stem", "b"), ("a", "c")]),
    ],
)
def test_stages_of_a_residual_net(by: By, masked: bool, wanted: list[tuple[str, ...]]) -> None:
    found = find(pruning.model(SOURCE))
    assert stages(_all_of("stem", "a", "b", "c"), found, by, masked=masked) == wanted


def test_stages_of_published_nets() -> None:
    def of(net: str, by: By) -> list[tuple[str, ...]]:
        coupling = find(cp.load(ROOT / "models" / net / "deploy.prototxt"))
        convs = [name for name, (_, one) in coupling.by_layer.items() if one.type == "Convolution"]
        return stages(_all_of(*convs), coupling, by, masked=True)

    sizes = [len(part) for part in of("resnet_50", "block")]
    assert sizes == [1, 4, 3, 3, 4, 3, 3, 3, 4, 3, 3, 3, 3, 3, 4, 3, 3]
    assert [len(part) for part in of("vgg_16", "layer")] == [1] * 13
    inceptions = [part for part in of("googlenet_cifar", "layer") if len(part) > 1]
    assert len(inceptions) == 9


# Going on ---------------------------------------------------------------------------------------------------------


def test_interrupted_it_goes_on_to_the_same_end(capsys: Capture) -> None:
    layers = (*RATES, *TUNED, "--finetune-by", "layer", "--iterations", "300")
    Path("solver.prototxt").write_text(SOLVER + "display: 1 snapshot: 5\n")
    prune(capsys, *layers, out="whole")
    command = [sys.executable, "-m", "lra", "prune", *NET, "-o", "new", *layers]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        second = False
        for line in run.stdout:
            second = second or line.startswith("training 2 of 2, behind pruning c")
            if second and line.startswith("Iteration 10 "):
                run.send_signal(signal.SIGINT)
                break
        run.stdout.read()
        said = run.stderr.read()
    assert run.returncode == 130
    assert "the same command with --resume goes on from here" in said
    assert not Path("new.prototxt").exists()
    states = Path("new.finetune").glob("2_iter_*.solverstate.npz")
    last = max(int(state.name.split("_")[2].split(".")[0]) for state in states)
    assert 10 < last < 300
    first = Path("new.finetune/1_iter_300.caffemodel").stat().st_mtime_ns
    assert "is of a fine-tuning by another plan" in refused(
        capsys, "prune", *NET, "-o", "new", *RATES, *TUNED, "--finetune-by", "layer", "--resume"
    )
    out, _ = ok(capsys, "prune", *NET, "-o", "new", *layers, "--resume")
    first_done = next(line for line in out.splitlines() if line.startswith("Iteration"))
    assert first_done.split()[1].rstrip(",") == str(last)
    assert Path("new.finetune/1_iter_300.caffemodel").stat().st_mtime_ns == first
    for kind in ("prototxt", "caffemodel", "plan.json"):
        assert Path(f"new.{kind}").read_bytes() == Path(f"whole.{kind}").read_bytes()


def test_done_it_is_not_done_again(capsys: Capture) -> None:
    made = prune(capsys, *RATES, *TUNED, "--finetune-by", "layer")
    before = {path.name: path.stat().st_mtime_ns for path in Path("new.finetune").glob("*_iter_*")}
    first = Path("new.caffemodel").read_bytes()
    Path("new.finetune/1_iter_6.solverstate.npz").unlink()
    del before["1_iter_6.solverstate.npz"]
    again = prune(capsys, *RATES, *TUNED, "--finetune-by", "layer", "--resume")
    assert again["finetune"] == made["finetune"]
    assert {path.name: path.stat().st_mtime_ns for path in Path("new.finetune").glob("*_iter_*")} == before
    assert Path("new.caffemodel").read_bytes() == first


# What is refused --------------------------------------------------------------------------------------------------

ALONE = ("prune", *NET, "-o", "new", *RATES)
REFUSED = [
    (("--data", "images.npz"), "--data only goes with --finetune"),
    (("--iterations", "3"), "--iterations only goes with --finetune"),
    (("--finetune-by", "layer"), "--finetune-by only goes with --finetune"),
    (("--resume",), "--resume only goes with --finetune"),
    ((*TUNED, "--resume"), "there is no interrupted fit to resume"),
    (("--finetune", "nowhere.prototxt"), "nowhere.prototxt: no such file"),
    (("--finetune", "train.prototxt"), "this file is a net, no solver"),
    (
        (*TUNED, "--finetune-by", "layer", "--images", "images.npz", "--repair", "bias"),
        "--repair bias does not go with --finetune-by layer",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_what_does_not_go_together(options: tuple[str, ...], line: str, capsys: Capture) -> None:
    assert line in refused(capsys, *ALONE, *options)


def test_a_solver_of_another_net_is_refused(capsys: Capture) -> None:
    source = Path("train.prototxt").read_text()
    Path("train.prototxt").write_text(source.replace('name: "c"', 'name: "cc"'))
    err = refused(capsys, *ALONE, *TUNED)
    assert (
        'solver.prototxt: its net train.prototxt is no train_val of the net that is pruned: layer "c" is missing'
        in err
    )
    Path("train.prototxt").write_text(source.replace("num_output: 6", "num_output: 3"))
    err = refused(capsys, *ALONE, *TUNED)
    assert 'layer "c" has weights of 3x8x3x3 and 3, 6x8x3x3 and 6 in net.prototxt' in err.replace(" x ", "x")
    assert "name a solver of the whole net" in err


def test_without_iterations_it_says_so(capsys: Capture) -> None:
    Path("solver.prototxt").write_text(SOLVER.replace("max_iter: 6", ""))
    assert "has no max_iter; give --iterations N" in refused(capsys, *ALONE, *TUNED)


def test_statistics_that_lag_are_told(capsys: Capture) -> None:
    Path("train.prototxt").write_text(TRAIN)
    _, err = ok(capsys, *ALONE, *TUNED)
    assert "BatchNorm's stored statistics keep 99% of what they were before 6 iterations" in err
    _, err = ok(capsys, *ALONE, *TUNED, "--images", "images.npz", "--repair", "bn")
    assert "stored statistics" not in err


def test_torch_that_is_missing_is_named(tmp_path: Path) -> None:
    blocked = (
        "import sys; sys.modules['torch'] = None; from lra.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", blocked, *ALONE, *TUNED]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == 'caffe-lra: error: training needs torch; install "caffe-lra[train]"\n'
    assert not Path("new.finetune").exists()


def test_training_that_diverges_is_one_line(capsys: Capture) -> None:
    Path("solver.prototxt").write_text(SOLVER.replace("base_lr: 0.02", "base_lr: 1e30"))
    capsys.readouterr()
    assert main([*ALONE, *TUNED]) == 2
    assert "training has diverged" in capsys.readouterr().err
    assert not Path("new.prototxt").exists()
