"""What the commands share: options, tables, JSON, progress, and how an error becomes one line and a status."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import click

from .errors import Error, UsageError
from .model import Model, load


class Step(Protocol):
    """Counts what is done."""

    def __call__(self, count: int = 1) -> None: ...


net_argument = click.argument("net")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of tables."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    help="onnxruntime threads; 0: all cores.",
    show_default=True,
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of everything random."
)


def state_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--phase, --stage, --level: which layers of the file exist."""
    for option in (
        click.option(
            "--level", type=int, default=0, show_default=True, help="Level for min_level/max_level rules."
        ),
        click.option("--stage", "stages", multiple=True, help="Stage that is set; repeatable."),
        click.option("--phase", type=click.Choice(["TEST", "TRAIN"]), default="TEST", show_default=True),
    ):
        function = option(function)
    return function


def input_shape_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--input-shape, repeatable."""
    return click.option(
        "--input-shape",
        "input_shapes",
        multiple=True,
        callback=lambda _context, _option, values: dict(map(parse_shape, values)),
        metavar="BLOB=N,C,H,W",
        help="Shape of an input blob, over what the file says; repeatable.",
    )(function)


def parse_shape(value: str) -> tuple[str, tuple[int, ...]]:
    """``data=1,3,224,224`` as a blob name and a shape; raises UsageError where it is none."""
    name, equals, dims = value.rpartition("=")
    try:
        shape = tuple(int(dim) for dim in dims.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not equals or not name or not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {value!r} is no BLOB=N,C,H,W", hint="for example data=1,3,224,224")
    return name, shape


def refuse(said: set[str] | frozenset[str], why: str, spelt: Mapping[str, str]) -> None:
    """Raise UsageError on the first of the options that were given and would be ignored.

    ``spelt``: options that are called otherwise on the command line.
    """
    for name in sorted(said):
        option = spelt.get(name, name.rstrip("_"))
        raise UsageError(f"--{option.replace('_', '-')} {why}")


def load_model(net: str, weights: str | None, phase: str, stages: Sequence[str], level: int) -> Model:
    """The model that the common options name."""
    return load(net, weights, phase=phase, stages=tuple(stages), level=level)


def echo_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=1))


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 2,
    total: Sequence[str] | None = None,
    styles: Sequence[str] = (),
) -> None:
    """Print rows under columns; the first ``left`` columns are words, the others figures.

    ``styles`` gives each row a colour of rich, which shows on a terminal only.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(
        box=None, pad_edge=False, header_style="bold", show_footer=total is not None, footer_style="bold"
    )
    for i, column in enumerate(columns):
        footer = total[i] if total is not None else ""
        made.add_column(column, Text(footer), justify="left" if i < left else "right", no_wrap=True)
    for i, row in enumerate(rows):
        made.add_row(*(Text(cell) for cell in row), style=styles[i] if styles else None)
    console = Console(file=sys.stdout, soft_wrap=False, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=10_000, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(made, crop=False)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def progress(label: str, total: int | None, unit: str = "steps") -> Iterator[Step]:
    """A callable that counts what is done; draws a bar on stderr once two seconds are over, on a terminal only.

    The bar shows the share done, the rate in units a second and the time that remains; without a total, the
    count and the rate.
    """
    started = time.monotonic()
    done = 0
    bar: Any = None

    def step(count: int = 1) -> None:
        nonlocal done, bar
        done += count
        if bar is None and sys.stderr.isatty() and time.monotonic() - started > 2:
            bar = _bar(label, total)
            bar.start()
        if bar is not None:
            rate = done / (time.monotonic() - started)
            bar.update(bar.task_ids[0], completed=done, rate=f"{rate:,.3g} {unit}/s")

    try:
        yield step
    finally:
        if bar is not None:
            bar.stop()


def _bar(label: str, total: int | None) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}")]
    shown = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    shown.add_task(label, total=total, rate="")
    return shown


def run(group: click.Group, argv: Sequence[str] | None = None) -> int:
    """Run a command; an Error or a wrong option is one line and status 2, anything else a bug and status 70."""
    name = "caffe-lra"
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold any bytes
    try:
        result = group.main(args=None if argv is None else list(argv), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except Error as error:
        click.echo(f"{name}: error: {_one_line(str(error))}", err=True)
        return 2
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        hint = f"; see {error.ctx.command_path} -h" if error.ctx else ""
        click.echo(f"{name}: error: {_one_line(error.format_message())}{hint}", err=True)
        return 2
    except click.ClickException as error:
        click.echo(f"{name}: error: {_one_line(error.format_message())}", err=True)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{name}: interrupted", err=True)
        return 130
    except BrokenPipeError:
        return 0
    except Exception:
        import traceback

        traceback.print_exc()
        click.echo(f"{name}: this is a bug; please report it with the lines above", err=True)
        return 70


def _one_line(message: str) -> str:
    return " ".join(message.split())
