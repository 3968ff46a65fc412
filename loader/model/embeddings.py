"""Embeddings whose table is codes and scales: the rows that are asked for are decoded, and no others."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..schemes.base import LinearScheme
from .quantized import CodedModule


class QuantizedEmbedding(CodedModule):
    """An embedding whose `weight` holds codes [num_embeddings, K] and whose scales are beside it, row by row.

    Which scheme it has is decided as for a linear layer of that shape; the kernel for products has no part in it.
    """

    is_looked_up = True

    def __init__(self, scheme: LinearScheme, num_embeddings: int, embedding_dim: int, padding_idx: int | None) -> None:
        super().__init__(scheme, embedding_dim, num_embeddings)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """`ids`, whole numbers of any shape, to [..., K] in the dtype the model computes in."""
        rows = self.scheme.rows(self, ids.reshape(-1), cast("Tensor", self.weight).dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"


def embedding_objection(module: nn.Embedding) -> str | None:
    """Why an embedding is kept whatever is asked for; `None` if it is nothing but a table."""
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} is an embedding with code of its own"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "this Embedding has hooks or a forward of its own"
    if module.max_norm is not None:
        return "the embedding changes its rows while they are read (max_norm)"
    return None
