"""Edited copies of a block: exactly these characters and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffe_proto import text
from caffe_proto.blocks import Block
from caffe_proto.text import Message

Edits = Callable[[Block, Message], None]


def edited(source: str, edits: Edits, prefix: str = "# before\n", suffix: str = "\n# after\n") -> str:
    """The copy of the first block of a file, with edits to the message in it."""
    document = text.parse(f"{prefix}{source}{suffix}")
    (field,) = document.root.fields
    assert isinstance(field.value, Message)
    block = Block(document, field.start, field.end)
    edits(block, field.value)
    return block.text()


def setting(name: str, *values: str, after: tuple[str, ...] = ()) -> Edits:
    return lambda block, message: block.set(message, name, values, after)


def adding(*items: str, after: tuple[str, ...] = ()) -> Edits:
    return lambda block, message: block.add(message, items, after)


def removing(name: str) -> Edits:
    def edits(block: Block, message: Message) -> None:
        for field in message.all(name):
            block.remove(field)

    return edits


def both(*parts: Edits) -> Edits:
    def edits(block: Block, message: Message) -> None:
        for part in parts:
            part(block, message)

    return edits


ONE_LINE = 'l { name: "a" k: 1, k: 2; pad: 0 }'
MANY = 'l {\n  name: "a"  # the name\n  k: 1\n  k: 2;  # two\n  pad: 0\n}'
CRLF = MANY.replace("\n", "\r\n")
TABS = MANY.replace("  ", "\t")
LIST = "l {\n  k: [1, 2],\n  pad: 0\n}"


@pytest.mark.parametrize(
    ("source", "edits", "expected"),
    [
        # one value for one
        (ONE_LINE, setting("name", '"b"'), 'l { name: "b" k: 1, k: 2; pad: 0 }'),
        (MANY, setting("pad", "3"), 'l {\n  name: "a"  # the name\n  k: 1\n  k: 2;  # two\n  pad: 3\n}'),
        (ONE_LINE, setting("k", "7", "8"), 'l { name: "a" k: 7, k: 8; pad: 0 }'),
        (CRLF, setting("k", "7", "8"), CRLF.replace("k: 1", "k: 7").replace("k: 2", "k: 8")),
        ("l{k:1}", setting("k", "2"), "l{k: 2}"),
        ("l < k: 1 >", setting("k", "2"), "l < k: 2 >"),
        # fewer values than there were
        (ONE_LINE, setting("k", "7"), 'l { name: "a" k: 7, pad: 0 }'),
        (MANY, setting("k", "7"), 'l {\n  name: "a"  # the name\n  k: 7\n  pad: 0\n}'),
        (CRLF, setting("k", "7"), 'l {\r\n  name: "a"  # the name\r\n  k: 7\r\n  pad: 0\r\n}'),
        # more values than there were
        (ONE_LINE, setting("k", "7", "8", "9"), 'l { name: "a" k: 7, k: 8; k: 9 pad: 0 }'),
        (
            MANY,
            setting("k", "7", "8", "9"),
            'l {\n  name: "a"  # the name\n  k: 7\n  k: 8;  # two\n  k: 9\n  pad: 0\n}',
        ),
        (
            CRLF,
            setting("k", "7", "8", "9"),
            'l {\r\n  name: "a"  # the name\r\n  k: 7\r\n  k: 8;  # two\r\n  k: 9\r\n  pad: 0\r\n}',
        ),
        (
            TABS,
            setting("k", "7", "8", "9"),
            'l {\n\tname: "a"\t# the name\n\tk: 7\n\tk: 8;\t# two\n\tk: 9\n\tpad: 0\n}',
        ),
        # lists
        (LIST, setting("k", "3"), "l {\n  k: 3,\n  pad: 0\n}"),
        (LIST, setting("k", "3", "4"), "l {\n  k: 3,\n  k: 4\n  pad: 0\n}"),
        (LIST, setting("k"), "l {\n  pad: 0\n}"),
        # none
        (ONE_LINE, setting("k"), 'l { name: "a" pad: 0 }'),
        (ONE_LINE, setting("name"), "l { k: 1, k: 2; pad: 0 }"),
        (ONE_LINE, setting("pad"), 'l { name: "a" k: 1, k: 2; }'),
        (MANY, setting("k"), 'l {\n  name: "a"  # the name\n  pad: 0\n}'),
        (MANY, setting("name"), "l {\n  k: 1\n  k: 2;  # two\n  pad: 0\n}"),
        (CRLF, setting("pad"), 'l {\r\n  name: "a"  # the name\r\n  k: 1\r\n  k: 2;  # two\r\n}'),
        ("l { k: 1 }", setting("k"), "l { }"),
        (MANY, setting("z"), MANY),
        # a field that is not there yet
        (ONE_LINE, setting("z", "9"), 'l { name: "a" k: 1, k: 2; pad: 0 z: 9 }'),
        (ONE_LINE, setting("z", "9", after=("name", "k")), 'l { name: "a" k: 1, k: 2; z: 9 pad: 0 }'),
        (ONE_LINE, setting("z", "8", "9", after=("name",)), 'l { name: "a" z: 8 z: 9 k: 1, k: 2; pad: 0 }'),
        (ONE_LINE, setting("z", "9", after=("nothing",)), 'l { name: "a" k: 1, k: 2; pad: 0 z: 9 }'),
        (
            MANY,
            setting("z", "9"),
            'l {\n  name: "a"  # the name\n  k: 1\n  k: 2;  # two\n  pad: 0\n  z: 9\n}',
        ),
        (
            CRLF,
            setting("z", "8", "9", after=("name",)),
            'l {\r\n  name: "a"  # the name\r\n  z: 8\r\n  z: 9\r\n  k: 1\r\n  k: 2;  # two\r\n  pad: 0\r\n}',
        ),
        ("l { name: 'a' # note\n}", setting("z", "9"), "l { name: 'a' z: 9 # note\n}"),
        ("l {\n  k: 1 }", setting("z", "9"), "l {\n  k: 1 z: 9 }"),
        # added fields
        (
            ONE_LINE,
            adding("p { q: 1 }", "p { }", after=("k",)),
            'l { name: "a" k: 1, k: 2; p { q: 1 } p { } pad: 0 }',
        ),
        (LIST, adding("z: 9", after=("k",)), "l {\n  k: [1, 2],\n  z: 9\n  pad: 0\n}"),
        ("l {\n  m {\n    k: 1\n  }\n}", adding("z: 9"), "l {\n  m {\n    k: 1\n  }\n  z: 9\n}"),
        ("l { }", adding("k: 1"), "l { k: 1 }"),
        ("l {}", adding("k: 1", "k: 2"), "l { k: 1 k: 2 }"),
        ("l {\n}", adding("k: 1", "z: 2"), "l { k: 1 z: 2\n}"),
        # removed fields
        (MANY, removing("k"), 'l {\n  name: "a"  # the name\n  pad: 0\n}'),
        (ONE_LINE, both(removing("name"), removing("pad")), "l { k: 1, k: 2; }"),
        ("l {\n  m {\n    k: 1\n  }\n  n: 2\n}", removing("m"), "l {\n  n: 2\n}"),
        ("l {\n  # about m\n  m: 1\n\n  n: 2\n}", removing("m"), "l {\n  # about m\n\n  n: 2\n}"),
        # what is added beside a removed field takes its place, in either order
        (
            MANY,
            both(setting("pad"), setting("z", "8", "9", after=("pad",))),
            MANY.replace("pad: 0", "z: 8\n  z: 9"),
        ),
        (
            MANY,
            both(setting("z", "8", "9", after=("pad",)), setting("pad")),
            MANY.replace("pad: 0", "z: 8\n  z: 9"),
        ),
        (CRLF, both(setting("pad"), setting("z", "9")), CRLF.replace("pad: 0", "z: 9")),
        (ONE_LINE, both(setting("k"), setting("z", "9", after=("k",))), 'l { name: "a" z: 9 pad: 0 }'),
        ("l { k: 1 }", both(removing("k"), adding("z: 2", "z: 3")), "l { z: 2 z: 3 }"),
        # several at once
        (
            MANY,
            both(setting("name", '"b"'), setting("k", "3"), setting("pad"), adding("y: 1", after=("name",))),
            'l {\n  name: "b"  # the name\n  y: 1\n  k: 3\n}',
        ),
    ],
)
def test_exact_text(source: str, edits: Edits, expected: str) -> None:
    assert edited(source, edits) == expected


def test_the_copy_is_the_block_alone() -> None:
    assert edited(MANY, lambda block, message: None) == MANY
    assert edited("l { k: 1 }", setting("k"), prefix="    ", suffix=" # note") == "l { }"


def test_edits_reach_messages_inside() -> None:
    def edits(block: Block, message: Message) -> None:
        inner = next(message.messages("m"))
        block.set(inner, "k", ["2"])
        block.set(inner, "z", ["3"], after=("k",))
        block.set(message, "name", ['"b"'])

    source = 'l {\n\tname: "a"\n\tm {\n\t\tk: 1 # one\n\t\tpad: 0\n\t}\n}'
    assert edited(source, edits) == 'l {\n\tname: "b"\n\tm {\n\t\tk: 2 # one\n\t\tz: 3\n\t\tpad: 0\n\t}\n}'


_ITEMS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["1", "[2, 3]", '"x # y"']),
        st.sampled_from(["", ",", ";", " ;"]),
        st.sampled_from([" ", "\n  ", "\r\n\t", "  # note\n  "]),
    ),
    max_size=6,
)


@given(
    _ITEMS,
    st.sampled_from(["{}", "<>"]),
    st.dictionaries(st.sampled_from("abz"), st.lists(st.integers(0, 9), max_size=3)),
)
def test_what_is_set_is_read_back_and_the_rest_stays(
    items: list[tuple[str, str, str, str]], braces: str, settings: dict[str, list[int]]
) -> None:
    fields = "".join(f"{name}: {value}{separator}{gap}" for name, value, separator, gap in items)
    source = f"l {braces[0]}\n  {fields}{braces[1]}"

    def edits(block: Block, message: Message) -> None:
        for name, values in settings.items():
            block.set(message, name, [str(value) for value in values], ("a", "b"))

    (again,) = text.parse(edited(source, edits)).root.messages("l")
    (before,) = text.parse(source).root.messages("l")
    for name in ("a", "b", "c", "z"):
        expected = tuple(map(str, settings[name])) if name in settings else before.strings(name)
        assert again.strings(name) == expected
