"""A prototxt seen as layers: dialects, phases, legacy inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import SHARED, needs_shared, shared_files

from caffe_proto import net, schema
from caffe_proto.errors import Error, FileError, NetError, PrototxtError, UsageError
from caffe_proto.net import Layer, NetState, ParamSpec


def layers(source: str, phase: str = "TEST", stages: tuple[str, ...] = (), level: int = 0) -> list[str]:
    return [layer.name for layer in net.parse(source, "net.prototxt", NetState(phase, stages, level)).layers]


def only(source: str) -> Layer:
    (layer,) = net.parse(source).all_layers
    return layer


# --- dialects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "dialect", "kind"),
    [
        ('layer { name: "c" type: "Convolution" bottom: "a" top: "b" top: "d" }', "V2", "Convolution"),
        ('layers { name: "c" type: CONVOLUTION bottom: "a" top: "b" top: "d" }', "V1", "Convolution"),
        ('layers { layer { name: "c" type: "conv" } bottom: "a" top: "b" top: "d" }', "V0", "conv"),
    ],
)
def test_dialects(source: str, dialect: str, kind: str) -> None:
    text = f'name: "N"\n\n{source}\n'
    parsed = net.parse(text, "x.prototxt")
    (layer,) = parsed.all_layers
    assert (parsed.dialect, parsed.name, parsed.path, parsed.text) == (dialect, "N", "x.prototxt", text)
    assert (layer.name, layer.type, layer.bottoms, layer.tops) == ("c", kind, ("a",), ("b", "d"))
    assert (layer.dialect, layer.line, text[slice(*layer.span)]) == (dialect, 3, source)


BVLC_V1 = [item for item in schema.enum_values("V1LayerParameter.LayerType").items() if item[1] < 1000]


def test_an_empty_net_has_no_layers() -> None:
    empty = net.parse("")
    assert (empty.layers, empty.name, empty.legacy_input, empty.dialect) == ((), "", None, "V2")


def test_every_v1_enumerator_is_known() -> None:
    assert net.V1_TYPES.keys() == dict(BVLC_V1).keys()


V1_UPGRADED = """
    ABSVAL AbsVal ACCURACY Accuracy ARGMAX ArgMax BNLL BNLL CONCAT Concat CONTRASTIVE_LOSS ContrastiveLoss
    CONVOLUTION Convolution DECONVOLUTION Deconvolution DATA Data DROPOUT Dropout DUMMY_DATA DummyData
    EUCLIDEAN_LOSS EuclideanLoss ELTWISE Eltwise EXP Exp FLATTEN Flatten HDF5_DATA HDF5Data HDF5_OUTPUT HDF5Output
    HINGE_LOSS HingeLoss IM2COL Im2col IMAGE_DATA ImageData INFOGAIN_LOSS InfogainLoss INNER_PRODUCT InnerProduct
    LRN LRN MEMORY_DATA MemoryData MULTINOMIAL_LOGISTIC_LOSS MultinomialLogisticLoss MVN MVN POOLING Pooling
    POWER Power RELU ReLU SIGMOID Sigmoid SIGMOID_CROSS_ENTROPY_LOSS SigmoidCrossEntropyLoss SILENCE Silence
    SOFTMAX Softmax SOFTMAX_LOSS SoftmaxWithLoss SPLIT Split SLICE Slice TANH TanH WINDOW_DATA WindowData
    THRESHOLD Threshold
""".split()
V1_TABLE = dict(zip(V1_UPGRADED[::2], V1_UPGRADED[1::2], strict=True))


@pytest.mark.parametrize(("enumerator", "number"), BVLC_V1)
def test_v1_types_are_spelt_as_the_upgrade_spells_them(enumerator: str, number: int) -> None:
    expected = V1_TABLE.get(enumerator, "")
    assert only(f"layers {{ type: {enumerator} }}").type == expected
    assert only(f"layers {{ type: {number} }}").type == expected


def test_unknown_v1_types_stay_as_they_are() -> None:
    assert only("layers { type: CROP }").type == "CROP"
    assert only("layers { type: 12345 }").type == "12345"


def _upgraded_pairs() -> list[Path]:
    return [path.with_suffix("") for path in shared_files("oracle/zoo", "*.upgraded")]


@needs_shared
def test_v1_nets_of_the_wild_have_the_layers_that_caffe_upgrades_them_to() -> None:
    compared = 0
    for path in _upgraded_pairs():
        old = net.load(path)
        if old.dialect != "V1":
            continue
        new = net.load(Path(f"{path}.upgraded"))
        expected = [(x.name, x.type, x.bottoms, x.tops) for x in new.all_layers]
        made = [old.legacy_input, *old.all_layers] if old.legacy_input else old.all_layers
        assert [(x.name, x.type, x.bottoms, x.tops) for x in made] == expected, path
        for ours, theirs in zip(old.all_layers, new.all_layers[-len(old.all_layers) :], strict=True):
            assert ours.param_specs == theirs.param_specs, (path, ours.name)
        compared += 1
    assert compared > 20


@needs_shared
def test_dialects_of_the_wild() -> None:
    verdicts = json.loads((SHARED / "oracle" / "zoo" / "zoo.json").read_text())
    for name, verdict in verdicts.items():
        if (
            verdict.get("dialect") in ("V0", "V1", "V2")
            and verdict["caffe_parses"]
            and verdict["kind"] == "net"
        ):
            found = net.load(SHARED / "oracle" / "zoo" / name)
            assert not found.all_layers or found.dialect == verdict["dialect"], name


# --- refusals -------------------------------------------------------------------------------------


def test_both_kinds_of_blocks_are_refused() -> None:
    mixed = net.parse('layer { name: "a" }\nlayers { name: "b" }', "net.prototxt")
    with pytest.raises(NetError, match=r'^net.prototxt:2: the net mixes "layer" and "layers"'):
        _ = mixed.layers


def test_include_with_exclude_is_refused() -> None:
    with pytest.raises(NetError, match=r'^net.prototxt:2: layer "b": has both include and exclude'):
        layers('layer { name: "a" }\nlayer { name: "b" include { phase: TEST } exclude { phase: TRAIN } }')


def test_a_layer_that_is_no_block_is_refused() -> None:
    with pytest.raises(PrototxtError, match="line 2: layer is no block"):
        _ = net.parse("\nlayer: 3").layers


@needs_shared
@pytest.mark.parametrize("case", ["both_layer_and_layers", "include_and_exclude"])
def test_what_caffe_refuses(case: str) -> None:
    with pytest.raises(NetError):
        _ = net.load(SHARED / "oracle" / "rejects" / case / "net.prototxt").layers


def test_an_unknown_layer_names_the_nearest() -> None:
    parsed = net.parse('layer { name: "conv1_1" } layer { name: "fc" }')
    assert parsed.layer("fc").name == "fc"
    with pytest.raises(NetError, match='no layer "conv1_l"; did you mean "conv1_1"'):
        parsed.layer("conv1_l")
    with pytest.raises(NetError, match="known: conv1_1, fc"):
        parsed.layer("zzz")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        net.load(tmp_path / "none.prototxt")


# --- phases, stages, levels -----------------------------------------------------------------------

#   rules of the layer, phase, stages, level -> there or not
RULES = [
    ("", "TEST", (), 0, True),
    ("include { }", "TRAIN", (), 0, True),
    ("include { phase: TEST }", "TEST", (), 0, True),
    ("include { phase: TEST }", "TRAIN", (), 0, False),
    ("include { phase: 1 }", "TEST", (), 0, True),
    ("include { phase: 0 }", "TEST", (), 0, False),
    ("exclude { }", "TEST", (), 0, False),
    ("exclude { phase: TEST }", "TEST", (), 0, False),
    ("exclude { phase: TEST }", "TRAIN", (), 0, True),
    ("include { phase: TRAIN } include { phase: TEST }", "TEST", (), 0, True),
    ("exclude { phase: TRAIN } exclude { phase: TEST }", "TEST", (), 0, False),
    ("exclude { phase: TRAIN } exclude { stage: 'a' }", "TEST", ("b",), 0, True),
    ("include { stage: 'a' }", "TEST", (), 0, False),
    ("include { stage: 'a' }", "TEST", ("a", "b"), 0, True),
    ("include { stage: 'a' stage: 'b' }", "TEST", ("a",), 0, False),
    ("include { stage: ['a', 'b'] }", "TEST", ("b", "c", "a"), 0, True),
    ("include { stage: 'a' } include { stage: 'b' }", "TEST", ("b",), 0, True),
    ("include { not_stage: 'a' }", "TEST", (), 0, True),
    ("include { not_stage: 'a' not_stage: 'b' }", "TEST", ("b",), 0, False),
    ("include { stage: 'a' not_stage: 'b' }", "TEST", ("a", "b"), 0, False),
    ("include { phase: TEST stage: 'a' }", "TRAIN", ("a",), 0, False),
    ("include { min_level: 1 }", "TEST", (), 0, False),
    ("include { min_level: 1 }", "TEST", (), 1, True),
    ("include { max_level: 1 }", "TEST", (), 1, True),
    ("include { max_level: 1 }", "TEST", (), 2, False),
    ("include { min_level: -2 max_level: 0x2 }", "TEST", (), -2, True),
    ("include { min_level: -2 max_level: 02 }", "TEST", (), -3, False),
    ("exclude { min_level: 2 }", "TEST", (), 2, False),
    ("exclude { min_level: 2 }", "TEST", (), 1, True),
]


@pytest.mark.parametrize(("rules", "phase", "stages", "level", "there"), RULES)
@pytest.mark.parametrize("block", ["layer", "layers"])
def test_rules(block: str, rules: str, phase: str, stages: tuple[str, ...], level: int, there: bool) -> None:
    source = f'{block} {{ name: "x" {rules} }}'
    assert layers(source, phase, stages, level) == (["x"] if there else [])
    assert len(net.parse(source).all_layers) == 1


def test_the_states_own_stages_join_and_its_phase_and_level_do_not() -> None:
    source = """
        state { phase: TRAIN level: 5 stage: "own" }
        layer { name: "both" include { stage: "own" stage: "given" } }
        layer { name: "train" include { phase: TRAIN } }
        layer { name: "five" include { min_level: 5 } }
    """
    assert layers(source, stages=("given",)) == ["both"]


def test_a_level_that_is_no_number_is_refused() -> None:
    with pytest.raises(NetError, match="'high' is no level"):
        layers('layer { name: "x" include { min_level: high } }')


def test_there_are_two_phases() -> None:
    with pytest.raises(UsageError, match='no phase "test"'):
        NetState("test")


@needs_shared
@pytest.mark.parametrize(
    "case", ["trainval_deploy", "trainval_level1", "trainval_level2", "trainval_level3", "trainval_stage_a"]
)
def test_states_give_the_layers_that_caffe_builds(case: str) -> None:
    folder = SHARED / "oracle" / "cases" / case
    state, built = (json.loads((folder / name).read_text()) for name in ("state.json", "io.json"))
    found = net.load(folder / "net.prototxt", NetState("TEST", tuple(state["stages"]), state["level"]))
    tops = {top for layer in found.layers for top in layer.tops}
    assert tops == {blob for blob in built["blobs"] if "_split_" not in blob}


# --- inputs and parameters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names", "shapes"),
    [
        ("input: 'a' input_dim: 1 input_dim: 3 input_dim: 5 input_dim: 7", ("a",), [("1", "3", "5", "7")]),
        ("input: 'a' input_dim: [1, 3, 5, 7]", ("a",), [("1", "3", "5", "7")]),
        ("input: 'a' input_shape { dim: 2 dim: 10 }", ("a",), [("2", "10")]),
        ("input_shape { dim: [2, 3] } input: 'a' input_shape { } input: 'b'", ("a", "b"), [("2", "3"), ()]),
        (
            "input: 'a' input: 'b' input_dim: [1, 2, 3, 4, 5, 6, 7, 8]",
            ("a", "b"),
            [tuple("1234"), tuple("5678")],
        ),
        ("input: 'a' input_shape { dim: 9 } input_dim: [1, 2, 3, 4]", ("a",), [("9",)]),
    ],
)
def test_legacy_inputs(source: str, names: tuple[str, ...], shapes: list[tuple[str, ...]]) -> None:
    made = net.parse(f"\n{source}\nlayers {{ }}").legacy_input
    assert made is not None
    assert (made.name, made.type, made.bottoms, made.tops, made.line) == ("input", "Input", (), names, 2)
    (block,) = made.message.messages("input_param")
    assert made.document.line(block.start) == 2
    assert [shape.strings("dim") for shape in block.messages("shape")] == shapes


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("\ninput: 'a'", 'line 2: input "a" has no shape'),
        ("input: 'a' input_dim: [1, 2, 3, 4, 5, 6]", "6 input_dim"),
    ],
)
def test_legacy_inputs_without_a_shape_are_refused(source: str, cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        _ = net.parse(source).legacy_input


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("layer { }", ()),
        ("layer { param { } }", (ParamSpec(),)),
        (
            'layer { param { lr_mult: 1f decay_mult: .5 } param { name: "w" lr_mult: 0 share_mode: PERMISSIVE } }',
            (ParamSpec("", 1, 0.5), ParamSpec("w", 0, 1, True)),
        ),
        (
            "layers { blobs_lr: 1 blobs_lr: 2 weight_decay: 1 weight_decay: 0 }",
            (ParamSpec("", 1, 1), ParamSpec("", 2, 0)),
        ),
        ("layers { blobs_lr: [1, 2] weight_decay: 3 }", (ParamSpec("", 1, 3), ParamSpec("", 2, 1))),
        (
            "layers { param: 'w' param: 'b' blob_share_mode: STRICT blob_share_mode: PERMISSIVE }",
            (ParamSpec("w"), ParamSpec("b", permissive=True)),
        ),
        (
            "layers { layer { blobs_lr: 1. blobs_lr: 2. weight_decay: 1. weight_decay: 0. } }",
            (ParamSpec("", 1, 1), ParamSpec("", 2, 0)),
        ),
    ],
)
def test_param_specs(source: str, expected: tuple[ParamSpec, ...]) -> None:
    assert only(source).param_specs == expected


def test_a_rate_that_is_no_number_is_refused() -> None:
    with pytest.raises(Error, match="'fast' is no number"):
        _ = only("layer { param { lr_mult: fast } }").param_specs
