"""What real Caffe computed, shaped and refused, in ../shared/oracle: our session must agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import SHARED

from caffe_proto import binding, graph, load
from caffe_proto.errors import Error
from caffe_proto.model import Model
from caffe_proto.runtime import error, session
from caffe_proto.shape_inference import infer

ORACLE = SHARED / "oracle"
TOLERANCE = 1e-4  # of a blob's largest magnitude

pytestmark = pytest.mark.skipif(
    not ORACLE.is_dir(), reason="no ../shared/oracle with what real Caffe computed"
)

RUN_TIME_SHAPES = {"filter": {"out"}}  # only a forward pass knows how many items remain

# A word of the cause, for each net that real Caffe refuses.
CAUSES = {
    "axis_out_of_range": "axis 3 is out of range",
    "bn_params_nonzero_lr_two": "lr_mult must be 0",
    "both_layer_and_layers": 'mixes "layer" and "layers"',
    "concat_axis_and_dim": "axis and concat_dim are both given",
    "concat_shape_mismatch": "differ in more than axis 1",
    "conv_kernel_both": "kernel_size and kernel_h/kernel_w are both given",
    "crop_out_of_bounds": "do not lie within",
    "duplicate_top": "already written",
    "eltwise_coeff_count": "1 coeff for 2 bottoms",
    "eltwise_shape_mismatch": "differ in shape",
    "include_and_exclude": "both include and exclude",
    "inplace_before_branch_used_later": "multiple sources",
    "lrn_even_size": "odd sizes only",
    "lstm_missing_cont": "1 bottom",
    "pool_global_with_kernel": "global_pooling together with kernel_size",
    "pool_no_kernel": "needs kernel_size",
    "reshape_indivisible": "cannot be divided",
    "reshape_inplace": "does not work in place",
    "singular_field_twice": '"negative_slope" is given twice',
    "slice_uneven": "do not divide",
    "softmaxloss_two_tops_loss_weights": "loss_weight",
    "softmaxloss_two_tops_no_loss_weight": "loss_weight",
    "submessage_twice": '"relu_param" is given twice',
    "unknown_bottom": "written by no layer",
    "unknown_field": 'no field "slope"',
    "unknown_layer_type": '"Frobnicate" is not known',
    "unknown_param_message": '"permute_param"',
    "weights_shape_mismatch": "wants 4 x 3 x 3 x 3",
}


def _names(folder: str) -> list[str]:
    path = ORACLE / folder
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def _case(name: str) -> tuple[Model, dict[str, Any], dict[str, np.ndarray]]:
    """A case's model in its state, its io.json, and the arrays of io.npz."""
    folder = ORACLE / "cases" / name
    io = json.loads((folder / "io.json").read_text())
    weights = folder / "weights.caffemodel"
    state = {"phase": io["phase"].upper(), "stages": tuple(io["stages"]), "level": io["level"]}
    loaded = load(folder / "net.prototxt", weights if weights.exists() else None, **state)
    with np.load(folder / "io.npz") as arrays:
        return loaded, io, dict(arrays)


@cache
def _worst(name: str) -> float:
    """The largest error of any blob of a case."""
    loaded, io, arrays = _case(name)
    with session(loaded, blobs="all", threads=1) as opened:
        fed = {blob: f"@input:{blob}" if f"@input:{blob}" in arrays else blob for blob in opened.input_names}
        made = opened.run({blob: arrays[key] for blob, key in fed.items()})
    assert set(made) == set(io["blobs"])
    assert {blob: list(array.shape) for blob, array in made.items()} == io["blobs"]
    return max(error(made[blob], arrays[blob]) for blob in io["blobs"])


@pytest.mark.parametrize("name", _names("cases"))
def test_every_blob_is_that_of_caffe(name: str) -> None:
    assert _worst(name) <= TOLERANCE


@pytest.mark.parametrize("name", _names("cases"))
def test_shapes_are_those_of_caffe(name: str) -> None:
    loaded, io, _ = _case(name)
    open_ = RUN_TIME_SHAPES.get(name, set())
    told = {blob: list(shape) for blob, shape in infer(graph.build(loaded.net)).by_blob().items()}
    assert set(told) == set(io["blobs"])
    assert all(told[blob] == shape for blob, shape in io["blobs"].items() if blob not in open_)


@pytest.mark.parametrize("name", _names("cases"))
def test_learnt_blobs_are_those_of_caffe(name: str) -> None:
    loaded, io, _ = _case(name)
    shaped = infer(graph.build(loaded.net))
    told = {
        node.name: [list(shape) for shape in shaped.blobs(index)]
        for index, node in enumerate(shaped.graph.nodes)
    }
    wanted = {layer["name"]: layer["params"] for layer in io["layers"] if layer["params"]}
    assert {layer: blobs for layer, blobs in told.items() if blobs} == wanted


def test_summary(record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]) -> None:
    """How many cases pass, and the worst error of all; printed even without -s."""
    found = {name: _worst(name) for name in _names("cases")}
    passed = sum(worst <= TOLERANCE for worst in found.values())
    name = max(found, key=lambda one: found[one])
    record_property("oracle_passed", passed)
    record_property("oracle_worst", found[name])
    with capsys.disabled():
        print(f"\noracle: {passed} of {len(found)} cases, worst error {found[name]:.1e} ({name})")
    assert passed == len(found) > 200


def _real() -> dict[str, dict[str, Any]]:
    path = ORACLE / "real" / "index.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@pytest.mark.parametrize("name", sorted(_real()))
def test_trained_nets_give_what_caffe_gives(name: str) -> None:
    entry = _real()[name]
    with np.load(ORACLE / "real" / f"{name}.npz") as arrays:
        wanted = dict(arrays)
    loaded = load(SHARED / entry["net"], SHARED / entry["weights"])
    with session(loaded, blobs=entry["outputs"], threads=1) as opened:
        made = opened.run({blob: wanted[blob] for blob in entry["inputs"]})
    assert set(made) == set(entry["outputs"])
    assert max(error(made[blob], wanted[blob]) for blob in made) <= TOLERANCE


@pytest.mark.parametrize("name", _names("rejects"))
def test_refuses_what_caffe_refuses(name: str) -> None:
    folder = ORACLE / "rejects" / name
    weights = folder / "weights.caffemodel"
    with pytest.raises(Error) as caught:
        loaded = load(folder / "net.prototxt", weights if weights.exists() else None)
        shaped = infer(graph.build(loaded.net))
        if loaded.weights is not None:
            binding.bind(shaped, loaded.weights)
    assert CAUSES[name] in str(caught.value)
