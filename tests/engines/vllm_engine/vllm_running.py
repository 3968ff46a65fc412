"""vLLM with a model in this process; as a script, with one in processes of its own.

python vllm_running.py CHECKPOINT SCHEME OPTIONS prints the log probabilities of the tokens of a text, as JSON. With
`quantized_tensors`, a folder, in the options each rank leaves its codes and scales in `loaded` there; with `reloaded`,
other checkpoints, also in `reloaded`, after it has loaded these, one after the other.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKENS = [7, 61, 130, 5, 88, 240, 17, 33, 201, 9, 77, 150, 42, 3, 99, 180]
SEEN = "def draw(<image>): return"
"""A prompt with a picture."""
ANSWER = "log probabilities: "
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to workers
    "HF_HUB_OFFLINE": "1",
}
SMALL: dict[str, Any] = {
    "load_format": "quantload", "dtype": "bfloat16", "enforce_eager": True, "skip_tokenizer_init": True,
    "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64, "enable_prefix_caching": False,
}  # fmt: skip


@contextmanager
def running(checkpoint: Path, scheme: str, **options: Any) -> Iterator[Any]:
    """An engine; in this process unless it has several ranks."""
    os.environ.update(ENVIRONMENT)
    if options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        options["distributed_executor_backend"] = "uni"
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = LLM(model=str(checkpoint), quantization=scheme, **{**SMALL, **options})
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()  # a traceback may hold it
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def log_probabilities(engine: Any, **options: Any) -> list[float]:
    """Of each token of the text after the first, given those before it; `options` are those of `generate`."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": TOKENS}], wanted, use_tqdm=False, **options)
    told = zip(answer.prompt_logprobs[1:], TOKENS[1:], strict=True)
    return [float(of_token[token].logprob) for of_token, token in told]


def picture() -> Any:
    """A picture of 56 x 56."""
    from PIL import Image  # type: ignore[import-not-found,unused-ignore]

    return Image.linear_gradient("L").resize((56, 56)).convert("RGB")


def log_probabilities_beside(engine: Any, image: Any) -> list[float]:
    """Of each token of a prompt with a picture, given those before it."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = {"prompt": SEEN, "multi_modal_data": {"image": image}}
    (answer,) = engine.generate([prompt], wanted, use_tqdm=False)
    told = zip(answer.prompt_logprobs[1:], answer.prompt_token_ids[1:], strict=True)
    return [float(of_token[token].logprob) for of_token, token in told]


def model_of(engine: Any) -> Any:
    """The model of an engine in this process."""
    return engine.llm_engine.model_executor.driver_worker.model_runner.get_model()


def quantized_tensors(model: Any) -> dict[str, Any]:
    """The codes and scales of a model, as bytes in the last dimension."""
    import torch
    from quantload.engines.closures import engine_layers

    return {
        f"{layer.name}.{name}": tensor.data.view(torch.uint8)
        for module, layer in engine_layers(model)
        for name, tensor in module.named_parameters(recurse=False)
        if name.startswith(("weight", "w13_weight", "w2_weight"))
    }


def _leave_tensors(worker: Any, folder: str) -> None:
    from safetensors.torch import save_file

    Path(folder).mkdir(exist_ok=True)
    save_file(quantized_tensors(worker.get_model()), f"{folder}/rank{worker.rank}.safetensors")


if __name__ == "__main__":
    given = json.loads(sys.argv[3])
    left, others = given.pop("quantized_tensors", None), given.pop("reloaded", ())
    with running(Path(sys.argv[1]), sys.argv[2], **given) as made:
        if left is not None:
            made.collective_rpc(_leave_tensors, args=(f"{left}/loaded",))
        for other in others:
            made.collective_rpc("reload_weights", kwargs={"weights_path": other})
        if others:
            made.collective_rpc(_leave_tensors, args=(f"{left}/reloaded",))
        print(f"{ANSWER}{json.dumps(log_probabilities(made))}", flush=True)
