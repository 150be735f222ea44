"""Sparsity of filters: penalties and their steps, masks of magnitude, what zeros are worth, and their removal.

What takes a blob takes NumPy arrays and torch tensors alike, see `lra.filters`.

Reference: Wen et al. 2016, arXiv:1608.03665 (structured sparsity); Han et al. 2015, arXiv:1506.02626 (masks).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .decomposition import Decomposition, Step
from .filters import PLAIN, Layout

Key = TypeVar("Key", bound=Hashable)

# Axes of (groups, filters, channels, taps) over which the weights of one structure lie.
STRUCTURES: dict[str, tuple[int, ...]] = {"element": (), "filter": (2, 3), "channel": (1, 3), "shape": (1,)}


def penalty(blob: Any, structure: str = "element", layout: Layout = PLAIN) -> Any:
    """L1 norm, or the group lasso: ``sum_s |W_s|_2`` over the structures of a blob, a number.

    element: single weights, so the L1 norm; filter: ``W[o, :, :, :]``, a row of the lowered matrix; channel:
    ``W[:, i, :, :]``; shape: ``W[:, i, h, w]``, a column of it. Channels and shapes are those of one group.

    Raises:
        ValueError: an unknown structure, or a blob that the layout does not fit.

    Reference: Wen et al. 2016, arXiv:1608.03665, equations 2 to 4.
    """
    return _norms(layout.split(blob), structure).sum()


def subgradient(blob: Any, structure: str = "element", layout: Layout = PLAIN) -> Any:
    """A subgradient of `penalty`: ``W / |W_s|``, of the blob's shape; 0 where a structure is all zero.

    For single weights it is ``sign(W)``.
    """
    parts = layout.split(blob)
    norms = _norms(parts, structure)
    there = norms > 0
    return layout.join(parts * (there / (norms + ~there)), tuple(blob.shape))


def proximal(blob: Any, step: float, structure: str = "element", layout: Layout = PLAIN) -> Any:
    """``argmin_V 1/2 |V - W|^2 + step * penalty(V)``: ``W max(0, 1 - step / |W_s|)``; exact zeros arise.

    Raises:
        ValueError: a negative step, and as `penalty`.

    Reference: Yuan and Lin 2006; for single weights soft thresholding.
    """
    if step < 0:
        raise ValueError(f"step {step:g} of a proximal operator is negative")
    parts = layout.split(blob)
    norms = _norms(parts, structure)
    return layout.join(parts * ((norms - step).clip(min=0.0) / (norms + (norms <= 0))), tuple(blob.shape))


def masks(
    weights: Mapping[Key, NDArray[Any]],
    sparsity: float,
    structure: str = "element",
    layouts: Mapping[Key, Layout] | None = None,
    *,
    whole: bool = False,
) -> dict[Key, NDArray[np.bool_]]:
    """What magnitude pruning keeps: all but the given share of the structures, those of least norm.

    The number pruned is rounded down; ties go to the earlier one. Norms are root mean squares, so structures
    of different sizes can be compared.

    Args:
        weights: blobs of two or more axes.
        sparsity: the share of each blob's structures, 0 <= sparsity < 1; with `whole` of all blobs together.
        structure: see `penalty`.
        layouts: by the same keys; plain where absent.
        whole: one threshold for all; a layer can then lose all of its weights.

    Returns:
        For every key True where a weight stays, of the blob's shape.

    Raises:
        ValueError: a sparsity outside [0, 1), and as `penalty`.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity:g} is not in [0, 1)")
    layouts = layouts or {}
    sizes = {key: _mean_norms(blob, structure, layouts.get(key, PLAIN)) for key, blob in weights.items()}
    if whole:
        flat = np.concatenate([size.reshape(-1) for size in sizes.values()]) if sizes else np.empty(0)
        kept = np.split(_largest(flat, sparsity), np.cumsum([size.size for size in sizes.values()])[:-1])
    else:
        kept = [_largest(size.reshape(-1), sparsity) for size in sizes.values()]
    made = {}
    for (key, blob), keep in zip(weights.items(), kept, strict=False):
        layout = layouts.get(key, PLAIN)
        parts = layout.split(blob)
        spread = np.broadcast_to(keep.reshape(sizes[key].shape), parts.shape)
        made[key] = np.array(layout.join(spread, blob.shape))
    return made


@dataclass(frozen=True)
class Sparsity:
    """Shares of zeros in one blob: of weights, rows (filters), columns (channel and tap) and channels.

    ``macs``: before, and with the rows and columns that are all zero left out; None where not known.
    """

    element: float
    row: float
    column: float
    channel: float
    macs: tuple[int, int] | None


def measure(
    blob: NDArray[Any], layout: Layout = PLAIN, macs: int | None = None, tolerance: float = 0.0
) -> Sparsity:
    """Zeros of a blob, and what they are worth.

    ``macs * sum_g rows_g columns_g / (N K / groups)``, over the rows and columns of each group's lowered matrix
    that hold anything; a whole number because every weight costs the same.

    Args:
        blob: two or more axes.
        layout: of the blob.
        macs: of the layer as it is.
        tolerance: magnitude up to which a weight counts as zero.

    Raises:
        ValueError: a blob that the layout does not fit.
    """
    filled = np.abs(layout.split(blob)) > tolerance  # (g, n, c, s)
    rows, columns, channels = filled.any(axis=(2, 3)), filled.any(axis=1), filled.any(axis=(1, 3))
    left = int((rows.sum(axis=1) * columns.sum(axis=(1, 2))).sum())
    element, row, column, channel = (float((~one).mean()) for one in (filled, rows, columns, channels))
    worth = None if macs is None else (macs, macs * left // filled.size)
    return Sparsity(element, row, column, channel, worth)


def shrink(chain: Decomposition) -> Decomposition:
    """Remove the channels between the steps of a chain that carry nothing; the output stays the same.

    A channel goes where no filter of the next step reads it, or where its own filter is zero. What a bias
    puts on a channel without a filter moves into the bias of the next step; where that step pads, the border
    does not see the bias, so such a channel stays. All groups lose the same number of channels, as many as the
    group with the fewest dead ones, and each keeps at least one. Removal goes on until nothing is left to
    remove.

    Args:
        chain: steps that run one after another with nothing in between.

    Raises:
        ValueError: two steps differ in groups.
    """
    steps = list(chain.steps)
    changed = True
    while changed:
        changed = False
        for i in range(len(steps) - 1):
            pair = _shrink_pair(steps[i], steps[i + 1])
            if pair is not None:
                steps[i : i + 2] = pair
                changed = True
    return Decomposition(tuple(steps))


def _shrink_pair(first: Step, second: Step) -> tuple[Step, Step] | None:
    """Two steps without the dead channels between them, or None where there is none."""
    group = second.group
    if first.group != group:
        raise ValueError(f"steps of one chain differ in groups: {first.group} and {group}")
    channels, per_group = first.shape[0], second.shape[1]
    read = (
        np.abs(second.weight).reshape(group, -1, per_group, *second.shape[2:]).any(axis=(1, 3, 4)).reshape(-1)
    )
    written = first.weight.reshape(channels, -1).any(axis=1)
    level = np.zeros(channels) if first.bias is None else first.bias
    foldable = level == 0 if any(second.pad) else np.ones(channels, dtype=bool)
    dead = (~read | (~written & foldable)).reshape(group, per_group)
    count = min(int(dead.sum(axis=1).min()), per_group - 1)
    if not count:
        return None
    gone = np.sort(
        np.argsort(~dead, axis=1, kind="stable")[:, :count], axis=1
    )  # (g, count), within the group
    stays = np.ones((group, per_group), dtype=bool)
    np.put_along_axis(stays, gone, False, axis=1)
    kept = stays.reshape(-1)
    weight = second.weight.reshape(group, -1, *second.shape[1:])
    constant = np.where(kept | ~read, 0.0, level).reshape(group, per_group)
    shift = np.einsum("gorhw,gr->go", weight, constant).reshape(-1)
    bias = second.bias
    if shift.any():
        bias = shift if bias is None else bias + shift
    narrowed = np.concatenate([part[:, keep] for part, keep in zip(weight, stays, strict=True)])
    return (
        replace(first, weight=first.weight[kept], bias=None if first.bias is None else first.bias[kept]),
        replace(second, weight=narrowed, bias=bias),
    )


def _norms(parts: Any, structure: str) -> Any:
    """Norms of the structures of (g, n, c, s), the axes within a structure kept as 1."""
    if structure not in STRUCTURES:
        raise ValueError(f'there is no structure "{structure}"; known: {", ".join(STRUCTURES)}')
    axes = STRUCTURES[structure]
    return (parts * parts).sum(axis=axes, keepdims=True) ** 0.5 if axes else abs(parts)


def _mean_norms(blob: NDArray[Any], structure: str, layout: Layout) -> NDArray[Any]:
    parts = layout.split(np.asarray(blob, dtype=np.float64))
    norms: NDArray[Any] = _norms(parts, structure)
    return norms / np.sqrt(parts.size / norms.size)


def _largest(sizes: NDArray[Any], sparsity: float) -> NDArray[np.bool_]:
    """True for all but the given share of the entries, the smallest ones."""
    kept = np.ones(sizes.size, dtype=bool)
    kept[np.argsort(sizes, kind="stable")[: int(sparsity * sizes.size + 1e-9)]] = False
    return kept
