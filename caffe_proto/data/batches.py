"""A source's images as inputs of a net, batch by batch, read and transformed while the last batch computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import Error, FileError, ShapeError
from ..layers.spec import Shape, text
from .base import Sample, Source, ahead
from .transform import Transform

_MOST_WORKERS = 8


class Batch(NamedTuple):
    """Inputs (N, C, H, W), float32, with their names, and labels (N,) where the source has them."""

    names: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray | None


class Batches:
    """Batches of ``size`` images, the last one what is left; the same at every pass.

    ``n_images`` takes so many of the source at random, in the source's order. ``shape`` (C, H, W) is what
    the net takes; without it the first image decides. With ``skip_bad`` images that cannot be read are left out
    and stand in ``skipped``; without it the first one raises.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | None = None,
        size: int = 32,
        *,
        n_images: int | None = None,
        seed: int = 0,
        shape: Shape | None = None,
        skip_bad: bool = False,
        workers: int | None = None,
    ) -> None:
        self.source, self.transform, self.size = source, transform or Transform(), size
        self.skip_bad, self.shape = skip_bad, shape
        self.skipped: list[FileError] = []
        self.workers = workers or min(os.cpu_count() or 1, _MOST_WORKERS)
        self._seed = abs(seed)
        self.indices = np.arange(len(source))
        if n_images is not None and n_images < len(source):
            drawn = np.random.default_rng(self._seed).choice(len(source), n_images, replace=False)
            self.indices = np.sort(drawn)

    @property
    def n_images(self) -> int:
        """How many images a pass takes, those that cannot be read included."""
        return len(self.indices)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        shape = self.shape
        ready: list[Sample] = []
        for index, made in ahead(
            self._load, self.indices.tolist(), self.workers, 2 * max(self.size, self.workers)
        ):
            if isinstance(made, FileError):
                if not self.skip_bad:
                    raise made
                self.skipped.append(made)
                continue
            shape = shape or made.image.shape
            self._check(index, made, shape)
            ready.append(made)
            if len(ready) == self.size:
                yield self._batch(ready)
                ready = []
        if ready:
            yield self._batch(ready)

    def _load(self, index: int) -> tuple[int, Sample | FileError]:
        try:
            sample = self.source[index]
        except FileError as error:
            return index, error
        random = np.random.default_rng([self._seed, index]) if self.transform.train else None
        try:
            made = self.transform(sample.image, self.source.order, random)
        except ShapeError as error:
            raise self._placed(error, index, sample.name) from None
        return index, sample._replace(image=made)

    def _check(self, index: int, sample: Sample, shape: Shape) -> None:
        if sample.image.shape != tuple(shape):
            raise self._placed(
                ShapeError(
                    f"is {text(sample.image.shape)} where {text(shape)} is wanted", hint="resize or crop"
                ),
                index,
                sample.name,
            )

    def _placed(self, error: Error, index: int, name: str) -> Error:
        path, line = self.source.place(index)
        return ShapeError(f'image "{name}" {error.message}', path=path, line=line, hint=error.hint)

    def _batch(self, samples: list[Sample]) -> Batch:
        labels = None
        if self.source.labelled:
            missing = [sample.name for sample in samples if sample.label is None]
            if missing:
                raise FileError(f'image "{missing[0]}" has no label, others have', path=self.source.path)
            labels = np.array([sample.label for sample in samples], np.int64)
        images = np.stack([sample.image for sample in samples]).astype(np.float32, copy=False)
        return Batch(tuple(sample.name for sample in samples), images, labels)
