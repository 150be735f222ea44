"""A net and its weights: loading, saving, telling apart."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import SHARED, blob, needs_shared, same, v1_layer, v2_file, v2_layer, wire

from caffe_proto import model, weights
from caffe_proto.errors import CaffemodelError, Error, FileError, PrototxtError, UsageError
from caffe_proto.net import NetState

PROTOTXT = (
    b'\xef\xbb\xbfname: "caf\xe9" # a comment\r\n'
    b'input: "data" input_shape < dim: [1, 3, 8, 8]; >\r\n'
    b'\tlayer { name: "conv" type: "Convolution" bottom: "data" top: "conv" mystery { x: 1 } }\r\n'
    b'layer { name: "test" type: "Softmax" bottom: "conv" top: "p" include { phase: TEST } }'
)
CONV = (np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1), np.ones(2, np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.prototxt").write_bytes(PROTOTXT)
    (tmp_path / "w.caffemodel").write_bytes(
        v2_file({"conv": CONV}) + v2_layer("test") + wire.encode_bytes(3, b"extra")
    )
    return tmp_path


def loaded(folder: Path) -> model.Model:
    return model.load(folder / "net.prototxt", folder / "w.caffemodel")


def test_an_untouched_model_is_saved_byte_for_byte(folder: Path) -> None:
    model.save(loaded(folder), folder / "b.prototxt", str(folder / "b.caffemodel"))
    assert (folder / "b.prototxt").read_bytes() == PROTOTXT
    assert (folder / "b.caffemodel").read_bytes() == (folder / "w.caffemodel").read_bytes()


@pytest.mark.parametrize("suffix", [".caffemodel.h5", ".hdf5"])
def test_hdf5_and_back(folder: Path, suffix: str) -> None:
    model.save(loaded(folder), folder / "b.prototxt", folder / f"b{suffix}")
    assert h5py.is_hdf5(folder / f"b{suffix}")
    second = model.load(folder / "b.prototxt", folder / f"b{suffix}")
    model.save(second, folder / "c.prototxt", folder / "c.caffemodel")
    third = weights.load(folder / "c.caffemodel")
    assert not third.is_hdf5 and list(third) == ["conv"] and same(third["conv"], CONV)
    model.save(second, folder / "d.prototxt", folder / f"d{suffix}")
    assert (folder / f"d{suffix}").read_bytes() == (folder / f"b{suffix}").read_bytes()


def test_a_v1_caffemodel_goes_through_hdf5(folder: Path) -> None:
    (folder / "v1.caffemodel").write_bytes(v1_layer("conv", *map(blob, CONV)))
    model.save(
        model.load(folder / "net.prototxt", folder / "v1.caffemodel"), folder / "b.prototxt", folder / "b.h5"
    )
    assert same(weights.load(folder / "b.h5")["conv"], CONV)


def test_the_fingerprint_is_of_both_files(folder: Path) -> None:
    net, stored = ((folder / name).read_bytes() for name in ("net.prototxt", "w.caffemodel"))
    assert loaded(folder).fingerprint == (hashlib.sha256(net).hexdigest(), hashlib.sha256(stored).hexdigest())
    assert model.load(folder / "net.prototxt").fingerprint == (hashlib.sha256(net).hexdigest(), "")
    (folder / "net.prototxt").write_bytes(PROTOTXT + b" ")
    assert loaded(folder).fingerprint[0] == hashlib.sha256(PROTOTXT + b" ").hexdigest()


@pytest.mark.parametrize(
    ("net", "stored"),
    [
        ("net.prototxt", "new.caffemodel"),
        ("new.prototxt", "w.caffemodel"),
        ("w.caffemodel", "new.caffemodel"),
    ],
)
def test_inputs_are_never_overwritten(folder: Path, net: str, stored: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match="is an input"):
        model.save(loaded(folder), folder / net, folder / stored)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_that_cannot_be_written_leave_no_prototxt(folder: Path) -> None:
    (folder / "w.caffemodel").write_bytes(v2_file({"/absolute": CONV}))
    before = sorted(folder.iterdir())
    with pytest.raises(Error, match="HDF5 cannot hold"):
        model.save(loaded(folder), folder / "b.prototxt", folder / "b.h5")
    assert sorted(folder.iterdir()) == before


def test_a_net_alone(folder: Path) -> None:
    alone = model.load(folder / "net.prototxt")
    assert alone.weights is None
    model.save(alone, folder / "b.prototxt")
    assert (folder / "b.prototxt").read_bytes() == PROTOTXT
    with pytest.raises(Error):
        model.save(alone, folder / "c.prototxt", folder / "c.caffemodel")
    assert not (folder / "c.prototxt").exists()


def test_phases_and_states(folder: Path) -> None:
    test = loaded(folder)
    train = model.load(folder / "net.prototxt", phase="TRAIN", stages=("a",), level=2)
    assert [layer.name for layer in test.net.layers] == ["conv", "test"]
    assert [layer.name for layer in train.net.layers] == ["conv"]
    assert train.net.state == NetState("TRAIN", ("a",), 2)
    seen = test.in_state(train.net.state)
    assert [layer.name for layer in seen.net.layers] == ["conv"]
    assert seen.weights is test.weights and seen.fingerprint == test.fingerprint


def test_errors_name_the_file(folder: Path) -> None:
    with pytest.raises(FileError, match=r"none\.prototxt: no such file"):
        model.load(folder / "none.prototxt")
    with pytest.raises(CaffemodelError, match=r"net\.prototxt: no caffemodel"):
        model.load(folder / "net.prototxt", folder / "net.prototxt")
    with pytest.raises(PrototxtError, match=r"w\.caffemodel:2: found the byte"):
        model.load(folder / "w.caffemodel")


def test_a_replaced_layer_is_saved(folder: Path) -> None:
    first = loaded(folder)
    assert first.weights is not None
    changed = replace(
        first, weights=first.weights.replace({"conv": [weights.NewEntry("conv", (CONV[0][:1],))]})
    )
    model.save(changed, folder / "b.prototxt", folder / "b.caffemodel")
    assert same(weights.load(folder / "b.caffemodel")["conv"], (CONV[0][:1],))


@needs_shared
@pytest.mark.parametrize(
    "case", ["v0_net", "v1_net_v2weights", "v2_proto_v1_weights", "net_mini_resnet", "trainval_deploy"]
)
def test_oracle_models_are_saved_byte_for_byte(case: str, tmp_path: Path) -> None:
    source = SHARED / "oracle" / "cases" / case
    found = model.load(source / "net.prototxt", source / "weights.caffemodel")
    model.save(found, tmp_path / "net.prototxt", tmp_path / "w.caffemodel")
    assert (tmp_path / "net.prototxt").read_bytes() == (source / "net.prototxt").read_bytes()
    assert (tmp_path / "w.caffemodel").read_bytes() == (source / "weights.caffemodel").read_bytes()
