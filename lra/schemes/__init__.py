"""The schemes, by name."""

from __future__ import annotations

from .asymmetric3d import ASYMMETRIC_3D
from .base import Scheme, Spectrum
from .cross_filter import KMEANS, PCA, SVD
from .response import RESPONSE
from .spatial import SPATIAL, SPATIAL_HV

__all__ = ["ALL_SCHEMES", "SCHEMES", "Scheme", "Spectrum"]

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (PCA, SVD, KMEANS, SPATIAL, SPATIAL_HV)
}  # data-free
ALL_SCHEMES: dict[str, Scheme] = SCHEMES | {
    scheme.name: scheme for scheme in (RESPONSE, ASYMMETRIC_3D)
}  # and those that need images
