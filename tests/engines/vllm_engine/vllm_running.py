"""vLLM with a model in this process; as a script, with one in processes of its own.

python vllm_running.py CHECKPOINT SCHEME OPTIONS prints the log probabilities of the tokens of a text, as JSON.
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
    if options.get("tensor_parallel_size", 1) == 1:
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


def log_probabilities(engine: Any) -> list[float]:
    """Of each token of the text after the first, given those before it."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": TOKENS}], wanted, use_tqdm=False)
    told = zip(answer.prompt_logprobs[1:], TOKENS[1:], strict=True)
    return [float(of_token[token].logprob) for of_token, token in told]


def model_of(engine: Any) -> Any:
    """The model of an engine in this process."""
    return engine.llm_engine.model_executor.driver_worker.model_runner.get_model()


if __name__ == "__main__":
    with running(Path(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3])) as made:
        print(f"{ANSWER}{json.dumps(log_probabilities(made))}", flush=True)
