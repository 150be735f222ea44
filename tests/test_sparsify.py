"""Sparsity: penalties against their definitions, masks, what zeros are worth, removal, and the watch on ranks."""

from __future__ import annotations

import csv
import importlib.util
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_lra_schemes import convolve

from caffe_proto.errors import FileError, UsageError
from lra import sparsify
from lra.decomposition import Decomposition, Step, macs
from lra.filters import Layout
from lra.sparsify import Sparsity, measure, shrink
from lra.train_hooks import MaskHook, RankWatch, SparsityHook, rank_at

Array = NDArray[Any]
STRUCTURES = ("element", "filter", "channel", "shape")
# blob shape, layout
BLOBS = [
    ((6, 4, 3, 2), Layout()),
    ((6, 4, 3, 2), Layout(2)),
    ((6, 4, 2, 2), Layout(3, True)),
    ((5, 7), Layout()),
    ((5, 7), Layout(1, True)),
    ((4, 2, 2, 3, 2), Layout(2)),
]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def members(shape: tuple[int, ...], layout: Layout, structure: str) -> list[Array]:
    """For each structure a mask of its weights, from the definition: by group, filter, channel and tap."""
    labels: dict[tuple[int, ...], Array] = {}
    for at in product(*map(range, shape)):
        if layout.transposed:  # (in, out/groups): the group goes with the input
            size = shape[0] // layout.groups
            group, channel, filter_ = at[0] // size, at[0] % size, at[1]
        else:
            size = shape[0] // layout.groups
            group, filter_, channel = at[0] // size, at[0] % size, at[1]
        label = {
            "element": at, "filter": (group, filter_), "channel": (group, channel), "shape": (group, channel, *at[2:]),
        }[structure]  # fmt: skip
        labels.setdefault(label, np.zeros(shape, bool))[at] = True
    return list(labels.values())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("shape", "layout"), BLOBS)
def test_penalty_and_its_steps_by_definition(shape, layout, structure) -> None:
    W = random(*shape)
    groups = members(shape, layout, structure)
    W[groups[1]] = 0
    norms = [np.linalg.norm(W[one]) for one in groups]
    assert sparsify.penalty(W, structure, layout) == pytest.approx(sum(norms), rel=1e-12)
    slope, near = np.zeros(shape), np.zeros(shape)
    step = float(np.median(norms))
    for one, norm in zip(groups, norms, strict=True):
        if norm > 0:
            slope[one] = W[one] / norm
            near[one] = W[one] * max(0.0, 1 - step / norm)
    np.testing.assert_allclose(sparsify.subgradient(W, structure, layout), slope, atol=1e-13)
    found = sparsify.proximal(W, step, structure, layout)
    np.testing.assert_allclose(found, near, atol=1e-13)
    assert (found == 0).sum() == (near == 0).sum() > 0
    np.testing.assert_array_equal(sparsify.proximal(W, 0.0, structure, layout), W)


def test_worked_steps() -> None:
    W = np.array([[3.0, 4], [0, 1]])
    np.testing.assert_allclose(sparsify.subgradient(W, "filter"), [[0.6, 0.8], [0, 1]])
    np.testing.assert_allclose(sparsify.subgradient(W), [[1, 1], [0, 1]])
    np.testing.assert_allclose(sparsify.proximal(W, 1.0, "filter"), [[2.4, 3.2], [0, 0]])
    np.testing.assert_allclose(sparsify.proximal(-W, 1.5), [[-1.5, -2.5], [0, 0]])
    root = np.sqrt(17)
    np.testing.assert_allclose(sparsify.subgradient(W, "shape"), [[1, 4 / root], [0, 1 / root]])


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(STRUCTURES), st.floats(0.0, 3.0), st.integers(0, 99))
def test_the_proximal_step_is_the_least_of_its_objective(structure: str, step: float, seed: int) -> None:
    W, layout = random(4, 3, 2, 1, seed=seed), Layout(2)
    V = sparsify.proximal(W, step, structure, layout)

    def objective(v: Array) -> float:
        return float(np.sum((v - W) ** 2) / 2 + step * sparsify.penalty(v, structure, layout))

    rng = np.random.default_rng(seed)
    for size in (1e-3, 1e-1, 1.0):
        assert objective(V) <= objective(V + size * rng.standard_normal(W.shape)) + 1e-12
    assert objective(V) <= objective(np.zeros_like(W)) + 1e-12


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("shape", "layout"), BLOBS)
def test_masks_prune_whole_structures_of_least_size(shape, layout, structure) -> None:
    W = random(*shape)
    (mask,) = sparsify.masks({"a": W}, 0.4, structure, {"a": layout}).values()
    groups = members(shape, layout, structure)
    sizes = [np.sqrt(np.mean(W[one] ** 2)) for one in groups]
    pruned = set(np.argsort(sizes)[: int(0.4 * len(groups))])
    for i, one in enumerate(groups):
        assert (mask[one] == (i not in pruned)).all()


def test_masks_of_a_whole_net_share_one_threshold() -> None:
    weights = {"large": 10 * random(6, 4), "small": random(4, 3, 2, 2)}
    masks = sparsify.masks(weights, 0.5, whole=True)
    sizes = np.concatenate([np.abs(one).ravel() for one in weights.values()])
    threshold = np.sort(sizes)[int(0.5 * sizes.size)]
    for key, blob in weights.items():
        np.testing.assert_array_equal(masks[key], np.abs(blob) >= threshold)
    assert masks["small"].mean() < 0.5 < masks["large"].mean()
    assert sparsify.masks({}, 0.5, whole=True) == {}
    # a long filter of small weights is smaller than a short one of larger weights
    filters = {"long": np.full((2, 100), 0.5), "short": np.full((2, 4), 1.0)}
    kept = sparsify.masks(filters, 0.5, "filter", whole=True)
    assert not kept["long"].any() and kept["short"].all()
    assert all(one.all() for one in sparsify.masks(weights, 0.0).values())


def test_refusals() -> None:
    with pytest.raises(ValueError, match='no structure "block"'):
        sparsify.penalty(random(2, 2), "block")
    with pytest.raises(ValueError, match=r"sparsity 1 is not in \[0, 1\)"):
        sparsify.masks({}, 1.0)
    with pytest.raises(ValueError, match="negative"):
        sparsify.proximal(random(2, 2), -1.0)
    with pytest.raises(ValueError, match="does not hold filters"):
        sparsify.penalty(random(3))
    for wrong in ({"structure": "block"}, {"strength": -1.0}):
        with pytest.raises(UsageError):
            SparsityHook({}, **({"strength": 1.0} | wrong))


def test_what_zeros_are_worth() -> None:
    W = np.ones((4, 3, 2, 2))  # two groups of 2 filters, 12 columns
    W[0] = 0  # group 0 keeps one row
    W[2:, 1] = 0  # group 1 loses a channel, four columns
    W[3, 0, 0, 0] = 0
    assert measure(W, Layout(2), macs=4800) == Sparsity(
        element=(12 + 8 + 1) / 48,
        row=1 / 4,
        column=4 / 24,
        channel=1 / 6,
        macs=(4800, 4800 * (12 + 16) // 48),
    )
    assert measure(W + 1e-5, Layout(2), tolerance=1e-4) == measure(W, Layout(2))
    up = np.ones((4, 3, 1, 1))
    up[:, 1] = 0  # the second output channel of a Deconvolution
    assert measure(up, Layout(1, True), macs=12) == Sparsity(1 / 3, 1 / 3, 0, 0, (12, 8))
    assert measure(np.zeros((2, 2)), macs=7) == Sparsity(1, 1, 1, 1, (7, 0))


# --- removal -------------------------------------------------------------------------------------------------


def output(chain: Decomposition, x: Array) -> Array:
    for step in chain.steps:
        x = convolve(x, step.weight, step.bias, step)
    return x


def chain_of(group: int, second_pad: tuple[int, int] = (0, 0), last_bias: bool = True) -> Decomposition:
    return Decomposition(
        (
            Step("_v", random(8, 3, 3, 1, seed=1), random(8, seed=2), (1, 2), (1, 0), (1, 1), group),
            Step("_h", random(6, 8 // group, 1, 3, seed=3), random(6, seed=4) if last_bias else None, (1, 1), second_pad, (1, 2), group),
        )
    )  # fmt: skip


def same_output(before: Decomposition, after: Decomposition, group: int) -> None:
    x = random(3 * group, 8, 13, seed=9)
    np.testing.assert_allclose(output(after, x), output(before, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("last_bias", [True, False])
@pytest.mark.parametrize("group", [1, 2])
def test_channels_that_nobody_fills_or_reads_go(group: int, last_bias: bool) -> None:
    chain = chain_of(group, last_bias=last_bias)
    first, second = chain.steps
    first.weight[1] = 0  # a constant channel
    first.weight[5] = 0
    second.weight[:, 2] = 0  # one that nobody reads (in either group)
    small = shrink(chain)
    assert [step.shape[0] for step in small.steps] == ([8 - 3, 6] if group == 1 else [8 - 4, 6])
    assert small.steps[1].shape[1] == small.steps[0].shape[0] // group
    same_output(chain, small, group)
    assert macs(small.steps, (8, 13)) < macs(chain.steps, (8, 13))


def test_groups_lose_the_same_number() -> None:
    chain = chain_of(2)
    chain.steps[1].weight[:3, :2] = 0  # two channels of group 0, one of group 1
    chain.steps[1].weight[3:, 3] = 0
    small = shrink(chain)
    assert small.steps[0].shape[0] == 6 and small.steps[1].shape[1] == 3
    same_output(chain, small, 2)


def test_where_the_next_step_pads_a_constant_channel_stays() -> None:
    chain = chain_of(1, second_pad=(0, 2))
    chain.steps[0].weight[1] = 0
    assert shrink(chain).steps[0].shape[0] == 8
    chain.steps[0].bias[1] = 0
    small = shrink(chain)
    assert small.steps[0].shape[0] == 7
    same_output(chain, small, 1)
    chain.steps[0].bias[1] = 5
    chain.steps[1].weight[:, 1] = 0
    assert shrink(chain).steps[0].shape[0] == 7
    same_output(chain, shrink(chain), 1)


def test_removal_runs_along_a_chain_and_leaves_one_channel() -> None:
    steps = (
        Step("_a", random(5, 3, 3, 1), None, pad=(1, 0)),
        Step("_b", random(4, 5, 1, 3, seed=1), None, pad=(0, 1)),
        Step("_c", random(6, 4, 1, 1, seed=2), random(6, seed=3)),
    )
    steps[2].weight[:, 1:] = 0  # only the first channel of _b is read ...
    steps[1].weight[0, 3:] = 0  # ... which reads three of _a
    small = shrink(Decomposition(steps))
    assert [step.shape[:2] for step in small.steps] == [(3, 3), (1, 3), (6, 1)]
    same_output(Decomposition(steps), small, 1)
    steps[0].weight[...] = 0
    small = shrink(Decomposition(steps))
    assert [step.shape[:2] for step in small.steps] == [(1, 3), (1, 1), (6, 1)]
    same_output(Decomposition(steps), small, 1)
    full = chain_of(1)
    assert shrink(full).steps == full.steps
    with pytest.raises(ValueError, match="differ in groups"):
        shrink(Decomposition((full.steps[0], chain_of(2).steps[1])))


# --- hooks ---------------------------------------------------------------------------------------------------


def tensors(**blobs: Array) -> dict[Any, torch.Tensor]:
    return {(name, 0): torch.tensor(blob, dtype=torch.float32) for name, blob in blobs.items()}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("shape", "layout"), BLOBS)
def test_the_hook_steps_as_numpy_does(shape, layout, structure) -> None:
    W = random(*shape).astype(np.float32)
    params, gradients = tensors(a=W, b=W, frozen=W), tensors(a=np.ones(shape), b=np.ones(shape))
    asked = {("a", 0): layout, ("frozen", 0): layout}
    hook = SparsityHook(asked, 0.25, structure)
    hook.before_update(0, params, gradients)
    hook.after_update(0, params, 0.1)
    wanted = 1 + 0.25 * sparsify.subgradient(W.astype(float), structure, layout)
    np.testing.assert_allclose(gradients["a", 0], wanted, rtol=1e-6)
    np.testing.assert_array_equal(params["a", 0], W)
    np.testing.assert_array_equal(gradients["b", 0], np.ones(shape))
    exact = SparsityHook(asked, 5.0, structure, exact=True)
    gradients = tensors(a=np.ones(shape))
    exact.before_update(0, params, gradients)
    exact.after_update(0, params, 0.1)
    np.testing.assert_array_equal(gradients["a", 0], np.ones(shape))
    np.testing.assert_allclose(
        params["a", 0], sparsify.proximal(W.astype(float), 0.5, structure, layout), rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(params["b", 0], W)
    np.testing.assert_array_equal(params["frozen", 0], W)


def test_pruned_weights_stay_zero_through_fine_tuning() -> None:
    W = random(5, 4)
    params = tensors(a=W, b=W)
    velocity = torch.ones(5, 4)  # of before the pruning
    hook = MaskHook(sparsify.masks({("a", 0): W}, 0.5))
    hook.start(params)
    kept = params["a", 0] != 0
    assert int(kept.sum()) == 10
    for iteration in range(5):
        gradients = tensors(a=np.ones((5, 4)), b=np.ones((5, 4)))
        hook.before_update(iteration, params, gradients)
        assert torch.equal(gradients["a", 0] != 0, kept)
        velocity = 0.9 * velocity + 0.1 * gradients["a", 0]
        params["a", 0] -= velocity
        hook.after_update(iteration, params, 0.1)
        assert torch.equal(params["a", 0] != 0, kept)
    assert not torch.equal(params["a", 0][kept], torch.tensor(W, dtype=torch.float32)[kept])
    np.testing.assert_array_equal(params["b", 0], W.astype(np.float32))
    with pytest.raises(UsageError, match=r'layer "a": a mask of shape \(5, 4\)'):
        hook.start(tensors(a=W[:3]))


# --- the watch on ranks --------------------------------------------------------------------------------------


def test_rank_of_a_blob() -> None:
    low = random(12, 2) @ random(2, 18, seed=1) + 1e-3 * random(12, 18, seed=2)
    conv = low.reshape(12, 2, 3, 3)
    assert rank_at(conv) == 2 and rank_at(conv, energy=1.0) == 12
    values = np.linalg.svd(random(12, 18), compute_uv=False) ** 2
    wanted = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9)) + 1
    assert rank_at(random(12, 18), energy=0.9) == wanted
    # in groups the one that needs most decides for all
    mixed = np.concatenate([low[:6], random(6, 18, seed=3)])
    values = np.linalg.svd(random(6, 18, seed=3), compute_uv=False) ** 2
    wanted = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.95)) + 1
    assert rank_at(mixed, Layout(2)) == 2 * wanted
    assert rank_at(low.T, Layout(1, True)) == 2
    assert rank_at(low.reshape(12, 2, 1, 3, 3)) == 2
    vertical = np.einsum("ra,ob->oarb", random(3, 4), random(5, 3, seed=1))  # h x i times o x w
    assert rank_at(vertical, scheme="spatial") == 1


def test_the_watch_writes_a_row_a_test(tmp_path: Path) -> None:
    log = tmp_path / "ranks.csv"
    flat = random(6, 1) @ random(1, 5)
    asked = {("a", 0): Layout(), ("b", 0): Layout(1, True)}
    watch = RankWatch(asked, log, energy=0.999)
    watch.at_test(0, tensors(a=random(6, 5), b=random(5, 6)))
    watch.at_test(500, tensors(a=flat, b=random(5, 6)))
    assert read(log) == [["iteration", "a", "b"], ["0", "5", "5"], ["500", "1", "5"]]
    watch.finish()
    again = RankWatch(asked, log, energy=0.999, resume=True)
    again.at_test(500, tensors(a=flat, b=flat.T))
    again.at_test(1000, tensors(a=flat, b=flat.T))
    assert read(log)[1:] == [["0", "5", "5"], ["500", "1", "1"], ["1000", "1", "1"]]
    back = RankWatch(asked, log, energy=0.999, resume=True)  # from a snapshot before the last rows
    back.at_test(250, tensors(a=flat, b=random(5, 6)))
    assert read(log)[1:] == [["0", "5", "5"], ["250", "1", "5"]]
    fresh = RankWatch(asked, log, energy=0.999)
    fresh.at_test(500, tensors(a=flat, b=flat.T))
    assert read(log)[1:] == [["500", "1", "1"]]
    with pytest.raises(FileError, match="is no rank log of these layers"):
        RankWatch({("other", 0): Layout()}, log, resume=True)
    with pytest.raises(UsageError, match="energy 0"):
        RankWatch(asked, log, energy=0.0)


def read(log: Path) -> list[list[str]]:
    with log.open(newline="") as file:
        return list(csv.reader(file))


def test_what_is_not_installed_is_said_at_once(tmp_path: Path) -> None:
    for package, where in (
        ("matplotlib", {"plot": tmp_path / "r.png"}),
        ("tensorboard", {"tensorboard": tmp_path}),
    ):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(UsageError, match=f"{package} is not installed"):
                RankWatch({}, tmp_path / "r.csv", **where)


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    watch = RankWatch({("a", 0): Layout()}, tmp_path / "r.csv", plot=tmp_path / "r.svg")
    for iteration in (0, 10, 20):
        watch.at_test(iteration, tensors(a=random(6, 5, seed=iteration)))
    watch.finish()
    assert (tmp_path / "r.svg").read_text().count("<svg") == 1


def test_tensorboard_gets_the_ranks(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = RankWatch({("a", 0): Layout()}, tmp_path / "r.csv", energy=1.0, tensorboard=tmp_path / "events")
    watch.at_test(3, tensors(a=random(6, 5)))
    watch.finish()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("rank/a")] == [(3, 5.0)]
