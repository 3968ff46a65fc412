"""How much memory a load takes: predicted, measured, limited, logged, reported and exported.

Nothing here imports torch until a probe or a ledger is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .amounts import format_bytes as format_bytes
    from .amounts import parse_bytes as parse_bytes
    from .assertions import assert_load_memory as assert_load_memory
    from .budget import check_budget as check_budget
    from .ledger import Ledger as Ledger
    from .logs import MemoryLog as MemoryLog
    from .metrics import LoadMetrics as LoadMetrics
    from .planner import MemoryPlan as MemoryPlan
    from .planner import ParameterSize as ParameterSize
    from .planner import plan_memory as plan_memory
    from .probes import AllocatorProbe as AllocatorProbe
    from .probes import AnonymousRssProbe as AnonymousRssProbe
    from .probes import MemoryProbe as MemoryProbe
    from .probes import probe_for as probe_for
    from .report import KeptReport as KeptReport
    from .report import LayerReport as LayerReport
    from .report import LoadReport as LoadReport
    from .report import TimelinePoint as TimelinePoint
    from .summary import render as render

_HOMES = {
    "assertions": ("assert_load_memory",),
    "amounts": ("format_bytes", "parse_bytes"),
    "budget": ("check_budget",),
    "ledger": ("Ledger",),
    "logs": ("MemoryLog",),
    "metrics": ("LoadMetrics",),
    "planner": ("MemoryPlan", "ParameterSize", "plan_memory"),
    "probes": ("AllocatorProbe", "AnonymousRssProbe", "MemoryProbe", "probe_for"),
    "report": ("KeptReport", "LayerReport", "LoadReport", "TimelinePoint"),
    "summary": ("render",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
