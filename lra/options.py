"""What can be done with a layer, priced: every treatment that is cheaper than leaving it alone, with its loss."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from . import ranks as policy
from .ranks import Option
from .schemes import Scheme, asymmetric3d, response, spatial
from .targets import Spectra, Target

Array = NDArray[np.float64]


def options(
    target: Target, scheme: Scheme, spectra: Spectra, round_to: int, same_ranks: bool
) -> list[Option]:
    """The options of one scheme, ``key = (scheme name, ranks)``; loss: -log of the energy retained.

    Asymmetric 3-D retains the product of what its two splits retain. ``same_ranks``: only those with d'' = d'.
    """
    if scheme is asymmetric3d.ASYMMETRIC_3D:
        first = policy.loss(spectra.get(target, spatial.SPATIAL).retained_curve())
        second = policy.loss(spectra.get(target, response.RESPONSE).retained_curve())
        return pairs(target, round_to, lambda inner, outer: first[inner - 1] + second[outer - 1], same_ranks)
    losses = policy.loss(spectra.get(target, scheme).retained_curve())
    return singles(target, scheme, round_to, losses)


def retained(target: Target, scheme: Scheme, spectra: Spectra, ranks: tuple[int, ...]) -> float:
    """Energy that a scheme retains of a layer at its ranks: of several splits the product."""
    parts = (spatial.SPATIAL, response.RESPONSE) if scheme is asymmetric3d.ASYMMETRIC_3D else (scheme,)
    return prod(spectra.get(target, part).retained(rank) for part, rank in zip(parts, ranks, strict=True))


def singles(target: Target, scheme: Scheme, round_to: int, losses: Array) -> list[Option]:
    """The options of a scheme of one rank; ``losses`` at 1, 2, ... components a group."""
    group, made = target.geometry.group, []
    for rank in policy.candidates(len(losses) * group, group, round_to):
        cost = target.chain_cost(scheme, rank)
        if cost >= target.macs:
            break
        made.append(Option(float(cost), float(losses[rank // group - 1]), (scheme.name, (rank,))))
    return made


def pairs(
    target: Target, round_to: int, loss: Callable[[NDArray[np.intp], NDArray[np.intp]], Array], same: bool
) -> list[Option]:
    """Options of asymmetric 3-D that no other beats in both cost and loss.

    ``loss``: components a group of V and of H', arrays that broadcast -> losses; one of the last full rank is
    that of H and P in one, which keeps all of H; where it is infinite the pair is not to be had.
    """
    shape, group = target.shape, target.geometry.group
    inner, outer = (
        np.array(policy.candidates(most, group, round_to), dtype=np.int64)
        for most in (spatial.max_rank(shape, group), shape[0])
    )
    if same:
        inner = outer = inner[np.isin(inner, outer)]
    if not inner.size:
        return []
    v, h, p = unit_costs(target)
    first, second = (inner, outer) if same else (inner[:, None], outer[None])
    split = first * v + first * second * h + second * p
    split = np.where(split < first * v + first * shape[0] * h, split, np.inf)  # else H and P are one
    if same:
        merged = inner[[asymmetric3d.merges(shape, group, (int(rank), int(rank))) for rank in inner]]
    else:
        merged = inner
    cost = np.concatenate([split.ravel(), merged * v + merged * shape[0] * h])
    full = np.full(len(merged), shape[0] // group)
    found = np.concatenate([loss(first // group, second // group).ravel(), loss(merged // group, full)])
    ranks = np.concatenate(
        [
            np.stack(np.broadcast_arrays(first, second), -1).reshape(-1, 2),
            np.stack([merged, merged if same else np.full_like(merged, shape[0])], -1),
        ]
    )
    order = np.lexsort((found, cost))
    order = order[(cost[order] < target.macs) & np.isfinite(found[order])]
    best = np.minimum.accumulate(found[order])
    order = order[np.concatenate([[True], best[1:] < best[:-1]])] if order.size else order
    name = asymmetric3d.ASYMMETRIC_3D.name
    return [
        Option(float(round(cost[i])), float(found[i]), (name, (int(a), int(b))))
        for i, (a, b) in zip(order, ranks[order], strict=True)
    ]


def unit_costs(target: Target) -> tuple[float, float, float]:
    """MACs of V a rank d'', of H a product of ranks d'' d', of P a rank d', all over all groups."""
    group = target.geometry.group
    steps = asymmetric3d.structure(target.shape, target.geometry, (group, group), merge=False)
    v, vh, vhp = (target.cost(*steps[:count]) for count in (1, 2, 3))
    return v / group, (vh - v) / group**2, (vhp - vh) / group
