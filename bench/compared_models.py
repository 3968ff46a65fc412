"""What makes a quantized model another one than its dequantized self: state, dtypes, the tensors of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Of the largest value of an output: what the order of sums may make, which discrete choices sometimes amplify."""

RIGHT, NO_FORWARD = "right", "no forward"
FAULTS = ("load refused", "state differs", "dtype differs", "forward fails", "values differ", "crashed")


def differs(
    loaded: PreTrainedModel, twin: PreTrainedModel, inputs: dict[str, Any] | None, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """How `loaded`, whose weights are quantized, differs from `twin`, which gets what they stand for.

    `dtype` is that of the checkpoint. The kind of difference (`RIGHT` for none, `NO_FORWARD` where there are no
    `inputs`) and what it is.
    """
    quantized = _adopt(loaded, twin)
    for difference in _state_differences(loaded, twin, quantized):
        return "state differs", difference
    for name, module in twin.named_modules():
        if isinstance(module, PreTrainedModel) and module.dtype != (other := loaded.get_submodule(name)).dtype:
            return "dtype differs", f"{name or 'the model'}: {other.dtype}, in transformers {module.dtype}"
    if inputs is None:
        return NO_FORWARD, ""
    expected = outputs(twin, inputs)
    try:
        found = outputs(loaded, inputs)
    except Exception as error:
        return "forward fails", f"{type(error).__name__}: {error}"
    return _outputs_differ(found, expected, len(quantized), TOLERANCE[dtype])


def _adopt(loaded: nn.Module, twin: nn.Module) -> set[str]:
    """Put what the quantized weights stand for into `twin`; their names, and those of all that comes with them."""
    names = set()
    for name, module in loaded.named_modules():
        if getattr(module, "scheme", None) is None:
            continue
        other = twin.get_submodule(name)
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        theirs = dict(other.named_parameters(recurse=False)) | dict(other.named_buffers(recurse=False))
        for key, parameter in theirs.items():
            if key not in own or hasattr(own[key], "compute_dtype"):  # codes show the dtype that the layer computes in
                parameter.data.copy_(module.dequantize(key).to(parameter.dtype))
                names.add(f"{name}.{key}")
        names |= {f"{name}.{key}" for key in own if key not in theirs}
    return names


def _state_differences(loaded: nn.Module, twin: nn.Module, quantized: set[str]) -> Iterator[str]:
    for kind in ("named_parameters", "named_buffers"):
        found = dict(getattr(loaded, kind)(remove_duplicate=False))
        expected = dict(getattr(twin, kind)(remove_duplicate=False))
        for name in sorted((set(found) ^ set(expected)) - quantized):
            yield f"{name} is only in {'quantload' if name in found else 'transformers'}"
        for name in sorted((set(found) & set(expected)) - quantized):
            ours, theirs = found[name], expected[name]
            if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
                yield f"{name}: {_kind(ours)}, not {_kind(theirs)}"
            elif not torch.equal(_bits(ours), _bits(theirs)):
                yield f"{name}: other values"


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.detach()


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a forward by its place in the output; what it draws at random is the same each time."""
    torch.manual_seed(5)
    return dict(_tensors("", model(**inputs)))


def _tensors(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _tensors(f"{place}.{key}", each)
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _tensors(f"{place}[{number}]", each)


def _outputs_differ(
    found: dict[str, Tensor], expected: dict[str, Tensor], quantized: int, tolerance: float
) -> tuple[str, str]:
    if set(found) != set(expected):
        return "values differ", f"outputs {sorted(set(found) ^ set(expected))}"
    worst, where = 0.0, ""
    for name, theirs in expected.items():
        ours = found[name]
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return "dtype differs", f"{name}: {_kind(ours)}, not {_kind(theirs)}"
        if not theirs.is_floating_point() or not theirs.numel():
            continue
        if not torch.equal(ours.isfinite(), theirs.isfinite()):
            return "values differ", f"{name}: not finite elsewhere"
        finite = theirs.isfinite()
        ours, theirs = ours[finite].float(), theirs[finite].float()
        size = float(theirs.abs().max()) if theirs.numel() else 0.0
        error = float((ours - theirs).abs().max()) / max(size, 1e-6) if theirs.numel() else 0.0
        if error > worst:
            worst, where = error, name
    if worst > tolerance:
        return "values differ", f"{where}: {worst:.2g} of its largest value"
    return RIGHT, f"{worst:.1g}; {quantized} quantized"
