"""Checkpoint tensors that nobody has read: engines slice, chunk and transpose them, and copy what they want of them.

A `LazyTensor` is `Coordinates` with an `Origin`: it knows which elements of which source it stands for. Copied into a
tensor, what it stands for is written there by its origin, and nothing else is read. Copied into a meta tensor inside of
`capturing`, the copy is noted for who wants to know where it goes. What is no movement of elements makes it real: it is
read whole and counted, and from then on it is that tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import RouteError
from ..geometry.spans import Span
from ..model.boxes import Box
from ..model.coordinates import MOVEMENTS, QUESTIONS, Coordinates, NotExpressible
from ..online.as_stored import StoredCodesLoader
from ..online.weight_loader import OnlineWeightLoader

EngineSink = OnlineWeightLoader | StoredCodesLoader
"""The closure of a weight in a layer of an engine."""

_state = threading.local()
_realizing = threading.RLock()
"""Held while a lazy tensor is made real, so that several threads get one."""


class Origin(Protocol):
    """Where the elements of lazy tensors come from."""

    def write(self, target: Tensor, source: LazyTensor) -> None:
        """Bring what `source` stands for into `target` now; it has the same shape, and any strides and dtype."""

    def read(self, source: LazyTensor, why: str) -> Tensor:
        """What `source` stands for, as a tensor; `why` says which operation needs it."""

    def deliver(self, source: int, span: Span, sink: EngineSink) -> None:
        """Bring a span of source number `source` to a closure, before the `flush` of who made the lazy tensors."""


class Copy(NamedTuple):
    """A copy into a meta tensor: which part of it, and what belongs there."""

    target: Tensor
    source: LazyTensor


class LazyTensor(Coordinates):
    """A tensor on the CPU, for all who ask, whose elements are still where its origin has them."""

    origin: Origin
    wrap: Callable[[Tensor], LazyTensor]
    """Makes a lazy tensor of one in memory."""
    owned: bool
    """Whether what changes it in place changes nothing else: a source as it was handed out, or a copy of one."""
    _real: Tensor | None

    @classmethod
    def of_source(
        cls,
        origin: Origin,
        source: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        wrap: Callable[[Tensor], LazyTensor],
        strides: tuple[int, ...] | None = None,
    ) -> LazyTensor:
        """All of source number `source` of an origin."""
        tensor = cls.of(source, shape, dtype, strides)
        tensor.origin, tensor.wrap, tensor.owned, tensor._real = origin, wrap, True, None
        return tensor

    @property
    def is_real(self) -> bool:
        """Whether it was read, and may have been changed since."""
        return self._real is not None

    def moved(self, shape: Sequence[int], boxes: list[Box]) -> LazyTensor:
        return self._derived(shape, self.dtype, boxes)

    def _derived(
        self, shape: Sequence[int], dtype: torch.dtype, boxes: list[Box], *, owned: bool = False
    ) -> LazyTensor:
        tensor = type(self).build(shape, dtype, boxes)
        tensor.origin, tensor.wrap, tensor.owned, tensor._real = self.origin, self.wrap, owned, None
        return tensor

    def part(self, index: Any) -> LazyTensor:
        """`self[index]`, for an index of numbers, slices and None."""
        part: LazyTensor = MOVEMENTS["__getitem__"](self, index)
        return part

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({list(self.shape)}, {self.dtype}, {len(self.boxes)} boxes)"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _name(func)
        first = args[0] if args else None
        if isinstance(first, LazyTensor) and first._real is None:
            answer = _ANSWERS.get(name)
            if answer is not None:
                return answer(first)
            if name in QUESTIONS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
            if name not in _SEVERAL:
                moved = _moved(name, args, kwargs or {})
                if moved is not NotImplemented:
                    return moved
        return _operate(func, name, args, kwargs or {})


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, lazy or not, without asking it as a user would."""
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(tensor.shape)


@contextmanager
def capturing() -> Iterator[list[Copy]]:
    """Meanwhile, copies of lazy tensors into meta tensors in this thread are noted in the list, in their order.

    What operations make of lazy tensors is lazy, too, whatever they do, so that no copy is missed.
    """
    before, _state.captured = _captured(), []
    try:
        yield _state.captured
    finally:
        _state.captured = before


def deposit(target: Tensor, source: LazyTensor) -> None:
    """`target.copy_(source)`, with what `copy_` broadcasts; notes it instead where `target` is meta and captured."""
    shape, have = shape_of(target), shape_of(source)
    if shape != have:
        if len(shape) > len(have) and shape == (1,) * (len(shape) - len(have)) + have:
            source = source.part((None,) * (len(shape) - len(have)))
        else:
            torch.empty(have, device="meta").expand(shape)  # torch says it, where it cannot be broadcast
            source = source.wrap(_realized(source, "copy_ that broadcasts").expand(shape))
    captured = _captured()
    if source._real is not None:
        source = source.wrap(source._real)
    if not target.is_meta:
        source.origin.write(target, source)
    elif captured is None:  # who only counts what would be copied
        target.copy_(torch.empty(shape, dtype=source.dtype, device="meta"))
    else:
        captured.append(Copy(target, source))


def _captured() -> list[Copy] | None:
    captured: list[Copy] | None = getattr(_state, "captured", None)
    return captured


def _name(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = func.__self__.__name__  # type: ignore[attr-defined]  # the property's own name
    return name


def _operate(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry an operation out: a copy, a movement of elements, or on real tensors."""
    source = _copied(name, args)
    if source is not None:
        target = args[0] if name == "copy_" else args[0][args[1]]
        deposit(target, source)
        return args[0] if name == "copy_" else None
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    lazy = [each for each in tensors if isinstance(each, LazyTensor)]
    if name in _SEVERAL and lazy and all(each._real is None and each.origin is lazy[0].origin for each in lazy):
        if name in _LIKE_ANOTHER:
            args = (args[0], torch.empty(shape_of(args[1]), device="meta"))
        if len(lazy) == len(tensors) or (name in _LIKE_ANOTHER and isinstance(args[0], LazyTensor)):
            moved = _moved(name, args, kwargs)
            if moved is not NotImplemented:
                return moved
    return _carry_out(func, name, args, kwargs, lazy)


def _copied(name: str, args: tuple[Any, ...]) -> LazyTensor | None:
    """The lazy tensor that is copied into a part of one which is not, if an operation is that."""
    if name == "copy_" and len(args) > 1:
        target, source = args[:2]
    elif name == "__setitem__" and _makes_a_view(args[1]):
        target, _, source = args
    else:
        return None
    return source if isinstance(source, LazyTensor) and not isinstance(target, LazyTensor) else None


def _makes_a_view(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(each is None or each is Ellipsis or type(each) in (int, slice) for each in items)


def _moved(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a movement gives; `NotImplemented` for an operation that is none."""
    handler = _CASTS.get(name) or MOVEMENTS.get(name)
    if handler is None:
        return NotImplemented
    try:
        with torch._C.DisableTorchFunctionSubclass():  # what they ask of the tensor needs no answer of ours
            return handler(*args, **kwargs)
    except NotExpressible:
        return NotImplemented


def _carry_out(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], lazy: list[LazyTensor]
) -> Any:
    """An operation on real tensors."""
    changed = args[0] if args and isinstance(args[0], LazyTensor) and _changes(name) else None
    if changed is not None and not changed.owned:
        raise RouteError(
            f"{name} would change a part of a checkpoint tensor in place, which nobody has read; change a clone of it"
        )
    real = _shapes_alone if name in _MAKING else _realized
    real_args, real_kwargs = tree_map(
        lambda each: real(each, name) if isinstance(each, LazyTensor) else each, (args, kwargs)
    )
    if name in _MAKING:
        real_kwargs.setdefault("device", torch.device("cpu"))
    result = func(*real_args, **real_kwargs)
    if changed is not None:
        return _checked(changed, name)
    if _captured() is None or not lazy:
        return result
    wrap = lazy[0].wrap
    return tree_map(lambda each: wrap(each) if isinstance(each, Tensor) and not each.is_meta else each, result)


def _changes(name: str) -> bool:
    """Whether an operation changes its first tensor."""
    return name in _CHANGING or (name.endswith("_") and not name.endswith("__"))


def _shapes_alone(tensor: LazyTensor, _: str) -> Tensor:
    return torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")


def _checked(tensor: LazyTensor, name: str) -> LazyTensor:
    """A tensor that was changed in place."""
    assert tensor._real is not None
    if tuple(tensor._real.shape) != shape_of(tensor):
        raise RouteError(f"{name} changes the shape of a checkpoint tensor in place; make a view of it")
    return tensor


def _realized(tensor: LazyTensor, why: str) -> Tensor:
    """What a lazy tensor stands for; it is that tensor from now on."""
    with _realizing:
        if tensor._real is None:
            tensor._real = tensor.origin.read(tensor, why)
    return tensor._real


def _to(x: LazyTensor, *args: Any, **kwargs: Any) -> LazyTensor:
    """Another place changes nothing, a wider dtype nothing in the values; what is wanted elsewhere goes there later."""
    dtypes = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.dtype)]
    for value in args:
        if isinstance(value, Tensor):
            dtypes.append(value.dtype)
    if any(str(each) == "meta" for each in (*args, *kwargs.values()) if isinstance(each, (str, torch.device))):
        raise NotExpressible("to meta")
    return _cast(x, dtypes[0]) if dtypes else x


def _cast(x: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    if dtype == x.dtype:
        return x
    if dtype not in _WIDER.get(x.dtype, ()):
        raise NotExpressible("a conversion that rounds is no movement of elements")
    return x._derived(shape_of(x), dtype, x.boxes)


_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""Dtypes that hold every value of another: what is written from there is what was written from it."""


def _type(x: LazyTensor, dtype: Any = None, **_: Any) -> LazyTensor:
    if not isinstance(dtype, torch.dtype):
        raise NotExpressible("a name of a type")
    return _cast(x, dtype)


def _same(x: LazyTensor, *_: Any, **__: Any) -> LazyTensor:
    return x


def _clone(x: LazyTensor, **_: Any) -> LazyTensor:
    return x._derived(shape_of(x), x.dtype, x.boxes, owned=True)


def _joined(name: str) -> Callable[..., LazyTensor]:
    def join(tensors: Sequence[LazyTensor], *args: Any, **kwargs: Any) -> LazyTensor:
        return _clone(MOVEMENTS[name](tensors, *args, **kwargs))

    return join


_CASTS: dict[str, Callable[..., Any]] = {
    "to": _to,
    "type": _type,
    "float": lambda x: _cast(x, torch.float32),
    "double": lambda x: _cast(x, torch.float64),
    "bfloat16": lambda x: _cast(x, torch.bfloat16),
    "half": lambda x: _cast(x, torch.float16),
    **dict.fromkeys(("cpu", "cuda", "pin_memory", "data", "requires_grad_", "detach", "contiguous"), _same),
    "clone": _clone,
    **{name: _joined(name) for name in ("cat", "concat", "concatenate", "stack")},
    "__iter__": lambda x: iter(MOVEMENTS["unbind"](x)),
}
_LIKE_ANOTHER = frozenset({"view_as", "reshape_as"})
"""Movements whose second tensor says a shape and no more."""
_SEVERAL = _LIKE_ANOTHER | {"cat", "concat", "concatenate", "stack", "copy_", "__setitem__"}
"""What is asked of several tensors."""
_MAKING = frozenset(
    {f"{what}_like" for what in ("zeros", "ones", "full", "empty")}
    | {f"new_{what}" for what in ("zeros", "ones", "full", "empty")}
)
"""What makes a new tensor of the shape or dtype of another."""
_CHANGING = frozenset(
    {"__setitem__", "__set__"}
    | {f"__i{what}__" for what in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "pow")}
)
"""Operations that change their first tensor, beside those whose names end so."""
_ANSWERS: dict[str, Callable[[LazyTensor], Any]] = {
    "device": lambda _: torch.device("cpu"),
    "is_meta": lambda _: False,
    "is_cpu": lambda _: True,
    "is_cuda": lambda _: False,
    "grad": lambda _: None,
    "is_pinned": lambda _: False,
    "get_device": lambda _: -1,
    "__format__": repr,
}
"""What a tensor on the CPU says of itself."""
