"""Weights by layer name: every form Caffe has written them in, and writing them back."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import (
    DOUBLE,
    blob,
    f32,
    floats,
    legacy_shape,
    message,
    needs_shared,
    packed,
    protobuf_blobs,
    same,
    shape,
    shared_files,
    unpacked,
    v0_layer,
    v1_layer,
    v2_file,
    v2_layer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from caffe_proto import schema, weights, wire
from caffe_proto.errors import CaffemodelError, Error, FileError, UsageError
from caffe_proto.weights import NewEntry, Weights

Layer = Callable[..., bytes]

ONE_TO_SIX = np.arange(1, 7, dtype=np.float32)
WILD = shared_files("", "*.caffemodel")
WILD_HDF5 = [path for path in shared_files("", "*.h5") if "solverstate" not in path.name]


def load(folder: Path, data: bytes, name: str = "w.caffemodel") -> Weights:
    path = folder / name
    path.write_bytes(data)
    return weights.load(path)


def written(stored: Weights) -> bytes:
    file = io.BytesIO()
    stored.write_caffemodel(file)
    return file.getvalue()


def blobs_of(stored: Weights) -> dict[str, list[np.ndarray]]:
    return {name: list(blobs) for name, blobs in stored.items()}


def same_weights(left: dict[str, list[np.ndarray]], right: dict[str, list[np.ndarray]]) -> bool:
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def read_all(stored: Weights) -> None:
    """Read every blob; only our own errors may come of it."""
    for name in stored:
        try:
            for array in stored[name]:
                assert array.dtype == np.float32
        except Error:
            continue


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [v2_layer, v1_layer, v0_layer])
def test_every_dialect(tmp_path: Path, layer: Layer) -> None:
    data = layer("conv", shape(2, 3) + packed(*ONE_TO_SIX), shape(2) + packed(7, 8)) + layer("relu")
    stored = load(tmp_path, data)
    assert list(stored) == ["conv"]
    assert same(stored["conv"], (ONE_TO_SIX.reshape(2, 3), np.array([7, 8], np.float32)))
    assert stored.dialect.name == ("V2" if layer is v2_layer else "V1")


@pytest.mark.parametrize(
    ("blob_bytes", "expected"),
    [
        (shape(2, 3) + packed(*ONE_TO_SIX), ONE_TO_SIX.reshape(2, 3)),
        (packed(*ONE_TO_SIX) + shape(2, 3), ONE_TO_SIX.reshape(2, 3)),
        (shape(6) + unpacked(*ONE_TO_SIX), ONE_TO_SIX),
        (shape(6) + packed(1, 2) + packed(3) + packed(4, 5, 6), ONE_TO_SIX),
        (shape(6) + packed(1, 2) + unpacked(3, 4) + packed(5) + unpacked(6), ONE_TO_SIX),
        (shape(6) + unpacked(1, 2) + shape() + unpacked(3) + packed(4, 5, 6), ONE_TO_SIX),
        (shape(6) + packed() + packed(*ONE_TO_SIX), ONE_TO_SIX),
        (shape(6) + packed(*ONE_TO_SIX, number=8, dtype=DOUBLE), ONE_TO_SIX),
        (shape(6) + unpacked(*ONE_TO_SIX, number=8, dtype=DOUBLE), ONE_TO_SIX),
        (
            shape(2) + packed(0.1, number=8, dtype=DOUBLE) + unpacked(0.2, number=8, dtype=DOUBLE),
            f32([0.1, 0.2]),
        ),
        (shape(2) + packed(5, 6, 7) + packed(1, 2, number=8, dtype=DOUBLE), f32([1, 2])),
        (shape(2) + packed(number=8, dtype=DOUBLE) + packed(1, 2), f32([1, 2])),
        (shape(6) + packed(9, 9, 9, number=6) + packed(*ONE_TO_SIX) + unpacked(9, number=6), ONE_TO_SIX),
        (shape(6) + packed(*ONE_TO_SIX) + packed(9, number=9, dtype=DOUBLE), ONE_TO_SIX),
        (
            legacy_shape(num=1, channels=2, height=1, width=3) + packed(*ONE_TO_SIX),
            ONE_TO_SIX.reshape(1, 2, 1, 3),
        ),
        (
            legacy_shape(num=1, channels=1, height=2, width=3) + unpacked(*ONE_TO_SIX),
            ONE_TO_SIX.reshape(1, 1, 2, 3),
        ),
        (
            legacy_shape(num=3, channels=2, height=1, width=1) + shape(6) + packed(*ONE_TO_SIX),
            ONE_TO_SIX.reshape(3, 2, 1, 1),
        ),
        (legacy_shape(num=3), np.empty((3, 0, 0, 0), np.float32)),
        (shape() + packed(5), f32(5)),
        (packed(5), f32(5)),
        (unpacked(5), f32(5)),
        (shape(0), np.empty(0, np.float32)),
        (shape(2, 0) + packed(), np.empty((2, 0), np.float32)),
        (shape(3) + packed(np.nan, np.inf, -0.0), f32([np.nan, np.inf, -0.0])),
        (wire.encode_bytes(7, b"\x08\x02\x08\x03") + packed(*ONE_TO_SIX), ONE_TO_SIX.reshape(2, 3)),
        (
            wire.encode_bytes(7, b"\x08\x02") + wire.encode_bytes(7, b"\x08\x03") + packed(*ONE_TO_SIX),
            ONE_TO_SIX.reshape(2, 3),
        ),
    ],
)
def test_every_form_of_a_blob(tmp_path: Path, blob_bytes: bytes, expected: np.ndarray) -> None:
    for layer in (v2_layer, v1_layer, v0_layer):
        stored = load(tmp_path, layer("x", blob_bytes))
        (array,) = stored["x"]
        assert array.dtype == np.float32 and not array.flags.writeable
        assert same((array,), (expected,))


_PIECES = st.lists(
    st.tuples(st.booleans(), st.lists(st.floats(width=32, allow_subnormal=False), max_size=4)), max_size=6
)


@given(_PIECES, st.booleans())
def test_mixed_runs_agree_with_protobuf(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bool, list[float]]], double: bool
) -> None:
    number, dtype = (8, DOUBLE) if double else (5, "<f4")
    runs = b"".join(
        (packed if is_packed else unpacked)(*run, number=number, dtype=dtype) for is_packed, run in pieces
    )
    count = sum(len(run) for _, run in pieces)
    data = v2_layer("x", shape(count) + runs)
    stored = load(tmp_path_factory.getbasetemp(), data)
    assert same(stored["x"], protobuf_blobs(data)["x"])


def test_the_last_layer_of_a_name_counts(tmp_path: Path) -> None:
    data = v2_layer("a", packed(1)) + v2_layer("b", packed(2)) + v2_layer("a", packed(3)) + v2_layer("a")
    stored = load(tmp_path, data)
    assert list(stored) == ["a", "b"]
    assert float(stored["a"][0]) == 3
    assert written(stored) == data


def test_one_packed_run_is_a_view_of_the_map(tmp_path: Path) -> None:
    data = v2_layer("one", shape(6) + packed(*ONE_TO_SIX)) + v2_layer("two", shape(2) + packed(1) + packed(2))
    stored = load(tmp_path, data)
    entry = next(piece for piece in stored.pieces if isinstance(piece, weights.MappedEntry))
    whole = np.frombuffer(entry.buffer, np.uint8)
    (view,), (copy,) = stored["one"], stored["two"]
    assert np.shares_memory(view, whole)
    assert not np.shares_memory(copy, whole)
    assert stored["one"][0] is view
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        copy[0] = 1


def test_layer_names_keep_their_bytes(tmp_path: Path) -> None:
    odd = wire.encode_bytes(100, wire.encode_bytes(1, b"caf\xe9") + wire.encode_bytes(7, packed(1)))
    stored = load(tmp_path, odd)
    assert list(stored) == ["caf\udce9"]
    changed = stored.replace({"caf\udce9": [NewEntry("caf\udce9", (f32([2]),))]})
    assert b"\x0a\x04caf\xe9" in written(changed)


# --- files that are no weights --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "no caffemodel"),
        (b"{}", "no caffemodel"),
        (b'name: "net"\nlayer { }', "no caffemodel"),
        (wire.encode_bytes(1, b"net"), "holds no layer"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 30, "HDF5"),
    ],
)
def test_refuses_what_is_no_weight_file(tmp_path: Path, data: bytes, cause: str) -> None:
    with pytest.raises(CaffemodelError, match=cause) as caught:
        load(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "blob_bytes",
    [
        shape(7) + packed(*ONE_TO_SIX),
        shape(5) + packed(*ONE_TO_SIX),
        shape(0) + packed(1),
        shape(2),
        b"",
        packed(1, 2),
        legacy_shape(num=6) + packed(*ONE_TO_SIX),
        shape(6) + wire.encode_bytes(5, floats(*ONE_TO_SIX)[:-1]),
        shape(2**63) + packed(1),
        shape(0, 2**64 - 1),
        shape(*[1] * 70) + packed(1),
        shape(2) + b"\x28\xff",
    ],
)
def test_refuses_blobs_whose_numbers_do_not_fit(tmp_path: Path, blob_bytes: bytes) -> None:
    stored = load(tmp_path, v2_layer("good", packed(1)) + v2_layer("conv", blob_bytes))
    assert float(stored["good"][0]) == 1
    with pytest.raises(CaffemodelError, match='layer "conv"'):
        stored["conv"]


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        weights.load(tmp_path / "none.caffemodel")
    with pytest.raises(FileError, match="folder"):
        weights.load(tmp_path)


@pytest.mark.parametrize("layer", [v2_layer, v1_layer, v0_layer])
def test_a_truncated_file_is_refused_or_ends_at_a_layer(tmp_path: Path, layer: Layer) -> None:
    parts = [
        wire.encode_bytes(1, b"net"),
        *(layer(name, blob(np.ones((2, 3))), blob(np.ones(2))) for name in "abc"),
    ]
    data = b"".join(parts)
    ends = {sum(map(len, parts[: i + 1])): i for i in range(1, 4)}
    for length in range(len(data) + 1):
        if length in ends:
            assert list(load(tmp_path, data[:length])) == list("abc"[: ends[length]])
        else:
            with pytest.raises(CaffemodelError):
                load(tmp_path, data[:length])


def test_truncated_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    with path.open("wb") as target, h5py.File(target, "w") as file:
        file["data/conv/0"] = np.arange(4000, dtype=np.float32)
        file["data/conv/1"] = np.arange(4, dtype=np.float32)
    data = path.read_bytes()
    for length in range(8, len(data), len(data) // 50):
        with pytest.raises(CaffemodelError):
            stored = load(tmp_path, data[:length], "cut.h5")
            stored["conv"]


_CAFFEMODEL = (
    wire.encode_bytes(1, b"net")
    + v2_layer(
        "a",
        shape(2, 3) + packed(*ONE_TO_SIX),
        legacy_shape(num=1, channels=1, height=1, width=2) + unpacked(1, 2),
    )
    + v1_layer("b", shape(2) + packed(1, 2, number=8, dtype=DOUBLE))
    + v0_layer("c", shape() + packed(3))
)


def _mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with a few of them changed, left out or put in, perhaps cut off."""

    def apply(changes: list[tuple[int, int, bytes]], end: int) -> bytes:
        out = bytearray(data)
        for at, length, new in changes:
            out[at : at + length] = new
        return bytes(out[:end])

    change = st.tuples(st.integers(0, len(data)), st.integers(0, 3), st.binary(max_size=3))
    return st.builds(apply, st.lists(change, min_size=1, max_size=6), st.integers(0, 2 * len(data)))


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(_mutated(_CAFFEMODEL) | st.binary())
def test_damaged_bytes_raise_nothing_but_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    try:
        stored = load(tmp_path_factory.getbasetemp(), data)
    except Error:
        return
    read_all(stored)
    assert written(stored) == data


# --- writing --------------------------------------------------------------------------------------


@needs_shared
def test_untouched_files_of_the_wild_are_written_byte_for_byte() -> None:
    assert len(WILD) > 100
    for path in WILD:
        data = path.read_bytes()
        stored = weights.load(path)
        assert written(stored) == data, path
        field = "layers" if stored.dialect.name == "V1" else "layer"
        assert stored.dialect.name == "V2" or not message("NetParameter", data).layer
        if not _is_v0(data):
            assert same_weights(blobs_of(stored), protobuf_blobs(data, field)), path


def _is_v0(data: bytes) -> bool:
    return any(layer.HasField("layer") for layer in message("NetParameter", data).layers)


ARRAYS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=3),
    elements=st.floats(width=32, allow_subnormal=False),
)
LAYERS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8), st.lists(ARRAYS, min_size=1, max_size=3), max_size=4
)


@given(LAYERS.filter(bool))
def test_any_blobs_come_back(
    tmp_path_factory: pytest.TempPathFactory, layers: dict[str, list[np.ndarray]]
) -> None:
    made = Weights([NewEntry(name, tuple(arrays)) for name, arrays in layers.items()])
    data = written(made)
    assert same_weights(protobuf_blobs(data), layers)
    assert same_weights(blobs_of(load(tmp_path_factory.getbasetemp(), data)), layers)


def _definition(name: str) -> bytes:
    return wire.encode_bytes(1, name.encode()) + wire.encode_bytes(2, b"Convolution")


def test_replace_in_the_middle_keeps_the_rest(tmp_path: Path) -> None:
    head, a, b, c = wire.encode_bytes(1, b"net"), *(v2_layer(name, blob(ONE_TO_SIX)) for name in "abc")
    raw = v2_layer("relu")
    stored = load(tmp_path, head + a + b + raw + c)
    two = (np.ones((2, 3), np.float32), np.zeros(2, np.float32))
    new = [
        NewEntry("b_lowrank", two, _definition("b_lowrank")),
        NewEntry("b", (ONE_TO_SIX[:2],), _definition("b")),
    ]
    changed = stored.replace({"b": new})
    assert list(changed) == ["a", "b_lowrank", "b", "c"]
    middle = v2_layer("b_lowrank", *map(blob, two)) + v2_layer("b", blob(ONE_TO_SIX[:2]))
    assert written(changed) == head + a + middle + raw + c
    assert written(stored) == head + a + b + raw + c


def test_replace_at_the_end_and_by_nothing(tmp_path: Path) -> None:
    a, b = v2_layer("a", packed(1)), v2_layer("b", packed(2))
    stored = load(tmp_path, a + b)
    changed = stored.replace({"b": [NewEntry("c", (ONE_TO_SIX,), _definition("c"))]})
    assert written(changed) == a + v2_layer("c", blob(ONE_TO_SIX))
    assert written(stored.replace({"a": []})) == b
    assert written(stored.replace({"new": [NewEntry("new", (ONE_TO_SIX,), _definition("new"))]})) == (
        a + b + v2_layer("new", blob(ONE_TO_SIX))
    )
    assert written(stored.replace({})) == a + b


def test_large_spans_are_copied_into_a_real_file(tmp_path: Path) -> None:
    large = np.arange(50_000, dtype=np.float32)
    layers = {name: [large + index] for index, name in enumerate("abcd")}
    stored = load(tmp_path, v2_file(layers))
    changed = stored.replace({"b": [NewEntry("b", (ONE_TO_SIX,), _definition("b"))]})
    for made in (stored, changed):
        with (tmp_path / "out.caffemodel").open("wb") as file:
            file.write(b"\x0a\x00")
            made.write_caffemodel(file)
            assert file.tell() == 2 + len(written(made))
            file.write(b"\x0a\x00")
        data = (tmp_path / "out.caffemodel").read_bytes()
        assert data == b"\x0a\x00" + written(made) + b"\x0a\x00"
    assert same_weights(protobuf_blobs(data), layers | {"b": [ONE_TO_SIX]})


def test_replace_puts_the_new_layers_where_the_first_of_a_name_stood(tmp_path: Path) -> None:
    a, b = v2_layer("a", packed(1)), v2_layer("b", packed(2))
    changed = load(tmp_path, a + b + a).replace({"a": [NewEntry("a", (ONE_TO_SIX,), _definition("a"))]})
    assert written(changed) == v2_layer("a", blob(ONE_TO_SIX)) + b


def test_a_v1_file_stays_v1(tmp_path: Path) -> None:
    a, c = v1_layer("a", blob(ONE_TO_SIX)), v1_layer("c", blob(ONE_TO_SIX))
    stored = load(tmp_path, a + v1_layer("b", packed(1)) + c)
    data = written(stored.replace({"b": [NewEntry("b", (np.ones((2, 2), np.float32),))]}))
    assert data == a + v1_layer("b", blob(np.ones((2, 2)))) + c
    net = message("NetParameter", data)
    assert [layer.name for layer in net.layers] == ["a", "b", "c"] and not net.layer
    assert same(load(tmp_path, data)["b"], (np.ones((2, 2), np.float32),))


@given(LAYERS.filter(lambda layers: len(layers) > 1), LAYERS, st.data())
def test_replaced_weights_are_what_protobuf_and_we_read(
    tmp_path_factory: pytest.TempPathFactory,
    layers: dict[str, list[np.ndarray]],
    new: dict[str, list[np.ndarray]],
    data: st.DataObject,
) -> None:
    target = data.draw(st.sampled_from(list(layers)))
    new = {name: arrays for name, arrays in new.items() if name not in layers}
    folder = tmp_path_factory.getbasetemp()
    stored = load(folder, v2_file(layers))
    changed = stored.replace({target: [NewEntry(name, tuple(arrays)) for name, arrays in new.items()]})
    expected = {name: arrays for name, arrays in layers.items() if name != target} | new
    out = written(changed)
    assert same_weights(protobuf_blobs(out), expected)
    assert same_weights(blobs_of(changed), expected)
    if expected:
        again = load(folder, out, "again.caffemodel")
        assert same_weights(blobs_of(again), expected)
        assert written(again) == out


def test_arrays_of_other_types_and_layouts_are_written_as_float32(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float64).reshape(2, 3).T
    data = written(Weights([NewEntry("a", (array, f32(3)), b"")]))
    assert same(load(tmp_path, data)["a"], (array.astype(np.float32), f32(3)))


def test_views_outlive_the_weights(tmp_path: Path) -> None:
    (array,) = load(tmp_path, v2_layer("a", blob(ONE_TO_SIX)))["a"]
    assert np.array_equal(array, ONE_TO_SIX)


# --- HDF5 -----------------------------------------------------------------------------------------

NESTED: dict[str, list[np.ndarray]] = {
    "a": [ONE_TO_SIX.reshape(2, 3), ONE_TO_SIX[:2]],
    "a/b": [ONE_TO_SIX],
    "inception_3a/1x1": [np.ones((2, 1, 1, 1), np.float32), np.zeros(2, np.float32)],
    "many": [np.full(1, i, np.float32) for i in range(12)],
    "scalar": [f32(4)],
    "empty": [np.empty((0, 3), np.float32)],
}


def test_hdf5_both_ways(tmp_path: Path) -> None:
    source = load(tmp_path, v2_file(NESTED))
    source.write_hdf5(tmp_path / "w.caffemodel.h5")
    with h5py.File(tmp_path / "w.caffemodel.h5") as file:
        assert file["data/inception_3a/1x1/0"].shape == (2, 1, 1, 1)
        assert file["data/a/b/0"].dtype == np.float32
    stored = weights.load(tmp_path / "w.caffemodel.h5")
    assert stored.is_hdf5 and not source.is_hdf5
    assert same_weights(blobs_of(stored), NESTED)
    assert all(not array.flags.writeable for array in stored["a"])
    back = load(tmp_path, written(stored), "back.caffemodel")
    assert same_weights(blobs_of(back), NESTED)


def test_hdf5_extra_layers_and_unused_groups(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file["data/conv/1"] = f32([1])
        file["data/conv/0"] = np.array([[2.0, 3.0]])
        file["data/conv/notes"] = f32([9])
        file["data/extra/0"] = f32([4])
        file.create_group("data/relu")
        file["diff/conv/0"] = f32([5])
        file["iter"] = 7
    stored = weights.load(path)
    assert same_weights(blobs_of(stored), {"conv": [f32([[2, 3]]), f32([1])], "extra": [f32([4])]})
    stored.write_hdf5(tmp_path / "copy.h5")
    assert (tmp_path / "copy.h5").read_bytes() == path.read_bytes()


def test_hdf5_replaced_layers_are_gone(tmp_path: Path) -> None:
    load(tmp_path, v2_file(NESTED)).write_hdf5(tmp_path / "w.h5")
    stored = weights.load(tmp_path / "w.h5")
    stored.replace({"a": []}).write_hdf5(tmp_path / "less.h5")
    assert list(weights.load(tmp_path / "less.h5")) == sorted(NESTED.keys() - {"a"})
    changed = stored.replace({"a": [NewEntry("a", (ONE_TO_SIX,)), NewEntry("z", (ONE_TO_SIX,))]})
    changed.write_hdf5(tmp_path / "more.h5")
    again = weights.load(tmp_path / "more.h5")
    assert same_weights(blobs_of(again), {**NESTED, "a": [ONE_TO_SIX], "z": [ONE_TO_SIX]})


@pytest.mark.parametrize("names", [["/abs"], ["a//b"], ["a/"], ["."], [""], ["a", "a/0"], ["a\0b"]])
def test_names_that_hdf5_cannot_hold_are_refused(tmp_path: Path, names: list[str]) -> None:
    stored = load(tmp_path, v2_file({name: [ONE_TO_SIX] for name in names}))
    with pytest.raises(UsageError, match="HDF5 cannot hold"):
        stored.write_hdf5(tmp_path / "w.h5")


def test_hdf5_without_weights_or_with_text_in_them(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["iter"] = 3
    with pytest.raises(CaffemodelError, match="holds no layer"):
        weights.load(tmp_path / "none.h5")
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["data/conv/0"] = "text"
        file["data/conv2/²"] = [1.0]
    with pytest.raises(CaffemodelError, match='layer "conv"'):
        weights.load(tmp_path / "text.h5")["conv"]


@needs_shared
def test_hdf5_files_of_the_wild(tmp_path: Path) -> None:
    assert WILD_HDF5
    for path in WILD_HDF5:
        stored = weights.load(path)
        stored.write_hdf5(tmp_path / "copy.h5")
        assert (tmp_path / "copy.h5").read_bytes() == path.read_bytes()
        back = load(tmp_path, written(stored))
        assert same_weights(blobs_of(back), blobs_of(stored)), path
        back.write_hdf5(tmp_path / "again.h5")
        assert same_weights(blobs_of(weights.load(tmp_path / "again.h5")), blobs_of(stored)), path


def test_a_written_file_is_a_net_parameter_of_the_schema(tmp_path: Path) -> None:
    layer = schema.message_class("LayerParameter")(
        name="conv", type="Convolution", bottom=["data"], top=["conv"]
    )
    made = Weights([NewEntry("conv", (ONE_TO_SIX.reshape(2, 3),), layer.SerializeToString())])
    (read,) = message("NetParameter", written(made)).layer
    assert (read.name, read.type, list(read.bottom)) == ("conv", "Convolution", ["data"])
    assert list(read.blobs[0].shape.dim) == [2, 3] and list(read.blobs[0].data) == list(ONE_TO_SIX)
