"""Least-squares repair of a net that has lost channels: the layers that read them are fitted to the whole net's responses.

It lives beside the response machinery and knows nothing of pruning: given are two forms of one net, the second with
fewer channels, and which rows of each layer are left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from caffe_proto.layers.spec import Arrays
from caffe_proto.model import Model
from caffe_proto.offsets import added
from caffe_proto.rewrite import Narrow
from caffe_proto.rewrite import apply as rewrite
from caffe_proto.shape_inference import InputShapes

from .calibration import HELD_OUT, Calibration
from .decomposition import Step
from .fitting import solve_layer, unfit
from .jobs import job
from .plan import REFIT, LayerPlan
from .responses import Samples, Ticks
from .targets import Found, Spectra, Target, find

Array = np.ndarray

_MOST_READ = 8192  # numbers that one output may depend on; more take too much memory


@dataclass(frozen=True, eq=False)
class Repaired:
    """The net with fitted layers, their relative errors on held-out responses, and why others were left."""

    model: Model
    errors: dict[str, float | None]
    kept: dict[str, str]


def refit(
    model: Model,
    smaller: Model,
    rows: Mapping[str, Array],
    layers: Sequence[str],
    calibration: Calibration,
    step: Ticks = lambda _images: None,
    inputs: InputShapes | None = None,
) -> Repaired:
    """Fit ``layers`` of the smaller net to what the whole net responds, shallow to deep.

    ``min over W, b of sum |r(y) - r(W x + b)|^2 + ridge |W - W0|^2``: y are the whole net's responses in the rows
    that are left, x what the layer reads in the smaller net once the layers before are fitted, W0 its weights as
    they are, r what follows (BatchNorm and Scale, shortcut, activation). ``rows``: which outputs of a layer are
    left, (outputs,) bool; all where it is not named. ``step`` is told of images done, `ticks` in all.
    ``inputs``: shapes of source blobs that the net does not say, as a train_val.

    Reference: He et al., ICCV 2017, equation 2, and Zhang et al. 2016, equation 12.
    """
    whole, left = find(model, inputs), find(smaller, inputs)
    kept = {name: reason for name in layers if (reason := _refusal(whole, left, name)) is not None}
    targets = {name: left.targets[name] for name in layers if name not in kept}
    walker = calibration.walker(whole)
    wanted = [whole.targets[name] for name in targets]
    sampled = walker.sample(wanted, calibration.stage, calibration.key(whole), step) if wanted else {}
    samples = {name: _narrowed(found, rows.get(name)) for name, found in sampled.items()}
    spectra, entry = Spectra(left), LayerPlan(REFIT, ())
    work = [
        job(left, spectra, target, entry, round(len(samples[name].responses) * (1 - HELD_OUT)))
        for name, target in targets.items()
    ]
    fitted = {}
    if work:
        key = _key(left, targets, rows, calibration.key(whole))
        fitted = calibration.walker(left).fit(work, samples, solve_layer, calibration.stage, key, step)
    blobs, edits = dict(left.blobs), dict[str, Arrays]()
    for name, found in fitted.items():
        for index, changed in _blobs(left, blobs, targets[name], found.chain.steps[-1]).items():
            blobs[index] = edits[left.shaped.graph.nodes[index].name] = changed
    changed_model = (
        rewrite(smaller, [Narrow(name, (), made) for name, made in edits.items()]) if edits else smaller
    )
    return Repaired(changed_model, {name: found.error for name, found in fitted.items()}, kept)


def ticks(layers: Sequence[str], calibration: Calibration) -> int:
    """How many images `refit` reports: one pass of the whole net, and one for each layer."""
    return calibration.count * (1 + len(layers))


def _key(left: Found, targets: Mapping[str, Target], rows: Mapping[str, Array], whole: str) -> str:
    """What a fit depends on."""
    digest = hashlib.sha256(f"{whole} {left.model.net.text}".encode())
    for index in sorted(left.blobs):
        for blob in left.blobs[index]:
            digest.update(blob.tobytes())
    for name in targets:
        digest.update(f"{name} {np.flatnonzero(rows[name]).tolist() if name in rows else None}".encode())
    return f"repair {digest.hexdigest()}"


def _refusal(whole: Found, left: Found, name: str) -> str | None:
    """Why a layer cannot be fitted; None where it can."""
    if name not in left.targets or name not in whole.targets:
        return left.refused.get(name, "it is no convolution and not fully connected")
    target = left.targets[name]
    reason = unfit(whole, whole.targets[name]) or unfit(left, target)
    if reason is not None:
        return reason
    read = prod(target.shape[1:])
    if read > _MOST_READ:
        return f"each of its outputs reads {read:,} numbers, {_MOST_READ:,} at most are fitted"
    if added(left.shaped, left.blobs, target.index, np.zeros(target.shape[0])) is None:
        return "neither it nor the layer behind has a bias of its own"
    return None


def _narrowed(samples: Samples, rows: Array | None) -> Samples:
    """The samples of the outputs that are left."""
    if rows is None:
        return samples
    shortcut = None if samples.shortcut is None else samples.shortcut[:, rows]
    return Samples(samples.places, samples.responses[:, rows], shortcut)


def _blobs(left: Found, blobs: Mapping[int, Arrays], target: Target, step: Step) -> dict[int, Arrays]:
    """The blobs that a fitted layer changes, by node: its weight, and its bias or what stands for it behind."""
    assert step.bias is not None
    weight, *others = blobs[target.index]
    made = step.weight.reshape(step.weight.shape[:2]).T if target.transposed else step.weight
    own = (np.ascontiguousarray(made, np.float32).reshape(weight.shape), *others)
    known = {**blobs, target.index: own}
    delta = step.bias - others[0].reshape(-1) if others else step.bias
    put = added(left.shaped, known, target.index, delta)
    assert put is not None
    return {target.index: own, put[0]: put[1]}
