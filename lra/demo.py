"""``caffe-lra demo``: the main job on a small trained net that comes with the program.

The net is this project's LeNet (models/lenet), trained on MNIST; the pictures are drawn by ``lra.digits``,
so nothing has to be downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np

import caffe_proto
from caffe_proto.errors import FileError

from .digits import drawn

N_DIGITS = 1000


def net_files() -> tuple[Path, Path]:
    """Prototxt and caffemodel of the demo: in the installed package, or in the checkout it runs from."""
    here = Path(__file__).resolve().parent
    for folder in (here / "lenet", here.parent / "models" / "lenet"):
        found = folder / "lenet.prototxt", folder / "lenet.caffemodel"
        if all(path.is_file() for path in found):
            return found
    raise FileError("the demo's net is not installed", path=here / "lenet", hint="install the package again")


Main = Callable[[Sequence[str]], int]


def run(folder: Path, threads: int, main: Main) -> None:
    """Copy the net into ``folder`` and show info, decompose, ONNX and timing as the commands they are, run by ``main``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        net, weights = (shutil.copyfile(path, folder / path.name) for path in net_files())
    except OSError as error:
        raise FileError(f"the demo cannot write there: {error.strerror}", path=folder) from error
    prefix = folder / "lenet-fast"
    before, after = (str(net), str(weights)), (f"{prefix}.prototxt", f"{prefix}.caffemodel")
    _show(main, ["info", *before])
    _show(
        main,
        ["decompose", *before, "-o", str(prefix), "--speedup", "3", "--fc", "--round-to", "16", "--onnx"],
    )
    _show(main, ["time", ",".join(before), ",".join(after), "--batch", "64", "--threads", str(threads)])
    _compare(before, after, threads)


def _show(main: Main, command: Sequence[str]) -> None:
    click.secho("$ caffe-lra " + " ".join(command), bold=True)
    status = main(command)
    click.echo()
    if status:
        raise click.exceptions.Exit(status)


def _compare(before: tuple[str, str], after: tuple[str, str], threads: int) -> None:
    """Accuracy of both nets on drawn digits, and how often they agree."""
    images, labels = drawn(N_DIGITS)
    answers = []
    for net, weights in (before, after):
        with caffe_proto.session(caffe_proto.load(net, weights), threads=threads) as opened:
            (scores,) = opened.run({"data": images}).values()
        answers.append(scores.reshape(N_DIGITS, -1).argmax(axis=1))
    right = [np.mean(answer == labels) for answer in answers]
    agree = np.mean(answers[0] == answers[1])
    click.echo(
        f"{N_DIGITS:,} drawn digits: {right[0]:.1%} right before, {right[1]:.1%} after; both nets agree on {agree:.1%}"
    )
