"""What every source of images gives: samples by index, in Caffe's layout, read again as often as asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeVar

import numpy as np

from ..errors import FileError
from .pictures import Size, resize

Order = Literal["bgr", "rgb"]
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Sample(NamedTuple):
    """One image (C, H, W), float32, with its label or None."""

    name: str
    image: np.ndarray
    label: int | None


class Source(ABC):
    """Images by index; holds what finds them, not the images. Several threads may read at once."""

    order: Order = "bgr"
    """The order in which three channels come."""

    def __init__(self, path: str | Path, size: Size | None = None) -> None:
        self.path = str(path)
        self.size = size
        """Height and width that every image is resized to on reading."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def labelled(self) -> bool:
        """Whether the images have labels."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """One image as it is stored, uint8 or float; raises FileError where it is missing or broken."""

    def place(self, index: int) -> tuple[str, int | None]:
        """File and line that an error about an image names."""
        return self.path, None

    def close(self) -> None:  # noqa: B027
        """Close what is open; nothing, where no file is kept open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        try:
            sample = self.read(index)
        except FileError as error:
            path, line = self.place(index)
            raise error.at(path=path, line=line) from error.__cause__
        image = sample.image if self.size is None else resize(sample.image, self.size)
        return sample._replace(image=np.asarray(image, np.float32))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class Arrays(Source):
    """Images (N, C, H, W) and labels (N,) that lie in memory or in a mapped file."""

    def __init__(
        self,
        path: str | Path,
        images: np.ndarray,
        labels: np.ndarray | None,
        size: Size | None = None,
        order: Order = "rgb",
    ) -> None:
        super().__init__(path, size)
        self.images, self.labels, self.order = images, checked_labels(path, labels, len(images)), order
        if not len(images):
            raise FileError("holds no images", path=path)
        if images.ndim != 4:
            raise FileError(f"holds images of {images.ndim - 1} axes, (C, H, W) is needed", path=path)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def read(self, index: int) -> Sample:
        label = None if self.labels is None else int(self.labels[index])
        return Sample(f"{Path(self.path).name}[{index}]", self.images[index], label)


class Joined(Source):
    """Several sources as one, in order."""

    def __init__(self, path: str | Path, parts: Sequence[Source]) -> None:
        super().__init__(path)
        self.parts = parts
        self.order = parts[0].order
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def labelled(self) -> bool:
        return all(part.labelled for part in self.parts)

    def read(self, index: int) -> Sample:
        part, inner = self._find(index)
        return part[inner]

    def place(self, index: int) -> tuple[str, int | None]:
        part, inner = self._find(index)
        return part.place(inner)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def _find(self, index: int) -> tuple[Source, int]:
        part = bisect_right(self._starts, index) - 1
        return self.parts[part], index - self._starts[part]


def checked_labels(path: str | Path, labels: np.ndarray | None, n: int) -> np.ndarray | None:
    """Labels as whole numbers, one an image; raises FileError where they are none."""
    if labels is None:
        return None
    found = np.asarray(labels)
    if found.size != n or found.ndim == 0 or found.shape[0] != n:
        raise FileError(
            f"has {n:,} images, and labels of shape {found.shape}: one an image is needed", path=path
        )
    found = found.reshape(n)
    if (
        found.dtype.kind not in "iuf"
        or not np.array_equal(found, np.floor(found))
        or found.min(initial=0) < 0
    ):
        raise FileError("has labels that are no whole numbers from 0 up", path=path)
    return found.astype(np.int64)


def ahead(
    function: Callable[[_Item], _Made], items: Iterable[_Item], workers: int, bound: int
) -> Iterator[_Made]:
    """``map`` by threads that work ahead of the reader: results in order, at most ``bound`` of them waiting."""
    from collections import deque
    from concurrent.futures import Future, ThreadPoolExecutor

    waiting: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= bound:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
