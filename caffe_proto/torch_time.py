"""Latencies in torch: the same nets as torch runs them, on a CPU or a GPU, interleaved as in `latency`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .binding import bind, random
from .costs import cost
from .errors import UsageError
from .graph import build
from .latency import Timing, in_turn
from .model import fingerprint_document, load, net_and_weights
from .onnx_export import Request, source_shapes
from .shape_inference import infer
from .torch_net import TorchNet

RELEASE = torch.__version__


class TorchSubject:
    """A net to time: ``NET[,WEIGHTS]``, random weights where none are given.

    ``macs``: of a forward pass; ``feeds``: what it is fed; ``fingerprint``: sha256 of its files.

    Raises UnsupportedError where torch has no such layer, UsageError on a device that torch cannot use.
    """

    def __init__(self, item: str, device: str, *, batch: int | None, seed: int) -> None:
        if item.endswith(".onnx"):
            raise UsageError("torch cannot run ONNX files", path=item, hint="give the net and its weights")
        _check(device)
        path, weights = net_and_weights(item)
        model = load(path, weights)
        built = build(model.net)
        shapes = source_shapes(built, Request(batch=batch))
        shaped = infer(built, shapes)
        blobs = bind(shaped, model.weights) if model.weights is not None else random(shaped, seed)
        rng = np.random.default_rng(seed)
        self.name, self.device = item, device
        self.macs = cost(shaped).macs
        self.fingerprint = fingerprint_document(model)
        self._net = TorchNet(model.net, shaped, blobs, device=device)
        self.feeds = {
            name: torch.tensor(rng.uniform(0, 1, shape).astype(np.float32), device=device)
            for name, shape in shapes.items()
        }

    def run(self) -> dict[str, Tensor]:
        """One forward pass, to its end: the outputs."""
        with torch.inference_mode():
            outputs = self._net.run(self.feeds).blobs
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return outputs


def _check(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'torch cannot use the device "{device}": {str(error).splitlines()[0]}') from error


def measure(
    subjects: Sequence[TorchSubject],
    *,
    threads: int = 0,
    runs: int = 50,
    warmup: int = 10,
    step: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time nets side by side, a run of each in turn; ``threads`` 0: all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    try:
        return in_turn([(one.name, one.run) for one in subjects], runs=runs, warmup=warmup, step=step)
    finally:
        torch.set_num_threads(before)
