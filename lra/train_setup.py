"""What the command ``train`` adds to training: settings of the solver file and of its options, as hooks of the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from caffe_proto.errors import UsageError
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.shape_inference import Shaped, infer
from caffe_proto.solver import Solver
from caffe_proto.train_data import Options, Shelf, open_feeds

from . import sparsify
from .filters import Layout
from .force import Force
from .targets import find
from .train_layers import FactorPair, Key, factor_pairs, force_members, layouts

# For each solver type which of the arrays that it keeps of a blob are means of squares.
_SQUARES = {
    "SGD": (False,),
    "Nesterov": (False,),
    "AdaGrad": (True,),
    "RMSProp": (True,),
    "AdaDelta": (True, True),
    "Adam": (False, True),
}


@dataclass(frozen=True)
class ForceWish:
    """What is asked of the force over the solver file: None, () and False leave what the file says.

    kind, strength: ``force_type`` and ``force_decay``. ratio: the strength as "auto" has it. everywhere: force_mult
    1 on convolutions that set none. schedule, per_filter: see `lra.force.Force`.
    """

    kind: str | None = None
    strength: float | None = None
    ratio: float | None = None
    everywhere: bool = False
    schedule: tuple[tuple[int, float], ...] = ()
    per_filter: bool = False


@dataclass(frozen=True)
class Wish:
    """What is asked of training; None and () where it is not.

    watch: energy of the ranks that are logged. clip: energy that clipping retains, ``clip_every`` iterations apart
    (None: test_interval) up to iteration ``clip_until``. sparsity: (structure, strength) pairs. prune: share of the
    weights of each layer that become zero and stay so.
    """

    force: ForceWish = field(default_factory=ForceWish)
    watch: float | None = None
    clip: float | None = None
    clip_every: int | None = None
    clip_until: int | None = None
    sparsity: tuple[tuple[str, float], ...] = ()
    prune: float | None = None


@dataclass(frozen=True)
class Place:
    """The net that is trained as its data shape it, and whether training goes on from a snapshot."""

    solver: Solver
    shaped: Shaped
    resumed: bool = False

    @classmethod
    def of(cls, solver: Solver, data: str | None, root: str | None, resumed: bool = False) -> Place:
        """Look at the data for their shapes; raises as training would where they cannot be had."""
        graph, shelf = build(solver.train), Shelf()
        try:
            feeds = open_feeds(graph, solver.train, Options(data, root, shelf=shelf))
            feeds.close()
        finally:
            shelf.close()
        return cls(solver, infer(graph, feeds.shapes), resumed)


def force_of(solver: Solver, wish: ForceWish) -> Force | None:
    """The force of a training; None where neither the file nor the wish has one.

    Raises UsageError on values that mean nothing, and on wishes that nothing would come of.
    """
    file, strength = solver.typed, wish.strength
    if wish.ratio is not None and strength is not None:
        raise UsageError(
            f"a strength of {strength:g} and a ratio to the gradient are both given", hint="give one of them"
        )
    decay = next(one for one in (wish.ratio, strength, file["force_decay"]) if one is not None)
    if not decay:
        if wish.everywhere or wish.schedule or wish.per_filter:
            raise UsageError(
                "there is no force: its strength is 0",
                hint="give --force KIND=STRENGTH or --force-auto RATIO",
            )
        return None
    decay_type = "auto" if wish.ratio is not None else file["force_decay_type"]
    if wish.per_filter and decay_type == "adaptive":
        raise UsageError(
            "--force-per-filter changes nothing: force_decay_type adaptive sets the strength of each layer",
            path=solver.path,
        )
    try:
        return Force(
            decay=decay,
            kind=wish.kind or file["force_type"],
            iterations=file["force_iter"],
            decay_type=decay_type,
            direction=file["force_direction"],
            schedule=wish.schedule,
            per_filter=wish.per_filter,
        )
    except ValueError as error:
        raise UsageError(str(error), path=solver.path) from None


def hooks(place: Place, wish: Wish) -> list[Any]:
    """The hooks of a wish, in the order they must run in; needs torch.

    Raises UsageError where part of it would come to nothing.
    """
    filters = layouts(place.shaped)
    made: list[Any] = [*_force(place, wish.force)]
    if (wish.sparsity or wish.prune is not None or wish.watch is not None) and not filters:
        raise UsageError("the net has no convolution or fully connected layer", path=place.solver.train.path)
    made += _sparsity(filters, wish.sparsity)
    if wish.prune is not None:
        if wish.clip is not None:
            raise UsageError(
                "pruned weights do not stay zero where ranks are clipped: that mixes filters",
                hint="give --prune-weights or --clip-ranks",
            )
        made.append(Prune(filters, wish.prune))
    made += _clipping(place, wish)
    if wish.watch is not None:
        made.append(_watch(place, filters, wish.watch))
    return made


def _force(place: Place, wish: ForceWish) -> list[Any]:
    from .train_hooks import ForceHook

    force = force_of(place.solver, wish)
    if force is None:
        return []
    members = force_members(place.shaped, 1.0 if wish.everywhere else None)
    if not members:
        hint = "set force_mult in the param blocks of the net" + (
            "" if wish.everywhere else ", or give --force-all"
        )
        raise UsageError("the force acts on no layer", path=place.solver.train.path, hint=hint)
    return [ForceHook(force, members)]


def _sparsity(filters: Mapping[Key, Layout], wanted: Sequence[tuple[str, float]]) -> list[Any]:
    from .train_hooks import SparsityHook

    structures = [structure for structure, _ in wanted]
    for structure, strength in wanted:
        if not strength > 0:
            raise UsageError(f"a strength of {strength:g} makes nothing sparse", hint="give one above 0")
        if structures.count(structure) > 1:
            raise UsageError(f'sparsity of "{structure}" is given twice')
    return [SparsityHook(filters, strength, structure, exact=True) for structure, strength in wanted]


def _clipping(place: Place, wish: Wish) -> list[Any]:
    from .train_hooks import ClippingHook

    if wish.clip is None:
        if wish.clip_every is not None or wish.clip_until is not None:
            raise UsageError("--clip-every and --clip-until go with --clip-ranks")
        return []
    solver = place.solver
    every = wish.clip_every or solver.test_interval
    if not every:
        raise UsageError("the solver has no test_interval", path=solver.path, hint="give --clip-every N")
    last = solver.max_iter if wish.clip_until is None else min(solver.max_iter, wish.clip_until + 1)
    if every > last:
        raise UsageError(f"ranks would never be clipped: every {every} of {last} iterations")
    pairs = pairs_of(place)
    if not pairs:
        raise UsageError(
            "no two layers stand one right behind the other, whose product could lose rank",
            path=solver.train.path, hint="decompose the net first",
        )  # fmt: skip
    until = -1 if wish.clip_until is None else wish.clip_until
    return [ClippingHook(pairs, wish.clip, every, until, squares=_SQUARES[solver.update.kind])]


def pairs_of(place: Place) -> tuple[FactorPair, ...]:
    """The pairs of layers of the net whose ranks can be clipped."""
    inputs = {
        place.shaped.graph.blob(value): place.shaped.shapes[value] for value in place.shaped.graph.sources
    }
    return factor_pairs(find(Model(place.solver.train), inputs))


def _watch(place: Place, filters: Mapping[Key, Layout], energy: float) -> Watch:
    from .train_hooks import RankWatch

    prefix = place.solver.snapshot_prefix
    return Watch(
        RankWatch(
            filters,
            Path(f"{prefix}.ranks.csv"),
            energy,
            tensorboard=Path(f"{prefix}.tensorboard") if find_spec("tensorboard") else None,
            plot=Path(f"{prefix}.ranks.png") if find_spec("matplotlib") else None,
            resume=place.resumed,
        )
    )


@dataclass(eq=False)
class Last:
    """Remembers, for a hook that acts when training ends, the blobs and how many iterations are done, if any."""

    _params: Mapping[Key, Any] = field(init=False, repr=False, default_factory=dict)
    _done: int | None = field(init=False, repr=False, default=None)

    def start(self, params: Mapping[Key, Any]) -> None:
        """Remember the blobs."""
        self._params = params

    def after_update(self, iteration: int, params: Mapping[Key, Any], rate: float) -> None:
        """Count."""
        self._done = iteration + 1


@dataclass(eq=False)
class Watch(Last):
    """A rank watch that also takes the ranks that training ends with, where no test falls there."""

    watch: Any

    def at_test(self, iteration: int, params: Mapping[Key, Any]) -> None:
        """Take the ranks."""
        self.watch.at_test(iteration, params)

    def finish(self) -> None:
        """Take the last ranks, and draw."""
        if self._done is not None and self._done not in self.watch.rows:
            self.watch.at_test(self._done, self._params)
        self.watch.finish()

    def document(self) -> dict[str, Any]:
        """The last ranks, and where all of them are."""
        found: dict[str, Any] = self.watch.document()
        return found


class Prune:
    """Makes the smallest weights of every layer that learns zero when training starts, and keeps them so.

    ``share``: of each blob, see `lra.sparsify.masks`. Training that goes on from a snapshot finds the same ones:
    zeros are the smallest.
    """

    def __init__(self, layouts: Mapping[Key, Layout], share: float) -> None:
        if not 0 < share < 1:
            raise UsageError(f"a share of {share:g} of the weights cannot be pruned", hint="0 < share < 1")
        self.layouts, self.share = dict(layouts), share
        self._hook: Any = None

    def start(self, params: Mapping[Key, Any]) -> None:
        """Choose the weights, once, and prune them."""
        from .train_hooks import MaskHook

        if self._hook is None:
            learning = {
                key: np.asarray(params[key].detach().cpu())
                for key in self.layouts
                if key in params and params[key].requires_grad
            }
            self._hook = MaskHook(sparsify.masks(learning, self.share, layouts=self.layouts))
        self._hook.start(params)

    def before_update(self, iteration: int, params: Mapping[Key, Any], gradients: Mapping[Key, Any]) -> None:
        """Drop the gradients of pruned weights."""
        self._hook.before_update(iteration, params, gradients)

    def after_update(self, iteration: int, params: Mapping[Key, Any], rate: float) -> None:
        """Undo what was left in the momentum."""
        self._hook.after_update(iteration, params, rate)
