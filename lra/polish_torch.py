"""A part of a net in torch, from its images to wanted values, and the steps that draw its blobs to what another gives.

BatchNorm, Scale and Bias that do not move and stand behind a convolution or a fully connected layer are folded into
it on the way: ``y = act((a W) * x + (a b + c))``, with the gradient of W and b alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from caffe_proto.errors import Error
from caffe_proto.graph import Node, Value
from caffe_proto.layers.dense import DenseParams
from caffe_proto.torch_layers import TORCH
from caffe_proto.torch_layers.base import ALONE, Call, Forward
from caffe_proto.torch_net import request_of

from .matching import BlobKey, Side

Array = np.ndarray

_FOLDED = ("BatchNorm", "Scale", "Bias")
_JUDGED = 10  # times that the held-out images are looked at
_LARGEST_STEP = 1.0  # norm of the gradient of all blobs, clipped to


def runs(node: Node) -> bool:
    """Whether torch can run a layer."""
    return node.problem is None and node.layer.type in TORCH


@dataclass(frozen=True, eq=False)
class _Step:
    """A node ready to run; ``top`` is what it writes, that of the last layer folded into it."""

    node: Node
    forward: Forward
    blobs: Callable[[], list[Tensor]]
    tops: tuple[Value, ...]


class Part:
    """The part of a net that ``wanted`` needs; ``moving`` says under which keys blobs of a node may move.

    Raises UnsupportedError, with file, line and layer, where torch cannot run a layer as it is set.
    """

    def __init__(
        self,
        side: Side,
        wanted: Sequence[Value],
        moving: Mapping[int, Mapping[int, BlobKey]],
    ) -> None:
        self.shaped, self.wanted = side.shaped, tuple(wanted)
        self.moved: dict[BlobKey, Tensor] = {}
        self._net, self._blobs, self._moving = side.model.net, side.blobs, moving
        shaped = side.shaped
        sources = set(shaped.graph.sources)
        self._steps: list[_Step] = []
        folded: set[int] = set()
        for index in sorted(shaped.graph.needed(wanted, sources)):
            if index not in folded:
                behind = self._foldable(index)
                self._steps.append(self._step(index, behind))
                folded.update(behind)

    def run(self, images: Mapping[Value, Tensor]) -> list[Tensor]:
        """The wanted values of a batch."""
        values = dict(images)
        for step in self._steps:
            inputs = [values[value] for value in step.node.inputs]
            for value, made in zip(step.tops, step.forward(_call(step, inputs)), strict=False):
                values[value] = made
        return [values[value] for value in self.wanted]

    def _foldable(self, index: int) -> list[int]:
        """The layers behind a node that can be folded into it."""
        graph, found, value = self.shaped.graph, [], Value(index, 0)
        node = graph.nodes[index]
        if node.layer.type not in ("Convolution", "InnerProduct") or len(node.layer.tops) != 1:
            return []
        while value not in self.wanted and len(readers := graph.consumers[value]) == 1:
            reader = graph.nodes[readers[0]]
            if reader.layer.type not in _FOLDED or self._affine(readers[0]) is None:
                break
            found.append(readers[0])
            value = Value(readers[0], 0)
        return found if self._channels_are_outputs(index) else []

    def _channels_are_outputs(self, index: int) -> bool:
        """Whether axis 1 of what a node writes are its outputs."""
        shape = self.shaped.shapes[Value(index, 0)]
        return len(shape) > 1 and shape[1] == self.shaped.graph.nodes[index].params.num_output

    def _affine(self, index: int) -> tuple[Array, Array] | None:
        """Scale and shift of a layer that does not move; None where it is not such."""
        node = self.shaped.graph.nodes[index]
        if node.spec is None or len(node.inputs) != 1:
            return None
        return node.spec.affine(node.params, self._blobs.get(index, ()), self.shaped.bottoms(index))

    def _step(self, index: int, behind: Sequence[int]) -> _Step:
        node = self.shaped.graph.nodes[index]
        params = replace(node.params, bias=True) if behind else node.params
        try:
            forward = TORCH[node.layer.type](params, request_of(node, self._net))
        except Error as error:
            path = self.shaped.graph.path
            raise error.at(path=path, line=node.layer.line, layer=node.name) from error.__cause__
        own = self._tensors(index)
        blobs = self._with_folded(node, own, behind) if behind else (lambda: own)
        last = behind[-1] if behind else index
        tops = tuple(Value(last, top) for top in range(len(node.layer.tops)))
        return _Step(node, forward, blobs, tops)

    def _tensors(self, index: int) -> list[Tensor]:
        """The blobs of a node, of those that move one tensor for all nodes that share it."""
        made = []
        for i, array in enumerate(self._blobs.get(index, ())):
            tensor = torch.tensor(array, dtype=torch.float32)
            key = self._moving.get(index, {}).get(i)
            if key is not None:
                tensor = self.moved.setdefault(key, tensor.requires_grad_())
            made.append(tensor.reshape(array.shape))
        return made

    def _with_folded(
        self, node: Node, own: Sequence[Tensor], behind: Sequence[int]
    ) -> Callable[[], list[Tensor]]:
        """W and b with the layers behind in them: a W and a b + c."""
        scale, shift = np.ones(1), np.zeros(1)
        for index in behind:
            found = self._affine(index)
            assert found is not None
            scale, shift = scale * found[0], shift * found[0] + found[1]
        outputs = node.params.num_output
        a, c = (
            torch.tensor(np.broadcast_to(one, outputs).copy(), dtype=torch.float32) for one in (scale, shift)
        )
        across = isinstance(node.params, DenseParams) and node.params.transpose

        def blobs() -> list[Tensor]:
            rows = a if across else a.reshape(-1, *(1,) * (own[0].dim() - 1))
            return [own[0] * rows, own[1] * a + c if len(own) > 1 else c]

        return blobs


def _call(step: _Step, inputs: Sequence[Tensor]) -> Call:
    def tops() -> tuple[tuple[int, ...], ...]:
        assert step.node.spec is not None
        return step.node.spec.infer(step.node.params, tuple(tuple(one.shape) for one in inputs))

    return Call(inputs, step.blobs(), tops, {}, ALONE)


@dataclass(frozen=True)
class Schedule:
    """How the steps go: their number, images of each, seed, and the largest learning rate.

    ``rate`` is a share of the root mean square of a blob: about what each of its numbers moves by in a step.
    """

    steps: int
    batch: int
    seed: int
    rate: float


@dataclass(frozen=True, eq=False)
class Best:
    """The blobs that gave the least held-out error, the step behind which they stood, that error and the first one."""

    blobs: dict[BlobKey, Array]
    step: int
    before: float
    after: float


def descend(
    target: Part,
    part: Part,
    outputs: int,
    images: Mapping[str, Array],
    held_out: int,
    schedule: Schedule,
    tick: Callable[[], None],
) -> Best:
    """Draw what ``part`` makes of images to what ``target`` makes of them, by Adam at a cosine learning rate.

    ``loss = sum over outputs of |z - z'|^2 / |z|^2  +  mean over the other wanted values of |y - y'|^2 / |y|^2``

    The gradient is that by each blob over its root mean square (a blob of zeros counts as the least of the others),
    so that no scale of weights or images matters; it is clipped to norm 1. ``outputs``: how many of the wanted
    values, the last ones, are outputs. The last ``held_out`` images are only
    looked at: the blobs of least ``sqrt(mean over outputs of |z - z'|^2 / |z|^2)`` on them are kept.
    """
    count = len(next(iter(images.values())))
    judge = _Judge(target, part, outputs, images, range(count - held_out, count), schedule.batch)
    blobs = list(part.moved.values())
    sizes = [_size(blob) for blob in blobs]
    least = min((size for size in sizes if size), default=1.0)
    optimizer = torch.optim.Adam(
        [{"params": [blob], "size": size or least} for blob, size in zip(blobs, sizes, strict=True)]
    )
    best = first = judge()
    kept, at = _copied(part), 0
    drawn = _batches(count - held_out, schedule)
    every = max(1, schedule.steps // _JUDGED)
    for step in range(1, schedule.steps + 1):
        optimizer.zero_grad()
        loss = _loss(target, part, outputs, images, next(drawn))
        loss.backward()  # type: ignore[no-untyped-call]
        _set(optimizer, schedule.rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / schedule.steps)))
        torch.nn.utils.clip_grad_norm_(blobs, _LARGEST_STEP)
        optimizer.step()
        tick()
        if step % every == 0 or step == schedule.steps:
            error = judge()
            if error < best:
                best, kept, at = error, _copied(part), step
    return Best(kept, at, first, best)


def _set(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Have steps be shares of the blobs' sizes: nets differ in these by orders of magnitude."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["size"]
        for blob in group["params"]:
            if blob.grad is not None:
                blob.grad *= group["size"]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch use so many threads within; 0: as many as it does anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _size(blob: Tensor) -> float:
    """The root mean square of a blob."""
    return float(blob.detach().square().mean().sqrt())


def _copied(part: Part) -> dict[BlobKey, Array]:
    return {key: blob.detach().numpy().copy() for key, blob in part.moved.items()}


def _batches(count: int, schedule: Schedule) -> Iterator[Array]:
    """Images of each step: every image once, in an order drawn by the seed, then again in another."""
    random = np.random.default_rng(schedule.seed)
    size = min(schedule.batch, count)
    while True:
        order = random.permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def _fed(part: Part, images: Mapping[str, Array], chosen: Sequence[int] | Array) -> dict[Value, Tensor]:
    """Images by the values they feed."""
    graph = part.shaped.graph
    return {
        value: torch.from_numpy(np.asarray(images[graph.blob(value)][chosen]))
        for value in graph.sources
        if graph.blob(value) in images
    }


def _parts_of(made: Tensor, wanted: Tensor) -> Tensor:
    """|made - wanted|^2 / |wanted|^2, by |made|^2 + 1 where wanted is zero."""
    norm = wanted.square().sum()
    return (made - wanted).square().sum() / torch.where(norm > 0, norm, 1.0)


def _loss(target: Part, part: Part, outputs: int, images: Mapping[str, Array], chosen: Array) -> Tensor:
    with torch.no_grad():
        wanted = target.run(_fed(target, images, chosen))
    made = part.run(_fed(part, images, chosen))
    errors = torch.stack([_parts_of(*pair) for pair in zip(made, wanted, strict=True)])
    inner = errors[:-outputs]
    return errors[-outputs:].sum() + (inner.mean() if len(inner) else 0.0)


class _Judge:
    """The error of the outputs on held-out images; what they shall be is computed once."""

    def __init__(
        self,
        target: Part,
        part: Part,
        outputs: int,
        images: Mapping[str, Array],
        held_out: Sequence[int],
        batch: int,
    ) -> None:
        self._part, self._outputs, self._images = part, outputs, images
        self._chosen = [held_out[start : start + batch] for start in range(0, len(held_out), batch)]
        self._wanted = [self._run(target, chosen) for chosen in self._chosen]

    def __call__(self) -> float:
        squares = np.zeros((2, self._outputs))
        for chosen, wanted in zip(self._chosen, self._wanted, strict=True):
            for i, (made, right) in enumerate(zip(self._run(self._part, chosen), wanted, strict=True)):
                squares[:, i] += float((made - right).square().sum()), float(right.square().sum())
        return float(np.sqrt(np.mean(squares[0] / np.where(squares[1] > 0, squares[1], 1.0))))

    @torch.no_grad()
    def _run(self, part: Part, chosen: Sequence[int]) -> list[Tensor]:
        return part.run(_fed(part, self._images, chosen))[-self._outputs :]
