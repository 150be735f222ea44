"""Plans from amounts and scores: which filters stay, how many, why others do; and masks for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import numpy as np
import pruning
import pytest
from helpers import SHARED, needs_shared

import hrank
from caffe_proto import net
from caffe_proto.errors import Error, PlanError, UsageError
from caffe_proto.model import Model
from hrank import planner, rank_files
from hrank.applier import apply
from hrank.coupling import Coupling, find, removed_places
from hrank.criteria import CRITERIA
from hrank.measure import measure
from hrank.plan import Plan
from hrank.planner import Amount, Limits

MODELS = Path(__file__).resolve().parents[1] / "models"

RESIDUAL = (
    nets.inputs(data=(1, 3, 8, 8))
    + """
layer { name: "stem" type: "Convolution" bottom: "data" top: "stem" convolution_param { num_output: 8 kernel_size: 3 pad: 1 } }
layer { name: "stem/relu" type: "ReLU" bottom: "stem" top: "stem" }
layer { name: "a" type: "Convolution" bottom: "stem" top: "a" convolution_param { num_output: 10 kernel_size: 3 pad: 1 } }
layer { name: "a/bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "a/scale" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "a/relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 8 kernel_size: 3 pad: 1 } }
layer { name: "sum" type: "Eltwise" bottom: "stem" bottom: "b" top: "sum" }
layer { name: "sum/relu" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "c" type: "Convolution" bottom: "sum" top: "c" convolution_param { num_output: 6 kernel_size: 1 } }
layer { name: "c/relu" type: "ReLU" bottom: "c" top: "c" }
layer { name: "end" type: "InnerProduct" bottom: "c" top: "end" inner_product_param { num_output: 4 } }
"""
)


@pytest.fixture(scope="module")
def model() -> Model:
    return pruning.model(RESIDUAL)


@pytest.fixture(scope="module")
def coupling(model: Model) -> Coupling:
    return find(model)


def images(n: int = 12) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((n, 3, 8, 8)).astype(np.float32)


def kept(plan: Plan) -> dict[str, int]:
    return {name: len(entry.keep) for name, entry in plan.layers.items()}


def layer_sizes(coupling: Coupling, found: planner.Sizes) -> dict[str, int]:
    return {name: len(channels) for name, channels in coupling.choose(found.groups).items()} | found.layers


# Amounts ----------------------------------------------------------------------------------------------------------


def test_rates_by_position_and_by_layer_are_one(coupling: Coupling) -> None:
    by_string = planner.sizes(coupling, Amount(rates=(0.5, 0.35, 0.0, 0.5)))
    by_name = planner.sizes(coupling, Amount(by_layer={"stem": 0.5, "a": 0.35, "c": 0.5}))
    assert layer_sizes(coupling, by_string) == layer_sizes(coupling, by_name) == {"a": 7, "c": 3}
    assert by_string.kept == {"stem": "shares its channels: 2 layers, stem to b, keep the same or none"}


def test_coupled_layers_go_as_one(coupling: Coupling) -> None:
    found = planner.sizes(coupling, Amount(by_layer={"stem": 0.5, "b": 0.5}), Limits(coupled=True))
    assert layer_sizes(coupling, found) == {"stem": 4, "b": 4}
    with pytest.raises(PlanError, match=r"has rate 0.25, and \"stem\""):
        planner.sizes(coupling, Amount(by_layer={"stem": 0.5, "b": 0.25}), Limits(coupled=True))


def test_masks_stand_for_themselves(coupling: Coupling) -> None:
    amount = Amount(by_layer={"stem": 0.5, "a": 0.3, "b": 0.25})
    assert planner.sizes(coupling, amount, Limits(masks=True)).layers == {"stem": 4, "a": 7, "b": 6}
    ends = planner.sizes(
        find(pruning.model(RESIDUAL.split('layer { name: "c/relu"')[0])),
        Amount(by_layer={"c": 0.5}),
        Limits(masks=True),
    )
    assert ends == planner.Sizes({}, {}, {"c": "its filters are an output of the net"})


def test_names_left_out_rounding_and_least(coupling: Coupling) -> None:
    amount = Amount(by_layer={"a": 0.9, "c": 0.9})
    assert layer_sizes(coupling, planner.sizes(coupling, amount)) == {"a": 1, "c": 1}
    assert layer_sizes(coupling, planner.sizes(coupling, amount, Limits(least=3))) == {"a": 3, "c": 3}
    assert layer_sizes(coupling, planner.sizes(coupling, amount, Limits(round_to=4))) == {"a": 4, "c": 4}
    for limits in (Limits(except_layers=("a",)), Limits(only=("c",))):
        found = planner.sizes(coupling, amount, limits)
        assert layer_sizes(coupling, found) == {"c": 1}
        assert found.kept == {"a": "left out"}


@pytest.mark.parametrize(
    ("amount", "limits", "match"),
    [
        (Amount(by_layer={"d": 0.5}), Limits(), 'layer "d": is no layer with filters'),
        (Amount(by_layer={"end": 0.5}), Limits(), 'layer "end": is an InnerProduct'),
        (Amount(by_layer={"a": 0.5}), Limits(except_layers=("aa",)), 'layer "aa"'),
        (Amount(by_layer={"a": 0.5}), Limits(only=("aa",)), 'layer "aa"'),
        (Amount(), Limits(), "no amount"),
        (Amount(rates=(0.5,)), Limits(), "1 rates for 4 positions"),
        (Amount(speedup=50.0), Limits(), "cannot be met"),
    ],
)
def test_what_is_refused(coupling: Coupling, amount: Amount, limits: Limits, match: str) -> None:
    with pytest.raises(Error, match=match):
        planner.sizes(coupling, amount, limits)


@pytest.mark.parametrize("coupled", [False, True])
def test_budgets_are_met_and_not_by_much(model: Model, coupled: bool) -> None:
    limits = Limits(coupled=coupled)
    for wanted in ({"speedup": 1.3}, {"params": 1.4}, {"speedup": 1.2, "params": 1.5}):
        plan = hrank.make_plan(model, criterion="l1", limits=limits, **wanted)  # type: ignore[arg-type]
        _, report = apply(plan, model)
        macs, params = report.macs[0] / report.macs[1], report.params[0] / report.params[1]
        assert macs >= wanted.get("speedup", 1) and params >= wanted.get("params", 1)
        assert ("stem" in plan.layers) == coupled
        less = dict.fromkeys(("stem", "b", "a", "c"), plan.target["rate"] - 1e-5)
        missed = hrank.make_plan(model, criterion="l1", limits=limits, rates=less)
        _, report = apply(missed, model)
        macs, params = report.macs[0] / report.macs[1], report.params[0] / report.params[1]
        assert macs < wanted.get("speedup", 0) or params < wanted.get("params", 0)


@pytest.mark.parametrize("speedup", [1.05, 1.2, 1.35, 1.5, 2.0])
def test_budgets_are_met_by_rounded_numbers(model: Model, speedup: float) -> None:
    plan = hrank.make_plan(model, criterion="l1", speedup=speedup, limits=Limits(round_to=4))
    assert all(count % 4 == 0 for count in kept(plan).values())
    _, report = apply(plan, model)
    assert report.macs[0] >= speedup * report.macs[1]


def test_positions_of_transitions_keep_a_part_of_what_they_read() -> None:
    parsed = net.parse((MODELS / "densenet_40" / "deploy.prototxt").read_text())
    coupling = find(Model(parsed))
    rates = (0.0,) + (0.25,) * 12 + (0.1,) + (0.25,) * 12 + (0.1,) + (0.25,) * 12
    found = planner.sizes(coupling, Amount(rates, "hrankplus"))
    sizes = layer_sizes(coupling, found)
    assert sizes["dense1_1/conv"] == 9
    assert sizes["trans1/conv"] == int((24 + 12 * 9) * 0.9)


# Choosing ---------------------------------------------------------------------------------------------------------


def test_the_highest_scores_stay(model: Model) -> None:
    plan = hrank.make_plan(model, rates={"a": 0.4, "c": 0.5}, criterion="l1")
    assert model.weights is not None
    for name, count in (("a", 6), ("c", 3)):
        norms = np.abs(model.weights[name][0]).reshape(len(model.weights[name][0]), -1).sum(1)
        assert plan.layers[name].keep == tuple(sorted(np.argsort(norms)[-count:].tolist()))
    assert plan.target["criterion"] == "l1"
    assert plan.target["rates"] == {"a": 0.4, "c": 0.5}


def test_ranks_of_images_decide(model: Model) -> None:
    plan = hrank.make_plan(model, images=images(), rates={"a": 0.4}, threads=1)
    means = measure(model, images(), threads=1).sums["a"].ranks.mean
    order = sorted(range(10), key=lambda i: (means[i], i))
    assert plan.layers["a"].keep == tuple(sorted(order[4:]))
    reverse = hrank.make_plan(model, images=images(), rates={"a": 0.4}, criterion="reverse", threads=1)
    assert reverse.layers["a"].keep != plan.layers["a"].keep


def test_a_group_is_scored_by_its_layers(model: Model) -> None:
    assert model.weights is not None
    norms = [np.abs(model.weights[name][0]).reshape(8, -1).sum(1) for name in ("stem", "b")]
    for reduce, joined in (("mean", np.mean(norms, 0)), ("max", np.max(norms, 0)), ("min", np.min(norms, 0))):
        plan = hrank.make_plan(
            model, rates={"stem": 0.5}, criterion="l1", limits=Limits(coupled=True), reduce=reduce
        )
        assert (
            plan.layers["stem"].keep
            == plan.layers["b"].keep
            == tuple(sorted(np.argsort(joined)[4:].tolist()))
        )


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("gamma", "next-l1")])
def test_every_criterion_makes_a_plan_of_the_same_counts(model: Model, criterion: str) -> None:
    plan = hrank.make_plan(
        model, images=images(4), rates={"a": 0.4, "c": 0.5}, criterion=criterion, threads=1
    )
    assert kept(plan) == {"a": 6, "c": 3}
    pruned, _ = apply(Plan.from_json(plan.to_json()), model)
    assert pruned.weights is not None
    assert pruned.weights["c"][0].shape == (3, 8, 1, 1)


def test_random_is_the_seeds(model: Model) -> None:
    plans = [hrank.make_plan(model, rates={"a": 0.5}, criterion="random", seed=seed) for seed in (1, 1, 2)]
    assert plans[0].layers == plans[1].layers != plans[2].layers


def test_layers_that_cannot_be_judged(model: Model) -> None:
    plan = hrank.make_plan(model, rates={"a": 0.4, "c": 0.5}, criterion="gamma")
    assert kept(plan) == {"a": 6}
    assert plan.kept == {
        "c": 'criterion "gamma" needs gamma, the factors of a BatchNorm behind the layer, which is not known'
    }
    with pytest.raises(UsageError, match=r'layer "c": its filters cannot be judged.*leave it out'):
        hrank.make_plan(model, speedup=1.2, criterion="gamma")
    with pytest.raises(UsageError, match="cannot be judged"):
        hrank.make_plan(model, rates={"c": 0.5}, criterion="gamma")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"criterion": "best"}, "no criterion"),
        ({}, "measured on images"),
        ({"criterion": "l1", "rates": None}, "give rates"),
        ({"criterion": "l1", "speedup": 2.0}, "give rates"),
    ],
)
def test_make_plan_refuses(model: Model, settings: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        hrank.make_plan(model, **({"rates": {"a": 0.5}} | settings))  # type: ignore[arg-type]


# Rank files -------------------------------------------------------------------------------------------------------


def test_a_rank_file_stands_for_its_images(model: Model, tmp_path: Path) -> None:
    measured = measure(model, images(), threads=1)
    path = tmp_path / "ranks.json"
    rank_files.write(path, rank_files.RankFile.of(model, measured, {}))
    direct = hrank.make_plan(model, images=images(), rates={"a": 0.4, "c": 0.5}, threads=1)
    assert hrank.make_plan(model, ranks=path, rates={"a": 0.4, "c": 0.5}).layers == direct.layers
    other = pruning.model(RESIDUAL.replace("num_output: 10", "num_output: 12"))
    with pytest.raises(PlanError, match="measured with another net file"):
        planner.read_ranks(path, find(other), "relu")
    with pytest.raises(PlanError, match="holds 10 filters, the layer has 12"):
        planner.read_ranks(path, find(other), "relu", force=True)


def test_published_files_are_those_of_the_layers_in_order(model: Model, tmp_path: Path) -> None:
    sizes = {"stem": 8, "a": 10, "b": 8, "c": 6}
    vectors = {
        name: np.random.default_rng(i).permutation(n).astype(np.float32)
        for i, (name, n) in enumerate(sizes.items())
    }
    # the maps of a are made before those behind the sum
    for number, name in enumerate(("stem", "a", "b", "c"), 1):
        np.save(tmp_path / f"rank_conv{number}.npy", vectors[name])
    plan = hrank.make_plan(model, ranks=tmp_path, rates={"a": 0.4, "c": 0.5})
    assert plan.layers["a"].keep == tuple(sorted(np.argsort(vectors["a"])[4:].tolist()))
    assert plan.layers["c"].keep == tuple(sorted(np.argsort(vectors["c"])[3:].tolist()))
    np.save(tmp_path / "rank_conv5.npy", vectors["a"])
    with pytest.raises(UsageError, match="5 rank files for 4 layers"):
        hrank.make_plan(model, ranks=tmp_path, rates={"a": 0.4})


@needs_shared
@pytest.mark.parametrize(
    ("folder", "files", "rates", "filters"),
    [
        ("resnet_56", "resnet_56", "[0.1]+[0.60]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]", 1119),
        ("vgg_16_bn", "vgg_16_bn", "[0.95]+[0.5]*6+[0.9]*4+[0.8]*2", 859 + 512),
        ("densenet_40", "densenet_40", "[0.0]+[0.1]*6+[0.7]*6+[0.0]+[0.1]*6+[0.7]*6+[0.0]+[0.1]*6+[0.7]*5+[0.0]", 782),
    ],
)  # fmt: skip
def test_published_ranks_and_rates_mask_the_published_filters(
    folder: str, files: str, rates: str, filters: int
) -> None:
    whole = pruning.model((MODELS / folder / "deploy.prototxt").read_text())
    plan = hrank.make_plan(
        whole,
        ranks=SHARED / "data" / "hrank_ranks" / files,
        rates=rates,
        at="after_pool",
        limits=Limits(masks=True),
    )
    coupling = find(whole)
    convs = [name for name, (_, one) in coupling.by_layer.items() if one.type == "Convolution"]
    left = {
        name: len(plan.layers[name].keep) if name in plan.layers else coupling.member(name)[1].channels
        for name in convs
    }
    assert sum(left.values()) == filters
    apply(plan, whole, mask_only=True)


@needs_shared
def test_published_ranks_of_googlenet_belong_to_the_branches_they_rank() -> None:
    whole = pruning.model((MODELS / "googlenet_cifar" / "deploy.prototxt").read_text())
    plan = hrank.make_plan(
        whole, ranks=SHARED / "data" / "hrank_ranks" / "googlenet", rates="[0.10]+[0.8]*5+[0.85]+[0.8]*3",
        at="after_pool", limits=Limits(masks=True),
    )  # fmt: skip
    assert sum(kept(plan).values()) == 1258
    assert {name.rpartition("/")[2] for name in plan.kept} == {"double3x3_1"}


# Masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [False, True])
def test_masks_are_what_masking_zeroes(model: Model, each: bool) -> None:
    rates = {"stem": 0.5, "a": 0.4, "b": 0.25 if each else 0.5}
    plan = hrank.make_plan(model, rates=rates, criterion="l1", limits=Limits(masks=each, coupled=not each))
    masked, _ = apply(plan, model, mask_only=True)
    found = hrank.masks(plan, model)
    assert model.weights is not None and masked.weights is not None
    changed = 0
    for name in model.weights:
        for number, (before, after) in enumerate(zip(model.weights[name], masked.weights[name], strict=True)):
            mask = found.get((name, number), np.ones(before.shape, bool))
            assert mask.shape == before.shape
            assert np.array_equal(np.where(mask, before, 0), after)
            changed += not mask.all()
    assert changed == len(found) > 6
    assert plan.target.get("masks", False) == each


def test_masks_keep_a_trained_net_pruned(model: Model) -> None:
    torch = pytest.importorskip("torch")
    from lra.train_hooks import MaskHook

    plan = hrank.make_plan(model, rates={"a": 0.4}, criterion="l1")
    assert model.weights is not None
    params = {
        (name, i): torch.tensor(np.array(blob))
        for name in model.weights
        for i, blob in enumerate(model.weights[name])
    }
    MaskHook(hrank.masks(plan, model)).start(params)
    masked, _ = apply(plan, model, mask_only=True)
    assert masked.weights is not None
    assert np.array_equal(params["a", 0].numpy(), masked.weights["a"][0])


def test_masks_of_another_net(model: Model) -> None:
    plan = Plan.from_json('{"nowhere": [0]}')
    with pytest.raises(PlanError, match="nowhere"):
        hrank.masks(plan, model)


def test_readers_lose_what_goes(model: Model, coupling: Coupling) -> None:
    plan = hrank.make_plan(model, rates={"a": 0.4}, criterion="l1")
    gone = coupling.removed(plan.keep)
    assert removed_places(gone, coupling.filters["a"]).sum() == 4
    pruned, _ = apply(plan, model)
    assert model.weights is not None and pruned.weights is not None
    kept_columns = np.array(model.weights["b"][0])[:, list(plan.layers["a"].keep)]
    assert np.array_equal(pruned.weights["b"][0], kept_columns)


def test_images_may_be_named(model: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=images(), y=np.zeros(12, int))
    named = hrank.make_plan(
        model, images=tmp_path / "x.npz", rates={"a": 0.5, "c": 0.5}, criterion="activation", threads=1
    )
    given = hrank.make_plan(
        model, images=images(), rates={"a": 0.5, "c": 0.5}, criterion="activation", threads=1
    )
    assert named.keep == given.keep and set(named.keep) == {"a", "c"}
    with pytest.raises(Error, match="gone: no such file"):
        hrank.make_plan(model, images="gone", rates={"a": 0.5}, criterion="rank")


def of_data(model: Model) -> Model:
    """The same net behind a Data layer, which does not say how large the images are."""
    layer = 'layer { name: "in" type: "Data" top: "data" top: "label" data_param { source: "gone" batch_size: 4 } }'
    return Model(net.parse(RESIDUAL.replace(nets.inputs(data=(1, 3, 8, 8)), layer)), model.weights)


@pytest.mark.parametrize("criterion", ["l1", "next-l1", "geometric-median"])
def test_a_net_of_data_is_judged_by_the_shapes_given(model: Model, criterion: str) -> None:
    shapes = {"data": (1, 3, 8, 8)}
    plan = hrank.make_plan(of_data(model), speedup=1.2, criterion=criterion, input_shapes=shapes)
    assert plan.keep == hrank.make_plan(model, speedup=1.2, criterion=criterion).keep


@pytest.mark.parametrize("amount", [{"speedup": 1.2}, {"params": 1.2}, {"rates": "[0.5]*4"}])
def test_a_net_of_data_without_shapes_says_what_is_missing(model: Model, amount: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r'no size of a layer is known: layer "in": .*with --input-shape'):
        hrank.make_plan(of_data(model), criterion="l1", **amount)
