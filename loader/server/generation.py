"""One generation: the request's numbers put on transformers' `generate`, and ways to end it early.

transformers' serving handlers decide how a request becomes a `generate` call and run all calls of one model on one
thread, in order of arrival. This module stands between the two: it sees every call before it is queued
(`GuardedManager`) and when its turn comes (`_WatchedModel`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..model.text_kinds import is_encoder_decoder
from ..shortage import NO_MEMORY, Shortage, named
from .answer_parsing import ForgivingParser
from .api_errors import ApiError, bad_request, out_of_memory
from .batch_sampling import BatchedAnswer
from .batching import Batch
from .ending import Ending, RequestCancelled
from .generation_request import GenerationRequest
from .generation_settings import apply_end_tokens, apply_request, fit_context
from .grammar import GrammarProcessor, Grammars
from .logprobs import LogprobNotes
from .off_loop import OnLoop, on_loop
from .prompts import check_known_tokens, check_prompt_ids
from .stop_strings import StopMatcher, first_stop


class GenerationFailed(Exception):
    """`generate` raised while its text was being streamed; the message is that of the error, `refusal` a client's."""

    def __init__(self, message: str, refusal: ApiError | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal


class GuardedManager:
    """Stands in front of one of transformers' generation managers, for one request.

    `model` is what generates, whatever stands for it on the way here; `context` is its limit in tokens. Prompts that
    do not fit are refused before they are queued. Its methods are called from a thread of `Workers`; what needs the
    event loop is done there. With a `batch` the request is generated for together with others, unless it is longer
    than what that has room for: then it is generated for alone, by the manager `alone`.
    """

    def __init__(
        self,
        model: Any,
        request: GenerationRequest,
        *,
        alone: Any,
        batch: Batch | None,
        context: int | None,
        stream_error: type[Any],
        grammars: Grammars,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loop = loop
        self.alone = alone
        self.batch = batch
        self.model = model
        self.request = request
        self.context = context
        self.stream_error = stream_error
        self.grammars = grammars

    def init_cb(self, _model: Any, _config: GenerationConfig) -> None:
        """Start the continuous batch (once)."""
        assert self.batch is not None
        on_loop(self.loop, self.batch.start)

    def generate_streaming(
        self, _model: Any, processor: Any, inputs: Mapping[str, Any], config: GenerationConfig, **rest: Any
    ) -> tuple[CheckedQueue, Any]:
        """Queue a generation whose text comes piece by piece."""
        prepared = self._prepare(processor, inputs, config, rest["request_id"])
        if (config.num_beams or 1) > 1:
            raise bad_request(
                "this model's generation config searches with beams, which have no text before the end: leave out "
                "`stream`",
                "stream",
                "unsupported_parameter",
            )
        if rest.get("response_parser") is not None:
            rest["response_parser"] = ForgivingParser(rest["response_parser"])
        queue, streamer = on_loop(
            self.loop,
            lambda: prepared.manager.generate_streaming(prepared.model, processor, prepared.inputs, config, **rest),
        )
        return CheckedQueue(queue, StopMatcher(self.request.stop), self.stream_error, prepared.refusal), streamer

    async def generate_non_streaming(
        self, _model: Any, processor: Any, inputs: Mapping[str, Any], config: GenerationConfig, **rest: Any
    ) -> tuple[str, int, Any]:
        """Queue a generation and wait for the whole of it: text, tokens of the prompt, generated ids."""
        prepared = self._prepare(processor, inputs, config, rest["request_id"])
        generating = prepared.manager.generate_non_streaming(prepared.model, processor, prepared.inputs, config, **rest)
        try:
            text, prompt_tokens, ids = await OnLoop(self.loop, generating)
        except Exception as error:
            cause = prepared.cause()
            if cause is None or cause is error:
                raise
            raise cause from error
        return text[: first_stop(text, self.request.stop)], prompt_tokens, ids

    def _prepare(
        self, processor: Any, inputs: Mapping[str, Any], config: GenerationConfig, request_id: str
    ) -> _Prepared:
        ids = inputs["input_ids"]
        count = len(ids) if isinstance(ids, list) else ids.shape[-1]
        fit_context(config, self.request, count, self.context, is_encoder_decoder(self.model.config))
        check_prompt_ids(inputs, self.model.config, self.request.prompt_field)
        check_known_tokens(self.request.logit_bias, self.model.config, "logit_bias")
        check_known_tokens(self.request.stop_token_ids, self.model.config, "stop_token_ids")
        self.request.usage.queue(0 if self.request.again else count)
        apply_end_tokens(config, self.request)
        apply_request(config, self.request)
        if self.request.logprobs is not None and (config.num_beams or 1) > 1:
            raise bad_request(
                "`logprobs` are not to be had from this model: its generation config searches with beams", "logprobs"
            )
        constraint = self.request.constraint
        grammar = None if constraint is None else self.grammars.processor(constraint, config)
        tokenizer = getattr(processor, "tokenizer", processor)
        if self.batch is not None and self.batch.has_room_for(count + config.max_new_tokens):
            return self._together(tokenizer, ids, config, grammar, request_id, inputs)
        watched = _WatchedModel(self.model, tokenizer, config, self.request, grammar)
        if self.batch is not None:  # it was prepared for a batch
            config.use_cache = True
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, count, dtype=torch.long)}
            inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return _Prepared(self.alone, watched, inputs, lambda: watched.refusal, lambda: None)

    def _together(
        self,
        tokenizer: Any,
        ids: Sequence[int],
        config: GenerationConfig,
        grammar: GrammarProcessor | None,
        request_id: str,
        inputs: Mapping[str, Any],
    ) -> _Prepared:
        assert self.batch is not None
        ending = Ending(tokenizer, config, self.request, _notes(self.request), grammar)
        processors = _processors(self.request, grammar)
        answer = BatchedAnswer(self.model, config, ids, processors, ending, self.request.seed)
        self.batch.sampling.add(request_id, answer)
        refusal = lambda: answer.error if isinstance(answer.error, ApiError) else None  # noqa: E731
        return _Prepared(self.batch.manager, self.model, inputs, refusal, lambda: answer.error)


class _Prepared(NamedTuple):
    """A generation that is to be queued: who runs it, on what, and why it failed, if it did."""

    manager: Any
    model: Any
    inputs: Mapping[str, Any]
    refusal: Callable[[], ApiError | None]
    cause: Callable[[], Exception | None]


class CheckedQueue:
    """A streamer's queue as the handlers read it: text ends at a stop string, and an error is raised.

    The handlers would write an error into the stream as if it were valid JSON.
    """

    def __init__(
        self,
        inner: asyncio.Queue[Any],
        matcher: StopMatcher,
        stream_error: type[Any],
        refusal: Callable[[], ApiError | None] | None = None,
    ) -> None:
        self._refusal = refusal or (lambda: None)
        self._inner = inner
        self._matcher = matcher
        self._stream_error = stream_error
        self._ready: deque[Any] = deque()

    async def get(self) -> Any:
        """The next piece of text or other event; None at the end. Raises `GenerationFailed`."""
        while not self._ready:
            self._take(await self._inner.get())
        return self._pop()

    def get_nowait(self) -> Any:
        """As `get`, but raises `asyncio.QueueEmpty` instead of waiting; an error waits for `get`."""
        while not self._ready:
            self._take(self._inner.get_nowait())
        if isinstance(self._ready[0], GenerationFailed):
            raise asyncio.QueueEmpty
        return self._pop()

    def _pop(self) -> Any:
        item = self._ready.popleft()
        if isinstance(item, GenerationFailed):
            raise item
        return item

    def _take(self, item: Any) -> None:
        if type(item) is str:  # not its subclasses: reasoning is no part of the answer's text
            text = self._matcher.feed(item)
            self._ready.extend([text] if text else [])
            return
        held = self._matcher.flush()
        self._ready.extend([held] if held else [])
        failed = isinstance(item, self._stream_error)
        self._ready.append(GenerationFailed(item.msg, self._refusal()) if failed else item)


class _WatchedModel:
    """The model as one request sees it: everything passes through but `generate`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: GenerationConfig,
        request: GenerationRequest,
        grammar: GrammarProcessor | None,
    ) -> None:
        self._grammar = grammar
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._request = request
        self.refusal: ApiError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        """Run when the request's turn has come, on the thread that runs all of them."""
        request = self._request
        if request.cancelled.is_set():
            raise RequestCancelled
        request.usage.begin()
        if request.seed is not None:
            torch.manual_seed(request.seed)
        notes = _notes(request)
        watch = _Watch(Ending(self._tokenizer, self._config, request, notes, self._grammar))
        what = named(f"an answer of up to {self._config.max_new_tokens} tokens to this request")
        with what, nullcontext() if notes is None else notes.watching(self._model):
            try:
                sequences = self._model.generate(
                    **kwargs,
                    logits_processor=_processors(request, self._grammar),
                    stopping_criteria=StoppingCriteriaList([watch]),
                )
            except ApiError as error:
                self.refusal = error
                raise
        return behind_the_prompt(sequences, kwargs["input_ids"], watch.answer_begins)


def _notes(request: GenerationRequest) -> LogprobNotes | None:
    return None if request.logprobs is None else LogprobNotes(request.logprobs, request.chosen)


def _processors(request: GenerationRequest, grammar: GrammarProcessor | None) -> LogitsProcessorList:
    """What a request wants done to logits that no generation config can say."""
    processors = LogitsProcessorList()
    if request.frequency_penalty or request.presence_penalty:
        processors.append(CountPenalty(request.frequency_penalty, request.presence_penalty))
    if grammar is not None:
        processors.append(grammar)
    return processors


def behind_the_prompt(sequences: Any, prompt: Tensor, answer_begins: int | None) -> Tensor:
    """What was generated behind the ids of the prompt [1, n], where the handlers expect it.

    `sequences` [1, m] are what `generate` returned. A model with an encoder, or with a language model of its own that
    was given embeddings, does not begin them with the prompt but with `answer_begins` ids of its own. Raises
    `TypeError` where they are no ids.
    """
    if not isinstance(sequences, Tensor) or sequences.dim() != 2 or sequences.is_floating_point():
        raise TypeError(f"{type(sequences).__name__} came out of `generate`, where token ids [1, n] are expected")
    count = prompt.shape[-1]
    if answer_begins in (None, count) and torch.equal(sequences[:, :count], prompt.to(sequences)):
        return sequences
    return torch.cat((prompt.to(sequences), sequences[:, answer_begins or 0 :]), dim=-1)


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation of `generate` where its `Ending` does.

    `answer_begins` is the number of ids before the first one that was generated, known with that.
    """

    def __init__(self, ending: Ending) -> None:
        self.ending = ending
        self.answer_begins: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.answer_begins is None:
            self.answer_begins = input_ids.shape[-1] - 1
        beams = input_ids.shape[0]
        recent = None if beams == 1 else input_ids[0, self.answer_begins :].tolist()
        done = self.ending.note(int(input_ids[0, -1]), recent, beams)
        return torch.full((beams,), done, dtype=torch.bool, device=input_ids.device)


class CountPenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's frequency and presence penalties: `logit -= frequency * count + presence * (count > 0)`.

    `count` is how often a token was generated so far; what is there at the first call, the prompt, does not count. The
    formula is that of OpenAI's API reference.
    """

    def __init__(self, frequency: float, presence: float) -> None:
        self.prompt_tokens: int | None = None
        self.frequency = frequency
        self.presence = presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt_tokens is None:
            self.prompt_tokens = input_ids.shape[-1]
        generated = input_ids[:, self.prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0).to(scores.dtype)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about a generation that failed on its way."""
    if isinstance(error, GenerationFailed) and error.refusal is not None:
        return error.refusal
    if isinstance(error, Shortage) or str(error).startswith(NO_MEMORY):  # of one that streams, its text is all there is
        return out_of_memory(str(error))
    return ApiError(500, f"generation failed: {error}", code="generation_failed")
