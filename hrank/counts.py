"""FLOPs and parameters of a pruned net, as they are and as the authors of HRank count them.

One multiply-accumulate is one FLOP in all of them. A convolution of kernel k x k from C to N channels on an H x W
output has C*N*k*k*H*W MACs. Reference: Lin et al., CVPR 2020, tables 1 to 5, and the code published with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import numpy as np

from caffe_proto.costs import cost
from caffe_proto.layers.channels import Channels, Cut
from caffe_proto.layers.spec import Shape, Shapes

from .coupling import Coupling, removed_places


@dataclass(frozen=True)
class Count:
    """FLOPs of one forward pass at the net's batch size, and parameters."""

    flops: int
    params: int


def true(coupling: Coupling, keep: Mapping[str, Sequence[int]]) -> Count:
    """MACs and stored numbers of the net once it is pruned, as ``caffe_proto.costs`` counts what ``apply`` writes.

    ``keep``: the output channels that layers keep. Raises PlanError where they cannot be removed.
    """
    gone = coupling.removed(keep)
    before = cost(coupling.shaped)
    saved = [_saved(coupling, index, gone) for index in coupling.notes]
    owned = _owned(coupling)
    macs = sum(macs for macs, _ in saved)
    params = sum(
        number
        for index, (_, blobs) in zip(coupling.notes, saved, strict=True)
        for blob, number in enumerate(blobs)
        if (index, blob) in owned
    )
    return Count(before.macs - macs, before.params - params)


def hrank(coupling: Coupling, kept: Mapping[str, int], *, transitions: Collection[str] = ()) -> Count:
    """The count of the HRank code: filters are fewer, but each still reads all the channels that the net had.

    Convolutions C*n*k*k*H*W with n = ``kept`` of N filters, InnerProducts as they were, everything else nothing;
    parameters are theirs, with biases. ``transitions``: layers of a DenseNet that read what is left, as the code
    builds them.
    """
    return _sum(_filters(coupling, _gone(coupling, kept), transitions))


def hrankplus(coupling: Coupling, kept: Mapping[str, int]) -> Count:
    """The count of the HRankPlus code: filters read what is left, a bias is one FLOP and BatchNorm two a number.

    The channels of a sum are those of its last term: HRankPlus narrows the branches of a residual stage and lays the
    shortcut over them. Parameters are those of convolutions and InnerProducts, and of the Scale behind BatchNorm.
    """
    gone = _gone(coupling, kept)
    rows = _filters(coupling, gone, coupling.filters), _biases(coupling, gone), _norms(coupling, gone)
    return _sum(chain.from_iterable(rows))


def _sum(rows: Iterable[Count]) -> Count:
    found = list(rows)
    return Count(sum(row.flops for row in found), sum(row.params for row in found))


def _gone(coupling: Coupling, kept: Mapping[str, int]) -> np.ndarray:
    """Which ids go, where each layer keeps its first so many and a sum is as its last term."""
    stays = {name: np.arange(coupling.member(name)[1].channels) < count for name, count in kept.items()}
    return coupling.going(stays, lambda terms: terms[-1])


def _filters(coupling: Coupling, gone: np.ndarray, narrowed: Collection[str]) -> Iterator[Count]:
    """Convolutions and InnerProducts; those ``narrowed`` read what is left, others what there was."""
    for index, note in _with_filters(coupling):
        shapes = coupling.shaped.blobs(index)
        cuts = [cut for cut in note.cuts if note.layer in narrowed or _is_own(note, cut)]
        sizes = [narrowed_size(shape, _of(cuts, blob), gone) for blob, shape in enumerate(shapes)]
        yield Count(_places(coupling, index, shapes[0]) * sizes[0], sum(sizes))


def _biases(coupling: Coupling, gone: np.ndarray) -> Iterator[Count]:
    """One FLOP for each number that a convolution adds its bias to."""
    for index, note in _with_filters(coupling):
        weight, *biases = coupling.shaped.blobs(index)
        if biases and len(weight) > 2:
            channels = narrowed_size(biases[0], _of(note.cuts, 1), gone)
            yield Count(channels * prod(note.out_shapes[0]) // biases[0][0], 0)


def _with_filters(coupling: Coupling) -> Iterator[tuple[int, Channels]]:
    for index, note in coupling.notes.items():
        spec = coupling.shaped.graph.nodes[index].spec
        if spec is not None and spec.filters:
            yield index, note


def _is_own(note: Channels, cut: Cut) -> bool:
    """Whether a cut is along the layer's own filters."""
    assert note.filters is not None
    return bool(np.isin(cut.ids, note.filters).all())


def _norms(coupling: Coupling, gone: np.ndarray) -> Iterator[Count]:
    """BatchNorm, two FLOPs a number, and the scale and shift behind it."""
    for index, note in coupling.notes.items():
        shapes = coupling.shaped.blobs(index)
        if note.type == "BatchNorm":
            channels = narrowed_size(shapes[0], _of(note.cuts, 0), gone)
            yield Count(2 * channels * prod(note.out_shapes[0]) // shapes[0][0], 0)
        elif note.type == "Scale":
            sizes = (narrowed_size(shape, _of(note.cuts, blob), gone) for blob, shape in enumerate(shapes))
            yield Count(0, sum(sizes))


def _places(coupling: Coupling, index: int, weight: Shape) -> int:
    """How often each number of a weight is multiplied in one pass."""
    node, note = coupling.shaped.graph.nodes[index], coupling.notes[index]
    assert node.spec is not None
    return node.spec.macs(node.params, note.in_shapes, note.out_shapes) // max(1, prod(weight))


def _saved(coupling: Coupling, index: int, gone: np.ndarray) -> tuple[int, list[int]]:
    """The MACs, and the numbers of each blob, that a layer has less."""
    note, shapes = coupling.notes[index], coupling.shaped.blobs(index)
    saved = [prod(shape) - narrowed_size(shape, _of(note.cuts, i), gone) for i, shape in enumerate(shapes)]
    return (_places(coupling, index, shapes[0]) * saved[0] if saved else 0), saved


def _of(cuts: Sequence[Cut], blob: int) -> list[Cut]:
    return [cut for cut in cuts if cut.blob == blob]


def narrowed_size(shape: Shape, cuts: Sequence[Cut], gone: np.ndarray) -> int:
    """How many numbers a blob has without the places that go."""
    left = {cut.axis: ~removed_places(gone, cut.ids) for cut in cuts}
    blocks = next((stays for stays in left.values() if stays.ndim == 2), None)
    rest = prod(dim for axis, dim in enumerate(shape) if axis not in left)
    if blocks is None:
        return rest * prod(int(stays.sum()) for stays in left.values())
    rows = left.get(0, np.ones(shape[0], bool)).reshape(len(blocks), -1).sum(1)
    others = rest if 0 in left else rest // shape[0]
    return others * int((rows * blocks.sum(1)).sum())


def _owned(coupling: Coupling) -> set[tuple[int, int]]:
    """(node, blob) of every learnt blob, a shared one at its first layer only."""
    seen: set[str] = set()
    found = set()
    for index in coupling.notes:
        specs = coupling.shaped.graph.nodes[index].layer.param_specs
        shapes: Shapes = coupling.shaped.blobs(index)
        for blob in range(len(shapes)):
            name = specs[blob].name if blob < len(specs) else ""
            if not name or name not in seen:
                found.add((index, blob))
            seen.add(name)
    return found
