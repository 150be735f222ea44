"""Asymmetric 3-D scheme: kh x 1, then 1 x kw, then 1 x 1; the first two split the filters, all are refitted.

V (rank d'') and H stand for the filters by the spatial SVD, see `spatial`; a map of the responses of H, or of
the features that V gives, then turns H into H' (rank d') and P. Needs data, so it is not among `SCHEMES`.

Reference: Zhang et al. 2015, arXiv:1505.06798, section on the combination with spatial decomposition.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..decomposition import Decomposition, Geometry, Pair, Shape, Step, StepShape
from ..linalg import AffineMap
from . import response, spatial
from .base import Scheme, check_rank

Ranks = Pair  # (d'', d'), both over all groups


def structure(shape: Shape, geometry: Geometry, ranks: Ranks, merge: bool = True) -> tuple[StepShape, ...]:
    """Shapes of the chain ``_v`` (kh x 1), ``_h`` (1 x kw), ``_linear`` (1 x 1), at total ranks (d'', d').

    Where `merges` says so, and `merge` is left on, ``_h`` and ``_linear`` are one ``_h`` with all outputs.
    Strides, pads and dilations as in `spatial.structure`.

    MACs at stride 1, a position and group, with all of them a group: ``in kh d'' + kw d'' d' + d' out``.

    Raises:
        ValueError: a rank is no positive multiple of the groups, d'' above that of `spatial`, or d' above out.
    """
    vertical, horizontal = spatial.structure(shape, geometry, ranks[0])
    return vertical, *_behind(horizontal, ranks[1], merge)


def merges(shape: Shape, group: int, ranks: Ranks) -> bool:
    """Whether H' and P are no cheaper than their product: ``d' (kw d'' + out) >= kw d'' out``, a group."""
    inner, outer, out = ranks[0] // group, ranks[1] // group, shape[0] // group
    return outer * (shape[3] * inner + out) >= shape[3] * inner * out


def factor(
    pair: Decomposition, bias: NDArray[Any] | None, mapping: AffineMap, merge: bool = True
) -> Decomposition:
    """V, H', P from V, H and a map of the responses of H: ``H' = Q^T H``, P with ``b + P Q^T w0``.

    Args:
        pair: V and H, as `spatial.spectrum(...).factor` gives them; biases are not read.
        bias: w0 (out,), where the map was fitted to responses that include it; None where they do not.
        mapping: P and Q (out, d'/group), b (out,), groups as in `linalg.by_group`.
        merge: as in `structure`.

    Raises:
        ValueError: shapes do not fit, or the pair is none.
    """
    horizontal = _second(pair)
    g = horizontal.group
    out = len(horizontal.weight)
    response.check_map(mapping, out, out, g)
    parts = zip(np.split(mapping.Q, g), np.split(horizontal.weight.reshape(out, -1), g), strict=True)
    Q = np.concatenate([kernel.T @ Q for Q, kernel in parts])  # (group·d''/group·kw, d'/group)
    shifted = response.shifted_bias(mapping, bias, g)
    return factor_features(pair, AffineMap(mapping.P, Q, shifted), merge)


def factor_features(pair: Decomposition, mapping: AffineMap, merge: bool = True) -> Decomposition:
    """V, H', P from V and a map of the features that V gives: ``H' = Q^T``.

    Features of an output position are what its 1 x kw window sees of V's maps, ``[r, w]``, r slowest; with
    groups those of a group lie together. With P = I, a full-rank fit, the result is V and H refitted.

    Args:
        pair: V and H; of H only the shape is read.
        mapping: P (out, d'/group), Q (d''*kw, d'/group), b (out,), groups as in `linalg.by_group`.
        merge: as in `structure`.

    Raises:
        ValueError: shapes do not fit, or the pair is none.
    """
    vertical, horizontal = pair.steps[0], _second(pair)
    g = horizontal.group
    out, depth, _, width = horizontal.shape
    response.check_map(mapping, out, depth * g * width, g)
    shapes = _behind(horizontal, mapping.P.shape[1] * g, merge)
    blocks = [Q.T for Q in np.split(mapping.Q, g)]  # H' of each group, (d'/group, d''/group·kw)
    if len(shapes) == 1:
        weights = [[P @ H for P, H in zip(np.split(mapping.P, g), blocks, strict=True)]]
    else:
        weights = [blocks, [mapping.P]]
    biases = [None] * (len(shapes) - 1) + [np.array(mapping.b)]
    steps = zip(shapes, map(np.concatenate, weights), biases, strict=True)
    return Decomposition((vertical, *(response.step(*one) for one in steps)))


def vertical_rank(
    shape: Shape, group: int, rank: int, speedup: float, rule: Literal["budget", "literal"] = "budget"
) -> int:
    """Rank d'' that goes with d' so that both splits together make a layer `speedup` times cheaper.

    d' is chosen for the root s of the speed-up, see `response.speedup_rank`. "literal", as the paper words
    it: the kh x kw layer of d' filters becomes s times cheaper, its 1 x 1 layer not,
    ``d'' = kh kw in d' / (s (kh in + kw d'))``. "budget": that pair of layers becomes s times cheaper,
    ``d'' = (d' (kh kw in + out) / s - d' out) / (kh in + kw d')``. Floors, with in, out and the ranks those
    of a group.

    Args:
        shape: (out, in/group, kh, kw).
        group: of the layer.
        rank: d', over all groups.
        speedup: of the whole layer, at least 1.
        rule: "budget" or "literal".

    Returns:
        d'' over all groups, at most that of `spatial`; 0 where the rule leaves none.

    Raises:
        ValueError: no such rule, a speed-up below 1, or an impossible rank.
    """
    if rule not in ("budget", "literal"):
        raise ValueError(f'rule {rule!r} is neither "budget" nor "literal"')
    if not speedup >= 1:
        raise ValueError(f"speed-up {speedup:g} is below 1")
    check_rank(rank, group, response.max_rank(shape, group))
    out, depth, height, width = shape
    outer, taps, root = rank // group, depth * height * width, math.sqrt(speedup)
    mixing = outer * (out // group)  # MACs of the 1 x 1 layer
    left = (outer * taps + mixing) / root - mixing if rule == "budget" else outer * taps / root
    inner = math.floor(left / (height * depth + width * outer))
    return min(max(inner, 0) * group, spatial.max_rank(shape, group))


def _behind(horizontal: Step | StepShape, rank: int, merge: bool) -> tuple[StepShape, ...]:
    """Shapes of what follows V at rank d', from the shape of H: ``_h`` and ``_linear``, or both in one."""
    out, depth, _, width = horizontal.shape
    g = horizontal.group
    check_rank(rank, g, response.max_rank(horizontal.shape, g))
    whole = merge and merges(horizontal.shape, g, (depth * g, rank))
    shape = (out if whole else rank, depth, 1, width)
    first = StepShape("_h", shape, horizontal.stride, horizontal.pad, horizontal.dilation, g)
    return (first,) if whole else (first, StepShape("_linear", (out, rank // g, 1, 1), group=g))


def _second(pair: Decomposition) -> Step:
    if len(pair.steps) != 2 or pair.steps[1].shape[2] != 1:
        raise ValueError("not a pair of a kh x 1 and a 1 x kw convolution")
    return pair.steps[1]


def max_rank(shape: Shape, group: int) -> int:
    """Largest rank that can stand for both, over all groups: that of `spatial`, at most out."""
    return min(spatial.max_rank(shape, group), response.max_rank(shape, group))


ASYMMETRIC_3D = Scheme("asymmetric-3d", max_rank, structure, response.no_images, n_ranks=2)
