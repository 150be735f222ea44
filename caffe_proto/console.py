"""What the commands share: options, tables, JSON, progress, and how an error becomes one line and a status."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import click
from click.core import ParameterSource

from .errors import Error, NetError, UsageError, alike
from .files import is_binary
from .model import Model, load
from .peers import Elsewhere, leaving, rank
from .tables import table as table

_NAME = "caffe-lra"

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


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


def together(*options: Decorator) -> Decorator:
    """Several options as one, in this order."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def choice_option(*names: str, choices: Sequence[str], help: str) -> Decorator:
    """One of these, the first where nothing is said."""
    return click.option(*names, type=click.Choice(choices), default=choices[0], show_default=True, help=help)


state_options = together(  # which layers of the file exist
    choice_option(
        "--phase",
        choices=["TEST", "TRAIN"],
        help="Phase of the net.",
    ),
    click.option("--stage", "stages", multiple=True, help="Stage that is set; repeatable."),
    click.option(
        "--level", type=int, default=0, show_default=True, help="Level for min_level/max_level rules."
    ),
)
input_shape_option = click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    callback=lambda _context, _option, values: dict(map(parse_shape, values)),
    metavar="BLOB=N,C,H,W",
    help="Shape of an input blob, over what the file says; repeatable.",
)


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


def said() -> frozenset[str]:
    """The arguments and options of the present command that stand on the command line."""
    context = click.get_current_context()
    names = (str(one.name) for one in context.command.params)
    return frozenset(
        name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    )


def refuse(said: set[str] | frozenset[str], why: str, spelt: Mapping[str, str]) -> None:
    """Raise UsageError on the first of the options that were given and would be ignored.

    ``spelt``: options that are called otherwise on the command line.
    """
    for name in sorted(said):
        option = spelt.get(name, name.rstrip("_"))
        raise UsageError(f"--{option.replace('_', '-')} {why}")


def load_model(net: str, weights: str | None, phase: str, stages: Sequence[str], level: int) -> Model:
    """The model that the common options name; raises UsageError where the two are swapped, NetError on an empty net."""
    files = weights is not None and Path(net).is_file() and Path(weights).is_file()
    if weights is not None and files and is_binary(net) and not is_binary(weights):
        raise UsageError("is no net", path=net, hint="NET comes first, then WEIGHTS")
    model = load(net, weights, phase=phase, stages=tuple(stages), level=level)
    if not model.net.layers:
        raise NetError(f"has no layer in phase {phase}", path=net)
    return model


def command_line() -> str:
    """The present command as it was typed, as a shell takes it."""
    return shlex.join([_NAME, *(click.get_current_context().find_root().obj or ())])


def echo_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document; NaN and the infinities, which JSON has not, are null."""
    click.echo(json.dumps(_finite(document), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        if bar is None and rank() == 0 and sys.stderr.isatty() and time.monotonic() - started > 2:
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
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold any bytes
    with leaving():
        return _run(group, sys.argv[1:] if argv is None else list(argv))


def _run(group: click.Group, words: Sequence[str]) -> int:
    streams = sys.stdout, sys.stderr
    try:
        result = group.main(args=list(words), prog_name=_NAME, standalone_mode=False, obj=tuple(words))
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except Elsewhere:  # the first process says it
        return 2
    except Error as error:
        return _refused(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        return _refused(_said(error))
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{_NAME}: interrupted", err=True)
        return 130
    except BrokenPipeError:
        return _unread()
    except SystemExit:
        if streams == (sys.stdout, sys.stderr):
            raise
        sys.stdout, sys.stderr = streams  # click hides them and ends when nobody reads on
        return _unread()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return _bug()
        _unread()
        return _refused(f"cannot be written: {error.strerror}")
    except Exception:
        return _bug()


def _bug() -> int:
    """Print the traceback of what nobody expected."""
    import traceback

    traceback.print_exc()
    click.echo(f"{_NAME}: this is a bug; please report it with the lines above", err=True)
    return 70


def _refused(message: str) -> int:
    click.echo(f"{_NAME}: error: {' '.join(message.split())}", err=True)
    return 2


def _said(error: click.ClickException) -> str:
    """What click refuses, with the choice that was meant where there is one, and where to read more."""
    message = error.format_message()
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return message
    kind = error.param.type if isinstance(error, click.BadParameter) and error.param else None
    given = re.match("'(.*?)' is not one of", error.message)
    if isinstance(kind, click.Choice) and given is not None:
        hint = alike(given[1], [str(one) for one in kind.choices])
        message = f"{message.rstrip('.')}; {hint}" if hint else message
    return f"{message.rstrip('.')}{' See' if message.endswith('?') else '; see'} {error.ctx.command_path} -h"


def _unread() -> int:
    """Nothing can be written any more, as with ``| head``: no error, and nothing more to say."""
    with suppress(OSError, ValueError):  # no file, as in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
