"""What the commands share that make another net of a net: options, the files they stand for, and reading these again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from caffe_proto import console
from caffe_proto.cli_images import ImageOptions
from caffe_proto.console import (
    Decorator,
    input_shape_option,
    json_option,
    seed_option,
    state_options,
    threads_option,
    together,
)

from . import outputs
from .cli_report import report_option

if TYPE_CHECKING:
    from caffe_proto.latency import Subject
    from caffe_proto.model import Model
    from caffe_proto.shape_inference import Shaped

_SPELT = {"selection": "rank_selection", "time_it": "time", "report_it": "report"}

prefix_option = click.option(
    "-o",
    "--output",
    "prefix",
    metavar="PREFIX",
    help="Writes PREFIX.prototxt, PREFIX.caffemodel, PREFIX.plan.json.",
)
plan_option = click.option("--plan", "plan_file", metavar="FILE.plan.json", help="Apply a plan made before.")


table_option = click.option(
    "--latency-table",
    metavar="FILE",
    help="With --cost latency: the table of measured times; default: one in the user's cache.",
)


def layer_options(spared: str) -> Decorator:
    """--except and --only; ``spared``: what the first does."""
    return together(
        click.option(
            "--except",
            "except_",
            multiple=True,
            metavar="NAME|FILE.json",
            help=f"{spared}; repeatable.",
        ),
        click.option(
            "--only", multiple=True, metavar="NAME|FILE.json", help="Touch only these layers; repeatable."
        ),
    )


def round_option(text: str) -> Decorator:
    """--round-to."""
    return click.option("--round-to", type=click.IntRange(1), default=1, show_default=True, help=text)


def last_options(timed: str) -> Decorator:
    """What stands last in the help: more outputs, and how everything runs; ``timed``: what --time does."""
    return together(
        click.option("--onnx", is_flag=True, help="Also write PREFIX.onnx."),
        click.option("--time", "time_it", is_flag=True, help=timed),
        report_option,
        threads_option,
        seed_option,
        input_shape_option,
        state_options,
        json_option,
    )


@dataclass(frozen=True, kw_only=True)
class Changing(ImageOptions):
    """One such command; fields are its options."""

    net: str
    prefix: str | None
    except_: Sequence[str]
    only: Sequence[str]
    speedup: float | None
    plan_file: str | None
    round_to: int
    cost: str
    latency_table: str | None
    force: bool
    resume: bool
    positions: int | None
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

    def refuse(self, options: set[str] | frozenset[str], why: str) -> None:
        """Refuse options that would be ignored."""
        console.refuse(options & self.said, why, _SPELT)

    def load(self, net: str, weights: str | None) -> Model:
        """A model in the phase that the options say."""
        return console.load_model(net, weights, self.phase, self.stages, self.level)

    @property
    def html(self) -> str:
        """The page of --report."""
        return f"{self.prefix}.html"

    def names(self) -> dict[str, str]:
        """The files of the prefix by kind, the page apart."""
        return outputs.names(str(self.prefix), weights=True, onnx=self.onnx)

    def targets(self) -> list[str]:
        """Every file that is written."""
        return [*self.names().values(), *([self.html] if self.report_it else [])]

    def subjects(self, before: Model, after: Model) -> list[Subject]:
        """The nets that --time times, none without."""
        if not self.time_it:
            return []
        return outputs.subjects((self.net, f"{self.prefix}.prototxt"), (before, after), self.input_shapes)

    def read_again(self, macs: int, params: int | None = None) -> tuple[Model, Shaped]:
        """The written net, which must cost what was planned; ``params``: None where nothing is known of them."""
        from caffe_proto.costs import cost
        from caffe_proto.graph import build
        from caffe_proto.shape_inference import infer

        files = self.names()
        written = self.load(files["prototxt"], files["caffemodel"])
        shaped = infer(build(written.net), self.input_shapes, partial=True)
        found = cost(shaped)
        if found.macs != macs or params not in (None, found.params):
            raise AssertionError("the written files do not cost what was planned")
        return written, shaped


def layer_names(values: Sequence[str]) -> list[str]:
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
