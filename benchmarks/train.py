"""Training with force, clipping and sparsity on real nets and images: ranks at energy 0.95, MACs and test accuracy.

    python benchmarks/train.py SECTION ... --work FOLDER [--seed N] [--shared ../shared]
    python benchmarks/train.py --table [--plot FILE.svg] --work FOLDER [FOLDER ...]

Sections: lenet (baseline, force at three strengths of L1 and L2), low_rank (LRA at energy 0.95 with and without, and
fine-tuning), start (force from a trained and from a random start), together (force, LRA and sparsity on one LeNet),
cifar (ConvNet with trained weights: force, LRA, fine-tuning), cifar_start (the same from random weights), cifar_more
(other forces, rank clipping), resnet (ResNet-20 with trained weights), resnet_low_rank (LRA of these, fine-tuning),
asymmetric (fine-tuning of an asymmetric 3-D net).
Every row is the outcome of ``caffe-lra`` commands, which are printed and kept with it in FOLDER/rows.jsonl; what is there
is not run again. One thread. Another seed needs another folder; the table of several folders has the mean of their
accuracies and the range, a row for each run that the first folder has. ``--plot``, where matplotlib is installed: accuracy
over the ranks that are left, a curve for each type of force, a point for each strength.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from caffe_proto.data.build import mean_bytes
from caffe_proto.files import writing
from caffe_proto.preprocess import read_mean

ROOT = Path(__file__).resolve().parents[1]
LENET = ROOT / "models" / "lenet" / "lenet_train_val.prototxt"
CIFAR = ROOT / "models" / "cifar10_full" / "train_val.prototxt"
FINETUNE = (
    'net: "{net}"\ntype: "SGD"\nbase_lr: {rate}\nlr_policy: "{policy}"\nmomentum: 0.9\nweight_decay: {decay}\n'
    "max_iter: {iterations}\ntest_iter: {tests}\ntest_interval: {iterations}\nrandom_seed: {seed}\nsolver_mode: CPU\n"
)
IMAGES = 30_000  # CIFAR-10 images to train on
STRENGTHS = {"l2": (0.0005, 0.001, 0.002), "l1": (0.0005, 0.001, 0.002)}
CIFAR_STRENGTHS = {"l2": (0.002, 0.005, 0.01), "l1": (0.002, 0.005, 0.01)}
RESNET_FORCES = ("none", "l2_0.001", "l2_0.0003", "l1_0.001")
MORE = {
    "repel": ("--force", "l2=-0.005"),
    "auto": ("--force", "l2", "--force-auto", "0.2"),
    "per_filter": ("--force", "l2=0.1", "--force-per-filter"),
}


class Runs:
    """The commands of one folder, and the rows that they gave."""

    def __init__(self, work: Path, shared: Path, seed: int = 0) -> None:
        self.work, self.data, self.path, self.seed = work, shared / "data", work / "rows.jsonl", seed
        work.mkdir(exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def caffe_lra(self, *args: str) -> Any:
        """What a command prints as JSON."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lra", *args, "--json"]
        made = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(made.stderr.strip())
        return json.loads(made.stdout)

    def row(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row by its name, measured where it is not there yet."""
        for row in self.rows:
            if row["name"] == name:
                return row
        started = perf_counter()
        row = {"name": name, **work(), "seconds": round(perf_counter() - started, 1)}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        return row

    def train(
        self, name: str, net: Path | str, iterations: int, rate: float, *options: str, decay: float = 0.0005,
        images: Sequence[str] = (), tests: int = 100, drop: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train a net; the row has test accuracy and ranks at the end, and the ranks at the start.

        Behind ``drop`` iterations the rate is a tenth.
        """

        def work() -> dict[str, Any]:
            solver = self.work / f"{name}.solver.prototxt"
            text = FINETUNE.format(
                net=net, rate=rate, decay=decay, iterations=max(iterations, 1), tests=tests, seed=self.seed,
                policy="fixed" if drop is None else "multistep",
            )  # fmt: skip
            solver.write_text(text + (f"gamma: 0.1\nstepvalue: {drop}\n" if drop is not None else ""))
            args = [
                "train",
                solver.name,
                "-o",
                name,
                "--max-iter",
                str(iterations),
                "--threads",
                "1",
                *images,
                *options,
            ]
            args += ["--watch-ranks", "0.95"] if iterations else []
            found = self.caffe_lra(*args)
            row = {
                "command": shown(args),
                "iterations": iterations,
                "accuracy": accuracy(found),
                "loss": found["loss"],
            }
            return row | (ranks(self.work / f"{name}.ranks.csv") if iterations else {})

        return self.row(name, work)

    def decompose(self, name: str, net: Path | str, weights: str, *options: str) -> dict[str, Any]:
        """Decompose a net; the row has ranks and MACs."""

        def work() -> dict[str, Any]:
            args = ["decompose", str(net), weights, "-o", name, "--threads", "1", *options]
            found = self.caffe_lra(*args)
            chosen = {layer["name"]: layer["ranks"] for layer in found["layers"]}
            return {
                "command": shown(args),
                "ranks": chosen,
                "speedup": found["speedup"],
                "params": found["params"],
            }

        return self.row(name, work)

    def mnist(self) -> tuple[str, ...]:
        """Options that give the images."""
        folder = self.data / "mnist"
        return (
            "--data", str(folder / "train-images-idx3-ubyte.gz"), "--test-data", str(folder / "t10k-images-idx3-ubyte.gz"),
        )  # fmt: skip

    def cifar(self) -> tuple[str, ...]:
        """The same; the mean goes to where the nets look for it."""
        folder = self.data / "cifar10"
        shutil.copyfile(folder / "mean.binaryproto", self.work / "cifar10_mean.binaryproto")
        return (
            "--data",
            str(folder / "data_batch_*.bin"),
            "--test-data",
            str(folder / "test_batch_first1000.bin"),
        )


def shown(args: Sequence[str]) -> str:
    """A command as the reader may give it."""
    text = " ".join(["caffe-lra", *args])
    return re.sub(r"/\S*/(models|data)/", r"\1/", text)


def accuracy(found: Any) -> float | None:
    """The test accuracy that a training ended with."""
    for test in found["tests"]:
        for name, value in test["outputs"].items():
            if "accuracy" in name.lower():
                return float(value)
    return None


def ranks(path: Path) -> dict[str, Any]:
    """The first and last row of a rank log."""
    with path.open(encoding="utf-8") as file:
        rows = [{key: int(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {"before": rows[0], "after": rows[-1]}


def lenet(runs: Runs) -> None:
    """Baseline; force at several strengths against fine-tuning without."""
    _forced(runs, "none")
    for kind, strengths in STRENGTHS.items():
        for one in strengths:
            _forced(runs, f"{kind}_{one:g}")


def low_rank(runs: Runs) -> None:
    """LRA at energy 0.95 of the LeNet that was fine-tuned plainly, and of two with force."""
    for name in ("none", "l2_0.001", "l1_0.001"):
        _low_rank(runs, name)


def _forced(runs: Runs, name: str) -> None:
    """The trained LeNet, 1,000 iterations on: "none", or the force's KIND_STRENGTH."""
    runs.row("lenet", lambda: _baseline(runs, runs.mnist()))
    force = () if name == "none" else ("--force", name.replace("_", "="), "--force-all")
    weights = ("--weights", "lenet_iter_2000.caffemodel")
    runs.train(f"lenet_{name}", LENET, 1000, 0.005, *weights, *force, images=runs.mnist())


def _baseline(runs: Runs, images: Sequence[str]) -> dict[str, Any]:
    args = [
        "train",
        str(ROOT / "models/lenet/lenet_solver.prototxt"),
        "--max-iter",
        "2000",
        "-o",
        "lenet",
        "--threads",
        "1",
    ]
    args += [*images, "--watch-ranks", "0.95", "--seed", str(runs.seed)]
    found = runs.caffe_lra(*args)
    tested = runs.train(
        "lenet_test", LENET, 0, 0.005, "--weights", "lenet_iter_2000.caffemodel", images=images
    )
    row = {"command": shown(args), "iterations": 2000, "accuracy": tested["accuracy"], "loss": found["loss"]}
    return row | ranks(runs.work / "lenet.ranks.csv")


def _low_rank(runs: Runs, force: str) -> str:
    """LRA of such a LeNet at energy 0.95, its accuracy at once, and after 500 iterations of fine-tuning; its name."""
    _forced(runs, force)
    shapes = ("--input-shape", "data=100,1,28,28", "--input-shape", "label=100")
    low = f"lenet_{force}_lra"
    trained = f"lenet_{force}_iter_1000.caffemodel"
    runs.decompose(low, LENET, trained, "--scheme", "pca", "--energy", "0.95", *shapes)
    weights = ("--weights", f"{low}.caffemodel")
    runs.train(f"{low}_test", f"{low}.prototxt", 0, 0.005, *weights, images=runs.mnist())
    runs.train(f"{low}_tuned", f"{low}.prototxt", 500, 0.005, *weights, images=runs.mnist())
    return low


def start(runs: Runs) -> None:
    """Force from a random start, at the force's and at all iterations of the trained start (2,000 + 1,000)."""
    force = ("--force", "l2=0.001", "--force-all")
    for iterations in (1000, 3000):
        runs.train(f"lenet_scratch_{iterations}", LENET, iterations, 0.005, *force, images=runs.mnist())


def together(runs: Runs) -> None:
    """Force, then LRA, then sparsity of filters and weights with removal, on one LeNet."""
    images, low = runs.mnist(), _low_rank(runs, "l2_0.001")
    weights = ("--weights", f"{low}_tuned_iter_500.caffemodel")
    sparsity = ("--sparsify", "filter=0.15", "--sparsify", "l1=0.003", "--remove")
    runs.train("lenet_together", f"{low}.prototxt", 500, 0.005, *weights, *sparsity, images=images)
    small = "lenet_together_iter_500_removed"
    stored = ("--weights", f"{small}.caffemodel")
    runs.train("lenet_together_test", f"{small}.prototxt", 0, 0.005, *stored, images=images)


def cifar(runs: Runs) -> None:
    """Force at three strengths of both kinds on the trained ConvNet, LRA at energy 0.95, and fine-tuning."""
    weights, given = _cifar(runs)
    runs.train("cifar_test", CIFAR, 0, 1e-3, *weights, **given)
    shapes = ("--input-shape", "data=100,3,32,32", "--input-shape", "label=100")
    for name in ("none", *(f"{kind}_{one:g}" for kind, some in CIFAR_STRENGTHS.items() for one in some)):
        force = () if name == "none" else ("--force", name.replace("_", "="), "--force-all")
        runs.train(f"cifar_{name}", CIFAR, 1000, 1e-3, *weights, *force, drop=700, **given)
        low = f"cifar_{name}_lra"
        trained = f"cifar_{name}_iter_1000.caffemodel"
        runs.decompose(low, CIFAR, trained, "--scheme", "pca", "--energy", "0.95", *shapes)
        stored = ("--weights", f"{low}.caffemodel")
        runs.train(f"{low}_test", f"{low}.prototxt", 0, 1e-3, *stored, **given)
        runs.train(f"{low}_tuned", f"{low}.prototxt", 500, 1e-3, *stored, drop=350, **given)


def cifar_start(runs: Runs) -> None:
    """Force on ConvNet from trained weights and from none, at equal iterations."""
    weights, given = _cifar(runs)
    strength = CIFAR_STRENGTHS["l2"][1]
    force = ("--force", f"l2={strength:g}", "--force-all")
    for name, from_ in (("trained", weights), ("scratch", ())):
        runs.train(f"cifar_start_{name}", CIFAR, 3000, 1e-3, *from_, *force, drop=2500, **given)


def cifar_more(runs: Runs) -> None:
    """300 iterations each. Filters that repel, a force that is a share of the gradient, one divided by the filters; rank clipping."""
    weights, given = _cifar(runs)
    for name, options in MORE.items():
        runs.train(f"cifar_{name}", CIFAR, 300, 1e-3, *weights, *options, "--force-all", drop=200, **given)
    shapes = ("--input-shape", "data=100,3,32,32", "--input-shape", "label=100")
    full = ("--scheme", "pca", "--energy", "1", "--even-if-slower")
    runs.decompose("cifar_full_rank", CIFAR, weights[1], *full, *shapes)
    clip = ("--clip-ranks", "0.95", "--clip-every", "100")
    for name, force in (
        ("clip", ()),
        ("clip_l2", ("--force", f"l2={CIFAR_STRENGTHS['l2'][0]:g}", "--force-all")),
    ):
        runs.train(
            f"cifar_{name}", "cifar_full_rank.prototxt", 300, 1e-3, "--weights", "cifar_full_rank.caffemodel", *clip,
            *force, drop=200, **given,
        )  # fmt: skip


def _cifar(runs: Runs) -> tuple[tuple[str, ...], dict[str, Any]]:
    trained = runs.data / "models" / "cifar_v2_yuvval" / "cifar10_full_iter_70000.caffemodel"
    return ("--weights", str(trained)), {"images": runs.cifar(), "tests": 10, "decay": 0.004}


def resnet(runs: Runs) -> None:
    """Force of both kinds on the trained ResNet-20 against training on without."""
    weights = _resnet_files(runs)
    given = _resnet_settings(runs)
    runs.train("resnet_test", "resnet.prototxt", 0, 0.01, *weights, **given)
    for name in RESNET_FORCES:
        force = () if name == "none" else ("--force", name.replace("_", "="), "--force-all")
        runs.train(f"resnet_{name}", "resnet.prototxt", 1500, 0.01, *weights, *force, drop=1000, **given)


def resnet_low_rank(runs: Runs) -> None:
    """LRA of these nets at energy 0.95, the one without force also at the ranks of those with; 500 iterations each."""
    resnet(runs)
    given = _resnet_settings(runs)
    shapes = ("--input-shape", "Data1=100,3,32,32", "--input-shape", "Data2=100")
    for force in RESNET_FORCES:
        own = ("--scheme", "pca", "--energy", "0.95")
        chosen = runs.decompose(
            f"resnet_{force}_lra", "resnet.prototxt", f"resnet_{force}_iter_1500.caffemodel", *own, *shapes
        )
        names = [f"resnet_{force}_lra"]
        if force != "none":
            names.append(f"resnet_none_as_{force}")
            (runs.work / f"{force}.json").write_text(
                json.dumps({k: v[0] for k, v in chosen["ranks"].items()})
            )
            same = ("--rank-config", f"{force}.json", *shapes)
            runs.decompose(names[1], "resnet.prototxt", "resnet_none_iter_1500.caffemodel", *same)
        for name in names:
            stored = ("--weights", f"{name}.caffemodel")
            runs.train(f"{name}_test", f"{name}.prototxt", 0, 0.01, *stored, **given)
            runs.train(f"{name}_tuned", f"{name}.prototxt", 500, 0.01, *stored, drop=350, **given)


def _resnet_settings(runs: Runs) -> dict[str, Any]:
    test = runs.cifar()[2:]
    return {"images": ("--data", "pad4.npz", *test), "tests": 10, "decay": 0.0001}


def _resnet_files(runs: Runs) -> tuple[str, str]:
    """The net with its images padded by 4 pixels that are 0 behind the mean, and BatchNorm that forgets sooner."""
    folder = runs.data / "models" / "resnet20_cifar10"
    source = (folder / "res20_cifar_train_test.prototxt").read_text()
    blocks = (
        'transform_param { mean_file: "mean_pad.binaryproto" crop_size: 32 mirror: true }',
        'transform_param { mean_file: "cifar10_mean.binaryproto" }',
    )
    parts = re.split(r"transform_param \{[^{}]*\}", source)
    if len(parts) != 3:
        raise SystemExit(f"{len(parts) - 1} transform_param where two are known")
    source = parts[0] + blocks[0] + parts[1] + blocks[1] + parts[2]
    fraction = "batch_norm_param { moving_average_fraction: 0.9 }"
    source = source.replace('type: "BatchNorm"', f'type: "BatchNorm"\n  {fraction}')
    (runs.work / "resnet.prototxt").write_text(source)
    if not (runs.work / "pad4.npz").exists():
        raw = np.concatenate(
            [np.fromfile(one, np.uint8) for one in sorted((runs.data / "cifar10").glob("data_batch_*.bin"))]
        ).reshape(-1, 1 + 3 * 32 * 32)
        around = ((0, 0), (4, 4), (4, 4))
        images = np.pad(raw[:, 1:].reshape(-1, 3, 32, 32), ((0, 0), *around))
        np.savez(runs.work / "pad4.npz", x=images, y=raw[:, 0].astype(np.int64))
        mean = np.pad(read_mean(str(runs.data / "cifar10" / "mean.binaryproto")), around)
        (runs.work / "mean_pad.binaryproto").write_bytes(mean_bytes(mean))
    return "--weights", str(folder / "ResNet_20.caffemodel")


def asymmetric(runs: Runs) -> None:
    """Asymmetric 3-D at 3x of the convolutions of the trained ConvNet, and five epochs of fine-tuning by a small rate."""
    images = runs.cifar()
    trained = runs.data / "models" / "cifar_v2_yuvval"
    weights = str(trained / "cifar10_full_iter_70000.caffemodel")
    fit = (
        "--scheme", "asymmetric-3d", "--speedup", "3", "--scope", "conv", "--images", images[1], "--n-images", "1000",
        "--input-shape", "data=100,3,32,32", "--input-shape", "label=100",
    )  # fmt: skip
    runs.decompose("cifar_3d", CIFAR, weights, *fit)
    given: dict[str, Any] = {"images": images, "tests": 10, "decay": 0.004}
    small = ("--weights", "cifar_3d.caffemodel")
    runs.train("cifar_3d_test", "cifar_3d.prototxt", 0, 1e-5, *small, **given)
    epochs, batch = 5, 100
    runs.train("cifar_3d_tuned", "cifar_3d.prototxt", epochs * IMAGES // batch, 1e-5, *small, **given)


SECTIONS = {
    one.__name__: one
    for one in (
        lenet,
        low_rank,
        start,
        together,
        cifar,
        cifar_start,
        cifar_more,
        resnet,
        resnet_low_rank,
        asymmetric,
    )
}


def table(folders: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Markdown, a row a run of the first folder; of several folders the mean accuracy and MACs, and the range."""
    lines = [
        "| run | iterations | seeds | seconds | accuracy | ranks before | ranks after | MACs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for first in folders[0]:
        rows = [row for folder in folders for row in folder if row["name"] == first["name"]]
        cells = (
            first["name"],
            str(first.get("iterations", "")),
            str(len(rows)),
            f"{np.mean([row['seconds'] for row in rows]):.0f}",
            _mean([row["accuracy"] for row in rows if row.get("accuracy") is not None], 4),
            _ranks([row.get("before", {}) for row in rows]),
            _ranks([row.get("after") or row.get("ranks", {}) for row in rows]),
            _mean([row["speedup"]["macs"] for row in rows if "speedup" in row], 2),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    said = f"{np.mean(values):.{digits}f}"
    return said if len(values) == 1 else f"{said} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _ranks(found: Sequence[dict[str, Any]]) -> str:
    """By layer the rank, and its range where seeds differ."""
    cells = []
    for key in found[0]:
        if key == "iteration":
            continue
        values = sorted(np.ravel([one[key] for one in found if key in one]).tolist())
        same = values[0] == values[-1]
        cells.append(str(values[0]) if same else f"{values[0]}-{values[-1]}")
    return " ".join(cells)


def curves(folders: Sequence[Sequence[dict[str, Any]]], net: str) -> dict[str, list[tuple[float, float]]]:
    """By type of force: (share of the convolutions' ranks left, accuracy), means over folders, from weak to strong."""
    points: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for row in (row for folder in folders for row in folder):
        found = re.fullmatch(rf"{net}_(l1|l2|none)(?:_([0-9.]+))?", row["name"])
        if found is None or "after" not in row:
            continue
        left, before = (
            sum(rank for layer, rank in row[when].items() if layer.lower().startswith("conv"))
            for when in ("after", "before")
        )
        kinds = ("l1", "l2") if found[1] == "none" else (found[1],)
        for kind in kinds:
            points.setdefault((kind, float(found[2] or 0)), []).append((left / before, row["accuracy"]))
    made: dict[str, list[tuple[float, float]]] = {}
    for (kind, _), some in sorted(points.items()):
        share, accurate = np.mean(some, axis=0).tolist()
        made.setdefault(kind, []).append((share, accurate))
    return made


def draw(folders: Sequence[Sequence[dict[str, Any]]], path: Path) -> None:
    """The curves of all nets that there are, side by side."""
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("svg")
    from matplotlib import pyplot  # type: ignore[import-not-found]

    titles = {"lenet": "LeNet", "cifar": "ConvNet", "resnet": "ResNet-20"}
    made = {title: found for net, title in titles.items() if (found := curves(folders, net))}
    if not made:
        raise SystemExit("no rows of forces to draw")
    with matplotlib.rc_context({"svg.hashsalt": "force", "svg.fonttype": "none"}):
        figure, all_axes = pyplot.subplots(
            1, len(made), figsize=(4 * len(made), 3.6), layout="constrained", squeeze=False
        )
        for axes, (title, found) in zip(all_axes[0], made.items(), strict=True):
            for kind, points in found.items():
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=kind.upper())
            axes.set_title(title)
            axes.set_xlabel("share of ranks left (energy 0.95)")
            axes.set_ylabel("test accuracy")
            axes.set_xlim(0, 1.05)
            axes.grid(alpha=0.3)
            axes.legend()
        with writing([path]) as (temporary,):
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> int:
    """Run sections, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--work", type=Path, nargs="+", required=True, help="folder for what is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    o = parser.parse_args()
    folders = [Runs(work.resolve(), o.shared.resolve(), o.seed) for work in o.work]
    for runs in folders:
        for name in o.sections:
            SECTIONS[name](runs)
    if o.table:
        print(table([runs.rows for runs in folders]))
    if o.plot:
        draw([runs.rows for runs in folders], o.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
