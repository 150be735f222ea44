"""The options of the prune command, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import click

from caffe_proto.cli_data import image_options
from caffe_proto.console import (
    input_shape_option,
    json_option,
    seed_option,
    state_options,
    threads_option,
)
from lra.cli_decompose import layer_names
from lra.cli_report import report_option

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

_OPTIONS = (
    click.option(
        "-o",
        "--output",
        "prefix",
        metavar="PREFIX",
        help="Writes PREFIX.prototxt, PREFIX.caffemodel, PREFIX.plan.json.",
    ),
    click.option(
        "--rates",
        metavar="STRING",
        help="Fractions pruned, one a position of the net: [0.1]+[0.6]*35+[0.0]*2.",
    ),
    click.option(
        "--rates-as",
        type=click.Choice(["hrank", "hrankplus"]),
        default="hrank",
        show_default=True,
        help="Which published code's positions and rounding --rates has; --dry-run lists the positions.",
    ),
    click.option("--rate-config", metavar="FILE.json", help='Rates by layer: {"conv1": 0.5}.'),
    click.option("--speedup", type=float, help="MACs before / after; one rate for all layers is found."),
    click.option("--params", type=float, help="Parameters before / after; with --speedup both are met."),
    click.option("--plan", "plan_file", metavar="FILE.plan.json", help="Apply a plan made before."),
    click.option(
        "--criterion",
        type=click.Choice(CRITERIA),
        default="rank",
        show_default=True,
        help="Which filters stay: rank, rowcol, apoz, activation, nuclear, reverse and edge are measured on images.",
    ),
    click.option(
        "--at",
        type=click.Choice(["relu", "after_pool", "conv"]),
        default="relu",
        show_default=True,
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
    click.option(
        "--group-score",
        type=click.Choice(["mean", "max", "min"]),
        default="mean",
        show_default=True,
        help="With --coupled: a channel's score from those of the layers that share it.",
    ),
    click.option(
        "--except",
        "except_",
        multiple=True,
        metavar="NAME|FILE.json",
        help="Leave this layer whole; repeatable.",
    ),
    click.option(
        "--only", multiple=True, metavar="NAME|FILE.json", help="Touch only these layers; repeatable."
    ),
    click.option(
        "--round-to",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Channels are multiples of this, rounded up.",
    ),
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
    click.option(
        "--count",
        type=click.Choice(["macs", "hrank", "hrankplus"]),
        default="macs",
        show_default=True,
        help="Also count as the published code does.",
    ),
    click.option(
        "--repair",
        multiple=True,
        type=click.Choice(["none", *REPAIRS]),
        help="Without training, from images: bias adds what was lost on average, lsq fits the layers behind, bn estimates "
        "BatchNorm again (behind --finetune); repeatable, made in this order. A plan repeats its own; none: leave them "
        "out.",
    ),
    click.option(
        "--positions",
        type=click.IntRange(1),
        help="With --repair lsq: places of each image at which responses are sampled.",
    ),
    click.option(
        "--compare",
        is_flag=True,
        help="All criteria on the same counts, judged on the images, before training.",
    ),
    click.option(
        "--then-decompose",
        type=float,
        metavar="R",
        help="Decompose what is left, until the whole is R times cheaper; PREFIX.plan.json holds both plans.",
    ),
    click.option("--force", is_flag=True, help="Use a plan or a rank file of other files."),
    click.option(
        "--finetune",
        metavar="SOLVER",
        help="Train the pruned net by this solver, which names the train_val of NET; what is written is what that ends "
        "with. Needs torch.",
    ),
    click.option(
        "--finetune-by",
        type=click.Choice(["all", "layer", "block"]),
        default="all",
        show_default=True,
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
    partial(image_options, required=False, n_images=500),
    click.option("--onnx", is_flag=True, help="Also write PREFIX.onnx."),
    click.option("--time", "time_it", is_flag=True, help="Also time both nets with onnxruntime."),
    report_option,
    threads_option,
    seed_option,
    input_shape_option,
    state_options,
    json_option,
)


def options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All options of the command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True)
class Options:
    """One prune command; fields are its options."""

    net: str
    weights: str | None
    prefix: str | None
    rates: str | None
    rates_as: str
    rate_config: str | None
    speedup: float | None
    params: float | None
    plan_file: str | None
    criterion: str
    at: Any
    rectify: bool
    rank_file: str | None
    save_ranks: str | None
    coupled: bool
    group_score: str
    except_: Sequence[str]
    only: Sequence[str]
    round_to: int
    min_channels: int
    mask_only: bool
    dry_run: bool
    count: str
    repair: Sequence[str]
    positions: int | None
    compare: bool
    then_decompose: float | None
    force: bool
    finetune: str | None
    finetune_by: Any
    data: str | None
    test_data: str | None
    iterations: int | None
    device: str | None
    resume: bool
    images: str | None
    root: str | None
    n_images: int
    mean: str | None
    scale: float | None
    crop: tuple[int, int] | None
    resize: tuple[int, int] | None
    bgr: bool | None
    skip_bad: bool
    onnx: bool
    time_it: bool
    report_it: bool
    threads: int
    seed: int
    input_shapes: dict[str, tuple[int, ...]]
    phase: str
    stages: Sequence[str]
    level: int
    as_json: bool
    said: frozenset[str]  # options that stand on the command line

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
        from .repairing import recorded

        if self.plan_file is None or self.repair:
            return None
        return recorded(self.given_plan, self.plan_file)

    @property
    def repairs(self) -> tuple[str, ...]:
        """The repairs to make, in their order."""
        if self.recorded is not None:
            return self.recorded.names
        return tuple(name for name in REPAIRS if name in self.repair)

    @property
    def calibration(self) -> Mapping[str, Any]:
        """What `read_calibration` takes; what a plan says of its images counts where the command line is silent."""
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

    @property
    def html(self) -> str:
        """The page of --report."""
        return f"{self.prefix}.html"

    def inputs(self) -> list[str | None]:
        """Every file that was given, none of which may be overwritten."""
        files = [self.net, self.weights, self.rate_config, self.rank_file, self.save_ranks, self.finetune]
        return [*files, *self.except_, *self.only]
