"""The images that a command reads, as a net wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from caffe_proto import console
from caffe_proto.cli_images import image_options, prepared
from caffe_proto.console import Decorator, together
from caffe_proto.errors import UsageError
from caffe_proto.peers import ALONE, Peers, threads

if TYPE_CHECKING:
    import numpy as np

    from caffe_proto.data.batches import Batch
    from caffe_proto.model import Model

    from .calibration import Calibration
    from .stage import Stage


def positions_option(text: str) -> Decorator:
    """--positions."""
    return click.option("--positions", type=click.IntRange(1), help=text)


# with images the second layer of every chain is fitted to responses
calibration_options = together(
    image_options(required=False, n_images=2000),
    positions_option(
        "With --images: places of each image at which responses are sampled; default: 10, "
        "and more where there are fewer than 2,000 images."
    ),
)


@dataclass(frozen=True, eq=False)
class Images:
    """The images as the net wants them, in a file of their own, and labels where there are any."""

    array: np.ndarray
    labels: np.ndarray | None
    calibration: Calibration


def read_images(model: Model, given: Mapping[str, Any], stage: Stage, peers: Peers = ALONE) -> Images:
    """The images that the options of ``calibration_options`` name, in a file of the stage.

    Of several processes each reads its share.
    """
    import numpy as np

    from caffe_proto.data import open_source
    from caffe_proto.data.batches import Batches
    from caffe_proto.evaluation import image_input, input_shape
    from caffe_proto.graph import build

    from .calibration import Calibration, dealt, keep, share_of

    shape = input_shape(model, given["input_shapes"])
    transform = prepared(model, shape, *(given[name] for name in ("mean", "scale", "crop", "resize", "bgr")))
    inputs = None if shape is None else shape[1:]
    seed, count = given["seed"], given["n_images"]
    labels: list[np.ndarray] = []

    def counted(batches: Iterator[Batch], step: Callable[[int], None]) -> Iterator[np.ndarray]:
        for batch in batches:
            if batch.labels is not None:
                labels.append(batch.labels)
            yield batch.images
            step(len(batch.images))

    with open_source(
        given["images"], root=given["root"], resize=transform.resize, color=transform.color
    ) as source:
        batches = Batches(
            source, transform, n_images=count, seed=seed, shape=inputs, skip_bad=given["skip_bad"]
        )
        places: list[int] = []
        with console.progress("reading images", batches.n_images, "images") as step:
            images = keep(counted(dealt(batches, peers, places), step), stage)
    left_out = peers.sum(batches.skipped)
    for bad in left_out if peers.rank == 0 else ():
        click.echo(f"left out: {bad}", err=True)
    share = share_of(peers, places) if peers.world > 1 else None
    if images is None:
        raise UsageError("none of its images can be read", path=given["images"])
    graph = build(model.net)
    blob = graph.blob(image_input(graph))
    calibration = Calibration(
        {blob: images}, given["positions"] or 0, seed, threads(given["threads"]), stage, share=share
    )
    return Images(images, np.concatenate(labels) if labels else None, calibration)
