"""Groups of a ResNet-50 and 30 % of every group removed, beside Torch-Pruning on the same net in torch.

    python benchmarks/torch_pruning.py [--runs 3 --rate 0.3]

Needs the packages torch and torch-pruning. Both start from random weights in memory and take the filters of smallest
norm, coupled layers as one. "groups" is finding all of them: ours from the prototxt, theirs from a traced forward pass
at 224 x 224. The channel counts must be equal, layer by layer. Medians, one thread, runs alternate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from caffe_proto import binding, net
from caffe_proto.graph import build
from caffe_proto.model import Model
from caffe_proto.shape_inference import infer
from caffe_proto.weights import NewEntry, Weights
from hrank import planner
from hrank.applier import apply
from hrank.coupling import find
from hrank.planner import Amount, Limits
from hrank.rates import prunable

ROOT = Path(__file__).resolve().parents[1]
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def torch_net() -> Any:
    """He et al.'s ResNet-50 with the stride on the 3 x 3, and 1,000 classes."""
    from torch import nn

    class Block(nn.Module):
        """1 x 1, 3 x 3, 1 x 1 and the shortcut."""

        def __init__(self, read: int, width: int, stride: int) -> None:
            super().__init__()
            sizes = ((read, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
            self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
            self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
            self.short = (
                nn.Sequential(nn.Conv2d(read, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
                if stride > 1 or read != 4 * width
                else None
            )

        def forward(self, x: Any) -> Any:
            """Its sum behind ReLU."""
            y = x
            for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
                y = norm(conv(y))
                y = y.relu() if i < 2 else y
            return (y + (x if self.short is None else self.short(x))).relu()

    layers: list[Any] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    read = 64
    for stage, (width, depth) in enumerate(STAGES):
        for i in range(depth):
            layers.append(Block(read, width, 2 if stage and not i else 1))
            read = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, 1000)).eval()


def caffe_net() -> Model:
    """The same net of models/, with random weights."""
    parsed = net.parse((ROOT / "models" / "resnet_50" / "deploy.prototxt").read_text(encoding="utf-8"))
    shaped = infer(build(parsed))
    blobs = binding.random(shaped)
    return Model(
        parsed, Weights([NewEntry(shaped.graph.nodes[i].name, tuple(found)) for i, found in blobs.items()])
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and what it gives."""
    started = perf_counter()
    made = work()
    return perf_counter() - started, made


def ours(model: Model, rate: float) -> tuple[float, float, list[int]]:
    """Seconds for groups, for pruning, and the channels of every convolution."""
    groups, coupling = timed(lambda: find(model))

    def prune() -> Model:
        layers = prunable(coupling, coupled=True)
        sizes = planner.sizes(
            coupling, Amount(by_layer=dict.fromkeys(layers, rate), grammar="hrankplus"), Limits(coupled=True)
        )
        names = planner.scored_layers(coupling, sizes)
        scores, reasons = planner.scores("l1", planner.evidence(model, names, None, 0))
        return apply(planner.choose(coupling, sizes, scores, reasons), model)[0]

    pruning, pruned = timed(prune)
    assert pruned.weights is not None
    convs = [node.name for node in coupling.shaped.graph.nodes if node.layer.type == "Convolution"]
    return groups, pruning, sorted(len(pruned.weights[name][0]) for name in convs)


def theirs(rate: float) -> tuple[float, float, list[int]]:
    """The same by Torch-Pruning."""
    import torch

    tp = import_module("torch_pruning")
    model, x = torch_net(), torch.zeros(1, 3, 224, 224)

    def group() -> list[Any]:
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        return list(graph.get_all_groups(ignored_layers=[model[-1]]))

    groups, _ = timed(group)

    def prune() -> None:
        importance = tp.importance.GroupMagnitudeImportance(p=1)
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=rate, ignored_layers=[model[-1]]).step()

    pruning, _ = timed(prune)
    return (
        groups,
        pruning,
        sorted(one.out_channels for one in model.modules() if isinstance(one, torch.nn.Conv2d)),
    )


def main() -> int:
    """Print a row each; status 1 where the counts differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.3)
    o = parser.parse_args()
    own = Path(__file__).resolve().parent  # where this file bears the package's name
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != own]
    try:
        import torch

        tp = import_module("torch_pruning")
    except ImportError as error:
        print(f"needs torch and torch-pruning: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    model = caffe_net()
    found = [(ours(model, o.rate), theirs(o.rate)) for _ in range(o.runs)]
    for position, name in enumerate(("ours", f"Torch-Pruning {tp.__version__}")):
        seconds = np.array([[one[position][0], one[position][1]] for one in found])
        groups, pruning = (median(column.tolist()) for column in seconds.T)
        print(f"{name:22} groups {1000 * groups:8.0f} ms, prune {o.rate:.0%} {1000 * pruning:8.0f} ms")
    first, second = (side[2] for side in found[-1])
    differ = sum(a != b for a, b in zip(first, second, strict=True))
    print(
        f"{len(first)} convolutions, {differ} with other channel counts: {sum(first):,} and {sum(second):,} in all"
    )
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
