"""Where an answer ends: at a stop string, with its grammar, at an end token, or when nobody wants it any more."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from .generation_request import GenerationRequest
from .grammar import GrammarProcessor
from .logprobs import LogprobNotes
from .stop_strings import first_stop


class RequestCancelled(Exception):
    """The answer is not wanted any more: its client hung up, or the server is stopping."""

    def __init__(self) -> None:
        super().__init__("cancelled, because the client hung up or the server is stopping")


class Ending:
    """Follows the tokens of one answer.

    Where the text ended by itself on the very last token allowed, it takes the limit off the handler's copy of the
    configuration, because the handler reads "length" out of the number of tokens alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: GenerationConfig,
        request: GenerationRequest,
        notes: LogprobNotes | None,
        grammar: GrammarProcessor | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.request = request
        self.notes = notes
        self.grammar = grammar
        eos = config.eos_token_id
        self._eos = set(eos) if isinstance(eos, list) else {eos}
        # A token has at least one byte, so a stop string lies within as many tokens; four more for partial characters.
        self._tail = max((len(stop.encode()) for stop in request.stop), default=0) + 4
        self._recent: list[int] = []

    def note(self, token: int, recent: list[int] | None = None, count: int = 1) -> bool:
        """Whether the answer ends with `token`, other than by an end token, which whoever generates sees itself.

        `recent` are the tokens up to it, where they are not those that were noted, as with beams; `count` is how many
        were generated. Raises `RequestCancelled`.
        """
        if self.request.cancelled.is_set():
            raise RequestCancelled
        self.request.usage.generate(count)
        if self.notes is not None:
            self.notes.note(token)
        ended, done = token in self._eos, False
        if self.grammar is not None:
            self.grammar.note(token)
            done = self.grammar.ended
        if self.request.stop and not done:
            self._recent = ([*self._recent, token] if recent is None else recent)[-self._tail :]
            text = self.tokenizer.decode(self._recent, skip_special_tokens=True)
            done = first_stop(text, self.request.stop) is not None
        if ended or done:
            self.config.max_new_tokens = None
        return done
