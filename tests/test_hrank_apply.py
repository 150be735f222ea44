"""Pruned nets: what is left computes what the masked net of full size does; texts, files, siblings, errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import nets
import numpy as np
import pruning
import pytest
from helpers import shared_files

import caffe_proto as cp
from caffe_proto import net
from caffe_proto.errors import PlanError, UnsupportedError, UsageError, WeightsError
from caffe_proto.model import Model
from caffe_proto.weights import NewEntry, Weights
from hrank import coupling
from hrank.applier import apply
from hrank.coupling import removed_places
from hrank.plan import Plan, PruneEntry

MODELS = Path(__file__).resolve().parents[1] / "models"
SMALLER = {
    "vgg_16": ("224", "64"),
    "alexnet": ("227", "99"),
    "caffenet": ("227", "99"),
}  # images, to save time
ZOO = sorted(path for path in MODELS.glob("*/*.prototxt") if path.stem in ("deploy", "lenet"))
FOREIGN = [
    path
    for path in shared_files("data/models", "*.prototxt")
    if not re.search("train|solver|pruning|waifu2x_caffe/(?!up)", str(path)) and path.name != "mnet.prototxt"
]

CHAIN = """\
name: "chain"  # kept
input: "data"
input_shape { dim: 1 dim: 3 dim: 9 dim: 9 }
layer {
  name: 'a'
  type:"Convolution"
  bottom: "data" top: "a"
  convolution_param {
    num_output:6   # filters
    kernel_size: 3
    bias_term: true
  }
}
layer { name: "a/bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "a/scale" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "a/relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "dw" type: "Convolution" bottom: "a" top: "dw" convolution_param { num_output: 6, group: 6; kernel_size: 3 } }
layer { name: "cut" type: "Slice" bottom: "dw" top: "left" top: "right" }
layer { name: "left/shape" type: "Reshape" bottom: "left" top: "flat" reshape_param { shape { dim: 0 dim: 3 dim: 25 } } }
layer { name: "l" type: "InnerProduct" bottom: "flat" top: "l" inner_product_param { num_output: 4 } }
layer { name: "r" type: "InnerProduct" bottom: "right" top: "r" inner_product_param { num_output: 4 transpose: true } }
layer { name: "out" type: "Eltwise" bottom: "l" bottom: "r" top: "out" }
"""


def plan(**keep: list[int]) -> Plan:
    """A plan by hand."""
    return Plan({name.replace("__", "/"): PruneEntry(tuple(channels)) for name, channels in keep.items()})


# Oracle: real nets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*ZOO, *FOREIGN], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_pruned_net_computes_what_the_masked_one_does(path: Path) -> None:
    source = path.read_text()
    if path.parent.name in SMALLER:
        source = source.replace(*SMALLER[path.parent.name])
    full = pruning.model(source)
    found, report = pruning.check_pruned_is_masked(full, seed=len(source))
    assert report.macs[1] < report.macs[0]
    assert report.params[1] < report.params[0]
    assert report.macs[0] == cp.cost(full).macs
    again = Plan.from_json(found.to_json())
    assert apply(again, full)[0].net.text == apply(found, full)[0].net.text


def test_there_are_nets_to_prune() -> None:
    assert len(ZOO) == 18


@pytest.mark.parametrize("seed", range(20))
def test_random_choices(seed: int) -> None:
    pruning.check_pruned_is_masked(pruning.model(CHAIN, seed), seed)


# By hand ----------------------------------------------------------------------------------------------------------


def test_the_text_changes_in_its_numbers_only() -> None:
    changed, _ = apply(plan(a=[0, 2, 3, 5]), Model(net.parse(CHAIN)))
    expected = (
        CHAIN.replace("num_output:6 ", "num_output:4 ")
        .replace("num_output: 6, group: 6;", "num_output: 4, group: 4;")
        .replace('top: "right" }', 'top: "right" slice_param { slice_point: 2 } }')
        .replace("dim: 0 dim: 3 dim: 25", "dim: 0 dim: 2 dim: 25")
    )
    assert changed.net.text == expected


def test_the_numbers_that_stay() -> None:
    full = pruning.model(CHAIN)
    changed, report = apply(plan(a=[0, 2, 3, 5]), full)
    old, new, stay = nets.stored(full), nets.stored(changed), [0, 2, 3, 5]
    assert {name: [blob.shape for blob in blobs] for name, blobs in new.items()} == {
        "a": [(4, 3, 3, 3), (4,)],
        "a/bn": [(4,), (4,), (1,)],
        "a/scale": [(4,), (4,)],
        "dw": [(4, 1, 3, 3), (4,)],
        "l": [(4, 50), (4,)],
        "r": [(50, 4), (4,)],
    }
    for name in ("a", "a/bn", "a/scale", "dw"):
        for was, now in zip(old[name], new[name], strict=True):
            assert (now == (was[stay] if was.size > 1 else was)).all()
    columns = np.arange(150).reshape(6, 25)
    assert (new["l"][0] == old["l"][0][:, columns[[0, 2]].ravel()]).all()  # 0 and 2 of the left three
    assert (new["r"][0] == old["r"][0][columns[[0, 2]].ravel()]).all()  # 3 and 5: 0 and 2 of the right three
    rows = {row.name: row for row in report.rows}
    assert rows["a"].channels == (6, 4)
    assert rows["a"].macs == (6 * 27 * 49, 4 * 27 * 49)
    assert rows["r"].channels == (4, 4)
    assert rows["a/bn"].channels is None
    assert list(rows) == ["a", "a/bn", "a/scale", "dw", "cut", "left/shape", "l", "r"]


def test_masks_are_zeros_and_nothing_else() -> None:
    full = pruning.model(CHAIN)
    changed, report = apply(plan(a=[0, 2, 3, 5]), full, mask_only=True)
    assert changed.net.text == CHAIN
    assert report.macs[0] == report.macs[1]
    old, new, gone = nets.stored(full), nets.stored(changed), [1, 4]
    for name, blobs in {"a": (0, 1), "a/bn": (0,), "a/scale": (0, 1), "dw": (0, 1)}.items():
        for blob, (was, now) in enumerate(zip(old[name], new[name], strict=True)):
            wanted = was.copy()
            if blob in blobs:
                wanted[gone] = 0
            assert (now == wanted).all(), name
    left = old["l"][0].copy()
    left[:, 25:50] = 0
    assert (new["l"][0] == left).all()
    made = pruning.run(changed, nets.random_feeds(full))
    assert (made["dw"][:, gone] == 0).all()
    assert (np.abs(made["dw"][:, [0, 2, 3, 5]]).max((0, 2, 3)) > 0).all()


SUM = nets.inputs(data=(2, 3, 6, 6)) + (
    'layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 4 kernel_size: 1 } }\n'
    'layer { name: "b" type: "Convolution" bottom: "data" top: "b" convolution_param { num_output: 4 kernel_size: 1 } }\n'
    'layer { name: "sum" type: "Eltwise" bottom: "a" bottom: "b" top: "sum" }\n'
    'layer { name: "scale" type: "Scale" bottom: "sum" top: "scale" scale_param { bias_term: true } }\n'
    'layer { name: "c" type: "Convolution" bottom: "scale" top: "c" convolution_param { num_output: 2 kernel_size: 1 } }\n'
)


def test_terms_of_a_sum_may_have_masks_of_their_own() -> None:
    """a loses 0 and 1, b 1 and 2: behind the sum only 1 is zero."""
    full = pruning.model(SUM)
    one = plan(a=[2, 3], b=[0, 3])
    masked, _ = apply(one, full, mask_only=True)
    feeds = nets.random_feeds(full)
    was, now = pruning.run(full, feeds), pruning.run(masked, feeds)
    assert (now["sum"][:, 0] == was["b"][:, 0]).all()
    assert (now["sum"][:, 2] == was["a"][:, 2]).all()
    assert (now["sum"][:, 3] == was["sum"][:, 3]).all()
    assert (now["scale"][:, 1] == 0).all()
    assert nets.stored(masked)["scale"][1].tolist()[0] == nets.stored(full)["scale"][1].tolist()[0]
    with pytest.raises(PlanError, match="must go with one that"):
        apply(one, full)


def test_masked_channels_may_be_ones_that_cannot_be_removed() -> None:
    masked, report = apply(plan(c=[1]), pruning.model(SUM), mask_only=True)
    assert (pruning.run(masked, nets.random_feeds(masked))["c"][:, 0] == 0).all()
    assert [(row.name, row.channels) for row in report.rows] == [("c", (2, 1))]


GROUPS = nets.inputs(data=(1, 4, 5, 5)) + (
    'layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 6 kernel_size: 1 } }\n'
    'layer { name: "%s" type: "%s" bottom: "a" top: "g" convolution_param { num_output: 4 group: 2 kernel_size: 1 } }\n'
    'layer { name: "c" type: "Convolution" bottom: "g" top: "c" convolution_param { num_output: 2 kernel_size: 1 } }\n'
)


def test_groups_keep_channels_of_their_own() -> None:
    full = pruning.model(GROUPS % ("g", "Convolution"))
    changed, _ = apply(plan(a=[0, 2, 4, 5], g=[1, 2]), full)
    weight = nets.stored(full)["g"][0]
    wanted = np.stack([weight[1][[0, 2]], weight[2][[1, 2]]])
    assert (nets.stored(changed)["g"][0] == wanted).all()
    assert "num_output: 2 group: 2" in changed.net.text


def test_groups_of_a_deconvolution() -> None:
    full = pruning.model(GROUPS % ("g", "Deconvolution"))
    changed, _ = apply(plan(a=[0, 2, 4, 5], g=[1, 2]), full)
    weight = nets.stored(full)["g"][0]  # (6, 2): inputs by outputs of their group
    wanted = np.concatenate([weight[[0, 2]][:, [1]], weight[[4, 5]][:, [0]]])
    assert (nets.stored(changed)["g"][0] == wanted).all()


def test_an_empty_plan_changes_nothing() -> None:
    full = pruning.model(CHAIN)
    changed, report = apply(plan(), full)
    assert changed is full
    assert report.rows == ()


def test_without_weights_the_structure_changes() -> None:
    one = plan(a=[0, 1, 3, 4], l=[0])
    with pytest.raises(PlanError, match='layer "l": must keep all its channels'):
        apply(one, Model(net.parse(CHAIN)))
    changed, _ = apply(plan(a=[0, 1, 3, 4]), Model(net.parse(CHAIN)))
    assert changed.weights is None
    assert changed.net.text == apply(plan(a=[0, 1, 3, 4]), pruning.model(CHAIN))[0].net.text


def test_channels_of_the_plan_that_are_not_there() -> None:
    with pytest.raises(PlanError, match='layer "a": has 6 output channels, the plan was made for 8'):
        apply(Plan({"a": PruneEntry((0, 1), 8)}), pruning.model(CHAIN))
    with pytest.raises(PlanError, match=r'layer "b": is no layer with filters of this net; known'):
        apply(plan(b=[0]), pruning.model(CHAIN))
    with pytest.raises(PlanError, match='layer "a/bn": is no layer with filters'):
        apply(plan(a__bn=[0]), pruning.model(CHAIN))


def test_masks_need_weights() -> None:
    with pytest.raises(UsageError, match="masks stand in the weights"):
        apply(plan(a=[0]), Model(net.parse(CHAIN)), mask_only=True)


def test_weights_of_another_net_are_refused() -> None:
    full = pruning.model(CHAIN)
    wrong = Weights(
        [NewEntry(name, tuple(b[:1] for b in blobs)) for name, blobs in nets.stored(full).items()]
    )
    with pytest.raises(WeightsError):
        apply(plan(a=[0, 3]), Model(full.net, wrong))


# Files ------------------------------------------------------------------------------------------------------------


def files(folder: Path, suffix: str) -> tuple[str, str]:
    """The chain with its weights, as files."""
    made = str(folder / "chain.prototxt"), str(folder / f"chain{suffix}")
    cp.save(pruning.model(CHAIN), *made)
    return made


@pytest.mark.parametrize("suffix", [".caffemodel", ".caffemodel.h5"])
def test_written_and_read_again(tmp_path: Path, suffix: str) -> None:
    made = cp.load(*files(tmp_path, suffix))
    found = coupling.find(made)
    written = Plan.of(found, found.choose({0: 4}))
    assert written.net == made.fingerprint[0]
    assert Plan.from_json(written.to_json()) == written
    changed, _ = apply(Plan.from_json(written.to_json()), made)
    out = str(tmp_path / "out.prototxt"), str(tmp_path / f"out{suffix}")
    cp.save(changed, *out)
    again = cp.load(*out)
    feeds = nets.random_feeds(again)
    assert nets.apart(nets.forward(changed, feeds), nets.forward(again, feeds)) == 0
    with pytest.raises(PlanError, match="another net file"):
        apply(written, again)


def test_the_embedded_definition_is_that_of_the_pruned_layer(tmp_path: Path) -> None:
    made = cp.load(*files(tmp_path, ".caffemodel"))
    changed, _ = apply(plan(a=[0, 3, 4, 5]), made)
    cp.save(changed, tmp_path / "out.prototxt", tmp_path / "out.caffemodel")
    layers = nets.embedded(tmp_path / "out.caffemodel")
    assert layers["a"].convolution_param.num_output == 4
    assert layers["dw"].convolution_param.group == 4
    assert layers["a/scale"].scale_param.bias_term
    assert layers["a/bn"].type == "BatchNorm"
    assert list(layers["l"].bottom) == ["flat"]


OLD = """\
input: "data"
input_dim: 1 input_dim: 3 input_dim: 7 input_dim: 7
layers { name: "a" type: CONVOLUTION bottom: "data" top: "a" blobs_lr: 1 blobs_lr: 2
  convolution_param { num_output: 6 kernel_size: 3 } }
layers { name: "r" type: RELU bottom: "a" top: "a" }
layers { name: "ip" type: INNER_PRODUCT bottom: "a" top: "ip" inner_product_param { num_output: 3 } }
"""
OLDEST = """\
input: "data"
input_dim: 1 input_dim: 3 input_dim: 7 input_dim: 7
layers { layer { name: "a" type: "conv" num_output: 6 kernelsize: 3 } bottom: "data" top: "a" }
layers { layer { name: "ip" type: "innerproduct" num_output: 3 } bottom: "a" top: "ip" }
"""


@pytest.mark.parametrize("source", [OLD, OLDEST], ids=["V1", "V0"])
def test_older_dialects(tmp_path: Path, source: str) -> None:
    made = nets.model(source)
    pruning.check_pruned_is_masked(made)
    changed, _ = apply(plan(a=[1, 5]), made)
    cp.save(changed, tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    again = cp.load(tmp_path / "n.prototxt", tmp_path / "n.caffemodel")
    assert nets.stored(again)["a"][0].shape == (2, 3, 3, 3)
    assert (nets.stored(again)["ip"][0] == nets.stored(changed)["ip"][0]).all()
    if source is OLD:
        assert changed.net.text == OLD.replace("num_output: 6", "num_output: 2")


# Siblings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["cifar10_quick", "resnet_20", "googlenet", "densenet_40"])
def test_a_train_val_from_the_plan_of_its_deploy(folder: str) -> None:
    """The data layer of cifar10_quick says no size: that of the plan counts."""
    small = cp.load(MODELS / folder / "deploy.prototxt")
    sibling = cp.load(MODELS / folder / "train_val.prototxt")
    found = coupling.find(small)
    counts = {group.index: group.channels // 2 for group in found.groups if not group.frozen}
    written = Plan.from_json(Plan.of(found, found.choose(counts)).to_json())
    changed = apply(written, sibling, sibling=True)[0]
    deploy = apply(written, small)[0]
    wanted = dict(outputs(deploy.net))
    assert {name: size for name, size in outputs(changed.net) if name in wanted} == wanted
    shapes = {"data": (2, *written.inputs["data"][1:]), "label": (2,)}
    for phase in ("TRAIN", "TEST"):  # the side classifiers of GoogLeNet read what is left too
        assert cp.shapes(changed.in_state(net.NetState(phase)), shapes)


def outputs(one: net.Net) -> Iterator[tuple[str, str]]:
    """num_output of every layer that has one."""
    for layer in one.all_layers:
        for block in ("convolution_param", "inner_product_param"):
            for message in layer.message.messages(block):
                yield layer.name, message.string("num_output")


PHASES = nets.inputs(data=(2, 3, 6, 6)) + (
    'layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 4 kernel_size: 1 } }\n'
    'layer { name: "ip" type: "InnerProduct" bottom: "a" top: "ip" inner_product_param { num_output: 2 } }\n'
    'layer { name: "side" type: "%s" bottom: "a" top: "side" include { phase: TRAIN } '
    "inner_product_param { num_output: 3 } }\n"
)


def test_layers_of_the_other_phase_are_narrowed_too() -> None:
    source = PHASES % "InnerProduct"
    both = pruning.weights(net.parse(source, state=net.NetState("TRAIN")))
    changed, _ = apply(plan(a=[0, 3]), Model(net.parse(source), both))
    columns = np.r_[0:36, 108:144]
    assert (nets.stored(changed)["side"][0] == both["side"][0][:, columns]).all()


def test_what_the_other_phase_does_with_channels_must_be_known() -> None:
    with pytest.raises(PlanError, match='Mystery "side" reads them'):
        apply(plan(a=[0, 3]), Model(net.parse(PHASES % "Mystery")))
    shapeless = PHASES.replace('type: "Input"', 'type: "Python"') % "InnerProduct"
    test_only = shapeless.replace('top: "data"', 'top: "data" include { phase: TRAIN }', 1)
    with pytest.raises(UnsupportedError, match='layer "side": exists in phase TRAIN only'):
        apply(
            plan(a=[0, 3]),
            Model(
                net.parse(
                    nets.inputs(data=(2, 3, 6, 6)).replace(
                        'top: "data"', 'top: "data" include { phase: TEST }'
                    )
                    + test_only
                )
            ),
        )


# Plans ------------------------------------------------------------------------------------------------------------


def test_one_layer_a_line() -> None:
    found = coupling.find(pruning.model(CHAIN))
    lines = (
        Plan.of(found, {"a": [0, 1, 3, 4], "dw": [0, 1, 3, 4]}, target={"rates": "[0.4]"})
        .to_json()
        .splitlines()
    )
    assert '  "a": {"of": 6, "keep": [0, 1, 3, 4]},' in lines
    assert '  "dw": {"of": 6, "keep": [0, 1, 3, 4]}' in lines
    assert ' "target": {"rates": "[0.4]", "inputs": {"data": [1, 3, 9, 9]}},' in lines


def test_layers_that_keep_all_are_not_in_a_plan() -> None:
    found = coupling.find(pruning.model(CHAIN))
    assert Plan.of(found, {"a": range(6)}).layers == {}
    with pytest.raises(PlanError, match="no filters"):
        Plan.of(found, {"cut": [0]})


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("7", "a list of channels is needed"),
        ("[]", "a list of channels is needed"),
        ("[0, -1]", "a list of channels is needed"),
        ("[0, true]", "a list of channels is needed"),
        ("[0, 0]", "must rise"),
        ("[1, 0]", "must rise"),
        ('{"keep": [0, 5], "of": 5}', "a number above 5 is needed"),
        ('{"keep": [0], "rank": 3}', 'unknown key "rank"'),
    ],
)
def test_entries_that_are_none(entry: str, what: str) -> None:
    with pytest.raises(PlanError, match=what) as caught:
        Plan.from_json(f'{{"a": {entry}}}', "p.json")
    assert 'p.json: layer "a": ' in str(caught.value)


def test_the_short_form() -> None:
    assert Plan.from_json('{"a": [0, 2]}').layers == {"a": PruneEntry((0, 2))}


@pytest.mark.parametrize("inputs", [[1], {"data": 3}, {"data": [1, -3]}])
def test_inputs_that_are_none(inputs: object) -> None:
    with pytest.raises(PlanError, match='"inputs" must give the shape'):
        Plan.from_json(json.dumps({"layers": {}, "target": {"inputs": inputs}}))


def test_plans_are_compared() -> None:
    one, other = plan(a=[0, 1], b=[0]), plan(a=[0, 2], b=[0])
    assert one.diff(other) == {"a": ({"keep": [0, 1]}, {"keep": [0, 2]})}


def test_ids_that_never_go_are_in_no_array() -> None:
    assert removed_places(np.zeros(0, bool), np.array([-1, -1])).tolist() == [False, False]
