"""What the benchmarks of plans by time do besides measuring: energies of the table, the search, rows kept."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

import nets
import numpy as np
import pytest

from benchmarks import efficiency, latency_plans, plans
from benchmarks.efficiency import Row, fastest, grid, quartiles, read
from benchmarks.plans import PCA, SPECTRA, Losses, power
from caffe_proto.model import Model, load
from caffe_proto.net import parse
from lra import ranks as policy
from lra.ranks import Option
from lra.schemes.asymmetric3d import ASYMMETRIC_3D
from lra.schemes.spatial import SPATIAL
from lra.targets import Spectra, find

ROOT = Path(__file__).resolve().parents[1]
FOUND = find(nets.model(nets.SMALL))
CONVOLUTIONS = plans.convolutions(FOUND)


def test_energies_of_the_table() -> None:
    """Components 1, 1/2^p, 1/3^p, ...: by hand for conv1_2, and the default where a layer is not listed."""
    target = find(load(ROOT / "models" / "vgg_16" / "deploy.prototxt")).targets["conv1_2"]
    assert power("vgg_16", "conv1_2", PCA) == 1.37
    assert power("vgg_16", "conv1_2", SPATIAL) == pytest.approx(1.67)
    assert power("resnet_18", "conv1", PCA) == 1.1
    parts = [k**-1.37 for k in range(1, 65)]
    loss = Losses(None, "vgg_16")(target, PCA, (11,))
    assert loss == pytest.approx(-np.log(sum(parts[:11]) / sum(parts)))
    assert "[vgg_16]" in SPECTRA.read_text()


def test_published_ranks_are_the_best_of_least_macs_with_the_table() -> None:
    """The table is made so: Zhang's 4 times; two digits of the powers leave a few ranks of play."""
    found = find(load(ROOT / "models" / "vgg_16" / "deploy.prototxt"))
    published = {
        "conv1_2": 11, "conv2_1": 25, "conv2_2": 28, "conv3_1": 52, "conv3_2": 46, "conv3_3": 56, "conv4_1": 104,
        "conv4_2": 92, "conv4_3": 100, "conv5_1": 232, "conv5_2": 224, "conv5_3": 214,
    }  # fmt: skip
    targets = [found.targets[name] for name in published]
    before = sum(target.macs for target in targets)
    after = sum(target.chain_cost(PCA, published[target.name]) for target in targets)
    chosen = plans.by_macs(targets, [PCA], Losses(None, "vgg_16"), before / after)
    ranks = {
        target.name: cast(tuple[str, tuple[int]], one.key)[1][0]
        for target, one in zip(targets, chosen, strict=True)
    }
    for name, rank in published.items():
        assert ranks[name] == pytest.approx(rank, rel=0.06, abs=1)


@pytest.mark.parametrize("real", [False, True])
def test_both_splits_of_asymmetric_3d_lose(real: bool) -> None:
    losses = Losses(Spectra(FOUND) if real else None, "small")
    target = FOUND.targets["conv3"]
    inner, outer = losses.curve(target, SPATIAL), losses.curve(target, PCA)
    assert losses(target, ASYMMETRIC_3D, (6, 9)) == pytest.approx(inner[5] + outer[8])
    assert losses(target, ASYMMETRIC_3D, (6, 20)) == pytest.approx(inner[5])  # a full second split is none
    for option in plans.mac_options(target, [ASYMMETRIC_3D], losses)[1:]:
        ranks = cast(tuple[str, tuple[int, int]], option.key)[1]
        assert option.loss == pytest.approx(losses(target, ASYMMETRIC_3D, ranks))
        assert option.cost == target.chain_cost(ASYMMETRIC_3D, *ranks)


def test_ranks_of_groups_are_those_of_a_group() -> None:
    target = FOUND.targets["conv2"]  # two groups
    losses = Losses(None, "small")
    assert losses(target, PCA, (10,)) == losses.curve(target, PCA)[4]
    assert all(rank % 2 == 0 for (rank,) in grid(target, PCA, 4))


def test_the_grid_is_every_multiple_that_is_cheaper_and_a_few_others() -> None:
    source = nets.inputs(data=(1, 64, 8, 8)) + (
        'layer { name: "c" type: "Convolution" bottom: "data" top: "c" '
        "convolution_param { num_output: 64 kernel_size: 3 pad: 1 } }\n"
    )
    target = find(Model(parse(source))).targets["c"]
    # rank k takes 64 * 9 + 64 of the 64 * 64 * 9 MACs: cheaper up to 57
    assert grid(target, PCA, 4) == [
        (rank,) for rank in sorted({*range(4, 57, 4), 4 * 4 - 1, 4 * 8 - 1, 4 * 11 - 1})
    ]
    assert grid(target, PCA, 1) == [(rank,) for rank in range(1, 58)]


def test_the_fastest_choice_that_keeps_the_macs() -> None:
    """Against all choices of three layers of five options, and the bound holds."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        options = [
            [Option(100.0, 10.0, None)]
            + [
                Option(c, c / 10 * rng.uniform(0.9, 1.2), ("x", (i,)))
                for i, c in enumerate(rng.uniform(5, 95, 4))
            ]
            for _ in range(3)
        ]
        wanted = float(rng.uniform(40, 280))
        chosen, gap = fastest(options, wanted)
        assert sum(one.cost for one in chosen) >= wanted - 1e-9
        best = min(
            plans.total(some)
            for some in itertools.product(*options)
            if sum(one.cost for one in some) >= wanted
        )
        assert best - 1e-9 <= plans.total(chosen)
        assert plans.total(chosen) / (1 + gap) <= best + 1e-9
        for one, layer in zip(chosen, options, strict=True):
            assert one in layer


def test_the_plan_by_time_has_the_macs_asked_for() -> None:
    """Time grows with the rank here: of the plans within a time that with half the MACs is found."""
    losses = Losses(None, "small")
    options = [
        [
            Option(one.cost**0.7, one.loss, one.key)
            for one in plans.mac_options(target, [PCA, SPATIAL], losses)
        ]
        for target in CONVOLUTIONS
    ]
    found = efficiency.by_time(CONVOLUTIONS, options, 2.0)
    fewer = plans.fewer(CONVOLUTIONS, plans.chains(CONVOLUTIONS, found))
    assert fewer == pytest.approx(2.0, rel=0.05)
    macs = sum(map(plans.macs, CONVOLUTIONS, found))
    assert macs == pytest.approx(sum(target.macs for target in CONVOLUTIONS) / fewer)


def test_the_least_time_within_a_loss() -> None:
    options = [
        [Option(5.0, 0.0, None), Option(2.0, 1.0, "a")],
        [Option(4.0, 0.0, None), Option(1.0, 3.0, "b")],
    ]
    assert [one.key for one in policy.allocate(plans.turned(options), 1.0)] == ["a", None]


ROW = Row(
    "here", "net", 1, 2.0, "best", 2.0, 1.9, (1.7, 1.8, 1.9), (1.0, 1.0, 1.0), 0.0, 9, 0.5, "conv1 pca 8"
)


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read(path) == []
    path.write_text(json.dumps(asdict(ROW)) + "\n")
    assert read(path) == [ROW]
    assert "1.80 x faster" in ROW.line() and "efficiency 90.0%" in ROW.line()
    assert quartiles(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == (2.0, 3.0, 4.0)


def test_every_row_of_schemes_suits_its_layers() -> None:
    for row in plans.SETS:
        schemes = plans.named(row)
        assert [one.name for one in schemes] == list(plans.SETS[row])
    flat = find(load(ROOT / "models" / "squeezenet_v1.1" / "deploy.prototxt")).targets["fire2/squeeze1x1"]
    assert plans.suited(flat, plans.named("auto")) == [PCA]
    assert plans.suited(flat, plans.named("asymmetric-3d")) == []
    assert plans.offered(flat, plans.named("auto")) == [PCA]
    names = [one.name for one in plans.offered(FOUND.targets["conv3"], plans.named("auto"))]
    assert names == ["pca", "spatial", "spatial-hv"]
    assert plans.offered(FOUND.targets["conv3"], [PCA]) == [PCA]


def test_published_ranks_are_those_of_the_layers() -> None:
    """The published ranks that the benchmark sets times beside can be had."""
    targets = find(load(ROOT / "models" / "alexnet" / "deploy.prototxt")).targets
    for name, rank in latency_plans.ICCV_RANKS.items():
        target = targets[name]
        fewer = target.macs / target.chain_cost(PCA, rank)
        assert fewer == pytest.approx(latency_plans.ICCV[name][0], abs=0.03)


def test_outputs_beyond_the_inputs_of_a_layer_are_mixtures() -> None:
    """Of 16 filters of 3 x 3 on one channel 9 are enough: the second split loses nothing from there on."""
    source = nets.inputs(data=(1, 1, 8, 8)) + (
        'layer { name: "c" type: "Convolution" bottom: "data" top: "c" '
        "convolution_param { num_output: 16 kernel_size: 3 pad: 1 } }\n"
    )
    outer = Losses(None).outer(find(Model(parse(source))).targets["c"])
    assert len(outer) == 16 and (outer[:8] > 0).all() and (outer[8:] == 0).all()
