"""The apply and demo commands, and ``main``: one program of all three packages' commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import caffe_proto
from caffe_proto import console, peers
from caffe_proto.cli import COMMANDS as CAFFE_COMMANDS
from caffe_proto.completion import complete_files, completion
from caffe_proto.console import (
    choice_option,
    input_shape_option,
    json_option,
    net_argument,
    seed_option,
    state_options,
    threads_option,
)
from caffe_proto.errors import UsageError
from hrank.cli import prune

from . import outputs
from .cli_decompose import decompose
from .cli_images import calibration_options, read_images
from .cli_options import SCHEME_NAMES, STYLE_NAMES
from .cli_report import report
from .cli_train import train
from .cli_welcome import WELCOME, Sections

if TYPE_CHECKING:
    from caffe_proto.runtime import Engine

    from .plan import Plan

_SHARED = ("train", "decompose", "prune")  # commands of which several processes take a share each


@click.group(
    cls=Sections, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(caffe_proto.__version__, prog_name="caffe-lra")
@click.pass_context
def cli(context: click.Context) -> None:
    """Make legacy Caffe networks fast again: decompose them, export ONNX, time them."""
    command = context.invoked_subcommand
    if command is None:
        click.echo(WELCOME)
        return
    if peers.world() > 1 and command not in _SHARED:
        if peers.rank():
            context.exit()
        known = ", ".join(_SHARED)
        raise UsageError(f"{command} does not work in several processes", hint=f"{known} do; start one")


@cli.command()
@click.argument("plan_file", metavar="PLAN")
@net_argument
@click.argument("weights", required=False)
@click.option(
    "-o",
    "--output",
    "prefix",
    required=True,
    metavar="PREFIX",
    help="Writes PREFIX.prototxt and PREFIX.plan.json; with WEIGHTS also PREFIX.caffemodel.",
)
@choice_option(
    "--scheme",
    choices=SCHEME_NAMES,
    help='What a bare rank {"conv1": 8} in PLAN means.',
)
@click.option(
    "--style", type=click.Choice(STYLE_NAMES), help="Layer names and rules; default: the plan's own."
)
@click.option("--force", is_flag=True, help="Also with other weights or images than the plan was made for.")
@calibration_options
@threads_option
@seed_option
@input_shape_option
@state_options
@json_option
def apply(
    plan_file: str, net: str, weights: str | None, prefix: str, scheme: str, style: str | None, force: bool,
    input_shapes: Any, phase: str, stages: Sequence[str], level: int, as_json: bool, **fitting: Any,
) -> None:  # fmt: skip
    """Carry a PLAN to a sibling of its net, by layer name: to the train_val of the deploy net it was made for.

    param, fillers, lr_mult and phases are kept, so that fine-tuning can start. Without WEIGHTS the structure
    alone is written. PLAN may be a rank file {"conv1": 8} as older tools write them. Layers that exist in one
    phase only are found too. A plan that fits responses, or repairs, needs the images it was made with. A plan by measured time
    warns where it was measured on another processor or release of onnxruntime; with --threads, also with other
    threads. PLAN may also be of the prune command, or of both.
    """
    from caffe_proto.files import read_text
    from hrank.joint import prunes

    from .applier import apply as carry
    from .plan import Plan
    from .stage import Stage

    source = read_text(plan_file)
    if prunes(source, plan_file):
        _carry_pruning(
            fitting
            | {
                "plan_file": plan_file, "net": net, "weights": weights, "prefix": prefix, "force": force, "phase": phase,
                "input_shapes": input_shapes, "stages": stages, "level": level, "as_json": as_json,
            }
        )  # fmt: skip
        return
    plan = Plan.from_json(source, plan_file).completed(scheme, style)
    model = console.load_model(net, weights, phase, stages, level)
    if fitting["images"] is not None and not (weights and plan.target.get("fit")):
        raise UsageError("--images only goes with WEIGHTS and a plan that fits responses to them")
    given = fitting | {"input_shapes": input_shapes}
    stage = Stage()
    try:
        wanted = fitting["images"] is not None
        images = read_images(model, given, stage).calibration if wanted else None
        total = 0 if images is None else images.count * (1 + len(plan.layers))
        with console.progress("fitting", total, "images") as step:
            changed, report = carry(
                plan, model, images=images, step=step, force=force, sibling=True, input_shapes=input_shapes,
                engine=_engine(plan, fitting["threads"]),
            )  # fmt: skip
    finally:
        stage.close()
    names = outputs.names(prefix, weights=weights is not None, onnx=False)
    outputs.write(names, changed, plan, [net, weights], plan_file, input_shapes)
    said = outputs.Said(report, names)
    if as_json:
        console.echo_json(outputs.document(said))
    else:
        outputs.show(said)


def _engine(plan: Plan, threads: int) -> Engine | None:
    """How the new net shall run, of a plan by measured time; None where --threads does not say it."""
    if plan.predicted is None or "threads" not in console.said():
        return None
    from caffe_proto.runtime import Engine  # brings onnxruntime

    return Engine(threads)


def _carry_pruning(given: dict[str, Any]) -> None:
    """What apply does with a plan that prunes; the options of decompositions do not go with it."""
    from hrank.cli_apply import carry

    said = console.said()
    console.refuse(said & {"scheme", "style"}, "does not go with a plan that prunes", {})
    carry(given, said)


@cli.command()
@click.option(
    "-o", "--output", "folder", default="caffe-lra-demo", show_default=True, help="Folder for what it writes."
)
@threads_option
def demo(folder: str, threads: int) -> None:
    """Try everything on a small trained net that comes with the program: LeNet, trained by this project."""
    from .demo import run

    run(Path(folder), threads, main)


for _command in (decompose, prune, train, report, completion, *CAFFE_COMMANDS):
    cli.add_command(_command)
complete_files(cli)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``caffe-lra`` with these arguments (default: the process's own); returns the exit status."""
    return console.run(cli, argv)
