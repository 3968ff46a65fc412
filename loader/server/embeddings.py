"""`/v1/embeddings`: one vector for each text, from models that encode text and generate none."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .answer_fields import Prompt, read_prompts
from .api_errors import bad_request
from .generation_request import checked_fields

Pooling = Literal["mean", "cls", "last"]
EMBEDDING_FIELDS = frozenset({"model", "input", "encoding_format", "dimensions", "user"})
_POOLINGS: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
}  # fmt: skip


@dataclass(frozen=True)
class EmbeddingRequest:
    """Texts, or ids of their tokens, and whether vectors are told in base64 (little-endian float32)."""

    inputs: tuple[Prompt, ...]
    as_base64: bool


def parse_embedding(body: object, model_name: str) -> EmbeddingRequest:
    """A request to `/v1/embeddings`. Raises `ApiError` (400, or 404 for another model)."""
    fields = checked_fields(body, model_name, EMBEDDING_FIELDS)
    form = fields.get("encoding_format")
    if form not in (None, "float", "base64"):
        raise bad_request("`encoding_format` must be float or base64", "encoding_format")
    if fields.get("dimensions") is not None:
        raise bad_request(
            "`dimensions` is not supported: a vector has all that the model gives",
            "dimensions",
            "unsupported_parameter",
        )
    return EmbeddingRequest(read_prompts(fields.get("input"), "input"), form == "base64")


def stored_pooling(folder: Path) -> Pooling | None:
    """How sentence-transformers would pool the vectors of this checkpoint; None where it does not say.

    Raises `ValueError` for a way that is not known here.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    wanted = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    if len(wanted) != 1 or wanted[0] not in _POOLINGS:
        raise ValueError(f"{path} pools by {', '.join(wanted) or 'nothing'}; known are {', '.join(_POOLINGS)}")
    return _POOLINGS[wanted[0]]


def first_position(model: Any) -> int:
    """How many of a model's positions no token can have: RoBERTa's begin behind the one for padding."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


@torch.inference_mode()
def embed(model: Any, ids: list[int], pooling: Pooling) -> list[float]:
    """The vector of one text, of length 1: its last hidden states [tokens, width], pooled."""
    inputs = torch.tensor([ids], device=model.device)
    states: Tensor = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state[0].float()
    pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    vector: list[float] = torch.nn.functional.normalize(pooled, dim=0).tolist()
    return vector


def told(vectors: list[list[float]], tokens: int, request: EmbeddingRequest, model_name: str) -> dict[str, Any]:
    """The answer in OpenAI's shape."""

    def written(vector: list[float]) -> list[float] | str:
        if not request.as_base64:
            return vector
        return base64.b64encode(torch.tensor(vector).numpy().astype("<f4").tobytes()).decode()

    data = [
        {"object": "embedding", "index": index, "embedding": written(vector)} for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model_name, "usage": usage}
