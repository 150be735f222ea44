"""Pruning by measured time: layers at fewer channels, the choice on a staircase, and the command.

Times are made up and stand in tables; only two tests measure, and none depends on how long anything takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from math import ceil, floor
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pruning
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import caffe_proto as cp
import hrank
from caffe_proto.errors import UsageError
from caffe_proto.model import Model, write_weights
from caffe_proto.net import parse
from caffe_proto.onnx_export import Export, to_onnx
from caffe_proto.runtime import Engine, open_onnx
from hrank import coupling, rates
from hrank.plan import Plan, PruneEntry
from hrank.timing import _FEW, _MANY, Speed, first_fast, steps
from lra.cli import main
from lra.latency import Latency
from lra.latency_probe import Drawing, as_is, narrowed
from lra.latency_table import Measured, Table, conditions, describe, machine
from lra.targets import Found, find

ROOT = Path(__file__).resolve().parents[1]
ENGINE = Engine(1)
BLOCK = 4
Capture = pytest.CaptureFixture[str]

GROUPED = (
    nets.inputs(data=(2, 8, 9, 9))
    + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a"
  convolution_param { num_output: 24 kernel_size: 3 pad: 1 stride: 2 } }
layer { name: "a_relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "g" type: "Convolution" bottom: "a" top: "g" convolution_param { num_output: 36 kernel_size: 3 dilation: 2 pad: 2 group: 3 } }
layer { name: "g_relu" type: "ReLU" bottom: "g" top: "g" }
layer { name: "dw" type: "Convolution" bottom: "g" top: "dw" convolution_param { num_output: 72 kernel_size: 3 pad: 1 group: 36 bias_term: false } }
layer { name: "ip" type: "InnerProduct" bottom: "dw" top: "ip" inner_product_param { num_output: 40 } }
layer { name: "ip_relu" type: "ReLU" bottom: "ip" top: "ip" }
layer { name: "end" type: "InnerProduct" bottom: "ip" top: "end" inner_product_param { num_output: 10 } }
"""
)

# a layer at fewer channels


def looked(source: str) -> Found:
    return find(Model(parse(source)))


def inferred(export: Export) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checked model, by onnx's own inference."""
    made = onnx.shape_inference.infer_shapes(to_onnx(export), check_type=True, strict_mode=True)
    onnx.checker.check_model(made, full_check=True)
    values = [*made.graph.value_info, *made.graph.output]
    return {one.name: tuple(dim.dim_value for dim in one.type.tensor_type.shape.dim) for one in values}


def test_a_narrower_layer_is_the_layer_with_fewer_channels() -> None:
    found = looked(GROUPED).targets
    words = {
        ("a", 16, 8): "8 -> 16 3x3 stride 2,2 pad 1,1",
        ("a", 24, 5): "5 -> 24 3x3 stride 2,2 pad 1,1",
        ("g", 30, 12): "12 -> 30 3x3 pad 2,2 dilation 2,2 group 3",
        ("dw", 40, 20): "20 -> 40 3x3 pad 1,1 group 20",
        ("dw", 20, 20): "20 -> 20 3x3 pad 1,1 group 20",
        ("ip", 8, 900): "900 -> 8 1x1",
    }
    for (name, outputs, inputs), text in words.items():
        (step,) = narrowed(found[name], outputs, inputs)
        assert describe((step,)) == text
        assert step.shape == (outputs, inputs // step.group, *found[name].shape[2:])
    for target in found.values():
        out, depth = target.shape[0], target.shape[1] * target.geometry.group
        assert narrowed(target, out, depth) == as_is(target)


@pytest.mark.parametrize(
    ("name", "outputs", "inputs", "said"),
    [
        ("a", 25, 8, "cannot have 25 outputs, it has 24"),
        ("a", 24, 9, "cannot have 9 inputs, it has 8"),
        ("a", 0, 8, "cannot have 0 outputs"),
        ("a", 24, 0, "cannot have 0 inputs"),
        ("g", 35, 24, "35 outputs cannot be shared by its 3 groups"),
        ("g", 36, 23, "23 inputs cannot be shared by its 3 groups"),
        ("dw", 72, 35, "72 outputs cannot be shared by its 35 groups"),
    ],
)
def test_widths_that_a_layer_cannot_have(name: str, outputs: int, inputs: int, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        narrowed(looked(GROUPED).targets[name], outputs, inputs)
    assert caught.value.layer == name


def test_the_graph_that_is_timed_holds_the_narrower_layer() -> None:
    """Of every kind of layer: its own node has the weight of the narrower one, and what adapts it is of no layer."""
    found = looked(GROUPED)
    drawing = Drawing.of(found)
    widths = {"a": (16, 8), "g": (30, 12), "dw": (40, 20), "ip": (16, 900), "end": (10, 16)}
    choice = {
        name: (found.targets[name], narrowed(found.targets[name], *two)) for name, two in widths.items()
    }
    variant = drawing.variant(choice)
    rows = []
    for node in variant.sheet.nodes:
        if node.op in ("Conv", "Gemm"):
            settings = [node.attributes.get(key) for key in ("strides", "dilations", "group")]
            rows.append((node.op, node.layer, variant.sheet.constants[node.inputs[1]].shape, settings))
    one, two, none = (1, 1), (2, 2), [None] * 3
    assert rows == [
        ("Conv", "a", (16, 8, 3, 3), [two, one, 1]),
        ("Conv", "", (24, 16, 1, 1), [one, one, 1]),
        ("Conv", "", (12, 24, 1, 1), [one, one, 1]),
        ("Conv", "g", (30, 4, 3, 3), [one, two, 3]),
        ("Conv", "", (36, 30, 1, 1), [one, one, 1]),
        ("Conv", "", (20, 36, 1, 1), [one, one, 1]),
        ("Conv", "dw", (40, 1, 3, 3), [one, one, 20]),
        ("Conv", "", (72, 40, 1, 1), [one, one, 1]),
        ("Gemm", "", (900, 72 * 25), none),
        ("Gemm", "ip", (16, 900), none),
        ("Gemm", "", (40, 16), none),
        ("Gemm", "", (16, 40), none),
        ("Gemm", "end", (10, 16), none),
    ]
    plain, changed = inferred(drawing.variant({})), inferred(variant)
    assert {name: changed[name] for name in plain} == plain
    session = open_onnx(to_onnx(variant).SerializeToString(), ENGINE)
    feeds = {one.name: np.ones(one.shape, np.float32) for one in session.get_inputs()}
    assert all(np.isfinite(array).all() for array in session.run(None, feeds))


def test_narrower_layers_are_measured_and_kept_apart(tmp_path: Path) -> None:
    found, path = looked(GROUPED), tmp_path / "t.json"
    chains = {
        "a": [narrowed(found.targets["a"], 16, 8), narrowed(found.targets["a"], 8, 8)],
        "ip": [narrowed(found.targets["ip"], 16, 900), narrowed(found.targets["ip"], 8, 900)],
    }
    targets = [found.targets[name] for name in chains]
    Latency(found, ENGINE, path).measure_chains(targets, chains)
    written = path.read_bytes()
    latency = Latency(found, ENGINE, path)
    latency.measure_chains(targets, chains)
    assert path.read_bytes() == written
    for target in targets:
        place = latency.table.layers[latency.drawing.place(target)]
        assert len(place) == 3 and all(latency.seconds(target, chain) > 0 for chain in chains[target.name])
    with pytest.raises(KeyError):
        latency.seconds(found.targets["a"], narrowed(found.targets["a"], 12, 8))


# the steps of one rate for all

SOURCE = (
    nets.inputs(data=(1, 3, 8, 8))
    + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 16 kernel_size: 3 pad: 1 } }
layer { name: "a_relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 12 kernel_size: 3 pad: 1 } }
layer { name: "b_relu" type: "ReLU" bottom: "b" top: "b" }
layer { name: "c" type: "Convolution" bottom: "b" top: "c" convolution_param { num_output: 8 kernel_size: 3 } }
layer { name: "c_relu" type: "ReLU" bottom: "c" top: "c" }
layer { name: "d" type: "Convolution" bottom: "c" top: "d" convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "d_relu" type: "ReLU" bottom: "d" top: "d" }
layer { name: "end" type: "InnerProduct" bottom: "d" top: "end" inner_product_param { num_output: 4 } }
"""
)
WIDTHS = {"a": 16, "b": 12, "c": 8, "d": 4}
RATES = [0.0, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4]  # at which a, b or c loses a block of 4


def kept_at(rate: float, block: int = BLOCK) -> dict[str, int]:
    """Channels that stay, by hand: what the rate leaves, up to full blocks."""
    left = {name: wide - floor(rate * wide + 1e-9) for name, wide in WIDTHS.items()}
    found = {name: min(WIDTHS[name], max(1, ceil(stay / block)) * block) for name, stay in left.items()}
    return {name: stay for name, stay in found.items() if stay < WIDTHS[name]}


def test_steps_are_all_that_one_rate_can_come_to() -> None:
    found = coupling.find(pruning.model(SOURCE))
    units = {group.index: BLOCK for group in found.groups if not group.frozen}
    row = list(steps(found, units))
    names = {index: found.groups[index].members[0].layer for index in units}
    assert [{names[index]: count for index, count in step.kept.items()} for step in row] == [
        kept_at(rate) for rate in RATES
    ]
    assert [step.rate for step in row] == pytest.approx(RATES)
    assert [dict(one.kept) for one in steps(found, units, 10)][-1] == {
        index: 12 for index, name in names.items() if name == "a"
    }


@given(
    st.lists(st.integers(2, 130), min_size=1, max_size=4),
    st.integers(1, 20),
    st.lists(st.integers(0, 9999), min_size=1, max_size=20),
)
@settings(deadline=None, max_examples=40)
def test_every_rate_comes_to_one_of_the_steps(widths: list[int], unit: int, some: list[int]) -> None:
    """Also where a fraction times the width rounds below the whole number, as 1/49 of 49 does."""
    source = nets.inputs(data=(1, 3, 4, 4)) + "".join(
        f'layer {{ name: "l{i}" type: "Convolution" bottom: "{f"l{i - 1}" if i else "data"}" top: "l{i}" '
        f"convolution_param {{ num_output: {wide} kernel_size: 1 }} }}\n"
        for i, wide in enumerate([*widths, 2])
    )
    found = coupling.find(Model(parse(source)))
    units = {group.index: unit for group in found.groups if not group.frozen}
    row = list(steps(found, units))

    def kept(rate: float) -> dict[int, int]:
        counts = {i: rates.keep_count(found.groups[i].channels, rate, round_to=unit) for i in units}
        return {i: count for i, count in counts.items() if count < found.groups[i].channels}

    for rate in (one / 10_000 for one in some):
        assert kept(rate) == [step for step in row if step.rate <= rate][-1].kept
    for before, step in pairwise(row):
        assert kept(step.rate) == step.kept != before.kept
        assert kept(step.rate * (1 - 1e-9)) == before.kept


# the choice


class Bench:
    """Made-up speeds: those of many runs, and what few runs say of them; notes what was asked."""

    def __init__(
        self, true: Sequence[float], few: Sequence[float] | None = None, noise: float = 0.01
    ) -> None:
        self.true, self.few, self.noise = true, few or true, noise
        self.asked: list[tuple[int, int]] = []

    def __call__(self, places: Sequence[int], runs: int) -> list[Speed]:
        self.asked += [(place, runs) for place in places]
        return [Speed((self.true if runs >= _MANY else self.few)[one], self.noise, runs) for one in places]


def test_the_first_that_is_fast_enough_on_a_staircase_that_goes_up_and_down() -> None:
    true = [1.0, 1.1, 1.05, 1.4, 1.3, 1.6, 1.2]
    for wanted, place in ((1.02, 1), (1.05, 1), (1.2, 3), (1.35, 3), (1.5, 5), (1.7, None)):
        bench = Bench(true)
        chosen, known = first_fast(len(true), wanted, bench)
        assert chosen == place
        assert sorted(known) == list(range(len(true)))


@given(st.lists(st.floats(0.5, 4), min_size=1, max_size=14), st.floats(1, 3))
@settings(deadline=None)
def test_few_nets_are_all_looked_at(speeds: list[float], wanted: float) -> None:
    true = [1.0, *speeds][:14]
    chosen, _ = first_fast(len(true), wanted, Bench(true))
    assert chosen == next((i for i, one in enumerate(true) if one >= wanted), None)


@given(st.integers(30, 900), st.floats(1.01, 3.9), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_many_nets_are_looked_at_where_it_matters(count: int, wanted: float, tooth: int) -> None:
    """A sawtooth by 5 percent: the choice is the first of all, and far from all were measured."""
    true = [(1 + 3 * i / count) * (1.05 if i % (tooth + 1) == tooth else 1.0) for i in range(count)]
    bench = Bench(true, noise=0.0)
    chosen, known = first_fast(count, wanted, bench)
    best = next((i for i, one in enumerate(true) if one >= wanted), None)
    assert chosen == best
    if count > 300:
        assert len(known) < count / 2


def test_what_decides_is_measured_again() -> None:
    """Few runs took nets 2 and 3 for fast ones and 4 for a slow one: more runs tell, of neighbours too."""
    true = [1.0, 1.1, 1.2, 1.25, 1.35, 1.5, 1.6, 1.7]
    few = [1.0, 1.1, 1.32, 1.31, 1.28, 1.5, 1.6, 1.7]
    bench = Bench(true, few)
    chosen, known = first_fast(len(true), 1.3, bench)
    assert chosen == 4
    again = [place for place, runs in bench.asked if runs == _MANY]
    assert sorted(again) == [1, 2, 3, 4, 5, 6] and len(again) == len(set(again))
    assert all(known[place].runs == (_MANY if place in again else _FEW) for place in known)


def test_a_net_that_few_runs_found_only_just_too_slow_is_measured_again() -> None:
    true, few = [1.0, 1.31, 1.1, 1.2, 1.5], [1.0, 1.29, 1.1, 1.2, 1.5]
    assert first_fast(5, 1.3, Bench(true, few, noise=0.02))[0] == 1
    assert first_fast(5, 1.3, Bench(true, few, noise=0.001))[0] == 4


# with a table


def pruned(model: Model, kept: dict[str, int]) -> Model:
    """The net with the first channels of some layers."""
    plan = Plan({name: PruneEntry(tuple(range(count))) for name, count in kept.items()})
    return hrank.apply(plan, model)[0]


def table(
    path: Path,
    model: Model,
    times: Sequence[float],
    noise: float = 0.01,
    block: int = BLOCK,
    runs: int = _MANY,
) -> Path:
    """A table that knows every net that one rate can come to; what it says of their kernels is another thing."""
    made = Table(machine(ENGINE), path, block)
    for rate, milliseconds in zip(RATES, times, strict=True):
        one = pruned(model, kept_at(rate, block)) if rate else model
        name = Drawing.of(find(one)).fingerprint
        made.nets[f"{name} by the clock"] = Measured(milliseconds / 1e3, noise, runs)
        made.nets[name] = Measured(7.0, noise, runs)
    made.write()
    return path


TIMES = [1.0, 0.9, 0.95, 0.6, 0.7, 0.5]  # at RATES
WITH = ("--cost", "latency", "--latency-table", "t.json", "--threads", "1", "--criterion", "l1")
NET = ("net.prototxt", "net.caffemodel")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = pruning.model(SOURCE)
    Path(NET[0]).write_text(SOURCE)
    assert model.weights is not None
    write_weights(model.weights, Path(NET[1]), hdf5=False)
    table(tmp_path / "t.json", model, TIMES)
    return tmp_path


def run(capsys: Capture, *arguments: str) -> tuple[str, str]:
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def refused(capsys: Capture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("caffe-lra: error: ") and err.count("\n") == 1
    assert not Path("p.prototxt").exists()
    return err


def prune(capsys: Capture, *more: str) -> dict[str, Any]:
    """What the command says as JSON; nothing was measured, as the table is as it was."""
    before = Path("t.json").read_bytes()
    found: dict[str, Any] = json.loads(run(capsys, "prune", *NET, "-o", "p", *WITH, "--json", *more)[0])
    assert Path("t.json").read_bytes() == before
    return found


def test_the_rate_that_removes_least_in_the_time(work: Path, capsys: Capture) -> None:
    for speedup, rate, time in (
        ("1.06", 1 / 4, 0.9),
        ("1.3", 1 / 2, 0.6),
        ("1.6", 1 / 2, 0.6),
        ("1.9", 3 / 4, 0.5),
    ):
        found = prune(capsys, "--speedup", speedup)
        plan = Plan.from_json(Path("p.plan.json").read_text())
        assert {name: len(keep) for name, keep in plan.keep.items()} == kept_at(rate)
        assert plan.target["rate"] == pytest.approx(rate) and plan.target["speedup"] == float(speedup)
        assert plan.predicted is not None and plan.predicted.ms == (1.0, time)
        assert plan.predicted.measured_on == conditions(ENGINE)
        assert found["speedup"]["latency_predicted"] == pytest.approx(1 / time)
        assert found["predicted"] == plan.predicted.to_dict()
        before, after = (cp.cost(cp.load(name)) for name in (NET[0], "p.prototxt"))
        assert found["speedup"]["macs"] == pytest.approx(before.macs / after.macs)
        assert plan.kept == {"d": "the kernels take all its channels at once: fewer would not be faster"}


def test_the_report_names_both_speedups_and_the_machine(work: Path, capsys: Capture) -> None:
    out, err = run(capsys, "prune", *NET, "-o", "p", *WITH, "--speedup", "1.5")
    here = conditions(ENGINE)
    assert err == "" and "MACs, whole net" in out
    lines = out.splitlines()
    assert f"{'time, predicted':20}{1.0:>14.3f} ms -> {0.6:>12.3f} ms  1.667x" in lines
    told = f"times measured on processor {here['processor']}, onnxruntime {here['onnxruntime']}, threads 1, provider cpu"
    assert told in lines


def test_a_dry_run_names_rate_and_times_and_writes_nothing(work: Path, capsys: Capture) -> None:
    before = sorted(Path().iterdir())
    dry = ("prune", NET[0], "--dry-run", "--speedup", "1.5", *WITH[:-2])
    out, err = run(capsys, *dry)
    assert err == "" and "rate of all layers: 0.5" in out.splitlines() and "1.667x" in out
    found = json.loads(run(capsys, *dry, "--json")[0])
    assert found["rate"] == 0.5 and found["predicted"]["predicted_ms"] == [1.0, 0.6]
    assert found["speedup"] == {"latency_predicted": pytest.approx(1 / 0.6)}
    assert found["macs"][1] == cp.cost(pruned(pruning.model(SOURCE), kept_at(0.5))).macs
    assert sorted(Path().iterdir()) == before


def test_limits_hold(work: Path, capsys: Capture) -> None:
    """Multiples of 8 as well: of 16, 12 and 8 channels 8, 8 and all stay; where parameters are to fall too, more goes."""
    model = pruning.model(SOURCE)
    made = Table.load(machine(ENGINE), Path("t.json"))
    for kept, time in (({"b": 8}, 0.8), ({"a": 8, "b": 8}, 0.4)):
        name = Drawing.of(find(pruned(model, kept))).fingerprint
        made.nets[f"{name} by the clock"] = Measured(time / 1e3, 0.01, _MANY)
    made.write()
    for speedup, wanted in (("1.2", {"b": 8}), ("1.5", {"a": 8, "b": 8})):
        prune(capsys, "--speedup", speedup, "--round-to", "8")
        plan = Plan.from_json(Path("p.plan.json").read_text())
        assert {name: len(keep) for name, keep in plan.keep.items()} == wanted
    params = [cp.cost(pruned(model, kept_at(rate))).params for rate in RATES[1:]]
    for place, rate in enumerate(RATES[1:]):
        factor = cp.cost(model).params / params[place]
        prune(capsys, "--speedup", "1.05", "--params", f"{factor - 1e-6:.6f}")
        plan = Plan.from_json(Path("p.plan.json").read_text())
        assert plan.target["rate"] == pytest.approx(rate) and plan.target["params"] > 1
    prune(capsys, "--speedup", "1.5", "--params", "1.01")  # the time asks for more
    assert Plan.from_json(Path("p.plan.json").read_text()).target["rate"] == pytest.approx(0.5)


def test_out_of_reach(work: Path, capsys: Capture) -> None:
    dry = ("prune", *NET, "-o", "p", *WITH)
    err = refused(capsys, *dry, "--speedup", "2.5")
    assert (
        "2.5 in time cannot be reached: of 6 nets measured the fastest is 2 times faster, at rate 0.75" in err
    )
    assert "--coupled" in err
    assert "parameters cannot be met" in refused(capsys, *dry, "--speedup", "1.1", "--params", "500")
    assert "a block of the kernels (4 channels)" in refused(capsys, *dry, "--speedup", "1.1", "--only", "d")
    assert "factor of 1 or more" in refused(capsys, *dry, "--speedup", "0.5")
    table(work / "t.json", pruning.model(SOURCE), TIMES, noise=0.3)
    assert "scatter by 30%" in refused(capsys, *dry, "--speedup", "2.5")


def test_noise_is_told(work: Path, capsys: Capture) -> None:
    table(work / "t.json", pruning.model(SOURCE), TIMES, noise=0.3)
    err = run(capsys, "prune", *NET, "-o", "p", *WITH, "--speedup", "1.9")[1]
    assert "warning: the plan's times scatter by 30%" in err
    assert Plan.from_json(Path("p.plan.json").read_text()).target["noise"] == 0.3
    assert "scatter by 30%" in run(capsys, "prune", *NET, "--dry-run", *WITH[:-2], "--speedup", "1.9")[1]
    assert "scatter by 30%" in json.loads(run(capsys, "prune", *NET, "-o", "q", *WITH, "--speedup", "1.9", "--json")[0])["warnings"][0]  # fmt: skip


def test_a_plan_elsewhere_warns(work: Path, capsys: Capture) -> None:
    prune(capsys, "--speedup", "1.5")
    first = Path("p.caffemodel").read_bytes()
    again = ("prune", *NET, "-o", "again", "--plan", "p.plan.json")
    out, err = run(capsys, *again, "--threads", "1")
    assert err == "" and "1.667x" in out and Path("again.caffemodel").read_bytes() == first
    assert "threads 1; here threads 2" in run(capsys, *again, "--threads", "2")[1]
    carry = ("apply", "p.plan.json", *NET, "-o", "again")
    out, err = run(capsys, *carry)
    assert err == "" and "times measured on processor" in out
    assert run(capsys, *carry, "--threads", "1")[1] == ""
    assert "threads 1; here threads 2" in run(capsys, *carry, "--threads", "2")[1]
    text = Path("p.plan.json").read_text()
    release = conditions(ENGINE)["onnxruntime"]
    Path("p.plan.json").write_text(text.replace(release, "0.1"))
    for command in (carry, (*again, "--threads", "1")):
        assert f"onnxruntime 0.1; here onnxruntime {release}" in run(capsys, *command)[1]
    Path("p.plan.json").write_text(text.replace('"noise": 0.01', '"noise": "little"'))
    Path("p.prototxt").unlink()
    assert '"noise"' in refused(capsys, *carry)


def test_then_decompose_counts_macs(work: Path, capsys: Capture) -> None:
    found = prune(capsys, "--speedup", "1.06", "--then-decompose", "2")
    assert found["speedup"]["total_macs"] >= 2 and found["speedup"]["latency_predicted"] == pytest.approx(
        1 / 0.9
    )
    both = json.loads(Path("p.plan.json").read_text())
    assert both["prune"]["target"]["predicted_ms"] == [1.0, 0.9]
    assert both["decompose"]["target"].get("cost") is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--rates", "[0.5]*4"), "--cost only goes with --speedup"),
        (("--rate-config", "rates.json"), "--cost only goes with --speedup"),
        (("--params", "2"), "--cost only goes with --speedup"),
        (("--speedup", "1.5", "--mask-only"), "does not go with --mask-only"),
        (("--speedup", "1.5", "--rates", "[0.5]*4"), "give exactly one of"),
    ],
)
def test_what_has_no_time_is_refused(work: Path, capsys: Capture, more: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, "prune", *NET, "-o", "p", *WITH, *more)


def test_options_of_time_alone_are_refused(work: Path, capsys: Capture) -> None:
    dry = ("prune", *NET, "-o", "p", "--criterion", "l1")
    more = ("--speedup", "1.5", "--latency-table", "t.json")
    assert "only goes with --cost latency" in refused(capsys, *dry, *more)
    plan = ("prune", *NET, "-o", "p", "--plan", "x.plan.json", "--cost", "latency")
    assert "--cost only goes with --speedup" in refused(capsys, *plan)
    typo = ("--speedup", "1.5", "--cost", "latency", "--latency-table", "typo/t.json")
    assert "there is no folder 'typo'" in refused(capsys, *dry, *typo)


def test_the_package_plans_by_time_as_well(work: Path, capsys: Capture) -> None:
    prune(capsys, "--speedup", "1.5")
    wanted = Plan.from_json(Path("p.plan.json").read_text())
    model, asked = cp.load(*NET), {"speedup": 1.5, "criterion": "l1", "cost": "latency"}
    plan = hrank.make_plan(model, latency_table="t.json", threads=1, **asked)
    assert plan == wanted
    with pytest.raises(UsageError, match="no cost"):
        hrank.make_plan(model, **(asked | {"cost": "money"}))
    with pytest.raises(UsageError, match="speed-up"):
        hrank.make_plan(model, **(asked | {"speedup": None, "params": 2.0}))
    with pytest.raises(UsageError, match="no masks"):
        limits = hrank.Limits(masks=True)
        hrank.make_plan(model, latency_table="t.json", threads=1, limits=limits, **asked)


def test_without_times_and_images_nothing_heavy_is_waited_for(work: Path) -> None:
    program = (
        "import sys; from lra.cli import main; code = main(sys.argv[1:]);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'onnx', 'onnxruntime', 'torch'}))"
    )
    arguments = ("prune", *NET, "-o", "p", "--speedup", "1.5", "--criterion", "l1")
    made = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == "[]"


# measured here


def test_missing_and_hasty_times_are_measured(work: Path, capsys: Capture) -> None:
    """A table that lacks a net or knows it by few runs gets it; what it knows by many stays, the whole net's time too."""
    model = pruning.model(SOURCE)
    name = f"{Drawing.of(find(pruned(model, kept_at(0.5)))).fingerprint} by the clock"
    whole = f"{Drawing.of(find(model)).fingerprint} by the clock"
    for known in (None, Measured(6e-4, 0.01, _FEW)):
        made = Table.load(machine(ENGINE), table(work / "t.json", model, TIMES))
        before = dict(made.nets)
        Path("t.json").unlink()
        made.nets.pop(name)
        made.nets |= {} if known is None else {name: known}
        made.write()
        run(capsys, "prune", *NET, "-o", "p", *WITH, "--speedup", "1.3")
        after = Table.load(machine(ENGINE), Path("t.json")).nets
        assert after.keys() == before.keys() and after[name].runs == _MANY and after[name] != before[name]
        assert {key: one for key, one in after.items() if key != name} == {key: one for key, one in before.items() if key != name}  # fmt: skip
        assert after[whole] == before[whole]
        assert 1e-4 < after[name].seconds < 1e-2  # told in the terms of a whole net of 1 ms


def test_lenet_measured_here(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real machine: what is written is as fast as was asked, by the table, and a second plan is the same."""
    lenet = ROOT / "models" / "lenet"
    monkeypatch.chdir(tmp_path)
    files = (str(lenet / "lenet.prototxt"), str(lenet / "lenet.caffemodel"))
    arguments = ("prune", *files, "-o", "p", *WITH, "--speedup", "1.02", "--json")
    code = main(arguments)
    out, err = capsys.readouterr()
    if code == 2:  # on some machines nothing of so small a net is faster
        assert "cannot be reached: of " in err or "a block of the kernels" in err
        return
    found = json.loads(out)
    assert found["speedup"]["latency_predicted"] >= 1.02 * (1 - 1e-4)
    known = Table.load(machine(ENGINE), Path("t.json"))
    small, whole = (
        known.nets[f"{Drawing.of(find(cp.load(name))).fingerprint} by the clock"]
        for name in ("p.prototxt", files[0])
    )
    assert found["predicted"]["predicted_ms"] == pytest.approx([1e3 * whole.seconds, 1e3 * small.seconds])
    assert small.runs == _MANY
    plan, times = Path("p.plan.json").read_bytes(), Path("t.json").read_bytes()
    assert main(arguments) == 0
    assert (Path("p.plan.json").read_bytes(), Path("t.json").read_bytes()) == (plan, times)
