"""What a decomposed net keeps, by recipe, speed-up and rank selection, without fine-tuning.

    python benchmarks/accuracy.py NET [--schemes spatial,auto] [--speedups 1.5,2,3,4] [--selections exact,uniform]
                                  [--shared ../shared] [--append FILE] [--images 2000]
    python benchmarks/accuracy.py --table --append FILE

Top-1 is that on test images, agreement how often the original names the same class on training images that were not
calibrated on (SqueezeNet: both on the half of its images that was not). Speed-ups count the MACs of convolutions.
Recipes fit to 2,000 training images (SqueezeNet: 250), drawn once by a fixed seed, or take the weights alone; "auto"
also fits the layers that it leaves whole. One thread.
With ``--append`` every row goes into a file of JSON lines at once, and rows that it has are not measured again;
``--table`` prints them as Markdown. Seconds are of planning and applying; sampling the original net is done before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lra
from benchmarks.real_nets import NETS, Bench, bench, numbers, report
from caffe_proto.errors import FileError, UsageError
from caffe_proto.evaluation import Share
from lra.targets import Spectra

ROOT = Path(__file__).resolve().parents[1]
SPEEDUPS = {"squeezenet": [1.2, 1.5]}
SELECTIONS = ("exact", "measured", "uniform", "paper")
ORIGINAL = "original"


@dataclass(frozen=True)
class Recipe:
    """A scheme, and how it is fitted to images; without a solver the weights alone decide."""

    scheme: str
    solver: str | None = None
    selections: tuple[str, ...] = tuple(name for name in SELECTIONS if name != "measured")


RECIPES = {
    "pca, weights": Recipe("pca"),
    "spatial, weights": Recipe("spatial"),
    "pca": Recipe("pca", "asymmetric"),
    "spatial": Recipe("spatial", "asymmetric", SELECTIONS),
    "response linear": Recipe("response", "linear"),
    "response symmetric": Recipe("response", "symmetric"),
    "response asymmetric": Recipe("response", "asymmetric", SELECTIONS),
    "asymmetric-3d": Recipe("asymmetric-3d", "asymmetric", SELECTIONS),
    "auto": Recipe("auto", "asymmetric", ("exact",)),
}
NAMES = {name.replace(", ", "-").replace(" ", "-"): name for name in RECIPES}


@dataclass(frozen=True)
class Row:
    """One measurement; ``refused`` says why there is none."""

    net: str
    images: int
    recipe: str
    selection: str
    speedup: float
    top1: Share | None = None
    agreement: Share | None = None
    reached: float | None = None
    seconds: float | None = None
    refused: str | None = None

    @property
    def key(self) -> tuple[str, int, str, str, float]:
        """What was asked for."""
        return self.net, self.images, self.recipe, self.selection, self.speedup

    def said(self) -> str:
        """The row for a reader."""
        what = f"{self.net}  {self.recipe:<20}{self.selection:<8}{self.speedup:4g}x  "
        if self.top1 is None:
            return what + (self.refused or "")
        parts = [f"top-1 {_value(self.top1)}"]
        if self.agreement is not None:
            parts.append(f"agreement {_value(self.agreement)}")
        if self.reached is not None and self.seconds is not None:
            parts = [f"reached {self.reached:.2f}x", *parts, f"{self.seconds:.1f} s"]
        return what + "  ".join(parts)


def _value(share: Share) -> str:
    return f"{share.value:.4f} ± {share.error:.4f}"


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. Raises FileError on a line that is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            stored = json.loads(line)
            shares = {name: Share(**stored[name]) for name in ("top1", "agreement") if stored[name]}
            rows.append(Row(**(stored | shares)))
        except (ValueError, KeyError, TypeError):
            raise FileError(
                "is no row of this program", path=path, line=number, hint="remove the line"
            ) from None
    return rows


def write(path: Path, row: Row) -> None:
    """Append one row."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def wanted(
    net: str, images: int, recipes: Sequence[str], selections: Sequence[str], speedups: Sequence[float]
) -> Iterator[Row]:
    """The rows to measure, cheap ones first, without figures: the original, then speed-up by speed-up."""
    yield Row(net, images, ORIGINAL, "", 1.0)
    for speedup in speedups:
        for recipe in recipes:
            for selection in selections:
                if selection in RECIPES[recipe].selections:
                    yield Row(net, images, recipe, selection, speedup)


def measured(here: Bench, row: Row) -> Row:
    """A row with its figures."""
    asked = (row.net, row.images, row.recipe, row.selection, row.speedup)
    if row.recipe == ORIGINAL:
        return Row(*asked, top1=here.original)
    recipe = RECIPES[row.recipe]
    images = None if recipe.solver is None else here.calibration
    here.calibration.fitted.clear()  # an equal plan would cost nothing
    started = perf_counter()
    spectra = Spectra(here.found)
    try:
        plan = lra.make_plan(
            here.model, scheme=recipe.scheme, speedup=row.speedup, scope="conv", selection=row.selection,
            found=here.found, spectra=spectra, images=images,
            solver=recipe.solver or "asymmetric",
        )  # fmt: skip
    except UsageError as error:
        return Row(*asked, refused=str(error))
    changed, report = lra.apply(plan, here.model, found=here.found, spectra=spectra, images=images)
    seconds = perf_counter() - started
    kept = here.measure(changed)
    reached = report.conv_macs[0] / report.conv_macs[1]
    return Row(*asked, kept.top1, kept.agreement, round(reached, 4), round(seconds, 2))


def tables(rows: Sequence[Row]) -> str:
    """Markdown, a table for each net: recipes down, speed-ups across, selections side by side; ``top-1/agreement``."""
    groups = dict.fromkeys((row.net, row.images) for row in rows)
    return "\n".join(_table([row for row in rows if (row.net, row.images) == group]) for group in groups)


def _table(rows: Sequence[Row]) -> str:
    original = next((row.top1 for row in rows if row.recipe == ORIGINAL), None)
    rows = [row for row in rows if row.recipe != ORIGINAL]
    order = {name: place for place, name in enumerate(SELECTIONS)}
    columns = sorted({(row.speedup, order[row.selection], row.selection) for row in rows})
    found = {(row.recipe, row.speedup, row.selection): row for row in rows}
    lines = ["| recipe | " + " | ".join(f"{speedup:g}x {name}" for speedup, _, name in columns) + " | s |"]
    lines.append("|---|" + "---|" * (len(columns) + 1))
    for recipe in RECIPES:
        cells = [_cell(found.get((recipe, speedup, name))) for speedup, _, name in columns]
        times = [row.seconds for row in rows if row.recipe == recipe and row.seconds is not None]
        if any(cells):
            lines.append(
                f"| {recipe} | " + " | ".join([*cells, f"{median(times):.0f}" if times else ""]) + " |"
            )
    return "\n".join([_heading(original, rows), "", *lines, ""])


def _heading(original: Share | None, rows: Sequence[Row]) -> str:
    """What the figures are of, and their largest standard errors."""
    one = next((row for row in rows if row.top1 and row.agreement), None)
    heading = f"{rows[0].net}, {rows[0].images} images" if rows else ""
    if original is not None:
        heading += f", original {original.value:.3f}"
    if one is None or one.top1 is None or one.agreement is None:
        return heading
    errors = [
        max(share.error for row in rows if (share := getattr(row, which))) for which in ("top1", "agreement")
    ]
    return (
        f"{heading}; top-1 on {one.top1.n:,} (standard errors up to {errors[0]:.3f}), "
        f"agreement on {one.agreement.n:,} (up to {errors[1]:.3f})"
    )  # fmt: skip


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.top1 is None or row.agreement is None or row.reached is None:
        return "refused"
    more = f" ({row.reached:.2f}x)" if row.reached > 1.02 * row.speedup else ""
    return f"{row.top1.value:.3f}/{row.agreement.value:.3f}{more}"


def _listed(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f'"{name}" is none of {", ".join(known)}')
    return names


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("net", nargs="?", choices=NETS)
    parser.add_argument("--schemes", type=lambda text: _listed(text, list(NAMES)), default=list(NAMES))
    parser.add_argument("--speedups", type=numbers, help="default 1.5,2,3,4; of SqueezeNet 1.2,1.5")
    parser.add_argument(
        "--selections", type=lambda text: _listed(text, SELECTIONS), default=["exact", "uniform"]
    )
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--append", type=Path, metavar="FILE")
    parser.add_argument(
        "--images", type=int, help="to calibrate on; default and most 2,000, of SqueezeNet 250"
    )
    parser.add_argument("--table", action="store_true")
    o = parser.parse_args()
    if o.table and o.append is None:
        parser.error("--table reads the file of --append")
    if not o.table and o.net is None:
        parser.error(f"give a net: {', '.join(NETS)}")
    return o


def main() -> int:
    """Measure and print the rows, or print the tables."""
    o = arguments()
    stored = read(o.append) if o.append is not None else []
    if o.table:
        print(tables([row for row in stored if o.net in (None, row.net)]))
        return 0
    images = NETS[o.net].calibration if o.images is None else o.images
    speedups = o.speedups or SPEEDUPS.get(o.net, [1.5, 2, 3, 4])
    have = {row.key for row in stored}
    rows = wanted(o.net, images, [NAMES[name] for name in o.schemes], o.selections, speedups)
    missing = [row for row in rows if row.key not in have]
    if not missing:
        return 0
    here = bench(o.net, o.shared, images)
    try:
        if any(row.recipe != ORIGINAL and RECIPES[row.recipe].solver for row in missing):
            print(f"{o.net}  sampling the original net: {here.sample():.1f} s", flush=True)
        for row in missing:
            done = measured(here, row)
            print(done.said(), flush=True)
            if o.append is not None:
                write(o.append, done)
    finally:
        here.calibration.stage.close()
    return 0


if __name__ == "__main__":
    sys.exit(report(main))
