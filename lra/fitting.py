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
from caffe_proto.graph import Graph, Node

from . import jobs, nonlinear
from .calibration import HELD_OUT, Calibration
from .following import Following
from .linalg import RIDGE, AffineMap
from .plan import Plan
from .responses import Fitted, Job, Samples, Ticks, relative_error
from .schemes import response
from .targets import Found, Spectra, Target

Array = np.ndarray

FEW = (1e-4, 1e-2, 1.0)  # ridges tried too where samples are few:
FEW_FOR = 2  # fewer than so many an unknown
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
    Several processes fit what the first one has planned.

    Raises UsageError where a layer cannot have the ranks planned, FileError where the disk is full.
    """
    plan = calibration.peers.told(lambda: plan)
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
    work, short = [], []
    for name, target in targets.items():
        count = len(samples[name].responses)
        try:
            work.append(jobs.job(found, spectra, target, plan.layers[name], round(count * (1 - HELD_OUT))))
        except ValueError as error:
            raise UsageError(str(error), path=found.model.net.path, layer=name) from None
        if count * (1 - HELD_OUT) < work[-1].free.weight[0].size:
            short.append(name)
    warnings: tuple[str, ...] = ()
    if short:
        named = ", ".join(short[:3]) + (f" and {len(short) - 3} more" if len(short) > 3 else "")
        warnings = (
            f"{named}: fewer samples than unknowns an output, the weights decide the rest; "
            "more --n-images or --positions would help",
        )
    for name, target in targets.items():
        other = walker.behind(target).passed_over
        if other:
            warnings += (f"{name}: followed by {other}, which no fit knows: fitted in front of it",)
    solver = str(plan.target.get("solver", SOLVERS[0]))

    def solve(*what: Any) -> Fitted:
        return solve_layer(*what, linear=solver == "linear")

    symmetric = solver == "symmetric"
    fitted = walker.fit(work, samples, solve, calibration.stage, key, step, symmetric=symmetric)
    calibration.fitted[key] = Fits(fitted, warnings)
    return calibration.fitted[key]


def output_error(fits: Fits, found: Found, calibration: Calibration) -> float:
    """``|y' - y|^2 / |y - mean y|^2`` of the outputs over the held-out images, y' of the net with the fitted layers."""
    some = calibration.walker(found).last(max(1, round(calibration.count * HELD_OUT)))
    chains = {name: fitted.chain for name, fitted in fits.layers.items()}
    made, reference = some.replay(chains, list(found.targets.values())), some.replay({}, ())
    return relative_error(made, reference, some.shared.peers.sum)


def ticks(plan: Plan, calibration: Calibration) -> int:
    """How many images `fit_layers` reports: one pass of the original net, and one for each layer."""
    return calibration.count * (1 + len(plan.layers))


def _key(plan: Plan, found: Found, calibration: Calibration) -> str:
    """What a fit depends on."""
    layers = {name: [entry.scheme, *entry.ranks] for name, entry in plan.layers.items()}
    said = json.dumps([calibration.key(found), layers, plan.target.get("solver")], sort_keys=True)
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
    shared = _shared(graph, node)
    if shared is not None:
        return f"it cannot be fitted to images: it shares its {shared}"
    blocker = _blocker(found, graph, target)
    if blocker is not None:
        return f'it cannot be fitted to images: layer "{blocker}" before it cannot be run image by image'
    return None


def _shared(graph: Graph, node: Node) -> str | None:
    """What of a layer other layers learn too, by its name."""
    others = {spec.name for other in graph.nodes if other is not node for spec in other.layer.param_specs}
    for what, spec in zip(("weight", "bias"), node.layer.param_specs, strict=False):
        if spec.name and spec.name in others:
            return f'{what} "{spec.name}"'
    return None


def _blocker(found: Found, graph: Graph, target: Target) -> str | None:
    """The first layer in front of this one that cannot be run image by image."""
    for index in sorted(graph.needed(graph.nodes[target.index].inputs)):
        if index not in found.by_image:
            return f"{graph.nodes[index].name} ({graph.nodes[index].layer.type})"
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


def solve_layer(
    features: Array,
    job: Job,
    behind: Following,
    samples: Samples,
    shortcut: Array | None,
    *,
    linear: bool = False,
) -> Fitted:
    """Fit the free step of a chain, group by group, to ``act(scale*y + shift + shortcut)`` of the original.

    Where samples are few the strength of the ridge is chosen by those held out. A layer that is left whole keeps
    its numbers where they do better on those.
    """
    free = job.free
    scale = np.where(
        behind.scale == 0, 1.0, behind.scale
    )  # a dead channel is multiplied by 0 whatever is fitted
    target = samples.responses * behind.scale + behind.shift
    if samples.shortcut is not None:
        target += samples.shortcut
    fits: list[nonlinear.Fit] = []
    judged = len(features) >= 2 / HELD_OUT
    rows_of = np.split(np.arange(free.shape[0]), free.group)
    for taken, rows in zip(np.split(features, free.group, axis=1), rows_of, strict=True):
        options: Any = _activation(behind, rows) | ({"schedule": ()} if linear else {})
        flat = taken.reshape(len(taken), -1)
        few = judged and len(flat) * (1 - HELD_OUT) < FEW_FOR * flat.shape[1]
        tried = [
            nonlinear.fit_features(
                flat,
                target[:, rows],
                None if job.rank is None else job.rank // free.group,
                prior=(free.weight[rows] * behind.scale[rows, None, None, None]).reshape(len(rows), -1),
                shortcut=None if shortcut is None else shortcut[:, rows],
                holdout=HELD_OUT if judged else None,
                ridge=ridge,
                **options,
            )
            for ridge in (RIDGE, *(FEW if few else ()))
        ]
        fits.append(min(tried, key=lambda fit: fit.loss))
    total = sum(fit.total for fit in fits)
    error = float(np.sqrt(sum(fit.loss * fit.total for fit in fits) / (total or 1.0)))
    bias = (np.concatenate([fit.b for fit in fits]) - behind.shift) / scale
    P = np.concatenate([fit.P for fit in fits]) / scale[:, None]
    mapping = AffineMap(P, np.concatenate([fit.Q for fit in fits]), bias)
    if job.own is not None and judged:
        own = _own(job)
        own_error = _held_out_error(own, features, job, behind, target, shortcut)
        mapping, error = (own, own_error) if own_error <= error else (mapping, error)
    return Fitted(job.build(mapping), error if judged else None)


def _own(job: Job) -> AffineMap:
    """The map that leaves a whole layer as it is."""
    assert job.own is not None
    parts = np.split(job.free.weight, job.free.group)
    Q = np.concatenate([part.reshape(len(part), -1).T for part in parts])
    return AffineMap(np.concatenate([np.eye(len(part)) for part in parts]), Q, job.own)


def _held_out_error(
    mapping: AffineMap, features: Array, job: Job, behind: Following, target: Array, shortcut: Array | None
) -> float:
    """Relative error of a map on the samples held out, as `nonlinear.fit_features` gives it."""
    held = slice(len(features) - round(HELD_OUT * len(features)), None)
    group = job.free.group
    blocks = [np.split(part, group) for part in (mapping.P, mapping.Q)]
    seen = np.split(features[held], group, axis=1)
    made = [taken.reshape(len(taken), -1) @ Q @ P.T for taken, P, Q in zip(seen, *blocks, strict=True)]
    predicted = (np.concatenate(made, axis=1) + mapping.b) * behind.scale + behind.shift
    if shortcut is not None:
        predicted += shortcut[held]
    wanted = _activated(target[held], behind)
    return float(np.linalg.norm(_activated(predicted, behind) - wanted) / (np.linalg.norm(wanted) or 1.0))


def _activated(values: Array, behind: Following) -> Array:
    return values if behind.slope is None else np.where(values > 0, values, values * behind.slope)


def _activation(behind: Following, rows: Array) -> dict[str, Any]:
    """The solver's words for what follows: nothing, a plain ReLU, or slopes."""
    if behind.slope is None:
        return {"activation": "none"}
    if not behind.slope.any():
        return {"activation": "relu"}
    return {"activation": "prelu", "slope": behind.slope[rows]}
