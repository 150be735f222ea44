"""What decompose and apply write, and how they report it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import click

from caffe_proto import console, files
from caffe_proto.cli_time import gain_document, show_gains
from caffe_proto.errors import UsageError

if TYPE_CHECKING:
    from caffe_proto.latency import Gain, Subject, Timing
    from caffe_proto.model import Model
    from caffe_proto.shape_inference import InputShapes

    from .applier import Report
    from .plan import Timed


class PlanText(Protocol):
    """A plan of any kind."""

    def to_json(self) -> str:
        """The file's text."""
        ...


@dataclass(frozen=True)
class Said:
    """All that one command has to say; ``apart``: by output how far the two nets are apart."""

    report: Report
    files: Mapping[str, str]
    apart: Mapping[str, float] = field(default_factory=dict)
    times: Sequence[Timing] = ()
    gains: Sequence[Gain] = ()


def names(prefix: str, *, weights: bool, onnx: bool) -> dict[str, str]:
    """The files of a PREFIX by kind; raises UsageError where it names a folder."""
    if not prefix or prefix.endswith(("/", os.sep)):
        raise UsageError(f"-o {prefix!r} names no files", hint=f"add a name: {prefix}fast")
    found = {"prototxt": f"{prefix}.prototxt"}
    found |= {"caffemodel": f"{prefix}.caffemodel"} if weights else {}
    found |= {"plan": f"{prefix}.plan.json"}
    return found | ({"onnx": f"{prefix}.onnx"} if onnx else {})


def write(
    targets: dict[str, str],
    model: Model,
    plan: PlanText,
    inputs: Sequence[str | None],
    plan_file: str | None,
    shapes: InputShapes,
) -> None:
    """Write everything under temporary names, then rename it all; no input is overwritten.

    ``plan_file``, the plan that was read, may be written again where that changes nothing in it.
    """
    from caffe_proto.model import write_weights
    from caffe_proto.onnx_export import Request, export_onnx

    same = plan_file is not None and files.read_text(plan_file) == plan.to_json()
    with files.writing(targets.values(), [*inputs, None if same else plan_file]) as opened:
        temporary = dict(zip(targets, opened, strict=True))
        temporary["prototxt"].write_bytes(files.text_bytes(model.net.text))
        temporary["plan"].write_text(plan.to_json())
        if "caffemodel" in temporary and model.weights is not None:
            write_weights(model.weights, temporary["caffemodel"], hdf5=False)
        if "onnx" in temporary:
            made = export_onnx(model, Request(input_shapes=shapes))
            temporary["onnx"].write_bytes(made.SerializeToString())


def _ratio(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1] if pair[1] else 1.0


def time_line(what: str, pair: tuple[float, float]) -> str:
    """Milliseconds before and after, and the ratio."""
    return f"{what:20}{pair[0]:>14.3f} ms -> {pair[1]:>12.3f} ms  {_ratio(pair):.3f}x"


def where_line(timed: Timed) -> str:
    """Where a plan's times were measured."""
    return "times measured on " + ", ".join(f"{key} {value}" for key, value in timed.measured_on.items())


def subjects(names: Sequence[str], models: Sequence[Model], shapes: InputShapes) -> list[Subject]:
    """The nets before and after, to be timed."""
    from caffe_proto import latency
    from caffe_proto.onnx_export import Request

    request = Request(input_shapes=shapes)
    return [latency.of_model(name, one, request) for name, one in zip(names, models, strict=True)]


def times(subjects: list[Subject], threads: int) -> list[Timing]:
    """Their times, side by side; nothing where there is nothing to time."""
    if not subjects:
        return []
    from caffe_proto import latency
    from caffe_proto.runtime import Engine

    return latency.measure(subjects, Engine(threads))


def gains(subjects: list[Subject], threads: int) -> list[Gain]:
    """What every layer gained, and why some gained little; nothing where there is nothing to time."""
    if not subjects:
        return []
    from caffe_proto import latency
    from caffe_proto.runtime import Engine

    before, after = subjects
    return latency.gains(before, after, *latency.profiles(subjects, Engine(threads)))


def document(said: Said) -> dict[str, Any]:
    """The report as one JSON document."""
    report, times = said.report, said.times
    speedup: dict[str, Any] = {"macs": _ratio(report.macs), "conv_macs": _ratio(report.conv_macs)}
    if report.predicted is not None:
        speedup["latency_predicted"] = _ratio(report.predicted.ms)
    if times:
        speedup["latency"] = times[0].median / times[1].median
        speedup["efficiency"] = speedup["latency"] / speedup["macs"]
    layers = [
        {
            "name": row.name,
            "scheme": row.scheme,
            "ranks": list(row.ranks),
            "full_rank": row.full_rank,
            "macs": list(row.macs) if row.macs else None,
            "error": row.error,
            "error_of": row.error_of,
        }
        | ({"ms": list(row.ms)} if row.ms is not None else {})
        for row in report.rows
    ]
    made: dict[str, Any] = {
        "speedup": speedup,
        "macs": list(report.macs),
        "conv_macs": list(report.conv_macs),
        "params": list(report.params),
    }
    made |= {
        "layers": layers,
        "kept": report.kept,
        "files": dict(said.files),
        "warnings": list(report.warnings),
    }
    if report.merges or report.late_merges:
        made["merged"] = [
            {
                "layers": list(merge.layers),
                "into": merge.name,
                "shape": list(merge.shape),
                "macs": list(merge.macs) if merge.macs else None,
            }
            for merge in (*report.merges, *report.late_merges)
        ]
    if report.polish is not None:
        one = report.polish
        made["polish"] = {"steps": one.steps, "error": [one.before, one.after], "held_out": one.held_out}
    if said.apart:
        made["outputs_apart"] = dict(said.apart)
    if report.predicted is not None:
        made["predicted"] = report.predicted.to_dict()
    if times:
        made["latency_ms"] = [times[0].median, times[1].median]
    if said.gains:
        made["gains"] = [gain_document(one) for one in said.gains]
    return made


def show(said: Said) -> None:
    """Print the report: a row a layer, what was kept and why, totals, and what was written."""
    report, times = said.report, said.times
    timed = report.predicted is not None
    rows = [
        [
            row.name,
            row.scheme,
            "+".join(map(str, row.ranks)) + (f"/{row.full_rank}" if row.full_rank else "") or "-",
            *((f"{row.macs[0]:,}", f"{row.macs[1]:,}", f"{_ratio(row.macs):.2f}x") if row.macs else "---"),
            *(
                (f"{row.ms[0]:.3f}", f"{row.ms[1]:.3f}", f"{_ratio(row.ms):.2f}x")
                if row.ms
                else "---" * timed
            ),
            "-" if row.error is None else f"{row.error:.4f}" + ("r" if row.error_of == "responses" else ""),
        ]
        for row in report.rows
    ]
    columns = ["layer", "scheme", "rank", "MACs before", "after", "ratio"]
    console.table([*columns, *(["ms before", "after", "ratio"] if timed else []), "error"], rows)
    if any(row.error is not None and row.error_of == "weights" for row in report.rows):
        click.echo("error: ||W - W'|| / ||W|| of the layer's weights")
    if any(row.error_of == "responses" for row in report.rows):
        click.echo("error, r: the same of held-out responses, behind activation and shortcut")
    for merge in (*report.merges, *report.late_merges):
        out, _, height, width = merge.shape
        cost = f", MACs {merge.macs[0]:,} -> {merge.macs[1]:,}" if merge.macs else ""
        click.echo(f"merged {' + '.join(merge.layers)} into {merge.name} ({height}x{width}x{out}){cost}")
    reasons: dict[str, list[str]] = {}
    for name, reason in report.kept.items():
        reasons.setdefault(reason, []).append(name)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
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
        if pair[0]:
            click.echo(f"{what:20}{pair[0]:>17,} -> {pair[1]:>15,}  {_ratio(pair):.3f}x")
    if report.polish is not None:
        one = report.polish
        click.echo(
            f"polished in {one.steps} steps: output error on {one.held_out} held-out images {one.before:.4f} -> {one.after:.4f}"
        )
    for name, value in said.apart.items():
        click.echo(f"output {name}: ||y' - y|| / ||y|| = {value:.4g}")
    if report.predicted is not None:
        click.echo(time_line("time, predicted", report.predicted.ms))
        click.echo(
            f"gap: the loss is at most {report.predicted.gap:.3g} above that of any choice in this time"
        )
        click.echo(where_line(report.predicted))
    if times:
        medians = times[0].median, times[1].median
        share = _ratio(medians) / _ratio(report.macs)
        click.echo(f"{time_line('time, median', medians)}, {share:.0%} of what the MACs say")
    if said.gains:
        click.echo()
        show_gains(said.gains)
        click.echo()
    click.echo("wrote " + ", ".join(said.files.values()))
