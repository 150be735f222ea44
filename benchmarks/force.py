"""Force Regularization: the matrix form against the loop over pairs, and what it adds to a training step of AlexNet.

    python benchmarks/force.py [--filters 384 --size 2304 --batch 64 --steps 2 --runs 20]

The loop takes every pair of filters once, as the published CPU solver does, each pair with NumPy operations on whole
filters. The step is forward and backward of AlexNet (two groups in conv2, conv4 and conv5) in plain torch, float32;
the force is the hook's, on its five convolutions. Times are the best of the runs, wall and CPU, which on a busy machine
is the one to judge by; threads as the environment sets them (OMP_NUM_THREADS), the same for all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lra import force
from lra.filters import Layout
from lra.force import Force, Member
from lra.train_hooks import ForceHook

FASTER, SHARE = 100.0, 0.05
KINDS = ("Degradation", "Constant", "Linear", "Gravity")
Array = NDArray[Any]


def by_pairs(W: Array, power: int) -> Array:
    """The force, pair by pair."""
    G = np.zeros_like(W)
    for i in range(len(W)):
        for j in range(i + 1, len(W)):
            n, m = np.sqrt(W[i] @ W[i]), np.sqrt(W[j] @ W[j])
            u, v = W[i] / n, W[j] / m
            apart = v - u
            pull = apart / np.sqrt(apart @ apart) ** power
            G[i] -= n * (pull - (pull @ u) * u)
            G[j] += m * (pull - (pull @ v) * v)
    return G


def alexnet() -> nn.Module:
    """AlexNet as Caffe's reference model has it, 227 x 227."""
    norm, pool = nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2)
    return nn.Sequential(
        nn.Conv2d(3, 96, 11, 4), nn.ReLU(), norm, pool,
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), norm, pool,
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), pool,
        nn.Flatten(),
        nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 1000),
    )  # fmt: skip


def best(work: Callable[[], object], runs: int) -> tuple[float, float]:
    """Wall and CPU seconds, each of the best run."""
    walls, cpus = [], []
    for _ in range(runs):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def against_pairs(filters: int, size: int, runs: int) -> None:
    """Print time, ratio and agreement of both forms, for every kind."""
    W = np.random.default_rng(0).standard_normal((filters, size))
    print(f"{filters} filters of {size} weights, one update, float64")
    print(
        f"{'':<12} {'wall':>9} {'loop':>9} {'ratio':>7} {'CPU':>10} {'loop':>9} {'ratio':>7} {'difference':>11}"
    )
    for power, kind in enumerate(KINDS):
        ours = best(lambda kind=kind: force.update(W, kind), runs)  # type: ignore[misc]
        loop = best(lambda power=power: by_pairs(W, power), 2)  # type: ignore[misc]
        wanted = by_pairs(W, power)
        difference = np.abs(force.update(W, kind) - wanted).max() / np.abs(wanted).max()
        columns = (f"{a * 1e3:6.1f} ms {b:7.2f} s {b / a:6.0f}x" for a, b in zip(ours, loop, strict=True))
        print(f"{kind:<12} {'  '.join(columns)} {difference:11.1e}")
    print(f"target: at least {FASTER:g}x")


def in_training(batch: int, steps: int, runs: int) -> None:
    """Print what the hook adds to a step of AlexNet, for every kind."""
    net = alexnet()
    x, labels = torch.randn(batch, 3, 227, 227), torch.randint(1000, (batch,))

    def step() -> None:
        net.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()

    seconds = best(step, steps)
    convolutions = [one for one in net if isinstance(one, nn.Conv2d)]  # type: ignore[attr-defined]
    keys = [(f"conv{i}", 0) for i in range(1, 6)]
    params = {key: one.weight for key, one in zip(keys, convolutions, strict=True)}
    gradients = {key: torch.zeros_like(blob) for key, blob in params.items()}
    members = {key: Member(1.0, Layout(one.groups)) for key, one in zip(keys, convolutions, strict=True)}
    print(f"\nAlexNet, batch {batch}: forward and backward {seconds[0]:.2f} s wall, {seconds[1]:.2f} s CPU")
    for kind in KINDS:
        hook = ForceHook(Force(1e-4, kind), members)
        added = best(lambda hook=hook: hook.before_update(0, params, gradients), runs)  # type: ignore[misc]
        columns = (f"{a * 1e3:6.1f} ms {a / b:7.2%}" for a, b in zip(added, seconds, strict=True))
        print(f"{kind:<12} {'  '.join(columns)}")
    print(f"target: at most {SHARE:.0%}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("filters", 384), ("size", 2304), ("batch", 64), ("steps", 2), ("runs", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    against_pairs(o.filters, o.size, o.runs)
    in_training(o.batch, o.steps, o.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
