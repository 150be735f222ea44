"""Short fine-tuning of pruned nets on the 30,000 training images, for `benchmarks/pruning.py`.

The settings are those of the net's solver file in models/, at a tenth of its base_lr, fixed. Images are not shifted;
those of ResNet-20 are mirrored at random, as its train_val has it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from benchmarks.real_nets import THREADS, Bench
from caffe_proto import solver as solvers
from caffe_proto import train
from caffe_proto.errors import UsageError
from caffe_proto.model import Model
from hrank import repair, tuning
from hrank.coupling import Coupling
from hrank.plan import Plan
from lra.stage import Stage

ROOT = Path(__file__).resolve().parents[1]
_SETTINGS: dict[str, tuple[str | Path, int, str]] = {
    "cifar10_full": (ROOT / "models" / "cifar10_full" / "train_val.prototxt", 100, ""),
    "resnet_20": ("models/resnet20_cifar10/res20_cifar_train_test.prototxt", 50, "mirror: true"),
}  # the train_val, the batch, and what its transform_param says besides the mean
_LEFT_OUT = re.compile(
    r"^(net|base_lr|lr_policy|gamma|stepvalue|max_iter|test_iter|test_interval|snapshot).*$", re.M
)


class Tuner:
    """Trains pruned forms of one net, each the same way."""

    def __init__(
        self, name: str, run: Bench, coupling: Coupling, shared: Path, iterations: int, device: str
    ) -> None:
        if name not in _SETTINGS:
            raise UsageError(f"no fine-tuning of {name} is known", hint="known: " + ", ".join(_SETTINGS))
        self.run, self.coupling, self.device = run, coupling, device
        self._folder = tempfile.TemporaryDirectory()
        folder, cifar = Path(self._folder.name), shared / "data" / "cifar10"
        self.data = str(cifar / "data_batch_*.bin")
        train.set_threads(THREADS)
        solver = _files(name, folder, shared / "data", iterations)
        shutil.copyfile(cifar / "mean.binaryproto", folder / "mean.binaryproto")
        self.place = tuning.place_of(solvers.load(solver), coupling, self.data, None)

    def __call__(self, plan: Plan, pruned: Model) -> Model:
        """The net after training; BatchNorm is estimated again on the images that criteria are measured on."""
        trainer = tuning.Trainer(
            lambda solver, weights, _state, hooks: train.train(
                solver,
                train.Request((str(weights),), data=self.data, device=self.device, seed=0, hooks=hooks),
            )
        )
        work = Stage(Path(self._folder.name) / "work")
        tuned, _ = tuning.tune(plan, self.coupling, pruned, self.place, trainer, work, "")
        if any(node.layer.type == "BatchNorm" for node in self.coupling.shaped.graph.nodes):
            (images,) = self.run.calibration.images.values()
            tuned = repair.reestimate(tuned, images, threads=THREADS).model
        return tuned


def _files(name: str, folder: Path, data: Path, iterations: int) -> Path:
    """A solver and its train_val in a folder."""
    source, batch, settings = _SETTINGS[name]
    text = (data / source).read_text(encoding="utf-8")
    mean = folder / "mean.binaryproto"
    text, count = re.subn(
        r"transform_param \{[^{}]*\}", f'transform_param {{ mean_file: "{mean}" {settings} }}', text, count=1
    )
    text, others = re.subn(r"batch_size: \d+", f"batch_size: {batch}", text, count=1)
    if not count or not others:
        raise UsageError("has no transform_param or no batch_size", path=data / source)
    (folder / "train_val.prototxt").write_text(text, encoding="utf-8")
    given = (ROOT / "models" / name / "solver.prototxt").read_text(encoding="utf-8")
    rate = re.search(r"^base_lr: (\S+)", given, re.M)
    assert rate is not None
    own = (
        f'net: "{folder / "train_val.prototxt"}"\nbase_lr: {float(rate.group(1)) / 10:g}\nlr_policy: "fixed"\n'
        f"max_iter: {iterations}\n"
    )
    path = folder / "solver.prototxt"
    path.write_text(_LEFT_OUT.sub("", given) + own, encoding="utf-8")
    return path
