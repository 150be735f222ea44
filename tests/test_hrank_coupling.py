"""Which channels go together: small nets whose groups are known, one for each way that layers treat channels."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pruning
import pytest
from nets import inputs

from caffe_proto import net
from caffe_proto.errors import PlanError
from caffe_proto.layers import LAYERS
from caffe_proto.model import Model
from hrank import coupling
from hrank.coupling import Coupling
from hrank.groups import Group


def layer(name: str, kind: str, bottoms: str, settings: str = "", tops: str = "") -> str:
    """One layer; blobs by their names, apart by spaces. The top is called as the layer."""
    ins = " ".join(f'bottom: "{one}"' for one in bottoms.split())
    outs = " ".join(f'top: "{one}"' for one in (tops or name).split())
    return f'layer {{ name: "{name}" type: "{kind}" {ins} {outs} {settings} }}\n'


def conv(name: str, bottom: str, count: int, more: str = "", kernel: int = 1, params: str = "") -> str:
    """A convolution, by default 1 x 1."""
    block = f"convolution_param {{ num_output: {count} kernel_size: {kernel} {more} }}"
    return layer(name, "Convolution", bottom, f"{params} {block}")


def dense(name: str, bottom: str, count: int, more: str = "") -> str:
    return layer(name, "InnerProduct", bottom, f"inner_product_param {{ num_output: {count} {more} }}")


DATA = inputs(data=(2, 3, 8, 8))
A, B = conv("a", "data", 8), conv("b", "data", 8)
END = dense("end", "last", 5)


def find(source: str) -> Coupling:
    return coupling.find(Model(net.parse(source)))


def group(source: str, member: str = "a") -> Group:
    return find(source).by_layer[member][0]


def members(found: Group) -> list[str]:
    return [one.layer for one in found.members]


def units(found: Group, member: str) -> list[int]:
    return next(one.units.tolist() for one in found.members if one.layer == member)


# What joins, and what does not ------------------------------------------------------------------------------------

PLAIN = {  # what may stand between conv a and its consumer without touching channels
    "nothing": layer("last", "Split", "a"),
    "ReLU": layer("last", "ReLU", "a"),
    "leaky ReLU": layer("last", "ReLU", "a", "relu_param { negative_slope: 0.1 }"),
    "PReLU": layer("last", "PReLU", "a"),
    "shared PReLU": layer("last", "PReLU", "a", "prelu_param { channel_shared: true }"),
    "ELU": layer("last", "ELU", "a"),
    "Sigmoid": layer("last", "Sigmoid", "a"),
    "Exp": layer("last", "Exp", "a", "exp_param { scale: 0.1 }"),
    "Power with a shift": layer("last", "Power", "a", "power_param { scale: 0.5 shift: 1 }"),
    "Dropout": layer("last", "Dropout", "a"),
    "Pooling": layer("last", "Pooling", "a", "pooling_param { pool: AVE kernel_size: 3 stride: 2 }"),
    "global Pooling": layer("last", "Pooling", "a", "pooling_param { global_pooling: true }"),
    "BatchNorm": layer("last", "BatchNorm", "a"),
    "batch statistics": layer("last", "BatchNorm", "a", "batch_norm_param { use_global_stats: false }"),
    "Scale": layer("last", "Scale", "a", "scale_param { bias_term: true }"),
    "Bias": layer("last", "Bias", "a"),
    "Scale over all axes": layer("last", "Scale", "a", "scale_param { num_axes: -1 bias_term: true }"),
    "Scale by a number": layer("last", "Scale", "a", "scale_param { num_axes: 0 }"),
    "LRN within channels": layer(
        "last", "LRN", "a", "lrn_param { norm_region: WITHIN_CHANNEL local_size: 3 }"
    ),
    "MVN": layer("last", "MVN", "a"),
    "Flatten": layer("last", "Flatten", "a"),
    "Flatten and back": layer("flat", "Flatten", "a")
    + layer("last", "Reshape", "flat", "reshape_param { shape { dim: 0 dim: 8 dim: 8 dim: 8 } }"),
    "Reshape with a copy": layer("last", "Reshape", "a", "reshape_param { shape { dim: 0 dim: 0 dim: -1 } }"),
    "Reshape with a number": layer(
        "last", "Reshape", "a", "reshape_param { shape { dim: 0 dim: 8 dim: -1 } }"
    ),
    "Reshape from axis 1": layer(
        "last", "Reshape", "a", "reshape_param { axis: 1 num_axes: 1 shape { dim: 8 } }"
    ),
    "Reshape to one axis": layer("last", "Reshape", "a", "reshape_param { shape { dim: 2 dim: 512 } }"),
    "Permute": layer("last", "Permute", "a", "permute_param { order: [0, 2, 3, 1] }"),
    "Permute and Flatten": layer("turned", "Permute", "a", "permute_param { order: [0, 2, 3, 1] }")
    + layer("last", "Flatten", "turned"),
    "SPP": layer("last", "SPP", "a", "spp_param { pyramid_height: 3 }"),
    "Tile": layer("last", "Tile", "a", "tile_param { tiles: 3 }"),
    "Tile over images": layer("last", "Tile", "a", "tile_param { axis: 2 tiles: 3 }"),
    "Im2col": layer("last", "Im2col", "a", "convolution_param { kernel_size: 3 }"),
    "Crop": inputs(small=(2, 3, 4, 4)) + layer("last", "Crop", "a small", "crop_param { axis: 2 offset: 1 }"),
    "Normalize": layer("last", "Normalize", "a", "norm_param { across_spatial: false }"),
    "Interp": layer("last", "Interp", "a", "interp_param { height: 5 width: 6 }"),
    "BN of SegNet": layer("last", "BN", "a", "bn_param { scale_filler { value: 1 } bn_mode: INFERENCE }"),
    "BN of PSPNet": layer("last", "BN", "a", "bn_param { moving_average: true }"),
    "ReLU6": layer("last", "ReLU6", "a"),
    "Reduction over the image": layer(
        "last", "Reduction", "a", "reduction_param { axis: 2 operation: MEAN }"
    ),
    "Concat with itself": layer("last", "Concat", "a a"),
    "Concat with the data": layer("last", "Concat", "data a"),
    "Concat along the image": layer("last", "Concat", "a a", "concat_param { axis: 2 }"),
    "both of a Slice": layer("cut", "Slice", "a", "slice_param { slice_point: 3 }", "left right")
    + layer("last", "Concat", "right left"),
    "even Slice": layer("cut", "Slice", "a", "", "left right") + layer("last", "Concat", "right left"),
    "Slice of the image": layer("cut", "Slice", "a", "slice_param { axis: 2 }", "left right")
    + layer("last", "Concat", "right left"),
    "Eltwise with itself": layer("last", "Eltwise", "a a"),
    "ConvolutionDepthwise": layer(
        "last", "ConvolutionDepthwise", "a", "convolution_param { num_output: 8 kernel_size: 3 }"
    ),
    "depthwise": conv("last", "a", 8, "group: 8", 3),
    "depthwise, two filters a channel": conv("last", "a", 16, "group: 8", 3),
    "depthwise Deconvolution": layer(
        "last", "Deconvolution", "a", "convolution_param { num_output: 8 group: 8 kernel_size: 4 stride: 2 }"
    ),
    "Deconvolution": layer(
        "last", "Deconvolution", "a", "convolution_param { num_output: 6 kernel_size: 2 }"
    ),
    "groups": conv("last", "a", 6, "group: 2", 3),
    "Deconvolution in groups": layer(
        "last", "Deconvolution", "a", "convolution_param { num_output: 6 group: 2 kernel_size: 2 }"
    ),
    "ShuffleChannel": layer("last", "ShuffleChannel", "a", "shuffle_channel_param { group: 2 }"),
    "Silence beside": layer("quiet", "Silence", "a").replace('top: "quiet"', "")
    + layer("last", "Split", "a"),
    "a gate": layer("mean", "Pooling", "a", "pooling_param { pool: AVE global_pooling: true }")
    + conv("less", "mean", 2)
    + conv("gate", "less", 8)
    + layer("open", "Sigmoid", "gate")
    + layer("flat", "Flatten", "open")
    + layer("last", "Scale", "a flat", "scale_param { axis: 0 }"),
    "Axpy": layer("mean", "Pooling", "a", "pooling_param { pool: AVE global_pooling: true }")
    + layer("last", "Axpy", "mean a a"),
}


@pytest.mark.parametrize("between", PLAIN.values(), ids=PLAIN.keys())
def test_a_pruned_net_computes_what_the_masked_one_does(between: str) -> None:
    for seed in range(3):
        pruning.check_pruned_is_masked(pruning.model(DATA + A + between + END, seed), seed)


@pytest.mark.parametrize("between", PLAIN.values(), ids=PLAIN.keys())
def test_channels_are_followed_through(between: str) -> None:
    found = group(DATA + A + between + END)
    assert not found.frozen
    assert not found.fixed


def test_a_chain_has_a_group_a_layer() -> None:
    found = find(DATA + A + layer("n", "BatchNorm", "a", tops="a") + conv("last", "a", 6, kernel=3) + END)
    assert [members(one) for one in found.groups] == [["a"], ["last"], ["end"]]
    first, second, _ = found.groups
    assert (first.channels, second.channels) == (8, 6)
    assert [(one.layer, one.places) for one in first.consumers] == [("n", 8), ("last", 8)]
    assert [(one.layer, one.places) for one in second.consumers] == [("end", 6 * 36)]


def test_a_sum_joins() -> None:
    found = group(DATA + A + B + layer("last", "Eltwise", "a b") + END)
    assert members(found) == ["a", "b"]
    assert found.channels == 8
    assert found.coupled
    assert units(found, "a") == units(found, "b") == list(range(8))


def test_a_depthwise_layer_follows() -> None:
    found = group(DATA + A + conv("last", "a", 16, "group: 8", 3) + END)
    assert members(found) == ["a", "last"]
    assert units(found, "last") == [i // 2 for i in range(16)]
    assert not found.coupled


def test_concat_and_slice_cut_elsewhere() -> None:
    """a (8) and b (8) in a row, cut behind 10 channels: c joins 2 of b with 2 of its own, and 4 of b."""
    source = (
        DATA
        + A
        + B
        + layer("row", "Concat", "a b")
        + layer("cut", "Slice", "row", "slice_param { slice_point: 10 }", "left right")
        + conv("c", "data", 6)
        + layer("last", "Eltwise", "right c")
        + END
        + dense("end2", "left", 3)
    )
    found = find(source)
    assert members(found.by_layer["a"][0]) == ["a"]
    joined = found.by_layer["c"][0]
    assert members(joined) == ["b", "c"]
    assert joined.channels == 8
    assert units(joined, "b")[2:] == units(joined, "c")


def test_a_shuffle_joins_the_groups() -> None:
    """Two groups of four: what stands at one place of each goes together."""
    found = group(DATA + A + layer("last", "ShuffleChannel", "a", "shuffle_channel_param { group: 2 }") + END)
    assert found.channels == 4
    assert units(found, "a") == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_shared_weight_joins() -> None:
    twins = inputs(left=(1, 8, 5, 5), right=(1, 8, 6, 6)) + "".join(
        conv(f"{side}1", side, 6, params='param { name: "w" } param { name: "b" }')
        + conv(f"{side}2", f"{side}1", 4)
        for side in ("left", "right")
    )
    found = find(twins)
    assert members(found.by_layer["left1"][0]) == ["left1", "right1"]
    assert members(found.by_layer["left2"][0]) == ["left2"]


def test_what_reads_a_shared_weight_joins_its_inputs() -> None:
    params = 'param { name: "w" }'
    source = (
        DATA + A + conv("b", "data", 8) + conv("x", "a", 4, params=params) + conv("y", "b", 4, params=params)
    )
    found = find(source)
    assert members(found.by_layer["a"][0]) == ["a", "b"]


def test_the_same_weight_read_otherwise_stays() -> None:
    """A convolution has channels along the second axis of the weight, a transposed layer along the first."""
    shared = 'param { name: "w" share_mode: PERMISSIVE }'
    turned = dense("y", "b", 2, "transpose: true bias_term: false").replace(
        "inner_product_param", f"{shared} inner_product_param"
    )
    source = (
        inputs(data=(2, 3, 1, 1))
        + A
        + conv("b", "data", 8)
        + conv("x", "a", 2, "bias_term: false", params=shared)
    )
    found = group(source + turned)
    assert 'layer "a"' not in found.frozen
    assert found.frozen == '"x" and "y" share the weight "w"'


def test_groups_of_a_convolution_are_cells() -> None:
    found = group(DATA + A + conv("last", "a", 6, "group: 2", 3) + END)
    assert found.cells == ((0, 1, 2, 3), (4, 5, 6, 7))
    inner = group(DATA + A + conv("last", "a", 6, "group: 2", 3) + END, "last")
    assert inner.cells == ((0, 1, 2), (3, 4, 5))


def test_groups_within_groups() -> None:
    """Filters of three groups read by one of six: the six decide. Three and two do not fit."""
    source = (
        DATA + conv("a", "data", 12) + conv("b", "a", 12, "group: 3") + conv("last", "b", 12, "group: %d")
    )
    assert [len(cell) for cell in group(source % 6 + END, "b").cells] == [2] * 6
    assert "do not fit one another" in group(source % 2 + END, "b").frozen


def test_a_fold_over_the_batch_stays() -> None:
    source = (
        DATA + A + layer("last", "Reshape", "a", "reshape_param { shape { dim: 4 dim: 4 dim: 64 } }") + END
    )
    assert "more than one axis" in group(source).frozen


FROZEN = {
    "LRN": (layer("last", "LRN", "a") + END, 'LRN "last" mixes neighbouring channels'),
    "Softmax": (layer("last", "Softmax", "a") + END, 'Softmax "last" weighs them'),
    "MVN": (layer("last", "MVN", "a", "mvn_param { across_channels: true }") + END, 'MVN "last" normalizes'),
    "ArgMax": (layer("last", "ArgMax", "a", "argmax_param { axis: 1 }") + END, 'ArgMax "last" mixes them'),
    "Reduction": (layer("last", "Reduction", "a", "reduction_param { axis: 1 }") + END, "sums over them"),
    "an output": ("", 'output "a"'),
    "an output beside": (layer("last", "Split", "a", tops="last other") + END, 'output "other"'),
    "an unknown type": (layer("last", "Mystery", "a") + END, 'Mystery "last" reads them: layer type'),
    "an unknown field": (layer("last", "ReLU", "a", "relu_param { odd: 1 }") + END, 'ReLU "last" reads them'),
    "an unknown type ahead": (
        layer("m", "Mystery", "data") + layer("last", "Eltwise", "a m") + END,
        'Eltwise "last" reads them: the shape of bottom "m" is not known',
    ),
    "the data in a sum": (
        inputs(more=(2, 8, 8, 8)) + layer("last", "Eltwise", "a more") + END,
        'Eltwise "last" joins them with channels that stay',
    ),
    "channels split over axes": (
        layer("last", "Reshape", "a", "reshape_param { shape { dim: 2 dim: 2 dim: 4 dim: 64 } }") + END,
        "more than one axis",
    ),
    "a fully connected layer along width": (
        dense("last", "a", 4, "axis: 3") + END,
        'InnerProduct "last" works along another axis',
    ),
    "BatchNorm of another axis": (
        layer("turned", "Permute", "a", "permute_param { order: [0, 2, 1, 3] }")
        + layer("last", "BatchNorm", "turned")
        + END,
        'BatchNorm "last" does not work along axis 2',
    ),
    "Crop of channels": (
        inputs(small=(2, 4, 7, 7))
        + layer("last", "Crop", "a small", "crop_param { axis: 1 offset: 1 }")
        + END,
        'Crop "last" crops them',
    ),
    "a depthwise layer that is an output": (conv("last", "a", 8, "group: 8", 3), 'output "last"'),
    "a namesake": (
        conv("a", "data", 8).replace('top: "a"', 'top: "twin"')
        + layer("quiet", "Silence", "twin").replace('top: "quiet"', "")
        + END.replace("last", "a"),
        '2 layers are called "a"',
    ),
    "a loss": (
        inputs(label=(2, 1, 8, 8)) + layer("last", "SoftmaxWithLoss", "a label"),
        'SoftmaxWithLoss "last" mixes them, or needs all of them',
    ),
}


@pytest.mark.parametrize(("behind", "reason"), FROZEN.values(), ids=FROZEN.keys())
def test_frozen_with_the_reason(behind: str, reason: str) -> None:
    found = group(DATA + A + behind)
    assert reason in found.frozen
    assert len(found.fixed) == 8
    with pytest.raises(PlanError, match="must keep all its channels: .*" + re.escape(reason)):
        find(DATA + A + behind).removed({"a": range(7)})


def test_priors_read_sizes_only() -> None:
    prior = layer("prior", "PriorBox", "a data", "prior_box_param { min_size: 4 }")
    assert not group(DATA + A + prior + layer("last", "Split", "a") + END).frozen


def test_part_of_a_group_may_have_to_stay() -> None:
    """Constant channels beside those of a, all under a sum: b goes where a goes."""
    zeros = 'layer { name: "zeros" type: "DummyData" top: "zeros" dummy_data_param { shape { dim: 2 dim: 4 dim: 8 dim: 8 } } }\n'
    source = DATA + zeros + A + conv("b", "data", 12) + layer("row", "Concat", "zeros a")
    found = group(source + layer("last", "Eltwise", "row b") + END)
    assert members(found) == ["a", "b"]
    assert found.channels == 12
    assert found.frozen == ""
    assert [units(found, "b")[i] in found.fixed for i in range(12)] == [True] * 4 + [False] * 8
    with pytest.raises(PlanError, match='layer "b": must keep channel 0: Eltwise "last" joins them'):
        find(source + layer("last", "Eltwise", "row b") + END).removed({"b": range(1, 12)})


def test_every_layer_type_has_been_thought_of() -> None:
    """Of the types that can be run, these alone are followed nowhere."""
    from caffe_proto.layers.channels import fixed

    mixing = {name for name, spec in LAYERS.items() if spec.channels is fixed and not spec.loss}
    assert mixing == {
        "Accuracy", "ArgMax", "DetectionOutput", "HDF5Output", "LSTM", "LSTMUnit", "RNN",
    }  # fmt: skip


# Choosing ---------------------------------------------------------------------------------------------------------


def test_the_best_stay_and_of_equals_the_later() -> None:
    found = group(DATA + A + layer("last", "Split", "a") + END)
    assert found.choose(np.array([3, 1, 2, 2, 9, 0, 2, 5.0]), 4) == (0, 4, 6, 7)
    assert found.choose(np.zeros(8), 3) == (5, 6, 7)
    assert found.choose(np.zeros(8), 0) == (7,)
    assert found.choose(np.zeros(8), 99) == tuple(range(8))


def test_cells_keep_equally_many() -> None:
    found = group(DATA + A + conv("last", "a", 6, "group: 2", 3) + END)
    scores = np.array([9, 8, 7, 6, 1, 4, 2, 3.0])
    assert found.choose(scores, 5) == (0, 1, 5, 7)
    assert found.choose(scores, 1) == (0, 5)
    assert found.choose(scores, 8) == tuple(range(8))


def test_what_must_stay_stays_first() -> None:
    zeros = 'layer { name: "zeros" type: "DummyData" top: "zeros" dummy_data_param { shape { dim: 2 dim: 4 dim: 8 dim: 8 } } }\n'
    source = DATA + zeros + A + conv("b", "data", 12) + layer("row", "Concat", "zeros a")
    found = group(source + layer("last", "Eltwise", "row b") + END)
    chosen = found.choose(-np.arange(12.0), 5)
    assert set(found.fixed) <= set(chosen)
    assert len(chosen) == 5


def test_no_part_of_a_slice_is_emptied() -> None:
    cut = layer("cut", "Slice", "a", "slice_param { slice_point: 3 }", "left right")
    source = DATA + A + cut + dense("x", "left", 2) + dense("y", "right", 2)
    found = group(source)
    assert found.choose(np.arange(8.0), 2) == (2, 6, 7)
    with pytest.raises(PlanError, match='Slice "cut" would make a top without channels'):
        find(source).removed({"a": [6, 7]})


def test_scores_of_a_group() -> None:
    found = group(DATA + A + B + layer("last", "Eltwise", "a b") + END)
    a, b = np.arange(8.0), np.array([4.0] * 8)
    assert found.scores({"a": a, "b": b}).tolist() == ((a + b) / 2).tolist()
    assert found.scores({"a": a, "b": b}, "max").tolist() == np.maximum(a, b).tolist()
    assert found.scores({"a": a, "b": b}, "min").tolist() == np.minimum(a, b).tolist()
    assert found.scores({"b": b}).tolist() == b.tolist()
    with pytest.raises(PlanError, match="7 scores for 8 filters"):
        found.scores({"a": a[:7]})
    with pytest.raises(PlanError, match="have no score"):
        found.scores({})


# Removing ---------------------------------------------------------------------------------------------------------


def test_layers_of_a_group_must_agree() -> None:
    found = find(DATA + A + B + layer("last", "Eltwise", "a b") + END)
    with pytest.raises(
        PlanError, match=r'layer "[ab]": keeps channel [01], which must go with one that "[ab]"'
    ):
        found.removed({"a": range(7), "b": range(1, 8)})
    both = found.removed({"a": range(7), "b": range(7)})
    assert (found.removed({"a": range(7)}) == both).all()


def test_groups_of_a_convolution_must_stay_equal() -> None:
    found = find(DATA + A + conv("last", "a", 6, "group: 2", 3) + END)
    with pytest.raises(PlanError, match=r'"last" divides them into groups .* would leave 4 and 3'):
        found.removed({"a": range(7)})


def wrong(*channels: int) -> Iterable[int]:
    return channels


@pytest.mark.parametrize(
    ("channels", "what"),
    [
        (wrong(0, 8), "channel 8, which it does not have"),
        (wrong(1, 1), "names twice"),
        (wrong(), "no channel"),
    ],
)
def test_channels_that_are_none(channels: tuple[int, ...], what: str) -> None:
    found = find(DATA + A + layer("last", "Split", "a") + END)
    with pytest.raises(PlanError, match=f'layer "a": .*{what}'):
        found.removed({"a": channels})


def test_the_listing_names_every_layer() -> None:
    source = DATA + A + B + layer("last", "Eltwise", "a b") + conv("end", "last", 5)
    assert coupling.listing(find(source)) == [
        ("1", "a", "8 of 8", ""),
        ("1", "b", "8 of 8", ""),
        ("1", "> end", "8", "Convolution"),
        ("2", "end", "5", 'frozen: they are the net\'s output "end"'),
    ]
