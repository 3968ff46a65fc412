"""The modules a quantized model is made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import UnsupportedCheckpointError
from ..schemes.base import LinearScheme, MoEScheme
from ..schemes.opaque import OpaqueParameter

Apply = Callable[[Tensor], Tensor]


def apply_keeping_codes(module: Any, fn: Apply, recurse: bool = True) -> Any:
    """`nn.Module._apply` for a module with a scheme: codes and scales move, and keep their dtype.

    What is behind `.to()`, `.half()` and `.cuda()`: FP8 codes and float32 scales are no numbers to be rounded.
    """
    held: dict[str, Any] = module._parameters
    opaque = dict(_opaque(module))
    try:
        held.update(dict.fromkeys(opaque))  # in their places, and passed over
        nn.Module._apply(module, fn, recurse)
    finally:
        held.update(opaque)
    held.update({name: parameter.applied(fn) for name, parameter in opaque.items()})
    return module


def save_codes(module: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """`nn.Module._save_to_state_dict` for a module with a scheme: a state dict has codes and scales as they are."""
    nn.Module._save_to_state_dict(module, destination, prefix, keep_vars)
    if not keep_vars:
        destination.update({f"{prefix}{name}": parameter.tensor.detach() for name, parameter in _opaque(module)})


def load_codes(module: Any, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """`nn.Module._load_from_state_dict` for a module with a scheme: the other way."""
    held: dict[str, Any] = module._parameters
    opaque = dict(_opaque(module))
    try:
        held.update({name: nn.Parameter(each.tensor, requires_grad=False) for name, each in opaque.items()})
        nn.Module._load_from_state_dict(module, state_dict, prefix, *args)
    finally:
        for name, parameter in opaque.items():
            same = held[name].data_ptr() == parameter.tensor.data_ptr() and held[name].device == parameter.tensor.device
            held[name] = parameter if same else parameter.around(held[name].data)


def _opaque(module: nn.Module) -> list[tuple[str, OpaqueParameter]]:
    return [(name, each) for name, each in module._parameters.items() if type(each) is OpaqueParameter]


def make_opaque(module: Any) -> None:
    """Let no code take the codes and scales of a module with a scheme for numbers."""
    for name in module.scheme.kept_exactly(module):
        module._parameters[name] = OpaqueParameter(module._parameters[name])


def say_what_codes_stand_for(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Tell codes and scales of a module its name in the model, for messages, and the dtype it computes in."""
    for key, parameter in _opaque(module):
        parameter.stands_for(name, key, dtype)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of a model that have a scheme, with their names."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "scheme"))


class GivenMethod:
    """A method that one module has and its class has not.

    Unlike a bound method it does not keep its module alive, and goes where the module goes when that is copied or
    pickled.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self._function = function
        self._module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._module(), *args, **kwargs)

    def __reduce__(self) -> tuple[type[GivenMethod], tuple[Any, ...]]:
        return GivenMethod, (self._function, self._module())


def refuse_to_save(model: nn.Module, *_: Any, **__: Any) -> None:
    """Stands for `save_pretrained`, whose folder nothing could read: no config would say what the codes mean."""
    raise UnsupportedCheckpointError(
        f"this {type(model).__name__} is quantized, and its codes are no checkpoint; write one from the original with "
        f"quantload.convert_checkpoint or `quantload convert`, load it with transformers' from_pretrained and a "
        f"quantload.QuantloadConfig, whose models can be saved, or store the codes with "
        f"torch.save(model.state_dict(), path)"
    )


class CodedModule(nn.Module):
    """A module whose one weight [rows, columns] is codes and scales.

    `weight` holds the codes and `weight_scale` the scales, canonical [N, K], which nothing but the scheme may use as
    numbers (`OpaqueParameter`). `transposed` says that the module it stands for keeps its weight as [K, N], which
    `dequantize` gives back.
    """

    transposed = False

    def __init__(self, scheme: LinearScheme, columns: int, rows: int) -> None:
        super().__init__()
        self.scheme = scheme
        scheme.create_weights(self, shards=(("", rows),), in_features=columns)
        make_opaque(self)

    def reset_parameters(self) -> None:
        """Keep everything: some classes ask this of a part in `_init_weights`, where only what is missing is made."""

    def dequantize(self, name: str = "weight") -> Tensor:
        """The float32 values the codes stand for: [N, K], or [K, N] where the module it stands for has that."""
        weight = self.scheme.dequantize(self, name)
        return weight.T if self.transposed else weight

    def _apply(self, fn: Apply, recurse: bool = True) -> Self:
        applied: Self = apply_keeping_codes(self, fn, recurse)
        return applied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        save_codes(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        load_codes(self, state_dict, prefix, *args)


class QuantizedLinear(CodedModule):
    """A linear layer (or GPT-2 `Conv1D`) whose weight is codes and scales; `bias` [N] is as stored."""

    def __init__(
        self, scheme: LinearScheme, in_features: int, out_features: int, bias: nn.Parameter | None, transposed: bool
    ) -> None:
        super().__init__(scheme, in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., K] to [..., N], in the dtype of `x`."""
        return self.scheme.apply(self, x, self._parameters["bias"])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scheme={self.scheme.name}"


def quantize_experts(module: Any, scheme: MoEScheme) -> None:
    """Turn a fused experts module, in place, into one that holds codes and scales.

    It keeps its class, its biases and its gate; whoever calls this also routes its forward to the scheme. Weights
    [E, N, K] (or [E, K, N] where `is_transposed`) become canonical codes [E, N, ...] under the same name, and
    `<name>_scale`.
    """
    sizes: dict[str, Any] = {}
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        _, rows, columns = module._parameters[name].shape
        if module.is_transposed:
            rows, columns = columns, rows
        sizes[name] = (_shards(module, name, rows), columns)
    module.num_experts = int(module._parameters["down_proj"].shape[0])
    scheme.create_weights(module, num_experts=module.num_experts, **sizes)
    module.scheme = scheme
    make_opaque(module)
    module.dequantize = GivenMethod(_dequantize, module)
    module._apply = GivenMethod(apply_keeping_codes, module)
    module._save_to_state_dict = GivenMethod(save_codes, module)
    module._load_from_state_dict = GivenMethod(load_codes, module)


def _dequantize(module: Any, name: str = "gate_up_proj") -> Tensor:
    """The float32 values an experts weight stands for, shaped as in the unquantized module."""
    scheme: MoEScheme = module.scheme
    return scheme.dequantize(module, name)


def _shards(module: Any, name: str, rows: int) -> tuple[tuple[str, int], ...]:
    if name == "gate_up_proj" and module.is_concatenated:
        return ("w1", rows // 2), ("w3", rows // 2)
    return (("w13" if name == "gate_up_proj" else "w2" if name == "down_proj" else "w3", rows),)
