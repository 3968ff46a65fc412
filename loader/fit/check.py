"""Whether a draft fits into the memory there is, and what will come on top of its peak."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from ..draft import Draft
from ..memory.limits import device_limit, memory_limits
from ..memory.probes import AnonymousRssProbe
from ..memory.verdict import Verdict, judge
from ..model.attention_cache import attention_cache_bytes, context_length
from ..options import LoadOptions
from .peaks import scheme_peaks

logger = logging.getLogger("quantload")

DEFAULT_TOKENS = 4096
"""Tokens that an attention cache is counted for where the config has no context length."""


def judge_draft(draft: Draft, options: LoadOptions) -> Verdict:
    """The verdict about a load, with what other schemes would take where it does not fit."""
    limits, device = memory_limits(), device_limit(draft.schemes.device)
    verdict = judge(draft.plan.memory, limits, device, lambda: scheme_peaks(draft, options))
    is_compared = verdict.needed == draft.plan.memory.peak_bytes and (
        draft.rank_plan.ranks == 1 or options.memory_scope == "host"
    )  # with what the caller allows: by a rank its own peak, here it is that of all of the host
    return verdict.within(options.max_memory) if is_compared else verdict


def check_fits(draft: Draft, options: LoadOptions) -> Verdict:
    """Raise `MemoryBudgetError` where a load cannot fit, unless `options.force`; log the verdict and give it."""
    verdict = judge_draft(draft, options)
    verdict.check("the load", options.force)
    logger.log(logging.INFO if verdict.state == "fits" else logging.WARNING, "Memory: %s", verdict)
    return verdict


@dataclass(frozen=True)
class BesidePeak:
    """What comes on top of the peak of a load, in bytes.

    `process_bytes` is what this process holds already: Python, torch, transformers and the draft. Generating for
    `requests` sequences of `attention_cache_tokens`, the context of the model unless a number was given, takes
    `attention_cache_bytes` more; that and the tokens are `None` for a model that keeps no such cache, or of which it is
    not known.
    """

    process_bytes: int
    attention_cache_bytes: int | None
    attention_cache_tokens: int | None
    requests: int = 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def beside_peak(draft: Draft, tokens: int | None = None, requests: int = 1) -> BesidePeak:
    """What a load and generating take beside what is planned; of `requests` sequences each has so many tokens."""
    config, model = draft.model.config, draft.model
    tokens = tokens or context_length(config) or DEFAULT_TOKENS
    one = attention_cache_bytes(config, tokens, model.dtype) if model.can_generate() else None
    nbytes = None if one is None else one * requests
    return BesidePeak(AnonymousRssProbe().current(), nbytes, None if one is None else tokens, requests)
