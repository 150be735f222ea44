"""Image files as OpenCV hands them to Caffe: decoded to BGR or gray bytes (C, H, W), resized, encoded."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import FileError, UsageError

Size = tuple[int, int]  # height, width

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "bmp": "BMP", "ppm": "PPM", "webp": "WEBP"}
_JPEG_QUALITY = 95  # what OpenCV writes
_BITS = 11  # of OpenCV's fixed-point weights


def decode(data: bytes, color: bool | None = True) -> np.ndarray:
    """Bytes of an image file as uint8 (3, H, W) in BGR order, or (1, H, W); ``color`` None: as the file is.

    Alpha is dropped and an EXIF orientation applied, as OpenCV does; as-is decoding leaves the orientation.
    Raises FileError where the bytes are no image.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            if color is False:
                image.draft("L", None)  # a JPEG's own luma
            upright = image if color is None else ImageOps.exif_transpose(image)
            return _planes(upright, color, image.format)
    except UnidentifiedImageError:
        raise FileError("is no image that can be read: of no known format") from None
    except _BROKEN as error:
        raise FileError(f"is no image that can be read: {error}") from error


def _planes(image: Image.Image, color: bool | None, kind: str | None) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits: OpenCV keeps the upper ones
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if color is None:
        color = image.mode not in ("1", "L", "LA")
    if not color and image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))[None]
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1].transpose(2, 0, 1))
    return bgr if color else _gray(bgr, kind)


def _gray(bgr: np.ndarray, kind: str | None) -> np.ndarray:
    """One plane of three in fixed point: with libpng's weights for PNG, which it cuts, else OpenCV's, rounded."""
    blue, green, red, bits, half = (
        (3737, 19234, 9797, 15, 0) if kind == "PNG" else (1868, 9617, 4899, 14, 8192)
    )
    weighed = np.tensordot(np.array([[blue, green, red]]), bgr.astype(np.int64), 1)
    return ((weighed + half) >> bits).astype(np.uint8)


def load(path: str | Path, color: bool | None = True) -> np.ndarray:
    """An image file decoded; raises FileError with its name where it is missing or broken."""
    from ..files import read_bytes

    try:
        return decode(read_bytes(path), color)
    except FileError as error:
        raise error.at(path=path) from error.__cause__


def encode(image: np.ndarray, extension: str) -> bytes:
    """A uint8 picture (C, H, W) as a file of that extension; raises UsageError where there is no such format."""
    name = _FORMATS.get(extension.lower())
    if name is None:
        raise UsageError(f'there is no image encoding "{extension}"', hint="use " + " or ".join(_FORMATS))
    pixels = image[0] if len(image) == 1 else image[::-1].transpose(1, 2, 0)
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, name, quality=_JPEG_QUALITY)
    return file.getvalue()


class _Taps(NamedTuple):
    """For each new position along an axis: the two old ones it lies between, and the share of the second."""

    first: np.ndarray
    second: np.ndarray
    share: np.ndarray


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """A picture (C, H, W) at another size, as cv::resize with INTER_LINEAR; uint8 stays uint8, else float32.

    Pixels are squares and nothing is averaged, also where the picture shrinks. Bytes are computed in
    OpenCV's fixed point: products with 11-bit weights, cut to 16 bits between the two axes.
    """
    if image.shape[1:] == tuple(size):
        return image
    y, x = _taps(image.shape[1], size[0], keep=True), _taps(image.shape[2], size[1], keep=False)
    rows = image[:, np.concatenate([y.first, y.second])]
    left, right = rows[:, :, x.first], rows[:, :, x.second]
    if image.dtype != np.uint8:
        wide = left * (1 - x.share) + right * x.share
        upper, lower = wide[:, : size[0]], wide[:, size[0] :]
        return np.asarray(upper * (1 - y.share[:, None]) + lower * y.share[:, None], np.float32)
    (u0, u1), (v0, v1) = _fixed(x.share), _fixed(y.share[:, None])
    sums = (left * u0 + right * u1) >> 4
    upper, lower = sums[:, : size[0]], sums[:, size[0] :]
    return ((((upper * v0) >> 16) + ((lower * v1) >> 16) + 2) >> 2).astype(np.uint8)


def _fixed(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights of both neighbours as whole numbers."""
    one = np.float32(1 << _BITS)
    return np.rint((1 - share) * one).astype(np.int32), np.rint(share * one).astype(np.int32)


def _taps(old: int, new: int, *, keep: bool) -> _Taps:
    """Neighbours along one axis; beyond the border both are the outermost pixel (``keep``: with their shares)."""
    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    low = np.floor(at).astype(np.int64)
    share = at - low.astype(np.float32)
    if not keep:
        share[(low < 0) | (low >= old - 1)] = 0
    return _Taps(np.clip(low, 0, old - 1), np.clip(low + 1, 0, old - 1), share)
