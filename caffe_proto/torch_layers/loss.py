"""Losses and Accuracy, as Caffe's blob holds them: the mean loss, not yet times loss_weight.

Scores are seen as (outer, classes, inner) around the class axis, labels as (outer, inner). Labels take no
gradient. Where processes share a batch, a loss is normalized by what all of them count, so that the mean over
the processes is the loss of the whole batch.
"""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FileError, UnsupportedError
from ..layers.loss import (
    _LOG_THRESHOLD,
    _SMALLEST,
    AccuracyParams,
    ContrastiveParams,
    HingeParams,
    LossParams,
)
from ..layers.spec import Request, around, canonical_axis
from ..preprocess import read_mean
from .base import Call, Forward, Make, Peers, Tensors, of_call, through, whole


def _class_view(call: Call, axis: int) -> tuple[Tensor, Tensor]:
    """(scores, labels): (outer, classes, inner) and whole numbers (outer, inner)."""
    x = call.inputs[0]
    outer, classes, inner = around(tuple(x.shape), canonical_axis(axis, x.dim()))
    return x.reshape(outer, classes, inner), whole(call.inputs[1]).reshape(outer, inner)


def _picked(values: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The value of the labelled class, (outer, inner); that of class 0 where a label does not count."""
    chosen = torch.where(valid, labels, 0)
    _within(chosen, values.shape[1])
    return values.gather(1, chosen[:, None])[:, 0]


def _within(labels: Tensor, classes: int) -> None:
    """Raise UnsupportedError on a label that is no class; Caffe reads past its arrays there."""
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        worst = int(labels.max()) if int(labels.max()) >= classes else int(labels.min())
        raise UnsupportedError(f"label {worst} is none of the {classes} classes")


def _valid(labels: Tensor, ignore: int | None) -> Tensor:
    return torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore


def _normalized(terms: Tensor, mode: str, peers: Peers, valid: Tensor | None = None) -> Tensor:
    """sum of the terms that count / max(1, how many of them, of all, of items, or 1)"""
    total = (terms if valid is None else torch.where(valid, terms, 0)).sum()
    if mode == "NONE":
        return total * peers.world
    if mode == "BATCH_SIZE":
        return total / max(1, terms.shape[0])
    if mode == "VALID" and valid is not None:
        return total / torch.clamp(peers.sum(valid.sum().to(terms.dtype)), min=1) * peers.world
    return total / max(1, terms.numel())


def _softmax_loss(call: Call, p: LossParams) -> Tensors:
    """-log(max(softmax(x)[label], FLT_MIN))"""
    scores, labels = _class_view(call, p.axis)
    valid = _valid(labels, p.ignore)
    chosen = _picked(torch.log_softmax(scores, 1), labels, valid)
    floored = through(chosen.clamp(min=log(_SMALLEST)), chosen)
    return (_normalized(-floored, p.mode, call.peers, valid),)


def _infogain(p: LossParams, request: Request) -> Forward:
    """-sum over classes of H[label, class] * log(max(softmax(x), 1e-20)); H is the third bottom or a file."""
    stored = _matrix(request) if p.source else None

    def forward(call: Call) -> Tensors:
        scores, labels = _class_view(call, p.axis)
        classes, valid = scores.shape[1], _valid(labels, p.ignore)
        matrix = call.inputs[2].detach() if stored is None else stored.to(scores.device)
        if matrix.numel() != classes**2:
            raise UnsupportedError(f"the matrix holds {matrix.numel()} numbers for {classes} classes")
        chosen = torch.where(valid, labels, 0)
        _within(chosen, classes)
        rows = matrix.reshape(classes, classes)[chosen].movedim(-1, 1)
        logs = torch.log_softmax(scores, 1)
        terms = -(rows * through(logs.clamp(min=log(_LOG_THRESHOLD)), logs)).sum(1)
        loss = _normalized(terms, p.mode, call.peers, valid)
        return (loss, torch.softmax(scores, 1).reshape(call.inputs[0].shape))[: max(1, p.n_tops)]

    return forward


def _matrix(request: Request) -> Tensor:
    """The matrix file of infogain_loss_param, a BlobProto found as Caffe does or beside the net."""
    p = request["infogain_loss_param"]
    name, net = p["source"], request.layer.document.path
    beside = Path(net or ".").parent / name
    found = next((path for path in (Path(name), beside) if path.is_file()), None)
    if found is None:
        raise FileError(f'there is no matrix file "{name}"', path=net, line=p.line("source"))
    return torch.from_numpy(read_mean(str(found)).copy()).reshape(-1)


def _multinomial(call: Call, p: LossParams) -> Tensors:
    """-log(max(x[label], 1e-20)) over the items"""
    rows = call.inputs[0].flatten(1)
    labels = whole(call.inputs[1]).reshape(len(rows), 1)
    chosen = _picked(rows[:, :, None], labels, _valid(labels, None))
    floored = through(chosen.clamp(min=_LOG_THRESHOLD), chosen)
    return (_normalized(-torch.log(floored), p.mode, call.peers),)


def _euclidean(call: Call, p: LossParams) -> Tensors:
    """sum (a - b)² / 2 over the items"""
    a, b = call.inputs
    return (_normalized((a - b.reshape(a.shape)) ** 2 / 2, p.mode, call.peers),)


def _cross_entropy(call: Call, p: LossParams) -> Tensors:
    """max(x, 0) - x*target + log(1 + exp(-|x|))"""
    x = call.inputs[0]
    target = call.inputs[1].detach().reshape(x.shape)
    terms = functional.binary_cross_entropy_with_logits(x, target, reduction="none")
    return (_normalized(terms, p.mode, call.peers, None if p.ignore is None else whole(target) != p.ignore),)


def _hinge(call: Call, p: HingeParams) -> Tensors:
    """sum over classes of max(0, 1 + x), x turned round for the labelled class; L2: squared"""
    rows = call.inputs[0].flatten(1)
    labels = whole(call.inputs[1]).reshape(-1)[: len(rows)]
    _within(labels, rows.shape[1])
    turned = torch.where(functional.one_hot(labels, rows.shape[1]) == 1, -rows, rows)
    margin = functional.relu(1 + turned)
    return (_normalized(margin**2 if p.squared else margin, "BATCH_SIZE", call.peers),)


class _Distance(torch.autograd.Function):
    """The root of a squared distance, whose gradient Caffe computes with 1e-4 added to the distance."""

    @staticmethod
    def forward(ctx: Any, square: Tensor) -> Tensor:
        distance = torch.sqrt(square)
        ctx.save_for_backward(distance)
        return distance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (distance,) = ctx.saved_tensors
        made: Tensor = gradient / (2 * (distance + 1e-4))
        return made


def _contrastive(call: Call, p: ContrastiveParams) -> Tensors:
    """d²/2 of similar pairs; of others max(margin - d, 0)²/2, in the legacy version max(margin - d², 0)/2"""
    a, b = call.inputs[0].flatten(1), call.inputs[1].flatten(1)
    similar = whole(call.inputs[2]).reshape(-1)[: len(a)] != 0
    far = ((a - b) ** 2).sum(1)
    if p.legacy:
        apart = functional.relu(p.margin - far)
    else:
        apart = functional.relu(p.margin - _Distance.apply(far)) ** 2
    return (_normalized(torch.where(similar, far, apart) / 2, "BATCH_SIZE", call.peers),)


@torch.no_grad()
def _accuracy(call: Call, p: AccuracyParams) -> Tensors:
    """The share of labels whose score is among the top_k; one that equals it counts as better."""
    scores, labels = _class_view(call, p.axis)
    valid = _valid(labels, p.ignore)
    own = _picked(scores, labels, valid)
    right = (((scores >= own[:, None]).sum(1) <= p.top_k) & valid).to(scores.dtype)
    share = right.sum() / max(1, int(valid.sum()))
    if p.n_tops < 2:
        return (share,)
    hits = functional.one_hot(labels[valid], scores.shape[1]).to(scores.dtype)
    found = (hits * right[valid][:, None]).sum(0)
    return share, found / hits.sum(0).clamp(min=1)


TORCH: dict[str, Make] = {
    "SoftmaxWithLoss": of_call(_softmax_loss),
    "InfogainLoss": _infogain,
    "MultinomialLogisticLoss": of_call(_multinomial),
    "EuclideanLoss": of_call(_euclidean),
    "SigmoidCrossEntropyLoss": of_call(_cross_entropy),
    "HingeLoss": of_call(_hinge),
    "ContrastiveLoss": of_call(_contrastive),
    "Accuracy": of_call(_accuracy),
}
