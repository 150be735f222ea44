"""Protobuf text format: what is read, with which spans, and what edits leave alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from helpers import SHARED, needs_shared, shared_files
from hypothesis import given
from hypothesis import strategies as st

from caffe_proto import files, schema, text
from caffe_proto.errors import PrototxtError
from caffe_proto.text import Edit, Message, Scalar
from caffe_proto.typed import Typed


def plain(message: Message) -> list[tuple[str, Any]]:
    """Names and values, strings decoded, numbers and names as they stand."""
    return [
        (field.name, plain(field.value) if isinstance(field.value, Message) else field.value.string)
        for field in message.fields
    ]


def read(source: str) -> list[tuple[str, Any]]:
    return plain(text.parse(source).root)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", []),
        ("# only a comment", []),
        ("a: 1", [("a", "1")]),
        ("a:1 b:2", [("a", "1"), ("b", "2")]),
        ("a: 1, b: 2; c: 3", [("a", "1"), ("b", "2"), ("c", "3")]),
        ("a { b: 1 }", [("a", [("b", "1")])]),
        ("a: { b: 1 }", [("a", [("b", "1")])]),
        ("a < b: 1 >", [("a", [("b", "1")])]),
        ("a: < b: 1 >;", [("a", [("b", "1")])]),
        ("a < b { c < > } >", [("a", [("b", [("c", [])])])]),
        ("a{}b{}", [("a", []), ("b", [])]),
        ("a: [1, 2,3]", [("a", "1"), ("a", "2"), ("a", "3")]),
        ("a: []  b: 1", [("b", "1")]),
        ("a: [{b: 1}, <b: 2>]", [("a", [("b", "1")]), ("a", [("b", "2")])]),
        ("a [{b: 1}, {}]", [("a", [("b", "1")]), ("a", [])]),
        ('a: ["x" "y", \'z\']', [("a", "xy"), ("a", "z")]),
        ("a # one\n: # two\n1 # three", [("a", "1")]),
        ('a: "x" # "no"\n  \'y\'', [("a", "xy")]),
        ('a: "# no comment"', [("a", "# no comment")]),
        ("a:\t1\r\nb:\f2\v", [("a", "1"), ("b", "2")]),
        ("\ufeffa: 1", [("a", "1")]),
        ("a: -1 b: - 2 c: -inf", [("a", "-1"), ("b", "-2"), ("c", "-inf")]),
        ("a: 0x1F b: 017 c: 1. d: .5f", [("a", "0x1F"), ("b", "017"), ("c", "1."), ("d", ".5f")]),
        ("a: 1e-3 b: 2.5E+4F c: 1f", [("a", "1e-3"), ("b", "2.5E+4F"), ("c", "1f")]),
        ("[my.ext]: 1 [a.b/c.d] { e: 2 }", [("[my.ext]", "1"), ("[a.b/c.d]", [("e", "2")])]),
        ("a: true b: MAX c: nan", [("a", "true"), ("b", "MAX"), ("c", "nan")]),
    ],
)
def test_reads(source: str, expected: list[tuple[str, Any]]) -> None:
    assert read(source) == expected


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        (r'"\n\t\r\a\b\f\v"', "\n\t\r\a\b\f\v"),
        (r'"\\ \' \" \?"', "\\ ' \" ?"),
        (r'"\101\60\7"', "A0\x07"),
        (r'"\x41\X4a\x9"', "AJ\t"),
        (r'"\303\251"', "é"),
        ('"é"', "é"),
        (r'"\u00e9\U0001F600"', "é\U0001f600"),
        (r"'it\'s'", "it's"),
        ("'a\"b'", 'a"b'),
        (r'"\377"', "\udcff"),
    ],
)
def test_string_escapes(literal: str, expected: str) -> None:
    assert read(f"a: {literal}") == [("a", expected)]


@given(st.text(st.characters(codec="utf-8")))
def test_strings_agree_with_protobuf(value: str) -> None:
    made: Any = schema.message_class("NetParameter")(name=value)
    for as_utf8 in (False, True):
        printed = text_format.MessageToString(made, as_utf8=as_utf8)
        assert read(printed) == [("name", value)]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_quote_is_read_back_by_us_and_by_protobuf(value: str) -> None:
    source = f"name: {text.quote(value)}"
    assert read(source) == [("name", value)]
    assert text_format.Parse(source, schema.message_class("NetParameter")()).name == value  # type: ignore[attr-defined]


_FLOATS = st.floats(width=32, allow_subnormal=False)
_CONVOLUTION = st.fixed_dictionaries(
    {},
    optional={
        "num_output": st.integers(0, 2**32 - 1),
        "bias_term": st.booleans(),
        "kernel_size": st.lists(st.integers(0, 2**32 - 1)),
        "axis": st.integers(-(2**31), 2**31 - 1),
        "engine": st.integers(0, 2),
        "weight_filler": st.fixed_dictionaries({}, optional={"type": st.text(max_size=9), "std": _FLOATS}),
    },
)
_LAYER = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=9),
        "bottom": st.lists(st.text(max_size=9)),
        "loss_weight": st.lists(_FLOATS),
        "convolution_param": _CONVOLUTION,
    },
)


def agrees(typed: Typed, message: Any) -> None:
    """Compare every field that protobuf holds, with its type."""
    assert set(typed) == {field.name for field, _ in message.ListFields()}
    for field, value in message.ListFields():
        ours = typed[field.name]
        if field.message_type is not None and not field.is_repeated:
            agrees(ours, value)
        elif field.enum_type is not None:
            assert ours == field.enum_type.values_by_number[value].name
        elif field.is_repeated and field.cpp_type == field.CPPTYPE_FLOAT:
            assert ours == pytest.approx(list(value), rel=1e-6, nan_ok=True)
        elif field.cpp_type == field.CPPTYPE_FLOAT:
            assert ours == pytest.approx(value, rel=1e-6, nan_ok=True)
        else:
            assert ours == (tuple(value) if field.is_repeated else value)


@given(_LAYER, st.booleans(), st.booleans(), st.booleans())
def test_values_agree_with_protobuf(
    content: dict[str, Any], one_line: bool, short: bool, pointy: bool
) -> None:
    made: Any = schema.message_class("LayerParameter")(**content)
    printed = text_format.MessageToString(
        made, as_one_line=one_line, use_short_repeated_primitives=short, pointy_brackets=pointy
    )
    document = text.parse(printed)
    agrees(Typed(document.root, "LayerParameter", document), made)


_NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True)
_GAPS = st.sampled_from(["", " ", "\t", "\n", "\r\n", ' # note { " \n', "\n  "])
_SPACES = _GAPS.filter(bool)
_SCALARS = st.one_of(
    st.integers().map(str),
    st.floats(allow_subnormal=False, allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["MAX", "true", "-inf", "0x2A", "007", "1.5f", "'a' \"b\"", "- 3"]),
    st.text(st.characters(codec="utf-8")).map(text.quote),
)


def _block(fields: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    inner = st.tuples(_NAMES, _GAPS, st.sampled_from(["", ":"]), _GAPS, st.lists(fields, max_size=3), _GAPS)
    braces = st.sampled_from(["{}", "<>"])
    return st.builds(
        lambda parts, brace: f"{''.join(parts[:4])}{brace[0]}{' '.join(parts[4])}{parts[5]}{brace[1]}",
        inner,
        braces,
    )


_SCALAR_FIELDS = st.builds(lambda name, a, b, value: f"{name}{a}:{b}{value}", _NAMES, _GAPS, _GAPS, _SCALARS)
_LIST_FIELDS = st.builds(
    lambda name, gap, values: f"{name}:{gap}[{', '.join(values)}]",
    _NAMES,
    _GAPS,
    st.lists(_SCALARS, min_size=1, max_size=3),
)
_FIELDS = st.recursive(_SCALAR_FIELDS | _LIST_FIELDS, _block, max_leaves=8)
_SOURCES = st.lists(st.tuples(_FIELDS, st.sampled_from(["", ",", ";"]), _SPACES), max_size=5).map(
    lambda fields: "".join(part for field in fields for part in field)
)


def every_field(message: Message) -> list[text.Field]:
    inner = [
        one
        for field in message.fields
        if isinstance(field.value, Message)
        for one in every_field(field.value)
    ]
    return [*message.fields, *inner]


@given(_SOURCES)
def test_spans_hold_exactly_the_field(source: str) -> None:
    for field in every_field(text.parse(source).root):
        again = text.parse(source[field.start : field.end]).root.fields
        assert {one.name for one in again} == {field.name}
        assert (again[0].start, again[0].end) == (0, field.end - field.start)
        values = [plain(one.value) if isinstance(one.value, Message) else one.value.string for one in again]
        assert (plain(field.value) if isinstance(field.value, Message) else field.value.string) in values
        if isinstance(field.value, Scalar):
            assert field.start < field.value.start < field.value.end <= field.end


@given(_SOURCES, st.data())
def test_an_edit_changes_its_field_and_no_other_character(source: str, data: st.DataObject) -> None:
    assert text.splice(source, []) == source
    fields = text.parse(source).root.fields
    if fields:
        field = data.draw(st.sampled_from(fields))
        edited = text.splice(source, [Edit(field.start, field.end, "new: 1")])
        assert edited == f"{source[: field.start]}new: 1{source[field.end :]}"
        assert ("new", "1") in read(edited)


def test_splice_applies_edits_in_any_order_and_insertions_in_the_order_given() -> None:
    edits = [Edit(4, 5, "E"), Edit(2, 2, "x"), Edit(0, 1, ""), Edit(2, 2, "y")]
    assert text.splice("abcdef", edits) == "bxycdEf"


@pytest.mark.parametrize("edits", [[Edit(0, 3, ""), Edit(2, 4, "")], [Edit(1, 4, ""), Edit(2, 2, "x")]])
def test_splice_refuses_overlaps(edits: list[Edit]) -> None:
    with pytest.raises(ValueError, match="overlap"):
        text.splice("abcdef", edits)


def test_lookups_by_name() -> None:
    root = text.parse('a: "1" b { c: 2 } a: "3" b: 4').root
    assert root.strings("a") == ("1", "3")
    assert root.string("a") == "3"
    assert root.string("z", "none") == "none"
    assert [plain(found) for found in root.messages("b")] == [[("c", "2")]]
    last = root.last("b")
    assert last is not None and isinstance(last.value, Scalar) and last.value.text == "4"
    assert root.last("z") is None


@pytest.mark.parametrize(
    ("source", "line", "cause"),
    [
        ("a: 1\nlayer {\n  b: 2\n\n", 5, "opened on line 2"),
        ("a {\n b <\n c: 1\n", 4, "opened on line 2"),
        ("a: 1\n}\n", 2, "no block is open"),
        ("a {\n b: 1 >", 2, "expected '}'"),
        ('a: 1\nb: "open\nc: 2', 2, "not closed"),
        ("a: 'it\"\n", 1, "not closed"),
        ("a: 1\n\nb c", 3, "after 'b' expected"),
        ("a [1, 2]", 1, "after 'a' expected"),
        ("a:\nb: 1", 2, "expected a field name, found ':'"),
        ("a:1b:2", 1, "unexpected '1b:2'"),
        ("a: [1, 2\nb: 3", 2, "list of 'a'"),
        ("a: [1,]", 1, "expected a value"),
        ("a: [", 1, "the file ends"),
        ("a:", 1, "the file ends"),
        ("[a.b: 1", 1, "extension"),
        ("a: --1", 1, "expected a value"),
        ("a: 08x", 1, "unexpected '08x'"),
        ("a: 1.2.3", 1, "unexpected"),
        ("a: ٣", 1, "unexpected"),
        ("naïve: 1", 1, "unexpected 'ïve:'"),
        ("layer {\n name: {{ name }}\n}", 2, "expected a field name"),
        ("a: 1\n{% for x in y %}", 2, "expected a field name"),
        ("a: ${NUM}", 1, "unexpected"),
        ("<!DOCTYPE html>\n<html>", 1, "expected a field name"),
        ("a: 1\n\0\0", 2, "is this a prototxt"),
        ("\x89PNG\r\n\x1a\n", 1, "is this a prototxt"),
        ("a: 1\n\udcff", 2, "is this a prototxt"),
        ("a {" * 100000, None, "too deeply"),
    ],
)
def test_errors_name_the_line(source: str, line: int | None, cause: str) -> None:
    with pytest.raises(PrototxtError, match=cause) as caught:
        text.parse(source, "net.prototxt")
    assert caught.value.line == line
    assert caught.value.path == "net.prototxt"


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_any_text_is_read_or_refused(source: str) -> None:
    try:
        assert text.splice(source, []) == text.parse(source).text
    except PrototxtError as error:
        assert error.line is not None and 1 <= error.line <= source.count("\n") + 1


@given(_SOURCES, st.data())
def test_lines_are_those_of_the_text(source: str, data: st.DataObject) -> None:
    document = text.parse(source)
    offset = data.draw(st.integers(0, len(source)))
    assert document.line(offset) == source[:offset].count("\n") + 1


@pytest.mark.parametrize(
    ("raw", "expected"),
    [("0", 0), ("12", 12), ("-12", -12), ("0x1f", 31), ("-0XA", -10), ("017", 15), ("-00", 0)],
)
def test_integers(raw: str, expected: int) -> None:
    assert text.integer(raw) == expected


@pytest.mark.parametrize("raw", ["", "-", "08", "0x", "1.0", "five", "--1", "1f"])
def test_no_integers(raw: str) -> None:
    with pytest.raises(ValueError, match="int"):
        text.integer(raw)


_PATTERNS = ("*.prototxt", "*.prototxt_pruning", "*.pt", "*.upgraded")
_REAL = [path for folder in ("oracle/zoo", "published") for path in shared_files(folder, *_PATTERNS)]


@needs_shared
def test_files_of_the_wild_survive_an_empty_edit(tmp_path: Path) -> None:
    assert len(_REAL) > 500
    verdicts = json.loads((SHARED / "oracle" / "zoo" / "zoo.json").read_text())
    for path in _REAL:
        source = files.read_text(path)
        try:
            document = text.parse(source, path)
        except PrototxtError:
            verdict = verdicts[str(path.relative_to(SHARED / "oracle" / "zoo"))]
            assert not verdict["caffe_parses"], path
            continue
        again = text.splice(
            document.text, [Edit(f.start, f.end, source[f.start : f.end]) for f in _apart(document.root)]
        )
        assert files.text_bytes(again) == path.read_bytes(), path


def _apart(message: Message) -> list[text.Field]:
    """The fields of a message, those of one list counted once."""
    return list({(field.start, field.end): field for field in message.fields}.values())
