"""The command ``train`` with force, rank clipping, sparsity and the watch on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from caffe_proto.cli_train import train_command
from caffe_proto.errors import UsageError
from caffe_proto.net import nearest

if TYPE_CHECKING:
    from caffe_proto.solver import Solver

    from .train_setup import Wish

# Those of lra.train_layers, which the help must not wait for.
FIELDS = frozenset({"force_type", "force_decay", "force_iter", "force_decay_type", "force_direction"})
STRUCTURES = {"l1": "element", "filter": "filter", "channel": "channel", "shape": "shape"}

OPTIONS = (
    click.option(
        "--force",
        metavar="KIND=STRENGTH",
        help="Filters of a layer attract one another: l2, l1, linear or gravity, over force_type and force_decay of"
        " SOLVER; below 0 they repel, 0 is none. Acts where the net sets force_mult.",
    ),
    click.option(
        "--force-all",
        is_flag=True,
        help="The force acts on all convolutions: force_mult 1 where none is set.",
    ),
    click.option(
        "--force-auto",
        type=float,
        metavar="RATIO",
        help="The strength that makes the force this share of the gradient, by norm; KIND from --force KIND.",
    ),
    click.option(
        "--force-schedule",
        metavar="ITER:FACTOR,...",
        help="Factors of the strength at some iterations, linear between them.",
    ),
    click.option(
        "--force-per-filter", is_flag=True, help="Divide the force by the number of filters of a layer."
    ),
    click.option(
        "--watch-ranks",
        type=float,
        metavar="ENERGY",
        help="Log the ranks that keep this energy at every test and at the end: PREFIX.ranks.csv; for TensorBoard and"
        " as a plot too where tensorboard and matplotlib are installed.",
    ),
    click.option(
        "--clip-ranks",
        type=float,
        metavar="ENERGY",
        help="Shrink pairs of layers that a decomposition made to the rank that keeps this energy.",
    ),
    click.option(
        "--clip-every",
        type=click.IntRange(1),
        metavar="N",
        help="Iterations between; default: test_interval.",
    ),
    click.option(
        "--clip-until", type=click.IntRange(0), metavar="N", help="No clipping after this iteration."
    ),
    click.option(
        "--sparsify",
        multiple=True,
        metavar="WHAT=STRENGTH",
        help="Drive weights to exact zeros: l1 (single ones), filter, channel or shape (whole ones); repeatable.",
    ),
    click.option(
        "--prune-weights",
        type=float,
        metavar="FRACTION",
        help="Set this share of each layer's weights, the smallest, to zero at the start and keep them so.",
    ),
    click.option(
        "--remove",
        is_flag=True,
        help="At the end also write PREFIX_iter_N_removed: the net without the channels that carry nothing.",
    ),
)


def _hooks(solver: Solver, **asked: Any) -> Sequence[object]:
    """The hooks that solver file and options ask for."""
    from .train_setup import Place, Watch, Wish, hooks

    remove = asked.pop("remove")
    wish = _wish(asked)
    sparse = bool(wish.sparsity) or wish.prune is not None
    if remove and not sparse:
        raise UsageError("--remove goes with --sparsify or --prune-weights")
    if wish == Wish() and not solver.typed["force_decay"]:
        return ()
    given = click.get_current_context().params
    place = Place.of(solver, given["data"], given["root"], given["state"] is not None)
    made = hooks(place, wish)
    for hook in made:
        if isinstance(hook, Watch) and not given["as_json"]:
            hook.watch.tell = click.echo
    if sparse:
        from .train_report import Ending

        made.append(Ending(place, remove, quiet=given["as_json"]))
    return made


def _wish(asked: dict[str, Any]) -> Wish:
    from .train_setup import ForceWish, Wish

    kind, strength = (None, None) if asked["force"] is None else _force(asked["force"])
    if strength is None and kind is not None and asked["force_auto"] is None:
        raise UsageError(
            f'--force "{asked["force"]}" names no strength', hint="write KIND=STRENGTH, or add --force-auto"
        )
    if asked["force_auto"] == 0:
        raise UsageError("--force-auto 0 is no force", hint="leave it out")
    schedule = () if asked["force_schedule"] is None else _schedule(asked["force_schedule"])
    force = ForceWish(
        kind, strength, asked["force_auto"], asked["force_all"], schedule, asked["force_per_filter"]
    )
    sparsity = tuple(_sparsity(one) for one in asked["sparsify"])
    return Wish(
        force, asked["watch_ranks"], asked["clip_ranks"], asked["clip_every"], asked["clip_until"],
        sparsity, asked["prune_weights"],
    )  # fmt: skip


def _force(given: str) -> tuple[str, float | None]:
    kind, equals, strength = given.partition("=")
    return kind, _number(strength, f"--force {given}") if equals else None


def _sparsity(given: str) -> tuple[str, float]:
    what, equals, strength = given.partition("=")
    if what not in STRUCTURES:
        raise UsageError(f'--sparsify: there is no "{what}"', hint=nearest(what, list(STRUCTURES)))
    if not equals:
        raise UsageError(f'--sparsify "{given}" names no strength', hint="write WHAT=STRENGTH")
    return STRUCTURES[what], _number(strength, f"--sparsify {given}")


def _schedule(given: str) -> tuple[tuple[int, float], ...]:
    points = []
    for point in given.split(","):
        iteration, colon, factor = point.partition(":")
        if not colon or not iteration.strip().isdecimal():
            raise UsageError(f'--force-schedule: "{point}" is no ITER:FACTOR', hint="for example 0:0,1000:1")
        points.append((int(iteration), _number(factor, f"--force-schedule {point}")))
    return tuple(points)


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f'{where}: "{text}" is no number') from None


train = train_command(_hooks, OPTIONS, FIELDS)
