"""Why a layer gains less time than multiplications: estimates by hand, and the kinds of causes in real profiles.

No test depends on how long anything takes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest

import lra
from caffe_proto import latency
from caffe_proto.kernels import Kernel, NodeNames, node_name, owners
from caffe_proto.latency import Gain, LayerTime, Subject, gains
from caffe_proto.layers.emit import NodeRecord, Sheet
from caffe_proto.model import Model
from caffe_proto.net import parse
from caffe_proto.onnx_export import Request
from caffe_proto.runtime import Engine
from caffe_proto.why import Cause, Rates, explain
from lra.cli import main

MIB = 2**20
RATES = Rates(16, 0.01, ((MIB, float(MIB)),))  # a MiB in a millisecond
DENSE = Kernel("c_nchwc", "Conv", "c", 10.0, (64, 64, 3, 3), (64, 64, 3, 3), 100, MIB)


def kernel(
    name: str, ms: float, filters: tuple[int, ...], computed: tuple[int, ...] | None = None, **more: Any
) -> Kernel:
    return Kernel(f"{name}_nchwc", "Conv", name, ms, filters, computed or filters, 100, **more)


def causes(after: list[Kernel], rates: Rates = RATES, dense: Kernel = DENSE) -> dict[str, Cause]:
    """By kind, for a layer that has become these kernels."""
    ms = dense.ms, sum(one.ms for one in after)
    macs = dense.macs, sum(one.macs for one in after)
    return {one.kind: one for one in explain(ms, macs, [dense], after, rates)}


def test_padding_by_hand() -> None:
    """37 of 48: a share of 11 / 48 of the first kernel; 40 of 48 inputs: 8 / 48 of the second."""
    found = causes(
        [
            kernel("c_a", 6.0, (40, 64, 3, 3), (48, 64, 3, 3)),
            kernel("c_b", 3.0, (64, 40, 1, 1), (64, 48, 1, 1)),
        ]
    )
    assert found["padding"].ms == pytest.approx(6 * 8 / 48 + 3 * 8 / 48)
    assert found["padding"].text == "c_a computes 48 channels for 40, c_b reads 48 channels for 40"


def test_what_was_lost_before_does_not_count() -> None:
    """The layer before was padded to twice its channels too: it lost half of 10 ms, of which 1 / 4 would be left."""
    dense = replace(DENSE, filters=(32, 64, 3, 3))
    after = [kernel("c_a", 6.0, (8, 64, 3, 3), (16, 64, 3, 3))]
    assert causes(after, dense=dense)["padding"].ms == pytest.approx(6 / 2 - 10 / 2 / 4)


def test_blocks_by_hand() -> None:
    """80 channels are five blocks: the fifth alone costs 3 / 8 of a block more."""
    found = causes([kernel("c_a", 43.0, (80, 64, 1, 1))], dense=replace(DENSE, ms=200.0))
    assert found["blocks"].ms == pytest.approx(43 * (3 / 8) / (5 + 3 / 8))
    assert found["blocks"].text == "c_a computes 80 channels, 1 of the last 4 blocks of 16"
    assert "blocks" not in causes([kernel("c_a", 43.0, (128, 64, 1, 1))])


def test_layout_by_hand() -> None:
    """The pace before: 10 ms for 3,686,400 MACs; outside the blocks what is beyond it counts, and the reorders."""
    plain = Kernel("c_b", "FusedConv", "c_b", 2.0, (64, 37, 1, 1), (64, 37, 1, 1), 100)
    after = [
        kernel("c_a", 6.0, (37, 64, 3, 3), (48, 64, 3, 3)),
        Kernel("ReorderOutput", "ReorderOutput", "c_a", 0.25, moved=MIB),
        plain,
        Kernel("ReorderInput", "ReorderInput", "c_b", 0.5, moved=MIB),
    ]
    found = causes(after)
    assert found["layout"].ms == pytest.approx(0.75 + 2.0 - 10.0 * (64 * 37) / (64 * 64 * 9))
    assert found["layout"].text == (
        "c_b left the blocked layout: 37 input channels are no multiple of 4, 2 x ReorderOutput, ReorderInput in 0.750 ms"
    )
    never = replace(DENSE, name="c")  # its channels were not in blocks before either
    assert causes([plain], dense=never).keys() == {"unexplained"}


def test_few_channels_by_hand() -> None:
    after = [
        kernel("c_a", 6.0, (12, 64, 3, 3), (16, 64, 3, 3)),
        kernel("c_b", 3.0, (64, 12, 1, 1)),
    ]
    found = causes(after)
    assert found["few channels"].ms == pytest.approx(3 - 10 * (64 * 12) / (64 * 64 * 9))
    assert found["few channels"].text == "c_b reads 12 channels, less than a block"
    first = replace(DENSE, filters=(64, 3, 3, 3), computed=(64, 3, 3, 3))
    assert "few channels" not in causes([kernel("c_a", 6.0, (16, 3, 3, 1))], dense=first)  # as before


def test_memory_by_hand() -> None:
    """A quarter of the MACs with two MiB instead of one: 1.75 MiB more than their share, 8 times as many a MAC."""
    after = [kernel("c_a", 6.0, (16, 64, 3, 3), moved=2 * MIB)]
    found = causes(after)
    assert found["memory"].ms == pytest.approx(1.75)
    assert found["memory"].text == "moves 8.0 x the bytes per MAC, 2.0 MiB in all"
    assert "memory" not in causes(after, Rates(16, 0.01, ((MIB // 4, 1.0),)))  # nothing moves as much
    assert causes(after, Rates(16, 0.01, ((MIB, 1e6), (MIB, MIB))))["memory"].ms == pytest.approx(1.75)


def test_operators_that_are_no_longer_merged_by_hand() -> None:
    after = [kernel("c_a", 3.0, (32, 64, 3, 3)), Kernel("relu", "Relu", "relu", 3.0)]
    found = causes(after)
    assert found["fusion"] == Cause(
        "fusion", 1.0, "Relu has a kernel of its own now"
    )  # no more than was lost


def test_overhead_by_hand() -> None:
    """Two kernels for one: of 5 us at least, less the third that a layer of a third of the work would have."""
    dense = replace(DENSE, ms=0.02)
    after = [kernel("c_a", 0.01, (32, 64, 3, 1)), kernel("c_b", 0.01, (64, 32, 1, 3))]
    found = causes(after, replace(RATES, launch=0.005), dense)
    share = 2 * (32 * 64 * 3) / (64 * 64 * 9)
    assert found["overhead"].ms == pytest.approx(0.005 * (2 - share))
    assert found["overhead"].text == "2 kernels of 0.0050 ms at the least, in 0.0200 ms; 1 before"


def test_the_largest_comes_first_and_small_ones_not_at_all() -> None:
    after = [
        kernel("c_a", 6.0, (37, 64, 3, 3), (48, 64, 3, 3)),
        Kernel("ReorderOutput", "ReorderOutput", "c_a", 0.01),
        kernel("c_b", 4.0, (64, 40, 1, 1), (64, 48, 1, 1), moved=3 * MIB),
    ]
    found = list(causes(after).values())
    assert [one.kind for one in found][:2] == ["memory", "padding"]
    assert [one.ms for one in found] == sorted((one.ms for one in found), reverse=True)
    assert "layout" not in [one.kind for one in found]


def test_nothing_to_see_is_unexplained() -> None:
    after = [kernel("c_a", 9.0, (64, 64, 1, 1))]
    assert causes(after) == {"unexplained": Cause("unexplained", 9 - 10 / 9, "")}
    assert explain((2.0, 2.0), (10, 5), [], [], Rates.of([])) == (Cause("unexplained", 1.0, ""),)


@pytest.mark.parametrize(
    ("widths", "block"), [((48, 64), 16), ((40, 64), 8), ((24,), 8), ((12,), 0), ((), 0)]
)
def test_the_block_is_what_all_widths_are_multiples_of(widths: tuple[int, ...], block: int) -> None:
    made = [kernel("c", 1.0, (width, 4, 1, 1)) for width in widths]
    assert Rates.of(made).block == block


def test_rates_are_of_what_multiplies_nothing() -> None:
    made = [kernel("c", 1.0, (16, 16, 1, 1), moved=8), Kernel("p", "MaxPool", "p", 0.5, moved=100)]
    found = Rates.of(made)
    assert (found.launch, found.movers) == (0.5, ((100, 200.0),))
    assert (found.bandwidth(400), found.bandwidth(401)) == (200.0, None)


# kernels


def event(name: str, op: str, reads: list[int], writes: list[int]) -> dict[str, Any]:
    shapes = {"input_type_shape": [{"float": reads}], "output_type_shape": [{"float": writes}]}
    return {"name": f"{name}_kernel_time", "args": {"op_name": op, **shapes}}


def test_names_of_kernels() -> None:
    names = ["a_kernel_time", "a_nchwc_kernel_time", "fused a_kernel_time", "a_token_12_kernel_time", "a"]
    assert {node_name(name) for name in names} == {"a"}


def test_conversions_count_for_whoever_made_the_tensor() -> None:
    sheet = Sheet(
        [
            NodeRecord("Conv", "a", ("x", "w"), ("y",), {}, "conv"),
            NodeRecord("Relu", "b", ("y",), ("z",), {}, "relu"),
            NodeRecord("Transpose", "t", ("z",), ("u",), {}, "permute"),
        ],
        {"w": np.zeros((4, 3, 1, 1), np.float32)},
    )
    run = [
        event("ReorderInput", "ReorderInput", [1, 3, 2, 2], [1, 3, 2, 2]),
        event("z_nchwc", "Conv", [1, 3, 2, 2], [1, 16, 2, 2]),
        event("ReorderOutput_token_3", "ReorderOutput", [1, 16, 2, 2], [1, 4, 2, 2]),
        event("t", "Transpose", [1, 4, 2, 2], [1, 2, 2, 4]),
        event("Transpose_token_4", "Transpose", [1, 2, 2, 4], [1, 4, 2, 2]),
    ]
    names = NodeNames(sheet)
    assert owners(run, names) == ["", "conv", "conv", "permute", "permute"]
    assert names.host("relu") == names.host("permute") == "conv"
    assert names.filters("z", "Conv") == (4, 3, 1, 1) and names.filters("t", "Transpose") is None


def test_what_only_one_net_has_merged_counts_for_the_layer() -> None:
    sheet = Sheet(
        [
            NodeRecord("Conv", "c", ("x", "w"), ("y",), {}, "c"),
            NodeRecord("Relu", "r", ("y",), ("z",), {}, "r"),
        ],
        {"w": np.zeros((64, 64, 3, 3), np.float32)},
    )
    first = Subject("A", b"", NodeNames(sheet), {"c": 100, "r": 0})
    second = Subject("B", b"", NodeNames(sheet), {"c_v": 25, "c_h": 25, "r": 0})
    relu = Kernel("r", "Relu", "r", 3.0)
    pool = LayerTime("p", "MaxPool", 0.125, (Kernel("p", "MaxPool", "p", 0.125),))
    halves = [LayerTime(name, "Conv", 2.0, (replace(DENSE, layer=name, ms=2.0),)) for name in ("c_v", "c_h")]
    found = gains(
        first,
        second,
        [LayerTime("c", "Conv", 6.0, (DENSE,)), pool],
        [*halves, LayerTime("r", "Relu", 3.0, (relu,)), pool],
    )
    assert found[0].ms == (6.0, 7.0) and found[0].why[0].kind == "fusion"
    assert found[1] == Gain("", (0.125, 0.125), (0, 0))


# real profiles

SOURCE = (
    nets.inputs(data=(1, 3, 16, 16))
    + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 64 kernel_size: 3 pad: 1 } }
layer { name: "a_relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 64 kernel_size: 3 pad: 1 } }
layer { name: "b_relu" type: "ReLU" bottom: "b" top: "b" }
layer { name: "c" type: "Convolution" bottom: "b" top: "c" convolution_param { num_output: 64 kernel_size: 3 pad: 1 } }
layer { name: "c_relu" type: "ReLU" bottom: "c" top: "c" }
layer { name: "ip" type: "InnerProduct" bottom: "c" top: "ip" inner_product_param { num_output: 10 } }
"""
)
MODEL = Model(parse(SOURCE))


def profiled(*models: Model) -> tuple[list[Subject], list[list[LayerTime]]]:
    subjects = [latency.of_model(str(i), one, Request(random_seed=0)) for i, one in enumerate(models)]
    return subjects, latency.profiles(subjects, Engine(1), runs=2)


def changed(**ranks: int | dict[str, Any]) -> Model:
    return lra.apply(lra.make_plan(MODEL, rank_config=ranks), MODEL)[0]


def blocked() -> bool:
    """Whether this machine's onnxruntime lays channels out in blocks."""
    return any(one.blocked for layer in profiled(MODEL)[1][0] for one in layer.kernels)


needs_blocks = pytest.mark.skipif(not blocked(), reason="onnxruntime lays no channels out in blocks here")


def why(subjects: list[Subject], layers: list[list[LayerTime]], name: str) -> dict[str, Cause]:
    """Causes that a real profile shows, whatever the times were: convolutions take a second, all else next to nothing."""
    before = [replace(one, ms=1e-3) for layer in layers[0] for one in layer.kernels if one.layer == name]
    after = [
        replace(one, ms=1e3 if one.filters else 1.0)
        for layer in layers[1]
        for one in layer.kernels
        if one.layer.startswith(f"{name}_")
    ]
    macs = sum(one.macs for one in before), sum(one.macs for one in after)
    ms = sum(one.ms for one in before), sum(one.ms for one in after)
    return {one.kind: one for one in explain(ms, macs, before, after, Rates.of([*before, *after]))}


def test_real_kernels_have_the_macs_of_their_layers() -> None:
    """MACs by kernel, from the shapes of weights and outputs in the profile, against those counted from the net."""
    subjects, layers = profiled(MODEL, changed(b={"scheme": "spatial", "rank": 21}, c=37, ip=5))
    for subject, found in zip(subjects, layers, strict=True):
        counted = {one.name: sum(kernel.macs for kernel in one.kernels) for one in found}
        assert {name: macs for name, macs in counted.items() if macs} == {
            name: macs for name, macs in subject.macs.items() if macs
        }
        assert all(one.moved > 0 for layer in found for one in layer.kernels)
        weights = {one.layer: one.filters for layer in found for one in layer.kernels if one.filters}
        assert weights["a"] == (64, 3, 3, 3)


def test_bytes_of_a_product_count_its_weights() -> None:
    """Weights that onnxruntime packs when it loads a net are not in the profile."""
    _, layers = profiled(MODEL)
    (product,) = (one for layer in layers[0] for one in layer.kernels if one.op == "Gemm")
    inputs, outputs = 64 * 16 * 16, 10
    assert product.moved == 4 * (inputs + inputs * outputs + outputs + outputs)


@needs_blocks
def test_a_rank_outside_the_blocks() -> None:
    found = why(*profiled(MODEL, changed(b=17)), "b")
    computed = 32 if "32" in found["padding"].text else 24  # blocks of 16 or of 8
    assert found["padding"].text == f"b_lowrank computes {computed} channels for 17"
    assert found["layout"].text.startswith(
        "b_linear left the blocked layout: 17 input channels are no multiple of 4"
    )
    assert "ReorderOutput" in found["layout"].text and "ReorderInput" in found["layout"].text


@needs_blocks
def test_a_rank_that_fills_blocks() -> None:
    found = why(*profiled(MODEL, changed(b={"scheme": "spatial", "rank": 48})), "b")
    assert "padding" not in found and "layout" not in found and "few channels" not in found


@needs_blocks
def test_a_rank_below_a_block() -> None:
    found = why(*profiled(MODEL, changed(b={"scheme": "spatial", "rank": 4})), "b")
    assert found["few channels"].text == "b_h reads 4 channels, less than a block"


def test_a_relu_that_is_read_twice_is_not_merged() -> None:
    """Somebody else reads what the convolution gives: its ReLU has a kernel of its own, which counts for the layer."""
    text = SOURCE.replace('bottom: "b" top: "b" }', 'bottom: "b" top: "b2" }')
    text = text.replace(
        'name: "c" type: "Convolution" bottom: "b"', 'name: "c" type: "Convolution" bottom: "b2"'
    )
    first = Model(parse(text))
    second = Model(
        parse(
            text + 'layer { name: "more" type: "Power" bottom: "b" top: "more" power_param { scale: 2 } }\n'
        )
    )
    subjects, layers = profiled(first, second)
    assert "b_relu" not in {one.name for one in layers[0]}
    (relu,) = (one for one in layers[1] if one.name == "b_relu")
    rows = {row.name: row for row in gains(*subjects, *layers)}
    convolution = next(one for one in layers[1] if one.name == "b")
    assert rows["b"].ms[1] == pytest.approx(convolution.milliseconds + relu.milliseconds)


def test_the_command_explains_every_low_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.prototxt").write_text(SOURCE)
    Path("b.prototxt").write_text(changed(b=1, c={"scheme": "spatial", "rank": 1}).net.text)
    asked = [
        "time",
        "a.prototxt",
        "b.prototxt",
        "--profile",
        "--runs",
        "2",
        "--warmup",
        "1",
        "--threads",
        "1",
    ]
    assert main([*asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"][1]["gains"]
    for row in rows:
        assert ("why" in row) == (row.get("efficiency", 1.0) < 0.8)
        for cause in row.get("why", ()):
            assert cause.keys() == {"kind", "ms", "text"} and cause["ms"] > 0
            assert bool(cause["text"]) == (cause["kind"] != "unexplained")
    low = [row["name"] for row in rows if "why" in row]
    assert {"b", "c"} <= set(low)  # fewer MACs by hundreds of times: no machine gains that
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("why the time gains less"))
    told = [line.partition(":")[0] for line in lines[at + 1 :] if not line.startswith(" ")]
    assert {"b", "c"} <= set(told) and len([line for line in lines[at:] if line.startswith("  ")]) >= len(
        told
    )
