"""Parameters that hold codes or scales: bytes that only kernels may read as numbers.

Code that is written for a layer with weights asks a weight for its dtype, to cast what it computes to it; and some of
it multiplies with the weight, where the layer is meant to be called. The first must be told the dtype the layer
computes in, and the second would get garbage: so it is refused. Kernels take `OpaqueParameter.tensor`, the same bytes
in an ordinary tensor, and pay nothing for this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import QuantizedWeightError

Apply = Callable[[Tensor], Tensor]

# What is said of a tensor's place, shape and bookkeeping, not of its elements. `dtype` is answered otherwise.
_VALUES = frozenset({"T", "H", "mT", "mH", "real", "imag", "dtype", "data", "grad_dtype"})
_DESCRIBED_BY = frozenset(
    {
        "__dir__", "_is_view", "_is_zerotensor", "dim", "element_size", "get_device", "is_complex", "is_conj",
        "is_contiguous", "is_inference", "is_neg", "is_pinned", "is_shared", "is_signed", "ndimension", "nelement",
        "numel", "register_hook", "requires_grad_", "share_memory_", "size", "storage_offset", "stride",
        "untyped_storage",
    }
)  # fmt: skip
_ATTRIBUTES: Mapping[str, Any] = vars(torch._C.TensorBase)
_DTYPE = _ATTRIBUTES["dtype"].__get__
_DATA, _SET_DATA = _ATTRIBUTES["data"].__get__, _ATTRIBUTES["data"].__set__
_SETTERS = (_ATTRIBUTES["grad"].__set__, _ATTRIBUTES["requires_grad"].__set__)


def _descriptions() -> frozenset[Any]:
    told = (each for name, each in _ATTRIBUTES.items() if hasattr(type(each), "__set__") and name not in _VALUES)
    getters = {each.__get__ for each in told}
    methods = {getattr(Tensor, name) for name in _DESCRIBED_BY if hasattr(Tensor, name)}
    return frozenset({*getters, *methods, *_SETTERS})


class OpaqueParameter(nn.Parameter):
    """Codes or scales as a parameter: it has their shape, device and bytes, and `.dtype` is the dtype of computing.

    `tensor` is the ordinary tensor behind it, of the dtype the codes have. Whatever would use the elements as numbers
    raises `QuantizedWeightError`; it can be moved, copied, pickled and shared.
    """

    tensor: Tensor
    compute_dtype: torch.dtype
    module_name: str
    """The module it belongs to, and its name there, for messages; empty where nobody told."""
    key: str

    def __new__(cls, data: Tensor, requires_grad: bool = False, compute_dtype: torch.dtype | None = None) -> Self:
        """Around `data`, whose bytes it shares; `compute_dtype` is torch's default dtype unless it is given."""
        tensor = plain(data).detach()
        self: Self = Tensor._make_subclass(cls, tensor, requires_grad)
        self.tensor = tensor
        self.compute_dtype = torch.get_default_dtype() if compute_dtype is None else compute_dtype
        self.module_name = self.key = ""
        return self

    def stands_for(self, module_name: str, key: str, compute_dtype: torch.dtype) -> None:
        """Say which module it belongs to, under which name, and the dtype that module computes in."""
        self.module_name, self.key, self.compute_dtype = module_name, key, compute_dtype

    def around(self, tensor: Tensor) -> Self:
        """The same parameter with other bytes; what was attached to it, such as `weight_loader`, moves over."""
        other = type(self)(tensor, self.requires_grad)
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name != "tensor"})
        return other

    def applied(self, fn: Apply) -> Self:
        """What `nn.Module._apply` makes of a parameter: bytes move, and keep their dtype whatever `fn` casts to."""
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        empty = fn(self.tensor.new_empty(0))
        moved = self.tensor.to(empty.device) if empty.dtype != self.tensor.dtype else fn(self.tensor)
        if moved is self.tensor:
            return self
        if not torch._has_compatible_shallow_copy_type(self.tensor, moved):
            return self.around(moved)
        self.data = moved
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__} computing in {self.compute_dtype}, of\n{self.tensor!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) not in memo:
            copied = type(self)(self.tensor.clone(), self.requires_grad)
            copied.stands_for(self.module_name, self.key, self.compute_dtype)
            memo[id(self)] = copied
        found: Self = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.tensor, self.requires_grad, dict(self.__dict__, tensor=None))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func == _DTYPE:
            return args[0].compute_dtype
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        special = _SPECIAL.get(func)
        if special is not None:
            return special(func, args, kwargs or {})
        raise refusal(args, kwargs or {}, func)


_DESCRIPTIONS = _descriptions()


def plain(tensor: Tensor) -> Tensor:
    """The ordinary tensor of a parameter, opaque or not."""
    return tensor.tensor if type(tensor) is OpaqueParameter else tensor


def replaced(
    name: str, format_name: str, found: Sequence[torch.dtype], wanted: Sequence[torch.dtype]
) -> QuantizedWeightError:
    """The error for a layer whose codes or scales were exchanged for numbers of another dtype."""
    return QuantizedWeightError(
        f"{name!r} of a layer in {format_name} holds {_listed(found)} where codes and scales are {_listed(wanted)}: "
        f"other numbers were put there, as when accelerate offloads a module or a state dict is cast; load the model "
        f"anew, and move it with .to() only"
    )


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def refusal(args: Sequence[Any], kwargs: Mapping[str, Any], func: Any) -> QuantizedWeightError:
    """The error for code that hands an opaque parameter to `func`, by the module it belongs to."""
    parameter = next((each for each in _flat((*args, *kwargs.values())) if type(each) is OpaqueParameter), None)
    module = "" if parameter is None else parameter.module_name
    name = f"{module}.{parameter.key}" if parameter is not None and module else "a quantized weight"
    advice = f"--ignore {pattern_of(module)!r}" if module else "--ignore and its name"
    return QuantizedWeightError(
        f"{name} holds codes of a quantized weight, and code that calls {_called(func)} with it takes them for "
        f"numbers: the layer can only be called. Keep it as stored with {advice} (`ignore` of QuantizationPolicy), or "
        f"take the values from dequantize() of the layer, the codes from state_dict()"
    )


def pattern_of(module_name: str) -> str:
    """A pattern for this module in all layers of a model."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module_name)


def _called(func: Any) -> str:
    owner = getattr(func, "__self__", None)
    name = getattr(func, "__name__", repr(func))
    return f"Tensor.{owner.__name__}" if name in ("__get__", "__set__") and owner is not None else name


def _flat(values: Sequence[Any]) -> Sequence[Any]:
    return [part for each in values for part in (each if isinstance(each, (list, tuple)) else (each,))]


def _rebuilt(cls: type[OpaqueParameter], tensor: Tensor, requires_grad: bool, state: dict[str, Any]) -> OpaqueParameter:
    parameter = cls(tensor, requires_grad)
    parameter.__dict__.update({name: value for name, value in state.items() if name != "tensor"})
    return parameter


# Calls that ask for no number, and are answered otherwise than for an ordinary tensor


def _alias(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OpaqueParameter:
    """`.data` and `.detach()`: the same bytes, and no more to be read."""
    parameter: OpaqueParameter = args[0]
    return parameter.around(parameter.tensor)


def _set_data(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    parameter, tensor = args[0], plain(args[1])
    if tensor.dtype != parameter.tensor.dtype:
        raise refusal(args, kwargs, func)
    with torch._C.DisableTorchFunctionSubclass():
        func(parameter, tensor)
    parameter.tensor = tensor.detach()


def _moved(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`.to()` a device, `.cpu()`, `.cuda()`, `.clone()`; or of an ordinary tensor to the dtype and device of this."""
    if type(args[0]) is not OpaqueParameter:
        return func(args[0], *_stand_ins(args[1:]), **{key: _stand_in(value) for key, value in kwargs.items()})
    if any(isinstance(each, (torch.dtype, Tensor)) for each in (*args[1:], *kwargs.values())):
        raise refusal(args, kwargs, func)
    parameter: OpaqueParameter = args[0]
    return parameter.around(func(parameter.tensor, *args[1:], **kwargs))


def _by_example(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`.new_zeros()` and the like, `x.type_as(weight)`: what matters of the parameter is its dtype and device."""
    return func(*_stand_ins(args), **kwargs)


def _is_floating_point(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    parameter: OpaqueParameter = args[0]
    return parameter.compute_dtype.is_floating_point


def _stand_ins(values: Sequence[Any]) -> list[Any]:
    return [_stand_in(each) for each in values]


def _stand_in(value: Any) -> Any:
    """An empty tensor of the dtype and device that an opaque parameter shows."""
    if type(value) is not OpaqueParameter:
        return value
    return torch.empty(0, dtype=value.compute_dtype, device=value.tensor.device)


_SPECIAL: dict[Any, Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]] = {
    _DATA: _alias,
    Tensor.detach: _alias,
    _SET_DATA: _set_data,
    Tensor.is_floating_point: _is_floating_point,
    torch.is_floating_point: _is_floating_point,
    **dict.fromkeys((Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.clone, torch.clone), _moved),
    **dict.fromkeys(
        (
            Tensor.type_as, Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros,
        ),
        _by_example,
    ),
}  # fmt: skip
