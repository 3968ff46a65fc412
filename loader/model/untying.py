"""A head and an embedding that are tied, one of which an override names: two weights, made from one tensor.

A checkpoint has the tensor once. The weight that it lacks gets an entry of its own in the index, in the same place of
the same file, so that everything behind the index sees a checkpoint whose weights were never tied.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.headers import TensorEntry
from ..checkpoint.index import CheckpointIndex
from ..schemes.base import LinearScheme
from ..schemes.policy import Policy
from ..schemes.rows import why_not_by_rows
from ..schemes.stored.weights import StoredCheckpoint
from .embeddings import embedding_objection
from .linears import Products
from .routes import CheckpointMap

logger = logging.getLogger("quantload")
_FLAG = "tie_word_embeddings"
_SUFFIX = ".weight"


@dataclass(frozen=True)
class Untied:
    """The pair of parameters that were untied, if any, as the class of the model ties them.

    `entries` are the tensors that the checkpoint lacks then, by the names of their parameters, each in the place of the
    other one's.
    """

    ties: Mapping[str, str]
    entries: Mapping[str, TensorEntry]

    def index(self, index: CheckpointIndex) -> CheckpointIndex:
        """The index with a tensor for each of the two."""
        return replace(index, tensors={**index.tensors, **self.entries}) if self.entries else index

    def stored(self, stored: StoredCheckpoint) -> StoredCheckpoint:
        """The tensors with one for each of the two."""
        return replace(stored, plain={**stored.plain, **self.entries}) if self.entries else stored

    def say_so(self, model: Any) -> None:
        """Let the config of a model, whose weights are there, say that they are not tied, for whoever saves it.

        The pair is left on the model as `untied_parameters`, for whoever builds it again.
        """
        if self.ties:
            model.untied_parameters = dict(self.ties)
            for name in ("", *getattr(model.config, "sub_configs", {})):
                config = getattr(model.config, name, None) if name else model.config
                if getattr(config, _FLAG, False) or not name:
                    setattr(config, _FLAG, False)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a `config.json` with the same said in them."""
        if not self.ties:
            return dict(config)
        inner = {
            name: {**value, _FLAG: False}
            for name, value in config.items()
            if isinstance(value, dict) and value.get(_FLAG)
        }
        return {**config, **inner, _FLAG: False}


NOTHING_UNTIED = Untied({}, {})


def untie(model: PreTrainedModel, rules: Policy, stored: StoredCheckpoint, mapped: CheckpointMap) -> Untied:
    """Untie the head and the embedding of `model`, where an override gives one of the two a scheme by its name.

    Done only where they are the one pair that the model ties, both are ordinary layers, and the tensor that both are
    made of is a plain one that arrives as it is: in all other cases they stay tied, and a head says so as its reason.
    `mapped` is the checkpoint as it is with the ties; it is to be mapped again.
    """
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    if len(ties) != 1 or not rules.policy.overrides:
        return NOTHING_UNTIED
    pair = next(iter(ties.items()))
    modules = [name.removesuffix(_SUFFIX) for name in pair if name.endswith(_SUFFIX)]
    layers = [(name, model.get_submodule(name)) for name in modules]
    named = [name for name, layer in layers if _can_follow(layer, rules.scheme_by_name(name))]
    if len(modules) != 2 or not named or any(_objection(layer) for _, layer in layers):
        return NOTHING_UNTIED
    lacking = [name for name in pair if name in mapped.missing]
    entries: dict[str, TensorEntry] = {}
    for name in lacking:
        other = pair[1] if name == pair[0] else pair[0]
        entry = _only_tensor(other, stored, mapped)
        if entry is None:
            return NOTHING_UNTIED
        entries[name] = entry._replace(name=name)
    model.all_tied_weights_keys = {}
    logger.info(
        "%s and %s, which the model ties, are two weights: an override names %s", *pair, " and ".join(sorted(named))
    )
    return Untied(dict(ties), entries)


def _can_follow(layer: nn.Module, scheme: LinearScheme | None) -> bool:
    """Whether a scheme was given, and the layer can have it."""
    by_rows = isinstance(layer, nn.Embedding)
    return scheme is not None and not (by_rows and why_not_by_rows(scheme.kernels.format))


def _objection(module: nn.Module) -> str | None:
    """Why a module is not given a weight of its own."""
    if isinstance(module, nn.Embedding):
        return embedding_objection(module)
    return Products().objection(module) if isinstance(module, nn.Linear) else "it is neither"


def _only_tensor(parameter: str, stored: StoredCheckpoint, mapped: CheckpointMap) -> TensorEntry | None:
    """The one tensor that becomes a parameter as it is, if there is one and it is not stored quantized."""
    found = mapped.coordinates.get(parameter)
    if found is None or found[1].converter is not None:
        return None
    names = found[1].names()
    return stored.plain.get(names[0]) if len(names) == 1 else None
