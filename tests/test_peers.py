"""Several processes that share a fit: the same plan and weights as one, one message where one fails, and none waits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import save
from nets import random_weights

import caffe_proto as cp
from caffe_proto import net
from caffe_proto.model import Model
from caffe_proto.peers import ALONE, Peers, Share
from caffe_proto.weights import NewEntry, Weights
from lra.calibration import Calibration
from lra.digits import drawn
from lra.jobs import pair_job
from lra.responses import Samples
from lra.schemes.spatial import SPATIAL
from lra.stats import Moments
from lra.targets import Spectra, find

ROOT = Path(__file__).resolve().parents[1]
LENET = ROOT / "models" / "lenet"
FILES = [str(LENET / "lenet.prototxt"), str(LENET / "lenet.caffemodel")]
RESIDUAL = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 12 dim: 12 } } }
layer { name: "a" type: "Convolution" bottom: "data" top: "a"
  convolution_param { num_output: 12 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "scale" type: "Scale" bottom: "a" top: "a" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b"
  convolution_param { num_output: 12 kernel_size: 3 pad: 1 group: 2 } }
layer { name: "sum" type: "Eltwise" bottom: "b" bottom: "a" top: "sum" }
layer { name: "relu2" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "c" type: "Convolution" bottom: "sum" top: "c" convolution_param { num_output: 12 kernel_size: 3 } }
layer { name: "pool" type: "Pooling" bottom: "c" top: "pool" pooling_param { pool: AVE global_pooling: true } }
"""


def environment(**more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**known, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def together(folder: Path, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """What became of the same command in two processes, started as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [one.communicate(timeout=240) for one in started]
    finally:
        for one in started:
            one.kill()
    return [
        subprocess.CompletedProcess(command, one.returncode, *spoken)
        for one, spoken in zip(started, said, strict=True)
    ]


def alone(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )


def assert_same_files(folder: Path, one: str, two: str) -> None:
    """The same plan, and weights within 1e-4 of each blob's largest."""
    first, second = (json.loads((folder / f"{name}.plan.json").read_text()) for name in (one, two))
    assert first == second
    left, right = (
        cp.load(folder / f"{name}.prototxt", folder / f"{name}.caffemodel").weights for name in (one, two)
    )
    assert left is not None and right is not None
    assert list(left) == list(right)
    for layer in left:
        for a, b in zip(left[layer], right[layer], strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * float(np.abs(a).max()), err_msg=layer)


def digits(folder: Path, count: int, broken: int) -> str:
    """A list of digits as pictures, one of which is broken."""
    images, labels = drawn(count, 0)
    for i, image in enumerate(images):
        save(folder / f"{i}.png", np.rint(image * 255).astype(np.uint8))
    (folder / f"{broken}.png").write_bytes(b"no picture")
    (folder / "list.txt").write_text("".join(f"{i}.png {label}\n" for i, label in enumerate(labels)))
    return "list.txt"


def residual(folder: Path, rng: np.random.Generator) -> tuple[str, str]:
    """A net with BatchNorm, groups and a shortcut, as files."""
    parsed = net.parse(RESIDUAL)
    entries = list(random_weights(parsed).pieces)
    norm = (rng.standard_normal(12), rng.random(12) + 0.5, np.ones(1))
    blobs = tuple(np.asarray(blob, np.float32) for blob in norm)
    made = [NewEntry("bn", blobs) if one.name == "bn" else one for one in entries]
    paths = str(folder / "net.prototxt"), str(folder / "net.caffemodel")
    cp.save(Model(parsed, Weights(made)), *paths)
    return paths


DECOMPOSE = ("-m", "lra", "decompose", *FILES, "--threads", "1", "--images")


def test_under_torchrun_schemes_ranks_and_weights_are_those_of_one_process(tmp_path: Path) -> None:
    """Errors measured, layers probed, two choices fitted and judged; one picture is left out."""
    pytest.importorskip("torch", reason="torch is an extra")
    options = (*DECOMPOSE, digits(tmp_path, 83, 36), "--skip-bad", "--speedup", "3", "--scope", "conv")
    one = alone(tmp_path, *options, "-o", "one")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    two = alone(tmp_path, *launch, *options, "-o", "two")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert_same_files(tmp_path, "one", "two")
    assert two.stdout == one.stdout.replace("one.", "two.")
    assert two.stderr.count("left out: ") == 1 and "36.png" in two.stderr
    assert not list(tmp_path.glob("two.fit*"))


def test_two_processes_fit_shortcuts_groups_and_batchnorm_as_one(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    rng = np.random.default_rng(3)
    given = residual(tmp_path, rng)
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((45, 3, 12, 12)).astype(np.float32))
    options = ("-m", "lra", "decompose", *given, "--threads", "1", "--images", "x.npz")
    options += ("--scheme", "asymmetric-3d", "--energy", "0.8", "--even-if-slower", "--refit-kept")
    one = alone(tmp_path, *options, "-o", "one")
    first, second = together(tmp_path, *options, "-o", "two")
    assert (one.returncode, first.returncode, second.returncode) == (0, 0, 0), one.stderr + first.stderr
    assert_same_files(tmp_path, "one", "two")
    assert first.stdout == one.stdout.replace("one.", "two.")
    assert second.stdout == second.stderr == ""


@pytest.mark.parametrize("repairs", [("bias",), ("lsq", "bn")])
def test_two_processes_rank_and_repair_as_one(tmp_path: Path, repairs: tuple[str, ...]) -> None:
    """Ranks of all maps, and repairs behind them; --save-ranks says what all saw."""
    pytest.importorskip("torch", reason="torch is an extra")
    rng = np.random.default_rng(3)
    given = residual(tmp_path, rng)
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((45, 3, 12, 12)).astype(np.float32))
    options = ("-m", "lra", "prune", *given, "--threads", "1", "--images", "x.npz", "--speedup", "1.3")
    options += ("--coupled", *(word for repair in repairs for word in ("--repair", repair)))
    one = alone(tmp_path, *options, "-o", "one", "--save-ranks", "one.json")
    first, second = together(tmp_path, *options, "-o", "two", "--save-ranks", "two.json")
    assert (one.returncode, first.returncode, second.returncode) == (0, 0, 0), one.stderr + first.stderr
    assert_same_files(tmp_path, "one", "two")
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    assert first.stdout == one.stdout.replace("one.", "two.")
    assert second.stdout == second.stderr == ""


def test_a_broken_picture_in_one_share_ends_all_with_one_message(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    options = (*DECOMPOSE, digits(tmp_path, 20, 13), "--speedup", "3", "-o", "out")
    first, second = together(tmp_path, *options)
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert first.stderr.count("\n") == 1 and "13.png" in first.stderr
    assert second.stderr == second.stdout == first.stdout == ""
    assert not list(tmp_path.glob("out*"))


def test_what_the_first_cannot_write_ends_all(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    images, _ = drawn(8, 0)
    np.savez(tmp_path / "x.npz", x=images)
    (tmp_path / "out.prototxt").mkdir()
    options = ("--scheme", "spatial", "--ranks", "4,8", "-o", "out")
    first, second = together(tmp_path, *DECOMPOSE, "x.npz", *options)
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert "out.prototxt: is a folder, a file was to be written" in first.stderr
    assert second.stderr == ""
    assert [path.name for path in tmp_path.glob("out*")] == ["out.prototxt"]


@pytest.mark.parametrize(
    ("command", "options", "cause"),
    [
        ("decompose", ["--images", "x.npz", "--n-images", "1"], "1 image is too little for 2 processes"),
        ("decompose", ["--images", "x.npz", "--resume"], "--resume does not go with several processes"),
        ("decompose", ["--images", "x.npz", "--polish"], "--polish does not go with several processes"),
        ("decompose", ["--images", "x.npz", "--report"], "--report does not go with several processes"),
        ("decompose", ["--images", "x.npz", "--cost", "latency"], "--cost latency does not go with several"),
        ("decompose", [], "there is no work for 2 processes"),
        ("prune", ["--images", "x.npz", "--compare"], "--compare does not go with several processes"),
        ("prune", ["--criterion", "l1"], "there is no work for 2 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_the_first(
    tmp_path: Path, command: str, options: list[str], cause: str
) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    np.savez(tmp_path / "x.npz", x=drawn(8, 0)[0])
    first, second = together(tmp_path, "-m", "lra", command, *FILES, "--speedup", "2", "-o", "out", *options)
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert cause in first.stderr and first.stderr.count("\n") == 1
    assert second.stderr == ""
    assert not list(tmp_path.glob("out*"))


def test_other_commands_are_refused_in_several_processes(tmp_path: Path) -> None:
    first, second = together(tmp_path, "-m", "lra", "info", FILES[0])
    assert first.returncode == 2 and first.stdout == ""
    assert first.stderr.startswith("caffe-lra: error: info does not work in several processes")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


FAILING = """
import os, sys
import click
from caffe_proto import console
from caffe_proto.errors import UsageError
from caffe_proto.peers import joined

@click.command()
def work():
    with joined() as peers:
        assert peers.sum(peers.rank + 1) == 3
        assert peers.told(lambda: [peers.rank]) == [0]
        if peers.rank == {rank}:
            {fails}
        {after}

group = click.Group(commands={{"work": work}})
sys.exit(console.run(group, ["work"]))
"""
WAITING = "peers.sum(1)"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("after", [WAITING, "pass"])
def test_an_error_in_one_process_is_said_once(tmp_path: Path, rank: int, after: str) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    script = FAILING.format(rank=rank, fails='raise UsageError("it is so")', after=after)
    first, second = together(tmp_path, "-c", script)
    assert (first.returncode, first.stderr) == (2, "caffe-lra: error: it is so\n")
    assert (second.returncode, second.stderr) == (2, "")


def test_a_bug_in_one_process_ends_all(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    script = FAILING.format(rank=1, fails='raise KeyError("lost")', after=WAITING)
    first, second = together(tmp_path, "-c", script)
    assert first.returncode == 2 and "process 1 has failed: KeyError: 'lost'" in first.stderr
    assert second.returncode == 70 and "Traceback" in second.stderr


def test_a_process_that_is_gone_ends_all(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is an extra")
    first, second = together(tmp_path, "-c", FAILING.format(rank=1, fails="os._exit(9)", after=WAITING))
    assert second.returncode == 9
    assert first.returncode == 2 and "another process is gone" in first.stderr


def test_one_process_needs_no_torch(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=drawn(8, 0)[0])
    script = "import sys; from lra.cli import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    options = ("--scheme", "spatial", "--ranks", "4,8", "-o", "out", "--images", "x.npz")
    done = alone(tmp_path, "-c", script, "decompose", *FILES, *options)
    assert done.returncode == 0, done.stderr


# Shares, in threads -------------------------------------------------------------------------------------------


def in_threads(world: int, work: Callable[[Peers], Any]) -> list[Any]:
    """What each of several processes, here threads, comes to."""
    board: list[Any] = [None] * world
    barrier = threading.Barrier(world, timeout=60)
    made: list[Any] = [None] * world

    def run(rank: int) -> None:
        def exchange(value: Any) -> list[Any]:
            board[rank] = value
            barrier.wait()
            found = list(board)
            barrier.wait()
            return found

        def collect(array: np.ndarray, take: Callable[[int, np.ndarray], None]) -> None:
            for source, part in enumerate(exchange(array)):
                if rank == 0:
                    take(source, part)

        made[rank] = work(Peers(rank, world, exchange, collect))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return made


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("lost", [(), (0, 5), (3, 6, 9)])
def test_rows_of_all_shares_come_in_the_order_of_the_items(lost: tuple[int, ...], each: int) -> None:
    """Items 0..10 dealt to three processes, which could not read some; every item has rows of its own."""
    read = [item for item in range(11) if item not in lost]
    table = np.arange(len(read) * each * 2.0).reshape(-1, 2)

    def work(peers: Peers) -> tuple[np.ndarray, np.ndarray, list[int], np.ndarray]:
        own = [item for item in range(peers.rank, 11, peers.world) if item not in lost]
        share = Share.of(peers, np.array(own))
        rows = table[share.rows(len(table))]
        here, part = share.part(2, 6)
        some = part.gathered(rows.reshape(-1, each, 2)[here].reshape(-1, 2))
        return share.gathered(rows), some, [read[number] for number in share.numbers], np.array(own)

    found = in_threads(3, work)
    np.testing.assert_array_equal(found[0][0], table)
    np.testing.assert_array_equal(found[0][1], table[2 * each : 6 * each])
    for _, _, numbered, own in found:
        assert numbered == own.tolist()


def test_what_is_measured_of_shares_is_measured_of_all(tmp_path: Path) -> None:
    """Responses, moments and the harm of probes, over 23 images dealt to three processes."""
    rng = np.random.default_rng(3)
    found = find(cp.load(*residual(tmp_path, rng)))
    images = rng.standard_normal((23, 3, 12, 12)).astype(np.float32)
    targets = list(found.targets.values())
    spectra = Spectra(found)
    work = [pair_job(target, spectra.get(target, SPATIAL).factor(8)) for target in targets]
    probes = {target.name: [spectra.get(target, SPATIAL).factor(2)] for target in targets}

    def measured(peers: Peers) -> tuple[dict[str, Samples], dict[str, Moments], list[dict[str, list[float]]]]:
        own = np.arange(peers.rank, 23, peers.world)
        calibration = Calibration(
            {"data": images[own]}, 7, threads=1, share=None if peers.world == 1 else Share.of(peers, own)
        )
        walker = calibration.walker(found)
        samples = walker.sample(targets, calibration.stage, "", lambda _images: None)
        moments = walker.moments(work, samples, lambda _images: None)
        errors = [
            one.output_errors(probes, targets, lambda _images: None) for one in (walker, walker.last(2))
        ]
        return samples, moments, errors

    wanted, made = measured(ALONE), in_threads(3, measured)
    for samples, _, errors in made:
        for mine, theirs in zip(errors, wanted[2], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(mine[name] == pytest.approx(theirs[name], rel=1e-5) for name in mine)
        for name, one in samples.items():
            np.testing.assert_allclose(one.responses, wanted[0][name].responses, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(one.places.rows, wanted[0][name].places.rows)
    for name, moments in made[0][1].items():
        assert moments.count == wanted[1][name].count
        np.testing.assert_allclose(moments.mean, wanted[1][name].mean, atol=1e-5)
        np.testing.assert_allclose(moments.covariance, wanted[1][name].covariance, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            moments.cross_covariance, wanted[1][name].cross_covariance, rtol=1e-4, atol=1e-4
        )


def test_alone_a_share_is_everything() -> None:
    share, rows = Share.whole(5), np.arange(10.0).reshape(5, 2)
    assert share.gathered(rows) is rows
    assert share.part(3, 5)[0] == slice(3, 5) and share.part(3, 5)[1].total == 2
    np.testing.assert_array_equal(rows[share.rows(5)], rows)
    assert ALONE.sum(3) == 3 and ALONE.told(lambda: "x") == "x"
