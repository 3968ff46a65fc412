"""A model of several ranks behind one that is asked: every call of its forward is made by all of them.

The first rank generates as one process would, and tells the others each call before it makes it. They hold a cache of
attention for each one that the first has, which their own calls fill with what is theirs.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from transformers import Cache

from ..errors import RankError, UnsupportedCheckpointError

_Call = tuple[dict[str, Any], list[int]]
"""Arguments of a forward, and the numbers of caches that are needed no longer."""


PASSED_ON = frozenset({"tokenizer"})
"""What `generate` hands on to a forward, which makes nothing of it."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype))


class _CacheNumber(int):
    """Stands for a cache that the other ranks know."""


def check_can_follow(model: Any) -> None:
    """Raise `UnsupportedCheckpointError` for a model that does more between its forwards than one rank can say."""
    config = model.generation_config
    beams = (getattr(config, "num_beams", None) or 1) > 1
    if model.config.is_encoder_decoder or beams or model.device.type != "cpu":
        what = "searches with beams" if beams else "is on a GPU" if model.device.type != "cpu" else "has an encoder"
        raise UnsupportedCheckpointError(
            f"this {type(model).__name__} {what}, which cannot be served by several ranks: serve it in one process, or "
            f"with an engine"
        )


class Leader:
    """Tells the other ranks of every forward of `model` until `stop`; used from one thread at a time."""

    def __init__(self, model: Any) -> None:
        check_can_follow(model)
        self._forward = model.forward
        self._numbers: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()
        self._known, self._gone = 0, deque[int]()
        self._lock = threading.Lock()
        self._failure: str | None = None

        @functools.wraps(model.forward)  # `generate` looks at its signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._lead(*args, **kwargs)

        model.forward = forward

    def stop(self) -> None:
        """Let the other ranks go."""
        with self._lock:
            if self._failure is None:
                _tell(None)

    def _lead(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError("the forward of a model of several ranks takes its arguments by name")
        with self._lock:
            if self._failure is not None:
                raise RankError(f"the ranks are no longer at the same point: {self._failure}; start them again")
            gone = [self._gone.popleft() for _ in range(len(self._gone))]
            _tell(({name: self._told(name, value) for name, value in kwargs.items() if name not in PASSED_ON}, gone))
            try:
                return self._forward(**kwargs)
            except BaseException as error:
                self._failure = str(error) or type(error).__name__
                raise

    def _told(self, name: str, value: Any) -> Any:
        if not isinstance(value, Cache):
            if not _is_plain(value):
                raise RankError(f"a {type(value).__name__}, given as {name}, cannot be told to the other ranks")
            return value
        number = self._numbers.get(value)
        if number is not None:
            return _CacheNumber(number)
        self._known += 1
        self._numbers[value] = self._known
        weakref.finalize(value, self._gone.append, self._known)
        return value


def follow(model: Any) -> None:
    """Make every call that the first rank makes, until it stops. Raises `RankError` where that is gone."""
    check_can_follow(model)
    caches: dict[int, Cache] = {}
    known = 0
    with torch.inference_mode():
        while (call := _hear()) is not None:
            kwargs, gone = call
            for number in gone:
                caches.pop(number, None)
            for name, value in kwargs.items():
                if isinstance(value, _CacheNumber):
                    kwargs[name] = caches[value]
                elif isinstance(value, Cache):
                    known += 1
                    caches[known] = value
            model(**kwargs)


def _tell(call: _Call | None) -> None:
    dist.broadcast_object_list([call], src=0)


def _hear() -> _Call | None:
    heard: list[_Call | None] = [None]
    try:
        dist.broadcast_object_list(heard, src=0)
    except RuntimeError as error:
        raise RankError(f"rank 0 is not there any more: {error}") from error
    return heard[0]
