"""From a plan and images to fitted chains, and how their numbers come back to the file.

Fitting happens behind BatchNorm and Scale, ``scale*y + shift``, and is undone from there, so those layers stay
in the net.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from caffe_proto.errors import UsageError
from caffe_proto.graph import Graph

from . import jobs, nonlinear
from .calibration import Calibration
from .following import Following
from .linalg import AffineMap
from .plan import Plan
from .responses import Fitted, Job, Samples, Ticks
from .schemes import response
from .targets import Found, Spectra, Target

Array = np.ndarray

HELD_OUT = 0.1  # of the samples, the last images: they choose the iterate and give the error
SOLVERS = ("asymmetric", "symmetric", "linear")


@dataclass(frozen=True, eq=False)
class Fits:
    """Fitted layers by name, and what the user should know of them."""

    layers: Mapping[str, Fitted]
    warnings: tuple[str, ...] = ()


def fit_layers(
    plan: Plan,
    found: Found,
    spectra: Spectra,
    calibration: Calibration,
    step: Ticks = lambda _images: None,
) -> Fits:
    """Fit every layer of the plan that can be fitted, shallow to deep; the others are left to their weights.

    ``step`` is told of images done, `ticks` in all. What was fitted before, by this plan, is not fitted again.

    Raises UsageError where a layer cannot have the ranks planned, FileError where the disk is full.
    """
    targets = {
        name: found.targets[name]
        for name in plan.layers
        if name in found.targets and unfit(found, found.targets[name]) is None
    }
    key = _key(plan, found, calibration)
    if key in calibration.fitted:
        step(ticks(plan, calibration))
        return calibration.fitted[key]
    walker = calibration.walker(found)
    samples = walker.sample(list(targets.values()), calibration.stage, calibration.key(found), step)
    work, warnings = [], []
    for name, target in targets.items():
        count = len(samples[name].responses)
        try:
            work.append(jobs.job(found, spectra, target, plan.layers[name], round(count * (1 - HELD_OUT))))
        except ValueError as error:
            raise UsageError(str(error), path=found.model.net.path, layer=name) from None
        unknowns = work[-1].free.weight[0].size
        if count * (1 - HELD_OUT) < unknowns:
            warnings.append(
                f'layer "{name}": {count} samples for {unknowns} unknowns an output, the weights decide the rest; '
                "more --n-images or --positions would help"
            )
    solver = str(plan.target.get("solver", SOLVERS[0]))

    def solve(*what: Any) -> Fitted:
        return _solve(*what, linear=solver == "linear")

    symmetric = solver == "symmetric"
    fitted = walker.fit(work, samples, solve, calibration.stage, key, step, symmetric=symmetric)
    calibration.fitted[key] = Fits(fitted, tuple(warnings))
    return calibration.fitted[key]


def ticks(plan: Plan, calibration: Calibration) -> int:
    """How many images `fit_layers` reports: one pass of the original net, and one for each layer."""
    return calibration.count * (1 + len(plan.layers))


def _key(plan: Plan, found: Found, calibration: Calibration) -> str:
    """What a fit depends on."""
    layers = {name: [entry.scheme, *entry.ranks] for name, entry in plan.layers.items()}
    said = json.dumps([calibration.key(found), layers, plan.target.get("solver")])
    return hashlib.sha256(said.encode()).hexdigest()


def unfit(found: Found, target: Target) -> str | None:
    """Why a layer's responses cannot be sampled; None where they can."""
    graph = found.shaped.graph
    node = graph.nodes[target.index]
    if target.in_hw is None:
        blocker = _blocker(found, graph, target)
        behind = f', behind layer "{blocker}"' if blocker else ""
        return f"it cannot be fitted to images: its input shape is not known{behind}"
    if len(node.inputs) != 1:
        return f"it cannot be fitted to images: it has {len(node.inputs)} inputs"
    if target.dense and len(found.shaped.tops(target.index)[0]) != 2:
        return "it cannot be fitted to images: it works at several places of each image"
    if target.shared and sum(other.shared == target.shared for other in found.targets.values()) > 1:
        return f'it cannot be fitted to images: it shares its weight "{target.shared}"'
    blocker = _blocker(found, graph, target)
    if blocker is not None:
        return f'it cannot be fitted to images: layer "{blocker}" before it cannot be run'
    return None


def _blocker(found: Found, graph: Graph, target: Target) -> str | None:
    """The first layer in front of this one that cannot be run."""
    for index in sorted(graph.needed(graph.nodes[target.index].inputs)):
        node = graph.nodes[index]
        runs = node.spec is not None and (node.spec.source or node.spec.onnx is not None)
        if node.problem is not None or not runs or index in found.shaped.unknown:
            return f"{node.name} ({node.layer.type})"
    return None


def sample_spectra(
    found: Found, spectra: Spectra, targets: Sequence[Target], calibration: Calibration, step: Ticks
) -> None:
    """Put the PCA energies of responses into ``spectra``, from one pass of the net over the images."""
    walker = calibration.walker(found)
    for name, samples in walker.sample(targets, calibration.stage, calibration.key(found), step).items():
        target = found.targets[name]
        behind = walker.behind(target)
        weight = target.kernel(found.blobs[target.index][0])
        responses = samples.responses * behind.scale + behind.shift
        spectra.put(target, response.RESPONSE, response.ResponseSpectrum(weight, target.geometry, responses))


def _solve(
    features: Array, job: Job, behind: Following, samples: Samples, shortcut: Array | None, *, linear: bool
) -> Fitted:
    """Fit the free step of a chain, group by group, to ``act(scale*y + shift + shortcut)`` of the original."""
    free = job.free
    scale = np.where(
        behind.scale == 0, 1.0, behind.scale
    )  # a dead channel is multiplied by 0 whatever is fitted
    target = samples.responses * behind.scale + behind.shift
    if samples.shortcut is not None:
        target += samples.shortcut
    fits: list[nonlinear.Fit] = []
    rows_of = np.split(np.arange(free.shape[0]), free.group)
    for taken, rows in zip(np.split(features, free.group, axis=1), rows_of, strict=True):
        options: Any = _activation(behind, rows) | ({"schedule": ()} if linear else {})
        fit = nonlinear.fit_features(
            taken.reshape(len(taken), -1),
            target[:, rows],
            None if job.rank is None else job.rank // free.group,
            prior=(free.weight[rows] * behind.scale[rows, None, None, None]).reshape(len(rows), -1),
            shortcut=None if shortcut is None else shortcut[:, rows],
            holdout=HELD_OUT if len(taken) >= 2 / HELD_OUT else None,
            **options,
        )
        fits.append(fit)
    total = sum(fit.total for fit in fits)
    error = float(np.sqrt(sum(fit.loss * fit.total for fit in fits) / (total or 1.0)))
    bias = (np.concatenate([fit.b for fit in fits]) - behind.shift) / scale
    P = np.concatenate([fit.P for fit in fits]) / scale[:, None]
    return Fitted(job.build(AffineMap(P, np.concatenate([fit.Q for fit in fits]), bias)), error)


def _activation(behind: Following, rows: Array) -> dict[str, Any]:
    """The solver's words for what follows: nothing, a plain ReLU, or slopes."""
    if behind.slope is None:
        return {"activation": "none"}
    if not behind.slope.any():
        return {"activation": "relu"}
    return {"activation": "prelu", "slope": behind.slope[rows]}
