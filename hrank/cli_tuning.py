"""Fine-tuning as the prune command does it: who trains, what is printed meanwhile, and how it is gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from caffe_proto import cli_train, console
from caffe_proto.errors import UsageError

from .cli_options import Options

if TYPE_CHECKING:
    from caffe_proto.model import Model
    from caffe_proto.solver import Solver
    from lra.stage import Stage
    from lra.train_setup import Place

    from .coupling import Coupling
    from .plan import Plan
    from .tuning import Trained


@dataclass(frozen=True, eq=False)
class Ready:
    """A fine-tuning that can begin: the solver, and the net that it trains as its data shape it."""

    solver: Solver
    place: Place
    running: Any  # caffe_proto.train


def prepare(o: Options, coupling: Coupling) -> Ready | None:
    """Look at solver, net and data before anything is measured; None where no training is asked for.

    Raises UsageError where torch is missing, or the solver is of another net.
    """
    if o.finetune is None:
        return None
    from caffe_proto import solver as solvers

    from .tuning import place_of

    described = solvers.load(o.finetune)
    if o.iterations is not None:
        described = described.until(o.iterations)
    if described.max_iter < 1:
        raise UsageError("has no max_iter", path=o.finetune, hint="give --iterations N")
    running = cli_train.torch_part()
    return Ready(described, place_of(described, coupling, o.data, o.root), running)


def recorded(plan: Plan, o: Options, ready: Ready) -> Plan:
    """The plan with how the net was trained behind it."""
    about = {"solver": o.finetune, "by": o.finetune_by, "iterations": ready.solver.max_iter}
    return replace(plan, target={**plan.target, "finetune": about})


def tune(
    o: Options, ready: Ready, plan: Plan, coupling: Coupling, pruned: Model
) -> tuple[Model, list[Trained]]:
    """Train the pruned net; PREFIX.finetune holds the stages."""
    from lra.stage import Stage

    from . import tuning

    solver = ready.solver
    seed = o.seed if "seed" in o.said else None
    name = tuning.key(plan, coupling.model, solver, o.finetune_by, (o.data, o.test_data, o.root), seed)
    work = Stage(f"{o.prefix}.finetune", resume=o.resume)
    _claim(work, name, o.resume)
    if o.threads:
        ready.running.set_threads(o.threads)
    share = tuning.lagging(ready.place, solver.max_iter)
    if share > 0.1 and "bn" not in o.repairs:
        click.echo(
            f"warning: BatchNorm's stored statistics keep {share:.0%} of what they were before {solver.max_iter:,}"
            " iterations (moving_average_fraction): --repair bn estimates them behind training",
            err=True,
        )
    with cli_train.asked_to_stop() as stop, _told(o, solver, plan, coupling) as (begin, listen, tick):

        def run(stage: Solver, weights: str | None, state: str | None, hooks: Sequence[object]) -> Any:
            request = ready.running.Request(
                (weights,) if weights else (), state, o.data, o.test_data, o.root, device, seed, hooks, listen, tick, stop
            )  # fmt: skip
            return ready.running.train(stage, request)

        device = o.device or ("cuda" if solver.gpu and ready.running.cuda_found() else "cpu")
        trainer = tuning.Trainer(run, begin)
        try:
            return tuning.tune(
                plan, coupling, pruned, ready.place, trainer, work, name, by=o.finetune_by, masked=o.mask_only
            )  # fmt: skip
        except tuning.Interrupted:
            click.echo("interrupted; the same command with --resume goes on from here", err=True)
            raise KeyboardInterrupt from None


def _claim(work: Stage, name: str, resume: bool) -> None:
    """Note what the folder is of; raises UsageError where another command has begun it."""
    if resume and work.get("finetune", name) is None:
        raise UsageError(
            "is of a fine-tuning by another plan, solver, data or number of iterations",
            path=work.folder,
            hint="give the same options, or leave --resume out to start anew",
        )
    work.put("finetune", name, True)


Told = tuple[Callable[[Sequence[str], int, int], None], Callable[[Any], None], Callable[[], None]]


@contextmanager
def _told(o: Options, solver: Solver, plan: Plan, coupling: Coupling) -> Iterator[Told]:
    """What is said of each stage, of events within it, and the progress bar where no lines tell."""
    from .tuning import stages

    count = len(stages(plan, coupling, o.finetune_by, masked=o.mask_only))
    silent = o.as_json or not solver.display
    listen = cli_train.Printer(solver, o.as_json)

    def begin(layers: Sequence[str], number: int, total: int) -> None:
        if not o.as_json:
            click.echo(f"training {number} of {total}, behind pruning {', '.join(layers)}")

    if not silent:
        yield begin, listen, lambda: None
        return
    with console.progress("training", count * solver.max_iter, "iterations") as step:
        yield begin, listen, lambda: step(1)
