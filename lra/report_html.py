"""A report as one HTML file: no script, nothing from the network, to read on a screen or print."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape

from . import report_diagram, report_plots
from .report import Against, Counts, Curve, Layer, Report
from .report_plots import AFTER, BEFORE, CHOSEN, Bars, Line

_CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:16px 20px 40px;font:15px/1.45 system-ui,sans-serif;color:#1d2730;background:#fff}
h1{font-size:24px;margin:8px 0 2px}
h2{font-size:18px;margin:34px 0 8px;border-bottom:1px solid #d5dbe1;padding-bottom:3px}
h1,h2,p,code,#files td,.figures div{overflow-wrap:anywhere}
.word{overflow-wrap:break-word}
td:not(.word){white-space:nowrap}
p{margin:6px 0;max-width:75ch}
.lead{color:#55626e}
.figures{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}
.figures div{border:1px solid #d5dbe1;border-radius:6px;padding:8px 14px;min-width:150px}
.figures b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
.figures span{color:#55626e;font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:3px 9px;text-align:right;border-bottom:1px solid #e8ecf0;vertical-align:top}
th{border-bottom:1.5px solid #9aa5b1;font-weight:600}
th.word,td.word{text-align:left;min-width:6em;max-width:34em}
#layers td:nth-child(3){white-space:nowrap}
tfoot td{font-weight:600;border-top:1.5px solid #9aa5b1}
tr.changed td:first-child,tr.removed td:first-child,tr.added td:first-child{box-shadow:inset 3px 0 #c8553d}
.nets{display:grid;grid-template-columns:1fr 1fr;gap:16px;max-height:85vh;overflow-y:auto;border:1px solid #e8ecf0;padding:8px}
.nets>div{min-width:0;text-align:center}
.nets svg{min-width:var(--least)}
.nets svg{height:auto}
.net text{font-size:10px;fill:#1d2730}
.net text.name{font-weight:600}
.net rect,.key i{fill:#f5f7f9;stroke:#9aa5b1;background:#f5f7f9;border:1px solid #9aa5b1}
.net .changed rect,.key .changed{fill:#fdeee9;stroke:#c8553d;background:#fdeee9;border-color:#c8553d}
.net .removed rect,.key .removed{fill:#eceff2;stroke:#c8553d;stroke-dasharray:4 3;background:#eceff2;border:1px dashed #c8553d}
.net .added rect,.key .added{fill:#e6f3ea;stroke:#2f855a;background:#e6f3ea;border-color:#2f855a}
.edge{fill:none;stroke:#9aa5b1}
.key i{display:inline-block;width:14px;height:11px;margin:0 5px 0 12px}
.chart{display:block;width:100%;height:auto;margin:10px 0;stroke-linejoin:round;stroke-linecap:butt}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:4px 18px}
pre{background:#f5f7f9;border:1px solid #e8ecf0;padding:10px;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere}
@media (max-width:600px){.nets{grid-template-columns:1fr}}
@media print{.nets svg{min-width:0}body{max-width:none;padding:0;font-size:11px}.nets{max-height:none;overflow:visible}.scroll{overflow:visible}
table{font-size:9px}th,td{padding:2px 4px}h2{break-after:avoid}tr,.chart,.figures div{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def page(report: Report) -> str:
    """The whole file: the same report, the same text."""
    title = _text(f"{report.title}: before and after")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_CSS}</style></head><body>",
            f"<h1>{title}</h1>",
            *_summary(report),
            *_diagram(report),
            *_table(report),
            *_costs(report),
            *_times(report),
            *_ranks(report),
            *_curves(report),
            *_errors(report),
            *_accuracy(report),
            *_difference(report),
            *_published(report),
            *_kept(report),
            *_origin(report),
            "</body></html>",
            "",
        ]
    )


def _plain(words: str) -> str:
    """Text whose every character can be seen; control characters and odd bytes as escapes."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode("ascii")
        for one in words
    )


def _text(words: object) -> str:
    """Any text as it may stand in HTML."""
    return escape(_plain(str(words)))


def _ratio(pair: tuple[float, float]) -> str:
    return f"{pair[0] / pair[1]:.2f}x" if all(pair) else ""


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _counts(pair: Counts) -> list[str]:
    """Before, after, and the ratio; a layer that has nothing to count says nothing."""
    if pair == (0, 0):
        return ["", "", ""]
    known = "" if pair[0] is None or pair[1] is None else _ratio((pair[0], pair[1]))
    return [_count(pair[0]), _count(pair[1]), known]


def _milliseconds(pair: tuple[float, float] | None) -> list[str]:
    return ["", "", ""] if pair is None else [*(f"{one:.3f}" for one in pair), _ratio(pair)]


def _grid(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: int = 1,
    marks: Sequence[str] = (),
    total: Sequence[str] = (),
) -> str:
    """A table; the first ``words`` columns hold words, the rest numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=word' if i < words else ''}>{_text(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    body = "\n".join(
        f"<tr{f' class={marks[i]}' if marks and marks[i] else ''}>{cells('td', row)}</tr>"
        for i, row in enumerate(rows)
    )
    foot = f"<tfoot><tr>{cells('td', total)}</tr></tfoot>" if total else ""
    return (
        f'<div class="scroll"><table id="{name}"><thead><tr>{cells("th", columns)}</tr></thead>'
        f"<tbody>\n{body}\n</tbody>{foot}</table></div>"
    )


def _summary(report: Report) -> Iterator[str]:
    figures = [
        (_ratio(pair), f"fewer {what}: {pair[0]:,} to {pair[1]:,}")
        for what, pair in (("MACs", report.totals("macs")), ("parameters", report.totals("params")))
        if pair[0]
    ]
    times = report.given.times
    if times is not None and times.whole is not None:
        figures.append((_ratio(times.whole), f"measured: {times.whole[0]:.3f} to {times.whole[1]:.3f} ms"))
    for one in report.given.accuracies:
        if one.before is not None:
            figures.append((f"{one.after[0]:.1%}", f"{one.name}, {one.before[0]:.1%} before"))
    changed = sum(layer.changed for layer in report.layers)
    yield f'<p class="lead">{changed} of {len(report.layers)} layers changed.</p>'
    boxes = "".join(
        f"<div><b>{_text(number)}</b><span>{_text(what)}</span></div>" for number, what in figures
    )
    yield f'<div class="figures">{boxes}</div>'
    for note in report.notes:
        yield f"<p>{_text(note)}</p>"


def _diagram(report: Report) -> Iterator[str]:
    before, after = report_diagram.pair(report.layers, _text)
    yield "<h2>Both nets</h2>"
    yield (
        '<p class="key">Left before, right after.<i class="changed"></i>changed<i class="removed"></i>only before'
        '<i class="added"></i>only after. Layers that work in place stand in the box of the layer before them.</p>'
    )
    yield f'<div class="nets"><div class="scroll">{before}</div><div class="scroll">{after}</div></div>'


def _counted(report: Report) -> list[Layer]:
    """The layers that multiply in either net, or changed."""
    return [layer for layer in report.layers if layer.changed or layer.macs != (0, 0)]


def _rank(layer: Layer) -> str:
    """Ranks of the full ones, filters before and after."""
    said = [f"{layer.channels[0]} to {layer.channels[1]} filters"] if layer.channels is not None else []
    if layer.splits:
        said.append(" + ".join(f"{one.rank}/{one.full}" for one in layer.splits))
    elif layer.entry is not None and layer.entry.ranks:
        said.append(" + ".join(map(str, layer.entry.ranks)))
    return ", ".join(said)


def _mark(layer: Layer) -> str:
    if not layer.changed:
        return ""
    return "removed" if not layer.row.b else "added" if not layer.row.a else "changed"


def _table(report: Report) -> Iterator[str]:
    layers = _counted(report)
    planned = any(layer.planned_ms is not None for layer in layers)
    measured = any(layer.ms is not None for layer in layers)
    told, fitted = (any(one is not None for one in found) for found in _predicted(layers))
    apart = any(layer.apart for layer in layers)
    rows = [
        [
            layer.name,
            layer.treatment,
            _rank(layer),
            *_counts(layer.macs),
            *_counts(layer.params),
            *(_milliseconds(layer.planned_ms) if planned else []),
            *(_milliseconds(layer.ms) if measured else []),
            *([_error(layer.error)] if told else []),
            *([_error(layer.fitted)] if fitted else []),
            *([_error(layer.apart or None)] if apart else []),
        ]
        for layer in layers
    ]
    sums = [cell for what in ("macs", "params") for cell in _counts(report.totals(what))]
    times = report.given.times
    columns = [
        "layer",
        "what was done",
        "rank",
        "MACs before",
        "after",
        "ratio",
        "parameters before",
        "after",
        "ratio",
    ]
    total = ["total", "", "", *sums]
    if planned:
        plan = report.plans.decompose
        predicted = plan.predicted if plan is not None else None
        columns += ["ms planned before", "after", "ratio"]
        total += _milliseconds(predicted.ms if predicted is not None else None)
    if measured:
        columns += ["ms measured before", "after", "ratio"]
        total += _milliseconds(times.whole if times is not None else None)
    named = (("error planned", told), ("error fitted", fitted), ("weights apart", apart))
    errors = [name for name, there in named if there]
    columns += errors
    total += [""] * len(errors)
    yield "<h2>Layers</h2>"
    yield _grid("layers", columns, rows, words=3, marks=[_mark(layer) for layer in layers], total=total)
    of = (
        "of responses to images, or of weights, as the scheme cuts them,"
        if report.fitted
        else "of the weights"
    )
    left = sum(layer.params != (0, 0) for layer in report.layers if layer not in layers)
    if left:
        yield f"<p>{left} layers more that learn but multiply nothing are the same; the totals have them.</p>"
    if told:
        yield f"<p>Error planned: the relative error {of} that the plan predicts.</p>"
    if fitted:
        yield f"<p>{_FITTED}</p>"
    if apart:
        yield f"<p>{_APART}</p>"


def _predicted(layers: Sequence[Layer]) -> tuple[list[float | None], list[float | None]]:
    """Errors that the plan predicts, and those measured behind the fit."""
    return [layer.error for layer in layers], [layer.fitted for layer in layers]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


_FITTED = "Error fitted: the relative error of held-out responses, measured behind activation and shortcut."
_APART = (
    "Weights apart: ||W' - W|| / ||W|| of the files as they are, of a chain that of the one kernel it computes;"
    " empty where they are equal or cannot be compared."
)


def _costs(report: Report) -> Iterator[str]:
    layers = [layer for layer in report.layers if any(layer.macs)]
    yield "<h2>MACs and parameters by layer</h2>"
    if not layers:
        yield "<p>No layer whose shape is known multiplies.</p>"
        return
    parts = [
        Bars(
            title,
            [("before", BEFORE, [pair[0] for pair in pairs]), ("after", AFTER, [pair[1] for pair in pairs])],
            counts=True,
        )
        for title, pairs in (
            ("MACs", [layer.macs for layer in layers]),
            ("parameters", [layer.params for layer in layers]),
        )
    ]
    yield report_plots.bars("costs", "MACs and parameters by layer, before and after", _names(layers), parts)


def _names(layers: Sequence[Layer]) -> list[str]:
    return [_plain(layer.name) for layer in layers]


def _times(report: Report) -> Iterator[str]:
    times = report.given.times
    layers = [layer for layer in report.layers if layer.ms is not None]
    if times is None:
        return
    yield "<h2>Measured time</h2>"
    yield f"<p>{_text(times.where)}.</p>"
    rows = [
        [name, *_milliseconds(pair)]
        for name, pair in (("whole net", times.whole), ("the rest", times.rest))
        if pair
    ]
    yield _grid("times", ["", "ms before", "after", "ratio"], rows)
    if not layers:
        return
    pairs = [layer.ms or (0.0, 0.0) for layer in layers]
    arithmetic = [_quotient(layer.macs) for layer in layers]
    parts = [
        Bars("ms", [("before", BEFORE, [a for a, _ in pairs]), ("after", AFTER, [b for _, b in pairs])]),
        Bars(
            "times cheaper",
            [("by MACs", BEFORE, arithmetic), ("measured", AFTER, [_quotient(pair) for pair in pairs])],
            mark=1.0,
        ),
    ]
    yield report_plots.bars(
        "times", "Milliseconds by layer, and the speed-up by MACs and as measured", _names(layers), parts
    )
    if times.why:
        yield "<p>Why layers gain less time than MACs, by estimates that overlap, the two largest:</p>"
        causes = [[name, "; ".join(found[:2])] for name, found in times.why.items()]
        yield _grid("why", ["layer", "what the time goes into"], causes, words=2)


def _quotient(pair: tuple[float | None, float | None]) -> float | None:
    return pair[0] / pair[1] if pair[0] and pair[1] else None


def _ranks(report: Report) -> Iterator[str]:
    shares = [(f"{layer.name} ({one.scheme})", one.ratio) for layer in report.layers for one in layer.splits]
    shares += [
        (f"{layer.name} (filters)", layer.channels[1] / layer.channels[0])
        for layer in report.layers
        if layer.channels is not None and layer.channels[0]
    ]
    if shares:
        yield "<h2>Ranks</h2><p>The share of the full rank, or of the filters, that stays.</p>"
        bars = Bars("rank / full rank", [("stays", AFTER, [ratio for _, ratio in shares])], mark=1.0)
        yield report_plots.bars("ranks", "Rank ratio by layer", [_plain(name) for name, _ in shares], [bars])


def _curves(report: Report) -> Iterator[str]:
    if report.curves:
        yield (
            "<h2>Energy and singular values</h2><p>Of the weights, by rank; the dashed line is the rank chosen."
            " Left the energy retained, right the singular values relative to the first.</p>"
        )
        yield (
            '<div class="charts">' + "".join(_curve(i, one) for i, one in enumerate(report.curves)) + "</div>"
        )
    if report.norms:
        yield "<h2>Filters</h2><p>L2 norms of the pruned layers' filters, largest first; those that stay are dark.</p>"
        charts = [
            report_plots.ordered(
                f"norms{i}",
                _plain(f"Filter norms of {one.layer}"),
                _plain(f"{one.layer}: {int(one.kept.sum())} of {one.kept.size}"),
                one.norms.tolist(),
                one.kept.tolist(),
            )
            for i, one in enumerate(report.norms)
        ]
        yield '<div class="charts">' + "".join(charts) + "</div>"


def _curve(number: int, curve: Curve) -> str:
    x, rank = curve.ranks.tolist(), curve.split.rank
    name = f"{curve.layer}, {curve.split.scheme}"
    parts = [
        Line(
            _plain(name),
            f"rank {rank}: {curve.retained:.1%}",
            x,
            curve.energy.tolist(),
            (rank, curve.retained),
        )
    ]
    if curve.split.scheme != "kmeans" and (curve.values > 0).any():
        floor = 1e-8  # below it are rounding errors
        values = [max(value, floor) for value in curve.values.tolist()]
        at = values[x.index(rank)] if rank in x else floor
        parts.append(Line("singular values", "rank", x, values, (rank, at), logarithmic=True))
    return report_plots.lines(f"curve{number}", _plain(f"Energy retained by rank: {name}"), parts)


def _errors(report: Report) -> Iterator[str]:
    layers = [
        layer for layer in report.layers if layer.error is not None or layer.fitted is not None or layer.apart
    ]
    if layers:
        yield "<h2>Errors by layer</h2>"
        planned, fitted = _predicted(layers)
        series: list[tuple[str, str, list[float | None]]] = [
            ("planned", BEFORE, planned),
            ("fitted", CHOSEN, fitted),
            ("weights apart", AFTER, [layer.apart for layer in layers]),
        ]
        used = [one for one in series if any(one[2])]
        if used:
            yield report_plots.bars(
                "errors", "Relative error by layer", _names(layers), [Bars("relative error", used)]
            )


def _accuracy(report: Report) -> Iterator[str]:
    given = report.given
    if given.accuracies:
        yield "<h2>Accuracy</h2>"
        rows = [
            [one.name, *(_share(pair) for pair in (one.before, one.after)), f"{one.images:,}"]
            for one in given.accuracies
        ]
        yield _grid("accuracy", ["", "before", "after", "images"], rows)
        yield f"<p>{_text(given.images)} With the standard error.</p>"
    if given.apart:
        yield "<h2>Outputs</h2>"
        rows = [[name, f"{value:.4g}"] for name, value in given.apart.items()]
        yield _grid("outputs", ["output", "||y' - y|| / ||y||"], rows)
        yield f"<p>Both nets on {_text(given.compared)}.</p>"


def _share(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.4f} ± {pair[1]:.4f}"


def _difference(report: Report) -> Iterator[str]:
    yield "<h2>Difference</h2>"
    changed = [layer for layer in report.layers if layer.row.status != "same"]
    same = len(report.layers) - len(changed)
    if changed:
        rows = [[layer.name, layer.row.status, layer.summary] for layer in changed]
        yield _grid("difference", ["layer", "status", "difference"], rows, words=3)
    yield f"<p>{same} layers are the same.</p>"


def _published(report: Report) -> Iterator[str]:
    for i, one in enumerate(report.against):
        yield f"<h2>Beside {_text(one.name)}</h2>"
        yield "<p>Layers of the original that either net has otherwise: ranks, and MACs of all three.</p>"
        yield _grid(
            f"against{i}",
            ["layer", "rank here", "rank there", "MACs original", "here", "there", "ratio here", "there"],
            [_rival(*row) for row in _rivals(one)],
            words=3,
            total=_rival("total", "", "", *one.macs),
        )
        yield f"<p>Parameters: {one.params[0]:,} of the original, {one.params[1]:,} here, {one.params[2]:,} there.</p>"
        if one.differences:
            yield f"<p>What differs between this net and {_text(one.name)}:</p>"
            rows = [[row.name, row.status, row.summary()] for row in one.differences]
            yield _grid(f"between{i}", ["layer", "status", "difference"], rows, words=3)
        else:
            yield "<p>Both nets compute the same.</p>"


def _rivals(one: Against) -> Iterator[tuple[str, str, str, int | None, int | None, int | None]]:
    for rival in one.rivals:
        ranks = [" + ".join(map(str, found)) for found in rival.ranks]
        yield rival.name, ranks[0], ranks[1], rival.original, *rival.macs


def _rival(name: str, here: str, there: str, *macs: int | None) -> list[str]:
    """A row: MACs of the original, of this net, of the published one, and how many times fewer they are."""
    original, *others = macs
    ratios = [_ratio((original or 0, other or 0)) for other in others]
    return [name, here, there, *map(_count, macs), *ratios]


def _kept(report: Report) -> Iterator[str]:
    if report.plans.kept:
        yield "<h2>Left alone</h2>"
        yield _grid("kept", ["layer", "reason"], list(report.plans.kept.items()), words=2)


def _origin(report: Report) -> Iterator[str]:
    yield "<h2>Origin</h2>"
    rows = [[one.role, one.name, one.sha256] for one in report.sources]
    yield _grid("files", ["file", "name", "sha256"], rows, words=3)
    for name, target in report.plans.targets.items():
        yield f"<p>What was asked of {name}: <code>{_text(json.dumps(target))}</code></p>"
    if report.given.command:
        yield f"<p>The command that made this page:</p><pre>{_text(report.given.command)}</pre>"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"<p>{_text(versions)}</p>"
    yield f'<h2>Plan</h2><pre id="plan">{_text(report.plans.text)}</pre>'
