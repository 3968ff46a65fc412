"""Parts of a text, as a model is given them where something is measured on what it predicts."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..checkpoint.folder import Checkpoint
from ..errors import PolicyError, UnsupportedCheckpointError
from ..model.attention_cache import context_length
from ..model.skeleton import find_model
from ..model.text_kinds import is_encoder_decoder, why_no_text
from ..tokenizer import is_of_library, load_processor, said, tokenizer_of

WINDOW, FEWEST_TOKENS = 512, 64
MOST_CHARACTERS = 1 << 20
"""Of a text, from its beginning."""


def read_text(path: Path) -> str:
    """The beginning of a text, in UTF-8. Raises `PolicyError` for a file that cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MOST_CHARACTERS)
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}") from error


def text_windows(
    checkpoint: Checkpoint, text: str, trust_remote_code: bool, purpose: str, window: int, most: int
) -> list[Tensor]:
    """Token ids [1, n] of at most `most` parts of a text, from all over it, none longer than `window` or the context.

    No weight is read for it. Raises `PolicyError` for a text that is too short, and `UnsupportedCheckpointError` and
    `CheckpointError` for models that do not predict tokens of a text; `purpose` is what the messages say it is for.
    """
    recipe = find_model(checkpoint, trust_remote_code)
    why = why_no_text(recipe.cls, recipe.config)
    if why is not None or is_encoder_decoder(recipe.config):
        why = why or "has an encoder"
        raise UnsupportedCheckpointError(
            f"{checkpoint.model_id!r}, a {recipe.cls.__name__}, {why}; {purpose} is measured on texts that go on"
        )
    tokenizer = tokenizer_of(load_processor(checkpoint, trust_remote_code))
    try:
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    except BaseException as error:
        if not is_of_library(error) or isinstance(error, MemoryError):
            raise
        raise PolicyError(f"the tokenizer cannot use the text: {said(error)}") from error
    if len(ids) < FEWEST_TOKENS:
        raise PolicyError(f"the text has {len(ids)} tokens; {purpose} needs {FEWEST_TOKENS}, better a few thousand")
    length = min(window, context_length(recipe.config) or window, len(ids))
    count = min(most, len(ids) // length)
    step = (len(ids) - length) // max(count - 1, 1)
    return [ids[None, number * step : number * step + length] for number in range(count)]
