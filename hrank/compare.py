"""Nets beside a reference on images that are in memory: accuracy, agreement, output error."""

from __future__ import annotations

import numpy as np

from caffe_proto.data.batches import Batch
from caffe_proto.evaluation import Evaluation, Subject
from caffe_proto.graph import build
from caffe_proto.model import Model

_BATCH = 50


class Judge:
    """Judges nets by the scores of a reference, (N, K), and by labels (N,) where there are any."""

    def __init__(
        self, reference: Model, images: np.ndarray, labels: np.ndarray | None = None, threads: int = 0
    ) -> None:
        self.images, self.labels, self.threads = images, labels, threads
        subject = Subject(reference, None, threads)
        self.output = subject.output
        self.reference = self._scores(subject)

    def __call__(self, model: Model) -> Evaluation:
        """How a net compares."""
        named = self.output if self.output in build(model.net).final else None
        made = Evaluation()
        scores = self._scores(Subject(model, named, self.threads))
        made.count(Batch((), self.images, self.labels), scores, self.reference)
        return made

    def _scores(self, subject: Subject) -> np.ndarray:
        parts = [
            subject.scores(np.ascontiguousarray(self.images[start : start + _BATCH], np.float32), _BATCH)
            for start in range(0, len(self.images), _BATCH)
        ]
        return np.concatenate(parts)
