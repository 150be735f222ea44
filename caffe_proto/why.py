"""Why a layer gained less time than multiplications: what its kernels lose, estimated from a profile.

Every estimate is in milliseconds of the layer's kernels; they overlap, so they are an order of importance and no
account. What the layer before loses in the same way, at the same speed, does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from .kernels import CONVERSIONS, Kernel

LOW = 0.8
"""Efficiency, measured over arithmetic speed-up, below which a layer is explained."""

_SET = 4  # blocks of output channels that a kernel of blocked channels takes at once
_LEAST = 0.1  # share of the lost time that a cause must account for
_BLOCKS = (16, 8)
_BIG = 0.25  # of the bytes in question: what moves less may do so in a nearer cache
_MANY = 4  # channels that a blocked convolution must read a multiple of


@dataclass(frozen=True)
class Cause:
    """What time is lost by: kind, milliseconds (estimated), and a line about the layer's own figures."""

    kind: str
    ms: float
    text: str


@dataclass(frozen=True)
class Rates:
    """What kernels cost at least. ``block``: channels in a block, 0 where none are; ``launch``: milliseconds of the
    shortest kernel; ``movers``: bytes and bytes a millisecond of kernels that multiply nothing.
    """

    block: int
    launch: float
    movers: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> Rates:
        """From the profiles of the nets that are compared."""
        widths = [one.computed[0] for one in kernels if one.blocked and one.computed]
        block = next((size for size in _BLOCKS if widths and all(width % size == 0 for width in widths)), 0)
        movers = [(one.moved, one.moved / one.ms) for one in kernels if not one.filters and one.ms > 0]
        return cls(block, min((one.ms for one in kernels), default=0.0), tuple(movers))

    def bandwidth(self, moved: int) -> float | None:
        """Bytes a millisecond at the best, of so many bytes; None where no kernel moves nearly as many."""
        return max((rate for amount, rate in self.movers if amount >= _BIG * moved), default=None)


def explain(
    ms: tuple[float, float],
    macs: tuple[int, int],
    before: Sequence[Kernel],
    after: Sequence[Kernel],
    rates: Rates,
) -> tuple[Cause, ...]:
    """What the time beyond ``ms[0] * macs[1] / macs[0]`` goes into, the largest cause first.

    ``before``, ``after``: the layer's kernels. Causes that account for less than a tenth of it are left out; where
    none is left, the only one is "unexplained".
    """
    share = macs[1] / macs[0]
    lost = ms[1] - ms[0] * share
    pace = ms[0] / macs[0]
    found = [
        _padding(before, after, share),
        _started(before, after, share, rates.block),
        _layout(before, after, share, pace),
        _shallow(before, after, pace, rates.block),
        _memory(before, after, macs, rates),
        _unfused(before, after),
        _launches(before, after, ms[1], share, rates.launch),
    ]
    causes = sorted((one for one in found if one.ms >= _LEAST * lost), key=lambda one: -one.ms)
    made = tuple(Cause(one.kind, min(one.ms, lost), one.text) for one in causes)
    return made or (Cause("unexplained", lost, ""),)


def _excess(
    before: Iterable[Kernel], after: Iterable[Kernel], share: float, lost: Callable[[Kernel], float]
) -> float:
    """What is lost after, less what was lost before at the same speed."""
    return sum(map(lost, after)) - share * sum(map(lost, before))


def _padding(before: Sequence[Kernel], after: Sequence[Kernel], share: float) -> Cause:
    """Channels that do not fill the blocks are computed with zeros: ``ms (1 - prod(filters) / prod(computed))``."""

    def lost(one: Kernel) -> float:
        return one.ms * (1 - prod(one.filters) / prod(one.computed)) if one.filters and one.computed else 0.0

    words = [
        f"{one.layer} {what} {padded} channels for {real}"
        for one in after
        if one.filters and one.computed and len(one.filters) > 2
        for what, real, padded in zip(("computes", "reads"), one.filters, one.computed, strict=False)
        if padded > real
    ]
    return Cause("padding", _excess(before, after, share, lost), ", ".join(words))


def _started(before: Sequence[Kernel], after: Sequence[Kernel], share: float, block: int) -> Cause:
    """Blocks are taken four at a time; those left over read as much for less: an eighth of a block for each missing."""

    def left(one: Kernel) -> int:
        return one.computed[0] // block % _SET if block and one.blocked and one.computed else 0

    def lost(one: Kernel) -> float:
        if not left(one) or one.computed is None:
            return 0.0
        extra = (_SET - left(one)) / 8
        return one.ms * extra / (one.computed[0] // block + extra)

    words = [
        f"{one.layer} computes {one.computed[0]} channels, {left(one)} of the last {_SET} blocks of {block}"
        for one in after
        if left(one) and one.computed
    ]
    return Cause("blocks", _excess(before, after, share, lost), ", ".join(words))


def _layout(before: Sequence[Kernel], after: Sequence[Kernel], share: float, pace: float) -> Cause:
    """Conversions, and convolutions that left the blocks: what those take beyond their share."""
    was_blocked = any(one.blocked for one in before)

    def lost(one: Kernel) -> float:
        if one.op in CONVERSIONS:
            return one.ms
        return max(0.0, one.ms - pace * one.macs) if was_blocked and one.filters and not one.blocked else 0.0

    moves = [one for one in after if one.op in CONVERSIONS]
    words = [
        f"{one.layer} left the blocked layout"
        + (f": {one.filters[1]} input channels are no multiple of {_MANY}" if one.filters[1] % _MANY else "")
        for one in after
        if was_blocked and one.filters and not one.blocked
    ]
    if moves:
        ops = ", ".join(dict.fromkeys(one.op for one in moves))
        words.append(f"{len(moves)} x {ops} in {sum(one.ms for one in moves):.3f} ms")
    return Cause("layout", _excess(before, after, share, lost), ", ".join(words))


def _shallow(before: Sequence[Kernel], after: Sequence[Kernel], pace: float, block: int) -> Cause:
    """Convolutions of fewer input channels than a block have another kernel: what it takes beyond its share."""
    least = min((one.filters[1] for one in before if one.filters), default=0)
    few = [
        one
        for one in after
        if one.blocked and one.filters and one.filters[1] < block and one.filters[1] < least
    ]
    words = [f"{one.layer} reads {one.filters[1]} channels, less than a block" for one in few if one.filters]
    return Cause("few channels", sum(max(0.0, one.ms - pace * one.macs) for one in few), ", ".join(words))


def _memory(before: Sequence[Kernel], after: Sequence[Kernel], macs: tuple[int, int], rates: Rates) -> Cause:
    """More bytes for each multiplication, ``(moved_1 - moved_0 macs_1 / macs_0) / bandwidth``; conversions apart."""
    moved = [sum(one.moved for one in some if one.op not in CONVERSIONS) for some in (before, after)]
    bandwidth = rates.bandwidth(max((one.moved for one in after), default=0))
    if not moved[0] or bandwidth is None:
        return Cause("memory", 0.0, "")
    more = moved[1] - moved[0] * macs[1] / macs[0]
    ratio = moved[1] / macs[1] / (moved[0] / macs[0])
    return Cause(
        "memory",
        more / bandwidth,
        f"moves {ratio:.1f} x the bytes per MAC, {moved[1] / 2**20:.1f} MiB in all",
    )


def _unfused(before: Sequence[Kernel], after: Sequence[Kernel]) -> Cause:
    """Operators that the layer before took into its kernels, and that now have their own."""
    known = {one.op for one in before}
    alone = [one for one in after if not one.filters and one.op not in known | CONVERSIONS]
    ops = ", ".join(dict.fromkeys(one.op for one in alone))
    return Cause("fusion", sum(one.ms for one in alone), f"{ops} has a kernel of its own now")


def _launches(
    before: Sequence[Kernel], after: Sequence[Kernel], ms: float, share: float, launch: float
) -> Cause:
    """What every kernel takes at least, however little it does."""
    more = len(after) - share * len(before)
    words = f"{len(after)} kernels of {launch:.4f} ms at the least, in {ms:.4f} ms; {len(before)} before"
    return Cause("overhead", more * launch, words)
