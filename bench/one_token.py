"""How fast the kernels for one token read weights out of memory, and what a call costs besides.

For every format, and for weights in BF16, float16 and float32, a product with one to four tokens, prepared as a layer
has it, takes turns with a plain read of as many bytes: each call takes the next of several equal weights, together more
than the last-level cache holds, as a model that decodes goes from layer to layer. For weights that are no codes torch's
own product takes turns, too. `read` is the largest of all 32-bit words. With one thread it is processor time that is
measured, which other processes take less from. Then a call of a module with so small a weight that all of it is Python,
for every scheme.

    python bench/one_token.py
    python bench/one_token.py --formats mxfp4 plain_bf16 --threads 1 --tokens 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe_machine, headline
from markdown import markdown
from quantload import LoadOptions
from quantload.kernels.formats import FORMATS
from quantload.kernels.registry import Prepared, kernel_set, plain_linear
from quantload.model.quantized import QuantizedLinear
from quantload.online.storage import FinalStorage
from quantload.schemes.registry import SchemeFactory
from result_files import RESULTS, write_result
from torch import Tensor, nn

MIB = 1 << 20
PLAIN = {"plain_bf16": torch.bfloat16, "plain_f16": torch.float16, "plain_f32": torch.float32}
FP_CODES = ("mxfp4", "nvfp4", "nl4", "mxfp6_e2m3", "mxfp8", "fp8_channel", "fp8_block")
FORMATS_MEASURED = (*PLAIN, *FP_CODES, "int4_group128_f16", "int8_channel")
SCHEMES = ("quark_mxfp4", "int4_per_group", "int8_per_channel", "fp8_per_channel")
READ_GOAL, CALL_GOAL_US = 0.8, 6.0


def weights_of(name: str, rows: int, cols: int, rotated_bytes: int) -> list[tuple[Tensor, ...]]:
    """Equal weights, codes and scales or values, that together take at least `rotated_bytes`."""
    source = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    if name in PLAIN:
        first: tuple[Tensor, ...] = (source.to(PLAIN[name]),)
    else:
        first = FORMATS[name].empty(rows, cols)
        kernel_set(name, "cpu").quantize(source, first)
    copies = max(2, -(-rotated_bytes // sum(each.nbytes for each in first)))
    with FinalStorage(torch.device("cpu")) as storage:  # in huge pages, as in a model
        return [
            tuple(storage.empty(tuple(each.shape), each.dtype).copy_(each) for each in first) for _ in range(copies)
        ]


def sides_of(name: str, weights: list[tuple[Tensor, ...]], x: Tensor, rows: int) -> dict[str, Callable[[int], object]]:
    """What takes turns: a read of the bytes, the kernel, and torch where it has a product of them."""
    largest = [max(each, key=Tensor.numel).view(-1).view(torch.uint8).view(torch.int32) for each in weights]
    sides: dict[str, Callable[[int], object]] = {"read": lambda i: largest[i].max()}
    if name in PLAIN:
        kernel = plain_linear(torch.device("cpu"))
        assert kernel is not None
        sides["kernel"] = lambda i: kernel.linear(x, weights[i][0], None)
        sides["torch"] = lambda i: F.linear(x, weights[i][0])
    else:
        shape, made = (x.shape[0], rows), [prepared(name, each, x, rows) for each in weights]
        sides["kernel"] = lambda i: made[i](x, weights[i], None, shape)
    return sides


def prepared(name: str, weight: tuple[Tensor, ...], x: Tensor, rows: int) -> Prepared:
    """The product of a quantized weight as a layer keeps it."""
    prepare = kernel_set(name, "cpu").prepare
    made = None if prepare is None else prepare(weight, rows, x.shape[1], x.dtype)
    if made is None:
        raise SystemExit(f"{name} has no kernel for a few tokens here")
    return made


def take_turns(sides: dict[str, Callable[[int], object]], count: int, turns: int) -> dict[str, list[float]]:
    """Seconds of each side's turns, of which each goes once through `count` weights."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for side in sides:
        sides[side](0)
    for _ in range(turns):
        for side, run in sides.items():
            start = clock()
            for number in range(count):
                run(number)
            seconds[side].append(clock() - start)
    return seconds


def measure(name: str, tokens: list[int], shape: tuple[int, int], turns: int, rotated: int) -> list[dict[str, Any]]:
    """A record for each number of tokens: GB/s of all sides, and the median of the ratios of kernel to read."""
    rows, cols = shape
    weights = weights_of(name, rows, cols, rotated)
    nbytes = sum(each.nbytes for weight in weights for each in weight)
    read_bytes = sum(max(each.nbytes for each in weight) for weight in weights)
    dtype, found = PLAIN.get(name, torch.bfloat16), []
    for count in tokens:
        x = torch.randn(count, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
        seconds = take_turns(sides_of(name, weights, x, rows), len(weights), turns)
        speed = {side: nbytes / statistics.median(each) / 1e9 for side, each in seconds.items()}
        speed["read"] *= read_bytes / nbytes
        pairs = zip(seconds["read"], seconds["kernel"], strict=True)
        of_read = statistics.median(read / kernel * nbytes / read_bytes for read, kernel in pairs)
        us = statistics.median(seconds["kernel"]) / len(weights) * 1e6
        found.append({"format": name, "tokens": count, "gb_per_s": speed, "of_read": of_read, "us": us})
    return found


def measure_calls(scheme_name: str, calls: int, turns: int) -> float:
    """Microseconds of a call of a quantized module with a weight of [8, 128], one token: the least of some turns."""
    made: Any = SchemeFactory(torch.device("cpu"), LoadOptions()).linear(scheme_name)
    module: Any = QuantizedLinear(made, 128, 8, None, False)
    tensors = made.kernels.format.empty(8, 128)
    made.kernels.quantize(torch.randn(8, 128).bfloat16(), tensors)
    for name, tensor in zip(made.kernels.format.names("weight"), tensors, strict=True):
        module._parameters[name] = module._parameters[name].around(tensor)
    made.process_weights_after_loading(module)
    return _least(module, calls, turns)


def _least(module: nn.Module, calls: int, turns: int) -> float:
    x, best = torch.randn(1, 1, 128).bfloat16(), float("inf")
    with torch.inference_mode():
        for _ in range(turns):
            start = time.perf_counter()
            for _ in range(calls):
                module(x)
            best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    header = ["format", "threads", "tokens", "kernel GB/s", "read GB/s", "kernel / read", "torch GB/s"]
    rows = []
    for each in records:
        speed = {side: f"{value:.1f}" for side, value in each["gb_per_s"].items()}
        counts = str(each["threads"]), str(each["tokens"])
        of_read = f"{each['of_read']:.2f}"
        rows.append([each["format"], *counts, speed["kernel"], speed["read"], of_read, speed.get("torch", "")])
    return markdown(rows, header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS_MEASURED)
    parser.add_argument("--shape", default="3072x2048", help="ROWSxCOLUMNS")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rotated-mib", type=int, default=192, help="of weights that calls go through in turns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows, _, cols = arguments.shape.partition("x")
    machine, records = describe_machine(), []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in arguments.formats:
            measured = measure(
                name, arguments.tokens, (int(rows), int(cols)), arguments.turns, arguments.rotated_mib * MIB
            )
            records += [{"threads": threads, **each} for each in measured]
            print(table(records[-len(measured) :]), flush=True)
    torch.set_num_threads(1)
    calls = {name: measure_calls(name, 200, 300) for name in (*SCHEMES,)}
    print(table(records), f"\nPython of a call, us: {calls}\n\n{headline(machine)}")
    result = {"machine": machine, "shape": arguments.shape, "records": records, "call_us": calls}
    result["goals"] = {"of_read": READ_GOAL, "call_us": CALL_GOAL_US}
    print(write_result("one_token", result, arguments.out))


if __name__ == "__main__":
    main()
