"""The options of the decompose command, and what follows from them alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import click

from caffe_proto.console import choice_option, together

from .cli_changing import (
    Changing,
    last_options,
    layer_options,
    plan_option,
    prefix_option,
    round_option,
    table_option,
)
from .cli_images import calibration_options

if TYPE_CHECKING:
    from .plan import Plan

SCHEME_NAMES = [
    "pca",
    "svd",
    "kmeans",
    "spatial",
    "spatial-hv",
    "response",
    "asymmetric-3d",
]  # lra.schemes.ALL_SCHEMES, without waiting for its imports
STYLE_NAMES = [
    "default",
    "wen",
    "tai",
    "he",
    "girshick",
]  # lra.styles.STYLES, likewise

AMOUNTS = {
    "--speedup": "speedup",
    "--energy": "energy",
    "--ranks": "ranks",
    "--rank-config": "rank_config",
    "--plan": "plan_file",
}

options = together(
    prefix_option,
    choice_option(
        "--scheme",
        choices=["auto", *SCHEME_NAMES],
        help="auto: by layer, the best by energy, or with --images and --speedup by measured errors; response and "
        "asymmetric-3d need --images.",
    ),
    click.option("--fc/--no-fc", default=False, show_default=True, help="Fully connected layers too."),
    layer_options("Leave this layer alone"),
    click.option(
        "--speedup", type=float, help="MACs before / after; with --cost latency time before / after."
    ),
    click.option("--energy", type=float, help="Energy that every layer keeps, 0 to 1: |W-W'|² <= (1-E)|W|²."),
    click.option("--ranks", metavar="a,b,c", help="One total rank for each eligible layer, in net order."),
    click.option(
        "--rank-config",
        metavar="FILE.json",
        help='{"conv1": 8, "conv2": {"scheme": "spatial", "rank": 40}}; a bare rank means --scheme, or pca.',
    ),
    plan_option,
    choice_option(
        "--scope",
        choices=["all", "conv", "eligible"],
        help="What --speedup counts: the whole net, its convolutions, or the layers that may be decomposed.",
    ),
    choice_option(
        "--cost",
        choices=["macs", "latency"],
        help="What --speedup counts: multiplications, or time in onnxruntime with --threads, measured chain by chain in "
        "the layers' places (once for a machine; what is known is kept in a table).",
    ),
    table_option,
    click.option(
        "--batch",
        type=click.IntRange(1),
        help="Batch of every input, over what the file says: MACs and times are for so many pictures.",
    ),
    choice_option(
        "--rank-selection",
        "selection",
        choices=["exact", "measured", "paper", "uniform"],
        help="How --speedup chooses ranks: exact, by the energy kept; measured, by errors on --images (auto does that by "
        "itself); paper: the first-order rule of Zhang et al.; "
        "uniform: every layer as much faster.",
    ),
    click.option("--same-ranks", is_flag=True, help="asymmetric-3d with d'' = d', as He's tool has it."),
    round_option("Ranks are multiples of this where that fits."),
    click.option(
        "--even-if-slower",
        is_flag=True,
        help="Also split layers that get more expensive by it (full-rank nets).",
    ),
    choice_option(
        "--style",
        choices=STYLE_NAMES,
        help="Layer names, bias and filler rules of the published tools.",
    ),
    choice_option(
        "--solver",
        choices=["asymmetric", "symmetric", "linear"],
        help="With --images: fit behind the layers fitted before, behind the original ones, or without the activation.",
    ),
    click.option(
        "--refit-kept/--no-refit-kept",
        default=None,
        help="With --images: fit the layers that are left whole too. Default: where auto measures errors.",
    ),
    click.option(
        "--fold-bn", is_flag=True, help="Fold BatchNorm and Scale layers into the convolutions before them."
    ),
    click.option(
        "--merge",
        is_flag=True,
        help="First join layers in a row with nothing in between that cost less as one, and again in the end; alone: "
        "only that.",
    ),
    click.option(
        "--polish",
        type=click.IntRange(1),
        is_flag=False,
        flag_value=600,
        metavar="[STEPS]",
        help="With --images: in the end match the original's outputs and activations, without labels (Adam, 600 steps; "
        "needs torch). Not part of the plan.",
    ),
    click.option("--resume", is_flag=True, help="Go on with a fit to --images that was interrupted."),
    click.option("--force", is_flag=True, help="Apply a plan to other files than it was made for."),
    click.option("--plan-only", is_flag=True, help="Print the plan and change nothing."),
    click.option(
        "--compare",
        metavar="X.npy|random",
        help="Run both nets on this input and print how far their outputs are apart.",
    ),
    calibration_options,
    last_options("Also time both nets with onnxruntime, whole and by layer."),
)


@dataclass(frozen=True, kw_only=True)
class Options(Changing):
    """One decompose command; fields are its options."""

    weights: str
    scheme: str
    fc: bool
    energy: float | None
    ranks: str | None
    rank_config: str | None
    scope: str
    even_if_slower: bool
    style: str
    batch: int | None
    selection: str
    same_ranks: bool
    solver: str
    refit_kept: bool | None
    fold_bn: bool
    merge: bool
    polish: int | None
    plan_only: bool
    compare: str | None

    @cached_property
    def given_plan(self) -> Plan | None:
        """The plan of --plan."""
        return read_plan(self.plan_file) if self.plan_file is not None else None

    @property
    def amounts(self) -> list[str]:
        """The options given that say how much; none where --merge stands alone."""
        return [name for name, field in AMOUNTS.items() if getattr(self, field) is not None]

    def inputs(self, *more: str | None) -> list[str | None]:
        """Every file that was given, none of which may be overwritten."""
        given = [self.net, self.weights, self.rank_config, self.compare, self.latency_table]
        return [*given, *self.except_, *self.only, *more]


def read_plan(path: str) -> Plan:
    """A plan that decomposes; raises PlanError where it is of another kind, or none."""
    from caffe_proto.files import read_text
    from hrank.joint import check_kind

    from .plan import Plan

    source = read_text(path)
    check_kind(source, "decompose", path)
    return Plan.from_json(source, path)
