"""The fields a `quantization_config` may have, by `quant_method`: those that are read, and those known to be harmless.

Harmless is what says nothing about the numbers that the tensors stand for: how they were found, of which version the
tool was, what the key-value cache, the softmax or the outputs of layers are rounded to (here they are not), and how
another program should run the model. A field that is not here is an error, unless it is null, [] or {}: nobody knows
what it says. The lists were read from AMD Quark 0.13, compressed-tensors 0.20, NVIDIA ModelOpt 0.47, transformers 5.24
and vLLM 0.32; those of AWQ and GPTQ also have what AutoAWQ, AutoGPTQ, GPTQModel and AutoRound are known to
write.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_COMMON = frozenset({"quant_method", "dequantize"})
_GPTQ_READ = ("bits", "group_size", "desc_act", "dynamic", "checkpoint_format", "is_marlin_format")
_GPTQ_FOUND = (
    *("sym", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "act_group_aware", "hyb_act"),
    *("dataset", "tokenizer", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block"),
    *("batch_size", "pad_token_id", "max_input_length", "cache_block_outputs", "modules_in_block_to_quantize"),
    *("mse", "gptaq", "gptaq_alpha", "v2", "v2_alpha", "failsafe", "auto_forward_data_parallel", "mock_quantization"),
)
_AUTOROUND_FOUND = (
    *("iters", "lr", "minmax_lr", "nsamples", "seqlen", "autoround_version", "enable_quanted_input", "train_bs"),
    *("enable_minmax_tuning", "enable_norm_bias_tuning", "low_gpu_mem_usage", "low_cpu_mem_usage", "data_type", "amp"),
    *("gradient_accumulate_steps", "provider", "scale_dtype", "quant_block_list", "to_quant_block_names"),
)
_GPTQ_RUN = (
    *("lm_head", "format", "method", "pack_dtype", "pack_impl", "meta", "model_name_or_path", "model_file_base_name"),
    *("use_cuda_fp16", "use_exllama", "exllama_config", "disable_exllama", "backend", "parallel_packing", "device"),
    *("compute_device_filter", "offload_to_disk", "offload_to_disk_path", "modules_to_not_convert"),
)
_AWQ_READ = ("bits", "group_size", "zero_point", "desc_act", "checkpoint_format")
_AWQ_RUN = ("version", "backend", "fuse_max_seq_len", "modules_to_fuse", "do_fuse", "exllama_config", "pack_method")
_FP8 = (
    *("fmt", "scale_fmt", "weight_block_size", "modules_to_not_convert", "ignored_layers", "activation_scheme"),
    *("modules_to_convert", "store_dtype", "kv_cache_scheme", "kv_cache_quant_algo", "is_checkpoint_fp8_serialized"),
)
_MODELOPT = (
    *("producer", "quantization", "quant_algo", "ignore", "exclude_modules", "quantized_layers", "group_size"),
    *("kv_cache_quant_algo", "kv_cache_scheme", "config_groups", "has_zero_point", "pre_quant_scale", "version"),
    *("modules_to_not_convert", "ignored_layers"),
)

CONFIG: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "quark": _COMMON
        | {
            *("export", "exclude", "layer_quant_config", "layer_type_quant_config", "global_quant_config", "version"),
            *("algo_config", "kv_cache_quant_config", "kv_cache_post_rope", "kv_cache_group", "min_kv_scale"),
            *("softmax_quant_spec", "quant_mode", "quant_flow", "shared_scale_groups", "gpu_resident_blocks"),
            *("sync_moe_expert_input_amax", "keep_prequantized_layers", "pre_quant_opt_config", "log_severity_level"),
        },
        "compressed-tensors": _COMMON
        | {
            *("config_groups", "format", "quantization_status", "global_compression_ratio", "ignore", "version"),
            *("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config", "run_compressed"),
            *("use_optimized_inference",),
        },
        "awq": _COMMON
        | {
            "bits",
            "group_size",
            "zero_point",
            *_AWQ_RUN,
            *_GPTQ_FOUND,
            *_AUTOROUND_FOUND,
            *_GPTQ_RUN,
            "desc_act",
            "checkpoint_format",
        },
        "gptq": _COMMON | {*_GPTQ_READ, *_GPTQ_FOUND, *_AUTOROUND_FOUND, *_GPTQ_RUN},
        "mxfp4": _COMMON | {"modules_to_not_convert"},
        **dict.fromkeys(("fp8", "mxfp8"), _COMMON | {*_FP8, "expert_dtype"}),
        **dict.fromkeys(("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"), _COMMON | {*_MODELOPT}),
        "quantload": _COMMON | {"format_version", "formats", "shapes", "transposed"},
    }
)
"""Of the config itself."""

QUARK_EXPORT = frozenset({"weight_format", "pack_method", "kv_cache_group", "min_kv_scale", "weight_merge_groups"})
QUARK_LAYER = frozenset({"weight", "bias", "input_tensors", "output_tensors", "target_device"})
QUARK_TENSOR = frozenset(
    (
        *("dtype", "qscheme", "is_dynamic", "symmetric", "ch_axis", "block_size", "group_size", "scale_format"),
        *("scale_type", "mx_element_dtype", "zero_point_type", "is_scale_quant", "enable_buffer_reuse"),
        *("max_input_numel", "observer_cls", "round_method", "scale_calculation_mode", "percentile"),
    )
)
GPTQ_MODULE = CONFIG["gptq"] - {"dynamic", "checkpoint_format", "is_marlin_format"}
"""Of what `dynamic` says of some modules."""
MODELOPT_LAYER = frozenset({"quant_algo", "group_size", "has_zero_point", "pre_quant_scale"})
