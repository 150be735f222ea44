"""Which of onnxruntime's session options make a net faster: each beside the options that we use, in one run.

    python benchmarks/session_options.py [NET] [--threads 1 2] [--runs 15] [--speedup 4]

NET is a folder of ``models/`` (random weights), as it is and decomposed (pairs of V and H, every layer as much faster).
Every session runs once in every round, in random order, and none of them spins; the ratios to ours are medians, with
quartiles. Ours: all graph optimizations, memory pattern and arena as onnxruntime has them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lra
from caffe_proto.model import load
from caffe_proto.onnx_export import Request, draw, to_onnx
from caffe_proto.runtime import Engine, options

MODELS = Path(__file__).resolve().parents[1] / "models"
Change = Callable[[onnxruntime.SessionOptions], object]
LEVELS = onnxruntime.GraphOptimizationLevel
CHANGES: dict[str, Change] = {
    "ours": lambda _made: None,
    "no NCHWc layout": lambda made: setattr(made, "graph_optimization_level", LEVELS.ORT_ENABLE_EXTENDED),
    "no fusion": lambda made: setattr(made, "graph_optimization_level", LEVELS.ORT_ENABLE_BASIC),
    "denormals as zero": lambda made: made.add_session_config_entry("session.set_denormal_as_zero", "1"),
    "no memory pattern": lambda made: setattr(made, "enable_mem_pattern", False),
    "no memory reuse": lambda made: setattr(made, "enable_mem_reuse", False),
    "no arena": lambda made: setattr(made, "enable_cpu_mem_arena", False),
    "no prepacking": lambda made: made.add_session_config_entry("session.disable_prepacking", "1"),
    "parallel execution": lambda made: setattr(
        made, "execution_mode", onnxruntime.ExecutionMode.ORT_PARALLEL
    ),
    "dynamic blocks": lambda made: made.add_session_config_entry("session.dynamic_block_base", "4"),
}


def seconds(source: bytes, threads: int, runs: int) -> dict[str, list[float]]:
    """Times of every variant's runs."""
    sessions = {}
    for name, change in CHANGES.items():
        made = options(Engine(threads, spin=False))
        change(made)
        sessions[name] = onnxruntime.InferenceSession(source, made, providers=["CPUExecutionProvider"])
    one = sessions["ours"].get_inputs()[0]
    rng = np.random.default_rng(0)
    feeds = {one.name: rng.normal(size=one.shape).astype(np.float32)}
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for run in range(runs + 1):
        for name in rng.permutation(list(sessions)):
            started = perf_counter()
            sessions[name].run(None, feeds)
            if run:
                found[name].append(perf_counter() - started)
    return found


def main() -> int:
    """Print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("net", nargs="?", default="vgg_16")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--speedup", type=float, default=4.0)
    o = parser.parse_args()
    model = load(MODELS / o.net / "deploy.prototxt")
    plan = lra.make_plan(model, scheme="spatial", speedup=o.speedup, selection="uniform")
    changed, _ = lra.apply(plan, model)
    nets = {o.net: model, f"{o.net}, {o.speedup:g}x": changed}
    for threads in o.threads:
        for name, net in nets.items():
            source = to_onnx(draw(net, Request(random_seed=0))).SerializeToString()
            found = seconds(source, threads, o.runs)
            ours = np.array(found["ours"])
            print(f"{name}, {threads} threads: {1e3 * np.median(ours):.2f} ms with our options")
            for what, times in found.items():
                if what != "ours":
                    low, middle, high = np.percentile(ours / np.array(times), (25, 50, 75))
                    print(f"  {what:20} {middle:.2f}x  ({low:.2f} to {high:.2f})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
