"""The tokenizer of a checkpoint, or the processor of one that reads more than text, and its chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from .checkpoint.folder import Checkpoint
from .checkpoint.small_files import PROCESSOR_FILES, check_small_files
from .errors import CheckpointError

WHAT_TO_DO = "put its tokenizer.json and tokenizer_config.json into the folder"
_LONGEST = 1000


def load_processor(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The processor of a checkpoint, or its tokenizer where it has none. Raises `CheckpointError`."""
    check_small_files(checkpoint.root, PROCESSOR_FILES)
    try:
        processor = AutoProcessor.from_pretrained(checkpoint.root, trust_remote_code=trust_remote_code)
    except BaseException as error:  # processor classes fail in ways of their own, and their libraries panic
        if not is_of_library(error) or isinstance(error, MemoryError):
            raise
        raise CheckpointError(
            f"{checkpoint.model_id!r} has no tokenizer or processor that can be loaded"
            f"{_not_json(checkpoint.root)} ({said(error)}); {WHAT_TO_DO}"
        ) from error
    tokenizer = tokenizer_of(processor)
    if not callable(getattr(tokenizer, "decode", None)):
        raise CheckpointError(
            f"{checkpoint.model_id!r} has a {type(processor).__name__} and no tokenizer; {WHAT_TO_DO}"
        )
    if not vocabulary_files(checkpoint.root) and not tokenizer("Hi")["input_ids"]:
        # transformers makes an empty one for some models
        raise CheckpointError(f"{checkpoint.model_id!r} has no tokenizer; {WHAT_TO_DO}")
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; itself, where it is one."""
    return getattr(processor, "tokenizer", processor)


def chat_templates(processor: Any) -> list[str]:
    """The chat templates that a tokenizer or processor would use: none, one, or one for each purpose."""
    found = getattr(processor, "chat_template", None)
    if found is None and isinstance(processor, ProcessorMixin):
        found = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if not found:
        return []
    return list(found.values()) if isinstance(found, dict) else [found]


def is_of_library(error: BaseException) -> bool:
    """Whether an error is one of a file or of the library that reads it, and no interruption of this program."""
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


def said(error: BaseException) -> str:
    """What an error of a library says, with its name; of a long text the beginning."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def processor_files(root: Path) -> list[str]:
    """The files of a tokenizer or processor that are there."""
    found = {path.name for pattern in PROCESSOR_FILES for path in root.glob(pattern) if path.is_file()}
    return sorted(found)


def vocabulary_files(root: Path) -> list[str]:
    """Those of them that say what tokens there are."""
    return [name for name in processor_files(root) if "chat_template" not in name]


def _not_json(root: Path) -> str:
    """Says which files should be JSON and are not."""
    wrong = []
    for name in processor_files(root):
        if name.endswith(".json"):
            try:
                json.loads((root / name).read_bytes())
            except (ValueError, RecursionError):
                wrong.append(name)
    return f": {', '.join(wrong)} is not JSON" if wrong else ""
