"""Training: Caffe's solver loop in torch, alone or in several processes under torchrun.

With several processes each takes its part of every batch; batch statistics and the counts that losses are
normalized by are those of the whole batch and gradients are averaged, so that the weights are those of one
process. Everything random follows from the seed, the iteration and the process: training that goes on from a
snapshot gives the same bytes as training that was never stopped.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import caffe_state, snapshots, solver, weights
from .caffe_state import CaffeState
from .errors import FileError, UsageError, WeightsError
from .graph import build
from .layers.spec import Shape
from .net import Net
from .outputs import with_outputs
from .peers import connect, world
from .shape_inference import infer
from .snapshots import State
from .solver import Solver
from .torch_layers.base import ALONE, Peers
from .torch_net import Key, TorchNet, start
from .train_data import Feeds, Options, Part, Shelf, open_feeds
from .weights import Entry, Weights

Blobs = Mapping[Key, Tensor]
Histories = Mapping[Key, Sequence[Tensor]]


class Reshaped(Protocol):
    """Layers that changed their num_output while training: their number, new blobs and what the rule carries."""

    outputs: dict[str, int]
    params: dict[Key, Tensor]
    history: dict[Key, tuple[Tensor, ...]]


class Hook:
    """Looks at training, or changes it. Any object with some of these methods is one; tensors are changed in place.

    ``params`` are the learnt blobs by (layer, index), a shared one under its first layer; ``gradients`` those of
    the blobs that have a learning rate. All run without tracking gradients.
    """

    def start(self, params: Blobs) -> None:
        """Before the first iteration, after going on from a snapshot, and behind a ``reshape``."""

    def before_update(self, iteration: int, params: Blobs, gradients: Blobs) -> None:
        """The gradients are clipped, divided by iter_size and hold the weight decay; the rule comes next."""

    def after_update(self, iteration: int, params: Blobs, rate: float) -> None:
        """The weights have moved; ``rate`` is the learning rate of the iteration."""

    def reshape(self, iteration: int, params: Blobs, history: Histories) -> Reshaped | None:
        """Behind the update: what became of layers that shrink or grow, None where nothing does."""

    def at_test(self, iteration: int, params: Blobs) -> None:
        """At every test interval, in the first process."""

    def finish(self) -> None:
        """Once, at the end, in the first process."""

    def document(self) -> Mapping[str, Any]:
        """Behind that: what the command's JSON holds of it, as values of JSON."""
        return {}


@dataclass(frozen=True)
class Display:
    """What an iteration printed: the loss averaged over average_loss iterations, and the outputs of this one."""

    iteration: int
    loss: float
    rate: float
    per_second: float
    outputs: Mapping[str, tuple[float, ...]]
    loss_weights: Mapping[str, float]


@dataclass(frozen=True)
class Tested:
    """The outputs of a test net, averaged over its batches; the loss where test_compute_loss asks for it."""

    iteration: int
    net: int
    outputs: Mapping[str, tuple[float, ...]]
    loss_weights: Mapping[str, float]
    loss: float | None = None


@dataclass(frozen=True)
class Saved:
    """A snapshot was written; training goes on from ``state`` as if it had not stopped.

    ``net``: the net of ``weights``, where layers have another number of outputs than the solver's net says.
    ``caffe``: the state that Caffe goes on from, where it was asked for.
    """

    iteration: int
    weights: Path
    state: Path
    net: Path | None = None
    caffe: Path | None = None


@dataclass(frozen=True)
class Resized:
    """Layers have another number of outputs behind this iteration; by name."""

    iteration: int
    outputs: Mapping[str, int]


Event = Display | Tested | Saved | Resized


@dataclass(frozen=True)
class Request:
    """How a solver is run.

    ``weights``: files to fine-tune from. ``state``: a snapshot to go on from, Caffe's own among them. ``data`` and
    ``test_data`` stand for what the nets' data layers name. ``hooks``: see ``Hook``. ``listen`` is told what happens,
    in the first process, ``tick`` is called behind every iteration. ``stop`` is asked in each: training then ends
    behind it, with a snapshot. ``caffe_state``: snapshots hold a state that Caffe goes on from, too.
    """

    weights: Sequence[str] = ()
    state: str | None = None
    data: str | None = None
    test_data: str | None = None
    root: str | None = None
    device: str = "cpu"
    seed: int | None = None
    hooks: Sequence[object] = ()
    listen: Callable[[Event], None] = lambda _event: None
    tick: Callable[[], None] = lambda: None
    stop: Callable[[], bool] = lambda: False
    caffe_state: bool = False


@dataclass(frozen=True, eq=False)
class Result:
    """How training ended. ``images`` counts what was trained on in ``seconds``, tests and snapshots left out."""

    iteration: int
    loss: float
    tests: tuple[Tested, ...]
    saved: Saved | None
    weights: Weights
    images: int
    seconds: float


def train(described: Solver, request: Request | None = None) -> Result:
    """Run a solver to its max_iter.

    Raises UsageError where the loss is no number any more, or a setting cannot be met; FileError where data
    cannot be read or a snapshot not be written. Snapshots that were written before stay.
    """
    request = request or Request()
    with joined(request.device) as (peers, device), _Run(described, request, peers, device) as run:
        return run.train()


def cuda_found() -> bool:
    """Whether torch sees a CUDA device."""
    return bool(torch.cuda.is_available())


def set_threads(count: int) -> None:
    """How many threads torch computes with."""
    torch.set_num_threads(count)


@contextmanager
def joined(device: str) -> Iterator[tuple[Peers, str]]:
    """The processes that torchrun started, and this one's device; alone without torchrun."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device", hint="use --device cpu")
    if world() == 1:
        yield ALONE, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    mine = not torch.distributed.is_initialized()
    if mine:
        connect("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Peers(torch.distributed.get_rank(), torch.distributed.get_world_size()), device
        if mine:
            torch.distributed.barrier()  # none may leave while another still talks to it
    finally:
        if mine:
            torch.distributed.destroy_process_group()


class _Run:
    """One training: nets, data, histories, and where it stands."""

    def __init__(self, described: Solver, request: Request, peers: Peers, device: str) -> None:
        if request.weights and request.state:
            raise UsageError("weights and a snapshot are both given", hint="a snapshot has its own weights")
        self.request, self.peers, self.device = request, peers, device
        given = abs(described.seed or 0 if request.seed is None else request.seed)
        self.caffe = (
            caffe_state.load(request.state)
            if request.state and caffe_state.is_caffes(request.state)
            else None
        )
        self.state = _stored(request.state, self.caffe, described, given)
        self.seed = self.state.seed if self.state and request.seed is None else given
        self.iteration = self.state.iteration if self.state else 0
        self.solver = _resumed(described, self.state)
        self.losses = deque(self.state.losses if self.state else (), described.average_loss)
        self.saved: Saved | None = None
        self.saved_before: Saved | None = None
        self._check()
        self._opened: list[Feeds] = []
        self._shelf = Shelf()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the data."""
        for feeds in self._opened:
            feeds.close()
        self._shelf.close()

    def _check(self) -> None:
        """See before the first iteration what would stop the last one."""
        s, state = self.solver, self.state
        if state is not None and state.kind != s.update.kind:
            raise UsageError(
                f"is a state of {state.kind}, the solver is {s.update.kind}", path=self.request.state
            )
        self.inputs = [*self._weight_files(), self.request.state, s.path, s.train.path]
        if not (s.snapshot or s.snapshot_after_train):
            return
        folder = Path(s.snapshot_prefix).parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise FileError(
                "snapshots cannot be written there",
                path=folder,
                hint="make the folder, or name another prefix",
            )
        coming = {s.max_iter, *(range(0, s.max_iter + 1, s.snapshot) if s.snapshot else ())}
        inputs = {Path(path).resolve() for path in self.inputs if path}
        for iteration in coming:
            for path in self._names(iteration):
                if iteration > self.iteration and path.resolve() in inputs:
                    raise UsageError(
                        "would be overwritten by a snapshot, and it is an input", path=path,
                        hint="name another prefix",
                    )  # fmt: skip

    def _names(self, iteration: int) -> list[Path]:
        """The files of a snapshot: weights, state, and the state for Caffe where it is asked for."""
        s = self.solver
        names = [*snapshots.names(s.snapshot_prefix, iteration, hdf5=s.hdf5)]
        if self.request.caffe_state:
            names.append(caffe_state.name_of(s.snapshot_prefix, iteration, hdf5=s.hdf5))
        return names

    def _weight_files(self) -> list[str]:
        if self.state is not None:
            assert self.request.state is not None
            return [str(Path(self.request.state).parent / self.state.weights)]
        return list(self.request.weights or self.solver.weights)

    def _open(self) -> None:
        self.outputs = dict(self.state.outputs if self.state else {})
        train, part = self.solver.train, Part(self.peers.rank, self.peers.world)
        self.stored = _together([weights.load(path) for path in self._weight_files()])
        self.feeds = self._feeds(train, self.request.data, part)
        self.test_feeds = [
            self._feeds(test.net, self.request.test_data, Part()) for test in self.solver.tests
        ]
        self._build({})
        if not self.trained:
            raise UsageError("the net has nothing to learn", path=train.path)
        self.tested = list(self.state.tests if self.state else (0,) * len(self.tests))
        if len(self.tested) != len(self.tests):
            raise UsageError("the state is of a solver with other test nets", path=self.request.state)
        self.history = self._histories()
        if self.state is not None:
            self.net.carry(self.state.carried)

    def _build(self, given: Mapping[Key, Tensor]) -> None:
        """The nets as their layers are by now, over the given blobs."""
        train = with_outputs(self.solver.train, self.outputs)
        self.net = self._net(train, self.feeds, given, self.peers)
        self.tests = [
            self._net(with_outputs(test.net, self.outputs), feeds, self.net.named, ALONE)
            for test, feeds in zip(self.solver.tests, self.test_feeds, strict=True)
        ]
        self.trained = {key: blob for key, blob in self.net.learnt.items() if self.net.trains(key)}

    def _feeds(self, net: Net, data: str | None, part: Part) -> Feeds:
        made = open_feeds(build(net), net, Options(data, self.request.root, self.seed, part, self._shelf))
        self._opened.append(made)
        return made

    def _net(self, net: Net, feeds: Feeds, given: Mapping[Key, Tensor], peers: Peers) -> TorchNet:
        shaped = infer(build(net), feeds.shapes)
        elsewhere = {name for name, _ in given}
        stored = _without(self.stored, elsewhere)
        blobs = start(net, shaped, stored, np.random.default_rng(self.seed), elsewhere)
        return TorchNet(net, shaped, blobs, given=given, device=self.device, peers=peers)

    def _histories(self) -> dict[Key, list[Tensor]]:
        slots = self.solver.update.slots
        if self.state is None:
            return {key: [torch.zeros_like(blob) for _ in range(slots)] for key, blob in self.trained.items()}
        found = self.state.history
        if self.caffe is not None:
            found = self.caffe.histories(self._learnt(), self.solver.update)
        for key, blob in self.trained.items():
            shapes = [array.shape for array in found.get(key, ())]
            if shapes != [tuple(blob.shape)] * slots:
                raise WeightsError(
                    f"has no history of blob {key[1]} that fits", path=self.request.state, layer=key[0]
                )
        return {
            key: [torch.tensor(array, device=self.device) for array in found[key]] for key in self.trained
        }

    def _learnt(self) -> dict[Key, Shape]:
        return {key: tuple(blob.shape) for key, blob in self.net.learnt.items()}

    def train(self) -> Result:
        """Iterate to max_iter, or until asked to stop."""
        s = self.solver
        images, seconds, last, since = 0, 0.0, time.monotonic(), self.iteration
        stopped = False
        tests: tuple[Tested, ...] = ()
        self._call("start", self.net.learnt)
        while self.iteration < s.max_iter and not stopped:
            if self._test_is_due() and (self.iteration or s.test_initialization):
                tests = self._test_all()
                last, since = time.monotonic(), self.iteration
            began = time.monotonic()
            loss, outputs, stopped = self._iterate()
            self.losses.append(loss)
            now = time.monotonic()
            seconds += now - began
            images += s.update.iter_size * self._batch_size() * self.peers.world
            if s.display and self.iteration % s.display == 0:
                speed = (self.iteration + 1 - since) / max(now - last, 1e-9)
                rate = s.rates.at(self.iteration)
                self._tell(
                    Display(
                        self.iteration,
                        self._loss(),
                        rate,
                        speed,
                        self._shared(outputs),
                        self.net.loss_weights,
                    )
                )
                last, since = time.monotonic(), self.iteration + 1
            self.iteration += 1
            self.request.tick()
            if s.snapshot and self.iteration % s.snapshot == 0:
                self._snapshot()
        written = self.saved is not None and self.saved.iteration == self.iteration
        resumed = self.state is not None and self.state.iteration == self.iteration
        if s.snapshot_after_train and not written and not resumed:
            self._snapshot()
        if self._test_is_due() and not stopped:
            tests = self._test_all()
        if self.peers.rank == 0:
            self._call("finish")
        return Result(self.iteration, self._loss(), tests, self.saved, self.net.weights(), images, seconds)

    def _test_is_due(self) -> bool:
        return bool(self.solver.test_interval) and self.iteration % self.solver.test_interval == 0

    @torch.no_grad()
    def _call(self, name: str, *args: Any) -> list[Any]:
        """What every hook that has a method of this name answers."""
        methods = (getattr(hook, name, None) for hook in self.request.hooks)
        return [method(*args) for method in methods if method is not None]

    def _batch_size(self) -> int:
        return next((shape[0] for shape in self.feeds.shapes.values() if shape), 1)

    def _loss(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def _tell(self, event: Event) -> None:
        if self.peers.rank == 0:
            self.request.listen(event)

    def _iterate(self) -> tuple[float, Mapping[str, Tensor], bool]:
        """One update from iter_size batches: (loss, outputs of the last batch, whether to stop)."""
        mix = np.random.SeedSequence([self.seed, self.iteration, self.peers.rank])
        torch.manual_seed(int(mix.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        size = self.solver.update.iter_size
        for blob in self.trained.values():
            blob.grad = None
        total = torch.zeros((), device=self.device)
        outputs: Mapping[str, Tensor] = {}
        for i in range(size):
            made = self.net.run(_tensors(self.feeds.batch(self.iteration * size + i)))
            if made.loss.requires_grad:
                made.loss.backward()  # type: ignore[no-untyped-call]
            total, outputs = total + made.loss.detach() / size, made.blobs
        told = torch.stack([total, total.new_tensor(float(self.request.stop()))])
        loss, stop = (self.peers.sum(told) / self.peers.world).tolist()
        if not math.isfinite(loss):
            raise self._diverged("the loss")
        self._update()
        return loss, outputs, stop > 0

    @torch.no_grad()
    def _update(self) -> None:
        """Clip, divide by iter_size, add the decay, run the hooks, take the step off the weights."""
        update, rate = self.solver.update, self.solver.rates.at(self.iteration)
        gradients = {
            key: torch.zeros_like(blob) if blob.grad is None else blob.grad
            for key, blob in self.trained.items()
        }
        self._average(gradients)
        solver.clip(list(gradients.values()), update.clip_gradients)
        for key, blob in self.trained.items():
            solver.regularize(gradients[key], blob, update, self.net.multipliers[key].decay)
        self._call("before_update", self.iteration, self.net.learnt, gradients)
        for key, blob in self.trained.items():
            local = rate * self.net.multipliers[key].rate
            blob -= solver.step(gradients[key], self.history[key], update, local, self.iteration)
        self._call("after_update", self.iteration, self.net.learnt, rate)
        for hook in self.request.hooks:
            if (reshape := getattr(hook, "reshape", None)) is not None:
                self._reshape(reshape(self.iteration, self.net.learnt, self.history))

    def _reshape(self, made: Reshaped | None) -> None:
        """Go on with layers that changed their number of outputs."""
        if made is None:
            return
        self.outputs.update(made.outputs)
        self._tell(Resized(self.iteration, made.outputs))
        owners = {id(blob): key for key, blob in self.net.learnt.items()}
        given = {
            name: made.params.get(owners[id(blob)], blob).detach() for name, blob in self.net.named.items()
        }
        carried = self.net.carried()
        self._build(given)
        self.net.carry(carried)
        self.history.update({key: list(slots) for key, slots in made.history.items()})
        self._call("start", self.net.learnt)

    def _average(self, gradients: Mapping[Key, Tensor]) -> None:
        """The mean over the processes, in place, as one message."""
        if self.peers.world == 1:
            return
        flat = torch.cat([one.reshape(-1) for one in gradients.values()])
        torch.distributed.all_reduce(flat)
        flat /= self.peers.world
        for gradient, mean in zip(
            gradients.values(), flat.split([one.numel() for one in gradients.values()]), strict=True
        ):
            gradient.copy_(mean.reshape(gradient.shape))

    def _shared(self, outputs: Mapping[str, Tensor]) -> dict[str, tuple[float, ...]]:
        """Outputs as numbers, averaged over the processes."""
        return {
            name: tuple((self.peers.sum(one.reshape(-1).float()) / self.peers.world).tolist())
            for name, one in outputs.items()
        }

    @torch.no_grad()
    def _test_all(self) -> tuple[Tested, ...]:
        """Every test net over its batches, which the processes share."""
        made = []
        if self.peers.rank == 0:
            self._call("at_test", self.iteration, self.net.learnt)
        for i, (net, feeds) in enumerate(zip(self.tests, self.test_feeds, strict=True)):
            count, first = self.solver.tests[i].batches, self.tested[i]
            sums: dict[str, Tensor] = {}
            for number in range(first + self.peers.rank, first + count, self.peers.world):
                given = feeds.batch(number, step=self.peers.world)
                found = net.run(_tensors(given))
                for name, one in {"": found.loss, **found.blobs}.items():
                    sums[name] = sums.get(name, 0) + one.reshape(-1).float()
            if self.peers.world > 1:
                sums = self._gathered(sums)
            means = {name: tuple((one / count).tolist()) for name, one in sums.items()}
            (loss,) = means.pop("")
            self.tested[i] = first + count
            shown = loss if self.solver.test_compute_loss else None
            made.append(Tested(self.iteration, i, means, net.loss_weights, shown))
            self._tell(made[-1])
        return tuple(made)

    def _gathered(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes, some of which may have had no batch."""
        shared: list[dict[str, list[float]]] = [{}] * self.peers.world
        torch.distributed.all_gather_object(shared, {name: one.tolist() for name, one in sums.items()})
        total: dict[str, Tensor] = {}
        for one in shared:
            for name, values in one.items():
                total[name] = total.get(name, 0) + torch.tensor(values)
        return total

    def _snapshot(self) -> None:
        """Weights and state, by the first process; weights that are no numbers are not written."""
        if not all(bool(torch.isfinite(blob).all()) for blob in self.net.learnt.values()):
            raise self._diverged("a weight")
        model, state, *caffe = self._names(self.iteration)
        if self.peers.rank == 0:
            made = self._state(model.name)
            snapshots.save(
                self.solver.snapshot_prefix,
                self.net.weights(),
                self.net.net,
                made,
                hdf5=self.solver.hdf5,
                inputs=self.inputs,
                caffe=self._for_caffe(made, str(model)) if caffe else None,
            )
        net = snapshots.net_name(self.solver.snapshot_prefix, self.iteration, self.outputs)
        self.saved_before, self.saved = self.saved, Saved(self.iteration, model, state, net, *caffe)
        self._tell(self.saved)

    def _state(self, model: str) -> State:
        history = {key: tuple(slot.cpu().numpy() for slot in slots) for key, slots in self.history.items()}
        return State(
            self.iteration, self.solver.update.kind, self.seed, model, tuple(self.tested), tuple(self.losses), self.outputs,
            history, self.net.carried(), self.solver.rates.steps_passed(self.iteration - 1) if self.iteration else 0,
        )  # fmt: skip

    def _for_caffe(self, state: State, model: str) -> CaffeState:
        history = caffe_state.listed(state.history, self._learnt(), self.solver.update)
        return CaffeState("", state.iteration, state.steps or 0, model, history)

    def _diverged(self, what: str) -> UsageError:
        good = self.saved
        if good is not None and good.iteration == self.iteration:
            good = self.saved_before  # those weights were finite, and too large for this
        kept = f"{good.state} is the last good snapshot" if good else "this run has no good snapshot yet"
        return UsageError(
            f"{what} is no number any more in iteration {self.iteration}: training has diverged, {kept}",
            path=self.solver.path, hint="lower base_lr, or set clip_gradients",
        )  # fmt: skip


def _stored(path: str | None, caffe: CaffeState | None, described: Solver, seed: int) -> State | None:
    """What training goes on from; a state of Caffe knows no seed, no loss and no batch of the tests."""
    if caffe is None:
        return snapshots.load(path) if path else None
    return State(
        caffe.iteration, described.update.kind, seed, str(caffe.weights()), (0,) * len(described.tests), (), {},
        {}, {}, caffe.steps,
    )  # fmt: skip


def _resumed(described: Solver, state: State | None) -> Solver:
    """The solver whose learning rate goes on from the state's."""
    if state is None or state.steps is None:
        return described
    rates = replace(described.rates, resumed_at=state.iteration, resumed_steps=state.steps)
    return replace(described, rates=rates)


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _without(stored: Weights | None, names: Container[str]) -> Weights | None:
    """The layers whose blobs are not had elsewhere."""
    if stored is None:
        return None
    pieces = [piece for piece in stored.pieces if isinstance(piece, Entry) and piece.name not in names]
    return Weights(pieces, path=stored.path)


def _together(stored: Sequence[Weights]) -> Weights | None:
    """Several weight files as one; of layers that several hold the last one counts."""
    if len(stored) < 2:
        return stored[0] if stored else None
    return Weights([piece for one in stored for piece in one.pieces], path=stored[-1].path)
