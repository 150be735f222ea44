"""The net that a caffemodel embeds, as a prototxt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from helpers import SHARED, blob, message, v0_layer, v1_layer, v2_file, v2_layer

from caffe_proto import binding, graph, net, recover, schema, weights, wire
from caffe_proto.errors import CaffemodelError
from caffe_proto.shape_inference import infer
from lra.cli import main

MODELS = SHARED / "data" / "models"
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason=f"needs {MODELS}")

# Published net, trained weights; which layers of the published one the weights lack, and the other way round.
PAIRS = [
    ("caffe_v1_everpeace/mnist/lenet_train_test", "lenet_iter_10000", "", ""),
    ("caffe_v1_everpeace/cifar10/cifar10_full_train_test", "cifar10_full_iter_70000", "", ""),
    ("caffe_v1_everpeace/cifar10/cifar10_quick_train_test", "cifar10_quick_iter_5000", "", ""),
    ("cifar_v2_yuvval/cifar10_full_train_test", "cifar10_full_iter_70000", "", ""),
    ("cifar_v2_yuvval/cifar100_quick_train_test", "cifar100_quick_iter_4000", "", ""),
    ("cifar_v2_yuvval/lenet", "lenet_iter_10000", "prob", "mnist loss"),
    ("cifar10_h5_jwcom79/lenet_ip5_train_test", "lenet_ip5_iter_10000", "", ""),
    ("lenet_v2_ethereon/lenet", "lenet_iter_10000", "data prob", "mnist loss"),
    ("lenet_masked/lenet_pruning", "pruning_iter_35000", "", ""),
    ("resnet20_cifar10/res20_cifar_train_test", "ResNet_20", "", ""),
    ("retinaface_mnet_caffe/mnet", "mnet", "", ""),
    ("squeezenet_v1.0_deepcompression_songhan/SqueezeNet_deploy", "decompressed_SqueezeNet", "", ""),
    ("ultralight_face_linzaer/RFB-320", "RFB-320", "", ""),
    ("ultralight_face_linzaer/slim-320", "slim-320", "", ""),
    ("waifu2x_caffe/anime_style_art_rgb", "anime_style_art_rgb_scale2x", "target loss", ""),
    ("waifu2x_caffe/anime_style_art", "anime_style_art_scale2x_inputlayer", "target loss", ""),
    ("waifu2x_caffe/anime_style_art", "anime_style_art_scale2x_inputfield", "input target loss", ""),
    ("waifu2x_caffe/upconv_7", "upconv_7_scale2x", "target loss", ""),
    ("waifu2x_caffe/upresnet10", "upresnet10_noise1_scale2x", "", ""),
]
INPUTS = {  # trained weights -> shapes of what their net is fed
    "lenet_iter_10000": {"data": (2, 1, 28, 28), "label": (2,)},
    "cifar10_full_iter_70000": {"data": (2, 3, 32, 32), "label": (2,)},
    "cifar10_quick_iter_5000": {"data": (2, 3, 32, 32), "label": (2,)},
    "ResNet_20": {"Data1": (2, 3, 28, 28), "Data2": (2,)},
}


def layers(found: net.Net) -> dict[str, tuple[Any, ...]]:
    return {layer.name: (layer.type, layer.bottoms, layer.tops) for layer in found.layers}


@needs_models
@pytest.mark.parametrize(("published", "trained", "missing", "extra"), PAIRS)
def test_trained_nets_are_those_published(published: str, trained: str, missing: str, extra: str) -> None:
    path = (MODELS / published).with_name(trained + ".caffemodel")
    stored = weights.load(path)
    made = recover.recover(stored)
    state = net.NetState("TRAIN")
    old = net.load(f"{MODELS / published}.prototxt", state)
    new = net.parse(made.text, path, state)
    wanted, found = layers(old), layers(new)
    assert wanted.keys() - found.keys() == set(missing.split())
    assert found.keys() - wanted.keys() == set(extra.split())
    common = [name for name in wanted if name in found]
    assert [name for name in found if name in wanted] == common
    assert {name: found[name] for name in common} == {name: wanted[name] for name in common}
    for name in common:
        if wanted[name][0] != "BatchNorm":  # Caffe adds what keeps its statistics from being learnt
            assert new.layer(name).param_specs == old.layer(name).param_specs
    assert (made.layers, made.dialect) == (len(found), stored.dialect.name)
    assert set(stored) <= set(found)


@needs_models
@pytest.mark.parametrize("trained", INPUTS)
def test_learnt_blobs_fit_the_recovered_net(trained: str) -> None:
    for path in MODELS.rglob(f"{trained}.caffemodel"):
        stored = weights.load(path)
        parsed = net.parse(recover.recover(stored).text, path, net.NetState("TRAIN"))
        shaped = infer(graph.build(parsed), INPUTS[trained])
        bound = binding.bind(shaped, stored)
        assert bound is not None and all(
            shaped.blobs(i) for i, node in enumerate(shaped.graph.nodes) if node.name in stored
        )


@needs_models
def test_only_splits_phases_and_defaults_are_left_out() -> None:
    for path in sorted(MODELS.rglob("*.caffemodel")):
        made = recover.recover(weights.load(path))
        theirs = message("NetParameter", path.read_bytes())
        ours: Any = schema.message_class("NetParameter")()
        text_format.Parse(made.text, ours, descriptor_pool=ours.DESCRIPTOR.file.pool)
        renamed: dict[str, str] = {}
        for layer in list(theirs.layer):
            if layer.name in made.splits:
                renamed |= dict.fromkeys(layer.top, layer.bottom[0])
                theirs.layer.remove(layer)
                continue
            layer.bottom[:] = [renamed.get(name, name) for name in layer.bottom]
            layer.ClearField("phase")
            layer.ClearField("blobs")
        for old in theirs.layers:
            old.ClearField("blobs")
        theirs.DiscardUnknownFields()
        assert _plain(ours) == _plain(theirs), path


def _plain(found: Any) -> Any:
    """A message as a tree, defaults taken as given."""
    tree = {}
    for field in found.DESCRIPTOR.fields:
        value = getattr(found, field.name)
        if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
            whole = field.message_type is not None
            if not whole or found.HasField(field.name):
                tree[field.name] = _plain(value) if whole else value
        elif value:
            tree[field.name] = [_plain(one) if field.message_type is not None else one for one in value]
    return tree


# --- small ones -----------------------------------------------------------------------------------

NET = """\
name: "n"
layer {
  name: "data"
  type: "Input"
  top: "data"
  input_param {
    shape {
      dim: 1
      dim: 3
    }
  }
}
layer {
  name: "ip"
  type: "InnerProduct"
  bottom: "data"
  top: "ip"
  loss_weight: 0.5
  param {
    name: "a \\"b\\""
    lr_mult: 2
  }
  include {
    phase: TRAIN
  }
  inner_product_param {
    num_output: 2
    bias_term: false
    weight_filler {
      type: "xavier"
    }
  }
}
layer {
  name: "ip_relu"
  type: "ReLU"
  bottom: "ip"
  top: "ip"
}
"""


def stored(tmp_path: Path, data: bytes) -> weights.Weights:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(data)
    return weights.load(path)


def encoded(source: str) -> Any:
    made: Any = schema.message_class("NetParameter")()
    return text_format.Parse(source, made, descriptor_pool=made.DESCRIPTOR.file.pool)


def test_a_net_comes_back(tmp_path: Path) -> None:
    data = encoded(NET)
    data.layer[1].blobs.add().ParseFromString(blob(np.ones((2, 3), "<f4")))
    for layer in data.layer:
        layer.phase = 0
    made = recover.recover(stored(tmp_path, data.SerializeToString()))
    assert (made.text, made.dialect, made.layers, made.splits) == (NET, "V2", 3, ())


def test_defaults_are_printed_only_where_nothing_else_is(tmp_path: Path) -> None:
    source = (
        'layer { type: "X" param { lr_mult: 1 } pooling_param { pool: MAX pad: 0 stride: 2 } relu_param { } }'
    )
    made = recover.recover(stored(tmp_path, encoded(source).SerializeToString()))
    assert "".join(made.text.split()) == 'layer{type:"X"param{lr_mult:1}pooling_param{stride:2}relu_param{}}'


def test_normalization_is_kept(tmp_path: Path) -> None:
    """At its default it still overrules ``normalize``."""
    source = 'layer { type: "SoftmaxWithLoss" loss_param { normalize: false normalization: VALID } }'
    assert (
        "normalization: VALID" in recover.recover(stored(tmp_path, encoded(source).SerializeToString())).text
    )


SPLIT = """
layer { name: "d" type: "Input" top: "d" top: "e" }
layer { name: "d_d_0_split" type: "Split" bottom: "d" top: "d_d_0_split_0" top: "d_d_0_split_1" }
layer { name: "r" type: "ReLU" bottom: "d_d_0_split_0" top: "r" }
layer { name: "s" type: "ReLU" bottom: "d_d_0_split_1" top: "s" }
"""


def test_split_layers_that_caffe_put_in_are_taken_out(tmp_path: Path) -> None:
    made = recover.recover(stored(tmp_path, encoded(SPLIT).SerializeToString()))
    assert made.splits == ("d_d_0_split",)
    found = net.parse(made.text).layers
    assert [(x.name, x.bottoms) for x in found] == [("d", ()), ("r", ("d",)), ("s", ("d",))]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name: "d_d_0_split"', 'name: "d_x_0_split"'),
        ('top: "d_d_0_split_1"', 'top: "mine"'),
        ('"Split"', '"Slice"'),
    ],
)
def test_other_split_layers_stay(old: str, new: str, tmp_path: Path) -> None:
    source = SPLIT.replace(old, new)
    made = recover.recover(stored(tmp_path, encoded(source).SerializeToString()))
    assert made.splits == () and encoded(made.text) == encoded(source)


def test_splits_of_the_inputs_of_a_net(tmp_path: Path) -> None:
    source = SPLIT.split("\n", 2)[2].replace("d_d_0", "d_input_0")
    made = recover.recover(stored(tmp_path, encoded(f'input: "d" {source}').SerializeToString()))
    assert made.splits == ("d_input_0_split",)
    assert [layer.bottoms for layer in net.parse(made.text).layers] == [("d",), ("d",)]


V1_NET = """\
name: "n"
input: "data"
layers {
  name: "ip"
  type: INNER_PRODUCT
  bottom: "data"
  top: "ip"
  blobs_lr: 1
  blobs_lr: 2
  inner_product_param {
    num_output: 2
  }
}
"""


def test_v1_is_written_as_it_is_stored(tmp_path: Path) -> None:
    data = encoded(V1_NET)
    data.layers[0].blobs.add().ParseFromString(blob(np.ones((2, 3), "<f4")))
    made = recover.recover(stored(tmp_path, data.SerializeToString()))
    assert (made.text, made.dialect) == (V1_NET, "V1")


def test_v0_is_written_as_it_is_stored(tmp_path: Path) -> None:
    data = encoded('layers { layer { name: "c" type: "conv" kernelsize: 3 } bottom: "a" top: "c" }')
    data.layers[0].layer.blobs.add().ParseFromString(blob(np.ones((2, 3), "<f4")))
    made = recover.recover(stored(tmp_path, data.SerializeToString()))
    data.layers[0].layer.ClearField("blobs")
    assert (encoded(made.text), made.dialect, made.layers) == (data, "V0", 1)


def test_unknown_fields_are_told_of_by_number(tmp_path: Path) -> None:
    data = encoded('layer { name: "a" type: "X" convolution_param { num_output: 1 } }')
    data.MergeFromString(wire.encode_bytes(99, b"net"))
    data.layer[0].MergeFromString(wire.encode_bytes(990, b"1") + wire.encode_bytes(990, b"2"))
    data.layer[0].convolution_param.MergeFromString(wire.encode_bytes(98, b"param"))
    made = recover.recover(stored(tmp_path, data.SerializeToString()))
    assert made.text.splitlines() == [
        f"# field 99 of NetParameter, {recover.UNKNOWN}",
        f"# field 990 of LayerParameter, {recover.UNKNOWN}: 2 values",
        "layer {",
        '  name: "a"',
        '  type: "X"',
        f"  # field 98 of ConvolutionParameter, {recover.UNKNOWN}",
        "  convolution_param {",
        "    num_output: 1",
        "  }",
        "}",
    ]


NAMES_ONLY = "a name and blobs only: the file embeds no net definition"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (v1_layer("c", blob(np.ones(2, "<f4"))), NAMES_ONLY),
        (v0_layer("c", blob(np.ones(2, "<f4"))), NAMES_ONLY),
        (v2_layer("a") + wire.encode_bytes(100, wire.encode_bytes(1, b"c")), NAMES_ONLY),
        (
            wire.encode_bytes(2, wire.encode_bytes(4, b"c") + wire.tag(5, 0) + b"\x63"),
            "a type that is not known",
        ),
        (wire.encode_bytes(100, wire.encode_bytes(1, b"c") + wire.encode_bytes(106, b"\xff")), "damaged"),
    ],
)
def test_files_without_a_definition_are_refused(data: bytes, cause: str, tmp_path: Path) -> None:
    with pytest.raises(CaffemodelError, match=cause) as caught:
        recover.recover(stored(tmp_path, data))
    assert cause == "damaged" or 'layer "c"' in str(caught.value)


def test_hdf5_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, v2_file({"c": [np.ones((2, 2), "<f4")]})).write_hdf5(tmp_path / "w.h5")
    with pytest.raises(CaffemodelError, match="HDF5 weight file holds no net definition"):
        recover.recover(weights.load(tmp_path / "w.h5"))


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = encoded(SPLIT)
    data.layer[0].MergeFromString(wire.encode_bytes(990, b"1"))
    (tmp_path / "w").write_bytes(data.SerializeToString())
    arguments = ["recover", str(tmp_path / "w"), "-o", str(tmp_path / "net")]
    assert main(arguments) == 0
    unknown = f"field 990 of LayerParameter, {recover.UNKNOWN}"
    told = ["3 layers, V2", "left out 1 split layers that Caffe put in", unknown, f"wrote {tmp_path / 'net'}"]
    assert capsys.readouterr().out.splitlines() == told
    assert len(net.load(tmp_path / "net").layers) == 3
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": str(tmp_path / "net"),
        "dialect": "V2",
        "layers": 3,
        "splits": ["d_d_0_split"],
        "unknown": [unknown],
    }


def test_the_command_says_how_to_upgrade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w").write_bytes(encoded(V1_NET).SerializeToString())
    assert main(["recover", str(tmp_path / "w"), "-o", str(tmp_path / "net")]) == 0
    assert f"stored as V1: caffe-lra upgrade {tmp_path / 'net'} makes it V2" in capsys.readouterr().out
    assert main(["upgrade", str(tmp_path / "net"), "-o", str(tmp_path / "new")]) == 0
    assert net.load(tmp_path / "new").dialect == "V2"


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w").write_bytes(v1_layer("c", blob(np.ones(2, "<f4"))))
    assert main(["recover", str(tmp_path / "w"), "-o", str(tmp_path / "net")]) == 2
    error = capsys.readouterr().err
    assert NAMES_ONLY in error and error.count("\n") == 1 and not (tmp_path / "net").exists()


@pytest.mark.parametrize("command", ["recover", "upgrade"])
def test_names_that_no_text_can_hold_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = wire.encode_bytes(1, b"\xff\xfe") + wire.encode_bytes(2, b"ReLU") + wire.encode_bytes(4, b"top")
    source = tmp_path / "w.caffemodel"
    source.write_bytes(wire.encode_bytes(100, layer))
    assert main([command, str(source), "-o", str(tmp_path / "out")]) == 2
    assert "net definition is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["w.caffemodel"]


def test_a_forks_block_under_a_number_of_bvlc_is_never_misread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wen's sparsify_param { thre: 0.5 } is field 147, swish_param in BVLC."""
    block = wire.encode_bytes(147, wire.tag(1, wire.FIXED32) + np.float32(0.5).tobytes())
    names = wire.encode_bytes(1, b"sparse") + wire.encode_bytes(2, b"Sparsify") + wire.encode_bytes(4, b"top")
    source = tmp_path / "w.caffemodel"
    source.write_bytes(wire.encode_bytes(100, names + block))
    assert main(["recover", str(source), "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert 'layer "sparse"' in line and "field 147, swish_param in BVLC and another block in a fork" in line
