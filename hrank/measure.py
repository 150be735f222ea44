"""One pass of images through a net, and what the maps at its sites say of the filters.

Memory: the net's activations for one batch and the sites' maps of two, at most about 512 MiB of maps; the
statistics themselves are a few numbers a filter. Their order is that of the images, so threads change no result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from caffe_proto.binding import bind
from caffe_proto.data.base import ahead
from caffe_proto.data.batches import Batch
from caffe_proto.errors import NetError, UsageError
from caffe_proto.evaluation import image_input
from caffe_proto.graph import Value, build
from caffe_proto.layers.spec import text
from caffe_proto.model import Model
from caffe_proto.peers import ALONE, Peers
from caffe_proto.shape_inference import InputShapes, Shaped, infer

from .criteria import Evidence
from .rank import RankSums, nuclear_norms, ranks_and_bounds
from .sites import At, Site, Sites, evidence, find_sites

if TYPE_CHECKING:
    from caffe_proto.runtime import Engine
    from caffe_proto.segments import Segments

_MOST_BYTES = 2**28  # of the sites' maps at a time


@dataclass(eq=False)
class SiteSums:
    """Sums over images for the c filters of a site: (c,) each, integers where they count.

    ``nonzero``: activations that are not 0; ``activation``: their sum; ``nuclear``: sum of nuclear norms, None
    where they were not asked for.
    """

    hw: tuple[int, int]
    ranks: RankSums
    bounds: RankSums
    nonzero: np.ndarray
    activation: np.ndarray
    nuclear: np.ndarray | None = None

    @classmethod
    def of(cls, maps: np.ndarray, rtol: float | None = None, *, nuclear: bool = False) -> SiteSums:
        """Of maps (n, c, h, w). Raises ValueError where they hold values that are not finite."""
        _, channels, h, w = maps.shape
        found, bounds = ranks_and_bounds(maps, rtol)
        made = cls(
            (h, w),
            RankSums(channels, min(h, w)),
            RankSums(channels, min(h, w)),
            np.count_nonzero(maps, axis=(0, 2, 3)).astype(np.int64),
            maps.sum((0, 2, 3), dtype=np.float64),
            nuclear_norms(maps).sum(0) if nuclear else None,
        )
        made.ranks.add(found)
        made.bounds.add(bounds)
        return made

    @property
    def count(self) -> int:
        """How many images."""
        return self.ranks.count

    @property
    def density(self) -> np.ndarray:
        """Share of activations that are not 0, 1 - APoZ (Hu et al. 2016, equation 1): (c,)."""
        return self.nonzero / (max(self.count, 1) * prod(self.hw))

    @property
    def mean_activation(self) -> np.ndarray:
        """Mean over images and places: (c,)."""
        return np.asarray(self.activation / (max(self.count, 1) * prod(self.hw)))

    @property
    def mean_nuclear(self) -> np.ndarray | None:
        """Mean nuclear norm of a map: (c,)."""
        return None if self.nuclear is None else self.nuclear / max(self.count, 1)

    def merge(self, other: SiteSums) -> None:
        """Count in what another has counted; raises ValueError where it is of other maps."""
        if other.hw != self.hw or (other.nuclear is None) != (self.nuclear is None):
            raise ValueError(f"sums of {text(other.hw)} maps do not go with sums of {text(self.hw)} maps")
        self.ranks.merge(other.ranks)
        self.bounds.merge(other.bounds)
        self.nonzero = self.nonzero + other.nonzero
        self.activation = self.activation + other.activation
        if self.nuclear is not None and other.nuclear is not None:
            self.nuclear = self.nuclear + other.nuclear

    def added_to(self, known: Evidence) -> Evidence:
        """Evidence with these means filled in."""
        return replace(
            known,
            rank=self.ranks.mean,
            bound=self.bounds.mean,
            density=self.density,
            activation=self.mean_activation,
            nuclear=self.mean_nuclear,
            channels=len(self.nonzero),
        )


@dataclass(frozen=True, eq=False)
class Measured:
    """The sites of a net and, by layer name, what their maps said; ``inputs``: shape of one image by input."""

    sites: Sites
    inputs: InputShapes
    sums: dict[str, SiteSums] = field(default_factory=dict)

    def warnings(self) -> dict[str, tuple[str, ...]]:
        """Layers whose order is doubtful, and why."""
        found = {}
        for name, sums in self.sums.items():
            doubt = self.sites.found[name].doubt
            said = ((doubt,) if doubt else ()) + sums.ranks.warnings()
            if said:
                found[name] = said
        return found


def measure(
    model: Model,
    images: np.ndarray | Iterable[np.ndarray | Batch],
    *,
    at: At = "relu",
    layers: Sequence[str] | None = None,
    rtol: float | None = None,
    nuclear: bool = False,
    rectify: bool = False,
    threads: int = 0,
    step: Callable[[int], None] = lambda n: None,
    peers: Peers = ALONE,
) -> Measured:
    """Statistics at all sites from one pass of images (n, C, H, W), preprocessed, in one array or in batches.

    Args:
        at: as for `find_sites`.
        layers: those to measure; None for all that have a site.
        rtol: relative tolerance of the ranks, None for `rank.default_rtol`.
        nuclear: also nuclear norms, which takes several times as long.
        rectify: read max(maps, 0) at sites that no ReLU stands before.
        threads: of onnxruntime, and as many that rank; 0 for one a core.
        step: called with the number of images after each batch that was ranked.
        peers: the processes that share the images; all come to the statistics of all images.

    Raises UsageError where there is no image, a layer has no site, or images are not what the net takes; NetError
    where maps hold values that are not finite; WeightsError where the weights do not belong to the net.
    """
    from caffe_proto.runtime import Engine  # brings onnxruntime, which a plan without images does not need

    runner = _Runner(model, Engine(threads))
    stream = iter([images] if isinstance(images, np.ndarray) else images)
    first = _pixels(next(stream, None))
    sites = find_sites(runner.shaped((1, *first.shape[1:])), at)
    wanted = [sites.of(name) for name in (sites.found if layers is None else layers)]
    if not wanted:
        raise UsageError("the net has no convolution whose maps can be ranked", path=model.net.path)
    groups = _by_maps(wanted)
    measured = Measured(sites, {runner.graph.blob(runner.input): (1, *first.shape[1:])})

    def work(item: tuple[Sequence[Site], np.ndarray, int]) -> tuple[Sequence[Site], SiteSums, int]:
        sharing, maps, done = item
        read = np.maximum(maps, 0) if rectify and not sharing[0].rectified else maps
        try:
            return sharing, SiteSums.of(read, rtol, nuclear=nuclear), done
        except ValueError as error:
            raise NetError(
                f"the maps of its filters cannot be ranked: {error}",
                path=model.net.path,
                layer=sharing[0].layer,
            ) from error

    def items() -> Iterator[tuple[Sequence[Site], np.ndarray, int]]:
        size = runner.batch(groups, first)
        values = tuple(dict.fromkeys(sharing[0].value for sharing in groups))
        for part in _parts(first, stream, size):
            made = runner.run(part, values)
            for position, sharing in enumerate(groups):
                site = sharing[0]
                done = len(part) if position == len(groups) - 1 else 0
                yield sharing, made[site.value][:, site.channels], done

    workers = threads or os.cpu_count() or 1
    sums: dict[str, SiteSums] = {}
    for sharing, made, done in ahead(work, items(), workers, 2 * workers):
        key = sharing[0].layer
        if key in sums:
            sums[key].merge(made)
        else:
            sums[key] = made
        if done:
            step(done)
    sums, *others = peers.exchange(sums)
    for found in others:
        for key, one in found.items():
            sums[key].merge(one)
    of = {site.layer: sums[sharing[0].layer] for sharing in groups for site in sharing}
    measured.sums.update({site.layer: of[site.layer] for site in wanted})
    return measured


def evidence_of(
    model: Model,
    measured: Measured | None,
    layers: Iterable[str],
    seed: int = 0,
    inputs: InputShapes | None = None,
) -> dict[str, Evidence]:
    """Everything known of the filters of convolutions, for `criteria.scores`; ``measured`` None for weights only.

    Layer i draws its random order from ``seed + i``. ``inputs``: shapes of inputs over what the net says. Raises
    UsageError where the net has no such convolution.
    """
    given = {**(inputs or {}), **(measured.inputs if measured is not None else {})}
    shaped = infer(build(model.net), given, partial=True)
    blobs = bind(shaped, model.weights)
    found = {}
    for position, name in enumerate(layers):
        known = evidence(shaped, blobs, name, seed + position)
        sums = None if measured is None else measured.sums.get(name)
        found[name] = known if sums is None else sums.added_to(known)
    return found


class _Runner:
    """A net that takes batches of any size: compiled once for each."""

    def __init__(self, model: Model, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.graph = build(model.net)
        self.input = image_input(self.graph)
        self._parts: dict[tuple[int, ...], Segments] = {}

    def shaped(self, shape: tuple[int, ...]) -> Shaped:
        """The net's shapes for images (N, C, H, W); raises UsageError where its first layers take no such images."""
        name = self.graph.blob(self.input)
        declared = infer(self.graph, partial=True).shapes.get(self.input)
        if declared is not None and (len(declared) != len(shape) or declared[1] != shape[1]):
            raise UsageError(
                f'images are {text(shape[1:])}, input "{name}" takes {text(declared[1:])}',
                path=self.model.net.path,
            )
        return infer(self.graph, {name: shape}, partial=True)

    def batch(self, groups: Sequence[Sequence[Site]], first: np.ndarray) -> int:
        """How many images at a time: the first batch's size, cut evenly where the maps of so many are too large."""
        one = self.shaped((1, *first.shape[1:])).shapes
        values = {sharing[0].value for sharing in groups}
        fit = max(1, _MOST_BYTES // (4 * sum(prod(one[value]) for value in values)))
        return -(-len(first) // -(-len(first) // fit))

    def run(self, images: np.ndarray, values: Sequence[Value]) -> Mapping[Value, np.ndarray]:
        """The values for these images."""
        from caffe_proto.segments import Segments

        parts = self._parts.get(images.shape)
        if parts is None:
            shaped = self.shaped(images.shape)
            parts = self._parts[images.shape] = Segments(
                shaped, bind(shaped, self.model.weights), self.engine
            )
        return parts.run({self.input: images}, values)


def _by_maps(wanted: Iterable[Site]) -> list[list[Site]]:
    """Sites grouped by the maps they read: those before a sum share the maps behind it."""
    groups: dict[tuple[Value, int, int], list[Site]] = {}
    for site in wanted:
        groups.setdefault((site.value, site.start, site.stop), []).append(site)
    return list(groups.values())


def _pixels(batch: Any) -> np.ndarray:
    """A batch's images; raises UsageError where there are none."""
    images = batch.images if isinstance(batch, Batch) else batch
    if images is None or not len(images):
        raise UsageError("there are no images to measure", hint="give at least one")
    array = np.ascontiguousarray(images, np.float32)
    if array.ndim != 4:
        raise UsageError(f"images are {text(array.shape)}, (N, C, H, W) is needed")
    return array


def _parts(first: np.ndarray, stream: Iterator[np.ndarray | Batch], size: int) -> Iterator[np.ndarray]:
    """All images in pieces of at most ``size``."""
    batch = first
    while True:
        yield from (batch[start : start + size] for start in range(0, len(batch), size))
        following = next(stream, None)
        if following is None:
            return
        batch = _pixels(following)
