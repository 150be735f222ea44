"""Where maps are read, what one pass of images says of them, what weights say, and the files of ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from helpers import SHARED
from nets import inputs, needs_shared, random_weights

import caffe_proto as cp
from caffe_proto import binding
from caffe_proto.data.base import Arrays
from caffe_proto.data.batches import Batches
from caffe_proto.errors import Error, FileError, NetError, PlanError, UsageError, WeightsError
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.net import load, parse
from caffe_proto.shape_inference import Shaped, infer
from caffe_proto.weights import NewEntry, Weights
from hrank import measure as measuring
from hrank import rank_files
from hrank.criteria import kept, scores
from hrank.measure import Measured, SiteSums, evidence_of, measure
from hrank.sites import Site, evidence, find_sites

MODELS = Path(__file__).resolve().parents[1] / "models"


def model(source: str) -> Model:
    """A net with random weights, variances positive."""
    parsed = parse(source)
    weights = random_weights(parsed)
    kinds = {one.name: one.type for one in parsed.layers}
    entries = [
        NewEntry(name, tuple(map(np.abs, weights[name])) if kinds[name] == "BatchNorm" else weights[name])
        for name in weights
    ]
    return Model(parsed, Weights(entries))


def layer(kind: str, bottoms: str, top: str, settings: str = "", name: str = "") -> str:
    """One layer, named as its top where no name is given."""
    read = " ".join(f'bottom: "{bottom}"' for bottom in bottoms.split())
    wrote = " ".join(f'top: "{one}"' for one in top.split())
    return f'layer {{ name: "{name or top}" type: "{kind}" {read} {wrote} {settings} }}\n'


def conv(bottom: str, top: str, outputs: int, size: int = 3, more: str = "") -> str:
    """A convolution that keeps the size of its maps, for odd kernels."""
    p = f"num_output: {outputs} kernel_size: {size} pad: {size // 2} {more}"
    return layer("Convolution", bottom, top, f"convolution_param {{ {p} }}")


def pool(bottom: str, top: str, settings: str = "pool: MAX kernel_size: 2 stride: 2") -> str:
    return layer("Pooling", bottom, top, f"pooling_param {{ {settings} }}")


def shaped_of(source: str) -> Shaped:
    return infer(build(parse(source)), partial=True)


def where(shaped: Shaped, site: Site) -> tuple[str, int, int]:
    """The layer that writes a site's value, and its channels."""
    return shaped.graph.nodes[site.value.node].name, site.start, site.stop


def sites_of(source: str, at: Any = "relu") -> dict[str, tuple[str, int, int]]:
    shaped = shaped_of(source)
    return {name: where(shaped, site) for name, site in find_sites(shaped, at).found.items()}


DATA = inputs(data=(2, 3, 8, 8))
IN_PLACE = (
    DATA
    + conv("data", "c1", 4, more="bias_term: false")
    + layer("BatchNorm", "c1", "c1", name="bn1")
    + layer("Scale", "c1", "c1", "scale_param { bias_term: true }", name="scale1")
    + layer("ReLU", "c1", "c1", name="relu1")
    + pool("c1", "p1")
    + conv("p1", "c2", 6)
    + layer("ReLU", "c2", "c2", name="relu2")
    + layer("InnerProduct", "c2", "fc", "inner_product_param { num_output: 5 }")
)
RESIDUAL = (
    DATA
    + conv("data", "c1", 4)
    + layer("ReLU", "c1", "c1", name="relu1")
    + conv("c1", "c2", 4)
    + layer("ReLU", "c2", "c2", name="relu2")
    + conv("c2", "c3", 4)
    + layer("BatchNorm", "c3", "c3", name="bn3")
    + conv("c1", "projection", 4, 1)
    + layer("Eltwise", "projection c3", "sum")
    + layer("ReLU", "sum", "sum", name="relu3")
    + conv("sum", "c4", 4)
)
CONCAT = (
    DATA
    + conv("data", "stem", 5)
    + conv("data", "a", 3, 1)
    + layer("Concat", "stem a stem", "joined")
    + layer("BatchNorm", "joined", "normal")
    + layer("Scale", "normal", "normal", name="scale")
    + layer("ReLU", "normal", "normal", name="relu")
    + layer("Dropout", "normal", "normal", name="drop")
    + pool("normal", "p")
    + conv("p", "last", 2)
)


def test_sites_behind_in_place_layers() -> None:
    assert sites_of(IN_PLACE) == {"c1": ("relu1", 0, 4), "c2": ("relu2", 0, 6)}
    assert sites_of(IN_PLACE, "after_pool") == {"c1": ("p1", 0, 4), "c2": ("relu2", 0, 6)}
    assert sites_of(IN_PLACE, "conv") == {"c1": ("c1", 0, 4), "c2": ("c2", 0, 6)}
    first = find_sites(shaped_of(IN_PLACE)).found["c1"]
    assert (first.hw, first.rectified, first.doubt) == ((8, 8), True, "")
    assert first.channels == slice(0, 4)


def test_sites_behind_sums_where_no_relu_stands_before() -> None:
    found = sites_of(RESIDUAL)
    assert found == {
        "c1": ("relu1", 0, 4),
        "c2": ("relu2", 0, 4),
        "c3": ("relu3", 0, 4),
        "projection": ("relu3", 0, 4),
        "c4": ("c4", 0, 4),
    }
    assert "no ReLU" in find_sites(shaped_of(RESIDUAL)).found["c4"].doubt


def test_sites_are_channel_ranges_behind_a_concatenation() -> None:
    """The stem is listed twice: its first place counts."""
    found = sites_of(CONCAT)
    assert found["stem"] == ("relu", 0, 5) and found["a"] == ("relu", 5, 8)
    assert "channels 5 to 7 of 13" in find_sites(shaped_of(CONCAT)).found["a"].why


def test_a_branch_is_read_behind_the_pooling_of_its_concatenation() -> None:
    source = DATA + conv("data", "a", 2) + conv("data", "b", 3)
    source += "".join(layer("ReLU", one, one, name=f"relu_{one}") for one in "ab")
    source += layer("Concat", "a b", "ab") + pool("ab", "p") + conv("p", "c", 2)
    assert sites_of(source, "after_pool")["b"] == ("p", 2, 5)
    assert sites_of(source)["b"] == ("relu_b", 0, 3)
    two_readers = source + conv("ab", "d", 2, 1)
    assert sites_of(two_readers, "after_pool")["b"] == ("relu_b", 0, 3)
    for settings in ("pool: AVE kernel_size: 2 stride: 2", "pool: MAX global_pooling: true"):
        other = source.replace("pool: MAX kernel_size: 2 stride: 2", settings)
        assert sites_of(other, "after_pool")["b"] == ("relu_b", 0, 3)


@pytest.mark.parametrize(
    "activation, rectifies",
    [
        (("ReLU", ""), True),
        (("ReLU", "relu_param { negative_slope: 0.1 }"), False),
        (("ReLU6", ""), True),
        (("Clip", "clip_param { min: 0 max: 6 }"), True),
        (("Clip", "clip_param { min: -1 max: 1 }"), False),
        (("PReLU", ""), False),
        (("Sigmoid", ""), False),
        (("ELU", ""), False),
    ],
)
def test_what_counts_as_a_relu(activation: tuple[str, str], rectifies: bool) -> None:
    kind, settings = activation
    source = DATA + conv("data", "c", 4) + layer("BatchNorm", "c", "c", name="bn")
    source += layer(kind, "c", "a", settings) + pool("a", "p") + conv("p", "d", 2)
    site = find_sites(shaped_of(source)).found["c"]
    assert where(shaped_of(source), site) == ("a", 0, 4)  # else the end of the chain, before the pooling
    assert site.rectified is rectifies
    assert bool(site.doubt) is not rectifies


def test_a_concatenation_within_another() -> None:
    source = DATA + conv("data", "a", 2) + conv("data", "b", 3) + layer("Concat", "a b", "ab")
    source += conv("data", "c", 4) + layer("Concat", "c ab", "cab") + layer("ReLU", "cab", "cab", name="relu")
    assert sites_of(source) == {"a": ("relu", 4, 6), "b": ("relu", 6, 9), "c": ("relu", 0, 4)}


@pytest.mark.parametrize("join", ["Scale", "Axpy"])
def test_channels_are_not_followed_into_a_gate(join: str) -> None:
    """Squeeze and excitation: the gate's channels scale other maps, they are not those maps."""
    source = DATA + conv("data", "c", 4) + layer("ReLU", "c", "c", name="relu")
    source += pool("c", "squeezed", "pool: AVE global_pooling: true") + conv("squeezed", "gate", 4, 1)
    source += layer("Sigmoid", "gate", "gate", name="sigmoid")
    if join == "Scale":
        source += layer("Flatten", "gate", "flat") + layer(
            "Scale", "c flat", "scaled", "scale_param { axis: 0 }"
        )
    else:
        source += layer("Axpy", "gate c c", "scaled")
    source += layer("ReLU", "scaled", "scaled", name="late") + conv("scaled", "end", 2)
    shaped = shaped_of(source)
    site = find_sites(shaped).found["gate"]
    assert not shaped.unknown
    assert shaped.graph.nodes[site.value.node].name in ("sigmoid", "gate")
    assert not site.rectified and "1 x 1" in site.doubt


def test_what_has_no_maps_is_refused() -> None:
    source = inputs(video=(1, 2, 4, 6, 6))
    source += layer("Convolution", "video", "c", "convolution_param { num_output: 3 kernel_size: 3 pad: 1 }")
    sites = find_sites(shaped_of(source))
    assert not sites.found and "1 x 3 x 4 x 6 x 6" in sites.refused["c"]
    with pytest.raises(UsageError, match='layer "c": its maps cannot be ranked'):
        sites.of("c")
    with pytest.raises(UsageError, match="no convolution"):
        sites.of("nothing")
    unknown = DATA + layer("Mystery", "data", "m") + conv("m", "c", 2) + conv("data", "d", 2)
    sites = find_sites(shaped_of(unknown))
    assert list(sites.found) == ["d"] and "not known" in sites.refused["c"]
    with pytest.raises(UsageError, match="after_pool"):
        find_sites(shaped_of(unknown), "pooled")  # type: ignore[arg-type]


def test_depthwise_grouped_transposed_and_old_layers_have_sites() -> None:
    source = DATA + conv("data", "c", 4) + layer("ReLU", "c", "c", name="r1")
    source += layer(
        "ConvolutionDepthwise", "c", "dw", "convolution_param { num_output: 4 kernel_size: 3 pad: 1 }"
    )
    source += layer("ReLU", "dw", "dw", name="r2") + conv("dw", "g", 6, more="group: 2")
    source += layer("ReLU", "g", "g", name="r3")
    source += layer(
        "Deconvolution", "g", "up", "convolution_param { num_output: 2 kernel_size: 2 stride: 2 }"
    )
    source += layer("ReLU", "up", "up", name="r4")
    assert sites_of(source) == {
        "c": ("r1", 0, 4), "dw": ("r2", 0, 4), "g": ("r3", 0, 6), "up": ("r4", 0, 2),
    }  # fmt: skip
    assert find_sites(shaped_of(source)).found["up"].hw == (16, 16)
    v1 = """input: "data" input_dim: 1 input_dim: 3 input_dim: 8 input_dim: 8
    layers { name: "c" type: CONVOLUTION bottom: "data" top: "c" convolution_param { num_output: 2 kernel_size: 3 } }
    layers { name: "r" type: RELU bottom: "c" top: "c" }"""
    assert sites_of(v1) == {"c": ("r", 0, 2)}
    v0 = """input: "data" input_dim: 1 input_dim: 3 input_dim: 8 input_dim: 8
    layers { layer { name: "c" type: "conv" num_output: 2 kernelsize: 3 } bottom: "data" top: "c" }
    layers { layer { name: "r" type: "relu" } bottom: "c" top: "c" }"""
    assert sites_of(v0) == {"c": ("r", 0, 2)}


PUBLISHED = {
    "vgg_16_bn": ([(64, 32), (64, 16), (128, 16), (128, 8)] + [(256, 8)] * 2 + [(256, 4)] + [(512, 4)] * 2)
    + [(512, 2)] * 3,
    "resnet_56": [(16, 32)] * 19 + [(32, 16)] * 18 + [(64, 8)] * 18,
    "resnet_110": [(16, 32)] * 37 + [(32, 16)] * 36 + [(64, 8)] * 36,
    "densenet_40": [(24, 32)] + [(12, 32)] * 12 + [(168, 16)] + [(12, 16)] * 12 + [(312, 8)] + [(12, 8)] * 12,
    "resnet_50": [(64, 56)]
    + [
        (channels, size)
        for width, size, blocks in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3))
        for block in range(blocks)
        for channels in (width, width, *(4 * width,) * (2 if block == 0 else 1))
    ],
}
"""Filters and map size of each published rank file, where the authors read it; a bottleneck's stride is on its 3x3."""


def authors_sites(name: str) -> dict[str, Site]:
    """The sites of a net of ours in the authors' order and number."""
    shaped = infer(build(load(MODELS / name / "deploy.prototxt")))
    found = find_sites(shaped, "after_pool").found.values()
    if name == "vgg_16_bn":
        found = [site for site in found if site.layer != "conv5_3"]
    if name == "googlenet_cifar":
        found = [site for site in found if not re.search("reduce|double3x3_1", site.layer)]
    ordered = sorted(found, key=lambda site: (site.value, site.start))
    return {site.layer: site for site in ordered}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sites_of_the_published_nets_are_the_authors(name: str) -> None:
    sites = authors_sites(name).values()
    found = [(site.stop - site.start, site.hw[0]) for site in sites]
    if name == "resnet_50":  # ours halves the maps in the first convolution of a block, theirs in the second
        assert [count for count, _ in found] == [count for count, _ in PUBLISHED[name]]
    else:
        assert found == PUBLISHED[name]
    assert all(site.rectified and not site.doubt for site in sites)


def test_sites_of_googlenet_are_the_authors() -> None:
    sites = authors_sites("googlenet_cifar")
    assert len(sites) == 37 and sum(site.stop - site.start for site in sites.values()) == 5680
    sizes = {name.split("/")[0].removeprefix("inception_"): site.hw[0] for name, site in sites.items()}
    assert sizes == {
        "conv1": 32, "3a": 32, "3b": 16, "4a": 16, "4b": 16, "4c": 16, "4d": 16, "4e": 8, "5a": 8, "5b": 8,
    }  # fmt: skip
    branches = [name.split("/")[1] for name in sites if name.startswith("inception_4e")]
    assert branches == ["1x1", "3x3", "double3x3_2", "pool_proj"]


# ------------------------------------------------------------------------------------------- measuring


def images(n: int, seed: int = 0, shape: tuple[int, ...] = (3, 8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def by_hand(maps: np.ndarray) -> dict[str, np.ndarray]:
    """The sums that a site holds, from all maps at once."""
    found = np.linalg.matrix_rank(maps)
    bounds = np.minimum((maps != 0).any(3).sum(2), (maps != 0).any(2).sum(2))
    return {
        "rank": found.sum(0), "rank_squares": (found**2).sum(0),
        "bound": bounds.sum(0), "bound_squares": (bounds**2).sum(0),
        "nonzero": (maps != 0).sum((0, 2, 3)), "activation": maps.astype(np.float64).sum((0, 2, 3)),
        "nuclear": np.linalg.svd(maps.astype(np.float64), compute_uv=False).sum((0, 2)),
    }  # fmt: skip


def check(sums: SiteSums, maps: np.ndarray) -> None:
    """Against all maps at once, from a session that may round in another order: counts equal, sums nearly so."""
    expected = by_hand(maps)
    exact = {
        "rank": sums.ranks.total, "rank_squares": sums.ranks.squares, "bound": sums.bounds.total,
        "bound_squares": sums.bounds.squares, "nonzero": sums.nonzero,
    }  # fmt: skip
    assert sums.count == len(maps) and sums.hw == maps.shape[2:]
    for name, found in exact.items():
        np.testing.assert_array_equal(found, expected[name], err_msg=name)
    np.testing.assert_allclose(sums.activation, expected["activation"], rtol=1e-5, atol=1e-5)
    if sums.nuclear is not None:
        np.testing.assert_allclose(sums.nuclear, expected["nuclear"], rtol=1e-5)
    np.testing.assert_allclose(sums.density, (maps != 0).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(sums.mean_activation, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def plain(source: str) -> str:
    """The same net with nothing in place: each in-place layer writes a blob named as itself."""
    renamed: dict[str, str] = {}
    lines = []
    for line in source.splitlines():
        bottoms, tops = re.findall(r'bottom: "(\S+)"', line), re.findall(r'top: "(\S+)"', line)
        for bottom in bottoms:
            line = line.replace(f'bottom: "{bottom}"', f'bottom: "{renamed.get(bottom, bottom)}"')
        if bottoms and bottoms[0] == tops[0]:
            name = re.findall(r'name: "(\S+)"', line)[0]
            line = line.replace(f' top: "{tops[0]}"', f' top: "{name}"')
            renamed[tops[0]] = name
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("source", [IN_PLACE, RESIDUAL, CONCAT], ids=["in place", "residual", "concat"])
def test_one_pass_gives_what_all_maps_at_once_give(source: str) -> None:
    one = model(source)
    x = images(11)
    measured = measure(one, [x[:4], x[4:8], x[8:]], nuclear=True, threads=2)
    with cp.session(Model(parse(plain(source)), one.weights), blobs="all") as opened:
        blobs = opened.run({"data": x})
    shaped = shaped_of(source)
    assert list(measured.sums) == list(find_sites(shaped).found)
    for name, sums in measured.sums.items():
        writer, start, stop = where(shaped, measured.sites.found[name])
        check(sums, blobs[writer][:, start:stop])


def test_batches_threads_and_memory_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = model(IN_PLACE), images(13)

    def numbers(measured: Measured) -> str:
        return rank_files.RankFile.of(one, measured, {}).to_json()

    def integers(text: str) -> list[Any]:
        layers = json.loads(text)["layers"].values()
        return [{key: value for key, value in entry.items() if key != "activation"} for entry in layers]

    whole = numbers(measure(one, x, threads=1))
    assert numbers(measure(one, x, threads=3)) == whole
    source = Arrays("x", x, None)
    assert integers(numbers(measure(one, Batches(source, size=5)))) == integers(whole)
    steps: list[int] = []
    monkeypatch.setattr(measuring, "_MOST_BYTES", 1)
    assert integers(numbers(measure(one, [x[:6], x[6:]], step=steps.append))) == integers(whole)
    assert steps == [1] * 13


def test_memory_is_cut_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    one, steps = model(IN_PLACE), list[int]()
    maps = 4 * (4 * 64 + 6 * 16)
    monkeypatch.setattr(measuring, "_MOST_BYTES", 7 * maps)
    measure(one, images(18), step=steps.append)
    assert steps == [6, 6, 6]


def test_some_layers_only_and_other_sites() -> None:
    one, x = model(IN_PLACE), images(5)
    measured = measure(one, x, at="after_pool", layers=["c2", "c1"])
    assert list(measured.sums) == ["c2", "c1"]
    assert measured.sums["c1"].hw == (4, 4)
    with cp.session(one, ["p1"]) as opened:
        check(measured.sums["c1"], opened.run({"data": x})["p1"])
    with pytest.raises(UsageError, match="no convolution"):
        measure(one, x, layers=["fc"])


def test_sites_without_a_relu_can_be_rectified() -> None:
    one, x = model(RESIDUAL), images(6)
    with cp.session(one, ["c4", "sum"]) as opened:
        blobs = opened.run({"data": x})
    as_it_is, rectified = (measure(one, x, rectify=on) for on in (False, True))
    check(as_it_is.sums["c4"], blobs["c4"])
    check(rectified.sums["c4"], np.maximum(blobs["c4"], 0))
    check(rectified.sums["c3"], blobs["sum"])
    assert "no ReLU" in as_it_is.warnings()["c4"][0]


def test_tolerance_is_the_callers() -> None:
    one, x = model(IN_PLACE), images(4)
    with cp.session(one, ["c1"]) as opened:
        maps = opened.run({"data": x})["c1"]
    values = np.linalg.svd(maps.astype(np.float64), compute_uv=False)
    expected = (values > 0.1 * values.max(-1, keepdims=True)).sum(-1)
    found = measure(one, x, rtol=0.1).sums["c1"].ranks
    np.testing.assert_array_equal(found.total, expected.sum(0))
    assert (found.total < measure(one, x).sums["c1"].ranks.total).any()


def test_a_train_val_is_fed_through_its_data_layer() -> None:
    net = DATA.replace('type: "Input"', 'type: "Data"').replace(
        'top: "data" input_param { shape { dim: 2 dim: 3 dim: 8 dim: 8 } }',
        'top: "data" top: "label" data_param { source: "db" batch_size: 2 }',
    )
    body = IN_PLACE.removeprefix(DATA) + layer("SoftmaxWithLoss", "fc label", "loss")
    one = Model(parse(net + body), model(IN_PLACE).weights)
    x = images(3)
    assert measure(one, x).sums["c1"].ranks.total.tolist() == (
        measure(model(IN_PLACE), x).sums["c1"].ranks.total.tolist()
    )
    measured = measure(one, x)
    assert evidence_of(one, measured, ["c2"])["c2"].readers is not None


def test_what_cannot_be_measured_is_refused() -> None:
    one = model(IN_PLACE)
    with pytest.raises(UsageError, match="no images"):
        measure(one, images(0))
    with pytest.raises(UsageError, match="no images"):
        measure(one, [])
    with pytest.raises(UsageError, match="images are 1 x 8 x 8"):
        measure(one, images(2, shape=(1, 8, 8)))
    with pytest.raises(UsageError, match=r"\(N, C, H, W\)"):
        measure(one, np.zeros((2, 3), np.float32))
    with pytest.raises(WeightsError, match="no weights"):
        measure(Model(parse(IN_PLACE)), images(2))
    bad = images(2)
    bad[1, 0, 3, 3] = np.nan
    with pytest.raises(NetError, match=r'layer "c1": the maps of its filters cannot be ranked.*not finite'):
        measure(one, bad)
    with pytest.raises(UsageError, match="no convolution whose maps"):
        measure(
            model(DATA + layer("InnerProduct", "data", "f", "inner_product_param { num_output: 2 }")), bad
        )


# ------------------------------------------------------------------------------------------ evidence


def marked(source: str, mark: dict[str, np.ndarray]) -> tuple[Shaped, dict[int, Any]]:
    """A net whose weights are 1, or for the named layers those given."""
    shaped = shaped_of(source)
    blobs = {
        i: tuple(np.ones(shape, np.float32) for shape in shaped.blobs(i))
        for i in range(len(shaped.graph.nodes))
        if shaped.blobs(i)
    }
    for i, node in enumerate(shaped.graph.nodes):
        if node.name in mark:
            blobs[i] = (mark[node.name].astype(np.float32).reshape(blobs[i][0].shape), *blobs[i][1:])
    return shaped, blobs


def test_next_l1_counts_the_weights_that_read_a_channel() -> None:
    """Every weight that reads channel c holds c + 1; all others hold 1000."""
    source = DATA + conv("data", "other", 3, 1) + conv("data", "c", 4)
    source += layer("BatchNorm", "c", "c", name="bn") + layer("Concat", "other c", "joined")
    source += conv("joined", "plain", 5)  # reads channels 3 to 6 of 7
    source += conv("c", "grouped", 6, more="group: 2")
    source += layer(
        "Deconvolution", "c", "up", "convolution_param { num_output: 2 kernel_size: 2 stride: 2 }"
    )
    source += layer("InnerProduct", "c", "fc", "inner_product_param { num_output: 5 }")
    source += layer("Flatten", "c", "flat")
    source += layer("InnerProduct", "flat", "turned", "inner_product_param { num_output: 2 transpose: true }")
    c = np.arange(1, 5)
    plain_ = np.full((5, 7, 3, 3), 1000)
    plain_[:, 3:] = c[:, None, None]
    grouped = np.ones((6, 2, 3, 3))
    grouped[:3] *= c[:2, None, None]
    grouped[3:] *= c[2:, None, None]
    up = np.ones((4, 2, 2, 2)) * c[:, None, None, None]
    fc = np.ones((5, 4, 64)) * c[:, None]
    turned = np.ones((4, 64, 2)) * c[:, None, None]
    shaped, blobs = marked(
        source, {"plain": plain_, "grouped": grouped, "up": up, "fc": fc, "turned": turned}
    )
    known = evidence(shaped, blobs, "c")
    assert known.readers is not None and len(known.readers) == 5
    count = 5 * 9 + 3 * 9 + 2 * 4 + 5 * 64 + 2 * 64
    np.testing.assert_array_equal(scores("next-l1", known), c * count)


def test_next_l1_follows_sums_and_stops_at_the_next_filters() -> None:
    shaped, blobs = marked(RESIDUAL, {"c4": np.ones((4, 4, 9)) * np.arange(1, 5)[:, None]})
    np.testing.assert_array_equal(scores("next-l1", evidence(shaped, blobs, "c3")), 36 * np.arange(1, 5))
    both = scores("next-l1", evidence(shaped, blobs, "c1"))  # c2, 3x3, and the projection, 1x1
    np.testing.assert_array_equal(both, [4 * 9 + 4] * 4)
    with pytest.raises(ValueError, match="needs readers"):
        scores("next-l1", evidence(shaped, blobs, "c4"))


def test_weights_and_factors_of_the_filters_themselves() -> None:
    shaped, blobs = marked(CONCAT, {"scale": np.arange(13), "a": np.arange(9).reshape(3, 3, 1, 1)})
    known = evidence(shaped, blobs, "a")
    np.testing.assert_array_equal(scores("l1", known), [3, 12, 21])
    np.testing.assert_array_equal(scores("gamma", known), [5, 6, 7])
    np.testing.assert_array_equal(scores("gamma", evidence(shaped, blobs, "stem")), [0, 1, 2, 3, 4])
    assert evidence(*marked(RESIDUAL, {}), "c4").gamma is None
    with pytest.raises(UsageError, match="no convolution"):
        evidence(shaped, blobs, "relu")


def test_masked_weights_count_as_what_they_compute_with() -> None:
    source = DATA + layer(
        "CConvolution",
        "data",
        "c",
        "convolution_param { num_output: 2 kernel_size: 1 } cconvolution_param { gamma: 0.1 }",
    )
    shaped, blobs = marked(source + conv("c", "d", 2, 1), {})
    weight, bias, mask, bias_mask = blobs[1]
    mask[1, 2] = 0
    known = evidence(shaped, {**blobs, 1: (weight, bias, mask, bias_mask)}, "c")
    np.testing.assert_array_equal(scores("l1", known), [3, 2])
    np.testing.assert_array_equal(scores("next-l1", known), [2, 2])


def test_evidence_joins_weights_and_images() -> None:
    one, x = model(IN_PLACE), images(7)
    measured = measure(one, x, nuclear=True)
    known = evidence_of(one, measured, measured.sums, seed=3)
    np.testing.assert_array_equal(scores("rank", known["c1"]), measured.sums["c1"].ranks.mean)
    np.testing.assert_array_equal(scores("rowcol", known["c2"]), measured.sums["c2"].bounds.mean)
    np.testing.assert_array_equal(scores("apoz", known["c2"]), measured.sums["c2"].density)
    np.testing.assert_array_equal(scores("activation", known["c2"]), measured.sums["c2"].mean_activation)
    np.testing.assert_array_equal(scores("nuclear", known["c2"]), measured.sums["c2"].nuclear / 7)
    weights_only = evidence_of(one, None, ["c1", "c2"], seed=3)
    np.testing.assert_array_equal(scores("l1", weights_only["c1"]), scores("l1", known["c1"]))
    np.testing.assert_array_equal(scores("random", weights_only["c2"]), scores("random", known["c2"]))
    first, second = (evidence_of(one, None, names)["c2"] for names in (["c2"], ["c1", "c2"]))
    assert scores("random", first).tolist() != scores("random", second).tolist()
    assert one.weights is not None
    weight = one.weights["c2"][0]
    np.testing.assert_allclose(scores("l1", known["c2"]), np.abs(weight).sum((1, 2, 3)), rtol=1e-6)


@needs_shared
def test_resnet20_has_the_known_ranks() -> None:
    """Mean ranks behind ReLUs of a real net: 27.7 to 32 of 32, 12.2 to 15.9 of 16, 4.4 to 6.6 of 8."""
    folder = SHARED / "data/models/resnet20_cifar10"
    one = cp.load(folder / "res20_deploy_DERIVED.prototxt", folder / "ResNet_20.caffemodel")
    raw = np.fromfile(SHARED / "data/cifar10/test_batch_first1000.bin", np.uint8).reshape(-1, 3073)[:96, 1:]
    measured = measure(one, raw.reshape(-1, 3, 32, 32).astype(np.float32) - 120)
    for low, high, size in ((27.5, 32, 32), (12.0, 15.95, 16), (4.3, 6.7, 8)):
        means = [sums.ranks.mean.mean() for sums in measured.sums.values() if sums.hw == (size, size)]
        assert low < min(means) and max(means) < high
    assert any("saturated" in line for lines in measured.warnings().values() for line in lines)
    for sums in measured.sums.values():
        assert np.corrcoef(sums.ranks.mean, sums.bounds.mean)[0, 1] > 0.8


# --------------------------------------------------------------------------------------------- files


@pytest.fixture
def written(tmp_path: Path) -> Iterator[tuple[Path, rank_files.RankFile]]:
    one = model(IN_PLACE)
    ranks = rank_files.RankFile.of(one, measure(one, images(6), nuclear=True), {"images": "set", "seed": 1})
    rank_files.write(tmp_path / "ranks.json", ranks)
    yield tmp_path / "ranks.json", ranks


def test_a_rank_file_comes_back(written: tuple[Path, rank_files.RankFile]) -> None:
    path, ranks = written
    again = rank_files.read(path)
    assert again.to_json() == ranks.to_json() == path.read_text()
    assert again.source == {"images": "set", "seed": 1} and list(again.layers) == ["c1", "c2"]
    assert again.places == {"c1": 'ReLU "relu1"', "c2": 'ReLU "relu2"'}
    for name, sums in ranks.layers.items():
        np.testing.assert_array_equal(again.layers[name].ranks.error, sums.ranks.error)
        np.testing.assert_array_equal(again.layers[name].nuclear, sums.nuclear)  # type: ignore[arg-type]
        np.testing.assert_array_equal(again.layers[name].activation, sums.activation)
    assert len(path.read_text().splitlines()) == 10  # a layer a line
    with pytest.raises(UsageError, match="it is an input"):
        rank_files.write(path, ranks, inputs=[path])


def test_two_files_merge_into_one_pass(written: tuple[Path, rank_files.RankFile]) -> None:
    path, _ = written
    one, x = model(IN_PLACE), images(6)
    parts = [rank_files.RankFile.of(one, measure(one, part, nuclear=True), {}) for part in (x[:2], x[2:])]
    merged, rest = parts
    merged.merge(rest)
    whole = rank_files.read(path)
    for name, sums in whole.layers.items():
        assert merged.layers[name].count == 6
        np.testing.assert_array_equal(merged.layers[name].ranks.squares, sums.ranks.squares)
        np.testing.assert_array_equal(merged.layers[name].nonzero, sums.nonzero)
        np.testing.assert_allclose(merged.layers[name].nuclear, sums.nuclear, rtol=1e-12)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="do not merge"):
        merged.merge(rank_files.RankFile({}, {}))
    other = rank_files.RankFile.of(one, measure(one, x), {})
    with pytest.raises(PlanError, match='layer "c1": ranks do not merge'):
        merged.merge(other)  # without nuclear norms


def test_a_rank_file_belongs_to_its_net(written: tuple[Path, rank_files.RankFile]) -> None:
    _, ranks = written
    ranks.check(model(IN_PLACE))
    other = model(RESIDUAL)
    with pytest.raises(PlanError, match="another net file"):
        ranks.check(other)
    ranks.check(other, force=True)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda v: v.update({"caffe-lra ranks": 2}), "is no rank file"),
        (lambda v: v.pop("caffe-lra ranks"), "is no rank file"),
        (lambda v: v.pop("source"), '"source" is missing'),
        (lambda v: v.update(layers=[]), '"layers" is missing, or no dict'),
        (lambda v: v.update(extra=1), 'unknown field "extra"'),
        (lambda v: v["layers"].update(c1=3), 'layer "c1": must be a JSON object'),
        (lambda v: v["layers"]["c1"].pop("rank"), '"rank" is missing'),
        (lambda v: v["layers"]["c1"].update(ranks=[]), '"ranks" is no field'),
        (lambda v: v["layers"]["c2"].update(place=1), 'layer "c2": "place"'),
        (lambda v: v["layers"]["c1"].update(map=[8]), '"map"'),
        (lambda v: v["layers"]["c1"].update(map=[0, 8]), '"map"'),
        (lambda v: v["layers"]["c1"].update(images=0), '"images"'),
        (lambda v: v["layers"]["c1"].update(images=True), '"images"'),
        (lambda v: v["layers"]["c1"]["rank"].append(1), "differ in length"),
        (lambda v: v["layers"]["c1"].update(rank="no"), '"rank" is no list'),
        (lambda v: v["layers"]["c1"]["rank"].__setitem__(0, 1.5), "no counts"),
        (lambda v: v["layers"]["c1"]["rank"].__setitem__(0, -1), "no counts"),
        (lambda v: v["layers"]["c1"]["rank"].__setitem__(0, 49), "above 6 images of rank 8"),
        (lambda v: v["layers"]["c1"]["rank_squares"].__setitem__(0, 10**6), "do not go together"),
        (lambda v: v["layers"]["c1"]["rank_squares"].__setitem__(0, 1), "do not go together"),
        (lambda v: v["layers"]["c1"]["bound"].__setitem__(0, 0), '"bound'),
        (lambda v: v["layers"]["c1"]["nonzero"].__setitem__(0, 6 * 64 + 1), "more than all"),
        (lambda v: v["layers"]["c1"]["activation"].__setitem__(0, "x"), "no numbers"),
        (lambda v: v["layers"]["c1"]["activation"].__setitem__(0, float("nan")), "not finite"),
    ],
)
def test_a_broken_rank_file_is_refused(
    written: tuple[Path, rank_files.RankFile], change: Any, match: str
) -> None:
    path, _ = written
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(PlanError, match=re.escape(match)) as caught:
        rank_files.read(path)
    assert str(caught.value).startswith(str(path))


def test_what_is_no_rank_file_is_refused(tmp_path: Path) -> None:
    for content, match in ((b"\xff\xfe", "UTF-8"), (b"{", "is no JSON"), (b"[]", "JSON object")):
        (tmp_path / "ranks.json").write_bytes(content)
        with pytest.raises(Error, match=match):
            rank_files.read(tmp_path / "ranks.json")
    with pytest.raises(FileError, match="no such file"):
        rank_files.read(tmp_path / "nothing.json")


def test_published_files_in_their_order(tmp_path: Path) -> None:
    vectors = {"rank_conv2_b": [1.5, 2], "rank_conv10": [3.0], "rank_conv2_a": [0.0], "rank_conv1": [4, 5, 6]}
    for stem, values in vectors.items():
        np.save(tmp_path / f"{stem}.npy", np.array(values, np.float32))
    np.save(tmp_path / "other.npy", np.zeros(3))
    found = rank_files.read_published(tmp_path)
    assert list(found) == ["rank_conv1", "rank_conv2_a", "rank_conv2_b", "rank_conv10"]
    assert {stem: values.tolist() for stem, values in found.items()} == vectors
    by_layer = rank_files.assign(found, {"a": 3, "b": 1, "c": 2, "d": 1})
    assert by_layer["c"].tolist() == [1.5, 2]
    with pytest.raises(UsageError, match="4 rank files for 1 layers"):
        rank_files.assign(found, {"a": 3})
    with pytest.raises(UsageError, match='layer "b": rank_conv2_a holds 1 ranks for 2 filters'):
        rank_files.assign(found, {"a": 3, "b": 2, "c": 1, "d": 1})


def test_what_is_no_published_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no files rank_conv"):
        rank_files.read_published(tmp_path)
    with pytest.raises(FileError, match="no such file"):
        rank_files.read_published(tmp_path / "nothing")
    path = tmp_path / "rank_conv1.npy"
    path.write_bytes(b"no array")
    with pytest.raises(FileError, match=r"is no \.npy file"):
        rank_files.read_published(tmp_path)
    with pytest.raises(FileError, match="is a file"):
        rank_files.read_published(path)
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(FileError, match=r"is no \.npy file"):
        rank_files.read_npy(path)
    for bad, match in (
        (np.zeros((2, 2)), "no vector"),
        (np.zeros(0), "no vector"),
        (np.array(["a"]), "no vector"),
        (np.array([-1.0]), "negative"),
        (np.array([np.nan]), "not finite"),
    ):
        np.save(path, bad)
        with pytest.raises(FileError, match=match):
            rank_files.read_npy(path)


RATES = {
    "vgg_16_bn": [0.95] + [0.5] * 6 + [0.9] * 4 + [0.8] * 2,
    "resnet_56": [0.1] + [0.6] * 35 + [0.0] * 2 + [0.6] * 6 + [0.4] * 3 + [0.1, 0.4] * 4,
    "resnet_110": [0.1] + [0.4] * 108,
    "densenet_40": [0.0] + ([0.1] * 6 + [0.7] * 6 + [0.0]) * 2 + [0.1] * 6 + [0.7] * 5 + [0.0],
    "googlenet": [0.1] + [0.8] * 5 + [0.85] + [0.8] * 3,
    "resnet_50": [0.2] + [0.8] * 23 + [0.55] * 19 + [0.45] * 10,
}
KNOWN = {  # files, filters, kept at the published rates, CRC32 of the kept lists
    "vgg_16_bn": (12, 3712, 859, 0x2D60ADB5),
    "resnet_56": (55, 2032, 1119, 0xECD613D1),
    "resnet_110": (109, 4048, 2499, 0xD0566C88),
    "densenet_40": (39, 936, 782, 0x8C06EADD),
    "googlenet": (37, 5680, 1258, 0x2F2A17E9),
    "resnet_50": (53, 26560, 11880, 0x6098D5DE),
}


@needs_shared
@pytest.mark.parametrize("name", KNOWN)
def test_published_ranks_select_the_published_filters(name: str) -> None:
    found = rank_files.read_published(SHARED / "data/hrank_ranks" / name)
    listed, stayed = "", 0
    for stem, values in found.items():
        rate = RATES[name][int(re.findall(r"\d+", stem)[0]) - 1]
        stay = kept(values, int(rate * len(values)))
        listed += f"{stem}:{','.join(map(str, stay))}\n"
        stayed += len(stay)
        assert np.abs(values * 768 - np.round(values * 768)).max() <= 0.002
    filters = sum(map(len, found.values()))
    assert (len(found), filters, stayed, crc32(listed.encode())) == KNOWN[name]


@needs_shared
@pytest.mark.parametrize("name", KNOWN)
def test_published_ranks_belong_to_our_layers(name: str) -> None:
    found = rank_files.read_published(SHARED / "data/hrank_ranks" / name)
    sites = authors_sites("googlenet_cifar" if name == "googlenet" else name)
    by_layer = rank_files.assign(found, {one: site.stop - site.start for one, site in sites.items()})
    for (one, values), site in zip(by_layer.items(), sites.values(), strict=True):
        assert values.max() <= max(site.hw) or name == "resnet_50", one


def test_weights_of_another_net_are_refused() -> None:
    weights = Weights([NewEntry("c1", (np.zeros((2, 2), np.float32),))])
    with pytest.raises(WeightsError):
        measure(Model(parse(IN_PLACE), weights), images(1))
    with pytest.raises(WeightsError):
        evidence_of(Model(parse(IN_PLACE), weights), None, ["c1"])
    assert binding.bind(shaped_of(IN_PLACE), model(IN_PLACE).weights)
