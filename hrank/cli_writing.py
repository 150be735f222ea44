"""What the prune command writes and says in the end: files, read again, a page where it is asked for, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caffe_proto import console
from caffe_proto.binding import bind
from lra import outputs as files_of
from lra.cli_report import write_page

from . import cli_listing, outputs
from .cli_options import Options

if TYPE_CHECKING:
    from caffe_proto.model import Model
    from lra.applier import Report as Decomposed
    from lra.cli_images import Images
    from lra.report_given import Times

    from .applier import Report
    from .coupling import Coupling
    from .joint import Joint
    from .plan import Plan
    from .repairing import Repair
    from .tuning import Trained


@dataclass(frozen=True, eq=False)
class Made:
    """What came of a net: its new form, the plan with all that was done, and what there is to say of each step."""

    model: Model
    plan: Plan
    report: Report
    repairs: tuple[Repair, ...] = ()
    trained: tuple[Trained, ...] = ()


def finish(
    o: Options,
    coupling: Coupling,
    made: Made,
    trials: Sequence[outputs.Trial],
    warnings: Sequence[str],
    images: Images | None,
) -> None:
    """Decompose what is left, write, read again, and say what came out."""
    text, changed, rest = _decomposed(o, made)
    total = None if rest is None else (made.report.macs[0], rest.macs[1])
    model = coupling.model
    subjects = o.subjects(model, changed)  # what can fail comes before the writing
    keep = {name: len(channels) for name, channels in made.plan.keep.items()}
    counted = cli_listing.counted(o, coupling, keep)
    files = o.names()
    files_of.write(files, changed, text, o.inputs(), o.plan_file, o.input_shapes)
    written, shaped = o.read_again(total[1] if total else made.report.macs[1])
    bind(shaped, written.weights)
    times, gains = files_of.times(subjects, o.threads), files_of.gains(subjects, o.threads)
    if o.report_it:
        from lra.report_given import timed

        _page(o, model, written, text, made, images, timed(times, gains, o.threads) if times else None)
        files |= {"html": o.html}
    said = outputs.Said(
        made.report, files, o.mask_only, counted, warnings, made.repairs, times, total, made.trained,
        () if rest is None else rest.rows, gains, made.plan.predicted,
    )  # fmt: skip
    if o.as_json:
        console.echo_json(outputs.document(said, trials))
    else:
        if trials:
            outputs.show_trials(trials)
        outputs.show(said)


def _decomposed(o: Options, made: Made) -> tuple[Plan | Joint, Model, Decomposed | None]:
    """The plan to write, the net, and what became of the layers that --then-decompose took."""
    if o.then_decompose is None:
        return made.plan, made.model, None
    from .joint import Joint, decompose_rest

    second, changed, rest = decompose_rest(made.model, made.report.macs, o.then_decompose, o.input_shapes)
    return Joint(made.plan, second), changed, rest


def _page(
    o: Options,
    model: Model,
    written: Model,
    text: Any,
    made: Made,
    images: Images | None,
    times: Times | None,
) -> None:
    """Write PREFIX.html, with what was measured here."""
    from lra.report_given import Given, judged

    accuracies = () if images is None else judged(model, written, images.array, images.labels, o.threads)
    fitted = {name: error for one in made.repairs for name, error in one.errors.items()}
    given = Given(
        times,
        accuracies,
        images="On the images that filters were judged or repairs made on." if accuracies else "",
        fitted=fitted,
        command=console.command_line(),
        input_shapes=o.input_shapes,
        force=o.force,
    )
    write_page(o.html, str(o.prefix), text.to_json(), model, written, given, o.inputs())
