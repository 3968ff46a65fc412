"""What vLLM's engine makes of a prompt, for several checkpoints: a process of its own that test_compat_vllm starts.

vLLM 0.32 looks into every imported module for kernels it replaces on a CPU, and fails on those of llvmlite, which numba
has imported wherever quantload has run.

    python vllm_answers.py ANSWERS.json TOKENS.json CHECKPOINT ...
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def answer(path: str, tokens: list[int]) -> list[float]:
    """The log-probability of each token of the prompt after the first."""
    from vllm import LLM, SamplingParams

    engine: Any = LLM(path, dtype="bfloat16", max_model_len=128, enforce_eager=True, skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    return [given[token].logprob for token, given in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]


def main(out: str, prompt: str, *checkpoints: str) -> None:
    """Answer for every checkpoint, in order."""
    from vllm.distributed import cleanup_dist_env_and_memory

    tokens = json.loads(Path(prompt).read_text())
    answers = []
    for path in checkpoints:
        answers.append(answer(path, tokens))
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
