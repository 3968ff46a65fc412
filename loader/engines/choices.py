"""What the doors into vLLM and SGLang share: the options beside the name of a scheme, and which layer gets what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from ..cpu_kernels import import_cpu_kernels
from ..errors import PolicyError
from ..model.stored_sources import ModuleWeights
from ..online.storage import FinalStorage
from ..options import LoadOptions, QuantizationPolicy
from ..schemes.names import AUTO
from ..schemes.policy import Choice, Policy, choose_policy, matches, name_reason
from ..schemes.registry import SchemeFactory
from ..schemes.stored.read import READERS
from .names import PREFIX as PREFIX
from .names import SCHEMES as SCHEMES
from .stored_layers import StoredLayers, together

POLICY_FIELDS = frozenset(field.name for field in fields(QuantizationPolicy)) - {"linear"}
OPTION_FIELDS = frozenset({"activations", "chunk_bytes", "kernels", "staging_bytes", "stats", "workers", "page_cache"})
"""The options of a load that mean something where an engine drives it."""

DECODED = "decoded_from"
"""The field of a `quantization_config` of ours that says which tool has quantized the checkpoint already."""

MERGED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""What engines call linear layers of a checkpoint that they run as one; many of their models do not say so."""

TOWER = "of a tower or projector for images or sound"
TOWERS = frozenset(
    {"visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "image_encoder", "vit", "vpm"}
    | {"audio_tower", "audio_encoder", "audio_model", "speech_encoder", "resampler", "multi_modal_projector"}
    | {"mm_projector", "vision_projector", "audio_projector", "connector", "aligner", "mlp1", "embed_vision"}
)
"""Parts of the names that the modules of engines' multimodal models have for them."""


def read_options(
    config: Mapping[str, Any], scheme: str, name: str, known: Sequence[str] = ()
) -> tuple[QuantizationPolicy, LoadOptions]:
    """The policy and the options in a `quantization_config`, in whose fields both are.

    `name` is what the engine calls `scheme`; fields in `known` are the engine's own. Raises `PolicyError` for a field
    that means nothing.
    """
    given = {key: value for key, value in config.items() if key not in ("quant_method", *known)}
    policy = {key: given.pop(key) for key in list(given) if key in POLICY_FIELDS}
    options = {key: given.pop(key) for key in list(given) if key in OPTION_FIELDS}
    if given:
        taken = ", ".join(sorted(POLICY_FIELDS | OPTION_FIELDS))
        raise PolicyError(f"quantization_config has {', '.join(sorted(given))}; {name} takes {taken}")
    return QuantizationPolicy.from_mapping({"linear": scheme, **policy}), LoadOptions.from_mapping(options)


def is_stored(config: Mapping[str, Any], name: str) -> bool:
    """Whether a `quantization_config` is that of a tool whose checkpoints are read here, and no options for `name`."""
    return config.get("quant_method") in READERS and config["quant_method"] != name


def are_options(config: Mapping[str, Any], name: str) -> bool:
    """Whether a `quantization_config` has nothing but options for `name`, or for it without our prefix."""
    others = set(config) - {"quant_method"}
    return config.get("quant_method") in (name, name.removeprefix(PREFIX)) and others <= POLICY_FIELDS | OPTION_FIELDS


def may_stay_as_stored(policy: QuantizationPolicy) -> bool:
    """Whether layers of a quantized checkpoint are to stay as they are: `auto` stands for some of them."""
    return AUTO in (policy.linear, policy.experts, *(scheme for _, scheme in policy.overrides))


def say_decoded(hf_config: Any, name: str, method: str) -> None:
    """Have the config of a model say that it is quantized to `name`, and decoded from what tool `method` has stored.

    An engine's models ask it how their weights are stored, and they get values.
    """
    hf_config.quantization_config = said = {"quant_method": name, DECODED: method}
    if getattr(hf_config, "compression_config", None) is not None:
        hf_config.compression_config = None
    text: Any = getattr(hf_config, "text_config", None)
    if getattr(text, "quantization_config", None) is not None:
        text.quantization_config = said


class LayerChoices:
    """Which layer of an engine's model gets which scheme, by the engine's names, on torch's default device."""

    def __init__(
        self,
        policy: QuantizationPolicy,
        options: LoadOptions,
        merged: Mapping[str, Sequence[str]] | None = None,
        stored: StoredLayers | None = None,
    ) -> None:
        """`merged` are the parts of merged layers, where the model says them; `stored` what a checkpoint has of them.

        With it, layers stay as they are stored where their scheme is that, or is `auto`.
        """
        device = torch.empty(0).device
        if device.type == "cpu":
            import_cpu_kernels()
        self.storage = FinalStorage(device)
        self._merged = {**MERGED, **(merged or {})}
        self._stored = stored
        factory = SchemeFactory(device, options, policy.scale_mode)
        with factory.compiling(torch.get_default_dtype()):
            is_quantized = stored is not None
            self.rules = Policy(choose_policy("auto", policy, is_quantized), factory, is_quantized)

    def linear(self, prefix: str, built_in_reason: str | None = None) -> Choice:
        """The choice for a linear layer, which may be several of the checkpoint.

        Patterns may name it, or, where it is merged, each of its parts. `PolicyError` where those differ.
        """
        reason = built_in_reason or tower_reason(prefix)
        parts = self._parts(prefix)
        if not parts or reason is not None or self._is_named(prefix):
            return self.rules.linear(prefix, reason or name_reason(prefix), self.stored_linear(prefix))
        return self.rules.fused(parts, self._stored.linear(parts) if self._stored is not None else ())

    def experts(self, prefix: str) -> Choice:
        """The choice for the experts of a layer."""
        return self.rules.experts(prefix, tower_reason(prefix), self.stored_experts(prefix))

    def stored_linear(self, prefix: str) -> ModuleWeights | None:
        """How the checkpoint stores a linear layer, all of its parts; `None` where it does not, or values."""
        return None if self._stored is None else together(self._stored.linear(self._parts(prefix) or [prefix]))

    def stored_experts(self, prefix: str) -> ModuleWeights | None:
        """How the checkpoint stores the experts of a layer."""
        return None if self._stored is None else self._stored.experts(prefix)

    def let_stored_go(self) -> None:
        """No more layers are made: what is known of a quantized checkpoint is large."""
        self._stored = None

    def _parts(self, prefix: str) -> list[str]:
        """The layers of a checkpoint that one of the engine is, if it is merged."""
        head, _, last = prefix.rpartition(".")
        return [f"{head}.{part}" if head else part for part in self._merged.get(last, ())]

    def _is_named(self, name: str) -> bool:
        """Whether a pattern fits a name."""
        policy = self.rules.policy
        return any(matches(each, name) for each in (*policy.ignore, *(pattern for pattern, _ in policy.overrides)))


def tower_reason(prefix: str) -> str | None:
    """Why a part of what sees or hears in a multimodal model is kept."""
    return None if TOWERS.isdisjoint(prefix.split(".")) else TOWER
