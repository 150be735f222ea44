"""From a plan and images to fitted chains: which steps are free, and how their numbers come back to the file.

The first step of a chain is kept as the weights give it; what reads it is fitted: H of a V/H pair in full, or of
low rank as H' and P; the 1 x 1 layer behind filters. Fitting happens behind BatchNorm and Scale, ``scale*y + shift``,
and is undone from there, so those layers stay in the net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import nonlinear
from .calibration import Calibration
from .decomposition import Decomposition, Step
from .following import Following
from .plan import LayerPlan, Plan
from .responses import Fitted, Job, Samples
from .schemes import SCHEMES
from .targets import Found, Spectra, Target

Array = np.ndarray

HELD_OUT = 0.1  # of the samples, the last images: they choose the iterate and give the error


def fit_layers(
    plan: Plan, found: Found, spectra: Spectra, calibration: Calibration, step: Callable[[], None]
) -> dict[str, Fitted]:
    """Fit every layer of the plan that can be fitted, shallow to deep; the others are left to their weights."""
    jobs = [
        _job(found, spectra, found.targets[name], entry)
        for name, entry in plan.layers.items()
        if name in found.targets and can_fit(found, found.targets[name])
    ]
    walker = calibration.walker(found, step)
    samples = walker.sample([job.target for job in jobs])
    return walker.fit(jobs, samples, solve)


def can_fit(found: Found, target: Target) -> bool:
    """Whether a layer's responses can be sampled: a convolution of known shape with one bottom."""
    node = found.shaped.graph.nodes[target.index]
    return not target.dense and target.in_hw is not None and len(node.inputs) == 1


def _job(found: Found, spectra: Spectra, target: Target, entry: LayerPlan) -> Job:
    start = spectra.get(target, SCHEMES[entry.scheme]).factor(entry.ranks[0])
    return Job(target, start, entry.scheme, entry.ranks)


def solve(features: Array, job: Job, behind: Following, samples: Samples, shortcut: Array | None) -> Fitted:
    """Fit the second step of a chain, group by group, to ``act(scale*y + shift + shortcut)`` of the original."""
    first, second = job.start.steps
    scale = np.where(
        behind.scale == 0, 1.0, behind.scale
    )  # a dead channel: whatever is fitted is multiplied by 0
    target = samples.responses * behind.scale + behind.shift
    if samples.shortcut is not None:
        target += samples.shortcut
    weight, bias = np.empty(second.weight.shape), np.empty(second.shape[0])
    losses, sizes = [], []
    rows_of = np.split(np.arange(len(bias)), second.group)
    for taken, rows in zip(np.split(features, second.group, axis=1), rows_of, strict=True):
        prior = (second.weight[rows] * behind.scale[rows, None, None, None]).reshape(len(rows), -1)
        fit = nonlinear.fit_features(
            taken.reshape(len(taken), -1),
            target[:, rows],
            prior=prior,
            shortcut=None if shortcut is None else shortcut[:, rows],
            holdout=HELD_OUT,
            **_activation(behind, rows),
        )
        weight[rows] = fit.matrix.reshape(len(rows), *weight.shape[1:])
        bias[rows] = fit.b
        losses.append(fit.loss)
        sizes.append(float(np.square(target[:, rows]).sum()))
    weight /= scale[:, None, None, None]
    bias = (bias - behind.shift) / scale
    step = Step(second.suffix, weight, bias, second.stride, second.pad, second.dilation, second.group)
    return Fitted(Decomposition((first, step)), float(np.sqrt(np.average(losses, weights=sizes))))


def _activation(behind: Following, rows: Array) -> Any:
    """The solver's words for what follows: nothing, a plain ReLU, or slopes."""
    if behind.slope is None:
        return {"activation": "none"}
    if not behind.slope.any():
        return {"activation": "relu"}
    return {"activation": "prelu", "slope": behind.slope[rows]}
