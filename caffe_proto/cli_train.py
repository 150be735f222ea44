"""The command that trains a net by its solver file."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from . import console
from .console import Decorator, json_option, together
from .errors import UsageError

if TYPE_CHECKING:
    from .solver import Solver
    from .train import Display, Event, Result, Saved, Tested

MakeHooks = Callable[..., Sequence[object]]


def _no_hooks(_solver: Solver) -> Sequence[object]:
    return ()


def train_command(
    make_hooks: MakeHooks = _no_hooks,
    options: Sequence[Decorator] = (),
    understood: frozenset[str] = frozenset(),
) -> click.Command:
    """The command ``train``.

    ``make_hooks``, called with the solver and the values of ``options``, gives the hooks that see each update;
    ``understood`` names the solver's fields of forks that it reads.
    """

    @click.command(name="train")
    @click.argument("solver")
    @click.option("--weights", multiple=True, metavar="W", help="Fine-tune from a caffemodel; repeatable.")
    @click.option(
        "--snapshot",
        "state",
        metavar="STATE",
        help="Go on from a .solverstate.npz, or from Caffe's own .solverstate or .solverstate.h5.",
    )
    @click.option(
        "--data",
        metavar="SRC",
        help="Images to train on, over what the net's data layer names: a folder of class folders, "
        "a list file, an LMDB, HDF5, .npz, MNIST's idx files or CIFAR's batches.",
    )
    @click.option("--test-data", metavar="SRC", help="Images to test on, over what the test nets name.")
    @click.option("--root", metavar="FOLDER", help="Folder of the paths of list files given as SRC.")
    @click.option(
        "--caffe-state",
        is_flag=True,
        help="With each snapshot also write PREFIX_iter_N.solverstate, for Caffe to go on from; .solverstate.h5"
        " where snapshot_format is HDF5.",
    )
    @click.option(
        "-o", "--output", metavar="PREFIX", help="Where snapshots go; default: the solver's snapshot_prefix."
    )
    @click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Default: cuda where the solver says GPU and torch finds one, else cpu.",
    )
    @click.option("--max-iter", type=click.IntRange(0), help="Iterations in all, over the solver's max_iter.")
    @click.option("--seed", type=int, help="Seed of everything random; default: random_seed, else 0.")
    @click.option(
        "--threads",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="torch's threads; 0: as torch chooses.",
    )
    @together(*options)
    @json_option
    def train(
        solver: str, weights: tuple[str, ...], state: str | None, data: str | None, test_data: str | None,
        root: str | None, caffe_state: bool, output: str | None, device: str | None, max_iter: int | None, seed: int | None,
        threads: int, as_json: bool, **asked: Any,
    ) -> None:  # fmt: skip
        """Train the net that SOLVER names, as Caffe does, and write snapshots.

        PREFIX_iter_N.caffemodel holds the weights, PREFIX_iter_N.solverstate.npz what training goes on from,
        with the same result as if it had not stopped. Control-C ends training behind the current iteration,
        with a snapshot. Under torchrun every process takes its part of each batch.
        """
        from . import solver as solvers

        described = solvers.load(solver, understood)
        if max_iter is not None:
            described = described.until(max_iter)
        if output is not None:
            described = replace(described, snapshot_prefix=output)
        running = torch_part()
        hooks = make_hooks(described, **asked)
        chosen = device or ("cuda" if described.gpu and running.cuda_found() else "cpu")
        if threads:
            running.set_threads(threads)
        printer = Printer(described, as_json)
        silent = as_json or not described.display
        with asked_to_stop() as stop, _progress(described.max_iter if silent else 0) as tick:
            request = running.Request(
                weights, state, data, test_data, root, chosen, seed, hooks, printer, tick, stop, caffe_state
            )
            result = running.train(described, request)
        printer.close(result, hooks)

    return train


def torch_part() -> Any:
    """The module that trains; raises UsageError where torch is not installed."""
    try:
        from . import train
    except ImportError as error:
        if error.name != "torch":
            raise
        raise UsageError("training needs torch", hint='install "caffe-lra[train]"') from error
    return train


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar where no lines tell how far training is."""
    if not total:
        yield lambda: None
        return
    with console.progress("training", total) as step:
        yield step


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Control-C was pressed; the second one interrupts."""
    pressed: list[int] = []

    def note(number: int, _frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class Printer:
    """Prints what happens in the lines that Caffe's log has, or keeps silent for JSON."""

    def __init__(self, solver: Solver, as_json: bool) -> None:
        self.solver, self.as_json = solver, as_json
        self.told = False

    def __call__(self, event: Event) -> None:
        from .train import Display, Resized, Saved

        self.told = True
        if self.as_json:
            return
        if isinstance(event, Saved):
            net = "" if event.net is None else f", the net as it is now to {event.net}"
            caffe = "" if event.caffe is None else f", for Caffe to {event.caffe}"
            click.echo(f"Snapshotting to {event.weights} and {event.state}{caffe}{net}")
        elif isinstance(event, Display):
            speed = f"{event.per_second:.4g} iter/s"
            click.echo(
                f"Iteration {event.iteration} ({speed}), loss = {event.loss:.6g}, lr = {event.rate:.6g}"
            )
            _print_outputs("Train", event)
        elif isinstance(event, Resized):
            sizes = ", ".join(f"{name} {count}" for name, count in event.outputs.items())
            click.echo(f"Iteration {event.iteration}, outputs now: {sizes}")
        else:
            click.echo(f"Iteration {event.iteration}, Testing net (#{event.net})")
            if event.loss is not None:
                click.echo(f"    Test loss: {event.loss:.6g}")
            _print_outputs("Test", event)

    def close(self, result: Result, hooks: Sequence[object] = ()) -> None:
        """The last lines; only in the first process, which alone is told what happens.

        The JSON also holds what the ``document`` of each of the ``hooks`` gives.
        """
        if not self.told:
            return
        speed = result.images / result.seconds if result.seconds else 0.0
        if self.as_json:
            saved = result.saved
            made = {
                "iterations": result.iteration,
                "loss": result.loss,
                "tests": [_test_json(test) for test in result.tests],
                "images_per_second": speed,
                "files": _files_json(saved) if saved else {},
            }
            for hook in hooks:
                document = getattr(hook, "document", None)
                made |= document() if document is not None else {}
            console.echo_json(made)
        elif result.iteration < self.solver.max_iter:
            state = f"; --snapshot {result.saved.state} goes on" if result.saved is not None else ""
            click.echo(f"Stopped: {result.iteration:,} of {self.solver.max_iter:,} iterations{state}")
        else:
            click.echo(f"Optimization Done: {result.iteration:,} iterations, {speed:,.0f} images/s")


def _print_outputs(what: str, event: Display | Tested) -> None:
    """One line a number, numbered through all outputs as Caffe does, losses with their weight."""
    flat = [(name, value) for name, values in event.outputs.items() for value in values]
    for i, (name, value) in enumerate(flat):
        weight = event.loss_weights.get(name)
        part = "" if weight is None else f" (* {weight:g} = {weight * value:.6g} loss)"
        click.echo(f"    {what} net output #{i}: {name} = {value:.6g}{part}")


def _files_json(saved: Saved) -> dict[str, str]:
    net = {} if saved.net is None else {"prototxt": str(saved.net)}
    caffe = {} if saved.caffe is None else {"caffe_state": str(saved.caffe)}
    return {"weights": str(saved.weights), "state": str(saved.state), **caffe, **net}


def _test_json(test: Tested) -> dict[str, Any]:
    found = {name: list(values) if len(values) != 1 else values[0] for name, values in test.outputs.items()}
    return {"net": test.net, "iteration": test.iteration, "outputs": found, "loss": test.loss}


COMMANDS = (train_command(),)
