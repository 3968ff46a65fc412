"""Which models can be served: those that answer text with text, and those that encode it."""

from __future__ import annotations

from typing import Any

from ..model.text_kinds import encodes_text, is_encoder_decoder, why_no_text


def why_not_served(cls: type[Any], config: Any, continuous_batching: bool = False) -> str | None:
    """Why a model class with a config cannot be served, as the end of a sentence about it; None where it can."""
    if encodes_text(cls):
        return None
    why = why_no_text(cls, config)
    if why is not None:
        return f"{why}: it can be loaded, not served"
    if continuous_batching and is_encoder_decoder(config):
        return "has an encoder and a decoder, which cannot batch continuously: leave out --continuous-batching"
    return None
