"""Commands on the files of nets: compare two, make the deploy form, upgrade old ones, recover lost ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from . import console
from .console import input_shape_option, json_option, state_options
from .errors import FileError
from .model import net_and_weights

if TYPE_CHECKING:
    import numpy as np

    from .diff import Difference, Kernel, Row
    from .text import Document


@click.command()
@click.argument("a", metavar="A[,WEIGHTS]")
@click.argument("b", metavar="B[,WEIGHTS]")
@click.option("--training", is_flag=True, help="Count differences of training settings too.")
@click.option("--all", "show_all", is_flag=True, help="Also print the layers that are the same.")
@input_shape_option
@state_options
@json_option
def diff(
    a: str, b: str, training: bool, show_all: bool, input_shapes: Any, phase: str, stages: Any, level: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Compare two nets layer by layer by what they mean; exit status 0: equal, 1: different.

    - and + mark layers of A and B alone, ~ what computes otherwise, w weights alone, t settings for training
    (rates, fillers, rules, batch), which count only with --training. A decomposed layer is one row, with its
    ranks. Where both nets have weights, they are compared too: the relative difference of a layer's blobs, of a
    decomposed layer the error of its kernel.
    """
    from . import diff as differences

    before, after = (console.load_model(*net_and_weights(item), phase, stages, level) for item in (a, b))
    found = differences.diff(before, after, input_shapes, recompose)
    equal = found.equal(training)
    if as_json:
        console.echo_json(differences.to_json(found, equal))
    else:
        _print_diff(found, show_all, equal)
    if not equal:
        raise click.exceptions.Exit(1)


def recompose(chain: Sequence[Kernel]) -> np.ndarray:
    """The one kernel that convolutions in a row compute."""
    from lra.decomposition import Decomposition, Step

    return Decomposition(tuple(Step("", weight, None, group=group) for weight, group in chain)).reconstruct()


def _print_diff(found: Difference, show_all: bool, equal: bool) -> None:
    rows = [row for row in found.rows if show_all or row.status != "same"]
    weighed = any(row.weights is not None for row in found.rows)
    columns = ["", "layer", "difference", "rank", "MACs A", "MACs B", "params A", "params B"]
    totals = [f"{number:,}" for what in ("macs", "params") for number in found.totals(what)]
    if rows:
        console.table(
            columns + (["weights"] if weighed else []),
            [_diff_row(row, weighed) for row in rows],
            left=4,
            total=["", "total", "", "", *totals, *([""] if weighed else [])],
            styles=[_MARKS[row.status][1] for row in rows],
        )
    if any(None in row.pair("macs") for row in rows):
        click.echo("?: shapes that are not known here; not in the totals")
    if len(rows) < len(found.rows):
        click.echo(f"... {len(found.rows) - len(rows)} layers the same")
    ratios = [
        f"{what} A / B {x / y:.3f}x"
        for what, (x, y) in (("MACs", found.totals("macs")), ("parameters", found.totals("params")))
        if y
    ]
    click.echo(", ".join(["equal" if equal else "different", *ratios]))


_MARKS = {
    "same": ("", ""), "training": ("t", "dim"), "weights": ("w", "yellow"), "changed": ("~", "yellow"),
    "renamed": ("~", "yellow"), "decomposed": ("~", "yellow"), "only a": ("-", "red"), "only b": ("+", "green"),
}  # fmt: skip


def _diff_row(row: Row, weighed: bool) -> list[str]:
    numbers = [
        f"{number:,}" if number else "" if number == 0 else "?"
        for what in ("macs", "params")
        for number in row.pair(what)
    ]
    weights = "" if row.weights is None else f"{row.weights:.2e}" if row.weights else "equal"
    ranks = "+".join(map(str, row.ranks))
    return [_MARKS[row.status][0], row.name, row.summary(), ranks, *numbers, *([weights] if weighed else [])]


@click.command()
@click.argument("train_val")
@click.option("-o", "--output", required=True, metavar="NET", help="Where the deploy net goes.")
@click.option(
    "--batch", type=click.IntRange(1), help="Batch size; default: 1, and that of Input layers as it is."
)
@click.option(
    "--auxiliary", is_flag=True, help="Keep the classifiers of losses that weigh less than the heaviest."
)
@input_shape_option
@state_options
@json_option
def deploy(
    train_val: str, output: str, batch: int | None, auxiliary: bool, input_shapes: Any, phase: str, stages: Any,
    level: int, as_json: bool,
) -> None:  # fmt: skip
    """Write the deploy form of TRAIN_VAL: data layers become inputs, SoftmaxWithLoss becomes Softmax.

    Labels go, and all that depends on them; so do layers of the other phase, rules, and whatever leads to no
    output. Everything else stays byte for byte, so the weights of TRAIN_VAL load by name.
    """
    from . import deploy as deploying
    from .files import text_bytes, writing
    from .layers.spec import text

    model = console.load_model(train_val, None, phase, stages, level)
    made = deploying.deploy(model.net, input_shapes, batch=batch, auxiliary=auxiliary)
    with writing([output], [train_val]) as (temporary,):
        temporary.write_bytes(text_bytes(made.net.text))
    if as_json:
        inputs = {name: list(shape) for name, shape in made.inputs.items()}
        console.echo_json(
            {"output": output, "inputs": inputs, "outputs": list(made.outputs), "dropped": list(made.dropped)}
        )
        return
    for name, shape in made.inputs.items():
        click.echo(f"input   {name}: {text(shape)}")
    for name in made.outputs:
        click.echo(f"output  {name}")
    if made.dropped:
        click.echo(f"dropped {', '.join(made.dropped)}")
    click.echo(f"wrote {output}")


@click.command(name="upgrade")
@click.argument("file", metavar="NET|SOLVER|WEIGHTS")
@click.option("-o", "--output", required=True, metavar="OUT")
@json_option
def upgrade_(file: str, output: str, as_json: bool) -> None:
    """Write an old net, solver or caffemodel in today's form (V2), as Caffe's own upgrade tools do.

    Text keeps its comments, its unknown fields and every part that no step touches; blobs are copied as they
    are. A file with nothing to upgrade, HDF5 weights included, is written as it is.
    """
    from . import files, text, upgrade

    if files.is_binary(file):
        from . import upgrade_weights, weights
        from .model import write_weights

        stored = weights.load(file)
        kind, made = "weights", upgrade_weights.upgrade_weights(stored)
        with files.writing([output], [file]) as (temporary,):
            if stored.is_hdf5:
                write_weights(stored, temporary, hdf5=True)
            else:
                with temporary.open("wb") as opened:
                    made.write(opened)
        steps = made.steps
    else:
        document = text.parse(files.read_text(file), file)
        kind = _text_kind(document)
        done = (upgrade.upgrade_solver if kind == "solver" else upgrade.upgrade_net)(document)
        with files.writing([output], [file]) as (temporary,):
            temporary.write_bytes(files.text_bytes(done.text))
        steps = done.steps
    if as_json:
        console.echo_json({"output": output, "kind": kind, "steps": list(steps)})
        return
    for step in steps or ("nothing to upgrade",):
        click.echo(step)
    click.echo(f"wrote {output}")


def _text_kind(document: Document) -> str:
    """ "solver" or "net"; raises FileError where a prototxt is neither."""
    from . import schema
    from .upgrade import is_solver

    if is_solver(document):
        return "solver"
    names = {field.name for field in document.root.fields}
    if not names:
        raise FileError("holds neither a net nor a solver nor weights", path=document.path)
    if names.isdisjoint(schema.descriptor("NetParameter").fields_by_name):
        raise FileError("is neither a net nor a solver nor weights", path=document.path)
    return "net"


@click.command(name="recover")
@click.argument("weights_file", metavar="WEIGHTS")
@click.option("-o", "--output", required=True, metavar="NET")
@json_option
def recover_(weights_file: str, output: str, as_json: bool) -> None:
    """Write the net that a caffemodel embeds as a prototxt.

    Split layers that Caffe put in and fields at their defaults are left out. What the program does not know
    stands in comments. A file that holds names and blobs only is refused, and so is HDF5.
    """
    from . import files, recover, weights

    made = recover.recover(weights.load(weights_file))
    with files.writing([output], [weights_file]) as (temporary,):
        temporary.write_bytes(files.text_bytes(made.text))
    unknown = sorted({line.strip("# ") for line in made.text.splitlines() if recover.UNKNOWN in line})
    if as_json:
        told = {"dialect": made.dialect, "layers": made.layers, "splits": list(made.splits)}
        console.echo_json({"output": output, **told, "unknown": unknown})
        return
    click.echo(f"{made.layers} layers, {made.dialect}")
    if made.splits:
        click.echo(f"left out {len(made.splits)} split layers that Caffe put in")
    for line in unknown:
        click.echo(line)
    if made.dialect != "V2":
        click.echo(f"stored as {made.dialect}: caffe-lra upgrade {output} makes it V2")
    click.echo(f"wrote {output}")


COMMANDS = (diff, deploy, upgrade_, recover_)
