"""Ranks of all maps that HRank reads in VGG-16 on CIFAR-10, against one ``matrix_rank`` call a map.

    python benchmarks/hrank_ranks.py [--images 500 --runs 3 --batch 50]

Maps are smoothed noise behind a ReLU, each filter with a threshold of its own, so that some are dense and some dead:
3,712 an image, from 32 x 32 to 2 x 2, where the authors read them. Their way is a Python loop; NumPy computes in
double precision, Torch (where it is installed) in single precision, as they did, so its ranks may differ by 1.
Ours must equal NumPy's. CPU time decides on a busy machine; one thread unless OMP_NUM_THREADS says otherwise. Medians
of the runs, in which the ways alternate batch by batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hrank.rank import ranks

TARGET = 5.0
SITES = (
    (64, 32), (64, 16), (128, 16), (128, 8), (256, 8), (256, 8), (256, 4),
    (512, 4), (512, 4), (512, 2), (512, 2), (512, 2),
)  # fmt: skip
Array = NDArray[Any]
Way = Callable[[Array], Array]


def activations(images: int, seed: int) -> Iterator[Array]:
    """Maps (images, c, h, h) of each site."""
    rng = np.random.default_rng(seed)
    for channels, size in SITES:
        noise = rng.standard_normal((images, channels, size, size), np.float32)
        smooth = noise + 0.7 * (np.roll(noise, 1, 2) + np.roll(noise, 1, 3))
        yield np.maximum(smooth - rng.uniform(-1, 4, (channels, 1, 1)).astype(np.float32), 0)


def by_numpy(maps: Array) -> Array:
    """One call a map."""
    flat = maps.reshape(-1, *maps.shape[2:])
    return np.array([np.linalg.matrix_rank(one) for one in flat]).reshape(maps.shape[:2])


def by_torch() -> Way | None:
    """One call a map and one number back from it, as the authors; None without Torch."""
    try:
        import torch
    except ImportError:
        return None

    def way(maps: Array) -> Array:
        flat = torch.from_numpy(maps).reshape(-1, *maps.shape[2:])
        found = [torch.linalg.matrix_rank(flat[i]).item() for i in range(len(flat))]
        return np.array(found).reshape(maps.shape[:2])

    return way


def main() -> int:
    """Measure and print the ratios; status 1 where ranks differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("images", 500), ("runs", 3), ("batch", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    ways: dict[str, Way] = {"ours": ranks, "NumPy, a call a map": by_numpy}
    torch_way = by_torch()
    if torch_way is not None:
        ways["Torch, a call a map"] = torch_way
    walls, cpus = ({name: [0.0] * o.runs for name in ways} for _ in range(2))
    differing = dict.fromkeys(ways, 0)
    total = saturated = dead = 0
    for run in range(o.runs):
        for start in range(0, o.images, o.batch):
            for maps in activations(min(o.batch, o.images - start), start):
                found = {}
                for name, way in ways.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    found[name] = way(maps)
                    walls[name][run] += time.perf_counter() - wall
                    cpus[name][run] += time.process_time() - cpu
                expected = found["NumPy, a call a map"]
                total += expected.size
                saturated += int((expected == maps.shape[2]).sum())
                dead += int((expected == 0).sum())
                for name, mine in found.items():
                    differing[name] += int((mine != expected).sum())
    print(f"{o.images} images, {total // o.runs:,} maps, medians of {o.runs}", end="; ")
    print(f"{saturated / total:.0%} of full rank, {dead / total:.0%} dead")
    print(f"{'':<22} {'wall':>9} {'ratio':>8} {'CPU':>9} {'ratio':>8}   differing")
    wall, cpu = median(walls["ours"]), median(cpus["ours"])
    for name in ways:
        slow, busy = median(walls[name]), median(cpus[name])
        print(
            f"{name:<22} {slow:7.2f} s {slow / wall:7.1f}x {busy:7.2f} s {busy / cpu:7.1f}x  {differing[name]:10,}"
        )
    print(f"target: ours at least {TARGET:g} times as fast, no rank different from NumPy's")
    return int(differing["ours"] > 0)


if __name__ == "__main__":
    sys.exit(main())
