"""Solver files, learning rates and update rules, against numbers worked out by Caffe's formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from caffe_proto import solver
from caffe_proto.errors import FileError, NetError, UnsupportedError
from caffe_proto.solver import Rates, Update

NET = 'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 2 } } }'
FIXED = 'lr_policy: "fixed" '


def write(folder: Path, text: str, name: str = "solver.prototxt") -> Path:
    """A solver file, beside net.prototxt."""
    (folder / "net.prototxt").write_text(NET)
    path = folder / name
    path.write_text(text)
    return path


def read(folder: Path, text: str) -> solver.Solver:
    return solver.load(write(folder, text))


@pytest.mark.parametrize(
    ("rates", "iteration", "wanted"),
    [
        (Rates("fixed", 0.1), 12345, 0.1),
        (Rates("step", 0.1, gamma=0.5, stepsize=10), 9, 0.1),
        (Rates("step", 0.1, gamma=0.5, stepsize=10), 10, 0.05),
        (Rates("step", 0.1, gamma=0.5, stepsize=10), 35, 0.0125),
        (Rates("exp", 0.1, gamma=0.5), 3, 0.0125),
        (Rates("inv", 0.01, gamma=0.0001, power=0.75), 10000, 0.01 * 2**-0.75),
        (Rates("multistep", 1.0, gamma=0.1, stepvalues=(5, 8)), 4, 1.0),
        (Rates("multistep", 1.0, gamma=0.1, stepvalues=(5, 8)), 5, 0.1),
        (Rates("multistep", 1.0, gamma=0.1, stepvalues=(5, 8)), 8, 0.01),
        (Rates("poly", 0.02, power=1, max_iter=100), 25, 0.015),
        (Rates("poly", 0.02, power=0.5, max_iter=100), 75, 0.01),
        (Rates("sigmoid", 1.0, gamma=-0.1, stepsize=50), 50, 0.5),
        (Rates("sigmoid", 1.0, gamma=-0.1, stepsize=50), 60, 1 / (1 + math.e)),
    ],
)
def test_learning_rates(rates: Rates, iteration: int, wanted: float) -> None:
    assert rates.at(iteration) == pytest.approx(wanted, rel=1e-12)


def test_a_stepvalue_is_passed_once_an_iteration() -> None:
    """Caffe looks at one stepvalue in each iteration: of two that are equal the second counts one later."""
    rates = Rates("multistep", 1.0, gamma=0.1, stepvalues=(3, 3, 3, 9))
    assert [rates.steps_passed(i) for i in range(11)] == [0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 4]


GRADIENTS = (0.5, -1.0, 2.0)


def three_steps(update: Update, rate: float = 0.1) -> list[float]:
    """A weight of 1 moved by three gradients."""
    weight = np.array([1.0])
    history = [np.zeros(1) for _ in range(update.slots)]
    found = []
    for iteration, gradient in enumerate(GRADIENTS):
        weight -= solver.step(np.array([gradient]), history, update, rate, iteration)
        found.append(float(weight[0]))
    return found


def test_sgd() -> None:
    # h: 0.05, 0.9*0.05 - 0.1 = -0.055, 0.9*-0.055 + 0.2 = 0.1505
    assert three_steps(Update("SGD", momentum=0.9)) == pytest.approx([0.95, 1.005, 0.8545])


def test_nesterov() -> None:
    # the same h; steps 1.9 h' - 0.9 h: 0.095, -0.1045 - 0.045 = -0.1495, 0.28595 + 0.0495 = 0.33545
    assert three_steps(Update("Nesterov", momentum=0.9)) == pytest.approx([0.905, 1.0545, 0.71905])


def test_ada_grad() -> None:
    # h: 0.25, 1.25, 5.25; steps 0.1 g / (sqrt(h) + 0.25)
    steps = [0.05 / 0.75, -0.1 / (math.sqrt(1.25) + 0.25), 0.2 / (math.sqrt(5.25) + 0.25)]
    assert three_steps(Update("AdaGrad", delta=0.25)) == pytest.approx(list(1 - np.cumsum(steps)))


def test_rms_prop() -> None:
    # h: 0.2*0.25 = 0.05, 0.8*0.05 + 0.2 = 0.24, 0.8*0.24 + 0.8 = 0.992
    steps = [0.1 * g / (math.sqrt(h) + 0.5) for g, h in zip(GRADIENTS, (0.05, 0.24, 0.992), strict=True)]
    assert three_steps(Update("RMSProp", rms_decay=0.8, delta=0.5)) == pytest.approx(
        list(1 - np.cumsum(steps))
    )


def test_ada_delta() -> None:
    # momentum 0.5, delta 0.5; h: 0.125, 0.5625, 2.28125; v = g sqrt((u + 0.5) / (h + 0.5)), u before the step
    v1 = 0.5 * math.sqrt(0.5 / 0.625)
    u1 = 0.5 * v1**2
    v2 = -1.0 * math.sqrt((u1 + 0.5) / 1.0625)
    u2 = 0.5 * u1 + 0.5 * v2**2
    v3 = 2.0 * math.sqrt((u2 + 0.5) / 2.78125)
    wanted = list(1 - 0.1 * np.cumsum([v1, v2, v3]))
    assert three_steps(Update("AdaDelta", momentum=0.5, delta=0.5)) == pytest.approx(wanted)


def test_adam() -> None:
    # m: 0.25, -0.375, 0.8125 (momentum 0.5); v: 0.0625, 0.296875, 1.22265625 (momentum2 0.75); delta 0.01
    corrections = [math.sqrt(1 - 0.75**t) / (1 - 0.5**t) for t in (1, 2, 3)]
    moments = [(0.25, 0.0625), (-0.375, 0.296875), (0.8125, 1.22265625)]
    steps = [0.1 * c * m / (math.sqrt(v) + 0.01) for c, (m, v) in zip(corrections, moments, strict=True)]
    update = Update("Adam", momentum=0.5, momentum2=0.75, delta=0.01)
    assert three_steps(update) == pytest.approx(list(1 - np.cumsum(steps)))


def test_rules_are_alike_for_torch() -> None:
    torch = pytest.importorskip("torch", reason="training needs torch")
    for kind in ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"):
        update = Update(kind, momentum=0.5, delta=0.1)
        arrays = [np.zeros(3) for _ in range(update.slots)]
        tensors = [torch.zeros(3, dtype=torch.float64) for _ in range(update.slots)]
        for iteration in range(3):
            gradient = np.array([0.5, -1.0, 2.0]) * (iteration + 1)
            by_array = solver.step(gradient, arrays, update, 0.1, iteration)
            by_tensor = solver.step(torch.tensor(gradient), tensors, update, 0.1, iteration)
            np.testing.assert_allclose(by_tensor.numpy(), by_array, rtol=1e-12)


def test_clipping_is_of_all_gradients_together() -> None:
    gradients = [np.array([3.0]), np.array([0.0, 4.0])]
    assert solver.clip(gradients, 2.5) == 0.5
    np.testing.assert_array_equal(gradients[0], [1.5])
    np.testing.assert_array_equal(gradients[1], [0.0, 2.0])


@pytest.mark.parametrize("limit", [-1.0, 5.0])
def test_gradients_within_the_limit_stay(limit: float) -> None:
    gradients = [np.array([3.0, 4.0])]
    assert solver.clip(gradients, limit) == 1.0
    np.testing.assert_array_equal(gradients[0], [3.0, 4.0])


@pytest.mark.parametrize(
    ("kind", "wanted"), [("L2", [0.5 + 0.02, 1.0 - 0.03, 1.5]), ("L1", [0.5 + 0.01, 1.0 - 0.01, 1.5])]
)
def test_iter_size_divides_before_the_decay_is_added(kind: str, wanted: list[float]) -> None:
    gradient = np.array([2.0, 4.0, 6.0])
    update = Update(weight_decay=0.005, regularization=kind, iter_size=4)
    solver.regularize(gradient, np.array([2.0, -3.0, 0.0]), update, decay_mult=2.0)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-12)


def test_a_solver_file_is_read(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        'net: "net.prototxt" test_iter: 100 test_interval: 500 base_lr: 0.01 momentum: 0.9 weight_decay: 0.0005 '
        'lr_policy: "inv" gamma: 0.0001 power: 0.75 display: 100 max_iter: 10000 snapshot: 5000 '
        'snapshot_prefix: "lenet" solver_mode: CPU snapshot_format: HDF5 iter_size: 2 clip_gradients: 35 '
        "average_loss: 20 random_seed: 7",
    )
    assert found.rates == Rates("inv", 0.01, 0.0001, 0.75, 0, (), 10000)
    assert found.update == Update("SGD", 0.9, weight_decay=0.0005, clip_gradients=35.0, iter_size=2)
    assert (found.display, found.snapshot, found.snapshot_prefix, found.hdf5) == (100, 5000, "lenet", True)
    assert (found.seed, found.gpu, found.average_loss, found.max_iter) == (7, False, 20, 10000)
    assert found.train.state.phase == "TRAIN"
    assert [(test.net.state.phase, test.batches) for test in found.tests] == [("TEST", 100)]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("", "SGD"),
        ('type: "Adam"', "Adam"),
        ("solver_type: NESTEROV", "Nesterov"),
        ("solver_type: 4", "AdaDelta"),
    ],
)
def test_types_in_both_spellings(tmp_path: Path, given: str, kind: str) -> None:
    assert read(tmp_path, f'net: "net.prototxt" {FIXED} {given}').update.kind == kind


def test_nets_are_found_beside_the_solver_and_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "examples" / "mnist"
    inner.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert solver.load(write(inner, f'net: "net.prototxt" {FIXED}')).train.path == str(inner / "net.prototxt")
    found = solver.load(write(inner, f'net: "examples/mnist/net.prototxt" {FIXED}'))
    assert found.train.path == str(inner / "net.prototxt")
    (elsewhere / "net.prototxt").write_text("# as Caffe: the present folder comes first\n" + NET)
    assert solver.load(inner / "solver.prototxt").train.path == str(inner / "net.prototxt")
    assert solver.load(write(inner, f'net: "net.prototxt" {FIXED}')).train.path == "net.prototxt"


def test_nets_inside_the_file_and_several_test_nets(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        f"{FIXED} test_interval: 10 test_iter: 1 test_iter: 2 test_iter: 3 "
        'test_state { } test_state { stage: "a" } test_state { level: 4 } test_net: "net.prototxt"\n'
        f'net_param {{ name: "inner" {NET} }} train_state {{ stage: "t" level: 2 }}',
    )
    assert found.train.name == "inner"
    assert [layer.name for layer in found.train.layers] == ["data"]
    assert found.train.layers[0].line == 2
    assert (found.train.state.stages, found.train.state.level) == (("t",), 2)
    assert [(test.net.path or "").endswith("net.prototxt") for test in found.tests] == [True, False, False]
    assert [test.net.state.stages for test in found.tests] == [(), ("a",), ()]
    assert [test.net.state.level for test in found.tests] == [0, 0, 4]
    assert [test.batches for test in found.tests] == [1, 2, 3]


def test_the_prefix_is_the_solvers_own_name_where_none_is_given(tmp_path: Path) -> None:
    assert read(tmp_path, f'net: "net.prototxt" {FIXED}').snapshot_prefix == str(tmp_path / "solver")
    inside = read(tmp_path, f'net: "net.prototxt" {FIXED} snapshot_prefix: "{tmp_path}"')
    assert inside.snapshot_prefix == str(tmp_path / "solver")


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ('lr_policy: "stepp"', 'no lr_policy "stepp"'),
        ("base_lr: 1", "lr_policy is not given"),
        ('lr_policy: "step" gamma: 0.1', "stepsize is 0"),
        (FIXED + 'type: "Adamm"', 'no solver type "Adamm"'),
        (FIXED + 'type: "Adam" solver_type: ADAM', "both given"),
        (FIXED + 'type: "RMSProp" momentum: 0.9', "RMSProp takes no momentum"),
        (FIXED + 'type: "AdaGrad" momentum: 0.9', "AdaGrad takes no momentum"),
        (FIXED + 'type: "RMSProp" rms_decay: 1', "must lie in [0, 1)"),
        (FIXED + 'regularization_type: "L3"', '"L3"'),
        (FIXED + "iter_size: 0", "iter_size is 0"),
        (FIXED + "test_iter: 5", "test_interval is not given"),
        (FIXED + 'train_net: "net.prototxt"', "net and train_net are given"),
        (FIXED + "test_iter: 1 test_interval: 1 test_state { } test_state { }", "2 test_state for 1"),
        (FIXED + "base_lr: 1 base_lr: 2", "given twice"),
        (FIXED + 'base_lr: "a"', "base_lr is float"),
    ],
)
def test_what_caffe_refuses(tmp_path: Path, given: str, cause: str) -> None:
    with pytest.raises(NetError) as caught:
        read(tmp_path, f'net: "net.prototxt" {given}')
    assert cause in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "solver.prototxt"))


def test_a_solver_without_a_net_or_with_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(NetError, match="names no net"):
        read(tmp_path, FIXED + "base_lr: 1 test_iter: 1")
    with pytest.raises(FileError, match=r'prototxt:2: there is no net "gone\.prototxt"'):
        read(tmp_path, FIXED + '\nnet: "gone.prototxt"')
    with pytest.raises(NetError, match="is a net, no solver"):
        solver.load(tmp_path / "net.prototxt")


def test_fields_of_forks_are_refused_unless_someone_understands_them(tmp_path: Path) -> None:
    path = write(tmp_path, f'net: "net.prototxt" {FIXED} force_decay: 0.5')
    with pytest.raises(UnsupportedError, match="force_decay"):
        solver.load(path)
    assert solver.load(path, frozenset({"force_decay"})).typed["force_decay"] == 0.5
