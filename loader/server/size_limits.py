"""How large a request may be, from the model's context: what cannot fit is refused before it is parsed or tokenized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .api_errors import ApiError, bad_request
from .messages import MEDIA_PARTS

UNLIMITED_CONTEXT = 1 << 20
"""Tokens that a prompt may have where a model's config names no limit."""
ESCAPED = 6
"""Most bytes of JSON for a byte of text: `\\u001f`."""
AROUND = 256 << 10
"""Bytes of a body for everything that is no text."""
LEAST_BODY, MOST_BODY, MOST_MEDIA_BODY = 1 << 20, 16 << 20, 64 << 20
ALL_BODIES = 256 << 20
"""Bytes of all bodies that are being read or parsed."""
UNKNOWN_TOKEN_BYTES = 128
"""Longest token of a tokenizer that cannot list its vocabulary."""
PIECE = 64 << 10
"""Characters of a long text that are tokenized at once, to see whether it fits."""
PIECE_SLACK = 16
"""Tokens that a piece may have more than the same text had in its place, because it was cut off there."""


@dataclass(frozen=True)
class SizeLimits:
    """What requests to one model may have: tokens of context, bytes of the longest token, and whether media."""

    context: int
    token_bytes: int
    media: bool = False

    @property
    def prompt_bytes(self) -> int:
        """The longest text, in UTF-8, that can be no more tokens than the context has."""
        return self.context * self.token_bytes

    @property
    def body_bytes(self) -> int:
        """The longest body: such a text in JSON, within bounds."""
        most = MOST_MEDIA_BODY if self.media else MOST_BODY
        return most if self.media else min(most, max(LEAST_BODY, ESCAPED * self.prompt_bytes + AROUND))

    def check(self, body: dict[str, Any], tokenizer: Any, ids: Sequence[int] | None = None) -> None:
        """Raise `ApiError` (400) for a checked request whose prompt cannot fit into the context.

        `ids` are those of the prompt, where it came as ids. Long texts are tokenized piece by piece until it is known,
        so that what does not fit takes little memory.
        """
        field = "messages" if "messages" in body else "prompt"
        if ids is not None and len(ids) > self.context:
            raise _too_long(field, f"{len(ids)} tokens", self.context)
        entries = len(body.get("messages") or ()) + len(body.get("tools") or ())
        if entries > self.context:
            raise _too_long(field, f"{entries} messages and tools", self.context)
        texts = list(texts_of([body.get(name) for name in (field, "tools", "chat_template_kwargs")]))
        nbytes = sum(len(text.encode()) for text in texts)
        if nbytes > self.prompt_bytes:
            raise _too_long(field, f"{nbytes} bytes, more than {self.prompt_bytes}", self.context)
        if nbytes > PIECE and not self._fits(texts, tokenizer):
            raise _too_long(field, "more", self.context)

    def _fits(self, texts: Sequence[str], tokenizer: Any) -> bool:
        tokens = 0
        for text in texts:
            for begin in range(0, len(text), PIECE):
                ids = tokenizer(text[begin : begin + PIECE], add_special_tokens=False, verbose=False)["input_ids"]
                tokens += max(0, len(ids) - PIECE_SLACK)
                if tokens > self.context:
                    return False
        return True


def size_limits(context: int | None, tokenizer: Any, media: bool) -> SizeLimits:
    """The limits for a model with `context` tokens (None: no limit is named) and its tokenizer."""
    try:
        pieces = tokenizer.get_vocab()
    except (AttributeError, NotImplementedError):
        pieces = {}
    # Vocabularies write a space as a letter of two or three bytes, and their longest tokens are of spaces.
    longest = max((len(piece.replace("Ġ", " ").replace("▁", " ").encode()) for piece in pieces), default=0)
    return SizeLimits(context or UNLIMITED_CONTEXT, longest or UNKNOWN_TOKEN_BYTES, media)


def texts_of(value: object) -> Iterator[str]:
    """All strings in a value of JSON, without the data of images, videos and sound."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, list | tuple):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend(part for name, part in one.items() if name not in MEDIA_PARTS)


def _too_long(field: str, what: str, context: int) -> ApiError:
    return bad_request(
        f"this model's context is {context} tokens, and `{field}` has {what}; shorten it",
        field,
        "context_length_exceeded",
    )
