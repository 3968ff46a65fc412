"""Which models answer text with text: those that read it and whose `generate` gives tokens of it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin
from transformers.models.auto import modeling_auto

_TEXT = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
_OTHER = {
    "TEXT_TO_WAVEFORM": "sound",
    "TEXT_TO_SPECTROGRAM": "sound",
    "SPEECH_SEQ_2_SEQ": "from recorded speech",
    "CTC": "from recorded speech",
    "RNNT": "from recorded speech",
    "TDT": "from recorded speech",
    "CAUSAL_IMAGE_MODELING": "images",
}
"""What the classes of other tasks generate."""


def why_no_text(cls: type[Any], config: Any) -> str | None:
    """Why a model class with a config answers no text with text, as the end of a sentence about it; None where it does.

    By transformers' own lists of classes for each task. A class that is in none of them, as those of remote code, is
    one that does if it reads `input_ids`; one of transformers' own only if it generates as all do, and its model type
    has a class that is in a list of text.
    """
    if not cls.can_generate():
        return "does not generate at all"
    name = cls.__name__
    for task, what in _OTHER.items():
        if name in _classes(task) and not _is_text(name):
            return f"generates {what}"
    if getattr(config, "num_codebooks", None) is not None and "audio" not in getattr(config, "sub_configs", {}):
        return "generates codes of sound"
    if cls.main_input_name != "input_ids" and "input_ids" not in inspect.signature(cls.forward).parameters:
        return f"reads no text (`{cls.main_input_name}` is what it takes)"
    if cls.__module__.startswith("transformers.") and not _is_text(name):
        types = getattr(modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
        if cls.generate is not GenerationMixin.generate or getattr(config, "model_type", None) not in types:
            return "is none of the classes that transformers has for text"
    return None


def encodes_text(cls: type[Any]) -> bool:
    """Whether a model class is one of transformers' base classes that encode text, and generates none."""
    if cls.can_generate() or cls.main_input_name != "input_ids" or cls.__name__ not in _classes_of_no_task():
        return False
    taken = inspect.signature(cls.forward).parameters
    return {"input_ids", "attention_mask"} <= set(taken) and not any(name.startswith("decoder_") for name in taken)


def is_encoder_decoder(config: Any) -> bool:
    """Whether `generate` begins its answer anew, without the prompt, which only the encoder sees."""
    return bool(getattr(config, "is_encoder_decoder", False))


def _is_text(name: str) -> bool:
    return any(name in _classes(task) for task in _TEXT)


def _classes_of_no_task() -> set[str]:
    """The names of all base classes, which have no head."""
    found = getattr(modeling_auto, "MODEL_MAPPING_NAMES", {}).values()
    return {name for names in found for name in (names if isinstance(names, (tuple, list)) else (names,))}


def _classes(task: str) -> set[str]:
    """The names of all classes that transformers has for a task."""
    names: set[str] = set()
    for found in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).values():
        names.update(found if isinstance(found, (tuple, list)) else (found,))
    return names
