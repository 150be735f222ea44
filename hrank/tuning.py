"""Fine-tuning of a pruned net: all at once, or a layer after the other, masked or really smaller.

Every training is a stage with files of its own in one folder, which an interrupted run goes on from. The solver
names the train_val of the whole net; what is trained is that net with the plan applied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from caffe_proto import snapshots, weights
from caffe_proto.errors import UsageError
from caffe_proto.files import read_text
from caffe_proto.graph import build
from caffe_proto.layers.norm import BatchNormParams
from caffe_proto.layers.spec import text
from caffe_proto.model import Model, save
from caffe_proto.net import Net
from caffe_proto.rewrite import Narrow
from caffe_proto.rewrite import apply as rewrite
from caffe_proto.shape_inference import InputShapes, Shaped
from caffe_proto.solver import Solver, TestNet
from caffe_proto.weights import Blobs, NewEntry
from lra.stage import Stage
from lra.train_setup import Place

from . import rates
from .applier import apply
from .coupling import Coupling
from .masking import masks
from .plan import Plan

By = Literal["all", "layer", "block"]


@dataclass(frozen=True)
class Trained:
    """One training: the layers pruned before it, how far it came, the last test, and its snapshot."""

    layers: tuple[str, ...]
    iterations: int
    loss: float
    tests: tuple[Mapping[str, Sequence[float]], ...]
    weights: str
    state: str


@dataclass(frozen=True)
class Trainer:
    """How a training is run: ``run(solver, weights, state, hooks)`` as `caffe_proto.train.train`, and who is told.

    ``begin`` is called with the layers that a training follows, its number and how many there are.
    """

    run: Callable[[Solver, str | None, str | None, Sequence[object]], Any]
    begin: Callable[[Sequence[str], int, int], None] = lambda _layers, _number, _count: None


class Interrupted(Exception):
    """Training was asked to stop; what it has done is kept."""


def stages(plan: Plan, coupling: Coupling, by: By, *, masked: bool) -> list[tuple[str, ...]]:
    """The layers of a plan as they are pruned, in net order.

    layer: one position of HRank's rate strings at a time, which is a layer, or what GoogLeNet's inceptions prune
    together; block: all from one fork of the net to the next, as HRank's ResNet-50 has it. Layers that keep the same channels go
    together, unless they are masked.

    Reference: Lin et al., CVPR 2020, section 4.1.
    """
    names = [name for name in coupling.by_layer if name in plan.layers]
    if by == "all":
        return [tuple(names)] if names else []
    place = _blocks(coupling) if by == "block" else _positions(coupling)
    of_group: dict[int, object] = {}
    found: dict[object, list[str]] = {}
    for name in names:
        own = place.get(name, name)
        if not masked:
            own = of_group.setdefault(coupling.by_layer[name][0].index, own)
        found.setdefault(own, []).append(name)
    return [tuple(layers) for layers in found.values()]


def _positions(coupling: Coupling) -> dict[str, object]:
    positions = rates.layout(coupling, "hrank").positions
    return {layer: number for number, position in enumerate(positions) for layer in position.layers}


def _blocks(coupling: Coupling) -> dict[str, object]:
    graph = coupling.shaped.graph
    forks = {min(readers) for readers in graph.consumers.values() if len(set(readers)) > 1}
    found: dict[str, object] = {}
    block = 0
    for index, node in enumerate(graph.nodes):
        block += index in forks
        found[node.name] = block
    return found


def place_of(solver: Solver, coupling: Coupling, data: str | None, root: str | None) -> Place:
    """The net that is trained, as its data shape it.

    Raises UsageError where that is not the train_val of the net that is pruned: a layer that learns is missing, or
    has weights of other shapes.
    """
    place = Place.of(solver, data, root)
    theirs = {node.name: place.shaped.blobs(i) for i, node in enumerate(place.shaped.graph.nodes)}
    for index, node in enumerate(coupling.shaped.graph.nodes):
        mine = () if index in coupling.shaped.unknown else coupling.shaped.blobs(index)
        if not mine or theirs.get(node.name) == mine:
            continue
        found = theirs.get(node.name)
        what = f"has weights of {_shapes(found)}, {_shapes(mine)} in" if found else "is missing, it is in"
        raise UsageError(
            f'its net {solver.train.path or "in it"} is no train_val of the net that is pruned: layer "{node.name}"'
            f" {what} {coupling.model.net.path}",
            path=solver.path,
            hint="name a solver of the whole net: pruning is done here",
        )
    return place


def _shapes(found: Iterable[tuple[int, ...]]) -> str:
    return " and ".join(map(text, found))


def lagging(place: Place, iterations: int) -> float:
    """The share that BatchNorm's stored statistics still have of the net before training, 0 where there are none.

    ``moving_average_fraction ** iterations``, the most of all layers that learn statistics.
    """
    from caffe_proto.torch_net import request_of

    graph = place.shaped.graph
    fractions = [
        float(request_of(node, place.solver.train)["batch_norm_param"]["moving_average_fraction"])
        for node in graph.nodes
        if node.layer.type == "BatchNorm"
        and isinstance(node.params, BatchNormParams)
        and not node.params.global_stats
    ]
    return max(fractions, default=0.0) ** iterations


def key(
    plan: Plan, model: Model, solver: Solver, by: By, data: Sequence[str | None], seed: int | None
) -> str:
    """What the stages of a fine-tuning depend on."""
    about = [
        plan.to_json(), model.fingerprint, read_text(solver.path), solver.train.text,
        [test.net.text for test in solver.tests], solver.max_iter, by, list(data), seed,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about).encode("utf-8", "surrogateescape")).hexdigest()


def tune(
    plan: Plan,
    coupling: Coupling,
    pruned: Model,
    place: Place,
    trainer: Trainer,
    work: Stage,
    name: str,
    *,
    by: By = "all",
    masked: bool = False,
) -> tuple[Model, list[Trained]]:
    """Prune and train, stage by stage; the pruned net with the weights that the last one ends with.

    ``pruned``: the net after the plan, whose weights a training of all at once starts from, repaired or not; the
    others start from the whole net's. ``work``: the folder of the stages: N.prototxt and N.caffemodel, which
    training N starts from, and its snapshots N_iter_*; ``name``: what they depend on, see `key`.

    Masked filters, biases, means, scales and shifts, and the columns that read them, are zero after every update,
    and get no gradient, so that momentum does not gather; the original multiplies the weights alone.

    Each training is new, by the solver's own schedule, and goes on from the last iteration of the one before; the
    original goes on from the best by its test images.

    Raises Interrupted where training was asked to stop, and as the trainer does.

    Reference: Lin et al., CVPR 2020, section 4.1.
    """
    shapes = _inputs(place.shaped)
    current = _completed(Model(place.solver.train, coupling.model.weights), place)
    parts = stages(plan, coupling, by, masked=masked)
    trained: list[Trained] = []
    so_far: dict[str, Any] = {}
    for number, layers in enumerate(parts, 1):
        part = {layer: plan.layers[layer] for layer in layers}
        so_far |= part
        current, _ = apply(
            Plan(dict(so_far if masked else part)), current, mask_only=masked, input_shapes=shapes
        )
        if by == "all" and pruned.weights is not None:
            current = with_blobs(current, pruned.weights)
        hooks: list[object] = []
        if masked:
            from lra.train_hooks import MaskHook

            hooks.append(MaskHook(masks(Plan(dict(so_far)), Model(place.solver.train), shapes)))
        trainer.begin(layers, number, len(parts))
        solver = _solver(
            place.solver, current.net, Plan(dict(so_far)), work.folder / str(number), masked, shapes
        )
        done = _train(solver, current, trainer, work, number, name, layers, hooks)
        trained.append(done)
        current = replace(current, weights=weights.load(done.weights))
    return (with_blobs(pruned, current.weights or {}) if trained else pruned), trained


def _completed(model: Model, place: Place) -> Model:
    """The model with weights from fillers for layers that are trained and not stored, such as auxiliary losses."""
    from caffe_proto.torch_net import start

    stored = model.weights
    assert stored is not None
    graph = place.shaped.graph
    missing = [i for i, node in enumerate(graph.nodes) if place.shaped.blobs(i) and node.name not in stored]
    if not missing:
        return model
    made = start(model.net, place.shaped, stored, np.random.default_rng(place.solver.seed or 0))
    new = {graph.nodes[i].name: [NewEntry(graph.nodes[i].name, made[i])] for i in missing}
    return replace(model, weights=stored.replace(new))


def _train(
    solver: Solver, start: Model, trainer: Trainer, work: Stage, number: int, name: str,
    layers: tuple[str, ...], hooks: Sequence[object],
) -> Trained:  # fmt: skip
    """One stage: what was done before, or training from its start or its last snapshot."""
    known = work.get(f"stage {number}", name)
    if known is not None:
        return Trained(**{**known, "layers": tuple(known["layers"]), "tests": tuple(known["tests"])})
    state = _last_state(solver) if work.get(f"begun {number}", name) is not None else None
    first = f"{solver.snapshot_prefix}.caffemodel"
    if state is None:
        save(start, f"{solver.snapshot_prefix}.prototxt", first)
        work.put(f"begun {number}", name, True)
    result = trainer.run(solver, first if state is None else None, state, hooks)
    if result.iteration < solver.max_iter:
        raise Interrupted
    model, state_file = snapshots.names(solver.snapshot_prefix, result.iteration, hdf5=solver.hdf5)
    tests = tuple({key: list(values) for key, values in one.outputs.items()} for one in result.tests)
    done = Trained(layers, result.iteration, result.loss, tests, str(model), str(state_file))
    work.put(f"stage {number}", name, asdict(done))
    return done


def _last_state(solver: Solver) -> str | None:
    """The snapshot of a stage that came farthest."""
    prefix = Path(solver.snapshot_prefix)
    start, end = f"{prefix.name}_iter_", ".solverstate.npz"
    found = {
        int(path.name[len(start) : -len(end)]): path
        for path in prefix.parent.glob(f"{start}*{end}")
        if path.name[len(start) : -len(end)].isdecimal()
    }
    return str(found[max(found)]) if found else None


def _solver(
    solver: Solver, net: Net, so_far: Plan, prefix: Path, masked: bool, shapes: InputShapes
) -> Solver:
    """The solver of a stage: the net to train and those to test as the plan has them by now."""
    tests = (
        solver.tests
        if masked
        else tuple(_tested(one, solver.train, net, so_far, shapes) for one in solver.tests)
    )
    return replace(
        solver, train=net, tests=tests, snapshot_prefix=str(prefix), snapshot_after_train=True, weights=()
    )


def _tested(test: TestNet, whole: Net, small: Net, so_far: Plan, shapes: InputShapes) -> TestNet:
    if test.net.text == whole.text:
        return replace(test, net=replace(small, state=test.net.state))
    graph = build(test.net)
    own = {graph.blob(value) for value in graph.sources}
    known = {name: shape for name, shape in shapes.items() if name in own}
    return replace(test, net=apply(so_far, Model(test.net), input_shapes=known)[0].net)


def with_blobs(model: Model, stored: Mapping[str, Blobs]) -> Model:
    """A model with the blobs that ``stored`` has of its layers."""
    names = dict.fromkeys(layer.name for layer in model.net.all_layers)
    own: Mapping[str, Blobs] = model.weights or {}
    edits = [
        Narrow(
            name, (), tuple(new.reshape(old.shape) for new, old in zip(stored[name], own[name], strict=True))
        )
        for name in names
        if name in stored and name in own
    ]
    return rewrite(model, edits) if edits else model


def _inputs(shaped: Shaped) -> dict[str, tuple[int, ...]]:
    graph = shaped.graph
    return {graph.blob(value): shaped.shapes[value] for value in graph.sources}
