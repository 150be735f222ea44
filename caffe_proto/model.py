"""A net and its weights, loaded, saved and told apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from . import files, weights
from .errors import UsageError
from .net import Net, NetState
from .net import load as load_net
from .weights import Weights


@dataclass(frozen=True, eq=False)
class Model:
    """A prototxt with the weights that belong to it, or without any."""

    net: Net
    weights: Weights | None = field(default=None, repr=False)

    @cached_property
    def fingerprint(self) -> tuple[str, str]:
        """sha256 of the prototxt and of the weight file as they stand on disk; "" where there is none."""
        net = hashlib.sha256(files.text_bytes(self.net.text)).hexdigest()
        path = self.weights.path if self.weights else None
        return net, _sha256(path) if path else ""

    def in_state(self, state: NetState) -> Model:
        """The same files seen in another phase, with other stages or another level."""
        return replace(self, net=replace(self.net, state=state))


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(
    net: str | Path,
    weights_path: str | Path | None = None,
    *,
    phase: str = "TEST",
    stages: tuple[str, ...] = (),
    level: int = 0,
) -> Model:
    """Load a prototxt of any dialect and, where given, a ``.caffemodel`` or ``.caffemodel.h5``.

    Raises FileError, PrototxtError or CaffemodelError: one line with file and line.
    """
    state = NetState(phase, tuple(stages), level)
    return Model(load_net(net, state), weights.load(weights_path) if weights_path is not None else None)


def fingerprint_document(model: Model) -> dict[str, str]:
    """The sha256 of a model's files as JSON: ``{"net": ..., "weights": ...}``, without weights where there are none."""
    named = zip(("net", "weights"), model.fingerprint, strict=True)
    return {what: digest for what, digest in named if digest}


def net_and_weights(item: str) -> tuple[str, str | None]:
    """``NET[,WEIGHTS]`` as two paths: at the first comma behind which NET is a file, as a path may hold commas.

    Raises UsageError where there are weights alone.
    """
    commas = [i for i, letter in enumerate(item) if letter == ","]
    if Path(item).is_file() or not commas:
        if Path(item).is_file() and files.is_binary(item):
            raise UsageError("is no net; weights stand behind theirs", path=item, hint="NET,WEIGHTS")
        return item, None
    at = next((i for i in commas if Path(item[:i]).is_file()), commas[0])
    return item[:at], item[at + 1 :] or None


def save(model: Model, net_path: str | Path, weights_path: str | Path | None = None) -> None:
    """Write the prototxt and the weights, HDF5 where the name ends in ``.h5``; all or nothing.

    What was not replaced is written byte for byte. Raises UsageError where a path is one of the inputs.
    """
    paths = [net_path] if weights_path is None else [net_path, weights_path]
    inputs = (model.net.path, model.weights.path if model.weights else None)
    with files.writing(paths, inputs) as temporary:
        temporary[0].write_bytes(files.text_bytes(model.net.text))
        if weights_path is not None and model.weights is not None:
            write_weights(model.weights, temporary[1], hdf5=is_hdf5_name(weights_path))


def is_hdf5_name(path: str | Path) -> bool:
    """Whether a weight file of that name is HDF5."""
    return Path(path).suffix in (".h5", ".hdf5")


def write_weights(stored: Weights, path: Path, *, hdf5: bool) -> None:
    """Write weights in one of the two forms, to that very path."""
    if hdf5:
        stored.write_hdf5(path)
    else:
        with path.open("wb") as file:
            stored.write_caffemodel(file)
