"""quantload in SGLang: `--quantization quantload_quark_mxfp4`, without a line of code.

`register` is the entry point `sglang.srt.plugins`, which SGLang calls in each of its processes before it parses
arguments: names are made known, and hooks are put where it looks a name up, reads a checkpoint and loads a model. What
has to do with layers cannot be imported yet; the first hook that runs does it (`sglang_verify`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES, add_quantization_method_choices
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from .sglang_names import LOAD, NAMES, VERIFY, WEIGHTS


def verify_quantization(original: Callable[[Any], None], model_config: Any) -> None:
    """Around `ModelConfig._verify_quantization`: our names, and those whose own implementation cannot run here."""
    from .sglang_verify import verify

    verify(original, model_config)


def weights_iterator(original: Callable[..., Any], loader: Any, source: Any, **named: Any) -> Iterator[Any]:
    """Around `DefaultModelLoader._get_weights_iterator`: tensors that nobody has read yet."""
    from .sglang_loading import weights_iterator

    return weights_iterator(original, loader, source, **named)


def load_weights(original: Callable[..., None], model: Any, weights: Any, target_device: Any) -> None:
    """Around `DefaultModelLoader.load_weights_only`: a load, or a reload, with its report."""
    from .sglang_loading import load_weights

    load_weights(original, model, weights, target_device)


HOOKS: dict[str, Callable[..., Any]] = {VERIFY: verify_quantization, WEIGHTS: weights_iterator, LOAD: load_weights}


def register() -> None:
    """Make our names known and register the hooks, in this process: cheap, and any number of times."""
    add_quantization_method_choices([name for name in known_names() if name not in QUANTIZATION_CHOICES])
    for target, hook in HOOKS.items():
        if hook not in [known for _, known, *_ in HookRegistry._hooks.get(target, ())]:
            HookRegistry.register(target, hook, HookType.AROUND)


def known_names() -> list[str]:
    """The names that `--quantization` takes for us: each scheme with our prefix, and as it is."""
    return [*NAMES, *NAMES.values()]
