"""Hostile input: one clear error of ours or a sound result, in little time and memory; nothing else escapes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import nets
import numpy as np
import pytest
from helpers import v2_file, v2_layer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from caffe_proto import binding, costs, graph, net, text, weights, wire
from caffe_proto.errors import CaffemodelError, Error, NetError, PlanError, PrototxtError
from caffe_proto.shape_inference import Shaped, infer
from lra.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

some = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def within(seconds: float = 1.0) -> Iterator[None]:
    """Fail where the block takes more CPU time."""
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


def shapes(source: str) -> Shaped:
    """Everything short of weights."""
    shaped = infer(graph.build(net.parse(source)))
    costs.cost(shaped)
    return shaped


def measured(folder: Path, code: str, *args: object) -> tuple[str, float, float]:
    """What a child prints, its CPU seconds, and its peak memory in MiB.

    A child's ``ru_maxrss`` begins with what its parent held, so the child tells the peak of its own map.
    """
    status_path = folder / "status"
    head = (
        f"import atexit, sys; sys.path[:0] = [{str(ROOT)!r}]; args = sys.argv[1:]\n"
        f"atexit.register(lambda: open({str(status_path)!r}, 'w').write(open('/proc/self/status').read()))\n"
    )
    command = [sys.executable, "-c", head + code, *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    peak = re.search(r"VmHWM:\s+(\d+) kB", status_path.read_text())
    assert peak is not None
    return told, usage.ru_utime + usage.ru_stime, int(peak[1]) / 1024


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        pytest.param("a {" * 100_000, "nested too deeply", id="braces"),
        pytest.param("a <" * 100_000, "nested too deeply", id="angles"),
        pytest.param("a: [{" * 100_000, "nested too deeply", id="lists"),
        pytest.param("a {" * 100_000 + "}" * 100_000, "nested too deeply", id="closed"),
        pytest.param("}" * 100_000, "no block is open", id="closing"),
        pytest.param("[" * 100_000, "an extension name is not closed", id="brackets"),
        pytest.param('a: "' + "x" * 2_000_000, "a string is not closed", id="string"),
        pytest.param("a: '" + r"\'" * 500_000, "a string is not closed", id="escapes"),
        pytest.param("a: " + "1" * 200_000 + "x", "unexpected", id="digits"),
        pytest.param("a: 1." + "1" * 200_000 + "e" + "1" * 200_000 + "x", "unexpected", id="fraction"),
        pytest.param("a " * 200_000, "expected ':'", id="names"),
        pytest.param("\n" * 500_000 + "?", "unexpected", id="lines"),
    ],
)
def test_text_is_refused_in_little_time(source: str, cause: str) -> None:
    with within(), pytest.raises(PrototxtError, match=cause) as caught:
        text.parse(source, "net.prototxt")
    assert len(str(caught.value)) < 300


def test_what_stands_in_the_way_is_named() -> None:
    conflict = "a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> other\n"
    with pytest.raises(PrototxtError, match=r"net\.prototxt:2: .*merge conflict"):
        text.parse(conflict, "net.prototxt")
    with pytest.raises(PrototxtError, match="binary file, try: caffe-lra recover"):
        text.parse(v2_file({"c": [np.ones(3, np.float32)]}).decode("utf-8", "surrogateescape"))
    with pytest.raises(PrototxtError, match="expected a field name"):
        text.parse("a: 1\n<b>")


TOKENS = st.sampled_from(
    [
        *"{}<>[]:;,-.#\\", " ", "\n", "\t", '"', "'", "a", "layer", "dim", "1", "-1", "1e9", "0x", "08", '"x"', "<<<<<<<",
        "\0", "\udcff", "\ufeff", "é", '"\\x"', '"\\u12"', "nan", "-inf", "1f", "true",
    ]
)  # fmt: skip


@some
@given(st.lists(TOKENS, max_size=60).map("".join) | st.text(max_size=60))
def test_any_text_is_read_or_refused(source: str) -> None:
    try:
        document = text.parse(source)
    except PrototxtError as error:
        assert "\n" not in str(error)
        return
    assert text.splice(source, []) == source
    for field in document.root.fields:
        assert source[field.start : field.end].startswith(field.name)
        if isinstance(field.value, text.Scalar):
            assert isinstance(field.value.string, str)


# --- nets -----------------------------------------------------------------------------------------


def one(kind: str, settings_: str, dims: str = "dim: 2 dim: 4 dim: 8 dim: 8", bottoms: int = 1) -> str:
    """An Input and one layer that reads it."""
    names = "".join(f'bottom: "data{i}" ' for i in range(bottoms))
    inputs = "".join(
        f'layer {{ name: "in{i}" type: "Input" top: "data{i}" input_param {{ shape {{ {dims} }} }} }}\n'
        for i in range(bottoms)
    )
    return f'{inputs}layer {{ name: "l" type: "{kind}" {names} top: "out" {settings_} }}'


def conv(settings_: str, kind: str = "Convolution") -> str:
    return one(kind, f"convolution_param {{ {settings_} }}")


MANY = " ".join(["dim: 9223372036854775807"] * 100_000)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (conv("num_output: 2147483648 kernel_size: 1"), "at most 2,147,483,647 numbers"),
        (conv("num_output: 4294967295 kernel_size: 1"), "at most 2,147,483,647 numbers"),
        (conv("num_output: 4294967296 kernel_size: 1"), "num_output is uint32"),
        (conv("num_output: 4 kernel_size: 2147483648"), "does not fit"),
        (conv("num_output: 4 kernel_size: 2147483648 pad: 2147483648"), "at most 2,147,483,647 numbers"),
        (conv("num_output: 4 kernel_size: 1 pad: 4294967295"), "at most 2,147,483,647 numbers"),
        (conv("num_output: 4 kernel_size: 3 dilation: 4294967295"), "does not fit"),
        (conv("num_output: 4 kernel_size: 1 group: 0"), "group is 0"),
        (conv("num_output: 4 kernel_size: 1 stride: 0"), "stride is 0"),
        (conv("num_output: 4 kernel_size: 0"), "kernel size is 0"),
        (conv("num_output: 0 kernel_size: 1"), "num_output is 0"),
        (conv("num_output: 4 kernel_size: 1 axis: 2147483647"), "axis 2147483647 is out of range"),
        (conv("num_output: 4 kernel_size: 2147483648", "Deconvolution"), "at most 2,147,483,647 numbers"),
        (conv("num_output: 4 kernel_size: nan"), "kernel_size is uint32"),
        (one("Convolution", "convolution_param { num_output: 4 " + "kernel_size: 1 " * 100_000 + "}"), "values"),
        (one("Pooling", "pooling_param { kernel_size: 4294967295 pad: 4294967294 }"), "does not fit|at most"),
        (one("Pooling", "pooling_param { kernel_size: 2 stride: 0 }"), "stride is 0"),
        (one("InnerProduct", "inner_product_param { num_output: 2147483648 }"), "at most"),
        (one("InnerProduct", "inner_product_param { num_output: 100000000 }"), "learnt blob 0 .* at most"),
        (one("Embed", "embed_param { num_output: 65536 input_dim: 65536 }"), "at most"),
        (one("Tile", "tile_param { tiles: 2147483647 }"), "at most"),
        (one("SPP", "spp_param { pyramid_height: 4294967295 }"), "bins need a pad"),
        (one("SPP", "spp_param { pyramid_height: 3 }", "dim: 1 dim: 1 dim: 0 dim: 0"), "SPP needs an image"),
        (one("ArgMax", "argmax_param { top_k: 4294967295 }"), "top_k"),
        (one("Reshape", f"reshape_param {{ shape {{ {MANY} }} }}"), "at most 32"),
        (one("Reshape", "reshape_param { shape { dim: -1 dim: 9223372036854775807 } }"), "cannot be divided"),
        (one("Slice", "slice_param { slice_point: 4294967295 }"), "1 slice_point values for 1 tops"),
        (one("Crop", "crop_param { offset: 4294967295 }", bottoms=2), "do not lie within"),
        (one("LSTM", "recurrent_param { num_output: 4294967295 }", bottoms=2), "cont|at most"),
        (one("Split", "", "dim: 2147483648"), "at most"),
        (one("Split", "", "dim: 65536 dim: 65536"), "at most"),
        (one("Split", "", "dim: -1"), "negative"),
        (one("Split", "", "dim: 9223372036854775808"), "dim is int64"),
        (one("Split", "", "dim: " + "9" * 100_000), "dim is int64"),
        (one("Split", "", MANY), "100,000 axes"),
        (one("Split", "", "dim: 1 " * 33), "33 axes"),
        (one("DummyData", "dummy_data_param { num: 4294967295 channels: 1 height: 1 width: 1 }", bottoms=0), "at most"),
        (one("Parameter", f"parameter_param {{ shape {{ {MANY} }} }}", bottoms=0), "axes"),
        ('input: "d" input_dim: "1 dim: 2" input_dim: 1 input_dim: 1 input_dim: 1', "input_dim is int32"),
        ('input: "d" input_shape { dim: "} evil {" }', "dim is int64"),
        ('layr { name: "x" }\n' + one("ReLU", ""), 'no field "layr"'),
        ('name: "a" name: "b"\n' + one("ReLU", ""), '"name" is given twice'),
        ('net: "a.prototxt" base_lr: 0.1', "sets a solver, it is no net; give the net that it trains, a.prototxt"),
        ('layer { name: "a" type: "ReLU" bottom: "b" top: "a" } layer { name: "b" type: "ReLU" bottom: "a" top: "b" }',
         'bottom "b" is written by no layer above; layer "b", which comes no earlier, writes it'),
        ('layer { name: "a" type: "ReLU" bottom: "a" top: "a" }', 'bottom "a" is written by no layer above'),
        (one("(view)", "", bottoms=2), 'layer type "\\(view\\)" is not known'),
        (one("ReLU", 'top: "out"'), 'names the top "out" twice'),
        ('layer { name: "a" type: "ReLU" bottom: "' + "x" * 1_000_000 + '" top: "y" }', "written by no layer"),
        (one("ReLU", 'type: "ReLU"').replace('"l"', r'"a\nb"'), '"type" is given twice'),
    ],
)  # fmt: skip
def test_nets_are_refused_in_little_time(source: str, cause: str) -> None:
    parsed = net.parse(source, "net.prototxt")
    with within(), pytest.raises(NetError, match=cause) as caught:
        infer(graph.build(parsed))
    assert len(str(caught.value)) <= 2000 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        one("ReLU", "relu_param { negative_slope: nan }"),
        one("Power", "power_param { power: nan scale: inf shift: -inf }"),
        one("Eltwise", "eltwise_param { coeff: nan coeff: 1e999 }", bottoms=2),
        one("LRN", "lrn_param { local_size: 4294967295 alpha: nan }"),
        one("BatchNorm", "batch_norm_param { eps: nan }"),
        one("Split", "", "dim: 0 dim: 9223372036854775807"),
        one("Slice", 'top: "b" top: "c"', "dim: 2 dim: 0"),
        one("Concat", "", "dim: 0 dim: 0", bottoms=2),
        one("Flatten", "", "dim: 0 dim: 3"),
        conv('num_output: 4294967295 kernel_size: 1 } param { name: "x"').replace("dim: 8 dim: 8", "dim: 0"),
    ],
)
def test_odd_nets_are_sound_or_refused(source: str) -> None:
    with within():
        try:
            shapes(source)
        except Error as error:
            assert error.line is not None


def test_layers_of_one_name_are_taken_as_caffe_takes_them() -> None:
    source = one("InnerProduct", "inner_product_param { num_output: 3 bias_term: false }", "dim: 1 dim: 2")
    twice = source + source.splitlines()[1].replace('"out"', '"other"')
    stored = v2_file({"l": [np.ones((3, 2), np.float32)]})
    bound = binding.bind(shapes(twice), _weights(stored))
    assert [len(blobs) for blobs in bound.values()] == [1, 1]


def _weights(data: bytes) -> weights.Weights:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.caffemodel"
        path.write_bytes(data)
        return weights.load(path)


def test_a_view_has_no_blobs_of_its_own() -> None:
    """A conv with param blocks whose memory an in-place layer rewrites under another name."""
    shaped = shapes(
        conv("num_output: 2 kernel_size: 1 } param { lr_mult: 1 } param { lr_mult: 2")
        + """
        layer { name: "flat" type: "Flatten" bottom: "out" top: "flat" }
        layer { name: "r" type: "ReLU" bottom: "flat" top: "flat" }
        layer { name: "p" type: "Power" bottom: "out" top: "p" }"""
    )
    assert shaped.by_blob()["p"] == (2, 2, 8, 8)


COUNT = 20_000
HEAD = 'input: "d" input_dim: 1 input_dim: 2 input_dim: 4 input_dim: 4\n'
LARGE: dict[str, Callable[[int], str]] = {
    "in a row": lambda n: (
        HEAD
        + "".join(
            f'layer {{ name: "c{i}" type: "InnerProduct" bottom: "{f"b{i - 1}" if i else "d"}" top: "b{i}"'
            " inner_product_param { num_output: 2 } }\n"
            for i in range(n)
        )
    ),
    "in place, shared": lambda n: (
        HEAD
        + 'layer { name: "s" type: "Split" bottom: "d" top: "x0" top: "x1" }\n'
        + "".join(
            f'layer {{ name: "r{i}" type: "ReLU" bottom: "x{i % 2}" top: "x{i % 2}" }}\n' for i in range(n)
        )
    ),
    "side by side": lambda n: (
        HEAD
        + 'layer { name: "s" type: "Split" bottom: "d" '
        + "".join(f'top: "t{i}" ' for i in range(n))
        + '}\nlayer { name: "c" type: "Concat" top: "c" '
        + "".join(f'bottom: "t{i}" ' for i in range(n))
        + "}\n"
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_nets_take_linear_time(kind: str) -> None:
    def seconds(count: int) -> float:
        source = LARGE[kind](count)
        started = time.process_time()
        shapes(source)
        return time.process_time() - started

    small, large = seconds(COUNT // 10), seconds(COUNT)
    assert large < 8
    assert large < 30 * small


# --- weights --------------------------------------------------------------------------------------


def read_all(stored: weights.Weights) -> None:
    for name in stored:
        try:
            for array in stored[name]:
                assert array.dtype == np.float32 and not array.flags.writeable
        except CaffemodelError as error:
            assert error.layer == name


def shape_of(*dims: int) -> bytes:
    return wire.encode_bytes(7, wire.encode_bytes(1, b"".join(map(wire.encode_varint, dims))))


@pytest.mark.parametrize(
    ("blob_bytes", "cause"),
    [
        (shape_of(2**62, 2**62), r"holds 0 numbers"),
        (shape_of(0, 2**63) + wire.encode_bytes(5, b""), "no axis of Caffe's is that long"),
        (shape_of(0, 2**40), "no axis of Caffe's is that long"),
        (shape_of(-1 & 2**64 - 1), "holds 0 numbers"),
        (shape_of(*[2**63] * 100_000), "more than the 32 axes"),
        (shape_of(*[1] * 33) + wire.encode_bytes(5, bytes(4)), "more than the 32 axes"),
        (shape_of(2**31) + wire.header(5, 4 * 2**31), "needs"),
        (shape_of(3) + wire.encode_bytes(5, bytes(7)), "no whole number"),
        (b"".join([shape_of(2)] * 50_000), "more than the 32 axes"),
    ],
)
def test_declared_sizes_are_checked_first(tmp_path: Path, blob_bytes: bytes, cause: str) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(v2_layer("c", blob_bytes))
    with within(), pytest.raises(CaffemodelError, match=cause):
        _ = weights.load(path)["c"]


def test_many_small_runs_are_joined(tmp_path: Path) -> None:
    values = np.arange(30_000, dtype=np.float32)
    runs = b"".join(wire.encode_bytes(5, value.tobytes()) for value in values)
    path = tmp_path / "w.caffemodel"
    path.write_bytes(v2_layer("c", shape_of(values.size) + runs))
    with within():
        (array,) = weights.load(path)["c"]
    assert np.array_equal(array, values)


@pytest.mark.parametrize("data", [b"\x50\x00" * 600_000, b"\xa2\x06\x02\x3a\x00" * 300_000])
def test_more_fields_than_any_net_has(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(data)
    with within(3), pytest.raises(CaffemodelError, match="more than 500,000 fields and blobs"):
        weights.load(path)


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 50, 100, 2**31, 2**63, 2**64 - 1])
LEAVES = st.binary(max_size=12) | st.lists(NUMBERS, max_size=5).map(
    lambda values: b"".join(map(wire.encode_varint, values))
)


def message(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    field = (
        st.tuples(NUMBERS.filter(lambda n: 0 < n < 2**29), inner).map(lambda pair: wire.encode_bytes(*pair))
        | st.tuples(NUMBERS.filter(lambda n: 0 < n < 2**29), NUMBERS).map(
            lambda pair: wire.tag(pair[0], wire.VARINT) + wire.encode_varint(pair[1])
        )
        | st.tuples(NUMBERS, NUMBERS).map(lambda pair: wire.header(pair[0] % 2**29, pair[1]))
    )
    return st.lists(field, max_size=5).map(b"".join)


@some
@given(
    st.recursive(LEAVES, message, max_leaves=25).map(lambda data: wire.encode_bytes(100, data))
    | message(LEAVES)
)
def test_any_bytes_are_weights_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(data)
    try:
        read_all(weights.load(path))
    except CaffemodelError as error:
        assert "\n" not in str(error)


def test_a_large_sparse_file_is_only_viewed(tmp_path: Path) -> None:
    """3 GB of zeros that take no room on the disk: opened, bound and described without being read."""
    count = 3 * 2**28
    inner = shape_of(2**28, 3) + wire.header(5, 4 * count)
    head = wire.encode_bytes(1, b"l")
    layer = wire.header(7, len(inner) + 4 * count) + inner
    path, source = tmp_path / "w.caffemodel", tmp_path / "net.prototxt"
    path.write_bytes(wire.header(100, len(head) + len(layer) + 4 * count) + head + layer)
    os.truncate(path, path.stat().st_size + 4 * count)
    param = f"inner_product_param {{ num_output: {2**28} bias_term: false }}"
    source.write_text(one("InnerProduct", param, "dim: 1 dim: 3"))
    told, seconds, peak = measured(
        tmp_path,
        "from caffe_proto import load, binding, graph, shape_inference\n"
        "model = load(*args)\n"
        "bound = binding.bind(shape_inference.infer(graph.build(model.net)), model.weights)\n"
        "print(bound[1][0].shape, bound[1][0][-1, -1])",
        source,
        path,
    )
    assert told == f"({2**28}, 3) 0.0\n"
    assert seconds < 2 and peak < 200


# --- HDF5 -----------------------------------------------------------------------------------------


def hdf5(folder: Path, fill: Callable[[h5py.File], object]) -> weights.Weights:
    path = folder / "w.caffemodel.h5"
    with h5py.File(path, "w") as file:
        fill(file)
    return weights.load(path)


@pytest.mark.parametrize(
    ("fill", "cause"),
    [
        (lambda f: f.create_dataset("data/c/0", (2**40,), "f4", chunks=(2**20,)), "is to hold"),
        (lambda f: f.create_dataset("data/c/0", (2**31, 2**31), "f4", chunks=(64, 64)), "is to hold"),
        (lambda f: f.create_dataset("data/c/0", data=np.zeros(2**25, "f4"), compression="gzip"), "is to hold"),
        (lambda f: f.create_dataset("data/c/0", data="text"), "holds no numbers"),
        (lambda f: f.create_dataset("data/c/0", data=np.ones(2, complex)), "holds no numbers"),
        (lambda f: f.create_dataset("data/c/0", data=[True]), "holds no numbers"),
        (lambda f: f.create_dataset("data/c/0", data=h5py.Empty("f4")), "holds no numbers"),
        (lambda f: f.create_dataset("data/c/0", (2,), h5py.vlen_dtype("f4")), "holds no numbers"),
    ],
)  # fmt: skip
def test_hdf5_that_holds_no_blobs(tmp_path: Path, fill: Callable[[h5py.File], object], cause: str) -> None:
    stored = hdf5(tmp_path, fill)
    with within(), pytest.raises(CaffemodelError, match=cause):
        _ = stored["c"]


def test_deep_groups(tmp_path: Path) -> None:
    with within(), pytest.raises(CaffemodelError, match="nested more than 100 deep"):
        hdf5(tmp_path, lambda file: file.create_dataset(f"data/{'g/' * 500}0", data=np.ones(2, "f4")))


HDF5_NAMES = st.lists(
    st.sampled_from(["a", "conv", "0", "1", "00", "9" * 30, " ", "é", "x\n"]), min_size=1, max_size=4
)


@settings(some, max_examples=60)
@given(
    st.dictionaries(
        HDF5_NAMES.map("/".join), st.lists(st.integers(0, 4), max_size=5).map(tuple), min_size=1, max_size=5
    ),
    st.sampled_from(["f4", "f8", "f2", "i1", "u8", ">f4"]),
)
def test_any_names_and_shapes_in_hdf5(tmp_path: Path, found: dict[str, tuple[int, ...]], dtype: str) -> None:
    def fill(file: h5py.File) -> None:
        for name, dims in found.items():
            try:
                file.create_dataset(f"data/{name}", data=np.ones(dims, dtype))
            except (ValueError, TypeError):  # HDF5 has a data set where a group would have to be
                continue

    try:
        stored = hdf5(tmp_path, fill)
        read_all(stored)
        binding.bind(shapes(one("InnerProduct", "inner_product_param { num_output: 2 }")), stored)
    except Error as error:
        assert "\n" not in str(error)


# --- plans and arrays -----------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["layers", "kept", "target", "net", "weights", "conv1", "scheme", "rank", "ranks", "macs", "error"]
)
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["pca", "spatial", "", "x"])
)
JSON = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@some
@given(JSON | st.dictionaries(KEYS, JSON, max_size=4))
def test_any_json_is_a_plan_or_refused(value: object) -> None:
    try:
        plan = Plan.from_json(json.dumps(value), "p.json")
    except PlanError as error:
        assert "\n" not in str(error)
        return
    again = Plan.from_json(plan.to_json())
    assert repr(again.layers) == repr(plan.layers)  # NaN is not equal to itself


@pytest.mark.parametrize(
    "source",
    [
        "", "[", "nul", "[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '{"a": ' + "1" * 100_000 + "}", '{"a": 1, "a": 1}',
        "NaN", '"x"', "[]", '{"a": 1e999}', '{"a": NaN}', '{"a": 1.5}', '{"a": true}', '{"a": [[]]}',
        '{"layers": []}', '{"layers": {"a": []}}', '{"layers": {"a": {}}}', '{"layers": {}, "kept": {"a": 1}}', "\0",
    ],
)  # fmt: skip
def test_what_is_no_plan(source: str) -> None:
    with within(), pytest.raises(PlanError) as caught:
        Plan.from_json(source, "p.json")
    assert len(str(caught.value)) <= 2000


RUN = "from lra.cli import main\nsys.exit(main(args))"


@pytest.mark.parametrize("kind", ["packed", "declared", "truncated", "damaged", "objects", "no header"])
def test_arrays_that_are_none(tmp_path: Path, kind: str) -> None:
    """``run --input`` on a file that unpacks to gigabytes, declares them, or holds something else."""
    network, stored = nets.files(tmp_path)
    path = tmp_path / "x.npz"
    if kind == "packed":
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("data.npy", "w") as file,
        ):
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (2**26,)}
            )
            for _ in range(256):
                file.write(bytes(MIB))
    elif kind == "declared":
        with zipfile.ZipFile(path, "w") as archive, archive.open("data.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (2**45,)}
            )
    elif kind == "objects":
        np.savez(path, data=np.array([{}], object), allow_pickle=True)
    else:
        np.savez(path, data=np.ones(5000, np.float32))
        data = path.read_bytes()
        made = {
            "truncated": data[: len(data) // 2],
            "no header": b"PK\x03\x04",
            "damaged": data.replace(b"descr", b"(((((("),
        }
        path.write_bytes(made[kind])
    told, seconds, peak = measured(
        tmp_path, RUN, "run", network, stored, "--input", path, "-o", tmp_path / "out.npz", "--threads", 1
    )
    assert told.startswith("caffe-lra: error: ") and told.count("\n") == 1, told
    assert seconds < 4 and peak < 300
    assert not (tmp_path / "out.npz").exists()


def test_names_of_any_bytes_are_printed(tmp_path: Path) -> None:
    path = tmp_path / "net.prototxt"
    path.write_text(one("ReLU", "").replace('"l"', r'"d\377"'))
    told, _, _ = measured(
        tmp_path, "sys.stdout.reconfigure(encoding='utf-8', errors='strict')\n" + RUN, "info", path
    )
    assert "\\udcff" in told and "this is a bug" not in told


# --- the whole way --------------------------------------------------------------------------------

SEEDS = fuzz.seeds()
WORDS = fuzz.field_names()


@settings(some, max_examples=400)
@given(st.integers(0, 2**32))
def test_mutated_nets_are_sound_or_refused(tmp_path: Path, number: int) -> None:
    made = fuzz.case(number, 1, SEEDS, WORDS)
    fuzz.drive(tmp_path, made.text, made.weights)


def test_seeds_are_sound(tmp_path: Path) -> None:
    for seed in SEEDS[:5]:
        assert fuzz.drive(tmp_path, seed.text, seed.weights) == "sound"


# --- being killed ---------------------------------------------------------------------------------

SAVE = """
from caffe_proto import load, save
model = load(args[0], args[1])
print("ready", flush=True)
while True:
    save(model, args[2], args[3])
"""


def test_a_killed_save_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    """A child that saves over and over is killed at random moments; both files are whole each time."""
    source, stored = tmp_path / "net.prototxt", tmp_path / "new.caffemodel"
    source.write_text('name: "new"\n' + one("InnerProduct", "inner_product_param { num_output: 1000 }"))
    new = v2_file({f"l{i}": [np.full((500, 500), i, np.float32)] for i in range(4)})
    stored.write_bytes(new)
    net_path, weights_path = tmp_path / "out.prototxt", tmp_path / "out.caffemodel"
    rng = random.Random(0)
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}]; args = sys.argv[1:]{SAVE}"]
    for _ in range(20):
        net_path.write_bytes(b"old")
        weights_path.write_bytes(b"old weights")
        arguments = map(str, (source, stored, net_path, weights_path))
        with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            spin(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        assert net_path.read_bytes() in (b"old", source.read_bytes())
        assert weights_path.read_bytes() in (b"old weights", new)


def spin(seconds: float) -> None:
    """Let a moment pass while another process works."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
