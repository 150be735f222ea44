"""Nets to prune: random weights whose BatchNorm can be used, random choices, and blobs compared channel by channel."""

from __future__ import annotations

from collections.abc import Mapping

import nets
import numpy as np

from caffe_proto import net
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.runtime import session
from caffe_proto.shape_inference import infer
from caffe_proto.weights import NewEntry, Weights
from hrank import coupling
from hrank.applier import Report, apply
from hrank.coupling import Coupling, removed_places
from hrank.plan import Plan


def weights(parsed: net.Net, seed: int = 0) -> Weights:
    """Normal matrices scaled by fan-in, and vectors between 0.2 and 1.2; the same numbers for one param name."""
    shaped = infer(build(parsed))
    rng = np.random.default_rng(seed)
    shared: dict[str, np.ndarray] = {}
    entries = []
    for index, node in enumerate(shaped.graph.nodes):
        blobs = []
        for i, shape in enumerate(shaped.blobs(index)):
            specs = node.layer.param_specs
            key = (specs[i].name if i < len(specs) else "") or f"{index}/{i}"
            if key not in shared:
                shared[key] = _blob(rng, shape)
            blobs.append(shared[key].reshape(shape))
        if blobs:
            entries.append(NewEntry(node.name, tuple(blobs)))
    return Weights(entries)


def _blob(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if max(shape, default=1) == int(np.prod(shape)):  # a vector, with axes of 1 or not
        return rng.uniform(0.2, 1.2, shape).astype(np.float32)
    scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return rng.standard_normal(shape, np.float32) * scale


def model(source: str, seed: int = 0) -> Model:
    """A net with such weights, in memory."""
    parsed = net.parse(source)
    return Model(parsed, weights(parsed, seed))


def random_plan(found: Coupling, seed: int) -> Plan:
    """Between a third and nine tenths of every group that is not frozen, chosen by random scores."""
    rng = np.random.default_rng(seed)
    keep: dict[str, tuple[int, ...]] = {}
    for group in found.groups:
        if not group.frozen:
            count = max(1, int(group.channels * rng.uniform(0.33, 0.9)))
            keep.update(group.spread(group.choose(rng.standard_normal(group.channels), count)))
    return Plan.of(found, keep)


def run(one: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every blob of a net."""
    with session(one, blobs="all", threads=1) as opened:
        return opened.run(feeds)


def check_pruned_is_masked(full: Model, seed: int = 0) -> tuple[Plan, Report]:
    """What is left of every blob is what the masked net of full size has in these channels, within 1e-5."""
    found = coupling.find(full)
    plan = random_plan(found, seed)
    assert plan.layers
    pruned, report = apply(plan, full)
    masked, _ = apply(plan, full, mask_only=True)
    check_same_channels(
        found, plan, run(pruned, nets.random_feeds(full)), run(masked, nets.random_feeds(full))
    )
    return plan, report


def check_same_channels(
    found: Coupling, plan: Plan, pruned: Mapping[str, np.ndarray], full: Mapping[str, np.ndarray]
) -> None:
    """The blobs of a pruned net are the channels that stay of those of a net of full size."""
    gone = found.removed(plan.keep)
    smaller = 0
    for name, value in found.shaped.graph.final.items():
        labels, wanted = found.labels.get(value), full[name]
        if labels is not None:
            wanted = np.compress(~removed_places(gone, labels.ids), wanted, axis=labels.axis)
        assert pruned[name].shape == wanted.shape, name
        smaller += wanted.size < full[name].size
        if wanted.size:
            assert np.abs(pruned[name] - wanted).max() <= 1e-5 * np.abs(wanted).max() + 1e-30, name
    assert smaller
