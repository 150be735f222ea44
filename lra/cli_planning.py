"""How the decompose command comes to its plan: the one given, or one made of the options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from caffe_proto import console
from caffe_proto.errors import UsageError

from .cli_changing import layer_names
from .cli_checks import check_plan
from .cli_options import Options, read_plan

if TYPE_CHECKING:
    from caffe_proto.model import Model
    from caffe_proto.runtime import Engine

    from .calibration import Calibration
    from .latency import Latency
    from .plan import LayerPlan, Plan
    from .targets import Found, Spectra


def merged(o: Options, model: Model) -> Model:
    """The net that layers are chosen of: the one given, or with --merge what is left of it."""
    from .merging import merge

    plan = o.given_plan
    if plan is not None and plan.complete and plan.merges is not None:
        return merge(model, o.input_shapes, plan.merges).model
    return merge(model, o.input_shapes).model if o.merge else model


def planned(o: Options, model: Model, found: Found, images: Calibration | None) -> tuple[Plan, Spectra]:
    """The plan, and the factorizations it took."""
    from .targets import Spectra

    if o.cost != "latency" and images is None:
        with console.progress("factoring", len(found.targets), "layers") as step:
            spectra = Spectra(found, lambda: step(1))
            return _plan(o, model, found, spectra, None, lambda _images: None), spectra
    spectra = Spectra(found)
    with console.progress("measuring", None, "steps" if o.cost == "latency" else "images") as step:
        return _plan(o, model, found, spectra, images, step), spectra


def engine(o: Options) -> Engine | None:
    """How the nets shall run, where times matter."""
    if o.cost == "macs" and o.plan_file is None:
        return None
    from caffe_proto.runtime import Engine

    return Engine(o.threads)


def _latency(o: Options, found: Found) -> Latency | None:
    if o.cost != "latency":
        return None
    from .latency import Latency

    return Latency(found, engine(o), o.latency_table)


def _numbers(value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(one) for one in value.split(",")]
    except ValueError:
        raise UsageError(
            f"--ranks {value!r} is no list of whole numbers", hint="for example 13,21,27"
        ) from None


def _plan(
    o: Options,
    model: Model,
    found: Found,
    spectra: Spectra,
    images: Calibration | None,
    step: Callable[[int], None],
) -> Plan:
    from .planner import make_plan

    config: Mapping[str, LayerPlan] | None = None if o.amounts else {}
    plan = o.given_plan
    if plan is not None:
        if plan.complete:
            check_plan(o, fits=bool(plan.target.get("fit")))
            return plan
        config = plan.layers
    elif o.rank_config is not None:
        config = read_plan(o.rank_config).layers
    return make_plan(
        model,
        scheme=o.scheme,
        speedup=o.speedup,
        energy=o.energy,
        ranks=_numbers(o.ranks),
        rank_config=config,
        scope=o.scope,
        fc=o.fc,
        except_layers=layer_names(o.except_),
        only=layer_names(o.only) if o.only else None,
        round_to=o.round_to,
        style=o.style,
        even_if_slower=o.even_if_slower,
        images=images,
        selection=o.selection,
        same_ranks=o.same_ranks,
        solver=o.solver,
        refit_kept=o.refit_kept,
        fold_bn=o.fold_bn,
        merge=o.merge,
        cost=o.cost,
        latency=_latency(o, found),
        step=step,
        input_shapes=o.input_shapes,
        found=found,
        spectra=spectra,
    )
