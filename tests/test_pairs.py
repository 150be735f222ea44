"""A prototxt and a caffemodel that do not belong together: one line says which layers, which shapes, what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED

from caffe_proto.weights import NewEntry, Weights
from lra.cli import main

MODELS = SHARED / "data" / "models"
LENET = Path(__file__).resolve().parents[1] / "models" / "lenet"
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason="no ../shared/data/models with real pairs")


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command says."""
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


@needs_models
def test_weights_that_lack_two_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [
        str(MODELS / "retinaface_mnet_caffe" / f"charrin_mnet.{kind}") for kind in ("prototxt", "caffemodel")
    ]
    for command in (["info", *pair], ["decompose", *pair, "--energy", "0.9", "-o", str(tmp_path / "out")]):
        line = refused(command, capsys)
        assert 'no weights for 2 of the 152 learnt layers: "rf_c3_upsampling_", "rf_c2_upsampling_"' in line
        assert "give the weights that were trained with" in line
    assert list(tmp_path.iterdir()) == []


@needs_models
def test_two_nets_with_each_others_weights(capsys: pytest.CaptureFixture[str]) -> None:
    folder = MODELS / "mtcnn_congweilin"
    line = refused(["info", str(folder / "12net.prototxt"), str(folder / "24net.caffemodel")], capsys)
    assert 'layer "conv1" wants 10 x 3 x 3 x 3 for blob 0, stored is 28 x 3 x 3 x 3' in line
    assert "more:" in line
    line = refused(["info", str(folder / "24net.prototxt"), str(folder / "12net.caffemodel")], capsys)
    assert 'layer "conv1" wants 28 x 3 x 3 x 3 for blob 0, stored is 10 x 3 x 3 x 3' in line


def stored(path: Path, **blobs: tuple[np.ndarray, ...]) -> str:
    """A caffemodel of these layers."""
    with path.open("wb") as file:
        Weights([NewEntry(name, arrays) for name, arrays in blobs.items()]).write_caffemodel(file)
    return str(path)


def test_every_layer_in_trouble_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    weights = stored(
        tmp_path / "w.caffemodel",
        conv1=(zeros(20, 1, 3, 3), zeros(20)),
        conv2=(zeros(50, 20, 5, 5),),
        ip1=(zeros(500, 800), zeros(500)),
        ip2=(zeros(11, 500), zeros(11)),
    )
    line = refused(["info", str(LENET / "lenet.prototxt"), weights], capsys)
    assert 'layer "conv1" wants 20 x 1 x 5 x 5 for blob 0, stored is 20 x 1 x 3 x 3' in line
    assert '(and 2 more: "conv2", "ip2")' in line


def test_no_layer_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = stored(tmp_path / "w.caffemodel", other=(np.zeros((2, 2), np.float32),))
    line = refused(["info", str(LENET / "lenet.prototxt"), weights], capsys)
    assert 'no weights for 4 of the 4 learnt layers: "conv1", "conv2", "ip1", "ip2"' in line
