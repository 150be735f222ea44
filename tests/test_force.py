"""Force Regularization: against its definition, worked numbers, the original solver, and torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from helpers import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from caffe_proto import net, text
from caffe_proto.errors import NetError, UsageError
from caffe_proto.graph import build
from caffe_proto.shape_inference import Shaped, infer
from caffe_proto.typed import Typed
from lra import force
from lra.filters import Layout
from lra.force import Force, Member
from lra.train_hooks import ForceHook
from lra.train_layers import force_members, force_settings, layouts

Array = NDArray[Any]
ALL = ("Degradation", "Constant", "Linear", "Gravity")
FORCE_ORACLES = sorted((SHARED / "oracle" / "force").glob("*.npz"))

WORKED = np.array([[3.0, 4], [0, 2], [-1, 0]])
# Directions (.6, .8), (0, 1), (-1, 0); their sum (-.4, 1.8) projected for the first kind.
WORKED_FORCES = {
    "l2": [[5.6, -4.2], [0.8, 0], [0, -1.8]],
    "l1": [[5.5835875742, -4.1876906807], [-0.4831530337, 0], [0, -1.1543203767]],
    "Linear": [[7, -5.25], [-2, 0], [0, -0.75]],
    "Gravity": [[10.04584997, -7.5343874812], [-4.0363097091, 0], [0, -0.4933076392]],
}


def by_pairs(W: Array, power: int, groups: int = 1) -> Array:
    """The force by its definition: every pair, the tangent part of the pull, times the filter's own norm."""
    G = np.zeros(W.shape)
    size = len(W) // groups
    for i in range(len(W)):
        for j in range(i // size * size, (i // size + 1) * size):
            n, m = np.linalg.norm(W[i]), np.linalg.norm(W[j])
            if i == j or n <= 1e-4 or m <= 1e-4:
                continue
            u, v = W[i] / n, W[j] / m
            d = np.linalg.norm(v - u)
            if power and d <= 1e-4:
                continue
            pull = (v - u) / d**power
            G[i] -= n * (pull - (pull @ u) * u)
    return G


def filters(n: int, k: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, k))


@pytest.mark.parametrize("kind", WORKED_FORCES)
def test_worked_numbers(kind: str) -> None:
    np.testing.assert_allclose(force.update(WORKED, kind), WORKED_FORCES[kind], atol=1e-8)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("power", range(4))
def test_is_the_sum_over_pairs_of_each_group(power: int, groups: int) -> None:
    W = filters(12, 5)
    W[2] = 0
    W[4] = 3 * W[5]  # one direction
    W[8] = -W[9]
    W[10] = 3e-5  # of norm 7e-5, below the smallest norm that counts
    W[11] *= 1e-3
    found = force.update(W, ALL[power], groups)
    np.testing.assert_allclose(found, by_pairs(W, power, groups), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_is_a_scaled_gradient_of_the_sum_of_distances(kind: str) -> None:
    W, step = filters(5, 4), 1e-6

    def distances(w: Array) -> float:
        u = w / np.linalg.norm(w, axis=1, keepdims=True)
        apart = np.linalg.norm(u[:, None] - u[None], axis=2)
        return float(np.sum(apart**2) / 2 if kind == "l2" else np.sum(apart))

    slope = np.zeros_like(W)
    for at in np.ndindex(W.shape):
        moved = np.zeros_like(W)
        moved[at] = step
        slope[at] = (distances(W + moved) - distances(W - moved)) / (2 * step)
    wanted = np.sum(W**2, axis=1, keepdims=True) / 2 * slope
    np.testing.assert_allclose(force.update(W, kind), wanted, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from(ALL), st.integers(0, 99))
def test_is_tangent_and_scales_with_the_weights(n: int, k: int, kind: str, seed: int) -> None:
    W = filters(n, k, seed)
    G = force.update(W, kind)
    np.testing.assert_allclose(np.sum(G * W, axis=1), 0, atol=1e-6 * max(1, np.abs(G).max()))
    np.testing.assert_allclose(force.update(7 * W, kind), 7 * G, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "W", [np.zeros((3, 4)), np.ones((3, 4)), np.array([[1.0, 2], [-1, -2]]), np.ones((1, 4)), filters(3, 1)]
)
def test_equal_opposite_zero_and_single_filters_feel_nothing(W: Array, kind: str) -> None:
    with np.errstate(all="raise"):
        np.testing.assert_allclose(force.update(W, kind), np.zeros_like(W), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_nearly_equal_filters_stay_exact(kind: str) -> None:
    W = np.ones((4, 50)) + 1e-3 * filters(4, 50)
    found = force.update(W, kind)
    np.testing.assert_allclose(
        found, by_pairs(W, ALL.index(kind)), rtol=1e-7, atol=1e-9 * np.abs(found).max()
    )


@pytest.mark.parametrize("kind", ["Constant", "Linear", "Gravity"])
def test_a_filter_does_not_act_on_itself_in_single_precision_either(kind: str) -> None:
    W = filters(64, 500).astype(np.float32)
    wanted = force.update(W, kind)
    found = force.of_blob(W, kind)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_few_steps_make_directions_meet_and_a_negative_strength_parts_them() -> None:
    W = filters(20, 3)

    def after(strength: float) -> float:
        moved = W.copy()
        for _ in range(50):
            moved -= strength * force.update(moved, "l2")
        u = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        return float(np.linalg.norm(u.mean(axis=0)))

    start = after(0.0)
    assert after(0.005) > start + 0.2
    assert after(-0.005) < start - 0.05


def test_refuses_what_is_no_force() -> None:
    with pytest.raises(ValueError, match='no force_type "magnetic"; known: Degradation'):
        force.update(WORKED, "magnetic")
    with pytest.raises(ValueError, match="in 2 groups"):
        force.update(WORKED, "l2", 2)
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        force.update(np.ones((2, 2, 1)))
    for wrong in (
        {"kind": "x"},
        {"decay_type": "x"},
        {"direction": "x"},
        {"decay": np.nan},
        {"iterations": -2},
    ):
        with pytest.raises(ValueError):
            Force(**wrong)
    with pytest.raises(ValueError, match="do not increase"):
        Force(schedule=((5, 1.0), (5, 0.0)))


@pytest.mark.parametrize("kind", ALL)
def test_filters_are_found_whichever_axis_they_lie_on(kind: str) -> None:
    conv = np.random.default_rng(0).standard_normal((6, 4, 3, 2))
    rows = force.update(conv.reshape(6, -1), kind, 2).reshape(conv.shape)
    np.testing.assert_array_equal(force.of_blob(conv, kind, Layout(2)), rows)
    # a Deconvolution of 8 inputs, 3 outputs a group and 2 groups: its filters are output channels
    deconv = np.random.default_rng(1).standard_normal((8, 3, 2, 2))
    wanted = np.zeros_like(deconv)
    for g in range(2):
        for o, row in enumerate(
            force.update(np.stack([deconv[4 * g : 4 * g + 4, o].reshape(-1) for o in range(3)]), kind)
        ):
            wanted[4 * g : 4 * g + 4, o] = row.reshape(4, 2, 2)
    np.testing.assert_allclose(force.of_blob(deconv, kind, Layout(2, True)), wanted, atol=1e-13)
    dense = filters(5, 7)
    np.testing.assert_allclose(
        force.of_blob(dense, kind, Layout(1, True)), force.update(dense.T, kind).T, atol=1e-13
    )
    np.testing.assert_array_equal(force.of_blob(conv, kind, Layout(2), per_filter=True), rows / 3)


def test_strength_of_each_kind() -> None:
    weights = {"a": filters(4, 6, 1), "b": filters(8, 3, 2)}
    gradients = {"a": filters(4, 6, 3), "b": filters(8, 3, 4)}
    members = {"a": Member(1.0), "b": Member(-2.0)}
    G = {key: force.update(weights[key], "l1") for key in weights}
    base = Force(0.25, "Constant")

    fixed = force.terms(base, 0, members, weights, gradients)
    np.testing.assert_allclose(fixed["a"], 0.25 * G["a"], atol=1e-14)
    np.testing.assert_allclose(fixed["b"], -0.5 * G["b"], atol=1e-14)

    adaptive = force.terms(replace(base, decay_type="adaptive"), 0, members, weights, gradients)
    for key, mult in (("a", 1), ("b", -2)):
        ratio = np.linalg.norm(gradients[key]) / np.linalg.norm(G[key])
        np.testing.assert_allclose(adaptive[key], 0.25 * mult * ratio * G[key], atol=1e-14)

    auto = force.terms(replace(base, decay_type="auto"), 0, members, weights, gradients)
    total = np.sqrt(sum(np.sum(auto[key] ** 2) for key in auto))
    assert total == pytest.approx(0.25 * np.sqrt(sum(np.sum(gradients[key] ** 2) for key in auto)), rel=1e-12)
    np.testing.assert_allclose(auto["b"] / auto["a"][0, 0], -2 * G["b"] / G["a"][0, 0], rtol=1e-9)

    same = force.terms(replace(base, direction="same", decay_type="adaptive"), 0, members, weights, gradients)
    kept = np.where(G["a"] * gradients["a"] >= 0, G["a"], 0)
    ratio = np.linalg.norm(gradients["a"]) / np.linalg.norm(kept)
    np.testing.assert_allclose(same["a"], 0.25 * ratio * kept, atol=1e-14)

    none = {"a": np.ones((4, 6)), "b": np.ones((8, 3))}
    for kind in ("adaptive", "auto"):
        still = force.terms(replace(base, decay_type=kind), 0, members, none, gradients)
        assert not any(term.any() for term in still.values())


def test_force_iter_and_schedule_say_when() -> None:
    assert [Force(2.0, iterations=3).level(i) for i in range(5)] == [2, 2, 2, 0, 0]
    assert Force(2.0).level(10**9) == 2
    ramp = Force(2.0, schedule=((10, 0.0), (20, 1.0), (30, 0.5)))
    assert [ramp.level(i) for i in (0, 10, 15, 20, 25, 40)] == [0, 0, 1, 2, 1.5, 1]
    assert force.terms(Force(1.0, iterations=0), 0, {"a": Member()}, {"a": WORKED}, {}) == {}
    for decay_type in ("fixed", "adaptive", "auto"):
        asked = Force(1.0, decay_type=decay_type)
        assert force.terms(asked, 0, {"a": Member(), "b": Member()}, {"a": np.ones(3)}, {}) == {}


# --- nets and solvers ---------------------------------------------------------------------------------------


def shaped(prototxt: str) -> Shaped:
    return infer(build(net.parse(prototxt)))


def solver(prototxt: str) -> Typed:
    document = text.parse(prototxt)
    return Typed(document.root, "SolverParameter", document)


CONV = 'layer {{ name: "{0}" type: "{1}" bottom: "data" top: "{0}" {2} convolution_param {{ num_output: 8 kernel_size: 3 {3} }} }}\n'
DENSE = 'layer {{ name: "{0}" type: "InnerProduct" bottom: "data" top: "{0}" {1} inner_product_param {{ num_output: 5 {2} }} }}\n'
NET = (
    nets.inputs(data=(1, 8, 6, 6))
    + CONV.format("set", "Convolution", "param { force_mult: 2 } param { lr_mult: 2 }", "group: 2")
    + CONV.format("zero", "Convolution", "param { force_mult: 0 }", "")
    + CONV.format("unset", "Convolution", "", "")
    + CONV.format("up", "Deconvolution", "", "group: 4")
    + CONV.format("first", "Convolution", 'param { name: "w" }', "")
    + CONV.format("second", "Convolution", 'param { name: "w" force_mult: 3 }', "")
    + CONV.format("deep", "ConvolutionDepthwise", "param { force_mult: 1 }", "")
    + DENSE.format("ip", "param { force_mult: 4 } param { force_mult: 4 }", "transpose: true")
    + DENSE.format("fc", "", "")
)


def test_force_mult_of_a_net() -> None:
    assert force_members(shaped(NET)) == {
        ("set", 0): Member(2.0, Layout(2)),
        ("first", 0): Member(3.0, Layout(1)),
        ("deep", 0): Member(1.0, Layout(8)),
        ("ip", 0): Member(4.0, Layout(1, True)),
    }


def test_one_option_sets_the_force_of_all_convolutions() -> None:
    members = force_members(shaped(NET), convolutions=0.5)
    assert {key: member.mult for key, member in members.items()} == {
        ("set", 0): 2.0, ("unset", 0): 0.5, ("up", 0): 0.5, ("first", 0): 0.5, ("deep", 0): 1.0, ("ip", 0): 4.0,
    }  # fmt: skip
    assert members["up", 0].layout == Layout(4, True)


def test_old_dialects_have_no_force_mult_but_the_option() -> None:
    old = (
        'input: "data" input_dim: 1 input_dim: 3 input_dim: 6 input_dim: 6\n'
        'layers { name: "c" type: CONVOLUTION bottom: "data" top: "c" param: "w" blobs_lr: 1 convolution_param { num_output: 4 kernel_size: 3 } }'
    )
    assert force_members(shaped(old)) == {}
    assert force_members(shaped(old), 1.0) == {("c", 0): Member(1.0, Layout(1))}


def test_layouts_of_a_net() -> None:
    found = layouts(shaped(NET))
    assert found["ip", 0] == Layout(1, True) and found["fc", 0] == Layout(1) and found["deep", 0] == Layout(8)
    assert ("second", 0) not in found and len(found) == 8


def test_settings_of_a_solver_file() -> None:
    given = 'force_type: "Constant" force_decay: -0.5 force_iter: 7 force_decay_type: "adaptive" force_direction: "same"'
    assert force_settings(solver(given)) == Force(-0.5, "Constant", 7, "adaptive", "same")
    assert force_settings(solver("base_lr: 1")) == Force()
    with pytest.raises(UsageError, match='no force_type "None"'):
        force_settings(solver('force_type: "None" force_decay: 1'))
    with pytest.raises(NetError, match=r'layer "c".* force_mult'):
        force_members(
            shaped(
                nets.inputs(data=(1, 8, 6, 6))
                + CONV.format("c", "Convolution", "param { force_mult: x }", "")
            )
        )


# --- the original solver -------------------------------------------------------------------------------------


def trained(path: Path, step: Any) -> tuple[Array, Array]:
    """Weights after each step of plain SGD with the force of ``step``, and those of the original solver."""
    z = np.load(path)
    wanted = z["w_after"] if z["w_after"].ndim > z["w_before"].ndim else z["w_after"][None]
    asked = force_settings(solver(str(z["solver"])))
    members = force_members(shaped(str(z["net"])))
    w, history, made = z["w_before"].astype(np.float32), np.zeros_like(z["w_before"]), []
    assert int(z["steps"]) == len(wanted) and (len(wanted) == 1 or not z["data_grad"].any())
    for iteration in range(len(wanted)):
        gradient = z["data_grad"] + np.float32(z["weight_decay"]) * w
        gradient = step(asked, iteration, members, w, gradient)
        history = np.float32(z["momentum"]) * history + np.float32(z["base_lr"]) * gradient
        w = (w - history).astype(np.float32)
        made.append(w)
    return np.stack(made), wanted


def by_numpy(asked: Force, iteration: int, members: Any, w: Array, gradient: Array) -> Array:
    key = ("w", 0)
    made = force.terms(asked, iteration, members, {key: w.astype(float)}, {key: gradient.astype(float)})
    return (gradient + made.get(key, 0)).astype(np.float32)


def by_hook(asked: Force, iteration: int, members: Any, w: Array, gradient: Array) -> Array:
    gradients = {("w", 0): torch.from_numpy(gradient.copy())}
    ForceHook(asked, members).before_update(iteration, {("w", 0): torch.from_numpy(w)}, gradients)
    return gradients["w", 0].numpy()


@needs_shared
@pytest.mark.parametrize("step", [by_numpy, by_hook])
@pytest.mark.parametrize("path", FORCE_ORACLES, ids=lambda path: path.stem)
def test_updates_of_the_original_solver(path: Path, step: Any) -> None:
    made, wanted = trained(path, step)
    before = np.load(path)["w_before"]
    scale = np.abs(wanted - before).max()
    np.testing.assert_allclose(made - before, wanted - before, rtol=0, atol=1e-5 * max(scale, 1e-30))


@needs_shared
def test_the_oracles_are_there() -> None:
    assert len(FORCE_ORACLES) >= 20


# --- torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_the_hook_adds_what_numpy_computes(kind: str) -> None:
    rng = np.random.default_rng(3)
    blobs = {("a", 0): rng.standard_normal((24, 6, 3, 3)), ("b", 0): rng.standard_normal((8, 5, 2, 2))}
    blobs["a", 0][4] = 1.0001 * blobs["a", 0][5]
    members = {
        ("a", 0): Member(1.0, Layout(2)),
        ("b", 0): Member(0.5, Layout(1, True)),
        ("gone", 0): Member(),
    }
    start = {key: rng.standard_normal(blob.shape) for key, blob in blobs.items()}
    for decay_type, direction in (("fixed", "all"), ("adaptive", "same"), ("auto", "all")):
        asked = Force(0.1, kind, decay_type=decay_type, direction=direction, per_filter=True)
        weights = {
            key: torch.tensor(blob, dtype=torch.float32, requires_grad=True) for key, blob in blobs.items()
        }
        gradients = {key: torch.tensor(blob, dtype=torch.float32) for key, blob in start.items()}
        before = {key: one.clone() for key, one in gradients.items()}
        ForceHook(asked, members).before_update(5, weights, gradients)
        wanted = force.terms(
            asked, 5, members,
            {key: one.detach().numpy().astype(float) for key, one in weights.items()},
            {key: one.numpy().astype(float) for key, one in before.items()},
        )  # fmt: skip
        assert wanted.keys() == blobs.keys()
        for key, term in wanted.items():
            added = gradients[key].numpy() - before[key].numpy().astype(float)
            np.testing.assert_allclose(
                added, term, rtol=0, atol=1e-6 * max(1, float(before[key].abs().max()), np.abs(term).max())
            )


def test_the_hook_leaves_frozen_and_finished_alone() -> None:
    weights = {("a", 0): torch.randn(4, 3), ("b", 0): torch.randn(4, 3)}
    gradients = {("a", 0): torch.zeros(4, 3)}
    hook = ForceHook(Force(1.0, iterations=2, decay_type="auto"), {("a", 0): Member(), ("b", 0): Member()})
    hook.before_update(2, weights, gradients)
    assert not gradients["a", 0].any()
    gradients["a", 0].fill_(1.0)
    hook.before_update(1, weights, gradients)
    added = gradients["a", 0] - 1
    assert float(added.norm()) == pytest.approx(np.sqrt(12), rel=1e-5)


def test_it_is_found_below_the_package_alone() -> None:
    code = "import lra; print(lra.force.update.__name__, lra.linalg.__name__, lra.nonlinear.__name__, lra.ranks.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["update", "lra.linalg", "lra.nonlinear", "lra.ranks"]
