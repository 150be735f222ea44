"""CPU time of ``caffe-lra info`` on a GoogLeNet-sized prototxt: ``python benchmarks/info.py NET [--runs 10]``.

Compared, in the same run, with a bare interpreter that imports numpy and protobuf only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cpu_seconds(*command: str) -> float:
    """User and system time of one process."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Measure and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("net")
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    net = str(Path(given.net).resolve())
    ours, bare = [], []
    for _ in range(given.runs):
        ours.append(cpu_seconds("-m", "lra", "info", net))
        bare.append(cpu_seconds("-c", "import numpy, google.protobuf.message_factory"))
    mine, floor = statistics.median(ours), statistics.median(bare)
    print(f"caffe-lra info {Path(net).name}    {mine:.3f} s of CPU (target: under 0.5)")
    print(f"python, numpy and protobuf alone  {floor:.3f} s    ratio {mine / floor:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
