"""Which options of the decompose command go together."""

from __future__ import annotations

from caffe_proto import files
from caffe_proto.cli_images import COMPANIONS
from caffe_proto.errors import UsageError
from caffe_proto.peers import Peers

from .cli_options import AMOUNTS, Options
from .cli_report import check_charts

_FITTING = {"positions", "solver", "refit_kept", "polish", "resume"}
_DECIDES = {
    "scheme", "fc", "except_", "only", "round_to", "even_if_slower", "style", "solver", "refit_kept", "fold_bn", "merge",
}  # fmt: skip


def check(o: Options, peers: Peers) -> None:
    """Raise UsageError where options contradict one another, or one would be ignored or cannot be written."""
    _check_amount(o)
    if peers.world > 1:
        _check_shared(o, peers)
    if o.report_it:
        if o.plan_only:
            raise UsageError("--report does not go with --plan-only: the page is about the new net")
        check_charts()
    if o.prefix is None and not o.plan_only:
        raise UsageError("-o PREFIX is missing", hint="add -o PREFIX, or --plan-only to write nothing")
    _check_companions(o)
    if o.prefix is not None and not o.plan_only:
        files.check(o.targets(), o.inputs())


def _check_amount(o: Options) -> None:
    given = o.amounts
    if len(given) != 1 and (given or not o.merge):
        found = " and ".join(given) + " are given" if given else "no amount is given"
        raise UsageError(f"{found}; give exactly one of {', '.join(AMOUNTS)}")


def _check_shared(o: Options, peers: Peers) -> None:
    """Refuse what several processes cannot do together."""
    if o.images is None:
        raise UsageError(
            f"there is no work for {peers.world} processes",
            hint="start one, or add --images: several share a fit to them",
        )
    o.refuse({"resume", "polish", "report_it"}, "does not go with several processes: start one")
    if o.cost == "latency":
        raise UsageError(
            "--cost latency does not go with several processes",
            hint="start one: they disturb each other's times",
        )


def _check_companions(o: Options) -> None:
    """Refuse options that go with others only."""
    if o.speedup is None:
        o.refuse({"scope", "selection", "cost"}, "only goes with --speedup")
    else:
        o.refuse({"even_if_slower"}, "does not go with --speedup, which takes only what is cheaper")
    if not o.amounts:
        alone = {"scheme", "fc", "except_", "only", "round_to", "style", "images"}
        o.refuse(alone, "does not go with --merge alone")
    if o.merge:
        o.refuse({"even_if_slower"}, "does not go with --merge, which would undo it")
    if o.cost != "latency":
        o.refuse({"latency_table"}, "only goes with --cost latency")
    if o.images is None:
        o.refuse(COMPANIONS | _FITTING, "only goes with --images")
    if o.plan_file is None:
        o.refuse({"force"}, "only goes with --plan")
    if o.ranks is not None or o.rank_config is not None:
        o.refuse({"round_to"}, "does not go with ranks that are given")
    if o.scheme != "asymmetric-3d":
        o.refuse({"same_ranks"}, "only goes with --scheme asymmetric-3d")


def check_plan(o: Options, fits: bool) -> None:
    """Raise UsageError on what a plan that says everything has decided; ``fits``: it fits responses to images."""
    o.refuse(_DECIDES, "does not go with a plan that says everything")
    if not fits:
        o.refuse({"images"}, "does not go with a plan that fits nothing to them")
