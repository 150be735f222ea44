"""A solver file, and the arithmetic of one update: learning rates, regularization, the six update rules.

The rules are those of Caffe's solvers and work alike on NumPy arrays and torch tensors. One update goes: clip
all gradients together, divide by iter_size, add the weight decay, (hooks), then the rule; the rule's result is
what is taken off the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import files, text
from .errors import Error, FileError, NetError, UnsupportedError
from .net import Net, NetState, nearest
from .net import load as load_net
from .text import Document, Message
from .typed import Typed, check
from .upgrade import SOLVER_TYPES, is_solver

POLICIES = ("fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid")
_WITHOUT_MOMENTUM = ("AdaGrad", "RMSProp")


@dataclass(frozen=True)
class Rates:
    """The learning rate's policy and its settings, as the solver file names them.

    ``resumed_at``, ``resumed_steps``: where training went on, and Caffe's current_step there.
    """

    policy: str
    base_lr: float = 0.0
    gamma: float = 0.0
    power: float = 0.0
    stepsize: int = 0
    stepvalues: tuple[int, ...] = ()
    max_iter: int = 0
    resumed_at: int = 0
    resumed_steps: int = 0

    def at(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0.

        fixed: base_lr; step: base_lr * gamma^(iteration // stepsize); exp: base_lr * gamma^iteration; inv:
        base_lr * (1 + gamma * iteration)^-power; multistep: base_lr * gamma^(steps passed); poly: base_lr *
        (1 - iteration / max_iter)^power; sigmoid: base_lr / (1 + exp(-gamma * (iteration - stepsize))).
        """
        return self.base_lr * self._factor(iteration)

    def _factor(self, iteration: int) -> float:
        if self.policy == "fixed":
            return 1.0
        if self.policy in ("step", "multistep"):
            return float(self.gamma ** self.steps_passed(iteration))
        if self.policy == "exp":
            return float(self.gamma**iteration)
        if self.policy == "inv":
            return float((1 + self.gamma * iteration) ** -self.power)
        if self.policy == "poly":
            return float(max(0.0, 1 - iteration / self.max_iter) ** self.power)
        return float(1 / (1 + math.exp(-self.gamma * (iteration - self.stepsize))))

    def steps_passed(self, iteration: int) -> int:
        """Caffe's current_step: with lr_policy step how many stepsizes lie behind, with multistep how many stepvalues.

        Stepvalues are taken in their order, at most one an iteration. Other policies leave the number as it was.
        """
        if self.policy == "step":
            return iteration // self.stepsize
        passed, last = self.resumed_steps, self.resumed_at - 1
        if self.policy == "multistep":
            for value in self.stepvalues[passed:]:
                last = max(value, last + 1)
                passed += last <= iteration
        return passed


@dataclass(frozen=True)
class Update:
    """The rule that makes a step of a gradient, and the settings of it; ``kind`` as in the solver's ``type``."""

    kind: str = "SGD"
    momentum: float = 0.0
    momentum2: float = 0.999
    delta: float = 1e-8
    rms_decay: float = 0.99
    weight_decay: float = 0.0
    regularization: str = "L2"
    clip_gradients: float = -1.0
    iter_size: int = 1

    @property
    def slots(self) -> int:
        """How many arrays of a parameter's shape the rule carries from one update to the next."""
        return 2 if self.kind in ("Adam", "AdaDelta") else 1


@dataclass(frozen=True)
class TestNet:
    """A net to test with, and over how many batches."""

    net: Net
    batches: int


@dataclass(frozen=True)
class Solver:
    """A solver file that was read and checked; ``typed`` is the whole message, for settings of forks."""

    path: str
    train: Net
    tests: tuple[TestNet, ...]
    rates: Rates
    update: Update
    max_iter: int
    test_interval: int
    test_initialization: bool
    test_compute_loss: bool
    display: int
    average_loss: int
    snapshot: int
    snapshot_prefix: str
    snapshot_after_train: bool
    hdf5: bool
    seed: int | None
    gpu: bool
    weights: tuple[str, ...]
    typed: Typed

    def until(self, max_iter: int) -> Solver:
        """The same solver as though its file gave that max_iter."""
        return replace(self, max_iter=max_iter, rates=replace(self.rates, max_iter=max_iter))


def load(path: str | Path, understood: frozenset[str] = frozenset()) -> Solver:
    """Read a solver file and the nets that it names, from the present folder as Caffe does, or from the file's own.

    Where a net is in neither, it is looked for from the folders above the file: Caffe's own solvers name their nets
    from the root of its tree.

    ``understood``: fields of forks that someone else interprets. Raises FileError where a file is missing,
    NetError on what Caffe refuses, UnsupportedError on what is not interpreted.
    """
    document = text.parse(files.read_text(path), path)
    if not is_solver(document):
        raise NetError("this file is a net, no solver", path=path, hint="give the solver that names it")
    try:
        return _read(document, Path(path), understood)
    except Error as error:
        raise error.at(path=path) from error.__cause__


def _read(document: Document, path: Path, understood: frozenset[str]) -> Solver:
    p = Typed(document.root, "SolverParameter", document)
    check(_without_nets(p), understood)
    if p["snapshot_diff"]:
        raise UnsupportedError("snapshot_diff is not done", line=p.line("snapshot_diff"))
    for name, low in (("iter_size", 1), ("average_loss", 1), ("test_interval", 0), ("snapshot", 0),
                      ("display", 0), ("max_iter", 0)):  # fmt: skip
        if p[name] < low:
            raise NetError(f"{name} is {p[name]}, it must be at least {low}", line=p.line(name))
    train, tests = _train_net(p, path), _test_nets(p, path)
    if tests and not p["test_interval"]:
        raise NetError("there are test nets, and test_interval is not given", line=p.line("test_iter"))
    return Solver(
        path=str(path),
        train=train,
        tests=tests,
        rates=_rates(p),
        update=_update(p),
        max_iter=p["max_iter"],
        test_interval=p["test_interval"],
        test_initialization=p["test_initialization"],
        test_compute_loss=p["test_compute_loss"],
        display=p["display"],
        average_loss=p["average_loss"],
        snapshot=p["snapshot"],
        snapshot_prefix=_prefix(p["snapshot_prefix"], path),
        snapshot_after_train=p["snapshot_after_train"],
        hdf5=p["snapshot_format"] == "HDF5",
        seed=p["random_seed"] if p["random_seed"] >= 0 else None,
        gpu=p["solver_mode"] == "GPU",
        weights=tuple(name for value in p["weights"] for name in value.split(",")),
        typed=p,
    )


def _without_nets(p: Typed) -> Typed:
    """The settings alone: nets given inside are checked as nets are, layer by layer."""
    assert p.message is not None
    nets = ("net_param", "train_net_param", "test_net_param")
    own = tuple(field for field in p.message.fields if field.name not in nets)
    return Typed(Message(own, p.message.start, p.message.end), p.type_name, p.document)


def _prefix(prefix: str, path: Path) -> str:
    """Where snapshots go: without a prefix the solver's own name, in a folder that name too."""
    if not prefix:
        return str(path.with_suffix(""))
    return str(Path(prefix) / path.stem) if Path(prefix).is_dir() else prefix


def _rates(p: Typed) -> Rates:
    policy = p["lr_policy"]
    if policy not in POLICIES:
        found = f'there is no lr_policy "{policy}"' if policy else "lr_policy is not given"
        raise NetError(found, line=p.line("lr_policy"), hint=nearest(policy, POLICIES))
    if policy == "step" and p["stepsize"] < 1:
        raise NetError(
            f"stepsize is {p['stepsize']}, lr_policy step needs 1 or more", line=p.line("stepsize")
        )
    return Rates(policy, p["base_lr"], p["gamma"], p["power"], p["stepsize"], p["stepvalue"], p["max_iter"])


def _update(p: Typed) -> Update:
    kind = SOLVER_TYPES[p["solver_type"]] if "solver_type" in p else p["type"]
    line = p.line("solver_type" if "solver_type" in p else "type")
    if "solver_type" in p and "type" in p:
        raise NetError("solver_type and type are both given; Caffe takes one", line=line)
    if kind not in SOLVER_TYPES.values():
        raise NetError(
            f'there is no solver type "{kind}"', line=line, hint=nearest(kind, [*SOLVER_TYPES.values()])
        )
    if kind in _WITHOUT_MOMENTUM and p["momentum"]:
        raise NetError(f"{kind} takes no momentum", line=p.line("momentum"))
    if not 0 <= p["rms_decay"] < 1:
        raise NetError(f"rms_decay is {p['rms_decay']}, it must lie in [0, 1)", line=p.line("rms_decay"))
    regularization = p["regularization_type"]
    if regularization not in ("L1", "L2"):
        line = p.line("regularization_type")
        raise NetError(f'there is no regularization_type "{regularization}"', line=line, hint="use L1 or L2")
    return Update(
        kind,
        p["momentum"],
        _decimal(p["momentum2"]),
        _decimal(p["delta"]),
        _decimal(p["rms_decay"]),
        p["weight_decay"],
        regularization,
        p["clip_gradients"],
        p["iter_size"],
    )


def _decimal(value: float) -> float:
    """A default of the schema, kept there in single precision, as the decimal number that is meant."""
    return float(str(np.float32(value)))


def _train_net(p: Typed, path: Path) -> Net:
    """The net to train, in phase TRAIN with the stages and the level of ``train_state``."""
    given = [name for name in ("net", "net_param", "train_net", "train_net_param") if name in p]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "names no net"
        raise NetError(f"{found}; one of net, train_net, net_param, train_net_param is needed")
    (name,) = given
    state = _state("TRAIN", p["train_state"])
    if name.endswith("param"):
        return _inner(p[name], state)
    return _net_file(p[name], path, state, p.line(name))


def _test_nets(p: Typed, path: Path) -> tuple[TestNet, ...]:
    """test_net_param, test_net, then net or net_param as often as test_iter has values left."""
    made: list[Callable[[NetState], Net]] = []
    for inner in p["test_net_param"]:
        made.append(lambda state, inner=inner: _inner(inner, state))  # type: ignore[misc]
    for name in p["test_net"]:
        made.append(lambda state, name=name: _net_file(name, path, state, p.line("test_net")))  # type: ignore[misc]
    counts = p["test_iter"]
    line = p.line("test_iter")
    generic: list[Callable[[NetState], Net]] = []
    if "net" in p:
        generic = [lambda state: _net_file(p["net"], path, state, p.line("net"))]
    elif "net_param" in p:
        generic = [lambda state: _inner(p["net_param"], state)]
    if len(counts) < len(made) or (len(counts) > len(made) and not generic):
        raise NetError(f"{len(counts)} values of test_iter for {len(made)} test nets", line=line)
    made += generic * (len(counts) - len(made))
    states = p["test_state"]
    if states and len(states) != len(made):
        raise NetError(f"{len(states)} test_state for {len(made)} test nets", line=p.line("test_state"))
    if any(count < 1 for count in counts):
        raise NetError(f"test_iter {counts} must be positive", line=line)
    return tuple(
        TestNet(make(_state("TEST", states[i] if states else None)), count)
        for i, (make, count) in enumerate(zip(made, counts, strict=True))
    )


def _state(phase: str, given: Typed | None) -> NetState:
    """The phase with what a state block adds to it; its own phase counts where it has one."""
    if given is None:
        return NetState(phase)
    named = "phase" in given
    return NetState(given["phase"] if named else phase, given["stage"], given["level"])


def _inner(given: Typed, state: NetState) -> Net:
    """A net that stands inside the solver file."""
    assert given.message is not None
    return Net(replace(given.document, root=given.message), state)


def _net_file(name: str, solver: Path, state: NetState, line: int | None) -> Net:
    above = (folder / name for folder in solver.absolute().parents)
    found = next((path for path in (Path(name), solver.parent / name, *above) if path.is_file()), None)
    if found is None:
        hint = "it is looked for from the present folder, the solver's own and those above it"
        raise FileError(f'there is no net "{name}"', path=solver, line=line, hint=hint)
    return load_net(found, state)


def clip(gradients: Sequence[Any], limit: float) -> float:
    """Scale all gradients so that their common L2 norm is at most ``limit`` (none where negative); the factor.

    clip_gradients of Caffe: g *= limit / ||(g1, g2, ...)||.
    """
    if limit < 0:
        return 1.0
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
    if not norm > limit:
        return 1.0
    for gradient in gradients:
        gradient *= limit / norm
    return limit / norm


def regularize(gradient: Any, weight: Any, update: Update, decay_mult: float) -> None:
    """Divide the gradient by iter_size and add the weight decay: λ W (L2) or λ sign(W) (L1)."""
    if update.iter_size != 1:
        gradient /= update.iter_size
    decay = update.weight_decay * decay_mult
    if decay == 0:
        return
    if update.regularization == "L2":
        gradient += decay * weight
    else:
        gradient += decay * ((weight > 0) * 1.0 - (weight < 0) * 1.0)


def step(gradient: Any, history: MutableSequence[Any], update: Update, rate: float, iteration: int) -> Any:
    """What is taken off the weight, by the solver's rule; ``history`` (``update.slots`` arrays) is moved on.

    With g the gradient, η the rate (times lr_mult), μ momentum, δ delta, h the history, t = iteration + 1:
    SGD           h = μ h + η g; step h
    Nesterov      h' = μ h + η g; step (1 + μ) h' - μ h
    AdaGrad       h = h + g²; step η g / (√h + δ)
    RMSProp       h = ρ h + (1 - ρ) g²; step η g / (√h + δ)
    AdaDelta      h = μ h + (1 - μ) g²; v = g √((u + δ) / (h + δ)); u = μ u + (1 - μ) v²; step η v
    Adam          m = μ m + (1 - μ) g; v = μ₂ v + (1 - μ₂) g²; step η √(1 - μ₂ᵗ) / (1 - μᵗ) m / (√v + δ)
    """
    return _RULES[update.kind](gradient, history, update, rate, iteration)


def _sgd(g: Any, history: MutableSequence[Any], u: Update, rate: float, _iteration: int) -> Any:
    history[0] *= u.momentum
    history[0] += rate * g
    return history[0]


def _nesterov(g: Any, history: MutableSequence[Any], u: Update, rate: float, _iteration: int) -> Any:
    before = u.momentum * history[0]
    history[0] *= u.momentum
    history[0] += rate * g
    return (1 + u.momentum) * history[0] - before


def _ada_grad(g: Any, history: MutableSequence[Any], u: Update, rate: float, _iteration: int) -> Any:
    history[0] += g**2
    return rate * (g / (history[0] ** 0.5 + u.delta))


def _rms_prop(g: Any, history: MutableSequence[Any], u: Update, rate: float, _iteration: int) -> Any:
    _decay(history, 0, u.rms_decay, g**2)
    return rate * (g / (history[0] ** 0.5 + u.delta))


def _ada_delta(g: Any, history: MutableSequence[Any], u: Update, rate: float, _iteration: int) -> Any:
    _decay(history, 0, u.momentum, g**2)
    made = g * ((history[1] + u.delta) / (history[0] + u.delta)) ** 0.5
    _decay(history, 1, u.momentum, made**2)
    return rate * made


def _adam(g: Any, history: MutableSequence[Any], u: Update, rate: float, iteration: int) -> Any:
    _decay(history, 0, u.momentum, g)
    _decay(history, 1, u.momentum2, g**2)
    t = iteration + 1
    correction = math.sqrt(1 - u.momentum2**t) / (1 - u.momentum**t)
    return rate * correction * (history[0] / (history[1] ** 0.5 + u.delta))


def _decay(history: MutableSequence[Any], slot: int, share: float, new: Any) -> None:
    """h = share * h + (1 - share) * new"""
    history[slot] *= share
    history[slot] += (1 - share) * new


_RULES: dict[str, Callable[[Any, MutableSequence[Any], Update, float, int], Any]] = {
    "SGD": _sgd,
    "Nesterov": _nesterov,
    "AdaGrad": _ada_grad,
    "RMSProp": _rms_prop,
    "AdaDelta": _ada_delta,
    "Adam": _adam,
}
