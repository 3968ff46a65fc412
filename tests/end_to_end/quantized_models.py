"""What the end-to-end tests measure on a quantized model, without asking quantload how it would."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from architectures import ROUTERS, Architecture, Inputs, is_experts, logits, quantizable_modules, reference
from quantload.schemes.base import LinearScheme, MoEScheme
from quantload.schemes.opaque import plain
from torch import Tensor, nn
from transformers import PreTrainedModel

Routing = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def relative_error(got: Tensor, want: Tensor) -> float:
    """L2 norm of the difference over that of `want`."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


class Quantized(nn.Module):
    """A type only: what tests ask of any quantized module; the last two are of experts, and of static scales."""

    scheme: LinearScheme | MoEScheme
    dequantize: Callable[..., Tensor]
    is_transposed: bool
    input_scale: Tensor


def quantized_modules(model: nn.Module) -> dict[str, Quantized]:
    """The modules that carry a scheme, by name."""
    found = {name: module for name, module in model.named_modules() if getattr(module, "scheme", None) is not None}
    return cast("dict[str, Quantized]", found)


def weight_names(module: nn.Module) -> list[str]:
    """Names of the weights of an unquantized linear or experts module that a scheme would quantize."""
    if not is_experts(module):
        return ["weight"]
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]


def must_be_quantized(
    model: PreTrainedModel, architecture: Architecture, linears: bool = True
) -> tuple[set[str], set[str]]:
    """Names that have to be quantized and names that must not be, found from transformers' own model."""
    head = model.get_output_embeddings()
    required, forbidden = set(), set()
    for name, module in quantizable_modules(model):
        if module is head or re.search(ROUTERS, name) or not (linears or is_experts(module)):
            forbidden.add(name)
        elif not (architecture.kept and re.search(architecture.kept, name)):
            required.add(name)
    return required, forbidden


@torch.no_grad()
def overwrite(model: PreTrainedModel, quantized: PreTrainedModel) -> PreTrainedModel:
    """Give `model` the weights that the codes of `quantized` stand for."""
    for name, module in quantized_modules(quantized).items():
        target = model.get_submodule(name)
        for weight_name in weight_names(target):
            weight = target.get_parameter(weight_name)
            values = module.dequantize(weight_name)
            assert values.dtype == torch.float32, name
            assert values.shape == weight.shape, name
            weight.copy_(values)
    return model


@torch.no_grad()
def module_errors(quantized: PreTrainedModel, overwritten: PreTrainedModel, inputs: Inputs) -> dict[str, float]:
    """Relative error of every quantized module alone, on the inputs that its unquantized twin sees."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls[name] = args, kwargs, output.clone()  # some models add to it in place

        return hook

    modules = quantized_modules(quantized)
    handles = [
        overwritten.get_submodule(name).register_forward_hook(record(name), with_kwargs=True) for name in modules
    ]
    logits(overwritten, inputs)
    for handle in handles:
        handle.remove()
    errors: dict[str, float] = {}
    for name, (args, kwargs, want) in calls.items():
        got = modules[name](*args, **kwargs)
        assert got.shape == want.shape, name
        assert got.dtype == want.dtype, name
        errors[name] = relative_error(got, want)
    return errors


@contextmanager
def recorded(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Note what every experts module of `model` is told beside its hidden states: whom to send them to."""

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routing[name] = args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}

        return hook

    with hooked(model, record):
        yield


@contextmanager
def replayed(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Tell every experts module of `model` what was recorded, in the dtypes it would have been told itself."""

    def replace(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            positional, named = routing[name]
            given = [like(old, new) for old, new in zip(args[1:], positional, strict=True)]
            return (*args[:1], *given), {**kwargs, **{key: like(kwargs[key], new) for key, new in named.items()}}

        return hook

    with hooked(model, replace):
        yield


def like(old: Any, new: Any) -> Any:
    """`new` in the dtype of `old`."""
    return new.to(old.dtype) if isinstance(new, Tensor) else new


@contextmanager
def hooked(model: nn.Module, hook_for: Callable[[str], Any]) -> Iterator[None]:
    """Run a forward pre-hook on every experts module, quantized or not."""
    experts = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in experts]
    yield
    for handle in handles:
        handle.remove()


def assert_logits_match(quantized: PreTrainedModel, path: Path, architecture: Architecture) -> None:
    """The quantized model computes what the model with its dequantized weights computes, to rounding.

    Two levels. Every module alone, on equal inputs: both outputs are rounded once to the activations' dtype, so they
    differ by about a third of its epsilon in the L2 norm; experts round their intermediate and every share as well.
    Then the whole model: through layers, softmaxes and routers BF16's own rounding grows to 1 or 2 percent, so the
    yardstick is what that rounding does to the overwritten model, measured against the same model in float32. The
    quantized one may be at most twice as far from the float32 logits. All three send their tokens to the experts that
    the float32 model chose: the last bit of a router's input would otherwise decide between two that are as good.
    """
    inputs = architecture.inputs()
    overwritten = overwrite(reference(path, architecture), quantized)
    exact = overwrite(reference(path, architecture, dtype=torch.float32), quantized)
    epsilon = torch.finfo(architecture.dtype).eps
    for name, error in module_errors(quantized, overwritten, inputs).items():
        allowed = (2 if is_experts(overwritten.get_submodule(name)) else 0.75) * epsilon + 2e-6
        assert error < allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
    routing: Routing = {}
    with recorded(exact, routing):
        want = logits(exact, inputs)
    with replayed(overwritten, routing):
        rounding = relative_error(logits(overwritten, inputs), want)
    with replayed(quantized, routing):
        got = logits(quantized, inputs)
    assert torch.isfinite(got).all()
    error = relative_error(got, want)
    assert error <= 2 * rounding + 2e-5, f"relative error {error:.2e}; BF16 rounding alone {rounding:.2e}"


def final_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each piece of memory counted once."""
    tensors = [plain(tensor) for tensor in (*model.parameters(), *model.buffers())]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors if t.numel()}.values())


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer as bytes: codes, scales and kept weights."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: plain(t).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in named}
