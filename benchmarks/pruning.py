"""What a pruned net keeps, by criterion, rate and repair, before and after a short fine-tuning; how stable the ranks are.

    python benchmarks/pruning.py NET [--rates 0.2,0.4,0.6] [--criteria rank,l1] [--seeds 3] [--others 5000]
                                 [--how none,bn,bias,lsq] [--finetune ITERATIONS [--device cuda]]
                                 [--shared ../shared] [--append FILE]
    python benchmarks/pruning.py NET --stability [--batches 100,500]
    python benchmarks/pruning.py --table --append FILE

The convolutions that share their channels with no other lose that part of their filters. Top-1 is that on test images, agreement how often
the original names the same class on training images that nothing was measured on. Criteria are measured, and repairs made, on
2,000 training images, drawn once by a fixed seed. "random" is the mean over seeds, the range behind it. One thread.
With ``--append`` every row goes into a file of JSON lines at once, and rows that it has are not measured again.
``--how`` names the columns to measure. With ``--finetune`` also "tuned", so many iterations from the net as pruned,
and "lsq+tuned" from the repaired one (`benchmarks/pruned_training.py`); BatchNorm is estimated again behind both.
``--stability`` correlates (Spearman) the mean ranks of a layer's filters over disjoint parts of those images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from time import perf_counter

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lra.repair
from benchmarks.real_nets import NETS, THREADS, Bench, bench, numbers, report
from caffe_proto.errors import FileError, UsageError
from caffe_proto.model import Model
from hrank import planner, repair
from hrank.applier import apply
from hrank.coupling import Coupling, find, removed_places
from hrank.criteria import CRITERIA, Evidence
from hrank.measure import measure
from hrank.plan import Plan
from hrank.planner import Amount
from hrank.rates import prunable

ROOT = Path(__file__).resolve().parents[1]
REPAIRS = ("none", "bn", "bias", "lsq")
TUNED = ("tuned", "lsq+tuned")
Row = dict[str, str | int | float]
Tune = Callable[[Plan, Model], Model]


def evidence(run: Bench, coupling: Coupling, layers: list[str], seed: int = 0) -> dict[str, Evidence]:
    """Everything known of the filters."""
    images = _images(run)
    measured = measure(run.model, images, layers=layers, nuclear=True, threads=THREADS)
    return planner.evidence(run.model, layers, measured, seed)


def _images(run: Bench) -> np.ndarray:
    (images,) = run.calibration.images.values()
    return images


def changed(
    run: Bench, coupling: Coupling, plan: Plan, pruned: Model, how: Sequence[str], tune: Tune | None
) -> Iterator[tuple[str, Model]]:
    """The pruned net under each of these repairs and trainings that the net allows."""
    images = _images(run)
    norms = any(node.layer.type == "BatchNorm" for node in coupling.shaped.graph.nodes)
    if "none" in how:
        yield "none", pruned
    if "bn" in how and norms:
        yield "bn", repair.reestimate(pruned, images, threads=THREADS).model
    if "tuned" in how and tune is not None:
        yield "tuned", tune(plan, pruned)
    if not {"bias", "lsq", "lsq+tuned"} & set(how):
        return
    biased = repair.compensate(plan, run.model, pruned, images, threads=THREADS)
    if "bias" in how:
        yield "bias", biased.model
    if not {"lsq", "lsq+tuned"} & set(how):
        return
    gone = coupling.removed(plan.keep)
    rows = {name: ~removed_places(gone, ids) for name, ids in coupling.filters.items()}
    fitted = lra.repair.refit(run.model, pruned, rows, biased.changed, run.calibration).model
    if "lsq" in how:
        yield "lsq", fitted
    if "lsq+tuned" in how and tune is not None:
        yield "lsq+tuned", tune(plan, fitted)


def measured(
    name: str, run: Bench, coupling: Coupling, rates: list[float], criteria: list[str], seeds: int,
    how: Sequence[str], known: set[tuple[str | int | float, ...]], tune: Tune | None, iterations: int,
) -> Iterator[Row]:  # fmt: skip
    """A row for each criterion, rate, seed, and repair or training, as far as it is not known."""
    layers = prunable(coupling)
    facts = evidence(run, coupling, layers)
    for rate in rates:
        sizes = planner.sizes(coupling, Amount(by_layer=dict.fromkeys(layers, rate)))
        for criterion in criteria:
            for seed in range(seeds if criterion == "random" else 1):
                left = [one for one in how if (name, criterion, rate, seed, one) not in known]
                if not left:
                    continue
                own = (
                    planner.evidence(run.model, layers, None, 1000 * seed) if criterion == "random" else facts
                )
                scores, reasons = planner.scores(criterion, own)
                if reasons:
                    continue
                plan = planner.choose(coupling, sizes, scores, reasons)
                pruned, about = apply(plan, run.model)
                started = perf_counter()
                for what, model in changed(run, coupling, plan, pruned, left, tune):
                    seconds = perf_counter() - started
                    kept = run.measure(model)
                    yield {
                        "net": name, "criterion": criterion, "rate": rate, "seed": seed, "repair": what,
                        "top1": kept.top1.value, "agreement": kept.agreement.value, "original": run.original.value,
                        "macs": about.macs[0] / about.macs[1], "seconds": round(seconds, 1),
                        **({"iterations": iterations} if what in TUNED else {}),
                    }  # fmt: skip
                    started = perf_counter()


def stability(run: Bench, sizes: list[int]) -> Iterator[str]:
    """Spearman's correlation of mean ranks over disjoint parts of the images: a Markdown table, a row a size."""
    layers = prunable(find(run.model))
    images = _images(run)
    yield "| images a part | pairs | lowest | median | " + " | ".join(layers) + " |"
    yield "|" + "---|" * (4 + len(layers))
    for size in sizes:
        starts = range(0, len(images) - size + 1, size)
        parts = [
            measure(run.model, images[start : start + size], layers=layers, threads=THREADS)
            for start in list(starts)[:4]
        ]
        by_layer = []
        for layer in layers:
            means = [part.sums[layer].ranks.mean for part in parts]
            by_layer.append(min(spearmanr(a, b).statistic for a, b in combinations(means, 2)))
        pairs = len(parts) * (len(parts) - 1) // 2
        cells = " | ".join(f"{value:.3f}" for value in by_layer)
        yield f"| {size} | {pairs} | {min(by_layer):.3f} | {np.median(by_layer):.3f} | {cells} |"


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as Markdown: a table a net and rate, top-1 / agreement in per cent."""
    for net, rate in dict.fromkeys((row["net"], row["rate"]) for row in rows):
        here = [row for row in rows if row["net"] == net and row["rate"] == rate]
        hows = [how for how in (*REPAIRS, *TUNED) if any(row["repair"] == how for row in here)]
        first = here[0]
        yield f"\n**{net}**, {rate:.0%} of the filters, MACs {first['macs']:.2f}x, original top-1 {first['original']:.1%}\n"
        yield "| criterion | " + " | ".join(hows) + " |"
        yield "|---|" + "---|" * len(hows)
        for criterion in dict.fromkeys(row["criterion"] for row in here):
            cells = [
                _cell([row for row in here if row["criterion"] == criterion and row["repair"] == how])
                for how in hows
            ]
            yield f"| {criterion} | " + " | ".join(cells) + " |"


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "-"
    top1, agreement = ([float(row[key]) for row in rows] for key in ("top1", "agreement"))
    said = f"{100 * np.mean(top1):.1f} / {100 * np.mean(agreement):.1f}"
    return said if len(rows) == 1 else f"{said} ({100 * min(top1):.1f}-{100 * max(top1):.1f})"


def _tuner(name: str, run: Bench, coupling: Coupling, shared: Path, iterations: int, device: str) -> Tune:
    """Training; torch is not needed without."""
    from benchmarks.pruned_training import Tuner

    return Tuner(name, run, coupling, shared, iterations, device)


def _read(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    """Measure and print a row a line, or print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("net", nargs="?", choices=list(NETS))
    parser.add_argument("--rates", type=numbers, default=[0.2, 0.4, 0.6])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    parser.add_argument("--others", type=int, default=5000)
    parser.add_argument("--how")
    parser.add_argument("--finetune", type=int, metavar="ITERATIONS")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--append", type=Path)
    parser.add_argument("--stability", action="store_true")
    parser.add_argument("--batches", type=numbers, default=[100, 500])
    parser.add_argument("--table", action="store_true")
    o = parser.parse_args()
    rows = _read(o.append)
    if o.table:
        print("\n".join(table(rows)))
        return 0
    if o.net is None:
        raise UsageError("NET is missing", hint="give one of " + ", ".join(NETS))
    if not o.shared.is_dir():
        raise FileError("the folder of nets and images is not there", path=o.shared)
    run = bench(o.net, o.shared, others=o.others)
    if o.stability:
        print("\n".join(stability(run, [int(size) for size in o.batches])))
        return 0
    how = o.how.split(",") if o.how else [*REPAIRS, *(TUNED if o.finetune else ())]
    if unknown := set(how) - {*REPAIRS, *TUNED}:
        raise UsageError(f"--how: there is no {min(unknown)}", hint="known: " + ", ".join((*REPAIRS, *TUNED)))
    if set(how) & set(TUNED) and not o.finetune:
        raise UsageError("--how tuned and lsq+tuned need --finetune ITERATIONS")
    coupling = find(run.model)
    tune = _tuner(o.net, run, coupling, o.shared, o.finetune, o.device) if o.finetune else None
    known = {tuple(row[key] for key in ("net", "criterion", "rate", "seed", "repair")) for row in rows}
    made = measured(
        o.net, run, coupling, o.rates, o.criteria.split(","), o.seeds, how, known, tune, o.finetune or 0
    )
    for row in made:
        print(json.dumps(row), flush=True)
        if o.append is not None:
            with o.append.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(report(main))
