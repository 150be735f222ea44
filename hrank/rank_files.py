"""What was measured, as a file: sums over images a layer, one layer a line; and the rank files that HRank published.

The JSON holds sums, not means, so that two files over different images merge into what one pass would have given.
A published file is ``rank_conv<k>[_<branch>].npy``: mean ranks, float32 (C,).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from caffe_proto.errors import FileError, PlanError, UsageError
from caffe_proto.files import read_bytes, unreadable, writing
from caffe_proto.model import Model
from caffe_proto.plan import read_json

from .measure import Measured, SiteSums
from .rank import RankSums

VERSION = 1
_HEAD = "caffe-lra ranks"
_INTEGERS = ("rank", "rank_squares", "bound", "bound_squares", "nonzero")
_FLOATS = ("activation", "nuclear")
_PUBLISHED = re.compile(r"rank_conv(\d+)(?:_(\w+))?\.npy")


@dataclass(frozen=True, eq=False)
class RankFile:
    """Sums by layer name in net order, the place each was read at, and what they were made from.

    ``net`` and ``weights``: sha256 of the files, "" where not known. ``source``: what the user says of images,
    seed and tolerance.
    """

    layers: dict[str, SiteSums]
    places: dict[str, str]
    source: dict[str, Any] = field(default_factory=dict)
    net: str = ""
    weights: str = ""

    @classmethod
    def of(cls, model: Model, measured: Measured, source: Mapping[str, Any]) -> RankFile:
        """From a pass over images."""
        places = {name: measured.sites.found[name].why for name in measured.sums}
        return cls(dict(measured.sums), places, dict(source), *model.fingerprint)

    def check(self, model: Model, *, force: bool = False) -> None:
        """Raise PlanError where the file was measured on another net or other weights, unless forced."""
        for what, mine, theirs in zip(
            ("net", "weights"), (self.net, self.weights), model.fingerprint, strict=True
        ):
            if mine and theirs and mine != theirs and not force:
                raise PlanError(
                    f"the ranks were measured with another {what} file (sha256 {mine[:12]}..., given {theirs[:12]}...)",
                    path=model.net.path,
                    hint="measure again, or use them all the same with --force",
                )

    def to_json(self) -> str:
        """The file's text: deterministic, one layer a line."""
        head = {_HEAD: VERSION, "net": self.net, "weights": self.weights, "source": self.source}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        layers = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(_record(sums, self.places.get(name, '')))}"
            for name, sums in self.layers.items()
        )
        return "\n".join(["{", *lines, ' "layers": {', *([layers] if layers else []), " }", "}", ""])

    def merge(self, other: RankFile) -> None:
        """Count in what another file holds of other images.

        Raises PlanError where it is of another net, other weights, layers, places or maps.
        """
        if (other.net, other.weights) != (self.net, self.weights) or other.places != self.places:
            raise PlanError("ranks of different nets, weights or sites do not merge")
        for name, sums in self.layers.items():
            try:
                sums.merge(other.layers[name])
            except (KeyError, ValueError) as error:
                raise PlanError(f"ranks do not merge: {error}", layer=name) from error


def write(path: str | Path, ranks: RankFile, inputs: Iterable[str | Path | None] = ()) -> None:
    """Write a rank file; raises UsageError where it would overwrite one of ``inputs``."""
    with writing([path], inputs) as (temporary,):
        temporary.write_text(ranks.to_json(), encoding="utf-8")


def read(path: str | Path) -> RankFile:
    """Read a rank file; raises FileError or PlanError, naming layer and field, where it is none."""
    try:
        source = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError("is no text in UTF-8, a rank file is", path=path) from error
    return from_json(source, path)


def from_json(source: str, path: object = None) -> RankFile:
    """A rank file from its text; raises PlanError where it is none."""
    value = read_json(source, path)
    if value.get(_HEAD) != VERSION:
        raise PlanError(f'is no rank file: "{_HEAD}" is {value.get(_HEAD)!r}, {VERSION} is needed', path=path)
    head = {"net": str, "weights": str, "source": dict, "layers": dict}
    for key, kind in head.items():
        if not isinstance(value.get(key), kind):
            raise PlanError(f'"{key}" is missing, or no {kind.__name__}', path=path)
    unknown = sorted(set(value) - set(head) - {_HEAD})
    if unknown:
        raise PlanError(f'holds an unknown field "{unknown[0]}"', path=path)
    layers, places = {}, {}
    for name, entry in value["layers"].items():
        try:
            layers[name], places[name] = _sums(entry)
        except ValueError as error:
            raise PlanError(str(error), path=path, layer=name) from error
    return RankFile(layers, places, dict(value["source"]), value["net"], value["weights"])


def read_published(folder: str | Path) -> dict[str, np.ndarray]:
    """Mean ranks by file name without ``.npy``, in the order of their numbers, then names: float64 (C,) each.

    Raises FileError where there are none, or a file is no vector of mean ranks.
    """
    try:
        paths = list(Path(folder).iterdir())
    except NotADirectoryError as error:
        raise FileError("is a file, the folder of rank_conv*.npy is needed", path=folder) from error
    except OSError as error:
        raise unreadable(folder, error) from error
    numbered = sorted(
        (int(match[1]), match[2] or "", path) for path in paths if (match := _PUBLISHED.fullmatch(path.name))
    )
    if not numbered:
        raise FileError("holds no files rank_conv<number>[_<branch>].npy", path=folder)
    return {path.stem: read_npy(path) for _, _, path in numbered}


def read_npy(path: str | Path) -> np.ndarray:
    """One vector of mean ranks, float64 (C,); raises FileError where the file holds none."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FileError(f"is no .npy file of numbers: {error}", path=path) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 1
        or array.dtype.kind not in "fiu"
        or not array.size
    ):
        raise FileError("holds no vector of mean ranks, one number a filter", path=path)
    made = array.astype(np.float64)
    if not np.isfinite(made).all() or made.min() < 0:
        raise FileError("holds values that are no mean ranks: negative, or not finite", path=path)
    return made


def assign(published: Mapping[str, np.ndarray], channels: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Published ranks by layer name: the i-th file is that of the i-th layer of ``channels``, layer -> filters.

    The authors count their sites in the order in which the net computes the maps; `sites` gives it by
    ``sorted(found.values(), key=lambda site: (site.value, site.start))``. Raises UsageError where counts differ,
    naming the first layer.
    """
    if len(published) != len(channels):
        raise UsageError(f"there are {len(published)} rank files for {len(channels)} layers")
    made = {}
    for (stem, values), (layer, count) in zip(published.items(), channels.items(), strict=True):
        if len(values) != count:
            raise UsageError(f"{stem} holds {len(values)} ranks for {count} filters", layer=layer)
        made[layer] = values
    return made


def _record(sums: SiteSums, place: str) -> dict[str, Any]:
    record = {
        "place": place,
        "map": list(sums.hw),
        "images": sums.count,
        "rank": sums.ranks.total.tolist(),
        "rank_squares": sums.ranks.squares.tolist(),
        "bound": sums.bounds.total.tolist(),
        "bound_squares": sums.bounds.squares.tolist(),
        "nonzero": sums.nonzero.tolist(),
        "activation": sums.activation.tolist(),
    }
    return record if sums.nuclear is None else {**record, "nuclear": sums.nuclear.tolist()}


def _sums(entry: Any) -> tuple[SiteSums, str]:
    """One layer of a file; raises ValueError where a field is missing or cannot be."""
    if not isinstance(entry, dict):
        raise ValueError("must be a JSON object")
    allowed = {"place", "map", "images", *_INTEGERS, *_FLOATS}
    for key in (*sorted(set(entry) - allowed), *sorted(allowed - {"nuclear"} - set(entry))):
        raise ValueError(f'"{key}" is {"no field of a rank file" if key in entry else "missing"}')
    place, hw, images = entry["place"], entry["map"], entry["images"]
    if not isinstance(place, str):
        raise ValueError('"place" is no text')
    if not isinstance(hw, list) or len(hw) != 2 or not all(_whole(n) and n > 0 for n in hw):
        raise ValueError('"map" is not [height, width]')
    if not _whole(images) or not 1 <= images < 2**31:
        raise ValueError('"images" is no number of images')
    arrays = {key: _vector(entry, key) for key in (*_INTEGERS, *_FLOATS) if key in entry}
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError("its lists differ in length: one number a filter is needed")
    full = min(hw)
    ranks = _restored(arrays["rank"], arrays["rank_squares"], images, full, "rank")
    bounds = _restored(arrays["bound"], arrays["bound_squares"], images, full, "bound")
    if (arrays["rank"] > arrays["bound"]).any():
        raise ValueError('"rank" is above "bound", which no rank exceeds')
    if (arrays["nonzero"] > images * hw[0] * hw[1]).any():
        raise ValueError('"nonzero" counts more than all activations')
    return SiteSums(
        (hw[0], hw[1]), ranks, bounds, arrays["nonzero"], arrays["activation"], arrays.get("nuclear")
    ), place


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _vector(entry: Mapping[str, Any], key: str) -> np.ndarray:
    values = entry[key]
    if not isinstance(values, list):
        raise ValueError(f'"{key}" is no list')
    if key in _INTEGERS:
        if not all(_whole(value) and value < 2**63 for value in values):
            raise ValueError(f'"{key}" holds values that are no counts')
        return np.array(values, np.int64)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ValueError(f'"{key}" holds values that are no numbers')
    made = np.array(values, np.float64)
    if not np.isfinite(made).all():
        raise ValueError(f'"{key}" holds values that are not finite')
    return made


def _restored(total: np.ndarray, squares: np.ndarray, images: int, full: int, what: str) -> RankSums:
    """Sums as they were; raises ValueError where no ranks give them."""
    if (total > images * full).any():
        raise ValueError(f'"{what}" is above {images} images of rank {full}')
    mean = total / images
    if (squares > full * total).any() or (total * mean > squares * (1 + 1e-9)).any():
        raise ValueError(f'"{what}" and "{what}_squares" do not go together')
    made = RankSums(len(total), full)
    made.count, made.total, made.squares = images, total, squares
    return made
