"""Write down how a model was loaded."""

from __future__ import annotations

from typing import Any

from ..draft import Draft
from ..options import LoadOptions
from ..ranks.alone import Alone
from .settings import LoadSettings, TensorNames


def remember(model: Any, draft: Draft, options: LoadOptions, trust_remote_code: bool, ranks: Alone) -> None:
    """Leave on a model what a reload needs to know of its load."""
    entries = draft.sources.entries
    used = {name for conversion in draft.mapped.conversions for name in conversion.names()}
    model.load_settings = LoadSettings(
        draft.rules.policy,
        options,
        trust_remote_code,
        TensorNames((name, entry.dtype, entry.shape) for name, entry in entries.items() if name in used),
        TensorNames((name, entry.dtype, entry.shape) for name, entry in entries.items() if name not in used),
        any(assignment.stored is not None for assignment in draft.assignments),
        ranks.again(),
    )
