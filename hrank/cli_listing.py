"""The dry run of the prune command: groups, layers, the positions of a rate string, and what an amount comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from caffe_proto import console

from . import cli_timing, outputs
from .cli_options import Options

if TYPE_CHECKING:
    from .counts import Count
    from .coupling import Coupling
    from .planner import Sizes


def show(o: Options, coupling: Coupling) -> None:
    """Print it all; nothing is read but the files named, and nothing written."""
    from . import counts, rates
    from .coupling import listing

    sizes = cli_timing.sizes(o, coupling) if o.has_amount else None
    keep = _kept_counts(o, coupling, sizes)
    layout = rates.layout(coupling, o.rates_as)
    given = rates.parse(o.rates) if o.rates is not None else None
    before = counts.true(coupling, {})
    after = counts.true(coupling, {} if o.mask_only else _true_keep(o, coupling, sizes))
    published = counted(o, coupling, keep)
    for doubt in cli_timing.doubts(None if sizes is None else sizes.timed, o.threads):
        click.echo(f"warning: {doubt}", err=True)
    if o.as_json:
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
                **_timed_json(sizes),
                **(
                    {}
                    if published is None
                    else {
                        "counted": {
                            "as": published[0],
                            "flops": [one.flops for one in published[1:]],
                            "params": [one.params for one in published[1:]],
                        }
                    }
                ),
            }
        )
        return
    rows = [
        (*row[:3], str(keep.get(row[1], "")) if not row[1].startswith("> ") else "", row[3])
        for row in listing(coupling)
    ]
    console.table(["group", "layer", "channels", "kept", "remark"], rows, left=5)
    click.echo(f"\npositions of --rates --rates-as {o.rates_as} ({layout.net}):")
    columns = ["position", "layer", "what", "channels", *(["rate", "kept"] if given else [])]
    console.table(columns, [list(row) for row in layout.table(given)], left=3)
    click.echo()
    outputs.show_kept({} if sizes is None else sizes.kept)
    outputs.total("MACs, whole net", before.flops, after.flops)
    outputs.total("parameters", before.params, after.params)
    if sizes is not None and sizes.timed is not None:
        outputs.show_timed(sizes.timed)
        click.echo(f"rate of all layers: {sizes.rate:g}")
    if published is not None:
        name, old, new = published
        outputs.total(f"FLOPs as {name}", old.flops, new.flops)
        outputs.total(f"params as {name}", old.params, new.params)


def _timed_json(sizes: Sizes | None) -> dict[str, Any]:
    """What a dry run by measured time says besides."""
    if sizes is None or sizes.timed is None:
        return {}
    speedup = {"latency_predicted": outputs.ratio(*sizes.timed.ms)}
    return {"rate": sizes.rate, "speedup": speedup, "predicted": sizes.timed.to_dict()}


def counted(o: Options, coupling: Coupling, kept: Mapping[str, int]) -> tuple[str, Count, Count] | None:
    """FLOPs and parameters before and after, as the code that --count names has them; None for true ones."""
    if o.count == "macs":
        return None
    from . import counts, rates

    after = kept
    if o.rates is not None and o.rates_as == o.count:  # by the string, as the published counter has it
        after = rates.layout(coupling, o.rates_as).kept(rates.parse(o.rates), counted=o.count_c4_slip)
    if o.count == "hrankplus":
        return o.count, counts.hrankplus(coupling, {}), counts.hrankplus(coupling, after)
    transitions = rates.layout(coupling, "hrank").transitions
    before = counts.hrank(coupling, {}, transitions=transitions)
    name = o.count if o.count_c4_slip else f"{o.count}, no c4 slip"
    return name, before, counts.hrank(coupling, after, transitions=transitions)


def _kept_counts(o: Options, coupling: Coupling, sizes: Sizes | None) -> dict[str, int]:
    """How many filters each layer keeps."""
    if o.plan_file is not None:
        return {name: len(keep) for name, keep in o.given_plan.keep.items()}
    if sizes is None:
        return {}
    keep = coupling.choose(sizes.groups)
    return {**{name: len(channels) for name, channels in keep.items()}, **sizes.layers}


def _true_keep(o: Options, coupling: Coupling, sizes: Sizes | None) -> Mapping[str, Sequence[int]]:
    if o.plan_file is not None:
        return o.given_plan.keep
    return coupling.choose(sizes.groups) if sizes is not None else {}


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
