"""What is to be fitted of a layer: from its scheme and ranks to the steps that stay, the step that is free, the map.

The first step of a chain is kept as the weights give it; what reads it is fitted: H of a V/H pair, the 1 x 1 layer
behind filters. The response scheme starts from the whole layer, and a low-rank map of its responses splits it. A
layer that is left whole can be refitted too. Where samples are few, a map of the responses, with fewer unknowns,
stands in for the free step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .decomposition import Decomposition, Geometry, Step
from .linalg import AffineMap
from .plan import REFIT, LayerPlan
from .responses import Job
from .schemes import ALL_SCHEMES, asymmetric3d, response, spatial
from .targets import Found, Spectra, Target

Array = np.ndarray

ENOUGH = 4  # samples a variable; with fewer, the free step has too many


def job(found: Found, spectra: Spectra, target: Target, entry: LayerPlan, samples: int) -> Job:
    """The job of one layer of a plan, for so many samples. Raises ValueError on impossible ranks."""
    if entry.scheme == REFIT:
        return _refit(target, found, samples)
    if entry.scheme == response.RESPONSE.name:
        return response_job(target, found, entry.ranks[0])
    if entry.scheme == asymmetric3d.ASYMMETRIC_3D.name:
        return _asymmetric(spectra, target, entry.ranks, samples)
    steps = spectra.get(target, ALL_SCHEMES[entry.scheme]).factor(entry.ranks[0]).steps
    if _enough(steps[-1], samples):
        return pair_job(target, Decomposition(steps))
    return Job(target, steps, _identity(target), None, lambda mapping: _mapped(steps, mapping))


def response_job(target: Target, found: Found, rank: int) -> Job:
    """The low-rank map of a layer's responses."""
    weight = _kernel(found, target)
    whole = _whole(target, weight, "_lowrank")
    return Job(
        target,
        (whole,),
        _identity(target),
        rank,
        lambda mapping: response.factor(weight, None, target.geometry, mapping),
    )


def pair_job(target: Target, pair: Decomposition) -> Job:
    """The full fit of the second step of a pair, whatever the samples."""
    steps = pair.steps
    return Job(target, steps[:-1], steps[-1], None, lambda mapping: _with(steps, mapping))


def cut(job: Job, rank: int) -> Job:
    """A pair's job at a smaller total rank: the leading components of every group."""
    (first,), group = job.first, job.free.group
    weight = np.concatenate([part[: rank // group] for part in np.split(first.weight, group)])
    free = replace(job.free, weight=job.free.weight[:, : rank // group])
    return pair_job(job.target, Decomposition((replace(first, weight=weight), free)))


def _kernel(found: Found, target: Target) -> Array:
    return np.asarray(target.kernel(found.blobs[target.index][0]), np.float64)


def _refit(target: Target, found: Found, samples: int) -> Job:
    weight, *biases = found.blobs[target.index]
    own = np.asarray(biases[0], np.float64).reshape(-1) if biases else np.zeros(target.shape[0])
    whole = _whole(target, np.asarray(target.kernel(weight), np.float64), "")
    if _enough(whole, samples):
        return Job(target, (), whole, None, lambda mapping: _with((whole,), mapping), own)
    return Job(target, (whole,), _identity(target), None, lambda mapping: _mapped((whole,), mapping), own)


def _asymmetric(spectra: Spectra, target: Target, ranks: Sequence[int], samples: int) -> Job:
    scheme = asymmetric3d.ASYMMETRIC_3D
    scheme.chain(target.shape, target.geometry, tuple(ranks))
    inner, outer = ranks[0], ranks[-1]
    pair = spectra.get(target, spatial.SPATIAL).factor(inner)
    whole = asymmetric3d.merges(target.shape, target.geometry.group, (inner, outer))
    rank = None if whole else outer
    if _enough(pair.steps[1], samples):
        return Job(
            target,
            pair.steps[:1],
            pair.steps[1],
            rank,
            lambda mapping: asymmetric3d.factor_features(pair, mapping),
        )
    return Job(
        target, pair.steps, _identity(target), rank, lambda mapping: asymmetric3d.factor(pair, None, mapping)
    )


def _whole(target: Target, weight: Array, suffix: str) -> Step:
    """The layer itself, without its bias."""
    g = target.geometry
    return Step(suffix, weight, None, g.stride, g.pad, g.dilation, g.group)


def _identity(target: Target) -> Step:
    """A 1 x 1 layer that hands the responses through."""
    out, group = target.shape[0], target.geometry.group
    identity = np.concatenate([np.eye(out // group)] * group)[:, :, None, None]
    return Step("_linear", identity, None, group=group)


def _enough(free: Step, samples: int) -> bool:
    """Whether so many samples determine a free step better than a map of the responses."""
    out, depth, height, width = free.shape
    unknowns = depth * height * width
    return samples >= ENOUGH * unknowns or unknowns <= out // free.group


def _with(steps: Sequence[Step], mapping: AffineMap) -> Decomposition:
    """The chain with the map, a full one, as its last step's weight and bias."""
    *first, free = steps
    parts = zip(np.split(mapping.P, free.group), np.split(mapping.Q, free.group), strict=True)
    weight = np.concatenate([P @ Q.T for P, Q in parts]).reshape(free.weight.shape)
    return Decomposition((*first, replace(free, weight=weight, bias=mapping.b)))


def _mapped(steps: Sequence[Step], mapping: AffineMap) -> Decomposition:
    """The chain with the map of its responses worked into its last step."""
    *first, last = steps
    geometry = Geometry(last.stride, last.pad, last.dilation, last.group)
    (made,) = response.absorb(last.weight, None, geometry, mapping).steps
    return Decomposition((*first, replace(made, suffix=last.suffix)))
