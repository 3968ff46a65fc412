"""What a lazy tensor of a checkpoint costs in Python, on its way into the layers of an engine.

As many tensors as Qwen3-30B-A3B has, of narrow layers: there is next to nothing to read and to quantize. They go
to layers of a stand-in for an engine, which finds the expert of a name, makes one expert of many of the tensor, as vLLM
does, and narrows its parameter. Measured is processor time: of the thread that hands over, which reads nothing itself,
and of the whole process, which reads and quantizes, too.

    python bench/lazy_tensors.py
    python bench/lazy_tensors.py --layers 2 --turns 1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, headline
from quantload.checkpoint.index import read_index
from quantload.checkpoint.resolve import resolve
from quantload.checkpoint.source import FileSource
from quantload.engines.closures import check_complete, quantized_experts, quantized_linear
from quantload.engines.experts_host import EngineExperts
from quantload.engines.origin import CheckpointOrigin
from quantload.online.storage import FinalStorage
from quantload.options import LoadOptions
from quantload.schemes.registry import SchemeFactory
from result_files import RESULTS, write_result
from safetensors.torch import save_file
from torch import Tensor, nn

CPU = torch.device("cpu")
LAYERS, EXPERTS, HIDDEN, INNER = 48, 128, 64, 32
QKV = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
KEPT = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
GOAL_MS, GOAL_SECONDS = 0.15, 3.0


def save(folder: Path, layers: int) -> int:
    """A checkpoint of narrow layers; the number of its tensors."""
    shapes: dict[str, tuple[int, ...]] = {f"model.{name}": (8, HIDDEN) for name in ("embed", "head")}
    shapes["model.norm"] = (HIDDEN,)
    for layer in (f"model.layers.{number}" for number in range(layers)):
        shapes |= {f"{layer}.{name}": (HIDDEN,) for name in KEPT}
        shapes |= {f"{layer}.{name}": (rows, HIDDEN) for name, rows in QKV.items()}
        shapes |= {f"{layer}.o_proj": (HIDDEN, 128), f"{layer}.gate": (EXPERTS, HIDDEN)}
        for expert in range(EXPERTS):
            for part in PARTS:
                shape = (HIDDEN, INNER) if part == "down_proj" else (INNER, HIDDEN)
                shapes[f"{layer}.experts.{expert}.{part}"] = shape
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text("{}")
    return len(shapes)


class Layer(nn.Module):
    """A layer of an engine: q, k and v as one, an output, experts, and what is kept."""

    def __init__(self, name: str, schemes: SchemeFactory, storage: FinalStorage) -> None:
        super().__init__()
        linear: Any = schemes.linear("quark_mxfp4")
        experts: Any = schemes.experts("quark_mxfp4")
        self.qkv, self.output, self.experts = nn.Module(), nn.Module(), nn.Module()
        shards: dict[str, tuple[nn.Module, tuple[tuple[str, int], ...], int]] = {
            "qkv": (self.qkv, tuple(QKV.items()), HIDDEN),
            "o_proj": (self.output, (("", HIDDEN),), 128),
        }
        for key, (module, parts, columns) in shards.items():
            quantized_linear(
                module, f"{name}.{key}", linear, parts, columns, storage, self._load_linear, torch.bfloat16, {}
            )
        weights = {"w13_weight": ((("w1", INNER), ("w3", INNER)), HIDDEN), "w2_weight": ((("w2", HIDDEN),), INNER)}
        quantized_experts(
            self.experts,
            f"{name}.experts",
            experts,
            EXPERTS,
            weights,
            EngineExperts(),
            storage,
            self._load_expert,
            torch.bfloat16,
            lambda expert: expert,
        )
        self.kept = {each: torch.empty(HIDDEN, dtype=torch.bfloat16) for each in KEPT}
        self.kept["gate"] = torch.empty(EXPERTS, HIDDEN, dtype=torch.bfloat16)
        self.rows = dict(zip(QKV, (0, 128, 192), strict=True))

    def load(self, name: str, tensor: Tensor) -> None:
        """Take a tensor by its name in the layer."""
        first, *rest = name.split(".")
        if first == "experts":
            param: Any = getattr(self.experts, "w2_weight" if rest[1] == "down_proj" else "w13_weight")
            for expert, weight in enumerate(tensor.unsqueeze(0).unbind(), start=int(rest[0])):
                param.weight_loader(
                    param, weight, "experts.weight", shard_id=PARTS[rest[1]], expert_id=expert, return_success=True
                )
        elif first in self.kept:
            self.kept[first].copy_(tensor)
        else:
            param = (self.qkv if first in QKV else self.output).weight
            param.weight_loader(param, tensor, first)

    def _load_linear(self, param: Any, loaded_weight: Tensor, shard: str) -> None:
        low = self.rows.get(shard, 0)
        param.data[low : low + loaded_weight.shape[0]].copy_(loaded_weight)

    def _load_expert(
        self, param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, return_success: bool
    ) -> bool:
        data = param.data[expert_id]
        if shard_id != "w2":
            data = data.narrow(0, 0 if shard_id == "w1" else INNER, INNER)
        data.copy_(loaded_weight)
        return True


def load(folder: Path, layers: int) -> tuple[float, float]:
    """Seconds of processor time of one load: of the thread that hands over, and of the process."""
    schemes, storage = SchemeFactory(CPU, LoadOptions()), FinalStorage(CPU)
    built = [Layer(f"model.layers.{number}", schemes, storage) for number in range(layers)]
    checkpoint = resolve(folder)
    index, source = read_index(checkpoint), FileSource(checkpoint.root)
    with CheckpointOrigin(index, source, LoadOptions(workers=1), CPU) as origin:
        thread, process = time.thread_time(), time.process_time()
        for name, tensor in origin.tensors():
            _, kind, *rest = name.split(".")
            if kind == "layers":
                built[int(rest[0])].load(".".join(rest[1:]), tensor)
            else:
                torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        origin.flush()
        thread, process = time.thread_time() - thread, time.process_time() - process
    states: list[Any] = [module.quantload_layer for each in built for module in (each.qkv, each.output, each.experts)]
    check_complete(states)
    return thread, process


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(headline(machine))
    with tempfile.TemporaryDirectory() as folder:
        tensors = save(Path(folder), arguments.layers)
        load(Path(folder), arguments.layers)  # what is compiled, and fetched from caches
        turns = [load(Path(folder), arguments.layers) for _ in range(arguments.turns)]
    thread, process = (statistics.median(each) for each in zip(*turns, strict=True))
    result = {
        "machine": machine,
        "settings": {"layers": arguments.layers, "turns": arguments.turns, "scale": 1},
        "tensors": tensors,
        "thread_seconds": thread,
        "process_seconds": process,
        "thread_ms_each": thread / tensors * 1e3,
        "process_ms_each": process / tensors * 1e3,
        "goal_ms_each": GOAL_MS,
        "goal_seconds": GOAL_SECONDS,
    }
    print(
        f"{tensors} tensors: {thread:.2f} s of the thread that hands over ({thread / tensors * 1e3:.3f} ms each), "
        f"{process:.2f} s of the process; goals {GOAL_MS} ms and {GOAL_SECONDS} s"
    )
    print(write_result("lazy_tensors", result, arguments.out, "" if arguments.layers == LAYERS else "reduced"))


if __name__ == "__main__":
    main()
