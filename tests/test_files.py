"""All or nothing: writing files, and reading them with one-line errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffe_proto import files
from caffe_proto.errors import FileError, UsageError


def listing(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_writes_all(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("old")
    with files.writing([tmp_path / "a", str(tmp_path / "b")]) as (a, b):
        a.write_text("1")
        b.write_text("2")
        assert not (tmp_path / "a").exists()
        assert (tmp_path / "b").read_text() == "old"
    assert listing(tmp_path) == {"a": "1", "b": "2"}


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), FileError("bad")])
def test_keeps_what_stood_there_when_the_block_raises(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), files.writing([tmp_path / "a", tmp_path / "b"]) as (a, b):
        a.write_text("1")
        b.write_text("2")
        raise error
    assert listing(tmp_path) == {"a": "old"}


def test_an_unwritten_file_stops_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with (
        pytest.raises(FileError, match="nothing was written"),
        files.writing([tmp_path / "a", tmp_path / "b"]) as (a, _),
    ):
        a.write_text("1")
    assert listing(tmp_path) == {"a": "old"}


def test_a_folder_made_meanwhile_stops_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileError, match="folder"), files.writing([tmp_path / "a", tmp_path / "b"]) as (a, b):
        a.write_text("1")
        b.write_text("2")
        (tmp_path / "b").mkdir()
    (tmp_path / "b").rmdir()
    assert listing(tmp_path) == {"a": "old"}


def test_an_error_of_the_system_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a: cannot be written: No such file") as caught:  # noqa: SIM117
        with files.writing([tmp_path / "a"]) as (a,):
            (a / "deeper").write_text("1")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("link", ["same", "hard", "symbolic", "spelling"])
def test_refuses_to_overwrite_an_input(tmp_path: Path, link: str) -> None:
    source = tmp_path / "in"
    source.write_text("precious")
    target = tmp_path / "out"
    if link == "same":
        target = source
    elif link == "hard":
        os.link(source, target)
    elif link == "symbolic":
        target.symlink_to(source)
    else:
        (tmp_path / "sub").mkdir()
        target = tmp_path / "sub" / ".." / "in"
    with (
        pytest.raises(UsageError, match="is an input"),
        files.writing([tmp_path / "x", target], [None, source]),
    ):
        pytest.fail("the block was entered")
    assert source.read_text() == "precious"


def test_refuses_the_same_output_twice(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    again = tmp_path / "sub" / ".." / "a"
    with pytest.raises(UsageError, match="twice"), files.writing([tmp_path / "a", again]):
        pytest.fail("the block was entered")


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"), files.writing([tmp_path / "no" / "a"]):
        pytest.fail("the block was entered")
    assert listing(tmp_path) == {}


def test_refuses_a_folder_as_target(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="is a folder"), files.writing([tmp_path / "a"]):
        pytest.fail("the block was entered")


@given(st.binary())
def test_text_keeps_every_byte(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(data)
    assert files.text_bytes(files.read_text(path)) == data


def test_reading_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="none: no such file"):
        files.read_bytes(tmp_path / "none")
    with pytest.raises(FileError, match="is a folder"):
        files.read_text(tmp_path)
