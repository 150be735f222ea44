"""Which options of the prune command go together."""

from __future__ import annotations

from caffe_proto.cli_images import COMPANIONS
from caffe_proto.errors import UsageError
from lra.cli_report import check_charts

from .cli_options import MEASURED, Options

_DECIDES = {
    "criterion", "at", "rectify", "rank_file", "coupled", "group_score", "except_", "only", "round_to", "min_channels",
}  # fmt: skip
_TRAINING = {"finetune_by", "data", "test_data", "iterations", "device", "resume"}


def check(o: Options) -> None:
    """Raise UsageError where options contradict one another, or one would be ignored."""
    _check_amount(o)
    if o.prefix is None and not o.dry_run and not o.compare:
        raise UsageError("-o PREFIX is missing", hint="add -o PREFIX, or --dry-run to write nothing")
    if o.weights is None and not o.dry_run:
        raise UsageError("WEIGHTS is missing", hint="--dry-run alone does without")
    if o.speedup is None:
        o.refuse({"cost"}, "only goes with --speedup")
    if o.cost != "latency":
        o.refuse({"latency_table"}, "only goes with --cost latency")
    if o.rates is None and not o.dry_run:
        o.refuse({"rates_as"}, "only goes with --rates")
    if o.rates is None or {o.rates_as, o.count} != {"hrank"}:
        o.refuse({"count_c4_slip"}, "only goes with --count hrank and --rates as hrank has them")
    if o.plan_file is not None:
        o.refuse(_DECIDES | {"compare", "save_ranks"}, "does not go with --plan, which has decided")
    elif o.rank_file is None:
        o.refuse({"force"}, "only goes with --plan or --rank-file")
    if not o.coupled:
        o.refuse({"group_score"}, "only goes with --coupled")
    if o.mask_only:
        _check_masks(o)
    if "none" in o.repair and len(set(o.repair)) > 1:
        raise UsageError("--repair none does not go with other repairs")
    if o.prefix is None:
        o.refuse({"onnx", "time_it", "then_decompose", "finetune", "report_it"}, "only goes with -o PREFIX")
    elif o.report_it:
        check_charts()
    _check_training(o)
    _check_images(o)


def _check_amount(o: Options) -> None:
    amounts = {"--rates": o.rates, "--rate-config": o.rate_config, "--plan": o.plan_file}
    given = [name for name, value in amounts.items() if value is not None] + _budget(o)[:1]
    if len(given) > 1 or (not given and not o.dry_run):
        found = " and ".join(given) + " are given" if given else "no amount is given"
        raise UsageError(f"{found}; give exactly one of {', '.join(amounts)}, and --speedup or --params")


def _budget(o: Options) -> list[str]:
    budget = (("--speedup", o.speedup), ("--params", o.params))
    return [name for name, value in budget if value is not None]


def _check_masks(o: Options) -> None:
    if o.cost == "latency":
        raise UsageError("--cost latency does not go with --mask-only: masks leave every shape as it is")
    o.refuse({"then_decompose"}, "does not go with --mask-only: masks leave every shape as it is")
    if "lsq" in o.repairs:
        raise UsageError("--repair lsq does not go with --mask-only: it fits the layers of a smaller net")
    if not _budget(o) and o.plan_file is None:
        o.refuse({"coupled"}, "does not go with rates and --mask-only: each layer is masked by itself")


def _check_training(o: Options) -> None:
    if o.finetune is None:
        o.refuse(_TRAINING, "only goes with --finetune")
    elif o.finetune_by != "all" and set(o.repairs) - {"bn"}:
        name = next(name for name in o.repairs if name != "bn")
        raise UsageError(
            f"--repair {name} does not go with --finetune-by {o.finetune_by}",
            hint="training stands for it" + (", or add --repair none" if o.recorded is not None else ""),
        )


def _check_images(o: Options) -> None:
    if o.rank_file is not None and not o.measures:
        raise UsageError(f"--rank-file does not go with criterion {o.criterion}, which needs none")
    if o.rank_file is not None:
        o.refuse({"save_ranks", "at", "rectify"}, "does not go with --rank-file")
    if not o.measures:
        o.refuse({"save_ranks", "at", "rectify"}, "only goes with criteria that are measured")
    own = o.measures and o.criterion in MEASURED and o.rank_file is None
    needed = [f"--criterion {o.criterion}"] if own else []
    needed += ["--compare"] if o.compare else []
    needed += [f"--repair {name}" for name in o.repairs] if o.recorded is None else []
    if o.images is None:
        if needed and not o.dry_run:
            raise UsageError(f"{needed[0]} needs images", hint="add --images SRC")
        if o.recorded is not None and not o.dry_run:
            raise o.recorded.without_images(o.plan_file, "or --repair none")
        o.refuse((COMPANIONS - {"root"}) | {"save_ranks"}, "only goes with --images")
        if o.finetune is None:
            o.refuse({"root"}, "only goes with --images")
    elif not needed and o.recorded is None:
        raise UsageError(
            "--images is not needed",
            hint="it goes with criteria that are measured, --repair and --compare",
        )
    if "lsq" not in o.repairs:
        o.refuse({"positions"}, "only goes with --repair lsq")
