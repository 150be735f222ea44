"""The working folder of a fit: what is noted is complete, what is foreign is left alone, what is broken is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from caffe_proto.errors import FileError, PlanError
from lra.stage import Stage

ROOT = Path(__file__).resolve().parents[1]


def filled(folder: Path) -> Stage:
    stage = Stage(folder)
    stage.put("step", "key", {"file": stage.save("numbers", {"a": np.arange(6.0), "b": np.eye(2)})})
    return stage


def test_what_was_put_is_there_for_the_same_key_alone(tmp_path: Path) -> None:
    stage = filled(tmp_path / "work")
    value = {"file": "numbers.npz"}
    assert stage.get("step", "key") == value
    assert stage.get("step", "other key") is None and stage.get("other step", "key") is None
    stage.put("step", "other key", 3)
    assert stage.get("step", "key") is None and stage.get("step", "other key") == 3


def test_resuming_takes_up_table_and_arrays(tmp_path: Path) -> None:
    filled(tmp_path / "work")
    again = Stage(tmp_path / "work", resume=True)
    arrays = again.load(again.get("step", "key")["file"])
    assert list(arrays) == ["a", "b"]
    np.testing.assert_array_equal(arrays["a"], np.arange(6.0))
    np.testing.assert_array_equal(arrays["b"], np.eye(2))


def test_without_resume_everything_starts_anew(tmp_path: Path) -> None:
    filled(tmp_path / "work")
    assert Stage(tmp_path / "work").get("step", "key") is None
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["stage.json"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileError, match="is no folder of an interrupted fit"):
        Stage(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_its_place_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "work").write_text("mine")
    with pytest.raises(FileError, match="is no folder of an interrupted fit"):
        Stage(tmp_path / "work", resume=resume)
    assert (tmp_path / "work").read_text() == "mine"


def test_an_empty_folder_is_taken_over(tmp_path: Path) -> None:
    Stage(tmp_path).put("step", "key", 1)
    assert Stage(tmp_path, resume=True).get("step", "key") == 1


@pytest.mark.parametrize("made", [False, True])
def test_nothing_to_resume(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "work"
    if made:
        folder.mkdir()
    with pytest.raises(PlanError, match="there is no interrupted fit to resume"):
        Stage(folder, resume=True)
    assert folder.exists() is made


@pytest.mark.parametrize(
    "table", [b'{"step": {"key', b"\xff\xfe", b"[]", b"3", b'{"step": 3}', b'{"step": {"key": "key"}}', b""]
)
def test_a_broken_table_is_said_and_kept(tmp_path: Path, table: bytes) -> None:
    filled(tmp_path / "work")
    (tmp_path / "work" / "stage.json").write_bytes(table)
    with pytest.raises(FileError, match=r"stage\.json: cannot be read.*without --resume"):
        Stage(tmp_path / "work", resume=True)
    assert (tmp_path / "work" / "stage.json").read_bytes() == table
    assert filled(tmp_path / "work").get("step", "key")  # without --resume it goes on


@pytest.mark.parametrize("size", [0, 10, 300, -1, None])
def test_a_broken_file_is_said(tmp_path: Path, size: int | None) -> None:
    """Empty, cut, or gone."""
    stage = filled(tmp_path / "work")
    path = tmp_path / "work" / "numbers.npz"
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileError, match=r"numbers\.npz: cannot be read.*without --resume"):
        stage.load("numbers.npz")


def test_the_table_is_replaced_as_a_whole(tmp_path: Path) -> None:
    stage = filled(tmp_path / "work")
    before = (tmp_path / "work" / "stage.json").stat().st_ino
    stage.put("next", "key", 1)
    assert (tmp_path / "work" / "stage.json").stat().st_ino != before
    assert set(json.loads((tmp_path / "work" / "stage.json").read_text())) == {"step", "next"}
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["numbers.npz", "stage.json"]


def test_finish_removes_and_close_leaves_a_given_folder(tmp_path: Path) -> None:
    stage = filled(tmp_path / "work")
    stage.close()
    assert Stage(tmp_path / "work", resume=True).get("step", "key")
    stage.finish()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("end", [Stage.close, Stage.finish])
def test_a_temporary_folder_goes(end: object) -> None:
    stage = Stage()
    stage.put("step", "key", 1)
    assert stage.folder.is_dir()
    assert callable(end)
    end(stage)
    assert not stage.folder.exists()


FULL = """
import resource, sys
import numpy as np
from caffe_proto.errors import FileError
from lra.calibration import keep
from lra.stage import Stage
from caffe_proto.walk import Stack

stage = Stage(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big = np.zeros((4, 5000), np.float32)
def stack():
    Stack(stage.folder / "1.f32", big.shape, in_memory=False).write(0, big)
for write in (
    lambda: stage.save("numbers", {"big": big}),
    lambda: stage.put("step", "key", "x" * 30_000),
    lambda: keep([big], stage),
    stack,
):
    try:
        write()
        print("written")
    except FileError as error:
        print(error)
print(Stage(sys.argv[1], resume=True).get("before", "key"))
"""


def test_a_full_disk_is_said_and_what_was_noted_stays(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    Stage(tmp_path / "work").put("before", "key", 7)
    run = FULL.replace("Stage(sys.argv[1])", "Stage(sys.argv[1], resume=True)", 1)
    done = subprocess.run(
        [sys.executable, "-c", run, str(tmp_path / "work")],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line.split("work", 1)[-1].split(":")[0] for line in lines[:4]] == [
        "/numbers.part.npz", "/stage.json.part", "/images.f32", "/1.f32",
    ]  # fmt: skip
    assert all("cannot be written: File too large" in line for line in lines[:4])
    assert "one layer's activations of 4 images take 0 MiB: free space" in lines[3]
    assert lines[4] == "7"
