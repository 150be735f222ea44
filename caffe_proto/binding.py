"""Which stored blob belongs to which layer of a net: by layer name, as Caffe copies trained layers.

Layers of the weight file that the net lacks are ignored; blob count and shape must match; layers that
share a ``param`` name share the blob, and the last one stored counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .errors import WeightsError
from .layers.spec import Arrays, Shape, Shapes, text
from .shape_inference import Shaped
from .weights import Weights

_Key = tuple[object, int]


def bind(shaped: Shaped, weights: Weights | None) -> dict[int, Arrays]:
    """The blobs of every node that learns any, by node index.

    Raises WeightsError, naming layers and shapes, where net and weights do not belong together.
    """
    stored: dict[_Key, np.ndarray] = {}
    wanted = _wanted(shaped)
    by_name = _by_name(shaped, wanted)
    trouble: dict[str, str] = {}
    if weights is not None:
        for name in weights:
            for index in by_name.get(name, ()):
                _store(shaped, index, wanted[index], weights[name], stored, trouble)
    _complain(shaped, weights, trouble)
    missing = [
        shaped.graph.nodes[index].name
        for index, shapes in wanted.items()
        if any(_key(shaped, index, i) not in stored for i in range(len(shapes)))
    ]
    if missing:
        some = ", ".join(f'"{name}"' for name in missing[:4]) + (", ..." if len(missing) > 4 else "")
        there = "holds no weights for" if weights is not None else "there are no weights for"
        _complain(shaped, weights, {"": f"{there} {len(missing)} of the {len(wanted)} learnt layers: {some}"})
    return {
        index: tuple(stored[_key(shaped, index, i)].reshape(shape) for i, shape in enumerate(shapes))
        for index, shapes in wanted.items()
    }


def random(shaped: Shaped, seed: int = 0) -> dict[int, Arrays]:
    """Blobs for a net without weights: matrices of variance 2 / fan-in, everything else 1."""
    rng = np.random.default_rng(seed)
    made: dict[_Key, np.ndarray] = {}
    result: dict[int, Arrays] = {}
    for index, shapes in _wanted(shaped).items():
        arrays = []
        for i, shape in enumerate(shapes):
            key = _key(shaped, index, i)
            if key not in made:
                made[key] = _random_blob(rng, shape)
            arrays.append(made[key].reshape(shape))
        result[index] = tuple(arrays)
    return result


def _random_blob(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    if len(shape) < 2:
        return np.ones(shape, np.float32)
    fan_in = max(1, int(np.prod(shape[1:])))
    array = rng.standard_normal(shape, np.float32)
    array *= np.float32(np.sqrt(2 / fan_in))
    return array


def _wanted(shaped: Shaped) -> dict[int, Shapes]:
    nodes = shaped.graph.nodes
    known = (index for index in range(len(nodes)) if index not in shaped.unknown and nodes[index].spec)
    shapes = {index: shaped.blobs(index) for index in known}
    return {index: blobs for index, blobs in shapes.items() if blobs}


def _by_name(shaped: Shaped, wanted: Mapping[int, Shapes]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index in wanted:
        found.setdefault(shaped.graph.nodes[index].name, []).append(index)
    return found


def _key(shaped: Shaped, index: int, blob: int) -> _Key:
    """What a blob is stored under: the name it is shared by, or its own layer."""
    specs = shaped.graph.nodes[index].layer.param_specs
    shared = specs[blob].name if blob < len(specs) else ""
    return (shared, -1) if shared else (index, blob)


def _store(
    shaped: Shaped,
    index: int,
    shapes: Shapes,
    blobs: Arrays,
    stored: dict[_Key, np.ndarray],
    trouble: dict[str, str],
) -> None:
    name = shaped.graph.nodes[index].name
    if len(blobs) != len(shapes):
        trouble[name] = f'layer "{name}" learns {len(shapes)} blobs, stored are {len(blobs)}'
        return
    for i, (array, shape) in enumerate(zip(blobs, shapes, strict=True)):
        if not fits(array.shape, shape):
            trouble[name] = f'layer "{name}" wants {text(shape)} for blob {i}, stored is {text(array.shape)}'
            return
        stored[_key(shaped, index, i)] = array


def fits(stored: Shape, shape: Shape) -> bool:
    """Whether a stored shape is the wanted one, or its legacy form of four axes with leading 1s."""
    return stored == shape or (
        len(stored) == 4 and len(shape) < 4 and stored == (1,) * (4 - len(shape)) + shape
    )


def _complain(shaped: Shaped, weights: Weights | None, trouble: dict[str, str]) -> None:
    """Raise what the first layer in trouble has, and name the others."""
    if not trouble:
        return
    (_, first), *others = trouble.items()
    names = ", ".join(f'"{name}"' for name, _ in others[:3]) + (", ..." if len(others) > 3 else "")
    more = f" (and {len(others)} more: {names})" if others else ""
    net = shaped.graph.path or "the net"
    hint = f"give the weights that were trained with {net}"
    raise WeightsError(first + more, path=weights.path if weights else net, hint=hint)
