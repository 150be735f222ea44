"""The manners of the program: the first screen, hints, pipes, narrow terminals, completion, interruption."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import click
import nets
import numpy as np
import pytest

from caffe_proto import console, model, tables
from caffe_proto.errors import UsageError, alike, nearest
from lra.cli import cli, main
from lra.cli_welcome import SECTIONS
from lra.stage import Stage

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]
NET, WEIGHTS = "net.prototxt", "net.caffemodel"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """net.prototxt and net.caffemodel, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    nets.files(tmp_path)


def refused(capsys: Capture, *arguments: str) -> str:
    """The one line that a command refuses its input with."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("caffe-lra: error: ") and err.count("\n") == 1
    return err


def commands(group: click.Group = cli, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


# The first screen -----------------------------------------------------------------------------------------------


def test_alone_it_shows_the_way(capsys: Capture) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80
    shown = re.findall(r"^  caffe-lra (\S+)(.*)$", out, re.M)
    assert shown[0][0] == "demo" and {"info", "decompose", "prune", "export"} <= {name for name, _ in shown}
    for name, rest in shown:
        options = {option for param in cli.commands[name].params for option in param.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z]+", rest)) <= options


def test_a_group_alone_shows_its_commands(capsys: Capture) -> None:
    assert main(["data"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and {"mnist", "cifar10", "images", "mean"} <= set(out.split())


def test_every_command_has_its_place_in_the_help(capsys: Capture) -> None:
    placed = [name for section in SECTIONS.values() for name in section]
    assert sorted(placed) == sorted(cli.commands)
    assert main(["-h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in placed:
        assert any(line.split()[:1] == [name] for line in lines), name


def test_every_option_says_what_it_does_and_every_result_comes_as_json() -> None:
    silent = {"demo", "completion"}  # what they print are commands and a script
    for name, command in commands():
        options = [param for param in command.params if isinstance(param, click.Option)]
        missing = [one.opts[-1] for one in options if not one.help and not one.metavar]
        assert missing == [], name
        assert name in silent or "--json" in {option for one in options for option in one.opts}, name


def test_json_holds_no_nan(capsys: Capture) -> None:
    """RFC 8259 has no NaN and no infinities; all else is as it was."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    odd = [float("nan"), np.float64("inf"), (float("-inf"), 1e308)]
    console.echo_json({"a": {"b": odd, "c": "NaN"}, "d": True, "e": None, "f": np.float64(0.1), "g": 2**70})
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    wanted = {"b": [None, None, [None, 1e308]], "c": "NaN"}
    assert found == {"a": wanted, "d": True, "e": None, "f": 0.1, "g": 2**70}


# Hints ----------------------------------------------------------------------------------------------------------


def test_alike() -> None:
    assert alike("cnov1", ["conv1", "pool1", "data"]) == 'did you mean "conv1"?'
    assert alike("xyz", ["conv1"]) is None
    assert nearest("xyz", ["conv1"]) == "known: conv1"
    assert nearest("xyz", [str(i) for i in range(9)]).endswith("6, 7 ...")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["decompse"], "'decompose'"),
        (["data", "mnst"], "'mnist'"),
        (["info", NET, "--enrgy", "1"], "'--energy'"),
        (["decompose", NET, WEIGHTS, "-o", "x", "--scheme", "spatail", "--energy", "0.5"], 'did you mean "spatial"'),
        (["prune", NET, WEIGHTS, "-o", "x", "--criterion", "rnak", "--speedup", "2"], 'did you mean "rank"'),
        (["decompose", NET, WEIGHTS, "-o", "x", "--energy", "0.5", "--except", "conv9"], '"conv3"'),
        (["decompose", NET, WEIGHTS, "-o", "x", "--energy", "0.5", "--only", "cnov1"], '"conv1"'),
        (["decompose", NET, WEIGHTS, "-o", "x", "--rank-config", "ranks.json"], '"conv1"'),
        (["apply", "ranks.json", NET, WEIGHTS, "-o", "x"], '"conv1"'),
        (["prune", NET, WEIGHTS, "-o", "x", "--criterion", "l1", "--speedup", "2", "--only", "cnov1"], '"conv1"'),
        (["run", NET, WEIGHTS, "--input", "x.npy", "-o", "x.npz", "--blobs", "cnov1"], 'did you mean "conv1"'),
        (["run", NET, WEIGHTS, "--input", "dta=x.npy", "-o", "x.npz"], 'did you mean "data"'),
        (["info", NET, "--input-shape", "dta=1,3,12,12"], 'did you mean "data"'),
        (["info", "net.protoxt"], 'net.protoxt: no such file; did you mean "net.prototxt"'),
        (["run", NET, WEIGHTS, "--input", "y.npy", "-o", "x.npz"], 'y.npy: no such file; did you mean "x.npy"'),
    ],
    ids=lambda value: " ".join(value[:2]) + "…" + value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_was_meant(files: None, capsys: Capture, arguments: list[str], hint: str) -> None:
    Path("ranks.json").write_text('{"cnov1": 4}')
    np.save("x.npy", np.zeros((2, 3, 12, 12), np.float32))
    assert hint in refused(capsys, *arguments)


def test_a_choice_that_resembles_none_gets_no_guess(files: None, capsys: Capture) -> None:
    said = refused(capsys, "decompose", NET, WEIGHTS, "-o", "x", "--scheme", "qqq", "--energy", "0.5")
    assert "did you mean" not in said and said.endswith("'asymmetric-3d'; see caffe-lra decompose -h\n")


# Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", WEIGHTS, NET], f"{WEIGHTS}: is no net; NET comes first, then WEIGHTS"),
        (["info", NET, NET], f"{NET}: no caffemodel but text"),
        (["diff", NET, WEIGHTS], f"{WEIGHTS}: is no net; weights stand behind theirs; NET,WEIGHTS"),
        (["time", NET, WEIGHTS], f"{WEIGHTS}: is no net; weights stand behind theirs; NET,WEIGHTS"),
        (["info", "empty"], "empty: has no layer in phase TEST"),
        (["info", "train.prototxt"], "train.prototxt: has no layer in phase TEST"),
        (["upgrade", "empty", "-o", "x"], "empty: holds neither a net nor a solver nor weights"),
        (["run", NET, WEIGHTS, "--input", NET, "-o", "x.npz"], f"{NET}: is no NumPy file; give"),
        (["decompose", NET, WEIGHTS, "-o", "folder/", "--energy", "0.5"], "'folder/' names no files; add a name"),
        (["decompose", NET, WEIGHTS, "-o", "gone/x", "--energy", "0.5"], "there is no folder 'gone'; make it"),
        (["eval", NET, WEIGHTS, "--images", "x.npz", "--reference", NET], "names no weights; give NET,WEIGHTS"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)  # fmt: skip
def test_files_in_each_others_place(files: None, capsys: Capture, arguments: list[str], said: str) -> None:
    Path("empty").touch()
    Path("folder").mkdir()
    Path("train.prototxt").write_text('layer { name: "a" type: "ReLU" include { phase: TRAIN } }')
    np.savez("x.npz", x=np.zeros((2, 3, 12, 12), np.uint8), y=np.zeros(2, int))
    before = sorted(Path().rglob("*"))
    assert said in refused(capsys, *arguments)
    assert sorted(Path().rglob("*")) == before


def test_a_prefix_that_cannot_be_written_is_seen_before_the_work(files: None, capsys: Capture) -> None:
    Path(WEIGHTS).write_bytes(b"")  # had the work begun, this would be what is wrong
    options = ("--energy", "0.5")
    assert "there is no folder 'gone'" in refused(capsys, "decompose", NET, WEIGHTS, "-o", "gone/x", *options)
    Path("x.onnx").mkdir()
    options = (*options, "--onnx")
    assert "x.onnx: is a folder" in refused(capsys, "decompose", NET, WEIGHTS, "-o", "x", *options)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(files: None, capsys: Capture) -> None:
    Path("locked").mkdir(mode=0o500)
    said = refused(capsys, "decompose", NET, WEIGHTS, "-o", "locked/x", "--energy", "0.5")
    assert "no permission in folder 'locked'" in said


def test_paths_with_spaces_commas_and_letters_of_all_kinds(files: None, capsys: Capture) -> None:
    net, weights = shutil.copy(NET, "ä b,c.prototxt"), shutil.copy(WEIGHTS, "w ,ö.caffemodel")
    assert model.net_and_weights(f"{net},{weights}") == (net, weights)
    assert model.net_and_weights(net) == (net, None)
    assert model.net_and_weights("gone,too,far") == ("gone", "too,far")
    with pytest.raises(UsageError, match="weights stand behind theirs"):
        model.net_and_weights(weights)
    assert main(["diff", f"{net},{weights}", f"{NET},{WEIGHTS}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["weights"] for row in rows} == {0.0, None}  # those of all layers that learn were compared
    prefix = "x ,é"
    assert main(["decompose", net, weights, "-o", prefix, "--energy", "0.5"]) == 0
    assert Path(f"{prefix}.caffemodel").is_file() and Path(f"{prefix}.plan.json").is_file()


# Terminals and pipes --------------------------------------------------------------------------------------------


def shown(columns: int, *arguments: str, **environment: str) -> tuple[str, int]:
    """What a command prints on a terminal that wide, and its status."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    }
    own = kept | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environment
    made = subprocess.Popen(
        [sys.executable, "-m", "lra", *arguments], stdout=follower, stderr=follower, env=own
    )
    os.close(follower)
    parts = []
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # closed at the other end
            break
        if not part:
            break
        parts.append(part)
    os.close(leader)
    return b"".join(parts).decode().replace("\r\n", "\n"), made.wait()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_narrow_terminal_shows_every_cell(files: None, capsys: Capture) -> None:
    assert main(["info", NET]) == 0
    wide = capsys.readouterr().out
    out, status = shown(40, "info", NET)
    assert status == 0 and "…" not in out
    assert max(map(len, plain(out).splitlines())) <= 40
    assert (
        re.sub(r"params|MACs|type|layer|output", "", plain(out)).split()
        == re.sub(r"params|MACs|type|layer|output", "", wide).split()
    )
    assert "conv1  Convolution  2 x 16 x 12 x 12\n  params 1,216  MACs 345,600\n" in plain(out)
    thin = plain(shown(26, "info", NET)[0])
    assert "conv1  Convolution\n  2 x 16 x 12 x 12\n  params 1,216\n  MACs 345,600\n" in thin
    assert plain(shown(100, "info", NET)[0]) == wide


def test_a_pipe_has_no_colours_and_no_width(files: None) -> None:
    Path("b.prototxt").write_text(nets.SMALL.replace("num_output: 16", "num_output: 12"))
    command = [sys.executable, "-m", "lra", "diff", NET, "b.prototxt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "30", "TERM": "xterm-256color"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert made.returncode == 1 and "\x1b" not in made.stdout and made.stderr == ""
    assert any(line.startswith("~  conv1  num_output: 16 -> 12") for line in made.stdout.splitlines())
    coloured, status = shown(120, "diff", NET, "b.prototxt")
    assert status == 1 and "\x1b[33m~" in coloured and plain(coloured) == made.stdout
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert shown(120, "diff", NET, "b.prototxt", **environment) == (made.stdout, 1)


def test_table_of_wide_letters(capsys: Capture) -> None:
    tables.table(["name", "n"], [["層", "1"], ["a", "22"]], left=1, total=["total", "23"])
    assert capsys.readouterr().out == "name    n\n層      1\na      22\ntotal  23\n"


@pytest.mark.parametrize("command", [["info", NET], ["info", NET, "--json"], ["diff", NET, "other.prototxt"]])
def test_a_reader_that_goes_is_no_error(files: None, command: list[str]) -> None:
    lines = "".join(
        f'layer {{ name: "more{i}" type: "ReLU" bottom: "prob" top: "more{i}" }}\n' for i in range(1000)
    )
    Path("other.prototxt").write_text(nets.SMALL + lines)
    Path(NET).write_text(nets.SMALL + lines.replace("ReLU", "TanH"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.Popen(
        [sys.executable, "-m", "lra", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert made.stdout is not None and made.stderr is not None
    made.stdout.read(10)
    made.stdout.close()
    assert (made.stderr.read(), made.wait()) == (b"", 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_is_one_line(files: None, options: list[str]) -> None:
    with open("/dev/full", "w") as full:
        made = subprocess.run(
            [sys.executable, "-m", "lra", "info", NET, *options],
            stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert made.returncode == 2
    assert made.stderr == "caffe-lra: error: cannot be written: No space left on device\n"


def test_an_interrupted_command_says_so_and_writes_nothing(files: None) -> None:
    np.savez("x.npz", x=np.zeros((5000, 3, 12, 12), np.uint8))
    made = subprocess.Popen(
        [sys.executable, "-m", "lra", "decompose", NET, WEIGHTS, "-o", "x", "--speedup", "1.5", "--images", "x.npz",
         "--n-images", "5000", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not Stage.resumable("x.fit") and made.poll() is None:
        pass
    made.send_signal(signal.SIGINT)
    out, err = made.communicate(timeout=60)
    assert (made.returncode, out) == (130, "")
    assert [line for line in err.splitlines() if line] == [
        "interrupted; the same command with --resume goes on from here",
        "caffe-lra: interrupted",
    ]
    assert sorted(path.name for path in Path().iterdir()) == [WEIGHTS, NET, "x.fit", "x.npz"]


# Completion -----------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What bash is told for a line that ends in the last word, as type,value lines."""
    made = subprocess.run(
        [sys.executable, "-c", "from lra.cli import main; import sys; sys.exit(main())"],
        capture_output=True, text=True, check=True,
        env=os.environ | {
            "PYTHONPATH": str(ROOT), "_CAFFE_LRA_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(("caffe-lra", *words)), "COMP_CWORD": str(len(words)),
        },
    )  # fmt: skip
    return made.stdout.split()


def test_completion() -> None:
    assert completed("dec") == ["plain,decompose"]
    assert completed("data", "m") == ["plain,mean", "plain,mnist"]
    assert completed("decompose", "a", "b", "--sch") == ["plain,--scheme"]
    assert completed("decompose", "a", "b", "--scheme", "sv") == ["plain,svd"]
    assert completed("info", "mod") == ["file,mod"]
    assert completed("decompose", "a", "b", "--plan", "x") == ["file,x"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_bash(tmp_path: Path, capsys: Capture) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    program = tmp_path / "caffe-lra"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m lra "$@"\n')
    program.chmod(0o755)
    asked = (
        'COMP_WORDS=(caffe-lra dec); COMP_CWORD=1; _caffe_lra_completion caffe-lra; echo "${COMPREPLY[@]}"'
    )
    script.write_text(f"{capsys.readouterr().out}\n{asked}\ncomplete -p caffe-lra\n")
    made = subprocess.run(
        ["bash", "--norc", str(script)], capture_output=True, text=True, check=True,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert made.stdout.splitlines()[0] == "decompose" and "-F _caffe_lra_completion" in made.stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_for_other_shells(capsys: Capture, shell: str) -> None:
    assert main(["completion", shell]) == 0
    assert f"_CAFFE_LRA_COMPLETE={shell}_complete" in capsys.readouterr().out
    assert "'tcsh' is not one of" in refused(capsys, "completion", "tcsh")
