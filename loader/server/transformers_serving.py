"""The one place that touches transformers' serving modules, whose names are private to transformers.

Used from `transformers.cli.serving`, from 5.16 on: `ChatCompletionHandler` and `CompletionHandler` (request ->
`generate` -> response or SSE stream), `GenerationState` (the thread that runs `generate`, or the continuous batch) and
`ModelManager`. Its `build_server` is left alone: its signature and its routes grow between versions, and most of them
(load, reset, audio) must not exist here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from types import SimpleNamespace
from typing import Any

from starlette.responses import Response
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import (
    CBWorkerDeadError,
    GenerationState,
    Modality,
    _StreamError,
    get_response_template,
)
from transformers.utils.chat_parsing import ResponseParser

from ..model.text_kinds import encodes_text
from .answer_fields import Prompt
from .answers import answer
from .api_errors import ApiError, bad_request
from .batching import Batch, batch_config, batch_tokens, disagreement, say_how_much, why_not_batched
from .embeddings import EmbeddingRequest, Pooling, embed, first_position, told
from .ending import RequestCancelled
from .generation import GuardedManager
from .generation_request import GenerationRequest
from .generation_settings import context_length
from .grammar import Grammars
from .logprobs import TokenTexts
from .messages import has_media
from .off_loop import Workers
from .prompts import CheckedProcessor, check_known_tokens, vocabulary_size
from .size_limits import size_limits

logger = logging.getLogger("quantload")

# The handlers log every request as a warning; uvicorn's access log says the same.
logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)


class LoadedModelManager(ModelManager):  # type: ignore[misc]
    """Holds one model that is already loaded: it never loads another, and never lets go of this one."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        super().__init__(model_timeout=-1)
        self.modality: Modality = ModelManager.get_model_modality(model, processor=processor)
        self.model = model if _answers_are_parsed_rightly(model, processor) else _UnparsedModel(model)
        self.processor = processor
        self.name = name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is, without a revision."""
        return model_id

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return self.modality

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model that is there."""
        return self.model, self.processor

    def _load_model(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this server loads no other model")

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this server loads no other processor")


def _answers_are_parsed_rightly(model: Any, processor: Any) -> bool:
    """Whether transformers' idea of this model's answers fits its chat template.

    Where a tokenizer does not describe the answers (tool calls, reasoning), transformers goes by the model type. A
    Qwen3 trained on another chat format would then have its prompt repeated in front of every answer, because what
    begins an answer of the Qwen3 models never comes in its prompts.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    template = get_response_template(processor, model)
    if template is None or getattr(tokenizer, "response_template", None) is not None:
        return True
    if getattr(tokenizer, "chat_template", None) is None:
        return True
    anchors = template.get("start_anchor") or []
    try:
        prompt = CheckedProcessor(processor).apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
        )
    except ApiError:  # a template with more demands than one greeting: nothing to be learned from it
        return True
    return any(anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors))


def try_response_template(processor: Any) -> None:
    """Parse an answer by what a tokenizer says of answers, if it does; raises whatever is wrong with that."""
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(tokenizer, "response_template", None)
    if template is not None:
        ResponseParser(template, prefix="Hi").feed("Hi")


class _UnparsedModel:
    """A model whose type transformers does not recognize, so that its answers are passed on as plain text."""

    def __init__(self, model: Any) -> None:
        self.real = model
        self.config = SimpleNamespace(model_type=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _PinnedModel:
    """Makes a handler use the one model, under its own name."""

    model_manager: LoadedModelManager
    generation_state: _RequestState

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        manager, ids = self.model_manager, self.generation_state.prompt_ids
        processor: Any = CheckedProcessor(manager.processor) if ids is None else _GivenIds(manager.processor, ids)
        if not self.generation_state.constrained:
            return manager.name, manager.model, processor
        # A grammar begins with the answer: what follows the prompt is no reasoning, and has no marks to be parsed by.
        getattr(processor, "tokenizer", processor).response_template = None
        return manager.name, _UnparsedModel(manager.model), processor


class _GivenIds:
    """A tokenizer that gives the ids that came as the prompt, whatever text it is to encode."""

    def __init__(self, processor: Any, ids: Sequence[int]) -> None:
        self.tokenizer = self
        self._real = getattr(processor, "tokenizer", processor)
        self._ids = list(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, _text: str, return_tensors: str | None = None) -> BatchEncoding:
        fields = {"input_ids": self._ids, "attention_mask": [1] * len(self._ids)}
        if return_tensors is None:
            return BatchEncoding(fields)
        return BatchEncoding({name: [ids] for name, ids in fields.items()}, tensor_type=return_tensors)


class _ChatHandler(_PinnedModel, ChatCompletionHandler):  # type: ignore[misc]
    def _streaming(self, *args: Any, **kwargs: Any) -> Response:
        """As transformers', which parses the prompt first: what a client wrote there may look like half an answer."""
        try:
            response: Response = super()._streaming(*args, **kwargs)
        except (ValueError, KeyError, TypeError) as error:
            raise bad_request(
                f"the messages end in what looks like an answer and is none: {error}", "messages"
            ) from error
        return response


class _CompletionHandler(_PinnedModel, CompletionHandler):  # type: ignore[misc]
    pass


class _RequestState:
    """`GenerationState` as one request sees it: its managers are guarded by that request."""

    def __init__(self, served: ServedModel, request: GenerationRequest) -> None:
        self._loop = asyncio.get_running_loop()
        self._shared = served.state
        self._served = served
        self._request = request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    @property
    def prompt_ids(self) -> tuple[int, ...] | None:
        """The prompt, if it came as ids."""
        return self._request.prompt_ids

    @property
    def constrained(self) -> bool:
        """Whether the answer keeps to a grammar."""
        return self._request.constraint is not None

    def get_manager(self, model_id: str, use_cb: bool = False) -> GuardedManager:
        return GuardedManager(
            self._served.model,
            self._request,
            alone=self._shared.get_manager(model_id),
            batch=self._served.batch if use_cb else None,
            context=self._served.context,
            stream_error=_StreamError,
            loop=self._loop,
            grammars=self._served.grammars,
        )


class ServedModel:
    """One loaded model behind transformers' handlers.

    Requests run one after the other on one thread, or together in a continuous batch (None: where that can be, see
    `why_not_batched`; `settle_batch` decides). `chat` and `complete` return
    transformers' response: JSON, or an SSE stream that is still running.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        continuous_batching: bool | None = False,
        pooling: Pooling = "mean",
    ) -> None:
        self.name = name
        self.generates = not encodes_text(type(model))
        self.pooling = pooling
        self.model = model
        self.manager = LoadedModelManager(model, processor, name)
        self.context = context_length(model.config)
        if self.context is not None and not self.generates:
            self.context -= first_position(model)
        self._by_default = continuous_batching is None
        if continuous_batching is None:
            continuous_batching = self.generates and self._is_batched_by_default()
        self.batch: Batch | None = None
        self.state = self._generation_state(continuous_batching)
        self._requests: weakref.WeakSet[GenerationRequest] = weakref.WeakSet()
        self._stopping = threading.Event()
        self._settle(processor)
        self.texts = TokenTexts(getattr(processor, "tokenizer", processor))
        self.state.get_manager(name)  # now: threads of several requests could each make one
        self.tokenizer = CheckedProcessor(getattr(processor, "tokenizer", processor))
        self.grammars = Grammars(getattr(processor, "tokenizer", processor), vocabulary_size(model.config))
        self.limits = size_limits(self.context, self.tokenizer, self.manager.modality is not Modality.LLM)
        self.workers = Workers()

    def _is_batched_by_default(self) -> bool:
        why = why_not_batched(self.model, self.manager.modality is Modality.LLM)
        if why is not None:
            logger.info("Requests are generated for one after the other: %s", why)
        return why is None

    def _generation_state(self, batched: bool) -> GenerationState:
        tokens = batch_tokens(self.model, self.context) if batched else None
        state = GenerationState(continuous_batching=batched, cb_config=batch_config(tokens) if batched else None)
        if batched and state.use_continuous_batching(self.model, self.manager.modality):
            self.batch = Batch(state.get_manager(self.name, use_cb=True), self.model, tokens)
            if tokens is not None:
                say_how_much(self.model, tokens)
        return state

    def settle_batch(self, prompt: Sequence[int], request: GenerationRequest) -> None:
        """Answer a completion `request` of that prompt, with log probabilities, in the batch, if it is the default.

        Where that fails, or its tokens are not what the model says alone, requests run one after the other from now on.
        """
        if not self._by_default or self.batch is None:
            return
        try:
            asyncio.run(self._handle(_CompletionHandler, request, "batch-check"))
            why: str | None = "it changes the attention of the model"
            if not self.batch.takes_the_model:
                why = disagreement(self.model, prompt, request.chosen)
        except Exception as error:
            why = f"a batch failed ({error})"
        if why is not None:
            logger.warning("Requests are generated for one after the other: %s", why)
            self.state.shutdown()
            self.batch = None
            self.state = self._generation_state(False)
            self.state.get_manager(self.name)

    @property
    def batches(self) -> bool:
        """Whether requests are generated for together."""
        return bool(self.state.use_continuous_batching(self.model, self.manager.modality))

    async def chat(self, request: GenerationRequest, request_id: str) -> Response:
        """Answer a chat request. Raises `ApiError`."""
        self._check_generates(True)
        if self.manager.modality is Modality.LLM and has_media(request.body["messages"]):
            raise bad_request("this model reads text only; leave out images, video and audio", "messages")
        return await self._answer(_ChatHandler, request, request_id)

    async def complete(self, request: GenerationRequest, request_id: str) -> Response:
        """Answer a completion request. Raises `ApiError`."""
        self._check_generates(True)
        return await self._answer(_CompletionHandler, request, request_id)

    async def embed(self, request: EmbeddingRequest, nbytes: int) -> dict[str, Any]:
        """Answer an embedding request whose JSON had so many bytes. Raises `ApiError`."""
        self._check_generates(False)
        texts = await self.workers.run(lambda: [self._input_ids(one) for one in request.inputs], nbytes)
        manager = self.state.get_manager(self.name)
        vectors = [await manager.async_submit(embed, self.model, ids, self.pooling) for ids in texts]
        return told(vectors, sum(map(len, texts)), request, self.name)

    def _check_generates(self, wanted: bool) -> None:
        if self.generates is not wanted:
            does = "generates text: it answers /v1/completions and /v1/chat/completions" if self.generates else (
                "generates no text: it answers /v1/embeddings"
            )  # fmt: skip
            raise bad_request(f"this model {does}", "model", "unsupported_model")

    def _input_ids(self, text: Prompt) -> list[int]:
        try:
            ids = self.encode(text) if isinstance(text, str) else list(text)
        except ApiError as error:
            raise ApiError(error.status, error.message, param="input", code=error.code) from error
        check_known_tokens(ids, self.model.config, "input")
        if not ids:
            raise bad_request("a text of `input` is empty: it has no tokens", "input")
        if self.context is not None and len(ids) > self.context:
            raise bad_request(
                f"this model's context is {self.context} tokens, and a text of `input` has {len(ids)}",
                "input",
                "context_length_exceeded",
            )
        return ids

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """The token ids of a text, as a completion has them. Raises `ApiError` (400)."""
        self.limits.check({"prompt": text}, self.tokenizer)
        ids: list[int] = self.tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        return ids

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool, variables: dict[str, Any]
    ) -> list[int]:
        """The token ids of a conversation of text, as the model gets them. Raises `ApiError` (400)."""
        if has_media(messages):
            raise bad_request("only text has token ids; leave out images, video and audio", "messages")
        self.limits.check({"messages": messages, "tools": tools, "chat_template_kwargs": variables}, self.tokenizer)
        conversation = _ChatHandler.get_processor_inputs_from_messages(messages, self.manager.modality)
        encoded = CheckedProcessor(self.manager.processor).apply_chat_template(
            conversation, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True,
            **variables,
        )  # fmt: skip
        ids = encoded["input_ids"]
        return list(ids[0] if ids and isinstance(ids[0], list) else ids)

    async def _answer(self, kind: type[Any], request: GenerationRequest, request_id: str) -> Response:
        return await answer(partial(self._handle, kind), request, request_id, self.texts)

    async def _handle(self, kind: type[Any], request: GenerationRequest, request_id: str) -> Response:
        self._requests.add(request)
        if self._stopping.is_set():
            raise ApiError(503, "the server is stopping", code="server_stopping")
        handler = kind(self.manager, _RequestState(self, request))

        async def response() -> Response:
            if request.cancelled.is_set():
                raise RequestCancelled
            if request.stream and getattr(self.tokenizer, "_tokenizer", None) is None:
                raise bad_request(
                    "this model's tokenizer is written in Python, and tells no text before the end: leave out `stream`",
                    "stream",
                    "unsupported_parameter",
                )
            self.limits.check(request.body, self.tokenizer, request.prompt_ids)
            made: Response = await handler.handle_request(dict(request.body), request_id)
            return made

        try:
            return await self.workers.run_coroutine(response(), request.nbytes)
        except CBWorkerDeadError as error:
            raise ApiError(503, str(error), code="worker_dead") from error
        except RequestCancelled as error:
            raise ApiError(503, str(error), code="request_cancelled") from error

    def worker_error(self) -> str | None:
        """Why the continuous batch cannot answer any more, or None while it can."""
        return None if self.state.is_cb_alive() else "the continuous batching worker died; restart the server"

    def stop(self, timeout: float = 5.0) -> None:
        """End every generation and wait until the thread that runs them is idle, `timeout` seconds at most."""
        self._stopping.set()
        self.workers.stop()
        for request in list(self._requests):
            request.cancelled.set()
        self.state.shutdown()
        idle = self.state.get_manager(self.name).submit(lambda: None)
        try:
            idle.result(timeout)
        except FutureTimeoutError:
            logging.getLogger("quantload").warning("a generation did not end within %g s", timeout)

    @staticmethod
    def _settle(processor: Any) -> None:
        """Encode once: it drops a truncation stored in tokenizer.json, which must not happen while a stream decodes."""
        tokenizer = getattr(processor, "tokenizer", processor)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer("")
