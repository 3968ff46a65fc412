"""What SGLang is asked for by name: whether it is ours, and what the checkpoint is stored in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.layers import quantization as sglang_quantization
from sglang.srt.model_loader.checkpoint_quantization import resolve_checkpoint_quant_spec
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.utils import is_cpu, is_gfx95_supported, is_hip

from ..errors import PolicyError
from .choices import are_options, is_stored, say_decoded
from .names import PREFIX
from .sglang_methods import CLASSES
from .sglang_names import LOAD, NAMES, VERIFY, WEIGHTS

logger = logging.getLogger(__name__)

OWN: Mapping[str, Callable[[], bool]] = {
    "quark_mxfp4": is_gfx95_supported,
    "quark_int4fp8_moe": is_hip,
    "mxfp8": lambda: not is_cpu(),
}
"""The schemes that SGLang has by the same name, and where its own can run."""


def ours(name: str | None) -> str | None:
    """Our name for what `--quantization` says, where we answer to it here."""
    if name is None or name in NAMES:
        return name
    own = OWN.get(name)
    if f"{PREFIX}{name}" not in NAMES or (own is not None and own()):
        return None
    return f"{PREFIX}{name}"


def verify(original: Callable[[Any], None], model_config: Any) -> None:
    """Check what a model is to be quantized to; SGLang's own check where that is not for us."""
    _make_known()
    stored = _stored_config(model_config)
    asked = model_config.quantization or _with_prefix(stored.get("quant_method"))
    name = ours(None if asked is None else asked.lower())
    if name is None:
        original(model_config)
        return
    check_hooks()
    method = stored.get("quant_method")
    if is_stored(stored, name) and not are_options(stored, name):
        say_decoded(model_config.hf_config, name, str(method))
    elif ours(method or name) != name:
        raise PolicyError(
            f"--quantization {asked}: the checkpoint is quantized already, by {method}, which is not read here; leave "
            f"the option out, and SGLang loads it as it is if it can, or name a checkpoint that is not"
        )
    if asked != name:
        logger.info("--quantization %s is quantload's here: SGLang's own cannot run on this platform", asked)
    model_config.quantization = name


def _stored_config(model_config: Any) -> Mapping[str, Any]:
    """What a checkpoint's config says of quantization; where that does not name its tool, what SGLang makes of it.

    SGLang names ModelOpt's formats apart, which are one tool's here.
    """
    spec: Any = resolve_checkpoint_quant_spec(model_config.hf_config)
    if spec is not None and spec.declared_method is not None:
        config: dict[str, Any] = spec.config
        return config
    parsed: dict[str, Any] = model_config._parse_quant_hf_config() or {}
    method = parsed.get("quant_method")
    if isinstance(method, str) and (method.startswith("modelopt") or "quant_algo" in parsed):
        return {**parsed, "quant_method": "modelopt"}
    return parsed


def check_hooks() -> None:
    """Raise `PolicyError` where SGLang did not put our hooks in place, of which it only writes a line in its log."""
    for target in (VERIFY, WEIGHTS, LOAD):
        if target not in HookRegistry._patched:
            raise PolicyError(
                f"SGLang has not put quantload's hook on {target}: see 'Failed to apply hooks' in its log; "
                f"docs/engines.md has the versions that were run"
            )


def _with_prefix(method: Any) -> str | None:
    """A method that a config names, where it is ours beyond doubt: others may be what a checkpoint is stored in."""
    return method if isinstance(method, str) and method.startswith(PREFIX) else None


def _make_known() -> None:
    for table in (sglang_quantization.QUANTIZATION_METHODS, sglang_quantization.CPU_QUANTIZATION_METHODS):
        table.update(CLASSES)
