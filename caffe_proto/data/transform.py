"""From a picture to a net's input, as Caffe's DataTransformer: crop, mirror, mean, scale, in that order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import preprocess
from ..errors import NetError, ShapeError
from ..layers.spec import Shape, text
from ..net import Net
from ..preprocess import Preprocess
from ..typed import Typed, check
from .base import Order
from .pictures import Size


@dataclass(frozen=True, eq=False)
class Transform:
    """What is done to each image; ``resize`` and ``color`` are for ``open_source``, which does them on reading.

    ``mean`` is (C,) or (C, H, W) in the net's channel order. ``order`` is that order, None: as the images come.
    In training crops and mirroring are random, else the crop is the centre and nothing is mirrored.
    """

    crop: Size | None = None
    mirror: bool = False
    mean: np.ndarray | None = None
    scale: float = 1.0
    order: Order | None = None
    train: bool = False
    resize: Size | None = None
    color: bool | None = None

    def __call__(
        self, image: np.ndarray, order: Order = "bgr", random: np.random.Generator | None = None
    ) -> np.ndarray:
        """The input (C, h, w), float32, for an image (C, H, W) whose channels come in ``order``.

        Raises ShapeError where crop or mean do not fit the image.
        """
        if self.order not in (None, order) and len(image) == 3:
            image = image[::-1]
        mirrored = self.train and self.mirror and random is not None and bool(random.integers(2))
        window = self._window(image.shape, random)
        cropped = image[window]
        mean = self._mean(image.shape, window, cropped.shape)
        made = cropped if mean is None else cropped - mean
        made = made if self.scale == 1 else made * np.float32(self.scale)
        return made[:, :, ::-1] if mirrored else made

    def _window(self, shape: Shape, random: np.random.Generator | None) -> tuple[slice, slice, slice]:
        spare = (
            [0, 0]
            if self.crop is None
            else [have - want for have, want in zip(shape[1:], self.crop, strict=True)]
        )
        if min(spare) < 0:
            raise ShapeError(
                f"is {text(shape)}, smaller than the crop {text(self.crop or ())}",
                hint="resize the images first",
            )
        if self.train and random is not None:
            top, left = (int(random.integers(room + 1)) for room in spare)
        else:
            top, left = (room // 2 for room in spare)
        height, width = self.crop or shape[1:]
        return slice(None), slice(top, top + height), slice(left, left + width)

    def _mean(self, shape: Shape, window: tuple[slice, slice, slice], made: Shape) -> np.ndarray | None:
        """The mean for a cropped image: a mean image is cropped as the image was."""
        if self.mean is None:
            return None
        mean = self.mean
        if mean.ndim == 3 and mean.shape[1:] == shape[1:]:
            mean = mean[window]
        elif mean.ndim == 3 and shape != made:
            raise ShapeError(
                f"is {text(shape)}, the mean image {text(mean.shape)}",
                hint=f"resize the images to {text(mean.shape[1:])}",
            )
        fitted = Preprocess(mean).mean_for((1, *made))
        return None if fitted is None else fitted[0]


@dataclass(frozen=True)
class Settings:
    """What is asked for over what the net says; None: as the net says."""

    mean: str | None = None
    scale: float | None = None
    crop: Size | None = None
    resize: Size | None = None
    order: Order | None = None


def for_net(net: Net, asked: Settings | None = None, shape: Shape | None = None) -> Transform:
    """The transform of a net's own ``transform_param`` (and ``image_data_param``), ``asked`` over it.

    ``shape`` is the input's, where known: it says the crop where nothing else does, and that a net of one
    channel wants gray. Raises NetError on settings that Caffe refuses, UnsupportedError on those of forks.
    """
    asked = asked or Settings()
    p = preprocess.settings(net)
    own: Mapping[str, Any] = {} if p is None else p
    if p is not None and p.type_name == "TransformationParameter":
        _check(net, p)
    mean = (
        preprocess.read_mean(asked.mean) if asked.mean else None if p is None else preprocess.own_mean(net, p)
    )
    side = own.get("crop_size", 0)
    inputs = (shape[2], shape[3]) if shape is not None and len(shape) == 4 else None
    size, is_color = _image_data(net)
    gray = (
        own.get("force_gray")
        or is_color is False
        or (inputs is not None and shape is not None and shape[1] == 1)
    )
    return Transform(
        crop=asked.crop or ((side, side) if side else inputs),
        mirror=own.get("mirror", False),
        mean=mean,
        scale=float(own.get("scale", 1.0)) if asked.scale is None else asked.scale,
        order=asked.order,
        train=net.state.phase == "TRAIN",
        resize=asked.resize or size,
        color=False if gray else True if own.get("force_color") else None,
    )


def _check(net: Net, p: Typed) -> None:
    try:
        check(p)
        for one, other in (("mean_file", "mean_value"), ("force_color", "force_gray")):
            if p[one] and p[other]:
                raise NetError(f"has both {one} and {other}; Caffe takes one", line=p.line(other))
    except NetError as error:
        raise error.at(path=net.path) from None


def _image_data(net: Net) -> tuple[Size | None, bool | None]:
    """The size that an ImageData layer resizes to, and whether it reads colour; None where there is none."""
    for layer in net.layers:
        for message in layer.message.messages("image_data_param"):
            p = Typed(message, "ImageDataParameter", layer.document)
            high, wide = p["new_height"], p["new_width"]
            if bool(high) != bool(wide):
                raise NetError(
                    "new_height and new_width go together", path=net.path, line=p.line(), layer=layer.name
                )
            return (high, wide) if high else None, p["is_color"]
    return None, None
