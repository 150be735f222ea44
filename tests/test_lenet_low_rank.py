"""The low-rank LeNet that is shipped: it is what its commands make, and as accurate as its README says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import caffe_proto as cp
import lra
from lra.digits import drawn

LENET = Path(__file__).resolve().parents[1] / "models" / "lenet"
FOLDER = LENET / "low_rank"
NET, WEIGHTS = FOLDER / "lenet_low_rank.prototxt", FOLDER / "lenet_low_rank.caffemodel"


def test_the_command_of_the_readme_makes_its_net(tmp_path: Path) -> None:
    model = cp.load(LENET / "lenet_train_val.prototxt", LENET / "lenet.caffemodel")
    shapes = {"data": (100, 1, 28, 28), "label": (100,)}
    ranks = json.loads((FOLDER / "ranks.json").read_text())
    plan = lra.make_plan(model, rank_config=ranks, scheme="pca", input_shapes=shapes)
    made, _ = lra.apply(plan, model, input_shapes=shapes)
    cp.save(made, tmp_path / "low.prototxt", tmp_path / "low.caffemodel")
    assert (tmp_path / "low.prototxt").read_text() == (
        FOLDER / "lenet_low_rank_train_val.prototxt"
    ).read_text()
    shipped = cp.load(NET, WEIGHTS).weights
    assert made.weights is not None and shipped is not None
    assert {name: [blob.shape for blob in blobs] for name, blobs in shipped.items()} == {
        name: [blob.shape for blob in blobs] for name, blobs in made.weights.items()
    }


def test_it_reads_digits_as_lenet_does() -> None:
    images, labels = drawn(1000, seed=0)
    said = []
    for net, weights in ((NET, WEIGHTS), (LENET / "lenet.prototxt", LENET / "lenet.caffemodel")):
        with cp.session(cp.load(net, weights), threads=1) as opened:
            said.append(opened.run({"data": images})["prob"].reshape(len(images), -1).argmax(1))
    assert (said[0] == labels).mean() > 0.95
    assert (said[0] == said[1]).mean() > 0.97


def test_the_readme_tells_its_size() -> None:
    cost = cp.cost(cp.load(NET))
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert (cost.macs, cost.params) == (1_218_120, 414_325)
    assert f"{cost.macs:,}" in text and f"{cost.params:,}" in text
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() in text
