"""What the decompose command writes and says in the end: files, read again, a page on request, the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from caffe_proto import console

from . import outputs
from .cli_compare import apart, reference
from .cli_options import Options
from .cli_report import write_page

if TYPE_CHECKING:
    from caffe_proto.model import Model

    from .applier import Report
    from .cli_images import Images
    from .plan import Plan
    from .report_given import Given


@dataclass(frozen=True, eq=False)
class Made:
    """What came of a net: its new form, the plan, what there is to say of it, and the images it was fitted to."""

    model: Model
    plan: Plan
    report: Report
    images: Images | None = None


def finish(o: Options, model: Model, made: Made, written: Callable[[], None]) -> None:
    """Write the files, call ``written``, read them again, and say what they are."""
    report = made.report
    compared = reference(o, model) if o.compare else None  # what can fail comes before the writing
    given = _given(o, model, made) if o.report_it else None
    subjects = o.subjects(model, made.model)
    files = o.names()
    outputs.write(files, made.model, made.plan, o.inputs(), o.plan_file, o.input_shapes)
    written()
    again, _ = o.read_again(report.macs[1], report.params[1])
    differences = apart(o, again, compared) if compared is not None else {}
    times = outputs.times(subjects, o.threads)
    gains = outputs.gains(subjects, o.threads)
    if given is not None:
        from .report_given import timed

        told = replace(given, apart=differences, times=timed(times, gains, o.threads) if times else None)
        write_page(o.html, str(o.prefix), made.plan.to_json(), model, again, told, o.inputs())
        files = files | {"html": o.html}
    said = outputs.Said(report, files, differences, times, gains)
    if o.as_json:
        console.echo_json(outputs.document(said))
    else:
        outputs.show(said)


def write_plan(o: Options, plan: Plan) -> None:
    """Print a plan, and write PREFIX.plan.json where there is a PREFIX."""
    import click

    from caffe_proto import files

    if o.prefix is not None:
        with files.writing([f"{o.prefix}.plan.json"], o.inputs(o.plan_file)) as (temporary,):
            temporary.write_text(plan.to_json())
    click.echo(plan.to_json(), nl=False)


def _given(o: Options, model: Model, made: Made) -> Given:
    """What the page is told besides the files and the times."""
    from .report_given import Given, judged

    images = made.images
    accuracies = () if images is None else judged(model, made.model, images.array, images.labels, o.threads)
    fed = "random input" if o.compare == "random" else str(o.compare)
    return Given(
        accuracies=accuracies,
        images="On the images that the new net was fitted to." if accuracies else "",
        compared=fed if o.compare else "",
        fitted={
            row.name: row.error
            for row in made.report.rows
            if row.error is not None and row.error_of == "responses"
        },
        command=console.command_line(),
        input_shapes=o.input_shapes,
        force=o.force,
    )
