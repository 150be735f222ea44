"""Repairs without training: statistics that NumPy finds too, constants that are exact where they can be, least squares."""

from __future__ import annotations

import nets
import numpy as np
import pruning
import pytest

from caffe_proto import binding, graph, net
from caffe_proto.errors import UsageError
from caffe_proto.model import Model
from caffe_proto.offsets import added
from caffe_proto.shape_inference import infer
from caffe_proto.weights import NewEntry, Weights
from hrank import coupling
from hrank.applier import apply
from hrank.coupling import removed_places
from hrank.plan import Plan, PruneEntry
from hrank.repair import compensate, readers, reestimate
from lra import responses
from lra.calibration import Calibration
from lra.repair import refit

HEAD = nets.inputs(data=(2, 3, 8, 8))
NORMS = (
    HEAD
    + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 6 kernel_size: 3 pad: 1 } }
layer { name: "a/bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "a/scale" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "a/relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b"
  convolution_param { num_output: 5 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "b/bn" type: "BatchNorm" bottom: "b" top: "b" }
layer { name: "b/scale" type: "Scale" bottom: "b" top: "b" scale_param { bias_term: true } }
layer { name: "b/relu" type: "ReLU" bottom: "b" top: "b" }
layer { name: "c" type: "Convolution" bottom: "b" top: "c" convolution_param { num_output: 4 kernel_size: 3 stride: 2 } }
"""
)


def images(n: int = 40, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, 8, 8)).astype(np.float32)


def keep(**channels: list[int]) -> Plan:
    return Plan({name: PruneEntry(tuple(kept)) for name, kept in channels.items()})


def blobs(model: Model, x: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Named values over all images; ``b@bn`` is what layer b/bn reads."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    shaped = infer(graph.build(model.net))
    from caffe_proto.runtime import Engine
    from caffe_proto.segments import Segments

    parts = Segments(shaped, binding.bind(shaped, model.weights), Engine(1))
    index = {node.name: i for i, node in enumerate(shaped.graph.nodes)}
    values = {name: graph.Value(index[name], 0) for name in names}
    for start in range(0, len(x), 2):
        made = parts.run({graph.Value(index["data"], 0): x[start : start + 2]}, list(values.values()))
        for name, value in values.items():
            found[name].append(made[value])
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


# BatchNorm --------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_what_each_layer_reads_then() -> None:
    full = pruning.model(NORMS)
    pruned, _ = apply(keep(a=[0, 2, 3], b=[1, 4]), full)
    x = images(41)  # no multiple of a batch
    found = reestimate(pruned, x, threads=1)
    assert found.changed == ("a/bn", "b/bn")
    assert found.kept == {}
    read = blobs(found.model, np.concatenate([x, x[:1]]), ["a", "b"])  # with the new statistics in front
    for name, layer in (("a", "a/bn"), ("b", "b/bn")):
        values = read[name][:41].astype(np.float64)
        mean, variance, count = found.model.weights[layer]
        assert mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-5)
        assert variance == pytest.approx(values.var((0, 2, 3)), rel=1e-4)
        assert count.tolist() == [1]
    assert found.model.net.text == pruned.net.text
    old = pruned.weights["b/bn"]
    assert not np.allclose(found.model.weights["b/bn"][0], old[0] / old[2], atol=1e-3)


def test_a_net_without_batchnorm() -> None:
    with pytest.raises(UsageError, match="no BatchNorm"):
        reestimate(nets.model(nets.SMALL), np.zeros((2, 3, 12, 12), np.float32))


def test_shared_statistics_are_left() -> None:
    shared = "param { name: 'm' } param { name: 'v' } param { name: 'f' }"
    source = NORMS.replace('type: "BatchNorm"', f'type: "BatchNorm" {shared}').replace(
        "num_output: 5", "num_output: 6"
    )
    found = reestimate(pruning.model(source), images(4))
    assert found.kept == dict.fromkeys(("a/bn", "b/bn"), "it shares its statistics")
    assert found.changed == ()


def test_no_images() -> None:
    with pytest.raises(UsageError, match="no images"):
        reestimate(pruning.model(NORMS), images(0))


# Constants --------------------------------------------------------------------------------------------------------

CONSTANT = (
    HEAD
    + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 6 kernel_size: 1 } }
layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }
%s
"""
)
READERS = {
    "convolution": 'layer { name: "r" type: "Convolution" bottom: "a" top: "r" convolution_param { num_output: 4 kernel_size: 3 } }',
    "grouped": 'layer { name: "r" type: "Convolution" bottom: "a" top: "r" convolution_param { num_output: 4 kernel_size: 3 group: 2 } }',
    "dilated, strided": 'layer { name: "r" type: "Convolution" bottom: "a" top: "r" convolution_param { num_output: 4 kernel_size: 2 stride: 2 dilation: 3 } }',
    "deconvolution": 'layer { name: "r" type: "Deconvolution" bottom: "a" top: "r" convolution_param { num_output: 4 kernel_size: 1 group: 2 } }',
    "fully connected": 'layer { name: "r" type: "InnerProduct" bottom: "a" top: "r" inner_product_param { num_output: 4 } }',
    "transposed": 'layer { name: "r" type: "InnerProduct" bottom: "a" top: "r" inner_product_param { num_output: 4 transpose: true } }',
    "behind pooling": 'layer { name: "p" type: "Pooling" bottom: "a" top: "p" pooling_param { kernel_size: 2 stride: 2 } }'
    ' layer { name: "r" type: "Convolution" bottom: "p" top: "r" convolution_param { num_output: 4 kernel_size: 2 } }',
    "BatchNorm behind": 'layer { name: "r" type: "Convolution" bottom: "a" top: "r" convolution_param { num_output: 4 kernel_size: 3 bias_term: false } }'
    ' layer { name: "bn" type: "BatchNorm" bottom: "r" top: "r" }',
    "Scale behind": 'layer { name: "r" type: "Convolution" bottom: "a" top: "r" convolution_param { num_output: 4 kernel_size: 3 bias_term: false } }'
    ' layer { name: "s" type: "Scale" bottom: "r" top: "r" scale_param { bias_term: true } }',
    "Scale and Bias behind": 'layer { name: "r" type: "Convolution" bottom: "a" top: "r" convolution_param { num_output: 4 kernel_size: 3 bias_term: false } }'
    ' layer { name: "s" type: "Scale" bottom: "r" top: "r" } layer { name: "t" type: "Bias" bottom: "r" top: "r" }',
}  # fmt: skip


def constant_channels(source: str, channels: list[int]) -> Model:
    """A net whose layer a gives one number everywhere in these channels."""
    full = pruning.model(source)
    assert full.weights is not None
    weight, bias = (np.array(one) for one in full.weights["a"])
    weight[channels] = 0
    bias[channels] = 1.5 + np.arange(len(channels))
    return Model(full.net, full.weights.replace({"a": [NewEntry("a", (weight, bias))]}))


@pytest.mark.parametrize("mask_only", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_constant_channels_leave_nothing_behind(reader: str, mask_only: bool) -> None:
    full = constant_channels(CONSTANT % READERS[reader], [1, 4])
    plan = keep(a=[0, 2, 3, 5])
    pruned, _ = apply(plan, full, mask_only=mask_only)
    found = compensate(plan, full, pruned, images(6), mask_only=mask_only, threads=1)
    assert found.changed == ("r",)
    feeds = {"data": images(2, 8)}
    wanted, raw, made = (pruning.run(one, feeds)["r"] for one in (full, pruned, found.model))
    assert np.abs(raw - wanted).max() > 0.1
    assert made == pytest.approx(wanted, abs=1e-4)


def test_the_mean_response_is_kept_with_padding_too() -> None:
    full = pruning.model(NORMS)
    plan = keep(a=[0, 5], b=[1, 2, 3])
    pruned, _ = apply(plan, full)
    x = images(40)
    only_b = keep(b=[1, 2, 3])
    found = compensate(only_b, full, apply(only_b, full)[0], x, threads=1)
    wanted, made = (blobs(one, x, ["c"])["c"].mean((0, 2, 3)) for one in (full, found.model))
    assert made == pytest.approx(wanted, abs=1e-4)
    both = compensate(plan, full, pruned, x, threads=1)
    assert both.changed == ("b", "c")


def test_masked_channels_stay_masked() -> None:
    full = pruning.model(NORMS)
    plan = keep(a=[0, 5], b=[1, 2, 3])
    masked, _ = apply(plan, full, mask_only=True)
    made = compensate(plan, full, masked, images(4), mask_only=True).model
    assert made.weights is not None and masked.weights is not None
    mean, before = made.weights["b/bn"][0], masked.weights["b/bn"][0]
    assert mean[[0, 4]].tolist() == before[[0, 4]].tolist() == [0, 0]
    assert np.abs(mean - before)[[1, 2, 3]].min() > 1e-3


def test_a_constant_in_front_of_batchnorm_changes_no_new_statistics_behind() -> None:
    full = pruning.model(NORMS)
    plan = keep(a=[0, 5, 2])
    pruned, _ = apply(plan, full)
    x = images(8)
    first = compensate(plan, full, pruned, x).model
    assert not np.array_equal(first.weights["b/bn"][0], pruned.weights["b/bn"][0])
    left, right = (blobs(reestimate(one, x).model, x, ["c"])["c"] for one in (first, pruned))
    assert left == pytest.approx(right, abs=1e-4)


def test_a_layer_with_no_place_for_a_constant_says_so() -> None:
    source = CONSTANT % READERS["convolution"].replace("kernel_size: 3", "kernel_size: 3 bias_term: false")
    full = constant_channels(source, [1])
    plan = keep(a=[0, 2, 3, 4, 5])
    pruned, _ = apply(plan, full)
    found = compensate(plan, full, pruned, images(4))
    assert found.kept == {"r": "neither it nor the layer behind has a bias of its own"}
    assert found.model is pruned


@pytest.mark.parametrize(
    "behind",
    [
        'layer { name: "bn" type: "BatchNorm" bottom: "r" top: "t" batch_norm_param { use_global_stats: false } }',
        'layer { name: "x" type: "BatchNorm" bottom: "r" top: "t" } layer { name: "y" type: "ReLU" bottom: "r" top: "u" }',
        'layer { name: "s" type: "Scale" bottom: "r" top: "t" scale_param { axis: 2 num_axes: 1 bias_term: true } }',
        'layer { name: "x" type: "ReLU" bottom: "r" top: "t" }',
    ],
)
def test_where_a_constant_cannot_be_put(behind: str) -> None:
    reader = READERS["BatchNorm behind"].split(" layer")[0]
    model = pruning.model(CONSTANT % (reader + behind))
    shaped = infer(graph.build(model.net))
    index = next(i for i, node in enumerate(shaped.graph.nodes) if node.name == "r")
    assert added(shaped, binding.bind(shaped, model.weights), index, np.ones(4)) is None


# Least squares ----------------------------------------------------------------------------------------------------


def dependent(source: str) -> Model:
    """A net whose channel 1 of layer a is the sum of channels 0 and 2, in front of a ReLU that all pass."""
    full = pruning.model(source)
    assert full.weights is not None
    weight, bias = (np.array(one) for one in full.weights["a"])
    weight[1], bias[:] = weight[0] + weight[2], 30  # positive everywhere
    bias[1] = bias[0] + bias[2] + 2
    return Model(full.net, full.weights.replace({"a": [NewEntry("a", (weight, bias))]}))


@pytest.mark.parametrize(
    "reader", [name for name in READERS if name not in ("deconvolution", "behind pooling")]
)
def test_what_the_kept_channels_can_say_is_said(reader: str) -> None:
    full = dependent(CONSTANT % READERS[reader].replace("group: 2", ""))
    plan = keep(a=[0, 2, 3, 4, 5])
    pruned, _ = apply(plan, full)
    found = coupling.find(full)
    gone = found.removed(plan.keep)
    x = images(2000 if "InnerProduct" in READERS[reader] else 400)  # one place of each, not 36
    calibration = Calibration({"data": x}, 40, threads=1)
    repaired = refit(full, pruned, {}, readers(found, gone), calibration)
    assert list(repaired.errors) == ["r"]
    assert repaired.errors["r"] < 1e-2
    feeds = {"data": images(2, 8)}
    wanted, raw, made = (pruning.run(one, feeds)["r"] for one in (full, pruned, repaired.model))
    assert np.abs(raw - wanted).max() > 1
    assert np.abs(made - wanted).max() < 2e-6 * np.abs(raw - wanted).max()


def test_rows_that_are_gone_are_not_fitted() -> None:
    full = dependent(NORMS.replace("a/relu", "a/none").replace('"ReLU" bottom: "a"', '"Dropout" bottom: "a"'))
    plan = keep(a=[0, 2, 3, 4, 5], b=[1, 4])
    pruned, _ = apply(plan, full)
    found = coupling.find(full)
    gone = found.removed(plan.keep)
    rows = {name: ~removed_places(gone, ids) for name, ids in found.filters.items()}
    assert rows["b"].tolist() == [False, True, False, False, True]
    x = images(400)
    repaired = refit(full, pruned, rows, readers(found, gone), Calibration({"data": x}, 40, threads=1))
    assert list(repaired.errors) == ["b", "c"]
    wanted, raw, made = (blobs(one, x[:8], ["b/relu"])["b/relu"] for one in (full, pruned, repaired.model))
    assert np.abs(raw - wanted[:, [1, 4]]).max() > 1e-2
    assert np.abs(made - wanted[:, [1, 4]]).max() < 0.05 * np.abs(raw - wanted[:, [1, 4]]).max()


def test_two_fits_on_one_stage_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "_NOTE_EVERY", -1.0)  # what is fitted is noted at once
    full = dependent(CONSTANT % READERS["convolution"])
    found, calibration = coupling.find(full), Calibration({"data": images(100)}, 20, threads=1)
    made = []
    for kept in ([0, 2, 3, 4, 5], [1, 2, 3, 4, 5]):
        pruned, _ = apply(keep(a=kept), full)
        gone = found.removed({"a": kept})
        made.append(refit(full, pruned, {}, readers(found, gone), calibration).model)
    alone = refit(full, pruned, {}, ["r"], Calibration({"data": images(100)}, 20, threads=1)).model
    assert np.array_equal(made[1].weights["r"][0], alone.weights["r"][0])
    assert not np.array_equal(made[0].weights["r"][0], made[1].weights["r"][0])


def test_layers_that_cannot_be_fitted_say_why() -> None:
    full = dependent(CONSTANT % READERS["deconvolution"])
    pruned, _ = apply(keep(a=[0, 2, 3, 5]), full)
    repaired = refit(full, pruned, {}, ["r"], Calibration({"data": images(8)}))
    assert repaired.kept == {"r": "it is no convolution and not fully connected"}
    assert repaired.model is pruned
    bare = CONSTANT % READERS["convolution"].replace("kernel_size: 3", "kernel_size: 3 bias_term: false")
    full = dependent(bare)
    pruned, _ = apply(keep(a=[0, 2, 3]), full)
    assert "bias of its own" in refit(full, pruned, {}, ["r"], Calibration({"data": images(8)})).kept["r"]


def test_weights_of_v1_nets_are_repaired_too() -> None:
    source = nets.SMALL
    full = nets.model(source)
    plan = keep(conv3=list(range(0, 20, 2)))
    pruned, _ = apply(plan, full)
    x = np.random.default_rng(1).standard_normal((4, 3, 12, 12)).astype(np.float32)
    made = compensate(plan, full, pruned, x).model
    assert isinstance(made.weights, Weights)
    assert net.parse(made.net.text).layers
    assert not np.array_equal(made.weights["ip1"][1], full.weights["ip1"][1])
    assert np.array_equal(made.weights["ip1"][0], pruned.weights["ip1"][0])
