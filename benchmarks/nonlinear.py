"""The alternating solver against the published procedure written down plainly, on the same samples.

    python benchmarks/nonlinear.py [--n 30000 --d 512 --rank 115 --plain-iterations 50 --runs 1]

The plain version takes, in each iteration, both branches of z, the regression from a precomputed
pseudo-inverse, and the SVD of the n x d fitted values; double precision, whole arrays. Times are of
50 iterations, setup included: wall, and CPU, which on a busy machine is the one to judge by; with fewer plain
iterations its time is scaled up and its loss is not compared. Threads as the environment sets them
(OMP_NUM_THREADS), the same for both. Medians of the runs, which alternate.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lra import nonlinear
from lra.linalg import AffineMap

TARGET = 20.0
Array = NDArray[Any]


def samples(n: int, d: int, seed: int = 0) -> tuple[Array, Array]:
    """Responses with a decaying spectrum, about nine in ten below zero, and the same with an error of 10 %."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.arange(1, d + 1)[:, None] ** -0.6
    y = rng.standard_normal((n, d)) @ mixing
    y /= y.std(axis=0)
    y -= 1.3
    y_hat = y + 0.1 * rng.standard_normal((n, d)) @ mixing
    return y_hat.astype(np.float32), y.astype(np.float32)


def plain(y_hat: Array, y: Array, rank: int, iterations: int) -> AffineMap:
    """As published, linear start included."""
    y_hat, y = y_hat.astype(np.float64), y.astype(np.float64)
    mean = y_hat.mean(axis=0)
    centred = y_hat - mean
    inverse = scipy.linalg.pinvh(centred.T @ centred)
    target = np.maximum(y, 0)
    found = _regress(centred, y, inverse, rank)
    for i in range(iterations):
        penalty = 0.01 if i < iterations // 2 else 1.0
        t = centred @ found.Q @ found.P.T + found.b
        below = np.minimum(t, 0)
        above = np.maximum((penalty * t + target) / (penalty + 1), 0)
        cost_below = target**2 + penalty * (below - t) ** 2
        cost_above = (target - above) ** 2 + penalty * (above - t) ** 2
        z = np.where(cost_above < cost_below, above, below)
        found = _regress(centred, z, inverse, rank)
    return AffineMap(found.P, found.Q, found.b - found.P @ (found.Q.T @ mean))


def _regress(centred: Array, z: Array, inverse: Array, rank: int) -> AffineMap:
    """Fitted values, their SVD, and regression on the features again; b for centred features."""
    full = inverse @ (centred.T @ (z - z.mean(axis=0)))  # (d, d)
    _, _, right = np.linalg.svd(centred @ full, full_matrices=False)
    basis = right[:rank].T
    return AffineMap(basis, full @ basis, z.mean(axis=0))


def loss(y_hat: Array, y: Array, found: AffineMap) -> float:
    """Relative loss after the activation, double precision."""
    target = np.maximum(y.astype(np.float64), 0)
    error = np.maximum(y_hat @ found.Q @ found.P.T + found.b, 0) - target
    return float(np.sum(error**2) / np.sum(target**2))


def timed(solve: Callable[[], AffineMap]) -> tuple[float, float, AffineMap]:
    """Wall and CPU seconds, and the map."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = solve()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def main() -> int:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("n", 30000), ("d", 512), ("rank", 115), ("plain-iterations", 50), ("runs", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    y_hat, y = samples(o.n, o.d)
    walls: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    for _ in range(o.runs):
        for name, solve in {
            "ours": lambda: nonlinear.fit(y_hat, y, o.rank),
            "ours, all samples in every iteration": lambda: nonlinear.fit(y_hat, y, o.rank, parts=1),
            "linear start": lambda: nonlinear.fit(y_hat, y, o.rank, schedule=()),
            "plain": lambda: plain(y_hat, y, o.rank, o.plain_iterations),
        }.items():
            wall, cpu, found = timed(solve)
            scale = 50 / o.plain_iterations if name == "plain" else 1
            walls.setdefault(name, []).append(wall * scale)
            cpus.setdefault(name, []).append(cpu * scale)
            losses[name] = loss(y_hat, y, found)
    print(f"n = {o.n}, d = {o.d}, rank {o.rank}, 50 iterations, medians of {o.runs}")
    print(f"{'':<38} {'wall':>9} {'ratio':>9} {'CPU':>9} {'ratio':>9} {'loss':>9}")
    wall, cpu = median(walls["plain"]), median(cpus["plain"])
    for name in walls:
        mine, busy = median(walls[name]), median(cpus[name])
        print(
            f"{name:<38} {mine:7.2f} s {wall / mine:8.1f}x {busy:7.2f} s {cpu / busy:8.1f}x {losses[name]:9.6f}"
        )
    print(f"target: ours at least {TARGET:g}x, its loss at most the plain one's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
