"""What the prune command measures of times: how much goes for a speed-up in time, and whether a plan's times hold here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caffe_proto import console

from .cli_options import Options

if TYPE_CHECKING:
    from lra.plan import Timed

    from .coupling import Coupling
    from .planner import Sizes


def sizes(o: Options, coupling: Coupling) -> Sizes:
    """How much stays of each layer; with --cost latency nets are measured for it."""
    from . import planner

    if o.cost != "latency":
        return planner.sizes(coupling, o.amount(), o.limits())
    from caffe_proto.runtime import Engine

    from .timing import Clock

    with console.progress("measuring", None, "nets") as step:
        clock = Clock(coupling, Engine(o.threads), o.latency_table, step)
        return planner.sizes(coupling, o.amount(), o.limits(), clock)


def doubts(timed: Timed | None, threads: int | None) -> list[str]:
    """Why the times of a plan may not hold here; ``threads``: None where it is not known how the net shall run."""
    if timed is None:
        return []
    from caffe_proto.runtime import Engine
    from lra.applier import doubts as found

    return list(found(timed, Engine(threads) if threads is not None else None))
