"""Training: steps of real Caffe's solver, snapshots and going on from them, data layers, several processes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from helpers import SHARED

torch = pytest.importorskip("torch", reason="training needs torch")

from caffe_proto import console, graph, net, solver, weights  # noqa: E402
from caffe_proto.cli_train import COMMANDS, Printer  # noqa: E402
from caffe_proto.errors import Error, FileError, UsageError, WeightsError  # noqa: E402
from caffe_proto.net import NetState  # noqa: E402
from caffe_proto.train import Display, Event, Request, Result, train  # noqa: E402
from caffe_proto.train_data import Feeds, Options, Part, Shelf, open_feeds  # noqa: E402
from caffe_proto.weights import NewEntry, Weights  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FORCE = SHARED / "oracle" / "force"
FORCE_FIELDS = frozenset({"force_decay", "force_type", "force_iter", "force_direction", "force_decay_type"})

NET = """
name: "small"
layer { name: "data" type: "MemoryData" top: "data" top: "label"
        memory_data_param { batch_size: 8 channels: 1 height: 6 width: 6 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" param { lr_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
        convolution_param { num_output: 6 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "norm" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { pool: AVE kernel_size: 2 stride: 2 } }
# DROPOUT
layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip" inner_product_param { num_output: 3 weight_filler { type: "msra" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
"""
DROPOUT = 'layer { name: "drop" type: "Dropout" bottom: "pool" top: "pool" }'
SOLVER = (
    'net: "net.prototxt" base_lr: 0.05 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.001 random_seed: 3 '
)


def data(folder: Path, n: int = 60, seed: int = 0) -> str:
    """Images of three kinds: bright above, in the middle, or below."""
    numbers = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = numbers.random((n, 1, 6, 6)).astype(np.float32)
    for i, label in enumerate(labels):
        images[i, 0, 2 * label : 2 * label + 2] += 1
    path = folder / f"data{seed}.npz"
    np.savez(path, x=images, y=labels)
    return str(path)


def described(folder: Path, settings: str, source: str = NET) -> solver.Solver:
    (folder / "net.prototxt").write_text(source)
    path = folder / "solver.prototxt"
    path.write_text(f'{SOLVER} snapshot_prefix: "{folder}/s" {settings}')
    return solver.load(path)


def run(folder: Path, settings: str, source: str = NET, **request: Any) -> tuple[Result, list[Event]]:
    """Train on ``data``; the result and what was told."""
    told: list[Event] = []
    given = {"data": data(folder), "test_data": data(folder, 24, 1), **request}
    return train(described(folder, settings, source), Request(listen=told.append, **given)), told


class At:
    """A hook of some methods."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        self.__dict__.update(methods)


def bytes_of(folder: Path, iteration: int) -> bytes:
    return (folder / f"s_iter_{iteration}.caffemodel").read_bytes()


def force_of(w: np.ndarray, kind: str) -> np.ndarray:
    """The gradient term of the original solver, pair by pair in double precision."""
    power = {"Degradation": 0, "Constant": 1, "Linear": 2, "Gravity": 3}[kind]
    rows = w.reshape(len(w), -1).astype(np.float64)
    made = np.zeros_like(rows)
    norms = np.linalg.norm(rows, axis=1)
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            if min(norms[i], norms[j]) <= 1e-4:
                continue
            a, b = rows[i] / norms[i], rows[j] / norms[j]
            distance = np.linalg.norm(a - b)
            if power and distance <= 1e-4:
                continue
            f = (a - b) / distance**power
            made[i] += norms[i] * (f - (f @ a) * a)
            made[j] += norms[j] * (-f + (f @ b) * b)
    return made.reshape(w.shape)


@pytest.mark.parametrize("name", sorted(path.stem for path in FORCE.glob("*.npz")) if FORCE.is_dir() else [])
def test_steps_are_those_of_the_original_solver(name: str, tmp_path: Path) -> None:
    with np.load(FORCE / f"{name}.npz") as stored:
        case = {key: stored[key] for key in stored.files}
    (tmp_path / "net.prototxt").write_text(str(case["net"]))
    (tmp_path / "solver.prototxt").write_text(str(case["solver"]))
    np.savez(tmp_path / "x.npz", x=case["x"], y=np.zeros(len(case["x"]), np.int64))
    with (tmp_path / "before.caffemodel").open("wb") as file:
        Weights([NewEntry("w", (case["w_before"],))]).write_caffemodel(file)
    mult = float(case["force_mult"]) if case["force_mult_given"] else 0.0
    limit = int(case["force_iter"])
    found: list[np.ndarray] = []

    def force(iteration: int, blobs: Any, gradients: Any) -> None:
        strength = float(case["force_decay"]) * mult
        if strength == 0 or (limit >= 0 and iteration >= limit):
            return
        gradient = gradients["w", 0]
        force = force_of(blobs["w", 0].detach().numpy(), str(case["force_type"]))
        if str(case["force_direction"]) == "same":
            force[force * gradient.numpy() < 0] = 0
        if str(case["force_decay_type"]) == "adaptive":
            strength *= float(gradient.norm()) / np.linalg.norm(force)
        gradient += torch.tensor(strength * force, dtype=torch.float32)

    def keep(_iteration: int, blobs: Any, _rate: float) -> None:
        found.append(blobs["w", 0].detach().numpy().copy())

    described = solver.load(tmp_path / "solver.prototxt", FORCE_FIELDS).until(int(case["steps"]))
    train(
        described,
        Request(
            weights=(str(tmp_path / "before.caffemodel"),),
            data=str(tmp_path / "x.npz"),
            hooks=(At(before_update=force, after_update=keep),),
        ),
    )
    wanted = case["w_after"].reshape(len(found), *case["w_before"].shape)
    assert not np.array_equal(wanted[-1], case["w_before"]) or "default" in name or "one_filter" in name
    for made, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(made, right, atol=1e-5 * np.abs(right).max(), rtol=0)


def test_it_learns_and_tells_what_happens(tmp_path: Path) -> None:
    settings = "max_iter: 60 display: 20 average_loss: 5 test_iter: 3 test_interval: 30 snapshot: 40"
    result, told = run(tmp_path, settings)
    assert [(type(event).__name__, event.iteration) for event in told] == [
        ("Tested", 0), ("Display", 0), ("Display", 20), ("Tested", 30), ("Saved", 40), ("Display", 40),
        ("Saved", 60), ("Tested", 60),
    ]  # fmt: skip
    shown = [event for event in told if isinstance(event, Display)]
    assert shown[0].loss > 1 > 0.2 > shown[-1].loss
    assert (result.iteration, result.images) == (60, 480)
    assert result.tests[0].outputs["accuracy"] == (1.0,)
    assert set(result.tests[0].outputs) == {"loss", "accuracy"}
    assert result.saved is not None and result.saved.weights == tmp_path / "s_iter_60.caffemodel"
    stored = weights.load(result.saved.weights)
    assert list(stored) == ["conv", "norm", "scale", "ip"]
    assert [blob.shape for blob in stored["norm"]] == [(6,), (6,), (1,)]
    np.testing.assert_array_equal(stored["ip"][0], result.weights["ip"][0])


def test_the_shown_loss_is_the_mean_of_the_last_ones(tmp_path: Path) -> None:
    one = run(tmp_path, "max_iter: 6 display: 1")[1]
    three = run(tmp_path, "max_iter: 6 display: 1 average_loss: 3")[1]
    losses = [event.loss for event in one if isinstance(event, Display)]
    means = [event.loss for event in three if isinstance(event, Display)]
    np.testing.assert_allclose(means, [np.mean(losses[max(0, i - 2) : i + 1]) for i in range(6)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"])
def test_going_on_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    momentum = "" if kind in ("AdaGrad", "RMSProp") else "momentum: 0.9"
    settings = f'type: "{kind}" snapshot: 3 average_loss: 4 iter_size: 2 test_iter: 2 test_interval: 2'
    source = NET.replace("# DROPOUT", DROPOUT)
    (tmp_path / "net.prototxt").write_text(source)
    path = tmp_path / "solver.prototxt"
    path.write_text(f'{SOLVER.replace("momentum: 0.9", momentum)} snapshot_prefix: "{tmp_path}/s" {settings}')
    request = Request(data=data(tmp_path, 50), test_data=data(tmp_path, 24, 1))
    whole = train(solver.load(path).until(6), request)
    straight = bytes_of(tmp_path, 6)
    (tmp_path / "s_iter_6.caffemodel").unlink()
    again = train(
        solver.load(path).until(6), replace(request, state=str(tmp_path / "s_iter_3.solverstate.npz"))
    )
    assert bytes_of(tmp_path, 6) == straight != bytes_of(tmp_path, 3)
    assert (again.loss, again.tests) == (whole.loss, whole.tests)


def test_the_seed_goes_on_too(tmp_path: Path) -> None:
    source, settings = NET.replace("# DROPOUT", DROPOUT), "max_iter: 4 snapshot: 2"
    whole = run(tmp_path, settings, source, seed=9)[0].weights
    again = run(tmp_path, settings, source, state=str(tmp_path / "s_iter_2.solverstate.npz"))[0].weights
    np.testing.assert_array_equal(again["ip"][0], whole["ip"][0])


def test_another_seed_trains_otherwise(tmp_path: Path) -> None:
    made = [run(tmp_path, "max_iter: 1", seed=seed)[0].weights["ip"][0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_iter_size_is_a_larger_batch(tmp_path: Path) -> None:
    plain = "\n".join(line for line in NET.splitlines() if "BatchNorm" not in line)
    once = run(tmp_path, "max_iter: 4", plain)[0].weights
    half = run(tmp_path, "max_iter: 4 iter_size: 2", plain.replace("batch_size: 8", "batch_size: 4"))[
        0
    ].weights
    for name in once:
        for one, other in zip(once[name], half[name], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_batches_come_in_their_order(tmp_path: Path) -> None:
    """Display shows the last of the two batches of an iteration; behind the 60 images comes the first again."""
    path = tmp_path / "numbered.npz"
    np.savez(path, x=np.zeros((60, 1, 6, 6), np.float32), y=np.arange(60))
    source = NET.replace("num_output: 3 w", "num_output: 60 w").replace("batch_size: 8", "batch_size: 15")
    source += 'layer { name: "seen" type: "Reduction" bottom: "label" top: "seen" reduction_param { operation: MEAN } }'
    told = run(tmp_path, "max_iter: 3 iter_size: 2 display: 1", source, data=str(path))[1]
    seen = [event.outputs["seen"] for event in told if isinstance(event, Display)]
    assert seen == [(22.0,), (52.0,), (22.0,)]


def test_clipped_gradients_make_steps_of_that_length(tmp_path: Path) -> None:
    source = NET.replace("lr_mult: 2 decay_mult: 0", "lr_mult: 1")
    (tmp_path / "net.prototxt").write_text(source)
    path = tmp_path / "solver.prototxt"
    path.write_text(
        'net: "net.prototxt" base_lr: 0.5 lr_policy: "fixed" clip_gradients: 0.01 snapshot_after_train: false'
    )
    begun, ended = (train(solver.load(path).until(n), Request(data=data(tmp_path))).weights for n in (0, 1))
    moved = sum(
        ((ended[name][i] - blob) ** 2).sum()
        for name in begun
        if name != "norm"
        for i, blob in enumerate(begun[name])
    )
    assert np.sqrt(moved) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_multipliers_and_decay(tmp_path: Path) -> None:
    """lr_mult 0 leaves a blob alone; without a gradient a weight decays by lr * lr_mult * decay * decay_mult."""
    source = NET.replace(
        'top: "ip" inner',
        'top: "ip" param { lr_mult: 3 decay_mult: 2 } param { lr_mult: 0 } propagate_down: false inner',
    )
    source = source.replace('top: "loss"', 'top: "loss" loss_weight: 0')
    source += 'layer { name: "sum" type: "Reduction" bottom: "data" top: "sum" loss_weight: 1 }'
    begun = run(tmp_path, "max_iter: 0", source)[0].weights
    ended = run(tmp_path, "max_iter: 1", source)[0].weights
    np.testing.assert_allclose(ended["ip"][0], begun["ip"][0] * (1 - 0.05 * 3 * 0.001 * 2), rtol=1e-6)
    np.testing.assert_array_equal(ended["ip"][1], begun["ip"][1])


def test_hooks_come_before_and_behind_the_update(tmp_path: Path) -> None:
    seen: list[int] = []

    def freeze(iteration: int, _blobs: Any, gradients: Any) -> None:
        seen.append(iteration)
        gradients["ip", 0].zero_()

    def mask(_iteration: int, blobs: Any, rate: float) -> None:
        assert rate == 0.05
        blobs["conv", 0][0] = 0

    begun = run(tmp_path, "max_iter: 0")[0].weights
    ended = run(tmp_path, "max_iter: 3", hooks=(At(before_update=freeze), At(after_update=mask)))[0].weights
    assert seen == [0, 1, 2]
    np.testing.assert_array_equal(ended["ip"][0], begun["ip"][0])
    assert not ended["conv"][0][0].any() and ended["conv"][0][1].any()


def test_hooks_hear_of_start_tests_and_end(tmp_path: Path) -> None:
    told: list[Any] = []
    hook = At(
        start=lambda params: told.append(("start", len(params))),
        at_test=lambda iteration, params: told.append((iteration, len(params))),
        finish=lambda: told.append("finish"),
    )
    run(tmp_path, "max_iter: 4 test_interval: 2", hooks=(hook,))
    assert told == [("start", 9), (0, 9), (2, 9), (4, 9), "finish"]


class Halving:
    """Takes away the last half of conv's filters in iteration 2, with all that belongs to them."""

    def __init__(self) -> None:
        self.started: list[int] = []

    def start(self, params: Any) -> None:
        self.started.append(len(params["conv", 0]))

    def reshape(self, iteration: int, params: Any, history: Any) -> Any:
        if iteration != 2:
            return None
        half = {key: blob[:3].clone() for key, blob in params.items() if len(blob) == 6}
        half["ip", 0] = params["ip", 0][:, :12].clone()
        kept = {key: tuple(one[:3].clone() if key[0] != "ip" else one[:, :12].clone() for one in history[key])
                for key in half if key in history}  # fmt: skip
        return SimpleNamespace(outputs={"conv": 3}, params=half, history=kept)


def test_layers_may_shrink_while_training(tmp_path: Path) -> None:
    """The net goes on smaller, is snapshotted with its own prototxt, tests, and goes on from the snapshot."""
    settings = "max_iter: 6 snapshot: 4 test_iter: 1 test_interval: 2"
    hook = Halving()
    whole, _ = run(tmp_path, settings, hooks=(hook,))
    assert hook.started == [6, 3]
    assert [blob.shape[0] for blob in whole.weights["conv"]] == [3, 3]
    changed = (tmp_path / "s_iter_4.prototxt").read_text()
    assert changed == NET.replace("num_output: 6", "num_output: 3")
    straight = bytes_of(tmp_path, 6)
    other = tmp_path / "other"
    other.mkdir()
    again, _ = run(other, settings, state=str(tmp_path / "s_iter_4.solverstate.npz"), hooks=(Halving(),))
    assert bytes_of(other, 6) == straight
    assert again.tests == whole.tests


def test_a_net_that_shrinks_by_nothing_learnt_goes_on_unchanged(tmp_path: Path) -> None:
    """The same blobs under the same outputs: rebuilding the nets changes nothing."""

    def same(iteration: int, params: Any, _history: Any) -> Any:
        return SimpleNamespace(
            outputs={"conv": 6}, params={("conv", 0): params["conv", 0].clone()}, history={}
        )

    plain = run(tmp_path, "max_iter: 5")[0].weights
    rebuilt = run(tmp_path, "max_iter: 5", hooks=(At(reshape=same),))[0].weights
    for name in plain:
        for one, other in zip(plain[name], rebuilt[name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_fine_tuning(tmp_path: Path) -> None:
    run(tmp_path, "max_iter: 2")
    stored = str(tmp_path / "s_iter_2.caffemodel")
    begun = weights.load(stored)
    other = tmp_path / "other"
    other.mkdir()
    renamed = NET.replace('name: "ip"', 'name: "ip_new"')
    tuned = run(other, "max_iter: 0", renamed, weights=(stored,))[0].weights
    np.testing.assert_array_equal(tuned["conv"][0], begun["conv"][0])
    np.testing.assert_array_equal(tuned["norm"][2], begun["norm"][2])
    assert not np.array_equal(tuned["ip_new"][0], begun["ip"][0])
    with pytest.raises(WeightsError, match='layer "ip" wants 5 x 24 for blob 0, stored is 3 x 24'):
        run(other, "max_iter: 0", NET.replace("num_output: 3 w", "num_output: 5 w"), weights=(stored,))
    with pytest.raises(UsageError, match="would be overwritten by a snapshot"):
        run(tmp_path, "max_iter: 2", weights=(stored,))


def test_layers_of_the_test_net_alone_are_loaded_too(tmp_path: Path) -> None:
    """Caffe copies trained layers into the test nets as well."""
    extra = """layer { name: "more" type: "InnerProduct" bottom: "ip" top: "more" include { phase: TEST }
    inner_product_param { num_output: 1 bias_term: false } }"""
    with (tmp_path / "more.caffemodel").open("wb") as file:
        Weights([NewEntry("more", (np.full((1, 3), np.inf, np.float32),))]).write_caffemodel(file)
    settings = "max_iter: 0 test_iter: 1 test_interval: 1"
    told = run(tmp_path, settings, NET + extra, weights=(str(tmp_path / "more.caffemodel"),))[0].tests
    assert not np.isfinite(told[0].outputs["more"]).any()


def test_weights_that_the_solver_names(tmp_path: Path) -> None:
    run(tmp_path, "max_iter: 2")
    begun = weights.load(tmp_path / "s_iter_2.caffemodel")
    tuned = run(tmp_path, f'max_iter: 0 weights: "{tmp_path}/s_iter_2.caffemodel"')[0].weights
    np.testing.assert_array_equal(tuned["conv"][0], begun["conv"][0])


def test_divergence_stops_and_keeps_the_last_snapshot(tmp_path: Path) -> None:
    source = "\n".join(line for line in NET.splitlines() if "BatchNorm" not in line)
    before = described(tmp_path, "max_iter: 1 snapshot: 1", source)
    request = Request(data=data(tmp_path))
    train(before, request)
    kept = bytes_of(tmp_path, 1)
    text = (tmp_path / "solver.prototxt").read_text().replace("base_lr: 0.05", "base_lr: 1e20")
    (tmp_path / "solver.prototxt").write_text(text.replace("max_iter: 1", "max_iter: 50"))
    with pytest.raises(
        UsageError, match=r"the loss is no number any more in iteration \d+: training has diverged"
    ):
        train(
            solver.load(tmp_path / "solver.prototxt"),
            replace(request, state=str(tmp_path / "s_iter_1.solverstate.npz")),
        )
    assert bytes_of(tmp_path, 1) == kept
    assert sorted(path.name for path in tmp_path.glob("s_*"))[:2] == [
        "s_iter_1.caffemodel",
        "s_iter_1.solverstate.npz",
    ]
    for path in tmp_path.glob("*.caffemodel"):
        stored = weights.load(path)
        assert all(np.isfinite(blob).all() for name in stored for blob in stored[name])


def test_a_snapshot_whose_weights_are_too_large_is_not_called_good(tmp_path: Path) -> None:
    """Rates jump in iteration 3; the weights behind it are numbers still, what they compute is not."""
    source = "\n".join(line for line in NET.splitlines() if "BatchNorm" not in line)
    made = described(tmp_path, "max_iter: 9 snapshot: 2 gamma: 1e26 stepvalue: 3", source)
    text = (tmp_path / "solver.prototxt").read_text().replace('"fixed"', '"multistep"')
    (tmp_path / "solver.prototxt").write_text(text)
    made = solver.load(tmp_path / "solver.prototxt")
    with pytest.raises(
        UsageError, match=r"in iteration 4: .*s_iter_2.solverstate.npz is the last good snapshot"
    ):
        train(made, Request(data=data(tmp_path)))
    assert (tmp_path / "s_iter_4.solverstate.npz").exists()


def test_asked_to_stop_it_ends_with_a_snapshot(tmp_path: Path) -> None:
    asked: list[int] = []
    result, _ = run(tmp_path, "max_iter: 50", stop=lambda: asked.append(1) or len(asked) > 2)
    assert result.iteration == 3
    assert result.saved is not None and result.saved.iteration == 3


def test_what_was_stopped_is_not_called_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = described(tmp_path, "max_iter: 9000")
    printer = Printer(made, as_json=False)
    printer.close(train(made, Request(data=data(tmp_path), listen=printer, stop=lambda: True)))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"Stopped: 1 of 9,000 iterations; --snapshot {tmp_path}/s_iter_1.solverstate.npz goes on"


def test_snapshots_as_hdf5_go_on_too(tmp_path: Path) -> None:
    settings = "snapshot_format: HDF5 snapshot: 2 max_iter: 4"
    whole = run(tmp_path, settings)[0].weights
    state = str(tmp_path / "s_iter_2.solverstate.npz")
    again = run(tmp_path, settings, state=state)[0].weights
    assert (tmp_path / "s_iter_4.caffemodel.h5").is_file()
    np.testing.assert_array_equal(again["conv"][0], whole["conv"][0])


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    run(tmp_path, "max_iter: 2")
    state = str(tmp_path / "s_iter_2.solverstate.npz")
    with pytest.raises(UsageError, match="is a state of SGD, the solver is Adam"):
        run(tmp_path, 'max_iter: 4 type: "Adam"', state=state)
    with pytest.raises(FileError, match="is no solver state"):
        run(tmp_path, "max_iter: 4", state=data(tmp_path))
    with pytest.raises(FileError, match="no such file"):
        run(tmp_path, "max_iter: 4", state=str(tmp_path / "gone.npz"))
    (tmp_path / "s_iter_2.caffemodel").unlink()
    with pytest.raises(FileError, match="no such file"):
        run(tmp_path, "max_iter: 4", state=state)


def test_where_snapshots_cannot_go_is_seen_at_once(tmp_path: Path) -> None:
    made = replace(described(tmp_path, "max_iter: 2"), snapshot_prefix=str(tmp_path / "gone" / "s"))
    with pytest.raises(FileError, match="snapshots cannot be written there"):
        train(made, Request(data=data(tmp_path)))


PROGRAM = """
import sys, click
from caffe_proto import console
from caffe_proto.cli_train import COMMANDS
sys.exit(console.run(click.Group(commands={one.name: one for one in COMMANDS})))
"""


def program(
    folder: Path, *args: str, launch: tuple[str, ...] = (), **more: Any
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    path = folder / "program.py"
    path.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(path), "train", *args]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, **more
    )


def test_a_full_disk_is_one_line_and_the_last_snapshot_stays(tmp_path: Path) -> None:
    wide = NET.replace("num_output: 6", "num_output: 64")
    described(tmp_path, "max_iter: 1", wide)
    assert program(tmp_path, "solver.prototxt", "--data", data(tmp_path)).returncode == 0
    kept = bytes_of(tmp_path, 1)
    limit = len(kept) - 1000

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    state = "s_iter_1.solverstate.npz"
    found = program(
        tmp_path,
        "solver.prototxt",
        "--data",
        data(tmp_path),
        "--max-iter",
        "2",
        "--snapshot",
        state,
        preexec_fn=small,
    )
    assert found.returncode == 2
    assert "s_iter_2.caffemodel: cannot be written" in found.stderr and "Traceback" not in found.stderr
    assert bytes_of(tmp_path, 1) == kept
    assert sorted(path.name for path in tmp_path.glob("*s_iter*")) == ["s_iter_1.caffemodel", state]
    assert not list(tmp_path.glob(".*tmp"))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Batch statistics, ignored labels, iter_size, average and tests over both halves of every batch.

    Compared by absolute difference: the gradient of a bias in front of BatchNorm is zero but for rounding, which the
    mean takes out, so such biases differ by noise of any relative size.
    """
    source = NET.replace('top: "loss" }', 'top: "loss" loss_param { ignore_label: 2 } }')
    settings = (
        "max_iter: 20 clip_gradients: 1 iter_size: 2 test_iter: 3 test_interval: 10 display: 5 snapshot: 10"
    )
    args = ("solver.prototxt", "--data", data(tmp_path, 61), "--test-data", data(tmp_path, 24, 1), "--json")
    described(tmp_path, settings, source)
    alone = program(tmp_path, *args, "-o", "one")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    both = program(tmp_path, *args, "-o", "two", launch=launch)
    assert (alone.returncode, both.returncode) == (0, 0), alone.stderr + both.stderr
    one, two = (weights.load(tmp_path / f"{name}_iter_20.caffemodel") for name in ("one", "two"))
    for name in one:
        for a, b in zip(one[name], two[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    first, second = json.loads(alone.stdout), json.loads(both.stdout)
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)
    assert first["tests"][0]["outputs"] == pytest.approx(second["tests"][0]["outputs"], abs=1e-4)


def cli(*args: str) -> int:
    return console.run(click.Group(commands={one.name: one for one in COMMANDS}), ["train", *args])


def test_the_command_prints_caffes_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described(tmp_path, "max_iter: 4 display: 2 test_iter: 1 test_interval: 4 test_compute_loss: true")
    args = (str(tmp_path / "solver.prototxt"), "--data", data(tmp_path), "--test-data", data(tmp_path, 24, 1))
    assert cli(*args, "-o", str(tmp_path / "o")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Iteration 0, Testing net (#0)"
    assert printed[1].startswith("    Test loss: ")
    assert printed[2].startswith("    Test net output #0: loss = ")
    assert any(line.startswith("Iteration 2 (") and line.endswith(", lr = 0.05") for line in printed)
    train_lines = [line for line in printed if line.startswith("    Train net output #0: loss = ")]
    value = train_lines[0].split(" = ")[1].split()[0]
    assert train_lines[0] == f"    Train net output #0: loss = {value} (* 1 = {value} loss)"
    assert any(
        line == f"Snapshotting to {tmp_path}/o_iter_4.caffemodel and {tmp_path}/o_iter_4.solverstate.npz"
        for line in printed
    )
    assert printed[-1].startswith("Optimization Done: 4 iterations, ")


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described(tmp_path, "max_iter: 9 test_iter: 1 test_interval: 4")
    args = (str(tmp_path / "solver.prototxt"), "--data", data(tmp_path), "--test-data", data(tmp_path, 24, 1))
    assert cli(*args, "--max-iter", "4", "--seed", "5", "--device", "cpu", "--threads", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iterations"] == 4 and found["images_per_second"] > 0
    assert set(found["tests"][0]["outputs"]) == {"loss", "accuracy"}
    assert found["files"]["weights"] == f"{tmp_path}/s_iter_4.caffemodel"
    wanted = train(
        solver.load(tmp_path / "solver.prototxt").until(4), Request(data=args[2], test_data=args[4], seed=5)
    )
    np.testing.assert_array_equal(weights.load(found["files"]["weights"])["ip"][0], wanted.weights["ip"][0])


def test_a_training_of_no_iterations_has_no_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described(tmp_path, "max_iter: 9 test_iter: 1 test_interval: 4")
    args = (str(tmp_path / "solver.prototxt"), "--data", data(tmp_path), "--test-data", data(tmp_path, 24, 1))
    assert cli(*args, "--max-iter", "0", "--device", "cpu", "--threads", "1", "--json") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["loss"] is None and "NaN" not in printed


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (("gone.prototxt",), "gone.prototxt: no such file"),
        (("solver.prototxt",), 'layer "data": MemoryData gives no data here; name images'),
        (("solver.prototxt", "--data", "gone.npz"), 'gone.npz: layer "data": no such file'),
        (("solver.prototxt", "--data", "data0.npz", "--device", "tpu"), "tpu"),
    ],
)
def test_errors_are_one_line(
    args: tuple[str, ...],
    cause: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    described(tmp_path, "max_iter: 1")
    data(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli(*args) == 2
    printed = capsys.readouterr().err
    assert cause in printed and printed.count("\n") == 1


def test_without_torch_only_training_is_refused(tmp_path: Path) -> None:
    described(tmp_path, "max_iter: 1")
    hidden = tmp_path / "hidden.py"
    hidden.write_text("import sys\nsys.modules['torch'] = None\n" + PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(hidden), "train", "solver.prototxt"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr == 'caffe-lra: error: training needs torch; install "caffe-lra[train]"\n'


SHELF = Shelf()


def feeds(source: str, phase: str = "TRAIN", path: Path | None = None, **options: Any) -> Feeds:
    made = net.parse(source, path, NetState(phase))
    return open_feeds(graph.build(made), made, Options(shelf=SHELF, **options))


def labels_of(made: Feeds, batches: int, top: str = "label") -> list[float]:
    found = [float(one) for i in range(batches) for one in made.batch(i)[top].reshape(-1)]
    made.close()
    return found


def lmdb_of(folder: Path, n: int) -> Path:
    """An LMDB of n pictures of 4 x 5 whose labels are their numbers and whose pixels tell label and place."""
    from caffe_proto.data.build import write_lmdb
    from caffe_proto.schema import message_class

    pixels = [(10 * i + np.arange(20)).astype(np.uint8) for i in range(n)]
    records = [
        (
            f"{i:08d}",
            message_class("Datum")(
                channels=1, height=4, width=5, data=pixels[i].tobytes(), label=i
            ).SerializeToString(),
        )
        for i in range(n)
    ]
    path = folder / "lmdb"
    path.mkdir()
    write_lmdb(path, records)
    return path


DATA = """layer {{ name: "d" type: "Data" top: "data" top: "label"
transform_param {{ {transform} }} data_param {{ source: "{source}" batch_size: 3 backend: LMDB {more} }} }}"""


def test_a_data_layer_goes_round_in_order(tmp_path: Path) -> None:
    source = DATA.format(source=lmdb_of(tmp_path, 5), transform="scale: 0.5 mean_value: 2", more="")
    made = feeds(source)
    assert made.shapes == {"data": (3, 1, 4, 5), "label": (3,)}
    np.testing.assert_allclose(made.batch(0)["data"][2, 0, 0], (20 + np.arange(5) - 2) / 2)
    assert labels_of(made, 4) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_net_may_be_tested_on_what_it_is_trained_on(tmp_path: Path) -> None:
    source = NET.splitlines()
    path = lmdb_of(tmp_path, 3)
    layer = f'''layer {{ name: "data" type: "Data" top: "data" top: "label"
    data_param {{ source: "{path}" batch_size: 8 backend: LMDB }} }}'''
    text = "\n".join([layer, *source[4:]])
    result, _ = run(tmp_path, "max_iter: 2 test_iter: 1 test_interval: 1", text, data=None, test_data=None)
    assert len(result.tests) == 1
    assert run(tmp_path, "max_iter: 2", text, data=None, test_data=None)[0].iteration == 2  # it was closed


def test_random_crops_and_mirrors_follow_from_seed_and_place(tmp_path: Path) -> None:
    source = DATA.format(source=lmdb_of(tmp_path, 1), transform="crop_size: 3 mirror: true", more="")
    one, again, other = (feeds(source, seed=seed) for seed in (0, 0, 1))
    batches = [[made.batch(i)["data"] for i in range(60)] for made in (one, again, other)]
    np.testing.assert_array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])
    corners = {(image[0, 0, 0], image[0, 0, 1] > image[0, 0, 0]) for batch in batches[0] for image in batch}
    # 2 x 3 places; mirrored ones begin at their last column
    plain = {(5 * row + column, True) for row in range(2) for column in range(3)}
    assert corners == plain | {(5 * row + column + 2, False) for row in range(2) for column in range(3)}
    tested = feeds(source, "TEST")
    np.testing.assert_array_equal(tested.batch(0)["data"], tested.batch(1)["data"])
    for made in (one, again, other, tested):
        made.close()


def test_image_data_is_shuffled_anew_in_each_round(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(4):
        Image.fromarray(np.full((2, 2, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"{i}.png {i}\n" for i in range(4)))
    source = f"""layer {{ name: "d" type: "ImageData" top: "data" top: "label" transform_param {{ mean_value: 5 }}
    image_data_param {{ source: "{tmp_path}/list.txt" batch_size: 2 shuffle: true is_color: false }} }}"""
    made = feeds(source)
    batch = made.batch(0)
    assert batch["data"].shape == (2, 1, 2, 2)
    np.testing.assert_array_equal(batch["data"][:, 0, 0, 0], 10 * batch["label"] - 5)
    rounds = np.array(labels_of(feeds(source), 12)).reshape(6, 4)
    assert all(sorted(one) == [0, 1, 2, 3] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    made.close()


def hdf5_list(folder: Path) -> Path:
    """Two files of 3 and 2 rows."""
    import h5py

    for name, rows in (("a", range(3)), ("b", range(3, 5))):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["feature"] = np.array([[[row, row + 0.5]] for row in rows], np.float64)
            file["target"] = np.array([row * 10 for row in rows], np.int32)
    (folder / "list.txt").write_text("a.h5\nb.h5\n")
    return folder / "list.txt"


HDF5 = """layer {{ name: "d" type: "HDF5Data" top: "feature" top: "target"
hdf5_data_param {{ source: "{source}" batch_size: 2 {more} }} }}"""


def test_hdf5_data_by_the_names_of_the_tops(tmp_path: Path) -> None:
    made = feeds(HDF5.format(source=hdf5_list(tmp_path), more=""))
    assert made.shapes == {"feature": (2, 1, 2), "target": (2,)}
    np.testing.assert_array_equal(made.batch(1)["feature"], [[[2, 2.5]], [[3, 3.5]]])
    assert labels_of(made, 5, "target") == [0, 10, 20, 30, 40, 0, 10, 20, 30, 40]
    with pytest.raises(FileError, match='has no data set "other" with rows; it has feature, target'):
        feeds(HDF5.format(source=tmp_path / "list.txt", more="").replace('top: "target"', 'top: "other"'))


def test_shuffled_hdf5_keeps_files_together(tmp_path: Path) -> None:
    made = feeds(HDF5.format(source=hdf5_list(tmp_path), more="shuffle: true"))
    rounds = np.array(labels_of(made, 20, "target")).reshape(8, 5)
    assert all(sorted(one) == [0, 10, 20, 30, 40] for one in rounds)
    for one in rounds:
        first = sorted(one[:3]) == [0, 10, 20] or sorted(one[:2]) == [30, 40]
        assert first
    assert len({tuple(one) for one in rounds}) > 2


def test_dummy_data() -> None:
    source = """layer { name: "d" type: "DummyData" top: "a" top: "b" dummy_data_param {
    shape { dim: 4 dim: 2 } shape { dim: 4 } data_filler { type: "gaussian" } data_filler { value: 3 } } }"""
    made = feeds(source)
    first, second = made.batch(0), made.batch(1)
    np.testing.assert_array_equal(first["b"], [3, 3, 3, 3])
    assert first["a"].shape == (4, 2) and not np.array_equal(first["a"], second["a"])
    np.testing.assert_array_equal(made.batch(0)["a"], first["a"])
    parts = [feeds(source, part=Part(rank, 2)) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part.batch(0)["a"] for part in parts]), first["a"])


def test_parts_of_a_batch_make_the_whole(tmp_path: Path) -> None:
    made = data(tmp_path, 10)
    source = NET.replace("batch_size: 8", "batch_size: 6")
    whole = feeds(source, data=made)
    parts = [feeds(source, data=made, part=Part(rank, 2)) for rank in (0, 1)]
    for number in range(3):
        for top in ("data", "label"):
            joined = np.concatenate([part.batch(number)[top] for part in parts])
            np.testing.assert_array_equal(joined, whole.batch(number)[top])
    with pytest.raises(UsageError, match="a batch of 6 cannot be shared by 4 processes"):
        feeds(source, data=made, part=Part(0, 4))


def test_data_stand_for_input_layers(tmp_path: Path) -> None:
    source = (
        """input: "data" input_shape { dim: 4 dim: 1 dim: 4 dim: 4 } input: "label" input_shape { dim: 4 }"""
    )
    made = feeds(source, data=data(tmp_path, 10))
    assert made.shapes == {"data": (4, 1, 4, 4), "label": (4,)}
    assert labels_of(made, 1) == [0, 1, 2, 0]
    with pytest.raises(UsageError, match="the net has 3 inputs"):
        feeds(source + ' input: "more" input_shape { dim: 1 }', data=data(tmp_path, 10))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda folder: (folder / "gone").name, 'there is no source "gone"'),
        (lambda folder: _leveldb(folder), "is a LevelDB"),
    ],
)
def test_sources_that_cannot_be_had(change: Callable[[Path], str], cause: str, tmp_path: Path) -> None:
    with pytest.raises(Error, match=cause) as caught:
        feeds(DATA.format(source=change(tmp_path), transform="", more=""))
    assert 'layer "d"' in str(caught.value)


def _leveldb(folder: Path) -> str:
    (folder / "CURRENT").write_text("MANIFEST-000001\n")
    return str(folder)
