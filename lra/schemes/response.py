"""Response scheme: few filters of the original kind, and a 1 x 1 convolution, both from a map of responses.

Needs the responses of a layer, so it is not among the data-free `SCHEMES`. A map ``P Q^T y + b`` comes from
`lra.linalg.reduced_rank_regression` or `lra.nonlinear.fit`; with groups from `lra.linalg.by_group`, whose
blocks lie as Caffe's weights do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..decomposition import Decomposition, Geometry, Shape, Step, StepShape
from ..linalg import AffineMap, Array
from .base import Scheme, Spectrum, _shape, split_groups
from .cross_filter import cluster_structure


def max_rank(shape: Shape, group: int) -> int:
    """Full rank, over all groups: that of a map of the responses, out."""
    return shape[0]


def structure(shape: Shape, geometry: Geometry, rank: int) -> tuple[StepShape, ...]:
    """Shapes of the chain ``_lowrank`` (kh x kw, geometry of the layer), ``_linear`` (1 x 1) at a total rank.

    MACs an output position and group: ``rank/group * (in/group * kh * kw + out/group)``.

    Raises:
        ValueError: the rank is no positive multiple of the groups, or above `max_rank`.
    """
    return cluster_structure(shape, geometry, rank)


class ResponseSpectrum(Spectrum):
    """What a map of responses retains of their variance at every rank: PCA energies, group by group.

    Args:
        weight, geometry: of the layer.
        responses: (n, out), as they are judged: behind BatchNorm and Scale, before the activation.

    Reference: Zhang et al. 2015, arXiv:1505.06798, equations 4 and 13.
    """

    def __init__(self, weight: NDArray[Any], geometry: Geometry, responses: NDArray[Any]) -> None:
        parts = np.split(responses, geometry.group, axis=1)
        energies = [
            np.linalg.eigvalsh(np.cov(part, rowvar=False, bias=True).reshape(part.shape[1], -1))
            for part in parts
        ]
        super().__init__(weight, geometry, structure, np.maximum(np.stack(energies)[:, ::-1], 0))

    def factor(self, rank: int, bias: NDArray[Any] | None = None) -> Decomposition:
        raise ValueError("a response scheme is fitted to images, weights alone give no factors")


def no_images(_weight: NDArray[Any], _geometry: Geometry) -> Spectrum:
    """The factorization of a scheme that weights alone do not determine: there is none."""
    raise ValueError("a response scheme needs images")


def factor(
    weight: NDArray[Any], bias: NDArray[Any] | None, geometry: Geometry, mapping: AffineMap
) -> Decomposition:
    """The pair of convolutions that computes ``P Q^T y + b`` for y the responses of a convolution.

    ``first = Q^T W`` without a bias, ``second = P`` with the bias ``b + P Q^T w0``: exact at zero-padded
    borders too.

    Args:
        weight: (out, in/group, kh, kw).
        bias: w0 (out,), where the map was fitted to responses that include it; None where they do not.
        geometry: of the layer.
        mapping: P and Q (out, rank/group), b (out,).

    Raises:
        ValueError: shapes do not fit.

    Reference: Zhang et al. 2015, arXiv:1505.06798, equation 3.
    """
    g = geometry.group
    check_map(mapping, len(weight), len(weight), g)
    first, second = structure(_shape(weight), geometry, mapping.P.shape[1] * g)
    parts = zip(split_groups(weight, g), np.split(mapping.Q, g), strict=True)
    filters = np.concatenate([Q.T @ kernel.reshape(len(kernel), -1) for kernel, Q in parts])
    return Decomposition(
        (
            step(first, filters, None),
            step(second, mapping.P, shifted_bias(mapping, bias, g)),
        )
    )


def absorb(
    weight: NDArray[Any], bias: NDArray[Any] | None, geometry: Geometry, mapping: AffineMap
) -> Decomposition:
    """One convolution ``P Q^T W`` with the bias of `factor`: a layer left whole, repaired by a full map.

    Arguments and errors as those of `factor`.
    """
    g = geometry.group
    check_map(mapping, len(weight), len(weight), g)
    parts = zip(split_groups(weight, g), np.split(mapping.P, g), np.split(mapping.Q, g), strict=True)
    kernel = np.concatenate([P @ (Q.T @ part.reshape(len(part), -1)) for part, P, Q in parts])
    shape = StepShape("", _shape(weight), geometry.stride, geometry.pad, geometry.dilation, g)
    return Decomposition((step(shape, kernel, shifted_bias(mapping, bias, g)),))


def speedup_rank(shape: Shape, group: int, speedup: float) -> int:
    """Largest total rank at which the pair is `speedup` times cheaper than the layer, by its MACs.

    ``floor(out D / (speedup (D + out/group)))`` with ``D = in/group * kh * kw``, down to a multiple of the
    groups; 0 where not even rank 1 a group is so cheap. With speedup 1 it is the break-even.

    Reference: Zhang et al. 2015, arXiv:1505.06798; reproduces the uniform rows of its Tables 2 and 6.
    """
    out, depth, height, width = shape
    taps = depth * height * width
    return int(out * taps / (speedup * (taps + out // group))) // group * group


def step(shape: StepShape, weight: Array, bias: Array | None) -> Step:
    """A convolution of the given shape, its numbers in any arrangement of the same order."""
    kernel = np.ascontiguousarray(weight, dtype=np.float64).reshape(shape.shape)
    return Step(shape.suffix, kernel, bias, shape.stride, shape.pad, shape.dilation, shape.group)


def check_map(mapping: AffineMap, d: int, m: int, group: int) -> None:
    """Refuse a map whose blocks do not fit a layer.

    Raises:
        ValueError: P is not (d, r), Q not (m, r), b not (d,), or `group` divides not both.
    """
    P, Q, b = mapping
    if P.ndim != 2 or Q.shape != (m, P.shape[1]) or len(P) != d or b.shape != (d,):
        raise ValueError(f"map of P {P.shape}, Q {Q.shape}, b {b.shape}: expected {d} by {m}")
    if d % group or m % group:
        raise ValueError(f"group {group} does not divide {d} and {m}")


def shifted_bias(mapping: AffineMap, bias: NDArray[Any] | None, group: int) -> Array:
    """Bias of the last step, ``b + P Q^T w0``; b alone where `bias` is None."""
    if bias is None:
        return np.array(mapping.b, dtype=np.float64)
    if bias.shape != (len(mapping.Q),):
        raise ValueError(f"bias of shape {bias.shape}: expected ({len(mapping.Q)},)")
    parts = zip(*(np.split(part, group) for part in (mapping.P, mapping.Q, bias)), strict=True)
    return mapping.b + np.concatenate([P @ (Q.T @ w0) for P, Q, w0 in parts])


RESPONSE = Scheme("response", max_rank, structure, no_images)
