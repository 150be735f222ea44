"""Real prototxts of many repositories, in ../shared/oracle/zoo: what real Caffe makes of them, we make of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from helpers import SHARED

from caffe_proto import files, graph, net, text
from caffe_proto.errors import Error, NetError, PrototxtError, UnsupportedError
from caffe_proto.shape_inference import Shaped, infer

ZOO = SHARED / "oracle" / "zoo"

pytestmark = pytest.mark.skipif(not ZOO.is_dir(), reason="no ../shared/oracle/zoo with prototxts of the wild")

Entry = dict[str, Any]

OF_CAFFE = re.compile(r"_split_\d+$|\(automatic\)")  # blobs that real Caffe puts in

# What real Caffe says of a net that it does not build, and what we say then; groups go over.
CAUSES = (
    (
        r"Unknown bottom blob '(.+?)' \(layer '(.+?)',",
        r'layer "{1}": bottom "{0}" is written by no layer above',
    ),
)

# Files that are no text format, and what is said of them.
NO_PROTOTXT = (
    (r"BACKUP_\d+\.prototxt$", "the mark of a merge conflict"),
    (r"protobin", "this is a binary file, try: caffe-lra recover"),
    (r"deploy\.prototxt\.template$", "expected a field name, found '{'"),
    (r"solver\.prototxt\.template$", "after 'mode' expected ':' or '{', found '}'"),
    (r"compress_conv\.prototxt$", "unexpected '100layer'"),
    (r"slove-VGG16", "expected a field name, found '1'"),
    (r"VGG_reduce_300", "after 'z' expected ':' or '{', found 'layer'"),
    (r"SqueezeDet_train_test", "expected a field name, found ':'"),
    (r"rfcn_voc_resnext101", "the file ends inside the block opened on line 2"),
)


def group(entry: Entry) -> str:
    """What zoo.json tells of a file."""
    if entry["kind"] == "solver":
        return "solvers"
    if not entry["caffe_parses"]:
        return "not parsed by BVLC"
    return next(what for key, what in _GROUPS.items() if key in entry)


_GROUPS = {"blobs": "built", "build_error": "refused", "not_built_here": "no verdict"}


@cache
def zoo() -> dict[str, Entry]:
    path = ZOO / "zoo.json"
    found: dict[str, Entry] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def names(*groups: str) -> list[str]:
    return [name for name, entry in zoo().items() if group(entry) in groups]


@cache
def shaped(name: str) -> Shaped | Error:
    """The net with its shapes, or why there are none."""
    try:
        state = net.NetState(zoo()[name].get("phase", "TEST"))
        return infer(graph.build(net.load(ZOO / name, state)))
    except Error as error:
        return error


def lists(shapes: Any) -> list[list[int]]:
    return [list(shape) for shape in shapes]


@pytest.mark.parametrize("name", names("built", "refused", "no verdict"))
def test_dialect(name: str) -> None:
    assert net.load(ZOO / name).dialect == zoo()[name]["dialect"]


@pytest.mark.parametrize("name", names("built"))
def test_shapes_are_those_of_caffe(name: str) -> None:
    found = shaped(name)
    assert isinstance(found, Shaped), found
    wanted = {blob: shape for blob, shape in zoo()[name]["blobs"].items() if not OF_CAFFE.search(blob)}
    told = {blob: list(shape) for blob, shape in found.by_blob().items()}
    for label in memory_labels(found):  # one axis when it is set up, four whenever it runs
        assert told[label] == [*wanted[label], 1, 1, 1]
        told[label] = wanted[label]
    assert told == wanted


def memory_labels(found: Shaped) -> Iterator[str]:
    return (node.layer.tops[1] for node in found.graph.nodes if node.layer.type == "MemoryData")


@pytest.mark.parametrize("name", [name for name in names("built") if "params" in zoo()[name]])
def test_learnt_blobs_are_those_of_caffe(name: str) -> None:
    found = shaped(name)
    assert isinstance(found, Shaped), found
    told = {node.name: lists(found.blobs(index)) for index, node in enumerate(found.graph.nodes)}
    assert {layer: blobs for layer, blobs in told.items() if blobs} == zoo()[name]["params"]


def fitting(caffe: str) -> str | None:
    """Our words for a refusal of real Caffe."""
    for pattern, ours in CAUSES:
        if match := re.search(pattern, caffe):
            return ours.format(*match.groups())
    return None


@pytest.mark.parametrize("name", names("refused"))
def test_refused_for_the_same_cause(name: str) -> None:
    found, caffe = shaped(name), zoo()[name]["build_error"]
    ours = fitting(caffe)
    assert isinstance(found, NetError)
    assert ours is not None and ours in str(found), f"Caffe: {caffe}\nwe: {found}"
    assert found.path is not None and found.line is not None


@pytest.mark.parametrize("name", names("no verdict"))
def test_loads_what_caffe_could_not_judge(name: str) -> None:
    loaded = net.load(ZOO / name)
    assert loaded.layers
    assert is_clear(shaped(name))


def is_clear(found: Shaped | Error) -> bool:
    """Shapes, or a refusal that names the file and the line."""
    if isinstance(found, Shaped):
        return True
    return isinstance(found, NetError) and found.line is not None and "\n" not in str(found)


def no_prototxt(name: str) -> str | None:
    """What must be said of a file that is no text format; None where it is text format."""
    return next((cause for pattern, cause in NO_PROTOTXT if re.search(pattern, name)), None)


@pytest.mark.parametrize("name", names("not parsed by BVLC"))
def test_what_bvlc_cannot_parse_is_kept_and_refused_by_name(name: str) -> None:
    found, cause = shaped(name), no_prototxt(name)
    if isinstance(found, PrototxtError):
        assert cause is not None and cause in str(found), found
        assert found.line is not None
        return
    assert is_clear(found), found
    parsed = net.load(ZOO / name)
    assert files.text_bytes(text.splice(parsed.text, [])) == (ZOO / name).read_bytes()
    if zoo()[name]["dialect"] == "none":
        assert isinstance(found, UnsupportedError) and 'NetParameter has no field "item"' in str(found)
    else:
        assert parsed.dialect == zoo()[name]["dialect"]


@pytest.mark.parametrize("name", names("solvers"))
def test_solvers_are_told_apart(name: str) -> None:
    found = shaped(name)
    cause = no_prototxt(name)
    assert isinstance(found, PrototxtError if cause else NetError)
    assert (cause or "this file sets a solver, it is no net") in str(found)


def outcome(found: Shaped | Error) -> str:
    if isinstance(found, Shaped):
        return "shapes"
    return "no prototxt" if isinstance(found, PrototxtError) else "refused by name"


def test_summary(record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]) -> None:
    """How many files of each group end how; printed even without -s."""
    counts = Counter((group(entry), outcome(shaped(name))) for name, entry in zoo().items())
    told = [f"{group_}: {count} {end}" for (group_, end), count in sorted(counts.items())]
    record_property("zoo", "; ".join(told))
    with capsys.disabled():
        print(f"\nzoo: {len(zoo())} files; {'; '.join(told)}")
    assert counts["built", "shapes"] == len(names("built")) > 150
