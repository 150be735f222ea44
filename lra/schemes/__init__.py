"""The data-free schemes, by name."""

from __future__ import annotations

from .base import Scheme, Spectrum
from .cross_filter import KMEANS, PCA, SVD
from .spatial import SPATIAL

__all__ = ["SCHEMES", "Scheme", "Spectrum"]

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (PCA, SVD, KMEANS, SPATIAL)}
