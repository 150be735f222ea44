"""The schemes, by name."""

from __future__ import annotations

from .base import Scheme, Spectrum
from .cross_filter import KMEANS, PCA, SVD
from .response import RESPONSE
from .spatial import SPATIAL

__all__ = ["ALL_SCHEMES", "SCHEMES", "Scheme", "Spectrum"]

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (PCA, SVD, KMEANS, SPATIAL)}  # data-free
ALL_SCHEMES: dict[str, Scheme] = SCHEMES | {RESPONSE.name: RESPONSE}  # and those that need images
