"""Text messages read by the schema: types, defaults, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers import SHARED, needs_shared

from caffe_proto import net, text, typed
from caffe_proto.errors import NetError, UnsupportedError
from caffe_proto.typed import Typed


def read(source: str, kind: str = "LayerParameter") -> Typed:
    document = text.parse(source)
    return Typed(document.root, kind, document)


def check(source: str, kind: str = "LayerParameter", understood: frozenset[str] = frozenset()) -> None:
    typed.check(read(source, kind), understood)


@pytest.mark.parametrize(
    ("source", "field", "expected"),
    [
        ("", "num_output", 0),
        ("", "bias_term", True),
        ("", "group", 1),
        ("", "axis", 1),
        ("", "kernel_size", ()),
        ("", "engine", "DEFAULT"),
        ("num_output: 20", "num_output", 20),
        ("num_output: 0x14", "num_output", 20),
        ("num_output: 024", "num_output", 20),
        ("num_output: 4294967295", "num_output", 2**32 - 1),
        ("axis: -0X3", "axis", -3),
        ("axis: -2147483648", "axis", -(2**31)),
        ("kernel_size: 3 pad: 1 kernel_size: 5", "kernel_size", (3, 5)),
        ("kernel_size: [3, 0x5]", "kernel_size", (3, 5)),
        ("engine: CUDNN", "engine", "CUDNN"),
        ("engine: 1", "engine", "CAFFE"),
        ("engine: 0x2", "engine", "CUDNN"),
        *[(f"bias_term: {word}", "bias_term", True) for word in ("true", "True", "t", "1")],
        *[(f"bias_term: {word}", "bias_term", False) for word in ("false", "False", "f", "0")],
    ],
)
def test_values_and_defaults(source: str, field: str, expected: Any) -> None:
    value = read(source, "ConvolutionParameter")[field]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("1", 1.0),
        ("-2.5", -2.5),
        ("1e-3", 1e-3),
        (".5f", 0.5),
        ("3F", 3.0),
        ("inf", math.inf),
        ("-Infinity", -math.inf),
    ],
)
def test_floats(raw: str, expected: float) -> None:
    assert read(f"std: {raw}", "FillerParameter")["std"] == expected


def test_nan() -> None:
    assert math.isnan(read("std: nan", "FillerParameter")["std"])


def test_strings_are_decoded_and_joined() -> None:
    layer = read(r"""name: "a\n" 'b' bottom: ["x", "y"] bottom: 'z'""")
    assert layer["name"] == "a\nb"
    assert layer["bottom"] == ("x", "y", "z")


def test_the_last_of_a_singular_field_counts() -> None:
    assert read("num_output: 1 num_output: 2", "ConvolutionParameter")["num_output"] == 2


def test_messages_presence_and_length() -> None:
    layer = read(
        "name: 'c' convolution_param { num_output: 3 weight_filler { std: 2 } } param { } param { lr_mult: 2 }"
    )
    convolution = layer["convolution_param"]
    assert convolution["weight_filler"]["std"] == 2.0
    assert convolution["bias_filler"]["type"] == "constant"
    assert convolution["bias_filler"]["value"] == 0.0
    assert [param["lr_mult"] for param in layer["param"]] == [1.0, 2.0]
    assert "weight_filler" in convolution and "bias_filler" not in convolution and "group" not in convolution
    assert list(layer) == ["name", "convolution_param", "param"] and len(layer) == 3
    empty = layer["pooling_param"]
    assert (list(empty), len(empty), "pool" in empty, empty["pool"], empty.line()) == (
        [],
        0,
        False,
        "MAX",
        None,
    )
    with pytest.raises(KeyError):
        layer["no_such_field"]


def test_lines() -> None:
    layer = read("name: 'c'\n\nconvolution_param {\n  num_output: 3\n}\n")
    assert layer.line("name") == 1
    assert layer["convolution_param"].line() == 3
    assert layer["convolution_param"].line("num_output") == 4
    assert layer["convolution_param"].line("group") == 3


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("num_output: -1", "num_output is uint32"),
        ("num_output: 4294967296", "num_output is uint32"),
        ("num_output: 08", "num_output is uint32"),
        ("num_output: 3.0", "num_output is uint32"),
        ("num_output: 1e3", "num_output is uint32"),
        ("num_output: '3'", "num_output is uint32, not a string"),
        ("num_output: many", "num_output is uint32"),
        ("num_output { }", "num_output is one value of type uint32"),
        ("axis: 2147483648", "axis is int32"),
        ("axis: -2147483649", "axis is int32"),
        ("bias_term: yes", "bias_term is true or false"),
        ("bias_term: 2", "bias_term is true or false"),
        ("bias_term: 'true'", "bias_term is bool, not a string"),
        ("engine: FAST", "engine is DEFAULT or CAFFE or CUDNN or .*"),
        ("engine: 99", "engine is DEFAULT or CAFFE or CUDNN or .*"),
        ("engine: -1", "engine is DEFAULT or CAFFE or CUDNN or .*"),
        ("engine: 'CAFFE'", "engine is ConvolutionParameter.Engine, not a string"),
        ("weight_filler: 3", r"weight_filler is a block \{ ... \}"),
        ("weight_filler { std: wide }", "std is float"),
        ("weight_filler { std: 'inf' }", "std is float, not a string"),
        ("weight_filler { type: constant }", "type is a quoted string"),
        ("kernel_size: [3, x]", "kernel_size is uint32"),
    ],
)
def test_values_of_another_type_are_refused_with_their_line(source: str, cause: str) -> None:
    with pytest.raises(NetError, match=rf"^line 3: found ['\"].*['\"], {cause}$"):
        check(f"\n\n{source}", "ConvolutionParameter")


def test_long_values_are_shown_short() -> None:
    with pytest.raises(NetError) as caught:
        check("num_output: " + "x" * 500, "ConvolutionParameter")
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("name: 'a'\nname: 'b'", 2),
        ("convolution_param { }\nconvolution_param { }", 2),
        ("convolution_param {\n num_output: 1\n\n num_output: 1 }", 4),
        ("convolution_param { num_output: [1,\n 2] }", 1),
    ],
)
def test_a_singular_field_twice_is_refused(source: str, line: int) -> None:
    with pytest.raises(NetError, match=f"^line {line}: .* is given twice"):
        check(source)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("relu_param { slope: 1 }", 'ReLUParameter has no field "slope"; known: negative_slope, engine'),
        ("convolution_param { kernelsize: 3 }", 'has no field "kernelsize"; did you mean "kernel_size"'),
        ("qqqq: 1", 'LayerParameter has no field "qqqq"; known: '),
        ("[my.extension]: 1", "has no field"),
    ],
)
def test_unknown_fields_are_refused_with_a_hint(source: str, cause: str) -> None:
    with pytest.raises(UnsupportedError, match=r"^line 2: ") as caught:
        check(f"\n{source}")
    assert cause in str(caught.value)


def test_fork_fields_are_refused_by_name_unless_understood() -> None:
    info = typed.field_info("PoolingParameter")["ceil_mode"]
    assert info.fork
    source = "pooling_param { pool: MAX ceil_mode: false }"
    with pytest.raises(
        UnsupportedError, match=rf'"ceil_mode" of PoolingParameter is a field of the {info.fork} fork'
    ):
        check(source)
    check(source, understood=frozenset({"ceil_mode"}))


def test_harmless_fork_fields_pass() -> None:
    assert typed.field_info("LayerParameter")["display"].fork
    check("display: true")
    check("param { lr_mult: 1 force_mult: 0.5 }")
    assert typed.is_harmless("LayerParameter", "display")
    assert not typed.is_harmless("PoolingParameter", "ceil_mode")


@needs_shared
@pytest.mark.parametrize(
    "case", ["singular_field_twice", "submessage_twice", "unknown_field", "unknown_param_message"]
)
def test_what_caffe_refuses(case: str) -> None:
    loaded = net.load(SHARED / "oracle" / "rejects" / case / "net.prototxt")
    with pytest.raises(NetError):
        typed.check(Typed(loaded.document.root, "NetParameter", loaded.document))


@needs_shared
def test_nets_that_caffe_takes_pass() -> None:
    nets = sorted((SHARED / "oracle" / "cases").glob("*/net.prototxt"))
    assert len(nets) > 100
    for path in nets:
        loaded = net.load(path)
        typed.check(Typed(loaded.document.root, "NetParameter", loaded.document))
