"""``decompose --speedup 4 --scheme spatial`` of a VGG-16-sized model against the bare SVDs of its layers in SciPy.

Run: ``python benchmarks/decompose.py [--runs 3]``. Both in one run, alternating, each in a fresh process; wall
time (start of the process and files included for ours, SVD calls alone for SciPy), and peak memory of ours.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import vgg

_SVDS = """
import sys, time
import numpy as np, scipy.linalg
sys.path.insert(0, {root!r})
from caffe_proto import weights
stored = weights.load({weights!r})
matrices = []
for name in stored:
    w = stored[name][0]
    if w.ndim == 4:
        o, i, h, k = w.shape
        matrices.append(np.asarray(w, np.float64).transpose(1, 2, 3, 0).reshape(i * h, k * o))
started = time.perf_counter()
for matrix in matrices:
    scipy.linalg.svd(matrix, full_matrices=False)
print(time.perf_counter() - started)
"""


def svds(root: str, weights: Path) -> float:
    """Seconds that SciPy's SVDs of the thirteen V/H matrices take."""
    code = _SVDS.format(root=root, weights=str(weights))
    return float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )


def ours(root: str, net: Path, weights: Path, folder: Path) -> tuple[float, float]:
    """Seconds and peak MiB of the whole command."""
    command = [sys.executable, "-m", "lra", "decompose", str(net), str(weights), "-o", str(folder / "out")]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--speedup", "4", "--scheme", "spatial"], cwd=root, stdout=subprocess.DEVNULL
    )
    _, status, usage = os_wait(process)
    if status:
        raise SystemExit(f"decompose failed with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def os_wait(process: subprocess.Popen[bytes]) -> tuple[int, int, resource.struct_rusage]:
    """Wait for one process and its own resource usage."""
    import os

    return os.wait4(process.pid, 0)


def main() -> int:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    root = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        net, weights = vgg.write(folder)
        size = weights.stat().st_size / 2**20
        bare, whole, peak = [], [], []
        for _ in range(runs):
            bare.append(svds(root, weights))
            seconds, memory = ours(root, net, weights, folder)
            whole.append(seconds)
            peak.append(memory)
    scipy_s, ours_s, memory = map(statistics.median, (bare, whole, peak))
    print(f"SciPy, 13 SVDs alone      {scipy_s:8.2f} s")
    print(
        f"decompose, everything     {ours_s:8.2f} s   {ours_s / scipy_s:.2f} times the SVDs (target: at most 4)"
    )
    print(
        f"peak memory               {memory:8.0f} MiB {memory / size:.2f} times the {size:.0f} MiB caffemodel (target: under 2.5)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
