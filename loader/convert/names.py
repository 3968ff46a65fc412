"""What the modules of a written checkpoint are called in its config: as in the files, and as in the model.

The two differ where transformers renames what it loads: `language_model.lm_head` in the files of a LLaVA is `lm_head`
in its model. Tools look for different ones: transformers with compressed-tensors or Quark for the modules of the model
it has built, quantload for those of the files, vLLM for its own, into which it translates either. A config has both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from ..errors import PolicyError
from ..kernels.formats import WeightFormat
from ..model.experts import is_fused_experts
from ..model.routes import Routes
from ..model.transformers_api import output_heads
from ..schemes.exported.weights import NamedModules
from ..schemes.policy import name_reason
from ..schemes.stored.quantload import EXPERT_NUMBER, alike
from .tensors import KeptTensor, QuantizedTensor

_SUFFIX = ".weight"


def name_modules(model: nn.Module, planned: Sequence[QuantizedTensor | KeptTensor], routes: Routes) -> NamedModules:
    """The modules that are quantized, and those a tool must not take for quantized.

    The latter are linear layers that are kept, and whatever else has a matrix called `weight` without being an
    embedding: routers are linear layers to some tools. Raises `PolicyError` where one module is called in the files
    what another one is called in the model, unless both are quantized alike.
    """
    quantized = [tensor for tensor in planned if isinstance(tensor, QuantizedTensor)]
    found: dict[str, WeightFormat | None] = dict.fromkeys(_kept(model, planned, routes))
    of_the_model, heads = output_heads(model), dict[str, None]()
    for tensor in quantized:
        fmt = tensor.layout.format
        for name in _names(tensor.module, _modules(routes, tensor.entry.name)):
            if found.setdefault(name, fmt) is not fmt:
                raise _ambiguous(name, found[name], fmt)
            if id(tensor.assignment.module) in of_the_model or tensor.assignment.kind == "embedding":
                heads[name] = None
    named = NamedModules(heads=[*heads], weights={tensor.entry.name: tensor.layout for tensor in quantized})
    for name, fmt_or_none in _experts_together(found).items():
        if fmt_or_none is None:
            named.kept.append(name)
        else:
            named.formats[name] = fmt_or_none
    return named


def _modules(routes: Routes, tensor: str) -> list[str]:
    """The modules of the model that a checkpoint tensor goes to."""
    return list(dict.fromkeys(span.parameter.rpartition(".")[0] for span in routes.spans.get(tensor, ())))


def _names(stored: str, modules: Iterable[str]) -> Iterator[str]:
    """What a module is called: in the files, and in the model, an expert as if its module had a child for each."""
    yield stored
    number = EXPERT_NUMBER.search(stored)
    for module in modules:
        yield module if number is None or EXPERT_NUMBER.search(module) else f"{module}.{stored[number.start() :]}"


def _kept(model: nn.Module, planned: Iterable[QuantizedTensor | KeptTensor], routes: Routes) -> Iterator[str]:
    """The names of all modules that are kept; a module that the model has in several places, by all of them."""
    of_module: dict[str, list[str]] = defaultdict(list)
    experts: dict[str, list[str]] = defaultdict(list)
    quantized: set[str] = set()
    unrouted: list[str] = []
    for tensor in planned:
        modules = _modules(routes, tensor.entry.name)
        name, _, parameter = tensor.entry.name.rpartition(".")
        if isinstance(tensor, QuantizedTensor):
            quantized.update(modules)
        elif len(tensor.entry.shape) == 2 and tensor.entry.name.endswith(_SUFFIX):
            for module in modules:
                of_module[module].append(name)
            unrouted += [name] if not modules and name_reason(name) != "embedding" else []
        elif len(tensor.entry.shape) == 3 and parameter:
            for module in modules:
                experts[module].append(name)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) or path in quantized:
            continue
        stored = of_module.get(path, [])
        for name in stored:
            yield from _names(name, [path])
        if is_fused_experts(module):
            for name in (*experts.get(path, ()), *([] if stored else [path])):
                yield from (name, f"{name}.*")
        elif isinstance(module, nn.Linear):
            yield path
    yield from unrouted


def _experts_together(found: Mapping[str, WeightFormat | None]) -> dict[str, WeightFormat | None]:
    """The same with one name for all experts of a module, where all of them are quantized alike or kept."""
    kinds: dict[str, set[WeightFormat | None]] = defaultdict(set)
    together = {name: alike(name) for name in found}
    for name, fmt in found.items():
        kinds[together[name]].add(fmt)
    return {together[name] if len(kinds[together[name]]) == 1 else name: fmt for name, fmt in found.items()}


def _ambiguous(name: str, *formats: WeightFormat | None) -> PolicyError:
    first, second = ("kept" if fmt is None else fmt.name for fmt in formats)
    return PolicyError(
        f"{name} is the name of one module in the checkpoint and of another one in the model, and tools that read the "
        f"result look for either: one of them is {first}, the other {second}; quantize both in the same way, or keep "
        f"both (--ignore, --override)"
    )
