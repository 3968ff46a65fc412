"""How likely the tokens of an answer were: noted while `generate` runs, told in OpenAI's two shapes.

The probabilities are the model's own, before temperature, penalties, biases and grammars, as vLLM's default is.
"""

from __future__ import annotations

import codecs
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

LEAST = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True)
class Chosen:
    """One generated token: its id, its log probability, and those of the most likely tokens, most likely first."""

    token: int
    logprob: float
    likely: tuple[tuple[int, float], ...]


class LogprobNotes:
    """Notes the tokens of one generation in `chosen`, each with the `count` most likely tokens of its place."""

    def __init__(self, count: int, chosen: list[Chosen]) -> None:
        self.count = count
        self.chosen = chosen
        self._logits: Tensor | None = None
        self._thread: int | None = None

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """See the logits [1, n, vocabulary] of every forward pass of `model` in this thread until the block ends."""
        self._thread = threading.get_ident()
        handle = model.register_forward_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, _model: Any, _args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread:  # a batch runs in another one
            self.see(output.logits[0, -1])

    def see(self, logits: Tensor) -> None:
        """The next token will be chosen by these logits [vocabulary]."""
        self._logits = logits.to(torch.float32, copy=True)

    def note(self, token: int) -> None:
        """`token` was chosen by the logits that were seen last."""
        if self._logits is None:
            raise RuntimeError("no logits were seen before a token was chosen")
        logprobs = torch.nan_to_num(torch.log_softmax(self._logits, -1), nan=LEAST, neginf=LEAST)
        values, ids = torch.topk(logprobs, min(self.count, logprobs.shape[-1]))
        likely = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        self.chosen.append(Chosen(token, float(logprobs[token]), likely))


@dataclass(frozen=True)
class TokenText:
    """What one token adds to a text: the text (`bytes:\\xe2` for a part of a character) and its bytes, if known."""

    text: str
    data: bytes | None


class TokenTexts:
    """The texts of single tokens of a tokenizer, each as it is in the middle of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids that are no part of a text."""
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _before(self) -> tuple[list[int], str]:
        """A token to put before others, and its text."""
        ids: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        return ids, self._decode(ids)

    def __getitem__(self, token: int) -> TokenText:
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def first(self, token: int) -> TokenText:
        """The text of a token that begins an answer: some tokenizers leave out a space there."""
        known = self[token]
        text = self._decode([token])
        return TokenText(text, text.encode()) if known.text.endswith(text) and known.text != text else known

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _read(self, token: int) -> TokenText:
        before, before_text = self._before
        text = self._decode([*before, token])
        text = text[len(before_text) :] if text.startswith(before_text) else self._decode([token])
        if "\ufffd" not in text:
            return TokenText(text, text.encode())
        data = bytes_of_piece(str(self.tokenizer.convert_ids_to_tokens(token)))
        if data is None:
            return TokenText(text, None)
        return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies, from GPT-2 on, write bytes with: themselves if they are visible."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_LETTERS = _byte_letters()


def bytes_of_piece(piece: str) -> bytes | None:
    """The bytes that a vocabulary's entry stands for: `<0xE2>`, or letters for bytes; None for another form."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return None
    if all(letter in _BYTE_LETTERS for letter in piece):
        return bytes(_BYTE_LETTERS[letter] for letter in piece)
    return None


@dataclass(frozen=True)
class Placed:
    """A generated token, its text, and where in the answer's text it begins (characters)."""

    chosen: Chosen
    text: TokenText
    offset: int


class TokenLog:
    """The tokens of one answer, handed out as its text grows; special tokens are no part of the text, nor of this."""

    def __init__(self, chosen: list[Chosen], texts: TokenTexts) -> None:
        self._chosen = chosen
        self._texts = texts
        self._next = 0
        self._length = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, length: int | None = None) -> list[Placed]:
        """The tokens not yet taken that begin before the text's character `length`; all there are without it."""
        taken: list[Placed] = []
        while self._next < len(self._chosen) and (length is None or self._length < length):
            chosen = self._chosen[self._next]
            self._next += 1
            if chosen.token in self._texts.special:
                continue
            text = self._texts[chosen.token] if self._length else self._texts.first(chosen.token)
            taken.append(Placed(chosen, text, self._length))
            self._length += len(text.text if text.data is None else self._decoder.decode(text.data))
        return taken


def chat_logprobs(tokens: list[Placed], texts: TokenTexts) -> dict[str, Any]:
    """`logprobs` of a choice of the chat API."""

    def entry(text: TokenText, logprob: float) -> dict[str, Any]:
        return {"token": text.text, "logprob": logprob, "bytes": None if text.data is None else list(text.data)}

    content = [
        entry(token.text, token.chosen.logprob)
        | {"top_logprobs": [entry(texts[other], logprob) for other, logprob in token.chosen.likely]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: list[Placed], texts: TokenTexts) -> dict[str, Any]:
    """`logprobs` of a choice of the completions API; the chosen token is always among the likely ones."""
    top: list[dict[str, float]] = []
    for token in tokens:
        likely: dict[str, float] = {}
        for other, logprob in token.chosen.likely:
            likely.setdefault(texts[other].text, logprob)
        likely.setdefault(token.text.text, token.chosen.logprob)
        top.append(likely)
    return {
        "tokens": [token.text.text for token in tokens],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "top_logprobs": top,
        "text_offset": [token.offset for token in tokens],
    }
