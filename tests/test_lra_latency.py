"""Measured time as a cost: the table's file, what is read between its points, and the graphs that are timed.

No test depends on how long anything takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import caffe_proto as cp
from caffe_proto.errors import FileError, UsageError
from caffe_proto.model import Model
from caffe_proto.net import parse
from caffe_proto.onnx_export import Export, to_onnx
from caffe_proto.runtime import Engine, open_onnx
from lra.decomposition import StepShape
from lra.latency import Latency, _Log
from lra.latency_probe import Drawing, Running, as_is, kernels, side_by_side
from lra.latency_table import Measured, Table, default_path, describe, grid, interpolate, machine
from lra.schemes import ALL_SCHEMES
from lra.targets import Found, Target, find

ENGINE = Engine(1)
PCA, SPATIAL = ALL_SCHEMES["pca"], ALL_SCHEMES["spatial"]
CHAIN = (StepShape("_v", (8, 3, 3, 1), pad=(1, 0)), StepShape("_h", (16, 8, 1, 3), pad=(0, 1)))

WIDE = (
    nets.inputs(data=(1, 3, 16, 16))
    + """
layer { name: "first" type: "Convolution" bottom: "data" top: "first"
  convolution_param { num_output: 64 kernel_size: 3 pad: 1 } }
layer { name: "first_relu" type: "ReLU" bottom: "first" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 64 kernel_size: 3 pad: 1 } }
layer { name: "b_norm" type: "BatchNorm" bottom: "b" top: "b" }
layer { name: "b_relu" type: "ReLU" bottom: "b" top: "b" }
layer { name: "c" type: "Convolution" bottom: "b" top: "c"
  convolution_param { num_output: 64 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "sum" type: "Eltwise" bottom: "c" bottom: "a" top: "sum" }
layer { name: "sum_relu" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "a" type: "Convolution" bottom: "sum" top: "d" convolution_param { num_output: 32 kernel_size: 1 } }
layer { name: "pool" type: "Pooling" bottom: "d" top: "pool" pooling_param { pool: AVE global_pooling: true } }
layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip" inner_product_param { num_output: 40 } }
layer { name: "ip2" type: "InnerProduct" bottom: "ip" top: "ip2" inner_product_param { num_output: 40 } }
"""
)
"""A residual block with everything onnxruntime fuses; the layer "a" is called like another layer's blob."""


def looked(text: str) -> Found:
    """A net without weights, looked at."""
    return find(Model(parse(text)))


def drawn(text: str) -> tuple[Found, Drawing]:
    found = looked(text)
    return found, Drawing.of(found)


def chain(target: Target, name: str, rank: int) -> tuple[StepShape, ...]:
    return ALL_SCHEMES[name].structure(target.shape, target.geometry, rank)


def inferred(export: Export) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checked model, by onnx's own inference."""
    made = onnx.shape_inference.infer_shapes(to_onnx(export), check_type=True, strict_mode=True)
    onnx.checker.check_model(made, full_check=True)
    values = [*made.graph.value_info, *made.graph.output]
    return {one.name: tuple(dim.dim_value for dim in one.type.tensor_type.shape.dim) for one in values}


# the table


def filled(path: Path, engine: Engine = ENGINE) -> Table:
    table = Table(machine(engine), path, 16)
    table.put("1x3x8x8: input > Conv > Relu", CHAIN, Measured(1.25e-3, 0.02, 10))
    table.nets["abc"] = Measured(0.5, 0.01, 5)
    return table


def test_a_table_read_again_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    filled(path).write()
    again = Table.load(machine(ENGINE), path)
    assert again == filled(path)
    assert again.get("1x3x8x8: input > Conv > Relu", CHAIN) == Measured(1.25e-3, 0.02, 10)
    assert again.get("1x3x8x8: input > Conv > Relu", CHAIN[:1]) is None
    assert again.get("elsewhere", CHAIN) is None


def test_a_table_has_a_line_for_each_measurement(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    filled(path).write()
    assert '"3 -> 8 3x1 pad 1,0; 8 -> 16 1x3 pad 0,1": [1.25, 0.02, 10]' in [
        line.strip() for line in path.read_text().splitlines()
    ]


def test_machines_do_not_see_each_other_and_keep_each_other(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    filled(path).write()
    other = Table.load(machine(Engine(7)), path)
    assert (other.layers, other.nets, other.block) == ({}, {}, 0)
    other.put("p", CHAIN, Measured(2e-3, 0.1, 3))
    other.write()
    assert Table.load(machine(ENGINE), path) == filled(path)
    assert Table.load(machine(Engine(7)), path).get("p", CHAIN) == Measured(2e-3, 0.1, 3)


def test_two_writers_keep_what_the_other_found(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    first, second = (Table.load(machine(ENGINE), path) for _ in range(2))
    first.block = 16
    first.put("p", CHAIN, Measured(1e-3, 0.0, 1))
    first.write()
    second.put("p", CHAIN[:1], Measured(3e-3, 0.0, 1))
    second.write()
    both = Table.load(machine(ENGINE), path)
    assert both.get("p", CHAIN) == Measured(1e-3, 0.0, 1)
    assert both.get("p", CHAIN[:1]) == Measured(3e-3, 0.0, 1)
    assert both.block == 16


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"caffe-lra latencies": 1,\n "machines": {', "line 2|:2"),
        ("[]", "JSON"),
        ('{"caffe-lra latencies": 2, "machines": {}}', "version 1"),
        ('{"machines": {}}', "version 1"),
        ('{"caffe-lra latencies": 1, "machines": []}', "version 1"),
        ('{"caffe-lra latencies": 1, "machines": {"x": 3}}', "machine"),
        ('{"caffe-lra latencies": 1, "machines": {"HERE": {"layers": {"p": {"c": [1, 2]}}}}}', "[1, 2]"),
        ('{"caffe-lra latencies": 1, "machines": {"HERE": {"layers": {"p": {"c": [-1, 0, 1]}}}}}', "-1"),
        ('{"caffe-lra latencies": 1, "machines": {"HERE": {"layers": {"p": {"c": ["x", 0, 1]}}}}}', "x"),
        ('{"caffe-lra latencies": 1, "machines": {"HERE": {"layers": {"p": 4}}}}', "measurement"),
        ('{"caffe-lra latencies": 1, "machines": {"HERE": {"nets": {"n": null}}}}', "None"),
        ('{"caffe-lra latencies": 1, "machines": {"HERE": {"block": "wide"}}}', "wide"),
    ],
)
def test_a_file_that_is_no_table_is_refused_and_left(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "table.json"
    text = text.replace("HERE", machine(ENGINE))
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        Table.load(machine(ENGINE), path)
    assert any(one in str(caught.value) for one in said.split("|"))
    assert "table.json" in str(caught.value) and "remove it" in str(caught.value)
    with pytest.raises(FileError):
        filled(path).write()
    assert path.read_text() == text


def test_a_file_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="remove it"):
        Table.load(machine(ENGINE), path)


def test_the_machine_says_all_that_times_depend_on() -> None:
    import onnxruntime

    assert f"onnxruntime {onnxruntime.__version__}" in machine(ENGINE)
    names = {machine(engine) for engine in (Engine(1), Engine(2), Engine(1, "cuda"))}
    assert len(names) == 3
    assert machine(Engine(1, spin=False)) == machine(Engine(1))


def test_the_cache_follows_the_users_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "caffe-lra" / "latencies.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "caffe-lra" / "latencies.json"


def test_every_setting_of_a_chain_is_in_its_name() -> None:
    step = StepShape("", (16, 8, 3, 3))
    others = [
        replace(step, shape=(16, 8, 3, 1)),
        replace(step, shape=(16, 8, 1, 3)),
        replace(step, shape=(8, 16, 3, 3)),
        replace(step, stride=(2, 1)),
        replace(step, stride=(1, 2)),
        replace(step, pad=(2, 1)),
        replace(step, dilation=(2, 1)),
        replace(step, shape=(16, 4, 3, 3), group=2),
    ]
    names = {describe((one,)) for one in (step, *others)} | {describe((step, step))}
    assert len(names) == len(others) + 2
    assert describe((replace(step, suffix="_v"),)) == describe((step,))


def test_a_measurement_is_the_median_and_its_standard_error() -> None:
    found = Measured.of([4.0, 1.0, 2.0, 3.0, 100.0])
    # deviations from 3: 1 2 1 0 97, their median 1
    assert found.seconds == 3 and found.runs == 5
    assert found.noise == pytest.approx(1.2533 * 1.4826 * 1 / (3 * 5**0.5))
    assert Measured.of([2.0, 2.0]) == Measured(2.0, 0.0, 2)


# between the points


def staircase(slope: float, start: float, excess: tuple[float, float, float], blocks: int) -> float:
    return start + slope * blocks + (0.0, *excess)[blocks % 4]


@given(
    st.integers(8, 90),
    st.floats(0.01, 10),
    st.floats(0, 10),
    st.tuples(st.floats(0, 5), st.floats(0, 5), st.floats(0, 5)),
)
@settings(deadline=None)
def test_a_staircase_is_read_exactly_from_its_grid(
    top: int, slope: float, start: float, excess: tuple[float, float, float]
) -> None:
    points = {n: staircase(slope, start, excess, n) for n in grid(top)}
    for n in range(1, top + 1):
        assert interpolate(points, n) == pytest.approx(staircase(slope, start, excess, n))


def test_measured_points_are_kept_where_they_fall() -> None:
    points = {1: 5.0, 2: 3.0, 3: 4.0}
    assert [interpolate(points, n) for n in (1, 2, 3)] == [5.0, 3.0, 4.0]
    assert interpolate({1: 1.0, 3: 5.0}, 2) == 3.0
    with pytest.raises(ValueError, match="outside"):
        interpolate(points, 4)


def test_the_grid() -> None:
    assert grid(0) == []
    assert grid(3) == [1, 2, 3]
    assert grid(9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert grid(30) == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 30]
    assert grid(300)[-3:] == [192, 256, 300]


# the graphs


def test_chains_stand_where_the_layers_stood() -> None:
    found, drawing = drawn(nets.SMALL)
    choice = {
        "conv1": (found.targets["conv1"], chain(found.targets["conv1"], "spatial", 9)),
        "conv2": (found.targets["conv2"], chain(found.targets["conv2"], "spatial", 10)),
        "conv3": (found.targets["conv3"], chain(found.targets["conv3"], "pca", 4)),
        "ip1": (found.targets["ip1"], chain(found.targets["ip1"], "pca", 3)),
    }
    variant = drawing.variant(choice)
    written: dict[str, list[Any]] = {}
    for node in variant.sheet.nodes:
        if node.op in ("Conv", "Gemm"):
            shapes = [variant.sheet.constants[name].shape for name in node.inputs[1:]]
            settings = [node.attributes.get(key) for key in ("kernel_shape", "strides", "pads", "group")]
            written.setdefault(node.layer, []).append((shapes, settings))
    assert written == {
        "conv1": [
            ([(9, 3, 5, 1)], [(5, 1), (1, 1), (2, 0, 2, 0), 1]),
            ([(16, 9, 1, 5), (16,)], [(1, 5), (1, 1), (0, 2, 0, 2), 1]),
        ],
        "conv2": [
            ([(10, 8, 3, 1)], [(3, 1), (2, 1), (0, 0, 0, 0), 2]),
            ([(24, 5, 1, 3), (24,)], [(1, 3), (1, 2), (0, 0, 0, 0), 2]),
        ],
        "conv3": [
            ([(4, 24, 3, 3)], [(3, 3), (1, 1), (1, 1, 1, 1), 1]),
            ([(20, 4, 1, 1)], [(1, 1), (1, 1), (0, 0, 0, 0), 1]),
        ],
        "ip1": [([(3, 500)], [None] * 4), ([(30, 3), (30,)], [None] * 4)],
    }
    plain, changed = inferred(drawing.variant({})), inferred(variant)
    assert {name: changed[name] for name in plain} == plain


def test_a_narrower_layer_is_fitted_in_and_the_fitting_counts_for_nobody() -> None:
    found, drawing = drawn(WIDE)
    target = found.targets["c"]
    narrow = (StepShape("", (48, 32, 3, 3), pad=(1, 1)),)
    variant = drawing.variant({"c": (target, narrow)})
    steps = [
        (node.layer, variant.sheet.constants[node.inputs[1]].shape)
        for node in variant.sheet.nodes
        if node.op == "Conv" and node.layer in ("c", "")
    ]
    assert steps == [("", (32, 64, 1, 1)), ("c", (48, 32, 3, 3)), ("", (64, 48, 1, 1))]
    plain, changed = inferred(drawing.variant({})), inferred(variant)
    assert {name: changed[name] for name in plain} == plain


def test_only_the_surroundings_are_kept() -> None:
    found, drawing = drawn(WIDE)
    kept = drawing.around([found.targets["b"]])
    variant = drawing.variant({}, kept)
    layers = [node.layer for node in variant.sheet.nodes]
    assert list(dict.fromkeys(layers)) == ["first", "first_relu", "b", "b_norm", "b_relu"]
    assert list(variant.outputs) == ["b"]
    inferred(variant)
    everything = drawing.variant({}, drawing.around([found.targets["c"], found.targets["a"]]))
    assert {"c", "sum", "sum_relu", "a", "pool"} <= {node.layer for node in everything.sheet.nodes}
    assert "ip" not in {node.layer for node in everything.sheet.nodes}


def test_the_net_as_it_is_gives_what_the_net_gives() -> None:
    model = nets.model(nets.SMALL)
    drawing = Drawing.of(find(model))
    x = np.random.default_rng(1).standard_normal((2, 3, 12, 12)).astype(np.float32)
    session = open_onnx(to_onnx(drawing.variant({})).SerializeToString(), ENGINE)
    (made,) = session.run(["prob"], {"data": x})
    with cp.session(model) as reference:
        np.testing.assert_allclose(made, reference.run({"data": x})["prob"], rtol=1e-5)


def test_places_tell_surroundings_apart_and_equal_ones_not() -> None:
    found, drawing = drawn(nets.SMALL)
    assert drawing.place(found.targets["conv1"]) == "2x3x12x12: input > Conv > Relu"
    assert drawing.place(found.targets["conv2"]) == "2x16x12x12: Conv > Relu > Conv > Relu"
    assert drawing.place(found.targets["ip1"]) == "2x500x1x1: Conv > Flatten > Gemm > Softmax"
    model = Model(parse((Path(__file__).resolve().parents[1] / "models/vgg_16/deploy.prototxt").read_text()))
    vgg = find(model)
    # drawing the weights of the dense layers would take seconds: the convolutional part does
    drawing = Drawing(cp.onnx_export.draw(model, cp.onnx_export.Request(outputs=("pool5",), random_seed=0)))
    places = {name: drawing.place(vgg.targets[name]) for name in ("conv4_2", "conv4_3", "conv5_1", "conv5_2")}
    assert places["conv4_2"] == places["conv4_3"] == "1x512x28x28: Conv > Relu > Conv > Relu"
    assert places["conv5_1"] == "1x512x14x14: Relu > MaxPool > Conv > Relu"
    assert places["conv5_2"] == "1x512x14x14: Conv > Relu > Conv > Relu"


def test_the_fingerprint_is_of_the_graph() -> None:
    first, renamed = drawn(WIDE)[1], drawn(WIDE.replace('"first_relu"', '"other"'))[1]
    larger, wider = (
        drawn(WIDE.replace(*change))[1]
        for change in (("dim: 16", "dim: 18"), ("num_output: 32", "num_output: 48"))
    )
    assert first.fingerprint == renamed.fingerprint
    assert len({one.fingerprint for one in (first, larger, wider)}) == 3


# what the profile says


@pytest.mark.parametrize("name", ["pca", "spatial"])
@pytest.mark.parametrize("rank", [6, 16, 17])
def test_every_layer_finds_its_kernels(name: str, rank: int) -> None:
    found, drawing = drawn(WIDE)
    names = ("first", "b", "c")
    choice = {one: (found.targets[one], chain(found.targets[one], name, min(rank, 9))) for one in ("first",)}
    choice |= {one: (found.targets[one], chain(found.targets[one], name, rank)) for one in ("b", "c")}
    plain, (changed,) = side_by_side(drawing, [choice], ENGINE, 0.0, 2)
    for runs in (plain, changed):
        assert len(runs) == 2
        for run in runs:
            assert all(run[one] > 0 for one in names)
            assert "b_relu" not in run and "first_relu" not in run  # taken into the convolutions


def test_no_kernel_is_lost_or_counted_twice(tmp_path: Path) -> None:
    _, drawing = drawn(WIDE)
    nets_ = [Running(drawing.variant({}), ENGINE, tmp_path) for _ in range(2)]
    for one in nets_:
        one.run()
    (run,) = nets_[0].times(overhead=1e6)  # what is left of every kernel is the least that is counted
    (events,) = nets_[1].kernels()
    assert sum(run.values()) == pytest.approx(1e-7 * len(events))
    assert set(run) <= {node.layer for node in drawing.nodes.values()} | {""}
    assert {"first", "b", "c", "a", "ip", "ip2"} <= set(run)
    assert run["b"] == pytest.approx(1e-7)
    assert not list(tmp_path.iterdir())


def test_the_kernels_of_this_machine() -> None:
    found = kernels(ENGINE)
    assert found.block in (1, 4, 8, 16, 32) and 0 <= found.overhead < 1e-2


# the log


def test_a_slow_round_is_taken_out() -> None:
    found = looked(WIDE)
    b, c = found.targets["b"], found.targets["c"]
    sites = {"b": ("B", as_is(b)), "c": ("C", as_is(c))}
    one, two = chain(b, "pca", 16), chain(c, "pca", 16)
    log = _Log(sites, {})
    slow = np.array([1.0, 3.0, 1.0, 5.0, 1.0])
    plain = [{"b": 4.0 * s, "c": 2.0 * s, "pool": 1.0 * s} for s in slow]
    others = [{"b": 2.5 * s, "c": 0.5 * s} for s in slow]
    log.add([{"b": (b, one), "c": (c, two)}], plain, [others])
    measured = log.measured()
    assert measured["B", one] == Measured(2.5, 0.0, 5)
    assert measured["C", two] == Measured(0.5, 0.0, 5)
    assert measured["B", as_is(b)].seconds == 4.0
    assert log.whole() == Measured(7.0, 0.0, 5)


def test_new_times_are_told_in_the_terms_of_known_ones() -> None:
    found = looked(WIDE)
    b = found.targets["b"]
    site, other = ("B", as_is(b)), chain(b, "pca", 16)
    log = _Log({"b": site}, {site: 2.0})
    log.add([{"b": (b, other)}], [{"b": 4.0}] * 3, [[{"b": 3.0}] * 3])
    assert log.measured()["B", other].seconds == 1.5


# all together


def schemes(found: Found) -> dict[str, list[Any]]:
    return {name: [PCA, SPATIAL] if one.shape[2:] != (1, 1) else [PCA] for name, one in found.targets.items()}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table in which everything of WIDE was measured."""
    path = tmp_path_factory.mktemp("latency") / "table.json"
    found = looked(WIDE)
    steps: list[int] = []
    latency = Latency(found, ENGINE, path)
    latency.measure(list(found.targets.values()), schemes(found), lambda: steps.append(1))
    assert steps
    return path


def edited(table: Path, folder: Path, change: Mapping[str, list[float]]) -> Path:
    """The table with other numbers for some chains, wherever they stand."""
    value = json.loads(table.read_text())
    (entry,) = value["machines"].values()
    for chains in entry["layers"].values():
        chains.update({name: numbers for name, numbers in change.items() if name in chains})
    path = folder / "edited.json"
    path.write_text(json.dumps(value))
    return path


def test_a_second_plan_measures_nothing(table: Path) -> None:
    before, file = table.read_bytes(), table.stat().st_mtime_ns
    found = looked(WIDE)
    latency = Latency(found, ENGINE, table)
    steps: list[int] = []
    latency.measure(list(found.targets.values()), schemes(found), lambda: steps.append(1))
    assert steps == [] and table.read_bytes() == before and table.stat().st_mtime_ns == file
    assert latency.net > 0
    for target in found.targets.values():
        assert latency.seconds(target) > 0


def test_options_are_multiples_of_the_block_and_cheaper_in_multiplications(table: Path) -> None:
    found = looked(WIDE)
    latency = Latency(found, ENGINE, table)
    block = latency.table.block if latency.table.block > 1 else 8
    for name in ("b", "c"):
        target = found.targets[name]
        for scheme in (PCA, SPATIAL):
            options = latency.options(target, scheme)
            most = scheme.max_rank(target.shape, 1)
            wanted = [
                rank
                for rank in range(block, most + 1, block)
                if target.chain_cost(scheme, rank) < target.macs
            ]
            assert [rank for rank, _ in options] == wanted
            assert all(seconds > 0 for _, seconds in options)
            assert latency.options(target, scheme, 3 * block) == options[2::3]


def test_what_stands_in_the_table_counts(table: Path, tmp_path: Path) -> None:
    found = looked(WIDE)
    b, c = found.targets["b"], found.targets["c"]
    block = Table.load(machine(ENGINE), table).block
    first = describe(chain(b, "spatial", block))
    latency = Latency(
        found,
        ENGINE,
        edited(table, tmp_path, {first: [1234.0, 0.01, 5], describe(as_is(b)): [2000.0, 0.01, 5]}),
    )
    assert latency.options(b, SPATIAL)[0] == (block, 1.234)
    assert latency.seconds(b) == 2.0
    # c has the shape of b and another place, both were changed
    assert latency.seconds(c) == 2.0
    assert latency.predict([(b, 1.234)]) == pytest.approx(latency.net + 1.234 - 2.0)
    assert latency.predict([(b, 1.0), (c, 0.5)]) == pytest.approx(latency.net - 1.0 - 1.5)


def test_only_what_is_missing_is_measured(table: Path, tmp_path: Path) -> None:
    found = looked(WIDE)
    b = found.targets["b"]
    known = describe(as_is(b))
    path = edited(table, tmp_path, {known: [50.0, 0.01, 5]})
    latency = Latency(found, ENGINE, path)
    odd = chain(b, "spatial", 17)
    with pytest.raises(KeyError):
        latency.seconds(b, odd)
    latency.measure_chains([b], {"b": [odd]})
    again = Latency(found, ENGINE, path)
    assert again.seconds(b, odd) > 1e-3  # told in the terms of a layer of 50 ms
    assert again.table.get(again.drawing.place(b), as_is(b)) == Measured(0.05, 0.01, 5)


def test_other_threads_are_another_machine(table: Path) -> None:
    found = looked(WIDE)
    with pytest.raises(KeyError):
        Latency(found, Engine(2), table).seconds(found.targets["b"])


def test_noise_is_told_and_doubted(table: Path, tmp_path: Path) -> None:
    found = looked(WIDE)
    b = found.targets["b"]
    for noise, doubted in ((0.02, False), (0.4, True)):
        latency = Latency(found, ENGINE, edited(table, tmp_path, {describe(as_is(b)): [1.0, noise, 5]}))
        assert latency.noise == 0
        latency.seconds(b)
        assert latency.noise == pytest.approx(noise)
        assert (latency.doubt is not None) == doubted
    assert latency.doubt is not None and "40%" in latency.doubt and "edited.json" in latency.doubt


def test_a_trial_runs_both_nets(table: Path) -> None:
    found = looked(WIDE)
    b = found.targets["b"]
    before, after = Latency(found, ENGINE, table).trial({"b": (b, chain(b, "pca", 16))}, runs=2)
    assert before > 0 and after > 0


def test_layers_without_a_cheaper_chain_have_no_options(tmp_path: Path) -> None:
    found = looked(nets.SMALL)
    latency = Latency(found, ENGINE, tmp_path / "table.json")
    latency.measure(list(found.targets.values()), schemes(found))
    assert latency.options(found.targets["conv1"], PCA) == []  # 16 channels hold no block that saves anything
    assert latency.seconds(found.targets["conv1"]) > 0


def test_a_layer_of_two_bottoms_is_replaced_twice_and_its_times_are_added(tmp_path: Path) -> None:
    text = (
        nets.inputs(x=(3, 16, 12, 12), y=(3, 16, 12, 12))
        + """
layer { name: "twin" type: "Convolution" bottom: "x" bottom: "y" top: "p" top: "q"
  convolution_param { num_output: 32 kernel_size: 3 } }
layer { name: "both" type: "Concat" bottom: "p" bottom: "q" top: "both" }
"""
    )
    found, drawing = drawn(text)
    twin = found.targets["twin"]
    assert drawing.place(twin) == "2 times 6x16x12x12: input > Conv > Concat"
    variant = drawing.variant({"twin": (twin, chain(twin, "spatial", 16))})
    assert [node.layer for node in variant.sheet.nodes if node.op == "Conv"] == ["twin"] * 4
    assert inferred(variant)["both"] == (3, 64, 10, 10)
    latency = Latency(found, ENGINE, tmp_path / "table.json")
    latency.measure([twin], {"twin": [SPATIAL]})
    assert latency.seconds(twin) > 0 and latency.options(twin, SPATIAL)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    found = looked(nets.SMALL)
    with pytest.raises(UsageError, match="cuda"):
        Latency(found, Engine(1, "cuda"), tmp_path / "table.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="there is no folder"):
        Latency(found, ENGINE, tmp_path / "file" / "table.json")
    (tmp_path / "gone").mkdir()
    latency = Latency(found, ENGINE, tmp_path / "gone" / "table.json")
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("")
    steps: list[int] = []
    with pytest.raises(FileError):
        latency.measure(list(found.targets.values()), schemes(found), lambda: steps.append(1))
    assert steps == []
