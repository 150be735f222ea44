"""How prune reports: what went and what stayed, criteria side by side, and the listing of a dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from caffe_proto import console
from caffe_proto.cli_time import gain_document, show_gains
from lra.outputs import time_line, where_line

if TYPE_CHECKING:
    from caffe_proto.evaluation import Evaluation, Share
    from caffe_proto.latency import Gain, Timing
    from lra.applier import Row
    from lra.plan import Timed

    from .applier import Report
    from .counts import Count
    from .repairing import Repair
    from .tuning import Trained


@dataclass(frozen=True)
class Trial:
    """A criterion on the plan's counts: the net as pruned and, where repairs were asked for, repaired."""

    criterion: str
    pruned: Evaluation | None
    repaired: Evaluation | None
    reason: str = ""


@dataclass(frozen=True)
class Said:
    """All that one prune command has to say."""

    report: Report
    files: Mapping[str, str]
    masked: bool = False
    counted: tuple[str, Count, Count] | None = None
    warnings: Sequence[str] = ()
    repairs: Sequence[Repair] = ()
    times: Sequence[Timing] = ()
    total: tuple[int, int] | None = None  # MACs before pruning, and after it and decomposing
    trained: Sequence[Trained] = ()
    decomposed: Sequence[Row] = ()
    gains: Sequence[Gain] = ()
    timed: Timed | None = None  # before pruning, and after it


def ratio(before: float, after: float) -> float:
    """How many times less there is after."""
    return before / after if after else 1.0


def document(said: Said, trials: Sequence[Trial]) -> dict[str, Any]:
    """The report as one JSON document."""
    report = said.report
    speedup: dict[str, Any] = {"macs": ratio(*report.macs), "conv_macs": ratio(*report.conv_macs)}
    if said.times:
        speedup["latency"] = ratio(said.times[0].median, said.times[1].median)
    if said.timed is not None:
        speedup["latency_predicted"] = ratio(*said.timed.ms)
    if said.total is not None:
        speedup["total_macs"] = ratio(*said.total)
    layers = [
        {
            "name": row.name,
            "type": row.type,
            "channels": list(row.channels) if row.channels else None,
            "macs": list(row.macs),
            "params": list(row.params),
        }
        for row in report.rows
    ]
    made: dict[str, Any] = {
        "speedup": speedup,
        "macs": list(report.macs),
        "conv_macs": list(report.conv_macs),
        "params": list(report.params),
        "layers": layers,
        "kept": report.kept,
        "files": dict(said.files),
        "warnings": list(said.warnings),
        "repairs": [
            {
                "name": one.name,
                "layers": list(one.changed),
                "kept": dict(one.kept),
                "errors": dict(one.errors),
            }
            for one in said.repairs
        ],
    }
    if said.decomposed:
        made["decomposed"] = [
            {"name": row.name, "scheme": row.scheme, "ranks": list(row.ranks)} for row in said.decomposed
        ]
    if said.trained:
        made["finetune"] = [
            {
                "layers": list(one.layers),
                "iterations": one.iterations,
                "loss": one.loss,
                "tests": [dict(test) for test in one.tests],
                "files": {"weights": one.weights, "state": one.state},
            }
            for one in said.trained
        ]
    if said.counted is not None:
        name, before, after = said.counted
        made["counted"] = {
            "as": name,
            "flops": [before.flops, after.flops],
            "params": [before.params, after.params],
        }
    if said.timed is not None:
        made["predicted"] = said.timed.to_dict()
    if said.times:
        made["latency_ms"] = [one.median for one in said.times]
        made["gains"] = [gain_document(one) for one in said.gains]
    return made | ({"comparison": comparison(trials)} if trials else {})


def comparison(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The criteria side by side, for JSON."""
    return [
        {
            "criterion": one.criterion,
            **({"reason": one.reason} if one.reason else {}),
            **{
                what: _evaluation(found)
                for what, found in (("pruned", one.pruned), ("repaired", one.repaired))
                if found is not None
            },
        }
        for one in trials
    ]


def _evaluation(found: Evaluation) -> dict[str, Any]:
    top1 = {"top1": _share(found.accuracy.top1)} if found.accuracy.top1.n else {}
    return {**top1, "agreement": _share(found.agreement), "output_error": found.output_error}


def _share(share: Share) -> dict[str, float | int]:
    return {"value": share.value, "standard_error": share.error, "n": share.n}


def show(said: Said) -> None:
    """Print the report: a row a layer, what was kept and why, totals, and what was written."""
    report = said.report
    rows = [
        [
            row.name,
            row.type,
            "-" if row.channels is None else f"{row.channels[0]} -> {row.channels[1]}",
            *(f"{number:,}" for number in (*row.macs, *row.params)),
        ]
        for row in report.rows
    ]
    what = "not zero" if said.masked else "channels"
    console.table(["layer", "type", what, "MACs before", "after", "params before", "after"], rows)
    for warning in said.warnings:
        click.echo(f"warning: {warning}", err=True)
    show_kept(report.kept)
    for one in said.repairs:
        _show_repair(one)
    for training in said.trained:
        _show_training(training)
    if said.decomposed:
        chosen = (f"{row.name} {row.scheme} {'+'.join(map(str, row.ranks))}" for row in said.decomposed)
        click.echo(f"then decomposed, scheme and ranks: {', '.join(chosen)}")
    if said.gains:
        click.echo()
        show_gains(said.gains)
    click.echo()
    for name, pair in (
        ("MACs, whole net", report.macs),
        ("MACs, convolutions", report.conv_macs),
        ("parameters", report.params),
    ):
        total(name, *pair)
    if said.total is not None:
        total("MACs, decomposed", *said.total)
    if said.counted is not None:
        name, before, after = said.counted
        total(f"FLOPs as {name}", before.flops, after.flops)
        total(f"params as {name}", before.params, after.params)
    if said.timed is not None:
        show_timed(said.timed)
    if said.times:
        click.echo(time_line("time, median", (said.times[0].median, said.times[1].median)))
    if said.files:
        click.echo("wrote " + ", ".join(said.files.values()))


def total(name: str, before: int, after: int) -> None:
    """Print one figure before and after, and the ratio."""
    if before:
        click.echo(f"{name:20}{before:>17,} -> {after:>15,}  {ratio(before, after):.3f}x")


def show_timed(timed: Timed) -> None:
    """Print what a plan by measured time says of the net as pruned."""
    click.echo(time_line("time, predicted", timed.ms))
    click.echo(where_line(timed))


def show_kept(kept: Mapping[str, str]) -> None:
    """Print which layers stay whole, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        click.echo(f"kept {', '.join(names)}: {reason}")


def _show_repair(one: Repair) -> None:
    error = ""
    if one.errors:
        mean = sum(one.errors.values()) / len(one.errors)
        error = f", mean error of held-out responses {mean:.4f}"
    click.echo(f"repair {one.name}: {len(one.changed)} layers{error}")
    for name, reason in one.kept.items():
        click.echo(f"  not {name}: {reason}")


def _show_training(one: Trained) -> None:
    found = [
        f"{name} {', '.join(f'{value:.4g}' for value in values)}"
        for test in one.tests
        for name, values in test.items()
    ]
    tested = f"; test {', '.join(found)}" if found else ""
    click.echo(
        f"trained {one.iterations:,} iterations behind pruning {', '.join(one.layers)}: loss {one.loss:.4g}{tested};"
        f" {one.weights}"
    )


def show_trials(trials: Sequence[Trial]) -> None:
    """Print the criteria side by side."""
    labelled = any(one.pruned is not None and one.pruned.accuracy.top1.n for one in trials)
    twice = any(one.repaired is not None for one in trials)
    what = [*(["top-1"] if labelled else []), "agreement", "output error"]
    columns = ["criterion", *what, *(f"{name}, repaired" for name in (what if twice else ()))]
    rows = [
        [one.criterion, *_cells(one.pruned, labelled), *(_cells(one.repaired, labelled) if twice else ())]
        for one in trials
        if one.pruned is not None
    ]
    console.table(columns, rows, left=1)
    for one in trials:
        if one.reason:
            click.echo(f"not {one.criterion}: {one.reason}")
    click.echo()


def _cells(found: Evaluation | None, labelled: bool) -> list[str]:
    if found is None:
        return ["-"] * (2 + labelled)
    top1 = [f"{found.accuracy.top1.value:.4f}"] if labelled else []
    return [*top1, f"{found.agreement.value:.4f}", f"{found.output_error:.4f}"]
