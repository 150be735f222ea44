"""From a plan and images to fitted chains: which steps are free, and how their numbers come back to the file.

The first step of a chain is kept as the weights give it; what reads it is fitted: H of a V/H pair, the 1 x 1 layer
behind filters. The response scheme starts from the whole layer, and a low-rank map of its responses splits it. Fitting happens behind BatchNorm and Scale, ``scale*y + shift``,
and is undone from there, so those layers stay in the net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import nonlinear
from .calibration import Calibration
from .decomposition import Decomposition, Step
from .following import Following
from .linalg import AffineMap
from .plan import LayerPlan, Plan
from .responses import Fitted, Job, Samples
from .schemes import ALL_SCHEMES, response
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


def sample_spectra(
    found: Found, spectra: Spectra, targets: Sequence[Target], calibration: Calibration
) -> None:
    """Put the PCA energies of responses into ``spectra``, from one pass of the net over the images."""
    walker = calibration.walker(found)
    for name, samples in walker.sample(targets).items():
        target = found.targets[name]
        behind = walker.behind(target)
        weight = target.kernel(found.blobs[target.index][0])
        responses = samples.responses * behind.scale + behind.shift
        spectra.put(target, response.RESPONSE, response.ResponseSpectrum(weight, target.geometry, responses))


def _job(found: Found, spectra: Spectra, target: Target, entry: LayerPlan) -> Job:
    if entry.scheme == response.RESPONSE.name:
        start = _whole(target, target.kernel(found.blobs[target.index][0]))
    else:
        start = spectra.get(target, ALL_SCHEMES[entry.scheme]).factor(entry.ranks[0])
    return Job(target, start, entry.scheme, entry.ranks)


def _whole(target: Target, weight: Array) -> Decomposition:
    """The layer itself, without its bias, and a 1 x 1 layer that hands its responses through."""
    g = target.geometry
    first = Step("_lowrank", np.asarray(weight, np.float64), None, g.stride, g.pad, g.dilation, g.group)
    identity = np.concatenate([np.eye(len(weight) // g.group)] * g.group)[:, :, None, None]
    return Decomposition((first, Step("_linear", identity, None, group=g.group)))


def solve(features: Array, job: Job, behind: Following, samples: Samples, shortcut: Array | None) -> Fitted:
    """Fit the second step of a chain, group by group, to ``act(scale*y + shift + shortcut)`` of the original."""
    first, second = job.start.steps
    scale = np.where(
        behind.scale == 0, 1.0, behind.scale
    )  # a dead channel is multiplied by 0 whatever is fitted
    target = samples.responses * behind.scale + behind.shift
    if samples.shortcut is not None:
        target += samples.shortcut
    low = job.scheme == response.RESPONSE.name
    fits: list[nonlinear.Fit] = []
    rows_of = np.split(np.arange(second.shape[0]), second.group)
    for taken, rows in zip(np.split(features, second.group, axis=1), rows_of, strict=True):
        fit = nonlinear.fit_features(
            taken.reshape(len(taken), -1),
            target[:, rows],
            job.ranks[0] // second.group if low else None,
            prior=(second.weight[rows] * behind.scale[rows, None, None, None]).reshape(len(rows), -1),
            shortcut=None if shortcut is None else shortcut[:, rows],
            holdout=HELD_OUT,
            **_activation(behind, rows),
        )
        fits.append(fit)
    bias = (np.concatenate([fit.b for fit in fits]) - behind.shift) / scale
    error = float(
        np.sqrt(sum(fit.loss * fit.total for fit in fits) / (sum(fit.total for fit in fits) or 1.0))
    )
    if low:
        P = np.concatenate([fit.P for fit in fits]) / scale[:, None]
        mapping = AffineMap(P, np.concatenate([fit.Q for fit in fits]), bias)
        return Fitted(response.factor(first.weight, None, job.target.geometry, mapping), error)
    weight = (
        np.concatenate([fit.matrix for fit in fits]).reshape(second.weight.shape) / scale[:, None, None, None]
    )
    step = Step(second.suffix, weight, bias, second.stride, second.pad, second.dilation, second.group)
    return Fitted(Decomposition((first, step)), error)


def _activation(behind: Following, rows: Array) -> Any:
    """The solver's words for what follows: nothing, a plain ReLU, or slopes."""
    if behind.slope is None:
        return {"activation": "none"}
    if not behind.slope.any():
        return {"activation": "relu"}
    return {"activation": "prelu", "slope": behind.slope[rows]}
