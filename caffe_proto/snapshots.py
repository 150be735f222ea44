"""Where training can go on: the weights as Caffe writes them, and beside them the solver's state.

The state is an .npz: ``about`` is JSON, the other arrays are what the update rule carries
(``history/<slot>/<blob>/<layer>``) and what layers carry (``carried/...``).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import caffe_state, files, schema
from .caffe_state import CaffeState
from .errors import FileError
from .net import Net
from .weights import Weights

_FORMAT = "caffe-lra solver state 1"

Key = tuple[str, int]


@dataclass(frozen=True, eq=False)
class State:
    """A solver between two iterations; ``iteration`` is the next one, ``tests`` the batches each test net has seen.

    ``outputs``: the num_output of layers that have another by now than the net's file says. ``steps``: Caffe's
    current_step; None where the state does not know it.
    """

    iteration: int
    kind: str
    seed: int
    weights: str
    tests: tuple[int, ...]
    losses: tuple[float, ...]
    outputs: Mapping[str, int]
    history: Mapping[Key, tuple[np.ndarray, ...]]
    carried: Mapping[str, np.ndarray]
    steps: int | None = None


def names(prefix: str, iteration: int, *, hdf5: bool) -> tuple[Path, Path]:
    """The weights and the state of a snapshot, named as Caffe names them."""
    stem = f"{prefix}_iter_{iteration}"
    return Path(f"{stem}.caffemodel{'.h5' if hdf5 else ''}"), Path(f"{stem}.solverstate.npz")


def net_name(prefix: str, iteration: int, outputs: Mapping[str, int]) -> Path | None:
    """The net that goes beside the weights, where layers changed their outputs."""
    return Path(f"{prefix}_iter_{iteration}.prototxt") if outputs else None


def save(
    prefix: str,
    weights: Weights,
    net: Net,
    state: State,
    *,
    hdf5: bool,
    inputs: Iterable[str | Path | None],
    caffe: CaffeState | None = None,
) -> tuple[Path, Path]:
    """Write the weights of a net, and the state, for Caffe too where asked: all or nothing; returns two paths.

    Where layers changed their outputs, the net as it is by now goes beside them, ``PREFIX_iter_N.prototxt``.

    Raises FileError where they cannot be written, UsageError where they are among the inputs.
    """
    paths = names(prefix, state.iteration, hdf5=hdf5)
    changed = net_name(prefix, state.iteration, state.outputs)
    targets = [*paths]
    if caffe is not None:
        targets.append(caffe_state.name_of(prefix, state.iteration, hdf5=hdf5))
    if changed is not None:
        targets.append(changed)
    with files.writing(targets, inputs) as (model_file, state_file, *more):
        if changed is not None:
            more.pop().write_bytes(files.text_bytes(net.text))
        if caffe is not None:
            caffe.write(more.pop(), hdf5=hdf5)
        if hdf5:
            weights.write_hdf5(model_file)
        else:
            with model_file.open("wb") as file:
                file.write(schema.message_class("NetParameter")(name=net.name).SerializeToString())
                weights.write_caffemodel(file)
        with state_file.open("wb") as file:
            np.savez(file, **_arrays(state))  # type: ignore[arg-type]
    return paths


def _arrays(state: State) -> dict[str, np.ndarray]:
    about = {
        "format": _FORMAT,
        "iteration": state.iteration,
        "kind": state.kind,
        "seed": state.seed,
        "weights": state.weights,
        "tests": state.tests,
        "outputs": dict(state.outputs),
        "steps": state.steps,
    }
    made = {"about": np.array(json.dumps(about)), "losses": np.array(state.losses, np.float64)}
    for (layer, blob), slots in state.history.items():
        made.update({f"history/{slot}/{blob}/{layer}": array for slot, array in enumerate(slots)})
    made.update({f"carried/{name}": array for name, array in state.carried.items()})
    return made


def load(path: str | Path) -> State:
    """Read a state; raises FileError in one line where it is none."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays.pop("about")))
        losses = arrays.pop("losses")
        if about["format"] != _FORMAT:
            raise ValueError(about["format"])
        history: dict[Key, tuple[np.ndarray, ...]] = {}
        carried = {}
        for name, array in sorted(arrays.items()):
            kind, _, rest = name.partition("/")
            if kind == "carried":
                carried[rest] = array
                continue
            _, blob, layer = rest.split("/", 2)
            history[layer, int(blob)] = (*history.get((layer, int(blob)), ()), array)
        return State(
            int(about["iteration"]), str(about["kind"]), int(about["seed"]), str(about["weights"]),
            tuple(about["tests"]), tuple(map(float, losses)), dict(about["outputs"]), history, carried,
            None if about.get("steps") is None else int(about["steps"]),
        )  # fmt: skip
    except OSError as error:
        raise files.unreadable(path, error) from error
    except (
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise FileError(
            "is no solver state that this program wrote", path=path, hint="give a .solverstate.npz"
        ) from error
