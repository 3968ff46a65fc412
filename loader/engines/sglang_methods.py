"""What SGLang asks of a quantization method: its configuration, linear layers and experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator, get_moe_tp_group
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.runtime_context import get_server_args
from sglang.srt.utils import is_cuda

from ..errors import PolicyError
from ..options import LoadOptions, QuantizationPolicy
from ..schemes.linear import QuantizedLinearScheme
from ..schemes.moe import QuantizedMoEScheme
from ..schemes.policy import HEAD
from .choices import DECODED, LayerChoices, read_options
from .closures import EngineLayer, quantized_experts
from .engine_load import Kept
from .experts_host import EngineExperts, Gate
from .linear_method import LinearMethod
from .rank_maxima import RankMaxima, expert_divisions
from .sglang_names import NAMES

VALUES_WANTED = frozenset({"kv_b_proj"})
"""Linear layers whose weights SGLang computes with itself, when they are loaded."""
DECODED_FORMATS = ("auto", "safetensors")
"""Load formats whose tensors are read here, so that those of a quantized checkpoint come decoded."""
FINAL_FORMATS = frozenset({"dummy", "sharded_state", "remote", "remote_instance"})
"""Load formats that fill in final tensors, or make them up: no checkpoint tensor comes to a closure."""


class QuantloadConfig(QuantizationConfig):  # type: ignore[misc]  # SGLang's classes are not typed for us
    """One scheme of ours as a quantization method of SGLang.

    Policy and options come from `quantization_config` in `--json-model-override-args`, which has their fields.
    """

    scheme: ClassVar[str]
    name: ClassVar[str]

    def __init__(self, policy: QuantizationPolicy | None = None, options: LoadOptions | None = None) -> None:
        super().__init__()
        self.policy = policy or QuantizationPolicy(self.scheme)
        self.options = options or LoadOptions()
        self.stored: str | None = None
        """The tool that has quantized the checkpoint already."""
        self.kept: dict[str, Kept] = {}
        """The layers that stay as stored, and why."""
        self.is_loaded = False
        """Whether the model has all of its weights, so that what comes now is an update."""
        self._choices: LayerChoices | None = None
        self._maxima: dict[str, RankMaxima] = {}

    @classmethod
    def get_name(cls) -> str:
        """The name that `--quantization` takes."""
        return cls.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those that models compute in."""
        return [torch.bfloat16, torch.half, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The kernels say themselves what they can run on."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: a checkpoint that is not quantized has no such file."""
        return []

    def get_scaled_act_names(self) -> list[str]:
        """None."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantloadConfig:
        """What `--json-model-override-args` says; `PolicyError` for a field that means nothing."""
        known = ("packed_modules_mapping", "hf_config", "requantization_method", DECODED)
        found = cls(*read_options(config, cls.scheme, cls.name, known))
        found.stored = config.get(DECODED)
        found.packed_modules_mapping = config.get("packed_modules_mapping") or {}
        return found

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is quantized; `None` for what stays as it is."""
        if isinstance(layer, LinearBase):
            choice = self._choices_now().linear(prefix, _values_wanted(prefix))
            linear: Any = choice.scheme
            if linear is not None:
                return QuantizedLinear(self, linear, prefix, self._maxima_of(layer.tp_group))
            self.kept[prefix] = "linear", choice.reason
            return UnquantizedLinearMethod()
        if isinstance(layer, FusedMoE):
            choice = self._choices_now().experts(prefix)
            experts: Any = choice.scheme
            if experts is not None:
                group = get_moe_tp_group() if layer.moe_tp_size > 1 else None
                return QuantizedExperts(self, experts, prefix, self._maxima_of(group))
            self.kept[prefix] = "experts", choice.reason
        if isinstance(layer, ParallelLMHead):
            if self._choices_now().rules.linear(prefix, HEAD).scheme is not None:
                raise PolicyError(f"{prefix} is an output head, which stays as stored in SGLang: leave it out")
            self.kept[prefix] = "linear", HEAD
        return None

    def _choices_now(self) -> LayerChoices:
        """Made when the first layer is, on the device that the model is built on."""
        if self._choices is None:
            _check_can_decode(self.stored, get_server_args().load_format)
            merged: Mapping[str, Sequence[str]] = {
                name: parts for name, parts in self.packed_modules_mapping.items() if isinstance(parts, (list, tuple))
            }
            self._choices = LayerChoices(self.policy, self.options, merged)
        return self._choices

    def _maxima_of(self, group: Any) -> RankMaxima | None:
        """Those of a group of ranks; `None` for what is no group of processes, or of one."""
        group = getattr(group, "group", group)  # of ranks that have the same part
        if not isinstance(group, GroupCoordinator) or group.world_size == 1:
            return None
        if group.unique_name not in self._maxima:
            self._maxima[group.unique_name] = RankMaxima(group.cpu_group)
        return self._maxima[group.unique_name]

    @property
    def storage(self) -> Any:
        """Where codes and scales are."""
        return self._choices_now().storage


def _config_class(scheme: str, name: str) -> type[QuantloadConfig]:
    members = {"scheme": scheme, "name": name, "__module__": __name__, "__doc__": f"`--quantization {name}`."}
    return type(f"Config_{name}", (QuantloadConfig,), members)


CLASSES = {name: _config_class(scheme, name) for name, scheme in NAMES.items()}


def _check_can_decode(stored: str | None, load_format: Any) -> None:
    """Raise `PolicyError` where a checkpoint is quantized and its tensors come by a way that does not decode them."""
    if stored is not None and load_format not in (*DECODED_FORMATS, *FINAL_FORMATS):
        raise PolicyError(
            f"the checkpoint is quantized already ({stored}), and only --load-format {' or '.join(DECODED_FORMATS)} "
            f"decodes it on its way; leave --quantization out, and SGLang loads it as it is if it can"
        )


def _values_wanted(prefix: str) -> str | None:
    """Why a layer stays as stored that SGLang takes the values of."""
    return "SGLang computes with its values" if prefix.rpartition(".")[2] in VALUES_WANTED else None


class _Quantized:
    """What both kinds of quantized layers have."""

    layer: EngineLayer
    config: QuantloadConfig

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """New weights are coming: every part of the layer may arrive again."""
        self.layer.reset()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that the layer came whole, or, in an update, not at all; its kernel has it where it wants it."""
        is_made_up = get_server_args().load_format in FINAL_FORMATS
        self.layer.check_complete(self.config.is_loaded or is_made_up)


class QuantizedLinear(_Quantized, LinearMethod, LinearMethodBase):  # type: ignore[misc]  # SGLang's are not typed for us
    """A linear layer of SGLang in a scheme of ours."""

    def __init__(
        self, config: QuantloadConfig, scheme: QuantizedLinearScheme, prefix: str, maxima: RankMaxima | None
    ) -> None:
        super().__init__(config.storage, scheme, prefix, maxima)
        self.config = config


class QuantizedExperts(_Quantized, FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of a layer of SGLang in a scheme of ours, behind its standard dispatcher."""

    def __init__(
        self, config: QuantloadConfig, scheme: QuantizedMoEScheme, prefix: str, maxima: RankMaxima | None
    ) -> None:
        super().__init__()
        self.config, self.scheme, self._prefix, self._maxima = config, scheme, prefix, maxima

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
        _check_experts_stay(self._prefix)
        base = extra_weight_attrs["weight_loader"]
        gate = gate_of(layer.moe_runner_config, self._prefix)
        rows = intermediate_size_per_partition * (2 if gate.gated else 1)
        widths = {"w13_weight": rows, "w2_weight": hidden_size} if extra_weight_attrs.get("with_bias") else {}
        biases = {weight: _create_bias(layer, weight, num_experts, width, base) for weight, width in widths.items()}
        self.layer = quantized_experts(
            layer,
            self._prefix,
            self.scheme,
            num_experts,
            {
                "w13_weight": (gate.shards(rows), hidden_size),
                "w2_weight": ((("w2", hidden_size),), intermediate_size_per_partition),
            },
            EngineExperts(gate, biases, layer.moe_runner_config.apply_router_weight_on_input),
            self.config.storage,
            base,
            params_dtype,
            layer._map_global_expert_id_to_local_expert_id,
            divisions=expert_divisions(self._maxima, layer.moe_tp_size > 1),
        )

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """No runner of SGLang is used."""
        factor = moe_runner_config.routed_scaling_factor
        self._factor = factor if is_cuda() and factor is not None else 1.0  # elsewhere models do it themselves
        if moe_runner_config.no_combine:
            raise PolicyError(f"{self._prefix}: experts whose outputs are not combined; ignore them")

    def apply(self, layer: Any, dispatch_output: Any) -> StandardCombineInput:
        """The weighted sum of what the chosen experts of this rank make of the tokens."""
        weights, ids, _ = dispatch_output.topk_output
        out = self.scheme.apply(layer, dispatch_output.hidden_states, ids, weights)
        if self._factor != 1.0 and not layer.should_fuse_routed_scaling_factor_in_topk:
            out = out * self._factor
        return StandardCombineInput(hidden_states=out)


def gate_of(config: Any, prefix: str) -> Gate:
    """What experts compute between their products, by a `MoeRunnerConfig`; `PolicyError` for what is not known."""
    try:
        return _gate(config)
    except ValueError as error:
        raise PolicyError(f"{prefix}: {error}; ignore these experts") from error


def _gate(config: Any) -> Gate:
    gated, alpha, limit = config.is_gated, config.gemm1_alpha, config.gemm1_clamp_limit
    if config.activation != "silu" or not gated:
        return Gate(config.activation, gated=gated)
    if alpha is not None:  # gpt-oss and its kin
        shift = 1.0 if config.gemm1_beta is None else config.gemm1_beta
        return Gate("silu", interleaved=config.gate_up_interleaved, limit=limit, slope=alpha, shift=shift)
    if limit is not None:
        return Gate("silu", limit=limit, bounds_activated=True)
    return Gate("silu", limit=config.swiglu_limit)


def _create_bias(layer: Any, weight: str, num_experts: int, width: int, loader: Callable[..., Any]) -> str:
    """The bias that goes with a weight of experts, as SGLang's own method makes it; its name."""
    bias: Any = torch.nn.Parameter(torch.zeros(num_experts, width, dtype=torch.float32), requires_grad=False)
    bias.weight_loader = loader
    layer.register_parameter(f"{weight}_bias", bias)
    return f"{weight}_bias"


def _check_experts_stay(prefix: str) -> None:
    """Raise `PolicyError` where experts are copied, or moved between ranks while the model runs."""
    location = get_global_expert_location_metadata()
    if location is not None and location.num_physical_experts != location.num_logical_experts:
        raise PolicyError(f"{prefix}: redundant experts (EPLB) are not quantized; ignore them, or run without")
