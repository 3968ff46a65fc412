"""A process with a real SGLang engine: loads, generates, updates its weights and generates again.

Its argument is JSON: `model`, `options` of the engine, `prompts`, `tokens`, and `update`, a folder or nothing, from
which weights are updated; then those of `model` are handed over as tensors. What it prints behind `RESULT` is JSON: for
each of them, and each prompt, the token ids and their log-probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def generated(engine: Any, prompts: list[list[int]], tokens: int) -> list[Any]:
    """Greedy continuations."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    answers = [engine.generate(input_ids=ids, sampling_params=sampling, return_logprob=True) for ids in prompts]
    return [[[int(token), lp] for lp, token, *_ in each["meta_info"]["output_token_logprobs"]] for each in answers]


def hand_over(engine: Any, model: str) -> None:
    """Update all weights from the tensors of a folder, in two lots: as who trains a model hands its weights over."""
    from safetensors.torch import load_file

    files = [load_file(path) for path in sorted(Path(model).glob("*.safetensors"))]
    tensors = [item for file in files for item in file.items()]
    assert engine.begin_weight_update()[0]
    for lot in (tensors[::2], tensors[1::2]):
        done, message, *_ = engine.update_weights_from_tensor(lot)
        assert done, message
    done, message, *_ = engine.end_weight_update()
    assert done, message


def main() -> None:
    """Run what the argument says."""
    import sglang

    asked = json.loads(sys.argv[1])
    engine = sglang.Engine(
        model_path=asked["model"],
        device="cpu",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        mem_fraction_static=0.9,  # of what is there before the load, which other processes may take meanwhile
        max_total_tokens=1024,
        max_running_requests=4,
        skip_server_warmup=True,
        skip_tokenizer_init=True,
        log_level="info",
        **asked["options"],
    )
    results = [generated(engine, asked["prompts"], asked["tokens"])]
    if asked["update"]:
        done, message, *_ = engine.update_weights_from_disk(asked["update"])
        assert done, message
        results.append(generated(engine, asked["prompts"], asked["tokens"]))
        hand_over(engine, asked["model"])
        results.append(generated(engine, asked["prompts"], asked["tokens"]))
    print("RESULT", json.dumps(results), flush=True)
    engine.shutdown()


if __name__ == "__main__":  # SGLang's processes import this module
    main()
