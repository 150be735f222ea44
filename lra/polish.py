"""Polishing a decomposed net: its weights drawn, without labels, to what the original net makes of images.

The layers that were decomposed or refitted move together so that the net's outputs before softmax, and the
activations behind those layers, come close to the original's. All else stays bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from caffe_proto.errors import UsageError
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.rewrite import apply as rewrite

from .calibration import HELD_OUT, Calibration
from .matching import Side, match

STEPS = 600

_RATE = 0.005


@dataclass(frozen=True)
class PolishReport:
    """What polishing did: errors of the outputs on held-out images, before and after, and the layers that moved.

    An error is ``sqrt(mean over outputs of ||z - z'||^2 / ||z||^2)`` before softmax. ``best``: the step, of
    ``steps``, behind which the weights stood that were kept; 0: those of the start.
    """

    before: float
    after: float
    steps: int
    best: int
    layers: tuple[str, ...]
    images: int
    held_out: int


def polish(
    original: Model,
    changed: Model,
    images: Any,
    *,
    steps: int = STEPS,
    seed: int = 0,
    threads: int = 0,
    every_layer: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Model, PolishReport]:
    """Move the weights of the layers that ``changed`` has otherwise than ``original``; its structure stays.

    Least ``sum_outputs |z - z'|^2 / |z|^2 + mean_activations |y - y'|^2 / |y|^2``, primes for the changed net, by
    Adam on batches drawn by ``seed``; a distillation to logits and hints (Hinton et al. 2015; Romero et al. 2015,
    eq. 3). The last tenth of the images judges: the best weights on it are kept, at worst those of the start.
    ``images``: a Calibration, an array (N, C, H, W) as the net wants it, or arrays by blob; N of at least 2.
    ``every_layer``: all convolutions and fully connected layers move. ``tick`` is called behind every step. The same
    seed, images and number of threads give the same weights; lr_mult is not minded.

    Raises UsageError without torch, weights or enough images, UnsupportedError where no value behind a changed
    layer can be run in torch, with the layer that is in the way.
    """
    torch_part = _torch_part()
    if steps < 1:
        raise UsageError(f"{steps} steps to polish in", hint="give 1 or more")
    given = Calibration.of(build(original.net), images).images
    count = len(next(iter(given.values())))
    if count < 2:
        raise UsageError("one image is too few to polish with", hint="give 2 or more: the last tenth judges")
    held_out = max(1, int(HELD_OUT * count))
    whole, cheap = Side.of(original, given), Side.of(changed, given)
    matched = match(whole, cheap, torch_part.runs, every_layer=every_layer)
    if not matched.moving:
        return changed, PolishReport(0.0, 0.0, 0, 0, (), count, held_out)
    pairs = (*matched.activations, *matched.outputs)
    schedule = torch_part.Schedule(steps, min(whole.batch, cheap.batch), seed, _RATE)
    with torch_part.threads(threads):
        target = torch_part.Part(whole, [pair[0] for pair in pairs], {})
        part = torch_part.Part(cheap, [pair[1] for pair in pairs], matched.moving)
        best = torch_part.descend(target, part, len(matched.outputs), given, held_out, schedule, tick)
    edits = [cheap.with_blobs(index, keys, best.blobs) for index, keys in matched.moving.items()]
    layers = tuple(edit.layer for edit in edits)
    report = PolishReport(best.before, best.after, steps, best.step, layers, count, held_out)
    return rewrite(changed, edits) if best.step else changed, report


def _torch_part() -> ModuleType:
    """The module that runs nets in torch; raises UsageError where torch is not installed."""
    try:
        from . import polish_torch
    except ImportError as error:
        if error.name != "torch":
            raise
        raise UsageError("polishing needs torch", hint='install "caffe-lra[train]"') from error
    return polish_torch
