"""ONNX models in narrower numbers: half precision, or 8 bits with ranges from images."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import FileError, UsageError
from .runtime import Engine, open_onnx

if TYPE_CHECKING:
    import onnx

DTYPES = ("fp32", "fp16", "int8")
Feeds = Mapping[str, np.ndarray]


def narrowed(made: onnx.ModelProto, dtype: str, batches: Iterable[Feeds] = ()) -> onnx.ModelProto:
    """A model in another of `DTYPES`; inputs and outputs stay float32, and so does what has no narrow kernel.

    fp16: all numbers. int8: weights by channel, activations by tensor, as pairs of QuantizeLinear and
    DequantizeLinear around the operators but Softmax, ranges from what ``batches`` make of the model.

    Raises UsageError where int8 gets no batch, or onnxruntime cannot run what comes out.
    """
    if dtype == "fp32":
        return made
    found = _half(made) if dtype == "fp16" else _int8(made, batches)
    try:
        open_onnx(found.SerializeToString(), Engine(1))
    except Exception as error:
        raise UsageError(f"onnxruntime cannot run it in {dtype}: {str(error).splitlines()[0]}") from error
    return found


def _half(made: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    found: onnx.ModelProto = convert_float_to_float16(made, keep_io_types=True)
    return found


class _Reader:
    """Batches as onnxruntime's calibration takes them."""

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self._batches: Iterator[Feeds] = iter(batches)
        self.count = 0

    def get_next(self) -> Feeds | None:
        """The next batch, None at the end."""
        found = next(self._batches, None)
        self.count += found is not None
        return found


def _int8(made: onnx.ModelProto, batches: Iterable[Feeds]) -> onnx.ModelProto:
    import onnx
    from onnxruntime import quantization

    reader, copy = _Reader(batches), onnx.ModelProto()
    copy.CopyFrom(made)  # what it is given is changed
    scores = [node.name for node in made.graph.node if node.op_type == "Softmax"]  # small ones would vanish
    quiet = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises against what is not done here
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantization.quantize_static(
                copy,
                path,
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                nodes_to_exclude=scores,
            )
            return onnx.load(path)
    except ValueError as error:
        if reader.count:
            raise UsageError(f"cannot be quantized: {str(error).splitlines()[0]}") from error
        raise UsageError("8 bits need a batch of images to take ranges from") from error
    finally:
        logging.root.setLevel(quiet)


def parsed(source: bytes, name: str) -> onnx.ModelProto:
    """A model from its bytes; raises FileError where they are none."""
    import onnx

    try:
        return onnx.load_model_from_string(source)
    except Exception as error:
        raise FileError(f"is no ONNX model: {str(error).splitlines()[0]}", path=name) from error


def batches_for(made: onnx.ModelProto, images: Iterable[np.ndarray]) -> Iterator[Feeds]:
    """Images (C, H, W) as feeds of a model of one input; of a fixed batch the last one repeats its first images.

    Raises UsageError where the model has several inputs.
    """
    inputs = made.graph.input
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise UsageError(f"ranges cannot be taken from images, the net has the inputs {names}")
    size = inputs[0].type.tensor_type.shape.dim[0].dim_value or 1
    gathered: list[np.ndarray] = []
    for image in images:
        gathered.append(image)
        if len(gathered) == size:
            yield {inputs[0].name: np.stack(gathered)}
            gathered = []
    if gathered:
        filled = [gathered[i % len(gathered)] for i in range(size)]
        yield {inputs[0].name: np.stack(filled)}


def random_batches(made: onnx.ModelProto, seed: int = 0, count: int = 2) -> Iterator[Feeds]:
    """Made-up input of a model's own shapes, open axes 1: ranges for a model that is only timed."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            value.name: rng.uniform(
                0, 1, [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            ).astype(np.float32)
            for value in made.graph.input
        }
