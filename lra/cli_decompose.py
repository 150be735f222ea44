"""The decompose command: options in, one job, files and a report out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from caffe_proto import console
from caffe_proto.cli_data import image_options, prepared
from caffe_proto.console import (
    input_shape_option,
    json_option,
    net_argument,
    seed_option,
    state_options,
    threads_option,
)
from caffe_proto.errors import UsageError
from caffe_proto.peers import ALONE, Peers, joined, threads

from . import outputs
from .cli_report import check_charts, report_option, write_page

if TYPE_CHECKING:
    import numpy as np

    from caffe_proto.data.batches import Batch
    from caffe_proto.latency import Subject
    from caffe_proto.model import Model
    from caffe_proto.runtime import Engine

    from .applier import Report
    from .calibration import Calibration
    from .latency import Latency
    from .plan import LayerPlan, Plan
    from .report_given import Accuracy, Given, Times
    from .stage import Stage
    from .targets import Found, Spectra

    _Reference = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


STYLE_NAMES = [
    "default",
    "wen",
    "tai",
    "he",
    "girshick",
]  # lra.styles.STYLES, without waiting for its imports


_AMOUNTS = {
    "--speedup": "speedup",
    "--energy": "energy",
    "--ranks": "ranks",
    "--rank-config": "rank_config",
    "--plan": "plan_file",
}


def _numbers(value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(one) for one in value.split(",")]
    except ValueError:
        raise UsageError(
            f"--ranks {value!r} is no list of whole numbers", hint="for example 13,21,27"
        ) from None


def layer_names(values: Sequence[str]) -> list[str]:
    """Layer names as given, or from JSON files that hold a list of them."""
    from caffe_proto.errors import PlanError
    from caffe_proto.files import read_text

    names: list[str] = []
    for value in values:
        if not value.endswith(".json"):
            names.append(value)
            continue
        import json

        try:
            found = json.loads(read_text(value))
        except json.JSONDecodeError as error:
            raise PlanError(f"is no JSON: {error.msg}", path=value, line=error.lineno) from error
        if isinstance(found, dict):
            found = list(found)
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise PlanError('must be a JSON list of layer names ["ip2"]', path=value)
        names += found
    return names


def calibration_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--images and its companions: with images the second layer of every chain is fitted to responses."""
    positions = click.option(
        "--positions", type=click.IntRange(1),
        help="With --images: places of each image at which responses are sampled; default: 10, "
        "and more where there are fewer than 2,000 images.",
    )  # fmt: skip
    return image_options(positions(function), required=False, n_images=2000)


def read_calibration(
    model: Model,
    given: Mapping[str, Any],
    stage: Stage,
    note: Callable[[Batch], None] = lambda _batch: None,
    peers: Peers = ALONE,
) -> Calibration:
    """The images that the options of ``calibration_options`` name, as the net wants them, in a file of the stage.

    ``note`` is told of every batch read, labels included. Of several processes each reads its share.
    """
    from caffe_proto.data import open_source
    from caffe_proto.data.batches import Batches
    from caffe_proto.evaluation import image_input, input_shape
    from caffe_proto.graph import build

    from .calibration import Calibration, dealt, keep, share_of

    shape = input_shape(model, given["input_shapes"])
    transform = prepared(model, shape, *(given[name] for name in ("mean", "scale", "crop", "resize", "bgr")))
    inputs = None if shape is None else shape[1:]
    seed, count = given["seed"], given["n_images"]
    with open_source(
        given["images"], root=given["root"], resize=transform.resize, color=transform.color
    ) as source:
        batches = Batches(
            source, transform, n_images=count, seed=seed, shape=inputs, skip_bad=given["skip_bad"]
        )
        places: list[int] = []
        with console.progress("reading images", batches.n_images, "images") as step:
            images = keep(_counted(dealt(batches, peers, places), step, note), stage)
    left_out = peers.sum(batches.skipped)
    for bad in left_out if peers.rank == 0 else ():
        click.echo(f"left out: {bad}", err=True)
    share = share_of(peers, places) if peers.world > 1 else None
    if images is None:
        raise UsageError("none of its images can be read", path=given["images"])
    graph = build(model.net)
    blob = graph.blob(image_input(graph))
    return Calibration(
        {blob: images}, given["positions"] or 0, seed, threads(given["threads"]), stage, share=share
    )


def _counted(
    batches: Iterable[Batch], step: Callable[[int], None], note: Callable[[Batch], None]
) -> Iterator[np.ndarray]:
    for batch in batches:
        note(batch)
        yield batch.images
        step(len(batch.images))


@click.command()
@net_argument
@click.argument("weights")
@click.option(
    "-o",
    "--output",
    "prefix",
    metavar="PREFIX",
    help="Writes PREFIX.prototxt, PREFIX.caffemodel, PREFIX.plan.json.",
)
@click.option(
    "--scheme",
    type=click.Choice(["auto", "pca", "svd", "kmeans", "spatial", "spatial-hv", "response", "asymmetric-3d"]),
    default="auto",
    show_default=True,
    help="auto: by layer, the best by energy, or with --images and --speedup by measured errors; response and "
    "asymmetric-3d need --images.",
)
@click.option("--fc/--no-fc", default=False, show_default=True, help="Fully connected layers too.")
@click.option(
    "--except", "except_", multiple=True, metavar="NAME|FILE.json", help="Leave this layer alone; repeatable."
)
@click.option("--only", multiple=True, metavar="NAME|FILE.json", help="Touch only these layers; repeatable.")
@click.option("--speedup", type=float, help="MACs before / after; with --cost latency time before / after.")
@click.option("--energy", type=float, help="Energy that every layer keeps, 0 to 1: |W-W'|² <= (1-E)|W|².")
@click.option("--ranks", metavar="a,b,c", help="One total rank for each eligible layer, in net order.")
@click.option(
    "--rank-config",
    metavar="FILE.json",
    help='{"conv1": 8, "conv2": {"scheme": "spatial", "rank": 40}}; a bare rank means --scheme, or pca.',
)
@click.option("--plan", "plan_file", metavar="FILE.plan.json", help="Apply a plan made before.")
@click.option(
    "--scope",
    type=click.Choice(["all", "conv", "eligible"]),
    default="all",
    show_default=True,
    help="What --speedup counts: the whole net, its convolutions, or the layers that may be decomposed.",
)
@click.option(
    "--cost",
    type=click.Choice(["macs", "latency"]),
    default="macs",
    show_default=True,
    help="What --speedup counts: multiplications, or time in onnxruntime with --threads, measured chain by chain in "
    "the layers' places (once for a machine; what is known is kept in a table).",
)
@click.option(
    "--latency-table",
    metavar="FILE",
    help="With --cost latency: the table of measured times; default: one in the user's cache.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Batch of every input, over what the file says: MACs and times are for so many pictures.",
)
@click.option(
    "--rank-selection",
    "selection",
    type=click.Choice(["exact", "measured", "paper", "uniform"]),
    default="exact",
    show_default=True,
    help="How --speedup chooses ranks: exact, by the energy kept; measured, by errors on --images (auto does that by "
    "itself); paper: the first-order rule of Zhang et al.; "
    "uniform: every layer as much faster.",
)
@click.option("--same-ranks", is_flag=True, help="asymmetric-3d with d'' = d', as He's tool has it.")
@click.option(
    "--round-to",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ranks are multiples of this where that fits.",
)
@click.option(
    "--even-if-slower", is_flag=True, help="Also split layers that get more expensive by it (full-rank nets)."
)
@click.option(
    "--style",
    type=click.Choice(STYLE_NAMES),
    default="default",
    show_default=True,
    help="Layer names, bias and filler rules of the published tools.",
)
@click.option(
    "--solver",
    type=click.Choice(["asymmetric", "symmetric", "linear"]),
    default="asymmetric",
    show_default=True,
    help="With --images: fit behind the layers fitted before, behind the original ones, or without the activation.",
)
@click.option(
    "--refit-kept/--no-refit-kept",
    default=None,
    help="With --images: fit the layers that are left whole too. Default: where auto measures errors.",
)
@click.option(
    "--fold-bn", is_flag=True, help="Fold BatchNorm and Scale layers into the convolutions before them."
)
@click.option(
    "--merge",
    is_flag=True,
    help="First join layers in a row with nothing in between that cost less as one, and again in the end; alone: "
    "only that.",
)
@click.option(
    "--polish",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=600,
    metavar="[STEPS]",
    help="With --images: in the end match the original's outputs and activations, without labels (Adam, 600 steps; "
    "needs torch). Not part of the plan.",
)
@click.option("--resume", is_flag=True, help="Go on with a fit to --images that was interrupted.")
@click.option("--force", is_flag=True, help="Apply a plan to other files than it was made for.")
@click.option("--plan-only", is_flag=True, help="Print the plan and change nothing.")
@click.option(
    "--compare",
    metavar="X.npy|random",
    help="Run both nets on this input and print how far their outputs are apart.",
)
@calibration_options
@click.option("--onnx", is_flag=True, help="Also write PREFIX.onnx.")
@click.option(
    "--time", "time_it", is_flag=True, help="Also time both nets with onnxruntime, whole and by layer."
)
@report_option
@threads_option
@seed_option
@input_shape_option
@state_options
@json_option
def decompose(**given: Any) -> None:
    """Replace layers of NET by cheaper chains of smaller ones, and write the new net.

    Give exactly one of --speedup, --energy, --ranks, --rank-config and --plan, or --merge alone. A layer that would
    not get cheaper is kept, with the reason. Under torchrun every process takes its share of --images.
    """
    context = click.get_current_context()
    said = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    with joined() as peers:
        _Decompose(**given, said=frozenset(said), peers=peers).run()


@dataclass
class _Decompose:
    """One decompose command; fields are its options."""

    net: str
    weights: str
    prefix: str | None
    scheme: str
    fc: bool
    except_: Sequence[str]
    only: Sequence[str]
    speedup: float | None
    energy: float | None
    ranks: str | None
    rank_config: str | None
    plan_file: str | None
    scope: str
    round_to: int
    even_if_slower: bool
    style: str
    cost: str
    latency_table: str | None
    batch: int | None
    selection: str
    same_ranks: bool
    solver: str
    refit_kept: bool | None
    fold_bn: bool
    merge: bool
    polish: int | None
    resume: bool
    force: bool
    plan_only: bool
    compare: str | None
    images: str | None
    root: str | None
    n_images: int
    mean: str | None
    scale: float | None
    crop: tuple[int, int] | None
    resize: tuple[int, int] | None
    bgr: bool | None
    skip_bad: bool
    positions: int | None
    onnx: bool
    time_it: bool
    report_it: bool
    threads: int
    seed: int
    input_shapes: dict[str, tuple[int, ...]]
    phase: str
    stages: Sequence[str]
    level: int
    as_json: bool
    said: frozenset[str]  # options that stand on the command line
    peers: Peers

    def run(self) -> None:
        from .applier import apply, doubts
        from .targets import find

        self._check()
        self._check_targets()
        model = console.load_model(self.net, self.weights, self.phase, self.stages, self.level)
        if self.batch is not None:
            self.input_shapes = self._batched(model, self.batch)
        found = find(self._merged(model), self.input_shapes)
        stage = self._stage() if self.images is not None else None
        try:
            labels: list[np.ndarray] = []
            images = self._images(model, stage, labels) if stage is not None else None
            plan, spectra = self._planned(model, found, images)
            if self.plan_only:
                if self.peers.rank:
                    return
                self._print_plan(plan)
                for doubt in doubts(plan, self._engine()):
                    click.echo(f"warning: {doubt}", err=True)
                return
            with console.progress("fitting", self._ticks(plan, images), "images") as step:
                changed, report = apply(
                    plan,
                    model,
                    images=images,
                    step=step,
                    force=self.force,
                    input_shapes=self.input_shapes,
                    found=found,
                    spectra=spectra,
                    engine=self._engine(),
                )
            if self.polish is not None and images is not None:
                changed, report = self._polished(model, changed, report, images)
        except KeyboardInterrupt:
            if stage is not None and self.prefix is not None and self.peers.world == 1:
                click.echo("interrupted; the same command with --resume goes on from here", err=True)
                stage.close()
                stage = None  # it stays
            raise
        finally:
            if stage is not None and (
                self.plan_only or self.peers.world > 1 or sys.exc_info()[0] is not None
            ):
                stage.finish()
        if self.peers.rank:
            return
        if plan.merges is not None and self.plan_file is None:
            plan = plan.with_late_merges(one.layers for one in report.late_merges)
        reference = self._reference(model) if self.compare else None  # what can fail comes before the writing
        given = self._given(model, changed, report, images, labels) if self.report_it else None
        subjects = (
            outputs.subjects((self.net, f"{self.prefix}.prototxt"), (model, changed), self.input_shapes)
            if self.time_it
            else []
        )
        files = self._write(changed, plan)
        if stage is not None:
            stage.finish()
        page = partial(self._page, model, plan, given) if given is not None else None
        self._finish(report, files, reference, subjects, page)

    def _images(self, model: Model, stage: Stage, labels: list[np.ndarray]) -> Calibration:
        """The images that the options name; their labels are added to ``labels``."""

        def note(batch: Batch) -> None:
            if batch.labels is not None:
                labels.append(batch.labels)

        return read_calibration(model, vars(self), stage, note, self.peers)

    def _merged(self, model: Model) -> Model:
        """The net that layers are chosen of: the one given, or with --merge what is left of it."""
        from .merging import merge

        plan = self._given_plan()
        if plan is not None and plan.complete and plan.merges is not None:
            return merge(model, self.input_shapes, plan.merges).model
        return merge(model, self.input_shapes).model if self.merge else model

    def _given_plan(self) -> Plan | None:
        from caffe_proto.files import read_text
        from hrank.joint import check_kind

        from .plan import Plan

        if self.plan_file is None:
            return None
        source = read_text(self.plan_file)
        check_kind(source, "decompose", self.plan_file)
        return Plan.from_json(source, self.plan_file)

    def _polished(
        self, model: Model, changed: Model, report: Report, images: Calibration
    ) -> tuple[Model, Report]:
        """The net after distillation, and the report with what that gave."""
        from .polish import polish

        steps = self.polish or 0
        with console.progress("polishing", steps, "steps") as step:
            better, found = polish(
                model, changed, images, steps=steps, seed=self.seed, threads=self.threads, tick=step
            )
        return better, replace(report, polish=found)

    def _batched(self, model: Model, batch: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all inputs with another batch."""
        from caffe_proto.graph import build
        from caffe_proto.onnx_export import Request, source_shapes

        return source_shapes(build(model.net), Request(batch=batch, input_shapes=self.input_shapes))

    def _engine(self) -> Engine | None:
        """How the nets shall run, where times matter."""
        if self.cost == "macs" and self.plan_file is None:
            return None
        from caffe_proto.runtime import Engine

        return Engine(self.threads)

    def _latency(self, found: Found) -> Latency | None:
        if self.cost != "latency":
            return None
        from .latency import Latency

        return Latency(found, self._engine(), self.latency_table)

    def _stage(self) -> Stage:
        """Where a fit keeps what it can be resumed from: PREFIX.fit, until it is done.

        Several processes have a folder each, and cannot resume.
        """
        from .stage import Stage

        own = f".{self.peers.rank}" if self.peers.world > 1 else ""
        return Stage(f"{self.prefix}.fit{own}" if self.prefix is not None else None, resume=self.resume)

    def _planned(self, model: Model, found: Found, images: Calibration | None) -> tuple[Plan, Spectra]:
        """The plan, and the factorizations it took."""
        from .targets import Spectra

        if self.cost == "latency":
            spectra = Spectra(found)
            with console.progress("measuring", None, "steps") as step:
                return self._plan(model, found, spectra, images, step), spectra
        if images is None:
            with console.progress("factoring", len(found.targets), "layers") as step:
                spectra = Spectra(found, lambda: step(1))
                return self._plan(model, found, spectra, None, lambda _images: None), spectra
        spectra = Spectra(found)
        with console.progress("measuring", None, "images") as step:
            return self._plan(model, found, spectra, images, step), spectra

    @staticmethod
    def _ticks(plan: Plan, images: Calibration | None) -> int:
        if images is None:
            return 0
        from .fitting import ticks

        return ticks(plan, images)

    def _amounts(self) -> list[str]:
        """The options given that say how much; none where --merge stands alone."""
        return [name for name, field in _AMOUNTS.items() if getattr(self, field) is not None]

    def _check(self) -> None:
        given = self._amounts()
        if len(given) != 1 and (given or not self.merge):
            found = " and ".join(given) + " are given" if given else "no amount is given"
            raise UsageError(f"{found}; give exactly one of {', '.join(_AMOUNTS)}")
        if self.peers.world > 1:
            self._check_shared()
        if self.report_it:
            if self.plan_only:
                raise UsageError("--report does not go with --plan-only: the page is about the new net")
            check_charts()
        if self.prefix is None and not self.plan_only:
            raise UsageError("-o PREFIX is missing", hint="add -o PREFIX, or --plan-only to write nothing")
        if self.speedup is None:
            self._refuse({"scope", "selection", "cost"}, "only goes with --speedup")
        else:
            self._refuse({"even_if_slower"}, "does not go with --speedup, which takes only what is cheaper")
        if not given:
            alone = {"scheme", "fc", "except_", "only", "round_to", "style", "images"}
            self._refuse(alone, "does not go with --merge alone")
        if self.merge:
            self._refuse({"even_if_slower"}, "does not go with --merge, which would undo it")
        if self.cost != "latency":
            self._refuse({"latency_table"}, "only goes with --cost latency")
        if self.images is None:
            companions = {
                "root",
                "n_images",
                "mean",
                "scale",
                "crop",
                "resize",
                "bgr",
                "skip_bad",
                "positions",
                "solver",
                "refit_kept",
                "polish",
                "resume",
            }
            self._refuse(companions, "only goes with --images")
        if self.plan_file is None:
            self._refuse({"force"}, "only goes with --plan")
        if self.ranks is not None or self.rank_config is not None:
            self._refuse({"round_to"}, "does not go with ranks that are given")
        if self.scheme != "asymmetric-3d":
            self._refuse({"same_ranks"}, "only goes with --scheme asymmetric-3d")

    def _check_targets(self) -> None:
        """Refuse a PREFIX that cannot be written before the work is done."""
        from caffe_proto import files

        if self.prefix is not None and not self.plan_only:
            named = outputs.names(self.prefix, weights=True, onnx=self.onnx)
            files.check([*named.values(), *([self._html] if self.report_it else [])], self._inputs())

    def _check_shared(self) -> None:
        """Refuse what several processes cannot do together."""
        if self.images is None:
            raise UsageError(
                f"there is no work for {self.peers.world} processes",
                hint="start one, or add --images: several share a fit to them",
            )
        self._refuse({"resume", "polish", "report_it"}, "does not go with several processes: start one")
        if self.cost == "latency":
            raise UsageError(
                "--cost latency does not go with several processes",
                hint="start one: they disturb each other's times",
            )

    def _refuse(self, options: set[str], why: str) -> None:
        """Refuse options that would be ignored."""
        console.refuse(options & self.said, why, {"selection": "rank_selection", "report_it": "report"})

    def _plan(
        self,
        model: Model,
        found: Found,
        spectra: Spectra,
        images: Calibration | None,
        step: Callable[[int], None],
    ) -> Plan:
        from caffe_proto.files import read_text
        from hrank.joint import check_kind

        from .plan import Plan
        from .planner import make_plan

        config: Mapping[str, LayerPlan] | None = None if self._amounts() else {}
        plan = self._given_plan()
        if plan is not None:
            if plan.complete:
                decided = {"scheme", "fc", "except_", "only", "round_to", "even_if_slower", "style"}
                decided |= {"solver", "refit_kept", "fold_bn", "merge"}
                self._refuse(decided, "does not go with a plan that says everything")
                if not plan.target.get("fit"):
                    self._refuse({"images"}, "does not go with a plan that fits nothing to them")
                return plan
            config = plan.layers
        elif self.rank_config is not None:
            source = read_text(self.rank_config)
            check_kind(source, "decompose", self.rank_config)
            config = Plan.from_json(source, self.rank_config).layers
        return make_plan(
            model,
            scheme=self.scheme,
            speedup=self.speedup,
            energy=self.energy,
            ranks=_numbers(self.ranks),
            rank_config=config,
            scope=self.scope,
            fc=self.fc,
            except_layers=layer_names(self.except_),
            only=layer_names(self.only) if self.only else None,
            round_to=self.round_to,
            style=self.style,
            even_if_slower=self.even_if_slower,
            images=images,
            selection=self.selection,
            same_ranks=self.same_ranks,
            solver=self.solver,
            refit_kept=self.refit_kept,
            fold_bn=self.fold_bn,
            merge=self.merge,
            cost=self.cost,
            latency=self._latency(found),
            step=step,
            input_shapes=self.input_shapes,
            found=found,
            spectra=spectra,
        )

    def _print_plan(self, plan: Plan) -> None:
        from caffe_proto import files

        if self.prefix is not None:
            with files.writing([f"{self.prefix}.plan.json"], self._inputs(self.plan_file)) as (temporary,):
                temporary.write_text(plan.to_json())
        click.echo(plan.to_json(), nl=False)

    def _inputs(self, *more: str | None) -> list[str | None]:
        """Every file that was given, none of which may be overwritten."""
        given = [self.net, self.weights, self.rank_config, self.compare, self.latency_table]
        return [*given, *self.except_, *self.only, *more]

    def _write(self, changed: Model, plan: Plan) -> dict[str, str]:
        names = outputs.names(str(self.prefix), weights=True, onnx=self.onnx)
        outputs.write(names, changed, plan, self._inputs(), self.plan_file, self.input_shapes)
        return names

    def _finish(
        self,
        report: Report,
        files: dict[str, str],
        reference: _Reference | None,
        subjects: list[Subject],
        page: Callable[[Model, Mapping[str, float], Times | None], None] | None,
    ) -> None:
        """Read the written files again, and say what they are."""
        from caffe_proto.costs import cost
        from caffe_proto.graph import build
        from caffe_proto.shape_inference import infer

        written = console.load_model(
            files["prototxt"], files["caffemodel"], self.phase, self.stages, self.level
        )
        after = cost(infer(build(written.net), self.input_shapes, partial=True))
        if after.macs != report.macs[1] or after.params != report.params[1]:
            raise AssertionError("the written files do not cost what was planned")
        apart = self._apart(written, reference) if reference is not None else {}
        times = outputs.times(subjects, self.threads)
        gains = outputs.gains(subjects, self.threads)
        if page is not None:
            from .report_given import timed

            page(written, apart, timed(times, gains, self.threads) if times else None)
            files = files | {"html": self._html}
        if self.as_json:
            console.echo_json(outputs.document(report, files, apart, times, gains))
        else:
            outputs.show(report, files, apart, times, gains)

    @property
    def _html(self) -> str:
        return f"{self.prefix}.html"

    def _given(
        self,
        model: Model,
        changed: Model,
        report: Report,
        images: Calibration | None,
        labels: Sequence[np.ndarray],
    ) -> Given:
        """What the page is told besides the files and the times."""
        import numpy as np

        from .report_given import Given, judged

        accuracies: tuple[Accuracy, ...] = ()
        if images is not None and len(images.images) == 1:
            (array,) = images.images.values()
            known = np.concatenate(labels) if labels else None
            accuracies = judged(model, changed, array, known, self.threads)
        fed = "random input" if self.compare == "random" else str(self.compare)
        return Given(
            accuracies=accuracies,
            images="On the images that the new net was fitted to." if accuracies else "",
            compared=fed if self.compare else "",
            fitted={
                row.name: row.error
                for row in report.rows
                if row.error is not None and row.error_of == "responses"
            },
            command=console.command_line(),
            input_shapes=self.input_shapes,
            force=self.force,
        )

    def _page(
        self,
        model: Model,
        plan: Plan,
        given: Given,
        written: Model,
        apart: Mapping[str, float],
        times: Times | None,
    ) -> None:
        """Write PREFIX.html."""
        told = replace(given, apart=apart, times=times)
        write_page(self._html, str(self.prefix), plan.to_json(), model, written, told, self._inputs())

    def _reference(self, model: Model) -> _Reference:
        """What to feed, given or random, and what the net makes of it."""
        from caffe_proto import runtime
        from caffe_proto.array_files import feeds as read_feeds
        from caffe_proto.onnx_export import Request

        request = Request(input_shapes=self.input_shapes)
        with runtime.session(model, threads=self.threads, input_shapes=self.input_shapes) as opened:
            if self.compare == "random":
                feeds = runtime.random_feeds(model, request, self.seed)
            else:
                feeds = read_feeds([str(self.compare)], opened.input_names)
            return feeds, opened.run(feeds)

    def _apart(self, written: Model, compared: _Reference) -> dict[str, float]:
        """Relative difference of every output, ||b - a|| / ||a||."""
        import numpy as np

        from caffe_proto import runtime

        feeds, reference = compared
        with runtime.session(written, threads=self.threads, input_shapes=self.input_shapes) as opened:
            results = opened.run(feeds)
        norms = {
            name: (np.linalg.norm(results[name] - array), np.linalg.norm(array))
            for name, array in reference.items()
        }
        return {
            name: float(difference / norm) if norm else float(difference)
            for name, (difference, norm) in norms.items()
        }
