"""What is told at the end of a training that made weights zero: a table, a file, and the smaller net."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from caffe_proto import console, files, snapshots, weights
from caffe_proto.costs import cost
from caffe_proto.errors import UsageError
from caffe_proto.graph import build
from caffe_proto.model import Model, save
from caffe_proto.outputs import with_outputs
from caffe_proto.shape_inference import InputShapes, Shaped, infer
from caffe_proto.solver import Solver

from .sparsify import Sparsity, measure
from .train_layers import Key, layouts
from .train_setup import Last, Place, pairs_of

_COLUMNS = ("zeros", "rows", "columns", "channels", "macs", "needed")


def report(place: Place, params: Mapping[Key, Any]) -> dict[str, Sparsity]:
    """The zeros of every convolution and fully connected layer, MACs those of one image.

    ``params``: the learnt blobs, tensors. A weight that layers share counts with the MACs of all of them.
    """
    shaped = now(place, params)
    batch = next((shaped.shapes[value][0] for value in shaped.graph.sources if shaped.shapes[value]), 1)
    macs = _macs(shaped)
    return {
        key[0]: measure(_array(params[key]), layout, macs[key] // batch)
        for key, layout in layouts(shaped).items()
    }


def now(place: Place, params: Mapping[Key, Any]) -> Shaped:
    """The net with the ranks that its layers have by now."""
    outputs = clipped(place, params)
    return infer(build(with_outputs(place.solver.train, outputs)), inputs(place)) if outputs else place.shaped


def clipped(place: Place, params: Mapping[Key, Any]) -> dict[str, int]:
    """The num_output of layers that have another by now than the file says."""
    shapes = {key: place.shaped.blobs(i) for i, key in _owners(place.shaped).items()}
    found = {}
    for pair in pairs_of(place):
        key = (pair.first.layer, 0)
        if tuple(params[key].shape) != shapes[key][0]:
            found[pair.first.layer] = len(pair.first.kernel(_array(params[key])))
    return found


def inputs(place: Place) -> InputShapes:
    """The shapes that the data have."""
    graph = place.shaped.graph
    return {graph.blob(value): place.shaped.shapes[value] for value in graph.sources}


def _owners(shaped: Shaped) -> dict[int, Key]:
    """Node to the key that its weight is kept under."""
    first: dict[str, Key] = {}
    found = {}
    for index, node in enumerate(shaped.graph.nodes):
        if shaped.blobs(index):
            specs = node.layer.param_specs
            name = specs[0].name if specs else ""
            found[index] = first.setdefault(name, (node.name, 0)) if name else (node.name, 0)
    return found


def _macs(shaped: Shaped) -> dict[Key, int]:
    """MACs of the batch by weight, of all layers that have it."""
    rows = cost(shaped).by_layer
    total: dict[Key, int] = {}
    for index, key in _owners(shaped).items():
        total[key] = total.get(key, 0) + rows[shaped.graph.nodes[index].name].macs
    return total


def show(rows: Mapping[str, Sparsity]) -> None:
    """Print a row a layer and the sum."""
    console.table(
        ["layer", "zeros", "rows", "columns", "channels", "MACs", "needed"],
        [
            [name, *(f"{share:.1%}" for share in _shares(one)), *(f"{count:,}" for count in one.macs or ())]
            for name, one in rows.items()
        ],
        left=1,
        total=["total", "", "", "", "", *(f"{sum(both):,}" for both in zip(*_pairs(rows), strict=True))],
    )


def write(rows: Mapping[str, Sparsity], path: Path) -> None:
    """The same as CSV, shares as numbers from 0 to 1."""
    with files.writing([path]) as (temporary,), temporary.open("w", newline="", encoding="utf-8") as file:
        written = csv.writer(file)
        written.writerow(["layer", *_COLUMNS])
        written.writerows([name, *_values(one)] for name, one in rows.items())


def _values(one: Sparsity) -> tuple[float, ...]:
    return *_shares(one), *(one.macs or ())


def _shares(one: Sparsity) -> tuple[float, float, float, float]:
    return one.element, one.row, one.column, one.channel


def _pairs(rows: Mapping[str, Sparsity]) -> list[tuple[int, int]]:
    return [one.macs for one in rows.values() if one.macs is not None]


@dataclass
class Ending(Last):
    """The hook that reports when training ends; ``remove``: and writes the smaller net; ``quiet``: only files."""

    place: Place
    remove: bool = False
    quiet: bool = False
    _document: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.remove and not self.place.solver.snapshot_after_train:
            raise UsageError(
                "--remove reads the last snapshot, and snapshot_after_train is false",
                path=self.place.solver.path,
            )

    def finish(self) -> None:
        """Measure, tell and write; nothing where no iteration was left to do."""
        if self._done is None:
            return
        solver = self.place.solver
        rows = report(self.place, self._params)
        path = Path(f"{solver.snapshot_prefix}_iter_{self._done}.sparsity.csv")
        write(rows, path)
        layers = {name: dict(zip(_COLUMNS, _values(one), strict=False)) for name, one in rows.items()}
        self._document["sparsity"] = {"layers": layers, "file": str(path)}
        if not self.quiet:
            show(rows)
            click.echo(f"sparsity: {path}")
        if self.remove:
            self._remove(solver, self._done)

    def document(self) -> dict[str, Any]:
        """The zeros by layer, what was removed, and the files, as values of JSON."""
        return self._document

    def _remove(self, solver: Solver, iteration: int) -> None:
        from .removal import without_zeros

        stored, _ = snapshots.names(solver.snapshot_prefix, iteration, hdf5=solver.hdf5)
        model = Model(_whole(solver, clipped(self.place, self._params)), weights.load(stored))
        small = without_zeros(model, inputs(self.place))
        stem = f"{solver.snapshot_prefix}_iter_{iteration}_removed"
        targets = (f"{stem}.prototxt", f"{stem}.caffemodel{'.h5' if solver.hdf5 else ''}")
        save(small.model, *targets)
        self._document["removed"] = {
            "channels": {name: list(both) for name, both in small.channels.items()},
            "macs": list(small.macs),
            "params": list(small.params),
            "files": dict(zip(("prototxt", "weights"), targets, strict=True)),
        }
        if self.quiet:
            return
        for name, (before, after) in small.channels.items():
            click.echo(f"removed {before - after} of {before} channels of {name}")
        if not small.channels:
            click.echo("no channel is without use: nothing to remove")
        ratio = small.macs[0] / small.macs[1]
        click.echo(f"MACs {ratio:.3f}x, parameters {small.params[0]:,} -> {small.params[1]:,}")
        click.echo("wrote " + ", ".join(targets))


def _whole(solver: Solver, outputs: Mapping[str, int]) -> Any:
    """The file of the net that is trained, as it is tested where it is."""
    net = with_outputs(solver.train, outputs)
    tested = next((test.net.state for test in solver.tests if test.net.text == solver.train.text), None)
    return net if tested is None else replace(net, state=tested)


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().cpu())
