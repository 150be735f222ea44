"""Accuracy of a net on labelled images, and how far it agrees with another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .data.batches import Batch, Batches
from .errors import ShapeError, UsageError
from .graph import Graph, Value, build
from .layers.spec import Shape, text
from .model import Model
from .shape_inference import infer

if TYPE_CHECKING:
    from .runtime import Session

TOP = 5


def _judges(graph: Graph, index: int) -> bool:
    """Whether a node only measures or swallows what it reads."""
    kind = graph.nodes[index].layer.type
    return kind in ("Accuracy", "Silence") or kind.endswith("Loss")


def scores_blob(graph: Graph) -> str:
    """The blob of class scores: what Accuracy reads, or a loss (the last one), or the net's only output.

    Raises UsageError where the net leaves it open.
    """
    nodes = [node.layer for node in graph.nodes if node.layer.bottoms]
    accuracy = [layer.bottoms[0] for layer in nodes if layer.type == "Accuracy"]
    losses = [layer.bottoms[0] for layer in nodes if layer.type.endswith("Loss")]
    sources = set(graph.sources)
    outputs = [name for name in graph.outputs if graph.final[name] not in sources]
    found = accuracy[-1:] or losses[-1:] or outputs
    if len(found) != 1:
        named = ", ".join(outputs) or "none"
        raise UsageError(
            f"the net has {len(found)} outputs: {named}", path=graph.path, hint="say which: --blob BLOB"
        )
    return found[0]


def image_input(graph: Graph) -> Value:
    """The one input that layers compute with; raises UsageError where there are several, or none."""
    found = [
        value
        for value in graph.sources
        if any(not _judges(graph, reader) for reader in graph.consumers[value])
    ]
    if len(found) != 1:
        names = ", ".join(map(graph.blob, found)) or "none"
        raise UsageError(
            f"images feed a net of one input, this one has {len(found)}: {names}", path=graph.path
        )
    return found[0]


def input_shape(model: Model, input_shapes: dict[str, Shape] | None = None) -> Shape | None:
    """The shape of the image input, or None where only the data says it."""
    graph = build(model.net)
    return infer(graph, input_shapes, partial=True).shapes.get(image_input(graph))


class Subject:
    """A net under test: images in, class scores (N, K) out."""

    def __init__(self, model: Model, output: str | None = None, threads: int = 0) -> None:
        from .runtime import session

        graph = build(model.net)
        self.model = model
        self.input = graph.blob(image_input(graph))
        self.output = output or scores_blob(graph)
        self.session: Session = session(model, [self.output], threads=threads)

    def scores(self, images: np.ndarray, size: int) -> np.ndarray:
        """Scores of a batch, run as one of ``size`` images so that the net is compiled once."""
        padding = [(0, max(size - len(images), 0))] + [(0, 0)] * (images.ndim - 1)
        made = self.session.run({self.input: np.pad(images, padding)})[self.output]
        if made.ndim < 2 or len(made) < len(images) or made[0].size != made.shape[1]:
            raise ShapeError(
                f'blob "{self.output}" has shape {text(made.shape)}, scores are (N, K)',
                path=self.model.net.path,
                hint="name the blob of scores: --blob BLOB",
            )
        return made[: len(images)].reshape(len(images), -1).astype(np.float64)


@dataclass
class Share:
    """How many of how many, as a share with its standard error."""

    hits: int = 0
    n: int = 0

    def count(self, hits: np.ndarray) -> None:
        """Add one array of hits."""
        self.hits += int(hits.sum())
        self.n += len(hits)

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.n if self.n else float("nan")

    @property
    def error(self) -> float:
        """Its standard error, sqrt(p (1 - p) / n)."""
        return float(np.sqrt(self.value * (1 - self.value) / self.n)) if self.n else float("nan")


@dataclass
class Accuracy:
    """Top-1 and top-5 of one net."""

    top1: Share = field(default_factory=Share)
    top5: Share = field(default_factory=Share)

    def count(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch. As in Caffe, a class with the same score as the label's counts as better; NaN is wrong."""
        known = np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        own = np.take_along_axis(known, labels[:, None], axis=1)
        better = (known >= own).sum(1) - 1
        self.top1.count(better < 1)
        self.top5.count(better < TOP)


@dataclass
class Evaluation:
    """What was measured; accuracies of images with labels, the rest of those with a reference."""

    classes: int = 0
    images: int = 0
    accuracy: Accuracy = field(default_factory=Accuracy)
    reference: Accuracy = field(default_factory=Accuracy)
    agreement: Share = field(default_factory=Share)
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def output_error(self) -> float:
        """||scores - reference|| / ||reference|| over all images."""
        if not self.squared_norm:
            return 0.0 if not self.squared_error else float("inf")
        return float(np.sqrt(self.squared_error / self.squared_norm))

    def count(self, batch: Batch, scores: np.ndarray, reference: np.ndarray | None) -> None:
        """Add a batch."""
        self.images += len(scores)
        self.classes = scores.shape[1]
        if batch.labels is not None:
            self.accuracy.count(scores, batch.labels)
        if reference is None:
            return
        if batch.labels is not None:
            self.reference.count(reference, batch.labels)
        self.agreement.count(scores.argmax(1) == reference.argmax(1))
        self.squared_error += float(((scores - reference) ** 2).sum())
        self.squared_norm += float((reference**2).sum())


def evaluate(
    subject: Subject,
    batches: Batches,
    reference: Subject | None = None,
    step: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run every image through the net, and through the reference; ``step`` is called after each batch.

    Raises UsageError on a label beyond the classes, ShapeError where the two nets' scores differ in shape.
    """
    made = Evaluation()
    for batch in batches:
        scores = subject.scores(batch.images, batches.size)
        if batch.labels is not None and batch.labels.max() >= scores.shape[1]:
            worst = int(batch.labels.argmax())
            raise UsageError(
                f'image "{batch.names[worst]}" has label {batch.labels[worst]}, '
                f'"{subject.output}" has {scores.shape[1]} classes',
                path=batches.source.path,
            )
        other = None if reference is None else reference.scores(batch.images, batches.size)
        if other is not None and other.shape != scores.shape:
            raise ShapeError(f"the nets have {scores.shape[1]} and {other.shape[1]} classes")
        made.count(batch, scores, other)
        step()
    return made
