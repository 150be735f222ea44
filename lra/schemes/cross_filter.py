"""Cross-filter decomposition: a few filters of the original kind, then a 1 x 1 convolution to mix them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.spatial.distance import pdist

from ..decomposition import Decomposition, Geometry, Shape, StepShape
from ..linalg import Array
from .base import Scheme, Spectrum, SvdSpectrum, check_rank, split_groups

_LLOYD_ITERATIONS = 20

Labels = NDArray[np.intp]


def max_rank(shape: Shape, group: int) -> int:
    """Full rank, over all groups: ``group * min(out/group, in/group * kh * kw)``."""
    out, depth, height, width = shape
    return group * min(out // group, depth * height * width)


def structure(shape: Shape, geometry: Geometry, rank: int) -> tuple[StepShape, ...]:
    """Shapes of the chain ``_lowrank`` (kh x kw, geometry of the layer), ``_linear`` (1 x 1) at a total rank.

    MACs an output position and group: ``rank/group * (in/group * kh * kw + out/group)``.

    Raises:
        ValueError: the rank is no positive multiple of the groups, or too large.
    """
    check_rank(rank, geometry.group, max_rank(shape, geometry.group))
    return _chain(shape, geometry, rank)


def max_clusters(shape: Shape, group: int) -> int:
    """Most centroids over all groups: one a filter, out."""
    return shape[0]


def cluster_structure(shape: Shape, geometry: Geometry, rank: int) -> tuple[StepShape, ...]:
    """As `structure`, for up to one centroid a filter."""
    check_rank(rank, geometry.group, max_clusters(shape, geometry.group))
    return _chain(shape, geometry, rank)


def pca_spectrum(weight: NDArray[Any], geometry: Geometry) -> SvdSpectrum:
    """Project the filters of each group on their principal directions, not centred.

    ``W[o, i, h, w] ~ sum_r L[o, r] B[r, i, h, w]``, best in the Frobenius norm; L orthonormal, B = L^T W with
    rows of norm sigma.

    Args:
        weight: (out, in/group, kh, kw).
        geometry: of the layer.

    Raises:
        ValueError: a shape that fits no convolution of this geometry, or weights that are not finite.

    Reference: Wen et al. 2017, arXiv:1703.09746.
    """
    return SvdSpectrum(weight, geometry, structure, _unfold, _fold, balanced=False)


def svd_spectrum(weight: NDArray[Any], geometry: Geometry) -> SvdSpectrum:
    """As `pca_spectrum`, the same subspace, with the square root of the singular values on both factors."""
    return SvdSpectrum(weight, geometry, structure, _unfold, _fold, balanced=True)


class KMeansSpectrum(Spectrum):
    """Filters of each group replaced by the centroids of clusters.

    ``W[o, i, h, w] ~ B[label(o), i, h, w]``. Retained energy is ``1 - within / total`` sum of squares, the
    total about the mean filter of the group. Ward's clustering gives `energies` and so `retained` at every
    rank at once; Lloyd's iterations from there never do worse, so `retained` is what `factor` reaches at
    least. `rank_for` measures what it reaches.

    Args:
        weight: (out, in/group, kh, kw).
        geometry: of the layer.

    Raises:
        ValueError: a shape that fits no convolution of this geometry, or weights that are not finite.

    Reference: Ward 1963; Lloyd 1982.
    """

    def __init__(self, weight: NDArray[Any], geometry: Geometry) -> None:
        self._trees = [_ward(_points(kernel)) for kernel in split_groups(weight, geometry.group)]
        self._labels: dict[int, list[Labels]] = {}  # by clusters a group
        energies = np.zeros((geometry.group, weight.shape[0] // geometry.group))
        for row, tree in zip(energies, self._trees, strict=True):
            row[1:] = tree[::-1, 2] ** 2 / 2  # a merge at height d adds d^2 / 2 to the within-cluster sum
        super().__init__(weight, geometry, cluster_structure, energies)

    def rank_for(self, energy: float) -> int:
        """Smallest total rank found at which every group retains at least `energy`, 0 < energy <= 1.

        Downward from the rank at which Ward's clusters reach it, in doubling steps, then by bisection.

        Raises:
            ValueError: energy outside (0, 1].
        """
        allowed = self._allowed(energy)
        group = self.geometry.group
        enough, step = super().rank_for(energy) // group, 1
        while enough > step and self._reaches(enough - step, allowed):
            enough, step = enough - step, 2 * step
        short = max(enough - step, 0)
        while enough - short > 1:
            middle = (enough + short) // 2
            if self._reaches(middle, allowed):
                enough = middle
            else:
                short = middle
        return enough * group

    def factor(self, rank: int, bias: NDArray[Any] | None = None) -> Decomposition:
        per_group = self._per_group(rank)
        kernels = split_groups(self.weight, self.geometry.group)
        labels = self._clusters(per_group)
        centroids = [_centroids(_points(k), lab, per_group) for k, lab in zip(kernels, labels, strict=True)]
        one_hot = [np.eye(per_group)[lab] for lab in labels]
        return self._assemble(rank, [np.concatenate(centroids), np.concatenate(one_hot)], bias)

    def _clusters(self, per_group: int) -> list[Labels]:
        if per_group not in self._labels:
            kernels = split_groups(self.weight, self.geometry.group)
            self._labels[per_group] = [
                _cluster(_points(kernel), tree, per_group)
                for kernel, tree in zip(kernels, self._trees, strict=True)
            ]
        return self._labels[per_group]

    def _reaches(self, per_group: int, allowed: Array) -> bool:
        kernels = split_groups(self.weight, self.geometry.group)
        clusters = self._clusters(per_group)
        within = [_within(_points(k), lab, per_group) for k, lab in zip(kernels, clusters, strict=True)]
        return bool((np.array(within) <= allowed).all())


def _chain(shape: Shape, geometry: Geometry, rank: int) -> tuple[StepShape, ...]:
    out, depth, height, width = shape
    g = geometry.group
    return (
        StepShape(
            "_lowrank", (rank, depth, height, width), geometry.stride, geometry.pad, geometry.dilation, g
        ),
        StepShape("_linear", (out, rank // g, 1, 1), group=g),
    )


def _unfold(kernel: Array) -> Array:
    return kernel.reshape(kernel.shape[0], -1)  # (o, i·h·w)


def _fold(left: Array, right: Array, shape: Shape) -> tuple[Array, Array]:
    return right.reshape(-1, *shape[1:]), left[:, :, np.newaxis, np.newaxis]  # (r, i, h, w), (o, r, 1, 1)


def _points(kernel: NDArray[Any]) -> Array:
    return kernel.reshape(kernel.shape[0], -1).astype(np.float64)


def _ward(points: Array) -> Array:
    """Merges of Ward's clustering in order, (n - 1, 4), as `scipy.cluster.hierarchy.linkage` gives them."""
    if not np.isfinite(points).all():
        raise ValueError("weights hold values that are not finite (nan or inf)")
    if len(points) == 1:
        return np.empty((0, 4))
    merges: Array = linkage(pdist(points), "ward")
    return merges


def _cluster(points: Array, tree: Array, count: int) -> Labels:
    """Labels (n,) in 0..count-1: Ward's clusters, or Lloyd's iterations from them where those are better."""
    ward = _cut(tree, len(points), count)
    try:
        start = _centroids(points, ward, count)
        _, found = kmeans2(points, start, iter=_LLOYD_ITERATIONS, minit="matrix", missing="raise")
    except ClusterError:  # a cluster ran empty
        return ward
    lloyd: Labels = found.astype(np.intp)
    return lloyd if _within(points, lloyd, count) < _within(points, ward, count) else ward


def _cut(tree: Array, n_points: int, count: int) -> Labels:
    """Labels of the `count` clusters left after the first merges, numbered by their first member."""
    members = [[i] for i in range(n_points)]
    for first, second in tree[: n_points - count, :2].astype(int):
        members.append(members[first] + members[second])
        members[first], members[second] = [], []
    labels = np.empty(n_points, dtype=np.intp)
    for label, cluster in enumerate(sorted(sorted(m) for m in members if m)):
        labels[cluster] = label
    return labels


def _centroids(points: Array, labels: Labels, count: int) -> Array:
    """Mean of each cluster, (count, k); no cluster is empty."""
    one_hot = np.eye(count)[labels]  # (n, count)
    means: Array = (one_hot.T @ points) / one_hot.sum(axis=0)[:, np.newaxis]
    return means


def _within(points: Array, labels: Labels, count: int) -> float:
    """Sum of squared distances of the points to the means of their clusters."""
    return float(np.sum((points - _centroids(points, labels, count)[labels]) ** 2))


PCA = Scheme("pca", max_rank, structure, pca_spectrum)
SVD = Scheme("svd", max_rank, structure, svd_spectrum)
KMEANS = Scheme("kmeans", max_clusters, cluster_structure, KMeansSpectrum)
