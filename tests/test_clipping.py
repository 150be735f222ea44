"""Rank clipping: two factors become smaller ones of the same product, and their momenta go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_lra_schemes import convolve

import caffe_proto as cp
from caffe_proto.errors import UsageError
from lra import clipping
from lra.clipping import clip, refactor
from lra.decomposition import Decomposition, Geometry, Step
from lra.schemes import SCHEMES
from lra.targets import find
from lra.train_hooks import ClippingHook, Reshaped
from lra.train_layers import Factor, FactorPair, clipped_model, factor_pairs

Array = NDArray[Any]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def pair(out: int, inner: int, depth: int, taps: str, group: int = 1, bias: bool = True) -> Decomposition:
    """Random factors: filters and a 1 x 1 step, V and H, H and V, or fully connected."""
    first, second = {
        "pca": ((3, 2), (1, 1)),
        "vh": ((3, 1), (1, 3)),
        "hv": ((1, 3), (3, 1)),
        "fc": ((1, 1), (1, 1)),
        "both": ((3, 3), (2, 2)),
    }[taps]
    return Decomposition(
        (
            Step("_a", random(inner, depth, *first, seed=1), random(inner, seed=2) if bias else None, (2, 1), (1, 0), group=group),
            Step("_b", random(out, inner // group, *second, seed=3), random(out, seed=4) if bias else None, (1, 2), group=group),
        )
    )  # fmt: skip


def output(chain: Decomposition, x: Array) -> Array:
    for step in chain.steps:
        x = convolve(x, step.weight, step.bias, step)
    return x


def spread(chain: Decomposition) -> list[Array]:
    """The matrix of each group's product, one entry for every pair of taps, by its definition; then the bias."""
    first = chain.steps[0]
    a, b = (np.split(step.weight, step.group) for step in chain.steps)
    c = np.split(np.zeros(len(first.weight)) if first.bias is None else first.bias, first.group)
    return [
        np.hstack(
            [
                np.einsum("orhw,rijk->ohwijk", y, x).reshape(y.shape[0] * y[0, 0].size, -1),
                np.einsum("orhw,r->ohw", y, z).reshape(-1, 1),
            ]
        )
        for x, y, z in zip(a, b, c, strict=True)
    ]


CHAINS = [
    ("pca", 1, True), ("pca", 2, True), ("pca", 2, False), ("vh", 1, True), ("vh", 2, False),
    ("hv", 1, True), ("fc", 1, True), ("both", 2, True),
]  # fmt: skip


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("taps", "group", "bias"), CHAINS)
def test_what_the_product_does_not_need_goes_without_a_trace(taps, group, bias, balanced) -> None:
    chain = pair(8, 6, 7, taps, group, bias)
    low = chain.steps[0].weight.reshape(group, 6 // group, -1)
    low[:, -1] = low[:, 0] * 2  # one filter a group says nothing new
    if bias:  # the bias lies where the filters do
        inner = chain.steps[0].bias.reshape(group, -1)
        inner[:, -1] = inner[:, 0] * 2
    found = clip(chain, 1.0, balanced)
    assert found is not None and found.rank == 6 - group
    for old, new in zip(chain.steps, found.chain.steps, strict=True):
        assert (new.stride, new.pad, new.group, new.suffix) == (old.stride, old.pad, old.group, old.suffix)
    np.testing.assert_array_equal(found.chain.steps[1].bias, chain.steps[1].bias)
    x = random(7 * group, 9, 8, seed=5)
    np.testing.assert_allclose(output(found.chain, x), output(chain, x), atol=1e-10)
    assert clip(found.chain, 1.0, balanced) is None


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("taps", "group", "bias"), CHAINS)
def test_at_full_rank_the_product_stays(taps, group, bias, balanced) -> None:
    chain = pair(8, 6, 7, taps, group, bias)
    found = refactor(chain, 6, balanced)
    x = random(7 * group, 9, 8, seed=5)
    np.testing.assert_allclose(output(found.chain, x), output(chain, x), atol=1e-10)
    np.testing.assert_allclose(
        found.inward @ found.outward, np.stack([np.eye(6 // group)] * group), atol=1e-12
    )


@pytest.mark.parametrize(("taps", "group", "bias"), CHAINS)
def test_the_error_is_the_energy_dropped_and_no_more_than_allowed(taps, group, bias) -> None:
    chain = pair(12, 6, 4, taps, group, bias)
    fading = np.tile(0.5 ** np.arange(6 // group), group)
    chain.steps[0].weight[...] *= fading[:, None, None, None]
    if bias:
        chain.steps[0].bias[...] *= fading
    found = clip(chain, 0.9)
    assert found is not None and found.rank < 6
    per_group = found.rank // group
    enough = []
    for before, after in zip(spread(chain), spread(found.chain), strict=True):
        values = np.linalg.svd(before, compute_uv=False) ** 2
        assert np.sum((before - after) ** 2) == pytest.approx(values[per_group:].sum(), rel=1e-9)
        assert values[per_group:].sum() <= 0.1 * values.sum()
        enough.append(values[per_group - 1 :].sum() <= 0.1 * values.sum())
    assert not all(enough)  # one rank less would drop too much in some group


@pytest.mark.parametrize(("taps", "group", "bias"), CHAINS)
def test_the_maps_lead_from_the_old_factors_to_the_new(taps, group, bias) -> None:
    chain = pair(12, 6, 4, taps, group, bias)
    found = refactor(chain, 2 * group)
    (a, b), (new_a, new_b) = chain.steps, found.chain.steps
    np.testing.assert_allclose(found.carry_first(a.weight), new_a.weight, atol=1e-11)
    np.testing.assert_allclose(found.carry_second(b.weight), new_b.weight, atol=1e-11)
    np.testing.assert_allclose(found.inward @ found.outward, np.stack([np.eye(2)] * group), atol=1e-11)
    if bias:
        np.testing.assert_allclose(new_a.bias, found.carry_first(a.bias), atol=1e-12)


def test_a_bias_between_the_factors_counts_as_a_column() -> None:
    chain = pair(8, 6, 3, "vh")  # three taps of three inputs
    flat = pair(8, 6, 3, "fc")  # the filters span three directions, the bias needs a fourth
    x = random(3, 9, 8, seed=5)
    for one, rank in ((chain, None), (flat, 4)):
        found = clip(one, 1.0)
        assert (found and found.rank) == rank
    np.testing.assert_allclose(output(clip(flat, 1.0).chain, x), output(flat, x), atol=1e-10)


def test_the_split_is_that_of_the_schemes() -> None:
    weight = random(10, 3, 3, 3)
    for name, balanced in (("pca", False), ("svd", True)):
        spectrum = SCHEMES[name].spectrum(weight, Geometry())
        full = spectrum.factor(10)
        mixed = Decomposition(
            (
                replace(full.steps[0], weight=2 * full.steps[0].weight),
                replace(full.steps[1], weight=full.steps[1].weight / 2),
            )
        )
        wanted = spectrum.factor(spectrum.rank_for(0.8))
        found = clip(mixed, 0.8, balanced)
        assert found is not None
        for new, right in zip(found.chain.steps, wanted.steps, strict=True):
            np.testing.assert_allclose(new.weight, right.weight, atol=1e-12)


def test_a_worked_momentum() -> None:
    # W = B A = diag(4, 1), both factors diag(2, 1); rank 1 keeps the first direction
    a = Step("", np.diag([2.0, 1]).reshape(2, 2, 1, 1), None)
    b = Step("", np.diag([2.0, 1]).reshape(2, 2, 1, 1), None)
    m_a, m_b = np.array([[1.0, 2], [3, 4]]), np.array([[5.0, 6], [7, 8]])
    found = clip(Decomposition((a, b)), 0.9, balanced=True)
    assert found is not None
    np.testing.assert_allclose(found.chain.steps[0].weight.reshape(1, 2), [[2, 0]], atol=1e-14)
    np.testing.assert_allclose(found.chain.steps[1].weight.reshape(2, 1), [[2], [0]], atol=1e-14)
    np.testing.assert_allclose(found.carry_first(m_a.reshape(2, 2, 1, 1)).reshape(1, 2), [[1, 2]], atol=1e-14)
    np.testing.assert_allclose(
        found.carry_second(m_b.reshape(2, 2, 1, 1)).reshape(2, 1), [[5], [7]], atol=1e-14
    )
    # the orthonormal split stretches both by two, one up and one down
    pca = clip(Decomposition((a, b)), 0.9, balanced=False)
    assert pca is not None
    np.testing.assert_allclose(pca.chain.steps[0].weight.reshape(1, 2), [[4, 0]], atol=1e-14)
    np.testing.assert_allclose(pca.carry_first(m_a.reshape(2, 2, 1, 1)).reshape(1, 2), [[2, 4]], atol=1e-14)
    np.testing.assert_allclose(
        pca.carry_second(m_b.reshape(2, 2, 1, 1)).reshape(2, 1), [[2.5], [3.5]], atol=1e-14
    )
    np.testing.assert_allclose(
        pca.carry_first(m_a.reshape(2, 2, 1, 1), squares=True).reshape(1, 2), [[4, 8]], atol=1e-13
    )
    np.testing.assert_allclose(
        pca.carry_second(m_b.reshape(2, 2, 1, 1), squares=True).reshape(2, 1), [[1.25], [1.75]], atol=1e-13
    )


def matrices(chain: Decomposition) -> tuple[Array, Array]:
    (a, b) = (step.weight for step in chain.steps)
    return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)


def test_at_full_rank_the_next_step_moves_the_product_as_before() -> None:
    chain = pair(7, 4, 5, "fc")
    A, B = matrices(chain)
    m_a, m_b = random(4, 5, 1, 1, seed=7), random(7, 4, 1, 1, seed=8)
    found = refactor(chain, 4)
    new_A, new_B = matrices(found.chain)
    moved_a, moved_b = found.carry_first(m_a).reshape(4, 5), found.carry_second(m_b).reshape(7, 4)
    velocity = m_b.reshape(7, 4) @ A + B @ m_a.reshape(4, 5)
    np.testing.assert_allclose(moved_b @ new_A + new_B @ moved_a, velocity, atol=1e-11)


def test_between_balanced_factors_a_momentum_is_the_sum_of_the_new_factors_own_gradients() -> None:
    left, _ = np.linalg.qr(random(7, 4))
    right, _ = np.linalg.qr(random(6, 4, seed=1))
    root = np.diag(np.sqrt([9.0, 5, 2, 0.5]))
    turn, _ = np.linalg.qr(random(4, 4, seed=2))  # balanced whatever rotation lies between
    A, B = turn.T @ root @ right.T, left @ root @ turn
    chain = Decomposition((Step("", A[:, :, None, None], None), Step("", B[:, :, None, None], None)))
    found = refactor(chain, 2, balanced=True)
    new_A, new_B = matrices(found.chain)
    pushes = [random(7, 6, seed=s) for s in (3, 4, 5)]  # gradients with respect to the product
    m_a, m_b = sum(B.T @ g for g in pushes), sum(g @ A.T for g in pushes)
    np.testing.assert_allclose(
        found.carry_first(m_a[:, :, None, None]).reshape(2, 6), sum(new_B.T @ g for g in pushes), atol=1e-11
    )
    np.testing.assert_allclose(
        found.carry_second(m_b[:, :, None, None]).reshape(7, 2), sum(g @ new_A.T for g in pushes), atol=1e-11
    )


def test_rounding_and_refusals() -> None:
    chain = pair(16, 8, 8, "fc", bias=False)
    chain.steps[0].weight[3:] *= 1e-6
    assert [clip(chain, 0.999, round_to=n).rank for n in (1, 2, 4)] == [3, 4, 4]
    assert clip(chain, 0.999, round_to=8) is None
    zero = Decomposition(tuple(replace(step, weight=0 * step.weight) for step in chain.steps))
    found = clip(zero, 0.9)
    assert found.rank == 1 and not found.carry_first(chain.steps[0].weight).any()
    with pytest.raises(ValueError, match="1 steps"):
        clipping.spectrum(Decomposition(chain.steps[:1]))
    with pytest.raises(ValueError, match="do not fit"):
        clipping.spectrum(Decomposition((chain.steps[0], pair(16, 4, 8, "fc").steps[1])))
    with pytest.raises(ValueError, match="energy 0"):
        clip(chain, 0)


# --- nets ----------------------------------------------------------------------------------------------------


def conv(name: str, bottom: str, setting: str, top: str = "", more: str = "") -> str:
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{top or name}" {more}\n'
        f"  convolution_param {{ {setting} }} }}\n"
    )


def dense(name: str, bottom: str, setting: str) -> str:
    return f'layer {{ name: "{name}" type: "InnerProduct" bottom: "{bottom}" top: "{name}" inner_product_param {{ {setting} }} }}\n'


NET = (
    nets.inputs(data=(2, 4, 9, 9))
    + conv("c1_v", "data", "num_output: 6 kernel_h: 3 kernel_w: 1 pad_h: 1 pad_w: 0 bias_term: true")
    + conv("c1_h", "c1_v", "num_output: 8 kernel_h: 1 kernel_w: 3 bias_term: false # as it is\n ")
    + 'layer { name: "r" type: "ReLU" bottom: "c1_h" top: "c1_h" }\n'
    + conv("c2_lowrank", "c1_h", "num_output: 6 kernel_size: 3 group: 2 bias_term: false")
    + conv("c2_linear", "c2_lowrank", "num_output: 10 kernel_size: 1 group: 2")
    + 'layer { name: "r2" type: "ReLU" bottom: "c2_linear" top: "c2_linear" }\n'
    + conv("lonely", "c2_linear", "num_output: 6 kernel_size: 1")
    + conv("one", "lonely", "num_output: 6 kernel_size: 1", more='param { name: "w" }')
    + conv("two", "one", "num_output: 6 kernel_size: 1", more='param { name: "w" }')
    + conv("apart", "two", "num_output: 6 kernel_size: 1 group: 3")
    + conv("other", "apart", "num_output: 6 kernel_size: 1 group: 2")
    + 'layer { name: "r3" type: "ReLU" bottom: "other" top: "other" }\n'
    + dense("fc_lowrank", "other", "num_output: 5 bias_term: false transpose: true")
    + dense("fc_linear", "fc_lowrank", "num_output: 7")
)


def blobs_of(model: cp.Model) -> dict[tuple[str, int], Array]:
    assert model.weights is not None
    return {(name, i): blob for name in model.weights for i, blob in enumerate(model.weights[name])}


def tensors(blobs: Mapping[Any, Array]) -> dict[Any, torch.Tensor]:
    return {key: torch.tensor(blob) for key, blob in blobs.items()}


def lowered(seed: int = 0) -> cp.Model:
    """The net with factors that have lost rank: 2 of 6 in every pair's first factor, a third of it in groups."""
    model = nets.model(NET, seed)
    blobs = {key: np.array(blob) for key, blob in blobs_of(model).items()}
    blobs["c1_v", 0][2:] *= 1e-3
    blobs["c1_v", 1][:] = 0
    blobs["c2_lowrank", 0][1:3] *= 1e-3
    blobs["c2_lowrank", 0][4:] *= 1e-3
    blobs["fc_lowrank", 0][:, 1:] *= 1e-3
    entries = {
        name: [nets.NewEntry(name, tuple(blobs[name, i] for i in range(len(model.weights[name]))), b"")]
        for name in model.weights
    }
    return replace(model, weights=model.weights.replace(entries))


def test_pairs_of_a_net() -> None:
    pairs = factor_pairs(find(nets.model(NET)))
    assert [(one.first.layer, one.second.layer, one.group, one.balanced) for one in pairs] == [
        ("c1_v", "c1_h", 1, True), ("c2_lowrank", "c2_linear", 2, True), ("fc_lowrank", "fc_linear", 1, True),
    ]  # fmt: skip
    assert [(one.first.bias, one.second.bias) for one in pairs] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    assert not any(one.balanced for one in factor_pairs(find(nets.model(NET)), balanced=False))
    assert pairs[2].first.transposed and not pairs[2].second.transposed


def clipped(model: cp.Model, hook: ClippingHook, history: Any = None, at: int = 9) -> Reshaped | None:
    return hook.reshape(at, tensors(blobs_of(model)), history or {})


def test_a_clipped_net_is_written_and_computes_almost_the_same(tmp_path: Path) -> None:
    model = lowered()
    pairs = factor_pairs(find(model))
    made = clipped(model, ClippingHook(pairs, 0.9999, 10))
    assert made is not None and made.outputs == {"c1_v": 2, "c2_lowrank": 2, "fc_lowrank": 1}
    blobs = blobs_of(model) | {key: one.numpy() for key, one in made.params.items()}
    cp.save(
        clipped_model(model, pairs, blobs, made.outputs), tmp_path / "n.prototxt", tmp_path / "n.caffemodel"
    )
    again = cp.load(tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    text = (tmp_path / "n.prototxt").read_text()
    for was, now in (("num_output: 6 kernel_h", "num_output: 2 kernel_h"), ("num_output: 6 kernel_size: 3", "num_output: 2 kernel_size: 3"),
                     ("num_output: 5", "num_output: 1")):  # fmt: skip
        assert was in NET and now in text
    assert text.replace("num_output: 2 ", "num_output: 6 ").replace("num_output: 1 ", "num_output: 5 ") == NET
    x = {"data": random(2, 4, 9, 9).astype(np.float32)}
    outs = []
    for one in (model, again):
        with cp.session(one) as session:
            outs.append(session.run(x)["fc_linear"])
    np.testing.assert_allclose(outs[1], outs[0], atol=2e-2 * np.abs(outs[0]).max())
    assert np.abs(outs[1] - outs[0]).max() > 0


def test_the_hook_replaces_blobs_and_histories_alike() -> None:
    model = lowered()
    pairs = factor_pairs(find(model))
    blobs = blobs_of(model)
    rng = np.random.default_rng(0)
    history = {
        key: (torch.tensor(rng.standard_normal(blob.shape)), torch.tensor(rng.random(blob.shape)))
        for key, blob in blobs.items()
    }
    made = clipped(model, ClippingHook(pairs, 0.9999, 10, squares=(False, True)), history)
    assert made is not None and made.history.keys() == made.params.keys()
    assert set(made.params) == {
        ("c1_v", 0), ("c1_v", 1), ("c1_h", 0), ("c2_lowrank", 0), ("c2_linear", 0), ("fc_lowrank", 0), ("fc_linear", 0),
    }  # fmt: skip
    found = clip(pairs[2].chain(blobs), 0.9999)
    assert found is not None
    first, second = found.chain.steps
    np.testing.assert_allclose(made.params["fc_lowrank", 0], first.weight[:, :, 0, 0].T, rtol=1e-5)
    np.testing.assert_allclose(made.params["fc_linear", 0], second.weight[:, :, 0, 0], rtol=1e-5)
    assert made.params["fc_lowrank", 0].dtype == torch.float32
    for slot, squares in enumerate((False, True)):
        old = history["fc_lowrank", 0][slot].numpy().T[:, :, None, None]
        np.testing.assert_allclose(
            made.history["fc_lowrank", 0][slot],
            found.carry_first(old, squares=squares)[:, :, 0, 0].T,
            rtol=1e-9,
        )
        old = history["fc_linear", 0][slot].numpy()[:, :, None, None]
        np.testing.assert_allclose(
            made.history["fc_linear", 0][slot],
            found.carry_second(old, squares=squares)[:, :, 0, 0],
            rtol=1e-9,
        )
    vertical = clip(pairs[0].chain(blobs), 0.9999, balanced=True)
    assert vertical is not None
    np.testing.assert_allclose(
        made.history["c1_v", 1][0], vertical.carry_first(history["c1_v", 1][0].numpy()), rtol=1e-9
    )


def test_when_it_clips() -> None:
    model = lowered()
    pairs = factor_pairs(find(model))
    hook = ClippingHook(pairs, 0.9999, every=10, until=20)
    assert [at for at in range(60) if clipped(model, hook, at=at)] == [9, 19]
    assert clipped(nets.model(NET), ClippingHook(pairs[1:2], 1.0, every=1)) is None
    coarse = clipped(model, ClippingHook(pairs, 0.9999, 10, round_to=4))
    assert coarse is not None and coarse.outputs == {"c1_v": 4, "c2_lowrank": 4, "fc_lowrank": 4}
    for wrong in ({"energy": 0.0, "every": 1}, {"energy": 1.5, "every": 1}, {"energy": 0.9, "every": 0}):
        with pytest.raises(UsageError):
            ClippingHook(pairs, **wrong)


def test_training_goes_on_downhill_through_a_clip() -> None:
    """Plain momentum SGD on a product that must reach a matrix of rank 2, clipped on the way."""
    target = torch.tensor(random(8, 2) @ random(2, 6, seed=1))
    blobs = tensors({("c", 0): 0.3 * random(5, 6, 1, 1, seed=2), ("d", 0): 0.3 * random(8, 5, 1, 1, seed=3)})
    velocity = {key: torch.zeros_like(blob) for key, blob in blobs.items()}
    pairs = [FactorPair(Factor("c", False, False, False), Factor("d", False, False, False), 1, False)]
    hook = ClippingHook(pairs, 0.9999, every=50)
    losses, ranks = [], []
    for iteration in range(400):
        A, B = blobs["c", 0][:, :, 0, 0], blobs["d", 0][:, :, 0, 0]
        error = B @ A - target
        losses.append(float((error**2).sum()))
        gradients = {("c", 0): (B.T @ error)[:, :, None, None], ("d", 0): (error @ A.T)[:, :, None, None]}
        for key, gradient in gradients.items():
            velocity[key] = 0.9 * velocity[key] + 0.002 * gradient
            blobs[key] = blobs[key] - velocity[key]
        made = hook.reshape(iteration, blobs, {key: (one,) for key, one in velocity.items()})
        if made is not None:
            blobs |= made.params
            velocity |= {key: slots[0] for key, slots in made.history.items()}
        ranks.append(len(blobs["c", 0]))
    assert ranks[0] == 5 and ranks[-1] == 2
    assert losses[-1] < 1e-3 * losses[0]
