"""What stands between a picture and a net's input: (x - mean) * scale, in the net's channel order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import schema
from .errors import FileError, UsageError
from .files import read_bytes
from .layers.spec import Shape, text
from .net import Net
from .typed import Typed


@dataclass(frozen=True, eq=False)
class Preprocess:
    """``mean``: (C,) or (C, H, W) in the net's channel order, or None. ``swap``: the picture's channels come reversed."""

    mean: np.ndarray | None = None
    scale: float = 1.0
    swap: bool = False

    def mean_for(self, shape: Shape) -> np.ndarray | None:
        """The mean broadcast against an input (N, C, H, W); a larger mean image is cropped at its centre, as Caffe does in TEST."""
        if self.mean is None:
            return None
        if len(shape) != 4 or self.mean.shape[0] not in (1, shape[1]):
            raise UsageError(
                f"a mean of shape {text(self.mean.shape)} does not fit an input of {text(shape)}"
            )
        if self.mean.ndim == 1:
            return self.mean.reshape(1, -1, 1, 1)
        top, left = (int(have - want) // 2 for have, want in zip(self.mean.shape[1:], shape[2:], strict=True))
        if top < 0 or left < 0:
            raise UsageError(
                f"the mean image {text(self.mean.shape)} is smaller than the input {text(shape)}"
            )
        return self.mean[None, :, top : top + shape[2], left : left + shape[3]]


def read_mean(value: str) -> np.ndarray:
    """``104,117,123``, a ``.npy``, or a Caffe mean file (BlobProto): (C,) or (C, H, W), float32.

    Raises UsageError or FileError where it is none.
    """
    try:
        return np.array([float(one) for one in value.split(",")], np.float32)
    except ValueError:
        pass
    if not Path(value).exists():
        raise FileError(
            "no such mean file, and no list of numbers",
            path=value,
            hint="give 104,117,123, a .npy or a .binaryproto",
        )
    if value.endswith(".npy"):
        try:
            mean = np.load(value, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise FileError(f"is no NumPy array: {error}", path=value) from error
    else:
        mean = _binaryproto(value)
    mean = np.asarray(mean, np.float32)
    mean = mean[0] if mean.ndim == 4 else mean
    if mean.ndim not in (1, 3):
        raise FileError(f"has shape {text(mean.shape)}, (C,) or (C, H, W) is needed", path=value)
    return mean


def _binaryproto(path: str) -> np.ndarray:
    from google.protobuf.message import DecodeError

    blob = schema.message_class("BlobProto")()
    try:
        blob.ParseFromString(read_bytes(path))
    except DecodeError as error:
        raise FileError("is no Caffe mean file (BlobProto)", path=path) from error
    data = np.array(blob.data, np.float32)  # type: ignore[attr-defined]
    shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)  # type: ignore[attr-defined]
    if data.size != np.prod(shape) or not data.size:
        raise FileError(
            f"holds {data.size:,} numbers for shape {text(shape)}; it is no Caffe mean file", path=path
        )
    return data.reshape(shape[-3:])


def of_net(net: Net) -> Preprocess | None:
    """What the net's own ``transform_param`` says, or None where no layer has one; mean files are read."""
    for layer in net.layers:
        for message in layer.message.messages("transform_param"):
            p = Typed(message, "TransformationParameter", layer.document)
            mean = np.array(p["mean_value"], np.float32) if p["mean_value"] else None
            if p["mean_file"]:
                beside = Path(net.path or ".").parent / p["mean_file"]
                mean = read_mean(str(beside if beside.exists() else p["mean_file"]))
            return Preprocess(mean, float(p["scale"]))
    return None
