"""Two convolutions in a row, with nothing in between, as the one that they are: when that is exact, and its kernel."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decomposition import Step, StepShape
from .linalg import Array


def merged_shape(first: Step | StepShape, second: Step | StepShape) -> StepShape:
    """Shape of the convolution that two in a row are between the borders, without a suffix.

    Along each axis the second reads every ``s1 d2``-th place from the first, which reads every ``d1``-th, so that taps
    lie at ``d1 t1 + s1 d2 t2``. With d the greatest common divisor of the spacings there are: kernel
    ``(d1 (k1 - 1) + s1 d2 (k2 - 1)) / d + 1``, dilation d, stride ``s1 s2``, pad ``p1 + s1 p2``; groups
    ``gcd(g1, g2)``.

    Args:
        first, second: in the order they run; shapes (out, in/group, kh, kw).

    Raises:
        ValueError: the second reads another number of channels than the first makes.
    """
    if second.shape[1] * second.group != first.shape[0]:
        read = second.shape[1] * second.group
        raise ValueError(f"{first.shape[0]} channels are made, {read} are read")
    group = gcd(first.group, second.group)
    depth = first.shape[1] * first.group // group
    (kh, sh, ph, dh), (kw, sw, pw, dw) = (_axis(first, second, axis) for axis in (0, 1))
    return StepShape("", (second.shape[0], depth, kh, kw), (sh, sw), (ph, pw), (dh, dw), group)


def inexact(first: Step | StepShape, second: Step | StepShape, biased: bool) -> str | None:
    """Why two convolutions in a row are not one at the borders; None where they are, for an input of any size.

    They are where the second pads nothing. Where it pads an axis, its zeros must be what the first makes of nothing
    but padding: no bias, and ``p1 >= d1 (k1 - 1)`` along that axis.

    Args:
        first, second: in the order they run.
        biased: whether the first adds a bias that is not zero.
    """
    if any(second.pad) and biased:
        return "the second pads with zeros what has a bias"
    for axis in (0, 1):
        if second.pad[axis] and first.pad[axis] < first.dilation[axis] * (first.shape[2 + axis] - 1):
            return "the second pads with zeros where the first would see the border of its input"
    return None


def merge_steps(first: Step, second: Step) -> Step:
    """The convolution that two in a row are, see `merged_shape`: ``W = W2 W1`` summed over the channels between them.

    ``W[o, i, (d1 t1 + s1 d2 t2) / d] = sum_m W2[o, m, t2] W1[m, i, t1]``, over all t1, t2 that meet there, and
    ``b = b2 + sum_{m, t2} W2[o, m, t2] b1[m]``, where either has a bias. With other groups than the result has,
    zeros are filled in.

    Raises:
        ValueError: channels do not fit, or it is not exact, see `inexact`.
    """
    shape, why = merged_shape(first, second), inexact(first, second, is_biased(first.bias))
    if why is not None:
        raise ValueError(why)
    one, two = (_regrouped(step, shape.group) for step in (first, second))
    kernel = np.zeros(shape.shape)
    places = [_places(first, second, shape, axis) for axis in (0, 1)]
    blocks = zip(*(np.split(part, shape.group) for part in (kernel, one, two)), strict=True)
    for made, before, after in blocks:
        for h, rows in enumerate(places[0]):
            for w, columns in enumerate(places[1]):
                made[:, :, rows, columns] += np.tensordot(after[:, :, h, w], before, axes=(1, 0))
    return Step("", kernel, _bias(first, second, two), shape.stride, shape.pad, shape.dilation, shape.group)


def _bias(first: Step, second: Step, regrouped: Array) -> Array | None:
    """Bias of the one convolution; ``regrouped``: the second's kernel in the groups of the result."""
    if first.bias is None:
        return None if second.bias is None else second.bias.copy()
    taps = regrouped.sum(axis=(2, 3))
    group = first.shape[0] // taps.shape[1]
    halves = zip(np.split(taps, group), np.split(first.bias, group), strict=True)
    moved = np.concatenate([part @ b for part, b in halves])
    return moved if second.bias is None else moved + second.bias


def is_biased(bias: NDArray[Any] | None) -> bool:
    """Whether a bias adds anything: one of zeros counts as none."""
    return bias is not None and bool(np.any(bias))


def _axis(first: Step | StepShape, second: Step | StepShape, axis: int) -> tuple[int, int, int, int]:
    """Kernel, stride, pad and dilation along one axis."""
    k1, k2 = first.shape[2 + axis], second.shape[2 + axis]
    dilation = _spacing(first, second, axis)
    reach = first.dilation[axis] * (k1 - 1) + _jump(first, second, axis) * (k2 - 1)
    stride = first.stride[axis] * second.stride[axis]
    return reach // dilation + 1, stride, first.pad[axis] + first.stride[axis] * second.pad[axis], dilation


def _jump(first: Step | StepShape, second: Step | StepShape, axis: int) -> int:
    """How far apart in the first's input two taps of the second are."""
    return first.stride[axis] * second.dilation[axis]


def _spacing(first: Step | StepShape, second: Step | StepShape, axis: int) -> int:
    """The largest distance that all taps along an axis are multiples of; 1 for a single one."""
    taps = first.shape[2 + axis] > 1, second.shape[2 + axis] > 1
    apart = [first.dilation[axis]] * taps[0] + [_jump(first, second, axis)] * taps[1]
    return gcd(*apart) or 1


def _places(first: Step, second: Step, shape: StepShape, axis: int) -> list[slice]:
    """Where the first's taps lie in the one kernel, for each tap of the second."""
    unit = shape.dilation[axis]
    step = max(1, first.dilation[axis] // unit)
    starts = (tap * _jump(first, second, axis) // unit for tap in range(second.shape[2 + axis]))
    return [slice(start, start + step * (first.shape[2 + axis] - 1) + 1, step) for start in starts]


def _regrouped(step: Step, group: int) -> Array:
    """The kernel with fewer groups, zeros between those that it has."""
    out, depth, height, width = step.shape
    ratio, rows = step.group // group, out // step.group
    wide = np.zeros((out, depth * ratio, height, width))
    for i, part in enumerate(np.split(step.weight, step.group)):
        start = i % ratio * depth
        wide[i * rows : (i + 1) * rows, start : start + depth] = part
    return wide
