"""What vLLM asks of a quantization method for its layers: linear, experts, and those that are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tp_group
from vllm.lora.utils import is_in_target_modules
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from ..errors import PolicyError
from ..model.stored_sources import ModuleWeights
from ..online.storage import FinalStorage
from ..options import LoadOptions, QuantizationPolicy
from ..schemes.moe import QuantizedMoEScheme
from ..schemes.policy import HEAD
from .beside_llvmlite import let_llvmlite_be_looked_at
from .choices import LayerChoices, may_stay_as_stored
from .closures import EngineLayer, quantized_experts
from .experts_host import EngineExperts, Gate
from .linear_method import LinearMethod
from .names import LOAD_FORMAT
from .rank_maxima import RankMaxima, expert_divisions
from .stored_layers import StoredLayers

FINAL_FORMATS = frozenset({"dummy", "sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache"})
"""Load formats of vLLM that fill in final tensors, or make them up: no checkpoint tensor comes to a closure."""


class Methods:
    """The methods for the layers of one model."""

    def __init__(
        self,
        policy: QuantizationPolicy,
        options: LoadOptions,
        merged: Mapping[str, Sequence[str]],
        stored: str | None = None,
        layers: StoredLayers | None = None,
    ) -> None:
        """`stored` is the tool that has quantized the checkpoint, if one has, `layers` what it has of them."""
        _check_can_decode(stored)
        _check_is_known(policy, stored, layers)
        self._choices = LayerChoices(policy, options, merged, layers)
        group = get_tp_group()
        self._maxima = RankMaxima(group.cpu_group) if group.world_size > 1 else None
        let_llvmlite_be_looked_at()
        _be_quiet_about_codes()

    def let_stored_go(self) -> None:
        """See `LayerChoices.let_stored_go`."""
        self._choices.let_stored_go()

    def of(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer that is called `prefix`; `None` for one that is neither linear nor experts."""
        storage, maxima = self._choices.storage, self._maxima
        if isinstance(layer, LinearBase):
            choice = self._choices.linear(prefix)
            scheme: Any = choice.scheme
            if scheme is None:
                return KeptLinear(choice.reason)
            stored = self._choices.stored_linear(prefix) if choice.keeps else None
            return QuantizedLinear(storage, scheme, prefix, maxima, stored)
        if isinstance(layer, RoutedExperts):
            choice = self._choices.experts(prefix)
            scheme = choice.scheme
            if scheme is None:
                return KeptExperts(layer.moe_config, choice.reason, prefix)
            stored = self._choices.stored_experts(prefix) if choice.keeps else None
            return QuantizedExperts(storage, scheme, prefix, layer.moe_config, maxima, stored)
        if isinstance(layer, ParallelLMHead):
            if self._choices.rules.linear(prefix, HEAD).scheme is not None:
                raise PolicyError(f"{prefix} is an output head, which stays as stored in vLLM: leave it out")
            return KeptHead(HEAD)
        return None


class _Quantized:
    """What both kinds of quantized layers have."""

    layer: EngineLayer

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        config = get_current_vllm_config_or_none()
        self._is_made_up = config is not None and config.load_config.load_format in FINAL_FORMATS

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that all of the layer came: it brought itself to where its kernel wants it."""
        self.layer.check_complete(self._is_made_up)


class QuantizedLinear(_Quantized, LinearMethod, LinearMethodBase):  # type: ignore[misc]  # vLLM's are not typed for us
    """A linear layer of vLLM in a scheme of ours."""


class QuantizedExperts(_Quantized, FusedMoEMethodBase):  # type: ignore[misc]
    """The routed experts of a layer of vLLM in a scheme of ours."""

    def __init__(
        self,
        storage: FinalStorage,
        scheme: QuantizedMoEScheme,
        prefix: str,
        moe: Any,
        maxima: RankMaxima | None,
        stored: ModuleWeights | None,
    ) -> None:
        super().__init__(moe)
        self._storage, self.scheme, self._prefix, self._maxima = storage, scheme, prefix, maxima
        self._stored = stored

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """No kernel of vLLM is used."""
        return

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Codes and scales of this rank's experts, or parts of them; biases as they are stored."""
        _check_unpadded(self.moe, self._prefix)
        _check_no_adapters(self._prefix)
        base = extra_weight_attrs["weight_loader"]
        gate = gate_of(layer, self._prefix)
        rows = intermediate_size_per_partition * (2 if gate.gated else 1)
        biases = _create_biases(layer, self.moe, rows, params_dtype, base) if self.moe.has_bias else {}
        self.layer = quantized_experts(
            layer,
            self._prefix,
            self.scheme,
            num_experts,
            {
                "w13_weight": (gate.shards(rows), hidden_size),
                "w2_weight": ((("w2", hidden_size),), intermediate_size_per_partition),
            },
            EngineExperts(gate, biases, layer.apply_router_weight_on_input, _expert_map),
            self._storage,
            base,
            params_dtype,
            layer._map_global_expert_id_to_local_expert_id,
            divisions=expert_divisions(self._maxima_of(self.moe), self.moe.tp_size > 1),
            stored=self._stored,
        )
        self._stored = None

    def apply(
        self,
        layer: torch.nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The weighted sum of what the chosen experts of this rank make of `x` [T, H]."""
        return self.scheme.apply(layer, x, topk_ids, topk_weights)

    def _maxima_of(self, moe: Any) -> RankMaxima | None:
        """Those of the ranks that divide an expert, who with data parallelism are more than a tensor-parallel group."""
        return self._maxima if moe.tp_size == get_tp_group().world_size else None


class KeptLinear(UnquantizedLinearMethod):  # type: ignore[misc]
    """A linear layer as stored. On a CPU it is not packed, as vLLM would: packed weights do not survive a reload."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing on a CPU."""
        if not current_platform.is_cpu():
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` times the weight, plus bias."""
        return F.linear(x, layer.weight, bias) if current_platform.is_cpu() else super().apply(layer, x, bias)


class KeptHead(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An output head as stored; see `KeptLinear`."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing on a CPU."""
        if not current_platform.is_cpu():
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` times the weight, plus bias."""
        return F.linear(x, layer.weight, bias) if current_platform.is_cpu() else super().apply(layer, x, bias)


class KeptExperts(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """Experts as stored; on a CPU, where vLLM would pack them, they stay as they are (see `KeptLinear`)."""

    def __init__(self, moe: Any, reason: str, prefix: str) -> None:
        super().__init__(moe)
        self.reason, self._prefix = reason, prefix
        self._gate: Gate | None = None

    @property
    def is_monolithic(self) -> bool:
        """Not where they are computed here, so that vLLM chooses the experts of a token."""
        return self._gate is None and bool(super().is_monolithic)

    def maybe_roundup_sizes(self, hidden: int, intermediate: int, dtype: torch.dtype, parallel: Any) -> tuple[int, int]:
        """Nothing is padded on a CPU."""
        if current_platform.is_cpu():
            return hidden, intermediate
        sizes: tuple[int, int] = super().maybe_roundup_sizes(hidden, intermediate, dtype, parallel)
        return sizes

    def create_weights(self, layer: Any, *arguments: Any, **named: Any) -> None:
        """As vLLM does."""
        if current_platform.is_cpu():
            self._gate = gate_of(layer, self._prefix)
            _check_no_adapters(self._prefix)
        super().create_weights(layer, *arguments, **named)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing on a CPU."""
        if self._gate is None:
            super().process_weights_after_loading(layer)

    def apply(
        self,
        layer: torch.nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The weighted sum of what the chosen experts of this rank make of `x` [T, H]."""
        if self._gate is None:
            made: Tensor = super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
            return made
        return _weighted_experts(layer, self._gate, x, topk_weights, topk_ids)


def _check_can_decode(stored: str | None) -> None:
    """Raise `PolicyError` where a checkpoint is quantized and somebody else reads it."""
    config = get_current_vllm_config_or_none()
    if stored is not None and config is not None and config.load_config.load_format not in (LOAD_FORMAT, "dummy"):
        raise PolicyError(
            f"the checkpoint is quantized already ({stored}), and only --load-format {LOAD_FORMAT} decodes it on its "
            f"way; leave --quantization out, and vLLM loads it as it is"
        )


def _check_is_known(policy: QuantizationPolicy, stored: str | None, layers: StoredLayers | None) -> None:
    """Raise `PolicyError` where layers are to stay as stored, and nothing is known of how they are."""
    if may_stay_as_stored(policy) and stored is not None and layers is None:
        raise PolicyError(
            f"the checkpoint is quantized already ({stored}), and only --load-format {LOAD_FORMAT} looks at it: name a "
            f"scheme to make weights up in that"
        )


def gate_of(layer: Any, prefix: str) -> Gate:
    """What the experts of a layer compute between their products; `PolicyError` for what is not known."""
    name, gated = layer.activation.value, layer.activation.is_gated
    limit, slope, shift = layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta
    if name == "swigluoai":  # gpt-oss: its limit and slope are vLLM's constants, too
        return Gate("silu", interleaved=True, limit=7.0, slope=1.702, shift=1.0)
    if name == "swigluoai_uninterleave":
        return Gate("silu", limit=limit, slope=1.0 if slope is None else slope, shift=shift or 0.0)
    if name == "swiglustep":
        return Gate("silu", limit=7.0 if limit is None else limit, bounds_activated=True)
    try:
        return Gate(name.removesuffix("_no_mul"), gated=gated, limit=limit if name == "silu" else None)
    except ValueError as error:
        raise PolicyError(f"{prefix}: {error}; ignore these experts") from error


def _weighted_experts(layer: Any, gate: Gate, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """What the experts of a rank make of `x`, expert after expert, with weights as they are stored."""
    own = _expert_map(layer)
    local = ids.long() if own is None else own[ids.long()].long()
    biases = layer._parameters.get("w13_bias"), layer._parameters.get("w2_bias")
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(layer.w13_weight)):
        tokens, places = (local == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        share, hidden = weights[tokens, places].unsqueeze(-1), x[tokens]
        if layer.apply_router_weight_on_input:
            hidden, share = hidden * share.to(hidden.dtype), torch.ones_like(share)
        up, down = (None if bias is None else bias[expert] for bias in biases)
        hidden = F.linear(gate(F.linear(hidden, layer.w13_weight[expert], up)), layer.w2_weight[expert], down)
        out.index_add_(0, tokens, (hidden * share).float())
    return out.to(x.dtype)


def _create_biases(layer: Any, moe: Any, rows: int, dtype: torch.dtype, loader: Callable[..., Any]) -> dict[str, str]:
    """The biases of experts, as vLLM's own method makes them; their names by those of the weights."""
    names = {"w13_weight": ("w13_bias", rows), "w2_weight": ("w2_bias", layer.hidden_size)}
    for bias, width in names.values():
        held: Any = torch.nn.Parameter(torch.zeros(moe.num_local_experts, width, dtype=dtype), requires_grad=False)
        held.weight_loader = loader
        layer.register_parameter(bias, held)
    return {weight: bias for weight, (bias, _) in names.items()}


def _check_unpadded(moe: Any, prefix: str) -> None:
    sizes = (moe.hidden_dim, moe.intermediate_size_per_partition)
    stored = (moe.hidden_dim_unpadded, moe.intermediate_size_per_partition_unpadded)
    if sizes != stored or moe.tp_shard_with_padding:
        raise PolicyError(
            f"{prefix}: vLLM pads these experts from {stored} to {sizes} here, and padding is not quantized; ignore "
            f"them, or choose another way of spreading experts over ranks"
        )


def _check_no_adapters(prefix: str) -> None:
    """Raise `PolicyError` where vLLM would put LoRA adapters on experts: it does so inside of kernels of its own."""
    config = get_current_vllm_config_or_none()
    lora = None if config is None else config.lora_config
    if lora is not None and is_in_target_modules(prefix, lora.target_modules):
        raise PolicyError(
            f"{prefix}: vLLM puts LoRA adapters on experts inside of kernels of its own, on which these experts do not "
            f"run: say which other modules get adapters (--lora-target-modules qkv_proj o_proj)"
        )


def _expert_map(layer: Any) -> Tensor | None:
    expert_map: Tensor | None = layer._expert_map
    return expert_map


class _CodesAreNoNews(logging.Filter):
    """Drops vLLM's warning that values are loaded into codes, once for each linear layer."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be logged."""
        if not str(record.msg).startswith("Attempted to load weight") or not isinstance(record.args, tuple):
            return True
        codes = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
        return not any(dtype in codes for dtype in record.args)


def _be_quiet_about_codes() -> None:
    log = logging.getLogger("vllm.model_executor.models.utils")
    if not any(isinstance(each, _CodesAreNoNews) for each in log.filters):
        log.addFilter(_CodesAreNoNews())
