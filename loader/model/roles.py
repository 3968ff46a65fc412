"""What a linear layer is for: router or gate, output head, embedding (these are kept by default), or anything else.

What the model says of itself decides first: the layers that `get_output_embeddings` returns. Names decide where they
have one meaning. For all others the class is asked: built once more on meta with twice as many classes (or experts) in
its config, it gives exactly its heads (or routers) another width. A layer that merely happens to be as wide as the
vocabulary keeps its width then.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError
from ..schemes.policy import HEAD, ROUTER, name_reason
from . import config_checks, transformers_api

logger = logging.getLogger("quantload")

FEW_OUTPUTS = 4
"""So few outputs are mostly a score or a gate (of two classes, of a box, of one shared expert); they weigh nothing."""

MOST_MORE = 4
"""How many times as many modules and parameters a model of more classes or experts may have; it needs no more."""

# How configs call the numbers of classes that a head tells apart, and the numbers of experts a router chooses from.
CLASSES = re.compile(
    r"(?:(?!type_|shape_|pronunciation_|hash_|ngram_)(?:\w+_)?vocab(?:_size)?|(?:\w+_)?codebook_size|num_embeddings"
    r"|num_(?!mel_)(?:\w+_)?(?:labels|classes|bins|verbalizers)|(?:head_)?out_channels)"
)
EXPERTS = re.compile(r"(?:num|n|moe_num|num_local|n_routed|num_routed|zero)_experts?(?:_num)?")
LABELS = "num_labels"

Widths = Mapping[str, int]


def roles(model: PreTrainedModel) -> dict[str, str]:
    """By the names of linear layers: why each is kept by default; the others are missing."""
    return _Roles(model).reasons


class _Roles:
    """The roles of the linear layers of one model, which has none replaced yet."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._linears = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
        }
        self._widths = {name: _width(module) for name, module in self._linears.items()}
        self._most_modules = MOST_MORE * (len(list(model.modules())) + len(list(model.parameters())) + 1000)
        heads = transformers_api.output_heads(model)
        self.reasons = {
            name: reason
            for name, module in self._linears.items()
            if (reason := HEAD if id(module) in heads else self._told(name)) is not None
        }
        self._ask_for_routers()
        self._ask_for_heads()

    def _told(self, name: str) -> str | None:
        """What name and size say."""
        reason = name_reason(name)
        if reason == ROUTER and not self._is_router_by_name(name):
            reason = None
        if reason == HEAD and self._is_repeated(name):
            reason = None
        if reason is None and 0 < self._widths[name] <= FEW_OUTPUTS:
            return f"only {self._widths[name]} output{'s' if self._widths[name] > 1 else ''}"
        return reason

    def _is_router_by_name(self, name: str) -> bool:
        """Whether what is called a gate chooses between experts; `router` has no other meaning."""
        *path, last = name.split(".")
        if last not in ("gate", "gating"):
            return True
        blocks = (
            self._model.get_submodule(".".join(path[:depth])) for depth in (len(path), len(path) - 1) if depth > 0
        )
        return any("expert" in child for block in blocks for child, _ in block.named_children())

    def _is_repeated(self, name: str) -> bool:
        """Whether a layer lies in one of several blocks of a list, and is not itself an element of the list."""
        path = name.split(".")
        return any(
            part.isdigit() and isinstance(self._model.get_submodule(".".join(path[:depth])), nn.ModuleList)
            for depth, part in enumerate(path[:-1])
        )

    def _ask_for_routers(self) -> None:
        counts = _counts(self._model.config, EXPERTS)
        values = {value for values in counts.values() for value in values}
        possible = [
            name
            for name, width in self._widths.items()
            if name not in self.reasons and any(value <= width <= 2 * value for value in values)
        ]
        self._ask(counts, possible, ROUTER, lambda name: self._is_router_by_name(f"{name}.gate"))

    def _ask_for_heads(self) -> None:
        counts = _counts(self._model.config, CLASSES)
        values = {value for values in counts.values() for value in values}
        possible = [
            name
            for name, width in self._widths.items()
            if name not in self.reasons and (width in values or not self._is_repeated(name))
        ]
        inputs = {int(module.weight.numel()) // max(1, _width(module)) for module in self._linears.values()}
        self._ask(counts, possible, HEAD, lambda name: not self._is_repeated(name) or self._widths[name] not in inputs)

    def _ask(
        self, counts: Mapping[str, set[int]], possible: Iterable[str], reason: str, stands_there: Callable[[str], bool]
    ) -> None:
        """Give `possible` layers the `reason` if their width follows the numbers in the config that `counts` names.

        Where the class cannot be built with another number, it is the width that decides, for layers that stand where
        such a layer does.
        """
        undecided = set(possible)
        if not undecided or not counts:
            return
        for keys in (tuple(counts), *((key,) for key in counts)):
            widths = self._widths_with(keys)
            if widths is not None:
                found = {name for name in undecided if widths.get(name, self._widths[name]) != self._widths[name]}
            elif len(keys) == 1:
                found = {name for name in undecided if self._widths[name] in counts[keys[0]] and stands_there(name)}
            else:
                continue
            self.reasons.update(dict.fromkeys(found, reason))
            if len(keys) == len(counts):
                return

    def _widths_with(self, doubled: Iterable[str]) -> Widths | None:
        """Widths in a model whose config has twice these numbers; `None` if its class does not take it."""
        config = copy.deepcopy(self._model.config)
        for each in _configs(config):
            for key in doubled:
                value = _count(each, key)
                if key == LABELS and value is not None:
                    each.num_labels = 2 * value
                elif value is not None:
                    vars(each)[key] = 2 * value  # not by setattr, which checks a config that is half changed
        try:
            with config_checks.modules_limited(self._most_modules, Path(str(config.name_or_path))):
                other = transformers_api.rebuilt(self._model, config)
        except CheckpointError as error:
            logger.debug("cannot ask %s for its heads: %s", type(self._model).__name__, error)
            return None
        return {
            name: _width(module) for name, module in other.named_modules() if isinstance(module, nn.Linear | Conv1D)
        }


def _width(module: Any) -> int:
    return int(module.weight.shape[1] if isinstance(module, Conv1D) else module.weight.shape[0])


def _configs(config: Any) -> Iterator[Any]:
    """A config and all in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _count(config: Any, key: str) -> int | None:
    value = len(config.id2label) if key == LABELS and getattr(config, "id2label", None) else vars(config).get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 1 else None


def _counts(config: Any, pattern: re.Pattern[str]) -> dict[str, set[int]]:
    """The numbers in a config and in those within it whose keys fit the pattern."""
    found: dict[str, set[int]] = {}
    for each in _configs(config):
        keys = [*vars(each), LABELS]
        for key in keys:
            value = _count(each, key) if pattern.fullmatch(key) else None
            if value is not None:
                found.setdefault(key, set()).add(value)
    return found
