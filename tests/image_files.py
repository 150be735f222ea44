"""Small image files and data sets that several tests read."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(n: int = 3, height: int = 6, width: int = 5, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random bytes (n, channels, height, width)."""
    return np.random.default_rng(seed).integers(0, 256, (n, channels, height, width), dtype=np.uint8)


def save(path: Path, bgr: np.ndarray, **options: int) -> Path:
    """A BGR (or gray) picture (C, H, W) as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = bgr[0] if len(bgr) == 1 else bgr[::-1].transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)
    return path


def listed(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    """A list file of images: image i has label i + 2."""
    lines = []
    for i, image in enumerate(images):
        save(folder / "pics" / f"a {i}{suffix}", image)
        lines.append(f"pics/a {i}{suffix} {i + 2}\n")
    path = folder / "list.txt"
    path.write_text("".join(lines))
    return path


def idx(path: Path, array: np.ndarray) -> Path:
    """Bytes as an idx file, gzipped where the name says so."""
    data = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def cifar(path: Path, images: np.ndarray, *labels: np.ndarray) -> Path:
    """A binary batch: label bytes, then 3072 pixels, record by record."""
    columns = [*(label.astype(np.uint8)[:, None] for label in labels), images.reshape(len(images), -1)]
    path.write_bytes(np.concatenate(columns, axis=1).tobytes())
    return path
