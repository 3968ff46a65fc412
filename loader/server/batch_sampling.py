"""Answers of a continuous batch, each with the sampling that its request asks for.

transformers' scheduler computes the logits of all requests of a batch in one pass, and takes the most likely token of
each row. Between the two stands `PerRequestSampling`: every request chooses its token by itself, with the logits
processors that `generate` would have used for it, a generator of its own, its grammar and its ends; what it has chosen
is the most likely token of its row when the scheduler looks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from .ending import Ending, RequestCancelled


class BatchedAnswer:
    """What one request does with its row of the logits; `error` is why it ended before its time, if it did."""

    def __init__(
        self,
        model: Any,
        config: GenerationConfig,
        prompt: Sequence[int],
        processors: LogitsProcessorList,
        ending: Ending,
        seed: int | None,
    ) -> None:
        """`config` is that of the request, `processors` are those that it needs besides what `config` says."""
        self.error: Exception | None = None
        self._ending = ending
        self._limit = config.max_new_tokens
        prepared, _ = model._prepare_generation_config(copy.deepcopy(config))
        model._prepare_special_tokens(prepared, True, device=model.device)
        ids = torch.tensor([[*prompt]], device=model.device)
        self._processors = model._get_logits_processor(
            prepared, input_ids_seq_length=len(prompt), encoder_input_ids=ids, logits_processor=processors,
            device=str(model.device), model_kwargs={},
        )  # fmt: skip
        self._samples = bool(prepared.do_sample)
        self._generator = torch.Generator(model.device)
        self._generator.manual_seed(self._generator.seed() if seed is None else seed)
        self._ids = torch.cat((ids, ids.new_zeros(1, self._limit)), dim=1) if len(self._processors) else ids
        self._length = len(prompt)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether nothing but the logits decides, and nobody asks how likely they were."""
        return not (self._samples or len(self._processors) or self._ending.notes)

    def choose(self, logits: Tensor) -> int:
        """The next token by its row [vocabulary] of the logits, in float32."""
        if self._ending.notes is not None:
            self._ending.notes.see(logits)
        scores = logits[None]
        if len(self._processors):
            scores = self._processors(self._ids[:, : self._length], scores.clone())
        if not self._samples:
            return int(scores.argmax(-1))
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def take(self, token: int) -> bool:
        """Note the token that was chosen; whether it is the last one."""
        if len(self._processors):
            self._ids[0, self._length] = token
        self._length += 1
        return self._ending.note(token)


class PerRequestSampling(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """Stands where a continuous batch has its logits processors.

    Answers are kept for as long as whoever waits for them holds them; a request without one ends with its next token.
    """

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._answers: WeakValueDictionary[str, BatchedAnswer] = WeakValueDictionary()
        self._rows: list[Any] = []

    def add(self, request_id: str, answer: BatchedAnswer) -> None:
        """Let a request that will be queued choose its tokens so."""
        self._answers[request_id] = answer

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        """Called before a pass with the requests in it: those that get a token are the rows of its logits, in order."""
        self._rows = [each.state for each in requests_in_batch if each.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """`scores` [rows, vocabulary] with one token in every row that is more likely than all others."""
        likeliest = scores.argmax(-1).tolist()
        for row, state in enumerate(self._rows):
            answer = self._answers.get(state.request_id)
            if answer is None:
                _end(state, RequestCancelled())
            elif answer.error is None:
                self._choose(answer, state, scores[row], likeliest[row])
        return scores

    @staticmethod
    def _choose(answer: BatchedAnswer, state: Any, scores: Tensor, likeliest: int) -> None:
        """Let one request choose; whatever goes wrong with it ends it alone, not the others of the batch."""
        try:
            token = likeliest
            if not answer.takes_the_likeliest:
                token = answer.choose(scores)
                scores.fill_(-torch.inf)
                scores[token] = 0
            ended = answer.take(token)
        except Exception as error:
            answer.error = error
            _end(state, error)
        else:
            if ended:
                _end(state)


def _end(state: Any, error: Exception | None = None) -> None:
    """Let the token that comes now be the last one of a request."""
    if error is not None:
        state.error = str(error) or type(error).__name__
    state._new_tokens_limit = state.generated_len() + 1


def plain_config(config: GenerationConfig) -> GenerationConfig:
    """What a batch begins with: the model's ends, and nothing that decides about tokens."""
    return GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id,
        max_new_tokens=1024, do_sample=False,
    )  # fmt: skip
