"""The repairs of a plan: made in their order, recorded with the images that they were made from, and made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.shape_inference import InputShapes
from lra.calibration import Calibration
from lra.repair import refit

from . import repair
from .applier import source_shapes
from .coupling import find, removed_places
from .plan import Plan

REPAIRS = ("bias", "lsq", "bn")  # in the order in which they are made

Progress = Callable[[str], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Repair:
    """A repair that was made: layers with other numbers, their errors where it has any, and why others were left."""

    name: str
    changed: tuple[str, ...]
    kept: Mapping[str, str]
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """What a plan says of its repairs: their names, and of the images what `lra.calibration.Calibration.record` does.

    ``images`` is empty in plans of old, which named the repairs alone.
    """

    names: tuple[str, ...]
    images: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, int]:
        """The options by which the images are had again."""
        known = {"n_images": "images", "seed": "seed", "positions": "positions"}
        return {option: self.images[key] for option, key in known.items() if key in self.images}

    def check(self, calibration: Calibration, *, force: bool) -> None:
        """Raise PlanError where these are other images than those of the plan, unless forced."""
        calibration.check(self.images, force=force)

    def without_images(self, path: object, otherwise: str) -> UsageError:
        """The error where there are none; ``otherwise``: what else can be done."""
        count = f"{self.images['images']:,} images" if "images" in self.images else "images"
        return UsageError(
            f"the plan repairs the weights ({', '.join(self.names)}) from {count}",
            path=path,
            hint=f"give those it was made with (--images SRC), {otherwise}",
        )


def record(plan: Plan, names: Sequence[str], calibration: Calibration) -> Plan:
    """The plan with these repairs, made from these images."""
    about = calibration.record()
    if "lsq" not in names:
        del about["positions"]
    return replace(plan, target={**plan.target, "repair": {"made": list(names), **about}})


def recorded(plan: Plan, path: object = None) -> Recorded | None:
    """What a plan says of its repairs, None where it has none; raises PlanError where that makes no sense."""
    said = plan.target.get("repair")
    if not said:
        return None
    if isinstance(said, list):
        said = {"made": said}
    names = said.get("made") if isinstance(said, dict) else None
    if not isinstance(names, list) or not names or not all(name in REPAIRS for name in names):
        raise PlanError(f'"repair" must name repairs: {", ".join(REPAIRS)}', path=path)
    images = {key: value for key, value in said.items() if key != "made"}
    counts = [images[key] for key in ("images", "seed", "positions") if key in images]
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
        raise PlanError('"images", "seed" and "positions" of "repair" must be whole numbers', path=path)
    return Recorded(tuple(name for name in REPAIRS if name in names), images)


def _quiet(_name: str) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _images: None)


def make(
    names: Sequence[str],
    plan: Plan,
    model: Model,
    pruned: Model,
    calibration: Calibration,
    *,
    masks: bool = False,
    progress: Progress = _quiet,
    inputs: InputShapes | None = None,
) -> tuple[Model, list[Repair]]:
    """The pruned net after these repairs, in their order, and what each did.

    ``model`` is the net before the plan; ``masks``: the plan was applied as masks; ``inputs``: shapes of source blobs
    over what the net says.
    """
    said = []
    (images,) = calibration.images.values()
    for name in names:
        with progress(name) as step:
            errors: Mapping[str, float] = {}
            if name == "bias":
                made = repair.compensate(
                    plan, model, pruned, images, mask_only=masks, threads=calibration.threads, step=step,
                    peers=calibration.peers,
                )  # fmt: skip
            elif name == "bn":
                made = repair.reestimate(
                    pruned, images, threads=calibration.threads, step=step, peers=calibration.peers
                )
            else:
                made, errors = _fitted(plan, model, pruned, calibration, step, inputs)
        pruned = made.model
        said.append(Repair(name, made.changed, made.kept, errors))
    return pruned, said


def _fitted(
    plan: Plan, model: Model, pruned: Model, calibration: Calibration, step: Callable[[int], None],
    inputs: InputShapes | None,
) -> tuple[repair.Repaired, Mapping[str, float]]:  # fmt: skip
    known = {name: (1, *array.shape[1:]) for name, array in calibration.images.items()}
    shapes = source_shapes(model, {**known, **(inputs or {})})
    coupling = find(model, shapes)
    gone = coupling.removed(plan.keep)
    rows: dict[str, np.ndarray] = {name: ~removed_places(gone, ids) for name, ids in coupling.filters.items()}
    found = refit(model, pruned, rows, repair.readers(coupling, gone), calibration, step, shapes)
    errors = {name: error for name, error in found.errors.items() if error is not None}
    return repair.Repaired(found.model, tuple(found.errors), found.kept), errors
