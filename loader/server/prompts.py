"""From a request's text to token ids: whatever goes wrong on the way is an answer to the request, never a crash."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import _get_template_variables

from ..tokenizer import chat_templates
from .answer_parsing import parsed_or_text
from .api_errors import ApiError, bad_request

# Configs name the ids that stand in a prompt where features of an image, video or sound go.
PLACEHOLDERS = tuple(f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index"))
TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


class CheckedProcessor:
    """A tokenizer or processor as handlers of requests see it: `ApiError` (400) for text that it cannot make ids of.

    It was tried before the model was loaded (`processors`), so what fails now is about the request. Everything
    but making prompts is passed through.
    """

    def __init__(self, real: Any) -> None:
        self.real = real
        if isinstance(real, ProcessorMixin):
            self.tokenizer = CheckedProcessor(real.tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _answered("the tokenizer", "prompt"):
            return self.real(*args, **kwargs)

    def parse_response(self, response: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The message in an answer's ids; its text where there is none to be found."""
        return parsed_or_text(
            lambda: self.real.parse_response(response, *args, **kwargs),
            lambda: str(self.real.decode(response, skip_special_tokens=True)),
        )

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """The prompt of a conversation; with variables the template does not read left out."""
        templates = chat_templates(self.real)
        if not templates:
            raise bad_request(
                "this model has no chat template, so it has no form for a conversation: use /v1/completions", "messages"
            )
        if isinstance(self.real, ProcessorMixin):  # it would take them for its own arguments, names of files among them
            read = {"num_frames", *inspect.signature(self.real.apply_chat_template).parameters}
            read.update(*map(_get_template_variables, templates))
            kwargs = {name: value for name, value in kwargs.items() if name in read}
        with _answered("the chat template", "messages"):
            return self.real.apply_chat_template(conversation, **kwargs)


@contextmanager
def _answered(what: str, field: str) -> Iterator[None]:
    try:
        yield
    except (ApiError, MemoryError):
        raise
    except TemplateError as error:
        raise bad_request(f"{what} refused the {field}: {error}", field) from error
    except Exception as error:
        raise bad_request(f"{what} cannot use the {field}: {type(error).__name__}: {error}", field) from error
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # where the tokenizers library's panics come from
            raise
        raise bad_request(f"{what} cannot use the {field}: {error}", field) from error


def vocabulary_size(config: Any) -> int | None:
    """The number of tokens a model has embeddings for; None where its config names none."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def check_prompt_ids(inputs: Mapping[str, Any], config: Any, field: str) -> None:
    """Raise `ApiError` (400) for token ids that the model of `config` cannot be given.

    Those are ids beyond its vocabulary (tokenizers may have more), and in a prompt of text alone those that stand for
    an image, video or sound. `inputs["input_ids"]` is a tensor [1, n] or a list of n integers.
    """
    ids = inputs["input_ids"]
    ids = ids.flatten() if isinstance(ids, torch.Tensor) else torch.tensor(ids, dtype=torch.long)
    if not ids.numel():
        return
    size, highest = vocabulary_size(config), int(ids.max())
    if size is not None and (highest >= size or int(ids.min()) < 0):
        raise bad_request(
            f"the {field} has the token {highest}, and this model knows those from 0 to {size - 1}", field
        )
    if TEXT_INPUTS.issuperset(inputs):
        for name in PLACEHOLDERS:
            token = getattr(config, name, None)
            if isinstance(token, int) and bool((ids == token).any()):
                kind = name.partition("_")[0]
                raise bad_request(
                    f"the {field} has the token {token}, which stands for {kind} data, and has none", field
                )


def check_known_tokens(tokens: Collection[int], config: Any, field: str) -> None:
    """Raise `ApiError` (400) where a field of the request has a token id that the model of `config` does not have."""
    size = vocabulary_size(config)
    if size is not None and max(tokens, default=0) >= size:
        raise bad_request(
            f"`{field}` has the token {max(tokens)}, and this model knows those from 0 to {size - 1}", field
        )
