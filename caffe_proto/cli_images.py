"""Options about images: where they are, and what is done to them before a net."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import click

from .console import Decorator, together
from .errors import UsageError

if TYPE_CHECKING:
    from .data.transform import Transform
    from .layers.spec import Shape
    from .model import Model


def _size(_context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """``227`` or ``256,320`` as height and width; raises UsageError where it is neither."""
    if value is None:
        return None
    parts = value.replace("x", ",").split(",")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(
            f"{option.opts[0]} {value!r} is no size", hint="for example 256, or 240,320 for height and width"
        )
    return int(parts[0]), int(parts[-1])


def size_option(name: str, text: str) -> Decorator:
    """A height and a width, or one number for both."""
    return click.option(name, callback=_size, metavar="N|H,W", help=text)


def root_option(whose: str = "a list's") -> Decorator:
    """--root."""
    return click.option("--root", metavar="FOLDER", help=f"Folder of {whose} paths; default: the list's own.")


skip_bad_option = click.option(
    "--skip-bad", is_flag=True, help="Leave out images that cannot be read, and name them."
)


def image_options(required: bool = True, n_images: int | None = None) -> Decorator:
    """--images and what is done to them before the net; ``n_images`` is the default of --n-images."""
    return together(
        click.option(
            "--images", required=required, metavar="SRC",
            help="A folder of class folders, a list file, an LMDB, HDF5, .npz, MNIST's idx files or CIFAR's batches.",
        ),
        root_option(),
        click.option(
            "--n-images", type=click.IntRange(1), default=n_images,
            help=f"So many images, drawn by --seed; default: {n_images or 'all'}.",
        ),
        click.option("--mean", metavar="B,G,R|FILE", help="What is subtracted: numbers, .npy or .binaryproto."),
        click.option("--scale", type=float, help="Factor after the mean."),
        size_option("--crop", "Centre crop; default: the net's crop_size, else its input size."),
        size_option("--resize", "Resize every image first, as OpenCV does."),
        click.option(
            "--bgr/--rgb", "bgr", default=None,
            help="The net's channel order. Default: as the images come; image files are BGR as in Caffe, arrays as stored.",
        ),
        skip_bad_option,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What ``image_options`` were given."""

    images: str | None
    root: str | None
    n_images: int
    mean: str | None
    scale: float | None
    crop: tuple[int, int] | None
    resize: tuple[int, int] | None
    bgr: bool | None
    skip_bad: bool


COMPANIONS = frozenset(one.name for one in fields(ImageOptions)) - {"images"}  # nothing without --images


def prepared(
    model: Model, shape: Shape | None, mean: str | None, scale: float | None,
    crop: tuple[int, int] | None, resize: tuple[int, int] | None, bgr: bool | None,
) -> Transform:  # fmt: skip
    """What the net's transform_param says, and the options over it."""
    from .data.transform import Settings, for_net

    order = None if bgr is None else "bgr" if bgr else "rgb"
    return for_net(model.net, Settings(mean, scale, crop, resize, order), shape)  # type: ignore[arg-type]
