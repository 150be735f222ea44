"""The spatial scheme with H before V: the same numbers as V before H of the turned kernel, and who may choose it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import pytest
from test_latency_plan import BLOCK, ENGINE, stairs, table

import caffe_proto as cp
import lra
from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.weights import NewEntry
from lra import Plan
from lra import latency as latency_module
from lra.cli import main
from lra.decomposition import Geometry
from lra.latency import Latency
from lra.latency_plan import Prices
from lra.latency_table import Chain, describe
from lra.plan import LayerPlan
from lra.schemes import ALL_SCHEMES
from lra.schemes.spatial import SPATIAL, SPATIAL_HV
from lra.targets import Found, find

SHAPES = [((8, 3, 3, 5), 1), ((6, 2, 5, 3), 2), ((12, 1, 3, 3), 4), ((4, 5, 1, 3), 1), ((3, 4, 7, 1), 1)]
UNEVEN = Geometry((2, 3), (1, 2), (2, 1), 1)

NET = (
    nets.inputs(data=(2, 6, 14, 17))
    + """
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" param { lr_mult: 1 } param { lr_mult: 2 }
  convolution_param { num_output: 12 kernel_h: 3 kernel_w: 5 pad_h: 1 pad_w: 2 stride_h: 2 stride_w: 1 dilation: 2 dilation: 1 group: 2 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "bare" type: "Convolution" bottom: "conv" top: "bare"
  convolution_param { num_output: 16 kernel_size: 3 pad: 1 bias_term: false } }
"""
)


def turned(geometry: Geometry) -> Geometry:
    (sh, sw), (ph, pw), (dh, dw) = geometry.stride, geometry.pad, geometry.dilation
    return Geometry((sw, sh), (pw, ph), (dw, dh), geometry.group)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_it_is_v_before_h_of_the_turned_kernel(shape: tuple[int, int, int, int], group: int) -> None:
    """Step by step: H of a kernel is V of the turned one, turned back; so are the geometries and the energies."""
    weight, bias = drawn(*shape), drawn(shape[0], seed=1)
    geometry = replace(UNEVEN, group=group)
    mine = SPATIAL_HV.spectrum(weight, geometry)
    other = SPATIAL.spectrum(weight.swapaxes(2, 3), turned(geometry))
    np.testing.assert_array_equal(mine.energies, other.energies)
    for rank in range(group, mine.max_rank + 1, group):
        steps, mirrored = mine.factor(rank, bias).steps, other.factor(rank, bias).steps
        assert [step.suffix for step in steps] == ["_h", "_v"]
        for step, one in zip(steps, mirrored, strict=True):
            np.testing.assert_array_equal(step.weight, one.weight.swapaxes(2, 3))
            back = turned(Geometry(one.stride, one.pad, one.dilation, one.group))
            assert Geometry(step.stride, step.pad, step.dilation, step.group) == back
        assert steps[0].bias is None
        np.testing.assert_array_equal(steps[1].bias, bias)


def test_it_is_the_truncated_svd_of_its_own_matrix() -> None:
    """Each entry by the sum over components, from the matrix A[(i, w), (h, o)] built entry by entry."""
    out, depth, height, width, rank = 5, 2, 3, 4, 3
    weight = drawn(out, depth, height, width)
    A = np.zeros((depth * width, height * out))
    for o, i, h, w in itertools.product(range(out), range(depth), range(height), range(width)):
        A[i * width + w, h * out + o] = weight[o, i, h, w]
    u, s, vt = np.linalg.svd(A, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
    expected = np.zeros_like(weight)
    for o, i, h, w in itertools.product(range(out), range(depth), range(height), range(width)):
        expected[o, i, h, w] = cut[i * width + w, h * out + o]
    spectrum = SPATIAL_HV.spectrum(weight, Geometry())
    chain = spectrum.factor(rank)
    np.testing.assert_allclose(chain.reconstruct(), expected, atol=1e-12)
    H, V = (step.weight for step in chain.steps)
    assert H.shape == (rank, depth, 1, width) and V.shape == (out, rank, height, 1)
    for o, i, h, w in itertools.product(range(out), range(depth), range(height), range(width)):
        assert sum(V[o, r, h, 0] * H[r, i, 0, w] for r in range(rank)) == pytest.approx(expected[o, i, h, w])
    assert np.linalg.norm(weight - expected) ** 2 == pytest.approx(np.sum(s[rank:] ** 2))
    assert spectrum.energies[0] == pytest.approx(s**2)


def test_shapes_by_hand() -> None:
    geometry = Geometry((2, 3), (1, 2), (3, 4), 2)
    h, v = SPATIAL_HV.structure((10, 4, 5, 7), geometry, 6)
    assert (h.suffix, h.shape, h.stride, h.pad, h.dilation, h.group) == (
        "_h", (6, 4, 1, 7), (1, 3), (0, 2), (1, 4), 2,
    )  # fmt: skip
    assert (v.suffix, v.shape, v.stride, v.pad, v.dilation, v.group) == (
        "_v", (10, 3, 5, 1), (2, 1), (1, 0), (3, 1), 2,
    )  # fmt: skip
    assert SPATIAL_HV.max_rank((10, 4, 5, 7), 2) == 2 * min(4 * 7, 5 * 5)
    assert SPATIAL.max_rank((10, 4, 5, 7), 2) == 2 * min(4 * 5, 5 * 7)
    for rank, match in ((0, "not positive"), (5, "not a multiple of group 2"), (52, "above the largest")):
        with pytest.raises(ValueError, match=match):
            SPATIAL_HV.structure((10, 4, 5, 7), geometry, rank)


def holding(source: str, stored: Mapping[str, tuple[np.ndarray, ...]]) -> Model:
    """A net with these blobs."""
    model = nets.model(source)
    entries = {name: [NewEntry(name, blobs)] for name, blobs in stored.items()}
    assert model.weights is not None
    return replace(model, weights=model.weights.replace(entries))


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    with cp.session(model, threads=1) as opened:
        (made,) = opened.run({"data": x}).values()
    return made


def config(model: Model, share: float = 1.0) -> dict[str, LayerPlan]:
    found = find(model)
    ranks = {}
    for name, target in found.targets.items():
        group = target.geometry.group
        most = SPATIAL_HV.max_rank(target.shape, group) // group
        ranks[name] = LayerPlan("spatial-hv", (max(1, int(most * share)) * group,))
    return ranks


def test_a_net_at_full_rank_computes_the_same() -> None:
    model = nets.model(NET)
    plan = lra.make_plan(model, rank_config=config(model), even_if_slower=True)
    changed, _ = lra.apply(plan, model)
    assert [layer.name for layer in changed.net.layers] == [
        "data", "conv_h", "conv_v", "relu", "bare_h", "bare_v",
    ]  # fmt: skip
    x = drawn(2, 6, 14, 17, seed=3).astype(np.float32)
    np.testing.assert_allclose(outputs(changed, x), outputs(model, x), atol=2e-4)


def test_a_net_at_any_rank_computes_the_kernel_that_the_chain_stands_for() -> None:
    """Against the dense net with the reconstructed kernels: strides, pads, dilations, groups, borders included."""
    model = nets.model(NET)
    entries = config(model, 0.4)
    changed, _ = lra.apply(lra.make_plan(model, rank_config=entries, even_if_slower=True), model)
    found = find(model)
    stored = {}
    for name, target in found.targets.items():
        weight, *bias = found.blobs[target.index]
        kernel = SPATIAL_HV.spectrum(weight, target.geometry).factor(entries[name].ranks[0]).reconstruct()
        assert np.linalg.norm(kernel - weight) > 0.1 * np.linalg.norm(weight)
        stored[name] = (kernel.astype(np.float32), *bias)
    dense = holding(NET, stored)
    x = drawn(2, 6, 14, 17, seed=3).astype(np.float32)
    np.testing.assert_allclose(outputs(changed, x), outputs(dense, x), atol=2e-4)


def test_plan_files_carry_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """decompose, the plan file, apply, diff: the same net again, and the pair in the order in which it runs."""
    net, weights = nets.files(tmp_path, NET)
    made = str(tmp_path / "a")
    assert main(["decompose", net, weights, "-o", made, "--scheme", "spatial-hv", "--ranks", "4,6"]) == 0
    plan = Plan.from_json(Path(f"{made}.plan.json").read_text())
    assert {name: (one.scheme, one.ranks) for name, one in plan.layers.items()} == {
        "conv": ("spatial-hv", (4,)),
        "bare": ("spatial-hv", (6,)),
    }
    again = str(tmp_path / "b")
    assert main(["apply", f"{made}.plan.json", net, weights, "-o", again]) == 0
    for kind in ("prototxt", "caffemodel", "plan.json"):
        assert Path(f"{made}.{kind}").read_bytes() == Path(f"{again}.{kind}").read_bytes()
    capsys.readouterr()
    assert main(["diff", f"{net},{weights}", f"{made}.prototxt,{made}.caffemodel"]) == 1
    said = capsys.readouterr().out
    assert "3x5x12 -> conv_h 1x5x4 + conv_v 3x1x12" in said
    assert "3x3x16 -> bare_h 1x3x6 + bare_v 3x1x16" in said
    pytest.importorskip("matplotlib")
    assert main(["report", made, net, weights, "-o", str(tmp_path / "r.html")]) == 0
    assert "spatial-hv" in (tmp_path / "r.html").read_text()


def test_learning_rates_stay() -> None:
    model = nets.model(NET)
    changed, _ = lra.apply(lra.make_plan(model, scheme="spatial-hv", ranks=[4, 6]), model)
    rates = {
        layer.name: [spec.string("lr_mult") for spec in layer.message.messages("param")]
        for layer in changed.net.layers
    }
    assert (rates["conv_h"], rates["conv_v"]) == (["1"], ["1", "2"])


def test_it_is_fitted_to_images() -> None:
    """At full rank the fit finds the net itself; at a lower one it beats the weights alone."""
    model = nets.model(NET)
    x = drawn(80, 6, 14, 17, seed=4).astype(np.float32)
    fresh = drawn(10, 6, 14, 17, seed=5).astype(np.float32)
    expected = outputs(model, fresh)

    def error(ranks: dict[str, LayerPlan], images: np.ndarray | None) -> float:
        plan = lra.make_plan(model, rank_config=ranks, even_if_slower=True, images=images)
        made, _ = lra.apply(plan, model, images=images)
        return float(np.linalg.norm(outputs(made, fresh) - expected) / np.linalg.norm(expected))

    assert error(config(model), x) < 2e-3
    low = config(model, 0.3)
    assert error(low, x) < 0.97 * error(low, None)


@pytest.mark.parametrize("style", ["wen", "tai", "he"])
def test_styles_of_tools_without_that_order_refuse_it(style: str) -> None:
    model = nets.model(NET)
    with pytest.raises(UsageError, match=f'"{style}" knows V before H only'):
        lra.make_plan(model, scheme="spatial-hv", ranks=[4, 6], style=style)
    with pytest.raises(UsageError, match="V before H only"):
        lra.make_plan(model, rank_config={"conv": LayerPlan("spatial-hv", (4,))}, style=style)
    plan = lra.make_plan(model, scheme="spatial-hv", ranks=[4, 6]).completed("pca", style)
    with pytest.raises(PlanError, match="V before H only"):
        lra.apply(plan, model)
    lra.make_plan(model, scheme="spatial", ranks=[4, 6], style=style)


WIDE = nets.inputs(data=(1, 8, 12, 40)) + (
    'layer { name: "c" type: "Convolution" bottom: "data" top: "c" '
    "convolution_param { num_output: 16 kernel_size: 3 %s } }\n"
)


@pytest.mark.parametrize(
    ("settings", "style", "chosen"),
    [
        ("pad: 1", "default", "spatial"),  # square: nothing to gain
        ("pad: 1 stride_h: 1 stride_w: 2", "default", "spatial-hv"),  # H first makes the map narrow at once
        ("pad: 1 stride_h: 2 stride_w: 1", "default", "spatial"),
        ("pad: 1 stride_h: 1 stride_w: 2", "tai", "pca"),  # its tool has no such order
    ],
)
def test_auto_takes_the_order_of_fewer_multiplications(settings: str, style: str, chosen: str) -> None:
    """Weights of spatial rank 2 in either order, so that only the costs tell them apart."""
    separable = np.einsum("or,ri,h,w->oihw", drawn(16, 2), drawn(2, 8, seed=1), [1, 2, 3], [1, -1, 2])
    model = holding(WIDE % settings, {"c": (separable.astype(np.float32), np.zeros(16, np.float32))})
    found = find(model).targets["c"]
    plan = lra.make_plan(model, energy=0.999, style=style)
    entry = plan.layers["c"]
    assert entry.scheme == chosen and entry.ranks == (2,)
    costs = [found.chain_cost(ALL_SCHEMES[name], 2) for name in ("spatial", "spatial-hv", "pca")]
    if style == "default":
        assert found.chain_cost(ALL_SCHEMES[chosen], 2) == min(costs)
    by_speedup = lra.make_plan(model, speedup=1.5, style=style).layers["c"]
    assert by_speedup.scheme in (chosen, "pca")


# by measured time, from tables whose times are made up


def favouring_h(chain: Chain) -> float:
    """Kernels that run a horizontal layer in no time where it comes first."""
    return stairs(chain) * (0.5 if len(chain) == 2 and chain[0].suffix == "_h" else 1)


def probing(seconds: Callable[[Chain], float], path: Path, asked: list[str]) -> Latency:
    """Latencies that know everything but H before V; what is measured of it is made up, and noted."""

    class Made(Latency):
        def measure_chains(self, targets, chains, step=lambda: None):  # type: ignore[no-untyped-def]
            for target in targets:
                for chain in chains.get(target.name, ()):
                    place = self.drawing.place(target)
                    if self.table.get(place, chain) is None:
                        asked.append(f"{target.name} {chain[0].suffix} {chain[0].shape[0]}")
                        self.table.put(place, chain, latency_module.Measured(seconds(chain), 0.01, 10))

    return Made(find(MODEL), ENGINE, path)


TIMED = nets.inputs(data=(1, 24, 16, 16)) + (
    'layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 32 kernel_size: 3 pad: 1 } }\n'
    'layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }\n'
    'layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 48 kernel_size: 3 pad: 1 group: 2 } }\n'
)
MODEL = nets.model(TIMED)


def without_turned(path: Path, seconds: Callable[[Chain], float]) -> Path:
    """A table that lacks the chains of H before V."""
    table(path, MODEL, seconds)
    value = json.loads(path.read_text())
    for entry in value["machines"].values():
        for chains in entry["layers"].values():
            for name in [
                one
                for one in chains
                if one.split(";")[0].split()[-1].startswith("1x3") or " 1x3 " in one.split(";")[0]
            ]:
                del chains[name]
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("seconds", [stairs, favouring_h])
def test_plans_by_time_take_the_faster_order(tmp_path: Path, seconds: Callable[[Chain], float]) -> None:
    path = table(tmp_path / "t.json", MODEL, seconds)
    plan = lra.make_plan(MODEL, cost="latency", latency=Latency(find(MODEL), ENGINE, path), speedup=1.5)
    schemes = {entry.scheme for entry in plan.layers.values()}
    assert ("spatial-hv" in schemes) == (seconds is favouring_h)
    assert "spatial" not in schemes if seconds is favouring_h else True
    tai = lra.make_plan(
        MODEL, cost="latency", latency=Latency(find(MODEL), ENGINE, path), speedup=1.2, style="tai"
    )
    assert "spatial-hv" not in {entry.scheme for entry in tai.layers.values()}


def test_the_slower_order_is_measured_at_three_ranks_only(tmp_path: Path) -> None:
    found: Found = find(MODEL)
    for seconds, whole in ((stairs, False), (favouring_h, True)):
        path, asked = without_turned(tmp_path / f"{whole}.json", seconds), []  # type: tuple[Path, list[str]]
        prices = Prices(probing(seconds, path, asked))
        targets = [found.targets[name] for name in "ab"]
        prices.measure(targets, {name: [SPATIAL, SPATIAL_HV] for name in "ab"})
        assert all(" _h " in one for one in asked)
        for target in targets:
            mine = sorted(int(one.split()[-1]) for one in asked if one.startswith(target.name))
            ranks = prices.latency.ranks(target, SPATIAL_HV)
            unit = BLOCK * target.geometry.group
            assert ranks[0] == unit
            if whole:
                assert mine == ranks
            else:
                assert mine == sorted({ranks[len(ranks) * k // 4] for k in (1, 2, 3)})
            offered = prices.options(target, [SPATIAL_HV], lambda *_: 1.0)[1:]
            assert bool(offered) == whole
        again: list[str] = []
        prices.latency.table.write()
        fresh = Prices(probing(seconds, path, again))
        fresh.measure(targets, {name: [SPATIAL, SPATIAL_HV] for name in "ab"})
        assert again == []  # a second plan on the machine measures nothing


def test_times_level_within_their_noise_are_not_faster(tmp_path: Path) -> None:
    path = table(
        tmp_path / "t.json", MODEL, lambda chain: stairs(chain) * (0.99 if chain[0].suffix == "_h" else 1)
    )
    latency = Latency(find(MODEL), ENGINE, path)
    target = find(MODEL).targets["a"]
    pairs = [
        tuple(scheme.chain(target.shape, target.geometry, (rank,)) for rank in (4, 8, 12))
        for scheme in (SPATIAL_HV, SPATIAL)
    ]
    assert not latency.faster(target, *pairs)
    assert latency.seconds(target, pairs[0][0]) < latency.seconds(target, pairs[1][0])
    sure = table(
        tmp_path / "u.json", MODEL, lambda c: stairs(c) * (0.99 if c[0].suffix == "_h" else 1), noise=1e-4
    )
    assert Latency(find(MODEL), ENGINE, sure).faster(target, *pairs)
    assert not Latency(find(MODEL), ENGINE, sure).faster(target, *reversed(pairs))


def test_times_of_a_run_name_both_orders() -> None:
    """The table's key of a chain tells the orders apart."""
    target = find(MODEL).targets["a"]
    chains = [scheme.chain(target.shape, target.geometry, (8,)) for scheme in (SPATIAL, SPATIAL_HV)]
    assert [describe(chain) for chain in chains] == [
        "24 -> 8 3x1 pad 1,0; 8 -> 32 1x3 pad 0,1",
        "24 -> 8 1x3 pad 0,1; 8 -> 32 3x1 pad 1,0",
    ]
