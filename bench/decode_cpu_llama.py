"""A side of `decode_cpu.py` that is llama.cpp: `decode_cpu_llama.py TYPE SHAPE THREADS`.

Writes a GGUF of a shape with random weights, of which all layers have equal ones, and loads it. Runs in an environment
of its own, where llama-cpp-python (built for this processor) and gguf are installed; neither torch nor quantload need
be. TYPE is that of GGUF for the matrices; embeddings and the output head are in BF16.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from decode_cpu_child import PROMPT, PROMPT_BEFORE, SHAPES

PLACES = 256
"""Of the cache, for each sequence that is decoded: llama.cpp takes no fewer."""


class Weights:
    """Adds random tensors to a GGUF; those of one shape and type are made once."""

    def __init__(self, writer: Any, kind: str) -> None:
        import numpy as np

        self._writer, self._kind = writer, kind
        self._generator, self._made = np.random.default_rng(0), dict[tuple[Any, ...], Any]()

    def add(self, name: str, *dims: int, kind: str = "", copies: int = 0) -> None:
        """A tensor `dims`, or as many copies of it as there are experts, in one."""
        import numpy as np

        gguf = importlib.import_module("gguf")
        own = gguf.GGMLQuantizationType[kind or self._kind]
        if (dims, own, copies) not in self._made:
            values = self._generator.standard_normal(dims, dtype=np.float32) * np.float32(0.02)
            quantized = gguf.quants.quantize(values, own)
            self._made[dims, own, copies] = np.stack([quantized] * copies) if copies else quantized
        self._writer.add_tensor(name, self._made[dims, own, copies], raw_dtype=own)


def write(path: Path, shape: dict[str, Any], kind: str) -> None:
    """A model of that shape, its matrices in `kind`, norms and routers in float32."""
    writer = importlib.import_module("gguf").GGUFWriter(path, shape["model_type"].replace("_", ""))
    _write_config(writer, shape)
    weights = Weights(writer, kind)
    width, size = shape["hidden_size"], shape["head_dim"]
    queries, keys = (size * shape[name] for name in ("num_attention_heads", "num_key_value_heads"))
    experts = shape.get("num_experts", 0)
    inner, suffix = (shape["moe_intermediate_size"], "_exps") if experts else (shape["intermediate_size"], "")
    weights.add("token_embd.weight", shape["vocab_size"], width, kind="BF16")
    weights.add("output.weight", shape["vocab_size"], width, kind="BF16")
    weights.add("output_norm.weight", width, kind="F32")
    for layer in range(shape["num_hidden_layers"]):
        block = f"blk.{layer}"
        for norm, length in (("attn_norm", width), ("ffn_norm", width), ("attn_q_norm", size), ("attn_k_norm", size)):
            weights.add(f"{block}.{norm}.weight", length, kind="F32")
        for name, rows, columns in (("q", queries, width), ("k", keys, width), ("v", keys, width)):
            weights.add(f"{block}.attn_{name}.weight", rows, columns)
        weights.add(f"{block}.attn_output.weight", width, queries)
        if experts:
            weights.add(f"{block}.ffn_gate_inp.weight", experts, width, kind="F32")
        for name, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            weights.add(f"{block}.ffn_{name}{suffix}.weight", rows, columns, copies=experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: Any, shape: dict[str, Any]) -> None:
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("none")
    if "num_experts" in shape:
        writer.add_expert_count(shape["num_experts"])
        writer.add_expert_used_count(shape["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(shape["moe_intermediate_size"])


class Context:
    """A context of llama.cpp for so many sequences of at most so many tokens."""

    def __init__(self, lib: Any, model: Any, threads: int, sequences: int, places: int) -> None:
        self._lib = lib
        chosen = lib.llama_context_default_params()
        chosen.n_ctx, chosen.n_seq_max = sequences * places, sequences
        chosen.n_batch = chosen.n_ubatch = PROMPT
        chosen.n_threads = chosen.n_threads_batch = threads
        self._context = lib.llama_init_from_model(model, chosen)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context for {sequences} sequences of {places} tokens")
        self._batch = lib.llama_batch_init(PROMPT, 0, 1)

    def run(self, sequences: int, length: int, first: int) -> None:
        """`length` tokens of each sequence, from a position on; the last of each gets logits."""
        batch, count = self._batch, 0
        for sequence in range(sequences):
            for number in range(length):
                batch.token[count], batch.pos[count] = (count * 7) % 500, first + number
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = number == length - 1
                count += 1
        batch.n_tokens = count
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        self._lib.llama_synchronize(self._context)

    def forget(self) -> None:
        """All sequences."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)


class Llama:
    """A model of llama.cpp; it has a context for each number of sequences, which is what it is fastest with."""

    def __init__(self, path: Path, threads: int) -> None:
        self._lib: Any = importlib.import_module("llama_cpp")
        self._threads, self._contexts = threads, dict[tuple[int, int], Context]()
        self._silence = self._lib.llama_log_callback(lambda *_: None)
        self._lib.llama_log_set(self._silence, None)
        self._lib.llama_backend_init()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path.name}")

    def about(self) -> dict[str, str]:
        """The version, and the instructions it was compiled for."""
        instructions = self._lib.llama_print_system_info().decode()
        return {"version": self._lib.__version__, "instructions": instructions}

    def work(self, what: str, tokens: int) -> dict[str, float]:
        """See `decode_cpu_child.work`."""
        kind, number = what.split()
        prefills = kind == "prefill"
        sequences, places = (1, PROMPT) if prefills else (int(number), PLACES)
        if (sequences, places) not in self._contexts:
            made = Context(self._lib, self._model, self._threads, sequences, places)
            self._contexts[sequences, places] = made
        context = self._contexts[sequences, places]
        context.forget()
        if not prefills:
            context.run(sequences, PROMPT_BEFORE, 0)
        wall, processor = time.perf_counter(), time.process_time()
        if prefills:
            context.run(1, int(number), 0)
        else:
            for step in range(tokens):
                context.run(sequences, 1, PROMPT_BEFORE + step)
        took = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        return {"tokens": int(number) if prefills else sequences * tokens, **took}


def main() -> None:
    kind, shape, threads = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{shape}-{kind}.gguf"
        write(path, SHAPES[shape], kind)
        llama = Llama(path, int(threads))  # which has the file mapped; this process is killed at the end
    print("ready", json.dumps(llama.about()), flush=True)
    for line in sys.stdin:
        print(json.dumps(llama.work(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
