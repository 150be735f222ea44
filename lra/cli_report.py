"""The report command: two nets and their plan in, one HTML file out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import click
from click.core import ParameterSource

from caffe_proto import console
from caffe_proto.console import input_shape_option, state_options
from caffe_proto.errors import UsageError


@click.command()
@click.argument("prefix")
@click.argument("net", required=False)
@click.argument("weights", required=False)
@click.option("-o", "--output", required=True, metavar="OUT.html", help="The page that is written.")
@click.option(
    "--times",
    metavar="FILE.json",
    help="Measured times: what caffe-lra time NET,WEIGHTS PREFIX.prototxt,PREFIX.caffemodel --profile --json printed.",
)
@click.option(
    "--accuracy",
    metavar="FILE.json",
    help="What caffe-lra eval PREFIX.prototxt PREFIX.caffemodel --reference NET,WEIGHTS --json printed.",
)
@input_shape_option
@state_options
def report(
    prefix: str, net: str | None, weights: str | None, output: str, times: str | None, accuracy: str | None,
    input_shapes: Any, phase: str, stages: Sequence[str], level: int,
) -> None:  # fmt: skip
    """Write a page about what decompose or prune made of NET: one HTML file that needs no network.

    Reads PREFIX.plan.json, PREFIX.prototxt and PREFIX.caffemodel. Both nets layer by layer, costs, curves with the
    ranks chosen, errors, the difference, the plan; times and accuracies where they are given. Without WEIGHTS there
    are no curves. Charts need matplotlib: the extra report.
    """
    if net is None:
        raise UsageError(
            "the original NET is missing: the page sets both nets beside each other",
            hint="caffe-lra report PREFIX NET [WEIGHTS] -o OUT.html",
        )
    if find_spec("matplotlib") is None:
        raise UsageError("matplotlib is not installed", hint="install the extra report: caffe-lra[report]")
    from caffe_proto import files

    from .report import Given, Plans, make, optional, read_accuracy, read_times, stem
    from .report_html import page

    start = stem(prefix)
    plan, new = f"{start}.plan.json", f"{start}.prototxt"
    new_weights = optional(f"{start}.caffemodel")
    plans = Plans.from_json(files.read_text(plan), plan)
    before = console.load_model(net, weights, phase, stages, level)
    after = console.load_model(new, new_weights, phase, stages, level)
    given = Given(
        read_times(times) if times is not None else None,
        read_accuracy(accuracy) if accuracy is not None else (),
        _command(input_shapes),
        input_shapes,
    )
    made = page(make(start, plans, before, after, given))
    with files.writing([output], [plan, new, new_weights, net, weights, times, accuracy]) as (temporary,):
        temporary.write_bytes(made.encode("utf-8"))
    click.echo(f"wrote {output}")


def _command(input_shapes: Mapping[str, Sequence[int]]) -> str:
    """The present command line, as a shell takes it."""
    context = click.get_current_context()
    words: list[str] = []
    for param in context.command.params:
        if context.get_parameter_source(str(param.name)) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[str(param.name)]
        if param.name == "input_shapes":
            values = [f"{name}={','.join(map(str, shape))}" for name, shape in input_shapes.items()]
        else:
            values = [
                str(one) for one in (value if isinstance(value, tuple) else (value,)) if one is not None
            ]
        for one in values:
            words += [one] if isinstance(param, click.Argument) else [param.opts[0], one]
    return shlex.join(["caffe-lra", "report", *words])
