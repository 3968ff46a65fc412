"""What `bench/pipeline.py` takes its time of: reading alone, quantizing alone, a whole load, planning alone."""

from __future__ import annotations

import gc
import importlib
import threading
import time
from pathlib import Path
from typing import Any

import torch
from quantload.checkpoint.index import read_index
from quantload.checkpoint.pieces import Piece
from quantload.checkpoint.reader import PieceReader
from quantload.checkpoint.resolve import resolve
from quantload.checkpoint.source import FileSource
from quantload.kernels import statistics as stats
from quantload.kernels.registry import kernel_set
from quantload.options import LoadOptions
from quantload.planning import plan_quantized
from quantload.reload.flow import reload_weights
from stopwatch import Stopwatch

load_module: Any = importlib.import_module("quantload.load")
draft_module: Any = importlib.import_module("quantload.draft")

SCHEME, FORMAT = "quark_mxfp4", "mxfp4"
PIECE_BYTES = 8 << 20
COLUMNS = 4096
PLAN_STEPS = ("read_index", "map_checkpoint", "build_routes", "plan_load", "assign_schemes", "attach_weight_loaders")


def read_alone(folder: Path) -> float:
    """Bytes a second of the project's reader with all workers, when nobody does anything with the pieces."""
    index = read_index(resolve(folder))
    pieces = [
        Piece(number, ((offset, min(PIECE_BYTES, shard.size - offset)),), lambda _: None)
        for number, shard in enumerate(index.shards)
        for offset in range(0, shard.size, PIECE_BYTES)
    ]
    workers = LoadOptions().worker_count()
    totals = PieceReader(FileSource(folder), index.shards, workers=workers, chunk_bytes=PIECE_BYTES).run(pieces)
    return totals.bytes_read / totals.seconds


def quantize_alone(size: int, format_name: str = FORMAT) -> float:
    """Bytes a second of all workers together, each quantizing its own hot 8 MiB piece again and again.

    With statistics, as a load does. `size`: bytes of BF16 that all of them take together.
    """
    workers = LoadOptions().worker_count()
    rounds = max(1, size // (workers * PIECE_BYTES))
    gate = threading.Barrier(workers + 1)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            kernels, shape = kernel_set(format_name, "cpu"), (PIECE_BYTES // (2 * COLUMNS), COLUMNS)
            source = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()
            tensors, vector = kernels.format.empty(*shape), stats.new_statistics()
            kernels.quantize(source, tensors, vector)
            gate.wait()
            for _ in range(rounds):
                kernels.quantize(source, tensors, vector)
        except BaseException as error:
            failures.append(error)
            gate.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(workers)]
    for thread in threads:
        thread.start()
    try:
        gate.wait()
    except threading.BrokenBarrierError:
        raise failures[0] from None
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if failures:
        raise failures[0]
    return rounds * workers * PIECE_BYTES / seconds


def load_whole(folder: Path, scheme: str = SCHEME, again: bool = False) -> dict[str, float]:
    """Seconds of one `load_quantized`: `total`, and `stream`, the part in which pieces are read and quantized.

    `again`: and of a `reload_weights` of the same files into the memory of that model, `reload`.
    """
    gc.collect()
    with Stopwatch((PieceReader, "run")) as watch:
        start = time.perf_counter()
        model = load_module.load_quantized(str(folder), quantization=scheme, device="cpu")
        total = time.perf_counter() - start
    seconds = {"total": total, "stream": watch.seconds["run"]}
    if again:
        start = time.perf_counter()
        reload_weights(model, str(folder), progress=False)
        seconds["reload"] = time.perf_counter() - start
    del model
    gc.collect()
    return seconds


def plan_alone(folder: Path, scheme: str = SCHEME) -> dict[str, Any]:
    """Seconds of everything before the first weight, `total` and by step, and the number of tensors."""
    gc.collect()
    with Stopwatch(*((draft_module, name) for name in PLAN_STEPS)) as watch:
        start = time.perf_counter()
        draft = plan_quantized(str(folder), scheme, device="cpu")
        total = time.perf_counter() - start
    return {"total": total, "tensors": len(draft.index.tensors), **watch.seconds}
