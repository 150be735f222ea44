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

# Where nets from before transform_param say the same.
_OLD_BLOCKS = {
    "data_param": "DataParameter",
    "image_data_param": "ImageDataParameter",
    "window_data_param": "WindowDataParameter",
}


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


def settings(net: Net) -> Typed | None:
    """The net's own ``transform_param``, or the data block of an old net that says the same; None without one."""
    for layer in net.layers:
        for message in layer.message.messages("transform_param"):
            return Typed(message, "TransformationParameter", layer.document)
        for name, type_name in _OLD_BLOCKS.items():
            for message in layer.message.messages(name):
                found = Typed(message, type_name, layer.document)
                if any(field in found for field in ("scale", "mean_file", "crop_size", "mirror")):
                    return found
    return None


def own_mean(net: Net, p: Typed) -> np.ndarray | None:
    """The mean that the settings name, a file beside the net or where they say; None where they name none."""
    if p["mean_file"]:
        beside = Path(net.path or ".").parent / p["mean_file"]
        found = next((path for path in (beside, Path(p["mean_file"])) if path.exists()), None)
        if found is None:
            raise FileError(
                f'there is no mean file "{p["mean_file"]}"',
                path=net.path,
                line=p.line("mean_file"),
                hint="put it there, beside the net or where you are, or give the mean by --mean FILE where the command has it",
            )
        return read_mean(str(found))
    values = p.get("mean_value")
    return np.array(values, np.float32) if values else None


def of_net(net: Net) -> Preprocess | None:
    """What the net's own ``transform_param`` says, or None where no layer has one; mean files are read."""
    p = settings(net)
    return None if p is None else Preprocess(own_mean(net, p), float(p["scale"]))
