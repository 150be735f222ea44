"""The report command: two nets and their plan in, one HTML file out."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from caffe_proto import console
from caffe_proto.console import input_shape_option, json_option, state_options
from caffe_proto.errors import UsageError
from caffe_proto.model import net_and_weights

if TYPE_CHECKING:
    from caffe_proto.model import Model

    from .report_given import Given

report_option = click.option(
    "--report",
    "report_it",
    is_flag=True,
    help="Also write PREFIX.html, the page that caffe-lra report makes, with what is measured here; needs the extra report.",
)


def check_charts() -> None:
    """Raise UsageError where the charts of a page cannot be drawn: before any long work."""
    if find_spec("matplotlib") is None:
        raise UsageError("matplotlib is not installed", hint="install the extra report: caffe-lra[report]")


def write_page(
    path: str, title: str, plan: str, before: Model, after: Model, given: Given,
    inputs: Sequence[str | None] = (), against: Sequence[Model] = (), plan_path: str | None = None,
) -> None:  # fmt: skip
    """Write the page about ``before`` and ``after``, what ``plan`` made of it, to ``path``.

    ``title``: what the new net is called; ``plan``: the text of a plan file, and ``plan_path`` where it was read;
    ``given``: what was measured, and the command; ``inputs``: files that may not be overwritten; ``against``:
    published nets to set beside the new one. Raises PlanError and FileError as ``lra.report.make``, and UsageError
    where an input would be overwritten.
    """
    from caffe_proto import files

    from .report import Plans, make
    from .report_html import page

    made = page(make(title, Plans.from_json(plan, plan_path), before, after, given, against))
    with files.writing([path], inputs) as (temporary,):
        temporary.write_bytes(made.encode("utf-8"))


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
@click.option(
    "--against",
    multiple=True,
    metavar="NET[,WEIGHTS]",
    help="A net to set beside the new one, as a published decomposition of NET; repeatable.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Also where the plan was made for other files than NET and WEIGHTS, or times and accuracies were measured on other nets.",
)
@input_shape_option
@state_options
@json_option
def report(
    prefix: str, net: str | None, weights: str | None, output: str, times: str | None, accuracy: str | None,
    against: Sequence[str], force: bool, input_shapes: Any, phase: str, stages: Sequence[str], level: int, as_json: bool,
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
    check_charts()
    from caffe_proto import files

    from .report import optional, stem
    from .report_given import Given, read_accuracy, read_times

    start = stem(prefix)
    plan, new, new_weights = f"{start}.plan.json", f"{start}.prototxt", optional(f"{start}.caffemodel")
    source = files.read_text(plan)
    before, after = (
        console.load_model(path, stored, phase, stages, level)
        for path, stored in ((net, weights), (new, new_weights))
    )
    pairs = [net_and_weights(one) for one in against]
    published = [console.load_model(*pair, phase, stages, level) for pair in pairs]
    both = None if force else (before, after)
    given = Given(
        read_times(times, both) if times is not None else None,
        read_accuracy(accuracy, both) if accuracy is not None else (),
        command=console.command_line(),
        input_shapes=input_shapes,
        force=force,
    )
    inputs = [
        plan,
        new,
        new_weights,
        net,
        weights,
        times,
        accuracy,
        *(path for pair in pairs for path in pair),
    ]
    write_page(output, start, source, before, after, given, inputs, published, plan)
    if as_json:
        console.echo_json({"output": output})
    else:
        click.echo(f"wrote {output}")
