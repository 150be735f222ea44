"""One plan for both: a net is pruned, and what is left is decomposed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from caffe_proto.errors import PlanError, UsageError
from caffe_proto.model import Model
from caffe_proto.plan import VERSION, read_json
from caffe_proto.shape_inference import InputShapes
from lra import applier as decomposing
from lra.plan import Plan as DecompositionPlan
from lra.planner import make_plan

from . import applier as pruning
from .plan import Plan


@dataclass(frozen=True)
class Joint:
    """What goes first, and what becomes of what is left. The second plan bears no hash: it is for the pruned net."""

    prune: Plan
    decompose: DecompositionPlan

    def to_json(self) -> str:
        """The file's text: deterministic, one layer a line."""
        parts = {"prune": self.prune.to_json(), "decompose": self.decompose.to_json()}
        body = ",\n".join(f' "{name}": {_indented(part)}' for name, part in parts.items())
        return f'{{\n "caffe-lra plan": {VERSION},\n{body}\n}}\n'

    @classmethod
    def from_json(cls, source: str, path: object = None) -> Joint:
        """Read a plan file that holds both; raises PlanError where it does not."""
        value = read_json(source, path)
        if not isinstance(value.get("prune"), dict) or not isinstance(value.get("decompose"), dict):
            raise PlanError('"prune" and "decompose" must be plans', path=path)
        return cls(
            Plan.from_json(json.dumps(value["prune"]), path),
            DecompositionPlan.from_json(json.dumps(value["decompose"]), path),
        )


def _indented(source: str) -> str:
    return source.rstrip().replace("\n", "\n ")


def prunes(source: str, path: object = None) -> str | None:
    """Whether a plan file's text is about pruning: "prune", "both", or None where it is not."""
    value = read_json(source, path)
    if "prune" in value:
        return "both"
    layers = value.get("layers", value)
    return "prune" if isinstance(layers, dict) and any(map(_keeps, layers.values())) else None


def _keeps(entry: Any) -> bool:
    return isinstance(entry, list) or (isinstance(entry, Mapping) and "keep" in entry)


def check_kind(source: str, wanted: str, path: object = None) -> None:
    """Raise PlanError where a plan file is of another kind than ``wanted``, "prune" or "decompose"."""
    kind = prunes(source, path)
    value = read_json(source, path)
    if kind == "both":
        raise PlanError(
            "is a plan that prunes a net and decomposes what is left",
            path=path,
            hint="caffe-lra apply PLAN NET WEIGHTS -o PREFIX makes both of it",
        )
    if kind == "prune" and wanted == "decompose":
        raise PlanError(
            "is a plan that prunes",
            path=path,
            hint="caffe-lra prune NET WEIGHTS --plan PLAN -o PREFIX applies it, to a train_val caffe-lra apply",
        )
    if kind is None and wanted == "prune" and value.get("layers", value):
        raise PlanError(
            "is a plan that decomposes",
            path=path,
            hint="caffe-lra decompose NET WEIGHTS --plan PLAN -o PREFIX applies it, to a train_val caffe-lra apply",
        )


def decompose_rest(
    pruned: Model, macs: tuple[int, int], speedup: float, input_shapes: InputShapes | None = None
) -> tuple[DecompositionPlan, Model, decomposing.Report]:
    """Decompose a pruned net, by its weights, until the whole is ``speedup`` times cheaper than before pruning.

    ``macs``: before and after pruning. Raises UsageError where pruning alone has reached it.
    """
    rest = speedup * macs[1] / macs[0]
    if rest <= 1:
        raise UsageError(
            f"pruning alone makes it {macs[0] / macs[1]:.3g} times cheaper, nothing is left to decompose for"
            f" {speedup:g}",
            hint="prune less, or ask for more",
        )
    plan = replace(make_plan(pruned, speedup=rest, input_shapes=input_shapes), net="", weights="")
    changed, report = decomposing.apply(plan, pruned, input_shapes=input_shapes)
    return plan, changed, report


def apply(
    joint: Joint,
    model: Model,
    *,
    force: bool = False,
    input_shapes: InputShapes | None = None,
    between: Callable[[Model], Model] = lambda pruned: pruned,
) -> tuple[Model, pruning.Report, decomposing.Report]:
    """Prune a net, or a sibling of it, and decompose what is left; ``between`` repairs the pruned net."""
    pruned, first = pruning.apply(joint.prune, model, force=force, sibling=True, input_shapes=input_shapes)
    shapes = pruning.source_shapes(model, {**joint.prune.inputs, **(input_shapes or {})})
    changed, second = decomposing.apply(
        joint.decompose, between(pruned), force=force, sibling=True, input_shapes=shapes
    )
    return changed, first, second
