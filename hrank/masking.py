"""Masks of a plan, for training that keeps pruned numbers at zero."""

from __future__ import annotations

import numpy as np

from caffe_proto.model import Model
from caffe_proto.shape_inference import InputShapes

from .coupling import find, removed_places
from .plan import Plan

Masks = dict[tuple[str, int], np.ndarray]


def masks(plan: Plan, model: Model, input_shapes: InputShapes | None = None) -> Masks:
    """True where a number stays, of the shape of each learnt blob (layer, number) that a mask of the plan changes.

    Filters, biases, mean, scale and shift of what goes are False, and the columns that read it, as `apply` with
    ``mask_only`` zeroes them; ``lra.train_hooks.MaskHook`` takes them. Raises PlanError where the plan names layers
    that the net lacks.

    Reference: Lin et al., CVPR 2020, section 3.4.
    """
    coupling = find(model, {**plan.inputs, **(input_shapes or {})})
    for name in plan.keep:
        coupling.member(name)
    gone = coupling.removed(plan.keep, masks=True)
    made: Masks = {}
    for index, note in coupling.notes.items():
        shapes = coupling.shaped.blobs(index)
        for cut in note.cuts:
            if not cut.zero or not removed_places(gone, cut.ids).any():
                continue
            mask = made.setdefault((note.layer, cut.blob), np.ones(shapes[cut.blob], bool))
            blocks = np.atleast_2d(cut.ids)
            for part, ids in zip(np.split(mask, len(blocks)), blocks, strict=True):
                np.moveaxis(part, cut.axis, 0)[removed_places(gone, ids)] = False
    return made
