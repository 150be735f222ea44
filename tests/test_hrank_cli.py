"""The prune command as a user types it, and apply with its plans: files, reports, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pruning
import pytest

import caffe_proto as cp
import hrank
from caffe_proto.model import write_weights
from hrank.compare import Judge
from hrank.plan import Plan
from hrank.repair import compensate, reestimate
from lra.cli import main

Capture = pytest.CaptureFixture[str]
NET = ("net.prototxt", "net.caffemodel")
SOURCE = (
    nets.inputs(data=(1, 3, 8, 8))
    + """
layer { name: "stem" type: "Convolution" bottom: "data" top: "stem" convolution_param { num_output: 8 kernel_size: 3 pad: 1 } }
layer { name: "stem/relu" type: "ReLU" bottom: "stem" top: "stem" }
layer { name: "a" type: "Convolution" bottom: "stem" top: "a" convolution_param { num_output: 10 kernel_size: 3 pad: 1 } }
layer { name: "a/bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "a/scale" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "a/relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 8 kernel_size: 3 pad: 1 } }
layer { name: "b/bn" type: "BatchNorm" bottom: "b" top: "b" }
layer { name: "sum" type: "Eltwise" bottom: "stem" bottom: "b" top: "sum" }
layer { name: "sum/relu" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "c" type: "Convolution" bottom: "sum" top: "c" convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "c/relu" type: "ReLU" bottom: "c" top: "c" }
layer { name: "end" type: "InnerProduct" bottom: "c" top: "end" inner_product_param { num_output: 4 } }
"""
)
TRAIN = (
    SOURCE.replace(
        'type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } }',
        'type: "Data" top: "data" top: "label" data_param { source: "db" batch_size: 4 }',
    )
    + 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "end" bottom: "label" top: "loss" }\n'
)
L1 = ("--criterion", "l1")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net, its train_val, labelled images and rates, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    full = pruning.model(SOURCE)
    Path("net.prototxt").write_text(SOURCE)
    assert full.weights is not None
    write_weights(full.weights, Path("net.caffemodel"), hdf5=False)
    Path("train.prototxt").write_text(TRAIN)
    random = np.random.default_rng(4)
    x = random.standard_normal((40, 3, 8, 8)).astype(np.float32)
    np.savez("images.npz", x=x, y=random.integers(0, 4, 40))
    Path("rates.json").write_text('{"a": 0.4, "c": 0.5}')


def images() -> np.ndarray:
    with np.load("images.npz") as arrays:
        return np.asarray(arrays["x"])


def ok(capsys: Capture, *arguments: str) -> tuple[str, str]:
    """What a command prints to stdout and stderr; it must succeed."""
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def ok_json(capsys: Capture, *arguments: str) -> Any:
    return json.loads(ok(capsys, *arguments, "--json")[0])


def prune(capsys: Capture, *options: str, out: str = "new") -> Any:
    """JSON of a prune command that writes."""
    return ok_json(capsys, "prune", *NET, "-o", out, "--threads", "1", *options)


def refused(capsys: Capture, *arguments: str) -> str:
    """The one line that a command refuses its input with; nothing may be written."""
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("caffe-lra: error: ") and err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return err


def load(stem: str = "new", net: str = "") -> cp.Model:
    return cp.load(net or f"{stem}.prototxt", f"{stem}.caffemodel")


def outputs(one: cp.Model) -> np.ndarray:
    with cp.session(one, threads=1) as opened:
        return np.concatenate([opened.run({"data": image[None]})["end"] for image in images()])


# What is written --------------------------------------------------------------------------------------------------


def test_the_written_net_is_smaller_and_computes_what_the_masked_one_does(capsys: Capture) -> None:
    made = prune(capsys, "--rate-config", "rates.json", *L1)
    masked = prune(capsys, "--rate-config", "rates.json", *L1, "--mask-only", out="masked")
    assert outputs(load()) == pytest.approx(outputs(load("masked")), abs=1e-4)
    assert cp.shapes(load())["a"] == (1, 6, 8, 8) and cp.shapes(load("masked"))["a"] == (1, 10, 8, 8)
    cost = cp.cost(load())
    assert made["macs"] == [cp.cost(cp.load(*NET)).macs, cost.macs]
    assert made["params"][1] == cost.params
    assert made["files"] == {
        "prototxt": "new.prototxt",
        "caffemodel": "new.caffemodel",
        "plan": "new.plan.json",
    }
    assert {row["name"]: row["channels"] for row in made["layers"] if row["channels"]} == {
        "a": [10, 6], "b": [8, 8], "c": [6, 3], "end": [4, 4],
    }  # fmt: skip
    assert masked["macs"][0] == masked["macs"][1]
    smaller, whole = (Path(f"{name}.caffemodel").stat().st_size for name in ("new", "net"))
    assert smaller < whole


def test_the_plan_written_gives_the_same_bytes_again(capsys: Capture) -> None:
    prune(capsys, "--speedup", "1.3", "--images", "images.npz")
    prune(capsys, "--plan", "new.plan.json", out="again")
    for kind in ("prototxt", "caffemodel", "plan.json"):
        assert Path(f"again.{kind}").read_bytes() == Path(f"new.{kind}").read_bytes()
    target = Plan.from_json(Path("new.plan.json").read_text()).target
    assert {key: target[key] for key in ("speedup", "criterion", "at", "images", "n_images", "seed")} == {
        "speedup": 1.3, "criterion": "rank", "at": "relu", "images": "images.npz", "n_images": 500, "seed": 0,
    }  # fmt: skip


def test_saved_ranks_decide_as_the_images_did(capsys: Capture) -> None:
    prune(capsys, "--rate-config", "rates.json", "--images", "images.npz", "--save-ranks", "ranks.json")
    prune(capsys, "--rate-config", "rates.json", "--rank-file", "ranks.json", out="again")
    assert Path("again.caffemodel").read_bytes() == Path("new.caffemodel").read_bytes()
    said = json.loads(Path("ranks.json").read_text())["source"]
    assert said == {"images": "images.npz", "n_images": 40, "at": "relu", "seed": 0}


def test_coupled_layers_and_their_score(capsys: Capture) -> None:
    rates = ("--rates", "[0.5]+[0.]+[0.5]+[0.]", *L1)
    alone = ok_json(capsys, "prune", *NET, "--dry-run", *rates)
    assert set(alone["kept"]) == {"stem", "b"}
    whole, found = cp.load(*NET), {}
    for score in ("mean", "max", "min"):
        prune(capsys, *rates, "--coupled", "--group-score", score)
        found[score] = Plan.from_json(Path("new.plan.json").read_text()).keep
        wanted = hrank.make_plan(
            whole,
            rates={"stem": 0.5, "b": 0.5},
            criterion="l1",
            limits=hrank.Limits(coupled=True),
            reduce=score,
        )
        assert found[score] == wanted.keep
        assert found[score]["stem"] == found[score]["b"] and len(found[score]["b"]) == 4
    assert len({one["stem"] for one in found.values()}) > 1


def test_only_except_round_to_and_min_channels(capsys: Capture) -> None:
    def channels(*options: str) -> dict[str, int]:
        prune(capsys, "--rate-config", "rates.json", *L1, *options)
        return {
            name: len(keep) for name, keep in Plan.from_json(Path("new.plan.json").read_text()).keep.items()
        }

    assert channels() == {"a": 6, "c": 3}
    assert channels("--only", "a") == {"a": 6}
    assert channels("--except", "a") == {"c": 3}
    assert channels("--round-to", "4") == {"a": 8, "c": 4}
    assert channels("--min-channels", "5") == {"a": 6, "c": 5}


def test_onnx_and_time(capsys: Capture) -> None:
    made = prune(capsys, "--rate-config", "rates.json", *L1, "--onnx", "--time")
    assert Path("new.onnx").exists() and made["files"]["onnx"] == "new.onnx"
    assert made["speedup"]["latency"] > 0 and len(made["latency_ms"]) == 2


def test_the_report_in_words(capsys: Capture) -> None:
    out, err = ok(
        capsys, "prune", *NET, "-o", "new", "--rates", "[0.5]+[0.4]+[0.]+[0.5]", "--count", "hrank",
        "--images", "images.npz", "--at", "conv", "--repair", "bn",
    )  # fmt: skip
    for line in (
        "10 -> 6",
        "kept stem: shares its channels",
        "repair bn: 2 layers",
        "MACs, whole net",
        "FLOPs as hrank",
    ):
        assert line in out
    assert 'warning: layer "a": no ReLU stands before it' in err


# Repairs ----------------------------------------------------------------------------------------------------------


def test_repairs_are_those_of_the_library(capsys: Capture) -> None:
    prune(capsys, "--rate-config", "rates.json", *L1)
    whole, pruned, x = cp.load(*NET), load(), images()
    plan = Plan.from_json(Path("new.plan.json").read_text())
    made = prune(capsys, "--plan", "new.plan.json", "--images", "images.npz", "--repair", "bn", out="bn")
    assert [one["name"] for one in made["repairs"]] == ["bn"]
    assert outputs(load("bn")) == pytest.approx(outputs(reestimate(pruned, x, threads=1).model), abs=1e-5)
    prune(capsys, "--plan", "new.plan.json", "--images", "images.npz", "--repair", "bias", out="bias")
    wanted = compensate(plan, whole, pruned, x, threads=1).model
    assert outputs(load("bias")) == pytest.approx(outputs(wanted), abs=1e-5)
    made = prune(
        capsys, "--plan", "new.plan.json", "--images", "images.npz", "--repair", "lsq", "--repair", "bias",
        "--positions", "30", out="lsq",
    )  # fmt: skip
    assert [one["name"] for one in made["repairs"]] == ["bias", "lsq"]
    assert set(made["repairs"][1]["errors"]) == {"b", "end"}
    errors = {name: np.abs(outputs(load(name)) - outputs(whole)).mean() for name in ("new", "lsq")}
    assert errors["lsq"] < 0.8 * errors["new"]


def test_criteria_side_by_side(capsys: Capture) -> None:
    found = ok_json(
        capsys, "prune", *NET, "--rates", "[0.]+[0.4]+[0.]+[0.]", "--compare", "--images", "images.npz",
        "--repair", "bn", "--threads", "1",
    )["comparison"]  # fmt: skip
    assert {one["criterion"] for one in found} >= {"rank", "random", "l1", "gamma", "nuclear", "edge"}
    by_name = {one["criterion"]: one for one in found}
    assert all("pruned" in one for one in found)
    prune(capsys, "--rates", "[0.]+[0.4]+[0.]+[0.]", *L1)
    with np.load("images.npz") as arrays:
        judged = Judge(cp.load(*NET), arrays["x"], arrays["y"], 1)(load())
    assert by_name["l1"]["pruned"]["top1"]["value"] == judged.accuracy.top1.value
    assert by_name["l1"]["pruned"]["output_error"] == pytest.approx(judged.output_error)
    assert by_name["l1"]["repaired"]["output_error"] != by_name["l1"]["pruned"]["output_error"]
    out, _ = ok(
        capsys,
        "prune",
        *NET,
        "--rate-config",
        "rates.json",
        "--compare",
        "--images",
        "images.npz",
        "-o",
        "new",
        *L1,
    )
    assert "agreement" in out and "wrote new.prototxt" in out
    assert "not gamma: " in out


# Dry run ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_all_and_writes_nothing(capsys: Capture) -> None:
    before = sorted(Path().iterdir())
    out, _ = ok(capsys, "prune", "net.prototxt", "--dry-run", "--rates", "[0.]+[0.4]+[0.]+[0.5]")
    assert sorted(Path().iterdir()) == before
    rows = [line.split() for line in out.splitlines()]
    assert ["2", "a", "10", "6"] in rows
    assert ["2", "a", "convolution", "10", "0.4", "6"] in rows
    assert any(row[:3] == ["2", ">", "b"] for row in rows)
    found = ok_json(capsys, "prune", "net.prototxt", "--dry-run", "--rates", "[0.]+[0.4]+[0.]+[0.5]")
    made = prune(capsys, "--rates", "[0.]+[0.4]+[0.]+[0.5]", *L1)
    assert (found["macs"], found["params"]) == (made["macs"], made["params"])
    assert [one["layers"] for one in found["positions"]] == [["stem"], ["a"], ["b"], ["c"]]
    assert ok_json(capsys, "prune", *NET, "--dry-run", "--plan", "new.plan.json")["macs"] == made["macs"]
    bare = ok_json(capsys, "prune", "net.prototxt", "--dry-run")
    assert bare["macs"][0] == bare["macs"][1]


# Siblings, both plans ---------------------------------------------------------------------------------------------


def test_the_train_val_takes_the_plan_and_the_weights(capsys: Capture) -> None:
    prune(capsys, "--rate-config", "rates.json", *L1, "--images", "images.npz", "--repair", "bn")
    shape = ("--input-shape", "data=4,3,8,8")
    ok(capsys, "apply", "new.plan.json", "train.prototxt", "-o", "train_new", *shape)
    text = Path("train_new.prototxt").read_text()
    assert text.count("num_output: 6") == 1 and "SoftmaxWithLoss" in text
    fits = load("new", "train_new.prototxt")
    with cp.session(fits, ["end"], threads=1, input_shapes={"data": (4, 3, 8, 8), "label": (4,)}) as opened:
        made = opened.run({"data": images()[:4]})["end"]
    assert made == pytest.approx(outputs(load())[:4], abs=1e-5)
    _, err = ok(capsys, "apply", "new.plan.json", "train.prototxt", NET[1], "-o", "train_new", *shape)
    assert "these weights are not repaired (bn)" in err


def test_masks_are_applied_as_masks(capsys: Capture) -> None:
    rates = ("--rates", "[0.5]+[0.4]+[0.25]+[0.5]", *L1)
    prune(capsys, *rates, "--mask-only")
    ok(capsys, "apply", "new.plan.json", *NET, "-o", "again")
    assert Path("again.caffemodel").read_bytes() == Path("new.caffemodel").read_bytes()
    assert "masks stand in the weights" in refused(capsys, "apply", "new.plan.json", NET[0], "-o", "x")
    assert "only mask" in refused(capsys, "prune", *NET, "--plan", "new.plan.json", "-o", "x")


def test_one_budget_for_pruning_and_decomposing(capsys: Capture) -> None:
    made = prune(capsys, "--speedup", "1.3", *L1, "--then-decompose", "2")
    assert made["speedup"]["total_macs"] >= 2 > made["speedup"]["macs"] >= 1.3
    assert cp.cost(load()).macs == pytest.approx(made["macs"][0] / made["speedup"]["total_macs"])
    ok(capsys, "apply", "new.plan.json", *NET, "-o", "again")
    for kind in ("prototxt", "caffemodel", "plan.json"):
        assert Path(f"again.{kind}").read_bytes() == Path(f"new.{kind}").read_bytes()
    assert "holds a decomposition too" in refused(capsys, "prune", *NET, "--plan", "new.plan.json", "-o", "x")
    err = refused(capsys, "prune", *NET, "--speedup", "1.3", *L1, "--then-decompose", "1.1", "-o", "x")
    assert "pruning alone makes it" in err


def test_a_pruned_net_is_decomposed(capsys: Capture) -> None:
    prune(capsys, "--rate-config", "rates.json", *L1)
    found = ok_json(capsys, "decompose", "new.prototxt", "new.caffemodel", "-o", "both", "--speedup", "1.5")
    assert found["speedup"]["macs"] >= 1.5


# Refusals ---------------------------------------------------------------------------------------------------------

RATES = ("--rate-config", "rates.json")
IMAGES = ("--images", "images.npz")
REFUSED = [
    ((), "no amount is given"),
    ((*RATES, "--speedup", "2", *L1), "--rate-config and --speedup are given"),
    (RATES, "--criterion rank needs images"),
    ((*RATES, *L1, "--repair", "bn"), "--repair bn needs images"),
    ((*RATES, *L1, "--compare"), "--compare needs images"),
    ((*RATES, *L1, *IMAGES), "--images is not needed"),
    ((*RATES, *L1, "--rank-file", "r.json"), "--rank-file does not go with criterion l1"),
    ((*RATES, "--rank-file", "r.json", "--at", "conv"), "--at does not go with --rank-file"),
    ((*RATES, "--rank-file", "r.json", *IMAGES), "--images is not needed"),
    ((*RATES, *L1, "--at", "conv"), "--at only goes with criteria that are measured"),
    ((*RATES, *L1, "--rectify"), "--rectify only goes with criteria that are measured"),
    ((*RATES, *L1, "--save-ranks", "r.json"), "--save-ranks only goes with criteria that are measured"),
    ((*RATES, *L1, "--n-images", "3"), "--n-images only goes with --images"),
    ((*RATES, *IMAGES, "--positions", "3"), "--positions only goes with --repair lsq"),
    ((*RATES, *L1, "--rates-as", "hrank"), "--rates-as only goes with --rates"),
    ((*RATES, *L1, "--group-score", "max"), "--group-score only goes with --coupled"),
    ((*RATES, *L1, "--force"), "--force only goes with --plan or --rank-file"),
    (("--plan", "p.json", *L1), "--criterion does not go with --plan"),
    (("--plan", "p.json", "--round-to", "4"), "--round-to does not go with --plan"),
    ((*RATES, *L1, "--mask-only", "--coupled"), "--coupled does not go with rates and --mask-only"),
    ((*RATES, *L1, *IMAGES, "--mask-only", "--repair", "lsq"), "--repair lsq does not go with --mask-only"),
    ((*RATES, *L1, "--mask-only", "--then-decompose", "3"), "--then-decompose does not go with --mask-only"),
    ((*RATES, *L1, *IMAGES, "--repair", "none", "--repair", "bn"), "--repair none does not go"),
    (("--rates", "[0.5]", *L1), "1 rates for 4 positions"),
    (("--rates", "half", *L1), "rates cannot be read"),
    (("--speedup", "99", *L1), "cannot be met"),
    (("--speedup", "1.2", "--criterion", "gamma"), "its filters cannot be judged"),
    ((*RATES, *L1, "--except", "cc"), 'layer "cc": is no layer with filters'),
]  # fmt: skip


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_what_would_be_ignored_or_cannot_be_is_refused(
    options: tuple[str, ...], line: str, capsys: Capture
) -> None:
    assert line in refused(capsys, "prune", *NET, "-o", "new", *options)


def test_what_stands_elsewhere_is_refused(capsys: Capture) -> None:
    assert "-o PREFIX is missing" in refused(capsys, "prune", *NET, *RATES, *L1)
    assert "WEIGHTS is missing" in refused(capsys, "prune", NET[0], *RATES, *L1, "-o", "new")
    assert "--onnx only goes with -o" in refused(
        capsys, "prune", *NET, *RATES, *IMAGES, "--compare", "--onnx"
    )
    prune(capsys, *RATES, *L1)
    assert "--scheme does not go with a plan that prunes" in refused(
        capsys, "apply", "new.plan.json", *NET, "-o", "x", "--scheme", "svd"
    )
    assert "another weights file" in refused(
        capsys, "apply", "new.plan.json", "net.prototxt", "new.caffemodel", "-o", "x"
    )
    assert "would be overwritten" in refused(capsys, "prune", *NET, *RATES, *L1, "-o", "net")
