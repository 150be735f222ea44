"""Which layer gets which scheme and rank: what is asked for is what the written net has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import caffe_proto as cp
import lra
from caffe_proto import net
from caffe_proto.errors import Error, PlanError, UsageError, WeightsError
from caffe_proto.model import Model
from caffe_proto.weights import NewEntry, Weights
from lra import Plan
from lra.plan import LayerPlan
from lra.ranks import candidates
from lra.schemes import SCHEMES
from lra.targets import Spectra, Target, find

MODEL = nets.model(nets.SMALL)
CONVS = ("conv1", "conv2", "conv3")
BASE = cp.cost(MODEL)


def ranks(plan: Plan) -> dict[str, tuple[str, int]]:
    """Layer -> scheme and rank of a plan."""
    return {name: (entry.scheme, entry.ranks[0]) for name, entry in plan.layers.items()}


def measured(plan: Plan, folder: Path, model: Model = MODEL) -> cp.Model:
    """The model as written by a plan and read again."""
    cp.save(lra.apply(plan, model)[0], folder / "new.prototxt", folder / "new.caffemodel")
    return cp.load(folder / "new.prototxt", folder / "new.caffemodel")


def kernel(target: Target, weights: Mapping[str, Any]) -> np.ndarray:
    return target.kernel(weights[target.name][0]).astype(float)


def dropped(scheme: str, weight: np.ndarray, rank: int) -> float:
    """Share of the energy of one group's kernel that a scheme drops at a rank, from numpy's own SVD."""
    out, depth, height, width = weight.shape
    matrix = weight.reshape(out, -1)
    if scheme == "spatial":
        matrix = weight.transpose(1, 2, 3, 0).reshape(depth * height, width * out)
    values = np.linalg.svd(matrix, compute_uv=False) ** 2
    return float(values[rank:].sum() / values.sum())


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("scheme", ["pca", "svd", "spatial"])
def test_energy_is_kept_in_every_group_and_no_rank_is_wasted(scheme: str, energy: float) -> None:
    plan = lra.make_plan(MODEL, scheme=scheme, energy=energy, fc=True, even_if_slower=True)
    assert list(plan.layers) == [*CONVS, "ip1"]
    assert MODEL.weights is not None
    for name, target in find(MODEL).targets.items():
        group = target.geometry.group
        kernels = np.split(kernel(target, MODEL.weights), group)
        per_group = plan.layers[name].ranks[0] // group
        losses = [dropped(scheme, one, per_group) for one in kernels]
        assert max(losses) <= (1 - energy) * (1 + 1e-6)
        if per_group > 1:
            assert max(dropped(scheme, one, per_group - 1) for one in kernels) > 1 - energy


def test_energy_means_the_worst_group() -> None:
    """One group of rank one and one of full rank: the layer needs what the second needs."""
    source = nets.inputs(data=(1, 4, 8, 8)) + (
        'layer { name: "c" type: "Convolution" bottom: "data" top: "c" '
        "convolution_param { num_output: 16 kernel_size: 3 group: 2 bias_term: false } }\n"
    )
    model = nets.model(source)
    assert model.weights is not None
    weight = model.weights["c"][0].copy()
    weight[:8] = weight[:1] * np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)
    model = Model(model.net, Weights([NewEntry("c", (weight,))]))
    plan = lra.make_plan(model, scheme="pca", energy=0.9, even_if_slower=True)
    rank = plan.layers["c"].ranks[0]
    second = weight[8:].astype(float)
    assert dropped("pca", second, rank // 2) <= 0.1 < dropped("pca", second, rank // 2 - 1)
    assert rank // 2 > 1


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_energy_of_kmeans_is_the_share_of_the_spread(energy: float) -> None:
    plan = lra.make_plan(MODEL, scheme="kmeans", energy=energy, even_if_slower=True, only=["conv1"])
    rank = plan.layers["conv1"].ranks[0]
    assert MODEL.weights is not None
    points = MODEL.weights["conv1"][0].astype(float).reshape(16, -1)
    changed = lra.apply(plan, MODEL)[0]
    assert changed.weights is not None
    centroids, chosen = changed.weights["conv1_lowrank"][0], changed.weights["conv1_linear"][0]
    assert set(np.unique(chosen)) <= {0.0, 1.0} and (chosen.reshape(16, rank).sum(axis=1) == 1).all()
    replaced = chosen.reshape(16, rank) @ centroids.reshape(rank, -1)
    spread = ((points - points.mean(axis=0)) ** 2).sum()
    assert ((points - replaced) ** 2).sum() <= (1 - energy) * spread * (1 + 1e-6)


def test_error_is_what_the_weights_lose() -> None:
    plan = lra.make_plan(MODEL, scheme="spatial", ranks=[8, 10, 12])
    _, report = lra.apply(plan, MODEL)
    found = find(MODEL)
    for row in report.rows:
        target = found.targets[row.name]
        weight = kernel(target, MODEL.weights or {})
        group = target.geometry.group
        chain = Spectra(found).get(target, SCHEMES["spatial"]).factor(row.ranks[0])
        expected = np.linalg.norm(weight - chain.reconstruct()) / np.linalg.norm(weight)
        assert row.error == pytest.approx(expected, rel=1e-6)
        assert plan.layers[row.name].error == pytest.approx(expected, rel=1e-4)
        assert row.full_rank == group * min(
            weight.shape[1] * weight.shape[2], weight.shape[0] // group * weight.shape[3]
        )


def test_ranks_go_to_the_eligible_layers_in_net_order() -> None:
    assert ranks(lra.make_plan(MODEL, scheme="pca", ranks=[3, 4, 5])) == {
        "conv1": ("pca", 3),
        "conv2": ("pca", 4),
        "conv3": ("pca", 5),
    }
    plan = lra.make_plan(MODEL, scheme="svd", ranks=[4, 5, 6], fc=True, except_layers=["conv1"])
    assert ranks(plan) == {"conv2": ("svd", 4), "conv3": ("svd", 5), "ip1": ("svd", 6)}
    assert plan.kept == {"conv1": "excepted"}
    plan = lra.make_plan(
        MODEL, scheme="pca", ranks=[9, 2], only=["ip1", "conv3"]
    )  # the net's order, not ours
    assert ranks(plan) == {"conv3": ("pca", 9), "ip1": ("pca", 2)}


@pytest.mark.parametrize("given_ranks", [[3, 4], [3, 4, 5, 6]])
def test_number_of_ranks_must_fit(given_ranks: list[int]) -> None:
    with pytest.raises(UsageError, match=f"{len(given_ranks)} ranks for 3 layers.*conv1, conv2, conv3"):
        lra.make_plan(MODEL, scheme="pca", ranks=given_ranks)


def test_rank_config() -> None:
    config = {"conv1": {"scheme": "spatial", "rank": 8}, "conv3": 5, "ip1": {"rank": 4}}
    plan = lra.make_plan(MODEL, rank_config=config)
    assert ranks(plan) == {"conv1": ("spatial", 8), "conv3": ("pca", 5), "ip1": ("pca", 4)}
    assert plan.kept == {"conv2": "not in the rank config"}
    named = lra.make_plan(MODEL, rank_config=config, scheme="svd")
    assert ranks(named) == {"conv1": ("spatial", 8), "conv3": ("svd", 5), "ip1": ("svd", 4)}


ALEXNET = "published/wen/models/bvlc_alexnet"


@nets.needs_shared
def test_mixed_recipe_of_wen() -> None:
    """conv1 and conv2 by V/H, conv3 to conv5 by filters: the shapes of the nets published as such."""
    folder = nets.SHARED / ALEXNET
    model = cp.load(folder / "deploy.prototxt")
    spatial = json.loads((folder / "config_iclr.json").read_text())
    filters = json.loads((folder / "config_iccv.json").read_text())
    config = {**{name: {"scheme": "spatial", "rank": rank} for name, rank in spatial.items()}, **filters}
    changed, report = lra.apply(lra.make_plan(model, rank_config=config, style="wen"), model)
    outputs = {
        layer.name: int(next(layer.message.messages("convolution_param")).string("num_output"))
        for layer in changed.net.layers
        if layer.type == "Convolution"
    }
    assert outputs == {
        **{"conv1_v": 8, "conv1_h": 96, "conv2_v": 40, "conv2_h": 256},
        **{"conv3_lowrank": 150, "conv3_linear": 384, "conv4_lowrank": 160, "conv4_linear": 384},
        **{"conv5_lowrank": 120, "conv5_linear": 256},
    }
    ratio = {row.name: row.macs[0] / row.macs[1] for row in report.rows if row.macs}
    assert ratio["conv2"] == pytest.approx(8.73, abs=0.01)  # counted by hand for the published net
    assert ratio["conv3"] == pytest.approx(384 * 2304 / (150 * (2304 + 384)))
    assert ratio["conv4"] == pytest.approx(384 * 1728 / (160 * (1728 + 192)))


@nets.needs_shared
@pytest.mark.parametrize("name", ["config_iccv.json", "config_iclr.json"])
def test_published_rank_files_are_short_plans(name: str) -> None:
    path = nets.SHARED / ALEXNET / name
    plan = Plan.from_json(path.read_text(), path)
    assert {layer: entry.ranks for layer, entry in plan.layers.items()} == {
        layer: (rank,) for layer, rank in json.loads(path.read_text()).items()
    }


def test_unprofitable_layers_are_kept_with_the_reason() -> None:
    # conv1: 16 x 75 weights; a rank costs 75 + 16 a position, so 13 is the last that pays
    plan = lra.make_plan(MODEL, scheme="pca", rank_config={"conv1": 14, "conv3": 5})
    assert ranks(plan) == {"conv3": ("pca", 5)}
    assert plan.kept["conv1"] == "rank 14 (pca) needs 1,274 MACs a position, the layer 1,200"
    assert ranks(lra.make_plan(MODEL, rank_config={"conv1": 13})) == {"conv1": ("pca", 13)}
    slower = lra.make_plan(MODEL, scheme="pca", rank_config={"conv1": 14}, even_if_slower=True)
    assert ranks(slower) == {"conv1": ("pca", 14)}
    _, report = lra.apply(slower, MODEL)
    assert report.rows[0].macs == (2 * 144 * 1200, 2 * 144 * 1274)


def test_a_layer_that_never_pays_says_so() -> None:
    source = nets.inputs(data=(1, 1, 8, 8)) + (
        'layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 1 kernel_size: 1 } }\n'
        'layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 64 kernel_size: 5 } }\n'
        'layer { name: "c" type: "Convolution" bottom: "b" top: "c" convolution_param { num_output: 64 kernel_size: 3 } }\n'
    )
    plan = lra.make_plan(nets.model(source), scheme="pca", speedup=1.5)
    assert plan.kept["a"] == "no rank makes it cheaper"
    assert "c" in plan.layers


@pytest.mark.parametrize("round_to", [4, 8])
def test_round_to(round_to: int) -> None:
    plan = lra.make_plan(MODEL, speedup=2.0, round_to=round_to)
    assert plan.layers and all(entry.ranks[0] % round_to == 0 for entry in plan.layers.values())
    _, report = lra.apply(plan, MODEL)
    assert report.macs[0] / report.macs[1] >= 2.0
    free = ranks(lra.make_plan(MODEL, scheme="pca", energy=0.5))
    rounded = ranks(lra.make_plan(MODEL, scheme="pca", energy=0.5, round_to=round_to))
    for name, (_, rank) in free.items():
        up = -(-rank // round_to) * round_to
        pays = find(MODEL).targets[name].chain_cost(SCHEMES["pca"], up) < BASE.by_layer[name].macs
        assert rounded[name] == ("pca", up if pays else rank)


def test_scope() -> None:
    whole = lra.apply(lra.make_plan(MODEL, speedup=1.5), MODEL)[1]
    plan = lra.make_plan(MODEL, speedup=1.5, scope="conv", fc=True)
    convs = lra.apply(plan, MODEL)[1]
    assert whole.macs[0] / whole.macs[1] >= 1.5
    assert convs.conv_macs[0] / convs.conv_macs[1] >= 1.5 > convs.macs[0] / convs.macs[1]
    assert plan.kept["ip1"] == "fully connected (--scope is conv)"


@pytest.mark.parametrize("scheme", ["pca", "spatial", "kmeans", "auto"])
@pytest.mark.parametrize("speedup", [1.2, 1.7, 2.5])
def test_speedup_is_reached_and_not_overshot(scheme: str, speedup: float) -> None:
    """Within one rank step: no layer could take the next larger rank without breaking the budget."""
    plan = lra.make_plan(MODEL, scheme=scheme, speedup=speedup)
    _, report = lra.apply(plan, MODEL)
    budget = report.macs[0] / speedup
    assert report.macs[1] <= budget
    for name, entry in plan.layers.items():
        target, chosen = find(MODEL).targets[name], SCHEMES[entry.scheme]
        group = target.geometry.group
        allowed = candidates(chosen.max_rank(target.shape, group), group)
        above = [rank for rank in allowed if rank > entry.ranks[0]][:1]
        step = target.macs if not above else min(target.macs, target.chain_cost(chosen, above[0]))
        assert report.macs[1] + step - target.chain_cost(chosen, entry.ranks[0]) > budget


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.0, 1.0), st.sampled_from(["auto", "pca", "spatial"]), st.booleans(), st.sampled_from([1, 4])
)
def test_any_reachable_speedup_holds(part: float, scheme: str, fc: bool, round_to: int) -> None:
    found, spectra = FOUND
    fixed = sum(BASE.by_layer[name].macs for name in (() if fc else ("ip1",)))
    names = [*CONVS, *(["ip1"] if fc else [])]
    smallest = fixed + sum(cheapest(found.targets[name], scheme, round_to) for name in names)
    most = BASE.macs / smallest
    speedup = 1 + max(part, 1e-3) * (most - 1) * (1 - 1e-9)
    plan = lra.make_plan(
        MODEL, scheme=scheme, speedup=speedup, fc=fc, round_to=round_to, found=found, spectra=spectra
    )
    after = BASE.macs
    for entry in plan.layers.values():
        assert entry.macs is not None
        after += entry.macs[1] - entry.macs[0]
    assert after <= BASE.macs / speedup
    with pytest.raises(UsageError, match="cannot be reached"):
        lra.make_plan(
            MODEL, scheme=scheme, speedup=most * 1.001, fc=fc, round_to=round_to, found=found, spectra=spectra
        )


def cheapest(target: Target, scheme: str, round_to: int) -> int:
    """The fewest MACs a layer can have."""
    names = ["pca", "spatial"] if scheme == "auto" else [scheme]
    grids = [
        (
            name,
            candidates(
                SCHEMES[name].max_rank(target.shape, target.geometry.group), target.geometry.group, round_to
            ),
        )
        for name in names
    ]
    return min([target.macs, *(target.chain_cost(SCHEMES[name], grid[0]) for name, grid in grids if grid)])


FOUND = (lambda found: (found, Spectra(found)))(find(MODEL))


@pytest.mark.parametrize("energy", [0.6, 0.8, 0.9])
def test_auto_takes_the_cheaper_scheme_at_equal_energy(energy: float) -> None:
    auto = lra.make_plan(MODEL, energy=energy, even_if_slower=True)
    each = {
        name: lra.make_plan(MODEL, scheme=name, energy=energy, even_if_slower=True)
        for name in ("pca", "spatial")
    }
    for layer in CONVS:
        costs = {name: (plan.layers[layer].macs or (0, 0))[1] for name, plan in each.items()}
        assert (auto.layers[layer].macs or (0, 0))[1] == min(costs.values())
        assert costs[auto.layers[layer].scheme] == min(costs.values())


def test_infeasible_says_how_much_is_possible() -> None:
    with pytest.raises(UsageError, match="a speed-up of 1000 of the whole net cannot be reached") as caught:
        lra.make_plan(MODEL, speedup=1000)
    possible = float(caught.value.message.rpartition(" ")[2])
    plan = lra.make_plan(MODEL, speedup=possible)  # what it names can be had
    _, report = lra.apply(plan, MODEL)
    assert possible <= report.macs[0] / report.macs[1] < possible * 1.01


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"speedup": 1.0}, "must be a number above 1"),
        ({"speedup": float("nan")}, "must be a number above 1"),
        ({"speedup": float("inf")}, "must be a number above 1"),
        ({"energy": 0.0}, "energy 0 must lie"),
        ({"energy": 1.5}, "energy 1.5 must lie"),
        ({"energy": float("nan")}, "energy nan must lie"),
        ({}, "exactly one"),
        ({"speedup": 2.0, "energy": 0.9}, "exactly one"),
        ({"ranks": [3, 3, 3]}, "ranks need a named scheme"),
        ({"speedup": 2.0, "scheme": "magic"}, 'there is no scheme "magic"'),
        ({"speedup": 2.0, "style": "magic"}, 'there is no style "magic"'),
        ({"speedup": 2.0, "scope": "magic"}, 'there is no scope "magic"'),
        ({"speedup": 2.0, "round_to": 0}, "multiples of 0"),
        ({"speedup": 2.0, "only": ["conv9"]}, 'there is no layer "conv9".*did you mean "conv'),
        ({"speedup": 2.0, "except_layers": ["relu1"]}, 'layer "relu1" is of type ReLU'),
        ({"speedup": 2.0, "only": []}, "no layer is left"),
        ({"rank_config": {"conv9": 3}}, 'there is no layer "conv9"'),
        ({"rank_config": {"conv1": "many"}}, 'layer "conv1": \'many\' is no rank'),
        ({"rank_config": {"conv1": 0}}, 'layer "conv1": rank 0 is not positive'),
        ({"rank_config": {"conv1": 17}}, 'layer "conv1": rank 17 is above the largest possible, 16'),
        ({"rank_config": {"conv2": 7}}, 'layer "conv2": rank 7 is not a multiple of group 2: use 6 or 8'),
        ({"rank_config": {"conv1": {"scheme": "spatial"}}}, '"ranks" is'),
        ({"rank_config": {"conv1": {"rank": 3, "colour": 1}}}, 'unknown key "colour"'),
        ({"rank_config": {"conv1": {"ranks": [3, 4]}}}, "2 ranks, pca takes 1"),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense(amount: dict[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        lra.make_plan(MODEL, **amount)


def test_fully_connected_layers_only_when_asked_for() -> None:
    off = lra.make_plan(MODEL, energy=0.5)
    assert off.kept["ip1"] == "fully connected (--fc is off)"
    on = lra.make_plan(MODEL, energy=0.5, fc=True)
    assert on.layers["ip1"].scheme == "pca"  # nothing to separate in a 1 x 1 kernel
    assert list(on.layers) == [name for name in BASE.by_layer if name in on.layers]


def test_weights_are_needed_to_look_at_them() -> None:
    bare = Model(MODEL.net)
    with pytest.raises(WeightsError, match='layer "conv1": there are no weights to decompose'):
        lra.make_plan(bare, energy=0.9)
    assert ranks(lra.make_plan(bare, scheme="pca", ranks=[3, 4, 5]))["conv3"] == ("pca", 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_not_finite(scheme: str, bad: float) -> None:
    assert MODEL.weights is not None
    weight, bias = (blob.copy() for blob in MODEL.weights["conv2"])
    weight[3, 1, 0, 2] = bad
    broken = Model(MODEL.net, MODEL.weights.replace({"conv2": [NewEntry("conv2", (weight, bias))]}))
    for amount in ({"energy": 0.5}, {"speedup": 1.5}, {"ranks": [3, 4, 5]}):
        with pytest.raises(WeightsError, match='layer "conv2": its weights hold values that are not finite'):
            lra.make_plan(broken, scheme=scheme, **amount)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match='layer "conv2": its weights hold'):
        lra.apply(Plan({"conv2": LayerPlan(scheme, (4,))}), broken)


def test_shared_weights_get_one_rank() -> None:
    """Twins of one weight on images of other sizes: whatever is asked for, both are treated alike."""
    source = nets.inputs(left=(1, 8, 8, 8), right=(1, 8, 12, 12)) + "".join(
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" param {{ name: "w" }} '
        'param { name: "b" } convolution_param { num_output: 16 kernel_size: 3 } }\n'
        for name, bottom in (("a", "left"), ("b", "right"))
    )
    model = nets.model(source)
    for speedup in np.linspace(1.05, 4, 12):
        plan = lra.make_plan(model, speedup=float(speedup))
        assert ranks(plan)["a"] == ranks(plan)["b"]
        changed, report = lra.apply(plan, model)
        assert report.macs[1] <= report.macs[0] / speedup
        nets.forward(changed, nets.random_feeds(model))


def test_shapes_that_are_not_known() -> None:
    """A net that reads from a database can be decomposed all the same, but no speed-up counted."""
    known = nets.SMALL
    start = known.index('layer {\n  name: "data"')
    source = known[:start] + (
        'layer { name: "data" type: "Data" top: "data" top: "label" data_param { source: "x" batch_size: 2 } }\n'
    ) + known[known.index('layer {\n  name: "conv1"'):]  # fmt: skip
    model = Model(net.parse(source), MODEL.weights)
    with pytest.raises(UsageError, match=r'line 2: a speed-up cannot be counted: layer "data": data_param'):
        lra.make_plan(model, speedup=2.0)
    plan = lra.make_plan(model, energy=0.5, fc=True)
    assert ranks(plan) == ranks(lra.make_plan(MODEL, energy=0.5, fc=True))
    assert all(entry.macs is None for entry in plan.layers.values())
    changed, _ = lra.apply(plan, model)
    expected, _ = lra.apply(plan, MODEL, force=True)
    assert changed.weights is not None and expected.weights is not None
    assert list(changed.weights) == list(expected.weights)
    for name in expected.weights:
        for mine, theirs in zip(changed.weights[name], expected.weights[name], strict=True):
            assert np.array_equal(mine, theirs)
    sizes = {"data": (2, 3, 12, 12), "label": (2,)}
    assert ranks(lra.make_plan(model, speedup=2.0, input_shapes=sizes)) == ranks(
        lra.make_plan(MODEL, speedup=2.0)
    )


def test_weights_of_another_net_behind_unknown_shapes() -> None:
    source = nets.SMALL.replace('type: "Input"', 'type: "Data"')
    source = source.replace(
        "input_param { shape { dim: 2 dim: 3 dim: 12 dim: 12 } }", 'data_param { source: "x" }'
    )
    model = Model(net.parse(source.replace("num_output: 24", "num_output: 26")), MODEL.weights)
    with pytest.raises(
        WeightsError, match=r'layer "conv2": learns 2 blobs for 26 outputs, stored are 24 x 8'
    ):
        lra.make_plan(model, energy=0.5)


@pytest.mark.parametrize("request_", [
    {"speedup": 2.0}, {"speedup": 2.0, "fc": True}, {"energy": 0.6, "scheme": "spatial"},
    {"energy": 0.9, "scheme": "kmeans", "even_if_slower": True}, {"ranks": [5, 6, 7], "scheme": "svd"},
])  # fmt: skip
def test_predicted_macs_are_those_of_the_files(tmp_path: Path, request_: dict[str, Any]) -> None:
    plan = lra.make_plan(MODEL, **request_)
    assert plan.layers
    after = cp.cost(measured(plan, tmp_path))
    for name, entry in plan.layers.items():
        suffixes = [step.suffix for step in SCHEMES[entry.scheme].structure(
            find(MODEL).targets[name].shape, find(MODEL).targets[name].geometry, entry.ranks[0]
        )]  # fmt: skip
        assert entry.macs == (
            BASE.by_layer[name].macs,
            sum(after.by_layer[name + one].macs for one in suffixes),
        )
    assert after.macs == BASE.macs + sum(
        new - old for old, new in (entry.macs or (0, 0) for entry in plan.layers.values())
    )


def test_macs_by_hand() -> None:
    """conv1: 16 x 3 x 5 x 5 at 12 x 12 places, two pictures."""
    assert BASE.by_layer["conv1"].macs == 2 * 144 * prod((16, 3, 5, 5))
    plan = lra.make_plan(MODEL, rank_config={"conv1": {"scheme": "spatial", "rank": 4}})
    assert plan.layers["conv1"].macs == (345600, 2 * 144 * 4 * (3 * 5 + 16 * 5))


def test_plan_json_round_trip() -> None:
    plan = lra.make_plan(MODEL, speedup=1.5, round_to=4, style="tai", except_layers=["conv3"])
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan and again.to_json() == text
    assert json.loads(text)["target"] == {
        "speedup": 1.5, "scope": "all", "scheme": "auto", "style": "tai", "round_to": 4,
    }  # fmt: skip
    lines = text.splitlines()
    for name in (*plan.layers, *plan.kept):
        assert sum(line.lstrip().startswith(f'"{name}": ') for line in lines) == 1
    assert Plan.from_json(Plan({}).to_json()) == Plan({})


def test_odd_layer_names_survive_json() -> None:
    plan = Plan({'a"b\\c/ä': LayerPlan("pca", (3,), (10, 5), 0.25)}, {"\n": "why"})
    assert Plan.from_json(plan.to_json()) == plan


def test_diff() -> None:
    here = Plan({"a": LayerPlan("pca", (3,)), "b": LayerPlan("pca", (4,)), "c": LayerPlan("svd", (1,))})
    there = Plan({"a": LayerPlan("pca", (3,)), "b": LayerPlan("pca", (5,)), "d": LayerPlan("pca", (2,))})
    assert here.diff(there) == {
        "b": ({"scheme": "pca", "ranks": [4]}, {"scheme": "pca", "ranks": [5]}),
        "c": ({"scheme": "svd", "ranks": [1]}, None),
        "d": (None, {"scheme": "pca", "ranks": [2]}),
    }
    assert here.diff(here) == {}


def test_fingerprints(tmp_path: Path) -> None:
    model = cp.load(*nets.files(tmp_path))
    other_weights = cp.load(*nets.files(tmp_path, seed=7, stem="other"))
    other_net = cp.load(*nets.files(tmp_path, nets.SMALL + "# more\n", stem="more"))
    plan = lra.make_plan(model, scheme="pca", ranks=[3, 4, 5])
    assert (len(plan.net), len(plan.weights)) == (64, 64)
    expected = lra.apply(plan, model)[0]
    with pytest.raises(PlanError, match="another weights file"):
        lra.apply(plan, other_weights)
    with pytest.raises(PlanError, match=r"another net file.*--force"):
        lra.apply(plan, other_net)
    forced = lra.apply(plan, other_net, force=True)[0]
    assert forced.net.text == expected.net.text + "# more\n"
    lra.apply(plan, Model(model.net))  # a sibling without weights: nothing to compare with


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "must be a JSON object"),
        ('{"conv1": 3, "conv1": 4}', 'names "conv1" twice'),
        ('{"conv1": true}', "True is no rank"),
        ('{"conv1": 3.5}', "3.5 is no rank"),
        ('{"layers": []}', "must be objects"),
        ('{"layers": {"conv1": {"scheme": ["pca"], "ranks": [3]}}}', "there is no scheme"),
        ('{"layers": {"conv1": {"scheme": "magic", "ranks": [3]}}}', 'there is no scheme "magic"'),
        ('{"layers": {"conv1": {"scheme": "pca", "ranks": 3}}}', '"ranks" is 3'),
        ('{"layers": {"conv1": {"scheme": "pca", "ranks": [3], "macs": 5}}}', '"macs" is 5'),
        ('{"layers": {"conv1": {"scheme": "pca", "ranks": [3], "error": "x"}}}', "\"error\" is 'x'"),
        ('{"layers": {}, "kept": {"conv1": ["x"]}}', '"kept" must say'),
    ],
)
def test_plans_that_are_none(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(text, "some.plan.json")
    assert str(caught.value).startswith("some.plan.json")


def test_style_of_a_plan_must_exist() -> None:
    with pytest.raises(PlanError, match='there is no style "magic"'):
        lra.apply(Plan({}, target={"style": "magic"}), MODEL)


def test_plan_for_layers_that_are_not_there() -> None:
    with pytest.raises(PlanError, match=r'names "conv9", which is no convolution.*did you mean "conv'):
        lra.apply(Plan({"conv9": LayerPlan("pca", (3,))}), MODEL)
    with pytest.raises(PlanError, match="'' is no scheme of this program"):
        lra.apply(Plan.from_json('{"conv1": 3}'), MODEL)
