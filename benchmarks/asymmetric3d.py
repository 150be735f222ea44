"""``asymmetric-3d --speedup 4`` of a VGG-16-sized net fitted to images, against its bare parts.

Run: ``python benchmarks/asymmetric3d.py [--images 200 --positions 10 --threads 1]``. Ours is `lra.make_plan` and
`lra.apply` with a calibration on random images, files read, in one fresh process, whose peak memory is taken. The
bare parts, in another: onnxruntime's forward passes of the original and of the approximated convolutions over the
same images in the same batches; and, in NumPy and SciPy at the sizes of that plan, the matrix products,
decompositions and elementwise passes of the fits, the spectra that choose the ranks included. Wall and CPU
seconds; on a busy machine CPU is the one to judge by.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caffe_proto as cp
import lra
from benchmarks import decompose, vgg
from caffe_proto.model import Model
from lra import jobs, nonlinear
from lra.calibration import Calibration
from lra.fitting import HELD_OUT
from lra.plan import Plan
from lra.targets import Found, Spectra, find

Array = NDArray[Any]

KEPT = "conv1_1"
LAST = "conv5_3"
SIDE = 224
RATIO, MEMORY = 1.5, 4.0  # targets: times the bare parts; GiB
FULL_ITERATIONS = 5  # that end a phase, on all samples


class Seconds(NamedTuple):
    """Wall and CPU time."""

    wall: float
    cpu: float

    def plus(self, other: Seconds) -> Seconds:
        """Both one after the other."""
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


class Sizes(NamedTuple):
    """Of one fit: samples fitted to and held out, features, responses, rank (None: full), parts of the samples."""

    n: int
    held: int
    m: int
    d: int
    rank: int | None
    parts: int


def timed(work: Callable[[], Any]) -> Seconds:
    """What a call takes, all threads of the process together for CPU."""
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Seconds(time.perf_counter() - wall, cpu)


def pictures(count: int) -> Array:
    """Random images, (count, 3, 224, 224)."""
    return np.random.default_rng(1).standard_normal((count, 3, SIDE, SIDE), np.float32)


# ------------------------------------------------------------------------------- ours


def ours(folder: Path, images: int, positions: int, threads: int) -> dict[str, Seconds]:
    """Plan and apply, files read; the results are written outside the clock."""
    given = pictures(images)
    made: dict[str, Any] = {}

    def planned() -> None:
        model = cp.load(folder / "vgg16.prototxt", folder / "vgg16.caffemodel")
        found = find(model)
        made.update(model=model, found=found, spectra=Spectra(found))
        made["images"] = Calibration({"data": given}, positions=positions, threads=threads)
        made["plan"] = lra.make_plan(
            model, scheme="asymmetric-3d", speedup=4.0, scope="conv", except_layers=[KEPT],
            images=made["images"], found=found, spectra=made["spectra"],
        )  # fmt: skip

    def applied() -> None:
        made["fitted"], _ = lra.apply(
            made["plan"], made["model"], images=made["images"], found=made["found"], spectra=made["spectra"]
        )

    seconds = {"plan": timed(planned), "apply": timed(applied)}
    made["images"].stage.close()
    (folder / "plan.json").write_text(made["plan"].to_json())
    cp.save(made["fitted"], folder / "fitted.prototxt", folder / "fitted.caffemodel")
    return seconds


# ------------------------------------------------------------------------------- the bare parts


def bare(folder: Path, images: int, positions: int, threads: int) -> dict[str, Seconds]:
    """The forward passes, the decompositions behind the ranks, and the fits."""
    model = cp.load(folder / "vgg16.prototxt", folder / "vgg16.caffemodel")
    fitted = cp.load(folder / "fitted.prototxt", folder / "fitted.caffemodel")
    plan = Plan.from_json((folder / "plan.json").read_text())
    given = pictures(images)
    found = find(model)
    calibration = Calibration({"data": given}, positions=positions, threads=threads)
    batch = calibration.walker(found).batch
    calibration.stage.close()
    seconds = {
        "original forward": forward(model, given, batch, threads),
        "approximated forward": forward(fitted, given, batch, threads),
        "spectra": spectra(found, images * positions),
    }
    total = Seconds(0.0, 0.0)
    for size in sizes(found, plan, images * positions):
        total = total.plus(fit(size))
    return seconds | {"fits": total}


def forward(model: Model, images: Array, batch: int, threads: int) -> Seconds:
    """The convolutions over all images, batch by batch; the net is compiled before."""
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    with cp.session(model, blobs=[LAST], threads=threads) as opened:
        for part in {len(part): part for part in parts}.values():
            opened.run({"data": part})
        return timed(lambda: [opened.run({"data": part}) for part in parts])


def spectra(found: Found, samples: int) -> Seconds:
    """Of every layer: the matrix of the vertical split by its Gram matrix, and the covariance of the responses."""
    total = Seconds(0.0, 0.0)
    rng = np.random.default_rng(0)
    for name, (out, depth, height, width) in vgg.convolutions():
        if name == KEPT:
            continue
        weight = np.asarray(found.blobs[found.targets[name].index][0], np.float64)
        matrix = weight.transpose(1, 2, 3, 0).reshape(depth * height, width * out)
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        responses = rng.standard_normal((samples, out))
        total = total.plus(timed(lambda a=matrix: scipy.linalg.eigh(a @ a.T, driver="evd")))  # type: ignore[misc]
        total = total.plus(timed(lambda y=responses: np.linalg.eigvalsh(y.T @ y)))  # type: ignore[misc]
    return total


def sizes(found: Found, plan: Plan, samples: int) -> list[Sizes]:
    """What each layer of the plan is fitted with."""
    held = round(HELD_OUT * samples)
    made = []
    for name, entry in plan.layers.items():
        job = jobs.job(found, Spectra(found), found.targets[name], entry, samples - held)
        d, depth, height, width = job.free.shape
        m, n = depth * height * width, samples - held
        parts = max(1, min(nonlinear.PARTS, n // (12 * m)))
        made.append(Sizes(n, held, m, d, job.rank, parts))
    return made


def fit(size: Sizes) -> Seconds:
    """One fit's products, decompositions and passes over samples, on random numbers of its sizes."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((size.n, size.m))
    responses = rng.standard_normal((size.n, size.d))
    held = rng.standard_normal((size.held, size.m)), rng.standard_normal((size.held, size.d))
    return timed(lambda: _fit(size, features, responses, *held))


def _fit(size: Sizes, F: Array, Y: Array, held_F: Array, held_Y: Array) -> None:
    covariance, cross = F.T @ F / size.n, Y.T @ F / size.n
    factor = scipy.linalg.cholesky(covariance + 1e-6 * np.eye(size.m), lower=True)

    def unmix(rows: Array) -> Array:
        solved: Array = scipy.linalg.solve_triangular(factor, rows.T, lower=True, check_finite=False)
        return solved.T

    start, pull = unmix(cross), unmix(1e-6 * cross)  # the prior has the size of the moments
    gram = unmix(unmix(covariance).T)
    whitened, held = (np.ascontiguousarray(unmix(x), np.float32) for x in (F, held_F))
    target, held_target = (np.maximum(y, 0).astype(np.float32) for y in (Y, held_Y))
    basis, rows = _leading(start, size.rank)
    for _, iterations in nonlinear.SCHEDULE:
        for done in range(iterations):
            n = size.n if iterations - done <= FULL_ITERATIONS else size.n // size.parts
            moved = _sweep(whitened[:n], target[:n], basis, rows)
            basis, rows = _leading(basis @ (rows @ gram) + moved / n + pull, size.rank)
            Q = scipy.linalg.solve_triangular(factor, rows.T, lower=True, trans="T", check_finite=False)
            _loss(held, held_target, basis, Q.T @ factor)


def _leading(matrix: Array, rank: int | None) -> tuple[Array, Array]:
    """The rank-r approximation of a (d, m) matrix by the eigenvectors of its Gram matrix."""
    d = len(matrix)
    if rank is None:
        return np.eye(d), matrix
    _, vectors = scipy.linalg.eigh(
        matrix @ matrix.T, subset_by_index=[d - rank, d - 1], overwrite_a=True, check_finite=False
    )
    return vectors, vectors.T @ matrix


def _loss(F: Array, target: Array, basis: Array, rows: Array) -> Array:
    """``t = F Q P^T + b`` and the error behind the activation; gives t."""
    inner = F @ rows.T.astype(np.float32)
    t: Array = inner if rows.shape[0] == target.shape[1] else inner @ basis.T.astype(np.float32)
    t += np.float32(0.1)
    error = np.maximum(t, 0)
    error -= target
    np.vdot(error, error)
    return t


def _sweep(F: Array, target: Array, basis: Array, rows: Array) -> Array:
    """Prediction, loss, ``z - t`` in closed form, and its products with the features."""
    t = _loss(F, target, basis, rows)
    moved = t > target * np.float32(-0.5)
    step = target - t
    step *= moved
    step *= np.float32(0.5)
    step.sum(axis=0)
    product: Array = step.T @ F
    return product.astype(np.float64)


# ------------------------------------------------------------------------------- both


def measured(part: str, folder: Path, o: argparse.Namespace) -> tuple[dict[str, Seconds], float]:
    """Run one side in a process of its own: its seconds, and its peak memory in GiB."""
    options = (f"--{name}={getattr(o, name)}" for name in ("images", "positions", "threads"))
    environment = os.environ | {name: str(o.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, __file__, *options, "--part", part, "--folder", str(folder)]
    with (folder / f"{part}.json").open("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output)  # type: ignore[arg-type]
        _, status, usage = decompose.os_wait(process)  # type: ignore[arg-type]
        if status:
            raise SystemExit(f"{part} failed with status {status}")
        output.seek(0)
        seconds = {name: Seconds(*pair) for name, pair in json.load(output).items()}
    return seconds, usage.ru_maxrss / 2**20


def main() -> int:
    """Measure and print both ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("images", 200), ("positions", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--part", choices=("ours", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.part:
        print(json.dumps({"ours": ours, "bare": bare}[o.part](o.folder, o.images, o.positions, o.threads)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vgg.write(folder)
        mine, memory = measured("ours", folder, o)
        parts, _ = measured("bare", folder, o)
    print(f"{o.images} images, {o.positions} positions of each, {o.threads} threads   wall s     CPU s")
    sums = []
    for title, seconds in (("the bare parts", parts), ("plan and apply", mine)):
        for what, (wall, cpu) in seconds.items():
            print(f"    {what:<38}{wall:10.1f}{cpu:10.1f}")
        sums.append(Seconds(*(sum(column) for column in zip(*seconds.values(), strict=True))))
        print(f"{title:<42}{sums[-1].wall:10.1f}{sums[-1].cpu:10.1f}")
    wall, cpu = (mine_s / bare_s for bare_s, mine_s in zip(*sums, strict=True))
    print(f"times the bare parts                      {wall:10.2f}{cpu:10.2f}   (target: at most {RATIO:g})")
    print(f"peak memory                               {memory:10.2f} GiB    (target: under {MEMORY:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
