"""Commands that look at a net, run it and export it; and all other commands of this package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from . import cli_data, cli_nets, console
from .cli_time import said, time_
from .console import input_shape_option, json_option, net_argument, seed_option, state_options, threads_option
from .errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from .costs import LayerCost
    from .data.batches import Batch, Batches
    from .model import Model
    from .onnx_export import Request


cut_option = click.option(
    "--cut-at-unknown",
    is_flag=True,
    help="Leave out layers of unknown type and what depends on them; what they read becomes an output.",
)


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
    from .array_files import feeds, read_arrays, write_npz

    model = console.load_model(net, weights, phase, stages, level)
    names = "all" if blobs == "all" else [name for name in blobs.split(",") if name]
    with runtime.session(model, names, threads=threads, cut_at_unknown=cut_at_unknown) as opened:  # type: ignore[arg-type]
        results = opened.run(feeds(inputs, opened.input_names))
    reference = dict(read_arrays(compare)) if compare else {}
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
        write_npz(file, results)
    _print_run(results, errors, output, as_json, bool(compare))


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


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Numbers: fp16 halves the file and pays on GPUs; int8 needs --images.",
)


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
@dtype_option
@click.option(
    "--images", metavar="SRC", help="With --dtype int8: images to take ranges from, as for eval, as they come or as "
    "transform_param says; what is baked in is left to the net."
)  # fmt: skip
@click.option("--root", metavar="FOLDER", help="With --images: folder of a list's paths.")
@click.option(
    "--n-images", type=click.IntRange(1), default=100, show_default=True, help="With --images: so many, drawn by --seed."
)  # fmt: skip
@seed_option
@cut_option
@input_shape_option
@state_options
@json_option
def export(
    net: str, weights: str, output: str, batch: str | None, dynamic_hw: bool, preprocess: bool, mean: str | None,
    scale: float | None, bgr: bool, dtype: str, images: str | None, root: str | None, n_images: int, seed: int,
    cut_at_unknown: bool, input_shapes: Any, phase: str, stages: Any, level: int, as_json: bool,
) -> None:  # fmt: skip
    """Write NET with WEIGHTS as ONNX (opset 17, IR 8) under Caffe's blob and layer names."""
    from . import files, onnx_export

    if (dtype == "int8") != (images is not None):
        raise UsageError("--dtype int8 and --images go together", hint="int8 takes its ranges from images")
    for name in sorted({"root", "n_images", "seed"} & said()):
        if images is None:
            raise UsageError(f"--{name.replace('_', '-')} only goes with --images")

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
    if dtype != "fp32":
        made = _narrowed(made, dtype, model, request, images, root, n_images, seed)
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


def _narrowed(
    made: Any, dtype: str, model: Model, request: Request, images: str | None, root: str | None, count: int, seed: int
) -> Any:  # fmt: skip
    """The exported model in narrower numbers, ranges from images as the exported net wants them."""
    from . import quantize
    from .data import open_source
    from .data.batches import Batches
    from .evaluation import input_shape

    if images is None:
        return quantize.narrowed(made, dtype)
    shape = input_shape(model, dict(request.input_shapes or {}))
    baked = request.preprocess
    transform = cli_data.prepared(model, shape, None, None, None, None, None)
    if baked is not None:
        order = "rgb" if baked.swap else transform.order
        transform = replace(transform, mean=None, scale=1.0, order=order)
    with open_source(images, root=root, resize=transform.resize, color=transform.color) as source:
        inputs = None if shape is None else shape[1:]
        batches = Batches(source, transform, n_images=count, seed=seed, shape=inputs)
        with console.progress("calibrating", len(batches), "batches") as step:
            feeds = quantize.batches_for(
                made, (one for batch in _ticked(batches, step) for one in batch.images)
            )
            return quantize.narrowed(made, dtype, feeds)


def _ticked(batches: Batches, step: console.Step) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        step()


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


COMMANDS = (info, run, export, time_, *cli_nets.COMMANDS, *cli_data.COMMANDS)
