"""Hooks of the training loop, over torch tensors: force, sparsity, masks, rank clipping and the watch on ranks.

What the loop calls, and when, is said in `caffe_proto.train.Hook`; each class here has those of its methods that it
needs.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caffe_proto.errors import FileError, UsageError
from caffe_proto.files import read_text, writing

from . import sparsify
from .clipping import Clipped, clip
from .decomposition import Geometry
from .filters import PLAIN, Layout
from .force import Force, Member, terms
from .schemes import SCHEMES
from .train_layers import FactorPair, Key

Params = Mapping[Key, Tensor]


class ForceHook:
    """Adds the force to the gradients: ``gradient += strength * G``, see `lra.force.terms`. float64 inside."""

    def __init__(self, force: Force, members: Mapping[Key, Member]) -> None:
        self.force = force
        self.members = dict(members)

    @torch.no_grad()
    def before_update(self, iteration: int, params: Params, gradients: Params) -> None:
        """Add the term of this iteration to the gradients of the members that have one."""
        if not self.force.level(iteration):
            return
        keys = [key for key in self.members if key in params and key in gradients]
        weights = {key: params[key].double() for key in keys}
        seen = {key: gradients[key].double() for key in keys} if self.force.needs_gradient else {}
        for key, term in terms(self.force, iteration, self.members, weights, seen).items():
            gradients[key].add_(term.to(gradients[key].dtype))


class SparsityHook:
    """Drives structures of weights to zero: by a subgradient, or exactly by a proximal step after the update.

    layouts: the blobs it acts on, as far as they are trained.
    strength: lambda of ``lambda * penalty``.
    structure: "element" (L1), "filter", "channel" or "shape", see `lra.sparsify.penalty`.
    exact: ``W <- prox(W, rate * lambda)`` after the update instead of a term in the gradient: zeros arise. rate
        is the iteration's learning rate, the same for all blobs whatever their lr_mult.
    """

    def __init__(
        self, layouts: Mapping[Key, Layout], strength: float, structure: str = "element", exact: bool = False
    ) -> None:
        if structure not in sparsify.STRUCTURES or not strength >= 0:
            raise UsageError(
                f'sparsity of "{structure}" at strength {strength:g}',
                hint=f"structures: {', '.join(sparsify.STRUCTURES)}; the strength is at least 0",
            )
        self.layouts = dict(layouts)
        self.strength, self.structure, self.exact = strength, structure, exact
        self._trained: list[Key] = []

    @torch.no_grad()
    def before_update(self, iteration: int, params: Params, gradients: Params) -> None:
        """Add ``strength`` times a subgradient of the penalty."""
        self._trained = [key for key in self.layouts if key in gradients]
        if self.exact:
            return
        for key in self._trained:
            slope = sparsify.subgradient(params[key], self.structure, self.layouts[key])
            gradients[key].add_(slope, alpha=self.strength)

    @torch.no_grad()
    def after_update(self, iteration: int, params: Params, rate: float) -> None:
        """Take the proximal step."""
        if not self.exact:
            return
        for key in self._trained:
            near = sparsify.proximal(params[key], rate * self.strength, self.structure, self.layouts[key])
            params[key].copy_(near)


class MaskHook:
    """Keeps pruned weights at zero: their gradients are dropped, so momentum does not gather, and so are they.

    masks: True where a weight stays, see `lra.sparsify.masks`; arrays or tensors of the blobs' shapes.
    """

    def __init__(self, masks: Mapping[Key, Any]) -> None:
        self._masks: dict[Key, Tensor] = {key: torch.as_tensor(mask) for key, mask in masks.items()}

    @torch.no_grad()
    def start(self, params: Params) -> None:
        """Prune. Raises UsageError, as the others do, where a mask has another shape than its blob."""
        self._apply(params)

    @torch.no_grad()
    def before_update(self, iteration: int, params: Params, gradients: Params) -> None:
        """Drop the gradients of pruned weights."""
        self._apply(gradients)

    @torch.no_grad()
    def after_update(self, iteration: int, params: Params, rate: float) -> None:
        """Undo what was left in the momentum."""
        self._apply(params)

    def _apply(self, blobs: Params) -> None:
        for key, mask in self._masks.items():
            if key not in blobs:
                continue
            if blobs[key].shape != mask.shape:
                found, wanted = tuple(mask.shape), tuple(blobs[key].shape)
                raise UsageError(f"a mask of shape {found} for a blob of shape {wanted}", layer=key[0])
            self._masks[key] = mask.to(blobs[key].device)
            blobs[key].masked_fill_(~self._masks[key], 0.0)


@dataclass(frozen=True, eq=False)
class Reshaped:
    """Layers that shrank: new ``num_output`` by layer, and their new blobs and histories, which replace the old."""

    outputs: dict[str, int]
    params: dict[Key, Tensor]
    history: dict[Key, tuple[Tensor, ...]]


@dataclass(frozen=True)
class ClippingHook:
    """Rank clipping of pairs of layers, see `lra.clipping.clip`.

    energy: that every group of a product retains, 0 < energy <= 1.
    every: iterations from one clip to the next.
    until: the last iteration that may clip; -1: no end.
    round_to: ranks are multiples of it.
    squares: for each tensor of a parameter's history whether it is a mean of squares: (False,) for SGD and
        Nesterov, (True,) for AdaGrad and RMSProp, (True, True) for AdaDelta, (False, True) for Adam.
    """

    pairs: Sequence[FactorPair]
    energy: float
    every: int
    until: int = -1
    round_to: int = 1
    squares: tuple[bool, ...] = (False,)

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1 or self.every < 1:
            raise UsageError(
                f"clipping at energy {self.energy:g} every {self.every} iterations",
                hint="the energy lies above 0 and at most at 1, the interval is at least 1",
            )

    @torch.no_grad()
    def reshape(
        self, iteration: int, params: Params, history: Mapping[Key, Sequence[Tensor]]
    ) -> Reshaped | None:
        """Factor the products anew where they have lost rank; None where nothing shrinks, or not now.

        ``history``: the solver's tensors of each blob, as many as `squares`, or none before the first update.
        """
        if (iteration + 1) % self.every or (self.until != -1 and iteration > self.until):
            return None
        made = Reshaped({}, {}, {})
        for pair in self.pairs:
            self._clip(pair, params, history, made)
        return made if made.outputs else None

    def _clip(
        self, pair: FactorPair, params: Params, history: Mapping[Key, Sequence[Tensor]], made: Reshaped
    ) -> None:
        names = {pair.first.layer, pair.second.layer}
        chain = pair.chain({key: _array(blob) for key, blob in params.items() if key[0] in names})
        clipped = clip(chain, self.energy, pair.balanced, round_to=self.round_to)
        if clipped is None:
            return
        first, second = clipped.chain.steps
        made.outputs[pair.first.layer] = clipped.rank
        new = {
            (pair.first.layer, 0): pair.first.stored(first.weight),
            (pair.second.layer, 0): pair.second.stored(second.weight),
        }
        if first.bias is not None:
            new[pair.first.layer, 1] = first.bias
        for key, blob in new.items():
            made.params[key] = _like(blob, params[key])
            if key in history:
                slots = zip(history[key], self.squares, strict=True)
                made.history[key] = tuple(
                    _like(_carried(pair, clipped, key, _array(one), squares), one) for one, squares in slots
                )


def _carried(pair: FactorPair, clipped: Clipped, key: Key, moment: np.ndarray, squares: bool) -> np.ndarray:
    """A solver's array of one blob of a pair, for the blob's successor."""
    if key == (pair.first.layer, 1):
        return clipped.carry_first(moment.reshape(-1), squares=squares)
    if key[0] == pair.first.layer:
        return pair.first.stored(clipped.carry_first(pair.first.kernel(moment), squares=squares))
    return pair.second.stored(clipped.carry_second(pair.second.kernel(moment), squares=squares))


def rank_at(weight: np.ndarray, layout: Layout = PLAIN, energy: float = 0.95, scheme: str = "pca") -> int:
    """Smallest total rank at which every group of a weight blob retains `energy`, by a scheme of `lra.schemes`.

    Args:
        weight: a blob of two axes or more; of other than four the taps count as a row.

    Raises:
        ValueError: energy outside (0, 1], weights that are not finite.
    """
    parts = layout.split(np.asarray(weight))
    groups, filters, channels, _ = parts.shape
    taps = weight.shape[2:] if weight.ndim == 4 else (1, parts.shape[3])
    kernel = parts.reshape(groups * filters, channels, *taps)
    return SCHEMES[scheme].spectrum(kernel, Geometry(group=groups)).rank_for(energy)


@dataclass
class RankWatch:
    """Ranks of layers as training goes on: a CSV file, one row a test, TensorBoard, and a plot at the end.

    layouts: the blobs to watch, see `lra.train_layers.layouts`.
    log: the CSV file, columns iteration and the layers; written anew at every test, whole or not at all.
    energy, scheme: see `rank_at`.
    tensorboard: a folder for TensorBoard's events, where that is wanted; needs the package tensorboard.
    plot: an image file, by matplotlib, where that is wanted.
    resume: keep the rows that the log holds of iterations before the first one seen.
    tell: takes a line at every test, and one in the end about the files.
    """

    layouts: Mapping[Key, Layout]
    log: Path
    energy: float = 0.95
    scheme: str = "pca"
    tensorboard: Path | None = None
    plot: Path | None = None
    resume: bool = False
    tell: Callable[[str], None] = lambda _line: None
    _rows: dict[int, list[int]] = field(default_factory=dict, init=False)
    _events: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy:g} must lie above 0 and at most at 1")
        for wanted, package in ((self.tensorboard, "tensorboard"), (self.plot, "matplotlib")):
            if wanted is not None and importlib.util.find_spec(package) is None:
                raise UsageError(
                    f"{wanted}: {package} is not installed", hint=f"install {package}, or leave it out"
                )
        if self.resume and self.log.exists():
            self._rows = _read_log(self.log, self._header)

    @property
    def rows(self) -> dict[int, list[int]]:
        """Ranks by iteration, in the order of the layers."""
        return self._rows

    @property
    def _header(self) -> list[str]:
        return [layer if blob == 0 else f"{layer}:{blob}" for layer, blob in self.layouts]

    def at_test(self, iteration: int, params: Params) -> None:
        """Take the ranks and write the log."""
        self._rows = {at: row for at, row in self._rows.items() if at < iteration}
        self._rows[iteration] = [
            rank_at(_array(params[key]), layout, self.energy, self.scheme)
            for key, layout in self.layouts.items()
        ]
        with writing([self.log]) as (path,), path.open("w", newline="", encoding="utf-8") as file:
            written = csv.writer(file)
            written.writerow(["iteration", *self._header])
            written.writerows([at, *row] for at, row in self._rows.items())
        row = self._rows[iteration]
        each = ", ".join(f"{name} {rank}" for name, rank in zip(self._header, row, strict=True))
        self.tell(f"Iteration {iteration}, ranks at energy {self.energy:g}: {each}; sum {sum(row)}")
        if self.tensorboard is not None:
            self._log_events(iteration)

    def _log_events(self, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._events is None:
            self._events = SummaryWriter(str(self.tensorboard), purge_step=iteration)
        for name, rank in zip(self._header, self._rows[iteration], strict=True):
            self._events.add_scalar(f"rank/{name}", rank, iteration)

    def finish(self) -> None:
        """Close TensorBoard's file, draw the plot, and tell where things are."""
        if self._events is not None:
            self._events.close()
        if not self._rows:
            return
        if self.plot is not None:
            self._draw(self.plot)
        self.tell("ranks: " + ", ".join(self._files.values()))

    @property
    def _files(self) -> dict[str, str]:
        named = {"log": self.log, "plot": self.plot, "tensorboard": self.tensorboard}
        return {what: str(path) for what, path in named.items() if path is not None}

    def document(self) -> dict[str, Any]:
        """The ranks of the last test by layer, and the files, as values of JSON; empty where there was no test."""
        if not self._rows:
            return {}
        at = max(self._rows)
        ranks = dict(zip(self._header, self._rows[at], strict=True))
        return {
            "ranks": {"iteration": at, "energy": self.energy, "layers": ranks, "files": self._files},
        }

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure  # type: ignore[import-not-found]

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for name, ranks in zip(self._header, zip(*self._rows.values(), strict=True), strict=True):
            axes.plot(list(self._rows), ranks, marker=".", label=name)
        axes.set(xlabel="iteration", ylabel=f"rank at energy {self.energy:g}", ylim=(0, None))
        axes.legend(fontsize="small", ncols=1 + len(self.layouts) // 20)
        with writing([path]) as (temporary,):
            figure.savefig(temporary, format=path.suffix[1:] or "png")


def _read_log(path: Path, header: list[str]) -> dict[int, list[int]]:
    first, *rows = list(csv.reader(read_text(path).splitlines())) or [[]]
    try:
        if first != ["iteration", *header]:
            raise ValueError
        return {int(row[0]): [int(rank) for rank in row[1:]] for row in rows}
    except (ValueError, IndexError):
        raise FileError(
            "is no rank log of these layers", path=path, hint="give another name, or start it anew"
        ) from None


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    """An array as a tensor of another one's type and place."""
    return torch.as_tensor(np.ascontiguousarray(array)).to(tensor)
