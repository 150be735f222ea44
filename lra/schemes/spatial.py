"""Spatial decomposition: a kh x kw convolution as a kh x 1 and a 1 x kw one, in either order.

``spatial`` runs the vertical one first, as the papers do; ``spatial-hv`` the horizontal one. They cut different
matrices, and where kernel, stride or image are not square they cost differently; which one a machine runs faster
has to be measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..decomposition import Geometry, Shape, StepShape
from ..linalg import Array
from .base import Scheme, SvdSpectrum, check_rank


def max_rank(shape: Shape, group: int) -> int:
    """Full rank, over all groups: ``group * min(in/group * kh, out/group * kw)``."""
    out, depth, height, width = shape
    return group * min(depth * height, out // group * width)


def structure(shape: Shape, geometry: Geometry, rank: int) -> tuple[StepShape, ...]:
    """Shapes of the chain ``_v`` (kh x 1), ``_h`` (1 x kw) at total rank `rank`.

    The vertical step takes the vertical stride, pad and dilation, the horizontal step the others; exact at
    zero-padded borders because ``_v`` has no bias.

    MACs at stride 1, a position and group: ``rank/group * (in/group * kh + out/group * kw)``.

    Raises:
        ValueError: the rank is no positive multiple of the groups, or too large.
    """
    g = geometry.group
    check_rank(rank, g, max_rank(shape, g))
    return _vertical(rank, shape[1], shape, geometry), _horizontal(shape[0], rank // g, shape, geometry)


def _vertical(out: int, depth: int, shape: Shape, geometry: Geometry) -> StepShape:
    """The kh x 1 step, with the vertical half of the geometry."""
    stride, pad, dilation = geometry.stride[0], geometry.pad[0], geometry.dilation[0]
    return StepShape("_v", (out, depth, shape[2], 1), (stride, 1), (pad, 0), (dilation, 1), geometry.group)


def _horizontal(out: int, depth: int, shape: Shape, geometry: Geometry) -> StepShape:
    """The 1 x kw step, with the horizontal half of the geometry."""
    stride, pad, dilation = geometry.stride[1], geometry.pad[1], geometry.dilation[1]
    return StepShape("_h", (out, depth, 1, shape[3]), (1, stride), (0, pad), (1, dilation), geometry.group)


def spectrum(weight: NDArray[Any], geometry: Geometry) -> SvdSpectrum:
    """Factor a kh x kw convolution into a kh x 1 and a 1 x kw one, group by group.

    ``W[o, i, h, w] ~ sum_r H[o, r, 0, w] V[r, i, h, 0]``, the best such sum in the Frobenius norm: the SVD of
    the matrix ``A[(i, h), (w, o)]``, cut, with the square root of the singular values on both sides.

    Args:
        weight: (out, in/group, kh, kw).
        geometry: of the layer.

    Raises:
        ValueError: a shape that fits no convolution of this geometry, or weights that are not finite.

    Reference: Jaderberg et al. 2014, arXiv:1405.3866, scheme 2; closed form: Tai et al. 2016,
    arXiv:1511.06067.
    """
    return SvdSpectrum(weight, geometry, structure, _unfold, _fold, balanced=True)


def _unfold(kernel: Array) -> Array:
    out, depth, height, width = kernel.shape
    return kernel.transpose(1, 2, 3, 0).reshape(depth * height, width * out)  # (i·h, w·o)


def _fold(left: Array, right: Array, shape: Shape) -> tuple[Array, Array]:
    out, depth, height, width = shape
    vertical = left.T.reshape(-1, depth, height, 1)  # (r, i, h, 1)
    horizontal = right.reshape(-1, width, out).transpose(2, 0, 1)[:, :, np.newaxis]  # (o, r, 1, w)
    return vertical, horizontal


def horizontal_max_rank(shape: Shape, group: int) -> int:
    """Full rank with the horizontal step first: ``group * min(in/group * kw, out/group * kh)``."""
    out, depth, height, width = shape
    return max_rank((out, depth, width, height), group)


def horizontal_structure(shape: Shape, geometry: Geometry, rank: int) -> tuple[StepShape, ...]:
    """Shapes of the chain ``_h`` (1 x kw), ``_v`` (kh x 1) at total rank `rank`; otherwise as `structure`.

    MACs at stride 1, a position and group: ``rank/group * (in/group * kw + out/group * kh)``.

    Raises:
        ValueError: the rank is no positive multiple of the groups, or too large.
    """
    g = geometry.group
    check_rank(rank, g, horizontal_max_rank(shape, g))
    return _horizontal(rank, shape[1], shape, geometry), _vertical(shape[0], rank // g, shape, geometry)


def horizontal_spectrum(weight: NDArray[Any], geometry: Geometry) -> SvdSpectrum:
    """Factor a kh x kw convolution into a 1 x kw and a kh x 1 one: `spectrum` of the kernel turned in space.

    ``W[o, i, h, w] ~ sum_r V[o, r, h, 0] H[r, i, 0, w]``, from the matrix ``A[(i, w), (h, o)]``.

    Args:
        weight: (out, in/group, kh, kw).
        geometry: of the layer.

    Raises:
        ValueError: a shape that fits no convolution of this geometry, or weights that are not finite.
    """
    return SvdSpectrum(weight, geometry, horizontal_structure, _unfold_turned, _fold_turned, balanced=True)


def _unfold_turned(kernel: Array) -> Array:
    return _unfold(kernel.swapaxes(2, 3))


def _fold_turned(left: Array, right: Array, shape: Shape) -> tuple[Array, Array]:
    out, depth, height, width = shape
    first, second = _fold(left, right, (out, depth, width, height))
    return first.swapaxes(2, 3), second.swapaxes(2, 3)  # (r, i, 1, w), (o, r, h, 1)


SPATIAL = Scheme("spatial", max_rank, structure, spectrum)
SPATIAL_HV = Scheme("spatial-hv", horizontal_max_rank, horizontal_structure, horizontal_spectrum)
