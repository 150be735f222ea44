"""Where a net begins: Input and the data layers, whose tops are fed from outside. And Silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import NetError, ShapeError
from ..typed import Typed
from .channels import ignored
from .emit import Emitter
from .spec import LayerSpec, Request, Shape, Shapes, text


@dataclass(frozen=True)
class SourceParams:
    """The shape of each top, None where the file does not say; ``why`` tells what is missing."""

    shapes: tuple[Shape | None, ...]
    why: str


def _infer(p: SourceParams, _bottoms: Shapes) -> Shapes:
    for shape in p.shapes:
        if shape is None:
            raise ShapeError(p.why, hint="give it with --input-shape BLOB=N,C,H,W")
        if any(dim < 0 for dim in shape):
            raise ShapeError(f"a dimension of {text(shape)} is negative")
    return tuple(shape for shape in p.shapes if shape is not None)


def _blob_shapes(typed: Typed) -> tuple[Shape, ...]:
    return tuple(tuple(one["dim"]) for one in typed["shape"])


def _one_or_each(shapes: tuple[Shape, ...], n_tops: int, what: str) -> tuple[Shape, ...]:
    if len(shapes) == 1:
        return shapes * n_tops
    if len(shapes) != n_tops:
        raise NetError(f"{len(shapes)} shapes in {what} for {n_tops} tops; none, one or one each is needed")
    return shapes


def _input(request: Request) -> SourceParams:
    shapes = _blob_shapes(request["input_param"])
    if not shapes:
        return SourceParams((None,) * request.n_tops, "input_param gives no shape")
    return SourceParams(_one_or_each(shapes, request.n_tops, "input_param"), "")


def _dummy(request: Request) -> SourceParams:
    p = request["dummy_data_param"]
    shapes = _blob_shapes(p)
    if not shapes:
        columns = [p[name] for name in ("num", "channels", "height", "width")]
        if len({len(column) for column in columns}) != 1:
            raise NetError("num, channels, height and width differ in count", line=p.line())
        shapes = tuple(zip(*columns, strict=True))
    return SourceParams(_one_or_each(shapes, request.n_tops, "dummy_data_param"), "")


def _memory(request: Request) -> SourceParams:
    """An image and a label: Caffe sets the label up with one axis, and gives it four whenever it runs."""
    p = request["memory_data_param"]
    image = (p["batch_size"], p["channels"], p["height"], p["width"])
    if 0 in image:
        raise NetError("batch_size, channels, height and width must be given and positive", line=p.line())
    return SourceParams((image, (p["batch_size"], 1, 1, 1)), "")


def _images(block: str) -> Callable[[Request], SourceParams]:
    """Data layers that read files: the image's size is known here only where it is cropped or resized."""

    def read(request: Request) -> SourceParams:
        p, transform = request[block], request["transform_param"]
        own = p if p.get("crop_size") else transform
        batch, crop = p["batch_size"], own["crop_size"]
        h, w = (crop, crop) if crop else (p["new_height"], p["new_width"]) if "new_height" in p else (0, 0)
        gray = transform["force_gray"] or ("is_color" in p and not p["is_color"])
        image = (batch, 1 if gray else 3, h, w) if batch and h and w else None
        tops: tuple[Shape | None, ...] = (image, (batch,) if batch else None)
        why = f"{block} does not say how large the images are: they are in the data"
        return SourceParams(tops[: request.n_tops] + (None,) * (request.n_tops - 2), why)

    return read


def _hdf5(request: Request) -> SourceParams:
    return SourceParams((None,) * request.n_tops, "the shape is in the HDF5 files")


def _files(params: Callable[[Request], SourceParams]) -> LayerSpec:
    """A layer that reads files: what it would do with them is not done here, its tops are fed."""
    return replace(_source(params), any_fields=True)


def _source(params: Callable[[Request], SourceParams], tops: tuple[int, int | None] = (1, None)) -> LayerSpec:
    return LayerSpec(
        params=params,
        infer=_infer,
        onnx=None,
        bottoms=(0, 0),
        tops=tops,
        channels=ignored,
        source=True,
    )


def _nothing(_e: Emitter, _params: None) -> None:
    return None


SPECS = {
    "Input": _source(_input),
    "DummyData": _source(_dummy),
    "MemoryData": _source(_memory, (2, 2)),
    "Data": _files(_images("data_param")),
    "ImageData": _files(_images("image_data_param")),
    "WindowData": _files(_images("window_data_param")),
    "HDF5Data": _files(_hdf5),
    "Silence": LayerSpec(
        infer=lambda _p, _bottoms: (),
        onnx=_nothing,
        bottoms=(1, None),
        tops=(0, 0),
        channels=ignored,
    ),
}
