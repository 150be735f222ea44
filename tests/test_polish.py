"""Polishing: chains come back to the original, nothing else moves, never worse, the same for a seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="polishing needs torch")

import caffe_proto as cp  # noqa: E402
import lra  # noqa: E402
from caffe_proto.errors import Error, UsageError  # noqa: E402
from caffe_proto.model import Model  # noqa: E402
from caffe_proto.net import NetState, parse  # noqa: E402
from caffe_proto.rewrite import Narrow  # noqa: E402
from caffe_proto.rewrite import apply as rewrite  # noqa: E402
from caffe_proto.weights import NewEntry, Weights  # noqa: E402
from lra.matching import Side, match  # noqa: E402
from lra.plan import LayerPlan  # noqa: E402
from lra.polish import PolishReport, polish  # noqa: E402
from lra.polish_torch import Part, runs  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

DATA = (
    'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 dim: 8 dim: 7 } } }'
)
STEM = """
layer { name: "stem" type: "Convolution" bottom: "data" top: "stem" convolution_param { num_output: 8 kernel_size: 3 pad: 1 } }
layer { name: "stem_relu" type: "ReLU" bottom: "stem" top: "stem" }
"""
BODY = """
layer { name: "a" type: "Convolution" bottom: "stem" top: "a"
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "scale" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 8 kernel_size: 3 pad: 1 group: 2 } }
layer { name: "sum" type: "Eltwise" bottom: "stem" bottom: "b" top: "sum" }
layer { name: "out" type: "ReLU" bottom: "sum" top: "sum" relu_param { negative_slope: 0.1 } }
"""
HEAD = """
layer { name: "ip" type: "InnerProduct" bottom: "sum" top: "ip" inner_product_param { num_output: 5 } }
layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" }
"""
NET = DATA + STEM + BODY + HEAD
FULL = {"stem": (12,), "a": (24,), "b": (24,), "ip": (5,)}
LOSSY = {"stem": (6,), "a": (8,), "b": (8,), "ip": (4,)}
CHAINS = ["stem_v", "stem_h", "a_v", "a_h", "b_v", "b_h", "ip_lowrank", "ip_linear"]


def built(source: str = NET, state: NetState | None = None, **shapes: list[tuple[int, ...]]) -> Model:
    """The net with drawn weights; ``shapes``: of the blobs of further layers."""
    rng = np.random.default_rng(3)
    known: dict[str, list[tuple[int, ...]]] = {
        "stem": [(8, 4, 3, 3), (8,)], "a": [(8, 8, 3, 3)], "b": [(8, 4, 3, 3), (8,)], "ip": [(5, 448), (5,)],
        **shapes,
    }  # fmt: skip
    blobs = {
        name: [rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1) for shape in found]
        for name, found in known.items()
    }
    blobs["bn"] = [rng.standard_normal(8) / 3, rng.random(8) + 0.5, np.ones(1)]
    blobs["scale"] = [rng.random(8) + 0.5, rng.standard_normal(8) / 3]
    net = parse(source) if state is None else parse(source, None, state)
    present = {layer.name for layer in net.all_layers}
    entries = [
        NewEntry(name, tuple(np.asarray(one, np.float32) for one in arrays))
        for name, arrays in blobs.items()
        if name in present
    ]
    return Model(net, Weights(entries))


def images(n: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 4, 8, 7)).astype(np.float32)


def decomposed(model: Model, style: str = "default", **ranks: tuple[int, ...]) -> Model:
    """Chains from the weights alone: spatial, of the fully connected layer by channels."""
    layers = {name: LayerPlan("pca" if name == "ip" else "spatial", rank) for name, rank in ranks.items()}
    return lra.apply(lra.Plan(layers, target={"style": style}), model)[0]


def noisy(model: Model, names: list[str], by: float = 0.1) -> Model:
    """Weights of some layers with noise of that relative size."""
    rng = np.random.default_rng(7)
    assert model.weights is not None
    edits = []
    for name in names:
        found = tuple(
            (one + by * one.std() * rng.standard_normal(one.shape)).astype(np.float32)
            for one in model.weights[name]
        )
        edits.append(Narrow(name, (), found))
    return rewrite(model, edits)


def ran(model: Model, x: np.ndarray, blob: str = "ip") -> np.ndarray:
    """A blob by onnxruntime."""
    with cp.session(model, blobs=[blob], threads=1, input_shapes={"data": x.shape}) as session:
        return np.asarray(session.run({"data": x})[blob]).reshape(len(x), -1)


def apart(model: Model, other: Model, x: np.ndarray, blob: str = "ip") -> float:
    """||z - z'|| / ||z|| of a blob."""
    right = ran(model, x, blob)
    return float(np.linalg.norm(ran(other, x, blob) - right) / np.linalg.norm(right))


def stored(model: Model) -> dict[str, list[bytes]]:
    assert model.weights is not None
    return {name: [one.tobytes() for one in model.weights[name]] for name in model.weights}


def test_full_rank_chains_with_noise_come_back() -> None:
    model = built()
    broken = noisy(decomposed(model, **FULL), CHAINS[:6])
    mended, report = polish(model, broken, images(200), steps=150, threads=1)
    fresh = images(50, seed=9)
    assert apart(model, decomposed(model, **FULL), fresh) < 1e-5
    assert apart(model, broken, fresh) > 0.1
    assert apart(model, mended, fresh) < 0.1 * apart(model, broken, fresh)
    assert report.layers == tuple(CHAINS)


def test_activations_come_closer_not_the_outputs_alone() -> None:
    model = built()
    broken = decomposed(model, **LOSSY)
    mended, _ = polish(model, broken, images(200), steps=100, threads=1)
    fresh = images(50, seed=9)
    for blob in ("stem", "a", "sum", "ip"):
        assert apart(model, mended, fresh, blob) < 0.99 * apart(model, broken, fresh, blob), blob


def test_the_errors_are_those_of_the_last_tenth_of_the_images() -> None:
    model, x = built(), images(57)
    broken = decomposed(model, **LOSSY)
    mended, report = polish(model, broken, x, steps=30, threads=1)
    assert (report.images, report.held_out, report.steps) == (57, 5, 30) and report.best > 0
    np.testing.assert_allclose(report.before, apart(model, broken, x[-5:]), rtol=1e-4)
    np.testing.assert_allclose(report.after, apart(model, mended, x[-5:]), rtol=1e-4)


def test_it_is_never_worse_than_the_start() -> None:
    """The chains are the original up to rounding: no step can help, and the very net is given back."""
    model = built()
    exact = decomposed(model, **FULL)
    kept, report = polish(model, exact, images(30), steps=5, threads=1)
    assert kept is exact and report.best == 0 and report.after == report.before < 1e-5
    wild = polish(model, noisy(exact, CHAINS, 2.0), images(20), steps=3, threads=1)[1]
    assert wild.after <= wild.before


def test_nothing_else_moves() -> None:
    model = built()
    broken = noisy(decomposed(model, a=(8,)), ["b"])
    mended, report = polish(model, broken, images(40), steps=10, threads=1)
    assert report.layers == ("a_v", "a_h", "b") and report.best > 0
    before, after = stored(broken), stored(mended)
    assert {name for name in before if before[name] != after[name]} == set(report.layers)
    assert list(after) == list(before) and mended.net.text == broken.net.text
    assert {"stem", "bn", "scale", "ip"} <= set(after)


def test_every_layer_moves_where_asked_for() -> None:
    model = built()
    broken = decomposed(model, a=(8,))
    mended, report = polish(model, broken, images(40), steps=10, threads=1, every_layer=True)
    assert report.layers == ("stem", "a_v", "a_h", "b", "ip")
    before, after = stored(broken), stored(mended)
    assert {name for name in before if before[name] != after[name]} == set(report.layers)


def test_the_same_seed_gives_the_same_bytes() -> None:
    model = built()
    broken = decomposed(model, **LOSSY)
    one, two, other = (
        stored(polish(model, broken, images(80), steps=12, seed=seed, threads=1)[0]) for seed in (1, 1, 2)
    )
    assert one == two != other


def test_threads_are_set_for_the_steps_alone_and_each_step_ticks() -> None:
    model, before = built(), torch.get_num_threads()
    found: list[int] = []
    given = {"steps": 3, "threads": before + 1, "tick": lambda: found.append(torch.get_num_threads())}
    polish(model, decomposed(model, a=(8,)), images(3), **given)  # type: ignore[arg-type]
    assert found == [before + 1] * 3 and torch.get_num_threads() == before


def test_a_net_that_was_not_changed_is_given_back() -> None:
    model = built()
    assert polish(model, model, images(20)) == (model, PolishReport(0.0, 0.0, 0, 0, (), 20, 2))


def sides(model: Model, changed: Model) -> tuple[Side, Side]:
    given = {"data": images(4)}
    return Side.of(model, given), Side.of(changed, given)


@pytest.mark.parametrize("style", ["default", "he", "girshick", "tai", "wen"])
def test_what_is_drawn_together(style: str) -> None:
    """Outputs before softmax, and the activation behind batch norm and sum, whatever the style calls the blobs."""
    model = built()
    whole, cheap = sides(model, decomposed(model, style, **LOSSY))
    found = match(whole, cheap, runs)

    def said(side: Side, pairs: tuple[tuple[object, object], ...], which: int) -> list[str]:
        return [side.graph.nodes[pair[which].node].name for pair in pairs]  # type: ignore[attr-defined]

    assert said(whole, found.activations, 0) == ["stem_relu", "relu", "out"]
    assert said(cheap, found.activations, 1) == ["stem_relu", "relu", "out"]
    assert said(whole, found.outputs, 0) == ["ip"]
    (last,) = said(cheap, found.outputs, 1)
    assert last == cheap.graph.nodes[cheap.named["prob"] - 1].name != "ip"


def test_a_part_of_a_net_gives_what_the_net_gives() -> None:
    """Batch norm and scale are folded into the layers on the way; what is wanted in between is not folded over."""
    model, x = built(), images(6)
    side = Side.of(model, {"data": x})
    for names in (["ip"], ["bn", "relu", "ip"], ["scale", "out", "ip"]):
        wanted = [type(side.graph.sources[0])(side.named[name], 0) for name in names]
        with torch.no_grad():
            made = Part(side, wanted, {}).run({side.graph.sources[0]: torch.from_numpy(x)})
        np.testing.assert_allclose(made[-1].numpy(), ran(model, x), atol=1e-5)
        if "relu" in names:
            np.testing.assert_allclose(made[1].numpy().reshape(6, -1), ran(model, x, "a"), atol=1e-5)
        if "bn" in names:
            assert model.weights is not None
            gamma, beta = (one.reshape(-1, 1, 1) for one in model.weights["scale"])
            right = np.maximum(made[0].numpy() * gamma + beta, 0)
            np.testing.assert_allclose(made[1].numpy(), right, atol=1e-5)


UNKNOWN = 'layer { name: "odd" type: "Bespoke" bottom: "%s" top: "odd" }'


def test_it_works_up_to_a_layer_that_is_not_known() -> None:
    source = DATA + STEM + BODY + UNKNOWN % "sum" + HEAD.replace('bottom: "sum"', 'bottom: "odd"')
    model = built(source)
    model = Model(model.net, Weights([one for one in model.weights.pieces if one.name != "ip"]))  # type: ignore[union-attr]
    broken = noisy(model, ["a", "b"])
    mended, report = polish(model, broken, images(60), steps=40, threads=1)
    assert (
        mended.net.text == broken.net.text
        and report.layers == ("a", "b")
        and report.after < 0.7 * report.before
    )


def test_a_layer_in_front_that_is_not_known_is_named() -> None:
    source = DATA + UNKNOWN % "data" + STEM.replace('bottom: "data"', 'bottom: "odd"') + BODY + HEAD
    model = built(source)
    with pytest.raises(Error, match=r"odd.*Bespoke"):
        polish(model, model, images(10), every_layer=True)


def test_labels_are_not_needed() -> None:
    """Of a net with a loss the scores in front of it are drawn together."""
    loss = """
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 1 } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
"""
    model = built(NET.replace(HEAD, HEAD[: HEAD.index('layer { name: "prob"')]) + loss, NetState("TRAIN"))
    broken = noisy(model, ["a", "b", "ip"])
    mended, report = polish(model, broken, {"data": images(60)}, steps=40, threads=1)
    assert report.after < 0.7 * report.before
    assert mended.net.state.phase == "TRAIN"
    deploy = built()
    before, after = (Model(deploy.net, one.weights) for one in (broken, mended))
    np.testing.assert_allclose(report.before, apart(deploy, before, images(60)[-6:]), rtol=1e-4)
    np.testing.assert_allclose(report.after, apart(deploy, after, images(60)[-6:]), rtol=1e-4)


TIED = DATA + """
layer { name: "one" type: "Convolution" bottom: "data" top: "one" param { name: "w" } param { name: "c" }
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 } }
layer { name: "two" type: "Convolution" bottom: "one" top: "two" param { name: "w" } param { name: "c" }
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 } }
layer { name: "three" type: "Convolution" bottom: "two" top: "three" param { name: "v" } param { name: "c" }
  convolution_param { num_output: 4 kernel_size: 1 } }
"""  # fmt: skip


def test_shared_blobs_stay_shared() -> None:
    """Both chains keep one weight; the bias that a third layer shares stays where it is."""
    weight, bias = [(4, 4, 3, 3), (4,)]
    model = built(TIED, one=[weight, bias], two=[weight, bias], three=[(4, 4, 1, 1), bias])
    assert model.weights is not None
    same = model.weights["one"]
    model = rewrite(
        model, [Narrow("two", (), same), Narrow("three", (), (model.weights["three"][0], same[1]))]
    )
    broken = decomposed(model, one=(4,), two=(4,))
    mended, report = polish(model, broken, images(60), steps=40, threads=1)
    assert report.layers == ("one_v", "one_h", "two_v", "two_h") and report.after < 0.9 * report.before
    before, after = stored(broken), stored(mended)
    for step in ("_v", "_h"):
        assert after["one" + step] == after["two" + step] != before["one" + step]
    assert after["three"] == before["three"] and after["one_h"][1] == before["one_h"][1]
    np.testing.assert_allclose(report.after, apart(model, mended, images(60)[-6:], "three"), rtol=1e-4)


def test_blobs_keep_the_shape_they_are_stored_in() -> None:
    model = built()
    assert model.weights is not None
    weight, bias = model.weights["ip"]
    legacy = rewrite(
        model, [Narrow("ip", (), (weight.reshape(1, 1, *weight.shape), bias.reshape(1, 1, 1, -1)))]
    )
    mended, _ = polish(model, noisy(legacy, ["ip"]), images(40), steps=10, threads=1)
    assert mended.weights is not None
    assert [one.shape for one in mended.weights["ip"]] == [(1, 1, 5, 448), (1, 1, 1, 5)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 0}, "0 steps"),
        ({"images": images(1)}, "one image is too few"),
        ({"images": images(0)}, "no images"),
        ({"changed": Model(parse(NET))}, "no weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_polished_is_refused(given: dict[str, object], words: str) -> None:
    model = built()
    request: dict[str, object] = {"changed": decomposed(model, a=(8,)), "images": images(10), **given}
    with pytest.raises(UsageError, match=words):
        polish(model, **request)  # type: ignore[arg-type]


def test_without_torch_it_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None
from caffe_proto.errors import UsageError
from lra.polish import polish
try:
    polish(None, None, None)
except UsageError as error:
    print(error, error.hint)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "polishing needs torch" in found.stdout and "caffe-lra[train]" in found.stdout, found.stderr
