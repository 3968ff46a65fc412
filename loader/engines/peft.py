"""LoRA adapters of PEFT on quantized linear layers.

model = get_peft_model(model, for_quantized(LoraConfig(target_modules=["q_proj", "v_proj"])))
"""

from __future__ import annotations

from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from ..errors import PolicyError
from ..model.quantized import QuantizedLinear


class QuantizedLoraLinear(Linear):  # type: ignore[misc]  # PEFT's classes are not typed
    """A `QuantizedLinear`, as it is, with the products of adapters added: y = quantized(x) + B(A(x)) * scaling."""

    @property
    def lora_variants(self) -> dict[Any, Any]:
        """Plain LoRA only: DoRA and its like compute with the weight."""
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **given: Any) -> None:
        """Raise `PolicyError` for a variant that needs the numbers of the weight."""
        for field in ("use_dora", "use_bdlora", "arrow_config", "alora_invocation_tokens", "velora_config"):
            if getattr(config, field, None):
                raise PolicyError(f"{field} is set, and a quantized linear layer takes plain LoRA only: leave it out")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise `PolicyError`: codes cannot take the small change that an adapter is."""
        raise PolicyError(
            f"an adapter cannot be merged into codes of {self.get_base_layer().scheme.name}: what it adds is mostly "
            f"smaller than a step between two codes; keep it beside them, or merge it into the original checkpoint and "
            f"quantize that"
        )


def for_quantized(config: LoraConfig) -> LoraConfig:
    """The same config, with which PEFT puts adapters on `QuantizedLinear` layers, too.

    For `get_peft_model`, `model.add_adapter` and `PeftModel.from_pretrained(..., config=...)`. Kept layers get PEFT's
    own modules. Fused experts take no adapter.
    """
    config._register_custom_module({QuantizedLinear: QuantizedLoraLinear})
    return config
