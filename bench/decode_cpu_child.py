"""A side of `decode_cpu.py` that is a transformers model: `decode_cpu_child.py SCHEME SHAPE THREADS`.

SCHEME is one of quantload's, or `transformers` for a model in BF16 that transformers makes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

BATCHES, PROMPT = (1, 8, 32), 512
PROMPT_BEFORE = 8
"""Tokens of each sequence that are there when those begin that are decoded."""
_DENSE = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
_ALL = {"max_position_embeddings": 4096, "dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        **_ALL, **_DENSE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "num_hidden_layers": 28, "intermediate_size": 3072,
    },
    "moe": {
        **_ALL, **_DENSE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
        "num_hidden_layers": 8, "intermediate_size": 3072, "moe_intermediate_size": 768, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "tiny": {
        **_ALL, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512, "hidden_size": 128,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 2,
        "intermediate_size": 256,
    },
}  # fmt: skip
"""Configs: Qwen3-0.6B, a MoE of 8 layers with 64 experts, and one for a look at this script."""


def load(scheme: str, shape: str) -> Any:
    """The model, with random weights."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        if scheme != "transformers":
            from quantload import load_quantized

            return load_quantized(folder, scheme, device="cpu", weights="dummy", progress=False)
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def work(model: Any, what: str, tokens: int) -> dict[str, float]:
    """Tokens that were computed for all sequences, and the seconds they took; of `decode`, without the prompt."""
    import torch

    kind, number = what.split()
    sequences, length = (1, int(number)) if kind == "prefill" else (int(number), PROMPT_BEFORE)
    ids = torch.arange(sequences * length).remainder(500).view(sequences, length)
    count = 1 if kind == "prefill" else tokens
    with torch.inference_mode():
        cache: Any = None
        if kind == "decode":
            out = model(ids, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(count):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        took = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    return {"tokens": length if kind == "prefill" else sequences * count, **took}


def main() -> None:
    scheme, shape, threads = sys.argv[1:]
    import torch

    warnings.simplefilter("ignore", FutureWarning)  # names of arguments that all versions take
    torch.set_num_threads(int(threads))
    model = load(scheme, shape)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(work(model, *json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
