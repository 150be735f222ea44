"""Commands that look at a net, run it, export it and time it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from . import cli_data, console
from .console import input_shape_option, json_option, net_argument, seed_option, state_options, threads_option
from .errors import FileError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from .costs import LayerCost
    from .diff import Difference, Kernel, Row
    from .model import Model
    from .text import Document


cut_option = click.option(
    "--cut-at-unknown",
    is_flag=True,
    help="Leave out layers of unknown type and what depends on them; what they read becomes an output.",
)

_SMALL_NPZ, _MOST_PACKED = 2**27, 20  # bytes that a .npz may always unpack to; beyond, times its own size


@click.command()
@net_argument
@click.argument("weights", required=False)
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="With WEIGHTS: the rank that keeps this share of a layer's energy.",
)
@input_shape_option
@state_options
@json_option
def info(
    net: str,
    weights: str | None,
    energy: float,
    input_shapes: Any,
    phase: str,
    stages: Any,
    level: int,
    as_json: bool,
) -> None:
    """Print a row a layer: name, type, output shape, parameters, MACs; and totals.

    NET is a prototxt of any dialect. With WEIGHTS (.caffemodel or .caffemodel.h5) also the rank of each
    layer's filters at --energy: how many filters, mixed linearly, keep that share of their energy.
    """
    from .binding import bind
    from .costs import cost
    from .graph import build
    from .shape_inference import infer

    model = console.load_model(net, weights, phase, stages, level)
    shaped = infer(build(model.net), input_shapes)
    counted = cost(shaped)
    ranks: dict[str, tuple[int, int]] = {}
    if model.weights is not None:
        bind(shaped, model.weights)
        ranks = _ranks(model, energy, input_shapes)
    if as_json:
        rows = [_layer_json(row, ranks) for row in counted.layers]
        console.echo_json(
            {
                "name": model.net.name,
                "layers": rows,
                "totals": {"params": counted.params, "macs": counted.macs},
            }
        )
        return
    columns = ["layer", "type", "output", "params", "MACs"] + ([f"rank {energy:g}"] if ranks else [])
    rows_ = [_layer_row(row, ranks) for row in counted.layers]
    total = ["total", "", "", f"{counted.params:,}", f"{counted.macs:,}"] + ([""] if ranks else [])
    console.table(columns, rows_, left=3, total=total)


def _layer_json(row: LayerCost, ranks: dict[str, tuple[int, int]]) -> dict[str, Any]:
    tops = [{"name": name, "shape": list(shape) if shape is not None else None} for name, shape in row.tops]
    made: dict[str, Any] = {"name": row.name, "type": row.type, "tops": tops}
    made |= {"blobs": [list(blob) for blob in row.blobs], "params": row.params, "macs": row.macs}
    if row.name in ranks:
        made |= {"rank": ranks[row.name][0], "full_rank": ranks[row.name][1]}
    return made


def _layer_row(row: LayerCost, ranks: dict[str, tuple[int, int]]) -> list[str]:
    from .layers.spec import text

    shapes = ", ".join(text(shape) if shape is not None else "?" for _, shape in row.tops)
    figures = [f"{number:,}" if number else "" for number in (row.params, row.macs)]
    rank = [f"{ranks[row.name][0]}/{ranks[row.name][1]}" if row.name in ranks else ""] if ranks else []
    return [row.name, row.type, shapes, *figures, *rank]


def _ranks(model: Model, energy: float, input_shapes: Any) -> dict[str, tuple[int, int]]:
    """Rank at an energy and full rank of every layer that has filters."""
    from lra.schemes import SCHEMES
    from lra.targets import Spectra, find

    found = find(model, input_shapes)
    spectra = Spectra(found)
    made = {}
    for name, target in found.targets.items():
        spectrum = spectra.get(target, SCHEMES["pca"])
        made[name] = (spectrum.rank_for(energy), spectrum.max_rank)
    return made


@click.command()
@net_argument
@click.argument("weights")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="X.npy|BLOB=X.npy|IO.npz",
    help="What to feed; repeatable.",
)
@click.option(
    "-o", "--output", required=True, metavar="OUT.npz", help="Where the blobs go: blob name -> float32 array."
)
@click.option("--blobs", default="all", show_default=True, help="Blobs to write, separated by commas.")
@click.option("--compare", metavar="REF.npz", help="Print each blob's error against a dump of another Caffe.")
@cut_option
@threads_option
@state_options
@json_option
def run(
    net: str, weights: str, inputs: Sequence[str], output: str, blobs: str, compare: str | None,
    cut_at_unknown: bool, threads: int, phase: str, stages: Any, level: int, as_json: bool,
) -> None:  # fmt: skip
    """Run NET with WEIGHTS forward through onnxruntime and write its blobs.

    The shape of what is fed reshapes the net. Data layers become inputs: feed their tops.
    """
    from . import files, runtime

    model = console.load_model(net, weights, phase, stages, level)
    names = "all" if blobs == "all" else [name for name in blobs.split(",") if name]
    with runtime.session(model, names, threads=threads, cut_at_unknown=cut_at_unknown) as opened:  # type: ignore[arg-type]
        results = opened.run(_feeds(inputs, opened.input_names))
    reference = dict(_read_arrays(compare)) if compare else {}
    errors = {
        name: runtime.error(array, reference[name]) for name, array in results.items() if name in reference
    }
    if compare and not errors:
        raise UsageError("shares no blob name with the net", path=compare)
    with (
        files.writing([output], [net, weights, compare, *(value.rpartition("=")[2] for value in inputs)]) as (
            temporary,
        ),
        temporary.open("wb") as file,
    ):
        _write_npz(file, results)
    _print_run(results, errors, output, as_json, bool(compare))


def _write_npz(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """A .npz of these arrays, whatever they are called; the same arrays give the same bytes."""
    import zipfile

    import numpy as np

    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _print_run(
    results: dict[str, np.ndarray], errors: dict[str, float], output: str, as_json: bool, compared: bool
) -> None:
    from .layers.spec import text

    if as_json:
        blobs = {
            name: {"shape": list(array.shape), "error": _finite(errors.get(name))}
            for name, array in results.items()
        }
        console.echo_json(
            {"output": output, "blobs": blobs, "worst": _finite(max(errors.values(), default=None))}
        )
        return
    rows = [
        [name, text(array.shape), *([f"{errors[name]:.2e}" if name in errors else "-"] if compared else [])]
        for name, array in results.items()
    ]
    console.table(["blob", "shape", *(["error"] if compared else [])], rows)
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        click.echo(f"worst error {errors[worst]:.2e} of the blob's largest magnitude, in {worst}")
    click.echo(f"wrote {output}")


def _finite(value: float | None) -> float | None:
    return value if value is not None and value < float("inf") else None


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz, or of a .npy under the name ""; raises FileError where it is neither."""
    import numpy as np

    if not Path(path).is_file():
        raise FileError("no such file", path=path)
    _refuse_bomb(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if hasattr(loaded, "files") else {"": loaded}
    except Exception as error:  # a dozen kinds, of NumPy, zipfile and zlib
        raise FileError(f"is no NumPy file: {error}", path=path, hint="give a .npy or .npz file") from error


def _refuse_bomb(path: str) -> None:
    """Raise FileError where the members of a .npz are packed so tightly that they hold nothing but padding."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # a .npy; or NumPy will say what is wrong
    if size > max(_SMALL_NPZ, _MOST_PACKED * Path(path).stat().st_size):
        raise FileError(f"would unpack to {size:,} bytes, {_MOST_PACKED} times its size or more", path=path)


def _feeds(items: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """What --input names, by blob; a lone .npy feeds a net of one input, a .npz the inputs that it holds.

    An input that an in-place layer overwrote stands in a dump of Caffe under "@input:<blob>".
    """
    feeds: dict[str, np.ndarray] = {}
    for item in items:
        blob, equals, path = item.rpartition("=")
        if not equals or Path(item).exists():
            blob, path = "", item
        arrays = _read_arrays(path)
        if "" not in arrays:
            keys = {name: f"@input:{name}" if f"@input:{name}" in arrays else name for name in names}
            if not any(key in arrays for key in keys.values()):
                raise UsageError("holds none of the net's inputs: " + ", ".join(names), path=path)
            feeds.update({name: arrays[key] for name, key in keys.items() if key in arrays})
        elif blob or len(names) == 1:
            feeds[blob or names[0]] = arrays[""]
        else:
            raise UsageError(
                f"the net has {len(names)} inputs", path=path, hint=f"say which: {names[0]}={path}"
            )
    return feeds


@click.command()
@net_argument
@click.argument("weights")
@click.option("-o", "--output", required=True, metavar="OUT.onnx")
@click.option("--batch", metavar="N|dynamic", help="Batch size, or left open; default: the net's own.")
@click.option("--dynamic-hw", is_flag=True, help="Leave height and width of the images open.")
@click.option("--preprocess", is_flag=True, help="Bake in mean and scale of the net's transform_param.")
@click.option("--mean", metavar="B,G,R|FILE", help="Bake in a mean: numbers, .npy or .binaryproto.")
@click.option("--scale", type=float, help="Bake in a factor, after the mean.")
@click.option(
    "--bgr", is_flag=True, help="The images will come as RGB, the net wants BGR: swap the channels."
)
@cut_option
@input_shape_option
@state_options
@json_option
def export(
    net: str, weights: str, output: str, batch: str | None, dynamic_hw: bool, preprocess: bool, mean: str | None,
    scale: float | None, bgr: bool, cut_at_unknown: bool, input_shapes: Any, phase: str, stages: Any, level: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Write NET with WEIGHTS as ONNX (opset 17, IR 8) under Caffe's blob and layer names."""
    from . import files, onnx_export

    model = console.load_model(net, weights, phase, stages, level)
    request = onnx_export.Request(
        batch=_batch(batch),
        dynamic_batch=batch == "dynamic",
        dynamic_hw=dynamic_hw,
        input_shapes=input_shapes,
        preprocess=_preprocess(model, preprocess, mean, scale, bgr),
        cut_at_unknown=cut_at_unknown,
    )
    made = onnx_export.export_onnx(model, request)
    with files.writing([output], [net, weights]) as (temporary,):
        temporary.write_bytes(made.SerializeToString())
    inputs = {value.name: _dims(value) for value in made.graph.input}
    outputs = {value.name: _dims(value) for value in made.graph.output}
    if as_json:
        console.echo_json(
            {"output": output, "nodes": len(made.graph.node), "inputs": inputs, "outputs": outputs}
        )
        return
    for what, values in (("input", inputs), ("output", outputs)):
        for name, dims in values.items():
            click.echo(f"{what:6}  {name}: {' x '.join(map(str, dims))}")
    click.echo(
        f"wrote {output}: {len(made.graph.node)} nodes, {made.ByteSize():,} bytes, opset {onnx_export.OPSET}"
    )


def _dims(value: Any) -> list[int | str]:
    return [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]


def _batch(value: str | None) -> int | None:
    if value is None or value == "dynamic":
        return None
    if not value.isdigit() or int(value) < 1:
        raise UsageError(f'--batch "{value}" is neither a positive number nor "dynamic"')
    return int(value)


def _preprocess(model: Model, own: bool, mean: str | None, scale: float | None, bgr: bool) -> Any:
    from . import preprocess

    if not own and mean is None and scale is None and not bgr:
        return None
    base = preprocess.Preprocess()
    if own:
        found = preprocess.of_net(model.net)
        if found is None:
            raise UsageError(
                "no layer has a transform_param", path=model.net.path, hint="give --mean and --scale"
            )
        base = found
    return preprocess.Preprocess(
        preprocess.read_mean(mean) if mean is not None else base.mean,
        scale if scale is not None else base.scale,
        bgr,
    )


@click.command(name="time")
@click.argument("models", nargs=-1, required=True, metavar="NET[,WEIGHTS]|MODEL.onnx ...")
@click.option("--runs", type=click.IntRange(1), default=50, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=10, show_default=True)
@click.option("--batch", type=click.IntRange(1), help="Batch size; default: each net's own.")
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda or tensorrt.")
@click.option("--profile", is_flag=True, help="Also print a row a layer.")
@threads_option
@seed_option
@json_option
def time_(
    models: Sequence[str], runs: int, warmup: int, batch: int | None, provider: str, profile: bool,
    threads: int, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Time nets with onnxruntime side by side: median, 90th percentile, ratio of the first median to each.

    A NET without WEIGHTS gets random ones, so that a published prototxt can be timed alone. Runs are
    interleaved and sessions do not spin, so that none spoils another's times.
    """
    import onnxruntime

    from . import latency
    from .runtime import Engine

    subjects = [latency.subject(item, batch=batch, seed=seed) for item in models]
    engine = Engine(threads, provider)
    with console.progress("timing", runs) as step:
        timings = latency.measure(
            subjects, engine, runs=runs, warmup=warmup, batch=batch, seed=seed, step=step
        )
    profiles = [latency.profile(one, engine, batch=batch, seed=seed) for one in subjects] if profile else []
    first = timings[0].median
    if as_json:
        rows: list[dict[str, Any]] = [
            {"model": t.name, "median_ms": t.median, "p90_ms": t.p90, "ratio": first / t.median}
            for t in timings
        ]
        for row, layers in zip(rows, profiles, strict=False):
            row["layers"] = [{"name": one.name, "ops": one.ops, "ms": one.milliseconds} for one in layers]
        settings = {
            "threads": threads,
            "provider": provider,
            "runs": runs,
            "onnxruntime": onnxruntime.__version__,
        }
        console.echo_json({"models": rows, **settings})
        return
    console.table(
        ["model", "median ms", "p90 ms", "speed-up"],
        [[t.name, f"{t.median:.3f}", f"{t.p90:.3f}", f"{first / t.median:.2f}x"] for t in timings],
        left=1,
    )
    used = f"{threads} threads" if threads else "all cores"
    click.echo(f"onnxruntime {onnxruntime.__version__}, {provider}, {used}, {runs} interleaved runs")
    for one, layers in zip(subjects, profiles, strict=False):
        click.echo(f"\n{one.name}")
        total = sum(layer.milliseconds for layer in layers)
        rows_ = [
            [layer.name, layer.ops, f"{layer.milliseconds:.3f}", f"{layer.milliseconds / total:.1%}"]
            for layer in layers
        ]
        console.table(["layer", "operators", "ms", "share"], rows_, total=["total", "", f"{total:.3f}", ""])


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

    before, after = (
        console.load_model(net, weights or None, phase, stages, level)
        for net, _, weights in (item.partition(",") for item in (a, b))
    )
    found = differences.diff(before, after, input_shapes, _recompose)
    equal = found.equal(training)
    if as_json:
        console.echo_json(differences.to_json(found, equal))
    else:
        _print_diff(found, show_all, equal)
    if not equal:
        raise click.exceptions.Exit(1)


def _recompose(chain: Sequence[Kernel]) -> np.ndarray:
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

    if _is_binary(file):
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


def _is_binary(path: str) -> bool:
    """Whether a file is weights, or a pointer to some, rather than a prototxt."""
    from .files import unreadable

    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise unreadable(path, error) from error
    control = set(range(0x20)) - set(b"\t\n\v\f\r")
    return not control.isdisjoint(head) or head.startswith(b"version https://git-lfs")


def _text_kind(document: Document) -> str:
    """ "solver" or "net"; raises FileError where a prototxt is neither."""
    from . import schema
    from .upgrade import is_solver

    if is_solver(document):
        return "solver"
    names = {field.name for field in document.root.fields}
    if names and names.isdisjoint(schema.descriptor("NetParameter").fields_by_name):
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


COMMANDS = (info, run, export, time_, diff, deploy, upgrade_, recover_, *cli_data.COMMANDS)
