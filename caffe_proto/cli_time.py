"""The time command: nets side by side, by layer, and why a layer gains less time than multiplications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from . import console
from .console import json_option, seed_option, threads_option
from .errors import UsageError

if TYPE_CHECKING:
    from .latency import Gain, LayerTime, Subject, Timing


@dataclass(frozen=True)
class _Found:
    """What was measured: of each model its time, its gain on the first one, and with a profile its layers.

    ``pairs``: models that are set beside the first one layer by layer; ``files``: sha256 of each model's files.
    """

    timings: Sequence[Timing]
    whole: Sequence[Gain]
    profiles: Sequence[tuple[Subject, Sequence[LayerTime]]]
    pairs: Sequence[tuple[Subject, Sequence[Gain]]]
    files: Sequence[Mapping[str, str]]


@click.command(name="time")
@click.argument("models", nargs=-1, required=True, metavar="NET[,WEIGHTS]|MODEL.onnx ...")
@click.option("--runs", type=click.IntRange(1), default=50, show_default=True, help="Runs that are timed.")
@click.option("--warmup", type=click.IntRange(0), default=10, show_default=True, help="Runs before them.")
@click.option("--batch", type=click.IntRange(1), help="Batch size; default: each net's own.")
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda or tensorrt.")
@click.option(
    "--engine",
    "program",
    type=click.Choice(["onnxruntime", "torch"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the nets; torch needs the extra train.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Numbers to time each model in, repeatable; default fp32. Ranges of int8 are made up: for times alone.",
)
@click.option("--device", default="cpu", show_default=True, help="With --engine torch: cpu or cuda.")
@click.option("--profile", is_flag=True, help="Also print a row a layer.")
@threads_option
@seed_option
@json_option
def time_(
    models: Sequence[str], runs: int, warmup: int, batch: int | None, provider: str, program: str,
    dtypes: Sequence[str], device: str, profile: bool, threads: int, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Time nets side by side: median, 90th percentile, ratio of the first median to each.

    A NET without WEIGHTS gets random ones, so that a published prototxt can be timed alone. Runs are
    interleaved and sessions do not spin, so that none spoils another's times. Of several nets it says how many
    times fewer MACs than the first they take, and how much of that is measured (efficiency); with --profile by
    layer too, layers that were decomposed beside what stands for them, and of a layer whose efficiency is below
    80 % what its kernels lose the time by.
    """
    given = said()
    if program == "torch":
        for name in sorted({"provider", "profile", "dtypes"} & given):
            raise UsageError(f"--{name.removesuffix('s')} does not go with --engine torch")
        timings, macs, sums, release = _torch_times(models, device, threads, runs, warmup, batch, seed)
        found = _Found(timings, _whole(timings, macs), [], [], sums)
    else:
        if "device" in given:
            raise UsageError("--device only goes with --engine torch", hint="use --provider")
        from . import latency
        from .runtime import Engine, onnxruntime

        plain = [latency.subject(item, batch=batch, seed=seed) for item in models]
        subjects = [latency.narrowed(one, dtype, seed) for one in plain for dtype in dtypes or ("fp32",)]
        engine, release = Engine(threads, provider), onnxruntime.__version__
        with console.progress("timing", runs, "runs") as step:
            timings = latency.measure(
                subjects, engine, runs=runs, warmup=warmup, batch=batch, seed=seed, step=step
            )
        profiles = latency.profiles(subjects, engine, batch=batch, seed=seed) if profile else []
        pairs = [
            (one, latency.gains(subjects[0], one, profiles[0], layers))
            for one, layers in zip(subjects[1:], profiles[1:], strict=False)
            if subjects[0].macs and one.macs
        ]
        whole = _whole(timings, [one.total_macs for one in subjects])
        files = [one.fingerprint for one in subjects]
        found = _Found(timings, whole, list(zip(subjects, profiles, strict=False)), pairs, files)
    if as_json:
        where = {"provider": provider} if program == "onnxruntime" else {"device": device}
        settings = {"threads": threads, **where, "runs": runs, program: release}
        console.echo_json({"models": _document(found), **settings})
        return
    used = f"{threads} threads" if threads else "all cores"
    where_ = provider if program == "onnxruntime" else device
    _show(found, f"{program} {release}, {where_}, {used}, {runs} interleaved runs")


def said() -> set[str]:
    """The options of this command that stand on the command line."""
    context = click.get_current_context()
    return {
        name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def _whole(timings: Sequence[Timing], macs: Sequence[int]) -> list[Gain]:
    """Of every model its gain on the first."""
    from .latency import Gain

    return [
        Gain(one.name, (timings[0].median, one.median), (macs[0], count))
        for one, count in zip(timings, macs, strict=True)
    ]


def _torch_times(
    models: Sequence[str], device: str, threads: int, runs: int, warmup: int, batch: int | None, seed: int
) -> tuple[list[Timing], list[int], list[dict[str, str]], str]:
    """Times, MACs and sha256 of the files by model, and torch's release."""
    if find_spec("torch") is None:
        raise UsageError("torch is not installed", hint="install the extra train: caffe-lra[train]")
    from . import torch_time

    subjects = [torch_time.TorchSubject(item, device, batch=batch, seed=seed) for item in models]
    with console.progress("timing", runs, "runs") as step:
        timings = torch_time.measure(subjects, threads=threads, runs=runs, warmup=warmup, step=step)
    return timings, [one.macs for one in subjects], [one.fingerprint for one in subjects], torch_time.RELEASE


def _document(found: _Found) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"model": one.name, "median_ms": one.median, "p90_ms": one.p90, "ratio": gain.measured}
        | ({"macs": gain.macs[1]} if gain.macs[1] else {})
        | _arithmetic_json(gain)
        | ({"sha256": dict(files)} if files else {})
        for one, gain, files in zip(found.timings, found.whole, found.files, strict=True)
    ]
    for row, (_, layers) in zip(rows, found.profiles, strict=False):
        row["layers"] = [{"name": one.name, "ops": one.ops, "ms": one.milliseconds} for one in layers]
    for row, (_, gains) in zip([row for row in rows[1:] if "macs" in row], found.pairs, strict=False):
        row["gains"] = [gain_document(one) for one in gains]
    return rows


def gain_document(gain: Gain) -> dict[str, Any]:
    """One layer of a pair of nets, as JSON."""
    made = {"name": gain.name, "ms": list(gain.ms), "ratio": gain.measured, "macs": list(gain.macs)}
    made |= _arithmetic_json(gain)
    return made | ({"why": [vars(cause) for cause in gain.why]} if gain.why else {})


def _show(found: _Found, how: str) -> None:
    counted = any(gain.arithmetic is not None for gain in found.whole[1:])
    console.table(
        ["model", "median ms", "p90 ms", "speed-up", *(["MACs fewer", "efficiency"] if counted else [])],
        [
            [one.name, f"{one.median:.3f}", f"{one.p90:.3f}", f"{gain.measured:.2f}x"]
            + (_arithmetic_row(gain) if counted else [])
            for one, gain in zip(found.timings, found.whole, strict=True)
        ],
        left=1,
    )
    click.echo(how)
    for one, layers in found.profiles:
        click.echo(f"\n{one.name}")
        total = sum(layer.milliseconds for layer in layers)
        rows = [
            [layer.name, layer.ops, f"{layer.milliseconds:.3f}", f"{layer.milliseconds / total:.1%}"]
            for layer in layers
        ]
        console.table(["layer", "operators", "ms", "share"], rows, total=["total", "", f"{total:.3f}", ""])
    for one, gains in found.pairs:
        click.echo(f"\n{found.profiles[0][0].name} against {one.name}")
        show_gains(gains)


def show_gains(gains: Sequence[Gain]) -> None:
    """A row for every layer of a pair of nets; of those that gain much less time than multiplications, why."""
    console.table(
        ["layer", "ms before", "after", "speed-up", "MACs fewer", "efficiency"],
        [
            [
                gain.name or "(the rest)",
                *(f"{ms:.3f}" for ms in gain.ms),
                f"{gain.measured:.2f}x",
                *_arithmetic_row(gain),
            ]
            for gain in gains
        ],
        left=1,
    )
    low = [gain for gain in gains if gain.why]
    if low:
        click.echo(
            "\nwhy the time gains less than the MACs; shares of the lost time are estimates and overlap"
        )
    for gain in low:
        click.echo(f"{gain.name}: {gain.efficiency:.0%}, {gain.lost:.3f} ms lost")
        for cause in gain.why:
            words = f"  {cause.kind}" + (f" ({cause.ms / gain.lost:.0%}): {cause.text}" if cause.text else "")
            click.echo(words)


def _arithmetic_json(gain: Gain) -> dict[str, float]:
    if gain.arithmetic is None or gain.efficiency is None:
        return {}
    return {"arithmetic": gain.arithmetic, "efficiency": gain.efficiency}


def _arithmetic_row(gain: Gain) -> list[str]:
    if gain.arithmetic is None or gain.efficiency is None:
        return ["-", "-"]
    return [f"{gain.arithmetic:.2f}x", f"{gain.efficiency:.0%}"]
