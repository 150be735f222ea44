"""The exported ONNX: names, versions, folding, open sizes, and pooling in every combination."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import onnx
import pytest
from helpers import SHARED

from caffe_proto import graph, load, net
from caffe_proto.errors import Error
from caffe_proto.model import Model
from caffe_proto.onnx_export import IR_VERSION, OPSET, Request, draw, export_onnx, source_shapes, to_onnx
from caffe_proto.runtime import Engine, error, open_onnx, session
from caffe_proto.weights import NewEntry, Weights

Pair = tuple[int, int]

CHAIN = """
name: "chain"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 9 dim: 7 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "prob" type: "Softmax" bottom: "pool" top: "prob" }
"""


def chain() -> Model:
    rng = np.random.default_rng(0)
    blobs = {
        "conv": [rng.standard_normal((4, 3, 3, 3))],
        "bn": [rng.standard_normal(4) * 3, rng.random(4) + 1, np.array([2.0])],
        "scale": [rng.random(4) + 0.5, rng.standard_normal(4)],
    }
    entries = [
        NewEntry(name, tuple(np.asarray(b, np.float32) for b in arrays)) for name, arrays in blobs.items()
    ]
    return Model(net.parse(CHAIN), Weights(entries))


def reference(model: Model, x: np.ndarray) -> np.ndarray:
    """conv, BatchNorm, Scale, ReLU of ``chain`` in float64: (n, 4, h, w)."""
    weights = model.weights
    assert weights is not None
    kernel = weights["conv"][0].astype(np.float64)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    made = np.einsum("ncyxij,ocij->noyx", windows, kernel)
    mean, var, count = (blob.astype(np.float64) for blob in weights["bn"])
    gamma, beta = (blob.astype(np.float64).reshape(-1, 1, 1) for blob in weights["scale"])
    normal = (made - (mean / count).reshape(-1, 1, 1)) / np.sqrt((var / count).reshape(-1, 1, 1) + 1e-5)
    return np.maximum(normal * gamma + beta, 0)


def test_batch_norm_and_scale_become_one_node_and_stay_exact() -> None:
    model = chain()
    exported = export_onnx(model, Request(outputs=("conv",)))
    ops = [node.op_type for node in exported.graph.node]
    assert ops == ["Conv", "BatchNormalization", "Relu"]
    x = np.random.default_rng(1).standard_normal((2, 3, 9, 7)).astype(np.float32)
    (made,) = open_onnx(exported.SerializeToString(), Engine(1)).run(["conv"], {"data": x})
    np.testing.assert_allclose(made, reference(model, x), rtol=1e-4, atol=1e-5)


def test_names_and_versions() -> None:
    exported = export_onnx(chain())
    assert exported.ir_version == IR_VERSION == 8
    assert [(entry.domain, entry.version) for entry in exported.opset_import] == [("", OPSET)] == [("", 17)]
    assert [value.name for value in exported.graph.input] == ["data"]
    assert [value.name for value in exported.graph.output] == ["prob"]
    written = {name for node in exported.graph.node for name in node.output}
    assert {"conv", "pool", "prob", "conv/conv"} <= written
    assert {node.name for node in exported.graph.node} >= {"conv", "relu", "pool", "prob"}
    onnx.checker.check_model(exported, full_check=True)


def test_every_shape_agrees_with_onnx_shape_inference() -> None:
    model = chain()
    export = draw(model, Request(outputs=("data", "conv", "pool", "prob")[1:]))
    inferred = onnx.shape_inference.infer_shapes(to_onnx(export), strict_mode=True, data_prop=True)
    known = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in inferred.graph.value_info
    }
    assert known
    for name, shape in known.items():
        assert export.shapes.get(name, shape) == shape


def test_same_model_same_bytes() -> None:
    assert export_onnx(chain()).SerializeToString() == export_onnx(chain()).SerializeToString()


def windows(h: int, k: int, s: int, p: int, clips: bool) -> int:
    """Caffe's count, from its text: ceil((h + 2p - k) / s) + 1, the last dropped where it starts in the end pad."""
    n = int(np.ceil((h + 2 * p - k) / s)) + 1
    return n - 1 if clips and (n - 1) * s >= h + p else n


def pooled(x: np.ndarray, method: str, k: Pair, s: Pair, p: Pair) -> np.ndarray:
    """Caffe's pooling loop, window by window, in float64."""
    h, w = x.shape[2:]
    clips = any(p)
    out = np.zeros((*x.shape[:2], windows(h, k[0], s[0], p[0], clips), windows(w, k[1], s[1], p[1], clips)))
    for i, j in product(*map(range, out.shape[2:])):
        top, left = i * s[0] - p[0], j * s[1] - p[1]
        bottom, right = min(top + k[0], h + p[0]), min(left + k[1], w + p[1])
        size = (bottom - top) * (right - left)
        part = x[:, :, max(top, 0) : min(bottom, h), max(left, 0) : min(right, w)].astype(np.float64)
        if method == "MAX":
            out[:, :, i, j] = part.max(axis=(2, 3)) if part.size else np.finfo(np.float32).min
        else:
            out[:, :, i, j] = part.sum(axis=(2, 3)) / size if size else np.nan
    return out


POOLS = [
    (method, h, k, s, p)
    for method, h, k, s, p in product(
        ("MAX", "AVE"), (5, 6, 7, 8, 13), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5), (0, 1, 2)
    )
    if p < k and windows(h, k, s, p, p > 0) > 0
]


@pytest.mark.parametrize("method", ["MAX", "AVE"])
@pytest.mark.parametrize("open_size", [False, True])
def test_pooling_is_caffes_for_every_kernel_stride_pad_and_size(method: str, open_size: bool) -> None:
    rng = np.random.default_rng(0)
    checked = 0
    for kind, h, k, s, p in POOLS:
        if kind != method:
            continue
        x = rng.standard_normal((1, 3, h, h + 3)).astype(np.float32)
        source = CHAIN.split('layer { name: "conv"')[0].replace("dim: 9 dim: 7", f"dim: {h} dim: {h + 3}")
        settings = f"pool: {kind} kernel_size: {k} stride: {s} pad: {p}"
        layer = (
            f'layer {{ name: "p" type: "Pooling" bottom: "data" top: "p" pooling_param {{ {settings} }} }}'
        )
        model = Model(net.parse(source + layer))
        try:
            exported = export_onnx(model, Request(batch=1, dynamic_hw=open_size))
        except Error as refused:
            assert open_size and s > k and "fixed size" in str(refused)
            continue
        (made,) = open_onnx(exported.SerializeToString(), Engine(1)).run(None, {"data": x})
        np.testing.assert_allclose(made, pooled(x, kind, (k, k), (s, s), (p, p)), rtol=1e-5, atol=1e-6)
        checked += 1
    assert checked > 150


def shared_models() -> list[str]:
    """Oracle cases and real nets by name; none where ../shared is absent."""
    cases = sorted(path.name for path in (SHARED / "oracle" / "cases").glob("*"))
    return [*cases, *(f"real:{name}" for name in real_nets())]


def real_nets() -> dict[str, dict[str, str]]:
    """The index of real nets; empty where ../shared is absent."""
    path = SHARED / "oracle" / "real" / "index.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def shared_model(name: str) -> Model:
    if name.startswith("real:"):
        entry = real_nets()[name.removeprefix("real:")]
        return load(SHARED / entry["net"], SHARED / entry["weights"])
    folder = SHARED / "oracle" / "cases" / name
    about = json.loads((folder / "io.json").read_text())
    return load(
        folder / "net.prototxt",
        folder / "weights.caffemodel",
        phase=about["phase"].upper(),
        stages=tuple(about["stages"]),
        level=about["level"],
    )


def grown(shape: tuple[int, ...], factor: int, request: Request) -> tuple[int, ...]:
    """A shape with the axes that the request leaves open made larger, and odd."""
    axes = ([0] if request.dynamic_batch else []) + ([2, 3] if request.dynamic_hw and len(shape) == 4 else [])
    return tuple(
        dim * factor + (axis if factor > 2 else 0) if axis in axes else dim for axis, dim in enumerate(shape)
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with oracle nets")
@pytest.mark.parametrize("open_axes", ["batch", "hw", "both"])
def test_open_sizes_give_what_fixed_ones_give(open_axes: str) -> None:
    """Every oracle net whose export with open sizes is not refused runs at other sizes as a fixed export does."""
    rng = np.random.default_rng(0)
    request = Request(dynamic_batch=open_axes != "hw", dynamic_hw=open_axes != "batch")
    right = 0
    for name in shared_models():
        model = shared_model(name)
        built = graph.build(model.net)
        try:
            export = draw(model, request)
        except Error:
            continue
        ort = open_onnx(to_onnx(export).SerializeToString(), Engine(1))
        for factor in (1, 3):
            shapes = {
                k: grown(shape, factor, request) for k, shape in source_shapes(built, Request()).items()
            }
            feeds = {
                k: np.zeros(s, np.float32) if k == "label" else rng.random(s, np.float32)
                for k, s in shapes.items()
            }
            try:
                with session(model, blobs=export.outputs, threads=1) as fixed:
                    want = fixed.run(feeds)
            except Error:
                continue
            names = list(export.outputs.values())
            made = ort.run(names, {export.inputs[k]: feeds[k] for k in export.inputs})
            for blob, array in zip(export.outputs, made, strict=True):
                assert error(array, want[blob]) < 1e-5, (name, factor, blob)
            right += 1
    assert right > 300
