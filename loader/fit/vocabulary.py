"""The output head and the embedding: `--fit-head` lets `--fit` choose schemes for them, which are kept otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..draft import Draft
from ..options import QuantizationPolicy
from ..schemes.policy import matches

HEAD, EMBEDDING, BOTH = "head", "embedding", "head and embedding"


@dataclass(frozen=True)
class Vocabulary:
    """The modules that schemes are chosen for by name; `is_tied` where the checkpoint has one tensor for the two."""

    head: str | None = None
    embedding: str | None = None
    is_tied: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in (self.head, self.embedding) if name is not None)

    def groups(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Kinds, and the modules that get one scheme together: a tied pair is stored once, or quantized twice."""
        if self.is_tied:
            yield BOTH, self.names
            return
        for kind, name in ((HEAD, self.head), (EMBEDDING, self.embedding)):
            if name is not None:
                yield kind, (name,)


NO_VOCABULARY = Vocabulary()


def vocabulary_of(draft: Draft, policy: QuantizationPolicy) -> Vocabulary:
    """The head and the embedding that the model of a draft says it has, but for those that a policy names."""
    model: Any = draft.model
    named = {id(module): name for name, module in model.named_modules()}
    given = [*policy.ignore, *(pattern for pattern, _ in policy.overrides)]

    def name_of(module: Any) -> str | None:
        name = named.get(id(module))
        return None if name is None or any(matches(pattern, name) for pattern in given) else name

    return Vocabulary(name_of(model.get_output_embeddings()), name_of(model.get_input_embeddings()))


def as_planned(draft: Draft, wanted: Vocabulary) -> Vocabulary:
    """Of those that an override names in the policy of a draft, the ones that it gives a scheme."""
    quantized = {each.name for each in draft.assignments if each.scheme is not None}
    head, embedding = (name if name in quantized else None for name in (wanted.head, wanted.embedding))
    is_tied = bool(draft.untied.ties)
    return NO_VOCABULARY if is_tied and None in (head, embedding) else Vocabulary(head, embedding, is_tied)
