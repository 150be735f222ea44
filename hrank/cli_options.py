"""The options of the prune command, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

from caffe_proto.cli_images import image_options
from caffe_proto.console import choice_option, together
from lra.cli_changing import (
    Changing,
    last_options,
    layer_names,
    layer_options,
    plan_option,
    prefix_option,
    round_option,
    table_option,
)
from lra.cli_images import positions_option

if TYPE_CHECKING:
    from .plan import Plan
    from .planner import Amount, Limits
    from .repairing import Recorded

CRITERIA = [
    "rank", "rowcol", "apoz", "activation", "nuclear", "l1", "next-l1", "gamma", "geometric-median", "random",
    "reverse", "edge",
]  # fmt: skip  # hrank.criteria.CRITERIA, without waiting for its imports
MEASURED = {"rank", "rowcol", "apoz", "activation", "nuclear", "reverse", "edge"}
REPAIRS = ("bias", "lsq", "bn")  # hrank.repairing.REPAIRS, likewise

options = together(
    prefix_option,
    click.option(
        "--rates",
        metavar="STRING",
        help="Fractions pruned, one a position of the net: [0.1]+[0.6]*35+[0.0]*2.",
    ),
    choice_option(
        "--rates-as",
        choices=["hrank", "hrankplus"],
        help="Which published code's positions and rounding --rates has; --dry-run lists the positions.",
    ),
    click.option("--rate-config", metavar="FILE.json", help='Rates by layer: {"conv1": 0.5}.'),
    click.option(
        "--speedup",
        type=float,
        help="MACs before / after, with --cost latency time before / after; one rate for all layers is found.",
    ),
    click.option("--params", type=float, help="Parameters before / after; with --speedup both are met."),
    plan_option,
    choice_option(
        "--cost",
        choices=["macs", "latency"],
        help="What --speedup counts: multiplications, or time in onnxruntime with --threads, measured of whole nets whose "
        "layers fill the kernels' blocks (once for a machine; what is known is kept in a table).",
    ),
    table_option,
    choice_option(
        "--criterion",
        choices=CRITERIA,
        help="Which filters stay: rank, rowcol, apoz, activation, nuclear, reverse and edge are measured on images.",
    ),
    choice_option(
        "--at",
        choices=["relu", "after_pool", "conv"],
        help="Where maps are read: behind the ReLU, behind a max pooling as the authors, or at the convolution.",
    ),
    click.option(
        "--rectify",
        is_flag=True,
        help="Read max(maps, 0) where no ReLU stands before, so that ranks tell filters apart.",
    ),
    click.option(
        "--rank-file",
        metavar="FILE",
        help="Measured before with --save-ranks, or a folder of published rank_conv*.npy.",
    ),
    click.option("--save-ranks", metavar="FILE", help="Write what was measured, for --rank-file."),
    click.option(
        "--coupled",
        is_flag=True,
        help="Also layers that share their channels with others (residual sums), as one.",
    ),
    choice_option(
        "--group-score",
        choices=["mean", "max", "min"],
        help="With --coupled: a channel's score from those of the layers that share it.",
    ),
    layer_options("Leave this layer whole"),
    round_option("Channels are multiples of this, rounded up."),
    click.option(
        "--min-channels", type=click.IntRange(1), default=1, show_default=True, help="No layer keeps fewer."
    ),
    click.option(
        "--mask-only",
        is_flag=True,
        help="Keep all shapes and set what would go to zero, as HRank's own code.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="List groups, layers, positions of rates and sizes; read no images, write nothing.",
    ),
    choice_option(
        "--count",
        choices=["macs", "hrank", "hrankplus"],
        help="Also count as the published code does.",
    ),
    click.option(
        "--count-c4-slip/--no-count-c4-slip",
        default=True,
        show_default=True,
        help="With --count hrank and --rates of GoogLeNet: the published counter takes inception 4c by the rate of 4d, "
        "its masks by that of 4c; no: both by that of 4c.",
    ),
    click.option(
        "--repair",
        multiple=True,
        type=click.Choice(["none", *REPAIRS]),
        help="Without training, from images: bias adds what was lost on average, lsq fits the layers behind, bn estimates "
        "BatchNorm again (behind --finetune); repeatable, made in this order. A plan repeats its own; none: leave them "
        "out.",
    ),
    positions_option("With --repair lsq: places of each image at which responses are sampled."),
    click.option(
        "--compare",
        is_flag=True,
        help="All criteria on the same counts, judged on the images, before training.",
    ),
    click.option(
        "--then-decompose",
        type=float,
        metavar="R",
        help="Decompose what is left, until the whole has R times fewer MACs, whatever --cost; PREFIX.plan.json holds "
        "both plans.",
    ),
    click.option("--force", is_flag=True, help="Use a plan or a rank file of other files."),
    click.option(
        "--finetune",
        metavar="SOLVER",
        help="Train the pruned net by this solver, which names the train_val of NET; what is written is what that ends "
        "with. Needs torch.",
    ),
    choice_option(
        "--finetune-by",
        choices=["all", "layer", "block"],
        help="all: prune all, train once; layer: prune a layer, train, and so on, as HRank; block: the same from "
        "one fork of the net to the next, as HRank's ResNet-50.",
    ),
    click.option(
        "--data", metavar="SRC", help="Images to train on, over what the train_val's data layer names."
    ),
    click.option("--test-data", metavar="SRC", help="Images to test on while training, likewise."),
    click.option(
        "--iterations",
        type=click.IntRange(1),
        help="Iterations of each training, over the solver's max_iter.",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), help="To train on; default as in train."),
    click.option("--resume", is_flag=True, help="Go on with a --finetune that was interrupted."),
    image_options(required=False, n_images=500),
    last_options("Also time both nets with onnxruntime."),
)


@dataclass(frozen=True, kw_only=True)
class Options(Changing):
    """One prune command; fields are its options."""

    weights: str | None
    rates: str | None
    rates_as: str
    rate_config: str | None
    params: float | None
    criterion: str
    at: Any
    rectify: bool
    rank_file: str | None
    save_ranks: str | None
    coupled: bool
    group_score: str
    min_channels: int
    mask_only: bool
    dry_run: bool
    count: str
    count_c4_slip: bool
    repair: Sequence[str]
    compare: bool
    then_decompose: float | None
    finetune: str | None
    finetune_by: Any
    data: str | None
    test_data: str | None
    iterations: int | None
    device: str | None

    @cached_property
    def given_plan(self) -> Plan:
        """The plan of --plan."""
        from caffe_proto.files import read_text

        from .joint import check_kind
        from .plan import Plan

        source = read_text(str(self.plan_file))
        check_kind(source, "prune", self.plan_file)
        return Plan.from_json(source, self.plan_file)

    @cached_property
    def recorded(self) -> Recorded | None:
        """The repairs of --plan that are to be repeated: none where --repair says other ones."""
        if self.plan_file is None or self.repair:
            return None
        from .repairing import recorded  # brings onnxruntime

        return recorded(self.given_plan, self.plan_file)

    @property
    def repairs(self) -> tuple[str, ...]:
        """The repairs to make, in their order."""
        if self.recorded is not None:
            return self.recorded.names
        return tuple(name for name in REPAIRS if name in self.repair)

    @property
    def calibration(self) -> Mapping[str, Any]:
        """What `read_images` takes; what a plan says of its images counts where the command line is silent."""
        planned = {} if self.recorded is None else self.recorded.settings
        return {**vars(self), **{key: value for key, value in planned.items() if key not in self.said}}

    @property
    def measures(self) -> bool:
        """Whether filters are judged by their maps."""
        return self.plan_file is None and (self.criterion in MEASURED or self.compare)

    @property
    def has_amount(self) -> bool:
        """Whether it is said how much goes, a plan apart."""
        return any((self.rates, self.rate_config, self.speedup, self.params))

    def amount(self) -> Amount:
        """How much goes."""
        from caffe_proto.files import read_text

        from . import rates
        from .planner import Amount

        if self.rates is not None:
            return Amount(rates.parse(self.rates), self.rates_as)
        if self.rate_config is not None:
            return Amount(by_layer=rates.from_json(read_text(self.rate_config), self.rate_config))
        return Amount(speedup=self.speedup, params=self.params)

    def limits(self) -> Limits:
        """What may go."""
        from .planner import Limits

        only = tuple(layer_names(self.only)) if self.only else None
        excepted = tuple(layer_names(self.except_))
        return Limits(excepted, only, self.coupled, self.round_to, self.min_channels, self.mask_only)

    def places(self) -> dict[str, Any]:
        """Where the maps are read, and by which seed the images are drawn."""
        return {"at": self.at, **({"rectify": True} if self.rectify else {}), "seed": self.seed}

    def inputs(self) -> list[str | None]:
        """Every file that was given, none of which may be overwritten."""
        files = [self.net, self.weights, self.rate_config, self.rank_file, self.save_ranks, self.finetune]
        return [*files, self.latency_table, *self.except_, *self.only]
