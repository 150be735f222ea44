"""What the data layers of a net feed it: endless batches, told by their number alone.

A batch is made of its number and the seed, so that training goes on after a stop exactly as it would have
without one, and several processes can each take their part of the same batch. As in Caffe a batch runs over
the end of the data into the next round, and ImageData and HDF5Data with ``shuffle`` are shuffled anew in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from . import files
from .data import Arrays, Sample, Source, _hdf5_list, open_source
from .data.base import ahead
from .data.pictures import Size
from .data.transform import Transform, for_net
from .errors import Error, FileError, NetError, ShapeError, UnsupportedError, UsageError
from .fillers import Filler, fill, read
from .graph import Graph, Node
from .layers import LAYERS
from .layers.spec import Request, Shape, text
from .net import Net
from .text import Message
from .typed import Typed, check

Batch = dict[str, np.ndarray]

_WORKERS = 4


@dataclass(frozen=True)
class Part:
    """Which part of every batch is taken: the ``rank``-th of ``world``."""

    rank: int = 0
    world: int = 1

    def of(self, size: int) -> slice:
        """The part of ``size`` items; raises UsageError where they cannot be shared out evenly."""
        if size % self.world:
            raise UsageError(f"a batch of {size} cannot be shared by {self.world} processes evenly")
        share = size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)


class Feed(Protocol):
    """The tops of one data layer: their shapes in this process, and the batch of a number."""

    shapes: dict[str, Shape]

    def batch(self, number: int) -> Batch: ...

    def close(self) -> None: ...


class Shelf:
    """Sources of images that several nets read, each opened once: an LMDB cannot be opened twice."""

    def __init__(self) -> None:
        self._opened: dict[tuple[object, ...], Source] = {}

    def open(self, src: str | Path, *, root: str | None, resize: Size | None, color: bool | None) -> Source:
        """The source, as ``data.open_source`` opens it."""
        key = (Path(src).resolve(), root, resize, color)
        if key not in self._opened:
            self._opened[key] = open_source(src, root=root, resize=resize, color=color)
        return self._opened[key]

    def close(self) -> None:
        """Close all."""
        for source in self._opened.values():
            source.close()


@dataclass(frozen=True)
class Options:
    """``data`` stands for the source that the net names. ``part``: of each batch. ``shelf`` outlives what is opened."""

    data: str | None = None
    root: str | None = None
    seed: int = 0
    part: Part = field(default_factory=Part)
    shelf: Shelf = field(default_factory=Shelf)


class Feeds:
    """The data layers of a net together; the next batch is made while the last one is computed with."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = tuple(feeds)
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Batch]] | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every top."""
        return {name: shape for feed in self.feeds for name, shape in feed.shapes.items()}

    def batch(self, number: int, step: int = 1) -> Batch:
        """The batch of that number, blob name to float32 array; ``number + step`` is expected next."""
        if self._next is not None and self._next[0] == number:
            made = self._next[1].result()
        else:
            made = self._make(number)
        self._next = (number + step, self._pool.submit(self._make, number + step))
        return made

    def close(self) -> None:
        """Let go of the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for feed in self.feeds:
            feed.close()

    def _make(self, number: int) -> Batch:
        return {name: array for feed in self.feeds for name, array in feed.batch(number).items()}


class Images:
    """Images with their labels; ``tops`` are the blobs of both, or of the images alone."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        tops: Sequence[str],
        size: int,
        *,
        shuffle: bool = False,
        skip: int = 0,
        label: Shape = (),
        options: Options | None = None,
    ) -> None:
        options = options or Options()
        self.source, self.transform, self.tops = source, transform, tuple(tops)
        self.size, self.skip, self._shuffle, self._seed = size, skip, shuffle, options.seed
        self._share = options.part.of(size)
        self._label = label
        if len(self.tops) > 1 and not source.labelled:
            raise UsageError("has no labels, and the net takes some", path=source.path)
        self._order = lru_cache(2)(self._shuffled)
        self.shape: Shape = self._sample(0).image.shape
        count = self._share.stop - self._share.start
        shapes = ((count, *self.shape), (count, *label))
        self.shapes: dict[str, Shape] = dict(zip(self.tops, shapes, strict=False))

    def batch(self, number: int) -> Batch:
        """Images (N, C, H, W) and labels (N,)."""
        first = number * self.size + self.skip
        places = range(first + self._share.start, first + self._share.stop)
        many = ahead(self._sample, places, _WORKERS, 2 * len(places))
        samples = list(map(self._sample, places) if isinstance(self.source, Arrays) else many)
        made = {self.tops[0]: np.stack([sample.image for sample in samples]).astype(np.float32, copy=False)}
        if len(self.tops) > 1:
            labels = np.array([sample.label for sample in samples], np.float32)
            made[self.tops[1]] = labels.reshape(-1, *self._label)
        return made

    def close(self) -> None:
        """The source stands on its shelf."""

    def _shuffled(self, round_: int) -> np.ndarray:
        return np.random.default_rng([self._seed, round_]).permutation(len(self.source))

    def _sample(self, place: int) -> Sample:
        round_, index = divmod(place, len(self.source))
        if self._shuffle:
            index = int(self._order(round_)[index])
        sample = self.source[index]
        random = np.random.default_rng([self._seed, 1, place]) if self.transform.train else None
        try:
            image = self.transform(sample.image, self.source.order, random)
            if place and image.shape != self.shape:
                raise ShapeError(
                    f"is {text(image.shape)}, others are {text(self.shape)}", hint="resize or crop"
                )
        except ShapeError as error:
            path, line = self.source.place(index)
            message = f'image "{sample.name}" {error.message}'
            raise ShapeError(message, path=path, line=line, hint=error.hint) from None
        if sample.label is None and len(self.tops) > 1:
            raise FileError(f'image "{sample.name}" has no label, others have', path=self.source.path)
        return sample._replace(image=image)


class Rows:
    """Rows of data sets in HDF5 files, one data set a top, the files in the order of their list."""

    def __init__(
        self, paths: Sequence[Path], tops: Sequence[str], size: int, *, shuffle: bool, options: Options
    ) -> None:
        import h5py

        self.size, self._shuffle, self._seed = size, shuffle, options.seed
        self._share = options.part.of(size)
        with ExitStack() as stack:
            self._files = [stack.enter_context(_open_hdf5(h5py, path)) for path in paths]
            self._sets = [
                [_data_set(file, path, top) for top in tops]
                for file, path in zip(self._files, paths, strict=True)
            ]
            self._open = stack.pop_all()
        for sets, path in zip(self._sets, paths, strict=True):
            if len({len(one) for one in sets}) != 1:
                self.close()
                raise FileError("its data sets differ in their number of rows", path=path)
        self.tops = tuple(tops)
        self._round = lru_cache(2)(self._rows)
        self._total = sum(len(sets[0]) for sets in self._sets)
        count = self._share.stop - self._share.start
        self.shapes: dict[str, Shape] = {
            top: (count, *one.shape[1:]) for top, one in zip(tops, self._sets[0], strict=True)
        }

    def batch(self, number: int) -> Batch:
        """The rows of every top."""
        first = number * self.size
        places = range(first + self._share.start, first + self._share.stop)
        chosen = [self._round(place // self._total)[place % self._total] for place in places]
        return {
            top: np.stack([np.asarray(self._sets[file][i][row], np.float32) for file, row in chosen])
            for i, top in enumerate(self.tops)
        }

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def _rows(self, round_: int) -> np.ndarray:
        """(file, row) of every place of a round, (total, 2)."""
        counts = [len(sets[0]) for sets in self._sets]
        random = np.random.default_rng([self._seed, round_])
        files = random.permutation(len(counts)) if self._shuffle else np.arange(len(counts))
        parts = []
        for file in files:
            rows = random.permutation(counts[file]) if self._shuffle else np.arange(counts[file])
            parts.append(np.stack([np.full(len(rows), file), rows], 1))
        return np.concatenate(parts)


def _open_hdf5(h5py, path: Path):  # type: ignore[no-untyped-def]
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise FileError(f"is no HDF5 file that can be read: {error}", path=path) from error


def _data_set(file, path: Path, top: str):  # type: ignore[no-untyped-def]
    found = file.get(top)
    if not hasattr(found, "shape") or not found.shape or not len(found):
        raise FileError(f'has no data set "{top}" with rows', path=path, hint="it has " + ", ".join(file))
    return found


class Dummies:
    """DummyData: tops made by fillers, the random ones anew for each batch."""

    def __init__(self, shapes: Mapping[str, Shape], fillers: Sequence[Filler], options: Options) -> None:
        self._fillers = tuple(fillers)
        self._whole = dict(shapes)
        self._part, self._seed = options.part, options.seed
        self.shapes: dict[str, Shape] = {
            name: _part_of(shape, options.part) for name, shape in shapes.items()
        }

    def batch(self, number: int) -> Batch:
        """The whole batch is made in every process, and each keeps its part."""
        random = np.random.default_rng([self._seed, number])
        made = {}
        for (name, shape), filler in zip(self._whole.items(), self._fillers, strict=True):
            whole = fill(filler, shape, random)
            made[name] = whole[self._part.of(shape[0])] if shape else whole
        return made

    def close(self) -> None:
        """Nothing is open."""


def _part_of(shape: Shape, part: Part) -> Shape:
    if not shape:
        return shape
    share = part.of(shape[0])
    return (share.stop - share.start, *shape[1:])


_BLOCKS = {
    "Data": "data_param",
    "ImageData": "image_data_param",
    "HDF5Data": "hdf5_data_param",
    "MemoryData": "memory_data_param",
    "WindowData": "window_data_param",
}
_WITHOUT_EFFECT = frozenset({"cache", "threads", "shuffle"})  # fields of forks; shuffle is done


def open_feeds(graph: Graph, net: Net, options: Options) -> Feeds:
    """Open what the data layers of a net read, or ``options.data`` in place of it.

    Raises the error of the first layer whose data cannot be had, with file, line and layer.
    """
    nodes = [
        node for node in graph.nodes if node.problem is None and node.spec is not None and node.spec.source
    ]
    replaced = _replaced(nodes, net) if options.data is not None else ()
    with ExitStack() as stack:
        feeds: list[Feed] = []
        for index, node in enumerate(nodes):
            if node in replaced[1:]:
                continue
            own = replace(options, seed=options.seed + index)
            try:
                opened = _stand_in(replaced, net, own) if node in replaced else _open(node, net, own)
            except Error as error:
                line = node.layer.line if error.path is None else None  # a line of the net, not of its data
                raise error.at(path=net.path, line=line, layer=node.name) from error.__cause__
            stack.callback(opened.close)
            feeds.append(opened)
        stack.pop_all()
    return Feeds(feeds)


def _request(node: Node, net: Net) -> Request:
    layer = node.layer
    schema_type = "V1LayerParameter" if layer.dialect == "V1" else "LayerParameter"
    return Request(layer, Typed(layer.message, schema_type, layer.document), net.state.phase)


def _replaced(nodes: Sequence[Node], net: Net) -> tuple[Node, ...]:
    """The layers that one source of images stands for: the net's only data layer, or its inputs."""
    found = tuple(node for node in nodes if node.layer.type in _BLOCKS)
    if len(found) > 1:
        names = ", ".join(f'"{node.name}"' for node in found)
        raise UsageError(
            f"the net has {len(found)} data layers, {names}; data can stand for one", path=net.path
        )
    found = found or tuple(node for node in nodes if node.layer.type == "Input")
    tops = [top for node in found for top in node.layer.tops]
    if len(tops) not in (1, 2):
        raise UsageError(f"data stand for images and labels, the net has {len(tops)} inputs", path=net.path)
    return found


def _stand_in(nodes: Sequence[Node], net: Net, options: Options) -> Feed:
    """``options.data`` as images and labels, with the batch size and the transform that the net gives."""
    assert options.data is not None
    request, shapes = _request(nodes[0], net), [shape for node in nodes for shape in node.params.shapes]
    block = _BLOCKS.get(request.layer.type)
    image = shapes[0] if request.layer.type in ("Input", "MemoryData") else None
    size = request[block]["batch_size"] if block else image[0] if image else 0
    transform = for_net(_alone(net, request), shape=image)
    source = options.shelf.open(
        options.data, root=options.root, resize=transform.resize, color=transform.color
    )
    tops = [top for node in nodes for top in node.layer.tops]
    label = shapes[1][1:] if image and len(tops) > 1 and shapes[1] else ()
    shuffle = block is not None and bool(request[block].get("shuffle"))
    return Images(source, transform, tops, _size(size), shuffle=shuffle, label=label, options=options)


def _open(node: Node, net: Net, options: Options) -> Feed:
    request = _request(node, net)
    check(request.typed, _WITHOUT_EFFECT)
    opener = _OPENERS.get(request.layer.type)
    if opener is None:
        hint = "name images and labels that stand for it: --data SRC"
        raise UnsupportedError(f"{request.layer.type} gives no data here", hint=hint)
    return opener(request, net, options)


def _size(given: int) -> int:
    if given < 1:
        raise NetError(f"batch_size is {given}, it must be positive")
    return given


def _named(request: Request, p: Typed, source: Source, transform: Transform, options: Options) -> Feed:
    """The images of a layer that names them, as its parameters say."""
    return Images(
        source,
        transform,
        request.layer.tops,
        _size(p["batch_size"]),
        shuffle=p["shuffle"],
        skip=_skip(p["rand_skip"], options),
        options=options,
    )


def _open_data(request: Request, net: Net, options: Options) -> Feed:
    p = request["data_param"]
    path = _beside(net, p["source"], "source", p)
    if (path / "CURRENT").is_file():
        raise UnsupportedError("is a LevelDB, which is not read", path=path, hint="convert it to LMDB")
    transform = for_net(_alone(net, request))
    color = True if p["force_encoded_color"] else transform.color
    source = options.shelf.open(path, root=None, resize=transform.resize, color=color)
    return _named(request, p, source, transform, options)


def _open_image_data(request: Request, net: Net, options: Options) -> Feed:
    p = request["image_data_param"]
    path = _beside(net, p["source"], "source", p)
    transform = for_net(_alone(net, request))
    root = _root(path, p["root_folder"], net)
    source = options.shelf.open(path, root=root, resize=transform.resize, color=transform.color)
    return _named(request, p, source, transform, options)


def _root(path: Path, given: str, net: Net) -> str | None:
    """The folder of a list's paths: the one that is named, the present one as in Caffe, or (None) the list's own."""
    if given:
        return str(_beside(net, given, "root_folder", None))
    first = next(iter(files.read_text(path).splitlines()), "").rpartition(" ")[0]
    here = first and not Path(first).is_absolute() and Path(first).is_file()
    return "." if here else None


def _skip(most: int, options: Options) -> int:
    """How many images rand_skip leaves out at the start."""
    return int(np.random.default_rng([options.seed, 2]).integers(most)) if most else 0


def _open_hdf5_data(request: Request, net: Net, options: Options) -> Feed:
    p = request["hdf5_data_param"]
    if request.typed["transform_param"]:
        raise NetError("HDF5Data takes no transform_param", line=p.line())
    paths = list(_hdf5_list(_beside(net, p["source"], "source", p)))
    if p["batch_size"] < 1 or not paths:
        found = f"batch_size is {p['batch_size']}" if paths else "the list of HDF5 files is empty"
        raise NetError(f"{found}; it must be positive" if paths else found, line=p.line())
    return Rows(paths, request.layer.tops, p["batch_size"], shuffle=p["shuffle"], options=options)


def _open_dummy(request: Request, net: Net, options: Options) -> Feed:
    p = request["dummy_data_param"]
    tops = request.layer.tops
    fillers = [read(one) for one in p["data_filler"]] or [Filler()]
    if len(fillers) not in (1, len(tops)):
        raise NetError(f"{len(fillers)} data_filler for {len(tops)} tops; none, one or one each is needed")
    shapes = LAYERS["DummyData"].params(request).shapes
    return Dummies(
        dict(zip(tops, shapes, strict=True)), fillers * len(tops) if len(fillers) == 1 else fillers, options
    )


_OPENERS: Mapping[str, Callable[[Request, Net, Options], Feed]] = {
    "Data": _open_data,
    "ImageData": _open_image_data,
    "HDF5Data": _open_hdf5_data,
    "DummyData": _open_dummy,
}


def _beside(net: Net, name: str, what: str, p: Typed | None) -> Path:
    """A path that the net names, from the present folder as Caffe does or beside the net."""
    found = next((path for path in (Path(name), Path(net.path or ".").parent / name) if path.exists()), None)
    if found is None or not name:
        hint = "name images and labels that stand for it: --data SRC"
        raise FileError(
            f'there is no {what} "{name}"', path=net.path, line=p.line(what) if p else None, hint=hint
        )
    return found


def _alone(net: Net, request: Request) -> Net:
    """The net with this one layer, so that its own transform is found where there are several."""
    document, layer = net.upgraded.document, request.layer
    root = document.root
    kept = tuple(one for one in root.fields if (one.start, one.end) == layer.span)
    return Net(replace(document, root=Message(kept, root.start, root.end)), net.full_state)
