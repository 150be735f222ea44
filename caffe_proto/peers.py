"""Several processes under torchrun that do one job: each has its share, what is decided upon comes together.

Every process runs the same program and comes to the same operations in the same order. One that fails tells the
others at their next operation, so that none waits for it; the first process alone speaks and writes. torch is
imported where torchrun has started several processes, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np

from .errors import Error, UsageError

Array = np.ndarray
T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # of those that wait while the first one computes
_joined: list[Peers] = []  # by `joined`, until they leave; at most one


class Elsewhere(Error):
    """An error that another process reports."""


class _Failed(Exception):
    """A process has failed; not an `Error`, so that nothing on the way takes it for its own."""

    def __init__(self, error: Error) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Peers:
    """The processes that do one job, this one among them; alone, everything is what it is.

    ``exchange``: what each process gives, in their order, to all of them. ``collect``: calls its second argument
    in the first process with every process's number and array, in order, which differ in their first axis alone.
    """

    rank: int = 0
    world: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    collect: Callable[[Array, Callable[[int, Array], None]], None] = lambda array, take: take(0, array)

    def told(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them."""
        made: T = self.exchange(make() if self.rank == 0 else None)[0]
        return made

    def sum(self, value: T) -> T:
        """Numbers or arrays added up in the order of the processes: the same bits in all of them."""
        return reduce(add, self.exchange(value))  # type: ignore[arg-type]


ALONE = Peers()


@dataclass(frozen=True, eq=False)
class Share:
    """Which of ``total`` items are this process's: their ``numbers`` (n,), ascending. Each item is some process's."""

    peers: Peers
    numbers: Array
    total: int

    @classmethod
    def whole(cls, count: int) -> Share:
        """All items, alone."""
        return cls(ALONE, np.arange(count), count)

    @classmethod
    def of(cls, peers: Peers, places: Array) -> Share:
        """Items numbered anew by their places (n,) in a list of which some processes may have lacked some."""
        known = np.sort(np.concatenate(peers.exchange(places)))
        return cls(peers, np.searchsorted(known, places), len(known))

    def part(self, start: int, stop: int) -> tuple[slice, Share]:
        """Items start to stop, counted from start: where they are among this process's, and its share of them."""
        first, last = (int(place) for place in np.searchsorted(self.numbers, (start, stop)))
        return slice(first, last), Share(self.peers, self.numbers[first:last] - start, stop - start)

    def rows(self, count: int) -> slice | Array:
        """Which of ``count`` rows are this process's, where every item has as many."""
        if self.peers.world == 1:
            return slice(None)
        each = count // self.total
        return np.asarray((self.numbers[:, None] * each + np.arange(each)).reshape(-1))

    def gathered(self, rows: Array) -> Array:
        """All processes' rows in the order of the items, in the first process; elsewhere what was given.

        Every item has as many rows, and they lie together.
        """
        if self.peers.world == 1:
            return rows
        numbers = self.peers.exchange(self.numbers)
        found: list[Array] = []

        def take(rank: int, part: Array) -> None:
            if not len(part):
                return
            each = len(part) // len(numbers[rank])
            if not found:
                found.append(np.empty((self.total, each, *part.shape[1:]), part.dtype))
            found[0][numbers[rank]] = part.reshape(len(numbers[rank]), each, *part.shape[1:])

        self.peers.collect(rows, take)
        return found[0].reshape(-1, *rows.shape[1:]) if found else rows


def world() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def threads(asked: int) -> int:
    """Threads of this process where 0 asks for all cores: those on one machine share them."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1
    return asked if asked or beside == 1 else max(1, (os.cpu_count() or 1) // beside)


@contextmanager
def joined() -> Iterator[Peers]:
    """This process among those that torchrun has started, for one job; alone without torchrun.

    At its end all have come to theirs. Where one fails all raise: the first process the error, the others
    `Elsewhere`; they stay together until `leaving`, so that the first can say it.
    """
    if world() == 1:
        yield ALONE
        return
    connect("gloo", _PATIENCE)
    peers = Peers(rank(), world(), _exchange, _collect)
    _joined.append(peers)
    try:
        try:
            yield peers
            _talk(None, None)
        except _Failed:
            raise
        except Exception as error:
            _announce(error)
    except _Failed as failed:
        raise failed.error if peers.rank == 0 else Elsewhere(failed.error.message) from None
    except BaseException:
        _leave()
        raise


@contextmanager
def leaving() -> Iterator[None]:
    """The processes that have joined leave together behind this: none may go while another still speaks."""
    try:
        yield
    finally:
        if _joined:
            import torch.distributed as distributed

            with suppress(RuntimeError):  # some may be gone by force
                distributed.barrier()
            _leave()


def connect(backend: str, patience: timedelta | None = None) -> None:
    """Have torch connect the processes. Raises UsageError where it is not installed or cannot."""
    try:
        import torch.distributed as distributed
    except ImportError as error:
        if error.name != "torch":
            raise
        raise UsageError("several processes need torch", hint='install "caffe-lra[train]"') from error
    try:
        distributed.init_process_group(backend, timeout=patience)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"{world()} processes cannot be joined: {error}", hint="start them by torchrun"
        ) from error


def _leave() -> None:
    import torch.distributed as distributed

    _joined.clear()
    distributed.destroy_process_group()


def _exchange(value: Any) -> list[Any]:
    return _talk(None, value)


def _talk(failure: Error | None, value: Any) -> list[Any]:
    """All processes' values; raises _Failed in all where one of them has failed."""
    import torch.distributed as distributed

    found: list[Any] = [None] * world()
    try:
        distributed.all_gather_object(found, (failure, value))
    except RuntimeError as error:
        raise Error("another process is gone, this one cannot go on alone") from error
    for other, _ in found:
        if other is not None:
            raise _Failed(other)
    return [given for _, given in found]


def _announce(error: Exception) -> None:
    """Tell the others of an error, and raise: `_Failed` as they do, or a bug as it is, so that it can be found."""
    known = isinstance(error, Error)
    told = error if known else Error(f"process {rank()} has failed: {type(error).__name__}: {error}")
    try:
        _talk(told, None)  # type: ignore[arg-type]
    except _Failed:
        if known:
            raise
    except Error:
        pass  # there is nobody left to tell
    raise error


def _collect(array: Array, take: Callable[[int, Array], None]) -> None:
    """See `Peers.collect`; one process's array at a time."""
    import torch
    import torch.distributed as distributed

    own = np.require(array, requirements=["C", "W"])
    if rank():
        _exchange((own.shape, own.dtype.str))
        if own.size:
            distributed.send(torch.from_numpy(own.reshape(-1).view(np.uint8)), 0)
        return
    for source, (shape, kind) in enumerate(_exchange((own.shape, own.dtype.str))):
        part = own if source == 0 else np.empty(shape, kind)
        if source and part.size:
            distributed.recv(torch.from_numpy(part.reshape(-1).view(np.uint8)), source)
        take(source, part)
