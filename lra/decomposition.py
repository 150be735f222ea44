"""A decomposition as a value: a chain of convolutions that stands for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .linalg import Array

Pair = tuple[int, int]
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides: (h, w) tuples, and its number of groups."""

    stride: Pair = (1, 1)
    pad: Pair = (0, 0)
    dilation: Pair = (1, 1)
    group: int = 1


@dataclass(frozen=True)
class StepShape:
    """One convolution of a chain without its numbers; shape is (out, in/group, kh, kw)."""

    suffix: str
    shape: Shape
    stride: Pair = (1, 1)
    pad: Pair = (0, 0)
    dilation: Pair = (1, 1)
    group: int = 1


@dataclass(frozen=True, eq=False)
class Step:
    """One convolution of a chain: weight (out, in/group, kh, kw) float64, bias (out,) float64 or None."""

    suffix: str
    weight: Array
    bias: Array | None
    stride: Pair = (1, 1)
    pad: Pair = (0, 0)
    dilation: Pair = (1, 1)
    group: int = 1

    @property
    def shape(self) -> Shape:
        out, depth, height, width = self.weight.shape
        return out, depth, height, width


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Convolutions to run one after another in place of one; all have its number of groups."""

    steps: tuple[Step, ...]

    def reconstruct(self) -> Array:
        """The dense kernel that the chain computes, (out, in/group, kh, kw) in the original group layout.

        ``W[o, i, h, w] = sum_r second[o, r, h2, w2] first[r, i, h1, w1]``, with h the one of h1, h2 that
        runs.

        Raises:
            ValueError: two steps have more than one tap along the same axis, or differ in groups.
        """
        groups = {step.group for step in self.steps}
        if len(groups) != 1:
            raise ValueError(f"steps of one chain differ in groups: {sorted(groups)}")
        (group,) = groups
        parts = zip(*(np.split(step.weight, group) for step in self.steps), strict=True)
        return np.concatenate([reduce(_compose, kernels) for kernels in parts])

    def error(self, weight: NDArray[Any]) -> float:
        """Relative Frobenius error ``|W - reconstruct()| / |W|``; 0 where W is zero."""
        dense = np.asarray(weight, dtype=np.float64)
        norm = float(np.linalg.norm(dense))
        return float(np.linalg.norm(dense - self.reconstruct())) / norm if norm else 0.0


class Convolution(Protocol):
    """What `macs` needs to know of a convolution: `StepShape` and `Step` both have it."""

    @property
    def shape(self) -> Shape: ...
    @property
    def stride(self) -> Pair: ...
    @property
    def pad(self) -> Pair: ...
    @property
    def dilation(self) -> Pair: ...


def macs(steps: Sequence[Convolution], in_hw: Pair) -> int:
    """Multiply-accumulates of a chain on one picture: ``sum_steps out * in/group * kh * kw * H_out * W_out``.

    Args:
        steps: in the order they run.
        in_hw: height and width of the input of the first.

    Raises:
        ValueError: a kernel does not fit its padded input.
    """
    total, size = 0, in_hw
    for step in steps:
        size = _out_hw(step, size)
        total += int(np.prod(step.shape, dtype=object)) * size[0] * size[1]
    return total


def _out_hw(step: Convolution, in_hw: Pair) -> Pair:
    """Output size along each axis: ``floor((in + 2 pad - dilation (k - 1) - 1) / stride) + 1``."""
    axes = zip(in_hw, step.shape[2:], step.stride, step.pad, step.dilation, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
    if height < 1 or width < 1:
        raise ValueError(f"kernel {step.shape[2:]} does not fit an input of {in_hw} padded by {step.pad}")
    return height, width


def _compose(first: Array, second: Array) -> Array:
    """Kernel of two convolutions of one group in a row, of which at most one has taps along each axis."""
    taps = tuple(zip(first.shape[2:], second.shape[2:], strict=True))
    if any(min(pair) > 1 for pair in taps):
        raise ValueError(f"kernels {first.shape[2:]} and {second.shape[2:]} both have taps along one axis")
    product = np.tensordot(second, first, axes=(1, 0))  # (o, h2, w2, i, h1, w1)
    merged = product.transpose(0, 3, 1, 4, 2, 5)  # (o, i, h2, h1, w2, w1)
    return merged.reshape(merged.shape[0], merged.shape[1], *(a * b for a, b in taps))
