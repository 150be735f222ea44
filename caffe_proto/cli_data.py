"""Commands on labelled images: accuracy of a net, and the LMDBs that Caffe trains from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console
from .cli_images import image_options, prepared, root_option, size_option, skip_bad_option
from .console import input_shape_option, json_option, net_argument, seed_option, state_options, threads_option
from .errors import UsageError
from .model import fingerprint_document, net_and_weights

if TYPE_CHECKING:
    from .data.batches import Batches
    from .data.transform import Transform
    from .errors import FileError
    from .evaluation import Accuracy, Evaluation, Share, Subject


@click.command(name="eval")
@net_argument
@click.argument("weights")
@image_options()
@click.option("--reference", metavar="NET,WEIGHTS", help="A net to compare with: agreement and output error.")
@click.option(
    "--blob", "output", metavar="BLOB", help="The blob of class scores; default: what the net's outputs say."
)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images at a time.")
@threads_option
@seed_option
@input_shape_option
@state_options
@json_option
def eval_(
    net: str, weights: str, images: str, root: str | None, n_images: int | None, mean: str | None, scale: float | None,
    crop: tuple[int, int] | None, resize: tuple[int, int] | None, bgr: bool | None, skip_bad: bool,
    reference: str | None, output: str | None, batch: int, threads: int, seed: int, input_shapes: Any, phase: str,
    stages: Any, level: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure top-1 and top-5 of NET with WEIGHTS on labelled images, with standard errors.

    Images are prepared as NET's transform_param says, and as the options say over it. With --reference also how
    often both nets name the same class, and the relative error of the scores; that needs no labels.
    """
    from .data import open_source
    from .data.batches import Batches
    from .evaluation import Subject, evaluate, input_shape

    model = console.load_model(net, weights, phase, stages, level)
    shape = input_shape(model, input_shapes)
    transform = prepared(model, shape, mean, scale, crop, resize, bgr)
    subject = Subject(model, output, threads)
    other = None if reference is None else _reference(reference, subject, threads, phase, stages, level)
    with open_source(images, root=root, resize=transform.resize, color=transform.color) as source:
        if not source.labelled and other is None:
            raise UsageError(
                "has no labels", path=images, hint="give --reference to compare two nets without them"
            )
        inputs = None if shape is None else shape[1:]
        batches = Batches(
            source, transform, batch, n_images=n_images, seed=seed, shape=inputs, skip_bad=skip_bad
        )
        with console.progress("evaluating", len(batches), "batches") as step:
            found = evaluate(subject, batches, other, step)
    if not found.images:
        raise UsageError("none of its images can be read", path=images)
    if as_json:
        console.echo_json(_eval_json(found, batches, subject, other, transform))
    else:
        _print_eval(found, batches, subject, transform)


def _reference(value: str, subject: Subject, threads: int, phase: str, stages: Any, level: int) -> Subject:
    """The net that --reference names, read at the same blob where it has it."""
    from .evaluation import Subject
    from .graph import build

    net, weights = net_and_weights(value)
    if weights is None:
        raise UsageError(f"--reference {value!r} names no weights", hint="give NET,WEIGHTS")
    model = console.load_model(net, weights, phase, stages, level)
    return Subject(model, subject.output if subject.output in build(model.net).final else None, threads)


def _described(transform: Transform) -> dict[str, Any]:
    """What was done to the images, for the reader."""
    mean = transform.mean
    return {
        "resize": transform.resize,
        "crop": transform.crop,
        "mean": None if mean is None else mean.tolist() if mean.ndim == 1 else list(mean.shape),
        "scale": transform.scale,
        "order": transform.order,
    }


def _done(transform: Transform) -> str:
    """The same in one line."""
    mean = transform.mean
    told = [f"{name} {high} x {wide}" for name, (high, wide) in _sizes(transform)]
    if mean is not None:
        told.append("mean " + (",".join(f"{one:g}" for one in mean) if mean.ndim == 1 else "image"))
    if transform.scale != 1:
        told.append(f"scale {transform.scale:g}")
    if transform.order:
        told.append(transform.order.upper())
    return ", ".join(told) or "as they are"


def _sizes(transform: Transform) -> list[tuple[str, tuple[int, int]]]:
    named = (("resize", transform.resize), ("crop", transform.crop))
    return [(name, size) for name, size in named if size is not None]


def _share_json(share: Share) -> dict[str, float | int]:
    return {"value": share.value, "standard_error": share.error, "hits": share.hits, "n": share.n}


def _accuracy_json(accuracy: Accuracy) -> dict[str, Any]:
    return {"top1": _share_json(accuracy.top1), "top5": _share_json(accuracy.top5)} if accuracy.top1.n else {}


def _eval_json(
    found: Evaluation, batches: Batches, subject: Subject, other: Subject | None, transform: Transform
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "sha256": fingerprint_document(subject.model),
        "images": found.images,
        "classes": found.classes,
        "output": subject.output,
        "transform": _described(transform),
        "skipped": [str(error) for error in batches.skipped],
        **_accuracy_json(found.accuracy),
    }
    if other is not None:
        made["reference"] = {"sha256": fingerprint_document(other.model), **_accuracy_json(found.reference)}
        made["agreement"] = _share_json(found.agreement)
        made["output_error"] = found.output_error
    return made


def _print_eval(found: Evaluation, batches: Batches, subject: Subject, transform: Transform) -> None:
    click.echo(f"{found.images:,} images of {batches.source.path}: {_done(transform)}")
    five = found.classes > 5
    rows = [
        [name, *_cells(accuracy, five)]
        for name, accuracy in (("net", found.accuracy), ("reference", found.reference))
        if accuracy.top1.n
    ]
    if rows:
        console.table([subject.output, "top-1", *(["top-5"] if five else [])], rows, left=1)
    if found.agreement.n:
        click.echo(f"both name the same class: {_cell(found.agreement)}")
        click.echo(f"relative error of {subject.output}: {found.output_error:.3e}")
    _print_skipped(batches.skipped)


def _cell(share: Share) -> str:
    return f"{share.value:.4f} ± {share.error:.4f}"


def _cells(accuracy: Accuracy, five: bool) -> list[str]:
    return [_cell(accuracy.top1), *([_cell(accuracy.top5)] if five else [])]


def _print_skipped(skipped: list[FileError]) -> None:
    if skipped:
        click.echo(f"left out {len(skipped):,} images that cannot be read:")
    for error in skipped:
        click.echo(f"  {error}")


@click.group(name="data")
def data() -> None:
    """Build what Caffe trains from: LMDBs and mean files, as its own convert tools write them."""


new_option = click.option(
    "-o", "--output", required=True, metavar="NEW", help="A folder that does not exist yet."
)


@data.command(name="mnist")
@click.argument("images")
@click.argument("labels")
@new_option
@json_option
def mnist_(images: str, labels: str, output: str, as_json: bool) -> None:
    """Write the LMDB that convert_mnist_data makes of idx files IMAGES and LABELS, plain or gzipped."""
    from .data.build import build_mnist

    _print_built({output: build_mnist(Path(images), Path(labels), output)}, output, as_json)


@data.command(name="cifar10")
@click.argument("folder")
@new_option
@json_option
def cifar10(folder: str, output: str, as_json: bool) -> None:
    """Write cifar10_train_lmdb, cifar10_test_lmdb and mean.binaryproto of the batches in FOLDER.

    As convert_cifar_data and compute_image_mean do; binary or python batches, those that are there.
    """
    from .data.build import build_cifar10

    _print_built(build_cifar10(Path(folder), output), output, as_json)


@data.command(name="images")
@click.argument("src", metavar="LIST|FOLDER")
@new_option
@root_option("the list's")
@size_option("--resize", "Resize every image.")
@click.option("--gray", is_flag=True, help="Read images as gray.")
@click.option("--shuffle", is_flag=True, help="Write them in an order drawn by --seed.")
@click.option(
    "--encoded", is_flag=True, help="Store encoded images: files as they are where nothing changes them."
)
@click.option(
    "--encode-type", metavar="EXT", help="Store encoded as jpg, png, ...; default: as each file is."
)
@click.option("--check-size", is_flag=True, help="Refuse images whose data differ in size.")
@skip_bad_option
@seed_option
@json_option
def images_(
    src: str, output: str, root: str | None, resize: tuple[int, int] | None, gray: bool, shuffle: bool, encoded: bool,
    encode_type: str | None, check_size: bool, skip_bad: bool, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Write the LMDB that convert_imageset makes of a list file, or of a folder of class folders."""
    from .data import open_source
    from .data.build import ImageSet
    from .data.folders import ImageFiles

    source = open_source(src, root=root, color=not gray)
    if not isinstance(source, ImageFiles):
        source.close()
        raise UsageError("is no list of images and no folder of them", path=src)
    maker = ImageSet(resize, gray, shuffle, seed, encode_type, encoded, check_size, skip_bad)
    with console.progress("reading images", len(source), "images") as step:
        count = maker.build(source, output, step)
    _print_built({output: count}, output, as_json, maker.skipped)


@data.command(name="mean")
@click.argument("src")
@click.option("-o", "--output", required=True, metavar="MEAN.binaryproto")
@root_option()
@size_option("--resize", "Resize every image first.")
@json_option
def mean_(src: str, output: str, root: str | None, resize: tuple[int, int] | None, as_json: bool) -> None:
    """Write the mean image of SRC, an LMDB or other images of one size, as compute_image_mean does."""
    from . import files
    from .data import open_source
    from .data.build import image_mean, mean_bytes

    with open_source(src, root=root, resize=resize) as source:
        mean = image_mean(source)
    with files.writing([output], [src]) as (temporary,):
        temporary.write_bytes(mean_bytes(mean))
    if as_json:
        channels = mean.mean((1, 2)).tolist()
        console.echo_json({"output": output, "shape": list(mean.shape), "channels": channels})
        return
    for channel, value in enumerate(mean.mean((1, 2))):
        click.echo(f"mean of channel {channel}: {value:.4f}")
    click.echo(f"wrote {output}")


def _print_built(
    made: dict[str, int], output: str, as_json: bool, skipped: list[FileError] | None = None
) -> None:
    if as_json:
        told = [str(error) for error in skipped or ()]
        console.echo_json({"output": output, "records": made, "skipped": told})
        return
    for name, count in made.items():
        click.echo(f"{name}: {count:,} records")
    _print_skipped(skipped or [])
    click.echo(f"wrote {output}")


COMMANDS = (eval_, data)
