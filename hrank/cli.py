"""The prune command: options in, one job, files and a report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from caffe_proto import console, files
from caffe_proto.console import net_argument
from caffe_proto.errors import UsageError
from caffe_proto.peers import Peers, joined
from lra.cli_images import Images, read_images

from . import cli_listing, cli_timing, cli_tuning, cli_writing, outputs
from .cli_apply import repairing, untrained
from .cli_checks import check
from .cli_options import CRITERIA, MEASURED, Options, options
from .cli_writing import Made

if TYPE_CHECKING:
    from caffe_proto.model import Model
    from lra.stage import Stage

    from .applier import Report
    from .coupling import Coupling
    from .plan import Plan
    from .planner import Sizes
    from .repairing import Repair
    from .tuning import Trained


@click.command()
@net_argument
@click.argument("weights", required=False)
@options
def prune(**given: Any) -> None:
    """Remove filters of NET, and what reads them, and write the smaller net.

    Give exactly one of --rates, --rate-config, --plan, and --speedup or --params. Layers that must keep the same
    channels stay whole without --coupled.
    """
    with joined() as peers:
        _Prune(Options(**given, said=console.said()), peers).run()


@dataclass(frozen=True)
class _Prune:
    """One prune command."""

    o: Options
    peers: Peers

    def run(self) -> None:
        from lra.stage import Stage

        from .coupling import find
        from .rates import layout

        o = self.o
        check(o)
        if self.peers.world > 1:
            self._check_shared()
        if o.prefix is not None and not o.dry_run:
            files.check(o.targets(), o.inputs())
        model = o.load(o.net, o.weights)
        coupling = find(model, o.input_shapes)
        if "count_c4_slip" in o.said and not layout(coupling, o.rates_as).c4_slip:
            o.refuse({"count_c4_slip"}, "only goes with the GoogLeNet of CIFAR: HRank counts no other net so")
        if o.dry_run:
            cli_listing.show(o, coupling)
            return
        ready = cli_tuning.prepare(o, coupling)
        stage = Stage()
        try:
            self._work(coupling, stage, ready)
        finally:
            stage.close()

    def _check_shared(self) -> None:
        """Refuse what several processes cannot do together."""
        o = self.o
        if o.images is None or o.dry_run:
            raise UsageError(
                f"there is no work for {self.peers.world} processes",
                hint="start one, or add --images: several share them",
            )
        o.refuse({"compare", "finetune", "report_it"}, "does not go with several processes: start one")
        if o.cost == "latency":
            raise UsageError(
                "--cost latency does not go with several processes",
                hint="start one: they disturb each other's times",
            )

    def _work(self, coupling: Coupling, stage: Stage, ready: cli_tuning.Ready | None) -> None:
        from .planner import scored_layers

        o = self.o
        images = (
            read_images(coupling.model, o.calibration, stage, self.peers) if o.images is not None else None
        )
        if images is not None and o.recorded is not None:
            o.recorded.check(images.calibration, force=o.force)
        known, trials = None, []
        if o.plan_file is not None:
            plan = o.given_plan
        else:
            found = cli_timing.sizes(o, coupling)
            layers = scored_layers(coupling, found)
            known = self._measured(coupling, layers, images)
            plan = self._plan(coupling, found, layers, known, o.criterion)
            if o.compare and images is not None:
                trials = self._trials(coupling, found, layers, known, images)
        if o.prefix is None:
            if o.as_json:
                console.echo_json({"comparison": outputs.comparison(trials)})
            else:
                outputs.show_trials(trials)
            return
        made = self._made(coupling, plan, images, ready)
        if self.peers.rank:
            return
        cli_writing.finish(o, coupling, made, trials, self._warnings(known, plan), images)

    # Deciding --------------------------------------------------------------------------------------------------

    def _measured(self, coupling: Coupling, layers: Sequence[str], images: Images | None) -> Any:
        """What is known of the layers' maps: from a rank file, or from one pass over the images."""
        from . import planner, rank_files
        from .measure import measure

        o = self.o
        if o.rank_file is not None:
            return planner.read_ranks(o.rank_file, coupling, o.at, force=o.force)
        if images is None or not o.measures:
            return None
        names = planner.measured_layers(coupling, layers, o.at)
        if not names:
            return None
        nuclear = o.compare or o.criterion == "nuclear"
        with console.progress("ranking", len(images.array), "images") as step:  # this process's share
            found = measure(
                coupling.model,
                images.array,
                at=o.at,
                layers=names,
                nuclear=nuclear,
                rectify=o.rectify,
                threads=images.calibration.threads,
                step=step,
                peers=self.peers,
            )
        if o.save_ranks is not None and self.peers.rank == 0:
            source = {"images": o.images, "n_images": images.calibration.count, **o.places()}
            rank_files.write(
                o.save_ranks, rank_files.RankFile.of(coupling.model, found, source), [o.net, o.weights]
            )
        return found

    def _plan(
        self, coupling: Coupling, sizes: Sizes, layers: Sequence[str], known: Any, criterion: str
    ) -> Plan:
        from . import planner

        o = self.o
        evidence = planner.evidence(coupling.model, layers, known, o.seed, o.input_shapes)
        by_layer, reasons = planner.scores(criterion, evidence)
        target: dict[str, Any] = {**o.amount().record(), "criterion": criterion}
        if criterion == "random":
            target["seed"] = o.seed
        if criterion in MEASURED:
            target |= o.places() if o.rank_file is None else {"rank_file": o.rank_file}
            if o.images is not None and o.rank_file is None:
                target |= {"images": o.images, "n_images": o.n_images}
        if o.mask_only:
            target["masks"] = True
        return planner.choose(coupling, sizes, by_layer, reasons, reduce=o.group_score, target=target)

    def _warnings(self, known: Any, plan: Plan) -> list[str]:
        """What makes times or the order of a pruned layer's filters doubtful, and what a given plan does not do again."""
        from .measure import Measured

        o = self.o
        doubts = cli_timing.doubts(plan.predicted, o.threads)
        if o.plan_file is not None:
            return doubts + (untrained(plan) if o.finetune is None else [])
        if o.criterion not in ("rank", "reverse", "edge", "rowcol") or not isinstance(known, Measured):
            return doubts
        return doubts + [
            f'layer "{name}": {one}'
            for name, said in known.warnings().items()
            if name in plan.layers
            for one in said
        ]

    # Changing --------------------------------------------------------------------------------------------------

    def _pruned(self, plan: Plan, model: Model) -> tuple[Model, Report]:
        from .applier import apply

        o = self.o
        return apply(plan, model, mask_only=o.mask_only, force=o.force, input_shapes=o.input_shapes)

    def _repaired(
        self, names: Sequence[str], coupling: Coupling, plan: Plan, pruned: Model, images: Images | None
    ) -> tuple[Model, list[Repair]]:
        """The pruned net after these repairs."""
        if images is None or not names:
            return pruned, []
        from .repairing import make

        o = self.o
        return make(
            names, plan, coupling.model, pruned, images.calibration, masks=o.mask_only, progress=repairing,
            inputs=o.input_shapes,
        )  # fmt: skip

    def _made(
        self, coupling: Coupling, plan: Plan, images: Images | None, ready: cli_tuning.Ready | None
    ) -> Made:
        """Prune, repair and train; BatchNorm is estimated behind the training, whose batches do not read it."""
        o = self.o
        changed, report = self._pruned(plan, coupling.model)
        behind = [name for name in o.repairs if name == "bn" and ready is not None]
        before = [name for name in o.repairs if name not in behind]
        changed, repairs = self._repaired(before, coupling, plan, changed, images)
        done = self._noted(plan, images)
        trained: list[Trained] = []
        if ready is not None:
            done = cli_tuning.recorded(done, o, ready)
            changed, trained = cli_tuning.tune(o, ready, done, coupling, changed)
        changed, last = self._repaired(behind, coupling, plan, changed, images)
        return Made(changed, done, report, (*repairs, *last), tuple(trained))

    def _noted(self, plan: Plan, images: Images | None) -> Plan:
        """The plan with the repairs that are made, and without what is not made again."""
        kept = {key: value for key, value in plan.target.items() if key not in ("repair", "finetune")}
        bare = replace(plan, target=kept)
        if not images or not self.o.repairs:
            return bare
        from .repairing import record

        return record(bare, self.o.repairs, images.calibration)

    def _trials(
        self, coupling: Coupling, sizes: Sizes, layers: Sequence[str], known: Any, images: Images
    ) -> list[outputs.Trial]:
        """Every criterion on the same counts."""
        from .compare import Judge

        o, model = self.o, coupling.model
        judge = Judge(model, images.array, images.labels, o.threads)
        found = []
        with console.progress("comparing", len(CRITERIA), "criteria") as step:
            for criterion in CRITERIA:
                try:
                    plan = self._plan(coupling, sizes, layers, known, criterion)
                    reason = next((plan.kept[name] for name in layers if name in plan.kept), "")
                except UsageError as error:
                    reason = error.message
                if reason:
                    found.append(outputs.Trial(criterion, None, None, reason))
                    continue
                pruned, _ = self._pruned(plan, model)
                after = self._repaired(o.repairs, coupling, plan, pruned, images)[0] if o.repairs else None
                found.append(
                    outputs.Trial(criterion, judge(pruned), judge(after) if after is not None else None)
                )
                step(1)
        return found
