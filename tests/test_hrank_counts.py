"""Rates and counts: every published row that the authors' code explains, to the last printed digit; and searches.

Strings and printed figures: the READMEs of HRank and HRankPlus, and for some rows of HRankPlus the channels that CHIP
(Sui et al., NeurIPS 2021) uses with the same code. FLOPs and parameters are in millions.
"""

from __future__ import annotations

import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pruning
import pytest
from helpers import SHARED, needs_shared
from nets import inputs

import caffe_proto as cp
from caffe_proto import net
from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from hrank import counts, coupling, criteria, rates
from hrank.applier import apply
from hrank.coupling import Coupling
from hrank.plan import Plan

MODELS = Path(__file__).resolve().parents[1] / "models"

VGG = "[0.95]+[0.5]*6+[0.9]*4+[0.8]*2"
RESNET_56 = "[0.1]+[0.60]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]"
RESNET_110 = "[0.1]+[0.40]*36+[0.40]*36+[0.4]*36"
DENSENET = "[0.0]+[0.1]*6+[0.7]*6+[0.0]+[0.1]*6+[0.7]*6+[0.0]+[0.1]*6+[0.7]*5+[0.0]"
GOOGLENET = "[0.10]+[0.8]*5+[0.85]+[0.8]*3"
RESNET_50 = "[0.2]+[0.8]*10+[0.8]*13+[0.55]*19+[0.45]*10"
STRINGS = {
    "vgg_16_bn": VGG,
    "resnet_56": RESNET_56,
    "resnet_110": RESNET_110,
    "densenet_40": DENSENET,
    "googlenet_cifar": GOOGLENET,
    "resnet_50_v1.5": RESNET_50,
}

HRANK = [  # net, string, FLOPs, parameters: printed, or where the print lost digits what the code gives
    ("resnet_56", "", "125.49", "0.85"),
    ("resnet_56", RESNET_56, "62.72", "0.49"),
    ("resnet_110", "", "252.89", "1.72"),
    ("resnet_110", RESNET_110, "156.88", "1.05"),
    ("densenet_40", "", "282.92", "1.04"),
    ("densenet_40", DENSENET, "167.41", "0.66"),
    ("googlenet_cifar", "", "1521.76", "6.15"),
    ("googlenet_cifar", GOOGLENET, "450.06", "1.86"),
    ("googlenet_cifar", "[0.10]+[0.7]+[0.5]+[0.8]*4+[0.5]+[0.6]*2", "686.02", "2.74"),
    ("resnet_50_v1.5", "", "4089.18", "25.50"),
    ("resnet_50_v1.5", RESNET_50, "1549.65", "13.77"),
    ("vgg_16_bn", "", "313.46", "14.98"),
    ("vgg_16_bn", VGG, "116.63", "4.81"),
]

HRANKPLUS = [  # as printed; parameters cut off, not rounded, where that is what the print did
    ("vgg_16_bn", "[0.21]*7+[0.75]*5", "131.17", "2.76"),
    ("vgg_16_bn", "[0.3]*7+[0.75]*5", "104.78", "2.50"),
    ("vgg_16_bn", "[0.45]*7+[0.78]*5", "66.95", "1.90"),
    ("resnet_56", "[0.]+[0.18]*29", "90.35", "0.66"),
    ("resnet_56", "[0.]+[0.15]*2+[0.4]*27", "65.94", "0.48"),
    ("resnet_56", "[0.]+[0.4]*2+[0.5]*9+[0.6]*9+[0.7]*9", "34.78", "0.24"),
    ("resnet_110", "[0.]+[0.2]*2+[0.3]*18+[0.35]*36", "140.54", "1.04"),
    ("resnet_110", "[0.]+[0.25]*2+[0.4]*18+[0.55]*36", "101.97", "0.71"),
    ("resnet_110", "[0.]+[0.4]*2+[0.5]*18+[0.65]*36", "71.69", "0.54"),
    ("googlenet_cifar", "[0.3]+[0.6]*2+[0.7]*5+[0.8]*2", "649.19", "2.85"),
    ("googlenet_cifar", "[0.4]+[0.85]*2+[0.9]*7", "395.42", "2.09"),
    ("densenet_40", "[0.]" + "+[0.25]*12+[0.]" * 2 + "+[0.25]*12", "173.39", "0.62"),
    ("densenet_40", "[0.]" + "+[0.3]*12+[0.1]" * 2 + "+[0.3]*12", "133.17", "0.45"),
    ("densenet_40", "[0.]" + "+[0.4]*12+[0.]" * 2 + "+[0.4]*12", "113.08", "0.39"),
    ("resnet_50_v1.5", "[0.]+[0.1]*3+[0.35]*16", "2258.93", "15.09"),
    ("resnet_50_v1.5", "[0.]+[0.25]*3+[0.5]*16", "1522.96", "11.04"),
    ("resnet_50_v1.5", "[0.]+[0.5]*3+[0.6]*16", "954.86", "8.01"),
]


def source(folder: str) -> str:
    """A deploy form."""
    return (MODELS / folder / "deploy.prototxt").read_text()


@cache
def found(folder: str) -> Coupling:
    return coupling.find(Model(net.parse(source(folder))))


def kept(folder: str, grammar: str, string: str, *, counted: bool = False) -> dict[str, int]:
    """Channels kept by layer, nothing for the empty string."""
    layout = rates.layout(found(folder), grammar)
    return layout.kept(rates.parse(string), counted=counted) if string else {}


# Published rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "string", "flops", "params"), HRANK)
def test_rows_of_hrank(folder: str, string: str, flops: str, params: str) -> None:
    layout = rates.layout(found(folder), "hrank")
    count = counts.hrank(
        found(folder), kept(folder, "hrank", string, counted=True), transitions=layout.transitions
    )
    assert f"{count.flops / 1e6:.2f}" == flops
    assert f"{count.params / 1e6:.2f}" == params


def test_googlenet_without_the_slip_of_the_counter() -> None:
    """The masks of 4c go by rate 0.8, the FLOPs by the 0.85 of 4d."""
    masked = kept("googlenet_cifar", "hrank", GOOGLENET)
    counted = kept("googlenet_cifar", "hrank", GOOGLENET, counted=True)
    parts = [f"inception_4c/{part}" for part in ("1x1", "3x3", "double3x3_1", "double3x3_2", "pool_proj")]
    assert [masked[part] for part in parts] == [26, 52, 13, 13, 13]
    assert [counted[part] for part in parts] == [20, 39, 10, 10, 10]
    assert {name: size for name, size in masked.items() if name not in parts} == {
        name: size for name, size in counted.items() if name not in parts
    }
    count = counts.hrank(found("googlenet_cifar"), masked)
    assert (f"{count.flops / 1e6:.1f}", f"{count.params / 1e6:.3f}") == ("455.7", "1.880")


@pytest.mark.parametrize(("folder", "string", "flops", "params"), HRANKPLUS)
def test_rows_of_hrankplus(folder: str, string: str, flops: str, params: str) -> None:
    count = counts.hrankplus(found(folder), kept(folder, "hrankplus", string))
    assert f"{count.flops / 1e6:.2f}" == flops
    assert f"{count.params // 10_000 / 100:.2f}" == params


@pytest.mark.parametrize(
    ("folder", "grammar", "string", "layers", "sizes"),
    [
        ("vgg_16_bn", "hrank", VGG, r"conv.*", [4, 32, 64, 64, 128, 128, 128, 52, 52, 52, 52, 103]),
        (
            "resnet_56", "hrank", RESNET_56, r".*conv.*",
            [15] + [7] * 18 + [13] * 17 + [32, 64] + [26] * 6 + [39] * 3 + [58, 39] * 4,
        ),
        ("resnet_110", "hrank", RESNET_110, r".*conv.*", [15] + [10] * 36 + [20] * 36 + [39] * 36),
        (
            "densenet_40", "hrank", DENSENET, r".*conv.*",
            [24] + [11] * 6 + [4] * 6 + [168] + [11] * 6 + [4] * 6 + [312] + [11] * 6 + [4] * 5 + [12],
        ),
        ("googlenet_cifar", "hrank", GOOGLENET, r"inception_[45][ab]/1x1", [39, 32, 52, 77]),
        ("googlenet_cifar", "hrank", GOOGLENET, r"inception_4d/.*", [17, 44, 10, 10, 10]),
        ("resnet_50_v1.5", "hrank", RESNET_50, r"(conv1|res[25]._branch.*)", [52] + [52, 13, 13, 52] + [13, 13, 52] * 2
         + [1127, 282, 282, 1127] + [282, 282, 1127] * 2),
        ("vgg_16_bn", "hrankplus", "[0.21]*7+[0.75]*5", r"conv.*", [50, 50, 101, 101, 202, 202, 202] + [128] * 5),
        ("resnet_56", "hrankplus", "[0.]+[0.15]*2+[0.4]*27", r".*_1_conv.*", [9, 13, 19, 27, 38]),
        ("resnet_110", "hrankplus", "[0.]+[0.2]*2+[0.3]*18+[0.35]*36", r".*_1_conv.*", [11, 12, 20, 25, 41]),
        ("resnet_50_v1.5", "hrankplus", "[0.]+[0.1]*3+[0.35]*16", r"(conv1|res[25]a_branch.*)", [64, 230, 41, 41, 230, 332, 332]),
        ("densenet_40", "hrankplus", "[0.]" + "+[0.3]*12+[0.1]" * 2 + "+[0.3]*12", r"trans.*", [108, 173]),
    ],
)  # fmt: skip
def test_channels_that_stay(folder: str, grammar: str, string: str, layers: str, sizes: list[int]) -> None:
    """Inputs of the two transitions of DenseNet-40 at 8 filters a layer: 24 + 96 = 120, and 108 + 96 = 204 - 11."""
    sizes_found = [size for name, size in kept(folder, grammar, string).items() if re.fullmatch(layers, name)]
    if folder == "densenet_40" and grammar == "hrankplus":
        assert sizes_found == [int(120 * 0.9), int((108 + 96) * 0.9)]
    else:
        assert sizes_found == sizes


@needs_shared
@pytest.mark.parametrize(
    ("folder", "published", "crc"),
    [
        ("vgg_16_bn", "vgg_16_bn", 0x2D60ADB5),
        ("resnet_56", "resnet_56", 0xECD613D1),
        ("resnet_110", "resnet_110", 0xD0566C88),
        ("densenet_40", "densenet_40", 0x8C06EADD),
        ("googlenet_cifar", "googlenet", 0x2F2A17E9),
        ("resnet_50_v1.5", "resnet_50", 0x6098D5DE),
    ],
)
def test_filters_chosen_from_the_published_ranks(folder: str, published: str, crc: int) -> None:
    """The lists of kept filters of all rank files, as one checksum made without this program."""
    given = rates.parse(STRINGS[folder])
    lines = []
    for path in sorted((SHARED / "data" / "hrank_ranks" / published).rglob("*.npy"), key=_number):
        ranks = np.load(path)
        stay = rates.keep_count(len(ranks), given[_number(path)[0] - 1])
        chosen = criteria.kept(ranks, len(ranks) - stay)
        lines.append(f"{path.stem}:{','.join(map(str, chosen))}\n")
    assert zlib.crc32("".join(lines).encode()) == crc


def _number(path: Path) -> tuple[int, str]:
    parts = re.fullmatch(r"rank_conv(\d+)(.*)", path.stem)
    assert parts
    return int(parts[1]), path.stem


# What a pruned net really costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", ["vgg_16_bn", "resnet_56", "googlenet_cifar", "mobilenet_v1", "alexnet", "resnet_20"]
)
def test_true_counts_are_those_of_the_pruned_net(folder: str) -> None:
    for seed in range(3):
        plan = pruning.random_plan(found(folder), seed)
        changed, report = apply(plan, found(folder).model)
        cost = cp.cost(changed)
        assert counts.true(found(folder), plan.keep) == counts.Count(cost.macs, cost.params)
        assert (report.macs[1], report.params[1]) == (cost.macs, cost.params)


def test_shared_weights_are_counted_once() -> None:
    twins = inputs(left=(1, 3, 5, 5), right=(1, 3, 6, 6)) + "".join(
        f'layer {{ name: "{side}{i}" type: "Convolution" bottom: "{bottom}" top: "{side}{i}" '
        f'param {{ name: "w{i}" }} param {{ name: "b{i}" }} '
        f"convolution_param {{ num_output: 8 kernel_size: 1 }} }}\n"
        for side in ("left", "right")
        for i, bottom in ((1, side), (2, f"{side}1"))
    )
    both = coupling.find(Model(net.parse(twins)))
    keep = {"left1": range(3), "right1": range(3)}
    cost = cp.cost(apply(Plan.of(both, keep), both.model)[0])
    assert counts.true(both, keep) == counts.Count(cost.macs, cost.params)
    assert cost.params == 3 * 3 + 3 + 8 * 3 + 8


@pytest.mark.parametrize(
    ("folder", "macs", "params"),
    [
        ("vgg_16_bn", "43.23", "1.354"),
        ("densenet_40", "157.65", "0.657"),
        ("googlenet_cifar", "242.99", "0.880"),
    ],
)
def test_what_the_published_rates_would_really_save(folder: str, macs: str, params: str) -> None:
    """Nets without sums, pruned for good: far below what the authors count. Parameters are the learnt ones."""
    sizes = kept(folder, "hrank", STRINGS[folder], counted=True)
    keep = {name: range(size) for name, size in sizes.items()}
    changed, _ = apply(Plan.of(found(folder), keep), found(folder).model)
    cost = cp.cost(changed)
    learnt = sum(row.params for row in cost.layers if row.type != "BatchNorm")
    assert (f"{cost.macs / 1e6:.2f}", f"{learnt / 1e6:.3f}") == (macs, params)


@pytest.mark.parametrize(
    ("folder", "macs", "params"),
    [("resnet_56", "65.07", "0.545"), ("resnet_110", "156.91", "1.061")],
)
def test_what_they_would_save_inside_the_blocks(folder: str, macs: str, params: str) -> None:
    layout = rates.layout(found(folder), "hrank")
    by_layer = layout.by_layer(rates.parse(STRINGS[folder]))
    by_group, kept_layers = rates.group_rates(found(folder), by_layer)
    sizes = rates.group_counts(found(folder), by_group)
    changed, _ = apply(Plan.of(found(folder), found(folder).choose(sizes)), found(folder).model)
    cost = cp.cost(changed)
    learnt = sum(row.params for row in cost.layers if row.type != "BatchNorm")
    digits = [len(text.partition(".")[2]) for text in (macs, params)]
    assert f"{cost.macs / 1e6:.{digits[0]}f}" == macs
    assert f"{learnt / 1e6:.{digits[1]}f}" == params
    assert all("keep the same" in reason for reason in kept_layers.values())


# Rate strings -----------------------------------------------------------------------------------------------------


def test_strings() -> None:
    assert rates.parse("[0.1]+[0.60]*3+[0.]") == (0.1, 0.6, 0.6, 0.6, 0.0)
    assert rates.parse(" [ .5 ] * 2 + [0] ") == (0.5, 0.5, 0.0)
    assert len(rates.parse(RESNET_56)) == 55


@pytest.mark.parametrize(
    ("string", "what"),
    [
        ("", "nothing stands at character 1"),
        ("[0.1]+", "nothing stands at character 7"),
        ("[0.1] [0.2]", r"'\[0.2\]' stands at character 7"),
        ("0.1", "'0.1' stands at character 1"),
        ("[-0.1]", "stands at character 1"),
        ("[__import__('os')]", "stands at character 1"),
        ("[1.0]", "rate 1 prunes everything"),
        ("[0.1]*999999", "more than 100,000 rates"),
        ("[0.1]*0.5", r"'\.5' stands at character 8"),
    ],
)
def test_strings_that_are_none(string: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        rates.parse(string)


def test_rounding_is_that_of_the_authors() -> None:
    """320 * (1 - 0.9) is 31.999... in floating point."""
    assert rates.keep_count(320, 0.9, "hrankplus") == 31
    assert rates.keep_count(320, 0.9, "hrank") == 32
    assert rates.keep_count(64, 0.95) == 4


def test_multiples_and_the_least() -> None:
    assert [rates.keep_count(64, rate, round_to=8) for rate in (0.0, 0.1, 0.5, 0.51, 0.99)] == [
        64,
        64,
        32,
        32,
        8,
    ]
    assert rates.keep_count(20, 0.1, round_to=8) == 20
    assert rates.keep_count(64, 0.99, least=5) == 5
    assert rates.keep_count(3, 0.9, "hrankplus") == 1


def test_the_number_of_rates_must_fit() -> None:
    layout = rates.layout(found("resnet_56"))
    with pytest.raises(UsageError, match=r"3 rates for 55 positions of this net \(ResNet of CIFAR, hrank\)"):
        layout.by_layer([0.1] * 3)
    with pytest.raises(UsageError, match='no rate grammar "x"; known: hrank, hrankplus'):
        rates.layout(found("resnet_56"), "x")


@pytest.mark.parametrize(
    ("folder", "name", "plain", "plus"),
    [
        ("vgg_16_bn", "VGG-16", 13, 12),
        ("resnet_56", "ResNet of CIFAR", 55, 30),
        ("resnet_110", "ResNet of CIFAR", 109, 57),
        ("densenet_40", "DenseNet", 39, 39),
        ("googlenet_cifar", "GoogLeNet of CIFAR", 10, 10),
        ("resnet_50", "ResNet with bottlenecks", 53, 20),
        ("resnet_50_v1.5", "ResNet with bottlenecks", 53, 20),
        ("resnet_20", "any net", 21, 21),
        ("googlenet", "any net", 57, 57),
        ("resnet_18", "any net", 20, 20),
        ("mobilenet_v1", "any net", 15, 15),
    ],
)
def test_nets_are_recognized(folder: str, name: str, plain: int, plus: int) -> None:
    layouts = [rates.layout(found(folder), grammar) for grammar in rates.GRAMMARS]
    assert [layout.net for layout in layouts] == [name] * 2
    assert [len(layout.positions) for layout in layouts] == [plain, plus]
    table = layouts[0].table([0.5] * plain)
    assert len({row[0] for row in table}) == plain
    assert all(len(row) == 6 for row in table)


def test_the_shortcut_stands_behind_the_branch_it_is_added_to() -> None:
    first = [position.layers[0] for position in rates.layout(found("resnet_50_v1.5")).positions[:8]]
    block = ["res2a_branch2a", "res2a_branch2b", "res2a_branch2c", "res2a_branch1"]
    assert first == ["conv1", *block, "res2b_branch2a", "res2b_branch2b", "res2b_branch2c"]


def test_the_table() -> None:
    rows = rates.layout(found("resnet_56"), "hrankplus").table([0.0] * 2 + [0.5] * 28)
    assert rows[0] == ("1", "-", "stem, which stays", "", "0", "")
    assert rows[1] == ("2", "res_grp1_1_conv2", "output of stage 1", "16", "0", "16")
    assert rows[-1] == ("30", "res_grp3_9_conv1", "inside a block", "64", "0.5", "32")


def test_rates_by_layer() -> None:
    assert rates.from_json('{"a": 0.5, "b": 0}') == {"a": 0.5, "b": 0.0}
    for wrong in ("1", "-0.1", '"x"', "true", "[0.5]"):
        with pytest.raises(PlanError, match=r'r.json: layer "a": .* is no rate'):
            rates.from_json(f'{{"a": {wrong}}}', "r.json")


# Groups and budgets -----------------------------------------------------------------------------------------------

TWO = (
    inputs(data=(1, 3, 8, 8))
    + "".join(
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" '
        f"convolution_param {{ num_output: {size} kernel_size: 1 }} }}\n"
        for name, bottom, size in (("a", "data", 8), ("b", "data", 8), ("c", "b", 8))
    )
    + (
        'layer { name: "sum" type: "Eltwise" bottom: "a" bottom: "c" top: "sum" }\n'
        'layer { name: "d" type: "Convolution" bottom: "sum" top: "d" convolution_param { num_output: 5 kernel_size: 1 } }\n'
    )
)


def test_groups_are_left_alone_unless_asked_for() -> None:
    two = coupling.find(Model(net.parse(TWO)))
    given = {"a": 0.5, "b": 0.25, "c": 0.5, "d": 0.5}
    by_group, left = rates.group_rates(two, given)
    assert {two.groups[index].members[0].layer: rate for index, rate in by_group.items()} == {"b": 0.25}
    assert left["a"] == left["c"] == "shares its channels: 2 layers, a to c, keep the same or none"
    assert left["d"] == 'they are the net\'s output "d"'
    by_group, left = rates.group_rates(two, given, coupled=True)
    assert {two.groups[index].members[0].layer: rate for index, rate in by_group.items()} == {
        "a": 0.5,
        "b": 0.25,
    }
    assert list(left) == ["d"]


def test_layers_of_a_group_want_one_rate() -> None:
    two = coupling.find(Model(net.parse(TWO)))
    with pytest.raises(PlanError, match=r'layer "c": has rate 0.25, and "a", .* has 0.5'):
        rates.group_rates(two, {"a": 0.5, "c": 0.25}, coupled=True)
    assert rates.group_rates(two, {"c": 0.25}, coupled=True)[0] == {0: 0.25}
    with pytest.raises(PlanError, match='layer "x": is no layer with filters'):
        rates.group_rates(two, {"x": 0.5})


def test_what_can_be_pruned() -> None:
    two = coupling.find(Model(net.parse(TWO)))
    assert rates.prunable(two) == ["b"]
    assert rates.prunable(two, coupled=True) == ["a", "b", "c"]


@pytest.mark.parametrize("budget", [{"speedup": 2.0}, {"params": 2.0}, {"speedup": 3.0, "params": 1.5}])
@pytest.mark.parametrize("round_to", [1, 8])
def test_budgets_hold_and_are_not_missed_by_far(budget: dict[str, float], round_to: int) -> None:
    """At the rate found the budget holds; at the next number of channels above it does not."""
    net_found = found("vgg_16_bn")
    layers = rates.prunable(net_found)
    rate = rates.for_budget(net_found, layers, **budget, round_to=round_to)

    def reached(rate: float) -> bool:
        by_group, _ = rates.group_rates(net_found, dict.fromkeys(layers, rate))
        sizes = rates.group_counts(net_found, by_group, round_to=round_to)
        _, report = apply(Plan.of(net_found, net_found.choose(sizes)), net_found.model)
        assert round_to == 1 or all(size % round_to == 0 for size in sizes.values())
        return report.macs[0] / report.macs[1] >= budget.get("speedup", 0) and report.params[
            0
        ] / report.params[1] >= budget.get("params", 0)

    assert reached(rate)
    assert not reached(rate - 1e-5)


def test_budgets_that_cannot_be_met() -> None:
    two = coupling.find(Model(net.parse(TWO)))
    with pytest.raises(UsageError, match="cannot be met by these layers, they reach"):
        rates.for_budget(two, ["b"], speedup=100)
    for wrong in ({}, {"speedup": 0.5}):
        with pytest.raises(UsageError, match="a factor of 1 or more"):
            rates.for_budget(two, ["b"], **wrong)
    assert rates.for_budget(two, ["b"], speedup=1) == 0
