"""The decompose command: options in, one job, files and a report out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from caffe_proto import console
from caffe_proto.console import net_argument
from caffe_proto.peers import Peers, joined

from . import cli_planning as planning
from .cli_checks import check
from .cli_images import Images, read_images
from .cli_options import Options, options
from .cli_writing import Made, finish, write_plan

if TYPE_CHECKING:
    from caffe_proto.model import Model

    from .calibration import Calibration
    from .plan import Plan
    from .stage import Stage
    from .targets import Found, Spectra


@click.command()
@net_argument
@click.argument("weights")
@options
def decompose(**given: Any) -> None:
    """Replace layers of NET by cheaper chains of smaller ones, and write the new net.

    Give exactly one of --speedup, --energy, --ranks, --rank-config and --plan, or --merge alone. A layer that would
    not get cheaper is kept, with the reason. Under torchrun every process takes its share of --images.
    """
    with joined() as peers:
        _Decompose(Options(**given, said=console.said()), peers).run()


@dataclass(frozen=True)
class _Decompose:
    """One decompose command."""

    o: Options
    peers: Peers

    def run(self) -> None:
        o = self.o
        check(o, self.peers)
        model = o.load(o.net, o.weights)
        if o.batch is not None:
            o = replace(o, input_shapes=_batched(o, model, o.batch))
        _Decompose(o, self.peers)._work(model)

    def _work(self, model: Model) -> None:
        from .targets import find

        o = self.o
        found = find(planning.merged(o, model), o.input_shapes)
        with self._staged() as stage:
            images = read_images(model, vars(o), stage, self.peers) if stage is not None else None
            calibration = images.calibration if images is not None else None
            plan, spectra = planning.planned(o, model, found, calibration)
            if o.plan_only:
                self._show_plan(plan)
                return
            made = self._made(model, plan, found, spectra, images)
        if self.peers.rank == 0:
            finish(o, model, made, lambda: stage.finish() if stage is not None else None)

    @contextmanager
    def _staged(self) -> Iterator[Stage | None]:
        """Where a fit to images keeps what it can be resumed from: PREFIX.fit, until the new net is written.

        Several processes have a folder each, and cannot resume.
        """
        from .stage import Stage

        o, shared = self.o, self.peers.world > 1
        if o.images is None:
            yield None
            return
        own = f".{self.peers.rank}" if shared else ""
        folder = f"{o.prefix}.fit{own}" if o.prefix is not None else None
        stage = None
        try:
            stage = Stage(folder, resume=o.resume)
            yield stage
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and folder is not None and not shared:
                if Stage.resumable(folder):
                    click.echo("interrupted; the same command with --resume goes on from here", err=True)
            elif stage is not None:
                stage.finish()
            raise
        if o.plan_only or shared:
            stage.finish()

    def _show_plan(self, plan: Plan) -> None:
        from .applier import doubts

        if self.peers.rank:
            return
        write_plan(self.o, plan)
        for doubt in doubts(plan.predicted, planning.engine(self.o)):
            click.echo(f"warning: {doubt}", err=True)

    def _made(self, model: Model, plan: Plan, found: Found, spectra: Spectra, images: Images | None) -> Made:
        """The new net."""
        from .applier import apply

        o = self.o
        calibration = images.calibration if images is not None else None
        with console.progress("fitting", _ticks(plan, calibration), "images") as step:
            changed, report = apply(
                plan,
                model,
                images=calibration,
                step=step,
                force=o.force,
                input_shapes=o.input_shapes,
                found=found,
                spectra=spectra,
                engine=planning.engine(o),
            )
        if o.polish is not None and calibration is not None:
            from .polish import polish

            with console.progress("polishing", o.polish, "steps") as step:
                changed, polished = polish(
                    model, changed, calibration, steps=o.polish, seed=o.seed, threads=o.threads, tick=step
                )
            report = replace(report, polish=polished)
        if plan.merges is not None and o.plan_file is None:
            plan = plan.with_late_merges(one.layers for one in report.late_merges)
        return Made(changed, plan, report, images)


def _ticks(plan: Plan, images: Calibration | None) -> int:
    if images is None:
        return 0
    from .fitting import ticks

    return ticks(plan, images)


def _batched(o: Options, model: Model, batch: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all inputs with another batch."""
    from caffe_proto.graph import build
    from caffe_proto.onnx_export import Request, source_shapes

    return source_shapes(build(model.net), Request(batch=batch, input_shapes=o.input_shapes))
