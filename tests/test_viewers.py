"""What is written opens in other programs: text and weights by BVLC's schema alone, ONNX by the checker; names stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import nets
import onnx
import pytest
from google.protobuf import text_format

import caffe_proto as cp
import hrank
import lra
from caffe_proto import schema
from caffe_proto.model import Model, save
from hrank import coupling
from lra.plan import LayerPlan
from lra.schemes import ALL_SCHEMES, SCHEMES
from lra.styles import STYLES, unwritable
from lra.targets import find

ROOT = Path(__file__).resolve().parents[1]
ZOO = sorted(path.parent.name for path in (ROOT / "models").glob("*/deploy.prototxt"))
WAYS = [(scheme, style) for scheme in ALL_SCHEMES for style in STYLES if unwritable(style, scheme) is None]

V1 = (ROOT / "tests" / "data" / "cases" / "v1.prototxt").read_text().partition("# plan: ")[0]
FORCED = nets.SMALL.replace("  param { lr_mult: 2 }\n", "  param { lr_mult: 2 force_mult: 1 }\n", 1)


def parsed(source: str) -> Any:
    """A net as protobuf reads it; raises on any field that the schema lacks."""
    return text_format.Parse(source, schema.message_class("NetParameter")())


def of_forks(message: Any) -> Iterator[str]:
    """The fields of a message that BVLC's caffe.proto lacks."""
    kind = message.DESCRIPTOR.full_name.removeprefix(f"{schema.PACKAGE}.")
    for field, value in message.ListFields():
        fork = schema.fork_of(kind, field.name)
        if fork is not None:
            yield f"{kind}.{field.name} ({fork})"
        if field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                yield from of_forks(one)


def check(before: Model, after: Model, folder: Path) -> None:
    """The written text and weights against protobuf's own readers."""
    paths = folder / "out.prototxt", folder / "out.caffemodel"
    save(after, paths[0], paths[1] if after.weights is not None else None)
    found, original = parsed(paths[0].read_text()), parsed(before.net.text)
    assert set(of_forks(found)) <= set(of_forks(original))
    assert not (found.layer and found.layers)
    assert bool(found.layers) == bool(original.layers)  # no dialect is mixed with another
    layers = list(found.layer or found.layers)
    names = [layer.name for layer in layers]
    assert all(names) and all(layer.type for layer in layers)
    if after.weights is None:
        return
    stored = helpers.message("NetParameter", paths[1].read_bytes())
    assert not (stored.layer and stored.layers) and set(of_forks(stored)) <= set(of_forks(original))
    learnt = {layer.name: layer.type for layer in (stored.layer or stored.layers) if layer.blobs}
    assert learnt and set(learnt) <= set(names)
    assert learnt == {layer.name: layer.type for layer in layers if layer.name in learnt}


def half(model: Model, scheme: str) -> dict[str, LayerPlan]:
    """Half of each layer's full rank by a scheme."""
    entries = {}
    for name, target in find(model).targets.items():
        full = ALL_SCHEMES[scheme].max_rank(target.shape, target.geometry.group)
        rank = max(full // 2 // target.geometry.group, 1) * target.geometry.group
        entries[name] = LayerPlan(scheme, (rank, rank) if scheme == "asymmetric-3d" else (rank,))
    return entries


def decomposed(model: Model, scheme: str, style: str) -> Model:
    return lra.apply(lra.Plan(half(model, scheme), target={"style": style}), model, sibling=True)[0]


@pytest.mark.parametrize(("scheme", "style"), WAYS)
@pytest.mark.parametrize("name", ["lenet", "cifar10_full"])
def test_every_scheme_in_every_style(tmp_path: Path, name: str, scheme: str, style: str) -> None:
    net = {"lenet": "lenet/lenet.prototxt", "cifar10_full": "cifar10_full/deploy.prototxt"}[name]
    model = cp.load(ROOT / "models" / net)
    check(model, decomposed(model, scheme, style), tmp_path)


@pytest.mark.parametrize("name", ZOO)
def test_every_net(tmp_path: Path, name: str) -> None:
    model = cp.load(ROOT / "models" / name / "deploy.prototxt")
    i = ZOO.index(name)
    check(model, decomposed(model, *WAYS[7 * i % len(WAYS)]), tmp_path)
    pruned = halved(model)
    assert len(pruned.net.layers) == len(model.net.layers) and pruned.net.text != model.net.text
    check(model, pruned, tmp_path)


def halved(model: Model) -> Model:
    """Every second filter of every layer that shares its channels with no other is gone."""
    groups = coupling.find(model)
    alone = [group.members[0] for group in groups.groups if len(group.members) == 1 and not group.frozen]
    keep = {one.layer: list(range(0, one.channels, 2)) for one in alone}
    return hrank.apply(hrank.Plan.of(groups, keep), model)[0]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("source", [nets.SMALL, V1, FORCED], ids=["V2", "V1", "fork"])
def test_weights_and_dialects(tmp_path: Path, source: str, style: str) -> None:
    model = nets.model(source)
    for scheme in SCHEMES:
        if unwritable(style, scheme) is None:
            check(model, decomposed(model, scheme, style), tmp_path)
    check(model, halved(model), tmp_path)


def test_what_the_input_had_of_a_fork_stays() -> None:
    fields = list(of_forks(parsed(FORCED)))
    assert fields == ["ParamSpec.force_mult (wen)"]
    assert list(of_forks(parsed(halved(nets.model(FORCED)).net.text))) == fields


def test_onnx_passes_the_whole_check_and_keeps_its_names(tmp_path: Path) -> None:
    model = nets.model(nets.SMALL)
    for one in (
        model,
        decomposed(model, "spatial", "default"),
        decomposed(model, "svd", "he"),
        halved(model),
    ):
        made = cp.export_onnx(one)
        onnx.checker.check_model(made, full_check=True)
        onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True, data_prop=True)
        names = [node.name for node in made.graph.node]
        assert all(names) and len(names) == len(set(names))
        layers = {layer.name for layer in one.net.layers}
        assert all(any(name.startswith(layer) for layer in layers) for name in names)
        assert made.SerializeToString(deterministic=True) == cp.export_onnx(one).SerializeToString(
            deterministic=True
        )
    first, second = (
        [node.name for node in cp.export_onnx(nets.model(nets.SMALL, seed)).graph.node] for seed in (0, 1)
    )
    assert first == second  # other weights, the same names
