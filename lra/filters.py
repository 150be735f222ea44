"""A weight blob as filters: groups of rows, one a filter, whatever the layer's axes. NumPy arrays and torch tensors alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Where the filters of a blob lie: ``(out, in/groups, ...)``, or transposed ``(in, out/groups, ...)``.

    Transposed are Deconvolution, and InnerProduct with ``transpose: true``. Functions of this module and of
    those that take a Layout use only what NumPy arrays and torch tensors share, and return what they got.
    """

    groups: int = 1
    transposed: bool = False

    def split(self, blob: Any) -> Any:
        """Blob of two or more axes -> (groups, filters a group n, channels a filter c, taps s).

        Raises:
            ValueError: fewer than two axes, or `groups` does not divide the first.
        """
        if len(blob.shape) < 2 or blob.shape[0] % self.groups:
            raise ValueError(
                f"blob of shape {tuple(blob.shape)} does not hold filters in {self.groups} groups"
            )
        rows, columns = blob.shape[0] // self.groups, blob.shape[1]
        parts = blob.reshape(self.groups, rows, columns, -1)
        return parts.swapaxes(1, 2) if self.transposed else parts

    def join(self, parts: Any, shape: tuple[int, ...]) -> Any:
        """The inverse of `split`: (groups, n, c, s) -> a blob of that shape."""
        return (parts.swapaxes(1, 2) if self.transposed else parts).reshape(shape)

    def matrices(self, blob: Any) -> Any:
        """Blob -> (groups, n, c s): the matrix of each group, one filter a row."""
        parts = self.split(blob)
        return parts.reshape(parts.shape[0], parts.shape[1], -1)


PLAIN = Layout()
