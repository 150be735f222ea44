"""Low-rank decompositions of Caffe nets: decide with ``make_plan``, change with ``apply``.

Reference: Wen et al., ICCV 2017 (cross-filter); Tai et al., ICLR 2016, and Jaderberg et al., BMVC 2014 (spatial).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .applier import Report, apply
    from .plan import Plan
    from .planner import make_plan

__all__ = ["Plan", "Report", "apply", "make_plan"]

_HOMES = {"Plan": "plan", "Report": "applier", "apply": "applier", "make_plan": "planner"}
_MODULES = (
    "clipping",
    "decomposition",
    "force",
    "linalg",
    "nonlinear",
    "ranks",
    "schemes",
    "sparsify",
    "stats",
)


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands that decompose nothing do not wait for SciPy."""
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
