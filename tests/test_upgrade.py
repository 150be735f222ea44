"""Caffe's upgrades of old files: against what its own tools made, and rule by rule on small cases."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from helpers import SHARED, blob, message, needs_shared, shared_files, v0_layer, v1_layer, v2_layer

from caffe_proto import files, graph, load, net, save, schema, text, upgrade, upgrade_weights, weights, wire
from caffe_proto.errors import CaffemodelError, Error, NetError
from caffe_proto.rewrite import Namer
from caffe_proto.upgrade import Upgrade
from lra.cli import main

# --- against Caffe's tools ------------------------------------------------------------------------


def upgraded_files() -> list[Path]:
    """What Caffe's text tools made, nets and solvers."""
    return [
        *shared_files("oracle/cases", "net.upgraded.prototxt"),
        *shared_files("oracle/zoo", "*.upgraded"),
    ]


def source_of(path: Path) -> Path:
    """The file that Caffe's tool read."""
    return path.with_name(path.name.replace(".upgraded", ""))


def read(path: Path) -> text.Document:
    return text.parse(files.read_text(path), path)


def upgraded(document: text.Document) -> Upgrade:
    if upgrade.is_solver(document):
        assert upgrade.upgrade_solver_text(document) == upgrade.upgrade_solver(document).text
        return upgrade.upgrade_solver(document)
    assert upgrade.upgrade_net_text(document) == upgrade.upgrade_net(document).text
    return upgrade.upgrade_net(document)


def as_message(source: str, name: str = "NetParameter") -> Any:
    """A prototxt as protobuf reads it by our schema."""
    made: Any = schema.message_class(name)()
    return text_format.Parse(source, made, descriptor_pool=made.DESCRIPTOR.file.pool)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(SHARED)) for path in paths]


@needs_shared
def test_there_are_oracles() -> None:
    assert len(upgraded_files()) > 200


@pytest.mark.parametrize("name", names(upgraded_files()))
def test_the_message_is_that_of_caffes_tool(name: str) -> None:
    path = SHARED / name
    document = read(source_of(path))
    kind = "SolverParameter" if upgrade.is_solver(document) else "NetParameter"
    made = upgraded(document)
    assert as_message(made.text, kind) == as_message(files.read_text(path), kind)
    assert bool(made.steps) == (made.text != document.text)
    again = upgraded(text.parse(made.text))
    assert (again.text, again.steps) == (made.text, ())


@needs_shared
def test_kinds_of_the_wild() -> None:
    for name, verdict in json.loads((SHARED / "oracle" / "zoo" / "zoo.json").read_text()).items():
        if verdict["caffe_parses"]:
            assert upgrade.is_solver(read(SHARED / "oracle" / "zoo" / name)) == (verdict["kind"] == "solver")


@needs_shared
def test_what_caffe_does_not_upgrade_stays_byte_for_byte() -> None:
    untouched = 0
    for path in upgraded_files():
        document = read(source_of(path))
        kind = "SolverParameter" if upgrade.is_solver(document) else "NetParameter"
        if as_message(document.text, kind) == as_message(files.read_text(path), kind):
            assert upgraded(document).text == document.text
            untouched += 1
    assert untouched > 50


@needs_shared
def test_comments_of_the_wild_stay() -> None:
    """Every comment stays, unless it stands in a padding layer; V1 and V2 files keep their order too."""
    for path in upgraded_files():
        document = read(source_of(path))
        if not upgrade.is_v0(document):
            before, after = _comments(document.text), _comments(upgraded(document).text)
            assert sorted(before) == sorted(after), path


def _comments(source: str) -> list[str]:
    """The comments of a prototxt, those in strings apart."""
    found, position = [], 0
    for match in text._TOKEN.finditer(source):
        position = match.end()
        if match.lastgroup == "skip":
            found += [line.partition("#")[2].strip() for line in match.group().splitlines() if "#" in line]
    assert position == len(source)
    return found


# --- the steps, on small nets ---------------------------------------------------------------------


def steps(source: str) -> tuple[str, tuple[str, ...]]:
    made = upgrade.upgrade_net(text.parse(source, "net.prototxt"))
    again = upgrade.upgrade_net(text.parse(made.text))
    assert (again.text, again.steps) == (made.text, ())
    return made.text, made.steps


V1 = """\
# a net of 2014
name: "old"
layers {
  name: "conv"  # the first
  type: CONVOLUTION
  bottom: "data"
  top: "conv"
  blobs_lr: 1  # weight
  blobs_lr: 2  # bias
  # no decay of the bias
  weight_decay: 1
  weight_decay: 0
  convolution_param { num_output: 4   kernel_size: 3 fork_field: 7 }
  include: { phase: TEST }
}
layers { type: 18; name: "r"; bottom: "conv"; top: "conv"; param: "a"; blob_share_mode: PERMISSIVE }
"""
V1_AS_V2 = """\
# a net of 2014
name: "old"
layer {
  name: "conv"  # the first
  type: "Convolution"
  bottom: "data"
  top: "conv"
  param {
    lr_mult: 1  # weight
    decay_mult: 1
  }
  param {
    lr_mult: 2  # bias
    decay_mult: 0
  }
  # no decay of the bias
  convolution_param { num_output: 4   kernel_size: 3 fork_field: 7 }
  include: { phase: TEST }
}
layer { type: "ReLU"; name: "r"; bottom: "conv"; top: "conv"; param { name: "a" share_mode: PERMISSIVE } }
"""


def test_v1_blocks_are_edited_in_place() -> None:
    assert steps(V1) == (V1_AS_V2, ("V1 -> V2: 2 layers",))


def test_line_ends_and_indentation_are_the_files_own() -> None:
    def other(source: str) -> str:
        return re.sub("^ +", lambda found: "\t" * (len(found[0]) // 2), source, flags=re.M).replace(
            "\n", "\r\n"
        )

    assert steps(other(V1))[0] == other(V1_AS_V2)


def test_settings_of_blobs_given_as_lists() -> None:
    source = 'layers { name: "c" type: 4 blobs_lr: [1, 2] weight_decay: [0.5] }'
    wanted = (
        'layer { name: "c" type: "Convolution" param { lr_mult: 1 decay_mult: 0.5 } param { lr_mult: 2 } }'
    )
    assert steps(source)[0] == wanted


def test_a_list_has_one_comment() -> None:
    made, _ = steps("layers {\n  type: 4\n  blobs_lr: [1, 2]  # both\n}\n")
    assert made.count("# both") == 1


def test_blocks_given_as_a_list() -> None:
    source = 'layers: [ { name: "a" type: SPLIT }, { name: "b" type: NONE } ]'
    assert steps(source)[0] == 'layer: [ { name: "a" type: "Split" }, { name: "b" type: "" } ]'


def test_data_fields_move_to_a_new_transform_param() -> None:
    source = """\
layers {
  name: "d"
  type: DATA
  data_param {
    source: "x"
    scale: 0.5  # half
    mean_file: "m"
  }
}
"""
    wanted = """\
layer {
  name: "d"
  type: "Data"
  data_param {
    source: "x"
  }
  transform_param {
    scale: 0.5  # half
    mean_file: "m"
  }
}
"""
    assert steps(source) == (wanted, ("data fields -> transform_param: 1 layer", "V1 -> V2: 1 layer"))


def test_data_fields_overrule_those_of_an_old_transform_param() -> None:
    source = "layers { type: 24 transform_param { mirror: false } window_data_param { mirror: true crop_size: 3 } }"
    made = as_message(steps(source)[0]).layer[0]
    assert (made.transform_param.mirror, made.transform_param.crop_size) == (True, 3)
    assert made.HasField("window_data_param") and not made.window_data_param.ListFields()


@pytest.mark.parametrize(
    "block",
    ["layers { type: RELU data_param { scale: 2 } }", 'layer { type: "Data" data_param { scale: 2 } }'],
)
def test_only_v1_data_layers_get_a_transform_param(block: str) -> None:
    assert "data_param { scale: 2 }" in steps(block)[0]


INPUT_LAYER = """\
layer {
  name: "input"
  type: "Input"
  top: "a"  # image
  top: "b"
  input_param {
    shape {
      dim: 1
      dim: 2  # two
    }
    shape {
      dim: 3
    }
  }
}
"""


def test_inputs_become_a_layer() -> None:
    source = """\
name: "n"  # mine
input: "a"  # image
input: "b"
input_dim: 9
input_shape {
  dim: 1
  dim: 2  # two
}
input_shape { dim: 3 }
input_shape { dim: 4 }
# below
layer { name: "r" type: "ReLU" bottom: "a" top: "a" }
"""
    wanted = (
        f'name: "n"  # mine\n{INPUT_LAYER}# below\nlayer {{ name: "r" type: "ReLU" bottom: "a" top: "a" }}\n'
    )
    assert steps(source) == (wanted, ("input -> Input layer: 2 tops",))


def test_inputs_behind_the_layers_go_above_them() -> None:
    source = 'layer { name: "r" }\ninput: "a" input_dim: [1, 2, 3, 4]\n'
    made = as_message(steps(source)[0])
    assert [layer.name for layer in made.layer] == ["input", "r"]
    assert list(made.layer[0].input_param.shape[0].dim) == [1, 2, 3, 4]


def test_inputs_without_a_shape_are_dropped() -> None:
    made, told = steps('name: "n"\ninput: "a"\nlayer { name: "r" }\n')
    assert made == 'name: "n"\nlayer { name: "r" }\n'
    assert told == ("input without a shape: dropped, as Caffe does",)


def test_a_shape_without_inputs_is_left_alone() -> None:
    assert steps("input_dim: 3 input_shape { dim: 1 }") == ("input_dim: 3 input_shape { dim: 1 }", ())


def test_three_params_of_batch_norm_get_zeros() -> None:
    source = 'layer { type: "BatchNorm" param { lr_mult: 1 } param { name: "x" } param { } }'
    wanted = (
        'layer { type: "BatchNorm" param { lr_mult: 0 decay_mult: 0 } '
        'param { name: "x" lr_mult: 0 decay_mult: 0 } param { lr_mult: 0 decay_mult: 0 } }'
    )
    assert steps(source) == (wanted, ("BatchNorm param -> lr_mult and decay_mult 0: 1 layer",))


@pytest.mark.parametrize(
    "block",
    [
        'layer { type: "BatchNorm" param { lr_mult: 1 } param { } }',
        'layer { type: "BatchNorm" param { } param { } param { } param { } }',
        'layer { type: "Scale" param { lr_mult: 1 } param { } param { } }',
        'layer { type: "BatchNorm" ' + 3 * "param { lr_mult: 0.0 decay_mult: 0. } " + "}",
    ],
)
def test_other_params_stay(block: str) -> None:
    assert steps(block) == (block, ())


# --- V0 -------------------------------------------------------------------------------------------

V0 = """\
name: "oldest"
input: "data"
input_dim: 1
input_dim: 2
input_dim: 5
input_dim: 5
# three pixels of zeros
layers {
   layer { name: "pad" type: "padding" pad: 3 }
   bottom: "data"
   top: "pad"
}
# the convolution
layers {
   layer {
      name: "conv"  # first
      type: "conv"
      # how many
      num_output: 4
      kernelsize: 3
      weight_filler {
         type: "xavier"  # new then
      }
      pad: 1
      blobs_lr: 1.
      weight_decay: 0
      frobnicate: 3
   }
   bottom: "pad"
   top: "conv"
}
layers { layer { name: "drop" type: "dropout" dropout_ratio: 0.3 stride: 2 } bottom: "conv" top: "conv" }
"""
V0_AS_V2 = """\
name: "oldest"
layer {
   name: "input"
   type: "Input"
   top: "data"
   input_param {
      shape {
         dim: 1
         dim: 2
         dim: 5
         dim: 5
      }
   }
}
# three pixels of zeros
# the convolution
layer {
   name: "conv"  # first
   type: "Convolution"
   bottom: "data"
   top: "conv"
   param {
      lr_mult: 1.
      decay_mult: 0
   }
   convolution_param {
      # how many
      num_output: 4
      kernel_size: 3
      pad: 3
      weight_filler {
         type: "xavier"  # new then
      }
   }
   frobnicate: 3
}
layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" dropout_param { dropout_ratio: 0.3 } }
"""


def test_v0_blocks_are_written_anew() -> None:
    told = (
        "V0 -> V1: 2 layers, 1 padding layer folded",
        'dropped stride of "drop", as Caffe does',
        "V1 -> V2: 2 layers",
        "input -> Input layer: 1 top",
    )
    assert steps(V0) == (V0_AS_V2, told)


V0_NAMES = """
    accuracy Accuracy bnll BNLL concat Concat conv Convolution data Data dropout Dropout
    euclidean_loss EuclideanLoss flatten Flatten hdf5_data HDF5Data hdf5_output HDF5Output im2col Im2col
    images ImageData infogain_loss InfogainLoss innerproduct InnerProduct lrn LRN
    multinomial_logistic_loss MultinomialLogisticLoss pool Pooling relu ReLU sigmoid Sigmoid softmax Softmax
    softmax_loss SoftmaxWithLoss split Split tanh TanH window_data WindowData
""".split()
V0_TYPES = dict(zip(V0_NAMES[::2], V0_NAMES[1::2], strict=True))


@pytest.mark.parametrize(("old", "new"), V0_TYPES.items())
def test_v0_types(old: str, new: str) -> None:
    made, _ = steps(f'layers {{ layer {{ name: "x" type: "{old}" }} top: "x" }}')
    assert made == f'layer {{ name: "x" type: "{new}" top: "x" }}'


V0_FIELDS = [
    ("conv", "biasterm: false group: 2 stride: 3 bias_filler { value: 1 }",
     "convolution_param { bias_term: false group: 2 stride: 3 bias_filler { value: 1 } }"),
    ("innerproduct", "num_output: 3 biasterm: false", "inner_product_param { num_output: 3 bias_term: false }"),
    ("pool", "pool: AVE kernelsize: 3 stride: 2 pad: 1", "pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }"),
    ("lrn", "local_size: 3 alpha: 1 beta: 2 k: 3", "lrn_param { local_size: 3 alpha: 1 beta: 2 k: 3 }"),
    ("concat", "concat_dim: 0", "concat_param { concat_dim: 0 }"),
    ("infogain_loss", 'source: "x"', 'infogain_loss_param { source: "x" }'),
    ("hdf5_data", 'source: "x" batchsize: 2', 'hdf5_data_param { source: "x" batch_size: 2 }'),
    ("data", 'source: "x" batchsize: 2 rand_skip: 3', 'data_param { source: "x" batch_size: 2 rand_skip: 3 }'),
    ("data", 'scale: 2 meanfile: "m" cropsize: 3 mirror: true',
     'transform_param { scale: 2 mean_file: "m" crop_size: 3 mirror: true }'),
    ("relu", "mirror: true", "transform_param { mirror: true }"),
    ("images", "shuffle_images: true new_height: 2 new_width: 3",
     "image_data_param { shuffle: true new_height: 2 new_width: 3 }"),
    ("window_data", 'det_fg_threshold: 1 det_bg_threshold: 2 det_fg_fraction: 3 det_context_pad: 4 det_crop_mode: "w"',
     'window_data_param { fg_threshold: 1 bg_threshold: 2 fg_fraction: 3 context_pad: 4 crop_mode: "w" }'),
    ("hdf5_output", 'hdf5_output_param { file_name: "f" }', 'hdf5_output_param { file_name: "f" }'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "old", "new"), V0_FIELDS)
def test_v0_fields(kind: str, old: str, new: str) -> None:
    made, told = steps(f'layers {{ layer {{ type: "{kind}" {old} }} }}')
    assert made == f'layer {{ type: "{V0_TYPES[kind]}" {new} }}'
    assert not any("dropped" in step for step in told)
    as_message(made)


def test_what_v0_drops() -> None:
    source = """
        state { level: 1 } debug_info: true force_backward: true
        layers { layer { name: "r" type: "relu" num_output: 3 new_num: 2 } include { phase: TEST } top: "r" }
        layers { name: "v1" type: RELU blobs_lr: 1 top: "x" }
    """
    made, told = steps(source)
    assert as_message(made) == as_message(
        'force_backward: true layer { name: "r" type: "ReLU" top: "r" } layer { top: "x" }'
    )
    dropped = {step.split()[1] for step in told if step.startswith("dropped")}
    assert dropped == {
        "num_output",
        "new_num",
        "include",
        "name",
        "type",
        "blobs_lr",
        '"state"',
        '"debug_info"',
    }


def test_one_padding_layer_of_two_readers() -> None:
    pad = 'layers { layer { name: "p" type: "padding" pad: 2 } bottom: "d" top: "p" }'
    readers = "".join(
        f'layers {{ layer {{ name: "{kind}" type: "{kind}" }} bottom: "p" top: "{kind}" }}'
        for kind in ("conv", "pool")
    )
    conv, pool = as_message(steps(f'input: "d" {pad} {readers}')[0]).layer
    assert (list(conv.bottom), list(conv.convolution_param.pad)) == (["d"], [2])
    assert (list(pool.bottom), pool.pooling_param.pad) == (["d"], 2)


def v0(kind: str, name: str, bottoms: str = "", tops: str = "") -> str:
    blobs = "".join(f' bottom: "{one}"' for one in bottoms) + "".join(f' top: "{one}"' for one in tops)
    return f'layers {{ layer {{ name: "{name}" type: "{kind}" }}{blobs} }}\n'


PAD = v0("data", "data", "", "d") + v0("padding", "pad", "d", "p")


@pytest.mark.parametrize(
    ("source", "line", "layer", "cause"),
    [
        (v0("frob", "x"), 1, "x", 'unknown V0 layer type "frob"'),
        (v0("relu", "x", "a"), 1, "x", 'bottom "a" is written by no layer above'),
        (PAD + v0("relu", "x", "p", "p"), 3, "x", 'read by a layer of type "relu"'),
        (PAD + v0("padding", "x", "p", "q"), 3, "x", 'read by a layer of type "padding"'),
        (PAD + v0("conv", "x", "pd", "q"), 3, "x", "a layer of 2 bottoms"),
        (PAD.replace('top: "p"', 'top: "p" top: "q"') + v0("pool", "x", "q", "y"), 3, "x", "1 bottoms and 2 tops"),
    ],
)  # fmt: skip
def test_what_caffe_cannot_upgrade_from_v0(source: str, line: int, layer: str, cause: str) -> None:
    document = text.parse(source, "net.prototxt")
    for make in (upgrade.upgrade_net_text, lambda document: net.Net(document).layers):
        with pytest.raises(NetError, match=cause) as caught:
            make(document)
        assert str(caught.value).startswith(f'net.prototxt:{line}: layer "{layer}": ')


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ('layer { name: "a" }\nlayers { name: "b" }', '^net.prototxt:2: .*mixes "layer" and "layers"'),
        ('\ninput: "a" input: "b" input_dim: 1 input_dim: 2 input_dim: 3 input_dim: 4', "^net.prototxt:2: .*need 8 input_dim, the file has 4"),
        ('input: "a" input: "b" input_shape { dim: 1 }', "2 inputs need 2 input_shape, the file has 1"),
    ],
)  # fmt: skip
def test_refusals(source: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        upgrade.upgrade_net_text(text.parse(source, "net.prototxt"))


# --- solvers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [("SGD", "SGD"), ("NESTEROV", "Nesterov"), ("ADAGRAD", "AdaGrad"), ("RMSPROP", "RMSProp"),
     ("ADADELTA", "AdaDelta"), ("ADAM", "Adam"), ("5", "Adam"), ("0", "SGD")],
)  # fmt: skip
def test_solver_types(old: str, new: str) -> None:
    source = 'net: "x"  # this\nsolver_type: {}  # that\nfork: 1'
    document = text.parse(source.format(old))
    assert upgrade.is_solver(document)
    wanted = source.replace("solver_type: {}", f'type: "{new}"')
    assert upgrade.upgrade_solver(document) == Upgrade(wanted, (f'solver_type -> type: "{new}"',))


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ('net: "x"\nsolver_type: SGD type: "SGD"', "^s.prototxt:2: .*both given"),
        ("base_lr: 1 solver_type: FROB", '"FROB"; SGD, NESTEROV'),
    ],
)
def test_solvers_that_are_refused(source: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        upgrade.upgrade_solver_text(text.parse(source, "s.prototxt"))


# --- V0 nets as nets ------------------------------------------------------------------------------


def test_a_v0_net_is_seen_as_v2() -> None:
    parsed = net.parse(V0, "old.prototxt")
    assert (parsed.text, parsed.dialect, parsed.path) == (V0, "V0", "old.prototxt")
    told = [(x.name, x.type, x.bottoms, x.tops, x.dialect, x.line) for x in parsed.layers]
    lines = V0.splitlines()
    assert told == [
        ("conv", "Convolution", ("data",), ("conv",), "V2", lines.index("# the convolution") + 2),
        ("drop", "Dropout", ("conv",), ("conv",), "V2", len(lines)),
    ]
    assert parsed.legacy_input is not None and parsed.legacy_input.line == 2
    assert [layer.type for layer in parsed.all_layers] == ["padding", "conv", "dropout"]
    assert parsed.upgraded.upgraded is parsed.upgraded


def test_input_shape_is_nothing_to_a_v0_net() -> None:
    """The first upgrade drops it, so Caffe never sees it."""
    legacy = net.parse(f"input_shape {{ dim: 7 }} {V0}").legacy_input
    assert legacy is not None and legacy.document.text.split() == (
        "input_param { shape { dim: 1 dim: 2 dim: 5 dim: 5 } }".split()
    )


def test_errors_in_a_v0_net_name_the_line_of_the_file() -> None:
    node = graph.build(net.parse(V0, "old.prototxt")).nodes[1]
    assert str(node.problem).startswith(
        'old.prototxt:14: layer "conv": LayerParameter has no field "frobnicate"'
    )


def test_saving_a_v0_net_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "old.prototxt").write_text(V0)
    save(load(tmp_path / "old.prototxt"), tmp_path / "new.prototxt")
    assert (tmp_path / "new.prototxt").read_text() == V0


def test_a_v0_model_can_be_decomposed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "old.prototxt").write_text(V0.replace("      frobnicate: 3\n", ""))
    arrays = (rng.standard_normal((4, 2, 3, 3)), rng.standard_normal(4))
    (tmp_path / "old.caffemodel").write_bytes(v0_layer("conv", *(blob(one.astype("<f4")) for one in arrays)))
    arguments = [
        str(tmp_path / "old.prototxt"),
        str(tmp_path / "old.caffemodel"),
        "-o",
        str(tmp_path / "new"),
    ]
    options = ["--scheme", "pca", "--rank-config", str(tmp_path / "ranks.json"), "--even-if-slower"]
    (tmp_path / "ranks.json").write_text('{"conv": 3}')
    assert main(["decompose", *arguments, *options]) == 0
    made = load(tmp_path / "new.prototxt", tmp_path / "new.caffemodel")
    assert made.net.dialect == "V2" and [layer.type for layer in made.net.layers] == ["Convolution"] * 2 + [
        "Dropout"
    ]
    assert made.weights is not None
    assert [one.shape for one in made.weights["conv_lowrank"]] == [(3, 2, 3, 3)]
    stored = message("NetParameter", (tmp_path / "new.caffemodel").read_bytes())
    assert not stored.layers and len(stored.layer) == 2
    assert "conv_lowrank" in Namer.of(made).taken


# --- weights --------------------------------------------------------------------------------------


def upgraded_weights(path: Path) -> tuple[bytes, tuple[str, ...]]:
    made = upgrade_weights.upgrade_weights(weights.load(path))
    file = io.BytesIO()
    made.write(file)
    return file.getvalue(), made.steps


@pytest.mark.parametrize("name", names(shared_files("oracle/cases", "weights.upgraded.caffemodel")))
def test_caffemodels_are_those_of_caffes_tool(name: str) -> None:
    wanted = (SHARED / name).read_bytes()
    made, _ = upgraded_weights(source_of(SHARED / name))
    assert message("NetParameter", made) == message("NetParameter", wanted)


@needs_shared
def test_blobs_of_trained_caffemodels_stay() -> None:
    changed = 0
    for path in shared_files("data/models", "*.caffemodel"):
        made, told = upgraded_weights(path)
        before, after = (message("NetParameter", data) for data in (path.read_bytes(), made))
        assert bool(told) == (made != path.read_bytes())
        stored = [list(layer.blobs) for layer in before.layers or before.layer]
        assert [list(layer.blobs) for layer in after.layer][-len(stored) :] == stored, path
        changed += bool(told)
    assert changed >= 5


def v1_definition(source: str) -> bytes:
    return bytes(as_message(source).SerializeToString())


def test_small_caffemodels(tmp_path: Path) -> None:
    """V1: what an upgrade changes and what it carries over, fields of forks included."""
    fork = wire.encode_bytes(90, b"unknown")
    block = wire.encode_bytes(10, wire.tag(1, 0) + b"\x04" + fork)  # convolution_param
    data = blob(np.arange(6, dtype="<f4").reshape(2, 3))
    layer = v1_definition(
        'layers { name: "c" type: CONVOLUTION blobs_lr: 3 loss_weight: 2 include { phase: TEST } }'
    )
    inner = layer[2:] + block + wire.encode_bytes(6, data)
    path = tmp_path / "w.caffemodel"
    path.write_bytes(
        wire.encode_bytes(1, b"net") + wire.encode_bytes(2, inner) + wire.encode_bytes(77, b"kept")
    )
    made, told = upgraded_weights(path)
    wanted = as_message(
        'name: "net" layer { name: "c" type: "Convolution" param { lr_mult: 3 } loss_weight: 2 include { phase: TEST } }'
    )
    wanted.layer[0].convolution_param.ParseFromString(wire.tag(1, 0) + b"\x04" + fork)
    wanted.layer[0].blobs.add().ParseFromString(data)
    wanted.MergeFromString(wire.encode_bytes(77, b"kept"))
    assert message("NetParameter", made) == wanted
    assert fork in made and data in made and told == ("V1 -> V2: 1 layer",)


def test_fields_that_v2_lacks_are_told_of(tmp_path: Path) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(wire.encode_bytes(2, wire.encode_bytes(4, b"c") + wire.encode_bytes(45, b"x")))
    made, told = upgraded_weights(path)
    assert message("NetParameter", made) == as_message('layer { name: "c" }')
    assert told == ("V1 -> V2: 1 layer", 'dropped field 45 of "c", which V2 does not have')


def test_data_layers_of_caffemodels(tmp_path: Path) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(v1_definition('layers { name: "d" type: DATA data_param { source: "x" scale: 0.1 } }'))
    wanted = 'layer { name: "d" type: "Data" data_param { source: "x" } transform_param { scale: 0.1 } }'
    assert message("NetParameter", upgraded_weights(path)[0]) == as_message(wanted)


def test_data_fields_of_caffemodels_overrule_an_old_transform_param(tmp_path: Path) -> None:
    path = tmp_path / "w.caffemodel"
    source = "layers { type: IMAGE_DATA transform_param { scale: 3 mirror: true } image_data_param { scale: 0.1 } }"
    path.write_bytes(v1_definition(source))
    made = message("NetParameter", upgraded_weights(path)[0]).layer[0].transform_param
    assert (made.scale, made.mirror) == (np.float32(0.1), True)


def test_old_batch_norm_of_caffemodels(tmp_path: Path) -> None:
    untouched = wire.encode_bytes(100, wire.encode_bytes(2, b"X") + wire.encode_bytes(1, b"c"))  # type first
    norm = 'layer { name: "b" type: "BatchNorm" param { } param { } param { } batch_norm_param { eps: 0.5 } }'
    path = tmp_path / "w.caffemodel"
    path.write_bytes(untouched + v1_definition(norm))
    made, _ = upgraded_weights(path)
    assert made.startswith(untouched)
    zeros = norm.replace("param { } ", "param { lr_mult: 0 decay_mult: 0 } ")
    assert message("NetParameter", made).layer[1] == as_message(zeros).layer[0]


def test_v0_caffemodels_lose_their_padding(tmp_path: Path) -> None:
    kernel = blob(np.ones((1, 1, 3, 3), "<f4"))
    data = as_message(PAD + v0("conv", "c", "p", "q"))
    data.layers[2].layer.blobs.add().ParseFromString(kernel)
    data.layers[2].blobs.add().data.append(7)  # beside the inner block: Caffe ignores it
    path = tmp_path / "w.caffemodel"
    path.write_bytes(data.SerializeToString())
    made = message("NetParameter", upgraded_weights(path)[0])
    wanted = as_message(
        'layer { name: "data" type: "Data" top: "d" } '
        'layer { name: "c" type: "Convolution" bottom: "d" top: "q" convolution_param { pad: 0 } }'
    )
    wanted.layer[1].blobs.add().ParseFromString(kernel)
    assert made == wanted


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (v1_layer("a") + v2_layer("b"), 'mixes "layer" and "layers"'),
        (v1_definition(v0("frob", "x")), 'unknown V0 layer type "frob"'),
        (wire.encode_bytes(2, wire.encode_bytes(10, b"\xff")), "damaged"),
    ],
)
def test_caffemodels_that_are_refused(data: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(data)
    with pytest.raises(Error, match=cause) as caught:
        upgraded_weights(path)
    assert isinstance(caught.value, NetError | CaffemodelError) and str(path) in str(caught.value)


# --- the command ----------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(one) for one in arguments])
        return (status, *capsys.readouterr())

    return call


def test_upgrading_a_net(run: Run, tmp_path: Path) -> None:
    old, new = tmp_path / "old.prototxt", tmp_path / "new.prototxt"
    old.write_text(V0)
    status, out, _ = run("upgrade", old, "-o", new)
    assert (status, new.read_text()) == (0, V0_AS_V2)
    assert out.splitlines()[0] == "V0 -> V1: 2 layers, 1 padding layer folded"
    status, out, _ = run("upgrade", new, "-o", tmp_path / "same.prototxt")
    assert (status, out.splitlines()[0]) == (0, "nothing to upgrade")
    assert (tmp_path / "same.prototxt").read_bytes() == new.read_bytes()


def test_upgrading_a_solver(run: Run, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("base_lr: 1\nsolver_type: ADAM\n")
    status, out, _ = run("upgrade", tmp_path / "s", "-o", tmp_path / "t", "--json")
    assert status == 0 and (tmp_path / "t").read_text() == 'base_lr: 1\ntype: "Adam"\n'
    told = {"output": str(tmp_path / "t"), "kind": "solver", "steps": ['solver_type -> type: "Adam"']}
    assert json.loads(out) == told


def test_upgrading_weights(run: Run, tmp_path: Path) -> None:
    data = blob(np.ones((2, 2), "<f4"))
    (tmp_path / "w").write_bytes(v1_layer("c", data))
    status, out, _ = run("upgrade", tmp_path / "w", "-o", tmp_path / "v", "--json")
    assert (status, json.loads(out)["kind"]) == (0, "weights")
    assert message("NetParameter", (tmp_path / "v").read_bytes()).layer[0].name == "c"
    weights.load(tmp_path / "v").write_hdf5(tmp_path / "v.h5")
    status, out, _ = run("upgrade", tmp_path / "v.h5", "-o", tmp_path / "u.h5")
    assert (status, out.splitlines()[0]) == (0, "nothing to upgrade")
    assert (tmp_path / "u.h5").read_bytes() == (tmp_path / "v.h5").read_bytes()


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b'{"json": 1}', "expected a field name"),
        (b'source: "x"', "neither a net nor a solver nor weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x08\x01\x10\x03", "no caffemodel"),
    ],
)
def test_files_that_cannot_be_upgraded(data: bytes, cause: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    status, _, err = run("upgrade", tmp_path / "x", "-o", tmp_path / "y")
    assert status == 2 and cause in err and err.count("\n") == 1
    assert not (tmp_path / "y").exists()


def test_an_input_is_never_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "old").write_text(V1)
    status, _, err = run("upgrade", tmp_path / "old", "-o", tmp_path / "old")
    assert status == 2 and "would be overwritten" in err and (tmp_path / "old").read_text() == V1
    assert "no such file" in run("upgrade", tmp_path / "none", "-o", tmp_path / "new")[2]
