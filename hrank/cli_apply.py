"""What the apply command does with plans of the prune command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from caffe_proto import console
from caffe_proto.cli_images import COMPANIONS
from lra import outputs as files_of
from lra.cli_images import read_images

from . import cli_timing, outputs

if TYPE_CHECKING:
    from caffe_proto.model import Model
    from lra.applier import Row

    from .plan import Plan
    from .repairing import Recorded, Repair

IMAGE_OPTIONS = COMPANIONS | {"images", "positions", "seed", "threads"}


def carry(given: Mapping[str, Any], said: frozenset[str]) -> None:
    """Apply a plan that prunes, or prunes and decomposes, to a sibling of its net.

    ``given``: the options of apply, ``said``: those that stand on the command line. Repairs that the plan records
    are made again from the images, which must be those it was made with.
    """
    from caffe_proto.files import read_text

    from . import applier, joint
    from .plan import Plan

    path, weights = given["plan_file"], given["weights"]
    source = read_text(path)
    how = {"force": given["force"], "input_shapes": given["input_shapes"]}
    both = joint.Joint.from_json(source, path) if joint.prunes(source, path) == "both" else None
    first = both.prune if both is not None else Plan.from_json(source, path)
    repairs = _repairs(first, given, said)
    model = console.load_model(given["net"], weights, given["phase"], given["stages"], given["level"])
    masks = bool(first.target.get("masks"))
    made: list[Repair] = []

    def repaired(pruned: Model) -> Model:
        if repairs is None:
            return pruned
        changed, found = _repaired(repairs, first, model, pruned, {**given, "said": said}, masks)
        made.extend(found)
        return changed

    total = None
    decomposed: Sequence[Row] = ()
    text: Any = first
    if both is not None:
        changed, report, second = joint.apply(both, model, between=repaired, **how)
        decomposed = second.rows
        text, total = both, (report.macs[0], second.macs[1])
    else:
        changed, report = applier.apply(first, model, mask_only=masks, sibling=True, **how)
        changed = repaired(changed)
    names = files_of.names(given["prefix"], weights=weights is not None, onnx=False)
    files_of.write(names, changed, text, [given["net"], weights], path, given["input_shapes"])
    shown = outputs.Said(
        report,
        names,
        masks,
        None,
        _warnings(first, given, said),
        made,
        total=total,
        decomposed=decomposed,
        timed=first.predicted,
    )
    if given["as_json"]:
        console.echo_json(outputs.document(shown, ()))
    else:
        outputs.show(shown)


def untrained(plan: Plan) -> list[str]:
    """The warning that a plan's training is no part of what it does."""
    if not plan.target.get("finetune"):
        return []
    return [
        "these weights are not fine-tuned; the caffemodel written with the plan is, and fits this net too"
    ]


def _warnings(plan: Plan, given: Mapping[str, Any], said: frozenset[str]) -> list[str]:
    doubts = cli_timing.doubts(plan.predicted, given["threads"] if "threads" in said else None)
    return doubts + (untrained(plan) if given["weights"] is not None else [])


def _repairs(plan: Plan, given: Mapping[str, Any], said: frozenset[str]) -> Recorded | None:
    """The repairs to make; raises UsageError where images are missing or of no use."""
    from .repairing import recorded

    found = recorded(plan, given["plan_file"]) if given["weights"] is not None else None
    if found is None:
        idle = IMAGE_OPTIONS - ({"threads"} if plan.predicted is not None else set())
        console.refuse(said & idle, "only goes with WEIGHTS and a plan that repairs them", {})
    elif given["images"] is None:
        otherwise = (
            "or leave WEIGHTS out: the caffemodel written with the plan is repaired, and fits this net too"
        )
        raise found.without_images(given["plan_file"], otherwise)
    if found is not None and "lsq" not in found.names:
        console.refuse(said & {"positions"}, "does not go with the repairs of this plan", {})
    return found


def _repaired(
    repairs: Recorded, plan: Plan, model: Model, pruned: Model, given: Mapping[str, Any], masks: bool
) -> tuple[Model, list[Repair]]:
    from lra.stage import Stage

    from .repairing import make

    planned = {key: value for key, value in repairs.settings.items() if key not in given["said"]}
    stage = Stage()
    try:
        calibration = read_images(model, {**given, **planned}, stage).calibration
        repairs.check(calibration, force=given["force"])
        return make(
            repairs.names, plan, model, pruned, calibration, masks=masks, progress=repairing,
            inputs=given["input_shapes"],
        )  # fmt: skip
    finally:
        stage.close()


@contextmanager
def repairing(name: str) -> Iterator[Callable[[int], None]]:
    """A progress bar for a repair."""
    with console.progress(f"repair {name}", None, "images") as step:
        yield step
