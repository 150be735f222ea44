"""Plans by measured time, from tables whose times are made up: which ranks they choose, and what they say of them.

No test depends on how long anything takes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, cast

import nets
import numpy as np
import onnxruntime
import pytest

import lra
from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.runtime import Engine
from lra import Plan
from lra.cli import main
from lra.decomposition import StepShape
from lra.latency import Latency
from lra.latency_plan import Prices
from lra.latency_probe import Drawing, as_is
from lra.latency_table import Chain, Measured, Table, conditions, machine
from lra.options import retained
from lra.plan import LayerPlan
from lra.schemes import ALL_SCHEMES
from lra.targets import Found, Spectra, find

BLOCK, NOISE = 4, 0.01
ENGINE = Engine(1)
REST = 3e-5  # seconds of what is not decomposed
Seconds = Callable[[Chain], float]

NET = (
    nets.inputs(data=(1, 24, 16, 16))
    + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 32 kernel_size: 3 pad: 1 } }
layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 48 kernel_size: 3 pad: 1 group: 2 } }
layer { name: "c" type: "Convolution" bottom: "b" top: "c" convolution_param { num_output: 32 kernel_size: 1 } }
layer { name: "pool" type: "Pooling" bottom: "c" top: "pool" pooling_param { pool: AVE global_pooling: true } }
layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip" inner_product_param { num_output: 10 } }
"""
)
MODEL = nets.model(NET)


def stairs(chain: Chain) -> float:
    """Seconds of kernels that take outputs and inputs 16 at a time, and a little for each kernel."""
    return sum(1e-5 + 1e-6 * blocks(step) * step.shape[2] * step.shape[3] for step in chain)


def blocks(step: StepShape) -> int:
    out, depth = step.shape[0] // step.group, step.shape[1]
    return step.group * ceil(out / 16) * ceil(depth / 16) * 5


def bumpy(chain: Chain) -> float:
    """The same, but every chain of a rank that is 12, 20, ... takes three times as long."""
    return stairs(chain) * (3 if len(chain) > 1 and chain[0].shape[0] % 8 else 1)


def table(
    path: Path, model: Model = MODEL, seconds: Seconds = stairs, noise: float = NOISE, engine: Engine = ENGINE
) -> Path:
    """A table that knows every chain of blocks for every layer of a net, written by its own writer."""
    found = find(model)
    drawing = Drawing.of(found)
    made = Table(machine(engine), path, BLOCK)
    total = REST
    for target in found.targets.values():
        place, unit = drawing.place(target), BLOCK * target.geometry.group
        chains = [as_is(target)]
        for name in ("pca", "spatial", "spatial-hv"):
            most = ALL_SCHEMES[name].max_rank(target.shape, target.geometry.group)
            chains += [
                ALL_SCHEMES[name].chain(target.shape, target.geometry, (rank,))
                for rank in range(unit, most + 1, unit)
            ]
        most = ALL_SCHEMES["spatial"].max_rank(target.shape, target.geometry.group)
        grid = itertools.product(range(unit, most + 1, unit), range(unit, target.shape[0] + 1, unit))
        chains += [ALL_SCHEMES["asymmetric-3d"].chain(target.shape, target.geometry, one) for one in grid]
        for chain in chains:
            made.put(place, chain, Measured(seconds(chain), noise, 10))
        total += seconds(as_is(target))
    made.nets[drawing.fingerprint] = Measured(total, noise, 10)
    made.write()
    return path


def planned(path: Path, model: Model = MODEL, **asked: Any) -> Plan:
    """A plan by the table's times; nothing is measured."""
    before = path.read_bytes()
    latency = Latency(find(model), ENGINE, path)
    plan = lra.make_plan(model, cost="latency", latency=latency, **({"speedup": 1.3} | asked))
    assert path.read_bytes() == before
    return plan


def took(entry: LayerPlan, found: Found, name: str, seconds: Seconds = stairs) -> float:
    target = found.targets[name]
    return seconds(ALL_SCHEMES[entry.scheme].chain(target.shape, target.geometry, entry.ranks))


def lost(entry: LayerPlan, found: Found, name: str) -> float:
    """-log of the energy retained, from the weights."""
    scheme = ALL_SCHEMES[entry.scheme]
    return float(-np.log(retained(found.targets[name], scheme, Spectra(found), entry.ranks)))


def test_the_budget_is_time_and_holds(tmp_path: Path) -> None:
    path, found = table(tmp_path / "t.json"), find(MODEL)
    names = ("a", "b", "c")
    whole = REST + sum(stairs(as_is(target)) for target in found.targets.values())
    for speedup in (1.1, 1.3, 1.6):
        plan = planned(path, speedup=speedup)
        after = whole - sum(
            stairs(as_is(found.targets[name])) - took(entry, found, name)
            for name, entry in plan.layers.items()
        )
        assert after <= whole / speedup * (1 + 1e-9)
        assert plan.predicted is not None
        assert plan.predicted.ms == pytest.approx((1e3 * whole, 1e3 * after), rel=1e-4)
        assert set(plan.layers) <= set(names)
        for name, entry in plan.layers.items():
            dense = stairs(as_is(found.targets[name]))
            assert entry.ms == pytest.approx((1e3 * dense, 1e3 * took(entry, found, name)), rel=1e-4)


def test_no_other_choice_in_this_time_loses_less(tmp_path: Path) -> None:
    """All choices of ranks of two layers, one after another; and the bound, from the lines that carry them."""
    path, found, speedup = table(tmp_path / "t.json"), find(MODEL), 1.4
    plan = planned(path, speedup=speedup, only=["a", "b"], scope="eligible")
    assert plan.predicted is not None
    rows: list[list[tuple[float, float]]] = []
    for name in ("a", "b"):
        target = found.targets[name]
        dense = stairs(as_is(target))
        made = [(dense, 0.0)]
        for scheme in ("pca", "spatial"):
            unit = BLOCK * target.geometry.group
            most = ALL_SCHEMES[scheme].max_rank(target.shape, target.geometry.group)
            for rank in range(unit, most + 1, unit):
                entry = LayerPlan(scheme, (rank,))
                if (time := took(entry, found, name)) < dense * (1 - NOISE):
                    made.append((time, lost(entry, found, name)))
        rows.append(made)
    budget = sum(row[0][0] for row in rows) / speedup
    best = min(x[1] + y[1] for x in rows[0] for y in rows[1] if x[0] + y[0] <= budget * (1 + 1e-12))
    mine = sum(lost(entry, found, name) for name, entry in plan.layers.items())
    assert mine == pytest.approx(best)
    prices = [(y[1] - x[1]) / (x[0] - y[0]) for row in rows for x in row for y in row if x[0] > y[0]]
    bound = max(
        sum(min(loss + t * time for time, loss in row) for row in rows) - t * budget for t in prices if t >= 0
    )
    assert plan.predicted.gap == pytest.approx(mine - bound, rel=0.01)


def test_ranks_fill_the_blocks_and_climb_the_stairs_to_their_edge(tmp_path: Path) -> None:
    """17 filters would take as long as 32: whatever is chosen stands at the upper edge of a step."""
    found = find(MODEL)
    plan = planned(table(tmp_path / "t.json"), speedup=1.5)
    assert plan.layers
    for name, entry in plan.layers.items():
        target = found.targets[name]
        scheme, group = ALL_SCHEMES[entry.scheme], target.geometry.group
        unit = BLOCK * group
        assert entry.ranks[0] % unit == 0
        above = entry.ranks[0] + unit
        cheaper = (
            above <= scheme.max_rank(target.shape, group) and target.chain_cost(scheme, above) < target.macs
        )
        if cheaper:
            assert took(LayerPlan(entry.scheme, (above,)), found, name) > took(entry, found, name)


def test_ranks_that_are_slower_than_higher_ones_are_not_taken(tmp_path: Path) -> None:
    path, found = table(tmp_path / "t.json", seconds=bumpy), find(MODEL)
    plan = planned(path, speedup=1.3)
    assert plan.layers
    for name, entry in plan.layers.items():
        assert entry.ranks[0] % 8 == 0, name
        assert took(entry, found, name, bumpy) < bumpy(as_is(found.targets[name]))


def test_the_same_table_gives_the_same_plan(tmp_path: Path) -> None:
    path = table(tmp_path / "t.json")
    assert planned(path).to_json() == planned(path).to_json()
    again = Plan.from_json(planned(path).to_json())
    assert again == planned(path) and again.predicted == planned(path).predicted


def test_layers_that_no_chain_makes_faster_stay_whole(tmp_path: Path) -> None:
    found = find(MODEL)
    slow = as_is(found.targets["c"])

    def seconds(chain: Chain) -> float:
        return 1e-6 if chain == slow else stairs(chain)

    plan = planned(table(tmp_path / "t.json", seconds=seconds))
    assert plan.kept["c"] == "no chain is faster here" and "c" not in plan.layers
    assert plan.kept["ip"].startswith("fully connected")


def test_a_gain_within_the_noise_counts_for_nothing(tmp_path: Path) -> None:
    """Every chain of b is faster by a tenth: by times that scatter by 5 % it is taken, by 15 % it is not."""
    found = find(MODEL)
    dense = as_is(found.targets["b"])

    def seconds(chain: Chain) -> float:
        if chain == dense:
            return 1e-3
        of_b = chain[0].group == 2
        return 0.9e-3 if of_b else stairs(chain)

    for noise, chosen in ((0.05, True), (0.15, False)):
        path = table(tmp_path / f"{noise}.json", seconds=seconds, noise=noise)
        plan = planned(path, speedup=1.05)
        assert ("b" in plan.layers) == chosen
        assert plan.predicted is not None and plan.predicted.noise == noise
    assert plan.kept["b"] == "no chain is faster here by more than the times scatter (15%)"


def test_a_speedup_out_of_reach_says_what_is_in_reach(tmp_path: Path) -> None:
    path = table(tmp_path / "t.json")
    with pytest.raises(UsageError) as caught:
        planned(path, speedup=50)
    assert "a speed-up of 50 of the whole net cannot be reached: at best it is" in caught.value.message
    most = float(caught.value.message.split()[-1])
    assert planned(path, speedup=most).layers
    with pytest.raises(UsageError, match="at best it is"):
        planned(path, speedup=most * 1.02)
    with pytest.raises(UsageError, match="layers to decompose cannot be reached"):
        planned(path, speedup=50, scope="eligible")


@pytest.mark.parametrize("same", [False, True])
def test_three_layers_from_a_grid_of_whole_chains(tmp_path: Path, same: bool) -> None:
    found = find(MODEL)
    path = table(tmp_path / "t.json")
    prices = Prices(Latency(found, ENGINE, path), same_ranks=same)
    scheme = ALL_SCHEMES["asymmetric-3d"]
    targets = [found.targets[name] for name in ("a", "b")]
    prices.measure(targets, {target.name: [scheme] for target in targets})
    for target in targets:
        offered = prices.options(target, [scheme], lambda *_: 0.5)
        assert offered[0].cost == pytest.approx(stairs(as_is(target))) and offered[0].key is None
        assert len(offered) > 1
        chains = set()
        for one in offered[1:]:
            name, ranks = cast(tuple[str, tuple[int, int]], one.key)
            chain = scheme.chain(target.shape, target.geometry, ranks)
            assert name == "asymmetric-3d" and one.cost == pytest.approx(stairs(chain), rel=1e-4)
            assert all(rank % (BLOCK * target.geometry.group) == 0 for rank in ranks)
            assert not same or ranks[0] == ranks[1]
            assert target.chain_cost(scheme, *ranks) < target.macs
            assert (len(chain) == 2) == (ranks[1] == target.shape[0])
            chains.add(chain)
        assert len(chains) == len(offered) - 1
    assert not prices.options(targets[0], [scheme], lambda *_: float("inf"))[1:]


def test_round_to_holds_too(tmp_path: Path) -> None:
    plan = planned(table(tmp_path / "t.json"), round_to=6)
    assert plan.layers and all(rank % 12 == 0 for entry in plan.layers.values() for rank in entry.ranks)


def test_layers_that_share_a_weight_are_treated_alike(tmp_path: Path) -> None:
    conv = 'layer {{ name: "{0}" type: "Convolution" bottom: "{1}" top: "{0}" param {{ name: "w" }} convolution_param {{ num_output: 32 kernel_size: 3 pad: 1 bias_term: false }} }}\n'
    source = nets.inputs(data=(1, 32, 12, 12)) + conv.format("one", "data") + conv.format("two", "one")
    model = nets.model(source)
    plan = planned(table(tmp_path / "t.json", model), model, speedup=1.3)
    assert plan.layers["one"].ranks == plan.layers["two"].ranks
    assert plan.layers["one"].scheme == plan.layers["two"].scheme
    lra.apply(plan, model)


def test_with_images_losses_are_of_responses(tmp_path: Path) -> None:
    """The measured harm decides instead of energies, the times stay those of the table."""
    images = np.random.default_rng(0).standard_normal((6, 24, 16, 16)).astype(np.float32)
    plan = planned(table(tmp_path / "t.json"), images=images, speedup=1.4)
    found = find(MODEL)
    assert plan.predicted is not None and plan.target["fit"]
    whole, after = plan.predicted.ms
    assert after <= whole / 1.4 * (1 + 1e-4)
    treated = {name: entry for name, entry in plan.layers.items() if entry.scheme != "refit"}
    assert treated
    for name, entry in treated.items():
        assert entry.ms is not None
        assert entry.ms[1] == pytest.approx(1e3 * took(entry, found, name), rel=1e-4)
        assert all(rank % BLOCK == 0 for rank in entry.ranks)
    changed, report = lra.apply(plan, MODEL, images=images, engine=ENGINE)
    assert report.predicted == plan.predicted and not [w for w in report.warnings if "measured" in w]
    assert changed.net.layers


def test_a_plan_says_where_its_times_are_from(tmp_path: Path) -> None:
    plan = planned(table(tmp_path / "t.json"))
    assert plan.target["cost"] == "latency" and plan.target["speedup"] == 1.3
    assert plan.target["measured_on"] == conditions(ENGINE)
    assert conditions(ENGINE)["onnxruntime"] == onnxruntime.__version__
    assert plan.target["gap"] >= 0 and len(plan.target["predicted_ms"]) == 2


@pytest.mark.parametrize(
    ("key", "value", "engine", "said"),
    [
        ("processor", "Abacus 3", None, "processor Abacus 3; here processor "),
        ("onnxruntime", "0.1", ENGINE, "onnxruntime 0.1; here onnxruntime "),
        ("threads", 7, ENGINE, "threads 7; here threads 1"),
        ("provider", "cuda", ENGINE, "provider cuda; here provider cpu"),
        ("threads", 7, None, None),  # nobody says how the net shall run
    ],
)
def test_times_of_elsewhere_are_told(
    tmp_path: Path, key: str, value: object, engine: Engine | None, said: str | None
) -> None:
    plan = planned(table(tmp_path / "t.json"))
    assert lra.apply(plan, MODEL, engine=ENGINE)[1].warnings == ()
    plan.target["measured_on"] = {**plan.target["measured_on"], key: value}
    warnings = lra.apply(plan, MODEL, engine=engine)[1].warnings
    if said is None:
        assert warnings == ()
    else:
        assert len(warnings) == 1 and said in warnings[0]


def test_noise_is_told(tmp_path: Path) -> None:
    plan = planned(table(tmp_path / "t.json", noise=0.2), speedup=1.1)
    (warning,) = lra.apply(plan, MODEL, engine=ENGINE)[1].warnings
    assert "scatter by 20%" in warning


@pytest.mark.parametrize(
    "change",
    [{"gap": None}, {"noise": "little"}, {"measured_on": "here"}, {"predicted_ms": [1]}, {"predicted_ms": 3}],
)
def test_a_plan_that_is_not_complete_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = planned(table(tmp_path / "t.json"))
    plan.target.update(change)
    with pytest.raises(PlanError):
        lra.apply(plan, MODEL)


def test_milliseconds_of_a_layer_are_numbers() -> None:
    with pytest.raises(PlanError, match="milliseconds"):
        LayerPlan.from_dict("a", {"scheme": "pca", "ranks": [8], "ms": [1, "2"]})


@pytest.mark.parametrize(
    "asked",
    [
        {"speedup": None, "energy": 0.9},
        {"scope": "conv"},
        {"selection": "uniform", "scheme": "pca"},
        {"cost": "money"},
    ],
)
def test_what_has_no_time_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    given: dict[str, Any] = {"cost": "latency", "speedup": 1.3} | asked
    with pytest.raises(UsageError):
        lra.make_plan(MODEL, **given)


# the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    nets.files(tmp_path, NET)
    table(tmp_path / "t.json")
    return tmp_path


WITH = ("--cost", "latency", "--latency-table", "t.json", "--threads", "1")


def test_the_command_end_to_end(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("decompose", "net.prototxt", "net.caffemodel", "-o", "fast", "--speedup", "1.3", *WITH)
    out, err = run(capsys, *arguments)
    assert err == "" and "MACs, whole net" in out and "time, predicted" in out and "gap: " in out
    found = json.loads(run(capsys, *arguments, "--json", "--time")[0])
    plan = Plan.from_json(Path("fast.plan.json").read_text())
    assert plan.predicted is not None
    before, after = plan.predicted.ms
    assert found["speedup"]["latency_predicted"] == pytest.approx(before / after)
    assert found["speedup"]["latency_predicted"] >= 1.3 * (1 - 1e-4)
    measured = {row["name"]: row for row in found["gains"]}
    assert measured.keys() >= {row["name"] for row in found["layers"]}
    for row in found["layers"]:
        assert measured[row["name"]]["macs"] == row["macs"]
    assert all(("why" in row) == (row.get("efficiency", 1.0) < 0.8) for row in found["gains"])
    medians = found["latency_ms"]
    assert found["speedup"]["latency"] == pytest.approx(medians[0] / medians[1])
    assert found["speedup"]["efficiency"] == pytest.approx(
        found["speedup"]["latency"] / found["speedup"]["macs"]
    )
    assert found["predicted"]["measured_on"] == conditions(ENGINE)
    layers = {row["name"]: row["ms"] for row in found["layers"]}
    assert layers == {name: list(entry.ms or ()) for name, entry in plan.layers.items()}
    # the plan again: the same bytes; with other threads a word about it
    first = Path("fast.caffemodel").read_bytes()
    again = ("decompose", "net.prototxt", "net.caffemodel", "-o", "again", "--plan", "fast.plan.json")
    assert run(capsys, *again, "--threads", "1")[1] == ""
    assert Path("again.caffemodel").read_bytes() == first
    assert "threads 1; here threads 2" in run(capsys, *again, "--threads", "2")[1]


def test_apply_compares_what_it_knows(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs no net: threads count where they are said; where the plan was measured stands in its report."""
    run(capsys, "decompose", "net.prototxt", "net.caffemodel", "-o", "fast", "--speedup", "1.3", *WITH)
    carry = ("apply", "fast.plan.json", "net.prototxt", "net.caffemodel", "-o", "again")
    here = conditions(ENGINE)
    told = f"times measured on processor {here['processor']}, onnxruntime {here['onnxruntime']}, threads 1, provider cpu"
    out, err = run(capsys, *carry)
    assert err == "" and told in out.splitlines()
    assert run(capsys, *carry, "--threads", "1")[1] == ""
    assert "threads 1; here threads 2" in run(capsys, *carry, "--threads", "2")[1]
    text = Path("fast.plan.json").read_text()
    Path("fast.plan.json").write_text(text.replace(here["onnxruntime"], "0.1"))
    assert "onnxruntime 0.1; here onnxruntime" in run(capsys, *carry)[1]


def test_plan_only_says_its_doubts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table(work / "t.json", noise=0.3)
    out, err = run(
        capsys, "decompose", "net.prototxt", "net.caffemodel", "--plan-only", "--speedup", "1.05", *WITH
    )
    assert json.loads(out)["target"]["noise"] == 0.3 and "scatter by 30%" in err


def test_the_batch_is_that_of_all_inputs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("decompose", "net.prototxt", "net.caffemodel", "-o", "fast", "--energy", "0.5", "--json")
    one, four = (json.loads(run(capsys, *arguments, *more)[0]) for more in ((), ("--batch", "4")))
    assert [4 * macs for macs in one["macs"]] == four["macs"]


def test_a_table_in_no_folder_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "decompose",
        "net.prototxt",
        "net.caffemodel",
        "-o",
        "fast",
        "--speedup",
        "1.3",
        "--cost",
        "latency",
    )
    assert main((*arguments, "--latency-table", "typo/t.json")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("caffe-lra: error: typo/t.json: there is no folder 'typo'")
    assert not Path("typo").exists() and not Path("fast.prototxt").exists()


@pytest.mark.parametrize(
    "more",
    [
        ("--energy", "0.5", "--cost", "latency"),
        ("--speedup", "1.3", "--latency-table", "t.json"),
        ("--speedup", "1.3", "--cost", "latency", "--scope", "conv"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    work: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    assert main(("decompose", "net.prototxt", "net.caffemodel", "-o", "fast", *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("caffe-lra: error: ") and err.count("\n") == 1
    assert not Path("fast.prototxt").exists()


def test_lenet_measured_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the real machine: the table is filled, and what is written afterwards holds no more than it says."""
    lenet = Path(__file__).resolve().parents[1] / "models" / "lenet"
    monkeypatch.chdir(tmp_path)
    arguments = ("decompose", str(lenet / "lenet.prototxt"), str(lenet / "lenet.caffemodel"), "-o", "fast")
    code = main((*arguments, "--speedup", "1.02", "--fc", "--batch", "8", *WITH, "--json"))
    out, err = capsys.readouterr()
    assert Path("t.json").is_file()
    if code == 2:  # on some machines nothing of so small a net is faster
        assert "at best it is" in err
        return
    found = json.loads(out)
    assert found["speedup"]["latency_predicted"] >= 1.02 * (1 - 1e-4)
    machines = json.loads(Path("t.json").read_text())["machines"]
    assert list(machines) == [machine(ENGINE)]


def made_up(monkeypatch: pytest.MonkeyPatch, truth: Seconds) -> list[int]:
    """Runs that take what ``truth`` says, the second of them in a moment twice as slow; the rounds asked for."""
    asked: list[int] = []

    def side_by_side(drawing, choices, engine, overhead, rounds):  # type: ignore[no-untyped-def]
        asked.append(rounds)
        named = {name: target for choice in choices for name, (target, _) in choice.items()}
        slow = [2.0 if i == 1 else 1.0 for i in range(rounds)]
        plain = [{name: by * truth(as_is(one)) for name, one in named.items()} for by in slow]
        others = [
            [{name: by * truth(chain) for name, (_, chain) in choice.items()} for by in slow]
            for choice in choices
        ]
        return plain, others

    monkeypatch.setattr("lra.latency.side_by_side", side_by_side)
    return asked


def test_what_noisy_times_decide_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chain of a was measured a thousand times too fast: it is chosen, measured anew, and then is not."""
    found = find(MODEL)
    a = found.targets["a"]
    lucky = ALL_SCHEMES["spatial"].chain(a.shape, a.geometry, (28,))

    def seen(chain: Chain) -> float:
        return stairs(chain) / (1000 if chain == lucky else 1)

    made_up(monkeypatch, stairs)
    true = planned(table(tmp_path / "true.json"), speedup=1.3)
    path = table(tmp_path / "t.json", seconds=seen, noise=0.08)
    latency = Latency(found, ENGINE, path)
    fooled = lra.make_plan(MODEL, cost="latency", latency=latency, speedup=1.3)
    assert fooled.layers["a"].ranks == (28,) and not latency.measuring  # by the table alone
    latency.measuring = True
    settled = lra.make_plan(MODEL, cost="latency", latency=latency, speedup=1.3)
    assert {name: (one.scheme, one.ranks) for name, one in settled.layers.items()} == {
        name: (one.scheme, one.ranks) for name, one in true.layers.items()
    }
    kept = Latency(found, ENGINE, path)
    assert kept.seconds(a, lucky) == pytest.approx(stairs(lucky)) and kept.table.get(
        kept.drawing.place(a), lucky
    ) == Measured(pytest.approx(stairs(lucky)), 0.0, 24)  # type: ignore[arg-type]
    assert planned(path, speedup=1.3).layers == settled.layers


def test_what_was_settled_is_not_measured_again_and_quiet_times_need_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = made_up(monkeypatch, stairs)
    found = find(MODEL)
    for noise, rounds in ((0.03, []), (0.05, [24])):
        latency = Latency(found, ENGINE, table(tmp_path / f"{noise}.json", noise=noise))
        targets = list(found.targets.values())
        chains = {one.name: ALL_SCHEMES["pca"].chain(one.shape, one.geometry, (16,)) for one in targets[:2]}
        for target in targets:
            latency.seconds(target)
        assert latency.settle(targets, chains) == bool(rounds)
        assert not latency.settle(targets, chains)
        assert asked == rounds
        for target in targets[:2]:
            got = latency.seconds(target, chains[target.name])
            assert got == pytest.approx(stairs(chains[target.name]))
