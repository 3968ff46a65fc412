"""A model of several ranks behind one that is asked: every call of its forward is made by all of them.

The first rank generates as one process would, and tells the others each call before it makes it. They hold a cache of
attention for each one that the first has, which their own calls fill with what is theirs; what is done to a cache
between two calls, as beams do, is told too. So is a task that is no forward, such as a reload of the weights.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from transformers import Cache

from ..errors import QuantloadError, RankError, UnsupportedCheckpointError

logger = logging.getLogger("quantload")

T = TypeVar("T")
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


class _Forward(NamedTuple):
    """A forward with these arguments; the caches of the numbers in `gone` are needed no longer."""

    kwargs: dict[str, Any]
    gone: list[int]


class _Change(NamedTuple):
    """What is done to a cache between forwards."""

    number: int
    method: str
    args: tuple[Any, ...]


class _Task(NamedTuple):
    """What all ranks do at the same time."""

    asked: Any


_Told = _Forward | _Change | _Task | None
_CHANGES = ("reorder_cache", "crop")
"""Methods that `generate` calls on a cache."""


def check_can_follow(model: Any) -> None:
    """Raise `UnsupportedCheckpointError` for a model that does more between its forwards than one rank can say."""
    if model.config.is_encoder_decoder or model.device.type != "cpu":
        what = "is on a GPU" if model.device.type != "cpu" else "has an encoder"
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

    def together(self, asked: Any, own: Callable[[], T]) -> T:
        """What `own` returns, while the other ranks do what they make of `asked`."""
        with self._lock:
            self._check_same_point()
            _tell(_Task(asked))
            return own()

    def _check_same_point(self) -> None:
        if self._failure is not None:
            raise RankError(f"the ranks are no longer at the same point: {self._failure}; start them again")

    def _lead(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError("the forward of a model of several ranks takes its arguments by name")
        with self._lock:
            self._check_same_point()
            gone = [self._gone.popleft() for _ in range(len(self._gone))]
            new: list[Cache] = []
            said = {name: self._said(name, value, new) for name, value in kwargs.items() if name not in PASSED_ON}
            _tell(_Forward(said, gone))
            for cache in new:  # now that it was told as it is
                self._follow_changes(cache)
            return self._run(lambda: self._forward(**kwargs))

    def _run(self, work: Callable[[], T]) -> T:
        """What the others do, too; where it fails here, the ranks are no longer at the same point."""
        try:
            return work()
        except BaseException as error:
            self._failure = str(error) or type(error).__name__
            raise

    def _follow_changes(self, cache: Cache) -> None:
        """Have a cache tell what is done to it; it must not hold itself that way, as nobody would count it as gone."""
        for method in _CHANGES:
            if hasattr(cache, method):
                setattr(cache, method, functools.partial(self._change, weakref.ref(cache), method))

    def _change(self, reference: weakref.ref[Cache], method: str, *args: Any) -> None:
        cache = reference()
        assert cache is not None
        with self._lock:
            self._check_same_point()
            _tell(_Change(self._numbers[cache], method, args))
            self._run(lambda: getattr(type(cache), method)(cache, *args))

    def _said(self, name: str, value: Any, new: list[Cache]) -> Any:
        if not isinstance(value, Cache):
            if not _is_plain(value):
                raise RankError(f"a {type(value).__name__}, given as {name}, cannot be told to the other ranks")
            return value
        number = self._numbers.get(value)
        if number is not None:
            return _CacheNumber(number)
        self._known += 1
        self._numbers[value] = self._known
        new.append(value)
        weakref.finalize(value, self._gone.append, self._known)
        return value


def follow(model: Any, do: Callable[[Any], None]) -> None:
    """Make every call that the first rank makes, and `do` what else it asks, until it stops.

    Raises `RankError` where that is gone. A `QuantloadError` of what else it asks is logged: the first rank has one
    too, and answers with it.
    """
    check_can_follow(model)
    caches: dict[int, Cache] = {}
    known = 0
    with torch.inference_mode():
        while (told := _hear()) is not None:
            if isinstance(told, _Task):
                try:
                    do(told.asked)
                except QuantloadError as error:
                    logger.error("What rank 0 asked of this rank failed: %s", error)
                continue
            if isinstance(told, _Change):
                getattr(caches[told.number], told.method)(*told.args)
                continue
            kwargs, gone = told
            for number in gone:
                caches.pop(number, None)
            for name, value in kwargs.items():
                if isinstance(value, _CacheNumber):
                    kwargs[name] = caches[value]
                elif isinstance(value, Cache):
                    known += 1
                    caches[known] = value
            model(**kwargs)


def _tell(told: _Told) -> None:
    dist.broadcast_object_list([told], src=0)


def _hear() -> _Told:
    heard: list[_Told] = [None]
    try:
        dist.broadcast_object_list(heard, src=0)
    except RuntimeError as error:
        raise RankError(f"rank 0 is not there any more: {error}") from error
    return heard[0]
