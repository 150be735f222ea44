"""Filter pruning by the rank of feature maps: decide with ``make_plan``, change with ``apply``.

Reference: Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .applier import Report, apply
    from .masking import masks
    from .plan import Plan
    from .planner import Limits, make_plan

__all__ = ["Limits", "Plan", "Report", "apply", "make_plan", "masks"]

_HOMES = {
    "Limits": "planner",
    "Plan": "plan",
    "Report": "applier",
    "apply": "applier",
    "make_plan": "planner",
    "masks": "masking",
}
_MODULES = (
    "applier", "compare", "counts", "coupling", "criteria", "groups", "masking", "measure", "plan", "planner", "rank",
    "rank_files", "rates", "repair", "repairing", "sites", "timing", "tuning",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands that prune nothing do not wait for it."""
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
