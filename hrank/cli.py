"""The prune command, and what apply does with its plans: options in, one job, files and a report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from caffe_proto import console
from caffe_proto.cli_data import image_options
from caffe_proto.console import (
    input_shape_option,
    json_option,
    net_argument,
    seed_option,
    state_options,
    threads_option,
)
from caffe_proto.errors import UsageError
from lra import outputs as files_of
from lra.cli_decompose import layer_names, read_calibration

from . import outputs

if TYPE_CHECKING:
    import numpy as np

    from caffe_proto.data.batches import Batch
    from caffe_proto.model import Model
    from lra.calibration import Calibration
    from lra.stage import Stage

    from .applier import Report
    from .counts import Count
    from .coupling import Coupling
    from .plan import Plan
    from .planner import Amount, Limits, Sizes

_CRITERIA = [
    "rank", "rowcol", "apoz", "activation", "nuclear", "l1", "next-l1", "gamma", "geometric-median", "random",
    "reverse", "edge",
]  # fmt: skip  # hrank.criteria.CRITERIA, without waiting for its imports
_MEASURED = {"rank", "rowcol", "apoz", "activation", "nuclear", "reverse", "edge"}
_REPAIRS = ("bias", "lsq", "bn")  # in the order in which they are made
_COMPANIONS = {"root", "n_images", "mean", "scale", "crop", "resize", "bgr", "skip_bad"}
_DECIDES = {
    "criterion", "at", "rectify", "rank_file", "coupled", "group_score", "except_", "only", "round_to", "min_channels",
}  # fmt: skip


@click.command()
@net_argument
@click.argument("weights", required=False)
@click.option(
    "-o",
    "--output",
    "prefix",
    metavar="PREFIX",
    help="Writes PREFIX.prototxt, PREFIX.caffemodel, PREFIX.plan.json.",
)
@click.option(
    "--rates", metavar="STRING", help="Fractions pruned, one a position of the net: [0.1]+[0.6]*35+[0.0]*2."
)
@click.option(
    "--rates-as",
    type=click.Choice(["hrank", "hrankplus"]),
    default="hrank",
    show_default=True,
    help="Which published code's positions and rounding --rates has; --dry-run lists the positions.",
)
@click.option("--rate-config", metavar="FILE.json", help='Rates by layer: {"conv1": 0.5}.')
@click.option("--speedup", type=float, help="MACs before / after; one rate for all layers is found.")
@click.option("--params", type=float, help="Parameters before / after; with --speedup both are met.")
@click.option("--plan", "plan_file", metavar="FILE.plan.json", help="Apply a plan made before.")
@click.option(
    "--criterion",
    type=click.Choice(_CRITERIA),
    default="rank",
    show_default=True,
    help="Which filters stay: rank, rowcol, apoz, activation, nuclear, reverse and edge are measured on images.",
)
@click.option(
    "--at",
    type=click.Choice(["relu", "after_pool", "conv"]),
    default="relu",
    show_default=True,
    help="Where maps are read: behind the ReLU, behind a max pooling as the authors, or at the convolution.",
)
@click.option(
    "--rectify",
    is_flag=True,
    help="Read max(maps, 0) where no ReLU stands before, so that ranks tell filters apart.",
)
@click.option(
    "--rank-file",
    metavar="FILE",
    help="Measured before with --save-ranks, or a folder of published rank_conv*.npy.",
)
@click.option("--save-ranks", metavar="FILE", help="Write what was measured, for --rank-file.")
@click.option(
    "--coupled",
    is_flag=True,
    help="Also layers that share their channels with others (residual sums), as one.",
)
@click.option(
    "--group-score",
    type=click.Choice(["mean", "max", "min"]),
    default="mean",
    show_default=True,
    help="With --coupled: a channel's score from those of the layers that share it.",
)
@click.option(
    "--except", "except_", multiple=True, metavar="NAME|FILE.json", help="Leave this layer whole; repeatable."
)
@click.option("--only", multiple=True, metavar="NAME|FILE.json", help="Touch only these layers; repeatable.")
@click.option(
    "--round-to",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Channels are multiples of this, rounded up.",
)
@click.option(
    "--min-channels", type=click.IntRange(1), default=1, show_default=True, help="No layer keeps fewer."
)
@click.option(
    "--mask-only", is_flag=True, help="Keep all shapes and set what would go to zero, as HRank's own code."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="List groups, layers, positions of rates and sizes; read no images, write nothing.",
)
@click.option(
    "--count",
    type=click.Choice(["macs", "hrank", "hrankplus"]),
    default="macs",
    show_default=True,
    help="Also count as the published code does.",
)
@click.option(
    "--repair",
    multiple=True,
    type=click.Choice(["none", *_REPAIRS]),
    help="Without training, from images: bias adds what was lost on average, lsq fits the layers behind, bn estimates "
    "BatchNorm again; repeatable, made in this order.",
)
@click.option(
    "--positions",
    type=click.IntRange(1),
    help="With --repair lsq: places of each image at which responses are sampled.",
)
@click.option(
    "--compare", is_flag=True, help="All criteria on the same counts, judged on the images, before training."
)
@click.option(
    "--then-decompose",
    type=float,
    metavar="R",
    help="Decompose what is left, until the whole is R times cheaper; PREFIX.plan.json holds both plans.",
)
@click.option("--force", is_flag=True, help="Use a plan or a rank file of other files.")
@partial(image_options, required=False, n_images=500)
@click.option("--onnx", is_flag=True, help="Also write PREFIX.onnx.")
@click.option("--time", "time_it", is_flag=True, help="Also time both nets with onnxruntime.")
@threads_option
@seed_option
@input_shape_option
@state_options
@json_option
def prune(**given: Any) -> None:
    """Remove filters of NET, and what reads them, and write the smaller net.

    Give exactly one of --rates, --rate-config, --plan, and --speedup or --params. Layers that must keep the same
    channels stay whole without --coupled.
    """
    context = click.get_current_context()
    said = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    _Prune(**given, said=frozenset(said)).run()


@dataclass(frozen=True, eq=False)
class _Images:
    """The images as the net wants them, in a file of their own, and labels where there are any."""

    array: np.ndarray
    labels: np.ndarray | None
    calibration: Calibration


@dataclass
class _Prune:
    """One prune command; fields are its options."""

    net: str
    weights: str | None
    prefix: str | None
    rates: str | None
    rates_as: str
    rate_config: str | None
    speedup: float | None
    params: float | None
    plan_file: str | None
    criterion: str
    at: Any
    rectify: bool
    rank_file: str | None
    save_ranks: str | None
    coupled: bool
    group_score: str
    except_: Sequence[str]
    only: Sequence[str]
    round_to: int
    min_channels: int
    mask_only: bool
    dry_run: bool
    count: str
    repair: Sequence[str]
    positions: int | None
    compare: bool
    then_decompose: float | None
    force: bool
    images: str | None
    root: str | None
    n_images: int
    mean: str | None
    scale: float | None
    crop: tuple[int, int] | None
    resize: tuple[int, int] | None
    bgr: bool | None
    skip_bad: bool
    onnx: bool
    time_it: bool
    threads: int
    seed: int
    input_shapes: dict[str, tuple[int, ...]]
    phase: str
    stages: Sequence[str]
    level: int
    as_json: bool
    said: frozenset[str]  # options that stand on the command line

    def run(self) -> None:
        from lra.stage import Stage

        from .coupling import find

        self._check()
        model = console.load_model(self.net, self.weights, self.phase, self.stages, self.level)
        coupling = find(model, self.input_shapes)
        if self.dry_run:
            self._listed(coupling)
            return
        stage = Stage()
        try:
            self._work(model, coupling, stage)
        finally:
            stage.close()

    def _work(self, model: Model, coupling: Coupling, stage: Stage) -> None:
        images = self._read(model, stage) if self.images is not None else None
        known, trials = None, []
        if self.plan_file is not None:
            plan = self._given_plan
            sizes = None
        else:
            sizes = self._sizes(coupling)
            layers = _scored(coupling, sizes)
            known = self._measured(coupling, layers, images)
            plan = self._plan(coupling, sizes, layers, known, self.criterion)
            if self.compare and images is not None:
                trials = self._trials(model, coupling, sizes, layers, known, images)
        if self.prefix is None:
            if self.as_json:
                console.echo_json({"comparison": outputs.comparison(trials)})
            else:
                outputs.show_trials(trials)
            return
        self._finish(model, coupling, plan, images, trials, self._warnings(known, plan))

    # Checks ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        budget = [
            name
            for name, value in (("--speedup", self.speedup), ("--params", self.params))
            if value is not None
        ]
        amounts = {"--rates": self.rates, "--rate-config": self.rate_config, "--plan": self.plan_file}
        given = [name for name, value in amounts.items() if value is not None] + budget[:1]
        if len(given) > 1 or (not given and not self.dry_run):
            found = " and ".join(given) + " are given" if given else "no amount is given"
            raise UsageError(f"{found}; give exactly one of {', '.join(amounts)}, and --speedup or --params")
        if self.prefix is None and not self.dry_run and not self.compare:
            raise UsageError("-o PREFIX is missing", hint="add -o PREFIX, or --dry-run to write nothing")
        if self.weights is None and not self.dry_run:
            raise UsageError("WEIGHTS is missing", hint="--dry-run alone does without")
        if self.rates is None and not self.dry_run:
            self._refuse({"rates_as"}, "only goes with --rates")
        if self.plan_file is not None:
            self._refuse(_DECIDES | {"compare", "save_ranks"}, "does not go with --plan, which has decided")
        elif self.rank_file is None:
            self._refuse({"force"}, "only goes with --plan or --rank-file")
        if not self.coupled:
            self._refuse({"group_score"}, "only goes with --coupled")
        if self.mask_only:
            self._refuse({"then_decompose"}, "does not go with --mask-only: masks leave every shape as it is")
            if "lsq" in self.repair:
                raise UsageError(
                    "--repair lsq does not go with --mask-only: it fits the layers of a smaller net"
                )
            if not budget and self.plan_file is None:
                self._refuse(
                    {"coupled"}, "does not go with rates and --mask-only: each layer is masked by itself"
                )
        if "none" in self.repair and len(set(self.repair)) > 1:
            raise UsageError("--repair none does not go with other repairs")
        if self.prefix is None:
            self._refuse({"onnx", "time_it", "then_decompose"}, "only goes with -o PREFIX")
        self._check_images()

    def _check_images(self) -> None:
        measured = self.plan_file is None and (self.criterion in _MEASURED or self.compare)
        if self.rank_file is not None and not measured:
            raise UsageError(f"--rank-file does not go with criterion {self.criterion}, which needs none")
        if self.rank_file is not None:
            self._refuse({"save_ranks", "at", "rectify"}, "does not go with --rank-file")
        if not measured:
            self._refuse({"save_ranks", "at", "rectify"}, "only goes with criteria that are measured")
        own = measured and self.criterion in _MEASURED and self.rank_file is None
        needed = [f"--criterion {self.criterion}"] if own else []
        needed += ["--compare"] if self.compare else []
        needed += [f"--repair {name}" for name in self._repairs]
        if self.images is None:
            if needed and not self.dry_run:
                raise UsageError(f"{needed[0]} needs images", hint="add --images SRC")
            self._refuse(_COMPANIONS | {"save_ranks"}, "only goes with --images")
        elif not needed:
            raise UsageError(
                "--images is not needed",
                hint="it goes with criteria that are measured, --repair and --compare",
            )
        if "lsq" not in self.repair:
            self._refuse({"positions"}, "only goes with --repair lsq")

    def _refuse(self, options: set[str], why: str) -> None:
        """Refuse options that would be ignored."""
        console.refuse(options & self.said, why, {"time_it": "time"})

    @property
    def _repairs(self) -> list[str]:
        return [name for name in _REPAIRS if name in self.repair]

    # Deciding --------------------------------------------------------------------------------------------------

    @cached_property
    def _given_plan(self) -> Plan:
        from caffe_proto.files import read_text

        from .joint import prunes
        from .plan import Plan

        source = read_text(str(self.plan_file))
        if prunes(source, self.plan_file) == "both":
            raise UsageError(
                "holds a decomposition too", path=self.plan_file, hint="caffe-lra apply makes both of it"
            )
        return Plan.from_json(source, self.plan_file)

    def _amount(self) -> Amount:
        from caffe_proto.files import read_text

        from . import rates
        from .planner import Amount

        if self.rates is not None:
            return Amount(rates.parse(self.rates), self.rates_as)
        if self.rate_config is not None:
            return Amount(by_layer=rates.from_json(read_text(self.rate_config), self.rate_config))
        return Amount(speedup=self.speedup, params=self.params)

    def _limits(self) -> Limits:
        from .planner import Limits

        only = tuple(layer_names(self.only)) if self.only else None
        excepted = tuple(layer_names(self.except_))
        return Limits(excepted, only, self.coupled, self.round_to, self.min_channels, self.mask_only)

    def _sizes(self, coupling: Coupling) -> Sizes:
        from .planner import sizes

        return sizes(coupling, self._amount(), self._limits())

    def _measured(self, coupling: Coupling, layers: Sequence[str], images: _Images | None) -> Any:
        """What is known of the layers' maps: from a rank file, or from one pass over the images."""
        from . import planner, rank_files
        from .measure import measure

        if self.rank_file is not None:
            return planner.read_ranks(self.rank_file, coupling, self.at, force=self.force)
        if images is None or not (self.criterion in _MEASURED or self.compare):
            return None
        names = planner.measured_layers(coupling, layers, self.at)
        if not names:
            return None
        nuclear = self.compare or self.criterion == "nuclear"
        with console.progress("ranking", len(images.array), "images") as step:
            found = measure(
                coupling.model,
                images.array,
                at=self.at,
                layers=names,
                nuclear=nuclear,
                rectify=self.rectify,
                threads=self.threads,
                step=step,
            )
        if self.save_ranks is not None:
            source = {"images": self.images, "n_images": len(images.array), **self._places()}
            rank_files.write(
                self.save_ranks,
                rank_files.RankFile.of(coupling.model, found, source),
                [self.net, self.weights],
            )
        return found

    def _plan(
        self, coupling: Coupling, sizes: Sizes, layers: Sequence[str], known: Any, criterion: str
    ) -> Plan:
        from . import planner

        evidence = planner.evidence(coupling.model, layers, known, self.seed)
        by_layer, reasons = planner.scores(criterion, evidence)
        target: dict[str, Any] = {**self._amount().record(), "criterion": criterion}
        if criterion == "random":
            target["seed"] = self.seed
        if criterion in _MEASURED:
            target |= self._places() if self.rank_file is None else {"rank_file": self.rank_file}
            if self.images is not None and self.rank_file is None:
                target |= {"images": self.images, "n_images": self.n_images}
        if self._repairs:
            target["repair"] = self._repairs
        if self.mask_only:
            target["masks"] = True
        return planner.choose(coupling, sizes, by_layer, reasons, reduce=self.group_score, target=target)

    def _places(self) -> dict[str, Any]:
        """Where the maps are read, and by which seed the images are drawn."""
        return {"at": self.at, **({"rectify": True} if self.rectify else {}), "seed": self.seed}

    def _warnings(self, known: Any, plan: Plan) -> list[str]:
        """What makes the order of a pruned layer's filters doubtful."""
        from .measure import Measured

        if self.criterion not in ("rank", "reverse", "edge", "rowcol") or not isinstance(known, Measured):
            return []
        return [
            f'layer "{name}": {one}'
            for name, said in known.warnings().items()
            if name in plan.layers
            for one in said
        ]

    # Images ----------------------------------------------------------------------------------------------------

    def _read(self, model: Model, stage: Stage) -> _Images:
        """The images that the options name, as the net wants them."""
        import numpy as np

        labels: list[np.ndarray] = []

        def note(batch: Batch) -> None:
            if batch.labels is not None:
                labels.append(batch.labels)

        calibration = read_calibration(model, vars(self), stage, note)
        (array,) = calibration.images.values()
        return _Images(array, np.concatenate(labels) if labels else None, calibration)

    # Changing --------------------------------------------------------------------------------------------------

    def _pruned(self, plan: Plan, model: Model) -> tuple[Model, Report]:
        from .applier import apply

        return apply(plan, model, mask_only=self.mask_only, force=self.force, input_shapes=self.input_shapes)

    def _repaired(
        self, coupling: Coupling, plan: Plan, pruned: Model, images: _Images | None
    ) -> tuple[Model, list[outputs.Repair]]:
        """The pruned net after the repairs that were asked for."""
        from . import repair

        made, said = pruned, []
        for name in self._repairs:
            assert images is not None
            with console.progress(f"repair {name}", None, "images") as step:
                if name == "bias":
                    one = repair.compensate(
                        plan,
                        coupling.model,
                        made,
                        images.array,
                        mask_only=self.mask_only,
                        threads=self.threads,
                        step=step,
                    )
                    errors: Mapping[str, float] = {}
                elif name == "bn":
                    one, errors = repair.reestimate(made, images.array, threads=self.threads, step=step), {}
                else:
                    one, errors = self._fitted(coupling, plan, made, images, step)
            made = one.model
            said.append(outputs.Repair(name, one.changed, one.kept, errors))
        return made, said

    def _fitted(
        self,
        coupling: Coupling,
        plan: Plan,
        pruned: Model,
        images: _Images,
        step: Callable[[int], None],
    ) -> tuple[Any, Mapping[str, float]]:
        from lra.repair import refit

        from .coupling import removed_places
        from .repair import Repaired, readers

        gone = coupling.removed(plan.keep)
        rows = {name: ~removed_places(gone, ids) for name, ids in coupling.filters.items()}
        found = refit(coupling.model, pruned, rows, readers(coupling, gone), images.calibration, step)
        errors = {name: error for name, error in found.errors.items() if error is not None}
        return Repaired(found.model, tuple(found.errors), found.kept), errors

    def _trials(
        self,
        model: Model,
        coupling: Coupling,
        sizes: Sizes,
        layers: Sequence[str],
        known: Any,
        images: _Images,
    ) -> list[outputs.Trial]:
        """Every criterion on the same counts."""
        from .compare import Judge

        judge = Judge(model, images.array, images.labels, self.threads)
        found = []
        with console.progress("comparing", len(_CRITERIA), "criteria") as step:
            for criterion in _CRITERIA:
                try:
                    plan = self._plan(coupling, sizes, layers, known, criterion)
                    reason = next((plan.kept[name] for name in layers if name in plan.kept), "")
                except UsageError as error:
                    reason = error.message
                if reason:
                    found.append(outputs.Trial(criterion, None, None, reason))
                    continue
                pruned, _ = self._pruned(plan, model)
                after = self._repaired(coupling, plan, pruned, images)[0] if self._repairs else None
                found.append(
                    outputs.Trial(criterion, judge(pruned), judge(after) if after is not None else None)
                )
                step(1)
        return found

    def _finish(
        self, model: Model, coupling: Coupling, plan: Plan, images: _Images | None,
        trials: Sequence[outputs.Trial], warnings: list[str],
    ) -> None:  # fmt: skip
        """Change, repair, decompose, write, read again, and say what came out."""
        from .joint import Joint, decompose_rest

        pruned, report = self._pruned(plan, model)
        changed, repairs = self._repaired(coupling, plan, pruned, images)
        text: Any = plan
        total = None
        if self.then_decompose is not None:
            second, changed, rest = decompose_rest(
                changed, report.macs, self.then_decompose, self.input_shapes
            )
            text, total = Joint(plan, second), (report.macs[0], rest.macs[1])
        files = files_of.names(str(self.prefix), weights=True, onnx=self.onnx)
        subjects = (
            files_of.subjects((self.net, f"{self.prefix}.prototxt"), (model, changed), self.input_shapes)
            if self.time_it
            else []
        )  # what can fail comes before the writing
        counted = self._counted(coupling, plan)
        files_of.write(files, changed, text, self._inputs(), self.plan_file, self.input_shapes)
        self._check_written(files, total[1] if total else report.macs[1])
        said = outputs.Said(
            report,
            files,
            self.mask_only,
            counted,
            warnings,
            repairs,
            files_of.times(subjects, self.threads),
            total,
        )
        if self.as_json:
            console.echo_json(outputs.document(said, trials))
        else:
            if trials:
                outputs.show_trials(trials)
            outputs.show(said)

    def _inputs(self) -> list[str | None]:
        """Every file that was given, none of which may be overwritten."""
        return [
            self.net,
            self.weights,
            self.rate_config,
            self.rank_file,
            self.save_ranks,
            *self.except_,
            *self.only,
        ]

    def _check_written(self, files: Mapping[str, str], macs: int) -> None:
        """Read the written files again."""
        from caffe_proto.binding import bind
        from caffe_proto.costs import cost
        from caffe_proto.graph import build
        from caffe_proto.shape_inference import infer

        written = console.load_model(
            files["prototxt"], files["caffemodel"], self.phase, self.stages, self.level
        )
        shaped = infer(build(written.net), self.input_shapes, partial=True)
        bind(shaped, written.weights)
        if cost(shaped).macs != macs:
            raise AssertionError("the written files do not cost what was planned")

    def _counted(self, coupling: Coupling, plan: Plan) -> tuple[str, Count, Count] | None:
        """FLOPs and parameters as the published code counts them."""
        if self.count == "macs":
            return None
        return self.count, *_published_counts(
            coupling,
            {name: len(keep) for name, keep in plan.keep.items()},
            self.count,
            self._layout_kept(coupling),
        )

    def _layout_kept(self, coupling: Coupling) -> Mapping[str, int] | None:
        """Filters that stay by the rate string, as the published counter has it; None without a string of its own."""
        if self.rates is None or self.rates_as != self.count:
            return None
        from . import rates

        return rates.layout(coupling, self.rates_as).kept(rates.parse(self.rates), counted=True)

    # Dry run ---------------------------------------------------------------------------------------------------

    def _listed(self, coupling: Coupling) -> None:
        """Every group and layer, the positions of a rate string, and what the amount comes to."""
        from . import counts, rates
        from .coupling import listing

        asked = self.rates or self.rate_config or self.speedup or self.params
        sizes = self._sizes(coupling) if asked else None
        keep = self._kept_counts(coupling, sizes)
        layout = rates.layout(coupling, self.rates_as)
        given = rates.parse(self.rates) if self.rates is not None else None
        before = counts.true(coupling, {})
        after = counts.true(coupling, {} if self.mask_only else self._true_keep(coupling, sizes))
        published = None
        if self.count != "macs":
            published = _published_counts(coupling, keep, self.count, self._layout_kept(coupling))
        if self.as_json:
            console.echo_json(
                {
                    "groups": _groups_json(coupling, keep),
                    "positions": [
                        {"position": number, "layers": list(one.layers), "what": one.what}
                        for number, one in enumerate(layout.positions, 1)
                    ],
                    "layout": layout.net,
                    "kept": {} if sizes is None else sizes.kept,
                    "macs": [before.flops, after.flops],
                    "params": [before.params, after.params],
                    **(
                        {"counted": {"as": self.count, "flops": [one.flops for one in published]}}
                        if published
                        else {}
                    ),
                }
            )
            return
        rows = [
            (*row[:3], str(keep.get(row[1], "")) if not row[1].startswith("> ") else "", row[3])
            for row in listing(coupling)
        ]
        console.table(["group", "layer", "channels", "kept", "remark"], rows, left=5)
        click.echo(f"\npositions of --rates --rates-as {self.rates_as} ({layout.net}):")
        columns = ["position", "layer", "what", "channels", *(["rate", "kept"] if given else [])]
        console.table(columns, [list(row) for row in layout.table(given)], left=3)
        click.echo()
        outputs.show_kept({} if sizes is None else sizes.kept)
        outputs.total("MACs, whole net", before.flops, after.flops)
        outputs.total("parameters", before.params, after.params)
        if published is not None:
            outputs.total(f"FLOPs as {self.count}", published[0].flops, published[1].flops)
            outputs.total(f"params as {self.count}", published[0].params, published[1].params)

    def _kept_counts(self, coupling: Coupling, sizes: Sizes | None) -> dict[str, int]:
        """How many filters each layer keeps."""
        if self.plan_file is not None:
            return {name: len(keep) for name, keep in self._given_plan.keep.items()}
        if sizes is None:
            return {}
        keep = coupling.choose(sizes.groups)
        return {**{name: len(channels) for name, channels in keep.items()}, **sizes.layers}

    def _true_keep(self, coupling: Coupling, sizes: Sizes | None) -> Mapping[str, Sequence[int]]:
        if self.plan_file is not None:
            return self._given_plan.keep
        return coupling.choose(sizes.groups) if sizes is not None else {}


def _scored(coupling: Coupling, sizes: Sizes) -> list[str]:
    from .planner import scored_layers

    return scored_layers(coupling, sizes)


def _groups_json(coupling: Coupling, keep: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {
            "group": group.index + 1,
            "layers": [
                {"name": one.layer, "type": one.type, "channels": one.channels, "kept": keep.get(one.layer)}
                for one in group.members
            ],
            "readers": [{"name": one.layer, "type": one.type} for one in group.consumers],
            "frozen": group.frozen,
        }
        for group in coupling.groups
    ]


def _published_counts(
    coupling: Coupling, kept: Mapping[str, int], grammar: str, counted: Mapping[str, int] | None
) -> tuple[Count, Count]:
    """FLOPs and parameters before and after, as the code of a grammar counts."""
    from . import counts, rates

    after = kept if counted is None else counted
    if grammar == "hrankplus":
        return counts.hrankplus(coupling, {}), counts.hrankplus(coupling, after)
    transitions = rates.layout(coupling, "hrank").transitions
    return counts.hrank(coupling, {}, transitions=transitions), counts.hrank(
        coupling, after, transitions=transitions
    )


def carry(
    plan_file: str, net: str, weights: str | None, prefix: str, force: bool, input_shapes: Any, phase: str,
    stages: Sequence[str], level: int, as_json: bool,
) -> None:  # fmt: skip
    """What the apply command does with a plan that prunes: the same channels go from a sibling of its net.

    What a repair made of the weights is no part of a plan: PREFIX.caffemodel of the pruning has it.
    """
    from caffe_proto.files import read_text

    from . import applier, joint
    from .plan import Plan

    source = read_text(plan_file)
    model = console.load_model(net, weights, phase, stages, level)
    text: Any
    total = None
    if joint.prunes(source, plan_file) == "both":
        text = joint.Joint.from_json(source, plan_file)
        changed, report, second = joint.apply(text, model, force=force, input_shapes=input_shapes)
        first, total = text.prune, (report.macs[0], second.macs[1])
    else:
        text = first = Plan.from_json(source, plan_file)
        changed, report = applier.apply(
            first, model, mask_only=bool(first.target.get("masks")), force=force,
            sibling=True, input_shapes=input_shapes,
        )  # fmt: skip
    names = files_of.names(prefix, weights=weights is not None, onnx=False)
    files_of.write(names, changed, text, [net, weights], plan_file, input_shapes)
    warnings = []
    if weights is not None and first.target.get("repair"):
        made = ", ".join(first.target["repair"])
        warnings.append(
            f"these weights are not repaired ({made}); the pruned caffemodel is, and fits this net too"
        )
    said = outputs.Said(report, names, bool(first.target.get("masks")), None, warnings, total=total)
    if as_json:
        console.echo_json(outputs.document(said, ()))
    else:
        outputs.show(said)
