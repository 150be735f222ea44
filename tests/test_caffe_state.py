"""Going on from solver states of Caffe: binary and HDF5, written here by the schema, and two of real Caffe's own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import SHARED, needs_shared

from caffe_proto import caffe_state, schema, snapshots, solver, weights
from caffe_proto.errors import Error, FileError, WeightsError
from caffe_proto.solver import Update
from caffe_proto.weights import NewEntry, Weights
from lra.cli import main

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="training needs torch")

Key = tuple[str, int]

NET = """
name: "small"
layer { name: "data" type: "MemoryData" top: "data" top: "label"
        memory_data_param { batch_size: 9 channels: 1 height: 6 width: 6 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" param { lr_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
        convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "norm" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "left" type: "Convolution" bottom: "conv" top: "left" param { name: "both" }
        convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "fixed" type: "InnerProduct" bottom: "conv" top: "fixed" param { lr_mult: 0 } param { lr_mult: 0 }
        inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "right" type: "Convolution" bottom: "conv" top: "right" param { name: "both" }
        convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "flat" type: "Flatten" bottom: "left" top: "flat" }
layer { name: "flat2" type: "Flatten" bottom: "right" top: "flat2" }
layer { name: "cat" type: "Concat" bottom: "flat" bottom: "fixed" bottom: "flat2" top: "cat" }
layer { name: "ip" type: "InnerProduct" bottom: "cat" top: "ip" inner_product_param { num_output: 3 weight_filler { type: "msra" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
# Caffe's learnable_params of this net, by hand.
LEARNABLE: dict[Key, tuple[int, ...]] = {
    ("conv", 0): (4, 1, 3, 3),
    ("conv", 1): (4,),
    ("norm", 0): (4,),
    ("norm", 1): (4,),
    ("norm", 2): (1,),
    ("scale", 0): (4,),
    ("scale", 1): (4,),
    ("left", 0): (4, 4, 3, 3),
    ("left", 1): (4,),
    ("fixed", 0): (5, 64),
    ("fixed", 1): (5,),
    ("right", 1): (4,),
    ("ip", 0): (3, 37),
    ("ip", 1): (3,),
}
KINDS = ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam")
FORMS = (".solverstate", ".solverstate.h5")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A net and images of one batch, in the folder that the test runs in."""
    numbers = np.random.default_rng(0)
    images = numbers.random((9, 1, 6, 6)).astype(np.float32)
    for i in range(9):
        images[i, 0, 2 * (i % 3) : 2 * (i % 3) + 2] += 1
    np.savez(tmp_path / "x.npz", x=images, y=np.arange(9) % 3)
    (tmp_path / "net.prototxt").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def solver_file(kind: str = "SGD", settings: str = 'lr_policy: "fixed"', base_lr: float = 0.02) -> str:
    momentum = "" if kind in ("AdaGrad", "RMSProp") else "momentum: 0.9"
    delta = "delta: 1e-3" if kind == "AdaDelta" else ""
    Path("solver.prototxt").write_text(
        f'net: "net.prototxt" snapshot_prefix: "s" type: "{kind}" base_lr: {base_lr} {momentum} {delta} '
        f"weight_decay: 0.001 random_seed: 3 {settings}\n"
    )
    return "solver.prototxt"


def run(iterations: int, state: str | None = None, *, file: str = "solver.prototxt", **more: Any) -> Any:
    """Train to so many iterations; the result and the learning rates that were shown."""
    from caffe_proto.train import Display, Request, train

    told: list[Any] = []
    described = replace(solver.load(file).until(iterations), display=1)
    result = train(described, Request(state=state, data="x.npz", listen=told.append, **more))
    return result, [one.rate for one in told if isinstance(one, Display)]


def blobs_of(path: str) -> dict[Key, np.ndarray]:
    stored = weights.load(path)
    return {(name, i): blob for name in stored for i, blob in enumerate(stored[name])}


def write_state(
    path: str,
    iteration: int,
    named: str,
    history: Sequence[np.ndarray],
    steps: int = 0,
    *,
    legacy: bool = False,
) -> str:
    """A state as Caffe writes it; ``legacy``: as Caffe did before blobs had any number of axes."""
    if path.endswith(".h5"):
        with h5py.File(path, "w") as file:
            file["iter"] = np.array([iteration], np.int32)
            file["learned_net"] = np.array(named, f"S{len(named) + 1}")
            file["current_step"] = np.array([steps], np.int32)
            for i, array in enumerate(history):
                file[f"history/{i}"] = array
        return path
    state: Any = schema.message_class("SolverState")(iter=iteration, learned_net=named, current_step=steps)
    for array in history:
        blob = state.history.add(data=array.reshape(-1).tolist())
        if legacy:
            blob.num, blob.channels, blob.height, blob.width = (1,) * (4 - array.ndim) + array.shape
        else:
            blob.shape.dim.extend(array.shape)
    Path(path).write_bytes(state.SerializeToString())
    return path


def in_caffes_order(
    carried: Mapping[Key, tuple[np.ndarray, ...]], slots: int, learnable: Mapping[Key, tuple[int, ...]]
) -> list[np.ndarray]:
    """What the rule carries as Caffe lists it; what blobs without a learning rate have is never used."""
    numbers = np.random.default_rng(1)
    return [
        carried[key][slot] if key in carried else numbers.random(shape).astype(np.float32)
        for slot in range(slots)
        for key, shape in learnable.items()
    ]


def translate(form: str, iteration: int = 2, *, legacy: bool = False) -> str:
    """The snapshot of an iteration as a state of Caffe; our own is removed."""
    own = snapshots.load(f"s_iter_{iteration}.solverstate.npz")
    slots = 2 if own.kind in ("Adam", "AdaDelta") else 1
    history = in_caffes_order(own.history, slots, LEARNABLE)
    named = f"examples/small/s_iter_{iteration}.caffemodel"
    Path(f"s_iter_{iteration}.solverstate.npz").unlink()
    return write_state(f"s_iter_{iteration}{form}", iteration, named, history, own.steps or 0, legacy=legacy)


@needs_torch
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_as_if_it_had_not_stopped(kind: str, form: str, folder: Path) -> None:
    solver_file(kind, 'lr_policy: "fixed" snapshot: 2')
    run(5)
    straight = Path("s_iter_5.caffemodel").read_bytes()
    Path("s_iter_5.caffemodel").unlink()
    run(5, translate(form))
    assert Path("s_iter_5.caffemodel").read_bytes() == straight
    run(5, write_state("none.solverstate", 2, "s_iter_2.caffemodel", nothing(kind)))
    assert Path("s_iter_5.caffemodel").read_bytes() != straight


def nothing(kind: str = "SGD") -> list[np.ndarray]:
    slots = 2 if kind in ("Adam", "AdaDelta") else 1
    return [np.zeros(shape, np.float32) for shape in LEARNABLE.values()] * slots


@needs_torch
def test_old_states_of_four_axes_go_on_too(folder: Path) -> None:
    solver_file("Adam", 'lr_policy: "fixed" snapshot: 2')
    run(4)
    straight = Path("s_iter_4.caffemodel").read_bytes()
    Path("s_iter_4.caffemodel").unlink()
    state = translate(".solverstate", legacy=True)
    assert {array.ndim for array in caffe_state.load(state).history} == {4}
    run(4, state)
    assert Path("s_iter_4.caffemodel").read_bytes() == straight


def caffes_rates(policy: str, steps: Sequence[int], at: int, current: int, count: int) -> Iterator[float]:
    """The learning rates of Caffe's loop, with its counter."""
    for iteration in range(at, at + count):
        if policy == "step":
            current = iteration // steps[0]
        elif policy == "multistep" and current < len(steps) and iteration >= steps[current]:
            current += 1
        yield 0.5**current


@needs_torch
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("policy", "steps", "at", "current"),
    [
        ("multistep", (3, 5), 2, 0),
        ("multistep", (3, 5), 3, 0),
        ("multistep", (3, 5), 4, 1),
        ("multistep", (3, 5), 5, 1),
        ("multistep", (3, 5), 6, 2),
        ("multistep", (1, 2, 3, 8), 4, 0),
        ("multistep", (6, 7), 4, 1),
        ("multistep", (3, 5), 4, 9),
        ("step", (2,), 3, 0),
    ],
)
def test_the_learning_rate_goes_on_from_caffes_counter(
    policy: str, steps: tuple[int, ...], at: int, current: int, form: str, folder: Path
) -> None:
    """The counter is the state's, whatever the stepvalues of the solver say by now; our own snapshots keep it."""
    values = " ".join(f"{'stepvalue' if policy == 'multistep' else 'stepsize'}: {one}" for one in steps)
    solver_file(settings=f'lr_policy: "{policy}" gamma: 0.5 {values} snapshot: 1', base_lr=1e-6)
    run(1)
    state = write_state(f"a{form}", at, "s_iter_1.caffemodel", nothing(), current)
    wanted = [1e-6 * factor for factor in caffes_rates(policy, steps, at, current, 5)]
    assert run(at + 5, state)[1] == pytest.approx(wanted, rel=1e-12)
    assert run(at + 5, f"s_iter_{at + 2}.solverstate.npz")[1] == pytest.approx(wanted[2:], rel=1e-12)


@needs_torch
def test_what_the_state_lacks_is_the_solvers(folder: Path) -> None:
    solver_file()
    run(1)
    write_state("a.solverstate", 1, "s_iter_1.caffemodel", nothing())
    run(2, "a.solverstate")
    assert snapshots.load("s_iter_2.solverstate.npz").seed == 3
    run(2, "a.solverstate", seed=8)
    assert snapshots.load("s_iter_2.solverstate.npz").seed == 8


def test_weights_are_looked_for_as_named_then_beside_the_state(folder: Path) -> None:
    for name in ("here/w.caffemodel", "there/w.caffemodel"):
        Path(name).parent.mkdir()
        Path(name).write_bytes(b"")
    for named, wanted in (
        ("here/w.caffemodel", "here"),
        (str(folder / "here" / "w.caffemodel"), "here"),
        ("gone/w.caffemodel", "there"),
        ("/gone/w.caffemodel", "there"),
        ("w.caffemodel", "there"),
        ("C:\\caffe\\w.caffemodel", "there"),
    ):
        state = caffe_state.load(write_state("there/a.solverstate", 1, named, ()))
        assert state.weights() == folder / wanted / "w.caffemodel"


@needs_torch
def test_missing_weights_are_said_with_both_places(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver_file()
    Path("there").mkdir()
    write_state("there/a.solverstate", 1, "gone/w.caffemodel", nothing())
    assert main(["train", "solver.prototxt", "--data", "x.npz", "--snapshot", "there/a.solverstate"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("there/a.solverstate: ", '"gone/w.caffemodel"', '"there/w.caffemodel"', "--weights"):
        assert part in said
    given = ("--snapshot", "there/a.solverstate", "--weights", "w.caffemodel")
    assert main(["train", "solver.prototxt", "--data", "x.npz", *given]) == 2
    assert "weights and a snapshot are both given" in capsys.readouterr().err


@needs_torch
def test_the_command_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver_file(settings='lr_policy: "fixed" display: 1 snapshot: 2')
    given = ["train", "solver.prototxt", "--data", "x.npz", "--max-iter", "4"]
    assert main(given) == 0
    straight = Path("s_iter_4.caffemodel").read_bytes()
    capsys.readouterr()
    assert main([*given, "--snapshot", translate(".solverstate")]) == 0
    said = capsys.readouterr().out
    assert "Iteration 2 (" in said and "Iteration 1 (" not in said
    assert Path("s_iter_4.caffemodel").read_bytes() == straight


@needs_torch
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ("Nesterov", "AdaDelta"))
def test_states_for_caffe_hold_what_caffe_would_write(
    kind: str, form: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read here by the schema and by h5py; and going on from them is as if it had not stopped."""
    hdf5 = "snapshot_format: HDF5" if form.endswith("h5") else ""
    settings = f'lr_policy: "multistep" gamma: 0.5 stepvalue: 1 stepvalue: 3 snapshot: 2 {hdf5}'
    solver_file(kind, settings)
    Path("out").mkdir()
    given = ["train", "solver.prototxt", "--data", "x.npz", "--max-iter", "4", "-o", "out/s", "--caffe-state"]
    assert main([*given, "--json"]) == 0
    assert f'"caffe_state": "out/s_iter_4{form}"' in capsys.readouterr().out
    model = f"caffemodel{'.h5' if hdf5 else ''}"
    own = snapshots.load("out/s_iter_2.solverstate.npz")
    slots = 2 if kind == "AdaDelta" else 1
    wanted = [
        own.history[key][slot] if key in own.history else np.zeros(shape)
        for slot in range(slots)
        for key, shape in LEARNABLE.items()
    ]
    found = as_caffe_reads(f"out/s_iter_2{form}")
    assert found[:3] == (2, f"out/s_iter_2.{model}", 1)
    assert any(array.any() for array in wanted)
    for one, other in zip(found[3], wanted, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)
    straight = blobs_of(f"out/s_iter_4.{model}")
    Path("out/s_iter_2.solverstate.npz").unlink()
    assert main([*given, "--snapshot", f"out/s_iter_2{form}"]) == 0
    assert f"for Caffe to out/s_iter_4{form}\n" in capsys.readouterr().out
    for key, blob in blobs_of(f"out/s_iter_4.{model}").items():
        np.testing.assert_array_equal(blob, straight[key])


def as_caffe_reads(path: str) -> tuple[int, str, int, list[np.ndarray]]:
    if path.endswith(".h5"):
        with h5py.File(path) as file:
            assert set(file) == {"iter", "learned_net", "current_step", "history"}
            for name in ("iter", "current_step"):
                assert (file[name].shape, file[name].dtype) == ((1,), np.int32)
            name = file["learned_net"][()]
            assert file["learned_net"].dtype == f"S{len(name) + 1}"
            arrays = [file[f"history/{i}"][()] for i in range(len(file["history"]))]
            return int(file["iter"][0]), name.decode(), int(file["current_step"][0]), arrays
    state: Any = schema.message_class("SolverState").FromString(Path(path).read_bytes())
    arrays = [np.array(blob.data, np.float32).reshape(tuple(blob.shape.dim)) for blob in state.history]
    return state.iter, state.learned_net, state.current_step, arrays


@needs_torch
def test_a_state_that_is_gone_on_from_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver_file()
    run(1)
    write_state("s_iter_2.solverstate", 1, "s_iter_1.caffemodel", nothing())
    before = Path("s_iter_2.solverstate").read_bytes()
    given = ["train", "solver.prototxt", "--data", "x.npz", "--max-iter", "2", "--caffe-state"]
    assert main([*given, "--snapshot", "s_iter_2.solverstate"]) == 2
    assert "would be overwritten by a snapshot" in capsys.readouterr().err
    assert Path("s_iter_2.solverstate").read_bytes() == before


def read(state: str, kind: str = "SGD") -> dict[Key, tuple[np.ndarray, ...]]:
    return caffe_state.load(state).histories(LEARNABLE, Update(kind))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_blob_gets_its_own_history(kind: str, form: str, tmp_path: Path) -> None:
    numbers = np.random.default_rng(2)
    slots = 2 if kind in ("Adam", "AdaDelta") else 1
    wanted = {
        key: tuple(numbers.random(shape).astype(np.float32) for _ in range(slots))
        for key, shape in LEARNABLE.items()
    }
    path = write_state(str(tmp_path / f"a{form}"), 7, "w", in_caffes_order(wanted, slots, LEARNABLE), 3)
    state = caffe_state.load(path)
    assert (state.iteration, state.steps, state.learned_net) == (7, 3, "w")
    found = state.histories(LEARNABLE, Update(kind))
    assert list(found) == list(wanted)
    for key, arrays in wanted.items():
        assert len(found[key]) == slots
        for one, other in zip(found[key], arrays, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_states_that_do_not_fit(form: str, tmp_path: Path) -> None:
    path = str(tmp_path / f"a{form}")
    write_state(path, 1, "w", nothing()[:-1])
    with pytest.raises(WeightsError, match=r"holds 13 history blobs; SGD with the 14 learnt blobs .* has 14"):
        read(path)
    write_state(path, 1, "w", nothing())
    with pytest.raises(WeightsError, match=r"holds 14 history blobs; Adam .* has 28 \(two for each\)"):
        read(path, "Adam")
    wrong = nothing()
    wrong[7] = np.zeros((4, 4, 5, 5), np.float32)
    write_state(path, 1, "w", wrong)
    with pytest.raises(
        WeightsError, match=r'"left": history blob 7, of blob 0, is 4 x 4 x 5 x 5; the net has 4 x 4 x 3 x 3'
    ):
        read(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("iteration", "named", "steps", "said"),
    [(-1, "w", 0, "iter of"), (1, "w", -2, "current_step of"), (1, "", 0, "names no weights")],
)
def test_values_that_caffe_does_not_write(
    iteration: int, named: str, steps: int, said: str, form: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=said):
        caffe_state.load(write_state(str(tmp_path / f"a{form}"), iteration, named, nothing(), steps))


def test_states_of_the_first_caffe_know_no_step(tmp_path: Path) -> None:
    state: Any = schema.message_class("SolverState")(iter=4, learned_net="w")
    (tmp_path / "a").write_bytes(state.SerializeToString())
    assert caffe_state.load(tmp_path / "a").steps == 0


def test_a_damaged_blob_is_said_with_its_number(tmp_path: Path) -> None:
    state: Any = schema.message_class("SolverState")(iter=4, learned_net="w")
    state.history.add(data=[1, 2, 3]).shape.dim.append(3)
    state.history.add(data=[1, 2, 3]).shape.dim.append(4)
    (tmp_path / "a").write_bytes(state.SerializeToString())
    with pytest.raises(
        FileError, match=r"history blob 1 is damaged: a blob of shape 4 \(4\) holds 3 numbers"
    ):
        caffe_state.load(tmp_path / "a")


def test_what_is_no_state_is_said(tmp_path: Path) -> None:
    entry = NewEntry("ip", (np.ones((2, 3), np.float32),))
    with (tmp_path / "w.caffemodel").open("wb") as file:
        Weights([entry]).write_caffemodel(file)
    Weights([entry]).write_hdf5(tmp_path / "w.caffemodel.h5")
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "empty").write_bytes(b"")
    np.save(tmp_path / "a.npy", np.ones(3))
    for name, said in (
        ("w.caffemodel", "is no solver state"),
        ("w.caffemodel.h5", "is no solver state"),
        ("net.prototxt", "is no solver state"),
        ("a.npy", "is no solver state"),
        ("empty", "the file is empty"),
        ("gone", "no such file"),
        (".", "is a folder"),
    ):
        with pytest.raises(FileError, match=said):
            caffe_state.load(tmp_path / name)


def test_a_cut_off_state_is_said(tmp_path: Path) -> None:
    whole = Path(write_state(str(tmp_path / "a"), 3, "w", nothing(), 5)).read_bytes()
    history = nothing()
    silent = []
    for end in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:end])
        try:
            found = read(str(tmp_path / "a"))
        except Error as error:
            assert str(tmp_path / "a") in str(error)
        else:
            silent.append(end)
            assert [array.size for (array,) in found.values()] == [array.size for array in history]
    assert silent == [len(whole) - 2]  # the state of a Caffe that knew no current_step


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_an_error_or_nothing(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{form}"
    whole = Path(write_state(str(path), 3, "w", nothing(), 5)).read_bytes()
    numbers = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in numbers.integers(0, min(len(whole), 1500), 3):
            damaged[place] = numbers.integers(0, 256)
        path.write_bytes(damaged[: numbers.integers(1, len(whole) + 1)])
        try:
            caffe_state.load(path).histories(LEARNABLE, Update("SGD"))
        except Error as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


def test_a_state_of_endless_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x08\x01" + b"\x1a\x00" * 200_000)
    with pytest.raises(FileError, match="more than 100,000 fields"):
        caffe_state.load(tmp_path / "a")


@needs_torch
@needs_shared
@pytest.mark.parametrize(
    ("net", "state", "model"),
    [
        (
            "caffe_v1_everpeace/cifar10/cifar10_full_train_test.prototxt",
            "caffe_v1_everpeace/cifar10/cifar10_full_iter_70000.solverstate",
            "caffe_v1_everpeace/cifar10/cifar10_full_iter_70000.caffemodel",
        ),
        (
            "cifar10_h5_jwcom79/cifar10_quick_train_test.prototxt",
            "cifar10_h5_jwcom79/cifar10_quick_iter_5000.solverstate.h5",
            "cifar10_h5_jwcom79/cifar10_quick_iter_5000.caffemodel.h5",
        ),
    ],
)
def test_real_states_of_caffe(
    net: str, state: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate of 0 the momentum alone moves the weights: every one by 0.9 of its history."""
    monkeypatch.chdir(tmp_path)
    folder = SHARED / "data" / "models"
    stored = caffe_state.load(folder / state)
    os.symlink(folder / model, Path(stored.learned_net).name)
    os.symlink(folder / state, Path(state).name)
    for path in (folder / net).parent.glob("mean.binaryproto"):
        Path("examples/cifar10").mkdir(parents=True)
        os.symlink(path, "examples/cifar10/mean.binaryproto")
    numbers = np.random.default_rng(0)
    np.savez("x.npz", x=numbers.integers(0, 256, (100, 3, 32, 32)).astype(np.float32), y=np.arange(100) % 10)
    Path("s.prototxt").write_text(
        f'train_net: "{folder / net}" base_lr: 0 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.004 snapshot_prefix: "s"'
    )
    before = blobs_of(str(folder / model))
    result, _ = run(stored.iteration + 1, Path(state).name, file="s.prototxt")
    after = {(name, i): blob for name in result.weights for i, blob in enumerate(result.weights[name])}
    assert len(stored.history) == len(after) and any(array.any() for array in stored.history)
    for (key, blob), history in zip(after.items(), stored.history, strict=True):
        wanted = before[key].reshape(blob.shape) - np.float32(0.9) * history.reshape(blob.shape)
        np.testing.assert_allclose(blob, wanted, rtol=1e-6, atol=1e-9)
