"""Digits drawn by rule: input for a net trained on MNIST where no data set is at hand.

Each digit is a few strokes in a unit square (x to the right, y down), bent by a random affine map and
small moves of single points, and inked by the distance of each pixel to the nearest stroke.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np

SIZE = 28
_HEIGHT = 18.0  # pixels between the highest and the lowest point of a stroke, as MNIST fits its digits
_ARC_STEP = 20.0  # degrees


def drawn(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw n digits: images (n, 1, 28, 28) float32, gray 0..255 over 256, and labels (n,) int64."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, n)
    images = np.empty((n, 1, SIZE, SIZE), np.float32)
    for digit in range(10):
        here = labels == digit
        images[here, 0] = _draw(_segments(digit), int(here.sum()), random)
    return images, labels


def _draw(segments: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """Ink segments (s, 2, 2) in n random ways: (n, 28, 28)."""
    points, members = np.unique(segments.reshape(-1, 2), axis=0, return_inverse=True)
    moved = points - 0.5 + random.normal(0, 0.035, (n, *points.shape))
    placed = moved @ _maps(n, random) + (SIZE - 1) / 2 + random.uniform(-2, 2, (n, 1, 2))
    distance = _distances(placed[:, members.reshape(-1)].reshape(n, *segments.shape).astype(np.float32))
    radius = random.uniform(1.0, 1.5, (n, 1)).astype(np.float32)
    gray = np.round(255 * np.clip(radius + 0.5 - distance, 0, 1))
    return np.reshape(gray / 256, (n, SIZE, SIZE))


def _maps(n: int, random: np.random.Generator) -> np.ndarray:
    """Random maps (n, 2, 2) of row vectors from the unit square to pixels: scale, shear, rotation."""
    angle = random.normal(0, np.radians(12), n)
    shear = random.normal(0.08, 0.3, n)
    wide, high = _HEIGHT * random.uniform(0.65, 1.05, (2, n))
    bend = np.stack([wide, np.zeros(n), -shear * high, high], axis=1).reshape(n, 2, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    turned: np.ndarray = bend @ np.stack([cos, sin, -sin, cos], axis=1).reshape(n, 2, 2)
    return turned


def _distances(segments: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest of each image's segments (n, s, 2, 2): (n, 784)."""
    y, x = np.divmod(np.arange(SIZE * SIZE), SIZE)
    pixels = np.stack([x, y]).astype(np.float32)
    nearest = np.full((len(segments), SIZE * SIZE), np.inf, np.float32)
    for start, end in segments.transpose(1, 2, 0, 3):
        along = (end - start)[:, :, None]
        offset = pixels - start[:, :, None]
        share = (offset * along).sum(1) / np.maximum((along**2).sum(1), 1e-6)
        gap = offset - np.clip(share, 0, 1)[:, None] * along
        np.minimum(nearest, (gap**2).sum(1), out=nearest)
    return np.sqrt(nearest)


def _arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> list[tuple[float, float]]:
    """Points on an ellipse round (x, y), angles in degrees, clockwise on the page from the right."""
    angles = np.radians(np.linspace(start, stop, round(abs(stop - start) / _ARC_STEP) + 1))
    points = zip(x + rx * np.cos(angles), y + ry * np.sin(angles), strict=True)
    return [(round(float(a), 6), round(float(b), 6)) for a, b in points]


@cache
def _segments(digit: int) -> np.ndarray:
    """The strokes of a digit cut into segments (s, 2, 2): start and end as (x, y)."""
    strokes: list[list[tuple[float, float]]] = {
        0: [_arc(0.5, 0.5, 0.34, 0.5, -90, 270)],
        1: [[(0.5, 0.0), (0.5, 0.5), (0.5, 1.0)]],
        2: [[*_arc(0.5, 0.27, 0.32, 0.27, -170, 30), (0.5, 0.68), (0.15, 1.0), (0.5, 0.98), (0.88, 1.0)]],
        3: [[*_arc(0.46, 0.25, 0.3, 0.25, -150, 90), *_arc(0.46, 0.74, 0.34, 0.26, -80, 150)]],
        4: [[(0.22, 0.0), (0.16, 0.5), (0.5, 0.5), (0.8, 0.46)], [(0.78, 0.0), (0.74, 0.5), (0.7, 1.0)]],
        5: [[(0.84, 0.0), (0.5, 0.01), (0.3, 0.03), (0.24, 0.42), *_arc(0.46, 0.69, 0.33, 0.3, -110, 150)]],
        6: [[(0.66, 0.0), (0.42, 0.22), (0.25, 0.5), *_arc(0.5, 0.73, 0.28, 0.27, -180, 180)]],
        7: [[(0.14, 0.06), (0.5, 0.05), (0.84, 0.04), (0.62, 0.5), (0.44, 1.0)]],
        8: [_arc(0.5, 0.25, 0.25, 0.25, 90, 450), _arc(0.5, 0.75, 0.29, 0.25, -90, 270)],
        9: [[*_arc(0.48, 0.27, 0.27, 0.27, 0, -360), (0.72, 0.6), (0.66, 1.0)]],
    }[digit]
    return np.array([pair for stroke in strokes for pair in pairwise(stroke)])
