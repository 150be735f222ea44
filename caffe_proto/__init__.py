"""Everything Caffe: its files, its nets, and how they run.

``load`` a prototxt and a caffemodel, look at ``model.net.layers`` and ``model.weights["conv1"]``, ask for
``shapes`` and ``cost``, run it in a ``session``, ``export_onnx`` it, ``save`` it. Every error derives from
``caffe_proto.errors.Error``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import errors
from .model import Model, load, save

if TYPE_CHECKING:
    from .costs import Cost
    from .onnx_export import export_onnx
    from .runtime import session

__all__ = ["Model", "cost", "errors", "export_onnx", "load", "save", "session", "shapes"]
__version__ = "0.1.0"


def shapes(
    model: Model, input_shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every blob; refuses what real Caffe refuses, stored weights that do not fit included."""
    from . import binding
    from .shape_inference import infer

    shaped = infer(_graph(model), input_shapes)
    if model.weights is not None:
        binding.bind(shaped, model.weights)
    return shaped.by_blob()


def cost(model: Model, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> Cost:
    """MACs and parameters by layer, and their totals."""
    from .costs import cost as count
    from .shape_inference import infer

    return count(infer(_graph(model), input_shapes))


def _graph(model: Model) -> Any:
    from .graph import build

    return build(model.net)


def __getattr__(name: str) -> Any:
    """What needs onnx or onnxruntime is imported when first asked for."""
    if name == "session":
        from .runtime import session

        return session
    if name == "export_onnx":
        from .onnx_export import export_onnx

        return export_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
