"""The decompose and demo commands, and ``main``: one program of all three packages' commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import caffe_proto
from caffe_proto import console
from caffe_proto.cli import COMMANDS as CAFFE_COMMANDS
from caffe_proto.console import (
    input_shape_option,
    json_option,
    net_argument,
    seed_option,
    state_options,
    threads_option,
)
from caffe_proto.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from caffe_proto.latency import Subject, Timing
    from caffe_proto.model import Model

    from .applier import Report
    from .plan import Plan
    from .targets import Found, Spectra

    _Reference = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(caffe_proto.__version__, prog_name="caffe-lra")
def cli() -> None:
    """Make legacy Caffe networks fast again: decompose them, export ONNX, time them."""


def _numbers(value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(one) for one in value.split(",")]
    except ValueError:
        raise UsageError(
            f"--ranks {value!r} is no list of whole numbers", hint="for example 13,21,27"
        ) from None


def _names(values: Sequence[str]) -> list[str]:
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


@cli.command()
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
    type=click.Choice(["auto", "pca", "svd", "kmeans", "spatial"]),
    default="auto",
    show_default=True,
    help="auto: pca or spatial, by layer, the cheaper at equal energy.",
)
@click.option("--fc/--no-fc", default=False, show_default=True, help="Fully connected layers too.")
@click.option(
    "--except", "except_", multiple=True, metavar="NAME|FILE.json", help="Leave this layer alone; repeatable."
)
@click.option("--only", multiple=True, metavar="NAME|FILE.json", help="Touch only these layers; repeatable.")
@click.option("--speedup", type=float, help="MACs before / after.")
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
    type=click.Choice(["all", "conv"]),
    default="all",
    show_default=True,
    help="What --speedup counts: the whole net or its convolutions.",
)
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
    type=click.Choice(["default", "wen", "tai", "he"]),
    default="default",
    show_default=True,
    help="Layer names, bias and filler rules of the published tools.",
)
@click.option("--force", is_flag=True, help="Apply a plan to other files than it was made for.")
@click.option("--plan-only", is_flag=True, help="Print the plan and change nothing.")
@click.option(
    "--compare",
    metavar="X.npy|random",
    help="Run both nets on this input and print how far their outputs are apart.",
)
@click.option("--onnx", is_flag=True, help="Also write PREFIX.onnx.")
@click.option("--time", "time_it", is_flag=True, help="Also time both nets with onnxruntime.")
@threads_option
@seed_option
@input_shape_option
@state_options
@json_option
def decompose(**given: Any) -> None:
    """Replace layers of NET by cheaper chains of smaller ones, and write the new net.

    Give exactly one of --speedup, --energy, --ranks, --rank-config and --plan. A layer that would not get
    cheaper is kept, with the reason.
    """
    job = _Decompose(**given)
    job.run()


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
    force: bool
    plan_only: bool
    compare: str | None
    onnx: bool
    time_it: bool
    threads: int
    seed: int
    input_shapes: dict[str, tuple[int, ...]]
    phase: str
    stages: Sequence[str]
    level: int
    as_json: bool

    def run(self) -> None:
        from .applier import apply
        from .targets import Spectra, find

        self._check()
        model = console.load_model(self.net, self.weights, self.phase, self.stages, self.level)
        found = find(model, self.input_shapes)
        with console.progress("factoring", len(found.targets)) as step:
            spectra = Spectra(found, step)
            plan = self._plan(model, found, spectra)
            if self.plan_only:
                self._print_plan(plan)
                return
            changed, report = apply(
                plan, model, force=self.force, input_shapes=self.input_shapes, found=found, spectra=spectra
            )
        reference = self._reference(model) if self.compare else None  # what can fail comes before the writing
        subjects = self._subjects(model, changed) if self.time_it else []
        files = self._write(changed, plan)
        self._finish(report, files, reference, subjects)

    def _check(self) -> None:
        amounts = {
            "--speedup": self.speedup,
            "--energy": self.energy,
            "--ranks": self.ranks,
            "--rank-config": self.rank_config,
            "--plan": self.plan_file,
        }
        given = [name for name, value in amounts.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) + " are given" if given else "no amount is given"
            raise UsageError(f"{found}; give exactly one of {', '.join(amounts)}")
        if self.prefix is None and not self.plan_only:
            raise UsageError("-o PREFIX is missing", hint="add -o PREFIX, or --plan-only to write nothing")

    def _plan(self, model: Model, found: Found, spectra: Spectra) -> Plan:
        from caffe_proto.files import read_text

        from .plan import Plan
        from .planner import make_plan

        config = None
        if self.plan_file is not None:
            plan = Plan.from_json(read_text(self.plan_file), self.plan_file)
            if all(entry.scheme for entry in plan.layers.values()):
                return plan
            config = plan.layers
        elif self.rank_config is not None:
            config = Plan.from_json(read_text(self.rank_config), self.rank_config).layers
        return make_plan(
            model,
            scheme=self.scheme,
            speedup=self.speedup,
            energy=self.energy,
            ranks=_numbers(self.ranks),
            rank_config=config,
            scope=self.scope,
            fc=self.fc,
            except_layers=_names(self.except_),
            only=_names(self.only) if self.only else None,
            round_to=self.round_to,
            style=self.style,
            even_if_slower=self.even_if_slower,
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
        return [self.net, self.weights, self.rank_config, self.compare, *self.except_, *self.only, *more]

    def _write(self, changed: Model, plan: Plan) -> dict[str, str]:
        """Write everything under temporary names, then rename it all."""
        from caffe_proto import files
        from caffe_proto.model import write_weights
        from caffe_proto.onnx_export import Request, export_onnx

        names = {
            "prototxt": f"{self.prefix}.prototxt",
            "caffemodel": f"{self.prefix}.caffemodel",
            "plan": f"{self.prefix}.plan.json",
        }
        if self.onnx:
            names["onnx"] = f"{self.prefix}.onnx"
        inputs = self._inputs(self.plan_file if self.plan_file != names["plan"] else None)
        with files.writing(names.values(), inputs) as temporary:
            temporary[0].write_bytes(files.text_bytes(changed.net.text))
            assert changed.weights is not None
            write_weights(changed.weights, temporary[1], hdf5=False)
            temporary[2].write_text(plan.to_json())
            if self.onnx:
                made = export_onnx(changed, Request(input_shapes=self.input_shapes))
                temporary[3].write_bytes(made.SerializeToString())
        return names

    def _finish(
        self, report: Report, files: dict[str, str], reference: _Reference | None, subjects: list[Subject]
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
        times = self._times(subjects) if subjects else []
        if self.as_json:
            console.echo_json(_json(report, files, apart, times))
        else:
            _print(report, files, apart, times)

    def _reference(self, model: Model) -> _Reference:
        """What to feed, given or random, and what the net makes of it."""
        from caffe_proto import runtime
        from caffe_proto.cli import _feeds
        from caffe_proto.onnx_export import Request

        request = Request(input_shapes=self.input_shapes)
        with runtime.session(model, threads=self.threads, input_shapes=self.input_shapes) as opened:
            if self.compare == "random":
                feeds = runtime.random_feeds(model, request, self.seed)
            else:
                feeds = _feeds([str(self.compare)], opened.input_names)
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

    def _subjects(self, model: Model, changed: Model) -> list[Subject]:
        from caffe_proto import latency
        from caffe_proto.onnx_export import Request

        request = Request(input_shapes=self.input_shapes)
        names = (self.net, f"{self.prefix}.prototxt")
        return [
            latency.of_model(name, one, request) for name, one in zip(names, (model, changed), strict=True)
        ]

    def _times(self, subjects: list[Subject]) -> list[Timing]:
        from caffe_proto import latency
        from caffe_proto.runtime import Engine

        return latency.measure(subjects, Engine(self.threads))


def _ratio(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1] if pair[1] else 1.0


def _json(
    report: Report, files: dict[str, str], apart: dict[str, float], times: list[Timing]
) -> dict[str, Any]:
    speedup: dict[str, Any] = {"macs": _ratio(report.macs), "conv_macs": _ratio(report.conv_macs)}
    if times:
        speedup["latency"] = times[0].median / times[1].median
    layers = [
        {
            "name": row.name,
            "scheme": row.scheme,
            "ranks": list(row.ranks),
            "full_rank": row.full_rank,
            "macs": list(row.macs) if row.macs else None,
            "error": row.error,
        }
        for row in report.rows
    ]
    made: dict[str, Any] = {
        "speedup": speedup,
        "macs": list(report.macs),
        "conv_macs": list(report.conv_macs),
        "params": list(report.params),
    }
    made |= {"layers": layers, "kept": report.kept, "files": files}
    if apart:
        made["outputs_apart"] = apart
    if times:
        made["latency_ms"] = [times[0].median, times[1].median]
    return made


def _print(report: Report, files: dict[str, str], apart: dict[str, float], times: list[Timing]) -> None:
    rows = [
        [
            row.name,
            row.scheme,
            "+".join(map(str, row.ranks)) + (f"/{row.full_rank}" if row.full_rank else ""),
            *((f"{row.macs[0]:,}", f"{row.macs[1]:,}", f"{_ratio(row.macs):.2f}x") if row.macs else "---"),
            "-" if row.error is None else f"{row.error:.4f}",
        ]
        for row in report.rows
    ]
    console.table(["layer", "scheme", "rank", "MACs before", "after", "ratio", "error"], rows)
    if report.rows:
        click.echo("error: ||W - W'|| / ||W|| of the layer's weights")
    reasons: dict[str, list[str]] = {}
    for name, reason in report.kept.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        click.echo(f"kept {', '.join(names)}: {reason}")
    click.echo()
    if any(not row.macs for row in report.rows):
        click.echo(
            "MACs and parameters behind inputs of unknown shape do not count; give it with --input-shape"
        )
    for what, pair in (
        ("MACs, whole net", report.macs),
        ("MACs, convolutions", report.conv_macs),
        ("parameters", report.params),
    ):
        click.echo(f"{what:20}{pair[0]:>17,} -> {pair[1]:>15,}  {_ratio(pair):.3f}x")
    for name, value in apart.items():
        click.echo(f"output {name}: ||y' - y|| / ||y|| = {value:.4g}")
    if times:
        click.echo(
            f"time, median        {times[0].median:>14.3f} ms -> {times[1].median:>12.3f} ms  {_ratio((times[0].median, times[1].median)):.3f}x"
        )
    click.echo("wrote " + ", ".join(files.values()))


@cli.command()
@click.option(
    "-o", "--output", "folder", default="caffe-lra-demo", show_default=True, help="Folder for what it writes."
)
@threads_option
def demo(folder: str, threads: int) -> None:
    """Try everything on a small trained net that comes with the program: LeNet, trained by this project."""
    from .demo import run

    run(Path(folder), threads)


for _command in CAFFE_COMMANDS:
    cli.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``caffe-lra`` with these arguments (default: the process's own); returns the exit status."""
    return console.run(cli, argv)
