"""How much of the PCA energy of one layer's responses a net needs: each convolution alone is replaced.

    python benchmarks/energy.py NET [--energies 0.8,0.9,0.95,0.98,0.99,0.995,0.999] [--shared ../shared] [--out docs]
                                [--images 2000] [--others 2000]

The layer becomes a pair of the response scheme by a linear fit, at the smallest rank that retains the energy; all
others stay as they are. Writes OUT/energy_NET.csv, row by row, so that an interrupted run goes on where it stopped
(remove the file to measure anew), and from it OUT/energy_NET.svg where matplotlib is installed. The table printed
gives, by layer from shallow to deep, the share of images of another class than the original names.

Reference: Zhang et al. 2015, arXiv:1505.06798, figure of PCA accumulative energy and accuracy.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lra
from benchmarks.real_nets import NETS, Bench, Kept, bench, numbers, report
from caffe_proto import files
from caffe_proto.errors import FileError
from lra.targets import Target

ROOT = Path(__file__).resolve().parents[1]
ENERGIES = "0.8,0.9,0.95,0.98,0.99,0.995,0.999"


@dataclass(frozen=True)
class Point:
    """One layer at one energy; ``changed`` is the share of images of another class; standard errors."""

    images: int
    others: int
    layer: str
    energy: float
    rank: int
    full_rank: int
    original: float
    top1: float
    top1_error: float
    changed: float
    changed_error: float

    @property
    def key(self) -> tuple[int, int, str, float]:
        """What was asked for."""
        return self.images, self.others, self.layer, self.energy

    def said(self) -> str:
        """The point for a reader."""
        rank = f"rank {self.rank}/{self.full_rank}"
        top1 = f"top-1 {self.top1:.4f} ± {self.top1_error:.4f}"
        changed = f"changed {self.changed:.4f} ± {self.changed_error:.4f}"
        return f"{self.layer:<24}{self.energy:<7g}{rank:<14}{top1}  {changed}"


def read(path: Path) -> list[Point]:
    """The points of a file; none where there is no file. Raises FileError where it holds other columns."""
    if not path.exists():
        return []
    kinds = {"images": int, "others": int, "rank": int, "full_rank": int, "layer": str}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [field.name for field in fields(Point)]:
            raise FileError("has other columns than this program writes", path=path, hint="remove it")
        return [Point(**{name: kinds.get(name, float)(text) for name, text in row.items()}) for row in reader]  # type: ignore[arg-type]


def write(path: Path, point: Point) -> None:
    """Append one point, behind a heading in a new file."""
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(point))


class Curves:
    """Measures points; energies of a layer that come to the same rank are measured once."""

    def __init__(self, here: Bench) -> None:
        self.here = here
        self._sampled = False
        self._kept: dict[tuple[str, int], Kept] = {}

    def point(self, target: Target, energy: float) -> Point:
        """One layer at one energy."""
        here = self.here
        if not self._sampled:
            here.sample()
            self._sampled = True
        plan = lra.make_plan(
            here.model, scheme="response", energy=energy, only=[target.name], images=here.calibration,
            solver="linear", even_if_slower=True, found=here.found,
        )  # fmt: skip
        (rank,) = plan.layers[target.name].ranks
        if (target.name, rank) not in self._kept:
            changed, _ = lra.apply(plan, here.model, images=here.calibration, found=here.found)
            self._kept[target.name, rank] = here.measure(changed)
        kept = self._kept[target.name, rank]
        top1, agreement = kept.top1, kept.agreement
        figures = (here.original.value, top1.value, top1.error, 1 - agreement.value, agreement.error)
        asked = (here.calibration.count, agreement.n, target.name, energy)
        return Point(*asked, rank, target.shape[0], *(round(one, 6) for one in figures))


def table(points: Sequence[Point]) -> str:
    """Markdown: layers down, shallow to deep, energies across; and the means of the shallow and the deep half."""
    layers = list(dict.fromkeys(point.layer for point in points))
    energies = sorted({point.energy for point in points})
    changed = {(point.layer, point.energy): point.changed for point in points}
    half = max(1, len(layers) // 2)
    rows = [(layer, [layer]) for layer in layers]
    rows += [(f"mean of the first {half}", layers[:half]), (f"mean of the last {half}", layers[-half:])]
    lines = ["| layer | " + " | ".join(f"{energy:g}" for energy in energies) + " |"]
    lines.append("|---|" + "---|" * len(energies))
    for name, group in rows:
        cells = [_mean([changed.get((layer, energy)) for layer in group]) for energy in energies]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4f}" if len(known) == len(values) else ""


def draw(points: Sequence[Point], net: str, path: Path) -> None:
    """One curve a layer, from dark (shallow) to light (deep); the same points give the same bytes."""
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("svg")
    from matplotlib import pyplot  # type: ignore[import-not-found]

    layers = list(dict.fromkeys(point.layer for point in points))
    with matplotlib.rc_context({"svg.hashsalt": net, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for place, layer in enumerate(layers):
            curve = sorted((point.energy, point.changed) for point in points if point.layer == layer)
            colour = pyplot.colormaps["viridis"](place / max(1, len(layers) - 1) * 0.9)
            axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, color=colour, label=layer)
        axes.set_title(f"{net}: one convolution at a time, from shallow (dark) to deep (light)")
        axes.set_xlabel("PCA energy of the layer's responses that is kept")
        axes.set_ylabel("images of another class than the original names")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=7)
        with files.writing([path]) as (temporary,):
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> int:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("net", choices=NETS)
    parser.add_argument("--energies", type=numbers, default=ENERGIES)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument(
        "--images", type=int, help="to calibrate on; default and most 2,000, of SqueezeNet 250"
    )
    parser.add_argument("--others", type=int, help="to compare classes on; default 2,000, of SqueezeNet 250")
    o = parser.parse_args()
    path = o.out / f"energy_{o.net}.csv"
    stored = {point.key: point for point in read(path)}
    others = min(2000, NETS[o.net].others) if o.others is None else o.others
    here = bench(o.net, o.shared, o.images, others)
    convolutions = [target for target in here.found.targets.values() if not target.dense]
    sizes = here.calibration.count, len(here.others)
    try:
        curves = Curves(here)
        for target in convolutions:
            for energy in o.energies:
                key = (*sizes, target.name, energy)
                if key not in stored:
                    stored[key] = curves.point(target, energy)
                    write(path, stored[key])
                    print(stored[key].said(), flush=True)
    finally:
        here.calibration.stage.close()
    points = [stored[*sizes, target.name, energy] for target in convolutions for energy in o.energies]
    print(f"\n{o.net}, original {here.original.value:.3f}, {len(here.others):,} images compared\n")
    print(table(points))
    if find_spec("matplotlib") is not None:
        draw(points, o.net, path.with_suffix(".svg"))
        print(f"wrote {path.with_suffix('.svg')}")
    return 0


if __name__ == "__main__":
    sys.exit(report(main))
