"""The page about a changed net: its figures are the files' and the plan's, its text is escaped, it stands alone."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import nets
import numpy as np
import pytest
from test_merging import NET as MERGING

pytest.importorskip("matplotlib", reason="needs the extra report")

import caffe_proto as cp
import hrank
import lra
from caffe_proto import console, net
from caffe_proto.errors import FileError
from caffe_proto.model import Model, save, write_weights
from caffe_proto.weights import NewEntry, Weights
from hrank import coupling
from hrank.joint import Joint, decompose_rest
from lra import report, report_given
from lra.cli import main
from lra.cli_report import report as command

ROOT = Path(__file__).resolve().parents[1]
GROUP = click.Group(commands={"report": command})
VOID = {"meta", "path", "rect", "use", "line", "br"}
Capture = pytest.CaptureFixture[str]

HOSTILE = [
    "<script>alert(1)</script>",
    "a\"b'&amp;",
    "$x_1$ </svg>",
    'id="x url(#x)',
    "tab\\tend",
    "\\377odd",
    "ö世",
]
"""Names as they stand in a prototxt; \\t and \\377 are escapes of its text format."""


class Page(HTMLParser):
    """A page taken apart: tags with their attributes, texts by tag, tables by id; every tag must be closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(found["id"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag in ("text", "title", "h2", "pre", "p"):
            self.words.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open and self._open[-1] == tag, (tag, self._open)
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data
        elif self._open and self._open[-1] in self.words:
            self.words[self._open[-1]][-1] += data

    @property
    def ids(self) -> list[str]:
        return [found["id"] for _, found in self.tags if "id" in found]

    def layer(self, name: str) -> list[str]:
        """The row of one layer."""
        (row,) = [row for row in self.tables["layers"][1:] if row[0] == name]
        return row


def run(*arguments: str) -> int:
    return console.run(GROUP, ["report", *arguments])


def made(*arguments: str) -> str:
    """The page that a command writes; it must succeed."""
    assert run(*arguments, "-o", "out.html") == 0
    return Path("out.html").read_text("utf-8")


def decomposed(plan: lra.Plan, model: Model, images: Any = None) -> None:
    """x.prototxt, x.caffemodel, x.plan.json of a net."""
    changed, _ = lra.apply(plan, model, images=images)
    save(changed, "x.prototxt", "x.caffemodel" if changed.weights is not None else None)
    Path("x.plan.json").write_text(plan.to_json())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """net.prototxt, net.caffemodel, and what a plan of three schemes made of them, in the present folder."""
    monkeypatch.chdir(tmp_path)
    paths = nets.files(tmp_path)
    given = {"conv1": _entry("spatial", 7), "conv2": _entry("svd", 6), "ip1": _entry("kmeans", 9)}
    model = cp.load(*paths)
    decomposed(lra.make_plan(model, rank_config=given, fc=True, even_if_slower=True), model)
    return "net.prototxt", "net.caffemodel"


def _entry(scheme: str, *ranks: int) -> Any:
    return lra.plan.LayerPlan(scheme, ranks)


def test_figures_of_the_table_are_the_files_and_the_plans(files: tuple[str, str]) -> None:
    found = Page(made("x", *files))
    plan = lra.Plan.from_json(Path("x.plan.json").read_text())
    before, after = cp.cost(cp.load(*files)), cp.cost(cp.load("x.prototxt", "x.caffemodel"))
    assert list(plan.layers) == ["conv1", "conv2", "ip1"]
    for name, entry in plan.layers.items():
        row, chain = found.layer(name), [one for one in after.layers if one.name.startswith(name)]
        assert len(chain) == 2 and entry.macs is not None and entry.error is not None
        params = before.by_layer[name].params, sum(one.params for one in chain)
        assert row[1] == entry.scheme
        assert row[3:6] == [f"{n:,}" for n in entry.macs] + [f"{entry.macs[0] / entry.macs[1]:.2f}x"]
        assert entry.macs == (before.by_layer[name].macs, sum(one.macs for one in chain))
        assert row[6:9] == [f"{n:,}" for n in params] + [f"{params[0] / params[1]:.2f}x"]
        assert row[9] == f"{entry.error:.4f}"
    # svd and spatial cut the energy of the weights, so the file is as far apart as the plan says
    assert [found.layer(name)[9] for name in ("conv1", "conv2")] == [
        found.layer(name)[10] for name in ("conv1", "conv2")
    ]
    assert [found.layer(name)[2] for name in plan.layers] == ["7/15", "6/24", "9/30"]
    conv3 = before.by_layer["conv3"]
    assert found.layer("conv3") == [
        "conv3", "", "", *[f"{conv3.macs:,}"] * 2, "1.00x", *[f"{conv3.params:,}"] * 2, "1.00x", "", "",
    ]  # fmt: skip
    total = found.tables["layers"][-1]
    assert total[3:5] + total[6:8] == [
        f"{n:,}" for n in (before.macs, after.macs, before.params, after.params)
    ]


def test_every_part_is_there_and_well_formed(files: tuple[str, str]) -> None:
    source = made("x", *files)
    found = Page(source)
    assert found.words["h2"] == [
        "Both nets", "Layers", "MACs and parameters by layer", "Ranks", "Energy and singular values",
        "Errors by layer", "Difference", "Left alone", "Origin", "Plan",
    ]  # fmt: skip
    assert found.words["pre"][-1] == Path("x.plan.json").read_text()
    assert found.words["pre"][0] == "caffe-lra report x net.prototxt net.caffemodel -o out.html"
    assert len(found.ids) == len(set(found.ids))
    links = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', source)
    assert links and {one or other for one, other in links} <= set(found.ids)
    assert [row[0] for row in found.tables["difference"][1:]] == ["conv1", "conv2", "ip1"]
    assert found.tables["difference"][1][2] == "5x5x16 -> conv1_v 5x1x7 + conv1_h 1x5x16"
    hashes = {row[0]: row[2] for row in found.tables["files"][1:]}
    fingerprints = cp.load(*files).fingerprint + cp.load("x.prototxt", "x.caffemodel").fingerprint
    assert tuple(hashes.values()) == fingerprints
    assert f"caffe-lra {cp.__version__}, Python" in source


def test_the_diagram_marks_what_changed(files: tuple[str, str]) -> None:
    found = Page(made("x", *files))
    marks = [each["class"] for tag, each in found.tags if tag == "g" and "class" in each]
    # data, conv1 + relu1, conv2 + relu2, conv3, ip1, prob; twice
    one_net = ["same", "changed", "changed", "same", "changed", "same"]
    assert marks == one_net * 2
    edges = [each for tag, each in found.tags if tag == "path" and each.get("class") == "edge"]
    assert len(edges) == 2 * 5
    assert "conv1_v 5x1x7" in found.words["text"] and "+ relu1" in found.words["text"]


BRANCHES = (
    nets.inputs(data=(1, 4, 8, 8))
    + "".join(
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" '
        "convolution_param { num_output: 4 kernel_size: 3 pad: 1 } }\n"
        for name, bottom in (("a", "data"), ("b", "a"), ("c", "data"))
    )
    + (
        'layer { name: "sum" type: "Eltwise" bottom: "b" bottom: "c" bottom: "data" top: "sum" }\n'
        'layer { name: "relu" type: "ReLU" bottom: "sum" top: "sum" }\n'
    )
)


def test_boxes_stand_below_what_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = nets.files(tmp_path, BRANCHES)
    model = cp.load(*paths)
    decomposed(lra.make_plan(model, scheme="spatial", ranks=[2], only=["b"]), model)
    found = Page(made("x", *paths))
    boxes = [each for tag, each in found.tags if tag == "rect" and "rx" in each]
    assert len(boxes) == 2 * 5
    places = [(float(each["x"]), float(each["y"])) for each in boxes[:5]]  # data a b c sum
    heights = [float(each["height"]) for each in boxes[:5]]
    a, c = places[1], places[3]
    assert a[1] == c[1] and abs(a[0] - c[0]) > float(boxes[0]["width"])
    for upper, lower in ((0, 1), (1, 2), (2, 4), (3, 4)):
        assert places[upper][1] + heights[upper] < places[lower][1]
    edges = [each for tag, each in found.tags if tag == "path" and each.get("class") == "edge"]
    assert len(edges) == 2 * 6  # every read of a box by another


def hostile() -> str:
    """The net of the other tests with the worst of names."""
    source = nets.SMALL
    for old, new in zip(("conv1", "conv2", "conv3", "ip1", "relu1", "relu2", "prob"), HOSTILE, strict=True):
        escaped = new.replace('"', '\\"')
        source = source.replace(f'name: "{old}"', f'name: "{escaped}"')
    return source


def test_names_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parsed = net.parse(hostile())
    Path("net.prototxt").write_bytes(hostile().encode())
    write_weights(nets.random_weights(parsed), Path("net.caffemodel"), hdf5=False)
    model = cp.load("net.prototxt", "net.caffemodel")
    names = [layer.name for layer in model.net.layers]
    plan = lra.make_plan(model, scheme="svd", energy=0.6, fc=True, even_if_slower=True)
    assert len(plan.layers) == 4
    decomposed(plan, model)
    source = made("x", "net.prototxt", "net.caffemodel")
    found = Page(source)
    shown = [row[0] for row in found.tables["layers"][1:5]]
    assert shown == [names[1], names[3], names[5], names[6]]
    assert {tag for tag, _ in found.tags} & {"script", "style"} == {"style"}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "\t" not in source and "tab\\tend" in source and "odd" in source
    assert not re.search(r"[^\n\x20-\x7e\xa0-\U0010ffff]", source)
    texts = found.words["text"]
    for name in (HOSTILE[2], HOSTILE[3]):  # in both nets, the costs and the errors; the ranks and the curves
        assert [texts.count(name + more) for more in ("", " (svd)", ", svd")] == [4, 1, 1]


def test_the_page_stands_alone(files: tuple[str, str]) -> None:
    source = made("x", *files)
    assert "://" not in source.replace('xmlns="http://www.w3.org/', "")
    assert not {tag for tag, _ in Page(source).tags} & {"script", "link", "img", "iframe", "object", "image"}
    assert not re.search(r"@import|url\((?!#)|src=|href=\"(?!#)", source)


def test_the_same_input_gives_the_same_bytes(files: tuple[str, str]) -> None:
    first = made("x", *files)
    code = "import sys, test_report; sys.exit(test_report.run(*sys.argv[1:]))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, "-c", code, "x", *files, "-o", "out.html"],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "7"},
    )
    assert Path("out.html").read_text("utf-8") == first


# Curves --------------------------------------------------------------------------------------------------------

SQUARE = nets.inputs(data=(1, 2, 4, 4)) + (
    'layer { name: "c" type: "Convolution" bottom: "data" top: "c" '
    "convolution_param { num_output: 2 kernel_size: 1 bias_term: false } }\n"
)


def square(*rows: Sequence[float]) -> Model:
    """A 1 x 1 convolution of two channels with these weights."""
    weight = np.array(rows, np.float32).reshape(2, 2, 1, 1)
    return Model(net.parse(SQUARE), Weights([NewEntry("c", (weight,))]))


def _report(plans: str, before: Model, after: Model, **given: Any) -> report.Report:
    return report.make("x", report.Plans.from_json(plans), before, after, report_given.Given(**given))


def test_a_curve_by_hand() -> None:
    model = square((4, 0), (0, 3))  # energies 16 and 9
    plan = lra.make_plan(model, scheme="svd", ranks=[1], even_if_slower=True)
    found = _report(plan.to_json(), model, lra.apply(plan, model)[0])
    (curve,) = found.curves
    assert curve.ranks.tolist() == [1, 2]
    np.testing.assert_allclose(curve.energy, [0.64, 1], rtol=1e-12)
    np.testing.assert_allclose(curve.values, [1, 0.75], rtol=1e-12)
    assert curve.retained == pytest.approx(0.64)
    (layer,) = [one for one in found.layers if one.changed]
    assert (layer.error, layer.apart) == (pytest.approx(0.6, abs=1e-6), pytest.approx(0.6, abs=1e-6))
    assert (layer.splits[0].rank, layer.splits[0].full, layer.splits[0].ratio) == (1, 2, 0.5)


def test_curves_of_merged_layers_are_of_the_merged_weights() -> None:
    """diag(2, 6) through 8 channels, then diag(2, 1/2): diag(4, 3), energies 16 and 9; alone 4 and 1/4."""
    source = nets.inputs(data=(1, 2, 4, 4)) + "".join(
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" '
        f"convolution_param {{ num_output: {count} kernel_size: 1 bias_term: false }} }}\n"
        for name, bottom, count in (("a", "data", 8), ("b", "a", 2), ("c", "b", 2))
    )
    first, second = np.zeros((8, 2), np.float32), np.zeros((2, 8), np.float32)
    first[:2], second[:, :2] = np.diag((2, 6)), np.diag((2, 0.5))
    weights = {"a": first, "b": second, "c": np.eye(2, dtype=np.float32)}
    entries = [NewEntry(name, (array[:, :, None, None],)) for name, array in weights.items()]
    model = Model(net.parse(source), Weights(entries))
    plan = lra.Plan({"b": _entry("svd", 1)}, target={"merge": [["a", "b"]], "merge_late": []})
    found = _report(plan.to_json(), model, lra.apply(plan, model)[0])
    (curve,) = found.curves
    np.testing.assert_allclose(curve.energy, [0.64, 1], rtol=1e-6)
    np.testing.assert_allclose(curve.values, [1, 0.75], rtol=1e-6)
    layers = {one.name: one for one in found.layers}
    assert list(layers) == ["data", "a", "b", "c"]
    assert layers["b"].apart == pytest.approx(0.6, abs=1e-6)
    assert layers["a"].treatment == "removed"
    assert any(note.startswith("a + b became one layer") for note in found.notes)
    assert found.totals("macs") == (16 * (16 + 16 + 4), 16 * (4 + 4))


def test_layers_that_are_new_stand_where_they_belong() -> None:
    """What is left of a layer of which the next one took a part, in a net whose layers were merged first."""
    model = nets.model(MERGING)
    plan = lra.make_plan(model, merge=True, scheme="pca", ranks=[8, 6, 6])
    made, said = lra.apply(plan, model)
    assert [one.layers for one in said.late_merges] == [("next_linear", "last_lowrank")]
    found = _report(plan.to_json(), model, made)
    names = ["data", "wide", "conv", "relu", "next", "next_lowrank", "last", "ip"]
    assert [layer.name for layer in found.layers] == names
    assert found.totals("macs") == said.macs and found.totals("params") == said.params


def test_norms_of_pruned_filters_by_hand() -> None:
    source = SQUARE + (
        'layer { name: "d" type: "Convolution" bottom: "c" top: "d" '
        "convolution_param { num_output: 3 kernel_size: 1 bias_term: false } }\n"
    )
    first, second = np.array([[3, 4], [6, 8]], np.float32), np.ones((3, 2), np.float32)
    entries = [NewEntry("c", (first.reshape(2, 2, 1, 1),)), NewEntry("d", (second.reshape(3, 2, 1, 1),))]
    model = Model(net.parse(source), Weights(entries))
    plan = hrank.Plan.of(coupling.find(model), {"c": [0]})
    found = _report(plan.to_json(), model, hrank.apply(plan, model)[0])
    (norms,) = found.norms
    assert (norms.norms.tolist(), norms.kept.tolist()) == ([10, 5], [False, True])
    rows = {layer.name: layer for layer in found.layers}
    assert (rows["c"].channels, rows["c"].treatment, rows["c"].macs) == ((2, 1), "pruned", (64, 32))
    assert (rows["d"].channels, rows["d"].treatment, rows["d"].macs) == (None, "narrower input", (96, 48))
    assert found.totals("macs") == (160, 80) and found.curves == ()
    masks = hrank.Plan.of(coupling.find(model), {"c": [0]}, target={"masks": True})
    found = _report(masks.to_json(), model, hrank.apply(masks, model, mask_only=True)[0])
    rows = {layer.name: layer for layer in found.layers}
    assert (rows["c"].channels, rows["c"].treatment, rows["c"].macs) == ((2, 1), "masked", (64, 64))
    assert rows["c"].apart == pytest.approx((100 / 125) ** 0.5)
    assert (rows["d"].treatment, found.totals("macs")) == ("other weights", (160, 160))


def test_a_net_without_weights_has_no_curves(files: tuple[str, str]) -> None:
    Path("x.caffemodel").unlink()
    found = Page(made("x", files[0]))
    assert "Energy and singular values" not in found.words["h2"]
    assert any("weights were not given" in words for words in found.words["p"])
    plan = lra.Plan.from_json(Path("x.plan.json").read_text())
    assert [int(cell.replace(",", "")) for cell in found.layer("conv1")[3:5]] == list(
        plan.layers["conv1"].macs or ()
    )
    assert "original weights" not in [row[0] for row in found.tables["files"]]


# As decompose goes ------------------------------------------------------------------------------------------------


def decompose(capsys: Capture, *options: str) -> tuple[Any, Page]:
    """The JSON of a decompose command on the small net with --report, and its page."""
    capsys.readouterr()
    command = (
        "decompose",
        "net.prototxt",
        "net.caffemodel",
        "-o",
        "x",
        "--speedup",
        "1.5",
        "--report",
        *options,
    )
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    found = json.loads(out)
    assert found["files"]["html"] == "x.html"
    page = Page(Path("x.html").read_text("utf-8"))
    assert page.words["pre"][0] == "caffe-lra " + " ".join((*command, "--json"))
    return found, page


def test_decompose_writes_the_page_that_report_writes(files: tuple[str, str], capsys: Capture) -> None:
    decompose(capsys)
    first = Path("x.html").read_text("utf-8")
    second = made("x", *files)
    commands = [Page(one).words["pre"][0] for one in (first, second)]
    assert first.replace(commands[0], commands[1]) == second


def test_decompose_puts_its_times_into_the_page(files: tuple[str, str], capsys: Capture) -> None:
    found, page = decompose(capsys, "--time", "--threads", "1", "--compare", "random")
    whole = page.tables["times"][1]
    assert whole[1:3] == [f"{one:.3f}" for one in found["latency_ms"]]
    gains = {one["name"]: one["ms"] for one in found["gains"]}
    assert {"conv1", "conv2", "conv3", "ip1", ""} == set(gains)
    for name in ("conv1", "conv2", "conv3", "ip1"):
        row = dict(zip(page.tables["layers"][0], page.layer(name), strict=True))
        assert row["ms measured before"] == f"{gains[name][0]:.3f}"
    assert any("1 thread, 50 interleaved runs" in words for words in page.words["p"])
    (output,) = page.tables["outputs"][1:]
    assert output == ["prob", f"{found['outputs_apart']['prob']:.4g}"]
    assert "Both nets on random input." in page.words["p"]


def test_decompose_judges_both_nets_on_its_images(files: tuple[str, str], capsys: Capture) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((60, 3, 12, 12)).astype(np.float32)

    def scores(*paths: str) -> np.ndarray:
        model = cp.load(*paths)
        return np.concatenate([nets.forward(model, {"data": x[i : i + 2]})["prob"] for i in range(0, 60, 2)])

    before = scores(*files)
    y = before.argmax(1)
    y[:20] = (y[:20] + 1) % 30
    np.savez("images.npz", x=x, y=y)
    found, page = decompose(capsys, "--images", "images.npz", "--threads", "1")
    after = scores("x.prototxt", "x.caffemodel")
    right = [float(np.mean(one.argmax(1) == y)) for one in (before, after)]
    agree = float(np.mean(before.argmax(1) == after.argmax(1)))
    assert right[0] != right[1] and agree < 1
    rows = {row[0]: row[1:] for row in page.tables["accuracy"][1:]}
    assert set(rows) == {"top-1", "top-5", "agreement with the original"}
    assert [cell.split()[0] for cell in rows["top-1"][:2]] == [f"{one:.4f}" for one in right]
    assert rows["agreement with the original"][1].split()[0] == f"{agree:.4f}"
    assert {row[-1] for row in rows.values()} == {"60"}
    assert any(words.startswith("On the images that the new net was fitted to.") for words in page.words["p"])
    fitted = {row["name"]: row["error"] for row in found["layers"] if row["error_of"] == "responses"}
    place = page.tables["layers"][0].index("error fitted")
    assert fitted
    for name, error in fitted.items():
        assert page.layer(name)[place] == ("" if error is None else f"{error:.4f}")
    np.savez("images.npz", x=x, y=y + 1000)  # labels of other classes say nothing
    _, page = decompose(capsys, "--images", "images.npz", "--threads", "1")
    assert [row[0] for row in page.tables["accuracy"][1:]] == ["agreement with the original"]


def test_decompose_refuses_a_page_that_cannot_be(
    files: tuple[str, str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["decompose", *files, "-o", "y", "--speedup", "1.5", "--report"]
    capsys.readouterr()
    assert main([*given, "--plan-only"]) == 2
    assert "--report does not go with --plan-only" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(given) == 2
    assert "install the extra report" in capsys.readouterr().err and not list(Path().glob("y*"))


# A published net ------------------------------------------------------------------------------------------------


def test_a_published_net_beside_ours(files: tuple[str, str], capsys: Capture) -> None:
    model = cp.load(*files)
    given = {"conv1": _entry("spatial", 5), "conv3": _entry("svd", 4)}
    plan = lra.make_plan(model, rank_config=given, even_if_slower=True)
    theirs, _ = lra.apply(plan, model)
    save(theirs, "theirs.prototxt")
    found = Page(made("x", *files, "--against", "theirs.prototxt", "--against", "x.prototxt,x.caffemodel"))
    before, here, there = cp.cost(model), cp.cost(cp.load("x.prototxt")), cp.cost(theirs)
    rows = {row[0]: row for row in found.tables["against0"][1:]}

    def macs(cost: Any, name: str) -> str:
        return f"{sum(one.macs for one in cost.layers if one.name.startswith(name)):,}"

    assert {name: row[1:3] for name, row in rows.items()} == {
        "conv1": ["7", "5"], "conv2": ["6", ""], "conv3": ["", "4"], "ip1": ["9", ""], "total": ["", ""],
    }  # fmt: skip
    for name in ("conv1", "conv2", "conv3", "ip1"):
        assert rows[name][3:6] == [macs(cost, name) for cost in (before, here, there)]
    assert rows["total"][3:] == [
        *(f"{cost.macs:,}" for cost in (before, here, there)),
        *(f"{before.macs / cost.macs:.2f}x" for cost in (here, there)),
    ]
    between = {row[0]: row[1:] for row in found.tables["between0"][1:]}
    assert between["conv2"][0] == "decomposed" and "6" in between["conv2"][1]
    assert "num_output: 7 -> 5" in between["conv1_v"][1]
    assert "Both nets compute the same." in found.words["p"] and "between1" not in found.tables
    assert {"Beside theirs.prototxt", "Beside x.prototxt"} <= set(found.words["h2"])
    said = {(row[0], row[1]) for row in found.tables["files"][1:]}
    assert ("other net", "theirs.prototxt") in said and ("other weights", "x.caffemodel") in said
    capsys.readouterr()
    assert "theirs.protoxt: no such file" in refused(
        capsys, "x", *files, "-o", "o.html", "--against", "theirs.protoxt"
    )
    assert "would be overwritten" in refused(
        capsys, "x", *files, "-o", "theirs.prototxt", "--against", "theirs.prototxt"
    )


# Plans of other kinds ------------------------------------------------------------------------------------------


def test_a_net_pruned_and_decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = nets.files(tmp_path)
    model = cp.load(*paths)
    first = hrank.Plan.of(
        coupling.find(model), {"conv1": [*range(1, 7), *range(9, 15)], "conv3": list(range(14))}
    )
    pruned, said = hrank.apply(first, model)
    second, changed, _ = decompose_rest(pruned, said.macs, 2.5)
    save(changed, "x.prototxt", "x.caffemodel")
    Path("x.plan.json").write_text(Joint(first, second).to_json())
    found, after = Page(made("x", *paths)), cp.cost(changed)
    before = cp.cost(model)
    assert "conv1" in second.layers
    for name in ("conv1", "conv2", "conv3", "ip1"):
        row = found.layer(name)
        new = sum(one.macs for one in after.layers if one.name.startswith(name))
        assert row[3:5] == [f"{before.by_layer[name].macs:,}", f"{new:,}"], name
    entry = second.layers["conv1"]
    assert found.layer("conv1")[1:3] == [
        f"pruned + {entry.scheme}",
        f"16 to 12 filters, {entry.ranks[0]}/{lra.schemes.ALL_SCHEMES[entry.scheme].max_rank((12, 3, 5, 5), 1)}",
    ]
    assert found.layer("conv1")[9] == f"{entry.error:.4f}" == found.layer("conv1")[10]
    (said_of,) = [row[2] for row in found.tables["difference"] if row[0] == "conv1"]
    assert said_of.startswith("num_output: 16 -> 12, then 5x5x12 -> conv1_")
    assert {"Filters", "Energy and singular values"} <= set(found.words["h2"])
    total = found.tables["layers"][-1]
    assert total[3:5] == [f"{before.macs:,}", f"{after.macs:,}"]


def test_a_plan_that_was_fitted_to_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = nets.files(tmp_path)
    model = cp.load(*paths)
    images = np.random.default_rng(0).standard_normal((40, 3, 12, 12)).astype(np.float32)
    given = {"conv1": _entry("asymmetric-3d", 8, 9), "conv3": _entry("response", 7)}
    plan = lra.make_plan(model, rank_config=given, images=images, even_if_slower=True)
    decomposed(plan, model, images)
    found = Page(made("x", *paths))
    assert found.layer("conv1")[2] == "8/15 + 9/16" and found.layer("conv3")[2] == "7/20"
    assert any("those of the weights" in words for words in found.words["p"])
    assert any("responses to images" in words for words in found.words["p"])
    titles = [words for words in found.words["text"] if ", " in words]
    assert {"conv1, spatial", "conv1, pca", "conv3, pca"} <= set(titles)


# What is given besides -----------------------------------------------------------------------------------------


def write_times(*layers: tuple[str, list[float]], of: Sequence[dict[str, Any]] | None = None) -> None:
    """times.json, of the two nets unless others are given."""
    first, second = of or ({"sha256": sums("net")}, {"sha256": sums("x")})
    why = [{"kind": "layout", "ms": 0.1, "text": "2 reorders"}, {"kind": "fusion", "ms": 0.05, "text": ""}]
    gains = [{"name": name, "ms": pair} | ({"why": why} if name == "conv1" else {}) for name, pair in layers]
    models = [{**first, "median_ms": 2.5}, {**second, "median_ms": 1.25, "gains": gains}]
    document = {"models": models, "threads": 2, "provider": "cpu", "runs": 7, "onnxruntime": "1.2.3"}
    Path("times.json").write_text(json.dumps(document))


def sums(stem: str) -> dict[str, str]:
    """What sha256sum says of a net's two files."""
    files = {"net": f"{stem}.prototxt", "weights": f"{stem}.caffemodel"}
    return {what: hashlib.sha256(Path(name).read_bytes()).hexdigest() for what, name in files.items()}


def test_times_and_accuracies(files: tuple[str, str]) -> None:
    write_times(("conv1", [1.5, 0.5]), ("", [1.0, 0.75]))
    share = {"value": 0.875, "standard_error": 0.0125, "n": 700}
    accuracy = {
        "sha256": sums("x"),
        "images": 700,
        "top1": share,
        "reference": {"sha256": sums("net"), "top1": {**share, "value": 0.9}},
        "agreement": share,
    }
    Path("acc.json").write_text(json.dumps(accuracy))
    found = Page(made("x", *files, "--times", "times.json", "--accuracy", "acc.json"))
    assert found.layer("conv1")[9:12] == ["1.500", "0.500", "3.00x"]
    assert found.layer("conv2")[9:12] == ["", "", ""]
    assert found.tables["layers"][-1][9:12] == ["2.500", "1.250", "2.00x"]
    assert found.tables["times"][1:] == [
        ["whole net", "2.500", "1.250", "2.00x"],
        ["the rest", "1.000", "0.750", "1.33x"],
    ]
    assert found.tables["why"][1:] == [["conv1", "layout: 2 reorders; fusion"]]
    assert "onnxruntime 1.2.3, cpu, 2 threads, 7 interleaved runs." in found.words["p"]
    assert found.tables["accuracy"][1:] == [
        ["top-1", "0.9000 ± 0.0125", "0.8750 ± 0.0125", "700"],
        ["agreement with the original", "", "0.8750 ± 0.0125", "700"],
    ]
    assert "--times times.json --accuracy acc.json" in found.words["pre"][0]


def test_times_that_the_plan_predicts(files: tuple[str, str]) -> None:
    value = json.loads(Path("x.plan.json").read_text())
    value["layers"]["conv1"]["ms"] = [0.8, 0.2]
    value["target"] |= {"cost": "latency", "predicted_ms": [3, 2], "gap": 0, "noise": 0, "measured_on": {}}
    Path("x.plan.json").write_text(json.dumps(value))
    found = Page(made("x", *files))
    assert found.tables["layers"][0][9] == "ms planned before"
    assert found.layer("conv1")[9:12] == ["0.800", "0.200", "4.00x"]
    assert found.tables["layers"][-1][9:12] == ["3.000", "2.000", "1.50x"]


@pytest.mark.parametrize(
    "source",
    ["[]", "{", '{"models": [{}]}', '{"models": [{"median_ms": 1}, {"median_ms": "1"}]}', "[" * 100000],
)
def test_other_files_are_no_times(tmp_path: Path, source: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(source)
    with pytest.raises(FileError, match=r"t\.json"):
        report_given.read_times(str(path))
    with pytest.raises(FileError, match=r"t\.json"):
        report_given.read_accuracy(str(path))


# Refusals ------------------------------------------------------------------------------------------------------


def refused(capsys: Capture, *arguments: str) -> str:
    """The one line of a refusal; nothing may be written."""
    before = sorted(Path().iterdir())
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sorted(Path().iterdir()) == before
    return err


def test_refusals(files: tuple[str, str], capsys: Capture) -> None:
    out = ("-o", "out.html")
    assert "original NET is missing" in refused(capsys, "x", *out)
    assert "y.plan.json" in refused(capsys, "y", *files, *out)
    assert "would be overwritten" in refused(capsys, "x", *files, "-o", "x.plan.json")
    write_times(("conv9", [1, 1]))
    assert 'times.json: has times of a layer "conv9"' in refused(
        capsys, "x", *files, *out, "--times", "times.json"
    )
    nets.files(Path(), seed=1, stem="other")
    said = refused(capsys, "x", "net.prototxt", "other.caffemodel", *out)
    assert "the plan was made for another weights file" in said
    assert "--force" in said and run("x", "net.prototxt", "other.caffemodel", *out, "--force") == 0


def test_times_of_other_nets_are_refused(files: tuple[str, str], capsys: Capture) -> None:
    """By the files' sha256; in files of older releases by the nets' names."""
    nets.files(Path(), seed=1, stem="other")
    mine, new, other = ({"sha256": sums(stem)} for stem in ("net", "x", "other"))
    options = (*files, "--times", "times.json", "-o", "out.html")
    write_times(of=(mine, {"sha256": {**sums("x"), "net": "0" * 64}}))
    assert "times.json: was measured on another net file than x.prototxt" in refused(capsys, "x", *options)
    for pair, said in (
        ((other, new), "another weights file than net.caffemodel"),
        ((new, mine), "another net file than net.prototxt"),
        (({"model": "y/net.prototxt,net.caffemodel"}, new), "y/net.prototxt,net.caffemodel, not on net.prototxt"),
        (({"model": "net.prototxt"}, {"model": "x.onnx"}), "measured on x.onnx, not on x.prototxt"),
        (({}, {}), "does not say whether it was measured on net.prototxt"),
    ):  # fmt: skip
        write_times(of=pair)
        err = refused(capsys, "x", *options)
        assert said in err and "caffe-lra time NET,WEIGHTS" in err and "--force" in err
        made("x", *options[:-2], "--force")
        Path("out.html").unlink()
        capsys.readouterr()
    bare = {"sha256": {"net": sums("net")["net"]}}
    for pair in ((bare, new), ({"model": "./net.prototxt,net.caffemodel"}, {"model": "x.prototxt"})):
        write_times(of=pair)
        made("x", *options[:-2])


def test_accuracies_of_other_nets_are_refused(files: tuple[str, str], capsys: Capture) -> None:
    nets.files(Path(), seed=1, stem="other")
    share = {"value": 0.875, "standard_error": 0.0125, "n": 700}
    options = (*files, "--accuracy", "acc.json", "-o", "out.html")
    mine, new, other = (sums(stem) for stem in ("net", "x", "other"))
    for one, reference, said in (
        ({"sha256": other}, {"sha256": mine}, "another net file than x.prototxt"),
        ({"sha256": {**new, "weights": "0" * 64}}, None, "another weights file than x.caffemodel"),
        ({"sha256": new}, {"sha256": other}, "another weights file than net.caffemodel"),
        ({}, None, "does not say whether it was measured on x.prototxt"),
        ({"sha256": new}, {}, "does not say whether it was measured on net.prototxt"),
    ):
        document = {**one, "images": 700, "top1": share}
        Path("acc.json").write_text(
            json.dumps(
                document if reference is None else {**document, "reference": reference, "agreement": share}
            )
        )
        err = refused(capsys, "x", *options)
        assert said in err and "caffe-lra eval PREFIX.prototxt" in err and "--force" in err
        made("x", *options[:-2], "--force")
        Path("out.html").unlink()
        capsys.readouterr()


def test_what_time_and_eval_print_is_taken(files: tuple[str, str], capsys: Capture) -> None:
    pair = ("net.prototxt,net.caffemodel", "x.prototxt,x.caffemodel")
    rng = np.random.default_rng(0)
    shape = cp.shapes(cp.load(files[0]))["data"]
    np.savez("images.npz", x=rng.integers(0, 255, (4, *shape[1:])).astype(np.uint8))
    quick = ("--threads", "1", "--json")
    for engine in ("onnxruntime", "torch"):
        if engine == "torch":
            pytest.importorskip("torch")
        assert main(("time", *pair, "--engine", engine, "--runs", "1", "--warmup", "0", *quick)) == 0
        Path("times.json").write_text(capsys.readouterr().out)
        said = json.loads(Path("times.json").read_text())["models"]
        assert [one["sha256"] for one in said] == [sums("net"), sums("x")]
        made("x", *files, "--times", "times.json")
        capsys.readouterr()
        assert "was measured on" in refused(
            capsys, "x", "x.prototxt", "-o", "o.html", "--times", "times.json"
        )
    assert main(("eval", *pair[1].split(","), "--images", "images.npz", "--reference", pair[0], *quick)) == 0
    Path("acc.json").write_text(capsys.readouterr().out)
    found = json.loads(Path("acc.json").read_text())
    assert (found["sha256"], found["reference"]["sha256"]) == (sums("x"), sums("net"))
    made("x", *files, "--accuracy", "acc.json")


def test_a_prefix_may_be_the_plan(files: tuple[str, str]) -> None:
    pages = [made(name, *files) for name in ("x", "x.plan.json")]
    assert pages[0].replace(" report x ", " report x.plan.json ") == pages[1]


def test_missing_matplotlib_is_one_clear_error(
    files: tuple[str, str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refused(capsys, "x", *files, "-o", "out.html")
    assert (
        said == "caffe-lra: error: matplotlib is not installed; install the extra report: caffe-lra[report]\n"
    )


# In a browser --------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PROBE = """<script>
const said = [];
addEventListener("error", event => said.push("error: " + event.message), true);
addEventListener("load", () => {
  const root = document.documentElement, wide = root.clientWidth;
  if (root.scrollWidth > wide) said.push("page " + root.scrollWidth);
  for (const one of document.querySelectorAll("body *")) {
    if (one.parentElement.closest(".scroll,svg")) continue;
    const box = one.getBoundingClientRect();
    if (box.right > wide + 0.5 || box.left < -0.5) said.push(one.tagName + " " + box.left + " " + box.right);
  }
  for (const one of document.querySelectorAll("svg.net g")) {
    const rect = one.querySelector("rect").getBBox();
    for (const words of one.querySelectorAll("text")) {
      const box = words.getBBox();
      if (box.x + box.width > rect.width || box.y + box.height > rect.height) said.push("box: " + words.textContent);
    }
  }
  root.setAttribute("data-probe", innerWidth + ":" + said.join("|"));
});
</script>"""


FRAME = """<body><iframe width={width} height=1500 style="border:0" srcdoc="{page}"></iframe><script>
const frame = document.querySelector("iframe");
addEventListener("load", () => {{
  const found = frame.contentDocument.documentElement.getAttribute("data-probe");
  document.documentElement.setAttribute("data-probe", found);
}});
</script></body>"""


@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="needs chromium, chromium-browser or google-chrome on PATH; fails without where CI is set",
)
@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_overflows_in_a_browser(files: tuple[str, str], tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None, "no browser on PATH: .ci/run installs chromium as root with apt-get"
    long = "inception_5b/double3x3_reduce_and_more_of_it"
    for path in map(Path, ("net.prototxt", "x.prototxt")):
        path.write_text(
            path.read_text()
            .replace('name: "relu1"', f'name: "{long}"')
            .replace('"prob" type', f'"{long}2" type')
        )
    write_times(("conv1", [1.5, 0.5]), ("ip1", [1.5, 0.75]))
    source = made("x", *files, "--times", "times.json", "--against", "net.prototxt")
    probed = source.replace("<head>", "<head>" + PROBE)
    if width < 500:  # no window is narrower; a frame may be
        probed = FRAME.format(width=width, page=html.escape(probed))
    Path("probed.html").write_text(probed, "utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom",
    ]  # fmt: skip
    shown = subprocess.run(
        [*command, (tmp_path / "probed.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    probe = re.search(r'data-probe="([^"]*)"', shown.stdout)
    assert probe is not None and probe[1] == f"{width}:"
    assert "CONSOLE" not in shown.stderr
