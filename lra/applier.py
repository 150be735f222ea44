"""Changing: a plan and a model in, the decomposed model out, with what was measured on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caffe_proto.costs import cost as count
from caffe_proto.errors import PlanError, UsageError
from caffe_proto.fold import fold_batchnorm
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.net import nearest
from caffe_proto.rewrite import Namer, Replace
from caffe_proto.rewrite import apply as rewrite
from caffe_proto.shape_inference import InputShapes, infer

from .decomposition import Step, StepShape
from .merging import Merge, merge
from .plan import REFIT, LayerPlan, Plan, Predicted, Timed
from .schemes import ALL_SCHEMES
from .styles import STYLES, new_layers, renamed_tops, unwritable
from .targets import Found, Spectra, Target, find

if TYPE_CHECKING:
    from caffe_proto.runtime import Engine

    from .fitting import Fits
    from .polish import PolishReport


@dataclass(frozen=True)
class Row:
    """One decomposed layer: MACs before and after (None where shapes are unknown), and the error.

    ``error`` is ``||W - W'|| / ||W||`` of the weights, or, where ``error_of`` is "responses", the same of
    held-out responses behind activation and shortcut; None without weights. ``ms``: milliseconds before and
    after as a plan by measured time predicts them.
    """

    name: str
    scheme: str
    ranks: tuple[int, ...]
    full_rank: int | None
    macs: tuple[int, int] | None
    error: float | None
    error_of: str = "weights"
    ms: tuple[float, float] | None = None


@dataclass(frozen=True)
class Report:
    """What became of a net: rows, totals before and after, layers kept with the reason, doubts, times predicted.

    ``merges``: rows of layers that became one, before the decomposition; ``late_merges``: behind it.
    """

    rows: tuple[Row, ...]
    macs: tuple[int, int]
    conv_macs: tuple[int, int]
    params: tuple[int, int]
    kept: dict[str, str]
    warnings: tuple[str, ...] = ()
    predicted: Predicted | None = None
    polish: PolishReport | None = None
    merges: tuple[Merge, ...] = ()
    late_merges: tuple[Merge, ...] = ()


def apply(
    plan: Plan,
    model: Model,
    *,
    images: Any = None,
    step: Callable[[int], None] = lambda _images: None,
    force: bool = False,
    sibling: bool = False,
    input_shapes: InputShapes | None = None,
    found: Found | None = None,
    spectra: Spectra | None = None,
    engine: Engine | None = None,
) -> tuple[Model, Report]:
    """Rewrite a model by a plan: the same plan and files give the same bytes.

    Layers are found by name in both phases. Without weights the structure alone changes. ``sibling``: the net
    is another form of the one the plan was made for (its train_val), so only the weights must be the plan's.

    A plan that fits responses needs the ``images`` it was made with: a Calibration, an array (N, C, H, W) as the
    net wants it, or arrays by blob. ``step`` is called as the fitting goes on: one call more than layers.

    A plan that merges does so first, with exactly the rows that it names, and again in the end, with the rows that it
    names or whatever the new layers give; ``found`` and ``spectra``, where they are given, are of the net merged first.

    ``engine``: how the net shall run; a plan by measured time warns where its times are of another processor,
    release of onnxruntime or, with an ``engine``, other threads or another provider.

    Raises PlanError where the plan was made for other files (unless ``force``) or names layers that the net
    lacks, UsageError on a rank a layer cannot have.
    """
    plan.check(model, force=force, sibling=sibling)
    original, merges = model, plan.merges
    joined = merge(model, input_shapes, merges) if merges is not None else None
    model = joined.model if joined is not None else model
    found = found or find(model, input_shapes)
    here = _Place(found, spectra or Spectra(found))
    fits = _fitted(plan, here, images, force, step)
    fitted = fits.layers if fits is not None else {}
    style = STYLES.get(str(plan.target.get("style", "default")))
    if style is None:
        raise PlanError(f'there is no style "{plan.target["style"]}"', hint="known: " + ", ".join(STYLES))
    namer = Namer.of(model)
    edits: list[Replace] = []
    errors: dict[str, float | None] = {}
    ties = _Ties()
    for name, entry in plan.layers.items():
        if refused := unwritable(str(plan.target.get("style", "default")), entry.scheme):
            raise PlanError(refused, layer=name, hint="use --style default")
        place = here if name in found.targets else _other_phase(here, name, input_shapes)
        target = _target(place.found, name)
        steps: Sequence[Step | StepShape]
        if name in fitted:
            steps, errors[name] = fitted[name].chain.steps, fitted[name].error
        elif entry.scheme == REFIT and (model.weights is not None or name not in found.targets):
            raise PlanError("cannot be refitted", layer=name, hint="leave it out of the plan")
        elif entry.scheme == REFIT:
            continue  # without weights there is nothing to change
        else:
            steps, errors[name] = _steps(place, target, entry)
        ties.add(target, tuple(step.suffix for step in steps), entry)
        layer = place.found.shaped.graph.nodes[target.index].layer
        new = new_layers(layer, target, steps, style, namer, gains_bias=name in fitted)
        edits.append(Replace(name, new, renamed_tops(layer, new, style, model.net)))
    changed = rewrite(model, edits)
    warnings = (fits.warnings if fits is not None else ()) + doubts(plan.predicted, engine)
    if plan.target.get("fold_bn"):
        changed, unfolded = fold_batchnorm(changed, input_shapes)
        warnings += tuple(f'layer "{name}" is not folded: {reason}' for name, reason in unfolded.items())
    rows = list(_rows(plan, found, changed, edits, errors, set(fitted), input_shapes))
    again = merge(changed, input_shapes, plan.late_merges) if joined is not None else None
    if again is not None:
        changed = again.model
        warnings += tuple(
            f'layers "{first}" and "{second}" stay apart: {reason}'
            for (first, second), reason in again.apart.items()
        )
    before, after = (count(infer(build(one.net), input_shapes, partial=True)) for one in (original, changed))
    return changed, Report(
        tuple(rows),
        (before.macs, after.macs),
        (before.conv_macs, after.conv_macs),
        (before.params, after.params),
        dict(plan.kept),
        warnings,
        plan.predicted,
        merges=joined.merges if joined is not None else (),
        late_merges=again.merges if again is not None else (),
    )


def doubts(predicted: Timed | None, engine: Engine | None) -> tuple[str, ...]:
    """Why what a plan by measured time says may not hold here; nothing of other plans."""
    if predicted is None:
        return ()
    from .latency_plan import foreign  # brings onnxruntime, which other plans do not need

    return foreign(predicted, engine)


def _fitted(plan: Plan, place: _Place, images: Any, force: bool, step: Callable[[int], None]) -> Fits | None:
    """The layers that the plan wants fitted to responses; None where it wants none, or there are no weights."""
    wanted = plan.target.get("fit")
    if not wanted or place.found.model.weights is None:
        return None
    from .calibration import Calibration  # brings onnxruntime, which the weights alone do not need
    from .fitting import fit_layers

    if images is None:
        raise UsageError("the plan fits responses", hint="give the images it was made with (--images)")
    calibration = Calibration.of(place.found.shaped.graph, images)
    calibration.check(wanted, force=force)
    return fit_layers(plan, place.found, place.spectra, calibration, step)


@dataclass
class _Place:
    """A model in one phase, with its factorizations; ``other`` is the same in the other phase, once needed."""

    found: Found
    spectra: Spectra
    other: _Place | None = None


def _other_phase(here: _Place, name: str, inputs: InputShapes | None) -> _Place:
    """Where a layer that does not exist in this phase is: in the other one, if the file has it at all."""
    model = here.found.model
    if not any(layer.name == name for layer in model.net.all_layers):
        return here
    if here.other is None:
        phase = "TRAIN" if model.net.state.phase == "TEST" else "TEST"
        found = find(model.in_state(dataclasses.replace(model.net.state, phase=phase)), inputs)
        here.other = _Place(found, Spectra(found))
    return here.other if name in here.other.found.targets else here


class _Ties:
    """Layers that share a weight go on sharing their factors, so those of one name must be the same."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, tuple[str, ...]], tuple[str, LayerPlan]] = {}

    def add(self, target: Target, suffixes: tuple[str, ...], entry: LayerPlan) -> None:
        """Note a layer; raises PlanError where one before it shares its weight and is factored otherwise."""
        if not target.shared:
            return
        name, first = self._seen.setdefault((target.shared, suffixes), (target.name, entry))
        if (first.scheme, first.ranks) != (entry.scheme, entry.ranks):
            mine, theirs = (f"{one.scheme} {'+'.join(map(str, one.ranks))}" for one in (entry, first))
            what = f'shares its weight "{target.shared}" with layer "{name}": {mine} here and {theirs} there do not go together'
            raise PlanError(what, layer=target.name, hint="plan the same for both")


def _target(found: Found, name: str) -> Target:
    if name in found.targets:
        return found.targets[name]
    if name in found.refused:
        raise PlanError(f"cannot be decomposed: {found.refused[name]}", path=found.model.net.path, layer=name)
    raise PlanError(
        f'the plan names "{name}", which is no convolution or fully connected layer of the net',
        path=found.model.net.path,
        hint=nearest(name, list(found.targets)),
    )


def _steps(
    place: _Place, target: Target, entry: LayerPlan
) -> tuple[Sequence[Step | StepShape], float | None]:
    """The chain of a layer, with numbers where the model has weights, and its relative error."""
    if entry.scheme not in ALL_SCHEMES:
        raise PlanError(f"{entry.scheme!r} is no scheme of this program", layer=target.name)
    scheme = ALL_SCHEMES[entry.scheme]
    found = place.found
    try:
        shapes = scheme.chain(target.shape, target.geometry, entry.ranks)
        if target.index not in found.blobs:
            return shapes, None
        blobs = found.blobs[target.index]
        bias = blobs[1] if len(blobs) > 1 else None
        chain = place.spectra.get(target, scheme).factor(entry.ranks[0], bias)
    except ValueError as error:
        raise UsageError(str(error), path=found.model.net.path, layer=target.name) from None
    return chain.steps, chain.error(target.kernel(blobs[0]))


def _rows(
    plan: Plan,
    found: Found,
    changed: Model,
    edits: Iterable[Replace],
    errors: dict[str, float | None],
    fitted: set[str],
    inputs: InputShapes | None,
) -> Iterator[Row]:
    """What a report says of each layer of the plan."""
    macs = count(infer(build(changed.net), inputs, partial=True)).by_layer
    for edit in edits:
        entry, target = plan.layers[edit.layer], found.targets.get(edit.layer)
        full, pair = None, None
        if target is not None and target.in_hw is not None:
            if entry.scheme != REFIT:
                full = ALL_SCHEMES[entry.scheme].max_rank(target.shape, target.geometry.group)
            pair = (target.macs, sum(macs[new.name].macs for new in edit.new))
        of = "responses" if edit.layer in fitted else "weights"
        yield Row(edit.layer, entry.scheme, entry.ranks, full, pair, errors[edit.layer], of, entry.ms)
