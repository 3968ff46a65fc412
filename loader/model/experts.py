"""How fused experts modules of transformers run on codes and scales.

Most go through transformers' experts interface: a forward registered there under a name, chosen by each module's own
config, so that experts kept as stored in the same model run as before. A model that runs its experts itself needs an
adapter here, or stays as stored with a reason in the report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..schemes.base import MoEScheme
from . import transformers_api
from .quantized import GivenMethod, quantize_experts

IMPLEMENTATION = "quantload"
INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "config")


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in one parameter."""
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3


def unsupported_reason(module: Any) -> str | None:
    """Why an experts module cannot run on codes, `None` if it can."""
    if type(module).__name__ in _ADAPTERS:
        return None
    if not all(hasattr(module, name) for name in INTERFACE):
        return f"{type(module).__name__} runs its experts itself, not through transformers' experts interface"
    first = module._parameters.get("gate_up_proj" if module.has_gate else "up_proj")
    if first is None or first.dim() != 3:
        return f"{type(module).__name__} keeps its experts under names quantload does not know"
    return None


def convert_experts(module: Any, scheme: MoEScheme) -> None:
    """Make a fused experts module, in place, hold codes and scales and run on them."""
    adapter = _ADAPTERS.get(type(module).__name__)
    if adapter is not None:
        adapter(module, scheme)
        return
    quantize_experts(module, scheme)
    transformers_api.choose_experts_forward(module, IMPLEMENTATION)


def registered_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts forward registered with transformers: hands over to the module's scheme."""
    scheme: MoEScheme = module.scheme
    return scheme.apply(module, hidden_states, top_k_index, top_k_weights)


def _convert_llama4(module: Any, scheme: MoEScheme) -> None:
    """Llama-4 sends every expert all tokens, scaled by the router: zeros where a token was not routed."""
    module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, True, True
    module._apply_gate = GivenMethod(_llama4_gate, module)
    quantize_experts(module, scheme)
    module.forward = GivenMethod(_llama4_forward, module)


def _llama4_gate(module: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * module.act_fn(gate)  # type: ignore[no-any-return]


def _llama4_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """`hidden_states` [E * T, H], expert after expert; rows of zeros give zeros and are not computed."""
    experts = module.num_experts
    rows = hidden_states.view(experts, -1, hidden_states.shape[-1])
    routed = rows.ne(0).any(dim=-1)
    expert_ids, tokens = routed.nonzero(as_tuple=True)
    ones = torch.ones(expert_ids.numel(), 1, dtype=rows.dtype, device=rows.device)
    computed = module.scheme.apply(module, rows[expert_ids, tokens], expert_ids.unsqueeze(1), ones)
    out = torch.zeros_like(rows)
    out[expert_ids, tokens] = computed
    return out.view(-1, hidden_states.shape[-1])


_ADAPTERS = {"Llama4TextExperts": _convert_llama4}

ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, registered_forward)
