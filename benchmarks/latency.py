"""Times of whole nets as the table of measured layers adds them up, against the clock.

Run: ``python benchmarks/latency.py [--nets vgg_16 alexnet ...] [--threads 2] [--runs 20] [--table FILE]``. Random
weights. Every convolution that can be is replaced, by a channel-wise or a spatial pair, at a quarter, a half and
three quarters of the ranks that save MACs; both nets run in turn, the median of their ratios counts. The target:
predicted within 10 % of measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plans
from caffe_proto.model import load
from caffe_proto.runtime import Engine
from lra.latency import Latency
from lra.schemes.base import Scheme
from lra.targets import Target, find

MODELS = Path(__file__).resolve().parents[1] / "models"
NETS = ("vgg_16", "alexnet", "resnet_18", "googlenet", "squeezenet_v1.1")
SCHEMES = plans.named("auto")
_SHARES = (0.25, 0.5, 0.75)


def choose(
    latency: Latency, targets: list[Target], number: int, share: float
) -> dict[str, tuple[Target, Scheme, int, float]]:
    """For every layer with options its ``number``-th scheme, at a share of its ranks: scheme, rank, seconds."""
    found = {}
    for target in targets:
        schemes = plans.suited(target, SCHEMES)
        scheme = schemes[min(number, len(schemes) - 1)]
        options = latency.options(target, scheme)
        if options:
            found[target.name] = (target, scheme, *options[min(len(options) - 1, int(share * len(options)))])
    return found


def compare(name: str, engine: Engine, runs: int, table: Path) -> list[float]:
    """Print a net's lines; the relative errors of the predictions."""
    found = find(load(MODELS / name / "deploy.prototxt"))
    targets = plans.convolutions(found)
    latency = Latency(found, engine, table)
    started = time.perf_counter()
    latency.measure(targets, {target.name: plans.suited(target, SCHEMES) for target in targets})
    first = time.perf_counter() - started
    started = time.perf_counter()
    latency.measure(targets, {target.name: plans.suited(target, SCHEMES) for target in targets})
    again = time.perf_counter() - started
    errors = []
    for number, kind in enumerate(("channels", "spatial")):
        for share in _SHARES:
            chosen = choose(latency, targets, number, share)
            predicted = latency.predict((one[0], one[3]) for one in chosen.values()) / latency.net
            chains = {
                name: (target, scheme.structure(target.shape, target.geometry, rank))
                for name, (target, scheme, rank, _) in chosen.items()
            }
            before, after = latency.trial(chains, runs)
            errors.append(predicted * before / after - 1)
            print(
                f"{name:16} {kind:8} {share:4.2f}  predicted {1 / predicted:5.2f} x faster, "
                f"measured {before / after:5.2f} x ({1e3 * before:.2f} -> {1e3 * after:.2f} ms)  {errors[-1]:+6.1%}"
            )
    print(
        f"{name:16} table built in {first:.1f} s, the second time {again:.2f} s; noise {latency.noise:.1%}"
        + (f"; {latency.doubt}" if latency.doubt else "")
    )
    return errors


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = asked.table or Path(folder) / "latencies.json"
        errors = [
            error for name in asked.nets for error in compare(name, Engine(asked.threads), asked.runs, table)
        ]
    print(f"largest error {max(map(abs, errors)):.1%} (target: at most 10 %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
