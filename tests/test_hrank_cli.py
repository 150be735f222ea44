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


def test_a_page_is_written_beside(capsys: Capture) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    options = ("--rate-config", "rates.json", *L1, "--images", "images.npz", "--repair", "lsq")
    made = prune(capsys, *options, "--report")
    assert made["files"]["html"] == "new.html"
    page = Path("new.html").read_text()
    assert "caffe-lra prune net.prototxt net.caffemodel -o new" in page
    judged = Judge(cp.load(*NET), images(), None, 1)(load())
    assert f"<td>{judged.agreement.value:.4f} ± {judged.agreement.error:.4f}</td>" in page
    for name, error in made["repairs"][0]["errors"].items():
        assert name in page and f"{error:.4f}" in page
    Path("net.html").write_text("mine")
    assert "--report only goes with -o PREFIX" in refused(
        capsys, "prune", *NET, "--speedup", "1.2", "--images", "images.npz", "--compare", "--report"
    )
    assert "would be overwritten" in refused(
        capsys, "prune", *NET, "-o", "new", "--rate-config", "new.html", *L1, "--report"
    )


def test_what_cannot_be_written_is_seen_before_the_work(capsys: Capture) -> None:
    err = refused(capsys, "prune", *NET, "-o", "nowhere/new", "--speedup", "1.2", "--images", "absent.npz")
    assert "there is no folder 'nowhere'" in err


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


REPAIRED = ("--repair", "bias", "--repair", "lsq", "--repair", "bn")


def test_a_plan_repeats_its_repairs(capsys: Capture) -> None:
    drawn = ("--images", "images.npz", "--n-images", "30", "--seed", "7", "--positions", "20")
    prune(capsys, "--rate-config", "rates.json", *L1, *drawn, *REPAIRED)
    said = Plan.from_json(Path("new.plan.json").read_text()).target["repair"]
    assert {key: said[key] for key in ("made", "images", "seed", "positions")} == {
        "made": ["bias", "lsq", "bn"], "images": 30, "seed": 7, "positions": 20,
    }  # fmt: skip
    made = prune(capsys, "--plan", "new.plan.json", "--images", "images.npz", out="again")
    assert [one["name"] for one in made["repairs"]] == ["bias", "lsq", "bn"]
    ok(capsys, "apply", "new.plan.json", *NET, "-o", "carried", "--images", "images.npz", "--threads", "1")
    for kind in ("prototxt", "caffemodel", "plan.json"):
        for other in ("again", "carried"):
            assert Path(f"{other}.{kind}").read_bytes() == Path(f"new.{kind}").read_bytes(), (other, kind)
    prune(capsys, "--plan", "new.plan.json", "--repair", "none", out="bare")
    assert np.abs(outputs(load("bare")) - outputs(load())).max() > 0.01
    assert "repair" not in Plan.from_json(Path("bare.plan.json").read_text()).target
    prune(capsys, "--plan", "bare.plan.json", *drawn, *REPAIRED, out="later")
    assert Path("later.caffemodel").read_bytes() == Path("new.caffemodel").read_bytes()
    assert Path("later.plan.json").read_bytes() == Path("new.plan.json").read_bytes()


def test_the_train_val_is_repaired_as_the_net_was(capsys: Capture) -> None:
    prune(capsys, "--rate-config", "rates.json", *L1, "--images", "images.npz", *REPAIRED)
    ok(capsys, "apply", "new.plan.json", "train.prototxt", NET[1], "-o", "train_new", "--images", "images.npz",
       "--input-shape", "data=4,3,8,8", "--threads", "1")  # fmt: skip
    found, wanted = cp.load("train_new.prototxt", "train_new.caffemodel"), load()
    assert found.weights is not None and wanted.weights is not None
    assert list(found.weights) == list(wanted.weights)
    for name in wanted.weights:
        for mine, theirs in zip(found.weights[name], wanted.weights[name], strict=True):
            assert np.array_equal(mine, theirs), name


def test_masks_are_repaired_again_as_masks(capsys: Capture) -> None:
    Path("rates.json").write_text('{"a": 0.4, "b": 0.25, "c": 0.5}')
    masked = ("--mask-only", "--repair", "bias", "--repair", "bn")
    prune(capsys, "--rate-config", "rates.json", *L1, "--images", "images.npz", *masked)
    ok(capsys, "apply", "new.plan.json", *NET, "-o", "again", "--images", "images.npz", "--threads", "1")
    assert Path("again.caffemodel").read_bytes() == Path("new.caffemodel").read_bytes()
    prune(capsys, "--rate-config", "rates.json", *L1, "--mask-only", out="bare")
    plan, x = Plan.from_json(Path("new.plan.json").read_text()), images()
    biased = compensate(plan, cp.load(*NET), load("bare"), x, mask_only=True, threads=1).model
    assert outputs(load()) == pytest.approx(outputs(reestimate(biased, x, threads=1).model), abs=1e-5)


def test_a_plan_of_both_is_repaired_between(capsys: Capture) -> None:
    prune(
        capsys, "--speedup", "1.3", *L1, "--images", "images.npz", "--repair", "lsq", "--repair", "bn",
        "--then-decompose", "2",
    )  # fmt: skip
    ok(capsys, "apply", "new.plan.json", *NET, "-o", "again", "--images", "images.npz", "--threads", "1")
    for kind in ("prototxt", "caffemodel", "plan.json"):
        assert Path(f"again.{kind}").read_bytes() == Path(f"new.{kind}").read_bytes()


def test_repairs_of_a_plan_want_their_images(capsys: Capture) -> None:
    drawn = ("--images", "images.npz", "--n-images", "30")
    prune(capsys, "--rate-config", "rates.json", *L1, *drawn, "--repair", "bn")
    again = ("apply", "new.plan.json", *NET, "-o", "x")
    for command in (("prune", *NET, "--plan", "new.plan.json", "-o", "x"), again):
        err = refused(capsys, *command)
        assert "repairs the weights (bn) from 30 images; give those it was made with (--images SRC)" in err
        assert "made with other images: seed 0 there, 3 here" in refused(
            capsys, *command, "--images", "images.npz", "--seed", "3"
        )
    with np.load("images.npz") as arrays:
        np.savez("others.npz", x=arrays["x"] + 1, y=arrays["y"])
    assert "made with other images: sha256" in refused(capsys, *again, "--images", "others.npz")
    ok(capsys, *again, "--images", "others.npz", "--force")
    assert "--positions does not go with the repairs of this plan" in refused(
        capsys, *again, "--images", "images.npz", "--positions", "3"
    )
    assert "--images only goes with WEIGHTS" in refused(
        capsys, "apply", "new.plan.json", NET[0], "-o", "y", "--images", "images.npz"
    )
    prune(capsys, "--rate-config", "rates.json", *L1, out="bare")
    assert "--n-images only goes with WEIGHTS and a plan that repairs them" in refused(
        capsys, "apply", "bare.plan.json", *NET, "-o", "y", "--n-images", "3"
    )


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("better", '"repair" must name repairs'),
        ({"made": ["new"]}, '"repair" must name repairs'),
        ({"made": ["bn"], "images": "all"}, "must be whole numbers"),
    ],
)
def test_repairs_that_a_plan_gets_wrong(said: Any, line: str, capsys: Capture) -> None:
    prune(capsys, "--rate-config", "rates.json", *L1)
    plan = json.loads(Path("new.plan.json").read_text())
    plan["target"]["repair"] = said
    Path("wrong.plan.json").write_text(json.dumps(plan))
    assert line in refused(capsys, "apply", "wrong.plan.json", *NET, "-o", "x")


def test_a_plan_of_old_names_its_repairs_alone(capsys: Capture) -> None:
    prune(capsys, "--rate-config", "rates.json", *L1, "--images", "images.npz", "--repair", "bn")
    plan = json.loads(Path("new.plan.json").read_text())
    plan["target"]["repair"] = ["bn"]
    Path("old.plan.json").write_text(json.dumps(plan))
    ok(capsys, "apply", "old.plan.json", *NET, "-o", "x", "--images", "images.npz", "--threads", "1")
    assert Path("x.caffemodel").read_bytes() == Path("new.caffemodel").read_bytes()


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


MODELS = Path(__file__).resolve().parents[1] / "models"
GOOGLENET = (str(MODELS / "googlenet_cifar" / "deploy.prototxt"), "--rates", "[0.10]+[0.8]*5+[0.85]+[0.8]*3")
RESNET_50 = (
    str(MODELS / "resnet_50_v1.5" / "deploy.prototxt"), "--rates", "[0.2]+[0.8]*10+[0.8]*13+[0.55]*19+[0.45]*10"
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "flops", "params"),
    [
        (RESNET_50, "1549.65", "13.77"),
        (GOOGLENET, "450.06", "1.86"),
        ((*GOOGLENET, "--count-c4-slip"), "450.06", "1.86"),
        ((*GOOGLENET, "--no-count-c4-slip"), "455.68", "1.88"),
    ],
)
def test_published_counts_by_the_command(
    capsys: Capture, given: tuple[str, ...], flops: str, params: str
) -> None:
    arguments = ("prune", *given, "--dry-run", "--count", "hrank")
    found = ok_json(capsys, *arguments)["counted"]
    assert (f"{found['flops'][1] / 1e6:.2f}", f"{found['params'][1] / 1e6:.2f}") == (flops, params)
    said = "hrank, no c4 slip" if "--no-count-c4-slip" in given else "hrank"
    assert found["as"] == said and f"FLOPs as {said} " in ok(capsys, *arguments)[0]


def test_the_slip_is_of_one_count_of_one_net(capsys: Capture) -> None:
    slip = ("--dry-run", "--no-count-c4-slip")
    for given in (
        GOOGLENET,
        (*GOOGLENET, "--count", "hrankplus"),
        (*GOOGLENET, "--count", "hrank", "--rates-as", "hrankplus"),
        (*GOOGLENET[:1], "--count", "hrank"),
    ):
        assert "--count-c4-slip only goes with --count hrank" in refused(capsys, "prune", *given, *slip)
    err = refused(capsys, "prune", *RESNET_50, "--count", "hrank", *slip)
    assert "--count-c4-slip only goes with the GoogLeNet of CIFAR" in err


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
    err = refused(capsys, "prune", *NET, "--speedup", "1.3", *L1, "--then-decompose", "1.1", "-o", "x")
    assert "pruning alone makes it" in err


def test_a_train_val_takes_a_plan_of_both(capsys: Capture) -> None:
    made = prune(capsys, "--speedup", "1.3", *L1, "--then-decompose", "2")
    carried = ok_json(capsys, "apply", "new.plan.json", "train.prototxt", NET[1], "-o", "train_new")
    assert carried["speedup"] == made["speedup"]
    with cp.session(load("new", "train_new.prototxt"), ["end"], threads=1,
                    input_shapes={"data": (1, 3, 8, 8), "label": (1,)}) as opened:  # fmt: skip
        found = np.concatenate([opened.run({"data": image[None]})["end"] for image in images()])
    assert found == pytest.approx(outputs(load()), abs=1e-5)


def test_plans_of_other_kinds_are_named(capsys: Capture) -> None:
    prune(capsys, "--speedup", "1.3", *L1)
    prune(capsys, "--speedup", "1.3", *L1, "--then-decompose", "2", out="both")
    ok(capsys, "decompose", *NET, "-o", "low", "--speedup", "1.3")
    for command, plan, line in (
        ("decompose", "new", "is a plan that prunes; caffe-lra prune NET WEIGHTS --plan PLAN"),
        ("decompose", "both", "prunes a net and decomposes what is left; caffe-lra apply PLAN NET WEIGHTS"),
        ("prune", "both", "prunes a net and decomposes what is left; caffe-lra apply PLAN NET WEIGHTS"),
        ("prune", "low", "is a plan that decomposes; caffe-lra decompose NET WEIGHTS --plan PLAN"),
    ):
        err = refused(capsys, command, *NET, "--plan", f"{plan}.plan.json", "-o", "x")
        assert f"{plan}.plan.json: " in err and line in err
    assert "is a plan that prunes" in refused(
        capsys, "decompose", *NET, "--rank-config", "new.plan.json", "-o", "x"
    )
    Path("short.json").write_text('{"a": 3}')
    assert "is a plan that decomposes" in refused(capsys, "prune", *NET, "--plan", "short.json", "-o", "x")


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
